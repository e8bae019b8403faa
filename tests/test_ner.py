"""Chapter 6: words and their states, tuning, entities and scores, and the command."""
import json
import random
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import model
import ner
from plumbing.checkpoints import save_checkpoint
from plumbing.tokenizer import load_encoding, save_tokens, train_bpe
from plumbing.treebanks import TAGS, TYPES, toy_treebank

NO_BAR = tqdm(disable=True)


def make_run(folder, seed, /, **settings):
    """A run folder as train.py leaves it: an untrained 11m decoder with a vocabulary of 400."""
    folder.mkdir(parents=True)
    decoder = model.Decoder(model.Config(96, 400), torch.Generator().manual_seed(seed))
    save_checkpoint(folder, {"step": 0, "model": decoder.state_dict()})
    settings = {"size": "11m", "vocab_size": 400, "seed": 0} | settings
    (folder / "config.json").write_text(json.dumps(settings))
    counts = {}
    for words, _ in toy_treebank("train"):
        for word in words:
            counts[" " + word] = counts.get(" " + word, 0) + 1
    save_tokens(train_bpe(counts, 100, quiet=True), folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "one", 1), make_run(folder / "two", 2, meta=True)]


@pytest.fixture(scope="module")
def encoding(runs):
    return load_encoding(runs[0])


@pytest.fixture(scope="module")
def backbone(runs):
    decoder, _ = model.load_run(runs[0])
    return decoder.model


# ---- words and states --------------------------------------------------------------------------

WORDS = ["Lincoln", "'s", "Füße", "日本", "a", "😀x", "co-op", "Zzyzx"]


@pytest.mark.parametrize("max_len", [128, 9])
def test_words_are_read_at_their_first_token(encoding, max_len):
    tags = ["B-PER"] + ["O"] * 6 + ["B-LOC"]
    [sentence] = ner.encode([(WORDS, tags)], encoding, max_len)
    tokens = encoding.encode_ordinary(" ".join(WORDS))
    ends = np.cumsum([len(encoding.decode_single_token_bytes(token)) for token in tokens])
    expected = []
    for i in range(len(WORDS)):
        first_byte = len(" ".join(WORDS[:i] + [""]).encode())
        behind = [t for t, end in enumerate(ends) if end > first_byte]
        if behind[0] < max_len:
            expected.append(behind[0])
    assert sentence.position.tolist() == expected
    assert (len(expected) < len(WORDS)) == (max_len == 9)
    assert sentence.ids.tolist() == tokens[:max_len]
    assert [TAGS[i] for i in sentence.label] == sentence.tags[:len(expected)]


def members(lists):
    """The sets of sentences that meet in a batch."""
    return {frozenset(map(id, batch)) for batch in lists}


def test_batches_take_each_sentence_once_and_waste_little(encoding):
    sentences = ner.encode(toy_treebank("train"), encoding)
    rng = np.random.default_rng(0)
    fixed = ner.batches(sentences, 16)
    drawn, other = ner.batches(sentences, 16, rng), ner.batches(sentences, 16, rng)
    for lists in (fixed, drawn, other):
        taken, padded = [], 0
        for batch in lists:
            taken += map(id, batch)
            padded += len(batch) * max(len(s.ids) for s in batch)
        assert sorted(taken) == sorted(map(id, sentences))
        assert padded < 1.35 * sum(len(s.ids) for s in sentences)
    assert len(members(drawn) & members(other)) < 3
    # The short ones do not come first.
    lengths = [len(batch[0].ids) for batch in drawn]
    assert abs(np.corrcoef(lengths, range(len(drawn)))[0, 1]) < 0.6


def test_states_are_those_of_a_sentence_alone(backbone, encoding):
    sentences = ner.encode(toy_treebank("test")[:40], encoding)
    with torch.no_grad():
        together = ner.frozen_states(backbone, sentences)
        alone = torch.cat([backbone(s.ids[None])[0, s.position] for s in sentences])
    # Those of the batch come after padding, and on some CPUs from bf16.
    assert torch.allclose(together, alone, atol=0.05)
    assert together.std() > 0.5
    # A second time they are remembered: no backbone is needed.
    assert torch.equal(ner.frozen_states(None, sentences), together)


# ---- tuning ------------------------------------------------------------------------------------

def f1_on(sentences, tagger):
    counts = ner.count(sentences, tagger.predict(sentences))
    return ner.scores(counts.sum(axis=(0, 1)))[2]


@pytest.fixture(scope="module")
def toy(encoding):
    """(train, dev) of the made-up treebank, encoded."""
    return [ner.encode(toy_treebank(split), encoding) for split in ("train", "dev")]


@pytest.mark.parametrize("mode, lr, least", [("head", 0.1, 0.3), ("full", 1e-3, 0.8)])
def test_tuning_learns_and_keeps_the_best_epoch(backbone, toy, mode, lr, least):
    train, dev = toy
    before = [p.clone() for p in backbone.parameters()]
    tagger, losses, f1, epoch = ner.tune(backbone, mode, train, dev, 3, lr, 16, 0, NO_BAR)
    assert losses.shape == (75,)
    assert losses[:5].mean() > 2 * losses[-5:].mean()
    assert 1 <= epoch <= 3
    assert f1 == f1_on(dev, tagger)
    assert f1 > least
    # The run itself is not touched.
    assert all(map(torch.equal, before, backbone.parameters()))


def test_best_epoch_is_by_dev_f1_and_last_without_dev(backbone, toy, monkeypatch):
    train, dev = toy
    # tp, fp, fn of each epoch: the second is the first of the best
    script = [[1, 9, 9], [5, 1, 1], [4, 1, 1], [5, 1, 1]]
    seen = []

    def count(sentences, predicted):
        seen.append(predicted)
        return np.array([[script[len(seen) - 1]]])
    monkeypatch.setattr(ner, "count", count)
    tagger, _, f1, epoch = ner.tune(backbone, "head", train, dev, 4, 3e-2, 16, 0, NO_BAR)
    assert (epoch, f1) == (2, pytest.approx(5 / 6))
    assert tagger.predict(dev) == seen[1]
    assert seen[1] not in (seen[0], seen[2], seen[3])
    _, _, f1, epoch = ner.tune(backbone, "head", train, None, 2, 3e-2, 16, 0, NO_BAR)
    assert (f1, epoch) == (None, 2)


def test_tuning_is_a_function_of_the_seed(backbone, toy):
    train, dev = toy
    curves = []
    for seed in (0, 0, 1):
        _, losses, _, _ = ner.tune(backbone, "head", train, dev, 1, 3e-2, 16, seed, NO_BAR)
        curves.append(losses)
    assert np.array_equal(curves[0], curves[1])
    assert not np.array_equal(curves[0], curves[2])


def test_words_beyond_max_len_are_missed(backbone, toy, encoding):
    train, dev = toy
    tagger, _, _, _ = ner.tune(backbone, "full", train, dev, 2, 1e-3, 16, 0, NO_BAR)
    cut = ner.encode(toy_treebank("dev"), encoding, max_len=4)
    predicted = tagger.predict(cut)
    assert [len(tags) for tags in predicted] == [len(s.words) for s in cut]
    for tags, sentence in zip(predicted, cut):
        assert set(tags[len(sentence.position):]) <= {"O"}
    # The gold entities are all still there.
    found, _, missed = ner.count(cut, predicted).sum(axis=(0, 1))
    gold = sum((s.tags for s in cut), [])
    assert found + missed == sum(tag[0] == "B" for tag in gold)
    assert f1_on(cut, tagger) < f1_on(dev, tagger) - 0.2


# ---- entities and scores -----------------------------------------------------------------------

def kind_at(tags, i):
    """The type of word i, "" for O and outside the sentence."""
    return tags[i][2:] if 0 <= i < len(tags) else ""


def is_entity(tags, start, end):
    """Whether an entity begins at start and ends before end, by the definition."""
    kind = kind_at(tags, start)
    continues_nothing = tags[start][0] == "I" and kind_at(tags, start - 1) != kind
    begins = tags[start][0] == "B" or continues_nothing
    inside = all(tags[i] == f"I-{kind}" for i in range(start + 1, end))
    ends = end == len(tags) or tags[end] != f"I-{kind}"
    return bool(kind and begins and inside and ends)


def entities_by_definition(tags):
    """Every (type, start, end) that meets the definition, tried one by one."""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            if is_entity(tags, start, end):
                found.add((kind_at(tags, start), start, end))
    return found


def numbered_entities(sentences, kinds=TYPES):
    """{(sentence, type, start, end)} of the tags of many sentences, of some types only."""
    found = set()
    for i, tags in enumerate(sentences):
        for kind, start, end in entities_by_definition(tags):
            if kind in kinds:
                found.add((i, kind, start, end))
    return found


def random_tags(rng, longest=9):
    return [rng.choice(TAGS) for _ in range(rng.randint(0, longest))]


def test_entities_agree_with_their_definition():
    rng = random.Random(0)
    for _ in range(5000):
        tags = random_tags(rng)
        assert ner.entities(tags) == entities_by_definition(tags), tags


def test_entities_by_hand():
    tags = ["I-PER", "I-LOC", "I-LOC", "B-LOC", "B-ORG", "I-PER", "O", "I-PER"]
    assert ner.entities(tags) == {("PER", 0, 1), ("LOC", 1, 3), ("LOC", 3, 4), ("ORG", 4, 5),
                                  ("PER", 5, 6), ("PER", 7, 8)}


def scores_by_brute_force(gold, found):
    """[precision, recall, F1] of two sets of entities."""
    right = len(gold & found)
    precision = right / len(found) if found else 0
    recall = right / len(gold) if gold else 0
    f1 = 2 * precision * recall / (precision + recall) if right else 0
    return [precision, recall, f1]


def altered(tags, rng):
    """Tags of which three in ten are drawn anew."""
    return [tag if rng.random() < 0.7 else rng.choice(TAGS) for tag in tags]


def test_scores_agree_with_brute_force():
    rng = random.Random(1)
    for _ in range(100):
        gold = [random_tags(rng) for _ in range(20)]
        found = [altered(tags, rng) for tags in gold]
        sentences = [ner.Sentence([], tags, None, None, None) for tags in gold]
        counts = ner.count(sentences, found)
        rows = [*counts.sum(axis=0), counts.sum(axis=(0, 1))]
        for row, kinds in zip(rows, (["PER"], ["ORG"], ["LOC"], TYPES), strict=True):
            expected = scores_by_brute_force(numbered_entities(gold, kinds),
                                             numbered_entities(found, kinds))
            assert ner.scores(row) == pytest.approx(expected)
            assert ner.f1_of(row) == pytest.approx(expected[2])


def test_nothing_there_and_nothing_found_scores_zero():
    assert ner.scores(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2


# ---- the command -------------------------------------------------------------------------------

TOY = ("--train", "toy", "--test", "toy", "--epochs", 1, "--lr", 0.03)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(*flags) -> (exit code, stdout, stderr) of ner.py in an empty folder, without a
    network."""
    def offline(url, timeout):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        flags = ("--quiet", "--cache", tmp_path / "cache", "--device", "cpu", *flags)
        monkeypatch.setattr(sys, "argv", ["ner.py", *map(str, flags)])
        try:
            ner.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


def read_cells(folder="ner"):
    return json.loads((Path(folder) / "ner.json").read_text())


def never(*_):
    raise AssertionError("a finished cell was computed again")


def mean_and_spread(values):
    """As the table has it."""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def read_predictions(path):
    """([words], [gold], [predicted]) of all sentences in a .tsv file."""
    columns = [], [], []
    for block in path.read_text().rstrip("\n").split("\n\n"):
        rows = [line.split("\t") for line in block.split("\n")]
        for k, column in enumerate(columns):
            column.append([row[k] for row in rows])
    return columns


def check_cell(cell):
    """A cell of the toy treebank against its .tsv file."""
    assert {"run", "train", "test", "mode", "seed", "precision", "recall", "f1", "types",
            "sentences", "t90", "auc", "slope"} <= set(cell)
    name = f"{cell['run']}__toy__head__seed{cell['seed']}__toy.tsv"
    words, gold, predicted = read_predictions(Path("ner") / name)
    assert list(zip(words, gold)) == toy_treebank("test")
    gold, found = numbered_entities(gold), numbered_entities(predicted)
    right = len(gold & found)
    assert cell["f1"] == pytest.approx(2 * right / (len(gold) + len(found)))
    assert cell["sentences"] == 100
    assert set(cell["types"]) == set(TYPES)
    assert np.sum(cell["counts"], axis=0).tolist() == [
        right, len(found) - right, len(gold) - right]


def test_command_end_to_end(command, runs, monkeypatch):
    flags = (*runs, "--scratch", *TOY, "--mode", "head", "--seeds", 2, "--predictions")
    code, out, _ = command(*flags)
    cells = read_cells()
    assert code == 0
    assert [cell["run"] for cell in cells] == [
        "one", "one", "two", "two", "scratch-11m", "scratch-11m"]
    assert Path("ner/ner.png").read_bytes()[:4] == b"\x89PNG"
    for cell in cells:
        check_cell(cell)
    f1 = {}
    for cell in cells:
        f1.setdefault(cell["run"], []).append(100 * cell["f1"])
    for run, values in f1.items():
        assert f"| head | toy | {run} | {mean_and_spread(values)} |" in out
    difference = np.mean(f1["two"]) - np.mean(f1["one"])
    assert f"| head | toy | two − one | {difference:+.1f} [" in out
    monkeypatch.setattr(ner, "tune", never)
    assert command(*flags)[:2] == (0, out)


def test_stopped_job_continues_to_the_same_result(command, runs, monkeypatch):
    assert command(*runs, *TOY, "--seeds", 2, "--out", "whole")[0] == 0
    real, calls = ner.tune, []

    def tune(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(ner, "tune", tune)
    code, _, err = command(*runs, *TOY, "--seeds", 2, "--out", "parts")
    assert code == 130
    assert "To continue, give the same command again" in err
    assert err.count("\n") == 1
    assert len(read_cells("parts")) == 1
    assert command(*runs, *TOY, "--seeds", 2, "--out", "parts")[0] == 0
    assert len(calls) == 2 + 3
    assert read_cells("parts") == read_cells("whole")


def test_cell_of_other_settings_or_weights_is_refused(command, runs, tmp_path):
    assert command(runs[0], *TOY)[0] == 0
    before = Path("ner/ner.json").read_bytes()
    other = make_run(tmp_path / "again" / "one", 3)
    for flags, what in (((runs[0], *TOY, "--epochs", 2), "epochs 1 there, 2 now"),
                        ((runs[0], *TOY, "--lr", 0.01), "lr 0.03 there"),
                        ((runs[0], *TOY, "--max-len", 9), "max_len"),
                        ((other, *TOY), "checkpoint")):
        code, _, err = command(*flags)
        assert code == 2
        assert what in err
        assert "--out" in err
        assert err.count("\n") == 1
    assert Path("ner/ner.json").read_bytes() == before


def write_as_the_earlier_version(strict, subtoken):
    """Rewrite ner/ner.json as the earlier version left it. That had two more flags, --strict and
    --subtoken, and its cells remember them. No other settings were kept than these."""
    cells = read_cells()
    for cell in cells:
        settings = {"subtoken": subtoken, "strict": strict}
        for key in ("epochs", "batch_size", "max_len", "lr", "checkpoint", "train", "dev", "test"):
            settings[key] = cell["settings"][key]
        cell["settings"] = settings
    Path("ner/ner.json").write_text(json.dumps(cells))


def test_cell_of_the_earlier_version_is_accepted(command, runs, monkeypatch):
    code, out, _ = command(runs[0], *TOY)
    assert code == 0
    write_as_the_earlier_version(strict=False, subtoken="first")
    before = Path("ner/ner.json").read_bytes()
    monkeypatch.setattr(ner, "tune", never)
    assert command(runs[0], *TOY)[:2] == (0, out)
    assert read_cells() == json.loads(before)


@pytest.mark.parametrize("strict, subtoken, what", [
    (True, "first", "strict True there, False now"),
    (False, "last", "subtoken last there, first now")])
def test_cell_of_the_earlier_versions_flags_is_refused(command, runs, strict, subtoken, what):
    assert command(runs[0], *TOY)[0] == 0
    write_as_the_earlier_version(strict, subtoken)
    before = Path("ner/ner.json").read_bytes()
    code, out, err = command(runs[0], *TOY)
    assert (code, out) == (2, "")
    assert what in err
    assert "--out" in err
    assert err.count("\n") == 1
    assert Path("ner/ner.json").read_bytes() == before


def test_control_is_the_untrained_decoder(runs):
    models, groups = ner.load_models(runs, scratch=True)
    assert groups == {name: {0: name} for name in models}
    assert list(models) == ["one", "two", "scratch-11m"]
    start = model.Decoder(model.Config(96, 400), torch.Generator().manual_seed(0))
    control, _ = models["scratch-11m"]
    assert all(map(torch.equal, start.parameters(), control.parameters()))


def test_seeds_of_pretraining_are_one_group(command, runs, tmp_path):
    """A group's row is of all its runs, in whatever order they are given. The difference is seed
    by seed, of the seeds that both groups have."""
    one_s5 = make_run(tmp_path / "one-s5", 3, seed=5)
    two_s3 = make_run(tmp_path / "two-s3", 4, seed=3, meta=True)
    two_s5 = make_run(tmp_path / "two-s5", 5, seed=5, meta=True)
    code, out, _ = command(two_s5, one_s5, runs[0], runs[1], two_s3, *TOY, "--scratch")
    assert code == 0
    f1 = {cell["run"]: 100 * cell["f1"] for cell in read_cells()}
    groups = {"two (3 runs)": ("two", "two-s3", "two-s5"),
              "one (2 runs)": ("one", "one-s5"),
              "scratch-11m (3 runs)": ("scratch-11m", "scratch-11m-s3", "scratch-11m-s5")}
    assert set(f1) == set(sum(groups.values(), ()))
    for label, names in groups.items():
        values = [f1[name] for name in names]
        assert f"| head | toy | {label} | {mean_and_spread(values)} |" in out
    pairs = [f1["one"] - f1["two"], f1["one-s5"] - f1["two-s5"]]
    mean, half = np.mean(pairs), 12.706 * np.std(pairs, ddof=1) / 2 ** 0.5
    words = re.search(r"one − two \| (\S+) \[(\S+), (\S+)\]", out).groups()
    assert [float(x) for x in words] == pytest.approx([mean, mean - half, mean + half], abs=0.1)
    assert "pairs: two and one, two-s5 and one-s5)" in out


def test_several_treebanks_share_one_tuning(command, runs, monkeypatch):
    for name in ("tl_trg", "en_pud"):
        content = b"1\tAnna\tB-PER\t-\n2\tof\tO\n3\tParis\tB-LOC\n4\tHilton\tI-LOC\n"
        Path(f"{name}-ud-test.iob2").write_bytes(content)
    real, calls = ner.tune, []

    def tune(*args):
        calls.append(args)
        return real(*args)
    monkeypatch.setattr(ner, "tune", tune)
    code, out, _ = command(runs[0], *TOY, "--test", "toy", "tl_trg", "en_pud", "tl_trg",
                           "--uner", ".")
    assert code == 0
    assert len(calls) == 1
    assert "| toy | tl_trg | en_pud | t90" in out


@pytest.mark.parametrize("flags, words", [
    (["--train", "klingon"], ["klingon", "en_ewt"]),
    (["--train", "tl_trg"], ["tl_trg"]),
    (["--test", "all"], ["all"]),
    (["--seeds", -1], ["--seeds"]),
    (["--epochs", 0], ["--epochs"]),
    (["--max-len", 4000], ["--max-len"]),
    (["--lr", "nan"], ["--lr"]),
    (["--uner", "nowhere"], ["nowhere"]),
    (["--uner", "bad", "--test", "en_ewt"], ["en_ewt-ud-test.iob2, line 2"]),
    (["--test", "de_pud"], ["de_pud-ud-test.iob2", "cache", "no network",
                            "https://github.com/UniversalNER/UNER_German-PUD"]),
    (["--out", "mismatched"], ["mismatched/ner.json", "--out"]),
    (["--device", "abacus"], ["abacus"])])
def test_mistakes_are_one_line(command, runs, flags, words):
    Path("bad").mkdir()
    Path("bad/en_ewt-ud-test.iob2").write_bytes(b"1\tfine\tO\n2 not\n")
    Path("mismatched").mkdir()
    Path("mismatched/ner.json").write_text('{"run": "one"}')
    code, out, err = command(runs[0], *TOY, *flags)
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def test_run_folders_are_checked_before_work(command, runs, tmp_path):
    code, _, err = command(runs[0], tmp_path, *TOY)
    assert code == 2
    assert "not a run" in err
    assert err.count("\n") == 1
    twin = make_run(tmp_path / "twin" / "one", 4)
    code, _, err = command(runs[0], twin, *TOY)
    assert code == 2
    assert "two runs are called one" in err
    assert not Path("ner").exists()
