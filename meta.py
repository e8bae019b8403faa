"""First-order MAML: adapt a small head on an episode's support rows, learn from its query rows.

    from meta import MetaHead, adapt, meta_loss

MAML (Finn et al. 2017, arXiv 1703.03400) looks for weights from which a few gradient steps solve a new task. The
task here (SMLMT, Bansal et al. 2020): N words are masked in their contexts; which of them stood where?
"""
import contextlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import backbone_flops

HIDDEN = 128            # width of the head, the paper's
FEWSHOT_QUERIES = 4     # queries per held-out word in an evaluation episode
FEWSHOT_EPISODES = 64   # fixed evaluation episodes


class MetaHead(nn.Module):
    """The classifier that the inner loop adapts: an MLP of 4 layers, hidden states (R, D) -> scores (R, rows).

    kind "slots": one output row per label, n_way in all. Each episode gives its words fresh labels, so that
    nothing but adaptation can tell them apart; the rows start at zero, where all labels are alike.
    kind "words": one row per word of the index (the paper's choice), which training can memorise."""

    def __init__(self, d_model, kind, n_way, n_words, generator=None):
        super().__init__()
        self.kind = kind
        self.trunk = nn.Sequential(nn.Linear(d_model, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                                   nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.out = nn.Linear(HIDDEN, n_way if kind == "slots" else n_words)
        for layer in [*self.trunk[::2], self.out]:
            zero = layer is self.out and kind == "slots"
            nn.init.normal_(layer.weight, std=0.0 if zero else (2 / layer.in_features) ** 0.5, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden):
        with torch.autocast(hidden.device.type, enabled=False):  # small, and small steps matter: float32
            return self.out(self.trunk(hidden))

    def start(self, words):
        """{name: tensor}: where the inner loop starts. Of a "words" head only the rows of the N words (N,), gathered
        once, so that nothing scores the whole vocabulary; the gather carries the query gradient back to them."""
        fast = dict(self.named_parameters())
        if self.kind == "words":
            fast |= {"out.weight": self.out.weight[words], "out.bias": self.out.bias[words]}
        return fast


class Learner(nn.Module):
    """Backbone and head as one module, ids (R, L) -> scores (R, N): what --inner all adapts."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, ids):
        return self.head(self.backbone(ids)[:, -1])

    def start(self, words):
        return ({f"backbone.{name}": p for name, p in self.backbone.named_parameters()}
                | {f"head.{name}": p for name, p in self.head.start(words).items()})


def adapt(module, fast, inputs, labels, inner_steps, inner_lr, second_order=False):
    """The inner loop: inner_steps of SGD on the support set, from the parameters `fast` ({name: tensor}).

    Returns the adapted parameters, still connected to the initial ones. First order (MAML's approximation): the
    gradient of each step is a constant, so that the derivative of adapted by initial parameters is the identity
    and the query gradient reaches the initial parameters unchanged. Second order: the gradients keep their graph."""
    for _ in range(inner_steps):
        loss = F.cross_entropy(functional_call(module, fast, (inputs,)), labels)
        grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=second_order)
        fast = {name: p - inner_lr * g for (name, p), g in zip(fast.items(), grads)}
    return fast


def meta_loss(backbone, head, episode, inner="head", inner_steps=10, inner_lr=0.1, second_order=False):
    """The outer loss: query cross-entropy, in nats, at parameters adapted on the support set.

    Returns (loss, support accuracy, query accuracy), 0-d tensors; loss.backward() leaves the FOMAML gradient (MAML's
    with second_order) in the parameters of backbone and head. inner "head": the backbone stands still in the inner
    loop, so its support states are computed once, without a graph, and serve every step. inner "all": everything
    but lm_head, which no episode's loss reaches, is adapted."""
    if inner == "head":
        with contextlib.nullcontext() if second_order else torch.no_grad():
            support = backbone(episode.support_ids)[:, -1]  # (N*K, D): the row's last state has read the mask
        query = backbone(episode.query_ids)[:, -1]          # (N*Q, D)
        module, kernel = head, contextlib.nullcontext()
    else:
        support, query, module = episode.support_ids, episode.query_ids, Learner(backbone, head)
        # the fused attention kernels have no second derivative
        kernel = sdpa_kernel(SDPBackend.MATH) if second_order else contextlib.nullcontext()
    with kernel:
        fast = adapt(module, module.start(episode.words), support, episode.support_labels, inner_steps, inner_lr, second_order)
        scores = functional_call(module, fast, (query,))
        loss = F.cross_entropy(scores, episode.query_labels)
        with torch.no_grad():
            support_accuracy = accuracy(functional_call(module, fast, (support,)), episode.support_labels)
    return loss, support_accuracy, accuracy(scores, episode.query_labels)


def accuracy(scores, labels):
    return (scores.argmax(dim=1) == labels).float().mean()


def meta_flops(config, head, n_way, k_shot, n_query, length, inner, inner_steps, second_order):
    """Model FLOPs of one meta step: a forward pass counts 1, a backward pass 2; the support accuracy costs a forward."""
    weights = sum(layer.weight.numel() for layer in head.trunk[::2]) + n_way * HIDDEN
    support, query = 2 * n_way * k_shot * weights, 2 * n_way * n_query * weights  # the head, forward
    support_backbone = backbone_flops(config, n_way * k_shot, length)
    outer = 3 * (backbone_flops(config, n_way * n_query, length) + query) + support
    if inner == "head":  # no gradient to the support states themselves; second order differentiates all of it again
        first = 2 * n_way * k_shot * head.trunk[0].weight.numel()
        return outer + (3 if second_order else 1) * (support_backbone + inner_steps * (3 * support - first))
    return outer + support_backbone + inner_steps * (9 if second_order else 3) * (support_backbone + support)


# ---- few-shot accuracy on held-out words -------------------------------------------------------------------

@dataclass
class FewShotRows:
    """Held-out words in held-out text, for few-shot accuracy: ids (R, L) rows that end at MASK, word (R,) the index
    of the masked word in WordIndex.words, previous (R,) the token before it. No held-out word stands earlier in a
    row, so rows never overlap, and one forward pass serves every episode that is drawn from them."""
    ids: torch.Tensor
    word: np.ndarray
    previous: np.ndarray


def fewshot_rows(corpus, length, per_word, most_words=96):
    """FewShotRows with exactly per_word rows for each word that has them; the most_words richest words."""
    index, tokens = corpus.index, np.asarray(corpus.val)
    held_out = np.full(corpus.vocab_size, -1)
    held_out[index.words[index.is_held_out]] = np.flatnonzero(index.is_held_out)
    ends = index.occurrences(tokens)
    ends = ends[(held_out[tokens[ends]] >= 0) & (ends >= length - 1)]
    rows = tokens[ends[:, None] + np.arange(1 - length, 1)].astype(np.int64)  # (R, L)
    clean = (held_out[rows[:, :-1]] < 0).all(axis=1)
    rows = rows[clean]
    words = held_out[rows[:, -1]]
    kept = []
    for word, count in sorted(Counter(words.tolist()).items(), key=lambda item: (-item[1], item[0]))[:most_words]:
        if count >= per_word:
            at = np.flatnonzero(words == word)
            kept.append(at[np.linspace(0, len(at) - 1, per_word).astype(int)])  # spread over the documents
    kept = np.concatenate(kept) if kept else np.zeros(0, dtype=int)
    ids = rows[kept]
    previous = ids[:, -2].copy()
    ids[:, -1] = corpus.mask_id
    return FewShotRows(torch.from_numpy(ids), words[kept], previous)


@torch.no_grad()
def fewshot_states(backbone, rows, device, batch=64):
    """States of FewShotRows on the CPU, each (R, D): before the mask, where the text is ordinary, and at the mask."""
    states = [backbone(ids.to(device))[:, -2:].float().cpu() for ids in rows.ids.split(batch)]
    return torch.cat(states).unbind(dim=1)


def fewshot_episodes(rows, n_way, k_shot):
    """FEWSHOT_EPISODES fixed (support, query) pairs of row indices, (N, K) and (N, Q); none if words are too few."""
    words = np.unique(rows.word)
    if len(words) < n_way:
        return []
    rng = np.random.default_rng(0)  # the same episodes for every run
    at = {word: np.flatnonzero(rows.word == word) for word in words}
    picks = (np.stack([rng.permutation(at[word]) for word in rng.choice(words, n_way, replace=False)])
             for _ in range(FEWSHOT_EPISODES))
    return [(pick[:, :k_shot], pick[:, k_shot:]) for pick in picks]


def evaluate_fewshot(backbone, head, rows, n_way, k_shot, device, inner="head", inner_steps=10, inner_lr=0.1):
    """Few-shot accuracy on held-out words: {fewshot_prototype, fewshot_chance, fewshot_stderr, fewshot_lookup, ...}.

    prototype (Snell et al. 2017, without training): the nearest mean of K support states, read before the word. A
    query whose previous token also stands before a support word is left out. lookup: what that previous token alone
    would answer, on all queries. before / after, if there is a head: its accuracy at the mask before and after the
    inner loop, on all queries, and as _new on those that prototype is asked. stderr: of prototype, fewshot_after_stderr
    of after, over episodes, which share their rows."""
    episodes = fewshot_episodes(rows, n_way, k_shot)
    if not episodes:
        return {}
    before_mask, at_mask = fewshot_states(backbone, rows, device)
    results = {name: [] for name in ("prototype", "lookup", "before", "after", "before_new", "after_new")}
    for support, query in episodes:
        label = np.arange(n_way).repeat(query.shape[1])
        previous = rows.previous[query.ravel()]
        same = previous[:, None] == rows.previous[support.ravel()][None]                # (N*Q, N*K)
        votes = same.reshape(len(label), n_way, k_shot).sum(axis=2)                     # (N*Q, N)
        share = votes[np.arange(len(label)), label] / np.maximum(votes.sum(axis=1), 1)
        results["lookup"].append(np.where(votes.any(axis=1), share, 1 / n_way).mean())
        asked, label, new = query.ravel(), torch.from_numpy(label), torch.from_numpy(~same.any(axis=1))
        if not new.any():
            continue
        centres = before_mask[support.ravel()].view(n_way, k_shot, -1).mean(dim=1)      # (N, D)
        results["prototype"].append(accuracy(-torch.cdist(before_mask[asked], centres)[new], label[new]).item())
        if head is not None:
            module, inputs = (head, at_mask) if inner == "head" else (Learner(backbone, head), rows.ids)
            labels = torch.arange(n_way, device=device).repeat_interleave(k_shot)
            with torch.enable_grad():
                start = module.start(torch.from_numpy(rows.word[support[:, 0]]).to(device))
                fast = adapt(module, start, inputs[support.ravel()].to(device), labels, inner_steps, inner_lr)
            with torch.no_grad():
                for name, parameters in (("before", start), ("after", fast)):
                    scores = functional_call(module, parameters, (inputs[asked].to(device),)).cpu()
                    results[name].append(accuracy(scores, label).item())
                    results[f"{name}_new"].append(accuracy(scores[new], label[new]).item())
    report = {f"fewshot_{name}": float(np.mean(values)) for name, values in results.items() if values}
    for name, key in (("prototype", "fewshot_stderr"), ("after", "fewshot_after_stderr")):
        if results[name]:
            report[key] = float(np.std(results[name]) / len(results[name]) ** 0.5)
    return report | {"fewshot_chance": 1 / n_way} if report else {}
