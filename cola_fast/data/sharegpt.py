"""ShareGPT's turns, {"from": "human", "value": "..."}, as messages with a role and content."""

from __future__ import annotations

import json
from typing import Any

_SPEAKERS = {
    "user": ("user", "human", "prompter", "input"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "output", "function_call"),
    "system": ("system",),
    "tool": ("tool", "function", "observation", "function_response", "tool_response", "ipython"),
}
ROLES = {name: role for role, names in _SPEAKERS.items() for name in names}


def as_message(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn as a message; other keys stay. Raises ValueError, which says what it must be."""
    if "from" not in turn:
        return turn
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    speaker, value = turn["from"], turn.get("value")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"from one of {', '.join(ROLES)}")
    if not {"role", "content"}.isdisjoint(rest):
        raise ValueError("either from and value or role and content")
    if speaker.lower() == "function_call":
        return {"role": role, "tool_calls": _calls(value), **rest}
    return {"role": role, "content": value, **rest}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Of one call, or a list of them, each with a name and arguments, as JSON text."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= set(call) for call in calls):
        raise ValueError("a function_call that is JSON text of a name and arguments")
    return [{"type": "function", "function": call} for call in calls]
