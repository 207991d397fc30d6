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
    return sorted(runs, key=key)[len(runs) // 2]


def line(what, ours, theirs, unit, higher_is_better, target):
    ratio = ours / theirs if theirs else float("nan")
    good = "higher" if higher_is_better else "lower"
    print(f"{what:<34} refit {ours:>9.2f} {unit:<9} peer {theirs:>9.2f} {unit:<9} refit/peer {ratio:5.2f} ({good} is better)  target: {target}", flush=True)


def open_gguf():
    theirs = peer("open_gguf_torch.py", MODELS / "smollm2.gguf")
    runs = [refit("generate", MODELS / "smollm2.gguf", "--prompt", "x", "--max-new-tokens", 1, "--temperature", 0, "--json") for _ in range(3)]
    line("GGUF to first token, seconds", best(runs, lambda r: r[1])[1], theirs["seconds"], "s", False, "<= 1 s")


def prefill():
    theirs = peer("prefill_torch.py", MODELS / "smollm2-f32", "--threads", THREADS)
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        text.write_text(TEXT * 400)
        runs = [refit("eval", MODELS / "smollm2-f32", "--text", text, "--window", 1024, "--max-tokens", 4096, "--json") for _ in range(3)]
    ours = best(runs, lambda r: r[0]["tokens_per_second"])
    line("prefill f32, 1024 tokens", ours[0]["tokens_per_second"], theirs["tokens_per_second"], "tokens/s", True, ">= 0.9")
    line("  peak memory", ours[2], theirs["peak_rss_mb"], "MB", False, "-")


def decode():
    theirs = peer("decode_torch.py", MODELS / "smollm2-f32", "--threads", THREADS)
    args = ("--prompt", TEXT * 3, "--max-new-tokens", 64, "--temperature", 0, "--ignore-eos", "--json")
    runs = [refit("generate", MODELS / "smollm2-f32", *args) for _ in range(3)]
    ours = best(runs, lambda r: r[0]["tokens_per_second"])
    line("decode f32, 64 tokens", ours[0]["tokens_per_second"], theirs["tokens_per_second"], "tokens/s", True, "-")


def embed():
    with tempfile.TemporaryDirectory() as work:
        lines = Path(work) / "lines.txt"
        words = TEXT.split()
        lines.write_text("\n".join(" ".join(words[i % 7 : i % 7 + 5 + i % 16]) for i in range(512)) + "\n")
        theirs = peer("embed_torch.py", MODELS / "minilm", lines, "--threads", THREADS)
        runs = [refit("embed", MODELS / "minilm", "--text", lines, "--json") for _ in range(3)]
    seconds = best(runs, lambda r: r[1])[1]
    line("embed 512 sentences (with start)", 512 / seconds, theirs["sentences_per_second"], "lines/s", True, "-")


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
    line("uniform soup, 4 x 538 MB", ours[1], theirs["seconds"], "s", False, "<= 1.2 s")
    line("  peak memory", ours[2], theirs["peak_rss_mb"], "MB", False, "<= 300 MB")


for name in sys.argv[4:]:
    bench = {f.__name__: f for f in (open_gguf, prefill, decode, embed, soup)}.get(name)
    if bench is None:
        raise SystemExit(f"unknown bench {name}: open_gguf, prefill, decode, embed, soup")
    bench()
