"""The configuration of a run: typed, frozen sections, built from what a config file returns.

`configs/<task>.py` returns nested dicts (an `ml_collections.ConfigDict`); `from_dict` converts them
to the dataclasses of this package. An unknown key is an error that names the nearest known one.
Each system in vpe_jax/systems defines the type of its `model` section.
"""

from vpe_jax.config.data import CLASSES, FITS, FOLDER, FOLDERS, SOURCES, TFDS, DataConfig
from vpe_jax.config.fields import (
  Tagged,
  check,
  check_nonnegative,
  check_positive,
  check_sizes,
  did_you_mean,
)
from vpe_jax.config.nested import base_section, build_section, flatten, to_dict
from vpe_jax.config.optim import OPTIMIZERS, SCHEDULES, OptimConfig
from vpe_jax.config.run import (
  ATTENTIONS,
  REMATS,
  CheckpointConfig,
  Config,
  LogConfig,
  MeshConfig,
  SampleConfig,
  differences,
  from_dict,
)

__all__ = [
  'ATTENTIONS',
  'CLASSES',
  'FITS',
  'FOLDER',
  'FOLDERS',
  'OPTIMIZERS',
  'REMATS',
  'SCHEDULES',
  'SOURCES',
  'TFDS',
  'CheckpointConfig',
  'Config',
  'DataConfig',
  'LogConfig',
  'MeshConfig',
  'OptimConfig',
  'SampleConfig',
  'Tagged',
  'base_section',
  'build_section',
  'check',
  'check_nonnegative',
  'check_positive',
  'check_sizes',
  'differences',
  'flatten',
  'from_dict',
  'did_you_mean',
  'to_dict',
]
