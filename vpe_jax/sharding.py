"""The device mesh, and the sharding of parameters, batches and activations over it.

The mesh has three axes. `data` and `fsdp` shard the batch and also every leaf of parameters,
optimizer state and EMA (fully sharded data parallelism). They are two axes because 256 devices
can't divide dimensions such as 1152 and 4304, while 16 x 16 devices can, one axis for each
dimension. `tensor` shards heads, hidden units and vocabulary within a layer.

Networks name the dimensions of their parameters (the constants below). For each strategy, RULES
lists the mesh axes that a name prefers. The names are in a table of (regular expression over
parameter paths, names), not in the arrays, so the same table serves optimizer state and EMA, whose
paths end in the parameter's path.
"""

from __future__ import annotations

import functools
import math
import os
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vpe_jax.config import MeshConfig, did_you_mean
from vpe_jax.contracts import Array, UserError

# Mesh axes.
DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = (DATA, FSDP)

# Names of parameter dimensions.
LAYERS = 'layers'  # stacked layers of a scanned network: never sharded, as the scan slices it
EMBED = 'embed'  # model width
HEADS = 'heads'  # query heads
KV_HEADS = 'kv_heads'  # key/value heads
HEAD = 'head'  # head width
MLP = 'mlp'  # hidden width of a feed-forward block
VOCAB = 'vocab'  # vocabulary, in a token embedding or output head
CODES = 'codes'  # codebook entries
POSITION = 'position'  # entries of a position table
FEATURES = 'features'  # input or output width of a network: patch pixels, latent channels
CONV_IN = 'conv_in'  # input channels of a convolution
CONV_OUT = 'conv_out'  # output channels of a convolution
KERNEL = 'kernel'  # height or width of a convolution kernel
NAMES = (
  LAYERS, EMBED, HEADS, KV_HEADS, HEAD, MLP, VOCAB, CODES, POSITION, FEATURES, CONV_IN, CONV_OUT,
  KERNEL,
)  # fmt: skip

_BATCH_CHOICES = (BATCH_AXES, (FSDP,), (DATA,))
# Names of activation dimensions, for `constrain`, and their choices of mesh axes as in RULES.
BATCH = 'batch'
ACTIVATIONS = {
  BATCH: _BATCH_CHOICES,
  HEADS: ((TENSOR,),),
  KV_HEADS: ((TENSOR,),),
  MLP: ((TENSOR,),),
  VOCAB: ((TENSOR,),),
}

# Strategy -> (name, choices of mesh axes) pairs, most important name first. A dimension gets the
# first choice that divides it and whose axes the leaf doesn't use yet. Axes that are still free
# afterwards go to the largest dimension that they divide, except LAYERS.
RULES: dict[str, tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]] = {
  'fsdp': (
    (EMBED, _BATCH_CHOICES),
    (MLP, _BATCH_CHOICES),
    (CONV_OUT, _BATCH_CHOICES),
    (CONV_IN, _BATCH_CHOICES),
  ),
  'fsdp_tensor': (
    (HEADS, ((TENSOR,),)),
    (KV_HEADS, ((TENSOR,),)),
    (MLP, ((TENSOR,),)),
    (VOCAB, ((TENSOR,),)),
    (EMBED, _BATCH_CHOICES),
    (CONV_OUT, _BATCH_CHOICES),
    (CONV_IN, _BATCH_CHOICES),
  ),
}
_NO_TIMEOUT = 10_000_000  # seconds: four months
SHUTDOWN_TIMEOUT = 20  # seconds that a process which ends waits for the others; then all end
_FALLBACK = (*_BATCH_CHOICES, (TENSOR,))

AxesTable = Sequence[tuple[str, tuple[str | None, ...]]]


def initialize_distributed() -> None:
  """Initializes JAX's distributed runtime. Call it before anything else uses a device.

  The processes are given by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or
  detected from the cluster (TPU pods, Slurm, Open MPI, Kubernetes). Without either, this process
  forms a group of one on a free local port, because `preempted` needs the distributed runtime. A
  second call does nothing.

  If a process ends, the others end at most SHUTDOWN_TIMEOUT seconds later: after an error in one
  process, they would wait for it in a collective. So processes must end together (`end_together`).

  Raises:
    UserError: the variables are incomplete or not numbers.
  """
  if jax.distributed.is_initialized():
    return
  names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  values = {name: os.environ[name] for name in names if os.environ.get(name)}
  if not all(value.isdigit() for value in values.values()):
    raise UserError(f'{", ".join(values)} must be whole numbers, not {list(values.values())}')
  count, index = (int(values[name]) if name in values else None for name in names)
  address = os.environ.get('JAX_COORDINATOR_ADDRESS') or None
  incomplete = UserError(
    'several processes need all of JAX_COORDINATOR_ADDRESS (host:port of process 0), '
    'JAX_NUM_PROCESSES and JAX_PROCESS_ID; only some are set'
  )
  if values and (address is None or len(values) < len(names)):
    raise incomplete
  try:
    jax.distributed.initialize(address, count, index, shutdown_timeout_seconds=SHUTDOWN_TIMEOUT)
  except ValueError as error:
    if address is not None and not values:  # and no cluster gives the numbers
      raise incomplete from error
    if address is not None or 'coordinator_address' not in str(error):
      raise
    address = f'127.0.0.1:{_free_port()}'
    # No other process waits for this one: a laptop may sleep for days and resume.
    jax.distributed.initialize(
      address, 1, 0, coordinator_bind_address=address, heartbeat_timeout_seconds=_NO_TIMEOUT
    )


def preempted(step: int) -> bool:
  """Whether all processes should save and stop at this step, because one received SIGTERM.

  Every process must call this at every step; it returns True at the same step in all of them. It
  is always False without `initialize_distributed`.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def process_position() -> tuple[int, int]:
  """Index of this process and the number of processes; uses no device without several processes."""
  if not jax.distributed.is_initialized():
    return 0, 1
  return jax.process_index(), jax.process_count()


def gather_texts(text: str) -> list[str]:
  """The texts of all processes, in their order; every process must call this."""
  if process_position()[1] == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(content.size))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: content.size] = content
  rows = multihost_utils.process_allgather(padded)
  return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def end_together() -> None:
  """Waits until all processes call this, at the end of a command; see `initialize_distributed`."""
  multihost_utils.sync_global_devices('end')


def leave_together(timeout: float) -> None:
  """Leaves the group of processes once all of them call this, or after `timeout` seconds.

  Process 0 runs the coordination service: if it ended first, the others would end with an error.
  """
  leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  leaving.start()
  leaving.join(timeout)


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Makes a mesh `data x fsdp x tensor` of devices (default: all), with Auto axis types.

  Several TPU slices are laid out along `data`, so only that axis crosses the network between them;
  so are GPU hosts if `data` is a multiple of their number.

  Raises:
    UserError: the strategy is unknown, the sizes don't multiply to the number of devices,
      `tensor` is above 1 with a strategy that doesn't use it, or `data` isn't a multiple of the
      number of TPU slices.
  """
  if config.strategy not in RULES:
    known = did_you_mean(config.strategy, RULES)
    raise UserError(f"unknown mesh.strategy '{config.strategy}'{known}")
  devices = list(jax.devices() if devices is None else devices)
  sizes = [config.data, config.fsdp, config.tensor]
  shape = ' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1:
    raise UserError(f'mesh {shape}: at most one is -1 (all remaining devices)')
  known = math.prod(size for size in sizes if size != -1)
  if len(devices) % known or (-1 not in sizes and known != len(devices)):
    raise UserError(
      f'mesh {shape} does not fit {len(devices)} devices: set one of --config.mesh.data, .fsdp, '
      '.tensor to -1'
    )
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  if sizes[2] > 1 and config.strategy == 'fsdp':
    raise UserError(
      f'mesh.tensor={sizes[2]} needs --config.mesh.strategy=fsdp_tensor; strategy fsdp shards '
      'over data and fsdp only'
    )
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  # For example, a mesh of 32 x 2 on 4 x 4 x 4 chips splits a physical dimension between two axes.
  options = {'devices': devices, 'allow_split_physical_axes': True}
  # GPUs are in one slice if NVLink connects them; other axes than data may cross hosts, if slowly.
  if slices == 1 or (sizes[0] % slices and devices[0].platform != 'tpu'):
    return Mesh(mesh_utils.create_device_mesh(sizes, **options), AXES, axis_types=types)
  if sizes[0] % slices:
    raise UserError(
      f'{slices} slices are connected by the axis data, but mesh {shape} has data={sizes[0]}: set '
      f'--config.mesh.data to a multiple of {slices}'
    )
  slice_shape = (sizes[0] // slices, *sizes[1:])
  grid = mesh_utils.create_hybrid_device_mesh(slice_shape, (slices, 1, 1), **options)
  return Mesh(grid, AXES, axis_types=types)


def leaves_by_path(tree: Any) -> dict[str, Any]:
  """The leaves of any pytree as {'0/mu/ar/layers/q/kernel': leaf}, in the tree's order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def param_shardings(abstract_tree: Any, table: AxesTable, mesh: Mesh, strategy: str) -> Any:
  """Chooses the sharding of each leaf of a tree.

  Args:
    abstract_tree: parameters, or any tree whose leaf paths end in parameter paths (optimizer
      state, EMA, a whole state): arrays or `jax.ShapeDtypeStruct`.
    table: rows of (regular expression, name or None for each dimension). An expression must match
      the end of a path, beginning at a `/` or at the start of the path; the first matching row
      counts. Names `()` or an empty table leave all dimensions unnamed (networks that never
      train). Scalars are replicated and need no row.
    mesh: from `make_mesh`.
    strategy: a key of RULES.

  Returns:
    The same tree with a NamedSharding at each leaf.

  Raises:
    UserError: a leaf matches no row, or its row has an unknown name or the wrong number of
      dimensions.
  """
  leaves = leaves_by_path(abstract_tree)
  shardings = [
    NamedSharding(mesh, _spec(leaf.shape, axis_names(path, leaf.shape, table), mesh, strategy))
    for path, leaf in leaves.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract_tree), shardings)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first dimension over `data` and `fsdp`."""
  return NamedSharding(mesh, P(BATCH_AXES))


def put_batch(host_batch: Any, mesh: Mesh) -> Any:
  """Makes global arrays on the mesh from this process's elements (see `host_positions`)."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), host_batch
  )


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """Shapes of arrays with one sharding, for compilation ahead of time."""
  place = lambda leaf: leaf.update(sharding=sharding)
  return jax.tree.map(place, jax.eval_shape(lambda leaves: leaves, tree))


def host_positions(batch_size: int, mesh: Mesh) -> list[int]:
  """Ascending positions in a global batch of the elements that `put_batch` takes on this process.

  They need not be consecutive: the mesh follows the wiring of a TPU pod, so the batch shards of a
  host may be, for example, 0, 1, 6 and 15 of 16.
  """
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  ranges = {index[0].indices(batch_size)[:2] for index in indices}
  return [position for start, stop in sorted(ranges) for position in range(start, stop)]


def host_part(mesh: Mesh) -> tuple[int, int]:
  """Which of how many equal parts of each batch this process reads.

  Processes read the same part if `tensor` spans them, because they hold the same batch elements.

  Raises:
    UserError: two processes share some of their batch shards, but not all.
  """
  shards_of: dict[int, set[int]] = {}
  for shard, devices in enumerate(mesh.devices.reshape(-1, mesh.shape[TENSOR])):
    for device in devices:
      shards_of.setdefault(device.process_index, set()).add(shard)
  parts = sorted({tuple(sorted(shards)) for shards in shards_of.values()})
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if any(len(part) * len(parts) != shards for part in parts):
    raise UserError(
      f'mesh.tensor={mesh.shape[TENSOR]} makes processes share part of their batch elements: set '
      'it to a divisor or a multiple of the number of devices of a process'
    )
  return parts.index(tuple(sorted(shards_of[jax.process_index()]))), len(parts)


def check_divides(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Checks that a global batch divides over the batch axes of the mesh and microbatches.

  Raises:
    UserError: it doesn't; names the number of which the batch size must be a multiple.
  """
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  unit = shards * accumulate
  if batch_size < 1 or batch_size % unit:
    cuts = f' x {accumulate} microbatches' if accumulate > 1 else ''
    raise UserError(
      f'batch_size {batch_size} does not divide over {shards} batch shards (data x fsdp){cuts}: '
      f'use a multiple of {unit}'
    )


def constrain(x: Array, names: tuple[str | None, ...]) -> Array:
  """Constrains the sharding of an activation: ('batch', None, None) for [B, L, D].

  Without a constraint the compiler may propagate a parameter's sharding to the activations and
  replicate the batch. Uses the mesh of `jax.set_mesh`. Returns x unchanged if there is no mesh, or
  inside a `shard_map` over all of its axes. Skips an axis that doesn't divide its dimension.
  """
  spec = activation_spec(x.shape, names)
  return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def compiler_options(platform: str | None = None) -> dict[str, Any] | None:
  """XLA options for programs with sharded parameters; None for the defaults.

  They disable collective matmuls on TPU, which multiply by each weight shard as it arrives. Our
  weights are sharded along the contracted dimension, so a collective matmul would read and write
  the whole result once for each shard: a layer would move eight times the bytes to and from HBM.
  Instead, the weights are all-gathered first, overlapped with other work.

  Args:
    platform: platform of the devices (None: the default backend of this process).
  """
  if (platform or jax.default_backend()) != 'tpu':
    return None
  return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000}


def num_shards(name: str) -> int:
  """Number of shards of an activation dimension `name` on the mesh of `jax.set_mesh`."""
  sizes = _auto_axes()
  return math.prod(sizes.get(axis, 1) for axis in ACTIVATIONS[name][0])


def is_sharded() -> bool:
  """Whether the mesh of `jax.set_mesh` has several devices in axes that the compiler shards."""
  return math.prod(_auto_axes().values()) > 1


def _auto_axes() -> dict[str, int]:
  """Sizes of the mesh axes over which the compiler shards activations."""
  mesh = jax.sharding.get_abstract_mesh()
  return {
    axis: mesh.shape[axis]
    for axis, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Auto and axis in AXES
  }


def activation_spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> P | None:
  """Partition spec of an activation on the mesh of `jax.set_mesh`; None without a mesh.

  Args:
    shape: shape of the activation.
    names: name of each dimension, a key of ACTIVATIONS or None; see `constrain`.
  """
  sizes = _auto_axes()
  if not sizes:
    return None
  if len(names) != len(shape):
    raise ValueError(f'{len(names)} names {names} for an array of shape {shape}')
  assignment = _AxisAssignment(shape, sizes)
  for dimension, name in enumerate(names):
    if name is not None:
      assignment.assign_first(dimension, ACTIVATIONS[name])
  return assignment.spec()


def check_sharded_enough(tree: Any, shardings: Any, tolerance: float = 0.02) -> None:
  """Checks that each of n devices holds at most 1/n + tolerance of a tree's bytes.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`.
    shardings: the same tree with a sharding at each leaf.
    tolerance: fraction of all bytes.

  Raises:
    UserError: a device holds more; names the leaves that exceed their share most.
  """
  leaves, leaf_shardings = leaves_by_path(tree), jax.tree.leaves(shardings)
  if not leaves:
    return
  devices = leaf_shardings[0].num_devices
  total = per_device = 0
  excess = {}
  for (path, leaf), sharding in zip(leaves.items(), leaf_shardings, strict=True):
    whole = math.prod(leaf.shape) * leaf.dtype.itemsize
    shard = math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
    total, per_device = total + whole, per_device + shard
    excess[path] = shard - whole / devices
  if per_device > total * (1 / devices + tolerance):
    worst = sorted(excess, key=excess.get, reverse=True)[:3]
    shapes = ', '.join(f'{path} {tuple(leaves[path].shape)}' for path in worst)
    raise UserError(
      f'a device holds {per_device / total:.1%} of the state instead of {1 / devices:.1%}; '
      f'least sharded: {shapes}; choose mesh sizes that divide these dimensions'
    )


class _AxisAssignment:
  """Assigns mesh axes to the dimensions of one array, each axis at most once."""

  def __init__(self, shape: tuple[int, ...], sizes: Mapping[str, int]):
    self._shape = shape
    self._sizes = {axis: size for axis, size in sizes.items() if size > 1}
    self._free = set(self._sizes)
    self._axes: list[tuple[str, ...]] = [() for _ in shape]

  def assign(self, dimension: int, axes: tuple[str, ...]) -> bool:
    """Adds axes to a dimension, if they are free and divide it; returns whether it did."""
    axes = tuple(axis for axis in axes if axis in self._sizes)
    shards = math.prod(self._sizes[axis] for axis in self._axes[dimension] + axes)
    if not axes or not self._free.issuperset(axes) or self._shape[dimension] % shards:
      return False
    self._axes[dimension] += axes
    self._free -= set(axes)
    return True

  def assign_first(self, dimension: int, choices: Sequence[tuple[str, ...]]) -> bool:
    """Adds the first choice that `assign` accepts."""
    return any(self.assign(dimension, axes) for axes in choices)

  def spec(self) -> P:
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in self._axes]
    while entries and entries[-1] is None:
      entries.pop()
    return P(*entries)


def _spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, strategy: str) -> P:
  assignment = _AxisAssignment(shape, mesh.shape)
  for name, choices in RULES[strategy]:
    for dimension in range(len(shape)):
      if names[dimension] == name:
        assignment.assign_first(dimension, choices)
  candidates = [d for d in range(len(shape)) if names[d] != LAYERS]
  candidates.sort(key=lambda d: -shape[d])
  for axes in _FALLBACK:
    any(assignment.assign(dimension, axes) for dimension in candidates)
  return assignment.spec()


@functools.cache
def _suffix_pattern(pattern: str) -> re.Pattern[str]:
  # Converted networks have one row per leaf: more patterns than the cache of `re` holds.
  return re.compile(f'(?:^|/)(?:{pattern})$')


def axis_names(path: str, shape: tuple[int, ...], table: AxesTable) -> tuple[str | None, ...]:
  """Logical axis names of a leaf's dimensions, None if unnamed; see `param_shardings`.

  Raises:
    UserError: no row of the table matches the path, or the row doesn't fit the leaf.
  """
  if not shape or not table:
    return (None,) * len(shape)
  rows = (row for row in table if _suffix_pattern(row[0]).search(path))
  pattern, names = next(rows, ('', None))
  if names is None:
    raise UserError(
      f"no row of logical_axes matches '{path}' {tuple(shape)}: add one to the system's table"
    )
  for name in names:
    if name is not None and name not in NAMES:
      raise UserError(f"unknown axis name '{name}' in row '{pattern}'{did_you_mean(name, NAMES)}")
  if names and len(names) != len(shape):
    raise UserError(
      f"'{path}' has shape {tuple(shape)}, but row '{pattern}' names {len(names)} dimensions"
    )
  return names or (None,) * len(shape)
