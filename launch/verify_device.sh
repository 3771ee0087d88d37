#!/usr/bin/env bash
# Checks this library on a TPU or an NVIDIA GPU, and writes a report to share.
#
#   bash launch/verify_device.sh [--out=FILE]
#
# Sets up the clone for the device of this machine, then runs: the attention kernels against their
# definition, a short training run with sampling in float32 and in bfloat16, and the attention
# benchmark. The report (default: device_report.json) has the device, versions, result and duration
# of each phase, and the measurements. All phases run even if one fails; the report names failures.
#
#   --out=FILE   file for the report
#   --cpu        run the same phases on the CPU, to try the script
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

out=device_report.json cpu=''
for option in "$@"; do
  case $option in
    --out=*) out=${option#*=} ;;
    --cpu) cpu=yes ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown option '$option'; see --help" ;;
  esac
done
[ ! -e "$out" ] || fail "$out exists: name another file with --out=FILE"
device=$(accelerator)
if [ -z "$device$cpu" ]; then
  fail 'no TPU and no NVIDIA GPU found here; --cpu runs the phases without one'
fi

phase 'set-up' install .venv "$(find_python)" "test${device:+,$device}"
python=.venv/bin/python
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
if [ -n "$cpu" ]; then export JAX_PLATFORMS=cpu; fi

# check NAME COMMAND: runs the command, and saves its status and seconds for the report.
check() {
  local name=$1 start=$SECONDS status=0
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$folder/$name.log" || status=$?
  echo "$name $status $((SECONDS - start))" >> "$folder/phases"
}

train() {
  "$python" -m vpe_jax.main --config=configs/t2i.py:debug --workdir="$folder/$1" \
    --config.dtype="$1" &&
    "$python" -m vpe_jax.sample --workdir="$folder/$1" --prompt='a red circle' \
      --out="$folder/$1.png"
}

case $device in
  tpu) marker=tpu lengths=1024,2048,4096,8192 ;;
  cuda*) marker=gpu lengths=1024,2048,4096,8192 ;;
  *) marker='not slow' lengths=512 ;;
esac
check kernels "$python" -m pytest -q tests/ops/attention -m "$marker"
check float32 train float32
check bfloat16 train bfloat16
check benchmark "$python" -m tests.benchmarks.attention --force --rounds=3 --lengths="$lengths" \
  --json="$folder/benchmark.json"
"$python" -m tests.benchmarks.device_report "$folder" "$out"
