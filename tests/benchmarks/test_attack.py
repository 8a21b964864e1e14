"""Both trainings differ in privacy alone, and the table has what the attacks wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import attack
from utils.attacks.copied import compare_copies
from utils.attacks.exposure import Exposure
from utils.attacks.membership import LOSS, START
from utils.attacks.report import as_json
from utils.attacks.results import ROWS, Findings, FoundSecret, Membership

PLAIN, PRIVATE = ["--clip_norm", "-1", "--noise_multiplier", "-1"], ["--clip_norm", "1", "--target_epsilon", "1.0"]


def findings() -> Findings:
    generator = np.random.default_rng(0)
    scores = ({name: generator.normal(size=count) for name in (LOSS, START)} for count in (10, 200))
    secrets = [FoundSecret(times, Exposure(rank, 1001), Exposure(500, 1001)) for times, rank in ((4, 1), (0, 77))]
    pair = (1.0, 1e-4)
    return Findings(
        *pair, (pair,), "a row", [Membership(ROWS, *scores)], 0, secrets, compare_copies(["a"], ["a"], ["b"])
    )


def test_the_same_rows_train_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(50)))
    trained: list[list[str]] = []
    seen: list[list[str]] = []

    def run(words: Sequence[str], folder: Path, *, ok: Sequence[int]) -> None:
        if words[1] == "train_clm":
            assert tuple(ok) == (0,)
            trained.append(list(words))
            seen.append([json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()])
            held_out = {json.loads(line)["text"] for line in (folder / "held_out.jsonl").read_text().splitlines()}
            assert len(held_out) == 30
            assert not held_out & set(seen[-1])
            return
        output = Path(words[2]) / "attack"
        output.mkdir(parents=True)
        (output / "attack.json").write_text(json.dumps(as_json(findings())))

    monkeypatch.setattr(attack, "_run", run)
    line = ["--model_name_or_path", "model", "--train_file", rows, "--rows", 20, "--held_out", 30]
    attack.main([str(word) for word in [*line, "--output", tmp_path / "result.md"]])
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 21, "twenty rows and the sentence with the secret, in four rows"
    assert len(seen[0]) == 24
    plain, private = ([word for word in words if "/run" not in word] for words in trained)
    assert "".join(plain).replace("".join(PLAIN), "".join(PRIVATE)) == "".join(private)
    told = (tmp_path / "result.md").read_text()
    assert "|  | without privacy | epsilon 1 |" in told
    assert "| planted secret: rank | 1 of 1,001 | 1 of 1,001 |" in told
    assert "| most that epsilon allows at 1% false alarms | 2.73% | 2.73% |" in told
    assert "| loss: caught at 0.1% false alarms | - | - |" in told
