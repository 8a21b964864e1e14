"""The rows of a job: read once, and refused before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from dptune import InvalidArgument
from tests.tasks import rows
from utils.models.loading import load_tokenizer
from utils.training.causal_lm.data import require_answers
from utils.training.data_arguments import DataArguments


def test_a_data_cache_is_made_by_a_run_and_read_by_dry_runs_too(
    job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, reused = tmp_path / "cache", "made by an earlier run"
    job(data_cache=cache, dry_run=True)
    assert not cache.exists()
    first = job(data_cache=cache)
    assert reused not in capsys.readouterr().out
    for dry_run in (None, True):
        again = job(data_cache=cache, dry_run=dry_run)
        assert reused in capsys.readouterr().out
        assert again.identity == first.identity
    assert not (tmp_path / "out").exists()
    with pytest.raises(InvalidArgument, match=r"--data_cache=.*made with another --block_size"):
        job(data_cache=cache, block_size=32)


@pytest.mark.parametrize("rows", ["train", "held out"])
def test_a_token_without_an_embedding_is_named_before_the_model_is_loaded(
    rows: str, job: Any, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A chat template writes a token that was added to the tokenizer alone."""
    model = shutil.copytree(tiny_model_dir, tmp_path / "added")
    tokenizer = load_tokenizer(str(model))
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(model)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "many.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 40)
    given = {"train_file": tmp_path / "many.jsonl"} if rows == "train" else {"validation_file": tmp_path / "chat.jsonl"}
    what = "training" if rows == "train" else "held-out"
    with pytest.raises(InvalidArgument, match=rf"{what} example 1 .* has token \d+ \(<\|im_end\|>\), but the model"):
        job(model_name_or_path=model, **given)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instruction": "word " * 60, "answer": "one"}, "within --block_size 48; raise"),
        (
            {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt (secret)", "content": "Hello."}]},
            r"48 \(answers have the role assistant; the file has \(name not shown\), human\); raise",
        ),
    ],
)
def test_training_data_without_an_answer_are_refused_before_the_model_is_loaded(
    row: dict[str, Any], told: str, job: Any, tmp_path: Path
) -> None:
    (tmp_path / "nothing.jsonl").write_text((json.dumps(row) + "\n") * 40)
    with pytest.raises(
        InvalidArgument, match=f"--train_file=.*no training example has an answer token .*{told}"
    ) as caught:
        job(train_file=tmp_path / "nothing.jsonl")
    assert "secret" not in str(caught.value)


def test_held_out_data_without_an_answer_are_refused() -> None:
    data = DataArguments(train_file="rows.jsonl", block_size=48)
    require_answers(None, data)
    require_answers(rows(), data)
    silent = dataclasses.replace(rows(), is_answer=rows().is_answer & False)
    with pytest.raises(InvalidArgument, match=r"^--validation_file='rows.jsonl': .*within --block_size 48"):
        require_answers(silent, data)
