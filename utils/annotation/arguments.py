"""The command line of `scripts/annotate.py`. The key is not a flag: it comes only from the environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dptune._validate import refuse, require_count, require_positive
from utils.annotation.files import Prices
from utils.cli.endpoints import OPENAI_KEY, require_address

TOKEN_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")


@dataclass
class AnnotationArguments:
    """The instructions, and where the answers go."""

    _argument_group_name = "annotation"

    input_file: str = field(metadata={"help": "JSONL (or .json, .csv, .parquet) with a column `instruction`"})
    output_dir: str = field(metadata={"help": "folder for the answers; an interrupted run resumes in it"})
    retry_set_aside: bool = field(
        default=False, metadata={"help": "retry rows that an earlier run set aside, with the same settings"}
    )


@dataclass
class EndpointArguments:
    """The endpoint, and how it is asked."""

    _argument_group_name = "endpoint"

    base_url: str = field(metadata={"help": "address without /chat/completions, such as http://127.0.0.1:8000/v1"})
    model: str = field(metadata={"help": "the endpoint's name of the model"})
    max_tokens: int = field(default=1024, metadata={"help": "maximum tokens per answer; longer ones are set aside"})
    token_limit_field: str = field(
        default="max_tokens",
        metadata={"help": "the endpoint's name of that limit", "choices": TOKEN_LIMIT_FIELDS},
    )
    temperature: float | None = field(default=None, metadata={"help": "sampling temperature; default: the endpoint's"})
    system_prompt: str | None = field(default=None, metadata={"help": "system prompt of every request; default: none"})
    max_concurrency: int = field(default=8, metadata={"help": "maximum number of requests at once"})
    timeout: float = field(default=120.0, metadata={"help": "time-out of an attempt without a response, in seconds"})
    max_retries: int = field(default=6, metadata={"help": "attempts after the first, with growing waits between"})
    price_per_million_input: float | None = field(default=None, metadata={"help": "price of prompt tokens (cost)"})
    price_per_million_output: float | None = field(default=None, metadata={"help": "price of answer tokens (cost)"})

    def __post_init__(self) -> None:
        require_address(self.base_url, flag="--base_url", key_variable=OPENAI_KEY)
        if not self.model.strip():
            refuse("--model", self.model, "is blank; name the model")
        require_count("--max_tokens", self.max_tokens)
        require_count("--max_concurrency", self.max_concurrency)
        require_count("--max_retries", self.max_retries, minimum=0)
        require_positive("--timeout", self.timeout)
        for name in ("temperature", "price_per_million_input", "price_per_million_output"):
            value = getattr(self, name)
            if value is not None and value != 0:
                require_positive(f"--{name}", value)

    @property
    def request(self) -> dict[str, object]:
        """The settings sent with every instruction, by their names in the chat completions API."""
        asked: dict[str, object] = {"model": self.model, self.token_limit_field: self.max_tokens}
        return asked if self.temperature is None else asked | {"temperature": self.temperature}

    @property
    def settings(self) -> dict[str, object]:
        """What answers depend on besides the instruction. The address is not included: a server may move."""
        return {**self.request, "system_prompt": self.system_prompt}

    @property
    def prices(self) -> Prices:
        """Prices for the cost."""
        return Prices(self.price_per_million_input, self.price_per_million_output)

    @property
    def host(self) -> str:
        """Host and port of the address."""
        return urlsplit(self.base_url).netloc
