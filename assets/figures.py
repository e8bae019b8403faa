"""Draws the tutorial's small figures: episode.png, fomaml.png and probes.png, beside this file.

    python assets/figures.py

Nothing in them is sketched: the episode is drawn from the default corpus (other versions of the packages, other words), the
arrows are what meta.adapt and autograd compute, the ranks and entropies are those of probe.py.
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
from probe import COLOURS, effective_rank, head_entropy, new_figure, panel, save_figure  # noqa: E402
from text import MASK  # noqa: E402


# ---- an episode --------------------------------------------------------------------------------------------

def draw_episode(figure, seed=12):
    """A 4-way 2-shot episode with one query per word, in rows of 14 tokens."""
    corpus = data.load()
    episode = data.EpisodeSampler(corpus, 4, 2, 1, 14).draw(seed, 0)
    words = [corpus.encoding.decode([i]).strip() for i in corpus.index.words[episode.words].tolist()]
    sides = (("support set: the answers are given, the inner loop learns from them", episode.support_ids, episode.support_labels),
             ("query set: the adapted classifier is asked, the outer loop learns from its loss", episode.query_ids, episode.query_labels))
    axes = figure.subplots(2, 1, height_ratios=[8.6, 4.6])
    for ax, (title, ids, labels) in zip(axes, sides):
        for y, (row, label) in enumerate(zip(ids, labels.tolist())):
            text = " ".join(corpus.encoding.decode(row.tolist()).split()).replace(MASK, " ___")
            ax.text(0.70, y, text[-82:], ha="right", va="center", family="monospace", fontsize=9)
            answer = f"label {label}" if ids is episode.support_ids else f"label ?   (it is {label}: {words[label]})"
            ax.text(0.72, y, answer, va="center", fontsize=9, color=COLOURS[label], weight="bold")
        ax.set_ylim(len(ids) - 0.4, -0.6)
        ax.set_axis_off()
        ax.set_title(title, fontsize=10, loc="left")
    figure.suptitle("an episode of 4 ways and 2 shots: which of four words stood at the end of each row? (chance: 1 of 4)", fontsize=11)


# ---- one FOMAML step, and what many do ---------------------------------------------------------------------

class TwoWeights(torch.nn.Module):
    """A classifier small enough to draw: points (R, 2) -> scores (R, 2), with two weights in all."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def forward(self, points):
        score = points @ self.weight
        return torch.stack([-score, score], dim=1)


def tasks(n, generator, rows=24):
    """n tasks, each (support points, labels, query points, labels): separate two classes along a direction of its own,
    where the directions of all tasks lie close together. That they have something in common is what can be learnt."""
    for _ in range(n):
        direction = torch.tensor([1.8, 0.9]) + 0.4 * torch.randn(2, generator=generator)
        points = torch.randn(2 * rows, 2, generator=generator) * torch.tensor([0.7, 2.0])
        labels = (torch.rand(2 * rows, generator=generator) < (2 * points @ direction).sigmoid()).long()
        yield points[:rows], labels[:rows], points[rows:], labels[rows:]


def draw_fomaml(figure, inner_steps=5, inner_lr=0.12):
    generator, module = torch.Generator().manual_seed(3), TwoWeights()

    def loss(weight, points, labels):
        return F.cross_entropy(functional_call(module, {"weight": weight}, (points,)), labels)

    def adapted(weight, task, steps=inner_steps, second_order=False):
        return adapt(module, {"weight": weight}, task[0], task[1], steps, inner_lr, second_order)["weight"]

    def query_gradient(weight, task, second_order=False):
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(loss(adapted(weight, task, second_order=second_order), *task[2:]), weight)[0]

    def arrow(ax, start, step, colour, label, **style):
        ax.annotate("", (start + step).tolist(), start.tolist(), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2, **style})
        ax.plot([], [], color=colour, lw=2, label=label, linestyle=style.get("linestyle", "-"))

    one, many = figure.subplots(1, 2)
    first = next(tasks(1, generator))
    start = torch.tensor([-0.4, -0.4], requires_grad=True)
    path = torch.stack([adapted(start, first, steps).detach() for steps in range(inner_steps + 1)])  # (steps + 1, 2)
    grid = torch.stack(torch.meshgrid(torch.linspace(-1, 2.4, 60), torch.linspace(-0.8, 1.7, 60), indexing="xy"), dim=-1)
    losses = torch.stack([loss(weight, *first[2:]) for weight in grid.view(-1, 2)]).view(60, 60).numpy()
    contours = one.contour(grid[..., 0].numpy(), grid[..., 1].numpy(), losses, levels=10, colors="lightgrey", linewidths=1)
    one.clabel(contours, fontsize=7)
    one.plot(*path.T.numpy(), "o-", color=COLOURS[0], markersize=4, label=f"inner loop: {inner_steps} steps on the support set")
    gradients = {order: -3 * query_gradient(start, first, second_order=order) for order in (False, True)}
    arrow(one, path[-1], gradients[False], COLOURS[1], "outer step: query gradient at φ (times 3) ...")
    arrow(one, path[0], gradients[False], COLOURS[1], "... used at θ (first order)", linestyle="--")
    arrow(one, path[0], gradients[True], COLOURS[2], "differentiated through the inner loop (MAML)")
    for name, point in (("θ", path[0]), ("φ", path[-1])):
        one.annotate(name, point.tolist(), (-16, 2), textcoords="offset points", fontsize=13)
    cosine = F.cosine_similarity(gradients[False], gradients[True], dim=0)
    panel(one, f"one step of (FO)MAML: cosine of the two outer steps {cosine:.2f}", "second weight", "first weight; grey: query loss, nats")
    one.legend(fontsize=8, edgecolor="none", framealpha=0.9, loc="lower right")

    unseen = list(tasks(8, generator))
    after = lambda weight: torch.stack([loss(adapted(weight.clone().requires_grad_(), task), *task[2:]) for task in unseen]).mean().item()
    walk = [start.detach()]
    for task in tasks(60, generator):
        walk.append(walk[-1] - 0.4 * query_gradient(walk[-1], task))
    walk = torch.stack(walk)  # (outer steps + 1, 2)
    for begin, colour, which in ((walk[0], "lightgrey", "first"), (walk[-1], COLOURS[0], "last")):
        for i, task in enumerate(unseen):
            ends = torch.stack([begin, adapted(begin.clone().requires_grad_(), task).detach()])
            many.plot(*ends.T.numpy(), "-", color=colour, linewidth=1.5, label=None if i else f"from the {which} θ to the φ of 8 unseen tasks")
            many.plot(*ends[1].numpy(), "o", color=colour, markersize=4)
    many.plot(*walk.T.numpy(), ".-", color=COLOURS[1], markersize=3, linewidth=1, label="θ over 60 outer steps")
    panel(many, f"query loss after {inner_steps} inner steps, 8 unseen tasks: {after(walk[0]):.2f} nats at first, {after(walk[-1]):.2f} at last",
          "second weight", "first weight")
    many.legend(fontsize=8, frameon=False, loc="lower right")


# ---- what the probes see -----------------------------------------------------------------------------------

def draw_probes(figure):
    generator = torch.Generator().manual_seed(0)
    rank_ax, *head_axes = figure.subplots(1, 4, width_ratios=[1.7, 1, 1, 1])
    random = torch.randn(96, 96, generator=generator)
    few = torch.randn(96, 8, generator=generator) @ torch.randn(8, 96, generator=generator)
    for colour, (name, matrix) in zip(COLOURS, (("all directions alike", torch.eye(96)), ("random", random), ("8 directions, a little noise", few + 0.1 * random),
                                                ("one direction", random[:, :1] @ random[:1]))):
        values = torch.linalg.svdvals(matrix)
        rank_ax.plot(np.arange(1, 97), (values / values.sum()).numpy(), ".-", color=colour, linewidth=1, markersize=4, label=f"{name}: effective rank {effective_rank(matrix):.1f}")
    rank_ax.set_yscale("symlog", linthresh=1e-3)
    rank_ax.set_ylim(0, 1.5)
    rank_ax.legend(fontsize=8, frameon=False)
    panel(rank_ax, "four 96 x 96 matrices", "share of the sum of singular values", "singular value, largest first")
    T = 24
    q, k = torch.randn(2, 1, 1, T, 24, generator=generator)
    k = 0.3 * k + F.pad(q, (0, 0, 0, 1))[:, :, 1:]  # keys like the query that comes next: it looks one back
    for ax, (name, sharpness) in zip(head_axes, (("looks everywhere", 0.0), ("looks about", 0.45), ("looks one back", 2.5))):
        scores = (sharpness * q @ k.mT / 24 ** 0.5).masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -torch.inf)[0, 0]
        image = ax.imshow(scores.softmax(dim=1).numpy(), cmap="viridis", vmin=0, vmax=1)
        entropy = head_entropy(sharpness * q, k)[0, 1:]  # (T - 1,): the first position has no choice
        share = (entropy / torch.arange(2, T + 1).log()).mean()
        panel(ax, f"{name}: entropy {entropy.mean():.2f} nats,\n{share:.2f} of uniform", "position that looks", "position looked at")
    figure.colorbar(image, ax=head_axes, label="attention")


def main():
    for name, draw, size in (("episode", draw_episode, (12, 4.2)), ("fomaml", draw_fomaml, (13, 4.8)), ("probes", draw_probes, (15, 4))):
        figure = new_figure(*size)
        try:
            draw(figure)
        except data.DataError as error:
            sys.exit(f"figures.py: error: {error}")
        save_figure(figure, HERE / f"{name}.png")
        print(f"written: {HERE / name}.png")


if __name__ == "__main__":
    main()
