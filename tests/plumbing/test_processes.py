"""Several processes; that they train as one does is in tests/robustness/test_kills.py."""
import pytest

import torch

from plumbing import processes
from plumbing.commands import UserError


def test_processes_that_cannot_meet_are_told_to_use_torchrun(monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        processes.start("cpu")


@pytest.fixture
def third_of_four(monkeypatch):
    """This process is the third of four on its machine; returns start(device, GPUs), which gives
    the name of the device that it would take."""
    monkeypatch.setattr(processes, "COUNT", 4)
    monkeypatch.setattr(processes, "LOCAL_RANK", 2)
    monkeypatch.setattr(processes, "pick_device", torch.device)
    monkeypatch.setattr(processes.dist, "init_process_group", lambda backend, timeout: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def start(device, gpus):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return str(processes.start(device))
    return start


@pytest.mark.parametrize("device", [None, "cuda"])
def test_each_process_takes_its_own_gpu(device, third_of_four, monkeypatch):
    assert third_of_four(device, gpus=4) == "cuda:2"
    # Too few: pick_device refuses the number.
    assert third_of_four(device, gpus=1) == "cuda:2"
    # SLURM shows each process one GPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert third_of_four(device, gpus=1) == "cuda:0"


def test_several_processes_on_the_cpu(third_of_four):
    assert third_of_four(None, gpus=0) == "cpu"
    assert third_of_four("cpu", gpus=4) == "cpu"


def test_one_gpu_for_several_processes_is_refused(third_of_four):
    with pytest.raises(UserError, match="--device cuda:0 is one GPU for 4 processes"):
        third_of_four("cuda:0", gpus=4)


@pytest.mark.parametrize("text", ["abc", "", "-1", "1.5", "²", "9" * 12, "9" * 5000])
def test_a_number_that_torchrun_does_not_set_is_one_line(text, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(SystemExit) as stopped:
        processes.from_environment("WORLD_SIZE", "1")
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1
    assert len(error) < 200
    assert "WORLD_SIZE" in error
