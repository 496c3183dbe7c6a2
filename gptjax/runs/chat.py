"""A dialogue as a prompt, by the chat template of a run.

Nothing here draws a token, and nothing reads a terminal: who asks and who answers are functions.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console
from gptjax.data.chat import Message, Template, read_template, render
from gptjax.data.tokenizers import from_hf as hf_tokenizers
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.runs.directory import CHAT_TEMPLATE

ANSWER, NEXT = "the-answer-that-is-looked-for", "what-is-asked-next"


def load_template(workdir: Path, file: Path | None = None) -> Template:
    """The chat template of a run, or the one in a file.

    Raises:
      ConfigError: there is none, or jinja2 is not installed.
      DataError: it cannot be read, or is none of Jinja's.
    """
    path = file or workdir / CHAT_TEMPLATE
    if file is None and not path.exists():
        raise ConfigError(
            f"{workdir} has no chat template; give one of Jinja's, as Hugging Face has them, to --chat_template"
        )
    return read_template(path)._replace(names=hf_tokenizers.special_names(workdir / "tokenizer" / "hf"))


def prompt_ids(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """The ids of a dialogue that an answer follows.

    They begin with what the tokenizer begins a document with only where the template says so, as transformers has it,
    but with a tuned prompt always.

    Raises:
      ConfigError: jinja2 is not installed.
      DataError: a message has the name of a special token in it, so that a turn could be forged; the template refuses
        the dialogue; a character that the tokenizer does not have.
    """
    for message in messages:
        _check(message, tokenizer)
    return [*tokenizer.prompt, *tokenizers.encode_special(tokenizer, render(template, messages, tokenizer))]


def ends(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """What ends an answer, as stop strings: the tokenizer's end by name, and what the template puts after an answer.

    The latter is a special token such as `<|im_end|>`; where a template has none there, the text up to the next
    question.

    Raises:
      ConfigError: jinja2 is not installed, or the template leaves answers out.
      DataError: the template fails.
    """
    special = tokenizers.special_tokens(tokenizer)
    turns = [("user", "hello"), ("assistant", ANSWER), ("user", NEXT)]
    text = render(template, [dict(role=role, content=said) for role, said in turns], tokenizer, answer_next=False)
    _, answer, after = text.partition(ANSWER)
    if not answer:
        raise ConfigError("the chat template leaves out what the assistant says; it is none for a dialogue")
    between = after.partition(NEXT)[0]
    first = max((name for name in special if between.lstrip().startswith(name)), key=len, default="")
    end = [name for name, token in special.items() if token == tokenizer.end]
    return tuple(dict.fromkeys(stop for stop in [*end, first or between.rstrip()] if stop))


def fitted(
    template: Template, messages: Sequence[Message], tokenizer: Tokenizer, room: int
) -> tuple[list[Message], list[int]]:
    """The dialogue that fits and its ids: the oldest questions are left out with their answers, a system message never.

    Args:
      template, messages, tokenizer: as of `prompt_ids`; the last message is a question.
      room: the most ids.

    Raises:
      ConfigError, DataError: as of `prompt_ids`; the last question alone is too long.
    """
    kept = list(messages)
    first = 1 if kept[0]["role"] == "system" else 0
    while len(ids := prompt_ids(template, kept, tokenizer)) > room:
        if len(kept) - first < 3:
            raise DataError(f"this makes a prompt of {len(ids)} tokens, and there is room for {room}; say it shorter")
        del kept[first : first + 2]
    return kept, ids


def dialogue(
    ask: Callable[[], str | None],
    answer: Callable[[list[int], tuple[str, ...]], str],
    template: Template,
    tokenizer: Tokenizer,
    room: int,
    system: str = "",
    tell: Callable[[str], None] = console.say,
) -> list[Message]:
    """Asks and answers in turn until nobody asks; gives the messages that are remembered at the end.

    Args:
      ask: gives the next line; None or "/exit" ends, "/reset" forgets all but the system message.
      answer: from a prompt's ids and stop strings to a text.
      template: of the dialogue.
      tokenizer: whose ids they are.
      room: the most ids of a prompt: what the model reads, less what an answer may take. Where a dialogue gets longer,
        its oldest questions are forgotten with their answers.
      system: what the model is told first; "": nothing.
      tell: gets a line for the person who asks: what was forgotten, or why a question cannot be.

    Raises:
      ConfigError: jinja2 is not installed, or the template is none for a dialogue.
      DataError: the template has no place for a system message, or that has a special token in it.
    """
    begin: list[Message] = [dict(role="system", content=system)] if system else []
    stop = ends(template, tokenizer)
    for message in begin:
        _check(message, tokenizer)
        render(template, [message, dict(role="user", content=NEXT)], tokenizer)
    messages = begin
    while (line := ask()) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            messages = begin
        elif line.strip():
            asked = [*messages, dict(role="user", content=line)]
            try:
                kept, ids = fitted(template, asked, tokenizer, room)
            except DataError as error:
                tell(str(error))
                continue
            if forgotten := (len(asked) - len(kept)) // 2:
                what = "question and its answer are" if forgotten == 1 else f"{forgotten} questions and answers are"
                tell(
                    f"the dialogue is longer than the {room} tokens that there is room for: the oldest {what} forgotten"
                )
            said = _without_special(answer(ids, stop), tokenizer)
            messages = [*kept, dict(role="assistant", content=said)]
    return messages


def _check(message: Message, tokenizer: Tokenizer) -> None:
    text = message["content"]
    name = next((name for name in tokenizers.special_tokens(tokenizer) if name in text), None)
    if name:
        raise DataError(f"what the {message['role']} says has the special token {name} in it; leave it out")
    # A tokenizer may see one in another spelling too.
    if tokenizers.encode_special(tokenizer, text) != tokenizers.encode(tokenizer, text):
        raise DataError(f"what the {message['role']} says has a special token in it; leave it out")


def _without_special(text: str, tokenizer: Tokenizer) -> str:
    # What a model says may have special tokens that do not end it; by name they would be refused in the next prompt.
    names = tokenizers.special_tokens(tokenizer)
    while name := next((name for name in names if name in text), None):
        text = text.replace(name, "")
    return text
