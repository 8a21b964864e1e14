"""What texts are drawn from: flags that do not go together are refused before anything is loaded or asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from dptune._validate import InvalidArgument
from tests.completion_server import CompletionServer, running
from utils.generation.arguments import AdapterArguments, SamplingArguments
from utils.generation.continuous import ContinuousBackend
from utils.generation.hf import GenerateBackend
from utils.generation.server import ServerBackend
from utils.generation.sources import Source, find_source
from utils.models.arguments import ModelArguments
from utils.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def _find(
    model_dir: Path, tokenizer: PreTrainedTokenizerBase, *, lora: str | None = None, qbits: int = 16, **kwargs: Any
) -> Source:
    model_args, adapter = ModelArguments(str(model_dir)), AdapterArguments(lora)
    model_args.qbits = qbits  # not through the constructor, which asks for bitsandbytes
    sampling = SamplingArguments("unused", max_length=40, **kwargs)
    return find_source(Accelerator(cpu=True), tokenizer, model_args, adapter, sampling)


@pytest.mark.parametrize(("backend", "kind"), [("hf", GenerateBackend), ("continuous", ContinuousBackend)])
def test_a_model_here_is_loaded_only_when_it_is_asked_for(
    backend: str, kind: type, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    source = _find(tiny_model_dir, tokenizer, backend=backend)
    weights = source.identity.pop("weights_sha256")
    assert re.fullmatch("[0-9a-f]{64}", weights)
    assert source.identity == {"dtype": "torch.float32", "merge_lora": True}
    assert isinstance(source.load(), kind)
    source = _find(tiny_model_dir / "absent", tokenizer, backend=backend)
    assert source.identity["weights_sha256"] is None
    with pytest.raises(InvalidArgument, match=r"^--model_name_or_path="):
        source.load()


def test_continuous_batching_and_sharding_are_refused_together(
    tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InvalidArgument, match=r"^--backend='continuous': cannot use sharded weights; give hf"):
        _find(tiny_model_dir, tokenizer, backend="continuous")
    assert _find(tiny_model_dir, tokenizer).identity["merge_lora"] is False


def test_a_servers_model_is_known_by_its_name(tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with running(CompletionServer(models=("base", "dptune"))) as server:
        source = _find(tiny_model_dir, tokenizer, backend="vllm", vllm_url=server.url, vllm_model="dptune")
    assert source.identity == {"dtype": None, "merge_lora": None, "vllm_model": "dptune"}
    assert isinstance(source.load(), ServerBackend)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"lora": "OUT/lora_weights.bin"}, r"^--lora_weights_path=.*--lora-modules"),
        ({"qbits": 4}, "^--qbits=4: the server decides"),
    ],
)
def test_what_is_the_servers_to_decide_is_refused(
    flags: dict[str, Any], expected: str, tiny_model_dir: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Else the base model would be sampled in silence."""
    with running(CompletionServer()) as server, pytest.raises(InvalidArgument, match=expected):
        _find(tiny_model_dir, tokenizer, backend="vllm", vllm_url=server.url, **flags)
