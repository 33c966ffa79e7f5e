"""An OpenAI-compatible server, asked with the standard library: which models it has, and what they answer.

Source: the public HTTP interface that vLLM, SGLang, LMDeploy and llama.cpp's server share (`/v1/models`,
`/v1/chat/completions` with `logprobs`). Nothing that a server sends is trusted: redirects are not followed (a key must
not travel elsewhere), each byte of an answer (headers, chunk sizes and trailers too) counts against a limit and comes
within the time, of its JSON only what has the expected type is taken, and a key that it repeats is not shown.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import math
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

from chiasm.errors import ServiceError, UsageError

__all__ = ["MAX_ANSWER_BYTES", "MAX_TIMEOUT", "Candidate", "Completion", "Endpoint", "Refused"]

MAX_ANSWER_BYTES = 8 << 20
"""Longest answer that is read, headers included; one with twenty alternatives a token takes some kilobytes."""

MAX_TIMEOUT = 86_400.0
"""Longest time-out in seconds: a day, which every clock and socket can count."""

_SHOWN = 200  # characters of a server's own words in an error
_LEAST_KEY = (
    8  # a shorter key is no secret, and its letters would be blanked out of answers that are compared
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that may come next: its text, its bytes where the server tells them, and its log-probability."""

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """An answer of the server.

    Attributes:
        text: what it wrote.
        finish: why it ended, "stop" or "length"; "" where it does not say.
        prompt_tokens: how many tokens it read; None where it does not say.
        first: candidates for the first token, likeliest first; empty where it gives no log-probabilities.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    first: tuple[Candidate, ...]


@dataclass(slots=True)
class Endpoint:
    """A server at a URL.

    Args:
        url: where it is, `http://HOST:PORT`, with or without `/v1`.
        key: sent as a bearer token; None for none.
        timeout: seconds for one answer, from the connection to its last byte.

    Raises:
        UsageError: the URL cannot be one, or the key cannot be sent.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    _host: str = field(init=False, repr=False)
    _base: str = field(init=False, repr=False)
    _secure: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        remedy = "give http://HOST:PORT of the server"
        try:
            parts = urlsplit(self.url)
            _ = parts.port
        except ValueError as error:
            raise UsageError(f"{self.url!r} is no URL ({error}): {remedy}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{self.url!r} is no URL of a server: {remedy}")
        if parts.query or parts.fragment or parts.username is not None:
            raise UsageError(
                f"{self.url!r} is more than the URL of a server: {remedy}, and a key by --api-key"
            )
        if not all(33 <= ord(c) < 127 for c in parts.netloc + parts.path + (self.key or "")):
            raise UsageError("the URL or the key has a character that cannot be sent: check for line ends")
        try:
            parts.hostname.encode("idna")
        except UnicodeError:
            raise UsageError(
                f"{self.url[:_SHOWN]!r} is no URL of a server (labels of a host have 1 to 63 characters): {remedy}"
            ) from None
        if not 0 < self.timeout <= MAX_TIMEOUT:
            raise UsageError(
                f"a time-out of {self.timeout:g} s: it must be positive, and a day ({MAX_TIMEOUT:g}) at most"
            )
        self._secure, self._host = parts.scheme == "https", parts.netloc
        path = parts.path.rstrip("/")
        self._base = path if path.endswith("/v1") else path + "/v1"

    @property
    def private(self) -> bool:
        """Whether nobody between here and the server can read along: https, or this very machine."""
        name = urlsplit(self.url).hostname or ""
        try:
            here = ipaddress.ip_address(name).is_loopback
        except ValueError:
            here = name == "localhost" or name.endswith(".localhost")
        return self._secure or here

    def models(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
            ServiceError: it cannot be asked, or its answer is not a list of models.
        """
        answer = self._ask("GET", "/models")
        listed = answer.get("data")
        if not isinstance(listed, list):
            raise self._strange("/models", "has no list of models")
        return [
            _whole(one["id"]) for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)
        ]

    def choose(self, wanted: str | None = None) -> str:
        """The model to ask: the one wanted, or the only one there is.

        A wanted one is taken at its word where the server fails over listing what it has.

        Raises:
            ServiceError: the server has no such model, none, or several to choose from.
        """
        try:
            names = self.models()
        except Refused:
            if wanted is None:
                raise
            return wanted
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is not None and wanted in names:
            return wanted
        shown = ", ".join(map(self._shown, names[:10])) or "none"
        if wanted is not None:
            raise ServiceError(
                f"{self.url} has no model {wanted!r}: it has {shown}; name one by --served-name"
            )
        raise ServiceError(f"{self.url} has {len(names)} models ({shown}): name one by --served-name")

    def chat(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, max_tokens: int, top: int = 0
    ) -> Completion:
        """Let the server answer a conversation greedily.

        Args:
            model: of `models`.
            messages: in OpenAI's format.
            max_tokens: longest answer.
            top: candidates to be told for the first token; 0 asks for none.

        Raises:
            Refused: the server would not answer this request.
            ServiceError: it cannot be asked, or does not answer as it should.
        """
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": False,
        }
        if top:
            body |= {"logprobs": True, "top_logprobs": top}
        answer = self._ask("POST", "/chat/completions", body)
        choices = answer.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(choice, dict) or not isinstance(message, dict):
            raise self._strange("/chat/completions", "has no message")
        text, usage = message.get("content"), answer.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        finish = choice.get("finish_reason")
        return Completion(
            text=_whole(text) if isinstance(text, str) else "",
            finish=finish if isinstance(finish, str) else "",
            prompt_tokens=count if type(count) is int and 0 <= count < 1 << 31 else None,
            first=_candidates(choice.get("logprobs")) if top else (),
        )

    def _strange(self, path: str, what: str) -> ServiceError:
        return ServiceError(
            f"{self.url}: the answer of {self._base}{path} {what}: is it an OpenAI-compatible server?"
        )

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One exchange; the JSON object of the answer."""
        deadline = time.monotonic() + self.timeout
        headers = {"Accept": "application/json", "Connection": "close"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        sent = None
        if body is not None:
            sent = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(self._host)
        line = None
        try:
            line = _Line(self._connected(connection, deadline), deadline)
            connection.sock = line  # type: ignore[assignment]
            connection.request(method, self._base + path, sent, headers)
            with connection.getresponse() as response:
                raw = _body(response)
        except _TooMuch:
            raise ServiceError(
                f"{self.url} sends more than {MAX_ANSWER_BYTES >> 20} MB for one answer: it was not read further"
            ) from None
        except TimeoutError:
            raise ServiceError(
                f"{self.url} did not answer within {self.timeout:g} s: is the model loaded? (--timeout)"
            ) from None
        except ConnectionRefusedError:
            raise ServiceError(
                f"{self.url}: nobody listens there: start the server, or correct host and port"
            ) from None
        except (socket.gaierror, UnicodeError):
            raise ServiceError(f"{self.url}: there is no host of that name: correct it") from None
        except ssl.SSLError as error:
            raise ServiceError(
                f"{self.url}: no secure connection ({self._shown(str(error.reason or error))}): is it http:// instead?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServiceError(
                f"{self.url} broke the connection off ({self._shown(said)}): see the server's log"
            ) from None
        finally:
            if line is not None:
                line.hang_up()
        self._check_status(response, path, raw)
        try:
            answer = self._without_key(json.loads(raw))
        except (ValueError, RecursionError):
            # Blanked before it is cut, so that no half of a key is left.
            said = self._shown(raw[: 4 * _SHOWN].decode("utf-8", "replace"))
            raise self._strange(path, f"is not JSON ({said[:40]!r})") from None
        if not isinstance(answer, dict):
            raise self._strange(path, "is not a JSON object")
        return answer

    def _connected(self, connection: http.client.HTTPConnection, deadline: float) -> socket.socket:
        """A socket to the server, its secure connection made."""
        port = connection.port if urlsplit(self.url).port or not self._secure else http.client.HTTPS_PORT
        plain = _dialled(connection.host, port, deadline)
        if not self._secure:
            return plain
        try:
            plain.settimeout(_left(deadline))
            return ssl.create_default_context().wrap_socket(plain, server_hostname=connection.host)
        except BaseException:
            plain.close()
            raise

    def _shown(self, text: str) -> str:
        """A stretch of foreign text that may stand in an error line; without the key, should the server repeat it."""
        if self.key:
            for spelled in (self.key, quote(self.key, safe=""), quote(self.key)):
                text = text.replace(spelled, "***")
        return _plain(text)

    def _without_key(self, value: Any) -> Any:
        """JSON of the server whose texts do not repeat the key, for they are shown and written."""
        if self.key is None or len(self.key) < _LEAST_KEY:
            return value
        if isinstance(value, str):
            return value.replace(self.key, "***")
        if isinstance(value, list):
            return [self._without_key(one) for one in value]
        if isinstance(value, dict):
            return {name: self._without_key(one) for name, one in value.items()}
        return value

    def _check_status(self, response: http.client.HTTPResponse, path: str, raw: bytes) -> None:
        status = response.status
        if status == 200:
            return
        place = f"{self.url} ({self._base}{path})"
        if 300 <= status < 400:
            to = self._shown(response.getheader("Location") or "elsewhere")
            raise ServiceError(
                f"{place} redirects to {to}, which is not followed: give that URL if it is meant"
            )
        if status in (401, 403):
            how = "was refused" if self.key else "is needed"
            raise ServiceError(f"{place} answers {status}: an API key {how}: --api-key or OPENAI_API_KEY")
        said = self._shown(_complaint(raw))
        if status == 404:
            told = f" ({said})" if said else ""
            raise ServiceError(
                f"{place} answers 404{told}: no OpenAI-compatible interface there, or no such model: correct the URL"
            )
        raise Refused(
            f"{place} answers {status}{': ' + said if said else ''}: see the server's log", said=said
        )


class Refused(ServiceError):
    """A request that the server understood and would not answer; ``said`` is its reason."""

    def __init__(self, message: str, *, said: str) -> None:
        super().__init__(message)
        self.said = said


class _TooMuch(Exception):
    """An answer of more than `MAX_ANSWER_BYTES`."""


def _left(deadline: float) -> float:
    """Seconds until then; TimeoutError where there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _dialled(host: str, port: int, deadline: float) -> socket.socket:
    """A socket to whichever address of a host answers first in order; all of them share the time."""
    failed: OSError = socket.gaierror("no address")
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        try:
            return socket.create_connection((str(address[0]), port), timeout=_left(deadline))
        except OSError as error:
            failed = error
    raise failed


class _Line:
    """A connection as `http.client` uses it, whose every read is within the time and is counted.

    `http.client` reads status lines, headers, chunk sizes and trailers without end where a server sends them so; each
    of these comes through `makefile`'s reader.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._deadline))
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._sock, self._deadline))

    def close(self) -> None:
        """Asked for when the answer's headers are read; its body still comes."""

    def hang_up(self) -> None:
        self._sock.close()


class _Reader(io.RawIOBase):
    """What comes from a socket until the deadline, `MAX_ANSWER_BYTES` at most."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline, self._count = sock, deadline, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        size = self._sock.recv_into(buffer)
        self._count += size
        if self._count > MAX_ANSWER_BYTES:
            raise _TooMuch
        return size


def _body(response: http.client.HTTPResponse) -> bytes:
    """The whole body; IncompleteRead where the server had announced more."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(parts)


def _whole(text: str) -> str:
    """Text without halves of surrogate pairs, which JSON can spell and nothing can print."""
    return text.encode("utf-8", "replace").decode()


def _complaint(raw: bytes) -> str:
    """The server's own words, from whichever place they use for them."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    for key in ("message", "detail"):
        if isinstance(error, dict) and isinstance(error.get(key), str):
            return error[key]
    return error if isinstance(error, str) else ""


def _plain(text: str) -> str:
    """A stretch of foreign text that may stand in an error line."""
    one = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _SHOWN]).split())
    return one if len(one) <= _SHOWN else one[:_SHOWN] + "…"


def _candidates(logprobs: Any) -> tuple[Candidate, ...]:
    """The alternatives of the first token, likeliest first; none where the field is not what it should be."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    listed = first.get("top_logprobs") if isinstance(first, dict) else None
    found = []
    for one in listed if isinstance(listed, list) else []:
        if not isinstance(one, dict) or not isinstance(one.get("token"), str):
            continue
        value = one.get("logprob")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        # An impossible token has no difference to any other; JSON has no number for it either.
        if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 53):
            continue
        stated = one.get("bytes")
        whole = isinstance(stated, list) and all(type(b) is int and 0 <= b < 256 for b in stated)
        raw = bytes(stated) if whole else one["token"].encode("utf-8", "replace")  # type: ignore[arg-type]
        found.append(Candidate(_whole(one["token"]), raw, float(value)))
    return tuple(sorted(found, key=lambda one: -one.logprob))
