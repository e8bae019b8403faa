"""Checkpoints with a checksum. The previous one is always kept.

A checkpoint may be incomplete, altered, or from an untrusted source. So it carries its SHA-256,
the one before it is kept, only tensors and plain values are ever unpickled (weights_only), and
reading it takes no more memory than the file's size.
"""
import hashlib
import os
import pickletools
import sys
import zipfile
from pathlib import Path

import torch

from plumbing.commands import UserError
from plumbing.files import open_regular, replacing

NEWEST, PREVIOUS, DAMAGED = "ckpt.pt", "ckpt-previous.pt", "ckpt-damaged.pt"
# The only names that the pickle in a checkpoint may use. weights_only allows more, such as a
# bytearray of any length.
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
# In bytes. The pickle holds names and shapes but no values. That of a run has 50,000.
LARGEST_PICKLE = 1_000_000


def fingerprint(state):
    """SHA-256, in hex, of a nested dict or list of tensors and plain values."""
    sha = hashlib.sha256()
    add_to_hash(sha, state)
    return sha.hexdigest()


def add_to_hash(sha, value):
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.numel():
            sha.update(value.view(-1).view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            sha.update(repr(key).encode())
            add_to_hash(sha, item)
    else:
        sha.update(repr(value).encode())


def save_checkpoint(folder, state):
    """Write state, a dict, to folder/ckpt.pt and keep the previous one, so that a complete
    checkpoint exists at every moment. Raises OSError if it cannot be written."""
    newest = Path(folder) / NEWEST
    with replacing(newest, keep=newest.with_name(PREVIOUS)) as file:
        try:
            torch.save(state | {"sha256": fingerprint(state)}, file)
        except RuntimeError as error:  # how torch reports a failed write
            message = "the disk is full or the file too large"
            raise OSError(None, message, str(newest)) from error


def load_checkpoint(folder, set_aside=False):
    """The newest intact checkpoint in a run's folder, a dict. Raises UserError if there is none.

    set_aside renames a damaged ckpt.pt. Otherwise the next save would keep it as the previous
    checkpoint, in place of the good one."""
    problems = []
    for name in (NEWEST, PREVIOUS):
        path = Path(folder) / name
        try:
            state = read_checkpoint(path)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        except PermissionError:
            raise
        except Exception as error:  # a truncated or altered archive fails in many ways
            reason = str(error) if isinstance(error, UserError) else type(error).__name__
            problems.append(f"{name} is damaged ({reason})")
            continue
        if problems:
            print(f"{folder}: {problems[0]}; using {name} from step {state['step']}",
                  file=sys.stderr)
            if set_aside and path.with_name(NEWEST).exists():
                path.with_name(NEWEST).replace(path.with_name(DAMAGED))
        return state
    raise UserError(f"no usable checkpoint in {folder}: " + ", ".join(problems))


def read_checkpoint(path):
    """A checkpoint, if it is intact. Raises UserError, OSError, or what torch.load raises."""
    with open_regular(path) as file:
        check_archive(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    check_values(state, set())
    if state.pop("sha256") != fingerprint(state):
        raise UserError("its checksum is wrong")
    if not isinstance(state.get("step"), int):
        raise UserError("it has no step")
    return state


def check_archive(file):
    """Raise an error if a checkpoint, an open zip archive, would grow when unpacked, or if its
    pickle uses any name outside NAMES."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        unpacked = sum(member.file_size for member in members)
        if unpacked > size or any(member.compress_type for member in members):
            raise UserError("it is compressed")
        pickle, = [member for member in members if member.filename.endswith("data.pkl")]
        if pickle.file_size > LARGEST_PICKLE:
            raise UserError("its pickle is too large")
        for opcode, argument, _ in pickletools.genops(archive.read(pickle)):
            if opcode.name == "GLOBAL" and argument not in NAMES:
                raise UserError(f"its pickle names {argument[:40]}")
    file.seek(0)


def check_values(value, seen):
    """Raise UserError unless tensors fill their memory with finite values, and no tensor, dict or
    list occurs twice. Otherwise a small file could expand to a huge state. `seen` holds the
    objects found so far."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if not (value.is_contiguous() and value.nbytes == storage.nbytes()):
            raise UserError("a tensor does not fill its memory")
        if not value.isfinite().all():
            raise UserError("it holds values that are not finite")
        identity, items = storage.data_ptr(), []
    elif isinstance(value, dict):
        identity, items = id(value), value.values()
    elif isinstance(value, list):
        identity, items = id(value), value
    elif isinstance(value, tuple):  # Adam's betas, which its groups share
        if len(value) > 9 or any(not isinstance(item, (int, float)) for item in value):
            raise UserError("a tuple holds more than a few numbers")
        return
    else:
        return
    if identity in seen:
        raise UserError("a part of it occurs twice")
    seen.add(identity)
    for item in items:
        check_values(item, seen)
