r"""Packs any number of images into a few ArrayRecord files that training reads.

  python -m vpe_jax.prepare --source=folder:PATH --to=DIR
  python -m vpe_jax.prepare --source='webdataset:blip3o/*.tar' --to=DIR --workers=64
  python -m vpe_jax.prepare --source=parquet:text_atlas --caption=COLUMN --to=DIR
  python -m vpe_jax.prepare --source=folder:edits --reference=reference --to=DIR
  python -m vpe_jax.prepare --source=tfds:cifar10/train --nocaptions --root=DATA_DIR --to=DIR
  python -m vpe_jax.prepare --verify --to=DIR

Then train with --config.data.source=folder:DIR, or with folders:a*3,b on several. A source is a
folder with captions.jsonl or a .txt file for each image; WebDataset tars, as a pattern or folder;
parquet (pip install -e .[prepare]); or a TensorFlow Datasets data set in ArrayRecord. After an
interruption, the same command continues. Unusable images are listed in DIR/skipped.jsonl.
"""

import os

from absl import flags

from vpe_jax import front_door
from vpe_jax.config import TFDS
from vpe_jax.contracts import UserError
from vpe_jax.data.formats.array_record import verify
from vpe_jax.data.preparing import SHARD_RECORDS, SKIPPED, Settings, is_complete, prepare

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string(
    'source', None, 'folder:, webdataset:, parquet: or tfds:, followed by a path or name'
  )
  flags.DEFINE_string('to', None, 'output folder')
  flags.DEFINE_string('split', '', 'split of a tfds: source, as in tfds:NAME/SPLIT')
  flags.DEFINE_string('root', 'data', 'the data_dir of a tfds: source')
  flags.DEFINE_string('image', '', 'field, column or file ending of images (default: usual names)')
  flags.DEFINE_string('caption', '', 'as --image, for the caption')
  flags.DEFINE_string('reference', '', 'as --image, for source images of edits (default: none)')
  flags.DEFINE_bool(
    'captions', True, 'each image needs a caption; --nocaptions for class names only'
  )
  flags.DEFINE_string('language', '', 'language of the records, such as en; as data.language')
  flags.DEFINE_integer('least_text_height', 0, 'in pixels, as data.least_text_height', 0)
  flags.DEFINE_integer('image_size', 64, 'data.image_size, for --least_text_height', 1)
  flags.DEFINE_string('fit', 'pad', 'data.fit, for --least_text_height')
  flags.DEFINE_integer(
    'count', 0, 'number of images to use, the first ones, before filters; 0: all', 0
  )
  flags.DEFINE_integer('shard_records', SHARD_RECORDS, 'source images per output file', 1)
  flags.DEFINE_integer('workers', os.cpu_count(), 'processes; 0: this one only', 0)
  flags.DEFINE_integer('most_pixels', Settings.most_pixels, 'pixels of the largest image', 1)
  flags.DEFINE_integer('most_bytes', Settings.most_bytes, 'bytes of the largest image file', 1)
  flags.DEFINE_float('most_skipped', 0.01, 'maximum share of unusable images', 0, 1)
  flags.DEFINE_bool('verify', False, 'only verify the checksums of all files in --to')


def main() -> None:
  """Runs the command."""
  front_door.require_flags(*(('to',) if FLAGS.verify else ('source', 'to')))
  if FLAGS.verify:
    shards = list(verify(FLAGS.to))
    records = sum(shard.records for shard in shards)
    print(f'{FLAGS.to}: {len(shards)} files with {records:,} records are intact')
    return
  names = ('root', 'captions', 'image', 'caption', 'reference', 'language', 'least_text_height')
  names += ('image_size', 'fit', 'count', 'shard_records', 'most_pixels', 'most_bytes')
  source = FLAGS.source
  if FLAGS.split:
    if not source.startswith(TFDS):
      raise UserError(f'--split={FLAGS.split} is for a {TFDS} source only: omit it')
    source = f'{source}/{FLAGS.split}'
  settings = Settings(source, **{name: FLAGS[name].value for name in names})
  complete = is_complete(FLAGS.to)
  manifest = prepare(settings, FLAGS.to, FLAGS.workers, FLAGS.most_skipped)
  size = sum(shard.bytes for shard in manifest.shards) / 1e6
  print(f'{FLAGS.to}: {manifest.count:,} images in {len(manifest.shards)} files, {size:,.1f} MB')
  if complete:
    print('It was already complete, so the source was not read; use another --to if it changed')
  if manifest.left_out:
    print(f'{manifest.left_out:,} excluded by --language and --least_text_height')
  if manifest.skipped:
    print(f'{manifest.skipped:,} unusable: see {os.path.join(FLAGS.to, SKIPPED)}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
