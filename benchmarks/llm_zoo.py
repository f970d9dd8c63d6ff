"""Language models, unchanged, through the whole flow: plan, prepare, train, save, restore, export, load elsewhere.

Every model is small and has random weights: what is shown is how many of its weights are stored in four bits, why the
rest is not, and whether the logits of the written checkpoint are, bit for bit, those that were trained.

    python benchmarks/llm_zoo.py
    python benchmarks/llm_zoo.py --only Llama Mixtral
    python benchmarks/llm_zoo.py --write docs/zoo.md
"""

import argparse
import json
import os
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from architectures.language import LANGUAGE, LanguageModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import isogrid as ig
from isogrid.errors import IsogridError

RULES = [ig.Rule(match="*", weight="int4/group32:scale=bfloat16", range="absmax")]
"""vLLM's groups of 128 do not divide 64 features."""

TITLE = "## Language models"

UNCALLED = "not called on the example inputs"


@dataclass(frozen=True)
class Row:
    """What became of one model.

    Attributes:
        name: of the architecture.
        stage: the last that was begun, or "done".
        reason: why it failed; empty where it did not.
        weights: share of the parameters that are stored in four bits.
        rest: what the others are and why, with their shares.
        logits: whether those of the checkpoint in transformers, or of the converted model, are the trained ones.
        seconds: for everything.
    """

    name: str
    stage: str
    reason: str = ""
    weights: float | None = None
    rest: str = ""
    logits: str = ""
    seconds: float = 0.0


def attempt(name: str) -> Row:
    """Take one architecture through the flow."""
    stage, start = "build", time.monotonic()
    try:
        entry = LANGUAGE[name]
        model, batch = entry.build(), entry.inputs()
        stage = "plan"
        plan = ig.plan(model, entry.target, "w4a16", RULES, example_inputs=batch)
        share, rest = shares(model, plan)
        stage = "prepare"
        ig.prepare(model, plan)
        stage = "train"
        train(model, [entry.inputs() for _ in range(2)])
        with tempfile.TemporaryDirectory() as folder:
            stage = "save"
            ig.save(model, Path(folder, "run"))
            stage = "restore"
            again = ig.restore(entry.build(), Path(folder, "run")).eval()
            stage = "export"
            outcome = compare(entry, again, logits(model.eval(), batch), batch, Path(folder, "checkpoint"))
    except IsogridError as error:
        return Row(name, stage, f"{type(error).__name__}: {error}", seconds=time.monotonic() - start)
    except Exception:
        return Row(name, stage, traceback.format_exc(), seconds=time.monotonic() - start)
    return Row(name, "done", "", share, rest, outcome, time.monotonic() - start)


def train(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """A step on each batch, towards logits of zero."""
    optimizer = torch.optim.SGD(ig.parameter_groups(model, lr=1e-4))
    model.train()
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).logits.square().mean().backward()
        optimizer.step()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


def compare(entry: LanguageModel, model: nn.Module, expected: Tensor, batch: dict[str, Tensor], folder: Path) -> str:
    """Whether the restored model, the converted one and the checkpoint have the logits that were trained."""
    if not torch.equal(logits(model, batch), expected):
        return "restored: differ"
    if not torch.equal(logits(ig.convert(model), batch), expected):
        return "converted: differ"
    if entry.target == "pytorch":
        return "equal (converted; no checkpoint)"
    loaded = ig.load(ig.export(model, folder).path)
    return "equal" if torch.equal(loaded(*batch.values())[0], expected) else "in transformers: differ"


def shares(model: nn.Module, plan: ig.Plan) -> tuple[float, str]:
    """The share of the parameters that the plan quantises, and what the rest is."""
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(torch.Size(site.shape).numel() for site in plan.sites if site.kind == "weight")
    floats, own = dict(plan.floats), {layer.path for layer in plan.layers}
    places: dict[Tensor, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((path, name))
    left: Counter[str] = Counter()
    for parameter, found in places.items():
        if not any(_is_quantized(path, name, own) for path, name in found):
            reasons = [_why(path, name, parameter, floats) for path, name in found]
            # A shared table may be registered where nobody calls it, too.
            left[next((why for why in reasons if why != UNCALLED), UNCALLED)] += parameter.numel()
    parts = [(count / total, why) for why, count in left.most_common()]
    return quantized / total, "; ".join(f"{100 * part:.1f} % {why}" for part, why in parts if part > 0.0005)


def _is_quantized(path: str, name: str, own: set[str]) -> bool:
    """Whether a parameter is the weight of a layer of the plan."""
    # The children that read the stacks of experts and the weights of Conv1D are there in the prepared model only.
    children = () if name == "bias" else (f"{name}ection", "linear")
    return (name == "weight" and path in own) or any(f"{path}.{child}" in own for child in children)


def _why(path: str, name: str, parameter: Tensor, floats: dict[str, str]) -> str:
    if parameter.dim() < 2 or name.endswith("bias"):
        return "norms and biases"
    near = (why for key, why in floats.items() if path and (key == path or key.startswith(f"{path}.{name}_")))
    reason = next(near, "")
    words = {"heads": "head", "Embedding": "embeddings", "outer": "routers", "Conv1D": "Conv1D", "conv1d": "conv1d"}
    for word, short in words.items():
        if word in reason:
            return short
    return reason or f"{name}, which no layer multiplies by"


COLUMNS = ("model", "weights in 4 bits, %", "the rest", "logits", "seconds")


def cells(row: Row) -> list[str]:
    if row.stage != "done":
        reason = " ".join((row.reason.strip().splitlines() or [""])[-1].split())
        return [row.name, "–", f"failed at {row.stage}: {reason[:200]}", "–", f"{row.seconds:.0f}"]
    assert row.weights is not None
    return [row.name, f"{100 * row.weights:.1f}", row.rest, row.logits, f"{row.seconds:.0f}"]


def section(rows: list[Row]) -> str:
    """The part of docs/zoo.md about language models."""
    import transformers

    done = [row for row in rows if row.stage == "done"]
    equal = sum(row.logits == "equal" for row in done)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | ---: | --- | --- | ---: |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)) + " |" for row in rows]
    table = "\n".join(lines)
    return f"""{TITLE}

{len(rows)} architectures of transformers {transformers.__version__}, dense ones, mixtures of experts, encoders and
encoder-decoders, none of them changed, each taken through plan, prepare, two training steps, save, restore, convert and
export for `vllm` in scheme `w4a16`, with groups of 32:

```console
$ pip install 'isogrid[vllm]'
$ python benchmarks/llm_zoo.py --write docs/zoo.md
```

The models have 64 features and random weights, so that embeddings and heads are a large part of them, as they are not
in models of a real size. {len(done)} come through. For {equal} the logits of the written checkpoint, loaded with
`from_pretrained` of transformers, are bit for bit those of the trained model. GPT-2 and gpt-oss store weights [in, out]
and Granite MoE its experts in one tensor, which compressed-tensors does not pack: for these the converted model is
compared.

{table}
"""


def with_section(text: str, rows: list[Row]) -> str:
    """A page with the section in it, at its end."""
    return re.split(f"^{TITLE}$", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip() + "\n\n" + section(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(LANGUAGE), help="these models alone")
    parser.add_argument("--json", type=Path, help="write the rows here, beside those of others that it already holds")
    parser.add_argument("--write", type=Path, help="put the section into this page")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console, known = Console(), dict[str, Row]()
    if arguments.json is not None and arguments.json.exists():
        known = {row["name"]: Row(**row) for row in json.loads(arguments.json.read_text())}
    for name in track(arguments.only or list(LANGUAGE), console=console):
        known[name] = attempt(name)
        console.print("  ".join(cells(known[name])), markup=False, highlight=False)
        rows = [known[each] for each in LANGUAGE if each in known]
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if arguments.write is not None:
        arguments.write.write_text(with_section(arguments.write.read_text(), rows), encoding="utf-8")
    console.print(f"{sum(row.logits.startswith('equal') for row in rows)} of {len(rows)} equal")


if __name__ == "__main__":
    main()
