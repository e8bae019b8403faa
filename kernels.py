"""Attention and the next-token loss, forward and backward, where a step's time and memory are decided.

    from kernels import attend, cross_entropy

Both are what their one-line formulas say (the tests compare them); they are written out because the plain way computes, holds
or moves too much: scores of keys that no query may see, and (tokens x vocabulary) logits.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

KEPT_ATTENTION = 104_000_000  # bytes of attention that a layer on a CPU may keep for its backward pass


def attend(q, k, v, causal):
    """Attention of queries (B, n_head, T, head_dim) over keys and values (B, n_kv_head, T, head_dim)."""
    B, heads, T, _ = q.shape
    small = q.element_size() * B * heads * T * T <= KEPT_ATTENTION
    if causal and small and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float32):
        return TiledAttention.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


class TiledAttention(torch.autograd.Function):
    """Causal attention written out for CPUs: 64 queries at a time, so that their scores may stay in the cache, against the keys
    up to the last of them. In bf16, forward and backward through the backbone took 0.15 s for 64 x 32 tokens, 0.21 for 8 x 256 and
    0.29 for 4 x 512, with scaled_dot_product_attention 0.42, 0.42 and 0.60; in float32 0.27, 0.40 and 0.51 against 0.28,
    0.54 and 0.80 (11m, two cores). The backward pass needs all attention, so `attend` uses this only where that is small."""

    @staticmethod
    def tiles(q, k, v):
        """For each tile its queries' slice, and (B * n_kv_head, T, head_dim) keys and values up to their last."""
        T, keys, values = q.shape[2], k.flatten(0, 1), v.flatten(0, 1)
        for rows in (slice(start, min(start + 64, T)) for start in range(0, T, 64)):
            yield rows, keys[:, :rows.stop], values[:, :rows.stop]

    @staticmethod
    def forward(ctx, q, k, v):
        out, kept, scaled = torch.empty_like(q), [], q * q.shape[-1] ** -0.5
        for rows, keys, values in TiledAttention.tiles(q, k, v):
            queries = scaled[:, :, rows].reshape(len(keys), -1, q.shape[-1])  # those that share a key stand under each other
            scores = queries @ keys.mT                                        # (B * n_kv_head, group * rows, keys)
            n = rows.stop - rows.start
            scores.view(-1, n, rows.stop)[:, :, rows] += torch.full((n, n), -math.inf, dtype=q.dtype).triu(1)
            attention = scores.softmax(dim=-1)
            out[:, :, rows] = (attention @ values).view_as(out[:, :, rows])
            kept += [attention] if any(ctx.needs_input_grad) else []
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted: PyTorch's attention has one under sdpa_kernel(MATH), as in meta.py
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(out, (q, k, v), grad, create_graph=True)
        scale = q.shape[-1] ** -0.5
        grad_q, scaled = torch.empty_like(q), q * scale
        grad_k, grad_v = (torch.zeros_like(t.mT, dtype=torch.float32).flatten(0, 1) for t in (k, v))
        for (rows, keys, values), attention in zip(TiledAttention.tiles(q, k, v), kept):
            queries, grad_out = (t[:, :, rows].reshape(len(keys), -1, q.shape[-1]) for t in (scaled, grad))
            # private, but alone in computing the softmax's derivative in one pass
            grad_scores = torch._softmax_backward_data(grad_out @ values.mT, attention, -1, q.dtype)
            grad_q[:, :, rows] = (grad_scores @ keys).view_as(grad_q[:, :, rows])
            grad_k[:, :, :rows.stop] += queries.mT @ grad_scores  # transposed: twice as fast as (keys, head_dim)
            grad_v[:, :, :rows.stop] += grad_out.mT @ attention
        return grad_q.mul_(scale), *(t.mT.to(q.dtype).view_as(k) for t in (grad_k, grad_v))


CPU_BLOCK = 52_000_000  # bytes: 512 rows of 50304 scores in bf16


@functools.lru_cache(maxsize=1)
def scratch(numel, dtype):
    """Memory for a block of scores, the same at every call and so not to be kept: glibc takes as much fresh from the kernel each
    time, at 20 ms in page faults. Smaller blocks, which it keeps, cost 5 % of a step (258 rows of 50304 instead of 512)."""
    return torch.empty(numel, dtype=dtype, device="cpu")


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden (N, D) @ weight.T (V, D) against targets (N,), a block of rows at a time.

    The gradients are formed in the forward pass, while a block's logits are at hand, so that (N, V) is never
    held and never computed twice (the idea of Liger Kernel and Cut Cross-Entropy, arXiv 2411.09009). With a
    gradient, a token's probability is rounded to bf16 and at least 1e-38, so that its loss is at most 87.5 nats."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_grad):
        n, device = hidden.shape[0], hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight_low = weight.to(dtype)
        most = max(1, (CPU_BLOCK if device == "cpu" else 2 ** 28) // (weight_low.element_size() * len(weight)))  # rows of a block
        block = math.ceil(n / math.ceil(n / most))
        size = block * len(weight)
        scores = (scratch(most * len(weight), dtype)[:size] if device == "cpu" else hidden.new_empty(size, dtype=dtype)).view(block, -1)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight) if with_grad else None
        for start in range(0, n, block):
            rows = slice(start, start + block)
            h, target = hidden[rows].to(dtype), targets[rows]
            logits = torch.mm(h, weight_low.T, out=scores[:len(h)])   # (rows, V)
            if not with_grad:  # a few rows in float32 at a time: all at once took 0.35 s instead of 0.10 (page faults again)
                parts = zip(*(t.split(max(1, block // 16)) for t in (logits, target)))
                total += sum(F.cross_entropy(part.float(), words, reduction="sum") for part, words in parts)
                continue
            probs = torch.softmax(logits, dim=1, out=logits)
            at = torch.arange(len(target), device=target.device), target
            total -= probs[at].float().clamp_min(1e-38).log().sum()
            probs[at] -= 1                                            # d loss / d logits = softmax - one-hot
            grad_hidden[rows] = probs @ weight_low
            grad_weight += probs.T @ h
        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n = n
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * (grad / ctx.n), grad_weight * (grad / ctx.n), None, None


def cross_entropy(hidden, weight, targets):
    """Mean of -log softmax(hidden @ weight.T)[targets] in nats: hidden (N, D), weight (V, D), targets (N,) -> scalar."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())
