"""Frozen networks: loaded once, sharded over the mesh, and passed to every call as an argument."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vpe_jax import rng as rng_lib
from vpe_jax import sharding
from vpe_jax.checkpoints import checksum, dtypes, imports, weights
from vpe_jax.contracts import Array, Batch, Params, Samples, System, UserError
from vpe_jax.sharding import leaves_by_path

Encode = jax.stages.Wrapped


@dataclasses.dataclass(frozen=True)
class FrozenNetworks:
  """Frozen networks by name.

  Attributes:
    params: name -> sharded parameters; not part of checkpoints, never closed over.
    fingerprints: name -> hash of all bits of the parameters.
    encode: (params, inputs, rng, example) -> encoded entries: the system's `encode`, jitted once
      for all callers. `rng` is the run's key. Its results are sharded as batches.
  """

  params: Params
  fingerprints: dict[str, str]
  encode: Encode

  def encode_batch(self, batch: Batch, rng: Array) -> Batch:
    """Returns the batch with `encoded` replaced by the outputs of the frozen encoders."""
    encoded = self.encode(self.params, batch.inputs, rng, batch.example)
    return dataclasses.replace(batch, encoded=encoded)

  def lower_encode(self, batch: Batch, rng: Array) -> jax.stages.Lowered:
    """Lowers the program of `encode_batch` for the shapes of a batch."""
    return self.encode.lower(self.params, batch.inputs, rng, batch.example)


def load(system: System, mesh: jax.sharding.Mesh, strategy: str) -> FrozenNetworks:
  """Loads the frozen networks of a system.

  Raises:
    UserError: weights are missing, can't be read, or don't fit the model.
  """
  networks = {name: _network(system, name, mesh, strategy) for name in system.frozen}
  params = {name: tree for name, (tree, _) in networks.items()}
  check_fits(system, params)
  fingerprints = {name: fingerprint for name, (_, fingerprint) in networks.items()}

  def encode(
    params: Params, inputs: Mapping[str, Array], rng: Array, example: Array
  ) -> dict[str, Array]:
    return system.encode(params, inputs, rng_lib.encoding_keys(rng, example))

  encode = jax.jit(
    encode,
    out_shardings=sharding.batch_sharding(mesh),
    compiler_options=sharding.compiler_options(),
  )
  return FrozenNetworks(params, fingerprints, encode)


def abstract_params(system: System) -> Params:
  """Frozen networks by name, as `jax.ShapeDtypeStruct` trees with the dtypes of `system.frozen`."""
  return {
    name: dtypes.cast_shapes(tree, dtypes.parse(system.frozen[name].dtype))
    for name, tree in system.frozen_shapes().items()
  }


def is_synthetic(system: System) -> bool:
  """Whether a system trains on synthetic encoded entries, without encoders or a decoder.

  A system without frozen networks may still encode images, with codecs that have no parameters.
  """
  return system.config.data.source == 'synthetic' and not system.frozen


def load_for_sampling(system: Samples, mesh: jax.sharding.Mesh) -> Params:
  """Loads the networks that a system samples with onto a mesh.

  Raises:
    UserError: weights are missing, can't be read, or have other sizes.
  """
  return _on_mesh(system, system.sampling_networks, mesh)


def load_draft_encoders(system: Samples, mesh: jax.sharding.Mesh) -> Params:
  """Loads the networks that encode images to drafts (see `contracts.Samples`) onto a mesh.

  Raises:
    UserError: the system was trained without these networks, or their weights are missing, can't be
      read, or have other sizes.
  """
  names = system.draft_encoders
  if not set(names) <= set(system.frozen):
    raise UserError(
      'this model was trained on synthetic codes, for which no encoder exists: name a run that was '
      'trained on images'
    )
  networks = _on_mesh(system, names, mesh)
  side = system.draft_image_side or system.config.data.image_size
  with _one_line_errors(system, names):
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    jax.eval_shape(system.encode_drafts, networks, image)
  return networks


def _on_mesh(system: System, names: Iterable[str], mesh: jax.sharding.Mesh) -> Params:
  strategy = system.config.mesh.strategy
  return {name: _network(system, name, mesh, strategy)[0] for name in names}


def check_sampling(system: Samples, params: Params, frozen: Params) -> None:
  """Checks the shapes of parameters and frozen networks before sampling.

  Args:
    system: a system that samples.
    params: its parameters.
    frozen: the networks that it samples with.

  Raises:
    UserError: the parameters or the frozen networks don't fit the system's config.
  """
  check_shapes(
    leaves_by_path(jax.eval_shape(system.init, jax.random.key(0))), leaves_by_path(params)
  )
  encoded = system.batch_spec(1).encoded
  with _one_line_errors(system, system.sampling_networks):
    jax.eval_shape(system.decode, frozen, encoded, jax.eval_shape(lambda: jax.random.key(0)))


def check_shapes(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> None:
  """Compares the shapes of parameters by path.

  Args:
    expected: path -> leaf, from the config.
    actual: path -> leaf, from the weights.

  Raises:
    UserError: a parameter is missing, is unexpected, or has another shape.
  """
  if difference := weights.mismatch(expected, actual):
    path, expected_shape, shape = difference
    raise UserError(
      f"the weights don't fit their config: '{path}' is {shape}, not {expected_shape}; get the "
      'file again, or name the run that it was exported from'
    )


@contextlib.contextmanager
def _one_line_errors(system: System, names: Iterable[str]) -> Iterator[None]:
  """Context in which any exception becomes a one-line UserError: the networks don't fit."""
  try:
    yield
  except UserError:
    raise
  # A wrong tree raises different exceptions, depending on the network (flax, einops, KeyError).
  except Exception as error:
    sources = ', '.join(f'{name}={system.frozen[name].source}' for name in names)
    reason = (str(error).splitlines() or [''])[0].split(' (https')[0]  # without flax's link
    raise UserError(
      f'the frozen networks ({sources}) do not fit the sizes in config.model or '
      f'data.image_size={system.config.data.image_size}: name weights that were trained with these '
      f'sizes, or change the sizes to those of the weights ({type(error).__name__}: {reason})'
    ) from error


def _network(
  system: System, name: str, mesh: jax.sharding.Mesh, strategy: str
) -> tuple[Params, str]:
  """Loads a frozen network on the mesh; returns its parameters and fingerprint."""
  network = system.frozen[name]
  if network.published is None:
    shapes = _with_shardings(abstract_params(system)[name], mesh, strategy)
    tree = weights.load(network.source, network.dtype, leaves_by_path(shapes))[0]
  else:
    shard = functools.partial(_with_shardings, mesh=mesh, strategy=strategy)
    tree = imports.network(network.published, shard, network.dtype)
  # A network of other sizes, which the caller refuses, is loaded without shardings.
  tree = jax.device_put(tree, shardings_of(tree, mesh, strategy))
  # A large network doesn't fit on one host, so its checksums are computed on the devices.
  sums = json.dumps(checksum.checksums(leaves_by_path(tree)), sort_keys=True)
  return tree, hashlib.sha256(sums.encode()).hexdigest()[:12]


def _with_shardings(tree: Params, mesh: jax.sharding.Mesh, strategy: str) -> Params:
  """Adds shardings to abstract parameters."""
  return jax.tree.map(
    lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
    tree,
    shardings_of(tree, mesh, strategy),
  )


def shardings_of(networks: Params, mesh: jax.sharding.Mesh, strategy: str) -> Params:
  """Shardings of frozen networks (arrays or shapes)."""
  # Without axis names, each leaf is sharded along its largest divisible dimension.
  table = [
    (re.escape(path), (None,) * len(leaf.shape))
    for path, leaf in sharding.leaves_by_path(networks).items()
  ]
  return sharding.param_shardings(networks, table, mesh, strategy)


def check_fits(system: System, networks: Params) -> None:
  """Traces the frozen encoders on one example to check their shapes before training.

  Args:
    system: the system whose `encode` is traced.
    networks: name -> parameters of the frozen networks.

  Raises:
    UserError: the networks don't fit the sizes in the config, or the shapes of their outputs don't
      fit the model.
  """
  data, spec = system.config.data, system.batch_spec(1)
  if is_synthetic(system):
    if spec.encoded and data.encode == 'online':
      raise UserError(
        f'data.source={data.source} trains without encoders, but data.encode=online needs them: '
        'set data.encode=cached'
      )
    return
  batch = spec.batch(cached=False)
  keys = jax.eval_shape(rng_lib.encoding_keys, rng_lib.abstract_key(), batch.example)
  with _one_line_errors(system, system.frozen):
    outputs = jax.eval_shape(system.encode, networks, batch.inputs, keys)
  for name, expected in spec.encoded.items():
    if outputs[name].shape != expected.shape:
      raise UserError(
        f'an image of data.image_size={data.image_size} has {name} of shape '
        f'{list(outputs[name].shape[1:])}, but the model takes {list(expected.shape[1:])}: change '
        'data.image_size, or the sizes in config.model'
      )
