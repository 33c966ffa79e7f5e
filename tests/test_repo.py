"""Rules of the repository that no single module can check."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import chiasm

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

MAX_LINES = 700
MAX_TREE_BYTES = 30_000_000
# Core dependencies, by import name, and what comes along with typer.
CORE = {"PIL", "click", "numpy", "rich", "safetensors", "tokenizers", "torch", "typer"}
FORBIDDEN_ANYWHERE = {"pickle", "timm", "torchvision"}


def tracked_files() -> list[Path]:
    """Files under version control; in an unpacked archive, all that an archive holds."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        names = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        parts = ("src", "tests", "docs", "benchmarks", "examples", "reports")
        names = [path for part in parts for path in (ROOT / part).rglob("*")] + list(ROOT.glob("*.*"))
    return [path for path in names if path.is_file()]


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level package) of each absolute import in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").partition(".")[0]


def import_time_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that an import of the module runs: no function bodies, no type-checking blocks."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                yield from import_time_statements(node.body)
            yield from import_time_statements(node.orelse)
        elif isinstance(node, ast.Try):
            handled = [statement for handler in node.handlers for statement in handler.body]
            yield from import_time_statements([*node.body, *handled, *node.orelse, *node.finalbody])
        elif isinstance(node, ast.ClassDef | ast.With):
            yield from import_time_statements(node.body)
        else:
            yield node


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return result.stdout


def test_imports_point_downward():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_loads_no_torch_and_is_quick():
    code = (
        "import time, sys; start = time.process_time(); import chiasm; dir(chiasm)\n"
        "print(time.process_time() - start, *sorted(sys.modules))"
    )
    seconds, *modules = run_python(code).split()
    assert not {"torch", "numpy", "PIL", "typer", "transformers"} & set(modules)
    assert float(seconds) < 0.2


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_module_imports_only_what_it_may(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = CORE | set(sys.stdlib_module_names) | {"chiasm"}
    if path.name == "shapes.py" and path.parent.name == "chiasm":
        allowed |= {"jaxtyping"}  # guarded there, for everybody else
    at_import = ast.Module(body=list(import_time_statements(tree.body)), type_ignores=[])
    late = [f"{path.name}:{line}: {name}" for line, name in imported_names(at_import) if name not in allowed]
    assert not late, f"import these inside the function that needs them: {late}"
    banned = [
        f"{path.name}:{line}: {name}" for line, name in imported_names(tree) if name in FORBIDDEN_ANYWHERE
    ]
    assert not banned, f"these are never imported: {banned}"


def test_every_module_has_a_docstring():
    bare = [
        str(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not bare


def test_no_source_file_is_too_long():
    files = [path for path in tracked_files() if path.suffix == ".py"]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_no_file_names_a_path_of_one_machine():
    # Built from pieces, so that this file passes its own test.
    places = "|".join(["work", "root", "home", "Users", "mnt", "opt/" + "pypi"])
    pattern = re.compile(rf"(?<![\w.\-~/}})\]*])/(?:{places})/\w")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert not found


def test_tracked_tree_is_small():
    assert sum(path.stat().st_size for path in tracked_files()) <= MAX_TREE_BYTES


def test_no_extra_brings_torchvision():
    """Follow the requirements of every extra through what is installed here."""
    names = [Requirement(line) for line in PROJECT["dependencies"]]
    for lines in PROJECT["optional-dependencies"].values():
        names += [Requirement(line) for line in lines]
    seen: set[tuple[str, str]] = set()
    queue = [
        (requirement.name, extra) for requirement in names for extra in ["", *sorted(requirement.extras)]
    ]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that this environment does not have
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                queue += [(requirement.name, wanted) for wanted in ["", *sorted(requirement.extras)]]
    assert not {"torchvision", "timm"} & {name.lower() for name, _ in seen}


def test_tests_import_only_declared_packages():
    """What the tests import at module level is in the dev extra, so that a fresh environment collects them."""
    import_names = {"scikit-learn": "sklearn"}
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    names = [Requirement(line).name for line in lines]
    declared = CORE | {import_names.get(name, name.replace("-", "_")) for name in names}
    own = {"chiasm", "benchmarks", "tests", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
    own |= {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    allowed = declared | own | set(sys.stdlib_module_names) | {"packaging"}  # packaging comes with pytest
    missing = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        body = list(import_time_statements(ast.parse(path.read_text(encoding="utf-8")).body))
        names_used = imported_names(ast.Module(body=body, type_ignores=[]))
        missing += [f"{path.name}:{line}: {name}" for line, name in names_used if name not in allowed]
    assert not missing


def test_changelog_has_the_current_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(chiasm.__version__)}\b", text, re.MULTILINE)


def test_installed_version_is_the_source_version():
    assert metadata.version("chiasm") == chiasm.__version__


@pytest.mark.slow
def test_wheel_holds_types_and_assets(tmp_path):
    import zipfile

    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("chiasm-*.whl"))).namelist())
    package = ROOT / "src"
    expected = {
        str(path.relative_to(package))
        for path in tracked_files()
        if path.is_relative_to(package / "chiasm") and (path.suffix == ".py" or "assets" in path.parts)
    }
    assert expected | {"chiasm/py.typed"} <= names


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_content(command):
    ran = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
