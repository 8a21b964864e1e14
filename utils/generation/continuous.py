"""Text generation with transformers' continuous batching: when a text ends, the next one starts at once.

`generate` runs until the longest text of a batch has ended; here the device stays full until few texts are left. An
uninterrupted run depends only on `--seed` and `--batch_size`. A resumed run generates the missing texts with other
random numbers.

The library fails silently, or only in a log, in three ways that are handled here. It drops a repetition penalty
(`SamplingArguments` refuses one). It ignores stop strings (we look for them). It returns a partial text when a request
fails or its thread dies (we end the run and keep the finished texts).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import refuse
from dptune.devices import restored_randomness
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn, drawn_from, holds_stop, require_positions, sampling_config
from utils.generation.batches import TextJob, batch_seed

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.requests import GenerationOutput

_PAGE_TOKENS = 256  # the library's default, whose name differs between versions
_STEP_TOKENS = 512  # maximum number of tokens per forward pass; a longer prompt is read in several
_POLL_SECONDS = 1.0
_STOP_SECONDS = 60.0


class ContinuousBackend:
    """Generates with a model in this process; arguments and errors as for `GenerateBackend`.

    `batch_size` texts are generated at once, and the cache is large enough for them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments) -> None:
        require_positions(model, sampling.max_length)
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._config = sampling_config(model, tokenizer, sampling)
        model.generation_config = GenerationConfig()  # so that the model's defaults are not used

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
                streaming = self._sampling.stop is not None  # returns unfinished texts too
                manager.add_request(list(job.ids), request_id=name, max_new_tokens=room, streaming=streaming)
            manager.start()  # after adding all, so that the order does not depend on the clock
            while waiting:
                output = self._next(manager)
                if output is None or output.request_id not in waiting:
                    continue
                if output.is_finished() or self._is_stopped(manager, output):
                    yield [(waiting.pop(output.request_id), self._finish(output))]

    @contextmanager
    def _managed(self, seed: int) -> Iterator[ContinuousBatchingManager]:
        """The library's manager, not yet started. It seeds the global random generators, which are restored."""
        sampling = self._sampling
        pages = -(-sampling.max_length // _PAGE_TOKENS) + 1
        settings = ContinuousBatchingConfig(
            num_blocks=sampling.batch_size * pages + 1,
            max_batch_tokens=max(_STEP_TOKENS, sampling.batch_size),
            max_requests_per_batch=sampling.batch_size,
            seed=seed,
        )
        device = self._model.device
        with restored_randomness(device), torch.no_grad():
            manager = self._model.init_continuous_batching(copy(self._config), settings)
            try:
                yield manager
            finally:
                if manager.is_running():
                    manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)
                manager.destroy()

    def _next(self, manager: ContinuousBatchingManager) -> GenerationOutput | None:
        """The next output, or None if there is none soon. Raises if there was an error or the thread has ended."""
        output = manager.get_result(timeout=_POLL_SECONDS)
        error = None if output is None else output.error
        if output is None and not manager.is_running():
            error = str(manager.background_thread_status.fatal_error or "its thread ended")
        if error is not None and "out of memory" in error:
            remedy = "does not fit in memory; halve it and run again to resume"
            refuse("--batch_size", self._sampling.batch_size, remedy)
        if error is not None:
            raise RuntimeError(f"continuous batching failed: {error}; run again with --backend hf")
        return output

    def _is_stopped(self, manager: ContinuousBatchingManager, output: GenerationOutput) -> bool:
        """Whether an unfinished text holds a stop string; its generation is then cancelled."""
        if not holds_stop(self._tokenizer, output.generated_tokens, self._sampling.stop or ()):
            return False
        manager.cancel_request(output.request_id)
        return True

    def _finish(self, output: GenerationOutput) -> Drawn:
        return drawn_from(
            self._tokenizer, output.generated_tokens, self._config.eos_token_id, self._sampling.stop or ()
        )
