"""Models on the Hugging Face hub: download, and revisions that a run keeps.

The hub's names move: `OWNER/NAME` is the newest revision. A run records the commits that it was
started with in its config, as `OWNER/NAME@COMMIT`. Names without a revision keep that commit when
the run resumes; a branch or tag is looked up again. If a commit is not known yet, process 0
downloads first. The other processes then read its cache, or download if they have another disk.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vpe_jax.checkpoints import sources, weights
from vpe_jax.config import flatten, to_dict
from vpe_jax.contracts import System, UserError
from vpe_jax.data.tokenizers.special_tokens import FAMILIES
from vpe_jax.storage import HubName, hub_name

TOKENIZER = 'data.tokenizer'  # config field whose value is FAMILY:NAME
_TOKENIZER_FILES = ('*.json', '*.txt', '*.model', '*.jinja')
_COMMIT = re.compile(r'[0-9a-f]{40}')


def pin(system: System, workdir: str) -> dict[str, Any]:
  """The config of a run as nested dicts, with a commit in every hub name.

  Names without a revision get the commit in the checkpoint of the run in `workdir` (without a
  checkpoint: in those of its parent runs), else the newest.

  Raises:
    UserError: a model can't be downloaded.
  """
  values = to_dict(system.config)
  named = {field: _name_in(field, text, system) for field, text in flatten(values).items()}
  fields = {field: name for field, name in named.items() if name is not None}
  if not fields:
    return values
  known = [flatten(config) for config in _stored_configs(system, workdir)]
  pinned = {field: _recorded(field, name, known) for field, name in fields.items()}
  missing = {name: field for field, name in fields.items() if pinned[field] is None}
  commits = commits_of({n: functools.partial(_download, field) for n, field in missing.items()})
  for field, name in fields.items():
    commit = pinned[field] or commits[name]
    *sections, key = field.split('.')
    section = values
    for part in sections:
      section = section[part]
    prefix = f'{section[key].partition(":")[0]}:' if field == TOKENIZER else ''
    section[key] = f'{prefix}{dataclasses.replace(name, revision=commit)}'
  return values


def commits_of(downloads: Mapping[HubName, Callable[[HubName], str]]) -> dict[HubName, str]:
  """Downloads models, in process 0 first; returns the commit of each, the same in all processes.

  Args:
    downloads: model -> function that downloads a revision of it and returns the commit. Process 0
      calls it with the model itself, the others with the commit of process 0 as the revision.

  Raises:
    UserError: a download failed, here or in process 0.
  """
  names = list(downloads)
  if jax.process_index() == 0:
    error, commits = None, ['0' * 40] * len(names)
    try:
      commits = [download(name) for name, download in downloads.items()]
    except UserError as failure:
      error = failure
    _broadcast(commits)
    if error is not None:
      raise error
    return dict(zip(names, commits, strict=True))
  commits = _broadcast(['0' * 40] * len(names))
  if '0' * 40 in commits:
    raise UserError('process 0 could not download a model from the hub: see its message')
  for name, commit in zip(names, commits, strict=True):
    downloads[name](dataclasses.replace(name, revision=commit))
  return dict(zip(names, commits, strict=True))


def _download(field: str, name: HubName) -> str:
  """Downloads a tokenizer or weights; returns the commit."""
  if field == TOKENIZER:
    return sources.snapshot(name, _TOKENIZER_FILES, ('*/*',)).name
  return sources.commit_of(name, sources.download(name))


def _name_in(field: str, text: Any, system: System) -> HubName | None:
  """The model on the hub that a config field names; None for other fields and for local paths."""
  if not isinstance(text, str):
    return None
  if field == TOKENIZER:
    family, _, text = text.partition(':')
    return hub_name(text) if family in FAMILIES else None
  init = system.initialization
  origins = {network.source for network in system.frozen.values()}
  origins |= {source.source for source in (*init.pretrained, *init.grown)}
  return hub_name(text) if text in origins else None


def _stored_configs(system: System, workdir: str) -> list[Mapping[str, Any]]:
  """Config of the run itself, if it has a checkpoint, else those of its parent runs."""
  if (own := weights.newest_record(workdir)) is not None:
    return [own['config']]
  records = map(weights.newest_record, system.config.parents.values())
  return [record['config'] for record in records if record is not None]


def _recorded(field: str, name: HubName, known: Sequence[Mapping[str, Any]]) -> str | None:
  """The known commit of a model; None if it must be looked up on the hub.

  Args:
    field: the config field that names the model.
    name: the model. A revision that is a commit is returned; a branch or tag is not known.
    known: stored configs; without a revision, the first one with a commit of the model counts.
  """
  if _COMMIT.fullmatch(name.revision):
    return name.revision
  if name.revision:
    return None
  for config in known:
    text = str(config.get(field, ''))
    stored = hub_name(text.partition(':')[2] if field == TOKENIZER else text)
    same = stored and dataclasses.replace(stored, revision='') == name
    if same and _COMMIT.fullmatch(stored.revision):
      return stored.revision
  return None


def _broadcast(commits: list[str]) -> list[str]:
  """The commits of process 0, in all processes."""
  if jax.process_count() == 1 or not commits:
    return commits
  rows = np.asarray([list(commit.encode()) for commit in commits], np.uint8)
  rows = np.asarray(multihost_utils.broadcast_one_to_all(rows))
  return [bytes(row).decode() for row in rows]
