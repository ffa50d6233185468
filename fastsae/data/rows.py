"""What a row of a dataset says: a text, or a dialogue as the tools of the field write it."""

import json
from dataclasses import dataclass
from typing import Any

from fastsae.settings.dataset_names import TEXT

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
# kinds of parts of a content, as chat APIs name them; of the others, where their text stands
TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
OTHER_PARTS = {
    "refusal": "refusal",
    "thinking": "thinking",
    "reasoning": "text",
    "tool_result": "content",
}
NESTED_PARTS = ("tool_result", "reasoning")  # whose text can be a list of parts again
REASONING = ("reasoning_content", "reasoning", "thinking")  # of a turn, beside its content
BESIDE_CONTENT = ("tool_calls", "function_call", "refusal", *REASONING)
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("query", "response"),
    ("prompt", "chosen"),
)


@dataclass
class Example:
    """One row of a dataset. `line` leads back to it: its line in JSON lines and plain texts, else
    the number of its row, item or file, from 1."""

    line: int
    messages: list  # [{"role", "content"}]
    is_text: bool = False  # the row had a plain text, which became one user turn
    label: str | None = None


def example_of(number: int, row: Any, text_field: str, label_field: str | None) -> Example:
    """The Example that a parsed row is. ValueError `what. remedy.` where it is none.

    A TEXT_FIELD that was named goes before messages, these before conversations, these before text.
    """
    if not isinstance(row, dict):
        raise ValueError(f'expected a JSON object, got {_json_kind(row)}. write {{"text": ...}}.')
    is_text = text_field != TEXT and row.get(text_field) is not None
    if is_text:
        messages = [{"role": "user", "content": _content(row[text_field], text_field)}]
    elif row.get("messages") is not None:
        messages = _messages(row["messages"], "messages", "role", "content", row.get("system"))
    elif row.get("conversations") is not None:
        messages = _messages(
            row["conversations"], "conversations", "from", "value", row.get("system")
        )
    elif text_field in row:
        is_text = True
        messages = [{"role": "user", "content": _content(row[text_field], text_field)}]
    else:
        raise ValueError(_without_text(row, text_field))
    return Example(number, messages, is_text, _label(row, label_field))


def shown(name: str, most: int = 60) -> str:
    """What others wrote, for a message: on one line, and not too long."""
    return (name if name.isprintable() else repr(name))[:most]


def _json_kind(value):
    """What JSON calls a value, for messages."""
    if value == [] or value == {}:
        return f"an empty {'list' if value == [] else 'object'}"
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), "a boolean" if isinstance(value, bool) else "a number")


def _label(row, field):
    """The label as text; None where there is none, also where tables write an empty cell or NaN."""
    label = row.get(field) if field else None
    if label is None or label != label or not str(label).strip():
        return None
    return _encodable(str(label), field)


def _without_text(row, text_field):
    """What is wrong with a row that has none of the fields that are read, and what its fields
    suggest."""
    what = (
        f"has no {text_field}, messages or conversations (its fields: "
        f"{', '.join(shown(name) for name in list(row)[:8]) or 'none'})"
    )
    for name, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            is_dialogue = set(ROLE_KEYS) & set(value[0]) and set(CONTENT_KEYS) & set(value[0])
            return f"{what}. " + (
                f"its field {shown(name)} holds a dialogue: name it messages."
                if is_dialogue
                else f"its field {shown(name)} holds rows: write these one a line."
            )
    for first, second in PAIRS:
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return (
                f'{what}. write {{"messages": [{{"role": "user", "content": {first}}}, {{"role": '
                '"assistant", "content": '
                f"{second}}}]}}, or take one of them with --text-field {first}."
            )
    texts = [name for name, value in row.items() if isinstance(value, str) and shown(name) == name]
    example = (
        f", for example --text-field {max(texts, key=lambda name: len(row[name]))}"
        if texts
        else " with --text-field"
    )
    return f"{what}. add one, or name yours{example}."


def _messages(turns, name, role_key, content_key, system=None):
    """The turns of a dialogue as [{"role", "content"}]; a text in the row's field `system` is its
    first turn."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f"{name}: expected a list of turns, got {_json_kind(turns)}. "
            f'write [{{"{role_key}": ..., "{content_key}": ...}}].'
        )
    messages = []
    for i, turn in enumerate(turns):
        role_name, content_name = (
            next((key for key in known if key in turn), None) if isinstance(turn, dict) else None
            for known in (ROLE_KEYS, CONTENT_KEYS)
        )
        has_more = isinstance(turn, dict) and any(turn.get(key) for key in BESIDE_CONTENT)
        if role_name is None or (content_name is None and not has_more):
            raise ValueError(f"{name}[{i}] has no {role_key} and {content_key}. write both.")
        role = turn[role_name]
        known = SHAREGPT_ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise ValueError(
                f"{name}[{i}] has the unknown {role_name} {role!r:.40}. use system, user, "
                "assistant or tool."
            )
        text = _turn_text(turn, content_name or content_key, f"{name}[{i}]")
        messages.append({"role": known, "content": text})
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _content(system, "system")})
    return messages


def _turn_text(turn, content_name, where):
    """What a turn says, a line for each: its reasoning, its content, its calls of tools."""
    content = turn.get(content_name)
    named = f"{where}.{content_name}"
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [_part_text(part, f"{named}[{j}]") for j, part in enumerate(content)]
        content = "\n".join(text for text in texts if text)
    has_more = any(turn.get(key) for key in BESIDE_CONTENT)
    if has_more and (content is None or content == ""):
        parts = []
    else:
        parts = [_content(content, named)]
    for key in REASONING:
        if isinstance(turn.get(key), str) and turn[key].strip():
            parts.insert(0, _encodable(turn[key], f"{where}.{key}"))
            break  # some servers write it under two names
    if isinstance(turn.get("refusal"), str) and turn["refusal"].strip():
        parts.append(_encodable(turn["refusal"], f"{where}.refusal"))
    parts += _calls(turn, where)
    return _content("\n".join(parts), named)


def _calls(turn, where):
    """A line for each call of a tool in a turn."""
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(
            f"{where}.tool_calls: expected a list, got {_json_kind(calls)}. write "
            '[{"function": {"name": ..., "arguments": ...}}].'
        )
    found = [_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
    if turn.get("function_call"):
        found.append(_call(turn["function_call"], f"{where}.function_call"))
    return found


def _call(call, where):
    """A call of a tool as a line of JSON, {"name", "arguments"}, as most models write it.

    Arguments that are a text, as OpenAI's are, stand there as they are.
    """
    inner = call if isinstance(call, dict) else {}
    for key in ("function", "custom"):
        inner = inner[key] if isinstance(inner.get(key), dict) else inner
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"{where} names no tool. write it as "
            '{"function": {"name": ..., "arguments": ...}}, or remove the row.'
        )
    keys = ("arguments", "input", "parameters")
    arguments = next((inner[key] for key in keys if inner.get(key) is not None), {})
    try:
        # of tables, values can be of kinds that JSON has not
        as_json = json.dumps(arguments, ensure_ascii=False, default=str)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply. remove the row.") from None
    text = arguments if isinstance(arguments, str) else as_json
    line = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {text or "{}"}}}'
    return _encodable(line, where)


def _part_text(part, where, *, within=False):
    """The text of a part of a content, or of a part `within` one: what is said, thought, called or
    answered by a tool. Other parts are refused."""
    kind = part.get("type", "text")
    kind = kind if isinstance(kind, str) else repr(kind)
    text = part.get(OTHER_PARTS.get(kind, "text"))
    if kind in ("tool_use", "tool_call", "function_call"):
        return _call(part, where)
    if kind == "reasoning" and isinstance(part.get("summary"), list):
        text = part["summary"]
    if kind in NESTED_PARTS and isinstance(text, list) and not within:
        texts = [
            _part_text(each if isinstance(each, dict) else {}, f"{where}[{j}]", within=True)
            for j, each in enumerate(text)
        ]
        text = "\n".join(texts)
    if not (kind in TEXT_PARTS or kind in OTHER_PARTS) or not isinstance(text, str):
        raise ValueError(
            f"{where} is a part of type {kind!r:.40}, not text. remove the part or the "
            "row, or write it as text."
        )
    return text


def _content(value, name):
    if value is None:
        raise ValueError(f"{name} is empty. remove the row or give it text.")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not text. write a JSON string.")
    if not value.strip():
        raise ValueError(f"{name} is empty. remove the row or give it text.")
    return _encodable(value, name)


def _encodable(value, name):
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{name} holds half of a surrogate pair, which no tokenizer and no file can hold. "
            "remove it."
        ) from None
    return value
