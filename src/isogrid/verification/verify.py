"""Verify: hold everything a runtime computes against `convert(model)`."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from isogrid.errors import ArtifactError
from isogrid.planning.convert import convert, watched
from isogrid.planning.plan import Plan
from isogrid.planning.state import prepared_state
from isogrid.targets import Artifact, LoadedModel, read_artifact, target_from_name
from isogrid.training.calibration import arguments_of
from isogrid.verification.graph import check_graph
from isogrid.verification.parameters import check_parameters
from isogrid.verification.report import EndToEnd, ReplayCheck, SiteCheck, VerificationReport
from isogrid.verification.tally import Tally

RELATIVE_BOUND = 1e-6
"""Float outputs agree to this share of the largest output where the runtime adds up in an order of its own."""


def verify_artifact(
    model: nn.Module,
    artifact: Artifact | str | Path,
    batches: Iterable[Any],
    metric: Callable[[Tensor, Any], float] | None = None,
) -> VerificationReport:
    """Run an artefact on data and compare stored tensors, codes, single operations, the graph and the outputs.

    Args:
        model: prepared, or already converted.
        artifact: what was exported from it, or its path.
        batches: as for `isogrid.calibrate`; at least one example in all.
        metric: of (outputs, batch); averaged over the batches, weighted by examples.

    Raises:
        ArtifactError: the file is missing, corrupt or truncated; or there is no data to verify with.
    """
    artifact = read_artifact(artifact.path if isinstance(artifact, Artifact) else artifact)
    plan = prepared_state(model).plan
    reference = convert(model)
    loaded = target_from_name(artifact.target).load(artifact)
    run = _Run(reference, loaded, plan)
    for batch in batches:
        run.add(batch, metric)
    if run.end.examples == 0:
        raise ArtifactError("There is nothing to verify with. Pass at least one batch with at least one example.")
    exact = all(layer.arithmetic == "static" for layer in plan.layers if layer.input is not None) and bool(run.sites)
    return VerificationReport(
        artifact=str(artifact.path),
        target=artifact.target,
        exact=exact,
        parameters=check_parameters(reference, artifact),
        sites=tuple(SiteCheck(name, *tally.counts, int(tally.largest)) for name, tally in run.sites.items()),
        replays=tuple(run.replay_checks()),
        graph=check_graph(reference, artifact, plan, run.first_inputs),
        end_to_end=run.end.result(),
        problems=tuple(run.problems()),
    )


class _Run:
    """Runs both models batch by batch and keeps tallies."""

    def __init__(self, reference: nn.Module, loaded: LoadedModel, plan: Plan):
        self.reference, self.loaded, self.plan = reference, loaded, plan
        self.sites: dict[str, Tally] = {}
        self.replays: dict[str, Tally] = {}
        self.float_replays: dict[str, Tally] = {}
        self.unknown: set[str] = set()
        self.end = _EndToEndTally()
        self.first_inputs: tuple[Any, ...] = ()

    def add(self, batch: Any, metric: Callable[[Tensor, Any], float] | None) -> None:
        inputs = arguments_of(batch, len(self.plan.inputs))
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in inputs):
            return
        self.first_inputs = self.first_inputs or inputs
        seen = self.loaded.observe(*inputs)
        codes: dict[str, Tensor] = {}

        def note(name: str, values: Tensor) -> Tensor:
            codes[name] = values
            return values

        with torch.no_grad(), watched(self.reference, note):
            expected = _first_tensor(self.reference(*inputs))
        for name, values in seen.codes.items():
            if name in codes:
                self.sites.setdefault(site_of(name), Tally()).add(values, codes[name])
            else:
                self.unknown.add(name)
        self._replay(inputs, seen.codes, seen.outputs[0])
        self._replay_float(seen.layers)
        self.end.add(seen.outputs[0], expected, batch, metric)

    def _replay(self, inputs: tuple[Any, ...], seen: dict[str, Tensor], outputs: Tensor) -> None:
        """Every operation of the reference on the codes that the runtime had before it."""

        def substitute(name: str, values: Tensor) -> Tensor:
            if name not in seen:
                return values
            self.replays.setdefault(site_of(name), Tally()).add(seen[name], values)
            return seen[name]

        with torch.no_grad(), watched(self.reference, substitute):
            replayed = _first_tensor(self.reference(*inputs))
        if seen:
            self.float_replays.setdefault("outputs", Tally()).add(outputs, replayed)

    def _replay_float(self, layers: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (x, y) in layers.items():
            with torch.no_grad():
                self.float_replays.setdefault(name, Tally()).add(y, self.reference.get_submodule(name)(x))

    def replay_checks(self) -> Iterator[ReplayCheck]:
        """The checks of single operations, codes first."""
        for name, tally in self.replays.items():
            yield ReplayCheck(name, *tally.counts, tally.largest, 0.0)
        for name, tally in self.float_replays.items():
            yield ReplayCheck(name, *tally.counts, tally.relative, RELATIVE_BOUND)

    def problems(self) -> Iterator[str]:
        """Quantised tensors that only one side knows."""
        for name in sorted(self.unknown):
            yield f"the artefact has a quantised tensor {name!r} that the model does not have"
        if self.sites or self.plan.operations:
            for site in self.plan.sites:
                if site.kind != "weight" and site.name not in self.sites:
                    yield f"the artefact has no quantised tensor for the site {site.name!r}"


class _EndToEndTally:
    """Statistics of whole outputs."""

    def __init__(self) -> None:
        self.examples = 0
        self.equal = True
        self.largest = self.agreeing = self.kl = self.metric = self.reference_metric = 0.0
        self.has_metric = False

    def add(self, actual: Tensor, expected: Tensor, batch: Any, metric: Any) -> None:
        count = len(actual)
        self.examples += count
        self.equal = self.equal and torch.equal(actual, expected)
        self.largest = max(self.largest, float((actual - expected).abs().max()))
        self.agreeing += float((actual.argmax(-1) == expected.argmax(-1)).float().mean()) * count
        log_p, log_q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
        self.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) * count
        if metric is not None:
            self.has_metric = True
            self.metric += metric(actual, batch) * count
            self.reference_metric += metric(expected, batch) * count

    def result(self) -> EndToEnd:
        n = self.examples
        metrics = (self.metric / n, self.reference_metric / n) if self.has_metric else (None, None)
        return EndToEnd(n, self.equal, self.largest, self.agreeing / n, self.kl / n, *metrics)


def site_of(name: str) -> str:
    """A quantised tensor's name in the file as the plan has it.

    >>> site_of("layer1.operations.sites.add.output")
    'layer1.add.output'
    """
    return name.replace("operations.sites.", "")


def _first_tensor(outputs: Any) -> Tensor:
    return next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
