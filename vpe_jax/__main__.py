"""The console command: `vpe_jax NAME --flag=value` is `python -m vpe_jax.NAME --flag=value`."""

import difflib
import runpy
import sys

from vpe_jax import interrupts

COMMANDS = {
  'main': 'trains, or continues an interrupted run',
  'sample': 'generates images',
  'evaluate': 'evaluates runs',
  'prepare': 'packs a data set into a few large files',
  'convert': 'imports and exports published weights',
  'compile': 'compiles for TPUs that you need not have',
  'export': 'writes a generator to a folder, or weights to one file',
  'cache': 'lists and cleans the cache of encoded images',
}


def main() -> None:
  """Runs the command that the first argument names."""
  interrupts.exit_at_once()  # Imports take seconds.
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in COMMANDS:
    del sys.argv[1]
    runpy.run_module(f'vpe_jax.{name}', run_name='__main__', alter_sys=True)
  elif name in ('--help', '-h', 'help'):
    lines = [f'  vpe_jax {command:<10}{does}' for command, does in COMMANDS.items()]
    print('\n'.join(['Commands; each has --help:', *lines]))
  else:
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f'known: {", ".join(COMMANDS)}'
    print(f"error: there is no command '{name}'; {hint}", file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  main()
