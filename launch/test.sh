#!/usr/bin/env bash
# Sets up this clone and checks it: style, all tests but `exhaustive` ones, and on Python 3.12, if it
# is installed, the imports and a short training run. Can be run again: nothing is installed twice.
#
#   bash launch/test.sh [arguments for pytest, such as tests/data or -m "not slow"]
#
# The `test` extra has torch, the reference that parity tests compare with. If pip's index has
# a CUDA build of it (Linux on PyPI), that is a large download; a CPU build is enough:
#   pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

imports='
import importlib, pkgutil, vpe_jax
names = [module.name for module in pkgutil.walk_packages(vpe_jax.__path__, "vpe_jax.")]
for name in names:
  importlib.import_module(name)
print(f"imported {len(names)} modules")
'

short_run() {
  local python=$1 folder
  folder=$(mktemp -d)
  "$python" -c "$imports"
  "$python" -m vpe_jax.main --config=configs/t2i.py:debug --workdir="$folder/run"
  "$python" -m vpe_jax.sample --workdir="$folder/run" --prompt='a red circle' \
    --out="$folder/sample.png"
  rm -r "$folder"
}

# Both environments at once: an installation keeps one core busy.
set_up() {
  install .venv "$python" "test${device:+,$device}" &
  local first=$!
  if [ -n "$newer" ]; then install .venv312 "$newer" "$device"; fi
  wait "$first"
}

python=$(find_python)
newer=$(python_of_minor 12) || newer=
device=$(accelerator)

phase 'set-up' set_up
phase 'style' .venv/bin/python -m ruff check .
phase 'tests' .venv/bin/python -m pytest -q -n 2 --dist loadfile --durations=20 "$@"

if [ -n "$newer" ]; then
  phase 'imports and a short run on Python 3.12' short_run .venv312/bin/python
else
  echo 'no Python 3.12 here: imports and the short run are checked on 3.11 only'
fi
echo "== all passed in $SECONDS s"
