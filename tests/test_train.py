import functools
import json

import numpy as np
import pytest
import torch

import train


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def args():
    return train.parse(["--meta", "--steps", "1000", "--lr", "0.01"])[0]


def test_schedule_warms_up_and_decays_to_zero(args):
    rates = [train.learning_rate(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 150) and max(rates) == rates[149] == pytest.approx(0.01)
    assert rates[149 + 426] == pytest.approx(0.005, rel=0.01) and 0 < rates[-1] < 2e-5


def test_coin_follows_seed_and_ratio(args):
    coins = [train.is_meta_step(step, args) for step in range(1000)]
    assert not any(coins[:250]) and 320 < sum(coins[250:]) < 430 and coins == [train.is_meta_step(step, args) for step in range(1000)]
    vanilla, _ = train.parse([])
    assert not any(train.is_meta_step(step, vanilla) for step in range(50))


def test_hybrid_run_writes_everything_and_learns(script, tmp_path):
    done = script("train.py", "--meta", "--steps", 120, "--eval-every", 60, "--probe-every", 50, "--inner-lr", 0.3)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "11m-meta"
    assert {"config.json", "metrics.jsonl", "ckpt.pt", "dynamics.png"} <= {p.name for p in folder.iterdir()}
    lines = read(folder)
    assert all({"step", "tokens", "flops", "seconds"} <= set(line) for line in lines)
    updates = [line for line in lines if "kind" in line]
    assert [line["step"] for line in updates] == list(range(1, 121))
    assert all({"loss", "lr", "grad_norm", "tokens_per_second"} <= set(line) for line in updates)
    metas = [line for line in updates if line["kind"] == "meta"]
    assert 30 < len(metas) < 60 and all({"n_way", "chance", "support_accuracy", "query_accuracy"} <= set(line) for line in metas)
    assert updates[-1]["tokens"] == (120 - len(metas)) * 4 * 32 + len(metas) * 4 * 4 * 16
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 60, 120]
    first, last = evaluations[0], evaluations[-1]
    assert first["val_loss"] == pytest.approx(np.log(2048), abs=0.1) and last["val_loss"] < first["val_loss"] - 1
    assert {"bits_per_byte", "fewshot_prototype", "fewshot_chance", "fewshot_stderr", "fewshot_before", "fewshot_after"} <= set(last)
    assert [line["step"] for line in lines if "head_entropy" in line] == [0, 1, 2, 4, 8, 16, 32, 50, 100, 120]
    config = json.loads((folder / "config.json").read_text())
    assert config["head_parameters"] > 0 and config["parameters"] > 1e6 and config["n_way"] == 4 and len(config["corpus_sha256"]) == 64
    assert "smoothed bigram" in done.stdout and "python model.py" in done.stdout
    again = script("train.py", "--meta", "--steps", 120, "--eval-every", 60, "--probe-every", 50, "--inner-lr", 0.3)
    assert again.returncode == 0 and "is finished" in again.stdout
    shown = script("model.py", folder, "--prompt", "The ", "--tokens", 30, "--seed", 1)
    assert shown.returncode == 0 and shown.stdout.startswith("The ") and len(shown.stdout) > 20
    assert shown.stdout == script("model.py", folder, "--prompt", "The ", "--tokens", 30, "--seed", 1).stdout


def test_vanilla_and_hybrid_see_the_same_tokens_in_the_same_order(monkeypatch, train_here):
    seen = {}
    original = train.data.lm_batch
    for name, extra in (("vanilla", []), ("hybrid", ["--meta"])):
        batches = seen[name] = []
        monkeypatch.setattr(train.data, "lm_batch", lambda *a: batches.append(original(*a)[0]) or original(*a))
        assert train_here("--steps", 12, "--eval-every", 99, "--grad-accum", 2, "--probe-every", 99, "--name", name, *extra) == 0
    assert len(seen["vanilla"]) == 24 and 0 < len(seen["hybrid"]) < 24 and seen["vanilla"][0].shape == (2, 32)
    assert all(torch.equal(a, b) for a, b in zip(seen["vanilla"], seen["hybrid"]))


def test_a_compiled_run_compiles_three_shapes_and_learns_the_same(monkeypatch, train_here, tmp_path):
    """On a CPU, without a code generator: next-token, support and query rows are compiled; evaluation and the sample are not."""
    shapes, losses = [], []
    monkeypatch.setattr(train, "Config", functools.partial(train.Config, n_layer=2))

    def record(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and not x.is_floating_point())
        return graph.forward
    flags = ("--meta", "--meta-start", 0, "--n-query", 1, "--steps", 6, "--eval-every", 6, "--probe-every", 99)
    for name, compiled in (("plain", lambda backbone: backbone), ("compiled", functools.partial(torch.compile, backend=record, dynamic=False))):
        monkeypatch.setattr(train, "compiled", compiled)
        assert train_here(*flags, "--name", name) == 0
        losses.append([line["loss"] for line in read(tmp_path / "runs" / name) if "kind" in line])
    assert sorted(shapes) == [(4, 16), (4, 32), (8, 16)] and losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 6
    shapes.clear(), torch.compiler.reset()
    assert train_here("--inner", "all", "--inner-steps", 2, "--second-order", *flags, "--name", "all") == 0
    assert shapes == [(4, 32)]  # a compiled backbone has no second derivative, which adapting it needs


def test_another_configuration_in_the_folder_is_refused(script, tmp_path):
    assert script("train.py", "--steps", 2, "--name", "mine").returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "runs" / "mine").iterdir()}
    done = script("train.py", "--steps", 2, "--name", "mine", "--lr", 0.5)
    assert done.returncode == 2 and "--lr" in done.stderr and done.stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in (tmp_path / "runs" / "mine").iterdir()} == before
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "diary.txt").write_text("mine")
    assert script("train.py", "--steps", 2, "--name", "notes").returncode == 2
    more = script("train.py", "--steps", 4, "--name", "mine", "--resume")
    assert more.returncode == 0 and read(tmp_path / "runs" / "mine")[-1]["step"] == 4
    for path in (tmp_path / "runs" / "mine").glob("ckpt*.pt"):
        path.unlink()
    done = script("train.py", "--steps", 4, "--name", "mine", "--resume")
    assert done.returncode == 2 and "gone" in done.stderr and read(tmp_path / "runs" / "mine")[-1]["step"] == 4


def test_comparison_and_pictures_from_the_command_line(script, tmp_path):
    flags = ["--steps", 20, "--eval-every", 20, "--probe-every", 2]
    for kind in ([], ["--meta"]):
        done = script("train.py", *flags, *kind)
        assert done.returncode == 0 and [line.split(",")[0].split(": ")[1] for line in done.stdout.splitlines() if ": update " in line] == [
            f"update {step} of 20" for step in (0, 20)]  # no terminal, no bar: a line for each evaluation
    done = script("probe.py", "runs/11m-vanilla", "runs/11m-meta")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert set(result["phases"]["head entropy"]) == {"11m-vanilla", "11m-meta"} and "rise and fall" in done.stdout
    assert set(result["sooner_by"]["11m-meta"]) >= {"levels", "step", "tokens", "flops", "seconds", "papers_reading"}
    assert (tmp_path / "compare" / "compare.png").stat().st_size > 10_000
    assert script("probe.py", "runs/11m-meta", "--live").returncode == 0  # a finished run is drawn once
    assert len(json.loads((tmp_path / "runs" / "11m-meta" / "phases.json").read_text())["head entropy"]) == 12
    missing = script("probe.py", "runs/none")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
