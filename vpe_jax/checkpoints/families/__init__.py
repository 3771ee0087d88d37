"""Families of published networks: how each one's config.json, tensors and sizes map to ours.

A family is a module of this package with the attributes of `Family`; checkpoints/tables holds the
key layouts, which are data.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from vpe_jax.checkpoints import convert
from vpe_jax.checkpoints.sources import Source
from vpe_jax.checkpoints.table import Table
from vpe_jax.config import build_section, nearest, to_dict
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


class Family(Protocol):
  """What a module of this package offers.

  Attributes:
    LAYOUTS: the key layouts that it is published in; exports are written in the first.
    STEM: how the names of exported files begin.
    Sizes: the frozen dataclass that holds the sizes of one network of the family.

  A family may have `FREE`, too: fields of its sizes that no published tensor depends on; and, where
  a network is published without a config.json, its sizes as `BARE`.
  """

  LAYOUTS: tuple[Table, ...]
  STEM: str
  Sizes: type

  def sizes(self, published: Mapping[str, Any]) -> Any:
    """Our sizes from config.json.

    Raises:
      KeyError: a field is missing.
      UserError: the network differs from ours in a way that sizes can't express.
    """
    ...

  def published(self, sizes: Any) -> dict[str, Any]:
    """A config.json that the reference library opens."""
    ...

  def init(self, sizes: Any, rng: Array) -> Params:
    """Fresh parameters; only their shapes are used."""
    ...

  def axes(self, sizes: Any) -> dict[str, int]:
    """Sizes of axes that an export can't see in our leaves, such as the side of a patch."""
    ...


@dataclasses.dataclass(frozen=True)
class Imported:
  """A published network in our hands.

  Attributes:
    family: its name.
    sizes: of the network.
    params: its parameters.
    plan: which tensor went where, and what was left out.
  """

  family: str
  sizes: Any
  params: Params
  plan: convert.Plan


def get(name: str) -> Family:
  """The module of a family.

  Raises:
    UserError: there is none of this name.
  """
  if name not in FAMILIES:
    raise UserError(f"unknown family '{name}'{nearest(name, FAMILIES)}")
  return importlib.import_module(f'{__name__}.{name}')


def load(
  name: str,
  source: Source,
  place: Callable[[Params], Params] | None = None,
  sizes: Any = None,
) -> Imported:
  """Reads a published network.

  Args:
    name: of the family.
    source: its weights.
    place: gives the abstract parameters their shardings (None: one device).
    sizes: of the network (None: from the config.json beside the weights, or the family's `BARE`
      where there is none).

  Raises:
    UserError: nothing says the sizes, or the weights don't fit.
  """
  family = get(name)
  if sizes is None:
    sizes = _sizes(family, name, source)
  abstract = _abstract(family, name, sizes)
  if place is not None:
    abstract = place(abstract)
  plan = convert.plan(source.tensors, family.LAYOUTS, abstract)
  return Imported(name, sizes, convert.tree(convert.load(source.tensors, plan, abstract)), plan)


def save(name: str, sizes: Any, params: Params, folder: Path, **options: Any) -> list[str]:
  """Writes a network in the first layout of its family; see `convert.export` for the rest."""
  family = get(name)
  return convert.export(
    params,
    family.LAYOUTS[0],
    folder,
    family.published(sizes),
    axes=family.axes(sizes),
    stem=family.STEM,
    **options,
  )


def _abstract(family: Family, name: str, sizes: Any) -> Params:
  """The parameters of a network of these sizes, in shapes alone."""
  try:
    return jax.eval_shape(lambda key: family.init(sizes, key), jax.random.key(0))
  except UserError:
    raise
  # What sizes that don't fit each other end in depends on the network.
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'no {name} has these sizes: {sizes} ({reason}): get its config again'
    ) from error


def _sizes(family: Family, name: str, source: Source) -> Any:
  if not source.config and hasattr(family, 'BARE'):
    return family.BARE
  if not source.config:
    raise UserError(
      f"'{source.path}' has no config.json beside it, which gives the sizes of {name}"
    )
  try:
    found = family.sizes(source.config)
    return build_section(type(found), to_dict(found))  # Checks every value's type.
  except KeyError as error:
    raise UserError(
      f"config.json of '{source.path}' lacks {error}, which {name} needs: is it of another family?"
    ) from error
  except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
    # Sizes are computed from fields, whose values may be of any kind.
    reason = ' '.join(str(error).split())
    raise UserError(
      f"config.json of '{source.path}' gives {name} sizes that can't be ({reason}): get it again"
    ) from error
