"""Checkpoints with a checksum and a predecessor.

A checkpoint may be torn, altered, or come from a stranger. So it carries its SHA-256, the one
before it is kept, and nothing but tensors and plain values is ever unpickled (weights_only).
"""
import hashlib
import os
import sys
from pathlib import Path

import torch

from plumbing.commands import UserError
from plumbing.files import replacing

NEWEST, PREVIOUS = "ckpt.pt", "ckpt-previous.pt"


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
    """Write state, a dict, to folder/ckpt.pt and keep the one before, so that a whole checkpoint
    exists at every instant. Raises OSError if it cannot be written."""
    newest = Path(folder) / NEWEST
    with replacing(newest) as file:
        try:
            torch.save(state | {"sha256": fingerprint(state)}, file)
        except RuntimeError as error:  # torch's own words for a write that failed
            message = "the disk is full or the file too large"
            raise OSError(None, message, str(newest)) from error
        file.flush()
        os.fsync(file.fileno())
        if newest.exists():
            newest.replace(newest.with_name(PREVIOUS))


def load_checkpoint(folder):
    """The newest whole checkpoint in a run's folder, a dict. Raises UserError if there is none."""
    problems = []
    for name in (NEWEST, PREVIOUS):
        try:
            state = torch.load(Path(folder) / name, map_location="cpu", weights_only=True)
            intact = state.pop("sha256") == fingerprint(state)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        except Exception as error:  # a truncated or altered archive fails in many ways
            problems.append(f"{name} is damaged ({type(error).__name__})")
            continue
        if intact:
            if problems:
                print(f"{folder}: {problems[0]}; using {name}, of step {state['step']}",
                      file=sys.stderr)
            return state
        problems.append(f"{name} is damaged (its checksum is wrong)")
    raise UserError(f"no usable checkpoint in {folder}: " + ", ".join(problems))
