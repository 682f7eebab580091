"""Draws the explanatory pictures of tutorial.md into figures/.

    python lab/figures.py
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

RED, BLUE, GREEN = "#cc3311", "#0072b2", "#009e73"
FOLDER = Path(__file__).parents[1] / "figures"


def subplots(rows: int, columns: int, size: tuple[float, float], H: int = 0, W: int = 0):
    """A figure of `size` inches and its axes; with H, W each shows the pixels of such a map."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, colors="0.4")
        if H:
            axis.hlines(torch.arange(H + 1) - 0.5, -0.5, W - 0.5, color="0.85", lw=0.8, zorder=0)
            axis.vlines(torch.arange(W + 1) - 0.5, -0.5, H - 0.5, color="0.85", lw=0.8, zorder=0)
            axis.set(aspect="equal", xlim=(-1, W), ylim=(H, -1), xticks=range(W), yticks=range(H))
    return figure, axes


def keys():
    """What one query of an 8 x 8 map looks at: ViT, Swin, deformable convolution, DAT."""
    figure, axes = subplots(1, 4, (13, 4.3), 8, 8)
    grid, query = torch.cartesian_prod(torch.arange(8.), torch.arange(8.)), torch.tensor([2., 5.])
    noise = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    bend = torch.stack([torch.sin(grid[:, 1] / 2), torch.cos(grid[:, 0] / 2)], dim=1)
    cases = [("ViT\nevery pixel", grid, 0),
             ("Swin\nthe pixels of its window", grid[(grid // 4 == query // 4).all(dim=1)], 0),
             ("deformable convolution\nnine points, moved for it alone",
              query + torch.cartesian_prod(*[torch.arange(-1., 2)] * 2), noise),
             ("DAT\npoints moved once, for all queries", grid, bend)]
    for axis, (title, start, move) in zip(axes, cases):
        y, x = torch.stack([start, start + 0.8 * move]).unbind(-1)  # (2, K): from, to
        axis.plot(x, y, "-o", markevery=[1], color=RED, lw=1, ms=5.5)
        axis.plot(query[1], query[0], "*", color="#ffc800", ms=20, mec="black")
        axis.set(xticks=[], yticks=[], title=title)
    figure.supxlabel("red: what the query (star) looks at", fontsize=12)
    return figure


def geometry():
    """Reference points of a 6 x 6 map with r = 1 and r = 2 in both geometries, and their reach."""
    figure, axes = subplots(1, 4, (13, 4.4), 6, 6)
    for i, axis in enumerate(axes):
        name, r = ("paper", "release")[i // 2], 1 + i % 2
        places = dat.reference_coordinates(6 // r, 6, name, like=torch.zeros(()))
        reach = dat.largest_offset(6 // r, 6, 2.0, name)
        axis.plot(*torch.cartesian_prod(*[torch.arange(6)] * 2).T, ".", color="0.7",
                  label="centres of pixels")
        axis.plot(*torch.cartesian_prod(places, places).T, "o", ms=8, mfc="none", mec=RED,
                  mew=1.6, label="reference points")
        low, high = (places[3 // r].item() + sign * reach for sign in (-1, 1))
        axis.fill([low, high, high, low], [low, low, high, high], color=RED, alpha=0.15, lw=0,
                  label="reach of the point in its middle, s = 2")
        axis.set_title(f'"{name}", r = {r}\nup to {reach:.2f} px along each axis', fontsize=11)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def table():
    """Why the table is 2H - 1: what three queries read for integer keys and for one between."""
    figure, axes = subplots(1, 2, (11, 3.1))
    titles = ["keys on pixels read one of five entries", "a moved key reads between two entries"]
    for axis, title, middle in zip(axes, titles, (1, 0.75)):
        for key, colour in zip((0, middle, 2), (BLUE, RED, GREEN)):
            axis.plot(torch.arange(3) - key + 2, range(3), "o", color=colour, ms=11,
                      label=f"key at {key:g}")
        axis.vlines(range(5), -0.3, 2.3, color="0.85", zorder=0)
        axis.set(xlabel="table entry read: query - key + (H - 1), here H = 3", yticks=range(3),
                 yticklabels=[f"query at {q}" for q in range(3)], ylim=(2.5, -0.5), xticks=range(5))
        axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
        axis.set_title(title, pad=30, fontsize=11)
    axis.annotate("0.75 table[3] + 0.25 table[4]", (3.25, 2), (0.08, 1.6), va="center",
                  arrowprops={"arrowstyle": "->", "shrinkB": 8})
    return figure


def main(parser):
    parser.parse_args()
    for draw in (keys, geometry, table):
        draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=80)


if __name__ == "__main__":
    run(main, __doc__)
