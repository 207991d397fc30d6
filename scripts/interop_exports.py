"""Opens what `refit export` wrote with tools that are not ours, and compares the weights and what the models say.

    python scripts/interop_exports.py REFIT_BINARY DIR... [--text FILE]

A directory may hold a GGUF file, compressed-tensors or GPTQ. Its weights as refit reads them are those of
`refit export DIR --to safetensors --type F32`; they must be equal, bit by bit but for the sign of zeros, to

1. GGUF: what the `gguf` package decodes, with the rows of q and k put back into Hugging Face's order;
2. GPTQ: the formula of the format, written out in numpy;
3. compressed-tensors: what the package of that name decompresses (where it is installed).

Then perplexity: transformers on the GGUF and compressed-tensors directories, against `refit eval`; llama.cpp on the GGUF file, where its
bindings (`llama_cpp` or `xllamacpp`) are installed. Exit code 1 and one line per difference where something does not agree.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open

from interop import TEXT, WINDOW, check, failures


def run(refit, *args):
    return json.loads(subprocess.run([refit, *map(str, args), "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout)


def decoded(refit, directory):
    """Every tensor as refit reads it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "decoded"
        run(refit, "export", directory, "--to", "safetensors", "--type", "F32", "-o", out)
        with safe_open(out / "model.safetensors", framework="np") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads((out / "config.json").read_text())


def same(what, ours, theirs):
    equal = ours.shape == theirs.shape and np.array_equal(ours, theirs)
    if not equal:
        check(what, False, f"{ours.shape} {theirs.shape}")
    return equal


GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def check_gguf(path, ours, config):
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(path)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    equal = 0
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        stem, kind = parts[-2], parts[-1]
        name = f"{GGUF_NAMES[stem]}.{kind}"
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{name}"
        shape = [int(n) for n in reversed(tensor.shape)]
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        if stem in heads and config["model_type"] == "llama":
            rows = values.reshape(heads[stem], shape[0] // heads[stem] // 2, 2, -1)
            values = rows.swapaxes(1, 2).reshape(shape)
        equal += same(f"gguf reads {tensor.name} as refit does", ours[name], values)
    check("gguf decodes what refit reads", equal == len(reader.tensors), f"{equal} of {len(reader.tensors)} tensors")


def check_gptq(directory, ours, settings):
    bits = settings["bits"]
    version = settings["checkpoint_format"]
    equal = total = 0
    with safe_open(directory / "model.safetensors", framework="np") as opened:
        for name in opened.keys():
            if not name.endswith(".qweight"):
                continue
            stem = name.removesuffix(".qweight")
            part = {p: opened.get_tensor(f"{stem}.{p}") for p in ("qweight", "qzeros", "scales", "g_idx")}
            codes = stream(part["qweight"], bits)
            zeros = stream(part["qzeros"].T, bits).T
            if version == "gptq":
                zeros = (zeros + 1) & (2**bits - 1)
            group = part["g_idx"]
            values = (codes.astype(np.int64) - zeros[group].astype(np.int64)) * part["scales"].astype(np.float32)[group]
            equal += same(f"{stem} decodes by GPTQ's formula", ours[f"{stem}.weight"], values.T.astype(np.float32))
            total += 1
    check("GPTQ's formula decodes what refit reads", equal == total > 0, f"{equal} of {total} linears")


def stream(words, bits):
    """Columns of 32-bit words, the lowest bit first, as columns of codes."""
    spread = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    spread = spread.reshape(-1, bits, words.shape[1])
    return (spread << np.arange(bits, dtype=np.uint32)[None, :, None]).sum(axis=1)


def check_compressed(directory, ours, settings):
    try:
        import torch
        from compressed_tensors.compressors import unpack_from_int32
        from safetensors.torch import load_file
    except ImportError as error:
        print(f"skip compressed-tensors: {error}")
        return
    tensors = load_file(directory / "model.safetensors")
    stems = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    equal = 0
    for stem in stems:
        weights = weights_of(stem, settings)
        bits, scale = weights["num_bits"], tensors[f"{stem}.weight_scale"].float()
        zero = tensors.get(f"{stem}.weight_zero_point")
        if f"{stem}.weight_packed" in tensors:
            shape = torch.Size(tensors[f"{stem}.weight_shape"].tolist())
            codes = unpack_from_int32(tensors[f"{stem}.weight_packed"], bits, shape)
            if zero is not None:
                zero = unpack_from_int32(zero, bits, torch.Size([shape[0], scale.shape[1]]), packed_dim=0)
        else:
            codes = tensors[f"{stem}.weight"]
        group = codes.shape[1] // scale.shape[1]
        offset = 0 if zero is None else zero.float().repeat_interleave(group, 1)
        values = (codes.float() - offset) * scale.repeat_interleave(group, 1)
        equal += same(f"compressed-tensors reads {stem} as refit does", ours[f"{stem}.weight"], values.numpy())
    check("compressed-tensors unpacks what refit reads", equal == len(stems) > 0, f"{equal} of {len(stems)} linears")


def weights_of(stem, settings):
    groups = settings["config_groups"].values()
    named = [group for group in groups if stem in group["targets"]]
    return (named or [group for group in groups if "Linear" in group["targets"]])[0]["weights"]


def check_transformers(refit, directory, text, **options):
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        print("skip transformers is not installed")
        return
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory, **options)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        chunk = torch.tensor([ids[start : start + WINDOW]])
        if chunk.shape[1] > 1:
            logits = model(chunk, use_cache=False).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum").item()
            count += chunk.shape[1] - 1
    ours = run(refit, "eval", directory, "--text", text, "--window", WINDOW)
    theirs = math.exp(total / count)
    check("same number of tokens as transformers", ours["tokens"] == count, f"{ours['tokens']} and {count}")
    close = abs(ours["perplexity"] / theirs - 1) < 1e-3
    check("perplexity equal to 3 digits", close, f"refit {ours['perplexity']:.5f}, transformers {theirs:.5f}")


def check_directory(refit, directory, text):
    print(f"{directory}", flush=True)
    ours, config = decoded(refit, directory)
    gguf_file = directory / "model.gguf"
    if gguf_file.exists():
        check_gguf(gguf_file, ours, config)
        check_transformers(refit, directory, text, gguf_file="model.gguf")
        return
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    if settings["quant_method"] == "gptq":
        check_gptq(directory, ours, settings)
        return
    check_compressed(directory, ours, settings)
    groups = list(settings["config_groups"].values())
    # transformers 5.23 makes room for unpacked zero points, where compressed-tensors 0.20 (and refit) writes packed ones.
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    if symmetric and groups[0]["input_activations"] is None:
        check_transformers(refit, directory, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("refit")
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    args = parser.parse_args()
    for directory in args.directories:
        check_directory(args.refit, directory, args.text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
