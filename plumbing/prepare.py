"""Text -> a tokenizer and two token files, made once and kept in a cache.

A prepared folder holds `tokenizer.tiktoken`, the uint16 token files `train.bin` and `val.bin`, and
`info.json` with its counts and the SHA-256 of each file. In the cache, the folder's name is a hash
of everything it was made from.
"""
import hashlib
import importlib.util
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.commands import BAD_PATH, UserError
from plumbing.files import (new_folder, open_regular, parse_json, read_file, replacing,
                            write_atomically)
from plumbing.text import (PACKAGES, digest, documents, installed_docs, is_validation, read_ids,
                           text_files, token_files)
from plumbing.tokenizer import (END, FILE, bpe_encoding, count_pretokens, gpt2_encoding,
                                load_encoding, save_tokens, train_bpe)

# Increased when the format of the files in the cache changes.
FORMAT = 2
# The vocabulary needs room for 256 bytes, END and MASK, and ids are uint16.
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 260, 65_536
SMALLEST_FOR_GPT2 = 50_258
LARGEST_GPT2_ID = 50_256
# How many tokens are copied and checked at a time.
BLOCK = 2 ** 22
# How many documents are tokenized at a time, on all cores.
DOCUMENTS_AT_ONCE = 256
INFO = "info.json"
FILES = (FILE, "train.bin", "val.bin")
LARGEST_INFO = 1_000_000  # bytes
# Files larger than this many bytes are not checked at every start.
LARGE = 100_000_000


def cache_root(cache=None):
    """The folder for everything that can be made or fetched again. Raises UserError."""
    if cache:
        return Path(cache)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomaml"
    except RuntimeError:
        raise UserError("there is no home folder for the cache: choose one with --cache") from None


def is_prepared(folder):
    return (folder / INFO).exists() and (folder / FILE).exists()


def find_source(paths, tokenizer, vocab_size):
    """(source, tokenizer). The source is a list of text files, empty for the documentation on
    this disk, or {"train": files, "val": files} of GPT-2 ids. Raises UserError."""
    found = [token_files(path) for path in paths]
    if any(found) and len(paths) > 1:
        raise UserError("token files cannot be combined with other paths: give one path")
    tokenizer = "gpt2" if any(found) else tokenizer
    smallest = SMALLEST_FOR_GPT2 if tokenizer == "gpt2" else SMALLEST_VOCABULARY
    if not smallest <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size} is not between {SMALLEST_VOCABULARY} (bytes "
                        f"and special tokens; {SMALLEST_FOR_GPT2} for GPT-2's ids) and "
                        f"{LARGEST_VOCABULARY} (ids are uint16)")
    return (found[0] if any(found) else text_files(paths)), tokenizer


def made_from(source):
    """What a prepared text depends on: names, sizes and times of files, or versions of packages."""
    if isinstance(source, dict):
        files = source["train"] + source["val"]
    else:
        files = source
    if files:
        stats = [(file, file.stat()) for file in files]
        return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    installed = [package for package in PACKAGES if importlib.util.find_spec(package)]
    versions = [(package, metadata.version(package)) for package in installed]
    return [platform.python_version(), *versions]


def prepared_folder(data, tokenizer, vocab_size, cache, quiet):
    """The folder in the cache with the prepared text of --data. It is made if it does not exist.
    Raises UserError."""
    source, tokenizer = find_source([data] if data else [], tokenizer, vocab_size)
    key = json.dumps([FORMAT, tokenizer, vocab_size, made_from(source)])
    folder = cache_root(cache) / digest(key).hex()[:16]
    if not folder.exists():
        name = str(data) if data else None
        try:
            prepare(folder, source, tokenizer, vocab_size, quiet, name, wait=True)
        except OSError as error:
            if error.errno not in BAD_PATH:
                raise
            raise UserError(f"cannot write to {folder.parent} ({error.strerror}): "
                            "choose another folder with --cache") from None
    return folder


def prepare(folder, source, tokenizer, vocab_size, quiet, name=None, wait=False):
    """Prepare a source from find_source in the new folder `folder`. With `wait`, another process
    may be making the same one. Raises UserError."""
    if isinstance(source, dict):
        for ids in source["train"] + source["val"]:
            read_ids(ids)  # checks headers and sizes before anything is fetched or copied
    with new_folder(folder, wait) as temporary:
        if temporary:
            info = write_prepared(temporary, source, tokenizer, vocab_size, quiet)
            info["source"] = name or "documentation of Python and " + ", ".join(PACKAGES)
            info["files"] = {part: checked(temporary / part) for part in FILES}
            write_atomically(temporary / INFO, json.dumps(info))


def checked(path):
    """The SHA-256 of a file and the time of its last change, which open_prepared compares."""
    sha = hashlib.sha256()
    with open_regular(path) as file, tqdm(
            total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True,
            disable=True if path.stat().st_size <= LARGE else None) as bar:
        while block := file.read(BLOCK):
            sha.update(block)
            bar.update(len(block))
    return {"sha256": sha.hexdigest(), "mtime_ns": path.stat().st_mtime_ns}


def write_prepared(folder, source, tokenizer, vocab_size, quiet):
    """Write the tokenizer and the token files. Returns the counts for info.json."""
    if isinstance(source, dict):
        gpt2_encoding()  # if it cannot be fetched, fail now
        save_tokens([], folder)
        return copy_ids(folder, source, quiet)
    docs = [] if source else installed_docs(quiet)
    if tokenizer == "gpt2":
        tokens, encoding = [], gpt2_encoding()
    else:
        counts = count_pretokens(read_source(source, docs, "reading", quiet))
        tokens = train_bpe(counts, vocab_size - 258, quiet)  # without the bytes, END and MASK
        encoding = bpe_encoding(tokens)
    save_tokens(tokens, folder)
    return write_tokens(folder, read_source(source, docs, "tokenizing", quiet), encoding)


def read_source(files, docs, description, quiet):
    """An iterator over the (name, text) pairs of text files or, if there are none, of docs."""
    if files:
        return documents(files, description, quiet)
    return tqdm(docs, desc=description, unit="document", disable=True if quiet else None)


def batched(items, size):
    """Yield lists of `size` items; the last one may be shorter."""
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def write_tokens(folder, stream, encoding):
    """Tokenize documents, (name, text) pairs, into train.bin and val.bin, with END after each.
    Returns the counts and the SHA-256. Raises UserError if there is no document."""
    end = encoding.encode_single_token(END)
    info = {"documents": 0, "bytes": 0, "tokens": [0, 0]}
    sha = hashlib.sha256()
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val:
        for batch in batched(stream, DOCUMENTS_AT_ONCE):
            texts = [text for _, text in batch]
            encoded = encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)
            for (name, text), ids in zip(batch, encoded):
                content = np.array(ids + [end], dtype=np.uint16).tobytes()
                in_val = is_validation(name)
                (val if in_val else train).write(content)
                sha.update(content)
                info["documents"] += 1
                info["bytes"] += len(text.encode("utf-8", "replace"))
                info["tokens"][in_val] += len(ids) + 1
    if not info["documents"]:
        raise UserError("the text is empty: name files that hold text")
    return info | {"sha256": sha.hexdigest()}


def copy_ids(folder, shards, quiet):
    """Check files of GPT-2 ids and copy them to train.bin and val.bin. Without validation files,
    the last tenth of each file goes to val.bin. Returns the counts and the SHA-256."""
    sha = hashlib.sha256()
    counts = {"train": 0, "val": 0}
    files = [("train", file) for file in shards["train"]]
    files += [("val", file) for file in shards["val"]]
    total = sum(file.stat().st_size for _, file in files)
    with replacing(folder / "train.bin") as train, replacing(folder / "val.bin") as val, \
            tqdm(total=total, desc="copying", unit="B", unit_scale=True,
                 disable=True if quiet else None) as bar:
        outputs = {"train": train, "val": val}
        for part, file in files:
            ids = read_ids(file)
            stretches = [(part, 0, len(ids))]
            if not shards["val"]:
                cut = len(ids) * 9 // 10
                stretches = [("train", 0, cut), ("val", cut, len(ids))]
            for output, first, last in stretches:
                for start in range(first, last, BLOCK):
                    block = ids[start:min(start + BLOCK, last)]
                    check_gpt2_ids(block, file, start)
                    content = block.tobytes()
                    outputs[output].write(content)
                    sha.update(content)
                    counts[output] += len(block)
                    bar.update(len(content))
    return {"documents": None, "bytes": None, "tokens": [counts["train"], counts["val"]],
            "sha256": sha.hexdigest()}


def check_gpt2_ids(block, file, start):
    """Raise UserError unless block (n,), which begins at id number start of file, can be GPT-2
    ids. Read as uint16, every second value of 32-bit ids would be 0."""
    looks_like_32_bits = len(block) > 8 and not block[1::2].any()
    if block.max() > LARGEST_GPT2_ID or looks_like_32_bits:
        raise UserError(f"{file} does not hold uint16 GPT-2 ids (0 to {LARGEST_GPT2_ID}) near id "
                        f"number {start}: use GPT-2's tokenizer and 16 bits per id")


def open_prepared(folder, vocab_size, check_all=False):
    """(info, encoding, train, val) of a prepared folder; train and val are uint16 memory maps.
    Raises UserError if its files do not match its info.json.

    A large file is checked in full only if it has changed since it was written, or with
    check_all."""
    path = folder / INFO
    damaged = UserError(f"the prepared text in {folder} is incomplete or damaged: prepare it again "
                        "(in the cache, just remove it)")
    if not all((folder / name).exists() for name in (INFO, *FILES)):
        raise damaged
    info = parse_json(read_file(path, LARGEST_INFO), path,
                      {"tokens": list, "sha256": str, "source": str})
    files = info.get("files")  # folders of earlier versions have none
    try:
        train, val = map_tokens(folder / "train.bin"), map_tokens(folder / "val.bin")
    except ValueError:  # an odd number of bytes
        raise damaged from None
    if info["tokens"] != [len(train), len(val)] or len(info["sha256"]) != 64:
        raise damaged
    if files is not None and not is_intact(folder, files, check_all):
        raise damaged
    encoding = load_encoding(folder)
    if encoding.n_vocab > vocab_size:
        raise UserError(f"{folder} was prepared with a vocabulary of {encoding.n_vocab}: "
                        f"--vocab-size {vocab_size} is too small; use at least "
                        f"{encoding.n_vocab}, or prepare the text again "
                        "(python data.py PATH --out FOLDER --vocab-size N)")
    # Files from elsewhere may match their info.json but not their tokenizer.
    if files is None or check_all or train.nbytes <= LARGE:
        check_ids(folder, encoding, train, val)
    return info, encoding, train, val


def is_intact(folder, files, check_all):
    """Whether the files in a folder still match what `checked` recorded."""
    for name in FILES:
        stat = (folder / name).stat()
        record = files.get(name) if isinstance(files, dict) else None
        if not isinstance(record, dict):
            return False
        changed = stat.st_mtime_ns != record.get("mtime_ns")
        if check_all or changed or stat.st_size <= LARGE:
            if checked(folder / name)["sha256"] != record.get("sha256"):
                return False
    return True


def map_tokens(path):
    """The uint16 ids (n,) in a file, as a memory map."""
    with open_regular(path) as file:
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.zeros(0, dtype=np.uint16)
        return np.memmap(file, dtype=np.uint16, mode="r")


def blocks(tokens):
    """Yield tokens (n,) in blocks that fit in memory."""
    for start in range(0, len(tokens), BLOCK):
        yield tokens[start:start + BLOCK]


def check_ids(folder, encoding, *parts):
    """Raise UserError if the encoding lacks a token. Reads all of the parts, (n,) each."""
    for tokens in parts:
        for block in blocks(tokens):
            if block.max() >= encoding.n_vocab:
                raise UserError(f"the prepared text in {folder} holds the id {block.max()}, but "
                                f"its tokenizer ends at {encoding.n_vocab - 1}: prepare it again")
