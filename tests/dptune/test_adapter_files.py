"""Adapter files load with dptune and with PEFT; anything else is refused with a one-line error."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dptune import InvalidArgument, add_lora, attach_adapter, merge_lora, save_adapter
from dptune.adapter_files import PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME, require_savable
from dptune.lora import adapters, attach
from tests.dptune.test_lora import logits, tiny_gpt2
from tests.examples import randomise_adapters
from tests.tiny import tiny_llama

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "llama": (tiny_llama, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "llama with head": (tiny_llama, ("q_proj", "lm_head")),
    "tied llama with head": (lambda: tiny_llama(tie=True), ("q_proj", "lm_head")),
    "gpt2": (tiny_gpt2, ("c_attn", "c_fc")),
    "gpt2 with head": (tiny_gpt2, ("c_attn", "lm_head")),
}


def trained(kind: str, rank: int = 3, alpha: float = 7.0) -> nn.Module:
    make, targets = KINDS[kind]
    model = make()
    add_lora(model, rank=rank, alpha=alpha, targets=targets)
    randomise_adapters(model, scale=0.3)
    return model


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The adapter of a Llama with attention targets."""
    save_adapter(trained("llama"), tmp_path, base_model="base")
    return tmp_path


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_plain_file_is_a_state_dict_that_loads_with_weights_only(saved: Path) -> None:
    state = torch.load(saved / WEIGHTS_NAME, weights_only=True)
    model = trained("llama")
    assert set(state) == {
        f"{name}.lora.{key}" for name, _ in adapters(model) for key in ("A.weight", "B.weight", "alpha")
    }
    for name, adapter in adapters(model):
        assert torch.equal(state[f"{name}.lora.A.weight"], adapter.A.weight)
        assert torch.equal(state[f"{name}.lora.B.weight"], adapter.B.weight)
        assert state[f"{name}.lora.alpha"] == 7.0
    assert sorted(path.name for path in saved.iterdir()) == [PEFT_CONFIG_NAME, PEFT_WEIGHTS_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("given", [WEIGHTS_NAME, PEFT_WEIGHTS_NAME, "."])
@pytest.mark.parametrize("attached", [False, True])
def test_every_form_brings_the_same_model_back(tmp_path: Path, kind: str, given: str, attached: bool) -> None:
    model = trained(kind)
    save_adapter(model, tmp_path, base_model="base")
    fresh = KINDS[kind][0]()
    assert not torch.allclose(logits(fresh), logits(model), atol=1e-2)
    if attached:
        add_lora(fresh, rank=3, alpha=7.0, targets=KINDS[kind][1])
    attach_adapter(fresh, tmp_path / given)
    assert torch.equal(logits(fresh), logits(model))
    assert [name for name, _ in adapters(fresh)] == [name for name, _ in adapters(model)]
    assert {adapter.scale for _, adapter in adapters(fresh)} == {7.0 / 3}


def test_a_folder_with_the_plain_file_alone_loads(saved: Path) -> None:
    (saved / PEFT_CONFIG_NAME).unlink()
    fresh = tiny_llama()
    attach_adapter(fresh, saved)
    assert torch.equal(logits(fresh), logits(trained("llama")))


def test_peft_loads_what_we_save_and_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = trained(kind)
    save_adapter(model, tmp_path, base_model="base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an adapted tied head
        theirs = peft.PeftModel.from_pretrained(KINDS[kind][0](), str(tmp_path)).eval()
        assert_same(logits(theirs), logits(model))
        if "head" not in kind or kind == "llama with head":  # PEFT merges a tied head into the embedding too
            assert_same(logits(theirs.merge_and_unload()), logits(model))


def test_peft_needs_no_correction_of_our_configuration_for_gpt2(tmp_path: Path) -> None:
    save_adapter(trained("gpt2"), tmp_path, base_model="base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out.*")
        peft.PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path))


def test_we_load_what_peft_made(tmp_path: Path, kind: str) -> None:
    make, targets = KINDS[kind]
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(make(), config).eval()
        theirs.save_pretrained(str(tmp_path))
    fresh = make()
    attach_adapter(fresh, tmp_path)
    assert not torch.allclose(logits(fresh), logits(make()), atol=1e-2)
    assert_same(logits(fresh), logits(theirs))


def test_adapters_of_several_ranks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, {"model.layers.0.self_attn.q_proj": (2, 4.0), "model.layers.0.self_attn.v_proj": (4, 4.0)})
    with pytest.raises(InvalidArgument, match=r"^model=rank \d and alpha 4, rank \d and alpha 4: PEFT's format"):
        save_adapter(model, tmp_path, base_model="base")
    assert list(tmp_path.iterdir()) == []


def test_saving_a_merged_model_saves_the_adapter(tmp_path: Path) -> None:
    model = trained("tied llama with head")
    merge_lora(model)
    save_adapter(model, tmp_path, base_model="base")
    fresh = KINDS["tied llama with head"][0]()
    attach_adapter(fresh, tmp_path / WEIGHTS_NAME)
    assert torch.equal(logits(fresh), logits(trained("tied llama with head")))


class _Code:
    """The content of a malicious file: a call that the unpickler would make."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def state_of(saved: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(saved / WEIGHTS_NAME, weights_only=True)
    return state


def without(saved: Path, ending: str) -> dict[str, Any]:
    """The state without the first entry with this ending."""
    state = state_of(saved)
    del state[next(key for key in state if key.endswith(ending))]
    return state


def changed(saved: Path, ending: str, change: Callable[[Tensor], object]) -> dict[str, Any]:
    state = state_of(saved)
    key = next(key for key in state if key.endswith(ending))
    return state | {key: change(state[key])}


BAD_STATES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no dictionary": (lambda _: [1, 2], "holds no state dict"),
    "other keys": (lambda _: {"x.weight": torch.zeros(2), 3: torch.zeros(1)}, "holds no LoRA weights"),
    "empty": (lambda _: {}, "holds no LoRA weights"),
    "one key more": (lambda saved: state_of(saved) | {"lm_head.weight": torch.zeros(2)}, "lm_head.weight belongs to"),
    "a number for a key": (lambda saved: state_of(saved) | {3: torch.zeros(2)}, "3 belongs to no plain LoRA adapter"),
    "A missing": (lambda saved: without(saved, "A.weight"), "belongs to no plain LoRA adapter"),
    "B missing": (lambda saved: without(saved, "B.weight"), "incomplete or damaged"),
    "alpha missing": (lambda saved: without(saved, "alpha"), "incomplete or damaged"),
    "A no tensor": (lambda saved: changed(saved, "A.weight", lambda _: 5), "incomplete or damaged"),
    "A flat": (lambda saved: changed(saved, "A.weight", torch.flatten), "incomplete or damaged"),
    "A whole numbers": (lambda saved: changed(saved, "A.weight", Tensor.long), "incomplete or damaged"),
    "A of another rank": (lambda saved: changed(saved, "A.weight", lambda A: A[:2]), "incomplete or damaged"),
    "alpha a vector": (lambda saved: changed(saved, "alpha", lambda _: torch.ones(2)), "incomplete or damaged"),
    "alpha nan": (lambda saved: changed(saved, "alpha", lambda _: torch.tensor(torch.nan)), "incomplete or damaged"),
    "other width": (lambda saved: changed(saved, "A.weight", lambda A: A[:, :-1]), "belongs to another model"),
}
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "loads with weights_only=True"),
    "text": (b"hello, this is no adapter\n", "loads with weights_only=True"),
    "a number": (pickle.dumps(3), "loads with weights_only=True"),
    "noise": (bytes(range(256)) * 8, "loads with weights_only=True"),
    "a zip's first bytes": (b"PK\x03\x04" + bytes(100), "loads with weights_only=True"),
}


@pytest.fixture
def unchanged() -> Iterator[nn.Module]:
    """A base model that must be unchanged when the test ends."""
    model = tiny_llama()
    before = copy.deepcopy(model)
    yield model
    assert not any(True for _ in adapters(model))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in before.named_modules()
    }
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(before))


def refused(model: nn.Module, path: Path) -> str:
    warnings.simplefilter("ignore", UserWarning)  # torch's on the pickle protocol; pytest restores the filters
    with pytest.raises(InvalidArgument) as caught:
        attach_adapter(model, path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("path=")
    return message


@pytest.mark.parametrize("case", BAD_STATES)
def test_a_bad_state_dict_is_refused(saved: Path, unchanged: nn.Module, case: str) -> None:
    make, named = BAD_STATES[case]
    torch.save(make(saved), saved / "bad.bin")
    assert named in refused(unchanged, saved / "bad.bin")


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, unchanged: nn.Module, case: str) -> None:
    content, named = BAD_FILES[case]
    (tmp_path / "bad.bin").write_bytes(content)
    assert named in refused(unchanged, tmp_path / "bad.bin")


def test_a_damaged_file_is_refused_or_harmless(saved: Path) -> None:
    """Cut at many places: whatever error the unpickler raises, the refusal is one line."""
    content = (saved / WEIGHTS_NAME).read_bytes()
    for length in range(0, len(content) - 1, len(content) // 60):
        (saved / "cut.bin").write_bytes(content[:length])
        assert "loads with weights_only=True" in refused(tiny_llama(layers=1, hidden=16), saved / "cut.bin")


def test_code_in_a_file_is_not_run(tmp_path: Path, unchanged: nn.Module) -> None:
    marker = tmp_path / "executed"
    for path, content in (("pickle.bin", pickle.dumps(_Code(marker))), ("torch.bin", None)):
        if content is None:
            torch.save({"x.lora.A.weight": _Code(marker)}, tmp_path / path)
        else:
            (tmp_path / path).write_bytes(content)
        refused(unchanged, tmp_path / path)
        assert not marker.exists()
    pickle.loads(pickle.dumps(_Code(marker)))
    assert marker.exists()  # the call would have been run


@pytest.mark.parametrize("path", ["nothing.bin", "nothing", "."])
def test_a_path_without_an_adapter_is_refused(tmp_path: Path, unchanged: nn.Module, path: str) -> None:
    assert "no adapter there; give a lora_weights.bin file or a PEFT folder" in refused(unchanged, tmp_path / path)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: tiny_llama(layers=1), "a layer that this model does not have: it belongs to another model"),
        (lambda: tiny_llama(hidden=16), ", the layer 16 -> "),
        (tiny_gpt2, "a layer that this model does not have"),
    ],
)
@pytest.mark.parametrize("given", [WEIGHTS_NAME, "."])
def test_another_models_adapter_is_refused(saved: Path, other: Callable[[], nn.Module], named: str, given: str) -> None:
    model = other()
    assert named in refused(model, saved / given)
    assert not any(True for _ in adapters(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("rank", "alpha", "targets", "named"),
    [
        (4, 7.0, KINDS["llama"][1], "the file has rank 3 and alpha 7, but the model has rank 4 and alpha 7"),
        (3, 8.0, KINDS["llama"][1], "the file has rank 3 and alpha 7, but the model has rank 3 and alpha 8"),
        (3, 7.0, ("q_proj",), "the file adapts this layer, but the model does not"),
        (3, 7.0, (*KINDS["llama"][1], "down_proj"), "has no weights for the model's adapter on model.layers.0.mlp"),
    ],
)
def test_another_adapter_than_the_models_is_refused_and_nothing_is_loaded(
    saved: Path, rank: int, alpha: float, targets: tuple[str, ...], named: str
) -> None:
    model = tiny_llama()
    add_lora(model, rank=rank, alpha=alpha, targets=targets)
    before = copy.deepcopy(model.state_dict())
    assert named in refused(model, saved / WEIGHTS_NAME)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_loading_into_a_merged_model_is_refused(saved: Path) -> None:
    """The merged weights would still be those of the old adapter."""
    model = trained("llama")
    merge_lora(model)
    with pytest.raises(InvalidArgument, match="is merged; call unmerge_lora first"):
        attach_adapter(model, saved)


def with_config(saved: Path, **settings: Any) -> None:
    path = saved / PEFT_CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def with_key(saved: Path, key: str) -> None:
    path = saved / PEFT_WEIGHTS_NAME
    save_file(load_file(path) | {key: torch.ones(2, 2)}, path)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda saved: (saved / PEFT_WEIGHTS_NAME).unlink(), "not a readable PEFT adapter"),
    "garbage": (lambda saved: (saved / PEFT_WEIGHTS_NAME).write_bytes(b"garbage"), "not a readable PEFT adapter"),
    "empty": (lambda saved: (saved / PEFT_WEIGHTS_NAME).write_bytes(b""), "not a readable PEFT adapter"),
    "no json": (lambda saved: (saved / PEFT_CONFIG_NAME).write_text("{"), "not a readable PEFT adapter"),
    "a list": (lambda saved: (saved / PEFT_CONFIG_NAME).write_text("[]"), "describes no LoRA adapter"),
    "another method": (lambda saved: with_config(saved, peft_type="IA3"), "describes no LoRA adapter"),
    "no alpha": (lambda saved: with_config(saved, lora_alpha=None), "incomplete or damaged"),
    "alpha a word": (lambda saved: with_config(saved, lora_alpha="much"), "incomplete or damaged"),
    "dora": (lambda saved: with_config(saved, use_dora=True), "PEFT's use_dora=True makes it more than"),
    "patterns": (lambda saved: with_config(saved, alpha_pattern={"q_proj": "much"}), "incomplete or damaged"),
    "modules": (lambda saved: with_config(saved, modules_to_save=["lm_head"]), "PEFT's modules_to_save"),
    "half": (lambda saved: with_key(saved, f"{LAYER.replace('q_proj', 'x')}.lora_B.weight"), "belongs to no plain"),
    "bias": (lambda saved: with_key(saved, f"{LAYER}.lora_B.bias"), "lora_B.bias belongs to no plain LoRA adapter"),
    "a frozen weight": (lambda saved: with_key(saved, f"{LAYER}.weight"), "differs from the model's own weight"),
    "a buffer": (lambda saved: with_key(saved, "base_model.model.scale"), "scale belongs to no plain LoRA adapter"),
    "without the prefix": (lambda saved: with_key(saved, "lm_head.weight"), "lm_head.weight belongs to no plain"),
    "magnitude": (lambda saved: with_key(saved, f"{LAYER}.lora_magnitude_vector"), "belongs to no plain"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_peft_folder_that_is_damaged_or_holds_more_than_plain_lora_is_refused(
    saved: Path, unchanged: nn.Module, case: str
) -> None:
    spoil, named = BAD_FOLDERS[case]
    spoil(saved)
    assert named in refused(unchanged, saved)


def test_weights_without_their_configuration_are_refused(saved: Path, unchanged: nn.Module) -> None:
    (saved / "alone").mkdir()
    shutil.copy(saved / PEFT_WEIGHTS_NAME, saved / "alone")
    assert "not a readable PEFT adapter" in refused(unchanged, saved / "alone" / PEFT_WEIGHTS_NAME)


# --- rsLoRA, and alphas that float32 does not hold ---


@pytest.mark.parametrize("by_root", [False, True])
@pytest.mark.parametrize("given", [WEIGHTS_NAME, PEFT_WEIGHTS_NAME])
def test_the_scale_comes_back_to_the_bit(tmp_path: Path, by_root: bool, given: str) -> None:
    model, loaded = tiny_llama(), tiny_llama()
    add_lora(model, rank=6, alpha=0.7, by_root=by_root)
    randomise_adapters(model, scale=0.3)
    save_adapter(model, tmp_path, base_model="base")
    attach_adapter(loaded, tmp_path / given)
    assert [one.scale for _, one in adapters(loaded)] == [one.scale for _, one in adapters(model)]
    assert torch.equal(logits(loaded), logits(model))
    attach_adapter(model, tmp_path / given)  # fits the adapters that it came from


def test_peft_reads_rslora_from_its_configuration(tmp_path: Path) -> None:
    model = tiny_llama()
    add_lora(model, rank=6, alpha=5, by_root=True)
    randomise_adapters(model, scale=0.3)
    save_adapter(model, tmp_path, base_model="base")
    config = json.loads((tmp_path / PEFT_CONFIG_NAME).read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (True, 5, 6)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert_same(logits(theirs), logits(model))
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=1e-3)


# --- training goes on ---


def test_adapters_that_could_not_be_saved_are_refused_before_they_train() -> None:
    model = tiny_llama()
    attach(model, {"model.layers.0.self_attn.q_proj": (2, 4.0), "model.layers.1.self_attn.q_proj": (4, 4.0)})
    with pytest.raises(InvalidArgument, match=r"rank [24] and alpha 4, rank [24] and alpha 4: PEFT"):
        require_savable(model)


def test_a_skeleton_gets_adapters_without_values(tmp_path: Path) -> None:
    """Also from a PEFT folder with a copy of the base's weight, which a skeleton has no values to compare with."""
    save_adapter(trained("llama"), tmp_path, base_model="base")
    state = load_file(tmp_path / PEFT_WEIGHTS_NAME)
    state["base_model.model.lm_head.weight"] = tiny_llama().lm_head.weight.detach().clone()
    save_file(state, tmp_path / PEFT_WEIGHTS_NAME)
    with torch.device("meta"):
        skeleton = type(tiny_llama())(tiny_llama().config)
    attach_adapter(skeleton, tmp_path, dropout=0.25)
    found = [one for _, one in adapters(skeleton)]
    assert len(found) == 8
    assert all(one.has_dropout and one.A.weight.is_meta and one.A.weight.requires_grad for one in found)
