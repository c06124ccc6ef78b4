"""What an engine gives back: events and finished texts. Plain data, which can be pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional, Union

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Generation:
    """A finished text. Arrays have one entry per generated token, unless they say otherwise, and
    cannot be written to."""

    text: str
    """Up to the end-of-text token and the first stop text; for holes the whole text."""
    draft: str
    """The text when the first stage was done."""
    finish: str
    """``length``, ``end-of-text``, ``stop-text``, ``low-entropy`` or ``cancelled``."""
    pieces: list[str]
    """Text of each generated token; they join to the text of all of them."""
    tokens: NDArray[np.uint32]
    draft_tokens: NDArray[np.uint32]
    """The tokens when the first stage was done."""
    positions: NDArray[np.int64]
    """Where in the sequence each token is."""
    canvas: NDArray[np.uint32]
    """The whole sequence, prompt included."""
    confidence: NDArray[np.float32]
    """Probability of each token in the forward that revealed it."""
    log_prob: NDArray[np.float32]
    """Log probability in nats, before temperature, top-k and nucleus."""
    revealed_at: NDArray[np.uint32]
    """Stage and step that revealed each token: shape (tokens, 2)."""
    as_json: str
    """The object that ``redraft generate --format json`` prints, without what belongs to the
    engine."""

    def to_dict(self) -> dict[str, Any]:
        """The object of :attr:`as_json`."""
        fields: dict[str, Any] = json.loads(self.as_json)
        return fields

    def json(self) -> str:
        """:attr:`as_json`."""
        return self.as_json

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What each stage did and cost: forwards, rows, positions masked again, milliseconds."""
        stages: list[dict[str, Any]] = self.to_dict()["stages"]
        return stages

    @property
    def timings(self) -> dict[str, float]:
        """Wall times in milliseconds."""
        timings: dict[str, float] = self.to_dict()["timings"]
        return timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Delta:
    """Final text, after all deltas before it: they join to :attr:`Generation.text`."""

    text: str


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The text as it is now, which may still change; it replaces the last snapshot. Arrays and lists
    have one entry for each position that has held a generated token."""

    stage: int
    """Index of the stage that is at work."""
    step: int
    """Forwards of the stage before the last change."""
    text: str
    """A dot stands for each masked position."""
    positions: NDArray[np.int64]
    tokens: list[Optional[int]]
    """None while the position is masked."""
    pieces: list[str]
    """Text of each position; they join to :attr:`text`."""
    confidence: NDArray[np.float32]
    """Probability of each token when it was revealed; 0 while its position is masked."""
    remasked: NDArray[np.int64]
    """Positions that the stage at work masked again."""


@dataclass(frozen=True)
class Done:
    """The end, with the finished text."""

    generation: Generation


Event = Union[Delta, Snapshot, Done]

_TYPES: dict[str, Any] = {
    "tokens": np.uint32,
    "draft_tokens": np.uint32,
    "positions": np.int64,
    "canvas": np.uint32,
    "confidence": np.float32,
    "log_prob": np.float32,
    "revealed_at": np.uint32,
    "remasked": np.int64,
}


def _arrays(fields: dict[str, Any]) -> dict[str, Any]:
    """Bytes as arrays of their types."""
    return {
        name: np.frombuffer(value, _TYPES[name]) if isinstance(value, bytes) else value for name, value in fields.items()
    }


def generation_of(fields: dict[str, Any]) -> Generation:
    arrays = _arrays(fields)
    arrays["revealed_at"] = arrays["revealed_at"].reshape(-1, 2)
    return Generation(**arrays)


def event_of(event: tuple[str, Any]) -> Event:
    kind, payload = event
    if kind == "delta":
        return Delta(payload)
    if kind == "snapshot":
        return Snapshot(**_arrays(payload))
    return Done(generation_of(payload))
