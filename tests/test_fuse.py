"""fuse and unfuse: what is found, what is left, and that a model stays what it was."""

from __future__ import annotations

import copy
import cProfile
import functools
import gc
import io
import operator
import os
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases import randomize
from tolerances import FLOAT32_BETWEEN, relative
from torch import Tensor, nn

import truenorm
from truenorm._core import eager


class Residual(nn.Module):
    """Blocks as they are written in the wild; `how` picks the way of adding and activating."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.down = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.act: nn.Module = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        out = self.conv1(x)
        if self.how == "module":
            out = self.bn2(self.conv2(self.act(self.bn1(out))))
            out += self.down(x)
            return self.act(out)
        if self.how == "function":
            out = self.bn2(self.conv2(F.leaky_relu(self.bn1(out), 0.2)))
            return F.gelu(torch.add(x, out), approximate="tanh")
        if self.how == "method":
            out = self.bn2(self.conv2(self.bn1(out).relu_()))
            return out.add_(x).relu()
        if self.how == "two norms":
            return F.silu(self.bn1(out) + self.bn2(self.conv2(x)))
        return F.elu(self.bn2(self.conv2(F.hardswish(self.bn1(out)))) + x, 0.5)


FOUND = {"module": 2, "function": 2, "method": 2, "two norms": 1, "elu": 2}


def pair(model: nn.Module) -> tuple[Any, Any]:
    """The model with truenorm's layers, and the same one fused."""
    theirs = truenorm.convert(randomize(model))
    ours = copy.deepcopy(theirs)
    assert truenorm.fuse(ours) is ours
    return theirs, ours


def calls(model: Callable[[Tensor], Any], x: Tensor) -> int:
    """How many layers' calls did more than the norm."""
    count = 0
    # not in forward, whose change `fuse` would notice
    layer = truenorm.nn._activation.Activated
    long_way: Any = layer._long_way
    short_way: Any = eager._with_more

    def longer(self: Any, *args: Any) -> Tensor:
        nonlocal count
        count += args[-1] is not None
        return long_way(self, *args)  # type: ignore[no-any-return]

    def shorter(*args: Any) -> Tensor | None:
        nonlocal count
        y = short_way(*args)
        count += y is not None
        return y  # type: ignore[no-any-return]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "_long_way", longer)
        patch.setattr(eager, "_with_more", shorter)
        model(x)
    return count


def same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i) for m, i in zip((one, other), inputs, strict=True)]
    assert relative(outputs[1], outputs[0]) < FLOAT32_BETWEEN
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[1].grad, inputs[0].grad) < FLOAT32_BETWEEN
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        if left.grad is None or right.grad is None:
            continue
        # a bias before a norm has no gradient but rounding
        scale = right.grad.norm() + grad.norm()
        assert (left.grad - right.grad).norm() < FLOAT32_BETWEEN * scale
    for left, right in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", FOUND)
def test_blocks(how: str, training: bool) -> None:
    as_it_was, fused = pair(Residual(how))
    x = torch.randn(2, 6, 9, 7)
    as_it_was.train(training), fused.train(training)
    assert calls(copy.deepcopy(fused), x) == FOUND[how]
    assert type(fused) is not Residual
    assert isinstance(fused, Residual)
    assert repr(fused) == repr(as_it_was)
    assert list(fused.state_dict()) == list(as_it_was.state_dict())
    same(as_it_was, fused, x)
    assert truenorm.unfuse(fused) is fused
    assert type(fused) is Residual
    assert calls(copy.deepcopy(fused), x) == 0
    same(as_it_was, fused, x)


@pytest.mark.parametrize(
    "make",
    [
        nn.ReLU, nn.ReLU6, lambda: nn.LeakyReLU(0.3), lambda: nn.ELU(0.5), nn.GELU,
        lambda: nn.GELU("tanh"), nn.SiLU, nn.Hardswish,
    ],
)  # fmt: skip
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda c: nn.GroupNorm(2, c)])
def test_sequences(norm: Callable[[int], nn.Module], make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), norm(6), make(), nn.Sequential(norm(6), make()))
    as_it_was, fused = pair(model)
    x = torch.randn(2, 6, 9, 7)
    assert calls(copy.deepcopy(fused), x) == 2
    same(as_it_was, fused, x)


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Looks into its tensor, as transformers' MobileNetV2 does for its padding."""
    extra = 1 if x.shape[-1] % conv.kernel_size[0] else 0
    return F.pad(x, (0, extra))


class Helped(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(self.conv1(padded(x, self.conv1))))


def test_a_helper_stays_a_call() -> None:
    as_it_was, fused = pair(Helped("module"))
    for size in (9, 7):  # the one is padded, the other not
        x = torch.randn(2, 6, 5, size)
        assert calls(copy.deepcopy(fused), x) == 1
        assert fused(x).shape == as_it_was(x).shape
        same(as_it_was, fused, x)


def test_dropout_of_nothing_stands_in_no_way() -> None:
    layers = [nn.BatchNorm2d(6), nn.Dropout(0.0), nn.Identity(), nn.ReLU()]
    as_it_was, fused = pair(nn.Sequential(*layers))
    x = torch.randn(2, 6, 9, 7)
    assert calls(copy.deepcopy(fused), x) == 1
    same(as_it_was, fused, x)
    _, dropping = pair(nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU()))
    assert calls(dropping, x) == 0


class DefaultOfItsOwn(Residual):
    def forward(self, x: Tensor, more: Any = ()) -> Any:
        return super().forward(x)


class ByTraining(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) if self.training else self.bn1(x)


class ByValue(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) if x.sum() > 0 else x


class UsedTwice(Residual):
    def forward(self, x: Tensor) -> Any:
        out = self.bn1(x)
        return self.act(out.clone()) + out


class OntoTheOther(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.conv1(x)
        kept = y
        y += self.bn1(x)
        return F.relu(y) + kept


class InputOverwritten(Residual):
    def forward(self, x: Tensor) -> Any:
        y = x.detach().clone()
        z = self.bn1(y)
        y.add_(1.0)
        return F.relu(z + y) + x


class InAMode(Residual):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.conv1(x)
        return self.act(self.bn1(x + y))


class Remembers(Residual):
    calls, seen = 0, None

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.seen = self.act(self.bn1(x))
        return self.seen


class Constant(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) + torch.arange(7.0)


class Random(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn1(x))
        return y if random.random() < 2.0 else x


class ByGradients(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) if torch.is_grad_enabled() else self.bn1(x)


class ByType(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.bn1(x) if type(x) is Tensor else self.act(self.bn1(x))


class ByTypeOfAValue(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.bn1(x) if isinstance(x.double(), Tensor) else self.act(self.bn1(x))


class ByCaughtError(Residual):
    def forward(self, x: Tensor) -> Any:
        try:
            y = self.bn1(x) if x.sum() > -1e9 else x
        except torch.fx.proxy.TraceError:
            y = self.bn1(x)
        return self.act(y)


class ByBuffer(Residual):
    def forward(self, x: Tensor) -> Any:
        if self.bn1.num_batches_tracked == 1:
            return x
        return self.act(self.bn1(x))


class ByParameters(Residual):
    def forward(self, x: Tensor) -> Any:
        if next(self.parameters()).dtype == torch.float64:
            return x
        return self.act(self.bn1(x))


class ByEnvironment(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) if "PLAIN" not in os.environ else x


class Prints(Residual):
    def forward(self, x: Tensor) -> Any:
        print(end="")
        return self.act(self.bn1(x))


SEEN: list[Any] = []


class Lists(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn1(x))
        SEEN.append(0)
        return y


class ListsItsOwn(Residual):
    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn1(x))
        self.seen.append(0)
        return y


class ResidualOverwritten(Residual):
    def forward(self, x: Tensor) -> Any:
        y = x * 1.0
        z = self.bn1(x) + y
        y.add_(1.0)
        return F.relu(z) + y


class OverwrittenThroughAView(Residual):
    def forward(self, x: Tensor) -> Any:
        y = x.detach().clone()
        z = self.bn1(y)
        y.view(-1).add_(1.0)
        return F.relu(z + y) + x


class ByHasattr(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.bn1(x) if hasattr(x, "logits") else self.act(self.bn1(x))


class ByGetattr(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.bn1(x)
        return y if getattr(y, "_scale", None) is not None else self.act(y)


class ByCallable(Residual):
    def forward(self, x: Any) -> Any:
        return self.act(self.bn1(x() if callable(x) else x))


class WritesOut(Residual):
    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x)) if f"{x.dim()}" == "4" else self.bn1(x)


class SetsOnAValue(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.act(self.bn1(x))
        y.data = x + 1.0
        return y


class OwnGELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2.0


class OwnActivation(Residual):
    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.act = OwnGELU()

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x))


class OwnNorm(truenorm.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input) * 2.0


class OwnLayer(Residual):
    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.bn1 = OwnNorm(6)

    def forward(self, x: Tensor) -> Any:
        return self.act(self.bn1(x))


LEFT_ALONE = [
    DefaultOfItsOwn,
    ByTraining,
    ByValue,
    UsedTwice,
    OntoTheOther,
    InputOverwritten,
]
LEFT_ALONE += [InAMode, Remembers, Constant, Random, ByGradients, ByType, ByTypeOfAValue]
LEFT_ALONE += [ByCaughtError, ByBuffer, ByParameters, ByEnvironment, Prints, Lists, ListsItsOwn]
LEFT_ALONE += [ByHasattr, ByGetattr, ByCallable, WritesOut, SetsOnAValue]
LEFT_ALONE += [ResidualOverwritten, OverwrittenThroughAView, OwnActivation, OwnLayer]


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_is_left_alone(kind: type[Residual]) -> None:
    as_it_was, fused = pair(kind("module"))
    assert type(fused) is kind
    x = torch.randn(2, 6, 9, 7)
    assert set(vars(fused)) == set(vars(as_it_was))
    assert not SEEN
    assert not getattr(fused, "seen", None)
    assert calls(copy.deepcopy(fused), x) == 0
    SEEN.clear()
    # which have no gradient; which is not copied
    if kind not in (InputOverwritten, OverwrittenThroughAView, Remembers, SetsOnAValue):
        same(as_it_was, fused, x)
    torch.testing.assert_close(fused.eval()(x), as_it_was.eval()(x))
    SEEN.clear()


IN_PLACE = {
    "floor division": lambda y, x: operator.ifloordiv(y, 2.0),
    "remainder": lambda y, x: operator.imod(y, 2.0),
    "and": lambda y, x: operator.iand(y, x < 1.0),
    "or": lambda y, x: operator.ior(y, x < 1.0),
    "exclusive or": lambda y, x: operator.ixor(y, x < 1.0),
    "left": lambda y, x: operator.ilshift(y, 2),
    "right": lambda y, x: operator.irshift(y, 1),
    "power": lambda y, x: operator.ipow(y, 3.0),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_operators_in_place_write_where_others_see_it(name: str) -> None:
    """Python's y //= 2, y &= mask and so on, of a tensor that is known by another name too."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.LayerNorm(8), nn.GELU()

        def forward(self, x: Tensor) -> Any:
            y = x > 0.0 if name in ("and", "or", "exclusive or") else x + 0.0
            y = (16.0 * y).int() if name in ("left", "right") else y
            kept = y
            y = in_place(y, x)
            return self.act(self.norm(x)) * kept

    in_place = IN_PLACE[name]
    as_it_was, fused = pair(Writes())
    x = torch.randn(2, 4, 8)
    assert calls(fused, x) == 1
    assert relative(fused(x), as_it_was(x)) < FLOAT32_BETWEEN


def test_a_forward_of_no_module_that_python_knows() -> None:
    scope: dict[str, Any] = {"__name__": "made_by_exec", "nn": nn}
    source = "def forward(self, x):\n    return self[1](self[0](x)) if x.sum() > -1e9 else x\n"
    exec(source, scope)
    kind = type("Made", (nn.Sequential,), {"forward": scope["forward"]})
    model = truenorm.convert(kind(nn.LayerNorm(8), nn.GELU()))
    assert type(truenorm.fuse(model)) is kind


def test_hooks_keep_a_layer() -> None:
    model = truenorm.convert(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.min()))
    truenorm.fuse(model)(torch.randn(2, 6, 9, 7))
    assert seen[0] < 0


def test_a_broadcast_sum_is_torchs() -> None:
    class Broadcast(Residual):
        def forward(self, x: Tensor, shift: Tensor) -> Any:
            return F.relu(self.bn1(x) + shift)

    as_it_was, fused = pair(Broadcast("module"))
    assert type(fused) is not Broadcast
    x = torch.randn(2, 6, 9, 7)
    for shift in (torch.randn(6, 1, 1), torch.randn(2, 6, 9, 7).double()):
        torch.testing.assert_close(fused(x, shift), as_it_was(x, shift))


def test_copies_and_pickles() -> None:
    as_it_was, fused = pair(nn.Sequential(Residual("module"), Residual("function")))
    x = torch.randn(2, 6, 9, 7)
    twin = copy.deepcopy(fused)
    assert type(twin[0]) is type(fused[0])
    assert twin[0].bn1 is not fused[0].bn1
    same(as_it_was, twin, x)
    file = io.BytesIO()
    pickle.dump(fused, file)
    file.seek(0)
    read = pickle.load(file)
    assert type(read[0]) is Residual
    same(copy.deepcopy(fused), read, x)


def test_what_a_class_says_about_copies_stands() -> None:
    class Forgetful(Residual):
        def __getstate__(self) -> Any:
            state = dict(vars(self))
            state["cache"] = None
            return state

    _, fused = pair(Forgetful("module"))
    fused.cache = lambda: 0
    twin = copy.deepcopy(fused)
    assert twin.cache is None
    assert type(twin) is type(fused)
    assert calls(twin, torch.randn(2, 6, 9, 7)) == 2


def test_a_list_of_subclasses_is_left_alone() -> None:
    class Listed(Residual):
        known: ClassVar[dict[str, type]] = {}

        def __init_subclass__(cls, *, needed: int) -> None:
            Listed.known[cls.__name__] = cls

    _, fused = pair(Listed("module"))
    assert type(fused) is not Listed
    assert not Listed.known


def test_a_profiler_goes_on() -> None:
    profiler = cProfile.Profile()
    with profiler:
        _, fused = pair(Residual("module"))
        assert calls(fused, torch.randn(2, 6, 9, 7)) == 2


def test_inputs_that_are_no_tensors() -> None:
    class Maybe(Residual):
        def forward(self, x: Tensor, more: Any) -> Any:
            y = self.bn1(x)
            if isinstance(x, (list, tuple)):
                return x
            return self.act(y if more is None else y + more)

    as_it_was, fused = pair(Maybe("module"))
    x = torch.randn(2, 6, 9, 7)
    for more, found in ((torch.randn(2, 6, 9, 7), 1), (None, 0), (2.0, 0)):
        twin = copy.deepcopy(fused)
        assert calls(functools.partial(twin, more=more), x) == found
        torch.testing.assert_close(fused(x, more), as_it_was(x, more))
    with pytest.raises(TypeError, match=r"Maybe.forward\(\) missing 1 required positional"):
        fused(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_other_readers_see_the_forward_as_written() -> None:
    as_it_was, fused = pair(Residual("module"))
    x, other = torch.randn(2, 6, 9, 7), torch.randn(3, 6, 5, 4)
    as_it_was.eval(), fused.eval()
    graphs = [torch.fx.symbolic_trace(m) for m in (as_it_was, fused)]
    assert str(graphs[0].graph) == str(graphs[1].graph)
    torch.testing.assert_close(graphs[1](other), as_it_was(other))
    with torch.no_grad():
        traced = torch.jit.trace(fused, x)
        torch.testing.assert_close(traced(x), as_it_was(x))
    for strict in (True, False):
        exported = torch.export.export(fused, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), as_it_was(x))


def test_compiled() -> None:
    as_it_was, fused = pair(nn.Sequential(Residual("module"), Residual("elu")))
    x = torch.randn(2, 6, 9, 7)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), as_it_was(x))


def test_revert_and_fold_unfuse() -> None:
    as_it_was, fused = pair(Residual("module"))
    x = torch.randn(2, 6, 9, 7)
    folding = truenorm.fold(fused.eval())
    assert len(folding.folded) == 3
    torch.testing.assert_close(folding.model(x), as_it_was.eval()(x), rtol=1e-4, atol=1e-4)
    assert type(fused) is not Residual
    truenorm.revert(fused)
    assert type(fused) is Residual
    assert type(fused.bn1) is nn.BatchNorm2d
    torch.testing.assert_close(fused(x), as_it_was(x))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`model` has no truenorm layer: call truenorm.convert"):
        truenorm.fuse(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    with pytest.raises(TypeError, match="`model`"):
        truenorm.fuse("model")  # type: ignore[type-var]
    with pytest.raises(TypeError, match="`model`"):
        truenorm.unfuse(None)  # type: ignore[type-var]


# ---------------------------------------------------------------- what others wrote


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """A network, its input, and how many calls `fuse` finds at least."""

    def resnet() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
        )

        class Last(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = transformers.ResNetModel(config)

            def forward(self, x: Tensor) -> Any:
                return self.net(x).last_hidden_state

        return Last()

    def unet() -> nn.Module:
        nets = pytest.importorskip("monai.networks.nets")
        return nets.DynUNet(
            2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8], res_block=True
        )  # type: ignore[no-any-return]

    return {
        "ResNet": (resnet, (2, 3, 32, 32), 5),
        "DynUNet": (unet, (2, 1, 16, 16), 10),
    }


@pytest.mark.parametrize("name", ["ResNet", "DynUNet"])
def test_networks(name: str) -> None:
    build, shape, least = networks()[name]
    as_it_was, fused = pair(build())
    x = torch.randn(shape)
    assert calls(copy.deepcopy(fused), x) >= least
    same(as_it_was, fused, x)


# ---------------------------------------------------------------- recompute_outputs


@pytest.mark.parametrize("how", FOUND)
def test_recomputed_gradients_are_the_same_bits(how: str) -> None:
    _, fused = pair(nn.Sequential(Residual(how), Residual(how), Residual(how)))
    twin = copy.deepcopy(fused)
    x = torch.randn(2, 6, 9, 7)
    grad = torch.randn(2, 6, 9, 7)
    with truenorm.recompute_outputs():
        y = twin(x)
    expected = fused(x)
    assert torch.equal(y, expected)
    y.backward(grad)
    expected.backward(grad)
    for left, right in zip(twin.parameters(), fused.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None)
        assert left.grad is None or torch.equal(left.grad, right.grad)
    for left, right in zip(twin.buffers(), fused.buffers(), strict=True):
        assert torch.equal(left, right)


def test_recomputed_outputs_are_not_kept() -> None:
    layer = truenorm.BatchNorm2d(6, activation="silu")
    conv = nn.Conv2d(6, 6, 3)
    x = torch.randn(2, 6, 9, 7, requires_grad=True)

    def is_kept() -> bool:
        y = layer(x * 2)
        lives = weakref.ref(y)
        z = conv(y)
        del y
        gc.collect()
        assert z.grad_fn is not None
        return lives() is not None

    assert is_kept()
    with truenorm.recompute_outputs():
        assert not is_kept()


def test_recomputing_notices_a_change_in_place() -> None:
    model = nn.Sequential(truenorm.BatchNorm2d(6, activation="relu"), nn.Conv2d(6, 6, 3))
    x = torch.randn(2, 6, 9, 7)
    with truenorm.recompute_outputs():
        loss = model(x).square().mean()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="is to be recomputed from has been modified by an in"):
        loss.backward()


def test_recomputing_twice_differentiable_and_fixed() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Conv2d(6, 2, 3))
    _, fused = pair(model.double())
    for training in (True, False):
        fused.train(training)
        found = []
        for recompute in (False, True):
            x = torch.linspace(-1, 1, 2 * 6 * 9 * 7, dtype=torch.float64).view(2, 6, 9, 7)
            x.requires_grad_()
            if recompute:
                with truenorm.recompute_outputs():
                    y = fused(x.sin())
            else:
                y = fused(x.sin())
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), x)[0])
        torch.testing.assert_close(*found)


class WithOptions(Residual):
    def forward(self, x: Tensor, mask: Any = None, scale: float = 1.0, how: str = "plain") -> Any:
        y = self.act(self.bn1(self.conv1(x)))
        if mask is not None:
            y = y * mask
        return y * scale if how == "plain" else -y


def test_optional_arguments_that_a_call_leaves_out() -> None:
    as_it_was, fused = pair(WithOptions("module"))
    assert type(fused) is not WithOptions
    x, mask = torch.randn(2, 6, 9, 7), torch.randn(2, 6, 9, 7)
    same(as_it_was, fused, x)
    found = []
    for given in (
        {},
        {"mask": mask},
        {"scale": 0.5},
        {"how": "other"},
        {"scale": True},
        {"scale": 1},
    ):
        torch.testing.assert_close(fused(x, **given), as_it_was(x, **given))
        found.append(calls(lambda x, given=given: fused(x, **given), x))  # type: ignore[misc]
    assert found == [1, 0, 1, 0, 1, 1]  # a factor is handed on, whatever it is
    assert calls(lambda x: fused(x, None, 1.0), x) == 1
    assert calls(lambda x: fused(x, mask), x) == 0
    with pytest.raises(TypeError, match=r"forward\(\) got an unexpected keyword argument 'other'"):
        fused(x, other=1)
    torch.testing.assert_close(copy.deepcopy(fused)(x, mask), as_it_was(x, mask))


# ---------------------------------------------------------------- scale and shift


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class DiTBlock(nn.Module):
    """A diffusion transformer's, without its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(24, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(24)
        self.mix, self.mlp = nn.Linear(24, 24), nn.Linear(24, 24)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(24, 6 * 24))

    def forward(self, x: Tensor, c: Tensor) -> Any:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.mix(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FiLM(nn.Module):
    """A diffusion U-Net's block; `how` picks the way it is written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.act = how, nn.GroupNorm(3, 6), nn.SiLU()
        self.to_scale, self.to_shift = nn.Linear(24, 6), nn.Linear(24, 6)

    def forward(self, x: Tensor, c: Tensor) -> Any:
        scale, shift = (t(c)[:, :, None, None] for t in (self.to_scale, self.to_shift))
        h = self.norm(x)
        if self.how == "operators":
            return self.act(h * (scale + 1.0) + shift)
        if self.how == "methods":
            return F.relu(h.mul(scale.add(1)).add_(shift))
        if self.how == "in place":
            h *= 1 + scale
            h += shift
            return F.silu(h)
        if self.how == "functions":
            return torch.add(shift, torch.mul(torch.add(1, scale), h))
        if self.how == "scale alone":
            return torch.tanh((1 + scale) * h)
        by = 1 + scale  # used again
        return (h * by + shift) * by


MODULATED = ("operators", "methods", "in place", "functions", "scale alone", "used again")


def modulated_calls(model: nn.Module, *inputs: Tensor) -> int:
    """How many scales and shifts were a layer's own."""
    count = 0
    patched = truenorm._models.fusing.patterns
    original = patched._against
    with pytest.MonkeyPatch.context() as patch:

        def against(t: Any, x: Any) -> Any:
            nonlocal count
            found = original(t, x)
            count += found is not None
            return found

        patch.setattr(patched, "_against", against)
        model(*inputs)
    return count


def test_a_transformers_blocks_scale_and_shift() -> None:
    as_it_was, fused = pair(DiTBlock())
    x, c = torch.randn(2, 7, 24), torch.randn(2, 24)
    assert modulated_calls(fused, x, c) == 4
    assert modulated_calls(as_it_was, x, c) == 0
    torch.testing.assert_close(fused(x, c), as_it_was(x, c), rtol=1e-5, atol=1e-5)
    inputs = [(x.clone().requires_grad_(), c.clone().requires_grad_()) for _ in range(2)]
    grad = torch.randn(2, 7, 24)
    for model, given in zip((as_it_was, fused), inputs, strict=True):
        model(*given).backward(grad)
    for one, other in zip(*inputs, strict=True):
        assert relative(other.grad, one.grad) < FLOAT32_BETWEEN
    for one, other in zip(as_it_was.parameters(), fused.parameters(), strict=True):
        assert relative(other.grad, one.grad) < FLOAT32_BETWEEN
    truenorm.unfuse(fused)
    assert type(fused) is DiTBlock


@pytest.mark.parametrize("how", MODULATED)
def test_forms_of_scale_and_shift(how: str) -> None:
    as_it_was, fused = pair(FiLM(how))
    x, c = torch.randn(3, 6, 5, 4), torch.randn(3, 24)
    assert modulated_calls(fused, x, c) == (1 if how == "scale alone" else 2)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [m(i, c) for m, i in zip((as_it_was, fused), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(grad)
    assert relative(inputs[1].grad, inputs[0].grad) < FLOAT32_BETWEEN


def test_scale_and_shift_broadcast_and_promote_as_torchs() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(5)

        def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Any:
            return self.norm(x) * (1 + scale) + shift

    as_it_was, fused = pair(Free())
    x = torch.randn(4, 4, 5)
    for shape in ((5,), (4, 5), (4, 1, 5), (1, 4, 1), (2, 1, 4, 5), ()):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            scale, shift = (torch.randn(shape).to(dtype) for _ in range(2))
            y, wanted = fused(x, scale, shift), as_it_was(x, scale, shift)
            assert y.dtype == wanted.dtype
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        given = x, torch.randn(4, 5), torch.randn(4, 5)
        assert fused(*given).dtype == as_it_was(*given).dtype
    torch.testing.assert_close(fused(x, 2.0, 3), as_it_was(x, 2.0, 3))


def test_a_scale_that_is_overwritten_is_left_alone() -> None:
    class Overwrites(FiLM):
        def forward(self, x: Tensor, c: Tensor) -> Any:
            scale, shift = (t(c)[:, :, None, None] for t in (self.to_scale, self.to_shift))
            by = 1 + scale
            scale.zero_()
            return self.norm(x) * by + shift

    as_it_was, fused = pair(Overwrites("operators"))
    x, c = torch.randn(3, 6, 5, 4), torch.randn(3, 24)
    with torch.no_grad():
        assert modulated_calls(fused, x, c) == 0
        torch.testing.assert_close(fused(x, c), as_it_was(x, c))


# ---------------------------------------------------------------- a tensor that is taken apart


class Attends(nn.Module):
    """Queries, keys and values as the rows of one tensor, taken out by `q, k, v = …`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(24), nn.GELU()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.norm(x))
        q, k, v = self.qkv(h).unflatten(-1, (3, 24)).permute(2, 0, 1, 3)
        return self.out((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def nodes_of(y: Tensor) -> set[str]:
    """Names of the nodes of its gradient's graph."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [n for n, _ in node.next_functions]
    return {node.name() for node in found}


def test_a_tensor_is_taken_apart_by_one_operator() -> None:
    as_it_was, fused = pair(Attends())
    x = torch.randn(2, 7, 24)
    assert calls(fused, x) == 1
    same(as_it_was, fused, x)
    for model in (as_it_was, fused):
        # an index's gradient is a tensor of zeros with the part in it, for each part
        names = nodes_of(model(x))
        assert "UnbindBackward0" in names
        assert "SelectBackward0" not in names


def test_a_tensor_of_another_size_is_not_taken_apart() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.LayerNorm(5), nn.ReLU()

        def forward(self, x: Tensor) -> Any:
            one, other = x
            return self.act(self.norm(one)) + other

    as_it_was, fused = pair(Halves())
    same(as_it_was, fused, torch.randn(2, 3, 5))
    for model in (as_it_was, fused):
        for size, why in ((3, "too many"), (1, "not enough")):
            with pytest.raises(ValueError, match=f"{why} values to unpack"):
                model(torch.randn(size, 3, 5))
