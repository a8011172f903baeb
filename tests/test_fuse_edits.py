"""Whatever is changed in a fused model, it computes what the model then says."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import randomize
from processes import processes
from test_fuse import calls, same
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import truenorm

LIMIT = 6.0
TABLE = {"slope": 0.3}


def clip(x: Tensor) -> Tensor:
    return F.hardtanh(x, -LIMIT, LIMIT)


class Settings:
    first = True


class Block(nn.Module):
    gain = 2.0
    settings = Settings()

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True)
        self.down: nn.Module | None = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
        self.act: nn.Module = nn.LeakyReLU(0.2)
        self.order: list[str] = ["norm", "act"]
        self.options: dict[str, Any] = {"double": {"yes": True}}
        self.times = 1
        self.register_buffer("shift", torch.randn(6, 1, 1))

    def last(self, x: Tensor) -> Tensor:
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = self.act(out) if "act" in self.order else out
        for _ in range(self.times):
            out = self.bn2(self.conv2(out))
        out = out + (x if self.down is None else self.down(x))
        out = self.last(out)
        if self.options["double"]["yes"]:
            out = out * self.gain
        return clip(out + self.shift) * TABLE["slope"]


class Helped(Block):
    """Asks an object of its own, as layers of transformers ask their configuration."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        return self.act(out) if self.settings.first else out


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


class Between(nn.Module):
    """Its norm could be called after its second activation, as long as that leaves the input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act1, self.act2 = nn.BatchNorm2d(6), nn.ReLU(), nn.ReLU()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.same = self.scale

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        z = self.bn(y)
        return self.act1(z + self.act2(y))


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act, self.other = nn.BatchNorm2d(6), nn.ReLU(), nn.ReLU()
        self.kind: nn.Module = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(x))
        if isinstance(self.other, nn.ReLU):
            y = y * 2.0
        match self.kind:
            case nn.ReLU():
                y = y + 1.0
        return y


def build() -> Any:
    stem = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.0), nn.GELU(),
        nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.Identity(), nn.ELU(0.5),
    )  # fmt: skip
    model = nn.Sequential(stem, Block(), Helped(), Listed(), Between(), Asks())
    return truenorm.convert(randomize(model))


def pair() -> tuple[Any, Any]:
    as_it_was = build()
    return as_it_was, truenorm.fuse(copy.deepcopy(as_it_was))


FUSED = 2 + 2 + 1 + 1 + 1 + 1  # stem, block, helped, list, between, asks

Edit = Callable[[Any], Any]
EDITS: dict[str, Edit] = {}
UNDO: list[Callable[[], None]] = []


def edit(function: Edit) -> Edit:
    EDITS[function.__name__] = function
    return function


@pytest.fixture(autouse=True)
def undone() -> Any:
    """What an edit changes outside of its model is put back; float64 shows the least difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    while UNDO:
        UNDO.pop()()


def put(owner: Any, name: str, value: Any) -> None:
    """As the two models share classes and files, the second one finds it done."""
    before = vars(owner)[name]
    UNDO.append(lambda: setattr(owner, name, before))
    setattr(owner, name, value)


def fixed(module: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return truenorm.convert(nn.Sequential(randomize(module)))[0]


@edit
def append(m: Any) -> None:
    m[0].append(nn.Tanh())


@edit
def extend(m: Any) -> None:
    m[0].extend([nn.Tanh(), fixed(nn.BatchNorm2d(6)), nn.ReLU()])


@edit
def insert_before_the_activation(m: Any) -> None:
    m[0].insert(3, nn.Tanh())


@edit
def another_item(m: Any) -> None:
    m[0][3] = nn.Sigmoid()


@edit
def identity_for_the_norm(m: Any) -> None:
    m[0][1] = nn.Identity()


@edit
def identity_for_an_activation(m: Any) -> None:
    m[0][7] = nn.Identity()


@edit
def another_norm(m: Any) -> None:
    m[0][5] = fixed(nn.GroupNorm(3, 6))


@edit
def torchs_norm(m: Any) -> None:
    theirs = nn.BatchNorm2d(6)
    theirs.load_state_dict(m[0][1].state_dict())
    m[0][1] = theirs


@edit
def delete_last(m: Any) -> None:
    del m[0][-1]


@edit
def pop(m: Any) -> None:
    m[0].pop(3)


@edit
def a_slice(m: Any) -> None:
    m[0] = m[0][:6]


@edit
def slices_joined(m: Any) -> None:
    m[0] = m[0][:4] + m[0][4:]


@edit
def reordered(m: Any) -> None:
    m[0] = type(m[0])(*reversed(list(m[0])))


@edit
def order_of_the_dictionary(m: Any) -> None:
    moved = m[0]._modules.pop("1")
    m[0]._modules["1"] = moved


@edit
def another_activation(m: Any) -> None:
    m[1].act = nn.GELU()


@edit
def no_downsampling(m: Any) -> None:
    m[1].down = None


@edit
def slope(m: Any) -> None:
    m[1].act.negative_slope = 0.7


@edit
def alpha(m: Any) -> None:
    m[0][7].alpha = 1.5


@edit
def approximate(m: Any) -> None:
    m[0][3].approximate = "tanh"


@edit
def dropout(m: Any) -> None:
    m[0][2].p = 1.0


@edit
def hook_on_the_norm(m: Any) -> None:
    m[1].bn1.register_forward_hook(lambda module, args, output: output + 1.0)


@edit
def hook_on_the_activation(m: Any) -> None:
    m[1].act.register_forward_pre_hook(lambda module, args: (args[0] - 0.5,))


@edit
def hook_on_what_was_dropped(m: Any) -> None:
    m[0][6].register_forward_hook(lambda module, args, output: output * 3.0)


@edit
def hook_on_a_convolution(m: Any) -> None:
    m[1].conv1.register_forward_hook(lambda module, args, output: output * 3.0)


@edit
def hook_on_the_block(m: Any) -> None:
    m[1].register_forward_hook(lambda module, args, output: output * 3.0)


@edit
def hook_on_all(m: Any) -> None:
    def halve(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output * 0.5 if isinstance(module, nn.GELU) else None

    if not UNDO:
        UNDO.append(nn.modules.module.register_module_forward_hook(halve).remove)


@edit
def backward_hook(m: Any) -> None:
    m[1].act.register_full_backward_hook(lambda module, given, of: (given[0] * 2.0,))


@edit
def forward_of_the_activation(m: Any) -> None:
    m[1].act.forward = torch.tanh


@edit
def forward_of_the_norm(m: Any) -> None:
    m[1].bn2.forward = torch.tanh


@edit
def forward_of_the_block(m: Any) -> None:
    m[1].forward = lambda x: x * 2.0


@edit
def forward_wrapped(m: Any) -> None:
    m[1]._old_forward = m[1].forward
    m[1].forward = types.MethodType(lambda self, x: self._old_forward(x * 2.0), m[1])


@edit
def forward_of_a_class(m: Any) -> None:
    put(Block, "forward", lambda self, x: self.conv1(x))


@edit
def forward_of_a_class_of_activations(m: Any) -> None:
    put(nn.ELU, "forward", lambda self, x: x.tanh())


@edit
def method_of_the_class(m: Any) -> None:
    put(Block, "last", lambda self, x: x.tanh())


@edit
def method_of_the_object(m: Any) -> None:
    m[1].last = torch.tanh


@edit
def classes_that_are_asked_for(m: Any) -> None:
    m[3].steps[1].__class__ = type("Mine", (truenorm.BatchNorm2d,), {})
    m[5].other.__class__ = nn.Tanh


@edit
def a_class_that_is_matched(m: Any) -> None:
    m[5].kind.__class__ = nn.Tanh


@edit
def attribute(m: Any) -> None:
    m[1].times = 2


@edit
def attribute_of_the_class(m: Any) -> None:
    put(Block, "gain", -1.0)


@edit
def attribute_over_the_classs(m: Any) -> None:
    m[1].gain = -1.5


@edit
def item_of_a_list(m: Any) -> None:
    m[1].order.clear()


@edit
def item_of_a_dictionary_within(m: Any) -> None:
    m[1].options["double"]["yes"] = False


@edit
def a_helper_object(m: Any) -> None:
    put(Settings, "first", False)


@edit
def another_helper_object(m: Any) -> None:
    m[2].settings = type("Other", (), {"first": False})()


@edit
def an_attribute_of_the_helper_object(m: Any) -> None:
    m[2].settings = copy.copy(Block.settings)
    truenorm.fuse(m) if isinstance(m[0], truenorm._models.fusing.classes.Fused) else None
    m[2].settings.first = False


@edit
def a_function_of_the_file(m: Any) -> None:
    put_global("clip", torch.sin)


@edit
def a_number_of_the_file(m: Any) -> None:
    put_global("LIMIT", 0.25)


@edit
def an_item_of_the_files_table(m: Any) -> None:
    before = TABLE["slope"]
    UNDO.append(lambda: TABLE.update(slope=before))
    TABLE["slope"] = 0.9


@edit
def a_buffer(m: Any) -> None:
    m[1].shift = torch.arange(6.0).view(6, 1, 1)


@edit
def a_buffer_in_place(m: Any) -> None:
    m[1].shift.zero_()


@edit
def parameters_in_place(m: Any) -> None:
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(0.5)


@edit
def another_parameter(m: Any) -> None:
    m[1].bn1.weight = nn.Parameter(torch.arange(6.0) - 2.5)


@edit
def no_gradients(m: Any) -> None:
    m[1].requires_grad_(False)


@edit
def activation_of_the_layer(m: Any) -> None:
    m[1].bn1.activation = "silu"


@edit
def frozen(m: Any) -> None:
    truenorm.freeze(m)


@edit
def reverted(m: Any) -> None:
    truenorm.revert(m)


@edit
def one_norm_reverted(m: Any) -> None:
    truenorm.revert(m[1].bn2)
    holder = nn.Sequential(m[1].bn1)
    truenorm.revert(holder)
    m[1].bn1 = holder[0]


@edit
def synchronized(m: Any) -> None:
    m[1].bn1 = nn.SyncBatchNorm.convert_sync_batchnorm(m[1].bn1)


@edit
def parametrized_norm(m: Any) -> None:
    class Double(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w * 2.0

    nn.utils.parametrize.register_parametrization(m[1].bn1, "weight", Double())


@edit
def parametrized_block(m: Any) -> None:
    class Sine(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.sin()

    nn.utils.parametrize.register_parametrization(m[1], "shift", Sine())


@edit
def weight_norm(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m[1].conv1)


@edit
def a_subclass(m: Any) -> None:
    class Mine(type(m[1])):  # type: ignore[misc]
        gain = 5.0

        def last(self, x: Tensor) -> Tensor:
            return super().last(x) - 1.0

    m[1].__class__ = Mine


@edit
def a_child_that_hides_a_method(m: Any) -> None:
    m[1].__dict__["act"] = torch.tanh


@edit
def a_step_of_a_list(m: Any) -> None:
    m[3].steps[2] = nn.Tanh()


@edit
def a_longer_list(m: Any) -> None:
    m[3].steps.append(nn.Tanh())


@edit
def shared(m: Any) -> None:
    m[1].bn1 = m[0][1]


@edit
def copied(m: Any) -> None:
    m[1] = copy.deepcopy(m[1])
    m[1].act.negative_slope = 0.6


@edit
def copied_shallow(m: Any) -> None:
    m[1] = copy.copy(m[1])
    m[1].act = nn.Tanh()


@edit
def replicated(m: Any) -> None:
    replica = m[1]._replicate_for_data_parallel()
    for name, child in replica._modules.items():
        replica._modules[name] = copy.deepcopy(child)
    # as torch's replicate() leaves it, whose copies of parameters are plain tensors
    replica._parameters = dict(m[1]._parameters)
    replica.act.negative_slope = 0.9
    m[1] = replica


@edit
def fused_again(m: Any) -> None:
    m[1].act = nn.ReLU6()
    if isinstance(m[0], truenorm._models.fusing.classes.Fused):
        truenorm.fuse(m)


@edit
def unfused_in_part(m: Any) -> None:
    truenorm.unfuse(m[1])
    m[1].act = nn.Tanh()


@edit
def a_weight_that_was_shared(m: Any) -> None:
    m[4].scale = nn.Parameter(torch.arange(6.0).view(6, 1, 1))


def put_global(name: str, value: Any) -> None:
    before = globals()[name]
    UNDO.append(lambda: globals().update({name: before}))
    globals()[name] = value


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit(name: str, training: bool) -> None:
    as_it_was, fused = pair()
    x = torch.randn(2, 6, 9, 7)
    assert calls(copy.deepcopy(fused), x) == FUSED
    for model in (as_it_was, fused):
        model.train(training)
        EDITS[name](model)
    same(as_it_was, fused, x)


@pytest.mark.parametrize("seed", range(12))
def test_edits_after_one_another(seed: int) -> None:
    chosen = random.Random(seed)
    as_it_was, fused = pair()
    for name in chosen.sample(sorted(EDITS), 6):
        failed = []
        for model in (as_it_was, fused):
            try:
                EDITS[name](model)
            except (LookupError, AttributeError, RuntimeError, TypeError, ValueError) as error:
                failed.append(type(error))  # what another edit has taken away
        assert len(failed) in (0, 2)
        x = torch.randn(2, 6, 9, 7)
        try:
            expected = copy.deepcopy(as_it_was)(x)
        except Exception as error:
            with pytest.raises(type(error)):
                fused(x)
            return
        torch.testing.assert_close(copy.deepcopy(fused)(x), expected)
        mode = chosen.random() < 0.5
        as_it_was.train(mode), fused.train(mode)


def test_an_activation_beside_that_overwrites() -> None:
    as_it_was, fused = pair()
    x = torch.randn(2, 6, 9, 7)
    for model in (as_it_was, fused):
        model[4].act2.inplace = True
    with torch.no_grad():
        torch.testing.assert_close(fused[4](x), as_it_was[4](x))


def test_what_is_put_back_is_fused_again() -> None:
    _, fused = pair()
    x = torch.randn(2, 6, 9, 7)
    act, hooks = fused[1].act, []
    for change, back in (
        (
            lambda: hooks.append(act.register_forward_hook(lambda *_: None)),
            lambda: hooks[0].remove(),
        ),
        (lambda: setattr(fused[1], "act", nn.Tanh()), lambda: setattr(fused[1], "act", act)),
        (lambda: fused[1].order.append("x"), lambda: fused[1].order.pop()),
        (lambda: setattr(act, "negative_slope", 0.3), lambda: setattr(act, "negative_slope", 0.2)),
    ):
        change()
        assert calls(copy.deepcopy(fused), x) == FUSED - 2
        back()
        assert calls(copy.deepcopy(fused), x) == FUSED
    fused[1].act = nn.ReLU6()
    assert calls(fused, x) == FUSED - 2
    assert calls(truenorm.fuse(fused), x) == FUSED


KEEPS = ["parameters_in_place", "another_parameter", "a_buffer", "no_gradients", "frozen"]
KEEPS += ["hook_on_a_convolution", "hook_on_the_block", "weight_norm", "fused_again"]


@pytest.mark.parametrize("name", KEEPS)
def test_what_changes_no_structure_stays_fused(name: str) -> None:
    _, fused = pair()
    EDITS[name](fused)
    assert calls(fused, torch.randn(2, 6, 9, 7)) == FUSED


COMPILED = {
    0: ["append", "another_item", "alpha", "dropout"],
    1: ["slope", "another_activation", "attribute_of_the_class", "item_of_a_list", "a_buffer"],
    3: ["a_step_of_a_list", "a_longer_list"],
}


@pytest.mark.parametrize("part", COMPILED)
def test_edits_of_a_compiled_model(part: int) -> None:
    torch._dynamo.reset()
    as_it_was, fused = pair()
    x = torch.randn(2, 6, 9, 7)
    compiled = torch.compile(fused[part], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), as_it_was[part](x))
    for name in COMPILED[part]:
        EDITS[name](as_it_was), EDITS[name](fused)
        torch.testing.assert_close(compiled(x), as_it_was[part](x))


def sharded(rank: int) -> list[Any]:
    """Whether an FSDP class stays, runs fused, and gives the model's gradients."""
    found: list[Any] = []
    for first in ("fuse", "shard"):
        as_it_was = truenorm.convert(randomize(Block()))
        model = copy.deepcopy(as_it_was)
        for step in (first, "shard" if first == "fuse" else "fuse"):
            truenorm.fuse(model) if step == "fuse" else fully_shard(model)
        x = torch.randn(2, 6, 9, 7)
        for fused in (True, False):
            as_it_was.zero_grad(), model.zero_grad()
            found.append(isinstance(model, FSDPModule))
            found.append(calls(model, x) == 2 * fused)
            grad = torch.randn(as_it_was(x).shape)
            as_it_was(x).backward(grad)
            model(x).backward(grad)
            for ours, theirs in zip(model.parameters(), as_it_was.parameters(), strict=True):
                full = ours.grad.full_tensor()  # type: ignore[union-attr]
                assert theirs.grad is not None
                size = theirs.grad.norm() + 1.0
                found.append(bool((full - theirs.grad).norm() < 1e-4 * size))
            truenorm.unfuse(model)
    return found


def test_sharded_modules() -> None:
    for found in processes(2).run(sharded):
        assert all(found), found
