"""Shared by class-to-image configs: images by class, and the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping

from ml_collections import ConfigDict

from vpe_jax.config import did_you_mean

OPENMOJI = 'smileys,people,animals,food,travel,activities,objects,symbols,flags'
CIFAR10 = 'airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck'
IMAGENET = 1_281_167  # images


def embed(config: ConfigDict) -> None:
  """The data of `tiny` and `debug`: 64x64 OpenMoji by group, for the shipped codecs."""
  config.data = {'source': 'openmoji', 'image_size': 64, 'text_length': 1, 'encode': 'cached'}
  config.data.update(prompt_field='group', tokenizer=f'classes:{OPENMOJI}')
  config.model = {'classes': 9}


def imagenet(config: ConfigDict, image_size: int, fit: str) -> None:
  """The data of `paper`: ImageNet, a folder of 1,000 class folders (--config.data.source)."""
  config.data = {'source': 'folder:imagenet/train', 'image_size': image_size, 'text_length': 1}
  config.data.update(encode='cached', prompt_field='group', tokenizer='classes:1000', fit=fit)


def choose(config: ConfigDict, options: Mapping[str, str]) -> None:
  """Replaces OpenMoji by CIFAR-10 if the option `data` is `cifar10`.

  Raises:
    ValueError: the option is neither `openmoji` nor `cifar10`, or the preset is `paper`.
  """
  data, known = options['data'], ('', 'openmoji', 'cifar10')
  if data not in known:
    raise ValueError(f'data={data}{did_you_mean(data, known)}')
  if data and config.preset == 'paper':
    raise ValueError('data= is an option of tiny and debug: paper reads --config.data.source')
  if data == 'cifar10':
    config.data.update(source='folder:prepared/cifar10/train', tokenizer=f'classes:{CIFAR10}')
    config.model.classes = 10
