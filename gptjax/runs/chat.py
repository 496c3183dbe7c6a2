"""Dialogues as prompts, by the chat template of a run.

Nothing here generates or reads a terminal: the user and the model are functions.
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

ANSWER, NEXT = "the-answer-that-is-looked-for", "what-is-asked-next"  # placeholders, found in a rendered dialogue


def load_template(workdir: Path, file: Path | None = None) -> Template:
    """Loads the chat template of a run, or the one in a file.

    Raises:
      ConfigError: there is none, or jinja2 is not installed.
      DataError: the file cannot be read, or is no Jinja template.
    """
    path = file or workdir / CHAT_TEMPLATE
    if file is None and not path.exists():
        raise ConfigError(
            f"{workdir} has no chat template; give a Jinja template, as used by Hugging Face, to --chat_template"
        )
    return read_template(path)._replace(names=hf_tokenizers.special_names(workdir / "tokenizer" / "hf"))


def prompt_ids(template: Template, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of a dialogue that an answer follows.

    They begin with the tokenizer's beginning of a document only where the template has it, as in transformers, but
    always with a tuned prompt.

    Raises:
      ConfigError: jinja2 is not installed.
      DataError: a message contains a special token, which could forge a turn; the template refuses the dialogue; a
        character that the tokenizer does not have.
    """
    for message in messages:
        _check(message, tokenizer)
    return [*tokenizer.prompt, *tokenizers.encode_special(tokenizer, render(template, messages, tokenizer))]


def stop_strings(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns the stop strings of an answer: the tokenizer's end by name, and what the template puts after an answer.

    The latter is a special token such as `<|im_end|>`; where a template has none there, the text up to the next
    question.

    Raises:
      ConfigError: jinja2 is not installed, or the template leaves answers out.
      DataError: the template fails.
    """
    special = tokenizers.special_tokens(tokenizer)
    turns = [("user", "hello"), ("assistant", ANSWER), ("user", NEXT)]
    text = render(template, [dict(role=role, content=content) for role, content in turns], tokenizer, answer_next=False)
    _, answer, after = text.partition(ANSWER)
    if not answer:
        raise ConfigError("the chat template leaves out the assistant's messages; it cannot be used for a dialogue")
    between = after.partition(NEXT)[0]
    first = max((name for name in special if between.lstrip().startswith(name)), key=len, default="")
    end = [name for name, token in special.items() if token == tokenizer.end]
    return tuple(dict.fromkeys(stop for stop in [*end, first or between.rstrip()] if stop))


def fit(
    template: Template, messages: Sequence[Message], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Message], list[int]]:
    """Removes the oldest questions and their answers until the dialogue fits; returns the dialogue and its ids.

    Args:
      template, messages, tokenizer: as for `prompt_ids`; the last message is a question. A system message stays.
      max_length: maximum number of ids.

    Raises:
      ConfigError, DataError: as for `prompt_ids`, or the last question alone is too long.
    """
    fitted = list(messages)
    first = 1 if fitted[0]["role"] == "system" else 0
    while len(ids := prompt_ids(template, fitted, tokenizer)) > max_length:
        if len(fitted) - first < 3:
            raise DataError(f"the prompt has {len(ids)} tokens, and there is room for {max_length}; shorten it")
        del fitted[first : first + 2]
    return fitted, ids


def dialogue(
    read_line: Callable[[], str | None],
    answer: Callable[[list[int], tuple[str, ...]], str],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    system: str = "",
    notify: Callable[[str], None] = console.say,
) -> list[Message]:
    """Runs a dialogue until `read_line` returns None or "/exit"; returns the messages that remain at the end.

    Args:
      read_line: returns the next line of the user; "/reset" removes all messages but the system message.
      answer: from a prompt's ids and stop strings to a text.
      template: of the dialogue.
      tokenizer: of the model.
      max_length: maximum number of ids in a prompt: the model's context less the tokens of an answer. Where a dialogue
        gets longer, its oldest questions and answers are removed.
      system: system message; "": none.
      notify: called with a line for the user, when messages are removed or a question is refused.

    Raises:
      ConfigError: jinja2 is not installed, or the template cannot be used for a dialogue.
      DataError: the template has no place for a system message, or that contains a special token.
    """
    initial: list[Message] = [dict(role="system", content=system)] if system else []
    stop = stop_strings(template, tokenizer)
    for message in initial:
        _check(message, tokenizer)
        render(template, [message, dict(role="user", content=NEXT)], tokenizer)
    messages = initial
    while (line := read_line()) is not None and line.strip() != "/exit":
        if line.strip() == "/reset":
            messages = initial
        elif line.strip():
            extended = [*messages, dict(role="user", content=line)]
            try:
                fitted, ids = fit(template, extended, tokenizer, max_length)
            except DataError as error:
                notify(str(error))
                continue
            if n_dropped := (len(extended) - len(fitted)) // 2:
                pairs = "question and its answer are" if n_dropped == 1 else f"{n_dropped} questions and answers are"
                notify(f"the dialogue is longer than the {max_length} tokens that fit: the oldest {pairs} removed")
            reply = _without_special(answer(ids, stop), tokenizer)
            messages = [*fitted, dict(role="assistant", content=reply)]
    return messages


def _check(message: Message, tokenizer: Tokenizer) -> None:
    text = message["content"]
    name = next((name for name in tokenizers.special_tokens(tokenizer) if name in text), None)
    if name:
        raise DataError(f"the {message['role']} message contains the special token {name}; leave it out")
    # A tokenizer may recognize one in another spelling too.
    if tokenizers.encode_special(tokenizer, text) != tokenizers.encode(tokenizer, text):
        raise DataError(f"the {message['role']} message contains a special token; leave it out")


def _without_special(text: str, tokenizer: Tokenizer) -> str:
    # Special tokens in an answer that do not end it would be refused by name in the next prompt.
    names = tokenizers.special_tokens(tokenizer)
    while name := next((name for name in names if name in text), None):
        text = text.replace(name, "")
    return text
