"""OpenVINO GenAI's LLMPipeline behind a pipe, for `peer_openvino.py`; runs in an environment of its own.

Needs openvino-genai and nothing of Chiasm. Every argument is a folder with `openvino_model.xml`; each is loaded with
both attention backends of the pipeline. Then one JSON object a line is read from stdin, {"model": folder's name,
"backend": "SDPA" or "PA", "ids": [...], "tokens": n}, and one is answered on stdout: CPU milliseconds of this process
(all threads) to the first token and for each further one, and the tokens. The first line out gives the versions.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

BACKENDS = ("SDPA", "PA")


class Clock(genai.StreamerBase):
    """CPU seconds at the start and at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps = [time.process_time()]

    def write(self, tokens) -> genai.StreamingStatus:
        self.stamps.append(time.process_time())
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def answer(pipeline: genai.LLMPipeline, ids: list[int], tokens: int) -> dict:
    """Greedy generation of so many tokens."""
    config = genai.GenerationConfig()
    config.max_new_tokens = tokens
    config.do_sample = False
    config.ignore_eos = True  # random weights must not end early
    config.eos_token_id, config.stop_token_ids = 0, {0}
    row = np.array([ids], np.int64)
    prompt = genai.TokenizedInputs(ov.Tensor(row), ov.Tensor(np.ones_like(row)))
    clock = Clock()
    written = pipeline.generate(prompt, config, clock).tokens[0]
    stamps = clock.stamps
    first, steps = stamps[1] - stamps[0], stamps[-1] - stamps[1]
    return {"first": first * 1e3, "step": steps * 1e3 / max(1, len(stamps) - 2), "ids": list(written)}


def main() -> None:
    folders = [Path(argument) for argument in sys.argv[1:]]
    pipelines = {
        (folder.name, backend): genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND=backend, INFERENCE_NUM_THREADS=1
        )
        for folder in folders
        for backend in BACKENDS
    }
    print(json.dumps({"openvino": ov.__version__, "openvino_genai": genai.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pipeline = pipelines[asked["model"], asked["backend"]]
        print(json.dumps(answer(pipeline, asked["ids"], asked["tokens"])), flush=True)


if __name__ == "__main__":
    main()
