"""Chapter 6. Universal NER: what was pretraining worth?

    python ner.py runs/11m-vanilla runs/11m-meta
    python ner.py runs/11m-vanilla* runs/11m-meta* --scratch --test en_ewt da_ddt --mode head full

A linear layer, the tag head, predicts each word's tag (person, organisation, place) from the
decoder's last hidden state. Tuned alone on frozen states (mode `head`), it shows what these states
already contain. Tuned together with the decoder (mode `full`), it shows how good a starting point
the decoder is. Read `tune` first, then `entities` and `scores`. The tuning follows the paper
(arXiv 2508.02189), the data and the scores Universal NER (Mayhew et al. 2024, arXiv 2311.09122).
The results are ner/ner.json and ner/ner.png.
"""
import plumbing  # noqa: F401 - imported first, so that Ctrl-C during loading exits quietly

import copy
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Decoder, load_run
from plumbing.cells import KEY, cells_to_compute, read_cells, write_cells, write_predictions
from plumbing.commands import Parser, UserError, command, filled, number
from plumbing.compare import group_runs
from plumbing.files import locked
from plumbing.logs import printable, read_settings
from plumbing.machine import pick_device, precision
from plumbing.ner_report import report, tuning_speed
from plumbing.tokenizer import load_encoding
from plumbing.treebanks import TAGS, TEST_ONLY, TRAINED, TYPES, load_treebanks

# The learning rate of mode `head` is HEAD_LR / d_model. 10 was best on en_ewt's dev set at 11m.
HEAD_LR = 10
# The learning rate of mode `full`, as in the paper.
FULL_LR = 3e-5
# Sentences tagged at a time.
TAGGED_AT_ONCE = 64


# ---- the tagger --------------------------------------------------------------------------------

def tune(backbone, mode, train, dev, epochs, lr, batch_size, seed, bar):
    """Train a tag head on frozen states (mode "head"), or together with a copy of the backbone
    ("full"). AdamW's learning rate falls linearly to 0.

    train and dev are lists of Sentence. The weights of the epoch with the best F1 on dev are
    kept or, without dev, those of the last epoch. Returns (Tagger, losses (steps,) in nats per
    word, F1 on dev, epoch)."""
    rng = np.random.default_rng(seed)
    tagger = Tagger(backbone, mode, seed)
    parameters = tagger.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    steps = epochs * math.ceil(len(train) / batch_size)
    losses, best = [], None
    if mode == "head":
        tagger.predict(train)  # computes all states once, in the same batches for every seed
    for epoch in range(1, epochs + 1):
        for batch in batches(train, batch_size, rng):
            optimizer.param_groups[0]["lr"] = lr * (1 - len(losses) / steps)
            labels = torch.cat([s.label for s in batch]).to(tagger.device)  # (words,)
            logits = tagger.logits(batch)                                   # (words, tags)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            loss = loss / max(1, len(labels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update(len(batch))
        f1 = None
        if dev:
            f1 = float(f1_of(count(dev, tagger.predict(dev)).sum(axis=(0, 1))))
        if best is None or not dev or f1 > best[0]:
            best = f1, epoch, [p.detach().clone() for p in parameters]
    f1, epoch, values = best
    for p, value in zip(parameters, values):
        p.data = value
    return tagger, torch.stack(losses).cpu().numpy(), f1, epoch


class Tagger:
    """A linear tag head on a backbone, which is frozen or a copy that is tuned, too."""

    def __init__(self, backbone, mode, seed):
        self.frozen = mode == "head"
        self.backbone = backbone if self.frozen else copy.deepcopy(backbone)
        # A linear layer over frozen states is so small that it is fastest on the CPU.
        self.device = torch.device("cpu") if self.frozen else backbone.cos.device
        generator = torch.Generator().manual_seed(seed)
        d_model = len(backbone.norm.weight)
        weight = 0.02 * torch.randn(len(TAGS), d_model, generator=generator)  # (tags, D)
        self.weight = weight.to(self.device).requires_grad_()
        self.bias = torch.zeros(len(TAGS), device=self.device, requires_grad=True)

    def parameters(self):
        tuned = [] if self.frozen else list(self.backbone.parameters())
        return [self.weight, self.bias, *tuned]

    def logits(self, batch):
        """(words, tags): the logits of all words in a batch of sentences."""
        read = frozen_states if self.frozen else word_states
        return F.linear(read(self.backbone, batch), self.weight, self.bias)

    @torch.no_grad()
    def predict(self, sentences):
        """The tags of each sentence, a list of strings. Words beyond the first K are tagged O."""
        tags = {}
        for batch in batches(sentences, TAGGED_AT_ONCE):
            best = self.logits(batch).argmax(dim=1).cpu()
            for s, row in zip(batch, best.split([len(s.position) for s in batch])):
                unread = len(s.words) - len(row)
                tags[id(s)] = [TAGS[i] for i in row] + ["O"] * unread
        return [tags[id(s)] for s in sentences]


@dataclass
class Sentence:
    """W words, of which the first K can be tagged: they start within the first max_len tokens."""
    words: list                  # W strings
    tags: list                   # W strings, gold
    ids: torch.Tensor            # (T,) int64, T <= max_len
    position: torch.Tensor       # (K,) the word's first token, whose state represents it
    label: torch.Tensor          # (K,) indices in TAGS
    states: torch.Tensor = None  # (K, D), filled in by frozen_states


def encode(sentences, encoding, max_len=128):
    """[(words, tags)] -> [Sentence]. Words are joined by spaces."""
    n_bytes = np.array([len(encoding.decode_single_token_bytes(i))
                        for i in range(encoding.n_vocab)])
    # The tokenizer of an imported model may change the Unicode form of the text.
    spelling = getattr(encoding, "normalise", str)
    texts = [" ".join(words) for words, _ in sentences]
    encoded = []
    for (words, tags), tokens in zip(sentences, encoding.encode_ordinary_batch(texts)):
        token_end = np.cumsum(n_bytes[tokens])                      # (T,) in bytes of the text
        size = np.array([len(spelling(word).encode()) for word in words])  # (W,)
        word_start = np.cumsum(size + 1) - (size + 1)               # (W,)
        # the token that holds the word's first byte
        position = np.searchsorted(token_end, word_start, side="right")  # (W,)
        position = torch.from_numpy(position[position < max_len])        # (K,)
        label = torch.tensor([TAGS.index(tag) for tag in tags[:len(position)]],
                             dtype=torch.int64)
        ids = torch.tensor(tokens[:max_len])
        encoded.append(Sentence(words, tags, ids, position, label))
    return encoded


def batches(sentences, size, rng=None):
    """Lists of `size` sentences of similar length, so that there is little padding. With rng, each
    length gets up to 8 tokens of noise before sorting, and the lists are shuffled."""
    length = np.array([len(sentence.ids) for sentence in sentences])
    if rng is not None:
        length = length + rng.uniform(0, 8, len(length))
    in_order = [sentences[i] for i in np.argsort(length, kind="stable")]
    lists = [in_order[start:start + size] for start in range(0, len(in_order), size)]
    if rng is not None:
        lists = [lists[i] for i in rng.permutation(len(lists))]
    return lists


def word_states(backbone, batch):
    """(words, D) float32: the last hidden states that represent the words of a batch."""
    device = backbone.cos.device
    # Padding comes last, and causal attention never looks ahead.
    ids = pad_sequence([s.ids for s in batch], batch_first=True).to(device)  # (B, T)
    row = torch.cat([torch.full_like(s.position, i) for i, s in enumerate(batch)])
    position = torch.cat([s.position for s in batch])
    with precision(device):
        return backbone(ids)[row.to(device), position.to(device)]


@torch.no_grad()
def frozen_states(backbone, batch):
    """word_states of a frozen backbone, on the CPU. They are computed once per sentence and reused
    in all epochs and seeds."""
    new = [s for s in batch if s.states is None]
    if new:
        states = word_states(backbone, new).cpu()
        for sentence, part in zip(new, states.split([len(s.position) for s in new])):
            sentence.states = part
    return torch.cat([s.states for s in batch])


# ---- scores ------------------------------------------------------------------------------------

def entities(tags):
    """{(type, start, end)} of the entities in IOB2 tags; end is exclusive. By the CoNLL rules, an
    I- tag that continues nothing starts an entity (seqeval's default)."""
    spans, kind, start = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if prefix == "I" and tag_kind == kind:
            continue  # the entity goes on
        if kind:
            spans.add((kind, start, i))
        kind, start = tag_kind or None, i
    return spans


def count(sentences, predicted):
    """(S, types, 3): for each sentence and type, how many entities the predicted tags find, make
    up and miss (tp, fp, fn)."""
    counts = np.zeros((len(sentences), len(TYPES), 3), dtype=int)
    for row, sentence, tags in zip(counts, sentences, predicted):
        gold, found = entities(sentence.tags), entities(tags)
        for column, spans in enumerate((gold & found, found - gold, gold - found)):
            for kind, _, _ in spans:
                row[TYPES.index(kind), column] += 1
    return counts


def scores(counts):
    """Precision, recall and F1 (..., 3), from 0 to 1, for counts of tp, fp and fn (..., 3). An
    undefined score is 0, as in seqeval."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    p = tp / np.maximum(tp + fp, 1)
    r = tp / np.maximum(tp + fn, 1)
    f1 = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
    return np.stack([p, r, f1], axis=-1)


def f1_of(counts):
    return scores(counts)[..., 2]


# ---- the grid of runs, treebanks, modes and seeds ----------------------------------------------

def load_models(runs, scratch):
    """(models, groups) of run folders. models is {name: (decoder on the CPU, encoding)}. groups is
    {label: {seed: name}}, for runs that differ only in their seed. With scratch, both include an
    untrained decoder for each size, vocabulary and seed. Raises UserError."""
    models, untrained, members = {}, {}, []
    for run in runs:
        name = printable(Path(run).resolve().name)
        if name in models:
            raise UserError(f"two runs are called {name}, but results are stored by name: "
                            "rename one folder")
        decoder, settings = load_run(run)
        models[name] = decoder, load_encoding(run)
        members.append((settings | {"name": name}, name))
        kind = {key: settings[key] for key in ("size", "vocab_size", "seed")}
        kind["config"] = asdict(decoder.config)
        if scratch and kind not in [other for other, _ in untrained.values()]:
            untrained[scratch_name(kind, untrained)] = kind, name
    for scratch_run, (kind, name) in untrained.items():
        if scratch_run in models:
            raise UserError(f"a run has the name of an untrained decoder, {scratch_run}: rename "
                            "its folder")
        decoder, encoding = models[name]
        generator = torch.Generator().manual_seed(kind["seed"])
        models[scratch_run] = Decoder(decoder.config, generator), encoding
        members.append((kind | {"name": scratch_run}, scratch_run))
    groups = {}
    for label, group in group_runs(members).items():
        groups[label] = {settings["seed"]: name for settings, name in group}
    return models, groups


def scratch_name(kind, taken):
    name = f"scratch-{kind['size']}"
    if kind["seed"]:
        name += f"-s{kind['seed']}"
    if name in taken:
        name += f"-{kind['vocab_size']}"
    same_name = [other for other in taken if other.startswith(name)]
    return f"{name}-{len(same_name) + 1}" if name in taken else name


def run_grid(args, models, treebanks, cells):
    """Tune and test what is missing in `cells`. The results of each tuning are saved immediately.
    Raises UserError."""
    device = pick_device(args.device)
    rates = {}
    for run, (decoder, _) in models.items():
        rates[run, "head"] = args.lr or HEAD_LR / decoder.config.d_model
        rates[run, "full"] = args.lr or FULL_LR
    missing = cells_to_compute(args, models, treebanks, cells, rates)
    tunings = {}  # (run, train, mode, seed) -> its cells, one for each test treebank
    for cell in missing:
        tunings.setdefault(cell[:4], []).append(cell)
    total = sum(args.epochs * len(treebanks[train, "train"]) for _, train, _, _ in tunings)
    bar = tqdm(total=total, unit="sentence", disable=True if args.quiet else None)
    encoded_for = None
    for (run, train, mode, seed), same_tuning in tunings.items():
        if (run, train) != encoded_for:  # sentences keep their frozen states for all seeds
            decoder, encoding = models[run]
            backbone = copy.deepcopy(decoder.model).to(device)
            max_len = min(args.max_len, decoder.config.context)
            encoded = {key: encode(sentences, encoding, max_len)
                       for key, sentences in treebanks.items()
                       if key[0] == train or key[1] == "test"}
            encoded_for = run, train
        bar.set_description(f"{run}, {train}, {mode}, seed {seed}")
        tagger, losses, dev_f1, epoch = tune(
            backbone, mode, encoded[train, "train"], encoded.get((train, "dev")), args.epochs,
            rates[run, mode], args.batch_size, seed, bar)
        for cell in same_tuning:
            test = cell[-1]
            sentences = encoded[test, "test"]
            predicted = tagger.predict(sentences)
            if args.predictions:
                write_predictions(args.out, cell, sentences, predicted)
            cells[cell] = (dict(zip(KEY, cell)) | results(count(sentences, predicted))
                           | tuning_speed(losses)
                           | {"epoch": epoch, "dev_f1": dev_f1, "settings": missing[cell]})
        write_cells(cells, args.out)
    bar.close()


def results(counts):
    """The scores of a cell, from counts (S, types, 3)."""
    by_type = counts.sum(axis=0)
    return {**named_scores(by_type.sum(axis=0)),
            "types": {kind: named_scores(row) for kind, row in zip(TYPES, by_type)},
            "sentences": len(counts),
            "counts": counts.sum(axis=1).tolist()}  # (S, 3), for the bootstrap


def named_scores(counts):
    return dict(zip(("precision", "recall", "f1"), scores(counts).tolist()))


# ---- the command -------------------------------------------------------------------------------

def parse():
    parser = Parser(description="Tune a word tagger on each run for Universal NER, score it, and "
                                "compare the runs.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN",
        help="folder of a trained run; runs that differ only in their seed form one group, and "
             "the first two groups are compared")
    add("--scratch", action="store_true",
        help="also tune an untrained decoder of each size, vocabulary and seed: this shows what "
             "pretraining adds")
    add("--train", nargs="+", default=["en_ewt"], metavar="T", choices=[*TRAINED, "toy", "all"],
        help=f"treebanks to tune on, each separately (default: en_ewt): {', '.join(TRAINED)}, toy "
             "(made up), all (UNER's as one)")
    add("--test", nargs="+", default=["en_ewt"], metavar="T",
        choices=[*TRAINED, *TEST_ONLY, "toy"],
        help="treebanks to score on (default: en_ewt): the same except all, and "
             f"{', '.join(TEST_ONLY)}")
    add("--mode", nargs="+", default=["head"], choices=["head", "full"],
        help="head: tune only the tag head (default); full: tune the decoder, too")
    add("--seeds", type=number(int, 1, 1000), default=1, metavar="N",
        help="repeat each tuning with seeds 0 to N - 1, to see how much the scores vary")
    add("--uner", metavar="FOLDER", type=filled,
        help="folder with UNER's .iob2 files (default: download them to the cache)")
    add("--epochs", type=number(int, 1), default=10,
        help="passes over the training treebank; the best epoch on dev is kept")
    add("--batch-size", type=number(int, 1), default=16, help="sentences per update")
    add("--lr", type=number(float, 1e-12, 1e9),
        help=f"initial learning rate, which falls to 0 (default: {HEAD_LR} / d_model for head, "
             f"{FULL_LR:g} for full; the paper: {FULL_LR:g} for both)")
    add("--max-len", type=number(int, 1, 2048), default=128,
        help="tokens to read per sentence; later words are tagged O")
    add("--out", default="ner", metavar="FOLDER", type=filled,
        help="folder for results; the same command continues a stopped job there")
    add("--predictions", action="store_true",
        help="write the gold and predicted tag of each test word to .tsv files")
    add("--device", type=filled, help="cuda, mps or cpu (default: the best available)")
    add("--cache", metavar="FOLDER", type=filled,
        help="folder for downloads (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")
    add("--quiet", action="store_true", help="hide progress bars")
    return parser.parse_args(), parser


@command
def main():
    args, parser = parse()
    # A value given twice counts once.
    args.train, args.test = list(dict.fromkeys(args.train)), list(dict.fromkeys(args.test))
    args.mode = list(dict.fromkeys(args.mode))
    if args.uner and not Path(args.uner).is_dir():
        parser.error(f"--uner {args.uner}: no such folder, check the name")
    for run in args.runs:
        read_settings(run)  # an unknown run fails early
    with locked(args.out, "choose another --out"):
        cells = read_cells(args.out)
        treebanks = load_treebanks(args.train, args.test, args.uner, args.cache, args.quiet)
        models, groups = load_models(args.runs, args.scratch)
        try:
            run_grid(args, models, treebanks, cells)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Finished results are in {args.out}. To continue, give the "
                                    "same command again.") from None
        print(report(args, groups, cells, f1_of))


if __name__ == "__main__":
    main()
