"""Workers in processes of their own."""

import sys

import pytest
import torch

from isogrid.errors import MissingExtraError, TargetError
from isogrid.targets.subprocesses import Worker

WORKER = '''
import os, sys
print("a greeting")
def double(tensors, times):
    print("working", file=sys.stderr)
    return {"times": times}, {name: x * 2 * times for name, x in tensors.items()}
def nothing(tensors):
    return 7, {}
def fail(tensors):
    raise ValueError("no such operator")
def die(tensors):
    print("out of memory")
    sys.stdout.flush()
    os._exit(3)
'''


@pytest.fixture
def worker(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    worker = Worker("executorch", path)
    yield worker
    worker.close()


def test_tensors_of_all_kinds_come_back_bit_for_bit(worker):
    x = {
        "float": torch.randn(3, 4),
        "turned": torch.randn(3, 4).T,
        "codes": torch.arange(-128, 128, dtype=torch.int8),
        "coarse": torch.randn(5).bfloat16(),
    }
    for times in (1, 2):
        answer = worker.call("double", x, times=times)
        assert answer.value == {"times": times}
        for name, tensor in x.items():
            assert torch.equal(answer.tensors[name], tensor * 2 * times)
    assert not list(worker.folder.glob("*.safetensors"))


def test_an_error_names_the_runtime_and_shows_what_it_printed(worker):
    with pytest.raises(TargetError, match=r"executorch failed: ValueError: no such operator(.|\n)*Traceback"):
        worker.call("fail")
    assert worker.call("nothing") == (7, {})  # it goes on working


def test_a_process_that_dies_is_an_error_with_its_last_words(worker):
    with pytest.raises(TargetError, match=r"ended with status 3. It printed:(.|\n)*out of memory"):
        worker.call("die")


def test_a_missing_package_names_the_interpreter_and_the_variable(tmp_path):
    (tmp_path / "worker.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(MissingExtraError, match=r"a_package_that_nobody_has.*isogrid\[executorch\].*ISOGRID_E"):
        Worker("executorch", tmp_path / "worker.py")


def test_an_interpreter_that_is_none_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("ISOGRID_EXECUTORCH_PYTHON", str(tmp_path / "python"))
    with pytest.raises(TargetError, match=r"does not start: No such file.*ISOGRID_EXECUTORCH_PYTHON"):
        Worker("executorch")


def test_a_worker_ends_with_its_object(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("ISOGRID_EXECUTORCH_PYTHON", sys.executable)
    worker = Worker("executorch", tmp_path / "worker.py")
    process, folder = worker._process, worker.folder
    del worker
    assert process.poll() is not None and not folder.exists()
