"""kernels.py against PyTorch's own functions."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels


@pytest.mark.parametrize("block", [1, 7 * 8 * 11, 26_000_000])
def test_chunked_cross_entropy_equals_pytorch(block, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(29, 5, dtype=torch.float64, generator=generator), torch.randn(11, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(11, (29,), generator=generator)
    results = []
    for loss in (lambda h, w: kernels.cross_entropy(h, w, targets), lambda h, w: F.cross_entropy(h @ w.T, targets)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (value := loss(h, w)).mul(3).backward()
        results.append((value.double(), h.grad, w.grad))
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(kernels.cross_entropy(hidden, weight, targets).double(), results[1][0], atol=1e-6)


@pytest.mark.parametrize("with_grad", [False, True])
def test_loss_of_a_sure_and_wrong_model(with_grad):
    """Exact where it is measured; in training finite, with the gradient that the exact one has."""
    hidden, weight = torch.tensor([[1000.0], [50.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    with torch.set_grad_enabled(with_grad):
        loss = kernels.cross_entropy(hidden, weight, torch.ones(2, dtype=torch.long))
    assert loss.item() == pytest.approx(((38 * math.log(10) if with_grad else 1000) + 50) / 2)
    if with_grad:
        loss.backward()
        assert torch.allclose(hidden.grad, torch.full((2, 1), 0.5))  # 1 of each token


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float32, 2e-6)])
@pytest.mark.parametrize("length", [40, 64, 131])
def test_attention_written_out_equals_the_library_kernel(length, dtype, tolerance, monkeypatch):
    """Values, gradients and the gradients of these against float64: part of a tile, one, and two with a part."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, length, 8) for heads in (12, 4, 4, 12)]
    q, k, v, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    results = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (q, k, v)]
        out = kernels.attend(*leaves, causal=True)
        assert ("Tiled" in type(out.grad_fn).__name__) == (kind == dtype)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "KEPT_ATTENTION", out.element_size() * 3 * 12 * length ** 2 - 1)
            assert "Tiled" not in type(kernels.attend(*leaves, causal=True).grad_fn).__name__
        first = torch.autograd.grad((out * weight.to(kind)).sum(), leaves, retain_graph=True)
        with sdpa_kernel(SDPBackend.MATH):  # as second-order meta steps do
            smooth = torch.autograd.grad((kernels.attend(*leaves, causal=True) * weight.to(kind)).sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(t.double().square().sum() for t in smooth), leaves)
        results.append([out.detach(), *first, *second])
    for low, exact in zip(*results):
        assert low.dtype == dtype and (low - exact).abs().max() < tolerance * exact.abs().max()
