#!/usr/bin/env bash
# Checks this library on a TPU or an NVIDIA GPU, for whoever owns one, and writes a report to paste.
#
#   bash launch/verify_device.sh [--out=FILE]
#
# Sets up the clone for the device that it finds, then: the attention kernels against their
# definition, a short training run with drawing in float32 and in bfloat16, and the attention
# benchmark. The report (default: device_report.json) has the device, versions, what passed, how
# long it took, and the figures. Nothing stops at a failure: the report says what failed.
#
#   --out=FILE   where the report goes
#   --cpu        go through the same phases on the CPU: for trying the script
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

out=device_report.json cpu=''
for word in "$@"; do
  case $word in
    --out=*) out=${word#*=} ;;
    --cpu) cpu=yes ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown option '$word'; see --help" ;;
  esac
done
[ ! -e "$out" ] || fail "$out exists: name another file with --out=FILE"
device=$(accelerator)
if [ -z "$device$cpu" ]; then
  fail 'no TPU and no NVIDIA GPU found here; --cpu goes through the phases without one'
fi

phase 'set-up' install .venv "$(find_python)" "test${device:+,$device}"
python=.venv/bin/python
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
if [ -n "$cpu" ]; then export JAX_PLATFORMS=cpu; fi

# check NAME COMMAND: runs it, and notes its status and seconds for the report.
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
  tpu) marked=tpu lengths=1024,2048,4096,8192 ;;
  cuda) marked=gpu lengths=1024,2048,4096,8192 ;;
  *) marked='not slow' lengths=512 ;;
esac
check kernels "$python" -m pytest -q tests/ops/attention -m "$marked"
check float32 train float32
check bfloat16 train bfloat16
check benchmark "$python" -m tests.benchmarks.attention --force --rounds=3 --lengths="$lengths" \
  --json="$folder/benchmark.json"
"$python" -m tests.benchmarks.device_report "$folder" "$out"
