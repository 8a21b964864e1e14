"""Drawing by a server: what it is asked, how much at once, what happens when it fails, over real HTTP."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dptune._validate import InvalidArgument
from tests.completion_server import WEB_PAGE, Answer, CompletionServer, as_json, completion, running
from tests.gguf_files import save_gguf
from tests.tiny import save_tiny
from utils.cli.endpoints import VLLM_KEY
from utils.generation import server as generation_server
from utils.generation.arguments import SamplingArguments
from utils.generation.backends import Drawn
from utils.generation.batches import TextJob, make_jobs, seed_of
from utils.generation.server import ServerBackend, find_model
from utils.models.loading import load_tokenizer

PROMPTS = ["Abstract: ", "Hello, how are you?\n"] * 4
RATE_LIMITED = as_json({"error": {"message": "slow down"}}, 429, **{"retry-after-ms": "20"})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the test and its server, few retries."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(generation_server, "_RETRIES", 2)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny_model_dir))


def _draw(
    server: CompletionServer,
    tokenizer: PreTrainedTokenizerBase,
    base: Path,
    done: Container[int] = (),
    share: tuple[int, int] = (0, 1),
    **kwargs: Any,
) -> dict[TextJob, Drawn]:
    """All texts for PROMPTS that are not done."""
    settings = {"max_length": 40, "batch_size": 3, "vllm_url": server.url} | kwargs
    sampling = SamplingArguments(output_dir="unused", backend="vllm", **settings)
    backend = ServerBackend(find_model(server.url, None), tokenizer, str(base), sampling)
    jobs, (rank, world) = make_jobs(tokenizer, PROMPTS, 40), share
    pairs = [pair for finished in backend.draw(jobs, done, rank=rank, world=world) for pair in finished]
    assert len(dict(pairs)) == len(pairs), "a text came twice"
    return dict(pairs)


def test_every_job_is_asked_for_once_with_its_tokens_room_and_seed(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path
) -> None:
    with running(CompletionServer()) as server:
        texts = _draw(server, tokenizer, tiny_model_dir, seed=7)
    asked = {body["seed"]: body for body in server.requests}
    assert len(texts) == len(asked) == len(server.requests) == len(PROMPTS)
    for job, drawn in texts.items():
        body = asked[seed_of(7, job.index)]
        assert body["prompt"] == list(job.ids)
        assert body["max_tokens"] == 40 - len(job.ids)
        assert drawn == Drawn(f"text of {body['seed']}", 5, True)


def test_every_sampling_parameter_is_sent(tmp_path: Path) -> None:
    base = save_tiny(tmp_path)
    GenerationConfig(eos_token_id=[5, 9], temperature=0.1, do_sample=True).save_pretrained(base)
    how = {"temperature": 0.7, "top_k": 11, "top_p": 0.8, "repetition_penalty": 1.2, "stop": ["USER:"]}
    with running(CompletionServer()) as server:
        _draw(server, load_tokenizer(str(base)), base, **how)
        _draw(server, load_tokenizer(str(base)), base, top_k=0)
    sent, without_k = server.requests[0], server.requests[-1]
    assert {name: sent[name] for name in how} == how
    assert sent["stop_token_ids"] == [2, 5, 9]
    assert (sent["model"], sent["n"], sent["min_p"]) == ("dptune", 1, 0.0)
    assert without_k["top_k"] == -1


def test_a_base_without_generation_settings_gives_its_configurations_end_token(tmp_path: Path) -> None:
    base = save_tiny(tmp_path)
    (base / "generation_config.json").unlink()
    with running(CompletionServer()) as server:
        _draw(server, load_tokenizer(str(base)), base)
    assert server.requests[0]["stop_token_ids"] == [2]


def test_the_end_token_of_a_gguf_file_is_known(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "tiny.gguf")
    with running(CompletionServer()) as server:
        _draw(server, load_tokenizer(str(file)), file)
    assert server.requests[0]["stop_token_ids"] == [2]


def test_as_many_are_asked_for_at_once_as_the_batch_size_says(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path
) -> None:
    with running(CompletionServer(delay=0.1)) as server:
        _draw(server, tokenizer, tiny_model_dir, batch_size=3)
    assert server.at_once == 3


def test_what_is_done_is_not_asked_for_and_ranks_share_the_rest(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path
) -> None:
    with running(CompletionServer()) as server:
        whole = _draw(server, tokenizer, tiny_model_dir)
        shares = [_draw(server, tokenizer, tiny_model_dir, done={1, 6}, share=(rank, 2)) for rank in range(2)]
    assert sorted(job.index for share in shares for job in share) == [0, 2, 3, 4, 5, 7]
    assert shares[0] | shares[1] == {job: drawn for job, drawn in whole.items() if job.index not in {1, 6}}


def test_busy_and_failing_answers_are_asked_for_again(tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path) -> None:
    failing = as_json({"error": {"message": "oh"}}, 503, **{"retry-after-ms": "20"})
    trouble = {0: RATE_LIMITED, 2: failing, 5: RATE_LIMITED}
    with running(CompletionServer(trouble=trouble.get)) as server:
        texts = _draw(server, tokenizer, tiny_model_dir)
    assert len(texts) == len(server.requests) == len(PROMPTS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (as_json({"error": {"message": "unknown field"}}, 400), r"BadRequestError \(HTTP 400\); .*run again"),
        (RATE_LIMITED, "RateLimitError"),
        (WEB_PAGE, "returned no text for index"),
        ((200, {"Content-Type": "application/json"}, b"{torn"), "JSONDecodeError"),
        (as_json({"choices": []}), "returned no text for index"),
        (as_json(completion(None, None)), "finish_reason None"),
        (as_json(completion("half", "abort")), "finish_reason 'abort'"),
    ],
)
def test_a_lasting_failure_is_one_line_after_what_is_finished(
    answer: Answer, expected: str, tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path
) -> None:
    with running(CompletionServer(trouble=lambda number: answer if number >= 4 else None)) as server:
        sampling = SamplingArguments("unused", backend="vllm", vllm_url=server.url, batch_size=2, max_length=40)
        backend = ServerBackend("dptune", tokenizer, str(tiny_model_dir), sampling)
        drawing = backend.draw(make_jobs(tokenizer, PROMPTS, 40), ())
        finished: list[object] = []
        with pytest.raises(InvalidArgument, match=f"^--vllm_url='http.*{expected}"):
            _ = [finished.extend(pairs) for pairs in drawing]
    assert len(finished) == len(server.requests) == 4


def test_after_a_failure_no_more_is_asked_for(tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path) -> None:
    refused = as_json({"error": {"message": "unknown field"}}, 400)
    with running(CompletionServer(trouble=lambda _number: refused)) as server, pytest.raises(InvalidArgument):
        _draw(server, tokenizer, tiny_model_dir, batch_size=2)
    assert 1 <= server.asked <= 2


def test_a_servers_words_are_not_repeated(tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path) -> None:
    echoing = as_json({"error": {"message": "bad header Authorization: Bearer sk-SECRET"}}, 401)
    with (
        running(CompletionServer(trouble=lambda _number: echoing)) as server,
        pytest.raises(InvalidArgument, match=r"AuthenticationError \(HTTP 401\)") as caught,
    ):
        _draw(server, tokenizer, tiny_model_dir)
    assert "SECRET" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line() -> None:
    with running(CompletionServer()) as server:
        gone = server.url
    with pytest.raises(InvalidArgument, match=r"^--vllm_url='http.*APIConnectionError"):
        find_model(gone, None)


def test_a_text_is_cut_at_a_stop_string_and_at_the_limit_it_has_not_ended(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path
) -> None:
    answers = [as_json(completion(text, "length")) for text in (" One.\nUSER: more", " Two")] * 4
    with running(CompletionServer(trouble=answers.__getitem__)) as server:
        texts = _draw(server, tokenizer, tiny_model_dir, batch_size=1, stop=["USER:", "\n"])
    assert list(texts.values()) == [Drawn("One.", 5, True), Drawn("Two", 5, False)] * 4


def test_the_model_is_chosen_by_name_where_there_are_several() -> None:
    with running(CompletionServer(models=("base", "dptune"))) as server:
        assert find_model(server.url, "base") == "base"
        with pytest.raises(InvalidArgument, match=r"^--vllm_model=None: the server has base, dptune;"):
            find_model(server.url, None)
        with pytest.raises(InvalidArgument, match=r"^--vllm_model='other': the server has base, dptune;"):
            find_model(server.url, "other")
    with running(CompletionServer(models=None)) as server, pytest.raises(InvalidArgument, match="does not list models"):
        find_model(server.url, None)


def test_only_the_servers_own_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-admin")
    with running(CompletionServer()) as server:
        find_model(server.url, None)
        assert server.tokens == {"Bearer none"}
        monkeypatch.setenv(VLLM_KEY, "mine")
        find_model(server.url, None)
    assert server.tokens == {"Bearer none", "Bearer mine"}


def test_every_text_of_every_seed_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(seed, index) for seed in range(3) for index in range(50)}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_answer_in_time_is_a_failure(
    tokenizer: PreTrainedTokenizerBase, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_server, "_TIMEOUT", 0.2)
    monkeypatch.setattr(generation_server, "_RETRIES", 0)
    with running(CompletionServer(delay=1.0)) as server, pytest.raises(InvalidArgument, match="APITimeoutError"):
        _draw(server, tokenizer, tiny_model_dir, batch_size=1)


def test_a_key_that_no_header_takes_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_KEY, "schlüssel")
    with pytest.raises(InvalidArgument, match=f"^{VLLM_KEY}: holds a character") as error:
        find_model("http://127.0.0.1:9/v1", None)
    assert "schl" not in str(error.value)
