"""Train on synthetic text, test on real text: how much language a small model learns from a sample of texts.

One model is trained per sample, each from the same weights with the same number of steps, so that only the text
differs. The default is a Llama with one layer and half a million parameters. In half a minute on one core it learns to
predict a sixth of the tokens of medical abstracts (vocabulary 2000). Its tokenizer is made from the held-out texts, so
it is the same for every sample. It only learns word order over a few words: text generated from a table of real words
and their successors teaches it as much as real text. A pre-trained model, fine-tuned whole, can be used instead and
sees more. None of this is private: do not publish the results.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import Described, refuse
from dptune.devices import restored_randomness
from utils.data.special_tokens import UnwrittenToken
from utils.data.text_only import TextOnly
from utils.models.loading import load_model, load_tokenizer
from utils.synthetic.proxy_settings import TINY, ProxySettings

_TINY_VOCABULARY = 2000
_TINY_SPREAD = 0.05  # standard deviation of the initial weights; with the usual 0.02 it learns half as much
_WARMUP = 0.1  # of the steps
_RESAMPLES = 1000
_IGNORED = -100


@dataclass(frozen=True)
class Windows:
    """Texts cut into windows; each token is predicted from those before it in its window.

    Attributes:
        ids: up to max_length + 1 token ids per window. The first is the end token or the last token of the previous
            window, so that each token of a text, including its end token, is predicted once.
        owners: the text of each window, int64 [N].
    """

    ids: list[list[int]]
    owners: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """Sums over the tokens of each text, float64 [texts] each; `nats` is the negative log-likelihood."""

    correct: np.ndarray
    tokens: np.ndarray
    nats: np.ndarray


def make_tokenizer(settings: ProxySettings, held_out: Sequence[str]) -> PreTrainedTokenizerBase:
    """The given tokenizer, or a byte-level BPE tokenizer made from the held-out texts, which covers every character."""
    if (name := settings.tokenizer if settings.model == TINY else settings.model) is not None:
        return load_tokenizer(name)
    return GPT2Tokenizer().train_new_from_iterator(list(held_out), vocab_size=_TINY_VOCABULARY, show_progress=False)


def make_model(settings: ProxySettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model before training, on the CPU in float32."""
    if settings.model != TINY:
        return load_model(settings.model, dtype=torch.float32, device="cpu").requires_grad_(True)
    with restored_randomness():
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=1,  # learns more in a minute than two layers do
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=settings.max_length,
                tie_word_embeddings=True,
                initializer_range=_TINY_SPREAD,
            )
        )


def cut_windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Windows:
    """Tokenise texts and cut them into windows of at most `max_length` predicted tokens."""
    end = tokenizer.eos_token_id
    try:
        encoded = TextOnly(tokenizer)(list(texts), add_special_tokens=False)["input_ids"]
    except UnwrittenToken as error:
        remedy = f"makes a special token of the text of row {error.number}; change the row or the model"
        refuse("--proxy_model", Described(f"the tokenizer {type(tokenizer).__name__}"), remedy)
    ids, owners = [], []
    for owner, text in enumerate(encoded):
        whole = [end, *text, end]
        for start in range(0, len(whole) - 1, max_length):
            ids.append(whole[start : start + max_length + 1])
            owners.append(owner)
    return Windows(ids, np.array(owners))


def train_proxy(
    model: PreTrainedModel, windows: Windows, settings: ProxySettings, on_step: Callable[[], object] = lambda: None
) -> None:
    """Train all parameters with AdamW on random batches of windows, in a new order each epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_rate, weight_decay=0.0)
    rng = np.random.default_rng(settings.seed)
    waiting: list[int] = []
    model.train()
    for step in range(settings.steps):
        while len(waiting) < settings.batch_size:
            waiting += rng.permutation(len(windows.ids)).tolist()
        batch, waiting = waiting[: settings.batch_size], waiting[settings.batch_size :]
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_rate * _schedule(step, settings.steps)
        optimizer.zero_grad()
        logits, labels = _predict(model, [windows.ids[index] for index in batch])
        cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step()


@torch.no_grad()
def predict_texts(model: PreTrainedModel, windows: Windows, batch_size: int) -> Predictions:
    """The model's predictions of every token of the texts that the windows were cut from."""
    model.eval()
    sums = np.zeros((3, windows.owners.max() + 1))
    order = np.argsort([len(ids) for ids in windows.ids], kind="stable")  # similar lengths: less padding
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        logits, labels = _predict(model, [windows.ids[index] for index in batch])
        known = labels != _IGNORED
        nats = cross_entropy(logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none").sum(dim=1)
        right = ((logits.argmax(dim=-1) == labels) & known).sum(dim=1)
        for row, values in enumerate((right, known.sum(dim=1), nats)):
            np.add.at(sums[row], windows.owners[batch], values.double().numpy())
    return Predictions(*sums)


def summarise_predictions(predictions: Predictions, num_bytes: int, *, seed: int = 0) -> dict[str, float]:
    """Shares and means over all tokens.

    Args:
        predictions: for N texts.
        num_bytes: length of all texts together in UTF-8.
        seed: seed of the bootstrap over texts, for the standard error.

    Returns:
        accuracy: share of tokens that the model predicts as the likeliest; accuracy_error: its standard error.
        nats_per_token: the cross-entropy. bits_per_byte: the same, comparable between tokenizers.
    """
    correct, tokens, nats = predictions.correct, predictions.tokens, predictions.nats
    drawn = np.random.default_rng(seed).integers(len(tokens), size=(_RESAMPLES, len(tokens)))
    resampled = correct[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    return {
        "accuracy": float(correct.sum() / tokens.sum()),
        "accuracy_error": float(resampled.std(ddof=1)),
        "nats_per_token": float(nats.sum() / tokens.sum()),
        "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes),
    }


def result_name(settings: ProxySettings, training: Sequence[str] | None, held_out: Sequence[str]) -> str:
    """A name for a result; the same settings, model files and texts give the same name."""
    folders = [_folder_state(name) for name in (settings.model, settings.tokenizer) if name]
    content = json.dumps([asdict(settings), folders, training, list(held_out)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _folder_state(name: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files in a model's folder, to notice changes; empty for a hub name."""
    folder = Path(name)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine decay to a tenth."""
    warmup = max(1, round(_WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))


def _predict(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, T, V] and target tokens [B, T]; padding is on the right, where no token sees it."""
    longest = max(map(len, ids))
    inputs = torch.tensor([[*row[:-1], *[row[0]] * (longest - len(row))] for row in ids])
    labels = torch.tensor([[*row[1:], *[_IGNORED] * (longest - len(row))] for row in ids])
    return model(input_ids=inputs, use_cache=False).logits, labels
