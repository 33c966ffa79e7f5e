"""64 ragged requests: through the queue, one by one, and through transformers' `generate` on a left-padded batch.

Random weights in the shape of InternVL2.5-1B, bf16, one thread, greedy, all models sharing every weight in memory (see
`inference.py`). Prompts are text of 8 to 150 tokens, answers 4 to 48, both drawn evenly. The peer pads every prompt
to the longest and writes until the longest answer has ended, as `generate` does; what is counted are the tokens that
were asked for. Prompts are fresh in every turn and no prefix is remembered. Costs are CPU milliseconds a token of an
answer, reading the prompts included.

Run `python benchmarks/batching.py` to see the table, with `--write` to publish it; `--toy` tries the script out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from inference import Case, build_ours, build_theirs, full, toy
from measure import alternate, compare, finish
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch import Tensor, nn

from chiasm.data.layout import LayoutSpec
from chiasm.data.sequence import Sequence
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel, ModelInputs
from chiasm.model.prefix import PrefixCache
from chiasm.text.tokenizer import Tokenizer

PROMPTS, ANSWERS = (8, 150), (4, 48)


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked in one turn: prompts, and how many tokens each answer has."""

    prompts: list[Tensor]
    limits: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.limits)

    @classmethod
    def draw(cls, case: Case, seed: int, requests: int) -> Work:
        """Random prompts and limits; smaller ones for the toy."""
        generator = torch.Generator().manual_seed(seed)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        shrink = max(1, 290 // case.prompt)
        longest = max(PROMPTS[1] // shrink, PROMPTS[0] + 1), max(ANSWERS[1] // shrink, ANSWERS[0] + 1)
        lengths = [between(PROMPTS[0], longest[0]) for _ in range(requests)]
        words = case.config.language.vocab_size - 1
        return cls(
            [torch.randint(0, words, (n,), generator=generator) for n in lengths],
            [between(ANSWERS[0], longest[1]) for _ in lengths],
        )


def build_chat(case: Case, ours: CausalVLM) -> ChatModel:
    """Our model with a tokenizer that spells every id, and stops at none that random weights would write."""
    vocabulary = {"<|im_end|>": 0} | {f"w{n} ": n for n in range(1, case.config.language.vocab_size)}
    tokenizer = Tokenizer(Backend(models.WordLevel(vocabulary, unk_token="w1 ")), {"eos_token": None})
    spec = LayoutSpec(
        tokenizer=tokenizer,
        template="chatml",  # type: ignore[arg-type]
        tiles=case.config.tiles,
        tokens_per_tile=case.config.tokens_per_tile,
    )
    model = ChatModel(ours, spec, prefixes=PrefixCache(0))
    model.stop_ids = ()
    return model


def inputs(ids_T: Tensor, side: int) -> ModelInputs:
    """A prompt that is laid out."""
    return ModelInputs(
        ids_T, torch.zeros(0, 3, side, side, dtype=torch.uint8), Sequence.of_text(ids_T.tolist())
    )


def run_queue(model: ChatModel, work: Work) -> list[list[int]]:
    """All requests through one queue."""
    queue, side = model.queue(), model.spec.tiles.image_size
    tickets = [
        queue.submit(inputs(ids_T, side), max_new_tokens=limit)
        for ids_T, limit in zip(work.prompts, work.limits, strict=True)
    ]
    written = {piece.ticket: piece.reply.token_ids for piece in queue if piece.reply is not None}
    return [written[ticket] for ticket in tickets]


def run_alone(model: ChatModel, work: Work) -> list[list[int]]:
    """One request after the other."""
    out = []
    for ids_T, limit in zip(work.prompts, work.limits, strict=True):
        out += run_queue(model, Work([ids_T], [limit]))
    return out


@torch.inference_mode()
def run_theirs(model: Any, work: Work) -> list[list[int]]:
    """transformers on a batch padded on the left, cut to what was asked for."""
    longest = max(len(ids_T) for ids_T in work.prompts)
    ids_NT = torch.zeros(len(work.prompts), longest, dtype=torch.int64)
    mask_NT = torch.zeros_like(ids_NT)
    for n, ids_T in enumerate(work.prompts):
        ids_NT[n, longest - len(ids_T) :] = ids_T
        mask_NT[n, longest - len(ids_T) :] = 1
    written_NT = model.generate(
        input_ids=ids_NT, attention_mask=mask_NT, do_sample=False, max_new_tokens=max(work.limits)
    )
    return [row[longest:][:limit].tolist() for row, limit in zip(written_NT, work.limits, strict=True)]


def measure(case: Case, *, requests: int = 64, repeats: int = 2) -> dict[str, Any]:
    """Both rows of the table."""
    torch.set_num_threads(1)
    ours = build_ours(case)
    theirs: nn.Module = build_theirs(case, ours)
    chat = build_chat(case, ours)
    turns: dict[str, int] = {}
    equal: dict[int, dict[str, list[list[int]]]] = {}

    def cost(name: str, run: Callable[[Any, Work], list[list[int]]], model: Any) -> Callable[[], float]:
        def call() -> float:
            turns[name] = turns.get(name, 0) + 1
            work = Work.draw(case, turns[name], requests)
            begin = time.process_time()
            written = run(model, work)
            seconds = time.process_time() - begin
            assert [len(ids) for ids in written] == work.limits
            equal.setdefault(turns[name], {})[name] = written
            return seconds * 1e3 / work.tokens

        return call

    seen = alternate(
        {
            "theirs": cost("theirs", run_theirs, theirs),
            "alone": cost("alone", run_alone, chat),
            "queue": cost("queue", run_queue, chat),
        },
        repeats,
        warm_up=0,  # a turn takes minutes
    )
    same = [_begin_alike(run["queue"], run[other]) for run in equal.values() for other in ("alone", "theirs")]
    note = f"answers begin alike: {min(same):.0%} or more of their first tokens"
    return {
        "rows": [
            compare(
                f"{requests} ragged requests, a token, against one by one",
                seen["alone"],
                seen["queue"],
                note=note,
            ),
            compare(
                f"{requests} ragged requests, a token, against a left-padded batch",
                seen["theirs"],
                seen["queue"],
            ),
        ],
        "remark": "Peers: our own queue with one request at a time; "
        "`InternVLForConditionalGeneration.generate` on the padded batch. CPU time, one thread.",
        "alike": min(same),
    }


def _begin_alike(a: list[list[int]], b: list[list[int]]) -> float:
    """Share of answers whose first tokens agree."""
    return sum(x[0] == y[0] for x, y in zip(a, b, strict=True)) / len(a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the result and rebuild the README's table")
    parser.add_argument("--layers", type=int, default=24, help="of the decoder; fewer for a quick look")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--toy", action="store_true", help="a tiny model: tries the script out")
    args = parser.parse_args()
    if args.write and (args.toy or args.layers != 24 or args.repeats < 2):
        parser.error("only the full protocol is published: leave out --toy, --layers and --repeats")
    case = toy() if args.toy else full(layers=args.layers, vision_layers=1)
    finish("batching", measure(case, requests=8 if args.toy else 64, repeats=args.repeats), write=args.write)


if __name__ == "__main__":
    main()
