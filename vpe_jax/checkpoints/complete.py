"""Complete folders: a generator as a run that contains its codecs, tokenizer and model card.

The folder contains every file that sampling reads, and the saved config names each as `$RUN/...`.
So the folder can be moved, copied or published, and is opened like any run.

  checkpoints/    the parameters, with the config
  networks/NAME   a published network, in the format of an import
  networks/NAME.safetensors   a network trained with vpe_jax
  tokenizer/      files of the tokenizer, if it has any
  README.md       the model card: contents, provenance, licence
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpe_jax import __version__, storage, systems
from vpe_jax.checkpoints import imports, weights
from vpe_jax.checkpoints.store import RUN
from vpe_jax.config import flatten, to_dict
from vpe_jax.contracts import FrozenNetwork, Params, Samples, System, UserError, require
from vpe_jax.data.tokenizers.published import copy_tokenizer
from vpe_jax.sharding import leaves_by_path

NETWORKS, TOKENIZER, CARD = 'networks', 'tokenizer', 'README.md'


@dataclasses.dataclass(frozen=True)
class Contents:
  """Parameters of a generator, and their origin.

  Attributes:
    params: parameters of the system.
    config: config of the run as nested dicts; its sources are copied into the folder.
    provenance: rows of the model card, `licence` among them.
    stage: index of the stage in which the parameters were trained.
    step: their step.
  """

  params: Params
  config: Mapping[str, Any]
  provenance: Mapping[str, str]
  stage: int = 0
  step: int = 0


def write(folder: str, contents: Contents) -> list[str]:
  """Writes a complete folder, atomically.

  Args:
    folder: local output folder, which must not exist.
    contents: the generator.

  Returns:
    A line for each network inside, and for the tokenizer.

  Raises:
    UserError: the folder exists, is not local or can't be written; the system does not generate
      images; or a network or the tokenizer is missing or does not fit.
  """
  check_target(folder)
  target = Path(storage.resolve(folder))
  system = systems.build(contents.config)
  require(system, Samples)
  config = to_dict(system.config)  # with the fields that an older config lacks
  origins = {name: network.source for name, network in system.frozen.items()}
  origins[TOKENIZER] = config['data']['tokenizer']
  with storage.writing(folder), storage.new_folder(target) as unfinished:
    sources = _copy_networks(system, unfinished)
    for field, name in _weight_fields(config).items():
      _set(config['model'], field, sources[name])
    place = f'{RUN}/{TOKENIZER}'
    config['data']['tokenizer'] = copy_tokenizer(origins[TOKENIZER], unfinished / TOKENIZER, place)
    state = contents.stage, contents.step
    imports.write_checkpoint(str(unfinished), contents.params, config, *state)
    storage.write_atomic(unfinished / CARD, _card(target.name, contents, origins))
  return [f'  {name}: from {origin}' for name, origin in origins.items()]


def check_target(folder: str, source: str = '') -> None:
  """Checks that `write` can write a folder; callers check it before they load parameters.

  Args:
    folder: output folder.
    source: published weights, which the folder must not be inside of.

  Raises:
    UserError: it is not local, exists, or is inside the source.
  """
  if storage.is_remote(folder):
    raise UserError(
      f'a complete folder is written to a local folder, not to {folder}: write it, then upload it'
    )
  imports.check_target(folder, source)


def _copy_networks(system: System, folder: Path) -> dict[str, str]:
  """Copies the frozen networks of a system; returns their new sources by name."""
  sources = {}
  for name, network in system.frozen.items():
    suffix = weights.ENDING if network.published is None else ''
    path = f'{NETWORKS}/{name}{suffix}'
    _copy_network(network, str(folder / path))
    sources[name] = f'{RUN}/{path}'
  return sources


def _copy_network(network: FrozenNetwork, to: str) -> None:
  """Copies one network: a published one in its dtype when loaded, another in its file's dtype."""
  if network.published is None:
    tree, metadata = weights.load(network.source, network.dtype)
    dtype = metadata.get('dtype', network.dtype)
    weights.save(to, tree, metadata, dtype)
    return
  published = network.published
  tree = imports.network(published, lambda abstract: abstract, network.dtype)
  imports.write(published.family, published.sizes, tree, to, network.source)


def _weight_fields(config: Mapping[str, Any]) -> dict[str, str]:
  """Fields of the section `model` that name the weights of frozen networks -> network name.

  A field may be empty and stand for a default, so each field is changed to see which network's
  source follows it.
  """
  fields = {}
  for field in flatten(config['model']):
    if field.endswith('weights'):
      changed = copy.deepcopy(config)
      _set(changed['model'], field, RUN)
      for name, network in systems.build(changed).frozen.items():
        if network.source == RUN:
          fields[field] = name
  return fields


def _set(values: dict[str, Any], field: str, value: str) -> None:
  *sections, name = field.split('.')
  for section in sections:
    values = values[section]
  values[name] = value


def _card(name: str, contents: Contents, origins: Mapping[str, str]) -> bytes:
  """The model card, in Markdown."""
  config, leaves = contents.config, leaves_by_path(contents.params)
  rows = {
    'parameters': f'{sum(leaf.size for leaf in leaves.values()):,}',
    'run': f'`{config["name"]}:{config["preset"]}`, system `{config["system"]}`',
    **contents.provenance,
    **{name: f'`{origin}`' for name, origin in origins.items()},
    'written by': f'vpe_jax {__version__}',
  }
  table = '\n'.join(f'| {key} | {value} |' for key, value in rows.items())
  return f"""# {name}

A generator of images for vpe_jax, with all that it reads.

```bash
python -m vpe_jax.sample --workdir={name} --prompt=PROMPT --out=image.png
python -m vpe_jax.evaluate --workdir={name}
python -m vpe_jax.main --config={name} --config.start={name} --workdir=runs/tuned
```

| | |
|---|---|
{table}

Networks and tokenizer have the licences of their sources.
""".encode()
