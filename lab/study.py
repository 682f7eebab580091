"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python lab/study.py offsets --epochs 3 --seeds 3

A study changes one field of the model: offsets (the main question), range (s), groups (G),
position, windows. A run is `dat.py --train shapes` on one thread, kept in runs/study until dat.py
or the configuration changes. The table holds means over the D blocks, in % but for px: on, points
on the object (the mask's value; off the image 0); on other, the same on another image's mask, what
a layout blind to the image gets; att, att other: weighted by the attention a point receives;
outside, points off the image; used, an offset along an axis of the largest allowed; own, of the
mean square offset, what differs between images; px, mean length of an offset in px of the image.
"""
import hashlib
import shutil
import sys
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import Parser, count, run
from lab.cost import stage_macs
from lab.draw import inspect


def model(dims=(48, 96), blocks="LD/LD", patch=4, offsets=True, position="relative",
          **changes) -> dat.DATConfig:
    """By default 8 x 8 and 4 x 4 points, 4 and 8 px apart; `changes` apply to stages with a D."""
    stages = tuple(dat.StageConfig(dim=dim, heads=dim // 12, blocks=letters, window=4, kernel=3,
                                   **({"groups": 2} | changes if "D" in letters else {}))
                   for dim, letters in zip(dims, blocks.split("/")))
    return dat.DATConfig(stages=stages, image_size=32, patch=patch, stem="conv", classes=8,
                         offsets=offsets, position=position)


STUDIES = {
    "offsets": {"learned": model(), "none": model(offsets=False), "windows": model(blocks="LS/LS")},
    "range": {f"s={s:g}": model(offset_range=float(s)) for s in (0.5, 1, 2, 4, 8, 100)},
    "groups": {f"G={g}": model(groups=g) for g in (1, 2, 4)},
    "position": {name: model(position=name) for name in ("relative", "fixed", "none")},
    "windows": {blocks: model((24, 48, 96, 192), blocks, patch=2)
                for blocks in ("LS/LS/LD/LD", "LS/LD/LD/LD", "LD/LD/LD/LD")}}


def deformable(network: dat.DAT) -> list[dat.DeformableAttention]:
    return [m for m in network.modules() if isinstance(m, dat.DeformableAttention)]


@torch.no_grad()
def measure(network: dat.DAT, images: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """The columns that the docstring above lists."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (dat.MEAN, dat.STD))
    parts, rows = ((images / 255 - mean) / std).split(250), []
    right = torch.cat([network(x).argmax(1) for x in parts]) == labels
    for attention, views in zip(deformable(network), zip(*(inspect(network, x) for x in parts))):
        points = torch.cat([view.points for view in views])  # (n, G, Hk, Wk, 2)
        weights = torch.cat([view.importance for view in views]).flatten(1)  # (n, G K)
        offset, bound = points - views[0].reference, attention.offset_range * 16 / points.shape[2]
        on = torch.stack([dat.bilinear_sample(mask[:, None].float(), points.flatten(1, 3)[:, None])
                          .flatten(1) for mask in (masks, masks.roll(1, 0))])  # (2, n, G K)
        own, square = (x.square().sum(-1).mean() for x in (offset - offset.mean(0), offset))
        rows.append(torch.stack([
            *on.mean((1, 2)), *(on * weights).sum((1, 2)) / weights.sum(),
            ((points < -0.5) | (points > 31.5)).any(-1).float().mean(),
            (offset / bound).abs().mean(), own / square.clamp(min=1e-12),
            offset.norm(dim=-1).mean() / 100]) * 100)
    found = torch.stack(rows).mean(0).tolist() if rows else [float("nan")] * 8
    names = "accuracy", "on", "on other", "att", "att other", "outside", "used", "own", "px"
    return dict(zip(names, [right.float().mean().item() * 100, *found]))


def trained(config: dat.DATConfig, seed: int, epochs: int) -> tuple[dat.DAT, float]:
    """The model of `config`, from disk or a run, and the seconds it took."""
    key = hashlib.sha256(Path(dat.__file__).read_bytes() + f"{config} {seed} {epochs}".encode())
    out = Path("runs/study", key.hexdigest()[:16])
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run's
        dat.VARIANTS["study"] = config
        if code := dat.main(f"--train shapes --model study --device cpu --float32 --seed {seed} "
                            f"--epochs {epochs} --out {out}".split()):
            sys.exit(code)
        (out / "done").touch()
    found, network = dat.load_checkpoint(out / "last.pt"), dat.DAT(config).eval()
    network.load_state_dict(found["model"])
    return network, sum(row[-1] for row in found["history"])


def main(parser: Parser) -> None:
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--epochs", type=count, default=3)
    parser.add_argument("--seeds", type=count, default=3, help="how many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test, table = dat.make_shapes(2000, seed=0), {}  # the test set of `shapes`
    for seed in range(args.seeds):
        for label, config in STUDIES[args.study].items():
            network, seconds = trained(config, seed, args.epochs)
            cost = {"MMAC": sum(stage_macs(config, 32)) / 1e6, "s": seconds}
            table.setdefault(label, []).append(measure(network, *test) | cost)
            if (args.study, label) == ("offsets", "learned"):  # back to the uniform grid
                for attention in deformable(network):
                    attention.offset = None
                table.setdefault("learned, taken out", []).append(measure(network, *test) | cost)
    print(f"\n{args.seeds} seeds, {args.epochs} epochs of 10,000 images, 2,000 test images, one "
          f"thread, torch {torch.__version__}; mean (smallest to largest)\n")
    names = [*table[label][0]]
    print("|".join(["", args.study, *names, ""]) + "\n" + "|---" * (len(names) + 1) + "|")
    for label, rows in table.items():
        columns = [[row[name] for row in rows] for name in names]
        cells = (f"{mean(x):.1f}" + f" ({min(x):.1f} to {max(x):.1f})" * (min(x) < max(x))
                 for x in columns)
        print("|".join(["", label, *cells, ""]))


if __name__ == "__main__":
    run(main, __doc__)
