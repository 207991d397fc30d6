"""Sentence embeddings with transformers' BertModel: sentences/s. `python embed_torch.py MODEL_DIR LINES.txt [--batch 32]`"""

import argparse

import torch
from common import median_seconds, prepare, report
from transformers import AutoModel, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("lines")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
prepare(args.threads)
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModel.from_pretrained(args.model, dtype=torch.float32, add_pooling_layer=False).eval()
lines = [line for line in open(args.lines, encoding="utf-8").read().splitlines() if line]


def embed():
    """Batches of similar length, as sentence-transformers does it: least padding."""
    order = sorted(range(len(lines)), key=lambda i: -len(lines[i]))
    out = [None] * len(lines)
    for start in range(0, len(order), args.batch):
        part = order[start : start + args.batch]
        batch = tokenizer([lines[i] for i in part], padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        for i, vector in zip(part, torch.nn.functional.normalize(pooled, dim=-1)):
            out[i] = vector
    return torch.stack(out)


seconds = median_seconds(embed, repeats=3)
report(bench="embed", sentences=len(lines), batch=args.batch, threads=args.threads, seconds=round(seconds, 3), sentences_per_second=round(len(lines) / seconds, 1))
