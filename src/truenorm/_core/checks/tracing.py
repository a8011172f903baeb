"""Errors of what a trace, a script or an exported file of torch's own operators cannot hold."""

from __future__ import annotations

from typing import Any, NoReturn


def check_not_accumulating(accumulating: bool) -> None:
    if accumulating:
        raise NotImplementedError(
            "`truenorm.accumulate` gathers statistics in Python, which a trace or an exported "
            "program cannot hold: trace the model outside of it"
        )


def fail_untraceable(option: str, value: Any, asks: str, remedy: str) -> NoReturn:
    """For an option that asks the input something, whose answer a trace would keep."""
    raise NotImplementedError(
        f"`{option}` (={value!r}) asks {asks}, and torch.jit.trace would keep the answer for its "
        f"example: call model.eval() before tracing, or {remedy}"
    )


def fail_spanning(layer: str, process_group: Any) -> NoReturn:
    raise NotImplementedError(
        f"{layer} takes its statistics over the processes of `process_group` (={process_group!r}), "
        "which no operator of torch's does: trace or export the model in eval(), or in one process"
    )


def fail_scripting(what: str, remedy: str) -> NoReturn:
    raise NotImplementedError(
        f"torch.jit.script compiles Python, and {what} has kernels of its own: script {remedy}, or "
        "take torch.jit.trace(model, example)"
    )


def check_compile_options(join: Any, own: Any) -> None:
    if join is not None and not isinstance(join, bool):
        raise TypeError(f"`join` must be True, False or None, but got {join!r}: pass one of them")
    if own is None:
        return
    if not isinstance(own, int) or isinstance(own, bool):
        raise TypeError(
            f"`own` must be a number of values, an int, but got {own!r}: pass 0 for none"
        )
    if own < 0:
        raise ValueError(f"`own` must be at least 0, but got {own}: pass 0 for none")
