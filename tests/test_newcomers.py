"""The mistakes of newcomers, over all programs: each is one line with name, value and remedy, and nothing is written.

docs/troubleshooting.md quotes some of these lines; a test compares the two.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

import inference_generation_dataset
import inference_generation_instruction
import train_classifier
import train_clm
from dptune import add_lora, save_adapter
from dptune.accounting import __main__ as table
from scripts import compare_modes, generate_train_command, look, plan, resample_with_dp_histogram
from tests.tiny import save_tiny, tiny_llama
from utils.cli.flags import exit_on_invalid_argument, parse

ROOT = Path(__file__).resolve().parents[1]
TABLE = "## It does not start"  # of docs/troubleshooting.md


def guarded(module: ModuleType, groups: Sequence[type], flags: dict[str, str]) -> Callable[[list[str]], object]:
    """`main(argv)` as the module's last lines call it."""
    return lambda argv: exit_on_invalid_argument(*groups, flags=flags)(module.main)(argv)


def sampling(module: ModuleType) -> Callable[[list[str]], object]:
    """The same for a program whose `main` takes the parsed flags."""

    def main(argv: list[str]) -> None:
        with exit_on_invalid_argument(*module.GROUPS, flags=module.SAMPLING_FLAGS):
            module.main(*parse(*module.GROUPS, args=argv))

    return main


PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "train": train_clm.main,
    "classify": train_classifier.main,
    "sample": sampling(inference_generation_instruction),
    "sample rows": sampling(inference_generation_dataset),
    "generator": guarded(generate_train_command, [generate_train_command.JobArguments], generate_train_command.FLAGS),
    "compare": guarded(compare_modes, compare_modes.GROUPS, compare_modes.FLAGS),
    "resample": resample_with_dp_histogram.main,
    "look": look.main,
    "epsilon": table.main,
    "plan": plan.main,
}
# A line without a mistake: the flags of a case replace or (None) remove some of these.
RIGHT: dict[str, str] = {
    "train": "--model_name_or_path model --train_file rows.jsonl --output_dir out --block_size 32 --lora_r 2 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_train_steps 2 --noise_multiplier 1",
    "classify": "--model_name_or_path model --train_file labels.csv --text_columns sentence --output_dir out "
    "--block_size 16 --batch_size 8",
    "sample": "--model_name_or_path model --instruction_file questions.txt --output_dir out --max_length 32",
    "sample rows": "--model_name_or_path model --dataset_name pubmed_generation --output_dir out --max_length 32",
    "generator": "--dataset_name rows --data_dir . --model_name_or_path model --job_sess job --target_epsilon 8 "
    "--total_bs 8",
    "compare": "--model_name_or_path model --output_dir out",
    "resample": "--real_file rows.jsonl --synthetic_file rows.jsonl --output_dir out",
    "look": "--train_file rows.jsonl --model_name_or_path model",
    "epsilon": "--num_examples 1000 --batch_size 10 --epochs 1 --target_epsilon 8",
    "plan": "--num_examples 1000 --tokens_per_example 20 --model_name_or_path model --hours 1 --target_epsilon 8 "
    "--tokens_per_second 1000",
}
EPSILON = {"noise_multiplier": None}
USERS = "names users in user; give --privacy_unit user, or --ignore_users to protect rows"
NO_MODEL = "no model could be loaded"
OTHER_MODEL = (
    "the file's adapter is 16 -> 16, the layer 32 -> 32: it belongs to another model; give that model, or an adapter "
    "of this one"
)
LOADING = re.compile(r"\rLoading weights: [^\n]*\n?")  # transformers' progress bar
Changes = dict[str, str | None]
# what went wrong: (program, flags that are changed, the line after `error: `, or how it begins if it ends in ...)
MISTAKES: dict[str, tuple[str, Changes, str]] = {
    "no data": (
        "train",
        {"train_file": None},
        "--train_file=None: give exactly one of --train_file and --dataset_name",
    ),
    "no such file": (
        "train",
        {"train_file": "my.jsonl"},
        "--train_file='my.jsonl': no such file or folder; check the path",
    ),
    "misspelt flag": (
        "train",
        {"learning_rat": "1e-3"},
        "unknown flag: --learning_rat (did you mean --learning_rate?) (--help lists the flags)",
    ),
    "another tool's flag": (
        "train",
        {"lora_rank": "8"},
        "unknown flag: --lora_rank (did you mean --lora_r?) (--help lists the flags)",
    ),
    "DeepSpeed": ("train", {"deepspeed": "ds.json"}, "--deepspeed: DeepSpeed adds up gradients itself, before ..."),
    "a word for a number": (
        "train",
        {"learning_rate": "high"},
        "argument --learning_rate/--learning-rate: invalid float value: 'high' (--help lists the flags)",
    ),
    "noise and epsilon": (
        "train",
        {"target_epsilon": "8"},
        "--target_epsilon=8.0: give it or the noise multiplier, not both",
    ),
    "neither noise nor epsilon": (
        "train",
        EPSILON,
        "--noise_multiplier=None: give exactly one of the noise multiplier and the target epsilon",
    ),
    "epsilon 0": (
        "train",
        EPSILON | {"target_epsilon": "0"},
        "--target_epsilon=0.0: give a finite number above 0; to train without privacy, give --clip_norm -1 "
        "--noise_multiplier -1",
    ),
    "no noise": (
        "train",
        {"noise_multiplier": "0"},
        "--noise_multiplier=0.0: give a finite number above 0; to train without privacy, give --clip_norm -1 "
        "--noise_multiplier -1",
    ),
    "negative epsilon": (
        "train",
        EPSILON | {"target_epsilon": "-3"},
        "--target_epsilon=-3.0: give a finite number above 0; to train without privacy, give --clip_norm -1 "
        "--noise_multiplier -1",
    ),
    "delta too large": (
        "train",
        {"delta": "0.5"},
        "--delta=0.5: must be below 1/num_examples = 0.025; a tenth of that is usual",
    ),
    "batch larger than the data": (
        "train",
        {"gradient_accumulation_steps": "100"},
        "--gradient_accumulation_steps=100: x 4 per device x 1 processes is a batch of 400, more than the 40 examples "
        "there are (a sampling probability above 1); lower it",
    ),
    "clip norm 0": ("train", {"clip_norm": "0"}, "--clip_norm=0.0: give a finite number above 0"),
    "half without privacy": (
        "train",
        {"clip_norm": "-1"},
        "--noise_multiplier=1.0: --clip_norm is -1; make both positive, or both -1 to train without privacy",
    ),
    "clipping of a whole step": (
        "train",
        {"max_grad_norm": "1"},
        "--max_grad_norm=1.0: is for runs without privacy: a private one limits each gradient before the sum; give "
        "--clip_norm",
    ),
    "no such model": ("train", {"model_name_or_path": "nowhere"}, f"--model_name_or_path='nowhere': {NO_MODEL} ..."),
    "model without tokenizer": (
        "train",
        {"model_name_or_path": "untokenized"},
        "--model_name_or_path='untokenized': no tokenizer could be loaded ...",
    ),
    "unknown columns": (
        "train",
        {"train_file": "odd.csv"},
        "--train_file='odd.csv': found the columns foo, bar; name ...",
    ),
    "no such column": (
        "train",
        {"text_column": "txt"},
        "--text_column='txt': no such column in rows.jsonl, which has instruction, answer; name one of them",
    ),
    "people without a unit": ("train", {"train_file": "users.jsonl"}, f"--train_file='users.jsonl': {USERS}"),
    "people without a bound": (
        "train",
        {"train_file": "users.jsonl", "privacy_unit": "user"},
        "--examples_per_unit=None: give the maximum examples per author, which --privacy_unit needs",
    ),
    "a folder that holds a run": (
        "train",
        {"output_dir": "begun"},
        "--output_dir='begun': holds a run already (ledger.jsonl); give another folder or move it away",
    ),
    "nothing to resume": (
        "train",
        {"output_dir": "begun", "resume_from_checkpoint": "latest"},
        "--resume_from_checkpoint='latest': a run started there but saved no checkpoint; give a new --output_dir",
    ),
    "block size 0": ("train", {"block_size": "0"}, "--block_size=0: give a whole number of at least 2"),
    "block size beyond the context": (
        "train",
        {"block_size": "100000"},
        "--block_size=100000: the model's context is 256 tokens; give at most 256",
    ),
    "no such layer": (
        "train",
        {"lora_target_modules": "c_attn"},
        "--lora_target_modules='c_attn': matches no linear layer; the model has: down_proj, gate_proj, ...",
    ),
    "empty file": (
        "train",
        {"train_file": "empty.jsonl"},
        "--train_file='empty.jsonl': is empty; give a file with at least one row",
    ),
    "broken JSON": (
        "train",
        {"train_file": "broken.jsonl"},
        "--train_file='broken.jsonl': line 2 is not JSON (Expecting value); put one whole JSON object on each line",
    ),
    "chat without a template": (
        "train",
        {"prompt_style": "chat", "model_name_or_path": "untemplated"},
        "--prompt_style='chat': this tokenizer has no chat template; give plain, or use a chat model",
    ),
    "YAML with a wrong key": (
        "train",
        {"config": "wrong.yaml"},
        "--config='wrong.yaml': unknown key: learning_rat (did you mean learning_rate?); --help lists the flags, whose "
        "names are the keys",
    ),
    "no such YAML file": (
        "train",
        {"config": "my.yaml"},
        "--config='my.yaml': cannot be read (No such file or directory); give a YAML file of flags",
    ),
    "an adapter of unknown data": (
        "train",
        {"initial_adapter": "adapter", "lora_r": None},
        "--initial_adapter='adapter': no privacy report with a guarantee lies beside it, so epsilon would not ...",
    ),
    "an adapter of another model": (
        "train",
        {"initial_adapter": "adapter", "lora_r": None, "initial_adapter_is_public": "true"},
        f"--initial_adapter='model.layers.0.self_attn.q_proj': {OTHER_MODEL}",
    ),
    "sampling from an adapter of another model": (
        "sample",
        {"lora_weights_path": "adapter"},
        f"--lora_weights_path='model.layers.0.self_attn.q_proj': {OTHER_MODEL}",
    ),
    "no such task": (
        "classify",
        {"datasets": "sst3", "train_file": None, "text_columns": None},
        "--datasets='sst3': give one of sst2, qnli, qqp, mnli, or --train_file for your own data",
    ),
    "two names of one flag": (
        "classify",
        {"clip_norm": "1", "max_grad_norm": "1"},
        "--clip_norm: is given as --clip_norm and as --max_grad_norm; leave one out",
    ),
    "epsilon without --enable_dp": (
        "classify",
        {"target_epsilon": "8"},
        "--target_epsilon=8.0: is not read without --enable_dp: give that too, or leave it out",
    ),
    "no column of texts": (
        "classify",
        {"text_columns": None},
        "--text_columns=None: --train_file needs it: give the column of the texts, or two for pairs",
    ),
    "no such label": (
        "classify",
        {"label_column": "class"},
        "--label_column='class': no such column in labels.csv, which has sentence, label; give one of them",
    ),
    "large batch of a classifier": (
        "classify",
        {"batch_size": "1000"},
        "--batch_size=1000: labels has 40 training examples; give at most that",
    ),
    "no instructions": (
        "sample",
        {"instruction_file": "my.txt"},
        "--instruction_file='my.txt': cannot be read (FileNotFoundError); give a text file in UTF-8",
    ),
    "no adapter": (
        "sample",
        {"lora_weights_path": "out"},
        "--lora_weights_path='out': no adapter there; give a lora_weights.bin file or a PEFT folder",
    ),
    "a server without address": (
        "sample",
        {"backend": "vllm"},
        "--backend='vllm': needs --vllm_url, such as http://localhost:8000/v1",
    ),
    "another tool's flag in sampling": (
        "sample rows",
        {"max_new_tokens": "5"},
        "unknown flag: --max_new_tokens (did you mean --max_length?) (--help lists the flags)",
    ),
    "no such data set": (
        "generator",
        {"dataset_name": "chats"},
        "--dataset_name='chats': no such file or folder in .; put it there",
    ),
    "large batch of a generator": (
        "generator",
        {"total_bs": "4096"},
        "--total_bs=4096: rows has 40 examples to train on; give at most that",
    ),
    "no such mode": ("compare", {"modes": "lorra"}, "--modes='lorra': give some of full, ..."),
    "people in a histogram": ("resample", {"real_file": "users.jsonl"}, f"--real_file='users.jsonl': {USERS}"),
    "a look at no file": (
        "look",
        {"train_file": "my.jsonl"},
        "--train_file='my.jsonl': no such file or folder; check the path",
    ),
    "a table with a large batch": (
        "epsilon",
        {"batch_size": "5000"},
        "--batch_size=5000: must be at most the 1000 examples there are",
    ),
    "a plan without a speed": (
        "plan",
        {"tokens_per_second": None},
        "--tokens_per_second=None: the speed is needed; give what you measured, or --for_device for an estimate",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data, right and wrong."""
    folder = tmp_path_factory.mktemp("newcomer")
    model = save_tiny(folder / "model")
    shutil.copytree(model, folder / "untokenized", ignore=shutil.ignore_patterns("*token*"))
    shutil.copytree(model, folder / "untemplated")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    (folder / "untemplated" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder / "untemplated")
    rows = [{"instruction": f"question {n}", "answer": f"answer {n}"} for n in range(40)]
    lines = {
        "rows.jsonl": [json.dumps(row) for row in rows],
        "users.jsonl": [json.dumps(row | {"user": f"u{n % 5}"}) for n, row in enumerate(rows)],
        "empty.jsonl": [],
        "broken.jsonl": [json.dumps(rows[0]), '{"instruction": '],
        "odd.csv": ["foo,bar", "1,2"],
        "labels.csv": ["sentence,label", *(f"s {n},{n % 2}" for n in range(40))],
        "questions.txt": ["Hello?"],
        "wrong.yaml": ["learning_rat: 1e-3"],
        "begun/ledger.jsonl": [json.dumps({"step": 1, "noise_multiplier": 0.5, "sampling_probability": 0.1})],
    }
    (folder / "begun").mkdir()
    for name, text in lines.items():
        (folder / name).write_text("".join(f"{line}\n" for line in text))
    other = tiny_llama(hidden=16)
    add_lora(other, rank=2, targets=["q_proj"])
    (folder / "adapter").mkdir()
    save_adapter(other, folder / "adapter", base_model="another")
    return folder


def words_of(program: str, changes: Changes) -> list[str]:
    right = RIGHT[program].split()
    flags = dict(zip((word.removeprefix("--") for word in right[::2]), right[1::2], strict=True)) | changes
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", value)]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, changes, expected = MISTAKES[mistake]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[program](words_of(program, changes))
    error = LOADING.sub("", capsys.readouterr().err)
    assert ended.value.code == 2
    assert re.fullmatch("error: [^\n]*\n", error), error
    told = error.removeprefix("error: ").rstrip("\n")
    assert told.startswith(expected.removesuffix("...").rstrip()) if expected.endswith("...") else told == expected
    after = sorted(folder.rglob("*"))
    assert [path for path in after if path not in before and path.name != "out" and path.name != ".lock"] == []


def test_the_page_quotes_these_lines() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition(TABLE)[2].partition("\n## ")[0]
    quoted = re.findall(r"^\| `error: (.*?)`", table, re.MULTILINE)
    assert len(quoted) >= 12
    lines = [line.removesuffix("...").rstrip() for _, _, line in MISTAKES.values()]
    assert [one for one in quoted if not any(one.removesuffix("...").rstrip() in line for line in lines)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the mistake is a flag for a GPU on a machine without one")
def test_an_attention_for_gpus_is_one_line_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        train_clm.main(words_of("train", {"attn_implementation": "flash_attention_2"}))
    assert ended.value.code == 2
    assert re.match("error: --attn_implementation='flash_attention_2': [^\n]*\n", capsys.readouterr().err)
