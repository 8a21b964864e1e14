"""A private Trainer leaves a folder that loads with the standard libraries and passes the check."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune import add_lora
from dptune.integrations.arguments import TrainingArguments
from dptune.integrations.privacy_arguments import PrivacyArguments
from dptune.integrations.publishing import publish_run, with_recipe
from dptune.report.check import check_publishable
from dptune.report.fields import CardFields
from dptune.run.session import PrivateRun
from tests.tasks import plan
from tests.tiny import save_tiny, tiny_tokenizer

IDS = torch.arange(3, 9)[None]


def ended_run(folder: Path, model: nn.Module) -> PrivateRun:
    """A private run with one step in its ledger."""
    run = PrivateRun(plan(steps=1, test_seed=None), folder)
    run.prepare(model)
    with run:
        assert run.ledger is not None
        run.ledger.record(noise_multiplier=1.0, sampling_probability=0.5, clip_norm=0.5)
        run._completed_before = 1
    return run


def adapted(model: Any) -> Any:
    add_lora(model, rank=2, alpha=4, targets=["q_proj"])
    return model


def in_peft(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("make", [adapted, in_peft, lambda model: model])
def test_the_model_loads_from_the_folder(make: Any, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    torch.manual_seed(1)
    model = make(AutoModelForCausalLM.from_pretrained(base))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    run = ended_run(tmp_path / "run", model)
    lines = publish_run(run, model, CardFields(recipe="train.py"), tiny_tokenizer())
    folder = tmp_path / "run" / "publish"
    assert lines[-1] == f"to publish             {folder}"
    is_whole = (folder / "config.json").exists()
    load = AutoModelForCausalLM if is_whole else AutoPeftModelForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(load.from_pretrained(folder)(IDS).logits, model.eval()(IDS).logits)
    assert AutoTokenizer.from_pretrained(folder)("A dog").input_ids == tiny_tokenizer()("A dog").input_ids
    publish_run(run, model, CardFields("ann/base", recipe="train.py"), tiny_tokenizer())
    assert check_publishable(folder).steps == 1
    card = (folder / "README.md").read_text()
    assert "\ntrain.py\n" in card
    assert 'base_model: "ann/base"' in card
    for path in folder.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    if not is_whole:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "ann/base"


@pytest.mark.usefixtures("no_plots")
def test_a_module_that_transformers_does_not_know_is_saved_as_its_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    publish_run(ended_run(tmp_path, model), model, CardFields())
    assert check_publishable(tmp_path / "publish").guarantee == "dp"
    assert "fine-tuned copy of `Linear`" in (tmp_path / "publish" / "README.md").read_text()


def test_the_recipe_names_what_decides_the_result_and_no_path(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, max_steps=7, use_cpu=True, report_to=[])
    recipe = with_recipe(CardFields(), args, PrivacyArguments(target_epsilon=8.0, delta=1e-7, noise_bands="4")).recipe
    assert recipe is not None
    assert str(tmp_path) not in recipe
    told = " ".join(recipe.replace("\\\n", " ").split())
    assert told.startswith("torchrun --nproc_per_node 1 YOUR_SCRIPT.py --")
    for words in (
        "--learning_rate 0.001 ",
        "--max_steps 7 ",
        "--target_epsilon 8.0",
        "--clip_norm 1.0",
        "--delta 1e-07",
        "--noise_bands 4",
    ):
        assert words in f"{told} "
    assert "--num_train_epochs" not in told
    open_recipe = with_recipe(CardFields(), args, PrivacyArguments(disable_dp=True)).recipe
    assert open_recipe is not None
    assert "--disable_dp" in open_recipe
    assert "delta" not in open_recipe
    args = SimpleNamespace()
    assert with_recipe(CardFields(recipe="mine"), args, PrivacyArguments(noise_multiplier=1)).recipe == "mine"
