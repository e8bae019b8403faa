"""Universal NER: what did pretraining buy?

    python ner.py runs/11m-vanilla runs/11m-meta --train en_ewt --test en_ewt --mode head
    python ner.py runs/11m-vanilla* runs/11m-meta* --scratch --test en_ewt da_ddt tl_trg --mode head full    # all their seeds

A linear layer reads each word's tag (person, organisation, place) off the decoder's last hidden state. Trained alone on
frozen states (`head`) it asks what they already know; trained with the decoder (`full`), what they are a good start for.
Data and scores follow Universal NER (Mayhew et al. 2024, arXiv 2311.09122), tuning the paper. Writes ner/ner.json (a
cell for each run, training treebank, mode, seed and test treebank) and ner/ner.png.
"""
import copy
import http.client
import itertools
import json
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from checkpoint import fingerprint, write_atomically
from model import Decoder, Parser, load_run, pick_device, precision
from probe import new_figure, save_figure
from report import group_runs, interval

TYPES = ["PER", "ORG", "LOC"]
TAGS = ["O"] + [f"{prefix}-{kind}" for kind in TYPES for prefix in "BI"]
TRAINED = {  # UNER v1: the treebanks with train, dev and test, and the repository of each
    "da_ddt": "Danish-DDT", "en_ewt": "English-EWT", "hr_set": "Croatian-SET", "pt_bosque": "Portuguese-Bosque", "sk_snk": "Slovak-SNK",
    "sr_set": "Serbian-SET", "sv_talbanken": "Swedish-Talbanken", "zh_gsd": "Chinese-GSD", "zh_gsdsimp": "Chinese-GSDSIMP"}
TEST_ONLY = {
    "ceb_gja": "Cebuano-GJA", "tl_trg": "Tagalog-TRG", "tl_ugnayan": "Tagalog-Ugnayan", "de_pud": "German-PUD", "en_pud": "English-PUD",
    "pt_pud": "Portuguese-PUD", "ru_pud": "Russian-PUD", "sv_pud": "Swedish-PUD", "zh_pud": "Chinese-PUD"}
HEAD_LR, FULL_LR = 10, 3e-5  # head: over d_model, the best on dev of en_ewt at 11m; full: the paper's
LARGEST_FILE = 32_000_000    # bytes; the treebanks have 4 million at most
KEY = ("run", "train", "mode", "seed", "test")  # what names a cell
PREDICTIONS = "{}__{}__{}__seed{}__{}.tsv"


# ---- treebanks ---------------------------------------------------------------------------------------------

def parse_iob2(content, name):
    """[(words, tags)], a pair for each sentence, of an IOB2 file's bytes. Raises DataError naming file and line.
    Columns: id, word, tag, then any. As in UNER's own reader every line with an id is a word, `3-4` and `8.1` too, and
    tags of the types that UNER dropped (OTH, B-O) are O; so is `_`, UD's word for none."""
    sentences = [([], [])]
    for number, line in enumerate(content.split(b"\n"), 1):  # not splitlines(), which knows too many kinds of end
        columns = line.decode(errors="replace").rstrip("\r").split("\t")
        if not line.strip():
            sentences.append(([], []))
        elif not line.startswith(b"#"):
            if len(columns) < 3 or not columns[0][:1].isdigit() or not columns[1].strip() or "\ufffd" in columns[1]:
                raise data.DataError(f"{name}, line {number}: not an id, a word and a tag, in UTF-8 with tabs: {line[:60]}")
            tag = "O" if "OTH" in columns[2] or columns[2] in ("B-O", "_") else columns[2]
            if tag not in TAGS:
                raise data.DataError(f"{name}, line {number}: unknown tag {tag[:20]!r}, known are {', '.join(TAGS)}")
            sentences[-1][0].append(columns[1])
            sentences[-1][1].append(tag)
    if not any(words for words, _ in sentences):
        raise data.DataError(f"{name} holds no sentence")
    return [sentence for sentence in sentences if sentence[0]]


def download(url, path, quiet=False):
    """Fetch an IOB2 file over https and put it whole at path. Raises OSError, or DataError if it is no treebank."""
    content = b""
    with urllib.request.urlopen(url, timeout=20) as response:
        for block in tqdm(iter(lambda: response.read(2 ** 16), b""), desc=path.name, unit="x64 KiB", disable=True if quiet else None):
            content += block
            if len(content) > LARGEST_FILE or not response.geturl().startswith("https:"):
                raise OSError("too large, or redirected away from https")
    if response.headers["Content-Length"] not in (None, str(len(content))):
        raise OSError("the connection broke off")
    parse_iob2(content, url)  # an error page must not enter the cache
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def read_treebank(name, split, folder=None, cache=None, quiet=False):
    """[(words, tags)] of one split (train, dev or test) of a treebank: from folder, else from the cache, else fetched into
    it; "toy" is made up. Raises FileNotFoundError if it cannot be had, DataError if it cannot be read."""
    if name == "toy":
        return toy_treebank(split)
    file, repository = f"{name}-ud-{split}.iob2", f"UniversalNER/UNER_{(TRAINED | TEST_ONLY)[name]}"
    cached = data.cache_root(cache) / "uner" / file
    path = Path(folder) / file if folder and (Path(folder) / file).exists() else cached
    try:
        if not path.exists():
            download(f"https://raw.githubusercontent.com/{repository}/HEAD/{file}", path, quiet)
        return parse_iob2(path.read_bytes(), path)
    except (OSError, http.client.HTTPException) as error:
        raise FileNotFoundError(f"{file} could not be had ({getattr(error, 'reason', error)}): get it from https://github.com/{repository} "
                                f"and put it into {folder or cached.parent} (--uner FOLDER names another); without a network: --train toy --test toy") from None


def load_treebanks(trains, tests, folder=None, cache=None, quiet=False):
    """{(name, split): sentences} of training and test treebanks; "all" is every training treebank that can be had, one
    after another. A file that "all" or dev can do without is left out, and said. Raises as read_treebank for the rest."""
    treebanks = {}
    for name, split in [(test, "test") for test in tests] + list(itertools.product(trains, ("train", "dev"))):
        for one in TRAINED if name == "all" else [name]:
            try:
                treebanks[name, split] = treebanks.get((name, split), []) + read_treebank(one, split, folder, cache, quiet)
            except FileNotFoundError as error:
                if split != "dev" and (name != "all" or one == list(TRAINED)[-1] and (name, split) not in treebanks):
                    raise
                print(f"{name} ({split}) goes without {error}", file=sys.stderr)
    return treebanks


def toy_treebank(split):
    """400 made-up sentences to train, 100 for dev, 100 to test, the same every time. The same names are people, firms
    and places; the words before a name tell which: a causal decoder sees nothing behind it."""
    rng = np.random.default_rng([0, ["train", "dev", "test"].index(split)])
    patterns = ["Mr PER met Mrs PER in LOC .", "shares in the company ORG fell .", "they flew to LOC with Mr PER .",
                "nobody remembered the weather .", "Mrs PER works at the company ORG in LOC .", "the train from LOC was late ."]
    names = ["Lincoln", "Ford", "Jordan", "Chester", "Morgan Hill", "Stanford Green", "Ford Green", "Lincoln Hill"]
    sentences = []
    for _ in range(400 if split == "train" else 100):
        pairs = []
        for word in str(rng.choice(patterns)).split():
            pairs += zip(str(rng.choice(names)).split(), [f"B-{word}", f"I-{word}"]) if word in TYPES else [(word, "O")]
        sentences.append(tuple(map(list, zip(*pairs))))
    return sentences


# ---- the tagger and its scores -----------------------------------------------------------------------------

@dataclass
class Sentence:
    """W words, of which the first K can be tagged: their token lies within max_len."""
    words: list                  # W strings
    tags: list                   # W strings, gold
    ids: torch.Tensor            # (T,) int64, T <= max_len
    position: torch.Tensor       # (K,) the token whose state stands for the word
    label: torch.Tensor          # (K,) indices in TAGS
    states: torch.Tensor = None  # (K, D), once frozen_states has met the sentence


def encode(sentences, encoding, max_len=128, subtoken="first"):
    """[Sentence] of [(words, tags)]: words joined by one space, cut after max_len tokens, read at their first or last."""
    n_bytes = np.array([len(encoding.decode_single_token_bytes(i)) for i in range(encoding.encode_single_token(data.END))])
    encoded = []
    for (words, tags), tokens in zip(sentences, encoding.encode_ordinary_batch([" ".join(words) for words, _ in sentences])):
        token_end = np.cumsum(n_bytes[tokens])                           # (T,) byte of the text behind each token
        size = np.array([len(word.encode()) for word in words])          # (W,)
        word_end = np.cumsum(size + 1) - 1                               # (W,)
        byte = word_end - size if subtoken == "first" else word_end - 1  # (W,) the word's first or last
        at = np.searchsorted(token_end, byte, side="right")              # (W,) the token that holds this byte
        at = torch.from_numpy(at[at < max_len])
        label = [TAGS.index(tag) for tag in tags[:len(at)]]
        encoded.append(Sentence(words, tags, torch.tensor(tokens[:max_len]), at, torch.tensor(label, dtype=torch.int64)))
    return encoded


def batches(sentences, size, rng=None):
    """Lists of `size` sentences in order of length, so that little is padding. With a generator, random lists in random
    order: up to 8 tokens of noise on the length decide who meets whom."""
    length = np.array([len(sentence.ids) for sentence in sentences])
    order = np.argsort(length + (rng.uniform(0, 8, len(length)) if rng else 0), kind="stable")
    lists = [[sentences[i] for i in order[at:at + size]] for at in range(0, len(order), size)]
    return [lists[i] for i in rng.permutation(len(lists))] if rng else lists


def word_states(backbone, batch):
    """Last hidden states (words, D), float32, that stand for the words of a batch of sentences, one after another."""
    device = backbone.cos.device
    ids = pad_sequence([s.ids for s in batch], batch_first=True).to(device)  # (B, T); what follows a word cannot change it
    row = torch.cat([torch.full_like(s.position, i) for i, s in enumerate(batch)])
    with precision(device):
        return backbone(ids)[row.to(device), torch.cat([s.position for s in batch]).to(device)]


@torch.no_grad()
def frozen_states(backbone, batch):
    """word_states, on the CPU, of a backbone that stands still: computed once a sentence, for all epochs and seeds."""
    new = [s for s in batch if s.states is None]
    for sentence, states in zip(new, word_states(backbone, new).cpu().split([len(s.position) for s in new]) if new else ()):
        sentence.states = states
    return torch.cat([s.states for s in batch])


def tune(backbone, mode, train, dev, epochs, lr, batch_size, strict, seed, bar):
    """Fit a linear layer to frozen states (mode "head"), or with it a copy of the backbone ("full"): AdamW, lr falling
    linearly to 0. The epoch with the best dev F1 counts; without dev, the last.
    Returns (predict, losses, F1 on dev, epoch): predict(sentences) -> their tags; losses (steps,), nats per word."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    backbone = copy.deepcopy(backbone) if mode == "full" else backbone
    read = word_states if mode == "full" else frozen_states
    device = backbone.cos.device if mode == "full" else "cpu"  # a few hundred weights are fastest on the CPU
    weight = 0.02 * torch.randn(len(TAGS), len(backbone.norm.weight), generator=generator)  # (tags, D)
    head = [weight.to(device).requires_grad_(), torch.zeros(len(TAGS), device=device, requires_grad=True)]  # weight, bias
    parameters = head + (list(backbone.parameters()) if mode == "full" else [])

    @torch.no_grad()
    def predict(sentences):
        tags = {}
        for batch in batches(sentences, 64):
            best = F.linear(read(backbone, batch), *head).argmax(dim=1).cpu().split([len(s.position) for s in batch])
            tags |= {id(s): [TAGS[i] for i in row] + ["O"] * (len(s.words) - len(row)) for s, row in zip(batch, best)}
        return [tags[id(s)] for s in sentences]

    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    losses, best, steps = [], None, epochs * -(-len(train) // batch_size)
    if mode == "head":
        predict(train)  # computes all frozen states, in batches that do not depend on the seed
    for epoch in range(1, epochs + 1):
        for batch in batches(train, batch_size, rng):
            optimizer.param_groups[0]["lr"] = lr * (1 - len(losses) / steps)
            label = torch.cat([s.label for s in batch]).to(device)  # (words,)
            logits = F.linear(read(backbone, batch), *head)         # (words, tags)
            loss = F.cross_entropy(logits, label, reduction="sum") / max(1, len(label))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            bar.update(len(batch))
        f1 = float(scores(count(dev, predict(dev), strict).sum(axis=(0, 1)))[2]) if dev else None
        if not dev or best is None or f1 > best[0]:
            best = f1, epoch, [p.detach().clone() for p in parameters]
    for p, value in zip(parameters, best[2]):
        p.data = value
    return predict, torch.stack(losses).cpu().numpy(), *best[:2]


def tuning_speed(losses, every=10):
    """The paper's figures of a loss curve (steps,), each of whose points is the mean of `every` steps: t90, the first
    step at which 90 % of the drop from first to last point is done (None: no drop); auc, trapezoid area over the range
    of steps, so nats per word; slope, least squares on the first 10 % of the points (at least two), nats per step."""
    every = max(1, min(every, len(losses) // 2))
    loss = losses[:len(losses) // every * every].reshape(-1, every).mean(axis=1).astype(float)
    loss = np.repeat(loss, 2) if len(loss) == 1 else loss  # a single step: a flat line
    step, early = every * np.arange(1, len(loss) + 1), max(2, round(0.1 * len(loss)))
    done = np.flatnonzero(loss <= loss[0] - 0.9 * (loss[0] - loss[-1]))
    return {"t90": int(step[done[0]]) if loss[-1] < loss[0] else None,
            "auc": float((loss[1:] + loss[:-1]).mean() / 2),  # the points are evenly spaced
            "slope": float(np.polyfit(step[:early], loss[:early], 1)[0])}


def entities(tags, strict=False):
    """{(type, start, end)} of IOB2 tags, end exclusive, by the CoNLL rules: an I- that continues nothing starts an
    entity (seqeval's default), or is passed over (strict: seqeval's mode "strict" with scheme IOB2)."""
    spans, kind, start = set(), None, 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, tag_kind = tag.partition("-")
        if prefix != "I" or tag_kind != kind:
            spans.add((kind, start, i))
            kind, start = (tag_kind if prefix == "B" or prefix == "I" and not strict else None), i
    return {span for span in spans if span[0]}  # without the stretches between entities


def count(sentences, predicted, strict=False):
    """(S, types, 3): the entities of each sentence that predicted tags find, make up, and miss (tp, fp, fn)."""
    counts = np.zeros((len(sentences), len(TYPES), 3), dtype=int)
    for row, sentence, tags in zip(counts, sentences, predicted):
        gold, found = entities(sentence.tags, strict), entities(tags, strict)
        for span in gold | found:
            row[TYPES.index(span[0]), 0 if span in gold & found else 1 if span in found else 2] += 1
    return counts


def scores(counts):
    """Precision, recall and F1, (..., 3), from 0 to 1, of tp, fp and fn (..., 3); 0 where undefined, as in seqeval."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    return np.stack([tp / np.maximum(tp + fp, 1), tp / np.maximum(tp + fn, 1), 2 * tp / np.maximum(2 * tp + fp + fn, 1)], axis=-1)


def bootstrap(first, second, resamples=1000):
    """(resamples,) of F1, mean over seeds, of the second model minus the first, counts (seeds, S, 3): sentences and
    seeds are drawn with replacement, the same for both models (paired bootstrap: Koehn 2004)."""
    seeds, n, _ = first.shape
    rng = np.random.default_rng(0)
    drawn = rng.integers(seeds, size=(resamples, seeds))  # first, and so the same for all test treebanks
    times = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)  # (R, S) how often each sentence is drawn
    f1 = [scores(np.tensordot(times, counts, axes=(1, 1)))[..., 2] for counts in (first, second)]  # (R, seeds) each
    return np.take_along_axis(f1[1] - f1[0], drawn, axis=1).mean(axis=1)


# ---- the grid ----------------------------------------------------------------------------------------------

def load_models(runs, scratch):
    """({name: (decoder on the CPU, encoding)} of run folders, {group: {seed: name}} of those that differ in their seed alone); with scratch
    also what the first run of each size, vocabulary and seed was before its first update. Raises ValueError and DataError."""
    models, controls, found, untrained = {}, {}, [], {}
    for run in runs:
        name = Path(run).resolve().name
        if name in models:
            raise ValueError(f"two runs are called {name}, and results are kept by name: rename one folder")
        decoder, settings = load_run(run)
        models[name] = decoder, data.load_encoding(run)
        found.append((settings | {"name": name}, name))
        start = {key: settings[key] for key in ("size", "vocab_size", "seed")}
        control = f"scratch-{settings['size']}" + f"-s{settings['seed']}" * (settings["seed"] > 0)
        control += f"-{settings['vocab_size']}" * (control in controls)
        if scratch and tuple(start.values()) not in untrained:
            controls[control] = Decoder(decoder.config, torch.Generator().manual_seed(start["seed"])), models[name][1]
            untrained[tuple(start.values())] = start | {"name": control}, control
    groups = group_runs(found + list(untrained.values()))
    return models | controls, {label: {settings["seed"]: name for settings, name in members} for label, members in groups.items()}


def read_cells(path):
    """{(run, train, mode, seed, test): cell} of an ner.json, {} if there is none. Raises DataError if it is something else."""
    try:
        return {tuple(cell[key] for key in KEY): cell for cell in (json.loads(path.read_text()) if path.exists() else [])
                if cell["settings"].items() and cell["counts"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise data.DataError(f"{path} is not a list of result cells: move it away, or choose another --out") from None


def plan(args, models, treebanks, cells):
    """{(run, train, mode, seed, test): settings} of the cells still to be computed. `settings` is all that a result depends
    on; raises DataError if a finished cell was computed with others."""
    weights = {run: fingerprint(decoder.state_dict())[:16] for run, (decoder, _) in models.items()}
    sha256 = {key: data.digest(json.dumps(sentences)).hex()[:16] for key, sentences in treebanks.items()}
    todo = {}
    for cell in itertools.product(models, args.train, args.mode, range(args.seeds), args.test):
        run, train, mode, _, test = cell
        settings = {key: vars(args)[key] for key in ("epochs", "batch_size", "max_len", "subtoken", "strict")} | {
            "lr": args.lr or (HEAD_LR / models[run][0].config.d_model if mode == "head" else FULL_LR), "checkpoint": weights[run],
            "train": sha256[train, "train"], "dev": sha256.get((train, "dev")), "test": sha256[test, "test"]}
        old = cells[cell]["settings"] if cell in cells else settings
        differing = [f"{key} {old.get(key)} there, {settings[key]} now" for key in settings if old.get(key) != settings[key]]
        if differing:
            raise data.DataError(f"{args.out}/ner.json has another {' '.join(map(str, cell))} ({', '.join(differing)}): choose another --out")
        if cell not in cells or args.predictions and not (Path(args.out) / PREDICTIONS.format(*cell)).exists():
            todo[cell] = settings
    return todo


def run_grid(args, models, treebanks, cells):
    """Tune and test what cells lack; adds it there and to the files in args.out after each tuning."""
    device, todo = pick_device(args.device), plan(args, models, treebanks, cells)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    total = sum(args.epochs * len(treebanks[train, "train"]) for _, train, _, _ in {cell[:4] for cell in todo})
    bar = tqdm(total=total, unit="sentence", disable=True if args.quiet else None)
    for (run, train), same_data in itertools.groupby(todo, key=lambda cell: cell[:2]):
        decoder, encoding = models[run]
        backbone = copy.deepcopy(decoder.model).to(device)
        encoded = {key: encode(sentences, encoding, args.max_len, args.subtoken) for key, sentences in treebanks.items()
                   if key[0] == train or key[1] == "test"}
        for (_, _, mode, seed), same_tuning in itertools.groupby(same_data, key=lambda cell: cell[:4]):
            same_tuning = list(same_tuning)
            bar.set_description(f"{run}, {train}, {mode}, seed {seed}")
            predict, losses, dev_f1, epoch = tune(backbone, mode, encoded[train, "train"], encoded.get((train, "dev")), args.epochs,
                                                  todo[same_tuning[0]]["lr"], args.batch_size, args.strict, seed, bar)
            for cell in same_tuning:
                sentences, predicted = encoded[cell[4], "test"], predict(encoded[cell[4], "test"])
                if args.predictions:
                    blocks = ("\n".join(map("\t".join, zip(s.words, s.tags, tags))) for s, tags in zip(sentences, predicted))
                    write_atomically(Path(args.out) / PREDICTIONS.format(*cell), "\n\n".join(blocks) + "\n")
                counts = count(sentences, predicted, args.strict)
                named = lambda c: dict(zip(("precision", "recall", "f1"), scores(c).tolist()))
                cells[cell] = dict(zip(KEY, cell)) | named(counts.sum(axis=(0, 1))) | tuning_speed(losses) | {
                    "types": dict(zip(TYPES, map(named, counts.sum(axis=0)))), "sentences": len(sentences),
                    "epoch": epoch, "dev_f1": dev_f1, "settings": todo[cell],
                    "counts": counts.sum(axis=1).tolist()}  # (S, 3) tp, fp and fn of each sentence: the bootstrap's
            write_atomically(Path(args.out) / "ner.json", "[" + ",\n".join(map(json.dumps, cells.values())) + "]\n")
    bar.close()


def report(args, groups, cells):
    """A Markdown table: F1 in points (mean ± standard deviation over runs and tunings) and tuning speed of each group of
    runs, and the F1 difference of the first two (95 % interval), seed by seed, which is also drawn to ner.png."""
    get = lambda key, runs, mode, train, test: np.array([[cells[run, train, mode, seed, test][key] for seed in range(args.seeds)] for run in runs])
    show = lambda values, form: "-" if None in values else format(np.mean(values), form)
    spread = lambda f1: f"{100 * np.mean(f1):.1f}" + (f" ± {100 * np.std(f1, ddof=1):.1f}" if f1.size > 1 else "")
    in_words = lambda *found: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval(*found))
    rows = [["mode", "train", "run", *args.test, "t90 (steps)", "AUC (nats)", "slope (nats/step)"], ["---"] * (6 + len(args.test))]
    labels, differences = list(groups), []  # ((n,) of the pairs, (R,) resampled) in points, by mode, train and test
    first, second = (groups[label] for label in labels[:2]) if len(labels) > 1 else ({}, {})
    seeds = sorted(first.keys() & second.keys())
    pairs = [(first[seed], second[seed]) for seed in seeds] or list(zip(first.values(), second.values()))
    for mode, train in itertools.product(args.mode, args.train):
        for label, runs in groups.items():
            speed = [show(get(key, runs.values(), mode, train, args.test[0]), form) for key, form in {"t90": ".0f", "auc": ".4f", "slope": ".1e"}.items()]
            f1 = (spread(get("f1", runs.values(), mode, train, test)) for test in args.test)
            rows.append([mode, train, label + f" ({len(runs)} runs)" * (len(runs) > 1), *f1, *speed])
        if pairs:
            for test in args.test:
                one, two = (get("f1", runs, mode, train, test).mean(axis=1) for runs in zip(*pairs))            # (pairs,) each
                counts = (get("counts", [run], mode, train, test)[0] for run in pairs[0])                       # (tunings, S, 3) each
                differences.append((100 * (two - one), 100 * bootstrap(*counts) if len(pairs) == 1 else np.zeros(0)))
            rows.append([mode, train, f"{labels[1]} − {labels[0]}", *(in_words(*found) for found in differences[-len(args.test):]), "", "", ""])
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    if pairs:
        title = f"{labels[1]} − {labels[0]}: {in_words(*(np.mean(column, axis=0) for column in zip(*differences)))} F1 points on average"
        draw_differences(args, [values.mean() for values, _ in differences], title)
        over = f"t over {len(pairs)} pairs of pretraining runs" if len(pairs) > 1 else "bootstrap over sentences and tunings; other pretraining seeds would differ more"
        text += f"\n\n{title} (95 % interval, {over}; pairs: {', '.join(' and '.join(pair) for pair in pairs)})"
    return text


def draw_differences(args, values, title):
    """ner.png: a heat map for each mode, training by test treebanks, of F1 differences in points, listed in that order."""
    grids = np.reshape(values, (len(args.mode), len(args.train), len(args.test)))
    limit = max(1, np.abs(grids).max())  # white is no difference
    figure = new_figure(2 + len(args.mode) * (2 + 0.7 * len(args.test)), 2.2 + 0.5 * len(args.train))
    for axes, mode, grid in zip(figure.subplots(1, len(args.mode), squeeze=False)[0], args.mode, grids):
        image = axes.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set(title=f"{mode} tuning", xlabel="test treebank", ylabel="training treebank")
        axes.set_yticks(range(len(args.train)), args.train)
        axes.set_xticks(range(len(args.test)), args.test, rotation=90)
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, f"{value:+.1f}", ha="center", va="center", color="white" if abs(value) > 0.6 * limit else "black")
    figure.colorbar(image, ax=figure.axes, label="difference in F1 (points)")
    figure.suptitle(title, fontsize="medium", wrap=True)
    save_figure(figure, Path(args.out) / "ner.png")


def main():
    parser = Parser(description="Tune a word tagger on each run for Universal NER, score it, and compare the runs.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of trained runs; those that differ in their seed alone are one group, and the first two groups are compared")
    add("--scratch", action="store_true", help="add each run's decoder as it was before training: what did pretraining buy?")
    add("--train", nargs="+", default=["en_ewt"], metavar="T", choices=[*TRAINED, "toy", "all"],
        help=f"treebanks to tune on (default: en_ewt): {', '.join(TRAINED)}, toy (made up), all (as one)")
    add("--test", nargs="+", default=["en_ewt"], metavar="T", choices=[*TRAINED, *TEST_ONLY, "toy"],
        help=f"treebanks to score on (default: en_ewt): those, and {', '.join(TEST_ONLY)}")
    add("--mode", nargs="+", default=["head"], choices=["head", "full"], help="tune the tag head alone (default), or the decoder too")
    add("--seeds", type=int, default=1, metavar="N", help="tunings of each kind, with seeds 0 to N - 1 (default: %(default)s)")
    add("--uner", metavar="FOLDER", help="folder with UNER's .iob2 files (default: the cache, filled by download)")
    add("--epochs", type=int, default=10, help="passes over the training treebank; the best on dev counts (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="sentences per update (default: %(default)s)")
    add("--lr", type=float, help=f"first learning rate, falling to 0 (default: {HEAD_LR} / d_model for head, {FULL_LR:g} for full)")
    add("--max-len", type=int, default=128, help="tokens read of a sentence; words beyond are tagged O (default: %(default)s)")
    add("--subtoken", choices=["first", "last"], default="first", help="the token whose state stands for a word (default: %(default)s)")
    add("--strict", action="store_true", help="score an I- tag that continues nothing as no entity")
    add("--out", default="ner", metavar="FOLDER", help="results; finished ones stay, so the same command continues (default: %(default)s)")
    add("--predictions", action="store_true", help="write word, gold and predicted tag of every test set, as .tsv")
    add("--device", help="cuda, mps or cpu (default: the best that is here)")
    add("--cache", metavar="FOLDER", help="folder of downloads (default: nanomaml under $XDG_CACHE_HOME or ~/.cache)")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    args.train, args.test, args.mode = (list(dict.fromkeys(names)) for names in (args.train, args.test, args.mode))
    if min(args.seeds, args.epochs, args.batch_size) < 1 or not 1 <= args.max_len <= 2048 or args.lr is not None and not 0 < args.lr < 1e9:
        parser.error("--seeds, --epochs and --batch-size must be 1 or more, --max-len 1 to 2048, --lr more than 0")
    if args.uner and not Path(args.uner).is_dir():
        parser.error(f"--uner {args.uner}: no such folder")
    try:
        (models, groups), cells = load_models(args.runs, args.scratch), read_cells(Path(args.out) / "ner.json")
        run_grid(args, models, load_treebanks(args.train, args.test, args.uner, args.cache, args.quiet), cells)
        print(report(args, groups, cells))
    except (ValueError, OSError, data.DataError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"stopped; what is finished lies in {args.out}, and the same command continues\n")


if __name__ == "__main__":
    main()
