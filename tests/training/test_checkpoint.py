"""Checkpoints survive crashes, full disks and being killed, and refuse what is not theirs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import isogrid as ig
from isogrid import files
from isogrid.errors import CheckpointError, PlanError
from isogrid.training import checkpoint, load_training, save_training
from tests.models import assert_equal, make, prepared, train


@pytest.fixture
def model() -> nn.Module:
    model, inputs = make("small")
    return train(prepared(model, inputs), inputs, steps=1) or model


def fresh(seed: int = 5) -> nn.Module:
    return make("small", seed)[0]


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_restored_model_is_the_saved_one(model: nn.Module, tmp_path: Path) -> None:
    ig.save(model, tmp_path)
    again = ig.restore(fresh(), tmp_path)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert_equal(again.state_dict()[name], tensor)
    inputs = make("small")[1]
    assert_equal(again.eval()(*inputs), model.eval()(*inputs))
    assert_equal(ig.convert(again)(*inputs), ig.convert(model)(*inputs))


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    model, inputs = make("tied")
    ig.save(prepared(model, inputs), tmp_path)
    again: Any = ig.restore(make("tied", 3)[0], tmp_path)
    assert again.head.weight is again.embedding.weight
    manifest = json.loads((tmp_path / "checkpoint.json").read_text())
    assert manifest["files"]["model"]["aliases"] == {"head.weight": "embedding.weight"}


def test_a_new_checkpoint_takes_the_place_of_the_old(model: nn.Module, tmp_path: Path) -> None:
    ig.save(model, tmp_path)
    first = set(everything(tmp_path))
    (tmp_path / ".model.new.abc").write_text("left by a run that was killed")
    with torch.no_grad():
        model.fc.weight.add_(1)
    ig.save(model, tmp_path)
    assert len(everything(tmp_path)) == len(first) == 2
    assert_equal(ig.restore(fresh(), tmp_path).fc.weight, model.fc.weight)


@pytest.mark.parametrize("broken", ["save_file", "rename", "write_json", "digest"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    ig.save(model, tmp_path)
    before = everything(tmp_path)
    with torch.no_grad():
        model.fc.weight.add_(1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, broken, full)
        with pytest.raises((CheckpointError, OSError)):
            ig.save(model, tmp_path)
    assert {name: data for name, data in everything(tmp_path).items() if name in before} == before
    assert not [name for name in everything(tmp_path) if name.endswith(".safetensors") and name not in before]
    ig.restore(fresh(), tmp_path)


def test_a_disk_that_is_really_full(model: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("may not mount a file system here")
    try:
        ig.save(model, folder)
        before = everything(folder)
        big = nn.Sequential(nn.Linear(600, 600))
        prepared(big, (torch.randn(2, 600),))
        with pytest.raises(CheckpointError, match=r"Cannot write .* untouched"):
            ig.save(big, folder)
        assert everything(folder) == before
        ig.restore(fresh(), folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_made(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Cannot write to"):
        ig.save(model, tmp_path / "file" / "folder")


def test_damaged_checkpoints(model: nn.Module, tmp_path: Path) -> None:
    ig.save(model, tmp_path / "good")
    tensors = next((tmp_path / "good").glob("*.safetensors")).name

    def damaged(change: Any) -> Path:
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        return folder

    def truncate(folder: Path) -> None:
        path = folder / tensors
        path.write_bytes(path.read_bytes()[:-8])

    def edit(**changes: Any) -> Any:
        def change(folder: Path) -> None:
            path = folder / "checkpoint.json"
            manifest = {**json.loads(path.read_text()), **changes}
            path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

        return change

    cases = [
        (truncate, "corrupt or truncated"),
        (lambda folder: (folder / tensors).unlink(), "incomplete"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "is no checkpoint: it has no checkpoint.json"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"format": 1'), "is corrupt"),
        (edit(plan=None), "is corrupt"),
        (edit(files={}), "is corrupt"),
        (edit(plan={"target": "x"}), "is corrupt"),
        (edit(format="one"), "is corrupt"),
        (edit(format=99), "reads up to 1. Upgrade Isogrid"),
    ]
    for change, message in cases:
        untouched = fresh()
        with pytest.raises(CheckpointError, match=message):
            ig.restore(untouched, damaged(change))
        assert type(untouched.fc) is nn.Linear


def test_a_checkpoint_of_another_model(model: nn.Module, tmp_path: Path) -> None:
    ig.save(model, tmp_path)
    other = make("residual")[0]
    with pytest.raises(CheckpointError, match=r"of another model: it has no stem\.0\.weight"):
        ig.restore(other, tmp_path)
    wider: Any = fresh()
    wider.fc = nn.Linear(2, 5)
    with pytest.raises(CheckpointError, match=r"its fc.weight has shape \[2, 2\], not \[5, 2\]"):
        ig.restore(wider, tmp_path)
    assert type(wider.fc) is nn.Linear and type(other.fc) is nn.Linear
    with pytest.raises(PlanError, match="not prepared"):
        ig.save(fresh(), tmp_path)


def test_a_run_without_an_optimizer_or_with_another(model: nn.Module, tmp_path: Path) -> None:
    ig.save(model, tmp_path)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(CheckpointError, match="no run to resume"):
        load_training(tmp_path, model, optimizer)
    save_training(tmp_path, model, optimizer, {})
    with pytest.raises(CheckpointError, match="does not fit this one"):
        load_training(tmp_path, model, torch.optim.Adam([model.fc.weight]))


@pytest.mark.parametrize("make_optimizer", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), betas=(0.8, 0.9), amsgrad=True),
    lambda p: torch.optim.SGD(p, lr=0.1),
])  # fmt: skip
def test_every_state_of_an_optimizer_comes_back(model: nn.Module, tmp_path: Path, make_optimizer: Any) -> None:
    inputs = make("small")[1]
    optimizer = make_optimizer(model.parameters())
    model(*inputs).square().sum().backward()
    optimizer.step()
    save_training(tmp_path, model, optimizer, {"epoch": 3, "best": 0.1})
    other = make_optimizer(ig.restore(fresh(), tmp_path).parameters())
    again = ig.restore(fresh(), tmp_path)
    other = make_optimizer(again.parameters())
    assert load_training(tmp_path, again, other) == {"epoch": 3, "best": 0.1}
    mine, its = optimizer.state_dict(), other.state_dict()
    for index, values in mine["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                assert_equal(its["state"][index][name], value)
            else:
                assert its["state"][index][name] == value
    for group, its_group in zip(mine["param_groups"], its["param_groups"], strict=True):
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} == its_group


def test_all_random_numbers_go_on(model: nn.Module, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save_training(tmp_path, model, optimizer, {})
    expected = (torch.rand(3), random.random(), np.random.rand(), np.random.randn())
    load_training(tmp_path, model, optimizer)
    assert_equal(torch.rand(3), expected[0])
    assert (random.random(), np.random.rand(), np.random.randn()) == expected[1:]


RUN = """
    import sys, torch, isogrid as ig
    from pathlib import Path
    from isogrid.training import load_training, save_training
    from tests.models import make, prepared
    folder = Path(sys.argv[1])
    model, inputs = make("small")
    resumed = (folder / "checkpoint.json").exists()
    if resumed:
        ig.restore(model, folder)
    else:
        ig.prepare(model, ig.plan(model, scheme="w4a8", example_inputs=inputs))
    groups = ig.parameter_groups(model, lr=0.01, relative_scale_lr=False)
    optimizer = torch.optim.Adam(groups)
    schedule = ig.Schedule(model, 12, float_steps=1, observe_steps=2, weight_only_steps=1, ramp_steps=2,
                           freeze_batch_norm=0.6, freeze_ranges=0.8)
    start = load_training(folder, model, optimizer)["step"] if resumed else 0
    torch.manual_seed(1) if not resumed else None
    for step in range(start, 12):
        optimizer.zero_grad()
        loss = model.train()(inputs[0] + torch.randn(())).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        print(step, loss.item().hex(), flush=True)
        save_training(folder, model, optimizer, {"step": step + 1})
"""


def test_a_run_that_is_killed_again_and_again_has_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}

    def run(folder: str, kills: list[int]) -> dict[int, str]:
        losses: dict[int, str] = {}
        for kill_at in [*kills, None]:
            command = [sys.executable, str(script), str(tmp_path / folder)]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    step, loss = line.split()
                    assert losses.setdefault(int(step), loss) == loss
                    if int(step) == kill_at:
                        process.send_signal(signal.SIGKILL)
        return losses

    # The whole run needs no process of its own.
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "whole")])
    exec(compile(script.read_text(), script, "exec"), {})
    expected = {int(step): loss for step, loss in map(str.split, capsys.readouterr().out.splitlines())}
    assert len(expected) == 12
    assert run("killed", [2, 5]) == expected


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    files.write_whole(path, lambda temporary: temporary.write_text("first"))

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("no more")

    with pytest.raises(CheckpointError, match=r"no more. What was there before is untouched"):
        files.write_whole(path, fail)
    assert everything(path.parent) == {"file.txt": b"first"}
