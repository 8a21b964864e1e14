"""The model card (README.md) that travels with an adapter or a model: what it promises, what not, and how to load it.

A card is published with what was trained, so it is written from the `PrivacyStatement` alone. Names that the user typed
are reduced to what can neither break the Markdown nor give away where things lie on the user's machine.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from dptune._files import atomic_write
from dptune.accounting.rounding import rounded_up, rounded_up_to_figures
from dptune.report.statement import PrivacyStatement

_RECORDS = """\
- **Several records of one person.** The numbers hold for one privacy unit. For somebody whose data fill k units they
  grow to an epsilon of k·ε and a delta of k·exp((k−1)·ε)·δ."""
_AUTHORS = """\
- **One person under several names.** The numbers hold for one privacy unit. For somebody who goes by k names, or whose
  rows have none, they grow to an epsilon of k·ε and a delta of k·exp((k−1)·ε)·δ.
- **What others wrote.** A row belongs to one author. Somebody's words quoted, answered or told about in the rows of
  others are protected as those others' words are."""

_NOT_GUARANTEED = """\
{several}
- **Choices made by looking at private data.** Hyper-parameters, the number of steps or the best of several runs, if
  chosen on the training data, tell something about it that is not counted here. Several releases from the same data
  add up.
- **Anything but the training set.** Held-out or validation examples and the base model's own training data are not
  covered.
- **The number of training {sampled}.** It is published in this card.
- **Companion files.** The {noun}, this card, its plot and `privacy_report.json` are all that may be published.
  `diagnostics*` and `all_results.json` of the same run, and what a tracker stored, hold losses and gradient norms
  measured on the data: they are not private.
- **The machine.** Timing and other side channels, and attacks on floating-point rounding of the noise, are outside the
  analysis.
"""

_USE = """\
With dptune, in the folder of this card:

```python
import dptune
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
dptune.attach_adapter(model, "lora_weights.bin")
```

With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, ".")
```
"""


_USE_WHOLE = """\
In the folder of this card:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```
"""


@dataclass(frozen=True)
class Artifact:
    """What a card goes with.

    Attributes:
        noun: what it is called in running text.
        what: what it is, up to the base model's name: "LoRA adapter for".
        library: that reads it, as model hubs name libraries.
        tags: for model hubs, beside those of every card.
        use: how to load it, in Markdown; {base} stands for the base model's name.
    """

    noun: str
    what: str
    library: str
    tags: tuple[str, ...]
    use: str


LORA_ADAPTER = Artifact("adapter", "LoRA adapter for", "peft", ("lora",), _USE)
WHOLE_MODEL = Artifact("model", "fine-tuned copy of", "transformers", (), _USE_WHOLE)


def write_model_card(
    path: str | os.PathLike[str],
    statement: PrivacyStatement,
    *,
    base_model: str,
    title: str | None = None,
    epsilon_plot: str | None = None,
    artifact: Artifact = LORA_ADAPTER,
) -> None:
    """Write README.md for what was trained, at once or not at all.

    Args:
        path: the file to write.
        statement: what was guaranteed; nothing else about the run enters the card.
        base_model: hub name or local path of the model that was adapted; of a path only the last part is shown.
        title: the heading; made from the base model's name if None.
        epsilon_plot: file name of the plot of epsilon by step, beside the card; None for no plot.
        artifact: what was trained, beside the card.
    """
    base = published_name(base_model)
    claim = _claim_of(statement)
    heading = title or f"{base}, fine-tuned " + ("with differential privacy" if claim else "without privacy")
    noun, it = artifact.noun, f"A {artifact.what} `{base}`"
    parts = [_front_matter(base, claim is not None, artifact), f"# {_escape(heading)}\n"]
    parts += _private_body(statement, claim, epsilon_plot, it, noun) if claim else _open_body(statement, it, noun)
    parts += ["## How to load it\n", artifact.use.format(base=base), _made_with(statement)]
    with atomic_write(path) as file:
        file.write("\n".join(parts))


def published_name(model: str) -> str:
    """The part of a model's name that may be published: a hub name whole, a path's last component.

    Characters that mean something in YAML, Markdown or Python strings become underscores.

    >>> published_name("meta-llama/Llama-2-7b-hf"), published_name("/home/ann/models/my llama/")
    ('meta-llama/Llama-2-7b-hf', 'my_llama')
    """
    local = os.path.exists(model) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith(".")
    name = PureWindowsPath(model).name if local else model
    if os.path.exists(model) and not name.strip("."):
        name = Path(model).resolve().name
    return re.sub(r"[^\w.+/-]", "_", name) if name.strip(".") else "local-model"


def _front_matter(base: str, private: bool, artifact: Artifact) -> str:
    """YAML that model hubs read. A JSON string is a YAML string, whatever it holds."""
    tags = ["dptune", *artifact.tags, *(["differential-privacy", "dp-sgd"] if private else [])]
    library = f"library_name: {artifact.library}"
    lines = [f"base_model: {json.dumps(base)}", library, "tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *lines, "---\n"])


class _Claim(NamedTuple):
    """The guarantee's two numbers."""

    epsilon: float
    delta: float


def _claim_of(statement: PrivacyStatement) -> _Claim | None:
    """None for a run without a guarantee, whose statement has no epsilon."""
    if statement.epsilon is None or statement.delta is None:
        return None
    return _Claim(statement.epsilon, statement.delta)


def _private_body(
    statement: PrivacyStatement, claim: _Claim, epsilon_plot: str | None, it: str, noun: str
) -> list[str]:
    claimed = f"**ε = {rounded_up(claim.epsilon, trim=True)} at δ = {float(claim.delta)!r}**"
    parts = [
        f"{it}, trained with differential privacy: {claimed}, for the presence of "
        f"{_escape(statement.privacy_unit)} in the training data.\n",
        "## What this means\n",
        _meaning(statement, claim, noun) + "\n",
        "## How it was measured\n",
        _table(statement, claim),
    ]
    if statement.repeated_steps:
        parts.append(_repeated(statement, noun))
    if epsilon_plot:
        parts.append(f"![Epsilon by training step]({re.sub(r'[^A-Za-z0-9._-]', '_', epsilon_plot)})\n")
    several = _RECORDS if statement.group_size == 1 and statement.sampled == "examples" else _AUTHORS
    limits = _NOT_GUARANTEED.format(several=several, sampled=statement.sampled, noun=noun)
    return [*parts, "## What is not guaranteed\n", limits]


def _open_body(statement: PrivacyStatement, it: str, noun: str) -> list[str]:
    """The body for a run without a guarantee: no figure that could be mistaken for one."""
    reasons = "\n".join(f"> - {_escape(reason)}" for reason in statement.reasons)
    return [
        "> **There is no privacy guarantee.** Texts of the training data, or facts about the people in it, may be",
        f"> recovered from this {noun}. Why there is none:\n>\n{reasons}\n",
        f"{it}. Handle it as you would handle the training data themselves.",
        "`diagnostics*` and `all_results.json` of the same run were measured on the data: they must not be published",
        "either.\n",
    ]


def _meaning(statement: PrivacyStatement, claim: _Claim, noun: str) -> str:
    """Two sentences for somebody who never heard of epsilon.

    The second is the best accuracy of any test between two neighbouring data sets that are equally likely beforehand:
    (exp(epsilon) + delta) / (1 + exp(epsilon)) (Kairouz, Oh and Viswanath 2015).
    """
    odds_against = math.exp(-claim.epsilon)
    accuracy = (1 + claim.delta * odds_against) / (1 + odds_against)
    return (
        f"Take {_escape(statement.privacy_unit)} out of the training data, or put one in: nothing that can be seen in "
        f"this {noun} becomes more than {_factor(claim.epsilon)} times as likely or as unlikely, except with a "
        f"probability of {float(claim.delta)!r}. So somebody who knows all the other data, and for whom it is an "
        f"even bet whether this one was among them, guesses right at most {_percent(accuracy)} of the time after "
        f"studying the {noun}."
    )


def _table(statement: PrivacyStatement, claim: _Claim) -> str:
    rows = {
        "Epsilon (ε)": rounded_up(claim.epsilon, trim=True),
        "Delta (δ)": repr(float(claim.delta)),
        "Privacy unit": _escape(statement.privacy_unit),
        "Method": _escape(statement.method),
        "Adjacency": _escape(statement.adjacency),
        "Sampler": _escape(statement.sampler),
        "Accountant": _escape(statement.accountant),
        "Noise multiplier (σ)": f"{statement.noise_multiplier:.6g}",
        "Clip norm (C)": f"{statement.clip_norm:.6g}",
        "Clipping": _escape(statement.clipping),
        "Sampling probability (q)": f"{statement.sampling_probability:.6g}",
        "Expected batch size": f"{statement.expected_batch_size:.6g} {_escape(statement.sampled)}",
        "Steps": f"{statement.steps:,}",
        f"Training {_escape(statement.sampled)}": f"{statement.num_examples:,}",
        "Noise source": _escape(statement.noise_source),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, "", "Unrounded figures are in `privacy_report.json`.\n"])


def _repeated(statement: PrivacyStatement, noun: str) -> str:
    number = statement.repeated_steps
    which = "1 of these steps is" if number == 1 else f"{number:,} of these steps are"
    return (
        f"{which} not part of the {noun}: an interruption lost what came of them, and the training went on from an "
        "earlier state. ε counts every step all the same.\n"
    )


def _made_with(statement: PrivacyStatement) -> str:
    return "Made with " + ", ".join(f"{_escape(k)} {_escape(v)}" for k, v in statement.versions.items()) + ".\n"


def _escape(text: str) -> str:
    """`text` on one line, with whatever Markdown, HTML or a table would take for its own made plain."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", line)


def _factor(epsilon: float) -> str:
    """exp(epsilon), rounded up to three figures, in words where it has no meaning any more."""
    if epsilon > 20:
        return f"e^{rounded_up(epsilon, trim=True)}"
    return rounded_up_to_figures(math.exp(epsilon), 3)


def _percent(share: float) -> str:
    return f"{rounded_up(100 * share, 1)}%"
