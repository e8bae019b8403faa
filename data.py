"""Text -> tokens -> next-token batches and few-shot episodes.

    from data import load, lm_batch, EpisodeSampler

The default corpus needs no download: it is the documentation on the reader's disk, that is the docstrings of the
Python standard library and of the packages in PACKAGES, read with `ast` and never imported. Everything prepared
(tokenizer, uint16 token files, occurrence index) lies in a cache folder named after what it was made from.
"""
import ast
import base64
import gc
import hashlib
import heapq
import importlib.util
import json
import os
import platform
import shutil
import sysconfig
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency; it understands the same \p{...} patterns
import tiktoken
import torch
from tqdm import tqdm

PACKAGES = ["numpy", "torch", "matplotlib", "sympy", "networkx"]  # beside the standard library; torch brings the last two
TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's split into pre-tokens
END, MASK = "<|endoftext|>", "<|mask|>"
FORMAT = 1                    # counted up when the files in the cache change their meaning
PIECE = 16_384                # characters: long texts are cut into documents of this length, at line ends
BPE_SAMPLE = 64_000_000       # characters of training text from which the tokenizer learns
INDEX_TOKENS = 50_000_000     # tokens in which episodes look for their words
MIN_COUNT, MOST_COMMON = 64, 100  # the frequency band of the words that episodes ask about


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


def text_files(path):
    """The files of --data PATH, sorted: one text file, or the .txt files of a folder. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise DataError(f"no .txt file in the folder {path}: put plain text files there, or name one file")
        return files
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    return [path]


def text_documents(path, quiet=False):
    """Yield (name, text) of at most PIECE characters from UTF-8 text, holding one piece at a time. Raises DataError."""
    files = text_files(path)
    total = sum(file.stat().st_size for file in files)
    with tqdm(total=total, desc="reading text", unit="B", unit_scale=True, disable=True if quiet else None) as bar:
        for file in files:
            try:
                with open(file, encoding="utf-8") as stream:
                    for i, text in enumerate(iter(lambda: stream.read(PIECE), "")):
                        text += stream.readline(PIECE)  # to the end of the line, unless that is far
                        if "\0" in text:
                            raise DataError(f"{file} is not text (it holds a NUL byte): --data takes UTF-8 text")
                        if text.strip():
                            yield f"{file.name}#{i}", text
                        bar.update(len(text.encode()))
            except UnicodeDecodeError as error:
                raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
            except OSError as error:
                raise DataError(f"cannot read {file}: {error.strerror}") from None


# ---- tokenizer ---------------------------------------------------------------------------------------------

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


# ---- corpus ------------------------------------------------------------------------------------------------

@dataclass
class Corpus:
    """Tokens of one text: train and val are uint16 memory maps (n,), vocab_size counts the padding too."""
    folder: Path
    encoding: tiktoken.Encoding
    vocab_size: int
    info: dict  # documents, bytes, sha256, source

    @cached_property
    def train(self):
        return map_tokens(self.folder / "train.bin")

    @cached_property
    def val(self):
        return map_tokens(self.folder / "val.bin")

    @cached_property
    def mask_id(self):
        return self.encoding.encode_single_token(MASK)

    @cached_property
    def token_bytes(self):
        """(vocab_size,) int64: how many bytes of text each token stands for; 0 for special tokens and padding."""
        n = self.encoding.encode_single_token(END)
        sizes = [len(self.encoding.decode_single_token_bytes(i)) for i in range(n)]
        return np.array(sizes + [0] * (self.vocab_size - n))

    @cached_property
    def index(self):
        return WordIndex(self)


def map_tokens(path):
    return np.memmap(path, dtype=np.uint16, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.uint16)


def cache_root(cache=None):
    return Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanomaml"


def load(data=None, tokenizer="bpe", vocab_size=50304, cache=None, quiet=False):
    """The Corpus of --data (None: the documentation on this machine), prepared on first use and cached.

    vocab_size is the size of the decoder's vocabulary, 260 to 65536 (ids are uint16). Raises DataError."""
    if not 260 <= vocab_size <= 65536:
        raise DataError(f"--vocab-size {vocab_size} is outside 260 (the bytes and the special tokens) to 65536 (ids are uint16)")
    if tokenizer == "gpt2" and vocab_size < 50258:
        raise DataError(f"--tokenizer gpt2 has 50258 tokens with its mask: --vocab-size {vocab_size} is too small")
    if data:
        files = [file.resolve() for file in text_files(data)]
        source = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    else:
        source = [platform.python_version()]
        source += [(p, metadata.version(p)) for p in PACKAGES if importlib.util.find_spec(p)]
    key = digest(json.dumps([FORMAT, tokenizer, vocab_size, source])).hex()[:16]
    folder = cache_root(cache) / key
    if not (folder / "info.json").exists():
        prepare(folder, data, tokenizer, vocab_size, quiet)
    info = json.loads((folder / "info.json").read_text())
    return Corpus(folder, load_encoding(folder), vocab_size, info)


def prepare(folder, data, tokenizer, vocab_size, quiet):
    """Write tokenizer, token files and info.json to a folder beside `folder`, then rename it into place."""
    documents = installed_docs(quiet) if not data else None
    stream = lambda: iter(documents) if documents else text_documents(data, quiet)
    work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True, exist_ok=True)
        tokens = []
        if tokenizer == "bpe":
            counts, size = Counter(), 0
            for name, text in stream():
                if size < BPE_SAMPLE and not is_validation(name):
                    counts.update(regex.findall(PATTERN, text))
                    size += len(text)
            tokens = train_bpe(counts, vocab_size - 258, quiet)
            encoding = bpe_encoding(tokens)
        else:
            encoding = gpt2_encoding()
        (work / "tokenizer.tiktoken").write_bytes(
            b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
        info = write_tokens(work, stream(), encoding, quiet)
        info["source"] = str(data) if data else "documentation of Python and " + ", ".join(PACKAGES)
        (work / "info.json").write_text(json.dumps(info))
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "info.json").exists():  # unless another process has just done the same work
                raise
    except OSError as error:
        raise DataError(f"cannot write to the cache {folder.parent}: {error.strerror} (--cache DIR takes another folder)") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_tokens(folder, documents, encoding, quiet):
    """Tokenize (name, text) pairs into train.bin and val.bin, END behind each document; returns counts and SHA-256."""
    end, sha = encoding.encode_single_token(END), hashlib.sha256()
    info = {"documents": 0, "bytes": 0}
    threads, batch = os.cpu_count() or 1, []
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val, \
            tqdm(desc="tokenizing", unit="document", disable=True if quiet else None) as bar:
        def flush():
            ids = encoding.encode_ordinary_batch([text for _, text in batch], num_threads=threads)
            for (name, text), document in zip(batch, ids):
                data = np.array(document + [end], dtype=np.uint16).tobytes()
                (val if is_validation(name) else train).write(data)
                sha.update(data)
                info["documents"] += 1
                info["bytes"] += len(text.encode("utf-8", "replace"))
            bar.update(len(batch))
            batch.clear()
        for item in documents:
            batch.append(item)
            if len(batch) == 256:
                flush()
        flush()
        if not info["documents"]:
            raise DataError("the text is empty: there is nothing to learn from")
    return info | {"sha256": sha.hexdigest()}


# ---- next-token batches ------------------------------------------------------------------------------------

def lm_batch(tokens, number, batch_size, seq_len, seed):
    """The `number`-th batch of a shuffled walk through tokens (n,): int64 ids and targets, each (batch_size, seq_len).

    Each epoch visits every window once, in a new order and shifted by a random offset. There is no state: the
    batch is a function of (seed, number), so resuming is exact and vanilla and meta runs see the same text."""
    windows = (len(tokens) - 1) // seq_len - 1
    rows = []
    for row in range(number * batch_size, (number + 1) * batch_size):
        epoch, i = divmod(row, windows)
        order, offset = epoch_order(seed, epoch, windows, seq_len)
        start = offset + int(order[i]) * seq_len
        rows.append(tokens[start:start + seq_len + 1])
    batch = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T+1)
    return batch[:, :-1], batch[:, 1:]


def epoch_order(seed, epoch, windows, seq_len, memory={}):
    """(permutation of the windows, offset) of one epoch; the newest two are remembered."""
    key = seed, epoch, windows, seq_len
    if key not in memory:
        if len(memory) > 1:
            memory.clear()
        rng = np.random.default_rng([seed, epoch, 1])
        memory[key] = rng.permutation(windows), int(rng.integers(seq_len))
    return memory[key]


def validation_windows(tokens, seq_len, most=64):
    """Up to `most` windows spread evenly over tokens: int64 (W, seq_len + 1), the same for every run."""
    windows = (len(tokens) - 1) // seq_len
    starts = np.unique(np.linspace(0, windows - 1, min(most, windows)).astype(int)) * seq_len
    return torch.from_numpy(np.stack([tokens[s:s + seq_len + 1] for s in starts]).astype(np.int64))


def ngram_baselines(train, targets, vocab_size):
    """Nats per token of a unigram (add-one) and a smoothed bigram on windows `targets` (W, T+1).

    The bigram is interpolated absolute discounting with d = 0.75 (Ney, Essen & Kneser 1994), which of the usual
    smoothings was the best on the default corpus. Counts come from the first INDEX_TOKENS of train."""
    train, targets = np.asarray(train[:INDEX_TOKENS]).astype(np.int64), np.asarray(targets)
    unigram = np.bincount(train, minlength=vocab_size)
    p_unigram = (unigram + 1) / (unigram.sum() + vocab_size)
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)  # kinds of tokens seen after each token
    context, word = targets[:, :-1].ravel(), targets[:, 1:].ravel()
    wanted = context * vocab_size + word
    at = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    pair_count = np.where(pairs[at] == wanted, counts[at], 0)
    seen = unigram[context]
    backoff = np.where(seen > 0, 0.75 * followers[context] / np.maximum(seen, 1), 1.0)
    p_bigram = np.maximum(pair_count - 0.75, 0) / np.maximum(seen, 1) + backoff * p_unigram[word]
    return {"unigram": float(-np.log(p_unigram[word]).mean()), "bigram": float(-np.log(p_bigram).mean())}


# ---- episodes ----------------------------------------------------------------------------------------------

class WordIndex:
    """Where each word that episodes may ask about stands in the training tokens.

    A word is a token made of a space and at least three letters, counted where the next token does not continue
    it; it occurs MIN_COUNT times or more and is not among the MOST_COMMON. `words` (C,) token ids, `is_held_out`
    (C,) marks the tenth, by hash of the word, that is never a class in training; `positions[c]` is sorted."""

    def __init__(self, corpus):
        pieces = [corpus.encoding.decode_single_token_bytes(i).decode("utf-8", "replace")
                  for i in range(corpus.encoding.encode_single_token(END))]
        padding = [""] * (corpus.vocab_size - len(pieces))
        self.is_word = np.array([len(p) > 3 and p[0] == " " and p[1:].isalpha() for p in pieces + padding])
        self.continues = np.array([p[:1].isalnum() or p[:1] in ("_", "\ufffd") for p in pieces + padding])
        tokens = np.asarray(corpus.train[:INDEX_TOKENS])
        at = self.occurrences(tokens)
        counts = np.bincount(tokens[at], minlength=corpus.vocab_size)
        in_band = counts >= MIN_COUNT
        in_band[np.argsort(-counts, kind="stable")[:MOST_COMMON]] = False
        self.words = np.flatnonzero(in_band)
        self.is_held_out = np.array([digest(pieces[w].strip())[0] % 10 == 0 for w in self.words], dtype=bool)
        at = at[in_band[tokens[at]]]
        at = at[np.argsort(tokens[at], kind="stable")]  # grouped by word, sorted by position within a word
        self.positions = np.split(at, np.cumsum(counts[self.words])[:-1])

    def occurrences(self, tokens):
        """Sorted positions in tokens (n,) at which a whole word stands."""
        return np.flatnonzero(self.is_word[tokens[:-1]] & ~self.continues[tokens[1:]])


@dataclass
class Episode:
    """One N-way K-shot Q-query question, all int64: ids (N*K, L) and (N*Q, L), labels (N*K,) and (N*Q,) in 0..N-1,
    and words (N,), the index of each label's word in WordIndex.words. Rows are grouped by label."""
    support_ids: torch.Tensor
    support_labels: torch.Tensor
    query_ids: torch.Tensor
    query_labels: torch.Tensor
    words: torch.Tensor

    def to(self, device):
        return Episode(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


class EpisodeSampler:
    """Draws Subset-Masked LM Task episodes (Bansal et al. 2020, arXiv 2009.08445) from the training tokens.

    A row is the `length` tokens that end at an occurrence of its word; the word and every earlier occurrence in
    the row of any of the episode's words become MASK. No token position lies in both a support and a query row.
    Raises DataError if the corpus has too few words for the episodes asked for."""

    def __init__(self, corpus, n_way, k_shot, n_query, length):
        self.tokens, self.mask_id, self.vocab_size = corpus.train, corpus.mask_id, corpus.vocab_size
        self.n_way, self.k_shot, self.n_query, self.length = n_way, k_shot, n_query, length
        self.word_ids = corpus.index.words
        self.positions = [at[np.searchsorted(at, length - 1):] for at in corpus.index.positions]
        enough = np.array([len(at) >= k_shot + n_query for at in self.positions], dtype=bool)
        self.classes = np.flatnonzero(enough & ~corpus.index.is_held_out)
        if len(self.classes) < n_way:
            raise DataError(f"the text has {len(self.classes)} words for {n_way}-way episodes of {k_shot} + {n_query} examples: "
                            "use more text (--data), or lower --n-way, --k-shot or --n-query")

    def draw(self, seed, step, micro_batch=0):
        """The Episode of one micro-batch, numbered over all processes: a function of its arguments alone."""
        rng = np.random.default_rng([seed, step, micro_batch])
        for _ in range(100):
            classes = rng.choice(self.classes, self.n_way, replace=False)  # the order gives each word a fresh label
            support = np.stack([rng.choice(self.positions[c], self.k_shot, replace=False) for c in classes])
            query = [self.apart(rng, self.positions[c], np.sort(support, axis=None)) for c in classes]
            if all(len(at) == self.n_query for at in query):
                return self.episode(classes, support, np.stack(query))
        raise DataError("the text repeats itself too closely for support and query rows that do not overlap: "
                        "use more text (--data), or lower --n-way, --k-shot, --n-query or --episode-len")

    def apart(self, rng, positions, support):
        """n_query of positions, at random, whose rows share no token with the rows that end at sorted support."""
        candidates = rng.choice(positions, min(len(positions), 4 * (self.k_shot + self.n_query)), replace=False)
        right = np.searchsorted(support, candidates)
        gap = np.minimum(np.abs(candidates - support[np.maximum(right - 1, 0)]),
                         np.abs(candidates - support[np.minimum(right, len(support) - 1)]))
        return candidates[gap >= self.length][:self.n_query]

    def episode(self, classes, support, query):
        asked = np.zeros(self.vocab_size, dtype=bool)
        asked[self.word_ids[classes]] = True
        labels = torch.arange(self.n_way)
        ids = []
        for ends in (support, query):
            rows = self.tokens[ends.reshape(-1, 1) + np.arange(1 - self.length, 1)].astype(np.int64)  # (N*K, L)
            ids.append(torch.from_numpy(np.where(asked[rows], self.mask_id, rows)))
        return Episode(ids[0], labels.repeat_interleave(self.k_shot), ids[1], labels.repeat_interleave(self.n_query),
                       torch.from_numpy(classes))
