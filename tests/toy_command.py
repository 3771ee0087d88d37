"""A command that prints its flag, or fails in the way that the flag selects."""

import hashlib

import jax
import jax.numpy as jnp
from absl import flags, logging

from vpe_jax import front_door
from vpe_jax.contracts import UserError

extra: list[str] = []


def main() -> None:
  """Runs the command."""
  if flags.FLAGS.n == 13:
    raise UserError('n is 13: choose another')
  if flags.FLAGS.n == 60:  # seconds in compiled code, which runs no signal handlers
    print('busy', flush=True)
    hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)
  if flags.FLAGS.n == 28:
    with open('/dev/full', 'w') as file:
      file.write('x' * 10**6)
  if flags.FLAGS.n == 36:
    open('n' * 300).close()
  if flags.FLAGS.n == 43:  # tebibytes
    jax.block_until_ready(jnp.zeros(2**43))
  logging.info('chatter')
  print(flags.FLAGS.n, extra)


def parse_first(argv: list[str]) -> list[str]:
  """Removes the arguments that begin with a plus sign."""
  extra.extend(argument for argument in argv if argument.startswith('+'))
  return [argument for argument in argv if not argument.startswith('+')]


if __name__ == '__main__':
  flags.DEFINE_integer('n', 1, 'a number')
  front_door.run(main, parse_first)
