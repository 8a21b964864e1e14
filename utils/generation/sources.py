"""The source of texts: a model in this process, or a model on a server.

The arguments are checked before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from dptune._validate import present, refuse
from utils.cli.launch import compute_dtype, sharding_of_launch
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.generation.backends import Backend
from utils.generation.continuous import ContinuousBackend
from utils.generation.files import digest_of_files
from utils.generation.hf import GenerateBackend
from utils.models.arguments import ModelArguments
from utils.models.loading import load_adapter, load_model
from utils.models.sharded import describe_shards


@dataclass(frozen=True)
class Source:
    """A source of texts.

    Attributes:
        identity: what the texts depend on, JSON values by name.
        load: loads the source and returns its backend.
    """

    identity: dict[str, object]
    load: Callable[[], Backend]


def find_source(
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    adapter: AdapterArguments,
    sampling: SamplingArguments,
) -> Source:
    """The source that the flags name. Raises `InvalidArgument` for flags that contradict each other."""
    if sampling.backend == "vllm":
        return _server(tokenizer, model_args, adapter, sampling)
    return _local(accelerator, tokenizer, model_args, adapter, sampling)


def _local(
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    adapter: AdapterArguments,
    sampling: SamplingArguments,
) -> Source:
    """The model in this process, on the device and in the precision of the launch."""
    sharding = sharding_of_launch()
    if sharding is not None and sampling.backend == "continuous":
        refuse("--backend", "continuous", "cannot use sharded weights; give hf, or a configuration without FSDP")
    merge = adapter.merge_lora and sharding is None and model_args.qbits == 16
    dtype = compute_dtype(accelerator.mixed_precision, accelerator.device)

    def load() -> Backend:
        model = load_model(
            model_args.model_name_or_path,
            **model_args.hub,
            dtype=dtype,
            device=accelerator.device,
            bits=model_args.qbits,
            sharding=sharding,
            attention=model_args.attn_implementation,
        )
        if sharding is not None:
            accelerator.print(describe_shards(model, accelerator.num_processes))
        if adapter.lora_weights_path is not None:
            load_adapter(model, adapter.lora_weights_path, merge=merge)
        backend = ContinuousBackend if sampling.backend == "continuous" else GenerateBackend
        return backend(model, tokenizer, sampling)

    weights = [_digest_of_weights(Path(model_args.model_name_or_path)) if accelerator.is_main_process else None]
    identity = {"dtype": str(dtype), "merge_lora": merge, "weights_sha256": broadcast_object_list(weights)[0]}
    return Source(identity, load)


def _digest_of_weights(folder: Path) -> str | None:
    """Digest of a model in a folder, whose files may change; None for a model on the hub."""
    files = [path for suffix in ("*.safetensors", "*.bin", "config.json") for path in sorted(folder.glob(suffix))]
    return digest_of_files(*files) if files else None


def _server(
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    adapter: AdapterArguments,
    sampling: SamplingArguments,
) -> Source:
    """The model at `--vllm_url`. Its name represents weights, adapter and precision, which the server decides."""
    from utils.generation.server import ServerBackend, find_model  # the client takes a second to import

    if adapter.lora_weights_path is not None:
        remedy = "the server loads the adapter: start it with --lora-modules NAME=FOLDER and give --vllm_model NAME"
        refuse("--lora_weights_path", adapter.lora_weights_path, remedy)
    if model_args.qbits != 16:
        refuse("--qbits", model_args.qbits, "the server decides the precision; leave it out with --backend vllm")
    if model_args.attn_implementation is not None:
        remedy = "the server decides it; leave it out with --backend vllm"
        refuse("--attn_implementation", model_args.attn_implementation, remedy)
    name = find_model(present(sampling.vllm_url, "server"), sampling.vllm_model)
    source = model_args.hub
    backend = ServerBackend(name, tokenizer, model_args.model_name_or_path, sampling, **source)
    return Source({"dtype": None, "merge_lora": None, "vllm_model": name}, lambda: backend)
