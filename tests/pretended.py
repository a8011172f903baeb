"""A GPU that is pretended: tensors that say they are on it, and are held on the CPU.

It refuses what a GPU refuses, so that a test's own slips (a gradient made on the wrong device, a
`.numpy()` of a tensor on a GPU, a generator of the CPU) show without one. "cuda" is understood as
this device: torch lets no other build than CUDA's have tensors there that take part in autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.backend_registration
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

torch.utils.backend_registration._setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# these take indices that are on the CPU
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
# what has to wait for the device
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Pretended(Tensor):
    """A tensor on that device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert pretended:0 device type tensor to numpy")
        return self.held.numpy(force=True)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended CUDA tensor outside pretending()")


class _Pretending(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.waiting_raises = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        on_device = [isinstance(t, Pretended) for t in tensors]
        asked = kwargs.get("device")
        made = any(on_device) if asked is None else torch.device(asked) == DEVICE
        if func not in (*_COPIES, *_INDEXED) and any(on_device):
            for t in tensors:
                if not isinstance(t, Pretended) and t.dim():
                    raise RuntimeError(
                        "Expected all tensors to be on the same device, but found at least two "
                        f"devices, pretended:0 and cpu! (in {func})"
                    )
        generator = kwargs.get("generator")
        if generator is not None and made != (generator.device == DEVICE):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        waits = func in _READS or (func in _COPIES and len({*on_device, made}) > 1)
        if self.waiting_raises and waits and any(on_device):
            raise RuntimeError("called a synchronizing CUDA operation")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = tree_map_only(Pretended, lambda t: t.held, (args, kwargs))
        result = func(*held_args, **held_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if not made:
            return result
        result = tree_map_only(Tensor, Pretended, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if any(on_device) else result


def _here(value: Any) -> Any:
    return DEVICE if str(value) in ("cuda", "cuda:0", "pretended") else value


class _Named(TorchFunctionMode):
    """This device where cuda is asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], DEVICE)
        elif func is Tensor.to:
            args = (args[0], *map(_here, args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _here(kwargs["device"])
            if func in (torch.tensor, torch.as_tensor):
                # made past every mode
                return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


def held(value: Any) -> Any:
    """What a kernel is launched on."""
    return value.held if isinstance(value, Pretended) else value


@contextmanager
def pretending() -> Iterator[_Pretending]:
    """Tensors can be made on the device, and `torch.cuda.set_sync_debug_mode` minds it."""
    with pytest.MonkeyPatch.context() as patch, _Named(), _Pretending() as mode:

        def set_mode(wanted: str) -> None:
            mode.waiting_raises = wanted == "error"

        patch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
        yield mode
