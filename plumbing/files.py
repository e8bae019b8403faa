"""Files that survive: whole or not at all, and one process at a time in a folder.

A process may be killed at any instruction and a disk may be full. So a file is written under a
temporary name, flushed to the disk and then renamed, and a rename is atomic.
"""
import contextlib
import errno
import json
import os
import sys
import tempfile
from pathlib import Path

from plumbing.commands import UserError

try:
    import fcntl
except ImportError:  # Windows has none: runs are not locked there
    fcntl = None

TEMPORARY = ".tmp"


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which takes the place of `path` when the block ends.

    If the block fails, `path` stays as it was. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content):
    """Write text or bytes. At every instant the path holds the old or the new content whole."""
    with replacing(Path(path)) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder to fill, which becomes `folder` when the block ends. Raises OSError."""
    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.",
                                     suffix=TEMPORARY, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
        Path(temporary).chmod(0o755)
        Path(temporary).rename(folder)


def read_json(path, most):
    """The object in a JSON file of at most `most` bytes, a dict. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        value = None
    if len(content) > most or not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object of at most {most:,} bytes")
    return value


def lock_folder(folder):
    """Keep other processes from writing to a folder; returns the open file that holds the lock.

    The system lets go of the lock when the process ends, however it ends. What a killed process
    left half written is then removed. Raises UserError if another process holds the lock."""
    file = open(Path(folder) / ".lock", "a")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            print(f"note: {folder} lies on a file system without locks: "
                  "do not train there twice at once", file=sys.stderr)
            return file
        file.close()
        raise UserError(f"another process is training in {folder}: "
                        "wait for it, or choose another --name") from None
    for torn in Path(folder).glob(f"*.*{TEMPORARY}"):
        torn.unlink(missing_ok=True)
    return file
