"""Families of published networks: maps their config.json and tensors to our sizes and parameters.

A family is a module of this package with the attributes of `Family`. The key layouts are in
checkpoints/tables.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from vpe_jax.checkpoints import convert, dtypes
from vpe_jax.checkpoints.sources import Source
from vpe_jax.checkpoints.table import Table
from vpe_jax.config import build_section, did_you_mean, flatten, to_dict
from vpe_jax.contracts import Array, Params, UserError

FAMILIES = (
  'siglip',
  'siglip_vq',
  'showo2',
  'qwen2',
  'llama',
  'clip',
  'dinov2',
  'kl_vae',
  'wan_vae',
  'ibq',
  'llamagen',
  'llamagen_vq',
)


# Families with `RELEASED_SIZES`, which are used if a source has no config.json.
WITH_RELEASED_SIZES = ('siglip_vq', 'wan_vae', 'ibq', 'llamagen_vq')
# Fields of a family's sizes that a run chooses: they may differ from those of the weights.
FREE_SIZES: Mapping[str, tuple[str, ...]] = {
  'showo2': ('codes', 'multiple', 'latent_size', 'condition'),
  'qwen2': ('context',),
  'llama': ('context',),
  # A run may normalize latents by moments of its own data.
  'kl_vae': ('shift', 'scale', 'raw_deviation'),
  'wan_vae': ('shift', 'scale', 'raw_deviation'),
}


class Family(Protocol):
  """Interface of a module of this package.

  Attributes:
    LAYOUTS: key layouts of published weights; exports use the first.
    STEM: stem of exported file names.
    Sizes: frozen dataclass of a network's sizes.
    RELEASED_SIZES: sizes of the released network; only families in WITH_RELEASED_SIZES have them.
  """

  LAYOUTS: tuple[Table, ...]
  STEM: str
  Sizes: type
  RELEASED_SIZES: Any

  def sizes(self, config: Mapping[str, Any]) -> Any:
    """Converts config.json to our sizes.

    Raises:
      KeyError: a field is missing.
      UserError: our implementation doesn't support the network.
    """
    ...

  def config_json(self, sizes: Any) -> dict[str, Any]:
    """Makes a config.json for the reference library."""
    ...

  def init(self, sizes: Any, rng: Array) -> Params:
    """Initializes parameters; only their shapes are used."""
    ...

  def axes(self, sizes: Any) -> dict[str, int]:
    """Sizes of axes that an export can't infer from our leaves, such as the side of a patch."""
    ...


@dataclasses.dataclass(frozen=True)
class Imported:
  """An imported network.

  Attributes:
    family: a name in FAMILIES.
    sizes: sizes of the network, as the family's `Sizes`.
    params: parameters of the network.
    tensor_map: destination of each source tensor, and unused tensors.
  """

  family: str
  sizes: Any
  params: Params
  tensor_map: convert.TensorMap


def get(name: str) -> Family:
  """Imports the module of a family.

  Raises:
    UserError: the family is unknown.
  """
  if name not in FAMILIES:
    raise UserError(f"unknown family '{name}'{did_you_mean(name, FAMILIES)}")
  return importlib.import_module(f'{__name__}.{name}')


def load(
  name: str,
  source: Source,
  shard: Callable[[Params], Params] | None = None,
  sizes: Any = None,
  dtype: str = 'float32',
  allow_nonfinite: bool = False,
) -> Imported:
  """Loads a published network.

  Args:
    name: a name in FAMILIES.
    source: the published weights.
    shard: adds shardings to the abstract parameters (None: one device).
    sizes: sizes of the network (None: those of the source's config.json, or the family's
      `RELEASED_SIZES` without that file).
    dtype: dtype of the parameters: float32, bfloat16 or float16. Tensors are cast one at a time.
    allow_nonfinite: whether to load NaN and infinity.

  Raises:
    UserError: the family, the sizes or the dtype are unknown, the weights don't fit the sizes, the
      source's config.json has others, or values are not finite.
  """
  family = get(name)
  if sizes is None:
    sizes = read_sizes(name, source)
  elif source.config:
    check_equal_sizes(name, source.path, read_sizes(name, source), sizes)
  abstract_params = abstract(name, sizes, dtype)
  if shard is not None:
    abstract_params = shard(abstract_params)
  tensor_map = convert.match_tensors(source.tensors, family.LAYOUTS, abstract_params)
  leaves = convert.load(source.tensors, tensor_map, abstract_params, allow_nonfinite)
  return Imported(name, sizes, convert.tree(leaves), tensor_map)


def abstract(name: str, sizes: Any, dtype: str = 'float32') -> Params:
  """Parameters of a network as `jax.ShapeDtypeStruct`.

  Raises:
    UserError: the family or the dtype is unknown, or the sizes are inconsistent.
  """
  return dtypes.cast_shapes(_abstract(get(name), name, sizes), dtypes.parse(dtype))


def read_sizes(name: str, source: Source) -> Any:
  """Sizes of published weights: those of their config.json, or the family's `RELEASED_SIZES`.

  Raises:
    UserError: the family is unknown, or config.json is missing or invalid.
  """
  family = get(name)
  if not source.config and name in WITH_RELEASED_SIZES:
    return family.RELEASED_SIZES
  if not source.config:
    raise UserError(
      f"'{source.path}' has no config.json in its folder: get that file too, it has the sizes of "
      f'{name}'
    )
  try:
    return _checked(family.sizes(source.config))
  except UserError as error:  # It names what our implementation doesn't support.
    raise UserError(f"config.json of '{source.path}': {error}") from error
  except KeyError as error:
    raise UserError(
      f"config.json of '{source.path}' lacks {error}, which {name} needs: is it of another family?"
    ) from error
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    # The fields from which sizes are computed may have any value.
    reason = ' '.join(str(error).split())
    raise UserError(
      f"config.json of '{source.path}' gives invalid sizes of {name} ({reason}): get it again"
    ) from error


def check_equal_sizes(name: str, source: str, actual: Any, expected: Any) -> None:
  """Checks the sizes of weights against those of a config.

  Rotary bases, epsilons and activations change outputs, but no shape of a tensor.

  Args:
    name: a name in FAMILIES.
    source: the weights, for the error.
    actual: sizes of the weights.
    expected: sizes in the config.

  Raises:
    UserError: a field differs on which the network depends.
  """
  actual, expected = flatten(to_dict(actual)), flatten(to_dict(expected))
  free = FREE_SIZES.get(name, ())
  names = sorted(n for n in actual.keys() | expected.keys() if n not in free)
  differing = [
    f'{n} is {actual.get(n)}, not {expected.get(n)}'
    for n in names
    if actual.get(n) != expected.get(n)
  ]
  if differing:
    raise UserError(
      f"'{source}' differs from the {name} of the config: {'; '.join(differing)}: change the "
      'config or name other weights'
    )


def save(name: str, sizes: Any, params: Params, folder: Path, **options: Any) -> list[str]:
  """Exports a network in the first layout of its family; see `convert.export` for `options`."""
  family = get(name)
  return convert.export(
    params,
    family.LAYOUTS[0],
    folder,
    family.config_json(sizes),
    axes=family.axes(sizes),
    stem=family.STEM,
    **options,
  )


@functools.lru_cache(maxsize=16)
def _shapes(family: Family, sizes: Any) -> Params:
  """Shapes of `family.init`, traced once for equal sizes."""
  return jax.eval_shape(lambda key: family.init(sizes, key), jax.random.key(0))


def _abstract(family: Family, name: str, sizes: Any) -> Params:
  """Abstract parameters of a network of these sizes."""
  try:
    return jax.tree.map(lambda leaf: leaf, _shapes(family, sizes))  # a copy of the cached tree
  except UserError:
    raise
  # Inconsistent sizes raise different exceptions, depending on the network.
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f'invalid sizes of {name}: {sizes} ({reason}): get its config again') from error


def _checked(sizes: Any) -> Any:
  """The sizes; their fields were computed from a file, so that each may have any type."""
  try:
    return build_section(type(sizes), to_dict(sizes))
  except UserError as error:
    raise ValueError(str(error)) from error
