"""The tokenizer's trainer against a naive twin, and encodings that are saved and read."""
import json
import random
from collections import Counter

import pytest
import tiktoken

from plumbing import tokenizer
from plumbing.commands import UserError
from plumbing.tokenizer import END

BYTES = [bytes([i]) for i in range(256)]


def naive_bpe(counts, n_merges):
    """Recount all pairs before each merge; ties go to the smallest pair."""
    words = {tuple(word.encode()): count for word, count in counts.items()}
    tokens = list(BYTES)
    for _ in range(n_merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        words = {tuple(tokenizer.merge(list(word), best, new)): count
                 for word, count in words.items()}
    return tokens


def test_bpe_equals_naive_twin():
    rng = random.Random(0)
    counts = {}
    for _ in range(200):
        word = "".join(rng.choice("abcé ") for _ in range(rng.randint(1, 9)))
        counts[word] = rng.randint(1, 30)
    counts |= {"aaaa": 7, "aaaaaaa": 3}  # overlapping pairs
    assert tokenizer.train_bpe(counts, 80, quiet=True) == naive_bpe(counts, 80)


def test_bpe_stops_when_no_pair_stands_twice():
    assert tokenizer.train_bpe({"ab": 1, "cd": 1}, 10, quiet=True) == BYTES


def test_encoding_round_trip(corpus):
    text = "def f(x): return 'naïve' + \"日本語\" 🙂\n\n  \t1234567 <|mask|> it's"
    ids = corpus.encoding.encode_ordinary(text)
    assert corpus.encoding.decode(ids) == text
    assert max(ids) < corpus.encoding.encode_single_token(END)
    assert corpus.mask_id < corpus.vocab_size


def test_saved_tokens_give_the_same_encoding(tmp_path):
    tokens = tokenizer.train_bpe({" ab": 9, " abc\n": 5, "é": 4}, 10, quiet=True)
    tokenizer.save_tokens(tokens, tmp_path)
    saved, made = tokenizer.load_encoding(tmp_path), tokenizer.bpe_encoding(tokens)
    assert len(tokens) > len(BYTES)
    assert saved._mergeable_ranks == made._mergeable_ranks
    assert saved._special_tokens == made._special_tokens


def test_no_saved_tokens_stand_for_gpt2(tmp_path, gpt2):
    tokenizer.save_tokens([], tmp_path)
    encoding = tokenizer.load_encoding(tmp_path)
    assert encoding.name == "gpt2"
    assert encoding._mergeable_ranks == gpt2._mergeable_ranks


@pytest.mark.parametrize("tokens, settings", [
    ([], {"tokenizer": "bpe", "vocab_size": 60_000}),
    (BYTES, {"vocab_size": 257}),
    (BYTES, {"vocab_size": 300, "tokenizer_sha256": "of another file"}),
    (BYTES[1:], {"vocab_size": 300}),
    (BYTES + [b"a"], {"vocab_size": 300}),
])
def test_a_tokenizer_that_does_not_go_with_its_run_is_refused(tokens, settings, tmp_path, gpt2):
    """None for a BPE, more tokens than the decoder has, another file; a byte that is missing, a
    token twice."""
    tokenizer.save_tokens(tokens, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"size": "11m"} | settings))
    with pytest.raises(UserError, match="tokenizer in .* is damaged"):
        tokenizer.load_encoding(tmp_path)


def test_gpt2_offline_names_both_ways_out(monkeypatch):
    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
        tokenizer.gpt2_encoding()
