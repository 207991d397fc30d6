"""Greedy decoding with transformers and its cache: tokens/s after the prompt. `python decode_torch.py MODEL_DIR [--new 64]`"""

import argparse
import time

import torch
from common import prepare, report, text_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--prompt", type=int, default=64)
parser.add_argument("--new", type=int, default=64)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()
prepare(args.threads)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
ids = torch.tensor([text_ids(AutoTokenizer.from_pretrained(args.model), args.prompt)])
model(ids)
began = time.perf_counter()
step = model(ids, use_cache=True, logits_to_keep=1)
first = time.perf_counter() - began
began = time.perf_counter()
for _ in range(args.new):
    token = step.logits[:, -1:].argmax(-1)
    step = model(token, past_key_values=step.past_key_values, use_cache=True)
seconds = time.perf_counter() - began
report(bench="decode", prompt=args.prompt, new=args.new, dtype=args.dtype, threads=args.threads, time_to_first_token=round(first, 3), tokens_per_second=round(args.new / seconds, 1))
