"""The result page of `synthetic_text.sh`: what models learn from synthetic text, compared with real text.

    python -m benchmarks.synthetic_text --study STUDY --output benchmarks/results/NAME.md

It reads the results of the generators, the sampling and the comparison, trains the topic classifiers and writes one
page. The data here are public; for private data no epsilon would cover these scores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import tables
from benchmarks.contamination import CONTAMINATION_NAME, Continued
from benchmarks.synthetic_text_data import ABSTRACTS_HELD_OUT, ABSTRACTS_TRAIN
from benchmarks.topic_classifier import Labelled, Score, majority, train_and_test
from dptune.accounting.rounding import rounded_up
from dptune.published import PUBLISH_NAME
from utils.cli.flags import exit_on_invalid_argument, parse
from utils.files.tables import read_rows
from utils.synthetic.arguments import REAL_TRAINING
from utils.synthetic.parts import JSON_NAME
from utils.training.outputs import CONFIG_NAME, REPORT_NAME, RESULTS_NAME

# {job: name given to `evaluate_synthetic` in synthetic_text.sh}
GENERATORS = {"private": "private", "plain": "plain", "untrained": "untrained model"}
DATA = ("chat", "abstracts")
_GENERATOR_HEADER = ["generator", "epsilon", "steps", "held-out loss", "texts", "ended", "kept"]
_PROXY_HEADER = ["trained on", "next-token accuracy", "nats per token", "MAUVE", "copies + long passages"]
_FOLDERS = (Path("outputs"), Path("inference_outputs"))


@dataclass
class StudyArguments:
    """Input and output."""

    study: str = field(metadata={"help": "folder of the study: the first argument of synthetic_text.sh"})
    data: list[str] = field(
        default_factory=lambda: list(DATA), metadata={"help": "the parts that were run", "choices": DATA}
    )
    output: str | None = field(default=None, metadata={"help": "Markdown file for the result; default: only print"})


def read_labelled(path: Path, topic: str, text: str) -> Labelled:
    """Texts with their topics, without blank texts. In samples the topic is the prompt, which ends in a line break."""
    rows = [row for row in read_rows(str(path), "--study") if row[text].strip()]
    return Labelled([row[text] for row in rows], [row[topic].strip() for row in rows])


def topic_rows(real: Labelled, held_out: Labelled, synthetic: Mapping[str, Labelled]) -> list[list[str]]:
    """A row per training set of the classifier; real text also with as many texts as the synthetic sets have."""
    count = max(map(len, synthetic.values()))
    sets = {"real": real, "real, as many as synthetic": real.draw(count, seed=0), **synthetic}
    rows = [_topic_row(name, len(one), train_and_test(one, held_out)) for name, one in sets.items()]
    return [*rows, ["majority topic", "0", f"{majority(held_out):.3f}", "-"]]


def _topic_row(name: str, texts: int, score: Score) -> list[str]:
    return [name, f"{texts:,}", f"{score.accuracy:.3f} ± {score.error:.3f}", f"{score.macro_f1:.3f}"]


def proxy_rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """A row per training set of the small language model: score on held-out text and similarity to real text."""
    rows = []
    for name, score in evaluation["proxy"].items():
        untrained = name not in (*GENERATORS.values(), REAL_TRAINING)
        divergence = evaluation["divergence"].get(name)
        overlap = evaluation.get("overlap", {}).get(name)
        rows.append(
            [
                "nothing" if untrained else name,
                f"{score['accuracy']:.4f} ± {score['accuracy_error']:.4f}",
                f"{score['nats_per_token']:.3f}",
                f"{divergence['mauve']:.3f} ± {divergence['mauve_error']:.3f}" if divergence else "-",
                f"{overlap['copies']} + {overlap['passages'] - overlap['copies']}" if overlap else "-",
            ]
        )
    return rows


def generator_rows(data: str) -> list[list[str]]:
    """A row per generator: its privacy, its loss on held-out text, and counts of its texts."""
    outputs, samples = _FOLDERS
    before = _json(outputs / f"study-{data}-private" / RESULTS_NAME)["eval_loss_before"]
    rows = []
    for job, name in GENERATORS.items():
        folder = outputs / f"study-{data}-{job}"
        report = _json(folder / PUBLISH_NAME / REPORT_NAME) if job == "private" else None
        results = _json(folder / RESULTS_NAME) if job != "untrained" else None
        wrote = _json(samples / f"study-{data}-{job}" / "summary.json")
        rows.append(
            [
                name,
                rounded_up(report["epsilon"], 3) if report else "none",
                f"{results['steps']}" if results else "0",
                f"{results['eval_loss'] if results else before:.3f}",
                f"{wrote['texts']:,}",
                f"{wrote['ended']:,}",
                f"{wrote['kept']:,}" if "kept" in wrote else "-",
            ]
        )
    return rows


def model_name(data: str) -> str:
    """The name of the fine-tuned model, without its path on this machine."""
    config = _json(_FOLDERS[0] / f"study-{data}-private" / CONFIG_NAME)
    return Path(config["model_name_or_path"]).name


def settings_line(data: str) -> str:
    """How the private generator was trained, from its privacy report."""
    report = _json(_FOLDERS[0] / f"study-{data}-private" / PUBLISH_NAME / REPORT_NAME)
    return (
        f"{report['num_examples']:,} training rows; with privacy epsilon {rounded_up(report['epsilon'], 3)} at delta "
        f"{report['delta']:g} ({report['adjacency']}, {report['accountant']}), noise multiplier "
        f"{report['noise_multiplier']}, clip norm {report['clip_norm']:g}, expected batch "
        f"{report['expected_batch_size']}, {report['steps']} steps. Privacy unit: {report['privacy_unit']}."
    )


def chat_parts(study: Path) -> list[str]:
    """The section about chat messages."""
    return [
        "## Chat messages",
        settings_line("chat"),
        tables.markdown(_GENERATOR_HEADER, generator_rows("chat")),
        "A small language model (utils/synthetic/proxy_model.py) trained on each, tested on the held-out messages:",
        tables.markdown(_PROXY_HEADER, proxy_rows(_json(study / "chat" / JSON_NAME))),
    ]


def abstract_parts(study: Path) -> list[str]:
    """The section about abstracts: what a classifier of topics and a small language model learn from each set."""
    samples = {
        name: read_labelled(_FOLDERS[1] / f"study-abstracts-{job}" / "generations.jsonl", "prompt", "text")
        for job, name in GENERATORS.items()
    }
    real = read_labelled(study / ABSTRACTS_TRAIN, "instruction", "answer")
    held_out = read_labelled(study / ABSTRACTS_HELD_OUT, "instruction", "answer")
    return [
        "## Abstracts, by topic",
        settings_line("abstracts"),
        tables.markdown(_GENERATOR_HEADER, generator_rows("abstracts")),
        f"A classifier of {len(set(held_out.topics))} topics (TF-IDF, logistic regression), tested on the first words "
        f"of {len(held_out)} held-out abstracts:",
        tables.markdown(["trained on", "texts", "accuracy", "macro F1"], topic_rows(real, held_out, samples)),
        "The small language model on the same texts:",
        tables.markdown(_PROXY_HEADER, proxy_rows(_json(study / "abstracts" / JSON_NAME))),
        Continued(**_json(study / CONTAMINATION_NAME)).in_words(),
    ]


_PARTS = {"chat": chat_parts, "abstracts": abstract_parts}


def main(args: StudyArguments) -> None:
    """Write the page."""
    sections = [part for data in args.data for part in _PARTS[data](Path(args.study))]
    parts = [
        "# Synthetic text at epsilon 8: what models learn from it",
        tables.machine("benchmarks.synthetic_text", torch.device("cpu"), sys.argv[1:]),
        f"Made by `benchmarks/synthetic_text.sh`: {model_name(args.data[0])} with LoRA, one training and one set of "
        "samples each, without a search for settings. Errors are bootstraps over the held-out texts; they do not "
        "include the variation between trainings.",
        *sections,
    ]
    tables.publish(parts, args.output)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    with exit_on_invalid_argument():
        main(*parse(StudyArguments, description=__doc__))
