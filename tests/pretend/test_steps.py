"""Private and plain steps on an accelerator: no tensor is left on the CPU, and the gradients are the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dptune import (
    CausalLMLoss,
    GaussianNoise,
    InvalidArgument,
    Keystream,
    Ledger,
    PlainStep,
    PrivacyConfig,
    PrivateStep,
    add_lora,
)
from dptune.clipping_styles import Adaptive, Automatic, Clipping, Flat, PerLayer
from dptune.flat import released_size
from dptune.ranks import checksum_of
from dptune.sharding import shard
from tests.dptune.integrations.runs import lora_llama
from tests.examples import padded, random_examples, randomise_adapters
from tests.pretend.both import assert_close, gradients, on_both
from tests.pretend.operations import TRAINED
from tests.pretend.ranks import two_ranks
from tests.private_sum import NoNoise
from tests.tiny import tiny_llama
from tests.whole_models import whole_model
from utils.models.sharded import decoder_layers
from utils.models.trainable import check_rules

EXAMPLES = random_examples(6, seed=1)
BATCH = 4  # the expected batch size
CLIPPING: dict[str, Clipping] = {
    "flat": Flat(),
    "per layer": PerLayer(),
    "automatic": Automatic(),
    "adaptive": Adaptive(count_noise=5.0),
}


def whole(name: str) -> Callable[[], nn.Module]:
    return lambda: whole_model(name).float()


def in_half() -> nn.Module:
    """An adapted Llama whose base is held in fp16; the adapters stay float32."""
    model = lora_llama()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    return model


def step_of(model: nn.Module, folder: Path, *, noise: bool = True, clip_norm: float = 0.05, **how: Any) -> PrivateStep:
    """A step with reproducible noise, or without."""
    clipping, loss_scale = how.get("clipping", Flat()), how.get("loss_scale", 1.0)
    config = PrivacyConfig(
        num_examples=100, expected_batch_size=BATCH, steps=10, clip_norm=clip_norm, noise_multiplier=1.0, delta=1e-5,
        clipping=clipping,
    )  # fmt: skip
    size = released_size(model, config)
    source = GaussianNoise(size, Keystream.for_tests(7)) if noise else NoNoise(size)
    ledger = Ledger(folder / f"{next(model.parameters()).device.type}.jsonl")
    return PrivateStep(model, config, ledger=ledger, noise=source, loss_scale=loss_scale)


def two_steps(folder: Path, *, rows_per_unit: int = 1, **how: Any) -> Callable[[nn.Module, torch.device], torch.Tensor]:
    """Run two steps, of two micro-batches and of none, and return the gradients and statistics of both."""

    def run(model: nn.Module, device: torch.device) -> torch.Tensor:
        found, losses = [], CausalLMLoss(model)
        with step_of(model, folder, **how) as step:
            for examples in (EXAMPLES[:2], EXAMPLES[2:]):
                batch = (part.to(device) for part in padded(examples))
                stats = step.backward(losses(*batch), rows_per_unit=rows_per_unit)
                found += [stats.losses.cpu().double(), stats.norms.cpu().double(), stats.clipped.cpu().double()]
            step.finish()
            found += [gradients(model), torch.tensor([step.clip_norm], dtype=torch.float64)]
            step.finish()
            found.append(gradients(model))
        return torch.cat([one.flatten() for one in found])

    return run


MODELS: dict[str, Callable[[], nn.Module]] = {
    "Llama, adapters": lora_llama,
    "GPT-2, whole": whole("GPT-2"),
    "Llama, whole": whole("Llama"),
    "Llama, whole, tied": whole("Llama, tied"),
}


@pytest.mark.parametrize("clipping", CLIPPING.values(), ids=CLIPPING)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_each_clipping_style(make: Callable[[], nn.Module], clipping: Clipping, tmp_path: Path) -> None:
    assert_close(*on_both(make, two_steps(tmp_path, clipping=clipping)))


@pytest.mark.parametrize("name", ["OPT", "Gemma 2"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    assert_close(*on_both(whole(name), two_steps(tmp_path)))


@pytest.mark.parametrize("make", [lora_llama, whole("GPT-2")], ids=["adapters", "whole"])
def test_authors_of_several_rows(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    assert_close(*on_both(make, two_steps(tmp_path, rows_per_unit=2)))


def test_a_sum_without_noise(tmp_path: Path) -> None:
    """So that noise on a small sum hides nothing."""
    assert_close(*on_both(lora_llama, two_steps_of_sums(tmp_path)))


def two_steps_of_sums(folder: Path) -> Callable[[nn.Module, torch.device], torch.Tensor]:
    def run(model: nn.Module, device: torch.device) -> torch.Tensor:
        with step_of(model, folder, noise=False) as step:
            step.backward(CausalLMLoss(model)(*(part.to(device) for part in padded(EXAMPLES))))
            step.finish()
        return gradients(model)

    return run


def test_fp16_with_its_loss_scale(tmp_path: Path) -> None:
    """Sums differ in their order, and fp16 rounds each to 5e-4."""
    found, expected = on_both(in_half, two_steps(tmp_path, loss_scale=4096.0, clip_norm=10.0, noise=False))
    assert_close(found, expected, within=2e-3)


def test_recomputed_activations(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = lora_llama()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    assert_close(*on_both(make, two_steps(tmp_path)))


def test_a_plain_step() -> None:
    def run(model: nn.Module, device: torch.device) -> torch.Tensor:
        with PlainStep(model, BATCH) as step:
            for examples in (EXAMPLES[:2], EXAMPLES[2:]):
                step.backward(CausalLMLoss(model)(*(part.to(device) for part in padded(examples))))
            step.finish()
            return gradients(model)

    assert_close(*on_both(lora_llama, run))


@pytest.mark.parametrize("trained", TRAINED)
def test_sharded_weights(trained: str, tmp_path: Path) -> None:
    """Nothing of a sharded step is left on the CPU. Every rank has the same rows, so this is no real model."""

    def run(model: nn.Module, device: torch.device) -> torch.Tensor:
        with two_ranks():
            shard(model.requires_grad_(False), decoder_layers(model), device=device)
            TRAINED[trained](model)
            if trained != "all weights":
                randomise_adapters(model)  # each device draws others
            return two_steps(tmp_path)(model, device)

    assert_close(*on_both(tiny_llama, run))


def test_several_ranks_share_a_sum(tmp_path: Path) -> None:
    """The sum over ranks and the checksum of parameters stay on the device."""

    def run(model: nn.Module, device: torch.device) -> torch.Tensor:
        def gather(share: torch.Tensor) -> torch.Tensor:
            assert share.device == device
            return torch.cat([share, share])

        config = PrivacyConfig(
            num_examples=100, expected_batch_size=BATCH, steps=10, clip_norm=0.05, noise_multiplier=1.0, delta=1e-5
        )
        noise, ledger = NoNoise(released_size(model, config)), Ledger(tmp_path / f"{device.type}.jsonl")
        with PrivateStep(model, config, ledger=ledger, noise=noise, gather=gather, world_size=2) as step:
            step.backward(CausalLMLoss(model)(*(part.to(device) for part in padded(EXAMPLES))))
            step.finish()
        return torch.cat([gradients(model), checksum_of(model.parameters()).cpu().remainder(1 << 20).double()])

    assert_close(*on_both(lora_llama, run))


def test_the_check_of_the_rules_runs_there_and_still_refuses(device: torch.device) -> None:
    def run(model: nn.Module, where: torch.device) -> torch.Tensor:
        check_rules(model, CausalLMLoss(model), where, width=24)
        return torch.ones(1)

    on_both(lora_llama, run)
    on_both(whole("GPT-2"), run)
    model = tiny_llama(layers=1).to(device)
    add_lora(model, rank=2, alpha=2.0)
    randomise_adapters(model)
    own = CausalLMLoss(model)
    with pytest.raises(InvalidArgument, match="differ from autograd's"):
        check_rules(model, lambda *rows: own(*rows) + own(*rows).mean(), device, width=24)


def test_the_check_leaves_the_devices_random_numbers(device: torch.device) -> None:
    """Its forward pass in training mode draws dropout masks on the device."""
    model = tiny_llama(layers=1).to(device)
    add_lora(model, rank=2, alpha=2.0, dropout=0.5)
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    before = torch.get_rng_state(), torch.get_device_module(device).get_rng_state()
    check_rules(model, CausalLMLoss(model), device, width=24)
    after = torch.get_rng_state(), torch.get_device_module(device).get_rng_state()
    assert all(map(torch.equal, before, after))


def test_quantised_weights_are_still_refused_there(device: torch.device) -> None:
    """The device's tensors are plain ones, so the check of quantised layers sees them as it sees CUDA's."""
    model = lora_llama().to(device)
    model.model.layers[0].mlp.up_proj.register_buffer("packed", torch.ones(2, 2, dtype=torch.int8, device=device))
    with pytest.raises(InvalidArgument, match="is quantised"):
        PlainStep(model, BATCH) and step_of(model, Path())
