"""A training program as many are, for `simgpu run`: nothing in it knows of simulated cards."""

import argparse

import torch
from torch import nn
from torch.nn import functional

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=4096)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--batch", type=int, default=64)
options = parser.parse_args()

with torch.device("cuda"):
    layers = [
        nn.Sequential(nn.Linear(options.width, options.width), nn.GELU())
        for _ in range(options.layers)
    ]
    model = nn.Sequential(*layers, nn.Linear(options.width, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for step in range(10_000):
    pictures = torch.rand(options.batch, options.width).cuda()
    labels = torch.randint(10, (options.batch,)).cuda()
    loss = functional.cross_entropy(model(pictures), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
