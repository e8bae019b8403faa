"""Text and token files become a corpus once, and the same text the same corpus."""
import numpy as np
import pytest

import data
from plumbing import prepare, text
from plumbing.tokenizer import END


def test_documents_are_split_by_name(corpus, text_file):
    """Both parts together are the whole text, and validation is about a tenth."""
    end = corpus.encoding.encode_single_token(END)
    expected = {True: [], False: []}
    for name, piece in text.documents([text_file], "reading", quiet=True):
        ids = corpus.encoding.encode_ordinary(piece) + [end]
        expected[text.is_validation(name)] += ids
    assert corpus.train.tolist() == expected[False]
    assert corpus.val.tolist() == expected[True]
    assert 0.02 < len(corpus.val) / len(corpus.train) < 0.3
    pieces = [piece for _, piece in text.documents([text_file], "reading", quiet=True)]
    assert "".join(pieces) == text_file.read_text()


def test_second_load_reads_the_cache_and_other_text_is_another_folder(
        corpus, text_file, cache, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text() + "one more line\n")
    monkeypatch.setattr(prepare, "prepare", lambda *args, **keywords: pytest.fail("prepared again"))
    again = data.load(text_file, vocab_size=2048, cache=cache, quiet=True)
    assert again.info == corpus.info
    assert again.encoding._mergeable_ranks == corpus.encoding._mergeable_ranks
    with pytest.raises(pytest.fail.Exception):
        data.load(other, vocab_size=2048, cache=cache, quiet=True)


# ---- files of token ids ------------------------------------------------------------------------

def llm_c_shard(ids):
    """The bytes of a token file as llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + ids.astype("<u2").tobytes()


def test_token_files_of_nanogpt_and_llm_c_are_the_same_corpus(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50257, 7300), rng.integers(0, 50257, 900)
    nano, llmc = tmp_path / "nano", tmp_path / "llmc"
    nano.mkdir()
    train.astype("<u2").tofile(nano / "train.bin")
    val.astype("<u2").tofile(nano / "val.bin")
    llmc.mkdir()
    (llmc / "web_train_000001.bin").write_bytes(llm_c_shard(train[:5000]))
    (llmc / "web_train_000002.bin").write_bytes(llm_c_shard(train[5000:]))
    (llmc / "web_val_000000.bin").write_bytes(llm_c_shard(val))
    loaded = [data.load(folder, cache=tmp_path / "cache", quiet=True) for folder in (nano, llmc)]
    for corpus in loaded:
        assert corpus.train.tolist() == train.tolist()
        assert corpus.val.tolist() == val.tolist()
        assert corpus.encoding.name == "gpt2"
        assert corpus.mask_id == 50257
    assert len({corpus.info["sha256"] for corpus in loaded}) == 1
    assert "8,200 tokens" in data.show(loaded[0])


def test_the_last_tenth_of_a_token_file_is_for_validation(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    ids = np.random.default_rng(0).integers(0, 50257, 7300)
    (tmp_path / "all.bin").write_bytes(llm_c_shard(ids))
    one = data.load(tmp_path / "all.bin", cache=tmp_path / "cache", quiet=True)
    assert one.train.tolist() == ids[:6570].tolist()
    assert one.val.tolist() == ids[6570:].tolist()
