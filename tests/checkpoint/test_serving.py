"""Folders for servers: what each needs, said before it is served; and transformers reads the whole folder alike."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tests.checkpoint.servable import write_servable

import chiasm
from chiasm.checkpoint.convert import convert
from chiasm.checkpoint.serving import RELEASES, SERVERS, check_serving, layout_for
from chiasm.checkpoint.store import read_json
from chiasm.cli.app import main
from chiasm.errors import CheckpointError, UsageError
from chiasm.eval.parity_cases import drawn

PYTHON = "configuration_internvl_chat.py"


def released(folder, family="qwen2", **changes):
    """An original folder with what a release has beside the weights, tiles of 448 pixels and 12 of them."""
    vision = {"image_size": 448}
    write_servable(folder, family, vision=vision, force_image_size=448, max_dynamic_patch=12, **changes)
    (folder / PYTHON).write_text("raise SystemExit  # never run here\n")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    released(folder / "source")
    convert(folder / "source", folder / "original", "original")
    return folder / "original"


def copied(original, tmp_path, **config):
    """The folder with another config."""
    shutil.copytree(original, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stated = read_json(path) | config
    path.write_text(json.dumps({key: value for key, value in stated.items() if value != "gone"}))
    return tmp_path / "m"


def said(folder, server, *statuses):
    return [str(finding) for finding in check_serving(folder, server).of(*statuses)]


def test_an_original_folder_that_all_three_read(original):
    for server in SERVERS:
        found = check_serving(original, server)
        assert found.ready, found.of("missing", "refused")
        assert found.layout == "original"
        assert not found.of("differs"), found.of("differs")
        assert len(found.of("ok")) >= 5
        assert found.to_dict()["release"] == RELEASES[server]


@pytest.mark.parametrize(
    ("to", "ready"), [("hf", {"vllm"}), ("hf-old", {"vllm", "lmdeploy"})], ids=["hf", "hf-old"]
)
def test_which_server_reads_which_names(original, tmp_path, to, ready):
    convert(original, tmp_path / "m", to)
    assert {server for server in SERVERS if check_serving(tmp_path / "m", server).ready} == ready
    for server in set(SERVERS) - ready:
        [refused] = said(tmp_path / "m", server, "refused")
        assert f"{server} has no class that reads the names of the {to} layout" in refused
        assert "chiasm convert --to" in refused


def test_the_layout_for_several():
    assert layout_for(("vllm",)) == layout_for(("lmdeploy", "vllm")) == "hf-old"
    assert layout_for(("sglang",)) == layout_for(("vllm", "lmdeploy", "sglang")) == "original"
    for bad in ((), ("ollama",)):
        with pytest.raises(UsageError, match="known are vllm, sglang, lmdeploy"):
            layout_for(bad)


@pytest.mark.parametrize(
    ("gone", "servers", "match"),
    [
        (PYTHON, ("vllm", "lmdeploy"), f"Python files, and {PYTHON} is not here: copy"),
        ("tokenizer.json", SERVERS, "there is no tokenizer"),
        ("chat_template.jinja", ("vllm", "lmdeploy"), "there is no chat template"),
    ],
)
def test_missing_files_of_the_original_layout(original, tmp_path, gone, servers, match):
    folder = copied(original, tmp_path)
    (folder / gone).unlink()
    for server in SERVERS:
        missing = said(folder, server, "missing")
        assert any(match in one for one in missing) == (server in servers), missing
        assert check_serving(folder, server).ready == (server not in servers)


@pytest.mark.parametrize("gone", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_missing_processors_of_the_hf_layout(original, tmp_path, gone):
    convert(original, tmp_path / "m", "hf-old")
    (tmp_path / "m" / gone).unlink()
    assert any(gone in one for one in said(tmp_path / "m", "vllm", "missing"))
    nested = {"image_processor": {}, "video_processor": {}, "image_seq_length": 256}
    (tmp_path / "m" / "processor_config.json").write_text(json.dumps(nested))
    assert check_serving(tmp_path / "m", "vllm").ready  # as transformers 5 saves them
    (tmp_path / "m" / "processor_config.json").unlink()
    assert any("image_seq_length" in one for one in said(tmp_path / "m", "vllm", "differs"))


def test_tokens_and_ends(original, tmp_path):
    convert(original, tmp_path / "m", "hf-old")
    path = tmp_path / "m" / "tokenizer_config.json"
    config = read_json(path)
    path.write_text(json.dumps(config | {"extra_special_tokens": {}}))
    assert any("context_image_token" in one for one in said(tmp_path / "m", "vllm", "missing"))
    path.write_text(json.dumps(config))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert any(
        "does not end answers at '<|im_end|>'" in one for one in said(tmp_path / "m", "lmdeploy", "differs")
    )


@pytest.mark.parametrize(
    ("server", "config", "status", "match"),
    [
        (
            "vllm",
            {"force_image_size": 224},
            "differs",
            "cuts tiles of the encoder's 448 pixels, the model of 224",
        ),
        ("vllm", {"pad2square": True}, "differs", "does not pad pictures"),
        ("lmdeploy", {"force_image_size": None}, "missing", "config.json has no force_image_size"),
        ("lmdeploy", {"ps_version": "v1"}, "refused", "ps_version 'v2' only"),
        ("lmdeploy", {"select_layer": -2}, "refused", "last layer only; the model reads -2"),
        ("lmdeploy", {"auto_map": "gone"}, "missing", "and auto_map is not here"),
        ("sglang", {"force_image_size": 224}, "refused", "cuts tiles of 448 pixels; the model's have 224"),
        ("sglang", {"max_dynamic_patch": 6}, "differs", "1 to 12 tiles with a thumbnail"),
        ("sglang", {"use_thumbnail": False}, "differs", "1 to 12 tiles with a thumbnail"),
        ("sglang", {"system_message": "x"}, "differs", "its own template internvl-2-5"),
    ],
)
def test_configs_that_a_server_reads_otherwise(original, tmp_path, server, config, status, match):
    folder = copied(original, tmp_path, **config)
    assert any(match in one for one in said(folder, server, status)), check_serving(folder, server)
    assert check_serving(folder, server).ready == (status == "differs")


def test_the_decoder_must_be_named_and_known(original, tmp_path):
    llm = read_json(original / "config.json")["llm_config"]
    folder = copied(original, tmp_path, llm_config={k: v for k, v in llm.items() if k != "architectures"})
    for server in SERVERS:
        assert any("no list of architectures" in one for one in said(folder, server, "missing"))
    released(tmp_path / "p", "phi3")
    assert any("no InternVL on phi3" in one for one in said(tmp_path / "p", "sglang", "refused"))
    assert not said(tmp_path / "p", "vllm", "refused")


@pytest.mark.parametrize("named", ["Qwen2ForCausalLM", [], None])
def test_architectures_that_are_no_list_are_written_anew(original, tmp_path, named):
    """The remedy that is named helps, in every layout."""
    llm = read_json(original / "config.json")["llm_config"]
    folder = copied(original, tmp_path, llm_config={**llm, "architectures": named})
    assert any("no list of architectures" in one for one in said(folder, "vllm", "missing"))
    source = folder
    for to in ("original", "hf-old", "hf"):
        convert(source, tmp_path / to, to)
        assert not any("architectures" in one for one in said(tmp_path / to, "vllm", "missing"))
        source = tmp_path / to
    path = tmp_path / "hf" / "config.json"
    config = read_json(path)
    config["text_config"]["architectures"] = named
    path.write_text(json.dumps(config))
    convert(tmp_path / "hf", tmp_path / "again", "hf-old")
    assert read_json(tmp_path / "again" / "config.json")["text_config"]["architectures"] == [
        "Qwen2ForCausalLM"
    ]


def test_templates_that_nobody_knows(original, tmp_path):
    folder = copied(original, tmp_path, template="nonesuch")
    assert any(
        "names the chat template 'nonesuch', which is not known" in o for o in said(folder, "vllm", "differs")
    )
    (folder / "chat_template.jinja").unlink()
    [missing] = said(folder, "vllm", "missing")
    assert "there is no chat template: chiasm convert --template NAME writes one" in missing
    convert(folder, tmp_path / "b", "original", template="internvl2_5")
    assert check_serving(tmp_path / "b", "vllm").ready  # the remedy helps
    assert not said(tmp_path / "b", "vllm", "differs")


def test_a_stop_that_is_no_token(original, tmp_path):
    folder = copied(original, tmp_path, template="phi3-chat")
    [differs] = said(folder, "vllm", "differs")
    assert "phi3-chat ends answers with '<|end|>', which is none of the tokenizer's added tokens" in differs
    assert "--template NAME" in differs
    assert not any("stop token" in one for one in said(folder, "vllm", "ok"))


def test_remedies_help_all_servers_that_were_asked_for(original, tmp_path, capsys):
    convert(original, tmp_path / "h", "hf-old")
    dst = str(tmp_path / "x")
    both = ["--for", "lmdeploy", "--for", "sglang"]
    assert main(["convert", str(original), dst, "--to", "hf", *both]) == 1
    assert "chiasm convert --to original" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "h"), dst, *both]) == 1
    err = capsys.readouterr().err
    assert PYTHON in err
    assert "--to hf-old" not in err


def test_doctor_for_one_server(original, tmp_path, capsys):
    convert(original, tmp_path / "h", "hf-old")
    given = ["doctor", "--serve", str(tmp_path / "h")]
    assert main(given) == 0
    assert main([*given, "--for", "vllm", "--for", "lmdeploy"]) == 0
    assert "sglang" not in capsys.readouterr().out.splitlines()[-1]
    assert main([*given, "--for", "sglang"]) == 1
    assert "cannot be served by sglang" in capsys.readouterr().err
    assert main([*given, "--for", "vllm", "--for", "sglang"]) == 1
    assert "cannot be served by sglang: sglang has no class" in capsys.readouterr().err
    assert main(["doctor", "--for", "vllm"]) == 2
    assert "--for belongs to --serve" in capsys.readouterr().err


def test_doctor_serve_of_a_bundle(capsys):
    from importlib.resources import files

    assert main(["doctor", "--serve", str(files("chiasm") / "assets" / "chiasm_mini")]) == 1
    assert "is a bundle of chiasm-mini" in capsys.readouterr().err


def test_normalisation_and_thumbnail(original, tmp_path):
    folder = copied(original, tmp_path)
    path = folder / "preprocessor_config.json"
    path.write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    assert any("normalises by ImageNet" in one for one in said(folder, "vllm", "differs"))
    for name, config, match in (
        ("a", {"use_thumbnail": False}, "always adds a thumbnail"),
        ("b", {"dynamic_image_size": False}, "cuts tiles; the model does not"),
    ):
        (tmp_path / name).mkdir()
        convert(copied(original, tmp_path / name, **config), tmp_path / f"{name}-hf", "hf-old")
        assert any(match in one for one in said(tmp_path / f"{name}-hf", "vllm", "differs"))


def test_what_is_no_internvl(tmp_path):
    from tests.checkpoint.random_checkpoints import write_text

    write_text(tmp_path / "t")
    with pytest.raises(CheckpointError, match="not an InternVL checkpoint"):
        check_serving(tmp_path / "t", "vllm")


# --- the commands ----------------------------------------------------------------------------------------------------


def test_convert_for_servers(original, tmp_path, capsys):
    src = str(original)
    assert main(["convert", src, str(tmp_path / "a"), "--for", "vllm", "--for", "lmdeploy"]) == 0
    assert "original -> hf-old" in capsys.readouterr().out
    assert main(["convert", src, str(tmp_path / "b"), "--for", "sglang"]) == 0
    assert "original -> original" in capsys.readouterr().out
    assert main(["convert", src, str(tmp_path / "c"), "--for", "lmdeploy", "--to", "hf"]) == 1
    err = capsys.readouterr().err
    assert f"nothing was written, for lmdeploy {RELEASES['lmdeploy']} could not serve it" in err
    assert "chiasm convert --to hf-old" in err
    assert (
        main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--for", "sglang", "--for", "vllm"]) == 1
    )
    assert PYTHON in capsys.readouterr().err  # they do not come back from the -hf layout
    assert main(["convert", src, str(tmp_path / "c")]) == 2
    assert "--to LAYOUT, or --for SERVER" in capsys.readouterr().err
    assert main(["convert", src, str(tmp_path / "c"), "--for", "vllm", "--to", "gguf"]) == 2
    assert main(["convert", src, str(tmp_path / "c"), "--for", "ollama"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_convert_says_what_differs(original, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    folder = copied(original, tmp_path / "x", max_dynamic_patch=6)
    assert main(["convert", str(folder), str(tmp_path / "a"), "--for", "sglang"]) == 0
    assert "note: sglang: sglang cuts every picture into 1 to 12 tiles" in capsys.readouterr().err


def test_doctor_serve(original, tmp_path, capsys):
    assert main(["doctor", "--serve", str(original)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "can read it" in line] == [
        f"{server} {RELEASES[server]}: can read it (original layout)" for server in SERVERS
    ]
    assert main(["doctor", "--serve", str(original), "--json"]) == 0
    assert [one["ready"] for one in json.loads(capsys.readouterr().out)] == [True] * 3
    folder = copied(original, tmp_path)
    (folder / "tokenizer.json").unlink()
    assert main(["doctor", "--serve", str(folder)]) == 1
    both = capsys.readouterr()
    assert "no  there is no tokenizer" in both.out
    assert "cannot be served by vllm, sglang, lmdeploy: there is no tokenizer" in both.err
    assert main(["doctor", "--serve", str(folder), "--fetch"]) == 2


# --- transformers, as the servers use it -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "hf-old"])
@pytest.mark.parametrize("family", ["qwen2", "internlm2"])
def test_transformers_reads_the_folder_and_computes_the_same(tmp_path, to, family):
    """Config, tokenizer with chat template, processor and model, from the folder alone; as vLLM and LMDeploy do."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    class Processor(InternVLProcessor):
        # The check of the parts' classes looks up video processors, which do not import without torchvision.
        def check_argument_for_proper_class(self, argument_name, argument):
            return None

    write_servable(tmp_path / "a", family)
    convert(tmp_path / "a", tmp_path / "b", to)
    folder = tmp_path / "b"
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["InternVLForConditionalGeneration"]
    assert config.text_config.architectures == [
        "Qwen2ForCausalLM" if family == "qwen2" else "LlamaForCausalLM"
    ]
    processor = Processor(
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
        AutoTokenizer.from_pretrained(folder),
        image_seq_length=read_json(folder / "processor_config.json")["image_seq_length"],
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    pictures = [drawn(150, 60), Image.new("RGB", (40, 40), "navy")]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What differs?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    theirs = processor(images=pictures, text=[text], add_special_tokens=False, return_tensors="pt")

    ours = chiasm.load(folder, device="cpu", mode="hf")
    shown = [{"type": "image", "image": picture} for picture in pictures]
    inputs = ours.inputs([{"role": "user", "content": [*shown, parts[-1]]}])
    assert inputs.token_ids.tolist() == theirs.input_ids[0].tolist()
    assert inputs.tiles.shape[0] == theirs.pixel_values.shape[0] > 3
    torch.testing.assert_close(ours.pixels(inputs), theirs.pixel_values, rtol=1e-5, atol=1e-5)
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=theirs.input_ids, pixel_values=theirs.pixel_values).logits[0]
    torch.testing.assert_close(
        ours.logits(inputs), logits[:, : ours.logits(inputs).shape[1]], rtol=1e-4, atol=1e-4
    )
    stop = ours.spec.tokenizer.token_to_id("<|im_end|>")
    assert stop in [model.generation_config.eos_token_id] or stop in model.generation_config.eos_token_id
