"""The contact sheet of ``chiasm demo``: one HTML page with pictures, questions, expected and given answers.

Nothing is loaded from elsewhere: pictures are data URLs, there is no script. Light and dark follow the reader's
system. Small pictures are enlarged without smoothing, so that one sees what the model saw.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from chiasm import __version__
from chiasm.cli.demo import Answered, summary

__all__ = ["contact_sheet", "score_rows"]

FAMILIES = {
    "words": ("Reading", "words and fonts that training never showed"),
    "counting": ("Counting", "shapes in colours that never met in training"),
    "fashion": ("Clothes", "Fashion-MNIST, test split"),
    "photograph": ("Photographs", "not what the model was trained for"),
}

TITLES = {
    "cifar10": "Small photographs (CIFAR-10)",
    "fashion": "Clothes (Fashion-MNIST)",
    "words": "Reading a word",
    "counting": "Counting",
}
"""What the evaluation's families are called here."""

CONTROLS = {
    "majority": "always the most frequent",
    "blank": "blank picture",
    "shuffled": "another picture",
    "pixels": "linear on pixels",
}
"""What the evaluation's controls are called here."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1d1c1a; --soft: #6d6a64; --line: #e2dfd8; --well: #efede7;
  --good: #1a7f4b; --bad: #b3382c; --ood: #8a5a00; --ood-back: #fbeecb; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161615; --card: #201f1e; --ink: #ecebe8; --soft: #a19e97; --line: #34322f; --well: #191817;
  --good: #5fce94; --bad: #f08a7d; --ood: #f2c766; --ood-back: #3b3018; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 28px; }
header { display: flex; flex-wrap: wrap; align-items: flex-end; justify-content: space-between; gap: 12px 32px; }
h1 { margin: 0; font-size: 27px; font-weight: 650; letter-spacing: -0.015em; }
header p { margin: 2px 0 0; color: var(--soft); max-width: 60ch; }
.tally { display: flex; gap: 28px; text-align: right; }
.tally b { display: block; font-size: 27px; font-weight: 650; line-height: 1.15; font-variant-numeric: tabular-nums; }
.tally span { color: var(--soft); font-size: 13px; }
.groups { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 26px 32px; margin-top: 28px; }
h2 { margin: 0; font-size: 15px; font-weight: 650; }
h2 small { font-weight: 400; color: var(--soft); font-size: 13px; margin-left: 6px; }
.cards { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin-top: 10px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  display: flex; flex-direction: column; }
.well { background: var(--well); aspect-ratio: 1; display: flex; align-items: center; justify-content: center;
  position: relative; }
.well img { width: 100%; height: 100%; object-fit: contain; display: block; }
.well img.small { image-rendering: pixelated; }
.badge { position: absolute; left: 8px; top: 8px; padding: 1px 8px; border-radius: 99px; font-size: 11.5px;
  font-weight: 600; color: var(--ood); background: var(--ood-back); }
figcaption { padding: 9px 11px 11px; }
.asked { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
.answer { font-size: 16px; font-weight: 620; margin-top: 3px; overflow-wrap: anywhere; }
.right .answer { color: var(--good); }
.wrong .answer { color: var(--bad); }
.expected { font-size: 12.5px; color: var(--soft); }
.expected b { font-weight: 600; color: var(--ink); }
section.scores { margin-top: 30px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 8px; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); font-size: 13px; }
th:first-child, td:first-child { text-align: left; }
td b { font-weight: 650; }
footer { margin-top: 26px; padding-top: 12px; border-top: 1px solid var(--line); color: var(--soft); font-size: 12px; }
footer ul { margin: 4px 0 0; padding-left: 18px; }
@media (max-width: 820px) { .groups { grid-template-columns: 1fr; } .tally { text-align: left; } }
@media (max-width: 480px) { main { padding: 22px 14px; } .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
""".strip()


def contact_sheet(
    name: str, answers: Sequence[Answered], pictures: Sequence[bytes], results: Mapping[str, Any]
) -> str:
    """The page.

    Args:
        name: of the model.
        answers: in the order of the list.
        pictures: the encoded files, one an answer.
        results: what `chiasm eval` wrote for the model card; its scores become a table. {} for none.
    """
    groups = "\n".join(
        _group(
            family, [(a, p) for a, p in zip(answers, pictures, strict=True) if a.question.family == family]
        )
        for family in dict.fromkeys(answered.question.family for answered in answers)
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(name)}: {_text(summary(list(answers)))}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<header>
<div>
<h1>What {_text(name)} sees</h1>
<p>Pictures chosen before chiasm-mini was trained, and held out from it. Greedy answers, as they came.</p>
</div>
<div class="tally">{_tally(answers)}</div>
</header>
<div class="groups">
{groups}
</div>
{_scores(results)}
<footer>
Chiasm {_text(__version__)}. Pictures:
<ul>
{_sources(answers)}
</ul>
</footer>
</main>
</body>
</html>
"""


def _tally(answers: Sequence[Answered]) -> str:
    out = []
    for title, outside in (("held-out right", False), ("out of domain right", True)):
        group = [answered for answered in answers if answered.question.out_of_domain is outside]
        if group:
            out.append(f"<div><b>{sum(a.right for a in group)} / {len(group)}</b><span>{title}</span></div>")
    return "".join(out)


def _group(family: str, entries: Sequence[tuple[Answered, bytes]]) -> str:
    title, meaning = FAMILIES.get(family, (family, ""))
    cards = "\n".join(_card(answered, picture) for answered, picture in entries)
    return f"""<section>
<h2>{_text(title)}<small>{_text(meaning)}</small></h2>
<div class="cards">
{cards}
</div>
</section>"""


def _card(answered: Answered, picture: bytes) -> str:
    question = answered.question
    kind = "image/png" if question.picture.endswith(".png") else "image/jpeg"
    small = ' class="small"' if kind == "image/png" else ""
    data = base64.b64encode(picture).decode("ascii")
    badge = '<span class="badge">out of domain</span>' if question.out_of_domain else ""
    mark, state = ("✓", "right") if answered.right else ("✗", "wrong")
    expected = "as expected" if answered.right else f"expected <b>{_text(question.expected)}</b>"
    return f"""<figure class="{state}">
<div class="well"><img{small} src="data:{kind};base64,{data}" alt="{_text(question.expected)}">{badge}</div>
<figcaption>
<div class="asked">{_text(question.question)}</div>
<div class="answer">{mark} {_text(_short(answered.answer)) or "(nothing)"}</div>
<div class="expected">{expected}</div>
</figcaption>
</figure>"""


def _short(text: str, limit: int = 80) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def score_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The model card's scores as a table with its header; [] where there are none.

    A row is family, items, the model's accuracy with its interval, then each control's accuracy; all in per cent.
    """
    families = results.get("families")
    if not isinstance(families, Mapping) or not families:
        return []
    try:
        controls = list(dict.fromkeys(name for family in families.values() for name in family["controls"]))
        rows = [["family", "items", "model, 95 % interval", *(CONTROLS.get(name, name) for name in controls)]]
        for name, family in families.items():
            score, beside = family["score"], family["controls"]
            low, high = score["interval"]
            cells = [f"{100 * beside[c]['accuracy']:.1f}" if c in beside else "" for c in controls]
            own = f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
            rows.append([TITLES.get(name, str(name)), f"{score['n']:,}", own, *cells])
    except (KeyError, TypeError, ValueError, AttributeError):
        return []  # results of another version: the sheet is as good without
    return rows


def _scores(results: Mapping[str, Any]) -> str:
    rows = score_rows(results)
    if not rows:
        return ""
    head = "".join(f"<th>{_text(name)}</th>" for name in rows[0])
    body = "\n".join(f"<tr>{''.join(_cell(n, cell) for n, cell in enumerate(row))}</tr>" for row in rows[1:])
    return f"""<section class="scores">
<h2>Right answers in per cent<small>test splits, beside the controls; from the model card</small></h2>
<div class="scroll"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>
</section>"""


def _cell(column: int, text: str) -> str:
    return f"<td><b>{_text(text)}</b></td>" if column == 2 else f"<td>{_text(text)}</td>"


def _sources(answers: Sequence[Answered]) -> str:
    named: dict[tuple[str, str], list[str]] = {}
    for answered in answers:
        question = answered.question
        named.setdefault((question.source, question.licence), []).append(question.picture)
    return "\n".join(
        f"<li>{_text(', '.join(pictures))}: {_text(source)}; {_text(licence)}</li>"
        for (source, licence), pictures in named.items()
    )


def _text(value: str) -> str:
    return html.escape(str(value), quote=True)
