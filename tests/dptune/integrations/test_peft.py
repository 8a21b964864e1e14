"""(IA)^3, prefixes and soft prompts: the engine's per-example gradients against one row at a time, without padding,
through PEFT's and transformers' own forward passes, in float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch.nn import functional as F

from dptune import InvalidArgument, add_lora
from dptune.integrations.peft import class_logits, method_of, require_known_method
from dptune.lora import adapters
from dptune.per_example import PerExampleGradients, require_exact_gradients, rules
from tests.classifiers import CLASSIFIERS, METHODS, batch, classifier, gradients_alone, peft_classifier, rows, shake
from tests.reference import clipped_sum, flat
from tests.tiny import tiny_llama

PAIRS = [(name, method) for name in CLASSIFIERS for method in METHODS]
CLOSE = {"rtol": 2e-6, "atol": 1e-7}  # transformers' RMSNorm rounds any input to float32
# PEFT makes prefixes as wide as the hidden size; with fewer key heads it refuses before training begins.
GROUPED = [("Llama, grouped", "prefix"), ("Llama, grouped", "prefix, projected")]


def losses_of(model: Any, ids: list[list[int]], labels: list[int]) -> torch.Tensor:
    return F.cross_entropy(class_logits(model, batch(ids)), torch.tensor(labels), reduction="none")


def recorded(model: Any, ids: list[list[int]], labels: list[int]) -> Any:
    with PerExampleGradients(model) as recorder:
        losses_of(model, ids, labels).sum().backward()
        return recorder.take()


def assert_equals_the_oracle(model: Any, ids: list[list[int]], labels: list[int]) -> None:
    """The gradient of every row, and the clipped sum with only some rows clipped."""
    wanted = gradients_alone(model, ids, labels)
    made = recorded(model, ids, labels).materialised()
    for name in wanted[0]:
        own = torch.stack([grads[name] for grads in wanted])
        torch.testing.assert_close(made.get(name, torch.zeros_like(own)).view_as(own), own, **CLOSE)
        assert own.norm() > 0 or "original_module" in name, f"{name} has no gradient: nothing was compared"
    norms = torch.stack([flat(grads).norm() for grads in wanted])
    again = recorded(model, ids, labels)
    squared = torch.stack(list(again.squared_norms().values())).sum(0)
    torch.testing.assert_close(squared.sqrt(), norms, **CLOSE)
    clip_norm = norms.median().item()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    factors = (clip_norm / norms).clamp_max(1)
    again.add_weighted_sums(sums, dict.fromkeys(again.squared_norms(), factors))
    total = clipped_sum(wanted, clip_norm, flat(wanted[0]).numel())
    torch.testing.assert_close(flat(sums), total, **CLOSE)


@pytest.mark.parametrize(("name", "method"), [pair for pair in PAIRS if pair not in GROUPED])
def test_each_rows_gradient_is_its_own(name: str, method: str) -> None:
    assert_equals_the_oracle(peft_classifier(name, method), *rows(5, seed=1))


@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "Llama", "GPT-2"])
@pytest.mark.parametrize("mode", ["whole", "head", "lora"])
def test_plain_classifiers_too(name: str, mode: str) -> None:
    model = classifier(name)
    head = model.score if hasattr(model, "score") else model.classifier
    if mode == "head":
        model.requires_grad_(False)
    if mode == "lora":
        add_lora(model, rank=2, targets={"GPT-2": ["c_attn"], "Llama": ["q_proj", "v_proj"]}.get(name, ["query"]))
        model.double()
    if mode != "whole":
        head.requires_grad_(True)
    shake(model)
    assert_equals_the_oracle(model, *rows(5, seed=2))


@pytest.mark.parametrize("name", ["BERT", "Llama"])
@pytest.mark.parametrize("method", ["prefix", "soft prompt"])
def test_our_adapters_below_pefts_prompts(name: str, method: str) -> None:
    base = classifier(name)
    add_lora(base, rank=2, targets=["query", "value"] if name == "BERT" else ["q_proj", "v_proj"])
    model = get_peft_model(base, METHODS[method]()).double().eval()
    for _, adapter in adapters(model):
        adapter.requires_grad_(True)
    shake(model)
    assert_equals_the_oracle(model, *rows(5, seed=3))


@pytest.mark.parametrize("name", ["BERT", "Llama"])
@pytest.mark.parametrize("method", ["ia3", "soft prompt"])
def test_checkpointing_changes_nothing(name: str, method: str) -> None:
    model = peft_classifier(name, method)
    ids, labels = rows(4, seed=4)
    plain = recorded(model, ids, labels).materialised()
    again = copy.deepcopy(model)
    recompute(again)
    found = recorded(again, ids, labels).materialised()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value)


def recompute(model: Any) -> None:
    """With activation checkpointing. transformers recomputes only in training mode; there is no dropout here."""
    model.get_base_model().train()
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_prefix_that_checkpointing_would_drop_is_refused(name: str) -> None:
    model = peft_classifier(name, "prefix")
    ids, labels = rows(2)
    losses_of(model, ids, labels)
    recompute(model)
    with pytest.raises(InvalidArgument, match="drop the prefix"):
        losses_of(model, ids, labels)


@pytest.mark.parametrize(("name", "method"), [("BERT", "prefix"), ("Llama", "soft prompt"), ("GPT-2", "prefix")])
def test_a_rows_logits_do_not_know_its_neighbours(name: str, method: str) -> None:
    """transformers' pooling fails this test with a soft prompt, and PEFT's mask with the prefix of an encoder."""
    model = peft_classifier(name, method)
    ids, _ = rows(2, seed=5)
    short = class_logits(model, batch([ids[0]]))
    beside = class_logits(model, batch([ids[0], [7] * (len(ids[0]) + 6)]))[:1]
    torch.testing.assert_close(beside, short)


def test_the_engines_own_check_tells_a_right_rule_from_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_classifier("BERT", "ia3")
    ids, labels = rows(3, seed=6)
    inputs = batch(ids)

    def losses(input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = class_logits(model, {"input_ids": input_ids, "attention_mask": mask})
        return F.cross_entropy(logits, labels, reduction="none")

    given = (losses, inputs["input_ids"], inputs["attention_mask"], torch.tensor(labels))
    require_exact_gradients(model, *given)
    right = rules.rescaling
    monkeypatch.setattr(rules, "rescaling", lambda *use: {name: 1.1 * value for name, value in right(*use).items()})
    with pytest.raises(InvalidArgument, match=r"ia3_l\.default: its per-example gradients differ from autograd's"):
        require_exact_gradients(model, *given)


@pytest.mark.parametrize("method", METHODS)
def test_the_dummy_row_contributes_nothing(method: str) -> None:
    model = peft_classifier("Llama", method)
    with PerExampleGradients(model) as recorder:
        logits = class_logits(model, batch([[5, 5]]))
        F.cross_entropy(logits, torch.tensor([-100]), reduction="none").sum().backward()
        squared = recorder.take().squared_norms()
    assert squared
    assert all(float(value.sum()) == 0 for value in squared.values())


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=2, encoder_hidden_size=8), "P_TUNING"),
        (VeraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]), "VERA"),
    ],
)
def test_other_methods_are_refused_by_name(config: Any, method: str) -> None:
    model = get_peft_model(classifier("BERT"), config)
    with pytest.raises(InvalidArgument, match=f"^peft_type='{method}': "):
        require_known_method(model)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (IA3Config(task_type="SEQ_CLS"), "IA3"),
        (LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), "LORA"),
        (PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "PREFIX_TUNING"),
        (PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "PROMPT_TUNING"),
    ],
)
def test_the_known_ones_are_not(config: Any, method: str) -> None:
    model = get_peft_model(classifier("BERT"), config)
    require_known_method(model)
    assert method_of(model) == method


def test_a_plain_model_has_no_method_to_refuse() -> None:
    model = classifier("BERT")
    require_known_method(model)
    assert method_of(model) is None


def test_a_prefix_in_inference_mode_is_refused() -> None:
    model = get_peft_model(
        classifier("BERT"), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, inference_mode=True)
    )
    with pytest.raises(InvalidArgument, match="inference_mode=True"):
        require_known_method(model)


def test_a_second_vector_in_one_layer_is_refused() -> None:
    model = get_peft_model(classifier("BERT"), IA3Config(task_type="SEQ_CLS"))
    model.add_adapter("other", IA3Config(task_type="SEQ_CLS"))
    with pytest.raises(InvalidArgument, match="several"):
        require_known_method(model)
    with pytest.raises(InvalidArgument, match=r"several \(IA\)\^3 vectors"), PerExampleGradients(model):
        pass


def test_left_padding_is_refused() -> None:
    inputs = {"input_ids": torch.tensor([[0, 5]]), "attention_mask": torch.tensor([[0, 1]])}
    with pytest.raises(InvalidArgument, match="padded on the right"):
        class_logits(classifier("BERT"), inputs)


def test_nothing_is_left_in_the_model() -> None:
    model = peft_classifier("Llama", "ia3")
    recorded(model, *rows(2))
    hooks = [
        hook
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        for hook in getattr(module, kind).values()
    ]
    assert hooks == []
    assert any(parameter.requires_grad for parameter in model.parameters())


# --- kinds of PEFT's LoRA whose effect is more than A and B ---

KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "rsLoRA": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, True),
    "biases of B": ({"lora_bias": True}, True),
    "whole modules": ({"modules_to_save": ["lm_head"]}, True),
    "PiSSA": ({"init_lora_weights": "pissa"}, True),
    "OLoRA": ({"init_lora_weights": "olora"}, True),
    "DoRA": ({"use_dora": True}, False),
    "tokens": ({"trainable_token_indices": [5, 9]}, False),
    "parameters": ({"target_modules": [], "target_parameters": ["mlp.down_proj.weight"]}, False),
    "an embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_lora_trains_on_exact_gradients_or_is_refused(kind: str) -> None:
    settings, trains = KINDS[kind]
    how: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(layers=1), LoraConfig(**how | settings)).double()
    shake(model)
    ids = torch.randint(3, 400, (3, 7), generator=torch.Generator().manual_seed(0))

    def losses(ids: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    if trains:
        require_exact_gradients(model, losses, ids)
    else:
        with pytest.raises(InvalidArgument):
            require_exact_gradients(model, losses, ids)
