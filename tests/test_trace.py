"""torch.jit.trace: torch's own operators, which do on any input what the layer does."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TRACKING, Case, randomize
from torch import Tensor, nn
from tracing import Inputs, assert_follows, trace, twins

import truenorm
import truenorm.functional as F

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
GRADIENTS = pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
LAYERS = [
    *CASES,
    Case("LocalResponseNorm", (3,), {"alpha": 0.3}, (2, 5, 7)),
    Case("LocalResponseNorm", (3,), {"alpha": 0.3}, (2, 5, 3, 4, 7)),
    Case("InstanceNorm1d", (5,), TRACKING, (5, 9)),
    Case("InstanceNorm3d", (3,), TRACKING, (2, 3, 4, 3, 5)),
    Case("GroupNorm", (9, 9), {}, (2, 9, 5)),
    Case("GroupNorm", (3, 9), {}, (2, 9)),
    Case("RMSNorm", ((7,),), {"eps": 0.1}, (3, 5, 7)),
    Case("BatchNorm2d", (5,), {"momentum": None}, (3, 5, 7, 9)),
    Case("BatchNorm2d", (5,), {"affine": False, "track_running_stats": False}, (3, 5, 7, 9)),
]


def random(shape: Any, offset: float = 0.5) -> Tensor:
    return torch.randn(shape) * 1.7 + offset


def others(case: Case) -> list[Inputs]:
    """Inputs of other batch sizes, and of other maps where the layer does not fix them."""
    shape = list(case.shape)
    unbatched = "Instance" in case.layer and len(shape) == int(case.layer[-2]) + 1
    found = [(random(shape),)]
    if not unbatched:
        found += [(random([n, *shape[1:]], 2.0),) for n in (shape[0] + 2, shape[0] + 1)]
    if len(shape) > 2 and case.layer not in ("LayerNorm", "RMSNorm"):
        found.append((random([*shape[:-1], shape[-1] + 3]),))
    return found


@GRADIENTS
@MODES
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: f"{case.id}-{len(case.kwargs)}")
def test_layers(case: Case, training: bool, gradients: bool) -> None:
    layer = case.build().train(training)
    traced, model = twins(layer, (case.input(),), gradients=gradients)
    assert_follows(traced, model, others(case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_statistics_move_as_torchs(case: Case) -> None:
    ours, theirs = case.pair()
    example = (case.input(),)
    traced, expected = (trace(layer, example) for layer in (ours, theirs))
    assert_follows(traced, expected, others(case))


def test_a_lazy_layer() -> None:
    layer = truenorm.LazyBatchNorm2d()
    layer(random((2, 5, 3, 4)))
    traced, model = twins(randomize(layer), (random((3, 5, 7, 9)),))
    assert_follows(traced, model, [(random((4, 5, 3, 3)),)])


# ---------------------------------------------------------------- options


class Calling(nn.Module):
    """A layer that is called with a second tensor, by the name `how`."""

    def __init__(self, norm: Any, how: str) -> None:
        super().__init__()
        self.norm, self.how = norm, how

    def forward(self, x: Tensor, more: Tensor) -> Tensor:
        given = {} if self.how == "residual" else {"padding_value": 2.5}
        return self.norm(x, **{self.how: more}, **given)  # type: ignore[no-any-return]


def second(x: Tensor, kind: str) -> Tensor:
    """A mask (of positions, of elements, of rows), lengths or a residual for x."""
    if kind == "residual":
        return torch.randn_like(x)
    if kind == "lengths":
        return torch.randint(2, x.shape[2] + 1, (len(x),))
    shapes = {"mask": (len(x), *x.shape[2:]), "elements": x.shape, "rows": x.shape[:-1]}
    mask = torch.rand(shapes[kind]) > 0.3
    mask[..., :2] = True
    return mask


def batch(**options: Any) -> Any:
    return randomize(truenorm.BatchNorm2d(5, **options))


def instance(**options: Any) -> Any:
    return randomize(truenorm.InstanceNorm2d(5, affine=True, **options))


def by_group(**options: Any) -> Any:
    return randomize(truenorm.GroupNorm(1, 5, **options))


IMAGES = [(3, 5, 7, 9), (5, 5, 7, 9), (2, 5, 8, 11)]
FLAT = [(3, 5, 9), (6, 5, 9), (4, 5, 12)]
TRACKED = {"track_running_stats": True}
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish")
OPTIONS: dict[str, Callable[[], Any]] = {
    **{f"activation-{name}": lambda name=name: batch(activation=name) for name in ACTIVATIONS},
    "channel_axis": lambda: randomize(truenorm.BatchNorm2d(9, channel_axis=-1)),
    "frozen": lambda: batch(statistics_frozen=True),
    "frozen-instance": lambda: instance(statistics_frozen=True, **TRACKED),
    "skip_nonfinite": lambda: batch(skip_nonfinite=True),
    "skip_nonfinite-instance": lambda: instance(skip_nonfinite=True, **TRACKED),
    "momentum-0": lambda: batch(momentum=0.0),
    "momentum-None-instance": lambda: instance(momentum=None, **TRACKED),
}


@GRADIENTS
@MODES
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, training: bool, gradients: bool) -> None:
    shapes = [(3, 7, 5, 9), (4, 8, 5, 9)] if option == "channel_axis" else IMAGES
    layer = OPTIONS[option]().train(training)
    traced, model = twins(layer, (random(shapes[0]),), gradients=gradients)
    assert_follows(traced, model, [(random(shape),) for shape in (*shapes, *shapes)])


@MODES
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_renorm(momentum: float | None, training: bool) -> None:
    layer = batch(renorm=True, momentum=momentum, activation="silu").train(training)
    # its output depends on running statistics, which the check's own calls have moved
    traced, model = twins(layer, (random(IMAGES[0]),), check_trace=False)
    assert_follows(traced, model, [(random(shape),) for shape in (*IMAGES, *IMAGES)])


def test_skipped_batches() -> None:
    traced, model = twins(batch(skip_nonfinite=True), (random(IMAGES[0]),))
    bad = random(IMAGES[1])
    bad[0, 0, 0, 0] = torch.inf
    before = {name: value.clone() for name, value in traced.named_buffers()}
    traced(bad)
    for name, value in traced.named_buffers():
        assert torch.equal(value, before[name]), name
    assert_follows(traced, model, [(random(IMAGES[2]),)])


@GRADIENTS
@MODES
@pytest.mark.parametrize("kind", ["mask", "elements", "residual"])
@pytest.mark.parametrize("build", [batch, instance, by_group], ids=["batch", "instance", "group"])
def test_a_second_tensor(build: Any, kind: str, training: bool, gradients: bool) -> None:
    how = kind.replace("elements", "mask")
    options = {"momentum": None, **TRACKED} if build is not by_group else {}
    model = Calling(build(activation="gelu", **options), how).train(training)
    inputs = [(x, second(x, kind)) for x in map(random, IMAGES)]
    assert_follows(*twins(model, inputs[0], gradients=gradients), inputs)


@MODES
@pytest.mark.parametrize("build", ["BatchNorm1d", "InstanceNorm1d", "GroupNorm"])
def test_lengths(build: str, training: bool) -> None:
    args = (1, 5) if build == "GroupNorm" else (5,)
    model = Calling(randomize(getattr(truenorm, build)(*args)), "lengths").train(training)
    inputs = [(x, second(x, "lengths")) for x in map(random, FLAT)]
    assert_follows(*twins(model, inputs[0]), inputs)


@pytest.mark.parametrize("kind", ["rows", "elements"])
@pytest.mark.parametrize("build", [truenorm.LayerNorm, truenorm.RMSNorm])
def test_masks_of_rows(build: Any, kind: str) -> None:
    model = Calling(randomize(build(9)), "mask")
    inputs = [(x, second(x, kind)) for x in map(random, [(3, 5, 9), (6, 4, 9)])]
    assert_follows(*twins(model, inputs[0]), inputs)


@MODES
@pytest.mark.parametrize("build", [batch, instance], ids=["batch", "instance"])
def test_half_precision_parameters_beside_wide_statistics(build: Any, training: bool) -> None:
    layer = build(**TRACKED).bfloat16().train(training)
    assert layer.running_var.dtype == torch.float32
    inputs = [(random(shape).bfloat16(),) for shape in IMAGES]
    traced, model = twins(layer, inputs[0])
    assert_follows(traced, model, inputs, within=2**-7)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "batch": lambda s, x: F.batch_norm(x, s.m, s.v, s.w, training=True),
    "batch-eval": lambda s, x: F.batch_norm(x, s.m, s.v, s.w),
    "batch-stats": lambda s, x: F.batch_norm_stats(x, s.w)[0],
    "batch-mask": lambda s, x: F.batch_norm(x, s.m, s.v, s.w, training=True, mask=x[:, 0] > 0),
    "instance": lambda s, x: F.instance_norm(x, s.m, s.v, s.w),
    "instance-eval": lambda s, x: F.instance_norm(x, s.m, s.v, s.w, use_input_stats=False),
    "group": lambda s, x: F.group_norm(x, 5, s.w),
    "layer": lambda s, x: F.layer_norm(x.movedim(1, -1), (5,), s.w),
    "rms": lambda s, x: F.rms_norm(x.movedim(1, -1), (5,), s.w),
    "response": lambda s, x: F.local_response_norm(x, 3) * s.w[0],
}


class Function(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_buffer("m", torch.randn(5))
        self.register_buffer("v", torch.rand(5) + 0.5)
        self.w = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](self, x)


@GRADIENTS
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, gradients: bool) -> None:
    traced, model = twins(Function(name), (random(IMAGES[0]),), gradients=gradients)
    assert_follows(traced, model, [(random(shape),) for shape in IMAGES])


# ---------------------------------------------------------------- what cannot be traced


@pytest.mark.parametrize(
    ("option", "value", "remedy"),
    [
        ("virtual_batch_size", 2, "set virtual_batch_size=None"),
        ("on_single", "running", 'set on_single="error"'),
        ("on_single", "skip", 'set on_single="error"'),
    ],
)
def test_what_asks_the_batch(option: str, value: Any, remedy: str) -> None:
    layer = batch(**{option: value})
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(NotImplementedError, match=rf"`{option}` \(={value!r}\).*eval.*{remedy}"):
        trace(layer, (random(IMAGES[0]),))
    for name, before in state.items():
        assert torch.equal(layer.get_buffer(name) if "num" in name else before, before)
    traced, model = twins(layer.eval(), (random(IMAGES[0]),))
    assert_follows(traced, model, [(random(IMAGES[1]),)])


def test_accumulating() -> None:
    layer = batch()
    message = "`truenorm.accumulate` gathers.*trace the model outside"
    with truenorm.accumulate(layer), pytest.raises(NotImplementedError, match=message):
        trace(layer, (random(IMAGES[0]),))


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = batch()
    monkeypatch.setattr(truenorm._core.exchange, "active_group", lambda group: "these")
    layer.process_group = "world"
    message = r"BatchNorm2d takes its statistics.*`process_group` \(='these'\).*eval\(\)"
    with pytest.raises(NotImplementedError, match=message):
        trace(layer, (random(IMAGES[0]),))
    traced, model = twins(layer.eval(), (random(IMAGES[0]),))
    assert_follows(traced, model, [(random(IMAGES[1]),)])


def test_scripting() -> None:
    model = nn.Sequential(nn.Conv2d(5, 5, 1), batch())
    with pytest.raises(NotImplementedError, match=r"torch.jit.script.*BatchNorm2d.*revert"):
        torch.jit.script(model)
    assert isinstance(model[1], truenorm.BatchNorm2d)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script.*group_norm.*torch.nn.func"):
        torch.jit.script(F.group_norm)


# ---------------------------------------------------------------- where truenorm is not installed


ALONE = """
import sys, torch
sys.modules["truenorm"] = None  # whoever imports it now fails
for path in sys.argv[1:]:
    x, y = torch.load(path + ".xy")
    error = ((torch.jit.load(path)(x) - y).norm() / y.norm()).item()
    assert error < 2e-5, (path, error)
print("done")
"""


def test_without_truenorm(tmp_path: Path) -> None:
    paths = []
    for i, case in enumerate(LAYERS):
        for training in (True, False):
            layer = case.build().train(training)
            path = str(tmp_path / f"{i}{training}.pt")
            traced = trace(copy.deepcopy(layer), (case.input(),))
            torch.jit.save(traced, path)
            (x,) = others(case)[-1]
            torch.save((x, layer(x)), path + ".xy")
            paths.append(path)
    command = [sys.executable, "-W", "ignore", "-c", ALONE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "done", done.stderr
