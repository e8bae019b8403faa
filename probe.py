"""Probes of the learning dynamics, and the pictures made of them.

    from probe import effective_rank, head_entropy

Effective rank (Roy & Vetterli 2007): exp of the entropy of the normalised singular values; how many directions a
matrix really uses. Attention entropy: how many positions a head really looks at.
"""
import json
import math
import time
from pathlib import Path

import torch

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
BATCH = 4          # validation windows in the probe batch
HEADS_AT_ONCE = 4  # heads whose attention probabilities are held at a time


# ---- measures ----------------------------------------------------------------------------------------------

def effective_rank(matrix):
    """exp(-sum p ln p), p the singular values of matrix (m, n) divided by their sum: from 1 to min(m, n); 0 for a
    matrix of zeros. The singular values are roots of the eigenvalues of the smaller Gram matrix, in float64."""
    matrix = matrix.detach().to(torch.float64 if matrix.device.type != "mps" else torch.float32)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if not total > 0:
        return 0.0 if total == 0 else math.nan
    return torch.special.entr(singular / total).sum().exp().item()


def head_entropy(q, k):
    """Entropy of causal attention in nats, (heads, T): the mean over the batch at each position, from queries
    (B, heads, T, head_dim) and keys (B, kv_heads, T, head_dim). Uniform attention over t positions has ln t."""
    group = q.shape[1] // k.shape[1]
    visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    entropies = []
    for heads in torch.arange(q.shape[1]).split(HEADS_AT_ONCE):
        scores = q[:, heads].float() @ k[:, heads // group].float().mT * q.shape[3] ** -0.5
        attention = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)  # (B, few heads, T, T)
        entropies.append(torch.special.entr(attention).sum(dim=-1).mean(dim=0))
    return torch.cat(entropies)


def measure(decoder, batch):
    """The figures of a probe line from validation windows batch (B, T+1): per layer, effective rank and
    proportional effective rank (over the number of singular values) of hidden states, weights, and gradients of the
    next-token loss; per layer and head, attention entropy in nats and over ln t, position 0 left out."""
    layers, cos, sin = decoder.model.layers, decoder.model.cos, decoder.model.sin
    hidden, queries_keys, hooks = [], [], []
    for layer in layers:
        hooks.append(layer.register_forward_hook(lambda module, args, out: hidden.append(out.detach())))
        hooks.append(layer.self_attn.register_forward_pre_hook(
            lambda module, args: queries_keys.append([t.detach() for t in module.qkv(*args[:3])[:2]])))
    try:
        from model import cross_entropy
        states = decoder.model.forward(batch[:, :-1])  # not the compiled call: hooks see the layers
        cross_entropy(states.flatten(0, 1), decoder.lm_head.weight, batch[:, 1:].flatten()).backward()
    finally:
        for hook in hooks:
            hook.remove()
    matrices = {"hidden": [[h.flatten(0, 1)] for h in hidden]}
    for name, block, projections in (("attention", "self_attn", ATTENTION), ("mlp", "mlp", FEED_FORWARD)):
        weights = [[getattr(getattr(layer, block), p).weight for p in projections] for layer in layers]
        matrices[name] = weights
        matrices[f"{name}_grad"] = [[w.grad for w in row] for row in weights]
    ranks = {name: [[effective_rank(m) for m in row] for row in rows] for name, rows in matrices.items()}
    decoder.zero_grad()
    nats = torch.stack([head_entropy(q, k)[:, 1:] for q, k in queries_keys])       # (layers, heads, T-1)
    uniform = torch.arange(2, nats.shape[2] + 2, device=nats.device).float().log()
    mean = lambda values: sum(values) / len(values)
    return {"effective_rank": {name: [mean(row) for row in rows] for name, rows in ranks.items()},
            "proportional_effective_rank": {name: [mean([r / min(m.shape) for r, m in zip(row, ms)])
                                                   for row, ms in zip(rows, matrices[name])] for name, rows in ranks.items()},
            "head_entropy": {"nats": nats.mean(dim=2).tolist(), "normalised": (nats / uniform).mean(dim=2).tolist()}}


def is_probe_step(step, every, last):
    """Dense at the start, where the first drop is over in a hundred updates: 0, 1, 2, 4, 8, ...; then evenly."""
    return step % every == 0 or step == last or (step < every and step & (step - 1) == 0)


# ---- the log -----------------------------------------------------------------------------------------------

def read_metrics(path):
    """(lines, notes): the objects of a metrics.jsonl as far as it is whole, and what was wrong with the rest."""
    lines, bad = [], 0
    for text in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append(line | {"step": int(line["step"])})
        except (ValueError, KeyError, TypeError):
            bad += 1
    return lines, [f"{path}: {bad} unreadable line{'s'[:bad != 1]} left out"] if bad else []


# ---- pictures ----------------------------------------------------------------------------------------------

class Artist:
    """Draws a running job's dynamics.png, so seldom that it costs less than 1 % of the time."""

    def __init__(self, folder):
        self.folder, self.drawn, self.cost = folder, -math.inf, 0.0

    def draw(self, lines, settings, last=False):
        now = time.perf_counter()
        if last or now - self.drawn > 100 * self.cost:
            draw_dynamics(self.folder / "dynamics.png", lines, settings)
            self.drawn, self.cost = time.perf_counter(), time.perf_counter() - now


def draw_dynamics(path, lines, settings):
    pass
