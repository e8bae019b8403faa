import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import probe
import report
from model import Config, Decoder


def test_effective_rank_of_known_matrices():
    for k in (1, 3, 7):
        padded = torch.zeros(9, 12)
        padded[:k, :k] = torch.eye(k)
        assert probe.effective_rank(padded) == pytest.approx(k) and probe.effective_rank(padded.T) == pytest.approx(k)
    assert probe.effective_rank(torch.randn(8, 1) @ torch.randn(1, 5)) == pytest.approx(1, abs=1e-3)
    assert probe.effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert probe.effective_rank(torch.zeros(3, 3)) == 0
    many = [torch.eye(3), torch.zeros(3, 7), torch.full((3, 3), math.nan), torch.eye(2, 5), torch.ones(3, 4)]
    assert probe.effective_ranks(many) == pytest.approx([3, 0, math.nan, 2, 1], abs=1e-6, nan_ok=True)


def test_effective_rank_is_accurate_on_a_real_layer():
    decoder = Decoder(Config(vocab_size=500), torch.Generator().manual_seed(0))
    decoder.loss(*torch.randint(500, (2, 4, 32), generator=torch.Generator().manual_seed(1))).backward()
    mlp = decoder.model.layers[3].mlp.up_proj
    for matrix in (mlp.weight, mlp.weight.grad):
        s = torch.linalg.svdvals(matrix.detach().double())
        p = s / s.sum()
        assert probe.effective_rank(matrix) == pytest.approx(math.exp(-(p * p.clamp_min(1e-300).log()).sum()), rel=1e-3)


def test_head_entropy_of_uniform_and_of_sharp_attention():
    q, k = torch.zeros(2, 6, 9, 4), torch.randn(2, 2, 9, 4)
    expected = torch.arange(1, 10).float().log().expand(6, 9)  # ln t over t visible positions
    assert torch.allclose(probe.head_entropy(q, k), expected, atol=1e-5)
    sharp = 1e3 * torch.eye(9).expand(2, 6, 9, 9)
    assert probe.head_entropy(sharp, sharp[:, :2]).abs().max() < 1e-3  # each position looks at itself


def test_head_entropy_twin_in_a_decoder():
    """By loops over heads and positions, with the keys shared by groups of heads."""
    q, k = torch.randn(1, 12, 6, 8), torch.randn(1, 4, 6, 8)
    ours = probe.head_entropy(q, k)
    for h in range(12):
        for t in range(6):
            p = torch.softmax(torch.stack([q[0, h, t] @ k[0, h // 3, s] for s in range(t + 1)]) / math.sqrt(8), dim=0)
            assert ours[h, t] == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


def test_measure_has_the_logs_keys_and_leaves_no_trace():
    decoder = Decoder(Config(vocab_size=500, n_layer=3), torch.Generator().manual_seed(0))
    batch = torch.randint(500, (2, 17), generator=torch.Generator().manual_seed(1))
    report = json.loads(json.dumps(probe.measure(decoder, batch)))
    assert {key: len(v) for key, v in report["effective_rank"].items()} == dict.fromkeys(("hidden", "attention", "mlp", "attention_grad", "mlp_grad"), 3)
    assert np.shape(report["head_entropy"]["nats"]) == np.shape(report["head_entropy"]["normalised"]) == (3, 12)
    assert all(0.7 < v <= 1 for row in report["head_entropy"]["normalised"] for v in row)  # untrained heads look everywhere
    with torch.no_grad():
        states = decoder.model.embed_tokens(batch[:, :-1])
        states = decoder.model.layers[0](states, decoder.model.cos[:16, None], decoder.model.sin[:16, None]).flatten(0, 1)
    assert report["effective_rank"]["hidden"][0] == pytest.approx(probe.effective_rank(states - states.mean(dim=0)), rel=1e-4)
    assert all(p.grad is None for p in decoder.parameters()) and not decoder.model.layers[0]._forward_hooks


def test_probe_steps_are_dense_first_and_even_later():
    steps = [s for s in range(451) if probe.is_probe_step(s, 100, 450)]
    assert steps == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200, 300, 400, 450]


# ---- phases ------------------------------------------------------------------------------------------------

STEPS = np.array([0, 1, 2, 4, 8, 16, 32, 64, *range(100, 2001, 100)])


def noise(seed, rho=0.5):
    rng, out = np.random.default_rng(seed), [0.0]
    for _ in STEPS[1:]:
        out.append(rho * out[-1] + rng.normal())
    return np.array(out)


def test_a_known_rise_and_fall_is_recovered():
    x = np.arange(len(STEPS))
    for peak, start, verdict in ((12, 0.5, "falls, rises, falls"), (18, 0.02, "rises and falls")):
        curve = 5 + 3 * np.interp(x, [0, 3, peak, 24, 27], [start, 0, 1, 0.25, 0.25])
        found = probe.phase(STEPS, curve + 0.02 * noise(peak))
        assert found["verdict"] == verdict and found["p"] < 0.005
        assert probe.phase(STEPS, -curve + 0.02 * noise(peak))["trough"] in STEPS[peak - 1:peak + 2]
        assert STEPS[2] <= found["bottom"] <= STEPS[4] and STEPS[peak - 1] <= found["peak"] <= STEPS[peak + 1]
        assert STEPS[22] <= found["reconverged"] <= STEPS[25]
        assert found["rise"] == pytest.approx(3, abs=0.6) and found["fall"] == pytest.approx(2.25, abs=0.5)


@pytest.mark.parametrize("shape, word", [(lambda t: t, "monotone, rising"), (lambda t: 1 - np.exp(-4 * t), "monotone, rising"),
                                         (lambda t: -t, "monotone, falling"), (lambda t: 0 * t, "flat")])
def test_monotone_curves_are_called_monotone(shape, word):
    t = np.linspace(0, 1, len(STEPS))
    assert probe.phase(STEPS, shape(t))["verdict"] == word
    if word != "flat":  # with autocorrelated noise a false alarm is rare
        verdicts = [probe.phase(STEPS, shape(t) + 0.04 * noise(seed))["verdict"] for seed in range(20)]
        assert verdicts.count(word) >= 19


def test_monotone_fit_is_the_least_squares_one():
    assert probe.monotone_fit(np.array([1.0, 3.0, 2.0, 2.0, 5.0])).tolist() == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert probe.monotone_fit(np.array([3.0, 2.0, 1.0])).tolist() == [2, 2, 2]


# ---- comparison --------------------------------------------------------------------------------------------

def synthetic_run(name, speed, seed=0, corpus="a", flops_per_step=10):
    """A run whose held-out loss is 10 - ln(1 + speed * step): `speed` times sooner than speed 1, exactly, if 1 + s ~ s."""
    settings = {"name": name, "steps": 1000, "size": "11m", "seed": seed, "corpus_sha256": corpus, "vocab_size": 99, "tokenizer": "bpe", "meta": speed > 1}
    lines = []
    for step in range(0, 1001, 10):
        loss = 10 - math.log(1 + speed * step)
        costs = {"step": step, "tokens": 5 * step, "flops": flops_per_step * step, "seconds": 2.0 * step}
        lines.append(costs | {"val_loss": loss, "bits_per_byte": loss / 4, "fewshot_prototype": 0.2, "fewshot_stderr": 0.01, "fewshot_chance": 0.1})
        lines.append(costs | {"kind": "lm", "loss": loss})
    return settings, lines


def test_sooner_by_recovers_a_known_ratio():
    groups = report.group_runs([synthetic_run("v", 1), synthetic_run("m", 1.6, flops_per_step=20)])
    entry = report.compare(groups)["sooner_by"]["m"]
    assert entry["step"]["mean"][-1] == pytest.approx(1.6, rel=0.01) and entry["tokens"]["mean"][-1] == pytest.approx(1.6, rel=0.01)
    assert entry["flops"]["mean"][-1] == pytest.approx(0.8, rel=0.01)
    assert entry["papers_reading"]["mean"][0] == pytest.approx(1.6, rel=0.1)


def test_seeds_are_grouped_and_spread_is_over_them():
    runs = [synthetic_run("v", 1), synthetic_run("v-s1", 1, seed=1), synthetic_run("m", 1.5), synthetic_run("m-s1", 1.7, seed=1)]
    groups = report.group_runs(runs)
    assert {label: len(members) for label, members in groups.items()} == {"v": 2, "m": 2}
    entry = report.compare(groups)["sooner_by"]["m"]
    assert entry["step"]["mean"][-1] == pytest.approx(1.6, rel=0.02) and entry["step"]["sd"][-1] == pytest.approx(0.2 / math.sqrt(2), rel=0.1)


def test_a_loss_never_reached_is_not_extrapolated():
    costs, losses = np.array([0.0, 10, 20]), np.array([5.0, 3, 2])
    assert report.first_reach(costs, losses, 4) == 5 and report.first_reach(costs, losses, 2.5) == 15
    assert math.isnan(report.first_reach(costs, losses, 1.9)) and math.isnan(report.first_reach(costs, losses, 6))
    ratios = report.sooner_by([(costs, losses)], [(costs, losses - 1)], [2.5, 1.5])
    assert ratios["mean"][0] == pytest.approx(15 / 7.5) and ratios["mean"][1] is None and ratios["sd"] is None


def test_comparison_begins_where_all_runs_have_been_evaluated_twice():
    """Before, a line from update 0 to a late second evaluation would tell of differences that are none."""
    settings, lines = synthetic_run("rare", 1, seed=0)
    rare = [line for line in lines if "val_loss" not in line or line["step"] % 500 == 0]
    entry = report.compare(report.group_runs([(settings | {"eval_every": 500}, rare), synthetic_run("often", 1)]))["sooner_by"]["often"]
    assert entry["levels"][0] <= 10 - math.log(501) and entry["levels"][-1] == pytest.approx(10 - math.log(1001))
    assert all(0.98 < ratio < 1.15 for ratio in entry["step"]["mean"])


def test_status_holds_the_newest_of_each_kind():
    """After an evaluation and a probe, whose lines hold no losses and no rate."""
    lines = [{"kind": "lm", "loss": 5.0, "tokens_per_second": 10.0}, {"kind": "meta", "loss": 3.0, "query_accuracy": 0.25, "chance": 0.125, "tokens_per_second": 2000.0},
             {"kind": "lm", "loss": 4.0, "skipped": 2, "tokens_per_second": 3000.0}, {"head_entropy": {}}, {"val_loss": 4.5}]
    assert report.status(lines) == "loss 4.00, val 4.50, query 25% (chance 12%), 2 skipped, 3,000 tok/s"
    assert report.status(lines[-1:]) == "val 4.50"


def test_interval_is_students_or_the_bootstraps():
    """Against Student's own example (1908): the extra hours of sleep of ten patients, mean 1.58, 95 % from 0.70 to 2.46."""
    sleep = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert report.interval(sleep, None) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
    assert report.interval(np.array([3.0]), np.arange(1001)) == pytest.approx((3.0, 25.0, 975.0))


def test_runs_of_one_seed_are_not_one_group():
    run = lambda name, seed: ({"name": name, "seed": seed, "lr": 0.1}, name)
    groups = report.group_runs([run("b-s1", 1), run("b", 0), run("changed", 0), run("c", 2)])
    assert {label: [name for _, name in members] for label, members in groups.items()} == {"b": ["b", "b-s1", "c"], "changed": ["changed"]}


def test_phases_are_counted_over_seeds():
    """Three layers and two seeds, counted by hand; a group in which a run lacks a curve (too few probes) is left out of it."""
    layers = lambda *verdicts: {"head entropy": [{"verdict": verdict} for verdict in verdicts]}
    first = layers("rises and falls", "monotone, rising", "falls and rises"), layers("falls, rises, falls", "rises and falls", "flat")
    counts = report.phase_counts({"v": [({}, phases) for phases in first], "m": [({}, layers("rises, falls, rises", "monotone, falling", "flat"))],
                                  "early": [({}, {})]})
    assert set(counts) == set(probe.CURVES) and not counts["rank of hidden states"]
    assert counts["head entropy"] == {"v": {"rise and fall": {"mean": 1.5, "sd": pytest.approx(0.5 ** 0.5)}, "fall and rise": {"mean": 1.0, "sd": 0.0}},
                                      "m": {"rise and fall": {"mean": 1.0, "sd": None}, "fall and rise": {"mean": 1.0, "sd": None}}}
    row, = (line for line in report.phase_count_table(counts).splitlines() if line.startswith("head entropy"))
    assert row.split() == ["head", "entropy", "v", "1.5", "+-", "0.7", "1.0", "+-", "0.0"]


def test_different_corpora_are_compared_in_bits_per_byte():
    result = report.compare(report.group_runs([synthetic_run("v", 1), synthetic_run("m", 2, corpus="b")]))
    assert "papers_reading" not in result["sooner_by"]["m"]  # nats of different vocabularies
    assert result["loss"] == "bits_per_byte" and result["groups"]["v"]["bits_per_byte"]["mean"] == pytest.approx((10 - math.log(1001)) / 4)


def test_damaged_logs_are_read_as_far_as_whole(tmp_path):
    settings, lines = synthetic_run("v", 1)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lines[4]["val_loss"] = math.nan
    text = "\n".join(map(json.dumps, lines)) + '\n[1, 2]\n{"step": "x"}\nnull\n{"step": 1010, "val_lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    _, read, notes = probe.read_run(tmp_path)
    assert len(read) == len(lines) and "4 unreadable lines" in notes[0]
    assert len(probe.series(read, "val_loss")[0]) == 100  # 101 evaluations, one of them NaN


def test_pictures_and_tables_are_made_from_short_and_partial_logs(tmp_path):
    for lines in ([], synthetic_run("v", 1)[1][:1], synthetic_run("v", 1)[1]):
        figure = probe.new_figure()
        probe.draw_dynamics(figure, lines, synthetic_run("v", 1)[0])
        probe.save_figure(figure, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_figures_of_the_tutorial_show_what_they_say():
    spec = importlib.util.spec_from_file_location("figures", Path(__file__).parent.parent / "assets" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    figure = probe.new_figure()
    figures.draw_probes(figure)
    ranks = [float(line.get_label().split()[-1]) for line in figure.axes[0].lines]
    assert ranks[0] == 96 and 48 < ranks[1] < 96 and 8 < ranks[2] < 16 and ranks[3] == 1  # alike, random, eight directions, one
    everywhere, about, one_back = (float(ax.get_title(loc="left").split()[-3]) for ax in figure.axes[1:4])
    assert everywhere == 1 and 0.5 < about < 0.9 and one_back < 0.1
    figure = probe.new_figure()
    figures.draw_fomaml(figure)
    first, last = (float(word) for word in figure.axes[1].get_title(loc="left").split() if word.count(".") == 1 and word[0] == "0")
    assert last < 0.7 * first < 0.7 * np.log(2)  # the outer loop moved the start to where few steps do
