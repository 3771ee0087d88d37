"""Checkpoints of a run: saved asynchronously, verified on load; the newest intact one is restored.

A checkpoint is a folder named after its step. Orbax (v1 API; only this module uses it) writes the
arrays of the state, each under its path such as `opt_state/mu/ar/layers/q/kernel`, and a JSON
record: counters, config, machine, and the shape, dtype and checksum of every array.

Orbax writes the commit marker last; on local disks it also renames the folder to its final name
only then. So an interrupted save is never mistaken for a checkpoint. On load, Orbax detects neither
a missing marker nor flipped bits in the data; this module checks both.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vpe_jax import __version__, devices
from vpe_jax.checkpoints import orbax_logs
from vpe_jax.checkpoints.checksum import checksums
from vpe_jax.config import CheckpointConfig
from vpe_jax.contracts import COUNTERS, State, UserError
from vpe_jax.sharding import leaves_by_path
from vpe_jax.storage import FULL_ERRNOS, is_remote, move_aside, probe

FOLDER = 'checkpoints'  # folder of a workdir
RUN = '$RUN'  # stands for the workdir in a saved config, so that a run can be moved
_STATE = 'state'  # Orbax's name for the arrays of a checkpoint
_MARKER = 'commit_success.txt'  # written by Orbax last
_GROUP_BYTES = 2**30  # bytes of leaves that `Store.read` loads at a time
_SAVE_SECONDS = 3600.0  # time limit of a save
# Orbax measures its own limit with the wall clock, which may jump, so that limit is 68 years.
_NO_LIMIT = 2**31 - 1  # seconds
_UNFINISHED = '.orbax-checkpoint-tmp'  # suffix of a folder that is being written or deleted
# Exceptions of Orbax, json and TensorStore for files that are missing or can't be parsed.
_PARSE_ERRORS = (
  AttributeError,
  FileNotFoundError,
  IsADirectoryError,
  LookupError,
  NotADirectoryError,
  TypeError,
  ValueError,
)
# TensorStore raises every error as a ValueError. Messages that begin with these codes concern the
# storage or the process, not the files.
_TRANSIENT = re.compile(
  'ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|PERMISSION_DENIED|RESOURCE_EXHAUSTED'
  '|UNAUTHENTICATED|UNAVAILABLE|UNKNOWN'
)

Record = dict[str, Any]


class _Damaged(Exception):
  """A checkpoint can't be used; the message gives the reason."""


class Store:
  """The checkpoints in one directory (local or gs://...).

  In a multi-process run, every process must make the same calls in the same order, and all must
  share the directory.
  """

  def __init__(self, directory: str, config: CheckpointConfig):
    """Opens a store; the directory is not accessed yet.

    Args:
      directory: folder of the checkpoints.
      config: when to save, and which checkpoints to keep.
    """
    orbax_logs.drop_reported_errors()
    self._directory = epath.Path(directory)
    if not is_remote(directory):
      self._directory = self._directory.absolute()
    self._config = config
    self._worker = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
    self._pending: concurrent.futures.Future[None] | None = None
    self._newest: int | None = None  # step of the last save that began, or of the restored state
    self._restored = False  # `restore` has returned, with or without a state
    self._damaged: set[int] = set()  # steps that `restore` or `read` skipped

  def due(self, step: int) -> bool:
    """Whether `save` without `force` saves at this step."""
    return step > 0 and step % self._config.every == 0

  def save(
    self,
    state: State,
    config_dict: Mapping[str, Any],
    force: bool = False,
    data: Mapping[str, str] = MappingProxyType({}),
  ) -> bool:
    """Saves a state if it is due. Returns once the arrays are copied; a thread writes them.

    The arrays may then be donated or changed. Reading `step` from the state waits for its
    computation, so a loop with its own step counter should check `due` first.

    Args:
      state: {stage, step, stage_step, examples_seen, params, opt_state, ema}; counters may be
        Python numbers or arrays.
      config_dict: the run's config, from `vpe_jax.config.to_dict`.
      force: save at a step that isn't due (the last one, or after SIGTERM).
      data: digests of the training data, which the record contains.

    Returns:
      Whether a save was started; False also if this step was just saved or restored.

    Raises:
      UserError: the directory contains a checkpoint of this or a later step, and `restore` wasn't
        called; the disk is full; or the previous save failed (see `wait`).
    """
    step = int(state['step'])
    if step == self._newest or not (force or self.due(step)):
      return False
    self.wait()
    self._prepare_directory(step)
    arrays = _arrays(state)
    record = {name: int(state[name]) for name in COUNTERS}
    record |= {'config': dict(config_dict), 'data': dict(data), 'version': __version__}
    record |= devices.machine()
    sums = checksums(arrays)
    record['leaves'] = {
      path: {'shape': list(leaf.shape), 'dtype': str(leaf.dtype), 'checksum': sums[path]}
      for path, leaf in arrays.items()
    }
    metadata = {'record': record, 'digest': _digest(record)}
    try:
      with _full_disk_error(self._directory), _save_context():
        response = ocp.save_checkpointables_async(
          self._directory / str(step), {_STATE: arrays}, custom_metadata=metadata
        )
    except Exception:
      self._delete_failed()
      raise
    self._newest = step
    self._pending = self._worker.submit(self._finish, response)
    return True

  def restore(self, abstract_of: Callable[[Record], State]) -> State | None:
    """Restores the newest intact checkpoint.

    A damaged checkpoint is reported in a warning and the previous one is tried. The next `save`
    renames the damaged one to `damaged-STEP`, or deletes it if it is an interrupted save on an
    object store.

    Args:
      abstract_of: maps a checkpoint's record {stage, step, stage_step, examples_seen, config,
        data, cpu_threads, devices, version, leaves} to the abstract state to restore: arrays as
        `jax.ShapeDtypeStruct` with shardings (of any mesh); counters may be plain numbers.

    Returns:
      The state, or None if the directory has no checkpoint.

    Raises:
      UserError: every checkpoint is damaged, or the abstract state has other leaves than the
        checkpoint.
    """

    def load(step: int, record: Record) -> State:
      return self._load(step, record, abstract_of(record))

    newest = self._newest_intact(load)
    self._restored = True
    if newest is None:
      return None
    record, state = newest
    self._newest = record['step']
    for name, value in devices.machine().items():
      is_relevant = name != 'cpu_threads' or jax.default_backend() == 'cpu'
      if is_relevant and record[name] != value:
        logging.warning(
          'checkpoint %d was saved with %s=%s, this process has %s: results may differ in their '
          'last bits', record['step'], name, record[name], value,
        )  # fmt: skip
    return state

  def read(
    self,
    choose: Callable[[Collection[str]], Iterable[str]],
    transform: Callable[[np.ndarray], np.ndarray] = lambda leaf: leaf,
    step: int | None = None,
    place: Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None] = lambda *_: None,
  ) -> tuple[dict[str, Any], Record] | None:
    """Loads some leaves of a checkpoint, as numpy arrays or sharded over devices.

    Leaves are loaded, verified and transformed in groups, so memory holds at most one group in
    addition to the result; of sharded leaves, each process reads only its shards.

    Args:
      choose: selects the leaves to load from all paths, such as `params/ar/layers/q/kernel`.
      transform: is applied to each leaf, for instance to round it.
      step: step of the checkpoint; None: the newest intact one.
      place: maps path and shape of a leaf to its sharding; None: a numpy array.

    Returns:
      ({path: array}, record), or None if the directory has no checkpoint.

    Raises:
      UserError: every checkpoint is damaged, or there is no intact one of this step.
    """

    def load(step: int, record: Record) -> dict[str, Any]:
      arrays = {}
      for group in _groups(record['leaves'], choose(record['leaves'])):
        targets = {path: _read_target(path, record['leaves'][path], place) for path in group}
        leaves = self._load_verified(step, record, targets)
        while leaves:
          path, leaf = leaves.popitem()
          arrays[path] = transform(leaf)
      return arrays

    newest = self._newest_intact(load, None if step is None else self._existing(step))
    return None if newest is None else newest[::-1]

  def _existing(self, step: int) -> list[int]:
    """The step as a list, if it has a complete checkpoint.

    Raises:
      UserError: there is no complete checkpoint of this step.
    """
    if step not in (steps := self.steps()):
      listed = ', '.join(map(str, steps)) or 'none'
      raise UserError(f'{self._directory} has no checkpoint of step {step}; steps: {listed}')
    return [step]

  def steps(self) -> list[int]:
    """Steps of all complete checkpoints, in ascending order."""
    return [step for step in self._folders() if (self._folder(step) / _MARKER).exists()]

  def wait(self) -> None:
    """Waits for the last save and raises its error, if any; deletes what a failed save has written.

    Raises:
      UserError: the disk is full, or the save took too long.
    """
    if self._pending is not None:
      pending, self._pending = self._pending, None
      try:
        with _full_disk_error(self._directory):
          pending.result()
      except Exception:
        self._delete_failed()
        raise

  def close(self) -> None:
    """Waits for the last save and ends the background thread. Call it in a `finally` block."""
    try:
      self.wait()
    finally:
      self._worker.shutdown()

  # Saving.

  def _prepare_directory(self, step: int) -> None:
    """Refuses to mix two runs, deletes unfinished checkpoints, and renames damaged ones."""
    if self._newest is None and not self._restored:
      later = [other for other in self.steps() if other >= step]
      if later:
        raise UserError(
          f'{self._directory} already contains a checkpoint of step {later[-1]}: resume from it or '
          'choose another --workdir'
        )
    # No barrier is needed: Orbax's save writes nothing before all processes have called it.
    if jax.process_index() == 0:
      self._directory.mkdir(parents=True, exist_ok=True)
      self._delete_unfinished()
      # The save would fail on a folder of this step that isn't a checkpoint.
      for other in sorted(self._damaged | ({step} & set(self._folders()) - set(self.steps()))):
        self._move_aside(self._folder(other))
    self._damaged.clear()

  def _delete_failed(self) -> None:
    """Deletes the files of a failed save for a second: its threads may notice the failure late."""
    for _ in range(10):
      self._delete_unfinished()
      time.sleep(0.1)

  def _delete_unfinished(self) -> None:
    """Deletes the folders of interrupted and failed saves and deletions."""
    if jax.process_index() == 0 and self._directory.exists():
      for folder in self._directory.iterdir():
        if re.fullmatch(rf'\d+{re.escape(_UNFINISHED)}.*', folder.name):
          with contextlib.suppress(OSError):
            folder.rmtree()

  def _move_aside(self, folder: epath.Path) -> None:
    if self._is_unfinished(folder):
      folder.rmtree()
    else:
      move_aside(folder, f'damaged-{folder.name}', '-')

  def _is_unfinished(self, folder: epath.Path) -> bool:
    """Whether a folder is an interrupted save, which can be deleted.

    Only on object stores does an interrupted save have the name of a checkpoint. Elsewhere, a
    folder with such a name that isn't a checkpoint is damaged or was put there by someone else.
    """
    interrupted = (folder / _STATE).exists() and not (folder / _MARKER).exists()
    return interrupted and _writes_in_place(self._directory)

  def _finish(self, response: Any) -> None:
    """Waits for a save, then deletes old checkpoints. Runs in the background thread."""
    try:
      response.result(timeout=_SAVE_SECONDS)  # measured with a monotonic clock
    except TimeoutError as error:
      raise UserError(
        f'a checkpoint was not written to {self._directory} within {_SAVE_SECONDS / 60:.0f} '
        'minutes: the storage is too slow or hangs; choose another --workdir'
      ) from error
    if jax.process_index() != 0:
      return
    complete_steps, every = self.steps(), self._config.keep_every
    keep = set(complete_steps[-self._config.keep :])
    keep |= {step for step in complete_steps if every and step % every == 0}
    for step in self._folders():
      folder = self._folder(step)
      if self._is_unfinished(folder) or (step in complete_steps and step not in keep):
        self._delete(folder)

  def _delete(self, folder: epath.Path) -> None:
    """Deletes a checkpoint so that an interrupted deletion leaves no valid checkpoint."""
    if _writes_in_place(self._directory):
      (folder / _MARKER).unlink(missing_ok=True)
      folder.rmtree()
    else:
      folder.rename(self._directory / f'{folder.name}{_UNFINISHED}').rmtree()

  # Loading.

  def _newest_intact(
    self, load: Callable[[int, Record], Any], steps: Sequence[int] | None = None
  ) -> tuple[Record, Any] | None:
    """The record of the newest intact checkpoint (of `steps`), and `load(step, record)`."""
    self.wait()
    reasons = {}
    for step in reversed(self._folders() if steps is None else steps):
      try:
        record = _agreed(functools.partial(self._record, step))
        return record, load(step, record)
      except _Damaged as reason:
        reasons[step] = str(reason)
        self._damaged.add(step)
        cure = 'trying the previous one' if steps is None else 'choose another --step'
        _warn(f'checkpoint {step} in {self._directory} is damaged ({reason}): {cure}')
    # On an object store, an interrupted first save leaves a folder but no checkpoint.
    if not reasons or (_writes_in_place(self._directory) and not self.steps()):
      return None
    reason_list = '; '.join(f'step {step}: {reason}' for step, reason in reasons.items())
    if steps is not None:
      raise UserError(f'{self._directory} is damaged ({reason_list}): choose another --step')
    raise UserError(
      f'no checkpoint in {self._directory} can be used ({reason_list}): restore one from a '
      'backup, or choose another --workdir'
    )

  def _record(self, step: int) -> Record:
    """Reads and checks a checkpoint's record, without its arrays."""
    folder = self._folder(step)
    try:
      # `exists` would take a storage error for a missing marker.
      (folder / _MARKER).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
      reason = f'its commit marker {_MARKER} is missing: the save was probably interrupted'
      raise _Damaged(reason) from error
    with _without_logging():
      metadata = _attempt(lambda: ocp.checkpointables_metadata(folder).custom_metadata)
    if not isinstance(metadata, dict) or metadata.keys() != {'record', 'digest'}:
      raise _Damaged('its record is missing or has an unknown format')
    record = metadata['record']
    if metadata['digest'] != _digest(record):
      raise _Damaged('its record was changed: the digest does not match')
    if record['step'] != step:
      raise _Damaged(f'its record is that of step {record["step"]}')
    workdir = str(self._directory.parent)
    return record | {'config': _with_workdir(record['config'], workdir)}

  def _load(self, step: int, record: Record, abstract: State) -> State:
    leaves = leaves_by_path(abstract)
    targets = {path: _load_target(leaf) for path, leaf in leaves.items() if hasattr(leaf, 'shape')}
    _check_fits(self._folder(step), record['leaves'], targets)
    arrays = self._load_verified(step, record, targets)
    values = [arrays[path] if path in arrays else record[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)

  def _load_verified(self, step: int, record: Record, targets: Mapping[str, Any]) -> dict[str, Any]:
    """Loads arrays and compares their checksums with the record, in all processes or in none."""

    def load() -> dict[str, Any]:
      with _load_context():
        return ocp.load(self._folder(step), dict(targets), checkpointable_name=_STATE)

    arrays = _agreed(lambda: _attempt(load))
    sums = checksums(arrays)
    wrong = [path for path, value in sums.items() if value != record['leaves'][path]['checksum']]

    def check() -> None:
      if wrong:
        raise _Damaged(f'wrong checksum of {", ".join(wrong[:3])} ({len(wrong)} of {len(sums)})')

    # Arrays of one host may be damaged on that host alone.
    _agreed(check)
    return arrays

  def _folders(self) -> list[int]:
    """Steps of all folders with a checkpoint's name, complete or not, in ascending order."""
    if not probe(self._directory, self._directory.exists):
      return []
    names = [folder.name.strip('/') for folder in self._directory.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch('0|[1-9][0-9]*', name))

  def _folder(self, step: int) -> epath.Path:
    return self._directory / str(step)


def _writes_in_place(directory: epath.Path) -> bool:
  """Whether saves write directly to the final folder: object stores can't rename one atomically.

  On an object store, an interrupted save has the name of a checkpoint but no marker.
  """
  return is_remote(directory)


@functools.cache  # A command may open the same checkpoints several times.
def _warn(message: str) -> None:
  logging.warning('%s', message)


def _attempt(read: Callable[[], Any]) -> Any:
  """Calls a function that reads a checkpoint.

  Raises:
    _Damaged: a file is missing or can't be parsed. Other errors, such as a timeout of the storage
      or too many open files, may be temporary and are raised unchanged.
  """
  try:
    return read()
  except Exception as error:
    root = error
    while root.__cause__ is not None:  # The innermost cause names the file.
      root = root.__cause__
    message = ' '.join(str(root).split()) or type(root).__name__
    if not isinstance(root, _PARSE_ERRORS) or _TRANSIENT.match(message):
      raise
    raise _Damaged(f'it cannot be read: {message[:180]}') from error


def _agreed(read: Callable[[], Any]) -> Any:
  """Calls a function that reads a checkpoint; it succeeds in all processes or in none.

  Raises:
    _Damaged: this or another process found the checkpoint damaged.
    UserError: another process could not reach the checkpoint.
  """
  result, problem = None, None
  try:
    result = read()
  except Exception as error:
    problem = error
  severity = 0 if problem is None else 1 if isinstance(problem, _Damaged) else 2
  if jax.process_count() > 1:
    worst = int(multihost_utils.process_allgather(np.array(severity)).max())
    if worst > severity and worst == 1:
      problem = _Damaged('another process could not read it')
    elif worst > severity:
      problem = UserError(
        'another process could not reach a checkpoint (its log has the reason): run the same '
        'command again'
      )
  if problem is not None:
    raise problem
  return result


@contextlib.contextmanager
def _full_disk_error(directory: epath.Path) -> Iterator[None]:
  """Context in which a full disk becomes a one-line error; Orbax doesn't raise an OSError."""
  try:
    yield
  except Exception as error:
    messages = [m for code in FULL_ERRNOS if (m := os.strerror(code)) in str(error)]
    if not messages:
      raise
    raise UserError(
      f'cannot write a checkpoint to {directory}: {messages[0]}; earlier checkpoints are intact: '
      'free some space and run the same command again'
    ) from error


@contextlib.contextmanager
def _without_logging() -> Iterator[None]:
  """Suppresses logs, because Orbax logs the full content of a record that it can't read."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


def _with_workdir(config: Any, workdir: str) -> Any:
  """A saved config in which RUN is replaced by the workdir."""
  if isinstance(config, Mapping):
    return {name: _with_workdir(value, workdir) for name, value in config.items()}
  if isinstance(config, list):
    return [_with_workdir(value, workdir) for value in config]
  return config.replace(RUN, workdir) if isinstance(config, str) else config


def _arrays(state: State) -> dict[str, Any]:
  return {path: leaf for path, leaf in leaves_by_path(state).items() if hasattr(leaf, 'shape')}


def _groups(saved_leaves: Mapping[str, Any], paths: Iterable[str]) -> list[list[str]]:
  """Groups paths so that each group has at most `_GROUP_BYTES` of leaves, or a single leaf."""
  groups: list[list[str]] = []
  size = 0
  for path in paths:
    leaf = saved_leaves[path]
    leaf_size = math.prod(leaf['shape']) * np.dtype(leaf['dtype']).itemsize
    if not groups or size + leaf_size > _GROUP_BYTES:
      groups.append([])
      size = 0
    groups[-1].append(path)
    size += leaf_size
  return groups


def _load_target(leaf: Any) -> Any:
  """Load target of a leaf; the default sharding is this process's first device."""
  if getattr(leaf, 'sharding', None) is not None:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  sharding = SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_target(path: str, leaf: Mapping[str, Any], place: Callable[..., Any]) -> Any:
  """Load target of `Store.read` for a saved leaf."""
  shape, dtype = tuple(leaf['shape']), np.dtype(leaf['dtype'])
  if (sharding := place(path, shape)) is not None:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
  return np.empty(shape, dtype)  # Its values are never written, so they take no memory.


def _check_fits(
  folder: epath.Path, saved_leaves: Mapping[str, Any], targets: Mapping[str, Any]
) -> None:
  """Checks that a checkpoint has exactly the leaves to load, with equal shapes and dtypes."""
  expected = {path: (list(leaf.shape), str(leaf.dtype)) for path, leaf in targets.items()}
  saved = {path: (leaf['shape'], leaf['dtype']) for path, leaf in saved_leaves.items()}
  for path in sorted(expected.keys() | saved.keys()):
    if expected.get(path) != saved.get(path):
      raise UserError(
        f"{folder} does not fit the config: '{path}' is {saved.get(path, 'absent')} in the "
        f'checkpoint and {expected.get(path, "absent")} in the run; choose another --workdir, or '
        'the config of the checkpoint'
      )


def _digest(record: Record) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _save_context() -> ocp.Context:
  context = ocp.Context()
  # Compression makes float weights 8 % smaller and a save twice as slow.
  context.array.saving.use_compression = False
  # With asynchronous creation, the writing threads would wait five minutes after a failure.
  context.async_options.create_directories_asynchronously = False
  context.async_options.timeout_secs = _NO_LIMIT
  return context


def _load_context() -> ocp.Context:
  """Options for independent loads: a process that fails must not leave others at a barrier."""
  context = ocp.Context()
  context.multiprocessing_options.primary_host = jax.process_index()
  context.multiprocessing_options.active_processes = {jax.process_index()}
  context.pytree.loading.partial_load = True
  return context
