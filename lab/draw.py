"""Draws where a model reads an image: its sampling points, and which of them it attends to.

    python lab/draw.py shapes:7 --checkpoint runs/shapes-1/last.pt --out points.png

IMAGE is a file, or an image of a test set: shapes:3, cifar10:17. A file is scaled to the model's
size, turned as its EXIF data say, and put on white where it is transparent. --checkpoint is last.pt
of dat.py, the authors' file, or a state dict; the latter two need --model.
A row is the last deformable block of a resolution with 3 x 3 points or more; at most two rows.
"""
import argparse
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

ORIENTATION = ExifTags.Base.Orientation
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
    importance (B, G, K): the attention a key receives, summed over its group's heads and queries;
    map (B, H, W, C): what is read there;  cell, first: map px y is image px first + cell * y;
    attention: the module.  Units: points and queries are (y, x) in px of the image."""
    x, views, config = model.embed(images), [], model.config
    for i, stage in enumerate(model.stages):
        x, cell = stage.down(x), config.patch * 2 ** i
        first = (cell - 1) / 2 if config.stem == "patch" else 0
        for block in stage.blocks:
            attention, z = block.attention, block.norm1(x)
            x = block(x)
            if not isinstance(attention, dat.DeformableAttention):
                continue
            size, heads = z.shape[1:3], attention.heads
            q = attention.q(z)
            points = attention.points(q)  # (B, G, Hk, Wk, 2)
            k = attention.k(attention.sample(z, points))  # (B, K, C)
            q, k = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k))
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, M, N, K)
            weights = (scores + attention.position_bias(points, size)).softmax(dim=-1)
            reference, queries = (
                first + cell * torch.cartesian_prod(*(
                    dat.reference_coordinates(count, length, attention.geometry, like=points)
                    for count, length in zip(counts, size)))
                for counts in (points.shape[2:4], size))
            views.append(SimpleNamespace(
                reference=reference.view(points.shape[2:]), points=first + cell * points,
                queries=queries, weights=weights,
                map=z, cell=cell, first=first, attention=attention,
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
    """The model of a checkpoint, its classes if known, and (mean, std). Raises: dat.InputError.
    `variant`: the model of a file that holds weights alone."""
    checkpoint = dat.load_checkpoint(path)
    weights, config = checkpoint["model"], checkpoint["config"]
    mean_and_std = checkpoint.get("mean"), checkpoint.get("std")
    if config is None:
        config = dat.VARIANTS[variant]
        config = replace(config, geometry=checkpoint["geometry"] or config.geometry,
                         classes=len(weights.get("head.bias", ())) or config.classes)
        mean_and_std = dat.mean_and_std("imagenet" if config.image_size >= 224 else "cifar10")
    elif checkpoint.get("mean") is None:
        raise dat.InputError(f"{path} does not hold what dat.py saves: mean and std are missing")
    model = dat.DAT(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise dat.InputError(f"{path} does not fit --model {variant}: {error}") from None
    return model.eval(), checkpoint["classes"], mean_and_std


def load_photo(path: str) -> Image.Image:
    """An image file as a viewer shows it. Raises: dat.InputError."""
    image = dat.read_image(path)  # which ignores the orientation
    with Image.open(path) as file:
        file.load()  # may turn the image itself, and then the orientation is gone: TIFF
        image.getexif()[ORIENTATION] = file.getexif().get(ORIENTATION, 1)
    return ImageOps.exif_transpose(image)


def load_image(source: str, data: str, size: int | tuple[int, int]) -> Tensor:
    """The picture of a file, or of DATA:INDEX, scaled: (3, H, W) uint8. Raises: dat.InputError."""
    from torchvision.transforms import InterpolationMode as Mode, v2
    name, _, index = source.partition(":")
    if name in ("shapes", "cifar10", "cifar100"):
        samples = dat.load_dataset(name, data, "test")[0]
        if not index.isdecimal() or not int(index[:10]) < len(samples):
            raise dat.InputError(f"{source}: expected {name}: and 0 to {len(samples) - 1}")
        image = samples[int(index)][0]
    else:
        image = v2.functional.to_image(load_photo(source))
    size = size if isinstance(size, tuple) else (size, size)
    return v2.functional.resize(image, size, Mode.BICUBIC)


def point(text: str) -> tuple[float, float]:
    """The type of --query."""
    try:
        y, x = map(float, text.split(","))
    except ValueError:
        y = x = math.nan
    if not math.isfinite(y + x):
        raise argparse.ArgumentTypeError(f"expected Y,X in px of the image, such as 8,20, "
                                         f"not {text!r}")
    return y, x


def add_image(parser):
    """The flags that say which image a model shall look at."""
    add = parser.add_argument
    add("image", metavar="IMAGE")
    add("--checkpoint", required=True, metavar="FILE")
    add("--model", choices=dat.VARIANTS, default="dat-t",
        help="of a file that holds weights alone; default: dat-t")
    add("--data", metavar="DIR", default="data", help="of CIFAR")


def look(args) -> tuple[Tensor, list[SimpleNamespace], str]:
    """The image (3, H, W) uint8 of these flags, what its model looks at, and a title with the
    model's answer. Raises: dat.InputError."""
    model, classes, statistics = load_model(args.checkpoint, args.model)
    image = load_image(args.image, args.data, model.config.image_size)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in statistics)
    images = ((image / 255 - mean) / std)[None]
    views = inspect(model, images)
    if not views:
        raise dat.InputError(f"{args.checkpoint} has no deformable block, so no points to draw")
    with torch.no_grad():
        share, best = model(images)[0].softmax(dim=0).max(dim=0)
    name = classes[best] if classes else f"class {best}"
    return image, views, f"{args.image}, which the model takes for {name} ({share:.0%})"


def main(parser):
    add_image(parser)
    add = parser.add_argument
    add("--query", nargs="+", type=point, default=[], metavar="Y,X", help="in px of the image")
    add("--all", action="store_true", help="a row for every deformable block")
    add("--out", default="points.png", metavar="PNG")
    args = parser.parse_args()
    image, views, text = look(args)
    last = {view.reference.shape: view for view in views}  # of each resolution
    chosen = [view for shape, view in last.items() if min(shape[:2]) > 2][-2:] or views[-1:]
    dat.write_atomically(args.out, draw(image, views if args.all else chosen, text, args.query))
    print(f"{text}: see {args.out}")


if __name__ == "__main__":
    run(main, __doc__)
