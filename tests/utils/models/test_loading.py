"""Loading: dtypes, tokenizers without padding token, frozen models, adapters, and one-line refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from dptune import add_lora, save_adapter
from dptune._validate import InvalidArgument
from dptune.integrations.vocabulary import positions_of
from dptune.lora import adapters
from tests.tiny import save_tiny, tiny_llama
from utils.models import loading as modeling
from utils.models.arguments import EAGER, FLASH, SDPA
from utils.models.loading import (
    adapter_files,
    is_configuration,
    load_adapter,
    load_model,
    load_skeleton,
    load_tokenizer,
    require_context,
)

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def model_copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for the tiny model whose B is not zero, so that it changes the logits."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(_with_random_adapter(tiny_llama(vocab_size=400)), folder, base_model="tiny")
    return folder


def _with_random_adapter(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(1)
    add_lora(model, rank=4, alpha=8.0)
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B.weight)
    return model


def _load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    return load_model(str(folder), **{"dtype": torch.float32, "device": "cpu", **kwargs})


def test_the_end_token_pads_where_no_token_does(tiny_model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) == 400


def test_an_existing_padding_token_is_kept(model_copy: Path) -> None:
    tokenizer = load_tokenizer(str(model_copy))
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(model_copy)
    assert load_tokenizer(str(model_copy)).pad_token_id == 0


def test_a_tokenizer_without_end_token_is_refused(model_copy: Path) -> None:
    tokenizer = load_tokenizer(str(model_copy))
    tokenizer.pad_token, tokenizer.eos_token = "<unk>", None
    tokenizer.save_pretrained(model_copy)
    with pytest.raises(InvalidArgument, match="no end token"):
        load_tokenizer(str(model_copy))


@pytest.mark.parametrize("load", [load_tokenizer, _load])
@pytest.mark.parametrize("name", ["no/such-model", "./no_such_folder"])
def test_a_model_that_is_not_there_is_one_line_with_the_remedy(load: Any, name: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        load(name)
    message = str(error.value)
    assert message.startswith(f"--model_name_or_path='{name}'")
    assert "--access_token" in message
    assert "\n" not in message


def test_a_configuration_alone_is_a_file_or_a_folder_without_others(model_copy: Path, tmp_path: Path) -> None:
    config, folder = model_copy / "config.json", tmp_path / "config"
    folder.mkdir()
    assert not is_configuration(str(folder))
    shutil.copy(config, folder)
    (folder / ".gitattributes").touch()
    (folder / "generation_config.json").touch()
    assert is_configuration(str(folder))
    assert is_configuration(str(config))
    for name in (model_copy, model_copy / "model.safetensors", "org/name", tmp_path / "nothing"):
        assert not is_configuration(str(name))
    sizes = [sum(one.numel() for one in load_skeleton(str(name)).parameters()) for name in (config, folder, model_copy)]
    assert len(set(sizes)) == 1


def test_a_folder_without_weights_is_one_line(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match="no model could be loaded"):
        _load(model_copy)


def test_damaged_weights_are_one_line(model_copy: Path) -> None:
    (model_copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InvalidArgument, match="no model could be loaded"):
        _load(model_copy)


def test_an_error_that_quotes_the_token_does_not_pass_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(f"\n401 for bearer {TOKEN}\nsecond line")

    monkeypatch.setattr(modeling.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(InvalidArgument, match=r"OSError: 401 for bearer \*\*\*") as error:
        load_tokenizer("gated", token=TOKEN)
    assert TOKEN not in str(error.value)


def test_the_token_and_revision_reach_the_hub_client(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def note(*_: object, **kwargs: Any) -> None:
        seen.append(kwargs)
        raise OSError("stop here")

    for kind in (modeling.AutoTokenizer, modeling.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", note)
    for load in (load_tokenizer, _load):
        with pytest.raises(InvalidArgument):
            load(str(tiny_model_dir), token=TOKEN, revision="v1")
    assert [(one["token"], one["revision"]) for one in seen] == [(TOKEN, "v1")] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_frozen_in_evaluation_mode_and_of_the_dtype(tiny_model_dir: Path, dtype: torch.dtype) -> None:
    model = _load(tiny_model_dir, dtype=dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_checkpoint_that_lacks_a_weight_is_refused(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"lacks 1 weight such as model\.layers\.1\.self_attn\.q_proj\.weight"):
        _load(model_copy)


def test_tied_weights_are_not_missed(tmp_path: Path) -> None:
    assert _load(save_tiny(tmp_path, tie=True)) is not None


@pytest.mark.parametrize("form", ["lora_weights.bin", "", "adapter_model.safetensors"])
@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_gives_the_logits_of_the_model_it_was_saved_from(
    form: str, merge: bool, tiny_model_dir: Path, adapter_dir: Path
) -> None:
    ids = torch.arange(3, 43).view(2, 20)
    model = _load(tiny_model_dir)
    with torch.no_grad():
        base = model(ids).logits
        load_adapter(model, str(adapter_dir / form), merge=merge)
        adapted = model(ids).logits
        expected = _with_random_adapter(tiny_llama(vocab_size=400))(ids).logits
    assert not torch.allclose(adapted, base, atol=1e-2)
    torch.testing.assert_close(adapted, expected, atol=1e-5, rtol=1e-5)
    assert all((adapter.replaced_weight is not None) == merge for _, adapter in adapters(model))


def test_an_adapter_of_another_model_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    model = _load(save_tiny(tmp_path, hidden=64))
    with pytest.raises(InvalidArgument, match="another model"):
        load_adapter(model, str(adapter_dir), merge=True)


def test_the_files_of_an_adapter_are_found(adapter_dir: Path, tmp_path: Path) -> None:
    peft = [adapter_dir / "adapter_model.safetensors", adapter_dir / "adapter_config.json"]
    plain = adapter_dir / "lora_weights.bin"
    assert adapter_files(str(plain)) == [plain]
    assert adapter_files(str(adapter_dir)) == adapter_files(str(peft[0])) == peft
    (tmp_path / "lora_weights.bin").write_bytes(plain.read_bytes())
    assert adapter_files(str(tmp_path)) == [tmp_path / "lora_weights.bin"]


@pytest.mark.parametrize("name", ["nothing.bin", "empty"])
def test_an_adapter_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument, match="--lora_weights_path"):
        adapter_files(str(tmp_path / name))


def test_robertas_context_leaves_out_the_positions_up_to_its_padding() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, vocab_size=20, max_position_embeddings=12))
    require_context(model, 10)  # positions 2 to 11
    model(input_ids=torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, 11), 5))
    with pytest.raises(InvalidArgument, match="context is 10 tokens"):
        require_context(model, 11)


def test_a_limit_of_minus_one_is_none() -> None:
    """XLNet's, whose positions are relative."""
    model = XLNetForSequenceClassification(XLNetConfig(vocab_size=20, d_model=8, n_layer=1, n_head=2, d_inner=8))
    assert model.config.max_position_embeddings == -1
    assert positions_of(model) is None
    require_context(model, 10_000, flag="--max_length", virtual_tokens=3)


# --- attention ---


@pytest.mark.parametrize("attention", [EAGER, SDPA])
def test_attention_is_computed_as_asked(tiny_model_dir: Path, attention: str) -> None:
    assert _load(tiny_model_dir, attention=attention).config._attn_implementation == attention
    assert load_skeleton(str(tiny_model_dir), attention=attention).config.model_type == "llama"


def test_attention_that_is_not_installed_is_refused_before_the_weights_are_read(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^--attn_implementation='flash_attention_2': this model cannot use it"):
        load_skeleton(str(tiny_model_dir), attention=FLASH, dtype=torch.bfloat16)


def test_flash_attention_in_float32_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match="'flash_attention_2': it has no float32; set mixed_precision to bf16"):
        load_skeleton(str(tiny_model_dir), attention=FLASH)
