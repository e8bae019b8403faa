"""The losses by counting, against a naive twin."""
from collections import Counter

import numpy as np
import pytest

from plumbing.ngrams import ngram_losses


class NaiveCounts:
    """The two models, a probability at a time."""

    def __init__(self, tokens, vocab_size):
        self.size, self.vocab_size = len(tokens), vocab_size
        self.words, self.pairs = Counter(tokens), Counter(zip(tokens, tokens[1:]))

    def unigram(self, word):
        return (self.words[word] + 1) / (self.size + self.vocab_size)

    def bigram(self, before, word):
        seen = self.words[before]
        if not seen:
            return self.unigram(word)
        kinds = sum(1 for first, _ in self.pairs if first == before)
        discounted = max(self.pairs[before, word] - 0.75, 0) / seen
        return discounted + 0.75 * kinds / seen * self.unigram(word)


def test_ngram_losses_equal_naive_twin():
    rng = np.random.default_rng(0)
    train, windows = rng.integers(0, 6, 200) ** 2 % 7, rng.integers(0, 9, (3, 11))
    naive = NaiveCounts(train.tolist(), 10)
    bigrams = []
    for row in windows.tolist():
        bigrams += zip(row, row[1:])
    unigram = -np.mean([np.log(naive.unigram(word)) for _, word in bigrams])
    bigram = -np.mean([np.log(naive.bigram(before, word)) for before, word in bigrams])
    result = ngram_losses(train, windows, 10)
    assert result["unigram"] == pytest.approx(unigram)
    assert result["bigram"] == pytest.approx(bigram)
    # The bigram is a distribution, but for the last token's end.
    assert sum(naive.bigram(3, word) for word in range(10)) == pytest.approx(1, abs=0.02)
