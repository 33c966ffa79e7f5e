"""Where rows lie in a file: against twins that read the whole file, on files as people have them."""

import json
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.data.formats import array as arrays
from chiasm.data.formats import lines as rows
from chiasm.data.formats.array import JsonArray, index_array, index_array_slowly
from chiasm.data.formats.files import OPEN_FILES, File
from chiasm.data.formats.lines import JsonLines
from chiasm.errors import DataError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.text('ab"\\,[]{}é\n\t ', max_size=12)
    | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\,]a', max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that everything straddles their borders."""

    def choose(size):
        monkeypatch.setattr(rows, "BLOCK", size)
        monkeypatch.setattr(arrays, "BLOCK", size)

    return choose


# JSON lines ------------------------------------------------------------------------------------------------------


@given(
    lines=st.lists(
        st.one_of(
            json_values.map(lambda v: json.dumps(v, ensure_ascii=False)),
            st.sampled_from(["", " ", "\t ", " " * 300]),
        ),
        max_size=12,
    ),
    newline=st.sampled_from(["\n", "\r\n"]),
    ended=st.booleans(),
    mark=st.booleans(),
    block=st.sampled_from([1, 2, 3, 7, 64, 1 << 20]),
)
def test_lines_are_found_as_a_text_editor_counts_them(tmp_path_factory, lines, newline, ended, mark, block):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = newline.join(lines) + (newline if ended else "")
    path.write_bytes(("\ufeff" * mark + text).encode())
    expected = [(n, json.loads(line)) for n, line in enumerate(lines, 1) if line.strip()]
    if not path.stat().st_size:
        with pytest.raises(DataError, match="is empty"):
            JsonLines(path, "a.jsonl")
        return
    source = JsonLines(path, "a.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        if not expected:
            with pytest.raises(DataError, match=r"a\.jsonl: holds no rows"):
                len(source)
            return
        assert len(source) == len(expected)
    for n, (line, value) in enumerate(expected):
        assert source.row(n) == value
        assert source.where(n) == f"a.jsonl:{line}"
    first = source.first()
    assert first == expected[0][1]


def test_a_line_that_is_cut_off_is_named_and_the_others_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": "is cut o')
    source = JsonLines(path, "a.jsonl")
    assert [source.row(n) for n in (0, 1)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match=r"^a\.jsonl:4: is cut off .* repair or remove the row$"):
        source.row(2)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"a": 1}\n{"a" 2}\n', r"a\.jsonl:2: is not JSON \(Expecting ':' delimiter at character 6 of 7\)"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl:2: is not UTF-8 \(byte 7 of the row\)"),
        (b'{"a": 1}\n' + b"[" * 100_000, r"a\.jsonl:2: is nested too deeply|a\.jsonl:2: is cut off"),
        (b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", r"a\.jsonl:2: is not usable JSON \(Exceeds the limit"),
    ],
)
def test_a_line_that_is_no_json_is_one_error(tmp_path, data, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    source = JsonLines(path, "a.jsonl")
    assert source.row(0) == {"a": 1}
    with pytest.raises(DataError, match=said) as caught:
        source.row(1)
    assert "\n" not in str(caught.value)


# JSON arrays -----------------------------------------------------------------------------------------------------


def spans(index):
    return list(zip(index["starts"].tolist(), index["ends"].tolist(), strict=True))


@given(
    values=st.lists(json_values, max_size=8),
    indent=st.sampled_from([None, 1]),
    mark=st.booleans(),
    block=st.sampled_from([1, 2, 3, 5, 17, 1 << 20]),
    cut=st.integers(0, 40),
)
def test_elements_are_found_as_the_json_parser_finds_them(tmp_path_factory, values, indent, mark, block, cut):
    path = tmp_path_factory.mktemp("array") / "a.json"
    data = (" \n" + json.dumps(values, indent=indent, ensure_ascii=False) + "\n").encode()
    data = b"\xef\xbb\xbf" * mark + data
    begin = data.index(b"[")
    path.write_bytes(data[: max(len(data) - cut, begin + 1)])
    file = File(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK", block)
        fast = spans(index_array(file))
    assert fast == spans(index_array_slowly(file))
    source = JsonArray(path, "a.json")
    if cut <= 1:
        assert [json.loads(data[start:end]) for start, end in fast] == values
        if values:
            assert [source.row(n) for n in range(len(source))] == values
            assert source.first() == values[0]
            assert source.where(len(values) - 1) == f"a.json[{len(values) - 1}]"
    else:  # cut off: all but the last element are as they were
        assert [source.row(n) for n in range(len(fast) - 1)] == values[: max(len(fast) - 1, 0)]


@given(st.lists(st.sampled_from(['"', "\\", "a", ",", "]", "[", "{", "}"]), max_size=30), st.integers(1, 9))
def test_backslashes_across_blocks(tmp_path_factory, pieces, block):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text("[" + json.dumps("".join(pieces)) + ", 1]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "BLOCK", block)
        index = index_array(File(path))
    assert [json.loads(path.read_bytes()[a:b]) for a, b in spans(index)] == ["".join(pieces), 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', r"does not begin with \["),
        ("   ", "holds only white space"),
        ("[]", "is an empty array"),
        ("[1]\n[2]", r"has text behind the end of its array \(byte 3\)"),
    ],
)
def test_a_file_that_is_no_array_is_one_error(tmp_path, text, said):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        len(JsonArray(path, "a.json"))


def test_stray_commas_are_elements_that_fail(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1,,2,]")
    source = JsonArray(path, "a.json")
    assert len(source) == 4
    assert (source.row(0), source.row(2)) == (1, 2)
    for n in (1, 3):
        with pytest.raises(DataError, match=rf"^a\.json\[{n}\]: is empty"):
            source.row(n)


def test_a_large_array_is_never_held(tmp_path):
    path = tmp_path / "a.json"
    element = json.dumps({"conversations": [{"from": "gpt", "value": 'word "x" ' * 400}]})
    count = 6000
    with path.open("w") as file:
        file.write("[" + element)
        for _ in range(count - 1):
            file.write(",\n" + element)
        file.write("]")
    size = path.stat().st_size
    assert size > 24e6
    tracemalloc.start()
    try:
        source = JsonArray(path, "a.json")
        assert len(source) == count
        source.row(count // 2)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Blocks of 256 KiB and what NumPy derives from one; it does not grow with the file.
    assert peak < 12e6 < size / 2


# What they share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JsonLines, JsonArray])
def test_an_index_is_kept_while_the_file_stays_the_same(tmp_path, kind, monkeypatch):
    path, cache = tmp_path / "a.json", tmp_path / "index"
    path.write_text("[1,\n2]" if kind is JsonArray else "1\n2\n")
    assert len(kind(path, "a", cache)) == 2
    (kept,) = cache.iterdir()
    module, name = (arrays, "index_array") if kind is JsonArray else (rows, "index_lines")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, None)  # not needed again
        again = kind(path, "a", cache)
        assert [again.row(0), again.row(1)] == [1, 2]
    kept.write_bytes(kept.read_bytes()[:50])  # a cache that was cut off
    assert len(kind(path, "a", cache)) == 2
    path.write_text("[1,\n2,\n3]" if kind is JsonArray else "1\n2\n3\n")
    assert len(kind(path, "a", cache)) == 3
    with pytest.raises(DataError, match="has changed since it was opened"):
        again.row(0)


def test_an_index_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a.jsonl").write_text("1\n")
    with pytest.raises(DataError, match="the index cannot be kept here"):
        len(JsonLines(tmp_path / "a.jsonl", "a", tmp_path / "file"))


def test_many_files_many_threads_few_open(tmp_path):
    sources = []
    for n in range(OPEN_FILES + 30):
        path = tmp_path / f"{n}.jsonl"
        path.write_text("".join(f"{n * 1000 + k}\n" for k in range(20)))
        sources.append(JsonLines(path, path.name))
    wrong = []

    def read(seed):
        random = np.random.default_rng(seed)
        for _ in range(400):
            n, k = int(random.integers(len(sources))), int(random.integers(20))
            if sources[n].row(k) != n * 1000 + k:
                wrong.append((n, k))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    from chiasm.data.formats.files import _pool

    assert len(_pool) <= OPEN_FILES
    copy = pickle.loads(pickle.dumps(sources[3]))
    assert copy.row(2) == 3002


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x1f\x8b\x08\x00rest", "is compressed with gzip.* run gunzip"),
        (b"\x28\xb5\x2f\xfdrest", "is compressed with zstd"),
        ("[1]".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"", r"is empty \(0 bytes\)"),
    ],
)
def test_files_that_cannot_be_read_in_place(tmp_path, data, said):
    from chiasm.data.formats.files import head

    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(DataError, match=said):
        head(path)
    with pytest.raises(DataError, match="is no regular file"):
        head(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        head(tmp_path / "none")
