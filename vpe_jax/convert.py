"""Published weights in and out, strict both ways.

  python -m vpe_jax.convert --family=qwen2 --source=Qwen/Qwen2.5-0.5B --to=weights/qwen
  python -m vpe_jax.convert --family=siglip --source=FOLDER_OR_FILE --to=weights/siglip
  python -m vpe_jax.convert --export --family=siglip --source=assets:siglip --to=siglip_hf

A source is a folder as save_pretrained writes it, a file (.safetensors, .bin, .pth, .ckpt) with its
config.json beside it, or an id on the Hugging Face hub. What is written is a checkpoint that every
`init_from` reads, or with --export, safetensors and a config.json for the reference library.
"""

import resource
import time
from pathlib import Path

from absl import flags

from vpe_jax import front_door
from vpe_jax.checkpoints import converted, families, sources
from vpe_jax.contracts import UserError
from vpe_jax.sharding import by_path

FLAGS = flags.FLAGS


def _define_flags() -> None:
  flags.DEFINE_enum('family', None, families.FAMILIES, 'what kind of network it is')
  flags.DEFINE_string('source', None, 'folder, file or hub id; with --export, an import or a run')
  flags.DEFINE_string('to', None, 'folder to make')
  flags.DEFINE_bool('export', False, 'write published tensors from ours')
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'of exported tensors')


def bring_in(family: str, source: str, to: str) -> list[str]:
  """Imports published weights; the command as a call.

  Returns:
    The report, a line each.

  Raises:
    UserError: see `sources.open_source`, `families.load` and `converted.write`.
  """
  converted.check_target(to)
  began = time.monotonic()
  opened = sources.open_source(source)
  imported = families.load(family, opened)
  converted.write(imported, to, source)
  plan = imported.plan
  kinds = sorted({str(opened.tensors[key].dtype) for key in plan.places})
  left = [f'  {key}: not used, {why}' for key, why in sorted(plan.ignored.items())]
  left += [f'  {path}: not in the source, {why}' for path, why in sorted(plan.absent.items())]
  said = f"{family}, layout '{plan.table.name}': {len(plan.places)} tensors ({', '.join(kinds)})"
  return [f'{said}, {_summary(imported.params, began)}', *left, f'wrote {to}']


def send_out(family: str, source: str, to: str, dtype: str = 'float32') -> list[str]:
  """Exports weights for the reference library; the command as a call.

  Returns:
    The report, a line each.

  Raises:
    UserError: see `converted.read` and `convert.export`.
  """
  converted.check_target(to)
  began = time.monotonic()
  sizes, params, _ = converted.read(source, family)
  keys = families.save(family, sizes, params, Path(to).expanduser(), dtype=dtype)
  summary = _summary(params, began)
  return [f'{family}: {len(keys)} tensors ({dtype}), {summary}', f'wrote {to}']


def _summary(params: object, began: float) -> str:
  count = sum(leaf.size for leaf in by_path(params).values())
  # Linux counts kilobytes. Mapped pages of the files are in it, which the system can take back.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = time.monotonic() - began
  return f'{count:,} parameters, {seconds:.1f} s, peak memory {peak:.2f} GB'


def main() -> None:
  """Runs the command."""
  for name in ('family', 'source', 'to'):
    if FLAGS[name].value is None:
      raise UserError(f'--{name} is missing (--help shows examples)')
  if FLAGS.export:
    lines = send_out(FLAGS.family, FLAGS.source, FLAGS.to, FLAGS.dtype)
  else:
    lines = bring_in(FLAGS.family, FLAGS.source, FLAGS.to)
  print('\n'.join(lines), flush=True)


if __name__ == '__main__':
  _define_flags()
  front_door.run(main)
