import base64
import json
import random
import re
import sys
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import checkpoint
import data
import model
import ner
from conftest import ROOT

UNER = ROOT.parent / "shared" / "uner"
NO_BAR = tqdm(disable=True)
LINES = b"""# sent_id = 1
1\tAnna\tB-PER\t-\tx
2\tof\tO
3-4\tParis\tB-LOC\t-\tx
3.1\tHilton\tI-LOC\t-\tx
\t
# sent_id = 2
1\tFrench\tB-OTH\t-\tx\r
2\twine\tB-O\t-\tx\r
3\ta\xe2\x80\xa8b\t_\r

"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These batches are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_run(folder, seed, /, **settings):
    """A run folder as train.py leaves it: an untrained 11m decoder with a vocabulary of 400."""
    folder.mkdir(parents=True)
    decoder = model.Decoder(model.Config(96, 400), torch.Generator().manual_seed(seed))
    checkpoint.save_checkpoint(folder, {"step": 0, "model": decoder.state_dict()})
    (folder / "config.json").write_text(json.dumps({"size": "11m", "vocab_size": 400, "seed": 0} | settings))
    words = Counter(" " + word for words, _ in ner.toy_treebank("train") for word in words)
    tokens = data.train_bpe(words, 100, quiet=True)
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "one", 1), make_run(folder / "two", 2, meta=True)]


@pytest.fixture(scope="module")
def encoding(runs):
    return data.load_encoding(runs[0])


@pytest.fixture(scope="module")
def backbone(runs):
    return model.load_run(runs[0])[0].model


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command(*flags) -> (exit code, stdout, stderr) of ner.py in an empty folder, without a network."""
    def offline(url, timeout):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(ner.urllib.request, "urlopen", offline)
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["ner.py", "--quiet", "--cache", str(tmp_path / "cache"), "--device", "cpu", *map(str, flags)])
        try:
            ner.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return call


# ---- treebanks ---------------------------------------------------------------------------------------------

def test_reads_as_the_official_reader():
    assert ner.parse_iob2(LINES, "file") == [
        (["Anna", "of", "Paris", "Hilton"], ["B-PER", "O", "B-LOC", "I-LOC"]),
        (["French", "wine", "a\u2028b"], ["O", "O", "O"])]


@pytest.mark.parametrize("line, what", [(b"5\tword", "not an id"), (b"5 word O", "not an id"), (b"word\t5\tO", "not an id"),
                                        (b"5\t \tO", "not an id"), (b"5\tword\tB-MISC", "unknown tag 'B-MISC'"), (b"5\tw\xff\tO", "UTF-8")])
def test_unreadable_line_is_named(line, what):
    with pytest.raises(data.DataError, match=f"^some.iob2, line 12: .*{what}"):
        ner.parse_iob2(LINES + line + b"\n", "some.iob2")


def test_file_without_sentences_is_refused():
    with pytest.raises(data.DataError, match="no sentence"):
        ner.parse_iob2(b"# nothing\n\n", "file")


class Response:
    """What urlopen gives for `content`."""

    def __init__(self, content, url, length=None):
        self.content, self.url, self.headers = content, url, {"Content-Length": str(len(content) if length is None else length)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, n):
        block, self.content = self.content[:n], self.content[n:]
        return block

    def geturl(self):
        return self.url


def test_download_fills_the_cache_once(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(ner.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Response(LINES, url))
    for _ in range(2):
        assert len(ner.read_treebank("sk_snk", "dev", cache=tmp_path, quiet=True)) == 2
    assert asked == ["https://raw.githubusercontent.com/UniversalNER/UNER_Slovak-SNK/HEAD/sk_snk-ud-dev.iob2"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sk_snk-ud-dev.iob2"]


@pytest.mark.parametrize("content, url, length", [
    (LINES, "http://elsewhere", None), (LINES, "https://there", 10 ** 6), (b"<html>Log in</html>", "https://there", None),
    (LINES * 2000, "https://there", None)])
def test_bad_download_leaves_nothing(monkeypatch, tmp_path, content, url, length):
    monkeypatch.setattr(ner, "LARGEST_FILE", 100_000)
    monkeypatch.setattr(ner.urllib.request, "urlopen", lambda *_, **__: Response(content, url, length))
    with pytest.raises((FileNotFoundError, data.DataError)):
        ner.read_treebank("tl_trg", "test", cache=tmp_path, quiet=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_folder_comes_before_cache(tmp_path):
    (tmp_path / "uner").mkdir()
    (tmp_path / "uner" / "tl_trg-ud-test.iob2").write_bytes(b"1\tcached\tO\n")
    assert ner.read_treebank("tl_trg", "test", cache=tmp_path)[0][0] == ["cached"]
    (tmp_path / "tl_trg-ud-test.iob2").write_bytes(b"1\tmine\tO\n")
    assert ner.read_treebank("tl_trg", "test", folder=tmp_path, cache=tmp_path)[0][0] == ["mine"]


def test_all_is_what_can_be_had(monkeypatch, tmp_path, capsys):
    def offline(url, timeout):
        raise urllib.error.URLError("offline")
    monkeypatch.setattr(ner.urllib.request, "urlopen", offline)
    with pytest.raises(FileNotFoundError):
        ner.load_treebanks(["all"], [], tmp_path, tmp_path)
    for name, word in (("sv_talbanken", b"tva"), ("da_ddt", b"en")):
        (tmp_path / f"{name}-ud-train.iob2").write_bytes(b"1\t%s\tO\n" % word)
    treebanks = ner.load_treebanks(["all"], [], tmp_path, tmp_path)
    assert treebanks == {("all", "train"): [(["en"], ["O"]), (["tva"], ["O"])]}
    assert "all (train) goes without hr_set-ud-train.iob2" in capsys.readouterr().err


def test_toy_needs_its_context():
    kinds = {}
    for words, tags in ner.toy_treebank("test"):
        assert len(words) == len(tags) and "I-" not in tags[0]
        for word, tag in zip(words, tags):
            kinds.setdefault(word, set()).add(tag)
    assert kinds["Lincoln"] == {"B-PER", "B-ORG", "B-LOC"} and kinds["Mr"] == {"O"}
    assert ner.toy_treebank("test") == ner.toy_treebank("test") != ner.toy_treebank("dev")


@pytest.mark.skipif(not UNER.exists(), reason="Universal NER's files are not here")
@pytest.mark.parametrize("name, split, sentences, entities", [("en_ewt", "test", 2077, 1088), ("en_ewt", "train", 12543, 7005),
                                                              ("tl_trg", "test", 128, 23), ("zh_gsdsimp", "dev", 500, 753)])
def test_real_treebanks(name, split, sentences, entities):
    treebank = ner.read_treebank(name, split, UNER)
    assert len(treebank) == sentences
    assert sum(tag[0] == "B" for _, tags in treebank for tag in tags) == entities
    assert sum(len(ner.entities(tags)) for _, tags in treebank) == entities


# ---- scores ------------------------------------------------------------------------------------------------

def entities_by_definition(tags, strict):
    """Every (type, start, end) that meets the definition, tried one by one."""
    kind_of = lambda i: tags[i][2:] if 0 <= i < len(tags) else ""
    found = set()
    for start in range(len(tags)):
        for end in range(start + 1, len(tags) + 1):
            kind = kind_of(start)
            inside = all(tags[i] == f"I-{kind}" for i in range(start + 1, end))
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            begins = tags[start][0] == "B" or tags[start][0] == "I" and not strict and kind_of(start - 1) != kind
            if kind and inside and ends and begins:
                found.add((kind, start, end))
    return found


def random_tags(rng, longest=9):
    return [rng.choice(ner.TAGS) for _ in range(rng.randint(0, longest))]


@pytest.mark.parametrize("strict", [False, True])
def test_entities_agree_with_their_definition(strict):
    rng = random.Random(0)
    for _ in range(5000):
        tags = random_tags(rng)
        assert ner.entities(tags, strict) == entities_by_definition(tags, strict), tags


def test_entities_by_hand():
    tags = ["I-PER", "I-LOC", "I-LOC", "B-LOC", "B-ORG", "I-PER", "O", "I-PER"]
    assert ner.entities(tags) == {("PER", 0, 1), ("LOC", 1, 3), ("LOC", 3, 4), ("ORG", 4, 5), ("PER", 5, 6), ("PER", 7, 8)}
    assert ner.entities(tags, strict=True) == {("LOC", 3, 4), ("ORG", 4, 5)}


def test_scores_agree_with_brute_force():
    rng = random.Random(1)
    for _ in range(100):
        gold = [random_tags(rng) for _ in range(20)]
        found = [[tag if rng.random() < 0.7 else rng.choice(ner.TAGS) for tag in tags] for tags in gold]
        counts = ner.count([ner.Sentence([], tags, None, None, None) for tags in gold], found)
        for column, kinds in enumerate([{"PER"}, {"ORG"}, {"LOC"}, set(ner.TYPES)]):
            pairs = [{(i, *span) for i, tags in enumerate(side) for span in entities_by_definition(tags, False) if span[0] in kinds}
                     for side in (gold, found)]
            right, (n_gold, n_found) = len(pairs[0] & pairs[1]), map(len, pairs)
            precision, recall = right / n_found if n_found else 0, right / n_gold if n_gold else 0
            f1 = 2 * precision * recall / (precision + recall) if right else 0
            row = counts.sum(axis=0)[column] if column < 3 else counts.sum(axis=(0, 1))
            assert ner.scores(row) == pytest.approx([precision, recall, f1])


def test_nothing_there_and_nothing_found_scores_zero():
    assert ner.scores(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2


def test_bootstrap_pairs_sentences_and_seeds():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 3, size=(3, 400, 3))
    assert not ner.bootstrap(first, first).any()           # whatever is drawn, it is drawn for both
    second = first.copy()
    second[:, ::4, 0] += second[:, ::4, 2]                 # a quarter of the missed entities is found
    second[:, ::4, 2] = 0
    draws = ner.bootstrap(first, second)
    f1 = [ner.scores(counts.sum(axis=1))[:, 2].mean() for counts in (first, second)]
    assert draws.shape == (1000,) and draws.mean() == pytest.approx(f1[1] - f1[0], abs=0.003)
    assert 0 < draws.min() and 0.005 < draws.std() < 0.02
    np.testing.assert_array_equal(draws, -ner.bootstrap(second, first))
    by_seed = np.stack([first[0], second[0]])              # seeds that differ add to the spread
    spread, draws = draws.std(), ner.bootstrap(by_seed[::-1], by_seed)
    assert draws.std() > 3 * spread
    other = ner.bootstrap(by_seed[::-1, :300], by_seed[:, :300])  # another treebank meets the same draws of seeds
    assert np.corrcoef(draws, other)[0, 1] > 0.8


# ---- words and states --------------------------------------------------------------------------------------

WORDS = ["Lincoln", "'s", "Füße", "日本", "a", "😀x", "co-op", "Zzyzx"]


@pytest.mark.parametrize("subtoken", ["first", "last"])
@pytest.mark.parametrize("max_len", [128, 9])
def test_words_are_read_at_their_subtoken(encoding, subtoken, max_len):
    sentence, = ner.encode([(WORDS, ["B-PER"] + ["O"] * 6 + ["B-LOC"])], encoding, max_len, subtoken)
    tokens = encoding.encode_ordinary(" ".join(WORDS))
    expected = []
    for i, word in enumerate(WORDS):
        before = len(" ".join(WORDS[:i] + [""]).encode())
        byte = before if subtoken == "first" else before + len(word.encode()) - 1
        ends = np.cumsum([len(encoding.decode_single_token_bytes(token)) for token in tokens])
        expected.append(next(t for t, end in enumerate(ends) if end > byte))
    expected = [at for at in expected if at < max_len]
    assert sentence.position.tolist() == expected and (len(expected) < len(WORDS)) == (max_len == 9)
    assert sentence.ids.tolist() == tokens[:max_len]
    assert [ner.TAGS[i] for i in sentence.label] == sentence.tags[:len(expected)]


def test_batches_take_each_sentence_once_and_waste_little(encoding):
    sentences = ner.encode(ner.toy_treebank("train"), encoding)
    rng = np.random.default_rng(0)
    fixed, drawn, other = ner.batches(sentences, 16), ner.batches(sentences, 16, rng), ner.batches(sentences, 16, rng)
    for lists in (fixed, drawn, other):
        assert sorted(id(s) for batch in lists for s in batch) == sorted(map(id, sentences))
        padded = sum(len(batch) * max(len(s.ids) for s in batch) for batch in lists)
        assert padded < 1.35 * sum(len(s.ids) for s in sentences)
    members = lambda lists: {frozenset(map(id, batch)) for batch in lists}
    assert len(members(drawn) & members(other)) < 3
    lengths = [len(batch[0].ids) for batch in drawn]
    assert abs(np.corrcoef(lengths, range(len(drawn)))[0, 1]) < 0.6  # not the short ones first


def test_states_are_those_of_a_sentence_alone(backbone, encoding):
    sentences = ner.encode(ner.toy_treebank("test")[:40], encoding)
    with torch.no_grad():
        together = ner.frozen_states(backbone, sentences)
        alone = torch.cat([backbone(s.ids[None])[0, s.position] for s in sentences])
    assert torch.allclose(together, alone, atol=0.05) and together.std() > 0.5  # padded, and perhaps in bf16
    assert torch.equal(ner.frozen_states(None, sentences), together)            # remembered


# ---- tuning ------------------------------------------------------------------------------------------------

def f1_of(predict, sentences):
    return ner.scores(ner.count(sentences, predict(sentences)).sum(axis=(0, 1)))[2]


@pytest.fixture(scope="module")
def toy(encoding):
    return [ner.encode(ner.toy_treebank(split), encoding) for split in ("train", "dev")]


@pytest.mark.parametrize("mode, lr, least", [("head", 0.1, 0.3), ("full", 1e-3, 0.8)])
def test_tuning_learns_and_keeps_the_best_epoch(backbone, toy, mode, lr, least):
    train, dev = toy
    before = [p.clone() for p in backbone.parameters()]
    predict, losses, f1, epoch = ner.tune(backbone, mode, train, dev, 3, lr, 16, False, 0, NO_BAR)
    assert losses.shape == (75,) and losses[:5].mean() > 2 * losses[-5:].mean()
    assert 1 <= epoch <= 3 and f1 == f1_of(predict, dev) > least
    assert all(map(torch.equal, before, backbone.parameters()))  # the run itself is not touched


def test_best_epoch_is_by_dev_f1_and_last_without_dev(backbone, toy, monkeypatch):
    train, dev = toy
    seen, script = [], [[1, 9, 9], [5, 1, 1], [4, 1, 1], [5, 1, 1]]  # tp, fp, fn of each epoch: the second is the first of the best

    def count(sentences, predicted, strict):
        seen.append(predicted)
        return np.array([[script[len(seen) - 1]]])
    monkeypatch.setattr(ner, "count", count)
    predict, _, f1, epoch = ner.tune(backbone, "head", train, dev, 4, 3e-2, 16, False, 0, NO_BAR)
    assert (epoch, f1) == (2, pytest.approx(5 / 6))
    assert predict(dev) == seen[1] and seen[1] not in (seen[0], seen[2], seen[3])
    _, _, f1, epoch = ner.tune(backbone, "head", train, None, 2, 3e-2, 16, False, 0, NO_BAR)
    assert (f1, epoch) == (None, 2)


def test_tuning_is_a_function_of_the_seed(backbone, toy):
    train, dev = toy
    losses = [ner.tune(backbone, "head", train, dev, 1, 3e-2, 16, False, seed, NO_BAR)[1] for seed in (0, 0, 1)]
    assert np.array_equal(losses[0], losses[1]) and not np.array_equal(losses[0], losses[2])


def test_words_beyond_max_len_are_missed(backbone, toy, encoding):
    train, dev = toy
    predict = ner.tune(backbone, "full", train, dev, 2, 1e-3, 16, False, 0, NO_BAR)[0]
    cut = ner.encode(ner.toy_treebank("dev"), encoding, max_len=4)
    tags = predict(cut)
    assert [len(row) for row in tags] == [len(s.words) for s in cut]
    assert all(set(row[len(s.position):]) <= {"O"} for row, s in zip(tags, cut))
    counts = ner.count(cut, tags).sum(axis=(0, 1))
    assert counts[0] + counts[2] == sum(tag[0] == "B" for s in cut for tag in s.tags)  # the gold entities are all still there
    assert f1_of(predict, cut) < f1_of(predict, dev) - 0.2


def test_tuning_speed_of_known_curves():
    steps = np.arange(1000.0)
    speed = ner.tuning_speed(10 - 0.01 * steps)
    assert speed["slope"] == pytest.approx(-0.01) and speed["auc"] == pytest.approx((9.955 + 0.055) / 2)
    assert speed["t90"] == 910                              # 90 % of 99 equal drops of a point to the next
    early = ner.tuning_speed(np.where(steps < 200, 2.0, 1.0))
    assert early == {"t90": 210, "auc": pytest.approx(1 + 19.5 / 99), "slope": pytest.approx(0, abs=1e-12)}
    assert ner.tuning_speed(0.01 * steps)["t90"] is None
    assert ner.tuning_speed(np.array([3.0])) == {"t90": None, "auc": 3.0, "slope": pytest.approx(0, abs=1e-12)}


# ---- the command -------------------------------------------------------------------------------------------

TOY = ("--train", "toy", "--test", "toy", "--epochs", 1, "--lr", 0.03)


def test_command_end_to_end(command, runs, tmp_path, monkeypatch):
    code, out, _ = command(*runs, "--scratch", *TOY, "--mode", "head", "--seeds", 2, "--predictions", "--strict")
    cells = json.loads((tmp_path / "ner" / "ner.json").read_text())
    assert code == 0 and len(cells) == 6 and (tmp_path / "ner" / "ner.png").read_bytes()[:4] == b"\x89PNG"
    for cell in cells:
        assert {"run", "train", "test", "mode", "seed", "precision", "recall", "f1", "types",
                "sentences", "t90", "auc", "slope"} <= set(cell)
        name = f"{cell['run']}__toy__head__seed{cell['seed']}__toy.tsv"
        blocks = (tmp_path / "ner" / name).read_text().rstrip("\n").split("\n\n")
        rows = [[line.split("\t") for line in block.split("\n")] for block in blocks]
        assert [([r[0] for r in block], [r[1] for r in block]) for block in rows] == ner.toy_treebank("test")
        gold, found = ({(i, *span) for i, block in enumerate(rows) for span in entities_by_definition([r[k] for r in block], True)}
                       for k in (1, 2))
        assert cell["f1"] == pytest.approx(2 * len(gold & found) / (len(gold) + len(found))) and cell["sentences"] == 100
        assert set(cell["types"]) == set(ner.TYPES) and np.sum(cell["counts"], axis=0)[0] == len(gold & found)
    assert [cell["run"] for cell in cells] == ["one", "one", "two", "two", "scratch-11m", "scratch-11m"]
    f1 = {run: [100 * cell["f1"] for cell in cells if cell["run"] == run] for run in ("one", "two", "scratch-11m")}
    for run, values in f1.items():
        assert f"| head | toy | {run} | {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in out
    assert f"| head | toy | two − one | {np.mean(f1['two']) - np.mean(f1['one']):+.1f} [" in out

    def never(*_):
        raise AssertionError("a finished cell was computed again")
    monkeypatch.setattr(ner, "tune", never)
    assert command(*runs, "--scratch", *TOY, "--mode", "head", "--seeds", 2, "--predictions", "--strict")[:2] == (0, out)


def test_stopped_job_continues_to_the_same_result(command, runs, tmp_path, monkeypatch):
    assert command(*runs, *TOY, "--seeds", 2, "--out", "whole")[0] == 0
    real, calls = ner.tune, []

    def tune(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(ner, "tune", tune)
    code, _, err = command(*runs, *TOY, "--seeds", 2, "--out", "parts")
    assert code == 130 and "same command continues" in err and err.count("\n") == 1
    assert len(json.loads(Path("parts/ner.json").read_text())) == 1
    assert command(*runs, *TOY, "--seeds", 2, "--out", "parts")[0] == 0
    assert len(calls) == 2 + 3
    assert json.loads(Path("parts/ner.json").read_text()) == json.loads(Path("whole/ner.json").read_text())


def test_cell_of_other_settings_or_weights_is_refused(command, runs, tmp_path):
    assert command(runs[0], *TOY)[0] == 0
    before = Path("ner/ner.json").read_bytes()
    other = make_run(tmp_path / "again" / "one", 3)
    for flags, word in (((runs[0], *TOY, "--epochs", 2), "epochs 1 there, 2 now"), ((runs[0], *TOY, "--lr", 0.01), "lr 0.03 there"),
                        ((runs[0], *TOY, "--max-len", 9), "max_len"), ((other, *TOY), "checkpoint")):
        code, _, err = command(*flags)
        assert code == 2 and word in err and "--out" in err and err.count("\n") == 1
    assert Path("ner/ner.json").read_bytes() == before


def test_control_is_the_untrained_decoder(runs):
    models, groups = ner.load_models(runs, scratch=True)
    assert groups == {name: {0: name} for name in models}
    assert list(models) == ["one", "two", "scratch-11m"]
    start = model.Decoder(model.Config(96, 400), torch.Generator().manual_seed(0))
    assert all(map(torch.equal, start.parameters(), models["scratch-11m"][0].parameters()))


def test_seeds_of_pretraining_are_one_group(command, runs, tmp_path):
    """A group's row is of all its runs, in whatever order they are given; the difference is seed by seed, of the seeds that both groups have."""
    more = [make_run(tmp_path / "one-s5", 3, seed=5), make_run(tmp_path / "two-s3", 4, seed=3, meta=True), make_run(tmp_path / "two-s5", 5, seed=5, meta=True)]
    code, out, _ = command(more[2], more[0], runs[0], runs[1], more[1], *TOY, "--scratch")
    f1 = {cell["run"]: 100 * cell["f1"] for cell in json.loads(Path("ner/ner.json").read_text())}
    groups = {"two (3 runs)": ("two", "two-s3", "two-s5"), "one (2 runs)": ("one", "one-s5"),
              "scratch-11m (3 runs)": ("scratch-11m", "scratch-11m-s3", "scratch-11m-s5")}
    assert code == 0 and set(f1) == set(sum(groups.values(), ()))
    for label, names in groups.items():
        values = [f1[name] for name in names]
        assert f"| head | toy | {label} | {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |" in out
    pairs = [f1["one"] - f1["two"], f1["one-s5"] - f1["two-s5"]]
    half = 12.706 * np.std(pairs, ddof=1) / 2 ** 0.5
    found = [float(x) for x in re.search(r"one − two \| (\S+) \[(\S+), (\S+)\]", out).groups()]
    assert found == pytest.approx([np.mean(pairs), np.mean(pairs) - half, np.mean(pairs) + half], abs=0.1) and "pairs: two and one, two-s5 and one-s5)" in out


def test_several_treebanks_share_one_tuning(command, runs, tmp_path, monkeypatch):
    for name in ("tl_trg", "en_pud"):
        (tmp_path / f"{name}-ud-test.iob2").write_bytes(LINES)
    real, calls = ner.tune, []
    monkeypatch.setattr(ner, "tune", lambda *args: calls.append(args) or real(*args))
    code, out, _ = command(runs[0], *TOY, "--test", "toy", "tl_trg", "en_pud", "tl_trg", "--uner", ".")
    assert code == 0 and len(calls) == 1 and "| toy | tl_trg | en_pud | t90" in out


@pytest.mark.parametrize("flags, words", [
    (["--train", "klingon"], ["klingon", "en_ewt"]), (["--train", "tl_trg"], ["tl_trg"]), (["--test", "all"], ["all"]),
    (["--seeds", -1], ["--seeds"]), (["--epochs", 0], ["--epochs"]), (["--max-len", 4000], ["--max-len"]), (["--lr", "nan"], ["--lr"]),
    (["--uner", "nowhere"], ["nowhere"]), (["--uner", "bad", "--test", "en_ewt"], ["en_ewt-ud-test.iob2, line 2"]),
    (["--test", "de_pud"], ["de_pud-ud-test.iob2", "cache", "https://github.com/UniversalNER/UNER_German-PUD", "no network"]),
    (["--out", "mismatched"], ["mismatched/ner.json", "--out"]), (["--device", "abacus"], ["abacus"])])
def test_mistakes_are_one_line(command, runs, tmp_path, flags, words):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "en_ewt-ud-test.iob2").write_bytes(b"1\tfine\tO\n2 not\n")
    (tmp_path / "mismatched").mkdir()
    (tmp_path / "mismatched" / "ner.json").write_text('{"run": "one"}')
    code, out, err = command(runs[0], *TOY, *flags)
    assert code == 2 and out == "" and err.count("\n") == 1 and all(word in err for word in words), err


def test_run_folders_are_checked_before_work(command, runs, tmp_path):
    code, _, err = command(runs[0], tmp_path, *TOY)
    assert code == 2 and "not a run" in err and err.count("\n") == 1
    twin = make_run(tmp_path / "twin" / "one", 4)
    code, _, err = command(runs[0], twin, *TOY)
    assert code == 2 and "two runs are called one" in err and not Path("ner").exists()
