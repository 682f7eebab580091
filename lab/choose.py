"""For choosing settings: dat.py's command line, with images held out of training for the test.

    python lab/choose.py --train shapes --lr 2e-3
    python lab/choose.py --train cifar10 --epochs 6 --lr 1e-3

Settings that are chosen by the test set fit its images, so its accuracy comes out too high. Here
`shapes` is tested on other generated images. CIFAR is trained without its last 5,000 training
images and tested on these. Where dat.py prints "test", read "held out"; to test or to resume such
a run, write lab/choose.py in place of dat.py. Train the settings you chose anew with dat.py.
"""
import sys
from pathlib import Path

from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat

SHAPES_SEED, SHAPES_COUNT = 2, 2000  # dat.py trains with seed 1 and tests with seed 0
CIFAR_COUNT = 5000
load_dataset = dat.load_dataset


def load_held_out(name, root, split):
    """As dat.load_dataset, with held-out images as split "test"."""
    if name == "imagenet":
        raise dat.InputError("choose.py is not for imagenet: val/ of your folder is held out")
    if name == "shapes" and split == "test":
        images, labels, _ = dat.make_shapes(SHAPES_COUNT, seed=SHAPES_SEED)
        return TensorDataset(images, labels), dat.SHAPES
    samples, classes = load_dataset(name, root, "train")
    if name == "shapes":
        return samples, classes
    cut = len(samples) - CIFAR_COUNT
    return TensorDataset(*(samples[:cut] if split == "train" else samples[cut:])), classes


if __name__ == "__main__":
    dat.load_dataset = load_held_out
    sys.exit(dat.main())
