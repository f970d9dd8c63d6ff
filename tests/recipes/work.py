"""Work for other processes."""

import os
import signal

from isogrid.errors import IsogridError
from isogrid.recipes.progress import Progress


def double(number: int, progress: Progress) -> tuple[int, int]:
    """Twice a number, and who computed it."""
    with progress.task(f"doubling {number}", 2) as advance:
        advance("half")
        advance("done")
    progress.message(f"doubled {number}")
    return 2 * number, os.getpid()


def fail(number: int, progress: Progress) -> int:
    raise IsogridError(f"{number} cannot be doubled.")


def die(number: int, progress: Progress) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number
