"""Checkpoints of a run: saved in the background, verified on load, newest good one first.

A checkpoint is a folder named after its step. Orbax (v1 API; nothing else in the library knows
it) writes the arrays of the state, each under its path such as `opt_state/mu/ar/layers/q/kernel`,
and a record in JSON: counters, config, machine, and shape, dtype and checksum of every array.

What Orbax guarantees: a folder gets its name and its commit marker only when all is written, so
an interrupted save is never taken for a checkpoint. What it does not notice: a missing marker on
load, and changed bits in the data, which load as other values. Both are checked here.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vpe_jax import __version__
from vpe_jax.checkpoints.checksum import checksums
from vpe_jax.config import CheckpointConfig
from vpe_jax.contracts import UserError
from vpe_jax.sharding import by_path
from vpe_jax.storage import is_remote, move_aside, reached

COUNTERS = ('stage', 'step', 'stage_step', 'examples_seen')
FOLDER = 'checkpoints'  # of a workdir
_STATE = 'state'  # the part of a checkpoint that holds the arrays
_MARKER = 'commit_success.txt'  # written by Orbax last of all
_UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of a folder that is written or deleted

State = dict[str, Any]
Meta = dict[str, Any]


class _Damaged(Exception):
  """Why a checkpoint can't be used."""


class Store:
  """The checkpoints in one directory (local, or gs://...).

  In a run of several processes every process makes the same calls in the same order, and the
  directory is one that all of them see.
  """

  def __init__(self, directory: str, config: CheckpointConfig):
    """Names a directory; nothing is read or written yet.

    Raises:
      UserError: `keep` or `every` is below 1, or `keep_every` is negative.
    """
    if config.keep < 1 or config.every < 1 or config.keep_every < 0:
      raise UserError(
        f'checkpoint.keep={config.keep} and checkpoint.every={config.every} must be at least 1, '
        f'checkpoint.keep_every={config.keep_every} at least 0'
      )
    self._directory = epath.Path(directory)
    if not is_remote(directory):
      self._directory = self._directory.absolute()
    self._config = config
    self._worker = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future[None] | None = None
    self._newest: int | None = None  # the step saved or restored last; -1: there was none
    self._damaged: set[int] = set()  # steps that restore passed over

  def due(self, step: int) -> bool:
    """Whether `save` without `force` saves at this step."""
    return step > 0 and step % self._config.every == 0

  def save(self, state: State, config_dict: Mapping[str, Any], force: bool = False) -> bool:
    """Saves a state if it is due; returns when the arrays are copied, and writes behind that.

    The arrays may be donated or changed afterwards. Reading `step` out of a state waits until
    the state is computed: a loop that counts itself asks `due` first.

    Args:
      state: {stage, step, stage_step, examples_seen, params, opt_state, ema}; counters may be
        Python numbers or arrays.
      config_dict: the run's config, as from `vpe_jax.config.to_dict`.
      force: save at a step that isn't due (the last one, or after SIGTERM).

    Returns:
      Whether a save was started; False too if this step was just saved or restored.

    Raises:
      UserError: the directory holds this step or later ones and they weren't restored.
    """
    step = int(state['step'])
    if step == self._newest or not (force or self.due(step)):
      return False
    self.wait()
    self._make_room(step)
    arrays = _arrays(state)
    record = {name: int(state[name]) for name in COUNTERS}
    record |= {'config': dict(config_dict), 'version': __version__, **_machine()}
    sums = checksums(arrays)
    record['leaves'] = {
      path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'checksum': sums[path]}
      for path, leaf in arrays.items()
    }
    sealed = {'record': record, 'digest': _digest(record)}
    with _full_disk_named(self._directory), _writing():
      response = ocp.save_checkpointables_async(
        self._directory / str(step), {_STATE: arrays}, custom_metadata=sealed
      )
    self._newest = step
    self._pending = self._worker.submit(self._finish, response)
    return True

  def restore(self, abstract_of: Callable[[Meta], State]) -> State | None:
    """Loads the newest checkpoint that is whole.

    A damaged one is named in a warning and the one before it is tried. The next `save` puts it
    aside, as `damaged-STEP`.

    Args:
      abstract_of: from a checkpoint's record {stage, step, stage_step, examples_seen, config,
        cpu_threads, devices, version, leaves} to the state that is wanted: arrays as
        `jax.ShapeDtypeStruct` with shardings (of any mesh), counters also as plain numbers.

    Returns:
      The state, or None if the directory has no checkpoint.

    Raises:
      UserError: every checkpoint is damaged, or the wanted state has other leaves.
    """

    def load(step: int, meta: Meta) -> State:
      return self._load(step, meta, abstract_of(meta))

    found = self._first_whole(load)
    if found is None:
      self._newest = -1
      return None
    meta, state = found
    self._newest = meta['step']
    for name, here in _machine().items():
      decides = name != 'cpu_threads' or jax.default_backend() == 'cpu'
      if decides and meta[name] != here:
        logging.warning(
          'checkpoint %d was made with %s=%s, this process has %s: results may differ in their '
          'last bits', meta['step'], name, meta[name], here,
        )  # fmt: skip
    return state

  def read(self, wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], Meta] | None:
    """Loads some leaves of the newest checkpoint that is whole, on the host.

    Args:
      wanted: whether a path such as `params/ar/layers/q/kernel` is to be loaded.

    Returns:
      ({path: array}, record), or None if the directory has no checkpoint.

    Raises:
      UserError: every checkpoint is damaged.
    """

    def load(step: int, meta: Meta) -> dict[str, np.ndarray]:
      leaves = meta['leaves'].items()
      targets = {
        path: np.empty(leaf['shape'], leaf['dtype']) for path, leaf in leaves if wanted(path)
      }
      return self._verified(step, meta, targets)

    found = self._first_whole(load)
    return None if found is None else (found[1], found[0])

  def latest_meta(self) -> Meta | None:
    """The record of the newest checkpoint that has a readable one, or None without any."""
    for step in reversed(self.steps()):
      try:
        return self._record(step)
      except _Damaged as reason:
        logging.warning('checkpoint %d in %s: %s', step, self._directory, reason)
    return None

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints on disk, in ascending order."""
    return [step for step in self._folders() if (self._folder(step) / _MARKER).exists()]

  def wait(self) -> None:
    """Returns when the last save is complete; raises what went wrong with it.

    Raises:
      UserError: the disk is full.
    """
    if self._pending is not None:
      pending, self._pending = self._pending, None
      with _full_disk_named(self._directory):
        pending.result()

  def close(self) -> None:
    """Waits for the last save and ends the background thread. Belongs in a `finally`."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()

  # Saving.

  def _make_room(self, step: int) -> None:
    """Before a save: refuses to mix two runs, and clears what a crash or damage left behind."""
    if self._newest is None:
      present = [other for other in self.steps() if other >= step]
      if present:
        raise UserError(
          f'{self._directory} already holds a checkpoint of step {present[-1]}: resume from it or '
          'choose another --workdir'
        )
    # Orbax lets no process go on to write before all have come to the save.
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      for folder in self._directory.iterdir():
        if re.fullmatch(rf'\d+{re.escape(_UNFINISHED)}.*', folder.name):
          folder.rmtree()
      # What has the name of this step and isn't a checkpoint would be in the way of the save.
      for other in sorted(self._damaged | ({step} & set(self._folders()) - set(self.steps()))):
        self._move_aside(self._folder(other))
    self._damaged.clear()

  def _move_aside(self, folder: epath.Path) -> None:
    if self._is_unfinished(folder):
      folder.rmtree()
    else:
      move_aside(folder, f'damaged-{folder.name}', '-')

  def _is_unfinished(self, folder: epath.Path) -> bool:
    """Whether a folder is a save of ours that was interrupted: there is nothing to save from it.

    Elsewhere than on object stores such a folder has another name, so one that is called like a
    checkpoint and isn't one is damaged, or somebody else's.
    """
    ours = (folder / _STATE).exists() and not (folder / _MARKER).exists()
    return ours and _writes_in_place(self._directory)

  def _finish(self, response: Any) -> None:
    """In the background: waits until a save is complete, then deletes what is no longer kept."""
    response.result()
    if jax.process_index() != 0:
      return
    complete, every = self.steps(), self._config.keep_every
    kept = set(complete[-self._config.keep :])
    kept |= {step for step in complete if every and step % every == 0}
    for step in self._folders():
      folder = self._folder(step)
      if self._is_unfinished(folder) or (step in complete and step not in kept):
        self._delete(folder)

  def _delete(self, folder: epath.Path) -> None:
    """Deletes a checkpoint; where that is interrupted, what is left is no checkpoint."""
    if _writes_in_place(self._directory):
      (folder / _MARKER).unlink(missing_ok=True)
      folder.rmtree()
    else:
      folder.rename(self._directory / f'{folder.name}{_UNFINISHED}').rmtree()

  # Loading.

  def _first_whole(self, load: Callable[[int, Meta], Any]) -> tuple[Meta, Any] | None:
    self.wait()
    reasons = {}
    for step in reversed(self._folders()):
      try:
        meta = self._record(step)
        return meta, load(step, meta)
      except _Damaged as reason:
        reasons[step] = str(reason)
        self._damaged.add(step)
        logging.warning(
          'checkpoint %d in %s is damaged (%s): trying the one before it',
          step, self._directory, reason,
        )  # fmt: skip
    if not reasons or (_writes_in_place(self._directory) and not self.steps()):
      return None
    listed = '; '.join(f'step {step}: {reason}' for step, reason in reasons.items())
    raise UserError(
      f'no checkpoint in {self._directory} can be used ({listed}): put a good copy there, or '
      'choose another --workdir'
    )

  def _record(self, step: int) -> Meta:
    """A checkpoint's record, after the checks that don't read its arrays."""
    folder = self._folder(step)
    if not (folder / _MARKER).exists():
      raise _Damaged(f'its commit marker {_MARKER} is missing: the save was not finished')
    with _silently():
      sealed = _attempt(lambda: ocp.checkpointables_metadata(folder).custom_metadata)
    if not isinstance(sealed, dict) or sealed.keys() != {'record', 'digest'}:
      raise _Damaged('its record is missing')
    record = sealed['record']
    if sealed['digest'] != _digest(record):
      raise _Damaged('its record was changed: the digest does not match')
    if record['step'] != step:
      raise _Damaged(f'its record is that of step {record["step"]}')
    return record

  def _load(self, step: int, meta: Meta, abstract: State) -> State:
    leaves = by_path(abstract)
    targets = {path: _placed(leaf) for path, leaf in leaves.items() if hasattr(leaf, 'shape')}
    _check_fits(self._folder(step), meta['leaves'], targets)
    arrays = self._verified(step, meta, targets)
    filled = [arrays[path] if path in arrays else meta[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)

  def _verified(self, step: int, meta: Meta, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Loads arrays and compares their checksums with the record; all processes agree on both."""

    def load() -> dict[str, Any]:
      with _reading():
        return ocp.load(self._folder(step), dict(targets), checkpointable_name=_STATE)

    arrays, problem = None, ''
    try:
      arrays = _attempt(load)
    except _Damaged as reason:
      problem = str(reason)
    if jax.process_count() > 1:
      failed = multihost_utils.process_allgather(np.array(bool(problem))).any()
      problem = problem or ('another process could not read it' if failed else '')
    if problem:
      raise _Damaged(problem)
    sums = checksums(arrays)
    wrong = [path for path, total in sums.items() if total != meta['leaves'][path]['checksum']]
    if wrong:
      raise _Damaged(f'wrong checksum of {", ".join(wrong[:3])} ({len(wrong)} of {len(sums)})')
    return arrays

  def _folders(self) -> list[int]:
    """Steps of all folders named like a checkpoint, complete or not, in ascending order."""
    if not reached(self._directory, self._directory.exists):
      return []
    names = [folder.name.strip('/') for folder in self._directory.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name))

  def _folder(self, step: int) -> epath.Path:
    return self._directory / str(step)


def _writes_in_place(directory: epath.Path) -> bool:
  """Object stores can't rename: there, an interrupted save has its name but no marker."""
  return is_remote(directory)


def _attempt(read: Callable[[], Any]) -> Any:
  """Calls a function that reads a checkpoint; what it stumbles over is damage.

  Which exception a damaged file ends in depends on where the damage is, so all of them count but
  those that say something about this process.
  """
  try:
    return read()
  except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    root = error
    while root.__cause__ is not None:  # the innermost one names the file
      root = root.__cause__
    words = ' '.join(str(root).split()) or type(root).__name__
    raise _Damaged(f'it can not be read: {words[:180]}') from error


@contextlib.contextmanager
def _full_disk_named(directory: epath.Path) -> Iterator[None]:
  """Says in one line that a save doesn't fit on the disk; what is said deep down is no OSError."""
  try:
    yield
  except Exception as error:
    words = os.strerror(errno.ENOSPC)
    if words not in str(error):
      raise
    raise UserError(
      f'cannot write a checkpoint to {directory}: {words}; those before it are whole: free some '
      'space and run the same command again'
    ) from error


@contextlib.contextmanager
def _silently() -> Iterator[None]:
  """Keeps Orbax from showing the whole of a record that it can't read."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _arrays(state: State) -> dict[str, Any]:
  return {path: leaf for path, leaf in by_path(state).items() if hasattr(leaf, 'shape')}


def _placed(leaf: Any) -> Any:
  """The leaf as a load target; without a sharding of its own it goes to this process's first
  device."""
  if getattr(leaf, 'sharding', None) is not None:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  place = SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _check_fits(folder: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  ours = {path: (list(leaf.shape), str(leaf.dtype)) for path, leaf in wanted.items()}
  theirs = {path: (leaf['shape'], leaf['dtype']) for path, leaf in stored.items()}
  for path in sorted(ours.keys() | theirs.keys()):
    if ours.get(path) != theirs.get(path):
      here, there = ours.get(path, 'absent'), theirs.get(path, 'absent')
      raise UserError(
        f"{folder} is of another model: '{path}' is {there} there and {here} here; choose another "
        '--workdir or the config that it was made with'
      )


def _machine() -> dict[str, Any]:
  """What decides the last bits of a result: devices, and on CPUs the number of threads."""
  kinds = sorted({device.device_kind for device in jax.devices()})
  devices = f'{jax.device_count()} x {"+".join(kinds)}'
  # Only Linux knows which cores a process may use.
  usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {'cpu_threads': usable, 'devices': devices}


def _digest(record: Meta) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _writing() -> ocp.Context:
  context = ocp.Context()
  # Compression makes float weights 8 % smaller and a save twice as slow.
  context.array.saving.use_compression = False
  # Otherwise a failed creation leaves the writing threads waiting for five minutes.
  context.async_options.create_directories_asynchronously = False
  return context


def _reading() -> ocp.Context:
  """Each process reads by itself: one that finds damage must not leave others at a barrier."""
  context = ocp.Context()
  context.multiprocessing_options.primary_host = jax.process_index()
  context.multiprocessing_options.active_processes = {jax.process_index()}
  context.pytree.loading.partial_load = True
  return context
