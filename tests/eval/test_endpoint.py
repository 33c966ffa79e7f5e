"""The client of an OpenAI-compatible server: nothing that a server sends hangs it, fills it, or shows the key."""

import contextlib
import socket
import threading
import time

import pytest
from tests.eval.mock_openai import Mock, serving

from chiasm.errors import ServiceError, UsageError
from chiasm.eval.endpoint import MAX_ANSWER_BYTES, Endpoint, Refused


def fails(match, mock=None, url=None, **options):
    with serving(mock or Mock()) as there, pytest.raises(ServiceError, match=match) as caught:
        Endpoint(url or there.url, **{"timeout": 5} | options).choose()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nobody_there():
    with pytest.raises(ServiceError, match="nobody listens there"):
        Endpoint("http://127.0.0.1:9").models()
    with pytest.raises(ServiceError, match="no host of that name"):
        Endpoint("http://nobody.invalid").models()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://a b",
        "http://u:p@x",
        "http://x/?a=1",
        "http://[",
        "http://a..b",
        "http://.",
        "http://" + "a" * 64 + ".com",
    ],
)
def test_no_url(url):
    with pytest.raises(UsageError, match="URL"):
        Endpoint(url)


def test_error_codes():
    def status(code, body=b"", headers=()):
        return Mock(raw=lambda path, request: (code, body, headers))

    fails(r"answers 404 \(no such route\): no OpenAI", status(404, {"message": "no such route"}))
    fails(r"answers 404: no OpenAI-compatible interface", status(404, b"<html>"))
    fails(
        r"answers 500: out of \[31mGPU memory: see",
        status(500, {"error": {"message": "out of\n\x1b[31mGPU memory"}}),
    )
    fails(
        r"redirects to http://elsewhere/, which is not followed",
        status(302, b"", [("Location", "http://elsewhere/")]),
    )
    fails(r"answers 401: an API key is needed: --api-key or OPENAI_API_KEY", Mock(key="secret"))
    said = fails(r"answers 401: an API key was refused", Mock(key="secret"), key="wrong-key")
    assert "wrong-key" not in said
    with serving(Mock(key="secret")) as mock:
        assert Endpoint(mock.url, key="secret").choose() == "tiny"


def test_broken_answers():
    def body(content):
        return Mock(raw=lambda path, request: (200, content))

    fails(r"is not JSON \('<html>", body(b"<html>"))
    fails(r"is not a JSON object", body(b"[1]"))
    fails(r"has no list of models", body(b"{}"))
    fails(r"is not JSON", body(b"[" * 100_000))
    with serving(body(b'{"choices": []}')) as mock, pytest.raises(ServiceError, match="has no message"):
        Endpoint(mock.url).chat("tiny", [], max_tokens=1)


def test_a_huge_answer_is_not_read():
    started = time.monotonic()
    fails(r"sends more than 8 MB", Mock(raw=lambda path, request: (200, b" " * (3 * MAX_ANSWER_BYTES))))
    assert time.monotonic() - started < 5


def test_a_slow_answer_is_not_waited_for():
    def raw(path, request):
        time.sleep(1.0)
        return 200, {"data": []}

    fails(r"did not answer within 0.2 s", Mock(raw=raw), timeout=0.2)


@contextlib.contextmanager
def raw_server(first, then=None, pause=0.02):
    """Sends `first`, then `then` again and again; yields the URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def talk():
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(first)
            while then is not None and not done.wait(pause):
                connection.sendall(then)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        done.set()
        thread.join()
        listener.close()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ENDLESS = {
    "body": (OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "headers": (OK + b"X: ", b"a"),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk-size": (CHUNKED, b"0"),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: y\r\n"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_trickle_is_not_waited_for(kind):
    """Each byte comes in time, the whole never does."""
    started = time.monotonic()
    with (
        raw_server(*ENDLESS[kind]) as url,
        pytest.raises(ServiceError, match=r"did not answer within 0\.4 s"),
    ):
        Endpoint(url, timeout=0.4).models()
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("kind", ["continue", "trailers"])
def test_a_flood_is_not_read(kind):
    """What is no body counts against the limit too."""
    first, again = ENDLESS[kind]
    big = again * 40_000 if kind == "continue" else b"X: " + b"y" * 60_000 + b"\r\n"
    with (
        raw_server(first, big, pause=0) as url,
        pytest.raises(ServiceError, match="sends more than 8 MB"),
    ):
        Endpoint(url, timeout=30).models()


@pytest.mark.parametrize(
    "answer",
    [OK + b'Content-Length: 100\r\n\r\n{"data":[', CHUNKED + b'9\r\n{"data":', CHUNKED + b"2\r\n{}\r\n"],
    ids=["length", "chunk", "no-last-chunk"],
)
def test_a_truncated_answer_is_a_broken_connection(answer):
    with raw_server(answer) as url, pytest.raises(ServiceError, match="broke the connection off"):
        Endpoint(url, timeout=5).models()


KEY = "sk-SECRET/123"


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (400, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, ()),
        (400, {"error": {"message": "x" * 190 + KEY}}, ()),
        (404, {"detail": f"no model for {KEY}"}, ()),
        (302, b"", [("Location", f"http://elsewhere/?k={KEY}")]),
        (302, b"", [("Location", "http://elsewhere/?k=sk-SECRET%2F123")]),
        (200, KEY.encode(), ()),
        (200, b" " * 30 + KEY.encode(), ()),
        (200, {"data": [{"id": KEY}, {"id": "b"}]}, ()),
    ],
)
def test_a_key_is_never_shown(status, body, headers):
    said = fails(None, Mock(raw=lambda path, request: (status, body, headers)), key=KEY)
    assert "SECRET" not in said
    assert "***" in said


def test_a_key_in_an_answer_or_a_status_line():
    body = {"choices": [{"message": {"content": f"your key is {KEY}"}}]}
    with serving(Mock(raw=lambda path, request: (200, body))) as mock:
        assert Endpoint(mock.url, key=KEY).chat("m", [], max_tokens=1).text == "your key is ***"
    with (
        raw_server(f"{KEY} is no status line\r\n\r\n".encode()) as url,
        pytest.raises(ServiceError) as caught,
    ):
        Endpoint(url, key=KEY, timeout=5).models()
    assert "SECRET" not in str(caught.value)


def test_refusals_say_why_without_the_key():
    raw = Mock(raw=lambda path, request: (400, {"error": f"logprobs? {KEY}"}))
    with serving(raw) as mock, pytest.raises(Refused) as caught:
        Endpoint(mock.url, key=KEY).models()
    assert caught.value.said == "logprobs? ***"


def test_models_to_choose_from():
    fails(r"has 2 models \(a, b\): name one by --served-name", Mock(names=["a", "b"]))
    fails(r"has 0 models \(none\)", Mock(names=[]))
    with serving(Mock(names=["a", "b"])) as mock:
        assert Endpoint(mock.url).choose("b") == "b"
        with pytest.raises(ServiceError, match=r"no model 'c': it has a, b; name one"):
            Endpoint(mock.url).choose("c")
    with serving(Mock(raw=lambda path, request: (500, b""))) as mock:
        assert (
            Endpoint(mock.url).choose("c") == "c"
        )  # it cannot list them; the name may be right all the same
        with pytest.raises(ServiceError, match="answers 500"):
            Endpoint(mock.url).choose()


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        "x",
        {"content": None},
        {"content": [{"top_logprobs": [{"token": 1, "logprob": 0.0}, {"token": "a", "logprob": "x"}]}]},
        {"content": [{"top_logprobs": [{"token": "a", "logprob": float("nan")}, None, 3]}]},
        {"content": [{"top_logprobs": [{"token": "a", "logprob": -(10**400)}]}]},
        {"content": [{"top_logprobs": [{"token": "a", "logprob": float("-inf")}]}]},
    ],
)
def test_logprobs_that_are_none(logprobs):
    choice = {"message": {"content": None}, "logprobs": logprobs, "finish_reason": 3}
    body = {"choices": [choice], "usage": {"prompt_tokens": True}}
    with serving(Mock(raw=lambda path, request: (200, body))) as mock:
        found = Endpoint(mock.url).chat("tiny", [], max_tokens=1, top=5)
    assert (found.text, found.finish, found.prompt_tokens, found.first) == ("", "", None, ())
