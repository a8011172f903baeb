"""The layers under test, the layouts they meet, and what the float64 reference says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

import truenorm
from truenorm import reference


class Case(NamedTuple):
    """A layer, by its name in torch.nn and in truenorm, and an input shape with odd sizes."""

    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]

    @property
    def id(self) -> str:
        return f"{self.layer}-{'x'.join(map(str, self.shape))}"

    def build(self, module: Any = truenorm, **factory: Any) -> Any:
        """The layer, of truenorm or of torch.nn, with random parameters and statistics."""
        if self.layer == "LocalResponseNorm":  # has no state, and takes no dtype
            factory = {}
        return randomize(getattr(module, self.layer)(*self.args, **self.kwargs, **factory))

    def pair(self, **factory: Any) -> tuple[Any, Any]:
        """truenorm's layer and torch's, with the same state."""
        ours, theirs = self.build(**factory), self.build(torch.nn, **factory)
        theirs.load_state_dict(ours.state_dict())
        return ours, theirs

    def input(self, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> Tensor:
        return (torch.randn(self.shape, dtype=torch.float64) * 1.7 + offset).to(dtype)


AFFINE = {"affine": True}
TRACKING = {"affine": True, "track_running_stats": True}

CASES = [
    Case("BatchNorm1d", (5,), {}, (7, 5)),
    Case("BatchNorm1d", (5,), {}, (3, 5, 9)),
    Case("BatchNorm2d", (5,), {}, (3, 5, 7, 9)),
    Case("BatchNorm3d", (3,), {}, (2, 3, 5, 3, 7)),
    Case("SyncBatchNorm", (5,), {}, (3, 5, 7)),
    Case("InstanceNorm1d", (5,), TRACKING, (3, 5, 9)),
    Case("InstanceNorm2d", (5,), AFFINE, (3, 5, 7, 9)),
    Case("InstanceNorm2d", (5,), AFFINE, (5, 7, 3)),
    Case("InstanceNorm3d", (3,), AFFINE, (2, 3, 5, 3, 7)),
    Case("GroupNorm", (3, 9), {}, (2, 9, 5, 7)),
    Case("LayerNorm", ((7,),), {}, (3, 5, 7)),
    Case("LayerNorm", ((5, 7),), {}, (3, 2, 5, 7)),
    Case("RMSNorm", ((7,),), {}, (3, 5, 7)),
    Case("LocalResponseNorm", (3,), {"alpha": 0.3}, (2, 5, 7, 3)),
]
IDS = [case.id for case in CASES]


def randomize(layer: Module) -> Module:
    """Parameters and statistics that no shortcut can guess: a weight of 1 hides a missing one."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_().add_(0.3)
        for name, buffer in layer.named_buffers():
            if name == "running_mean":
                buffer.normal_()
            elif name == "running_var":
                buffer.uniform_(0.5, 2.0)
    return layer


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
    view = wide[..., 1::2]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    # positions in another order, and samples inside: both dense, neither a memory format of torch
    "swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "samples_inside": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    # every second value of a wider tensor that is NaN elsewhere: not dense
    "sliced": _sliced,
}


class Result(NamedTuple):
    """An output and the gradients of input, weight and bias."""

    output: Tensor
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None


def _parameter(layer: Any, name: str) -> Any:
    return getattr(layer, name, None)


def run(layer: Any, x: Tensor, grad: Tensor) -> Result:
    """What the layer itself gives; `grad` is the output's gradient."""
    x = x.detach().requires_grad_()
    output = layer(x)
    parameters = {n: p for n in ("weight", "bias") if (p := _parameter(layer, n)) is not None}
    found = torch.autograd.grad(output, [x, *parameters.values()], grad)
    by_name = dict(zip(parameters, found[1:], strict=True))
    return Result(output.detach(), found[0], by_name.get("weight"), by_name.get("bias"))


def uses_running(layer: Any) -> bool:
    """Whether the running statistics normalize, by torch's documentation."""
    if isinstance(layer, torch.nn.modules.instancenorm._InstanceNorm):
        return not layer.training and layer.track_running_stats
    return not layer.training and layer.running_mean is not None


def eps_of_torch(dtype: torch.dtype) -> float:
    """What torch's own rms_norm takes for eps=None: x / y of a value whose square is nothing."""
    x = torch.full((1,), 2.0**-14 if dtype.itemsize == 2 else 2.0**-40, dtype=dtype)
    y = torch.nn.functional.rms_norm(x, (1,))
    # an epsilon is a power of two, which the output's rounding hides
    return float(2.0 ** round(float((2.0 * (x / y).abs().double().log2()).item())))


def exact(layer: Any, x: Tensor, grad: Tensor) -> Result:
    """What the float64 reference says the layer gives."""
    weight, bias = _parameter(layer, "weight"), _parameter(layer, "bias")
    kind = type(layer).__name__
    if "LocalResponse" in kind:
        spec = (layer.size, layer.alpha, layer.beta, layer.k)
        back = reference.local_response_norm_backward(grad, x, *spec)
        return Result(reference.local_response_norm(x, *spec), *back)
    eps = layer.eps
    if "RMS" in kind:
        shape = layer.normalized_shape
        back = reference.rms_norm_backward(grad, x, shape, weight, eps)
        return Result(reference.rms_norm(x, shape, weight, eps), *back)
    if "Layer" in kind:
        shape = layer.normalized_shape
        back = reference.layer_norm_backward(grad, x, shape, weight, bias, eps)
        return Result(reference.layer_norm(x, shape, weight, bias, eps), *back)
    if "Group" in kind:
        groups = layer.num_groups
        back = reference.group_norm_backward(grad, x, groups, weight, bias, eps)
        return Result(reference.group_norm(x, groups, weight, bias, eps), *back)
    unbatched = "Instance" in kind and x.dim() == int(kind[-2]) + 1
    if unbatched:
        x, grad = x[None], grad[None]
    if "Instance" in kind and not uses_running(layer):
        back = reference.instance_norm_backward(grad, x, weight, bias, eps)
        result = Result(reference.instance_norm(x, weight, bias, eps), *back)
    else:
        running = (layer.running_mean, layer.running_var)
        training = not uses_running(layer)
        back = reference.batch_norm_backward(grad, x, *running, weight, bias, training, eps)
        result = Result(reference.batch_norm(x, *running, weight, bias, training, eps), *back)
    return result._replace(output=result.output[0], input=result.input[0]) if unbatched else result
