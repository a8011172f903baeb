"""`truenorm.explain`: its arithmetic, its words, and its pictures."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from itertools import product

import pytest
import torch

import truenorm
from truenorm._tools import extras
from truenorm._tools.explain.text import show

# layer, shape: the four main layers' examples, then every other layer
CASES = {
    "InstanceNorm1d": (torch.nn.InstanceNorm1d(3), (2, 3, 5)),
    "InstanceNorm2d": (torch.nn.InstanceNorm2d(3), (1, 3, 2, 2)),
    "BatchNorm1d": (torch.nn.BatchNorm1d(3), (128, 3, 512)),
    "BatchNorm2d": (torch.nn.BatchNorm2d(3), (2, 3, 5, 6)),
    "BatchNorm1d (N, C)": (torch.nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm3d": (torch.nn.BatchNorm3d(2), (2, 2, 2, 3, 2)),
    "InstanceNorm3d": (torch.nn.InstanceNorm3d(2, affine=True), (2, 2, 2, 3, 2)),
    "InstanceNorm2d unbatched": (torch.nn.InstanceNorm2d(3), (3, 4, 5)),
    "GroupNorm": (torch.nn.GroupNorm(2, 6), (2, 6, 3)),
    "LayerNorm": (torch.nn.LayerNorm(4), (2, 3, 4)),
    "LayerNorm two dims": (torch.nn.LayerNorm((3, 4)), (2, 3, 4)),
    "LayerNorm all": (torch.nn.LayerNorm(5), (5,)),
    "RMSNorm": (torch.nn.RMSNorm(4), (2, 3, 4)),
    "LocalResponseNorm": (torch.nn.LocalResponseNorm(3, alpha=0.1), (2, 5, 3)),
    "LocalResponseNorm even": (torch.nn.LocalResponseNorm(4, alpha=0.1), (1, 6, 2, 2)),
    "SyncBatchNorm": (torch.nn.SyncBatchNorm(3), (2, 3, 4)),
    "LazyBatchNorm2d": (torch.nn.LazyBatchNorm2d(), (2, 3, 2, 2)),
    "LazyInstanceNorm1d": (torch.nn.LazyInstanceNorm1d(affine=True), (2, 3, 4)),
}
SMALL = [name for name in CASES if name not in ("BatchNorm1d",) and not name.startswith("Lazy")]


def random_parameters(layer: torch.nn.Module) -> torch.nn.Module:
    layer = deepcopy(layer).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.uniform_(-2.0, 2.0)
    return layer


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("Lazy")])
def test_by_hand_is_torchs_layer_in_float64(name: str) -> None:
    layer, shape = CASES[name]
    layer = random_parameters(layer)
    x = 3.0 * torch.randn(shape, dtype=torch.float64) + 5.0
    e = truenorm.explain(layer, x)
    expected = deepcopy(layer).train()(x)
    # both float64: a few roundings of values up to about 10
    torch.testing.assert_close(e.by_hand, expected, rtol=1e-12, atol=1e-12)
    assert e.differences["torch and by hand"] < 1e-12
    assert e.differences["truenorm and by hand"] < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_float32_layers_are_near(name: str) -> None:
    layer, shape = CASES[name]
    e = truenorm.explain(layer, shape)
    assert e.x.shape == shape
    # 8 units in the last place of results up to 8 (float32: 2**-23 relative)
    assert e.differences["truenorm and by hand"] < 8 * 8 * 2**-23
    assert e.differences["torch and by hand"] < 8 * 8 * 2**-23


@pytest.mark.parametrize("name", SMALL)
def test_groups_are_those_of_torchs_layer(name: str) -> None:
    """A changed value changes the results of its own group, and of no other."""
    layer, shape = CASES[name]
    layer = random_parameters(layer).train()
    x = torch.randn(shape, dtype=torch.float64)
    sharing = truenorm.explain(layer, x).sharing
    before = deepcopy(layer)(x)
    for position in product(*map(range, shape)):
        changed = x.clone()
        changed[position] += 1.0
        touched = (deepcopy(layer)(changed) != before).nonzero().tolist()
        if sharing.kind == "local response":
            near = [c for c in range(shape[1]) if _in(position[1], sharing.window(c))]
            expected = [[position[0], c, *position[2:]] for c in near]
        else:
            group = sharing.group_of(position)
            everywhere = product(*map(range, shape))
            expected = [list(p) for p in everywhere if sharing.group_of(p) == group]
        assert touched == expected


def _in(channel: int, window: tuple[int, int]) -> bool:
    return window[0] <= channel <= window[1]


def test_numbers_of_a_small_example() -> None:
    e = truenorm.explain(torch.nn.InstanceNorm1d(1), torch.tensor([[[1.0, 2.0, 3.0, 6.0]]]))
    (group,) = e.groups
    # (1 + 2 + 3 + 6) / 4 = 3; (4 + 1 + 0 + 9) / 4 = 3.5, and / 3 = 4.666…
    assert (group.count, group.mean, group.variance) == (4, 3.0, 3.5)
    assert group.unbiased_variance == pytest.approx(14 / 3)
    assert e.by_hand[0, 0, 0].item() == pytest.approx(-2.0 / 3.50001**0.5, rel=1e-12)
    assert e.worked[1] == "= (1 − 3) / sqrt(3.5 + 1e-05)"
    assert e.worked[2] == "= -2 / 1.87083 = -1.06904"
    assert e.mistake is not None
    wrong = 3.0 / (14 / 3 + 1e-5) ** 0.5
    assert e.mistake.result[0, 0, 3].item() == pytest.approx(wrong, rel=1e-12)
    assert e.mistake.largest_error == pytest.approx(3.0 / 3.50001**0.5 - wrong, rel=1e-9)


def test_worked_line_with_weight_and_bias() -> None:
    layer = torch.nn.GroupNorm(1, 1)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(10.0)
    e = truenorm.explain(layer, torch.tensor([[[1.0, 2.0, 3.0, 6.0]]]))
    assert e.worked[-1] == "· weight + bias = -1.06904 · 2 + 10 = 7.86191"


@pytest.mark.parametrize(
    ("layer", "groups", "values"),
    [
        (
            torch.nn.InstanceNorm2d(3),
            "2 samples × 3 channels = 6 groups",
            "256×512 = 131,072 values",
        ),
        (
            torch.nn.BatchNorm2d(3),
            "one group for each of the 3 channels",
            "2×256×512 = 262,144 values",
        ),
        (torch.nn.GroupNorm(1, 3), "2 samples × 1 group = 2 groups", "3×256×512 = 393,216 values"),
        (torch.nn.LayerNorm(512), "2×3×256 = 1,536 groups", "512 values"),
    ],
)
def test_says_how_the_count_comes_about(layer: torch.nn.Module, groups: str, values: str) -> None:
    e = truenorm.explain(layer, (2, 3, 256, 512))
    assert f"{groups}; each has {values}." in str(e)
    assert len(e.groups) == e.sharing.num_statistics
    assert {g.count for g in e.groups} == {e.x.numel() // len(e.groups)}
    # summarised, not dumped
    assert len(str(e).splitlines()) < 120
    assert len(json.dumps(e.to_dict(limit=10))) < 10_000


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_running_statistics_are_torchs_and_the_layer_is_left_alone(momentum: float | None) -> None:
    layer = torch.nn.BatchNorm1d(3, momentum=momentum).double()
    layer(torch.randn(5, 3, dtype=torch.float64))
    layer.eval()
    before = deepcopy(layer.state_dict())
    x = 2.0 * torch.randn(7, 3, 4, dtype=torch.float64) + 3.0
    e = truenorm.explain(layer, x)
    torch.testing.assert_close(dict(layer.state_dict()), dict(before), rtol=0, atol=0)
    assert not layer.training
    layer.train()(x)
    for r in e.running:
        assert r.mean_after == pytest.approx(layer.running_mean[r.channel].item(), rel=1e-12)
        assert r.var_after == pytest.approx(layer.running_var[r.channel].item(), rel=1e-12)
        assert r.layer_var == pytest.approx(r.var_after, rel=1e-12)
    assert "What is stored is the unbiased variance" in str(e).replace("\n  ", " ")


def test_running_statistics_of_instance_norm_average_over_samples() -> None:
    layer = torch.nn.InstanceNorm1d(2, track_running_stats=True).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    e = truenorm.explain(layer, x)
    layer.train()(x)
    for r in e.running:
        assert r.mean_after == pytest.approx(layer.running_mean[r.channel].item(), rel=1e-12)
        assert r.var_after == pytest.approx(layer.running_var[r.channel].item(), rel=1e-12)


def test_the_same_seed_gives_the_same_explanation() -> None:
    one, same, other = (truenorm.explain(torch.nn.RMSNorm(4), (2, 4), seed=s) for s in (1, 1, 2))
    assert one.to_dict() == same.to_dict()
    assert not torch.equal(one.x, other.x)


def test_half_precision_beside_wide_statistics() -> None:
    e = truenorm.explain(truenorm.BatchNorm1d(3).bfloat16(), (8, 3, 4))
    assert e.x.dtype == e.torch.dtype == torch.bfloat16
    # half a unit in the last place (2**-8 relative) of results up to 4
    assert e.differences["truenorm and by hand"] <= 4 * 2**-9


def test_text_shows_every_result_and_the_loop() -> None:
    e = truenorm.explain(truenorm.InstanceNorm1d(3), (2, 3, 5))
    text = str(e)
    assert text.startswith("InstanceNorm1d: each channel of each sample is normalized alone")
    assert "channel 0  A A A A A    D D D D D" in text
    assert "        values = x[n, c]" in text
    assert "var = torch.var(values, correction=0)" in text
    for g in e.groups:
        assert f"{g.mean:.4f}" in text
        assert f"{g.variance:.4f}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_rich_tells_the_same() -> None:
    console = pytest.importorskip("rich.console")
    e = truenorm.explain(truenorm.BatchNorm2d(3), (2, 3, 2, 2))
    recorder = console.Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
    show(e, recorder)
    told = recorder.export_text()
    for line in str(e).splitlines():
        words = [word for word in line.replace("(side", "side").split() if word.strip("─")]
        if "A" not in words:  # the map's cells are wider there
            assert all(word.removesuffix(")") in told for word in words), line


@pytest.mark.parametrize("name", CASES)
def test_picture(name: str, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    layer, shape = CASES[name]
    if name == "BatchNorm1d":
        shape = (128, 3, 64)
    first, again = tmp_path / "first.png", tmp_path / "again.png"
    truenorm.explain(layer, shape, picture=first)
    truenorm.explain(layer, shape, picture=again)
    assert first.read_bytes() == again.read_bytes()
    with image.open(first) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1600, 960)
        colors = picture.convert("RGB").getcolors(maxcolors=2**20)
    # paper, ink and several groups' colours, none of which covers everything
    assert len([n for n, _ in colors if n > 500]) > 4
    assert max(n for n, _ in colors) < 0.95 * 1600 * 960


def test_picture_without_matplotlib_names_the_extra(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(extras, "has", lambda package: package != "matplotlib")
    with pytest.raises(ImportError, match=r'needs matplotlib: pip install "truenorm\[demo\]"'):
        truenorm.explain(torch.nn.RMSNorm(4), (2, 4), picture=tmp_path / "x.png")


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (torch.nn.Linear(3, 3), (2, 3), TypeError, "`layer` must be a normalization layer.*Linear"),
        (torch.nn.BatchNorm1d(3), (2, 4, 5), RuntimeError, "num_features"),
        (torch.nn.InstanceNorm1d(3), (2, 3, 1), ValueError, "more than 1 spatial element"),
        (torch.nn.BatchNorm1d(3), (2, -3), ValueError, r"`x_or_shape` \(=\(2, -3\)\)"),
        (torch.nn.BatchNorm1d(3), (), ValueError, "shape of positive sizes"),
        (torch.nn.BatchNorm1d(3), torch.ones(2, 3, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.nn.BatchNorm1d(3), torch.ones(0, 3), ValueError, "no values"),
    ],
)
def test_bad_input(layer, x, error, message) -> None:
    with pytest.raises(error, match=message):
        truenorm.explain(layer, x)
