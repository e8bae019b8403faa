"""What can be proved of training on a GPU without one: see pretend_gpu.py for what a trace is."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("the pretended GPU is built for Linux", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a real GPU is here: run train.py on it", allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("there is no g++ to compile the pretended GPU with", allow_module_level=True)

# The phases of an update.
UPDATE = ("update", "next-token loss", "inner loop")
# The attention kernel of each set-up: in meta steps, and everywhere else.
ATTENTION = {
    "bf16": ("flash, bfloat16", "flash, bfloat16"),
    "float32": ("efficient, float32", "efficient, float32"),
    "all, words": ("flash, bfloat16", "flash, bfloat16"),
    # The fused kernels have no second derivative, which this meta step needs.
    "all, second order": ("math, bfloat16", "flash, bfloat16"),
    "second order, two micro-batches": ("flash, bfloat16", "flash, bfloat16"),
}
# Kernels of an inner step of the meta head, forward, backward and update.
MOST_LAUNCHES = 28


@pytest.fixture(scope="module")
def traces():
    """{set-up: what was counted in it}."""
    script = Path(__file__).with_name("pretend_gpu.py")
    done = subprocess.run([sys.executable, "-W", "ignore", script], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def in_update(phases):
    """What was counted in the phases of an update."""
    return {phase: counter for phase, counter in phases.items() if phase in UPDATE}


@pytest.mark.parametrize("setup", ATTENTION)
def test_no_operation_meets_two_devices(setup, traces):
    assert traces[setup]["error"] is None, traces[setup]["error"]
    assert traces[setup]["mixtures"] == {}
    assert set(in_update(traces[setup]["launches"])) == set(UPDATE)


@pytest.mark.parametrize("setup", ATTENTION)
def test_the_host_waits_only_where_the_log_is_flushed(setup, traces):
    waits = traces[setup]["waits"]
    assert in_update(waits) == {}
    # Two figures of the next-token update, four of the meta step.
    assert sum(waits["flush"].values()) == 6


@pytest.mark.parametrize("setup", ATTENTION)
def test_copies_of_an_update_leave_the_host_free(setup, traces):
    copies = traces[setup]["copies"]
    assert in_update(copies) == {}
    assert copies["start"]  # the trace sees those of the weights


@pytest.mark.parametrize("setup", ATTENTION)
def test_attention_takes_the_expected_kernel(setup, traces):
    in_meta_steps, elsewhere = ATTENTION[setup]
    attention = traces[setup]["attention"]
    assert {"update", "next-token loss"} <= set(attention)
    for phase, counter in attention.items():
        expected = in_meta_steps if phase in ("update", "inner loop") else elsewhere
        assert set(counter) == {expected}, phase


@pytest.mark.parametrize("setup, inner_steps", [
    ("bf16", 10), ("float32", 10), ("second order, two micro-batches", 20)])
def test_an_inner_step_launches_few_kernels(setup, inner_steps, traces):
    launches = traces[setup]["launches"]["inner loop"]
    assert sum(launches.values()) <= MOST_LAUNCHES * inner_steps, launches


def test_evaluation_probe_sample_and_taggers_were_traced(traces):
    for setup in ("bf16", "float32"):
        assert {"evaluation", "probe", "sample", "tagging head", "tagging full"} <= set(
            traces[setup]["launches"])
