#!/usr/bin/env bash
# Sets up this clone, trains the default config on its embedded data and samples images from it.
# Can be run again: finished installation and training steps are skipped.
#
#   bash launch/quickstart.sh [flags for vpe_jax.main, such as --config.seed=1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

run=runs/quickstart
prompt='three red circles'
python=$(find_python)

phase 'set-up' install .venv "$python" "$(accelerator)"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

train() {
  # `tee -i` ignores an interrupt, so the last lines of the interrupted training are still written.
  .venv/bin/python -m vpe_jax.main --config=configs/t2i.py --workdir="$run" "$@" | tee -i "$log" ||
    status=$?
}

status=0
phase 'training' train "$@"
if grep -q '^preempted:' "$log"; then
  echo 'stopped before the end: run this command again to continue'
fi
if [ "$status" != 0 ]; then exit "$status"; fi
phase 'sampling' .venv/bin/python -m vpe_jax.sample --workdir="$run" --prompt="$prompt" --n=4 \
  --out="$run/sample.png" --overwrite

cat <<END

Done in $SECONDS s. Look at:
  $run/samples/      images sampled during training beside the ground truth, newest last
  $run/sample.png    four images of "$prompt"
  $run/curves.png    the losses
  $run/metrics.jsonl every number of every step
Sample your own: .venv/bin/python -m vpe_jax.sample --workdir=$run --prompt="a blue star" --out=star.png
END
