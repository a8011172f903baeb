"""Moments: of tensors, merged in any cut, saved and read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import LAYOUTS
from tolerances import FLOAT64
from torch import Tensor

from truenorm import Moments


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    return mean, ((flat - mean[:, None]) ** 2).sum(1)


def close(moments: Moments, x: Tensor) -> bool:
    mean, m2 = exact(x)
    wrong = (moments.mean - mean).abs().max(), (moments.m2 / m2 - 1.0).abs().max()
    scale = mean.abs().max().clamp(min=1.0)
    return bool(wrong[0] < FLOAT64 * scale and wrong[1] < 1e3 * FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_a_tensor(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](torch.randn(3, 5, 7, 3) + 2.0).to(dtype)
    moments = Moments.of(x)
    assert moments.count.item() == 63
    assert close(moments, x)
    torch.testing.assert_close(moments.variance(), moments.m2 / 63)
    torch.testing.assert_close(moments.variance(unbiased=True), moments.m2 / 62)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 0, 8], [0, 0, 2, 7], [1] * 9, [3, 2, 2, 1, 1]])
def test_merged(sizes: list[int], offset: float) -> None:
    x = torch.randn(9, 5, 7).double() + offset
    first, *others = (Moments.of(part) for part in x.split(sizes))
    merged = first.merge(*others)
    assert merged.count.item() == 63
    mean, m2 = exact(x - offset)
    # float64 has 1e-16 of the offset
    allowed = 1e-12 + 1e-14 * abs(offset)
    assert (merged.mean - offset - mean).abs().max() < allowed
    assert (merged.m2 / m2 - 1.0).abs().max() < allowed


def test_no_values_change_nothing() -> None:
    x = torch.randn(4, 3)
    moments, nothing = Moments.of(x), Moments.empty(3)
    for merged in (moments.merge(nothing), nothing.merge(moments), nothing.merge(nothing, moments)):
        assert merged.count.item() == 4
        assert torch.equal(merged.mean, moments.mean)
        assert torch.equal(merged.m2, moments.m2)
    assert nothing.merge(Moments.of(x[:0])).count.item() == 0
    assert nothing.variance().isnan().all()


def test_saved_and_read(tmp_path: Path) -> None:
    file = tmp_path / "moments.pt"
    Moments.of(torch.randn(4, 3)).save(file)
    moments = Moments.of(torch.randn(4, 3))
    moments.save(file)
    read = Moments.load(file)
    assert all(torch.equal(getattr(read, n), getattr(moments, n)) for n in ("count", "mean", "m2"))
    assert [p.name for p in tmp_path.iterdir()] == ["moments.pt"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Moments.load(tmp_path / "nowhere.pt")
    torch.save({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"`path` .*moments.pt.* is no file of moments"):
        Moments.load(file)


def test_a_write_that_fails_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "moments.pt"
    moments = Moments.of(torch.randn(4, 3))
    moments.save(file)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        Moments.empty(3).save(file)
    assert torch.equal(Moments.load(file).mean, moments.mean)
    assert [p.name for p in tmp_path.iterdir()] == ["moments.pt"]


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"`input` must be a torch.Tensor, but got list"):
        Moments.of([1.0])
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        Moments.of(torch.randn(3))
    with pytest.raises(NotImplementedError, match=r"`input` has dtype torch.int64"):
        Moments.of(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="moments of 3 and of 4 features cannot be merged"):
        Moments.empty(3).merge(Moments.empty(4))
