"""Train the proxy models of a comparison one after the other; each result is saved, so an interrupted run resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from utils.files.jsonl import write_json
from utils.synthetic.arguments import REAL_TRAINING, UNTRAINED
from utils.synthetic.proxy_model import (
    ProxySettings,
    cut_windows,
    make_model,
    make_tokenizer,
    predict_texts,
    result_name,
    summarise_predictions,
    train_proxy,
)
from utils.synthetic.texts import Comparison

FOLDER_NAME = "proxy_models"
EVALUATION_NOTICE = "Not private: computed on real rows. No epsilon covers it; do not publish it."

Result = dict[str, float]


def train_proxies(
    folder: Path, comparison: Comparison, settings: ProxySettings, max_texts: int
) -> Iterator[tuple[str, Result]]:
    """Train a model on each synthetic sample, and on the training rows if given, and test it on real text.

    Args:
        folder: results are saved in its subfolder `proxy_models` and found again by settings and texts.
        comparison: the samples; the models are tested on both halves of the held-out texts.
        settings: the settings of all models.
        max_texts: maximum number of training rows, the same as for synthetic samples.

    Yields:
        (name, result) for each synthetic sample, REAL_TRAINING, and UNTRAINED (the model before training).
    """
    samples: dict[str, Sequence[str] | None] = {name: one.texts for name, one in comparison.synthetic.items()}
    if comparison.train is not None:
        samples[REAL_TRAINING] = comparison.train.part(0, max_texts).texts
    samples[UNTRAINED] = None
    (folder / FOLDER_NAME).mkdir(parents=True, exist_ok=True)
    for name, texts in samples.items():
        kept = folder / FOLDER_NAME / f"{result_name(settings, texts, comparison.held_out)}.json"
        if not kept.exists():
            result = _train_one(name, texts, comparison.held_out, settings)
            finite = {name: value if math.isfinite(value) else None for name, value in result.items()}
            write_json(kept, {"not_private": EVALUATION_NOTICE, **finite})
        yield name, _read(kept)


def _train_one(name: str, texts: Sequence[str] | None, held_out: Sequence[str], settings: ProxySettings) -> Result:
    """Train on `texts` unless None, and test."""
    tokenizer = make_tokenizer(settings, held_out)
    model = make_model(settings, tokenizer)
    if texts is not None:
        windows = cut_windows(texts, tokenizer, settings.max_length)
        with tqdm(total=settings.steps, desc=f"training on {name}", unit="step", leave=False) as bar:
            train_proxy(model, windows, settings, on_step=bar.update)
    predictions = predict_texts(model, cut_windows(held_out, tokenizer, settings.max_length), settings.batch_size)
    return summarise_predictions(predictions, sum(len(text.encode()) for text in held_out), seed=settings.seed)


def _read(path: Path) -> Result:
    """A saved result without its warning; NaN for a number that was not finite."""
    content: Mapping[str, float | None] = json.loads(path.read_text())
    return {name: math.nan if value is None else value for name, value in content.items() if name != "not_private"}
