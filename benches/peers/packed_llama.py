"""llama.cpp on a GGUF file: tokens/s after a short prompt, and of a long one. `python packed_llama.py FILE.gguf [--new 100]`"""

import argparse
import json
import resource
import statistics
import time
from importlib.metadata import version

from llama_cpp import Llama

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--prompt", type=int, default=16)
parser.add_argument("--long", type=int, default=1024)
parser.add_argument("--new", type=int, default=100)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--repeats", type=int, default=3)
args = parser.parse_args()
TEXT = b"The keeper wrote down the height of the tide, the direction of the wind, and the names of the ships that passed. "
model = Llama(args.model, n_ctx=2048, n_batch=1024, n_ubatch=512, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
ids = model.tokenize(TEXT * 60, add_bos=False)


def decode():
    model.reset()
    model.eval(ids[: args.prompt])
    token = model.sample(temp=0.0)
    began = time.perf_counter()
    for _ in range(args.new - 1):
        model.eval([token])
        token = model.sample(temp=0.0)
    return (args.new - 1) / (time.perf_counter() - began)


def prefill():
    model.reset()
    began = time.perf_counter()
    model.eval(ids[: args.long])
    model.sample(temp=0.0)
    return args.long / (time.perf_counter() - began)


decode(), prefill()
figures = {"decode": [], "prefill": []}
for _ in range(args.repeats):
    figures["decode"].append(decode())
    figures["prefill"].append(prefill())
print(
    json.dumps(
        {
            **{name: round(statistics.median(values), 1) for name, values in figures.items()},
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "peers": {"llama_cpp_python": version("llama_cpp_python")},
        }
    )
)
