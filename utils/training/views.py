"""What makes the views of an example differ: dropout in the model, and token dropout in its input.

The views of an example are copies of its row with different random masks. Their gradients are averaged, and the average
is clipped. So an example moves the sum by at most C, however many views it has (De et al. 2022, "Unlocking
high-accuracy differentially private image classification through scale": augmentation multiplicity).

Token dropout draws from torch's generator, as dropout does. `dptune.randomness` gives the generator a secret seed in
every step. A row's masks depend neither on the row nor on the other rows.

Shapes: B rows, T tokens, V tokens of the model's vocabulary, R replacements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dptune._validate import refuse
from utils.data.special_tokens import SpecialTokens
from utils.models.trainable import Losses
from utils.training.view_arguments import ViewArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenDropout:
    """Losses of rows whose input tokens are replaced at random while the model is in training mode. Labels stay.

    Args:
        losses: (input_ids [B, T], further inputs) -> losses [B].
        model: its mode decides.
        probability: of replacing a token that may be replaced, independently of all others.
        replaceable: which tokens may be replaced, bool [V].
        replacements: the tokens of which one replaces a token, all equally likely, int64 [R].
    """

    def __init__(
        self, losses: Losses, model: nn.Module, probability: float, replaceable: Tensor, replacements: Tensor
    ) -> None:
        self._losses, self._model, self._probability = losses, model, probability
        self._replaceable, self._replacements = replaceable, replacements

    def __call__(self, input_ids: Tensor, *batch: Tensor, **named: Tensor) -> Tensor:
        seen = self._replaced(input_ids) if self._model.training else input_ids
        return self._losses(seen, *batch, **named)

    def _replaced(self, ids_BT: Tensor) -> Tensor:
        """The same tokens, some of them replaced. The host does not wait for the device."""
        shape, device = ids_BT.shape, ids_BT.device
        chosen_BT = torch.rand(shape, device=device).lt(self._probability) & self._replaceable[ids_BT]
        others_BT = self._replacements[torch.randint(len(self._replacements), shape, device=device)]
        return torch.where(chosen_BT, others_BT, ids_BT)


def with_token_dropout(
    losses: Losses, model: Any, tokenizer: PreTrainedTokenizerBase, probability: float, device: torch.device
) -> Losses:
    """`losses` with token dropout; unchanged with probability 0.

    If the tokenizer has a mask token, it is the replacement, because the model knows it as a gap. Decoders have none,
    and their unknown token is often the end token. For them the replacement is drawn from the vocabulary. All tokens
    are equally likely, because how often each occurs in the data is private.

    Args:
        losses: see `TokenDropout`.
        model: a transformers model, also inside PEFT's.
        tokenizer: the model's. Its special tokens, the padding among them, are never replaced.
        probability: see `TokenDropout`.
        device: where rows are.
    """
    if not probability:
        return losses
    size = len(model.get_input_embeddings().weight)
    replaceable = torch.ones(size, dtype=torch.bool)
    special = torch.tensor(sorted(SpecialTokens(tokenizer).ids), dtype=torch.int64)
    replaceable[special[special < size]] = False
    mask = tokenizer.mask_token_id
    known = mask is not None and mask < size
    replacements = torch.tensor([mask]) if known else replaceable[: len(tokenizer)].nonzero()[:, 0]
    return TokenDropout(losses, model, probability, replaceable.to(device), replacements.to(device))


def require_different_views(flags: ViewArguments, model: nn.Module) -> None:
    """Refuse several views of each example that would all be the same.

    Args:
        flags: how many, and the token dropout.
        model: with what is trained, such as adapters; may be on the meta device.

    Raises:
        InvalidArgument: nothing makes them differ.
    """
    if flags.views > 1 and not flags.token_dropout and not has_dropout(model):
        remedy = "the model has no dropout, so all views would be the same; give --token_dropout, such as 0.1"
        refuse("--views", flags.views, remedy)


def has_dropout(model: nn.Module) -> bool:
    """Whether a layer draws dropout masks in training, by its type or by a probability such as `attention_dropout`."""
    return any(
        (isinstance(module, nn.Dropout) and module.p > 0)
        or any(isinstance(value, float) and value > 0 for name, value in vars(module).items() if "drop" in name)
        for module in model.modules()
    )
