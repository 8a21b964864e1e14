"""A whole sampling run: prompts -> jobs -> backend -> journal -> files.

With every backend, a finished text is on disk before the next one is waited for, and an interrupted run resumes with
the missing texts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dptune._validate import refuse
from dptune._words import counted
from dptune.run.lock import FolderLock
from utils.cli.flags import public_config
from utils.cli.launch import compute_dtype, make_accelerator, ranks_of
from utils.data.prompts import AS_IS, ChatTemplateError, format_prompt
from utils.data.special_tokens import MarkedText, SpecialTokens, StandInLost
from utils.data.template_date import TEMPLATE_DATE, date_of_training, tells_date, today, told_date
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.generation.backends import Backend, Drawn
from utils.generation.batches import TextJob, make_jobs
from utils.generation.files import (
    FINAL_FILE,
    Generation,
    append_generations,
    digest_of_files,
    generation_journal,
    merge_generations,
    read_generations,
)
from utils.generation.outputs import SamplingSpeed, write_sampling_outputs
from utils.generation.sources import find_source
from utils.generation.trained_style import chosen_style
from utils.models.arguments import ModelArguments
from utils.models.embeddings import require_embeddings
from utils.models.loading import adapter_files, load_skeleton, load_tokenizer

# Settings that change where and how fast texts are generated or which files are written, not the distribution of texts.
_NOT_IDENTITY = {"output_dir", "batch_size", "lora_weights_path", "deduplicate", "vllm_url", "vllm_model"}


def sample_instructions(
    instructions: Sequence[str], model_args: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> Path | None:
    """Generate one text per instruction and print where they are.

    The arguments are checked before the model is loaded, and nothing is written before it is loaded.

    Returns:
        The finished file of texts on the main process; None on others.
    """
    accelerator = make_accelerator()
    tokenizer = load_tokenizer(
        model_args.model_name_or_path, token=model_args.access_token, revision=model_args.revision
    )
    ranks = ranks_of(accelerator)
    trained = adapter.lora_weights_path or model_args.model_name_or_path
    style, told = ranks.from_main(lambda: chosen_style(sampling.prompt_style, trained))
    accelerator.print(*told, sep="\n", end="\n" if told else "")
    sampling = replace(sampling, prompt_style=style)
    day = ranks.from_main(lambda: prompts_date(tokenizer, model_args.model_name_or_path, adapter, sampling))
    with told_date(day):
        prompts = make_prompts(instructions, style, tokenizer)
    jobs = make_jobs(tokenizer, prompts, sampling.max_length)
    if sampling.backend != "vllm":
        ids = np.concatenate([np.empty(0, dtype=np.int64), *(job.ids for job in jobs)]).astype(np.int64)
        starts = np.cumsum([0, *(len(job.ids) for job in jobs)])
        attention, dtype = (
            model_args.attn_implementation,
            compute_dtype(accelerator.mixed_precision, accelerator.device),
        )
        skeleton = load_skeleton(model_args.model_name_or_path, **model_args.hub, attention=attention, dtype=dtype)
        require_embeddings(skeleton, tokenizer, model_args.model_name_or_path, {"prompt": (ids, starts)})
    source = find_source(accelerator, tokenizer, model_args, adapter, sampling)
    identity = sampling_identity([prompt.text for prompt in prompts], model_args, adapter, sampling) | source.identity
    identity |= {TEMPLATE_DATE: day}
    folder, is_main = Path(sampling.output_dir), accelerator.is_main_process
    with FolderLock(enabled=is_main) as lock:
        lock.take(folder)
        generation_journal(folder).refuse_other_run(identity)
        backend = source.load()
        lock.make(folder)
        rank, world, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        path, speed = generate_all(backend, jobs, sampling, identity=identity, rank=rank, world=world, wait=wait)
        speeds = gather_object([speed])
        if is_main:
            print(f"{counted(len(jobs), 'text')} in {path}\n{write_sampling_outputs(path, sampling, speeds)}")
    accelerator.end_training()  # destroys the process group, which may abort at the interpreter's exit
    return path if accelerator.is_main_process else None


def prompts_date(
    tokenizer: PreTrainedTokenizerBase, model: str, adapter: AdapterArguments, sampling: SamplingArguments
) -> str | None:
    """The day that the chat template tells; None if it tells none.

    It is that of --template_date, of the training, of the texts that are in the folder already, or today.
    """
    if not tells_date(tokenizer):
        return None
    began = generation_journal(Path(sampling.output_dir)).recorded(TEMPLATE_DATE)
    given = sampling.template_date or date_of_training(adapter.lora_weights_path or model)
    return given or (began if isinstance(began, str) else today())


def make_prompts(instructions: Sequence[str], style: str, tokenizer: PreTrainedTokenizerBase) -> list[MarkedText]:
    """The prompt of each instruction, as in training. Special tokens that an instruction spells are text.

    Raises:
        InvalidArgument: the chat template fails. The message names the instruction by its number.
    """
    special, made = SpecialTokens(tokenizer), {}
    for number, instruction in enumerate(instructions, start=1):
        if instruction in made:
            continue
        try:
            asked = instruction if style == AS_IS else special.hidden(instruction)
            made[instruction], _ = special.shown(format_prompt(asked, style, tokenizer))
        except (ChatTemplateError, StandInLost) as error:
            refuse("--prompt_style", style, f"instruction {number}: {error}; change the instruction or the style")
    return [made[instruction] for instruction in instructions]


def sampling_identity(
    prompts: Sequence[str], model_args: ModelArguments, adapter: AdapterArguments, sampling: SamplingArguments
) -> dict[str, object]:
    """What the texts depend on, as JSON values: settings, prompts, and the content of the adapter."""
    settings = public_config(model_args, adapter, sampling)
    files = [] if adapter.lora_weights_path is None else adapter_files(adapter.lora_weights_path)
    if settings["backend"] == "hf":
        settings["backend"] = None  # so that folders of older versions, without backends, can resume
    return {name: value for name, value in settings.items() if name not in _NOT_IDENTITY} | {
        "adapter_sha256": digest_of_files(*files) if files else None,
        "num_prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def generate_all(
    backend: Backend,
    jobs: Sequence[TextJob],
    sampling: SamplingArguments,
    *,
    identity: Mapping[str, object],
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], object] = lambda: None,
) -> tuple[Path, SamplingSpeed]:
    """Generate this rank's share of the texts; rank 0 merges all shares into `generations.jsonl`.

    Args:
        backend: generates the texts.
        jobs: all texts to generate, with indexes 0 to n - 1, the same on every rank.
        sampling: texts that are already in `output_dir` are not generated again.
        identity: what the texts depend on, JSON values by name; a folder takes texts of one identity only.
        rank, world: this process and the number of processes; every rank makes this call.
        wait: returns once every rank has called it.

    Returns:
        The path of the merged file, and the speed of this process.

    Raises:
        InvalidArgument: the folder has texts of another identity, or the backend refuses.
    """
    output_dir = Path(sampling.output_dir)
    if rank == 0:
        generation_journal(output_dir).claim(identity)
    wait()
    done = read_generations(output_dir).keys()
    wait()  # no rank may append before all have read the same rows
    speed = _draw_share(backend, jobs, done, output_dir, rank, world)
    wait()
    if rank == 0:
        merge_generations(output_dir, len(jobs))
    return output_dir / FINAL_FILE, speed


def _draw_share(
    backend: Backend, jobs: Sequence[TextJob], done: Container[int], output_dir: Path, rank: int, world: int
) -> SamplingSpeed:
    """Generate the missing texts; finished ones are on disk before the next are waited for."""
    tokens, start, missing = 0, time.monotonic(), sum(job.index not in done for job in jobs)
    with tqdm(total=-(-missing // world), unit="text", disable=rank != 0) as bar:
        for finished in backend.draw(jobs, done, rank=rank, world=world):
            append_generations(output_dir, rank, [_row(job, drawn) for job, drawn in finished])
            tokens += sum(drawn.tokens for _, drawn in finished)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
            bar.update(len(finished))
    return SamplingSpeed(tokens, time.monotonic() - start)


def _row(job: TextJob, drawn: Drawn) -> Generation:
    return {"prompt": job.prompt, "text": drawn.text, "index": job.index, "ended": drawn.ended}
