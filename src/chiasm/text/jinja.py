"""A chat template as the Jinja source that servers and transformers read.

Source: `Template` (chiasm.text.templates), and the dialect of transformers' `chat_template.jinja`: `messages` with a
role and a content that is a string or a list of parts, `add_generation_prompt`, `bos_token`.

A server puts its own words in the place of a picture: what stands there is the caller's (`<image>` for the original
layout, the context token for `-hf`), and a newline follows it, as in `chiasm.data.message`. Pictures are numbered as
the template numbers them; tags that a user writes into a text are not looked for.
"""

from __future__ import annotations

import json

from chiasm.text.templates import Template

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
    lines = ["{%- set ns = namespace(shown=0) -%}"]
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


def _content(template: Template, picture: str | None, video: str | None) -> list[str]:
    """The part of the loop that writes one message's content."""
    lines = [
        "{%- if message['content'] is string -%}{{- message['content'] -}}",
        "{%- else -%}",
    ]
    numbered = picture is not None and template.numbered
    if numbered:
        lines.append(
            "{%- set several = message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 -%}"
        )
    lines.append("{%- for part in message['content'] -%}")
    lines.append("{%- if part['type'] == 'text' -%}{{- part['text'] -}}")
    if picture is not None:
        lines.append("{%- elif part['type'] == 'image' -%}")
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
