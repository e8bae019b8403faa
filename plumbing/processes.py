"""Training one model with several processes, started by torchrun. One process needs none of this.

torchrun tells each process its number in environment variables. Micro-batches are numbered over
all processes, so that any number of processes computes the same update.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from plumbing.commands import Failure, UserError
from plumbing.machine import check_driver, pick_device



def from_environment(name, default, below=2 ** 31):
    """A whole number in an environment variable. Ends the process if it is anything else."""
    text = os.environ.get(name, default)
    if not (text.isdecimal() and len(text) < 11 and int(text) < below):
        print(f"error: the environment variable {name} is {text[:40]!r}, not a number that "
              f"torchrun sets: remove it (unset {name})", file=sys.stderr)
        sys.exit(2)
    return int(text)


COUNT = max(1, from_environment("WORLD_SIZE", "1"))     # of processes, on all machines
RANK = from_environment("RANK", "0", COUNT)             # number of this process
LOCAL_RANK = from_environment("LOCAL_RANK", "0", COUNT)  # its number on this machine


def is_first():
    """Whether this is the process that writes, prints and evaluates."""
    return RANK == 0


def start(device_name):
    """Connect to the other processes. Returns the device of this one. With GPUs, each process takes
    its own. Raises UserError."""
    if COUNT == 1:
        return pick_device(device_name)
    if device_name is None:
        check_driver()
        device_name = "cuda" if torch.cuda.is_available() else "cpu"
    if device_name.startswith("cuda:"):
        raise UserError(f"--device {device_name} is one GPU for {COUNT} processes: use --device "
                        "cuda, and each takes its own")
    if device_name == "cuda":
        device_name = f"cuda:{own_gpu()}"
    device = pick_device(device_name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    except ValueError as error:
        raise UserError(f"cannot connect to the other processes ({error}): start them with "
                        "torchrun") from None
    return device


def own_gpu():
    """The number of the GPU for this process. If a scheduler such as SLURM shows each process only
    one GPU, its number is 0."""
    shown_one = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    return 0 if shown_one else LOCAL_RANK


@contextlib.contextmanager
def left_in_the_end():
    """Disconnect from the other processes when the block ends, however it ends."""
    try:
        yield
    except RuntimeError as error:
        if is_first():
            raise
        # Usually because another process has ended, which prints its own message.
        reason = str(error).partition("\n")[0][:80]
        raise Failure(f"process {RANK} stopped: {reason}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def first_on_machine_goes_first():
    """The first process of each machine runs the block before the others do, so that they find
    its results in the cache."""
    if COUNT > 1 and LOCAL_RANK > 0:
        dist.barrier()
    yield
    if COUNT > 1 and LOCAL_RANK == 0:
        dist.barrier()


def my_share(micro_batches):
    """The numbers of this process's micro-batches, out of 0 to micro_batches - 1."""
    share = micro_batches // COUNT
    return range(RANK * share, (RANK + 1) * share)


def sum_over_processes(parameters, figures):
    """Replace the gradients of parameters, and figures (a dict of scalar tensors), with their sums
    over all processes, in one all-reduce of one flat tensor.

    DistributedDataParallel would not see what functional_call computes."""
    if COUNT == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    values = torch.stack(list(figures.values())).to(gradients[0].device)
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [values])
    dist.all_reduce(flat)
    *parts, values = flat.split([gradient.numel() for gradient in gradients] + [len(values)])
    for gradient, part in zip(gradients, parts):
        gradient.copy_(part.view_as(gradient))
    figures.update(zip(figures, values))


def any_of(flag, device):
    """Whether flag is true in any process. All of them must call this together."""
    if COUNT == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return total.item() > 0


def all_agree(value):
    """Whether value, anything that can be pickled, is the same in all processes."""
    if COUNT == 1:
        return True
    values = [None] * COUNT
    dist.all_gather_object(values, value)
    return all(other == value for other in values)

