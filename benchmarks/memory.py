"""What loading a random bf16 checkpoint of about 1 GB costs in anonymous memory, in a process of its own.

The checkpoint and the meter are those of `tests/checkpoint/test_memory.py`, which also shows that the meter sees a
careless load. Linux only (it reads /proc/self/status).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import HERE, compare, finish

sys.path.insert(0, str(HERE.parent))  # `tests` is found beside this folder

from tests.checkpoint.test_memory import LIMIT, probe, write_large


def measure(*, layers: int = 24, vocab: int = 64_000) -> dict[str, Any]:
    """One row: peak minus baseline, in checkpoint sizes."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        written, _ = write_large(model, "hf", layers, vocab)
        found = probe(model)
    share = found["peak"] / written.bytes
    row = compare(
        f"loading {written.bytes / 1e9:.2f} GB: peak anonymous memory minus baseline",
        None,
        [share],
        unit="x its bytes",
        required=f"<= {LIMIT}x",
        ok=share <= LIMIT,
    )
    return {"rows": [row], "remark": "Layout `hf`, sharded, q/k/v and gate/up fused on the way."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    finish("memory", measure(), write=parser.parse_args().write)


if __name__ == "__main__":
    main()
