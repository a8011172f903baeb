"""torch.ao's fusing and torchao's flow for exported programs see truenorm's layers as torch's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import randomize
from tolerances import FLOAT32_BETWEEN, relative
from torch import nn
from torch.nn import Module
from versions import older_than

import truenorm

fusing = pytest.importorskip("torch.ao.quantization")

# a pair of each kind that torch.ao fuses, with an input
PAIRS: list[tuple[Module, Module, tuple[int, ...]]] = [
    (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (4, 3, 9)),
    (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (4, 3, 9, 7)),
    (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), (4, 3, 5, 6, 7)),
    (nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), (4, 3, 5, 6)),
    (nn.Linear(3, 6), nn.BatchNorm1d(6), (5, 3)),
]


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    # torch.ao.quantization moves to another package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fused(pair: tuple[Module, Module], *, training: bool, ours: bool) -> Module:
    model = copy.deepcopy(nn.Sequential(*pair))
    model.train(training)
    if ours:
        truenorm.convert(model)
    fuse = fusing.fuse_modules_qat if training else fusing.fuse_modules
    config = truenorm.fuse_config() if ours else None
    made = fuse(model, ["0", "1"], fuse_custom_config_dict=config)
    # only the copy that is fused was reverted
    assert type(model[1]).__module__.startswith("truenorm") is ours
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: type(p[0]).__name__)
def test_fused_as_torchs(pair: tuple[Module, Module, tuple[int, ...]], training: bool) -> None:
    first, norm, shape = pair
    randomize(nn.Sequential(first, norm))
    if training and isinstance(first, nn.ConvTranspose2d):
        for ours in (False, True):
            with pytest.raises(Exception, match="not yet supported in QAT"):
                _fused((first, norm), training=True, ours=ours)
        return
    theirs = _fused((first, norm), training=training, ours=False)
    ours = _fused((first, norm), training=training, ours=True)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    x = torch.randn(shape) + 3.0
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours[1], nn.Identity)  # type: ignore[index]


def test_a_relu_is_fused_too_and_training_with_fake_quantization_runs() -> None:
    layers = randomize(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    made = []
    for convert in (False, True):
        model = copy.deepcopy(layers).train()
        if convert:
            truenorm.convert(model)
        config = truenorm.fuse_config() if convert else None
        fused: Any = fusing.fuse_modules_qat(model, ["0", "1", "2"], fuse_custom_config_dict=config)
        fused.qconfig = fusing.get_default_qat_qconfig("x86")
        made.append(fusing.prepare_qat(fused))
    x, grad = torch.randn(4, 3, 9, 9), torch.randn(4, 6, 7, 7)
    outputs = [model(x) for model in made]
    assert torch.equal(*outputs)
    first = [
        torch.autograd.grad(y, model[0].weight, grad)[0]
        for y, model in zip(outputs, made, strict=True)
    ]
    assert torch.equal(*first)


def test_without_it_the_layers_are_unknown() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), truenorm.BatchNorm2d(6)).eval()
    with pytest.raises((AssertionError, NotImplementedError), match="truenorm"):
        fusing.fuse_modules(model, ["0", "1"])


def test_a_frozen_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), truenorm.BatchNorm2d(6)).train()
    truenorm.freeze(model)
    with pytest.raises(ValueError, match="unfreeze"):
        fusing.fuse_modules_qat(model, ["0", "1"], fuse_custom_config_dict=truenorm.fuse_config())


# torchao exports 114 patterns of its own to convert one program: 20 seconds each time


def exported(model: Module, x: torch.Tensor) -> Any:
    return torch.export.export(model, (x,)).module()


def for_torchao() -> tuple[Module, torch.Tensor]:
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
    return randomize(nn.Sequential(*layers)).train(), torch.randn(4, 3, 9, 9)


def test_torchao_folds_what_was_exported() -> None:
    """The program that is trained with fake quantization, and the one that comes of it."""
    flow: Any = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    from torchao.quantization.pt2e import move_exported_model_to_eval

    layers, x = for_torchao()
    with truenorm.standard_ops():
        ours = exported(truenorm.convert(copy.deepcopy(layers)), x)
    found = []
    for program in (exported(layers, x), ours):
        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
        prepared = flow.prepare_qat_pt2e(program, quantizer)
        trained = prepared(x)
        move_exported_model_to_eval(prepared)
        converted = flow.convert_pt2e(prepared)
        targets = [str(n.target) for n in converted.graph.nodes if n.op == "call_function"]
        # with torch 2.11 torchao leaves torch's own BatchNorm where it is, too
        assert older_than(2, 12) or not [t for t in targets if "norm" in t]
        found.append((trained, converted(x), targets))
    (trained, y, targets), (our_trained, our_y, our_targets) = found
    assert relative(our_trained, trained) < FLOAT32_BETWEEN
    assert relative(our_y, y) < FLOAT32_BETWEEN
    # torchao takes torch's counter of batches away by the name of its layer, and leaves ours
    assert sorted([*targets, "aten.add_.Tensor"]) == sorted(our_targets)


def test_what_a_reverted_model_exports_is_torchs_program() -> None:
    """Node by node, names and sources too: torchao then makes of ours what it makes of torch's."""
    layers, x = for_torchao()
    programs = []
    for model in (layers, truenorm.revert(truenorm.convert(copy.deepcopy(layers)))):
        program = exported(copy.deepcopy(model), x)
        nodes = [
            (
                n.op,
                n.name,
                n.target,
                n.args,
                n.kwargs,
                n.meta.get("nn_module_stack"),
                n.meta.get("source_fn_stack"),
            )
            for n in program.graph.nodes
        ]
        programs.append((program, [str(node) for node in nodes]))
    (theirs, their_nodes), (ours, our_nodes) = programs
    assert our_nodes == their_nodes
    assert any("batch_norm" in node for node in our_nodes)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert torch.equal(ours(x), theirs(x))


def test_reverted_models_fuse_and_are_prepared() -> None:
    """The way that needs no mapping, and the only one for FX graph mode."""
    fx: Any = pytest.importorskip("torch.ao.quantization.quantize_fx")
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model, x = truenorm.convert(randomize(layers)).train(), torch.randn(2, 3, 9, 7)
    fused = fusing.fuse_modules_qat(truenorm.revert(copy.deepcopy(model)), ["0", "1", "2"])
    assert type(fused[0]).__name__ == "ConvBnReLU2d"
    assert relative(fused(x), model(x)) < FLOAT32_BETWEEN
    mapping = fusing.get_default_qat_qconfig_mapping("x86")
    prepared = fx.prepare_qat_fx(truenorm.revert(copy.deepcopy(model)), mapping, (x,))
    kinds = {type(m).__name__ for m in prepared.modules()}
    assert "ConvBnReLU2d" in kinds
    # as they are, truenorm's layers stay beside the convolution
    prepared = fx.prepare_qat_fx(copy.deepcopy(model), mapping, (x,))
    assert truenorm.BatchNorm2d in {type(m) for m in prepared.modules()}
