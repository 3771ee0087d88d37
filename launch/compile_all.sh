#!/usr/bin/env bash
# Compiles every paper-size config for the pods named below, on this machine, and writes memory and
# bounds on speed into configs/README.md. Each program takes minutes on two CPU cores. Existing
# reports are not computed again, so an interrupted call continues where it stopped.
#
#   bash launch/compile_all.sh [FOLDER for the reports, default runs/compile]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

folder=${1:-runs/compile}
python=$(find_python)
phase 'set-up' install .venv "$python" test

compile() {
  local name=$1 json
  json="$folder/$name.json"
  shift
  if [ -e "$json" ]; then echo "$json exists"; return; fi
  phase "$name" .venv/bin/python -m vpe_jax.compile --json="$json" "$@"
}

mkdir -p "$folder"
for topology in v5e:16x16 v5p:4x4x4 v6e:8x8; do
  for stage in plan joint; do
    compile "paper-$stage-${topology/:/-}" \
      --config=configs/t2i.py:paper --topology="$topology" --stage="$stage"
  done
done
for topology in v5e:8x8 v5p:4x4x4 v6e:8x8; do
  compile "c2i-discrete-${topology/:/-}" \
    --config=configs/c2i_discrete.py:paper --topology="$topology"
done
for topology in v5e:2x4 v5p:2x2x2 v6e:2x4; do
  compile "c2i-continuous-${topology/:/-}" \
    --config=configs/c2i_continuous.py:paper --topology="$topology"
done
for pod in v5e:16x16,256 v5p:4x4x4,64 v6e:16x16,256; do
  topology=${pod%,*}
  compile "pod-joint-${topology/:/-}" \
    --config="configs/t2i.py:pod,chips=${pod#*,}" --topology="$topology" --stage=joint
done
for topology in v5e:16x16 v5p:4x4x4; do
  compile "paper-external-render-${topology/:/-}" \
    --config=configs/t2i.py:paper,arch=external --topology="$topology" --stage=render
done
for pod in v5e:16x16,256 v5p:4x4x4,64 v6e:8x8,64; do
  topology=${pod%,*}
  for vpe in true false; do
    compile "text-rendering-vpe-$vpe-${topology/:/-}" \
      --config="configs/text_rendering.py:paper,vpe=$vpe,chips=${pod#*,}" --topology="$topology"
  done
done
for topology in v5p:4x4x4 v6e:8x8; do
  for arch in internal external; do
    compile "edit-$arch-${topology/:/-}" \
      --config="configs/edit.py:paper,arch=$arch" --topology="$topology"
  done
done
for config in t2i c2i_discrete c2i_continuous text_rendering edit; do
  .venv/bin/python -m vpe_jax.compile --config="configs/$config.py" --write_card="$folder"
done
