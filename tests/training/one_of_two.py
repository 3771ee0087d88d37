"""One process of several_processes_test: trains the toy system of tests/toy_systems.py."""

import sys
import time

from tests.toy_systems import LineSystem, make_config
from vpe_jax import sharding
from vpe_jax.contracts import FrozenNetwork
from vpe_jax.training import loop

START_UP = {'data': (loop.Pipeline, 'of'), 'compilation': (loop, '_compile')}


def stay_in(phase: str) -> None:
  """Makes a phase before the first step take minutes."""

  def wait(*_):
    print('waiting', flush=True)
    time.sleep(300)

  setattr(*START_UP[phase], wait)


if __name__ == '__main__':
  workdir, weights, steps, *phases = sys.argv[1:]
  for phase in phases:
    stay_in(phase)
  sharding.initialize_distributed()
  config = make_config(steps=(2, int(steps)))
  loop.train(config, LineSystem(config, {'encoder': FrozenNetwork(weights)}), workdir)
