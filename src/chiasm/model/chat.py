"""ChatModel: the `Chats` capability. Ask about pictures, get text, logits or boxes.

It binds a CausalVLM to its tokenizer, template and tile policy, and holds two caches, so that a second question
about the same picture neither encodes it again (features) nor reads it again (prefixes).
Legend: T tokens of a prompt, N tiles, S tile side, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from chiasm.data.layout import LayoutSpec, layout
from chiasm.data.message import parse_messages
from chiasm.errors import ContextOverflowError, UsageError
from chiasm.media.pixels import normalize
from chiasm.model.answer import ModelInputs, Options, Reply, Writer, make_reply, parse_options, prompt_usage
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding
from chiasm.model.prefix import PrefixCache
from chiasm.model.queue import MAX_ROWS, MAX_RUNNING, MAX_TOKENS, Queue
from chiasm.parts.embed import FeatureCache

__all__ = ["ChatModel", "Chats", "ModelInputs", "Options", "Reply", "with_images"]

VISIBLE_TAGS = ("<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
"""Special tokens that belong to an answer's text; all others are left out of it."""


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


class ChatModel:
    """A model that answers questions about pictures.

    Args:
        model: the network, in eval mode.
        spec: tokenizer, template, tile policy and token counts.
        name: shown to users.
        features: cache of encoded images; None makes one of 1 GiB, `FeatureCache(0)` remembers nothing.
        prefixes: cache of what was read of prompts and answers; None makes one of 1 GiB, which lies where the model
            lies, `PrefixCache(0)` remembers nothing.
        deterministic: answers have the same bits whatever was asked before or beside: `batch` answers one conversation
            after the other, bit-equal to `chat`, and `prefixes` is not used.
    """

    def __init__(
        self,
        model: CausalVLM,
        spec: LayoutSpec,
        *,
        name: str = "model",
        features: FeatureCache | None = None,
        prefixes: PrefixCache | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model = model.eval()
        self.spec = spec
        self.name = name
        self.deterministic = deterministic
        self.features = FeatureCache() if features is None else features
        self.prefixes = PrefixCache(0) if deterministic else PrefixCache() if prefixes is None else prefixes
        if hasattr(model.embedder, "features"):
            model.embedder.features = self.features  # type: ignore[assignment]
        tokenizer = spec.tokenizer
        self.stop_ids = spec.template.stop_ids(tokenizer)
        shown = {tokenizer.token_to_id(tag) for tag in VISIBLE_TAGS}
        self._hidden = (tokenizer.special_ids | set(self.stop_ids)) - shown

    @property
    def quantized(self) -> str | None:
        """How the weights were rounded (`chiasm.model.quantize`)."""
        return self.model.quantized

    @property
    def facts(self) -> dict[str, Any]:
        """What answers depend on beside weights and layout, as plain data: for manifests, which tell models apart."""
        return {}

    @property
    def static(self) -> bool | Literal["compile"] | None:
        """Whether passes that only decode have fixed shapes, see `CausalVLM.static`; may be set."""
        return self.model.static

    @static.setter
    def static(self, wanted: bool | Literal["compile"] | None) -> None:
        self.model.static = wanted

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
        return _drain(self.stream(messages, images, **options))

    def stream(self, messages: Any, images: Seq[Any] = (), **options: Any) -> Generator[str, None, Reply]:
        """The text of `chat`, piece by piece: the pieces join to its `text`; the generator returns the `Reply`.

        What is wrong with the messages or options is raised here, before the first piece.
        """
        chosen = parse_options(options)
        return self._pieces(self.inputs(messages, images), chosen, self.prefixes)

    def batch(
        self, conversations: Seq[Any], *, deterministic: bool | None = None, **options: Any
    ) -> list[Reply]:
        """Answer several conversations at once, in order.

        They run through a `queue`: up to 64 are written at a time, without padding, and each is laid out when its turn
        comes, so that a thousand need no more memory than that. What is wrong with the form of any conversation
        is raised first; a picture that cannot be read, when its turn comes. Results equal those of `chat` up to the
        rounding of larger matrix products; `deterministic=True` answers one by one and is bit-equal (as long as no
        other thread computes in this process: see `chiasm.nn.products`).
        """
        chosen = parse_options(options)
        for conversation in conversations:
            parse_messages(conversation)
        if self.deterministic if deterministic is None else deterministic:
            return [_drain(self._pieces(self.inputs(c), chosen, None)) for c in conversations]
        queue = self.queue(refuse_large=False)
        order = {queue.submit(conversation, **options): n for n, conversation in enumerate(conversations)}
        replies: dict[int, Reply] = {}
        for piece in queue:
            if piece.error is not None:
                raise piece.error
            if piece.reply is not None:
                replies[order[piece.ticket]] = piece.reply
        return [replies[n] for n in range(len(order))]

    def queue(
        self,
        *,
        max_running: int = MAX_RUNNING,
        max_tokens: int = MAX_TOKENS,
        max_rows: int = MAX_ROWS,
        refuse_large: bool = True,
    ) -> Queue:
        """Answer many conversations at once that come and go at any time; arguments as of `Queue`."""
        return Queue(
            self,
            max_running=max_running,
            max_tokens=max_tokens,
            max_rows=max_rows,
            refuse_large=refuse_large,
        )

    def room(self, inputs: ModelInputs, options: Options) -> int:
        """Most tokens of an answer: what is asked for and what the context leaves.

        Raises ContextOverflowError when it leaves none.
        """
        longest, prompt = self.spec.max_length, len(inputs.token_ids)
        if longest is not None and prompt >= longest:
            raise ContextOverflowError(
                f"the prompt has {prompt} tokens and the context {longest}: "
                "no room for an answer; use fewer tiles, images or frames, or a shorter text"
            )
        return options.max_new_tokens if longest is None else min(options.max_new_tokens, longest - prompt)

    def writer(self, options: Options) -> Writer:
        """Takes the tokens of an answer and gives its text."""
        return Writer(self.spec.tokenizer, self._hidden, options.stop)

    def _pieces(
        self, inputs: ModelInputs, options: Options, prefixes: PrefixCache | None
    ) -> Generator[str, None, Reply]:
        writer = self.writer(options)
        run = Decoding(
            self.model,
            [inputs.sequence],
            sampling=options.sampling,
            limit=self.room(inputs, options),
            stop_ids=self.stop_ids,
            prefixes=prefixes,
        )
        usage = prompt_usage(inputs, run.reused(0))

        def pieces() -> Generator[str, None, Reply]:
            while writer.finish is None:
                for event in run.step():
                    piece = writer.push(event.id or 0, event.finish)
                    if writer.finish:
                        run.cancel(event.doc)
                    if piece:
                        yield piece
            return make_reply(writer, usage)

        return pieces()


def _drain(pieces: Generator[str, None, Reply]) -> Reply:
    """What a generator returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def with_images(messages: Any, images: Seq[Any]) -> Any:
    """Messages with `images` where their `<image>` tags stand, else in front of the last user message.

    Raises DataError when no message is the user's, UsageError when `images` is one image instead of several.
    """
    if isinstance(images, str | bytes | Path) or hasattr(images, "size"):
        raise UsageError("images must be a list: write images=[picture] for one")
    if not images:
        return messages
    return parse_messages(messages, images=images)
