r"""Fine-tune a GPT-2 style model on texts, whole or with LoRA, with or without privacy, per text or per author.

    torchrun --nproc_per_node 2 scripts/nlg_reddit/fine_tune.py --output_dir scratch --model_name_or_path gpt2 \
        --train_file corpus.jsonl --block_size 128 --per_device_train_batch_size 32 \
        --gradient_accumulation_steps 2 --num_train_epochs 3 --learning_rate 1e-4 --target_epsilon 8

All flags of transformers' TrainingArguments work, except those that would break the privacy guarantee, which are
refused. README.md in this folder has more examples. `--disable_dp` trains without privacy; `--dry_run` prints the plan
and stops. `--help_all` also lists the flags of transformers, which takes some seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # torchrun adds only this file's folder

from dptune.integrations.privacy_arguments import NOT_READ, ONLY_PRIVATE, PrivacyArguments
from utils.cli.parser import DataclassParser, HelpFormatter, OneLineParser
from utils.training.card_arguments import CARD_FLAGS, CardArguments
from utils.training.corpus_arguments import CorpusArguments, CorpusModelArguments

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):  # before anything that is slow to import
    DataclassParser((PrivacyArguments, CorpusModelArguments, CorpusArguments, CardArguments), __doc__).parse_args(
        ["--help"]
    )

import numpy as np
import torch
from accelerate import PartialState
from transformers import HfArgumentParser, set_seed

from dptune import add_lora
from dptune._aliases import canonical
from dptune._validate import HIDDEN, InvalidArgument, refuse
from dptune.devices import has_accelerator
from dptune.integrations.authors import AuthorCollator, AuthorItems, AuthorLosses
from dptune.integrations.publishing import with_recipe
from dptune.integrations.transformers import DPTrainer, TrainingArguments
from dptune.lora import linear_layers
from dptune.lora_targets import DEFAULT_TARGETS
from dptune.report.card import published_name
from dptune.report.fields import NO_FIELDS, CardFields
from dptune.units.unit import PrivacyUnit, group_by_author
from utils.cli.flags import exit_on_invalid_argument, given_fields, parse, refuse_unread
from utils.cli.old_flags import with_new_names
from utils.data.features import RowFeatures
from utils.data.record import Record
from utils.data.records import load_texts
from utils.data.splits import hold_out
from utils.data.tokenization import TokenizedDataset, tokenize
from utils.models.embeddings import require_embeddings
from utils.models.loading import load_model, load_tokenizer, require_context
from utils.models.trainable import choose_trainable

_GPT2_TARGET = "c_attn"
_HELP_ALL = "--help_all"


GROUPS = (TrainingArguments, PrivacyArguments, CorpusModelArguments, CorpusArguments, CardArguments)
# {parameter, as the engine and shared code name it: flag of this program}.
FLAGS = {
    **dict.fromkeys(("model", "folder", "files"), "--model_name_or_path"),
    "privacy_unit": "--author_column",
    "rank": "--lora_r",
    "alpha": "--lora_alpha",
    "dropout": "--lora_dropout",
    "targets": "--lora_target_modules",
    "resume_from": "--resume_from_checkpoint",
    "run_folder": "--output_dir",
    "keep": "--save_total_limit",
    **CARD_FLAGS,
}


class TrainerParser(HfArgumentParser, OneLineParser):
    """transformers' parser, because TrainingArguments has types that `utils.cli.parser` does not take."""

    def __init__(self, groups: Sequence[type], description: str | None = None) -> None:
        how: dict[str, Any] = {"allow_abbrev": False, "formatter_class": HelpFormatter}
        HfArgumentParser.__init__(self, groups, description=description, **how)
        self.add_config_flag()

    def unknown_words(self, args: Sequence[str] | None) -> list[str]:
        """Words that belong to no flag."""
        return self.parse_known_args(args)[1]

    def parse_groups(self, args: Sequence[str] | None) -> list[Any]:
        """One filled instance of each dataclass in order."""
        # Reads no file of arguments next to the script: the command line alone decides.
        *filled, _ = self.parse_args_into_dataclasses(
            args=args, return_remaining_strings=True, look_for_args_file=False
        )
        return filled


@exit_on_invalid_argument(*GROUPS, flags=FLAGS)
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train."""
    training, privacy, model_args, data_args, card_args = read_flags(sys.argv[1:] if argv is None else argv)
    is_main = PartialState().is_main_process
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    users_flag = None if privacy.disable_dp else data_args.users_flag
    train, held_out = load_corpus(data_args, tokenizer, model_args.block_size, training.seed, users_flag=users_flag)
    _check_evaluation(training, data_args, held_out)
    if is_main:
        print(*_describe_corpus(train, held_out), sep="\n")
    set_seed(training.seed)  # initial adapters; noise and sampling use secret keys
    model = prepared_model(model_args)
    require_embeddings(model, tokenizer, model_args.model_name_or_path, {"text": (train.ids, train.starts)})
    unit, length = data_args.unit, model_args.block_size
    card = card_of(training, privacy, model_args, data_args, card_args)
    trainer = make_trainer(model, tokenizer, training, privacy, unit, train, held_out, max_length=length, card=card)
    output = trainer.train(resume_from_checkpoint=_checkpoint(training))
    if training.dry_run:
        return
    results = {"train loss": output.training_loss, "run time [s]": output.metrics["train_runtime"]}
    if held_out is not None:
        results["held-out loss"] = trainer.evaluate()["eval_loss"]
    if is_main:
        print(*(f"{name:<22} {value:.4f} (not private)" for name, value in results.items()), sep="\n")
    PartialState().destroy_process_group()


def read_flags(line: Sequence[str]) -> tuple[Any, ...]:
    """(training, privacy, model, data, card) arguments. Prints a note for each old flag that it renamed."""
    known = set(canonical(GROUPS))
    words, notes = with_new_names(["--help" if word == _HELP_ALL else word for word in line], known)
    if not has_accelerator() and not any(word.startswith(("--use_cpu", "--use-cpu")) for word in words):
        words.append("--use_cpu")  # otherwise several processes would not join
    try:
        groups = parse(*GROUPS, args=words, description=__doc__, parser=TrainerParser)
    except InvalidArgument:
        raise
    except ValueError as error:  # errors of transformers
        raise InvalidArgument("flags", HIDDEN, " ".join(str(error).split())) from error
    _, privacy, *_ = groups
    if privacy.disable_dp:
        refuse_unread(given_fields(words, GROUPS), ONLY_PRIVATE, NOT_READ, privacy)
    if PartialState().is_main_process:
        print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    return groups


def load_corpus(
    data: CorpusArguments, tokenizer: Any, length: int, seed: int, *, users_flag: str | None = None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """(training data, held-out data or None), one row per text. `users_flag`: see `load_texts`."""
    records = load_texts(
        str(data.train_file),
        flag="--train_file",
        column=data.text_column,
        author_column=data.author_column,
        tokenizer=tokenizer,
        users_flag=users_flag,
    )
    held_out: list[Record] = []
    if data.validation_file is not None:
        held_out = load_texts(
            data.validation_file,
            flag="--validation_file",
            column=data.text_column,
            split="validation",
            tokenizer=tokenizer,
        )
    elif data.held_out_share:
        records, held_out = hold_out(records, data.held_out_share, seed)
        if not held_out or not records:
            refuse(
                "--held_out_share", data.held_out_share, "leaves one side empty; change it, or give --validation_file"
            )
    train = tokenize(records, tokenizer, length)
    if data.unit.samples_authors:
        train = replace(train, authors=group_by_author([record.author for record in records]))
    return train, tokenize(held_out, tokenizer, length) if held_out else None


def _describe_corpus(train: TokenizedDataset, held_out: TokenizedDataset | None) -> list[str]:
    lines = [
        f"texts                  {len(train):,} in training, {train.num_cut:,} cut to --block_size",
        f"held out               {0 if held_out is None else len(held_out):,} texts",
    ]
    if train.authors is not None:
        lines.append(f"authors                {len(train.authors):,}, at most {train.authors.largest:,} texts each")
    return lines


def prepared_model(model_args: CorpusModelArguments) -> Any:
    """The model with its trained parameters. `DPTrainer` compares the engine's gradients with autograd's."""
    model = load_model(model_args.model_name_or_path, dtype=torch.float32, device=torch.device("cpu"))
    require_context(model, model_args.block_size)
    choose_parameters(model, model_args)
    return model


def choose_parameters(model: Any, model_args: CorpusModelArguments) -> None:
    """Add adapters, or make all parameters trainable."""
    if not model_args.lora_r:
        choose_trainable(model, ["all"])
        return
    names = {name.rpartition(".")[2] for name in linear_layers(model)}
    targets = model_args.lora_target_modules or ([_GPT2_TARGET] if _GPT2_TARGET in names else DEFAULT_TARGETS)
    rank, alpha, dropout = model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout
    add_lora(model, rank=rank, alpha=alpha, targets=targets, dropout=dropout)


def make_trainer(
    model: Any,
    tokenizer: Any,
    training: Any,
    privacy: PrivacyArguments,
    unit: PrivacyUnit,
    train: TokenizedDataset,
    held_out: TokenizedDataset | None,
    *,
    max_length: int,
    card: CardFields = NO_FIELDS,
) -> DPTrainer:
    """A Trainer that samples texts of up to `max_length` tokens, or authors with up to k of their texts."""
    features = RowFeatures(train)
    rows: RowFeatures | AuthorItems = features
    rows_per_unit: int | np.ndarray = 1
    if train.authors is not None:
        rows = AuthorItems(features, train.authors, unit.examples)
        rows_per_unit = rows.counts
    return DPTrainer(
        model,
        training,
        AuthorCollator(tokenizer),
        rows,
        privacy_args=privacy,
        losses=None if train.authors is None else AuthorLosses(),
        rows_per_unit=rows_per_unit,
        privacy_unit=unit,
        max_length=max_length,
        card=card,
        eval_dataset=None if held_out is None else RowFeatures(held_out),
    )


def card_of(
    training: Any, privacy: PrivacyArguments, model: CorpusModelArguments, data: CorpusArguments, card: CardArguments
) -> CardFields:
    """What the model card says besides the guarantee."""
    program = "torchrun --nproc_per_node {processes} scripts/nlg_reddit/fine_tune.py --output_dir OUT"
    name = {"model_name_or_path": published_name(card.base_model_name or model.model_name_or_path)}
    return with_recipe(card.fields(), training, privacy, model, data, program=program, names=name)


def _check_evaluation(training: Any, data: CorpusArguments, held_out: TokenizedDataset | None) -> None:
    """Refuse evaluation without held-out texts, and settings that let the result depend on texts without noise."""
    if held_out is None and training.eval_strategy != "no":
        refuse("--eval_strategy", str(training.eval_strategy), "needs --validation_file or a --held_out_share above 0")
    if held_out is None or data.validation_file is not None:
        return
    remedy = "depends on the loss on held-out texts, without noise; give public texts as --validation_file"
    if training.load_best_model_at_end:
        refuse("--load_best_model_at_end", True, remedy)
    if training.lr_scheduler_type == "reduce_lr_on_plateau":
        refuse("--lr_scheduler_type", str(training.lr_scheduler_type), remedy)


def _checkpoint(training: Any) -> str | bool | None:
    """The value of --resume_from_checkpoint: a folder, or True for `latest`."""
    given = training.resume_from_checkpoint
    return True if given in ("latest", "True", "true") else given


if __name__ == "__main__":
    main()
