"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python figures/study.py NAME [--epochs N] [--seeds N]         # run from the repository's root
    NAME: offsets (the main question), range (s), groups (G), position, windows

Every run is `python dat.py --train shapes` with one field of the model changed, kept below
runs/study and not trained again unless dat.py or the configuration changed. The table is printed
at the end. A run uses one thread, so that two studies run side by side on two cores.
"""
import argparse
import hashlib
import shutil
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dat

FOLDER = Path("runs/study")


def model(dims, blocks, *, patch=4, offsets=True, position="relative", **changes):
    """A small DAT for 32-pixel images; `changes` apply to the stages with deformable blocks."""
    return dat.DATConfig(
        stages=tuple(dat.StageConfig(dim=dim, heads=dim // 12, blocks=letters, window=4, kernel=3,
                                     **({"groups": 2, **changes} if "D" in letters else {}))
                     for dim, letters in zip(dims, blocks)),
        image_size=32, patch=patch, stem="conv", classes=8, offsets=offsets, position=position)


def two(blocks=("LD", "LD"), **changes):
    """Two stages of 8 x 8 and 4 x 4 points, 4 and 8 pixels of the image apart."""
    return model((48, 96), blocks, **changes)


STUDIES = {
    "offsets": {"learned": two(), "offsets=False": two(offsets=False),
                "windows only": two(("LS", "LS"))},
    "range": {f"s={s:g}": two(offset_range=float(s)) for s in (0.5, 1, 2, 4, 8, 100)},
    "groups": {f"G={g}": two(groups=g) for g in (1, 2, 4)},
    "position": {name: two(position=name) for name in ("relative", "fixed", "none")},
    "windows": {"/".join(blocks): model((24, 48, 96, 192), blocks, patch=2) for blocks in
                (("LS", "LS", "LD", "LD"), ("LS", "LD", "LD", "LD"), ("LD", "LD", "LD", "LD"))},
}
COLUMNS = {                                     # all but the last two in %, means over the blocks
    "accuracy": "test images classified right",
    "on": "the mask's value at the points: the share of them on the object",
    "on other": "the same on the mask of another image: what a layout blind to the image gets",
    "att": "attention on the object: the mask's value at a key, weighted by what the key receives",
    "att other": "the same on the mask of another image",
    "outside": "points off the image, where the mask counts 0",
    "used": "offset along an axis as a share of the largest allowed",
    "own": "of the mean square offset, what is not the same for all images",
    "px": "mean length of an offset in pixels of the image"}


@torch.no_grad()
def measure(model, images, labels, masks):
    """The COLUMNS of a model, as shares of 1 (px in pixels)."""
    right, batches = 0, []
    for batch, target in zip(images.split(250), labels.split(250)):
        pixels = (batch.float() / 255 - 0.5) / 0.25
        right += int((model(pixels).argmax(1) == target).sum())
        batches.append(dat.inspect(model, pixels))
    attentions = [m for m in model.modules() if isinstance(m, dat.DeformableAttention)]
    rows = []
    for attention, views in zip(attentions, zip(*batches)):
        points = torch.cat([view.points for view in views])                 # (n, G, Hk, Wk, 2)
        weights = torch.cat([view.importance for view in views]).flatten(1)
        offset = points - views[0].reference
        bound = attention.offset_range / 2 * 32 / points.shape[2]           # s / 2 cells, r = 1
        square = offset.square().sum(-1).mean()
        own = 1 - offset.mean(0).square().sum(-1).mean() / square if square > 0 else square
        row = []
        for mask in (masks, masks.roll(1, 0)):
            on = dat.bilinear_sample(mask[:, None].float(), points.flatten(1, 3)[:, None])
            on = on.flatten(1)                                              # (n, G K)
            row += [on.mean(), (on * weights).sum() / weights.sum()]
        outside = ((points < -0.5) | (points > 31.5)).any(-1).float().mean()
        used = (offset.abs() / bound).mean()
        px = offset.norm(dim=-1).mean()
        rows.append([row[0], row[2], row[1], row[3], outside, used, own, px])
    shares = torch.tensor(rows).mean(0).tolist() if rows else [float("nan")] * 8
    return dict(zip(COLUMNS, [right / len(labels), *shares]))


def trained(config, seed, epochs):
    """The checkpoint of `config`, from disk or a run. Returns the model and seconds it took."""
    source = Path(dat.__file__).read_bytes()
    key = hashlib.sha256(source + f"{config} {seed} {epochs}".encode()).hexdigest()[:16]
    out = FOLDER / key
    if not (out / "done").exists():
        dat.VARIANTS["study"] = config
        shutil.rmtree(out, ignore_errors=True)                  # an interrupted run's
        code = dat.main(["--train", "shapes", "--model", "study", "--device", "cpu", "--float32",
                         "--seed", str(seed), "--epochs", str(epochs), "--out", str(out)])
        if code:
            sys.exit(code)
        (out / "done").touch()
    model, checkpoint = dat.load_checkpoint(str(out / "last.pt"))
    return model.eval(), checkpoint["history"][-1][-1]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    test, table = dat.make_shapes(2000, seed=0), {}             # the test set of `shapes`
    for seed in range(args.seeds):
        for label, config in STUDIES[args.study].items():
            model, seconds = trained(config, seed, args.epochs)
            cost = {"MMAC": dat.multiply_accumulates(config) / 1e6, "s": seconds}
            table.setdefault(label, []).append(measure(model, *test) | cost)
            if (args.study, label) == ("offsets", "learned"):   # back to the uniform grid
                for module in model.modules():
                    if isinstance(module, dat.DeformableAttention):
                        module.offset = None
                table.setdefault("learned, taken out", []).append(measure(model, *test) | cost)
    print(f"\n{args.seeds} seeds, {args.epochs} epochs of 10,000 images, 2,000 test images, one "
          f"thread, torch {torch.__version__}\n")
    print("\n".join(f"{name}: {text}" for name, text in COLUMNS.items()), end="\n\n")
    names = [*COLUMNS, "MMAC", "s"]
    print("|".join(["", args.study, *names, ""]) + "\n" + "|---" * (len(names) + 1) + "|")
    for label, rows in table.items():
        cells = []
        for name in names:
            values = [row[name] * (1 if name in ("px", "MMAC", "s") else 100) for row in rows]
            spread = f" ({min(values):.1f} to {max(values):.1f})" * (min(values) < max(values))
            cells.append(f"{mean(values):.1f}{spread}")
        print("|".join(["", label, *cells, ""]))


if __name__ == "__main__":
    main()
