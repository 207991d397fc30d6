#!/usr/bin/env bash
# Uniform soup of model directories with mergekit: seconds and peak memory, as one JSON line.
#   benches/peers/soup_mergekit.sh PYTHON OUT MODEL MODEL...        METHOD=ties BASE=DIR for TIES
set -euo pipefail
python=$1 out=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  echo "merge_method: ${METHOD:-linear}"
  [ -z "${BASE:-}" ] || echo "base_model: $BASE"
  echo "dtype: float32"
  echo "models:"
  for model in "$@"; do
    printf -- '  - model: %s\n    parameters: {weight: 1.0%s}\n' "$model" "${BASE:+, density: 0.5}"
  done
} >"$work/merge.yaml"
rm -rf "$out"
python_dir=$(dirname "$python")
"$python" - "$python_dir/mergekit-yaml" "$work/merge.yaml" "$out" --copy-tokenizer <<'PY'
import json, resource, subprocess, sys, time
from importlib.metadata import version
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({"bench": "soup", "seconds": round(seconds, 2), "peak_rss_mb": round(peak), "peers": {"mergekit": version("mergekit")}}))
PY
