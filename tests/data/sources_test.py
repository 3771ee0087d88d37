"""Data sources from configs."""

from __future__ import annotations

import sys
import types

import pytest

from vpe_jax.config import SOURCES, DataConfig
from vpe_jax.contracts import UserError
from vpe_jax.data.embedded.synthetic import Synthetic
from vpe_jax.data.records import DEFAULT_COUNT, SPLITS
from vpe_jax.data.sources import open_source


@pytest.mark.parametrize('split', SPLITS)
@pytest.mark.parametrize('share', [0.0, 0.3, 0.75, 1.0])
def test_mixture_is_evenly_interleaved(split, share):
  source = open_source(DataConfig(scenes_share=share, examples=100), split)
  assert len(source) == 100
  scenes = [source[i].group == 'scene' for i in range(100)]
  assert sum(scenes) == round(100 * share)
  assert abs(sum(scenes[:20]) - 20 * share) <= 1
  assert len({source[i].id for i in range(100)}) == 100


@pytest.mark.parametrize('split', SPLITS)
def test_mixture_has_its_share_of_words(split):
  source = open_source(DataConfig(words_share=0.25, scenes_share=0.6, examples=100), split)
  groups = [source[i].group for i in range(100)]
  assert groups.count('words') == 25 and groups.count('scene') == 45
  assert abs(groups[:20].count('words') - 5) <= 1
  assert len({source[i].id for i in range(100)}) == 100


@pytest.mark.parametrize('split', SPLITS)
def test_edits_mix_scenes_and_emoji(split):
  config = DataConfig(source='edits', scenes_share=0.6, examples=50, source_images=True)
  source = open_source(config, split)
  assert len(source) == 50
  assert sum(source[i].group == 'scene edit' for i in range(50)) == 30
  assert all(source[i].reference is not None and source[i].edit is not None for i in range(50))


def test_lengths():
  assert len(open_source(DataConfig())) == DEFAULT_COUNT
  assert len(open_source(DataConfig(source='scenes', examples=10**7))) == 10**7
  assert len(open_source(DataConfig(source='words'))) == DEFAULT_COUNT
  assert 3000 < len(open_source(DataConfig(source='openmoji'))) < 4500
  assert len(open_source(DataConfig(source='synthetic', examples=5))) == 5


def test_one_line_registers_a_data_set(monkeypatch):
  module = types.ModuleType('pairs_for_this_test')
  # A data set with source images, whose length encodes the arguments.
  module.open_pairs = lambda config, split, seed: Synthetic(
    config.examples + 10 * seed + len(split), references=True
  )
  monkeypatch.setitem(sys.modules, module.__name__, module)
  sources = {**SOURCES, 'pairs': f'{module.__name__}:open_pairs'}
  for module in ('config.data', 'data.sources'):
    monkeypatch.setattr(f'vpe_jax.{module}.SOURCES', sources)
  config = DataConfig(source='pairs', examples=4, source_images=True)
  assert len(open_source(config, 'concept', seed=2)) == 4 + 20 + len('concept')
  with pytest.raises(UserError, match='config.data.source=pairs'):
    open_source(DataConfig(source='pairs', examples=4))


def test_mixture_ends():
  with pytest.raises(IndexError):
    open_source(DataConfig(examples=10))[10]


@pytest.mark.parametrize(
  'config, split, message',
  [
    ({'source': 'scene'}, 'train', "did you mean 'scenes'"),
    ({'source': 'folder:'}, 'train', 'folder:PATH'),
    ({'source': 'tfds:'}, 'train', 'tfds:NAME'),
    ({'source': 'tfds:x'}, 'concept', 'no held-out split'),
    ({'source': 'folder:gs://x'}, 'train', 'gs://x .*gcsfuse'),
    ({'source': 'folders:x', 'root': 'gs://x'}, 'train', 'gs://x.*gcsfuse'),
    ({'source': ''}, 'train', "unknown config.data.source ''"),
    ({'examples': -1}, 'train', 'must be at least 0'),
    ({'scenes_share': 1.5}, 'train', 'between 0 and 1'),
    ({'words_share': -0.1}, 'train', 'words_share.*between 0 and 1'),
    ({'most_words': 4}, 'train', 'most_words.*1, 2 or 3'),
    ({'source': 'synthetic'}, 'concept', 'no held-out split'),
    ({'source': 'edits'}, 'train', 'config.data.source=edits'),
    ({'source_images': True}, 'train', 'config.data.source=mixture has no source images'),
    ({'source': 'folder:/nowhere'}, 'train', 'does not exist'),
    ({'source': 'folder:/nowhere'}, 'concept', 'no held-out split'),
  ],
)
def test_mistakes_are_named(config, split, message):
  with pytest.raises(UserError, match=message):
    open_source(DataConfig(**config), split)
