"""A merged model computes what base and adapter compute together, loaded with transformers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dptune._validate import InvalidArgument
from dptune.adapter_files import save_adapter
from dptune.lora import adapters, add_lora
from tests.full_disk import largest_file
from tests.tiny import save_tiny, tiny_tokenizer
from utils.models.merging import plan_merge, write_merged

IDS = torch.tensor([[1, 5, 9, 30, 41, 7]])
TARGETS = ("q_proj", "v_proj", "down_proj")


def save_gpt2(folder: Path) -> Path:
    """A tiny GPT-2, whose linear layers store their weight the other way round."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, targets: tuple[str, ...] = TARGETS) -> Path:
    """An adapter for `base` that changes it, in all its formats."""
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    add_lora(model, rank=3, alpha=6, targets=targets)
    torch.manual_seed(1)
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.B.weight, std=0.2)
    save_adapter(model, folder, base_model=str(base))
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(IDS).logits
    return found


def merge(adapter: Path | str, target: Path, **given: Any) -> Any:
    """The merged model, loaded strictly."""
    settings: dict[str, Any] = {"base": None, "revision": None, "dtype": None}
    write_merged(plan_merge(str(adapter), **(settings | given)), target)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


@pytest.mark.parametrize(
    ("save", "targets"),
    [(save_tiny, TARGETS), (save_gpt2, ("c_attn", "c_fc")), (save_gpt2, ("lm_head", "c_proj"))],
    ids=["Llama", "Conv1D", "tied head"],
)
def test_the_merged_model_computes_what_peft_computes(save: Any, targets: tuple[str, ...], tmp_path: Path) -> None:
    base = save(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter", targets)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, str(adapter)))
    merged = merge(adapter, tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected)
    assert (expected - before).abs().max() > 1e-2
    assert merged.dtype == torch.float32
    assert {path.name for path in (tmp_path / "merged").iterdir()} >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("the cat").input_ids == (
        tiny_tokenizer()("the cat").input_ids
    )


def test_every_form_of_an_adapter_is_merged_alike_and_a_base_may_be_given(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    run = tmp_path / "run"
    run.mkdir()
    adapter = adapt(base, run / "publish")
    expected = logits(merge(run, tmp_path / "of_run"))
    (tmp_path / "alone").mkdir()
    alone = tmp_path / "alone" / "lora_weights.bin"
    alone.write_bytes((adapter / "lora_weights.bin").read_bytes())
    with pytest.raises(InvalidArgument, match=r"--model_name_or_path=None: .* does not name its base model"):
        plan_merge(str(alone), base=None, revision=None, dtype=None)
    forms = {"publish": adapter, "peft": adapter / "adapter_model.safetensors", "plain": alone}
    for name, path in forms.items():
        assert torch.equal(logits(merge(path, tmp_path / name, base=str(base))), expected)


def test_the_data_type_is_the_bases_unless_given(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    adapter = adapt(base, tmp_path / "adapter")
    exact = logits(merge(adapter, tmp_path / "exact"))
    small = merge(adapter, tmp_path / "small", dtype="bfloat16")
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(logits(small).float(), exact, rtol=0.1, atol=0.1)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    assert merge(adapter, tmp_path / "as_base").dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    base, other = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "other", layers=1)
    adapter = adapt(base, tmp_path / "adapter")
    for weights in (base / "model.safetensors", other / "model.safetensors"):
        weights.unlink()

    def refused(path: Path, base: Path | None = None) -> str:
        with pytest.raises(InvalidArgument) as raised:
            plan_merge(str(path), base=base and str(base), revision=None, dtype=None)
        return str(raised.value)

    assert "the file adapts a layer that this model does not have" in refused(adapter, other)
    assert "holds a whole model, which loads as it is" in refused(base)
    assert "no adapter there" in refused(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    assert "its weights are stored quantised (gptq)" in (told := refused(adapter))
    assert told.startswith("--model_name_or_path=")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    plan = plan_merge(str(adapt(base, tmp_path / "adapter")), base=None, revision=None, dtype=None)
    there = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match="File too large"), largest_file(20_000):
        write_merged(plan, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == there
