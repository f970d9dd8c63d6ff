"""A teacher on disk says what the teacher says, goes on after a kill, and refuses what it was not made for."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import isogrid as ig
from isogrid.errors import CheckpointError, DistillationError, NonFiniteError
from isogrid.training import kl_divergence

ROOT = Path(__file__).parents[2]


class Teaching(nn.Module):
    """Sequences to logits; kills the process in the run that DIE_AT names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(13, 13, generator=torch.Generator().manual_seed(0)))
        self.runs = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.runs += 1
        if str(self.runs) == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.table[ids]


def data(seed: int = 1, count: int = 10) -> TensorDataset:
    ids = torch.randint(13, (count, 6), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(ids, ids)


def store(folder: Path, model: nn.Module | None = None, dataset: TensorDataset | None = None, **options: object):
    options = {"k": 4, "batch_size": 2, "shard_size": 4, **options}
    return ig.store_teacher(ig.teacher(model or Teaching()), dataset or data(), folder, **options)


def test_all_classes_on_disk_give_the_loss_of_the_logits(tmp_path: Path) -> None:
    model, examples = Teaching(), data()
    cache = store(tmp_path, model, k=13)
    student = torch.randn(3, 6, 13, generator=torch.Generator().manual_seed(2))
    ids = torch.stack([examples[i][0] for i in (9, 0, 4)])
    assert torch.equal(kl_divergence(student, cache[[9, 0, 4]]), kl_divergence(student, model(ids)))
    again = ig.TeacherCache(tmp_path, examples)
    assert torch.equal(again[torch.tensor([4])].classes, cache[[4]].classes)


def test_top_classes_are_those_of_the_logits(tmp_path: Path) -> None:
    model, examples = Teaching(), data()
    cache = store(tmp_path, model, temperature=2.0)
    logs = (model(examples[7][0]) / 2).log_softmax(-1)
    top = cache[[7]]
    assert torch.equal(top.classes[0].long(), logs.topk(4, -1).indices)
    assert torch.equal(top.log_probabilities[0], logs.topk(4, -1).values)
    torch.testing.assert_close(top.log_rest[0].exp(), 1 - top.log_probabilities[0].exp().sum(-1))
    with pytest.raises(DistillationError, match="computed at temperature 2"):
        ig.Distillation()(torch.zeros(1, 6, 13), top)
    with pytest.raises(DistillationError, match="another vocabulary"):
        ig.Distillation(temperature=2.0)(torch.zeros(1, 6, 14), top)


def test_a_killed_call_goes_on_and_writes_the_same_bytes(tmp_path: Path) -> None:
    store(tmp_path / "whole")
    code = f"from tests.training.test_teacher_cache import *; store(Path({str(tmp_path / 'killed')!r}))"
    environment = {**os.environ, "DIE_AT": "4", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    killed = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(DistillationError, match=r"has 4 of 10 examples\. Call store_teacher again"):
        ig.TeacherCache(tmp_path / "killed", data())
    model = Teaching()
    store(tmp_path / "killed", model)
    assert model.runs == 3  # of five: two were done
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def test_other_data_another_teacher_and_other_settings_are_refused(tmp_path: Path) -> None:
    store(tmp_path)
    other = Teaching()
    with torch.no_grad():
        other.table[0, 0] += 1
    with pytest.raises(DistillationError, match="was made from another teacher"):
        store(tmp_path, other)
    for dataset in (data(seed=3), data(count=9)):
        with pytest.raises(DistillationError, match="was made from other data"):
            store(tmp_path, dataset=dataset)
        with pytest.raises(DistillationError, match="was made from other data"):
            ig.TeacherCache(tmp_path, dataset)
    with pytest.raises(DistillationError, match="was made with k=4, not 5"):
        store(tmp_path, k=5)
    with pytest.raises(DistillationError, match="batch_size divides shard_size"):
        store(tmp_path, batch_size=3)


def test_truncated_missing_and_newer_files_say_so(tmp_path: Path) -> None:
    store(tmp_path)
    shard = tmp_path / "teacher-00001.safetensors"
    assert load_file(shard)["classes"].shape == (4, 6, 4)
    shard.write_bytes(shard.read_bytes()[:-5])
    cache = ig.TeacherCache(tmp_path, data())
    assert cache[[0]].shape == (1, 6, 13)
    with pytest.raises(DistillationError, match=r"00001\.safetensors is corrupt or truncated"):
        cache[[4]]
    shard.unlink()
    with pytest.raises(DistillationError, match="cannot be read"):
        ig.TeacherCache(tmp_path, data())[[4]]
    manifest = tmp_path / "teacher.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 2}))
    with pytest.raises(DistillationError, match="Upgrade Isogrid"):
        ig.TeacherCache(tmp_path, data())
    manifest.write_text("{")
    with pytest.raises(DistillationError, match="holds no teacher"):
        ig.TeacherCache(tmp_path, data())


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from isogrid.training import teacher_cache

    written: list[int] = []

    def until_full(tensors: object, path: object) -> None:
        written.append(1)
        if len(written) > 1:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save_file = teacher_cache.save_file
    monkeypatch.setattr(teacher_cache, "save_file", until_full)
    with pytest.raises(CheckpointError, match="No space left"):
        store(tmp_path)
    monkeypatch.undo()
    assert store(tmp_path)[[9]].shape == (1, 6, 13)


def test_a_teacher_with_nan_is_stopped_at_its_examples(tmp_path: Path) -> None:
    broken = Teaching()
    with torch.no_grad():
        broken.table[int(data()[6][0][0])] = float("nan")
    with pytest.raises(NonFiniteError, match=r"Examples \d to \d: The teacher's logits hold NaN"):
        store(tmp_path, broken)


def test_a_student_s_own_teacher_is_known_by_its_float_weights(tmp_path: Path) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = ig.plan(model, scheme="w4a8", example_inputs=(x,))
    ig.calibrate(ig.prepare(model, plan), [x])
    guide, dataset = ig.teacher(model), TensorDataset(x, torch.zeros(8))
    ig.store_teacher(guide, dataset, tmp_path, k=2)
    with torch.no_grad():
        model[0].weight.add_(1)
    ig.TeacherCache(tmp_path, dataset, guide)
    with pytest.raises(DistillationError, match="another teacher"):
        ig.TeacherCache(tmp_path, dataset, ig.teacher(model))
