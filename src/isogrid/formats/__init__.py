"""What numbers exist: grids, granularities, formats, their names and their packing. Imports torch alone."""

from isogrid.formats.catalog import format_names, named_format
from isogrid.formats.format import Affine, Format, Quantized
from isogrid.formats.granularity import Granularity, PerChannel, PerFlatGroup, PerGroup, PerTensor, PerTile, PerToken
from isogrid.formats.grid import FloatGrid, Grid, IntegerGrid, LookupGrid, NativeGrid, VectorGrid

__all__ = [
    "Affine",
    "FloatGrid",
    "Format",
    "Granularity",
    "Grid",
    "IntegerGrid",
    "LookupGrid",
    "NativeGrid",
    "PerChannel",
    "PerFlatGroup",
    "PerGroup",
    "PerTensor",
    "PerTile",
    "PerToken",
    "Quantized",
    "VectorGrid",
    "format_names",
    "named_format",
]
