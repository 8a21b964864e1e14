"""The forms that rows come in, and how a row of each becomes a record.

The first row decides the form of a data set, by its columns. So every row of it has the same meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from dptune._validate import refuse
from utils.data.answers import ASSISTANT, CONTENT, ROLE, Message
from utils.data.prompts import AS_IS, CHAT, UNCONDITIONAL
from utils.data.record import Record, RecordMaker
from utils.data.tool_calls import CALL_ID, CALLS, NAME, TOOL, TOOLS, calls_of, tools_of
from utils.files.cells import Place, is_text, kind_of, text_of
from utils.files.tables import Row, show_columns

# ShareGPT's names of who speaks.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "system": "system",
}
_INPUT, _SYSTEM = "input", "system"
_BETWEEN = "\n\n"  # an instruction and its input
_FLAGS = {name: f"--{name}_column" for name in ("text", "prompt", "answer", "messages")}
_LEFT_OUT = (CALLS, "function_call", CALL_ID)  # where they are not used

COLUMN_FLAGS = tuple(_FLAGS.values())

Make = Callable[[Row, RecordMaker, Place], Record]


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
        columns: the columns that every row has.
        make: makes a row's record.
        more: columns that a row may have, and that are used.
        lists: which of `columns` hold lists.
        chat: whether the tokenizer's chat template is needed.
        style: the prompt style that sampling needs; None for that of the run.
    """

    columns: tuple[str, ...]
    make: Make
    more: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    chat: bool = False
    style: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """All columns that are used."""
        return self.columns + self.more

    def fits(self, row: Row) -> bool:
        """Whether a first row has this form."""
        return all(name in row for name in self.columns) and all(isinstance(row[name], list) for name in self.lists)


@dataclass(frozen=True)
class NamedColumns:
    """The columns that the user named, because they are called otherwise: those of one form, or none.

    Attributes:
        text: the column of whole texts.
        prompt, answer: those of an instruction and its answer.
        messages: the column of conversations.

    Raises:
        InvalidArgument: they are of several forms, or an answer alone.
    """

    text: str | None = None
    prompt: str | None = None
    answer: str | None = None
    messages: str | None = None

    def __post_init__(self) -> None:
        given = {flag: getattr(self, name) for name, flag in _FLAGS.items() if getattr(self, name) is not None}
        prompt, answer = _FLAGS["prompt"], _FLAGS["answer"]
        if given.keys() == {answer}:
            refuse(answer, given[answer], f"give {prompt} too")
        if len(given) > 1 and given.keys() != {prompt, answer}:
            first, second, *_ = given
            refuse(second, given[second], f"rows have one form, so leave out {first}")

    @property
    def given(self) -> dict[str, str]:
        """{flag: column}."""
        named = {flag: getattr(self, name) for name, flag in _FLAGS.items()}
        return {flag: column for flag, column in named.items() if column is not None}


AS_USUAL = NamedColumns()


def form_of(row: Row, style: str, place: Place, named: NamedColumns) -> Form:
    """The form of a data set.

    Args:
        row: the first row.
        style: the prompt style.
        place: where the row is.
        named: the columns that the user named.

    Raises:
        InvalidArgument: the row has no known form, or lacks a column that the user named. The message has its columns.
    """
    for flag, column in named.given.items():
        if column not in row:
            refuse(flag, column, f"no such column in {place.path}, which has {show_columns(row)}; name one of them")
    if style == UNCONDITIONAL:
        form = _instruction_alone(named.prompt or "instruction")
        if not form.fits(row):
            told = f"--prompt_style {style} learns `instruction`, or --prompt_column"
            refuse(place.flag, place.path, f"found the columns {show_columns(row)}; {told}")
        return form
    if named.prompt is not None and named.answer is None:
        refuse(_FLAGS["prompt"], named.prompt, f"give {_FLAGS['answer']} too")
    found = next((form for form in _forms(named, row) if form.fits(row)), None)
    if found is None:
        accepted = ", or ".join(dict.fromkeys("/".join(form.columns) for form in FORMS))
        by = f"{_FLAGS['prompt']} and {_FLAGS['answer']}, or by {_FLAGS['text']}"
        remedy = f"name them {accepted}; or say which they are, by {by}"
        refuse(place.flag, place.path, f"found the columns {show_columns(row)}; {remedy}")
    return found


def _forms(named: NamedColumns, row: Row) -> tuple[Form, ...]:
    """The forms that may be, the first one that fits before the others."""
    if named.text is not None:
        return (_whole(named.text),)
    if named.prompt is not None and named.answer is not None:
        return (_instructed(named.prompt, named.answer),)
    if named.messages is not None:
        turns = row[named.messages]
        shared = isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)
        return (_shared(named.messages) if shared else _conversation(named.messages),)
    return FORMS


def _instructed(question: str, answer: str) -> Form:
    """An instruction with its answer, and perhaps an input, which stands below the instruction."""
    return Form((question, answer), partial(_make_instructed, question, answer), more=(_INPUT,))


def _make_instructed(question: str, answer: str, row: Row, maker: RecordMaker, place: Place) -> Record:
    return maker.instructed(_with_input(row, question, place), text_of(row, answer, place))


def _instruction_alone(question: str) -> Form:
    """An instruction that is learned itself."""
    return Form((question,), partial(_make_instruction_alone, question), more=(_INPUT,))


def _make_instruction_alone(question: str, row: Row, maker: RecordMaker, place: Place) -> Record:
    return maker.instructed("", _with_input(row, question, place))


def _with_input(row: Row, question: str, place: Place) -> str:
    """An instruction, and its input below it."""
    asked = text_of(row, question, place)
    if row.get(_INPUT) is None or question == _INPUT:
        return asked
    return joined_input(asked, text_of(row, _INPUT, place))


def joined_input(instruction: str, given: str) -> str:
    """An instruction with its input below it, as Alpaca's data sets have them.

    >>> joined_input("Translate.", "Bonjour"), joined_input("Say hello.", " ")
    ('Translate.\\n\\nBonjour', 'Say hello.')
    """
    return f"{instruction}{_BETWEEN}{given}" if given.strip() else instruction


def _completed(row: Row, maker: RecordMaker, place: Place) -> Record:
    """A rendered prompt and its completion."""
    return maker.completed(text_of(row, "prompt", place), text_of(row, "completion", place))


def _completed_turns(row: Row, maker: RecordMaker, place: Place) -> Record:
    """The turns of a prompt and those of its completion, as TRL has them. Only the completion's answers are learned."""
    asked = messages_of(row["prompt"], place, "prompt")
    turns = [*asked, *messages_of(row["completion"], place, "completion")]
    return maker.conversation(turns, learned_from=len(asked), tools=tools_of(row.get(TOOLS), place))


def _conversation(column: str) -> Form:
    """A conversation, of which every answer is learned, and perhaps the tools that it may call."""
    return Form((column,), partial(_make_conversation, column), more=(TOOLS,), chat=True, style=CHAT)


def _make_conversation(column: str, row: Row, maker: RecordMaker, place: Place) -> Record:
    return maker.conversation(messages_of(row[column], place, column), tools=tools_of(row.get(TOOLS), place))


def _shared(column: str) -> Form:
    """A conversation in ShareGPT's words. A column `system` begins it."""
    return Form((column,), partial(_make_shared, column), more=(_SYSTEM,), chat=True, style=CHAT)


def _make_shared(column: str, row: Row, maker: RecordMaker, place: Place) -> Record:
    turns = messages_of(row[column], place, column, speakers=_SPEAKERS)
    system = "" if row.get(_SYSTEM) is None else text_of(row, _SYSTEM, place)
    first = [{ROLE: _SYSTEM, CONTENT: system}] if system.strip() else []
    return maker.conversation([*first, *turns])


def _whole(column: str) -> Form:
    """A text that is learned whole."""
    return Form((column,), partial(_make_whole, column), style=AS_IS)


def _make_whole(column: str, row: Row, maker: RecordMaker, place: Place) -> Record:
    return maker.answered("", text_of(row, column, place))


def messages_of(value: object, place: Place, column: str, speakers: Mapping[str, str] | None = None) -> list[Message]:
    """The turns of a conversation, each with a role and a text.

    Args:
        value: a list of {"role", "content"}, where the content is text, or a list of parts of text. An assistant may
            have "tool_calls", with or without a content, and what a tool said "name" and "tool_call_id".
        place, column: where it stands, for errors.
        speakers: {name: role} of turns that are {"from", "value"} instead.

    Raises:
        InvalidArgument: it is something else, or a turn has what would be left out: a picture, or a call
            that is no assistant's.
    """
    turns = list(value) if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        what = "{role, content}" if speakers is None else "{from, value}"
        place.refuse(f"{column} must be a list of at least one {what}, not {type(value).__name__}")
    return [_message(turn, number, place, speakers) for number, turn in enumerate(turns, start=1)]


def _message(turn: Mapping[str, object], number: int, place: Place, speakers: Mapping[str, str] | None) -> Message:
    shared = speakers is not None and "from" in turn
    who, what = ("from", "value") if shared else (ROLE, CONTENT)
    more = {} if shared else _of_tools(turn, number, place)
    if (name := next((name for name in _LEFT_OUT if turn.get(name) and name not in more), None)) is not None:
        place.refuse(f"message {number} has {name}, which would be left out; write the call into its content as text")
    content = _joined(turn.get(what), number, place)
    if content is None and CALLS in more:
        content = ""
    for key, own in ((who, turn.get(who)), (what, content)):
        if not is_text(own):
            place.refuse(f"message {number} has no text as its {key} ({kind_of(own)}); give a string")
    role = str(turn[who])
    if shared and speakers is not None:
        if role.strip().lower() not in speakers:
            place.refuse(f"message {number} is from none of {', '.join(speakers)}; give messages of role and content")
        role = speakers[role.strip().lower()]
    return {ROLE: role, CONTENT: str(content), **more}


def _of_tools(turn: Mapping[str, object], number: int, place: Place) -> Message:
    """The members of a turn that belong to tools: the calls of an assistant, or which call a tool's result is of."""
    if turn.get(ROLE) == ASSISTANT and turn.get(CALLS):
        return {CALLS: calls_of(turn[CALLS], number, place)}
    if turn.get(ROLE) == TOOL:
        return {name: str(turn[name]) for name in (NAME, CALL_ID) if is_text(turn.get(name)) and turn[name]}
    return {}


def _joined(content: object, number: int, place: Place) -> object:
    """The text of a content that is given in parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type", "text") == "text"]
    if len(texts) < len(content) or not all(is_text(text) for text in texts):
        place.refuse(f"message {number} has a part that is no text; only text can be learned")
    return "".join(map(str, texts))


# The first form that fits is used; other columns are ignored.
FORMS = (
    _instructed("instruction", "answer"),
    _instructed("instruction", "output"),
    Form(("prompt", "completion"), _completed_turns, (TOOLS,), ("prompt", "completion"), chat=True, style=CHAT),
    Form(("prompt", "completion"), _completed, style=AS_IS),
    _conversation("messages"),
    _shared("conversations"),
    _whole("text"),
)
