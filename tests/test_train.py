"""Chapter 5: the schedule, the coin, and whole runs from their flags to what they write."""
import functools
import json

import numpy as np
import pytest
import torch

import train
from plumbing.checkpoints import load_checkpoint

# A run that a test below looks at from all sides.
HYBRID = ("--meta", "--steps", 120, "--eval-every", 60, "--probe-every", 50, "--inner-lr", 0.3)


def read_log(folder):
    """The lines of a run's log, each of which must be whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def updates_in(lines):
    return [line for line in lines if "kind" in line]


def evaluations_in(lines):
    return [line for line in lines if "val_loss" in line]


def contents(folder):
    return {path: path.read_bytes() for path in folder.iterdir()}


# ---- the schedule and the coin -----------------------------------------------------------------

@pytest.fixture(scope="module")
def args():
    return train.parse(["--meta", "--steps", "1000", "--lr", "0.01"])[0]


def test_schedule_warms_up_and_decays_to_zero(args):
    rates = [train.learning_rate(step, args) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01 / 150)
    assert max(rates) == rates[149]
    assert rates[149] == pytest.approx(0.01)
    assert rates[149 + 426] == pytest.approx(0.005, rel=0.01)
    assert 0 < rates[-1] < 2e-5


def test_coin_follows_seed_and_ratio(args):
    coins = [train.is_meta_step(step, args) for step in range(1000)]
    assert not any(coins[:250])
    assert 320 < sum(coins[250:]) < 430
    assert coins == [train.is_meta_step(step, args) for step in range(1000)]
    vanilla, _ = train.parse([])
    assert not any(train.is_meta_step(step, vanilla) for step in range(50))


# ---- a whole run -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hybrid(start_in, tmp_path_factory):
    """(the folder in which a hybrid run was started, its CompletedProcess)."""
    folder = tmp_path_factory.mktemp("hybrid")
    done = start_in(folder, "train.py", *HYBRID).finish()
    assert done.returncode == 0, done.stderr
    return folder, done


def test_hybrid_run_writes_its_files_and_says_what_it_reached(hybrid):
    folder, done = hybrid
    run = folder / "runs" / "11m-meta"
    names = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "ckpt.pt", "dynamics.png"} <= names
    config = json.loads((run / "config.json").read_text())
    assert config["head_parameters"] > 0
    assert config["parameters"] > 1e6
    assert config["n_way"] == 4
    assert len(config["corpus_sha256"]) == 64
    # What counting achieves, for the picture and the summary. A pair of words says more than one.
    assert 1 < config["bigram"] < config["unigram"] < np.log(2048)
    assert f"smoothed bigram {config['bigram']:.3f}" in done.stdout
    assert done.stdout.count("watch: python probe.py runs/11m-meta --live\n") == 1
    assert "python model.py" in done.stdout


def test_hybrid_run_logs_every_update(hybrid):
    lines = read_log(hybrid[0] / "runs" / "11m-meta")
    for line in lines:
        assert {"step", "tokens", "flops", "seconds"} <= set(line)
    updates = updates_in(lines)
    assert [line["step"] for line in updates] == list(range(1, 121))
    for line in updates:
        assert {"loss", "lr", "grad_norm", "tokens_per_second"} <= set(line)
    metas = [line for line in updates if line["kind"] == "meta"]
    assert 30 < len(metas) < 60
    for line in metas:
        assert {"n_way", "chance", "support_accuracy", "query_accuracy"} <= set(line)
    lm_tokens, meta_tokens = 4 * 32, 4 * 4 * 16
    assert updates[-1]["tokens"] == (120 - len(metas)) * lm_tokens + len(metas) * meta_tokens


def test_hybrid_run_logs_evaluations_and_probes_and_learns(hybrid):
    lines = read_log(hybrid[0] / "runs" / "11m-meta")
    evaluations = evaluations_in(lines)
    assert [line["step"] for line in evaluations] == [0, 60, 120]
    first, last = evaluations[0], evaluations[-1]
    assert first["val_loss"] == pytest.approx(np.log(2048), abs=0.1)
    assert last["val_loss"] < first["val_loss"] - 1
    assert {"bits_per_byte", "fewshot_prototype", "fewshot_chance", "fewshot_stderr",
            "fewshot_before", "fewshot_after"} <= set(last)
    probes = [line["step"] for line in lines if "head_entropy" in line]
    assert probes == [0, 1, 2, 4, 8, 16, 32, 50, 100, 120]


def test_a_finished_run_is_not_trained_again(hybrid, start_in):
    again = start_in(hybrid[0], "train.py", *HYBRID).finish()
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_a_trained_run_gives_samples_that_the_seed_repeats(hybrid, start_in):
    folder, _ = hybrid
    flags = ("runs/11m-meta", "--prompt", "The ", "--tokens", 30, "--seed", 1)
    shown = start_in(folder, "model.py", *flags).finish()
    assert shown.returncode == 0
    assert shown.stdout.startswith("The ")
    assert len(shown.stdout) > 20
    assert shown.stdout == start_in(folder, "model.py", *flags).finish().stdout


def test_a_checkpoint_holds_what_it_always_held(hybrid):
    """Runs of earlier versions can be continued while these names stay as they are."""
    run = hybrid[0] / "runs" / "11m-meta"
    stored = torch.load(run / "ckpt.pt", weights_only=True)
    assert set(stored) == {"step", "spent", "model", "head", "optimizer", "sha256"}
    assert set(stored["spent"]) == {"step", "lm_steps", "tokens", "flops", "seconds", "skipped"}
    last = updates_in(read_log(run))[-1]
    state = load_checkpoint(run)
    assert state["step"] == state["spent"]["step"] == 120
    assert state["spent"]["tokens"] == last["tokens"]
    assert state["spent"]["flops"] == last["flops"]
    assert state["spent"]["seconds"] == pytest.approx(last["seconds"])
    assert state["spent"]["skipped"] == 0
    kinds = [line["kind"] for line in updates_in(read_log(run))]
    assert state["spent"]["lm_steps"] == kinds.count("lm")


# ---- batches and compilation -------------------------------------------------------------------

def test_vanilla_and_hybrid_see_the_same_tokens_in_the_same_order(monkeypatch, train_here):
    seen = {"vanilla": [], "hybrid": []}
    original = train.data.lm_batch

    def record(batches, *arguments):
        ids, targets = original(*arguments)
        batches.append(ids)
        return ids, targets

    flags = ("--steps", 12, "--eval-every", 99, "--grad-accum", 2, "--probe-every", 99)
    for name, extra in (("vanilla", []), ("hybrid", ["--meta"])):
        monkeypatch.setattr(train.data, "lm_batch", functools.partial(record, seen[name]))
        assert train_here(*flags, "--name", name, *extra) == 0
    assert len(seen["vanilla"]) == 24
    assert 0 < len(seen["hybrid"]) < 24
    assert seen["vanilla"][0].shape == (2, 32)
    for a, b in zip(seen["vanilla"], seen["hybrid"]):
        assert torch.equal(a, b)


def test_a_compiled_run_compiles_three_shapes_and_learns_the_same(
        monkeypatch, train_here, tmp_path):
    """On a CPU, without a code generator. Next-token, support and query rows are compiled;
    evaluation and the sample are not."""
    shapes, losses = [], {}
    monkeypatch.setattr(train, "Config", functools.partial(train.Config, n_layer=2))

    def record(graph, inputs):
        for tensor in inputs:
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                shapes.append(tuple(tensor.shape))
        return graph.forward

    def unchanged(backbone):
        return backbone

    flags = ("--meta", "--meta-start", 0, "--n-query", 1, "--steps", 6, "--eval-every", 6,
             "--probe-every", 99)
    compiling = functools.partial(torch.compile, backend=record, dynamic=False)
    for name, compiled in (("plain", unchanged), ("compiled", compiling)):
        monkeypatch.setattr(train, "compiled", compiled)
        assert train_here(*flags, "--name", name) == 0
        losses[name] = [line["loss"] for line in updates_in(read_log(tmp_path / "runs" / name))]
    assert sorted(shapes) == [(4, 16), (4, 32), (8, 16)]
    assert losses["plain"] == pytest.approx(losses["compiled"], abs=1e-4)
    assert len(losses["plain"]) == 6
    # A compiled backbone has no second derivative, which adapting it needs.
    shapes.clear()
    torch.compiler.reset()
    assert train_here("--inner", "all", "--inner-steps", 2, "--second-order", *flags,
                      "--name", "all") == 0
    assert shapes == [(4, 32)]


def test_a_quiet_run_says_what_it_reached_and_no_more(train_here, capsys):
    assert train_here("--steps", 1, "--eval-every", 9, "--probe-every", 9) == 0
    printed = capsys.readouterr().out
    assert "watch:" not in printed
    assert printed.startswith("\nvalidation loss")


# ---- the folder of a run -----------------------------------------------------------------------

def test_another_configuration_in_the_folder_is_refused(hybrid, start_in):
    folder, _ = hybrid
    before = contents(folder / "runs" / "11m-meta")
    done = start_in(folder, "train.py", *HYBRID, "--lr", 0.5).finish()
    assert done.returncode == 2
    assert "--lr" in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(folder / "runs" / "11m-meta") == before


def test_a_folder_of_something_else_is_refused(script, tmp_path):
    notes = tmp_path / "runs" / "notes"
    notes.mkdir(parents=True)
    (notes / "diary.txt").write_text("mine")
    assert script("train.py", "--steps", 2, "--name", "notes").returncode == 2
    assert contents(notes) == {notes / "diary.txt": b"mine"}


def test_a_finished_run_goes_on_with_more_steps_while_it_has_a_checkpoint(script, tmp_path):
    mine = tmp_path / "runs" / "mine"
    assert script("train.py", "--steps", 2, "--name", "mine").returncode == 0
    more = script("train.py", "--steps", 4, "--name", "mine", "--resume")
    assert more.returncode == 0
    assert read_log(mine)[-1]["step"] == 4
    for path in mine.glob("ckpt*.pt"):
        path.unlink()
    done = script("train.py", "--steps", 4, "--name", "mine", "--resume")
    assert done.returncode == 2
    assert "gone" in done.stderr
    assert read_log(mine)[-1]["step"] == 4


# ---- several runs ------------------------------------------------------------------------------

def test_comparison_and_pictures_from_the_command_line(script, tmp_path):
    flags = ["--steps", 20, "--eval-every", 20, "--probe-every", 2]
    for kind in ([], ["--meta"]):
        done = script("train.py", *flags, *kind)
        assert done.returncode == 0
        # Without a terminal there is no bar, but a line for each evaluation.
        printed = [line for line in done.stdout.splitlines() if ": update " in line]
        said = [line.split(",")[0].split(": ")[1] for line in printed]
        assert said == ["update 0 of 20", "update 20 of 20"]
    done = script("probe.py", "runs/11m-vanilla", "runs/11m-meta")
    assert done.returncode == 0, done.stderr
    assert "rise and fall" in done.stdout
    result = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert set(result["phases"]["head entropy"]) == {"11m-vanilla", "11m-meta"}
    assert set(result["sooner_by"]["11m-meta"]) >= {
        "levels", "step", "tokens", "flops", "seconds", "papers_reading"}
    assert (tmp_path / "compare" / "compare.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "runs" / "11m-meta" / "phases.json").read_text())
    assert len(found["head entropy"]) == 12
    missing = script("probe.py", "runs/none")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
