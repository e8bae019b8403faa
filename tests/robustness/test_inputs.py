"""What must come of bad input: a table for each kind, hostile files in a run, and a fuzz test of
the readers.

It is exit code 2 and one line that says what is wrong. Nothing of the user's is touched, and there
is never a traceback, a hang, or memory without bound.
"""
import base64
import contextlib
import gzip
import json
import os
import pickle
import random
import re
import resource
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model
import ner
import probe
import train
from conftest import SMALL
from plumbing import text
from plumbing.cells import read_cells
from plumbing.checkpoints import fingerprint
from plumbing.commands import UserError
from plumbing.compare import compare, comparison_table
from plumbing.files import MARK
from plumbing.logs import read_run
from plumbing.phases import phases
from plumbing.pictures import draw_comparison, draw_dynamics, new_figure
from plumbing.prepare import checked, copy_ids
from plumbing.summary import status
from plumbing.tokenizer import FILE, count_pretokens, load_encoding
from plumbing.treebanks import parse_iob2

# What a refusal may take, in bytes.
MEMORY = 2_000_000_000
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
    "no ids": ("a.bin", b"", "must be at least one id"),
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
                  "words that can be classes"),
    "size": (["--size", "12m"], "invalid choice"),
    "one way": (["--n-way", 1], "at least 2"),
    "ratio": (["--hybrid-ratio", 1.5], "between 0 and 1"),
    "context": (["--seq-len", 4096], "between 2 and 2048"),
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
    "prepared text cut short": (["--data", "cut"], "incomplete or damaged"),
    "GPT-2 ids in a small vocabulary": (["--data", "ids.bin"], "50258"),
    "characters of nanoGPT, the file": (["--data", "chars/train.bin"], "meta.pkl"),
    "tokens of a prepared folder": (["--data", "cut/train.bin"], "tokenizer.tiktoken"),
    "device meta": (["--device", "meta"], "--device cpu"),
    "steps of 400 digits": (["--steps", "9" * 400], "at least 1"),
    "steps of 5000 digits": (["--steps", "9" * 5000], "whole number"),
    "seed beyond 64 bits": (["--seed", 2 ** 64 + 1], "at least 0"),
    "lr without end": (["--lr", "inf"], "at least 0"),
    "batch beyond the text": (["--batch-size", 2 ** 62], "too short"),
    "ways beyond the text": (["--meta", "--n-way", 2 ** 62], "words that can be classes"),
    "shots beyond the text": (["--meta", "--k-shot", 2 ** 62], "words that can be classes"),
    "no name": (["--name", ""], "--name: it is empty"),
    "no runs": (["--runs", ""], "--runs: it is empty"),
    "no data": (["--data", ""], "--data: it is empty"),
    "no cache": (["--cache", ""], "--cache: it is empty"),
    "no device": (["--device", ""], "--device: it is empty"),
    "name of 300 letters": (["--name", "x" * 300], "choose a shorter name"),
    "name with a line end": (["--name", "a\nb"], "plain folder name"),
    "runs is a device": (["--runs", "/dev/null"], "cannot write|check the name"),
    "data is a device": (["--data", "/dev/zero"], "not a file or folder"),
    "data has no end": (["--data", "/proc/self/pagemap"], "NUL byte at byte 0"),
    "lock is a pipe": (["--name", "piped"], "cannot write to runs/piped"),
    "name is taken": (["--name", "thesis"], "holds files but no run"),
}

# case -> (another chapter, its flags, what the error says)
COMMANDS = {
    "no such run": (model, ["runs/none"], "does not exist"),
    "run without checkpoint": (model, ["hollow"], "no usable checkpoint"),
    "damaged settings": (model, ["broken"], "not a run"),
    "wild vocabulary": (model, ["wild"], "vocab_size in its config.json is invalid"),
    "negative tokens": (model, ["hollow", "--tokens", "-1"], "at least 0"),
    "export over something": (model, ["hollow", "--export", "folder"], "already"),
    "probe of nothing": (probe, ["runs/none"], "does not exist"),
    "probe of an empty log": (probe, ["hollow"], "no evaluation"),
    "live of nothing": (probe, ["hollow", "runs/none", "--live"], "does not exist"),
    "live at no port": (probe, ["hollow", "--live", "--port", "65536"], "between 0 and 65535"),
    "port of nothing": (probe, ["hollow", "--port", "80"], "add --live"),
    "ner of nothing": (ner, ["runs/none"], "does not exist"),
    "ner without folder": (ner, ["hollow", "--uner", "nowhere"], "no such folder"),
    "ner seeds": (ner, ["hollow", "--seeds", "0"], "between 1 and 1000"),
    "data: nothing to do": (data, [], "nothing to do"),
    "data: over something": (data, ["short.txt", "--out", "folder-with-file"], "already"),
    "data: missing": (data, ["nowhere", "--out", "new"], "no such file"),
    "data: vocabulary": (data, ["short.txt", "--out", "new", "--vocab-size", "99"], "260"),
    "data: two shown": (data, ["short.txt", "plain.txt", "--show"], "--out"),
    "data: folder in a file": (data, ["short.txt", "--out", "short.txt/new"], "check the name"),
    "data: folder without name": (data, ["short.txt", "--out", ""], "--out: it is empty"),
    "data: where nothing can be": (data, ["short.txt", "--out", "/proc/new"], "check the name"),
    "data: linked elsewhere": (data, ["plain.txt", "--out", "linked"], "is a link"),
    "data: shown from a device": (data, ["/dev/zero", "--show"], "not a file or folder"),
    "sample of no tokens": (model, ["hollow", "--top-k", "9" * 5000], "whole number"),
    "sample on a strange device": (model, ["hollow", "--device", "meta"], "--device cpu"),
    "export without name": (model, ["hollow", "--export", ""], "--export: it is empty"),
    "export to 300 letters": (model, ["hollow", "--export", "x" * 300], "shorter name"),
    "probe into no folder": (probe, ["hollow", "--out", ""], "--out: it is empty"),
    "probe of a name of 300 letters": (probe, ["x" * 300], "shorter name"),
    "ner seeds without end": (ner, ["hollow", "--seeds", 10 ** 9], "between 1 and 1000"),
    "ner into no folder": (ner, ["hollow", "--out", ""], "--out: it is empty"),
    "ner into a file": (ner, ["hollow", "--out", "short.txt"], "cannot write to short.txt"),
    "ner from no folder": (ner, ["hollow", "--uner", ""], "--uner: it is empty"),
    "ner from a pipe": (ner, ["hollow", "--out", "ner", "--uner", "piped-uner"], "regular file"),
    "ner from one long word": (ner, ["hollow", "--out", "ner", "--uner", "long-uner"],
                               "longer than 10,000"),
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
    "cut/info.json": b'{"tokens": [900, 100], "sha256": "", "source": ""}',
    "ids.bin": IDS.tobytes(),
    "hollow/metrics.jsonl": b"",
    "hollow/config.json": b'{"size": "11m", "vocab_size": 300, "name": "hollow", "steps": 5, '
                          b'"seed": 0}',
    "broken/config.json": b'{"size": 11',
    "runs/thesis/thesis.docx.tmp": b"mine",
    "linked-to/thesis.docx": b"mine",
    "ner/.lock": b"",
    "ner/ner.png": b"a picture of before",
    "long-uner/en_ewt-ud-test.iob2": b"1\t" + b"a" * 9_000_000 + b"\tO\n",
    "wild/config.json": b'{"size": "11m", "vocab_size": 999999999999, "name": "wild", '
                        b'"steps": 5}',
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with all that the tables name; it becomes the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in DESK.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name in ("pipe", "runs/piped/.lock", "piped-uner/en_ewt-ud-test.iob2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
    (tmp_path / f"linked{MARK}").symlink_to("linked-to")
    return tmp_path


def times_of_files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def little_memory():
    """2 GB more than now, and not a byte beyond, where the system can say how much that is."""
    used = Path("/proc/self/statm")
    if not used.exists():
        yield
        return
    pages = int(used.read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def refuse(chapter, flags, message, folder, monkeypatch, capsys):
    """Call a chapter's main: exit code 2, one line with the message, and all files as before."""
    before = times_of_files(folder)
    monkeypatch.setattr(sys, "argv", [f"{chapter.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped, little_memory():
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
    assert "links that lead out of the folder: 1\n" in capsys.readouterr().err
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


# ---- hostile files in a run --------------------------------------------------------------------

RESUME = (train, ["--name", "mine", "--resume", "--steps", 3])
SAMPLE = (model, ["runs/mine", "--tokens", 3])
PROBE = (probe, ["runs/mine"])
TAG = (ner, ["runs/mine", "--train", "toy", "--test", "toy", "--out", "ner"])
# file of a run -> the commands that read it
READERS = {
    "config.json": [RESUME, SAMPLE, PROBE, TAG],
    "metrics.jsonl": [RESUME, PROBE],
    "ckpt.pt": [RESUME, SAMPLE, TAG],
    "tokenizer.tiktoken": [SAMPLE, TAG],
}
DEEP = b"[" * 200_000
HUGE = b'{"step": 1, "size": "11m", "vocab_size": ' + b"9" * 400 + b"}\n"

# case -> (file, content, what the error says). Every reader of the file refuses it.
RUNS = {
    "empty settings": ("config.json", b"", "not a run"),
    "deep settings": ("config.json", DEEP, "not a run"),
    "settings that are a list": ("config.json", b"[]", "not a run"),
    "settings without a size": ("config.json", b'{"vocab_size": 2048}', "'size'"),
    "size is a list": ("config.json", b'{"size": [], "vocab_size": 2048}', "'size'"),
    "huge number in settings": ("config.json", HUGE, "not a run"),
    "large settings": ("config.json", b" " * 1_000_001, "larger than 1,000,000 bytes"),
    "empty log": ("metrics.jsonl", b"", "no evaluation|its log ends at update -1"),
    "deep log": ("metrics.jsonl", DEEP, "no evaluation|its log ends at update -1"),
    "log of nothing": ("metrics.jsonl", b"\n" * 99, "no evaluation|its log ends at update -1"),
    "huge number in the log": ("metrics.jsonl", HUGE, "no evaluation|ends at update -1"),
    "costs that are lists": ("metrics.jsonl", b'{"step": 2, "val_loss": 5, "tokens": [1], "flops": '
                             b'1, "seconds": 1}\n', "no evaluation|ends at update -1"),
    "empty checkpoint": ("ckpt.pt", b"", "ckpt.pt is damaged"),
    "checkpoint of text": ("ckpt.pt", PROSE, "ckpt.pt is damaged"),
    "empty tokenizer": ("tokenizer.tiktoken", b"", "tokenizer in runs/mine is damaged"),
    "another tokenizer": ("tokenizer.tiktoken", b"YQ== 0\n", "tokenizer in runs/mine is damaged"),
}


@pytest.fixture(scope="session")
def trained(text_file, cache, tmp_path_factory):
    """The folder of a run of two updates."""
    runs = tmp_path_factory.mktemp("trained")
    args, _ = train.parse([*map(str, ["--data", text_file, "--cache", cache, *SMALL, "--quiet",
                                      "--steps", 2, "--probe-every", 2, "--eval-every", 2,
                                      "--meta", "--runs", runs, "--name", "mine"])])
    assert train.train(args) == 0
    (runs / "mine" / "ckpt-previous.pt").unlink()
    return runs / "mine"


@pytest.fixture
def run(trained, desk):
    """A copy of it, in runs/mine of the working folder. The files are links to the original ones:
    `put` removes them first, and the program replaces its files whole."""
    return shutil.copytree(trained, desk / "runs" / "mine", copy_function=os.link)


def put(path, content):
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture
def refused(desk, cache, text_file, monkeypatch, capsys):
    """refused(command, message): a command on a run is refused."""
    def check(command, message):
        chapter, flags = command
        if chapter is train:
            flags = ["--data", text_file, *SMALL, "--cache", cache, "--quiet", "--meta",
                     "--probe-every", 2, "--eval-every", 2, *flags]
        refuse(chapter, flags, message, desk, monkeypatch, capsys)
    return check


@pytest.mark.parametrize("case", RUNS)
def test_hostile_file_in_a_run(case, run, refused):
    name, content, message = RUNS[case]
    put(run / name, content)
    for command in READERS[name]:
        refused(command, message)


@pytest.mark.parametrize("name", READERS)
def test_no_regular_file_in_a_run(name, run, refused):
    path = run / name
    kinds = {
        "pipe": (os.mkfifo, "not a regular file"),
        "device": (lambda path: os.symlink("/dev/zero", path), "not a regular file"),
        "folder": (os.mkdir, "[Dd]irectory"),
        "hole": (lambda path: Path(path).write_bytes(b"") or os.truncate(path, 10 ** 11),
                 "larger than|damaged"),
    }
    for make, message in kinds.values():
        path.unlink(missing_ok=True)
        make(path)
        for command in READERS[name]:
            refused(command, message)
        path.rmdir() if path.is_dir() else path.unlink()


# ---- checkpoints with a right checksum ---------------------------------------------------------

# case -> a statement that changes `state`, a checkpoint. It gets its right SHA-256, and cannot be
# resumed.
STATES = {
    "step beyond the log": "state['step'] = 999",
    "step before the start": "state['step'] = -1",
    "no model": "del state['model']",
    "no optimizer": "del state['optimizer']",
    "no costs": "del state['spent']",
    "costs without end": "state['spent']['tokens'] = float('inf')",
    "costs that are not known": "state['spent']['seconds'] = float('nan')",
    "costs of 400 digits": "state['spent']['flops'] = 10 ** 400",
    "costs in letters": "state['spent']['tokens'] = '5'",
    "costs below zero": "state['spent']['lm_steps'] = -7",
    "weights of another size": "weights['model.norm.weight'] = torch.ones(384)",
    "a weight too few": "del weights['model.norm.weight']",
    "a weight too many": "weights['more'] = torch.ones(3)",
    "weights in a list": "weights['model.norm.weight'] = [1.0] * 96",
    "head of another run": "state['head'] = {}",
    "moments of another size": "moments['exp_avg_sq'] = torch.zeros(3)",
    "moments that are missing": "del moments['exp_avg']",
    "moments of whom": "state['optimizer']['state'][9999] = moments",
    "many clocks": "moments['step'] = torch.zeros(7)",
}


@pytest.mark.parametrize("case", STATES)
def test_state_with_a_right_checksum_that_does_not_fit(case, run, refused):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    del state["sha256"]
    exec(STATES[case], {"torch": torch, "state": state, "weights": state["model"],
                        "moments": state["optimizer"]["state"][0]})
    (run / "ckpt.pt").unlink()
    torch.save(state | {"sha256": fingerprint(state)}, run / "ckpt.pt")
    refused(RESUME, "does not fit|is from update|no step|occurs twice")


def test_the_optimizer_follows_the_flags_and_not_the_checkpoint(run, train_here, desk):
    state = torch.load(run / "ckpt.pt", weights_only=True)
    del state["sha256"]
    wrong = {"betas": (5.0,), "share": "x", "fused": False, "weight_decay": 1e9, "eps": None}
    for group in state["optimizer"]["param_groups"]:
        group.update(wrong)
    (run / "ckpt.pt").unlink()
    torch.save(state | {"sha256": fingerprint(state)}, run / "ckpt.pt")
    # A log may be edited, too: the report does without what is missing.
    lines = '{"step": 0, "tokens": 0, "flops": 0, "seconds": 0, "skipped": null, "val_loss": 5}\n'
    edited = lines + lines.replace("val_", "") + (run / "metrics.jsonl").read_text()
    put(run / "metrics.jsonl", edited.encode())
    chapter, flags = RESUME
    assert train_here("--meta", "--probe-every", 2, "--eval-every", 2, *flags) == 0
    state = torch.load(run / "ckpt.pt", weights_only=True)
    for group, share in zip(state["optimizer"]["param_groups"], (1.0, train.META_HEAD_SHARE)):
        assert group["betas"] == (0.9, 0.95)
        assert group["share"] == share
        assert group["fused"]


# ---- checkpoints that stand for more than they hold --------------------------------------------

def with_(**more):
    """A maker of checkpoints that hold more, with or without a right checksum."""
    def make(path):
        torch.save({"step": 2, "model": {}, "sha256": "", **more}, path)
    return make


def nested():
    value = [1]
    for _ in range(60):
        value = [value, value]
    return value


def archive(content, compression=zipfile.ZIP_STORED):
    """A maker of checkpoints with a pickle that no torch.save has written."""
    def make(path):
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("ckpt/data.pkl", content)
            file.writestr("ckpt/version", "3\n")
            file.writestr("ckpt/byteorder", "little")
            file.writestr("ckpt/data/0", bytes(64))
    return make


def tensor_of(numbers):
    """A pickle of a tensor that claims to have so many numbers, where the file has 16."""
    size = b"\x8a\x09" + numbers.to_bytes(9, "little", signed=True)
    return (b"\x80\x02}(X\x01\0\0\0x" b"ctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" b"0X\x03\0\0\0cpu"
            + size + b"tQK\0(" + size + b"t(K\x01t\x89ccollections\nOrderedDict\n)RtRu.")


# case -> (a maker of ckpt.pt, what the error says)
BOMBS = {
    "a view of 6 GB": (with_(x=torch.zeros(1).expand(1_500_000_000)), "does not fill its memory"),
    "a part of a tensor": (with_(x=torch.zeros(100)[::2]), "does not fill its memory"),
    "lists in lists": (with_(x=nested()), "occurs twice"),
    "one tensor twice": (with_(x=torch.ones(3), y=[torch.ones(3)] * 2), "occurs twice"),
    "not finite": (with_(x=torch.tensor([1.0, float("nan")])), "not finite"),
    "sparse": (with_(x=torch.eye(3).to_sparse()), "pickle names torch._utils"),
    "without memory": (with_(x=torch.empty(10 ** 12, device="meta")),
                       "pickle names torch._utils"),
    "64 bits": (with_(x=torch.ones(3, dtype=torch.float64)), "pickle names torch DoubleStorage"),
    "a bytearray": (archive(b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\2\x85R."),
                    "pickle names __builtin__ bytearray"),
    "a program": (archive(b"\x80\x02cposix\nsystem\nX\x05\0\0\0touch\x85R."),
                  "pickle names posix"),
    "compressed": (archive(bytes(10_000_000), zipfile.ZIP_DEFLATED), "it is compressed"),
    "a large pickle": (archive(b"\x80\x02](" + b"]" * 2_000_000 + b"e."), "pickle is too large"),
    "a deep pickle": (archive(b"\x80\x02" + b"]" * 90_000 + b"a" * 89_999 + b"."), "damaged"),
    "no pickle": (archive(b""), "damaged"),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"step": 1})), "damaged"),
    "40 GB of numbers": (archive(tensor_of(10 ** 10)), "damaged"),
    "numbers beyond the end": (archive(tensor_of(17)), "damaged"),
    "fewer than no numbers": (archive(tensor_of(-1)), "damaged"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_checkpoint_that_stands_for_more_than_it_holds(case, run, refused):
    make, message = BOMBS[case]
    (run / "ckpt.pt").unlink()
    make(run / "ckpt.pt")
    refused(SAMPLE, message)


# ---- odd but readable --------------------------------------------------------------------------

def evaluation(**changes):
    line = {"step": 0, "tokens": 0, "flops": 0, "seconds": 0, "val_loss": 5.0} | changes
    return {key: value for key, value in line.items() if value != "missing"}


def probed(layers, value=1.0):
    return evaluation(val_loss="missing", effective_rank={"hidden": [value] * layers})


# case -> lines of a log, before those of a run; probe.py compares it with another run
LOGS = {
    "nothing odd": [],
    "one evaluation": [evaluation(step=9)],
    "the same again": [evaluation(), evaluation(), evaluation(step=1)],
    "no FLOPs": [evaluation(step=step, val_loss=9 - step) for step in range(5)],
    "no costs": [evaluation(tokens="missing", flops=None)],
    "steps of 30 digits": [evaluation(step=10 ** 29)],
    "steps backwards": [evaluation(step=9), evaluation(step=5)],
    "huge costs": [evaluation(tokens=10 ** 29, flops=1e29, seconds=-1e29)],
    "huge loss": [evaluation(val_loss=1e30), evaluation(val_loss=-1e30)],
    "texts": [evaluation(val_loss="5"), evaluation(step="5"), evaluation(kind=[])],
    "lists": [evaluation(val_loss=[5]), evaluation(loss={}), [evaluation()], None, 5],
    "nulls": [evaluation(kind="meta", loss=1, query_accuracy=None, chance=None)],
    "a kind of its own": [evaluation(kind="x", loss=3), evaluation(kind="evaluation")],
    "many layers": [probed(5000), probed(5000)],
    "layers of layers": [probed(2, [[1, 2], [3, 4]]), probed(2, {}), probed(2, "x")],
    "names": [evaluation(**{"a\nb$": 1, "\ud800": 2})],
}


def write_run(name, lines):
    """A run of these log lines in the working folder, whose name a picture must not take for a
    formula."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SETTINGS | {"name": rf"$\frac{name}$"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


USUAL = [evaluation(step=step, tokens=step, flops=step, seconds=step, val_loss=5 - step)
         for step in (0, 1, 3)]


@pytest.mark.parametrize("case", LOGS)
def test_odd_values_in_a_log_are_drawn_or_left_out(case, desk):
    """Alone, as all that a run has logged."""
    logs = []
    for folder in (write_run("odd", LOGS[case]), write_run("usual", USUAL)):
        try:
            settings, lines, _ = read_run(folder)
        except UserError as error:  # no line of it can be used
            assert "has no evaluation in its log yet" in str(error)
            return
        logs.append((settings, lines))
        phases(lines)
        draw_dynamics(new_figure(), lines, settings)
        status(lines)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in logs:
            groups = {"odd": logs[:1], "other": [other]}
            result = compare(groups)
            comparison_table(result)
            draw_comparison(groups, result)


def test_all_odd_values_in_one_log_and_the_usual_lines(desk, monkeypatch, capsys):
    write_run("odd", [line for lines in LOGS.values() for line in lines] + USUAL)
    write_run("usual", USUAL)
    monkeypatch.setattr(sys, "argv", ["probe.py", "runs/odd", "runs/usual"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.main()
    assert "unreadable lines left out" in capsys.readouterr().err


# value of one key of config.json -> whether a picture is drawn all the same
@pytest.mark.parametrize("key, value, message", [
    ("name", None, None), ("name", "x" * 500_000, None), ("name", "$a\nb\ud800", None),
    ("name", 5, "'name'"), ("name", [], "'name'"), ("size", "x" * 500_000, None),
    ("size", None, "'size'"), ("vocab_size", 0, "invalid"), ("vocab_size", True, "invalid"),
    ("vocab_size", 2 ** 62, "invalid"), ("bigram", float("inf"), None), ("bigram", "x", None),
    ("bigram", float("nan"), None), ("steps", None, None), ("steps", -1, "invalid"),
    ("steps", 1.5, "'steps'"), ("steps", 10 ** 25, "invalid"), ("steps", 10 ** 40, "not valid"),
    ("seed", 2 ** 63, "invalid"), ("seed", "1", "'seed'"), ("hybrid_ratio", None, None),
    ("hybrid_ratio", float("nan"), None), ("hybrid_ratio", "0.5", "'hybrid_ratio'"),
    ("meta_start", None, None), ("lr", {"a": [1]}, None), ("corpus_sha256", 5, "'corpus_sha256'"),
])
def test_odd_values_in_the_settings(key, value, message, desk, monkeypatch, capsys):
    folder = desk / "runs" / "odd"
    folder.mkdir()
    settings = SETTINGS | {"meta": True, key: value}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text(json.dumps(evaluation()))
    if message:
        refuse(probe, ["runs/odd"], message, desk, monkeypatch, capsys)
        return
    monkeypatch.setattr(sys, "argv", ["probe.py", "runs/odd"])
    with warnings.catch_warnings(), little_memory():
        warnings.simplefilter("error")
        probe.main()
    assert len(capsys.readouterr().out) < 1000


# ---- a grid of taggers -------------------------------------------------------------------------

CELL = {"run": "a", "train": "toy", "mode": "head", "seed": 0, "test": "toy", "settings": {},
        "f1": 0.5, "sentences": 2, "counts": [[1, 0, 0], [0, 1, 1]], "auc": 1.0, "slope": -0.1,
        "t90": None}
# case -> the content of ner.json
CELLS = {
    "an object": {}, "a number": 5, "a list of lists": [[]], "a list of objects": [{}],
    "cut short": "[{", "nothing": "", "too deep": "[" * 200_000,
    **{f"{key} is {value!r}": [CELL | {key: value}] for key, value in [
        ("run", None), ("run", ["a"]), ("seed", "0"), ("settings", []), ("f1", "0.5"),
        ("f1", float("nan")), ("f1", float("inf")), ("f1", -1), ("sentences", 3),
        ("sentences", 10 ** 25), ("counts", []), ("counts", [[1, 0], [0, 1]]),
        ("counts", [["1", "0", "0"], ["0", "1", "1"]]), ("counts", [[1, 0, 0], [0, 1]]),
        ("counts", [[1, 0, -1]] * 2), ("counts", [[1, 0, 1e308]] * 2), ("counts", [[[]] * 3] * 2),
        ("auc", None), ("slope", {}), ("t90", "9")]},
}


@pytest.mark.parametrize("case", CELLS)
def test_results_that_are_none_are_neither_used_nor_overwritten(case, desk, monkeypatch, capsys):
    content = CELLS[case]
    text = content if isinstance(content, str) else json.dumps(content)
    put(desk / "ner" / "ner.json", text.encode())
    refuse(ner, ["hollow", "--train", "toy", "--test", "toy", "--out", "ner"],
           "ner.json is not (valid JSON|a list of result cells)", desk, monkeypatch, capsys)


def test_a_cell_as_it_should_be_is_read(desk):
    put(desk / "ner" / "ner.json", json.dumps([CELL]).encode())
    assert list(read_cells(desk / "ner").values()) == [CELL]


# ---- prepared text -----------------------------------------------------------------------------

# case -> what becomes of a prepared folder. Every part of it is what info.json says, or none is
# used.
PREPARED = {
    "one bit of the text": lambda folder: flip(folder / "train.bin"),
    "one bit of the validation text": lambda folder: flip(folder / "val.bin"),
    "one bit of the tokenizer": lambda folder: flip(folder / "tokenizer.tiktoken"),
    "half an id": lambda folder: put(folder / "train.bin", b"abc"),
    "no text": lambda folder: put(folder / "train.bin", b""),
    "no tokenizer": lambda folder: put(folder / "tokenizer.tiktoken", b""),
    "half a tokenizer": lambda folder: os.truncate(folder / "tokenizer.tiktoken", 3000),
    "a pipe": lambda folder: (folder / "val.bin").unlink() or os.mkfifo(folder / "val.bin"),
    "another source": lambda folder: change_info(folder, source=5),
    "other counts": lambda folder: change_info(folder, tokens=[10 ** 9, 1]),
    "counts in letters": lambda folder: change_info(folder, tokens="many"),
    "another sum": lambda folder: change_info(folder, sha256="x"),
    "sums in a list": lambda folder: change_info(folder, files=[]),
    "sums of nothing": lambda folder: change_info(folder, files={"train.bin": 5}),
    "too deep": lambda folder: put(folder / "info.json", DEEP),
    "ids that the tokenizer lacks, with the right sum": lambda folder: replace_ids(folder),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    put(path, content)


def change_info(folder, **changes):
    info = json.loads((folder / "info.json").read_text())
    put(folder / "info.json", json.dumps(info | changes).encode())


def replace_ids(folder):
    path = folder / "train.bin"
    ids = np.fromfile(path, dtype=np.uint16)
    ids[100] = 60_000
    put(path, ids.tobytes())
    files = json.loads((folder / "info.json").read_text())["files"]
    change_info(folder, files=files | {"train.bin": checked(path)})


@pytest.mark.parametrize("case", PREPARED)
def test_prepared_text_that_has_changed(case, corpus, desk, monkeypatch, capsys):
    folder = shutil.copytree(corpus.folder, desk / "prepared")
    PREPARED[case](folder)
    refuse(data, ["prepared", "--show", "--quiet"], "prepared|info.json", desk, monkeypatch, capsys)


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
