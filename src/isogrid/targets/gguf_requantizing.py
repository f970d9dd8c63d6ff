"""The usual route, to hold Isogrid's against: weights exported as bfloat16 and quantised anew by ggml's own rules."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as GgmlType

from isogrid.files import write_whole
from isogrid.targets.gguf_base import contents_of, float_values, open_gguf
from isogrid.targets.gguf_tensors import FORMATS
from isogrid.targets.subprocesses import Worker


def requantized(source: str | Path, path: str | Path) -> Path:
    """Write a GGUF file again with every scale and code derived anew, as its weights in bfloat16 would give them.

    Types, metadata and float tensors stay as they are: what differs between the two files is the grid alone.

    Args:
        source: a GGUF file, such as an artefact of `isogrid.export`.
        path: of the new file.

    Raises:
        ArtifactError: the source is missing, corrupt or truncated.
        MissingExtraError: llama-cpp-python is not installed.
    """
    reader = open_gguf(source)
    contents = contents_of(reader)
    worker = Worker("llamacpp")
    for tensor in reader.tensors:
        if tensor.tensor_type in FORMATS and tensor.tensor_type != GgmlType.NVFP4:  # it has a scale besides
            values = float_values(tensor).to(torch.bfloat16).float()
            rows = values.reshape(-1, values.shape[-1])
            answer = worker.call("quantize", {"weight": rows}, types={"weight": int(tensor.tensor_type)})
            data = answer.tensors["weight"].numpy().reshape(np.asarray(tensor.data).shape)
            contents.tensors[tensor.name] = data, tensor.tensor_type
    worker.close()
    write_whole(Path(path), contents.write)
    return Path(path)
