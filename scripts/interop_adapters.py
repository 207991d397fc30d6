"""An adapter that refit wrote, loaded by PEFT.

    python scripts/interop_adapters.py ADAPTER_DIR BASE_DIR [TOKEN_ID...] [--refit BINARY --text FILE]

Prints one line of JSON: the versions, the kind of the adapter, the last position's first 64 logits with the adapter and their largest
difference from the base model's. With --refit and --text, PEFT's mean negative log-likelihood of the text (512 tokens at most) must be
refit's to 1e-4. Keys that PEFT does not find or does not know are an error here, where PEFT only warns.
"""

import argparse
import json
import subprocess
import sys
import warnings
from importlib.metadata import version

import torch


def compare_likelihood(model, args):
    """Exits when refit and PEFT do not give the text the same likelihood."""
    from transformers import AutoTokenizer

    window = 256
    command = [args.refit, "eval", args.base, "--adapter", args.adapter, "--text", args.text, "--json", "--quiet"]
    command += ["--window", str(window), "--max-tokens", str(2 * window)]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    with open(args.text, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(args.base)(file.read(), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, 2 * window, window):
        piece = torch.tensor([ids[start : start + window]])
        # PEFT gives virtual tokens of a prompt rows of their own, before those of the text.
        logits = model(input_ids=piece).logits[0, -piece.shape[1] :]
        scores = torch.log_softmax(logits[:-1].double(), -1)
        total -= scores.gather(1, piece[0, 1:, None]).sum().item()
        count += piece.shape[1] - 1
    ours = total / count
    if theirs["tokens"] != count or abs(theirs["nll"] - ours) > 1e-4:
        sys.exit(f"{args.adapter}: PEFT says {ours:.6f} nats over {count} tokens, refit {theirs['nll']:.6f} over {theirs['tokens']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("base")
    parser.add_argument("tokens", nargs="*", type=int)
    parser.add_argument("--refit")
    parser.add_argument("--text")
    args = parser.parse_args()
    from peft import PeftModel
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([args.tokens or list(range(3, 15))])
    plain = base(ids).logits[0, -1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, args.adapter).eval()
    complaints = [str(w.message) for w in caught if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    if complaints:
        sys.exit(f"{args.adapter}: PEFT complains: {complaints[0]}")
    written = load_peft_weights(args.adapter, device="cpu")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(written) != set(loaded):
        sys.exit(f"{args.adapter}: these keys differ: {sorted(set(written) ^ set(loaded))[:5]}")
    for name, values in written.items():
        if not torch.equal(values, loaded[name].cpu()):
            sys.exit(f"{args.adapter}: {name} was not loaded as it was written")
    logits = model(ids).logits[0, -1]
    if args.refit and args.text:
        compare_likelihood(model, args)
    print(
        json.dumps(
            {
                "peft": version("peft"),
                "transformers": version("transformers"),
                "kind": model.active_peft_config.peft_type.value,
                "tensors": len(written),
                "moved": float((logits - plain).abs().max()),
                "logits": [float(x) for x in logits[:64]],
            }
        )
    )


if __name__ == "__main__":
    main()
