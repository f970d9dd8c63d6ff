"""An exported model and the sidecar that says how to run it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isogrid.errors import ArtifactError
from isogrid.files import digest, write_json
from isogrid.planning.plan import Plan

FORMAT = 1
"""Version of the sidecar; a reader refuses a newer one."""


@dataclass(frozen=True)
class Artifact:
    """A file that a runtime runs, with what belongs to it.

    Attributes:
        path: of the file.
        target: name of the runtime.
        session_options: settings that keep the runtime to what was trained.
        plan: of the model that was exported.
        versions: of the packages that wrote it.
        sha256: of the file.
    """

    path: Path
    target: str
    session_options: dict[str, str]
    plan: Plan
    versions: dict[str, str]
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    def write_sidecar(self) -> None:
        """Write `<path>.json`, whole or not at all."""
        write_json(
            sidecar_path(self.path),
            {
                "format": FORMAT,
                "target": self.target,
                "session_options": self.session_options,
                "versions": self.versions,
                "sha256": self.sha256,
                "plan": json.loads(self.plan.to_json()),
            },
        )


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of an artefact lies: `model.onnx.json` beside `model.onnx`."""
    return path.with_name(path.name + ".json")


def read_artifact(path: str | Path) -> Artifact:
    """An artefact with its sidecar, checked against its digest.

    Raises:
        ArtifactError: the file or its sidecar is missing, corrupt or truncated.
    """
    path = Path(path)
    sidecar = sidecar_path(path)
    if not path.is_file():
        raise ArtifactError(f"There is no file {path}.")
    if not sidecar.is_file():
        raise ArtifactError(
            f"{path} has no sidecar {sidecar.name}, which says how to run it. Copy both, or export again."
        )
    try:
        data: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise ArtifactError(f"{sidecar} is of a newer Isogrid (format {data['format']}). Upgrade Isogrid.")
        artifact = Artifact(
            path=path,
            target=data["target"],
            session_options=dict(data["session_options"]),
            plan=Plan.from_json(json.dumps(data["plan"])),
            versions=dict(data["versions"]),
            sha256=data["sha256"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{sidecar} is corrupt: {type(error).__name__}: {error}. Export again.") from error
    if digest(path) != artifact.sha256:
        raise ArtifactError(
            f"{path} is corrupt or truncated: its digest is not the one in {sidecar.name}. Export again."
        )
    return artifact
