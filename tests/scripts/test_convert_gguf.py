"""scripts/convert_gguf.py writes a model that train_clm.py and sampling take; and both take the file itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts import convert_gguf
from tests.gguf_files import save_gguf
from tests.tiny import CORPUS
from train_clm import main as train

pytestmark = pytest.mark.usefixtures("no_plots")


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        convert_gguf.main(words)
    assert ended.value.code == 2
    *_, told = capsys.readouterr().err.splitlines()
    return told


def test_a_training_on_the_file_is_the_training_on_what_it_converts_to(tmp_path: Path) -> None:
    file, folder = save_gguf(tmp_path / "tiny.gguf"), tmp_path / "converted"
    convert_gguf.main([str(file), "--output_dir", str(folder)])
    rows = tmp_path / "rows.csv"
    rows.write_text("\n".join(["instruction,answer", *(f'"{text}","{text}"' for text in CORPUS * 4)]))
    weights = {}
    for name, model in {"of_file": file, "of_folder": folder}.items():
        words = ["--model_name_or_path", model, "--train_file", rows, "--output_dir", tmp_path / name]
        words += ["--block_size", 32, "--per_device_train_batch_size", 10, "--gradient_accumulation_steps", 1]
        words += ["--max_train_steps", 2, "--noise_multiplier", 1, "--delta", 1e-3, "--lora_r", 2]
        train([str(word) for word in [*words, "--insecure_test_seed", 1]])
        weights[name] = torch.load(tmp_path / name / "publish" / "lora_weights.bin", weights_only=True)
    for name, weight in weights["of_file"].items():
        assert torch.equal(weight, weights["of_folder"][name])
    config = json.loads((tmp_path / "of_file" / "publish" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)


def test_the_data_type_can_be_chosen(tmp_path: Path) -> None:
    save_gguf(tmp_path / "tiny.gguf")
    convert_gguf.main([str(tmp_path), "--output_dir", str(tmp_path / "small"), "--dtype", "bfloat16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, target = tmp_path / "damaged.gguf", str(tmp_path / "converted")
    damaged.write_text("no model")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert f"GGUF_FILE='{damaged}': no model could be loaded" in refused([str(damaged), "--output_dir", target], capsys)
    told = refused([str(tmp_path / "empty"), "--output_dir", target], capsys)
    assert "is neither a GGUF file nor a folder that holds one" in told
    assert "is there already" in refused([str(damaged), "--output_dir", str(tmp_path)], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"damaged.gguf", "empty"}
