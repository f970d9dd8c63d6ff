"""Architectures, unchanged, through the whole flow: plan, prepare, calibrate, train, convert, export, verify.

Every model is small and has random weights: what is shown is how much of it computes in integers and whether ONNX
Runtime computes what was trained, not accuracy. A model that fails must fail with an error of Isogrid's.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --only ResNet BERT --json zoo.json
    python benchmarks/zoo.py --write docs/zoo.md
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from architectures import ZOO
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import isogrid as ig
from isogrid.errors import IsogridError
from isogrid.planning.values import tensors_in

RULES = [ig.Rule(match="*", range="minmax")]
"""Random weights need no search for the best range, and without it calibration takes a tenth of the time."""

LAYER_OPERATORS = ("convolution", "addmm", "mm")
"""What PyTorch calls to multiply by weights; other products are of activations with each other."""


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        name: of the architecture.
        stage: the last that was begun, or "verified".
        reason: why it failed; empty where it did not.
        inside: whether the error is none of Isogrid's own.
        layers, products: share of the multiplications that ONNX Runtime does on integers: of convolutions and linear
            layers, and of all.
        differing, compared: codes.
        seconds: for everything.
    """

    name: str
    stage: str
    reason: str = ""
    inside: bool = False
    layers: float | None = None
    products: float | None = None
    differing: int | None = None
    compared: int | None = None
    seconds: float = 0.0

    @property
    def verified(self) -> bool:
        """Whether every bound of the verification held."""
        return self.stage == "verified"


def run(model: nn.Module, inputs: Any) -> Any:
    """A model's result on a tuple of arguments or a dictionary of them."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


class Multiplications(TorchDispatchMode):
    """Counts multiplications with accumulation, by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.counts[func._overloadpacket.__name__] += flops // 2
        return result


def multiplications(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """Multiplications of a float model for one batch: those with weights, and all."""
    # Without fused kernels, so that attention and an LSTM show their products.
    plain = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain[0], plain[1], Multiplications() as found:
        run(model.eval(), inputs)
    return sum(found.counts[name] for name in LAYER_OPERATORS), sum(found.counts.values())


def train(model: nn.Module, batches: list[Any]) -> None:
    """A step on each batch, towards zero."""
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-4))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        outputs: list[Tensor] = [x for x in tensors_in(run(model, batch)) if x.requires_grad]
        torch.stack([x.square().mean() for x in outputs]).sum().backward()
        optimizer.step()


def attempt(name: str) -> Row:
    """Take one architecture through the flow."""
    stage, start = "build", time.monotonic()

    def failed(reason: str, inside: bool) -> Row:
        return Row(name, stage, reason, inside, seconds=time.monotonic() - start)

    try:
        torch.manual_seed(0)
        architecture = ZOO[name]
        model, batches = architecture.build(), [architecture.inputs() for _ in range(2)]
        of_layers, of_all = multiplications(model, batches[0])
        stage = "plan"
        plan = ig.plan(model, "onnxruntime", "w8a8", RULES, example_inputs=batches[0])
        stage = "prepare"
        ig.prepare(model, plan)
        stage = "calibrate"
        ig.calibrate(model, batches)
        stage = "train"
        train(model, batches)
        stage = "convert"
        ig.convert(model)
        with tempfile.TemporaryDirectory() as folder:
            stage = "export"
            artifact = ig.export(model, Path(folder, "model.onnx"))
            stage = "verify"
            report = ig.verify(model, artifact, batches)
    except IsogridError as error:
        return failed(f"{type(error).__name__}: {error}", inside=False)
    except Exception:
        return failed(traceback.format_exc(), inside=True)
    layers = {layer.path for layer in plan.layers} | {
        f"{operation.scope}.{operation.site}".lstrip(".")
        for operation in plan.operations
        if operation.kind in ("linear", "convolution")
    }
    examples = 2
    integer = [(check.name, check.macs * examples) for check in report.graph if check.arithmetic == "integer"]
    own = sum(macs for path, macs in integer if path in layers or path.rpartition("_")[0] in layers)
    # The integer form of a transposed convolution multiplies by zeros too: what is left in float is held against that.
    floats = [
        (check.name, check.macs * examples)
        for check in report.graph
        if check.arithmetic != "integer" and check.planned != "no"
    ]
    # What no output depends on, such as a head for training, is in no file and does not count.
    unread = [(check.name, check.macs * examples) for check in report.graph if check.planned == "no"]
    of_layers -= sum(macs for path, macs in unread if path in layers)
    of_all -= sum(macs for _, macs in unread)
    modules = {path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    of_layers = max(of_layers, own + sum(macs for path, macs in floats if path in modules))
    of_all = max(of_all, sum(macs for _, macs in (*integer, *floats)))
    return Row(
        name,
        "verified" if report else "verify",
        "; ".join(report.failures),
        layers=own / of_layers if of_layers else None,
        products=sum(macs for _, macs in integer) / of_all if of_all else None,
        differing=report.differing_codes,
        compared=report.compared_codes,
        seconds=time.monotonic() - start,
    )


def work(pipe: Connection) -> None:
    """Attempt what is asked for until nothing more is."""
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while (name := pipe.recv()) is not None:
        pipe.send(attempt(name))


class Worker:
    """A process for the attempts, so that a model that takes its process down, or never ends, takes no more."""

    def __init__(self, limit: float):
        self.limit = limit
        self.process: BaseProcess | None = None

    def attempt(self, name: str) -> Row:
        """What became of one architecture."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.pipe.send(name)
        try:
            if self.pipe.poll(self.limit):
                return self.pipe.recv()  # type: ignore[no-any-return]
            reason = f"not done in {self.limit:g} s"
        except EOFError:
            reason = "the process died"
        self.close()
        return Row(name, "unknown", reason, inside=True, seconds=self.limit)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def cells(row: Row) -> list[str]:
    codes = "–" if row.compared is None else f"{row.differing:,} / {row.compared:,}"
    reason = row.reason.strip().splitlines()[-1] if row.inside else " ".join(row.reason.split())
    if len(reason) > 240:
        reason = f"{reason[:237]}..."
    verified = "yes" if row.verified else f"no, at {row.stage}"
    return [row.name, share(row.layers), share(row.products), codes, verified, f"{row.seconds:.0f}", reason]


COLUMNS = [
    "architecture",
    "convolutions and linear, %",
    "all products, %",
    "differing / compared codes",
    "verified",
    "seconds",
    "reason",
]


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | ---: | ---: | ---: | --- | ---: | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    return "\n".join(lines)


NOTES = """## What to read out of it

- **Differing codes** all lie behind float arithmetic, where ONNX Runtime's last bit of a normalisation, a softmax or a
  bilinear resize is not PyTorch's: a value that falls on the edge between two codes takes the other one, and the layers
  behind it see that. On the runtime's own inputs no code differs in any row, and the table's models of integers and
  exact operations alone have none.
- **What no output depends on**, such as UperNet's auxiliary head or the pooler of TextNet's encoder, is in no file: the
  report of verification lists it, and the shares leave it out.
- **WavLM** calls `torch.nn.functional.multi_head_attention_forward` with the weights of four `Linear` children that it
  never calls. Those products stay float, with a row in the plan that names the function; a model that calls its
  children has them in integers.
- **Seconds** are nearly all of `torch.onnx.export`, which goes by the number of operations: the LSTM tagger is 48
  unrolled steps, and each is about twenty of them.
"""


def page(rows: list[Row]) -> str:
    """docs/zoo.md."""
    import onnxruntime
    import transformers

    verified = [row for row in rows if row.verified]
    shares = [row.layers for row in verified if row.layers is not None]
    whole = sum(value >= 0.99 for value in shares)
    left = [name for name in ZOO if name not in {row.name for row in rows}]
    missing = f"; not run for it: {', '.join(left)}" if left else ""
    return f"""# The zoo

{len(ZOO)} architectures, none of them changed, each taken through plan, prepare, calibration, two training steps,
convert, export and verification for `onnxruntime` in scheme `w8a8`:

```console
$ pip install 'isogrid[transformers]'
$ python benchmarks/zoo.py --write docs/zoo.md
```

The models are those of transformers {transformers.__version__}, small and with random weights, and four in plain
PyTorch. Ranges go from the smallest to the largest value (`range: minmax`). The shares say how many of a model's
multiplications ONNX Runtime does on integers, read from the graph that it really runs: those of convolutions and linear
layers, and all, products of activations in attention included. Codes are counted end to end; behind float arithmetic,
such as a normalisation, one may differ where a rounding falls otherwise, and verification demands equality only on the
runtime's own inputs ([how](concepts/verification.md)).

The table has {len(rows)} of the {len(ZOO)}{missing}.

{len(verified)} of these are verified; in {whole} at least 99 % of the multiplications of convolutions and linear layers
are done on integers. Measured with torch {torch.__version__} and ONNX Runtime {onnxruntime.__version__} on
{platform.machine()}, one thread, while other work shared the machine:

{markdown(rows)}

{NOTES}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ZOO), help="these architectures alone")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one architecture")
    parser.add_argument("--json", type=Path, help="write the rows here, beside those of others that it already holds")
    parser.add_argument("--write", type=Path, help="write the documentation's page here")
    arguments = parser.parse_args()
    console, worker, known = Console(), Worker(arguments.limit), {}
    if arguments.json is not None and arguments.json.exists():
        known = {row["name"]: Row(**row) for row in json.loads(arguments.json.read_text())}
    for name in track(arguments.only or list(ZOO), console=console):
        known[name] = worker.attempt(name)
        console.print("  ".join(cells(known[name])), markup=False, highlight=False)
        rows = [known[each] for each in ZOO if each in known]
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    worker.close()
    if arguments.write is not None:
        old = arguments.write.read_text(encoding="utf-8") if arguments.write.exists() else ""
        _, mark, language_models = old.partition("\n## Language models\n")  # of llm_zoo.py
        arguments.write.write_text(page(rows) + mark + language_models, encoding="utf-8")
    console.print(f"{sum(row.verified for row in rows)} of {len(rows)} verified")


if __name__ == "__main__":
    main()
