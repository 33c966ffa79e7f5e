"""Data sets by index: every format read alike, meta files, subsets, shares, bad files named in one line."""

import json
import logging
import math
import pickle
import tarfile
import threading
from io import BytesIO

import pytest

from chiasm.data.datasets import (
    DatasetSpec,
    Subset,
    blaming,
    mixture_weights,
    read_meta,
    read_specs,
    stream,
)
from chiasm.data.mixture import Mixture
from chiasm.errors import ConfigError, DataError, ImageError, MissingExtraError
from chiasm.media.image import open_image


def row(n, **more):
    talk = [{"from": "human", "value": f"<image>\nQ{n}"}, {"from": "gpt", "value": f"A{n}"}]
    return {"id": n, "image": f"{n}.png", "conversations": talk, **more}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return str(path)


def sources(record):
    return [part.value for turn in record.turns for part in turn.parts if part.kind == "image"]


def texts(record):
    return [turn.text for turn in record.turns]


# Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lines_and_arrays_read_alike(tmp_path, suffix):
    rows = [row(n) for n in range(5)]
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    dataset = DatasetSpec(annotation=str(path), root="/media").open("a")
    assert (dataset.name, len(dataset)) == ("a", 5)
    for n in (3, 0, 4):
        record = dataset.record(n)
        assert sources(record) == [f"/media/{n}.png"]
        assert sources(dataset.unplaced(n)) == [f"{n}.png"]
        assert texts(record) == [f"<image>\nQ{n}", f"A{n}"]
        assert record.extra == {"id": n}
        assert dataset.where(n) == (f"a.jsonl:{n + 1}" if suffix == "jsonl" else f"a.json[{n}]")
    for wrong in (-1, 5):
        with pytest.raises(IndexError, match="a has no row"):
            dataset.record(wrong)


def test_a_glob_is_one_set_and_places_tell_its_files_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", [row(n) for n in range(2)])
    dataset = DatasetSpec(annotation=str(tmp_path / "*" / "a.jsonl")).open("a")
    assert [dataset.where(n) for n in range(4)] == [
        "x/a.jsonl:1",
        "x/a.jsonl:2",
        "y/a.jsonl:1",
        "y/a.jsonl:2",
    ]
    assert [dataset.record(n).extra["id"] for n in range(4)] == [0, 1, 0, 1]


def test_every_malformed_row_is_named_and_the_others_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps(row(0)) + "\n\n[1]\n17\n{}\n" + json.dumps(row(1)) + '\n{"conversations": [{"from"'
    )
    dataset = DatasetSpec(annotation=str(path)).open("a")
    assert len(dataset) == 6
    bad = {}
    for n in range(len(dataset)):
        try:
            dataset.record(n)
        except DataError as error:
            bad[dataset.where(n)] = str(error)
    assert all(line.startswith(where) for where, line in bad.items())
    assert list(bad) == ["a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:7"]
    assert "must be a JSON object, not list" in bad["a.jsonl:3"]
    assert "is cut off" in bad["a.jsonl:7"]


def test_a_picture_that_is_missing_is_named_with_its_row(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(0)])
    dataset = DatasetSpec(annotation=path, root=str(tmp_path)).open("a")
    with pytest.raises(DataError, match=r"^a\.jsonl:1: .*0\.png: no such file"), blaming(dataset, 0):
        open_image(sources(dataset.record(0))[0])
    with pytest.raises(DataError, match=r"^a\.jsonl:1: x$"), blaming(dataset, 0):  # already named
        raise DataError("a.jsonl:1: x")
    with pytest.raises(ZeroDivisionError), blaming(dataset, 0):
        raise ZeroDivisionError
    assert issubclass(ImageError, Exception)


@pytest.mark.parametrize(
    ("name", "data", "format", "said"),
    [
        ("a.jsonl", b"", "auto", r"a\.jsonl: is empty \(0 bytes\)"),
        ("a.jsonl", b"\n \n", "auto", r"a\.jsonl: holds no rows"),
        ("a.json", b"[]", "auto", r"a\.json: is an empty array"),
        ("a.jsonl", b'{"a": 1}\n', "auto", r"a\.jsonl \(first row\): has no messages, conversations"),
        ("a.jsonl", b'{"a": 1}\n', "parquet", "is not parquet"),
        ("a.jsonl", b'{"a": 1}\n', "webdataset", "is not a tar file that can be read"),
        ("a.tar", b"\0" * 1024, "internvl", "is a tar file, not internvl; change its format"),
        ("a.parquet", b"PAR1", "llava", "is a parquet file, not llava"),
        ("a.bin", b"\x01\0\0\0", "auto", "is a binary file, not one of rows"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "auto", "is compressed with gzip"),
        ("a.tar", b"\0" * 10240, "auto", r"a\.tar: holds no samples"),
    ],
)
def test_wrong_files_are_one_error(tmp_path, name, data, format, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=said) as caught:
        len(DatasetSpec(annotation=str(path), format=format).open("a"))
    assert "\n" not in str(caught.value)


def test_no_file_and_an_empty_glob(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        DatasetSpec(annotation=str(tmp_path / "a.jsonl")).open("a")
    with pytest.raises(DataError, match="no file fits this glob"):
        DatasetSpec(annotation=str(tmp_path / "*.jsonl")).open("a")


def test_a_forced_kind_is_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(0)])
    with pytest.raises(DataError, match=r"^a\.jsonl:1\.messages must be a list"):
        DatasetSpec(annotation=path, format="messages").open("a").record(0)


def test_threads_and_pickles_read_the_same(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(n) for n in range(200)])
    dataset = DatasetSpec(annotation=path).open("a")
    copy, got = pickle.loads(pickle.dumps(dataset)), [None] * 4

    def read(k):
        got[k] = [dataset.record(n).extra["id"] for n in range(200)]

    threads = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert got == [list(range(200))] * 4
    assert copy.record(7) == dataset.record(7)


# Shards ----------------------------------------------------------------------------------------------------------


def test_tar_shards(tmp_path):
    talk = {
        "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}],
        "image": "was.jpg",
    }
    many = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]}
        ]
    }
    write_tar(
        tmp_path / "s-0.tar",
        [
            ("d/000.jpg", b"J0"),
            ("d/000.json", json.dumps(talk).encode()),
            ("./001.png", b"P1"),
            ("./001.txt", "a dög\n".encode()),
            ("./001.json", b'{"width": 3}'),
        ],
    )
    long = "k" * 150  # a name that needs a header of its own
    ten = [(f"{long}.{n}.png", str(n).encode()) for n in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)]
    eleven = json.dumps({"conversations": [{"from": "human", "value": "<image>" * 11}]}).encode()
    write_tar(
        tmp_path / "s-1.tar",
        [
            ("m.0.jpg", b"a"),
            ("m.1.jpg", b"b"),
            ("m.json", json.dumps(many).encode()),
            *ten,
            (long + ".json", eleven),
        ],
    )
    spec = DatasetSpec(annotation=str(tmp_path / "s-*.tar"), question="What?")
    dataset = spec.open("s", cache=tmp_path / "index")
    again = spec.open("s", cache=tmp_path / "index")
    for reader in (dataset, again, pickle.loads(pickle.dumps(dataset))):
        assert [reader.where(n) for n in range(4)] == [
            "s-0.tar:d/000",
            "s-0.tar:./001",
            "s-1.tar:m",
            f"s-1.tar:{long}",
        ]
        assert sources(reader.record(0)) == [b"J0"]
        assert reader.record(0).extra == {}
        assert texts(reader.record(1)) == ["What?", "a dög"]
        assert reader.record(1).extra == {"width": 3}
        assert sources(reader.record(2)) == [b"a", b"b"]
        assert sources(reader.record(3)) == [str(n).encode() for n in range(11)]
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_bad_members_are_named(tmp_path):
    path = tmp_path / "a.tar"
    good = json.dumps({"conversations": [{"from": "human", "value": "Hi"}]}).encode()
    write_tar(
        path,
        [
            ("0.json", b"{"),
            ("1.jpg", b"x"),
            ("2.json", b"[]"),
            ("3.json", good),
            ("4.txt", b"\xff"),
            ("5.json", good),
            ("5.json", good),
            ("51.mp4", b"film"),
            ("51.txt", b"A dog runs."),
            ("52.heic", b"photo"),
            ("52.json", good),
            ("53.cls", b"7"),
            ("53.json", good),
            ("6.json", good + b" " * 9000),
        ],
    )
    whole = path.read_bytes()
    dataset = DatasetSpec(annotation=str(path)).open("a")
    for n, said in [
        (0, "is cut off|is not JSON"),
        (1, "has neither .json nor .txt; found .jpg"),
        (2, "must be a JSON object"),
        (4, "is not UTF-8"),
        (5, "has two members .json"),
    ]:
        with pytest.raises(DataError, match=rf"^a\.tar:{n}.*({said})"):
            dataset.record(n)
    # A text without the video or picture that it is about says another thing.
    for n, said in [(6, r"51\.mp4: cannot be read from a shard"), (7, r"52\.heic: cannot be read")]:
        with pytest.raises(DataError, match=rf"^a\.tar:{said}"):
            dataset.record(n)
    for n in (3, 8, 9):
        assert texts(dataset.record(n)) == ["Hi"]
    path.write_bytes(whole[: whole.index(good + b" " * 9000) + 1000])
    cut = DatasetSpec(annotation=str(path)).open("a")
    assert texts(cut.record(3)) == ["Hi"]
    with pytest.raises(DataError, match=r"^a\.tar:6: is cut off"):
        cut.record(9)


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_compressed_tars_are_refused(tmp_path, mode, name):
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"x")], mode)
    with pytest.raises(
        DataError, match=f"is compressed with {name}, and rows of it cannot be found in place"
    ):
        DatasetSpec(annotation=path).open("a")


# Parquet ---------------------------------------------------------------------------------------------------------


def write_parquet(path, rows, **options):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def test_parquet_rows_of_every_kind(tmp_path):
    fine = [
        {
            "images": [{"bytes": b"a", "path": None}],
            "texts": [{"user": f"Q{n}", "assistant": "A"}],
            "source": "s",
        }
        for n in range(7)
    ]
    chat = [{"messages": row(n)["conversations"], "image": b"i"} for n in range(2)]
    for each in chat:
        each["messages"] = [
            {"role": r, "content": [{"type": "image", "text": None}, {"type": "text", "text": "x"}][k:]}
            for k, r in enumerate(("user", "assistant"))
        ]
    talk = [{**row(0), "image": {"bytes": None, "path": "0.png"}}, {**row(1), "image": None}]
    talk[1]["conversations"][0]["value"] = "no picture"
    write_parquet(tmp_path / "p-0.parquet", fine, row_group_size=2)
    write_parquet(tmp_path / "p-1.parquet", chat)
    write_parquet(tmp_path / "p-2.parquet", talk)
    dataset = DatasetSpec(annotation=str(tmp_path / "p-*.parquet"), root="/m").open("p")
    for reader in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert len(reader) == 11
        for n in (6, 0, 3):
            assert texts(reader.record(n)) == [f"Q{n}", "A"]
            assert sources(reader.record(n)) == [b"a"]
            assert reader.record(n).extra == {"source": "s"}
        assert sources(reader.record(7)) == [b"i"]
        assert reader.where(8) == "p-1.parquet row 1"
        assert sources(reader.record(9)) == ["/m/0.png"]
        assert sources(reader.record(10)) == []
        assert texts(reader.record(10)) == ["no picture", "A1"]


def test_few_row_groups_stay_in_memory(tmp_path, monkeypatch, caplog):
    from chiasm.data.formats import parquet

    write_parquet(
        tmp_path / "a.parquet", [{"caption": "x" * 1000, "image": "a"} for _ in range(100)], row_group_size=10
    )
    dataset = DatasetSpec(annotation=str(tmp_path / "a.parquet")).open("a")
    monkeypatch.setattr(parquet, "GROUP_BYTES", 25_000)
    for n in range(0, 100, 10):
        dataset.record(n)
    assert len(dataset.sources[0].groups._tables) == 2
    monkeypatch.setattr(parquet, "GROUP_BYTES", 100)
    with caplog.at_level(logging.WARNING, "chiasm.data"):
        DatasetSpec(annotation=str(tmp_path / "a.parquet")).open("a")
    assert "reading it in random order is slow" in caplog.text


def test_damaged_parquet_and_no_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"caption": "x"}])
    whole = path.read_bytes()
    dataset = DatasetSpec(annotation=str(path)).open("a")
    path.write_bytes(whole[:-20])
    with pytest.raises(DataError, match="is damaged or cut off"):
        DatasetSpec(annotation=str(path)).open("a")
    with pytest.raises(DataError, match="has changed since it was opened"):
        dataset.record(0)
    path.write_bytes(whole)
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'chiasm\[data\]'"):
        DatasetSpec(annotation=str(path)).open("a")


# Subsets, shares, streams ----------------------------------------------------------------------------------------


def test_a_repeat_time_below_one(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(n) for n in range(10)])

    def ids(**more):
        dataset = DatasetSpec(annotation=path, **more).open("a")
        assert [dataset.where(n) for n in range(len(dataset))] == [
            f"a.jsonl:{dataset.record(n).extra['id'] + 1}" for n in range(len(dataset))
        ]
        return [dataset.record(n).extra["id"] for n in range(len(dataset))]

    assert ids(repeat_time=0.35) == [0, 1, 2]
    assert ids(repeat_time=3) == list(range(10))
    some = ids(repeat_time=0.5, sample="random", seed=1)
    assert some == sorted(set(some))
    assert len(some) == 5
    assert some == ids(repeat_time=0.5, sample="random", seed=1)
    assert some != ids(repeat_time=0.5, sample="random", seed=2)
    dataset = DatasetSpec(annotation=path, repeat_time=0.05).open("a")
    assert isinstance(dataset, Subset)
    with pytest.raises(DataError, match="leaves none of its 10 rows"):
        len(dataset)


@pytest.mark.parametrize(("world", "start"), [(1, 0), (3, 0), (4, 5), (20, 2)])
def test_ranks_partition_the_rows(tmp_path, world, start):
    dataset = DatasetSpec(annotation=write_lines(tmp_path / "a.jsonl", [row(n) for n in range(11)])).open("a")
    read = [list(stream(dataset, rank=rank, world=world, start=start)) for rank in range(world)]
    assert sorted(n for part in read for n, _ in part) == list(range(start, 11))
    assert all(record.extra["id"] == n for part in read for n, record in part)
    assert max(map(len, read)) - min(map(len, read)) <= 1
    with pytest.raises(ConfigError):
        next(stream(dataset, rank=world, world=world))


def test_mixture_weights():
    sets = {"a": [0] * 100, "b": [0] * 400}

    def weights(resampling="length", **specs):
        made = {name: DatasetSpec(annotation="x", **specs.get(name, {})) for name in sets}
        return mixture_weights(sets, made, resampling=resampling)

    assert weights() == {"a": 100, "b": 400}
    assert weights(a={"repeat_time": 2.5}, b={"repeat_time": 0.5}) == {"a": 250, "b": 400}
    assert weights("sqrt", a={"repeat_time": 4}) == {"a": 20, "b": 20}
    assert weights(a={"weight": 1}, b={"weight": 0}) == {"a": 1, "b": 0}
    with pytest.raises(ConfigError, match="'a' has a weight and 'b' has none"):
        weights(a={"weight": 1})
    with pytest.raises(ConfigError, match="'b' has no spec"):
        mixture_weights(sets, {"a": DatasetSpec(annotation="x")})
    mixture = Mixture({"a": 100, "b": 400}, weights(), batch=1, seed=0)
    names = [mixture.draw(n)[0] for n in range(1000)]
    assert names.count("a") == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotation": ""}, "annotation must name a file"),
        ({"root": "s3://x"}, "root must be a local folder"),
        ({"format": "csv"}, "format must be one of auto, internvl"),
        ({"repeat_time": 0}, "repeat_time must be a number above 0"),
        ({"repeat_time": math.nan}, "repeat_time must be a number above 0"),
        ({"repeat_time": True}, "repeat_time must be a number above 0"),
        ({"sample": "last"}, "sample must be first or random"),
        ({"max_tiles": 0}, "max_tiles must be an integer of at least 1"),
        ({"weight": -1}, "weight must be a number of at least 0"),
        ({"augment": 1}, "augment must be true or false"),
        ({"seed": -1}, "seed must be an integer"),
        ({"length": 1.5}, "length must be an integer"),
    ],
)
def test_specs_check_themselves(change, said):
    with pytest.raises(ConfigError, match=said):
        DatasetSpec(**{"annotation": "a", **change})


# Meta files ------------------------------------------------------------------------------------------------------


def write_meta(folder, content):
    path = folder / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_release_s_meta_file(tmp_path, caplog, monkeypatch):
    write_lines(tmp_path / "a.jsonl", [row(n) for n in range(4)])
    (tmp_path / "images").mkdir()
    entry = {"root": "images/", "annotation": "a.jsonl", "data_augment": True, "repeat_time": 2, "length": 5}
    path = write_meta(
        tmp_path, {"a": {**entry, "max_dynamic_patch": 12, "comment": "hi", "_x": 1}, "b": entry}
    )
    specs = read_meta(path)
    assert list(specs) == ["a", "b"]
    assert specs["a"] == DatasetSpec(
        annotation=str(tmp_path / "a.jsonl"),
        root=str(tmp_path / "images/"),
        augment=True,
        repeat_time=2,
        length=5,
        max_tiles=12,
    )
    with caplog.at_level(logging.WARNING, "chiasm.data"):
        dataset = specs["a"].open("a")
        assert len(dataset) == len(dataset) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "a: holds 4 rows, its meta says 5; the file is right"
    ]
    # What is there in the working directory goes before what is beside the file.
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / "a.jsonl", [row(0)])
    monkeypatch.chdir(other)
    assert read_meta(path)["a"].annotation == "a.jsonl"
    assert read_meta(path)["a"].root == str(tmp_path / "images/")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not a JSON file"),
        ("[]", "must be one JSON object of data sets by name, not a list"),
        ("{}", "names no data set"),
        ('{"a": {"annotation": "x"}, "a": {"annotation": "x"}}', "names 'a' twice"),
        ({"a": []}, "a: must be an object with annotation and root, not a list"),
        ({"a": {"root": ""}}, r"a\.annotation: is missing"),
        (
            {"a": {"annotation": "x", "repeat_times": 1}},
            r"a\.repeat_times: unknown field; did you mean repeat_time\?",
        ),
        ({"a": {"annotation": "x", "max_dynamic_patches": 1}}, "did you mean max_dynamic_patch"),
        ({"a": {"annotation": "x", "zzzz": 1}}, r"a\.zzzz: unknown field; use annotation, root"),
        ({"a": {"annotation": "x", "max_dynamic_patch": 0}}, "a: max_dynamic_patch must be an integer"),
        ({"a": {"annotation": "x", "data_augment": "yes"}}, "a: data_augment must be true or false"),
        ({"a": {"annotation": 5}}, "a: annotation must name a file"),
    ],
)
def test_meta_files_that_are_wrong(tmp_path, content, said):
    with pytest.raises(DataError, match=rf"meta\.json: {said}|{said}") as caught:
        read_meta(write_meta(tmp_path, content))
    assert "meta.json" in str(caught.value)


def test_a_path_is_a_meta_file_or_a_set(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [row(0)])
    meta = write_meta(tmp_path, {"x": {"annotation": lines, "root": ""}})
    assert list(read_specs(meta)) == ["x"]
    with pytest.raises(DataError, match="has root and format of its own"):
        read_specs(meta, root="r")
    assert read_specs(lines, root="r", format="internvl") == {
        "a": DatasetSpec(annotation=lines, root="r", format="internvl")
    }
    assert list(read_specs(tmp_path / "shard-*.tar")) == ["shard"]
    for name, text in [
        ("array.json", json.dumps([row(0)])),
        ("lines.json", json.dumps(row(0)) + "\n" + json.dumps(row(1))),
        ("nested.json", "".join(json.dumps({"meta": {"k": n}, **row(n)}) + "\n" for n in range(600))),
    ]:
        (tmp_path / name).write_text(text)
        assert list(read_specs(tmp_path / name)) == [name.split(".")[0]]


def test_a_name_that_no_file_can_have_is_not_there(tmp_path):
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"a": {"annotation": "x" * 5000, "root": "y" * 5000}}))
    (spec,) = read_specs(meta).values()
    with pytest.raises(DataError, match="no such file; check the path"):
        spec.open("a")
    (spec,) = read_specs("x" * 5000 + ".json").values()
    with pytest.raises(DataError, match="no such file; check the path"):
        spec.open("a")
