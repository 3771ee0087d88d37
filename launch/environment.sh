# shellcheck shell=bash
# Functions of the launch scripts; source it from the root of the clone, don't run it.
#
#   find_python           the Python to use: python3.11, else any other from 3.11 to 3.13
#   accelerator           the extra to install: `tpu`, `cuda` or `cuda13` (if the driver supports
#                         CUDA 13); nothing without an accelerator
#   install VENV PYTHON EXTRAS   a virtual environment with this project in it; does nothing if
#                         the same setup.cfg was installed with the same extras before
#   phase NAME COMMAND    runs the command and prints how long it took

fail() {
  echo "error: $*" >&2
  exit 2
}

# Whether COMMAND is a working Python from 3.11 to 3.13.
_supported() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

# The full path of Python 3.MINOR, from the PATH or from pyenv; fails silently if there is none.
python_of_minor() {
  local candidate
  for candidate in "python3.$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$1".*/bin/python3."$1"; do
    if "$candidate" -c '' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

find_python() {
  local minor
  if python_of_minor 11; then return; fi
  if _supported python3; then command -v python3; return; fi
  for minor in 12 13; do
    if python_of_minor "$minor"; then return; fi
  done
  fail "no Python from 3.11 to 3.13 found (python3 is $(python3 --version 2>&1 || true));" \
    "install python3.11 (Debian and Ubuntu: apt install python3.11 python3.11-venv)"
}

# The optional argument is the root of the file system, for tests.
accelerator() {
  local root=${1:-} device
  for device in "$root"/dev/accel[0-9]*; do
    if [ -e "$device" ]; then echo tpu; return; fi
  done
  # Newer TPUs are passed through vfio, as other devices are: look on the PCI bus for a device of
  # Google (0x1ae0) that is not a network card.
  for device in "$root"/dev/vfio/[0-9]*; do
    if [ -e "$device" ] && _google_chip "$root"; then echo tpu; return; fi
  done
  if [ -e "$root/dev/nvidia0" ] || { [ -z "$root" ] && nvidia-smi -L >/dev/null 2>&1; }; then
    if [ -z "$root" ] && nvidia-smi 2>/dev/null | grep 'CUDA Version: 1[3-9]' >/dev/null; then
      echo cuda13
    else
      echo cuda
    fi
  fi
}

_google_chip() {
  local folder
  for folder in "$1"/sys/bus/pci/devices/*; do
    if [ "$(cat "$folder/vendor" 2>/dev/null)" = 0x1ae0 ] &&
      [ "$(cat "$folder/class" 2>/dev/null)" != 0x020000 ]; then
      return 0
    fi
  done
  return 1
}

install() {
  local venv=$1 python=$2 extras=$3 target=. stamp
  stamp="$venv/installed-$(cat setup.cfg pyproject.toml - <<<"$extras" | cksum | cut -d" " -f1)"
  if [ -e "$stamp" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    echo "$venv is up to date"
    return
  fi
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" ||
      fail "'$python -m venv $venv' failed (Debian and Ubuntu: apt install python3-venv)"
  fi
  _supported "$venv/bin/python" ||
    fail "$venv has an unsupported Python; delete it and run this again"
  if [ -n "$extras" ]; then target=".[$extras]"; fi
  echo "installing $target in $venv with $("$venv/bin/python" --version)"
  # Compiling every module of every package takes longer than compiling the few that are imported.
  "$venv/bin/python" -m pip install -qq --no-compile --editable "$target"
  touch "$stamp"
}

phase() {
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "== $name took $((SECONDS - start)) s"
}
