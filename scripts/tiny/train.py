"""Trains the small decoder that travels in assets/tiny: the tests and the quick start use it where no network is at hand.

    python scripts/tiny/corpora.py CORPORA
    python scripts/tiny/train.py CORPORA assets/tiny        # about 40 minutes on one core

Llama architecture (grouped-query attention, tied embeddings), byte-level BPE trained on the same text. Matrices are trained with Muon
(K. Jordan, 2024: momentum, orthogonalized by Newton-Schulz), which gets further on a budget of minutes; embeddings and norms with
AdamW. Seeded; the last step writes the weights in bf16 and measures the held-out perplexity of what was written. Measure only:
--evaluate.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPORA = ("kjv", "man", "wordnet")
VOCAB, CONTEXT, END = 3072, 512, "<|endoftext|>"
BATCH_TOKENS, PEAK, WARMUP, DECAY = 2048, 0.02, 60, 0.02


def documents(root, corpus):
    with open(root / f"{corpus}.train.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def train_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer, directory):
    """The class name that every version of transformers knows, instead of the newest one's own."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "backend"}
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")


def new_model():
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batches(ids, steps, rng):
    """Shuffled windows with a fresh offset each epoch; 256 tokens, and the full context for the last tenth of training."""
    order, length = iter(()), 0
    for step in range(steps):
        wanted = CONTEXT if step >= 0.9 * steps else CONTEXT // 2
        rows = []
        while len(rows) < BATCH_TOKENS // wanted:
            start = next(order, None) if wanted == length else None
            if start is None:
                length, offset = wanted, rng.integers(wanted)
                order = iter(offset + wanted * rng.permutation((len(ids) - offset) // wanted))
                continue
            rows.append(ids[start : start + wanted])
        yield torch.from_numpy(np.stack(rows)).long()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is made (nearly) orthogonal: all directions of a matrix learn at the same speed."""

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @staticmethod
    def orthogonalize(g):
        wide = g if g.shape[0] <= g.shape[1] else g.T
        x = wide / (wide.norm() + 1e-7)
        for _ in range(5):  # quintic Newton-Schulz: singular values end near 1
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x if g.shape[0] <= g.shape[1] else x.T

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalize(p.grad.lerp(velocity, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def loss_of(model, tokens, reduction="mean"):
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


def train(model, ids, steps, seed):
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=PEAK, weight_decay=DECAY),
        torch.optim.AdamW(others, lr=PEAK / 4, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peaks = [optimizer.defaults["lr"] for optimizer in optimizers]
    loss_and_graph = torch.compile(loss_of)
    began, recent = time.time(), []
    for step, tokens in enumerate(batches(ids, steps, np.random.default_rng(seed))):
        progress = max(0.0, (step - WARMUP) / max(1, steps - WARMUP))
        rate = min(1.0, (step + 1) / WARMUP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer, peak in zip(optimizers, peaks):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        loss = loss_and_graph(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            spent = time.time() - began
            print(f"step {step + 1}/{steps}  loss {np.mean(recent[-50:]):.4f}  {BATCH_TOKENS * (step + 1) / spent:.0f} tokens/s  {spent:.0f} s", flush=True)


@torch.no_grad()
def evaluate(directory, texts, window=256):
    """Per-token perplexity of the written model on held-out text, as `refit eval --window 256` defines it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = {}
    for corpus in CORPORA:
        text = (texts / f"{corpus}.eval.txt").read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chunks = [ids[i : i + window] for i in range(0, len(ids), window)]
        chunks = [c for c in chunks if len(c) > 1]
        nll = sum(loss_of(model, torch.tensor([c]), "sum").item() for c in chunks) / sum(len(c) - 1 for c in chunks)
        found[corpus] = {"tokens": len(ids), "bytes_per_token": round(len(text.encode()) / len(ids), 3), "perplexity": round(math.exp(nll), 3)}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, default=Path("assets/text"), help="where kjv.eval.txt, man.eval.txt and wordnet.eval.txt lie")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", action="store_true", help="measure the model in OUT, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        torch.manual_seed(args.seed)
        texts = {c: documents(args.corpora, c) for c in CORPORA}
        tokenizer = train_tokenizer(text for part in texts.values() for text in part)
        every = [text + END for part in texts.values() for text in part]
        np.random.default_rng(args.seed).shuffle(every)
        ids = np.concatenate([np.array(e, dtype=np.int32) for e in tokenizer(every, add_special_tokens=False)["input_ids"]])
        model = new_model()
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} training tokens", flush=True)
        train(model, ids, args.steps, args.seed)
        model.bfloat16().save_pretrained(args.out)
        save_tokenizer(tokenizer, args.out)
    print(json.dumps(evaluate(args.out, args.text), indent=1))


if __name__ == "__main__":
    main()
