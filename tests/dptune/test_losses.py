"""The loss of each example is right, independent of other examples, and exactly zero without labels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from dptune import CausalLMLoss, PerExampleGradients, add_lora
from dptune import losses as losses_module
from tests.dptune.test_lora import tiny_gpt2
from tests.examples import padded, random_examples, randomise_adapters
from tests.reference import Example, example_loss, oracle
from tests.tiny import tiny_llama

EXAMPLES = random_examples(6, seed=4, vocab_size=60)
ATTENTION = ("q_proj", "v_proj")


def tiny_gemma2() -> nn.Module:
    """Its logits go through a soft cap after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=60,
        max_position_embeddings=64,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    model: nn.Module = Gemma2ForCausalLM(config).eval()
    return model


def small_llama(tie: bool = False) -> nn.Module:
    model: nn.Module = tiny_llama(vocab_size=60, hidden=16, tie=tie)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "llama": (small_llama, ATTENTION),
    "tied llama": (lambda: small_llama(tie=True), ATTENTION),
    "llama, adapted head": (small_llama, ("q_proj", "lm_head")),
    "tied llama, adapted head": (lambda: small_llama(tie=True), ("q_proj", "lm_head")),
    "gpt2": (tiny_gpt2, ("c_attn",)),
    "gpt2, adapted head": (tiny_gpt2, ("c_attn", "lm_head")),
    "gemma2": (tiny_gemma2, ATTENTION),
    "gemma2, adapted head": (tiny_gemma2, ("q_proj", "lm_head")),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    make, targets = MODELS[request.param]
    model = make()
    add_lora(model, rank=2, alpha=4.0, targets=targets)
    randomise_adapters(model, scale=0.3)
    return model


def gradient(model: nn.Module, total: Tensor) -> Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, trained)])


def losses_of(model: nn.Module, examples: list[Example]) -> Tensor:
    found: Tensor = CausalLMLoss(model)(*padded(examples))
    return found


def test_equal_to_one_example_at_a_time_in_float64(model: nn.Module) -> None:
    exact = torch.stack([example_loss(oracle(model), example) for example in EXAMPLES])
    found = losses_of(model, EXAMPLES)
    assert found.shape == (6,)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    double = oracle(model)
    exactness = 1e-6 if isinstance(model, Gemma2ForCausalLM) else 1e-10  # Gemma's attention always computes in float32
    torch.testing.assert_close(losses_of(double, EXAMPLES), exact, rtol=exactness, atol=exactness)
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)  # each example's own gradient, not only their sum
    torch.testing.assert_close(
        gradient(double, losses_of(double, EXAMPLES) @ weights),
        gradient(double, torch.stack([example_loss(double, example) for example in EXAMPLES]) @ weights),
        rtol=exactness,
        atol=exactness,
    )


def test_a_model_that_caps_its_logits_is_run_whole_and_the_others_are_not() -> None:
    assert CausalLMLoss(tiny_gemma2())._through_head is None
    for make in (small_llama, tiny_gpt2):
        assert CausalLMLoss(make())._through_head is not None


def test_looking_at_the_model_leaves_its_mode_alone() -> None:
    for training in (True, False):
        model = small_llama().train(training)
        CausalLMLoss(model)
        assert model.training is training
        assert model.get_submodule("model.layers.0").training is training


@pytest.mark.parametrize("chunk", [1, 500, 4 * 60 * len(EXAMPLES)])  # the last: 4 labels of each example
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, model: nn.Module, chunk: int) -> None:
    double = oracle(model)
    whole = losses_of(double, EXAMPLES)
    whole_gradient = gradient(double, whole.square().sum())
    monkeypatch.setattr(losses_module, "_CHUNK_LOGITS", chunk)
    cut = losses_of(double, EXAMPLES)
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(double, cut.square().sum()), whole_gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("targets", [ATTENTION, ("q_proj", "lm_head")])
def test_chunks_change_no_per_example_gradient(monkeypatch: pytest.MonkeyPatch, targets: tuple[str, ...]) -> None:
    model = small_llama().double()
    add_lora(model, rank=2, targets=targets)
    randomise_adapters(model, scale=0.3)
    found = []
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(losses_module, "_CHUNK_LOGITS", chunk)
        with PerExampleGradients(model) as recorder:
            losses_of(model, EXAMPLES).sum().backward()
            found.append(recorder.take().materialised())
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6)


def test_no_more_logits_are_made_than_a_chunk_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "_CHUNK_LOGITS", 600)
    sizes = []
    for targets in (ATTENTION, ("lm_head",)):
        model = small_llama()
        add_lora(model, rank=2, targets=targets)
        linear = torch.nn.functional.linear

        def spying(
            x: Tensor, weight: Tensor, bias: Tensor | None = None, linear: Callable[..., Tensor] = linear
        ) -> Tensor:
            if len(weight) == 60:
                sizes.append(x.numel() // x.shape[-1] * 60)
            return linear(x, weight, bias)

        loss, batch = CausalLMLoss(model), padded(EXAMPLES)
        sizes.clear()
        with monkeypatch.context() as patched:
            patched.setattr("torch.nn.functional.linear", spying)
            loss(*batch)
        assert len(sizes) > 1
        assert max(sizes) <= 600


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [None, 2, 5, 9])
def test_the_hand_made_gradient_of_a_frozen_head(bias: bool, size: int | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64)
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    targets = torch.tensor([0, 3, 6, 3, 1])
    assert torch.autograd.gradcheck(
        lambda hidden: losses_module._FrozenHeadNLL.apply(hidden, weight, offset, targets, size), (hidden,)
    )
    expected = nn.functional.cross_entropy(nn.functional.linear(hidden, weight, offset), targets, reduction="none")
    torch.testing.assert_close(losses_module._FrozenHeadNLL.apply(hidden, weight, offset, targets, size), expected)


def test_an_example_without_a_label_has_loss_and_gradient_exactly_zero(model: nn.Module) -> None:
    ids, labels = padded(EXAMPLES)
    labels[2] = -100
    with PerExampleGradients(model) as recorder:
        found = CausalLMLoss(model)(ids, labels)
        found.sum().backward()
        grads = recorder.take().materialised()
    assert found[2] == 0
    assert (found[[0, 1, 3, 4, 5]] > 0).all()
    for grad in grads.values():
        assert not grad[2].any()
        assert grad[0].any()


def test_a_label_on_the_first_token_counts_nothing(model: nn.Module) -> None:
    """No token comes before it that could predict it."""
    ids, labels = padded(EXAMPLES)
    before = CausalLMLoss(model)(ids, labels)
    labels[:, 0] = ids[:, 0]
    assert torch.equal(CausalLMLoss(model)(ids, labels), before)
    labels[1, 1:] = -100
    assert CausalLMLoss(model)(ids, labels)[1] == 0


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_micro_batch_of_the_dummy_alone_has_a_gradient_of_zero(model: nn.Module, width: int) -> None:
    with PerExampleGradients(model) as recorder:
        found = CausalLMLoss(model)(torch.zeros((1, width), dtype=torch.long), torch.full((1, width), -100))
        assert found.tolist() == [0]
        found.sum().backward()
        grads = recorder.take().materialised()
    assert grads
    assert not any(grad.any() for grad in grads.values())


def test_padding_changes_nothing(model: nn.Module) -> None:
    for example in EXAMPLES:
        ids, labels = padded([example])
        alone = CausalLMLoss(model)(ids, labels)
        for pad in (0, 7):
            longer = torch.cat([ids, torch.full((1, 9), pad)], 1), torch.cat([labels, torch.full((1, 9), -100)], 1)
            torch.testing.assert_close(CausalLMLoss(model)(*longer), alone, rtol=1e-6, atol=1e-7)


def test_neighbours_change_nothing(model: nn.Module) -> None:
    """A loss depends neither on its neighbours' tokens, nor on their number, nor on their labels."""
    mine, length = EXAMPLES[0], len(EXAMPLES[0][0])
    before = losses_of(model, [mine, *EXAMPLES[1:]])[0]
    others = random_examples(5, seed=99, vocab_size=60, longest=length)
    silent = [(ids, [-100] * len(labels)) for ids, labels in others]
    for neighbours in (others, silent, others[:1], []):
        after = losses_of(model, [mine, *neighbours])[0]
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_an_example_with_more_labels_weighs_no_more() -> None:
    """The mean over its own tokens: the loss of an answer given twice is the mean of both halves."""
    model = small_llama()
    ids = EXAMPLES[0][0]
    rows = [(ids, [-100] * t + [ids[t]] + [-100] * (len(ids) - t - 1)) for t in range(1, len(ids))]
    whole = losses_of(model, [(ids, [-100, *ids[1:]])])
    torch.testing.assert_close(whole[0], losses_of(model, rows).mean())


@pytest.mark.parametrize("targets", [ATTENTION, ("q_proj", "lm_head")])
def test_a_bfloat16_base_has_a_float32_loss(targets: tuple[str, ...]) -> None:
    model = small_llama()
    add_lora(model, rank=2, targets=targets)
    exact = losses_of(model, EXAMPLES)
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            parameter.data = parameter.data.bfloat16()
    found = losses_of(model, EXAMPLES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0.02)
