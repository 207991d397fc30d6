"""Images per second of full train steps of small image classifiers in PyTorch, f32, AdamW: the shapes of refit-train's example
`train_images`.

    OMP_NUM_THREADS=2 python benches/peers/train_images_torch.py [MODEL] [STEPS] [BATCH]     MODEL: cnn cnn2 separable vit
"""

import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

model_name, steps, batch = (sys.argv[1:] + ["cnn", "30", "64"][len(sys.argv) - 1 :])[:3]
steps, batch = int(steps), int(batch)
torch.set_num_threads(int(os.environ.get("THREADS", os.environ.get("OMP_NUM_THREADS", "2"))))
torch.manual_seed(0)
SIZE, CLASSES = 28, 10


def cnn(convs, separable=False):
    layers, inputs = [], 1
    for outputs in (32, 64, 128):
        for _ in range(convs):
            if separable and inputs > 1:
                layers += [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 1), nn.ReLU()]
            else:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Block(nn.Module):
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x):
        b, t, w = x.shape
        h = self.n1(x)
        split = lambda y: y.view(b, t, self.heads, w // self.heads).transpose(1, 2)
        y = F.scaled_dot_product_attention(split(self.q(h)), split(self.k(h)), split(self.v(h)))
        x = x + self.o(y.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class ViT(nn.Module):
    def __init__(self, width=192, depth=6, heads=3, patch=4):
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIZE // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(depth)))
        self.norm, self.classifier = nn.LayerNorm(width, eps=1e-12), nn.Linear(width, CLASSES)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        return self.classifier(self.norm(self.blocks(x)[:, 0]))


model = {"cnn": lambda: cnn(1), "cnn2": lambda: cnn(2), "separable": lambda: cnn(2, True), "vit": ViT}[model_name]()
for p in model.parameters():
    if p.dim() > 1:
        nn.init.kaiming_normal_(p, nonlinearity="relu") if model_name != "vit" else nn.init.trunc_normal_(p, std=0.02)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
at = torch.arange(SIZE * SIZE)
labels = torch.arange(batch) % CLASSES
noise = torch.rand(batch, SIZE * SIZE) - 0.5
pixels = torch.sin((labels[:, None] + 1) * 0.05 * (at // SIZE) + 0.3 * (at % SIZE)) + noise
pixels = pixels.view(batch, 1, SIZE, SIZE)
seconds = []
for i in range(max(steps, 4)):
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(pixels.clone()), labels)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    seconds.append(time.perf_counter() - start)
    if i == 0:
        first = loss.item()
timed = seconds[3:]
median = statistics.median(timed)
print(json.dumps({"images_per_second": batch / median, "seconds": median, "fastest": min(timed), "first_loss": first, "last_loss": loss.item()}))
