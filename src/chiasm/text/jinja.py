"""A chat template as the Jinja source that servers and transformers read.

Source: `Template` (chiasm.text.templates), and the dialect of transformers' `chat_template.jinja`: `messages` with a
role and a content that is a string or a list of parts, `add_generation_prompt`, `bos_token`.

A server puts its own words in the place of a picture: what stands there is the caller's (`<image>` for the original
layout, the context token for `-hf`), and a newline follows it, as in `chiasm.data.message`. Pictures are numbered as
the template numbers them; tags that a user writes into a text are not looked for.

Servers look at the source to decide whether a template wants texts or lists of parts (vLLM: does it loop over a
message's content? llama.cpp: does a text in a list come out?) and hand each what it wants, so both are taken: the loop
is written where the model sees pictures and where it sees none. What `Template.render` refuses is refused here with
the same reason, by `raise_exception`, which all of them define.
"""

from __future__ import annotations

import json

from chiasm.text.templates import ROLES, Template

__all__ = ["to_jinja"]


def to_jinja(
    template: Template,
    *,
    system: str | None = None,
    picture: str | None = None,
    video: str | None = None,
    bos: bool = False,
) -> str | None:
    """The Jinja source of a template, or None where it has no such form (`by_exchange`).

    Rendered as transformers does it (blocks trimmed), it spells what `Template.render` does.

    Args:
        template: the spelling.
        system: the checkpoint's system message, which replaces the template's; "" for none.
        picture: what stands for a picture; None where the model sees none.
        video: likewise for a video.
        bos: whether the text starts with the tokenizer's begin token.
    """
    if template.by_exchange:
        return None
    default = template.resolve_system(None, system)
    lines = ["{%- set ns = namespace(shown=0) -%}", *_refusals()]
    if bos:
        lines.append("{{- bos_token -}}")
    if default:
        block = _quote(template.system_prefix + default + template.system_suffix)
        lines.append(f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {block} -}}}}{{%- endif -%}}")
    if template.opening:
        # Stands after the system block; a system turn of the conversation writes it itself.
        lines.append(
            f"{{%- if messages[0]['role'] != 'system' -%}}{{{{- {_quote(template.opening)} -}}}}{{%- endif -%}}"
        )
    lines.append("{%- for message in messages -%}")
    for role, before in (
        ("system", template.system_prefix),
        ("user", template.user_prefix),
        ("assistant", template.assistant_prefix + template.answer_prefix),
    ):
        word = "if" if role == "system" else "elif"
        lines.append(f"{{%- {word} message['role'] == '{role}' -%}}{{{{- {_quote(before)} -}}}}")
    lines.append("{%- endif -%}")
    lines += _content(template, picture, video)
    for role, after in (
        ("system", template.system_suffix + template.opening),
        ("user", template.user_suffix),
        ("assistant", template.stop + template.answer_suffix),
    ):
        word = "if" if role == "system" else "elif"
        lines.append(f"{{%- {word} message['role'] == '{role}' -%}}{{{{- {_quote(after)} -}}}}")
    lines += ["{%- endif -%}", "{%- endfor -%}"]
    lines.append(
        f"{{%- if add_generation_prompt -%}}{{{{- {_quote(template.assistant_prefix)} -}}}}{{%- endif -%}}"
    )
    return "\n".join(lines) + "\n"


_IMAGES = ["image", "image_url"]  # transformers' word, and OpenAI's, which some servers leave as it is


def _refusals() -> list[str]:
    """What `Template.render` does not spell either."""
    roles = ", ".join(ROLES)
    return [
        "{%- if not messages -%}",
        "{{- raise_exception('an empty conversation: give at least one message') -}}",
        "{%- endif -%}",
        "{%- for message in messages -%}",
        f"{{%- if message['role'] not in {list(ROLES)} -%}}"
        "{{- raise_exception('turn ' ~ loop.index0 ~ ' has role ' ~ message['role'] ~ "
        f"': use one of {roles}') -}}}}",
        "{%- elif message['role'] == 'system' and not loop.first -%}",
        "{{- raise_exception('turn ' ~ loop.index0 ~ ' is a system turn: the system message must come first') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]


def _content(template: Template, picture: str | None, video: str | None) -> list[str]:
    """The part of the loop that writes one message's content."""
    lines = [
        "{%- if message['content'] is string -%}{{- message['content'] -}}",
        "{%- elif message['content'] -%}",  # null counts as "": an answer of nothing but calls
    ]
    numbered = picture is not None and template.numbered
    if numbered:
        lines.append(
            "{%- set several = "
            + " + ".join(
                f"(message['content'] | selectattr('type', 'equalto', '{kind}') | list | length)"
                for kind in _IMAGES
            )
            + " > 1 -%}"
        )
    lines.append("{%- for part in message['content'] -%}")
    lines.append("{%- if part['type'] == 'text' -%}{{- part['text'] -}}")
    if picture is not None:
        lines.append(f"{{%- elif part['type'] in {_IMAGES} -%}}")
        lines.append("{%- set ns.shown = ns.shown + 1 -%}")
        if numbered:
            lines.append("{%- if several -%}{{- 'Image-' ~ ns.shown ~ ': ' -}}{%- endif -%}")
        lines.append(f"{{{{- {_quote(picture + chr(10))} -}}}}")
    if video is not None:
        lines.append(f"{{%- elif part['type'] == 'video' -%}}{{{{- {_quote(video + chr(10))} -}}}}")
    return [*lines, "{%- endif -%}", "{%- endfor -%}", "{%- endif -%}"]


def _quote(text: str) -> str:
    """A Jinja string literal; JSON's is one, with what it escapes."""
    return json.dumps(text, ensure_ascii=False)
