"""Bad input for every layer and function, and what the message about it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import AFFINE, TRACKING


class Bad(NamedTuple):
    """A layer and an input that it must refuse, with what the message says (a pattern)."""

    id: str
    layer: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: Callable[[], Any]
    message: str


def shaped(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def integers(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(9, shape)


RANK = (
    r"expected {} input \(got {}D input\): `input` of shape \({}.* does not fit {}, which takes \("
)
CHANNELS = (
    r"expected input's size at dim={} to match num_features \({}\), but got: {}\. .*num_features={}"
)
ONE_VALUE = r"more than 1 value per channel when training, got input size .*larger batch"
ONE_POSITION = r"more than 1 spatial element when training, got input size .*larger maps"
EPS = r"eps must be {}, but got {}: use the default 1e-5"
MOMENTUM = r"`momentum` must be in \[0, 1\] or None, but got {}: it is the weight"
INTEGER = r"`input` has dtype torch.int64, .*convert it to a floating point dtype, e.g. input.float"
NO_TENSOR = r"`input` must be a torch.Tensor, but got {}: convert it with torch.as_tensor"
TRAILING = (
    r"normalized_shape=\[{}\], expected input with shape \[\*, {}\], but got input of size \[{}\]"
)

LAYERS = [
    Bad(
        "rank", "BatchNorm1d", (5,), {}, shaped(5), RANK.format("2D or 3D", 1, "5,", "BatchNorm1d")
    ),
    Bad(
        "rank",
        "BatchNorm1d",
        (5,),
        {},
        shaped(2, 5, 3, 3),
        RANK.format("2D or 3D", 4, "2, 5", "BatchNorm1d"),
    ),
    Bad(
        "rank",
        "BatchNorm2d",
        (5,),
        {},
        shaped(5, 3, 3),
        RANK.format("4D", 3, "5, 3", "BatchNorm2d"),
    ),
    Bad(
        "rank",
        "BatchNorm3d",
        (5,),
        {},
        shaped(2, 5, 3, 3),
        RANK.format("5D", 4, "2, 5", "BatchNorm3d"),
    ),
    Bad(
        "rank",
        "LazyBatchNorm2d",
        (),
        {},
        shaped(2, 5, 3),
        RANK.format("4D", 3, "2, 5", "BatchNorm2d"),
    ),
    Bad(
        "rank",
        "SyncBatchNorm",
        (5,),
        {},
        shaped(5),
        r"at least 2D input \(got 1D input\): .*\(N, C, …\)",
    ),
    Bad(
        "rank",
        "InstanceNorm1d",
        (5,),
        TRACKING,
        shaped(5),
        RANK.format("2D or 3D", 1, "5,", "InstanceNorm1d"),
    ),
    Bad(
        "rank",
        "InstanceNorm2d",
        (5,),
        TRACKING,
        shaped(2, 5),
        RANK.format("3D or 4D", 2, "2, 5", "InstanceNorm2d"),
    ),
    Bad(
        "rank",
        "InstanceNorm3d",
        (5,),
        {},
        shaped(5, 3, 3),
        RANK.format("4D or 5D", 3, "5, 3", "InstanceNorm3d"),
    ),
    Bad(
        "rank",
        "GroupNorm",
        (2, 6),
        {},
        shaped(6),
        r"at least 2 dimensions .* received 1: .*input\[None\]",
    ),
    Bad(
        "rank",
        "LocalResponseNorm",
        (3,),
        {},
        shaped(2, 5),
        r"Expected 3D or higher .*got 2 dim.*\(N, C, positions",
    ),
    Bad("channels", "BatchNorm1d", (5,), {}, shaped(7, 4), CHANNELS.format(1, 5, 4, 4)),
    Bad("channels", "BatchNorm2d", (5,), {}, shaped(2, 4, 3, 3), CHANNELS.format(1, 5, 4, 4)),
    Bad("channels", "BatchNorm3d", (5,), {}, shaped(2, 4, 3, 3, 3), CHANNELS.format(1, 5, 4, 4)),
    Bad("channels", "SyncBatchNorm", (5,), {}, shaped(2, 4, 3), CHANNELS.format(1, 5, 4, 4)),
    Bad("channels", "InstanceNorm1d", (5,), TRACKING, shaped(2, 4, 3), CHANNELS.format(1, 5, 4, 4)),
    Bad(
        "channels", "InstanceNorm2d", (5,), AFFINE, shaped(2, 4, 3, 3), CHANNELS.format(1, 5, 4, 4)
    ),
    Bad(
        "channels",
        "InstanceNorm2d",
        (5,),
        {"affine": True},
        shaped(4, 3, 3),
        CHANNELS.format(0, 5, 4, 4),
    ),
    Bad(
        "channels without parameters",
        "BatchNorm2d",
        (5,),
        {"affine": False, "track_running_stats": False},
        shaped(2, 4, 3, 3),
        CHANNELS.format(1, 5, 4, 4),
    ),
    Bad(
        "channels",
        "GroupNorm",
        (2, 6),
        {},
        shaped(2, 4, 3),
        r"Expected weight to be a vector .*number of channels",
    ),
    Bad(
        "channels",
        "GroupNorm",
        (2, 6),
        {},
        shaped(2, 5, 3),
        r"divisible by num_groups, .*num_groups=2: choose a div",
    ),
    # (N, C) read as unbatched (C, L); (N, H, W) read as unbatched (C, H, W)
    Bad(
        "ambiguous",
        "InstanceNorm1d",
        (5,),
        AFFINE,
        shaped(2, 5),
        r"size at dim=0 .*\(5\), but got: 2.*read as unbatched \(C, L\)",
    ),
    Bad(
        "ambiguous",
        "InstanceNorm2d",
        (5,),
        TRACKING,
        shaped(2, 7, 9),
        r"dim=0 .*read as unbatched \(C, H, W\)",
    ),
    Bad(
        "ambiguous",
        "InstanceNorm3d",
        (5,),
        AFFINE,
        shaped(2, 5, 7, 9),
        r"dim=0 .*read as unbatched \(C, D, H, W\)",
    ),
    Bad("trailing", "LayerNorm", ((7,),), {}, shaped(3, 5), TRAILING.format("7", "7", "3, 5")),
    Bad("trailing", "LayerNorm", ((5, 7),), {}, shaped(7), TRAILING.format("5, 7", "5, 7", "7")),
    Bad("trailing", "RMSNorm", ((7,),), {}, shaped(3, 5), TRAILING.format("7", "7", "3, 5")),
    Bad("one value", "BatchNorm1d", (5,), {}, shaped(1, 5), ONE_VALUE),
    Bad("one value", "BatchNorm2d", (5,), {}, shaped(1, 5, 1, 1), ONE_VALUE),
    Bad("one value", "BatchNorm3d", (5,), {"momentum": None}, shaped(1, 5, 1, 1, 1), ONE_VALUE),
    Bad("one value", "SyncBatchNorm", (5,), {}, shaped(1, 5), ONE_VALUE),
    Bad("one position", "InstanceNorm1d", (5,), TRACKING, shaped(3, 5, 1), ONE_POSITION),
    Bad("one position", "InstanceNorm2d", (5,), {}, shaped(3, 5, 1, 1), ONE_POSITION),
    Bad("one position", "InstanceNorm3d", (5,), TRACKING, shaped(5, 1, 1, 1), ONE_POSITION),
    Bad("one value", "GroupNorm", (6, 6), {}, shaped(1, 6), r"more than 1 value per channel"),
    Bad(
        "eps",
        "BatchNorm2d",
        (5,),
        {"eps": -0.1},
        shaped(2, 5, 3, 3),
        EPS.format("positive during training", -0.1),
    ),
    Bad(
        "eps",
        "BatchNorm2d",
        (5,),
        {"eps": 0.0},
        shaped(2, 5, 3, 3),
        EPS.format("positive during training", 0.0),
    ),
    Bad(
        "eps",
        "SyncBatchNorm",
        (5,),
        {"eps": -0.1},
        shaped(2, 5, 3),
        EPS.format("positive during training", -0.1),
    ),
    Bad(
        "eps",
        "InstanceNorm2d",
        (5,),
        {"eps": -0.1, **TRACKING},
        shaped(2, 5, 3, 3),
        EPS.format("non-negative", -0.1),
    ),
    Bad(
        "eps", "GroupNorm", (2, 6), {"eps": -0.1}, shaped(2, 6, 3), EPS.format("non-negative", -0.1)
    ),
    Bad("eps", "LayerNorm", ((7,),), {"eps": -0.1}, shaped(2, 7), EPS.format("non-negative", -0.1)),
    Bad("eps", "RMSNorm", ((7,),), {"eps": -0.1}, shaped(2, 7), EPS.format("non-negative", -0.1)),
    Bad(
        "momentum", "BatchNorm2d", (5,), {"momentum": 1.5}, shaped(2, 5, 3, 3), MOMENTUM.format(1.5)
    ),
    Bad("momentum", "BatchNorm1d", (5,), {"momentum": -0.1}, shaped(2, 5), MOMENTUM.format(-0.1)),
    Bad("momentum", "SyncBatchNorm", (5,), {"momentum": 9}, shaped(2, 5), MOMENTUM.format(9)),
    Bad(
        "momentum",
        "InstanceNorm1d",
        (5,),
        {"momentum": -0.1, **TRACKING},
        shaped(2, 5, 3),
        MOMENTUM.format(-0.1),
    ),
    Bad("integer", "BatchNorm2d", (5,), {}, integers(2, 5, 3, 3), INTEGER),
    Bad("integer", "SyncBatchNorm", (5,), {}, integers(2, 5, 3, 3), INTEGER),
    Bad("integer", "InstanceNorm2d", (5,), TRACKING, integers(2, 5, 3, 3), INTEGER),
    Bad("integer", "GroupNorm", (2, 6), {}, integers(2, 6, 3), INTEGER),
    Bad("integer", "LayerNorm", ((7,),), {}, integers(2, 7), INTEGER),
    Bad("integer", "RMSNorm", ((7,),), {}, integers(2, 7), INTEGER),
    Bad(
        "size",
        "LocalResponseNorm",
        (0,),
        {},
        shaped(2, 5, 3),
        r"`size` \(=0\) .* should be greater than zero",
    ),
]


# A function, its arguments and the message.
V5, V4 = torch.ones(5), torch.ones(4)
X = torch.randn(2, 5, 3)
FUNCTIONS: list[tuple[str, tuple[Any, ...], str]] = [
    (
        "batch_norm",
        (torch.randn(5), V5, V5),
        r"at least 2 dimensions .* received 1: `input` of shape \(5,\)",
    ),
    (
        "batch_norm",
        (torch.randn(5), None, None, None, None, True),
        r"at least 2 dimensions .* received 1",
    ),
    ("batch_norm", (X, V4, V4), r"running_mean should contain 5 elements not 4: .*num_features=5"),
    ("batch_norm", (X, V5, V4), r"running_var should contain 5 elements not 4"),
    (
        "batch_norm",
        (X, None, None, V4, None, True),
        r"Expected weight to be a vector .* weight of shape \(4,\)",
    ),
    (
        "batch_norm",
        (X, None, None, V5, V4, True),
        r"Expected bias to be a vector .* bias of shape \(4,\)",
    ),
    (
        "batch_norm",
        (X, None, None),
        r"running_mean and running_var to be defined when training=False: pass both",
    ),
    ("batch_norm", (torch.randn(1, 5), None, None, None, None, True), ONE_VALUE),
    (
        "batch_norm",
        (X, V5, V5, None, None, True, 0.1, -1.0),
        EPS.format("positive during training", -1.0),
    ),
    ("batch_norm", (X, V5, V5, None, None, False, 0.1, -1.0), EPS.format("non-negative", -1.0)),
    ("batch_norm", (X.long(), V5, V5), INTEGER),
    ("instance_norm", (X, V4, V4), r"running_mean should contain 5 elements not 4"),
    ("instance_norm", (X, None, None, V4), r"Expected weight to be a vector"),
    ("instance_norm", (X, V5, None), r"neither be None: `running_var` is None"),
    (
        "instance_norm",
        (X, None, None, None, None, False),
        r"defined when use_input_stats=False: pass both",
    ),
    ("instance_norm", (torch.randn(2, 5, 1),), ONE_POSITION),
    ("instance_norm", (X.long(),), INTEGER),
    ("group_norm", (torch.randn(5), 5), r"at least 2 dimensions"),
    (
        "group_norm",
        (X, 2),
        r"divisible by num_groups, but got input of shape \[2, 5, 3\] and num_groups=2: choose",
    ),
    ("group_norm", (X, 5, V4), r"Expected weight to be a vector"),
    ("group_norm", (X, 5, V5, V4), r"Expected bias to be a vector"),
    ("group_norm", (X.long(), 5), INTEGER),
    ("layer_norm", (X, (5,)), TRAILING.format("5", "5", "2, 5, 3")),
    (
        "layer_norm",
        (X, ()),
        r"at least 1-dimensional.* but got normalized_shape = \[\]: name the trailing sizes",
    ),
    (
        "layer_norm",
        (X, (3,), V4),
        r"Expected weight to be of same shape as normalized_shape \(\[3\]\), .*\(4,\)",
    ),
    ("layer_norm", (X, (3,), None, V4), r"Expected bias to be of same shape"),
    ("layer_norm", (X.long(), (3,)), INTEGER),
    ("rms_norm", (X, (5,)), TRAILING.format("5", "5", "2, 5, 3")),
    ("rms_norm", (X, (3,), V4), r"Expected weight to be of same shape"),
    ("rms_norm", (X.long(), (3,)), INTEGER),
    ("local_response_norm", (torch.randn(2, 5), 3), r"Expected 3D or higher"),
    ("local_response_norm", (X, 0), r"`size` \(=0\)"),
]
