"""Chapter 5: the schedule, the coin, and whole runs from their flags to what they write."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import train
from plumbing import machine
from plumbing.checkpoints import load_checkpoint
from plumbing.runs import Run

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


def test_the_coin_and_the_episodes_of_an_update_have_streams_of_their_own(args, corpus,
                                                                          monkeypatch):
    """With one stream for both, the episode would depend on how the coin fell."""
    sampler = data.EpisodeSampler(corpus, 4, 2, 1, 16)
    default_rng, seeds = np.random.default_rng, []

    def recorded(seed):
        seeds.append(tuple(default_rng(seed).random(4)))
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", recorded)
    train.is_meta_step(500, args)
    for micro_batch in range(6):
        sampler.draw(args.seed, 500, micro_batch)
    assert len(set(seeds)) == 7


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
    assert "beat" in done.stdout.splitlines()[-3]
    assert "Adapting" in done.stdout.splitlines()[-2]
    assert "one of the queries: " in done.stdout


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
    # Each update has its own time and rate.
    for before, line in zip(updates, updates[1:]):
        rate = (line["tokens"] - before["tokens"]) / (line["seconds"] - before["seconds"])
        assert line["tokens_per_second"] == pytest.approx(rate, rel=1e-6)
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


def test_the_command_at_the_end_of_the_summary_works(hybrid, start_in):
    folder, done = hybrid
    name, *flags = done.stdout.splitlines()[-1].split(": python ")[1].split()
    shown = start_in(folder, name, *flags).finish()
    assert shown.returncode == 0, shown.stderr
    # A run that beats the bigram is played, and the other one looked at; this one is close.
    shown = start_in(folder, "meta.py", "runs/11m-meta").finish()
    assert shown.returncode == 0, shown.stderr
    assert "meta head, 10 inner steps" in shown.stdout


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
        batches.append(original(*arguments))
        return batches[-1]

    flags = ("--steps", 12, "--eval-every", 99, "--grad-accum", 2, "--probe-every", 99)
    for name, extra in (("vanilla", []), ("hybrid", ["--meta"])):
        monkeypatch.setattr(train.data, "lm_batch", functools.partial(record, seen[name]))
        assert train_here(*flags, "--name", name, *extra) == 0
    assert len(seen["vanilla"]) == 24
    assert 0 < len(seen["hybrid"]) < 24
    assert seen["vanilla"][0].shape == (2, 33)
    for a, b in zip(seen["vanilla"], seen["hybrid"]):
        assert torch.equal(a, b)


def test_a_compiled_run_compiles_one_layer_for_three_shapes_and_learns_the_same(
        monkeypatch, train_here, tmp_path, capsys):
    """On a CPU, without a code generator. Next-token, support and query rows are compiled, before
    the first update; evaluation and the sample are not."""
    shapes, losses = [], {}
    monkeypatch.setattr(train, "Config", functools.partial(train.Config, n_layer=2))

    def record(graph, inputs):
        states = [tensor for tensor in inputs if tensor.dim() == 3 and tensor.shape[2] == 96]
        shapes.extend(tuple(tensor.shape[:2]) for tensor in states)
        return graph.forward

    def compile_and_record(module, dynamic):
        return original(module, dynamic=dynamic, backend=record)

    def first_update(run):
        assert len(shapes) in (0, len(expected)), "compiled during training"
        start_clock(run)

    original, start_clock = torch.compile, Run.start_clock
    monkeypatch.setattr(torch, "compile", compile_and_record)
    monkeypatch.setattr(Run, "start_clock", first_update)
    expected = [(4, 32), (8, 16), (4, 16)]
    flags = ("--meta", "--meta-start", 0, "--n-query", 1, "--steps", 6, "--eval-every", 6,
             "--probe-every", 99)
    for name, is_worth_it in (("plain", False), ("compiled", True)):
        monkeypatch.setattr(machine, "worth_compiling", lambda *args: is_worth_it)
        assert train_here(*flags, "--name", name) == 0
        losses[name] = [line["loss"] for line in updates_in(read_log(tmp_path / "runs" / name))]
        assert ("compiled in" in capsys.readouterr().out) == is_worth_it
    assert shapes == expected
    assert losses["plain"] == losses["compiled"]
    assert len(losses["plain"]) == 6
    # A compiled backbone has no second derivative, which adapting it needs.
    shapes.clear()
    expected = [(4, 32)]
    torch.compiler.reset()
    assert train_here("--inner", "all", "--inner-steps", 2, "--second-order", *flags,
                      "--name", "all") == 0
    assert shapes == expected


# ---- what can go wrong -------------------------------------------------------------------------

@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_device_is_told_in_one_line_by_any_process(rank, monkeypatch, train_here, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "evaluate", lambda *args: {})
    monkeypatch.setattr(train.Decoder, "loss", fail)
    monkeypatch.setattr(train.processes, "RANK", rank)
    with pytest.raises(SystemExit) as error:
        train_here("--steps", 2, "--grad-accum", 2, main=True)
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "2 sequences of 32 tokens" in said
    for flag in ("--batch-size", "--grad-accum", "--seq-len"):
        assert flag in said
    assert "--n-way" not in said


@pytest.mark.parametrize("is_finite", [True, False])
def test_an_update_that_is_not_finite_changes_nothing(is_finite):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    train.step_if(optimizer, torch.tensor(is_finite))
    assert torch.equal(weight.detach(), torch.ones(3)) != is_finite


@pytest.mark.parametrize("is_finite", [True, False])
def test_on_mps_the_host_decides_whether_to_step(is_finite):
    """On a stand-in, since the fused AdamW there may ignore found_inf."""
    steps = []
    optimizer = SimpleNamespace(step=lambda: steps.append(1))
    on_mps = SimpleNamespace(device=torch.device("mps"), item=lambda: is_finite)
    train.step_if(optimizer, on_mps)
    assert len(steps) == is_finite


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

def test_comparison_and_pictures_from_the_command_line(start, script, tmp_path):
    flags = ["--steps", 20, "--eval-every", 20, "--probe-every", 2]
    for job in [start("train.py", *flags, *kind) for kind in ([], ["--meta"])]:
        done = job.finish()
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
