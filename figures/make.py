"""Draws the explanatory pictures of tutorial.md: python figures/make.py (from the root)."""
import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import dat


def geometries(path):
    """Reference points of a 6 x 6 map with r = 1 and r = 2 in both geometries, and their reach."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.9), layout="constrained")
    cases = [(g, r) for g in ("paper", "release") for r in (1, 2)]
    for axis, (geometry, r) in zip(axes, cases):
        count, length = 6 // r, 6
        centres = dat.cell_centres(count, length, geometry=geometry, like=torch.zeros(()))
        reach = dat.largest_offset(count, length, offset_range=2.0, geometry=geometry)
        points = torch.cartesian_prod(centres, centres)
        for edge in range(length + 1):
            axis.axhline(edge - 0.5, color="0.85", lw=0.8)
            axis.axvline(edge - 0.5, color="0.85", lw=0.8)
        pixels = torch.cartesian_prod(*[torch.arange(length)] * 2)
        axis.scatter(pixels[:, 1], pixels[:, 0], s=8, color="0.6", label="pixel centres")
        axis.scatter(points[:, 1], points[:, 0], s=40, facecolors="none", edgecolors="tab:red",
                     linewidths=1.5, label="reference points")
        y, x = points[len(points) // 2 + count // 2].tolist() if count % 2 == 0 else \
            points[len(points) // 2].tolist()
        axis.add_patch(plt.Rectangle((x - reach, y - reach), 2 * reach, 2 * reach, color="tab:red",
                                     alpha=0.15, label="reach of one point, s = 2"))
        axis.set(title=f'"{geometry}", r = {r}: reach {reach:.2f} px', aspect="equal",
                 xlim=(-0.6, 5.6), ylim=(5.6, -0.6))
        axis.set_xticks(range(length))
        axis.set_yticks(range(length))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80)


def table(path):
    """Why the table is 2H - 1: what three queries read for integer keys and for one between."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
    for axis, keys in zip(axes, ((0, 1, 2), (0, 0.75, 2))):
        for q in range(3):
            for k, key in enumerate(keys):
                index = q - key + 2
                axis.plot([index], [q], "o", color=f"C{k}", markersize=9,
                          label=f"key at {key:g}" if q == 0 else None)
        for i in range(5):
            axis.axvline(i, color="0.85", zorder=0)
        axis.set(xlabel="index q - p + (H - 1) into the table, H = 3", ylabel="query q",
                 yticks=range(3), xticks=range(5), ylim=(2.4, -1.1), xlim=(-0.3, 4.3))
        axis.legend(fontsize=8, ncols=3, loc="upper right")
    axes[0].set_title("keys on pixels: five integer displacements")
    axes[1].set_title("a key at 0.75: the index falls between entries")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    geometries(HERE / "geometry.png")
    table(HERE / "table.png")
