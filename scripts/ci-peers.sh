#!/usr/bin/env bash
# Lets tools that are not ours open what refit writes. Installs the peers it needs (torch and transformers, within MINUTES), writes a model
# with refit, and checks it with scripts/interop.py.
#   scripts/ci-peers.sh [REFIT_BINARY] [VENV]
# Exit code 0 with a line that says "skipped" where no package registry can be reached; any mismatch is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
refit=${1:-}
if [ -z "$refit" ]; then # the profile that the tests were built with
  cargo build --quiet --locked --bin refit
  refit=${CARGO_TARGET_DIR:-target}/debug/refit
fi
refit=$(realpath "$refit")
venv=${2:-${REFIT_PEERS_VENV:-.venv}}
limit=$((${MINUTES:-5} * 60))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
have() { "$venv/bin/python" -c "import $1" 2>/dev/null; }
wanted() { grep -E "^($1)==" scripts/requirements-peers.txt; }
if ! have safetensors || ! have numpy; then
  timeout 120 "$venv/bin/pip" install --quiet $(wanted 'numpy|safetensors') || { echo "interop: skipped, no package registry"; exit 0; }
fi
if ! have torch || ! have transformers; then
  timeout "$limit" "$venv/bin/pip" install --quiet $(wanted 'torch|transformers|tokenizers') \
    || echo "interop: torch and transformers could not be installed in time; only the files are checked"
fi
tiny=assets/tiny
"$refit" apply model-soups "$tiny" "$tiny" -o "$work/soup"
"$venv/bin/python" scripts/interop.py "$refit" "$work/soup" --same-as "$tiny"
"$refit" apply rtn "$tiny" -o "$work/rtn" --bits 4 --group 64
"$venv/bin/python" scripts/interop.py "$refit" "$work/rtn"
