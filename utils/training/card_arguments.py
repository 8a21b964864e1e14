"""Flags of training: what the model card says, besides the guarantee."""

from __future__ import annotations

from dataclasses import dataclass, field

from dptune.report.fields import CardFields
from utils.cli.flags import naming

# The engine's name of a field -> the flag.
CARD_FLAGS = {"base_model": "--base_model_name", "license": "--card_license", "languages": "--card_language"}


@dataclass
class CardArguments:
    """What the model card says. Nothing here changes the training."""

    _argument_group_name = "model card"

    base_model_name: str | None = field(
        default=None,
        metadata={
            "help": "name of the base model on the hub, which adapter_config.json and the card give instead of a path; "
            "by default the name or path that was trained from"
        },
    )
    card_license: str | None = field(
        default=None, metadata={"help": "licence of what is published, such as apache-2.0; by default to fill in"}
    )
    card_language: list[str] | None = field(
        default=None, metadata={"help": "languages of the texts, such as en de; by default to fill in"}
    )
    card_data: list[str] | None = field(
        default=None,
        metadata={"help": "names of the training data, as they may be published; by default to fill in"},
    )

    def __post_init__(self) -> None:
        self.fields()

    def fields(self, recipe: str | None = None) -> CardFields:
        """The fields of the card, with the command line that repeats the run."""
        with naming(CARD_FLAGS):
            languages, data = tuple(self.card_language or ()), tuple(self.card_data or ())
            return CardFields(self.base_model_name, self.card_license, languages, data, recipe)
