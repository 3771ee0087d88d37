"""Starts or continues a run, or a chain of runs, from configs as nested dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vpe_jax import systems
from vpe_jax.checkpoints import hub, weights
from vpe_jax.contracts import System
from vpe_jax.training import config_file, loop, reference, resume


def build(config: Mapping[str, Any], workdir: str) -> System:
  """The system of a run; hub names in its config get the revisions that the run started with.

  Raises:
    UserError: the config is invalid, or a model can't be downloaded.
  """
  return systems.build(hub.pin(systems.build(config), workdir))


def run(config: Mapping[str, Any], workdir: str, allow_change: Sequence[str] = ()) -> bool:
  """Starts or continues the run of a config; the Python API of `vpe_jax.main`.

  Returns:
    Whether the run is complete; False after SIGTERM, when it was saved before its end.

  Raises:
    UserError: the config, the folder, the data or the machine is unsuitable.
  """
  system = build(config, workdir)
  finished = loop.train(system.config, system, workdir, allow_change)
  if finished is not None and jax.process_index() == 0:
    if lines := reference.comparison(system, workdir):
      print(lines)
    print(f'done: {workdir}', flush=True)
  return finished is not None


def run_chain(
  chain: Mapping[str, dict[str, Any]], workdir: str, allow_change: Sequence[str] = ()
) -> bool:
  """Starts or continues the runs of a chain in order, each in its subfolder of `workdir`.

  Args:
    chain: name -> config, from config_file.load_chain.
    workdir: folder of the chain, or of its single run.
    allow_change: see `run`.

  Returns:
    Whether all runs are complete.

  Raises:
    UserError: see `run`.
  """
  runs = config_file.in_folder(chain, workdir)
  *_, last = runs
  for folder, config in runs.items():
    # Complete runs are not loaded again. The last one is, which ends as a single run does.
    if folder != last and _is_complete(config, folder, allow_change):
      continue
    if not run(config, folder, allow_change):
      return False
  return True


def _is_complete(config: Mapping[str, Any], workdir: str, allow_change: Sequence[str]) -> bool:
  """Whether the newest checkpoint in a folder is the last one of a run.

  Raises:
    UserError: the run in the folder has another config.
  """
  record = weights.newest_record(workdir)
  # The built config has the steps of each stage; a config file may name one number for all.
  if record is None or record['step'] < sum(systems.build(config).config.steps):
    return False
  resume.check_config(build(config, workdir).config, record['config'], workdir, allow_change)
  return True
