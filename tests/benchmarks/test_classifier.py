"""The benchmark of the modes runs, trains the same on both sides, and says which goals were missed."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import classifier
from benchmarks.classifier import Classifier, ClassifierArguments, draws, load, main
from benchmarks.contenders import PLAIN, PRIVATE
from dptune import trainable_parameters
from dptune.step import PrivateStep
from tests.private_sum import NoNoise
from utils.cli.flags import parse

SMALL = ["--shape", "tiny", "--rounds", "2", "--batch", "3", "--block", "6", "--accumulate", "2"]


def arguments(*flags: str) -> ClassifierArguments:
    (args,) = parse(ClassifierArguments, args=[*SMALL, *flags])
    return args


def test_every_mode_asked_for_is_measured_and_written(tmp_path, monkeypatch):
    output = tmp_path / "results" / "classifier.md"
    monkeypatch.setattr(sys, "argv", ["classifier.py", *SMALL])
    main(arguments("--modes", "full", "ia3", "prefix+lora", "--output", str(output)))
    lines = [line for line in output.read_text().splitlines() if line.startswith("| ")]
    rows = {cells[1]: cells for cells in ([cell.strip() for cell in line.split("|")] for line in lines[2:])}
    assert set(rows) == {"full", "ia3", "prefix+lora"}
    assert all(float(cells[5].split()[0]) > 0 for cells in rows.values())
    assert "at most 1.25" in rows["full"][6]
    assert "at most 1.10" in rows["ia3"][6]
    assert "python -m benchmarks.classifier --shape tiny" in output.read_text()


@pytest.mark.parametrize("mode", ["full", "soft-prompt"])
def test_both_sides_train_on_the_same_gradient(mode, monkeypatch):
    """Without noise, and clipped at a norm that no gradient reaches: what is timed is the same work."""
    args = arguments()
    base = load(args)
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    monkeypatch.setattr("dptune.step.GaussianNoise", NoNoise)
    monkeypatch.setattr(classifier, "CLIP_NORM", 1e6)
    (draw, *_) = draws(args, base.config.vocab_size)
    after = {}
    for private in (True, False):
        torch.manual_seed(0)  # the prompt's and the head's start
        side = Classifier(base, mode, args, private=private)
        assert isinstance(side._step, PrivateStep) is private
        side.step(draw)
        side.close()
        after[side.name] = torch.cat([p.detach().flatten() for p in trainable_parameters(side._model)])
    torch.testing.assert_close(after[PRIVATE], after[PLAIN], rtol=1e-4, atol=1e-6)
