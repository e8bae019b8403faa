"""The settings without a flag (docs/experiments.py): each change does what it says, in training
and not in evaluations."""
import importlib.util
import json
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import train
from conftest import ROOT, SMALL
from model import Decoder
from plumbing import train_flags

spec = importlib.util.spec_from_file_location("experiments", ROOT / "docs" / "experiments.py")
experiments = importlib.util.module_from_spec(spec)
spec.loader.exec_module(experiments)


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Whatever a test changes is undone after it."""
    for name in ("build_models", "build_optimizer", "evaluate", "measure", "report", "meta_loss",
                 "meta_cost", "Config"):
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setattr(data, "MIN_COUNT", data.MIN_COUNT)


def built(change, value, corpus, *flags):
    """(decoder, meta head, args) of a small run after a change."""
    experiments.CHANGES[change](value)
    args, _ = train.parse([str(flag) for flag in (*SMALL, *flags)])
    return *train.build_models(args, corpus, torch.device("cpu")), args


def batch(corpus):
    return data.lm_batch(corpus.train, 0, 4, 32, 0)


def test_dropout_drops_its_share_and_keeps_the_mean(corpus):
    x, generator = torch.ones(400, 500), torch.Generator().manual_seed(1)
    block = torch.nn.Identity()
    dropped = experiments.drop(0.2, generator, block, (x,), x)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.005)
    block.eval()
    assert experiments.drop(0.2, generator, block, (x,), x) is x


def test_dropout_acts_on_every_block_in_training_only(corpus):
    plain, _, _ = built("layers", 12, corpus)
    noisy, _, _ = built("dropout", 0.5, corpus)
    ids = batch(corpus)[:, :-1]
    seen = []
    for layer in noisy.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda block, inputs, output: seen.append(output))
    noisy.model(ids)
    assert len(seen) == 24
    for output in seen:
        assert (output == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    noisy.eval()
    assert torch.equal(noisy.model(ids), plain.model(ids))


def test_weight_decay_reaches_the_optimizer(corpus):
    experiments.change_weight_decay(0.7)
    decoder, meta_head, _ = built("layers", 2, corpus, "--meta")
    groups = train.build_optimizer(decoder, meta_head).param_groups
    assert [group["weight_decay"] for group in groups] == [0.7, 0.7]


def test_layers(corpus):
    decoder, _, _ = built("layers", 4, corpus)
    assert len(decoder.model.layers) == 4 and decoder.config.n_layer == 4


def test_masked_inputs_are_inputs_only(corpus, monkeypatch):
    decoder, _, _ = built("mask-inputs", 0.15, corpus)
    seen = []
    monkeypatch.setattr(Decoder, "loss", lambda self, ids, targets, backbone: seen.append(
        (ids, targets)))
    rows = data.lm_batch(corpus.train, 0, 64, 32, 0)
    decoder.loss(rows[:, :-1], rows[:, 1:])
    decoder.eval()
    decoder.loss(rows[:, :-1], rows[:, 1:])
    (noisy, targets), (plain, _) = seen
    masked = noisy == corpus.mask_id
    assert masked.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert torch.equal(noisy[~masked], rows[:, :-1][~masked])
    assert torch.equal(targets, rows[:, 1:]) and torch.equal(plain, rows[:, :-1])


def test_name_words_asks_for_the_masked_words(corpus):
    decoder, meta_head, args = built("name-words", 1, corpus, "--meta")
    sampler = data.EpisodeSampler(corpus, 4, 2, 2, 16)
    episode = sampler.draw(0, 0)
    loss, _ = train.meta_loss(decoder.model, meta_head, episode, "head", 10, 0.1, False)
    # The same by hand: the word of a row is the one that the tokens hold where the mask is.
    rows = torch.cat([episode.support_ids, episode.query_ids])
    words = []
    for row in rows.numpy():
        known = row[:-1] != corpus.mask_id
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(corpus.train), 16)
        matches = np.flatnonzero((windows[:, :-1] == row[:-1])[:, known].all(axis=1))
        found = {int(windows[i, -1]) for i in matches if windows[i, -1] in corpus.index.words}
        words.append(found)
    log_probs = F.log_softmax(decoder(rows)[:, -1], dim=-1)
    targets = [min(found) for found in words]
    assert all(len(found) == 1 for found in words)
    expected = -log_probs[torch.arange(len(rows)), torch.tensor(targets)].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert meta_head.out.weight.grad is None
    # Rows of 16 tokens. Each costs 6 FLOPs per weight of the layers and token, and for attention
    # 12 per token, token that it attends to, dimension and layer. The output layer costs 6 per
    # weight and row.
    tokens, flops = train.meta_cost(args, decoder, meta_head)
    assert tokens == len(rows) * 16
    weights = 12 * (2 * 96 * 96 + 2 * 96 * 32 + 3 * 96 * 384)
    expected = tokens * (6 * weights + 12 * 16 * 96 * 12) + 6 * len(rows) * 96 * 2048
    assert flops == expected


def test_init_draws_all_matrices_alike(corpus):
    decoder, meta_head, _ = built("init", 0.02, corpus, "--meta")
    for name, weight in decoder.named_parameters():
        expected = 0.02 if weight.dim() > 1 else 0
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
    assert not decoder.model.embed_tokens.weight[corpus.mask_id].any()
    assert meta_head.trunk[0].weight.std().item() > 0.1


def test_more_probes_measure_the_mean_logit(corpus):
    """The gradient of the mean logit of one weight, by finite differences, and the rank of its
    matrix by torch.linalg.svdvals."""
    decoder, _, _ = built("layers", 2, corpus)
    experiments.change_more_probes(1)
    rows = batch(corpus)[:2]
    figures = train.measure(decoder, rows)["proportional_effective_rank"]
    assert all(weight.grad is None for weight in decoder.parameters())
    decoder(rows[:, :-1]).mean().backward()
    gate = decoder.model.layers[1].mlp.gate_proj.weight
    gradient = gate.grad[3, 5].item()
    with torch.no_grad():
        found = []
        for change in (0.5, -0.5):
            gate[3, 5] += change
            found.append(decoder(rows[:, :-1]).double().mean().item())
            gate[3, 5] -= change
    assert found[0] - found[1] == pytest.approx(gradient, rel=0.1)
    shares = []
    for weight in decoder.model.layers[1].mlp.parameters():
        p = torch.linalg.svdvals(weight.grad.double())
        p = p / p.sum()
        shares.append(torch.exp(-(p * p.log()).sum()).item() / min(weight.shape))
    assert figures["mlp_logit_grad"][1] == pytest.approx(sum(shares) / 3, rel=1e-3)
    assert figures["hidden_raw"][0] != figures["hidden"][0]
    assert {len(values) for values in figures.values()} == {2}


def test_shuffled_labels_are_a_permutation_of_the_support(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "meta_loss", lambda *args: seen.append(args[2]))
    built("shuffle-labels", 1, corpus, "--meta")
    episode = data.EpisodeSampler(corpus, 8, 4, 2, 16).draw(0, 0)
    train.meta_loss(None, None, episode, "head", 10, 0.1, False)
    [shuffled] = seen
    assert not torch.equal(shuffled.support_labels, episode.support_labels)
    assert torch.equal(shuffled.support_labels.sort().values, episode.support_labels)
    assert torch.equal(shuffled.query_labels, episode.query_labels)


def test_a_run_with_a_change_records_it_and_resumes_with_it(text_file, cache, tmp_path):
    flags = [str(flag) for flag in (*SMALL, "--data", text_file, "--runs", tmp_path, "--cache",
                                    cache, "--steps", 2, "--quiet")]
    assert experiments.train_with_changes(["layers=2"], [*flags, "--name", "plain"]) == 0
    changes = ["dropout=0.5", "layers=2"]
    assert experiments.train_with_changes(changes, [*flags, "--name", "noisy"]) == 0
    config = json.loads((tmp_path / "noisy" / "config.json").read_text())
    assert config["changes"] == "dropout=0.5 layers=2"
    result = experiments.collect(tmp_path)
    assert json.loads(experiments.as_json(result)) == result
    noisy, plain = result["runs"]
    assert noisy["changes"] == "dropout=0.5 layers=2" and noisy["next_token_steps"] == 2
    assert noisy["tokens_read"] == 2 * 4 * 32
    n_tokens = len(data.load(text_file, vocab_size=2048, cache=cache, quiet=True).train)
    assert noisy["passes"] == round(2 * 4 * 32 / n_tokens, 2)
    assert noisy["curve"][-1] == [2, noisy["tflop"], noisy["val_loss"]]
    # The first evaluation sees the same weights without dropout. The last sees other weights.
    assert noisy["curve"][0] == plain["curve"][0] and noisy["curve"][-1] != plain["curve"][-1]
    with pytest.raises(experiments.UserError, match="no finished runs"):
        experiments.collect(tmp_path / "noisy")
    longer = [*flags, "--name", "noisy", "--steps", "3", "--resume"]
    with pytest.raises(experiments.UserError, match="other flags"):
        experiments.train_with_changes(["layers=2"], longer)
    assert experiments.train_with_changes(changes, longer) == 0


@pytest.mark.parametrize("texts, complaint", [(["droput=1"], "droput is no change"),
                                              (["dropout=x"], "x is not a number"),
                                              (["shuffle-labels"], "add --meta")])
def test_a_change_that_does_not_exist(texts, complaint):
    with pytest.raises(experiments.UserError, match=complaint):
        experiments.train_with_changes(texts, [])


@pytest.mark.parametrize("name", experiments.PLANS)
def test_plans_have_only_flags_and_changes_that_exist(name):
    names = []
    for line in experiments.PLANS[name]():
        _, script, *flags = shlex.split(line)
        if script == "docs/experiments.py":
            args, _ = experiments.parse(flags)
            assert args.what == "train" and args.changes
            assert all(change.partition("=")[0] in experiments.CHANGES for change in args.changes)
            flags = args.flags
        else:
            assert script == "train.py"
        args, _ = train_flags.parse({"11m": 96}, flags)
        names.append(args.name)
    assert len(set(names)) == len(names) > 8


def test_articles_keep_their_side_of_the_split(tmp_path, monkeypatch):
    """Three sizes of text, and the same validation text for all."""
    monkeypatch.setattr(experiments, "TEXT_SIZES", (3, 10))
    articles = [f" = Title {i} = \n \n first{i} \n = = Section = = \n" + f"word{i} " * 50 + "\n"
                for i in range(60)]
    source = tmp_path / "wiki.txt"
    source.write_text("".join(articles))
    found = {}
    for file in experiments.write_articles([source], tmp_path / "prose"):
        sides = {True: [], False: []}
        for name, text in data.prepare.documents([file], "", quiet=True):
            sides[experiments.is_validation(name)].append(text)
        found[file.name] = sides
    small, large = found["3kb.jsonl"], found["10kb.jsonl"]
    assert small[True] == large[True] == articles[::10]
    rest = [article for i, article in enumerate(articles) if i % 10]
    assert large[False] == rest[:len(large[False])]
    for sides, size in ((small, 3000), (large, 10000)):
        n_bytes = sum(map(len, sides[False]))
        assert size <= n_bytes < size + max(map(len, articles))
    with pytest.raises(experiments.UserError, match="exists"):
        experiments.write_articles([source], tmp_path / "prose")
    monkeypatch.setattr(experiments, "TEXT_SIZES", (90,))
    with pytest.raises(experiments.UserError, match="name more WikiText files"):
        experiments.write_articles([source], tmp_path / "prose-90")


def log_of(losses, meta_steps=()):
    """The log of a run with one evaluation per update; each update costs 3 TFLOP and is logged."""
    lines = []
    for step, loss in enumerate(losses):
        cost = {"step": step, "tokens": 0, "flops": 3e12 * step, "seconds": 0}
        if step:
            lines.append(cost | {"kind": "meta" if step in meta_steps else "lm", "loss": 1.0})
        lines.append(cost | {"val_loss": loss})
    return lines


def test_figures_of_a_run_by_hand():
    config = {"name": "a", "seed": 3, "meta": True, "hybrid_ratio": 0.5, "data": "x",
              "vocab_size": 9, "corpus_sha256": "0", "steps": 4, "batch_size": 8, "seq_len": 10}
    found = experiments.figures_of(config, log_of([9.0, 5.0, 3.0, 4.0, 4.5], meta_steps=(3,)))
    assert found["val_loss"] == 4.5 and found["tflop"] == 12
    assert found["lowest"] == {"val_loss": 3.0, "step": 2, "tflop": 6.0}
    assert found["next_token_steps"] == 3 and found["tokens_read"] == 3 * 8 * 10
    assert found["curve"] == [[0, 0, 9.0], [1, 3, 5.0], [2, 6, 3.0], [3, 9, 4.0], [4, 12, 4.5]]
    assert found["probes"] == {} and found["changes"] == ""


def test_probe_curves_count_layers_by_shape():
    """Of two layers, one rises and falls and one falls. Entropy is the mean over heads."""
    lines = []
    for i, t in enumerate(np.linspace(0, 1, 21)):
        lines.append({"step": i, "proportional_effective_rank": {"hidden": [4 * t * (1 - t), -t]},
                      "head_entropy": {"normalised": [[t, 0.5], [0.5, 0.5]]}})
    curves = experiments.probe_curves(lines)
    assert curves["hidden"]["rise_and_fall"] == 1 and curves["hidden"]["fall_and_rise"] == 0
    assert curves["hidden"]["mean"][10] == pytest.approx((1 - 0.5) / 2)
    assert curves["entropy"]["mean"][-1] == pytest.approx((0.75 + 0.5) / 2)
    assert experiments.probe_curves(lines[:5]) == {}
