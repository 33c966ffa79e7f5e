"""The linter's rules over whole sets: duplicates, leaks between training and test, one-sided answers, languages.

Bounded memory: texts and pictures are remembered as digests of 8 bytes in tables of 12 bytes a slot (`DigestTable`,
24 to 48 bytes an entry, being a quarter to half full; a dict of ints takes some 160), question kinds and their
answers in counters of fixed size. Among n digests of 8 bytes the chance of a single false duplicate is n^2 / 2 / 2^64:
3e-6 for 10 million.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations

from chiasm.data.lint.rules import declare
from chiasm.data.lint.sample import Picture, Sample, digest8, normalised

__all__ = ["Answers", "DigestTable", "Languages", "Seen", "script_of"]

declare(
    "C501",
    "duplicate-row",
    "warning",
    says="the same pictures and texts as an earlier row (white space and case aside)",
    example="a row twice in the file",
    remedy="remove one; for more weight use repeat_time, which says so",
)
declare(
    "C502",
    "duplicate-answer",
    "note",
    says="a question and answer about the same picture as in an earlier row",
    example='"What is it?" "A cat." about a.png in two rows',
    remedy="remove one of the two",
)
declare(
    "C503",
    "picture-twice",
    "note",
    says="the same file under another name",
    example="a.jpg and copy-of-a.jpg",
    remedy="keep one file, so that splits by name cannot tear them apart",
)
declare(
    "C504",
    "pictures-alike",
    "note",
    says="a picture that looks like an earlier one (with --decode)",
    example="the same photograph, resized",
    remedy="look at both; keep them in the same split",
)
declare(
    "C511",
    "leaked-row",
    "error",
    says="a question and answer that are in the test set too, about the same picture or about none",
    example="the row itself in --against",
    remedy="remove it from the training set",
)
declare(
    "C512",
    "leaked-picture",
    "error",
    says="a picture of the test set",
    example="test/1.jpg copied to train/77.jpg",
    remedy="remove its rows from the training set",
)
declare(
    "C513",
    "leaked-text",
    "warning",
    says="a long question and answer (12 words or more) of the test set, about another picture",
    example="a templated question with its full answer",
    remedy="look whether the test can be answered without its pictures",
)
declare(
    "C514",
    "leaked-look",
    "warning",
    says="a picture that looks like one of the test set (with --decode)",
    example="a test picture, resized",
    remedy="look at both, and remove the training row if they are the same",
)
declare(
    "C604",
    "one-answer",
    "warning",
    says="a kind of question (its first words) with the same short answer over 90 % of the time",
    example='"Is there a …": "yes", 97 %',
    remedy="balance the answers: the model need not look at the picture",
)
declare(
    "C605",
    "languages",
    "note",
    says="answers in more than one script, or in another one than their question",
    example="92 % Latin, 8 % Han",
    remedy="nothing, if that is meant",
)


class DigestTable:
    """Digest -> number of the row that had it first. Open addressing over two arrays: 8 bytes of key, 4 of number."""

    def __init__(self, slots: int = 1024) -> None:
        self._keys, self._rows = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))
        self._mask, self._used = slots - 1, 0

    def __len__(self) -> int:
        return self._used

    @property
    def nbytes(self) -> int:
        """Bytes of the two arrays."""
        return 12 * len(self._keys)

    def get(self, digest: int) -> int | None:
        """The row that had the digest first, None if none had."""
        slot = self._slot(digest)
        return self._rows[slot] if self._keys[slot] else None

    def add(self, digest: int, row: int) -> int | None:
        """Remember the digest (not 0) unless it is there; returns the row that had it first, None if it is new."""
        slot = self._slot(digest)
        if self._keys[slot]:
            return self._rows[slot]
        self._keys[slot], self._rows[slot] = digest, row
        self._used += 1
        if 2 * self._used > len(self._keys):
            self._grow()
        return None

    def _slot(self, digest: int) -> int:
        keys, mask = self._keys, self._mask
        slot = digest & mask
        while (key := keys[slot]) and key != digest:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        keys, rows = self._keys, self._rows
        slots = 2 * len(keys)
        self._keys, self._rows = array("Q", bytes(8 * slots)), array("I", bytes(4 * slots))
        self._mask = slots - 1
        for key, row in zip(keys, rows, strict=True):
            if key:
                slot = self._slot(key)
                self._keys[slot], self._rows[slot] = key, row


# Duplicates and leaks ----------------------------------------------------------------------------------------------


def _key(picture: Picture, source: object) -> str:
    """What a picture is for comparison: its content if known, else its name."""
    return str(picture.digest) if picture.digest else str(source)


def _shown(sample: Sample) -> str:
    """What a row shows, as one string: content of pictures, names of videos; "" if it shows nothing."""
    sources = [part.value for turn in sample.spoken for part in turn.of_kind("image")]
    films = [str(part.value) for turn in sample.spoken for part in turn.of_kind("video")]
    keys = [_key(*pair) for pair in zip(sample.pictures, sources, strict=True)]
    return "\n".join([*keys, *films])


_FLIPS = tuple([1 << b for b in range(64)] + [1 << a | 1 << b for a, b in combinations(range(64), 2)])
LOOK_BITS = 2
LONG_WORDS = 12


class Seen:
    """All that was seen of the texts and pictures of some sets.

    Args:
        where: says the place of a row's running number, for messages.
    """

    def __init__(self, where: Callable[[int], str]) -> None:
        self.where = where
        self.rows, self.pairs, self.texts = DigestTable(), DigestTable(), DigestTable()
        self.files, self.names, self.looks = DigestTable(), DigestTable(), DigestTable()

    def duplicates(self, sample: Sample, row: int) -> Iterator[tuple[str, str]]:
        """Take in a row and yield (code, message) for what was there before."""
        shown, pairs = _shown(sample), sample.exchanges
        whole = digest8(shown, *(f"{role}:{normalised(text)}" for _, role, text in sample.said))
        before = self.rows.add(whole, row)
        if before is not None:
            yield "C501", f"same as {self.where(before)}"
        for question, answer in pairs:
            first = self.pairs.add(digest8(shown, question, answer), row)
            if first is not None and first != row and before is None and shown:
                yield (
                    "C502",
                    f"{_short(question)} {_short(answer)} about the same picture at {self.where(first)}",
                )
        for picture in sample.pictures:
            yield from self._picture(picture, row)

    def take(self, sample: Sample, row: int) -> None:
        """Take in a row of the test set."""
        for _ in self.duplicates(sample, row):
            pass
        for question, answer in sample.exchanges:
            if _long(question, answer):
                self.texts.add(digest8(question, answer), row)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        tables = (self.rows, self.pairs, self.texts, self.files, self.names, self.looks)
        return sum(table.nbytes for table in tables)

    def _picture(self, picture: Picture, row: int) -> Iterator[tuple[str, str]]:
        if not picture.digest:
            return
        if (
            self.names.add(digest8(picture.name), row) is not None
            and self.files.get(picture.digest) is not None
        ):
            return  # one picture, several rows: as it should be
        first = self.files.add(picture.digest, row)
        if first is not None:
            if not picture.name.startswith("picture of "):  # bytes have no name that could differ
                yield "C503", f"{picture.name} is the picture of {self.where(first)} under another name"
            return
        if picture.looks:
            near = self.near(picture.looks)
            if near is not None:
                yield "C504", f"{picture.name} looks like the picture of {self.where(near)}"
            self.looks.add(picture.looks, row)

    def near(self, looks: int) -> int | None:
        """The first row whose picture differs in at most `LOOK_BITS` bits of the perceptual hash."""
        found = self.looks.get(looks) if looks else None
        if found is not None:
            return found
        return next(
            (row for flip in _FLIPS if looks ^ flip and (row := self.looks.get(looks ^ flip)) is not None),
            None,
        )

    def leaks(self, sample: Sample) -> Iterator[tuple[str, str]]:
        """(code, message) for what a training row shares with these sets."""
        shown = _shown(sample)
        for question, answer in sample.exchanges:
            same = self.pairs.get(digest8(shown, question, answer))
            if same is not None:
                yield "C511", f"{_short(question)} {_short(answer)} is in the test set: {self.where(same)}"
            elif _long(question, answer) and (other := self.texts.get(digest8(question, answer))) is not None:
                yield "C513", f"{_short(question)} {_short(answer)} is in the test set: {self.where(other)}"
        for picture in sample.pictures:
            if not picture.digest:
                continue
            same = self.files.get(picture.digest)
            if same is not None:
                yield "C512", f"{picture.name} is a picture of the test set: {self.where(same)}"
            elif picture.looks and (near := self.near(picture.looks)) is not None:
                yield "C514", f"{picture.name} looks like a picture of the test set: {self.where(near)}"


def _long(question: str, answer: str) -> bool:
    return len(question.split()) + len(answer.split()) >= LONG_WORDS


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


# Balance and languages -------------------------------------------------------------------------------------------


class Answers:
    """Answers by kind of question; a kind is the question's first words, numbers taken as one.

    At most `KINDS` kinds are followed, the first that come, each with its first `KEPT` different answers.
    """

    KINDS, KEPT, WORDS, LEAST, SHARE = 4096, 64, 4, 50, 0.9
    LONGEST = 40

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = {}
        self.totals: Counter[str] = Counter()

    def see(self, sample: Sample) -> None:
        """Take in the row's exchanges with short answers."""
        for question, answer in sample.exchanges:
            if not answer or len(answer) > self.LONGEST or not question:
                continue
            kind = " ".join(re.sub(r"\d+", "#", question).split()[: self.WORDS])[:80]
            counts = self.kinds.get(kind)
            if counts is None:
                if len(self.kinds) >= self.KINDS:
                    continue
                counts = self.kinds[kind] = Counter()
            self.totals[kind] += 1
            plain = answer.rstrip(".!")
            if plain in counts or len(counts) < self.KEPT:
                counts[plain] += 1

    def finish(self) -> Iterator[str]:
        """One message for each one-sided kind, the most frequent first."""
        for kind, total in self.totals.most_common():
            if total < self.LEAST:
                return
            answer, count = self.kinds[kind].most_common(1)[0]
            if count > self.SHARE * total:
                yield f"{_short(kind + ' …')}: {answer!r} in {count:,} of {total:,} answers ({count / total:.0%})"


_SCRIPTS = (
    ("Latin", re.compile(r"[A-Za-zÀ-ɏ]")),
    ("Han", re.compile(r"[\u3400-\u9fff]")),
    ("Kana", re.compile(r"[\u3040-\u30ff]")),
    ("Hangul", re.compile(r"[\uac00-\ud7af]")),
    ("Cyrillic", re.compile(r"[\u0400-\u04ff]")),
    ("Greek", re.compile(r"[\u0370-\u03ff]")),
    ("Arabic", re.compile(r"[\u0600-\u06ff]")),
    ("Hebrew", re.compile(r"[\u0590-\u05ff]")),
    ("Devanagari", re.compile(r"[\u0900-\u097f]")),
    ("Thai", re.compile(r"[\u0e00-\u0e7f]")),
)
_MARKUP = re.compile(r"<[^>]{1,40}>")


def script_of(text: str) -> str | None:
    """The script of most letters in the first 400 characters; None if there is none. Any kana make it Japanese."""
    head = _MARKUP.sub(" ", text[:400])
    if head.isascii():
        return "Latin" if any(c.isalpha() for c in head) else None
    counts = {name: len(pattern.findall(head)) for name, pattern in _SCRIPTS}
    if counts["Kana"]:
        return "Kana"
    name = max(counts, key=lambda script: counts[script])
    return name if counts[name] else None


class Languages:
    """Scripts of answers, and how often a question is answered in another one."""

    SHARE = 0.01

    def __init__(self) -> None:
        self.scripts: Counter[str] = Counter()
        self.other = self.both = 0

    def see(self, sample: Sample) -> None:
        """Take in the row's exchanges."""
        for question, answer in sample.exchanges:
            said = script_of(answer)
            if said is None:
                continue
            self.scripts[said] += 1
            asked = script_of(question)
            if asked is not None:
                self.both += 1
                self.other += asked != said

    def finish(self) -> Iterator[str]:
        """A message if there is a second script, and one if questions are answered in another."""
        total = sum(self.scripts.values())
        common = [(name, count) for name, count in self.scripts.most_common() if count > self.SHARE * total]
        if len(common) > 1:
            yield "answers are " + ", ".join(f"{count / total:.0%} {name}" for name, count in common)
        if self.both and self.other > self.SHARE * self.both:
            yield f"{self.other:,} of {self.both:,} questions are answered in another script"
