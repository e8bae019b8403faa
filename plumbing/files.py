"""Safe reading and writing of all files that a user names or that a job may leave half done.

Only regular files of bounded size are read, and JSON is checked for the fields that are used.
A file is written completely or not at all, by one process at a time in a folder. A process may be
killed at any instruction, and a disk may be full. So a file is written under a temporary name,
flushed to the disk and renamed, and a rename is atomic.
"""
import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from pathlib import Path

from plumbing.commands import UserError

try:
    import fcntl
except ImportError:  # Windows lacks it: folders are not locked there
    fcntl = None

# The suffix of temporary files and folders. Nothing without it is ever cleaned up.
MARK = ".nanomaml-tmp"
LOCK = ".lock"
# In bytes. The default run logs 1 MB, and a large grid of taggers takes 100 MB.
LARGEST_FILE = 2_000_000_000
# The most digits of a whole number in JSON. All such numbers fit in a float.
LONGEST_NUMBER = 30


# ---- reading -----------------------------------------------------------------------------------

def open_regular(path):
    """A file, opened for reading bytes. Raises UserError if it is a pipe or a device, which may
    never end, and OSError if it cannot be read."""
    file = open(path, "rb", opener=open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path} is not a regular file")
    return file


def open_at_once(path, flags):
    """os.open, without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)


def read_file(path, most=LARGEST_FILE):
    """The bytes of a file. Raises UserError if there are more than `most`, and what open_regular
    raises."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{path} is larger than {most:,} bytes")
        return file.read(size)


def parse_json(content, place, kinds=None):
    """The value of JSON text, str or bytes. With kinds, {key: type or types}, it must be an object
    in which these keys have these types. Raises UserError, whose message begins with place."""
    try:
        value = json.loads(content, parse_int=whole_number)
    except (ValueError, RecursionError):
        raise UserError(f"{place} is not valid JSON") from None
    if kinds is None:
        return value
    if not isinstance(value, dict):
        raise UserError(f"{place} is not a JSON object")
    for key, kind in kinds.items():
        if not isinstance(value.get(key), kind):
            raise UserError(f"{place} has no {key!r} of the right type")
    return value


def whole_number(digits):
    if len(digits) > LONGEST_NUMBER:
        raise ValueError
    return int(digits)


def read_json(path, most):
    """The object in a JSON file of at most `most` bytes, a dict. Raises UserError."""
    return parse_json(read_file(path, most), path, {})


# ---- writing -----------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path, keep=None):
    """A binary file for writing, which replaces `path` when the block ends. If `keep` is given,
    the old file is renamed to it.

    If the block fails, `path` stays as it was. Raises OSError."""
    path = Path(path)
    temporary = path.with_name(f"{path.name[:40]}.{os.getpid()}{MARK}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            path.replace(keep)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path, content):
    """Write text or bytes. At every moment the file is either completely old or completely new."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def open_to_append(path):
    return open(path, "ab", buffering=0)


def append(file, content):
    """Append bytes to a file. A full disk may accept part of them before it fails."""
    while content:
        content = content[file.write(content):]


# ---- one process at a time ---------------------------------------------------------------------

def lock_folder(folder, advice="choose another folder", doing="writing to", wait=False):
    """Keep other processes from writing to a folder. Returns the open file that holds the lock.

    The system releases the lock when the process ends, however it ends. If a process was killed,
    the next one to lock the folder removes its half-written files. If another process holds the
    lock, wait for it, or raise UserError with the advice."""
    path = Path(folder) / LOCK
    busy = UserError(f"another process is {doing} {folder}: wait for it, or {advice}")
    file = open(path, "ab", opener=open_at_once)
    try:
        if not has_lock(file, folder):
            if not wait:
                raise busy
            print(f"waiting for another process that is writing {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The process that held the lock may have moved or removed the folder.
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
            raise busy
        for torn in Path(folder).glob(f"*{MARK}"):
            remove(torn)
    except BaseException:
        file.close()
        raise
    return file


@contextlib.contextmanager
def locked(folder, advice, doing="writing to"):
    """Make a folder, if necessary, and lock it for the block. If the block writes nothing there, a
    new folder is removed again. Raises UserError with the advice."""
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder, advice, doing)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): {advice}") from None
    with lock:
        try:
            yield
        finally:
            if not holds_files(folder):
                (folder / LOCK).unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()


def has_lock(file, folder):
    """Try to take the lock. Returns whether this process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
            return False
        print(f"note: {folder} is on a file system without locks: do not run two commands that "
              "write there at once", file=sys.stderr)
    return True


def remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def holds_files(folder):
    """Whether a folder holds anything other than what a killed process may have left."""
    return any(path.name != LOCK and not path.name.endswith(MARK) for path in folder.iterdir())


def is_free(folder):
    """Whether a folder does not exist or is empty."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def new_folder(folder, wait=False):
    """A temporary folder, which is renamed to `folder` when the block ends. If the block fails, it
    is removed.

    Raises UserError if the folder exists, or if another process is making it. With `wait`, it
    waits for that process and yields None once the folder exists."""
    folder = Path(folder).resolve()
    taken = UserError(f"{folder} already exists: choose another folder")
    if not is_free(folder):
        raise taken
    temporary = folder.with_name(folder.name + MARK)
    if temporary.is_symlink():  # its target is not ours to clean
        raise UserError(f"{temporary} is a link: remove it")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_folder(temporary, wait=wait)
    except (UserError, FileNotFoundError):
        if not wait or is_free(folder):
            raise
        yield None
        return
    with lock:
        if not is_free(folder):  # made since the first check
            shutil.rmtree(temporary)
            if not wait:
                raise taken
            yield None
            return
        for torn in temporary.iterdir():
            if torn.name != LOCK:
                remove(torn)
        try:
            yield temporary
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
            (folder / LOCK).unlink()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
