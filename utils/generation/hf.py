"""Text generation with `generate` in batches, the default backend.

Batches are planned from all prompts and dealt over the ranks, and each has its own seed. So the texts depend on the
model, the settings, `--seed` and `--batch_size`, but not on the number of ranks or on interruptions.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from copy import copy

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from dptune._validate import refuse
from dptune.sharding import compute_device, is_sharded
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn, drawn_from, holds_stop, require_positions, sampling_config
from utils.generation.batches import TextJob, batch_seed, plan_batches
from utils.generation.choosing import TokenChoice, chances
from utils.generation.decoding import Decoding


class GenerateBackend:
    """Generates one batch after another with a model in this process.

    Args:
        model: on the device to use; its own sampling defaults are removed.
        tokenizer: with a padding token.
        sampling: how to sample; `batch_size` texts are generated at once.

    Raises:
        InvalidArgument: `max_length` is too large for the model. `draw` raises it if a batch does not fit in memory.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._spread = max_spread(model, sampling)
        self._config = sampling_config(model, tokenizer, sampling)
        model.generation_config = GenerationConfig()  # so that the model's defaults are not used

    def draw(
        self, jobs: Sequence[TextJob], done: Container[int], *, rank: int = 0, world: int = 1
    ) -> Iterator[Sequence[tuple[TextJob, Drawn]]]:
        """See `Backend.draw`. A partly finished batch is generated whole, as in an uninterrupted run."""
        batches = plan_batches(jobs, self._sampling.batch_size, self._spread)
        pending = [batch for batch in batches if any(job.index not in done for job in batch)]
        for batch in pending[rank::world]:
            pairs = zip(batch, self._draw(batch), strict=True)
            yield [(job, drawn) for job, drawn in pairs if job.index not in done]
        if is_sharded(self._model) and rank >= len(pending) % world > 0:
            # Other ranks have one batch more and need this rank's weights for it, so it runs a batch too.
            self._draw(pending[0])

    def _draw(self, batch: Sequence[TextJob]) -> list[Drawn]:
        """One text per job of `batch`, with the batch's own seed."""
        sampling = self._sampling
        try:
            return draw_batch(
                self._model, self._tokenizer, [job.ids for job in batch], self._config,
                max_length=sampling.max_length, seed=batch_seed(sampling.seed, batch), stop=sampling.stop or (),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            remedy = "does not fit in memory; halve it and run again to resume"
            refuse("--batch_size", sampling.batch_size, remedy)


def draw_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    max_length: int,
    seed: int,
    stop: Sequence[str] = (),
) -> list[Drawn]:
    """One text for each prompt (a sequence of token ids); prompt and text have at most `max_length` tokens.

    Prompts are padded on the left. Each text has random numbers of its own, which depend on `seed` and its place in the
    batch; the global generators are not used.
    """
    width, new_tokens = max(map(len, prompts)), max_length - min(map(len, prompts))
    padded = [[config.pad_token_id] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    device, own = compute_device(model), copy(config)
    own.update(max_new_tokens=new_tokens, do_sample=False, temperature=None, top_k=None, top_p=None)
    numbers = chances(seed, len(prompts), new_tokens, device)
    output_BT = model.generate(
        input_ids=torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=own,
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stop, width)] if stop else []),
        # A rank whose texts have ended still shares its weights.
        custom_generate=Decoding(TokenChoice.of(config), numbers, in_step=is_sharded(model)),
    )
    # Cut each text to its own limit: generation ran until the limit of the shortest prompt.
    new = [ids[: max_length - len(prompt)] for ids, prompt in zip(output_BT[:, width:].tolist(), prompts, strict=True)]
    return [drawn_from(tokenizer, ids, config.eos_token_id, stop) for ids in new]


class StopStrings(StoppingCriteria):
    """Ends a text once its last tokens hold a stop string. This saves time; `finish` decides where to cut.

    `GenerationConfig.stop_strings` is not used, because it looks at the prompt too. A prompt that ends in a line break
    and a text that begins with one would match an empty line. It also matches the tokenizer's pieces instead of their
    text.

    Args:
        tokenizer: for decoding.
        stop: the stop strings.
        width: number of prompt columns, which are ignored.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self._tokenizer, self._stop, self._width = tokenizer, stop, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:  # noqa: ARG002
        """Which rows of `input_ids` [B, T] end here, bool [B]."""
        found = [holds_stop(self._tokenizer, ids, self._stop) for ids in input_ids[:, self._width :].tolist()]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)


def max_spread(model: PreTrainedModel, sampling: SamplingArguments) -> int:
    """How much prompt lengths within a batch may differ, in tokens.

    The text of the longest prompt runs beyond `max_length` by this difference before it is cut, which must stay within
    the model's positions. A repetition penalty would treat padding as text, so it allows no difference.
    """
    window = require_positions(model, sampling.max_length)
    return 0 if sampling.repetition_penalty != 1 else window - sampling.max_length
