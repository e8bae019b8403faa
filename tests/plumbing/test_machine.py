"""Devices, precision and compilation, also for hardware that is not here."""
from types import SimpleNamespace

import pytest
import torch

from plumbing import machine
from plumbing.commands import UserError


# ---- compilation -------------------------------------------------------------------------------

def backbone_on(device, d_model):
    """What worth_compiling asks of a backbone."""
    return SimpleNamespace(cos=SimpleNamespace(device=torch.device(device)),
                           norm=SimpleNamespace(weight=torch.ones(d_model)))


@pytest.mark.parametrize("device, triton, d_model, updates, worth_it", [
    ("cuda:1", True, 384, 1, True), ("cuda:1", True, 96, 5000, True),
    ("cuda:1", True, 96, 2000, False),
    ("cuda:1", False, 384, 9000, False), ("cpu", True, 384, 9000, False)])
def test_compiles_on_a_gpu_unless_decoder_and_run_are_small(
        device, triton, d_model, updates, worth_it, monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: name if triton else None)
    assert machine.worth_compiling(backbone_on(device, d_model), updates) == worth_it


def test_a_backbone_that_is_not_compiled_is_itself(tiny):
    backbone, seconds = machine.compiled(tiny.model, 9000, [(2, 4, True)])
    assert backbone is tiny.model
    assert seconds == 0


# ---- devices -----------------------------------------------------------------------------------

def test_the_named_device_is_taken_and_an_unusable_one_refused():
    assert machine.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(UserError, match=f"{name} cannot be used .*: try --device "):
            machine.pick_device(name)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, of which only the second one has bf16; returns {"current": number}."""
    state = {"current": 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: state.update(current=device.index))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: state["current"] == 1)
    return state


def test_the_precision_is_that_of_the_named_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: enabled)
    assert machine.precision(machine.pick_device("cuda")) is False
    assert machine.precision(machine.pick_device("cuda:1")) is True
    assert two_gpus == {"current": 1}


@pytest.mark.parametrize("said, refused", [
    ("The NVIDIA driver on your system is too old (found version 11040).", True),
    ("Found no NVIDIA driver on your system.", False)])
def test_a_driver_that_is_too_old_is_no_reason_to_train_on_the_cpu(said, refused, monkeypatch):
    def fail():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    if refused:
        with pytest.raises(UserError, match="driver of the GPU is too old .* --device cpu"):
            machine.pick_device()
    else:
        assert machine.pick_device() == torch.device("cpu")
    assert machine.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("capabilities, has_bf16", [
    ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True),
    ({"avx512_bf16": False, "amx_bf16": False}, False), ({}, False)])
def test_a_cpu_computes_in_bf16_only_if_its_hardware_does(capabilities, has_bf16, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with machine.precision(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == has_bf16
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has_bf16 else torch.float32)


def test_the_cpu_in_words(monkeypatch):
    device = torch.device("cpu")
    assert machine.device_in_words(device).startswith("cpu (")
    assert f"{torch.get_num_threads()} threads" in machine.device_in_words(device)
    usage = SimpleNamespace(ru_maxrss=3 * 2 ** 19)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: usage)
    monkeypatch.setattr(machine, "resource", resource)
    monkeypatch.setattr(machine.sys, "platform", "linux")  # it counts in KiB
    assert machine.peak_memory(device) == "peak memory 1.5 GiB"
    monkeypatch.setattr(machine, "resource", None)
    assert machine.peak_memory(device) == ""
