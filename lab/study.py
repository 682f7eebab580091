"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python lab/study.py offsets --epochs 3 --seeds 3

A study changes one field of the model: offsets (the main question), range (s), groups (G),
position, windows. A run is `dat.py --train shapes` on one thread, kept below runs/study and trained
again only if dat.py or the configuration changed. The table holds means over the D blocks, in %:
on        points on the object (the mask's value at a point; off the image 0)
on other  the same on the mask of another image: what a layout blind to the image gets
att       as on, each point weighted by the attention it receives; att other: as on other
outside   points off the image
used      offset along an axis, of the largest allowed
own       of the mean square offset, what is not the same for all images
px        mean length of an offset, in pixels of the image
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


@torch.no_grad()
def measure(network: dat.DAT, images: Tensor, labels: Tensor, masks: Tensor) -> dict[str, float]:
    """The columns that the docstring above lists, as shares of 1, but px."""
    parts = ((images / 255 - 0.5) / 0.25).split(250)
    found = [(torch.cat([network(x).argmax(1) for x in parts]) == labels).float().mean().item()]
    attentions, rows = [m for m in network.modules() if isinstance(m, dat.DeformableAttention)], []
    for attention, views in zip(attentions, zip(*(inspect(network, x) for x in parts))):
        points = torch.cat([view.points for view in views])  # (n, G, Hk, Wk, 2)
        weights = torch.cat([view.importance for view in views]).flatten(1)  # (n, G K)
        offset, bound = points - views[0].reference, attention.offset_range * 16 / points.shape[2]
        on, other = (dat.bilinear_sample(mask[:, None].float(), points.flatten(1, 3)[:, None])
                     .flatten(1) for mask in (masks, masks.roll(1, 0)))
        square = [x.square().sum(-1).mean() for x in (offset - offset.mean(0), offset)]
        rows.append([on.mean(), other.mean(), *((x * weights).sum() / weights.sum() for x in (on, other)),
                     ((points < -0.5) | (points > 31.5)).any(-1).float().mean(),
                     (offset / bound).abs().mean(), square[0] / square[1].clamp(min=1e-12),
                     offset.norm(dim=-1).mean()])
    found += torch.tensor(rows).mean(0).tolist() if rows else [float("nan")] * 8
    names = "accuracy", "on", "on other", "att", "att other", "outside", "used", "own", "px"
    return dict(zip(names, found))


def trained(config: dat.DATConfig, seed: int, epochs: int) -> tuple[dat.DAT, float]:
    """The model of `config`, from disk or a run, and the seconds it took."""
    key = hashlib.sha256(Path(dat.__file__).read_bytes() + f"{config} {seed} {epochs}".encode())
    out = Path("runs/study", key.hexdigest()[:16])
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)  # an interrupted run's
        dat.VARIANTS["study"] = config
        if code := dat.main([*"--train shapes --model study --device cpu --float32".split(), "--out",
                             str(out), f"--seed={seed}", f"--epochs={epochs}"]):
            sys.exit(code)
        (out / "done").touch()
    found, network = dat.load_checkpoint(out / "last.pt"), dat.DAT(config).eval()
    network.load_state_dict(found["model"])
    return network, found["history"][-1][-1]


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
                for module in network.modules():
                    if isinstance(module, dat.DeformableAttention):
                        module.offset = None
                table.setdefault("learned, taken out", []).append(measure(network, *test) | cost)
    print(f"\n{args.seeds} seeds, {args.epochs} epochs of 10,000 images, 2,000 test images, one "
          f"thread, torch {torch.__version__}; mean (smallest to largest)\n")
    names = [*next(iter(table.values()))[0]]
    print("|".join(["", args.study, *names, ""]) + "\n" + "|---" * (len(names) + 1) + "|")
    for label, rows in table.items():
        cells = []
        for name in names:
            values = [row[name] * (1 if name in ("px", "MMAC", "s") else 100) for row in rows]
            spread = f" ({min(values):.1f} to {max(values):.1f})" * (min(values) < max(values))
            cells.append(f"{mean(values):.1f}{spread}")
        print("|".join(["", label, *cells, ""]))


if __name__ == "__main__":
    run(main, __doc__)
