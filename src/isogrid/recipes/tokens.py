"""From text to tokens: tokenizers, files of token ids, and sequences packed from them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from isogrid.errors import MissingExtraError, RecipeError
from isogrid.files import write_whole

CHUNK = 1 << 20
"""Characters of a file that are tokenised at a time, about."""

END = "<|endoftext|>"
"""The built-in tokenizer's token between documents."""


class Packed(Dataset[tuple[Tensor, Tensor]]):
    """A stream of tokens cut into sequences of one length, without padding and without looking at documents' ends.

    An example is (input_ids, targets), int64 [length] each: the targets are the input one token later. What does not
    fill a sequence at the end is left out.

    Args:
        tokens: integers [tokens], in memory or memory-mapped; only what is asked for is read.
        length: of a sequence.

    >>> [ids.tolist() for pair in [Packed(np.arange(8), 3)[1]] for ids in pair]
    [[3, 4, 5], [4, 5, 6]]
    """

    def __init__(self, tokens: np.ndarray[Any, Any], length: int):
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        piece = self.tokens[index * self.length : (index + 1) * self.length + 1].astype(np.int64)
        return torch.from_numpy(piece[:-1]), torch.from_numpy(piece[1:])


@lru_cache(maxsize=4)
def byte_level_tokenizer(documents: tuple[str, ...], vocabulary: int) -> Any:
    """A tokenizer of byte pairs (Sennrich et al., arXiv 1508.07909) as GPT-2 has it, learned from documents.

    The same documents give the same tokenizer. It knows every byte, so no text is unknown to it.

    Args:
        documents: to learn from.
        vocabulary: tokens, the 256 bytes and the end of a document among them.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    needs_transformers("The built-in tokenizer")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False)


def pretrained_tokenizer(name: str) -> Any:
    """A tokenizer of Hugging Face by its name or folder.

    Raises:
        RecipeError: there is none.
        MissingExtraError: transformers is not installed.
    """
    needs_transformers("A tokenizer")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"data: no tokenizer can be loaded from {name!r}: {_first_line(error)}") from error


def needs_transformers(what: str) -> None:
    """Raise MissingExtraError, which says what to install, where transformers is missing."""
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{what} needs the package {error.name}, which is not installed. "
            "Install it with: pip install 'isogrid[transformers]'"
        ) from error


def token_file(documents: Iterable[Iterable[str]], tokenizer: Any, path: Path) -> np.ndarray[Any, Any]:
    """Tokenise documents into a file, a piece at a time, and map it into memory.

    Each document is followed by the tokenizer's end-of-text token, where it has one. The file is whole or not there.

    Args:
        documents: each in pieces, which are tokenised one by one; read once, in order.
        tokenizer: of transformers.
        path: of the file; if it is there, it is taken as it is.

    Returns:
        uint32 [tokens], memory-mapped.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda temporary: _write_tokens(documents, tokenizer, temporary))
    return np.memmap(path, np.uint32, "r") if path.stat().st_size else np.empty(0, np.uint32)


def _write_tokens(documents: Iterable[Iterable[str]], tokenizer: Any, path: Path) -> None:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    with path.open("wb") as file:
        for document in documents:
            for piece in document:
                # Longer than the model's context is what packing is there for, and no reason to warn.
                ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                np.asarray(ids, np.uint32).tofile(file)
            np.asarray(end, np.uint32).tofile(file)


def text_files(pattern: str) -> list[Path]:
    """The files of a path or a pattern with wildcards, in order; raises RecipeError where there is none.

    >>> text_files("/nowhere/*.txt")
    Traceback (most recent call last):
    isogrid.errors.RecipeError: data: there is no file /nowhere/*.txt. Give a text file, a .jsonl file, or a pattern.
    """
    found = sorted(Path(path) for path in glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise RecipeError(f"data: there is no file {pattern}. Give a text file, a .jsonl file, or a pattern.")
    return found


def documents_of(paths: Iterable[Path], column: str = "text") -> Iterator[Iterable[str]]:
    """The documents of files: a text file is one, in pieces of whole lines; a .jsonl file has one a line.

    Args:
        paths: of the files.
        column: key of the text in the objects of a .jsonl file.

    Raises:
        RecipeError: a file is not UTF-8, not JSON, or an object lacks the key.
    """
    for path in paths:
        pieces = _pieces(path)
        if path.suffix != ".jsonl":
            yield pieces
        else:
            lines = (line for piece in pieces for line in piece.splitlines())
            yield from ([_text_of(line, column, f"{path}:{number}")] for number, line in enumerate(lines, 1))


def _pieces(path: Path) -> Iterator[str]:
    """A file in pieces that end with a line, so that it need not fit into memory and no word is cut."""
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(CHUNK):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data: {path} is not a readable text file in UTF-8: {_first_line(error)}.") from error


def _text_of(line: str, column: str, place: str) -> str:
    try:
        return str(json.loads(line)[column])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"data: {place} is no JSON object with a key {column!r}. Name it by `column`.") from error


def cached(kind: str, *parts: str) -> Path:
    """Where tokens are kept that come from these parts: a digest of them names a file in the user's cache."""
    return in_cache("tokens", f"{kind}-{{}}.uint32", *parts)


def in_cache(folder: str, name: str, *parts: str) -> Path:
    """A file in a folder of the user's cache, with a digest of what it comes from in its name, at `{}`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isogrid"
    return cache / folder / name.format(hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24])


def tokenizer_digest(tokenizer: Any) -> str:
    """What tells tokenizers apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(paths: Iterable[Path]) -> str:
    """What tells files apart, without reading them: names, sizes and times of change."""
    return json.dumps([(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths])


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
