"""Files that are written whole or not at all."""

import json
import os
import secrets
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from isogrid.errors import CheckpointError, IsogridError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside the path, flush it to disk and rename it; a failure changes nothing.

    Args:
        path: of the file; its folder is made if missing.
        write: called with the path of the temporary file.

    Raises:
        CheckpointError: the file cannot be written; what was there is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder) / "new" / "greeting.txt", lambda path: path.write_text("hello"))
    ...     (Path(folder) / "new" / "greeting.txt").read_text()
    'hello'
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
        temporary.touch(exist_ok=False)  # by the umask, unlike tempfile, whose files nobody else may read
    except OSError as error:
        raise CheckpointError(f"Cannot write to {path.parent}: {error.strerror or error}.") from error
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        rename(temporary, path)
    except IsogridError:  # of what is being written, which says itself what to do
        raise
    except Exception as error:
        # safetensors reports a full disk as an error of its own, so the kind of exception says little here.
        raise CheckpointError(f"Cannot write {path}: {error}. What was there before is untouched.") from error
    finally:
        temporary.unlink(missing_ok=True)


def rename(source: Path, target: Path) -> None:
    """Give a file another name in its folder, lasting also if the power fails in the next moment."""
    source.replace(target)
    if os.name == "posix":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, data: Any) -> None:
    """JSON, written whole."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1), encoding="utf-8"))


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    hasher = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            hasher.update(block)
    return hasher.hexdigest()
