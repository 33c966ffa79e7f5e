"""Many conversations at once: python examples/batch.py [MODEL]."""

import json
import sys
from importlib.resources import files

import chiasm

folder = files("chiasm") / "assets" / "demo"
entries = json.loads((folder / "demo.json").read_text(encoding="utf-8"))["pictures"]
model = chiasm.load(sys.argv[1] if len(sys.argv) > 1 else "chiasm-mini")

conversations = [
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": folder / entry["picture"]},
                {"type": "text", "text": entry["question"]},
            ],
        }
    ]
    for entry in entries
]
# Prompts of different lengths are read as one row, without padding.
for entry, reply in zip(entries, model.batch(conversations, max_new_tokens=16), strict=True):
    print(f"{entry['picture']:15} {entry['expected']:10} {reply.text}")

# What the model reads: ids with the picture's rows in their places, and the picture itself as uint8 tiles.
inputs = model.inputs(conversations[0])
print(len(inputs.token_ids), "tokens,", tuple(inputs.tiles.shape), "tiles,", inputs.sequence.spans)
print(model.logits(inputs, positions=[-1]).shape, "logits of the last position")
