"""How every command starts and ends: flags are read, and a user's mistake is one line, status 2."""

from __future__ import annotations

import dataclasses
import inspect
import logging as standard_logging
import os
import re
import sys
import typing
from collections.abc import Callable

from absl import app, flags, logging

from vpe_jax import devices, storage, systems
from vpe_jax.contracts import UserError

_SAMPLE = 'sample.'  # prefix of the flags of sampling settings


def run(
  main: Callable[[], None], take: Callable[[list[str]], list[str]] = lambda argv: argv
) -> None:
  """Reads the flags and runs a command; a UserError ends it with `error: ...` and status 2.

  So does a disk that is full, wherever it is noticed.

  Args:
    main: the command; it finds its flags in `absl.flags.FLAGS`.
    take: takes out of a command line what absl's flags don't know, and returns the rest.
  """

  def quietly(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it reads or writes.
    plain = standard_logging.Formatter('%(levelname)s: %(message)s')
    logging.get_absl_handler().setFormatter(plain)
    devices.skip_absent_tpu()
    main()

  try:
    app.run(quietly, flags_parser=lambda argv: parse(take(argv)))
  except (UserError, OSError) as error:
    if not isinstance(error, UserError) and not storage.is_disk_full(error):
      raise
    said = error if isinstance(error, UserError) else storage.write_error(error.filename, error)
    print(f'error: {said}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)  # What a shell says of a command that Ctrl-C ended.


def parse(argv: list[str]) -> list[str]:
  """Gives absl's flags the values of a command line (its first word is the program).

  Raises:
    UserError: a flag is unknown or has a bad value, or a word isn't a flag.
  """
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    raise UserError(f'{" ".join(str(error).split())} (--help lists the flags)') from error
  except SystemExit:  # Only --help ends here, and absl takes it for a mistake.
    sys.exit(0)
  if len(rest) > 1:
    raise UserError(f"unexpected argument '{rest[1]}': every option is a --flag=value")
  return rest


def new_file(flag: str, given: str, overwrite: bool) -> str:
  """The output file that a flag names, checked before the work starts.

  Raises:
    UserError: see `target` and `check_folder`; or it is a folder, or it exists and `overwrite` is
      off.
  """
  path = target(flag, given)
  place = storage.resolve(path)
  if path.endswith('/') or storage.probe(place, place.is_dir):
    raise UserError(f'--{flag}={given} is a folder: name a file')
  check_folder(os.path.dirname(path))
  if place.exists() and not overwrite:
    raise UserError(f'{path} exists: name another file, or replace it (--overwrite)')
  return path


def define_settings() -> None:
  """Defines the flags --NAME and --sample.NAME for every sampling setting of any system.

  Settings that are not given keep the run's value. A name that another flag of the command has
  is a setting as --sample.NAME alone.
  """
  define = {int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
  for name, (kind, text) in _all_settings().items():
    for flag, words in ((name, text), (f'{_SAMPLE}{name}', f'as --{name}')):
      if flag not in flags.FLAGS:
        define[kind](flag, None, words)


def settings() -> dict[str, int | float | bool]:
  """The settings that these flags give, by name.

  Raises:
    UserError: one is given twice, with different values.
  """
  given: dict[str, int | float | bool] = {}
  for name in _all_settings():
    ours = [flag for flag in (name, f'{_SAMPLE}{name}') if _is_setting(flag)]
    values = {flag: flags.FLAGS[flag].value for flag in ours if flags.FLAGS[flag].present}
    if len(set(values.values())) > 1:
      listed = ' and '.join(f'--{flag}={value}' for flag, value in values.items())
      raise UserError(f'{listed} are the same setting: give one of them')
    if values:
      given[name] = next(iter(values.values()))
  return given


def _is_setting(flag: str) -> bool:
  """Whether `define_settings` defined a flag."""
  return flag in flags.FLAGS and flags.FLAGS.find_module_defining_flag(flag) == __name__


def _all_settings() -> dict[str, tuple[type, str]]:
  """Type and documentation of every sampling setting of any system, by name."""
  found: dict[str, tuple[type, str]] = {}
  for section in systems.sampling_sections().values():
    hints, docs = typing.get_type_hints(section), _field_docs(section)
    for field in dataclasses.fields(section):
      found.setdefault(field.name, (hints[field.name], docs[field.name]))
  return found


def _field_docs(section: type) -> dict[str, str]:
  """The documentation of a dataclass's fields, from the `Attributes` of it and its bases."""
  docs: dict[str, str] = {}
  for base in reversed(section.__mro__):
    _, _, attributes = inspect.cleandoc(base.__doc__ or '').partition('Attributes:\n')
    for match in re.finditer(r'^  (\w+): (.*(?:\n    .*)*)', attributes, re.MULTILINE):
      docs[match[1]] = ' '.join(match[2].split()).rstrip('.')
  return docs


def check_folder(folder: str) -> None:
  """Finds out before the work whether files can be written to a folder; it needn't exist yet.

  Args:
    folder: local (`~` is the home folder) or gs://; nothing stays in it.

  Raises:
    UserError: files can't be written there.
  """
  place = storage.resolve(folder or '.')
  storage.probe(place, place.exists)
  probe = f'.{os.getpid()}.probe'
  try:
    # A bucket has no folders; elsewhere the nearest one that exists decides.
    while not storage.is_remote(folder) and not place.exists():
      place = place.parent
    (place / probe).write_bytes(b'')
    (place / probe).unlink()
  except OSError as error:
    raise UserError(
      f'cannot write to {folder}: {error.strerror or error}; name another folder'
    ) from error


def target(flag: str, given: str) -> str:
  """The output path that a flag names; `~` is the home folder.

  Raises:
    UserError: it is empty, or nothing here writes to such a place.
  """
  if not given:
    raise UserError(f'--{flag} is empty: name what is to be written')
  # A path loses the slash that makes it a folder.
  return f'{storage.resolve(given)}{"/" if given.endswith("/") else ""}'
