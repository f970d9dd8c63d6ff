"""What numbers exist: grids, granularities, formats, their names and their packing. Imports torch alone."""

from isogrid.formats.catalog import format_names, named_format
from isogrid.formats.codebooks import kmeans_grid
from isogrid.formats.floats import ExponentGrid, FloatGrid, NativeGrid
from isogrid.formats.format import Affine, Format, Quantized
from isogrid.formats.granularity import (
    Granularity,
    PerChannel,
    PerFlatGroup,
    PerGroup,
    PerHead,
    PerTensor,
    PerTile,
    PerToken,
)
from isogrid.formats.grid import Grid, IntegerGrid
from isogrid.formats.tables import LookupGrid, VectorGrid

__all__ = [
    "Affine",
    "ExponentGrid",
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
    "PerHead",
    "PerTensor",
    "PerTile",
    "PerToken",
    "Quantized",
    "VectorGrid",
    "format_names",
    "kmeans_grid",
    "named_format",
]
