"""What is asked and what is answered: the inputs of a conversation, options, the text as it grows, the reply.

Legend: T tokens of a prompt, N tiles, S tile side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError, UsageError
from chiasm.media.boxes import Box, parse_boxes
from chiasm.nn.sampling import Sampling
from chiasm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What the model reads for a conversation.

    Attributes:
        token_ids: (T,) int64, every image expanded to its context ids.
        tiles: (N, 3, S, S) uint8, one row per encoded tile or frame in the order of the prompt; (0, 3, S, S) for text.
        sequence: the same as the model's own input type.
    """

    token_ids: Tensor
    tiles: Tensor
    sequence: Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        text: without stop and control tokens. token_ids: all that was generated, the stop id included.
        boxes: rectangles named in the text, coordinates 0-1000 of each image's width and height.
        finish: "stop" (stop token or string), "length" (limit reached) or, from a queue, "cancelled".
        usage: prompt_tokens, completion_tokens, tiles (frames among them, one each), frames, and reused_tokens: how
            many tokens of the prompt were not read, because an earlier prompt began alike.
    """

    text: str
    token_ids: list[int]
    boxes: list[Box] = field(default_factory=list)
    finish: str = "stop"
    usage: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of chat, stream and batch.

    Attributes:
        max_new_tokens: limit of the answer; the room left in the context limits it too.
        temperature, top_p, top_k, repetition_penalty, seed: see `chiasm.nn.sampling`; temperature 0 is greedy.
        stop: strings that end the answer (and are left out of it).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UsageError(f"option {name} must be a whole number, found {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UsageError(f"option {name} must be a number, found {value!r}")
        if not isinstance(self.stop, list | tuple) or not all(isinstance(s, str) for s in self.stop):
            raise UsageError(f"option stop must be a string or several, found {self.stop!r}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be in 0 … 2^63 - 1, found {self.seed}")
        if not all(self.stop):
            raise ConfigError("a stop string must not be empty")

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


class Writer:
    """Text of one answer as it grows; holds back what may yet turn out to be a stop string."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], stop: tuple[str, ...]) -> None:
        self._decoder = tokenizer.stream(skip_special_tokens=False)
        self._hidden, self._stop = hidden, stop
        self._held = ""
        self.text = ""
        self.ids: list[int] = []
        self.finish: str | None = None

    def push(self, token: int, finish: str | None) -> str:
        """Take a token; returns the text that is now certain. Sets `finish` when the answer has ended."""
        self.ids.append(token)
        self._held += "" if token in self._hidden else self._decoder.push(token)
        if finish:
            self._held += self._decoder.flush()
        cuts = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if cuts:
            self.finish = "stop"
            return self._give(min(cuts))
        if finish:
            self.finish = finish
            return self._give(len(self._held))
        return self._give(len(self._held) - self._open_tail())

    def _open_tail(self) -> int:
        """Length of the longest tail that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:n]):
                    longest = n
                    break
        return longest

    def _give(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece


NOTHING_READ = {"prompt_tokens": 0, "tiles": 0, "frames": 0, "reused_tokens": 0}
"""What `Reply.usage` says of a prompt that was never read."""


def prompt_usage(inputs: ModelInputs, reused: int = 0) -> dict[str, int]:
    """What `Reply.usage` says of a prompt of which `reused` rows were remembered."""
    return {
        "prompt_tokens": len(inputs.token_ids),
        "tiles": inputs.tiles.shape[0],
        # Frames of a stream were encoded before.
        "frames": len(inputs.sequence.spans_of("video")) + len(inputs.sequence.spans_of("encoded")),
        "reused_tokens": reused,
    }


def make_reply(writer: Writer, prompt: Mapping[str, int]) -> Reply:
    """The reply that was written, to a prompt of this usage."""
    return Reply(
        text=writer.text,
        token_ids=writer.ids,
        boxes=parse_boxes(writer.text),
        finish=writer.finish or "length",
        usage={**prompt, "completion_tokens": len(writer.ids)},
    )


def parse_options(options: Mapping[str, Any]) -> Options:
    """Options by name; UsageError for an unknown one."""
    known = tuple(Options.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}: use one of {', '.join(known)}")
    return Options(**options)
