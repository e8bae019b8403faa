"""Runs with settings that have no flag, and the figures of many runs in one file.

    python docs/experiments.py articles wiki.valid.tokens wiki.test.tokens --out prose
    python docs/experiments.py plan little-text                 # the commands, one per line
    python docs/experiments.py train dropout=0.1 -- --data prose/1000kb.jsonl --name dropout
    python docs/experiments.py collect little-text --out docs/results/little-text.json

`train` is train.py with some of its functions replaced. Each replacement is a CHANGE, a few lines
long, and config.json records it. What the runs showed is in docs/results.md.
"""
import argparse
import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import train  # noqa: E402
from meta import accuracy  # noqa: E402
from model import Config, Decoder, backbone_flops  # noqa: E402
from plumbing import processes  # noqa: E402
from plumbing.commands import Parser, UserError, command, filled, path  # noqa: E402
from plumbing.files import read_file, write_atomically  # noqa: E402
from plumbing.logs import layer_series, read_run, series  # noqa: E402
from plumbing.phases import FEWEST_PROBES, holds, phase  # noqa: E402
from plumbing.text import is_validation  # noqa: E402
from probe import effective_rank, run_with_gradient  # noqa: E402

# The noise of a change must not repeat the numbers that the weights were drawn from.
NOISE_SEED = 1_000_003
# A WikiText article begins with a line such as " = Robert Boulter = ". Section titles have more
# equals signs.
ARTICLE_TITLE = re.compile(r"^ = [^=].* = $")
# How much text to train on `articles` writes, in kB. One article in ten is for validation.
TEXT_SIZES = (300, 1000, 2000)
VALIDATION_EVERY = 10


# ---- settings without a flag -------------------------------------------------------------------

def noise_generator(args):
    """The generator for a change's random numbers. A resumed run starts it anew, so with such a
    change it is not the same to the bit."""
    return torch.Generator().manual_seed(args.seed + NOISE_SEED)


def change_dropout(rate):
    """Drop this share of what each attention and MLP block adds to the residual stream."""
    train.build_models = partial(build_with_dropout, train.build_models, rate)


def build_with_dropout(build, rate, args, corpus, device):
    decoder, meta_head = build(args, corpus, device)
    generator = noise_generator(args)
    for layer in decoder.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(partial(drop, rate, generator))
    return decoder, meta_head


def drop(rate, generator, block, inputs, output):
    """A forward hook: F.dropout, but with an explicit generator."""
    if not block.training:
        return output
    kept = torch.rand(output.shape, generator=generator) >= rate
    return output * kept.to(output.device) / (1 - rate)


def change_weight_decay(rate):
    """Weight decay of AdamW, instead of 0.1."""
    train.build_optimizer = partial(build_with_weight_decay, train.build_optimizer, rate)


def build_with_weight_decay(build, rate, decoder, meta_head):
    optimizer = build(decoder, meta_head)
    for group in optimizer.param_groups:
        group["weight_decay"] = rate
    return optimizer


def change_layers(count):
    """A decoder with this many layers, instead of 12. Other scripts cannot load such a run."""
    train.Config = partial(Config, n_layer=int(count))


def change_mask_inputs(share):
    """Replace this share of the input tokens of next-token steps by <|mask|>. The targets stay."""
    train.build_models = partial(build_with_masked_inputs, train.build_models, share)


def build_with_masked_inputs(build, share, args, corpus, device):
    decoder, meta_head = build(args, corpus, device)
    decoder.loss = partial(masked_input_loss, decoder, share, corpus.mask_id,
                           noise_generator(args))
    return decoder, meta_head


def masked_input_loss(decoder, share, mask_id, generator, ids, targets, backbone=None):
    """Decoder.loss, with masked inputs in training."""
    if decoder.training:
        masked = torch.rand(ids.shape, generator=generator) < share
        ids = torch.where(masked.to(ids.device), mask_id, ids)
    return Decoder.loss(decoder, ids, targets, backbone)


def change_name_words(_):
    """Meta steps without learning to learn: predict the masked word of each row, support and query
    alike, among all tokens of the vocabulary. There is no inner loop and no meta head."""
    train.build_models = partial(build_with_word_loss, train.build_models)
    train.meta_cost = word_cost


def build_with_word_loss(build, args, corpus, device):
    decoder, meta_head = build(args, corpus, device)
    word_ids = torch.from_numpy(corpus.index.words).to(device)
    train.meta_loss = partial(word_loss, decoder.lm_head, word_ids)
    return decoder, meta_head


def word_loss(lm_head, word_ids, backbone, meta_head, episode, *inner_settings):
    """(loss, figures) as meta.meta_loss returns them. word_ids (C,) are the token ids of all
    classes."""
    rows = torch.cat([episode.support_ids, episode.query_ids])
    labels = torch.cat([episode.support_labels, episode.query_labels])
    targets = word_ids[episode.words[labels]]  # (R,)
    logits = lm_head(backbone(rows)[:, -1]).float()  # (R, V)
    n_support = len(episode.support_labels)
    figures = {"support_accuracy": accuracy(logits[:n_support], targets[:n_support]),
               "query_accuracy": accuracy(logits[n_support:], targets[n_support:])}
    return F.cross_entropy(logits, targets), figures


def word_cost(args, decoder, meta_head):
    """(tokens, model FLOPs) of an update with word_loss."""
    if meta_head is None:
        return None
    rows = args.n_way * (args.k_shot + args.n_query)
    output_layer = 2 * rows * decoder.config.d_model * decoder.config.vocab_size
    flops = 3 * (backbone_flops(decoder.config, rows, args.episode_len) + output_layer)
    return args.grad_accum * rows * args.episode_len, args.grad_accum * flops


def change_shuffle_labels(_):
    """Give the support rows of training episodes each other's labels, so that they teach
    nothing."""
    train.build_models = partial(build_with_shuffled_labels, train.build_models)


def build_with_shuffled_labels(build, args, corpus, device):
    train.meta_loss = partial(shuffled_meta_loss, train.meta_loss, noise_generator(args))
    return build(args, corpus, device)


def shuffled_meta_loss(meta_loss, generator, backbone, meta_head, episode, *inner_settings):
    order = torch.randperm(len(episode.support_labels), generator=generator)
    labels = episode.support_labels[order.to(episode.support_labels.device)]
    episode = replace(episode, support_labels=labels)
    return meta_loss(backbone, meta_head, episode, *inner_settings)


def change_min_count(count):
    """A class must occur this often, instead of 64 times."""
    data.MIN_COUNT = int(count)


def change_init(std):
    """Draw all weights from N(0, std^2), as the paper's code does with 0.02."""
    train.build_models = partial(build_with_init, train.build_models, std)


def build_with_init(build, std, args, corpus, device):
    decoder, meta_head = build(args, corpus, torch.device("cpu"))
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() > 1:  # norms stay at 1
                weight.normal_(std=std, generator=generator)
        decoder.model.embed_tokens.weight[corpus.mask_id] = 0
    return decoder.to(device), meta_head


def change_more_probes(_):
    """Probe two more things: the hidden states without centring ("hidden_raw"), and the gradients
    of the mean logit ("attention_logit_grad", "mlp_logit_grad"), as the paper's code does."""
    train.measure = partial(measure_more, train.measure)


def measure_more(measure, decoder, batch):
    """The figures of probe.measure, with more effective ranks, as means over matrices by layer."""
    figures = measure(decoder, batch)
    hidden, _ = run_with_gradient(decoder, batch)
    decoder.zero_grad()
    decoder(batch[:, :-1]).float().mean().backward()
    layers, shares = decoder.model.layers, figures["proportional_effective_rank"]
    shares["hidden_raw"] = [effective_rank(states.flatten(0, 1)) / states.shape[-1]
                            for states in hidden]
    shares["attention_logit_grad"] = [mean_share(layer.self_attn) for layer in layers]
    shares["mlp_logit_grad"] = [mean_share(layer.mlp) for layer in layers]
    decoder.zero_grad()
    return figures


def mean_share(block):
    """The mean effective rank of the gradients in a block, as a share of the full rank."""
    shares = [effective_rank(weight.grad) / min(weight.shape) for weight in block.parameters()]
    return sum(shares) / len(shares)


CHANGES = {"dropout": change_dropout, "weight-decay": change_weight_decay,
           "layers": change_layers, "mask-inputs": change_mask_inputs,
           "name-words": change_name_words, "shuffle-labels": change_shuffle_labels,
           "min-count": change_min_count, "init": change_init,
           "more-probes": change_more_probes}
# These have no effect without --meta.
META_CHANGES = {"name-words", "shuffle-labels"}


def train_with_changes(texts, flags):
    """Train a run with flags of train.py, after the changes in texts, such as "dropout=0.1".
    Returns the exit code."""
    for text in texts:
        name, _, value = text.partition("=")
        if name not in CHANGES:
            raise UserError(f"{name[:40]} is no change: choose among {', '.join(CHANGES)}")
        try:
            CHANGES[name](float(value or 1))
        except ValueError:
            raise UserError(f"{text[:40]}: {value[:40]} is not a number") from None
    args, _ = train.parse(flags)
    without_effect = META_CHANGES.intersection(texts)
    if without_effect and not args.meta:
        raise UserError(f"{min(without_effect)} changes meta steps only: add --meta after --")
    args.changes = " ".join(texts)  # goes to config.json with the flags
    train.evaluate = partial(without_noise, train.evaluate)
    train.measure = partial(without_noise, train.measure)
    train.report = partial(report_without_noise, train.report)
    with processes.left_in_the_end():
        return train.train(args)


def without_noise(function, decoder, *args):
    """Call function(decoder, ...) with dropout and masks turned off."""
    decoder.eval()
    figures = function(decoder, *args)
    decoder.train()
    return figures


def report_without_noise(report, run, corpus, decoder, *rest):
    decoder.eval()
    report(run, corpus, decoder, *rest)


# ---- plans: the commands of an experiment ------------------------------------------------------

def little_text_plan():
    """Does meta-learning pay where text is scarce? Vanilla and hybrid runs at several budgets, each
    with a learning-rate schedule of its own, and the rivals: other ways against overfitting.

    A meta step costs 2.5 next-token steps here, so a hybrid run of 2 updates costs as much as a
    vanilla run of 3. The numbers of updates below give equal FLOPs to within 4 %."""
    text = "--data prose/1000kb.jsonl --vocab-size 4096 --runs little-text"
    sparse = "--eval-every 200 --probe-every 2000 --quiet"
    commands = []
    for steps in (600, 1200, 2400, 4800):
        commands.append(f"python train.py {text} --steps {steps} --name vanilla-{steps} {sparse}")
    for seed in (1, 2):
        commands.append(f"python train.py {text} --steps 1200 --seed {seed} "
                        f"--name vanilla-1200-s{seed} {sparse}")
    for steps in (800, 1600, 3200, 4800):
        commands.append(f"python train.py {text} --meta --steps {steps} --name hybrid-{steps} "
                        f"{sparse}")
    for rival in ("--steps 2400 weight-decay=0.3", "--steps 2400 weight-decay=1",
                  "--steps 4800 weight-decay=1", "--steps 2400 dropout=0.1",
                  "--steps 2400 --seed 1 --name dropout-0.1-2400-s1 dropout=0.1",
                  "--steps 4800 dropout=0.1", "--steps 4800 dropout=0.2",
                  "--steps 2400 mask-inputs=0.15", "--steps 4800 mask-inputs=0.15",
                  "--steps 5370 layers=4", "--meta --steps 1600 shuffle-labels",
                  "--meta --steps 3200 shuffle-labels", "--meta --steps 1050 name-words",
                  "--meta --steps 2100 name-words"):
        flags, _, change = rival.rpartition(" ")
        if "--name" not in flags:
            flags += f" --name {change.replace('=', '-')}-{flags.split()[-1]}"
        commands.append(f"python docs/experiments.py train {change} -- {text} {flags} {sparse}")
    for steps in (1300, 2600):
        commands.append(f"python train.py {text} --meta --hybrid-ratio 0.75 --steps {steps} "
                        f"--name ratio-0.75-{steps} {sparse}")
    return commands


def two_phases_plan():
    """What makes rank and entropy first rise and then fall, as in the paper? One setting at a time
    is changed, and then all those for which the paper gives a value, without and with meta
    steps."""
    common = "--vocab-size 4096 --runs two-phases --probe-every 50 --eval-every 400 --quiet"
    papers_flags = "--lr 0.0003 --warmup 0.42"
    settings = {"default": ("more-probes", ""), "init": ("init=0.02", ""),
                "rate": ("", "--lr 0.0003"), "warmup": ("", "--warmup 0.42"),
                "decay": ("weight-decay=1", ""), "prose": ("", "--data prose/2000kb.jsonl"),
                "all": ("init=0.02 more-probes", papers_flags)}
    commands = []
    for name, (changes, flags) in settings.items():
        script = f"docs/experiments.py train {changes} --" if changes else "train.py"
        for kind, steps in (("vanilla", "--steps 1000"), ("meta", "--steps 800 --meta")):
            if (name, kind) == ("all", "meta"):
                steps += " --meta-start 0"
            commands.append(f"python {script} {' '.join((flags, steps, common)).strip()} "
                            f"--name {name}-{kind}")
    return commands


PLANS = {"little-text": little_text_plan, "two-phases": two_phases_plan}


# ---- text --------------------------------------------------------------------------------------

def write_articles(files, folder):
    """Write WikiText files as JSON lines for `train.py --data`: three texts with about 300, 1,000
    and 2,000 kB to train on, and the same validation articles. Returns the new files. Raises
    UserError if there is not enough text."""
    articles = read_articles(files)
    validation, training = articles[::VALIDATION_EVERY], []
    for i, article in enumerate(articles):
        if i % VALIDATION_EVERY:
            training.append(article)
    written = []
    for size in TEXT_SIZES:
        target = folder / f"{size}kb.jsonl"
        if target.exists():
            raise UserError(f"{target} exists: choose another --out")
        chosen = first_bytes(training, 1000 * size)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(target, "".join(arrange(target.name, chosen, validation)))
        written.append(target)
    return written


def read_articles(files):
    """The articles of WikiText files, a list of texts."""
    articles = [""]
    for file in files:
        for line in read_file(file).decode().splitlines(keepends=True):
            if ARTICLE_TITLE.match(line.rstrip("\n")):
                articles.append("")
            articles[-1] += line
    return [article for article in articles if article.strip()]


def first_bytes(articles, size):
    """The first articles, until they hold `size` bytes. Raises UserError if all hold fewer."""
    chosen, total = [], 0
    for article in articles:
        if total >= size:
            return chosen
        chosen.append(article)
        total += len(article.encode())
    raise UserError(f"the files have {total / 1e6:.2f} MB to train on, but {size / 1e6:.1f} MB are "
                    "needed: name more WikiText files")


def arrange(name, training, validation):
    """The lines of a file with this name. Whether a line is for validation depends on the file's
    name and the line's number (plumbing/text.py), so each article goes to the next line of its
    kind. A line that would need one article more stays blank."""
    training, validation, lines = list(training), list(validation), []
    while training or validation:
        articles = validation if is_validation(f"{name}:{len(lines) + 1}") else training
        lines.append(json.dumps({"text": articles.pop(0)}) + "\n" if articles else "\n")
    return lines


# ---- figures -----------------------------------------------------------------------------------

def collect(folder):
    """{"machines", "runs": [the figures of each finished run in the folder]}, sorted by name.
    "passes" says how often a run's next-token steps read the text. The text must still be where
    --data found it. Raises UserError, also if there are no finished runs."""
    found, machines = [], set()
    for config in sorted(folder.glob("*/config.json")):
        settings, lines, notes = read_run(config.parent)
        if notes:
            print(f"left out: {notes[0]}", file=sys.stderr)
            continue
        machines.add(settings.get("device_name"))
        config = json.loads(read_file(config))
        figures = figures_of(config, lines)
        corpus = data.load(config["data"], config["tokenizer"], config["vocab_size"],
                           config["cache"], quiet=True)
        passes = figures["tokens_read"] / len(corpus.train)
        found.append(figures | {"passes": round(passes, 2)})
    if not found:
        raise UserError(f"{folder} holds no finished runs: name the folder that --runs named")
    return {"machines": sorted(map(str, machines)), "runs": found}


def as_json(result):
    """The result of collect as JSON, with a line for each run."""
    runs = ",\n".join(json.dumps(run) for run in result["runs"])
    return f'{{"machines": {json.dumps(result["machines"])}, "runs": [\n{runs}\n]}}\n'


def figures_of(config, lines):
    """What a run cost and what it reached. "curve" holds [updates, 10^12 FLOPs, validation loss] of
    each evaluation."""
    steps, loss = series(lines, "val_loss")
    flops, _ = series(lines, "val_loss", x="flops")
    n_lm = sum(line.get("kind") == "lm" for line in lines)
    best = int(loss.argmin())
    figures = {
        "name": config["name"], "seed": config["seed"], "meta": config["meta"],
        "hybrid_ratio": config["hybrid_ratio"] if config["meta"] else None,
        "changes": config.get("changes", ""), "data": config["data"],
        "vocab_size": config["vocab_size"], "corpus_sha256": config["corpus_sha256"],
        "steps": config["steps"], "next_token_steps": n_lm,
        "tokens_read": n_lm * config["batch_size"] * config["seq_len"],
        "tflop": round(flops[-1] / 1e12, 2), "bigram": config.get("bigram"),
        "val_loss": round(loss[-1], 4),
        "lowest": {"val_loss": round(loss[best], 4), "step": int(steps[best]),
                   "tflop": round(flops[best] / 1e12, 2)},
        "curve": [[int(step), round(cost / 1e12, 2), round(value, 4)]
                  for step, cost, value in zip(steps, flops, loss)]}
    figures["probes"] = probe_curves(lines)
    for key in ("fewshot_after", "fewshot_after_stderr", "fewshot_prototype", "fewshot_stderr",
                "fewshot_lookup"):
        _, values = series(lines, key)
        if len(values):
            figures[key] = round(values[-1], 4)
    return figures


def probe_curves(lines):
    """{probe: {"steps", "mean": over layers, "rise_and_fall", "fall_and_rise": numbers of layers}}
    of a log. Ranks are shares of the full rank, and entropy is a share of the largest."""
    paths = [("head_entropy", "normalised")]
    for line in lines:
        if "proportional_effective_rank" in line:
            paths += [("proportional_effective_rank", name)
                      for name in line["proportional_effective_rank"]]
            break
    curves = {}
    for path in paths:
        steps, values = layer_series(lines, *path)  # (S,), (S, layers)
        if len(steps) < FEWEST_PROBES:
            continue
        verdicts = [phase(steps, layer)["verdict"] for layer in values.T]
        name = "entropy" if path[0] == "head_entropy" else path[1]
        curves[name] = {
            "steps": steps.astype(int).tolist(), "mean": values.mean(axis=1).round(3).tolist(),
            "rise_and_fall": sum(holds(verdict, "rises, falls") for verdict in verdicts),
            "fall_and_rise": sum(holds(verdict, "falls, rises") for verdict in verdicts)}
    return curves


# ---- the command -------------------------------------------------------------------------------

def changes_in_words():
    """The changes and what they do, for --help."""
    found = []
    for name, change in CHANGES.items():
        description = " ".join(change.__doc__.split())
        found.append(f"{name}: {description.rstrip('.')}")
    return "; ".join(found)


def parse(argv=None):
    """The arguments. Those after a "--" are flags of train.py."""
    argv, flags = (sys.argv[1:] if argv is None else argv), []
    if "--" in argv:
        middle = argv.index("--")
        argv, flags = argv[:middle], argv[middle + 1:]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    one = commands.add_parser("train", help="train a run with changes, and flags of train.py "
                                            "after --")
    one.add_argument("changes", nargs="*", type=filled, metavar="CHANGE[=VALUE]",
                     help=changes_in_words())
    plan = commands.add_parser("plan", help="print the commands of an experiment")
    plan.add_argument("name", choices=PLANS)
    articles = commands.add_parser("articles", help="split WikiText files into articles")
    articles.add_argument("files", nargs="+", type=path, metavar="FILE")
    articles.add_argument("--out", type=path, required=True, help="folder for the new files")
    collecting = commands.add_parser("collect", help="write the figures of runs as JSON")
    collecting.add_argument("folder", type=path, help="folder of finished runs")
    collecting.add_argument("--out", type=path, required=True, help="JSON file to write")
    args = parser.parse_args(argv)
    args.flags = flags
    if flags and args.what != "train":
        parser.error("only `train` takes flags after --")
    return args, parser


@command
def main():
    args, _ = parse()
    if args.what == "train":
        sys.exit(train_with_changes(args.changes, args.flags))
    elif args.what == "plan":
        print("\n".join(PLANS[args.name]()))
    elif args.what == "articles":
        for file in write_articles(args.files, args.out):
            print(file)
    elif args.what == "collect":
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, as_json(collect(args.folder)))
        print(args.out)


if __name__ == "__main__":
    main()
