"""Prints a table: one trained model in few bits, by PTQ, QAT, distillation, adapters and block by block.

    pip install -c constraints.txt -e '.[benchmarks]'
    python benchmarks/methods.py minilm --folder runs/methods
    python benchmarks/methods.py language --folder runs/language

Each method starts from the same calibrated model and takes the same steps on the same batches; each result is exported
and verified in the target's runtime: how many stored codes differ, how many that integers make of the runtime's own
inputs, and how far float operations are apart. Rows that the folder has already are not made again, so that a run that
was stopped goes on.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.utils import logging

import isogrid as ig

METHODS = ("ptq-absmax", "ptq", "qat", "qad", "lora", "blockwise")


class Subject(Protocol):
    """A trained model, what it trains on, and how it is judged.

    Attributes:
        columns: what `figures` gives.
        schemes: (target, scheme) to try.
        task: name of the task's loss.
        blocks: names of the model's blocks.
        rates: learning rates of `qat`, `qad`, `adapters` and `blocks`.
    """

    columns: ClassVar[tuple[str, ...]]
    schemes: ClassVar[tuple[tuple[str, str], ...]]
    task: ClassVar[str]
    blocks: ClassVar[str]
    rates: ClassVar[dict[str, float]]

    def float_model(self) -> nn.Module: ...
    def batches(self, steps: int) -> Iterator[Any]: ...
    def inputs(self, batch: Any) -> dict[str, Tensor]: ...
    def task_loss(self, model: nn.Module, batch: Any) -> Tensor: ...
    def distillation_loss(self, model: nn.Module, batch: Any) -> Tensor: ...
    def figures(self, model: nn.Module) -> tuple[str, ...]: ...
    def held_out_inputs(self) -> dict[str, Tensor]: ...


class Trial:
    """One subject in one scheme, by each method.

    Args:
        subject: what is quantised.
        target, scheme: how.
        steps: of training; block by block, of each block.
    """

    def __init__(self, subject: Subject, target: str, scheme: str, steps: int):
        self.subject, self.target, self.scheme, self.steps = subject, target, scheme, steps
        self.start: nn.Module | None = None

    def model(self, method: str) -> nn.Module:
        """The trained model of a method."""
        if method == "ptq-absmax":
            return self._calibrated([ig.Rule(match="*", range="absmax")])
        if self.start is None:
            self.start = self._calibrated([])
        model = copy.deepcopy(self.start)
        if method == "qat":
            self._train(model, self.subject.task_loss, self.subject.rates["qat"])
        elif method == "qad":
            self._train(model, self.subject.distillation_loss, self.subject.rates["qad"])
        elif method == "lora":
            ig.add_adapters(model, rank=16)
            self._train(model, self.subject.distillation_loss, self.subject.rates["adapters"])
        elif method == "blockwise":
            batches = [self.subject.inputs(batch) for batch in self.subject.batches(self.steps)]
            settings = ig.Blockwise(epochs=1, lr=self.subject.rates["blocks"])
            ig.train_blockwise(model, batches, settings, blocks=self.subject.blocks)
        return model

    def _calibrated(self, rules: list[ig.Rule]) -> nn.Module:
        batches = [self.subject.inputs(batch) for batch in self.subject.batches(4)]
        model = self.subject.float_model()
        plan = ig.plan(model, self.target, self.scheme, rules, example_inputs=batches[0])
        return ig.calibrate(ig.prepare(model, plan), batches)

    def _train(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], lr: float) -> None:
        # So near the float model, larger steps only lead away from it.
        lr *= 0.1 if self.scheme.startswith("w8") else 1
        schedule = ig.Schedule(model, total_steps=self.steps)
        optimizer = torch.optim.AdamW(ig.parameter_groups(model, lr=lr))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        model.train()
        for batch in self.subject.batches(self.steps):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            decay.step()
            schedule.step()


def proof(model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """What differs between a model and its artefact: stored codes, codes that integers make, and float operations."""
    with tempfile.TemporaryDirectory() as folder:
        report = ig.verify(model, ig.export(model, Path(folder) / "model"), [inputs])
    exact = [check for check in report.replays if check.bound == 0]
    bounded = [check.max_difference for check in report.replays if check.bound > 0 and not check.of_codes]
    stored = sum(check.differing for check in report.parameters)
    parts = [f"{'holds' if report else 'FAILS'}: stored {stored} of {sum(c.compared for c in report.parameters):,}"]
    if exact:
        parts.append(f"integers {sum(c.differing for c in exact)} of {sum(c.compared for c in exact):,}")
    if bounded:
        parts.append(f"floats within {max(bounded):.0e}" if max(bounded) else "floats equal")
    if report.end_to_end.logits_equal:
        parts.append("outputs equal")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=("minilm", "language"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--schemes", nargs="+", help="by default all of the subject")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    subject = subject_of(arguments.subject, arguments.folder)
    path = arguments.folder / f"{arguments.subject}.json"
    rows: dict[str, list[str]] = json.loads(path.read_text()) if path.is_file() else {}
    names = {
        "ptq-absmax": "PTQ, largest magnitudes", "ptq": "PTQ, least squares", "qat": f"QAT, {subject.task}",
        "qad": "QAT, distilled (QAD)", "lora": "LoRA-QAT, distilled", "blockwise": "block by block",
    }  # fmt: skip
    head = ("target", "scheme", "method", *subject.columns, "artefact against model", "seconds")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    print(f"| – | float | – | {' | '.join(subject.figures(subject.float_model()))} | – | – |", flush=True)
    for target, scheme in subject.schemes:
        if arguments.schemes is not None and scheme not in arguments.schemes:
            continue
        trial = Trial(subject, target, scheme, arguments.steps)
        for method in arguments.methods:
            key = f"{target} {scheme} {method}"
            if key not in rows:
                rows[key] = [target, scheme, names[method], *measured(trial, method)]
                path.write_text(json.dumps(rows, indent=2))
            print(f"| {' | '.join(rows[key])} |", flush=True)


def measured(trial: Trial, method: str) -> list[str]:
    """Figures, proof and seconds of one row."""
    start = time.perf_counter()
    torch.manual_seed(0)
    model = trial.model(method).eval()
    seconds = time.perf_counter() - start
    return [*trial.subject.figures(model), proof(model, trial.subject.held_out_inputs()), f"{seconds:.0f}"]


def subject_of(name: str, folder: Path) -> Subject:
    if name == "minilm":
        from sentence_encoder import SentenceEncoder

        return SentenceEncoder()
    from language_model import LanguageModel

    return LanguageModel(folder)


if __name__ == "__main__":
    main()
