"""What layers share: running statistics that stay wide, and being a leaf to torch.fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from .._core import checks, exchange, imports
from .._core.call import Call
from .._core.eager import After
from .._core.normalize import normalize
from ._options import Configurable, Option, options_of


class Traceable(torch.nn.Module):
    """A layer stays one node under torch.fx, as torch's own layers do."""

    @staticmethod
    def _is_traced(input: Any) -> bool:
        return isinstance(input, Proxy)

    def _as_leaf(self, input: Any, **given: Any) -> Tensor:
        tracer = input.tracer
        path = tracer.path_of_module(self)
        return tracer.create_proxy("call_module", path, (input,), given)  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> Any:
        kind = type(self).__name__
        checks.fail_scripting(f"truenorm.{kind}", "truenorm.revert(copy.deepcopy(model))")


class Arranged(NamedTuple):
    """An input as a call takes it, and the way back."""

    x: Tensor
    mask: Tensor | None = None
    axis: int = 1  # of the channels
    unbatched: bool = False
    valid: Tensor | None = None  # the mask against x

    def move(self, t: Tensor) -> Tensor:
        """What is of the input's shape, as x is."""
        t = t.unsqueeze(0) if self.unbatched else t
        # a view: channels_last memory, to the kernels
        return t if self.axis == 1 else t.movedim(self.axis, 1)

    def back(self, y: Tensor) -> Tensor:
        """What is of x's shape, as the input is; a layer may have made a batch of x itself."""
        y = y if self.axis == 1 else y.movedim(1, self.axis)
        return y.squeeze(0) if self.unbatched or y.dim() > self.x.dim() else y


class Direct(Traceable, Configurable):
    """A layer whose plain calls go the short way, with what it holds read from where it is held.

    A compiler's calls have a short way of their own (_core/in_graph.py).

    `self.weight` goes through Module.__getattr__, which takes longer than a check. A parametrized,
    pruned or replicated parameter is not in `_parameters`, and then, as for a subclass with a
    `weight` of its own, the call goes the long way.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # whether this class leaves these names to Module.__getattr__
        held = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        cls._direct = not any(hasattr(cls, name) for name in held)

    def _directly(self, input: Tensor, after: After | None) -> Tensor | None:
        """The short way; None where it is not for this call."""
        raise NotImplementedError

    def _in_graph(self, input: Tensor, after: After | None) -> Tensor | None:
        """The short way of a compiler; None where it is not for this call."""
        return None

    def _act(self) -> tuple[int, float]:
        """The activation's number, and its parameter."""
        raise NotImplementedError

    def _long_way(self, input: Tensor, mask: Any, lengths: Any, padding: float, *after: Any) -> Any:
        """The long way, where every error is worded."""
        raise NotImplementedError

    def _arranged(
        self, input: Tensor, mask: Tensor | None, lengths: Tensor | None, padding_value: float
    ) -> Arranged:
        """The input with its channels in dimension 1, and the mask against it, checked."""
        raise NotImplementedError

    def _of_nested(self, input: Any, masked: bool) -> Tensor:
        """The output for a nested tensor."""
        raise NotImplementedError

    def _call(self, x: Tensor, mask: Tensor | None) -> Call:
        """What the layer computes of an arranged input, once this is found to be in order."""
        raise NotImplementedError

    def _normalized(self, call: Call) -> Tensor:
        """The call's output, by the layer's policies."""
        return normalize(call)

    def _makes_several_calls(self) -> bool:
        """Whether that takes more than the one."""
        return False

    def forward(
        self,
        input: Tensor,
        *,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
        padding_value: float = 0.0,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        add: Tensor | None = None,
        _then: tuple[int, float] | None = None,
    ) -> Any:
        # what is traced otherwise is no plain tensor, or for a mode that `_directly` sees
        compiling = is_dynamo_compiling()
        if add is not None:
            of_norm = mask, lengths, padding_value, residual, scale, shift
            given = {n: v for n, v in zip(BESIDE, of_norm, strict=False) if v is not BESIDE[n]}
            return self._of_sum(input, add, given)
        if mask is None and lengths is None:
            modulated = scale is not None or shift is not None
            alone = residual is None and _then is None and not modulated
            if alone and type(padding_value) is not float:
                checks.check_padding_value(padding_value)
            if self._direct and type(input) is Tensor and (alone or type(padding_value) is float):
                after: After | None = None
                if not (alone and self._truenorm_options.activation is None):
                    after = residual, *(self._act() if _then is None else _then)
                    if modulated:
                        after = *after, scale, shift
                direct: Tensor | None = None
                if not compiling:
                    direct = self._directly(input, after)
                elif not modulated:
                    direct = self._in_graph(input, after)
                if direct is not None:
                    return direct
        if self._is_traced(input):
            beside = mask, lengths, padding_value, residual, scale, shift, add, _then
            named = zip(BESIDE, beside, strict=True)
            return self._as_leaf(input, **{n: v for n, v in named if v is not BESIDE[n]})
        return self._long_way(input, mask, lengths, padding_value, residual, scale, shift, _then)

    def _of_sum(self, input: Any, other: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The output for a sum, and the sum."""
        if not (self._is_traced(input) or self._is_traced(other)):
            checks.check_tensor("input", input)
            checks.check_tensor("add", other)
        h = input + other
        return self.forward(h, **given), h

    def _slow_forward(self, *input: Any, **beside: Any) -> Any:
        """What torch calls for `forward` while it traces.

        Its older ONNX exporter gives a model's arguments by position and as tensors, the defaults
        of those that are taken by name alone too.
        """
        if len(input) > 1 and torch.onnx.is_in_onnx_export():
            beside = dict(zip(BESIDE, input[1:], strict=False), **beside)
            input = input[:1]
            if isinstance(beside.get("padding_value"), Tensor):
                beside["padding_value"] = float(beside["padding_value"])
        return super()._slow_forward(*input, **beside)  # type: ignore[no-untyped-call]


# what a layer is called with besides its input, and where it is not
BESIDE: dict[str, Any] = {
    "mask": None,
    "lengths": None,
    "padding_value": 0.0,
    "residual": None,
    "scale": None,
    "shift": None,
    "add": None,
    "_then": None,
}


class FixedRank(Direct):
    """A layer for inputs of certain ranks."""

    _dims: ClassVar[tuple[int, ...]]
    _shapes: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # the short way looks at _dims alone
        cls._direct = cls._direct and cls._check_input_dim is FixedRank._check_input_dim

    def _check_input_dim(self, input: Tensor) -> None:
        checks.check_input_dim(input, self._dims, type(self).__name__, self._shapes)


class RunningStatistics(_NormBase):
    """Keeps running_mean and running_var in float32 or wider under .half() and .bfloat16().

    A deliberate difference from torch: float16 statistics lose the updates of small batches
    (pytorch#70901). Statistics that were built in half precision, by the layer's `dtype` argument,
    stay as asked.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        wide = {
            name: buffer
            for name in ("running_mean", "running_var")
            if (buffer := self._buffers.get(name)) is not None
            and not is_lazy(buffer)
            and buffer.dtype in (torch.float32, torch.float64)
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in wide.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype in (torch.float16, torch.bfloat16):
                # from the values before: fn has already rounded those in `after`
                self._buffers[name] = before.to(after.device)
        return self


class Spanning(Configurable):
    """A layer whose statistics can span the processes of a group."""

    process_group: Any
    _own_options: ClassVar[dict[str, Option | None]] = {
        "process_group": Option(None, checks.check_process_group)
    }

    def _statistics_group(self) -> Any:
        """The group that this call's statistics span, or None."""
        group = self._truenorm_options.process_group
        return None if group is None else exchange.active_group(group)

    def _is_taken_to_agree(self, identity: int) -> bool:
        """By a compiler, which calls this once, while it makes the graph.

        A method, because torch 2.11 takes a layer for such a call as nothing but `self`. It guards
        no `self`, but an identity that it is asked for.
        """
        exchange.take_to_agree(self)
        return True


imports.constant_in_graphs("statistics over processes", Spanning._is_taken_to_agree)


class LazyFeatures(torch.nn.Module):
    """Reads num_features off a checkpoint too, where torch leaves it at 0."""

    num_features: int

    def initialize_parameters(self, input: Tensor) -> None:
        axis = options_of(self).channel_axis
        if axis != 1:
            checks.check_channel_axis_fits(axis, input.dim())
            input = input.movedim(axis, 1)
        super().initialize_parameters(input)  # type: ignore[misc]
        if self.num_features == 0:
            loaded = next(iter(self.state_dict().values()), None)
            self.num_features = input.shape[1] if loaded is None else loaded.numel()
