"""Time of one train step of a Llama-like decoder in PyTorch, f32, AdamW: the shape of refit-train's example `train_step`.

    OMP_NUM_THREADS=2 python benches/peers/train_torch.py [STEPS] [BATCH] [SEQ] [f32|bf16]     bf16: autocast
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
steps, batch, seq = (numbers + [15, 8, 128][len(numbers) :])[:3]
precision = torch.autocast("cpu", dtype=torch.bfloat16, enabled="bf16" in sys.argv)
torch.set_num_threads(int(os.environ.get("THREADS", os.environ.get("OMP_NUM_THREADS", "2"))))
torch.manual_seed(0)
D, FFN, LAYERS, HEADS, VOCAB = 256, 768, 6, 8, 4096
HEAD = D // HEADS


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(D, FFN, bias=False), nn.Linear(D, FFN, bias=False), nn.Linear(FFN, D, bias=False)

    def forward(self, x, cos, sin):
        h = self.n1(x)
        split = lambda y: y.view(batch, seq, HEADS, HEAD).transpose(1, 2)
        q, k, v = rope(split(self.q(h)), cos, sin), rope(split(self.k(h)), cos, sin), split(self.v(h))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, seq, D))
        h = self.n2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(VOCAB, D), nn.RMSNorm(D, eps=1e-5), nn.Linear(D, VOCAB, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        angle = torch.arange(seq)[:, None] * 10000.0 ** (-torch.arange(0, HEAD, 2) / HEAD)
        self.cos, self.sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


model = Model()
for p in model.parameters():
    if p.dim() > 1:
        nn.init.normal_(p, std=0.02)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
ids = (torch.arange(batch * seq) * 7919 % 4096).view(batch, seq)
seconds = []
for _ in range(max(steps, 3)):
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    with precision:
        logits = model(ids)
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB).float(), ids[:, 1:].reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - start)
timed = seconds[2:]
median = statistics.median(timed)
print(json.dumps({"seconds": median, "fastest": min(timed), "tokens_per_second": batch * seq / median, "last_loss": loss.item()}))
