"""compare: the differences of two models, layer by layer, and nothing left behind."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from cases import randomize
from tolerances import relative
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm import compare


class Net(Module):
    """A layer that is called twice, an activation in place, and an output of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.mix = nn.Conv2d(6, 6, 1)
        self.norm = nn.InstanceNorm2d(6, affine=True)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.mix(self.mix(self.body(x)))
        return {"out": self.norm(y), "pooled": y.mean((2, 3))}


@pytest.fixture
def model() -> Any:
    return randomize(Net()).eval()


def batch() -> Tensor:
    return torch.randn(2, 3, 9, 9)


def snapshot(model: Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    tensors = [t.clone() for t in model.state_dict().values()]
    return [hooks, [m.training for m in model.modules()], tensors]


def same(one: list[Any], other: list[Any]) -> bool:
    return one[:2] == other[:2] and all(map(torch.equal, one[2], other[2]))


NAMES = ["body.0", "body.1", "body.2", "mix", "mix (call 2)", "norm", "the output"]


def test_torch_against_truenorm(model) -> None:
    ours = truenorm.convert(copy.deepcopy(model))
    c = compare(model, ours, batch())
    assert [row.label for row in c.layers] == NAMES
    assert c.first is None
    assert (c.only_a, c.only_b, c.folded) == ((), (), ())
    assert c.layers[0].shape == (2, 6, 7, 7)
    assert c.layers[0].relative == 0.0
    assert all(0.0 < row.relative < 1e-6 for row in c.layers[1:])


def test_the_numbers(model) -> None:
    other = copy.deepcopy(model)
    other.norm.weight.data[2] += 0.5
    x = batch()
    c = compare(model, other, x)
    (row,) = [row for row in c.layers if row.name == "norm"]
    a, b = model(x)["out"], other(x)["out"]
    assert row.relative == pytest.approx(relative(b, a))
    assert row.largest == pytest.approx(((a - b).abs().max() / a.std(correction=0)).item())
    assert c.first is row
    assert [r.parts for r in c.layers] == [False] * 5 + [True] * 2
    # the output has another tensor too, which is the same
    assert c.layers[-1].relative < row.relative
    loose = compare(model, other, x, tolerance=2.0 * row.relative)
    assert loose.first is None


def test_before_and_after_fold(model) -> None:
    # a Sequential, as nobody folds InstanceNorm without statistics
    result = truenorm.fold(model)
    assert len(result.folded) == 1
    c = compare(model, result.model, batch())
    assert c.folded == ("body.0",)
    assert [row.label for row in c.layers] == NAMES[1:]
    assert c.first is None
    back = compare(result.model, model, batch())
    assert back.folded == c.folded
    assert back.first is None


def test_folds_around_one_layer() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 9), nn.BatchNorm1d(9), nn.BatchNorm1d(9), nn.ReLU()
    )
    randomize(model).eval()
    c = compare(model, truenorm.fold(model).model, torch.randn(7, 6))
    assert c.folded == ("0", "1", "2")
    assert [row.name for row in c.layers] == ["3", "4", "the output"]
    assert c.first is None


def test_low_precision(model) -> None:
    low = copy.deepcopy(model).bfloat16()
    c = compare(model, low, batch())
    assert {(r.dtype_a, r.dtype_b) for r in c.layers} == {("float32", "bfloat16")}
    assert all(1e-4 < row.relative < 0.05 for row in c.layers)
    assert c.first is None
    # the wide result of a network with low weights is no less wrong
    low.mix.weight.data[0, 0] += 10.0
    assert compare(model, low, batch()).first.label == "mix"


def test_against_the_compiled_model(model) -> None:
    other = copy.deepcopy(model)
    other.body[1].bias.data[1] += 0.5
    before = snapshot(other)
    c = compare(model, torch.compile(other), batch())
    assert [row.label for row in c.layers] == NAMES
    assert c.first is not None
    assert c.first.label == "body.1"
    assert c.layers[0].relative < 1e-6
    assert same(before, snapshot(other))


def test_training_mode_from_the_same_random_state() -> None:
    model = randomize(nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.BatchNorm1d(8)))
    other = copy.deepcopy(model)
    before, state = snapshot(model), torch.get_rng_state()
    c = compare(model, other, (torch.randn(7, 6), torch.zeros(7)))
    assert [row.relative for row in c.layers] == [0.0] * 4
    # the batch moved the running statistics, and they are back
    assert same(before, snapshot(model))
    assert torch.equal(state[-100:], torch.get_rng_state()[-100:])
    assert compare(model, model, torch.randn(7, 6)).first is None


def test_nan_and_shapes() -> None:
    def named(*layers: Module) -> Module:
        return nn.Sequential(*layers).eval()

    x = torch.randn(4, 6)
    x[0, 0] = float("nan")
    a, b = randomize(named(nn.Linear(6, 6))), named(nn.Linear(6, 5))
    c = compare(a, b, x)
    assert [row.relative for row in c.layers] == [math.inf, math.inf]
    assert c.first is c.layers[0]
    assert json.loads(c.to_json())["layers"][0]["relative"] is None
    assert compare(a, copy.deepcopy(a), x).first is None
    healed = named(nn.Linear(6, 6))
    healed.load_state_dict(a.state_dict())
    healed[0].register_forward_hook(lambda m, args, y: y.nan_to_num())
    assert compare(a, healed, x).first is not None


def test_layers_of_one_model_only(model) -> None:
    other = copy.deepcopy(model)
    other.body.append(nn.Tanh())
    c = compare(model, other, batch())
    assert (c.only_a, c.only_b) == ((), ("body.3",))
    assert c.first is not None
    assert "only in the second model: body.3" in str(c)
    assert compare(other, model, batch()).only_a == ("body.3",)


def test_table_and_picture(model, tmp_path) -> None:
    other = copy.deepcopy(model)
    other.mix.weight.data[0, 0] += 1.0
    c = compare(model, other, {"x": batch()})
    text = str(c)
    assert text.count("← they part here") == 1
    assert "they part at mix;" in text.splitlines()[-1]
    assert json.loads(c.to_json())["first"]["name"] == "mix"
    image = pytest.importorskip("matplotlib.image")
    c.save_picture(tmp_path / "c.png")
    assert image.imread(tmp_path / "c.png").std() > 0.05


def test_bad_input(model) -> None:
    other, before = copy.deepcopy(model), snapshot(model)
    with pytest.raises(TypeError, match=r"`model_b` must be a torch.nn.Module, but got Ord"):
        compare(model, model.state_dict(), batch())
    with pytest.raises(TypeError, match=r"`batch` must be .* but got int"):
        compare(model, other, 3)
    with pytest.raises(ValueError, match=r"`model_a` failed on a batch of shape \(2, 4, 9, 9\)"):
        compare(model, other, torch.randn(2, 4, 9, 9))
    other.mix = nn.Conv2d(5, 6, 1)
    with pytest.raises(ValueError, match=r"`model_b` failed .* call=lambda model, batch"):
        compare(model, other, batch())
    with pytest.raises(ValueError, match=r"no layer of the same name.*two versions of one model"):
        compare(nn.Sequential(nn.ReLU()), model, batch(), call=lambda m, x: str(m(x)))
    assert same(before, snapshot(model))
