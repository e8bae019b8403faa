"""Nothing is lost: interrupts, two at once, several processes, full disks, and updates that are not
finite. Kills are in test_every_operation.py."""
import json
import os
import resource
import signal
import socket
import time

import pytest
import torch

import data
import ner
import train
from plumbing import prepare
from plumbing.checkpoints import load_checkpoint
from plumbing.files import locked, new_folder
from plumbing.runs import Diverged

# The run that is interrupted and compared with an uninterrupted one.
FLAGS = ("--meta", "--steps", 16, "--eval-every", 8, "--probe-every", 99)
# Figures of the clock, which no two runs share.
TIMES = ("seconds", "tokens_per_second")


def read_log(folder):
    """The lines of a run's log, each of which must be whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates_in(lines):
    return [line for line in lines if "kind" in line]


# ---- equal to the bit --------------------------------------------------------------------------

def same_state(a, b):
    """Whether two nested dicts or lists of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b))
    return a == b


def without_times(lines):
    kept = []
    for line in lines:
        kept.append({key: value for key, value in line.items() if key not in TIMES})
    return kept


def assert_same_run(one, other):
    """Equal to the bit: weights, optimizer state, counts, and all that was logged but the
    time."""
    states = []
    for folder in (one, other):
        state = torch.load(folder / "ckpt.pt", weights_only=True)
        del state["sha256"], state["spent"]["seconds"]
        states.append(state)
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert same_state(states[0][key], states[1][key]), key
    assert without_times(read_log(one)) == without_times(read_log(other))


# ---- kills and interrupts ----------------------------------------------------------------------

def wait_for_updates(folder, job):
    """Wait until a job has logged an update, or is over."""
    log = folder / "metrics.jsonl"
    while job.process.is_alive():
        if log.exists() and '"kind"' in log.read_text():
            return
        time.sleep(0.02)


def wait_for_growth(path, size, job):
    """Wait until a file is larger than size, or the job is over."""
    while job.process.is_alive() and path.stat().st_size <= size:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(start_in, tmp_path_factory):
    """The folder of an uninterrupted run of FLAGS."""
    folder = tmp_path_factory.mktemp("whole")
    done = start_in(folder, "train.py", *FLAGS).finish()
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "11m-meta"


def test_interrupted_and_resumed_equals_uninterrupted(whole, start, script, tmp_path):
    """SIGINT in the middle, a torn log, then --resume."""
    folder = tmp_path / "runs" / "halves"
    job = start("train.py", *FLAGS, "--name", "halves")
    wait_for_updates(folder, job)
    os.kill(job.process.pid, signal.SIGINT)
    done = job.finish()
    assert done.returncode == 130
    assert "--resume" in done.stderr
    assert 0 < torch.load(folder / "ckpt.pt", weights_only=True)["step"] < 16
    # Without --resume it is not continued.
    assert script("train.py", *FLAGS, "--name", "halves").returncode == 2
    # A crash may tear the last line of the log.
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 23, "kind": "lm", "loss": 1.0, "tok')
    done = script("train.py", *FLAGS, "--name", "halves", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, folder)


def test_interrupted_preparation_leaves_nothing(text_file, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(text_file, vocab_size=300, cache=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []


# ---- two at once -------------------------------------------------------------------------------

def test_a_second_live_run_is_refused_and_a_dead_one_is_not_in_the_way(start, script, tmp_path):
    folder = tmp_path / "runs" / "mine"
    flags = ("--steps", 5000, "--name", "mine")
    job = start("train.py", *flags)
    wait_for_updates(folder, job)
    second = script("train.py", *flags, "--resume")
    assert second.returncode == 2
    assert "another process is training" in second.stderr
    assert second.stderr.count("\n") == 1
    job.process.kill()
    job.finish()
    log = folder / "metrics.jsonl"
    size = log.stat().st_size
    resumed = start("train.py", *flags, "--resume")
    wait_for_growth(log, size, resumed)
    os.kill(resumed.process.pid, signal.SIGTERM)
    assert resumed.finish().returncode == 143


def refused(chapter, flags, monkeypatch, capsys):
    """Whether a chapter's main is refused because another process writes there."""
    monkeypatch.setattr("sys.argv", [f"{chapter.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        chapter.main()
    error = capsys.readouterr().err
    return stopped.value.code == 2 and "another process is writing to" in error


def test_two_cannot_write_the_same_results(tmp_path, text_file, monkeypatch, capsys):
    """ner.py and data.py, while another process has the lock of their --out."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"size": "11m", "vocab_size": 300}')
    with locked(tmp_path / "ner", ""):
        assert refused(ner, [run, "--out", tmp_path / "ner"], monkeypatch, capsys)
    flags = [text_file, "--out", tmp_path / "ready", "--vocab-size", 300, "--quiet"]
    with new_folder(tmp_path / "ready") as folder:
        (folder / "mine").write_text("whole")
        assert refused(data, flags, monkeypatch, capsys)
    assert [path.name for path in (tmp_path / "ready").iterdir()] == ["mine"]


def test_two_first_runs_share_the_cache(start, tmp_path, text_file):
    flags = ("--data", text_file, "--cache", tmp_path / "new", "--vocab-size", 1000, "--steps", 1,
             "--batch-size", 2, "--seq-len", 16)
    names = ("one", "two")
    jobs = [start("train.py", *flags, "--name", name, small=False) for name in names]
    for job in jobs:
        done = job.finish()
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "new").iterdir())) == 1  # one corpus, nothing half done beside it
    losses = {}
    for name in names:
        lines = read_log(tmp_path / "runs" / name)
        losses[name] = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses["one"] == losses["two"]
    assert len(losses["one"]) == 2


# ---- several processes -------------------------------------------------------------------------

def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_processes_train_as_one_does(start, script, tmp_path):
    """By gloo, and each can go on from the other's checkpoint. Sums are in another order: losses
    agree to 1e-3 nats over 6 updates in bf16."""
    flags = ("--meta", "--meta-start", 0, "--steps", 6, "--eval-every", 6, "--probe-every", 99,
             "--grad-accum", 2)
    assert script("train.py", *flags, "--name", "one").returncode == 0
    port = str(free_port())
    jobs = []
    for rank in ("0", "1"):
        jobs.append(start("train.py", *flags, "--name", "two", RANK=rank, LOCAL_RANK=rank,
                          WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    for done in [job.finish() for job in jobs]:
        assert done.returncode == 0, done.stderr
    one, two = read_log(tmp_path / "runs" / "one"), read_log(tmp_path / "runs" / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    assert {line.get("kind") for line in one} == {"lm", "meta", None}
    assert any(line.get("query_accuracy", 0) > 0 for line in one)
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"]
        assert a["flops"] == b["flops"]
        for key in {"loss", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-3), (a["step"], key)
    # One process goes on with what two have begun.
    more = script("train.py", *flags, "--name", "two", "--steps", 7, "--resume")
    assert more.returncode == 0, more.stderr
    assert read_log(tmp_path / "runs" / "two")[-1]["step"] == 7


# ---- updates that are not finite ---------------------------------------------------------------

def poison(monkeypatch, bad):
    """Multiply the loss of the updates whose number is in `bad` by infinity. Returns a list that
    will hold the weights before each update."""
    weights = []
    original = train.Decoder.loss

    def loss(self, *batch):
        right = original(self, *batch)
        if not torch.is_grad_enabled():
            return right
        number = len(weights)
        weights.append(self.lm_head.weight.detach().clone())
        return right * (float("inf") if number in bad else 1.0)

    monkeypatch.setattr(train.Decoder, "loss", loss)
    return weights


def assert_finite_model(state):
    for tensor in state["model"].values():
        assert tensor.isfinite().all()


def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(
        monkeypatch, tmp_path, train_here):
    folder = tmp_path / "runs" / "bad"
    weights = poison(monkeypatch, {2, 3, 6})
    assert train_here("--steps", 9, "--eval-every", 50, "--probe-every", 50, "--name", "bad") == 0
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert changed == [True, True, False, False, True, True, False, True]
    updates = updates_in(read_log(folder))
    skipped = [line.get("skipped") for line in updates]
    assert skipped == [None, None, 1, 2, None, None, 3, None, None]
    assert updates[2]["loss"] is None
    text = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    state = load_checkpoint(folder)
    assert state["spent"]["skipped"] == 3
    assert_finite_model(state)
    for moments in state["optimizer"]["state"].values():
        assert moments["step"] == 6
        assert moments["exp_avg"].isfinite().all()


def test_ten_in_a_row_stop_the_run_and_keep_the_last_checkpoint(
        monkeypatch, tmp_path, train_here):
    folder = tmp_path / "runs" / "bad"
    poison(monkeypatch, range(6, 99))
    with pytest.raises(Diverged, match="--lr"):
        train_here("--steps", 60, "--eval-every", 5, "--probe-every", 99, "--name", "bad")
    state = load_checkpoint(folder)
    assert state["step"] <= 15
    assert_finite_model(state)
    assert read_log(folder)[-1]["step"] <= 25


def test_weights_that_give_no_finite_validation_loss_are_not_saved(
        monkeypatch, tmp_path, train_here):
    folder = tmp_path / "runs" / "bad"
    original, calls = train.evaluate, []

    def evaluate(*args):
        figures = original(*args)
        if calls:  # all but the first evaluation
            figures["val_loss"] = float("nan")
        calls.append(args)
        return figures

    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(Diverged, match="validation loss.*--lr"):
        train_here("--steps", 2, "--name", "bad")
    assert load_checkpoint(folder)["step"] == 0
    assert read_log(folder)[-1]["val_loss"] is None


# ---- a full disk -------------------------------------------------------------------------------

def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path, capsys, train_here):
    """A limit on the size of files stands for the disk: a checkpoint does not fit any more."""
    folder = tmp_path / "runs" / "full"
    flags = ("--eval-every", 3, "--probe-every", 99, "--name", "full")
    assert train_here(*flags, "--steps", 3) == 0
    checkpoint = (folder / "ckpt.pt").read_bytes()
    log = (folder / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            train_here(*flags, "--steps", 6, "--resume", main=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert stopped.value.code == 1, error
    assert error.count("\n") == 1
    assert "file too large" in error.lower()
    assert "--resume" in error
    assert (folder / "ckpt.pt").read_bytes() == checkpoint
    assert (folder / "metrics.jsonl").read_bytes().startswith(log)
    assert not list(folder.glob("*.tmp"))
    assert load_checkpoint(folder)["step"] == 3
