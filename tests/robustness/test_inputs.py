"""What must come of bad input: a table for each kind, and a fuzz test of the readers.

It is exit code 2 and one line that says what is wrong. Nothing of the user's is touched, and there
is never a traceback, a hang, or memory without bound.
"""
import base64
import gzip
import json
import os
import random
import re
import sys

import numpy as np
import pytest

import data
import model
import ner
import probe
import train
from conftest import SMALL
from plumbing import text
from plumbing.commands import UserError
from plumbing.logs import read_run
from plumbing.phases import phases
from plumbing.pictures import draw_dynamics, new_figure
from plumbing.prepare import copy_ids
from plumbing.tokenizer import FILE, count_pretokens, load_encoding
from plumbing.treebanks import parse_iob2

PROSE = ("The cat sat on the mat and the dog lay by the door.\n" * 40).encode()
ONE_LINE_OF_JSON = b'{"text": "fine and long enough"}\n'
ZIPPED = gzip.compress(ONE_LINE_OF_JSON * 999, mtime=0)
IDS = (np.arange(9000) % 50257).astype("<u2")
HEADER = np.zeros(256, dtype="<i4")
HEADER[:3] = 20240520, 1, len(IDS)


def shard(*header):
    """A token file of llm.c, whose header begins with other numbers than the right ones."""
    changed = HEADER.copy()
    changed[:len(header)] = header
    return changed.tobytes() + IDS.tobytes()


# ---- the tables --------------------------------------------------------------------------------

# case -> (file name, content or None, what the error says). Every one is refused by
# train.py --data, by data.py, and so by data.load.
TEXT_FILES = {
    "nothing there": ("a.txt", None, "no such file or folder"),
    "empty text": ("a.txt", b"", "empty"),
    "blank text": ("a.txt", b" \n\n ", "empty"),
    "NUL": ("a.txt", PROSE + b"\0" + PROSE, f"NUL byte at byte {len(PROSE)}"),
    "not UTF-8": ("a.txt", PROSE + b"caf\xe9 " + PROSE,
                  f"not UTF-8 text .* at byte {len(PROSE) + 3}"),
    "not UTF-8, far": ("a.txt", "é".encode() * 30_000 + b"\xff", "at byte 60000"),
    "UTF-8 cut short": ("a.txt", PROSE + "日".encode()[:2], "not UTF-8"),
    "UTF-16": ("a.txt", "some text".encode("utf-16"), "not UTF-8"),
    "a program": ("a.txt", bytes(range(256)) * 20, "not"),
    "zip archive": ("a.txt", b"PK\x03\x04" + bytes(60), "NUL"),
}
JSON_FILES = {
    "broken JSON": ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2"),
    "JSON without text": ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', "a.jsonl, line 3"),
    "JSON text is a number": ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1"),
    "JSON list": ("a.jsonl", b'["text"]\n', "a.jsonl, line 1"),
    "JSON not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n', "a.jsonl, line 1"),
    "JSON too deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl, line 1"),
    "JSON empty": ("a.jsonl", b"", "empty"),
    "gzip ends early": ("a.jsonl.gz", ZIPPED[:-20], "damaged or ends early"),
    "gzip damaged": ("a.jsonl.gz", ZIPPED[:12] + random.Random(0).randbytes(40),
                     "damaged or ends early"),
    "not gzip": ("a.jsonl.gz", ONE_LINE_OF_JSON, "damaged or ends early"),
}
NOT_IDS = "does not hold uint16 GPT-2 ids"
TOKEN_FILES = {
    "odd length": ("a.bin", IDS.tobytes()[:-1], "uint16 ids take two"),
    "no ids": ("a.bin", b"", "there must be some"),
    "ids beyond the vocabulary": ("a.bin", (IDS + 50_000).tobytes(), NOT_IDS),
    "32-bit ids": ("a.bin", IDS.astype("<i4").tobytes(), NOT_IDS),
    "64-bit ids": ("a.bin", IDS.astype("<i8").tobytes(), NOT_IDS),
    "floats": ("a.bin", np.random.default_rng(0).normal(size=4000).tobytes(), NOT_IDS),
    "saved by NumPy": ("a.bin", b"\x93NUMPY\x01\x00" + IDS.tobytes(), "NumPy"),
    "shard of another version": ("a.bin", shard(20240520, 7), "version 7"),
    "shard with another magic": ("a.bin", shard(20240801), NOT_IDS),
    "shard cut short": ("a.bin", shard()[:-100], "must say version 1"),
    "shard with a wild count": ("a.bin", shard(20240520, 1, 2 ** 31 - 1), "must say version 1"),
    "shard with a negative count": ("a.bin", shard(20240520, 1, -5), "must say version 1"),
}
FILES = TEXT_FILES | JSON_FILES | TOKEN_FILES

# case -> (flags of train.py, what the error says)
FLAGS = {
    "short data": (["--data", "short.txt"], "too short"),
    "few words": (["--data", "plain.txt", "--meta", "--batch-size", 1, "--seq-len", 8],
                  "words for 4-way"),
    "size": (["--size", "12m"], "invalid choice"),
    "one way": (["--n-way", 1], "at least 2"),
    "ratio": (["--hybrid-ratio", 1.5], "0 to 1"),
    "context": (["--seq-len", 4096], "2 to 2048"),
    "steps": (["--steps", -5], "at least 1"),
    "lr": (["--lr", "fast"], "number"),
    "lr nan": (["--lr", "nan"], "at least 0"),
    "vocabulary": (["--vocab-size", 70000], "65536"),
    "accumulation": (["--grad-accum", 3], "multiple"),
    "no meta steps": (["--inner-steps", 3], "add --meta"),
    "device": (["--device", "warp"], "--device"),
    "name": (["--name", "../elsewhere"], "plain folder name"),
    "runs is a file": (["--runs", "short.txt"], "cannot write"),
    "cache is a file": (["--cache", "short.txt"], "cannot write"),
    "empty folder of text": (["--data", "folder"], "no .txt or .jsonl"),
    "not a file": (["--data", "pipe"], "not a file or folder"),
    "characters of nanoGPT": (["--data", "chars"], "meta.pkl"),
    "only validation ids": (["--data", "half"], "none to train on"),
    "prepared text cut short": (["--data", "cut"], "not whole"),
    "GPT-2 ids in a small vocabulary": (["--data", "ids.bin"], "50258"),
    "characters of nanoGPT, the file": (["--data", "chars/train.bin"], "meta.pkl"),
    "tokens of a prepared folder": (["--data", "cut/train.bin"], "tokenizer.tiktoken"),
}

# case -> (another chapter, its flags, what the error says)
COMMANDS = {
    "no such run": (model, ["runs/none"], "not a run"),
    "run without checkpoint": (model, ["hollow"], "no usable checkpoint"),
    "damaged settings": (model, ["broken"], "not a run"),
    "wild vocabulary": (model, ["wild"], "no usable checkpoint|does not fit"),
    "negative tokens": (model, ["hollow", "--tokens", "-1"], "at least 0"),
    "export over something": (model, ["hollow", "--export", "folder"], "already"),
    "probe of nothing": (probe, ["runs/none"], "not a run"),
    "probe of an empty log": (probe, ["hollow"], "no evaluation"),
    "live of nothing": (probe, ["hollow", "runs/none", "--live"], "not a run"),
    "live at no port": (probe, ["hollow", "--live", "--port", "65536"], "in 0 to 65535"),
    "port of nothing": (probe, ["hollow", "--port", "80"], "add --live"),
    "ner of nothing": (ner, ["runs/none"], "not a run"),
    "ner without folder": (ner, ["hollow", "--uner", "nowhere"], "no such folder"),
    "ner seeds": (ner, ["hollow", "--seeds", "0"], "in 1 to 1000"),
    "data: nothing to do": (data, [], "nothing to do"),
    "data: over something": (data, ["short.txt", "--out", "folder-with-file"], "already"),
    "data: missing": (data, ["nowhere", "--out", "new"], "no such file"),
    "data: vocabulary": (data, ["short.txt", "--out", "new", "--vocab-size", "99"], "260"),
    "data: two shown": (data, ["short.txt", "plain.txt", "--show"], "--out"),
}

# Files that the tables name.
DESK = {
    "short.txt": b"a few words only",
    "plain.txt": b"no word often enough to be asked about here\n" * 3000,
    "folder-with-file/mine": b"mine",
    "chars/train.bin": IDS.tobytes(),
    "chars/meta.pkl": b"",
    "half/val.bin": IDS.tobytes(),
    "cut/train.bin": b"ab",
    "cut/val.bin": b"",
    "cut/tokenizer.tiktoken": b"",
    "cut/info.json": b'{"tokens": [900, 100], "sha256": ""}',
    "ids.bin": IDS.tobytes(),
    "hollow/metrics.jsonl": b"",
    "hollow/config.json": b'{"size": "11m", "vocab_size": 300, "name": "hollow", "steps": 5, '
                          b'"seed": 0}',
    "broken/config.json": b'{"size": 11',
    "wild/config.json": b'{"size": "11m", "vocab_size": 999999999999, "name": "wild", '
                        b'"steps": 5}',
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with all that the tables name; it becomes the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, content in DESK.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refuse(chapter, flags, message, folder, monkeypatch, capsys):
    """Call a chapter's main: exit code 2, one line with the message, and all files as before."""
    before = times_of_files(folder)
    monkeypatch.setattr(sys, "argv", [f"{chapter.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        chapter.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert times_of_files(folder) == before


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case, tmp_path, gpt2):
    name, content, message = FILES[case]
    path, cache = tmp_path / name, tmp_path / "cache"
    if content is not None:
        path.write_bytes(content)
    vocab_size = 50304 if name.endswith(".bin") else 300
    with pytest.raises(UserError, match=message) as error:
        data.load(path, vocab_size=vocab_size, cache=cache, quiet=True)
    assert "\n" not in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())  # nothing half done stays


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_of_train(case, desk, cache, text_file, monkeypatch, capsys):
    flags, message = FLAGS[case]
    flags = ["--data", text_file, *SMALL, "--cache", cache, "--quiet", *flags]
    refuse(train, flags, message, desk, monkeypatch, capsys)


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands(case, desk, monkeypatch, capsys):
    chapter, flags, message = COMMANDS[case]
    refuse(chapter, flags, message, desk, monkeypatch, capsys)


# ---- links and huge lines ----------------------------------------------------------------------

def test_links_out_of_the_folder_are_left_out_and_said(tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (mine / "a.txt").write_text("mine")
    (mine / "b.txt").symlink_to(tmp_path / "secret.txt")
    (mine / "loop").symlink_to(mine)
    assert [file.name for file in text.text_files([mine])] == ["a.txt"]
    assert "1 links out of the folder" in capsys.readouterr().err
    (mine / "a.txt").unlink()
    # It is an error, and not the installed documentation instead.
    with pytest.raises(UserError, match="links out of it"):
        data.load(mine, vocab_size=300, cache=tmp_path / "cache", quiet=True)


def test_a_huge_line_is_read_in_pieces(tmp_path):
    """100 MB without a space or a line end: bounded pieces, and no word that the tokenizer would
    choke on."""
    path = tmp_path / "line.txt"
    rng = np.random.default_rng(0)
    letters = rng.integers(97, 123, 10_000_000, dtype=np.uint8).tobytes()
    with open(path, "wb") as file:
        for _ in range(10):
            file.write(letters)
    sizes = [len(piece) for _, piece in text.documents([path], "reading", quiet=True)]
    assert sum(sizes) == 100_000_000
    assert max(sizes) <= 2 * text.PIECE
    assert count_pretokens(text.documents([path], "reading", quiet=True)) == {}
    path.write_bytes(letters[:3_000_000])
    corpus = data.load(path, vocab_size=300, cache=tmp_path / "cache", quiet=True)
    assert len(corpus.train) + len(corpus.val) >= 3_000_000  # letter by letter


def test_a_json_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 20_000 + b'"}\n'))
    with pytest.raises(UserError, match="line 1: longer than 10,000 bytes"):
        list(text.documents([path], "reading", quiet=True))


# ---- fuzz --------------------------------------------------------------------------------------

def mutations(rng, content, n):
    """n damaged twins of content: bytes flipped, cut out, doubled, or put in from elsewhere."""
    for _ in range(n):
        twin = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(twin) + 1)
            size = rng.choice([1, 2, 4, 50])
            taken_out = rng.choice([0, size])
            put_in = rng.choice([b"", rng.randbytes(size), bytes(twin[:size]), b"\0", b"\n", b'"',
                                 b"\xff\xff\xff\xff"])
            twin[at:at + taken_out] = put_in
        yield bytes(twin)


def count_refusals(path, content, n, reader):
    """Give a reader n damaged twins of a file, seeded, so that a failure comes again. Each gives
    a result or a UserError of one line; another exception is an accident. Returns the number of
    errors."""
    refused = 0
    for twin in mutations(random.Random(0), content, n):
        path.write_bytes(twin)
        try:
            reader(path)
        except ValueError as error:
            assert type(error) is UserError, repr(error)
            assert "\n" not in str(error)
            refused += 1
    return refused


# The settings of a run, and a tokenizer of the 256 bytes.
SETTINGS = {"name": "x", "steps": 9, "size": "11m", "seed": 0, "corpus_sha256": "a",
            "vocab_size": 9, "tokenizer": "bpe", "hybrid_ratio": 0.5}


TOKENIZER = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


def some_json_lines():
    lines = [json.dumps({"text": f"line {i} 日本"}) + "\n" for i in range(40)]
    return "".join(lines).encode()


def some_metrics():
    lines = []
    for i in range(12):
        lines.append(json.dumps({
            "step": i, "val_loss": 5 - i / 9, "effective_rank": {"hidden": [1, 2 + i]},
            "tokens": i, "flops": i, "seconds": i,
            "head_entropy": {"normalised": [[1, 2], [3, i]]}}) + "\n")
    return "".join(lines).encode()


def read_documents(path):
    list(text.documents([path], "", quiet=True))


def read_ids(path):
    copy_ids(path.parent, {"train": [path], "val": []}, quiet=True)


def read_treebank(path):
    parse_iob2(path.read_bytes(), path.name)


def read_log(path):
    (path.parent / "config.json").write_text(json.dumps(SETTINGS))
    _, lines, _ = read_run(path.parent)
    phases(lines)
    draw_dynamics(new_figure(), lines, SETTINGS)


def read_tokenizer(path):
    load_encoding(path.parent).encode_ordinary("some text")


def read_settings(path):
    model.load_run(path.parent)


@pytest.mark.parametrize("name, content, n, reader", [
    ("a.txt", PROSE, 200, read_documents),
    ("a.jsonl", some_json_lines(), 200, read_documents),
    ("a.jsonl.gz", gzip.compress(some_json_lines(), mtime=0), 200, read_documents),
    ("a.bin", shard(), 200, read_ids),
    ("b.bin", IDS.tobytes(), 100, read_ids),
    ("a.iob2", b"# text\n1\tAnna\tB-PER\n2\tsleeps\tO\n\n1\tParis\tB-LOC\n", 300, read_treebank),
    ("metrics.jsonl", some_metrics(), 40, read_log),
    (FILE, TOKENIZER, 60, read_tokenizer),
    ("config.json", json.dumps(SETTINGS).encode(), 60, read_settings),
], ids=["text", "JSON lines", "gzip", "shard", "ids", "IOB2", "log", "tokenizer", "settings"])
def test_readers_meet_damaged_files_with_an_error_or_a_result(name, content, n, reader, tmp_path):
    refused = count_refusals(tmp_path / name, content, n, reader)
    if reader is not read_log:  # of a log, what is whole is read
        assert refused
