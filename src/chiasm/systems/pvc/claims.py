"""PVC's claims in miniature: what is said of repeats, of clips, of one model for both, and what would refute it.

Source: PVC (2412.09613); fact sheet, section 7, claims M1 to M3. The numbers of the paper's ablations could not be
read, so all effect sizes are expectations of ours, tuned on dev splits with seeds from 100 as far as a claim does not
say otherwise, and fixed before any confirmation run (docs/claims.md). Tuned was with one seed, and arms b and c of M1
with K = 1 only. The exact facts (M4) are tests of the suite.

Rig: pages of sixteen handwritten digits, 32 x 32 pixels, and clips of eight frames in which a square moves over such a
page; encoder 64 x 2 layers, the last one temporal, decoder 64 x 2 layers, about 0.26 million parameters. A frame is
K = 4 tokens, each of which passes four numbers and noise of a tenth of their size. That is 13 bits, as many as its four
digits have: what a small model reads through one frame is a part of the page. What the arms do is in `rig_runs`.
"""

from __future__ import annotations

from chiasm.lab.claim import Arm, Claim, Experiment, Gate
from chiasm.systems.pvc import rig_runs

__all__ = ["EXPERIMENTS"]

OURS = "our question: the paper gives no comparison that could be read"
TOY = {
    "vision_width": 16,
    "vision_layers": 2,
    "temporal_layers": 1,
    "width": 16,
    "layers": 1,
    "ffn": 16,
    "steps": 2,
    "batch": 4,
    "items": 12,
    "count": 6,
}
"""Sizes at which every mechanism runs and nothing is learned."""


def _still(
    name: str, what: str, tokens: int, repeats: int, timed: bool, attention: bool, noisy: bool = True
) -> Arm:
    settings = {"tokens": tokens, "repeats": repeats, "timed": timed, "attention": attention, "noisy": noisy}
    return Arm(name=name, what=what, settings=settings)


CEILING = Gate(side="e:digits", at_least=0.8)

STATIC = Experiment(
    id="static_repeats",
    about="M1. A page of sixteen digits is read through K = 4 tokens, through four repeats of as many, or at once "
    "through 16. Pages, steps and parameters are equal (within 2 %, filled up in the encoder's feed-forwards); "
    "tokens and compute are not: a 4, e 16 tokens of one pass, b, c, d 16 tokens of four passes of the last layer. "
    "Without the time (b) repeats are equal but for the noise on their tokens, which the arms called quiet do not "
    "have.",
    run=rig_runs.static_repeats,
    arms=(
        _still("a", "one frame, K tokens", 4, 1, False, False),
        _still("b", "four repeats that see one another and do not know the time", 4, 4, False, True),
        _still("c", "four repeats that know the time and do not see one another", 4, 4, True, False),
        _still("d", "PVC: four repeats that know the time and see one another", 4, 4, True, True),
        _still("e", "one frame, 4 K tokens (finer unshuffle)", 16, 1, False, False),
        _still("a_quiet", "a without noise", 4, 1, False, False, noisy=False),
        _still("b_quiet", "b without noise", 4, 4, False, True, noisy=False),
    ),
    claims=(
        Claim(
            id="repeats_detail",
            statement="Four repeats of a page read more of it than one frame with as many tokens each.",
            source="2412.09613, static video of four frames; comparison and effect size ours",
            kind="superior",
            compare=("a:digits", "d:digits"),
            delta=0.2,
            gates=(CEILING,),
        ),
        Claim(
            id="repeats_match",
            statement="Four repeats of K tokens read as much as one frame of 4 K tokens.",
            source="2412.09613 (no loss on images at equal tokens); margin ours",
            kind="noninferior",
            compare=("e:digits", "d:digits"),
            margin=0.05,
            gates=(CEILING,),
        ),
        Claim(
            id="repeats_not_noise",
            statement="What repeats add is not an average over noise: without the time they read less.",
            source=OURS,
            kind="superior",
            compare=("b:digits", "d:digits"),
            delta=0.15,
            gates=(CEILING,),
        ),
        Claim(
            id="repeats_attention",
            statement="Repeats that see one another read more than repeats that only know the time.",
            source="2412.09613 (progressive encoding); effect size ours",
            kind="superior",
            compare=("c:digits", "d:digits"),
            delta=0.03,
            gates=(CEILING,),
        ),
        Claim(
            id="repeats_time",
            statement="Repeats that only know the time read more than one frame.",
            source=OURS,
            kind="superior",
            compare=("a:digits", "c:digits"),
            delta=0.05,
            gates=(CEILING,),
        ),
        Claim(
            id="symmetry_tokens",
            statement="Without the time all repeats of a page say the same, to rounding, also after training.",
            source="fact sheet, section 2.2 (provable)",
            kind="exact",
            compare=("b_quiet:spread",),
            margin=1e-4,
            gates=(Gate(side="d:spread", at_least=0.1),),
        ),
        Claim(
            id="symmetry_reading",
            statement="Without time and noise four repeats read as much as one frame. The margin is not tuned.",
            source="fact sheet, section 7 (arm b)",
            kind="equivalent",
            compare=("a_quiet:digits", "b_quiet:digits"),
            margin=0.05,
            gates=(CEILING, Gate(side="a_quiet:digits", at_least=0.2)),
        ),
    ),
    budgets={"ci": TOY, "mini": {"steps": 500, "batch": 32, "items": 8000, "count": 500}},
)


def _clip(name: str, what: str, tokens: int = 4, frames: int = 8, pool: int = 1, pvc: bool = False) -> Arm:
    settings = {"tokens": tokens, "frames": frames, "pool": pool, "timed": pvc, "attention": pvc}
    return Arm(name=name, what=what, settings=settings)


FOLLOWS = Gate(side="pvc:cell", at_least=0.8)

VIDEO = Experiment(
    id="video",
    about="M2. A clip of eight frames, a page and a square that moves over it, through 8 K = 32 tokens. Clips, "
    "steps, parameters and tokens are equal. Asked: the digits (detail), and at the end where the square is, where "
    "it goes and how often it has turned (motion: the mean of the three). While training, a batch's clips end after "
    "their first frames or later, and the square is asked about behind every frame or window that an arm has: eight "
    "times a clip with pvc and per_frame, twice with the others, with the same weight in all.",
    run=rig_runs.video,
    arms=(
        _clip("pvc", "eight frames, K tokens each", pvc=True),
        _clip("per_frame", "eight frames, K tokens each, compressed alone"),
        _clip("few", "the last frame of each half, 4 K tokens each", tokens=16, frames=2),
        _clip("mean_pool", "the mean of the features of each half's four frames, 4 K tokens each", pool=4),
    ),
    claims=(
        Claim(
            id="video_detail",
            statement="PVC reads more of the page behind a moving square than frames compressed alone.",
            source="2412.09613 (redundancy of frames); comparison and effect size ours",
            kind="superior",
            compare=("per_frame:detail", "pvc:detail"),
            delta=0.1,
            gates=(FOLLOWS, Gate(side="pvc:detail", at_least=0.5)),
        ),
        Claim(
            id="video_motion",
            statement="PVC answers more about motion than a quarter of the frames with four times the tokens.",
            source="2412.09613 (more frames in the same context); comparison and effect size ours",
            kind="superior",
            compare=("few:motion", "pvc:motion"),
            delta=0.03,
            gates=(FOLLOWS, Gate(side="few:cell", at_least=0.8)),
        ),
        Claim(
            id="video_direction",
            statement="PVC tells the square's direction more often than a quarter of the frames with four times the "
            "tokens.",
            source="as video_motion",
            kind="superior",
            compare=("few:direction", "pvc:direction"),
            delta=0.08,
            gates=(FOLLOWS, Gate(side="few:cell", at_least=0.8)),
        ),
        Claim(
            id="video_motion_kept",
            statement="What PVC gains in detail costs no motion, compared to frames compressed alone.",
            source=OURS,
            kind="noninferior",
            compare=("per_frame:motion", "pvc:motion"),
            margin=0.05,
            gates=(FOLLOWS,),
        ),
        Claim(
            id="video_mean_pool",
            statement="PVC answers more about motion than the mean over time with as many tokens. The effect size "
            "is not tuned.",
            source=OURS,
            kind="superior",
            compare=("mean_pool:motion", "pvc:motion"),
            delta=0.03,
            gates=(FOLLOWS,),
        ),
    ),
    budgets={"ci": TOY, "mini": {"steps": 1400, "batch": 32, "items": 8000, "count": 600}},
)

MIXED = Experiment(
    id="mixed",
    about="M3. One PVC that learns pages and clips together, or one for each. The mixed batches are twice as large: "
    "a task has as many items a step in both cases, and so have all arms together as much compute.",
    run=rig_runs.mixed,
    arms=(
        Arm(name="one", what="pages and clips, half and half", settings={"tasks": "still+clip"}),
        Arm(name="stills", what="pages only", settings={"tasks": "still"}),
        Arm(name="clips", what="clips only", settings={"tasks": "clip"}),
    ),
    claims=tuple(
        Claim(
            id=f"mixed_{metric}",
            statement=f"One model for pages and clips is as good at {about} as one for {arm} only. The gate is not "
            f"tuned.",
            source="2412.09613 (one compression for images and videos); margin ours",
            kind="noninferior",
            compare=(f"{arm}:{metric}", f"one:{metric}"),
            margin=0.03,
            gates=(Gate(side=f"{arm}:{gate}", at_least=least),),
        )
        for metric, about, arm, gate, least in (
            ("digits", "the digits of pages", "stills", "digits", 0.8),
            ("detail", "the digits of clips", "clips", "detail", 0.5),
            ("motion", "the motion of clips", "clips", "cell", 0.8),
        )
    ),
    budgets={"ci": TOY, "mini": {"steps": 1000, "batch": 32, "items": 8000, "count": 600}},
)

CURVE = Experiment(
    id="curve",
    about="Tokens a frame against frames, PVC on the clips of M2, parameters equal. A curve, no claim; its budget "
    "is not tuned.",
    run=rig_runs.curve,
    arms=tuple(
        Arm(
            name=f"k{tokens}_t{frames}",
            what=f"{frames} frames of {tokens} tokens",
            settings={"tokens": tokens, "frames": frames},
        )
        for tokens in (1, 4, 16)
        for frames in (2, 4, 8)
    ),
    claims=(),
    budgets={"ci": TOY, "mini": {"steps": 700, "batch": 32, "items": 8000, "count": 600}},
    seeds=3,
)

ANYTIME = Experiment(
    id="anytime",
    about="Pages of which half are full and half have one to three quarters of digits, read after one to four "
    "repeats, or repeated until the tokens change by less than a threshold (a quantile of the changes of training "
    "pages; stop25 repeats longest). A page that stops early leaves its rest unread; even25 is what as many repeats "
    "in the mean read when all pages have equally many. Budget and effect sizes are not tuned.",
    run=rig_runs.anytime,
    arms=(
        Arm(name="fixed", what="trained on four repeats", settings={"varied": False}),
        Arm(name="varied", what="half of the batches have one to three repeats", settings={"varied": True}),
    ),
    claims=(
        Claim(
            id="anytime_rises",
            statement="Trained for it, each further repeat adds: accuracy rises with 1, 2, 4 repeats.",
            source=OURS,
            kind="monotone",
            compare=("varied:r1", "varied:r2", "varied:r4"),
            delta=0.1,
            gates=(Gate(side="varied:r4", at_least=0.5),),
        ),
        Claim(
            id="anytime_early",
            statement="Training with fewer repeats, too, makes two repeats readable.",
            source=OURS,
            kind="superior",
            compare=("fixed:r2", "varied:r2"),
            delta=0.05,
            gates=(Gate(side="fixed:r4", at_least=0.5),),
        ),
        Claim(
            id="anytime_cost",
            statement="Training with fewer repeats, too, does not harm the reading of all four.",
            source=OURS,
            kind="noninferior",
            compare=("fixed:r4", "varied:r4"),
            margin=0.05,
            gates=(Gate(side="fixed:r4", at_least=0.5),),
        ),
        Claim(
            id="anytime_stop",
            statement="Repeats that end by the change of tokens read more than as many for all pages alike.",
            source=OURS,
            kind="superior",
            compare=("varied:even25", "varied:stop25"),
            delta=0.02,
            gates=(Gate(side="varied:r4", at_least=0.5),),
        ),
    ),
    budgets={"ci": TOY, "mini": {"steps": 1000, "batch": 32, "items": 8000, "count": 400}},
)

VIEWS = Experiment(
    id="views",
    about="Five repeats of a page: all the same, the page and its four quarters enlarged, or the page from a fifth "
    "of its resolution to all of it. Tokens and parameters are equal; other views than the same share no trunk. No "
    "detail is hidden from any of them: the page has its full resolution. Budget and margin are not tuned.",
    run=rig_runs.views,
    arms=tuple(
        Arm(name=views, what=what, settings={"views": views})
        for views, what in (
            ("same", "five times the page"),
            ("crops", "the page, then its quarters"),
            ("scales", "from coarse to fine"),
        )
    ),
    claims=tuple(
        Claim(
            id=f"views_{views}",
            statement=f"Repeats that show {what} read no less than equal repeats.",
            source=OURS,
            kind="noninferior",
            compare=("same:digits", f"{views}:digits"),
            margin=0.05,
            gates=(Gate(side="same:digits", at_least=0.5),),
        )
        for views, what in (("crops", "quarters of the page"), ("scales", "the page at rising resolution"))
    ),
    budgets={"ci": TOY, "mini": {"steps": 500, "batch": 32, "items": 8000, "count": 500}},
)

EXPERIMENTS = (STATIC, VIDEO, MIXED, CURVE, ANYTIME, VIEWS)
"""All experiments, those of the fact sheet first."""
