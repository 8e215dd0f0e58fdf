"""Conversations in any of their spellings to messages with a role and plain text, as every chat template takes them."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune.data.rows import Number, as_text, to_python

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "claude": "assistant",
    "agent": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
_PYTHON_OBJECTS = re.compile(r"\s*\[?\s*\{\s*'")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEAKERS = frozenset({"role", "from"})
_WORDS = frozenset({"content", "value", "parts", "tool_calls"})
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_CONTENT_KEYS = ("content", "value", "text", "message", "parts")


class BadMessageError(Exception):
    """A conversation that cannot be trained. The arguments are the reason and what was found."""

    def __init__(self, reason: str, found: str) -> None:
        super().__init__(reason, found)
        self.reason = reason
        self.found = found


def is_speaker(value: Any) -> bool:
    """Whether a value is an object with the role of a message. An e-mail or a payment has a `from` too."""
    if not isinstance(value, dict):
        return False
    return any(str(value.get(key)).strip().lower() in _ROLES for key in _SPEAKERS)


def is_conversation(value: Any) -> bool:
    """Whether a list's objects all are messages, at least one of them with a known role."""
    return (
        isinstance(value, list)
        and all(isinstance(item, dict) and item.keys() & _SPEAKERS and item.keys() & _WORDS for item in value)
        and any(map(is_speaker, value))
    )


def parse_messages(value: Any, unused: Counter[str] | None = None) -> list[dict[str, Any]]:
    """Return plain messages. Raises BadMessageError. Count in `unused` what they have and no message takes."""
    value = parse_embedded(value)
    if not isinstance(value, list):
        raise BadMessageError("not a list of messages", "the conversation is not a list; write [{role, content}, ...]")
    if not value:
        raise BadMessageError("no message", "the conversation is empty; remove the row")
    messages = [_message(number, item) for number, item in enumerate(value, start=1)]
    if unused is not None:
        fields = {f"the message field {key!r}" for item in value for key in _THOUGHTS if item.get(key)}
        unused.update(sorted(fields))
    return messages


def check_conversation(messages: Sequence[dict[str, Any]]) -> None:
    """Raise BadMessageError unless a turn of the assistant can be trained and no other turn is empty."""
    trained = 0
    for number, message in enumerate(messages, start=1):
        has_content = bool(message["content"].strip()) or bool(message.get("tool_calls"))
        if message["role"] == "assistant" and message.get("weight", 1):
            if not has_content:
                raise BadMessageError("empty answer", f"message {number}, of the assistant, is empty; remove it")
            trained += 1
        elif message["role"] == "user" and not has_content:
            raise BadMessageError("empty message", f"message {number}, of the user, is empty; remove it")
    if not trained:
        found = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise BadMessageError(
            "no answer to train", f"no turn of the assistant with a weight other than 0 (roles: {found}); add an answer"
        )


def parse_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Return the schemas of the tools. Raises BadMessageError."""
    value = parse_embedded(value)
    if value is None or value in ("", []):
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadMessageError("tools cannot be read", "`tools` is not a list of JSON schemas")
    tools = to_python(value)
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def parse_embedded(value: Any) -> Any:
    """Return the value of a list or an object that a cell holds as text, as in a CSV file; other text stays."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value, parse_constant=lambda name: None if name == "NaN" else name)
    except (ValueError, RecursionError):
        pass
    if _PYTHON_OBJECTS.match(value):  # pandas writes lists to CSV as Python shows them
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
    return value


def system_text(value: Any) -> str:
    """Return a system message, which may have parts as messages have. Raises BadMessageError."""
    if isinstance(value, dict):
        value = next((value[key] for key in _CONTENT_KEYS if value.get(key) is not None), value)
    if not isinstance(value, (dict, list)):
        return as_text(value)
    try:
        return _content(0, value)
    except BadMessageError as error:
        raise BadMessageError(error.reason, "the system message has a part that is not text; write text") from error


def user_turn(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant_turn(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def _message(number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadMessageError("not a list of messages", f"message {number} is not an object; write {{role, content}}")
    named = {str(key).strip().lower(): item for key, item in value.items()}
    role_name = next((named[key] for key in ("role", "from", "speaker") if named.get(key)), None)
    role = _ROLES.get(str(role_name).strip().lower()) if role_name is not None else None
    if role is None:
        known = "system, user, assistant or tool"
        raise BadMessageError("unknown role", f"message {number} has the role {str(role_name)[:40]!r}; use {known}")
    content = next((named[key] for key in _CONTENT_KEYS if named.get(key) is not None), None)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(number, [parse_embedded(content)])}
    message: dict[str, Any] = {"role": role, "content": _content(number, content)}
    calls = parse_embedded(named.get("tool_calls")) or []
    if legacy := parse_embedded(named.get("function_call")):
        calls = [*calls, legacy]
    if calls:
        if role != "assistant":
            raise BadMessageError("tool call of another role", f"message {number}, of the {role}, calls a tool")
        message["tool_calls"] = _calls(number, calls)
    for key in ("tool_call_id", "name"):
        if named.get(key) is not None:
            message[key] = as_text(named[key])
    if named.get("weight") is not None:
        message["weight"] = _weight(number, named["weight"])
    return message


def _content(number: int, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, Number)):
        return str(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadMessageError("content is not text", f"the content of message {number} is {as_text(value)[:40]}")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(str(part))
        elif isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = str(part.get("type", "unknown"))[:40] if isinstance(part, dict) else type(part).__name__
            raise BadMessageError(
                "content is not text", f"message {number} has a part of type {kind!r}; only text can be trained"
            )
    return "".join(texts)


def _calls(number: int, values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list):
        raise BadMessageError("tool call cannot be read", f"the tool_calls of message {number} are not a list")
    calls = []
    for value in values:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadMessageError("tool call cannot be read", f"a tool call of message {number} names no function")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = parse_embedded(arguments) if arguments not in (None, "") else {}
        if not isinstance(arguments, dict):
            raise BadMessageError(
                "tool call cannot be read",
                f"the arguments of {function['name'][:40]!r} in message {number} are not a JSON object",
            )
        call = {"type": "function", "function": {"name": function["name"], "arguments": to_python(arguments)}}
        identity = value.get("id")
        calls.append(({"id": as_text(identity)} if identity is not None else {}) | call)
    return calls


def _weight(number: int, value: Any) -> int:
    text = as_text(value).strip().lower()
    if text in ("0", "0.0", "false"):
        return 0
    if text in ("1", "1.0", "true"):
        return 1
    raise BadMessageError("weight is neither 0 nor 1", f"the weight of message {number} is {text[:20]}; give 0 or 1")
