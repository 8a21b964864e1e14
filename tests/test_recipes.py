"""Recipes: each runs on a tiny model of its architecture, and the page's table is what a dry run would say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

import train_clm
from dptune.accounting import Spend, compose, planned_steps
from dptune.accounting.delta import default_delta
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODELS = sorted((ROOT / "recipes" / "models").glob("*.yaml"))
PAGE = (ROOT / "docs" / "how_to" / "recipes.md").read_text(encoding="utf-8")

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048}
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "gemma": Gemma3TextConfig(**_SIZES, vocab_size=400, sliding_window=64),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, vocab_size=400, resid_pdrop=0.0),
    "llama": LlamaConfig(**_SIZES, vocab_size=400),
    "mistral": MistralConfig(**_SIZES, vocab_size=400),
    "qwen3": Qwen3Config(**_SIZES, vocab_size=400),
    "smollm2": LlamaConfig(**_SIZES, vocab_size=400, tie_word_embeddings=True),
}


def tiny_of(recipe: Path, folder: Path) -> Path:
    """A tiny random model of the recipe's architecture, with a tokenizer."""
    (config,) = [one for name, one in ARCHITECTURES.items() if recipe.stem.startswith(name)]
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = len(tokenizer), 1, 2, None
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", MODELS, ids=lambda path: path.stem)
def test_a_recipe_trains_its_architecture(recipe: Path, tmp_path: Path, no_plots: None) -> None:  # noqa: ARG001
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Say a.", "answer": "a a a"}\n' * 12)
    line = ["--config", recipe, "--config", ROOT / "recipes" / "rows" / "10k.yaml"]
    line += ["--model_name_or_path", tiny_of(recipe, tmp_path / "model"), "--train_file", rows]
    line += ["--output_dir", tmp_path / "out", "--block_size", 32, "--max_tokens_per_device", 128]
    line += ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1]
    line += [
        "--max_train_steps",
        1,
        "--num_warmup_steps",
        0,
        "--noise_multiplier",
        1,
        "--delta",
        1e-3,
        "--eval_freq",
        1,
    ]
    train_clm.main([str(word) for word in line])
    assert (tmp_path / "out" / "publish" / "privacy_report.json").exists()


def test_the_page_lists_every_recipe() -> None:
    listed = set(re.findall(r"^\| `(recipes/\S+)`", PAGE, flags=re.MULTILINE))
    assert listed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}


ROWS = re.findall(r"^\| `(recipes/rows/\S+)` \| ([\d,]+) rows \| ([\d,]+) \| (\d+) \| (\S+) \| (.*) \|$", PAGE, re.M)


@pytest.mark.parametrize(("file", "rows", "batch", "steps", "delta", "noises"), ROWS, ids=lambda text: text[:26])
def test_the_noise_in_the_table_is_just_enough(
    file: str, rows: str, batch: str, steps: str, delta: str, noises: str
) -> None:
    flags = yaml.safe_load((ROOT / file).read_text())
    n, size = int(rows.replace(",", "")), int(batch.replace(",", ""))
    assert size == flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    assert int(steps) == planned_steps(num_examples=n, expected_batch_size=size, epochs=flags["num_train_epochs"])
    assert float(delta) == default_delta(n)
    assert "delta" not in flags
    for target, noise in zip((1, 3, 8), map(float, noises.split(" | ")), strict=True):
        enough, less = (
            compose([Spend(one, size / n, int(steps), 1)], delta=float(delta)) for one in (noise, 0.998 * noise)
        )
        assert enough <= target < less


def test_the_table_has_a_row_for_each_size() -> None:
    assert len(ROWS) == 3
