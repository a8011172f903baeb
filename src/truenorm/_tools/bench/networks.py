"""Networks that others wrote, with random weights: what a whole training step is timed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from ..._models.layers import kind_of


class Network(NamedTuple):
    """A network and the shape of its input.

    package: what it comes from, and needs.
    small: the shape for tests, with `build(True)`, fewer layers and channels.
    """

    name: str
    package: str
    build: Callable[[bool], Module]
    shape: tuple[int, ...]
    small: tuple[int, ...]


def _resnet(small: bool) -> Module:
    from transformers import ResNetConfig, ResNetModel

    few: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    return ResNetModel(ResNetConfig(**(few if small else {})))  # type: ignore[no-any-return]


def _mobilenet(small: bool) -> Module:
    from transformers import MobileNetV2Config, MobileNetV2Model

    few: dict[str, Any] = {
        "depth_multiplier": 0.25, "finegrained_output": False, "tf_padding": False
    }  # fmt: skip
    return MobileNetV2Model(MobileNetV2Config(**(few if small else {})))  # type: ignore[no-any-return]


def _vit(small: bool) -> Module:
    from transformers import ViTConfig, ViTModel

    few: dict[str, Any] = {
        "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
        "intermediate_size": 48, "image_size": 32,
    }  # fmt: skip
    return ViTModel(ViTConfig(**(few if small else {"num_hidden_layers": 4})))  # type: ignore[no-any-return]


def _dynunet(small: bool) -> Module:
    from monai.networks.nets import DynUNet

    filters = [4, 8, 12, 16] if small else [32, 64, 128, 256]
    norm = ("INSTANCE", {"affine": True})
    return DynUNet(  # type: ignore[no-any-return]
        3, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=filters, norm_name=norm
    )


def _segresnet(small: bool) -> Module:
    from monai.networks.nets import SegResNet

    few: dict[str, Any] = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    return SegResNet(3, 8, 1, 3, **(few if small else {}))  # type: ignore[no-any-return]


def _basic_unet(small: bool) -> Module:
    from monai.networks.nets import BasicUNet

    features = (4, 4, 8, 8, 16, 4) if small else (32, 32, 64, 128, 256, 32)
    return BasicUNet(2, 1, 2, features=features)  # type: ignore[no-any-return]


NETWORKS = (
    Network("ResNet-50", "transformers", _resnet, (8, 3, 128, 128), (2, 3, 64, 64)),
    Network("MobileNetV2", "transformers", _mobilenet, (16, 3, 128, 128), (4, 3, 64, 64)),
    Network("ViT", "transformers", _vit, (2, 3, 224, 224), (2, 3, 32, 32)),
    Network("DynUNet", "monai", _dynunet, (1, 1, 48, 48, 48), (2, 1, 16, 16, 16)),
    Network("SegResNet", "monai", _segresnet, (1, 1, 64, 64, 64), (2, 1, 16, 16, 16)),
    Network("BasicUNet", "monai", _basic_unet, (4, 1, 128, 128), (2, 1, 32, 32)),
)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of an output: the last hidden state, the segmentation."""
    return next(t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor))


def without_norms(model: Module) -> Module:
    """The model with Identity in the place of each normalization layer, in place: the ceiling."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if kind_of(child) is not None:
                setattr(module, name, torch.nn.Identity())
    return model
