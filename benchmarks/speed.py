"""How much faster integers are than float32 in the same runtime: both models in turns, in one run.

    python benchmarks/speed.py
    python benchmarks/speed.py --targets onnxruntime openvino executorch litert --threads 1

ResNet-18 and MobileNetV2, one image of 224x224, random weights. Wall time counts; where other work shares the
processor, `--clock cpu` counts the time that the runtime's process got instead (one thread).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from models import MobileNetV2, ResNet18
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import isogrid as ig
from isogrid.targets import target_from_name
from isogrid.targets.lowering import lower_float
from isogrid.targets.onnx_artifact import export_float
from isogrid.targets.onnx_runtime_session import open_session
from isogrid.targets.processors import adds_products_in_32_bits
from isogrid.targets.subprocesses import Worker

NETWORKS = {"resnet18": ResNet18, "mobilenetv2": MobileNetV2}
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "w8a8": ("w8a8", {}),
    "w7a8": ("w8a8", {"weight": "int7/channel"}),
    "x86": ("x86", {}),
    "w4a8": ("w4a8", {}),
}
"""Scheme, and what every layer is asked for besides."""

CLOCKS = {"wall": "perf_counter", "cpu": "process_time"}
"""Functions of `time`, called in the process that has the runtime."""

Measure = Callable[[int], list[float]]
"""Seconds of each of some runs."""


def quantized(network: str, target: str, variant: str, x: Tensor, path: Path) -> ig.Artifact:
    """The artefact of a network. Values do not change its speed, so a cheap range will do."""
    scheme, wishes = VARIANTS[variant]
    rule = ig.Rule(match="*", range="absmax", scale="frozen", **wishes)
    model = built(network)
    ig.prepare(model, ig.plan(model, target, scheme, [rule], example_inputs=(x,)))
    ig.calibrate(model, [x])
    return ig.export(model.eval(), path)


def built(network: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[network]().eval()


def of_onnx(session: Any, x: Tensor, clock: str) -> Measure:
    feeds, now = {session.get_inputs()[0].name: x.numpy()}, getattr(time, CLOCKS[clock])

    def measure(runs: int) -> list[float]:
        seconds = []
        for _ in range(runs):
            start = now()
            session.run(None, feeds)
            seconds.append(now() - start)
        return seconds

    return measure


@contextmanager
def float_onnxruntime(model: nn.Module, x: Tensor, threads: int, folder: Path, clock: str) -> Iterator[Measure]:
    path = export_float(model, (x,), folder / "float.onnx")
    yield of_onnx(open_session(path, {}, threads), x, clock)


def in_worker(runtime: str, suffix: str) -> Callable[..., Any]:
    """In a process of its own, as the quantised model is."""

    @contextmanager
    def opened(model: nn.Module, x: Tensor, threads: int, folder: Path, clock: str) -> Iterator[Measure]:
        path = lower_float(model, (x,), folder / f"float{suffix}", runtime)
        worker = Worker(runtime)
        try:
            worker.call("load", path=str(path), threads=threads)
            options = {"method": "forward", "clock": CLOCKS[clock]}
            yield lambda runs: list(worker.call("measure", {"0": x}, runs=runs, **options).value)
        finally:
            worker.close()

    return opened


@contextmanager
def float_openvino(model: nn.Module, x: Tensor, threads: int, folder: Path, clock: str) -> Iterator[Measure]:
    """In float32, as the quantised model's float parts are."""
    path = export_float(model, (x,), folder / "float.onnx")
    worker = Worker("openvino")
    try:
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": str(threads)}
        names = worker.call("load", path=str(path), options=options, observed=[], key="float").value["inputs"]
        yield lambda runs: list(
            worker.call("measure", {names[0]: x}, key="float", runs=runs, clock=CLOCKS[clock]).value
        )
    finally:
        worker.close()


FLOAT: dict[str, Callable[..., Any]] = {
    "onnxruntime": float_onnxruntime,
    "openvino": float_openvino,
    "executorch": in_worker("executorch", ".pte"),
    "litert": in_worker("litert", ".tflite"),
}
"""The float32 model in each runtime."""


def of_artifact(artifact: ig.Artifact, x: Tensor, threads: int, clock: str) -> Measure:
    loaded: Any = target_from_name(artifact.target).load(artifact, threads)
    if artifact.target == "onnxruntime":
        return of_onnx(loaded.session, x, clock)
    return lambda runs: list(loaded.measure(x, runs=runs, clock=CLOCKS[clock]))


def compare(network: str, target: str, variants: list[str], threads: int, rounds: int, clock: str) -> dict[str, Any]:
    """Milliseconds of every model, least and median, over rounds in which each runs once."""
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = {v: quantized(network, target, v, x, folder / f"{v}.model") for v in variants}
        with FLOAT[target](built(network), x, threads, folder, clock) as float32:
            contestants = {"float32": float32}
            contestants |= {v: of_artifact(a, x, threads, clock) for v, a in artifacts.items()}
            seconds: dict[str, list[float]] = {label: [] for label in contestants}
            for measure in contestants.values():
                measure(3)
            for _ in range(rounds):
                for label, measure in contestants.items():
                    seconds[label] += measure(1)
    found = {k: {"least": 1e3 * min(s), "median": 1e3 * statistics.median(s)} for k, s in seconds.items()}
    return {"network": network, "target": target, "threads": threads, "clock": clock, "milliseconds": found}


def table(results: list[dict[str, Any]]) -> Table:
    made = Table(title="One image; times in milliseconds, least of all rounds; how many times faster than float32")
    for column in ("network", "runtime", "threads", "clock", "model"):
        made.add_column(column)
    for column in ("least", "median", "faster (least)", "faster (median)"):
        made.add_column(column, justify="right")
    for result in results:
        base = result["milliseconds"]["float32"]
        for label, times in result["milliseconds"].items():
            ratios = (f"{base[key] / times[key]:.2f}" for key in ("least", "median"))
            where = (result["network"], result["target"], str(result["threads"]), result["clock"])
            made.add_row(*where, label, f"{times['least']:.1f}", f"{times['median']:.1f}", *ratios)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--targets", nargs="+", choices=FLOAT, default=["onnxruntime"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["w8a8", "w7a8", "x86"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.clock == "cpu" and options.threads != [1]:
        parser.error("--clock cpu adds up the time of all threads: --threads 1")
    console = Console(width=120)
    console.print(f"VNNI: {'yes' if adds_products_in_32_bits() else 'no'}")
    results = []
    for network in options.networks:
        for target in options.targets:
            variants = options.variants if target == "onnxruntime" else ["w8a8"]
            for threads in options.threads:
                results.append(compare(network, target, variants, threads, options.rounds, options.clock))
    console.print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
