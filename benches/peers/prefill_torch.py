"""Prefill of transformers in f32: tokens/s of one forward pass. `python prefill_torch.py MODEL_DIR [--tokens 1024] [--threads 2]`"""

import argparse

import torch
from common import median_seconds, prepare, report, text_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--tokens", type=int, default=1024)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--last-only", action="store_true", help="logits of the last position only, as generation needs them")
args = parser.parse_args()
prepare(args.threads)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
ids = torch.tensor([text_ids(AutoTokenizer.from_pretrained(args.model), args.tokens)])
keep = {"logits_to_keep": 1} if args.last_only else {}
seconds = median_seconds(lambda: model(ids, use_cache=False, **keep), repeats=args.repeats)
report(bench="prefill", tokens=args.tokens, dtype=args.dtype, threads=args.threads, last_only=args.last_only, seconds=round(seconds, 3), tokens_per_second=round(args.tokens / seconds, 1))
