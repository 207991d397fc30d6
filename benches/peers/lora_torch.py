"""LoRA training with transformers and PEFT, f32: rank 8 on every linear of the blocks, AdamW. Tokens/s of the middle step, peak memory.

    python lora_torch.py MODEL_DIR TEXT [--steps 8] [--batch 4] [--seq 256] [--threads 2] [--bf16]

TEXT is cut into rows of `seq` tokens, as `refit apply lora --max-length` cuts it.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path

import torch
from common import report
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("text")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--bf16", action="store_true", help="autocast of matrix products")
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.manual_seed(0)
ids = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(), add_special_tokens=False, return_tensors="pt").input_ids[0]
rows = ids[: len(ids) // args.seq * args.seq].view(-1, args.seq)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linears, task_type="CAUSAL_LM"))
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
precision = torch.autocast("cpu", dtype=torch.bfloat16) if args.bf16 else contextlib.nullcontext()
seconds = []
for step in range(args.steps):
    chosen = rows[[(step * args.batch + i) % len(rows) for i in range(args.batch)]]
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    with precision:
        loss = model(input_ids=chosen, labels=chosen).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - began)
middle = statistics.median(seconds[1:])
report(bench="lora", batch=args.batch, seq=args.seq, bf16=args.bf16, seconds=round(middle, 3), tokens_per_second=round(args.batch * args.seq / middle, 1))
