"""What the machine offers: devices, precision, compilation, memory."""
import copy
import importlib.util
import platform
import sys
import time
import warnings

import torch
import torch.nn as nn

from plumbing.commands import UserError

try:
    import resource
except ImportError:  # Windows lacks it
    resource = None

# On a GPU a backbone is compiled if it is wider than NARROW or if the run has at least LONG_RUN
# updates. Both are estimates, not measured on a GPU: compiling takes some seconds at any width,
# and the default run of the smallest decoder may take less than a minute.
NARROW, LONG_RUN = 96, 5000


def pick_device(name=None):
    """torch.device: the named one, or the best available (cuda, then mps, then cpu). A GPU with a
    number becomes the current one, which `precision` uses. Raises UserError."""
    if name is None:
        check_driver()
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
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:80]
        raise UserError(f"the device {name} cannot be used ({reason}): "
                        f"try --device {best}") from None
    return device


def check_driver():
    """Raise UserError if there is a GPU whose driver is too old for this PyTorch. Otherwise
    PyTorch would use the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's own warning, which the message replaces
        if not torch.backends.cuda.is_built() or torch.cuda.is_available():
            return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        if "too old" in str(error):
            raise UserError(f"the driver of the GPU is too old for PyTorch {torch.__version__}: "
                            "update the driver, install a PyTorch for an older CUDA, or use the "
                            "CPU with --device cpu") from None


def precision(device):
    """A context manager: autocast to bf16 where the hardware supports it, else float32.

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


def worth_compiling(backbone, updates):
    """Whether a run with this many updates compiles its backbone: on a GPU with Triton, unless the
    run is too small to make up for the time."""
    on_gpu = backbone.cos.device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return on_gpu and (len(backbone.norm.weight) > NARROW or updates >= LONG_RUN)


def compiled(backbone, updates, shapes=()):
    """(the backbone for training, seconds): compiled if that is worth it, else unchanged.

    Each layer is compiled by itself. All layers share the code, a twelfth of the backbone's, and
    each shape has its own. shapes are (rows, length, whether a gradient follows) of training's
    batches. They are compiled here, and the seconds say how long that took.
    Training has few shapes and needs only first derivatives. Evaluation and sampling have many
    shapes and use the backbone itself."""
    if not worth_compiling(backbone, updates):
        return backbone, 0.0
    started = time.perf_counter()
    twin = copy.copy(backbone)  # with the same parameters
    twin._modules = dict(backbone._modules)  # a copy, so that the backbone keeps its layers
    twin.layers = nn.ModuleList(torch.compile(layer, dynamic=False) for layer in backbone.layers)
    device = backbone.cos.device
    for rows, length, with_gradient in shapes:
        ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
        with precision(device), torch.set_grad_enabled(with_gradient):
            out = twin(ids)
        if with_gradient:
            out.sum().backward()
    backbone.zero_grad()
    return twin, time.perf_counter() - started


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
    """The most memory that this process has used, in words; "" where that is unknown."""
    if device.type == "cuda":
        gib = torch.cuda.max_memory_allocated(device) / 2 ** 30
        return f"peak {gib:.1f} GiB on the device"
    if resource is None:
        return ""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in the unit that the system reports
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30
    return f"peak memory {gib:.1f} GiB"
