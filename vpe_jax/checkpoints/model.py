"""A trained model: its system and parameters, from a run or a weight file."""

from __future__ import annotations

import dataclasses
import math

import jax

from vpe_jax import sharding, systems
from vpe_jax.checkpoints import dtypes
from vpe_jax.checkpoints import weights as weights_io
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import DTYPES, Params, System, UserError
from vpe_jax.sharding import leaves_by_path

# Smaller models are loaded onto one device: sharding them would only add communication.
MAX_ONE_DEVICE_BYTES = 2**30


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
    mesh: mesh of the devices that sample. The parameters of a small model on one device are numpy
      arrays.
  """

  system: System
  params: Params
  stage: int
  stage_step: int
  weights: str
  source: str
  mesh: jax.sharding.Mesh

  @property
  def fingerprint(self) -> str:
    """A hash of all parameters."""
    return weights_io.fingerprint(self.params)

  @property
  def metadata(self) -> dict[str, str]:
    """Provenance of the parameters, for image files."""
    return {'checkpoint': self.fingerprint, 'weights': f'{self.source} ({self.weights})'}


def default_dtype(platform: str) -> str:
  """Dtype of parameters and computation without a choice: float32 on a CPU, else bfloat16."""
  return 'float32' if platform == 'cpu' else 'bfloat16'


def is_small(system: System, dtype: str) -> bool:
  """Whether the parameters have at most MAX_ONE_DEVICE_BYTES."""
  shapes = jax.tree.leaves(jax.eval_shape(system.init, jax.random.key(0)))
  size = dtypes.parse(dtype).itemsize * sum(math.prod(leaf.shape) for leaf in shapes)
  return size <= MAX_ONE_DEVICE_BYTES


def make_mesh(system: System, dtype: str) -> jax.sharding.Mesh:
  """The mesh for inference: all devices of this process, or the first for a small model."""
  devices = jax.local_devices()
  devices = devices[:1] if is_small(system, dtype) else devices
  return sharding.make_mesh(MeshConfig(strategy=system.config.mesh.strategy), devices)


def abstract_params(system: System, mesh: jax.sharding.Mesh, dtype: str) -> Params:
  """Parameters for inference as `jax.ShapeDtypeStruct`, with the shardings of training."""
  # Not even the key is computed, because the devices of the mesh need not exist.
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = dtypes.cast_shapes(jax.eval_shape(system.init, key), dtypes.parse(dtype))
  strategy = system.config.mesh.strategy
  return jax.tree.map(
    lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
    shapes,
    sharding.param_shardings(shapes, system.logical_axes, mesh, strategy),
  )


def load(
  source: str,
  weights: str = 'ema',
  step: int | None = None,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Model:
  """Loads a checkpoint of a run, or shipped weights, shard by shard onto the devices.

  Args:
    source: the folder of a run (local or gs://), `assets:NAME`, or a weight file.
    weights: `ema` for EMA parameters (raw ones if the run has no EMA), `raw` for the parameters of
      the last step.
    step: step of the checkpoint; None: the newest intact one. A file has no other.
    dtype: dtype of parameters and computation, `float32` or `bfloat16`; None: `default_dtype`.
    mesh: mesh of the devices; None: see `make_mesh`.

  Raises:
    UserError: the run, checkpoint or asset doesn't exist, its weights are damaged, or it has no
      weights of the requested kind.
  """
  if weights not in ('ema', 'raw'):
    raise UserError(f"weights is '{weights}': choose 'ema' (averaged) or 'raw' (last step)")
  dtype = dtype or default_dtype(jax.default_backend())
  if dtype not in DTYPES:
    raise UserError(f'--dtype={dtype}: choose one of {", ".join(DTYPES)}')
  is_file = weights_io.is_file(source)
  if is_file:
    weights_io.check_file(source, weights, step)
  planned = systems.build(weights_io.read_config(source, step) | {'dtype': dtype})
  mesh = mesh or make_mesh(planned, dtype)
  # A small model is loaded as numpy arrays, which are faster to rearrange than those of a device.
  whole = mesh.size == 1 and is_small(planned, dtype)
  targets = {} if whole else leaves_by_path(abstract_params(planned, mesh, dtype))
  if is_file:
    params, metadata = weights_io.load(source, dtype, targets)
  else:
    params, metadata = weights_io.load_run(source, weights, dtype, step, targets)
  kind = metadata.get('weights', 'ema')
  system = systems.build(weights_io.config_of(metadata, source) | {'dtype': dtype})
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
  return Model(system, params, index, min(max(step - before, 0), length), kind, source, mesh)
