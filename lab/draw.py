"""Draws where a model reads an image: its sampling points, and which of them it attends to.

    python lab/draw.py shapes:7 --checkpoint runs/shapes-cifar-nano-1/last.pt --out points.png

IMAGE is a file, scaled to the model's size, or an image of a test set: shapes:3, cifar10:17.
A row is the last deformable block of a resolution with 3 x 3 points or more; at most two rows.
"""
import io
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

GROUPS = "#0072b2 #e69f00 #009e73 #cc3311 #8e5ea2 #7a4a2b #5f6b6d #b0a000".split()
QUERIES = "#ff1493 #00e0ff #ffe600 #7cff4f".split()
TITLES = ("points, moved from a uniform grid\n(a colour for each group)",
          "the same points, larger the\nmore attention they receive",
          "queries (stars) and the\nsix points each attends to most")


@torch.no_grad()
def inspect(model: dat.DAT, images: Tensor) -> list[SimpleNamespace]:
    """What the deformable blocks look at, one namespace per D block, in order.
    reference (Hk, Wk, 2): the uniform grid;  points (B, G, Hk, Wk, 2): where keys are read;
    queries (N, 2): where the queries stand;  weights (B, M, N, K): the attention, Eq. 9;
    importance (B, G, K): the attention a key receives, summed over its group's heads and queries.
    Units: coordinates are (y, x) in px of the image."""
    x, views, config = model.stem(images.permute(0, 2, 3, 1)), [], model.config
    for i, stage in enumerate(model.stages):
        x, cell = stage.down(x), config.patch * 2 ** i  # px of the image per map px
        first = (cell - 1) / 2 if config.stem == "patch" else 0  # px of a map's first pixel
        for block in stage.blocks:
            attention, z, x = block.attention, block.norm1(x), block(x)
            if not isinstance(attention, dat.DeformableAttention):
                continue
            q, k, _, points = attention.project(z)
            bias, scores = attention.position_bias(points, z.shape[1:3]), q @ k.transpose(2, 3)
            weights = (scores / q.shape[-1] ** 0.5 + (0 if bias is None else bias)).softmax(dim=-1)
            reference, queries = (first + cell * torch.cartesian_prod(*(
                dat.cell_centres(count, length, geometry=attention.geometry, like=points)
                for count, length in zip(counts, z.shape[1:3])))
                for counts in (points.shape[2:4], z.shape[1:3]))
            views.append(SimpleNamespace(
                reference=reference.view(points.shape[2:]), points=first + cell * points,
                queries=queries, weights=weights,
                importance=weights.unflatten(1, (attention.groups, -1)).sum(dim=(2, 3))))
    return views


def draw(image: Tensor, views: list[SimpleNamespace], text: str,
         queries: list[tuple[float, float]]) -> bytes:
    """A PNG: a row of three panels for each of `views`, of `image` (3, H, W) uint8 alone.
    `queries` (y, x) in px of the image; if none, near the most and the least important key.
    Points more than a sixth of the image beyond its edge are left out."""
    from matplotlib import patheffects
    from matplotlib.figure import Figure
    H, W = image.shape[1:]
    top, left, bottom, right = -H / 6, -W / 6, H * 7 / 6, W * 7 / 6
    figure = Figure(figsize=(12, 3.9 * len(views) * H / W + 1.2), layout="constrained")
    figure.suptitle("DAT moves the points at which it reads an image, and attends to some far more "
                    f"than to others\n{text}".replace("$", r"\$"), fontsize=13)
    outline = [patheffects.withStroke(linewidth=3, foreground="black")]
    pale = (0.45 + 0.55 * image.permute(1, 2, 0) / 255).numpy()
    for view, axes in zip(views, figure.subplots(len(views), 3, squeeze=False)):
        grid, (Hk, Wk) = view.reference.flatten(0, 1), view.reference.shape[:2]
        points, importance = view.points[0].flatten(1, 2), view.importance[0]  # (G, K, 2), (G, K)
        (y, x), G, size = points.unbind(-1), len(points), 9 / max(Hk, Wk) ** 0.5  # in pt
        seen = (y > top) & (y < bottom) & (x > left) & (x < right)
        for axis, title in zip(axes, TITLES):
            axis.imshow(pale, interpolation="nearest")
            axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], frame_on=False)
            axis.set_title(title * (view is views[0]), fontsize=11)
        axes[0].set_ylabel(f"{Hk} x {Wk} points in each of {G} groups", fontsize=11)
        area = 900 * (4 / max(4, Hk, Wk)) ** 1.5 * importance / importance.max()
        for y, x, s, near, colour in zip(y, x, area, seen, GROUPS * G):
            ends = torch.stack([grid, torch.stack([y, x], dim=1)])[:, near]  # (from, to, yx)
            axes[0].plot(*ends.unbind(-1)[::-1], "-o", mec="w", mew=0.5, markevery=[1],
                         color=colour, lw=size / 2.4, ms=size)
            axes[1].scatter(x[near], y[near], s[near], color=colour, alpha=0.75, edgecolors="w")
        axes[0].plot(*grid.T.flip(0), "ow", ms=size * 0.7, mec="black", mew=0.6, zorder=4)
        flat = points.flatten(0, 1)
        ranked = flat[(importance * seen).flatten().argsort(descending=True)]
        stars = torch.cdist(torch.tensor(queries) if queries else ranked, view.queries).argmin(1)
        stars = stars if queries else [stars[0], *stars[stars != stars[0]][-1:]]
        for star, colour in zip(stars, QUERIES * len(stars)):
            weights = view.weights[0, :, star].unflatten(0, (G, -1)).mean(dim=1) * seen
            best, (y, x) = weights.flatten().topk(min(6, seen.sum().item())), view.queries[star]
            for end, share in zip(flat[best.indices], (best.values / best.values[:1]).tolist()):
                axes[2].plot([x, end[1]], [y, end[0]], "-o", markevery=[1], color=colour, lw=1.7,
                             ms=4 + 7 * share, path_effects=outline)
            axes[2].plot(x, y, "*", color=colour, ms=22, mec="black", mew=1.2, zorder=4)
    content = io.BytesIO()
    figure.savefig(content, dpi=90)
    return content.getvalue()


def load_model(path: str, variant: str) -> tuple[dat.DAT, tuple | None, tuple]:
    """The model of a checkpoint, its classes if known, and (mean, std). Raises: dat.InputError."""
    found = dat.load_checkpoint(path)
    theirs = replace(dat.VARIANTS[variant], geometry="release",
                     classes=len(found["model"].get("head.bias", "?")))
    model = dat.DAT(found.get("config", theirs))
    try:
        model.load_state_dict(found["model"])
    except RuntimeError as error:
        raise dat.InputError(f"{path} does not fit --model {variant}: {error}") from None
    statistics = (found["mean"], found["std"]) if "mean" in found else dat.IMAGENET
    return model.eval(), found.get("classes"), statistics


def load_image(source: str, data: str, size: int) -> Tensor:
    """The picture of a file, or of DATA:INDEX, scaled: (3, size, size) uint8. dat.InputError."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode as Mode, v2
    name, _, index = source.partition(":")
    if name in ("shapes", "cifar10", "cifar100"):
        samples = dat.load_dataset(name, data, False)[0]
        if not index.isdecimal() or not int(index[:10]) < len(samples):
            raise dat.InputError(f"{source}: expected {name}: and 0 to {len(samples) - 1}")
        image = samples[int(index)][0]
    else:
        try:
            image = Image.open(source).convert("RGB")
        except Exception as error:  # of any kind
            raise dat.InputError(f"{source} cannot be read as an image ({error})") from None
    return v2.functional.resize(v2.functional.to_image(image), [size] * 2, Mode.BICUBIC)


def point(text: str) -> tuple[float, float]:
    y, x = text.split(",")
    return float(y), float(x)


def main(parser):
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("--checkpoint", required=True, metavar="FILE")
    add("--model", choices=dat.VARIANTS, default="dat-t", help="of the authors' file")
    add("--query", nargs="+", type=point, default=[], metavar="Y,X", help="in px of the image")
    add("--all", action="store_true", help="a row for every deformable block")
    add("--data", metavar="DIR", default="data", help="of CIFAR")
    add("--out", default="points.png", metavar="PNG")
    args = parser.parse_args()
    model, classes, statistics = load_model(args.checkpoint, args.model)
    image = load_image(args.image, args.data, model.config.image_size)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in statistics)
    images = ((image / 255 - mean) / std)[None]
    views = inspect(model, images)
    last = {view.reference.shape: view for view in views}  # of each resolution
    chosen = [view for shape, view in last.items() if min(shape[:2]) > 2][-2:] or views[-1:]
    with torch.no_grad():
        share, best = model(images)[0].softmax(dim=0).max(dim=0)
    name = classes[best] if classes else f"class {best}"
    text = f"{args.image}, which the model takes for {name} ({share:.0%})"
    dat.write_atomically(args.out, draw(image, views if args.all else chosen, text, args.query))
    print(f"{text}: see {args.out}")


if __name__ == "__main__":
    run(main, __doc__)
