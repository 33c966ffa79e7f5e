"""Broken data sets, one for each rule of the linter, and a healthy one that no rule may speak of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from chiasm.data.layout import LayoutSpec
from chiasm.data.lint import LintOptions, Report, Source, lint
from chiasm.data.message import Part, Record, Turn, from_row
from chiasm.media.tiles import TilePolicy
from tiny_tokenizers import byte_fallback, byte_level

SIDE, ROWS = 28, 4


def spec_of(**changes: Any) -> LayoutSpec:
    tiles = TilePolicy(
        image_size=SIDE, max_tiles=changes.pop("max_tiles", 6), mode=changes.pop("mode", "chiasm")
    )
    given = {
        "tokenizer": byte_level(),
        "template": "internvl2_5",
        "tokens_per_tile": ROWS,
        "max_length": 2000,
    }
    return LayoutSpec(tiles=tiles, **{**given, **changes})


class Rows:
    """A data set in memory."""

    def __init__(self, rows: list[Any], root: Path, name: str = "train") -> None:
        self.rows, self.root, self.name = rows, root, name

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.name}.jsonl:{index + 1}"

    def record(self, index: int) -> Record:
        row = self.rows[index]
        record = row if isinstance(row, Record) else from_row(row, where=self.where(index))
        return replace(record, turns=tuple(record.resolved(self.root)))


def row(
    *said: str, image: Any = None, roles: tuple[str, ...] = ("human", "gpt"), **more: Any
) -> dict[str, Any]:
    talk = [{"from": roles[n % len(roles)], "value": text} for n, text in enumerate(said)]
    return {**({} if image is None else {"image": image}), "conversations": talk, **more}


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    """Smooth blots, each seed its own, that survive resizing."""
    cells = np.random.default_rng(seed).integers(0, 256, (7, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(root: Path) -> Path:
    """The pictures that the rows name."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("abcd"):
        picture(seed).save(root / f"{name}.png")
    picture(0).save(root / "a again.png")  # the very bytes of a.png
    picture(0, 180, 120).save(root / "a larger.png")
    (root / "empty.png").write_bytes(b"")
    (root / "page.jpg").write_text("<html>not found</html>")
    whole = (root / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "bomb.png").write_bytes(resized_header(whole, 40_000, 40_000))
    (root / "large.png").write_bytes(resized_header(whole, 15_000, 13_000))
    (root / "huge.png").write_bytes(resized_header(whole, 9_000, 6_000))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(7).save(root / "lying.jpg", exif=exif)
    exif[0x0112] = 1
    picture(8).save(root / "upright.jpg", exif=exif)
    picture(9, 300, 9).save(root / "thin.png")
    (root / "broken.mp4").write_bytes(b"not a video at all")
    return root


def resized_header(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size; its checksum is right."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


GOOD = [
    row("<image>\nWhat is this?", "A cat on a mat.", image="a.png", width=90, height=60),
    row(
        "Which is larger, <image> or <image>?",
        "The second.",
        "Why?",
        "It fills more.",
        image=["b.png", "c.png"],
    ),
    row("Where is the dog?", "<ref>dog</ref><box>[[10, 20, 300, 400]]</box>", image="d.png"),
    row("Where are the cups?", "<ref>cups</ref><box>[[700,20,990,400],[1,2,1000,999]]</box>", image="b.png"),
    row("What is 3 + 4?", "It is 7, as 7 - 4 = 3; x < y > z, e.g. <b>bold</b> café € “quoted”."),
    row("Be brief.", "Name a colour.", "Red.", roles=("system", "human", "gpt")),
    row("<image>Look.", "A rocket.", image="upright.jpg"),
]
"""No rule says a word about these."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Rows that a rule finds (`hit` of them, counted as findings), under these settings."""

    rows: list[Any]
    hit: int = 1
    spec: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    against: list[Any] | None = None
    says: str = ""


def turns(*said: tuple[str, str]) -> Record:
    return Record(turns=tuple(Turn.of(role, text) for role, text in said))


LOOP = "the cat is on the mat and " * 20
BOXES_IN_PIXELS = [
    row(f"Where is {n}?", f"<box>[[{n},{n},{60 + n},{40 + n}]]</box>", image="abcd"[n % 4] + ".png")
    for n in range(8)
]
CASES: dict[str, Case] = {
    "C001": Case(rows=[{"image": "a.png", "conversation": []}], says="conversations must be a list"),
    "C002": Case(rows=[row("<image> or <image>?", "Both.", image="a.png")], says="2 <image> tag(s)"),
    "C003": Case(
        rows=[
            row("Hi", "Ho", "Be brief.", roles=("human", "gpt", "system")),
            turns(("user", "Hi"), ("system", "Be brief."), ("assistant", "Ho")),
        ],
        hit=2,
        says="must come first",
    ),
    "C004": Case(
        rows=[
            row("Hello!", "Hi", "Ho", roles=("gpt", "human", "gpt")),
            row("a", "b", "c", roles=("human", "human", "gpt")),
            row("a", "b", "c"),
        ],
        hit=3,
        says="begins with an answer",
    ),
    "C005": Case(
        rows=[
            Record(turns=(Turn.of("user", "a"), Turn("assistant", (Part("image", "a.png"),)))),
            Record(
                turns=(
                    Turn("user", (Part("box", [1, 2, 3, 4]), Part("text", "a"))),
                    Turn.of("assistant", "b"),
                )
            ),
        ],
        hit=2,
        says="kind image in a turn of role assistant",
    ),
    "C006": Case(
        rows=[row("What?", "An <image>."), row("<video>What?", "A."), row("<|image_pad|>What?", "A cat.")],
        hit=3,
        says="plain text",
    ),
    "C007": Case(rows=[], says="no rows"),
    "C008": Case(
        rows=[
            Record(
                turns=(
                    Turn("user", (Part("video", "x", {"mode": "fps", "fps": -1}),)),
                    Turn.of("assistant", "a"),
                )
            )
        ],
        says="fps",
    ),
    "C101": Case(rows=[row("What is <IMG_CONTEXT>?", "A token.")], says="turn 0: <IMG_CONTEXT>"),
    "C102": Case(
        rows=[row("Hi", "Ho<|im_end|>"), row("Hi", "Ho<|endoftext|>")], hit=2, says="<|im_end|> inside"
    ),
    "C103": Case(
        rows=[
            row("[INST] Hi [/INST]", "Ho"),
            row("Hi", "Ho</s>"),
            row("Hi", "Ho\nUSER: and now?\nASSISTANT: no"),
        ],
        hit=4,
        says="[/INST] inside",
    ),
    "C104": Case(
        rows=[row("Hi", "Ho", "And?", "Ha")],
        spec={"tokenizer": byte_fallback(prepend=True), "template": "phi3-chat"},
        says="differ",
    ),
    "C105": Case(rows=[row("Hi", "\n\nHo")], says="begin within a token"),
    "C110": Case(rows=[row("Hi \ud83d", "Ho")], says="U+D83D"),
    "C111": Case(rows=[row("Hi", "H\x00o"), row("\ufeffHi", "Ha")], hit=2, says="U+0000"),
    "C112": Case(
        rows=[row("A cafÃ©?", "Yes"), row("Itâ€™s?", "No"), row("B\ufffd?", "Hm")], hit=3, says="probably 'é'"
    ),
    "C201": Case(rows=[row("What?", "A.", image="nowhere.png")], says="no such file"),
    "C202": Case(
        rows=[row(f"What is {n}?", "A.", image=n) for n in ("empty.png", "page.jpg", "cut.png")],
        hit=3,
        options={"decode": True},
        says="is empty",
    ),
    "C203": Case(rows=[row(f"{n}?", "A.", image=n) for n in ("bomb.png", "large.png")], hit=2, says="more"),
    "C204": Case(rows=[row("What?", "A.", image="huge.png")], says="9000x6000"),
    "C205": Case(
        rows=[
            row("Where?", "<box>[[1,2,30,40]]</box>", image="lying.jpg"),
            row("What?", "A.", image="lying.jpg", width=90, height=60),
        ],
        hit=2,
        says="60x90",
    ),
    "C206": Case(
        rows=[row("What?", "A.", image="a.png", width=640, height=480)], says="the row says 640x480"
    ),
    "C207": Case(rows=[row("What?", "A.", image="thin.png")], says="300x9"),
    "C208": Case(
        rows=[
            {"video": name, "conversations": row("<video>What?", "A.")["conversations"]}
            for name in ("broken.mp4", "gone.mp4")
        ],
        hit=2,
        says="broken.mp4",
    ),
    "C209": Case(rows=[row("What?", "A.", image="https://example.invalid/a.png")], says="--decode"),
    "C301": Case(
        rows=[
            row("Where?", "<box>(10,20),(300,400)</box>", image="a.png"),
            row("Who?", "<ref>a<box>[[1,2,3,4]]</box>", image="a.png"),
            row("How?", '{"bbox_2d": [1, 2, 3, 4]}', image="a.png"),
            row("Why?", "<box>[[1,2,3]]</box>", image="a.png"),
        ],
        hit=4,
        says="Qwen-VL's",
    ),
    "C302": Case(
        rows=[
            row("Where?", "<box>[[10,20,1600,900]]</box>", image="huge.png"),
            row("Who?", "<box>[[-5,20,30,40]]</box>", image="a.png"),
        ],
        hit=2,
        says="looks like pixels of its 9000x6000 picture",
    ),
    "C303": Case(rows=[row("Where?", "<box>[[0.1,0.2,0.5,1.0]]</box>", image="a.png")], says="fractions"),
    "C304": Case(
        rows=[
            row("Where?", "<box>[[600,500,80,120]]</box>", image="a.png"),
            row("Who?", "<box>[[600,500,800,120]]</box>", image="a.png"),
        ],
        hit=2,
        says="looks like x, y, width, height",
    ),
    "C305": Case(rows=[row("Where?", "<box>[[5,6,5,60]]</box>", image="a.png")], says="no area"),
    "C306": Case(rows=[row("Where?", "<box>[[5,6,50,60]]</box>")], says="without a picture"),
    "C307": Case(rows=BOXES_IN_PIXELS, says="in 8 pictures"),
    "C401": Case(
        rows=[row("<image>What?", "A " * 30, image="a.png"), row("Hi", " ".join(map(str, range(200))))],
        hit=2,
        spec={"max_length": 110},
        says="it fits with",
    ),
    "C402": Case(
        rows=[row("What?", "A.", image=["a.png", "b.png"])], options={"pack_tiles": 3}, says="limit 3"
    ),
    "C403": Case(
        rows=[row("What?", "A.", image=["a.png", "b.png", "c.png"])], spec={"max_tiles": 2}, says="3 pictures"
    ),
    "C501": Case(rows=[row("Hi", "Ho"), row(" HI ", "ho")], says="same as train.jsonl:1"),
    "C502": Case(
        rows=[row("What?", "A.", image="a.png"), row("<image>what?", "A.", "And?", "B.", image="a.png")],
        says="train.jsonl:1",
    ),
    "C503": Case(
        rows=[row("What?", "A.", image="a.png"), row("Who?", "B.", image="a again.png")], says="another name"
    ),
    "C504": Case(
        rows=[row("What?", "A.", image="a.png"), row("Who?", "B.", image="a larger.png")],
        options={"decode": True},
        says="looks like the picture of train.jsonl:1",
    ),
    "C511": Case(
        rows=[row("What is it?", "A cat.", image="a.png"), row("1 + 1?", "2")],
        hit=2,
        against=[row("what is it?", "a cat.", image="a again.png"), row("1 + 1?", "2")],
        says="test.jsonl:1",
    ),
    "C512": Case(
        rows=[row("What is it?", "A cat.", image="a again.png")],
        against=[row("Is it a dog?", "No.", image="a.png")],
        says="test.jsonl:1",
    ),
    "C513": Case(
        rows=[row("What is on the left of the red house?", "It is a tall tree.", image="a.png")],
        against=[row("What is on the left of the red house?", "It is a tall tree.", image="b.png")],
        says="test.jsonl:1",
    ),
    "C514": Case(
        rows=[row("What is it?", "A cat.", image="a larger.png")],
        against=[row("Is it a dog?", "No.", image="a.png")],
        options={"decode": True},
        says="test.jsonl:1",
    ),
    "C601": Case(rows=[row("What?", roles=("human",))], says="all labels would be empty"),
    "C602": Case(rows=[row("What?", " \n")], says="turn 1"),
    "C603": Case(
        rows=[row("What?", LOOP), row("谁？", "猫在垫子上面睡觉了" * 20)], hit=2, says="are repetitions"
    ),
    "C604": Case(
        rows=[row(f"Is there a dog in {n}?", "Yes." if n else "No.") for n in range(60)],
        says="59 of 60 answers",
    ),
    "C605": Case(
        rows=[row("What?", "A cat."), row("这是什么？", "一只猫。"), row("Who?", "一只猫。")], hit=2
    ),
}


def run(case: Case, root: Path, **more: Any) -> Report:
    sources = [Source(name="train", dataset=Rows(case.rows, root))]
    tests = [] if case.against is None else [Source(name="test", dataset=Rows(case.against, root, "test"))]
    given: Callable[..., LintOptions] = LintOptions
    return lint(sources, spec_of(**case.spec), given(**{"threads": 1, **case.options}), against=tests, **more)
