r"""Pictures of any number into a few files that training reads: ArrayRecord.

  python -m vpe_jax.prepare --source=folder:PATH --to=DIR
  python -m vpe_jax.prepare --source='webdataset:blip3o/*.tar' --to=DIR --workers=64
  python -m vpe_jax.prepare --source=parquet:text_atlas --caption=COLUMN --to=DIR
  python -m vpe_jax.prepare --source=folder:edits --reference=reference --to=DIR
  python -m vpe_jax.prepare --source=tfds:cifar10/train --nocaptions --root=DATA_DIR --to=DIR
  python -m vpe_jax.prepare --verify --to=DIR

Then --config.data.source=folder:DIR trains on them, or folders:a*3,b on several. A source is a
folder with captions.jsonl, or a .txt beside each picture; WebDataset's tars, by a pattern or as a
folder; parquet (pip install -e .[prepare]); a data set of TensorFlow Datasets in ArrayRecord. A
call that was stopped goes on where it was. Pictures that can't be used are in DIR/skipped.jsonl.
"""

import os

from absl import flags

from vpe_jax import front_door
from vpe_jax.config import FITS
from vpe_jax.contracts import UserError
from vpe_jax.data.formats.array_record import MANIFEST, verify
from vpe_jax.data.preparing import SHARD_RECORDS, SKIPPED, Settings, prepare
from vpe_jax.storage import local

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_string('source', None, 'folder:, webdataset:, parquet: or tfds:, and where it is')
  flags.DEFINE_string('to', None, 'folder to make')
  flags.DEFINE_string('split', '', 'of a tfds: source, as in tfds:NAME/SPLIT')
  flags.DEFINE_string('root', 'data', 'the data_dir of a tfds: source')
  flags.DEFINE_string('image', '', 'field, column or ending of the picture, if not a usual one')
  flags.DEFINE_string('caption', '', 'of the caption')
  flags.DEFINE_string('reference', '', 'of the picture before an edit; without it there is none')
  flags.DEFINE_bool('captions', True, 'each picture needs one; not where classes are all')
  flags.DEFINE_string('language', '', 'keeps records in it, such as en; as data.language')
  flags.DEFINE_integer('least_text_height', 0, 'in pixels, as data.least_text_height', 0)
  flags.DEFINE_integer('image_size', 64, 'data.image_size, for --least_text_height', 1)
  flags.DEFINE_enum('fit', 'pad', FITS, 'data.fit, for --least_text_height')
  flags.DEFINE_integer('count', 0, 'takes the first pictures of the source, before filters', 0)
  flags.DEFINE_integer('shard_records', SHARD_RECORDS, 'pictures of the source in a file', 1)
  flags.DEFINE_integer('workers', os.cpu_count(), 'processes; 0: this one alone', 0)
  flags.DEFINE_float('max_skipped', 0.01, 'share of pictures that may be unusable', 0, 1)
  flags.DEFINE_bool('verify', False, 'reads all files of --to and compares their checksums')


def main() -> None:
  """Runs the command."""
  for name in ('to',) if FLAGS.verify else ('source', 'to'):
    if not FLAGS[name].value:
      raise UserError(f'--{name} is missing (--help shows examples)')
  if FLAGS.verify:
    good = list(verify(local(FLAGS.to)))
    print(f'{FLAGS.to}: {len(good)} files with {sum(s.records for s in good):,} records are good')
    return
  names = ('root', 'captions', 'image', 'caption', 'reference', 'language', 'least_text_height')
  names += ('image_size', 'fit', 'count', 'shard_records')
  source = f'{FLAGS.source}/{FLAGS.split}' if FLAGS.split else FLAGS.source
  settings = Settings(source, **{name: FLAGS[name].value for name in names})
  there = (local(FLAGS.to) / MANIFEST).exists()
  found = prepare(settings, FLAGS.to, FLAGS.workers, FLAGS.max_skipped)
  size = sum(shard.bytes for shard in found.shards) / 1e6
  print(f'{FLAGS.to}: {found.count:,} pictures in {len(found.shards)} files, {size:,.1f} MB')
  if there:
    print('It was whole already, and its source was not read: another --to prepares what changed')
  if found.left_out:
    print(f'{found.left_out:,} were left out by --language and --least_text_height')
  if found.skipped:
    print(f'{found.skipped:,} could not be used: see {os.path.join(FLAGS.to, SKIPPED)}')


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
