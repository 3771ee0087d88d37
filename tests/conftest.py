"""Eight virtual CPU devices, exact matrix products, and a compilation cache for every test."""

import os
import pathlib
import tempfile

# Before jax is imported: it reads these once. Subprocesses of tests inherit them.
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'.strip()
_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or tempfile.gettempdir())
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'vpe_jax' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

from absl import flags  # noqa: E402

# Grain's worker processes read absl flags, which pytest's own command line never parses.
flags.FLAGS(['pytest'], known_only=True)
