"""A pretended GPU: it runs code that says device="cuda" on a machine that has none.

    python tests/pretend_gpu.py          # trace five set-ups of training on it
    python tests/pretend_gpu.py float32  # or some of them, by name

Tensors "on the GPU" are PyTorch's FakeTensors. They have a shape, a type and a device, and no
values. So a trace shows which operations meet tensors of two devices, where the host would wait
for the device, how copies would travel, which attention kernel would be chosen, and how many
kernels eager mode would launch. It shows no values and no speed, nothing that Triton or cuBLAS
do, and none of CUDA's own checks. What comes back to the CPU is made of ones.

The device must be there before torch looks for one. So nothing else may import this file;
test_gpu.py runs it in a process of its own and reads what it prints.
"""
import collections
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent

# One CUDA device with one stream that is never busy. A PyTorch that was built with CUDA brings a
# guard and hooks of its own, which find no GPU: these take their place.
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device; using c10::Stream; using c10::DeviceIndex;
static const Device GPU(c10::DeviceType::CUDA, 0);
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return GPU; }
  Device getDevice() const override { return GPU; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, GPU); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, GPU); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
extern "C" void set_guard() {
  static Guard guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
}
// Autograd asks these.
struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
namespace at {
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(
    CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, Hooks)
}
"""


def register_device():
    """Compile the device, in two seconds, and load it. Returns a function that sets its guard."""
    assert "torch" not in sys.modules, "the pretended GPU must be there before torch is imported"
    torch_folder = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "gpu.cpp", Path(folder) / "gpu.so"
        source.write_text(SOURCE)
        subprocess.run(["g++", "-std=c++20", "-O0", "-w", "-shared", "-fPIC",
                        f"-I{torch_folder}/include", str(source), "-o", str(library),
                        f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                        f"-Wl,-rpath,{torch_folder}/lib"], check=True)
        return ctypes.CDLL(str(library)).set_guard


set_guard = register_device()
import torch  # noqa: E402
set_guard()
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import conftest  # noqa: E402
import data  # noqa: E402
import meta  # noqa: E402
import model  # noqa: E402
import ner  # noqa: E402
import train  # noqa: E402
from plumbing import runs  # noqa: E402
from plumbing.treebanks import toy_treebank  # noqa: E402

# Operations that launch no kernel: new views, and memory without values.
FREE = {"detach", "alias", "view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute",
        "slice", "select", "split", "split_with_sizes", "unbind", "expand", "unsqueeze", "squeeze",
        "as_strided", "unfold", "diagonal", "lift_fresh", "set_", "resize_", "is_pinned",
        "empty", "empty_like", "new_empty", "empty_strided", "_fused_sdp_choice", "device"}
# Operations whose result has a size that only the device knows.
ASK_FOR_A_SIZE = {"nonzero", "masked_select", "unique", "_unique2", "bincount"}


# ---- the device --------------------------------------------------------------------------------

class PretendGPU(TorchDispatchMode):
    """Within the block there is a GPU, with or without bf16. It counts, in each phase (a string
    that the caller sets) and for each line of this project:

    launches   kernels that eager mode would launch
    waits      times at which the host would wait for the device
    copies     copies to the device that block the host
    mixtures   indices on the CPU of a tensor on the device
    attention  calls of each attention kernel
    """

    def __init__(self, bf16=True):
        super().__init__()
        self.bf16, self.phase = bf16, "start"
        self.counts = {}
        for name in ("launches", "waits", "copies", "mixtures", "attention"):
            self.counts[name] = collections.defaultdict(collections.Counter)

    def count(self, name, what):
        self.counts[name][self.phase][what] += 1

    def __enter__(self):
        self.patches = contextlib.ExitStack()
        self.patch(FakeTensorMode, "avoid_device_init", True)
        # torch.tensor(..., device="cuda") is made on the CPU and then copied, which is counted.
        self.patches.callback(torch._C._set_only_lift_cpu_tensors,
                              torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.pinned = {}  # address -> tensor, kept so that no other gets its address
        for name, answer in (("_lazy_init", None), ("init", None), ("is_available", True),
                             ("device_count", 1), ("is_bf16_supported", self.bf16),
                             ("get_device_name", "a pretended GPU"), ("set_device", None),
                             ("max_memory_allocated", 0), ("synchronize", None)):
            self.patch(torch.cuda, name, mock.Mock(return_value=answer))
        self.patch(torch.Tensor, "pin_memory", lambda tensor: self.pin(tensor))
        # Its own asks the device for one element after another.
        self.patch(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist())
        self.patch(torch.nn.functional, "scaled_dot_product_attention", self.attend)
        return super().__enter__()

    def patch(self, place, name, value):
        self.patches.enter_context(mock.patch.object(place, name, value))

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patches.close()

    def line(self):
        """file:line of the nearest caller in this project, tests left out."""
        frame = sys._getframe(1)
        while frame:
            path = Path(frame.f_code.co_filename)
            if ROOT in path.parents and ROOT / "tests" not in path.parents:
                return f"{path.relative_to(ROOT).as_posix()}:{frame.f_lineno}"
            frame = frame.f_back
        return "backward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        on_device = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        target = torch.device(kwargs.get("device") or "cpu").type
        if not on_device and target == "cpu":
            return func(*args, **kwargs)
        # Values go to the host: ones.
        if name == "_local_scalar_dense":
            self.count("waits", f"{self.line()} .item()")
            return torch.ones((), dtype=args[0].dtype).item()
        if name == "_to_copy" and kwargs.get("device") is not None and target == "cpu":
            self.count("waits", f"{self.line()} .cpu()")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            self.count("waits", f"{self.line()} copy_ to the CPU")
            return args[0].fill_(1)
        self.look_for_trouble(name, args, kwargs, on_device)
        with self.fake:
            result = func(*args, **kwargs)  # an error if tensors of two devices meet
        if name not in FREE:
            self.count("launches", name)
        return result

    def look_for_trouble(self, name, args, kwargs, on_device):
        """Count waits, blocking copies and mixed indices among operations that stay on the
        device or go there."""
        if name in ASK_FOR_A_SIZE:
            self.count("waits", f"{self.line()} {name}")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.count("waits", f"{self.line()} a mask as index")
                if index is not None and not isinstance(index, FakeTensor):
                    self.count("mixtures", f"{self.line()} indices on the CPU")
        if name == "_to_copy" and not on_device:
            address = args[0].data_ptr()
            if not kwargs.get("non_blocking"):
                self.count("copies", f"{self.line()} blocks")
            elif address not in self.pinned:
                self.count("copies", f"{self.line()} from memory that is not pinned")
            elif not args[0].is_contiguous():
                self.count("copies", f"{self.line()} not contiguous: pinned in vain")

    def pin(self, tensor):
        """A copy whose address is remembered as pinned."""
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        copy.copy_(tensor)
        self.pinned[copy.data_ptr()] = copy
        return copy

    def attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
               enable_gqa=False):
        """What PyTorch 2.13 chooses on CUDA without a mask, and a result of that kind."""
        if not isinstance(query, FakeTensor):
            return torch._C._nn.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa)
        low = query.dtype in (torch.bfloat16, torch.float16) and self.bf16
        same_heads = query.shape[1] == key.shape[1]
        if low and torch.backends.cuda.flash_sdp_enabled():
            kind = "flash"
        elif same_heads and torch.backends.cuda.mem_efficient_sdp_enabled():
            kind = "efficient"
        else:
            kind = "math"
        self.count("attention", f"{kind}, {str(query.dtype).removeprefix('torch.')}")
        if kind == "math":
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale,
                enable_gqa=enable_gqa)[0]
        return FusedAttention.apply(query, key, value)


class FusedAttention(torch.autograd.Function):
    """A result and gradients of the right shapes. Like the real ones, it has no second
    derivative."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        B, n_head, T, head_dim = q.shape
        return q.new_empty(B, T, n_head, head_dim).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


# ---- the trace ---------------------------------------------------------------------------------

# name -> whether the GPU has bf16, flags of train.py
SETUPS = {
    "bf16": (True, ["--meta"]),
    "float32": (False, ["--meta"]),  # as on a T4
    "all, words": (True, ["--meta", "--inner", "all", "--head", "words", "--inner-steps", "2"]),
    "all, second order": (True, ["--meta", "--inner", "all", "--second-order",
                                 "--inner-steps", "2"]),
    "second order, two micro-batches": (True, ["--meta", "--second-order", "--grad-accum", "2"]),
}
# Only in these are evaluation, probe, sampling and tagging traced, too. They do not depend on the
# other flags.
WHOLE = ("bf16", "float32")


def in_phase(gpu, phase, function):
    """The function, whose operations are counted in a phase."""
    @functools.wraps(function)
    def counted(*args, **kwargs):
        before, gpu.phase = gpu.phase, phase
        try:
            return function(*args, **kwargs)
        finally:
            gpu.phase = before
    return counted


def follow_phases(gpu):
    """An update lasts from start_clock to the flush that reads its figures. The inner loop and
    the next-token loss of an update are phases of their own."""
    adapt, loss = meta.adapt, model.Decoder.loss
    start_clock, flush = runs.Run.start_clock, runs.Run.flush

    def start_update(run):
        gpu.phase = "update"
        start_clock(run)

    def end_update(run):
        gpu.phase = "flush"
        flush(run)
        gpu.phase = "between updates"

    def outside_updates(function):
        # Its inner loops and losses are no part of an update.
        def called(*args):
            with (mock.patch.object(meta, "adapt", adapt),
                  mock.patch.object(model.Decoder, "loss", loss)):
                return function(*args)
        return called

    gpu.patch(meta, "adapt", in_phase(gpu, "inner loop", adapt))
    gpu.patch(model.Decoder, "loss", in_phase(gpu, "next-token loss", loss))
    gpu.patch(runs.Run, "start_clock", start_update)
    gpu.patch(runs.Run, "flush", end_update)
    gpu.patch(train, "evaluate", in_phase(gpu, "evaluation", outside_updates(train.evaluate)))
    gpu.patch(train, "one_question", in_phase(gpu, "question", outside_updates(train.one_question)))
    gpu.patch(train, "measure", in_phase(gpu, "probe", train.measure))
    gpu.patch(train, "sample_text", in_phase(gpu, "sample", train.sample_text))


def generate_three(decoder, ids, n_tokens, **flags):
    return model.generate(decoder, ids, 3, **flags)


def train_on(gpu, corpus, folder, flags, whole):
    """Two updates of train.py, of which one is a meta step, by a decoder of two layers."""
    gpu.patch(train, "Config", functools.partial(model.Config, n_layer=2))
    gpu.patch(data, "load", lambda *args: corpus)
    gpu.patch(train, "compiled", lambda backbone, *args: (backbone, 0))  # Triton is not traced
    gpu.patch(train, "is_probe_step", lambda step, every, last: whole and step == 2)
    gpu.patch(meta, "FEWSHOT_EPISODES", 1)
    gpu.patch(train, "EVAL_TOKENS", 64)
    gpu.patch(runs, "save_checkpoint", lambda folder, state: None)
    gpu.patch(train, "summary", lambda *args: "")
    gpu.patch(train, "save_dynamics", lambda *args: None)
    gpu.patch(train, "generate", generate_three)
    if not whole:
        gpu.patch(train, "evaluate", lambda *args: {"val_loss": 1.0, "bits_per_byte": 1.0})
        gpu.patch(train, "report", lambda *args: None)
    follow_phases(gpu)
    flags = [*map(str, conftest.SMALL), "--steps", "2", "--meta-start", "0.5", "--hybrid-ratio",
             "1", "--eval-every", "2", "--runs", str(folder), "--quiet", "--device", "cuda",
             *flags]
    args, _ = train.parse(flags)
    with mock.patch("builtins.print"):
        return train.train(args)


def tag_on(gpu, corpus):
    """One epoch of both kinds of tagger."""
    config = model.Config(n_layer=2, vocab_size=2048)
    backbone = model.Decoder(config, torch.Generator().manual_seed(0)).model.to("cuda")
    sentences = ner.encode(toy_treebank("dev")[:20], corpus.encoding)
    for mode in ("head", "full"):
        gpu.phase = f"tagging {mode}"
        ner.tune(backbone, mode, sentences, sentences, epochs=1, lr=1e-3, batch_size=16, seed=0,
                 bar=mock.Mock())


def trace(setup, corpus, folder):
    """What was counted in a set-up, {name: {phase: {what: times}}}, and its error, or null."""
    bf16, flags = SETUPS[setup]
    with PretendGPU(bf16) as gpu:
        error = None
        try:
            code = train_on(gpu, corpus, folder, flags, setup in WHOLE)
            assert code == 0, f"exit code {code}"
            if setup in WHOLE:
                tag_on(gpu, corpus)
        except Exception:
            error = traceback.format_exc()
    return gpu.counts | {"error": error}


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "toy.txt").write_text(conftest.toy_text())
        corpus = data.load(folder / "toy.txt", vocab_size=2048, cache=folder / "cache", quiet=True)
        traces = {}
        for setup in sys.argv[1:] or SETUPS:
            traces[setup] = trace(setup, corpus, folder / setup)
    print(json.dumps(traces, indent=1))


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"
    main()
