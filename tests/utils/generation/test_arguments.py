"""Flags of sampling: what is out of range, and what a backend cannot do, are refused."""

from __future__ import annotations

import pytest

from dptune._validate import InvalidArgument
from utils.cli.flags import parse
from utils.generation.arguments import SamplingArguments


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--backend", "vllm"], "--backend='vllm': needs --vllm_url"),
        (["--vllm_url", "http://127.0.0.1:9/v1"], "--vllm_url="),
        (["--backend", "continuous", "--repetition_penalty", "1.2"], "--repetition_penalty=1.2: --backend continuous"),
        (["--stop", "fine", ""], "--stop="),
        (["--vllm_model", "m"], "--vllm_model='m': works only with --backend vllm"),
        (["--backend", "vllm", "--vllm_url", "localhost"], "--vllm_url="),
        (["--max_length", "1"], "--max_length=1: "),
        (["--batch_size", "0"], "--batch_size=0: "),
        (["--top_k", "-1"], "--top_k=-1: "),
        (["--top_p", "0"], "--top_p=0.0: "),
        (["--temperature", "-1"], "--temperature=-1.0: "),
        (["--repetition_penalty", "0"], "--repetition_penalty=0.0: "),
    ],
)
def test_mistakes_are_refused_by_flag(flags: list[str], told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(SamplingArguments, args=["--output_dir", "out", *flags])
    assert told in str(caught.value)


def test_greedy_sampling_is_a_temperature_of_zero() -> None:
    (sampling,) = parse(SamplingArguments, args=["--output_dir", "out", "--temperature", "0", "--top_k", "0"])
    assert (sampling.temperature, sampling.top_k, sampling.backend) == (0, 0, "hf")
