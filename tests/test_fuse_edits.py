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
from test_fuse import calls, same
from torch import Tensor, nn

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
    """Reads what nothing can compare: it stays as it is."""

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


def build() -> Any:
    stem = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.0), nn.GELU(),
        nn.Conv2d(6, 6, 1), nn.GroupNorm(2, 6), nn.Identity(), nn.ELU(0.5),
    )  # fmt: skip
    model = nn.Sequential(stem, Block(), Helped(), Listed())
    return truenorm.convert(randomize(model))


def pair() -> tuple[Any, Any]:
    as_it_was = build()
    return as_it_was, truenorm.fuse(copy.deepcopy(as_it_was))


FUSED = 2 + 2 + 1  # stem, block, list

Edit = Callable[[Any], Any]
EDITS: dict[str, Edit] = {}
UNDO: list[Callable[[], None]] = []


def edit(function: Edit) -> Edit:
    EDITS[function.__name__] = function
    return function


@pytest.fixture(autouse=True)
def undone() -> Any:
    """What an edit changes outside of its model is put back."""
    yield
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
    m[0][1] = randomize(nn.BatchNorm2d(6)).load_state_dict(m[0][1].state_dict()) and m[0][1]
    m[0][5] = nn.Identity()


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
    m[0]._modules.move_to_end("1") if hasattr(m[0]._modules, "move_to_end") else None
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
    if isinstance(m[0], truenorm._fuse.classes.Fused):
        truenorm.fuse(m)


@edit
def unfused_in_part(m: Any) -> None:
    truenorm.unfuse(m[1])
    m[1].act = nn.Tanh()


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
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                failed.append(type(error))  # what another edit has taken away
        assert len(failed) in (0, 2)
        x = torch.randn(2, 6, 9, 7)
        try:
            expected = copy.deepcopy(as_it_was)(x)
        except Exception as error:
            with pytest.raises(type(error)):
                fused(x)
            return
        torch.testing.assert_close(copy.deepcopy(fused)(x), expected, rtol=1e-4, atol=1e-4)
        mode = chosen.random() < 0.5
        as_it_was.train(mode), fused.train(mode)
