"""How every command starts and ends: flags are read, and a user's mistake is one line, status 2."""

from __future__ import annotations

import dataclasses
import logging as standard_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from vpe_jax import devices, storage
from vpe_jax.config import SampleConfig
from vpe_jax.contracts import UserError


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
    devices.leave_out_absent_tpu()
    main()

  try:
    app.run(quietly, flags_parser=lambda argv: parse(take(argv)))
  except (UserError, OSError) as error:
    if not isinstance(error, UserError) and not storage.is_full(error):
      raise
    said = error if isinstance(error, UserError) else storage.unwritable(error.filename, error)
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
  """What a flag names as a file to be written, looked at before the work starts.

  Raises:
    UserError: see `target` and `check_folder`; or it is a folder, or it exists and `overwrite` is
      off.
  """
  path = target(flag, given)
  place = storage.place(path)
  if path.endswith('/') or storage.reached(place, place.is_dir):
    raise UserError(f'--{flag}={given} is a folder: name a file')
  check_folder(os.path.dirname(path))
  if place.exists() and not overwrite:
    raise UserError(f'{path} exists: name another file, or replace it (--overwrite)')
  return path


def define_settings() -> None:
  """Defines a flag for every setting of the drawing; those not given keep the run's value."""
  flags.DEFINE_float('guidance', None, 'classifier-free scale; 1 is off')
  flags.DEFINE_integer('steps', None, 'steps of the flow')
  flags.DEFINE_float('shift', None, 'time shift of the flow towards noise')
  flags.DEFINE_float('temperature', None, 'of the visual prompt; 0 is greedy')
  flags.DEFINE_integer('top_k', None, 'draw from the k likeliest codes; 0 is off')
  flags.DEFINE_float('top_p', None, 'draw from the likeliest codes up to this total; 1 is off')
  flags.DEFINE_float('min_p', None, 'least share of the likeliest code; 0 is off')
  flags.DEFINE_float('plan_guidance', None, 'of the visual prompt towards the text; 1 is off')
  flags.DEFINE_float('image_guidance', None, 'of an edit towards the picture before; 1 is off')


def settings() -> dict[str, int | float | None]:
  """The values of those flags by name, None where one is not given."""
  return {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(SampleConfig)}


def check_folder(folder: str) -> None:
  """Finds out before the work whether files can be written to a folder; it needn't exist yet.

  Args:
    folder: local (`~` is the home folder) or gs://; nothing stays in it.

  Raises:
    UserError: files can't be written there.
  """
  place = storage.place(folder or '.')
  storage.reached(place, place.exists)
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
  """What a flag names to be written, as it is given; `~` is the home folder.

  Raises:
    UserError: it is empty, or nothing here writes to such a place.
  """
  if not given:
    raise UserError(f'--{flag} is empty: name what is to be written')
  # A path loses the slash that makes it a folder.
  return f'{storage.place(given)}{"/" if given.endswith("/") else ""}'
