"""Bytes of a picture or video from where a user points: a file, a ``data:`` URL, an ``http(s)`` URL; all with a limit.

Only the http and https schemes are opened (a redirect cannot lead to ``file:`` or ``ftp:`` either), a reply
larger than the limit is refused before it is read where the server says its length and while reading
otherwise, and a server that drips is cut off by a deadline for the whole transfer.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import http.client
import re
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Literal

from chiasm.errors import ImageError

__all__ = ["MAX_BYTES", "is_url", "load_bytes", "short_name"]

MAX_BYTES = 64 * 2**20
"""Default limit for what is downloaded, decoded from a ``data:`` URL or read from a pipe."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]{1,30}://")
_CHUNK = 1 << 16

Kind = Literal["image", "video"]
_NOUNS = {"image": "picture", "video": "video"}


def is_url(source: str) -> bool:
    """Whether a string is a ``data:`` URL or ``scheme://…`` rather than a path."""
    return source[:5].lower() == "data:" or _SCHEME.match(source) is not None


def short_name(source: object, limit: int = 160) -> str:
    """A printable one-line name of a source for messages: paths as they are, long ones with a cut middle."""
    text = str(source)
    if text[:5].lower() == "data:":
        return f"data URL ({len(text)} characters)"
    if is_url(text):
        # Queries and user:password@ may hold secrets that do not belong into a log.
        scheme, _, rest = text.partition("://")
        place = re.split(r"[?#]", rest[:2000], maxsplit=1)[0]
        host, slash, path = place.partition("/")
        text = f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
    text = "".join(c if c.isprintable() else "?" for c in text[: 4 * limit])
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"


def load_bytes(
    source: str | Path,
    *,
    limit: int = MAX_BYTES,
    timeout: float = 20.0,
    deadline: float | None = None,
    kind: Kind = "image",
) -> bytes:
    """Read a file, pipe, ``data:`` URL or http(s) URL of at most ``limit`` bytes.

    Args:
        source: a path, ``data:[type][;base64],…`` or ``http(s)://…``.
        limit: largest accepted size in bytes.
        timeout: seconds to wait for the server at each step.
        deadline: seconds that the whole transfer may take; default: three times `timeout`.
        kind: what is asked of the server, and what messages speak of.

    Raises:
        ImageError: missing, unreadable, too large, not retrievable, or a scheme other than http and https.
    """
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _data_url(source, limit, kind)
    if isinstance(source, str) and is_url(source):
        return _http(source, limit, timeout, 3 * timeout if deadline is None else deadline, kind)
    name = short_name(source)
    path = local_path(source)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise file_error(name, error) from error
    return _within(data, limit, name, kind)


def local_path(source: str | Path) -> Path:
    """The path of an existing file or pipe; a folder, no file or an impossible name is an `ImageError`."""
    name = short_name(source)
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise file_error(name, error) from error
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name}: is a folder, not an image; name one file in it")
    return path


def file_error(name: str, error: OSError | ValueError) -> ImageError:
    """The one-line `ImageError` for what the operating system said about a path."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ImageError(f"{name}: no such file; check the path")
    if isinstance(error, PermissionError):
        return ImageError(f"{name}: no permission to read it; change its mode or owner")
    if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
        return ImageError(
            f"{name}: cannot be read ({error.strerror or type(error).__name__}); check the path"
        )
    return ImageError(f"{name}: is not a possible file name; check the path")


def _within(data: bytes, limit: int, name: str, kind: Kind) -> bytes:
    if len(data) > limit:
        raise _too_long(name, limit, kind)
    return data


def _too_long(name: str, limit: int, kind: Kind) -> ImageError:
    return ImageError(f"{name}: holds more than {limit / 2**20:.0f} MiB; make the {_NOUNS[kind]} smaller")


def _data_url(source: str, limit: int, kind: Kind) -> bytes:
    name = short_name(source)
    header, comma, body = source.partition(",")
    if not comma or len(header) > 400:
        raise ImageError(f"{name}: is not of the form data:{kind}/…;base64,…; check how it was built")
    if len(body) > 4 * limit:
        raise _too_long(name, limit, kind)
    raw = urllib.parse.unquote_to_bytes(body)
    if header.lower().endswith(";base64"):
        packed = b"".join(raw.split())
        try:
            raw = base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
        except binascii.Error as error:
            raise ImageError(f"{name}: is not valid base64; encode the file again") from error
    return _within(raw, limit, name, kind)


def _opener() -> urllib.request.OpenerDirector:
    """An opener that knows http and https alone (the standard one also opens file:, ftp: and data: URLs)."""
    director = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        director.add_handler(handler)
    return director


def _http(source: str, limit: int, timeout: float, deadline: float, kind: Kind) -> bytes:
    name = short_name(source)
    scheme = source.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        raise ImageError(
            f"{name}: the scheme {scheme} is not supported; give a path, or an http or https URL"
        )
    ends = time.monotonic() + deadline
    try:
        request = urllib.request.Request(
            source, headers={"User-Agent": "chiasm", "Accept": f"{kind}/*,*/*;q=0.1"}
        )
        with contextlib.closing(_opener().open(request, timeout=timeout)) as reply:
            return _read_reply(reply, limit, ends, name, kind)
    except urllib.error.HTTPError as error:
        with error:
            raise ImageError(
                f"{name}: the server answered {error.code} {error.reason}; check the URL"
            ) from error
    except urllib.error.URLError as error:
        reason = short_name(error.reason, 80)
        raise ImageError(f"{name}: cannot be fetched ({reason}); check the URL and the network") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = short_name(error, 80) or type(error).__name__
        raise ImageError(f"{name}: cannot be fetched ({reason}); check the URL and the network") from error


def _read_reply(reply: http.client.HTTPResponse, limit: int, ends: float, name: str, kind: Kind) -> bytes:
    length = reply.headers.get("Content-Length", "")
    expected = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
    if expected is not None and expected > limit:
        raise _too_long(name, limit, kind)
    data = bytearray()
    while chunk := reply.read1(_CHUNK):
        data += chunk
        if len(data) > limit:
            raise _too_long(name, limit, kind)
        if time.monotonic() > ends:
            raise ImageError(f"{name}: the server is too slow; download the {_NOUNS[kind]} and give its path")
    if expected is not None and len(data) < expected:
        raise ImageError(f"{name}: the transfer broke off after {len(data)} of {expected} bytes; try again")
    return bytes(data)
