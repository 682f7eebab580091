"""Own classes: a model trained on five classes of CIFAR-10 goes on to the other five.

    python lab/transfer.py --data DIR --images 200 --seeds 3
    python lab/transfer.py --data DIR --images 200 --seeds 3 --scratch

Each seed draws --images of the other classes, into a folder. It trains on them with `dat.py --train
imagenet --checkpoint`, or with --scratch from new weights by the same recipe, and tests on 1,000
test images, or with --choose on 1,000 of the last 5,000 training images. Flags of dat.py that
change the recipe may follow after `--`. --pretrained is made if it is not there.
"""
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

FIRST_CLASSES, TEST_COUNT, HELD_OUT = 5, 1000, 5000
load_dataset, recipe_for = dat.load_dataset, dat.recipe_for


def load_first_classes(name, root, split):
    """As dat.load_dataset, with the images of the first five classes alone."""
    samples, classes = load_dataset(name, root, split)
    images, labels = samples.tensors
    chosen = labels < FIRST_CLASSES
    return TensorDataset(images[chosen], labels[chosen]), classes[:FIRST_CLASSES]


def call(*flags):
    """dat.py with these flags. Ends the program if it fails; dat.py has said why."""
    code = dat.main([str(flag) for flag in flags])
    if code:
        sys.exit(code)


def pretrain(root, path):
    """last.pt of a model for the first five classes, by dat.py's recipe for CIFAR-10."""
    dat.load_dataset = load_first_classes
    call("--train", "cifar10", "--data", root, "--out", path.parent)
    dat.load_dataset = load_dataset


def write_images(images, labels, classes, count, seed, folder):
    """`count` images, as many of each of the other classes, as folder/<class>/<index>.png."""
    from PIL import Image
    rng, names = torch.Generator().manual_seed(seed), classes[FIRST_CLASSES:]
    for label, name in enumerate(names, start=FIRST_CLASSES):
        Path(folder, name).mkdir(parents=True)
        indices = (labels == label).nonzero().flatten()
        shuffled = indices[torch.randperm(len(indices), generator=rng)]
        for i in shuffled[:count // len(names)].tolist():
            Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(Path(folder, name, f"{i}.png"))


def write_folder(root, folder, count, seed, choose):
    """train/ with `count` images that the seed draws, and val/ with always the same."""
    samples, classes = load_dataset("cifar10", root, "train")
    images, labels = samples.tensors
    write_images(images[:-HELD_OUT], labels[:-HELD_OUT], classes, count, seed, f"{folder}/train")
    if choose:
        images, labels = images[-HELD_OUT:], labels[-HELD_OUT:]
    else:
        images, labels = load_dataset("cifar10", root, "test")[0].tensors
    write_images(images, labels, classes, TEST_COUNT, 0, f"{folder}/val")


def main(parser):
    add = parser.add_argument
    add("--data", default="data", help="folder of CIFAR")
    add("--images", type=dat.whole_number, default=200, help="to train on; default: 200")
    add("--seeds", type=dat.whole_number, default=3, help="how many; default: 3")
    add("--pretrained", type=Path, default=Path("runs/first-five/last.pt"))
    add("--scratch", action="store_true", help="from new weights")
    add("--choose", action="store_true", help="test on held-out training images")
    add("flags", nargs="*", help="of dat.py")
    args = parser.parse_args()
    if not args.pretrained.exists():
        pretrain(args.data, args.pretrained)
    start = ["--checkpoint", args.pretrained]
    if args.scratch:  # the recipe of a new head
        dat.recipe_for = lambda *given, **options: recipe_for(
            *given, **options | {"new_head": True})
        start = ["--model", "cifar-nano"]
    results = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            write_folder(args.data, folder, args.images, seed, args.choose)
            call("--train", "imagenet", "--data", folder, "--out", f"{folder}/run", "--seed", seed,
                 *start, *args.flags)
            history = dat.load_checkpoint(f"{folder}/run/last.pt")["history"]
            results.append(100 * history[-1]["top1"])
    print(f"{args.images} images, {args.seeds} seeds: {mean(results):.1f}% "
          f"({min(results):.1f} to {max(results):.1f})")


if __name__ == "__main__":
    run(main, __doc__)
