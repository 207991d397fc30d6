"""Classifiers that refit wrote, opened by transformers.

    python scripts/interop_classifiers.py REFIT_BINARY DIR... [--text FILE] [--image FILE...]
    python scripts/interop_classifiers.py --make-data DIR

Each directory loads into the class that its config names, without a missing or unexpected tensor; its logits for every line of the
text, or for every image, equal those of `refit classify --json` to 1e-4 of the largest; the config names as many labels as the head has rows.
With --make-data: writes `vocab.txt` for the tiny models of the tests (words `w5` to `w63`), `lesson.jsonl` with texts of three classes,
`lines.txt`, an image folder `images/` of two classes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

failures = []


def check(what, ok, detail=""):
    print(f"{'ok  ' if ok else 'FAIL'} {what} {detail}", flush=True)
    if not ok:
        failures.append(what)


def make_data(directory):
    from PIL import Image

    directory.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(5, 64)]
    (directory / "vocab.txt").write_text("\n".join(words))
    rows, lines = [], []
    for i in range(60):
        kind, at = i % 3, i // 3
        text = f"w{30 + at % 9} w{5 + 8 * kind + at % 8} w{40 + at * 7 % 20} w{5 + 8 * kind + at * 3 % 8}"
        rows.append(json.dumps({"text": text, "label": ["sea", "land", "air"][kind]}))
        lines.append(text if i % 2 else text + f" w{50 + at % 9} w63")
    (directory / "lesson.jsonl").write_text("\n".join(rows) + "\n")
    (directory / "lines.txt").write_text("\n".join(lines[:12]) + "\n")
    for kind, name in enumerate(["left", "right"]):
        folder = directory / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(6):
            image = Image.new("RGB", (40, 36), (30 + 9 * i, 60, 90))
            image.paste((220, 200 - 12 * i, 40), (20 * kind, 0, 20 * kind + 20, 36))
            image.save(folder / f"{i}.png")


def refit(binary, *args):
    done = subprocess.run([binary, *map(str, args), "--json", "--quiet"], check=True, stdout=subprocess.PIPE)
    return [result["logits"] for result in json.loads(done.stdout)["results"]]


def compare(name, theirs, ours):
    worst = max(abs(a - b) for row, other in zip(theirs, ours, strict=True) for a, b in zip(row, other, strict=True))
    # Heads that were fitted to few examples are steep: what f32 leaves grows with the logits.
    scale = max(1.0, max(abs(a) for row in theirs for a in row))
    check(f"{name}: logits equal to 1e-4 of the largest", worst < 1e-4 * scale, f"largest difference {worst:.1e}, largest logit {scale:.1f}")


def load(auto, directory):
    import torch

    model, notes = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    named = json.loads((directory / "config.json").read_text())["architectures"][0]
    check("the class is the config's", type(model).__name__ == named, named)
    check("no tensor missing", not notes["missing_keys"], str(sorted(notes["missing_keys"])[:3]))
    check("no tensor unexpected", not notes["unexpected_keys"], str(sorted(notes["unexpected_keys"])[:3]))
    return model.eval()


def texts(binary, directory, file):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizerFast

    model = load(AutoModelForSequenceClassification, directory)
    vocabulary = directory / "vocab.txt"
    if vocabulary.exists():
        tokenizer = BertTokenizerFast(str(vocabulary))
    else:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    lines = file.read_text(encoding="utf-8").splitlines()
    ids = [tokenizer(line)["input_ids"] for line in lines]
    logits = [model(torch.tensor([row])).logits[0].tolist() for row in ids]
    check("as many labels as classes", len(model.config.id2label) == len(logits[0]), str(model.config.id2label))
    compare("texts", logits, refit(binary, "classify", directory, "--text", file))
    # A padded batch gives what the texts give alone: the padding token is the right one.
    if model.config.pad_token_id is not None:
        longest = max(map(len, ids))
        padded = torch.tensor([row + [model.config.pad_token_id] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        compare("padded", model(padded, attention_mask=mask).logits.tolist(), logits)


def images(binary, directory, files):
    import torch
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    model = load(AutoModelForImageClassification, directory)
    size = model.config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    compare("images", model(pixels).logits.tolist(), refit(binary, "classify", directory, *files))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("refit", nargs="?")
    parser.add_argument("directories", type=Path, nargs="*")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--image", type=Path, nargs="+")
    parser.add_argument("--make-data", type=Path)
    args = parser.parse_args()
    if args.make_data:
        make_data(args.make_data)
        return
    import torch

    torch.set_grad_enabled(False)
    for directory in args.directories:
        print(f"== {directory}", flush=True)
        if args.image:
            images(args.refit, directory, args.image)
        else:
            texts(args.refit, directory, args.text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
