"""The small figures of the README show what they say."""
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from plumbing.pictures import new_figure

SOURCE = Path(__file__).parent.parent.parent / "docs" / "figures.py"


@pytest.fixture(scope="module")
def figures():
    """docs/figures.py as a module."""
    spec = importlib.util.spec_from_file_location("figures", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def title(ax):
    return ax.get_title(loc="left")


def test_ranks_and_entropies_are_as_named(figures):
    figure = new_figure()
    figures.draw_probes(figure)
    ranks = [float(line.get_label().split()[-1]) for line in figure.axes[0].lines]
    alike, random, eight_directions, one_direction = ranks
    assert alike == 96
    assert 48 < random < 96
    assert 8 < eight_directions < 16
    assert one_direction == 1
    # The titles end in "0.62 of uniform".
    shares = [float(title(ax).split()[-3]) for ax in figure.axes[1:4]]
    everywhere, about, one_back = shares
    assert everywhere == 1
    assert 0.5 < about < 0.9
    assert one_back < 0.1


def test_the_outer_loop_moves_the_start_to_where_few_steps_do(figures):
    figure = new_figure()
    figures.draw_fomaml(figure)
    last, first = [float(loss) for loss in re.findall(r"\b0\.\d+", title(figure.axes[1]))]
    assert last < 0.7 * first < 0.7 * np.log(2)
