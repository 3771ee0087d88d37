"""The cache folder on disk: where it is, and how files get into it whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
  """`$VPE_JAX_CACHE`, or `vpe_jax` in the user's cache folder (XDG)."""
  chosen = os.environ.get('VPE_JAX_CACHE')
  if chosen:
    return Path(chosen).expanduser()
  return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'vpe_jax'


def write_atomic(path: Path, content: bytes) -> None:
  """Writes a file so that readers, also in other processes, see all of it or none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix='.part')
  try:
    with os.fdopen(handle, 'wb') as file:
      file.write(content)
    os.chmod(temporary, 0o644)  # temporary files are private
    os.replace(temporary, path)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise


def stable_hash(*parts: object) -> int:
  """A 63-bit number that depends on the parts alone: not on process, platform or version."""
  text = '\x1f'.join(str(part) for part in parts)
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'big') >> 1
