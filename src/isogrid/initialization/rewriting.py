"""What changed in a model's weights before quantisation."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewriting:
    """Changes of a float model's weights that cancel out.

    Attributes:
        changed: for each change, what it is and where: `('smoothed', 'norm1', 'fc1, fc2')`.
        kept: what was left as it was, and why.

    It prints as a list.

    >>> print(Rewriting((("smoothed", "norm", "fc"),), (("mix", "its input is read by add"),)))
    smoothed norm: fc
    left mix: its input is read by add
    """

    changed: tuple[tuple[str, str, str], ...]
    kept: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{what} {where}: {which}" for what, where, which in self.changed]
        return "\n".join([*lines, *(f"left {where}: {why}" for where, why in self.kept)])
