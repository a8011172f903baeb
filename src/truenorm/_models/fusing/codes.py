"""What the code of a function says of it before it runs."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from types import CodeType, FrameType
from typing import Any


class Unreadable(Exception):
    """The forward depends on what cannot be looked at again."""


@functools.cache
def names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The global names that a function reads, and all others that it mentions."""
    found = set()
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            raise Unreadable("the forward writes a global variable")
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.add(step.argval)
    return frozenset(found), frozenset(code.co_names)


@functools.cache
def _steps(code: CodeType) -> dict[int, tuple[str, Any]]:
    return {step.offset: (step.opname, step.argval) for step in dis.get_instructions(code)}


def step_at(frame: FrameType) -> tuple[str, Any]:
    """The instruction, and its argument, that a function is at."""
    return _steps(frame.f_code).get(frame.f_lasti, ("", None))


@functools.cache
def matches(code: CodeType) -> bool:
    """Whether it asks for a class without a call."""
    return any(step.opname == "MATCH_CLASS" for step in dis.get_instructions(code))


@functools.cache
def compares_identity(code: CodeType) -> bool:
    """Whether it asks for an object other than None, or for the class of what is matched."""
    steps = list(dis.get_instructions(code))
    for last, step in itertools.pairwise(steps):
        of_none = last.opname == "LOAD_CONST" and last.argval is None
        if step.opname.startswith("MATCH_") or (step.opname == "IS_OP" and not of_none):
            return True
    return False


_NAMED = "LOAD_CONST", "LOAD_DEREF"


@functools.cache
def hands_on(code: CodeType) -> bool:
    """Whether its `**kwargs` is handed on, and asked for names that stand in the code, alone."""
    place = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[place]
    idle = "CACHE", "PRECALL", "EXTENDED_ARG", "NOP"
    steps = [s for s in dis.get_instructions(code) if s.opname not in idle]
    for at, step in enumerate(steps):
        of_it = step.argval == name or (isinstance(step.argval, tuple) and name in step.argval)
        if not of_it or "CONST" in step.opname or step.opname == "KW_NAMES":
            continue
        if at + 2 >= len(steps):
            return False
        after, then = steps[at + 1].opname, steps[at + 2].opname
        item = after in _NAMED and then.endswith("_SUBSCR")
        method = steps[at + 1].argval in ("get", "pop") and then in _NAMED
        asked = after == "CONTAINS_OP" and steps[at - 1].opname in _NAMED
        if "LOAD_FAST" not in step.opname or not (after == "DICT_MERGE" or item or method or asked):
            return False
    return name not in code.co_cellvars
