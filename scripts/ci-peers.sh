#!/usr/bin/env bash
# Lets tools that are not ours open what refit writes. Installs the peers it needs (torch and transformers, within MINUTES), writes a model
# with every method, and checks them with scripts/interop.py.
#   scripts/ci-peers.sh [REFIT_BINARY] [VENV]
# Any mismatch is a failure. Peers that cannot be installed are one too where CI is set; elsewhere a line says what was skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
refit=${1:-}
if [ -z "$refit" ]; then # the profile that the tests were built with
  cargo build --quiet --locked --bin refit
  refit=${CARGO_TARGET_DIR:-target}/debug/refit
fi
refit=$(realpath "$refit")
venv=${2:-${REFIT_PEERS_VENV:-.venv}}
limit=$((${MINUTES:-8} * 60))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Says what is missing; returns only outside CI.
missing() {
  echo "interop: $1" >&2
  if [ -n "${CI:-}" ]; then exit 1; fi
}
[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
have() { "$venv/bin/python" -c "import $1" 2>/dev/null; }
wanted() { grep -E "^($1)==" scripts/requirements-peers.txt; }
if ! have safetensors || ! have numpy; then
  # shellcheck disable=SC2046 # one requirement a word
  timeout 120 "$venv/bin/pip" install --quiet $(wanted 'numpy|safetensors') || { missing "skipped, no package registry"; exit 0; }
fi
# PyTorch and what it brings take about this many GiB, unpacked and on the way.
needed=${PEERS_GIB:-9}
room() { df --output=avail -BG "${TMPDIR:-/tmp}" "$PWD" | awk 'NR > 1 && (least == "" || $1 + 0 < least) { least = $1 + 0 } END { print least }'; }
if ! have torch || ! have transformers || ! have peft; then
  if [ "$(room)" -lt "$needed" ]; then
    # A small disk says nothing about refit, so it is no failure: the checks that need no PyTorch go on.
    echo "interop: $(room) GiB are free, torch, transformers and peft need $needed: only the files are checked" >&2
  else
    # shellcheck disable=SC2046
    timeout "$limit" "$venv/bin/pip" install --quiet $(wanted 'torch|transformers|tokenizers|peft|accelerate|pillow') \
      || missing "torch, transformers and peft could not be installed in $limit s; only the files are checked"
  fi
fi
tiny=assets/tiny
"$refit" apply model-soups "$tiny" "$tiny" -o "$work/soup"
"$venv/bin/python" scripts/interop.py "$refit" "$work/soup" --same-as "$tiny"

# Every method that writes a model of the same shapes: what it left behind must mean the same to transformers as to refit.
calibration=(--text builtin:calibration --samples 4 --sequence-length 128)
"$refit" apply rtn "$tiny" -o "$work/rtn" --bits 4 --group 64
"$refit" apply finequant "$tiny" -o "$work/finequant" --bits 3
"$refit" apply magnitude "$tiny" -o "$work/magnitude" --sparsity 0.5
for method in gptq wanda sparsegpt dsnot; do
  "$refit" apply "$method" "$tiny" -o "$work/$method" "${calibration[@]}"
done
"$venv/bin/python" scripts/interop.py "$refit" "$work"/{rtn,finequant,magnitude,gptq,wanda,sparsegpt,dsnot}

# Merges: of one shape by a base and two relatives, of another by a recipe of mergekit that stacks layers.
"$refit" apply rtn "$tiny" -o "$work/rtn3" --bits 3 --group 64
for method in linear karcher multislerp nuslerp; do
  "$refit" apply "$method" "$work/rtn" "$work/rtn3" -o "$work/$method"
done
for method in task-arithmetic ties dare-ties della breadcrumbs model-stock sce; do
  "$refit" apply "$method" "$work/rtn" "$work/rtn3" --base "$tiny" -o "$work/$method"
done
for method in slerp arcee-fusion nearswap; do
  "$refit" apply "$method" "$work/rtn" --base "$tiny" -o "$work/$method"
done
"$refit" run recipes/mergekit-stack.yml -o "$work/stack"
"$venv/bin/python" scripts/interop.py "$refit" "$work"/{linear,karcher,multislerp,nuslerp,task-arithmetic,ties,dare-ties,della,breadcrumbs,model-stock,sce,slerp,arcee-fusion,nearswap,stack}

# The same weights in other formats: GGUF, compressed-tensors and GPTQ decode to what refit reads, and say the same to transformers.
"$refit" apply rtn "$tiny" -o "$work/rtn-asymmetric" --bits 4 --group 32 --asymmetric
"$refit" apply rtn "$tiny" -o "$work/rtn-3" --bits 3 --group 32
"$refit" apply rtn "$tiny" -o "$work/rtn-8" --bits 8
for from in rtn finequant rtn-asymmetric; do
  "$refit" export "$work/$from" --to gguf -o "$work/$from.gguf.d"
  "$refit" export "$work/$from" --to compressed-tensors -o "$work/$from.ct"
  "$refit" export "$work/$from" --to gptq --checkpoint-format gptq_v2 -o "$work/$from.gptq"
done
"$refit" export "$work/rtn-3" --to gptq -o "$work/rtn-3.gptq"
"$refit" export "$work/rtn-8" --to compressed-tensors --activations int8 -o "$work/rtn-8.ct"
for type in Q4_K Q8_0 BF16; do
  "$refit" export "$tiny" --type "$type" -o "$work/$type.gguf.d"
done
formats=gguf
if have torch; then formats='gguf|compressed-tensors'; fi # the latter brings PyTorch along
if ! have gguf || { have torch && ! have compressed_tensors; }; then
  # shellcheck disable=SC2046
  timeout 120 "$venv/bin/pip" install --quiet $(wanted "$formats") || missing "$formats could not be installed"
fi
if have gguf; then
  "$venv/bin/python" scripts/interop_exports.py "$refit" "$work"/*.gguf.d "$work"/*.ct "$work"/*.gptq
fi

# Methods that learn: whole models for transformers, adapters for PEFT, which must give a text the same likelihood as refit.
learn=(--data builtin:kjv-calib --steps 3 --batch 2 --max-length 64 --learning-rate 5e-3)
for method in fine-tune hft galore weight-compander; do
  "$refit" apply "$method" "$tiny" -o "$work/$method" "${learn[@]}"
done
"$refit" apply bitfit "$tiny" -o "$work/bitfit" "${learn[@]}" --add-biases
"$venv/bin/python" scripts/interop.py "$refit" "$work"/{fine-tune,hft,galore,weight-compander,bitfit}

# Classifiers: transformers opens them by the class that their config names, and gives the same logits.
if have transformers; then
  "$venv/bin/python" scripts/interop_classifiers.py --make-data "$work/lesson"
  for name in bert distilbert roberta; do
    mkdir "$work/trunk-$name"
    cp crates/refit-nn/tests/fixtures/hf/$name/{config.json,model.safetensors} "$work/lesson/vocab.txt" "$work/trunk-$name"
  done
  cp -r "$tiny" "$work/trunk-llama"
  export REFIT_CACHE="$work/cache"
  for name in bert distilbert roberta llama; do
    "$refit" apply linear-probe "$work/trunk-$name" --data "$work/lesson/lesson.jsonl" -o "$work/probe-$name"
    "$refit" apply lp-ft "$work/trunk-$name" --data "$work/lesson/lesson.jsonl" -o "$work/lp-ft-$name" --steps 3 --learning-rate 1e-3
  done
  "$venv/bin/python" scripts/interop_classifiers.py "$refit" "$work"/{probe,lp-ft}-{bert,distilbert,roberta,llama} --text "$work/lesson/lines.txt"
  mkdir "$work/trunk-vit"
  cp crates/refit-nn/tests/fixtures/hf/vit/{config.json,model.safetensors} "$work/trunk-vit"
  "$refit" apply linear-probe "$work/trunk-vit" --labelled "$work/lesson/images" -o "$work/probe-vit"
  "$venv/bin/python" scripts/interop_classifiers.py "$refit" "$work/probe-vit" --image "$work"/lesson/images/*/*.png
  # A soup of classifiers, scored by accuracy.
  "$refit" apply model-soups "$work/probe-bert" "$work/lp-ft-bert" --mode learned-by-tensor --steps 2 --labelled "$work/lesson/lesson.jsonl" -o "$work/soup-bert"
  "$venv/bin/python" scripts/interop_classifiers.py "$refit" "$work/soup-bert" --text "$work/lesson/lines.txt"
fi
if have peft; then
  "$refit" apply lora "$tiny" -o "$work/lora" "${learn[@]}"
  "$refit" apply lora "$tiny" -o "$work/rslora" "${learn[@]}" --rslora --rank 4 --target-modules q_proj,down_proj
  "$refit" apply dora "$tiny" -o "$work/dora" "${learn[@]}"
  "$refit" apply ia3 "$tiny" -o "$work/ia3" "${learn[@]}"
  "$refit" apply ln-tuning "$tiny" -o "$work/ln-tuning" "${learn[@]}"
  "$refit" apply unified-peft "$tiny" -o "$work/prefix" "${learn[@]}" --preset prefix --prefix-length 8 --prefix-net 32
  "$refit" apply unified-peft "$tiny" -o "$work/prompt" "${learn[@]}" --preset prompt --prefix-length 8
  # The product beside a quantized model's codes is an adapter of PEFT's on that model.
  "$refit" apply lorc "$work/rtn3" --base "$tiny" -o "$work/rtn3-lorc"
  "$venv/bin/python" scripts/interop_adapters.py "$work/rtn3-lorc/lorc" "$work/rtn3" --refit "$refit" --text assets/text/kjv.eval.txt >"$work/lorc.json"
  echo "interop: PEFT reads lorc as refit does"
  for adapter in lora rslora dora ia3 ln-tuning prefix prompt; do
    "$venv/bin/python" scripts/interop_adapters.py "$work/$adapter" "$tiny" --refit "$refit" --text assets/text/kjv.eval.txt >"$work/$adapter.json"
    echo "interop: PEFT reads $adapter as refit does"
  done
fi
