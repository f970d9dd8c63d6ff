"""A run that is killed goes on as if nothing had happened; what goes wrong says so and loses nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from isogrid.errors import CheckpointError, NonFiniteError, RecipeError
from isogrid.recipes import runner
from isogrid.recipes.document import parse
from isogrid.recipes.folders import RunFolder, find_run
from isogrid.recipes.loading import validated
from isogrid.recipes.progress import Silent
from isogrid.recipes.runner import RunResult, run
from isogrid.recipes.schema import Recipe
from tests.recipes.killing import assert_same, scalars, survives, tensors

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
RECIPE = """\
model: tests.recipes.tiny:model
data: tests.recipes.tiny:data
scheme: w4a8
training:
  steps: 12
  batch_size: 8
  accumulation: 2
  lr: 1e-2
  log_every: 1
  checkpoint_every: 4
schedule:
  weight_only_steps: 2
  ramp_steps: 3
"""


def recipe(folder: Path, text: str = RECIPE) -> Recipe:
    return validated(parse(f"{text}output: {folder}\n", "recipe.yaml"))


@pytest.fixture
def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training alone: another test looks at what follows it."""
    monkeypatch.setattr(runner, "finish", lambda *arguments: RunResult((), None, Path()))


@pytest.mark.usefixtures("no_export")
def test_a_run_says_what_it_will_take_and_is_the_same_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listening(Silent):
        said: ClassVar[list[str]] = []

        def message(self, text: str) -> None:
            self.said.append(text)

    run(recipe(tmp_path / "told"), progress=Listening())
    assert any(text.startswith("Training takes about ") and "MiB" in text for text in Listening.said)
    monkeypatch.setattr(runner, "estimated", lambda *arguments: "nothing that was measured")
    run(recipe(tmp_path / "untold"))
    told, untold = tensors(tmp_path / "told"), tensors(tmp_path / "untold")
    assert all(torch.equal(tensor, untold[name]) for name, tensor in told.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "finish", lambda *arguments: RunResult((), None, Path()))
        run(recipe(folder))
    return folder


# Eight losses for the estimate, then two a step: 11 dies in the second step, before any checkpoint; 25 in the ninth,
# one step after a checkpoint.
@pytest.mark.parametrize("die_at", [11, 25])
def test_a_killed_run_continues_with_the_losses_it_would_have_had(
    tmp_path: Path, no_export: None, whole: Path, die_at: int
) -> None:
    text = tmp_path / "recipe.yaml"
    text.write_text(RECIPE)
    killed = subprocess.run(
        [sys.executable, "-m", "isogrid", "run", str(text), "--set", f"output={tmp_path / 'killed'}"],
        env={**os.environ, "DIE_AT": str(die_at), "PYTHONPATH": PATHS},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    run(recipe(tmp_path / "killed"), resume=True)
    assert_same(tmp_path / "killed", whole, ("loss", "learning_rate", "sqnr_db/0", "saturation/4"))
    assert len(scalars(whole, "loss")) == 12


@pytest.mark.parametrize(
    ("text", "holds", "change", "message"),
    [
        (f"{RECIPE}adapters: {{rank: 2, match: '4'}}\n", "model.4.adapters.default.A", ("rank: 2", "rank: 1"),
         r"adapters\.rank was 2 and is 1 now"),
        (f"{RECIPE.replace('w4a8', 'q4_0')}freeze: {{match: '4', scales: false}}\n", "model.4.weight",
         ("scales: false", "scales: true"), r"freeze\.scales was false and is true now"),
    ],
)  # fmt: skip
def test_a_killed_run_of_a_part_continues_too(
    text: str, holds: str, change: tuple[str, str], message: str, tmp_path: Path, no_export: None
) -> None:
    assert holds in survives(partial(recipe, text=text), 9, tmp_path)
    with pytest.raises(RecipeError, match=message):
        run(recipe(tmp_path / "killed", text.replace(*change)), resume=True)


def test_a_run_ends_with_a_verified_artefact_and_a_report(tmp_path: Path) -> None:
    result = run(recipe(tmp_path / "run"))
    assert result.verification
    assert [row.method for row in result.rows] == ["float", "qat"]
    assert result.rows[1].differing_codes == 0
    assert result.rows[1].compared_codes > 0
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert [row["accuracy"] for row in rows] == [row.accuracy for row in result.rows]
    assert "</html>" in (tmp_path / "run" / "report.html").read_text()
    assert find_run(str(tmp_path / "run")) == find_run(str(tmp_path / "run" / "checkpoint"))


def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path: Path, no_export: None) -> None:
    run(recipe(tmp_path))
    before = tensors(tmp_path)
    with pytest.raises(RecipeError, match=r"holds a run that has done 12 steps\. Go on with --resume"):
        run(recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"training\.lr was 0\.01 and is 0.02 now"):
        run(recipe(tmp_path, RECIPE.replace("1e-2", "2e-2")), resume=True)
    run(recipe(tmp_path, RECIPE.replace("log_every: 1", "log_every: 2")), resume=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(tmp_path).items())
    run(recipe(tmp_path, RECIPE.replace("1e-2", "2e-2")), restart=True)
    assert [step for step, _ in scalars(tmp_path, "loss")] == list(range(1, 13))


def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isogrid.training import checkpoint

    saved: list[int] = []

    def save_until_the_disk_is_full(tensors: object, path: object) -> None:
        saved.append(1)
        if len(saved) > 4:  # three files a checkpoint: the second one breaks
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_until_the_disk_is_full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(recipe(tmp_path / "full"))
    monkeypatch.undo()
    monkeypatch.setattr(runner, "finish", lambda *_: RunResult((), None, tmp_path))
    assert json.loads((tmp_path / "full/checkpoint/checkpoint.json").read_text())["extra"] == {"step": 4}
    run(recipe(tmp_path / "full"), resume=True)
    assert scalars(tmp_path / "full", "loss") == scalars(whole, "loss")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"The loss is nan at step 1\. Lower training.lr"):
        run(recipe(tmp_path, RECIPE.replace(":data", ":diverging_data")))


def test_other_trackers_get_the_same_figures(tmp_path: Path, no_export: None, whole: Path) -> None:
    run(recipe(tmp_path / "run", RECIPE.replace("  steps", "  trackers: [tensorboard]\n  steps")))
    (folder,) = (path.parent for path in (tmp_path / "run" / "isogrid").glob("events.*"))
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss", "sqnr_db/0", "flips_per_step/4"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == scalars(whole, name)
    for name, message in (("tensorbored", "is no tracker of Accelerate"), ("comet_ml", "is not installed")):
        with pytest.raises(RecipeError, match=message):
            run(recipe(tmp_path / name, RECIPE.replace("  steps", f"  trackers: [{name}]\n  steps")))


def test_a_truncated_checkpoint_is_named(tmp_path: Path, no_export: None) -> None:
    run(recipe(tmp_path))
    file = next((tmp_path / "checkpoint").glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="corrupt or truncated"):
        run(recipe(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tiny:model", "tiny:modle", "model: tests.recipes.tiny has no callable 'modle'. Did you mean 'model'?"),
        ("tiny:model", "tiny:os.path", "model: tests.recipes.tiny has no callable 'os.path'."),
        ("tiny:model", "teeny:model", "model: there is no module 'tests.recipes.teeny'"),
        ("tests.recipes.tiny:model", "digits-cn", "model: unknown name 'digits-cn'. Did you mean 'digits-cnn'?"),
        ("tiny:model", "tiny:data", "model: tests.recipes.tiny:data returns a Data. It must return a torch.nn"),
        ("tests.recipes.tiny:model", "{name: digits-cnn, arguments: {chanels: 3}}", "does not take these arguments"),
        ("tiny:data", "tiny:model", "data: tests.recipes.tiny:model returns a Sequential"),
        ("scheme: w4a8", "checkpoint: nowhere.safetensors", "checkpoint: there is no file nowhere.safetensors"),
        ("batch_size: 8", "batch_size: 7", "cannot be divided into 2 parts"),
    ],
)
def test_what_a_recipe_names_must_exist_and_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        run(recipe(tmp_path, RECIPE.replace(old, new)))
    assert message in str(caught.value)
    assert not RunFolder(tmp_path).has_checkpoint


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x08\0\0\0\0\0\0\0{}"])
def test_float_weights_that_do_not_fit_are_refused(tmp_path: Path, content: bytes) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(content)
    with pytest.raises(RecipeError, match="checkpoint: "):
        run(recipe(tmp_path / "run", f"{RECIPE}checkpoint: {weights}\n"))


def test_two_processes_see_the_batches_of_one(tmp_path: Path, no_export: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    # Without noise, dropout and batch statistics, what a batch is divided into does not matter.
    text = RECIPE.replace("tiny:model", "tiny:plain_model").replace("tiny:data", "tiny:plain_data")
    run(recipe(tmp_path / "one", text))
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    for name, value in {**environment, "RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    second = subprocess.Popen(
        [sys.executable, "-m", "isogrid", "run", str(file), "--set", f"output={tmp_path / 'two'}"],
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1", "PYTHONPATH": PATHS},
        cwd=tmp_path,
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run(recipe(tmp_path / "two", text))
        assert second.wait(timeout=60) == 0
    finally:
        second.kill()
        torch.distributed.destroy_process_group()
    one, two = (scalars(tmp_path / name, "loss") for name in ("one", "two"))
    # The first loss differs by the order of a sum of 8 float32 values; codes that flip drive later ones apart.
    assert two[0] == pytest.approx(one[0], rel=1e-6)
    assert [step for step, _ in two] == list(range(1, 13))


def test_bfloat16_computes_in_bfloat16_and_saves_in_float32(tmp_path: Path, no_export: None, whole: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the whole run
    run(recipe(tmp_path / "bfloat16", RECIPE.replace("  steps", "  precision: bfloat16\n  steps")))
    half, full = (scalars(folder, "loss") for folder in (tmp_path / "bfloat16", whole))
    assert half != full
    # bfloat16 has 8 significant bits, so that a loss of order 1 is off by some thousandths before the runs drift apart.
    assert half[0][1] == pytest.approx(full[0][1], abs=0.02)
    assert all(
        tensor.dtype == full_tensor.dtype
        for tensor, full_tensor in zip(tensors(tmp_path / "bfloat16").values(), tensors(whole).values(), strict=True)
    )
