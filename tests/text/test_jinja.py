"""Chat templates as Jinja source: spelled as Template.render spells them, refused where it refuses."""

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chiasm.errors import TemplateError
from chiasm.text.jinja import to_jinja
from chiasm.text.templates import TEMPLATES, get_template, join

SPELLED = [name for name in TEMPLATES if name != "internvl_zh"]
USER = {"role": "user", "content": "Hi"}


def rendered(source, messages, generate=True):
    """As transformers and the servers do it."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source).render(messages=messages, add_generation_prompt=generate)


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize(
    "turns",
    [
        [("user", "a")],
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        [("system", "s"), ("user", "a")],
        [("system", ""), ("user", "a")],
        [("user", "a"), ("assistant", "")],
        [],
        [("tool", "a")],
        [("user", "a"), ("developer", "b")],
        [("user", "a"), ("system", "s")],
    ],
)
def test_as_the_template_spells_and_refuses(name, turns):
    template = get_template(name)
    messages = [{"role": role, "content": text} for role, text in turns]
    for picture in ("<image>", None):
        source = to_jinja(template, picture=picture)
        for generate in (True, False):
            try:
                expected, refused = join(template.render(turns, generate=generate)), ""
            except TemplateError as error:
                expected, refused = "", str(error)
            if not refused:
                assert rendered(source, messages, generate) == expected
                continue
            with pytest.raises(jinja2.TemplateError) as caught:
                rendered(source, messages, generate)
            assert str(caught.value) == refused.replace("'", "")  # a role's quotes are Python's


def test_no_form_for_turns_that_merge():
    assert to_jinja(get_template("internvl_zh")) is None


@pytest.mark.parametrize("picture", ["<image>", None])
def test_texts_and_lists_of_parts_are_both_taken(picture):
    """Servers choose by the source: vLLM hands lists where it finds a loop over the content, else strings."""
    source = to_jinja(get_template("internvl2_5"), picture=picture)
    assert "for part in message['content']" in source
    assert "message['content'] is string" in source
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert rendered(source, [{"role": "user", "content": parts}]) == rendered(source, [USER])


@pytest.mark.parametrize("kind", ["image", "image_url"])
def test_pictures_by_either_name(kind):
    source = to_jinja(get_template("chatml"), picture="<image>")
    one, text = {"type": kind, kind: {"url": "x"}}, {"type": "text", "text": "q"}
    assert "user\n<image>\nq<|im_end|>" in rendered(source, [{"role": "user", "content": [one, text]}])
    both = rendered(source, [{"role": "user", "content": [one, one, text]}])
    assert "user\nImage-1: <image>\nImage-2: <image>\nq<|im_end|>" in both


@pytest.mark.parametrize("content", [{"content": None}, {"content": []}, {}])
def test_no_content_is_an_empty_one(content):
    source = to_jinja(get_template("internvl2_5"), picture="<image>")
    called = [USER, {"role": "assistant", "tool_calls": [], **content}, USER]
    assert rendered(source, called) == rendered(source, [USER, {"role": "assistant", "content": ""}, USER])
