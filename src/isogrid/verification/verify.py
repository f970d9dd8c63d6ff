"""Verify: hold everything a runtime computes against `convert(model)`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.errors import ArtifactError
from isogrid.formats import named_format
from isogrid.formats.floats import ExponentGrid
from isogrid.layers.kernels import KERNELS
from isogrid.planning.convert import convert
from isogrid.planning.plan import Plan
from isogrid.planning.state import prepared_state
from isogrid.planning.values import tensors_in
from isogrid.targets import Artifact, LoadedModel, Observed, load_artifact, read_artifact
from isogrid.verification.deployment import Deployment
from isogrid.verification.graph import check_graph
from isogrid.verification.names import Paths, first_call, site_of
from isogrid.verification.outputs import Metric, Outputs, batch_size
from isogrid.verification.parameters import check_parameters
from isogrid.verification.reference import Quantization, View, viewed
from isogrid.verification.replay import Replays
from isogrid.verification.report import SiteCheck, VerificationReport
from isogrid.verification.survey import survey
from isogrid.verification.tally import Tally


def verify_artifact(
    model: nn.Module,
    artifact: Artifact | str | Path,
    batches: Iterable[Any],
    metric: Metric | None = None,
) -> VerificationReport:
    """Run an artefact on data and compare stored tensors, codes, single operations, the graph and the outputs.

    Args:
        model: prepared, or already converted; it is left as it is.
        artifact: what was exported from it, or its path.
        batches: as for `isogrid.calibrate`; at least one example in all.
        metric: of (outputs, batch), outputs as the model returns them; averaged over the batches, weighted by examples.

    Raises:
        ArtifactError: the file is missing, corrupt or truncated; or there is no data to verify with.
        TargetError: the runtime cannot run the file, or not on these inputs.
    """
    artifact = read_artifact(artifact.path if isinstance(artifact, Artifact) else artifact)
    plan = prepared_state(model).plan
    verification = _Verification(convert(model).cpu(), load_artifact(artifact), plan, metric)
    for batch in batches:
        verification.add(batch)
    return replace(verification.report(), notes=_notes(model))


def _notes(model: nn.Module) -> tuple[str, ...]:
    names = prepared_state(model).requantized
    if not names:
        return ()
    return (
        f"the artefact is the model as it was merged, and that is not what was trained: merging {', '.join(names)} "
        "(qlora) quantised the weights anew. isogrid.merge_difference(model, batches) measures it, before the merge.",
    )


class _Verification:
    """Runs both models batch by batch and keeps tallies."""

    def __init__(self, reference: nn.Module, loaded: LoadedModel, plan: Plan, metric: Metric | None):
        self.reference, self.loaded, self.plan, self.metric = reference, loaded, plan, metric
        self.paths = Paths(reference)
        self.stored = self.paths.tensors(loaded.stored())
        self.sites: dict[str, Tally] = {}
        self.exact: dict[str, bool] = {}
        self.unknown: set[str] = set()
        self.first: tuple[Any, ...] | None = None
        self.output_counts = (0, 0)

    def add(self, batch: Any) -> None:
        """One batch; an empty one is skipped."""
        inputs = tuple(x.detach().cpu() for x in self.plan.arguments.of_batch(batch))
        examples = batch_size(inputs)
        if examples == 0:
            return
        if self.first is None:
            self._begin(inputs)
        noted = _Notes()
        with torch.no_grad(), viewed(self.reference, noted):
            result = self.run(inputs)
        seen = self._observed(inputs, noted.seen)
        expected = tensors_in(result)
        self.output_counts = len(seen.outputs), len(expected)
        for name, values in seen.codes.items():
            if name in noted.seen:
                site = site_of(name)
                self.sites.setdefault(site, Tally()).add(values, noted.seen[name])
                self.exact[site] = self.exact.get(site, True) and self.survey.codes_from[name].exact
            else:
                self.unknown.add(name)
        for name in noted.seen.keys() & self.stored.keys():  # the codes of a parameter
            self.sites.setdefault(site_of(name), Tally()).add(self.stored[name], noted.seen[name])
            self.exact[site_of(name)] = True
        self.deployment.add(seen)
        self.replays.add(inputs, seen, noted.seen, expected)
        self.outputs.add(seen.outputs, result, batch, examples)

    def run(self, inputs: tuple[Tensor, ...]) -> Any:
        """The reference's result on the tensors that an artefact takes."""
        positional, named = self.plan.arguments.filled(inputs)
        return self.reference(*positional, **named)

    def _observed(self, inputs: tuple[Any, ...], noted: Mapping[str, Tensor]) -> Observed:
        """What the runtime computes, under the reference's names and in its shapes."""
        outputs, codes, layers, watched, states = self.loaded.observe(*inputs)
        named = self.paths.tensors(codes)
        for name in named.keys() & noted.keys():
            if named[name].numel() == noted[name].numel():  # a file may have the rows of a Linear before their shape
                named[name] = named[name].reshape(noted[name].shape)
        by_call = dict(zip(self.paths.calls(layers), layers.values(), strict=True))
        return Observed(outputs, named, by_call, watched, states)

    def _begin(self, inputs: tuple[Any, ...]) -> None:
        self.first = inputs
        share = code_bound(self.plan)
        self.survey = survey(self.reference, self.run, inputs, reproduced=share == 0)
        self.replays = Replays(self.reference, self.run, self.survey, share)
        self.deployment = Deployment(self.survey)
        self.outputs = Outputs(self.survey.outputs, self.metric)

    def report(self) -> VerificationReport:
        """All checks."""
        if self.first is None:
            raise ArtifactError("There is nothing to verify with. Pass at least one batch with at least one example.")
        producers = self.paths.tensors(self.loaded.producers())
        operators = self.loaded.multiplications()
        names = self.paths.calls(operator.name for operator in operators)
        operators = tuple(replace(op, name=name) for op, name in zip(operators, names, strict=True))
        return VerificationReport(
            artifact=str(self.loaded.artifact.path),
            target=self.loaded.artifact.target,
            parameters=check_parameters(self.reference, self.stored, self._unread_modules()),
            graph=check_graph(self.survey.work, batch_size(self.first), operators, producers, self.plan),
            replays=tuple(self.replays.checks({name: op.operator for name, op in producers.items()})),
            sites=tuple(
                SiteCheck(name, *tally.counts, tally.largest, self.exact[name]) for name, tally in self.sites.items()
            ),
            outputs=self.outputs.checks(),
            end_to_end=self.outputs.result(),
            problems=tuple(self._problems()),
            unread=tuple(site for site in self._missing() if site in self._unread()),
            deployment=tuple(self.deployment.checks()),
        )

    def _missing(self) -> list[str]:
        """Sites that the artefact has under no name."""
        computed = self.survey.computed
        present = {computed[name] for name in computed if site_of(name) in self.sites}
        # What is computed twice, the exporter computes once. What no input changes, it computes beforehand: what is
        # made of it shows whether that is right.
        again = {site_of(name) for name, number in computed.items() if number in present}
        seen = self.sites.keys() | again | {site_of(name) for name in self.survey.constants}
        # What a float product rounds as it reads it has a scale in the file, and codes nowhere.
        seen |= {layer.input.grid for layer in self.plan.layers if layer.input and layer.arithmetic == "float"}
        # Caches hold codes that graphs do not name: their scales are compared, or what the runtime read of them.
        return [s.name for s in self.plan.sites if s.kind not in ("weight", "state") and s.name not in seen]

    def _unread(self) -> set[str]:
        """Sites that no output depends on, in any call."""
        read = {first_call(site_of(name)) for name in self.survey.computed.keys() - self.survey.unread}
        return {site_of(name) for name in self.survey.unread} - read

    def _unread_modules(self) -> set[str]:
        """Modules that no output depends on, in any call."""
        codes = {name.rpartition(".")[0] for name in self.survey.computed.keys() - self.survey.unread}
        return self.survey.unread_modules - codes

    def _problems(self) -> Iterator[str]:
        """What only one side knows."""
        if self.loaded.artifact.plan != self.plan:
            yield "the artefact was exported by another plan than this model's; export it again"
        runtime, reference = self.output_counts
        if runtime != reference:
            yield f"the artefact has {runtime} outputs and the model {reference}"
        unread = self._unread()
        for site in self._missing():
            if site not in unread:
                yield f"site {site}: the artefact does not quantise it"
        for name in sorted(self.unknown):
            yield f"quantised tensor {name}: only the artefact has it, not the model"


def code_bound(plan: Plan) -> float:
    """Share of the codes of one operation that may differ by one: none where all scales are powers of two."""
    halves = {layer.weight for layer in plan.layers if layer.arithmetic == "half"}
    formats = (named_format(site.format) for site in plan.sites if site.name not in halves)
    powers = all(fmt.scale is not None and isinstance(fmt.scale.grid, ExponentGrid) for fmt in formats)
    return 0.0 if powers else KERNELS[plan.kernels].code_bound


class _Notes(View):
    """The codes of every quantised tensor."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def codes(self, name: str, codes: Tensor, source: Quantization | None) -> Tensor:
        self.seen[name] = codes
        return codes
