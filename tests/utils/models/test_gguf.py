"""A GGUF file loads as the model that it was made from, wherever it can; elsewhere one line says how to convert it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from dptune._validate import InvalidArgument
from dptune.adapter_files import save_adapter
from dptune.lora import adapters, add_lora
from tests.gguf_files import Q8_0, save_gguf
from tests.tiny import save_tiny, tiny_llama, tiny_tokenizer
from utils.classification.files import load_classifier_tokenizer
from utils.cli.launch import Sharding
from utils.models.gguf import GgufSource, convert, source_of
from utils.models.loading import load_model, load_skeleton, load_tokenizer
from utils.models.merging import plan_merge, write_merged

IDS = torch.tensor([[1, 5, 9, 30]])
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def original() -> torch.Tensor:
    return logits(tiny_llama(vocab_size=len(tiny_tokenizer())))


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_file_loads_as_the_model_that_it_was_made_from(file: Path, whole_folder: bool) -> None:
    name = str(file.parent if whole_folder else file)
    model = load_model(name, **FLOAT32)
    torch.testing.assert_close(logits(model), original())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name for name, _ in load_skeleton(name).named_parameters()} == dict(model.named_parameters()).keys()
    tokenizer, packed = load_tokenizer(name), tiny_tokenizer()
    assert tokenizer("The cat sat on the mat.").input_ids == packed("The cat sat on the mat.").input_ids
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", packed.chat_template)
    assert load_model(name, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_quantised_weights_become_dense_ones(tmp_path: Path) -> None:
    model = load_model(str(save_gguf(tmp_path / "small.gguf", Q8_0)), **FLOAT32)
    weight, whole = model.lm_head.weight, tiny_llama(vocab_size=len(tiny_tokenizer())).lm_head.weight
    assert (weight.dtype, weight.shape) == (torch.float32, whole.shape)
    assert 0 < (weight - whole).abs().max() < whole.abs().max() / 100, "rounded to 8 bits"
    torch.testing.assert_close(logits(model), original(), rtol=0.1, atol=0.01)
    add_lora(model, rank=2, targets=("q_proj",))
    model(IDS, labels=IDS).loss.backward()
    assert all(adapter.B.weight.grad.any() for _, adapter in adapters(model))


def test_an_adapter_is_merged_into_the_weights_of_a_file(file: Path, tmp_path: Path) -> None:
    model = load_model(str(file), **FLOAT32)
    add_lora(model, rank=2, targets=("q_proj",))
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B.weight)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base_model=str(file))
    write_merged(plan_merge(str(tmp_path / "adapter"), base=None, revision=None, dtype=None), tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"), **FLOAT32)), logits(model))
    assert load_tokenizer(str(tmp_path / "merged")).eos_token == "</s>"


def test_a_converted_file_is_a_plain_model(file: Path, tmp_path: Path) -> None:
    convert(file, tmp_path)
    assert source_of(str(tmp_path)) == GgufSource(str(tmp_path))
    torch.testing.assert_close(logits(load_model(str(tmp_path), **FLOAT32)), original())
    assert load_tokenizer(str(tmp_path)).eos_token == "</s>"


def test_what_is_found_under_a_name(file: Path, tmp_path: Path) -> None:
    assert source_of("org/model.gguf") == GgufSource("org/model.gguf"), "no file: a name on the hub"
    assert source_of(str(tmp_path)) == GgufSource(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InvalidArgument, match=r"holds 2 GGUF files: a\.gguf, b\.gguf; give one of them"):
        source_of(str(tmp_path))
    assert source_of(str(tmp_path / "b.gguf")) == GgufSource(str(tmp_path), "b.gguf")
    assert source_of(str(file.parent)) == source_of(str(file)) == GgufSource(str(file.parent), "tiny.gguf")
    folder = save_tiny(tmp_path / "tiny")
    (folder / "also.gguf").touch()
    assert source_of(str(folder)) == GgufSource(str(folder)), "a folder with a model is that model"


def test_where_a_file_is_not_read_one_line_says_how_to_convert_it(file: Path) -> None:
    line = f"give the folder of: python -m scripts.convert_gguf {file} --output_dir FOLDER"

    def refused(call: Any) -> str:
        with pytest.raises(InvalidArgument) as raised:
            call()
        return str(raised.value)

    sharded = refused(lambda: load_model(str(file), **FLOAT32, sharding=Sharding()))
    assert sharded == f"--model_name_or_path={str(file)!r}: the weights of a GGUF file cannot be sharded; {line}"
    assert f"--qbits 4 does not read a GGUF file; {line}" in refused(lambda: load_model(str(file), **FLOAT32, bits=4))
    classifier = refused(lambda: load_classifier_tokenizer(str(file)))
    assert classifier.endswith(f"={str(file)!r}: classifiers do not read a GGUF file; {line}")


def test_a_file_that_transformers_does_not_know_is_one_line(tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.gguf"
    writer = gguf.GGUFWriter(unknown, "unheard_of")
    writer.add_tokenizer_model("gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_text("no model")
    for file in (unknown, damaged):
        for load in (load_tokenizer, load_skeleton, lambda name: load_model(name, **FLOAT32)):
            with pytest.raises(InvalidArgument, match=r"give the model that it was made from$") as raised:
                load(str(file))
            assert "\n" not in str(raised.value)
