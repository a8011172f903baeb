"""Writing a folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..extras import CommandError

MARK = "results.json"
MADE_BY = "truenorm demo"


def _is_ours(folder: Path) -> bool:
    """Whether the demonstration made this folder, and nothing was added to it since."""
    try:
        results = json.loads((folder / MARK).read_text(encoding="utf-8"))
        files = set(results["files"])
        made = results["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made and {path.name for path in folder.iterdir()} <= files


def check(folder: Path, *, force: bool) -> None:
    """Refuse a place that holds somebody else's files, before any work is done."""
    name = f"--out (={str(folder)!r})"
    try:
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"{name} is a file: name a folder that may be made or replaced")
        if folder.is_dir() and not force and any(folder.iterdir()) and not _is_ours(folder):
            raise CommandError(
                f"{name} holds files that the demonstration did not make: name another folder, or "
                "add --force to write into this one (its other files stay)"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{name} cannot be used: {error.strerror or error}") from error
    if not os.access(folder if folder.is_dir() else folder.parent, os.W_OK):
        raise CommandError(f"{name} cannot be written: choose a folder that you may write to")


def _publish(built: Path, folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        # --force: the page last, so that it never shows files that are not there
        for path in sorted(built.iterdir(), key=lambda p: p.name == "index.html"):
            os.replace(path, folder / path.name)
        return
    old = built.with_name(built.name + "-old")
    if folder.is_dir():
        os.rename(folder, old)
    try:
        os.rename(built, folder)
    except OSError:
        if old.is_dir():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole(folder: Path, *, force: bool) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends well."""
    check(folder, force=force)
    folder = folder.resolve()
    built = folder.with_name(f".{folder.name}-{os.getpid()}")
    built.mkdir()
    try:
        yield built
        check(folder, force=force)
        _publish(built, folder)
    finally:
        shutil.rmtree(built, ignore_errors=True)
