"""Checkpoints under damage, failing system calls and strangers' files."""
import os
import random
from pathlib import Path

import pytest
import torch

from plumbing.checkpoints import NEWEST, PREVIOUS, load_checkpoint, save_checkpoint


def damaged_twins(whole, flips):
    """Copies of a file's bytes: cut short, empty, and with one bit flipped."""
    rng = random.Random(0)
    twins = [whole[:len(whole) // 2], b"", whole[:100]]
    for at in rng.sample(range(len(whole)), flips):
        flipped = whole[at] ^ 1 << rng.randrange(8)
        twins.append(whole[:at] + bytes([flipped]) + whole[at + 1:])
    return twins


def test_checkpoints_survive_damage(tmp_path, capsys):
    for step in (1, 2):
        weights = {"w": torch.full((1000,), float(step))}
        save_checkpoint(tmp_path, {"step": step, "model": weights})
    assert load_checkpoint(tmp_path)["step"] == 2
    path = tmp_path / NEWEST
    for damaged in damaged_twins(path.read_bytes(), flips=30):
        path.write_bytes(damaged)
        state = load_checkpoint(tmp_path)
        message = capsys.readouterr().err
        if state["step"] == 2:  # the flip hit a byte that says nothing
            assert torch.equal(state["model"]["w"], torch.full((1000,), 2.0))
            assert not message
        else:
            assert torch.equal(state["model"]["w"], torch.ones(1000))
            assert "using ckpt-previous.pt" in message
    path.unlink()
    assert load_checkpoint(tmp_path)["step"] == 1
    (tmp_path / PREVIOUS).unlink()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        load_checkpoint(tmp_path)


def fail_after(monkeypatch, owner, name, good):
    """Let a function of the system work `good` times and then say that the disk is full."""
    original = getattr(owner, name)
    calls = []

    def failing(*args, **keywords):
        calls.append(args)
        if len(calls) > good:
            raise OSError(28, "No space left on device")
        return original(*args, **keywords)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("good", range(4))
@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace"), (Path, "unlink")])
def test_saving_may_fail_at_each_call_to_the_system(owner, name, good, tmp_path, monkeypatch):
    """Whichever call to the system fails, and however often it went well before, a whole
    checkpoint can be loaded."""
    for step in (1, 2):
        save_checkpoint(tmp_path, {"step": step, "w": torch.ones(10)})
    with monkeypatch.context() as patched:
        fail_after(patched, owner, name, good)
        try:
            save_checkpoint(tmp_path, {"step": 3, "w": torch.ones(10)})
        except OSError:
            pass
    assert load_checkpoint(tmp_path)["step"] in (2, 3)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"step": 1, "model": Evil(), "sha256": ""}, tmp_path / NEWEST)
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()
