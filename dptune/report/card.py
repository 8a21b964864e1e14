"""The model card (README.md) of an adapter or a model: what is guaranteed, what is not, and how to load it.

A card is published together with the weights. So it is written from the `PrivacyStatement` and from what the user gave
for it (`CardFields`), and from nothing else. Names that the user typed are shortened and escaped: they can neither
break the Markdown nor reveal paths on the user's machine. A field that nobody gave is marked as one to fill in.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from dptune._files import atomic_write
from dptune.accounting.meaning import REASONABLE, STRONG, factor, log_odds, verdict
from dptune.accounting.rounding import rounded_up
from dptune.report.fields import HUB_NAME, NO_FIELDS, CardFields
from dptune.report.prior import PriorRelease, together
from dptune.report.statement import PrivacyStatement

STARTED_FROM = "What it started from"  # a section; below it stand the bounds of other releases

_RECORDS = """\
- **Several records of one person.** ε and δ hold for one privacy unit. For a person whose data fill k units, they grow
  to an epsilon of k·ε and a delta of k·exp((k−1)·ε)·δ."""
_AUTHORS = """\
- **One person under several names.** ε and δ hold for one privacy unit. For a person with k names, or with k rows
  without a name, they grow to an epsilon of k·ε and a delta of k·exp((k−1)·ε)·δ.
- **What others wrote.** Each row belongs to one author. If others quote, answer or describe a person, those words are
  protected as data of their authors, not of that person."""

_TO_FILL_IN = "to fill in"

_RECIPE = """\
## How to repeat it

```
{recipe}
```

Words in capitals stand for files and names that are not published. Batches and noise are drawn anew, so another run
ends with other weights.
"""

_NOT_GUARANTEED = """\
{several}
- **Choices made by looking at private data.** Hyper-parameters (and the number of steps) reveal something about the
  training data if they were chosen on it. So does the choice of the best of several runs. ε does not count that.
- **Other releases.** The epsilons of several releases from the same data add up.
- **Other data.** The validation examples and the base model's own training data are not protected.
- **The number of training {sampled}.** This card publishes it.
- **The run's other files.** Publish only the folder that holds this card. The files `diagnostics*` and
  `all_results.json` of the same run, its checkpoints, and anything a tracker stored, are not private: they hold losses
  and gradient norms measured on the data, or its fingerprint.
- **The machine.** The analysis does not cover timing, other side channels, or attacks on the floating-point rounding of
  the noise.
"""

_USE = """\
With dptune, run in the folder of this card:

```python
import dptune
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
dptune.attach_adapter(model, "lora_weights.bin")
```

With PEFT, run in the same folder:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, ".")
```
"""


_USE_WHOLE = """\
Run in the folder of this card:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""


@dataclass(frozen=True)
class Artifact:
    """What a card describes.

    Attributes:
        noun: its name in running text: "adapter".
        what: the words before the base model's name: "LoRA adapter for".
        library: the library that reads it, as model hubs name it.
        tags: for model hubs, in addition to those of every card.
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
    fields: CardFields = NO_FIELDS,
) -> None:
    """Write the card to `path`, whole or not at all.

    Args:
        path: the file to write, usually README.md.
        statement: the run's guarantee.
        base_model: hub name or local path of the base model; only the last part of a path is shown.
        title: the heading; None makes one from the base model's name.
        epsilon_plot: file name of the plot of epsilon by step, in the same folder; None for no plot.
        artifact: what was trained.
        fields: what else the card says.
    """
    base = published_name(base_model)
    claim = _claim_of(statement)
    heading = title or f"{base}, fine-tuned " + ("with differential privacy" if claim else "without privacy")
    noun, it = artifact.noun, f"A {artifact.what} `{base}`"
    named = base if base == base_model else None
    parts = [_front_matter(named, claim is not None, artifact, fields), f"# {_escape(heading)}\n"]
    parts += _private_body(statement, claim, epsilon_plot, it, noun) if claim else _open_body(statement, it, noun)
    parts += [
        "## Facts\n",
        _facts(base, fields, statement.average),
        "## How to load it\n",
        artifact.use.format(base=base),
    ]
    if fields.recipe is not None and (claim or statement.noise_multiplier is None):
        parts.append(_RECIPE.format(recipe=fields.recipe))
    parts.append(_made_with(statement))
    with atomic_write(path) as file:
        file.write("\n".join(parts))


def published_name(model: str) -> str:
    """The part of a model's name that may be published: all of a hub name, the last component of a path.

    Characters with a meaning in YAML, Markdown or Python strings become underscores.

    >>> published_name("meta-llama/Llama-2-7b-hf"), published_name("/home/ann/models/my llama/")
    ('meta-llama/Llama-2-7b-hf', 'my_llama')
    """
    local = os.path.exists(model) or not HUB_NAME.fullmatch(model) or model.startswith(".")
    name = PureWindowsPath(model).name if local else model
    if os.path.exists(model) and not name.strip("."):
        name = Path(model).resolve().name
    return re.sub(r"[^\w.+/-]", "_", name) if name.strip(".") else "local-model"


def _front_matter(base: str | None, private: bool, artifact: Artifact, fields: CardFields) -> str:
    """YAML that model hubs read. A field that is not known is a comment. Every JSON string is also a YAML string.

    Args:
        base: the base model's name on the hub; None if only a path is known.
        private, artifact, fields: what is known besides.
    """
    tags = ["dptune", *artifact.tags, *(["differential-privacy", "dp-sgd"] if private else [])]
    on_the_hub = [name for name in fields.data if HUB_NAME.fullmatch(name) and "/" in name]
    given: dict[str, str | list[str] | None] = {
        "base_model": base,
        "license": fields.license,
        "language": list(fields.languages),
        "datasets": on_the_hub,
        "library_name": artifact.library,
        "tags": tags,
    }
    lines = []
    for name, value in given.items():
        if not value:
            lines.append(f"# {name}: {_TO_FILL_IN}")
        elif isinstance(value, str):
            lines.append(f"{name}: {json.dumps(value)}")
        else:
            lines += [f"{name}:", *(f"- {json.dumps(one)}" for one in value)]
    return "\n".join(["---", *lines, "---\n"])


def _facts(base: str, fields: CardFields, average: str | None) -> str:
    """A table of what the guarantee does not need to know, with a mark where something is missing.

    Args:
        base: the base model's name.
        fields: what the user says.
        average: see `PrivacyStatement`.
    """
    rows = {
        "Base model": f"`{base}`",
        "Training data": ", ".join(map(_escape, fields.data)),
        "Language": ", ".join(fields.languages),
        "Licence": fields.license,
        **({} if average is None else {"Released weights": _escape(average)}),
    }
    lines = [f"| {name} | {value or f'*{_TO_FILL_IN}*'} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


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
        f"{it}, trained with differential privacy. The guarantee is {claimed}, for the presence of "
        f"{_escape(statement.privacy_unit)} in the training data.\n",
        "## What this means\n",
        _meaning(statement, claim, noun) + "\n",
        "## How it was measured\n",
        _table(statement),
    ]
    if statement.repeated_steps:
        parts.append(_repeated(statement, noun))
    if statement.unused_steps:
        parts.append(_unused(statement))
    if epsilon_plot:
        parts.append(f"![Epsilon by training step]({re.sub(r'[^A-Za-z0-9._-]', '_', epsilon_plot)})\n")
    several = _RECORDS if statement.group_size == 1 and statement.sampled == "examples" else _AUTHORS
    limits = _NOT_GUARANTEED.format(several=several, sampled=statement.sampled, noun=noun)
    if statement.starts_from:
        parts += [f"## {STARTED_FROM}\n", _start(statement, claim)]
    return [*parts, "## What is not guaranteed\n", limits]


def _open_body(statement: PrivacyStatement, it: str, noun: str) -> list[str]:
    """The body for a run without a guarantee. It has no figure that could be mistaken for one."""
    reasons = "\n".join(f"> - {_escape(reason)}" for reason in statement.reasons)
    return [
        f"> **There is no privacy guarantee.** Anyone who has this {noun} may recover texts of the training data, or",
        f"> facts about the people in it. The reasons:\n>\n{reasons}\n",
        f"{it}. Handle it as carefully as the training data themselves.",
        "Do not publish `diagnostics*` and `all_results.json` of the same run either: they were measured on that data.",
        "",
    ]


def _meaning(statement: PrivacyStatement, claim: _Claim, noun: str) -> str:
    """What epsilon means, for a reader who never heard of it."""
    odds = factor(log_odds(claim.epsilon, claim.delta))
    return (
        f"Suppose that {_escape(statement.privacy_unit)} is removed from the training data, or added to it. Nothing "
        f"that can be observed in this {noun} becomes more than {factor(claim.epsilon)} times as likely or as "
        f"unlikely, except with a probability of {float(claim.delta)!r}.\n\n"
        "Now suppose that an attacker knows all the other data, and that for this one a coin decided whether it was "
        f"used. After studying the {noun}, the attacker's guess is right at most {odds} times for each "
        "time that it is wrong. A blind guess is right once for each time that it is wrong.\n\n"
        f"An epsilon of at most {STRONG} is called strong, one of at most {REASONABLE} reasonable, and a larger one "
        f"weak (Ponomareva et al. 2023, arXiv:2303.00654). This one is **{verdict(claim.epsilon)}**."
    )


def privacy_table(statement: PrivacyStatement) -> list[str]:
    """The lines of the card's table of what decides epsilon; empty without a guarantee."""
    claim = _claim_of(statement)
    if claim is None:
        return []
    probability = f"{'Largest sampling' if statement.parts else 'Sampling'} probability (q)"
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
        probability: f"{statement.sampling_probability:.6g}",
        "Expected batch size": f"{statement.expected_batch_size:.6g} {_escape(statement.sampled)}",
        "Steps": f"{statement.steps:,}",
        f"Training {_escape(statement.sampled)}": f"{statement.num_examples:,}",
        "Noise source": _escape(statement.noise_source),
    }
    return [f"| {name} | {value} |" for name, value in rows.items()]


def _table(statement: PrivacyStatement) -> str:
    unrounded = "Unrounded figures are in `privacy_report.json`.\n"
    return "\n".join(["| | |", "|---|---|", *privacy_table(statement), "", unrounded])


def _repeated(statement: PrivacyStatement, noun: str) -> str:
    number = statement.repeated_steps
    which, lost = ("1 of these steps is", "it") if number == 1 else (f"{number:,} of these steps are", "them")
    return (
        f"{which} not part of the {noun}: an interruption lost {lost}, and the training resumed from an earlier state. "
        "ε counts every step, including these.\n"
    )


def _unused(statement: PrivacyStatement) -> str:
    number = statement.unused_steps
    steps, them = ("planned step", "it") if number == 1 else (f"{number:,} planned steps", "them")
    return (
        f"Held-out rows ended the training before the last {steps}. ε counts {them} "
        "all the same: when the training ends depends on the private steps before.\n"
    )


def _start(statement: PrivacyStatement, claim: _Claim) -> str:
    """What the training started from, and what that adds for a person in the data of both."""
    lines = [f"- `{one.name}`: {_bound_of(one)}" for one in statement.starts_from]
    own = "The ε above is that of this training alone. It holds whatever the start was."
    total = together(claim.epsilon, claim.delta, statement.privacy_unit, statement.starts_from)
    if total is None:
        both = "For a person whose data the start was trained on as well, the bounds of both add up, if it has one."
    else:
        # A thousandth more, so that four figures are not below it.
        both = (
            "For a person whose data the start was trained on as well, the bounds add up: to "
            f"ε = {rounded_up(total[0], trim=True)} at δ = {1.001 * total[1]:.4g}."
        )
    return "\n".join([*lines, "", own, both, ""])


def _bound_of(prior: PriorRelease) -> str:
    declared = "declared to be trained on public data alone" if prior.declared_public else ""
    if prior.epsilon is None or prior.delta is None:
        return f"without a bound of its own{declared and f'; {declared}'}."
    unit = _escape(prior.privacy_unit or "")
    bound = f"released at ε = {rounded_up(prior.epsilon, trim=True)} and δ = {float(prior.delta)!r} for {unit}"
    return f"{bound}{declared and f'; {declared}'}."


def _made_with(statement: PrivacyStatement) -> str:
    return "Made with " + ", ".join(f"{_escape(k)} {_escape(v)}" for k, v in statement.versions.items()) + ".\n"


def _escape(text: str) -> str:
    """`text` on one line, with every character escaped that Markdown, HTML or a table would interpret."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_\[\]<>|~$])", r"\\\1", line)
