"""Training passes through torch.compile: what is tried, what is put back, what happens without."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from ecos_pl.modules import compiling
from ecos_pl.modules.compiling import CompiledPass


class Small(L.LightningModule):
    """Statistics, random numbers, a weight without a gradient, two results."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Dropout(), torch.nn.Linear(12, 3)
        )
        self.layers[1].weight.requires_grad_(False)
        self.idle = torch.nn.Linear(2, 2)
        self.num_calls = 0

    def forward(self, images):
        self.num_calls += 1
        return self.layers(images.float()), None


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradients):
        raise RuntimeError("expected size 3==3, stride 1==9\nand a page more")


@pytest.fixture
def module():
    found = Small()
    found.trainer = L.Trainer(accelerator="cpu", devices=1, logger=False)
    return found


def images(num=5):
    return torch.randint(0, 256, (num, 3, 2, 2), dtype=torch.uint8)


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def compiler(monkeypatch, change=lambda results: results):
    """What torch.compile does without generating code, which takes a CPU a minute."""
    made = []

    def compiled(function, **options):
        def call(batch):
            return change(function(batch))

        made.append(call)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    return made


def test_the_trial_changes_nothing(module, monkeypatch):
    made = compiler(monkeypatch)
    batch, before = images(), state(module)
    torch.manual_seed(1)
    expected, _ = module(batch)
    after = state(module)
    assert not torch.equal(before["layers.1.running_mean"], after["layers.1.running_mean"])

    module.load_state_dict(before)
    torch.manual_seed(1)
    found, nothing = CompiledPass(module.forward, module)(batch)
    assert nothing is None
    assert torch.equal(found, expected)
    assert all(torch.equal(value, after[name]) for name, value in module.state_dict().items())
    assert all(weight.grad is None for weight in module.parameters())
    assert len(made) == 1


def test_it_is_tried_once_and_again_when_the_network_has_changed(module, monkeypatch):
    made = compiler(monkeypatch)
    step = CompiledPass(module.forward, module)
    for _ in range(3):
        step(images())
    assert (len(made), module.num_calls) == (1, 4)
    step.try_again()
    step(images())
    assert (len(made), module.num_calls) == (2, 6)


def test_what_fails_in_the_gradients_alone_is_not_used(module, monkeypatch):
    compiler(monkeypatch, change=lambda results: (_Refused.apply(results[0]), None))
    step, batch, before = CompiledPass(module.forward, module), images(), state(module)
    said = r"nothing is compiled on this cpu: expected size 3==3, stride 1==9$"
    with pytest.warns(UserWarning, match=said):
        step(batch)
    module.load_state_dict(before)
    results, _ = step(batch)
    results.sum().backward()
    assert module.layers[3].weight.grad is not None


def test_without_a_compiler_training_goes_on(module, monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler here\nat all")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match="nothing is compiled on this cpu: no compiler here$"):
        results, _ = CompiledPass(module.forward, module)(images())
    assert results.requires_grad


def test_where_weights_are_shared_out_there_is_no_trial(module, monkeypatch):
    made = compiler(monkeypatch)
    monkeypatch.setattr(compiling, "SingleDeviceStrategy", DDPStrategy)  # this one is neither now
    step = CompiledPass(module.forward, module)
    step(images())
    assert module.num_calls == 1
    assert len(made) == 2  # something small, and the pass

    def broken(function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    step.try_again()
    with pytest.warns(UserWarning, match="nothing is compiled on this cpu: no compiler here$"):
        step(images())


@pytest.mark.slow
def test_the_real_compiler(module):
    module.layers[2].p = 0.0
    batch, before = images(), state(module)
    expected, _ = module(batch)
    module.load_state_dict(before)
    found, _ = CompiledPass(module.forward, module)(batch)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    assert module.layers[3].weight.grad is not None
    assert list(module.state_dict()) == list(before)
