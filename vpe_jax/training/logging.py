"""Logs of a training run: metrics.jsonl, progress lines and TensorBoard if it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from typing import Any

import jax
import numpy as np
from etils import epath

from vpe_jax.config import Config, DataConfig
from vpe_jax.contracts import System, UserError
from vpe_jax.storage import is_remote
from vpe_jax.training import throughput
from vpe_jax.training.metrics import MetricsFile, Record

MAX_DATA_WAIT = 0.05  # share of the time spent waiting for data from which on a run warns
MAX_SKIPPED = 5  # consecutive steps without a finite loss and gradient that end a run


class RunLog:
  """Collects the metrics of each step, one step late, so that devices never wait for the log.

  `push` takes a step's metrics and completes the record of the previous step. `settle` waits for
  the newest step. `add` adds values to the record of that step. The next `push` or `flush` writes
  the record. Only process 0 writes.
  """

  def __init__(self, workdir: epath.PathLike, config: Config, system: System, resumed: int):
    self._config = config
    self._names = tuple(stage.name for stage in system.stages)
    self._meter = throughput.meter(config, system)
    self._pending: tuple[dict[str, int], Any] | None = None
    self._record: Record | None = None
    self._skipped: list[int] = []
    self._recent: list[float] = []
    self._waited = 0.0  # seconds since the last step ended
    self._recent_waits: list[float] = []
    self._warned = False
    writes = jax.process_index() == 0
    self._file = MetricsFile(workdir, resumed) if writes else None
    self._board = _open_board(workdir, resumed) if writes else None

  def push(self, counters: dict[str, int], metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step that was just dispatched.

    Args:
      counters: `stage`, and `step` and `stage_step` after this step.
      metrics: scalars on the devices.
    """
    self.settle()
    self._write()
    self._pending = (counters, metrics)

  def settle(self) -> None:
    """Waits for the newest step and makes its record.

    Raises:
      UserError: loss or gradient was not finite in MAX_SKIPPED consecutive steps.
    """
    if self._pending is None:
      return
    (counters, metrics), self._pending = self._pending, None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    stage = counters['stage']
    speeds = self._meter.lap(stage)
    speeds['data_wait'] = min(self._waited / speeds['step_time'], 1.0)
    if self._file is not None:  # Only this process prints, which empties the lists.
      self._recent.append(speeds['step_time'])
      self._recent_waits.append(self._waited)
    self._waited = 0.0
    self._record = {**counters, 'stage': self._names[stage], **values, **speeds}
    self._progress(stage, counters)
    self._check_finite(counters['step'], values)

  def add(self, values: dict[str, float]) -> None:
    """Adds values to the record of the newest step."""
    self.settle()
    if self._record is not None:
      self._record |= values

  def is_running(self) -> bool:
    """Whether the devices still compute the newest step."""
    if self._pending is None:
      return False
    return not all(value.is_ready() for value in self._pending[1].values())

  def waited(self, seconds: float) -> None:
    """Adds time for which the devices waited for data; part of the time of the current step."""
    self._waited += seconds

  def resume_clock(self) -> None:
    """Excludes the time since the newest step from the next step's time."""
    self._meter.restart()
    self._waited = 0.0

  def flush(self) -> None:
    """Writes all records through the newest step to durable storage."""
    self.settle()
    self._write()
    if self._file is not None:
      self._file.flush()
    if self._board is not None:
      self._board.flush()

  def show(self, name: str, image: np.ndarray, step: int) -> None:
    """Adds an image (uint8 [H, W, 3]) to TensorBoard, if it is installed."""
    if self._board is not None:
      self._board.add_image(name, image, step, dataformats='HWC')

  def close(self) -> None:
    """Closes the files without waiting for a pending step."""
    self._write()
    if self._file is not None:
      self._file.close()
    if self._board is not None:
      self._board.close()

  def _write(self) -> None:
    record, self._record = self._record, None
    if record is None:
      return
    if self._file is not None:
      self._file.write(record)
    if self._board is not None:
      for name, value in record.items():
        if isinstance(value, float):
          self._board.add_scalar(name, value, record['step'])

  def _progress(self, stage: int, counters: dict[str, int]) -> None:
    every, stage_step = self._config.log.every, counters['stage_step']
    total = self._config.steps[stage]
    if self._file is None or (stage_step % every and stage_step not in (1, total)):
      return
    seconds = sum(self._recent) / len(self._recent)
    share = sum(self._recent_waits) / max(sum(self._recent), 1e-9)
    self._recent, self._recent_waits = [], []
    remaining = self._meter.remaining(stage, stage_step, seconds)
    print(progress_line(self._record, total, remaining), flush=True)
    # The first step waits for readers that have just started.
    if share > MAX_DATA_WAIT and stage_step > 1 and not self._warned:
      self._warned = True
      print(f'warning: {data_wait_text(share, self._config.data)}', flush=True)

  def _check_finite(self, step: int, values: dict[str, float]) -> None:
    """Warns of a skipped step, and ends the run after MAX_SKIPPED consecutive ones."""
    if not values['skipped']:
      self._skipped = []
      return
    self._skipped.append(step)
    if self._file is not None:
      print(f'warning: step {step} skipped: its loss or gradient is not finite', flush=True)
    if len(self._skipped) >= MAX_SKIPPED:
      raise UserError(
        f'loss or gradient was not finite in {MAX_SKIPPED} consecutive steps (up to step {step}); '
        'the run stops with its last finite parameters: lower optim.lr, or check the data of these '
        'steps'
      )


def progress_line(record: Record, total: int, seconds_left: float) -> str:
  """Formats a record as one line: stage and step, losses, speed and remaining time."""
  losses = [f'{name[5:]} {value:.4f}' for name, value in record.items() if name[:5] == 'loss/']
  speed = [
    f'{record["step_time"]:.3g} s/step',
    f'{record["images_per_s"]:.3g} images/s',
    f'{record["tokens_per_s"]:.4g} tokens/s',
    f'MFU {record["mfu"]:.1%}' if 'mfu' in record else f'{record["tflops_per_s"]:.3g} TFLOP/s',
  ]
  return ' | '.join(
    [
      f'{record["stage"]} {record["stage_step"]}/{total}',
      f'loss {record["loss"]:.4f} ({", ".join(losses)})',
      ', '.join(speed),
      f'ETA {duration(seconds_left)}',
    ]
  )


def data_wait_text(share: float, data: DataConfig) -> str:
  """The share of the time that devices wait for data, and the settings that reduce it."""
  cores = os.cpu_count() or 1
  cached = ', or set data.encode=cached' if data.encode == 'online' else ''
  return (
    f'the devices wait for data {share:.0%} of the time: raise data.workers (now {data.workers}; '
    f'this host has {cores} cores){cached}'
  )


def duration(seconds: float) -> str:
  """Formats seconds as h:mm:ss."""
  whole = math.ceil(seconds)
  return f'{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}'


def _open_board(workdir: epath.PathLike, resumed: int) -> Any:
  """A TensorBoard writer if tensorboardX is installed and the workdir is local, else None.

  Steps after `resumed`, which are computed again, are hidden.
  """
  if is_remote(workdir) or importlib.util.find_spec('tensorboardX') is None:
    return None
  writer = importlib.import_module('tensorboardX').SummaryWriter
  return writer(str(workdir), purge_step=resumed + 1)
