"""Counts the operations of a step, and how often the host waits for the device, with privacy and without.

    python -m tests.pretend.operations             # the table, in a few seconds
    python -m tests.pretend.operations --details   # also what the private step does more of, and where it waits

An operation is at least one kernel on a real device; for small models, the time to start kernels is most of the time.
The counts depend on the versions of torch and transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dptune import CausalLMLoss, GaussianNoise, Keystream, Ledger, PlainStep, PrivacyConfig, PrivateStep, add_lora
from dptune.flat import released_size
from dptune.sharding import shard
from tests.pretend.ranks import COLLECTIVES, two_ranks
from tests.pretend_device import Counts, counted, moved, register
from utils.models.sharded import decoder_layers

LAYERS, ROWS, TOKENS, PROMPT, RANK, VOCABULARY = 4, 4, 16, 5, 16, 300
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Compared:
    """The counts of the same work with privacy and without."""

    private: Counts
    plain: Counts

    @property
    def ratio(self) -> float:
        """Operations with privacy, as a multiple of those without."""
        return self.private.operations / self.plain.operations

    @property
    def more_waits(self) -> int:
        """How often the host waits because of privacy."""
        return self.private.waits - self.plain.waits


def llama() -> nn.Module:
    """A Llama of four layers, its attention in single operations."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, attn_implementation="eager")
    return LlamaForCausalLM(config)


def adapt(model: nn.Module) -> nn.Module:
    """LoRA of rank 16 on the attention's four products."""
    add_lora(model, rank=RANK, alpha=float(RANK), targets=ATTENTION)
    return model


TRAINED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA on q, k, v, o": adapt,
    "all weights": lambda model: model.requires_grad_(True),
}


@cache  # the counts are the same every time
def compare(trained: str) -> tuple[Compared, Compared]:
    """(one micro-batch after the first, the end of the step), of a name in `TRAINED`."""
    private, plain = (_count(moved(TRAINED[trained](llama())), private=private) for private in (True, False))
    return Compared(private[0], plain[0]), Compared(private[1], plain[1])


@cache
def of_sharded(trained: str) -> tuple[Counts, Counts]:
    """The same of a private step on one of two ranks, over which the model's own weights are sharded."""
    with two_ranks():
        model = moved(llama()).requires_grad_(False)
        shard(model, decoder_layers(model), device=register())
        return _count(TRAINED[trained](model), private=True)


def _count(model: nn.Module, *, private: bool) -> tuple[Counts, Counts]:
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    batch, losses = [part.to(register()) for part in (ids, labels)], CausalLMLoss(model)
    with TemporaryDirectory() as folder, _step(model, Path(folder)) if private else PlainStep(model, ROWS) as step:
        step.backward(losses(*batch))
        with counted() as micro_batch:
            step.backward(losses(*batch))
        with counted() as end:
            step.finish()
    return micro_batch, end


def _step(model: nn.Module, folder: Path) -> PrivateStep:
    config = PrivacyConfig(
        num_examples=1000, expected_batch_size=ROWS, steps=10, clip_norm=1.0, noise_multiplier=1.0, delta=1e-5
    )
    noise = GaussianNoise(released_size(model, config), Keystream.for_tests(0))
    return PrivateStep(model, config, ledger=Ledger(folder / "ledger.jsonl"), noise=noise)


def table(details: bool = False) -> list[str]:
    """The printed lines."""
    lines = [
        f"torch {torch.__version__}; Llama of {LAYERS} layers, {ROWS} rows of {TOKENS} tokens, rank {RANK}",
        "",
        "| trained | part of the step | operations, private | plain | ratio | waits, private | plain |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    more: list[str] = []
    for name in TRAINED:
        for part, found in zip(("a micro-batch", "the end"), compare(name), strict=True):
            private, plain = found.private, found.plain
            lines.append(
                f"| {name} | {part} | {private.operations} | {plain.operations} | {found.ratio:.2f} | "
                f"{private.waits} | {plain.waits} |"
            )
            more += ["", f"{name}, {part}: operations that only privacy needs"]
            more += [f"{count:5d}  {what}" for what, count in (private.by_operation - plain.by_operation).most_common()]
            more += [f"{name}, {part}: waits with privacy"]
            more += [f"{count:5d}  {what}" for what, count in private.by_wait.most_common()]
    lines += ["", "| trained | part of the step | operations, sharded | more | collectives | waits, sharded | more |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name in TRAINED:
        parts = zip(("a micro-batch", "the end"), of_sharded(name), compare(name), strict=True)
        for part, found, whole in parts:
            added = found.by_operation - whole.private.by_operation
            collectives = sum(added[one] for one in COLLECTIVES)
            lines.append(
                f"| {name} | {part} | {found.operations} | {found.operations - whole.private.operations} | "
                f"{collectives} | {found.waits} | {found.waits - whole.private.waits} |"
            )
            more += ["", f"{name}, {part}: operations that only sharding needs"]
            more += [f"{count:5d}  {what}" for what, count in added.most_common()]
    return [*lines, *(more if details else [])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--details", action="store_true", help="also name the operations and the places that wait")
    args = parser.parse_args()
    register()
    print(*table(args.details), sep="\n")


if __name__ == "__main__":
    main()
