"""What an interpreter on another processor runs: ONNX files with their inputs, outputs kept. Needs onnxruntime alone.

    python onnx_codes.py JOBS

JOBS is a JSON list of {"model", "options", "inputs", "outputs"}: paths, and session options by name.
"""

import json
import sys

import numpy as np
import onnxruntime


def main(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        for key, value in job["options"].items():
            options.add_session_config_entry(key, value)
        session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
        with np.load(job["inputs"]) as stored:
            values = session.run(None, dict(stored))
        names = [output.name for output in session.get_outputs()]
        np.savez(job["outputs"], **dict(zip(names, values, strict=True)))


if __name__ == "__main__":
    main(sys.argv[1])
