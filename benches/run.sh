#!/usr/bin/env bash
# refit and its peers side by side on this machine; prints the figures, their ratios, and every target with "met" or "not met".
#   benches/run.sh PEER_PYTHON MODELS [BENCH...]     BENCH: open_gguf prefill decode packed embed soup merge data_free pruning quickstart train images lora galore
#   (all by default; train, images and galore need cargo build --release -p refit-train --examples)
# packed needs what benches/requirements.txt lists.
# MODELS is a folder made by benches/setup.sh: smollm2.gguf, smollm2-f32/, minilm/, soup1/ .. soup4/.
# REFIT names the binary (default: target/release/refit). Both sides get THREADS (2) threads and run one after the other, never at once.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 models=$(realpath "$2")
shift 2
refit=${REFIT:-target/release/refit}
export THREADS=${THREADS:-2}
export RAYON_NUM_THREADS=$THREADS OMP_NUM_THREADS=$THREADS TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1 TQDM_DISABLE=1
[ -x "$refit" ] || { echo "no binary at $refit: run 'cargo build --release' first" >&2; exit 1; }
exec "$python" benches/side_by_side.py "$refit" "$python" "$models" "$@"
