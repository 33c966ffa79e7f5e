"""Pages: title, headings, paragraphs, tables and small print, of any aspect ratio, with exact ground truth.

Paragraphs are made of real sentences. ``text="passages"`` takes those of ``passages.json`` (openings of works in the
public domain, each in one split); ``text="book"`` the prepared ``text.txt`` of ``chiasm.eval.perplexity``, cut into
80 % for train, 8 % for dev and the rest for test: do not measure perplexity on a book that was trained on. Tables are
those of ``worlds.tables``. Titles and headings are words of the split, and fonts are divided too.

Sizes go from 100 x 800 to 1600 x 400. A wide page has columns. Every line, cell and word knows its box.

Frame: pixels, origin at the top left corner, y down; boxes (x0, y0, x1, y1) with exclusive ends, around the ink.
Shape legend: H x W pixels.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from chiasm.errors import DataError
from chiasm.media.boxes import format_box, pixels_to_thousand
from chiasm.worlds.assets import assets_dir
from chiasm.worlds.scenes import pixels_of
from chiasm.worlds.tables import made_up, show, tables_of, view
from chiasm.worlds.typeset import Face, Fonts, faces, ink_box, text_width, word_boxes, wrap
from chiasm.worlds.words import words_of
from chiasm.worlds.world import Sample, Thing, World

__all__ = ["ORDINALS", "QUESTIONS", "PagesWorld", "sentences_of"]

QUESTIONS = ("title", "heading", "cell", "largest", "smallprint", "word", "at", "locate")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
#: Smallest and largest side, smallest and largest width / height, largest number of pixels.
_SIDES, _ASPECTS, _MOST = (100, 1600), (1 / 8, 4.0), 900_000
#: Smallest size of running text and of small print in pixels per em.
_BODY, _TINY = 10, 8

_WORDINGS: dict[str, tuple[str, ...]] = {
    "title": ("What is the title of the page?", "Read the title.", "What is the page called?"),
    "heading": ("What is the {nth} heading?", "Read the {nth} heading."),
    "cell": (
        "What is in the row {row} and the column {column}?",
        "Which number does {row} have under {column}?",
    ),
    "largest": ("Which {label} has the largest {column}?", "In which row of the table is {column} largest?"),
    "smallprint": ("What is the document number in the small print?", "Read the number in the small print."),
    "word": ("What is the {nth} word of the {mth} paragraph?",),
    "at": ("Which word is written at <box>[[{box}]]</box>?", "Read the word at <box>[[{box}]]</box>."),
    "locate": (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{name}</ref>",
        "Where is {name}? Answer with its box.",
    ),
}


@functools.cache
def sentences_of(split: str) -> tuple[tuple[str, ...], ...]:
    """Return the split's passages, each a tuple of sentences."""
    text = resources.files("chiasm.worlds").joinpath("passages.json").read_text(encoding="utf-8")
    return tuple(_sentences(row["text"]) for row in json.loads(text) if row["split"] == split)


def _sentences(text: str) -> tuple[str, ...]:
    """Cut at full stops before a capital; "Mr." and single letters do not end a sentence."""
    out, begin = [], 0
    words = text.split()
    for k, word in enumerate(words):
        last = word.rstrip('"')
        ends = last.endswith((".", "!", "?")) and last not in ("Mr.", "Mrs.", "Dr.", "St.") and len(last) > 2
        if k + 1 == len(words) or (ends and words[k + 1].lstrip('"')[:1].isupper()):
            out.append(" ".join(words[begin : k + 1]))
            begin = k + 1
    return tuple(out)


@functools.lru_cache(maxsize=8)
def _book(split: str, folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return the split's part of the prepared book as one passage of sentences."""
    path = folder / "text.txt"
    if not path.is_file():
        raise DataError(
            "no book for pages: prepare one with `python -m chiasm.eval.perplexity DIR` (its message says "
            f"which), or use text=passages (looked for {path})"
        )
    text = path.read_text(encoding="utf-8")
    cuts = {"train": (0.0, 0.8), "dev": (0.8, 0.88), "test": (0.88, 1.0)}[split]
    part = text[int(cuts[0] * len(text)) : int(cuts[1] * len(text))]
    plain = part.encode("ascii", "ignore").decode()  # not every face has more than ASCII
    sentences = [s for s in _sentences(plain) if 30 <= len(s) <= 400 and s[0].isupper()]
    return (tuple(sentences),)


@dataclass(slots=True, kw_only=True)
class _Page:
    """A page while it is set."""

    width: int
    height: int
    face: Face
    body: int
    image: Image.Image
    pen: ImageDraw.ImageDraw
    ink: tuple[int, int, int]
    lines: list[dict[str, Any]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    paragraphs: list[str] = field(default_factory=list)
    table: dict[str, Any] | None = None

    def line(self, text: str, size: int, x: int, y: int, role: str) -> None:
        self.pen.text((x, y), text, fill=self.ink, font=self.face.at(size))
        box = ink_box(self.face, size, text, x, y)
        self.lines.append({"text": text, "role": role, "box": list(box), "size": size, "at": [x, y]})


class PagesWorld(World):
    """Questions about set pages.

    Args:
        split: "train", "dev" or "test"; decides sentences, words, tables and fonts.
        seed: changes the pages.
        size: number of samples (default 20,000 for train, 2,000 else).
        pixels: side or (width, height) of all pages, at least 100; default: another size for each page.
        questions: question kinds, chosen evenly among those that a page allows.
        rounds: questions a page; further ones are of other kinds as far as the page has them.
        text: "passages" or "book".
        real: share of tables that are real, 0..1.
        fonts: see ``typeset.faces``.
        folder: where the prepared assets are.

    Raises:
        DataError: unknown question or text, numbers out of range, or an asset is missing.
    """

    family = "pages"

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int | None = None,
        pixels: int | Sequence[int] | None = None,
        questions: Sequence[str] = QUESTIONS,
        rounds: int = 1,
        text: Literal["passages", "book"] = "passages",
        real: float = 0.6,
        fonts: Fonts = "auto",
        folder: str | Path | None = None,
    ) -> None:
        super().__init__(split, seed=seed)
        self.pixels = None if pixels is None else pixels_of(pixels, 100)
        self.asked = (questions,) if isinstance(questions, str) else tuple(questions)
        unknown = [name for name in self.asked if name not in QUESTIONS]
        if unknown or not self.asked:
            raise DataError(f"unknown questions {unknown} of pages: choose from {', '.join(QUESTIONS)}")
        if text not in ("passages", "book"):
            raise DataError(f"text={text!r}: choose passages or book")
        if not 0.0 <= real <= 1.0 or not 1 <= rounds <= len(QUESTIONS):
            raise DataError(
                f"real={real} rounds={rounds}: give a share 0..1 and 1..{len(QUESTIONS)} questions"
            )
        self.rounds, self.real, self.text = rounds, real, text
        self.passages = sentences_of(split) if text == "passages" else _book(split, assets_dir(folder))
        self.faces = faces(split, fonts, folder)
        self.tables = tables_of(split)
        self._size = size if size is not None else (20_000 if split == "train" else 2_000)

    def __len__(self) -> int:
        return self._size

    def sample(self, index: int) -> Sample:
        """Return sample ``index``.

        ``meta``: ``title``, ``headings``, ``paragraphs``, ``table`` (with ``cells``: row, column, text, box; row
        -1 is the head), ``lines`` (text, role, box, size), ``font``, ``number`` (of the small print) and
        ``asked``.
        """
        i = self.checked(index)
        page, facts, rounds, asked = self._page(i)
        return Sample(
            image=np.asarray(page.image),
            question=rounds[0][0],
            answer=rounds[0][1],
            family=self.family,
            key=self.key(i),
            more=tuple(rounds[1:]),
            meta={
                **facts,
                "headings": page.headings,
                "paragraphs": page.paragraphs,
                "table": page.table,
                "lines": page.lines,
                "font": page.face.stem,
                "asked": asked,
            },
        )

    def things(self, index: int) -> list[Thing]:
        """Return every line with its box, labelled by its role, and the table."""
        page, *_ = self._page(self.checked(index))
        boxes = [(line["role"], line["box"]) for line in page.lines if line["role"] != "cell"]
        if page.table is not None:
            boxes.append(("table", page.table["box"]))
        return [Thing(label=role, box=(box[0], box[1], box[2], box[3])) for role, box in boxes]

    def manifest(self) -> dict[str, Any]:
        """Return the base facts, options and fonts with hashes."""
        return super().manifest() | {
            "pixels": None if self.pixels is None else list(self.pixels),
            "questions": list(self.asked),
            "rounds": self.rounds,
            "text": self.text,
            "real": self.real,
            "fonts": {face.stem: face.digest() for face in self.faces},
        }

    # --- one page -------------------------------------------------------------------------------------------

    def _page(self, index: int) -> tuple[_Page, dict[str, Any], list[tuple[str, str]], list[dict[str, Any]]]:
        """Set pages until one allows the wished question."""
        rng = self.random(index)
        wanted = self.asked[int(rng.integers(len(self.asked)))]
        for attempt in range(300):
            name = wanted if attempt < 60 else self.asked[int(rng.integers(len(self.asked)))]
            page, facts = self._set(rng, need_table=name in ("cell", "largest"))
            found = _question(name, page, facts, rng, self.split == "train")
            if found is None:
                continue
            rounds, asked = [(found[0], found[1])], [found[2]]
            for further in (self.asked[int(k)] for k in rng.permutation(len(self.asked))):
                if len(rounds) == self.rounds:
                    break
                more = (
                    _question(further, page, facts, rng, self.split == "train") if further != name else None
                )
                if more is not None:
                    rounds.append((more[0], more[1]))
                    asked.append(more[2])
            return page, facts, rounds, asked
        raise DataError(
            f"no page of {self.pixels} pixels allows the questions {', '.join(self.asked)}: allow more"
        )

    def _set(self, rng: np.random.Generator, *, need_table: bool) -> tuple[_Page, dict[str, Any]]:
        width, height = self.pixels or _draw_size(rng)
        tone = 255 - rng.integers(0, 16, 3)
        paper = (int(tone[0]), int(tone[1]), int(tone[2]))
        image = Image.new("RGB", (width, height), paper)
        body = int(np.clip(round(min(width, height) / rng.uniform(22, 40)), _BODY, 20))
        if width < 200:
            body = _BODY
        dark = int(rng.integers(0, 60))
        page = _Page(
            width=width,
            height=height,
            face=self.faces[int(rng.integers(len(self.faces)))],
            body=body,
            image=image,
            pen=ImageDraw.Draw(image),
            ink=(dark, dark, dark + 10),
        )
        margin = max(5, round(0.045 * min(width, height)))
        tiny = max(_TINY, body - 4)
        words = words_of(self.split)

        def word() -> str:
            return words[int(rng.integers(len(words)))]

        title = [f"{word()} and {word()}", f"the {word()} of the {word()}", f"notes on {word()}", word()][
            int(rng.integers(4))
        ]
        title = title[0].upper() + title[1:]
        y = margin
        big = round(body * (1.3 if width < 200 else 1.7))
        for text in wrap(page.face, big, title, width - 2 * margin):
            page.line(text, big, margin, y, "title")
            y = page.lines[-1]["box"][3] + 3
        number = f"{int(rng.integers(100, 1000))}-{int(rng.integers(10, 100))}"
        small = wrap(
            page.face, tiny, f"Document {number}, page {int(rng.integers(1, 100))}", width - 2 * margin
        )
        high = _high(page.face, tiny) + 2
        foot = height - margin - high * len(small)
        for k, text in enumerate(small):
            page.line(text, tiny, margin, foot + k * high, "small print")
        columns = max(1, min(4, width // (body * 30)))
        gutter = body * 2
        space = (width - 2 * margin - gutter * (columns - 1)) // columns
        top = y + body // 2
        for column in range(columns):
            self._fill(
                page, rng, word, margin + column * (space + gutter), top, space, foot - body // 2, need_table
            )
        return page, {"title": title, "number": number}

    def _fill(
        self,
        page: _Page,
        rng: np.random.Generator,
        word: Any,
        x: int,
        y: int,
        space: int,
        bottom: int,
        need_table: bool,
    ) -> None:
        """Fill one column from ``y`` to ``bottom`` with headings, paragraphs and, once a page, a table."""
        body, head = page.body, round(page.body * 1.2)
        step = round(_high(page.face, body) * 1.12) + 1
        misses = 0
        while y + head + 3 * step < bottom:
            if page.table is None and (need_table or rng.random() < 0.4):
                y_after = self._table(page, rng, x, y, space, bottom)
                if y_after is not None:
                    y = y_after + step // 2
                    continue
            if len(page.headings) < len(ORDINALS) and rng.random() < 0.5:
                text = f"{word()} {['and', 'or', 'by', 'for'][int(rng.integers(4))]} {word()}"
                text = text[0].upper() + text[1:]
                lines = wrap(page.face, head, text, space)
                if y + len(lines) * (head + 4) + 2 * step > bottom:
                    return
                for line in lines:
                    page.line(line, head, x, y, "heading")
                    y += _high(page.face, head) + 3
                page.headings.append(text)
                y += 3
            passage = self.passages[int(rng.integers(len(self.passages)))]
            start, count = int(rng.integers(len(passage))), int(rng.integers(1, 5))
            lines = wrap(page.face, body, " ".join(passage[start : start + count]), space)
            room = (bottom - y) // step
            if room < 1:
                return
            lines = lines[:room]
            if " ".join(lines) in page.paragraphs:  # the passages of a split are few
                misses += 1
                if misses == 8:
                    return
                continue
            for line in lines:
                page.line(line, body, x, y, f"paragraph {len(page.paragraphs) + 1}")
                y += step
            page.paragraphs.append(" ".join(lines))
            y += step // 2
            misses = 0
            if len(page.paragraphs) >= 12:
                return

    def _table(
        self, page: _Page, rng: np.random.Generator, x: int, y: int, space: int, bottom: int
    ) -> int | None:
        """Set a table; return its lower edge, or None where none of a few tables fits."""
        size, face = page.body, page.face
        high = _high(face, size) + 6
        for attempt in range(4):
            most = int(min(8, (bottom - y) // high - 1))
            if most < 2:
                return None
            rows, columns = (min(3, most), most), (1, 3 - attempt // 2)
            if rng.random() < self.real:
                table = view(
                    self.tables[int(rng.integers(len(self.tables)))], rng, rows=rows, columns=columns
                )
            else:
                table = made_up(self.split, rng, rows=rows, columns=columns)
            texts = [
                [table.label, *table.columns],
                *([name, *map(show, values)] for name, values in table.rows),
            ]
            wide = [
                math.ceil(max(text_width(face, size, row[c]) for row in texts)) + 10
                for c in range(len(texts[0]))
            ]
            if sum(wide) <= space and len(texts) * high <= bottom - y:
                break
        else:
            return None
        extra = min(space - sum(wide), int(rng.integers(0, 80))) // len(wide)
        wide = [w + extra for w in wide]
        boxed = bool(rng.random() < 0.5)
        right, rule = x + sum(wide), (130, 130, 135)
        cells = []
        for r, row in enumerate(texts):
            top = y + r * high
            if boxed or r <= 1:
                page.pen.line((x, top, right, top), fill=rule)
            left = x
            for c, text in enumerate(row):
                offset = 5 if c == 0 else wide[c] - 5 - math.ceil(text_width(face, size, text))
                page.line(text, size, left + offset, top + 3, "cell")
                cells.append({"row": r - 1, "column": c - 1, "text": text, "box": page.lines[-1]["box"]})
                left += wide[c]
        end = y + len(texts) * high
        page.pen.line((x, end, right, end), fill=rule)
        if boxed:
            left = x
            for w in [0, *wide]:
                left += w
                page.pen.line((left, y, left, end), fill=rule)
        page.table = table.to_json() | {"box": [x, y, right + 1, end + 1], "cells": cells}
        return end


def _draw_size(rng: np.random.Generator) -> tuple[int, int]:
    """Draw (width, height): the aspect ratio evenly in its logarithm, then an area that fits."""
    while True:
        aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        area = math.exp(rng.uniform(math.log(80_000), math.log(_MOST)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if min(width, height) >= _SIDES[0] and max(width, height) <= _SIDES[1]:
            return width, height


@functools.lru_cache(maxsize=4096)
def _high(face: Face, size: int) -> int:
    """The height from ascenders to descenders, counted from where a line begins."""
    return math.ceil(face.at(size).getbbox("Agjpq")[3])


# --- questions ------------------------------------------------------------------------------------------------


def _question(
    name: str, page: _Page, facts: dict[str, Any], rng: np.random.Generator, varied: bool
) -> tuple[str, str, dict[str, Any]] | None:
    """Return question, answer and what it is about; None where the page has nothing of the kind."""

    def say(**names: Any) -> str:
        wordings = _WORDINGS[name]
        return wordings[int(rng.integers(len(wordings))) if varied else 0].format(**names)

    about: dict[str, Any] = {"kind": name}
    size = (page.width, page.height)
    if name == "title":
        return say(), facts["title"], about
    if name == "heading":
        if not page.headings:
            return None
        k = int(rng.integers(len(page.headings)))
        return say(nth=ORDINALS[k]), page.headings[k], about | {"heading": k}
    if name in ("cell", "largest"):
        return _table_question(name, page.table, say, rng)
    if name == "smallprint":
        return say(), facts["number"], about
    if name == "word":
        k = int(rng.integers(min(len(page.paragraphs), len(ORDINALS)))) if page.paragraphs else 0
        words = page.paragraphs[k].split() if page.paragraphs else []
        places = [n for n in range(min(len(words), len(ORDINALS))) if _bare(words[n])]
        if not places:
            return None
        n = places[int(rng.integers(len(places)))]
        return say(nth=ORDINALS[n], mth=ORDINALS[k]), _bare(words[n]), about | {"paragraph": k, "word": n}
    if name == "at":
        lines = [line for line in page.lines if line["role"] != "cell"]
        line = lines[int(rng.integers(len(lines)))]
        boxes = [
            one
            for one in word_boxes(page.face, line["size"], line["text"], *line["at"])
            if len(_bare(one[0])) >= 3
        ]
        if not boxes:
            return None
        text, box = boxes[int(rng.integers(len(boxes)))]
        corners = ",".join(map(str, pixels_to_thousand(box, *size)))
        return say(box=corners), _bare(text), about | {"box": list(box), "role": line["role"]}
    places = [("the title", _union([line["box"] for line in page.lines if line["role"] == "title"]))]
    places.append(
        ("the small print", _union([line["box"] for line in page.lines if line["role"] == "small print"]))
    )
    if page.table is not None:
        places.append(("the table", page.table["box"]))
    for k in range(min(len(page.paragraphs), len(ORDINALS))):
        boxes = [line["box"] for line in page.lines if line["role"] == f"paragraph {k + 1}"]
        places.append((f"the {ORDINALS[k]} paragraph", _union(boxes)))
    label, box = places[int(rng.integers(len(places)))]
    return say(name=label), format_box(label, pixels_to_thousand(box, *size)), about | {"box": list(box)}


def _table_question(
    name: str, table: dict[str, Any] | None, say: Any, rng: np.random.Generator
) -> tuple[str, str, dict[str, Any]] | None:
    if table is None:
        return None
    rows, c = table["rows"], int(rng.integers(len(table["columns"])))
    if name == "cell":
        r = int(rng.integers(len(rows)))
        about = {"kind": name, "row": r, "column": c}
        return say(row=rows[r][0], column=table["columns"][c]), show(rows[r][1 + c]), about
    order = sorted(range(len(rows)), key=lambda r: -rows[r][1 + c])
    if len(rows) < 2 or rows[order[0]][1 + c] == rows[order[1]][1 + c]:
        return None
    question = say(label=table["label"].lower(), column=table["columns"][c])
    return question, rows[order[0]][0], {"kind": name, "row": order[0], "column": c}


def _bare(word: str) -> str:
    return word.strip(".,;:!?\"'()-")


def _union(boxes: Sequence[Sequence[int]]) -> list[int]:
    return [
        min(box[0] for box in boxes),
        min(box[1] for box in boxes),
        max(box[2] for box in boxes),
        max(box[3] for box in boxes),
    ]
