"""Chapter 3. First-order MAML: adapt a small meta head to an episode, learn from its queries.

    from meta import MetaHead, adapt, meta_loss

Read `adapt` and `meta_loss` first: they are the whole algorithm. MAML (Finn et al. 2017, arXiv
1703.03400) looks for weights from which a few gradient steps solve a new task. The task here is an
episode of data.py: which of N words was masked in a context? Each word comes with K contexts whose
labels are given (support) and Q whose labels are asked (query), in rows of L tokens. FOMAML is
first-order MAML. The second half of the chapter measures few-shot accuracy on words that were
never a class in training. "The paper" is arXiv 2508.02189.
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

# Width of the meta head, the paper's.
HIDDEN = 128
# Evaluation: fixed episodes, the held-out words that take part, and queries per word (train.py
# draws k_shot + FEWSHOT_QUERIES rows of each word).
FEWSHOT_EPISODES = 64
FEWSHOT_WORDS = 96
FEWSHOT_QUERIES = 4


# ---- MAML --------------------------------------------------------------------------------------

def adapt(module, fast, inputs, labels, inner_steps, inner_lr, second_order=False):
    """The inner loop: inner_steps of SGD on the support set.

    fast is {name: tensor}, the parameters to start from. Returns the adapted ones, which are
    still connected to the initial ones in autograd's graph. The module itself does not change:
    functional_call runs it with `fast` in place of its own parameters.

    First order (create_graph=False) is an approximation: each step's gradient is a constant. Then
    the derivative of the adapted parameters by the initial ones is the identity, and the query
    gradient reaches the initial parameters unchanged. In second order the gradients keep their
    graph, and the derivative goes through them, too."""
    for _ in range(inner_steps):
        loss = F.cross_entropy(functional_call(module, fast, (inputs,)), labels)
        # Without autocast, which would compute the float32 head's gradients in bf16.
        with torch.autocast(inputs.device.type, enabled=False):
            grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=second_order)
        # p - inner_lr * g for each parameter p and its gradient g. A GPU does these for all
        # parameters at once. The scaled gradients take the name of the others, whose memory is
        # then free.
        grads = torch._foreach_mul(grads, inner_lr)
        fast = dict(zip(fast, torch._foreach_sub(list(fast.values()), grads)))
    return fast


def meta_loss(backbone, meta_head, episode, inner="head", inner_steps=10, inner_lr=0.1,
              second_order=False):
    """The outer loss of one episode: cross-entropy on the queries, in nats, at parameters that
    were adapted on the support set.

    Returns (loss, figures), with the support and query accuracy as scalar tensors in figures.
    loss.backward() leaves the FOMAML gradient (with second_order MAML's) in the parameters of
    backbone and meta_head.

    inner "head": the inner loop adapts the meta head alone. The backbone is frozen in it, so its
    support states are computed once and serve every step. In first order they need no graph,
    since they enter the adapted head through constants only. The backbone learns through the
    query states.
    inner "all": the inner loop adapts the backbone, too."""
    kernel = contextlib.nullcontext()
    if inner == "head":
        module = meta_head
        with torch.set_grad_enabled(second_order):
            support = backbone(episode.support_ids)[:, -1]  # (N*K, D): the states at the mask
        query = backbone(episode.query_ids)[:, -1]          # (N*Q, D)
    else:
        module = Learner(backbone, meta_head)
        support, query = episode.support_ids, episode.query_ids
        if second_order:  # the fused attention kernels have no second derivative
            kernel = sdpa_kernel(SDPBackend.MATH)
    with kernel:
        fast = adapt(module, module.start(episode.words), support, episode.support_labels,
                     inner_steps, inner_lr, second_order)
        scores = functional_call(module, fast, (query,))    # (N*Q, N)
        loss = F.cross_entropy(scores, episode.query_labels)
        with torch.no_grad():
            support_scores = functional_call(module, fast, (support,))
    return loss, {"support_accuracy": accuracy(support_scores, episode.support_labels),
                  "query_accuracy": accuracy(scores, episode.query_labels)}


def accuracy(scores, labels):
    """The share of rows of scores (R, N) whose largest entry is at the label (R,)."""
    return (scores.argmax(dim=1) == labels).float().mean()


class MetaHead(nn.Module):
    """The classifier that the inner loop adapts: an MLP of 4 layers, states (R, D) -> scores.

    kind "slots": scores (R, n_way), an output row per label. Each episode gives its words new
    labels, so that only adaptation can tell the rows apart. They are initialised to zero: every
    label scores 0, and accuracy is 1 / n_way.
    kind "words": an output row for each of the n_words classes, the paper's choice. A word keeps
    its row in all episodes, and so training can memorise it."""

    def __init__(self, d_model, kind, n_way, n_words, generator=None):
        super().__init__()
        self.kind = kind
        self.trunk = nn.Sequential(
            nn.Linear(d_model, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.out = nn.Linear(HIDDEN, n_way if kind == "slots" else n_words)
        for layer in [*self.trunk[::2], self.out]:
            std = (2 / layer.in_features) ** 0.5
            if layer is self.out and kind == "slots":
                std = 0.0
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden):
        # Small, and small steps matter: float32.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out(self.trunk(hidden))

    def start(self, words):
        """{name: tensor}: the parameters from which the inner loop starts. Of a "words" head
        these are the rows of the episode's words (N,) only, so that nothing scores the whole
        vocabulary. The gather carries the query gradient back to those rows."""
        fast = dict(self.named_parameters())
        if self.kind == "words":
            fast["out.weight"] = self.out.weight[words]
            fast["out.bias"] = self.out.bias[words]
        return fast


class Learner(nn.Module):
    """Backbone and meta head as one module, ids (R, L) -> scores (R, N): what `--inner all`
    adapts."""

    def __init__(self, backbone, meta_head):
        super().__init__()
        self.backbone, self.head = backbone, meta_head

    def forward(self, ids):
        return self.head(self.backbone(ids)[:, -1])

    def start(self, words):
        """As MetaHead.start, with the parameters of the backbone."""
        fast = {f"backbone.{name}": p for name, p in self.backbone.named_parameters()}
        for name, p in self.head.start(words).items():
            fast[f"head.{name}"] = p
        return fast


def meta_flops(config, meta_head, n_way, k_shot, n_query, length, inner, inner_steps,
               second_order):
    """Model FLOPs of one meta step. A forward pass counts 1 and a backward pass 2, so a gradient
    costs 3. Second order differentiates these passes in turn, which costs three times as much."""
    first_layer = meta_head.trunk[0].weight.numel()
    weights = sum(layer.weight.numel() for layer in meta_head.trunk[::2]) + n_way * HIDDEN
    support_head = 2 * n_way * k_shot * weights  # forward passes
    query_head = 2 * n_way * n_query * weights
    support_backbone = backbone_flops(config, n_way * k_shot, length)
    query_backbone = backbone_flops(config, n_way * n_query, length)
    # the queries, forward and backward, and the support accuracy
    outer = 3 * (query_backbone + query_head) + support_head
    if inner == "all":
        step = (9 if second_order else 3) * (support_backbone + support_head)
        return outer + support_backbone + inner_steps * step
    # The head's first layer needs no gradient by its input, the support states.
    step = 3 * support_head - 2 * n_way * k_shot * first_layer
    return outer + (3 if second_order else 1) * (support_backbone + inner_steps * step)


# ---- few-shot accuracy on held-out words -------------------------------------------------------

@dataclass
class FewShotRows:
    """Rows of validation text that end at a held-out word, for few-shot accuracy.

    No held-out word stands earlier in a row, so rows never overlap. Unless the backbone is
    adapted, its states of these rows serve every episode.

    ids       (R, L)  tokens; the last is <|mask|>
    word      (R,)    the index of the masked word in WordIndex.words
    previous  (R,)    the token before it
    """
    ids: torch.Tensor
    word: np.ndarray
    previous: np.ndarray


def fewshot_rows(corpus, length, per_word, most_words=FEWSHOT_WORDS):
    """FewShotRows with exactly per_word rows for each word that has as many; of these words the
    most frequent ones."""
    index, tokens = corpus.index, np.asarray(corpus.val)
    word_of = np.full(corpus.vocab_size, -1)  # token id -> index of the held-out word, or -1
    word_of[index.words[index.is_held_out]] = np.flatnonzero(index.is_held_out)
    ends = index.occurrences(tokens)
    ends = ends[(word_of[tokens[ends]] >= 0) & (ends >= length - 1)]
    rows = tokens[ends[:, None] + np.arange(1 - length, 1)].astype(np.int64)  # (R, L)
    rows = rows[(word_of[rows[:, :-1]] < 0).all(axis=1)]
    words = word_of[rows[:, -1]]  # (R,)

    counts = Counter(words.tolist())
    most_frequent = sorted(counts, key=lambda word: (-counts[word], word))[:most_words]
    chosen = [np.zeros(0, dtype=int)]  # concatenate needs one
    for word in most_frequent:
        if counts[word] >= per_word:
            rows_of_word = np.flatnonzero(words == word)
            # evenly over the text
            spread = np.linspace(0, len(rows_of_word) - 1, per_word).astype(int)
            chosen.append(rows_of_word[spread])
    chosen = np.concatenate(chosen)
    ids = rows[chosen]
    previous = ids[:, -2].copy()
    ids[:, -1] = corpus.mask_id
    return FewShotRows(torch.from_numpy(ids), words[chosen], previous)


def fewshot_episodes(rows, n_way, k_shot):
    """FEWSHOT_EPISODES fixed pairs (support (N, K), query (N, Q)) of indices of rows, the same
    for every run; an empty list if there are too few words."""
    words = np.unique(rows.word)
    if len(words) < n_way:
        return []
    rng = np.random.default_rng(0)
    rows_of = {word: np.flatnonzero(rows.word == word) for word in words}
    episodes = []
    for _ in range(FEWSHOT_EPISODES):
        classes = rng.choice(words, n_way, replace=False)
        picks = np.stack([rng.permutation(rows_of[word]) for word in classes])
        episodes.append((picks[:, :k_shot], picks[:, k_shot:]))
    return episodes


@torch.no_grad()
def fewshot_states(backbone, rows, device, batch=64):
    """The states of FewShotRows at the token before the mask, for prototypes, and at the mask, for
    the meta head: two tensors (R, D) on the CPU."""
    states = [backbone(ids.to(device))[:, -2:].float().cpu() for ids in rows.ids.split(batch)]
    return torch.cat(states).unbind(dim=1)


def evaluate_fewshot(backbone, meta_head, rows, n_way, k_shot, device, inner="head",
                     inner_steps=10, inner_lr=0.1):
    """Few-shot accuracy on held-out words, {key in the log: mean over the episodes}. A new query is
    one whose previous token precedes none of the episode's support words.

    fewshot_lookup     what the previous token alone answers, without any model
    fewshot_prototype  the nearest prototype (see `prototype_scores`), on new queries only
    fewshot_stderr     its standard error over episodes
    fewshot_before     the meta head before the inner loop, on all queries
    fewshot_after      the meta head after it
    fewshot_after_stderr                   the standard error of fewshot_after
    fewshot_before_new, fewshot_after_new  the meta head on new queries only
    fewshot_chance     1 / n_way

    Episodes without a new query count for the look-up only. An empty dict if there are too few
    words."""
    episodes = fewshot_episodes(rows, n_way, k_shot)
    if not episodes:
        return {}
    previous_states, mask_states = fewshot_states(backbone, rows, device)
    figures = {}  # key -> a value for each episode
    for support, query in episodes:
        labels = torch.arange(n_way).repeat_interleave(query.shape[1])  # (N*Q,)
        answered, is_new = lookup(rows.previous[support], rows.previous[query])
        found = {"fewshot_lookup": answered}
        if is_new.any():
            scores = prototype_scores(previous_states, support, query)
            found["fewshot_prototype"] = accuracy(scores[is_new], labels[is_new]).item()
        if meta_head is not None and is_new.any():
            inputs = mask_states if inner == "head" else rows.ids
            words = torch.from_numpy(rows.word[support[:, 0]])
            before, after = adapted_scores(backbone, meta_head, inputs, words, support, query,
                                           device, inner, inner_steps, inner_lr)
            for name, scores in (("fewshot_before", before), ("fewshot_after", after)):
                found[name] = accuracy(scores, labels).item()
                found[f"{name}_new"] = accuracy(scores[is_new], labels[is_new]).item()
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
    report = {key: float(np.mean(values)) for key, values in figures.items()}
    for key, error in (("fewshot_prototype", "fewshot_stderr"),
                       ("fewshot_after", "fewshot_after_stderr")):
        if key in figures:
            report[error] = float(np.std(figures[key]) / len(figures[key]) ** 0.5)
    return report | {"fewshot_chance": 1 / n_way}


def lookup(support_previous, query_previous):
    """What the token before a query answers, where support_previous (N, K) and query_previous
    (N, Q) are the tokens before the masked words.

    Returns (expected accuracy, is_new). The look-up picks a class with a probability in proportion
    to that token's count in its support rows. is_new, (N*Q,) bool: no support row has the token,
    and so the look-up guesses."""
    n_way = len(support_previous)
    label = np.arange(n_way).repeat(query_previous.shape[1])                  # (N*Q,)
    same = query_previous.reshape(-1, 1, 1) == support_previous[None]         # (N*Q, N, K)
    votes = same.sum(axis=2)                                                  # (N*Q, N)
    all_votes = votes.sum(axis=1)
    right = votes[np.arange(len(label)), label] / np.maximum(all_votes, 1)
    is_new = all_votes == 0
    return np.where(is_new, 1 / n_way, right).mean(), torch.from_numpy(is_new)


def prototype_scores(states, support, query):
    """Scores (N*Q, N) without any training (Snell et al. 2017, arXiv 1703.05175): minus the
    distance of a query's state to the mean of each word's K support states."""
    n_way, k_shot = support.shape
    prototypes = states[support.ravel()].view(n_way, k_shot, -1).mean(dim=1)  # (N, D)
    return -torch.cdist(states[query.ravel()], prototypes)


def adapted_scores(backbone, meta_head, inputs, words, support, query, device, inner, inner_steps,
                   inner_lr):
    """The scores (N*Q, N) of the queries before and after the inner loop, on the CPU. inputs are
    states (R, D) for inner "head" and ids (R, L) for "all"."""
    module = meta_head if inner == "head" else Learner(backbone, meta_head)
    n_way, k_shot = support.shape
    labels = torch.arange(n_way, device=device).repeat_interleave(k_shot)
    with torch.enable_grad():
        start = module.start(words.to(device))
        fast = adapt(module, start, inputs[support.ravel()].to(device), labels, inner_steps,
                     inner_lr)
    with torch.no_grad():
        asked = inputs[query.ravel()].to(device)
        return [functional_call(module, parameters, (asked,)).cpu() for parameters in (start, fast)]
