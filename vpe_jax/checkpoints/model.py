"""A trained model: its system and parameters, from a run or a file of weights."""

from __future__ import annotations

import dataclasses

from vpe_jax import systems
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.contracts import Params, System, UserError


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    system: built from the stored config.
    params: as checkpoints store them.
    stage: index of the stage that the weights come from.
    weights: `ema` (averaged) or `raw`.
    source: the run, asset or file.
  """

  system: System
  params: Params
  stage: int
  weights: str
  source: str

  @property
  def fingerprint(self) -> str:
    """A hash of all parameters."""
    return weights_io.fingerprint(self.params)


def load(source: str, weights: str = 'ema') -> Model:
  """Loads the newest checkpoint of a run, or shipped weights.

  Args:
    source: the folder of a run (local or gs://), `assets:NAME`, or a file of weights.
    weights: `ema` for the averaged parameters (raw ones where a run has no average yet), `raw`
      for those of the last step.

  Raises:
    UserError: there is no such run, checkpoint or asset, or its weights are damaged.
  """
  if weights not in ('ema', 'raw'):
    raise UserError(f"weights is '{weights}': choose 'ema' (averaged) or 'raw' (last step)")
  if weights_io.is_file(source):
    params, stored = weights_io.load(source)
  else:
    params, stored = weights_io.load_run(source, weights)
  kind = stored.get('weights', 'ema')
  if weights == 'raw' and kind != 'raw':
    raise UserError(f"{source} holds averaged weights only: use weights 'ema'")
  system = systems.build(weights_io.config_of(stored, source))
  stage, last = stored.get('stage', '-1'), len(system.stages) - 1
  known = {str(index): index for index in range(len(system.stages))} | {'-1': last}
  if stage not in known:
    raise UserError(
      f"{source} is of stage '{stage}', and its config has {len(system.stages)} stages: it is "
      'damaged, get the weights again'
    )
  return Model(system, params, known[stage], kind, source)
