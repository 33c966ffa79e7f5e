"""The claims of InternVL 2.5's training recipe, in miniature: what is said, and what would refute it.

Sources: InternVL 2.5 (2412.05271), 1.5 (2404.16821) for tiling. The papers publish no controlled comparison of these
recipe items, so all effect sizes are expectations of ours. They are tuned on dev splits with seeds from 100 and fixed
before any confirmation run; whoever changes one changes the fingerprint of its experiment (see docs/claims.md).

Rig: tiles of 28 pixels, 16 patches and 4 tokens each, at most 4 tiles and a thumbnail; encoder 96 x 3 layers, decoder
128 x 4 layers, a character vocabulary, about 1.3 million parameters (`rig`). What the arms do is in `rig_runs`.
"""

from __future__ import annotations

from chiasm.lab.claim import Arm, Claim, Experiment, Gate
from chiasm.systems.internvl import rig_runs

__all__ = ["EXPERIMENTS"]

OURS = "our question: the paper gives no comparison"
TOY = {
    "vision_width": 32,
    "vision_layers": 1,
    "width": 32,
    "layers": 1,
    "first_steps": 1,
    "steps": 2,
    "batch": 4,
    "pictures": 16,
    "count": 4,
    "limit": 8,
}
"""Sizes at which every mechanism runs and nothing is learned."""

PACKING_EXACT = Experiment(
    id="packing_exact",
    about="The same documents with pictures, packed into one row and one by one; a random model in fp32. The arm "
    "`positions` is the known mistake: documents told apart by restarting positions, not by the attention "
    "mask.",
    run=rig_runs.packing_exact,
    arms=(
        Arm(name="isolated", what="packed, attention within documents", settings={"isolated": True}),
        Arm(
            name="positions",
            what="packed, position numbers restart, attention runs on",
            settings={"isolated": False},
        ),
    ),
    claims=(
        Claim(
            id="packing_gradient",
            statement="The gradient of a packed row equals that of its documents one by one (relative, fp32).",
            source="2412.05271 section 4.2 (packing); the release isolates documents by variable-length attention",
            kind="exact",
            compare=("isolated:gradient",),
            margin=1e-5,
            gates=(Gate(side="positions:gradient", at_least=0.05),),
        ),
        Claim(
            id="packing_logits",
            statement="The logits of a packed row equal those of its documents one by one (fp32).",
            source="as packing_gradient",
            kind="exact",
            compare=("isolated:logit",),
            margin=1e-5,
            gates=(Gate(side="positions:logit", at_least=0.05),),
        ),
    ),
    budgets={"ci": {**TOY, "count": 3}, "mini": {"count": 12}},
)

PACKING_SPEED = Experiment(
    id="packing_speed",
    about="Forward and backward over the same documents (lengths log-normal, median 200, sigma 0.9, half of them "
    "learned, up to four tiles): batches filled up to their longest document, or packs. CPU time of one "
    "thread.",
    run=rig_runs.packing_speed,
    arms=(
        Arm(name="padded", what="batches of 8 as they come, filled up", settings={"packed": False}),
        Arm(name="packed", what="best fit into packs of 4096 rows, buffer 20", settings={"packed": True}),
    ),
    claims=(
        Claim(
            id="packing_throughput",
            statement="Packing computes at least 1.5 times as many useful tokens a second as padded batches.",
            source="2412.05271 section 4.2",
            kind="ratio",
            compare=("padded:tokens_per_second", "packed:tokens_per_second"),
            delta=1.5,
        ),
        Claim(
            id="packing_same_loss",
            statement="The loss over all documents is the same padded and packed.",
            source="as packing_throughput",
            kind="equivalent",
            compare=("padded:loss", "packed:loss"),
            margin=1e-4,
        ),
    ),
    budgets={
        "ci": {**TOY, "count": 8, "median": 60, "longest": 128, "pack": 256},
        "mini": {"count": 128, "median": 200, "longest": 2048, "pack": 4096, "batch": 8},
    },
    alone=True,
)

LOSS_POWER = Experiment(
    id="loss_power",
    about="All arms start from one model that has learned to read four digits. Then half of the samples have a one- "
    "token answer (the digit at the low right), half a worksheet of 59 characters about them. Weights x^-p; "
    "model, data, order and steps are equal. Given enough steps every arm learns both: what the exponent decides "
    "is which of them first. So accuracy is the mean of looks after every twenty steps.",
    run=rig_runs.loss_power,
    arms=(
        Arm(name="p0", what="every token weighs the same", settings={"power": 0.0}),
        Arm(name="p05", what="square-root compromise of the paper", settings={"power": 0.5}),
        Arm(name="p1", what="every sample weighs the same", settings={"power": 1.0}),
    ),
    claims=(
        Claim(
            id="power_short",
            statement="One-token answers are learned the sooner, the larger the exponent p = 0, 0.5, 1.",
            source="2412.05271 section 4.2 (square averaging against bias to long or short answers); ordering ours",
            kind="monotone",
            compare=("p0:short", "p05:short", "p1:short"),
            delta=0.05,
            gates=(Gate(side="p1:short_end", at_least=0.8),),
        ),
        Claim(
            id="power_long",
            statement="Long answers (digits right, teacher-forced) are learned the later, the larger the exponent.",
            source="as power_short",
            kind="monotone",
            compare=("p1:long", "p05:long", "p0:long"),
            delta=0.05,
            gates=(Gate(side="p0:long_end", at_least=0.8),),
        ),
    ),
    budgets={
        "ci": {**TOY, "look_every": 1},
        "mini": {
            "first_steps": 80,
            "steps": 160,
            "look_every": 20,
            "batch": 32,
            "pictures": 20000,
            "count": 150,
        },
    },
)

TILING = Experiment(
    id="tiling",
    about="Grainy pages of 56 x 56 pixels with sixteen small digits; two questions, the digits and their common "
    "colour, which also tints the page. Every arm first learns on clean quarter pages of one tile, then on "
    "clean, sharp pages, cut in its own way. "
    "Model, steps and pages are equal; tokens are not (4, 16, 20, 16): one tile has fewer tokens and less "
    "detail, and only `upsampled` tells the two apart. Its pages were shrunk to one tile and enlarged again, "
    "cut into as many tiles as `four`: the same tokens without the detail.",
    run=rig_runs.tiling,
    arms=(
        Arm(name="one", what="one tile", settings={"tiles": 1, "thumbnail": False, "detail": 0}),
        Arm(name="four", what="four tiles", settings={"tiles": 4, "thumbnail": False, "detail": 0}),
        Arm(
            name="four_thumbnail",
            what="four tiles and the thumbnail",
            settings={"tiles": 4, "thumbnail": True, "detail": 0},
        ),
        Arm(
            name="upsampled",
            what="four tiles of a page shrunk to one tile",
            settings={"tiles": 4, "thumbnail": False, "detail": 28},
        ),
    ),
    claims=(
        Claim(
            id="tiling_text",
            statement="Small text is read better from four tiles and the thumbnail than from one tile.",
            source="2404.16821 figure 6 and section 3.3 (dynamic resolution); effect size ours",
            kind="superior",
            compare=("one:text", "four_thumbnail:text"),
            delta=0.2,
            gates=(Gate(side="four_thumbnail:text", at_least=0.7),),
        ),
        Claim(
            id="tiling_detail",
            statement="It is the detail, not the number of tokens: four tiles beat as many tokens of an enlarged page.",
            source=OURS,
            kind="superior",
            compare=("upsampled:text", "four:text"),
            delta=0.08,
            gates=(Gate(side="four:text", at_least=0.7), Gate(side="upsampled:text", at_least=0.4)),
        ),
        Claim(
            id="tiling_colour",
            statement="The dominant colour is named as well from one tile as from four.",
            source="2404.16821 figure 6 (tasks without detail do not gain); margin ours",
            kind="equivalent",
            compare=("one:colour", "four_thumbnail:colour"),
            margin=0.03,
            gates=(Gate(side="one:colour", at_least=0.8),),
        ),
        Claim(
            id="tiling_thumbnail",
            statement="The thumbnail does not harm reading of small text.",
            source=OURS,
            kind="noninferior",
            compare=("four:text", "four_thumbnail:text"),
            margin=0.05,
            gates=(Gate(side="four:text", at_least=0.7),),
        ),
    ),
    budgets={
        "ci": TOY,
        "mini": {
            "panel_steps": 300,
            "first_steps": 220,
            "steps": 200,
            "batch": 32,
            "pictures": 20000,
            "count": 300,
        },
    },
    seeds=3,
)

JPEG = Experiment(
    id="jpeg",
    about="Eight faint digits on grey, two tiles. All arms start from one model that has learned to read them, and "
    "go on with pictures as they are, with random JPEG (75 to 100) of every tile, or of the whole picture; "
    "read at falling JPEG quality. Model, steps and pictures are equal.",
    run=rig_runs.jpeg_training,
    arms=(
        Arm(name="none", what="no augmentation", settings={"augment": "none"}),
        Arm(name="tile", what="every tile with its own quality (the release)", settings={"augment": "tile"}),
        Arm(name="image", what="the picture before it is cut", settings={"augment": "image"}),
    ),
    claims=(
        Claim(
            id="jpeg_q30",
            statement="JPEG augmentation helps at quality 30.",
            source="2412.05271 section 4.1 (random JPEG compression); effect size ours",
            kind="superior",
            compare=("none:q30", "tile:q30"),
            delta=0.03,
            gates=(Gate(side="none:clean", at_least=0.9),),
        ),
        Claim(
            id="jpeg_q50",
            statement="JPEG augmentation helps at quality 50.",
            source="as jpeg_q30",
            kind="superior",
            compare=("none:q50", "tile:q50"),
            delta=0.06,
            gates=(Gate(side="none:clean", at_least=0.9),),
        ),
        Claim(
            id="jpeg_q75",
            statement="JPEG augmentation helps at quality 75.",
            source="as jpeg_q30",
            kind="superior",
            compare=("none:q75", "tile:q75"),
            delta=0.08,
            gates=(Gate(side="none:clean", at_least=0.9),),
        ),
        Claim(
            id="jpeg_clean",
            statement="JPEG augmentation costs nothing at quality 100.",
            source="as jpeg_q30",
            kind="noninferior",
            compare=("none:q100", "tile:q100"),
            margin=0.02,
            gates=(Gate(side="none:clean", at_least=0.9),),
        ),
        Claim(
            id="jpeg_placement",
            statement="Compressing every tile (the release) is as good as compressing the picture, read at quality 50.",
            source=OURS,
            kind="equivalent",
            compare=("image:q50", "tile:q50"),
            margin=0.05,
            gates=(Gate(side="image:q100", at_least=0.9),),
        ),
    ),
    budgets={
        "ci": TOY,
        "mini": {"first_steps": 200, "steps": 100, "batch": 32, "pictures": 20000, "count": 300},
    },
)

COT = Experiment(
    id="cot",
    about="The sum, modulo 5, of eight digits (0 to 3) in a picture. All arms start from one model that has learned "
    "to read them; then a third of the samples reads, two thirds ask for the sum, answered at once or step by "
    "step (the digits, their running sums, those modulo 5, the answer). Model, steps and pictures are equal, "
    "learned tokens are not (2 and 38 an answer). Votes are of answers sampled at temperature 0.4.",
    run=rig_runs.cot,
    arms=(
        Arm(name="direct", what="answers at once", settings={"task": "sum"}),
        Arm(name="cot", what="answers step by step", settings={"task": "sum_cot"}),
    ),
    claims=(
        Claim(
            id="cot_direct",
            statement="Answers step by step are right more often than answers at once.",
            source="2412.05271 sections 1 and 5.1 (CoT above direct by 3.7 on MMMU); effect size ours",
            kind="superior",
            compare=("direct:greedy", "cot:greedy"),
            delta=0.1,
            gates=(Gate(side="direct:read", at_least=0.9), Gate(side="cot:read", at_least=0.9)),
        ),
        Claim(
            id="vote_greedy",
            statement="The vote of 16 sampled answers is right more often than the greedy answer.",
            source="2412.05271 section 5.1 (majority voting; InternVL2-76B gains 2.6 on MMMU)",
            kind="superior",
            compare=("cot:greedy", "cot:vote16"),
            delta=0.02,
            gates=(Gate(side="cot:greedy", at_least=0.3, at_most=0.95),),
        ),
        Claim(
            id="vote_count",
            statement="Accuracy rises with the number of votes: 1, 4, 16.",
            source="as vote_greedy",
            kind="monotone",
            compare=("cot:vote1", "cot:vote4", "cot:vote16"),
            delta=0.05,
            gates=(Gate(side="cot:greedy", at_least=0.3, at_most=0.95),),
        ),
    ),
    budgets={
        "ci": TOY,
        "mini": {"first_steps": 150, "steps": 150, "batch": 48, "pictures": 20000, "count": 200, "limit": 60},
    },
)

COMPRESSION = Experiment(
    id="compression",
    about="Eight digits from one tile of 16 patches, read through 4 tokens (unshuffle, mean, drop) or all 16; "
    "decoder, encoder and steps are equal, the projector's first layer is as wide as its input.",
    run=rig_runs.compression,
    arms=(
        Arm(
            name="unshuffle",
            what="2 x 2 patches become channels of one token",
            settings={"compress": "unshuffle"},
        ),
        Arm(name="mean", what="2 x 2 patches are averaged", settings={"compress": "mean"}),
        Arm(name="drop", what="one of 2 x 2 patches is kept", settings={"compress": "drop"}),
        Arm(name="full", what="every patch is a token", settings={"compress": "none"}),
    ),
    claims=(
        Claim(
            id="unshuffle_mean",
            statement="Unshuffling reads better than averaging at equal tokens.",
            source="2404.16821 section 3.1 (pixel shuffle); comparison ours",
            kind="superior",
            compare=("mean:text", "unshuffle:text"),
            delta=0.05,
            gates=(Gate(side="unshuffle:text", at_least=0.5),),
        ),
        Claim(
            id="unshuffle_drop",
            statement="Unshuffling reads better than dropping three patches of four.",
            source="as unshuffle_mean",
            kind="superior",
            compare=("drop:text", "unshuffle:text"),
            delta=0.05,
            gates=(Gate(side="unshuffle:text", at_least=0.5),),
        ),
        Claim(
            id="unshuffle_full",
            statement="Unshuffling reads as well as all patches do, with a quarter of the tokens.",
            source="as unshuffle_mean",
            kind="noninferior",
            compare=("full:text", "unshuffle:text"),
            margin=0.05,
            gates=(Gate(side="full:text", at_least=0.5),),
        ),
    ),
    budgets={"ci": TOY, "mini": {"steps": 150, "batch": 32, "pictures": 20000, "count": 300}},
)

REPETITION = Experiment(
    id="repetition",
    about="Descriptions of which 5 % repeat their first part: learned as they are, after the repetition filter, or "
    "never there. Texts are sampled at temperature 1; a text loops when over 40 % of its 10-grams had "
    "occurred in it before.",
    run=rig_runs.repetition_filter,
    arms=(
        Arm(name="clean", what="no loops in the data", settings={"loops": False, "filtered": False}),
        Arm(name="looping", what="5 % loops", settings={"loops": True, "filtered": False}),
        Arm(name="filtered", what="5 % loops, filtered", settings={"loops": True, "filtered": True}),
    ),
    claims=(
        Claim(
            id="filter_loops",
            statement="Filtering repetitive answers out of the data keeps the model from writing loops.",
            source="2412.05271 section 4.3 (repetitive data is among the most harmful); effect size ours",
            kind="superior",
            compare=("looping:loops", "filtered:loops"),
            delta=0.02,
            better="lower",
            gates=(Gate(side="looping:loops", at_least=0.02),),
        ),
        Claim(
            id="filter_quality",
            statement="A filtered mixture teaches as well as a clean one.",
            source="as filter_loops",
            kind="equivalent",
            compare=("clean:long", "filtered:long"),
            margin=0.05,
            gates=(Gate(side="clean:long", at_least=0.5),),
        ),
    ),
    budgets={
        "ci": {**TOY, "loops": 0.5},
        "mini": {"steps": 200, "batch": 32, "pictures": 4000, "count": 300, "loops": 0.05, "limit": 90},
    },
    seeds=3,
)

PROGRESSIVE = Experiment(
    id="progressive",
    about="A large decoder with an encoder from scratch, against half the compute: a quarter to train the encoder "
    "under a small decoder, a quarter for the large decoder with that encoder. Everything is learned in both; "
    "the decoder is random at first, so there is no warm-up of the projector alone.",
    run=rig_runs.progressive,
    arms=(
        Arm(name="scratch", what="encoder and large decoder from scratch", settings={"from": "scratch"}),
        Arm(name="handed", what="encoder from the small run, half the compute", settings={"from": "small"}),
    ),
    claims=(
        Claim(
            id="progressive_half",
            statement="With an encoder handed on from a small model the large one reads as well at half the compute.",
            source="2412.05271 section 4.1 (progressive scaling); ratio ours",
            kind="noninferior",
            compare=("scratch:text", "handed:text"),
            margin=0.05,
            gates=(Gate(side="scratch:text", at_least=0.7),),
        ),
    ),
    budgets={"ci": TOY, "mini": {"steps": 250, "batch": 32, "pictures": 20000, "count": 300}},
    seeds=3,
)

PROBES = Experiment(
    id="probes",
    about="An encoder that learned to classify digits by the mean of its patches, before and after next-token "
    "training on descriptions; a linear probe of the mean and an attention-pool probe, both trained on frozen "
    "features.",
    run=rig_runs.probes,
    arms=(
        Arm(name="before", what="after classification", settings={"trained": False}),
        Arm(name="after", what="then trained on descriptions", settings={"trained": True}),
    ),
    claims=(
        Claim(
            id="probe_shift",
            statement="Next-token training widens the gap between attention-pool and linear probe.",
            source="2412.05271 table 14 (linear 82.5 to 78.5, attention pooling 85.5 to 85.2); effect size ours",
            kind="superior",
            compare=("before:gap", "after:gap"),
            delta=0.03,
            gates=(Gate(side="before:linear", at_least=0.7),),
        ),
    ),
    budgets={
        "ci": {**TOY, "probe_pictures": 16, "probe_steps": 2},
        "mini": {
            "steps": 200,
            "batch": 32,
            "pictures": 20000,
            "count": 500,
            "probe_pictures": 1500,
            "probe_steps": 250,
        },
    },
    seeds=3,
)

EXPERIMENTS = (
    PACKING_EXACT,
    PACKING_SPEED,
    LOSS_POWER,
    TILING,
    JPEG,
    COT,
    COMPRESSION,
    REPETITION,
    PROGRESSIVE,
    PROBES,
)
"""All experiments, the required ones of the miniature first."""
