"""Dialogues of records: OpenAI's `messages`, ShareGPT's `conversations`, and common variants of either.

Every field of a record is used, or the record is refused with its line; parts that a chat template cannot render are
counted as notes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gptjax.config.errors import DataError
from gptjax.core.files import parse_json
from gptjax.data.chat import Message
from gptjax.data.records import Record

# Roles of templates, and their names in data sets (LLaMA-Factory's data/README.md, axolotl, OpenAI).
ROLE_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai", "function_call"),
    "tool": ("tool", "observation", "function", "function_response", "ipython"),
}
ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}
TRAIN_KEYS = ("weight", "train", "training", "loss")  # of a turn: 0 or false excludes it from the loss
CALL_KEYS = ("tool_calls", "function_call")  # of a turn: its tool calls
TEXT_TYPES = (None, "text", "input_text", "output_text")  # types of text parts of a content list


class Note(NamedTuple):
    """Part of a record that is not used, as in `3 turns without text are left out`."""

    unit: str
    message: str


NO_TEXT = Note("turn", "without text left out")
NO_WEIGHT = Note("turn", "of an assistant read but excluded from the loss, as the data says")
CALLS_ALONE = Note("turn", "with tool calls alone left out, which the chat template does not write")
CALLS = Note("turn", "read without its tool calls, which the chat template does not write")
TOOLS = Note("dialogue", "read without its tools, which the chat template does not write")
SYSTEM = Note("dialogue", "read without its field 'system', as it begins with another system turn")


class Dialogue(NamedTuple):
    """Dialogue of a record.

    Attributes:
      messages: role and content of each, and tool_calls if the template renders them.
      in_loss: flag of each message; only assistant messages with True are in the loss.
      tools: tools that may be called, in the form that templates take.
      notes: one for each turn or part that is not used.
    """

    messages: list[Message]
    in_loss: list[bool]
    tools: list[Any]
    notes: list[Note]


def read(record: Record, template: str) -> Dialogue:
    """Reads the dialogue of a record.

    Args:
      record: has `messages` or `conversations`, and optionally `system` and `tools`.
      template: text of the chat template that will render it; tools and tool calls are kept if their names, `tools`
        and `tool_calls`, occur in it.

    Raises:
      DataError: the record has neither field, or they are malformed.
    """
    dialogue = Dialogue([], [], [], [])
    for number, turn in enumerate(_turns(record), 1):
        _add(dialogue, turn, f"{record.where}, turn {number}", template)
    _add_system(dialogue, record)
    tools = _tools(record)
    if "tools" in template:
        return dialogue._replace(tools=tools)
    dialogue.notes.extend([TOOLS] if tools else [])
    return dialogue


def _turns(record: Record) -> list[Mapping[str, Any]]:
    name = next((name for name in ("messages", "conversations") if record.fields.get(name) is not None), "")
    if not name:
        raise DataError(
            f"{record.where} has no field 'messages' or 'conversations', which data.examples.form=chat reads"
        )
    turns: Any = record.fields[name]
    names = "role and content" if name == "messages" else "from and value"
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and turn.keys() & {"role", "from"} and turn.keys() & {"content", "value", *CALL_KEYS}
        for turn in turns
    ):
        raise DataError(f"{record.where} has {name!r} that is not a list of objects with {names}")
    return turns


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _add(dialogue: Dialogue, turn: Mapping[str, Any], where: str, template: str) -> None:
    role, content = role_of(turn, where), _text(_first(turn, "content", "value"), where)
    message: dict[str, Any] = {"role": role, "content": content or ""}
    calls = _calls(turn, where)
    if calls and "tool_calls" in template:
        message["tool_calls"] = calls
    elif calls and content:
        dialogue.notes.append(CALLS)
    elif calls or content is None:
        dialogue.notes.append(CALLS_ALONE if calls else NO_TEXT)
        return
    in_loss = _is_trainable(turn, where)
    if role == "assistant" and not in_loss:
        dialogue.notes.append(NO_WEIGHT)
    if role not in ROLE_NAMES:
        dialogue.notes.append(Note("turn", f"of the unknown role {role!r} read but excluded from the loss"))
    dialogue.messages.append(message)
    dialogue.in_loss.append(in_loss)


def role_of(turn: Mapping[str, Any], where: str) -> str:
    """Returns the role of a turn as templates name it, or as in the record if it is unknown.

    Raises:
      DataError: the role is not text.
    """
    role = _first(turn, "role", "from")
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"{where} has a role that is {_kind(role)}")
    return ROLES.get(role.strip().lower(), role)


def _kind(value: Any) -> str:
    return "empty" if value is None or isinstance(value, str) else f"{type(value).__name__} and not text"


def _text(content: Any, where: str) -> str | None:
    # Joins parts by newlines, as vLLM does (vllm/entrypoints/chat_utils.py).
    if content is None or isinstance(content, str):
        return content
    parts = [content] if isinstance(content, dict) else content
    if not isinstance(parts, list):
        raise DataError(f"{where} has a content that is {_kind(content)}")
    return "\n".join(_part(part, where) for part in parts) if parts else None


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict):
        if part.get("type") not in TEXT_TYPES:
            raise DataError(f"{where} has a part of the type {part['type']!r}, and only text is read")
        part = part.get("text")
    if not isinstance(part, str):
        raise DataError(f"{where} has a part without a text that could be read")
    return part


def _is_trainable(turn: Mapping[str, Any], where: str) -> bool:
    flags = {name: turn[name] for name in TRAIN_KEYS if turn.get(name) is not None}
    for name, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(f"{where} has {name!r} that is neither 0 nor 1, false nor true: {value!r}")
    return all(flags.values())


def _calls(turn: Mapping[str, Any], where: str) -> list[Any]:
    # In the form that transformers' templates take: arguments that are the JSON text of an object are parsed.
    calls = turn.get("tool_calls")
    if not calls and turn.get("function_call"):
        calls = [{"type": "function", "function": turn["function_call"]}]
    if not calls:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where} has tool calls that are not a list of objects")
    return [_with_arguments(call, where) for call in calls]


def _with_arguments(call: dict[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where} has a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.lstrip().startswith("{"):
        arguments = parse_json(arguments, f"{where}, arguments of {function['name']}")
    parsed = function | {"arguments": arguments}
    return call | {"function": parsed} if "function" in call else {"type": "function", "function": parsed}


def _add_system(dialogue: Dialogue, record: Record) -> None:
    system = record.fields.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"{record.where} has 'system' that is {_kind(system)}")
    if not system:
        return
    if not dialogue.messages or dialogue.messages[0]["role"] != "system":
        dialogue.messages.insert(0, {"role": "system", "content": system})
        dialogue.in_loss.insert(0, False)
    elif dialogue.messages[0]["content"] != system:
        dialogue.notes.append(SYSTEM)


def _tools(record: Record) -> list[Any]:
    tools = record.fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, f"{record.where}, tools")
    if isinstance(tools, dict):
        tools = [tools]
    if tools and not isinstance(tools, list):
        raise DataError(f"{record.where} has 'tools' that are not a list")
    return tools or []


def missing_assistant_reason(records: Iterable[Record]) -> str:
    """Returns a message that names the roles of dialogues without any assistant turn; "" if there is one."""
    roles = dict.fromkeys(role_of(turn, record.where) for record in records for turn in _turns(record))
    if "assistant" in roles:
        return ""
    present, names = ", ".join(map(repr, roles)) or "none", ", ".join(ROLE_NAMES["assistant"])
    return f"no turn is an assistant's: the roles are {present}, and an assistant is called {names}"
