"""What a compiler guards of a layer: few names, and each setting that may change afterwards."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compile import _fresh_compiler  # noqa: F401  (a fixture)
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.utils import parametrize
from versions import older_than

import truenorm

IMAGE, ROWS = (4, 6, 5, 7), (4, 5, 6)
LAYERS: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
    "BatchNorm1d": ((6,), (4, 6)),
    "BatchNorm2d": ((6,), IMAGE),
    "InstanceNorm2d": ((6,), IMAGE),
    "GroupNorm": ((2, 6), IMAGE),
    "LayerNorm": ((6,), ROWS),
    "RMSNorm": ((6,), ROWS),
}
EVERY = pytest.mark.parametrize("name", LAYERS)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def build(name: str, **options: Any) -> Any:
    """A layer with random parameters."""
    layer = getattr(truenorm, name)(*LAYERS[name][0], **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


# --- how many


def guards(layers: list[nn.Module], shape: tuple[int, ...]) -> int:
    """How many guards a graph of these layers has."""
    torch.compiler.reset()
    net = nn.Sequential(*layers)

    def call(x: Tensor) -> Any:
        return net(x)

    call.__code__ = call.__code__.replace()
    torch.compile(call, backend="eager", fullgraph=True)(torch.randn(shape))
    (entry,) = _debug_get_cache_entry_list(call.__code__)
    return len(re.findall(r"^[| ]*\+- [A-Z_]+: ", str(entry.guard_manager), re.MULTILINE))


@pytest.mark.skipif(
    older_than(2, 13),
    reason="older compilers guard more of what a function looks up",
)
@MODES
@EVERY
def test_there_are_few_guards_more_than_torchs_layer_has(name: str, training: bool) -> None:
    args, shape = LAYERS[name]

    def of(kind: Any, number: int) -> int:
        return guards([kind(*args).train(training) for _ in range(number)], shape)

    ours, theirs = getattr(truenorm, name), getattr(nn, name)
    one, one_of_theirs = of(ours, 1), of(theirs, 1)
    assert one <= one_of_theirs + 50
    # most of these are a graph's, not a layer's
    assert of(ours, 2) - one <= of(theirs, 2) - one_of_theirs + 8


# --- the same graph as the long way's


def graph(layer: nn.Module, x: Tensor, dynamic: bool, **given: Any) -> list[str]:
    found: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        found.extend(n.format_node() or "" for n in module.graph.nodes)
        return module.forward

    torch.compiler.reset()
    x = x.clone()
    for t in (x, *given.values()) if dynamic else ():
        torch._dynamo.mark_dynamic(t, 0)
    torch.compile(layer, backend=backend, fullgraph=True)(x, **given)
    # an argument has its name from where it is first met
    return [re.sub(r"%\w*residual\w*", "%residual", n) for n in found if "truenorm." in n]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"activation": "elu", "elu_alpha": 0.7}], ids=["", "elu"])
@pytest.mark.parametrize("gradient", [True, False], ids=["gradient", "inference"])
@MODES
@EVERY
def test_the_graph_is_the_long_ways(
    name: str, training: bool, gradient: bool, options: dict[str, Any], dynamic: bool
) -> None:
    layer = build(name, **options).train(training)
    x = torch.randn(LAYERS[name][1])
    with torch.set_grad_enabled(gradient):
        for given in ({}, {"residual": torch.randn(x.shape, requires_grad=True)}):
            short = graph(layer, x, dynamic, **given)
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(type(layer), "_in_graph", lambda *_: None)
                long = graph(layer, x, dynamic, **given)
            assert short == long
            assert short


# --- what may change


def results(layer: Any, call: Any, x: Tensor, grad: Tensor) -> list[Any]:
    """Output, gradients and running statistics of a step."""
    at = x.clone().requires_grad_()
    y = call(at)
    wanted = [at, *(p for p in layer.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [y.detach(), *found, *(b.clone() for b in layer.buffers())]


def alike(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    same = (
        a is b if a is None or b is None else torch.equal(a, b)
        for a, b in zip(one, other, strict=True)
    )
    return all(same)


def put(**values: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        for name, value in values.items():
            setattr(layer, name, value)

    return change


class Doubled(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return 2.0 * t


def doubled(layer: Any) -> None:
    parametrize.register_parametrization(layer, "weight", Doubled())


def hooked(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, y: 2.0 * y)


def hooked_before(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] ** 3,))


def replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().flip(0) + 1.0)


def replaced_forward(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2.0 * forward(x)


def without(name: str) -> Callable[[Any], None]:
    return put(**{name: None})


def bare(layer: Any) -> None:
    layer.running_mean = layer.running_var = layer.num_batches_tracked = None


TRACKING = {"track_running_stats": True}
AFFINE = {"affine": True}
LEAKY = {"activation": "leaky_relu"}
Change = tuple[str, dict[str, Any], Callable[[Any], Any]]
CHANGES: dict[str, Change] = {
    "eps": ("BatchNorm2d", {}, put(eps=0.5)),
    "momentum": ("BatchNorm2d", {}, put(momentum=0.7)),
    "momentum-None": ("BatchNorm2d", {}, put(momentum=None)),
    "momentum-number": ("BatchNorm2d", {"momentum": None}, put(momentum=0.7)),
    "eval": ("BatchNorm2d", {}, lambda layer: layer.eval()),
    "tracking": ("BatchNorm2d", {}, put(track_running_stats=False)),
    "no-statistics": ("BatchNorm2d", {}, bare),
    "no-weight": ("BatchNorm2d", {}, without("weight")),
    "no-bias": ("BatchNorm2d", {}, without("bias")),
    "weight": ("BatchNorm2d", {}, replaced),
    "a-weight": ("GroupNorm", {"affine": False}, put(weight=nn.Parameter(torch.randn(6)))),
    "constant-weight": ("BatchNorm2d", {}, lambda layer: layer.weight.requires_grad_(False)),
    "parametrized": ("BatchNorm2d", {}, doubled),
    "hook": ("BatchNorm2d", {}, hooked),
    "hook-before": ("BatchNorm2d", {}, hooked_before),
    "forward": ("BatchNorm2d", {}, replaced_forward),
    "activation": ("BatchNorm2d", {}, put(activation="relu")),
    "no-activation": ("BatchNorm2d", LEAKY, put(activation=None)),
    "slope": ("BatchNorm2d", LEAKY, put(leaky_relu_slope=0.3)),
    "alpha": ("LayerNorm", {"activation": "elu"}, put(elu_alpha=0.3)),
    "approximate": ("RMSNorm", {"activation": "gelu"}, put(gelu_approximate="tanh")),
    "frozen": ("BatchNorm2d", {}, put(statistics_frozen=True)),
    "thawed": ("BatchNorm2d", {"statistics_frozen": True}, put(statistics_frozen=False)),
    "ghosts": ("BatchNorm2d", {}, put(virtual_batch_size=2)),
    "renorm": ("BatchNorm2d", {}, put(renorm=True, rmax=1.2)),
    "axis": ("BatchNorm2d", {}, put(channel_axis=-1)),
    "instance-eps": ("InstanceNorm2d", AFFINE, put(eps=0.5)),
    "instance-momentum": ("InstanceNorm2d", TRACKING, put(momentum=0.7)),
    "instance-eval": ("InstanceNorm2d", TRACKING, lambda layer: layer.eval()),
    "instance-frozen": ("InstanceNorm2d", TRACKING, put(statistics_frozen=True)),
    "instance-weight": ("InstanceNorm2d", {}, put(weight=nn.Parameter(torch.randn(6)))),
    "group-eps": ("GroupNorm", {}, put(eps=0.5)),
    "groups": ("GroupNorm", {}, put(num_groups=3)),
    "group-activation": ("GroupNorm", {}, put(activation="silu")),
    "row-eps": ("LayerNorm", {}, put(eps=0.5)),
    "row-bias": ("LayerNorm", {}, without("bias")),
    "row-hook": ("LayerNorm", {}, hooked),
    "shape": ("LayerNorm", {"elementwise_affine": False}, put(normalized_shape=(5, 6))),
    "rms-eps": ("RMSNorm", {}, put(eps=0.5)),
    "rms-no-eps": ("RMSNorm", {"eps": 0.5}, put(eps=None)),
    "rms-weight": ("RMSNorm", {}, without("weight")),
    "rms-forward": ("RMSNorm", {}, replaced_forward),
}


def _size(changed: str) -> tuple[int, ...]:
    # channels both here and there
    return (4, 6, 5, 6) if changed == "axis" else LAYERS[CHANGES[changed][0]][1]


# hooks, as in torch's layers, where they are asked for
@torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
@pytest.mark.parametrize("changed", CHANGES)
def test_a_change_after_compilation_is_seen(changed: str) -> None:
    name, options, change = CHANGES[changed]
    eager = build(name, **options)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(nn.Sequential(layer), backend="aot_eager")
    for _ in range(2):
        x, grad = torch.randn(2, *_size(changed))
        assert alike(results(layer, compiled, x, grad), results(eager, eager, x, grad))
    unchanged = copy.deepcopy(eager)
    change(eager)
    change(layer)
    x, grad = torch.randn(2, *_size(changed))
    found, wanted = results(layer, compiled, x, grad), results(eager, eager, x, grad)
    assert alike(found, wanted)
    assert not alike(results(unchanged, unchanged, x, grad), wanted)


def test_a_nonfinite_batch_is_skipped_once_asked_for() -> None:
    layer = build("BatchNorm2d")
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(IMAGE)
    compiled(x)
    layer.skip_nonfinite = True
    before = [b.clone() for b in (layer.running_mean, layer.running_var)]
    compiled(x.clone().index_fill_(0, torch.tensor([1]), torch.nan))
    assert alike([layer.running_mean, layer.running_var], before)


def test_what_is_gathered_after_compilation() -> None:
    eager = build("BatchNorm2d")
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(3, *IMAGE)
    compiled(x[0])
    eager(x[0])
    for each, call in ((layer, compiled), (eager, eager)):
        with truenorm.accumulate(each):
            call(x[1])
            call(x[2])
    assert alike(list(layer.buffers()), list(eager.buffers()))


@MODES
def test_a_call_with_more_after_one_without(training: bool) -> None:
    eager = build("BatchNorm2d").train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend="aot_eager")
    x, per_sample = torch.randn(IMAGE), torch.randn(4, 6, 1, 1)
    mask = torch.rand(4, 5, 7) > 0.3
    beside: list[dict[str, Any]] = [
        {}, {"mask": mask}, {"mask": mask, "padding_value": 2.0}, {"residual": x.flip(0)},
        {"scale": per_sample, "shift": per_sample}, {"add": x.flip(1)},
    ]  # fmt: skip
    for given in beside:
        found, wanted = compiled(x, **given), eager(x, **given)
        pairs = zip(found, wanted, strict=True) if "add" in given else [(found, wanted)]
        for f, w in pairs:
            torch.testing.assert_close(f, w, msg=str(list(given)))
    assert alike(list(layer.buffers()), list(eager.buffers()))


@EVERY
def test_errors_after_a_call_that_was_in_order(name: str) -> None:
    layer = build(name)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(LAYERS[name][1])
    compiled(x)
    layer.eps = -1.0
    with pytest.raises(ValueError, match=r"eps must be (positive|non-negative).*-1\.0"):
        compiled(x)


def test_reverted_after_compilation() -> None:
    net = nn.Sequential(build("LayerNorm"))
    compiled = torch.compile(net, backend="aot_eager")
    x = torch.randn(ROWS) + 1e5
    assert torch.equal(compiled(x), net(x))
    truenorm.revert(net)
    theirs = nn.functional.layer_norm(x, (6,), net[0].weight, net[0].bias)
    assert torch.equal(compiled(x), theirs)
