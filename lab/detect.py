"""DAT under a detector: trains torchvision's FCOS on generated scenes and reports AP50.

    python lab/detect.py --epochs 10

A scene has up to four figures of `shapes` on clutter, 96 x 128 px. New ones are made for each
epoch. AP50 is the area under precision over recall at an overlap (IoU) of 0.5, the mean of the
classes. --no-offsets keeps the points on their grid; --windows has windows in place of D blocks.
The picture shows true boxes (white), found boxes, and where the last deformable block looks.
"""
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import Parser, count, run

CONFIG = dat.DATConfig(image_size=(96, 128), drop_path=0.1, stages=(
    dat.StageConfig(dim=48, heads=3, blocks="LS", window=4),
    dat.StageConfig(dim=96, heads=6, blocks="LDLD", window=4, groups=3),
    dat.StageConfig(dim=192, heads=12, blocks="LD", window=4, groups=6, kernel=3)))
COLOURS = "#0072b2 #e69f00 #009e73 #cc3311 #8e5ea2 #7a4a2b".split()


class Backbone(nn.Module):
    """The maps of all stages but the first in a feature pyramid, for torchvision's detectors."""
    def __init__(self, model, channels=64):
        super().__init__()
        dims = [stage.dim for stage in model.config.stages[1:]]
        self.model, self.out_channels = model, channels
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for dim in dims)
        self.pyramid = FeaturePyramidNetwork(dims, channels)

    def forward(self, images):
        maps = zip(self.norms, self.model.features(images)[1:])
        return self.pyramid({str(i): norm(x) for i, (norm, x) in enumerate(maps)})


def make_detector(config):
    """Images of 8 and 16 px a pixel find figures of up to 24 px, and larger ones."""
    return FCOS(Backbone(dat.DAT(config)), num_classes=len(dat.SHAPES), min_size=96, max_size=1000,
                image_mean=[0.5] * 3, image_std=[0.25] * 3, score_thresh=0.05,
                anchor_generator=AnchorGenerator(((3,), (6,)), ((1.0,),) * 2))


def make_scenes(count, seed, H=96, W=128):
    """[image (3, H, W) from 0 to 1], [boxes (n, 4), x1 y1 x2 y2 in px, and labels (n,)]."""
    rng = torch.Generator().manual_seed(seed)
    images = F.interpolate(0.5 * torch.rand(count, 3, 6, 8, generator=rng), (H, W), mode="bilinear")
    kinds = {side: dat.make_shapes(count, seed=seed + side, side=side) for side in (64, 48, 36, 28)}
    targets = []
    for i, image in enumerate(images):
        for _ in range(20):  # clutter: small boxes
            y, x, height, width = (int(n * torch.rand((), generator=rng)) for n in (H, W, 9, 9))
            image[:, y:y + height, x:x + width] = 0.6 * torch.rand(3, 1, 1, generator=rng)
        boxes, labels = torch.zeros(0, 4), []
        for side, (figures, label, masks) in kinds.items():
            y, x = (int((n - side) * torch.rand((), generator=rng)) for n in (H, W))
            rows, columns = masks[i].nonzero().T
            box = torch.stack([x + columns.min(), y + rows.min(),
                               x + columns.max() + 1, y + rows.max() + 1])[None].float()
            if not len(boxes) or box_iou(box, boxes).max() < 0.05:  # else it would hide another
                image[:, y + rows, x + columns] = figures[i][:, rows, columns] / 255
                boxes, labels = torch.cat([boxes, box]), [*labels, label[i]]
        targets.append({"boxes": boxes, "labels": torch.stack(labels)})
    return list(images), targets


def average_precision(found, targets):
    """AP50 of found boxes, sorted by score, in the scenes of `targets`."""
    areas = []
    for kind in range(len(dat.SHAPES)):
        hits, total = [], 0
        for f, target in zip(found, targets):
            boxes = target["boxes"][target["labels"] == kind]
            overlap = box_iou(f["boxes"][f["labels"] == kind], boxes)
            total += len(boxes)
            for score, row in zip(f["scores"][f["labels"] == kind].tolist(), overlap):
                hit = len(row) > 0 and row.max().item() >= 0.5
                if hit:
                    overlap[:, row.argmax()] = 0  # a figure is found once
                hits.append((score, hit))
        right = torch.tensor([hit for _, hit in sorted(hits, reverse=True)]).cumsum(0)
        precision = right / torch.arange(1, len(right) + 1)
        best = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
        areas.append((best * right.diff(prepend=torch.zeros(1)) / max(total, 1)).sum().item())
    return sum(areas) / len(areas)
