"""Nothing is lost: kills, full disks, two at once, numbers that are not finite, several processes."""
import json
import os
import random
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import train

FLAGS = ("--meta", "--steps", 24, "--eval-every", 8, "--probe-every", 99)
KILLS = int(os.environ.get("KILLS", 3))


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


def assert_same_run(one, other):
    """Equal to the bit: weights, optimizer state, counts, and all that was logged but the time."""
    states = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (one, other)]
    for state in states:
        del state["sha256"], state["spent"]["seconds"]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert same_state(states[0][key], states[1][key]), key
    kept = lambda line: {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")}
    assert list(map(kept, read(one))) == list(map(kept, read(other)))


def wait_for_updates(folder, job):
    log = folder / "metrics.jsonl"
    while job.process.is_alive() and not (log.exists() and '"kind"' in log.read_text()):
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(start_in, tmp_path_factory):
    """An uninterrupted run of FLAGS, and how long it took in seconds."""
    folder, started = tmp_path_factory.mktemp("whole"), time.perf_counter()
    done = start_in(folder, "train.py", *FLAGS).finish()
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "11m-meta", time.perf_counter() - started


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(whole, start, tmp_path):
    """kill -9, again and again (KILLS=20 in the environment makes it twenty), then --resume."""
    folder, seconds = whole
    rng, other, killed = random.Random(KILLS), tmp_path / "runs" / "killed", 0
    for attempt in range(10 * KILLS):
        job = start("train.py", *FLAGS, "--name", "killed", "--resume")
        if killed < KILLS:
            job.process.join(rng.uniform(0.05, 0.6) * seconds)
            job.process.kill()
        done = job.finish()
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        killed += done.returncode != 0
        if done.returncode == 0 and killed < KILLS:  # it was done before its last kill: once more from the start
            assert_same_run(folder, other)
            other.rename(tmp_path / "runs" / f"done-{attempt}")
        elif done.returncode == 0:
            break
    assert killed == KILLS
    assert_same_run(folder, other)
    assert not list(other.glob("ckpt*.tmp"))


def test_interrupted_and_resumed_equals_uninterrupted(whole, start, script, tmp_path):
    """SIGINT in the middle, a torn log, then --resume."""
    halves = tmp_path / "runs" / "halves"
    job = start("train.py", *FLAGS, "--name", "halves")
    wait_for_updates(halves, job)
    os.kill(job.process.pid, signal.SIGINT)
    done = job.finish()
    assert done.returncode == 130 and "--resume" in done.stderr
    assert 0 < torch.load(halves / "ckpt.pt", weights_only=True)["step"] < 24
    assert script("train.py", *FLAGS, "--name", "halves").returncode == 2  # it asks for --resume
    with open(halves / "metrics.jsonl", "a") as file:
        file.write('{"step": 23, "kind": "lm", "loss": 1.0, "tok')  # and a crash may tear the last line
    done = script("train.py", *FLAGS, "--name", "halves", "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(whole[0], halves)


def test_a_second_live_run_is_refused_and_a_dead_one_is_not_in_the_way(start, script, tmp_path):
    folder = tmp_path / "runs" / "mine"
    job = start("train.py", "--steps", 5000, "--name", "mine")
    wait_for_updates(folder, job)
    second = script("train.py", "--steps", 5000, "--name", "mine", "--resume")
    assert second.returncode == 2 and "another process is training" in second.stderr and second.stderr.count("\n") == 1
    job.process.kill()
    job.finish()
    resumed = start("train.py", "--steps", 5000, "--name", "mine", "--resume")
    size = (folder / "metrics.jsonl").stat().st_size
    while resumed.process.is_alive() and (folder / "metrics.jsonl").stat().st_size <= size:
        time.sleep(0.02)
    os.kill(resumed.process.pid, signal.SIGTERM)
    assert resumed.finish().returncode == 143


def test_two_first_runs_share_the_cache(start, tmp_path, text_file):
    jobs = [start("train.py", "--data", text_file, "--cache", tmp_path / "new", "--vocab-size", 1000, "--steps", 1, "--name", name,
                  "--batch-size", 2, "--seq-len", 16, small=False) for name in ("one", "two")]
    for job in jobs:
        done = job.finish()
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "new").iterdir())) == 1  # one corpus, nothing half done beside it
    losses = [[line["val_loss"] for line in read(tmp_path / "runs" / name) if "val_loss" in line] for name in ("one", "two")]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_two_processes_train_as_one_does(start, script, tmp_path):
    """By gloo, and each the other's checkpoint. Sums in another order: losses agree to 1e-3 nats over 12 updates in bf16."""
    flags = ("--meta", "--meta-start", 0, "--steps", 12, "--eval-every", 12, "--probe-every", 99, "--grad-accum", 2)
    assert script("train.py", *flags, "--name", "one").returncode == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [start("train.py", *flags, "--name", "two", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=str(port)) for rank in range(2)]
    for done in [job.finish() for job in jobs]:
        assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / "runs" / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two] and {line.get("kind") for line in one} == {"lm", "meta", None}
    assert any(line.get("query_accuracy", 0) > 0 for line in one)
    for a, b in zip(one, two):
        assert a["tokens"] == b["tokens"] and a["flops"] == b["flops"]
        for key in {"loss", "val_loss"} & a.keys():
            assert a[key] == pytest.approx(b[key], abs=1e-3), (a["step"], key)
    more = script("train.py", *flags, "--name", "two", "--steps", 13, "--resume")  # by one process
    assert more.returncode == 0 and read(tmp_path / "runs" / "two")[-1]["step"] == 13, more.stderr


def poison(monkeypatch, bad):
    """Multiply the loss of the updates whose number is in `bad` by infinity; returns the weights before each update."""
    weights, original = [], train.Decoder.loss

    def loss(self, *batch):
        if not torch.is_grad_enabled():
            return original(self, *batch)
        weights.append(self.lm_head.weight.detach().clone())
        return original(self, *batch) * (float("inf") if len(weights) - 1 in bad else 1.0)
    monkeypatch.setattr(train.Decoder, "loss", loss)
    return weights


def test_an_update_that_is_not_finite_is_skipped_counted_and_logged(monkeypatch, tmp_path, train_here):
    weights = poison(monkeypatch, {2, 3, 6})
    assert train_here("--steps", 9, "--eval-every", 50, "--probe-every", 50, "--name", "bad") == 0
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert changed == [i not in (2, 3, 6) for i in range(8)]
    text = (tmp_path / "runs" / "bad" / "metrics.jsonl").read_text()
    updates = [line for line in map(json.loads, text.splitlines()) if "kind" in line]
    assert [line.get("skipped") for line in updates] == [None, None, 1, 2, None, None, 3, None, None]
    assert updates[2]["loss"] is None and "NaN" not in text and "Infinity" not in text
    state = checkpoint.load_checkpoint(tmp_path / "runs" / "bad")
    assert state["spent"]["skipped"] == 3 and all(tensor.isfinite().all() for tensor in state["model"].values())
    for moments in state["optimizer"]["state"].values():
        assert moments["step"] == 6 and moments["exp_avg"].isfinite().all()


def test_ten_in_a_row_stop_the_run_and_keep_the_last_checkpoint(monkeypatch, tmp_path, train_here):
    poison(monkeypatch, range(6, 99))
    with pytest.raises(train.Diverged, match="--lr"):
        train_here("--steps", 60, "--eval-every", 5, "--probe-every", 99, "--name", "bad")
    state = checkpoint.load_checkpoint(tmp_path / "runs" / "bad")
    assert state["step"] <= 15 and all(tensor.isfinite().all() for tensor in state["model"].values())
    assert read(tmp_path / "runs" / "bad")[-1]["step"] <= 25


def test_weights_that_give_no_finite_validation_loss_are_not_saved(monkeypatch, tmp_path, train_here):
    original, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *args: original(*args) | (calls.append(args) or {} if not calls else {"val_loss": float("nan")}))
    with pytest.raises(train.Diverged, match="validation loss.*--lr"):
        train_here("--steps", 2, "--name", "bad")
    state = checkpoint.load_checkpoint(tmp_path / "runs" / "bad")
    assert state["step"] == 0 and read(tmp_path / "runs" / "bad")[-1]["val_loss"] is None


def test_settings_of_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"size": "11m", "vocab_size": 4096}')
    assert checkpoint.read_settings(tmp_path) == {"size": "11m", "vocab_size": 4096, "name": tmp_path.name, "steps": 0, "seed": 0}
    (tmp_path / "config.json").write_text('{"size": "11m", "vocab_size": 4096, "lr": 0.5, "steps": 7, "name": "mine", "seed": 2}')
    assert checkpoint.read_settings(tmp_path) == {"size": "11m", "vocab_size": 4096, "lr": 0.5, "name": "mine", "steps": 7, "seed": 2}


def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path, capsys, train_here):
    """A limit on the size of files stands for the disk: a checkpoint does not fit any more."""
    folder = tmp_path / "runs" / "full"
    flags = ("--eval-every", 3, "--probe-every", 99, "--name", "full")
    assert train_here(*flags, "--steps", 3) == 0
    before = {name: (folder / name).read_bytes() for name in ("ckpt.pt", "metrics.jsonl")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stopped:
            train_here(*flags, "--steps", 6, "--resume", main=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.count("\n") == 1 and "file too large" in error.lower() and "--resume" in error
    assert (folder / "ckpt.pt").read_bytes() == before["ckpt.pt"] and (folder / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])
    assert not list(folder.glob("*.tmp")) and checkpoint.load_checkpoint(folder)["step"] == 3


def test_checkpoints_survive_damage(tmp_path, capsys):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"step": step, "model": {"w": torch.full((1000,), float(step))}})
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 2
    path = tmp_path / "ckpt.pt"
    whole = path.read_bytes()
    rng = random.Random(0)
    flips = [whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:] for at in rng.sample(range(len(whole)), 30)]
    for damaged in [whole[:len(whole) // 2], b"", whole[:100], *flips]:
        path.write_bytes(damaged)
        state = checkpoint.load_checkpoint(tmp_path)
        message = capsys.readouterr().err
        if state["step"] == 2:  # the flip hit a byte that says nothing
            assert torch.equal(state["model"]["w"], torch.full((1000,), 2.0)) and not message
        else:
            assert torch.equal(state["model"]["w"], torch.ones(1000)) and "using ckpt-previous.pt" in message
    path.unlink()
    assert checkpoint.load_checkpoint(tmp_path)["step"] == 1
    (tmp_path / "ckpt-previous.pt").unlink()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        checkpoint.load_checkpoint(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace", "unlink"])
def test_saving_may_fail_at_each_call_to_the_system(call, tmp_path, monkeypatch):
    """Whichever call to the system fails, and however often it went well before, a whole checkpoint can be loaded."""
    for good in range(4):
        with monkeypatch.context() as patched:
            folder = tmp_path / f"{call}{good}"
            folder.mkdir()
            checkpoint.save_checkpoint(folder, {"step": 1, "w": torch.ones(10)})
            checkpoint.save_checkpoint(folder, {"step": 2, "w": torch.ones(10)})
            calls, owner = [], os if call == "fsync" else Path
            original = getattr(owner, call)

            def failing(*args, **kwargs):
                calls.append(args)
                if len(calls) > good:
                    raise OSError(28, "No space left on device")
                return original(*args, **kwargs)
            patched.setattr(owner, call, failing)
            try:
                checkpoint.save_checkpoint(folder, {"step": 3, "w": torch.ones(10)})
            except OSError:
                pass
        assert checkpoint.load_checkpoint(folder)["step"] in (2, 3)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"step": 1, "model": Evil(), "sha256": ""}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_interrupted_preparation_leaves_nothing(text_file, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "write_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(text_file, vocab_size=300, cache=tmp_path, quiet=True)
    assert list(tmp_path.iterdir()) == []
