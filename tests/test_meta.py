import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import meta
from model import Config, Decoder


class Scale(nn.Module):
    """Scores [0, w * x] for a number x: a problem small enough for paper."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return torch.stack([torch.zeros_like(x), self.w * x], dim=1)


@pytest.mark.parametrize("second_order", [False, True])
def test_gradient_by_hand(second_order):
    """With s = sigmoid, one support example (x, label 1) and one query (z, label 1): loss L(w) = -ln s(w x), so
    L'(w) = -x (1 - s(w x)) and L''(w) = x^2 s (1 - s). One inner step gives u = w - a L'(w); the query gradient is
    -z (1 - s(u z)), times 1 in first order and du/dw = 1 - a L''(w) in second."""
    w, x, z, a = 0.3, 2.0, -1.5, 0.7
    s = lambda t: 1 / (1 + math.exp(-t))
    u = w + a * x * (1 - s(w * x))
    expected = -z * (1 - s(u * z)) * ((1 - a * x * x * s(w * x) * (1 - s(w * x))) if second_order else 1)
    module, one = Scale(), torch.tensor([1])
    fast = meta.adapt(module, dict(module.named_parameters()), torch.tensor([x], dtype=torch.float64), one, 1, a, second_order)
    assert fast["w"].item() == pytest.approx(u, abs=1e-12)
    F.cross_entropy(torch.func.functional_call(module, fast, (torch.tensor([z], dtype=torch.float64),)), one).backward()
    assert module.w.grad.item() == pytest.approx(expected, abs=1e-12)


def learner(tiny, kind="slots"):
    head = meta.MetaHead(24, kind, 3, 7, torch.Generator().manual_seed(1)).double()
    nn.init.normal_(head.out.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    for layer in head.trunk[::2]:
        nn.init.normal_(layer.bias, std=0.1, generator=torch.Generator().manual_seed(3))
    for p in tiny.parameters():
        p.data *= 1.5 if p.dim() == 2 else 1  # away from the flat start
    g = torch.Generator().manual_seed(4)
    ids = lambda rows: torch.randint(50, (rows, 6), generator=g)
    labels = torch.arange(3)
    episode = data.Episode(ids(6), labels.repeat_interleave(2), ids(3), labels, torch.tensor([5, 0, 2]))
    return tiny.model, head, episode


def flat_gradient(modules):
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for m in modules for p in m.parameters()])


def brute_force_first_order(backbone, head, episode, inner, steps, lr):
    """FOMAML as its definition says: SGD on deep copies, then the query gradient at the adapted copies."""
    learned_backbone, learned_head = copy.deepcopy(backbone), copy.deepcopy(head)
    rows = episode.words if head.kind == "words" else slice(None)
    score = lambda ids: learned_head(learned_backbone(ids)[:, -1])[:, rows]
    adapted = [*learned_head.parameters()] + ([*learned_backbone.parameters()] if inner == "all" else [])
    for _ in range(steps):
        loss = F.cross_entropy(score(episode.support_ids), episode.support_labels)
        for p, g in zip(adapted, torch.autograd.grad(loss, adapted)):
            p.data -= lr * g
    F.cross_entropy(score(episode.query_ids), episode.query_labels).backward()
    return flat_gradient([learned_backbone, learned_head])


@pytest.mark.parametrize("inner", ["head", "all"])
@pytest.mark.parametrize("kind", ["slots", "words"])
@pytest.mark.parametrize("steps", [0, 3])
def test_first_order_equals_brute_force(tiny, inner, kind, steps):
    """Gradients of backbone and head; with no inner step it is the plain query gradient."""
    backbone, head, episode = learner(tiny, kind)
    loss, *_ = meta.meta_loss(backbone, head, episode, inner, steps, 0.2)
    loss.backward()
    expected = brute_force_first_order(backbone, head, episode, inner, steps, 0.2)
    assert torch.allclose(flat_gradient([backbone, head]), expected, atol=1e-10) and expected.abs().max() > 1e-3


@pytest.mark.parametrize("inner", ["head", "all"])
def test_second_order_equals_finite_differences(tiny, inner):
    """The directional derivative of the whole meta loss, inner loop included, along a random direction."""
    backbone, head, episode = learner(tiny)
    parameters = [*backbone.parameters(), *head.parameters()]
    meta.meta_loss(backbone, head, episode, inner, 2, 0.2, second_order=True)[0].backward()
    g = torch.Generator().manual_seed(5)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=g) for p in parameters]
    analytic = sum((d * p.grad).sum() for d, p in zip(direction, parameters) if p.grad is not None).item()
    values = []
    for sign in (1, -1):
        for p, d in zip(parameters, direction):
            p.data += sign * 1e-7 * d
        values.append(meta.meta_loss(backbone, head, episode, inner, 2, 0.2)[0].item())
        for p, d in zip(parameters, direction):
            p.data -= sign * 1e-7 * d
    numeric = (values[0] - values[1]) / 2e-7
    first_order = flat_gradient([backbone, head])
    assert analytic == pytest.approx(numeric, rel=1e-4)
    for p in parameters:
        p.grad = None
    meta.meta_loss(backbone, head, episode, inner, 2, 0.2)[0].backward()
    assert not torch.allclose(first_order, flat_gradient([backbone, head]), rtol=1e-3)  # and the approximation is one


def test_words_head_touches_only_the_rows_asked_about(tiny):
    backbone, head, episode = learner(tiny, "words")
    meta.meta_loss(backbone, head, episode, "head", 2, 0.2)[0].backward()
    touched = head.out.weight.grad.abs().sum(dim=1) > 0
    assert touched.tolist() == [i in (0, 2, 5) for i in range(7)]


def test_slots_start_where_all_labels_are_alike():
    head = meta.MetaHead(8, "slots", 5, 0, torch.Generator().manual_seed(0))
    assert (head(torch.randn(3, 8)) == 0).all()


@pytest.mark.parametrize("inner, second_order", [("head", False), ("head", True), ("all", False), ("all", True)])
def test_flops_formula_against_pytorchs_counter(inner, second_order):
    config = Config(vocab_size=500, n_layer=2)
    decoder = Decoder(config)
    head = meta.MetaHead(96, "slots", 4, 0)
    nn.init.normal_(head.out.weight)
    ids, labels = torch.randint(500, (8, 32)), torch.arange(4)
    episode = data.Episode(ids, labels.repeat_interleave(2), ids[:4], labels, labels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        meta.meta_loss(decoder.model, head, episode, inner, 3, 0.1, second_order)[0].backward()
    formula = meta.meta_flops(config, head, 4, 2, 1, 32, inner, 3, second_order)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.05)


class Known(nn.Module):
    """A backbone whose states tell the word: state = embedding of a code hidden in the row's first token."""

    def __init__(self, words):
        super().__init__()
        self.table = torch.randn(words, 16, generator=torch.Generator().manual_seed(0))

    def forward(self, ids):
        return self.table[ids[:, :1]].expand(-1, ids.shape[1], -1)


def known_rows(shuffled):
    words = np.arange(12).repeat(8)
    ids = torch.from_numpy(words)[:, None].expand(-1, 5).clone()
    if shuffled:
        words = np.random.default_rng(0).permutation(words)
    return meta.FewShotRows(ids, words, np.arange(len(words)))


def test_fewshot_accuracy_of_too_few_words_is_left_out(tiny):
    rows = meta.FewShotRows(torch.zeros((0, 8), dtype=torch.int64), np.zeros(0, dtype=int), np.zeros(0, dtype=int))
    assert meta.evaluate_fewshot(tiny.model, None, rows, 4, 2, torch.device("cpu")) == {}


@pytest.mark.parametrize("shuffled", [False, True])
def test_fewshot_accuracy_is_perfect_or_chance(shuffled):
    """States that tell the word give accuracy 1 in every reading; the same states under shuffled labels give chance."""
    head = meta.MetaHead(16, "slots", 6, 0, torch.Generator().manual_seed(0))
    report = meta.evaluate_fewshot(Known(12), head, known_rows(shuffled), 6, 4, "cpu", inner_steps=50, inner_lr=0.3)
    assert report["fewshot_chance"] == pytest.approx(1 / 6) and report["fewshot_before"] < 0.35
    for key in ("fewshot_prototype", "fewshot_after"):
        assert abs(report[key] - 1 / 6) < 0.06 if shuffled else report[key] > 0.99
    assert 0 <= report["fewshot_stderr"] < 0.03


@pytest.mark.parametrize("kind, inner", [("words", "head"), ("slots", "all")])
def test_fewshot_accuracy_of_other_heads_and_inner_loops(kind, inner):
    """Under no_grad, as the training loop evaluates: a head with a row per word, and a loop that adapts the backbone."""
    head = meta.MetaHead(16, kind, 6, 12, torch.Generator().manual_seed(0))
    with torch.no_grad():
        report = meta.evaluate_fewshot(Known(12), head, known_rows(False), 6, 4, "cpu", inner, inner_steps=30, inner_lr=0.3)
    assert report["fewshot_after"] > 0.95 > report["fewshot_before"]


def test_fewshot_leaves_out_what_the_previous_token_tells():
    """If the previous token always tells the word, the look-up is perfect and nothing is left to ask."""
    rows = known_rows(False)
    rows.previous = rows.word
    report = meta.evaluate_fewshot(Known(12), None, rows, 6, 4, "cpu")
    assert report["fewshot_lookup"] == 1.0 and "fewshot_prototype" not in report


def test_fewshot_reads_before_the_mask_and_at_it():
    class Position(nn.Module):
        def forward(self, ids):
            return torch.arange(ids.shape[1]).float()[None, :, None].expand(len(ids), -1, 3)
    before, at = meta.fewshot_states(Position(), known_rows(False), "cpu")
    assert (before == 3).all() and (at == 4).all()
