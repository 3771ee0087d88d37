"""Devices as a mesh, and which dimension of which array is spread over them.

The mesh has three axes. `data` and `fsdp` together hold the batch and, split the same way, every
leaf of parameters, optimizer state and average (fully sharded data parallelism). They are two
axes rather than one because of dimensions such as 1152 and 4304, which no 256 devices divide but
16 x 16 do, one axis each. `tensor` splits heads, hidden units and vocabulary within a layer.

Networks name the dimensions of their parameters (the constants below); RULES says, for each
strategy, which mesh axes a name prefers. Arrays carry no names: a table of (regular expression
over parameter paths, names) does, so the same table serves optimizer state and averages, whose
paths end in the parameter's path.
"""

from __future__ import annotations

import functools
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vpe_jax.config import MeshConfig, nearest
from vpe_jax.contracts import Array, UserError

# Mesh axes.
DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = (DATA, FSDP)

# Names of parameter dimensions.
LAYERS = 'layers'  # stacked layers of a scanned network: never split, the scan slices it
EMBED = 'embed'  # model width
HEADS = 'heads'  # query heads
KV_HEADS = 'kv_heads'  # key/value heads
HEAD = 'head'  # width of one head
MLP = 'mlp'  # hidden width of a feed-forward block
VOCAB = 'vocab'  # rows of a token embedding or columns of a token head
CODES = 'codes'  # rows of a codebook
POSITION = 'position'  # rows of a position table
FEATURES = 'features'  # width of what enters or leaves a network: patch pixels, latent channels
CONV_IN = 'conv_in'  # input channels of a convolution
CONV_OUT = 'conv_out'  # output channels of a convolution
KERNEL = 'kernel'  # height or width of a convolution's window
NAMES = (
  LAYERS, EMBED, HEADS, KV_HEADS, HEAD, MLP, VOCAB, CODES, POSITION, FEATURES, CONV_IN, CONV_OUT,
  KERNEL,
)  # fmt: skip

# Names of activation dimensions, for `constrain`: batch, and any parameter name below.
BATCH = 'batch'
ACTIVATIONS = {
  BATCH: (BATCH_AXES, (FSDP,), (DATA,)),
  HEADS: ((TENSOR,),),
  KV_HEADS: ((TENSOR,),),
  MLP: ((TENSOR,),),
  VOCAB: ((TENSOR,),),
}

_SPREAD = (BATCH_AXES, (FSDP,), (DATA,))
# Strategy -> rows of (name, choices of mesh axes), most important name first. Of the choices, the
# first is taken that divides the dimension and whose axes this leaf doesn't use yet. Axes that are
# still free afterwards go to the largest dimension that they divide, LAYERS excepted.
RULES: dict[str, tuple[tuple[str, tuple[tuple[str, ...], ...]], ...]] = {
  'fsdp': (
    (EMBED, _SPREAD),
    (MLP, _SPREAD),
    (CONV_OUT, _SPREAD),
    (CONV_IN, _SPREAD),
  ),
  'fsdp_tensor': (
    (HEADS, ((TENSOR,),)),
    (KV_HEADS, ((TENSOR,),)),
    (MLP, ((TENSOR,),)),
    (VOCAB, ((TENSOR,),)),
    (EMBED, _SPREAD),
    (CONV_OUT, _SPREAD),
    (CONV_IN, _SPREAD),
  ),
}
_NEVER = 10_000_000  # seconds: four months
_FALLBACK = (BATCH_AXES, (FSDP,), (DATA,), (TENSOR,))

AxesTable = Sequence[tuple[str, tuple[str | None, ...]]]


def initialize_distributed() -> None:
  """Joins the processes of a run; to be called before anything else asks JAX for devices.

  Who takes part comes from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
  the cluster (TPU pods, Slurm, Open MPI, Kubernetes). A plain machine becomes a group of one
  process on a free local port, since only members of a group hear of a SIGTERM in time to save
  (see `preempted`). A second call does nothing.

  Raises:
    UserError: the variables are incomplete or not numbers.
  """
  if jax.distributed.is_initialized():
    return
  names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  given = {name: os.environ[name] for name in names if os.environ.get(name)}
  if not all(value.isdigit() for value in given.values()):
    raise UserError(f'{", ".join(given)} must be whole numbers, not {list(given.values())}')
  count, index = (int(given[name]) if name in given else None for name in names)
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  if given and (address is None or len(given) < len(names)):
    raise UserError(
      'several processes need all of JAX_COORDINATOR_ADDRESS (host:port of process 0), '
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID; only some are set'
    )
  try:
    jax.distributed.initialize(address, count, index)
  except ValueError as error:
    if address is not None or 'coordinator_address' not in str(error):
      raise
    address = f'127.0.0.1:{_free_port()}'
    # Nobody else waits for this process: a laptop may sleep for days and go on.
    jax.distributed.initialize(
      address, 1, 0, coordinator_bind_address=address, heartbeat_timeout_seconds=_NEVER
    )


def preempted(step: int) -> bool:
  """Whether all processes should save and stop at this step: one of them received SIGTERM.

  Every process has to ask at every step; all get True at the same one. Always False where
  `initialize_distributed` wasn't called.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices (default: all) as `data x fsdp x tensor`, with Auto axis types.

  Several TPU slices lie one after the other along `data`: only that axis crosses the network
  between them.

  Raises:
    UserError: the strategy is unknown, the sizes don't multiply to the number of devices,
      `tensor` is above 1 with a strategy that doesn't use it, or `data` isn't a multiple of the
      number of slices.
  """
  if config.strategy not in RULES:
    raise UserError(f"unknown mesh.strategy '{config.strategy}'{nearest(config.strategy, RULES)}")
  devices = list(jax.devices() if devices is None else devices)
  sizes = [config.data, config.fsdp, config.tensor]
  asked = ' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'mesh {asked}: sizes are positive, and at most one is -1 (what is left)')
  given = math.prod(size for size in sizes if size != -1)
  if len(devices) % given or (-1 not in sizes and given != len(devices)):
    raise UserError(
      f'mesh {asked} does not fit {len(devices)} devices: set one of --config.mesh.data, .fsdp, '
      '.tensor to -1'
    )
  sizes = [len(devices) // given if size == -1 else size for size in sizes]
  if sizes[2] > 1 and config.strategy == 'fsdp':
    raise UserError(
      f'mesh.tensor={sizes[2]} needs --config.mesh.strategy=fsdp_tensor; strategy fsdp splits '
      'over data and fsdp only'
    )
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', None) for device in devices})
  # Axes such as 32 x 2 on 4 x 4 x 4 chips need part of a physical dimension each.
  split = {'devices': devices, 'allow_split_physical_axes': True}
  if slices == 1:
    return Mesh(mesh_utils.create_device_mesh(sizes, **split), AXES, axis_types=types)
  if sizes[0] % slices:
    raise UserError(
      f'{slices} slices are connected by the axis data, but mesh {asked} has data={sizes[0]}: set '
      f'--config.mesh.data to a multiple of {slices}'
    )
  within = (sizes[0] // slices, *sizes[1:])
  grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), **split)
  return Mesh(grid, AXES, axis_types=types)


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of any pytree as {'0/mu/ar/layers/q/kernel': leaf}, in the tree's order."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


def param_shardings(abstract_tree: Any, table: AxesTable, mesh: Mesh, strategy: str) -> Any:
  """Decides how each leaf of a tree is spread over the mesh.

  Args:
    abstract_tree: parameters, or any tree whose leaf paths end in parameter paths (optimizer
      state, averages, a whole state): arrays or `jax.ShapeDtypeStruct`.
    table: rows of (regular expression, name or None for each dimension). An expression has to
      match the trailing parts of a path, from a `/` or its start to its end; the first row that
      does is taken. Names `()` leave all dimensions unnamed, and so does an empty table (networks
      that never train). Leaves without dimensions are replicated and need no row.
    mesh: from `make_mesh`.
    strategy: a key of RULES.

  Returns:
    The same tree with a NamedSharding at each leaf.

  Raises:
    UserError: a leaf has no row, or its row has an unknown name or another number of dimensions.
  """
  leaves = by_path(abstract_tree)
  shardings = [
    NamedSharding(mesh, _spec(leaf.shape, axis_names(path, leaf.shape, table), mesh, strategy))
    for path, leaf in leaves.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract_tree), shardings)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over `data` and `fsdp`; the other dimensions whole."""
  return NamedSharding(mesh, P(BATCH_AXES))


def put_batch(host_batch: Any, mesh: Mesh) -> Any:
  """Puts the rows that this process has read (see `host_rows`) on the mesh as global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), host_batch
  )


def host_rows(batch_size: int, mesh: Mesh) -> slice:
  """The contiguous rows of a global batch that this process reads."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  ranges = [index[0].indices(batch_size)[:2] for index in indices]
  return slice(min(start for start, _ in ranges), max(stop for _, stop in ranges))


def check_divides(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
  """Refuses a global batch that doesn't divide over devices and microbatches.

  Raises:
    UserError: it doesn't; names the smallest multiple that fits.
  """
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  unit = shards * accumulate
  if batch_size < 1 or batch_size % unit:
    cuts = f' x {accumulate} microbatches' if accumulate > 1 else ''
    raise UserError(
      f'batch_size {batch_size} does not divide over {shards} devices{cuts}: '
      f'use a multiple of {unit}'
    )


def constrain(x: Array, names: tuple[str | None, ...]) -> Array:
  """Pins an activation's layout at a block boundary: ('batch', None, None) for [B, L, D].

  Left to itself the compiler may carry a parameter's layout into the activations and replicate
  the batch. Uses the mesh of `jax.set_mesh`; without one, or inside a `shard_map` over all of
  its axes, x comes back as it is. An axis that doesn't divide its dimension is left out.
  """
  spec = placement(x.shape, names)
  return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def compiler_options(platform: str | None = None) -> dict[str, Any] | None:
  """How programs over spread parameters are compiled; None: as the compiler likes.

  On TPU a product whose weights lie apart may run part by part as they arrive (a collective
  matmul). Weights that are spread along the dimension that is summed over, as ours are, would then
  read and write the whole result once for each part: a layer moves eight times the bytes to and
  from HBM. So they are gathered whole first, beside other work.

  Args:
    platform: of the devices (None: of this process).
  """
  if (platform or jax.default_backend()) != 'tpu':
    return None
  return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000}


def parts(name: str) -> int:
  """In how many parts the mesh of `jax.set_mesh` would cut an activation's dimension `name`."""
  usable = _usable()
  return math.prod(usable.get(axis, 1) for axis in ACTIVATIONS[name][0])


def is_spread() -> bool:
  """Whether the mesh of `jax.set_mesh` has several devices that the compiler may spread over."""
  return math.prod(_usable().values()) > 1


def _usable() -> dict[str, int]:
  """Sizes of the mesh axes that activations may be placed on."""
  mesh = jax.sharding.get_abstract_mesh()
  return {
    axis: mesh.shape[axis]
    for axis, kind in zip(mesh.axis_names, mesh.axis_types)
    if kind == AxisType.Auto and axis in AXES
  }


def placement(shape: tuple[int, ...], names: tuple[str | None, ...]) -> P | None:
  """How an activation of named dimensions lies on the mesh of `jax.set_mesh`.

  None where there is nothing to place it on; see `constrain`.
  """
  usable = _usable()
  if not usable:
    return None
  if len(names) != len(shape):
    raise ValueError(f'{len(names)} names {names} for an array of shape {shape}')
  placed = _Placement(shape, usable)
  for dimension, name in enumerate(names):
    if name is not None:
      placed.first(dimension, ACTIVATIONS[name])
  return placed.spec()


def check_sharded_enough(tree: Any, shardings: Any, tolerance: float = 0.02) -> None:
  """Asserts that every device holds at most 1/n + tolerance of a tree's bytes.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`.
    shardings: the same tree with a sharding at each leaf.
    tolerance: a share of all bytes.

  Raises:
    UserError: it holds more; names the leaves that take most beyond their share.
  """
  leaves, places = by_path(tree), jax.tree.leaves(shardings)
  if not leaves:
    return
  devices = places[0].num_devices
  total = held = 0
  excess = {}
  for (path, leaf), place in zip(leaves.items(), places, strict=True):
    whole = math.prod(leaf.shape) * leaf.dtype.itemsize
    part = math.prod(place.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
    total, held = total + whole, held + part
    excess[path] = part - whole / devices
  if held > total * (1 / devices + tolerance):
    worst = sorted(excess, key=excess.get, reverse=True)[:3]
    shapes = ', '.join(f'{path} {tuple(leaves[path].shape)}' for path in worst)
    raise UserError(
      f'a device holds {held / total:.1%} of the state, {1 / devices:.1%} would be its share; '
      f'least sharded: {shapes}; choose mesh sizes that divide these dimensions'
    )


class _Placement:
  """The mesh axes given to each dimension of one array, so far."""

  def __init__(self, shape: tuple[int, ...], sizes: Mapping[str, int]):
    self._shape = shape
    self._sizes = {axis: size for axis, size in sizes.items() if size > 1}
    self._free = set(self._sizes)
    self._axes: list[tuple[str, ...]] = [() for _ in shape]

  def put(self, dimension: int, axes: tuple[str, ...]) -> bool:
    """Gives the dimension these axes too, if they are free and divide it."""
    axes = tuple(axis for axis in axes if axis in self._sizes)
    parts = math.prod(self._sizes[axis] for axis in self._axes[dimension] + axes)
    if not axes or not self._free.issuperset(axes) or self._shape[dimension] % parts:
      return False
    self._axes[dimension] += axes
    self._free -= set(axes)
    return True

  def first(self, dimension: int, choices: Sequence[tuple[str, ...]]) -> bool:
    return any(self.put(dimension, axes) for axes in choices)

  def spec(self) -> P:
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in self._axes]
    while entries and entries[-1] is None:
      entries.pop()
    return P(*entries)


def _spec(shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh, strategy: str) -> P:
  placed = _Placement(shape, mesh.shape)
  for name, choices in RULES[strategy]:
    for dimension in range(len(shape)):
      if names[dimension] == name:
        placed.first(dimension, choices)
  spreadable = [d for d in range(len(shape)) if names[d] != LAYERS]
  spreadable.sort(key=lambda d: -shape[d])
  for axes in _FALLBACK:
    any(placed.put(dimension, axes) for dimension in spreadable)
  return placed.spec()


@functools.cache
def _ending(pattern: str) -> re.Pattern[str]:
  # Networks that were converted have a row a leaf: more than `re` itself remembers.
  return re.compile(f'(?:^|/)(?:{pattern})$')


def axis_names(path: str, shape: tuple[int, ...], table: AxesTable) -> tuple[str | None, ...]:
  """The name of each dimension of a leaf, None where it has none; see `param_shardings`.

  Raises:
    UserError: no row of the table fits.
  """
  if not shape or not table:
    return (None,) * len(shape)
  rows = (row for row in table if _ending(row[0]).search(path))
  pattern, names = next(rows, ('', None))
  if names is None:
    raise UserError(
      f"no row of logical_axes matches '{path}' {tuple(shape)}: add one to the system's table"
    )
  for name in names:
    if name is not None and name not in NAMES:
      raise UserError(f"unknown axis name '{name}' in row '{pattern}'{nearest(name, NAMES)}")
  if names and len(names) != len(shape):
    raise UserError(
      f"'{path}' has shape {tuple(shape)}, but row '{pattern}' names {len(names)} dimensions"
    )
  return names or (None,) * len(shape)
