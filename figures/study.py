"""Do the sampling points find the object? Trains small models on `shapes`, whose masks are known.

    python figures/study.py NAME [--epochs N] [--seeds 0 1 2]     # run from the repository's root
    NAME: offsets (the main question), range (s), groups (G), position, windows

Every run is `python dat.py --train shapes` with one field of the model changed; rows are appended
to runs/study/NAME.jsonl, finished ones are not repeated, and the table of means and spreads
(smallest to largest) is printed at the end. A run uses one thread, so two fit on two cores.
"""
import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dat

# 8 x 8 and 4 x 4 sampling points on a 32-pixel image, so that s = 2 allows 4 and 8 px.
BASE = dat.DATConfig(
    stages=tuple(dat.StageConfig(dim=24 * 2 ** i, heads=4 * 2 ** i, blocks=blocks, window=4,
                                 groups=2 if "D" in blocks else None, kernel=(5, 5, 3)[i])
                 for i, blocks in enumerate(("LS", "LD", "LD"))),
    image_size=32, patch=2, stem="conv", classes=8)


def with_stages(blocks=("LS", "LD", "LD"), **changes):
    """BASE with other blocks, and `changes` in every stage that has a deformable one."""
    return replace(BASE, stages=tuple(
        replace(stage, blocks=letters, **{"groups": 2, **changes} if "D" in letters
                else {"groups": None})
        for stage, letters in zip(BASE.stages, blocks)))


STUDIES = {
    "offsets": {"learned": BASE, "offsets=False": replace(BASE, offsets=False)},
    "range": {f"s={s:g}": with_stages(offset_range=float(s)) for s in (0.5, 1, 2, 4, 8, 100)},
    "groups": {f"G={g}": with_stages(groups=g) for g in (1, 2, 4)},
    "position": {p: replace(BASE, position=p) for p in ("relative", "fixed", "none")},
    "windows": {"/".join(b): with_stages(blocks=b) for b in
                (("LS", "LD", "LD"), ("LD", "LD", "LD"), ("LD", "LD", "LS"), ("LS", "LS", "LS"))},
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


def run(study, label, config, seed, epochs):
    dat.VARIANTS["study"] = config
    out = Path("runs/study") / f"{study}-{label.replace('/', '-')}-{seed}"
    start = time.monotonic()
    if not (out / "last.pt").exists():
        code = dat.main(["--train", "shapes", "--model", "study", "--device", "cpu", "--seed",
                         str(seed), "--epochs", str(epochs), "--out", str(out)])
        assert code == 0, f"exit code {code}"
    row = {"label": label, "seed": seed, "epochs": epochs, "seconds": time.monotonic() - start,
           "mmac": dat.multiply_accumulates(config) / 1e6}
    model, _ = dat.load_checkpoint(str(out / "last.pt"))
    images, labels, masks = dat.make_shapes(2000, seed=0)           # the test set of `shapes`
    row |= measure(model.eval(), images, labels, masks)
    for module in model.modules():                                  # the undeformed grid
        if isinstance(module, dat.DeformableAttention):
            module.offset = None
    row |= {f"grid_{k}": v for k, v in measure(model, images, labels, masks).items()}
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = Path("runs/study") / f"{args.study}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in args.seeds:
        for label, config in STUDIES[args.study].items():
            if not any((r["label"], r["seed"], r["epochs"]) == (label, seed, args.epochs)
                       for r in rows):
                rows.append(run(args.study, label, config, seed, args.epochs))
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(f"\n{len(args.seeds)} seeds, {args.epochs} epochs of 10,000 images, one thread, "
          f"{platform.processor() or platform.machine()}, torch {torch.__version__}; mean "
          "(smallest-largest), %\n")
    columns = ("accuracy", "points", "grid_points", "attention", "grid_attention", "grid_accuracy",
               "used")
    print(f"| {args.study} | " + " | ".join(columns) + " | MMAC | s |")
    print("|---" * (len(columns) + 3) + "|")
    for label in STUDIES[args.study]:
        mine = [r for r in rows if r["label"] == label and r["epochs"] == args.epochs]
        cells = [f"{100 * mean(r[c] for r in mine):.1f} ({100 * min(r[c] for r in mine):.1f}-"
                 f"{100 * max(r[c] for r in mine):.1f})" for c in columns]
        print(f"| {label} | " + " | ".join(cells)
              + f" | {mine[0]['mmac']:.1f} | {mean(r['seconds'] for r in mine):.0f} |")


if __name__ == "__main__":
    main()
