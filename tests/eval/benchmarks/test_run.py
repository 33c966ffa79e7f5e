"""The runner: every bench once, batches against one by one, votes, reuse, manifests, errors that say where."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from chiasm.errors import ConfigError, DataError, ImageError, UsageError
from chiasm.eval.benchmarks import run
from chiasm.eval.benchmarks.items import Item
from chiasm.eval.benchmarks.run import Settings, messages_of, run_bench
from chiasm.eval.benchmarks.scoring import SCORERS, Asked
from chiasm.eval.benchmarks.table import BENCHES, COT_TOKENS, Bench, get_bench
from chiasm.eval.prompts import PROMPTS
from chiasm.eval.result import compare_results
from chiasm.model.chat import Reply
from clips import folder as frames_in
from tiny_chat import tiny_chat


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


class Says:
    """Answers by a rule from the text it is asked; remembers what it saw."""

    def __init__(self, rule) -> None:
        self.rule, self.asked, self.batches = rule, [], []

    def batch(self, conversations, **options):
        self.batches.append(len(conversations))
        replies = []
        for (turn,) in conversations:
            *media, text = turn["content"]
            self.asked.append((media, text["text"], options))
            said = self.rule(text["text"], options.get("seed", 0))
            usage = {"prompt_tokens": 7, "completion_tokens": len(said.split())}
            replies.append(Reply(text=said, token_ids=[1], usage=usage))
        return replies


def item(n: int = 0, **facts) -> Item:
    whole = {
        "key": str(n),
        "where": f"t.jsonl:{n + 1}",
        "question": f"Q{n}?",
        "images": (png(n // 2),),
        "group": f"p{n // 2}",
    }
    return Item(**(whole | facts))


TEN = ("red",) * 10
CASES = {
    "vqa": ({"answers": TEN}, "red"),
    "anls": ({"answers": ("red",)}, "red"),
    "relaxed": ({"answers": ("100",)}, "101"),
    "gqa": ({"answers": ("left",)}, "Left."),
    "match": ({"answers": ("left",)}, "left"),
    "choice": ({"answers": ("B",), "options": {"A": "x", "B": "y"}, "letter": "B"}, "B"),
    "circular": ({"answers": ("B",), "options": {"A": "x", "B": "y"}, "letter": "B"}, "B"),
    "mmmu": ({"answers": ("3.14",)}, "It is 3.14159"),
    "grounding": ({"facts": {"bbox": [0, 0, 10, 10], "width": 20, "height": 10}}, "[[0,0,500,1000]]"),
    "pope": ({"answers": ("yes",)}, "Yes."),
    "mme": ({"answers": ("Yes",), "category": "count"}, "Yes"),
    "hallusion": ({"answers": ("1",), "facts": {"set_id": "0", "figure_id": "1"}}, "Yes"),
    "ocr": ({"answers": ("stop",)}, "It says STOP"),
    "mathvista": ({"answers": ("4",), "facts": {"answer_type": "integer"}}, "4"),
    "caption": ({"answers": ("a red bus", "one bus")}, "a red bus"),
}


def test_every_scorer_has_a_case():
    assert set(CASES) == set(SCORERS)


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_runs(name, tmp_path):
    bench = get_bench(name)
    facts, right = CASES[bench.scorer]
    if bench.subtitles:  # of which something must be there before anything is asked
        facts = facts | {"subtitles": "a.srt"}
    items = [item(n, **facts) for n in range(4)]
    if bench.scorer == "caption":
        items = [replace(one, answers=(f"{one.key} bus", "x")) for one in items]
        right = "0 bus"
    model = Says(lambda text, seed: right)
    result = run_bench(model, bench, items)
    full = {"mme": 200.0, "caption": result.headline.value}.get(bench.scorer, 1.0)
    assert result.headline.value == pytest.approx(full)
    assert (result.unparsed, len(result.rows), result.pictures) == (0, 4, 2)
    assert result.headline.error is not None
    assert json.loads(json.dumps(result.to_dict()))["manifest"]["bench"] == name
    assert model.asked[0][2]["max_new_tokens"] == bench.max_new_tokens
    if bench.scorer == "caption":
        assert result.scores["CIDEr-D"].value > 0
        assert set(result.extra["captions"]) == {"BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"}
    wrong = run_bench(Says(lambda text, seed: ""), bench, items)
    assert wrong.headline.value == 0.0
    assert wrong.unparsed == 4
    if bench.cot:
        steps = run_bench(
            Says(lambda text, seed: f"Hm, 1 or 2.\nFinal answer: {right}"), bench, items, Settings(cot=True)
        )
        assert steps.headline.value == pytest.approx(full)
        assert steps.manifest.decoding["max_new_tokens"] == COT_TOKENS


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "caption"])
def test_modes_of_every_scorer(name):
    facts, right = CASES[name]
    one, scorer = item(**facts), SCORERS[name]
    for mode in ("chiasm", "original"):
        for reasons in (False, True):
            said = f"Final answer: {right}" if reasons else right
            asked = Asked(mode, reasons)
            value = scorer.parse(said, one, asked)
            assert scorer.parse("", one, asked) is None or scorer.grade(
                scorer.parse("", one, asked), one, asked
            ) in (0.0, 1.0)
            if mode == "chiasm":
                assert scorer.grade(value, one, asked) == 1.0


def test_unparsed_and_chance():
    options = {"A": "x", "B": "y", "C": "z", "D": "w"}
    items = [item(n, options=options, answers=("A",), letter="A") for n in range(4)]
    result = run_bench(Says(lambda text, seed: "A" if "Q0" in text else "no idea"), get_bench("mmmu"), items)
    assert (result.headline.value, result.unparsed) == (0.25, 3)
    assert result.with_chance == pytest.approx(0.25 + 3 / 4 / 4)  # what the released dice give on average
    assert [row.value for row in result.rows] == ["A", None, None, None]


def test_clustered_error_is_wider_than_one_by_one():
    right = {f"Q{n}?": str(n // 2 % 2) for n in range(40)}  # both questions of a picture go alike
    items = [item(n, answers=("1",)) for n in range(40)]
    result = run_bench(Says(lambda text, seed: right[text.split()[0]]), get_bench("ocrvqa"), items)
    alone = [replace(one, group=one.key) for one in items]
    free = run_bench(Says(lambda text, seed: right[text.split()[0]]), get_bench("ocrvqa"), alone)
    assert result.headline.value == free.headline.value == 0.5
    assert result.headline.error > 1.3 * free.headline.error


def test_batches_answer_like_one_by_one():
    model = tiny_chat(seed=1)
    items = [
        replace(
            item(n, answers=("x",)),
            images=(png(n),) * (n % 3),
            options={} if n % 2 else {"A": "x", "B": "y"},
            letter="A",
        )
        for n in range(7)
    ]
    bench = replace(BENCHES["mcq"], max_new_tokens=8)
    texts = []
    for batch in (1, 3, 16):
        store: list[str] = []

        class Listens:
            spec = model.spec

            @staticmethod
            def batch(talks, store=store, **options):
                replies = model.batch(talks, **options)
                store += [reply.text for reply in replies]
                return replies

        result = run_bench(Listens(), bench, items, Settings(batch=batch))
        texts.append((store, [row.value for row in result.rows]))
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0][0])) > 1
    one_by_one = [model.chat(messages_of(i, bench.prompts(cot=False)), max_new_tokens=8).text for i in items]
    assert texts[0][0] == one_by_one


def test_votes():
    def rule(text, seed):
        return "so. Final answer: " + ("B" if seed % 3 == 0 else "A")

    items = [item(n, options={"A": "x", "B": "y"}, answers=("A",), letter="A") for n in range(6)]
    result = run_bench(
        Says(rule), get_bench("mcq"), items, Settings(cot=True, votes=8, temperature=0.7, seed=3)
    )
    curve = {point["k"]: point for point in result.extra["votes"]}
    assert list(curve) == [1, 2, 4, 8]
    assert curve[8]["value"] == result.headline.value > curve[1]["value"]
    assert curve[8]["tokens"] == pytest.approx(8 * 4)
    assert result.manifest.decoding == {
        "kind": "sampling",
        "max_new_tokens": COT_TOKENS,
        "temperature": 0.7,
        "top_p": 1.0,
        "votes": 8,
    }
    again = run_bench(
        Says(rule), get_bench("mcq"), items, Settings(cot=True, votes=8, temperature=0.7, seed=3)
    )
    assert again.to_dict()["extra"] == result.to_dict()["extra"]
    direct = run_bench(Says(lambda text, seed: "A"), get_bench("mcq"), items)
    with pytest.raises(DataError, match=r"parser\.reasons: true and false"):
        compare_results(result, direct)
    free = ("parser", "prompt", "decoding", "seed")
    assert compare_results(direct, result, vary=free).value == pytest.approx(1 - result.headline.value)


def test_kept_answers_are_parsed_anew(tmp_path):
    items = [item(n, answers=("4",)) for n in range(5)]
    first = run_bench(Says(lambda text, seed: "4"), get_bench("chartqa"), items, out=tmp_path)

    def silent(text, seed):
        pytest.fail("asked what is known")

    again = run_bench(Says(silent), get_bench("chartqa"), items, Settings(mode="original"), out=tmp_path)
    assert again.headline.value == first.headline.value == 1.0
    assert again.manifest.metric["mode"] == "original"
    other = Says(lambda text, seed: "5")
    changed = run_bench(other, get_bench("chartqa"), items, Settings(prompt="plain"), out=tmp_path)
    assert (changed.headline.value, len(other.asked)) == (0.0, 5)


def test_what_is_asked(tmp_path):
    both = item(options={"A": "x", "B": "y"}, letter="A", hint="Look.", images=(png(), png(1)))
    asked = messages_of(both, get_bench("mmbench").prompts(cot=False))[0]["content"]
    assert [part["type"] for part in asked] == ["image", "image", "text"]
    assert asked[-1]["text"].startswith("Look.\nQ0?\nA. x\nB. y\nAnswer with the option's letter")
    # What the question holds already is not written again.
    query = replace(both, question="Q? Choices: (A) x (B) y", hint="")
    assert messages_of(query, (PROMPTS["plain"],) * 2)[0]["content"][-1]["text"] == "Q? Choices: (A) x (B) y"
    # MMMU's first picture is enlarged in mode "original" alone.
    model = Says(lambda text, seed: "A")
    run_bench(model, get_bench("mmmu"), [both, replace(both, key="1")], Settings(mode="original"))
    shown = [part["image"].size for part in model.asked[0][0]]
    assert shown == [(40, 20), (20, 10)]
    # So that replies of one mode are no replies of the other.
    model = Says(lambda text, seed: "A")
    for mode in ("chiasm", "original", "original"):
        run_bench(model, get_bench("mmmu"), [both, replace(both, key="1")], Settings(mode=mode), out=tmp_path)
    assert [len(model.asked), model.asked[2][0][0]["image"].size] == [4, (40, 20)]


def test_rotations_are_told_in_folders_too():
    bench = get_bench("mmbench")
    circles = [
        run._units(bench, item(0, key=key))["circle"] for key in ("7", "1000007", "en/7", "en/2000007", "x")
    ]
    assert circles == ["7", "7", "en/7", "en/7", "x"]


def test_frames_of_videos(tmp_path):
    folder = frames_in(tmp_path / "film", [f"{n}.png" for n in range(6)])
    items = [
        item(
            n,
            images=(),
            video=str(folder),
            clip=(0.0, 2.0),
            options={"A": "x", "B": "y"},
            answers=("A",),
            letter="A",
        )
        for n in range(2)
    ]
    model = Says(lambda text, seed: "A")
    result = run_bench(model, get_bench("mvbench"), items, Settings(frames=4))
    (film,), text, _ = model.asked[0]
    # MVBench has folders of frames, three a second: its clips are in seconds.
    assert film == {
        "type": "video",
        "video": str(folder),
        "mode": "middle",
        "frames": 4,
        "clip": [0.0, 2.0],
        "folder_fps": 3.0,
    }
    assert text.endswith("Only give the best option.")
    assert result.manifest.frames == 4
    assert result.manifest.video["folder_fps"] == 3.0
    real = run_bench(tiny_chat(), replace(get_bench("mvbench"), max_new_tokens=3), items, Settings(frames=2))
    assert real.tokens["prompt"] > 0


def test_errors_say_where():
    good = {"answers": ("x",)}
    with pytest.raises(DataError, match=r"^t\.jsonl:2 has no answer"):
        run_bench(
            Says(lambda *a: pytest.fail("asked too early")), get_bench("docvqa"), [item(0, **good), item(1)]
        )
    with pytest.raises(DataError, match=r"^t\.jsonl:1: VQA accuracy"):
        run_bench(Says(None), get_bench("vqav2"), [item(0, **good)])
    with pytest.raises(DataError, match=r"t\.jsonl:1: its answer 'C'"):
        run_bench(Says(None), get_bench("mcq"), [item(0, answers=("C",), options={"A": "x"})])
    with pytest.raises(DataError, match="yes or no, found 'maybe'"):
        run_bench(Says(None), get_bench("pope"), [item(0, answers=("maybe",))])
    with pytest.raises(DataError, match=r"t\.jsonl:1 needs bbox"):
        run_bench(Says(None), get_bench("refcoco"), [item(0)])
    for wrong in ({"bbox": [0, 0, 1, 1], "width": 0}, {"bbox": [0, 0, float("nan"), 1], "width": 4}):
        with pytest.raises(DataError, match=r"t\.jsonl:1 needs bbox"):
            run_bench(Says(None), get_bench("refcoco"), [item(0, facts={"height": 4} | wrong)])
    odd = item(0, facts={"answer_type": "float", "precision": float("inf")}, answers=("2",))
    assert run_bench(Says(lambda *a: "2.0"), get_bench("mathvista"), [odd]).headline.value == 1.0
    film = item(0, images=(), video="gone.mp4", options={"A": "x"}, letter="A")
    with pytest.raises(DataError, match=r"^t\.jsonl:1: there is no video gone\.mp4"):
        run_bench(Says(None), get_bench("video_mcq"), [film])
    broken = item(0, images=(b"not a picture",), **good)
    with pytest.raises(ImageError, match=r"^t\.jsonl:1: "):
        run_bench(Says(None), get_bench("docvqa"), [broken])
    with pytest.raises(DataError, match=r"^t\.jsonl:1: there is no picture"):
        run_bench(Says(None), get_bench("docvqa"), [item(0, images=("gone.png",), **good)])


def test_settings_that_do_not_fit():
    for wrong, message in [
        ({"mode": "ours"}, "'ours'"),
        ({"votes": 0}, "at least 1"),
        ({"votes": 4, "temperature": 0.0}, "all the same"),
        ({"frames": 0}, "at least one"),
        ({"cot": True, "prompt": "short"}, "exclude"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Settings(**wrong)
    captions = [item(0, answers=("x",))]
    with pytest.raises(UsageError, match="cannot vote"):
        run_bench(Says(None), get_bench("coco_caption"), captions, Settings(votes=2))
    with pytest.raises(UsageError, match="no step-by-step prompt"):
        run_bench(Says(None), get_bench("coco_caption"), captions, Settings(cot=True))
    with pytest.raises(UsageError, match="shows pictures"):
        run_bench(Says(None), get_bench("docvqa"), captions, Settings(frames=8))
    with pytest.raises(UsageError, match="did you mean docvqa"):
        get_bench("doc-vqa")
    with pytest.raises(ConfigError, match="scorer 'x'"):
        Bench(name="b", title="", scorer="x", prompt="short")


def test_a_tiny_model_has_a_whole_manifest(tmp_path: Path):
    from chiasm.eval.families import describe

    model = tiny_chat()
    about = describe(model)
    facts = {"versions": {"torch": "2"}, "machine": "m", "git": "abc"}
    items = [item(n, answers=("x",)) for n in range(3)]
    bench = replace(get_bench("docvqa"), max_new_tokens=4)
    result = run_bench(model, bench, items, about=about, environment=facts, out=tmp_path)
    manifest = result.manifest.to_dict()
    assert manifest["model"]["weights"] == about["weights"]
    assert manifest["tiles"]["max_tiles"] == 4
    assert manifest["prompt"]["version"] == 1
    assert manifest["parser"]["anls"] == 1
    assert manifest["versions"] == {"torch": "2"}
    assert manifest["environment"] == {"machine": "m", "git": "abc"}
    assert (manifest["data"]["items"], manifest["data"]["pictures"]) == (3, 2)
    assert result.record["git"] == "abc"
    assert result.cut == 3  # random weights never stop by themselves
