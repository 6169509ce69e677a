"""From text to token numbers and back: characters, bytes, or byte-pair encoding."""

import codecs
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, SupportsIndex

import numpy as np
from etils import epath
from jaxtyping import Int32

from research.core.errors import ConfigError, DataError, nearest

_CHUNK = 1 << 20  # characters that are encoded at once by byte-pair encoding, which needs some 100 bytes of memory for each


class Tokenizer:
    """Text as numbers: every number stands for a piece of UTF-8, so any sequence of numbers can be decoded, also bit by bit."""

    kind: ClassVar[str]
    pieces: tuple[bytes, ...]  # number -> UTF-8 bytes; a piece may end inside a character

    @property
    def vocabulary(self) -> int:
        """The number of different tokens."""
        return len(self.pieces)

    def encode(self, text: str) -> Int32[np.ndarray, "t"]:
        """The token numbers of a text.

        Raises:  DataError: a character that the vocabulary lacks, named with its position.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of token numbers; bytes that form no character become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[SupportsIndex]) -> Iterator[str]:
        """The text piece by piece as numbers arrive; a character of several tokens comes when it is complete.

        Returns: an iterator of strings, some of them empty; joined they equal `decode`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.pieces[i])
        yield decoder.decode(b"", final=True)

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer as one JSON file."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]  # every subclass is a dataclass
        epath.Path(path).write_text(json.dumps({"kind": self.kind, **content}, ensure_ascii=False, indent=1))

    @staticmethod
    def load(path: epath.PathLike) -> "Tokenizer":
        """The tokenizer that `save` wrote.

        Raises:  DataError: a file that is missing or that `save` did not write.
        """
        try:
            content = json.loads(epath.Path(path).read_text())
            return _KINDS[content.pop("kind")](**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no tokenizer: {type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Characters(Tokenizer):
    """One token for each character.

    Args:    characters: the vocabulary, in the order of its numbers.
             unknown: the character of the vocabulary that stands for every other one; None: another one is an error.
    """

    characters: str
    unknown: str | None = None
    kind: ClassVar[str] = "char"

    @staticmethod
    def fit(text: str, unknown: str | None = None) -> "Characters":
        """The tokenizer of the characters of a text, sorted."""
        return Characters("".join(sorted({*text, *(unknown or "")})), unknown)

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The UTF-8 of each character."""
        return tuple(character.encode() for character in self.characters)

    @functools.cached_property
    def _table(self) -> Int32[np.ndarray, "code"]:
        """Code point -> number, -1 where there is none."""
        codes = _codes(self.characters)
        table = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)  # the last entry stands for all larger code points
        table[codes] = np.arange(len(codes), dtype=np.int32)
        return table

    def encode(self, text: str) -> Int32[np.ndarray, "t"]:
        """The number of each character.

        Raises:  DataError: a character that the vocabulary lacks, named with its position.
        """
        codes = _codes(text)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        missing = np.flatnonzero(ids < 0)
        if not missing.size:
            return ids
        if self.unknown is None:
            place = int(missing[0])
            raise DataError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}) at position {place} is not among the {self.vocabulary} of the vocabulary; "
                "leave it out, or train with data.unknown or data.tokenizer=byte"
            )
        ids[missing] = self.characters.index(self.unknown)
        return ids


@dataclasses.dataclass(frozen=True)
class Bytes(Tokenizer):
    """One token for each UTF-8 byte: no text is unknown."""

    kind: ClassVar[str] = "byte"
    pieces: ClassVar[tuple[bytes, ...]] = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> Int32[np.ndarray, "t"]:
        """The bytes."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class BytePairs(Tokenizer):
    """Byte-level byte-pair encoding, trained by the `tokenizers` library: no text is unknown.

    Args:    model: the library's own JSON.
    Source:  Sennrich et al. 2016; byte level as in GPT-2 (Radford et al. 2019).
    """

    model: str
    kind: ClassVar[str] = "bpe"

    @staticmethod
    def fit(text: str, vocabulary: int) -> "BytePairs":
        """The tokenizer trained on a text; at least the 256 bytes, at most `vocabulary` tokens.

        Raises:  ConfigError: a vocabulary that cannot hold the 256 bytes.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocabulary < 256:
            raise ConfigError(f"data.vocabulary={vocabulary} cannot hold the 256 bytes that byte-pair encoding starts from")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(_chunks(text), trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
        return BytePairs(tokenizer.to_str())

    @functools.cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.model)

    @functools.cached_property
    def pieces(self) -> tuple[bytes, ...]:
        """The bytes of each token."""
        byte_of = _byte_alphabet()
        return tuple(bytes(byte_of[x] for x in self._library.id_to_token(i)) for i in range(self._library.get_vocab_size()))

    def encode(self, text: str) -> Int32[np.ndarray, "t"]:
        """The numbers of the tokens that the library finds."""
        parts = self._library.encode_batch(list(_chunks(text)), add_special_tokens=False)
        return np.concatenate([np.array(part.ids, np.int32) for part in parts] or [np.zeros(0, np.int32)])


_KINDS: dict[str, Any] = {kind.kind: kind for kind in (Characters, Bytes, BytePairs)}


def fit_tokenizer(kind: str, text: str, *, vocabulary: int, unknown: str | None = None) -> Tokenizer:
    """The tokenizer of a kind, fitted to the training text.

    Args:    kind: char, byte or bpe.  vocabulary: size of a bpe vocabulary.  unknown: for char: what stands for characters not in the text.
    Raises:  ConfigError: an unknown kind, or too small a vocabulary.
    """
    if kind == "char":
        return Characters.fit(text, unknown)
    if kind == "bpe":
        return BytePairs.fit(text, vocabulary)
    if kind != "byte":
        raise ConfigError(f"data.tokenizer={kind!r} is unknown{nearest(kind, _KINDS)}")
    return Bytes()


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _chunks(text: str) -> Iterator[str]:
    return (text[i : i + _CHUNK] for i in range(0, len(text), _CHUNK))


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
