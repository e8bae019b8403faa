"""Universal NER's treebanks: their files, and an artificial one to try things out.

Sentences are (words, tags) pairs of lists. Universal NER is by Mayhew et al. 2024 (arXiv
2311.09122). Its files are in the IOB2 format, one word per line.
"""
import http.client
import sys
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.commands import UserError
from plumbing.files import read_file, write_atomically
from plumbing.prepare import cache_root

TYPES = ["PER", "ORG", "LOC"]
TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]
# name -> repository, for the treebanks of UNER v1 with training text, and for those without
TRAINED = {
    "da_ddt": "Danish-DDT", "en_ewt": "English-EWT", "hr_set": "Croatian-SET",
    "pt_bosque": "Portuguese-Bosque", "sk_snk": "Slovak-SNK", "sr_set": "Serbian-SET",
    "sv_talbanken": "Swedish-Talbanken", "zh_gsd": "Chinese-GSD", "zh_gsdsimp": "Chinese-GSDSIMP"}
TEST_ONLY = {
    "ceb_gja": "Cebuano-GJA", "tl_trg": "Tagalog-TRG", "tl_ugnayan": "Tagalog-Ugnayan",
    "de_pud": "German-PUD", "en_pud": "English-PUD", "pt_pud": "Portuguese-PUD",
    "ru_pud": "Russian-PUD", "sv_pud": "Swedish-PUD", "zh_pud": "Chinese-PUD"}
# In bytes. The treebanks have at most 4 million.
LARGEST_FILE = 32_000_000
LONGEST_LINE = 10_000
DOWNLOAD_BLOCK = 2 ** 16


class MissingTreebank(UserError):
    """A treebank is not on this disk and cannot be downloaded."""


# ---- reading -----------------------------------------------------------------------------------

def parse_iob2(content, name):
    """[(words, tags)] of the bytes of an IOB2 file. Raises UserError naming the file and line.

    The columns are id, word, tag, and any others. As in UNER's own reader, every line with an id
    is a word, even `3-4` and `8.1`, and tags of the types that UNER dropped become O."""
    sentences, words, tags = [], [], []
    # not splitlines(), which also splits at other characters
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip() and words:
            sentences.append((words, tags))
            words, tags = [], []
        if not line.strip() or line.startswith(b"#"):
            continue
        word, tag = parse_line(line, f"{name}, line {number}")
        words.append(word)
        tags.append(tag)
    if words:
        sentences.append((words, tags))
    if not sentences:
        raise UserError(f"{name} holds no sentence")
    return sentences


def parse_line(line, place):
    """(word, tag) of one line of bytes. Raises UserError."""
    if len(line) > LONGEST_LINE:
        raise UserError(f"{place}: longer than {LONGEST_LINE:,} bytes")
    columns = line.decode(errors="replace").rstrip("\r").split("\t")
    is_word = (len(columns) >= 3 and columns[0][:1].isdigit() and columns[1].strip()
               and "\ufffd" not in columns[1])
    if not is_word:
        raise UserError(f"{place}: not an id, a word and a tag, separated by tabs, in UTF-8: "
                        f"{line[:60]}")
    word, tag = columns[1:3]
    if "OTH" in tag or tag in ("B-O", "_"):  # `_` means none in UD
        tag = "O"
    if tag not in TAGS:
        raise UserError(f"{place}: unknown tag {tag[:20]!r}, known tags are {', '.join(TAGS)}")
    return word, tag


def read_treebank(name, split, folder=None, cache=None, quiet=False):
    """[(words, tags)] of one split (train, dev or test) of a treebank, from folder, or from the
    cache, or else downloaded into the cache. Raises MissingTreebank if it cannot be found, and
    UserError if it cannot be read."""
    if name == "toy":
        return toy_treebank(split)
    file = f"{name}-ud-{split}.iob2"
    repository = f"UniversalNER/UNER_{(TRAINED | TEST_ONLY)[name]}"
    path = cache_root(cache) / "uner" / file
    if folder and (Path(folder) / file).exists():
        path = Path(folder) / file
    if not path.exists():
        try:
            download(f"https://raw.githubusercontent.com/{repository}/HEAD/{file}", path, quiet)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise MissingTreebank(
                f"{file} could not be found or downloaded ({reason}): get it from "
                f"https://github.com/{repository} and put it into {folder or path.parent} (--uner "
                "FOLDER names another); without a network: --train toy --test toy") from None
    return parse_iob2(read_file(path, LARGEST_FILE), path)


def download(url, path, quiet=False):
    """Fetch an IOB2 file over https and write it to path. Raises OSError, or UserError if it is
    not a treebank."""
    content = b""
    with urllib.request.urlopen(url, timeout=20) as response, \
            tqdm(desc=path.name, unit="B", unit_scale=True,
                 disable=True if quiet else None) as bar:
        while block := response.read(DOWNLOAD_BLOCK):
            content += block
            bar.update(len(block))
            if len(content) > LARGEST_FILE or not response.geturl().startswith("https:"):
                raise OSError("too large, or redirected away from https")
        length = response.headers["Content-Length"]
    if length not in (None, str(len(content))):
        raise OSError("the connection broke off")
    parse_iob2(content, url)  # an error page must not enter the cache
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def load_treebanks(trains, tests, folder=None, cache=None, quiet=False):
    """{(name, split): sentences} of training and test treebanks. "all" is every training treebank
    that can be found, joined together. A missing dev file is reported and skipped. Raises what
    read_treebank raises."""
    treebanks = {}
    for name in tests:
        treebanks[name, "test"] = read_treebank(name, "test", folder, cache, quiet)
    for name in trains:
        for split in ("train", "dev"):
            members = TRAINED if name == "all" else [name]
            sentences, missing = [], None
            for member in members:
                try:
                    sentences += read_treebank(member, split, folder, cache, quiet)
                except MissingTreebank as error:
                    missing = error
                    if name == "all" or split == "dev":
                        print(f"{name} ({split}) lacks a file: {error}", file=sys.stderr)
            if sentences:
                treebanks[name, split] = sentences
            elif split == "train":
                raise missing
    return treebanks


# ---- an artificial treebank --------------------------------------------------------------------

PATTERNS = ["Mr PER met Mrs PER in LOC .", "shares in the company ORG fell .",
            "they flew to LOC with Mr PER .", "nobody remembered the weather .",
            "Mrs PER works at the company ORG in LOC .", "the train from LOC was late ."]
NAMES = ["Lincoln", "Ford", "Jordan", "Chester", "Morgan Hill", "Stanford Green", "Ford Green",
         "Lincoln Hill"]
TOY_SENTENCES = {"train": 400, "dev": 100, "test": 100}


def toy_treebank(split):
    """Artificial sentences, the same every time. The same names are people, companies and places.
    The words before a name tell which."""
    rng = np.random.default_rng([0, list(TOY_SENTENCES).index(split)])
    sentences = []
    for _ in range(TOY_SENTENCES[split]):
        words, tags = [], []
        for word in str(rng.choice(PATTERNS)).split():
            if word in TYPES:
                name = str(rng.choice(NAMES)).split()
                words += name
                tags += [f"B-{word}", f"I-{word}"][:len(name)]
            else:
                words.append(word)
                tags.append("O")
        sentences.append((words, tags))
    return sentences
