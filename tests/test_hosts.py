"""Libraries that find layers by their exact classes take truenorm's as they take torch's."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from cases import randomize
from torch import Tensor
from torch.testing import assert_close

import truenorm
from truenorm._core import imports

STATISTICS = {"affine": True, "track_running_stats": True}


def library(name: str) -> Any:
    """A library that is not everywhere, whose own import may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def both(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """truenorm's layer and torch's, with the same values."""
    theirs = randomize(getattr(torch.nn, name)(*args, **kwargs))
    return truenorm.convert(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("order", ["import truenorm, {}", "import {}, truenorm"])
@pytest.mark.parametrize("name", ["opacus", "captum.attr", "thop"])
def test_the_order_of_imports_does_not_matter(order: str, name: str) -> None:
    library(name)
    code = (
        f"{order.format(name)}\nfrom truenorm._core import imports\n"
        "assert not imports.FAILED, imports.FAILED\nprint(len(imports.DONE))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) > 0


def test_info_says_where_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not made known" not in str(truenorm.info())
    monkeypatch.setitem(imports.FAILED, "Opacus", "ImportError: moved")
    assert "not made known to Opacus: ImportError: moved" in str(truenorm.info())


# ---------------------------------------------------------------- Opacus


@pytest.fixture
def opacus() -> Any:
    return library("opacus")


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("BatchNorm1d", (6,), {}),
        ("BatchNorm2d", (6,), {}),
        ("BatchNorm3d", (6,), {}),
        ("SyncBatchNorm", (6,), {}),
        ("InstanceNorm1d", (6,), STATISTICS),
        ("InstanceNorm2d", (6,), STATISTICS),
        ("InstanceNorm2d", (6,), {"affine": True}),
        ("GroupNorm", (2, 6), {}),
        ("LayerNorm", (6,), {}),
        ("RMSNorm", (6,), {}),
    ],
)
def test_opacus_refuses_what_it_refuses_of_torchs(
    opacus: Any, name: str, args: Any, kwargs: Any
) -> None:
    from opacus.validators import ModuleValidator

    found = [ModuleValidator.validate(torch.nn.Sequential(m)) for m in both(name, *args, **kwargs)]
    assert [str(e) for e in found[0]] == [str(e) for e in found[1]]
    assert [type(e) for e in found[0]] == [type(e) for e in found[1]]
    assert bool(found[0]) == (name.startswith(("Batch", "Sync")) or kwargs == STATISTICS)


def test_opacus_makes_no_private_model_of_a_batch_norm(opacus: Any) -> None:
    model = truenorm.convert(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = opacus.PrivacyEngine()
        with pytest.raises(Exception, match="BatchNorm cannot support training with differential"):
            engine.make_private(
                module=model,
                optimizer=optimizer,
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )


@pytest.mark.parametrize("how", [{}, {"replace_bn_with_in": True}, {"num_groups": 3}])
def test_opacus_puts_a_layer_of_truenorms_in_its_place(opacus: Any, how: dict[str, Any]) -> None:
    from opacus.validators import ModuleValidator

    fixed = ModuleValidator.fix(torch.nn.Sequential(truenorm.BatchNorm2d(6)), **how)
    kind = truenorm.InstanceNorm2d if "replace_bn_with_in" in how else truenorm.GroupNorm
    assert type(fixed[0]) is kind
    assert not ModuleValidator.validate(fixed)
    tracking = torch.nn.Sequential(truenorm.InstanceNorm2d(6, **STATISTICS))
    fixed = ModuleValidator.fix(tracking)
    assert type(fixed[0]) is truenorm.InstanceNorm2d
    assert not ModuleValidator.validate(fixed)
    active = ModuleValidator.fix(
        torch.nn.Sequential(truenorm.BatchNorm2d(6, activation="leaky_relu", leaky_relu_slope=0.3)),
        **how,
    )
    assert (active[0].activation, active[0].leaky_relu_slope) == ("leaky_relu", 0.3)


def test_opacus_refuses_what_it_would_get_wrong(opacus: Any) -> None:
    from opacus.validators import ModuleValidator

    for layer in (
        truenorm.GroupNorm(2, 6, activation="relu"),
        truenorm.InstanceNorm1d(6, affine=True, channel_axis=-1),
    ):
        (error,) = ModuleValidator.validate(torch.nn.Sequential(layer))
        assert type(layer).__name__ in str(error)
        assert "its per-sample gradients would be wrong" in str(error)


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("GroupNorm", (2, 6), (5, 6, 3, 4)),
        ("GroupNorm", (2, 6), (5, 6)),
        ("InstanceNorm1d", (6, 1e-3, 0.1, True), (5, 6, 3)),
        ("InstanceNorm3d", (6, 1e-3, 0.1, True), (5, 6, 3, 1, 2)),
        ("LayerNorm", (6,), (5, 6)),
        ("LayerNorm", ((3, 6),), (5, 2, 7, 3, 6)),
        ("RMSNorm", (6, 1e-3), (5, 2, 6)),
    ],
)
def test_per_sample_gradients(
    opacus: Any, name: str, args: Any, shape: tuple[int, ...], frozen: str
) -> None:
    from opacus.grad_sample import GradSampleModule

    x, grad = torch.randn(shape) + 2.0, torch.randn(shape)
    if frozen == "bias" and name == "RMSNorm":
        return
    found: list[dict[str, Tensor]] = []
    for layer in both(name, *args):
        if frozen:
            getattr(layer, frozen).requires_grad_(False)
        # Opacus takes the backward's batch for a mean: what it multiplies by is 1 here
        module = GradSampleModule(torch.nn.Sequential(layer), loss_reduction="sum")
        module(x.requires_grad_()).backward(grad)
        found.append({n: p.grad_sample for n, p in module.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for key, of_each in found[0].items():
        assert_close(of_each, found[1][key], rtol=1e-4, atol=1e-5)
    # and by the layer itself, sample by sample
    layer, _ = both(name, *args)
    layer.load_state_dict(module._module[0].state_dict())
    for i in range(len(x)):
        layer.zero_grad()
        layer(x[i : i + 1]).backward(grad[i : i + 1])
        for key, of_each in found[0].items():
            assert_close(of_each[i], getattr(layer, key.split(".")[-1]).grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- Captum, thop


def test_captum_propagates_relevance_as_through_torchs() -> None:
    attr = library("captum.attr")
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 2)
    ).eval()
    randomize(theirs)
    ours = truenorm.convert(copy.deepcopy(theirs))
    assert type(ours[1]) is truenorm.BatchNorm2d
    x = torch.randn(2, 3, 7, 5)
    x.requires_grad_()
    found = [attr.LRP(model).attribute(x, target=(1, 0, 1)) for model in (ours, theirs)]
    assert found[1].abs().sum() > 0
    assert_close(*found)
    fused = copy.deepcopy(theirs)
    fused[1] = truenorm.BatchNorm2d(6, activation="relu").eval()
    with pytest.raises(NotImplementedError, match=r"LRP does not know.*activation='relu'.*unfuse"):
        attr.LRP(fused).attribute(x, target=(1, 0, 1))
    assert fused[1].activation == "relu"


def test_thop_counts_as_for_torchs() -> None:
    thop = library("thop")
    theirs = torch.nn.Sequential(
        torch.nn.BatchNorm2d(6), torch.nn.InstanceNorm2d(6, affine=True), torch.nn.Flatten(1, 2),
        torch.nn.LayerNorm(5),
    )  # fmt: skip
    ours = truenorm.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 6, 7, 5)
    found = [thop.profile(model, (x,), verbose=False) for model in (ours, theirs)]
    assert found[0] == found[1]
    assert found[0][0] > x.numel()


@pytest.mark.parametrize(
    ("name", "args"),
    [("LayerNorm", (5,)), ("GroupNorm", (2, 6)), ("InstanceNorm2d", (6,)), ("BatchNorm2d", (6,))],
)
def test_fvcore_counts_as_for_torchs(name: str, args: Any) -> None:
    fvcore = library("fvcore.nn")
    x = torch.randn(2, 6, 7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [fvcore.FlopCountAnalysis(m.eval(), x).total() for m in both(name, *args)]
    assert found[0] == found[1] > 0


# ---------------------------------------------------------------- torch's own


def quantized(layer: Any, x: Tensor) -> Tensor:
    import torch.ao.quantization as quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.nn.Sequential(
            quantization.QuantStub(), layer, quantization.DeQuantStub()
        ).eval()
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(model)
        prepared(x)
        converted = quantization.convert(prepared)
        assert "quantized" in type(converted[1]).__module__
        return converted(x)


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("LayerNorm", (6,), (4, 5, 6)),
        ("GroupNorm", (2, 6), (4, 6, 5, 3)),
        ("InstanceNorm1d", (6, 1e-5, 0.1, True), (4, 6, 7)),
        ("InstanceNorm2d", (6, 1e-5, 0.1, True), (4, 6, 7, 3)),
        ("BatchNorm2d", (6,), (4, 6, 5, 3)),
        ("BatchNorm3d", (6,), (4, 6, 5, 3, 2)),
    ],
)
def test_a_layer_by_itself_is_quantized(name: str, args: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    ours, theirs = (quantized(layer, x) for layer in both(name, *args))
    # one step of the 127 that the range has: the observers saw other roundings
    assert (ours - theirs).abs().max() <= 1.01 * (theirs.max() - theirs.min()) / 127
    assert (ours - both(name, *args)[1].eval()(x)).abs().max() != 0


def test_a_layer_with_an_activation_is_not_quantized() -> None:
    with pytest.raises(NotImplementedError, match=r"does not know.*activation='relu'.*unfuse"):
        quantized(truenorm.LayerNorm(6, activation="relu"), torch.randn(4, 6))


@pytest.mark.parametrize("how", ["fuse", "optimize_for_inference"])
def test_fx_folds_a_batch_norm(how: str) -> None:
    from torch.fx.experimental import optimization

    theirs = randomize(
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
            torch.nn.Conv2d(6, 4, 1, bias=False), torch.nn.BatchNorm2d(4),
        )
    ).eval()  # fmt: skip
    model = truenorm.convert(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded = getattr(optimization, how)(model)
    assert not any("BatchNorm" in type(m).__name__ for m in folded.modules())
    assert_close(folded(x), theirs(x), rtol=1e-4, atol=1e-5)
    model[1].activation = "relu"
    assert any("BatchNorm" in type(m).__name__ for m in optimization.fuse(model).modules())
    assert_close(optimization.fuse(model)(x), model(x), rtol=1e-4, atol=1e-5)
