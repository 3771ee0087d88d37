r"""Imports published weights and exports trained networks.

  python -m vpe_jax.convert --family=qwen2 --source=Qwen/Qwen2.5-0.5B --to=weights/qwen
  python -m vpe_jax.convert --family=showo2 --source=showlab/show-o2-1.5B-HQ --to=weights/showo2
  python -m vpe_jax.convert --family=llamagen --source=FOLDER --codec=vq_ds16_c2i.pt \
      --to=weights/llamagen
  python -m vpe_jax.convert --export --family=siglip --source=assets:siglip --to=siglip_hf

A source is a folder in the format of save_pretrained, a file (.safetensors, .bin, .pth, .ckpt) with
its config.json in the same folder, or an id on the Hugging Face hub. An import is a checkpoint that
`config.model.init_from` reads; an export is safetensors and a config.json for the reference
library. A tensor without a parameter, or a parameter without a tensor, is an error.

The import of a generator (showo2, llamagen) is a run with its image codec and its tokenizer, which
sample, evaluate, main and compile open.
"""

from absl import flags

from vpe_jax import front_door
from vpe_jax.checkpoints import families
from vpe_jax.checkpoints.conversion import Companions, export_weights, import_weights
from vpe_jax.contracts import UserError

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_enum('family', None, families.FAMILIES, 'family of the network')
  flags.DEFINE_string('source', None, 'folder, file or hub id; with --export, an import or a run')
  flags.DEFINE_string('to', None, 'output folder')
  flags.DEFINE_string('codec', '', "weights of a generator's image codec (default: the release's)")
  flags.DEFINE_string('tokenizer', '', "a generator's data.tokenizer (default: the release's)")
  flags.DEFINE_bool('network_only', False, 'import a generator without codec and tokenizer')
  flags.DEFINE_bool('export', False, 'export instead of import')
  flags.DEFINE_bool('check', False, 'compare with the reference library before writing')
  flags.DEFINE_bool('allow_nonfinite', False, 'import NaN and infinity as they are')
  flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'dtype of the written tensors'
  )


def main() -> None:
  """Runs the command."""
  front_door.require_flags('family', 'source', 'to')
  if FLAGS.export and FLAGS.check:
    raise UserError('--check compares an import with its reference: leave it out of an export')
  if FLAGS.export:
    lines = export_weights(FLAGS.family, FLAGS.source, FLAGS.to, FLAGS.dtype)
  else:
    companions = Companions(FLAGS.codec, FLAGS.tokenizer, not FLAGS.network_only)
    options = FLAGS.check, FLAGS.dtype, companions, FLAGS.allow_nonfinite
    lines = import_weights(FLAGS.family, FLAGS.source, FLAGS.to, *options)
  print('\n'.join(lines), flush=True)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
