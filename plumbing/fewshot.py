"""The questions of few-shot accuracy: rows of validation text that end at held-out words, fixed
episodes of these rows, and how much the token before a word gives away."""
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

# In evaluations: the largest number of held-out words, and the queries per word.
FEWSHOT_WORDS = 96
FEWSHOT_QUERIES = 4
# A small text may have fewer held-out words than --n-way. Its episodes then have as many ways as
# there are words, but at least this many.
FEWEST_WAYS = 4


@dataclass
class FewShotRows:
    """Rows of validation text that end at a held-out word, for few-shot accuracy.

    No held-out word occurs earlier in a row, so rows never overlap. Unless the backbone is
    adapted, its states for these rows serve every episode.

    ids       (R, L)  tokens; the last is <|mask|>
    word      (R,)    the index of the masked word in WordIndex.words
    previous  (R,)    the token before it
    """
    ids: torch.Tensor
    word: np.ndarray
    previous: np.ndarray


def evaluation_rows(corpus, length, n_way, k_shot):
    """The FewShotRows of evaluations, with k_shot + FEWSHOT_QUERIES rows for each word. If too few
    words of a small text have that many, each has fewer queries, so that more words qualify."""
    for n_query in range(FEWSHOT_QUERIES, 0, -1):
        rows = fewshot_rows(corpus, length, k_shot + n_query)
        if len(np.unique(rows.word)) >= min(n_way, FEWEST_WAYS):
            break
    return rows


def fewshot_rows(corpus, length, per_word, most_words=FEWSHOT_WORDS):
    """FewShotRows with exactly per_word rows for each word that has that many, among the
    most_words most frequent ones."""
    index, tokens = corpus.index, np.asarray(corpus.val)
    word_of = np.full(corpus.vocab_size, -1)  # token id -> index of the held-out word, or -1
    word_of[index.words[index.is_held_out]] = np.flatnonzero(index.is_held_out)
    ends = index.occurrences(tokens)
    ends = ends[(word_of[tokens[ends]] >= 0) & (ends >= length - 1)]
    rows = tokens[ends[:, None] + np.arange(1 - length, 1)].astype(np.int64)  # (R, L)
    rows = rows[(word_of[rows[:, :-1]] < 0).all(axis=1)]
    words = word_of[rows[:, -1]]  # (R,)

    counts = Counter(words.tolist())
    most_frequent = sorted(counts, key=lambda word: (-counts[word], word))[:most_words]
    chosen = [np.zeros(0, dtype=int)]  # concatenate needs at least one
    for word in most_frequent:
        if counts[word] >= per_word:
            rows_of_word = np.flatnonzero(words == word)
            # evenly spaced over the text
            spread = np.linspace(0, len(rows_of_word) - 1, per_word).astype(int)
            chosen.append(rows_of_word[spread])
    chosen = np.concatenate(chosen)
    ids = rows[chosen]
    previous = ids[:, -2].copy()
    ids[:, -1] = corpus.mask_id
    return FewShotRows(torch.from_numpy(ids), words[chosen], previous)


def fewshot_episodes(rows, n_way, k_shot, count, seed=0):
    """`count` pairs (support (N, K), query (N, Q)) of row indices. With seed 0 they are the same
    for every run. N is n_way, or the number of words if that is smaller. With too few words the
    list is empty."""
    words = np.unique(rows.word)
    if len(words) < min(n_way, FEWEST_WAYS):
        return []
    rng = np.random.default_rng(seed)
    rows_of = {word: np.flatnonzero(rows.word == word) for word in words}
    episodes = []
    for _ in range(count):
        classes = rng.choice(words, min(n_way, len(words)), replace=False)
        picks = np.stack([rng.permutation(rows_of[word]) for word in classes])
        episodes.append((picks[:, :k_shot], picks[:, k_shot:]))
    return episodes


def lookup(support_previous, query_previous):
    """How well the previous token alone answers the queries. support_previous (N, K) and
    query_previous (N, Q) are the tokens before the masked words.

    Returns (expected accuracy, is_new). The look-up picks each class with a probability
    proportional to that token's count in its support rows. is_new, (N*Q,) bool: no support row has
    the token, so the look-up guesses."""
    n_way = len(support_previous)
    label = np.arange(n_way).repeat(query_previous.shape[1])  # (N*Q,)
    votes = lookup_votes(support_previous, query_previous)
    all_votes = votes.sum(axis=1)
    right = votes[np.arange(len(label)), label] / np.maximum(all_votes, 1)
    is_new = all_votes == 0
    return np.where(is_new, 1 / n_way, right).mean(), torch.from_numpy(is_new)


def lookup_votes(support_previous, query_previous):
    """(N*Q, N): how many support rows of each class have the query's previous token."""
    same = query_previous.reshape(-1, 1, 1) == support_previous[None]  # (N*Q, N, K)
    return same.sum(axis=2)
