"""ChatModel: the `Chats` capability. Ask about pictures, get text, logits or boxes.

It binds a CausalVLM to its tokenizer, template and tile policy, and holds the feature cache, so that a second
question about the same picture does not encode it again.
Legend: T tokens of a prompt, N tiles, S tile side, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.message import parse_messages
from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError, ContextOverflowError, UsageError
from chiasm.media.boxes import Box, parse_boxes
from chiasm.media.pixels import normalize
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding
from chiasm.nn.sampling import Sampling
from chiasm.parts.embed import FeatureCache
from chiasm.text.tokenizer import Tokenizer

VISIBLE_TAGS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Special tokens that belong to an answer's text; all others are left out of it."""


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
        finish: "stop" (stop token or string) or "length" (limit reached).
        usage: prompt_tokens, completion_tokens, tiles (frames among them, one each), frames.
    """

    text: str
    token_ids: list[int]
    boxes: list[Box] = field(default_factory=list)
    finish: str = "stop"
    usage: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)


@runtime_checkable
class Chats(Protocol):
    """The capability of models that answer questions (see ChatModel for the meaning of each method)."""

    def inputs(self, messages: Any) -> ModelInputs:
        """Lay a conversation out."""
        ...

    def pixels(self, inputs: ModelInputs) -> Tensor:
        """Normalised pixels that the encoder sees."""
        ...

    def logits(self, inputs: ModelInputs, positions: Seq[int] | None = None) -> Tensor:
        """Teacher-forced logits."""
        ...

    def chat(self, messages: Any, images: Seq[Any] = (), **options: Any) -> Reply:
        """Answer one conversation."""
        ...

    def stream(self, messages: Any, images: Seq[Any] = (), **options: Any) -> Iterator[str]:
        """Pieces that join to the text of `chat`."""
        ...

    def batch(self, conversations: Seq[Any], **options: Any) -> list[Reply]:
        """Answer several conversations."""
        ...


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


class _Writer:
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


class ChatModel:
    """A model that answers questions about pictures.

    Args:
        model: the network, in eval mode.
        spec: tokenizer, template, tile policy and token counts.
        name: shown to users.
        features: cache of encoded images; None makes one of 1 GiB, `FeatureCache(0)` remembers nothing.
        deterministic: `batch` answers one conversation after the other, bit-equal to `chat`.
    """

    def __init__(
        self,
        model: CausalVLM,
        spec: LayoutSpec,
        *,
        name: str = "model",
        features: FeatureCache | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model = model.eval()
        self.spec = spec
        self.name = name
        self.deterministic = deterministic
        self.features = FeatureCache() if features is None else features
        if hasattr(model.embedder, "features"):
            model.embedder.features = self.features  # type: ignore[assignment]
        tokenizer = spec.tokenizer
        self.stop_ids = spec.template.stop_ids(tokenizer)
        shown = {tokenizer.token_to_id(tag) for tag in VISIBLE_TAGS}
        self._hidden = (tokenizer.special_ids | set(self.stop_ids)) - shown

    def inputs(self, messages: Any, images: Seq[Any] = ()) -> ModelInputs:
        """Lay a conversation out.

        Args:
            messages: a question, or `[{"role", "content": str | [{"type": "image", "image": …}, {"type":
                "text", "text": …}]}]`; an assistant header follows iff the last role is user. A video is
                `{"type": "video", "video": path | URL | folder | list of pictures}`, with fields of
                `FrameSampling` where its frames shall be others than `spec.sampling` takes.
            images: paths, URLs or PIL images: where the `<image>` tags stand if there are as many, else in front of
                the last user message.

        Raises:
            ImageError, DataError, TemplateError, ContextOverflowError: one line that says what and where.
        """
        sequence = layout(with_images(messages, images), self.spec)
        side = self.spec.tiles.image_size
        # Spans stand in the order of the prompt, pictures and frames mixed.
        shown = [sequence.media[s.media].data[s.first : s.first + s.items] for s in sequence.spans]
        tiles = torch.zeros(0, 3, side, side, dtype=torch.uint8)
        if shown:
            tiles = torch.cat(shown) if len(shown) > 1 else shown[0]
        return ModelInputs(sequence.ids_T, tiles, sequence)

    def pixels(self, inputs: ModelInputs) -> Tensor:
        """(N, 3, S, S) float32: the normalised pixels that the encoder sees."""
        return normalize(inputs.tiles, self.spec.tiles)

    @torch.inference_mode()
    def logits(self, inputs: ModelInputs, positions: Seq[int] | None = None) -> Tensor:
        """Teacher-forced logits.

        Args:
            positions: rows that are wanted (negative counts from the end); default all.

        Returns:
            (T or len(positions), V) float32 on the CPU; row t predicts token t + 1.
        """
        hidden_TC = self.model.hidden(inputs.sequence.to(self.model.device))
        if positions is not None:
            T = hidden_TC.shape[0]
            outside = [p for p in positions if not -T <= p < T]
            if outside:
                raise UsageError(f"position {outside[0]} is outside the prompt of {T} tokens")
            hidden_TC = hidden_TC[list(positions)]
        return self.model.head.logits(hidden_TC).cpu()  # type: ignore[operator]

    def chat(self, messages: Any, images: Seq[Any] = (), **options: Any) -> Reply:
        """Answer one conversation; `options` are those of `Options`."""
        return self._answer([self.inputs(messages, images)], _options(options))[0]

    def stream(self, messages: Any, images: Seq[Any] = (), **options: Any) -> Generator[str, None, Reply]:
        """The text of `chat`, piece by piece: the pieces join to its `text`; the generator returns the `Reply`.

        What is wrong with the messages or options is raised here, before the first piece.
        """
        chosen = _options(options)
        inputs = self.inputs(messages, images)
        run, (writer,) = self._start([inputs], chosen)

        def pieces() -> Generator[str, None, Reply]:
            while writer.finish is None:
                for event in run.step():
                    piece = writer.push(event.id or 0, event.finish)
                    if writer.finish:
                        run.cancel(event.doc)
                    if piece:
                        yield piece
            return _reply(inputs, writer)

        return pieces()

    def batch(
        self, conversations: Seq[Any], *, deterministic: bool | None = None, **options: Any
    ) -> list[Reply]:
        """Answer several conversations at once, in order.

        Ragged prompts are read as one row without padding. Results equal those of `chat` up to the rounding of
        larger matrix products; `deterministic=True` answers one by one and is bit-equal (as long as no other
        thread computes in this process: see `chiasm.nn.products`).
        """
        chosen = _options(options)
        laid = [self.inputs(c) for c in conversations]
        one_by_one = self.deterministic if deterministic is None else deterministic
        if one_by_one:
            return [self._answer([inputs], chosen)[0] for inputs in laid]
        return self._answer(laid, chosen) if laid else []

    def _start(self, laid: list[ModelInputs], options: Options) -> tuple[Decoding, list[_Writer]]:
        limit = self.spec.max_length
        room = [options.max_new_tokens if limit is None else limit - len(inputs.token_ids) for inputs in laid]
        for inputs, left in zip(laid, room, strict=True):
            if left < 1:
                raise ContextOverflowError(
                    f"the prompt has {len(inputs.token_ids)} tokens and the context {self.spec.max_length}: "
                    "no room for an answer; use fewer tiles, images or frames, or a shorter text"
                )
        run = Decoding(
            self.model,
            [inputs.sequence for inputs in laid],
            sampling=options.sampling,
            limit=[min(options.max_new_tokens, left) for left in room],
            stop_ids=self.stop_ids,
        )
        return run, [_Writer(self.spec.tokenizer, self._hidden, options.stop) for _ in laid]

    def _answer(self, laid: list[ModelInputs], options: Options) -> list[Reply]:
        run, writers = self._start(laid, options)
        while events := run.step():
            for event in events:
                writer = writers[event.doc]
                writer.push(event.id or 0, event.finish)
                if writer.finish:
                    run.cancel(event.doc)
        return [_reply(inputs, writer) for inputs, writer in zip(laid, writers, strict=True)]


def _reply(inputs: ModelInputs, writer: _Writer) -> Reply:
    return Reply(
        text=writer.text,
        token_ids=writer.ids,
        boxes=parse_boxes(writer.text),
        finish=writer.finish or "length",
        usage={
            "prompt_tokens": len(inputs.token_ids),
            "completion_tokens": len(writer.ids),
            "tiles": inputs.tiles.shape[0],
            "frames": len(inputs.sequence.spans_of("video")),
        },
    )


def _options(options: Mapping[str, Any]) -> Options:
    known = tuple(Options.__dataclass_fields__)
    for name in options:
        if name not in known:
            raise UsageError(f"unknown option {name!r}: use one of {', '.join(known)}")
    return Options(**options)


def with_images(messages: Any, images: Seq[Any]) -> Any:
    """Messages with `images` where their `<image>` tags stand, else in front of the last user message.

    Raises DataError when no message is the user's, UsageError when `images` is one image instead of several.
    """
    if isinstance(images, str | bytes | Path) or hasattr(images, "size"):
        raise UsageError("images must be a list: write images=[picture] for one")
    if not images:
        return messages
    return parse_messages(messages, images=images)
