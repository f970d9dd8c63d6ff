"""The other end of `isogrid.targets.subprocesses`: run as a script, it calls the functions of one worker's file.

    python serving.py WORKER.py FOLDER

It reads requests from its standard input, one JSON object a line, and writes one line of JSON for each. Tensors travel
in safetensors files in FOLDER. This script and the workers beside it know nothing of Isogrid: they run in the
environment of a runtime, which has torch, safetensors and the runtime.
"""

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def serve(worker: Any, folder: Path, requests: Any, answers: Any) -> None:
    """Answer requests until there are no more.

    Args:
        worker: has the functions; each takes tensors by name and arguments, and returns (JSON data, tensors by name).
        folder: for tensors.
        requests, answers: text streams.
    """
    answers.write('{"ready": true}\n')
    answers.flush()
    for number, line in enumerate(requests):
        request = json.loads(line)
        try:
            tensors = load_file(request["tensors"]) if request["tensors"] else {}
            value, results = getattr(worker, request["function"])(tensors, **request["arguments"])
            path = folder / f"answer{number}.safetensors"
            if results:
                save_file({name: tensor.contiguous().clone() for name, tensor in results.items()}, path)
            answer = {"value": value, "tensors": str(path) if results else ""}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Load the worker's file and serve."""
    # Runtimes print. What they print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    sys.path.pop(0)  # the folder of this script, where a worker has the name of its runtime
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(worker)
    except ModuleNotFoundError as error:
        answers.write(json.dumps({"missing": error.name}) + "\n")
        return
    serve(worker, folder, sys.stdin, answers)


if __name__ == "__main__":
    main()
