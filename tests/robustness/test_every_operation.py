"""A command is killed at each of its file operations in turn, and run again: nothing is lost.

The operations are those that change the disk: the events that Python's audit hooks report (open to
write, rename, remove, make or remove a folder), and the writes, flushes and syncs of the files that
`plumbing.files` opens, which they do not report. Of many writes to one file the 1st, 8th and 64th
count, since each only makes a temporary file longer.
"""
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import data
import meta
import model
import ner
import plumbing.files
import plumbing.ner_report
import plumbing.pictures
import train
from conftest import SMALL, toy_text
from plumbing import treebanks
from plumbing.checkpoints import DAMAGED, NEWEST
from plumbing.files import LOCK, write_atomically
from test_kills import assert_same_run

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PAST_THE_DOOR = 98  # exit code
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
          "os.chmod"}


class Operations:
    """Counts the file operations of this process under a folder, and kills it at number `last`.
    A file that is opened to write, but not by plumbing.files, ends it, too."""

    def __init__(self, folder, last):
        self.folder, self.last, self.number = str(folder), last, 0
        self.in_the_door = False

    def count(self, name):
        self.number += 1
        if self.number == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self):
        sys.addaudithook(self.audit)
        plumbing.files.open = self.open
        fsync = os.fsync

        def counted_fsync(descriptor):
            self.count("fsync")
            fsync(descriptor)

        os.fsync = counted_fsync

    def audit(self, event, args):
        if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
            concerned = args[:1]
        elif event in EVENTS:
            concerned = args[:2]
        else:
            return
        paths = [os.path.abspath(os.fsdecode(path)) for path in concerned
                 if isinstance(path, (str, bytes, os.PathLike))]
        if any(path.startswith(self.folder) for path in paths):
            if event == "open" and not self.in_the_door:
                print(paths, "was not opened by plumbing.files", file=sys.stderr, flush=True)
                os._exit(PAST_THE_DOOR)
            self.count(event)

    def open(self, *args, **keywords):
        self.in_the_door = True
        file = CountedFile(open(*args, **keywords), self)
        self.in_the_door = False
        return file


class CountedFile:
    """A file whose writes and flushes are counted."""

    def __init__(self, file, operations):
        self.file, self.operations, self.writes = file, operations, 0

    def write(self, content):
        self.writes += 1
        if self.writes in (1, 8, 64):
            self.operations.count("write")
        return self.file.write(content)

    def flush(self):
        self.operations.count("flush")
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def run(folder, chapter, flags):
    """Run a chapter's main in folder. Returns as `end` does."""
    return end(begin(folder, chapter, flags))


def begin(folder, chapter, flags, kill_at=None):
    """Start a chapter's main in folder, in a forked process; returns a handle for `end`."""
    report, report_end = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull if stream == 1 else "errors", os.O_WRONLY | os.O_CREAT),
                        stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = [f"{chapter.__name__}.py", *map(str, flags)]
            operations = Operations(folder, kill_at)
            operations.watch()
            code = 99  # a traceback
            try:
                chapter.main()
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
            os.write(report_end, str(operations.number).encode())
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(report_end)
    return child, report


def end(handle):
    """(exit code, negative if the process was killed, number of its file operations)."""
    child, report = handle
    _, status = os.waitpid(child, 0)
    number = os.read(report, 20)
    os.close(report)
    return os.waitstatus_to_exitcode(status), int(number or 0)


def kill_everywhere(tmp_path, start, chapter, flags, again, check, new_folder=None):
    """Copy the folder `start`, kill the command there at its first operation, then run it to its
    end with the flags `again`, and call check(folder); then at its second operation, and so on.
    Two folders are at work at a time.

    A command that makes a new folder need not run again once that is there. Returns the number of
    operations."""
    for first in itertools.count(1, 2):
        folders, killed = {}, []
        for kill_at in (first, first + 1):
            folders[kill_at] = shutil.copytree(start, tmp_path / f"killed-{kill_at}")
        at_work = {kill_at: begin(folder, chapter, flags, kill_at)
                   for kill_at, folder in folders.items()}
        for kill_at, handle in at_work.items():
            code, _ = end(handle)
            if code == -signal.SIGKILL:
                killed.append(kill_at)
            else:
                assert code == 0, (folders[kill_at] / "errors").read_text()
        at_work = {kill_at: begin(folders[kill_at], chapter, again) for kill_at in killed
                   if not (new_folder and (folders[kill_at] / new_folder).exists())}
        for kill_at, handle in at_work.items():
            code, _ = end(handle)
            assert code == 0, f"killed at {kill_at}: " + (folders[kill_at] / "errors").read_text()
        for kill_at in killed:
            folder = folders[kill_at]
            check(folder)
            left = [path for path in folder.rglob("*") if path.name.endswith(plumbing.files.MARK)]
            assert not left, kill_at
        for folder in folders.values():
            shutil.rmtree(folder)
        if len(killed) < 2:
            return first - 1 + len(killed)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A decoder of one narrow layer, short evaluations, and pictures that are only files."""
    monkeypatch.setattr(model.Config.__init__, "__defaults__",
                        (24, 50304, 1, 12, 4, 2048, 10000.0, 1e-6, None, None, False))
    monkeypatch.setitem(model.SIZES, "11m", 24)
    monkeypatch.setattr(meta, "FEWSHOT_EPISODES", 2)
    monkeypatch.setattr(train, "EVAL_TOKENS", 128)
    monkeypatch.setattr(treebanks, "TOY_SENTENCES", {"train": 40, "dev": 10, "test": 10})
    for module in (plumbing.pictures, plumbing.ner_report):
        monkeypatch.setattr(module, "save_figure",
                            lambda figure, path: write_atomically(path, b"a picture"))


@pytest.fixture
def empty(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def flags(text_file, cache, train_here, tmp_path):
    """The flags of a run of four updates. It is run once in this process, so that what is slow
    the first time has been done when the processes are forked."""
    few = ["--meta", "--meta-start", 0, "--steps", 4, "--eval-every", 4, "--probe-every", 4]
    assert train_here(*few) == 0
    return ["--data", text_file, "--cache", cache, *SMALL, "--quiet", *few]


@pytest.fixture
def finished(tmp_path, empty, flags):
    """A folder with an uninterrupted run, and how many operations that took."""
    code, operations = run(empty, train, flags)
    assert code == 0, (empty / "errors").read_text()
    shutil.copytree(empty, tmp_path / "finished")
    shutil.rmtree(empty)
    empty.mkdir()
    return tmp_path / "finished", operations


def contents(folder):
    """{name: bytes} of the files that a command is asked for."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


# ---- training ----------------------------------------------------------------------------------

RUN = Path("runs") / "11m-meta"


def test_training(tmp_path, empty, flags, finished):
    whole, operations = finished
    recovered = kill_everywhere(tmp_path, empty, train, flags, [*flags, "--resume"],
                                lambda folder: assert_same_run(whole / RUN, folder / RUN))
    assert recovered == operations > 30


def test_going_on_from_the_checkpoint_before_a_damaged_one(tmp_path, flags, finished):
    """Wherever the resumed run is killed, a good checkpoint is left."""
    whole, _ = finished
    start = shutil.copytree(whole, tmp_path / "damaged")
    path = start / RUN / NEWEST
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    flags = [*flags, "--resume"]

    def check(folder):
        assert_same_run(whole / RUN, folder / RUN)
        assert (folder / RUN / DAMAGED).read_bytes() == content

    assert kill_everywhere(tmp_path, start, train, flags, flags, check) > 20


# ---- the other commands that write -------------------------------------------------------------

def test_preparing_a_text(tmp_path, empty):
    (empty / "toy.txt").write_text(toy_text(sentences=1500))
    (empty / "ready.docx.tmp").write_text("mine")
    flags = ["toy.txt", "--out", "ready", "--vocab-size", 300, "--quiet"]
    whole = shutil.copytree(empty, tmp_path / "whole")
    assert run(whole, data, flags)[0] == 0

    def check(folder):
        one, other = contents(whole / "ready"), contents(folder / "ready")
        for prepared in (one, other):
            info = json.loads(prepared.pop("info.json"))
            assert set(info["files"]) == set(prepared)
        assert one == other
        data.load(folder / "ready", vocab_size=300)
        assert (folder / "ready.docx.tmp").read_text() == "mine"
        assert len(list(folder.iterdir())) == 4  # with the errors

    assert kill_everywhere(tmp_path, empty, data, flags, flags, check, "ready") > 10


def test_export(tmp_path, finished):
    start, _ = finished
    flags = [RUN, "--export", "exported"]
    whole = shutil.copytree(start, tmp_path / "whole")
    assert run(whole, model, flags)[0] == 0
    expected = contents(whole / "exported")
    assert len(expected) == 4

    def check(folder):
        assert contents(folder / "exported") == expected

    assert kill_everywhere(tmp_path, start, model, flags, flags, check, "exported") > 10


def test_tagging(tmp_path, finished):
    start, _ = finished
    flags = [RUN, "--train", "toy", "--test", "toy", "--epochs", 1, "--predictions",
             "--quiet"]
    whole = shutil.copytree(start, tmp_path / "whole")
    assert run(whole, ner, flags)[0] == 0
    expected = contents(whole / "ner")
    assert len(expected) == 3  # ner.json, ner.png and a .tsv

    def check(folder):
        assert contents(folder / "ner") == expected

    assert kill_everywhere(tmp_path, start, ner, flags, flags, check) > 10
