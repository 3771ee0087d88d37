"""One process of several_processes_test: trains the tiny system of conftest.py."""

import importlib.util
import sys
from pathlib import Path

from vpe_jax import sharding
from vpe_jax.training import loop

if __name__ == '__main__':
  workdir, weights, steps = sys.argv[1:]
  sharding.initialize_distributed()
  spec = importlib.util.spec_from_file_location('tiny', Path(__file__).with_name('conftest.py'))
  tiny = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(tiny)
  config = tiny.make_config(steps=(2, int(steps)))
  loop.train(config, tiny.LineSystem(config, {'encoder': weights}), workdir)
