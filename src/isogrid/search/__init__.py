"""Which bits where: formats for each weight under a budget."""

from isogrid.search.allocation import Option, allocate
from isogrid.search.integer_program import optimum
from isogrid.search.lq_lora import fit_lq_lora
from isogrid.search.types import fit_types

__all__ = ["Option", "allocate", "fit_lq_lora", "fit_types", "optimum"]
