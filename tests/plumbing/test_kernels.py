"""The kernels against PyTorch's own functions."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from plumbing import kernels


# ---- the loss ----------------------------------------------------------------------------------

@pytest.mark.parametrize("limit", [1, 7 * 8 * 11, 26_000_000])
def test_chunked_cross_entropy_equals_pytorch(limit, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_LOGITS", limit)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(29, 5, dtype=torch.float64, generator=generator)
    weight = torch.randn(11, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(11, (29,), generator=generator)

    def ours(h, w):
        return kernels.cross_entropy(h, w, targets)

    def theirs(h, w):
        return F.cross_entropy(h @ w.T, targets)

    results = []
    for loss in (ours, theirs):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = loss(h, w)
        value.mul(3).backward()
        results.append((value.double(), h.grad, w.grad))
    for our_tensor, their_tensor in zip(*results):
        assert torch.allclose(our_tensor, their_tensor, atol=1e-6)
    with torch.no_grad():
        without_grad = kernels.cross_entropy(hidden, weight, targets).double()
    assert torch.allclose(without_grad, results[1][0], atol=1e-6)


@pytest.mark.parametrize("with_grad", [False, True])
def test_loss_of_a_sure_and_wrong_model(with_grad):
    """Exact where it is measured; in training finite, with the gradient that the exact one has."""
    hidden = torch.tensor([[1000.0], [50.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    with torch.set_grad_enabled(with_grad):
        loss = kernels.cross_entropy(hidden, weight, torch.ones(2, dtype=torch.long))
    first = 38 * math.log(10) if with_grad else 1000
    assert loss.item() == pytest.approx((first + 50) / 2)
    if with_grad:
        loss.backward()
        assert torch.allclose(hidden.grad, torch.full((2, 1), 0.5))  # 1 of each token


# ---- attention ---------------------------------------------------------------------------------

def test_repeated_key_heads_give_what_shared_ones_give():
    generator = torch.Generator().manual_seed(0)
    q, k, v = [torch.randn(2, heads, 7, 8, generator=generator) for heads in (6, 2, 2)]
    shared = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    repeated = [kernels.key_head_of_each_query_head(tensor, 6) for tensor in (k, v)]
    alone = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
    assert torch.allclose(shared, alone, atol=1e-6)


def is_tiled(out):
    """Whether TiledAttention made this tensor."""
    return "Tiled" in type(out.grad_fn).__name__


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float32, 2e-6)])
@pytest.mark.parametrize("length", [40, 64, 131])
def test_attention_written_out_equals_the_library_kernel(length, dtype, tolerance, monkeypatch):
    """Values, gradients and the gradients of these against float64: part of a tile, one, and two
    with a part."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, length, 8) for heads in (12, 4, 4, 12)]
    q, k, v, weight = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    for kind in (dtype, torch.float64):
        leaves = [tensor.to(kind, copy=True).requires_grad_() for tensor in (q, k, v)]
        out = kernels.attend(*leaves, causal=True)
        assert is_tiled(out) == (kind == dtype)
        with monkeypatch.context() as patch:
            one_too_few = out.element_size() * 3 * 12 * length ** 2 - 1
            patch.setattr(kernels, "KEPT_ATTENTION", one_too_few)
            assert not is_tiled(kernels.attend(*leaves, causal=True))
        total = (out * weight.to(kind)).sum()
        first = torch.autograd.grad(total, leaves, retain_graph=True)
        with sdpa_kernel(SDPBackend.MATH):  # as second-order meta steps do
            total = (kernels.attend(*leaves, causal=True) * weight.to(kind)).sum()
            smooth = torch.autograd.grad(total, leaves, create_graph=True)
            squares = sum(gradient.double().square().sum() for gradient in smooth)
            second = torch.autograd.grad(squares, leaves)
        results.append([out.detach(), *first, *second])
    for low, exact in zip(*results):
        assert low.dtype == dtype
        assert (low - exact).abs().max() < tolerance * exact.abs().max()
