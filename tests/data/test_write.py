"""Writing: whatever a format can hold comes back the same, whatever it cannot is refused in one line."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.datasets import DatasetSpec
from chiasm.data.message import Part, Record, Turn, spell_turn, to_row
from chiasm.data.write import encode, write_dataset
from chiasm.errors import DataError, UsageError

FILES = {
    "internvl": "out.jsonl",
    "llava": "out.json",
    "messages": "out.jsonl",
    "sharegpt": "out.json",
    "parquet": "out.parquet",
    "webdataset": "shards",
}


class Given:
    """A data set of records in memory."""

    name = "given"

    def __init__(self, records, root=""):
        self.records, self.root = records, root

    def __len__(self):
        return len(self.records)

    def where(self, index):
        return f"given:{index}"

    def unplaced(self, index):
        found = self.records[index]
        if isinstance(found, Exception):
            raise found
        return found


def says(record, root=""):
    """What a model reads, and the fields beside: pictures by their bytes, since formats hold either files or bytes."""

    def content(part):
        value = part.value
        if part.kind == "image" and not isinstance(value, bytes) and "://" not in value:
            value = (Path(root) / value).read_bytes()
        return (part.kind, value, dict(part.sampling))

    turns, before = [], 0
    for turn in record.turns:
        line = [""]
        for piece in spell_turn(turn, before=before):
            line += [content(piece), ""] if isinstance(piece, Part) else []
            line[-1] += piece if isinstance(piece, str) else ""
        before += len(turn.of_kind("image"))
        turns.append((turn.role, line, dict(turn.extra)))
    return turns, dict(record.extra)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for n in range(4):
        Image.new("RGB", (4, 3), (n * 60, 0, 0)).save(folder / f"{n}.{'png' if n % 2 else 'jpg'}")
    return folder


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda t: t.replace("<", ""))
fields = st.dictionaries(
    st.sampled_from(["id", "width", "source", "note", "weight"]),
    st.none() | st.integers(-9, 9) | st.text("aé\n", max_size=4) | st.lists(st.integers(0, 3), max_size=2),
    max_size=3,
)


@st.composite
def records(draw, as_bytes=False):
    """Conversations with tagged and untagged pictures, a video, a system turn, fields beside."""
    turns, tagged = [], draw(st.booleans())
    if draw(st.booleans()):
        turns.append(Turn.of("system", draw(texts)))
    film = draw(st.booleans()) and draw(st.booleans())
    for n in range(draw(st.integers(1, 3))):
        names = draw(
            st.lists(st.sampled_from(["0.jpg", "1.png", "2.jpg", "3.png"]), max_size=3 if not film else 0)
        )
        media = [Part("image", name) for name in names]
        if film and n == 0:
            clip = draw(st.sampled_from([{}, {"clip": [1, 2.5]}]))
            media = [Part("video", "a.mp4", clip)]
        text = draw(texts)
        if tagged:
            for part in media:
                at = draw(st.integers(0, len(text)))
                text = text[:at] + f"<{part.kind}>" + text[at:]
                text = text.replace("<<", "<") if "<<" in text else text
            if any(text.count(f"<{k}>") != sum(p.kind == k for p in media) for k in ("image", "video")):
                text = "".join(f"<{part.kind}>" for part in media)
        turns.append(Turn("user", (*media, Part("text", text)), draw(fields)))
        if draw(st.booleans()):
            turns.append(Turn("assistant", (Part("text", draw(texts)),), draw(fields)))
    return Record(turns=tuple(turns), tagged=tagged, listed=draw(st.booleans()), extra=draw(fields))


@pytest.mark.parametrize("to", FILES)
@settings(max_examples=40)
@given(data=st.data())
def test_what_is_written_comes_back(tmp_path_factory, pictures, to, data):
    given_records = data.draw(st.lists(records(), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("out")
    target = folder / FILES[to]
    done = write_dataset(Given(given_records, str(pictures)), target, to, per_shard=2)
    assert (done.rows, done.dropped) == (len(given_records), [])
    annotation = str(target / "*.tar") if to == "webdataset" else str(target)
    for format in ("auto", to):
        back = DatasetSpec(annotation=annotation, root=done.root or "", format=format).open("back")
        assert len(back) == len(given_records)
        for n, record in enumerate(given_records):
            assert says(back.unplaced(n), pictures) == says(record, pictures)
    assert sorted(path.name for path in folder.iterdir()) == [FILES[to]]


@pytest.mark.parametrize("to", FILES)
def test_pictures_as_bytes_are_kept_bit_by_bit(tmp_path, pictures, to):
    data = [path.read_bytes() for path in sorted(pictures.iterdir())]
    record = Record(
        turns=(Turn.of("user", "<image> or <image>?", data[:2]), Turn.of("assistant", "1")), extra={"id": 5}
    )
    one = Record(turns=(Turn.of("user", "What?", data[2:3]), Turn.of("assistant", "2")), tagged=False)
    target = tmp_path / FILES[to]
    done = write_dataset(Given([record, one]), target, to)
    assert done.pictures == 3
    annotation = str(target / "*.tar") if to == "webdataset" else str(target)
    back = DatasetSpec(annotation=annotation, root=done.root or "").open("back")
    assert [says(back.record(n)) for n in range(2)] == [says(record), says(one)]
    if to in ("parquet", "webdataset"):
        assert done.root is None
    else:
        assert done.root == str(tmp_path)
        assert sorted(path.name for path in (tmp_path / "out_images").iterdir()) == [
            "00000000-0.jpg",
            "00000000-1.png",
            "00000001-0.jpg",
        ]


def test_rows_of_the_release_are_written_as_they_were(tmp_path):
    rows = [
        {
            "id": 1,
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "é"}],
        },
        {"id": 2, "image": ["a.png"], "conversations": [{"from": "human", "value": "Q"}]},
        {
            "id": 3,
            "video": "a.mp4",
            "clip": [0, 4],
            "conversations": [{"from": "human", "value": "<video>\nQ", "k": 1}],
        },
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    dataset = DatasetSpec(annotation=str(path), root="/m").open("a")
    done = write_dataset(dataset, tmp_path / "b.jsonl", "internvl")
    assert done.root == "/m"
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == rows
    write_dataset(dataset, tmp_path / "b.json", "llava")
    assert json.loads((tmp_path / "b.json").read_text()) == rows


def test_messages_look_as_their_writers_write_them(tmp_path):
    record = Record(turns=(Turn.of("user", "<image>\nWhat?", ["a.png"]), Turn.of("assistant", "A cat.")))
    row, names = encode(record, "messages", "w")
    token = row["messages"][0]["content"][0].pop("image")
    assert row == {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    }
    assert token.startswith("\0")
    assert names == ["a.png"]
    middle = replace(record, turns=(Turn.of("user", "is <image> a cat?", ["a.png"]),))
    assert encode(middle, "messages", "w")[0]["messages"][0]["content"][1]["text"] == "is <image> a cat?"


def test_untagged_pictures_of_several_turns_get_tags():
    record = Record(
        turns=(Turn.of("user", "a", ["1"]), Turn.of("assistant", "b"), Turn.of("user", "c", ["2", "3"])),
        tagged=False,
    )
    row, _ = encode(record, "internvl", "w")
    assert [turn["value"] for turn in row["conversations"]] == [
        "<image>\na",
        "b",
        "Image-2: <image>\nImage-3: <image>\nc",
    ]


BOX = Record(turns=(Turn("user", (Part("text", "a"), Part("box", [1, 2, 3, 4]))),))
TWO_FILMS = Record(
    turns=(
        Turn.of("user", "a"),
        Turn("user", (Part("video", "a.mp4"), Part("video", "b.mp4"))),
    )
)
URL = Record(turns=(Turn.of("user", "a", ["https://host/a.png?key=1"]),))


def test_messages_and_shards_hold_what_rows_cannot(tmp_path):
    for record in (BOX, TWO_FILMS):
        for to in ("messages", "webdataset"):
            target = tmp_path / f"{to}-{record is BOX}{'.tar' if to == 'webdataset' else '.jsonl'}"
            write_dataset(Given([record]), target, to)
            assert says(DatasetSpec(annotation=str(target)).open("x").record(0)) == says(record)


@pytest.mark.parametrize(
    ("record", "to", "said"),
    [
        (BOX, "internvl", r"cannot be written as internvl without loss: .*cannot hold box parts"),
        (TWO_FILMS, "sharegpt", "cannot be written as sharegpt without loss: .*one video"),
        (TWO_FILMS, "parquet", "cannot be written as parquet without loss"),
        (URL, "parquet", r"https://host/a\.png is a URL: download it first"),
        (URL, "webdataset", "is a URL: download it first"),
        (Record(turns=(Turn.of("user", "a", ["none.png"]),)), "webdataset", r"none\.png: no such file"),
        (Record(turns=(Turn.of("user", "a", [b"no picture"]),)), "llava", "a picture is of no known format"),
        (Record(turns=(Turn.of("user", "a"),), extra={"x": b""}), "internvl", "a field is no JSON"),
        (Record(turns=(Turn.of("user", "a"),), extra={"system": "x"}), "sharegpt", "would read otherwise"),
        (Record(turns=(Turn.of("user", "a"),), extra={"images": 5}), "messages", "images must be a path"),
        (Record(turns=(Turn.of("user", "a\ud800"),)), "parquet", "half of a surrogate pair"),
    ],
)
def test_what_does_not_fit_is_one_error_or_is_left_out(tmp_path, record, to, said):
    good = Record(turns=(Turn.of("user", "good"),))
    target = tmp_path / FILES[to]
    with pytest.raises(DataError, match=said) as caught:
        write_dataset(Given([good, record, good]), target, to)
    assert str(caught.value).startswith("given:1")
    assert list(tmp_path.iterdir()) == []
    done = write_dataset(Given([good, record, DataError("given:2: is broken"), good]), target, to, drop=True)
    assert done.rows == 2
    assert [where for where, _ in done.dropped] == ["given:1", "given:2"]
    assert done.dropped[1][1] == "is broken"
    annotation = str(target / "*.tar") if to == "webdataset" else str(target)
    back = DatasetSpec(annotation=annotation).open("x")
    assert [back.record(n).turns[0].text for n in range(len(back))] == ["good", "good"]
    with pytest.raises(DataError, match="no sample is left"):
        write_dataset(Given([record]), target, to, drop=True, force=True)
    assert len(DatasetSpec(annotation=annotation).open("x")) == 2  # what was there is untouched


def test_paths_and_bytes_do_not_mix_in_one_file_of_paths(tmp_path, pictures):
    data = next(pictures.iterdir()).read_bytes()
    mixed = [Record(turns=(Turn.of("user", "a", [value]),)) for value in ("0.jpg", data)]
    with pytest.raises(DataError, match="has a picture as bytes, others before were path"):
        write_dataset(Given(mixed), tmp_path / "a.jsonl", "internvl")
    done = write_dataset(Given(mixed, str(pictures)), tmp_path / "a.parquet", "parquet")
    assert done.pictures == 2


def test_targets_are_checked_first(tmp_path):
    record = Given([Record(turns=(Turn.of("user", "a"),))])
    (tmp_path / "a.jsonl").write_text("mine")
    for name, to, said in [
        ("a.json", "internvl", "internvl is written to a name with .jsonl"),
        ("a.txt", "webdataset", r"\.tar or no ending \(a folder\)"),
        ("a.jsonl", "internvl", "exists; choose another name, or --force"),
        ("a.jsonl", "csv", "unknown format 'csv'"),
    ]:
        with pytest.raises(UsageError, match=said):
            write_dataset(record, tmp_path / name, to)
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    write_dataset(record, tmp_path / "a.jsonl", "internvl", force=True)
    assert json.loads((tmp_path / "a.jsonl").read_text()) == to_row(record.unplaced(0))
    for _ in range(2):
        write_dataset(record, tmp_path / "shards", "webdataset", force=True)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["shard-000000.tar"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_dataset(record, tmp_path / "file", "webdataset", force=True)


def test_shards_are_cut_by_number_and_the_same_each_time(tmp_path):
    many = Given([Record(turns=(Turn.of("user", str(n)),)) for n in range(7)])
    for folder in ("a", "b"):
        done = write_dataset(many, tmp_path / folder, "webdataset", per_shard=3)
        assert [path.name for path in done.files] == [f"shard-{n:06d}.tar" for n in range(3)]
    names = []
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    assert [len(each) for each in names] == [3, 3, 1]
    assert names[1][0] == "000000003.json"


def test_parquet_is_written_in_small_groups(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    from chiasm.data import write

    monkeypatch.setattr(write, "GROUP_BYTES", 50)
    many = Given([Record(turns=(Turn.of("user", "x" * 30),)) for _ in range(6)])
    write_dataset(many, tmp_path / "a.parquet", "parquet")
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        assert file.metadata.num_row_groups == 3


def test_a_part_of_the_rows(tmp_path):
    many = Given([Record(turns=(Turn.of("user", str(n)),)) for n in range(7)])
    seen = []
    done = write_dataset(many, tmp_path / "a.jsonl", "messages", rows=[1, 5], on_progress=seen.append)
    assert (done.rows, seen) == (2, [1, 2])
    back = DatasetSpec(annotation=str(tmp_path / "a.jsonl")).open("a")
    assert [back.record(n).turns[0].text for n in range(2)] == ["1", "5"]
