"""Ask about a picture: python examples/chat.py [MODEL]."""

import sys
from importlib.resources import files

import chiasm

picture = files("chiasm") / "assets" / "demo" / "words-0.png"
model = chiasm.load(sys.argv[1] if len(sys.argv) > 1 else "chiasm-mini")

reply = model.chat("What word is written?", images=[picture], max_new_tokens=16)
print(reply.text, reply.finish, reply.usage)

# The same answer as it is written. The picture is not encoded again: its features are remembered by content.
for piece in model.stream("What word is written?", images=[picture], max_new_tokens=16):
    print(piece, end="", flush=True)
print()

# A second turn. Messages are plain data; a picture may be a path, a URL, bytes, a PIL image or an array.
messages = [
    {
        "role": "user",
        "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What word is written?"}],
    },
    {"role": "assistant", "content": reply.text},
    {"role": "user", "content": "How many letters has it?"},
]
print(model.chat(messages, max_new_tokens=16, temperature=0.7, top_p=0.9, seed=1).text)
