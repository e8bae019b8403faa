"""Tokens -> next-token batches and few-shot episodes.

    python data.py --show                                   # what the default corpus holds, and one episode in words
    python data.py book.txt more.jsonl.gz --out FOLDER      # prepare a text once, for train.py --data FOLDER

    from data import load, lm_batch, EpisodeSampler

A corpus is a tokenizer and two uint16 token files, made from text (text.py says where it comes from) or taken from files
that hold GPT-2 ids already. What is prepared lies in a cache folder named after what it was made from.
"""
import base64
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from text import (END, MASK, PACKAGES, DataError, bpe_encoding, count_words, digest, documents, gpt2_encoding, installed_docs, is_validation,
                  load_encoding, read_ids, text_files, token_files, train_bpe)

FORMAT = 2                    # counted up when the files in the cache change their meaning
INDEX_TOKENS = 50_000_000     # tokens in which episodes look for their words
MIN_COUNT, MOST_COMMON = 64, 100  # the frequency band of the words that episodes ask about
COPY = 2 ** 22                # tokens copied and checked at a time


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
    if data and (Path(data) / "info.json").exists() and (Path(data) / "tokenizer.tiktoken").exists():
        return open_corpus(Path(data), vocab_size, check_ids=True)
    source, tokenizer = find_source([data] if data else [], tokenizer, vocab_size)
    files = sum(source.values(), []) if isinstance(source, dict) else source
    made_from = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files] or [platform.python_version()] + [
        (p, metadata.version(p)) for p in PACKAGES if importlib.util.find_spec(p)]
    key = digest(json.dumps([FORMAT, tokenizer, vocab_size, made_from])).hex()[:16]
    folder = cache_root(cache) / key
    if not (folder / "info.json").exists():
        prepare(folder, source, tokenizer, vocab_size, quiet, str(data) if data else None)
    return open_corpus(folder, vocab_size)


def find_source(paths, tokenizer, vocab_size):
    """(what to prepare, tokenizer): files of GPT-2 ids as token_files gives them, or a list of text files, empty for the
    installed documentation. Raises DataError."""
    found = [token_files(path) for path in paths]
    if any(found) and len(paths) > 1:
        raise DataError("token files are taken one path at a time")
    tokenizer = "gpt2" if any(found) else tokenizer
    if not (50258 if tokenizer == "gpt2" else 260) <= vocab_size <= 65536:
        raise DataError(f"--vocab-size {vocab_size} is outside 260 (the bytes and the special tokens; 50258 for GPT-2's ids) to 65536 (ids are uint16)")
    return (found[0] if any(found) else text_files(paths)), tokenizer


def open_corpus(folder, vocab_size, check_ids=False):
    """The Corpus in a prepared folder, once its files are what its info.json says; with check_ids, which reads them all, and
    each id is one of its tokenizer. Raises DataError."""
    try:
        info = json.loads((folder / "info.json").read_text())
        whole = [2 * n for n in info["tokens"]] == [(folder / name).stat().st_size for name in ("train.bin", "val.bin")] and len(info["sha256"]) == 64
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"the prepared text in {folder} is not whole: prepare it again (what lies in the cache is made again once removed)")
    corpus = Corpus(folder, load_encoding(folder), vocab_size, info)
    if corpus.encoding.n_vocab > vocab_size:
        raise DataError(f"{folder} was prepared with {corpus.encoding.n_vocab} tokens: --vocab-size {vocab_size} is too small; "
                        "leave it at that, or prepare the text again (python data.py PATH --out FOLDER --vocab-size N)")
    top = max((int(tokens[at:at + COPY].max()) for tokens in (corpus.train, corpus.val) for at in range(0, len(tokens), COPY)), default=0) if check_ids else 0
    if top >= corpus.encoding.n_vocab:
        raise DataError(f"the prepared text in {folder} holds the id {top}, but its tokenizer ends at {corpus.encoding.n_vocab - 1}: prepare it again")
    return corpus


def prepare(folder, source, tokenizer, vocab_size, quiet, name=None):
    """Write tokenizer, token files and info.json to a folder beside `folder`, then rename it into place. source is a list
    of text files (none: the installed documentation) or what token_files found. Raises DataError."""
    docs = None if source else installed_docs(quiet)
    stream = lambda what: documents(source, what, quiet) if source else tqdm(docs, desc=what, unit="document", disable=True if quiet else None)
    folder, work = folder.resolve(), None
    for ids in sum(source.values(), []) if isinstance(source, dict) else []:
        read_ids(ids)  # headers and sizes first, before anything is fetched or copied
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        tokens = train_bpe(count_words(stream("reading")), vocab_size - 258, quiet) if tokenizer == "bpe" else []
        (work / "tokenizer.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)))
        encoding = bpe_encoding(tokens) if tokens else gpt2_encoding()
        info = copy_tokens(work, source, quiet) if isinstance(source, dict) else write_tokens(work, stream("tokenizing"), encoding)
        info["source"] = name or "documentation of Python and " + ", ".join(PACKAGES)
        (work / "info.json").write_text(json.dumps(info))
        try:
            work.chmod(0o755)  # mkdtemp makes folders for their owner alone
            work.rename(folder)
        except OSError:
            if not (folder / "info.json").exists():  # unless another process has just done the same work
                raise
    except OSError as error:
        raise DataError(f"cannot write to {folder.parent}: {error.strerror} (--cache DIR takes another folder)") from None
    finally:
        if work:
            shutil.rmtree(work, ignore_errors=True)


def write_tokens(folder, stream, encoding):
    """Tokenize (name, text) pairs, with all cores, into train.bin and val.bin, END behind each document; returns the
    counts and the SHA-256."""
    end, sha, batch = encoding.encode_single_token(END), hashlib.sha256(), []
    info = {"documents": 0, "bytes": 0, "tokens": [0, 0]}
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        def flush():
            ids = encoding.encode_ordinary_batch([text for _, text in batch], num_threads=os.cpu_count() or 1)
            for (name, text), document in zip(batch, ids):
                data = np.array(document + [end], dtype=np.uint16).tobytes()
                (val if is_validation(name) else train).write(data)
                sha.update(data)
                info["documents"] += 1
                info["bytes"] += len(text.encode("utf-8", "replace"))
                info["tokens"][is_validation(name)] += len(document) + 1
            batch.clear()
        for item in stream:
            batch.append(item)
            if len(batch) == 256:
                flush()
        flush()
    if not info["documents"]:
        raise DataError("the text is empty: there is nothing to learn from")
    return info | {"sha256": sha.hexdigest()}


def copy_tokens(folder, shards, quiet):
    """Check files of GPT-2 ids and copy them to train.bin and val.bin; without validation files the last tenth of each serves.
    Returns the counts and the SHA-256."""
    sha, counts = hashlib.sha256(), {"train": 0, "val": 0}
    total = sum(file.stat().st_size for files in shards.values() for file in files)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val, \
            tqdm(total=total, desc="copying", unit="B", unit_scale=True, disable=True if quiet else None) as bar:
        for part, files in shards.items():
            for file in files:
                ids = read_ids(file)
                cut = len(ids) if shards["val"] else len(ids) * 9 // 10
                for at, end in itertools.pairwise(sorted({*range(0, len(ids), COPY), cut, len(ids)})):
                    block = ids[at:end]
                    if block.max() > 50256 or len(block) > 8 and not block[1::2].any():
                        raise DataError(f"{file} does not hold uint16 GPT-2 ids (0 to 50256) near id number {at}: other ids, or 32 bits each")
                    split = "val" if part == "val" or at >= cut else "train"
                    (val if split == "val" else train).write(block.tobytes())
                    sha.update(block.tobytes())
                    counts[split] += len(block)
                    bar.update(2 * len(block))
    return {"documents": None, "bytes": None, "tokens": [counts["train"], counts["val"]], "sha256": sha.hexdigest()}


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


def to_device(tensor, device):
    """The tensor on device; to a GPU from pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, windows, seq_len):
    """(permutation of the windows, offset) of one epoch."""
    rng = np.random.default_rng([seed, epoch, 1])
    return rng.permutation(windows), int(rng.integers(seq_len))


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
        return Episode(*(to_device(tensor, device) for tensor in vars(self).values()))


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


# ---- the command -------------------------------------------------------------------------------------------

def show(corpus):
    """What a corpus holds, and one episode, in words."""
    decode = lambda ids: corpus.encoding.decode([i for i in ids if i < corpus.encoding.n_vocab])
    n_bytes = sum(int(corpus.token_bytes[part[at:at + COPY]].sum()) for part in (corpus.train, corpus.val) for at in range(0, len(part), COPY))
    n_tokens = len(corpus.train) + len(corpus.val)
    rows = [f"{corpus.info['source']}, in {corpus.folder}",
            f"{corpus.info['documents'] or 'token'} {'documents' if corpus.info['documents'] else 'files'}, {n_tokens:,} tokens ({len(corpus.val):,} of them for validation), "
            f"{n_bytes / max(1, n_tokens):.2f} bytes per token, {corpus.encoding.n_vocab:,} kinds of tokens"]
    if len(corpus.val) > 256 and len(corpus.train) > 1:
        baselines = ngram_baselines(corpus.train, validation_windows(corpus.val, 128, 128), corpus.vocab_size)
        rows.append(f"validation text, nats per token: a unigram model {baselines['unigram']:.3f}, a smoothed bigram model {baselines['bigram']:.3f}")
    at = len(corpus.train) // 2
    rows += ["", "a sample of the text:", "  " + decode(corpus.train[at:at + 60].tolist()).replace("\n", "\n  ")]
    try:
        episode = EpisodeSampler(corpus, 4, 2, 1, 24).draw(0, 0)
    except DataError as error:
        return "\n".join(rows + ["", f"no episode: {error}"])
    words = [decode([i]).strip() for i in corpus.index.words[episode.words].tolist()]
    row = lambda ids: " ".join(decode(ids.tolist()).split()).replace(MASK, " <mask>")
    rows += ["", f"an episode, 4-way 2-shot: which of {len(words)} words stood at the end of each row?", "", "support set (answers are shown):"]
    rows += [f"  {row(ids)}   -> {label}: {words[label]}" for ids, label in zip(episode.support_ids, episode.support_labels.tolist())]
    rows += ["", "queries (0, 1, 2 or 3?):"] + [f"  {row(ids)}" for ids in episode.query_ids]
    rows += ["", "answers: " + ", ".join(f"{label}: {words[label]}" for label in episode.query_labels.tolist())]
    return "\n".join(rows)


def main():
    from model import Parser
    parser = Parser(description="Prepare a text once (--out), or show what a corpus holds (--show).")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="text: .txt, .jsonl and .jsonl.gz files (with a `text` field) or folders of them; "
                        "or GPT-2 ids: .bin files of nanoGPT or llm.c (default: the documentation on this machine)")
    parser.add_argument("--out", type=Path, help="new folder for the prepared text, for train.py --data")
    parser.add_argument("--show", action="store_true", help="print size, baselines, a sample and an episode in words")
    parser.add_argument("--tokenizer", choices=["bpe", "gpt2"], default="bpe", help="bpe is learnt from the text; gpt2 is fetched once")
    parser.add_argument("--vocab-size", type=int, default=50304, help="tokens of the vocabulary, 260 to 65536")
    parser.add_argument("--cache", help="folder of prepared texts (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    if not (args.show or args.out):
        parser.error("nothing to do: add --show, or --out FOLDER")
    if args.out and args.out.exists() and any(args.out.iterdir() if args.out.is_dir() else [args.out]):
        parser.error(f"{args.out} is there already: choose another --out")
    if len(args.paths) > 1 and not args.out:
        parser.error("several paths need --out FOLDER")
    try:
        if args.out:
            source, tokenizer = find_source(args.paths, args.tokenizer, args.vocab_size)
            prepare(args.out, source, tokenizer, args.vocab_size, args.quiet, ", ".join(args.paths) or None)
        corpus = open_corpus(args.out, args.vocab_size) if args.out else load(args.paths[0] if args.paths else None, args.tokenizer,
                                                                              args.vocab_size, args.cache, args.quiet)
        enough = len(corpus.train) > 9 * 128 and len(corpus.val) > 2 * 128  # for train.py's defaults
        print(show(corpus) if args.show else f"{corpus.folder}: {len(corpus.train):,} tokens for training and {len(corpus.val):,} for validation\n"
              + (f"next: python train.py --data {corpus.folder} --vocab-size {-(-corpus.encoding.n_vocab // 64) * 64}" if enough else "too few to train on: add text"))
    except DataError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
