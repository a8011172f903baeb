"""survey, convert(report=True) and the command: what is said of each norm."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_rules import HandRMSNorm
from torch import Tensor, nn
from torch.nn import Module

import truenorm
from truenorm._models.rules import recognise
from truenorm._tools.cli import main


class GatedNorm(Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps = 1e-5

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * x * gate


def net() -> Module:
    return nn.Sequential(
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        HandRMSNorm(8),
        HandRMSNorm(8, change="eps outside"),
        GatedNorm(),
    )


def test_rows() -> None:
    model = net()
    kinds = [type(m) for m in model.modules()]
    found = truenorm.survey(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [row.name for row in found.norms] == ["1", "2", "3", "4"]
    assert [row.formula for row in found.norms] == ["layer", "rms, cast_first", "", ""]
    assert [row.swappable for row in found.norms] == [True, True, False, False]
    assert (found.swapped, found.swappable, found.left) == (0, 2, 2)
    assert "no known formula" in found.norms[2].reason
    assert "no known formula" in found.norms[3].reason
    assert found.norms[1].kind == f"{HandRMSNorm.__module__}.HandRMSNorm"
    truenorm.convert(model)
    after = truenorm.survey(model)
    assert (after.swapped, after.swappable, after.left) == (2, 2, 2)
    assert [row.formula for row in after.norms] == [row.formula for row in found.norms]
    assert json.loads(after.to_json())["left"] == 2


def test_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert truenorm.convert(net(), report=True)
    printed = capsys.readouterr().out
    assert "4 normalization layers, 2 of them truenorm's, 0 more with convert, 2 left" in printed
    assert "rms, cast_first" in printed
    assert "3: it matches no known formula" in printed
    assert str(truenorm.survey(nn.Linear(2, 2))) == (
        "Linear: 0 normalization layers, 0 of them truenorm's, 0 more with convert, 0 left"
    )


def test_a_layer_whose_instance_stands_in_the_way() -> None:
    model = net()
    model[2].forward = lambda x: x
    row = truenorm.survey(model).norms[1]
    assert not row.swappable
    assert "forward of its own" in row.reason
    with pytest.warns(UserWarning, match="convert left 1 layer.*'2' .HandRMSNorm."):
        truenorm.convert(model)
    assert type(model[2]) is HandRMSNorm
    assert isinstance(model[1], truenorm.LayerNorm)


class SplitNorm(HandRMSNorm):
    def __init__(self) -> None:
        super().__init__(24)
        self.act = torch.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(super().forward(x))

    def scaled(self, y: torch.Tensor) -> torch.Tensor:
        return y


def test_an_instance_that_holds_another_method_says_nothing_of_its_class() -> None:
    changed, held, plain = SplitNorm(), SplitNorm(), SplitNorm()
    vars(changed)["scaled"] = lambda y: 2 * y
    ran = []
    held.old = types.MethodType(lambda self, x: ran.append(1), held)  # type: ignore[assignment]
    rows = truenorm.survey(torch.nn.Sequential(changed, held, plain)).norms
    assert not rows[0].swappable
    assert "'scaled' of its own" in rows[0].reason
    assert [row.swappable for row in rows[1:]] == [True, True], rows
    assert not ran
    # and where it is the first of its class that is met
    recognise._found.clear()
    assert truenorm.survey(torch.nn.Sequential(changed, plain)).norms[1].swappable


class ActingNorm(HandRMSNorm):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(24)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))


def test_a_function_held_is_told_from_another() -> None:
    model = torch.nn.Sequential(ActingNorm(torch.detach_copy), ActingNorm(torch.clone))
    assert [row.swappable for row in truenorm.survey(model).norms] == [False, True]


def test_of_no_module() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module"):
        truenorm.survey("resnet50")  # type: ignore[arg-type]


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "surveyed.py").write_text("from test_survey import net\n")
    monkeypatch.chdir(tmp_path)
    assert main(["survey", "surveyed:net", "--json", "norms.json"]) == 0
    assert "2 more with convert, 2 left" in capsys.readouterr().out
    assert json.loads((tmp_path / "norms.json").read_text())["swappable"] == 2
    assert main(["survey", "surveyed:net", "--json", "norms.json"]) == 2
    assert "norms.json" in capsys.readouterr().err
    assert main(["survey", "surveyed:none"]) == 2
