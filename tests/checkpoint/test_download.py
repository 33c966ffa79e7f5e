"""Checkpoints of a model hub: a server on 127.0.0.1 that behaves like one, well and badly."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.cli.conftest import write_internvl

from chiasm import hub as chiasm_hub
from chiasm.checkpoint.download import check_sums, fetch
from chiasm.errors import CheckpointError, ChiasmError
from mock_hub import MockHub, closed_port, point_at

ID = "OpenGVLab/InternVL2_5-tiny"
UNWANTED = {
    "modeling_internvl_chat.py": b"raise SystemExit('remote code ran')",
    "pytorch_model.bin": b"\x80\x04pickle",
    "optimizer.pt": b"\x80\x04pickle",
    "README.md": b"# card",
    "special_tokens_map.json": b"{}",
    "notes.txt": b"text",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_internvl(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(scope="module")
def server() -> Iterator[MockHub]:
    with MockHub().running() as hub:  # one address for all: some versions of the library remember it
        yield hub


@pytest.fixture
def hub(
    server: MockHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> Iterator[MockHub]:
    """A hub with one tiny checkpoint, and this process pointed at it."""
    server.reset()
    server.push_folder(ID, checkpoint, **UNWANTED)
    point_at(server.url, tmp_path / "cache", monkeypatch)
    yield server
    close = getattr(sys.modules["huggingface_hub"], "close_session", None)
    if close is not None:
        close()


def line(action, *given, kind: type[ChiasmError] = CheckpointError, **options) -> str:
    """The one line of a failure."""
    with pytest.raises(kind) as caught:
        action(*given, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.exit_code == 1
    return text


def test_fetches_what_is_needed_and_nothing_that_runs(hub: MockHub, checkpoint: Path) -> None:
    got = fetch(ID)
    assert got.repo == ID
    assert got.commit == hub.repos[ID]["main"]
    assert len(got.weights) > 1
    expected = {path.name for path in checkpoint.iterdir()} | {"special_tokens_map.json", "notes.txt"}
    assert {path.name for path in got.folder.iterdir()} == expected
    assert set(hub.fetched()) == expected
    for name in expected - set(UNWANTED):
        assert (got.folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert check_sums(got) == len(got.weights)


def test_a_model_of_the_hub_answers_like_its_folder(hub: MockHub, checkpoint: Path) -> None:
    model = chiasm_hub.load(ID, device="cpu", max_tiles=2)
    assert model.name == ID
    assert model.spec.tiles.max_tiles == 2
    here = chiasm_hub.load(checkpoint, device="cpu")
    assert model.chat("hello", max_new_tokens=4).token_ids == here.chat("hello", max_new_tokens=4).token_ids


def test_a_release_with_slow_tokenizer_files(hub: MockHub, checkpoint: Path) -> None:
    """As most InternVL releases are: vocab.json and merges.txt, added tokens in the configuration."""
    state = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in state["model"]["merges"])])
    table = {str(token.pop("id")): token for token in state["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": table, "eos_token": "<|im_end|>"}
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "tokenizer.json"}
    files["vocab.json"] = json.dumps(state["model"]["vocab"]).encode()
    files["merges.txt"] = merges.encode()
    files["tokenizer_config.json"] = json.dumps(config).encode()
    hub.push("OpenGVLab/slow", files)
    slow, fast = chiasm_hub.load("OpenGVLab/slow", device="cpu"), chiasm_hub.load(checkpoint, device="cpu")
    messages = [{"role": "user", "content": "What is  in it? don't 1999\n\n 你是"}]
    assert slow.inputs(messages).token_ids.tolist() == fast.inputs(messages).token_ids.tolist()


def test_the_second_run_needs_no_network(hub: MockHub, tmp_path: Path, monkeypatch) -> None:
    first = fetch(ID)
    hub.requests.clear()
    assert fetch(ID) == first
    assert hub.fetched() == []
    point_at(hub.url, tmp_path / "cache", monkeypatch, offline=True)
    hub.requests.clear()
    assert fetch(ID) == first
    assert fetch(ID, first.commit) == first
    assert hub.requests == []
    point_at(f"http://127.0.0.1:{closed_port()}", tmp_path / "cache", monkeypatch)
    assert fetch(ID) == first


def test_revisions_are_pinned(hub: MockHub, checkpoint: Path) -> None:
    old = fetch(ID).commit
    config = json.loads((checkpoint / "config.json").read_text()) | {"max_dynamic_patch": 3}
    new = hub.push_folder(ID, checkpoint, **{"config.json": json.dumps(config).encode()})
    hub.repos[ID]["v1"] = old
    assert fetch(ID).commit == new != old
    assert fetch(ID, "v1").commit == fetch(ID, old).commit == old
    assert chiasm_hub.load(f"{ID}@v1", device="cpu").spec.tiles.max_tiles == 6
    assert chiasm_hub.load(ID, revision=new, device="cpu").spec.tiles.max_tiles == 3
    assert f"{ID} has no revision 'v9' at {hub.url}" in line(fetch, ID, "v9")


def test_a_broken_transfer_is_taken_up_where_it_broke(hub: MockHub, checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come in part of a chunk is lost
    name = sorted(path.name for path in checkpoint.glob("*.safetensors"))[0]
    hub.cut = {name: (5000, 1)}
    got = fetch(ID)
    assert (got.folder / name).read_bytes() == (checkpoint / name).read_bytes()
    ranges = [wanted for method, path, wanted in hub.requests if method == "GET" and path.endswith(name)]
    assert ranges == [None, "bytes=5000-"]
    assert check_sums(got) == len(got.weights)


def test_a_connection_that_breaks_again_and_again_is_one_line(hub: MockHub, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cut = {"config.json": (10, 1000)}
    text = line(fetch, ID)
    assert (
        text
        == f"{ID}: the connection to {hub.url} broke several times: run it again (complete files are kept)"
    )


def test_what_is_complete_is_not_fetched_again_after_a_failure(
    hub: MockHub, checkpoint: Path, monkeypatch
) -> None:
    names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    hub.short = {names[-1]: 100}
    text = line(fetch, ID)
    assert text == f"{ID}: a file arrived truncated from {hub.url}: run it again (complete files are kept)"
    hub.short = {}
    hub.requests.clear()
    got = fetch(ID)
    assert check_sums(got) == len(names)
    assert names[-1] in hub.fetched()
    assert not set(hub.fetched()) & set(names[:-1])


def test_a_file_that_was_cut_in_the_cache_is_named(hub: MockHub) -> None:
    got = fetch(ID)
    blob = (got.folder / got.weights[0]).resolve()
    blob.write_bytes(blob.read_bytes()[:-10])
    text = line(fetch, ID)
    assert text.startswith(f"{ID}: {got.weights[0]} in the cache is truncated or damaged")
    assert f"delete {blob}" in text
    blob.unlink()
    (got.folder / got.weights[0]).unlink()
    assert fetch(ID) == got


def test_other_bytes_of_the_same_length_are_found(hub: MockHub) -> None:
    got = fetch(ID)
    blob = (got.folder / got.weights[0]).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    assert "does not have the SHA-256 of the hub" in line(check_sums, fetch(ID))


def test_a_wrong_id_is_one_line(hub: MockHub) -> None:
    text = line(fetch, "OpenGVLab/InternVL9")
    assert text.startswith(f"there is no folder OpenGVLab/InternVL9, and no model of that name at {hub.url}")
    hub.private.add(ID)
    assert "hf auth login" in line(fetch, ID)
    assert "is not a possible name" in line(fetch, "a/b--c")


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_a_gated_repository_is_one_line(hub: MockHub, token: str | None, monkeypatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.gated.add(ID)
    text = line(fetch, ID)
    assert text.startswith(f"{ID} is gated: accept its terms at {hub.url}/{ID}, then log in")


@pytest.mark.parametrize("status", [500, 503, 429, 403])
def test_a_hub_in_trouble_is_one_line(hub: MockHub, status: int, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    text = line(fetch, ID)
    assert text.startswith(f"{ID}: {hub.url} ")
    assert str(status) in text
    assert "log in" in text if status == 403 else "try again later" in text


def test_a_hub_that_is_down_is_one_line(tmp_path: Path, monkeypatch) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    point_at(url, tmp_path, monkeypatch)
    text = line(fetch, ID)
    assert text.startswith(f"{ID} at main is not complete in the cache, and {url} cannot be reached")
    assert "HF_ENDPOINT" in text


def test_an_incomplete_cache_without_a_network_is_one_line(hub: MockHub, tmp_path: Path, monkeypatch) -> None:
    got = fetch(ID)
    (got.folder / got.weights[0]).unlink()
    point_at(hub.url, tmp_path / "cache", monkeypatch, offline=True)
    assert ID in line(fetch, ID)
    point_at(hub.url, tmp_path / "cache", monkeypatch)
    assert fetch(ID) == got


def without_network(hub: MockHub, cache: Path, monkeypatch, how: str) -> None:
    """The cache is as most versions of the library leave it: recent ones list the commit's files in it themselves."""
    for listed in cache.glob("*/trees"):
        shutil.rmtree(listed)
    url = hub.url if how == "offline" else f"http://127.0.0.1:{closed_port()}"
    point_at(url, cache, monkeypatch, offline=how == "offline")


@pytest.mark.parametrize("how", ["offline", "down"])
@pytest.mark.parametrize("name", ["config.json", "special_tokens_map.json", "notes.txt"])
def test_a_small_file_that_the_cache_lacks_is_named(
    hub: MockHub, tmp_path: Path, monkeypatch, how: str, name: str
) -> None:
    """What there is was noted when the hub could be asked."""
    got = fetch(ID)
    hub.requests.clear()
    assert fetch(ID) == got
    (got.folder / name).unlink()
    without_network(hub, tmp_path / "cache", monkeypatch, how)
    text = line(fetch, ID)
    assert text.startswith(
        f"{ID} at main is not complete in the cache {tmp_path / 'cache'} (it lacks {name})"
    )
    point_at(hub.url, tmp_path / "cache", monkeypatch)
    assert fetch(ID) == got


@pytest.mark.parametrize("how", ["offline", "down"])
def test_a_cache_that_another_program_filled(
    hub: MockHub, tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Nobody noted what there is: the least is demanded, and said."""
    from huggingface_hub import snapshot_download

    cache = tmp_path / "cache"
    snapshot_download(ID, allow_patterns=["special_tokens_map.json"])
    without_network(hub, cache, monkeypatch, how)
    assert "is not complete in the cache" in line(fetch, ID)
    assert "(it lacks config.json)" in line(fetch, ID)
    point_at(hub.url, cache, monkeypatch)
    snapshot_download(ID, allow_patterns=["config.json", "*.safetensors", "*.index.json"])
    without_network(hub, cache, monkeypatch, how)
    assert "(it lacks a tokenizer)" in line(fetch, ID)
    point_at(hub.url, cache, monkeypatch)
    snapshot_download(ID, allow_patterns=["tokenizer.json"])
    without_network(hub, cache, monkeypatch, how)
    assert not caplog.messages
    got = fetch(ID)
    assert not (got.folder / "notes.txt").exists()
    (said,) = caplog.messages
    assert said.startswith(f"{ID}: the hub cannot be asked whether its files in the cache are complete")
    point_at(hub.url, cache, monkeypatch)
    assert (fetch(ID).folder / "notes.txt").is_file()
    without_network(hub, cache, monkeypatch, how)
    assert fetch(ID) == got
    assert len(caplog.messages) == 1


def test_a_damaged_note_or_one_that_cannot_be_written_is_no_obstacle(
    hub: MockHub, tmp_path: Path, monkeypatch
) -> None:
    got = fetch(ID)
    (note,) = (tmp_path / "cache" / "chiasm").rglob("*.json")
    assert note.stem == got.commit
    assert "notes.txt" in json.loads(note.read_text())
    note.write_text('{"a": ')
    assert fetch(ID) == got
    assert "notes.txt" in json.loads(note.read_text())
    assert list(note.parent.iterdir()) == [note]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "file"))
    assert fetch(ID) == got


PICKLES = {"config.json": b"{}", "pytorch_model-00001-of-00002.bin": b"\x80", "modeling.py": b"x"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            PICKLES,
            "has only pickled weights (pytorch_model-00001-of-00002.bin), which can run code when read",
        ),
        ({"config.json": b"{}"}, "has no weights"),
        (
            {"config.json": b"{}", "adapter_model.safetensors": b""},
            "has adapter_model.safetensors but neither",
        ),
        ({"README.md": b"", "model.safetensors": b""}, "has no config.json"),
        ({"config.json": b"{}", "model.safetensors": b"short"}, "truncated or damaged (5 bytes)"),
        (
            {
                "config.json": b"{}",
                "model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}',
            },
            "names no safetensors of its own folder",
        ),
        (
            {
                "config.json": b"{}",
                "x.safetensors": b"",
                "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}',
            },
            "lacks model-1.safetensors, which its index names",
        ),
    ],
)
def test_repositories_without_usable_weights_are_one_line(hub: MockHub, files: dict, said: str) -> None:
    hub.push("some/other", files)
    text = line(fetch, "some/other")
    assert "some/other" in text
    assert said in text
    assert not [name for name in hub.fetched() if name.endswith((".bin", ".py"))]


def test_what_does_not_load_names_the_id(hub: MockHub, checkpoint: Path) -> None:
    hub.push_folder(ID, checkpoint, **{"config.json": b'{"model_type": "bert"}'})
    text = line(chiasm_hub.load, ID, device="cpu")
    assert text.startswith(f"{ID} at {hub.repos[ID]['main'][:12]}: ")


def test_a_full_disk_is_one_line(hub: MockHub, monkeypatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    assert "no room left" in line(fetch, ID)


def test_what_nobody_foresaw_is_not_hidden(hub: MockHub, monkeypatch) -> None:
    def broken(*_, **__) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    with pytest.raises(ZeroDivisionError):
        fetch(ID)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere(
    hub: MockHub, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    fetch(ID, stream=screen)
    assert ID in screen.getvalue()
    assert " of " in screen.getvalue()
    assert capfd.readouterr() == ("", "")


def test_failures_print_nothing_by_themselves(hub: MockHub, capfd: pytest.CaptureFixture[str]) -> None:
    name = next(name for name in hub.commits[ID, hub.repos[ID]["main"]] if name.endswith(".safetensors"))
    hub.short = {name: 100}
    line(fetch, ID)
    line(fetch, "OpenGVLab/none")
    assert capfd.readouterr() == ("", "")


def command(words: list[str], url: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with the variables that people set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    code = "import sys; from chiasm.cli.app import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, timeout=110
    )


def test_the_command_line_honours_the_variables(hub: MockHub, tmp_path: Path) -> None:
    words = ["chat", "--model", ID, "--device", "cpu", "--max-new-tokens", "3", "--json", "hello"]
    first = command(words, hub.url, tmp_path / "home")
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert len(answer["token_ids"]) == 3
    hub.requests.clear()
    again = command(words, f"http://127.0.0.1:{closed_port()}", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["token_ids"] == answer["token_ids"]
    assert hub.requests == []


def test_the_command_line_fails_in_one_line(hub: MockHub, tmp_path: Path) -> None:
    ran = command(["chat", "--model", "OpenGVLab/none", "--revision", "v1", "hello"], hub.url, tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stderr.startswith("error: there is no folder OpenGVLab/none, and no model of that name at")
