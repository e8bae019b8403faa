"""Attention and the next-token loss, forward and backward, where most time and memory go.

Both compute what their one-line formulas say, and the tests compare the two. They are written out
because the plain way computes, stores or moves too much: the scores of keys that no query may see,
and (tokens x vocabulary) logits.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# The most attention weights, in bytes, that a layer on a CPU may keep for its backward pass.
KEPT_ATTENTION = 104_000_000
# Queries per tile of attention.
TILE = 64
# The most logits of the loss held at a time, in bytes. On a CPU: 512 rows of 50304 in bf16.
CPU_LOGITS, GPU_LOGITS = 52_000_000, 2 ** 28
# In training, the loss of a token is at most -ln of this, 87.5 nats.
SMALLEST_PROBABILITY = 1e-38


# ---- attention ---------------------------------------------------------------------------------

def attend(q, k, v, causal):
    """softmax(q @ k.T / sqrt(head_dim)) @ v, for queries (B, n_head, T, head_dim) and keys and
    values (B, n_kv_head, T, head_dim)."""
    B, n_head, T, _ = q.shape
    fits = q.element_size() * B * n_head * T * T <= KEPT_ATTENTION
    on_cpu = q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float32)
    if causal and fits and on_cpu:
        return TiledAttention.apply(q, k, v)
    if q.device.type == "cuda" and q.dtype == torch.float32:
        # CUDA has no fused float32 kernel in which query heads share key heads. Without a fused
        # kernel, all (T, T) scores would be stored.
        k, v = key_head_of_each_query_head(k, n_head), key_head_of_each_query_head(v, n_head)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def key_head_of_each_query_head(k, n_head):
    """Keys or values (B, n_kv_head, T, head_dim), repeated: (B, n_head, T, head_dim)."""
    return k.repeat_interleave(n_head // k.shape[1], dim=1)


class TiledAttention(torch.autograd.Function):
    """Causal attention for CPUs: 64 queries at a time with the keys up to the last of them.

    The scores of a tile can stay in the cache. In bf16, forward and backward through the 11m
    backbone took 0.15 s for 64 x 32 tokens, 0.21 for 8 x 256 and 0.29 for 4 x 512. With
    scaled_dot_product_attention it took 0.42, 0.42 and 0.60 (two cores). The backward pass needs
    all attention weights, so `attend` uses this only where they are small."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        scaled = q * q.shape[-1] ** -0.5
        keep = any(ctx.needs_input_grad)
        kept = []
        for rows, keys, values in tiles(k, v):
            scores = stacked(scaled, rows, k) @ keys.mT  # (B * n_kv_head, group * n, keys)
            n = rows.stop - rows.start
            future = torch.full((n, n), -math.inf, dtype=q.dtype).triu(1)
            scores.view(-1, n, rows.stop)[:, :, rows] += future
            attention = scores.softmax(dim=-1)
            out[:, :, rows] = (attention @ values).view_as(out[:, :, rows])
            if keep:
                kept.append(attention)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is needed. PyTorch's own attention has one under
            # sdpa_kernel(MATH), which meta.py sets.
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return torch.autograd.grad(out, (q, k, v), grad, create_graph=True)
        scale = q.shape[-1] ** -0.5
        scaled = q * scale
        grad_q = torch.empty_like(q)
        # Transposed, (B * n_kv_head, head_dim, T): twice as fast as (..., T, head_dim).
        grad_k = torch.zeros_like(k.mT, dtype=torch.float32).flatten(0, 1)
        grad_v = torch.zeros_like(v.mT, dtype=torch.float32).flatten(0, 1)
        for (rows, keys, values), attention in zip(tiles(k, v), kept):
            grad_out = stacked(grad, rows, k)
            grad_attention = grad_out @ values.mT
            # A private function, but the only one that differentiates a softmax in one pass.
            grad_scores = torch._softmax_backward_data(grad_attention, attention, -1, q.dtype)
            grad_q[:, :, rows] = (grad_scores @ keys).view_as(grad_q[:, :, rows])
            grad_k[:, :, :rows.stop] += stacked(scaled, rows, k).mT @ grad_scores
            grad_v[:, :, :rows.stop] += grad_out.mT @ attention
        grad_k, grad_v = grad_k.mT.to(q.dtype).view_as(k), grad_v.mT.to(q.dtype).view_as(v)
        return grad_q.mul_(scale), grad_k, grad_v


def tiles(k, v):
    """Yield for each tile of queries its slice, and the keys and values up to its last query, each
    (B * n_kv_head, rows.stop, head_dim)."""
    T, keys, values = k.shape[2], k.flatten(0, 1), v.flatten(0, 1)
    for start in range(0, T, TILE):
        rows = slice(start, min(start + TILE, T))
        yield rows, keys[:, :rows.stop], values[:, :rows.stop]


def stacked(q, rows, k):
    """The rows of q (B, n_head, T, head_dim) as (B * n_kv_head, group * n, head_dim): the queries
    that share a key head are stacked."""
    return q[:, :, rows].reshape(k.shape[0] * k.shape[1], -1, q.shape[-1])


# ---- the loss ----------------------------------------------------------------------------------

def cross_entropy(hidden, weight, targets):
    """Mean of -log softmax(hidden @ weight.T)[targets] in nats, a scalar, for hidden (N, D),
    weight (V, D) and targets (N,)."""
    return ChunkedCrossEntropy.apply(hidden, weight, targets, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy, one block of rows at a time, so that (N, V) logits are never stored.

    If a gradient is needed, the forward pass computes it while a block's logits are in memory, so
    they are never computed twice (the idea of Liger Kernel and of Cut Cross-Entropy, arXiv
    2411.09009). A token's probability is then rounded to bf16 under autocast, and it is at least
    SMALLEST_PROBABILITY. Without a gradient the loss is exact."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, with_grad):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        weight_low = weight.to(dtype)
        rows = rows_in_a_block(hidden, weight_low)
        if device == "cpu":
            memory = kept_memory(rows, len(weight), dtype)
        else:
            memory = hidden.new_empty((rows, len(weight)), dtype=dtype)
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight) if with_grad else None
        for start in range(0, len(hidden), rows):
            block = slice(start, start + rows)
            h, target = hidden[block].to(dtype), targets[block]
            logits = torch.mm(h, weight_low.T, out=memory[:len(h)])  # (rows, V)
            if not with_grad:
                total += exact_loss(logits, target, part=max(1, rows // 16))
                continue
            probs = torch.softmax(logits, dim=1, out=logits)
            chosen = torch.arange(len(target), device=target.device), target
            total -= probs[chosen].float().clamp_min(SMALLEST_PROBABILITY).log().sum()
            probs[chosen] -= 1  # d loss / d logits = softmax - one-hot
            grad_hidden[block] = probs @ weight_low
            grad_weight += probs.T @ h
        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.n = len(hidden)
        return total / ctx.n

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * (grad / ctx.n), grad_weight * (grad / ctx.n), None, None


@functools.lru_cache(maxsize=1)
def kept_memory(rows, columns, dtype):
    """Memory for a block of logits on the CPU, reused in every step. New memory from the system
    cost 4 % of a step in page faults."""
    return torch.empty(rows, columns, dtype=dtype)


def rows_in_a_block(hidden, weight_low):
    """How many rows of logits to hold at a time, so that the blocks of N rows are equally large."""
    limit = CPU_LOGITS if hidden.device.type == "cpu" else GPU_LOGITS
    most = max(1, limit // (weight_low.element_size() * len(weight_low)))
    blocks = math.ceil(len(hidden) / most)
    return math.ceil(len(hidden) / blocks)


def exact_loss(logits, targets, part):
    """Summed cross-entropy of logits (rows, V) in float32, `part` rows at a time. All rows at once
    took 0.35 s instead of 0.10, mostly in page faults."""
    losses = [F.cross_entropy(some.float(), part_targets, reduction="sum")
              for some, part_targets in zip(logits.split(part), targets.split(part))]
    return sum(losses)
