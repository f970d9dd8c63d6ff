"""Which bits where: formats for each weight under a budget."""

from isogrid.search.allocation import Option, allocate
from isogrid.search.types import fit_types

__all__ = ["Option", "allocate", "fit_types"]
