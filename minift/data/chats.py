"""Chats: a list of turns with roles -> one text, and the answers in it that are learned."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from minift.data.records import field_text, is_blank, kind_of, to_json

CHAT_FIELDS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "System", "developer": "System",
    "user": "User", "human": "User",
    "assistant": "Assistant", "gpt": "Assistant", "chatgpt": "Assistant", "bot": "Assistant",
    "model": "Assistant", "function_call": "Assistant",
    "tool": "Tool", "function": "Tool", "observation": "Tool", "function_response": "Tool",
}  # fmt: skip
ANSWERS = "Assistant"
WEIGHT_FIELDS = ("weight", "train", "loss")  # 0 or false: this is not learned


class Turn(NamedTuple):
    role: str  # System, User, Assistant or Tool
    text: str
    learned: bool  # if it is an answer


@dataclass(frozen=True)
class Chat:
    """All before the last learned answer, that answer, and the ranges of characters of the earlier ones."""

    prompt: str
    completion: str
    learned: tuple[tuple[int, int], ...]


def is_learned(fields: dict[str, Any]) -> bool:
    """False if a key of a row or of a turn says that it is not learned. Raises ValueError for weights between
    the two: a row is learned or it is not."""
    learned = True
    for name in WEIGHT_FIELDS:
        value = fields.get(name)
        if isinstance(value, str):
            value = {"0": 0, "1": 1, "false": 0, "true": 1, "": None}.get(value.strip().lower(), value)
        if value is not None and value not in (0, 1):
            raise ValueError(f"field {name!r} is {value!r:.40}, and must be 1 (learned) or 0 (not learned); "
                             "rename it if it means something else")
        learned = learned and value != 0
    return learned


def between(before: str, after: str, join: str) -> str:
    """`join`, or nothing where the texts have white space of their own between them."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    return join


def read_chat(fields: dict[str, Any], names: tuple[str, ...], turns: str, join: str) -> Chat:
    """A row's turns as text: "User: ...", a line end, "Assistant:", `join` and the answer.

    Turns after the last learned answer teach nothing and are left out. The prompt is "" if nothing is said
    before the first answer. Raises ValueError for a row that cannot be used.
    """
    said = _read_turns(fields, names)
    if not any(turn.role == ANSWERS for turn in said):
        last_role = said[-1].role.lower()
        raise ValueError(f"no turn of {names[0]!r} is the assistant's, the last is the {last_role}'s")
    learned = [at for at, turn in enumerate(said)
               if turn.role == ANSWERS and turn.learned and turn.text.strip()]
    if not learned:
        return Chat(f"{ANSWERS}:", "", ())
    last = learned[-1]
    if not any(turn.text.strip() for turn in said[:last]):
        return Chat("", said[last].text, ())  # an answer to nothing
    prompt, spans = _write_turns(said[:last], join)
    earlier = [spans[at] for at in learned[:-1]] if turns == "all" else []
    return Chat(prompt, said[last].text, tuple(earlier))


def read_chat_prompt(fields: dict[str, Any], names: tuple[str, ...], turns: str,
                     join: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The turns as text, ready for the assistant's next answer, and the ranges of characters of the earlier
    answers that a run would learn. An answer at the end is left out."""
    said = _read_turns(fields, names)
    if said[-1].role == ANSWERS:
        said = said[:-1]
    prompt, spans = _write_turns(said, join)
    earlier = []
    for turn, span in zip(said, spans, strict=True):
        if turns == "all" and turn.role == ANSWERS and turn.learned and turn.text.strip():
            earlier.append(span)
    return prompt, tuple(earlier)


def _write_turns(said: list[Turn], join: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of turns and "Assistant:", and the range of characters of each turn's text."""
    prompt, spans = "", []
    for turn in said:
        prompt += f"{turn.role}:"
        begin = len(prompt)
        prompt += between(prompt, turn.text, join) + turn.text
        spans.append((begin, len(prompt)))
        prompt += "" if turn.text.endswith("\n") else "\n"
    return prompt + f"{ANSWERS}:", spans


def is_turns(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _read_turns(fields: dict[str, Any], names: tuple[str, ...]) -> list[Turn]:
    """The turns of the fields `names`, one after another."""
    said = []
    if not is_blank(fields, "system"):  # some files keep it beside the turns
        said.append(Turn(ROLES["system"], field_text(fields, "system"), False))
    for name in names:
        turns = fields.get(name)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"field {name!r} must be a list of objects with role and content, or from and "
                             "value")
        said += [_read_turn(turn, name) for turn in turns]
    return said


def _read_turn(turn: dict[str, Any], name: str) -> Turn:
    key = "from" if "from" in turn and "role" not in turn else "role"
    role = field_text(turn, key)
    if not isinstance(turn[key], str):
        raise ValueError(f"field {key!r} is {kind_of(turn[key])}, and must be text")
    if role.strip().lower() not in ROLES:
        raise ValueError(f"role {role!r:.40} in {name!r} is not known, known are {', '.join(ROLES)}")
    return Turn(ROLES[role.strip().lower()], _turn_text(turn), is_learned(turn))


def _turn_text(turn: dict[str, Any]) -> str:
    """The text of a turn: its content, and the calls of tools as JSON."""
    content = turn.get("content", turn.get("value", turn.get("text")))
    parts = content if isinstance(content, list) else [content]
    text = "".join(_part_text(part) for part in parts if part is not None)
    for name in ("tool_calls", "function_call"):
        if turn.get(name):
            text += ("\n" if text else "") + to_json(turn[name])
    return text


def _part_text(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return field_text(part, "text")
    if isinstance(part, dict) and "type" in part:
        raise ValueError(f"a part of type {part['type']!r:.40} in a turn's content: only text can be learned")
    if isinstance(part, list):
        raise ValueError(f"a part of a turn's content is {kind_of(part)}, and must be text")
    return field_text({"content": part}, "content")
