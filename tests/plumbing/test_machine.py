"""Devices, precision and compilation, also for hardware that is not here."""
from types import SimpleNamespace

import pytest
import torch

from plumbing import machine
from plumbing.commands import UserError


def test_compiles_where_a_gpu_and_triton_are(monkeypatch, tiny):
    asked, here = [], ["triton"]

    def compile_module(module, **flags):
        asked.append((module, flags))
        return "compiled"

    def find_spec(name):
        return name if name in here else None

    monkeypatch.setattr(torch, "compile", compile_module)
    monkeypatch.setattr(machine.importlib.util, "find_spec", find_spec)
    assert machine.compiled(tiny.model) is tiny.model
    assert not asked
    on_gpu = SimpleNamespace(cos=SimpleNamespace(device=torch.device("cuda", 1)))
    assert machine.compiled(on_gpu) == "compiled"
    assert asked == [(on_gpu, {"dynamic": False})]
    here.clear()
    assert machine.compiled(on_gpu) is on_gpu


def test_the_named_device_is_taken_and_an_unusable_one_refused():
    assert machine.pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(UserError, match=f"{name} cannot be used .*: try --device "):
            machine.pick_device(name)


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
