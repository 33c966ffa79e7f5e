"""How long a sample of every drawn world takes on one core; with --sheet, a picture of them all.

CPU time of this process, one thread, remembered sprites and fonts warm, every repeat over other indices. Fonts are
those that this machine has; worlds whose assets are not prepared are left out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from measure import compare, cpu_seconds, finish
from PIL import Image, ImageDraw, ImageFont

from chiasm.worlds import available, has_asset, open_world

ART = {"sprites": "drawings", "photos": 1.0, "pixels": 128}
#: (name, family, options, samples a repeat, required samples a second or None)
CASES: tuple[tuple[str, str, dict[str, Any], int, float | None], ...] = (
    ("scenes, 64 px", "scenes", {}, 400, 500),
    ("scenes, 64 px, 3 questions", "scenes", {"rounds": 3}, 400, None),
    ("scenes, 448 px", "scenes", {"pixels": 448}, 60, None),
    ("counting, 64 px", "counting", {}, 200, None),
    ("grounding, shapes, 64 px", "grounding", {}, 200, None),
    ("grounding, drawings on photographs, 128 px", "grounding", ART, 100, None),
    ("clip art, 64 px", "clipart", {}, 200, None),
    ("words, 64 px", "words", {}, 200, None),
    ("charts, 320 to 640 px", "charts", {}, 60, 20),
    ("charts, compact, 64 px", "charts", {"pixels": 64}, 200, None),
    ("pages, up to 1600 px", "pages", {}, 30, None),
    ("clips, 8 frames, 64 px", "clips", {}, 150, None),
    ("clips, 32 frames, drawings on photographs, 128 px", "clips", {"frames": 32, **ART}, 20, None),
)


def measure(*, repeats: int = 7, share: float = 1.0) -> dict[str, Any]:
    """One row a world: milliseconds a sample, and samples a second in the note."""
    rows = []
    for name, family, options, count, required in CASES:
        if not _ready(family, options):
            continue
        n = max(1, round(count * share))
        world = open_world(family, "train", **options)

        def some(first: int, world: Any = world, n: int = n) -> None:
            for index in range(first, first + n):
                world.sample(index)

        some(0)
        times = [cpu_seconds(lambda k=k, n=n, some=some: some((k + 1) * n)) / n * 1e3 for k in range(repeats)]
        rate = 1e3 / sorted(times)[len(times) // 2]
        row = compare(
            f"world {name}",
            None,
            times,
            note=f"{rate:,.0f} a second",
            required="" if required is None else f">= {required:g} a second",
            ok=None if required is None else rate >= required,
        )
        rows.append(row)
    return {"rows": rows, "remark": "Milliseconds of CPU a sample, one thread, drawing and questions."}


def _ready(family: str, options: dict[str, Any]) -> bool:
    drawings = options.get("sprites") != "drawings" or has_asset("emoji")
    return (
        family in available(among=[family])
        and drawings
        and (not options.get("photos") or has_asset("photos"))
    )


# --- the picture ------------------------------------------------------------------------------------------------


def sheet(path: Path, *, width: int = 1240) -> None:
    """Draw samples of all worlds with their questions and answers."""
    drawn = {"sprites": "drawings", "photos": 0.6} if has_asset("emoji") and has_asset("photos") else {}
    lines: list[tuple[str, dict[str, Any], list[int], int, int]] = [
        ("scenes", {"pixels": 128}, [1, 3, 6, 9, 11, 13, 20], 158, 158),
        ("grounding", {"pixels": 128, **drawn}, [0, 1, 2, 3, 4, 5, 6], 158, 158),
        ("clipart", {"pixels": 128}, [0, 1, 2, 3, 4, 5, 6], 158, 158),
        ("charts", {"pixels": (400, 300)}, [0, 1, 2, 3], 290, 218),
        ("charts", {"pixels": (400, 300)}, [5, 10, 17, 16], 290, 218),
        ("pages", {"pixels": (560, 420)}, [0, 1, 3], 396, 297),
    ]
    canvas = Image.new("RGB", (width, 1800), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    y = 10
    for family, options, indices, w, h in lines:
        if not _ready(family, options):
            continue
        world, x = open_world(family, "test", **options), 10
        for index in indices:
            sample = world.sample(index)
            picture = sample.picture()
            scale = min(w / picture.width, h / picture.height)
            size = (round(picture.width * scale), round(picture.height * scale))
            shown = picture.resize(size, Image.Resampling.LANCZOS)
            if family == "grounding":
                box = [v * scale for v in sample.meta["objects"][sample.meta["asked"]]["box"]]
                ImageDraw.Draw(shown).rectangle(box, outline=(230, 0, 120), width=2)
            canvas.paste(shown, (x, y))
            asked = sample.question if family != "grounding" else sample.question.split(": ")[-1]
            _caption(pen, font, asked, sample.answer, x, y + h + 2, w)
            x += w + 15
        y += h + 48
    world, x = open_world("clips", "test", pixels=96), 10
    sample = world.sample(4)
    for frame in sample.frames():
        canvas.paste(frame.resize((140, 140), Image.Resampling.NEAREST), (x, y))
        x += 152
    _caption(pen, font, sample.question, sample.answer, 10, y + 142, 600)
    canvas = canvas.crop((0, 0, width, y + 182))
    # Every colour of the palette must survive, or an answer would look wrong.
    small = canvas.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def _caption(pen: Any, font: Any, question: str, answer: str, x: int, y: int, width: int) -> None:
    lines: list[str] = [""]
    for word in question.split():
        if pen.textlength(f"{lines[-1]} {word}", font=font) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    lines = [
        *lines[:2],
        answer if pen.textlength(answer, font=font) < width + 20 else answer[: width // 6] + "…",
    ]
    for k, line in enumerate(lines):
        pen.text((x, y + 13 * k), line, font=font, fill=(200, 0, 60) if k == len(lines) - 1 else (40, 40, 40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the tables")
    parser.add_argument("--sheet", type=Path, help="only draw the picture of all worlds to this file")
    chosen = parser.parse_args()
    if chosen.sheet:
        sheet(chosen.sheet)
        return
    finish("world_speed", measure(), write=chosen.write)


if __name__ == "__main__":
    main()
