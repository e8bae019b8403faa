"""Chapter 1. Text as tokens: few-shot episodes and next-token batches.

    python data.py --show --seed 1                       # show the default corpus and an episode
    python data.py book.txt more.jsonl.gz --out FOLDER   # prepare a text for train.py --data FOLDER

Read `EpisodeSampler` first: it turns text into small classification tasks by masking a subset of
words (SMLMT, Bansal et al. 2020, arXiv 2009.08445). `WordIndex` finds the words that take part,
and `lm_batch` makes the ordinary batches. The code that turns text into tokens is in plumbing/.
"""
import plumbing  # noqa: F401 - imported first, so that Ctrl-C during loading exits quietly

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch

from plumbing import prepare
from plumbing.commands import Parser, UserError, command, filled, number, path
from plumbing.files import is_free
from plumbing.machine import to_device
from plumbing.ngrams import ngram_losses
from plumbing.play import EpisodeInWords, show_episode
from plumbing.text import digest
from plumbing.tokenizer import END, MASK, load_encoding  # noqa: F401 - the last is for notebooks

# Classes are words that occur at least MIN_COUNT times and are not among the MOST_COMMON.
MIN_COUNT, MOST_COMMON = 64, 100
# Episodes use the words of at most this many training tokens.
INDEX_TOKENS = 50_000_000


# ---- episodes ----------------------------------------------------------------------------------

@dataclass
class Episode:
    """One N-way K-shot task with Q queries per class, in rows of L tokens. All tensors are int64.

    support_ids     (N*K, L)  rows that end with <|mask|>, grouped by label
    support_labels  (N*K,)    0 to N-1: which of the N words was masked
    query_ids       (N*Q, L)
    query_labels    (N*Q,)
    words           (N,)      for each label, the index of its class in WordIndex.words
    """
    support_ids: torch.Tensor
    support_labels: torch.Tensor
    query_ids: torch.Tensor
    query_labels: torch.Tensor
    words: torch.Tensor

    def to(self, device):
        return Episode(*(to_device(tensor, device) for tensor in vars(self).values()))


class EpisodeSampler:
    """Draws episodes from the training tokens of a corpus.

    A row is the `length` tokens that end at an occurrence of its word. It stops there, because a
    causal decoder cannot see later tokens. No token lies in both a support and a query row.
    Raises UserError if the text has too few words for such episodes."""

    def __init__(self, corpus, n_way, k_shot, n_query, length):
        self.tokens, self.mask_id = corpus.train, corpus.mask_id
        self.n_way, self.k_shot, self.n_query, self.length = n_way, k_shot, n_query, length
        self.word_ids = corpus.index.words
        # A row needs `length` tokens up to the occurrence.
        self.positions = [ends[ends >= length - 1] for ends in corpus.index.positions]
        enough = np.array([len(ends) >= k_shot + n_query for ends in self.positions], dtype=bool)
        self.classes = np.flatnonzero(enough & ~corpus.index.is_held_out)
        if len(self.classes) < n_way:
            raise UserError(f"the text has {len(self.classes)} words that can be classes, but "
                            f"{n_way}-way episodes with {k_shot} + {n_query} examples per word "
                            f"need {n_way}: use more text (--data; 1 MB of prose has about 100 "
                            "such words), or lower --n-way, --k-shot or --n-query")

    def draw(self, seed, step, micro_batch=0):
        """Draw the Episode of one micro-batch. It depends only on the arguments."""
        # Stream 2 of a step is that of the coin (train.is_meta_step). An episode that shared it
        # would depend on how the coin fell.
        stream = micro_batch if micro_batch < 2 else micro_batch + 1
        rng = np.random.default_rng([seed, step, stream])
        # A draw fails if a class has too few occurrences clear of the support rows.
        for _ in range(100):
            # choice() also shuffles, so a word's label (its index here) is new in each episode.
            classes = rng.choice(self.classes, self.n_way, replace=False)
            support = [rng.choice(self.positions[c], self.k_shot, replace=False) for c in classes]
            support = np.stack(support)  # (N, K) positions in the tokens
            query = [self.draw_query(rng, self.positions[c], support) for c in classes]
            if all(len(ends) == self.n_query for ends in query):
                return self.make_episode(classes, support, np.stack(query))
        raise UserError("the words occur too close together for support and query rows that do "
                        "not overlap: use more text (--data), or lower --n-way, --k-shot, "
                        "--n-query or --episode-len")

    def draw_query(self, rng, positions, support):
        """Up to n_query of a class's positions, each at least `length` away from every position
        in support (N, K), so that their rows share no token."""
        tries = min(len(positions), 4 * (self.k_shot + self.n_query))
        candidates = rng.choice(positions, tries, replace=False)
        distance = np.abs(candidates[:, None] - support.reshape(1, -1)).min(axis=1)
        return candidates[distance >= self.length][:self.n_query]

    def make_episode(self, classes, support, query):
        """Build the Episode of classes (N,) from the positions support (N, K) and query (N, Q)."""
        # Labels are fresh, because `draw` put the classes in a new random order.
        labels = torch.arange(self.n_way)
        support_labels = labels.repeat_interleave(self.k_shot)
        query_labels = labels.repeat_interleave(self.n_query)
        masked_words = self.word_ids[classes]
        return Episode(self.masked_rows(support, masked_words), support_labels,
                       self.masked_rows(query, masked_words), query_labels,
                       torch.from_numpy(classes))

    def masked_rows(self, ends, masked_words):
        """The rows (R, length), one ending at each of `ends`. Every token in masked_words (N,),
        including the last of each row, becomes <|mask|>."""
        offsets = np.arange(1 - self.length, 1)
        rows = self.tokens[ends.reshape(-1, 1) + offsets].astype(np.int64)
        return torch.from_numpy(np.where(np.isin(rows, masked_words), self.mask_id, rows))


class WordIndex:
    """The words that can be classes, and where they occur in the training tokens.

    A word is a token that consists of a space and at least three letters. An occurrence counts
    only if the next token does not continue the word.

    words        (C,)  their token ids
    is_held_out  (C,)  True for one word in ten, by hash. These are never classes in training,
                       and few-shot accuracy is measured on them
    positions    C sorted arrays of positions in the tokens
    """

    def __init__(self, corpus):
        pieces = corpus.pieces
        self.is_word = np.array([looks_like_word(piece) for piece in pieces])
        self.continues_word = np.array([looks_like_rest(piece) for piece in pieces])
        tokens = np.asarray(corpus.train[:INDEX_TOKENS])
        places = self.occurrences(tokens)
        counts = np.bincount(tokens[places], minlength=corpus.vocab_size)
        in_band = counts >= MIN_COUNT
        in_band[np.argsort(-counts, kind="stable")[:MOST_COMMON]] = False
        self.words = np.flatnonzero(in_band)
        held_out = [digest(pieces[word].strip())[0] % 10 == 0 for word in self.words]
        self.is_held_out = np.array(held_out, dtype=bool)
        # Sort the places by word; a stable sort keeps them in order within a word.
        places = places[in_band[tokens[places]]]
        places = places[np.argsort(tokens[places], kind="stable")]
        self.positions = np.split(places, np.cumsum(counts[self.words])[:-1])

    def occurrences(self, tokens):
        """The sorted positions in tokens (n,) at which a whole word occurs."""
        return np.flatnonzero(self.is_word[tokens[:-1]] & ~self.continues_word[tokens[1:]])


def looks_like_word(piece):
    return len(piece) > 3 and piece[0] == " " and piece[1:].isalpha()


def looks_like_rest(piece):
    """Whether a token continues the word before it. U+FFFD marks part of a character."""
    return piece[:1].isalnum() or piece[:1] in ("_", "\ufffd")


# ---- next-token batches ------------------------------------------------------------------------

def lm_batch(tokens, number, batch_size, seq_len, seed):
    """Batch `number` of a shuffled pass over tokens (n,): int64 (batch_size, seq_len + 1). The
    inputs are batch[:, :-1], and the targets, shifted by one position, are batch[:, 1:].

    Each epoch visits every window once, in a new order and from a new offset. A batch depends
    only on the arguments, so resuming needs no saved state, and vanilla and meta runs see the
    same text in the same order."""
    windows = (len(tokens) - 1) // seq_len - 1  # one fewer than fit, to leave room for the offset
    rows = []
    for row in range(number * batch_size, (number + 1) * batch_size):
        epoch, i = divmod(row, windows)
        order, offset = epoch_order(seed, epoch, windows, seq_len)
        start = offset + int(order[i]) * seq_len
        rows.append(tokens[start:start + seq_len + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, windows, seq_len):
    """(a permutation of the windows, their common offset) for one epoch."""
    rng = np.random.default_rng([seed, epoch, 1])
    return rng.permutation(windows), int(rng.integers(seq_len))


def validation_windows(tokens, seq_len, most=64):
    """Up to `most` windows spread evenly over tokens: int64 (W, seq_len + 1), the same in every
    run."""
    windows = (len(tokens) - 1) // seq_len
    chosen = np.unique(np.linspace(0, windows - 1, min(most, windows)).astype(int))
    rows = [tokens[i * seq_len:(i + 1) * seq_len + 1] for i in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---- the corpus --------------------------------------------------------------------------------

@dataclass(eq=False)
class Corpus:
    """A tokenizer and the tokens of one text. train (n,) and val (m,) are uint16 memory maps."""
    train: np.ndarray
    val: np.ndarray
    encoding: tiktoken.Encoding
    vocab_size: int  # of the decoder; ids beyond the tokenizer's are padding
    folder: Path
    info: dict       # documents, bytes, tokens, sha256, source

    @property
    def mask_id(self):
        return self.encoding.encode_single_token(MASK)

    @cached_property
    def raw_pieces(self):
        """The bytes of each of the vocab_size tokens; special tokens have none."""
        end = self.encoding.encode_single_token(END)
        pieces = [self.encoding.decode_single_token_bytes(i) for i in range(end)]
        return pieces + [b""] * (self.vocab_size - end)

    @cached_property
    def pieces(self):
        """The text of each token, vocab_size strings."""
        return [piece.decode("utf-8", "replace") for piece in self.raw_pieces]

    @cached_property
    def token_bytes(self):
        """(vocab_size,) int64: the number of bytes of text in each token."""
        return np.array([len(piece) for piece in self.raw_pieces])

    @cached_property
    def index(self):
        return WordIndex(self)


def load(data=None, tokenizer="bpe", vocab_size=50304, cache=None, quiet=False, check_all=False):
    """The Corpus of a text or, by default, of the documentation on this machine. It is prepared
    on first use and then cached. vocab_size is at most 65536. Raises UserError, also if a prepared
    file has changed. With check_all, large files are checked completely, too."""
    if data and prepare.is_prepared(Path(data)):
        folder = Path(data)
    else:
        folder = prepare.prepared_folder(data, tokenizer, vocab_size, cache, quiet)
    return open_corpus(folder, vocab_size, check_all)


def open_corpus(folder, vocab_size, check_all=False):
    info, encoding, train, val = prepare.open_prepared(folder, vocab_size, check_all)
    return Corpus(train, val, encoding, vocab_size, folder, info)


# ---- the command -------------------------------------------------------------------------------

def show(corpus, seed=0):
    """Describe a corpus and one episode, drawn with a seed, as text."""
    tokens, n_bytes = len(corpus.train) + len(corpus.val), 0
    for part in (corpus.train, corpus.val):
        for block in prepare.blocks(part):
            n_bytes += int(corpus.token_bytes[block].sum())
    documents = corpus.info.get("documents")
    lines = [f"{corpus.info.get('source')}, in {corpus.folder}",
             f"{documents} documents" if documents else "files of token ids",
             f"{tokens:,} tokens, {len(corpus.val):,} of them for validation",
             f"{n_bytes / max(1, tokens):.2f} bytes per token",
             f"{corpus.encoding.n_vocab:,} tokens in the vocabulary"]
    if len(corpus.val) > 256 and len(corpus.train) > 1:
        windows = validation_windows(corpus.val, 128, 128)
        losses = ngram_losses(corpus.train, windows, corpus.vocab_size)
        lines.append(f"validation loss of n-gram models, in nats per token: unigram "
                     f"{losses['unigram']:.3f}, smoothed bigram {losses['bigram']:.3f}")
    try:
        sampler = EpisodeSampler(corpus, n_way=4, k_shot=2, n_query=1, length=24)
        episode = shuffle_queries(sampler.draw(seed, 0), seed)
        shown = show_episode(episode_in_words(episode, corpus))
        words = corpus.index.words[episode.words]
    except UserError as error:
        shown, words = f"no episode: {error}", []
    sample = text_of(sample_without(words, corpus.train), corpus)
    lines += ["", "A sample of the text:", "  " + sample.replace("\n", "\n  "), "", shown]
    return "\n".join(lines)


def sample_without(words, tokens, length=60):
    """A piece of tokens (n,), from the second half of the text, that contains none of the token
    ids `words`. Otherwise it might give away the answers to an episode's queries."""
    for start in range(len(tokens) // 2, len(tokens), length):
        sample = tokens[start:start + length]
        if not np.isin(sample, words).any():
            return sample
    return tokens[:0]


def shuffle_queries(episode, seed):
    """The episode with its queries in random order. Sorted by label, they would give the answers
    away."""
    order = np.random.default_rng(seed).permutation(len(episode.query_labels))
    return replace(episode, query_ids=episode.query_ids[order],
                   query_labels=episode.query_labels[order])


def text_of(ids, corpus):
    """The text of token ids. Ids beyond the tokenizer's, as in a damaged file, are left out."""
    known = [i for i in ids.tolist() if i < corpus.encoding.n_vocab]
    return corpus.encoding.decode(known)


def row_in_words(ids, corpus):
    """The text of a row of token ids, on one line."""
    text = text_of(ids, corpus)
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(printable.replace(MASK, " <mask>").split())


def episode_in_words(episode, corpus):
    """An Episode as text, with its rows in the same order."""
    words = [corpus.pieces[i].strip() for i in corpus.index.words[episode.words]]
    support = [row_in_words(ids, corpus) for ids in episode.support_ids]
    queries = [row_in_words(ids, corpus) for ids in episode.query_ids]
    return EpisodeInWords(words, list(zip(episode.support_labels.tolist(), support)), queries,
                          episode.query_labels.tolist())


def parse():
    parser = Parser(description="Describe a corpus (--show), or prepare a text for training "
                                "(--out).")
    add = parser.add_argument
    add("paths", nargs="*", metavar="PATH", type=filled,
        help="text: .txt, .jsonl and .jsonl.gz files (with a `text` field) or folders of them; or "
             "GPT-2 ids: .bin files of nanoGPT or llm.c (default: the documentation on this "
             "machine)")
    add("--out", type=path, help="new folder for the prepared text; train.py --data reads it")
    add("--show", action="store_true",
        help="print the size, n-gram baselines, a sample and an episode")
    add("--seed", type=number(int, 0), default=0, help="seed of the episode that --show draws")
    add("--tokenizer", choices=["bpe", "gpt2"], default="bpe",
        help="bpe: trained on the text; gpt2: downloaded once")
    add("--vocab-size", type=number(int, 260, 65536), default=50304,
        help="vocabulary size; with a smaller one, training is faster")
    add("--cache", type=filled,
        help="folder of prepared texts (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")
    add("--quiet", action="store_true", help="hide progress bars")
    return parser.parse_args(), parser


def prepare_text(args):
    """Prepare args.paths in a new folder, args.out. Returns the Corpus; raises UserError."""
    if not is_free(args.out):
        raise UserError(f"{args.out} already exists: choose another --out")
    source, tokenizer = prepare.find_source(args.paths, args.tokenizer, args.vocab_size)
    name = ", ".join(args.paths) or None
    prepare.prepare(args.out, source, tokenizer, args.vocab_size, args.quiet, name)
    return open_corpus(args.out, args.vocab_size)


@command
def main():
    args, parser = parse()
    if not (args.show or args.out):
        parser.error("nothing to do: add --show, or --out FOLDER")
    if args.seed and not args.show:
        parser.error("--seed only works with --show: add --show")
    if len(args.paths) > 1 and not args.out:
        parser.error("--show reads one PATH: add --out FOLDER to prepare several as one text")
    if args.out:
        corpus = prepare_text(args)
    else:
        path = args.paths[0] if args.paths else None
        corpus = load(path, args.tokenizer, args.vocab_size, args.cache, args.quiet,
                      check_all=True)
    if args.show:
        print(show(corpus, args.seed))
        return
    print(f"{corpus.folder}: {len(corpus.train):,} tokens for training and "
          f"{len(corpus.val):,} for validation")
    # By default, train.py needs 8 rows of 128 training tokens and one more for the offset. It
    # needs one row of validation tokens, and again one more.
    if len(corpus.train) > 9 * 128 and len(corpus.val) > 2 * 128:
        multiple_of_64 = (corpus.encoding.n_vocab + 63) // 64 * 64
        name = corpus.folder.resolve().name
        print(f"next: python train.py --data {corpus.folder} --name {name} "
              f"--vocab-size {multiple_of_64}")
    else:
        print("too few tokens to train on: use more text")


if __name__ == "__main__":
    main()
