"""Runtimes that live in an environment of their own: a process with another interpreter, and what is said to it.

A heavy runtime pins the versions of packages that Isogrid shares with it. Its part of a target is therefore a worker, a
file in `isogrid/targets/workers` that imports the runtime and nothing of Isogrid, run by the interpreter that
`ISOGRID_<RUNTIME>_PYTHON` names, or by this one. Requests and answers are JSON, tensors are safetensors files: nothing
is ever unpickled.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from isogrid.errors import MissingExtraError, TargetError

WORKERS = Path(__file__).parent / "workers"
TAIL = 2000
"""Characters of what a runtime has printed that an error shows."""


class Answer(NamedTuple):
    """What a worker's function returned: JSON data, and tensors by name."""

    value: Any
    tensors: dict[str, Tensor]


def interpreter_of(runtime: str) -> str:
    """The Python interpreter that has a runtime.

    >>> interpreter_of("executorch") == os.environ.get("ISOGRID_EXECUTORCH_PYTHON", sys.executable)
    True
    """
    return os.environ.get(variable_of(runtime), sys.executable)


def variable_of(runtime: str) -> str:
    """The environment variable that names the interpreter of a runtime.

    >>> variable_of("executorch")
    'ISOGRID_EXECUTORCH_PYTHON'
    """
    return f"ISOGRID_{runtime.upper().replace('-', '_')}_PYTHON"


class Worker:
    """A process that runs the functions of a worker's file; it ends when this object does.

    Args:
        runtime: name of the target, also of its extra and of its file in `isogrid/targets/workers`.
        file: the worker's file, where it is another one.

    Raises:
        MissingExtraError: the interpreter lacks the runtime's package; the message says what to install, and where.
        TargetError: the interpreter does not start.
    """

    def __init__(self, runtime: str, file: Path | None = None):
        self.runtime = runtime
        self.python = interpreter_of(runtime)
        self.folder = Path(tempfile.mkdtemp(prefix=f"isogrid-{runtime}-"))
        self._requests = 0
        file = file or WORKERS / f"{runtime.replace('-', '_')}.py"
        command = [self.python, str(WORKERS / "serving.py"), str(file), str(self.folder)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        try:
            with (self.folder / "printed").open("wb") as printed:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    encoding="utf-8",
                    env=environment if self.python != sys.executable else None,
                )
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise TargetError(
                f"{self.python} does not start: {error.strerror or error}. {variable_of(runtime)} has to name the "
                f"Python interpreter of an environment with {runtime}."
            ) from error
        self._finalizer = weakref.finalize(self, _end, self._process, self.folder)
        self._check_ready()

    def call(self, function: str, tensors: Mapping[str, Tensor] | None = None, **arguments: Any) -> Answer:
        """Run a function of the worker.

        Args:
            function: its name.
            tensors: by name; any device, they are read on the CPU.
            arguments: JSON data.

        Raises:
            TargetError: it failed; the message ends with what the runtime printed last.
        """
        path = self.folder / f"request{self._requests}.safetensors"
        self._requests += 1
        if tensors:
            save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)
        request = {"function": function, "arguments": arguments, "tensors": str(path) if tensors else ""}
        answer = self._exchange(json.dumps(request))
        path.unlink(missing_ok=True)
        if "error" in answer:
            raise TargetError(f"{self.runtime} failed: {answer['error']}{self._printed()}")
        if not answer["tensors"]:
            return Answer(answer["value"], {})
        results = load_file(answer["tensors"])
        Path(answer["tensors"]).unlink()
        return Answer(answer["value"], results)

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _exchange(self, line: str) -> dict[str, Any]:
        requests, answers = _streams(self._process)
        try:
            requests.write(line + "\n")
            requests.flush()
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        return self._parsed(answer)

    def _check_ready(self) -> None:
        answer = self._parsed(_streams(self._process)[1].readline())
        if "missing" in answer:
            self.close()
            raise MissingExtraError(
                f"The target {self.runtime} needs the package {answer['missing']}, which {self.python} does not have. "
                f"Install it there with: pip install 'isogrid[{self.runtime}]', or name the interpreter of an "
                f"environment that has it: {variable_of(self.runtime)}=/path/to/python"
            )

    def _parsed(self, line: str) -> dict[str, Any]:
        if not line:
            status, printed = self._process.wait(), self._printed()
            self.close()
            raise TargetError(f"The process of {self.runtime} ended with status {status}.{printed}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _printed(self) -> str:
        text = (self.folder / "printed").read_text(encoding="utf-8", errors="replace").strip()
        return f" It printed:\n{text[-TAIL:]}" if text else ""


def _streams(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _end(process: "subprocess.Popen[str]", folder: Path) -> None:
    for stream in _streams(process):
        stream.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
