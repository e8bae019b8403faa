"""Chapter 4. Probes of the learning dynamics: effective rank and attention entropy.

    python probe.py runs/11m-meta                    # pictures and a table of phases of one run
    python probe.py runs/11m-vanilla runs/11m-meta   # comparison at equal cost
    python probe.py runs/11m-meta --live             # a page in the browser, during training
    python probe.py runs/pico-tiny                   # one measurement of an imported model

Read `effective_rank` and `head_entropy` first. `measure` applies them to a decoder; train.py calls
it and logs the result as a probe line. A phase is a rise or fall of such a curve over training.
Phases, comparison, pictures and the live page are in plumbing/: phases.py, compare.py,
pictures.py, live.py.
"""
import plumbing  # noqa: F401 - imported first, so that Ctrl-C during loading exits quietly

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import load_run
from plumbing.checkpoints import NEWEST
from plumbing.commands import Parser, command, filled, number, path
from plumbing.compare import compare, comparison_table, group_runs
from plumbing.files import write_atomically
from plumbing.kernels import cross_entropy
from plumbing.live import serve
from plumbing.logs import read_run
from plumbing.phases import phase_count_table, phase_counts, phase_table, phases
from plumbing.pictures import draw_comparison, save_dynamics, save_figure
from plumbing.summary import last_losses
from plumbing.tokenizer import END, load_encoding

# Validation windows in the batch on which train.py probes.
PROBE_WINDOWS = 4
# Tokens per window for a model without a log. Runs use --seq-len, 128 by default.
ONCE_LENGTH = 128


# ---- measures ----------------------------------------------------------------------------------

def effective_rank(matrix):
    """How many directions a matrix (m, n) really uses: exp of the entropy of its singular values,
    scaled to sum to 1 (Roy & Vetterli 2007).

    It lies between 1 and min(m, n). It is 0 for a zero matrix, and NaN for one that is not finite.
    """
    matrix = matrix.detach()
    if matrix.device.type == "mps":  # MPS has no float64
        matrix = matrix.cpu()
    matrix = matrix.double()
    # The singular values are the square roots of the eigenvalues of the Gram matrix. The smaller
    # of the two Gram matrices is cheaper.
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    gram = (matrix @ matrix.T).cpu()  # (s, s), s = min(m, n)
    if not gram.isfinite().all():
        return math.nan
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if singular.sum() == 0:
        return 0.0
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp().item()


def head_entropy(q, k):
    """How evenly each head spreads its causal attention: the entropy in nats at each position,
    averaged over the batch, (n_head, T).

    Takes queries (B, n_head, T, head_dim) and keys (B, n_kv_head, T, head_dim). A head that
    attends equally to t positions has entropy ln t; one that attends to a single position has 0.
    """
    n_head, T, head_dim = q.shape[1:]
    group = n_head // k.shape[1]  # query heads that share a key head
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    entropies = []
    for head in range(n_head):
        scores = q[:, head].float() @ k[:, head // group].float().mT / math.sqrt(head_dim)
        attention = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # (B, T, T)
        entropies.append(torch.special.entr(attention).sum(dim=-1).mean(dim=0))
    return torch.stack(entropies)


def measure(decoder, batch, show_progress=False):
    """The values of a probe line, measured on a batch (B, T+1) of validation windows.

    effective_rank, one value per layer: of the centred hidden states, and the mean over the
    weight matrices of attention and of the MLP, and over their gradients of the next-token loss.
    proportional_effective_rank: the same, divided by the largest possible rank.
    head_entropy, one value per layer and head: in nats, and divided by ln t. Position 0, which
    sees only itself, is left out.
    The decoder does not change, but its gradients are cleared."""
    hidden, queries_and_keys = run_with_gradient(decoder, batch)
    matrices = {name: [] for name in ("hidden", "attention", "mlp", "attention_grad", "mlp_grad")}
    for layer, states in zip(decoder.model.layers, hidden):
        states = states.flatten(0, 1)  # (B*T, D)
        # A large mean state would look like a single direction and hide the others.
        matrices["hidden"].append([states - states.mean(dim=0)])
        for name, block in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            weights = list(block.parameters())
            matrices[name].append(weights)
            matrices[f"{name}_grad"].append([weight.grad for weight in weights])
    ranks = {name: [] for name in matrices}
    shares = {name: [] for name in matrices}
    for name, groups in matrices.items():  # a group of matrices for each layer
        for group in tqdm(groups, desc=f"rank of {name}", unit="layer",
                          disable=None if show_progress else True):
            values = [effective_rank(matrix) for matrix in group]
            largest = [min(matrix.shape) for matrix in group]
            ranks[name].append(mean(values))
            shares[name].append(mean([value / most for value, most in zip(values, largest)]))
    decoder.zero_grad()
    nats = torch.stack([head_entropy(q, k)[:, 1:] for q, k in queries_and_keys])
    uniform = torch.arange(2, nats.shape[2] + 2, device=nats.device).float().log()  # ln t
    return {"effective_rank": ranks,
            "proportional_effective_rank": shares,
            "head_entropy": {"nats": nats.mean(dim=2).tolist(),  # of (layers, heads, T-1)
                             "normalised": (nats / uniform).mean(dim=2).tolist()}}


def run_with_gradient(decoder, batch):
    """Run batch (B, T+1) forward and backward, and leave the gradient of the next-token loss in the
    parameters. Returns (hidden states (B, T, D) after each layer, (queries, keys) of each)."""
    hidden, queries_and_keys, hooks = [], [], []

    def keep_output(layer, inputs, output):
        hidden.append(output.detach())

    def keep_queries_and_keys(module, inputs):
        q, k, _ = module.qkv(*inputs[:3])  # x, cos, sin
        queries_and_keys.append((q.detach(), k.detach()))

    for layer in decoder.model.layers:
        hooks.append(layer.register_forward_hook(keep_output))
        hooks.append(layer.self_attn.register_forward_pre_hook(keep_queries_and_keys))
    try:
        states = decoder.model(batch[:, :-1])
        targets = batch[:, 1:].flatten()
        cross_entropy(states.flatten(0, 1), decoder.lm_head.weight, targets).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, queries_and_keys


def mean(values):
    return sum(values) / len(values)


def is_probe_step(step, every, last):
    """Whether to probe after `step` updates: at multiples of `every`, at the last step and, before
    `every`, at 1, 2, 4, 8, ..., since the ranks change most in the first updates."""
    is_power_of_two = (step & (step - 1)) == 0
    return step % every == 0 or step == last or (step < every and is_power_of_two)


# ---- a model without a log ---------------------------------------------------------------------

def has_no_log(folder):
    """Whether a run has weights but no log, like an imported model."""
    return (folder / NEWEST).exists() and not (folder / "metrics.jsonl").exists()


def measure_once(folder, cache=None):
    """The values of `measure` for a run's weights, on the default validation text encoded by the
    run's tokenizer. Raises UserError."""
    decoder, _ = load_run(folder)
    encoding = load_encoding(folder)
    corpus = data.load(cache=cache)
    tokens = []
    documents = corpus.encoding.decode(corpus.val.tolist()).split(END)
    for document in tqdm(documents, desc="tokenizing", unit="document", disable=None):
        tokens += encoding.encode_ordinary(document)
        if encoding.eot_token is not None:
            tokens.append(encoding.eot_token)
    length = min(ONCE_LENGTH, decoder.config.context)
    windows = data.validation_windows(np.array(tokens), length, PROBE_WINDOWS)
    return measure(decoder, windows, show_progress=True)


def layer_table(figures):
    """The values of `measure` as a table, with one row per layer."""
    ranks, entropy = figures["effective_rank"], figures["head_entropy"]
    header = "".join(f"{name:>16}" for name in [*ranks, "entropy (nats)", "of uniform"])
    lines = ["effective rank of hidden states, weights and gradients, and attention entropy",
             f"{'layer':>6}{header}"]
    for layer, nats in enumerate(entropy["nats"]):
        values = [rank[layer] for rank in ranks.values()]
        values += [mean(nats), mean(entropy["normalised"][layer])]
        lines.append(f"{layer:>6}" + "".join(f"{value:>16.2f}" for value in values))
    return "\n".join(lines)


# ---- the command -------------------------------------------------------------------------------

def parse():
    parser = Parser(description="Draw one run and list its phases (dynamics.png and phases.json "
                                "in its folder), compare several runs, or show them on a live "
                                "page (--live).")
    add = parser.add_argument
    add("runs", nargs="+", type=path, metavar="RUN",
        help="folder of a run; runs that differ only in their seed are grouped, and later groups "
             "are compared with the first")
    add("--live", action="store_true",
        help="show the runs, finished or not, on a page in the browser that follows their logs")
    add("--port", type=number(int, 0, 65535),
        help="port of the live page; 0: any free port (default: 8765, or the next free one)")
    add("--out", type=path, default=Path("compare"),
        help="folder for compare.png and compare.json (default: compare)")
    add("--cache", type=filled,
        help="folder of prepared texts, for a model without a log (default: nanomaml under "
             "$XDG_CACHE_HOME or ~/.cache)")
    args = parser.parse_args()
    if args.port is not None and not args.live:
        parser.error("--port only works with --live: add --live")
    return args, parser


def look_at(folders):
    """Read each run and write its dynamics.png and phases.json. Returns two lists, of
    (settings, lines) and of (settings, phases)."""
    runs = [read_run(folder) for folder in folders]
    for _, _, notes in runs:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    logs, found = [], []
    for folder, (settings, lines, _) in zip(tqdm(folders, unit="run", disable=None), runs):
        run_phases = phases(lines)
        save_dynamics(folder, lines, settings)
        write_atomically(folder / "phases.json", json.dumps(run_phases, indent=1))
        logs.append((settings, lines))
        found.append((settings, run_phases))
    return logs, found


def compare_runs(logs, found, out):
    """Print the comparison of several runs, and write compare.png and compare.json to out."""
    groups = group_runs(logs)
    result = compare(groups) | {"phases": phase_counts(group_runs(found))}
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "compare.json", json.dumps(result, indent=1))
    save_figure(draw_comparison(groups, result), out / "compare.png")
    print(comparison_table(result))
    print(phase_count_table(result["phases"]))
    print(f"\nwritten: {out / 'compare.png'}, {out / 'compare.json'}")


@command
def main():
    args, parser = parse()
    # A run named twice counts once.
    folders = list({folder.resolve(): folder for folder in args.runs}.values())
    without_log = [folder for folder in folders if has_no_log(folder)]
    if without_log and (args.live or len(folders) > 1):
        parser.error(f"{without_log[0]} has no log: probe it alone, without --live")
    if without_log:
        print(layer_table(measure_once(folders[0], args.cache)))
        return
    if args.live:
        serve(folders, args.port)
        return
    if len(folders) > 1 and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is not a folder: choose another --out")
    logs, found = look_at(folders)
    if len(folders) > 1:
        compare_runs(logs, found, args.out)
        return
    settings, run_phases = found[0]
    print(settings["name"])
    print(last_losses(logs[0][1]))
    print(phase_table(run_phases))
    print(f"\nwritten: {folders[0] / 'dynamics.png'}, {folders[0] / 'phases.json'}")


if __name__ == "__main__":
    main()
