"""Chat templates: exact strings, systems, stops; equality with Jinja templates that models are released with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chiasm.checkpoint.gguf import GGUFFile
from chiasm.checkpoint.wheel import find_wheel_gguf
from chiasm.errors import ChiasmError, ConfigError, TemplateError
from chiasm.text.templates import TEMPLATES, Template, get_template, join
from tiny_tokenizers import byte_fallback, byte_level

SYSTEM_25 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
SYSTEM_20 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
TALK = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]

GOLDEN = {
    "internvl2_5": f"<|im_start|>system\n{SYSTEM_25}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "Hermes-2": f"<|im_start|>system\n{SYSTEM_20}<|im_end|><|im_start|>user\nHi<|im_end|>"
    "<|im_start|>assistant\nHello.<|im_end|><|im_start|>user\nBye<|im_end|><|im_start|>assistant\n",
    "internlm2-chat": f"<|im_start|>system\n{SYSTEM_20}<|im_end|><|im_start|>user\nHi<|im_end|>"
    "<|im_start|>assistant\nHello.<|im_end|><|im_start|>user\nBye<|im_end|><|im_start|>assistant\n",
    "phi3-chat": f"<|system|>\n{SYSTEM_20}<|end|><|user|>\nHi<|end|>"
    "<|assistant|>\nHello.<|end|><|user|>\nBye<|end|><|assistant|>\n",
    "internvl_zh": " <human>: Hi <bot>: Hello.</s><human>: Bye <bot>:",
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
}
GOLDEN["chiasm-mini"] = GOLDEN["internvl-hf"] = GOLDEN["chatml"]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_exact_text(name):
    template = get_template(name)
    assert join(template.render(TALK, generate=True)) == GOLDEN[name]
    assert join(template.render(TALK[:2])) == GOLDEN[name].split("Bye")[0].removesuffix(template.user_prefix)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_is_learned_is_what_a_model_writes(name):
    """A prompt plus the learned pieces plus the unlearned tail is the whole conversation."""
    template = get_template(name)
    prompt = join(template.render(TALK[:1], generate=True))
    pieces = template.render(TALK[:2])
    learned = [p for p in pieces if p.supervised]
    assert join(pieces) == prompt + join(learned) + template.answer_suffix
    assert learned[-1].text == template.stop
    assert join(learned).strip() == "Hello." + template.stop


def test_system_precedence():
    template = get_template("internvl2_5")
    assert template.resolve_system() == SYSTEM_25
    assert template.resolve_system(None, "ckpt") == "ckpt"
    assert template.resolve_system("arg", "ckpt") == "arg"
    assert template.resolve_system("", "ckpt") == ""
    block = "<|im_start|>system\n{}<|im_end|>\n"
    rest = "<|im_start|>user\nHi<|im_end|>\n"
    say = [("user", "Hi")]
    assert join(template.render(say, system="arg")) == block.format("arg") + rest
    assert join(template.render(say, system="")) == rest
    assert join(template.render([("system", "turn"), *say], system="arg")) == block.format("turn") + rest
    # As in the official code, a turn is kept even when nothing is in it.
    assert join(template.render([("system", ""), *say])) == block.format("") + rest
    assert join(get_template("internvl_zh").render([("system", "S"), *say])) == "S <human>: Hi "


def test_only_the_internlm_recipe_strips_and_only_in_training():
    said = [("user", " a \n"), ("assistant", "\n b ")]
    for name in TEMPLATES:
        template = get_template(name)
        assert join(template.render(said)).count(" a \n") == 1
        assert (" a \n" in join(template.render(said, train=True))) == (name != "internlm2-chat")


def test_stops():
    assert get_template("Hermes-2").stops == ("<|im_end|>", "<|endoftext|>")
    assert get_template("phi3-chat").stops == ("<|end|>",)
    assert get_template("internvl_zh").stops == ("</s>",)
    bytes_, words = byte_level(), byte_fallback()
    assert get_template("internvl2_5").stop_ids(bytes_) == (bytes_.token_to_id("<|im_end|>"),)
    assert get_template("Hermes-2").stop_ids(bytes_) == tuple(
        map(bytes_.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    )
    assert get_template("Hermes-2").stop_ids(words) == (words.token_to_id("<|im_end|>"),)
    with pytest.raises(TemplateError, match=r"'<\|end\|>', which is no token"):
        get_template("phi3-chat").stop_ids(bytes_)


def test_errors_are_one_line():
    template = get_template("chatml")
    for call, match in (
        (lambda: get_template("internvl9"), r"'internvl9': known are .*Hermes-2.*internvl2_5.*phi3-chat"),
        (lambda: template.render([]), "empty conversation"),
        (lambda: template.render([("tool", "x")]), "turn 0 has role 'tool'"),
        (lambda: template.render([("user", "x"), ("system", "y")]), "turn 1 is a system turn"),
    ):
        with pytest.raises(TemplateError, match=match) as caught:
            call()
        assert isinstance(caught.value, ChiasmError)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="stop must not be empty"):
        Template(
            name="x",
            system_prefix="",
            system_suffix="",
            user_prefix="u",
            user_suffix="",
            assistant_prefix="a",
            stop="",
        )


def test_begin_token_rule():
    assert {name for name, template in TEMPLATES.items() if not template.bos} == {"Hermes-2"}


# Against Jinja ------------------------------------------------------------------------------------------------------

texts = st.text(alphabet="ab \n'\"{}%<>&你", max_size=8)
talks = st.lists(texts, min_size=1, max_size=5)


def jinja(source, messages, generate):
    """Render as transformers' apply_chat_template does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(messages=messages, add_generation_prompt=generate)


@pytest.mark.usefixtures("smollm2_wheel")
def test_chatml_is_what_smollm2_was_released_with():
    path = find_wheel_gguf()
    assert path is not None
    with GGUFFile(path) as gguf:
        source = gguf.metadata["tokenizer.chat_template"]

    @settings(max_examples=100)
    @given(said=talks, system=texts, generate=st.booleans())
    def same(said, system, generate):
        turns = [("system", system), *((("user", "assistant")[n % 2], text) for n, text in enumerate(said))]
        messages = [{"role": role, "content": text} for role, text in turns]
        for name in ("chatml", "chiasm-mini"):
            assert join(get_template(name).render(turns, generate=generate)) == jinja(
                source, messages, generate
            )

    same()
