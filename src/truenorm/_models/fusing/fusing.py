"""`fuse` and `unfuse`: a module's forward with its layers' epilogues in one pass, and as it was."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn import Module

from ..._core import checks
from ...nn._activation import Activated
from ...nn._ruled import Ruled
from .classes import PLAN, Fused, fused_class, is_fused_class, original_of
from .codes import Unreadable
from .plan import finds_something, plan
from .reading import recording
from .tracing import read, with_free_arguments

M = TypeVar("M", bound=Module)
OWN = Activated, Ruled


def fuse(model: M) -> M:
    """Let each truenorm layer do the activation, and the addition, that follow it; in place.

    y = act(norm(x)), y = act(norm(x) + r) and y = act(norm(x) · (1 + s) + t), by one pass over the
    values in each direction, as with `activation=`, `residual=`, `scale=` and `shift=`. Found are
    calls that follow one another in one module's forward, read by torch.fx, module by module:
    layers in an `nn.Sequential`, and in a forward of your own; activations as modules, functions
    and methods (ReLU, ReLU6, LeakyReLU, ELU, GELU, SiLU, Hardswish), additions and products as
    operators, methods and functions of torch.
    A sum before a norm, h = x + r and norm(h), is one pass too where both are large (`add=`).
    Arguments that a forward only hands on may be anything; of other optional ones calls without
    these are found. Where it depends on its
    tensors' values or on anything that cannot be looked at again, or differs in training and
    evaluation, it stays as it is.

    A module in which something was found has a class of its own from then on, derived from the one
    it had and of the same name. Each call compares all that the forward was seen to read
    (submodules and their hooks, attributes, names of its file) with what it is now. So whatever you
    change in the model, the result is that of the model as it then is: where something differs, the
    module's own forward runs; call `fuse` again to have it read anew. Parameters, buffers,
    names, `state_dict` and hooks stay. A pickled model is as it was before, a deep copy is fused.
    `unfuse` restores the classes.

    Errors: TypeError where `model` is no module; ValueError where it has no truenorm layer:
    `convert` first. The model is unchanged then.
    """
    checks.check_module("model", model)
    layers = [m for m in model.modules() if isinstance(m, OWN)]
    checks.check_has_own_layers("model", bool(layers))
    undisturbed(lambda: _fuse(model))
    return model


def undisturbed(run: Callable[[], None]) -> None:
    """Run what sets a profile function of its own."""
    if sys.getprofile() is None:
        run()
    else:  # it would be put back as a Python function, which cProfile's is not
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


def _fuse(model: Module) -> None:
    for module in model.modules():
        _unfuse(module)
    with recording():
        # the class of a child is one of the things that its parent's forward is compared by
        for module in reversed(list(model.modules())):
            if may_be_read(module) and any(isinstance(m, OWN) for m in module.modules()):
                _fuse_one(module)


def may_be_read(module: Module) -> bool:
    """Whether its forward is its class's, and written in Python."""
    if isinstance(module, (*OWN, torch.fx.GraphModule, torch.jit.ScriptModule)):
        return False
    return "forward" not in vars(module)


def _fuse_one(module: Module) -> None:
    kind = type(module)
    try:
        found = read(module)
        if not finds_something(module, found):
            return
        found = with_free_arguments(module, found)
        # one that another tool derived from a fused class looks for a plan as it is
        fused = kind if issubclass(kind, Fused) else fused_class(kind)
        made = plan(module, fused, found)
        module.__class__ = fused
    except (Unreadable, TypeError):  # which a class may raise that cannot be derived from
        return
    vars(module)[PLAN] = made


def _unfuse(module: Module) -> None:
    vars(module).pop(PLAN, None)
    if is_fused_class(type(module)):
        module.__class__ = original_of(type(module))


def unfuse(model: M) -> M:
    """Give each module that `fuse` has changed its own class again, in place: the inverse.

    A class that another tool has since derived from that of a fused module stays, and runs the
    forward as it was written.

    Errors: TypeError where `model` is no module.
    """
    checks.check_module("model", model)
    for module in model.modules():
        _unfuse(module)
    return model
