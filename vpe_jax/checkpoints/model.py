"""A trained model: its system and parameters, from a run or a weight file."""

from __future__ import annotations

import dataclasses

from vpe_jax import systems
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.contracts import Params, System, UserError


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    system: built from the saved config.
    params: parameters, in the layout of checkpoints.
    stage: index of the stage that the parameters come from.
    stage_step: step of that stage at which they were saved.
    weights: kind of the parameters: `ema` or `raw`.
    source: the run, asset or file that was loaded.
  """

  system: System
  params: Params
  stage: int
  stage_step: int
  weights: str
  source: str

  @property
  def fingerprint(self) -> str:
    """A hash of all parameters."""
    return weights_io.fingerprint(self.params)

  @property
  def metadata(self) -> dict[str, str]:
    """Provenance of the parameters, for image files."""
    return {'checkpoint': self.fingerprint, 'weights': f'{self.source} ({self.weights})'}


def load(source: str, weights: str = 'ema', step: int | None = None) -> Model:
  """Loads a checkpoint of a run, or shipped weights.

  Args:
    source: the folder of a run (local or gs://), `assets:NAME`, or a weight file.
    weights: `ema` for EMA parameters (raw ones if the run has no EMA), `raw` for the parameters of
      the last step.
    step: step of the checkpoint; None: the newest intact one. A file has no other.

  Raises:
    UserError: the run, checkpoint or asset doesn't exist, its weights are damaged, or it has no
      weights of the requested kind.
  """
  if weights not in ('ema', 'raw'):
    raise UserError(f"weights is '{weights}': choose 'ema' (averaged) or 'raw' (last step)")
  if weights_io.is_file(source):
    if step is not None:
      raise UserError(f'{source} is a file of weights, not a run: leave --step={step} out')
    params, metadata = weights_io.load(source)
  else:
    params, metadata = weights_io.load_run(source, weights, step=step)
  kind = metadata.get('weights', 'ema')
  if weights == 'raw' and kind != 'raw':
    raise UserError(f"{source} has EMA weights only: use weights 'ema'")
  system = systems.build(weights_io.config_of(metadata, source))
  stage, last = metadata.get('stage', '-1'), len(system.stages) - 1
  known = {str(index): index for index in range(len(system.stages))} | {'-1': last}
  if stage not in known:
    raise UserError(
      f"{source} is of stage '{stage}', and its config has {len(system.stages)} stages: it is "
      'damaged, get the weights again'
    )
  index = known[stage]
  before, length = sum(system.config.steps[:index]), system.config.steps[index]
  step = int(metadata.get('step', before + length))
  return Model(system, params, index, min(max(step - before, 0), length), kind, source)
