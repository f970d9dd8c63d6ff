"""Files that are whole or not there."""

import os
from pathlib import Path
from uuid import uuid4

from isogrid.errors import IsogridError


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file so that a reader sees the old text or the new, never a part; missing folders are made.

    The text goes to a temporary file in the same folder, reaches the disk, and then takes the place of the old file.

    Raises:
        IsogridError: the file could not be written; what was there before is untouched.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "new" / "result.json", "{}").read_text()
    '{}'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise IsogridError(
            f"{path} could not be written: {error.strerror or error}. What was there before is untouched. "
            "Make room or choose a folder that can be written to, then run again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
