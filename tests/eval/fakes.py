"""A world of coloured squares and answerers that need no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chiasm.model.chat import Reply
from chiasm.worlds import Sample, World

COLOURS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
NAMES = tuple(COLOURS)


class Squares(World):
    """ "What colour is it?" about plain squares; with `varied`, every third question is another one."""

    questions = ("What colour is it?", "Name the colour.")

    def __init__(self, split: str, *, family: str = "squares", size: int = 30, varied: bool = False) -> None:
        self.family = family
        super().__init__(split)
        self.size, self.varied = size, varied

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> Sample:
        i = self.checked(index)
        # "red" is twice as frequent as the others in training.
        name = NAMES[self.random(i).integers(3)] if self.split != "train" else NAMES[max(0, i % 4 - 1)]
        image = np.full((8, 8, 3), COLOURS[name], np.uint8)
        image[0, 0] = (i, 0, 0)  # every picture differs
        question = self.questions[1 if self.varied and i % 3 == 0 else 0]
        return Sample(image=image, question=question, answer=name, family=self.family, key=self.key(i))


def opener(**options: Any):
    def opened(family: str, split: str) -> Squares:
        return Squares(split, family=family, **options)

    return opened


class Sees:
    """Names the colour of the middle, is wrong about every `blind`-th shade, and remembers what it was asked."""

    def __init__(self, blind: int = 7, stop_after: int | None = None) -> None:
        self.blind, self.stop_after = blind, stop_after
        self.asked: list[str] = []
        self.batches: list[int] = []

    def answer(self, image: np.ndarray, question: str) -> str:
        middle = image[4, 4].astype(int)
        if self.blind and int(image[0, 0, 0]) % self.blind == 0:
            return "Blue."
        if middle.max() - middle.min() < 10:
            return "a grey"
        colour = NAMES[int(middle.argmax())]
        return f"The {colour.upper()}." if question == Squares.questions[0] else colour

    def batch(self, conversations: Sequence[Any], **options: Any) -> list[Reply]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        assert options == {"temperature": 0.0, "max_new_tokens": 8}
        self.batches.append(len(conversations))
        replies = []
        for turns in conversations:
            (turn,) = turns
            picture, text = turn["content"]
            self.asked.append(text["text"])
            answer = self.answer(np.asarray(picture["image"]), text["text"])
            replies.append(Reply(text=answer, token_ids=[1]))
        return replies


class Guesses(Sees):
    """Says the same whatever it is shown."""

    def answer(self, image: np.ndarray, question: str) -> str:
        return "green"
