"""Bad samples: counted and written once, the run stopped by the policy, the same after a kill and a restart."""

import json
import threading

import pytest

from chiasm.data.quarantine import Quarantine, QuarantinePolicy
from chiasm.errors import ConfigError, DataError

FREE = QuarantinePolicy(max_share=1)


def listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sample_is_written_and_counted_once(tmp_path):
    path = tmp_path / "run" / "bad.jsonl"
    bad = Quarantine(path, FREE)
    for _ in range(3):
        bad.add("a.jsonl:3", "a", "a.jsonl:3: no such\nfile")
    bad.add("a.jsonl:3", "a", "another reason")
    bad.add("a.jsonl:3", "b", "no such file")
    bad.seen(10)
    assert listed(path) == [
        {"set": "a", "where": "a.jsonl:3", "reason": "no such file"},
        {"set": "a", "where": "a.jsonl:3", "reason": "another reason"},
        {"set": "b", "where": "a.jsonl:3", "reason": "no such file"},
    ]
    assert (bad.counts, bad.total) == ({"a": 2, "b": 1}, 3)
    assert bad.summary() == "3 of 10 samples left out (a 2, b 1)"


def test_a_field_stays_in_the_reason():
    bad = Quarantine(None, QuarantinePolicy(max_share=0))
    with pytest.raises(DataError, match=r"the last one is a\.jsonl:3: \.conversations must be a list"):
        bad.add("a.jsonl:3", "a", "a.jsonl:3.conversations must be a list")


def test_the_share_counts_once_enough_was_seen(tmp_path):
    bad = Quarantine(tmp_path / "bad.jsonl", QuarantinePolicy(max_share=0.01, min_seen=100))
    for n in range(2):
        bad.seen(33)
        bad.add(f"a:{n}", "a", "x")
    with pytest.raises(DataError) as caught:
        bad.seen(34)
    line = str(caught.value)
    assert line.startswith("2 of 100 samples cannot be used, more than 1 %: ")
    assert str(tmp_path / "bad.jsonl") in line
    assert line.endswith("the last one is a:1: x")
    exact = Quarantine(None, QuarantinePolicy(max_share=0.01, min_seen=100))
    exact.add("a:0", "a", "x")
    exact.seen(100)  # one of a hundred is not more than 1 %


def test_a_number_and_none_at_all():
    bad = Quarantine(None, QuarantinePolicy(max_share=1, max_count=2))
    bad.add("a:0", "a", "x")
    bad.add("a:1", "a", "x")
    with pytest.raises(DataError, match=r"^3 of 3 samples cannot be used, more than 2: "):
        bad.add("a:2", "a", "x")
    with pytest.raises(DataError, match="and none is allowed"):
        Quarantine(None, QuarantinePolicy(max_share=0)).add("a:0", "a", "x")


def test_after_a_kill_the_counts_are_those_of_the_checkpoint(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = Quarantine(path, FREE)
    bad.seen(5)
    bad.add("a:1", "a", "x")
    state = json.loads(json.dumps(bad.state()))
    bad.seen(5)
    bad.add("a:2", "a", "x")
    whole = path.read_text()
    path.write_text(whole + '{"set": "a", "whe')  # killed while it wrote
    again = Quarantine(path, FREE)
    again.restore(state)
    assert (again.counts, again.state()["seen"]) == ({"a": 1}, 5)
    again.add("a:1", "a", "x")
    assert again.total == 1
    again.seen(5)
    again.add("a:2", "a", "x")
    assert again.total == 2
    assert again.state() == bad.state()
    assert path.read_text() == whole
    again.add("a:3", "a", "é")
    assert [entry["where"] for entry in listed(path)] == ["a:1", "a:2", "a:3"]


def test_threads():
    bad = Quarantine(None, FREE)

    def work():
        for n in range(200):
            bad.seen()
            bad.add(f"a:{n}", "a", "x")

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (bad.total, bad.state()["seen"]) == (200, 800)


def test_wrong_policies_and_files(tmp_path):
    for wrong in ({"max_share": 2}, {"max_share": float("nan")}, {"min_seen": -1}, {"max_count": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            QuarantinePolicy(**wrong)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"set": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: is no entry"):
        Quarantine(path)
    with pytest.raises(DataError, match="cannot be written"):
        Quarantine(path / "below").add("a:0", "a", "x")
