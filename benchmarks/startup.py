"""How long `chiasm --help` and `import chiasm` take, each in a fresh interpreter, and that no torch is loaded.

Wall time is what a user waits for, and what other work on the machine lengthens; CPU time is beside it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import alternate, compare, finish

LIMIT = 400.0
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import chiasm": [sys.executable, "-c", "import chiasm"],
    "chiasm --help": [str(Path(sys.executable).with_name("chiasm")), "--help"],
}
ASKS = "import sys, chiasm, chiasm.cli.app; print('torch' in sys.modules)"


def run(command: list[str]) -> tuple[float, float]:
    """Wall and CPU milliseconds of a command that must succeed."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1e3, used * 1e3


def measure(repeats: int = 7) -> dict[str, Any]:
    """Two rows a command: wall and CPU time."""
    seen = alternate({name: lambda c=command: run(c) for name, command in COMMANDS.items()}, repeats)
    imports = subprocess.run(
        [sys.executable, "-c", ASKS], check=True, capture_output=True, text=True
    ).stdout.strip()
    rows = []
    for name, pairs in seen.items():
        wall, used = zip(*pairs, strict=True)
        row = compare(f"`{name}`, wall", None, list(wall))
        if name == "chiasm --help":
            row |= {"required": f"<= {LIMIT:g} ms", "ok": row["ours"]["median"] <= LIMIT}
        elif name == "import chiasm":
            row |= {"required": "no torch", "ok": imports == "False"}
        rows += [row, compare(f"`{name}`, CPU", None, list(used))]
    return {
        "rows": rows,
        "remark": f"torch loaded by the package and its command line: {'no' if imports == 'False' else 'YES'}.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    finish("startup", measure(), write=parser.parse_args().write)


if __name__ == "__main__":
    main()
