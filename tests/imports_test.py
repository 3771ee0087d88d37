"""The house rules that a machine can check: imports, their order, sizes and names."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
  'interrupts contracts config rng storage devices sharding data ops sequence models codecs'
  ' objectives sampling systems checkpoints generator evaluation training compilation assets'
).split()
SOURCES = sorted(
  path
  for folder in ('vpe_jax', 'configs', 'tests')
  for path in (ROOT / folder).rglob('*.py')
  if '__pycache__' not in path.parts
)
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / 'vpe_jax')]
NETWORK = {'aiohttp', 'fsspec', 'gcsfs', 'http', 'httpx', 'huggingface_hub', 'requests', 'socket'}


def _module(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def _name(path: Path) -> str:
  return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
  return ast.parse(path.read_text(encoding='utf-8'), _name(path))


def _imports(path: Path) -> Iterator[str]:
  """Full names of everything that a file imports, at any level."""
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{_name(path)}:{node.lineno}: a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


# Optional features of a system, which extend front doors and rank with them.
FEATURES = ('vpe_jax.systems.vpe.visual_prompts',)


def _rank(module: str) -> int:
  """Place of a module's room in the order; front doors and features come last."""
  if module.startswith(FEATURES):
    return len(ROOMS)
  room = module.split('.')[1] if '.' in module else ''
  return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def order_violations(path: Path) -> list[str]:
  """Imports of a file from rooms below its own."""
  own = _rank(_module(path))
  ours = [name for name in _imports(path) if name.split('.')[0] == 'vpe_jax']
  return [n for n in ours if n != 'vpe_jax.__version__' and _rank(n) > own]


def test_files_parse_and_have_docstrings_that_say_the_noun() -> None:
  for path in SOURCES:
    for node in ast.walk(_tree(path)):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
        text = ast.get_docstring(node) or ''
        where = f'{_name(path)}: {getattr(node, "name", "module")}'
        assert text or not isinstance(node, ast.Module), f'{where} has no docstring'
        assert not re.match(r'(What|Whether what)\b', text), f'{where}: {text[:60]}'


def test_modules_import() -> None:
  for path in LIBRARY:
    importlib.import_module(_module(path))


def test_rooms_import_only_from_above() -> None:
  violations = {_name(path): order_violations(path) for path in LIBRARY}
  assert {name: imports for name, imports in violations.items() if imports} == {}


def test_the_order_check_detects_a_violation(tmp_path: Path, monkeypatch) -> None:
  monkeypatch.setitem(globals(), 'ROOT', tmp_path)
  file = tmp_path / 'vpe_jax' / 'ops' / 'norms.py'
  file.parent.mkdir(parents=True)
  file.write_text('def f():\n  from vpe_jax import models, rng\n  import vpe_jax.main\n')
  assert order_violations(file) == ['vpe_jax.models', 'vpe_jax.main']


def test_libraries_stay_in_their_rooms() -> None:
  for path in LIBRARY:
    _check_libraries(path)


def _check_libraries(path: Path) -> None:
  room, packages = path.relative_to(ROOT / 'vpe_jax').parts[0], set()
  for name in _imports(path):
    packages.add(name.split('.')[0])
    assert not name.startswith('urllib.request'), f'{_name(path)} reads the network'
  if room not in ('models', 'codecs'):
    assert 'flax' not in packages
  if room == 'data':
    assert not packages & NETWORK
    assert 'jax' not in packages
  assert not packages & {'torch', 'tensorflow'}


def _requirements(section: configparser.SectionProxy, key: str) -> set[str]:
  lines = [line for line in section[key].splitlines() if line.strip()]
  return {re.split(r'[\[<>=~! ;]', line)[0].lower().replace('_', '-') for line in lines}


def test_every_imported_package_is_declared() -> None:
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  declared = _requirements(setup['options'], 'install_requires')
  for extra in ('tensorboard', 'eval', 'prepare'):
    declared |= _requirements(setup['options.extras_require'], extra)
  distributions = importlib.metadata.packages_distributions()
  missing = []
  for path in SOURCES:
    for package in {name.split('.')[0] for name in _imports(path)} - sys.stdlib_module_names:
      names = {d.lower().replace('_', '-') for d in distributions.get(package, [package])}
      allowed = declared | {'vpe-jax', 'configs', 'jaxlib'}
      if _module(path).startswith('tests'):
        allowed |= _requirements(setup['options.extras_require'], 'test') | {'conftest', 'tests'}
      if package != '__future__' and not names & allowed:
        missing.append(f'{_name(path)}: {package}')
  assert missing == []


def test_packages_have_init_files_and_test_folders_mirror_them() -> None:
  for path in LIBRARY:
    assert (path.parent / '__init__.py').exists(), f'{path.parent} is no package'
  assert not list((ROOT / 'tests').rglob('__init__.py'))
  for folder in {path.parent for path in SOURCES if path.name.endswith('_test.py')}:
    room = folder.relative_to(ROOT / 'tests')
    assert (ROOT / 'vpe_jax' / room).is_dir() or room.name == 'configs', (
      f'tests/{room} has no counterpart in vpe_jax'
    )


def test_sizes_and_names() -> None:
  for path in SOURCES:
    _check_sizes(path)


def _check_sizes(path: Path) -> None:
  assert len(path.read_text(encoding='utf-8').splitlines()) <= 600, _name(path)
  assert path.stem not in ('util', 'utils', 'common', 'misc', 'helper', 'helpers') or (
    _name(path) == 'configs/common.py'
  )
  for node in ast.walk(_tree(path)):
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      continue
    where = f'{_name(path)}:{node.lineno} {node.name}'
    assert (node.end_lineno or 0) - node.lineno + 1 <= 80, f'{where} is too long'
    parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    assert len([a for a in parameters if a.arg not in ('self', 'cls')]) <= 8, f'{where}: parameters'


UNFINISHED = re.compile(r'\b(TODO|FIXME|XXX|HACK|place' + r'holder|for ' + r'now)\b', re.IGNORECASE)


def test_nothing_is_left_unfinished() -> None:
  for path in SOURCES:
    _check_finished(path)


def _check_finished(path: Path) -> None:
  if path != Path(__file__).resolve():
    assert not UNFINISHED.findall(path.read_text(encoding='utf-8'))
  for node in ast.walk(_tree(path)):
    where = f'{_name(path)}:{getattr(node, "lineno", 0)}'
    if isinstance(node, ast.ExceptHandler):
      assert not all(isinstance(line, ast.Pass) for line in node.body), f'{where} swallows an error'
    if isinstance(node, ast.Raise) and node.exc is not None:
      assert 'NotImplementedError' not in ast.unparse(node.exc), where
    if isinstance(node, ast.Call) and path.is_relative_to(ROOT / 'tests'):
      call = ast.unparse(node.func)
      assert call.split('.')[-1] not in ('skip', 'skipif', 'xfail', 'importorskip'), where
