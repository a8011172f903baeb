"""Every file that the library writes: over none that exists, and whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import truenorm
from truenorm._tools import files
from truenorm._tools.cli import main


def _explain(path: Path, force: bool) -> None:
    truenorm.explain(nn.LayerNorm(4), (2, 4)).save_picture(path, force=force)


def _explain_picture(path: Path, force: bool) -> None:
    truenorm.explain(nn.LayerNorm(4), (2, 4), picture=path, force=force)


def _compare(path: Path, force: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    truenorm.compare(model, model, torch.randn(2, 3, 7, 5)).save_picture(path, force=force)


def _report(path: Path, force: bool) -> None:
    truenorm.inspect(nn.BatchNorm2d(3), torch.randn(4, 3, 5, 7)).save(path, force=force)


WRITERS = [_explain, _explain_picture, _compare, _report]


def _full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save", WRITERS)
def test_what_exists_is_kept(
    save: Callable[[Path, bool], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.out"
    save(path, False)
    made = path.read_bytes()
    assert made
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"`path` \(='.*file.out'\) exists.*force=True"):
        save(path, False)
    assert path.read_text() == "mine"
    save(path, True)
    assert path.read_bytes()[:8] == made[:8]
    with pytest.raises(FileNotFoundError, match=r"the folder '.*none' does not exist, make it"):
        save(tmp_path / "none" / "file.out", True)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", _full)
    monkeypatch.setattr("os.link", _full)
    for name, force in (("file.out", True), ("other.out", False)):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path / name, force)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file.out"]


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        ("explain RMSNorm 4", "--picture", "x.png"),
        ("verify --quick --layer RMSNorm", "--json", "x.json"),
        ("bench --quick --layer RMSNorm", "--json", "x.json"),
        ("bench --quick --layer RMSNorm", "--chart", "x.png"),
        ("bench --models", "--json", "x.json"),
    ],
)
def test_a_command_refuses_before_its_work(
    command: str, option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text("mine")
    assert main([*command.split(), option, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{option} (={str(path)!r}) exists: name another file, or add --force" in err
    assert err.count("\n") == 1
    assert path.read_text() == "mine"


def test_a_command_replaces_when_told(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("mine")
    assert main(["explain", "RMSNorm", "4", "--picture", str(path), "--force"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_file_that_comes_to_exist_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "x", os.link

    def late(part: str, to: Path) -> None:
        to.write_text("mine")
        link(part, to)

    monkeypatch.setattr("os.link", late)
    with pytest.raises(FileExistsError, match=r"`path` \(='.*x'\) exists"):
        files.write(path, "new", force=False)
    assert path.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", none)
    files.write(tmp_path / "x", "new", force=False)
    assert (tmp_path / "x").read_text() == "new"
    with pytest.raises(FileExistsError, match="exists: name another file"):
        files.write(tmp_path / "x", "newer", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
