"""Several processes; that they train as one does is in tests/robustness/test_kills.py."""
import pytest

from plumbing import processes
from plumbing.commands import UserError


def test_processes_that_cannot_meet_are_told_to_use_torchrun(monkeypatch):
    monkeypatch.setattr(processes, "COUNT", 2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="torchrun"):
        processes.start("cpu")
