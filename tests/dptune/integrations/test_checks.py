"""Settings of transformers' Trainer that break the guarantee are refused, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dptune import InvalidArgument
from dptune.integrations import checks
from dptune.integrations.checks import (
    refuse_unsafe_arguments,
    refuse_unsafe_shards,
    require_public_choices,
    rounds_by_shape,
)
from tests.dptune.integrations.runs import data, dp_trainer, privacy_arguments, training_arguments
from tests.tiny import tiny_llama


@pytest.fixture
def args(tmp_path: Path) -> Any:
    return training_arguments(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(
            ("max_grad_norm", 1.0),
            ("max_grad_norm", 0.1),
            ("label_smoothing_factor", 0.1),
            ("neftune_noise_alpha", 5.0),
        ),
        *(("fp16", True), ("push_to_hub", True), ("auto_find_batch_size", True), ("torch_compile", True)),
        *(("use_liger_kernel", True), ("fsdp", "full_shard"), ("deepspeed", "config.json")),
        *(("parallelism_config", "any"), ("include_num_input_tokens_seen", "all"), ("n_gpu", 2)),
        *(("train_sampling_strategy", "group_by_length"), ("optim", "lomo"), ("optim", "galore_adamw_layerwise")),
    ],
)
def test_what_breaks_it_is_refused_by_name(argument: str, value: Any, args: Any) -> None:
    refuse_unsafe_arguments(args)
    stand_in: Any = type("Arguments", (), {**vars(args), "world_size": args.world_size, argument: value})
    with pytest.raises(InvalidArgument, match=rf"^--{argument}='?{value}'?: "):
        refuse_unsafe_arguments(stand_in)


def test_transformers_own_default_of_clipping_is_refused(tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(InvalidArgument, match=r"^--max_grad_norm=1\.0: .*give 0"):
        refuse_unsafe_arguments(args)


def test_processes_that_do_not_see_each_other_are_refused(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(args.world_size + 1))
    with pytest.raises(InvalidArgument, match=r"^--use_cpu="):
        refuse_unsafe_arguments(args)


def test_less_than_float32_anywhere_rounds_by_shape(args: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(layers=1)
    assert not rounds_by_shape(model, args)
    assert not rounds_by_shape(tiny_llama(layers=1).double(), args)
    assert rounds_by_shape(model, training_arguments(tmp_path, bf16=True))
    assert rounds_by_shape(model, type("Arguments", (), {**vars(args), "tf32": True})())
    for backend, precision in ((torch.backends.cuda, "tf32"), (torch.backends.mkldnn, "bf16")):
        before = backend.matmul.fp32_precision
        backend.matmul.fp32_precision = precision
        try:
            assert rounds_by_shape(model, args)
        finally:
            backend.matmul.fp32_precision = before
    with torch.autocast("cpu"):
        assert rounds_by_shape(model, args)
    assert not rounds_by_shape(model, args)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert rounds_by_shape(model, args)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    next(model.parameters()).data = next(model.parameters()).data.bfloat16()
    assert rounds_by_shape(model, args), "one layer is enough"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("load_best_model_at_end", True),
        ("save_only_model", True),
        ("save_on_each_node", True),
        ("enable_jit_checkpoint", True),
        ("fp16_full_eval", True),
        ("bf16_full_eval", True),
        ("accelerator_config", type("Config", (), {"even_batches": False, "__repr__": lambda _: "uneven"})()),
    ],
)
def test_what_does_not_go_with_sharded_weights_is_refused_by_name(
    argument: str, value: Any, args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(layers=1)
    stand_in: Any = type("Arguments", (), {**vars(args), "world_size": 1, "device": args.device, argument: value})
    refuse_unsafe_shards(model, stand_in)  # nothing is sharded
    for name in ("holds_shards", "are_sharded", "is_sharded"):
        monkeypatch.setattr(checks, name, lambda _: True)
    monkeypatch.setattr(checks, "mesh_of", lambda _: type("Mesh", (), {"size": lambda _: 1})())
    refuse_unsafe_shards(model, args)
    with pytest.raises(InvalidArgument, match=rf"^--{argument}="):
        refuse_unsafe_shards(model, stand_in)


def test_shards_that_are_kept_elsewhere_are_refused(args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards on the CPU, processes that compute on GPUs could not gather a checkpoint or the model."""
    for name in ("holds_shards", "are_sharded", "is_sharded"):
        monkeypatch.setattr(checks, name, lambda _: True)
    monkeypatch.setattr(checks, "mesh_of", lambda _: type("Mesh", (), {"size": lambda _: 1})())
    on_gpu: Any = type("Arguments", (), {**vars(args), "world_size": 1, "device": torch.device("cuda")})
    with pytest.raises(InvalidArgument, match=r"keeps its shards on cpu, .* shard it without cpu_offload"):
        refuse_unsafe_shards(tiny_llama(layers=1), on_gpu)


@pytest.mark.parametrize("ranks", [2, None])
def test_a_model_that_is_not_sharded_over_all_processes_is_refused(
    ranks: int | None, args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("holds_shards", "are_sharded"):
        monkeypatch.setattr(checks, name, lambda _: True)
    if ranks is not None:
        monkeypatch.setattr(checks, "is_sharded", lambda _: True)
        monkeypatch.setattr(checks, "mesh_of", lambda _: type("Mesh", (), {"size": lambda _: ranks})())
    with pytest.raises(InvalidArgument, match=r"^model=LlamaForCausalLM: is sharded in another way"):
        refuse_unsafe_shards(tiny_llama(layers=1), args)


EVALUATES: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
STOPPING = transformers.EarlyStoppingCallback(1)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"load_best_model_at_end": True}, "--load_best_model_at_end"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type"),
        ({"callbacks": [STOPPING]}, "callbacks"),
    ],
)
def test_losses_without_noise_decide_nothing_unless_their_rows_are_called_public(
    given: dict[str, Any], name: str, tmp_path: Path
) -> None:
    rows = data(5, seed=9)
    trainer = dp_trainer(tmp_path, **EVALUATES, **given, eval_dataset=rows)
    with pytest.raises(InvalidArgument, match=rf"^{name}=.*: the losses of the evaluation rows have no noise: give "):
        trainer.train()
    assert not (tmp_path / "ledger.jsonl").exists()
    known = {"train_dataset": trainer.train_dataset, "callbacks": trainer.callback_handler.callbacks}
    public = privacy_arguments(validation_is_public=True)
    require_public_choices(trainer.args, public, eval_dataset=rows, **known)
    require_public_choices(trainer.args, privacy_arguments(disable_dp=True), eval_dataset=rows, **known)
    with pytest.raises(InvalidArgument, match=rf"^{name}=.*: would follow the losses of the training rows"):
        require_public_choices(trainer.args, public, eval_dataset=trainer.train_dataset, **known)
