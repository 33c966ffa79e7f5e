"""A model against a server: equal where it is the same one, and each way of being another one named."""

import copy
import dataclasses
import hashlib
import json
import re

import pytest
import torch
from PIL import Image
from tests.checkpoint import servable
from tests.checkpoint.servable import write_servable
from tests.eval import mock_openai
from tests.eval.mock_openai import Mock, serving

import chiasm
from chiasm.cli.app import main
from chiasm.errors import UsageError
from chiasm.eval.endpoint import Candidate, Endpoint
from chiasm.eval.parity import _Words, compare
from chiasm.eval.parity_cases import drawn, of_files, standard_cases
from chiasm.model.chat import ChatModel
from tiny_tokenizers import byte_fallback


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


def rolled(model, by=1):
    """Positions off by some, by one as an encoder that puts its class token elsewhere has them."""
    other = copy.deepcopy(model.model)
    positions = other.embedder.vision.position_embedding
    positions.data = positions.data.roll(by, dims=1)
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
        (lambda m: rolled(m), r"values: .*positions moved by one: .*--position-rows class-last\)"),
        (lambda m: rolled(m, -1), r"values: .*positions moved by one: .*--position-rows class-first\)"),
        (lambda m: rolled(m, 3), r"values: .*the text alone agrees, so the pictures' pixels"),
    ],
    ids=[
        "fewer-tiles",
        "more-tiles",
        "thumbnail",
        "one-tile",
        "budget",
        "system",
        "template",
        "class-first",
        "class-last",
        "pixels",
    ],
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


# --- answers, candidates ---------------------------------------------------------------------------------------------


def of_answers(alter):
    """Changes the answers, and leaves the candidates of the first token as they are."""

    def change(body):
        [choice] = body["choices"]
        if "logprobs" not in choice:
            alter(choice)
        return body

    return change


def of_candidates(alter):
    """Changes the lists of candidates, and leaves the answers as they are."""

    def change(body):
        for one in body["choices"][0].get("logprobs", {}).get("content", []):
            one["top_logprobs"] = alter(one["top_logprobs"])
        return body

    return change


def says(text, finish=None):
    def alter(choice):
        choice["message"]["content"] = text
        choice["finish_reason"] = finish or choice["finish_reason"]

    return of_answers(alter)


def kinds(found):
    return [one.split(":")[0] for one in found.differences]


def test_garbage_behind_a_right_first_token_differs(model):
    found = run(model, Mock(model, change=says("garbage garbage")))
    assert kinds(found) == ["answers"]
    assert "another wording of text, square, wide, tall, small, two" in found.differences[0]
    assert run(
        model, Mock(model, change=says("garbage garbage")), tolerance=1e3
    ).equal  # all tokens are alike then


def test_a_near_tie_may_part(model):
    """The runner-up instead of the likeliest first token, and what the model would write behind it."""
    cases = standard_cases(56, pictures=False)
    inputs = model.inputs(cases[0].for_model())
    values, ids = torch.log_softmax(model.logits(inputs, positions=[-1])[0], -1).topk(2)
    text = model.spec.tokenizer.decode([ids[1].item()], skip_special_tokens=False)
    gap = (values[0] - values[1]).item()
    with serving(Mock(model, change=says(text + " and more"))) as mock:
        endpoint = Endpoint(mock.url, timeout=20)
        near = compare(model, endpoint, cases, max_new_tokens=3, tolerance=gap + 1e-3)
        far = compare(model, endpoint, cases, max_new_tokens=3, tolerance=gap - 1e-3)
    assert near.equal
    assert near.cases[0].parting == "near"
    assert kinds(far) == ["answers"]


def test_later_tokens_are_looked_at_too(model):
    def alter(choice):
        text = choice["message"]["content"]
        choice["message"]["content"] = text[: len(text) // 2] + "!?" + text[len(text) // 2 :]

    assert kinds(run(model, Mock(model, change=of_answers(alter)))) == ["answers"]


@pytest.mark.parametrize("logprobs", [True, False])
def test_white_space_alone_never_counts(model, logprobs):
    def change(body):
        message = body["choices"][0]["message"]
        message["content"] = " " + message["content"].replace(" ", "\n ") + "\n"
        if not logprobs:
            body["choices"][0].pop("logprobs", None)
        return body

    found = run(model, Mock(model, change=change))
    assert found.equal, found.differences
    assert all(case.same_answer for case in found.cases)


def test_an_early_stop_differs(model):
    def alter(choice):
        choice["message"]["content"] = choice["message"]["content"][:1]
        choice["finish_reason"] = "stop"

    assert kinds(run(model, Mock(model, change=of_answers(alter)))) == ["answers"]


def test_an_empty_answer_here_is_no_answer_that_goes_on(model, monkeypatch):
    plain = ChatModel.chat

    def silent(self, messages, images=(), **options):
        reply = plain(self, messages, images, **options)
        return dataclasses.replace(reply, text="", token_ids=[self.stop_ids[0]], finish="stop")

    served = changed(model)
    monkeypatch.setattr(served, "chat", lambda *a, **k: silent(served, *a, **k))
    with serving(Mock(model)) as mock:
        found = compare(served, Endpoint(mock.url, timeout=20), standard_cases(56, pictures=False))
    assert kinds(found) == ["answers"]


def test_each_case_is_judged_by_what_it_has(model):
    """Log-probabilities of the text only, and another answer about the pictures."""
    asked = len(model.inputs(standard_cases(56)[0].for_model()).token_ids)

    def change(body):
        if body["usage"]["prompt_tokens"] != asked:
            body["choices"][0].pop("logprobs", None)
            body["choices"][0]["message"]["content"] = "garbage"
        return body

    found = run(model, Mock(model, change=change))
    assert kinds(found) == ["answers"]
    assert (
        "another wording of square, wide, tall, small, two, and no log-probabilities" in found.differences[0]
    )
    assert "no log-probabilities for square, wide, tall, small, two:" in found.remarks[0]


def test_candidates_that_are_no_tokens_here_differ(model):
    def alter(listed):
        return [
            listed[0],
            *({"token": f"zzqx{n}", "logprob": listed[0]["logprob"] - 0.01} for n in range(19)),
        ]

    found = run(model, Mock(model, change=of_candidates(alter)))
    assert kinds(found) == ["values"]
    assert "'zzqx0', 'zzqx1', 'zzqx2' … unknown here" in found.differences[0]


def test_candidates_that_the_server_leaves_out_differ(model):
    found = run(model, Mock(model, change=of_candidates(lambda listed: [listed[0], *listed[2:]])))
    assert kinds(found) == ["values"]
    assert "missing there" in found.differences[0]
    assert all(len(case.missing) == 1 and not case.unknown for case in found.cases)


def test_few_candidates_are_remarked(model):
    found = run(model, Mock(model, change=of_candidates(lambda listed: listed[:1])))
    assert found.equal, found.differences  # what is less likely than the last one listed may be missing
    assert (
        "the server lists fewer than the 20 likeliest tokens asked for (text 1, square 1" in found.remarks[0]
    )


def test_all_that_is_asked_for_is_compared(model):
    rows = model.spec.tokenizer.vocab_size
    found = run(model, Mock(model), top=rows, tolerance=1e-4)
    assert found.equal, found.differences
    assert all(case.shared > rows - 10 for case in found.cases)


@pytest.mark.parametrize("pieces", [True, False], ids=["pieces", "decoded"])
@pytest.mark.parametrize("prepend", [True, False], ids=["prepend", "plain"])
@pytest.mark.parametrize("family", ["internlm2", "phi3"])
def test_sentencepiece_tokens_with_and_without_a_blank(tmp_path, monkeypatch, family, prepend, pieces):
    """`▁a` and `a` are two tokens; a server spells them apart, or decodes both to the same text."""
    monkeypatch.setattr(servable, "tokenizer_of", lambda family: byte_fallback(prepend=prepend))
    other = chiasm.load(write_servable(tmp_path / "m", family), device="cpu")
    for top in (20, 200):
        found = run(other, Mock(other, pieces=pieces), tolerance=1e-4, top=top)
        assert found.equal, found.differences
        assert all(case.shared >= top - 1 for case in found.cases)


def test_no_token_is_found_twice():
    tokenizer = byte_fallback(prepend=True)
    words, rows = _Words(tokenizer), tokenizer.vocab_size
    known = {tokenizer.id_to_token(index): index for index in range(rows)}
    with_blank, plain = next((known["▁" + text], known[text]) for text in known if "▁" + text in known)
    text = tokenizer.id_to_token(plain)
    values = torch.full((rows,), -20.0)
    values[with_blank], values[plain] = -0.3, -2.5
    apart = [Candidate(" " + text, (" " + text).encode(), -0.3), Candidate(text, text.encode(), -2.5)]
    assert words.find(apart, values) == [with_blank, plain]
    alike = [Candidate(text, text.encode(), -0.3), Candidate(text, text.encode(), -2.5)]
    assert words.find(alike, values) == [with_blank, plain]
    more = [index for index in words.find([*alike, *alike], values) if index is not None]
    assert len(more) == len(set(more)) < 4
    assert words.find([Candidate("é", "é".encode(), -1.0)], values) == [known.get("é")]  # no byte E9


def test_a_server_that_sees_no_pictures(model):
    def blind(messages):
        parts = [part for part in messages[0]["content"] if part["type"] == "text"]
        return [{"role": "user", "content": parts}]

    mock = Mock(model)
    plain = mock_openai.answer

    def raw(path, request):
        if request and not isinstance(request["messages"][0]["content"], str):
            with mock.lock:
                return 200, plain(model, request | {"messages": blind(request["messages"])})
        return None

    mock.raw = raw
    found = run(model, mock)
    assert len(found.differences) == 1
    assert found.differences[0].startswith("pictures: the server does not see pictures")


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


def test_names_and_numbers_of_a_server_are_printed_plainly(folder, model, capsys):
    common = ["--max-new-tokens", "2", "--device", "cpu"]
    with serving(Mock(model, names=["\x1b[31mevil\x1b]0;pwn\x07"])) as mock:
        assert main(["parity", str(folder), "--against", mock.url, *common]) == 0
    out = capsys.readouterr().out
    assert "evil" in out
    assert "\x1b" not in out
    assert "\x07" not in out

    def odd(listed):
        listed[3]["logprob"], listed[4]["logprob"] = float("-inf"), -(10**400)
        return listed

    def change(body):
        body["choices"][0]["message"]["content"] += "\ud800"
        return of_candidates(odd)(body)

    with serving(Mock(model, names=["a\ud800"], change=change)) as mock:
        assert main(["parity", str(folder), "--against", mock.url, "--json", *common]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert found["served"] == "a?"
    assert all(case["shared"] == 18 and len(case["missing"]) <= 2 for case in found["cases"])


def test_a_key_of_the_environment_stays_on_private_lines(folder, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ambient-key")
    sent = []

    def choose(self, wanted=None):
        sent.append(self.key)
        raise UsageError("enough")

    monkeypatch.setattr(Endpoint, "choose", choose)
    for url in ("http://192.0.2.1:9", "http://example.org", "https://example.org", "http://[::1]:9"):
        assert main(["parity", str(folder), "--against", url]) == 2
    assert sent == [None, None, "sk-ambient-key", "sk-ambient-key"]
    err = capsys.readouterr().err
    assert err.count("OPENAI_API_KEY is not sent over plain http to another machine") == 2
    assert "give --api-key if it is meant" in err
    assert main(["parity", str(folder), "--against", "http://example.org", "--api-key", "mine"]) == 2
    assert sent[-1] == "mine"


@pytest.mark.parametrize("timeout", ["inf", "nan", "1e12", "0", "-1"])
def test_time_outs_that_make_no_sense(folder, capsys, timeout):
    assert main(["parity", str(folder), "--against", "http://127.0.0.1:9", "--timeout", timeout]) == 2
    assert "it must be positive, and a day" in capsys.readouterr().err
