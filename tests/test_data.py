import ast
import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken

import data
import meta
import text


def naive_bpe(counts, n_merges):
    """Recount all pairs before each merge; ties go to the smallest pair."""
    words, tokens = {tuple(w.encode()): n for w, n in counts.items()}, [bytes([i]) for i in range(256)]
    for _ in range(n_merges):
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < 2:
            break
        tokens.append(tokens[best[0]] + tokens[best[1]])
        words = {tuple(text.merge(list(word), best, len(tokens) - 1)): n for word, n in words.items()}
    return tokens


def test_bpe_equals_naive_twin():
    rng = random.Random(0)
    counts = {"".join(rng.choice("abcé ") for _ in range(rng.randint(1, 9))): rng.randint(1, 30) for _ in range(200)}
    counts |= {"aaaa": 7, "aaaaaaa": 3}  # overlapping pairs
    assert text.train_bpe(counts, 80, quiet=True) == naive_bpe(counts, 80)


def test_bpe_stops_when_no_pair_stands_twice():
    assert text.train_bpe({"ab": 1, "cd": 1}, 10, quiet=True) == [bytes([i]) for i in range(256)]


def test_encoding_round_trip(corpus):
    text = "def f(x): return 'naïve' + \"日本語\" 🙂\n\n  \t1234567 <|mask|> it's"
    ids = corpus.encoding.encode_ordinary(text)
    assert corpus.encoding.decode(ids) == text and max(ids) < corpus.encoding.encode_single_token(data.END)
    assert corpus.mask_id < corpus.vocab_size


def test_installed_docs_are_docstrings_of_this_machine():
    path = next(p for p in Path(ast.__file__).parent.glob("textwrap.py"))
    texts = text.docstrings(path)
    import textwrap
    assert texts[0] == textwrap.__doc__.strip() and any("dedent" in t or "leading whitespace" in t for t in texts)


def test_documents_are_split_by_name(corpus, text_file):
    """Both parts together are the whole text, and validation is about a tenth."""
    end = corpus.encoding.encode_single_token(data.END)
    expected = {True: [], False: []}
    for name, piece in text.documents([text_file], "reading", quiet=True):
        expected[data.is_validation(name)] += corpus.encoding.encode_ordinary(piece) + [end]
    assert corpus.train.tolist() == expected[False] and corpus.val.tolist() == expected[True]
    assert 0.02 < len(corpus.val) / len(corpus.train) < 0.3
    assert "".join(piece for _, piece in text.documents([text_file], "reading", quiet=True)) == text_file.read_text()


def test_second_load_reads_the_cache_and_other_text_is_another_folder(corpus, text_file, cache, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "one more line\n")
    monkeypatch.setattr(data, "prepare", lambda *args: pytest.fail("prepared again"))
    again = data.load(text_file, vocab_size=2048, cache=cache, quiet=True)
    assert again.info == corpus.info and again.encoding._mergeable_ranks == corpus.encoding._mergeable_ranks
    with pytest.raises(pytest.fail.Exception):
        data.load(other, vocab_size=2048, cache=cache, quiet=True)


def test_batches_walk_through_each_window_once():
    tokens = np.arange(1000, dtype=np.uint16)
    starts = []
    for number in range(9):  # 49 windows of 20 in an epoch's reach: 1000 / 20 - 1
        ids, targets = data.lm_batch(tokens, number, 5, 20, seed=3)
        assert (targets == ids + 1).all() and ids.shape == (5, 20)
        starts += ids[:, 0].tolist()
    assert len(set(starts)) == 45 and len({s % 20 for s in starts}) == 1
    again = data.lm_batch(tokens, 4, 5, 20, seed=3)[0]
    assert (again == data.lm_batch(tokens, 4, 5, 20, seed=3)[0]).all() and (again != data.lm_batch(tokens, 4, 5, 20, seed=4)[0]).any()
    two = np.concatenate([data.lm_batch(tokens, n, 4, 20, 3)[0] for n in (0, 1)])  # the walk does not depend on the batch size
    assert (two == data.lm_batch(tokens, 0, 8, 20, 3)[0].numpy()).all()


def test_ngram_baselines_equal_naive_twin():
    rng = np.random.default_rng(0)
    train, targets = rng.integers(0, 6, 200) ** 2 % 7, rng.integers(0, 9, (3, 11))
    uni, pairs = Counter(train.tolist()), Counter(zip(train.tolist(), train[1:].tolist()))
    p1 = lambda w: (uni[w] + 1) / (len(train) + 10)
    def p2(v, w):
        if not uni[v]:
            return p1(w)
        kinds = sum(1 for a, _ in pairs if a == v)
        return max(pairs[v, w] - 0.75, 0) / uni[v] + 0.75 * kinds / uni[v] * p1(w)
    bigrams = [(int(a), int(b)) for row in targets for a, b in zip(row, row[1:])]
    result = data.ngram_baselines(train, targets, 10)
    assert result["unigram"] == pytest.approx(-np.mean([np.log(p1(w)) for _, w in bigrams]))
    assert result["bigram"] == pytest.approx(-np.mean([np.log(p2(v, w)) for v, w in bigrams]))
    assert sum(p2(3, w) for w in range(10)) == pytest.approx(1, abs=0.02)  # a distribution, but for the last token's end


def test_index_lists_whole_words_in_the_band(corpus):
    """By brute force over the text: which tokens are whole words, how often, and where."""
    pieces = {i: corpus.encoding.decode_single_token_bytes(i).decode("utf-8", "replace") for i in range(corpus.encoding.encode_single_token(data.END))}
    where = {}
    tokens = corpus.train.tolist()
    for at, (token, after) in enumerate(zip(tokens, tokens[1:])):
        if regex.fullmatch(r" \p{L}{3,}", pieces.get(token, "")) and not regex.match(r"[\p{L}\p{N}_\ufffd]", pieces.get(after, "")):
            where.setdefault(token, []).append(at)
    counts = sorted((len(p) for p in where.values()), reverse=True)
    index = corpus.index
    assert len(index.words) > 50 and (index.is_held_out.sum() > 4)
    for word, positions in zip(index.words, index.positions):
        assert positions.tolist() == where[word] and 64 <= len(positions) <= counts[99]
    assert len(index.words) == sum(64 <= n for n in counts[100:])


def test_episode_by_brute_force(corpus):
    n, k, q, length = 6, 3, 2, 24
    sampler = data.EpisodeSampler(corpus, n, k, q, length)
    rows_of = {}
    tokens = corpus.train.astype(np.int64)
    for word, positions in zip(corpus.index.words, corpus.index.positions):
        rows_of[word] = [(p, tokens[p - length + 1:p + 1]) for p in positions if p >= length - 1]
    labels_of_word = {}
    for step in range(20):
        episode = sampler.draw(7, step)
        words = corpus.index.words[episode.words]
        assert len(set(words.tolist())) == n and not corpus.index.is_held_out[episode.words].any()
        used = {"support": set(), "query": set()}
        for part, ids, labels, shots in (("support", episode.support_ids, episode.support_labels, k),
                                         ("query", episode.query_ids, episode.query_labels, q)):
            assert ids.shape == (n * shots, length) and ids.dtype == labels.dtype and labels.dtype.itemsize == 8
            assert Counter(labels.tolist()) == {label: shots for label in range(n)}
            ends = []
            for row, label in zip(ids.numpy(), labels.tolist()):
                assert row[-1] == corpus.mask_id and not set(row.tolist()) & set(words.tolist())
                matches = [p for p, original in rows_of[words[label]]
                           if (np.where(np.isin(original, words), corpus.mask_id, original) == row).all()]
                assert matches  # the row is text that ends at its word, with exactly the N words masked
                ends.append(matches)
            for matches in ends:
                if len(matches) == 1:  # else the same words stand twice in the text
                    used[part] |= set(range(matches[0] - length + 1, matches[0] + 1))
        assert used["support"] and used["query"] and not used["support"] & used["query"]
        for label, word in enumerate(words):
            labels_of_word.setdefault(word, set()).add(label)
    assert max(len(labels) for labels in labels_of_word.values()) > 1  # labels are fresh in each episode
    same, other = sampler.draw(7, 3), sampler.draw(7, 3, micro_batch=1)
    assert (same.query_ids == sampler.draw(7, 3).query_ids).all() and not (same.query_ids == other.query_ids).all()


def test_too_many_ways_is_refused(corpus):
    with pytest.raises(data.DataError, match="words for 500-way"):
        data.EpisodeSampler(corpus, 500, 3, 2, 24)


def test_fewshot_rows_hold_only_held_out_words_at_the_end(corpus):
    rows = meta.fewshot_rows(corpus, 12, 6)
    held_out = set(corpus.index.words[corpus.index.is_held_out].tolist())
    windows = {tuple(corpus.val[p - 11:p]): int(corpus.val[p]) for p in range(11, len(corpus.val))}
    assert set(Counter(rows.word.tolist()).values()) == {6} and len(set(rows.word.tolist())) > 3
    for ids, word, previous in zip(rows.ids.tolist(), rows.word, rows.previous):
        assert ids[-1] == corpus.mask_id and not set(ids[:-1]) & held_out and previous == ids[-2]
        assert windows[tuple(ids[:-1])] == corpus.index.words[word] and corpus.index.is_held_out[word]


def test_gpt2_offline_names_both_ways_out(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(data.DataError, match="TIKTOKEN_CACHE_DIR.*--tokenizer bpe"):
        data.gpt2_encoding()


LINES = ["First line, naïve.", "Zweite Zeile 日本語 🙂", "third\nwith a break\r\n", "x" * 40_000, " "]


def read(path):
    return [piece for _, piece in text.documents(text.text_files([path]), "reading", quiet=True)]


def test_json_lines_plain_and_gzipped_give_their_texts(tmp_path):
    lines = "\n".join(json.dumps({"id": i, "text": line}, ensure_ascii=i % 2 == 0) for i, line in enumerate(LINES)) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pieces = read(tmp_path / "a.jsonl")
    assert pieces[:3] == LINES[:3] and "".join(pieces[3:]) == LINES[3] and max(map(len, pieces)) <= text.PIECE
    assert read(tmp_path / "b.jsonl.gz") == pieces
    names = [name for name, _ in text.documents([tmp_path / "a.jsonl"], "reading", quiet=True)]
    assert len(set(names)) == 4  # the pieces of one document are on one side of the split
    (tmp_path / "c.jsonl").write_text('{"text": "half a pair: \\ud83d"}')
    assert read(tmp_path / "c.jsonl") == ["half a pair: ?"]


def test_a_folder_is_read_in_order_and_cut_at_line_ends(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("".join(f"line {i} ü\r\n" for i in range(5000)))
    (tmp_path / "sub" / "a.txt").write_text("last")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "notes.md").write_text("not read")
    pieces = read(tmp_path)
    assert pieces[0] == "first" and pieces[-1] == "last" and all(piece.endswith("\n") for piece in pieces[1:-1])
    assert "".join(pieces[1:-1]) == "".join(f"line {i} ü\n" for i in range(5000))


def llm_c_shard(ids):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def test_token_files_of_nanogpt_and_llm_c_are_the_same_corpus(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(data, "COPY", 1000)
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50257, 7300), rng.integers(0, 50257, 900)
    for name in ("nano", "llmc", "one"):
        (tmp_path / name).mkdir()
    train.astype("<u2").tofile(tmp_path / "nano" / "train.bin")
    val.astype("<u2").tofile(tmp_path / "nano" / "val.bin")
    (tmp_path / "llmc" / "web_train_000001.bin").write_bytes(llm_c_shard(train[:5000]))
    (tmp_path / "llmc" / "web_train_000002.bin").write_bytes(llm_c_shard(train[5000:]))
    (tmp_path / "llmc" / "web_val_000000.bin").write_bytes(llm_c_shard(val))
    (tmp_path / "one" / "all.bin").write_bytes(llm_c_shard(train))
    loaded = {name: data.load(tmp_path / name, cache=tmp_path / "cache", quiet=True) for name in ("nano", "llmc")}
    for corpus in loaded.values():
        assert corpus.train.tolist() == train.tolist() and corpus.val.tolist() == val.tolist()
        assert corpus.encoding.name == "gpt2" and corpus.mask_id == 50257
    assert len({corpus.info["sha256"] for corpus in loaded.values()}) == 1
    one = data.load(tmp_path / "one" / "all.bin", cache=tmp_path / "cache", quiet=True)
    assert one.train.tolist() == train[:6570].tolist() and one.val.tolist() == train[6570:].tolist()  # the last tenth
    assert "8,200 tokens" in data.show(loaded["nano"])


def test_prepared_once_is_the_corpus_itself(script, corpus, text_file, tmp_path):
    done = script("data.py", text_file, "--out", "ready", "--vocab-size", 2048)
    assert done.returncode == 0 and "train.py --data ready" in done.stdout, done.stderr
    again = data.load(tmp_path / "ready", vocab_size=2048, quiet=True)
    assert int(done.stdout.split()[-1]) - again.encoding.n_vocab in range(64)  # the vocabulary that it says to train with
    (tmp_path / "tiny.txt").write_text("A few words are no text to train on. " * 40)
    tiny = script("data.py", "tiny.txt", "--out", "tiny", "--vocab-size", 300)
    assert tiny.returncode == 0 and "too few to train on" in tiny.stdout and "next:" not in tiny.stdout
    assert again.info["sha256"] == corpus.info["sha256"] and again.train.tolist() == corpus.train.tolist()
    with pytest.raises(data.DataError, match="--vocab-size 300 is too small"):
        data.load(tmp_path / "ready", vocab_size=300, quiet=True)
    np.array([2047] * (len(again.train)), dtype="<u2").tofile(tmp_path / "ready" / "train.bin")
    bad = np.fromfile(tmp_path / "ready" / "val.bin", dtype="<u2")
    bad[7] = 60_000
    bad.tofile(tmp_path / "ready" / "val.bin")
    with pytest.raises(data.DataError, match="id 60000"):
        data.load(tmp_path / "ready", vocab_size=2048, quiet=True)


def test_a_text_of_one_piece_can_be_shown(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt"):  # some of them are validation text, all of it
        (tmp_path / name).write_text(f"A few words in {name}. " * 200)
        shown = data.show(data.load(tmp_path / name, vocab_size=300, cache=tmp_path / "cache", quiet=True))
        assert "1 documents" in shown and "no episode: the text has 0 words" in shown


def test_show_tells_what_a_corpus_holds(corpus, text_file):
    shown = data.show(corpus)
    n_bytes = sum(len(piece.encode()) for _, piece in text.documents([text_file], "", quiet=True))
    n_tokens = len(corpus.train) + len(corpus.val)
    assert f"{n_tokens:,} tokens" in shown and f"{n_bytes / n_tokens:.2f} bytes per token" in shown and f"{corpus.info['documents']} documents" in shown
    episode = data.EpisodeSampler(corpus, 4, 2, 1, 24).draw(0, 0)
    rows = [line.split("-> ") for line in shown.splitlines() if "-> " in line]
    assert len(rows) == 8 and all(row.rstrip().endswith("<mask>") for row, _ in rows)
    answers = shown.split("answers: ")[1]
    for label, word in enumerate(corpus.index.words[episode.words]):
        name = corpus.encoding.decode([int(word)]).strip()
        assert f"{label}: {name}" in answers and not any(name in row.split() for row, _ in rows)
