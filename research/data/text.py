"""Text for next-token prediction: windows of one long sequence of tokens."""

import dataclasses
import glob
import math
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Int, Int32

from research.core.errors import ConfigError, DataError
from research.core.spec import Spec, fields
from research.data.checks import check_tokens, existing, located
from research.data.dataset import Dataset
from research.data.preprocess import Preprocessor
from research.data.split import Share, cut
from research.data.tokenizers import Tokenizer, fit_tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Stretches of `time` tokens with the token that follows each as its target.

    With `overlap`, an example is a window at any offset, and an epoch draws as many of them as cover the tokens once. Without, windows
    follow each other, every token but the first is a target exactly once, and the last window is filled up with mask False.

    Args:    tokens: the sequence.  time: tokens of a window.  bytes_per_token: bytes of text for each token that is a target; NaN: unknown.
    """

    tokens: Int32[np.ndarray, "n"]
    time: int
    overlap: bool
    bytes_per_token: float = math.nan

    @property
    def whole(self) -> "Windows":
        """The same text as windows that do not overlap, for a pass over all of it."""
        return dataclasses.replace(self, overlap=False)

    @property
    def draws(self) -> int:
        """Windows in an epoch."""
        return math.ceil((len(self.tokens) - 1) / self.time)

    def __len__(self) -> int:
        return len(self.tokens) - self.time if self.overlap else self.draws

    def take(self, indices: Int[np.ndarray, "b"]) -> dict[str, np.ndarray]:
        """tokens, target and mask [b, t] of these windows."""
        start = indices if self.overlap else indices * self.time
        place = start[:, None] + np.arange(self.time, dtype=np.int32)  # b t
        last = len(self.tokens) - 1
        mask = place < last
        if not self.overlap:
            place = np.minimum(place, last - 1)
        return {"tokens": self.tokens[place], "target": self.tokens[place + 1], "mask": mask}

    def check(self, spec: Spec, where: str) -> None:
        """Refuses tokens outside the vocabulary.

        Raises:  DataError: naming the first one and its position.
        """
        check_tokens(self.tokens, spec["vocabulary"], where)


def text(
    root: str,
    path: str,
    tokenizer: str = "char",
    vocabulary: int = 4096,
    unknown: str | None = None,
    time: int = 64,
    validation: Share = 0.1,
    test: Share = 0.0,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """A data set of any UTF-8 text: the first part to train on, the next to validate, the last to test.

    Args:    root: the folder that a relative path starts from.  path: a file or a glob; several files are joined in sorted order.
             tokenizer: char | byte | bpe, fitted to the training part.  vocabulary: tokens of a bpe.
             unknown: for char: the character that stands for those which the training part lacks; null: such a one is an error.
             time: context length in tokens.  validation, test: characters, or a share of them.
             fitted: what a run has fitted, which comes before `tokenizer`; null: fit here.
    Raises:  DataError: a missing file, one that is not UTF-8, too short a text, a character not in the vocabulary.
    """
    return split_text(_read(root, path), tokenizer, vocabulary, unknown, time, validation, test, fitted, where=path)


def python_docs(
    tokenizer: str = "char",
    vocabulary: int = 4096,
    unknown: str | None = None,
    time: int = 64,
    validation: Share = 0.1,
    test: Share = 0.0,
    fitted: Preprocessor | None = None,
) -> Dataset:
    """The language reference that comes with CPython, about 460,000 characters; arguments as of `text`."""
    from pydoc_data.topics import topics

    content = "\n".join(topics[name] for name in sorted(topics))
    return split_text(content, tokenizer, vocabulary, unknown, time, validation, test, fitted, where="pydoc_data.topics")


def split_text(
    content: str,
    tokenizer: str,
    vocabulary: int,
    unknown: str | None,
    time: int,
    validation: Share,
    test: Share,
    fitted: Preprocessor | None,
    where: str,
) -> Dataset:
    """The data set of a text in memory; arguments as of `text`."""
    if time < 1:
        raise ConfigError(f"data.time={time}: the context needs at least 1 token")
    if not content:
        raise DataError(f"{where} is empty")
    parts = {name: content[part] for name, part in cut(len(content), validation=validation, test=test).items()}
    known = (fitted.tokenizer if fitted else None) or fit_tokenizer(tokenizer, parts["train"], vocabulary=vocabulary, unknown=unknown)
    tokens = {name: _encode(known, part, time + 1 if name == "train" else 2, f"{where}, {name} part") for name, part in parts.items()}
    splits = {name: Windows(part, time, name == "train", _bytes_per_token(parts[name], part, known)) for name, part in tokens.items()}
    judged = "validation" if "validation" in parts else "train"
    spec = {
        "fields": fields(mask=(time,), tokens=((time,), "int32"), target=((time,), "int32")),
        "vocabulary": known.vocabulary,
        "time": time,
        "bytes_per_token": splits[judged].bytes_per_token,
        "examples": {name: source.draws for name, source in splits.items()},
    }
    return Dataset(splits, Preprocessor(spec, known))


def _encode(tokenizer: Tokenizer, content: str, least: int, where: str) -> Int32[np.ndarray, "n"]:
    try:
        tokens = tokenizer.encode(content)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    if len(tokens) < least:
        raise DataError(f"{where} is too short: {len(tokens)} tokens of at least {least} that data.time needs")
    return tokens


def _bytes_per_token(content: str, tokens: Int32[np.ndarray, "n"], tokenizer: Tokenizer) -> float:
    """Bytes for each predicted token; the first token of a text is given, not predicted."""
    return (len(content.encode()) - len(tokenizer.pieces[tokens[0]])) / (len(tokens) - 1)


def _read(root: str, path: str) -> str:
    full = located(root, path)
    if not any(sign in path for sign in "*?[") or full.exists():
        return _decoded([existing(full)])
    found = [epath.Path(name) for name in sorted(glob.glob(str(full), recursive=True))]
    files = [file for file in found if file.is_file()]
    if not files:
        raise DataError(f"no file fits {full}")
    return _decoded(files)


def _decoded(files: Iterable[epath.Path]) -> str:
    parts = []
    for file in files:
        if file.is_dir():
            raise DataError(f"{file} is a folder; name a file in it, or a glob as {file}/*.txt")
        try:
            parts.append(file.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from error
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return "\n".join(parts)
