"""Muon and AdamW as one optimizer: the steps of the two, one state, one schedule."""

import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import get_scheduler

from synermedgen_hf.optimization import MuonWithAdamW

OPTIONS = {"lr": 1e-3, "muon_lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def optimizer_of(model, **options):
    return MuonWithAdamW(model.named_parameters(), **{**OPTIONS, **options})


def give_gradients(model, step):
    """The same random gradients for the same step."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def train(model, optimizer, steps, scheduler=None):
    for step in steps:
        give_gradients(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def moved(model, before):
    """Names of the parameters that are others now."""
    now = dict(model.named_parameters())
    return {name for name, parameter in before.named_parameters() if not parameter.equal(now[name])}


def split(model):
    """The parameters for Muon, and the others."""
    named = dict(model.named_parameters())
    matrices = {name for name, parameter in named.items() if ".layers." in name and parameter.ndim == 2}
    return [named[name] for name in named if name in matrices], [named[name] for name in named if name not in matrices]


def test_matrices_of_layers_go_to_muon_and_all_else_to_adamw(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon, by_adamw = [{names[one] for one in group["params"]} for group in optimizer_of(model).param_groups]
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    layers = ("model.language_model.layers.1", "model.vision_model.encoder.layers.0")
    assert {f"{layers[0]}.mlp.up_proj.weight", f"{layers[1]}.self_attn.q_proj.weight"} <= by_muon
    assert {
        "lm_head.weight",
        "model.language_model.embed_tokens.weight",
        "model.connector.fc1.weight",
        "model.vision_model.embeddings.position_embedding.weight",
        f"{layers[0]}.input_layernorm.weight",
        f"{layers[0]}.self_attn.q_proj.bias",
    } <= by_adamw


def test_a_step_is_one_of_muon_and_one_of_adamw(model):
    apart = copy.deepcopy(model)
    matrices, others = split(apart)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    before = copy.deepcopy(model)
    train(model, optimizer_of(model), range(3))
    for step in range(3):
        give_gradients(apart, step)
        muon.step()
        adamw.step()
    assert moved(model, apart) == set()
    assert moved(model, before) == dict(model.named_parameters()).keys()


def test_frozen_parameters_are_left_out(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_moe_gen" not in name)
    before, optimizer = copy.deepcopy(model), optimizer_of(model)
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {parameter for parameter in model.parameters() if parameter.requires_grad}
    train(model, optimizer, range(2))
    assert moved(model, before) == {name for name, _ in model.named_parameters() if "_moe_gen" not in name}


def test_a_state_saved_and_loaded_goes_on_to_the_last_bit(model):
    whole = copy.deepcopy(model)
    train(whole, optimizer_of(whole), range(4))

    optimizer, file = optimizer_of(model), io.BytesIO()
    train(model, optimizer, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = copy.deepcopy(whole)
    resumed.load_state_dict(saved["model"])
    optimizer = optimizer_of(resumed, lr=0.5, muon_lr=0.5)  # the rates are part of the state
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, (2, 3))
    assert moved(resumed, whole) == set()


@pytest.mark.parametrize("loaded", [False, True])
def test_a_schedule_moves_both_learning_rates(model, loaded):
    optimizer = optimizer_of(model)
    if loaded:
        train(model, optimizer, [0])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    rates = []
    for step in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        train(model, optimizer, [step], scheduler)
    torch.testing.assert_close(rates, [[0.02 * share, 1e-3 * share] for share in (1, 0.75, 0.5, 0.25)])
    before = copy.deepcopy(model)
    train(model, optimizer, [4])  # both rates are 0 now
    assert moved(model, before) == set()


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_sees_one_optimizer(model, accelerator):
    expected = copy.deepcopy(model)
    train(expected, optimizer_of(expected), range(2))
    prepared, optimizer = accelerator.prepare(model, optimizer_of(model))
    train(prepared, optimizer, range(2))
    assert moved(model, expected) == set()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_closure_is_called(model):
    def closure():
        give_gradients(model, 0)
        return torch.tensor(7.0)

    assert optimizer_of(model).step(closure) == 7


def test_one_of_the_two_without_work_is_refused(model):
    layers = [(name, one) for name, one in model.named_parameters() if ".layers." in name and one.ndim == 2]
    with pytest.raises(ValueError, match="nothing to train in the layers, or nothing outside of them"):
        MuonWithAdamW(layers, lr=1e-3)
    with pytest.raises(ValueError, match="use AdamW or Muon"):
        MuonWithAdamW([("lm_head.weight", model.lm_head.weight)], lr=1e-3)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        optimizer_of(model)


def test_a_torch_without_muon_is_told(model, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match="Muon needs torch 2.9 or newer, and this is .*: use AdamW"):
        optimizer_of(model)
