"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python lab/study.py offsets --epochs 3 --seeds 3

A study changes one field of the model: offsets (the main question), range (s), groups (G), stride
(r), position, geometry, windows; or, for sizes, the size of the images in the test. A run is
`dat.py --train shapes` on one thread. The table holds the accuracy on test images, and means over
the D blocks, in %: on, points on the object (the mask's value; off the image 0); on other, the same
on another image's mask, which a layout blind to the image gets too; att, att other, the same
weighted by the attention a point receives; outside, points off the image.
"""
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run
from lab.draw import inspect

TEST_IMAGES = 2000
SIDES = (24, 40, 48, 64)  # px, in the study `sizes`; figures grow with the image


def model(dims=(48, 96), blocks="LD/LD", patch=4, offsets=True, position="relative",
          geometry="paper", **changes) -> dat.DATConfig:
    """By default 8 x 8 and 4 x 4 points, 4 and 8 px apart; `changes` apply to stages with a D."""
    stages = tuple(dat.StageConfig(dim=dim, heads=dim // 12, blocks=letters, window=4, kernel=3,
                                   **({"groups": 2} | changes if "D" in letters else {}))
                   for dim, letters in zip(dims, blocks.split("/")))
    return dat.DATConfig(stages=stages, image_size=32, patch=patch, stem="conv", classes=8,
                         offsets=offsets, position=position, geometry=geometry)


STUDIES = {
    "offsets": {"learned": model(), "none": model(offsets=False), "windows": model(blocks="LS/LS")},
    "range": {f"s={s:g}": model(offset_range=float(s)) for s in (0.5, 1, 2, 4, 8, 100)},
    "groups": {f"G={g}": model(groups=g) for g in (1, 2, 4)},
    "stride": {f"r={r}": model(stride=r) for r in (1, 2, 4)},
    "geometry": {name: model(geometry=name) for name in ("paper", "release")},
    "position": {name: model(position=name) for name in ("relative", "fixed", "none")},
    "sizes": {"32 px": model()},
    "windows": {blocks: model((24, 48, 96, 192), blocks, patch=2)
                for blocks in ("LS/LS/LD/LD", "LS/LD/LD/LD", "LD/LD/LD/LD")}}


@torch.no_grad()
def measure(network: dat.DAT, images: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """The columns that the docstring above lists. Shape: images (n, 3, H, W), masks (n, H, W)."""
    mean_, std = (torch.tensor(values)[:, None, None] for values in dat.mean_and_std("shapes"))
    batches = ((images / 255 - mean_) / std).split(250)
    correct = torch.cat([network(batch).argmax(1) for batch in batches]) == labels
    edge = torch.tensor(masks.shape[1:]) - 0.5  # (y, x) of the last pixel's far edge
    blocks = []  # a row of five numbers for each D block
    for views in zip(*(inspect(network, batch) for batch in batches)):
        points = torch.cat([view.points for view in views]).flatten(1, 3)  # (n, G K, 2)
        weights = torch.cat([view.importance for view in views]).flatten(1)  # (n, G K)
        on = torch.stack([dat.bilinear_sample(mask[:, None].float(), points[:, None]).flatten(1)
                          for mask in (masks, masks.roll(1, 0))])  # (2, n, G K)
        outside = ((points < -0.5) | (points > edge)).any(-1).float().mean()
        blocks.append([*on.mean((1, 2)), *(on * weights).sum((1, 2)) / weights.sum(), outside])
    columns = (torch.tensor(blocks).mean(0) * 100).tolist() if blocks else [float("nan")] * 5
    names = "accuracy", "on", "on other", "att", "att other", "outside"
    return dict(zip(names, [correct.float().mean().item() * 100, *columns]))


def train(config, seed, epochs):
    """A network of `config` after dat.py --train shapes."""
    dat.VARIANTS["study"], network = config, dat.DAT(config).eval()
    with tempfile.TemporaryDirectory() as out:
        with contextlib.redirect_stdout(io.StringIO()):  # it names a folder that does not stay
            code = dat.main(["--train", "shapes", "--model", "study", "--device", "cpu", "--dtype",
                             "float32", "--seed", str(seed), "--epochs", str(epochs),
                             "--out", out])
        if code:  # dat.py has said why
            sys.exit(code)
        network.load_state_dict(dat.load_checkpoint(f"{out}/last.pt")["model"])
    return network


def main(parser):
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--epochs", type=dat.whole_number, default=3)
    parser.add_argument("--seeds", type=dat.whole_number, default=3, help="how many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test, table = dat.make_shapes(TEST_IMAGES, seed=0), {}  # as the test set of `shapes`
    for seed in range(args.seeds):
        for label, config in STUDIES[args.study].items():
            start = time.monotonic()
            network = train(config, seed, args.epochs)
            row = measure(network, *test)
            table.setdefault(label, []).append(row)
            print(f"seed {seed}, {label}: accuracy {row['accuracy']:.1f}% after "
                  f"{time.monotonic() - start:.0f} s", flush=True)
            if (args.study, label) == ("offsets", "learned"):  # back to the uniform grid
                for module in network.modules():
                    if isinstance(module, dat.DeformableAttention):
                        module.offset = None
                table.setdefault("learned, taken out", []).append(measure(network, *test))
            if args.study == "sizes":
                for side in SIDES:
                    resized = dat.make_shapes(TEST_IMAGES, seed=0, side=side)
                    table.setdefault(f"{side} px", []).append(measure(network, *resized))
    print(f"\n{args.seeds} seeds, {args.epochs} epochs; mean (smallest to largest)\n")
    print(args.study, *table[label][0], sep=" | ")
    for label, rows in table.items():
        columns = zip(*(row.values() for row in rows))
        print(label, *(f"{mean(x):.1f} ({min(x):.1f} to {max(x):.1f})" for x in columns), sep=" | ")


if __name__ == "__main__":
    run(main, __doc__)
