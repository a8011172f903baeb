"""The command `truenorm`: explain, report, survey, verify, bench, demo and info."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

from .extras import CommandError


class _Parser(argparse.ArgumentParser):
    """Reports bad arguments as the commands report bad values: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _info(args: argparse.Namespace) -> int:
    from .._core.library import info

    print(info())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command, with its seven commands."""
    from .. import __version__
    from . import bench, verify
    from .demo import command as demo
    from .explain import command as explain
    from .report import command as report
    from .survey import command as survey

    parser = _Parser(
        prog="truenorm", description="PyTorch's normalization layers, true to the formula."
    )
    parser.add_argument("--version", action="version", version=f"truenorm {__version__}")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    explain.add_parser(subparsers)
    report.add_parser(subparsers)
    survey.add_parser(subparsers)
    verify.add_parser(subparsers)
    bench.add_parser(subparsers)
    demo.add_parser(subparsers)
    info = subparsers.add_parser("info", help="say which path serves which device")
    info.set_defaults(func=_info)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 a check failed, 2 bad input."""
    try:
        args = build_parser().parse_args(argv)
        return int(args.func(args))
    except CommandError as error:
        print(f"truenorm: {error}", file=sys.stderr)
        return 2
    except SystemExit as exit:  # argparse's own, after --help and --version
        return exit.code if isinstance(exit.code, int) else 0
    except BrokenPipeError:
        # the reader, `head` say, has seen enough; python would complain again when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("truenorm: interrupted", file=sys.stderr)
        return 130
