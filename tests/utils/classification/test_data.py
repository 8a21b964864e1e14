"""The tasks of the flags: refused before anything is planned if they cannot be trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertModel

from dptune import InvalidArgument
from tests.classifier_settings import PRIVATE, flags, settings
from utils.classification.data import load_tasks
from utils.classification.files import load_classifier_tokenizer


def test_one_checkpoint_is_not_of_several_tasks(bert: Path, glue: Path, tmp_path: Path) -> None:
    line = flags(bert, glue, tmp_path, datasets="sst2 qnli", resume_from_checkpoint="x")
    with pytest.raises(InvalidArgument, match=r"^--resume_from_checkpoint='x': belongs to one task"):
        load_tasks(settings(*line, datasets=()), None)


def test_a_token_without_an_embedding_is_refused_when_the_tasks_are_loaded(
    bert: Path, glue: Path, tmp_path: Path
) -> None:
    given = settings(*flags(bert, glue, tmp_path / "out", **PRIVATE), datasets=())
    tokenizer = load_classifier_tokenizer(str(bert))
    size = len(BertModel.from_pretrained(bert).get_input_embeddings().weight)
    tokenizer.add_tokens([f"word{number}" for number in range(max(0, size - len(tokenizer)))])
    first = (glue / "SST-2" / "train.tsv").read_text().splitlines()[1]
    tokenizer.add_tokens([first.split("\t")[0]])
    with pytest.raises(
        InvalidArgument, match=r"--model_name_or_path=.*training row 1 .*has token \d+ .*but the model has"
    ):
        load_tasks(given, tokenizer)
