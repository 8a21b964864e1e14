"""scripts/nlg_reddit: two processes, texts and authors, whole model and LoRA, mistakes, jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Model

from dptune import InvalidArgument, accounting
from dptune.adapter_files import attach_adapter
from dptune.integrations.authors import AuthorItems
from dptune.ledger import Ledger
from scripts.nlg_reddit import fine_tune
from tests.coupled_rows import couple_rows
from tests.dptune.integrations.runs import GradientLog, no_noise  # noqa: F401
from tests.reference import clipped_sum, example_gradients, flat
from tests.scripts.nlg_reddit_files import COMMAND_LINE, NOBODYS, SIZES, save_tiny_gpt2, write_corpus
from utils.cli.old_flags import RENAMED
from utils.data.features import RowFeatures

pytestmark = pytest.mark.usefixtures("no_plots")

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "scripts" / "nlg_reddit" / "aml").glob("*-*.yml"))
SEED = 5
NO_PRIVACY = {"disable_dp": True, "noise_multiplier": None, "delta": None}
KNOWN = {one.name for group in fine_tune.GROUPS for one in fields(group)}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts.jsonl")


@pytest.fixture
def line(model_dir: Path, train_file: Path, tmp_path: Path) -> Any:
    """A short command line; None removes a flag, True gives it without a value."""

    def make(**changes: object) -> list[str]:
        settings: dict[str, object] = {
            "output_dir": tmp_path / "run",
            "model_name_or_path": model_dir,
            "train_file": train_file,
            "block_size": 32,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 5,
            "max_steps": 3,
            "noise_multiplier": 1.0,
            "delta": 1e-3,
            "save_strategy": "no",
            "disable_tqdm": "True",
            "logging_steps": 1,
            "ignore_users": True,
        }
        settings |= changes
        words: list[str] = []
        for name, value in settings.items():
            if value is not None:
                words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
        return words

    return make


def authors(**changes: object) -> dict[str, object]:
    settings = {"privacy_level": "author", "author_column": "user", "examples_per_author": 3, "delta": 1e-3}
    return settings | {"ignore_users": None} | changes


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "publish" / "privacy_report.json").read_text())
    return report


def test_the_older_names_of_the_documented_command_line_mean_the_same() -> None:
    older = {"--model_name_or_path": "--model_name", "--block_size": "--sequence_len"}
    older |= {"--clip_norm": "--per_sample_max_grad_norm", "--eval_strategy": "--evaluation_strategy"}
    words = [*COMMAND_LINE.split(), "--train_file", "c.jsonl", "--delta", "1e-3", "--lora_r", "4"]
    older |= {"--delta": "--target_delta", "--lora_r": "--lora_dim"}
    training, *own = fine_tune.read_flags(words)
    by_older_names, *groups = fine_tune.read_flags([older.get(word, word) for word in words])
    assert groups == own
    assert (by_older_names.eval_strategy, by_older_names.max_grad_norm) == (training.eval_strategy, 0.0)


def test_the_documented_command_line_with_two_processes(model_dir: Path, train_file: Path, tmp_path: Path) -> None:
    flags = COMMAND_LINE.replace("--model_name_or_path gpt2", f"--model_name_or_path {model_dir}").split()
    flags += ["--train_file", str(train_file), "--held_out_share", "0.03", "--ignore_users"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (tmp_path / "out.txt").open("w") as output:
        subprocess.run(
            [*command, str(ROOT / "scripts" / "nlg_reddit" / "fine_tune.py"), *flags],
            cwd=tmp_path,  # the script finds the project by itself
            env=environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=300,
            check=False,  # judged by its files: a CPU process group's exit sometimes aborts
        )
    shown = (tmp_path / "out.txt").read_text()
    assert (tmp_path / "scratch" / "publish" / "privacy_report.json").exists(), shown
    report = report_of(tmp_path / "scratch")
    assert (report["guarantee"], report["expected_batch_size"], report["sampled"]) == ("dp", 128, "examples")
    assert 7.9 < report["epsilon"] <= 8
    assert Ledger(tmp_path / "scratch" / "ledger.jsonl").steps == report["steps"] == 4
    assert len(re.findall(r"^held-out loss  ", shown, flags=re.M)) == 1, shown
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "scratch" / "publish")
    assert not torch.equal(trained.lm_head.weight, AutoModelForCausalLM.from_pretrained(model_dir).lm_head.weight)


def test_lora_trains_and_saves_the_adapters_alone(line: Any, tmp_path: Path, model_dir: Path) -> None:
    fine_tune.main(line(lora_r=4, lora_alpha=32, lora_dropout=0.1))
    report = report_of(tmp_path / "run")
    spent = accounting.epsilon(
        noise_multiplier=1.0, sampling_probability=20 / report["num_examples"], steps=3, delta=1e-3
    )
    assert report["epsilon"] == pytest.approx(spent)
    assert not (tmp_path / "run" / "publish" / "config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    attach_adapter(model, tmp_path / "run")
    adapted = model.transformer.h[0].attn.c_attn.lora
    assert (adapted.rank, adapted.alpha) == (4, 32)
    assert adapted.B.weight.any()


def test_without_privacy(line: Any, tmp_path: Path) -> None:
    """Then no row is protected, whoever a column names."""
    fine_tune.main(line(**NO_PRIVACY, ignore_users=None))
    assert report_of(tmp_path / "run")["guarantee"] == "none"
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert (tmp_path / "run" / "publish" / "config.json").exists()


@pytest.mark.parametrize("unread", [{"target_epsilon": 8.0}, {"delta": 1e-7}, {"noise_multiplier": 1.0}])
def test_a_setting_of_privacy_with_disable_dp_is_one_line(unread: dict[str, float], line: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        fine_tune.main(line(**NO_PRIVACY | unread, model_name_or_path="no/where"))
    assert stopped.value.code == 2
    ((name, value),) = unread.items()
    refusal = f"error: --{name}={value!r}: is not read with --disable_dp: leave one of the two out"
    assert capsys.readouterr().err.strip().splitlines()[-1] == refusal


def test_authors_are_drawn_accounted_for_and_reported(line: Any, tmp_path: Path, capsys: Any) -> None:
    fine_tune.main(line(**authors(), held_out_share=0.2, eval_strategy="steps", eval_steps=2))
    report, shown = report_of(tmp_path / "run"), capsys.readouterr().out
    assert report["sampled"] == "authors"
    assert report["num_examples"] < len(SIZES) + NOBODYS
    assert report["privacy_unit"].startswith("one author (all rows with the same value in column user;")
    assert "up to 3 of their examples" in report["method"]
    q = 20 / report["num_examples"]
    assert report["epsilon"] == pytest.approx(
        accounting.epsilon(noise_multiplier=1.0, sampling_probability=q, steps=3, delta=1e-3)
    )
    assert f"authors                {report['num_examples']}" in shown
    assert "held-out loss" in shown


def trainer_of(words: list[str]) -> Any:
    """The Trainer that main() would run, on a model without dropout."""
    training, privacy, model_args, data, _ = fine_tune.read_flags(words)
    tokenizer = fine_tune.load_tokenizer(model_args.model_name_or_path)
    train, held_out = fine_tune.load_corpus(data, tokenizer, model_args.block_size, training.seed)
    torch.manual_seed(0)
    model = fine_tune.prepared_model(model_args)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return fine_tune.make_trainer(
        model, tokenizer, training, privacy, data.unit, train, held_out, max_length=model_args.block_size
    )


def mean_gradients(model: Any, dataset: AuthorItems) -> list[dict[str, torch.Tensor]]:
    """The gradient of each author, by the slow oracle."""
    found = []
    for author in range(len(dataset)):
        rows = example_gradients(model, [(row["input_ids"], row["labels"]) for row in dataset[author]])
        found.append({name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})
    return found


@pytest.mark.usefixtures("no_noise")
def test_an_authors_mean_gradient_is_clipped_as_one(line: Any, tmp_path: Path) -> None:
    """With k as large as the largest author only the draw is random, and here it takes every author."""
    everybody = len(SIZES) + NOBODYS
    gradients: list[Any] = []
    for clip_norm in (0.05, 0.5, 1e3):
        words = line(
            **authors(examples_per_author=max(SIZES)),
            output_dir=tmp_path / str(clip_norm),
            held_out_share=0,
            clip_norm=clip_norm,
            per_device_train_batch_size=everybody,
            gradient_accumulation_steps=1,
            max_steps=1,
            optim="sgd",
            lora_r=2,
        )
        trainer, log = trainer_of(words), GradientLog()
        trainer.add_callback(log)
        gradients = gradients or mean_gradients(trainer.model, trainer.train_dataset)
        expected = clipped_sum(gradients, clip_norm, len(flat(gradients[0])))
        trainer.train()
        torch.testing.assert_close(log.grads[0], expected / everybody, rtol=1e-4, atol=1e-6 * clip_norm)
    norms = [flat(gradient).norm().item() for gradient in gradients]
    assert min(norms) < 0.5 < max(norms)


def test_micro_batches_hold_no_more_rows_than_a_device_takes(line: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(line(**authors(), held_out_share=0, lora_r=2))
    seen: list[tuple[int, int, int, int]] = []
    step = trainer.training_step

    def watch(model: Any, inputs: Any, *rest: Any) -> Any:
        for batch in inputs["micro_batches"]:
            seen.append((len(batch.inputs["labels"]), len(batch.items), batch.units, batch.rows_per_unit))
        return step(model, inputs, *rest)

    monkeypatch.setattr(trainer, "training_step", watch)
    trainer.train()
    assert all(rows == units * k for rows, _, units, k in seen)
    assert {k for *_, k in seen} <= {1, 2, 3}
    assert max(rows for rows, *_ in seen) <= 4
    assert sum(items for _, items, *_ in seen) > 30


@pytest.mark.parametrize("how", [{}, authors(), {"per_device_train_batch_size": 1}])
def test_rows_that_reach_each_other_are_refused_before_a_private_run(
    how: dict[str, object], line: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where they do so at the full length alone, and where a forward pass takes one row."""
    couple_rows(monkeypatch, GPT2Model, width=32)
    with pytest.raises(SystemExit):
        fine_tune.main(line(**how))
    assert "per-example gradients differ from autograd's" in capsys.readouterr().err
    assert not (tmp_path / "run" / "publish" / "privacy_report.json").exists()


def test_help_all_lists_the_flags_of_transformers_too(capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        fine_tune.main(["--help_all"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--adam_beta1" in shown
    assert "--block_size" in shown


def test_a_dry_run_writes_nothing(line: Any, tmp_path: Path, capsys: Any) -> None:
    fine_tune.main(line(dry_run=True))
    shown = capsys.readouterr().out
    assert re.search(r"^epsilon +\d+\.\d+ at delta 0.001$", shown, flags=re.M)
    assert not list(tmp_path.rglob("run/*"))  # the Trainer itself makes the folder


def test_old_names_of_flags_are_taken_with_a_note(line: Any, capsys: Any) -> None:
    words = line(evaluation_strategy="steps", eval_steps=2, no_cuda=True, warmup_ratio=0.5, dry_run=True)
    fine_tune.main(words)
    shown = capsys.readouterr().out
    for old, new in {
        "evaluation_strategy": "eval_strategy",
        "no_cuda": "use_cpu",
        "warmup_ratio": "warmup_steps",
    }.items():
        assert f"note: --{old} is called --{new} now" in shown
    training, *_ = fine_tune.read_flags(words)
    assert (training.eval_strategy, training.use_cpu, training.warmup_steps) == ("steps", True, 0.5)


def test_flags_come_from_a_file_too_also_those_of_transformers(tmp_path: Path) -> None:
    text = "output_dir: out\nmodel_name: m\ntrain_file: a\nlearning-rate: 1e-4\neval_strategy: no\ndisable_dp: true\n"
    text += "delta: 0.1\n"
    (tmp_path / "run.yaml").write_text(text)
    words = ["--config", str(tmp_path / "run.yaml"), "--learning_rate", "0.5"]
    with pytest.raises(InvalidArgument, match=r"^--delta=0.1: "):  # not read without privacy, as on the line
        fine_tune.read_flags(words)
    (tmp_path / "run.yaml").write_text(text.replace("delta: 0.1", "logging_steps: many"))
    with pytest.raises(InvalidArgument, match="logging_steps='many': invalid float value"):
        fine_tune.read_flags(words)
    (tmp_path / "run.yaml").write_text(text.replace("delta: 0.1", ""))
    training, privacy, *_ = fine_tune.read_flags(words)
    assert (training.learning_rate, str(training.eval_strategy.value), privacy.disable_dp) == (0.5, "no", True)


def test_a_run_resumes_with_the_same_bound_on_authors_only(line: Any, tmp_path: Path, capsys: Any) -> None:
    how = authors() | {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": None}
    fine_tune.main(line(**how, num_train_epochs=1))
    (tmp_path / "run" / "publish" / "privacy_report.json").unlink()
    how["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(SystemExit):
        fine_tune.main(line(**how | {"examples_per_author": 2}))
    assert "examples_per_unit was" in capsys.readouterr().err
    (model,) = (tmp_path / "run").glob("publish")
    model.rename(tmp_path / "first")
    fine_tune.main(line(**how))
    assert report_of(tmp_path / "run")["repeated_steps"] == 1


MISTAKES: dict[str, tuple[dict[str, object], str]] = {
    "no corpus": ({"train_file": None}, "--train_file=None: give the texts: JSONL, JSON, CSV or Parquet"),
    "no such file": ({"train_file": "nowhere.jsonl"}, "--train_file='nowhere.jsonl': no such file"),
    "no such column": ({"text_column": "body"}, "--text_column='body': no such column in"),
    "no such author": (authors(author_column="who"), "--author_column='who': no such column in"),
    "people": (
        {"ignore_users": None},
        "names users in user; give --privacy_level author --author_column user, or --ignore_users to protect rows",
    ),
    "people by another name": (
        {"ignore_users": None, "author_column": "text"},
        "names users in text; give --privacy_level author --author_column text, or --ignore_users to protect rows",
    ),
    "no k": (authors(examples_per_author=None), "--examples_per_author=None: --privacy_level author needs it"),
    "k of rows": ({"examples_per_author": 2}, "--examples_per_author=2: belongs to --privacy_level author"),
    "no model": (
        {"model_name_or_path": "nowhere/at-all"},
        "--model_name_or_path='nowhere/at-all': no tokenizer could be loaded",
    ),
    "too long": ({"block_size": 500}, "--block_size=500: the model's context is 128 tokens"),
    "layers": ({"lora_r": 2, "lora_target_modules": "q_proj"}, "--lora_target_modules='q_proj': matches no linear"),
    "dropout": ({"lora_r": 2, "lora_dropout": 1.0}, "--lora_dropout=1.0: give a number of at least 0 and below 1"),
    "clipping": ({"max_grad_norm": 1.0}, "--max_grad_norm=1.0: it clips the sum of a batch"),
    "batch": ({"gradient_accumulation_steps": 90}, "x 4 per device x 1 processes is a batch of 360"),
    "no epsilon": ({"noise_multiplier": None}, "--noise_multiplier=None: give exactly one of"),
    "no evaluation": ({"held_out_share": 0, "eval_strategy": "steps"}, "--eval_strategy="),
    "chooses": (
        {"load_best_model_at_end": "True", "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 500},
        "--load_best_model_at_end=True: depends on the loss on held-out texts, without noise",
    ),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "--lr_scheduler_type="),
    "gone": ({"logging_dir": "logs"}, "--logging_dir='given': transformers no longer has it; set the environment"),
    "unknown": ({"leraning_rate": 1}, "unknown flag: --leraning_rate (did you mean --learning_rate?)"),
    "transformers' own": ({"eval_strategy": "sometimes"}, "'sometimes'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name: str, line: Any, capsys: Any, tmp_path: Path) -> None:
    changes, told = MISTAKES[name]
    with pytest.raises(SystemExit) as exit_:
        fine_tune.main(line(**changes))
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    errors = [one for one in error.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert not list(tmp_path.rglob("run/*"))


def test_rows_of_the_corpus_are_cut_and_end(line: Any) -> None:
    trainer = trainer_of(line(block_size=8, held_out_share=0))
    rows = trainer.train_dataset
    assert isinstance(rows, RowFeatures)
    assert len(rows) == sum(SIZES) + NOBODYS
    assert max(len(row["input_ids"]) for row in (rows[n] for n in range(len(rows)))) == 8
    assert rows[len(rows) - 1] == {"input_ids": [2], "labels": [-100]}  # the empty text: a zero gradient
    ended = [row for row in (rows[n] for n in range(len(rows) - 1)) if len(row["input_ids"]) < 8]
    assert ended
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] and row["input_ids"][-1] == 2 for row in ended)


JOB_KEYS = {
    "$schema", "type", "name", "display_name", "experiment_name", "description", "tags", "command", "code", "inputs",
    "outputs", "environment", "environment_variables", "compute", "resources", "distribution", "limits", "services",
}  # fmt: skip


def test_there_is_a_job_for_each_experiment() -> None:
    names = ["fuft-eps_8", "fuft-no_inf", "peft-eps_8-gpus_1", "peft-eps_8", "peft-no_inf"]
    assert sorted(path.stem for path in JOBS) == sorted(names)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_is_right(path: Path) -> None:
    job = yaml.safe_load(path.read_text())
    assert job.keys() <= JOB_KEYS
    assert (job["type"], job["display_name"]) == ("command", path.stem)
    assert job["$schema"].endswith("/commandJob.schema.json")
    assert (path.parent / job["code"]).resolve() == ROOT
    program, script, *words = job["command"].split()
    assert program == "python"
    assert (ROOT / script).resolve() == Path(fine_tune.__file__).resolve()
    flags = {word[2:] for word in words if word.startswith("--")}
    assert flags <= KNOWN
    names = dict(re.findall(r"\$\{\{(inputs|outputs)\.(\w+)\}\}", job["command"]))
    assert {names["inputs"]} == set(job["inputs"])
    assert {names["outputs"]} == set(job["outputs"])
    processes = job["distribution"]["process_count_per_instance"]
    assert job["distribution"]["type"] == "pytorch"
    assert processes == (1 if "gpus_1" in path.stem else 8)
    replaced = [word.replace("${{inputs.corpus}}", "c.jsonl").replace("${{outputs.run}}", "out") for word in words]
    training, privacy, model_args, data, _ = fine_tune.read_flags(replaced)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * processes == 1024
    assert privacy.disable_dp == ("no_inf" in path.stem)
    assert privacy.disable_dp or privacy.target_epsilon == 8
    assert (model_args.lora_r > 0) == path.stem.startswith("peft")
    assert (training.num_train_epochs, model_args.block_size, data.privacy_level) == (3, 128, "sample")
    assert (path.parent / job["environment"]["conda_file"]).exists()


def test_the_jobs_environment_is_the_pinned_set() -> None:
    environment = yaml.safe_load((ROOT / "scripts" / "nlg_reddit" / "aml" / "environment.yml").read_text())
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert pip == [entry for entry in lines if entry and not entry.startswith("#")]


def test_the_launch_lines_of_the_readme_are_the_tested_one() -> None:
    readme = (ROOT / "scripts" / "nlg_reddit" / "README.md").read_text()
    (shown,) = re.findall(r"fine_tune.py --train_file corpus.jsonl (.*)", readme)
    assert shown == COMMAND_LINE
    assert set(re.findall(r"`--(\w+)", readme)) <= KNOWN | RENAMED.keys() | {"set", "extra"}  # az's and pip's
    assert all(f"`{path.name}`" in readme for path in JOBS)
