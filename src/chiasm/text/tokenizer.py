"""Tokenizers: text to token ids and back, the same ids as the model's own release.

Source: a folder's ``tokenizer.json`` (the format of the ``tokenizers`` library, which does the work), or the files of a
slow release, converted in memory (``chiasm.text.vocab_files``); and, where there is one, ``tokenizer_config.json`` for
the special tokens' roles and the chat template.

Ids are plain ``list[int]``: this ring needs no tensors.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.text.vocab_files import MODEL, VOCAB, from_model_file, from_vocab_and_merges, read_json

__all__ = ["StreamDecoder", "Tokenizer", "byte_alphabet", "byte_tokenizer"]

_BACKEND_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """A model's tokenizer.

    ``bos_id``, ``eos_id``, ``pad_id`` are ``None`` where the model has no such token; ``chat_template`` is the
    release's Jinja source or ``None``; ``vocab_size`` counts added tokens too; ``special_ids`` is what
    ``skip_special_tokens`` leaves out.
    """

    def __init__(self, backend: Backend, config: dict[str, Any] | None = None) -> None:
        self.backend = backend
        self.config: dict[str, Any] = dict(config or {})
        # A saved truncation or padding rule would cut or stretch a prompt without a word.
        backend.no_truncation()
        backend.no_padding()
        self._refresh()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a folder's tokenizer, or a ``tokenizer.json``, with the ``tokenizer_config.json`` beside it.

        Of a folder the first of these is taken: ``tokenizer.json``; ``vocab.json`` with ``merges.txt``;
        ``tokenizer.model``. A file that is named is read, and no other in its place.

        Raises:
            CheckpointError: there is none, or a file is malformed.
        """
        path = Path(path)
        whole = path.is_dir()
        folder, file = (path, path / _BACKEND_FILE) if whole else (path.parent, path)
        if not whole and not file.is_file():
            raise CheckpointError(
                f"{file}: no such file or folder: give a folder with the model's tokenizer, or its {_BACKEND_FILE}"
            )
        config = read_json(folder / _CONFIG_FILE)
        with _no_panic(str(path)):
            if file.is_file():
                try:
                    backend = Backend.from_file(str(file))
                except Exception as error:  # the library raises bare Exception, for any fault in the file
                    reason = " ".join(str(error).split())[:200]
                    raise CheckpointError(f"{file}: not a tokenizer ({reason}): download it again") from error
            elif (folder / VOCAB).is_file():
                backend, config = from_vocab_and_merges(folder, config)
            elif (folder / MODEL).is_file():
                backend, config = from_model_file(folder, config)
            else:
                raise CheckpointError(
                    f"{file}: no such file, nor {VOCAB} or {MODEL}: give a folder with the model's tokenizer"
                )
        template = folder / _TEMPLATE_FILE
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config)

    def _refresh(self) -> None:
        """Read again what depends on the vocabulary."""
        added = self.backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        self.bos_id = self._role("bos_token")
        self.eos_id = self._role("eos_token")
        self.pad_id = self._role("pad_token")

    def _role(self, name: str) -> int | None:
        value = self.config.get(name)
        if isinstance(value, dict):  # the older spelling: an AddedToken written out
            value = value.get("content")
        if value is None:
            return None
        index = self.backend.token_to_id(value) if isinstance(value, str) else None
        if index is None:
            raise CheckpointError(
                f"{_CONFIG_FILE}: {name} {value!r} is not in the vocabulary: correct one of the two"
            )
        return index

    # --- text and ids ------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of ``text``; a special token written out in it becomes that one id.

        With ``add_special_tokens`` the model's own begin and end tokens come along, as its release adds them.

        Raises:
            DataError: ``text`` is not valid Unicode (a lone surrogate, as undecodable bytes leave behind).
            CheckpointError: the tokenizer is damaged, which only this text brought to light.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                f"pass UTF-8 text"
            ) from None
        explicit = add_special_tokens and ("add_bos_token" in self.config or "add_eos_token" in self.config)
        with _no_panic("the tokenizer's files"):
            ids = self.backend.encode(text, add_special_tokens=add_special_tokens and not explicit).ids
        if explicit:
            # As in transformers: these two switches, once written down, replace the post-processor of the file.
            if self.config.get("add_bos_token") and self.bos_id is not None:
                ids = [self.bos_id, *ids]
            if self.config.get("add_eos_token") and self.eos_id is not None:
                ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.

        Raises:
            DataError: an id is negative or not an integer.
            CheckpointError: the tokenizer is damaged, which only these ids brought to light.
        """
        try:
            with _no_panic("the tokenizer's files"):
                return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise DataError(f"cannot decode ids: {error}: pass non-negative token ids only") from None

    def token_to_id(self, token: str) -> int | None:
        """Return the id of the vocabulary entry spelled ``token``, or ``None``."""
        return self.backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the vocabulary entry of ``index`` in the vocabulary's own spelling, or ``None``."""
        return self.backend.id_to_token(index) if index >= 0 else None

    @property
    def vocab_size(self) -> int:
        """Number of entries, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The release's Jinja chat template, or ``None``."""
        template = self.config.get("chat_template")
        return template if isinstance(template, str) else None

    def add_special_tokens(self, tokens: Iterable[str]) -> int:
        """Make each string one indivisible special token; return how many are new to the vocabulary.

        New ones get the next ids in the order given; one that exists keeps its id, so a second call adds none.

        Raises:
            ConfigError: an empty string.
        """
        tokens = list(tokens)
        if not all(tokens):
            raise ConfigError("a special token is an empty string: give it a spelling such as '<img>'")
        before = self.vocab_size
        self.backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens])
        self._refresh()
        return self.vocab_size - before

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Return a fresh incremental decoder."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    # --- files -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder`` (created if needed).

        The folder opens in transformers' ``AutoTokenizer`` too. Each file is replaced as a whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        _replace(folder / _BACKEND_FILE, self.backend.to_str())
        _replace(
            folder / _CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
        )


class StreamDecoder:
    """Incremental decoding: the pieces of ``push`` and the last one of ``flush`` join to ``decode(all ids)``.

    A piece never ends within a character: bytes that may still become one are held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        # Byte-level vocabularies spell bytes, so a token is exactly its bytes and UTF-8's own decoder does the rest.
        decoder = tokenizer.backend.decoder
        self._bytes_of = _BYTE_OF_CHARACTER if type(decoder).__name__ == "ByteLevel" else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Otherwise: the last token whose text is out (context), and those since then.
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one more id; return the text that is now certain (often one word, sometimes nothing)."""
        if token_id in self._skip:
            return ""
        if self._bytes_of is not None:
            return self._utf8.decode(self._token_bytes(token_id, self._bytes_of))
        self._pending.append(token_id)
        spelled = self._tokenizer.id_to_token(token_id)
        # A byte token's run is decided as a whole, once something else follows it.
        if spelled is None or (len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">")):
            return ""
        piece = self._settle()
        if piece.endswith("\ufffd"):
            return ""
        self._context, self._pending = [token_id], []
        return piece

    def flush(self) -> str:
        """Return what was held back and start afresh."""
        piece = self._utf8.decode(b"", True) if self._bytes_of is not None else self._settle()
        self._utf8.reset()
        self._context, self._pending = [], []
        return piece

    def _token_bytes(self, token_id: int, table: dict[str, int]) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(table[character] for character in token)
        except KeyError:  # an added token spelled in plain text
            return token.encode("utf-8")

    def _settle(self) -> str:
        """Text of the pending ids, seen after their context so that rules for the first token do not apply."""
        if not self._pending:
            return ""
        known = self._tokenizer.decode(self._context, skip_special_tokens=False)
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=False)[len(known) :]


def byte_alphabet() -> dict[int, str]:
    """Return the character that spells each byte in byte-level vocabularies.

    Printable Latin-1 characters stand for themselves; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


_BYTE_OF_CHARACTER = {character: byte for byte, character in byte_alphabet().items()}


@contextlib.contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """Say in one line what the library did not foresee: its panics derive from BaseException."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{what}: damaged, tokenizers fails on them ({reason}): download again"
        ) from error


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as out:
            out.write(text)
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide a shared model from others
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def byte_tokenizer(special: Iterable[str]) -> Tokenizer:
    """Return a tokenizer of one token a byte and these special ones: for toy models, whose vocabulary must be small."""
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer = Tokenizer(backend)
    tokenizer.add_special_tokens(special)
    return tokenizer
