"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python figures/study.py NAME [--epochs N] [--seeds N]         # run from the repository's root
    NAME: offsets (the main question), range (s), groups (G), position, windows

Every run is `python dat.py --train shapes` with one field of the model changed. Rows are kept in
runs/study/rows.jsonl and not computed again; the table is printed at the end. A run uses one
thread, so that two studies run side by side on two cores.
"""
import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dat


def model(dims, blocks, *, offsets=True, position="relative", **changes):
    """A small DAT for 32-pixel images; `changes` apply to the stages with deformable blocks."""
    return dat.DATConfig(
        stages=tuple(dat.StageConfig(dim=dim, heads=dim // 12, blocks=letters, window=4, kernel=3,
                                     **({"groups": 2, **changes} if "D" in letters else {}))
                     for dim, letters in zip(dims, blocks)),
        image_size=32, patch=4, stem="conv", classes=8, offsets=offsets, position=position)


def two(**changes):
    """Two stages of 8 x 8 and 4 x 4 points, 4 and 8 pixels of the image apart."""
    return model((48, 96), ("LD", "LD"), **changes)


ROWS = Path("runs/study/rows.jsonl")            # key: configuration, seed, epochs
STUDIES = {
    "offsets": {"learned": two(), "offsets=False": two(offsets=False)},
    "range": {f"s={s:g}": two(offset_range=float(s)) for s in (0.5, 1, 2, 4, 8, 100)},
    "groups": {f"G={g}": two(groups=g) for g in (1, 2, 4)},
    "position": {name: two(position=name) for name in ("relative", "fixed", "none")},
    "windows": {"/".join(blocks): model((48, 96, 192), blocks) for blocks in
                (("LS", "LS", "LD"), ("LS", "LD", "LD"), ("LD", "LD", "LD"))},
}


@torch.no_grad()
def measure(model, images, labels, masks):
    """Shares in [0, 1]: accuracy, points and attention on the object, used part of the range."""
    right, rows = 0, []
    for batch, target, mask in zip(images.split(250), labels.split(250), masks.split(250)):
        pixels = (batch.float() / 255 - 0.5) / 0.25
        right += int((model(pixels).argmax(1) == target).sum())
        for view, (attention, x, *_) in zip(dat.inspect(model, pixels),
                                           model.deformable_inputs(pixels)):
            points = view.points.flatten(1, 3)                      # (B, G K, 2)
            on = dat.bilinear_sample(mask[:, None].float(), points[:, None]).flatten(1)
            weight = view.importance.flatten(1)
            sides = zip(view.reference.shape[:2], x.shape[1:3])
            bound = torch.tensor([dat.largest_offset(
                n, length, offset_range=attention.offset_range, geometry=attention.geometry)
                for n, length in sides]) * 32 / torch.tensor(x.shape[1:3])
            used = ((view.points - view.reference).abs() / bound).mean()
            rows.append([on.mean(), (on * weight).sum() / weight.sum(), used])
    shares = torch.tensor(rows).mean(0).tolist() if rows else [float("nan")] * 3
    return dict(zip(("accuracy", "points", "attention", "used"), [right / len(labels), *shares]))


def run(config, seed, epochs):
    """Trains `config` on `shapes` and measures it, as it is and with its offsets taken out."""
    key = hashlib.sha256(f"{config} {seed} {epochs}".encode()).hexdigest()[:16]
    dat.VARIANTS["study"] = config
    out, start = ROWS.parent / key, time.monotonic()
    shutil.rmtree(out, ignore_errors=True)                          # an interrupted run's
    code = dat.main(["--train", "shapes", "--model", "study", "--device", "cpu", "--seed",
                     str(seed), "--epochs", str(epochs), "--out", str(out)])
    if code:
        sys.exit(code)
    row = {"key": key, "seconds": time.monotonic() - start,
           "mmac": dat.multiply_accumulates(config) / 1e6}
    model, _ = dat.load_checkpoint(str(out / "last.pt"))
    test = dat.make_shapes(2000, seed=0)                            # the test set of `shapes`
    row |= measure(model.eval(), *test)
    for module in model.modules():                                  # back to the uniform grid
        if isinstance(module, dat.DeformableAttention):
            module.offset = None
    row |= {f"grid_{name}": value for name, value in measure(model, *test).items()}
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.touch()
    table = {}
    for seed in range(args.seeds):
        for label, config in STUDIES[args.study].items():
            key = hashlib.sha256(f"{config} {seed} {args.epochs}".encode()).hexdigest()[:16]
            done = {row["key"]: row for row in map(json.loads, ROWS.read_text().splitlines())}
            table.setdefault(label, []).append(done.get(key) or run(config, seed, args.epochs))
    print(f"\n{args.seeds} seeds, {args.epochs} epochs of 10,000 images, one thread of "
          f"{platform.machine()}, torch {torch.__version__}; %, mean (smallest to largest)\n")
    columns = ("accuracy", "points", "grid_points", "attention", "grid_attention", "grid_accuracy",
               "used")
    print(f"| {args.study} | " + " | ".join(columns) + " | MMAC | s |")
    print("|---" * (len(columns) + 3) + "|")
    for label, rows in table.items():
        values = [[100 * row[column] for row in rows] for column in columns]
        print(f"| {label} | " + " | ".join(f"{mean(v):.1f} ({min(v):.1f} to {max(v):.1f})"
                                           for v in values)
              + f" | {rows[0]['mmac']:.1f} | {mean(row['seconds'] for row in rows):.0f} |")


if __name__ == "__main__":
    main()
