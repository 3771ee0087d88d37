"""Networks that never train: loaded once, spread over the mesh, an argument of every call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import sharding
from vpe_jax.checkpoints import checksum, converted, weights
from vpe_jax.config import MeshConfig
from vpe_jax.contracts import Array, Examples, Params, System, UserError
from vpe_jax.sharding import by_path


@dataclasses.dataclass(frozen=True)
class Frozen:
  """Frozen networks by name.

  Attributes:
    params: name -> tree, sharded; in no checkpoint, never closed over.
    fingerprints: name -> what stands for every bit of the tree.
    encode: the system's `encode(params, images) -> (codes, latents)`, jitted once for all who
      use it (None: the system has no encoders).
    encode_reference: the system's, jitted alike (None: it doesn't edit).
  """

  params: Params
  fingerprints: dict[str, str]
  encode: Callable[[Params, Array], tuple[Array, Array]] | None
  encode_reference: Callable[[Params, Array], Array] | None = None

  def with_codes(self, batch: Examples) -> Examples:
    """A batch of pictures with codes and latents beside them."""
    codes, latents = self.encode(self.params, batch.image)
    batch = dataclasses.replace(batch, codes=codes, latents=latents)
    if self.encode_reference is None:
      return batch
    before = self.encode_reference(self.params, batch.reference)
    return dataclasses.replace(batch, reference_latents=before)


def load(system: System, mesh: jax.sharding.Mesh, strategy: str) -> Frozen:
  """Loads the frozen networks of a system.

  Raises:
    UserError: weights are missing, can't be read, or don't fit the model.
  """
  found = {name: _network(system, name, mesh, strategy) for name in system.frozen_weights}
  placed = {name: params for name, (params, _) in found.items()}
  check_fits(system, placed)
  fingerprints = {name: fingerprint for name, (_, fingerprint) in found.items()}
  encoders = (getattr(system, name, None) for name in ('encode', 'encode_reference'))
  options = sharding.compiler_options()
  jitted = (encode and jax.jit(encode, compiler_options=options) for encode in encoders)
  return Frozen(placed, fingerprints, *jitted)


def for_drawing(system: System) -> Params:
  """The networks that a system draws with, on one device.

  Raises:
    UserError: weights are missing, can't be read, or are of another size.
  """
  return _on_one_device(system, system.draws_with)


def for_plans(system: System) -> Params:
  """The networks that a system reads visual prompts with, on one device.

  Raises:
    UserError: it was trained without them; or see `for_drawing`.
  """
  names = system.visual_prompt.weights
  if not set(names) <= set(system.frozen_weights):
    raise UserError('this model was trained on synthetic codes: they are of no codebook')
  found, side = _on_one_device(system, names), system.config.data.image_size
  with _misfit(system, names):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    jax.eval_shape(system.visual_prompt.encode, found, image)
  return found


def _on_one_device(system: System, names: Iterable[str]) -> Params:
  mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
  return {name: _network(system, name, mesh, 'fsdp')[0] for name in names}


def check_drawing(system: System, params: Params, frozen: Params) -> None:
  """Compares with the config in shapes alone: what doesn't fit is found before any work.

  Args:
    system: one that draws.
    params: its parameters.
    frozen: the networks that it draws with.

  Raises:
    UserError: the parameters, or the frozen networks, are those of another model.
  """
  check_shapes(by_path(jax.eval_shape(system.init, jax.random.key(0))), by_path(params))
  _, latents = system.abstract_encoded(1)
  with _misfit(system, system.draws_with):
    jax.eval_shape(system.decode, frozen, latents)


def check_shapes(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
  """Compares parameters by path.

  Raises:
    UserError: one is missing, too many, or of another shape.
  """
  if difference := weights.mismatch(wanted, found):
    path, ours, theirs = difference
    raise UserError(
      f"the weights are not those of their config: '{path}' is {theirs} there, and the config "
      f'asks for {ours}; get the file again, or name the run that it came from'
    )


@contextlib.contextmanager
def _misfit(system: System, names: Iterable[str]) -> Iterator[None]:
  """Says in one line that frozen networks don't fit."""
  try:
    yield
  except UserError:
    raise
  # What a wrong tree ends in depends on the network: flax, einops, or a missing key.
  except Exception as error:
    sources = ', '.join(f'{name}={system.frozen_weights[name]}' for name in names)
    reason = (str(error).splitlines() or [''])[0].split(' (https')[0]
    raise UserError(
      f'the frozen networks ({sources}) do not fit the sizes in config.model or '
      f'data.image_size={system.config.data.image_size}: name weights that were trained with these '
      f'sizes, or set them to those of the weights ({type(error).__name__}: {reason})'
    ) from error


def _network(
  system: System, name: str, mesh: jax.sharding.Mesh, strategy: str
) -> tuple[Params, str]:
  """A frozen network on the mesh, and what stands for every bit of it."""
  published = getattr(system, 'published', {})
  if name not in published:
    tree = weights.load(system.frozen_weights[name])[0]
    return jax.device_put(tree, shardings_of(tree, mesh, strategy)), weights.fingerprint(tree)
  tree = converted.network(
    published[name], functools.partial(_spread, mesh=mesh, strategy=strategy)
  )
  tree = jax.device_put(tree, shardings_of(tree, mesh, strategy))
  # No host holds a large network whole: its checksums are summed where it lies.
  sums = json.dumps(checksum.checksums(by_path(tree)), sort_keys=True)
  return tree, hashlib.sha256(sums.encode()).hexdigest()[:12]


def _spread(tree: Params, mesh: jax.sharding.Mesh, strategy: str) -> Params:
  """Shapes with shardings."""
  where = shardings_of(tree, mesh, strategy)
  shape = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
  return jax.tree.map(shape, tree, where)


def shardings_of(networks: Params, mesh: jax.sharding.Mesh, strategy: str) -> Params:
  """How frozen networks (arrays or shapes) lie on the mesh: split along the largest dimension."""
  # No names: each leaf is split along its largest dimension that divides.
  table = [
    (re.escape(path), (None,) * len(leaf.shape))
    for path, leaf in sharding.by_path(networks).items()
  ]
  return sharding.param_shardings(networks, table, mesh, strategy)


def check_fits(system: System, loaded: Params) -> None:
  """Shows the networks one picture, in shapes alone: what doesn't fit is found before any work.

  Args:
    system: it may have `encode` or `features` (see vpe_jax.contracts.System); without either
      there is nothing to check.
    loaded: its frozen networks, name -> tree.

  Raises:
    UserError: the networks are of other sizes than the config says, or make codes or latents that
      the model doesn't take.
  """
  encode, data = getattr(system, 'encode', None), system.config.data
  read = encode or getattr(system, 'features', None)
  if read is None:
    return
  if not system.frozen_weights:
    if encode and data.encode == 'online':
      raise UserError(
        f'data.source={data.source} trains without encoders, which data.encode=online asks for: '
        'set data.encode=cached'
      )
    return
  image = jax.ShapeDtypeStruct((1, data.image_size, data.image_size, 3), jnp.uint8)
  with _misfit(system, system.frozen_weights):
    found = jax.eval_shape(read, loaded, image)
  if encode and hasattr(system, 'abstract_encoded'):
    _check_encoded(system, found)


def _check_encoded(system: System, found: Any) -> None:
  wanted = system.abstract_encoded(1)
  for name, made, taken in zip(('codes', 'latents'), found, wanted, strict=True):
    if made.shape != taken.shape:
      raise UserError(
        f'a picture of data.image_size={system.config.data.image_size} becomes {name} of shape '
        f'{list(made.shape[1:])}, but the model takes {list(taken.shape[1:])}: change '
        'data.image_size, or the sizes in config.model'
      )
