"""One process of several_processes_test: trains the toy system of tests/toy_systems.py."""

import sys
import time

import jax

from tests.toy_systems import LineSystem, make_config
from vpe_jax import sharding
from vpe_jax.contracts import FrozenNetwork, UserError
from vpe_jax.training import loop

FAILURE = 'failure'
START_UP = {'data': (loop.Pipeline, 'of'), 'compilation': (loop, '_compile')}


def stay_in(phase: str) -> None:
  """Makes a phase before the first step take minutes."""

  def wait(*_):
    print('waiting', flush=True)
    time.sleep(300)

  setattr(*START_UP[phase], wait)


def fail(*_: object) -> None:
  """Stands for a folder of images that process 1 alone can't read."""
  raise UserError('the folder is missing here')


if __name__ == '__main__':
  workdir, weights, steps, *phases = sys.argv[1:]
  sharding.initialize_distributed()
  for phase in phases:
    if phase == FAILURE and jax.process_index() == 1:
      loop.Pipeline.of = fail
    else:  # As long as in a collective on accelerators, which has no timeout.
      stay_in('data' if phase == FAILURE else phase)
  config = make_config(steps=(2, int(steps)))
  loop.train(config, LineSystem(config, {'encoder': FrozenNetwork(weights)}), workdir)
