"""Chapter 1: batches, the index of words, episodes, and the command."""
import json
import re
from collections import Counter

import numpy as np
import pytest
import regex

import data
from plumbing import text
from plumbing.commands import UserError
from plumbing.tokenizer import END


# ---- batches -----------------------------------------------------------------------------------

def test_batches_walk_through_each_window_once():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = []
    for number in range(9):  # 49 windows of 20 in an epoch's reach: 1000 / 20 - 1
        batch = data.lm_batch(tokens, number, 5, 20, seed=3)
        assert batch.shape == (5, 21)
        assert (batch[:, 1:] == batch[:, :-1] + 1).all()
        starts += batch[:, 0].tolist()
    assert len(set(starts)) == 45
    assert len({start % 20 for start in starts}) == 1


def test_a_batch_is_a_function_of_the_seed_and_its_number():
    tokens = np.arange(1000, dtype=np.uint16)
    batch, again, other = [data.lm_batch(tokens, 4, 5, 20, seed) for seed in (3, 3, 4)]
    assert (batch == again).all()
    assert (batch != other).any()
    # The walk does not depend on the batch size.
    two = np.concatenate([data.lm_batch(tokens, number, 4, 20, 3) for number in (0, 1)])
    assert (two == data.lm_batch(tokens, 0, 8, 20, 3).numpy()).all()


# ---- episodes ----------------------------------------------------------------------------------

def test_index_lists_whole_words_in_the_band(corpus):
    """By brute force over the text: which tokens are whole words, how often, and where."""
    pieces = {}
    for i in range(corpus.encoding.encode_single_token(END)):
        pieces[i] = corpus.encoding.decode_single_token_bytes(i).decode("utf-8", "replace")
    where = {}
    tokens = corpus.train.tolist()
    for at, (token, after) in enumerate(zip(tokens, tokens[1:])):
        is_word = regex.fullmatch(r" \p{L}{3,}", pieces.get(token, ""))
        goes_on = regex.match(r"[\p{L}\p{N}_\ufffd]", pieces.get(after, ""))
        if is_word and not goes_on:
            where.setdefault(token, []).append(at)
    counts = sorted((len(positions) for positions in where.values()), reverse=True)
    index = corpus.index
    assert len(index.words) > 50
    assert index.is_held_out.sum() > 4
    for word, positions in zip(index.words, index.positions):
        assert positions.tolist() == where[word]
        assert 64 <= len(positions) <= counts[99]
    assert len(index.words) == sum(64 <= count for count in counts[100:])


def rows_by_word(corpus, length):
    """{word: [(position, the row of `length` tokens that ends there)]}, by brute force."""
    tokens = corpus.train.astype(np.int64)
    rows = {}
    for word, positions in zip(corpus.index.words, corpus.index.positions):
        rows[word] = [(at, tokens[at - length + 1:at + 1])
                      for at in positions if at >= length - 1]
    return rows


def places_of(row, candidates, masked_words, mask_id):
    """The positions among candidates, (position, row) pairs, whose row gives `row` (L,) when
    masked_words are masked."""
    places = []
    for at, original in candidates:
        masked = np.where(np.isin(original, masked_words), mask_id, original)
        if (masked == row).all():
            places.append(at)
    return places


def test_episode_by_brute_force(corpus):
    n, k, q, length = 6, 3, 2, 24
    sampler = data.EpisodeSampler(corpus, n, k, q, length)
    rows_of = rows_by_word(corpus, length)
    labels_of_word = {}
    for step in range(20):
        episode = sampler.draw(7, step)
        words = corpus.index.words[episode.words]
        assert len(set(words.tolist())) == n
        assert not corpus.index.is_held_out[episode.words].any()
        used = {"support": set(), "query": set()}  # the positions of the tokens in each part
        parts = [("support", episode.support_ids, episode.support_labels, k),
                 ("query", episode.query_ids, episode.query_labels, q)]
        for part, ids, labels, shots in parts:
            assert ids.shape == (n * shots, length)
            assert ids.dtype == labels.dtype
            assert labels.dtype.itemsize == 8
            assert Counter(labels.tolist()) == {label: shots for label in range(n)}
            for row, label in zip(ids.numpy(), labels.tolist()):
                assert row[-1] == corpus.mask_id
                assert not set(row.tolist()) & set(words.tolist())
                # The row is text that ends at its word, with exactly the N words masked.
                places = places_of(row, rows_of[words[label]], words, corpus.mask_id)
                assert places
                if len(places) == 1:  # else the same words stand twice in the text
                    used[part] |= set(range(places[0] - length + 1, places[0] + 1))
        assert used["support"]
        assert used["query"]
        assert not used["support"] & used["query"]
        for label, word in enumerate(words):
            labels_of_word.setdefault(word, set()).add(label)
    # Labels are fresh in each episode.
    assert max(len(labels) for labels in labels_of_word.values()) > 1


def test_an_episode_is_a_function_of_its_arguments(corpus):
    sampler = data.EpisodeSampler(corpus, 6, 3, 2, 24)
    same, other = sampler.draw(7, 3), sampler.draw(7, 3, micro_batch=1)
    assert (same.query_ids == sampler.draw(7, 3).query_ids).all()
    assert not (same.query_ids == other.query_ids).all()


def test_too_many_ways_is_refused(corpus):
    with pytest.raises(UserError, match="words that can be classes, but 500-way .*1 MB"):
        data.EpisodeSampler(corpus, 500, 3, 2, 24)


# ---- the command -------------------------------------------------------------------------------

def test_prepared_once_is_the_corpus_itself(script, corpus, text_file, tmp_path):
    done = script("data.py", text_file, "--out", "ready", "--vocab-size", 2048)
    assert done.returncode == 0, done.stderr
    assert "train.py --data ready --name ready --vocab-size" in done.stdout
    again = data.load(tmp_path / "ready", vocab_size=2048, quiet=True)
    # The command names the vocabulary to train with: the next multiple of 64.
    assert int(done.stdout.split()[-1]) - again.encoding.n_vocab in range(64)
    assert again.info["sha256"] == corpus.info["sha256"]
    assert again.train.tolist() == corpus.train.tolist()


def test_a_prepared_text_of_a_few_words_is_said_to_be_too_short(script, tmp_path):
    (tmp_path / "tiny.txt").write_text("A few words are no text to train on. " * 40)
    tiny = script("data.py", "tiny.txt", "--out", "tiny", "--vocab-size", 300)
    assert tiny.returncode == 0
    assert "too few tokens to train on" in tiny.stdout
    assert "next:" not in tiny.stdout


def test_a_prepared_text_is_checked_when_it_is_loaded(script, text_file, tmp_path):
    done = script("data.py", text_file, "--out", "ready", "--vocab-size", 2048)
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="--vocab-size 300 is too small"):
        data.load(tmp_path / "ready", vocab_size=300, quiet=True)
    # One bit more or less is found in each file.
    for name in ("train.bin", "val.bin", "tokenizer.tiktoken"):
        path = tmp_path / "ready" / name
        content = path.read_bytes()
        path.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        with pytest.raises(UserError, match="incomplete or damaged"):
            data.load(tmp_path / "ready", vocab_size=2048, quiet=True)
        path.write_bytes(content)
        data.load(tmp_path / "ready", vocab_size=2048, quiet=True)


def test_a_prepared_text_of_an_earlier_version_is_checked_by_its_ids(script, text_file, tmp_path):
    """It has no SHA-256 of its files. An id that the tokenizer lacks is found in either part."""
    folder = tmp_path / "ready"
    done = script("data.py", text_file, "--out", "ready", "--vocab-size", 2048)
    assert done.returncode == 0, done.stderr
    info = json.loads((folder / "info.json").read_text())
    del info["files"]
    (folder / "info.json").write_text(json.dumps(info))
    data.load(folder, vocab_size=2048, quiet=True)
    for name, bad in (("val.bin", 60_000), ("train.bin", 2047)):
        ids = np.fromfile(folder / name, dtype="<u2")
        good, ids[7] = ids[7], bad
        ids.tofile(folder / name)
        with pytest.raises(UserError, match=f"id {bad}"):
            data.load(folder, vocab_size=2048, quiet=True)
        ids[7] = good
        ids.tofile(folder / name)


def test_a_text_of_one_piece_can_be_shown(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):  # some of them are validation text, all of it
        (tmp_path / name).write_text(f"A few words in {name}. " * 200)
        loaded = data.load(tmp_path / name, vocab_size=300, cache=tmp_path / "cache", quiet=True)
        shown = data.show(loaded)
        assert "1 documents" in shown
        assert "no episode: the text has 0 words that can be classes" in shown
        assert "A few words in" in shown.split("A sample of the text:")[1]


def test_show_tells_what_a_corpus_holds(corpus, text_file):
    shown = data.show(corpus)
    documents = text.documents([text_file], "", quiet=True)
    n_bytes = sum(len(piece.encode()) for _, piece in documents)
    n_tokens = len(corpus.train) + len(corpus.val)
    assert f"{n_tokens:,} tokens" in shown
    assert f"{n_bytes / n_tokens:.2f} bytes per token" in shown
    assert f"{corpus.info['documents']} documents" in shown


def parts_of(shown):
    """(sample, support rows, query rows, answers) of what data.show prints of a corpus. The last
    two are lists in the order of the queries."""
    before, after = shown.split("Support set:")
    sample = before.split("A sample of the text:")[1].split("An episode:")[0]
    support, queries = after.split("Queries:")
    queries, answers = queries.split("right answers: ")
    support = re.findall(r"^   ([A-D])  \.\.\. (.*(?:\n {6}.*)*)", support, flags=re.MULTILINE)
    queries = re.findall(r"^ +\d  \.\.\. (.*(?:\n {6}.*)*)", queries, flags=re.MULTILINE)
    answers, words = answers.split("\nthe words: ")
    names = dict(pair.split(" = ") for pair in words.split(", "))
    return sample, support, queries, [names[answer.split()[1]] for answer in answers.split(", ")]


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_show_prints_the_episode_of_a_seed(corpus, seed):
    sample, support, queries, answers = parts_of(data.show(corpus, seed))
    episode = data.EpisodeSampler(corpus, 4, 2, 1, 24).draw(seed, 0)
    words = [corpus.pieces[word].strip() for word in corpus.index.words[episode.words]]
    assert [label for label, _ in support] == list("AABBCCDD")
    asked = {}
    for ids, label in zip(episode.query_ids, episode.query_labels.tolist()):
        asked[data.row_in_words(ids, corpus)] = words[label]
    assert len(queries) == len(asked) == 4
    for row, answer in zip(queries, answers):
        assert asked[" ".join(row.split())] == answer
    for row in [sample, *queries, *[row for _, row in support]]:
        assert not set(words) & set(row.split())
    assert len(sample.split()) > 20


def test_shown_queries_are_not_in_the_order_of_their_labels(corpus):
    orders = set()
    for seed in range(8):
        answers = data.show(corpus, seed).split("right answers: ")[1].split("\n")[0]
        orders.add(re.sub(r"[^A-D]", "", answers))
    assert len(orders) > 4
    assert all(sorted(order) == list("ABCD") for order in orders)


def test_the_sample_holds_no_word_of_the_episode():
    tokens = np.arange(1000) % 250
    # The pieces from the middle on: 500 to 559 are tokens 0 to 59, the next are 60 to 119.
    assert data.sample_without([5], tokens).tolist() == list(range(60, 120))
    assert data.sample_without([5, 119, 240], tokens).tolist() == list(range(120, 180))
    assert data.sample_without([], tokens).tolist() == list(range(60))
    assert len(data.sample_without(range(250), tokens)) == 0


def test_rows_hold_nothing_that_a_terminal_obeys(corpus):
    ids = np.array(corpus.encoding.encode_ordinary("a\x1b[31mred\r\nline\x07") + [corpus.mask_id])
    assert data.row_in_words(ids, corpus) == "a [31mred line <mask>"


def test_a_seed_without_an_episode_is_refused(script):
    done = script("data.py", "text.txt", "--out", "folder", "--seed", 1)
    assert done.returncode == 2
    assert "--show" in done.stderr
