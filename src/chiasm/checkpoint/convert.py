"""Convert an InternVL checkpoint between its public layouts: original, `-hf` and the older `-hf` prefix.

Source: the layouts' own specifications in `original.py` and `hf.py`. Tensors stream from mapped files to shards and
keep every bit; the config keeps every key (see `config.py`); the tokenizer travels along, with the few facts that
each layout wants elsewhere: the id of `<IMG_CONTEXT>`, the processor's settings, the token that ends an answer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from chiasm.checkpoint.adapters import OpenedCheckpoint, adapter_for, detect_layout, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.edit import (
    Draft,
    Part,
    check_apart,
    draft_of,
    extract,
    with_image_size,
    with_language,
    with_vocabulary,
)
from chiasm.checkpoint.lora import MergedReader
from chiasm.checkpoint.preprocess import (
    IMAGE_PROCESSOR,
    PROCESSOR,
    VIDEO_PROCESSOR,
    preprocessor_files,
    read_tile_policy,
)
from chiasm.checkpoint.store import CheckpointReader, read_json, write_checkpoint
from chiasm.errors import CheckpointError, ConfigError, UsageError
from chiasm.text.jinja import to_jinja
from chiasm.text.templates import TEMPLATES, Template, get_template
from chiasm.text.tokenizer import Tokenizer

__all__ = [
    "GENERATION",
    "TOKENIZER_CONFIG",
    "ConvertReport",
    "Target",
    "added_tokens",
    "companion_files",
    "completed",
    "convert",
    "convert_draft",
    "convert_part",
    "has_template",
]

Target = Literal["original", "hf", "hf-old"]

GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

_TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)
_PROCESSOR_FILES = (IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR)
# Names under which the processor of transformers asks its tokenizer for these tokens.
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
# What stands for a picture in a chat template: what servers look for in the original layout, and the context token,
# which the processor of transformers multiplies itself.
_PICTURES = {"original": ("<image>", "<video>"), "hf": ("<IMG_CONTEXT>", "<video>")}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        source: layout that was read.
        target: layout that was written.
        folder: where.
        tensors: how many tensors were written.
        bytes: their size.
        shards: the weight files.
        files: the other files beside ``config.json``.
        notes: what the user should know, one sentence each.
    """

    source: str
    target: str
    folder: str
    tensors: int
    bytes: int
    shards: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self)


def convert(
    src: str | Path,
    dst: str | Path,
    to: Target,
    *,
    force: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    image_token_id: int | None = None,
    language: str | Path | None = None,
    template: str | None = None,
    vocab_size: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    verify: Callable[[Path], None] | None = None,
) -> ConvertReport:
    """Write the InternVL checkpoint in ``src`` to ``dst`` in another layout, changed on the way if wanted.

    Args:
        src: a checkpoint folder of any InternVL layout; LoRA adapters that training has saved are merged.
        dst: the folder to write; it appears whole or not at all.
        to: ``"original"`` (remote code), ``"hf"`` (the parameter names of transformers), ``"hf-old"`` (the names and
            config keys that its releases before 5 know; it reads both).
        force: replace ``dst`` if it is a checkpoint folder.
        max_shard_bytes: a weight file is closed before it would grow beyond this.
        image_token_id: id of ``<IMG_CONTEXT>``, where ``src`` has neither tokenizer nor a note of it.
        language: folder of a language model alone, to take the place of the source's (`edit.with_language`).
        template: name of the chat template to note; None keeps the source's.
        vocab_size: rows of word table and output matrix (`edit.with_vocabulary`).
        image_size: side of a tile in pixels (`edit.with_image_size`).
        seed: of what is drawn at random for a new language model or new rows.
        verify: called with the finished folder before it appears; what it raises leaves no trace of it.

    Raises:
        UsageError: the target is unknown, or ``dst`` is ``src``, holds it or lies in it.
        CheckpointError: ``src`` cannot be read or ``dst`` cannot be written.
        ConfigError: the target layout cannot express the model, or a change does not fit it.
        TemplateError: the template is unknown, or does not fit the new language model's tokenizer.
    """
    src, dst = Path(src), Path(dst)
    if to not in get_args(Target):
        raise UsageError(f"unknown layout {to!r}: convert to one of {', '.join(get_args(Target))}")
    check_apart(src, dst)
    if language is not None:
        check_apart(Path(language), dst)
    opened = open_checkpoint(src)
    with opened.reader, tempfile.TemporaryDirectory() as made:
        if opened.public is None or opened.vision is None:
            raise UsageError(f"{src} is a language model alone: it has one layout only, nothing to convert")
        opened.adapter.check(opened.reader)
        if template is not None:
            _ = get_template(template)
        draft = draft_of(opened, completed(opened, opened.public, image_token_id))
        words = src
        if language is not None:
            draft = with_language(draft, language, template=template, seed=seed)
            words = _words_folder(Path(made), draft, Path(language))
        if vocab_size is not None:
            needed = 1 + max([*added_tokens(words).values(), draft.public.image_token_id or 0])
            draft = with_vocabulary(draft, vocab_size, needed=needed, seed=seed)
        if image_size is not None:
            draft = with_image_size(draft, image_size)
        public = draft.public if template is None else replace(draft.public, template=template)
        return _written(
            opened,
            replace(draft, public=public),
            Path(made),
            words,
            dst,
            to,
            max_shard_bytes=max_shard_bytes,
            force=force,
            verify=verify,
        )


def convert_draft(
    opened: OpenedCheckpoint,
    draft: Draft,
    dst: str | Path,
    to: Target,
    *,
    force: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> ConvertReport:
    """Write a model that was put together in memory, whole or not at all.

    Args:
        opened: whose folder holds the files that belong to the words; the draft's tokenizer, where it has one, takes
            the place of that folder's.
        draft: the model.
        dst: the folder to write.
        to: the layout.
        force: replace ``dst`` if it is a checkpoint folder.
        verify: called with the finished folder before it appears; what it raises leaves no trace of it.

    Raises:
        UsageError, CheckpointError, ConfigError: as of `convert`.
    """
    folder = opened.reader.folder
    check_apart(folder, Path(dst))
    with opened.reader, tempfile.TemporaryDirectory() as made:
        words = folder if draft.tokenizer is None else _words_folder(Path(made), draft, folder)
        return _written(opened, draft, Path(made), words, Path(dst), to, force=force, verify=verify)


def _written(
    opened: OpenedCheckpoint,
    draft: Draft,
    made: Path,
    words: Path,
    dst: Path,
    to: Target,
    *,
    max_shard_bytes: int = 5_000_000_000,
    force: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> ConvertReport:
    """Write a draft with all files beside its weights; ``words`` is where those of the words are."""
    public = draft.public
    adapter = adapter_for(
        to, language=draft.language, vision=draft.vision, downsample_ratio=public.downsample_ratio
    )
    config = public.to_original() if to == "original" else public.to_hf(old=to == "hf-old")
    tokens = words if to == "original" else _fast_folder(made, words)
    files = _files(opened, public, to, words, tokens)
    written = write_checkpoint(
        dst,
        adapter.to_public(draft.tensors),
        config,
        max_shard_bytes=max_shard_bytes,
        files=files,
        force=force,
        verify=verify,
    )
    notes = (*draft.notes, *_notes(opened, draft, public, to, words))
    return ConvertReport(
        source=opened.layout,
        target=to,
        folder=str(dst),
        tensors=written.tensors,
        bytes=written.bytes,
        shards=written.shards,
        files=tuple(sorted(files)),
        notes=notes,
    )


def convert_part(src: str | Path, dst: str | Path, part: Part, *, force: bool = False) -> ConvertReport:
    """Write the encoder, the projector or the language model of ``src`` to ``dst`` (see `edit.extract`).

    The tokenizer goes with the language model, as transformers reads it, and the image processor with the encoder.

    Raises:
        UsageError, CheckpointError, ConfigError: as of `edit.extract`.
    """
    src = Path(src)
    with tempfile.TemporaryDirectory() as made:
        found: dict[str, Path] = {}
        if part == "vision":
            found = {IMAGE_PROCESSOR: src}
        elif part == "language":
            found = {**dict.fromkeys(_TOKENIZER_FILES, _fast_folder(Path(made), src)), GENERATION: src}
        files = {name: folder / name for name, folder in found.items() if (folder / name).is_file()}
        written = extract(src, dst, part, files=files, force=force)
    with open_checkpoint(src).reader as reader:
        layout, notes = detect_layout(reader.config, reader), _merged(reader)
    return ConvertReport(
        source=layout,
        target=part,
        folder=str(dst),
        tensors=written.tensors,
        bytes=written.bytes,
        shards=written.shards,
        files=tuple(sorted(files)),
        notes=notes,
    )


def _merged(reader: CheckpointReader) -> tuple[str, ...]:
    """A note on adapters that were merged."""
    if not isinstance(reader, MergedReader):
        return ()
    return (f"LoRA adapters of {reader.merged} weights were merged",)


def completed(
    opened: OpenedCheckpoint, public: InternVLPublicConfig, image_token_id: int | None
) -> InternVLPublicConfig:
    """The public config with what other files of the folder know, in the form that both layouts can be made of."""
    folder = opened.reader.folder
    stated = image_token_id if image_token_id is not None else public.image_token_id
    found = added_tokens(folder).get("<IMG_CONTEXT>")
    if stated is not None and found is not None and stated != found:
        raise CheckpointError(
            f"{folder}: <IMG_CONTEXT> has the id {found} in the tokenizer but {stated} is stated: correct one"
        )
    token = stated if stated is not None else found
    if token is not None and not 0 <= token < opened.language.vocab_size:
        raise ConfigError(
            f"the id {token} of <IMG_CONTEXT> is outside the {opened.language.vocab_size} rows of the word table"
        )
    policy = read_tile_policy(folder, public, _source_layout(opened))
    return replace(
        public,
        tie_words=opened.language.tie_words,
        image_token_id=token,
        min_dynamic_patch=policy.min_tiles,
        max_dynamic_patch=policy.max_tiles,
        force_image_size=_forced_size(public, policy.image_size),
    )


def _source_layout(opened: OpenedCheckpoint) -> Target:
    if opened.layout == "text":
        raise UsageError(f"{opened.reader.folder} is a language model alone")
    return opened.layout


def _forced_size(public: InternVLPublicConfig, side: int) -> int | None:
    return side if public.force_image_size or side != public.vision["image_size"] else None


def _words_folder(made: Path, draft: Draft, language: Path) -> Path:
    """A folder with the files that belong to a new language model's words."""
    if draft.tokenizer is not None:
        draft.tokenizer.save(made)
    if (language / GENERATION).is_file():
        shutil.copyfile(language / GENERATION, made / GENERATION)
    return made


def _fast_folder(made: Path, words: Path) -> Path:
    """Where the tokenizer's files are; a slow tokenizer is written to ``made``, for its class may be remote code."""
    slow = any((words / name).is_file() for name in ("vocab.json", "tokenizer.model"))
    if (words / "tokenizer.json").is_file() or not slow:
        return words
    Tokenizer.from_file(words).save(made)
    return made


def companion_files(opened: OpenedCheckpoint, public: InternVLPublicConfig) -> dict[str, str | bytes | Path]:
    """All files of a checkpoint but weights and config, as the original layout has them; for models built on one.

    Remote code is not among them: it would be that of another model.

    Raises:
        UsageError: it is a language model alone.
    """
    folder = opened.reader.folder
    files = _files(opened, public, "original", folder, folder)
    return {name: content for name, content in files.items() if not name.endswith(".py")}


def _files(
    opened: OpenedCheckpoint, public: InternVLPublicConfig, to: Target, words: Path, tokens: Path
) -> dict[str, str | bytes | Path]:
    """Everything beside weights and config.json.

    What belongs to the words comes from the folder ``words``, the tokenizer's own files from ``tokens``.
    """
    folder, source = opened.reader.folder, _source_layout(opened)
    files: dict[str, str | bytes | Path] = {
        name: tokens / name for name in _TOKENIZER_FILES if (tokens / name).is_file()
    }
    same_family = (source == "original") == (to == "original")
    own_words = words.resolve() == folder.resolve()
    policy = read_tile_policy(folder, opened.public or public, source)
    if same_family:
        names = (*_PROCESSOR_FILES, *((CHAT_TEMPLATE, "chat_template.json") if own_words else ()))
        files |= {name: folder / name for name in names if (folder / name).is_file()}
    if not same_family or policy.image_size != public.image_size:
        policy = replace(policy, image_size=public.image_size)
        made = preprocessor_files(policy, to, tokens_per_tile=public.tokens_per_tile)
        files |= {name: _text(content) for name, content in made.items()}
    if to != "original" and not (same_family and own_words) and TOKENIZER_CONFIG in files:
        files[TOKENIZER_CONFIG] = _text(_with_named_tokens(read_json(tokens / TOKENIZER_CONFIG)))
    if not (same_family and own_words and has_template(words)):
        source_text = _chat_template(public, to, tokens)
        files |= {} if source_text is None else {CHAT_TEMPLATE: source_text}
    if to == "original" and source == "original":
        # Not read here, and no part of a checkpoint for Chiasm; servers that trust them want them beside it.
        files |= {path.name: path for path in sorted(folder.glob("*.py")) if path.is_file()}
    generation = _generation(words, public)
    if generation:
        files[GENERATION] = _text(generation)
    return files


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _with_named_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer config under which the processor of transformers finds its tokens by name."""
    stored = config.get("extra_special_tokens")
    out = dict(config)
    if isinstance(stored, list):
        # A plain list takes the place that the names need; its tokens stay special by their added-token entries.
        out["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *stored]
        stored = None
    out["extra_special_tokens"] = {**_NAMED_TOKENS, **(stored or {})}
    return out


def _template_of(public: InternVLPublicConfig) -> Template | None:
    return TEMPLATES.get(public.template or "internvl2_5")


def has_template(folder: Path) -> bool:
    """Whether the files of a tokenizer bring a chat template."""
    if any((folder / name).is_file() for name in (CHAT_TEMPLATE, "chat_template.json")):
        return True
    path = folder / TOKENIZER_CONFIG
    return path.is_file() and read_json(path).get("chat_template") is not None


def _chat_template(public: InternVLPublicConfig, to: Target, tokens: Path) -> str | None:
    """The Jinja source of the model's own template; None where it has no such form."""
    template = _template_of(public)
    if template is None:
        return None
    begin = template.bos and _has_words(tokens) and _puts_begin(tokens)
    picture, video = _PICTURES["original" if to == "original" else "hf"]
    return to_jinja(template, system=public.system_message, picture=picture, video=video, bos=begin)


def _puts_begin(folder: Path) -> bool:
    """Whether a tokenizer starts a text with its begin token; not for one that is only carried along, unread."""
    try:
        tokenizer = Tokenizer.from_file(folder)
    except CheckpointError:
        return False
    begin = tokenizer.bos_id
    return begin is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [begin]


def _has_words(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))


def _generation(folder: Path, public: InternVLPublicConfig) -> dict[str, Any]:
    """``generation_config.json``: the source's, with the chat's stop token among its ends.

    The language models' own end token is another one (``</s>`` in InternLM's), and the remote code stops by its
    template, so a source may well not name it; servers stop by this file.
    """
    path = folder / GENERATION
    config = read_json(path) if path.is_file() else {}
    template = _template_of(public)
    stop = added_tokens(folder).get(template.stop if template else "<|im_end|>")
    if stop is None:
        return config
    ends = config.get("eos_token_id", public.llm.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if stop not in ends:
        ends = [stop, *ends]
    return {**config, "eos_token_id": ends[0] if len(ends) == 1 else ends}


def added_tokens(folder: str | Path) -> dict[str, int]:
    """Added tokens of a tokenizer folder and their ids, from whichever of its files lists them.

    Raises:
        CheckpointError: a file is malformed.
    """
    folder = Path(folder)
    found: dict[str, int] = {}
    path = folder / "added_tokens.json"
    if path.is_file():
        found |= {token: index for token, index in read_json(path).items() if isinstance(index, int)}
    path = folder / TOKENIZER_CONFIG
    if path.is_file():
        table = read_json(path).get("added_tokens_decoder")
        for index, token in (table if isinstance(table, dict) else {}).items():
            known = isinstance(token, dict) and isinstance(token.get("content"), str)
            if known and index.isdecimal() and len(index) <= 10:  # int() refuses thousands of digits
                found[token["content"]] = int(index)
    path = folder / "tokenizer.json"
    if path.is_file():
        listed = read_json(path).get("added_tokens")
        for token in listed if isinstance(listed, list) else []:
            if (
                isinstance(token, dict)
                and isinstance(token.get("content"), str)
                and isinstance(token.get("id"), int)
            ):
                found[token["content"]] = token["id"]
    return found


def _notes(
    opened: OpenedCheckpoint, draft: Draft, public: InternVLPublicConfig, to: Target, words: Path
) -> list[str]:
    notes = []
    if not _has_words(words):
        notes.append("the source has no tokenizer files: none were written")
    notes += _merged(opened.reader)
    if to == "original":
        if draft.language.tie_words:
            notes.append("tied words were written out as a second matrix, as the original layout needs")
        if not any(opened.reader.folder.glob("*.py")) or opened.layout != "original":
            notes.append(
                "transformers needs the release's Python files beside an original checkpoint; Chiasm does not"
            )
        return notes
    if public.dynamic_image_size and not public.use_thumbnail:
        notes.append("the processor of transformers always adds a thumbnail; the source does not")
    if not public.dynamic_image_size:
        notes.append("the processor of transformers cuts tiles unless called with crop_to_patches=False")
    if public.pad2square:
        notes.append("the processor of transformers does not pad to a square; the source does")
    return notes
