"""Chapter 3: gradients of the meta steps against paper, brute force and differences; few-shot
accuracy of backbones that know the answer."""
import copy
import json
import math
import os
import shutil
import subprocess
import sys
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
import train
from conftest import ROOT, SMALL
from model import Config, Decoder
from plumbing import fewshot
from plumbing.checkpoints import save_checkpoint
from plumbing.commands import UserError

# Pseudo-terminals are of Unix.
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")


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


# ---- episodes of fewer ways --------------------------------------------------------------------

def test_a_small_text_is_asked_with_as_many_ways_as_it_has_words(monkeypatch):
    """12 words for a head of 32 slots; and 3 words, which are too few unless no more are wanted."""
    monkeypatch.setattr(meta, "FEWSHOT_EPISODES", 4)
    rows, head = known_rows(False), meta.MetaHead(16, "slots", 32, 0, seeded(0))
    report = meta.evaluate_fewshot(Known(12), head, rows, 32, 4, "cpu", inner_steps=50,
                                   inner_lr=0.3)
    assert report["fewshot_chance"] == 1 / 12
    assert report["fewshot_before"] == pytest.approx(1 / 12)
    assert report["fewshot_after"] > 0.99
    few = meta.FewShotRows(rows.ids[:24], rows.word[:24], rows.previous[:24])
    assert meta.evaluate_fewshot(Known(12), head, few, 32, 4, "cpu") == {}
    report = meta.evaluate_fewshot(Known(12), head, few, 2, 4, "cpu")
    assert report["fewshot_chance"] == 1 / 2


@pytest.mark.parametrize("n_way, per_word", [(32, 6), (3, 7), (2, 8)])
def test_a_small_text_has_fewer_queries_for_the_sake_of_ways(monkeypatch, n_way, per_word):
    """With 8 rows for each of 2 words, 7 for 3, 6 for 4 and 5 for 9, and 4 shots."""
    def rows_of(corpus, length, per_word):
        n_words = {8: 2, 7: 3, 6: 4, 5: 9}[per_word]
        words = np.arange(n_words).repeat(per_word)
        return meta.FewShotRows(torch.zeros((len(words), length)), words, words)

    monkeypatch.setattr(fewshot, "fewshot_rows", rows_of)
    rows = fewshot.evaluation_rows(None, 16, n_way, 4)
    assert Counter(rows.word.tolist())[0] == per_word


def test_a_slots_head_starts_with_as_many_rows_as_there_are_ways():
    head = meta.MetaHead(8, "slots", 5, 0, seeded(0))
    nn.init.normal_(head.out.weight, generator=seeded(1))
    states = torch.randn(6, 8, generator=seeded(2))
    scores = functional_call(head, head.start(torch.tensor([9, 4, 7])), (states,))
    assert torch.allclose(scores, head(states)[:, :3], atol=1e-4)
    scores.sum().backward()
    assert head.out.weight.grad[:3].abs().sum(dim=1).min() > 0
    assert (head.out.weight.grad[3:] == 0).all()
    # An episode of all its ways starts from the parameters themselves.
    assert head.start(torch.arange(5))["out.weight"] is head.out.weight


# ---- an episode to play ------------------------------------------------------------------------

def test_a_game_is_about_held_out_words_in_validation_text(corpus):
    windows = {}  # the 11 tokens before a place in the validation text -> the token there
    for at in range(11, len(corpus.val)):
        windows[tuple(corpus.val[at - 11:at])] = int(corpus.val[at])
    orders, games = set(), []
    for seed in range(6):
        episode = meta.draw_game(corpus, 12, 4, 2, 3, seed)
        assert episode.support_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert Counter(episode.query_labels.tolist()) == {0: 3, 1: 3, 2: 3, 3: 3}
        assert corpus.index.is_held_out[episode.words].all()
        ids = torch.cat([episode.support_ids, episode.query_ids])
        labels = torch.cat([episode.support_labels, episode.query_labels])
        for row, label in zip(ids.tolist(), labels.tolist()):
            word = corpus.index.words[episode.words[label]]
            assert row[-1] == corpus.mask_id
            assert windows[tuple(row[:-1])] == word
        assert len(np.unique(ids, axis=0)) == len(ids)
        orders.add(tuple(episode.query_labels.tolist()))
        games.append(episode)
    assert len(orders) > 4
    assert torch.equal(meta.draw_game(corpus, 12, 4, 2, 3, 5).query_ids, games[5].query_ids)


def test_a_game_of_too_many_words_is_refused(corpus):
    with pytest.raises(UserError, match="held-out words .* needs 500: lower --n-way"):
        meta.draw_game(corpus, 12, 500, 2, 3, 0)


def known_game():
    """An Episode of four of the words that Known knows, of 2 shots and 2 queries. The token before
    the mask tells the last word, 11, and the queries of word 4 have the one of word 11."""
    words = torch.tensor([3, 11, 4, 7])
    support = words.repeat_interleave(2)[:, None].expand(-1, 5).clone()
    query_labels = torch.tensor([1, 0, 2, 3, 3, 2, 0, 1])
    query = words[query_labels][:, None].expand(-1, 5).clone()
    support[:, -2] = torch.arange(20, 28)
    query[:, -2] = torch.arange(30, 38)
    support[2, -2] = 99
    query[query_labels == 1, -2] = 99
    query[2, -2] = 99
    return data.Episode(support, torch.arange(4).repeat_interleave(2), query, query_labels, words)


@pytest.mark.parametrize("kind, inner", [("slots", "head"), ("words", "head"), ("slots", "all")])
def test_players_of_a_game_whose_states_tell_the_words(kind, inner):
    head = meta.MetaHead(16, kind, 6 if kind == "slots" else 12, 12, seeded(0))
    episode = known_game()
    players = meta.all_players(Known(12), head, episode, "cpu", inner, (0, 1, 30), 0.3)
    names = ["previous-token look-up", "nearest prototype", "meta head, 0 inner steps",
             "meta head, 1 inner step", "meta head, 30 inner steps"]
    assert [player.name for player in players] == names
    right = episode.query_labels.tolist()
    assert players[0].guesses == [1, None, 1, None, None, None, None, 1]
    assert players[1].guesses == right
    assert players[4].guesses == right
    losses = [player.support_loss for player in players]
    assert losses[:2] == [None, None]
    assert losses[2] > losses[4]
    if kind == "slots":
        assert losses[2] > losses[3] > losses[4]
        assert losses[2] == pytest.approx(math.log(4))
        assert players[2].guesses == [0] * 8
    # The loss after 30 steps at once.
    if inner == "head":
        states = Known(12)(episode.support_ids)[:, -1]
        fast = meta.adapt(head, head.start(episode.words), states, episode.support_labels, 30, 0.3)
        loss = F.cross_entropy(functional_call(head, fast, (states,)), episode.support_labels)
        assert losses[4] == loss.item()


def test_a_vanilla_run_has_the_players_without_meta_head():
    players = meta.all_players(Known(12), None, known_game(), "cpu", "head", (0, 1), 0.3)
    assert [player.name for player in players] == ["previous-token look-up", "nearest prototype"]


def test_one_question_is_of_the_fixed_episodes(corpus):
    """A backbone that knows the word of each row: after adapting the answer is right."""
    rows = fewshot.evaluation_rows(corpus, 16, 4, 2)
    word_of = {tuple(ids.tolist()): int(word) for ids, word in zip(rows.ids, rows.word)}

    class Knows(nn.Module):
        def forward(self, ids):
            words = [word_of[tuple(row.tolist())] for row in ids]
            return Known(len(corpus.index.words)).table[words][:, None].expand(-1, 16, -1)

    head = meta.MetaHead(16, "slots", 4, 0, seeded(0))
    arguments = (corpus, rows, 4, 2, "cpu", "head", 50, 0.3)
    row, before, after, right = meta.one_question(Knows(), head, *arguments)
    support, query = meta.fewshot_episodes(rows, 4, 2, 1)[0]
    assert row == data.row_in_words(rows.ids[query[3, 0]], corpus)
    names = [corpus.pieces[word].strip() for word in corpus.index.words[rows.word[support[:, 0]]]]
    assert right == after == names[3]
    assert before == names[0]
    assert meta.one_question(Knows(), None, *arguments) is None


# ---- the command -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(corpus, text_file, cache, tmp_path_factory):
    """A folder of runs as train.py makes them, before their first update: slots, two (of two
    ways), words, and vanilla."""
    folder = tmp_path_factory.mktemp("played")
    for name, flags in (("slots", ["--meta"]), ("two", ["--meta", "--n-way", 2]),
                        ("words", ["--meta", "--head", "words"]), ("vanilla", [])):
        flags = ["--data", text_file, "--cache", cache, *SMALL, "--name", name, *flags]
        args, _ = train.parse([str(flag) for flag in flags])
        decoder, head = train.build_models(args, corpus, torch.device("cpu"))
        settings = train.describe(args, corpus, decoder, head, torch.device("cpu"))
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(settings))
        state = {} if head is None else head.state_dict()
        save_checkpoint(folder / name, {"step": 0, "model": decoder.state_dict(), "head": state})
    return folder


def changed_copy(runs, tmp_path, **changes):
    """A copy of the run "slots" whose config.json has other values."""
    copied = tmp_path / "copied"
    shutil.copytree(runs / "slots", copied)
    settings = json.loads((copied / "config.json").read_text()) | changes
    (copied / "config.json").write_text(json.dumps(settings))
    return copied


@pytest.fixture
def shown(runs, monkeypatch, capsys):
    """shown(run, *flags) -> (exit code, output, errors) of meta.py, without a terminal."""
    def run_main(run, *flags):
        monkeypatch.setattr("sys.argv", ["meta.py", str(runs / run), *map(str, flags)])
        code = 0
        try:
            meta.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()
    return run_main


@pytest.mark.parametrize("run, flags", [("slots", ()), ("words", ("--n-way", 5, "--seed", 1)),
                                        ("two", ("--n-way", 2, "--n-query", 3)),
                                        ("vanilla", ("--play",))])
def test_without_a_terminal_a_game_is_a_table(shown, run, flags):
    code, output, errors = shown(run, *flags)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].startswith("query ")
    steps = [line for line in lines if line.startswith("meta head")]
    assert len(steps) == (0 if run == "vanilla" else 5)
    assert ("no meta head" in output) == (run == "vanilla")
    assert "Support set" not in output


def test_a_run_that_adapts_the_backbone_is_played_so(shown, runs, tmp_path):
    """Its answers differ from those of a run that adapts the meta head alone, but not before
    adapting."""
    tables = []
    for inner in ("head", "all"):
        copied = changed_copy(runs, tmp_path / inner, inner=inner)
        code, output, _ = shown(copied, "--n-way", 2, "--n-query", 1, "--k-shot", 1)
        assert code == 0
        tables.append([line for line in output.splitlines() if line.startswith("meta head")])
    assert tables[0][0] == tables[1][0]
    assert tables[0][-1] != tables[1][-1]


def test_a_head_with_too_few_slots_says_what_to_change(shown):
    code, _, errors = shown("two")
    assert code == 2
    assert errors.endswith("the run's meta head has 2 slots, too few for 4 words: add --n-way 2\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("changes, said", [
    ({"corpus_sha256": "0" * 64}, "SHA-256"), ({"corpus_sha256": None}, "how it was trained"),
    ({"episode_len": 10 ** 12}, "how it was trained"), ({"episode_len": 1}, "how it was trained"),
    ({"head": "words"}, "does not fit the text"), ({"data": "nowhere.txt"}, "nowhere.txt")])
def test_a_run_that_does_not_fit_its_text_is_one_line(shown, runs, tmp_path, changes, said):
    code, output, errors = shown(changed_copy(runs, tmp_path, **changes))
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert said in errors


class AtTerminal:
    """`python meta.py ...` at a pseudo-terminal: said(text) waits until it has been printed."""

    def __init__(self, folder, *flags):
        self.ours, theirs = os.openpty()
        self.output = ""
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "meta.py", *flags], cwd=folder, stdin=theirs, stdout=theirs,
            stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)

    def read(self):
        """Read some more of the output; False at its end."""
        try:
            self.output += os.read(self.ours, 4096).decode()
        except OSError:  # the other end is closed
            return False
        return True

    def type(self, text, answers):
        """Type a text once the prompt has come for the n-th time."""
        while self.output.count("your answer: ") < answers:
            assert self.read(), self.output
        os.write(self.ours, text.encode())

    def finish(self):
        while self.read():
            pass
        os.close(self.ours)
        return self.process.wait(60)


def test_a_game_at_a_terminal(runs):
    """Two answers, one of them after a mistake, and the end of the input."""
    game = AtTerminal(runs, "words", "--play")
    for number, typed in enumerate(["A\n", "what\n", "b\n", "\x04"], start=1):
        game.type(typed, number)
    assert game.finish() == 0
    played, table = game.output.split("\nquery ")
    assert "Support set" in played
    assert played.count("Type a letter from A to D") == 1
    you, = [line for line in table.splitlines() if line.startswith("you ")]
    assert you.split()[1:9] == list("AB------")
    words = table.split("the words: ")[1].splitlines()[0]
    names = [pair.split(" = ")[1] for pair in words.split(", ")]
    assert not set(names) & set(played.split())


def test_ctrl_c_at_a_terminal_ends_in_one_line(runs):
    game = AtTerminal(runs, "words", "--play")
    game.type("A\n", 1)
    game.type("\x03", 2)
    assert game.finish() == 130
    assert "Traceback" not in game.output
    assert "the words" not in game.output
