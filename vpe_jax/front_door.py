"""The entry point of every command: parses flags, and reports user errors as one line, status 2."""

from __future__ import annotations

import dataclasses
import inspect
import logging as standard_logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable

import jax
from absl import app, flags, logging

from vpe_jax import devices, interrupts, storage, systems
from vpe_jax.contracts import UserError
from vpe_jax.training import memory

# Exit status after SIGTERM, as in a shell: 128 and the signal's number.
TERMINATED = 128 + signal.SIGTERM
MAX_IMAGES = 100_000  # that one call may generate: all are in memory until they are saved
_SAMPLE = 'sample.'  # prefix of the flags of sampling settings


def run(
  main: Callable[[], None],
  parse_first: Callable[[list[str]], list[str]] = lambda argv: argv,
  cache_programs: bool = False,
) -> None:
  """Parses the flags and runs a command.

  A UserError, a full disk or a full device ends the command with `error: ...` and status 2; Ctrl-C
  ends it with one line and status 130 within seconds.

  Args:
    main: the command; its flags are in `absl.flags.FLAGS`.
    parse_first: parses arguments that absl doesn't know, and returns the others.
    cache_programs: whether compiled programs are stored for the next call.
  """

  def quietly(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file that it reads or writes.
    plain = standard_logging.Formatter('%(levelname)s: %(message)s')
    logging.get_absl_handler().setFormatter(plain)
    devices.skip_absent_tpu()
    if cache_programs:
      devices.use_compilation_cache()
    main()

  interrupts.watch()
  try:
    app.run(quietly, flags_parser=lambda argv: parse(parse_first(argv)))
  except (UserError, OSError) as error:
    if not isinstance(error, UserError) and not storage.is_disk_full(error):
      if error.errno not in storage.PATH_ERRNOS:
        raise
      error = UserError(f'{str(error.filename):.80}: {error.strerror}; name another path')
    message = error if isinstance(error, UserError) else storage.write_error(error.filename, error)
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
  except jax.errors.JaxRuntimeError as error:
    if not memory.is_exhausted(error):
      raise
    need = memory.amounts(str(error))
    print(f'error: out of device memory: {need}; use a smaller batch', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    interrupts.leave()


def parse(argv: list[str]) -> list[str]:
  """Parses a command line (whose first word is the program) into absl's flags.

  Raises:
    UserError: a flag is unknown or has an invalid value, or an argument is not a flag.
  """
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(f'{" ".join(str(error).split())} (--help lists the flags)') from error
  except SystemExit:  # raised by --help, with absl's status of an error
    sys.exit(0)
  if len(rest) > 1:
    raise UserError(f"unexpected argument '{rest[1]}': every option is a --flag=value")
  return rest


def require_flags(*names: str, cure: str = '--help shows examples') -> None:
  """Checks that flags have values, before the work starts.

  Raises:
    UserError: a flag is missing; `cure` completes the error message.
  """
  for name in names:
    if not flags.FLAGS[name].value:
      raise UserError(f'--{name} is missing: {cure}')


def require_one(*names: str, cure: str) -> str:
  """The name of the only one of these flags that is on the command line.

  Raises:
    UserError: none or several of them are; `cure` is the error message.
  """
  given = [name for name in names if flags.FLAGS[name].value is not None]
  if len(given) != 1:
    raise UserError(cure)
  return given[0]


def new_file(flag: str, value: str, overwrite: bool) -> str:
  """Checks the output file that a flag names before the work starts; returns its path.

  Raises:
    UserError: see `output_path` and `check_folder`; or the path is a folder, or it exists and
      `overwrite` is off.
  """
  path = output_path(flag, value)
  place = storage.resolve(path)
  if path.endswith('/') or storage.probe(place, place.is_dir):
    raise UserError(f'--{flag}={value} is a folder: name a file')
  check_folder(os.path.dirname(path))
  if place.exists() and not overwrite:
    raise UserError(f'{path} exists: name another file, or replace it (--overwrite)')
  return path


def define_settings() -> None:
  """Defines flags --NAME and --sample.NAME for all sampling settings of all systems.

  Settings that the command line omits have the run's value. If the command already has a flag
  --NAME, only --sample.NAME is defined.
  """
  define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
  for name, (kind, text) in _all_settings().items():
    for flag, help_text in ((name, text), (f'{_SAMPLE}{name}', f'as --{name}')):
      if flag not in flags.FLAGS:
        define[kind](flag, None, help_text)


def settings() -> dict[str, int | float | bool]:
  """The sampling settings on the command line, by name.

  Raises:
    UserError: a setting occurs twice with different values.
  """
  overrides: dict[str, int | float | bool] = {}
  for name in _all_settings():
    names = [flag for flag in (name, f'{_SAMPLE}{name}') if _is_setting(flag)]
    values = {flag: flags.FLAGS[flag].value for flag in names if flags.FLAGS[flag].present}
    if len(set(values.values())) > 1:
      listed = ' and '.join(f'--{flag}={value}' for flag, value in values.items())
      raise UserError(f'{listed} are the same setting: give one of them')
    if values:
      overrides[name] = next(iter(values.values()))
  return overrides


def _is_setting(flag: str) -> bool:
  """Whether `define_settings` defined a flag."""
  return flag in flags.FLAGS and flags.FLAGS.find_module_defining_flag(flag) == __name__


def _all_settings() -> dict[str, tuple[type, str]]:
  """Type and documentation of every sampling setting of any system, by name."""
  settings: dict[str, tuple[type, str]] = {}
  for section in systems.sampling_sections().values():
    hints, docs = typing.get_type_hints(section), _field_docs(section)
    for field in dataclasses.fields(section):
      settings.setdefault(field.name, (hints[field.name], docs[field.name]))
  return settings


def _field_docs(section: type) -> dict[str, str]:
  """Documentation of a dataclass's fields, from the docstrings of the class and its bases."""
  docs: dict[str, str] = {}
  for base in reversed(section.__mro__):
    _, _, attributes = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
    for match in re.finditer(r'^  (\w+): (.*(?:\n    .*)*)', attributes, re.MULTILINE):
      docs[match[1]] = ' '.join(match[2].split()).rstrip('.')
  return docs


def check_folder(folder: str) -> None:
  """Checks before the work starts that files can be written to a folder, which may not exist yet.

  Args:
    folder: local (`~` expands to the home folder, '' is the current folder) or gs://; a probe file
      is written and deleted.

  Raises:
    UserError: files can't be written there.
  """
  folder = folder or '.'
  place = storage.resolve(folder)
  storage.probe(place, place.exists)
  probe = f'.{os.getpid()}.probe'
  try:
    # Buckets have no folders; elsewhere, the nearest existing parent folder is probed.
    while not storage.is_remote(folder) and not place.exists():
      place = place.parent
    (place / probe).write_bytes(b'')
    (place / probe).unlink()
  except OSError as error:
    raise UserError(
      f'cannot write to {folder}: {error.strerror or error}; name another folder'
    ) from error


def output_path(flag: str, value: str) -> str:
  """The output path that a flag names; `~` expands to the home folder.

  Raises:
    UserError: the path is empty, or its scheme is not supported.
  """
  return _path(flag, value, 'write')


def input_path(flag: str, value: str) -> str:
  """As `output_path`, for a file to read."""
  return _path(flag, value, 'read')


def _path(flag: str, value: str, purpose: str) -> str:
  if not value:
    raise UserError(f'--{flag} is empty: name a file or folder to {purpose}')
  # A path object loses the trailing slash, which marks a folder.
  return f'{storage.resolve(value)}{"/" if value.endswith("/") else ""}'
