"""The forms in which data sets write a dialogue, brought to one: `messages` of `role` and `content` strings.

    conversations   [{"from": "human", "value": ...}, ...]     as ShareGPT's
    content parts   {"role": "user", "content": [{"type": "text", "text": ...}]}
    chosen          a preference pair where prompts or texts are wanted: its dialogue, or what it answers
HH-RLHF's strings ("\\n\\nHuman: ... \\n\\nAssistant: ...") stay strings, cut at the last assistant's turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppomax.data.encode import BadRow, is_chat
from ppomax.data.rows import Row

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool"}  # fmt: skip
"""A message's role by ShareGPT's `from`."""


def plain(row: Row) -> Row:
    """The row with `messages` in place of `conversations`, and contents as strings. BadRow: a part that is no text, a
    turn of nobody known."""
    given = dict(row)
    if "conversations" in given and "messages" not in given:
        given["messages"] = [_turn(t) for t in _list(given.pop("conversations"))]
    for name, value in given.items():
        if is_chat(value) and any(isinstance(m, Mapping) and is_chat(m.get("content")) for m in value):
            given[name] = [_with_text(m) for m in value]
    return given


def with_prompt(row: Row, column: str) -> Row:
    """A row of prompts: where it lacks `column`, what the last assistant's turn of its dialogue answers."""
    row = plain(row)
    if row.get(column) is not None:
        return row
    dialogue = next((row[n] for n in ("messages", "chosen") if row.get(n) is not None), None)
    if is_chat(dialogue) and dialogue:
        last = dialogue[-1]
        answered = isinstance(last, Mapping) and last.get("role") == "assistant"
        return {**row, column: list(dialogue[:-1] if answered else dialogue)}
    if isinstance(dialogue, str) and HH_HUMAN in dialogue and HH_ASSISTANT in dialogue:
        return {**row, column: split_hh(dialogue)[0]}
    return row


def with_text(row: Row) -> Row:
    """A row to learn from: of a preference pair, its chosen side."""
    row = plain(row)
    if "chosen" not in row or any(name in row for name in ("messages", "response", "text")):
        return row
    chosen = row["chosen"]
    if is_chat(chosen):
        shared = list(row["prompt"]) if is_chat(row.get("prompt")) else []
        return {**row, "messages": list(chosen) if list(chosen)[: len(shared)] == shared else shared + list(chosen)}
    if "prompt" in row or not isinstance(chosen, str):
        return {**row, "response": chosen}
    if HH_HUMAN in chosen and HH_ASSISTANT in chosen:
        prompt, response = split_hh(chosen)
        return {**row, "prompt": prompt, "response": response}
    return {**row, "text": chosen}


def split_hh(text: str) -> tuple[str, str]:
    """Dialogue -> (everything up to and with the last "\\n\\nAssistant:", what follows)."""
    prompt, marker, response = text.rpartition(HH_ASSISTANT)
    if not marker or HH_HUMAN in response:
        raise BadRow("dialogue does not end with the assistant", "each side must end with an assistant turn")
    if not response.strip():
        raise BadRow("empty response", "remove the row or fill it")
    return prompt + marker, response


def _list(value: Any) -> Sequence[Any]:
    if not is_chat(value):
        raise BadRow("malformed chat", "`conversations` is a list of turns with `from` and `value`")
    return value  # type: ignore[no-any-return]


def _turn(turn: Any) -> dict[str, Any]:
    known = isinstance(turn, Mapping) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
    if not known:
        raise BadRow("malformed chat", "a turn of `conversations` has `from` and `value`, both strings")
    role = ROLES.get(turn["from"].lower())
    if role is None:
        raise BadRow("malformed chat", f"a turn is from {turn['from']!r}; known are {', '.join(ROLES)}")
    return {"role": role, "content": turn["value"]}


def _with_text(message: Any) -> Any:
    """A message whose content is a list of parts, with their texts joined."""
    if not isinstance(message, Mapping) or not is_chat(message.get("content")):
        return message
    texts = []
    for part in message["content"]:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadRow("content that is no text", f"a part of a message is {kind!r}; these models read text alone")
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}
