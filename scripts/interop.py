"""Opens model directories that refit wrote with tools that are not ours, and compares what the models say.

    python scripts/interop.py REFIT_BINARY DIR... [--same-as DIR] [--text FILE]

1. safetensors: every file opens, shards and index agree, nothing is NaN; with --same-as, names, shapes, dtypes and values are equal to
   within one rounding of the dtype.
2. transformers (where installed): the directory loads without a missing or unexpected tensor; perplexity on the text and 16 greedy tokens
   equal those of `refit eval` and `refit generate`.
Exit code 1 and one line per difference where something does not agree.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "crates" / "refit-nn" / "tests" / "fixtures" / "smollm2" / "eval.txt"
PROMPT = "In the beginning"
WINDOW = 256
failures = []
subject = ""  # the directory at hand, for the list of failures


def check(what, ok, detail=""):
    print(f"{'ok  ' if ok else 'FAIL'} {what} {detail}", flush=True)
    if not ok:
        failures.append(f"{subject}: {what} {detail}")


def dtypes_and_shapes(directory):
    """{tensor: (dtype, shape, file)}, from the headers; the index, if there is one, must name the right files."""
    found = {}
    # What begins with refit lies beside the model: the masks of pruned weights, under the weights' own names.
    files = [file for file in directory.glob("*.safetensors") if not file.name.startswith("refit.")]
    for file in sorted(files):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                view = opened.get_slice(name)
                assert name not in found, f"{name} is in two files"
                found[name] = (view.get_dtype(), tuple(view.get_shape()), file.name)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        check("index names every tensor's file", weight_map == {n: f for n, (_, _, f) in found.items()})
    return found


def values(directory, name, file, dtype):
    """A tensor as f32; numpy has no bf16, so it is widened by hand."""
    if dtype != "BF16":
        with safe_open(directory / file, framework="np") as opened:
            return opened.get_tensor(name).astype(np.float32)
    raw = (directory / file).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    return (np.frombuffer(raw[8 + size + begin : 8 + size + end], dtype="<u2").astype(np.uint32) << 16).view(np.float32)


def check_masks(directory, ours):
    """Masks that were left beside a pruned model: known weights, and as many names as masks."""
    masks = directory / "refit.masks.safetensors"
    if masks.exists():
        with safe_open(masks, framework="np") as opened:
            names = list(opened.keys())
        check("masks open and belong to weights", bool(names) and set(names) <= set(ours), f"{len(names)} masks")


def check_files(directory, same_as):
    ours = dtypes_and_shapes(directory)
    check_masks(directory, ours)
    check("safetensors opens", bool(ours), f"{len(ours)} tensors")
    finite = all(np.isfinite(values(directory, n, f, d)).all() for n, (d, _, f) in ours.items() if d in ("F32", "F16", "BF16"))
    check("all values finite", finite)
    if same_as:
        theirs = dtypes_and_shapes(same_as)
        check("names, dtypes and shapes kept", {n: v[:2] for n, v in ours.items()} == {n: v[:2] for n, v in theirs.items()})
        step = {"F32": 2**-23, "F16": 2**-10, "BF16": 2**-7}
        worst = 0.0
        for name in ours.keys() & theirs.keys():
            a = values(directory, name, ours[name][2], ours[name][0]).ravel()
            b = values(same_as, name, theirs[name][2], theirs[name][0]).ravel()
            worst = max(worst, float((np.abs(a - b) / (np.abs(b) * step[theirs[name][0]] + 1e-30)).max()))
        check("values kept", worst <= 1.0, f"largest difference {worst:.2g} roundings")


def check_behaviour(refit, directory, text):
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        print("skip transformers is not installed")
        return
    torch.set_grad_enabled(False)
    model, notes = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or [])
    check("no tensor missing", not set(notes["missing_keys"]) - tied, str(sorted(notes["missing_keys"])[:3]))
    check("no tensor unexpected", not notes["unexpected_keys"], str(sorted(notes["unexpected_keys"])[:3]))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model.eval()

    def run(*args):
        return json.loads(subprocess.run([refit, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout)

    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        chunk = torch.tensor([ids[start : start + WINDOW]])
        if chunk.shape[1] > 1:
            logits = model(chunk, use_cache=False).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
            count += chunk.shape[1] - 1
    ours = run("eval", directory, "--text", text, "--window", WINDOW, "--json")
    check("same number of tokens", ours["tokens"] == count, f"{ours['tokens']} and {count}")
    theirs = math.exp(total / count)
    check("perplexity equal to 4 digits", abs(ours["perplexity"] / theirs - 1) < 1e-4, f"refit {ours['perplexity']:.5f}, transformers {theirs:.5f}")

    prompt = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    wanted, margins = [], []
    sequence = prompt
    for _ in range(16):
        top = model(sequence, use_cache=False).logits[0, -1].topk(2)
        wanted.append(top.indices[0].item())
        margins.append((top.values[0] - top.values[1]).item())
        sequence = torch.cat([sequence, top.indices[:1, None].T], dim=1)
    # In full precision, as transformers computes: packed weights are multiplied with inputs of 8 bits, which may choose otherwise.
    options = ("--max-new-tokens", 16, "--temperature", 0, "--ignore-eos", "--weights", "f32", "--json")
    got = run("generate", directory, "--prompt", PROMPT, *options)["tokens"]
    # From the first near-tie on, two correct programs may part.
    certain = next((i for i, m in enumerate(margins) if m < 1e-3), len(margins))
    check("same greedy tokens", got[-16:][:certain] == wanted[:certain], f"first {certain} of 16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refit")
    parser.add_argument("directories", type=Path, nargs="+")
    parser.add_argument("--same-as", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    args = parser.parse_args()
    global subject
    for directory in args.directories:
        subject = directory.name
        print(f"== {directory}", flush=True)
        check_files(directory, args.same_as)
        check_behaviour(args.refit, directory, args.text)
    # Once more at the end, where a long log is read.
    for failure in failures:
        print(f"FAIL {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
