"""What is saved loads with the standard libraries into the same classifier, whatever the mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from dptune import InvalidArgument
from dptune.integrations.peft import class_logits
from dptune.lora import adapters
from tests.classifier_folders import SIZES, WORDS, save_bert, save_llama
from utils.classification.files import (
    classifier_artifact,
    load_classifier,
    load_classifier_tokenizer,
    save_classifier,
)
from utils.classification.mode_defaults import MODES
from utils.classification.modes import prepare_mode

CLASSES = ("no", "maybe", "yes")
IDS = torch.tensor([[2, 6, 7, 9, 3], [2, 8, 3, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "BERT": save_bert(tmp_path_factory.mktemp("bert")),
        "Llama": save_llama(tmp_path_factory.mktemp("llama")),
    }


def load(checkpoint: Path) -> tuple[Any, Any]:
    tokenizer = load_classifier_tokenizer(str(checkpoint))
    model, new = load_classifier(str(checkpoint), CLASSES, pad_token_id=tokenizer.pad_token_id)
    assert new == []
    return model, tokenizer


def trained(checkpoint: Path, mode: str) -> tuple[Any, Any]:
    """A model in its mode, with everything that it trains away from its start."""
    model, tokenizer = load(checkpoint)
    model, _ = prepare_mode(model, mode, lora_r=2, num_prepend_tokens=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), tokenizer


def load_strictly(folder: Path) -> Any:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def load_back(folder: Path, checkpoint: Path) -> Any:
    """With transformers and PEFT alone."""
    adapter = folder / "adapter" if (folder / "config.json").exists() else folder
    if adapter != folder:
        model = load_strictly(folder)
    else:
        torch.manual_seed(99)  # another head to begin with: the adapter brings its own
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, pad_token_id=0)
    return PeftModel.from_pretrained(model, adapter).eval() if adapter.exists() else model.eval()


@pytest.mark.parametrize("name", ["BERT", "Llama"])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_what_was_saved_loads_to_the_same_logits(
    mode: str, name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    if (mode, name) == ("bias-only", "Llama"):
        return  # it has none: tests/utils/classification/test_modes.py
    model, tokenizer = trained(checkpoints[name], mode)
    logits = class_logits(model, INPUTS)
    save_classifier(model, tokenizer, tmp_path, base_model=str(checkpoints[name]))
    is_whole = "+" in mode or mode in ("full", "last-layer", "lora", "bias-only")
    assert (tmp_path / "config.json").exists() == is_whole
    assert (tmp_path / "adapter" / "adapter_config.json").exists() == ("+" in mode)
    assert (tmp_path / "adapter_config.json").exists() == (not is_whole)
    again = load_back(tmp_path, checkpoints[name])
    torch.testing.assert_close(class_logits(again, INPUTS), logits, rtol=1e-5, atol=1e-5)
    assert (class_logits(load(checkpoints[name])[0], INPUTS) - logits).abs().max() > 1e-3
    if is_whole:
        heads = {key.rpartition(".")[2]: value for key, value in model.named_parameters() if _is_trained_head(key)}
        plain = load_file(tmp_path / "model.safetensors")
        assert heads
        for kind, value in heads.items():
            assert torch.equal(plain[f"{'classifier' if name == 'BERT' else 'score'}.{kind}"], value)
    assert AutoTokenizer.from_pretrained(tmp_path)("good film").input_ids == tokenizer("good film").input_ids
    assert torch.equal(class_logits(model, INPUTS), logits), "the model in memory is as it was"
    assert all(adapter.replaced_weight is None for _, adapter in adapters(model))
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def _is_trained_head(name: str) -> bool:
    return ("classifier." in name or "score." in name) and ".original_module." not in name


def test_a_saved_model_knows_its_classes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = trained(checkpoints["BERT"], "last-layer")
    save_classifier(model, tokenizer, tmp_path, base_model="x")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
    assert config["label2id"] == {"no": 0, "maybe": 1, "yes": 2}


@pytest.mark.parametrize("mode", ["ia3", "prefix+lora"])
def test_no_path_of_the_users_machine_is_saved_if_the_models_name_is_given(
    mode: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = trained(checkpoints["BERT"], mode)
    save_classifier(model, tokenizer, tmp_path, base_model="prajjwal1/bert-tiny")
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or str(checkpoints["BERT"].parent).encode() not in path.read_bytes(), path
    assert not list(tmp_path.rglob("README.md"))
    config = next(tmp_path.rglob("adapter_config.json"))
    assert json.loads(config.read_text())["base_model_name_or_path"] == (
        "prajjwal1/bert-tiny" if mode == "ia3" else "."
    )


def test_an_adapter_holds_what_was_trained_and_nothing_else(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = trained(checkpoints["BERT"], "soft-prompt")
    save_classifier(model, tokenizer, tmp_path, base_model="x")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "prompt_embeddings": (3, SIZES["hidden_size"]),
        "base_model.classifier.weight": (3, SIZES["hidden_size"]),
        "base_model.classifier.bias": (3,),
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_cards_code_names_the_folders_that_are_there(
    mode: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = trained(checkpoints["BERT"], mode)
    save_classifier(model, tokenizer, tmp_path, base_model="x/y")
    code = classifier_artifact(model).use.format(base="x/y")
    is_whole = (tmp_path / "config.json").exists()
    assert ('SequenceClassification.from_pretrained(".")' in code) == is_whole
    assert ('PeftModel.from_pretrained(base, "adapter")' in code) == (tmp_path / "adapter").exists()
    assert ('PeftModel.from_pretrained(base, ".")' in code) == (not is_whole)
    assert ('SequenceClassification.from_pretrained("x/y", num_labels=3' in code) == (not is_whole)


def test_a_head_for_other_classes_is_replaced(tmp_path: Path) -> None:
    save_bert(tmp_path)
    BertForSequenceClassification(BertConfig(**SIZES, num_labels=5)).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert model.classifier.weight.shape == (3, SIZES["hidden_size"])


def test_a_pooler_that_is_missing_is_trained_and_another_weight_is_refused(tmp_path: Path) -> None:
    save_bert(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    write(file, {name: value for name, value in weights.items() if "pooler" not in name})
    _, new = load_classifier(str(tmp_path), CLASSES, pad_token_id=0)
    assert new == ["bert.pooler.dense"]
    write(file, {name: value for name, value in weights.items() if "layer.1.output.dense" not in name})
    with pytest.raises(InvalidArgument, match=r"lacks 2 weights such as bert\.encoder\.layer\.1\.output\.dense"):
        load_classifier(str(tmp_path), CLASSES, pad_token_id=0)


def write(file: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, file, metadata={"format": "pt"})


def test_a_bert_that_does_not_say_so_loads(tmp_path: Path) -> None:
    """As Google's small ones lie on the hub, prajjwal1/bert-tiny among them: no model type, a vocabulary, a .bin."""
    save_bert(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    kept = {key: value for key, value in json.loads((tmp_path / "config.json").read_text()).items() if key in _GOOGLES}
    for path in tmp_path.iterdir():
        if path.name != "pytorch_model.bin":
            path.unlink()
    (tmp_path / "config.json").write_text(json.dumps(kept))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    model, tokenizer = load(tmp_path)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert tokenizer("A Good film").input_ids == [2, WORDS.index("a"), WORDS.index("good"), WORDS.index("film"), 3]
    assert tokenizer.pad_token_id == 0


_GOOGLES = {*SIZES, "hidden_act", "initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob"} | {
    "type_vocab_size"
}


def test_a_decoder_pads_with_its_end_token(checkpoints: dict[str, Path]) -> None:
    model, tokenizer = load(checkpoints["Llama"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    assert tokenizer.padding_side == "right"
    assert model.model.embed_tokens.padding_idx is None, "the end token's embedding would not train"


@pytest.mark.parametrize("loads", [load_classifier_tokenizer, lambda name: load_classifier(name, "ab", pad_token_id=0)])
def test_a_checkpoint_that_is_not_there_is_one_line(loads: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="--model_name_or_path=") as error:
        loads(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"vocab_size": 23, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    BartForSequenceClassification(BartConfig(**sizes, **heads)).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path=.*bart is an encoder-decoder; give an encoder or"):
        load_classifier(str(tmp_path), CLASSES, pad_token_id=0)


def test_a_pad_token_beyond_the_embedding_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match=r"tokenizer pads with token 23, but the model has only 23 embeddings"):
        load_classifier(str(checkpoints["BERT"]), CLASSES, pad_token_id=23)
