"""Replay: every operation of the reference on the inputs that the runtime had for it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isogrid.layers.attention_states import ATTRIBUTE, DynamicState
from isogrid.layers.half import HalfLayer
from isogrid.layers.integer import PackedLinear
from isogrid.layers.llamacpp_cache import arranged, codes_of
from isogrid.planning.values import tensors_in
from isogrid.targets import Observed
from isogrid.verification.names import site_of
from isogrid.verification.reference import Packed, Quantization, View, viewed
from isogrid.verification.report import ReplayCheck
from isogrid.verification.survey import Survey
from isogrid.verification.tally import Tally

RELATIVE_BOUND = 1e-6
"""A float operation agrees to this share of its largest output, where the runtime adds up in an order of its own.

For a packed layer it is the share of the largest sum of magnitudes, sum |x| |w|: rounding errors go by the terms of a
sum, not by what is left when they cancel. Measured on ONNX Runtime 1.31: up to 1.3e-7 for 256 to 16,384 terms that are
equally large. Where one term outweighs all others, each addition rounds a sum of that size: see `_bound_of_sum`.
"""

HALF_BOUND = 1e-3
"""A layer in float16 agrees to this share of its largest sum of magnitudes: one step of float16, 2**-10, in what it
puts out. Sums are added up in an order of the runtime's own, and may be rounded to the neighbouring number."""

STATE_SHARE = 1e-3
"""Of the codes of a cache that is quantised as it comes. Rotations and sums in another order than the runtime's move a
value across the border between two codes now and then: 2 of 294,912 codes were measured."""


class Replays:
    """Tallies of replayed operations over many batches.

    At each quantised tensor, and at each packed layer's input and output, the reference goes on with what the runtime
    had there. A difference is thus counted once, where it arises, and no early difference can hide a later one.

    Args:
        reference: of `isogrid.convert`.
        run: runs it on the tensors that an artefact takes.
        survey: of it.
        share: of the codes of one operation that may differ by one.
    """

    def __init__(
        self, reference: nn.Module, run: Callable[[tuple[Tensor, ...]], Any], survey: Survey, share: float = 0.0
    ):
        self.reference, self.run, self.survey, self.share = reference, run, survey, share
        self.codes: dict[str, Tally] = {}
        self.values: dict[str, Tally] = {}
        self.bounds: dict[str, float] = {}
        self.states: dict[str, Tally] = {}

    def add(
        self, inputs: tuple[Tensor, ...], seen: Observed, noted: Mapping[str, Tensor], expected: Sequence[Tensor]
    ) -> None:
        """Replay one batch.

        Args:
            inputs: of the model.
            seen: what the runtime computed.
            noted: the codes that the reference had on its own; where all are the runtime's, its run was the replay.
            expected: the outputs that the reference had on its own.
        """
        others = seen.layers or seen.states
        if seen.codes and not others and all(_same(noted.get(name), codes) for name, codes in seen.codes.items()):
            for name, codes in seen.codes.items():
                self._of_codes(name).add(codes, noted[name])
        else:
            with torch.no_grad(), viewed(self.reference, _Substitution(self, seen)):
                result = self.run(inputs)
            expected = tensors_in(result)
        outputs = seen.outputs if seen.watched is None else seen.watched
        for number, (actual, output) in enumerate(zip(outputs, expected, strict=False)):
            name = "output" if len(expected) == 1 else f"output {number}"
            self._of_values(name, self.survey.outputs[number].depth).add(actual, output)

    def _of_codes(self, name: str) -> Tally:
        site = site_of(name)
        self.bounds[site] = self.survey.codes_from[name].depth * RELATIVE_BOUND
        return self.codes.setdefault(site, Tally())

    def _of_values(self, name: str, operations: float) -> Tally:
        self.bounds[name] = operations * RELATIVE_BOUND
        return self.values.setdefault(name, Tally())

    def checks(self, operators: Mapping[str, str]) -> Iterator[ReplayCheck]:
        """One check for each quantised tensor, packed layer and output.

        Args:
            operators: of the runtime, by the name of what they compute.
        """
        by_site = {site_of(name): operator for name, operator in operators.items()}
        for name, tally in self.codes.items():
            operator = by_site.get(name, "")
            figures = (*tally.counts, tally.largest, self.bounds[name])
            yield ReplayCheck(name, operator, *figures, of_codes=True, share=self.share)
        for name, tally in self.states.items():
            yield ReplayCheck(name, "", *tally.counts, tally.largest, 0.0, of_codes=True, share=STATE_SHARE)
        for name, tally in self.values.items():
            operator = by_site.get(name, "")
            yield ReplayCheck(name, operator, *tally.counts, tally.relative, self.bounds[name], of_codes=False)


class _Substitution(View):
    """Compares what arrives with what the runtime had, and goes on with the latter."""

    def __init__(self, replays: Replays, seen: Observed):
        self.replays, self.seen = replays, seen
        self._known: list[tuple[Quantization, Tensor]] = []

    def codes(self, name: str, codes: Tensor, source: Quantization | None) -> Tensor:
        theirs = self.seen.codes.get(name)
        if theirs is None:
            return self._shared(codes, source)
        if source is not None:
            self._known.append((source, theirs))
        tally = self.replays._of_codes(name)
        bound = self.replays.bounds[site_of(name)]
        if source is not None and bound > 0:
            reach = bound * source.x.abs().nan_to_num().max()
            least, most = source.codes(source.x - reach), source.codes(source.x + reach)
            codes = theirs.clamp(torch.minimum(least, most), torch.maximum(least, most))
        tally.add(theirs, codes)
        return theirs

    def _shared(self, codes: Tensor, source: Quantization | None) -> Tensor:
        """What the runtime had for codes that it has under another name: an artefact rounds the same values once."""
        same = (theirs for known, theirs in self._known if source is not None and _alike(known, source))
        return next(same, codes)

    def state(self, name: str, module: DynamicState, y: Tensor) -> Tensor:
        theirs = self.seen.states.get(name)
        if theirs is None or module.rule is None:
            return y
        stored = [arranged(module.rule, x) for x in (theirs, y)]
        codes = [codes_of(module.rule, x, stored[0]) for x in stored]
        self.replays.states.setdefault(name.replace(f".{ATTRIBUTE}.", "."), Tally()).add(codes[0], codes[1])
        return theirs.to(y.dtype)

    def entering(self, name: str, x: Tensor) -> Tensor:
        if name not in self.seen.layers:
            return x
        theirs, _ = self.seen.layers[name]
        depth = self.replays.survey.layers_from[name].depth
        self.replays._of_values(f"{name}.input", depth).add(theirs, x)
        return theirs

    def leaving(self, name: str, layer: Packed, x: Tensor, y: Tensor) -> Tensor:
        if name not in self.seen.layers:
            return y
        _, theirs = self.seen.layers[name]
        self.replays._of_values(f"{name}.output", _bound_of_sum(layer, x.shape[-1]) / RELATIVE_BOUND).add(
            theirs, y, _largest_sum(layer, x)
        )
        return theirs


def _bound_of_sum(layer: Packed, terms: int) -> float:
    """How far sums of products may be apart, as a share of the largest sum of magnitudes.

    Errors of n rounded additions grow as sqrt(n) * 2**-24 (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019), and both
    sides have their own. Integer arithmetic adds a block of products exactly.
    """
    if isinstance(layer, HalfLayer):
        return HALF_BOUND
    adds_floats = layer.accuracy_level == 1 if isinstance(layer, PackedLinear) else layer.activation_rule is None
    return max(RELATIVE_BOUND, terms**0.5 * 2**-23) if adds_floats else RELATIVE_BOUND


def _largest_sum(layer: Packed, x: Tensor) -> float:
    """The largest sum of magnitudes behind one output."""
    x, weight = x.abs().float(), layer.weight.abs().float()
    if isinstance(layer, HalfLayer):
        bias = None if layer.bias is None else layer.bias.abs().float()
        sums = layer.operation.forward(layer.padded(x), weight, bias)
    else:
        sums = nn.functional.linear(x, weight)
    return float(sums.nan_to_num(posinf=0.0).max())


def _alike(a: Quantization, b: Quantization) -> bool:
    """Whether two calls round the same values on the same grid."""
    grids = (a.scale, b.scale), (a.zero_point, b.zero_point), (a.x, b.x)
    return a[3:] == b[3:] and all(torch.equal(one, other) for one, other in grids)


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and torch.equal(a, b)
