"""Where text comes from, and what cuts it into tokens.

    from text import documents, installed_docs, load_encoding, train_bpe

Documents are (name, text) pairs: from the documentation on this disk, which needs no download (the
docstrings of the Python standard library and of the packages in PACKAGES, read with `ast` and never imported), or from text
and JSON-lines files, read in a stream that holds one document or line at a time. The tokenizer is a byte-level BPE learnt from
them, or GPT-2's.
"""
import ast
import base64
import codecs
import gc
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import re
import sys
import sysconfig
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency; it understands the same \p{...} patterns
import tiktoken
from tqdm import tqdm

PACKAGES = ["numpy", "torch", "matplotlib", "sympy", "networkx"]  # beside the standard library; torch brings the last two
TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
KINDS = (".txt", ".jsonl", ".jsonl.gz", ".json.gz")  # the last is what Dolma calls its JSON lines
PIECE = 16_384                # long files are cut into documents of this many bytes, and to the end of the line if that is near
LONGEST_LINE = 64_000_000     # bytes of a JSON line
SHARD_MAGIC = 20240520        # of llm.c's token files: 256 int32 (magic, version 1, tokens, ...), then uint16 ids
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's split into pre-tokens
BPE_SAMPLE = 64_000_000       # characters of training text from which the tokenizer learns
BPE_KINDS = 2_000_000         # kinds of pre-tokens it can hold: beyond, the rarer half is dropped
END, MASK = "<|endoftext|>", "<|mask|>"


class DataError(Exception):
    """The user's text, tokens or settings cannot be used; the message says why and what to do."""


# ---- documents ---------------------------------------------------------------------------------------------

def digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def is_validation(name):
    """A tenth of the documents, chosen by a hash of their name, is kept for validation."""
    return digest(name)[-1] % 10 == 0


def installed_docs(quiet=False):
    """[(name, text)] for each module with docstrings on this machine, ordered by a hash of the name. A docstring
    that stands twice is taken once, so that validation text is not training text by another name."""
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            roots.append((package, Path(spec.origin).parent))
    files = [(f"{name}/{path.relative_to(root).as_posix()}", path) for name, root in roots for path in root.rglob("*.py")
             if not TEST_FOLDERS.intersection(path.relative_to(root).parts[:-1])]
    files.sort(key=lambda item: digest(item[0]))
    documents, seen = [], set()
    gc.disable()  # syntax trees are many small objects: the collector's passes over them took a third of the time
    try:
        for name, path in tqdm(files, desc="reading documentation", unit="file", disable=True if quiet else None):
            texts = [text for text in docstrings(path) if not (digest(text) in seen or seen.add(digest(text)))]
            if texts:
                documents.append((name, "\n\n".join(texts)))
    finally:
        gc.enable()
    return documents


def docstrings(path):
    """The docstrings of one source file, in order; for pydoc_data/topics.py, a table of texts, its long strings."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []  # a file that Python itself could not read (templates, other versions' syntax)
    if path.parent.name == "pydoc_data":
        return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                and isinstance(node.value, str) and len(node.value) > 200]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((node for node in ast.walk(tree) if isinstance(node, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for text in map(ast.get_docstring, nodes) if text]


def text_files(paths):
    """The files that paths (strings) name, sorted: files, and in folders all of the kinds in KINDS. Raises DataError."""
    files, outside = [], 0
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.name.endswith(KINDS) and file.is_file())
            if not found:
                raise DataError(f"no {' or '.join(KINDS)} file in the folder {path}: put text files there, or name one file")
            inside = [file for file in found if file.resolve().is_relative_to(path.resolve())]
            if not inside:  # an empty list would stand for the installed documentation
                raise DataError(f"all text files in {path} are links out of it: name the folder that they lead to")
            outside += len(found) - len(inside)
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path} is not a file or folder" if path.exists() else f"no such file or folder: {path}")
    if outside:
        print(f"{outside} links out of the folder are left out", file=sys.stderr)
    return files


def documents(files, what, quiet=False):
    """Yield (name, text) from files, holding one at a time; `what` stands on the progress bar. Raises DataError naming
    file and place."""
    with tqdm(total=sum(file.stat().st_size for file in files if file.exists()), desc=what, unit="B", unit_scale=True, disable=True if quiet else None) as bar:
        for file in files:
            done = bar.n
            try:
                with open(file, "rb") as raw:
                    for document in json_lines(file, raw) if file.name.endswith(KINDS[1:]) else plain_text(file, raw):
                        yield document
                        bar.update(done + raw.tell() - bar.n)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{file} is damaged or ends early ({error}): get it anew") from None
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror}") from None


def plain_text(file, raw):
    """(name, text) of the pieces of a UTF-8 file, open in binary as raw: cut at line ends, unless these are far."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    for i in itertools.count():
        block = raw.read(PIECE) + raw.readline(PIECE)
        try:
            pending = len(decoder.getstate()[0])  # bytes of a character that the last cut went through
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {start - pending + error.start}): convert it first") from None
        if "\0" in text:
            raise DataError(f"{file} is not text (it holds a NUL byte at byte {start + block.index(0)}): --data takes UTF-8 text")
        if not block:
            return
        if text.strip():
            yield f"{file.name}#{i}", text.replace("\r\n", "\n")
        start += len(block)


def json_lines(file, raw):
    """(name, text) of the `text` fields of a JSON-lines file, one object a line, open in binary as raw, perhaps gzipped."""
    stream = gzip.open(raw) if file.name.endswith(".gz") else raw
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
        if len(line) > LONGEST_LINE:
            raise DataError(f"{file}, line {number}: longer than {LONGEST_LINE:,} bytes")
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text = text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"{file}, line {number}: not a JSON object with a `text` that is a string: {line[:60]}") from None
        for at in range(0, len(text), PIECE):
            if text[at:at + PIECE].strip():
                yield f"{file.name}:{number}", text[at:at + PIECE]  # one name: the pieces stay on one side of the split


def token_files(path):
    """{"train": files, "val": files} if path names files of GPT-2 ids: one .bin file, or a folder of them as nanoGPT
    (train.bin, val.bin) and llm.c (names with _train_ and _val_) make it; else {}. Raises DataError."""
    path = Path(path)
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path] if path.suffix == ".bin" and path.is_file() else []
    for own in ("meta.pkl", "tokenizer.tiktoken"):
        if files and (files[0].parent / own).exists():
            raise DataError(f"{path} has a vocabulary of its own ({own}): only GPT-2 ids can be read, or a whole folder that data.py --out made")
    val = [file for file in files if re.search(r"(^|[_.-])val([_.-]|$)", file.name)]
    if files and len(val) == len(files):
        raise DataError(f"{path} holds token files for validation, but none to train on")
    return {"train": [file for file in files if file not in val], "val": val} if files else {}


def read_ids(file):
    """A file of GPT-2 ids as a uint16 memory map, once its header and size are right. Raises DataError."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as raw:
            start = raw.read(1024)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    header = np.frombuffer(start, dtype="<i4") if size >= 1024 else [0]
    at = 1024 if header[0] == SHARD_MAGIC else 0
    if start.startswith(b"\x93NUMPY"):
        raise DataError(f"{file} is an array saved by NumPy: write the bare ids (array.astype('uint16').tofile)")
    if at and (header[1] != 1 or size != 1024 + 2 * int(header[2])):
        raise DataError(f"{file} is of version {header[1]} and has {size - 1024} bytes of ids: its header must say version 1, and {header[2]} ids are {2 * int(header[2])} bytes")
    if size % 2 or size == at:
        raise DataError(f"{file} has {size} bytes: uint16 ids take two each, and there must be some")
    return np.memmap(file, dtype="<u2", mode="r", offset=at)


# ---- tokenizer ---------------------------------------------------------------------------------------------

def count_words(stream):
    """Counter of the pre-tokens in the training documents of stream, as far as BPE_SAMPLE reaches."""
    counts, size = Counter(), 0
    for name, text in stream:
        if not is_validation(name):
            counts.update(word for word in regex.findall(PATTERN, text) if len(word) <= 256)  # longer ones are no words
            size += len(text)
        if len(counts) > BPE_KINDS:
            counts = Counter(dict(counts.most_common(BPE_KINDS // 2)))
        if size >= BPE_SAMPLE:
            break
    return counts


def train_bpe(counts, n_merges, quiet=False):
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) from pre-token counts {str: int}.

    Returns the token bytes in order of rank: 256 bytes, then at most n_merges merges, fewer if no pair stands
    twice. Pair counts are updated where a merge happened, and a heap with stale entries finds the next pair."""
    words, frequency = [list(word.encode()) for word in counts], list(counts.values())
    tokens = [bytes([i]) for i in range(256)]
    pair_count, where = Counter(), defaultdict(set)  # pair -> occurrences; pair -> words that may hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += frequency[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    bar = tqdm(total=n_merges, desc="learning the tokenizer", unit="merge", disable=True if quiet else None)
    while heap and len(tokens) < 256 + n_merges:
        count, pair = heapq.heappop(heap)
        current = pair_count[pair]
        if current != -count:  # stale: the pair has lost occurrences since
            if current > 1:
                heapq.heappush(heap, (-current, pair))
            continue
        if current < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        change = Counter()
        for i in where.pop(pair):
            old, merged = words[i], merge(words[i], pair, new)
            for p in zip(old, old[1:]):
                change[p] -= frequency[i]
            for p in zip(merged, merged[1:]):
                change[p] += frequency[i]
                where[p].add(i)
            words[i] = merged
        for p, delta in change.items():
            pair_count[p] += delta
            if delta > 0:
                heapq.heappush(heap, (-pair_count[p], p))
        bar.update()
    bar.close()
    return tokens


def merge(word, pair, new):
    """Replace each occurrence of pair in the list word, from the left, by new."""
    out, i = [], 0
    while i < len(word):
        found = word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]
        out.append(new if found else word[i])
        i += 1 + found
    return out


def bpe_encoding(tokens):
    """tiktoken.Encoding of the ranked tokens, with END and MASK behind them."""
    return tiktoken.Encoding("nanomaml", pat_str=PATTERN, mergeable_ranks={token: i for i, token in enumerate(tokens)},
                             special_tokens={END: len(tokens), MASK: len(tokens) + 1})


def gpt2_encoding():
    """tiktoken's GPT-2 encoding with MASK in the padding, at id 50257. Raises DataError where it cannot be fetched."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many kinds, and whatever a proxy makes of them
        raise DataError(f"the GPT-2 vocabulary could not be fetched ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
                        "folder that holds it, or use the default --tokenizer bpe, which needs no network") from None
    return tiktoken.Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                             special_tokens={END: 50256, MASK: 50257})


def load_encoding(folder):
    """The tokenizer that lies in a cache or run folder: `tokenizer.tiktoken`, a line of base64 and rank per token
    (tiktoken's own format), or GPT-2's if that file is empty."""
    try:
        lines = (Path(folder) / "tokenizer.tiktoken").read_bytes().splitlines()
        return bpe_encoding([base64.b64decode(line.split()[0]) for line in lines]) if lines else gpt2_encoding()
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"no readable tokenizer in {folder}: {error}") from None


def byte_letters():
    """(256,) the printable letter that GPT-2's tokenizer files write for each byte (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = dict(zip(printable, map(chr, printable))) | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def hugging_face_tokenizer(encoding):
    """tokenizer.json, as a dict: the same tokens by Hugging Face's rules as by tiktoken's. tiktoken merges the neighbours whose
    concatenation has the lowest rank, Hugging Face the pair that stands first in a list: so every pair that makes a token is
    listed, in order of that token's rank."""
    letters, ranks = byte_letters(), encoding._mergeable_ranks
    name = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [[name[token[:at]], name[token[at:]]] for token, _ in sorted(ranks.items(), key=lambda item: item[1])
              for at in range(1, len(token)) if token[:at] in ranks and token[at:] in ranks]
    special = [{"id": encoding.encode_single_token(token), "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                "normalized": False, "special": True} for token in (END, MASK)]
    bytes_as_letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}, bytes_as_letters]},
            "post_processor": None, "decoder": bytes_as_letters,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,  # a pre-token that is a token stays whole, as in tiktoken
                      "vocab": {name[token]: rank for token, rank in ranks.items()}, "merges": merges}}
