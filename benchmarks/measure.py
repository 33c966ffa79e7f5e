"""What the benchmarks share: process CPU time, summaries, the machine, results on disk, the table of the README.

CPU time is used because wall time on a machine with other work measures that work. Contenders take turns in one
process, so that a change of clock rate or of the neighbours meets all of them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE / "README.md"
RESULTS = HERE / "results"
SPEED_PAGE = HERE.parent / "docs" / "speed.md"
WORLDS_PAGE = HERE.parent / "docs" / "worlds.md"
SPEED = ("inference", "quantized", "peer_openvino", "batching", "attention")
ORDER = (
    *SPEED,
    *("preprocessing", "startup", "memory", "plan_training", "training", "loader", "parity", "world_speed"),
    "pvc_speed",
)
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

Summary = dict[str, Any]


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU seconds of this process (user and system, all threads) that one call takes."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def alternate(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: int = 1
) -> dict[str, list[Any]]:
    """What each call returns, `repeats` times, the calls taking turns; the first `warm_up` rounds do not count."""
    seen: dict[str, list[Any]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            value = call()
            if turn >= warm_up:
                seen[name].append(value)
    return seen


def summarize(values: list[float]) -> Summary:
    """min, median, max and all of them."""
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "all": [round(value, 6) for value in values],
    }


def compare(
    name: str,
    peer: list[float] | None,
    ours: list[float],
    *,
    unit: str = "ms",
    required: str = "",
    ok: bool | None = None,
    note: str = "",
) -> dict[str, Any]:
    """One row of the table. Values are costs (less is better); the ratio is that of the medians, peer / ours."""
    row: dict[str, Any] = {
        "name": name,
        "unit": unit,
        "ours": summarize(ours),
        "required": required,
        "note": note,
    }
    if peer is not None:
        row["peer"] = summarize(peer)
        row["ratio"] = row["peer"]["median"] / row["ours"]["median"]
    if ok is not None:
        row["ok"] = ok
    return row


def environment() -> dict[str, Any]:
    """The machine and the versions that a result belongs to."""
    versions = {}
    for package in ("torch", "transformers", "pillow", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **versions,
    }


def finish(name: str, result: dict[str, Any], *, write: bool) -> None:
    """Print a result's table; with `write`, keep it as results/<name>.json and rebuild the README's table."""
    result = {"environment": environment(), **result}
    print(table({name: result}))
    if not write:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    publish()


def publish() -> None:
    """Put the tables of kept results between the two marks of the README and of the pages about speed and worlds."""
    for page, names in {README: ORDER, SPEED_PAGE: SPEED, WORLDS_PAGE: ("world_speed",)}.items():
        text = page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        page.write_text(f"{head}{BEGIN}\n{table(kept_results(names))}\n{END}{tail}", encoding="utf-8")


def kept_results(names: Sequence[str]) -> dict[str, Any]:
    """The kept results among these, in order."""
    return {
        name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in names
        if (RESULTS / f"{name}.json").exists()
    }


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """Markdown: one table of all results, under it where and with what each was measured."""
    lines = [
        "| what | peer | Chiasm | ratio | required |",
        "|---|---|---|---|---|",
    ]
    for result in results.values():
        for row in result["rows"]:
            ratio = f"**{row['ratio']:.2f}x**" if "ratio" in row else ""
            peer = _cell(row["peer"], row["unit"]) if "peer" in row else ""
            name = row["name"] + (f" ({row['note']})" if row["note"] else "")
            failed = "" if row.get("ok", True) else " (not met)"
            lines.append(
                f"| {name} | {peer} | {_cell(row['ours'], row['unit'])} | {ratio} | {row['required']}{failed} |"
            )
    lines.append("")
    for name, result in results.items():
        e = result["environment"]
        load = f", load average {e['load'][0]}" if e.get("load") else ""
        repeats = sorted({len(row["ours"]["all"]) for row in result["rows"]})
        lines.append(
            f"- `{name}.py`: {e['date']}, {e['cpu']} ({e['cores']} cores{load}), Python {e['python']}, torch "
            f"{e['torch']}, transformers {e['transformers']}, Pillow {e['pillow']}; repeats: "
            f"{', '.join(map(str, repeats))}. {result.get('remark', '')}".rstrip()
        )
    return "\n".join(lines)


def _cell(summary: Summary, unit: str) -> str:
    low, middle, high = (summary[key] for key in ("min", "median", "max"))
    if 0 < middle < 0.005:
        return f"{middle:.1e} {unit}".rstrip()
    digits = 0 if middle >= 1000 else 1 if middle >= 10 else 2
    spread = f" [{low:,.{digits}f}–{high:,.{digits}f}]" if len(summary["all"]) > 1 else ""
    return f"{middle:,.{digits}f} {unit}{spread}".rstrip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    facts = dict(
        (part.strip() for part in line.split(":", 1))
        for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        if ":" in line
    )
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = [flag for flag in known if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} with {', '.join(has)}"
