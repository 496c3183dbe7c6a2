"""Chat templates, which render a dialogue as text: Jinja templates as Hugging Face has them, or one of three by name.

jinja2, an optional dependency, renders them in its sandbox, as in transformers.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gptjax.config.errors import ConfigError, DataError
from gptjax.core.files import read_text
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

Message = Mapping[str, Any]  # {"role": "system", "user", "assistant" or "tool", "content": text}, tool_calls


class Template(NamedTuple):
    """Chat template.

    Attributes:
      text: Jinja source.
      names: special tokens by variable of the template, such as `bos_token`, that differ from those of the tokenizer.
    """

    text: str
    names: Mapping[str, str] = {}


# Templates by name: OpenAI's ChatML, Llama 3's, and one for tokenizers whose only special token is their end.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] }}"
        "{{ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "plain": (
        "{{ bos_token or eos_token }}{% for message in messages %}"
        "{{ message['role'] | capitalize + ': ' + message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
# Special tokens that they need.
REQUIRED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def get_template(name: str, tokenizer: Tokenizer) -> Template:
    """Returns the template of that name, or reads it from a file of that path.

    Raises:
      ConfigError: there is no such template, or jinja2 is not installed.
      DataError: it cannot be read, is not a Jinja template, or the tokenizer lacks its special tokens.
    """
    special = tokenizers.special_tokens(tokenizer)
    missing = [token for token in REQUIRED_TOKENS.get(name, ()) if token not in special]
    if missing:
        raise DataError(
            f"the tokenizer {tokenizer.name} has no {missing[0]}, which chat template {name} needs; take plain"
        )
    if name not in TEMPLATES and not Path(name).is_file():
        raise ConfigError(
            f"there is no chat template {name}; give a file with a Jinja template, or {', '.join(TEMPLATES)}"
        )
    return read_template(Path(name)) if name not in TEMPLATES else compile_template(TEMPLATES[name])


def read_template(path: Path) -> Template:
    """Reads a template from a file.

    Raises:
      ConfigError: jinja2 is not installed.
      DataError: it cannot be read, or is not a Jinja template.
    """
    try:
        return compile_template(read_text(path))
    except DataError as error:
        raise DataError(f"the chat template {path} cannot be read: {error}") from error


def compile_template(text: str) -> Template:
    """Compiles a template; raises the errors of `read_template`."""
    _compiled(text)
    return Template(text)


def render(
    template: Template,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    answer_next: bool = True,
    tools: Sequence[Any] = (),
) -> str:
    """Renders a dialogue as text.

    Args:
      template: chat template.
      messages: messages in order.
      tokenizer: tokenizer that `bos_token` and `eos_token` belong to.
      answer_next: if True, the text ends with the beginning of an answer (`add_generation_prompt`).
      tools: JSON schemas of the tools that may be called.

    Raises:
      ConfigError: jinja2 is not installed.
      DataError: the template refuses the dialogue, or fails.
    """
    by_id = {token: name for name, token in tokenizers.special_tokens(tokenizer).items()}
    first = (*tokenizer.begin[len(tokenizer.prompt) :], -1)[0]
    defaults = {"bos_token": by_id.get(first), "eos_token": by_id.get(end_id(tokenizer))}
    names = {key: name for key, name in defaults.items() if name} | dict(template.names)
    variables: dict[str, Any] = dict(
        messages=[dict(message) for message in messages], tools=list(tools) or None, documents=None
    )
    try:
        return _compiled(template.text).render(variables, add_generation_prompt=answer_next, **names)
    except Exception as error:  # whatever a template raises
        raise DataError(f"the chat template cannot show this dialogue: {_one_line(error)}") from error


def render_turns(
    template: Template,
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    in_loss: Sequence[bool],
    tools: Sequence[Any] = (),
) -> list[tuple[str, bool]]:
    """Renders a dialogue in pieces, each with a flag that is True for the answers of the assistant and their end.

    The beginning of a turn, such as its role, belongs to the piece before it, as in generation.

    Args:
      template, messages, tokenizer, tools: see `render`.
      in_loss: flag of each message; only assistant messages with True are in the loss.

    Raises:
      ConfigError: jinja2 is not installed.
      DataError: the template refuses the dialogue, or renders a prefix of a dialogue not as the beginning of its text.
    """
    pieces, written = list[tuple[str, bool]](), ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(template, messages[:number], tokenizer, tools=tools)
        after = render(template, messages[: number + 1], tokenizer, False, tools)
        if not (before.startswith(written) and after.startswith(before)):
            raise DataError(
                "the chat template renders a dialogue differently once it continues, so its turns cannot be separated"
            )
        turn = after[len(before) :]
        answer = turn.rstrip() if turn.strip() else turn  # line ends behind an answer are no part of it
        pieces += [(before[len(written) :], False), (answer, in_loss[number])]
        written = before + answer
    text = render(template, messages, tokenizer, False, tools)
    return [piece for piece in [*pieces, (text[len(written) :], False)] if piece[0]]


def end_id(tokenizer: Tokenizer) -> int:
    """Returns the id that ends a text, or -1 if there is none."""
    return -1 if tokenizer.end is None else tokenizer.end


@lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
    # As in transformers (utils/chat_template_utils.py), so that templates render the same.
    try:
        import jinja2
        from jinja2 import ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ConfigError("chat templates need jinja2: pip install 'gptjax[chat]'") from error

    class Generation(ext.Extension):
        """`{% generation %}` marks answers for training; here only its content is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    extensions: list[Any] = [Generation, ext.loopcontrols]
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    jinja.filters["tojson"] = _as_json
    jinja.globals["raise_exception"] = refuse
    jinja.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return jinja.from_string(text)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template is not a Jinja template: {_one_line(error)}") from error


def _as_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    # Jinja's own filter escapes &, < and > for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
