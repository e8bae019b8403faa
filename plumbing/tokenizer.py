"""Tokenizers: a byte-level BPE learned from the text, or GPT-2's.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) starts with the 256 bytes and
repeatedly turns the most frequent pair of neighbours into a new token. The trainer is written
here. Its result is wrapped in `tiktoken.Encoding`, which does the encoding.
"""
import base64
import hashlib
import heapq
from collections import Counter, defaultdict
from pathlib import Path

import regex  # tiktoken uses it, too, so both read \p{...} in the same way
import tiktoken
from tqdm import tqdm

from plumbing import byte_level
from plumbing.byte_level import END, MASK, PATTERN
from plumbing.commands import UserError
from plumbing.files import read_file, write_atomically
from plumbing.logs import read_settings
from plumbing.text import is_validation

FILE = "tokenizer.tiktoken"
LARGEST = 32_000_000  # bytes of such a file

# The tokenizer learns from this many characters of training text.
SAMPLE = 64_000_000
# It counts at most this many different pre-tokens. Beyond that, the rarer half is dropped.
MOST_PRETOKENS = 2_000_000
# In characters. Longer pre-tokens are not words.
LONGEST_PRETOKEN = 256


def count_pretokens(documents):
    """Counter of the pre-tokens in the training part of documents, (name, text) pairs."""
    counts, size = Counter(), 0
    for name, text in documents:
        if not is_validation(name):
            found = regex.findall(PATTERN, text)
            counts.update(word for word in found if len(word) <= LONGEST_PRETOKEN)
            size += len(text)
        if len(counts) > MOST_PRETOKENS:
            counts = Counter(dict(counts.most_common(MOST_PRETOKENS // 2)))
        if size >= SAMPLE:
            break
    return counts


def train_bpe(counts, n_merges, quiet=False):
    """The tokens of a byte-level BPE, as bytes in order of rank, from {pre-token: count}.

    These are the 256 bytes and then at most n_merges merges, fewer if no pair is left that occurs
    twice. Pair counts are updated only where a merge happened. A heap, which may hold outdated
    entries, finds the next pair."""
    words = [list(word.encode()) for word in counts]
    frequency = list(counts.values())
    tokens = [bytes([i]) for i in range(256)]
    pair_count = Counter()
    words_with = defaultdict(set)  # pair -> indices of the words that may hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_count[pair] += frequency[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    with tqdm(total=n_merges, desc="learning the tokenizer", unit="merge",
              disable=True if quiet else None) as bar:
        while heap and len(tokens) < 256 + n_merges:
            negative_count, pair = heapq.heappop(heap)
            if pair_count[pair] != -negative_count:
                # outdated: the pair has lost occurrences since it was pushed
                if pair_count[pair] > 1:
                    heapq.heappush(heap, (-pair_count[pair], pair))
                continue
            if pair_count[pair] < 2:
                break
            new = len(tokens)
            tokens.append(tokens[pair[0]] + tokens[pair[1]])
            change = merge_everywhere(words, frequency, words_with, pair, new)
            for changed, difference in change.items():
                pair_count[changed] += difference
                if difference > 0:
                    heapq.heappush(heap, (-pair_count[changed], changed))
            bar.update()
    return tokens


def merge_everywhere(words, frequency, words_with, pair, new):
    """Merge pair into the token `new` in all words that contain it. Updates words and words_with.
    Returns {pair: change of its count}."""
    change = Counter()
    for i in words_with.pop(pair):
        merged = merge(words[i], pair, new)
        for old_pair in zip(words[i], words[i][1:]):
            change[old_pair] -= frequency[i]
        for new_pair in zip(merged, merged[1:]):
            change[new_pair] += frequency[i]
            words_with[new_pair].add(i)
        words[i] = merged
    return change


def merge(word, pair, new):
    """A copy of the list word in which each occurrence of pair, from the left, is `new`."""
    merged, i = [], 0
    wanted = list(pair)
    while i < len(word):
        if word[i:i + 2] == wanted:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def bpe_encoding(tokens):
    """tiktoken.Encoding of ranked tokens (bytes), followed by END and MASK."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {END: len(tokens), MASK: len(tokens) + 1}
    return tiktoken.Encoding("nanomaml", pat_str=PATTERN, mergeable_ranks=ranks,
                             special_tokens=special)


def gpt2_encoding():
    """tiktoken's GPT-2 encoding, with MASK in the padding at id 50257. Raises UserError if it
    cannot be fetched."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests has many kinds of error, and proxies add more
        raise UserError(f"the GPT-2 vocabulary could not be fetched ({type(error).__name__}): "
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it, or use the default "
                        "--tokenizer bpe, which needs no network") from None
    return tiktoken.Encoding("gpt2", pat_str=gpt2._pat_str, mergeable_ranks=gpt2._mergeable_ranks,
                             special_tokens={END: 50256, MASK: 50257})


def save_tokens(tokens, folder):
    """Write ranked tokens in tiktoken's own format, a line of base64 and rank for each. An empty
    file means GPT-2's vocabulary."""
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    write_atomically(Path(folder) / FILE, b"".join(lines))


def load_encoding(folder):
    """The tiktoken.Encoding of a run or a prepared text, or the ByteLevelEncoding of an imported
    run. Raises UserError if there is none, or if the run was trained with another one."""
    folder = Path(folder)
    if (folder / byte_level.FILE).exists():
        return byte_level.read_tokenizer(folder)
    content = read_file(folder / FILE, LARGEST)
    damaged = UserError(f"the tokenizer in {folder} is damaged: restore its {FILE}")
    settings = read_settings(folder) if (folder / "config.json").exists() else {}
    is_lost = settings.get("tokenizer") == "bpe" and not content
    # Runs of earlier versions have no SHA-256.
    if is_lost or settings.get("tokenizer_sha256", sha256(content)) != sha256(content):
        raise damaged
    encoding = bpe_encoding(parse_tokens(content, damaged)) if content else gpt2_encoding()
    if encoding.n_vocab > settings.get("vocab_size", encoding.n_vocab):
        raise damaged
    return encoding


def parse_tokens(content, damaged):
    """The ranked tokens, a list of bytes, that save_tokens has written. Raises the error `damaged`
    if they are not valid."""
    tokens = []
    try:
        for rank, line in enumerate(content.splitlines()):
            token, number = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            if int(number) != rank:
                raise damaged
    except ValueError:
        raise damaged from None
    # Without all bytes, some text cannot be encoded. If a token occurs twice, tiktoken panics.
    if len(set(tokens)) < len(tokens) or not {bytes([i]) for i in range(256)} <= set(tokens):
        raise damaged
    return tokens


def sha256(content):
    """SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()
