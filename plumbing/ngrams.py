"""Unigram and bigram baselines: the losses that a language model should beat."""
import numpy as np

# At most this many training tokens are counted.
COUNTED_TOKENS = 50_000_000
# The discount of the bigram. Of the usual smoothing methods, this was best on the default corpus.
DISCOUNT = 0.75


def ngram_losses(train, windows, vocab_size):
    """{"unigram", "bigram"}: nats per token on validation windows (W, T+1), with counts from the
    training tokens train (n,).

    The unigram adds one to each count. The bigram uses interpolated absolute discounting (Ney,
    Essen & Kneser 1994)."""
    train, windows = np.asarray(train[:COUNTED_TOKENS]).astype(np.int64), np.asarray(windows)
    count = np.bincount(train, minlength=vocab_size)
    p_unigram = (count + 1) / (count.sum() + vocab_size)

    # A pair of neighbours (a, b) is stored as the number a * vocab_size + b.
    pairs, pair_counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    # how many different tokens were seen after each token
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)

    context, word = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    wanted = context * vocab_size + word
    place = np.searchsorted(pairs, wanted).clip(max=len(pairs) - 1)
    pair_count = np.where(pairs[place] == wanted, pair_counts[place], 0)
    seen = count[context]
    discounted = np.maximum(pair_count - DISCOUNT, 0) / np.maximum(seen, 1)
    backoff = np.where(seen > 0, DISCOUNT * followers[context] / np.maximum(seen, 1), 1.0)
    p_bigram = discounted + backoff * p_unigram[word]
    return {"unigram": float(-np.log(p_unigram[word]).mean()),
            "bigram": float(-np.log(p_bigram).mean())}
