"""A row of token ids, as training and scoring take it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """Token ids, and the half-open spans of them that are learned. The first token never is: nothing
    predicts it."""

    ids: list[int]
    spans: tuple[tuple[int, int], ...]
