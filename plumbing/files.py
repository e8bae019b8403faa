"""Files that survive: whole or not at all, and one process at a time in a folder.

A process may be killed at any instruction and a disk may be full. So a file is written under a
temporary name, flushed to the disk and then renamed, and a rename is atomic.
"""
import contextlib
import errno
import os
import sys
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
