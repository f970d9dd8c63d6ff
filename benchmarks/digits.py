"""Accuracy of the quickstart over several seeds: float, float with the same extra training, PTQ and QAT.

    python benchmarks/digits.py --seeds 0 1 2

Every figure is from ONNX Runtime on the test split. The last columns say how far a model is from the better of the two
float models, in percentage points, and what QAT is held to.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from isogrid.recipes.quickstart import quickstart

HELD_TO = {"W8A8": 0.3, "W4A8": 0.5, "W2A8": 1.5, "TERNARY-A8": 2.0}
"""Percentage points below float, at most, as a mean over seeds."""

Accuracies = dict[tuple[str, str], list[float]]


def measure(seeds: list[int]) -> tuple[Accuracies, int]:
    """Accuracy in per cent of every model, one entry a seed, and how many codes differed in all."""
    found: Accuracies = defaultdict(list)
    differing = 0
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for row in quickstart(Path(folder), seed=seed).rows:
                found[row.name, row.method].append(100 * row.accuracy)
                differing += row.differing_codes or 0
    return found, differing


def table(found: Accuracies) -> Table:
    reference = mean(found["float", "float"])
    extra = mean(found["float", "float-extra"])
    shown = Table(title="Test accuracy, %, mean ± standard deviation over seeds", title_justify="left")
    for column in ("model", "method", "accuracy", "below float", "held to"):
        shown.add_column(column, justify="left" if column in ("model", "method") else "right")
    for (name, method), values in found.items():
        spread = stdev(values) if len(values) > 1 else 0.0
        bound = HELD_TO.get(name.upper()) if method == "qat" else None
        gap = max(reference, extra) - mean(values)
        shown.add_row(
            name, method, f"{mean(values):.2f} ± {spread:.2f}", f"{gap:.2f}", "" if bound is None else f"{bound}"
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write the accuracies here")
    arguments = parser.parse_args()
    found, differing = measure(arguments.seeds)
    Console().print(table(found))
    Console().print(f"Differing codes, all models and seeds: {differing}")
    if arguments.json is not None:
        rows = [{"name": n, "method": m, "accuracy_percent": v} for (n, m), v in found.items()]
        arguments.json.write_text(
            json.dumps({"seeds": arguments.seeds, "differing_codes": differing, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
