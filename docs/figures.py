"""Draw the small figures of the README: episode.png, fomaml.png and probes.png, next to this file.

    python docs/figures.py

All of them are computed. The episode comes from the default corpus (other versions of the packages
give other words), the arrows from meta.adapt and autograd, and the ranks and entropies from
probe.py.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
from meta import adapt  # noqa: E402
from plumbing.commands import Parser, command  # noqa: E402
from plumbing.pictures import (  # noqa: E402
    BLUE, COLOURS, GREEN, ORANGE, label_panel, legend_below, new_figure, save_figure)
from plumbing.tokenizer import MASK  # noqa: E402
from probe import effective_rank, head_entropy  # noqa: E402

# Characters of a row that fit into the figure.
ROW_WIDTH = 78
INNER_STEPS, INNER_LR = 5, 0.12
OUTER_STEPS, OUTER_LR = 60, 0.4


# ---- an episode --------------------------------------------------------------------------------

def draw_episode(figure, seed=12):
    """A 4-way 2-shot episode with one query per word, in rows of 14 tokens."""
    corpus = data.load()
    sampler = data.EpisodeSampler(corpus, n_way=4, k_shot=2, n_query=1, length=14)
    episode = sampler.draw(seed, 0)
    words = [corpus.pieces[i].strip() for i in corpus.index.words[episode.words]]
    support_ax, query_ax = figure.subplots(2, 1, height_ratios=[8.6, 4.6])
    draw_rows(support_ax, corpus, episode.support_ids, episode.support_labels,
              [f"label {label}" for label in range(4)])
    support_ax.set_title("Support set: the answers are given, and the inner loop learns from them",
                         loc="left")
    draw_rows(query_ax, corpus, episode.query_ids, episode.query_labels,
              [f"label ?   (it is {label}: {words[label]})" for label in range(4)])
    query_ax.set_title("Query set: the adapted classifier must answer, and the outer loop learns "
                       "from its loss", loc="left")
    figure.suptitle("A 4-way, 2-shot episode: which of four words ended each row? "
                    "(chance: 1 in 4)")


def draw_rows(ax, corpus, ids, labels, answers):
    """Rows of token ids (R, L) as text, each with the answer to its label."""
    for y, (row, label) in enumerate(zip(ids, labels.tolist())):
        text = " ".join(corpus.encoding.decode(row.tolist()).split()).replace(MASK, " ___")
        ax.text(0.66, y, text[-ROW_WIDTH:], ha="right", va="center", family="monospace")
        ax.text(0.68, y, answers[label], va="center", color=COLOURS[label], weight="bold")
    ax.set_ylim(len(ids) - 0.4, -0.6)
    ax.set_axis_off()


# ---- one FOMAML step, and what many do ---------------------------------------------------------

class TwoWeights(torch.nn.Module):
    """A classifier small enough to draw: points (R, 2) -> scores (R, 2), with two weights."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, points):
        score = points @ self.weight
        return torch.stack([-score, score], dim=1)


MODULE = TwoWeights()


def make_tasks(n, generator, rows=24):
    """n tasks, each (support points, labels, query points, labels). A task separates two classes
    along a direction. The directions of all tasks are similar, and this can be learned."""
    tasks = []
    for _ in range(n):
        direction = torch.tensor([1.8, 0.9]) + 0.4 * torch.randn(2, generator=generator)
        points = torch.randn(2 * rows, 2, generator=generator) * torch.tensor([0.7, 2.0])
        probability = (2 * points @ direction).sigmoid()
        labels = (torch.rand(2 * rows, generator=generator) < probability).long()
        tasks.append((points[:rows], labels[:rows], points[rows:], labels[rows:]))
    return tasks


def query_loss(weight, task):
    _, _, points, labels = task
    return F.cross_entropy(functional_call(MODULE, {"weight": weight}, (points,)), labels)


def adapted(weight, task, steps=INNER_STEPS, second_order=False):
    points, labels, _, _ = task
    return adapt(MODULE, {"weight": weight}, points, labels, steps, INNER_LR,
                 second_order)["weight"]


def query_gradient(weight, task, second_order=False):
    """The gradient of the query loss after the inner loop, for the initial weight."""
    weight = weight.clone().requires_grad_()
    loss = query_loss(adapted(weight, task, second_order=second_order), task)
    return torch.autograd.grad(loss, weight)[0]


def arrow(ax, start, step, colour, label, linestyle="-"):
    ax.annotate("", (start + step).tolist(), start.tolist(),
                arrowprops={"arrowstyle": "->", "color": colour, "lw": 2, "linestyle": linestyle})
    ax.plot([], [], color=colour, lw=2, label=label, linestyle=linestyle)


def draw_fomaml(figure):
    generator = torch.Generator().manual_seed(3)
    one, many = figure.subplots(1, 2)
    start = torch.tensor([-0.4, -0.4])
    draw_one_step(one, start, make_tasks(1, generator)[0])
    draw_many_steps(many, start, make_tasks(8, generator), make_tasks(OUTER_STEPS, generator))


def draw_one_step(ax, start, task):
    """The inner loop from start, and the outer steps of first and second order."""
    weight = start.clone().requires_grad_()
    path = torch.stack([adapted(weight, task, steps).detach()
                        for steps in range(INNER_STEPS + 1)])  # (steps + 1, 2)
    across, up = torch.linspace(-1, 2.4, 60), torch.linspace(-0.8, 1.7, 60)
    losses = [[query_loss(torch.stack([x, y]), task).item() for x in across] for y in up]
    contours = ax.contour(across.numpy(), up.numpy(), losses, levels=10, colors="lightgrey",
                          linewidths=1)
    ax.clabel(contours, fontsize=11)
    ax.plot(*path.T.numpy(), "o-", color=BLUE,
            label=f"inner loop: {INNER_STEPS} steps on the support set")
    first_order = -3 * query_gradient(start, task)
    second_order = -3 * query_gradient(start, task, second_order=True)
    arrow(ax, path[-1], first_order, ORANGE, "minus the query gradient at φ (times 3) ...")
    arrow(ax, path[0], first_order, ORANGE, "... applied at θ: FOMAML", linestyle="--")
    arrow(ax, path[0], second_order, GREEN, "gradient through the inner loop: MAML")
    for name, point in (("θ", path[0]), ("φ", path[-1])):
        ax.annotate(name, point.tolist(), (-20, 4), textcoords="offset points", fontsize=18)
    # On equal axes the gradients are perpendicular to the contours.
    ax.set_aspect("equal")
    cosine = F.cosine_similarity(first_order, second_order, dim=0)
    label_panel(ax, "One outer step: FOMAML and MAML move in similar directions "
                    f"(cosine {cosine:.2f})", "second weight",
                "first weight (grey: query loss in nats)", width=56)
    legend_below(ax, columns=1)


def draw_many_steps(ax, start, unseen, tasks):
    """The path of the start over the outer steps on tasks, and inner loops on unseen tasks."""
    walk = [start]
    for task in tasks:
        walk.append(walk[-1] - OUTER_LR * query_gradient(walk[-1], task))
    for begin, colour, which in ((walk[0], "lightgrey", "first"), (walk[-1], BLUE, "last")):
        for i, task in enumerate(unseen):
            end = adapted(begin.clone().requires_grad_(), task).detach()
            label = f"inner loops from the {which} θ on {len(unseen)} unseen tasks"
            ax.plot(*torch.stack([begin, end]).T.numpy(), "-", color=colour, linewidth=2,
                    label=None if i else label)
            ax.plot(*end.numpy(), "o", color=colour)
    ax.plot(*torch.stack(walk).T.numpy(), ".-", color=ORANGE,
            label=f"θ over {OUTER_STEPS} outer steps")
    ax.set_aspect("equal")
    label_panel(ax, f"After sixty outer steps, {INNER_STEPS} inner steps reach "
                    f"{loss_after(walk[-1], unseen):.2f} nats of query loss on unseen tasks "
                    f"({loss_after(walk[0], unseen):.2f} before)", "second weight",
                "first weight", width=56)
    legend_below(ax, columns=1)


def loss_after(weight, tasks):
    """The mean query loss, in nats, after an inner loop on each task."""
    losses = [query_loss(adapted(weight.clone().requires_grad_(), task), task) for task in tasks]
    return torch.stack(losses).mean().item()


# ---- what the probes see -----------------------------------------------------------------------

def draw_probes(figure):
    generator = torch.Generator().manual_seed(0)
    rank_ax, *head_axes = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    draw_ranks(rank_ax, generator)
    draw_heads(figure, head_axes, generator)


def draw_ranks(ax, generator):
    """The singular values of four matrices."""
    random = torch.randn(96, 96, generator=generator)
    left, right = (torch.randn(96, 8, generator=generator),
                   torch.randn(8, 96, generator=generator))
    matrices = {"all directions equal": torch.eye(96), "random": random,
                "8 directions plus a little noise": left @ right + 0.1 * random,
                "one direction": random[:, :1] @ random[:1]}
    for colour, (name, matrix) in zip(COLOURS, matrices.items()):
        values = torch.linalg.svdvals(matrix)
        share = (values / values.sum()).numpy()
        ax.plot(np.arange(1, 97), share, ".-", color=colour, linewidth=1, markersize=4,
                label=f"{name}: effective rank {effective_rank(matrix):.1f}")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set_yticks([0, 0.001, 0.01, 0.1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    ax.set_ylim(0, 1.5)
    label_panel(ax, "Effective rank counts the directions that a matrix of 96 x 96 really uses",
                "share of the sum", "singular value, largest first", width=48)
    legend_below(ax, columns=1)


def draw_heads(figure, axes, generator, T=24):
    """Three attention maps of T positions, and their entropy."""
    q, k = torch.randn(2, 1, 1, T, 24, generator=generator)
    # Make each key similar to the next query, so that each position attends one back.
    k = 0.3 * k + F.pad(q, (0, 0, 0, 1))[:, :, 1:]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = {"spread evenly": 0.0, "in between": 0.45, "focused one back": 2.5}
    for ax, (name, sharpness) in zip(axes, heads.items()):
        scores = sharpness * q[0, 0] @ k[0, 0].T / 24 ** 0.5
        attention = scores.masked_fill(future, -torch.inf).softmax(dim=1)
        image = ax.imshow(attention.numpy(), cmap="viridis", vmin=0, vmax=1)
        entropy = head_entropy(sharpness * q, k)[0, 1:]  # (T - 1,): position 0 has no choice
        share = (entropy / torch.arange(2, T + 1).log()).mean()
        label_panel(ax, f"{name}: {entropy.mean():.2f} nats, {share:.2f} of uniform",
                    "query position", "key position", width=24)
    figure.colorbar(image, ax=axes, label="attention", location="bottom", shrink=0.5)


@command
def main():
    Parser(description="Draw the small figures of the README.").parse_args()
    for name, draw, size in (("episode", draw_episode, (17, 7)),
                             ("fomaml", draw_fomaml, (17, 9.5)),
                             ("probes", draw_probes, (20, 7.5))):
        figure = new_figure(*size)
        draw(figure)
        save_figure(figure, HERE / f"{name}.png")
        print(f"written: {HERE / name}.png")


if __name__ == "__main__":
    main()
