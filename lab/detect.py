"""DAT under a detector: trains torchvision's FCOS on generated scenes and reports AP50.

    python lab/detect.py --epochs 10

A scene has up to four figures of `shapes` on clutter, 96 x 128 px; each epoch has new ones. AP50
is the area under precision over recall at an overlap (IoU) of 0.5, the mean of the classes.
detections.png shows true boxes (white), found ones, and where the last deformable block looks.
"""
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
from torchvision.utils import draw_bounding_boxes, draw_keypoints, make_grid, save_image

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import add_device, run

CONFIG = dat.DATConfig(image_size=(96, 128), drop_path=0.1, stages=(
    dat.StageConfig(dim=48, heads=3, blocks="LS", window=4),
    dat.StageConfig(dim=96, heads=6, blocks="LDLD", window=4, groups=3),
    dat.StageConfig(dim=192, heads=12, blocks="LD", window=4, groups=6, kernel=3)))
SCENES, TEST_SCENES, BATCH = 1024, 256, 16  # an epoch, to test on, a step
COLOURS = "#0072b2 #e69f00 #009e73 #cc3311 #8e5ea2 #00e0ff".split()  # of the groups


class Backbone(nn.Module):
    """The maps of all stages but the first in a feature pyramid, for torchvision's detectors."""
    def __init__(self, model, channels=64):
        super().__init__()
        dims = [stage.dim for stage in model.config.stages[1:]]
        model.norm = model.head = nn.Identity()  # unused: DDP wants a gradient for each parameter
        self.model, self.out_channels = model, channels
        self.norms = nn.ModuleList(nn.GroupNorm(1, dim) for dim in dims)
        self.pyramid = FeaturePyramidNetwork(dims, channels)

    def forward(self, images):
        maps = zip(self.norms, self.model.features(images)[1:])
        return self.pyramid({str(i): norm(x) for i, (norm, x) in enumerate(maps)})


def make_detector(config):
    return FCOS(Backbone(dat.DAT(config)), num_classes=len(dat.SHAPES), min_size=96, max_size=1000,
                image_mean=[0.5] * 3, image_std=[0.25] * 3, score_thresh=0.05,
                anchor_generator=AnchorGenerator(((3,), (6,)), ((1.0,),) * 2))  # to 24 px, beyond


def make_scenes(number, seed, H=96, W=128):
    """Images (3, H, W) from 0 to 1; targets: boxes (n, 4) as x1 y1 x2 y2 in px, labels (n,)."""
    rng, targets = torch.Generator().manual_seed(seed), []
    blotches = 0.5 * torch.rand(number, 3, 6, 8, generator=rng)
    images = F.interpolate(blotches, (H, W), mode="bilinear")
    kinds = {side: dat.make_shapes(number, seed=seed + side, side=side)
             for side in (64, 48, 36, 28)}
    for i, image in enumerate(images):
        clutter = torch.rand(20, 4, generator=rng) * torch.tensor([H, W, 9, 9])
        for y, x, height, width in clutter.int().tolist():
            image[:, y:y + height, x:x + width] = 0.6 * torch.rand(3, 1, 1, generator=rng)
        boxes, labels = torch.zeros(0, 4), []
        for side, (figures, label, masks) in kinds.items():
            y, x = (int((n - side) * torch.rand((), generator=rng)) for n in (H, W))
            rows, columns = masks[i].nonzero().T + torch.tensor([[y], [x]])
            box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
            if not len(boxes) or box_iou(box, boxes).max() < 0.05:  # else it would hide another
                image[:, rows, columns] = figures[i][:, rows - y, columns - x] / 255
                boxes, labels = torch.cat([boxes, box]), [*labels, label[i]]
        targets.append({"boxes": boxes, "labels": torch.stack(labels)})
    return list(images), targets


def average_precision(found, targets):
    """AP50 of found boxes, which are sorted by score, in the scenes of `targets`."""
    areas = []
    for kind in range(len(dat.SHAPES)):
        hits, total = [], 0
        for f, target in zip(found, targets):
            mine, boxes = f["labels"] == kind, target["boxes"][target["labels"] == kind]
            overlap, total = box_iou(f["boxes"][mine], boxes), total + len(boxes)
            for i, score in enumerate(f["scores"][mine].tolist()):
                hit = len(boxes) > 0 and overlap[i].max().item() >= 0.5
                hits.append((score, hit))
                if hit:
                    overlap[:, overlap[i].argmax()] = 0  # a figure is found once
        right = torch.tensor([0, *(hit for _, hit in sorted(hits, reverse=True))]).cumsum(0)
        precision = (right / torch.arange(len(right)).clamp(min=1)).flip(0).cummax(0).values.flip(0)
        areas.append((precision[1:] * right.diff()).sum().item() / max(total, 1))
    return sum(areas) / len(areas)


def draw(scenes, targets, found, points):
    """Six scenes with boxes, (3, H, W) uint8; `points`: a list of (1, G, Hk, Wk, 2), or none."""
    pictures = []
    for image, target, f in zip(scenes[:6], targets, found):
        picture = F.interpolate((image * 255).byte()[None], scale_factor=4)[0]
        for boxes, colour in (target["boxes"], "white"), (f["boxes"][f["scores"] > 0.3], "yellow"):
            if len(boxes):
                picture = draw_bounding_boxes(picture, boxes * 4, colors=colour, width=3)
        pictures.append(picture)
    for group, colour in zip(points[-1][0] if points else (), COLOURS):
        places = group.flatten(0, 1).flip(1) * 4 + 2  # x, y in px of the picture
        pictures[0] = draw_keypoints(pictures[0], places[None], colors=colour, radius=5)
    return make_grid(pictures, nrow=3)


def main(parser):
    add = parser.add_argument
    add("--epochs", type=dat.whole_number, default=20, help=f"of {SCENES:,} scenes; default: 20")
    add("--no-offsets", action="store_true", help="points stay on their grid")
    add("--windows", action="store_true", help="S blocks in place of D blocks")
    add("--seed", type=int, default=0)
    add_device(parser)
    args = parser.parse_args()
    device = dat.device_for(args.device)
    half = dat.dtype_for("auto", device) == "bfloat16"  # float16 would need a scaler
    stages = [replace(stage, blocks=stage.blocks.replace("D", "S"), groups=None)
              for stage in CONFIG.stages] if args.windows else CONFIG.stages
    torch.manual_seed(args.seed)
    detector = make_detector(replace(CONFIG, stages=stages, offsets=not args.no_offsets))
    detector = detector.to(device)
    optimizer, = dat.make_optimizers(detector, "adamw", 0.05)
    start, steps = time.monotonic(), SCENES // BATCH  # of an epoch
    updates = args.epochs * steps
    for update in range(updates):
        step = update % steps
        if step == 0:
            scenes, boxes = make_scenes(SCENES, 10 ** 6 * (args.seed + 1) + update * 100)
        images = [image.to(device) for image in scenes[step::steps]]
        targets = [{k: v.to(device) for k, v in t.items()} for t in boxes[step::steps]]
        for group in optimizer.param_groups:
            group["lr"] = dat.learning_rate(update, updates=updates, warmup=0.05, peak=1e-3,
                                            floor=0.01)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = sum(detector(images, targets).values())
        loss.backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        if update % 32 == 31:
            speed = (update + 1) / (time.monotonic() - start)
            print(f"step {update + 1}/{updates}  loss {loss:.3f}  {speed * BATCH:.0f} images/s  "
                  f"{(updates - update - 1) / speed:.0f} s left", flush=True)
    (scenes, targets), detector = make_scenes(TEST_SCENES, 0), detector.cpu().eval()
    with torch.inference_mode():
        found = [detector([image])[0] for image in scenes]
        points = detector.backbone.model.sampling_points((scenes[0][None] - 0.5) / 0.25)
    print(f"AP50 {average_precision(found, targets):.1%} on {len(scenes)} held-out scenes")
    save_image(draw(scenes, targets, found, points) / 255, "detections.png")
    print("see detections.png")


if __name__ == "__main__":
    run(main, __doc__)
