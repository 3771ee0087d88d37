"""Eight virtual CPU devices, exact matrix products, and a compilation cache for every test."""

import os
import pathlib
import tempfile

# Before jax is imported: it reads these once. Subprocesses of tests inherit them. Tests compile
# much and run little, so the compiler optimises less: a third of the time for the same numbers.
_FLAGS = {
  '--xla_force_host_platform_device_count': '8',
  '--xla_backend_optimization_level': '0',
  '--xla_llvm_disable_expensive_passes': 'true',
}
_given = os.environ.get('XLA_FLAGS', '')
_missing = (f'{name}={value}' for name, value in _FLAGS.items() if name not in _given)
os.environ['XLA_FLAGS'] = ' '.join([_given, *_missing]).strip()
_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or tempfile.gettempdir())
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'vpe_jax' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')

from absl import flags  # noqa: E402

# Grain's worker processes read absl flags, which pytest's own command line never parses.
flags.FLAGS(['pytest'], known_only=True)
