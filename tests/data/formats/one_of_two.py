"""One process of checks_test: opens a folder, and prints its checked files and the result."""

import json
import sys

from vpe_jax import sharding
from vpe_jax.contracts import UserError
from vpe_jax.data.formats import checks
from vpe_jax.data.formats.folder import ReadOptions, open_folder

if __name__ == '__main__':
  path, most_skipped = sys.argv[1:]
  sharding.initialize_distributed()
  checked, check = [], checks._check

  def record(file, *rest):
    checked.append(file.name)
    return check(file, *rest)

  checks._check = record
  try:
    folder = open_folder(path, ReadOptions(most_skipped=float(most_skipped)))
    result = [[names[0] for names in folder.entries], folder.digests()]
  except UserError as error:
    result = str(error)
  print(json.dumps([sorted(checked), result]), flush=True)
