"""Pictures made of characters."""

import numpy as np
from torch import Tensor

BARS = " ▁▂▃▄▅▆▇█"
WIDTH = 32


def histogram(codes: Tensor, low: int, high: int) -> str:
    """How often each code from low to high occurs, as a line of bars; neighbours share a bar where there are many.

    >>> import torch
    >>> histogram(torch.tensor([-1, 0, 0, 0, 0, 1, 1]), -1, 1)
    '▂█▄'
    """
    values = codes.detach().flatten().float().numpy()
    counts, _ = np.histogram(values, bins=min(high - low + 1, WIDTH), range=(low - 0.5, high + 0.5))
    tallest = max(int(counts.max()), 1)
    # A code that occurs at all shows: rounded up.
    return "".join(BARS[-(-int(count) * (len(BARS) - 1) // tallest)] for count in counts)
