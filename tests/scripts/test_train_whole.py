"""`train_clm.py` with --trainable, --clipping and --optimizer, on a tiny model, in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dptune import InvalidArgument
from dptune.run.checkpoint import TRAINED_NAME, load_checkpoint
from tests.tiny import save_tiny
from train_clm import main
from utils.models.trainable import choose_trainable, in_autocast, parameters_by_name
from utils.training.log import read_diagnostics


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "chats.json"
    answers = [f"The cat sat on the mat. A dog ran over hill {number}." for number in range(48)]
    file.write_text(json.dumps({"instruction": ["Tell me something."] * 48, "answer": answers}))
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"), layers=1, hidden=16)


def arguments(base: Path, data: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(base), "--train_file", str(data), "--validation_file", str(data)),
        *("--output_dir", str(folder), "--block_size", "48", "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "4", "--max_train_steps", "4", "--clip_norm", "0.5"),
        *("--noise_multiplier", "0.6", "--delta", "1e-3", "--learning_rate", "2e-3", "--checkpointing_steps", "2"),
        *("--insecure_test_seed", "1"),
        *more,
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


STYLES = {
    "all": ("--trainable", "all"),
    "norms": ("--trainable", "norms", "--optimizer", "dp-adam"),
    "a pattern": ("--trainable", "*.mlp.*", "lm_head.weight", "--optimizer", "sgd", "--momentum", "0.5"),
    "adaptive": (
        "--trainable",
        "all",
        "--clipping",
        "adaptive",
        "--adaptive_count_noise",
        "2",
        "--optimizer",
        "dp-adam",
    ),
    "per layer": ("--trainable", "*.layers.*", "--clipping", "per-layer"),
    "automatic": ("--clipping", "automatic"),
}


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, flags in STYLES.items():
        found[name] = tmp_path_factory.mktemp("run") / "out"
        main(arguments(base, data, found[name], *flags))
    return found


@pytest.mark.parametrize("name", ["all", "norms", "a pattern", "adaptive", "per layer"])
def test_the_whole_model_is_saved_and_only_the_chosen_parameters_changed(
    name: str, runs: dict[str, Path], base: Path
) -> None:
    before, after = weights(base), weights(runs[name] / "publish")
    model = AutoModelForCausalLM.from_pretrained(base)
    patterns = STYLES[name][1 : next((i for i, flag in enumerate(STYLES[name]) if i and flag.startswith("--")), None)]
    chosen = choose_trainable(model, patterns)
    assert {key for key in before if not torch.equal(before[key], after[key])} == set(chosen)
    tokens = [AutoTokenizer.from_pretrained(folder)("A dog ran").input_ids for folder in (base, runs[name] / "publish")]
    assert tokens[0] == tokens[1]
    assert not (runs[name] / "publish" / "lora_weights.bin").exists()
    card = (runs[name] / "publish" / "README.md").read_text()
    assert "fine-tuned copy" in card
    assert 'from_pretrained(".")' in card
    assert "adapter" not in card


@pytest.mark.parametrize("name", STYLES)
def test_the_report_counts_every_step_and_names_the_style(name: str, runs: dict[str, Path]) -> None:
    report = json.loads((runs[name] / "publish" / "privacy_report.json").read_text())
    assert report["steps"] == 4
    assert report["clipping"].startswith(
        {"per layer": "per layer", "adaptive": "adaptive", "automatic": "automatic"}.get(name, "flat")
    )
    lines = [json.loads(line) for line in (runs[name] / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (len({line["clip_norm"] for line in lines}) > 1) == (name == "adaptive")
    assert lines[0]["clip_norm"] == 0.5
    rows = read_diagnostics(runs[name] / "diagnostics.jsonl")
    assert [row["clip_norm"] for row in rows if row["step"]] == [line["clip_norm"] for line in lines]


def test_the_held_out_loss_of_a_whole_model_falls(runs: dict[str, Path]) -> None:
    results = json.loads((runs["all"] / "all_results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"]


@pytest.mark.parametrize("name", ["all", "adaptive", "a pattern"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    name: str, runs: dict[str, Path], base: Path, data: Path, tmp_path: Path
) -> None:
    """From the checkpoint after step 2: weights, optimizer, and an adaptive clip norm."""
    folder = tmp_path / "out"
    shutil.copytree(runs[name], folder)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "publish")
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_text("".join(lines[:2]))
    main([*arguments(base, data, folder, *STYLES[name]), "--resume_from_checkpoint", "latest"])
    whole, resumed = weights(runs[name] / "publish"), weights(folder / "publish")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (folder / "ledger.jsonl").read_text() == "".join(lines)


def test_a_resumed_run_must_train_the_same(runs: dict[str, Path], base: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(runs["all"], folder)
    for flags, named in (
        (("--trainable", "norms"), "trained"),
        (("--trainable", "all", "--clipping", "automatic"), "clipping"),
        (("--trainable", "all", "--optimizer", "sgd"), "optimizer"),
        ((), "adapters"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments(base, data, folder, *flags), "--resume_from_checkpoint", "latest"])
        assert ended.value.code == 2, named


def test_a_checkpoint_of_a_whole_model_holds_what_is_trained(runs: dict[str, Path]) -> None:
    folder = runs["norms"] / "checkpoint-4"
    assert (folder / TRAINED_NAME).exists()
    assert set(load_checkpoint(folder).weights) == {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--trainable", "nothing.*"), "--trainable='nothing.*': matches no parameter"),
        (("--trainable", "all", "--qbits", "8"), "--trainable='all': weights of --qbits 8 cannot be trained"),
        (("--momentum", "0.9"), "--momentum=0.9: belongs to --optimizer sgd"),
        (("--layer_clip_norms", "*=1"), "--layer_clip_norms='*=1': needs --clipping per-layer"),
        (("--clipping", "per-layer", "--layer_clip_norms", "*"), "--layer_clip_norms='*': give PATTERN=NORM"),
        (("--clipping", "per-layer", "--layer_clip_norms", "zz=1"), "matches no trained layer"),
        (("--clipping", "adaptive", "--adaptive_count_noise", "0.2"), "count_noise=0.2: must be above 0.3"),
    ],
)
def test_a_mistake_is_one_line_with_the_flag(
    flags: tuple[str, ...], message: str, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments(base, data, tmp_path / "out", *flags))
    assert ended.value.code == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not (tmp_path / "out").exists()


def test_float16_is_refused_without_privacy(base: Path) -> None:
    from utils.models.trainable import prepare_trainable
    from utils.training.lora_arguments import LoraArguments

    model, whole = AutoModelForCausalLM.from_pretrained(base), LoraArguments(trainable=["all"])
    assert prepare_trainable(model, whole, dtype=torch.float16)
    with pytest.raises(
        InvalidArgument, match=r"--trainable='all': without privacy .* set mixed_precision to bf16 or no"
    ):
        prepare_trainable(model, whole, dtype=torch.float16, private=False)


def test_a_choice_leaves_the_rest_frozen_and_copies_are_copies(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    names = choose_trainable(model, ["*.self_attn.q_proj.weight", "norms"])
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 4
    kept = parameters_by_name(model, names)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert kept["model.norm.weight"].all()


def test_autocast_computes_in_bfloat16_from_float32_weights(base: Path) -> None:
    model, seen = AutoModelForCausalLM.from_pretrained(base), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))

    def losses(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids).logits.float().mean((1, 2))

    cast = in_autocast(losses, torch.bfloat16, torch.device("cpu"))
    assert in_autocast(losses, torch.float32, torch.device("cpu")) is losses
    cast(torch.ones(1, 3, dtype=torch.long))
    cast(ids=torch.ones(1, 3, dtype=torch.long))  # as the training loops call it
    assert seen == [torch.bfloat16] * 2
    assert model.model.norm.weight.dtype == torch.float32
