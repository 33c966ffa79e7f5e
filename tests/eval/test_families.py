import json

import numpy as np
import pytest
from tests.eval.fakes import Guesses, Sees, Squares, opener

from chiasm.errors import DataError, UsageError
from chiasm.eval import families
from chiasm.eval.controls import derangement
from chiasm.eval.families import evaluate_families, open_family
from chiasm.eval.metrics import exact_match
from chiasm.media.boxes import parse_boxes
from chiasm.model.chat import Reply


def run(model, **options):
    options.setdefault("opener", opener())
    return evaluate_families(model, ["squares"], n=24, batch=5, **options)["squares"]


def test_a_model_that_sees_beats_its_controls():
    model = Sees()
    result = run(model)
    expected = [exact_match(model.answer(s.image, s.question), s.answer) for s in list(Squares("test"))[:24]]
    assert result["score"]["correct"] == sum(expected)
    assert result["score"]["n"] == 24
    assert result["beats_all_controls"] is True
    assert list(result["controls"]) == ["majority", "blank", "shuffled"]
    assert result["controls"]["majority"]["facts"]["answer"] == "red"
    assert result["controls"]["blank"]["accuracy"] == 0.0
    assert result["pictures"] == {"train": 30, "test": 30}
    assert len(result["examples"]) == 10
    assert sum(row["times"] for row in result["confusions"]) == 24 - sum(expected)
    assert model.batches == [5, 5, 5, 5, 4, 1]  # one blank question, nothing asked for the exchanged pictures
    json.dumps(result)


def test_a_model_that_guesses_beats_nothing():
    result = run(Guesses())
    assert result["beats_all_controls"] is False
    for control in ("blank", "shuffled"):
        assert result["controls"][control]["difference"] == 0.0
        assert result["controls"][control]["beaten"] is False


@pytest.mark.parametrize("varied", [False, True])
def test_reused_answers_equal_asking_again(varied):
    """The shuffled control from permuted answers is what asking about every exchanged pair gives."""
    model = Sees()
    result = run(model, opener=opener(varied=varied))
    samples = list(Squares("test", varied=varied))[:24]
    order = derangement(24, families.SEED)
    slow = [
        exact_match(model.answer(samples[other].image, s.question), s.answer)
        for s, other in zip(samples, order, strict=True)
    ]
    shuffled = result["controls"]["shuffled"]
    assert shuffled["correct"] == sum(slow)
    different = sum(samples[o].question != s.question for s, o in zip(samples, order, strict=True))
    assert shuffled["facts"]["asked"] == different
    assert (different > 0) is varied
    assert shuffled["facts"]["reused"] == 24 - different


def test_the_manifest_says_what_was_done():
    about = {"name": "sees", "weights": "abc", "tiles": {"image_size": 8}, "template": "plain"}
    environment = {"versions": {"torch": "1"}, "git": "f00", "machine": "m", "threads": 1}
    manifest = run(Sees(), about=about, environment=environment)["manifest"]
    assert manifest["model"] == about
    assert manifest["versions"] == {"torch": "1"}
    assert manifest["parser"] == {"version": 1, "numbers": False}
    assert manifest["decoding"] == {"kind": "greedy", "max_new_tokens": 8, "batch": 5}
    assert (manifest["split"], manifest["seed"], manifest["n"]) == ("test", 0, 24)
    assert len(manifest["data"]["hash"]) == 32
    assert manifest["data"]["world"]["family"] == "squares"
    assert manifest["record"]["git"] == "f00"
    assert manifest["record"]["cpu_seconds"] >= 0
    assert len(manifest["record"]["date"]) == 10


def test_the_data_hash_depends_on_pixels():
    samples = list(Squares("test"))[:3]
    before = families._hash_items(samples)
    samples[1].image[2, 2] += 1
    assert families._hash_items(samples) != before


def test_counts_are_compared_as_numbers():
    class Digits(Sees):
        def answer(self, image: np.ndarray, question: str) -> str:
            return {"red": "3", "green": "1", "blue": "2"}[super().answer(image, question).lower()]

    class Counts(Squares):
        def sample(self, index: int):
            from dataclasses import replace

            sample = super().sample(index)
            return replace(sample, answer={"red": "three", "green": "one", "blue": "two"}[sample.answer])

    class Plain(Digits):
        def answer(self, image: np.ndarray, question: str) -> str:
            if np.ptp(image[4, 4]) < 10:
                return "9"
            return {0: "3", 1: "1", 2: "2"}[int(image[4, 4].argmax())]

    def opened(family: str, split: str) -> Squares:
        return Counts(split, family=family)

    counted = evaluate_families(Plain(), ["counting", "squares"], n=10, batch=5, opener=opened)
    assert counted["counting"]["score"]["accuracy"] == 1.0
    assert counted["squares"]["score"]["accuracy"] == 0.0


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch):
    monkeypatch.setattr("chiasm.eval.store.SAVE_EVERY", -1.0)
    whole = run(Sees())
    with pytest.raises(KeyboardInterrupt):
        run(Sees(stop_after=10), out=tmp_path)
    model = Sees()
    result = run(model, out=tmp_path)
    assert model.batches == [5, 5, 4, 1]
    again = Sees()
    assert run(again, out=tmp_path) == result
    assert again.asked == []
    for found in (whole, result):  # the same but for time
        found["manifest"].pop("record")
        for control in found["controls"].values():
            control["facts"].pop("record", None)
    assert result == whole


def test_another_model_does_not_get_the_old_answers(tmp_path):
    run(Sees(), out=tmp_path, about={"weights": "a"})
    model = Sees()
    run(model, out=tmp_path, about={"weights": "b"})
    assert len(model.asked) == 25
    model = Sees()
    run(model, out=tmp_path, about={"weights": "b"}, environment={"versions": {"torch": "2"}})
    assert len(model.asked) == 25
    model = Sees()  # another revision of the code alone does not make answers wrong
    run(model, out=tmp_path, about={"weights": "b"}, environment={"versions": {"torch": "2"}, "git": "x"})
    assert model.asked == []


def test_fashion_has_the_pixel_control():
    asked = []

    def pixels(split: str):
        asked.append(split)
        return ["red"] * 30, {"method": "m"}

    result = evaluate_families(Sees(), ["fashion", "words"], n=6, split="dev", opener=opener(), pixels=pixels)
    assert asked == ["dev"]
    assert result["fashion"]["controls"]["pixels"]["facts"] == {"method": "m"}
    assert "pixels" not in result["words"]["controls"]


def test_progress_is_told():
    said = []
    run(Sees(), report=lambda *at: said.append(at))
    assert said[0] == ("squares-test-real", 0, 24)
    assert ("squares-test-real", 24, 24) in said
    assert said[-1] == ("squares-test-blank", 1, 1)


def test_the_fixed_number_is_used(monkeypatch):
    monkeypatch.setitem(families.ITEMS, "squares", 7)
    result = evaluate_families(Sees(), ["squares"], opener=opener(size=9))
    assert result["squares"]["score"]["n"] == 7
    monkeypatch.setitem(families.ITEMS, "squares", 70)
    assert evaluate_families(Sees(), ["squares"], opener=opener(size=9))["squares"]["score"]["n"] == 9


def test_wrong_calls_are_named():
    with pytest.raises(UsageError, match="has seen"):
        run(Sees(), split="train")
    with pytest.raises(UsageError, match="at least 2"):
        evaluate_families(Sees(), ["squares"], n=1, opener=opener())
    with pytest.raises(DataError, match="at least two"):
        evaluate_families(Sees(), ["squares"], opener=opener(size=1))


def test_boxes_are_right_where_they_overlap() -> None:
    """Grounding: the first box counts, by its overlap; the mean box of training stands in for the majority."""
    world = open_family("grounding", "test")
    answers = {}
    for index in range(6):
        item = world.sample(index)
        x1, y1, x2, y2 = parse_boxes(item.answer)[0].xyxy
        shift = 0 if index % 2 else 400
        answers[item.image.tobytes(), item.question] = (
            f"<box>[[{x1 + shift},{y1},{x2 + shift},{y2}]]</box> and more"
        )

    class Model:
        def batch(self, conversations, **options):
            assert options["max_new_tokens"] == 48
            return [Reply(text=self.text(one), token_ids=[1]) for one in conversations]

        def text(self, conversation) -> str:
            image, question = (part[part["type"]] for part in conversation[0]["content"])
            return answers.get((np.asarray(image).tobytes(), question), "nowhere")

    result = evaluate_families(Model(), ["grounding"], n=6)["grounding"]
    assert result["score"]["accuracy"] == pytest.approx(0.5)
    assert 0.5 <= result["mean_iou"] < 0.6
    assert set(result["controls"]) == {"mean box", "blank", "shuffled"}
    assert result["manifest"]["parser"]["boxes"] == "first box, IoU >= 0.5"
