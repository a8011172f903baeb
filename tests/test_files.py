"""Files that the library writes: over none that exists unless asked to, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import truenorm
from truenorm import _files
from truenorm.cli import main

pytest.importorskip("matplotlib")


def _explanation() -> Callable[..., None]:
    return truenorm.explain(torch.nn.LayerNorm(4), (2, 4)).save_picture


def _comparison() -> Callable[..., None]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    return truenorm.compare(model, model, torch.randn(2, 3)).save_picture


@pytest.mark.parametrize("saver", [_explanation, _comparison])
def test_a_picture_does_not_replace_a_file_unasked(
    saver: Callable[..., object], tmp_path: Path
) -> None:
    save: Callable[..., None] = saver()  # type: ignore[assignment]
    path = tmp_path / "p.png"
    path.write_text("theirs")
    with pytest.raises(FileExistsError, match=r"p\.png'\) exists: .*force=True"):
        save(path)
    assert path.read_text() == "theirs"
    save(path, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="no' does not exist, make it first"):
        save(tmp_path / "no" / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_explain_refuses_before_it_works(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_text("theirs")
    with pytest.raises(FileExistsError, match="force=True"):
        # the layer is refused too, but later
        truenorm.explain(torch.nn.Linear(4, 4), (2, 4), picture=path)
    truenorm.explain(torch.nn.LayerNorm(4), (2, 4), picture=path, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("explain RMSNorm 2 4", "--picture"),
        ("bench --quick", "--json"),
        ("bench --quick", "--chart"),
        ("bench --models --quick", "--json"),
        ("verify --quick", "--json"),
        ("report nothing:here --data digits", "--out"),
        ("report nothing:here --data digits", "--json"),
    ],
)
def test_commands_refuse_before_they_work(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("plotly")
    path = tmp_path / "theirs.png"
    path.write_text("theirs")
    out = ["--out", str(tmp_path / "r.html")] if "report" in command and option != "--out" else []
    assert main([*command.split(), *out, option, str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{option} (={str(path)!r}) exists" in error
    assert "--force" in error
    assert path.read_text() == "theirs"


def test_force_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.png"
    path.write_text("theirs")
    assert main(["explain", "RMSNorm", "2", "4", "--picture", str(path), "--force"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("before")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            _files.write(path, "after", force=True)
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_file_that_comes_to_exist_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "f", os.link

    def late(source: str, target: Path) -> None:
        path.write_text("theirs")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(FileExistsError, match="force=True"):
        _files.write(path, "ours", force=False)
    assert path.read_text() == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
