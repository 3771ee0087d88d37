"""Imports published networks, and exports trained networks for the reference libraries."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vpe_jax import storage, systems
from vpe_jax.checkpoints import complete, dtypes, families, imports, parity, sources
from vpe_jax.checkpoints.imports import check_target
from vpe_jax.contracts import UserError
from vpe_jax.data.tokenizers.published import open_tokenizer
from vpe_jax.sharding import leaves_by_path
from vpe_jax.systems.package import Release


@dataclasses.dataclass(frozen=True)
class Companions:
  """The image codec and the tokenizer that are imported with a published generator.

  Attributes:
    codec: source of the codec's weights; empty: the default of the family, see
      systems.package.Release.
    tokenizer: value of `data.tokenizer`; empty: the default of the family.
    wanted: whether to import them. If false, the import is the network alone, which can initialize
      a run (`config.model.init_from`).
  """

  codec: str = ''
  tokenizer: str = ''
  wanted: bool = True


def import_weights(
  family: str,
  source: str,
  to: str,
  check: bool = False,
  dtype: str = 'float32',
  companions: Companions = Companions(),
  allow_nonfinite: bool = False,
) -> list[str]:
  """Imports published weights; the Python API of `vpe_jax.convert`.

  Unless `companions.wanted` is false, the import of a generator (a family in `systems.releases`) is
  a complete folder: a run with its codec and tokenizer.

  Args:
    family: a name in `families.FAMILIES`.
    source: see `sources.open_source`.
    to: output folder.
    check: whether to compare outputs with the reference library before anything is written.
    dtype: dtype of the saved parameters: float32, bfloat16 or float16.
    companions: codec and tokenizer of a generator.
    allow_nonfinite: whether to import NaN and infinity.

  Returns:
    The lines of the report.

  Raises:
    UserError: see `imports.check_target`, `sources.open_source`, `families.load`, `parity.compare`
      and `complete.write`; the dtype is unknown; the comparison fails, or is requested in another
      dtype than float32; the codec or tokenizer of a generator is missing or does not fit; or one
      is named for a network that is imported alone.
  """
  dtypes.parse(dtype)  # an unknown dtype is an error before anything is read
  if check and dtype != 'float32':
    raise UserError(f'--check compares in float32: import with --dtype=float32, not {dtype}')
  release = systems.releases().get(family) if companions.wanted else None
  if release is None:
    check_target(to, source)
  else:
    complete.check_target(to, source)
  if release is None and (companions.codec or companions.tokenizer):
    raise UserError(
      f'an import of {family} alone has no image codec and no tokenizer: leave out --codec and '
      '--tokenizer'
    )
  began = time.monotonic()
  # Everything that may be missing is opened before the network is read, which takes longest.
  opened = sources.open_source(source)
  source = opened.name  # with the commit of a model on the hub
  config = None
  if release is not None:
    config = _config(family, release, families.read_sizes(family, opened), companions)
  imported = families.load(family, opened, dtype=dtype, allow_nonfinite=allow_nonfinite)
  check_lines = _check(imported, opened) if check else []
  if config is None:
    imports.write(family, imported.sizes, imported.params, to, source)
    copied: Sequence[str] = ()
  else:
    provenance = {'source': f'`{source}`, published weights', 'licence': 'that of the source'}
    copied = complete.write(to, complete.Contents(imported.params, config, provenance))
  return [*_report(imported, opened, began), *check_lines, *copied, f'wrote {to}']


def export_weights(family: str, source: str, to: str, dtype: str = 'float32') -> list[str]:
  """Exports weights for the reference library; the Python API of `vpe_jax.convert`.

  Args:
    family: a name in `families.FAMILIES`.
    source: see `imports.read`.
    to: output folder.
    dtype: dtype of the written tensors: float32, bfloat16 or float16.

  Returns:
    The lines of the report.

  Raises:
    UserError: the folder is not local; see also `imports.check_target`, `imports.read` and
      `convert.export`.
  """
  if storage.is_remote(to):
    raise UserError(f'exports are written to a local folder, not to {to}: export, then upload it')
  dtypes.parse(dtype)  # an unknown dtype is an error before anything is read
  check_target(to, source)
  began = time.monotonic()
  sizes, params, _ = imports.read(source, family)
  keys = families.save(family, sizes, params, Path(storage.resolve(to)), dtype=dtype)
  summary = _summary(params, began)
  return [f'{family}: {len(keys)} tensors ({dtype}), {summary}', f'wrote {to}']


def _config(family: str, release: Release, sizes: Any, companions: Companions) -> dict[str, Any]:
  """The config of an imported generator, whose codec and tokenizer are checked."""
  needs = f'{family} decodes images with {release.codec} ({release.codec_files})'
  codec = companions.codec or release.codec_source
  cure = 'name these weights with --codec=FOLDER_OR_FILE, or import the network alone with'
  if not codec:
    raise UserError(f'{needs}: {cure} --network_only')
  try:
    opened = sources.open_source(codec)
    codec_sizes = families.read_sizes(release.codec, opened)
  except UserError as error:
    raise UserError(f'{needs}, but {error}: {cure} --network_only') from error
  codec = opened.name  # with the commit of a model on the hub
  tokenizer = companions.tokenizer or release.tokenizer(sizes)
  try:
    open_tokenizer(tokenizer)
  except UserError as error:
    raise UserError(
      f'{family} reads prompts with data.tokenizer={tokenizer}, but {error}: name a copy with '
      '--tokenizer=FAMILY:FOLDER, or import the network alone with --network_only'
    ) from error
  config = release.config(sizes, codec_sizes, codec, tokenizer)
  try:
    actual = release.sizes(systems.build(config).config)
    families.check_equal_sizes(family, codec, actual, sizes)
  except UserError as error:
    raise UserError(f'{codec} is not the codec of this {family}: {error}') from error
  return config


def _check(imported: families.Imported, opened: sources.Source) -> list[str]:
  """Compares an import with its reference library; the line of the report."""
  folder = opened.path if opened.path.is_dir() else opened.path.parent
  passed, line = parity.verdict(imported.family, parity.compare(imported, folder))
  if not passed:
    raise UserError(line)
  return [line]


def _report(imported: families.Imported, opened: sources.Source, began: float) -> list[str]:
  """The lines of an import: layout, tensors that are not used, absent parameters."""
  tensor_map = imported.tensor_map
  kinds = sorted({str(opened.tensors[key].dtype) for key in tensor_map.destinations})
  ignored, absent = sorted(tensor_map.ignored.items()), sorted(tensor_map.absent.items())
  tensors = f'{len(tensor_map.destinations)} tensors ({", ".join(kinds)})'
  summary = _summary(imported.params, began)
  return [
    f"{imported.family}, layout '{tensor_map.table.name}': {tensors}, {summary}",
    *(f'  {key}: not used, {why}' for key, why in ignored),
    *(f'  {path}: not in the source, {why}' for path, why in absent),
  ]


def _summary(params: object, began: float) -> str:
  count = sum(leaf.size for leaf in leaves_by_path(params).values())
  # ru_maxrss includes memory-mapped pages, which the system can reclaim.
  unit = 1 if sys.platform == 'darwin' else 2**10  # bytes
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
  seconds = time.monotonic() - began
  return f'{count:,} parameters, {seconds:.1f} s, peak memory {peak:.2f} GiB'
