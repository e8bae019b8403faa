"""The safetensors format: named tensors in one file, without any code that could be run.

A file holds the length of its header (8 bytes), the header (JSON: type, shape and position of each
tensor), and the bytes of the tensors, little-endian. A file may come from anyone, so the header is
checked against the size of the file before a byte of a tensor is read.
"""
import json
import math
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from plumbing.commands import UserError
from plumbing.files import open_regular, read_json, replacing

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A thousand layers need a header of 1 MB. Parsing a much larger one could fill the memory.
LARGEST_HEADER = 4_000_000
MOST_DIMENSIONS = 8


class Stored(NamedTuple):
    """Where a tensor is stored: bytes start to end of a file."""
    path: Path
    dtype: torch.dtype
    shape: tuple
    start: int
    end: int


def find_tensors(folder):
    """{name: Stored} of a model folder, from model.safetensors or from the files that
    model.safetensors.index.json names. Reads no tensor. Raises UserError."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_header(single)
    files = read_json(index, LARGEST_HEADER).get("weight_map")  # {name of a tensor: its file}
    names = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index} does not say which file of the folder holds which tensor")
    tensors = {}
    for file in sorted(set(names)):
        tensors |= read_header(folder / file)
    found = {name: stored.path.name for name, stored in tensors.items()}
    if found != files:
        raise UserError(f"the tensors that {index} names are not those in its files: download the "
                        "folder again")
    return tensors


def read_header(path):
    """{name: Stored} of one file. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing: a model's weights are read from safetensors files "
                        "only, never from pickled ones")
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(LARGEST_HEADER, size - 8):
                raise ValueError(f"its header of {length} bytes is too long")
            header = json.loads(file.read(length).decode())
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        tensors = {name: parse_entry(path, 8 + length, size, name, entry)
                   for name, entry in header.items() if name != "__metadata__"}
        check_places(tensors, 8 + length, size)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    return tensors


def parse_entry(path, body, size, name, entry):
    """The Stored for an entry of the header. The tensors are in bytes `body` to `size` of the file.
    Raises ValueError."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = DTYPES.get(dtype)
        in_file = all(type(n) is int and 0 <= n <= size for n in [*shape, start, end])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r:.80} has no type, shape and offsets") from None
    if known is None:
        raise ValueError(f"tensor {name!r:.80} is of type {dtype!r:.20}, not F32, F16 or BF16")
    fits = in_file and len(shape) <= MOST_DIMENSIONS and start <= end <= size - body
    if not fits or math.prod(shape) * known.itemsize != end - start:
        raise ValueError(f"the shape and the offsets of tensor {name!r:.80} do not fit")
    return Stored(path, known, tuple(shape), body + start, body + end)


def check_places(tensors, body, size):
    """Raise ValueError unless each byte from `body` to `size` belongs to exactly one tensor."""
    place = body
    for stored in sorted(tensors.values(), key=lambda stored: stored[3:]):
        if stored.start != place:
            raise ValueError("its tensors overlap, or bytes between them belong to none")
        place = stored.end
    if place != size:
        raise ValueError("it is longer than its tensors")


def read_tensor(stored):
    """The tensor, in float32. Only its own bytes of the file are read."""
    if stored.start == stored.end:
        return torch.zeros(stored.shape)
    file = np.memmap(stored.path, dtype=np.uint8, mode="r")
    content = torch.from_numpy(file[stored.start:stored.end].copy())
    return content.view(stored.dtype).reshape(stored.shape).float()


def write_safetensors(path, state):
    """Write a state dict, in float32. Raises OSError."""
    header = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in state.items():
        end = start + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            values = tensor.detach().float().cpu().contiguous().numpy()
            file.write(values.astype("<f4", copy=False))
