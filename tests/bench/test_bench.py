"""The benchmark scripts run at toy sizes, and the published table is what the kept results give."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Import a benchmark the way that running it does: with its folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_inference_measures_both_models(script) -> None:
    inference = script("inference")
    result = inference.measure(inference.toy())
    assert result["logits_distance"] < 0.05
    names = [row["name"] for row in result["rows"]]
    assert [name.split(",")[0] for name in names] == ["prefill", *["decoding"] * 2, *["first token"] * 3]
    for row in result["rows"]:
        assert row["ours"]["min"] <= row["ours"]["median"] <= row["ours"]["max"]
        assert row["ratio"] == pytest.approx(row["peer"]["median"] / row["ours"]["median"])
        assert ("ok" in row) == bool(row["required"])
    lines = script("measure").table({"inference": {"environment": script("measure").environment(), **result}})
    assert lines.count("|\n") == len(names) + 2


def test_both_models_write_the_same_tokens(script) -> None:
    """In fp32 the benchmark's two models are one: same tokens, and equal logits up to rounding."""
    import torch

    inference = script("inference")
    case = inference.replace(inference.toy(), dtype=torch.float32)
    ours = inference.build_ours(case)
    theirs = inference.build_theirs(case, ours)
    assert inference.logits_distance(case, ours, theirs) < 1e-4
    ids = inference.text_prompt(case, 5)
    mine = inference.run_ours(ours, inference.Sequence.of_text(ids), 6).ids
    assert inference.run_theirs(theirs, ids, 6).ids == mine
    shared = theirs.model.language_model.layers[1].mlp.up_proj.weight
    fused = ours.trunk.layers[1].ffn.gate_up.weight
    assert shared.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()


def test_quantized_measures_every_rounding(script) -> None:
    quantized, inference = script("quantized"), script("inference")
    rows = quantized.measure(inference.toy())["rows"]
    names = [row["name"] for row in rows]
    assert names[:3] == [f"decoding, a token, {how}" for how in ("int8", "int4", "w8a8")]
    assert names[6:8] == ["picture tile to tokens, bf16", "picture tile to tokens, vision-w8a8"]
    assert [row["required"] for row in rows if row["required"]] == [">= 1.9x", ">= 3.3x", ">= 1.6x"]
    errors = {row["name"].rsplit(", ", 1)[1]: row["ours"]["median"] for row in rows[8:]}
    assert errors["int8"] < errors["w8a8"] < errors["int4-32"] < errors["int4-64"]


def test_attention_measures_every_way(script) -> None:
    attention = script("attention")
    rows = attention.measure(33, 2, 8, 2)["rows"]
    assert len(rows) == len(attention.WAYS) == 3
    assert all(float(row["note"].split()[1].strip("%,")) < 1.5 for row in rows)


def test_pvc_speed_measures_repeats_context_and_stream(script) -> None:
    pvc = script("pvc_speed")
    rows = pvc.measure(toy=True)["rows"]
    assert len(rows) == 2 * len(pvc.LIMITS) + 2
    *times, context, stream = rows
    for row in times:
        assert row["ratio"] == pytest.approx(row["peer"]["median"] / row["ours"]["median"])
        assert "the time" in row["note"]
    assert (context["peer"]["median"], context["ours"]["median"], context["ok"]) == (64 * 256, 64 * 64, True)
    assert stream["unit"] == "MB"
    assert stream["note"].startswith("drift ")


def test_batching_measures_three_ways_to_the_same_answers(script) -> None:
    """In fp32 all three write the same tokens; what is counted are those that were asked for."""
    import torch

    batching = script("batching")
    case = batching.toy()
    result = batching.measure(case, requests=5, repeats=2)
    assert [row["name"].split(" against ")[1] for row in result["rows"]] == [
        "one by one",
        "a left-padded batch",
    ]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["peer"]["median"] / row["ours"]["median"])
    exact = script("inference").replace(case, dtype=torch.float32)
    ours = batching.build_ours(exact)
    theirs, chat = batching.build_theirs(exact, ours), batching.build_chat(exact, ours)
    work = batching.Work.draw(exact, 3, 6)
    written = batching.run_queue(chat, work)
    assert [len(ids) for ids in written] == work.limits
    assert len(set(work.limits)) > 1
    assert written == batching.run_alone(chat, work) == batching.run_theirs(theirs, work)


def test_preprocessing_measures_both_modes(script) -> None:
    rows = script("preprocessing").measure(((60, 40),), side=16, repeats=2)["rows"]
    assert [row["name"].rsplit(", ", 1)[1] for row in rows] == ["fast mode", "exact mode"]
    assert rows[1]["ok"]


def test_startup_times_a_process(script) -> None:
    startup = script("startup")
    wall, used = startup.run(startup.COMMANDS["python -c pass"])
    assert wall > 0
    assert used >= 0


def test_pages_hold_the_tables_of_the_results(script) -> None:
    measure, quality = script("measure"), script("quality")
    pages = {
        measure.README: measure.ORDER,
        measure.SPEED_PAGE: measure.SPEED,
        measure.WORLDS_PAGE: ("world_speed",),
    }
    for page, names in pages.items():
        kept = measure.kept_results(names)
        assert kept
        assert measure.table(kept) in page.read_text(encoding="utf-8")
    kept = json.loads((measure.RESULTS / "quality.json").read_text(encoding="utf-8"))
    assert list(kept) == ["unrounded", *quality.HOW]
    assert quality.table(kept) in quality.PAGE.read_text(encoding="utf-8")


def test_the_peer_of_openvino_is_given_our_model(script, tmp_path: Path) -> None:
    """Its graph, ids in and logits out, computes what the model does: prompt, then one token at a time."""
    import numpy as np
    import torch

    from chiasm.model.openvino.weights import core

    peer, inference = script("peer_openvino"), script("inference")
    case = inference.replace(inference.toy(), dtype=torch.float32)
    model = inference.build_ours(case)
    peer.write_language(model, case, None, tmp_path / "m")
    settings = {"EXECUTION_MODE_HINT": "ACCURACY"}
    request = (
        core().compile_model(tmp_path / "m" / "openvino_model.xml", "CPU", settings).create_infer_request()
    )
    ids_T = inference.text_prompt(case, 5)
    expected = model.head.logits(model.hidden(inference.Sequence.of_text(ids_T)))
    pieces = []
    for begin, end in ((0, 9), (9, 10), (10, 12)):
        given = {
            "input_ids": ids_T[None, begin:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        pieces.append(torch.from_numpy(request.infer(given)["logits"].copy())[0])
    assert float((torch.cat(pieces) - expected).abs().max()) < 5e-3 * float(expected.std())  # float16 weights


def test_the_peer_of_openvino_is_optional(script) -> None:
    """Without the second environment the rows of ours are there, and no ratio."""
    peer = script("peer_openvino")
    result = peer.measure(peer.tiny(), None)
    names = [row["name"] for row in result["rows"]]
    ways = [f"{p}, {way}" for p in ("16 bits", "int8", "int4") for way in ("openvino", "torch")]
    assert names[:6] == [f"prefill, 12 rows, {way}" for way in ways]
    assert names[6:12] == [f"decoding, a token, {way}" for way in ways]
    assert all("ratio" not in row for row in result["rows"][:12])
    assert [row["name"] for row in result["rows"] if "ratio" in row] == names[12:]
    assert all(found["graph"] < 1e-3 for found in result["distances"].values())
    assert "not run" in result["remark"]


def test_worlds_are_timed_and_shown(script, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CHIASM_DATA", str(tmp_path / "no assets"))
    worlds = script("world_speed")
    rows = worlds.measure(repeats=2, share=0.01)["rows"]
    assert {"world scenes, 64 px", "world charts, 320 to 640 px"} <= {row["name"] for row in rows}
    for row in rows:
        assert row["ours"]["min"] > 0
        assert ("ok" in row) == bool(row["required"])
    worlds.sheet(tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_loader_measures_pictures_and_waiting(script) -> None:
    alone, waited = script("loader").measure(toy=True)["rows"]
    assert 0 < alone["ours"]["median"] < 1000
    assert 0 <= waited["ours"]["median"] <= 100
    assert waited["ok"] == (waited["ours"]["median"] < 5)


def test_training_compares_equal_work(script) -> None:
    """Both loops have the same loss on the same documents (else the script ends itself), and every row is there."""
    rows = script("training").measure(toy=True)["rows"]
    names = [row["name"] for row in rows]
    assert [name for name in names if "grouped" not in name][:2] == [
        "training, toy, cached features, float32",
        "training, toy, end to end, float32",
    ]
    full, memory = rows[-2:]
    assert full["ok"]
    assert full["ours"]["median"] < full["peer"]["median"]
    assert memory["ratio"] > 1
