#!/usr/bin/env bash
# Sets up this clone, trains the default config on its embedded data and draws a picture with it.
# Can be run again: what is installed or trained already is not done twice.
#
#   bash launch/quickstart.sh [flags for vpe_jax.main, such as --config.seed=1]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

run=runs/quickstart
prompt='three red circles'
python=$(find_python)

phase 'set-up' install .venv "$python" "$(accelerator)"
said=$(mktemp)
trap 'rm -f "$said"' EXIT

train() {
  # An interrupt is for the training, which saves and says so; what it says is still to be written.
  .venv/bin/python -m vpe_jax.main --config=configs/t2i.py --workdir="$run" "$@" | tee -i "$said"
}

phase 'training' train "$@"
if grep -q '^preempted:' "$said"; then
  echo 'stopped before the end: run this command again to go on from there'
  exit 1
fi
phase 'sampling' .venv/bin/python -m vpe_jax.sample --workdir="$run" --prompt="$prompt" --n=4 \
  --out="$run/sample.png" --overwrite

cat <<END

Done in $SECONDS s. Look at:
  $run/samples/      pictures drawn while training, beside the truth, newest last
  $run/sample.png    four pictures of "$prompt"
  $run/curves.png    the losses
  $run/metrics.jsonl every number of every step
Draw your own: .venv/bin/python -m vpe_jax.sample --workdir=$run --prompt="a blue star" --out=star.png
END
