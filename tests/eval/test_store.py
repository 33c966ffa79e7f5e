import json

import pytest

from chiasm.eval.store import Store, write_atomic


def double(first, last):
    return [2 * i for i in range(first, last)]


def test_values_are_computed_in_batches_and_kept(tmp_path):
    calls, said = [], []
    store = Store(tmp_path, {"git": "abc"})

    def work(first, last):
        calls.append((first, last))
        return double(first, last)

    values, record = store.run("p", {"a": (1, 2)}, 7, work, batch=3, report=lambda *at: said.append(at))
    assert values == [0, 2, 4, 6, 8, 10, 12]
    assert calls == [(0, 3), (3, 6), (6, 7)]
    assert said == [(0, 7), (3, 7), (6, 7), (7, 7)]
    assert record["git"] == "abc"
    assert record["cpu_seconds"] >= 0
    again = Store(tmp_path, {"git": "another"})
    assert again.run("p", {"a": [1, 2]}, 7, work, batch=3) == (values, record)
    assert len(calls) == 3


def test_another_identity_is_computed_anew(tmp_path):
    Store(tmp_path).run("p", {"n": 2}, 2, double, batch=2)
    values, _ = Store(tmp_path).run("p", {"n": 3}, 3, lambda a, b: ["x"] * (b - a), batch=2)
    assert values == ["x", "x", "x"]


def test_an_interrupted_part_continues_at_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr("chiasm.eval.store.SAVE_EVERY", -1.0)
    calls = []

    def work(first, last):
        if first == 4 and len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((first, last))
        return double(first, last)

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).run("p", {}, 7, work, batch=2)
    calls.append("again")
    values, _ = Store(tmp_path).run("p", {}, 7, work, batch=2)
    assert values == double(0, 7)
    assert calls == [(0, 2), (2, 4), "again", (4, 6), (6, 7)]


@pytest.mark.parametrize("damage", ["{", "[]", '{"values": []}', "\xff"])
def test_a_damaged_part_is_computed_anew(tmp_path, damage):
    store = Store(tmp_path)
    store.run("p", {}, 2, double, batch=2)
    (tmp_path / "parts" / "p.json").write_text(damage, encoding="latin-1")
    assert store.run("p", {}, 2, double, batch=2)[0] == [0, 2]
    assert json.loads((tmp_path / "parts" / "p.json").read_text())["values"] == [0, 2]


def test_nothing_is_kept_without_a_folder():
    assert Store(None).run("p", {}, 2, double, batch=2)[0] == [0, 2]


def test_write_atomic_leaves_nothing_beside(tmp_path):
    write_atomic(tmp_path / "a" / "b.txt", "ü")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "ü"
