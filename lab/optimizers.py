"""Muon beside AdamW: dat.py trains with each, and the rest of the recipe is the same.

    python lab/optimizers.py shapes --seeds 3 --out optimizers.png
    python lab/optimizers.py cifar10 --data DIR --epochs 5

Prints the accuracy on test images after each epoch, and the seconds of training, and draws both.
"""
import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

recipe_for = dat.recipe_for


def curve(optimizer, data, root, epochs, seed):
    """A run of dat.py. Returns the seconds of training and the accuracy in %, after each epoch."""
    dat.recipe_for = lambda *args, **options: replace(
        recipe_for(*args, **options), optimizer=optimizer)
    with tempfile.TemporaryDirectory() as out:
        flags = ["--train", data, "--data", root, "--seed", str(seed), "--out", out]
        code = dat.main(flags + (["--epochs", str(epochs)] if epochs else []))
        dat.recipe_for = recipe_for
        if code:  # dat.py has said why
            sys.exit(code)
        rows = list(csv.DictReader(Path(out, "metrics.csv").open()))
    seconds = [sum(float(row["seconds"]) for row in rows[:i + 1]) for i in range(len(rows))]
    return seconds, [100 * float(row["top1"]) for row in rows]


def main(parser):
    parser.add_argument("train", choices=("shapes", "cifar10", "cifar100"))
    parser.add_argument("--data", default="data", help="folder of CIFAR")
    parser.add_argument("--epochs", type=dat.whole_number, help="default: the recipe's")
    parser.add_argument("--seeds", type=dat.whole_number, default=1, help="how many; default: 1")
    parser.add_argument("--out", default="optimizers.png", help="the picture")
    args = parser.parse_args()
    from matplotlib import pyplot
    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for colour, optimizer in (("0.5", "adamw"), ("tab:red", "muon")):
        for seed in range(args.seeds):
            seconds, accuracy = curve(optimizer, args.train, args.data, args.epochs, seed)
            print(f"{optimizer}, seed {seed}:", *(f"{a:.2f}% after {s:.0f} s" for s, a in
                                                  zip(seconds, accuracy)), sep="  ", flush=True)
            axis.plot(seconds, accuracy, "o-", color=colour, ms=4,
                      label=optimizer if seed == 0 else None)
    axis.set(xlabel="seconds of training", ylabel="accuracy on test images, %", title=args.train)
    axis.legend()
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    run(main, __doc__)
