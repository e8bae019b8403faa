"""Sources of text: the documentation on this disk, text files, files of token ids.

A document is a (name, text) pair. The default corpus needs no download: it is the docstrings of
the Python standard library and of a few packages, read with `ast` and never imported. Text and
JSON-lines files are read as a stream, one document at a time.
"""
import ast
import codecs
import gc
import gzip
import hashlib
import importlib.util
import os
import re
import sys
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.commands import UserError
from plumbing.files import open_regular, parse_json

# Read in addition to the standard library. torch installs the last two.
PACKAGES = ["numpy", "torch", "matplotlib", "sympy", "networkx"]
TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}

# Dolma calls its JSON-lines files .json.gz.
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
TEXT_KINDS = (".txt", *JSON_LINES)

# Long files are cut into documents of this many bytes, up to the end of the line if it is near.
PIECE = 16_384
# The longest line of a JSON-lines file, in bytes.
LONGEST_LINE = 16_000_000
# gzip never compresses text more than this, in bytes of text per byte of gzip. A file beyond that
# would take hours to read. The slack is for short files.
TIGHTEST, SLACK = 200, 1_000_000
# llm.c's token files begin with 256 int32 numbers: this one, version 1, the count of ids, ... The
# uint16 ids follow.
SHARD_MAGIC = 20240520
SHARD_HEADER = 1024


def digest(text):
    """SHA-256 of a string, as bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_validation(name):
    """Whether a document is for validation: a tenth of them, chosen by a hash of their name."""
    return digest(name)[-1] % 10 == 0


# ---- the documentation on this disk ------------------------------------------------------------

def source_files():
    """[(name, path)] of the Python files of the standard library and of PACKAGES, without tests,
    in the order of a hash of their name."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            roots.append((package, Path(spec.origin).parent))
    files = []
    for package, root in roots:
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            if not TEST_FOLDERS.intersection(relative.parts[:-1]):
                files.append((f"{package}/{relative.as_posix()}", path))
    return sorted(files, key=lambda file: digest(file[0]))


def installed_docs(quiet=False):
    """[(name, text)]: the docstrings of each module on this machine that has any.

    A docstring that occurs twice is used once. Otherwise validation text could also be training
    text, under another name."""
    documents, seen = [], set()
    # Syntax trees are many small objects. Garbage collection of them took a third of the time.
    gc.disable()
    try:
        bar = tqdm(source_files(), desc="reading documentation", unit="file",
                   disable=True if quiet else None)
        for name, path in bar:
            new = []
            for text in docstrings(path):
                if digest(text) not in seen:
                    seen.add(digest(text))
                    new.append(text)
            if new:
                documents.append((name, "\n\n".join(new)))
    finally:
        gc.enable()
    return documents


def docstrings(path):
    """The docstrings of one source file, in order. pydoc_data/topics.py is a table of texts: its
    long strings are returned."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # a template, or syntax of another version of Python
    if path.parent.name == "pydoc_data":
        strings = [node.value for node in ast.walk(tree)
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return [text for text in strings if len(text) > 200]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [ast.get_docstring(node) for node in nodes]
    return [text for text in texts if text]


# ---- text files --------------------------------------------------------------------------------

def text_files(paths):
    """The text files that paths (strings) name: files, and in folders all of TEXT_KINDS, sorted.
    Links that lead out of a folder are skipped. Raises UserError."""
    files, outside = [], 0
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(file for file in path.rglob("*")
                           if file.name.endswith(TEXT_KINDS) and file.is_file())
            inside = [file for file in found if file.resolve().is_relative_to(path.resolve())]
            if not found:
                raise UserError(f"no {' or '.join(TEXT_KINDS)} file in the folder {path}: "
                                "put text files there, or name one file")
            if not inside:
                raise UserError(f"all text files in {path} are links out of it: "
                                "name the folder that they lead to")
            outside += len(found) - len(inside)
            files += inside
        elif path.exists():
            raise UserError(f"{path} is not a file or folder")
        else:
            raise UserError(f"no such file or folder: {path}")
    if outside:
        print(f"skipped links that lead out of the folder: {outside}", file=sys.stderr)
    return files


def documents(files, description, quiet=False):
    """Yield (name, text) from text files, one document at a time. Raises UserError naming the
    file and the place. `description` labels the progress bar."""
    total = sum(file.stat().st_size for file in files if file.exists())
    with tqdm(total=total, desc=description, unit="B", unit_scale=True,
              disable=True if quiet else None) as bar:
        for file in files:
            before = bar.n
            read = json_lines if file.name.endswith(JSON_LINES) else plain_text
            try:
                with open_regular(file) as raw:
                    for document in read(file, raw):
                        yield document
                        bar.update(before + raw.tell() - bar.n)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise UserError(f"{file} is damaged or ends early ({error}): "
                                "get it again") from None


def plain_text(file, raw):
    """Yield (name, text) for the pieces of a UTF-8 file, opened in binary mode as raw."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start, number = 0, 0
    while True:
        block = raw.read(PIECE) + raw.readline(PIECE)
        # the bytes of a character that the last cut divided
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = start - pending + error.start
            raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {place}): "
                            "convert it first") from None
        if "\0" in text:
            raise UserError(f"{file} is not text (it holds a NUL byte at byte "
                            f"{start + block.index(0)}): --data takes UTF-8 text")
        if not block:
            return
        if text.strip():
            yield f"{file.name}#{number}", text.replace("\r\n", "\n")
        start += len(block)
        number += 1


def json_lines(file, raw):
    """Yield (name, text) for the `text` fields of a JSON-lines file, opened in binary mode as raw
    and perhaps gzipped. A long text becomes several pieces with the same name, so that all of
    them fall on one side of the split."""
    stream = gzip.open(raw) if file.name.endswith(".gz") else raw
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        place = f"{file}, line {number}"
        if len(line) > LONGEST_LINE:
            raise UserError(f"{place}: longer than {LONGEST_LINE:,} bytes")
        if stream.tell() > TIGHTEST * raw.tell() + SLACK:
            raise UserError(f"{place}: it unpacks to over {TIGHTEST} times its size, so it is not "
                            "text")
        if not line.strip():
            continue
        # JSON may hold half of a surrogate pair, which UTF-8 cannot.
        text = parse_json(line, place, {"text": str})["text"].encode("utf-8", "replace").decode()
        for start in range(0, len(text), PIECE):
            piece = text[start:start + PIECE]
            if piece.strip():
                yield f"{file.name}:{number}", piece


# ---- files of token ids ------------------------------------------------------------------------

def token_files(path):
    """{"train": files, "val": files} if path names files of GPT-2 ids, else {}.

    It may be one .bin file, or a folder of them made by nanoGPT (train.bin, val.bin) or llm.c
    (names with _train_ and _val_). Raises UserError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.bin"))
    elif path.suffix == ".bin" and path.is_file():
        files = [path]
    else:
        files = []
    if not files:
        return {}
    for own in ("meta.pkl", "tokenizer.tiktoken"):
        if (files[0].parent / own).exists():
            raise UserError(f"{path} has its own vocabulary ({own}): give GPT-2 ids, or a whole "
                            "folder that data.py --out made")
    val = [file for file in files if re.search(r"(^|[_.-])val([_.-]|$)", file.name)]
    train = [file for file in files if file not in val]
    if not train:
        raise UserError(f"{path} holds token files for validation, but none to train on: add one")
    return {"train": train, "val": val}


def read_ids(file):
    """A file of GPT-2 ids as a uint16 memory map. Its header and size are checked first. Raises
    UserError."""
    with open_regular(file) as raw:
        start = raw.read(SHARD_HEADER)
        size = os.fstat(raw.fileno()).st_size
    if start.startswith(b"\x93NUMPY"):
        raise UserError(f"{file} is an array saved by NumPy: write only the ids "
                        "(array.astype('uint16').tofile)")
    header = np.frombuffer(start, dtype="<i4") if size >= SHARD_HEADER else [0]
    offset = 0
    if header[0] == SHARD_MAGIC:
        offset = SHARD_HEADER
        version, count = int(header[1]), int(header[2])
        if version != 1 or size != offset + 2 * count:
            raise UserError(f"{file} has version {version} and {size - offset} bytes of ids: its "
                            f"header must say version 1, and its {count} ids need "
                            f"{2 * count} bytes")
    if size % 2 or size == offset:
        raise UserError(f"{file} has {size} bytes: uint16 ids take two bytes each, and there must "
                        "be at least one id")
    return np.memmap(file, dtype="<u2", mode="r", offset=offset)
