"""Chapter 3. First-order MAML: adapt a small meta head to an episode, learn from its queries.

    python meta.py runs/11m-meta --play    # answer an episode yourself, then compare with the run

Read `adapt` and `meta_loss` first: they are the whole algorithm. MAML (Finn et al. 2017, arXiv
1703.03400) looks for weights from which a few gradient steps solve a new task. Here a task is an
episode of data.py: which of N words was masked in a context? Each word has K contexts with known
labels (support) and Q contexts whose labels must be predicted (query). A context is a row of L
tokens. FOMAML is first-order MAML. The second half of the chapter measures few-shot accuracy on
words that were never classes in training, and lets you play an episode of such words. "The paper"
is arXiv 2508.02189.
"""
import plumbing  # noqa: F401 - imported first, so that Ctrl-C during loading exits quietly

import contextlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
from model import backbone_flops, load_checkpointed
from plumbing import play
from plumbing.commands import Parser, UserError, command, filled, number
from plumbing.fewshot import (FewShotRows, fewshot_episodes, fewshot_rows, lookup,
                              lookup_votes)
from plumbing.machine import precision
from plumbing.play import Player

# Width of the meta head, as in the paper.
HIDDEN = 128
# Few-shot accuracy is the mean over this many fixed episodes.
FEWSHOT_EPISODES = 64
# The longest row of an episode to play, in tokens: the context of the decoder.
LONGEST_ROW = 2048
# The game shows the meta head's answers after these numbers of inner steps.
STEPS_SHOWN = (0, 1, 2, 5, 10)


# ---- MAML --------------------------------------------------------------------------------------

def adapt(module, fast, inputs, labels, inner_steps, inner_lr, second_order=False):
    """The inner loop: inner_steps steps of SGD on the support set.

    fast is {name: tensor}, the parameters to start from. Returns the adapted ones, which are
    still connected to the initial ones in autograd's graph. The module itself does not change:
    functional_call runs it with `fast` in place of its own parameters.

    First order (create_graph=False) is an approximation that treats each step's gradient as a
    constant. The derivative of the adapted parameters with respect to the initial ones is then
    the identity, and the query gradient reaches the initial parameters unchanged. In second order
    the gradients keep their graph, and the derivative passes through them, too."""
    for _ in range(inner_steps):
        loss = F.cross_entropy(functional_call(module, fast, (inputs,)), labels)
        # Turn off autocast, which would compute the float32 head's gradients in bf16.
        with torch.autocast(inputs.device.type, enabled=False):
            grads = torch.autograd.grad(loss, tuple(fast.values()), create_graph=second_order)
        # p - inner_lr * g for each parameter p and its gradient g. A GPU does these for all
        # parameters at once. Reusing the name `grads` frees the unscaled gradients.
        grads = torch._foreach_mul(grads, inner_lr)
        fast = dict(zip(fast, torch._foreach_sub(list(fast.values()), grads)))
    return fast


def meta_loss(backbone, meta_head, episode, inner="head", inner_steps=10, inner_lr=0.1,
              second_order=False):
    """The outer loss of one episode: cross-entropy on the queries, in nats, with parameters that
    were adapted on the support set.

    Returns (loss, figures); figures holds the support and query accuracy as scalar tensors.
    loss.backward() leaves the FOMAML gradient (or, if second_order, the MAML gradient) in the
    parameters of backbone and meta_head.

    inner "head": the inner loop adapts only the meta head. The backbone is frozen there, so the
    support states are computed once and used in every step. In first order they need no graph,
    since they affect the adapted head only through constants. The backbone learns through the
    query states.
    inner "all": the inner loop adapts the backbone, too."""
    kernel = contextlib.nullcontext()
    if inner == "head":
        module = meta_head
        with torch.set_grad_enabled(second_order):
            support = backbone(episode.support_ids)[:, -1]  # (N*K, D): the states at the mask
        query = backbone(episode.query_ids)[:, -1]          # (N*Q, D)
    else:
        module = Learner(backbone, meta_head)
        support, query = episode.support_ids, episode.query_ids
        if second_order:  # the fused attention kernels have no second derivative
            kernel = sdpa_kernel(SDPBackend.MATH)
    with kernel:
        fast = adapt(module, module.start(episode.words), support, episode.support_labels,
                     inner_steps, inner_lr, second_order)
        scores = functional_call(module, fast, (query,))    # (N*Q, N)
        loss = F.cross_entropy(scores, episode.query_labels)
        with torch.no_grad():
            support_scores = functional_call(module, fast, (support,))
    return loss, {"support_accuracy": accuracy(support_scores, episode.support_labels),
                  "query_accuracy": accuracy(scores, episode.query_labels)}


def accuracy(scores, labels):
    """The fraction of rows of scores (R, N) whose largest entry is at the label (R,)."""
    return (scores.argmax(dim=1) == labels).float().mean()


class MetaHead(nn.Module):
    """The classifier that the inner loop adapts: a 4-layer MLP, states (R, D) -> scores.

    kind "slots": scores (R, n_way), with one output row per label. Each episode gives its words
    new labels, so only adaptation gives a row its meaning. The rows are initialised to zero, so
    every label scores 0 and accuracy is 1 / n_way.
    kind "words": one output row for each of the n_words classes, as in the paper. A word keeps
    its row in all episodes, so training can memorise it."""

    def __init__(self, d_model, kind, n_way, n_words, generator=None):
        super().__init__()
        self.kind = kind
        self.trunk = nn.Sequential(
            nn.Linear(d_model, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.out = nn.Linear(HIDDEN, n_way if kind == "slots" else n_words)
        for layer in [*self.trunk[::2], self.out]:
            std = (2 / layer.in_features) ** 0.5
            if layer is self.out and kind == "slots":
                std = 0.0
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, hidden):
        # In float32: the head is cheap, and bf16 would lose small updates.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out(self.trunk(hidden))

    def start(self, words):
        """{name: tensor}: the parameters from which the inner loop starts. A "words" head gives
        only the output rows of the episode's words (N,), so the other classes are never scored.
        Autograd carries the query gradient back to those rows. A "slots" head gives its first N
        rows if the episode has fewer words than the head has slots."""
        fast = dict(self.named_parameters())
        rows = words if self.kind == "words" else slice(len(words))
        if self.kind == "words" or len(words) < self.out.out_features:
            fast["out.weight"] = self.out.weight[rows]
            fast["out.bias"] = self.out.bias[rows]
        return fast


class Learner(nn.Module):
    """Backbone and meta head as one module, ids (R, L) -> scores (R, N). `--inner all` adapts
    it."""

    def __init__(self, backbone, meta_head):
        super().__init__()
        self.backbone, self.head = backbone, meta_head

    def forward(self, ids):
        return self.head(self.backbone(ids)[:, -1])

    def start(self, words):
        """Like MetaHead.start, plus the parameters of the backbone."""
        fast = {f"backbone.{name}": p for name, p in self.backbone.named_parameters()}
        for name, p in self.head.start(words).items():
            fast[f"head.{name}"] = p
        return fast


def meta_flops(config, meta_head, n_way, k_shot, n_query, length, inner, inner_steps,
               second_order):
    """Model FLOPs of one meta step. A backward pass costs two forward passes, so a gradient costs
    three. Second order differentiates these passes again, which costs three times as much."""
    first_layer = meta_head.trunk[0].weight.numel()
    weights = sum(layer.weight.numel() for layer in meta_head.trunk[::2]) + n_way * HIDDEN
    support_head = 2 * n_way * k_shot * weights  # forward passes
    query_head = 2 * n_way * n_query * weights
    support_backbone = backbone_flops(config, n_way * k_shot, length)
    query_backbone = backbone_flops(config, n_way * n_query, length)
    # the queries, forward and backward, and the support accuracy
    outer = 3 * (query_backbone + query_head) + support_head
    if inner == "all":
        step = (9 if second_order else 3) * (support_backbone + support_head)
        return outer + support_backbone + inner_steps * step
    # The head's first layer needs no gradient for its input, the support states.
    step = 3 * support_head - 2 * n_way * k_shot * first_layer
    return outer + (3 if second_order else 1) * (support_backbone + inner_steps * step)


# ---- few-shot accuracy on held-out words -------------------------------------------------------

@torch.no_grad()
def fewshot_states(backbone, rows, device, batch=64):
    """The states of FewShotRows, as two tensors (R, D) on the CPU: at the token before the mask,
    for prototypes, and at the mask, for the meta head."""
    states = [backbone(ids.to(device))[:, -2:].float().cpu() for ids in rows.ids.split(batch)]
    return torch.cat(states).unbind(dim=1)


def evaluate_fewshot(backbone, meta_head, rows, n_way, k_shot, device, inner="head",
                     inner_steps=10, inner_lr=0.1):
    """Few-shot accuracy on held-out words: {key in the log: mean over the episodes}. A query is
    new if its previous token appears before no support word of the episode.

    fewshot_lookup     the previous-token look-up, which uses no model
    fewshot_prototype  the nearest prototype (see `prototype_scores`), on new queries only
    fewshot_stderr     its standard error over episodes
    fewshot_before     the meta head before the inner loop, on all queries
    fewshot_after      the meta head after it
    fewshot_after_stderr                   the standard error of fewshot_after
    fewshot_before_new, fewshot_after_new  the meta head on new queries only
    fewshot_chance     1 / the number of ways, which is n_way unless the text is small

    Episodes without a new query count only for the look-up. Returns an empty dict if there are
    too few words."""
    episodes = fewshot_episodes(rows, n_way, k_shot, FEWSHOT_EPISODES)
    if not episodes:
        return {}
    n_way = len(episodes[0][0])
    previous_states, mask_states = fewshot_states(backbone, rows, device)
    figures = {}  # key -> a value for each episode
    for support, query in episodes:
        labels = torch.arange(n_way).repeat_interleave(query.shape[1])  # (N*Q,)
        answered, is_new = lookup(rows.previous[support], rows.previous[query])
        found = {"fewshot_lookup": answered}
        if is_new.any():
            scores = prototype_scores(previous_states, support, query)
            found["fewshot_prototype"] = accuracy(scores[is_new], labels[is_new]).item()
        if meta_head is not None and is_new.any():
            inputs = mask_states if inner == "head" else rows.ids
            words = torch.from_numpy(rows.word[support[:, 0]])
            before, after = adapted_scores(backbone, meta_head, inputs, words, support, query,
                                           device, inner, (0, inner_steps), inner_lr)
            for name, scores in (("fewshot_before", before), ("fewshot_after", after)):
                found[name] = accuracy(scores, labels).item()
                found[f"{name}_new"] = accuracy(scores[is_new], labels[is_new]).item()
        for key, value in found.items():
            figures.setdefault(key, []).append(value)
    report = {key: float(np.mean(values)) for key, values in figures.items()}
    for key, error in (("fewshot_prototype", "fewshot_stderr"),
                       ("fewshot_after", "fewshot_after_stderr")):
        if key in figures:
            report[error] = float(np.std(figures[key]) / len(figures[key]) ** 0.5)
    return report | {"fewshot_chance": 1 / n_way}


def prototype_scores(states, support, query):
    """Scores (N*Q, N) without training (Snell et al. 2017, arXiv 1703.05175): the negative
    distance from a query's state to the mean of each word's K support states."""
    n_way, k_shot = support.shape
    prototypes = states[support.ravel()].view(n_way, k_shot, -1).mean(dim=1)  # (N, D)
    return -torch.cdist(states[query.ravel()], prototypes)


def adapted_scores(backbone, meta_head, inputs, words, support, query, device, inner, steps,
                   inner_lr):
    """Query scores after each number of inner steps in `steps` (ascending): a list of tensors
    (N*Q, N) on the CPU. inputs are states (R, D) for inner "head" and ids (R, L) for "all"."""
    module = meta_head if inner == "head" else Learner(backbone, meta_head)
    n_way, k_shot = support.shape
    labels = torch.arange(n_way, device=device).repeat_interleave(k_shot)
    shown, asked = inputs[support.ravel()].to(device), inputs[query.ravel()].to(device)
    with torch.enable_grad():
        fast, taken, found = module.start(words.to(device)), 0, []
        for total in steps:
            fast = adapt(module, fast, shown, labels, total - taken, inner_lr)
            taken = total
            with torch.no_grad():
                found.append(functional_call(module, fast, (asked,)).cpu())
    return found


# ---- an episode to play ------------------------------------------------------------------------

def draw_game(corpus, length, n_way, k_shot, n_query, seed):
    """An Episode of held-out words in validation text, with its queries in random order. Raises
    UserError if there are too few words."""
    rows = fewshot_rows(corpus, length, k_shot + n_query)
    n_words = len(np.unique(rows.word))
    if n_words < n_way:
        raise UserError(f"the validation text has {n_words} held-out words with {k_shot} + "
                        f"{n_query} rows, but the episode needs {n_way}: lower --n-way, --k-shot "
                        "or --n-query")
    support, query = fewshot_episodes(rows, n_way, k_shot, 1, seed)[0]
    return data.shuffle_queries(as_episode(rows, support, query), seed)


def as_episode(rows, support, query):
    """Build an Episode from indices support (N, K) and query (N, Q) into FewShotRows."""
    labels = torch.arange(len(support))
    return data.Episode(rows.ids[support.ravel()], labels.repeat_interleave(support.shape[1]),
                        rows.ids[query.ravel()], labels.repeat_interleave(query.shape[1]),
                        torch.from_numpy(rows.word[support[:, 0]]))


def all_players(backbone, meta_head, episode, device, inner, steps, inner_lr):
    """The answers to the queries of an Episode, as a list of Players: the look-up, the nearest
    prototype and, after each of `steps` inner steps, the meta head."""
    ids = torch.cat([episode.support_ids, episode.query_ids])
    every_row = np.arange(len(ids))
    support, query = np.split(every_row, [len(episode.support_ids)])
    support = support.reshape(len(episode.words), -1)
    previous = ids[:, -2].numpy()
    votes = lookup_votes(previous[support], previous[query])
    seen_before = [int(row.argmax()) if row.any() else None for row in votes]
    rows = FewShotRows(ids, None, previous)
    previous_states, mask_states = fewshot_states(backbone, rows, device)
    nearest = prototype_scores(previous_states, support, query).argmax(dim=1)
    players = [Player("previous-token look-up", seen_before),
               Player("nearest prototype", nearest.tolist())]
    if meta_head is not None:
        inputs = mask_states if inner == "head" else ids
        found = adapted_scores(backbone, meta_head, inputs, episode.words, support, every_row,
                               device, inner, steps, inner_lr)
        for taken, scores in zip(steps, found):
            loss = F.cross_entropy(scores[support.ravel()], episode.support_labels)
            name = f"meta head, {taken} inner step" + ("s" if taken != 1 else "")
            players.append(Player(name, scores[query].argmax(dim=1).tolist(), loss.item()))
    return players


def one_question(backbone, meta_head, corpus, rows, n_way, k_shot, device, inner, inner_steps,
                 inner_lr):
    """A query of the fixed episodes and the meta head's answers, as four strings: the row, the
    answer before adapting, the answer after it, and the right answer. None if there is none."""
    episodes = fewshot_episodes(rows, n_way, k_shot, 1)
    if meta_head is None or not episodes:
        return None
    support, query = episodes[0]
    episode = as_episode(rows, support, query[:, :1])
    *_, before, after = all_players(backbone, meta_head, episode, device, inner, (0, inner_steps),
                                    inner_lr)
    shown = data.episode_in_words(episode, corpus)
    # Take the query of the last word, because an untrained head answers with the first.
    labels = [before.guesses[-1], after.guesses[-1], shown.answers[-1]]
    return shown.queries[-1], *[shown.words[label] for label in labels]


# ---- the command -------------------------------------------------------------------------------

def load_text(folder, settings, cache):
    """The Corpus that a run was trained on. Raises UserError if it has changed or is unknown."""
    needed = [settings.get(key) for key in ("corpus_sha256", "episode_len", "inner", "inner_lr")]
    if None in needed or not 2 <= settings["episode_len"] <= LONGEST_ROW:
        raise UserError(f"the config.json of {folder} does not say how it was trained: use a run "
                        "made by train.py")
    corpus = data.load(settings.get("data"), settings.get("tokenizer") or "bpe",
                       settings["vocab_size"], cache or settings.get("cache"))
    if corpus.info["sha256"] != settings.get("corpus_sha256"):
        raise UserError(f"{folder} was trained on different text or tokens (the SHA-256 differs): "
                        "restore that text, or train again")
    return corpus


def load_meta_head(state, settings, d_model, n_words, n_way):
    """The MetaHead of a checkpoint, or None for a vanilla run. Raises UserError if it does not
    fit n_way or n_words."""
    if not state:
        return None
    kind = settings.get("head")
    try:
        n_rows = len(state["out.bias"])
        meta_head = MetaHead(d_model, kind, n_rows, n_rows)
        meta_head.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError):
        raise UserError("the meta head does not fit the run's config.json: both must come from "
                        "the same run") from None
    if kind == "slots" and n_rows < n_way:
        raise UserError(f"the run's meta head has {n_rows} slots, too few for {n_way} words: add "
                        f"--n-way {n_rows}")
    if kind != "slots" and n_rows != n_words:
        raise UserError(f"the meta head does not fit the text ({n_rows} words instead of "
                        f"{n_words}): use the text that it was trained on")
    return meta_head


def parse():
    parser = Parser(description="Show an episode of held-out words and a run's answers.")
    add = parser.add_argument
    add("run", metavar="RUN", type=filled, help="folder of a trained run, such as runs/11m-meta")
    add("--play", action="store_true", help="answer first yourself, at the terminal")
    add("--seed", type=number(int, 0), default=0,
        help="seed of the random choice of words and rows")
    add("--n-way", type=number(int, 2, play.MOST_WAYS), default=play.N_WAY,
        help="words in the episode; with more, guessing is right less often")
    add("--k-shot", type=number(int, 1, play.MOST_SHOTS), default=2, help="support rows per word")
    add("--n-query", type=number(int, 1, play.MOST_QUERIES), default=2, help="queries per word")
    add("--cache", type=filled, help="folder of prepared texts (default: the one the run used)")
    return parser.parse_args()


@command
def main():
    args = parse()
    decoder, settings, checkpoint = load_checkpointed(args.run)
    corpus = load_text(args.run, settings, args.cache)
    meta_head = load_meta_head(checkpoint.get("head"), settings, decoder.config.d_model,
                               len(corpus.index.words), args.n_way)
    episode = draw_game(corpus, settings["episode_len"], args.n_way, args.k_shot, args.n_query,
                        args.seed)
    device = torch.device("cpu")
    with precision(device):
        players = all_players(decoder.model, meta_head, episode, device, settings["inner"],
                              STEPS_SHOWN, settings["inner_lr"])
    play.present(data.episode_in_words(episode, corpus), players, args.play)


if __name__ == "__main__":
    main()
