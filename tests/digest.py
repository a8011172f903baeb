"""Prints a digest of what every layer computes; test_kernels.py runs it per instruction set."""

from __future__ import annotations

import hashlib

import torch
from promises import CASES, bits, layouts

import truenorm
from truenorm._ops.masked import masked_backward, masked_forward

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
# lengths, random positions, and runs of a few, in short rows and long ones
for shape in ((3, 5, 37), (4, 3, 5000), (3, 70, 23, 31)):
    size = torch.Size(shape[2:]).numel()
    lengths = torch.arange(size) < torch.tensor([size, 5, size // 2, 0])[: shape[0], None]
    few = (torch.arange(size) // 20 % 3 == 1).repeat(shape[0], 1)
    for mask in (lengths, torch.rand(shape[0], size) < 0.5, few):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            for groups in (0, 1, shape[1]):
                for offset in (0.0, 30.0):
                    for place in layouts(shape).values():
                        x = place((torch.randn(shape) + offset).to(dtype))
                        made = masked_forward(x, mask, None, None, groups, 1e-5, 1.5)
                        found = masked_backward(x, x, mask, *made[1:3], None, groups, 1e-5, 7)
                        for part in (*made, *found):
                            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
# each activation, with and without a residual, by rows, by columns and element by element
for act in range(9):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for make, shape in (("BatchNorm2d", (3, 70, 9, 7)), ("LayerNorm", (5, 131))):
            for place in layouts(shape).values():
                axes = (0, 0, True) if make == "BatchNorm2d" else (1, 1, True)
                x, r = (place((4 * torch.randn(shape)).to(dtype)) for _ in range(2))
                for residual in (r, None) if act else (r,):
                    forward = torch.ops.truenorm.forward_act.default
                    backward = torch.ops.truenorm.backward_act.default
                    given = x, None, None, residual, *axes, 1e-5, act, 0.3
                    y, mean, var = forward(*given)
                    parts = r, x, mean, var, None, None, residual, *axes, 1e-5, False, act, 0.3
                    for part in (y, *backward(*parts, 15 if residual is not None else 7)):
                        digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
