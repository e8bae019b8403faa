"""Chapter 3: gradients of the meta steps against paper, brute force and differences; few-shot
accuracy of backbones that know the answer."""
import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import meta
from model import Config, Decoder


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---- the inner loop, on paper ------------------------------------------------------------------

class Scale(nn.Module):
    """Scores [0, w * x] for a number x: a problem small enough for paper."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([torch.zeros_like(x), self.w * x], dim=1)


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


@pytest.mark.parametrize("second_order", [False, True])
def test_gradient_by_hand(second_order):
    """One support example (x, label 1) and one query (z, label 1).

    With s = sigmoid(w x) the loss is L(w) = -ln s, so that L'(w) = -x (1 - s) and
    L''(w) = x^2 s (1 - s). One inner step gives u = w - a L'(w). The query gradient is
    -z (1 - sigmoid(u z)), times 1 in first order and times du/dw = 1 - a L''(w) in second."""
    w, x, z, a = 0.3, 2.0, -1.5, 0.7
    s = sigmoid(w * x)
    u = w + a * x * (1 - s)
    expected = -z * (1 - sigmoid(u * z))
    if second_order:
        expected *= 1 - a * x * x * s * (1 - s)

    module, label = Scale(), torch.tensor([1])
    support = torch.tensor([x], dtype=torch.float64)
    query = torch.tensor([z], dtype=torch.float64)
    start = dict(module.named_parameters())
    fast = meta.adapt(module, start, support, label, 1, a, second_order)
    assert fast["w"].item() == pytest.approx(u, abs=1e-12)
    F.cross_entropy(functional_call(module, fast, (query,)), label).backward()
    assert module.w.grad.item() == pytest.approx(expected, abs=1e-12)


def test_autocast_does_not_reach_the_inner_gradients():
    """A meta head computes in float32, and so must its gradients: the adapted weights under
    autocast are those without."""
    head = meta.MetaHead(24, "slots", 4, 0, seeded(0))
    states, labels = torch.randn(8, 24, generator=seeded(1)), torch.arange(4).repeat(2)
    adapted = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            adapted.append(meta.adapt(head, head.start(labels[:4]), states, labels, 5, 0.1))
    for name, value in adapted[0].items():
        assert torch.equal(value, adapted[1][name]), name


# ---- the gradient of a meta step ---------------------------------------------------------------

def learner(tiny, kind="slots"):
    """A small backbone and meta head, away from their flat start, and an episode of 3 ways and 2
    shots with one query each."""
    head = meta.MetaHead(24, kind, 3, 7, seeded(1)).double()
    nn.init.normal_(head.out.weight, std=0.3, generator=seeded(2))
    for layer in head.trunk[::2]:
        nn.init.normal_(layer.bias, std=0.1, generator=seeded(3))
    for p in tiny.parameters():
        if p.dim() == 2:
            p.data *= 1.5
    generator = seeded(4)
    support_ids = torch.randint(50, (6, 6), generator=generator)
    query_ids = torch.randint(50, (3, 6), generator=generator)
    labels = torch.arange(3)
    episode = data.Episode(support_ids, labels.repeat_interleave(2), query_ids, labels,
                           torch.tensor([5, 0, 2]))
    return tiny.model, head, episode


def flat_gradient(modules):
    gradients = []
    for module in modules:
        for p in module.parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            gradients.append(gradient.flatten())
    return torch.cat(gradients)


def brute_force_first_order(backbone, head, episode, inner, steps, lr):
    """FOMAML as its definition says: SGD on deep copies, then the query gradient at the adapted
    copies. Returns (gradient, {"support_accuracy", "query_accuracy"})."""
    backbone, head = copy.deepcopy(backbone), copy.deepcopy(head)
    rows = episode.words if head.kind == "words" else slice(None)

    def score(ids):
        return head(backbone(ids)[:, -1])[:, rows]

    adapted = [*head.parameters()]
    if inner == "all":
        adapted += backbone.parameters()
    for _ in range(steps):
        loss = F.cross_entropy(score(episode.support_ids), episode.support_labels)
        for p, gradient in zip(adapted, torch.autograd.grad(loss, adapted)):
            p.data -= lr * gradient
    F.cross_entropy(score(episode.query_ids), episode.query_labels).backward()
    figures = {}
    for name, ids, labels in (("support", episode.support_ids, episode.support_labels),
                              ("query", episode.query_ids, episode.query_labels)):
        right = score(ids).argmax(dim=1) == labels
        figures[f"{name}_accuracy"] = sum(right.tolist()) / len(labels)
    return flat_gradient([backbone, head]), figures


@pytest.mark.parametrize("inner", ["head", "all"])
@pytest.mark.parametrize("kind", ["slots", "words"])
@pytest.mark.parametrize("steps", [0, 3])
def test_first_order_equals_brute_force(tiny, inner, kind, steps):
    """Gradients of backbone and head; with no inner step it is the plain query gradient."""
    backbone, head, episode = learner(tiny, kind)
    loss, figures = meta.meta_loss(backbone, head, episode, inner, steps, 0.2)
    loss.backward()
    expected, accuracies = brute_force_first_order(backbone, head, episode, inner, steps, 0.2)
    assert torch.allclose(flat_gradient([backbone, head]), expected, atol=1e-10)
    assert expected.abs().max() > 1e-3
    assert {key: value.item() for key, value in figures.items()} == pytest.approx(accuracies)


@pytest.mark.parametrize("inner", ["head", "all"])
def test_second_order_equals_finite_differences(tiny, inner):
    """The directional derivative of the whole meta loss, inner loop included, along a random
    direction."""
    backbone, head, episode = learner(tiny)
    parameters = [*backbone.parameters(), *head.parameters()]

    def loss_of(second_order=False):
        loss, _ = meta.meta_loss(backbone, head, episode, inner, 2, 0.2, second_order)
        return loss

    def move(size):
        for p, d in zip(parameters, direction):
            p.data += size * d

    loss_of(second_order=True).backward()
    generator = seeded(5)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
    analytic = 0.0
    for p, d in zip(parameters, direction):
        if p.grad is not None:
            analytic += (d * p.grad).sum().item()
    values = []
    for sign in (1, -1):
        move(sign * 1e-7)
        values.append(loss_of().item())
        move(-sign * 1e-7)
    assert analytic == pytest.approx((values[0] - values[1]) / 2e-7, rel=1e-4)

    # First order is an approximation: it gives another gradient.
    second_order = flat_gradient([backbone, head])
    for p in parameters:
        p.grad = None
    loss_of().backward()
    assert not torch.allclose(second_order, flat_gradient([backbone, head]), rtol=1e-3)


def test_words_head_touches_only_the_rows_asked_about(tiny):
    backbone, head, episode = learner(tiny, "words")
    loss, _ = meta.meta_loss(backbone, head, episode, "head", 2, 0.2)
    loss.backward()
    touched = head.out.weight.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [i in (0, 2, 5) for i in range(7)]


def test_slots_start_where_all_labels_are_alike():
    head = meta.MetaHead(8, "slots", 5, 0, seeded(0))
    assert (head(torch.randn(3, 8, generator=seeded(1))) == 0).all()


@pytest.mark.parametrize("inner, second_order",
                         [("head", False), ("head", True), ("all", False), ("all", True)])
def test_flops_formula_against_pytorchs_counter(inner, second_order):
    config = Config(vocab_size=500, n_layer=2)
    decoder = Decoder(config, seeded(0))
    head = meta.MetaHead(96, "slots", 4, 0, seeded(1))
    nn.init.normal_(head.out.weight, generator=seeded(2))
    ids, labels = torch.randint(500, (8, 32), generator=seeded(3)), torch.arange(4)
    episode = data.Episode(ids, labels.repeat_interleave(2), ids[:4], labels, labels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss, _ = meta.meta_loss(decoder.model, head, episode, inner, 3, 0.1, second_order)
        loss.backward()
    formula = meta.meta_flops(config, head, 4, 2, 1, 32, inner, 3, second_order)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.05)


# ---- few-shot accuracy -------------------------------------------------------------------------

def test_fewshot_rows_hold_only_held_out_words_at_the_end(corpus):
    rows = meta.fewshot_rows(corpus, 12, 6)
    held_out = set(corpus.index.words[corpus.index.is_held_out].tolist())
    windows = {}  # the 11 tokens before a place in the validation text -> the token there
    for at in range(11, len(corpus.val)):
        windows[tuple(corpus.val[at - 11:at])] = int(corpus.val[at])
    counts = Counter(rows.word.tolist())
    assert set(counts.values()) == {6}
    assert len(counts) > 3
    for ids, word, previous in zip(rows.ids.tolist(), rows.word, rows.previous):
        assert ids[-1] == corpus.mask_id
        assert not set(ids[:-1]) & held_out
        assert previous == ids[-2]
        assert windows[tuple(ids[:-1])] == corpus.index.words[word]
        assert corpus.index.is_held_out[word]


class Known(nn.Module):
    """A backbone whose states tell the word: a code for the number in the row's first token."""

    def __init__(self, words):
        super().__init__()
        self.table = torch.randn(words, 16, generator=seeded(0))

    def forward(self, ids):
        return self.table[ids[:, :1]].expand(-1, ids.shape[1], -1)


def known_rows(shuffled):
    """8 rows for each of 12 words, whose tokens are the word's number; with shuffled words they
    tell nothing of the word."""
    words = np.arange(12).repeat(8)
    ids = torch.from_numpy(words)[:, None].expand(-1, 5).clone()
    if shuffled:
        words = np.random.default_rng(0).permutation(words)
    return meta.FewShotRows(ids, words, np.arange(len(words)))


def test_fewshot_accuracy_of_too_few_words_is_left_out(tiny):
    nothing = np.zeros(0, dtype=int)
    rows = meta.FewShotRows(torch.zeros((0, 8), dtype=torch.int64), nothing, nothing)
    assert meta.evaluate_fewshot(tiny.model, None, rows, 4, 2, torch.device("cpu")) == {}


@pytest.mark.parametrize("shuffled", [False, True])
def test_fewshot_accuracy_is_perfect_or_chance(shuffled):
    """States that tell the word give accuracy 1 in every reading; the same states under shuffled
    labels give chance."""
    head = meta.MetaHead(16, "slots", 6, 0, seeded(0))
    report = meta.evaluate_fewshot(Known(12), head, known_rows(shuffled), 6, 4, "cpu",
                                   inner_steps=50, inner_lr=0.3)
    assert report["fewshot_chance"] == pytest.approx(1 / 6)
    assert report["fewshot_before"] < 0.35
    for key in ("fewshot_prototype", "fewshot_after"):
        if shuffled:
            assert abs(report[key] - 1 / 6) < 0.06
        else:
            assert report[key] > 0.99
    assert 0 <= report["fewshot_stderr"] < 0.03


@pytest.mark.parametrize("kind, inner", [("words", "head"), ("slots", "all")])
def test_fewshot_accuracy_of_other_heads_and_inner_loops(kind, inner):
    """Under no_grad, as the training loop evaluates: a head with a row per word, and a loop that
    adapts the backbone."""
    head = meta.MetaHead(16, kind, 6, 12, seeded(0))
    with torch.no_grad():
        report = meta.evaluate_fewshot(Known(12), head, known_rows(False), 6, 4, "cpu", inner,
                                       inner_steps=30, inner_lr=0.3)
    assert report["fewshot_after"] > 0.95 > report["fewshot_before"]


def test_lookup_by_hand():
    """Two words. Of the tokens before their queries, 1 stands before a support word of the first,
    2 before one of each, and 4 before none."""
    support = np.array([[1, 2], [2, 3]])
    query = np.array([[1, 2], [4, 2]])
    answered, is_new = meta.lookup(support, query)
    assert answered == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 2) / 4)
    assert is_new.tolist() == [False, False, True, False]


def test_fewshot_leaves_out_what_the_previous_token_tells():
    """If the previous token always tells the word, the look-up is perfect and nothing is left to
    ask."""
    rows = known_rows(False)
    rows.previous = rows.word
    report = meta.evaluate_fewshot(Known(12), None, rows, 6, 4, "cpu")
    assert report["fewshot_lookup"] == 1.0
    assert "fewshot_prototype" not in report


class Position(nn.Module):
    """A backbone whose states tell the position in the row."""

    def forward(self, ids):
        positions = torch.arange(ids.shape[1]).float()
        return positions[None, :, None].expand(len(ids), -1, 3)


def test_fewshot_reads_before_the_mask_and_at_it():
    before, at = meta.fewshot_states(Position(), known_rows(False), "cpu")
    assert (before == 3).all()
    assert (at == 4).all()
