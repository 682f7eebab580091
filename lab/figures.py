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
            axis.axhline(edge - 0.5, color="0.85", lw=0.8, zorder=0)
            axis.axvline(edge - 0.5, color="0.85", lw=0.8, zorder=0)
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
    axes[1].annotate("0.75 table[3] + 0.25 table[4]", (3.25, 2), (1.05, 1.55), fontsize=8,
                     arrowprops={"arrowstyle": "->"})
    figure.savefig(path, dpi=80)


def keys(path):
    """What one query of an 8 x 8 map looks at: ViT, Swin, deformable convolution, DAT."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 4), layout="constrained")
    generator = torch.Generator().manual_seed(3)
    grid, query = torch.cartesian_prod(torch.arange(8.), torch.arange(8.)), torch.tensor([2., 5.])
    taps = query + torch.cartesian_prod(*[torch.arange(-1., 2)] * 2)
    bend = 0.9 * torch.stack([torch.sin(grid[:, 1] / 2), torch.cos(grid[:, 0] / 2)], dim=1)
    cases = {"ViT: every patch": grid,
             "Swin (w = 4): its window": grid[(grid // 4 == query // 4).all(dim=1)],
             "deformable convolution:\nnine taps of its own": taps + 1.2 * torch.randn(
                 9, 2, generator=generator),
             "DAT: moved points,\nthe same for every query": grid + bend}
    for axis, (title, points) in zip(axes, cases.items()):
        axis.scatter(grid[:, 1], grid[:, 0], s=6, color="0.7")
        axis.scatter(points[:, 1], points[:, 0], s=26, color="tab:red")
        axis.scatter(query[1], query[0], s=160, marker="*", color="tab:blue", edgecolors="black")
        axis.set(title=title, aspect="equal", xlim=(-1.4, 8.4), ylim=(8.4, -1.4), xticks=[],
                 yticks=[])
    figure.savefig(path, dpi=80)


def sampling(path):
    """Equation 8 on the 3 x 4 map of section 5: a point and the weights of its four pixels."""
    figure, axis = plt.subplots(figsize=(5.5, 3.9), layout="constrained")
    y, x = 1.5, 2.25
    for row in range(3):
        for column in range(4):
            weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, edgecolor="0.6",
                                         facecolor=(1, 1 - weight, 1 - weight)))
            text = f"{10 * row + column}" + (f"\nx {weight:g}" if weight else "")
            axis.text(column, row - 0.12, text, ha="center", va="center")
    axis.plot([x], [y], "o", color="tab:blue")
    axis.annotate("(1.5, 2.25)", (x, y), (x + 0.35, y + 0.02), fontsize=9, color="tab:blue")
    axis.set(xlim=(-0.6, 3.6), ylim=(2.6, -0.6), aspect="equal", xticks=range(4), yticks=range(3),
             xlabel="x", ylabel="y")
    figure.savefig(path, dpi=80)


def augmentation(path):
    """Six images of `shapes`: as they are, after each operation at full strength, erased, mixed."""
    images = dat.make_shapes(6, seed=0)[0] / 255
    rows = [("as they are", images)]
    for kind, name in enumerate(dat.OPERATIONS):
        strength = torch.tensor([-1, -0.6, -0.3, 0.3, 0.6, 1])
        rows.append((name, dat.operate(images, torch.full((6,), kind), strength)))
    torch.manual_seed(0)
    rows.append(("strength 0", dat.crop_and_flip(images)))
    rows.append(("strength 1", dat.augment((images * 255).byte(), torch.eye(6), 1)[0]))
    rows.append(("strength 2", dat.augment((images * 255).byte(), torch.eye(6), 2)[0]))
    figure, axes = plt.subplots(5, 3, figsize=(13, 5.2), layout="constrained")
    for axis, (name, batch) in zip(axes.flat, rows):
        axis.imshow(torch.cat(list(batch.permute(0, 2, 3, 1)), dim=1))
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    augmentation(HERE / "augmentation.png")
    keys(HERE / "keys.png")
    sampling(HERE / "sampling.png")
    geometries(HERE / "geometry.png")
    table(HERE / "table.png")
