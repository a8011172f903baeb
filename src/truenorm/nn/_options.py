"""What a layer takes beyond torch's arguments: options of the layer, and of a call.

An option is a keyword-only argument of the layer, and can be read and set as an attribute. What a
layer was given stands in one place, `Chosen`, and truenorm reads it from there alone: an attribute
of a user's own that happens to have an option's name means nothing to truenorm, and wins for the
user. A layer whose options all have their defaults holds exactly what torch's holds.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Activation = Literal["relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish"]
OnSingle = Literal["error", "running", "skip"]


class Chosen(NamedTuple):
    """The options of one layer; a layer that has no such option never differs in it."""

    activation: Activation | None = None
    leaky_relu_slope: float = 0.01
    elu_alpha: float = 1.0
    gelu_approximate: Literal["none", "tanh"] = "none"
    overwrite_input: bool = False
    channel_axis: int = 1
    process_group: Any = None
    statistics_frozen: bool = False
    on_single: OnSingle = "error"
    skip_nonfinite: bool = False
    virtual_batch_size: int | None = None
    renorm: bool = False
    rmax: float = 3.0
    dmax: float = 5.0

    def different(self) -> dict[str, Any]:
        """Those that are not the defaults."""
        pairs = zip(self._fields, self, DEFAULTS, strict=True)
        return {
            name: value
            for name, value, default in pairs
            if type(value) is not type(default) or value != default
        }

    # by name: a later version may have more options
    def __reduce__(self) -> tuple[Any, ...]:
        return _chosen, (self.different(),)

    # a process group is what it is, in a copy of the layer too
    def __deepcopy__(self, memo: Any) -> Chosen:
        return self


def _chosen(given: dict[str, Any]) -> Chosen:
    return Chosen(**given)


DEFAULTS = Chosen()
STORE = "_truenorm_options"
# in the state of a pickled layer: its options are in the store. 0.1 had each as an attribute
_MARK = "_truenorm_state"
_NAMES_OF_0_1 = {
    "leaky_relu_slope": "negative_slope",
    "elu_alpha": "alpha",
    "gelu_approximate": "approximate",
    "overwrite_input": "inplace",
    "statistics_frozen": "frozen",
}


def options_of(module: torch.nn.Module) -> Chosen:
    """A module's options; another library's has none, whatever its attributes are called."""
    return module._truenorm_options if isinstance(module, Configurable) else DEFAULTS


class Option(NamedTuple):
    """A default, and what raises for a value that is out of order."""

    default: Any
    check: Callable[[Any], None]


class Attribute:
    """An option as its layer shows it, unless the layer holds something else by that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    # without __set__: what stands in an instance's __dict__ comes first
    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return getattr(DEFAULTS, self.name)
        for place in _PLACES:
            if self.name in (held := vars(layer)[place]):
                return held[self.name]
        return getattr(layer._truenorm_options, self.name)


_PLACES = ("_parameters", "_buffers", "_modules")


class Configurable(torch.nn.Module):
    """A layer with options: each class names its own in `_own_options`."""

    _own_options: ClassVar[dict[str, Option | None]] = {}  # None: torch's own after all
    # those of all classes that this one derives from
    _options: ClassVar[dict[str, Option]] = {}
    # what differs stands in the instance's __dict__, and is replaced as a whole
    _truenorm_options: Chosen = DEFAULTS
    # whether a plain call may go the short way (_core/eager.py), which asks for these itself
    _direct = False
    _asked_by_short_way = frozenset({"process_group"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, option in vars(cls).get("_own_options", {}).items():
            if option is not None:
                setattr(cls, name, Attribute(name))
        found: dict[str, Option | None] = {
            name: option
            for base in reversed(cls.__mro__)
            for name, option in vars(base).get("_own_options", {}).items()
        }
        cls._options = {name: option for name, option in found.items() if option is not None}
        # each mixed-in class says what the way through its own forward asks
        asked = (vars(base).get("_asked_by_short_way", ()) for base in cls.__mro__)
        cls._asked_by_short_way = frozenset().union(*asked)
        # in each class: a compiler guards that those before the one that has a name have not
        cls._truenorm_options = DEFAULTS

    def __setattr__(self, name: str, value: Any) -> None:
        theirs = isinstance(value, (Tensor, torch.nn.Module)) or name not in self._options
        if theirs or self._holds(name):
            super().__setattr__(name, value)
        else:
            self._choose(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._options and not self._holds(name) and name in self._chosen():
            self._choose(name, self._options[name].default)
        else:
            super().__delattr__(name)

    def _holds(self, name: str) -> bool:
        """Whether an attribute of that name is the layer's user's own."""
        held = vars(self)
        return name in held or any(name in held.get(place, ()) for place in _PLACES)

    def _choose(self, name: str, value: Any) -> None:
        """Set an option, once it is found to be in order."""
        option = self._options[name]
        if type(value) is not type(option.default) or value != option.default:
            option.check(value)
            self._check_options({**self._chosen(), name: value})
        self._take_options(self._truenorm_options._replace(**{name: value}))

    def _take_options(self, options: Chosen) -> None:
        if options.different():
            vars(self)[STORE] = options
        else:
            vars(self).pop(STORE, None)
        self._choose_way()

    def _check_options(self, chosen: dict[str, Any]) -> None:
        """Raise where these options do not go together, or not with the layer."""

    def _choose_way(self) -> None:
        if self._chosen().keys() <= self._asked_by_short_way and self._is_plain():
            vars(self).pop("_direct", None)
        else:
            vars(self)["_direct"] = False

    def _is_plain(self) -> bool:
        """Whether nothing but options keeps a call from the short way."""
        return True

    def _chosen(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        different = self._truenorm_options.different()
        return {name: different[name] for name in self._options if name in different}

    def _forget_options(self) -> None:
        """Back to all defaults, in `__dict__` alone: what the layer is left with is torch's."""
        for name in (STORE, "_direct"):
            vars(self).pop(name, None)

    # torch asks whether there is an attribute of that name already: an option is none

    def register_buffer(self, name: str, *args: Any, **kwargs: Any) -> None:
        with self._making_room("_buffers", name):
            super().register_buffer(name, *args, **kwargs)

    def register_parameter(self, name: str, *args: Any, **kwargs: Any) -> None:
        with self._making_room("_parameters", name):
            super().register_parameter(name, *args, **kwargs)

    def add_module(self, name: str, *args: Any, **kwargs: Any) -> None:
        with self._making_room("_modules", name):
            super().add_module(name, *args, **kwargs)

    @contextmanager
    def _making_room(self, place: str, name: str) -> Iterator[None]:
        held = vars(self).get(place)
        if held is None or name not in self._options or self._holds(name):
            yield
            return
        held[name] = None
        try:
            yield
        except BaseException:
            del held[name]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), _MARK: 2}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        old = state.pop(_MARK, None) is None
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if old:
            self._take_attributes_of_0_1()

    def _take_attributes_of_0_1(self) -> None:
        """There, any attribute by an option's name was the option, unless it would have failed."""
        held = vars(self)
        held.pop("_found", None)
        given = {}
        for name, option in self._options.items():
            old = _NAMES_OF_0_1.get(name, name)
            if old in held and not isinstance(held[old], (Tensor, torch.nn.Module)):
                try:
                    option.check(held[old])
                except (TypeError, ValueError):
                    continue
                given[name] = held.pop(old)
        self._take_options(self._truenorm_options._replace(**given))

    def extra_repr(self) -> str:
        chosen = (f"{name}={value!r}" for name, value in self._chosen().items())
        return ", ".join(filter(None, [super().extra_repr(), *chosen]))


C = TypeVar("C", bound=type[Configurable])


def with_options(cls: C) -> C:
    """Give a layer torch's signature, and after it a keyword-only argument for each option."""
    inherited = cls.__init__
    theirs = next(
        vars(base)["__init__"]
        for base in cls.__mro__
        if base.__module__.startswith("torch.nn.") and "__init__" in vars(base)
    )
    options = cls._options

    @functools.wraps(theirs)
    def __init__(self: Configurable, *args: Any, **kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in options if name in kwargs}
        for name, value in given.items():
            if value is not options[name].default:
                options[name].check(value)
        inherited(self, *args, **kwargs)
        for name, value in given.items():
            self._choose(name, value)

    signature = inspect.signature(theirs)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
        for name, option in options.items()
    ]
    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), *added]
    )
    cls.__init__ = __init__  # type: ignore[assignment,method-assign]
    # in each class, as `_truenorm_options` is
    cls.forward = cls.forward
    return cls
