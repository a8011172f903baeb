"""Prints a digest of what every layer computes; test_kernels.py runs it per instruction set."""

from __future__ import annotations

import hashlib

import torch
from promises import CASES, bits, layouts

import truenorm

torch.manual_seed(3)
digest = hashlib.sha256()
for case in CASES:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        layer = case.build(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for name in ("contiguous", "channels_last"):
            place = layouts(case.shape).get(name, torch.clone)
            x, grad = place(case.input(dtype)), torch.randn(case.shape).to(dtype)
            for part in bits(layer, x, grad):
                digest.update(part.numpy().tobytes())
# what float32 cannot hold beside what it can: the results of two kernels in one tile
layer = truenorm.LocalResponseNorm(5, alpha=0.3)
x = torch.randn(2, 19, 301) * 10.0 ** torch.empty(2, 19, 301).uniform_(-30, 30)
for part in bits(layer, x, torch.randn(2, 19, 301)):
    digest.update(part.numpy().tobytes())
print(digest.hexdigest())
