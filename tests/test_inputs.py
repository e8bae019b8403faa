"""What must come of bad input: a table for each kind, and a fuzz test of the readers.

Exit code 2 and one line that says what is wrong; nothing of the user's is touched; never a traceback, a hang or memory without bound."""
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
import text
import train
from conftest import SMALL

PROSE = ("The cat sat on the mat and the dog lay by the door.\n" * 40).encode()
IDS = (np.arange(9000) % 50257).astype("<u2")
HEADER = np.zeros(256, dtype="<i4")
HEADER[:3] = 20240520, 1, len(IDS)


def shard(*header):
    changed = HEADER.copy()
    changed[:len(header)] = header
    return changed.tobytes() + IDS.tobytes()


# file name, content, and what the error says; every one is refused by train.py --data, data.py and so by data.load
FILES = {
    "nothing there": ("a.txt", None, "no such file or folder"),
    "empty text": ("a.txt", b"", "empty"),
    "blank text": ("a.txt", b" \n\n ", "empty"),
    "NUL": ("a.txt", PROSE + b"\0" + PROSE, f"NUL byte at byte {len(PROSE)}"),
    "not UTF-8": ("a.txt", PROSE + b"caf\xe9 " + PROSE, f"not UTF-8 text .* at byte {len(PROSE) + 3}"),
    "not UTF-8, far": ("a.txt", "é".encode() * 30_000 + b"\xff", "at byte 60000"),
    "UTF-8 cut short": ("a.txt", PROSE + "日".encode()[:2], "not UTF-8"),
    "UTF-16": ("a.txt", "some text".encode("utf-16"), "not UTF-8"),
    "broken JSON": ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "a.jsonl, line 2"),
    "JSON without text": ("a.jsonl", b'{"text": "fine"}\n\n{"body": "x"}\n', "a.jsonl, line 3"),
    "JSON text is a number": ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1"),
    "JSON list": ("a.jsonl", b'["text"]\n', "a.jsonl, line 1"),
    "JSON not UTF-8": ("a.jsonl", b'{"text": "\xff\xfe"}\n', "a.jsonl, line 1"),
    "JSON too deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "a.jsonl, line 1"),
    "JSON empty": ("a.jsonl", b"", "empty"),
    "gzip ends early": ("a.jsonl.gz", gzip.compress(b'{"text": "fine and long enough"}\n' * 999)[:-20], "damaged or ends early"),
    "gzip damaged": ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 999)[:12] + os.urandom(40), "damaged or ends early"),
    "not gzip": ("a.jsonl.gz", b'{"text": "fine"}\n', "damaged or ends early"),
    "odd length": ("a.bin", IDS.tobytes()[:-1], "uint16 ids take two"),
    "no ids": ("a.bin", b"", "there must be some"),
    "ids beyond the vocabulary": ("a.bin", (IDS + 50_000).tobytes(), "does not hold uint16 GPT-2 ids"),
    "32-bit ids": ("a.bin", IDS.astype("<i4").tobytes(), "does not hold uint16 GPT-2 ids"),
    "64-bit ids": ("a.bin", IDS.astype("<i8").tobytes(), "does not hold uint16 GPT-2 ids"),
    "floats": ("a.bin", np.random.default_rng(0).normal(size=4000).tobytes(), "does not hold uint16 GPT-2 ids"),
    "saved by NumPy": ("a.bin", b"\x93NUMPY\x01\x00" + IDS.tobytes(), "NumPy"),
    "shard of another version": ("a.bin", shard(20240520, 7), "version 7"),
    "shard with another magic": ("a.bin", shard(20240801), "does not hold uint16 GPT-2 ids"),
    "shard cut short": ("a.bin", shard()[:-100], "must say version 1"),
    "shard with a wild count": ("a.bin", shard(20240520, 1, 2 ** 31 - 1), "must say version 1"),
    "shard with a negative count": ("a.bin", shard(20240520, 1, -5), "must say version 1"),
    "a program": ("a.txt", bytes(range(256)) * 20, "not"),
    "zip archive": ("a.txt", b"PK\x03\x04" + bytes(60), "NUL"),
}

FLAGS = {  # of train.py
    "short data": (["--data", "short.txt"], "too short"),
    "few words": (["--data", "plain.txt", "--meta", "--batch-size", 1, "--seq-len", 8], "words for 4-way"),
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

COMMANDS = {  # of the other scripts
    "no such run": (model, ["runs/none"], "not a run"),
    "run without checkpoint": (model, ["hollow"], "no usable checkpoint"),
    "damaged settings": (model, ["broken"], "not a run"),
    "wild vocabulary": (model, ["wild"], "no usable checkpoint|does not fit"),
    "negative tokens": (model, ["hollow", "--tokens", "-1"], "must not be negative"),
    "export over something": (model, ["hollow", "--export", "folder"], "already"),
    "probe of nothing": (probe, ["runs/none"], "not a run"),
    "probe of an empty log": (probe, ["hollow"], "no evaluation"),
    "live of two": (probe, ["hollow", "hollow", "--live"], "one run"),
    "live of nothing": (probe, ["runs/none", "--live"], "not a run"),
    "ner of nothing": (ner, ["runs/none"], "not a run"),
    "ner without folder": (ner, ["hollow", "--uner", "nowhere"], "no such folder"),
    "ner seeds": (ner, ["hollow", "--seeds", "0"], "1 or more"),
    "data: nothing to do": (data, [], "nothing to do"),
    "data: over something": (data, ["short.txt", "--out", "folder-with-file"], "already"),
    "data: missing": (data, ["nowhere", "--out", "new"], "no such file"),
    "data: vocabulary": (data, ["short.txt", "--out", "new", "--vocab-size", "99"], "260"),
    "data: two shown": (data, ["short.txt", "plain.txt", "--show"], "--out"),
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with all that the tables name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder-with-file", "chars", "half", "cut", "hollow", "broken", "wild"):
        (tmp_path / folder).mkdir()
    for name, content in {
            "short.txt": b"a few words only", "plain.txt": b"no word often enough to be asked about here\n" * 3000, "folder-with-file/mine": b"mine",
            "chars/train.bin": IDS.tobytes(), "chars/meta.pkl": b"", "half/val.bin": IDS.tobytes(), "cut/train.bin": b"ab", "cut/val.bin": b"",
            "cut/tokenizer.tiktoken": b"", "cut/info.json": b'{"tokens": [900, 100], "sha256": ""}', "ids.bin": IDS.tobytes(), "hollow/metrics.jsonl": b"",
            "hollow/config.json": b'{"size": "11m", "vocab_size": 300, "name": "hollow", "steps": 5, "seed": 0}', "broken/config.json": b'{"size": 11',
            "wild/config.json": b'{"size": "11m", "vocab_size": 999999999999, "name": "wild", "steps": 5}'}.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def refuse(module, flags, message, folder, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    assert re.search(message, error), error
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("case", FILES)
def test_bad_file(case, tmp_path, gpt2):
    name, content, message = FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        data.load(path, vocab_size=50304 if name.endswith(".bin") else 300, cache=tmp_path / "cache", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())  # nothing half done stays


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_of_train(case, desk, cache, text_file, monkeypatch, capsys):
    flags, message = FLAGS[case]
    refuse(train, ["--data", text_file, *SMALL, "--cache", cache, "--quiet", *flags], message, desk, monkeypatch, capsys)


@pytest.mark.parametrize("case", COMMANDS)
def test_bad_commands(case, desk, monkeypatch, capsys):
    module, flags, message = COMMANDS[case]
    refuse(module, flags, message, desk, monkeypatch, capsys)


def test_links_out_of_the_folder_are_left_out_and_said(tmp_path, capsys):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine")
    (tmp_path / "mine" / "b.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "mine" / "loop").symlink_to(tmp_path / "mine")
    assert [file.name for file in text.text_files([tmp_path / "mine"])] == ["a.txt"]
    assert "1 links out of the folder" in capsys.readouterr().err
    (tmp_path / "mine" / "a.txt").unlink()
    with pytest.raises(data.DataError, match="links out of it"):  # and not the installed documentation instead
        data.load(tmp_path / "mine", vocab_size=300, cache=tmp_path / "cache", quiet=True)


def test_a_huge_line_is_read_in_pieces(tmp_path):
    """100 MB without a space or a line end: bounded pieces, and no word that the tokenizer would choke on."""
    path = tmp_path / "line.txt"
    letters = np.random.default_rng(0).integers(97, 123, 10_000_000, dtype=np.uint8).tobytes()
    with open(path, "wb") as file:
        for _ in range(10):
            file.write(letters)
    total, longest = 0, 0
    for _, piece in text.documents([path], "reading", quiet=True):
        total, longest = total + len(piece), max(longest, len(piece))
    assert total == 100_000_000 and longest <= 2 * text.PIECE
    assert text.count_words(text.documents([path], "reading", quiet=True)) == {}
    path.write_bytes(letters[:3_000_000])
    corpus = data.load(path, vocab_size=300, cache=tmp_path / "cache", quiet=True)
    assert (len(corpus.train) + len(corpus.val)) >= 3_000_000  # letter by letter


def test_a_json_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_LINE", 10_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"x" * 20_000 + b'"}\n'))
    with pytest.raises(data.DataError, match="line 1: longer than 10,000 bytes"):
        list(text.documents([path], "reading", quiet=True))


def mutations(rng, content, n):
    """n damaged twins of content: bytes flipped, cut out, doubled, or put in from elsewhere."""
    for _ in range(n):
        twin = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            at, size = rng.randrange(len(twin) + 1), rng.choice([1, 2, 4, 50])
            twin[at:at + rng.choice([0, size])] = rng.choice([b"", rng.randbytes(size), bytes(twin[:size]), b"\0", b"\n", b'"', b"\xff\xff\xff\xff"])
        yield bytes(twin)


def test_readers_meet_damaged_files_with_an_error_or_a_result(tmp_path, monkeypatch):
    """Fuzz: each reader, on many damaged files, gives a result or its own error. Seeded, so a failure comes again."""
    rng = random.Random(0)
    json_file = b"".join(json.dumps({"text": f"line {i} 日本"}).encode() + b"\n" for i in range(40))
    metrics = b"".join(json.dumps({"step": i, "val_loss": 5 - i / 9, "effective_rank": {"hidden": [1, 2 + i]}, "tokens": i, "flops": i, "seconds": i,
                                   "head_entropy": {"normalised": [[1, 2], [3, i]]}}).encode() + b"\n" for i in range(12))
    iob2 = b"# text\n1\tAnna\tB-PER\n2\tsleeps\tO\n\n1\tParis\tB-LOC\n"
    settings = {"name": "x", "steps": 9, "size": "11m", "seed": 0, "corpus_sha256": "a", "vocab_size": 9, "tokenizer": "bpe", "hybrid_ratio": 0.5}
    tokenizer = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))

    def read_log(path):
        (tmp_path / "config.json").write_text(json.dumps(settings))
        path.rename(tmp_path / "metrics.jsonl")
        _, lines, _ = probe.read_run(tmp_path)
        probe.phases(lines)
        probe.draw_dynamics(probe.new_figure(), lines, settings)

    def read_encoding(path):
        path.rename(tmp_path / "tokenizer.tiktoken")
        data.load_encoding(tmp_path).encode_ordinary("some text")

    def read_settings(path):
        path.rename(tmp_path / "config.json")
        model.load_run(tmp_path)

    readers = {"a.txt": (lambda path: list(text.documents([path], "", quiet=True)), PROSE, 200),
               "a.jsonl": (lambda path: list(text.documents([path], "", quiet=True)), json_file, 200),
               "a.jsonl.gz": (lambda path: list(text.documents([path], "", quiet=True)), gzip.compress(json_file), 200),
               "a.bin": (lambda path: data.copy_tokens(tmp_path, {"train": [path], "val": []}, quiet=True), shard(), 200),
               "b.bin": (lambda path: data.copy_tokens(tmp_path, {"train": [path], "val": []}, quiet=True), IDS.tobytes(), 100),
               "a.iob2": (lambda path: ner.parse_iob2(path.read_bytes(), path.name), iob2, 300),
               "log": (read_log, metrics, 40), "encoding": (read_encoding, tokenizer, 60), "settings": (read_settings, json.dumps(settings).encode(), 60)}
    refused = dict.fromkeys(readers, 0)
    for name, (reader, content, n) in readers.items():
        for twin in mutations(rng, content, n):
            (tmp_path / name).write_bytes(twin)
            try:
                reader(tmp_path / name)
            except (data.DataError, ValueError) as error:
                assert type(error) in (data.DataError, ValueError), error  # and none of ValueError's kin, which would be an accident
                assert "\n" not in str(error)
                refused[name] += 1
    assert all(n for name, n in refused.items() if name != "log"), refused  # of a log, what is whole is read
