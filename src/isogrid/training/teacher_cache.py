"""A teacher's most probable classes on disk: computed once, read at every epoch, with no teacher in memory."""

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, default_collate

from isogrid.errors import DistillationError, NonFiniteError
from isogrid.files import digest, write_json, write_whole
from isogrid.training.divergences import TopK
from isogrid.training.outputs import logits_of
from isogrid.training.teachers import OtherTeacher, SelfTeacher, Teacher

MANIFEST = "teacher.json"
FORMAT = 1
"""Version of the layout; a reader refuses a newer one."""


def store_teacher(
    teacher: Teacher,
    dataset: Dataset[Any],
    folder: str | Path,
    k: int = 64,
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    shard_size: int = 256,
    device: str | torch.device = "cpu",
) -> "TeacherCache":
    """Run a teacher over data and keep the k most probable classes of every position; 8k + 4 bytes each.

    Each shard is a safetensors file that is whole or not there. What an earlier call has written is not computed again,
    so a call that was killed goes on when it is repeated.

    Args:
        teacher: of `isogrid.teacher`.
        dataset: map-style, of tuples (inputs..., target), the same whenever an example is asked for.
        folder: made if missing.
        k: classes that are kept; all others count as one in the loss, see `kl_divergence`.
        temperature: that the loss will have.
        batch_size: examples that the teacher sees at a time; divides shard_size.
        shard_size: examples of a file.
        device: that the teacher runs on.

    Raises:
        DistillationError: the folder holds the classes of other data, of another teacher or by other settings, or a
            shard is corrupt.
        NonFiniteError: the teacher's logits hold NaN or infinity; the examples are named.
        CheckpointError: the disk is full; what was written before is whole.

    >>> import isogrid as ig, tempfile
    >>> from torch.utils.data import TensorDataset
    >>> model, data = torch.nn.Linear(4, 9), TensorDataset(torch.ones(5, 4), torch.zeros(5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = ig.store_teacher(ig.teacher(model), data, folder, k=3)
    ...     cache[[0, 4]].shape
    (2, 9)
    """
    if min(k, batch_size, shard_size) < 1 or shard_size % batch_size:
        raise DistillationError("k, batch_size and shard_size are at least 1, and batch_size divides shard_size.")
    folder, count = Path(folder), _size(dataset)
    wanted: dict[str, Any] = {
        "format": FORMAT, "data": data_digest(dataset), "teacher": teacher_digest(teacher), "examples": count,
        "k": k, "temperature": temperature, "shard_size": shard_size,
    }  # fmt: skip
    manifest: dict[str, Any] = _read(folder) if (folder / MANIFEST).is_file() else {**wanted, "shards": []}
    _check_same(folder, manifest, wanted)
    for start in range(len(manifest["shards"]) * shard_size, count, shard_size):
        stop = min(start + shard_size, count)
        parts = [
            _top(teacher, dataset, range(first, min(first + batch_size, stop)), k, temperature, torch.device(device))
            for first in range(start, stop, batch_size)
        ]
        tensors = {
            "log_probabilities": torch.cat([part.log_probabilities for part in parts]),
            "classes": torch.cat([part.classes for part in parts]).to(torch.int32),
            "log_rest": torch.cat([part.log_rest for part in parts]),
        }
        path = _shard(folder, start // shard_size)
        write_whole(path, lambda temporary, tensors=tensors: save_file(tensors, temporary))  # type: ignore[misc]
        manifest["vocabulary"] = parts[0].vocabulary
        manifest["shards"].append(digest(path))
        write_json(folder / MANIFEST, manifest)
    return TeacherCache(folder, dataset, teacher)


class TeacherCache:
    """What `store_teacher` has written: `cache[indices]` are the top classes of these examples.

    Args:
        folder: of `store_teacher`.
        dataset: that it was made from; it is read once, to see that it is the same.
        teacher: to be compared likewise, where it is at hand.

    Raises:
        DistillationError: there is nothing, not all of it, or it is of other data or of another teacher.
    """

    def __init__(self, folder: str | Path, dataset: Dataset[Any], teacher: Teacher | None = None):
        self.folder = Path(folder)
        self.manifest = _read(self.folder)
        wanted: dict[str, Any] = {"data": data_digest(dataset), "examples": _size(dataset)}
        if teacher is not None:
            wanted["teacher"] = teacher_digest(teacher)
        _check_same(self.folder, self.manifest, wanted)
        done = min(len(self.manifest["shards"]) * self.manifest["shard_size"], self.manifest["examples"])
        if done < self.manifest["examples"]:
            raise DistillationError(
                f"{self.folder} has {done} of {self.manifest['examples']} examples. Call store_teacher "
                "again: it goes on."
            )
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __getitem__(self, indices: Sequence[int]) -> TopK:
        """The top classes of examples by their numbers in the dataset, on the CPU, stacked.

        Raises:
            DistillationError: a shard is missing, corrupt or truncated.
        """
        size = self.manifest["shard_size"]
        rows = [{name: part[i % size] for name, part in self._shard(i // size).items()} for i in map(int, indices)]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return TopK(**stacked, vocabulary=self.manifest["vocabulary"], temperature=self.manifest["temperature"])

    def _shard(self, number: int) -> dict[str, Tensor]:
        """A shard's tensors, mapped into memory."""
        if number not in self._shards:
            path = _shard(self.folder, number)
            try:
                if digest(path) != self.manifest["shards"][number]:
                    raise DistillationError(
                        f"{path} is corrupt or truncated: its digest is not the one in {MANIFEST}. Delete the folder "
                        "and store the teacher again."
                    )
                self._shards[number] = load_file(path)
            except (OSError, IndexError, SafetensorError) as error:
                raise DistillationError(f"{path} cannot be read: {error}. Store the teacher again.") from error
        return self._shards[number]


def data_digest(dataset: Dataset[Any]) -> str:
    """SHA-256 of all examples of a map-style dataset: their numbers, shapes and types."""
    hasher = sha256()
    for index in range(_size(dataset)):
        for leaf in tree_leaves(dataset[index]):
            _add(hasher, leaf)
    return hasher.hexdigest()


def teacher_digest(teacher: Teacher) -> str:
    """SHA-256 of a teacher's float weights, by their names."""
    if not isinstance(teacher, SelfTeacher | OtherTeacher):
        raise DistillationError("Only a teacher of isogrid.teacher is known by its weights.")
    hasher = sha256()
    for name, tensor in sorted(teacher.weights().items()):
        hasher.update(name.encode())
        _add(hasher, tensor)
    return hasher.hexdigest()


def _add(hasher: Any, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        hasher.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
        hasher.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        hasher.update(repr(leaf).encode())


def _top(
    teacher: Teacher, dataset: Dataset[Any], numbers: range, k: int, temperature: float, device: torch.device
) -> TopK:
    *inputs, _ = default_collate([dataset[number] for number in numbers])
    logits = logits_of(teacher(*(part.to(device) if isinstance(part, Tensor) else part for part in inputs)))
    try:
        top = TopK.of(logits, k, temperature)
    except NonFiniteError as error:
        raise NonFiniteError(f"Examples {numbers[0]} to {numbers[-1]}: {error}") from error
    return TopK(top.log_probabilities.cpu(), top.classes.cpu(), top.log_rest.cpu(), top.vocabulary, temperature)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DistillationError(f"{folder} holds no teacher: {path.name} cannot be read ({error}).") from error
    if version > FORMAT:
        raise DistillationError(f"{path} has format {version}; this version reads up to {FORMAT}. Upgrade Isogrid.")
    return manifest


def _check_same(folder: Path, manifest: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise DistillationError where a cache was made from something else."""
    for key, what in {"examples": "other data", "data": "other data", "teacher": "another teacher"}.items():
        if key in wanted and manifest.get(key) != wanted[key]:
            raise DistillationError(f"{folder} was made from {what}. Use another folder, or delete it and store again.")
    for key in ("k", "temperature", "shard_size"):
        if key in wanted and manifest.get(key) != wanted[key]:
            raise DistillationError(f"{folder} was made with {key}={manifest.get(key)}, not {wanted[key]}.")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"teacher-{number:05d}.safetensors"


def _size(dataset: Dataset[Any]) -> int:
    try:
        return len(dataset)  # type: ignore[arg-type]
    except TypeError as error:
        raise DistillationError(f"A {type(dataset).__name__} has no length. Give a map-style dataset.") from error
