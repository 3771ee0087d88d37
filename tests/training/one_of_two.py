"""One process of several_processes_test: trains the tiny system of conftest.py."""

import sys

import conftest as tiny  # this script's own folder is on the path

from vpe_jax import sharding
from vpe_jax.contracts import FrozenNetwork
from vpe_jax.training import loop

if __name__ == '__main__':
  workdir, weights, steps = sys.argv[1:]
  sharding.initialize_distributed()
  config = tiny.make_config(steps=(2, int(steps)))
  loop.train(config, tiny.LineSystem(config, {'encoder': FrozenNetwork(weights)}), workdir)
