"""Universal NER's files: how they are read, fetched and put together, and the made-up treebank."""
import urllib.error
import urllib.request

import pytest

import ner
from conftest import ROOT
from plumbing import treebanks
from plumbing.commands import UserError
from plumbing.treebanks import MissingTreebank

UNER = ROOT.parent / "shared" / "uner"
# Two sentences with all that makes the format hard: comments, ranges and decimals for ids, further
# columns, tags of dropped types, a line of white space, Windows' line ends, and a character that
# splitlines() would take for a line end.
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


def files_in(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


# ---- reading -----------------------------------------------------------------------------------

def test_reads_as_the_official_reader():
    assert treebanks.parse_iob2(LINES, "file") == [
        (["Anna", "of", "Paris", "Hilton"], ["B-PER", "O", "B-LOC", "I-LOC"]),
        (["French", "wine", "a\u2028b"], ["O", "O", "O"])]


@pytest.mark.parametrize("line, what", [
    (b"5\tword", "not an id"),
    (b"5 word O", "not an id"),
    (b"word\t5\tO", "not an id"),
    (b"5\t \tO", "not an id"),
    (b"5\tword\tB-MISC", "unknown tag 'B-MISC'"),
    (b"5\tw\xff\tO", "UTF-8")])
def test_unreadable_line_is_named(line, what):
    with pytest.raises(UserError, match=f"^some.iob2, line 12: .*{what}"):
        treebanks.parse_iob2(LINES + line + b"\n", "some.iob2")


def test_file_without_sentences_is_refused():
    with pytest.raises(UserError, match="no sentence"):
        treebanks.parse_iob2(b"# nothing\n\n", "file")


# ---- fetching ----------------------------------------------------------------------------------

class Response:
    """What urlopen gives for `content`."""

    def __init__(self, content, url, length=None):
        self.content, self.url = content, url
        if length is None:
            length = len(content)
        self.headers = {"Content-Length": str(length)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, n):
        block, self.content = self.content[:n], self.content[n:]
        return block

    def geturl(self):
        return self.url


@pytest.fixture
def offline(monkeypatch):
    def urlopen(url, timeout):
        raise urllib.error.URLError("offline")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_download_fills_the_cache_once(monkeypatch, tmp_path):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return Response(LINES, url)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        sentences = treebanks.read_treebank("sk_snk", "dev", cache=tmp_path, quiet=True)
        assert len(sentences) == 2
    assert asked == ["https://raw.githubusercontent.com/UniversalNER/UNER_Slovak-SNK/HEAD/"
                     "sk_snk-ud-dev.iob2"]
    assert files_in(tmp_path) == ["sk_snk-ud-dev.iob2"]


@pytest.mark.parametrize("content, url, length", [
    (LINES, "http://elsewhere", None),                  # redirected away from https
    (LINES, "https://there", 10 ** 6),                  # broken off
    (b"<html>Log in</html>", "https://there", None),    # no treebank
    (LINES * 2000, "https://there", None)])             # too large
def test_bad_download_leaves_nothing(monkeypatch, tmp_path, content, url, length):
    def urlopen(asked, timeout):
        return Response(content, url, length)
    monkeypatch.setattr(treebanks, "LARGEST_FILE", 100_000)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError):
        treebanks.read_treebank("tl_trg", "test", cache=tmp_path, quiet=True)
    assert not files_in(tmp_path)


def test_folder_comes_before_cache(tmp_path):
    (tmp_path / "uner").mkdir()
    (tmp_path / "uner" / "tl_trg-ud-test.iob2").write_bytes(b"1\tcached\tO\n")
    cached = treebanks.read_treebank("tl_trg", "test", cache=tmp_path)
    assert cached[0][0] == ["cached"]
    (tmp_path / "tl_trg-ud-test.iob2").write_bytes(b"1\tmine\tO\n")
    mine = treebanks.read_treebank("tl_trg", "test", folder=tmp_path, cache=tmp_path)
    assert mine[0][0] == ["mine"]


# ---- several treebanks -------------------------------------------------------------------------

def test_all_is_what_can_be_had(offline, tmp_path, capsys):
    with pytest.raises(MissingTreebank):
        treebanks.load_treebanks(["all"], [], tmp_path, tmp_path)
    for name, word in (("sv_talbanken", b"tva"), ("da_ddt", b"en")):
        (tmp_path / f"{name}-ud-train.iob2").write_bytes(b"1\t%s\tO\n" % word)
    loaded = treebanks.load_treebanks(["all"], [], tmp_path, tmp_path)
    assert loaded == {("all", "train"): [(["en"], ["O"]), (["tva"], ["O"])]}
    assert "all (train) lacks a file: hr_set-ud-train.iob2" in capsys.readouterr().err


def test_only_a_dev_file_can_be_done_without(offline, tmp_path, capsys):
    (tmp_path / "da_ddt-ud-train.iob2").write_bytes(b"1\ten\tO\n")
    loaded = treebanks.load_treebanks(["da_ddt"], ["toy"], tmp_path, tmp_path)
    assert list(loaded) == [("toy", "test"), ("da_ddt", "train")]
    assert "da_ddt (dev) lacks a file: da_ddt-ud-dev.iob2" in capsys.readouterr().err
    for trains, tests in ((["en_ewt"], ["toy"]), (["da_ddt"], ["da_ddt"])):
        with pytest.raises(MissingTreebank):
            treebanks.load_treebanks(trains, tests, tmp_path, tmp_path)


def test_toy_needs_its_context():
    kinds = {}
    for words, tags in treebanks.toy_treebank("test"):
        assert len(words) == len(tags)
        assert "I-" not in tags[0]
        for word, tag in zip(words, tags):
            kinds.setdefault(word, set()).add(tag)
    assert kinds["Lincoln"] == {"B-PER", "B-ORG", "B-LOC"}
    assert kinds["Mr"] == {"O"}
    assert treebanks.toy_treebank("test") == treebanks.toy_treebank("test")
    assert treebanks.toy_treebank("test") != treebanks.toy_treebank("dev")


@pytest.mark.skipif(not UNER.exists(), reason="Universal NER's files are not here")
@pytest.mark.parametrize("name, split, sentences, entities", [
    ("en_ewt", "test", 2077, 1088),
    ("en_ewt", "train", 12543, 7005),
    ("tl_trg", "test", 128, 23),
    ("zh_gsdsimp", "dev", 500, 753)])
def test_real_treebanks(name, split, sentences, entities):
    treebank = treebanks.read_treebank(name, split, UNER)
    assert len(treebank) == sentences
    beginnings, found = 0, 0
    for _, tags in treebank:
        beginnings += sum(tag[0] == "B" for tag in tags)
        found += len(ner.entities(tags))
    assert beginnings == entities
    assert found == entities
