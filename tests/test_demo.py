"""`truenorm demo`: the quick one, run once, and the folder that it writes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from truenorm._tools.cli import main
from truenorm._tools.demo import command, folder
from truenorm._tools.extras import CommandError, has

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

PICTURES = {
    "loss.png",
    "photographs.png",
    "InstanceNorm1d.png",
    "InstanceNorm2d.png",
    "BatchNorm1d.png",
    "BatchNorm2d.png",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("work") / "demo"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(made: Path) -> Any:
    return json.loads((made / "results.json").read_text(encoding="utf-8"))


def test_files(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == PICTURES | {"index.html", "results.json"}
    # nothing half-made is left beside it
    assert [path.name for path in made.parent.iterdir()] == ["demo"]
    for name in PICTURES:
        with image.open(made / name) as picture:
            picture.verify()
            assert picture.format == "PNG"
            assert picture.width >= 1000


def test_page_shows_every_picture_and_number(made: Path, results: Any) -> None:
    page = (made / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'<img src="([^"]+)"', page)) == PICTURES
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', page))
    # nothing is loaded from elsewhere
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for training in results["training"]:
        assert f"<td>{training['accuracy_truenorm']:.1%}</td>" in page
        assert f"{training['time_ratio']:.2f}" in page


def test_a_model_of_another_library(made: Path, results: Any) -> None:
    page = (made / "index.html").read_text(encoding="utf-8")
    run = results["library"]
    if not has("transformers"):
        assert run is None
        assert "transformers is not installed here" in page
        return
    assert (run["norm"], run["layers"]) == ("Qwen3RMSNorm", 13)
    assert run["largest_loss_difference"] < 10 * run["largest_nudged_difference"] < 1e-2
    assert run["losses_truenorm"][-1] < 0.9 * run["losses_truenorm"][0]
    assert f"{run['time_ratio']:.2f} <small>" in page


def test_without_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "has", lambda package: False)
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    assert "transformers is not installed" in capsys.readouterr().out
    page = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    assert "transformers is not installed here" in page


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for v in value.values() for n in _numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, float) else []


def test_every_number_is_finite(results: Any) -> None:
    numbers = _numbers(results)
    assert len(numbers) > 100
    assert all(map(math.isfinite, numbers))


def test_training(results: Any) -> None:
    assert [t["layer"] for t in results["training"]] == ["BatchNorm2d", "InstanceNorm2d"]
    for t in results["training"]:
        # the same weights and the same first batch: a few roundings of a loss of about 2.3
        assert abs(t["losses_torch"][0] - t["losses_truenorm"][0]) < 8 * 2.3 * 2**-23
        # 22 steps at this learning rate amplify a rounding by at most some thousands
        assert t["largest_loss_difference"] < 1e-3
        assert t["largest_loss_difference"] == max(
            abs(a - b) for a, b in zip(t["losses_torch"], t["losses_truenorm"], strict=True)
        )
        # the nudged run is another one, so that a difference of zero would not be for lack of any
        assert t["losses_nudged"] != t["losses_torch"]
        assert t["losses_torch"][-1] < 0.3 * t["losses_torch"][0]
        # one epoch reaches more than 90 %; chance is 10 %
        assert min(t["accuracy_torch"], t["accuracy_truenorm"]) > 0.8
        assert 0 < t["time_ratio_quartiles"][0] <= t["time_ratio"] <= t["time_ratio_quartiles"][1]


def test_photograph_errors_are_measured_against_float64(results: Any) -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    names = ("china.jpg", "flower.jpg")
    pictures = [torch.tensor(sklearn_datasets.load_sample_image(name)) for name in names]
    x = (torch.stack(pictures).permute(0, 3, 1, 2).float() / 255.0).contiguous()
    for error in results["photograph"]:
        # README's promise for float32
        assert error["truenorm"] <= 2e-6, error
    found = {(e["layer"], e["layout"], e["offset"]): e for e in results["photograph"]}
    shifted = x + 1e4
    for layer in ("BatchNorm2d", "InstanceNorm2d"):
        arguments = {"track_running_stats": False, "affine": False}
        judge = getattr(torch.nn, layer)(3, **arguments)
        error = (judge(shifted).double() - judge(shifted.double())).abs().max().item()
        measured = found[layer, "contiguous", 1e4]["torch"]
        assert measured == pytest.approx(error, rel=0.05)


def test_is_replaced_when_run_again(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shutil.copytree(made, out)
    with folder.whole(out, force=False) as new:
        (new / "index.html").write_text("new", encoding="utf-8")
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert (out / "index.html").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_fails_whole(tmp_path: Path) -> None:
    out = tmp_path / "demo"

    def fail() -> None:
        with folder.whole(out, force=False) as new:
            (new / "index.html").write_text("half", encoding="utf-8")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail()
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    folder.check(out, force=False)  # an empty one may be used
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CommandError, match=r"--out .*holds files that the demonstration did not"):
        folder.check(out, force=False)
    with folder.whole(out, force=True) as new:
        (new / "index.html").write_text("page", encoding="utf-8")
    assert (out / "thesis.txt").read_text(encoding="utf-8") == "mine"
    assert (out / "index.html").read_text(encoding="utf-8") == "page"
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_file_added_to_an_earlier_demonstration_is_foreign(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    mark = {"made_by": "truenorm demo", "files": ["index.html", "results.json"]}
    (out / "results.json").write_text(json.dumps(mark), encoding="utf-8")
    folder.check(out, force=False)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CommandError, match="add --force"):
        folder.check(out, force=False)


@pytest.mark.parametrize("contents", ["", "[]", "{}", '{"made_by": "someone", "files": []}'])
def test_a_results_file_of_others_is_foreign(tmp_path: Path, contents: str) -> None:
    (tmp_path / "results.json").write_text(contents, encoding="utf-8")
    with pytest.raises(CommandError, match="holds files"):
        folder.check(tmp_path, force=False)


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    out.write_text("mine", encoding="utf-8")
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    assert "is a file: name a folder" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == "mine"
