"""Chats: a list of turns with roles -> one text, and the answers in it that are learned.

A chat is written as GPT-2 can read it, without control tokens:

    User: Hi.
    Assistant: Hello.
    User: How are you?
    Assistant: Fine.

The last learned answer becomes the completion, and all text before it the prompt.
"""

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
WEIGHT_FIELDS = ("weight", "train", "loss")  # 0 or false: this row or turn is not learned


class Turn(NamedTuple):
    role: str  # System, User, Assistant or Tool
    text: str
    learned: bool  # counts only if it is an answer


@dataclass(frozen=True)
class Chat:
    prompt: str  # all turns before the last learned answer
    completion: str  # that answer
    learned: tuple[tuple[int, int], ...]  # ranges of characters of the prompt: the earlier answers


def is_learned(fields: dict[str, Any]) -> bool:
    """False if a field of a row or of a turn says that it is not learned.

    Raises ValueError for any weight but 0 and 1: a row is learned or it is not.
    """
    learned = True
    for name in WEIGHT_FIELDS:
        value = fields.get(name)
        if isinstance(value, str):  # in a table every value is text
            value = {"0": 0, "1": 1, "false": 0, "true": 1, "": None}.get(value.strip().lower(), value)
        if value is not None and value not in (0, 1):
            raise ValueError(f"field {name!r} is {value!r:.40}, and must be 1 (learned) or 0 (not learned); "
                             "rename it if it means something else")
        learned = learned and value != 0  # holds for None, too
    return learned


def between(before: str, after: str, join: str) -> str:
    """`join`, or "" if one of the texts has white space there already, or is empty."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    return join


def read_chat(fields: dict[str, Any], names: tuple[str, ...], turns: str, join: str) -> Chat:
    """The chat in the fields `names` of a row. `turns`: "all" answers are learned, or the "last".

    The completion is "" if no answer is learned; the prompt is "" if nothing comes before the answer. Raises
    ValueError for a row that cannot be used.
    """
    all_turns = _read_turns(fields, names)
    if not any(turn.role == ANSWERS for turn in all_turns):
        last_role = all_turns[-1].role.lower()
        raise ValueError(f"no turn of {names[0]!r} is the assistant's, the last is the {last_role}'s")
    answers = [i for i, turn in enumerate(all_turns) if _is_learned_answer(turn)]
    if not answers:
        return Chat(f"{ANSWERS}:", "", ())  # dropped later, for an empty completion
    last = answers[-1]  # turns after it teach nothing and are left out
    before = all_turns[:last]
    if not any(turn.text.strip() for turn in before):
        return Chat("", all_turns[last].text, ())  # dropped later, for an empty prompt
    prompt, ranges = _write_turns(before, join)
    earlier = [ranges[i] for i in answers[:-1]] if turns == "all" else []
    return Chat(prompt, all_turns[last].text, tuple(earlier))


def read_chat_prompt(fields: dict[str, Any], names: tuple[str, ...], turns: str,
                     join: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The prompt for the assistant's next answer, and the ranges of characters of the earlier answers that a run
    would learn. An answer at the end is left out: it is the one to predict. Raises ValueError."""
    all_turns = _read_turns(fields, names)
    if all_turns[-1].role == ANSWERS:
        all_turns = all_turns[:-1]
    prompt, ranges = _write_turns(all_turns, join)
    earlier = []
    for turn, characters in zip(all_turns, ranges, strict=True):
        if turns == "all" and _is_learned_answer(turn):
            earlier.append(characters)
    return prompt, tuple(earlier)


def _is_learned_answer(turn: Turn) -> bool:
    return turn.role == ANSWERS and turn.learned and bool(turn.text.strip())


def _write_turns(turns: list[Turn], join: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of turns and of "Assistant:" after them, and the range of characters of each turn's text."""
    prompt, ranges = "", []
    for turn in turns:
        prompt += f"{turn.role}:"
        begin = len(prompt)  # the space belongs to the answer, since GPT-2's tokens begin with their space
        prompt += between(prompt, turn.text, join) + turn.text
        ranges.append((begin, len(prompt)))
        prompt += "" if turn.text.endswith("\n") else "\n"
    return prompt + f"{ANSWERS}:", ranges


# ---- JSON -> turns


def is_turns(value: Any) -> bool:
    """Whether a field's value looks like turns: a list of objects with a role."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def _read_turns(fields: dict[str, Any], names: tuple[str, ...]) -> list[Turn]:
    """The turns of the fields `names`, one field after another; at least one. Raises ValueError."""
    turns = []
    if not is_blank(fields, "system"):  # some files have it in a field beside the turns
        turns.append(Turn(ROLES["system"], field_text(fields, "system"), False))
    for name in names:
        value = fields.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
            raise ValueError(f"field {name!r} must be a list of objects with role and content, or from and "
                             "value")
        turns += [_read_turn(turn, name) for turn in value]
    return turns


def _read_turn(turn: dict[str, Any], name: str) -> Turn:
    # OpenAI's format has role and content, ShareGPT's has from and value
    key = "from" if "from" in turn and "role" not in turn else "role"
    role = field_text(turn, key)
    if not isinstance(turn[key], str):
        raise ValueError(f"field {key!r} is {kind_of(turn[key])}, and must be text")
    if role.strip().lower() not in ROLES:
        raise ValueError(f"role {role!r:.40} in {name!r} is not known, known are {', '.join(ROLES)}")
    return Turn(ROLES[role.strip().lower()], _turn_text(turn), is_learned(turn))


def _turn_text(turn: dict[str, Any]) -> str:
    """The text of a turn: its content, then its calls of tools as JSON."""
    content = turn.get("content", turn.get("value", turn.get("text")))
    # OpenAI's content may be a list of parts, and null where a turn only calls tools
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
