"""Queue: many conversations answered at once, that come and go at any time. What a server sits on.

    queue = model.queue()
    ticket = queue.submit("What is this?", ["photo.jpg"], max_new_tokens=64)
    for piece in queue:
        print(piece.ticket, piece.text, piece.reply or piece.error or "")

Order and fairness. First come, first served: a request starts when those before it have started and there is room. Then
all that run get one token a step, whatever their length, and prompts that are being read share the rows of a step
evenly, so that a long one delays neither those being written nor the short prompts beside it. Clients are not told
apart: who serves many of them decides what to submit next, and cancels what nobody waits for any more.

Memory. A request needs its prompt and its limit in rows of the KV cache. The cache has as many rows for every document
as the longest needs, so what is bounded is documents times the longest (`max_tokens`): many short or few long ones.
Waiting requests hold what was submitted; they are laid out (pictures opened and cut into tiles) when their turn comes.

Failures. A request that is wrong in any way ends with an error of its own; the others go on. Wrong options are raised
by `submit` at once. Who wants to see errors of the messages there too, or lay out in other threads, submits
`model.inputs(messages)` instead of messages. Where no token can be chosen of one answer's logits, it alone ends. Any
other exception of a pass through the model (memory, say) ends all that were running then; what waits is answered.

Threads. One thread drives (`step` or the iteration), and a second one that tries is refused. `submit`, `cancel` and
`wait` may be called by any thread at any time and never wait for the model.

Legend: T rows of a prompt.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chiasm.errors import ChiasmError, ConfigError, ContextOverflowError, UsageError
from chiasm.model.answer import (
    NOTHING_READ,
    ModelInputs,
    Options,
    Reply,
    Writer,
    make_reply,
    parse_options,
    prompt_usage,
)
from chiasm.model.generate import Decoding, Event

if TYPE_CHECKING:
    from chiasm.model.chat import ChatModel

__all__ = ["MAX_ROWS", "MAX_RUNNING", "MAX_TOKENS", "Piece", "Queue"]

MAX_RUNNING = 64
MAX_TOKENS = 65_536
MAX_ROWS = 512


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that happened to a request.

    Attributes:
        ticket: which one. text: what was written of its answer since its last piece.
        reply: the whole answer, with the last piece of a request; `finish` is "cancelled" for one that was.
        error: in its place, why there is none.
    """

    ticket: int
    text: str = ""
    reply: Reply | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing more will come of this request. Every request has exactly one last piece."""
        return self.reply is not None or self.error is not None


@dataclass(slots=True, eq=False)
class _Request:
    ticket: int
    messages: Any
    images: Seq[Any]
    options: Options
    writer: Writer
    inputs: ModelInputs | None = None
    limit: int = 0
    need: int = 0
    """Rows of the cache that it may come to take."""
    usage: dict[str, int] = field(default_factory=lambda: dict(NOTHING_READ))
    cancelled: bool = False


class Queue:
    """Requests to one `ChatModel`, answered together (see the file's head for order, memory, failures and threads).

    Args:
        model: who answers. Its caches of features and prefixes serve all requests. One that is `deterministic` answers
            one request after the other, each prompt read in one piece: bit-equal to `chat`.
        max_running: most requests at once.
        max_tokens: most rows of the KV cache, documents at once times the longest of them (prompt and limit).
        max_rows: most rows of prompts read in a step, beside the rows of those being written. Encoding the pictures of
            a request is not divided: a step may have to wait for those of one.
        refuse_large: a request that needs more than `max_tokens` by itself fails; False lets it run, alone.

    Raises:
        ConfigError: a number below 1.
    """

    def __init__(
        self,
        model: ChatModel,
        *,
        max_running: int = MAX_RUNNING,
        max_tokens: int = MAX_TOKENS,
        max_rows: int = MAX_ROWS,
        refuse_large: bool = True,
    ) -> None:
        for name, value in (
            ("max_running", max_running),
            ("max_tokens", max_tokens),
            ("max_rows", max_rows),
        ):
            if value < 1:
                raise ConfigError(f"queue option {name} must be at least 1, found {value}")
        self.model = model
        self.max_running, self.max_tokens = max_running, max_tokens
        self.max_rows: int | None = max_rows
        if model.deterministic:  # alone and in one piece, the only way to the bits of `chat`
            self.max_running, self.max_rows = 1, None
        self.refuse_large = refuse_large
        self._tickets = itertools.count()
        self._lock = threading.Condition()  # guards the next two and `cancelled` of every request
        self._waiting: deque[_Request] = deque()
        self._alive: dict[int, _Request] = {}  # submitted and without a last piece
        self._driver = threading.Lock()
        self._running: dict[int, _Request] = {}  # by number of the document
        self._run: Decoding | None = None
        self._pieces: deque[Piece] = deque()  # happened, not yet handed out

    def submit(self, messages: Any, images: Seq[Any] = (), **options: Any) -> int:
        """Ask something; from any thread.

        Args:
            messages, images, options: as of `ChatModel.chat`; or what `ChatModel.inputs` made of messages and images.

        Returns:
            the ticket, which the pieces of the answer carry.

        Raises:
            UsageError, ConfigError: an option is unknown or out of range. What is wrong with the messages ends the
                request when its turn comes.
        """
        chosen = parse_options(options)
        laid = messages if isinstance(messages, ModelInputs) else None
        if laid is not None and images:
            raise UsageError("these inputs are laid out already: give the images to ChatModel.inputs")
        with self._lock:
            request = _Request(next(self._tickets), messages, images, chosen, self.model.writer(chosen), laid)
            self._waiting.append(request)
            self._alive[request.ticket] = request
            self._lock.notify_all()
        return request.ticket

    def cancel(self, ticket: int) -> bool:
        """End a request, from any thread; the others are not affected.

        It takes effect between two steps: its last piece, with what was written until then, comes with the next.

        Returns:
            whether there was something to cancel: False for one that has ended, was cancelled before or never was.
        """
        with self._lock:
            request = self._alive.get(ticket)
            if request is None or request.cancelled:
                return False
            request.cancelled = True
            self._lock.notify_all()
            return True

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs, or has happened that was not handed out."""
        return bool(self._alive or self._pieces)

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests being read or written."""
        return len(self._running)

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until there is something to do, or for so many seconds; returns `busy`."""
        with self._lock:
            return self._lock.wait_for(lambda: self.busy, timeout)

    def step(self) -> list[Piece]:
        """One step for all that run, after letting in what fits; what happened, in order.

        May be empty while `busy`: when only beginnings of prompts were read, or no piece of text is certain.
        """
        self._advance()
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    def __iter__(self) -> Iterator[Piece]:
        """Step until all requests have ended, those too that are submitted meanwhile. May be left and begun again."""
        while True:
            while self._pieces:
                try:
                    piece = self._pieces.popleft()
                except IndexError:  # another thread took it, and will be refused when it steps
                    break
                yield piece
            if not self._alive:
                return
            self._advance()

    def _advance(self) -> None:
        if not self._driver.acquire(blocking=False):
            raise UsageError(
                "another thread drives this queue: let one thread step, others submit and cancel"
            )
        try:
            self._take_out_cancelled()
            self._admit()
            if self._run is not None:
                for event in self._run.advance():
                    self._write(event)
                if not self._running:
                    self._run = None  # and with it the cache's memory
        except Exception as error:  # of the model: who of those running is at fault is not known
            self._fail_running(error)
        except BaseException:
            self._fail_running(ChiasmError("the queue was interrupted while it wrote this answer: ask again"))
            raise
        finally:
            self._driver.release()

    def _take_out_cancelled(self) -> None:
        with self._lock:
            cancelled = [request for request in self._alive.values() if request.cancelled]
            for request in cancelled:
                if request in self._waiting:
                    self._waiting.remove(request)
        for request in cancelled:
            for doc in [doc for doc, running in self._running.items() if running is request]:
                del self._running[doc]
                if self._run is not None:
                    self._run.cancel(doc)
            request.writer.finish = "cancelled"
            self._finish(request, reply=make_reply(request.writer, request.usage))

    def _admit(self) -> None:
        """Start requests in their order while there is room, and while the step's share of prompt rows lasts."""
        rows = 0
        while self._waiting and len(self._running) < self.max_running:
            request = self._waiting[0]
            try:
                if request.inputs is None:
                    request.inputs = self.model.inputs(request.messages, request.images)
                    request.messages, request.images = None, ()
                prompt = len(request.inputs.token_ids)
                request.limit = self.model.room(request.inputs, request.options)
                request.need = prompt + request.limit
                if request.need > self.max_tokens and self.refuse_large:
                    raise ContextOverflowError(
                        f"the request needs {request.need} tokens, {request.limit} of them for its answer, and the "
                        f"queue has room for {self.max_tokens}: ask for a shorter answer, or raise max_tokens"
                    )
                crowded = rows and self.max_rows is not None and rows + prompt > self.max_rows
                if crowded or not self._fits(request):
                    return
                doc = self._start(request)
            except Exception as error:  # this request's own: its messages, its pictures
                self._leave_line(request)
                self._finish(request, error=error)
                continue
            rows += prompt
            self._leave_line(request)
            self._running[doc] = request

    def _fits(self, request: _Request) -> bool:
        longest = max(request.need, *(r.need for r in self._running.values()), 0)
        return not self._running or (len(self._running) + 1) * longest <= self.max_tokens

    def _start(self, request: _Request) -> int:
        if self._run is None:
            self._run = Decoding(
                self.model.model,
                stop_ids=self.model.stop_ids,
                prefixes=self.model.prefixes,
                max_rows=self.max_rows,
                max_running=self.max_running,
                max_tokens=self.max_tokens,
                isolate=True,
            )
        assert request.inputs is not None
        doc = self._run.add(request.inputs.sequence, request.options.sampling, request.limit)
        request.usage = prompt_usage(request.inputs, self._run.reused(doc))
        request.inputs = None  # its pixels are encoded
        return doc

    def _write(self, event: Event) -> None:
        request = self._running[event.doc]
        if event.error is not None:
            del self._running[event.doc]
            self._finish(request, error=event.error)
            return
        text = request.writer.push(event.id or 0, event.finish)
        if request.writer.finish is None:
            if text:
                self._pieces.append(Piece(request.ticket, text))
            return
        assert self._run is not None
        self._run.cancel(event.doc)  # a stop string ends an answer too
        del self._running[event.doc]
        self._finish(request, text=text, reply=make_reply(request.writer, request.usage))

    def _leave_line(self, request: _Request) -> None:
        with self._lock:
            self._waiting.remove(request)

    def _finish(
        self, request: _Request, *, text: str = "", reply: Reply | None = None, error: Exception | None = None
    ) -> None:
        with self._lock:
            self._alive.pop(request.ticket, None)
        self._pieces.append(Piece(request.ticket, text, reply, error))

    def _fail_running(self, error: Exception) -> None:
        """End all that run, and forget the cache they ran in."""
        running, self._running, self._run = list(self._running.values()), {}, None
        error = error.with_traceback(
            None
        )  # whose frames hold the cache, and a reader may hold the error for long
        for request in running:
            self._finish(request, error=error)
