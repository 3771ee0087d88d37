"""The `optim` section of a config: the optimizer and its learning rate."""

from __future__ import annotations

import dataclasses
import math
import re

from vpe_jax.config.fields import check, check_nonnegative, check_positive, check_sizes
from vpe_jax.contracts import DTYPES

OPTIMIZERS = ('adamw', 'adafactor', 'muon')  # keys of training.optimizer.OPTIMIZERS
SCHEDULES = ('constant', 'cosine', 'linear', 'rsqrt')  # keys of training.optimizer.SCHEDULES


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """The optimizer and its learning rate. Each field has one value, or one per stage.

  Attributes:
    name: `adamw`; `adafactor` (factored second moments, no first moment: `b1`, `b2`, `eps` and
      `mu_dtype` are not used, and the learning rate is relative to the scale of each parameter);
      `muon` (for the matrices inside the network; AdamW for all other parameters).
    lr: peak learning rate.
    schedule: after warm-up: `constant`; `cosine` or `linear`, down to `lr_end`; or `rsqrt`,
      proportional to 1 / sqrt(step), never below `lr_end`.
    warmup: steps of linear warm-up; the last one has the rate `lr`.
    lr_end: learning rate at the end of a decay.
    decay_steps: length of `cosine` and `linear`, warm-up included (0: all steps of the stage).
    multipliers: learning-rate factors above 0 by parameter path, `PATTERN=FACTOR,PATTERN=FACTOR`.
      Patterns are regular expressions that match from the start of a path, as in Stage.trainable.
      The first match counts; other parameters have factor 1.
    b1: decay of AdamW's first moment (also for the parameters that Muon leaves to AdamW).
    b2: decay of AdamW's second moment (likewise).
    eps: epsilon in AdamW's denominator and in Muon's norms.
    momentum: decay of Muon's momentum.
    mu_dtype: dtype in which first moments and momentum are stored, `float32` or `bfloat16`.
    weight_decay: decoupled weight decay, multiplied by the learning rate; not applied to biases and
      scales.
    clip: maximum of the global gradient norm (0: off).
    accumulate: number of microbatches per step.
    ema: decay of the exponential moving average of the parameters (0: no average).
  """

  name: str | tuple[str, ...] = 'adamw'
  lr: float | tuple[float, ...] = 1e-3
  schedule: str | tuple[str, ...] = 'constant'
  warmup: int | tuple[int, ...] = 50
  lr_end: float | tuple[float, ...] = 0.0
  decay_steps: int | tuple[int, ...] = 0
  multipliers: str | tuple[str, ...] = ''
  b1: float | tuple[float, ...] = 0.9
  b2: float | tuple[float, ...] = 0.999
  eps: float | tuple[float, ...] = 1e-8
  momentum: float | tuple[float, ...] = 0.95
  mu_dtype: str | tuple[str, ...] = 'float32'
  weight_decay: float | tuple[float, ...] = 0.0
  clip: float | tuple[float, ...] = 1.0
  accumulate: int | tuple[int, ...] = 1
  ema: float | tuple[float, ...] = 0.9995

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      valid = getattr(self, field.name) != ()
      check(self, 'optim.', field.name, valid, 'one value, or one per stage')
    check_sizes(self, 'optim.', warmup=0, decay_steps=0)
    values = lambda name: v if isinstance(v := getattr(self, name), tuple) else (v,)
    choices = {'name': OPTIMIZERS, 'schedule': SCHEDULES, 'mu_dtype': DTYPES}
    for name, known in choices.items():
      valid = all(value in known for value in values(name))
      check(self, 'optim.', name, valid, f'one of {", ".join(known)}')
    check_positive(self, 'optim.', 'lr')
    for name in ('b1', 'b2', 'momentum', 'ema'):
      valid = all(0 <= value < 1 for value in values(name))
      check(self, 'optim.', name, valid, 'at least 0 and below 1')
    check_nonnegative(self, 'optim.', 'lr_end', 'eps', 'weight_decay', 'clip')
    valid = all(_factors(text) is not None for text in values('multipliers'))
    example = 'PATTERN=FACTOR,..., regular expressions and factors above 0, such as encoder/=0.5'
    check(self, 'optim.', 'multipliers', valid, example)

  @property
  def factors(self) -> tuple[tuple[str, float], ...]:
    """The pairs (regular expression, factor) of `multipliers`; read it from the result of `of`."""
    return _factors(self.multipliers)

  def of(self, stage: int, steps: int = 0) -> OptimConfig:
    """The settings of one stage: every field has a single value.

    Args:
      stage: index of the stage.
      steps: number of steps of the stage, used where `decay_steps` is 0.
    """
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    select = lambda value: value[stage] if isinstance(value, tuple) else value
    settings = {name: select(value) for name, value in values.items()}
    settings['decay_steps'] = settings['decay_steps'] or steps
    return OptimConfig(**settings)

  def check_stages(self, count: int) -> None:
    """Raises a UserError unless every field has one value, or one per stage."""
    for field in dataclasses.fields(self):
      valid = not isinstance(value := getattr(self, field.name), tuple) or len(value) == count
      check(self, 'optim.', field.name, valid, f'one value, or one per stage ({count})')


def _factors(text: str) -> tuple[tuple[str, float], ...] | None:
  """Parses `optim.multipliers`; None if the text is malformed."""
  entries = [entry.rpartition('=') for entry in text.split(',') if entry.strip()]
  try:
    pairs = tuple((re.compile(entry[0].strip()).pattern, float(entry[2])) for entry in entries)
  except (re.error, ValueError):
    return None
  return pairs if all(pattern and 0 < factor < math.inf for pattern, factor in pairs) else None
