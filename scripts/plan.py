r"""Propose the settings of a private training for a computing budget: batch, steps, noise, bands, rank, learning rate.

    python -m scripts.plan --num_examples 20000 --tokens_per_example 120 --model Qwen/Qwen3-0.6B --hours 4 \
        --target_epsilon 3 --for_device "A100 80GB"

For each batch size it computes how many steps the time allows, and how much noise the epsilon then needs. A rule that
was fitted to measured runs predicts the loss from both. The planner prints the best settings, the alternatives, whether
there are enough data, and the command line that trains. It reads no data and trains nothing. Give --tokens_per_second
if you have measured the speed. --trainable all plans for a whole model. See docs/how_to/planning.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from utils.cli.flags import exit_on_invalid_argument, given_fields, parse
from utils.planning.arguments import PlannerArguments
from utils.training.lora_arguments import LoraArguments

GROUPS = (PlannerArguments, LoraArguments)
FLAGS = {"rank": "--lora_r", "alpha": "--lora_alpha", "dropout": "--lora_dropout", "targets": "--lora_target_modules"}


@exit_on_invalid_argument(*GROUPS, flags=FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Print the proposal, and draw the plot if it is asked for."""
    given, lora = parse(*GROUPS, args=argv, description=__doc__)
    # Imported here, so that --help and a mistyped flag need neither torch nor transformers.
    from utils.planning.proposal import propose
    from utils.planning.report import describe_proposal
    from utils.planning.rule import read_rule

    rule = read_rule()
    proposal = propose(given, lora, given_fields(argv, GROUPS), rule)
    print(*describe_proposal(proposal, rule, given), sep="\n", flush=True)
    if given.plot is not None:
        from utils.planning.plots import plot_trade

        plot_trade(given.plot, proposal)


if __name__ == "__main__":
    main()
