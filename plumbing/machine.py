"""What the machine offers: devices, precision, compilation, memory."""
import importlib.util
import platform
import sys

import torch

from plumbing.commands import UserError

try:
    import resource
except ImportError:  # Windows has none
    resource = None


def pick_device(name=None):
    """torch.device: the named one, or the best that is here (cuda, then mps, then cpu). Raises
    UserError."""
    if torch.cuda.is_available():
        best = "cuda"
    elif torch.backends.mps.is_available():
        best = "mps"
    else:
        best = "cpu"
    try:
        device = torch.device(name or best)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("not cuda, mps or cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise UserError(f"the device {name} cannot be used ({reason}): "
                        f"try --device {best}") from None
    return device


def precision(device):
    """A context manager: autocast to bf16 where the hardware computes in it, else float32.

    That is CUDA from Ampere on, and CPUs with AVX512-BF16 or AMX, whose matrix products are up to
    four times as fast in bf16. Other CPUs only emulate it, slowly."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
    else:
        has_bf16 = False
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16)


def compiled(backbone):
    """The backbone, compiled if it is on a GPU and Triton is here.

    Each shape is compiled once. Training has few shapes and needs first derivatives only.
    Evaluation and sampling, which have many shapes, use the backbone itself."""
    if backbone.cos.device.type == "cuda" and importlib.util.find_spec("triton"):
        return torch.compile(backbone, dynamic=False)
    return backbone


def to_device(tensor, device):
    """The tensor on device. A copy to a GPU starts from pinned memory, so that the host does not
    wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def device_in_words(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory(device):
    """The most memory that this process has used, in words; "" where that is not known."""
    if device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(device) / 2 ** 30
        return f"peak {gib:.1f} GiB on the device"
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in what the system reports
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30
    return f"peak memory {gib:.1f} GiB"
