"""Drawing texts from a model in batches, and the share of each rank.

The batches are planned from all prompts and dealt over the ranks, and each has random numbers of its own. So the texts
depend on neither the number of ranks nor on interruptions: they follow from the model, the settings, `--seed` and
`--batch_size`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dptune._validate import refuse
from dptune.sharding import is_sharded
from utils.arguments import AdapterArguments, ModelArguments, SamplingArguments, public_config
from utils.generation_batches import Job, batch_seed, make_jobs, plan_batches
from utils.generation_files import FINAL_FILE, Row, append_rows, claim, digest, merge, read_rows, refuse_other_run
from utils.launch import compute_dtype, make_accelerator, sharding_of_launch
from utils.modeling import adapter_files, load_adapter, load_model, load_tokenizer
from utils.prompts import format_prompt
from utils.sharded_model import compute_device, describe_shards

# Fields that change where and how fast texts are drawn, not what they are drawn from.
_NOT_IDENTITY = {"output_dir", "batch_size", "lora_weights_path"}


@dataclass(frozen=True)
class Drawn:
    """One drawn text, its length in tokens, and whether the model ended it itself."""

    text: str
    tokens: int
    ended: bool


def sample_instructions(
    instructions: Sequence[str], model_args: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> None:
    """Draw one text for each instruction with everything the command line says, and print where they are.

    What can be wrong with the arguments is seen before the model is loaded, and nothing is written before it is.
    """
    accelerator, sharding = make_accelerator(), sharding_of_launch()
    merge = adapter.merge_lora and sharding is None and model_args.qbits == 16
    dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)
    source = {"token": model_args.access_token, "revision": model_args.revision}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    prompts = [format_prompt(instruction, sampling.prompt_style, tokenizer) for instruction in instructions]
    jobs = make_jobs(tokenizer, prompts, sampling.max_length)
    identity = run_identity(prompts, model_args, adapter, sampling) | {"dtype": str(dtype), "merge_lora": merge}
    refuse_other_run(Path(sampling.output_dir), identity)
    model = load_model(
        model_args.model_name_or_path,
        **source,
        dtype=dtype,
        device=accelerator.device,
        bits=model_args.qbits,
        sharding=sharding,
    )
    if sharding is not None:
        accelerator.print(describe_shards(model, accelerator.num_processes))
    if adapter.lora_weights_path is not None:
        load_adapter(model, adapter.lora_weights_path, merge=merge)
    rank, world, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    path = generate_all(model, tokenizer, jobs, sampling, identity=identity, rank=rank, world=world, wait=wait)
    accelerator.print(f"{len(jobs)} texts in {path}")
    accelerator.end_training()  # destroys the process group: left to the interpreter's exit it may abort


def run_identity(
    prompts: Sequence[str], model_args: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> dict[str, Any]:
    """What the texts follow from, as JSON values: settings, prompts, the content of the adapter, which must exist."""
    settings = public_config(model_args, adapter, sampling)
    files = [] if adapter.lora_weights_path is None else adapter_files(adapter.lora_weights_path)
    return {name: value for name, value in settings.items() if name not in _NOT_IDENTITY} | {
        "adapter_sha256": digest(*files) if files else None,
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def generate_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    sampling: SamplingArguments,
    *,
    identity: Mapping[str, Any],
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> Path:
    """Draw this rank's share of the texts; rank 0 merges those of all into `generations.jsonl`, whose path is returned.

    Args:
        model: on the device that draws.
        tokenizer: with a padding token.
        jobs: all texts to draw, with indexes 0 to n - 1, the same on every rank.
        sampling: `output_dir` may hold texts already; they are not drawn again.
        identity: what the texts follow from, JSON values by name; a folder takes texts of one identity only.
        rank, world: this process and how many there are; every rank makes this call.
        wait: returns once every rank has called it.

    Raises:
        InvalidArgument: a folder with texts of another identity, a `max_length` or a batch too large for the model.
    """
    output_dir = Path(sampling.output_dir)
    batches = plan_batches(jobs, sampling.batch_size, _max_spread(model, sampling))
    if rank == 0:
        claim(output_dir, identity)
    wait()
    done = read_rows(output_dir).keys()
    wait()  # all ranks must deal from the same rows, so none appends before all have read
    pending = [batch for batch in batches if any(job.index not in done for job in batch)]
    config = sampling_config(model, tokenizer, sampling)
    model.generation_config = GenerationConfig()  # else its own defaults fill in what the flags leave out
    _draw_share(model, tokenizer, pending[rank::world], done, sampling, config, rank)
    if is_sharded(model) and rank >= len(pending) % world > 0:
        # The others have one batch more, and need this rank's weights for it: it draws along, for nothing.
        _draw(model, tokenizer, pending[0], sampling, config)
    wait()
    if rank == 0:
        merge(output_dir, len(jobs))
    return output_dir / FINAL_FILE


def draw_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: Mapping[str, Any],
    *,
    max_length: int,
    seed: int,
) -> list[Drawn]:
    """One text for each prompt (a sequence of token ids), of at most `max_length` tokens together with its prompt.

    `config` holds arguments of `GenerationConfig`. Prompts are padded on the left. The random numbers follow from
    `seed`; the global generators are left as they were.
    """
    width = max(map(len, prompts))
    padded = [[config["pad_token_id"]] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    device = compute_device(model)
    with _seeded(seed, device):
        output_BT = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=GenerationConfig(**config, max_new_tokens=max_length - min(map(len, prompts))),
            synced_gpus=is_sharded(model),  # a rank whose texts have ended still gives its weights to the others
        )
    # Every prompt has its own room: a longer one than the batch's shortest ran beyond it.
    new = [ids[: max_length - len(prompt)] for ids, prompt in zip(output_BT[:, width:].tolist(), prompts, strict=True)]
    return [_finish(tokenizer, ids, config["eos_token_id"]) for ids in new]


def sampling_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingArguments
) -> dict[str, Any]:
    """Arguments of `GenerationConfig`: what the flags say, nothing of the model's own defaults but its end tokens.

    The tokenizer's end token is added to them, since that is the one training appends.
    """
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])}
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature != 0:
        drawn = {"do_sample": True, "temperature": sampling.temperature}
        drawn |= {"top_k": sampling.top_k, "top_p": sampling.top_p}
    return drawn | {
        "repetition_penalty": sampling.repetition_penalty,
        "eos_token_id": sorted(ends),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _draw_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Job]],
    done: Container[int],
    sampling: SamplingArguments,
    config: Mapping[str, Any],
    rank: int,
) -> None:
    """Draw `batches` one after another; the rows of each that are not done are on disk before the next begins."""
    texts = sum(job.index not in done for batch in batches for job in batch)
    tokens, start = 0, time.monotonic()
    with tqdm(total=texts, unit="text", disable=rank != 0) as bar:
        for batch in batches:
            drawn = _draw(model, tokenizer, batch, sampling, config)
            # A batch of which some rows are done was drawn whole, for the texts that an uninterrupted run has.
            rows = [_row(job, text) for job, text in zip(batch, drawn, strict=True) if job.index not in done]
            append_rows(Path(sampling.output_dir), rank, rows)
            tokens += sum(text.tokens for text in drawn)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
            bar.update(len(rows))


def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Job],
    sampling: SamplingArguments,
    config: Mapping[str, Any],
) -> list[Drawn]:
    """One text for each job of `batch`, by the batch's own random numbers."""
    prompts, seed = [job.ids for job in batch], batch_seed(sampling.seed, batch)
    try:
        return draw_batch(model, tokenizer, prompts, config, max_length=sampling.max_length, seed=seed)
    except torch.OutOfMemoryError:
        remedy = "does not fit in memory; halve it and run again, which continues this run"
        refuse("--batch_size", sampling.batch_size, remedy)


def _max_spread(model: PreTrainedModel, sampling: SamplingArguments) -> int:
    """How far prompt lengths within a batch may differ, in tokens.

    The shortest prompt gets `max_length` tokens, so the longest runs beyond that by the difference (and is cut), which
    must stay within the model's positions. A repetition penalty would take padding for text: it gets one length.
    """
    window = getattr(model.config, "max_position_embeddings", None) or sampling.max_length
    if sampling.max_length > window:
        refuse("--max_length", sampling.max_length, f"this model has positions for {window} tokens; give at most that")
    return 0 if sampling.repetition_penalty != 1 else window - sampling.max_length


def _finish(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> Drawn:
    """Cut at the first end token and decode. The space before the first word is part of its token, not of the text."""
    length = next((position for position, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Drawn(text.lstrip(), len(ids) if length is None else length + 1, length is not None)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that sampling uses, and put them back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _row(job: Job, drawn: Drawn) -> Row:
    return {"prompt": job.prompt, "text": drawn.text, "index": job.index, "ended": drawn.ended}
