"""torch.ao.quantization's fusers on a converted model: what is refused, and the ways that work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randomize
from torch import nn
from torch.ao.quantization import fuse_modules, fuse_modules_qat
from torch.ao.quantization.fuser_method_mappings import fuse_conv_bn_relu

import truenorm

ALL = [["0", "1", "2"]]
# from torch 2.10 on, in favour of torchao, whose fuser for eager mode it still is
pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")


def converted() -> Any:
    bn = randomize(nn.BatchNorm2d(8))
    return truenorm.convert(nn.Sequential(nn.Conv2d(3, 8, 3), bn, nn.ReLU()))


@pytest.mark.parametrize(("fuse", "training"), [(fuse_modules, False), (fuse_modules_qat, True)])
def test_the_fusers_refuse_truenorms_type(fuse: Any, training: bool) -> None:
    with pytest.raises(AssertionError, match="did not find fuser method for"):
        fuse(converted().train(training), ALL)


def test_a_mapping_fuses_in_evaluation() -> None:
    model, x = converted().eval(), torch.randn(2, 3, 9, 7)
    mapping = {(nn.Conv2d, truenorm.BatchNorm2d, nn.ReLU): fuse_conv_bn_relu}
    config = {"additional_fuser_method_mapping": mapping}
    fused = fuse_modules(model, ALL, fuse_custom_config_dict=config)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    exact = nn.Sequential(*model).double()(x.double())
    assert (fused.double()(x.double()) - exact).abs().max() < 1e-5


def test_reverted_models_fuse_for_training() -> None:
    model, x = converted().train(), torch.randn(2, 3, 9, 7)
    fused = fuse_modules_qat(truenorm.revert(model), ALL)
    assert type(fused[0]).__name__ == "ConvBnReLU2d"
    exact = converted_like(fused)(x.double())
    assert (fused(x).double() - exact).abs().max() < 1e-5


def converted_like(fused: Any) -> Any:
    conv, bn = fused[0][0], fused[0][1]
    again = truenorm.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    again[0].load_state_dict(conv.state_dict())
    again[1].load_state_dict(bn.state_dict())
    return again.double().train()
