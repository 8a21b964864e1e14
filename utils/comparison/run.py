"""The work of `scripts/compare_modes.py`: a comparison of fine-tuning modes, or a private selection among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch

from dptune._validate import InvalidArgument, present, refuse, require_delta
from dptune.accounting import Spend, planned_steps
from dptune.accounting.delta import default_delta, delta_in_words
from dptune.accounting.rounding import rounded_up
from dptune.accounting.selection import PrivateSelection
from dptune.devices import restored_randomness
from dptune.ledger import LEDGER_NAME
from utils.classification.files import load_classifier, load_classifier_skeleton, load_classifier_tokenizer
from utils.classification.measured_defaults import measure_head_rate
from utils.classification.mode_defaults import ModelRates, plain_whole_rate
from utils.classification.tasks import load_task
from utils.comparison.arguments import ChoiceArguments, TrialArguments, trainer_flags
from utils.comparison.folder import (
    TRIALS_FOLDER,
    TRIALS_NAME,
    finished_trials,
    release_folder,
    secret_folder,
    write_comparison,
)
from utils.comparison.outcomes import COMPARISON_NAME, PLOT_NAME, Outcome
from utils.comparison.release import SelectionPlan
from utils.comparison.selection import select
from utils.comparison.trials import Candidate, Runner, TrialResults, run_trial
from utils.training.chosen_defaults import whole_rate, width_of

Sizes = Callable[[TrialArguments, str], tuple[int, int]]  # (settings, data set) -> (training, validation) records


def compare(
    folder: Path, training: TrialArguments, choice: ChoiceArguments, extra: Sequence[str], runner: Runner
) -> None:
    """Train all candidates, and write the table and the plot anew after each data set."""
    for dataset in training.datasets:
        planned = list(trials(choice, partial(rates_of_checkpoint, training.model_name_or_path)))
        for number, (candidate, private, seed) in enumerate(planned, start=1):
            name = f"{candidate}_{'private' if private else 'plain'}_seed{seed}"
            trial = folder / TRIALS_FOLDER / dataset / name
            spent = ["--target_epsilon", repr(training.target_epsilon)]
            flags = trainer_flags(training, candidate, seed, private=private, privacy=spent)
            flags += ["--resume_from_checkpoint", "latest", *extra]
            outcome = Outcome.of(run_trial(dataset, trial, flags, runner), trial / dataset / LEDGER_NAME)
            print(f"{dataset} {number}/{len(planned)}: {name}: {outcome.accuracy:.3f}", flush=True)
        write_comparison(folder, finished_trials(folder))
    print(
        f"wrote {folder / COMPARISON_NAME}, {PLOT_NAME}, {TRIALS_NAME}, {TRIALS_FOLDER}/: scores are exact, NOT PRIVATE"
    )


class RatesOf(Protocol):
    """Finds the rates that follow from a model."""

    def __call__(self, *, private: bool) -> ModelRates: ...


def trials(choice: ChoiceArguments, of_model: RatesOf) -> Iterator[tuple[Candidate, bool, int]]:
    """(candidate, whether private, seed) of every training on one data set; see `ChoiceArguments.candidates`."""
    for mode in choice.modes:
        for private in (True, False) if choice.baseline else (True,):
            candidates = choice.candidates(mode, of_model(private=private), private=private)
            yield from ((candidate, private, seed) for candidate in candidates for seed in choice.seeds)


def select_privately(
    folder: Path,
    dataset: str,
    training: TrialArguments,
    choice: ChoiceArguments,
    extra: Sequence[str],
    runner: Runner,
    sizes: Sizes,
) -> None:
    """Run a private selection on one data set, unless it is done already, and print what was released."""
    plan = plan_selection(dataset, training, choice, *sizes(training, dataset))
    _announce(plan, chose_delta=training.delta is None)
    noise = ["--noise_multiplier", repr(plan.spend.noise_multiplier)]

    def train(candidate: Candidate, trial: Path) -> TrialResults:
        flags = trainer_flags(training, candidate, plan.seed, private=True, privacy=noise)
        try:
            return run_trial(dataset, trial, [*flags, *extra], runner)
        except InvalidArgument:  # it names the trial, which bounds their secret number, and may quote a score
            remedy = f"a trial failed; read its log in {secret_folder(folder, dataset)}, and do not publish the log"
            refuse("--private_selection", choice.private_selection, remedy)

    release = release_folder(folder, dataset)
    winner = select(plan, secret_folder(folder, dataset), release, train)
    if winner is None:
        print(f"{dataset}: no trial was drawn, so nothing is released. The budget is spent all the same: another "
              "selection on these records adds its epsilon. --private_selection geometric always draws at least "
              "one trial.")  # fmt: skip
    else:
        print(f"{dataset}: {winner.candidate}, noisy accuracy {winner.noisy_accuracy:.3f}, epsilon "
              f"{rounded_up(plan.epsilon(), 4)} for the whole selection: {release}")  # fmt: skip


def plan_selection(
    dataset: str, training: TrialArguments, choice: ChoiceArguments, num_train: int, num_validation: int
) -> SelectionPlan:
    """Compute the noise for which the whole selection costs the target epsilon.

    Raises:
        InvalidArgument: the target is out of reach, delta is too large, or a batch larger than the data set.
    """
    delta = default_delta(num_train) if training.delta is None else training.delta
    require_delta(delta, num_train, name="--delta")
    if training.batch_size > num_train:
        refuse("--batch_size", training.batch_size, f"there are {num_train} training examples; give at most that")
    of_model = rates_of_checkpoint(training.model_name_or_path, private=True)
    distribution = present(choice.private_selection, "distribution of the number of trials")
    selection = PrivateSelection(distribution, choice.mean_trials, choice.validation_noise)
    probability = training.batch_size / num_train
    steps = planned_steps(
        num_examples=num_train, expected_batch_size=training.batch_size, epochs=training.num_train_epochs
    )
    sigma = selection.noise_multiplier(
        target_epsilon=training.target_epsilon, delta=delta, sampling_probability=probability, steps=steps
    )
    candidates = tuple(one for mode in choice.modes for one in choice.candidates(mode, of_model, private=True))
    spend = Spend(sigma, probability, steps)
    sizes = num_train, num_validation
    return SelectionPlan(dataset, selection, candidates, spend, delta, *sizes, seed=choice.seeds[0])


def _announce(plan: SelectionPlan, *, chose_delta: bool) -> None:
    cost, selection = plan.selection.cost(plan.spend, plan.delta), plan.selection
    print(f"{plan.dataset}: private selection among {len(plan.candidates)} candidates; number of trials: "
          f"{selection.distribution}, mean {selection.mean_trials:g}; noise multiplier "
          f"{plan.spend.noise_multiplier:g}")  # fmt: skip
    whole, alone, best_of = (rounded_up(one, 4) for one in (cost.selection, cost.one_run, cost.best_of))
    print(f"epsilon at delta {plan.delta:g}: {whole} for the selection; for comparison, {alone} for one such run and "
          f"{best_of} for the best of {cost.runs} runs by composition")  # fmt: skip
    if chose_delta:
        print(delta_in_words(plan.train_examples))
    if nothing := selection.chance_of_nothing:
        print(f"with probability {nothing:.2g} no trial is drawn and nothing is released")
    print("The number of trials and their duration are secret: publish neither.", flush=True)


def rates_of_checkpoint(checkpoint: str, *, private: bool) -> ModelRates:
    """The rates that follow from a checkpoint; that of a whole model under privacy where noise is small."""
    of_width = whole_rate if private else plain_whole_rate
    return ModelRates(partial(head_rate_of, checkpoint), lambda: of_width(_width_of(checkpoint)))


@cache
def _width_of(checkpoint: str) -> int:
    return width_of(load_classifier_skeleton(checkpoint).config)


@cache
def head_rate_of(checkpoint: str) -> float:
    """The learning rate of a head that trains alone on this checkpoint.

    New weights, such as a pooler, start the same in every call: an interrupted selection needs the same candidates."""
    pad_token_id = load_classifier_tokenizer(checkpoint).pad_token_id
    with restored_randomness():
        torch.manual_seed(0)
        model, _ = load_classifier(checkpoint, ("0", "1"), pad_token_id=pad_token_id)
    return measure_head_rate(model)


def count_records(training: TrialArguments, dataset: str) -> tuple[int, int]:
    """(training records, records of the first validation split); both numbers are treated as public."""
    task = load_task(
        dataset,
        tokenizer=load_classifier_tokenizer(training.model_name_or_path),
        max_length=training.block_size,
        data_dir=training.data_dir,
        max_train_examples=training.max_train_examples,
    )
    return len(task.train), len(next(iter(task.validation.values())))
