"""Shared by the peer benchmarks: one JSON line each, so that benches/run.sh can put refit's figure beside it."""

import json
import resource
import statistics
import time
from importlib.metadata import version


def prepare(threads):
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def median_seconds(run, warmup=1, repeats=5):
    """Median over repeats, after a warm-up; neighbours on the machine disturb the mean more."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def text_ids(tokenizer, count):
    """`count` token ids of ordinary text, repeated when it is too short."""
    text = "The keeper wrote down the height of the tide, the direction of the wind, and the names of the ships that passed. "
    ids = []
    while len(ids) < count:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:count]


def report(**figures):
    peers = {name: version(name) for name in ("torch", "transformers")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**figures, "peak_rss_mb": round(peak), "peers": peers}))
