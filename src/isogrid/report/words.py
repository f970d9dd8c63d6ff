"""Numbers as a reader wants them. A missing number is a dash."""

import math
from collections.abc import Sequence

MISSING = "–"
METHOD_NAMES = {"float": "float", "float-extra": "float + extra training", "ptq": "PTQ", "qat": "QAT"}


def whole(number: int | None) -> str:
    """A count with its thousands set apart.

    >>> whole(1234567)
    '1,234,567'
    """
    return MISSING if number is None else f"{number:,}"


def rounded(number: int | None) -> str:
    """A count in few characters, to three digits.

    >>> rounded(999), rounded(3_412_800), rounded(45_120)
    ('999', '3.41 M', '45.1 k')
    """
    if number is None or number < 1000:
        return whole(number)
    return size(number).replace(" kB", " k").replace(" MB", " M").replace(" GB", " G")


def figure(number: float | None, digits: int = 4) -> str:
    """A number to so many significant digits, in as few characters as it needs.

    >>> figure(0.0123456), figure(3.2e-7), figure(0.0), figure(float("nan")), figure(1234567)
    ('0.01235', '3.2e-7', '0', 'NaN', '1,234,567')
    """
    if number is None:
        return MISSING
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "∞" if number > 0 else "-∞"
    if number == int(number) and abs(number) < 1e15:
        return whole(int(number))
    return f"{number:.{digits}g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def percent(share: float | None, digits: int = 2) -> str:
    """A share as per cent, without the sign; a share that is not zero never reads as zero.

    >>> percent(0.98611), percent(0.0), percent(1e-6)
    ('98.61', '0.00', '< 0.01')
    """
    if share is None:
        return MISSING
    smallest = 10.0**-digits
    return f"< {smallest:.{digits}f}" if 0 < 100 * share < smallest / 2 else f"{100 * share:.{digits}f}"


def size(count: float | None) -> str:
    """Bytes in the unit that suits them; 1 kB is 1000 bytes.

    >>> size(912), size(26_412), size(1_200_000)
    ('912 B', '26.4 kB', '1.20 MB')
    """
    if count is None:
        return MISSING
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5 or unit == "GB":
            break
    return f"{count:#.3g}".rstrip(".") + f" {unit}"


def decibel(ratio: float | None) -> str:
    """A ratio in dB; an infinite one means that nothing was lost.

    >>> decibel(31.72), decibel(float("inf")), decibel(None)
    ('31.7', 'exact', '–')
    """
    return MISSING if ratio is None else "exact" if ratio == math.inf else f"{ratio:.1f}"


def milliseconds(time: float | None) -> str:
    """A time to a microsecond, or to three digits where it is long.

    >>> milliseconds(0.0834), milliseconds(123.4)
    ('0.083', '123')
    """
    return MISSING if time is None else f"{time:.3f}" if time < 10 else f"{time:.1f}" if time < 100 else f"{time:,.0f}"


def times(ratio: float | None) -> str:
    """A speed-up.

    >>> times(3.42)
    '3.42×'
    """
    return MISSING if ratio is None else f"{ratio:.2f}×"


def yes(truth: bool | None) -> str:
    """A truth as a word.

    >>> yes(True), yes(False), yes(None)
    ('yes', 'no', '–')
    """
    return MISSING if truth is None else "yes" if truth else "no"


def shape(sizes: Sequence[int]) -> str:
    """The shape of a tensor.

    >>> shape((16, 3, 3, 3)), shape(())
    ('16 × 3 × 3 × 3', 'scalar')
    """
    return " × ".join(str(length) for length in sizes) or "scalar"


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "layer"), plural(2400, "layer")
    ('1 layer', '2,400 layers')
    """
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
