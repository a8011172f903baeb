"""Files that the library writes: whole or not at all, and over none that exists unless asked to."""

from __future__ import annotations

import errno
import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

from .._core import checks
from .extras import CommandError


def write(path: str | Path, content: str | bytes, *, force: bool) -> None:
    """Write a file beside `path`, which takes its place when it is whole.

    Errors: those of `checks.check_writable`.
    """
    path = Path(path)
    checks.check_writable(path, force=force)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, part = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        if force:
            os.replace(part, path)
        else:
            _place(part, path)
    except FileExistsError:
        os.unlink(part)
        checks.fail_exists(path)
    except BaseException:
        os.unlink(part)
        raise


def _place(part: str, path: Path) -> None:
    try:
        # unlike a rename it fails where the file has come to exist by now
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError as error:
        # FAT and some network file systems have no hard links
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EACCES):
            raise
        checks.check_writable(path, force=False)
        os.replace(part, path)
    else:
        os.unlink(part)


def write_picture(path: str | Path, figure: Any, *, force: bool) -> None:
    """A matplotlib figure as a PNG."""
    made = BytesIO()
    # no metadata: the same figure gives the same bytes
    figure.savefig(made, format="png", metadata={"Software": None})
    write(path, made.getvalue(), force=force)


def check_option(option: str, path: Path | None, *, force: bool) -> None:
    """Before a command's work is done, that the file which an option names can be written."""
    if path is None:
        return
    try:
        checks.check_writable(path, force=force)
    except FileExistsError as error:
        raise CommandError(
            f"{option} (={str(path)!r}) exists: name another file, or add --force to replace it"
        ) from error
    except OSError as error:
        raise CommandError(str(error).replace("`path`", option)) from error


def write_option(option: str, path: Path, content: str | bytes, *, force: bool) -> None:
    """The file that a command's option names; a refusal is one line that names the option."""
    check_option(option, path, force=force)
    try:
        write(path, content, force=force)
    except OSError as error:
        raise CommandError(
            f"{option} (={str(path)!r}) cannot be written: {error.strerror or error}"
        ) from error
