"""The README tells the truth: its code blocks run, in order, as a reader would paste them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from readme_blocks import Block, blocks

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BLOCKS = blocks(README.read_text(encoding="utf-8")) if README.exists() else []
QUICK = [block for block in BLOCKS if not block.installs]
INSTALLING = [block for block in BLOCKS if block.installs]


def run(block: Block, folder: Path, *, timeout: float) -> None:
    """Run a block as a script in ``folder``; its failure shows the block's line and both streams."""
    tools = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    environment.pop("PYTHONPATH", None)
    shell = shutil.which("bash") or "sh"
    command = (
        [sys.executable, "-c", block.code] if block.language == "python" else [shell, "-euc", block.code]
    )
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    story = f"README.md:{block.line}\n{block.code}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"
    assert result.returncode == 0, story


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A scratch folder that looks like a checkout: what blocks write stays here."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("examples", "benchmarks", "src/chiasm/assets/demo"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("block", QUICK, ids=lambda block: f"line{block.line}")
def test_readme_block_runs(block, folder):
    run(block, folder, timeout=110)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("block", INSTALLING, ids=lambda block: f"line{block.line}")
def test_readme_install_block_runs(block, tmp_path):
    """In a fresh clone; the lines that would fetch it from elsewhere and enter it are left out."""
    clone = tmp_path / "chiasm"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    kept = [line for line in block.code.splitlines() if not line.lstrip().startswith(("git clone", "cd "))]
    run(Block(language="bash", code="\n".join(kept), line=block.line), clone, timeout=2300)


SAMPLE = """
# Page
```python
x = 1
```
text
<!-- no-test: needs a camera -->

```bash
chiasm chat
```
```console
$ chiasm list \\
> --json
{"a": 1}
$ chiasm doctor
fine
```
~~~text
not code
~~~
- item
  ```sh title="install"
  make demo
  ```
````markdown
```python
quoted
```
````
```bash
python -m pip install chiasm
```
"""


def test_blocks_of_a_page():
    found = blocks(SAMPLE)
    assert [(block.language, block.code, block.installs) for block in found] == [
        ("python", "x = 1", False),
        ("bash", "chiasm list \\\n--json\nchiasm doctor", False),
        ("bash", "make demo", True),
        ("bash", "python -m pip install chiasm", True),
    ]
    assert found[0].line == 3


@pytest.mark.parametrize(
    "code", ["make test", "pip install x", ".venv/bin/pip install x", "cd a && make", "uv pip install x"]
)
def test_installing_blocks_are_recognised(code):
    assert Block(language="bash", code=code, line=1).installs


@pytest.mark.parametrize("code", ["chiasm chat a.jpg 'make a list'", "chiasm doctor", "echo remake it"])
def test_other_blocks_are_quick(code):
    assert not Block(language="bash", code=code, line=1).installs


@pytest.mark.parametrize("page", ["```python\nx = 1", "<!-- no-test: -->\n```bash\nls\n```"])
def test_broken_pages_are_refused(page):
    with pytest.raises(ValueError, match=r"line [12]:"):
        blocks(page)


def test_a_failing_block_fails(tmp_path):
    with pytest.raises(AssertionError, match=r"README.md:7"):
        run(Block(language="bash", code="echo said; false; echo not reached", line=7), tmp_path, timeout=20)
    run(
        Block(language="python", code="import chiasm; print(chiasm.__version__)", line=1),
        tmp_path,
        timeout=20,
    )
