"""An exported model and the sidecar that says how to run it."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from isogrid.errors import ArtifactError, CheckpointError, PlanError
from isogrid.files import digest, write_json, write_whole
from isogrid.planning.plan import Plan

FORMAT = 1
"""Version of the sidecar; a reader refuses a newer one."""

MODEL_FILES = (".safetensors", ".safetensors.index.json", "config.json")
"""How the names of the files end that hold the model, in an artefact that is a folder."""

FOLDER_SIDECAR = "isogrid.json"
"""The sidecar's name in an artefact that is a folder."""


@dataclass(frozen=True)
class Artifact:
    """A file that a runtime runs, with what belongs to it.

    Attributes:
        path: of the file, or of the folder.
        target: name of the runtime.
        session_options: settings that keep the runtime to what was trained.
        plan: of the model that was exported.
        versions: of the packages that wrote it.
        sha256: of the file, or of the names and contents of the files in the folder that hold the model.
    """

    path: Path
    target: str
    session_options: dict[str, str]
    plan: Plan
    versions: dict[str, str]
    sha256: str

    @property
    def size_bytes(self) -> int:
        """Size of the file, or of those in the folder that hold the model."""
        files = _files(self.path) if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def to_sidecar(self) -> dict[str, Any]:
        """What the sidecar holds, as JSON data."""
        return {
            "format": FORMAT,
            "target": self.target,
            "session_options": self.session_options,
            "versions": self.versions,
            "sha256": self.sha256,
            "plan": json.loads(self.plan.to_json()),
        }


def versions_of(*packages: str) -> dict[str, str]:
    """The versions of installed packages; "unknown" where one runs from a source tree.

    >>> list(versions_of("torch", "no such package").values())[1]
    'unknown'
    """
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def sidecar_path(path: Path) -> Path:
    """Where the sidecar of an artefact lies: beside a file, and in a folder.

    >>> sidecar_path(Path("runs/model.onnx")).name
    'model.onnx.json'
    """
    return path / FOLDER_SIDECAR if path.is_dir() else path.with_name(path.name + ".json")


def write_artifact(artifact: Artifact, write: Callable[[Path], Any]) -> Artifact:
    """Write an artefact and its sidecar so that those on disk always belong together.

    The sidecar is replaced first, and until the file is replaced too it also holds what it said about the file before.
    Whoever reads in between, or after a crash in between, finds the entry whose digest is the file's.

    Args:
        artifact: its `sha256` is ignored and becomes that of what is written.
        write: fills the file at the path that it is given.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written; the artefact that was there is untouched.
    """
    path, sidecar = artifact.path, sidecar_path(artifact.path)
    written = artifact

    def write_both(temporary: Path) -> None:
        nonlocal written
        write(temporary)
        written = replace(artifact, sha256=digest(temporary))
        previous = None
        with contextlib.suppress(ArtifactError):  # a corrupt sidecar says nothing worth keeping
            previous = _entry_of(path)
        write_json(sidecar, {**written.to_sidecar(), **({} if previous is None else {"previous": previous})})

    try:
        write_whole(path, write_both)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    with contextlib.suppress(CheckpointError):  # what the sidecar says about the file before does no harm
        write_json(sidecar, written.to_sidecar())
    return written


def write_folder(artifact: Artifact, write: Callable[[Path], Any]) -> Artifact:
    """Write an artefact that is a folder, with the sidecar in it; an older one there is replaced in one step.

    Files in the older one that hold no part of the model, such as a tokenizer's, are kept.

    Args:
        artifact: its `sha256` is ignored and becomes that of what is written.
        write: fills the folder at the path that it is given.

    Raises:
        ArtifactError: the folder cannot be written, or is none of Isogrid's; what was there is untouched.
    """
    path = artifact.path
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not sidecar_path(path).is_file()):
        raise ArtifactError(f"{path} is there already and was not exported by Isogrid. Name another folder.")
    mark = secrets.token_hex(8)
    temporary, old = path.with_name(f".{path.name}.{mark}.new"), path.with_name(f".{path.name}.{mark}.old")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        written = replace(artifact, sha256=_folder_digest(temporary))
        write_json(temporary / FOLDER_SIDECAR, written.to_sidecar())
        if path.is_dir():
            for file in path.iterdir():
                if file.is_file() and not file.name.endswith(MODEL_FILES) and not (temporary / file.name).exists():
                    shutil.copy2(file, temporary / file.name)  # a tokenizer, a model card
            path.replace(old)
        temporary.replace(path)
    except (OSError, CheckpointError) as error:
        if old.is_dir() and not path.exists():
            old.replace(path)
        raise ArtifactError(f"Cannot write {path}: {error}. What was there before is untouched.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
    return written


def read_artifact(path: str | Path) -> Artifact:
    """An artefact with its sidecar, checked against its digest.

    Raises:
        ArtifactError: the file or its sidecar is missing, corrupt or truncated.
    """
    path = Path(path)
    sidecar = sidecar_path(path)
    if not path.exists():
        raise ArtifactError(f"There is no file {path}. Write one with isogrid.export(model, path).")
    if not sidecar.is_file():
        raise ArtifactError(
            f"{path} has no sidecar {sidecar.name}, which says how to run it. Copy both, or export again."
        )
    entry = _entry_of(path)
    if entry is None:
        raise ArtifactError(
            f"{path} is corrupt or truncated: its digest is not the one in {sidecar.name}. Copy both, or export again."
        )
    try:
        return Artifact(
            path=path,
            target=str(entry["target"]),
            session_options={str(name): str(value) for name, value in entry["session_options"].items()},
            plan=Plan.from_json(json.dumps(entry["plan"])),
            versions={str(name): str(value) for name, value in entry["versions"].items()},
            sha256=entry["sha256"],
        )
    except (ValueError, KeyError, TypeError, AttributeError, PlanError) as error:
        raise _corrupt(sidecar, error) from error


def artifact_for(target: str, artifact: Artifact | str | Path) -> Artifact:
    """The artefact, read and checked where a path is given.

    Args:
        target: the runtime that is to load it, by name.
        artifact: or its path.

    Raises:
        ArtifactError: see `read_artifact`; or it was exported for another runtime.
    """
    found = artifact if isinstance(artifact, Artifact) else read_artifact(artifact)
    if found.target != target:
        raise ArtifactError(f"{found.path} is for {found.target}, not for {target}. Load it with isogrid.load(path).")
    return found


def _entry_of(path: Path) -> dict[str, Any] | None:
    """What the sidecar says about the file as it is; None where it says nothing about it."""
    sidecar = sidecar_path(path)
    if not (path.exists() and sidecar.is_file()):
        return None
    try:
        data = json.loads(sidecar.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            raise ArtifactError(f"{sidecar} is of a newer Isogrid (format {data['format']}). Upgrade Isogrid.")
        content = _folder_digest(path) if path.is_dir() else digest(path)
        entries = [data, *([data["previous"]] if "previous" in data else [])]
        return next((entry for entry in entries if entry["sha256"] == content), None)
    except OSError as error:
        raise ArtifactError(f"Cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(sidecar, error) from error


def _files(folder: Path) -> list[Path]:
    """The files in a folder that decide what is computed; others, such as a tokenizer's, may come and go."""
    return [file for file in sorted(folder.iterdir()) if file.name.endswith(MODEL_FILES)]


def _folder_digest(folder: Path) -> str:
    """SHA-256 of the names and digests of all files."""
    hasher = sha256()
    for file in _files(folder):
        hasher.update(f"{file.relative_to(folder).as_posix()}\n{digest(file)}\n".encode())
    return hasher.hexdigest()


def _corrupt(sidecar: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{sidecar} is corrupt or truncated: {type(error).__name__}: {error}. Export again.")
