"""How an input that is a DTensor is placed while it is normalized.

Every dimension of the mesh has a role, read off the placement there and off which values share a
statistic: a part has whole statistics (samples, or channels with their parameters), or its
statistics span the parts, which exchange moments, or it is seen whole by every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from . import checks, geometry, imports
from .geometry import Axes

# torch.distributed.tensor, once somebody has imported it: without it there is no DTensor
_TENSOR: Any = None


def _found(module: Any) -> None:
    global _TENSOR
    _TENSOR = module


imports.after_import("torch.distributed.tensor", "DTensor", _found)


def wanted(x: Any, *others: Any) -> bool:
    """Whether x is a DTensor; an error where it is not and its parameters are."""
    if _TENSOR is None:
        return False
    if isinstance(x, _TENSOR.DTensor):
        return True
    checks.check_none_sharded([t for t in others if isinstance(t, _TENSOR.DTensor)], x)
    return False


class Role(Enum):
    WHOLE = "every process has all of it"
    SAMPLES = "each has whole statistics, and all parameters"
    CHANNELS = "each has whole statistics, and their parameters alone"
    ACROSS = "statistics span the processes"


class Plan(NamedTuple):
    """How x is placed while it is normalized: one entry for each dimension of its mesh."""

    mesh: Any
    roles: tuple[Role, ...]
    placements: tuple[Any, ...]

    def _by_role(self, **by_role: Any) -> tuple[Any, ...]:
        whole = _TENSOR.Replicate()
        return tuple(by_role.get(role.name.lower(), whole) for role in self.roles)

    @property
    def of_channels(self) -> tuple[Any, ...]:
        """Of what has one value per channel."""
        return self._by_role(channels=_TENSOR.Shard(0))

    @property
    def of_gradients(self) -> tuple[Any, ...]:
        """Of the gradients of weight and bias, which torch's layers too leave to be summed."""
        part = _TENSOR.Partial()
        return self._by_role(channels=_TENSOR.Shard(0), samples=part, across=part)

    def groups(self, role: Role) -> list[Any]:
        """The groups of processes along the dimensions with that role."""
        return [self.mesh.get_group(i) for i, r in enumerate(self.roles) if r is role]

    def part(self, t: Any) -> Any:
        """This process's part of x, or of what is placed as x is."""
        return self._local(t, self.placements, self.placements)

    def parameter(self, t: Any) -> Any:
        """This process's part of a weight or bias, against its part of x."""
        return self._local(t, self.of_channels, self.of_gradients)

    def statistic(self, t: Any) -> Any:
        """This process's part of a running statistic: the tensor itself where it has all of it."""
        return self._local(t, self.of_channels, self.of_channels)

    def _local(self, t: Any, placements: Sequence[Any], gradients: Sequence[Any]) -> Any:
        if t is None:
            return None
        if not isinstance(t, _TENSOR.DTensor):
            # the same in every process
            everywhere = [_TENSOR.Replicate()] * self.mesh.ndim
            t = _TENSOR.DTensor.from_local(t, self.mesh, everywhere, run_check=False)
        checks.check_same_mesh(t.device_mesh, self.mesh)
        if tuple(t.placements) != tuple(placements):
            t = t.redistribute(self.mesh, placements)
        return _as_held(t.to_local(grad_placements=gradients), t)

    def joined(self, part: Tensor, like: Tensor, axes: Axes) -> Tensor:
        """The DTensor, in x's place, of which `part` is this process's."""
        strides = geometry.kept_strides(like, axes)
        made: Tensor = self._dtensor(part, self.placements, like.shape, strides)
        return made

    def statistic_joined(self, part: Tensor, like: Tensor) -> Any:
        return self._dtensor(part, self.of_channels, like.shape, (1,))

    def _dtensor(self, part: Tensor, placements: Any, shape: Any, stride: Any) -> Any:
        return _TENSOR.DTensor.from_local(
            part, self.mesh, placements, run_check=False, shape=shape, stride=stride
        )


class _AsHeld(Function):
    """The same values in these strides, and their gradient too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.strides = strides
        return part.as_strided(part.shape, strides)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # other ones have the part's strides, as every kernel gives them
        return grad if grad.numel() else grad.as_strided(grad.shape, ctx.strides), None


def _as_held(part: Tensor, whole: Any) -> Tensor:
    """A DTensor's part, in the strides of the tensor that the DTensor holds.

    to_local() makes up the stride of a dimension of size 1, and a formula those of an empty part's
    gradient. torch takes a whole gradient's strides from its part's, so they would be others in
    this process than where parts are larger. A leaf's gradient that has not the leaf's strides is
    gathered by torch 2.11, which the other processes then know nothing of.
    """
    held = whole._local_tensor.stride()
    if not part.requires_grad or torch.compiler.is_compiling():
        return part
    if part.numel() and part.stride() == held:
        return part
    return cast(Tensor, _AsHeld.apply(part, held))  # type: ignore[no-untyped-call]


def _role(x: Any, dim: int, parts: int, axes: Axes, fixed: bool) -> Role:
    """The role of a dimension of the mesh, of that many parts, over which x is cut along dim."""
    if axes.feature_dims:
        return Role.SAMPLES if dim < x.dim() - axes.feature_dims else Role.WHOLE
    if dim == 1:
        per_group = x.shape[1] // axes.num_groups if axes.num_groups and not fixed else 1
        fits = per_group == 1 or x.shape[1] % (parts * per_group) == 0
        return Role.CHANNELS if fits else Role.WHOLE
    if fixed or (axes.num_groups and dim == 0):
        return Role.SAMPLES
    return Role.ACROSS


def plan(x: Any, axes: Axes, *, fixed: bool = False, never: Sequence[Role] = ()) -> Plan:
    """never: roles for which each process takes the whole instead."""
    mesh, roles = x.device_mesh, []
    for i, placement in enumerate(x.placements):
        role = Role.WHOLE
        if isinstance(placement, _TENSOR.Shard):
            role = _role(x, placement.dim % x.dim(), mesh.size(i), axes, fixed)
        # one group of processes exchanges moments, and a dimension is cut once for parameters
        again = role in (Role.ACROSS, Role.CHANNELS) and role in roles
        roles.append(Role.WHOLE if role in never or again else role)
    whole = _TENSOR.Replicate()
    placements = (
        whole if role is Role.WHOLE else placement
        for role, placement in zip(roles, x.placements, strict=True)
    )
    return Plan(mesh, tuple(roles), tuple(placements))
