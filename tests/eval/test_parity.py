"""A model against a server: equal where it is the same one, and each way of being another one named."""

import copy
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time

import pytest
from PIL import Image
from tests.checkpoint.servable import write_servable
from tests.eval.mock_openai import Mock, serving

import chiasm
from chiasm.cli.app import main
from chiasm.errors import ServiceError, UsageError
from chiasm.eval.endpoint import MAX_ANSWER_BYTES, Endpoint
from chiasm.eval.parity import compare
from chiasm.eval.parity_cases import drawn, of_files, standard_cases
from chiasm.model.chat import ChatModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_servable(tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(scope="module")
def model(folder):
    return chiasm.load(folder, device="cpu")


def changed(model, **fields):
    return ChatModel(model.model, dataclasses.replace(model.spec, **fields), name=model.name)


def cut(model, **fields):
    return changed(model, tiles=dataclasses.replace(model.spec.tiles, **fields))


def rolled(model):
    """Positions off by one, as an encoder that puts its class token elsewhere has them."""
    other = copy.deepcopy(model.model)
    positions = other.embedder.vision.position_embedding
    positions.data = positions.data.roll(1, dims=1)
    return ChatModel(other, model.spec, name=model.name)


def run(model, mock, **options):
    cases = standard_cases(model.spec.tiles.image_size)
    with serving(mock):
        return compare(model, Endpoint(mock.url, timeout=20), cases, **{"max_new_tokens": 6} | options)


def test_a_server_of_the_same_model_is_equal(model):
    mock = Mock(model)
    found = run(model, mock, tolerance=1e-4)
    assert found.equal, found.differences
    assert [case.name for case in found.cases] == ["text", "square", "wide", "tall", "small", "two"]
    assert all(case.tokens == case.server_tokens and case.tiles == case.server_tiles for case in found.cases)
    assert all(case.shared >= 18 and case.largest < 1e-4 and case.same_top for case in found.cases)
    assert all(case.same_answer for case in found.cases)
    tiles = {case.name: case.tiles for case in found.cases}
    assert (tiles["text"], tiles["small"]) == (0, 1)
    assert min(tiles["square"], tiles["wide"], tiles["tall"]) > 2
    assert {request["temperature"] for _, request, _ in mock.requests if request} == {0}
    assert not found.remarks


def test_two_spellings_of_the_url_and_tokens_without_bytes(model):
    with serving(Mock(model, with_bytes=False)) as mock:
        endpoint = Endpoint(mock.url + "/v1/", timeout=20)
        found = compare(model, endpoint, standard_cases(56, pictures=False), max_new_tokens=2)
    assert found.equal
    assert found.cases[0].shared >= 15


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            lambda m: cut(m, max_tiles=2),
            r"tiles: .*the server cuts with max_tiles 2 (to 3 )?\(the model: 6\)",
        ),
        (
            lambda m: cut(m, max_tiles=12),
            r"tiles: .*the server cuts with max_tiles 12 (to 15 )?\(the model: 6\)",
        ),
        (lambda m: cut(m, thumbnail=False), r"tiles: square 4 instead of 5, .*the server adds no thumbnail"),
        (lambda m: cut(m, dynamic=False), r"tiles: .*(does not cut pictures into tiles|max_tiles 1 )"),
        (lambda m: cut(m, mode="hf"), r"tiles: two .*gives every picture the whole limit of tiles"),
        (lambda m: changed(m, system=""), r"template: the server reads \d+ tokens fewer of text"),
        (lambda m: changed(m, template="Hermes-2"), r"template: the server reads \d+ tokens more of text"),
        (lambda m: rolled(m), r"values: .*the text alone agrees, so the pictures' pixels"),
    ],
    ids=["fewer-tiles", "more-tiles", "thumbnail", "one-tile", "budget", "system", "template", "pixels"],
)
def test_what_is_wrong_is_named(model, other, said):
    found = run(model, Mock(other(model)), tolerance=1e-3)
    assert not found.equal
    assert any(re.search(said, one) for one in found.differences), found.differences
    kinds = {one.split(":")[0] for one in found.differences}
    assert kinds == {said.split(":")[0]}, found.differences  # one cause, one sentence


def test_other_weights_are_named(model, tmp_path):
    other = chiasm.load(write_servable(tmp_path / "m", seed=1), device="cpu")
    found = run(model, Mock(other))
    assert [one.split(":")[0] for one in found.differences] == ["values"]
    assert "other weights" in found.differences[0]
    assert all(case.tokens == case.server_tokens for case in found.cases)


def test_a_small_difference_is_within_the_tolerance(model):
    def warmer(body):
        for choice in body["choices"]:
            for one in choice.get("logprobs", {}).get("content", []):
                for token in one["top_logprobs"]:
                    token["logprob"] -= 0.03
        return body

    assert run(model, Mock(model, change=warmer)).equal
    found = run(model, Mock(model, change=warmer), tolerance=0.01)
    assert not found.equal
    assert found.cases[0].largest == pytest.approx(0.03, abs=1e-3)
    assert found.cases[0].mean == pytest.approx(0.03, abs=1e-3)


def test_no_numbers_of_pictures(model):
    """A server that does not write Image-1: reads other text, and that is no whole number of tiles."""
    template = dataclasses.replace(model.spec.template, numbered=False)
    found = run(model, Mock(changed(model, template=template)))
    [said] = found.differences
    assert said.startswith("tokens: the server reads")
    assert "'two'" in said
    assert found.cases[-1].server_tiles is None
    assert all(case.server_tiles == case.tiles for case in found.cases[:-1])


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_server_without_logprobs(model, kind):
    def raw(path, request):
        if request and request.get("logprobs") and kind == "refused":
            return 400, {"error": {"message": "logprobs are not supported"}}
        return None

    def change(body):
        body["choices"][0].pop("logprobs", None)
        return body

    mock = Mock(model, raw=raw, change=change)
    found = run(model, mock)
    assert found.equal
    assert len(found.remarks) == 1
    assert "no log-probabilities" in found.remarks[0]
    assert all(case.largest is None and case.same_top is None for case in found.cases)
    if kind == "refused":
        asked = [request.get("logprobs") for _, request, _ in mock.requests if request]
        assert asked.count(True) == 1  # not tried again


def test_answers_count_where_there_are_no_logprobs(model, tmp_path):
    other = chiasm.load(write_servable(tmp_path / "m", seed=1), device="cpu")

    def change(body):
        body["choices"][0].pop("logprobs", None)
        return body

    found = run(model, Mock(other, change=change))
    assert [one.split(":")[0] for one in found.differences] == ["answers"]


def test_a_server_that_does_not_count(model):
    def change(body):
        del body["usage"]
        return body

    found = run(model, Mock(model, change=change))
    assert found.equal
    assert all(case.server_tokens is None and case.server_tiles is None for case in found.cases)
    assert "does not say how many tokens" in found.remarks[0]


def test_a_server_that_does_not_stop(model, monkeypatch):
    plain = ChatModel.chat

    def stops(self, messages, images=(), **options):
        reply = plain(self, messages, images, **options)
        return dataclasses.replace(reply, text=reply.text[:1], finish="stop")

    mock = Mock(model)
    with serving(mock):
        cases = standard_cases(56, pictures=False)
        served = changed(model)
        monkeypatch.setattr(served, "chat", lambda *a, **k: stops(served, *a, **k))
        found = compare(served, Endpoint(mock.url, timeout=20), cases, max_new_tokens=8)
    assert any(one.startswith("end: the server goes on") for one in found.differences)


# --- servers that do not answer as they should -----------------------------------------------------------------------


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
    ],
)
def test_no_url(url):
    with pytest.raises(UsageError, match="URL"):
        Endpoint(url)


def test_error_codes():
    def status(code, body=b"", headers=()):
        return Mock(raw=lambda path, request: (code, body, headers))

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


def test_a_trickle_is_not_waited_for():
    """Each byte comes in time, the whole never does."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def drip():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not done.wait(0.05):
            try:
                connection.sendall(b" ")
            except OSError:
                break
        connection.close()

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(ServiceError, match=r"did not answer within 0\.5 s"):
            Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.5).models()
    finally:
        done.set()
        thread.join()
        listener.close()


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
    ],
)
def test_logprobs_that_are_none(logprobs):
    choice = {"message": {"content": None}, "logprobs": logprobs, "finish_reason": 3}
    body = {"choices": [choice], "usage": {"prompt_tokens": True}}
    with serving(Mock(raw=lambda path, request: (200, body))) as mock:
        found = Endpoint(mock.url).chat("tiny", [], max_tokens=1, top=5)
    assert (found.text, found.finish, found.prompt_tokens, found.first) == ("", "", None, ())


# --- pictures and the command ----------------------------------------------------------------------------------------


def test_pictures_are_the_same_everywhere():
    pixels = drawn(90, 60, seed=3).tobytes()
    assert pixels == drawn(90, 60, seed=3).tobytes() != drawn(90, 60, seed=4).tobytes()
    assert hashlib.sha256(drawn(8, 6, seed=0).tobytes()).hexdigest()[:12] == GOLDEN


GOLDEN = "d1095a13797f"


def test_own_pictures(tmp_path):
    drawn(40, 30).save(tmp_path / "a.png")
    [case] = of_files([tmp_path / "a.png"])
    assert (case.name, case.sizes) == ("a.png", ((40, 30),))
    assert case.pictures[0].startswith("data:image/png;base64,")


def test_command(folder, model, tmp_path, capsys, monkeypatch):
    Image.new("RGB", (200, 60), "red").save(tmp_path / "mine.jpg")
    common = ["--max-new-tokens", "4", "--device", "cpu"]
    with serving(Mock(model, key="k")) as mock:
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        given = ["parity", str(folder), "--against", mock.url, *common]
        assert main([*given, "--image", str(tmp_path / "mine.jpg")]) == 0
        out = capsys.readouterr().out
        assert "mine.jpg" in out
        assert out.strip().splitlines()[-1].startswith("equal: tiny at http://127.0.0.1")
        assert main([*given, "--max-tiles", "2", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["equal"] is False
        assert re.search(r"max_tiles 6 (to 8 )?\(the model: 2\)", " ".join(found["differences"]))
        assert main([*given, "--system", ""]) == 1
        out = capsys.readouterr().out
        assert "differs: template: the server reads" in out
        assert main([*given, "--served-name", "other"]) == 1
        assert "has no model 'other': it has tiny" in capsys.readouterr().err
        assert main(["parity", str(folder), "--against", mock.url, "--api-key", "x"]) == 1
        assert "an API key was refused" in capsys.readouterr().err


def test_command_refuses_nonsense(folder, capsys):
    assert main(["parity", str(folder), "--against", "nowhere"]) == 2
    assert main(["parity", str(folder)]) == 2
    assert main(["parity", str(folder), "--against", "http://x", "--top", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
