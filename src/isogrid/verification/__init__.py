"""Run the artefact, compare, say what differs."""

from isogrid.verification.merging import MergeDifference, merge_difference
from isogrid.verification.report import VerificationReport
from isogrid.verification.verify import verify_artifact

__all__ = ["MergeDifference", "VerificationReport", "merge_difference", "verify_artifact"]
