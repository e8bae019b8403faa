"""Files that survive: atomic writes, checkpoints with a checksum and a predecessor, a run's lock, settings and export.

    from checkpoint import load_checkpoint, lock_run, save_checkpoint, write_atomically

A process may be killed at any instruction, a disk may be full, a file may come from a stranger. So a file is written under
a temporary name, flushed to the disk and renamed, which is atomic; a checkpoint carries its SHA-256; and nothing but
tensors and plain values is ever unpickled (weights_only).
"""
import contextlib
import errno
import hashlib
import json
import math
import os
import struct
import sys
import tempfile
from pathlib import Path

import torch

from text import END, MASK, hugging_face_tokenizer


@contextlib.contextmanager
def replacing(path):
    """A binary file to write to, which takes the place of `path` when the block ends: whole, and on the disk. If the block
    fails, path is what it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content):
    """Write text or bytes to path so that it is at every instant the old file or the new one. Raises OSError."""
    with replacing(Path(path)) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def fingerprint(state):
    """SHA-256, in hex, of a nested dict or list of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
        elif isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                sha.update(repr(key).encode())
                add(item)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def save_checkpoint(folder, state):
    """Write state to folder/ckpt.pt; the one before is kept as ckpt-previous.pt, so that a whole checkpoint exists at every
    instant. Raises OSError where it cannot be written."""
    new, state = Path(folder) / "ckpt.pt", state | {"sha256": fingerprint(state)}
    with replacing(new) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own words for a write that failed
            raise OSError(None, "the disk is full or the file too large", str(new)) from error
        file.flush()
        os.fsync(file.fileno())
        if new.exists():
            new.replace(new.with_name("ckpt-previous.pt"))


def load_checkpoint(folder, device="cpu"):
    """The newest whole checkpoint in a run's folder, checked against its SHA-256. Raises ValueError if there is none."""
    problems = []
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        try:
            state = torch.load(Path(folder) / name, map_location=device, weights_only=True)
            if state.pop("sha256") == fingerprint(state):
                if problems:
                    print(f"{folder}: {problems[0]}; using {name}, of step {state['step']}", file=sys.stderr)
                return state
            problems.append(f"{name} is damaged (its checksum is wrong)")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except Exception as error:  # a truncated or altered archive fails in many ways
            problems.append(f"{name} is damaged ({type(error).__name__})")
    raise ValueError(f"no usable checkpoint in {folder}: " + ", ".join(problems))


def lock_run(folder):
    """Keep other processes from training in this folder; returns the open file that holds the lock. The system itself lets
    go of it when the process ends, however it ends, so a dead one is never in the way; the files that it had half
    written are cleared away. Raises ValueError if the folder is taken."""
    file = open(Path(folder) / ".lock", "a")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            print(f"note: {folder} lies on a file system without locks: do not train there twice at once", file=sys.stderr)
            return file
        file.close()
        raise ValueError(f"another process is training in {folder}: wait for it, or choose another --name") from None
    for torn in Path(folder).glob("*.*.tmp"):
        torn.unlink(missing_ok=True)
    return file


def read_settings(folder):
    """The config.json of a run, a dict. Raises ValueError if the folder holds none."""
    try:
        settings = json.loads((Path(folder) / "config.json").read_text())
        return settings | {"name": str(settings.get("name", Path(folder).name)), "steps": int(settings.get("steps", 0)),
                           "size": str(settings["size"]), "vocab_size": int(settings["vocab_size"]), "seed": int(settings.get("seed", 0))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{folder} is not a run: it has no readable config.json (train.py makes runs)") from None


def without_nan(value):
    """A log line's value with None for what is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- for other programs ------------------------------------------------------------------------------------

def write_safetensors(path, state):
    """A state dict in the safetensors format: a length, a JSON header, raw little-endian bytes."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in state.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at := at + 4 * tensor.numel()]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes begin at a multiple of 8
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in state.values():
            file.write(tensor.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False))


def export(decoder, encoding, folder):
    """Write a folder that Hugging Face's transformers load: LlamaForCausalLM and PreTrainedTokenizerFast. Raises OSError."""
    config, end = decoder.config, encoding.encode_single_token(END)
    described = {
        "config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size, "hidden_size": config.d_model,
                   "intermediate_size": config.d_ff, "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
                   "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim, "max_position_embeddings": config.context,
                   "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
                   "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
                   "bos_token_id": end, "eos_token_id": end},
        "tokenizer": hugging_face_tokenizer(encoding),
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context, "clean_up_tokenization_spaces": False,
                             "bos_token": END, "eos_token": END, "mask_token": MASK}}
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent, ignore_cleanup_errors=True) as work:  # renamed when it is whole
        write_safetensors(Path(work) / "model.safetensors", decoder.state_dict())
        for name, content in described.items():
            write_atomically(Path(work) / f"{name}.json", json.dumps(content, ensure_ascii=False, indent=1))
        Path(work).chmod(0o755)
        Path(work).rename(folder)
