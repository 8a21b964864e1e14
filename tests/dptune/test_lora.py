"""The LoRA layer is W + (alpha / r) B A on every kind of layer, and merging can be undone without a trace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from dptune import CausalLMLoss, InvalidArgument, add_lora, merge_lora, trainable_parameters, unmerge_lora
from dptune.adapter_files import adapter_state_dict
from dptune.clipping import whole_norms
from dptune.lora import LoraAdapter, adapters, fold_lora, linear_layers, linear_sizes
from dptune.lora_targets import ALL_LINEAR
from dptune.per_example import PerExampleGradients
from tests.examples import padded, random_examples, randomise_adapters
from tests.reference import adapter_output, example_gradients, flat
from tests.tiny import tiny_llama

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 3, 30, 11, 4]])


def tiny_gpt2(vocab_size: int = 60) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=vocab_size, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def weights_in_out(layer: nn.Module) -> Tensor:
    """[I, O] of either kind of layer."""
    weight = layer.get_parameter("weight").detach()
    return weight if isinstance(layer, Conv1D) else weight.T


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (4, 16.0), (16, 3.0)])
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
def test_the_forward_pass_is_the_formula(kind: str, rank: int, alpha: float) -> None:
    torch.manual_seed(1)
    layer = Conv1D(5, 7) if kind == "Conv1D" else nn.Linear(7, 5, bias=kind == "Linear")
    model, x = nn.Sequential(layer), torch.randn(3, 4, 7)
    before = model(x).detach()
    assert add_lora(model, rank=rank, alpha=alpha, targets=["0"]) == ["0"]
    assert torch.equal(model(x), before)  # B is zero at the start
    randomise_adapters(model, scale=0.5)
    ((_, adapter),) = adapters(model)
    assert adapter.A.weight.shape == (rank, 7)
    assert adapter.B.weight.shape == (5, rank)
    together = weights_in_out(layer).double() + alpha / rank * (
        adapter.A.weight.T.double() @ adapter.B.weight.T.double()
    )
    bias = torch.zeros(5) if layer.bias is None else layer.bias
    torch.testing.assert_close(model(x).double(), x.double() @ together + bias, rtol=1e-5, atol=1e-5)


def test_a_starts_random_and_b_at_zero() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    add_lora(model, rank=8, targets=["0", "1"])
    first, second = (adapter for _, adapter in adapters(model))
    assert not first.B.weight.any()
    assert first.A.weight.abs().max() <= 64**-0.5
    assert first.A.weight.std() > 0.4 * 64**-0.5
    assert not torch.equal(first.A.weight, second.A.weight)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "lm_head")])
def test_the_model_starts_as_the_base_and_keeps_its_parameter_names(targets: tuple[str, ...]) -> None:
    model = tiny_llama()
    names, before = dict(model.named_parameters()), logits(model)
    chosen = add_lora(model, targets=targets)
    assert torch.equal(logits(model), before)
    after = dict(model.named_parameters())
    assert {name for name in after if ".lora." not in name} == set(names)
    assert all(after[name] is parameter for name, parameter in names.items())
    assert {name for name in after if ".lora." in name} == {f"{c}.lora.{p}.weight" for c in chosen for p in "AB"}


def test_only_the_adapters_train() -> None:
    model = tiny_llama()
    add_lora(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}
    assert len(trained) == len(trainable_parameters(model)) == 2 * 4 * 2
    assert all(parameter.dtype == torch.float32 for parameter in trainable_parameters(model))


def test_trainable_parameters_are_each_there_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert len(trainable_parameters(model)) == 3


class _Names(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.q_proj, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)
        self.inner = nn.ModuleDict({"proj": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (["proj"], ["proj", "inner.proj"]),  # not q_proj
        (["inner.proj"], ["inner.proj"]),
        (["q_proj"], ["q_proj"]),
        (["inner.*"], ["inner.proj", "inner.lm_head"]),  # a pattern matches the whole name
        (["q*", "*head"], ["q_proj", "inner.lm_head"]),
        (["proj", "inner.proj", "lm_head"], ["proj", "inner.proj", "inner.lm_head"]),  # no layer twice
    ],
)
def test_a_target_is_a_name_its_end_at_a_dot_or_a_pattern(targets: list[str], chosen: list[str]) -> None:
    assert add_lora(_Names(), rank=1, targets=targets) == chosen


@pytest.mark.parametrize("target", ["roj", "inner", "norm", "nothing", "", "proj.", "lora"])
def test_an_unknown_target_is_refused_with_what_there_is_and_nothing_changes(target: str) -> None:
    model = _Names()
    with pytest.raises(InvalidArgument) as caught:
        add_lora(model, targets=["proj", target])
    assert str(caught.value) == (f"targets={target!r}: matches no linear layer; the model has: lm_head, proj, q_proj")
    assert not any(True for _ in adapters(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_mistakes_are_refused() -> None:
    model = _Names()
    with pytest.raises(InvalidArgument, match="rank=0: "):
        add_lora(model, rank=0, targets=["proj"])
    with pytest.raises(InvalidArgument, match="alpha=0: "):
        add_lora(model, alpha=0, targets=["proj"])
    with pytest.raises(InvalidArgument, match=r"targets=\[\]: "):
        add_lora(model, targets=[])
    with pytest.raises(InvalidArgument, match="the model has: none"):
        add_lora(nn.Sequential(nn.LayerNorm(2)), targets=["proj"])
    add_lora(model, targets=["proj"])
    with pytest.raises(InvalidArgument, match="model='_Names': has LoRA adapters already"):
        add_lora(model, targets=["q_proj"])


def test_sizes_of_both_kinds_and_an_adapters_own_layers_are_no_targets() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 3), "two": Conv1D(5, 4)})
    assert [linear_sizes(layer) for layer in model.values()] == [(2, 3), (4, 5)]
    add_lora(model, targets=["one", "two"])
    assert list(linear_layers(model)) == ["one", "two"]
    assert [linear_sizes(layer) for layer in model.values()] == [(2, 3), (4, 5)]


MODELS = {
    "llama": (tiny_llama, ("q_proj", "down_proj")),
    "llama with head": (tiny_llama, ("v_proj", "lm_head")),
    "tied llama": (lambda: tiny_llama(tie=True), ("v_proj", "lm_head")),
    "gpt2": (tiny_gpt2, ("c_attn", "c_fc", "lm_head")),
}


@pytest.fixture(params=MODELS)
def adapted(request: pytest.FixtureRequest) -> nn.Module:
    make, targets = MODELS[request.param]
    model: nn.Module = make()
    add_lora(model, rank=3, alpha=7.0, targets=targets)
    randomise_adapters(model, scale=0.2)
    return model


def test_merging_gives_the_same_logits_and_unmerging_the_same_bits(adapted: nn.Module) -> None:
    state, before = copy.deepcopy(adapted.state_dict()), logits(adapted)
    base = {name: parameter for name, parameter in adapted.named_parameters() if ".lora." not in name}
    merge_lora(adapted)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)
    unmerge_lora(adapted)
    assert torch.equal(logits(adapted), before)
    again = adapted.state_dict()
    assert set(again) == set(state)
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert all(adapted.get_parameter(name) is parameter for name, parameter in base.items())


def test_a_merged_model_runs_without_its_adapters(adapted: nn.Module) -> None:
    merge_lora(adapted)
    before = logits(adapted)
    for parameter in trainable_parameters(adapted):
        parameter.data.fill_(float("nan"))
    assert torch.equal(logits(adapted), before)


def test_merging_a_tied_head_leaves_the_embedding_alone() -> None:
    model = tiny_llama(tie=True)
    add_lora(model, rank=2, targets=["lm_head"])
    randomise_adapters(model, scale=0.5)
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    assert model.lm_head.weight is embedding
    merge_lora(model)
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    assert not torch.equal(model.lm_head.weight, before)
    unmerge_lora(model)
    assert model.lm_head.weight is embedding


@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, ["q_proj", "lm_head"]), (tiny_gpt2, ["c_attn", "lm_head"])])
def test_folding_leaves_a_plain_model_with_the_sum(make: Callable[[], nn.Module], targets: list[str]) -> None:
    model, plain = make(), make()
    add_lora(model, rank=2, targets=targets)
    randomise_adapters(model)
    expected = logits(model)
    embedding = model.get_input_embeddings().weight.clone()
    fold_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(plain)).abs().max() > 1e-3
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert torch.equal(model.get_input_embeddings().weight, embedding), "a tied weight stays"


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused(adapted: nn.Module) -> None:
    with pytest.raises(InvalidArgument, match="is not merged"):
        unmerge_lora(adapted)
    merge_lora(adapted)
    merged = logits(adapted)
    with pytest.raises(InvalidArgument, match="merged already"):
        merge_lora(adapted)
    assert torch.equal(logits(adapted), merged)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_base_keeps_its_type_and_the_adapter_computes_in_float32(autocast: bool) -> None:
    model = tiny_llama().bfloat16()
    add_lora(model, rank=4, alpha=8.0, targets=["q_proj", "lm_head"])
    randomise_adapters(model)
    types = []
    for _, adapter in adapters(model):
        adapter.register_forward_hook(lambda _, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = logits(model)
    assert types == [(torch.bfloat16, torch.float32)] * len(list(adapters(model)))
    assert found.dtype == torch.bfloat16
    exact = logits(copy.deepcopy(model).float())
    assert (found.float() - exact).norm() < 0.03 * exact.norm()
    merge_lora(model)
    assert all(
        layer.weight.dtype == torch.bfloat16 for layer in (model.lm_head, model.model.layers[0].self_attn.q_proj)
    )
    assert (logits(model).float() - exact).norm() < 0.03 * exact.norm()


def test_under_autocast_a_float32_models_adapter_stays_in_float32() -> None:
    adapter = LoraAdapter(8, 8, 2, 4.0, torch.device("cpu"))
    nn.init.normal_(adapter.B.weight)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter(x), adapter.B(adapter.A(x)) * 2) is False  # as autocast would have computed it
        found = adapter(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, adapter.B(adapter.A(x)) * 2)


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 8), (2, 2, 3, 8)])
@pytest.mark.parametrize("frozen", ["", "x", "A", "B"])
def test_an_adapters_own_backward_pass_is_autograds(shape: tuple[int, ...], frozen: str) -> None:
    torch.manual_seed(0)
    adapter = LoraAdapter(8, 6, 2, 5.0, torch.device("cpu")).double()
    nn.init.normal_(adapter.B.weight)
    x, grad = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-1], 6, dtype=torch.float64)
    inputs = {"x": x, "A": adapter.A.weight, "B": adapter.B.weight}
    wanted = [value.requires_grad_(name != frozen) for name, value in inputs.items() if name != frozen]
    if frozen:
        inputs[frozen].requires_grad_(False)
    outputs = adapter(x), adapter_output(adapter, x)
    torch.testing.assert_close(*outputs)
    found = [torch.autograd.grad(output, wanted, grad) for output in outputs]
    torch.testing.assert_close(*found)


def with_dropout(share: float = 0.4) -> nn.Module:
    model = tiny_llama(layers=1)
    add_lora(model, rank=2, alpha=4.0, targets=["q_proj", "down_proj"], dropout=share)
    randomise_adapters(model, scale=0.3)
    return model


def test_dropout_acts_in_training_only_and_leaves_files_as_they_are() -> None:
    plain, dropping = with_dropout(0.0), with_dropout()
    assert torch.equal(logits(dropping), logits(plain))  # attached to a model in evaluation mode
    assert dropping.state_dict().keys() == plain.state_dict().keys()
    assert adapter_state_dict(dropping).keys() == adapter_state_dict(plain).keys()
    before = logits(dropping)
    dropping.train()
    assert not torch.equal(logits(dropping), logits(dropping))
    assert torch.equal(logits(plain.train()), before)
    assert torch.equal(logits(dropping.eval()), before)
    merge_lora(dropping)
    torch.testing.assert_close(logits(dropping.train()), before)


def test_dropout_has_a_mask_for_each_example_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    adapter = LoraAdapter(8, 8, 2, 4.0, torch.device("cpu"), dropout=0.25)
    inputs: list[Tensor] = []
    adapter.dropout.register_forward_hook(lambda _, __, output: inputs.append(output))
    adapter(torch.ones(2, 500, 8))
    first, second = inputs[0]
    assert inputs[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert not torch.equal(first, second)
    assert inputs[0].mean().item() == pytest.approx(1, abs=0.03)


class _Mask(nn.Module):
    """Multiplies by the same mask as a dropout layer."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors[:, : x.shape[1]].to(x.dtype)


def test_per_example_gradients_under_dropout_are_the_oracles_under_the_same_masks() -> None:
    model, factors = with_dropout().train(), {}
    for name, adapter in adapters(model):
        adapter.dropout.register_forward_hook(
            lambda _, given, output, name=name: factors.update({name: (output / given[0]).nan_to_num().detach()})
        )
    examples = random_examples(3, seed=2)
    with PerExampleGradients(model) as recorder:
        CausalLMLoss(model)(*padded(examples)).sum().backward()
        norms = whole_norms(recorder.take().squared_norms())
    assert any(values.eq(0).any() for values in factors.values())
    for number, example in enumerate(examples):
        for name, adapter in adapters(model):
            adapter.dropout = _Mask(factors[name][number : number + 1])
        (expected,) = example_gradients(model, [example])
        assert norms[number].item() == pytest.approx(flat(expected).norm().item(), rel=1e-4)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_dropout_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(InvalidArgument, match="dropout="):
        with_dropout(share)


# --- every linear layer ---


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_all_linear_means_what_it_means_to_peft(make: Callable[[], nn.Module]) -> None:
    theirs = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=ALL_LINEAR))
    found = {name.removeprefix("base_model.model.") for name, part in theirs.named_modules() if hasattr(part, "lora_A")}
    chosen = add_lora(make(), targets=[ALL_LINEAR])
    assert set(chosen) == found
    assert not any("lm_head" in name for name in chosen)


def test_all_linear_takes_the_head_too_if_it_is_named() -> None:
    model = tiny_llama()
    assert set(add_lora(model, targets=[ALL_LINEAR, "lm_head"])) == set(linear_layers(model))


def test_all_linear_leaves_out_a_vision_tower_and_is_every_layer_of_a_plain_module() -> None:
    class Seeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.language = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))

        def get_decoder(self) -> nn.Module:
            return self.language

    assert add_lora(Seeing(), targets=[ALL_LINEAR]) == ["language.0"]
    assert add_lora(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), targets=[ALL_LINEAR]) == ["0", "1"]


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    plain, by_root = tiny_llama(), tiny_llama()
    add_lora(plain, rank=6, alpha=5 * math.sqrt(6))
    add_lora(by_root, rank=6, alpha=5, by_root=True)
    scales = [next(adapters(model))[1].scale for model in (plain, by_root)]
    assert scales[0] == scales[1] == pytest.approx(5 / math.sqrt(6))
