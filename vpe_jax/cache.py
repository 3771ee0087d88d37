r"""Lists and cleans the cache of images that `data.encode=cached` encodes before training.

  python -m vpe_jax.cache                       (lists)
  python -m vpe_jax.cache --clean=unfinished    (deletes what interrupted runs left)
  python -m vpe_jax.cache --clean=NAME,NAME
  python -m vpe_jax.cache --clean=all

The cache is in $VPE_JAX_CACHE, or in vpe_jax in the user's cache folder. An unfinished cache
continues when its run is started again; a deleted one is built again.
"""

from absl import flags

from vpe_jax import front_door
from vpe_jax.config import did_you_mean
from vpe_jax.contracts import UserError
from vpe_jax.data import cache
from vpe_jax.storage import cache_dir

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_list('clean', None, 'caches to delete: names as listed, `unfinished`, or `all`')


def _chosen(stored: list[cache.Stored], names: list[str]) -> list[cache.Stored]:
  """The caches that `--clean` names.

  Raises:
    UserError: there is no such cache, or no name.
  """
  if not names:
    raise UserError('--clean is empty: name caches, `unfinished` or `all`')
  groups = {
    'all': stored,
    'unfinished': [one for one in stored if not one.complete],
    **{one.name: [one] for one in stored},
  }
  for name in names:
    if name not in groups:
      raise UserError(f'--clean={name}: there is no such cache{did_you_mean(name, groups)}')
  wanted = {one.name for name in names for one in groups[name]}
  return [one for one in stored if one.name in wanted]


def main() -> None:
  """Runs the command."""
  stored = cache.list_caches()
  if FLAGS.clean is None:
    for one in stored:
      state = '' if one.complete else 'unfinished  '
      print(
        f'{one.name}  {one.changed:%Y-%m-%d %H:%M}  {one.bytes / 1e6:9,.1f} MB  '
        f'{one.records:9,} images  {state}{one.source or "unknown source"}'
      )
    total = sum(one.bytes for one in stored) / 1e6
    print(f'{cache_dir()}: {len(stored)} caches of encoded images, {total:,.1f} MB')
    return
  for one in _chosen(stored, FLAGS.clean):
    if cache.delete_cache(one.name):
      print(f'deleted {one.name}: {one.bytes / 1e6:,.1f} MB')
    else:
      print(f'kept {one.name}: a running process writes it')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
