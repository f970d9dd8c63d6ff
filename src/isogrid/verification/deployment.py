"""Deployment: the outputs of an artefact when nobody looks, against those beside which codes were seen."""

from collections.abc import Iterator

from isogrid.targets import Observed
from isogrid.verification.replay import RELATIVE_BOUND
from isogrid.verification.report import DeploymentCheck
from isogrid.verification.survey import Survey
from isogrid.verification.tally import Tally

FLIPPED_BOUND = 1e-2
"""Share of the largest output by which the two may differ where float arithmetic lies before codes.

Its last bits depend on what is fused, and may flip a code, which all that follows sees.
"""


class Deployment:
    """Tallies of outputs over many batches.

    Args:
        survey: of the reference.
    """

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.tallies = [Tally() for _ in survey.outputs]
        self.looked = False

    def add(self, seen: Observed) -> None:
        """Compare one batch, where the runtime ran it twice."""
        if seen.watched is not None:
            self.looked = True
            for tally, output, watched in zip(self.tallies, seen.outputs, seen.watched, strict=False):
                tally.add(output, watched)

    def checks(self) -> Iterator[DeploymentCheck]:
        """One check for each output; none where looking changes nothing."""
        for number, tally in enumerate(self.tallies if self.looked else ()):
            name = "output" if len(self.tallies) == 1 else f"output {number}"
            yield DeploymentCheck(name, *tally.counts, tally.relative, self._bound(number))

    def _bound(self, number: int) -> float:
        survey, output = self.survey, self.survey.outputs[number]
        if output.exact:
            return 0.0
        if survey.layers_from or not all(origin.exact for origin in survey.codes_from.values()):
            return FLIPPED_BOUND
        return output.depth * RELATIVE_BOUND
