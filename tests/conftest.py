"""Settings and fixtures of all tests.

Every test has eight virtual CPU devices, exact matrix products and a compilation cache. Tests of
accelerators run only where there is one.
"""

import glob
import importlib.metadata
import os
import pathlib
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_DEVICES = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*')
_HAS_DEVICE = any(map(glob.glob, _DEVICES))
# Before jax is imported: it reads these once. Subprocesses of tests inherit them. Tests compile
# much and run little, so the compiler optimizes less.
_FLAGS = {
  '--xla_force_host_platform_device_count': '8',
  '--xla_backend_optimization_level': '0',
  '--xla_llvm_disable_expensive_passes': 'true',
}
# The older way of emitting loops, which compiles three times as fast. Only jaxlib 0.10 knows this
# flag; libtpu does not, and would end the process.
_OLDER_EMITTERS = '--xla_cpu_use_fusion_emitters=false'
if importlib.metadata.version('jaxlib').startswith('0.10.') and not _HAS_DEVICE:
  _FLAGS |= [_OLDER_EMITTERS.split('=')]
_user_flags = os.environ.get('XLA_FLAGS', '')
_added = (f'{name}={value}' for name, value in _FLAGS.items() if name not in _user_flags)
os.environ['XLA_FLAGS'] = ' '.join([_user_flags, *_added]).strip()
_CACHE = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or tempfile.gettempdir())
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'vpe_jax' / 'xla'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
# TPU's compiler is installed for tests that compile ahead of time. Without a TPU, JAX would try to
# start it as a backend in every process.
if not _HAS_DEVICE:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Grain's worker processes read absl flags, which pytest's own command line never parses.
flags.FLAGS(['pytest'], known_only=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Leaves out tests of absent accelerators, and `exhaustive` ones unless -m names them."""
  left_out = set() if 'exhaustive' in config.option.markexpr else {'exhaustive'}
  marks = {item: {mark.name for mark in item.iter_markers()} for item in items}
  if any(names & {'tpu', 'gpu'} for names in marks.values()):
    import jax

    left_out |= {'tpu', 'gpu'} - {jax.default_backend()}
  config.hook.pytest_deselected(items=[item for item in items if marks[item] & left_out])
  items[:] = [item for item in items if not marks[item] & left_out]


@pytest.fixture(scope='module')
def libtpu() -> Iterator[None]:
  """Removes the flag that libtpu doesn't know, at which it would end the process."""
  import jax

  jax.devices()  # The CPU's compiler has read it.
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'].replace(_OLDER_EMITTERS, ''))
    yield


@pytest.fixture(scope='session')
def show_o2() -> types.SimpleNamespace:
  """The golden Show-o2, imported, with the inputs and outputs of the original.

  Attributes of the result: `folder`, `imported`, `sizes`, `params()` (a new tree at each call),
  `io` (the original's arrays), `regions` (its sequence: the text before the image, and the image),
  `clock`, and `run(params, sizes, clock)`, which returns hidden states of the text and the
  velocity.
  """
  import jax
  import jax.numpy as jnp

  from vpe_jax.checkpoints import families, sources
  from vpe_jax.models.unified import Unified
  from vpe_jax.sequence.builder import build
  from vpe_jax.sequence.spans import Layout, Span

  folder = pathlib.Path(__file__).parent / 'golden' / 'showo2'
  imported = families.load('showo2', sources.open_source(str(folder)))
  io = dict(np.load(folder / 'io.npz'))

  start, length = (int(x) for x in io['span'])
  layout = Layout((Span('text', start, 'ar'), Span('image', length, 'dit', full=True)))
  regions = build(layout, {'text': io['ids'][:, :start]})
  latents, clock = jnp.asarray(io['latents']).transpose(0, 2, 3, 1), jnp.asarray(io['t'])
  runs = {}

  def run(params, sizes=imported.sizes, clock=clock):
    compiled = runs.setdefault(sizes, jax.jit(Unified(sizes)))
    return compiled(params, regions, latents, clock)

  return types.SimpleNamespace(
    folder=folder,
    imported=imported,
    sizes=imported.sizes,
    params=lambda: jax.tree.map(lambda leaf: leaf, imported.params),
    io=io,
    regions=regions,
    clock=clock,
    run=run,
  )


@pytest.fixture
def fake_subject():
  """Builds a subject whose images are `sample(prompts)`; see evaluator.Subject for the rest."""

  from vpe_jax.config import DataConfig
  from vpe_jax.contracts import Samples

  def build(
    sample: Callable[[Sequence[str]], np.ndarray],
    *,
    image_size: int = 16,
    task: str = 'captions',
    data: Any = None,
    from_drafts: Callable | None = None,
    editing: Callable | None = None,
    reconstruct: Callable = lambda images: images,
    capabilities: tuple[type, ...] = (Samples,),
    **description: str,
  ) -> types.SimpleNamespace:
    # The kind of prompts follows from the data, see evaluator.task_of.
    of_task = {'classes': {'tokenizer': 'classes:cat,dog'}, 'words': {'source': 'words'}}
    data = data or DataConfig(**of_task.get(task, {}))
    config = types.SimpleNamespace(system='fake', data=data)
    drafts = ('visual_prompt',) if from_drafts else ()
    system = types.SimpleNamespace(config=config, capabilities=capabilities, drafts=drafts)
    return types.SimpleNamespace(
      system=system,
      generator=types.SimpleNamespace(system=system),
      image_size=image_size,
      task=task,
      notes=(),
      description={'checkpoint': 'abc'} | description,
      sample=sample,
      sample_from_drafts=from_drafts,
      editing=editing,
      reconstruct=reconstruct,
    )

  return build
