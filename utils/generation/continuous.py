"""Drawing texts by transformers' continuous batching: a waiting text takes the place of one that ends at once.

`generate` in batches draws until the longest text of a batch has ended; here the device stays full until few are left.
The texts follow from `--seed` and `--batch_size` as long as nothing interrupts the run; one that goes on draws what is
missing with other random numbers.

What the library would do in silence, or say in a log only, and what is done about it: it drops a repetition penalty
(`SamplingArguments` refuses one), it does not look at stop strings (they are looked for here), and it hands back what
it has when a request fails or its thread dies (here that ends the run; finished texts are kept).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import refuse
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn, finish, holds_stop, require_positions, sampling_config
from utils.generation.batches import TextJob, batch_seed

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import GenerationOutput

_PAGE_TOKENS = 256  # the library's default, whose name differs between versions
_STEP_TOKENS = 512  # most tokens of one forward pass; a longer prompt is read in several
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0


class ContinuousBackend:
    """Draws with a model of this process; arguments and errors as `GenerateBackend`'s.

    `batch_size` texts are drawn at once, and the cache is as large as they need at most.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments) -> None:
        require_positions(model, sampling.max_length)
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._config = sampling_config(model, tokenizer, sampling)
        model.generation_config = GenerationConfig()  # else its own defaults fill in what the flags leave out

    def draw(
        self, jobs: Sequence[TextJob], done: Container[int], *, rank: int = 0, world: int = 1
    ) -> Iterator[Sequence[tuple[TextJob, Drawn]]]:
        """See `Backend.draw`."""
        share = [job for job in jobs if job.index not in done][rank::world]
        if not share:
            return
        waiting = {str(job.index): job for job in share}
        with self._managed(batch_seed(self._sampling.seed, share)) as manager:
            for name, job in waiting.items():
                room = self._sampling.max_length - len(job.ids)
                streaming = self._sampling.stop is not None  # hands out unfinished texts too
                manager.add_request(list(job.ids), request_id=name, max_new_tokens=room, streaming=streaming)
            manager.start()  # now that all are there: which are drawn together does not depend on the clock
            while waiting:
                output = self._next(manager)
                if output is None or output.request_id not in waiting:
                    continue
                if output.is_finished() or self._is_stopped(manager, output):
                    yield [(waiting.pop(output.request_id), self._finish(output))]

    @contextmanager
    def _managed(self, seed: int) -> Iterator[ContinuousBatchingManager]:
        """The library's manager, not started yet; the global random numbers, which it seeds, are put back."""
        sampling = self._sampling
        pages = -(-sampling.max_length // _PAGE_TOKENS) + 1
        settings = ContinuousBatchingConfig(
            num_blocks=sampling.batch_size * pages + 1,
            max_batch_tokens=max(_STEP_TOKENS, sampling.batch_size),
            max_requests_per_batch=sampling.batch_size,
            seed=seed,
        )
        device = self._model.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            manager = self._model.init_continuous_batching(copy(self._config), settings)
            try:
                yield manager
            finally:
                if manager.is_running():
                    manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)
                manager.destroy()

    def _next(self, manager: ContinuousBatchingManager) -> GenerationOutput | None:
        """The next output if there is one soon; ends the run if there will be none, or if it is an error."""
        output = manager.get_result(timeout=_POLL_SECONDS)
        error = None if output is None else output.error
        if output is None and not manager.is_running():
            error = str(manager.background_thread_status.fatal_error or "its thread ended")
        if error is not None and "out of memory" in error:
            remedy = "does not fit in memory; halve it and run again, which continues this run"
            refuse("--batch_size", self._sampling.batch_size, remedy)
        if error is not None:
            raise RuntimeError(f"continuous batching failed: {error}; run again with --backend hf")
        return output

    def _is_stopped(self, manager: ContinuousBatchingManager, output: GenerationOutput) -> bool:
        """Whether an unfinished text holds a stop string; it is then drawn no further."""
        if not holds_stop(self._tokenizer, output.generated_tokens, self._sampling.stop or ()):
            return False
        manager.cancel_request(output.request_id)
        return True

    def _finish(self, output: GenerationOutput) -> Drawn:
        return finish(self._tokenizer, output.generated_tokens, self._config.eos_token_id, self._sampling.stop or ())
