"""One process of several_processes_test: trains the toy system of tests/toy_systems.py."""

import sys

from tests.toy_systems import LineSystem, make_config
from vpe_jax import sharding
from vpe_jax.contracts import FrozenNetwork
from vpe_jax.training import loop

if __name__ == '__main__':
  workdir, weights, steps = sys.argv[1:]
  sharding.initialize_distributed()
  config = make_config(steps=(2, int(steps)))
  loop.train(config, LineSystem(config, {'encoder': FrozenNetwork(weights)}), workdir)
