"""An OpenAI-compatible server, asked with the standard library: which models it has, and what they answer.

Source: the public HTTP interface that vLLM, SGLang, LMDeploy and llama.cpp's server share (`/v1/models`,
`/v1/chat/completions` with `logprobs`). Nothing that a server sends is trusted: redirects are not followed (a key must
not travel elsewhere), answers are read up to a limit and within the time, and of its JSON only what has the expected
type is taken.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from chiasm.errors import ServiceError, UsageError

__all__ = ["MAX_ANSWER_BYTES", "Candidate", "Completion", "Endpoint", "Refused"]

MAX_ANSWER_BYTES = 8 << 20
"""Longest answer that is read; one with twenty alternatives a token takes some kilobytes."""

_SHOWN = 200  # characters of a server's own words in an error


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
        if not self.timeout > 0:
            raise UsageError(f"a time-out of {self.timeout} s: it must be positive")
        self._secure, self._host = parts.scheme == "https", parts.netloc
        path = parts.path.rstrip("/")
        self._base = path if path.endswith("/v1") else path + "/v1"

    def models(self) -> list[str]:
        """Names of the models that the server has.

        Raises:
            ServiceError: it cannot be asked, or its answer is not a list of models.
        """
        answer = self._ask("GET", "/models")
        listed = answer.get("data")
        if not isinstance(listed, list):
            raise self._strange("/models", "has no list of models")
        return [one["id"] for one in listed if isinstance(one, dict) and isinstance(one.get("id"), str)]

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
        shown = ", ".join(map(_plain, names[:10])) or "none"
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
            text=text if isinstance(text, str) else "",
            finish=finish if isinstance(finish, str) else "",
            prompt_tokens=count if isinstance(count, int) and not isinstance(count, bool) else None,
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
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=self.timeout)
        try:
            connection.request(method, self._base + path, sent, headers)
            with connection.getresponse() as response:
                raw = self._read(response, connection.sock, deadline)
        except TimeoutError:
            raise ServiceError(
                f"{self.url} did not answer within {self.timeout:g} s: is the model loaded? (--timeout)"
            ) from None
        except ConnectionRefusedError:
            raise ServiceError(
                f"{self.url}: nobody listens there: start the server, or correct host and port"
            ) from None
        except socket.gaierror:
            raise ServiceError(f"{self.url}: there is no host of that name: correct it") from None
        except ssl.SSLError as error:
            raise ServiceError(
                f"{self.url}: no secure connection ({error.reason or error}): is it http:// instead?"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            said = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServiceError(
                f"{self.url} broke the connection off ({_plain(said)}): see the server's log"
            ) from None
        finally:
            connection.close()
        self._check_status(response, path, raw)
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise self._strange(
                path, f"is not JSON ({_plain(raw[:40].decode('utf-8', 'replace'))!r})"
            ) from None
        if not isinstance(answer, dict):
            raise self._strange(path, "is not a JSON object")
        return answer

    def _read(self, response: http.client.HTTPResponse, sock: socket.socket | None, deadline: float) -> bytes:
        """The body, within size and time: a server that sends a byte a minute is not waited for."""
        parts, size = [], 0
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # With `Connection: close` the response holds the socket and the connection may not.
            with contextlib.suppress(OSError, AttributeError):
                (sock or response.fp.raw._sock).settimeout(left)  # type: ignore[union-attr]
            part = response.read1(1 << 16)
            if not part:
                return b"".join(parts)
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise ServiceError(
                    f"{self.url} sends more than {MAX_ANSWER_BYTES >> 20} MB for one answer: it was not read further"
                )

    def _check_status(self, response: http.client.HTTPResponse, path: str, raw: bytes) -> None:
        status = response.status
        if status == 200:
            return
        place = f"{self.url} ({self._base}{path})"
        if 300 <= status < 400:
            to = _plain(response.getheader("Location") or "elsewhere")
            raise ServiceError(
                f"{place} redirects to {to}, which is not followed: give that URL if it is meant"
            )
        if status in (401, 403):
            how = "was refused" if self.key else "is needed"
            raise ServiceError(f"{place} answers {status}: an API key {how}: --api-key or OPENAI_API_KEY")
        if status == 404:
            raise ServiceError(
                f"{place} answers 404: no OpenAI-compatible interface there, or no such model: correct the URL"
            )
        said = _complaint(raw)
        raise Refused(
            f"{place} answers {status}{': ' + said if said else ''}: see the server's log", said=said
        )


class Refused(ServiceError):
    """A request that the server understood and would not answer; ``said`` is its reason."""

    def __init__(self, message: str, *, said: str) -> None:
        super().__init__(message)
        self.said = said


def _complaint(raw: bytes) -> str:
    """The server's own words, from whichever place they use for them."""
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    for key in ("message", "detail"):
        if isinstance(error, dict) and isinstance(error.get(key), str):
            return _plain(error[key])
    return _plain(error) if isinstance(error, str) else ""


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
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            continue
        stated = one.get("bytes")
        whole = isinstance(stated, list) and all(isinstance(b, int) and 0 <= b < 256 for b in stated)
        raw = bytes(stated) if whole else one["token"].encode("utf-8", "surrogatepass")  # type: ignore[arg-type]
        found.append(Candidate(one["token"], raw, float(value)))
    return tuple(sorted(found, key=lambda one: -one.logprob))
