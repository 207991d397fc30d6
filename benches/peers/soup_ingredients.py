"""Four soup ingredients: a base model with seeded noise of 1 % of each tensor's spread. `python soup_ingredients.py BASE_DIR OUT_PREFIX`

Writes OUT_PREFIX1 .. OUT_PREFIX4, complete model directories in f32.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

base, prefix = Path(sys.argv[1]), sys.argv[2]
for number in range(1, 5):
    out = Path(f"{prefix}{number}")
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    generator = torch.Generator().manual_seed(number)
    state = load_file(base / "model.safetensors")
    for name in sorted(state):
        tensor = state[name]
        tensor += 0.01 * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    print(out)
