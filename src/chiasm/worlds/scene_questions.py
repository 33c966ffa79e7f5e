"""Questions about scenes, each planned before its scene is drawn so that answers are balanced.

A question begins with a *wish*: the answer that it shall have, drawn evenly from all answers of its kind. ``plan``
says what a scene must be like for that, ``ask`` finds the objects that fit in a finished scene and words the
question, or returns None where the scene does not serve. The answer therefore never depends on how often scenes
come out one way; the ground truth is still computed from the finished objects, never from the wish.

Objects are dicts {"shape", "colour", "size", "texture", "box"}; boxes are in pixels, later objects lie on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from chiasm.media.boxes import format_box, pixels_to_thousand
from chiasm.worlds.sprites import TEXTURES

__all__ = [
    "CONTAINERS",
    "FAMILIES",
    "NUMBERS",
    "Plan",
    "Wish",
    "ask",
    "caption",
    "plan",
    "refer",
    "relations",
    "with_article",
]

FAMILIES = ("attribute", "counting", "relation", "comparison", "existence", "grounding", "caption")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
SIZES = ("small", "large")
#: Shapes that another one can lie inside of.
CONTAINERS = ("square", "circle")
RELATIONS = ("left of", "right of", "above", "below", "inside", "overlapping")
_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
#: How much longer the one distance of two centres must be than the other for a direction to be clear.
_CLEAR = 1.2

Thing = dict[str, Any]
Wish = tuple[Any, ...]

#: Phrasings of every kind of question; the first one is canonical.
_WORDINGS: dict[str, tuple[str, ...]] = {
    "colour": ("What colour is the {a}?", "Which colour does the {a} have?"),
    "shape": ("What shape is the {a}?", "Which shape does the {a} have?"),
    "size": ("Is the {a} small or large?", "What size is the {a}?"),
    "texture": ("Is the {a} plain, striped, dotted or checked?", "What texture does the {a} have?"),
    "count": ("How many {a} are there?", "How many {a} do you see?", "Count the {a}."),
    "where": ("Where is the {a} relative to the {b}?", "Where does the {a} lie, seen from the {b}?"),
    "what": ("What is {r} the {a}?", "Which object is {r} the {a}?"),
    "is": ("Is the {a} {r} the {b}?",),
    "larger": ("Which is larger, the {a} or the {b}?", "Which of the two is larger: the {a} or the {b}?"),
    "more": ("Are there more {a} than {b}?",),
    "same": ("Do the {a} and the {b} have the same colour?",),
    "exists": ("Is there {a}?", "Does the picture show {a}?"),
    "ground": (
        "Please provide the bounding box coordinate of the region this sentence describes: <ref>{a}</ref>",
        "Where is the {a}? Answer with its box.",
        "Locate the {a}.",
    ),
    "caption": ("Describe the picture.", "What does the picture show?", "Write a caption."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a scene must be like.

    Attributes:
        count: number of objects.
        fixed: for the first objects, attributes that they must have.
        without: (attribute, values) that all *other* objects must not have.
        nested: object 1 lies inside object 0.
        partial: object 1 covers a part of object 0.
    """

    count: int
    fixed: tuple[dict[str, str], ...] = ()
    without: tuple[str, tuple[str, ...]] = ("", ())
    nested: bool = False
    partial: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question with its answer and what it is about.

    Attributes:
        question: as the user asks it.
        answer: the exact answer.
        kind: key of the wordings.
        about: indices of the objects that it names or asks for.
        facts: what else a checker needs (relation, attribute, value).
    """

    question: str
    answer: str
    kind: str
    about: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


# --- words ----------------------------------------------------------------------------------------------------


def with_article(name: str) -> str:
    """Put "a" or "an" before a name."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def name_of(thing: Thing, attributes: Sequence[str]) -> str:
    """Name an object by some of its attributes, adjectives in the usual order."""
    words = [thing[key] for key in ("size", "texture", "colour") if key in attributes]
    return " ".join([*words, thing["shape"] if "shape" in attributes else "object"])


_WAYS = (
    ("colour", "shape"),
    ("shape",),
    ("colour",),
    ("size", "colour", "shape"),
    ("size", "shape"),
    ("size", "colour"),
    ("texture", "colour", "shape"),
    ("texture", "shape"),
    ("texture", "colour"),
    ("size", "texture", "colour", "shape"),
    ("size", "texture", "shape"),
    ("size", "texture", "colour"),
)


def refer(objects: Sequence[Thing], k: int, without: str = "") -> str | None:
    """Return a name that fits object ``k`` alone and does not say its attribute ``without``; None if there is none."""
    for way in _WAYS:
        if without in way:
            continue
        mine = [objects[k][key] for key in way]
        if not any([thing[key] for key in way] == mine for n, thing in enumerate(objects) if n != k):
            return name_of(objects[k], way)
    return None


def caption(objects: Sequence[Thing], order: Sequence[int], tone: str) -> str:
    """Describe all objects in this order and the background in one phrase; a pair also by its relation."""
    names = [with_article(name_of(objects[k], ("size", "texture", "colour", "shape"))) for k in order]
    if len(names) == 2:
        known = relations(objects[order[0]]["box"], objects[order[1]]["box"])
        between = next((r for r in ("inside", *RELATIONS) if r in known), "and")
        listed = f"{names[0]} {between} {names[1]}"
    else:
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{listed} on a {tone} background"


def relations(a: Sequence[int], b: Sequence[int]) -> set[str]:
    """Return which of RELATIONS hold of box ``a`` towards box ``b``; directions only where one is clear."""
    if a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3]:
        return {"inside", "overlapping"}
    if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
        return {"overlapping"}
    dx, dy = abs(a[0] + a[2] - b[0] - b[2]), abs(a[1] + a[3] - b[1] - b[3])
    if a[2] <= b[0] and dx >= _CLEAR * dy:
        return {"left of"}
    if b[2] <= a[0] and dx >= _CLEAR * dy:
        return {"right of"}
    if a[3] <= b[1] and dy >= _CLEAR * dx:
        return {"above"}
    if b[3] <= a[1] and dy >= _CLEAR * dx:
        return {"below"}
    return set()


# --- wishes and plans -----------------------------------------------------------------------------------------


def _one(rng: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(rng.integers(len(values)))]


def wish(family: str, rng: np.random.Generator, pairs: Sequence[tuple[str, str]], most: int) -> Wish:
    """Draw what is asked and which answer it shall have."""
    values = {
        "colour": sorted({c for _, c in pairs}),
        "shape": sorted({s for s, _ in pairs}),
        "size": SIZES,
        "texture": TEXTURES,
    }
    yes = bool(rng.integers(2))
    if family == "attribute":
        key = _one(rng, tuple(values))
        return (key, _one(rng, values[key]))
    if family == "counting":
        key = _one(rng, ("all", "colour", "shape"))
        if key == "all":
            return (key, "", 1 + int(rng.integers(most)))
        return (key, _one(rng, values[key]), int(rng.integers(min(most, 4) + 1)))
    if family == "relation":
        kind = _one(rng, ("where", "is", "what"))
        if kind == "where":
            return (kind, _one(rng, RELATIONS[:5]))
        if kind == "is":
            return (kind, _one(rng, RELATIONS), yes)
        return (kind, _one(rng, RELATIONS[:4]))
    if family == "comparison":
        kind = _one(rng, ("larger", "more", "same"))
        if kind == "more":
            first, second = (values["colour"][int(k)] for k in rng.permutation(len(values["colour"]))[:2])
            return (kind, yes, first, second)
        return (kind, yes)
    if family == "existence":
        return ("exists", yes)
    return (family,)


def plan(
    family: str,
    wished: Wish,
    rng: np.random.Generator,
    pairs: Sequence[tuple[str, str]],
    least: int,
    most: int,
) -> Plan:
    """Say what a scene must be like for the wish to come true."""

    def count(low: int) -> int:
        low = max(low, least)
        return low + int(rng.integers(max(1, most - low + 1)))

    if family == "attribute":
        return Plan(count=count(1), fixed=({wished[0]: wished[1]},))
    if family == "counting":
        key, value, k = wished
        if key == "all":
            return Plan(count=k)
        return Plan(count=count(max(1, k)), fixed=({key: value},) * k, without=(key, (value,)))
    if family == "relation":
        # Of what others are asked about, as of what something lies inside of (see `_gives_away`).
        vessel = ({}, {"shape": _one(rng, CONTAINERS)})
        if wished[0] == "where":
            nested = wished[1] == "inside"
            return Plan(count=count(2), fixed=() if nested else vessel, nested=nested)
        if wished[0] == "is" and wished[2]:
            nested = wished[1] == "inside"
            return Plan(count=count(2), nested=nested, partial=wished[1] == "overlapping")
        if wished[0] == "is":
            crowd = count(2)  # a "no" about two objects of a picture in which others overlap
            other = crowd > 3 and bool(rng.integers(2))
            inside = wished[1] == "inside"
            return Plan(
                count=crowd,
                fixed=vessel if inside and not other else (),
                nested=other and inside,
                partial=other and not inside,
            )
        return Plan(count=2 + int(rng.integers(max(1, min(most, 4) - 1))))
    if family == "comparison":
        if wished[0] == "larger":
            return Plan(count=count(2), fixed=({"size": "large"}, {"size": "small"}))
        if wished[0] == "same":
            if not wished[1]:
                return Plan(count=count(2))
            colour = _one(rng, sorted({c for _, c in pairs}))
            return Plan(count=count(2), fixed=({"colour": colour},) * 2)
        _, yes, first, second = wished
        more = 1 + int(rng.integers(max(1, min(3, most - 1))))
        less = int(rng.integers(min(more, most - more + 1)))
        counts = (more, less) if yes else (less, more)
        fixed = tuple({"colour": c} for c, k in zip((first, second), counts, strict=True) for _ in range(k))
        return Plan(count=count(len(fixed)), fixed=fixed, without=("colour", (first, second)))
    return Plan(count=count(1))


# --- asking ---------------------------------------------------------------------------------------------------


def ask(
    family: str,
    wished: Wish,
    objects: Sequence[Thing],
    rng: np.random.Generator,
    *,
    pairs: Sequence[tuple[str, str]],
    size: tuple[int, int],
    tone: str,
    varied: bool,
) -> Asked | None:
    """Word a question whose true answer is the wished one.

    Args:
        family: one of FAMILIES.
        wished: from ``wish``.
        objects: the finished scene's.
        rng: chooses among the objects that serve, and the phrasing.
        pairs: (shape, colour) pairs of the split, for objects that are not there.
        size: (width, height) of the picture.
        tone: "light" or "dark", of the background.
        varied: any phrasing; else the canonical one.
    """

    def say(kind: str, **names: str) -> str:
        wordings = _WORDINGS[kind]
        return wordings[int(rng.integers(len(wordings))) if varied else 0].format(**names)

    order = [int(k) for k in rng.permutation(len(objects))]
    if family == "attribute":
        key, value = wished
        for k in order:
            name = refer(objects, k, without=key) if objects[k][key] == value else None
            if name is not None:
                return Asked(question=say(key, a=name), answer=value, kind=key, about=(k,))
        return None
    if family == "counting":
        key, value, want = wished
        found = [k for k, thing in enumerate(objects) if key == "all" or thing[key] == value]
        name = "objects" if key == "all" else _plural(value) if key == "shape" else f"{value} objects"
        if len(found) != want:
            return None
        facts = {"attribute": key, "value": value}
        return Asked(
            question=say("count", a=name), answer=NUMBERS[want], kind="count", about=tuple(found), facts=facts
        )
    if family == "relation":
        return _ask_relation(wished, objects, order, say)
    if family == "comparison":
        return _ask_comparison(wished, objects, order, say)
    if family == "existence":
        return _ask_existence(bool(wished[1]), objects, rng, pairs, say)
    if family == "grounding":
        for k in order:
            name = refer(objects, k)
            if name is not None:
                box = pixels_to_thousand(objects[k]["box"], *size)
                return Asked(
                    question=say("ground", a=name), answer=format_box(name, box), kind="ground", about=(k,)
                )
        return None
    order = order if varied else sorted(order, key=lambda k: tuple(objects[k]["box"]))
    return Asked(
        question=say("caption"),
        answer=caption(objects, order, tone),
        kind="caption",
        about=tuple(order),
    )


def _ask_relation(wished: Wish, objects: Sequence[Thing], order: list[int], say: Any) -> Asked | None:
    kind, relation = wished[0], wished[1]
    names = [refer(objects, k) for k in range(len(objects))]
    for a in order:
        for b in order:
            if a == b or names[b] is None or _gives_away(kind, relation, objects[a], objects[b]):
                continue
            known = relations(objects[a]["box"], objects[b]["box"])
            if kind == "what":
                if relation not in known or names[a] is None:
                    continue
                others = [relations(objects[k]["box"], objects[b]["box"]) for k in order if k not in (a, b)]
                # Whatever else lies on that side, clearly or not, would make the answer a matter of taste.
                if all(known and relation not in known for known in others):
                    question = say("what", r=relation, a=names[b])
                    return Asked(
                        question=question,
                        answer=names[a] or "",
                        kind=kind,
                        about=(a, b),
                        facts={"relation": relation},
                    )
                continue
            if names[a] is None:
                continue
            facts = {"relation": relation}
            if kind == "where" and relation in known:
                answer = relation.removesuffix(" of")
                return Asked(
                    question=say("where", a=names[a], b=names[b]),
                    answer=answer,
                    kind=kind,
                    about=(a, b),
                    facts=facts,
                )
            if kind == "is":
                no = (
                    _OPPOSITE.get(relation, "") in known
                    if relation in _OPPOSITE
                    else bool(known - {"overlapping"})
                )
                no = no and "inside" not in known
                if relation in known if wished[2] else no:
                    return Asked(
                        question=say("is", a=names[a], r=relation, b=names[b]),
                        answer="yes" if wished[2] else "no",
                        kind=kind,
                        about=(a, b),
                        facts=facts,
                    )
    return None


def _gives_away(kind: str, relation: str, a: Thing, b: Thing) -> bool:
    """Whether names alone would answer: only squares and circles have something inside, and never of their colour."""
    hidden = kind == "where" or (kind == "is" and relation in ("inside", "overlapping"))
    if not hidden:
        return False
    return a["colour"] == b["colour"] or (relation != "overlapping" and b["shape"] not in CONTAINERS)


def _ask_comparison(wished: Wish, objects: Sequence[Thing], order: list[int], say: Any) -> Asked | None:
    kind, yes = wished[0], wished[1]
    if kind == "more":
        first, second = wished[2:]
        found = [[k for k, thing in enumerate(objects) if thing["colour"] == c] for c in (first, second)]
        if (len(found[0]) > len(found[1])) != yes or len(found[0]) == len(found[1]):
            return None
        return Asked(
            question=say("more", a=f"{first} objects", b=f"{second} objects"),
            answer="yes" if yes else "no",
            kind=kind,
            about=(*found[0], *found[1]),
            facts={"values": [first, second]},
        )
    for a in order:
        for b in order:
            if a == b:
                continue
            without = "size" if kind == "larger" else "colour"
            first, second = refer(objects, a, without=without), refer(objects, b, without=without)
            if first is None or second is None:
                continue
            if kind == "larger":
                sizes = (objects[a]["size"], objects[b]["size"])
                if sizes != (("large", "small") if yes else ("small", "large")):
                    continue
                return Asked(
                    question=say("larger", a=first, b=second),
                    answer=first if yes else second,
                    kind=kind,
                    about=(a, b),
                )
            if (objects[a]["colour"] == objects[b]["colour"]) == yes:
                return Asked(
                    question=say("same", a=first, b=second),
                    answer="yes" if yes else "no",
                    kind=kind,
                    about=(a, b),
                )
    return None


def _ask_existence(
    yes: bool, objects: Sequence[Thing], rng: np.random.Generator, pairs: Sequence[tuple[str, str]], say: Any
) -> Asked:
    """Ask for a (shape, colour); a "no" prefers pairs of which the picture has the shape and the colour apart."""
    here = {(thing["shape"], thing["colour"]) for thing in objects}
    if yes:
        pair = _one(rng, sorted(here))
    else:
        away = [pair for pair in pairs if pair not in here]
        shapes, colours = {s for s, _ in here}, {c for _, c in here}
        near = [pair for pair in away if pair[0] in shapes and pair[1] in colours]
        half = [pair for pair in away if pair[0] in shapes or pair[1] in colours]
        pair = _one(rng, near or half or away)
    about = tuple(k for k, thing in enumerate(objects) if (thing["shape"], thing["colour"]) == pair)
    return Asked(
        question=say("exists", a=with_article(f"{pair[1]} {pair[0]}")),
        answer="yes" if yes else "no",
        kind="exists",
        about=about,
        facts={"shape": pair[0], "colour": pair[1]},
    )
