# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "matplotlib", "pytest", "hypothesis"]
# ///
"""DAT in one file: Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    python dat.py --train shapes    # generated images: a minute on two cores
    python dat.py --train cifar10   # downloads the images once
    pytest                          # properties, parity with reference_numpy.py

Paper: arXiv 2201.00520. Its equations are computed in

    (1), (3) WindowAttention.forward    (2) attend    (4), (5) Block.forward
    (6) project    (7) OffsetNetwork, points    (8) bilinear_sample    (9) position_bias, attend
    (10) lab/cost.py    Sec. 3.3 DAT    Tab. 1 VARIANTS

Symbols. Modules pass maps as (B, H, W, C):

    B batch   H W height, width of a map   C channels   M heads   d = C / M   G offset groups
    N = H W queries   Hk Wk sampling grid   K = Hk Wk keys   r stride: Hk = ceil(H / r)
    s offset range   k kernel of the offset network   w window side
    Coordinates are (y, x) in pixels (px) of the map: 0 is the centre of the first pixel.

Departures from the paper [P] and from the authors' release 566a593 [R]:

    [D1] geometry="paper": if r = 1, points start on whole pixels. In "release", which published
         weights need and load_official sets, queries and points are pulled inward. [R]
    [D2] Any image size: zeros fill up patches and, masked, windows; tables are resized. [P, R]
    [D3] Windows are shifted by ceil(w / 2), as in the release (Swin: floor). [P]
    [D4] The offset network has the release's layer norm before GELU. [P]
    [D5] offsets=False and position="fixed" work; in the release they crash. [R]
    [D6] stem="conv": overlapping 3x3 convolutions; the release's has 7x7. [P, R]
    [D7] Weights start from PyTorch's defaults, position tables at deviation 0.01. [P]
    [D8] RandAugment on all images, at one strength; last tenth unmixed; cosine after warm-up. [R]
"""
import argparse
import gc
import io
import math
import os
import re
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset

# ======== 1. configuration and variants

CHOICES = {"stem": ("patch", "conv"), "geometry": ("paper", "release"),
           "position": ("relative", "fixed", "none")}


def ceil_div(a, b):
    return -(-a // b)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. Paper: Sec. 3.3, Tab. 1. Raises: ValueError.
    `blocks`, a letter each: L local windows, S shifted windows, D deformable attention, which
    uses `groups` (G), `stride` (r), `kernel` (k), `offset_range` (s)."""
    dim: int
    heads: int
    blocks: str
    window: int = 7
    groups: int | None = None
    stride: int = 1
    kernel: int = 5
    offset_range: float = 2.0

    def __post_init__(self):
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        if not self.blocks or set(self.blocks) - set("LSD"):
            raise ValueError(f"blocks={self.blocks!r} is not made of the letters L, S and D")
        if bool(self.groups) != ("D" in self.blocks) or self.heads % (self.groups or 1):
            raise ValueError(f"groups={self.groups} must divide heads={self.heads}; None if no D")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} is even: no centre")


@dataclass(frozen=True, kw_only=True)
class DATConfig:
    """The network. Paper: Sec. 3.3. Raises: ValueError.
    `image_size`, an int or (H, W), sets the size of position tables; any input size works."""
    stages: tuple[StageConfig, ...]
    image_size: int | tuple[int, int] = 224
    patch: int = 4
    stem: str = "patch"  # or "conv" [D6]
    classes: int = 1000
    mlp_ratio: float = 4
    drop_path: float = 0.0
    geometry: str = "paper"  # or "release" [D1]
    offsets: bool = True  # False: an ablation
    position: str = "relative"  # or "fixed" or "none"

    def __post_init__(self):
        stages = tuple(StageConfig(**s) if isinstance(s, dict) else s for s in self.stages)
        object.__setattr__(self, "stages", stages)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.stem == "conv" and self.patch not in (1, 2, 4):
            raise ValueError(f"patch={self.patch} is not 1, 2 or 4 (stem='conv')")

    def map_sizes(self):
        """(H, W) of the map of each stage, for an image of `image_size`."""
        size = self.image_size
        H, W = (size, size) if isinstance(size, int) else size
        cells = [self.patch * 2 ** i for i in range(len(self.stages))]
        return [(ceil_div(H, cell), ceil_div(W, cell)) for cell in cells]


def _variant(dim, heads, blocks, groups, window, **rest):
    """Paper: Tab. 1. Widths and heads double with each stage."""
    return DATConfig(**rest, stages=tuple(
        StageConfig(dim=dim * 2 ** i, heads=heads * 2 ** i, blocks=letters, groups=groups[i],
                    kernel=2 * (len(blocks) - i) + 1, window=window)
        for i, letters in enumerate(blocks)))


TINY, DEEP = ("LS", "LS", "LD" * 3, "LD"), ("LS", "LS", "LD" * 9, "LD")
NARROW, WIDE = (None, None, 3, 6), (None, None, 4, 8)  # groups
SMALL = {"image_size": 32, "stem": "conv", "classes": 10}
VARIANTS = {  # in the paper's geometry; published weights need "release" [D1]
    "dat-t": _variant(96, 3, TINY, NARROW, 7, drop_path=0.2),
    "dat-s": _variant(96, 3, DEEP, NARROW, 7, drop_path=0.3),
    "dat-b": _variant(128, 4, DEEP, WIDE, 7, drop_path=0.5),
    "dat-b-384": _variant(128, 4, DEEP, WIDE, 12, drop_path=0.5, image_size=384),
    "cifar": _variant(48, 3, TINY, NARROW, 4, patch=1, drop_path=0.1, **SMALL),
    "cifar-nano": _variant(48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), 4, **SMALL)}  # for a CPU


def build(variant, **overrides):
    """The model of VARIANTS[variant] with other values of some fields of its DATConfig."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {list(VARIANTS)}")
    return DAT(replace(VARIANTS[variant], **overrides))


# ======== 2. coordinates and sampling
def cell_centres(count, length, *, geometry, like):
    """`count` evenly spaced points on an axis of `length` px: p, or the queries of Eq. 9.
    Shape: (count,), typed like `like`. "paper": from the first pixel's centre to the last's.
    "release": the middles of `count` equal parts of that line [D1]."""
    i = torch.arange(count, dtype=like.dtype, device=like.device)
    if geometry == "release":
        return (i + 0.5) / count * (length - 1)
    return i * (length - 1) / (count - 1) if count > 1 else i + (length - 1) / 2


def largest_offset(count, length, *, offset_range, geometry):
    """Bound of |dp|: s / 2 cells of H / Hk px, or of (H - 1) / Hk px if "release". The
    release has s / Hk on an axis from -1 to 1; the paper gives no unit (Sec. 3.2)."""
    return offset_range / 2 * (length if geometry == "paper" else length - 1) / count


def bilinear_sample(maps, points):
    """phi(z; p): a map read between its pixels (g is bilinear), with zeros outside. Paper: Eq. 8.
    Shape: (B, C, H, W), (B, h, u, 2) -> (B, C, h, u). Units: points (y, x) in px of the map, or a
    tuple of y and x that broadcast to (B, h1, h2, u), h = h1 h2. For grid_sample, which takes
    (x, y), -1 and 1 are the map's edges: with outer centres one pixel would divide by 0."""
    H, W = maps.shape[-2:]
    y, x = points if isinstance(points, tuple) else points.unbind(-1)
    y, x = torch.broadcast_tensors((2 * y + 1) / H - 1, (2 * x + 1) / W - 1)
    grid = torch.stack([x, y], dim=-1).flatten(1, -3)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
    return sampled.to(maps.dtype)


def resize(table, size):
    """A position table with its last two axes at another size; the middle stays there [D2]."""
    if table.shape[-2:] == size:
        return table
    resized = F.interpolate(table.flatten(0, -3)[None], size, mode="bicubic")[0]
    return resized.unflatten(0, table.shape[:-2])


# ======== 3. small blocks
def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v. Paper: Eq. 2 and 9.
    Shape: (B, M, N, d), (B, M, K, d) twice, bias (B or 1, M, N, K) -> (B, M, N, d).
    On a CPU the formula beats PyTorch's kernels. cuDNN's has bugs with a bias."""
    bias = None if bias is None else bias.to(q.dtype)
    if q.is_cpu:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        return scores.softmax(dim=-1) @ v
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def position_table(*shape):
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.01))  # [D7]


def drop_path(x, rate, training):
    """In training, zeroes each sample with probability `rate` and scales up the others."""
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def fill_up(x, side):
    """(B, H, W, C) with zeros at bottom and right, to multiples of `side` [D2]."""
    bottom, right = -x.shape[1] % side, -x.shape[2] % side
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


class Projection(nn.Module):
    """Patch embedding and down-sampling. Paper: Sec. 3.3.
    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C'). Patches (kernel = stride)
    are filled up [D2]; a larger kernel is centred [D6]."""
    def __init__(self, dim, out_dim, *, kernel, stride, bias=True):
        super().__init__()
        padding = kernel // 2 if kernel > stride else 0
        self.side = 1 if padding else stride
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x):
        x = fill_up(x, self.side).permute(0, 3, 1, 2)
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


# ======== 4. window attention
class WindowAttention(nn.Module):
    """Attention inside w x w windows with a learned bias: blocks L, and S with a `shift`.
    Paper: Sec. 3.3, from Swin (Liu et al., 2021). Shape: (B, H, W, C) -> the same, any H, W.
    The map is filled up [D2] and rolled up and left by `shift` [D3]. The last windows then join
    opposite sides (regions); attention stays within a region."""
    def __init__(self, *, dim, heads, window, shift=0):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.table = position_table(heads, 2 * window - 1, 2 * window - 1)

    def cut(self, x):
        """(B, H, W, C) -> windows (B, rows, w, columns, w, C) of the filled and rolled map."""
        x = fill_up(x, self.window)
        x = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        return x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))

    def bias(self, H, W):
        """The table at query - key + w - 1, minus infinity across regions: (windows, M, ww, ww)."""
        i = torch.arange(self.window, device=self.table.device)
        index = i[:, None] - i + self.window - 1  # (query, key)
        bias = self.table[:, index[:, None, :, None], index[None, :, None, :]]
        bias = bias.flatten(3).flatten(1, 2)  # (M, qy qx, ky kx)
        below, right = (torch.arange(n, device=i.device) >= self.shift for n in (H, W))
        region = 1 + 2 * below[:, None] + right  # 1 to 4; `cut` fills up with 0
        region = self.cut(region[None, :, :, None]).transpose(2, 3).reshape(-1, self.window ** 2)
        return bias.masked_fill((region[:, :, None] != region[:, None])[:, None], -math.inf)

    def forward(self, x):
        (B, H, W, C), M, w = x.shape, self.heads, self.window
        qkv = self.qkv(self.cut(x)).unflatten(5, (3, M, C // M))  # Eq. 1
        _, rows, _, columns = qkv.shape[:4]
        # (B, rows, w, columns, w, 3, M, d) -> (3, B, rows columns M, ww, d)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)
        z = attend(*qkv, self.bias(H, W).flatten(0, 1)[None])
        # (B, rows, w, columns, w, M, d) -> (B, rows w, columns w, C)
        z = z.unflatten(2, (w, w)).unflatten(1, (rows, columns, M)).permute(0, 1, 4, 2, 5, 3, 6)
        z = z.reshape(B, rows * w, columns * w, C)
        z = z.roll((self.shift, self.shift), (1, 2)) if self.shift else z
        return self.out(z[:, :H, :W])  # Eq. 3


# ======== 5. deformable attention
class OffsetNetwork(nn.Module):
    """theta_offset, one for all groups: how far points should move. Paper: Sec. 3.2, Fig. 2 (b).
    Depth-wise k x k convolution, layer norm [D4], GELU, 1x1 convolution without bias: one would
    shift all points alike. Shape: (B, H, W, C / G) -> (B, Hk, Wk, 2) yx, unbounded."""
    def __init__(self, *, dim, kernel, stride):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 2, bias=False)

    def forward(self, q):
        with torch.autocast("cpu", enabled=False):  # oneDNN's bfloat16 is slow here
            q = q.permute(0, 3, 1, 2).to(self.conv.weight.dtype)
            x = self.conv(q).permute(0, 2, 3, 1)
            return self.out(F.gelu(self.norm(x)))


class DeformableAttention(nn.Module):
    """Attention to x~, the map read at points that the offset network moves. Paper: Sec. 3.2.
    Shape: (B, H, W, C) -> the same, any H, W. `size`, an int or (H, W): the map that the position
    table is for. Raises: ValueError."""
    def __init__(self, *, dim, heads, groups, size, stride=1, kernel=5, offset_range=2.0,
                 geometry="paper", offsets=True, position="relative"):
        super().__init__()
        stage = StageConfig(dim=dim, heads=heads, blocks="D", groups=groups, kernel=kernel)
        H, W = DATConfig(stages=(stage,), image_size=size, patch=1, geometry=geometry,
                         position=position).map_sizes()[0]
        self.heads, self.groups, self.stride = heads, groups, stride
        self.offset_range, self.geometry, self.position = offset_range, geometry, position
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.offset = OffsetNetwork(
            dim=dim // groups, kernel=kernel, stride=stride) if offsets else None
        if position == "relative":
            self.table = position_table(heads, 2 * H - 1, 2 * W - 1)
        elif position == "fixed":
            self.table = position_table(heads, H, W, ceil_div(H, stride), ceil_div(W, stride))

    def points(self, q):
        """p + dp, where the keys of each group are read. Paper: Eq. 7 and dp <- s tanh(dp).
        Shape: (B, H, W, C) -> (B, G, Hk, Wk, 2). Units: (y, x) in px of the map, float32 at least,
        as bfloat16 has steps of half a pixel near 100."""
        (B, H, W, _), G, geometry = q.shape, self.groups, self.geometry
        axes = [(ceil_div(n, self.stride), n) for n in (H, W)]  # points and px along y and x
        like = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
        y, x = (cell_centres(*axis, geometry=geometry, like=like) for axis in axes)
        p = torch.cartesian_prod(y, x).view(len(y), len(x), 2)
        if self.offset is None:
            return p.expand(B, G, -1, -1, -1)
        grouped = q.unflatten(3, (G, -1)).movedim(3, 1)  # (B, G, H, W, C / G)
        raw = self.offset(grouped.flatten(0, 1)).to(like.dtype).unflatten(0, (B, G))
        s, (dy, dx) = self.offset_range, raw.tanh().unbind(-1)
        far_y, far_x = (largest_offset(*axis, offset_range=s, geometry=geometry) for axis in axes)
        return p + torch.stack([far_y * dy, far_x * dx], dim=-1)

    def position_bias(self, points, size):
        """phi(B^; R): the table, read at all displacements R = query - key. Paper: Eq. 9.
        Shape: (B, G, Hk, Wk, 2) -> (B, M, N, K), (1, M, N, K) if "fixed", None if "none". Along y
        the displacements -(H - 1) .. H - 1 stand in 2 H - 1 rows, 0 in row H - 1; x alike."""
        (B, G, Hk, Wk, _), (H, W) = points.shape, size
        if self.position == "none":
            return None
        table = self.table.to(points.dtype)
        if self.position == "fixed":
            table = resize(resize(table, (Hk, Wk)).permute(0, 3, 4, 1, 2), (H, W))
            return table.flatten(3).flatten(1, 2).transpose(1, 2)[None]
        table = resize(table, (2 * H - 1, 2 * W - 1)).unflatten(0, (G, -1))
        table = table.expand(B, *table.shape).flatten(0, 1)  # (B G, M / G, 2 H - 1, 2 W - 1)
        q_y, q_x = (cell_centres(n, n, geometry=self.geometry, like=points) for n in (H, W))
        k_y, k_x = points.reshape(B * G, 1, 1, Hk * Wk, 2).unbind(-1)
        R_y, R_x = q_y[:, None, None] - k_y, q_x[:, None] - k_x  # (B G, H, 1, K), (B G, 1, W, K)
        bias = bilinear_sample(table, (R_y + H - 1, R_x + W - 1))
        return bias.view(B, self.heads, H * W, Hk * Wk)

    def project(self, x):
        """q (B, M, N, d), k~ and v~ (B, M, K, d), points (B, G, Hk, Wk, 2). Paper: Eq. 6-8."""
        if x.shape[3:] != (self.q.in_features,):
            raise ValueError(f"expected (B, H, W, {self.q.in_features}), not {tuple(x.shape)}")
        (B, H, W, C), G, M = x.shape, self.groups, self.heads
        q = self.q(x)
        points = self.points(q)
        maps = x.permute(0, 3, 1, 2).reshape(B * G, C // G, H, W)
        sampled = bilinear_sample(maps, points.flatten(0, 1)).view(B, C, *points.shape[2:4])
        sampled = sampled.flatten(2).transpose(1, 2).contiguous()  # x~: (B, K, C)
        k, v = self.k(sampled), self.v(sampled)
        q, k, v = (t.unflatten(2, (M, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k, v))
        return q, k, v, points

    def forward(self, x):
        q, k, v, points = self.project(x)
        z = attend(q, k, v, self.position_bias(points, x.shape[1:3]))
        return self.out(z.transpose(1, 2).reshape(x.shape))  # Eq. 3, (B, M, N, d) -> (B, H, W, C)


# ======== 6. block, network
class Block(nn.Module):
    """z' = attention(LN(z)) + z, z'' = MLP(LN(z')) + z'. Paper: Eq. 4 and 5.
    Shape: (B, H, W, C) -> the same."""
    def __init__(self, config, index, letter, rate):
        super().__init__()
        stage, self.rate = config.stages[index], rate
        dim, hidden = stage.dim, int(stage.dim * config.mlp_ratio)
        if letter == "D":
            self.attention = DeformableAttention(
                dim=dim, heads=stage.heads, groups=stage.groups, size=config.map_sizes()[index],
                stride=stage.stride, kernel=stage.kernel, offset_range=stage.offset_range,
                geometry=config.geometry, offsets=config.offsets, position=config.position)
        else:
            shift = ceil_div(stage.window, 2) if letter == "S" else 0
            self.attention = WindowAttention(
                dim=dim, heads=stage.heads, window=stage.window, shift=shift)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({
            "expand": nn.Linear(dim, hidden), "contract": nn.Linear(hidden, dim)})

    def forward(self, z):
        z = drop_path(self.attention(self.norm1(z)), self.rate, self.training) + z
        hidden = self.mlp.expand(self.norm2(z))
        return drop_path(self.mlp.contract(F.gelu(hidden)), self.rate, self.training) + z


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention. Paper: Sec. 3.3, Fig. 3, Tab. 1.
    Shape: images (B, 3, H, W), any H, W -> logits (B, classes). Raises: ValueError."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, patch, conv = config.stages[0].dim, config.patch, config.stem == "conv"
        if conv:
            first = min(patch, 2)
            self.stem = nn.Sequential(
                Projection(3, dim // 2, kernel=3, stride=first), nn.GELU(),
                Projection(dim // 2, dim, kernel=3, stride=patch // first))
        else:
            self.stem = Projection(3, dim, kernel=patch, stride=patch)
        depth = sum(len(stage.blocks) for stage in config.stages)
        rates = iter([config.drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.stages = nn.ModuleList()
        for i, stage in enumerate(config.stages):
            down = nn.Identity() if i == 0 else Projection(
                dim, stage.dim, kernel=3 if conv else 2, stride=2, bias=False)
            blocks = nn.ModuleList(Block(config, i, letter, next(rates)) for letter in stage.blocks)
            self.stages.append(nn.ModuleDict({"down": down, "blocks": blocks}))
            dim = stage.dim
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)

    def features(self, images, points=None):
        """The maps (B, C, H, W) after the stages: a pyramid for a detector.
        `points`: a list that gets the points of the D blocks."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"need float (B, 3, H, W), not {images.dtype} {tuple(images.shape)}")
        x, maps = self.stem(images.permute(0, 2, 3, 1)), []
        for i, stage in enumerate(self.stages):
            x, cell = stage.down(x), self.config.patch * 2 ** i  # image px per map px
            centre = (cell - 1) / 2 if self.config.stem == "patch" else 0  # of map pixel 0
            for block in stage.blocks:
                if points is not None and isinstance(block.attention, DeformableAttention):
                    q = block.attention.q(block.norm1(x))
                    points.append(centre + cell * block.attention.points(q))
                x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images):
        x = self.features(images)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean(dim=(1, 2)))

    def sampling_points(self, images):
        """Where each D block reads its keys: a list of (B, G, Hk, Wk, 2), (y, x) in image px."""
        points = []
        self.features(images, points)
        return points


# ======== 7. the authors' weights
OFFICIAL_NAMES = [  # (in the release, here), all applied in order
    (r"^patch_proj\.", "stem."),
    (r"^down_projs\.(\d+)", lambda i: f"stages.{int(i[1]) + 1}.down"),
    (r"layer_norms\.(\d+)\.norm",
     lambda i: f"blocks.{int(i[1]) // 2}.norm{int(i[1]) % 2 + 1}"),
    (r"mlps\.(\d+)\.chunk", r"blocks.\1.mlp"),
    (r"attns\.(\d+)", r"blocks.\1.attention"),
    ("linear1", "expand"),
    ("linear2", "contract"),
    (r"\.proj_", "."),
    ("conv_offset", "offset"),
    (r"offset\.3", "offset.out"),
    (r"(stem|down|offset)\.0", r"\1.conv"),
    (r"(stem|down|offset)\.1\.norm", r"\1.norm"),
    ("rpe_table|relative_position_bias_table", "table"),
    (r"^cls_norm\.norm", "norm"),
    (r"^cls_head", "head"),
]


def rename_official(state):
    """The release's weights by our names, in our shapes. Unknown names stay."""
    renamed = {}
    for name, value in state.items():
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue  # both follow from the window
        ours = name
        for pattern, new in OFFICIAL_NAMES:
            ours = re.sub(pattern, new, ours)
        if name.endswith("relative_position_bias_table"):
            side = math.isqrt(len(value))
            value = value.T.reshape(-1, side, side)
        elif value.ndim == 4 and not ours.endswith("conv.weight"):
            value = value.flatten(1)  # 1x1 convolutions there
        renamed[f"{name} twice" if ours in renamed else ours] = value
    return renamed


def load_official(state_dict, config):
    """A model with the authors' weights (bare or under "model") and geometry [D1].
    Raises: ValueError that names each missing, unknown or misshapen key."""
    model = DAT(replace(config, geometry="release"))
    try:
        model.load_state_dict(rename_official(state_dict.get("model", state_dict)))
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the configuration: {error}") from None
    return model


# ======== 8. data
DATA = ("shapes", "cifar10", "cifar100", "imagenet")
SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar")
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, deviation


class InputError(ValueError):
    """A caller's mistake: main prints one line."""


def make_shapes(count, *, seed, side=32):
    """Figures of the kinds SHAPES at random place, size, angle and colour, on clutter.
    Shape: images (count, 3, side, side) uint8, labels (count,), masks (count, side, side) bool."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    pixel = torch.arange(side) + 0.5
    blotches = F.interpolate(draw(0, 0.5, 3, 4, 4), (side, side), mode="bilinear")
    images = blotches + draw(-0.05, 0.05, 3, side, side)
    for _ in range(8):  # clutter: small boxes
        y, x = draw(0, side, 2, 1, 1, 1).unbind(1)
        height, width = draw(0.5, side / 12, 2, 1, 1, 1).unbind(1)
        box = ((pixel[:, None] - y).abs() < height) & ((pixel - x).abs() < width)
        images = torch.where(box, draw(0, 0.6, 3, 1, 1), images)
    radius, angle = draw(0.2, 0.36, 1, 1) * side, draw(0, 2 * math.pi, 1, 1)
    y, x = (radius + (side - 2 * radius) * draw(0, 1, 1, 1) for _ in range(2))
    y, x = pixel[:, None] - y, pixel - x  # from the figure's centre
    u = (x * angle.cos() + y * angle.sin()) / radius  # along its axes
    v = (y * angle.cos() - x * angle.sin()) / radius
    a, b, r, t = u.abs(), v.abs(), torch.hypot(u, v), torch.atan2(v, u)
    figures = torch.stack([  # as in SHAPES
        r < 0.9,
        (r < 1) & (r > 0.55),
        a.maximum(b) < 0.75,
        r * (t % (2 * math.pi / 3) - math.pi / 3).cos() < 0.5,
        (a.minimum(b) < 0.28) & (a.maximum(b) < 0.95),
        r < 0.7 + 0.3 * (5 * t).cos(),
        (r < 1) & (torch.hypot(u - 0.55, v) > 0.75),
        (a < 1) & (b < 0.3)])
    labels = torch.randint(len(SHAPES), (count,), generator=rng)
    masks = figures[labels, torch.arange(count)]
    colour = draw(0.5, 1, 3, 1, 1) + draw(-0.05, 0.05, 3, side, side)
    images = torch.where(masks[:, None], colour, images)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks


def load_dataset(name, root, train):
    """(image, label) pairs of the training or test set, and the class names."""
    if name == "shapes":
        images, labels, _ = make_shapes(10_000 if train else 2_000, seed=int(train))
        return TensorDataset(images, labels), SHAPES
    from torchvision import datasets
    cifar = getattr(datasets, name.upper(), None)
    wanted = cifar.url if cifar else "train/<class>/ and val/<class>/"
    try:
        found = (cifar(root, train, download=True) if cifar else
                 datasets.ImageFolder(Path(root, "train" if train else "val")))
    except Exception as error:
        raise InputError(f"--data {root} has no {name} ({error}): expected {wanted}; "
                         "--train shapes needs no files")
    if cifar:  # faster than Pillow images
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return TensorDataset(images, torch.tensor(found.targets)), tuple(found.classes)
    return found, tuple(found.classes)


class Parts(Dataset):
    """Parts of batches: (seed, indices) -> images (b, 3, size, size), labels (b,).
    All draws follow from the seed. `augment`: None; 0: crop, flip; 1: + erasing, RandAugment."""
    def __init__(self, name, samples, size, augment):
        from torchvision.transforms import InterpolationMode, v2
        bicubic, photos, steps = InterpolationMode.BICUBIC, name == "imagenet", []
        if augment is not None:
            steps = [v2.RandomResizedCrop(size, interpolation=bicubic) if photos else
                     v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()]
        elif photos:  # 256 for 224, 438 for 384
            steps = [v2.Resize([size * 256 // 224] * 2, bicubic), v2.CenterCrop(size)]
        if augment:  # 9 of 10, as in the release
            steps.append(v2.RandAugment(2, 9, num_magnitude_bins=11))
        self.samples, self.transform = samples, v2.Compose([*steps, v2.PILToTensor()])
        self.normalise = v2.Normalize(*IMAGENET if photos else ([0.5] * 3, [0.25] * 3))
        self.erase = v2.RandomErasing(0.25, value="random") if augment else nn.Identity()

    def read(self, i):
        try:
            return self.samples[i]
        except Exception as error:
            path = self.samples.samples[i][0]
            raise InputError(f"{path} cannot be read ({error}): remove it")

    def __getitem__(self, part):
        seed, indices = part
        torch.manual_seed(seed)
        images, labels = zip(*map(self.read, indices))
        images = self.normalise(torch.stack([self.transform(i) for i in images]) / 255)
        return torch.stack([self.erase(i) for i in images]), torch.tensor(labels)


# ======== 9. training
SETTINGS = "epochs batch_size lr warmup floor clip decay".split()
RECIPES = {  # of data, or data and model; warmup: share of the run; floor: share of lr
    "shapes": (4, 64, 3e-3, 0.25, 0.01, 5.0, 0.05),
    "cifar": (6, 128, 2e-3, 0.05, 0.01, 5.0, 0.05),
    "cifar cifar": (300, 256, 1e-3, 0.05, 0.01, 5.0, 0.05),
    "imagenet": (300, 1024, 1e-3, 20 / 300, 0.01, 5.0, 0.05),  # the release's from here
    "imagenet dat-b": (300, 1024, 8e-4, 50 / 300, 1 / 80, 1.0, 0.05),
    "imagenet fine-tuning": (30, 512, 2e-6, 0.0, 0.05, 5.0, 1e-8)}


def learning_rate(step, *, steps, warmup, peak, floor):
    """Linear warm-up from floor / 10 of peak, then half a cosine to floor of peak [D8]."""
    warm = max(int(steps * warmup), min(50, steps // 4)) if warmup else 0  # short runs
    if step < warm:
        return peak * (floor / 10 + (1 - floor / 10) * step / warm)
    progress = (step - warm) / (steps - warm)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model, decay):
    """For AdamW: no decay of biases, norms and position tables, as in the release."""
    groups = {decay: [], 0.0: []}
    for name, p in model.named_parameters():
        groups[decay if p.ndim > 1 and not name.endswith("table") else 0.0].append(p)
    return [{"params": group, "weight_decay": rate} for rate, group in groups.items()]


def has_bfloat16(device):
    """Whether hardware multiplies bfloat16."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


@torch.no_grad()
def evaluate(model, test, args):
    """The test accuracy. Each process tests its own share."""
    total, model = len(test.samples), model.eval()
    right = torch.zeros((), dtype=int, device=args.device)
    parts = [(0, part.tolist()) for part in torch.arange(args.rank, total, args.world).split(100)]
    for images, labels in DataLoader(test, None, sampler=parts, num_workers=args.workers):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
            best = model(images.to(args.device)).argmax(dim=1)
        right += (best == labels.to(args.device)).sum()
    if args.world > 1:
        dist.all_reduce(right)
    return right.item() / total


def write_atomically(path, content):
    """Writes a copy and renames it: at any moment `path` is the old file or the new."""
    copy = Path(f"{path}.tmp")
    try:
        with copy.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        copy.replace(path)
    finally:
        copy.unlink(missing_ok=True)


def load_checkpoint(path):
    """What a file of dat.py holds, or the authors' weights."""
    try:  # the authors' files hold a yacs node
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        if "cls_head.weight" in found["model"]:
            return {"model": rename_official(found["model"]), "geometry": "release"}
        config = DATConfig(**found["config"])
        return found | {"config": config, "geometry": config.geometry}
    except Exception as error:
        raise InputError(f"{path} is no checkpoint of dat.py or the authors: {error!r}")


def load_for_fine_tuning(model, state):
    """Resizes relative tables to the model's [D2]; a head of another size starts anew."""
    state, ours = dict(state), model.state_dict()
    for name in state.keys() & ours.keys():
        if name.endswith("table") and ours[name].ndim == 3:
            state[name] = resize(state[name], ours[name].shape[1:])
        if name.startswith("head.") and len(state[name]) != len(ours[name]):
            state[name] = ours[name]
    model.load_state_dict(state)


def load_model(args, classes):
    """The model that the flags ask for, with the checkpoint's weights."""
    found, size = args.found, args.config.image_size if args.photos else 32
    geometry = found.get("geometry", args.config.geometry)
    config = replace(args.config, classes=len(classes), image_size=size, geometry=geometry)
    torch.manual_seed(args.seed)
    model = DAT(config)
    try:
        if args.train and args.checkpoint and not args.resume:
            load_for_fine_tuning(model, found["model"])
        elif found.get("classes", classes) != classes:
            raise RuntimeError("its classes are others")
        elif found:
            model.load_state_dict(found["model"])
    except RuntimeError as error:
        path = args.out if args.resume else args.checkpoint
        raise InputError(f"{path} does not fit --model {args.model}: {error}")
    return model.to(args.device, memory_format=torch.channels_last)


def train(args):
    """A run, new or resumed, to its end."""
    from torchvision.transforms import v2
    samples, classes = load_dataset(args.train, args.data, True)
    tests, test_classes = load_dataset(args.train, args.data, False)
    if odd := {*classes} ^ {*test_classes}:
        raise InputError(f"--data {args.data}: train or val lacks the class {min(odd)}")
    model, steps = load_model(args, classes), len(samples) // args.batch_size
    if not steps or args.batch_size % args.parts or args.parts % args.world:
        raise InputError(f"--batch-size: expected a multiple of {args.parts} up to {len(samples)}")
    end, size = steps * args.epochs, model.config.image_size
    data = Parts(args.train, samples, size, args.photos or args.epochs >= 60)
    test = Parts(args.train, tests, size, None)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(classes)),
                           v2.CutMix(alpha=1.0, num_classes=len(classes))])
    mixed_steps = 0.9 * end if args.photos or args.epochs >= 100 else 0
    forward = torch.compile(model, fullgraph=True) if args.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if args.world > 1 else forward
    optimizer = torch.optim.AdamW(parameter_groups(model, args.decay), fused=True)
    rows = []  # of metrics.csv; accuracy None: its test is to come
    if args.resume:
        optimizer.load_state_dict(args.found["optimizer"])
        rows = args.found["history"]
    new = (f"runs/{args.train}-{args.model}-{n}" for n in range(1, 10_000))
    out = Path(args.out or next(path for path in new if not os.path.exists(path)))
    if args.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
    print(f"{args.train}: {len(samples):,} images to train, {len(tests):,} to test\n"
          f"{args.model}: {sum(map(torch.numel, model.parameters())):,} parameters, "
          f"{'bfloat16' if args.bfloat16 else 'float32'} on {args.world} x {args.device}\n"
          f"{args.epochs} epochs of {steps} steps, batch {args.batch_size}, lr {args.lr:g}, "
          f"into {out}/\nflags: --model --float32 --device --epochs --batch-size --lr --out")

    def save():
        if args.rank == 0:
            file, table = io.BytesIO(), "epoch,step,loss,test_accuracy,seconds\n"
            table += "".join(",".join(map(str, row)) + "\n" for row in rows)
            torch.save({
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "config": asdict(model.config), "recipe": args.recipe, "history": rows,
                "epoch": len(rows), "classes": classes, "mean": data.normalise.mean,
                "std": data.normalise.std}, file)
            write_atomically(out / "metrics.csv", table.encode())
            write_atomically(out / "last.pt", file.getvalue())

    def test_and_save():
        rows[-1][3] = evaluate(model, test, args)
        print(f"epoch {len(rows)}/{args.epochs}  test accuracy {rows[-1][3]:.2%}")
        save()

    if rows and rows[-1][3] is None:
        test_and_save()
    for done in range(len(rows) * steps, end):
        epoch, step = divmod(done, steps)
        if step == 0:
            torch.manual_seed(hash((args.seed, epoch)))
            order = torch.randperm(len(samples))[:steps * args.batch_size]
            parts = order.view(steps * args.parts, -1).tolist()  # a row, a part
            parts = [(hash((args.seed, epoch, i)), part) for i, part in enumerate(parts)]
            parts = parts[args.rank::args.world]
            batches = iter(DataLoader(data, None, sampler=parts, num_workers=args.workers))
            began = shown = time.monotonic()
            total = torch.zeros((), device=args.device)
            model.train()
        rate = learning_rate(done, steps=end, warmup=args.warmup, peak=args.lr, floor=args.floor)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        for part in range(args.rank, args.parts, args.world):
            images, labels = (t.to(args.device) for t in next(batches))
            torch.manual_seed(hash((args.seed, epoch, step, part)))  # mixing, drop path
            images, labels = mix(images, labels) if done < mixed_steps else (images, labels)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.bfloat16):
                loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
            (loss * args.world / args.parts).backward()  # DDP divides by world
            total += loss.detach() / args.parts
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        if time.monotonic() - shown > 10 or step == steps - 1:
            if not (total + norm).isfinite():
                raise InputError(f"epoch {epoch + 1}: loss not finite; try --lr below {args.lr:g}")
            shown = time.monotonic()
            speed = (step + 1) / (shown - began)
            print(f"epoch {epoch + 1}/{args.epochs}  step {step + 1}/{steps}  loss {loss:.3f}  "
                  f"{speed * args.batch_size:,.0f} images/s  {(end - done - 1) / speed:.0f} s left")
        if step == steps - 1:
            if args.world > 1:
                dist.all_reduce(total)
            rows.append([epoch + 1, done + 1, total.item() / steps, None, shown - began])
            save()  # the test may fail
            test_and_save()


# ======== 10. command line
def read_flags(arguments):
    """Each setting: the resumed run's (flags must agree), or a flag, or RECIPES."""
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    parser = argparse.ArgumentParser("dat.py", usage=argparse.SUPPRESS, description=(
        "Without data: python dat.py --train shapes"))
    flag, task = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", choices=DATA)
    task.add_argument("--eval", choices=DATA, help="print the test accuracy of --checkpoint")
    flag("--checkpoint", help="to evaluate or start from: last.pt or the authors'")
    flag("--data", default="data", help="folder of CIFAR, or of train/ and val/")
    flag("--out")
    flag("--resume", action="store_true", help="continue the run in --out")
    flag("--model", choices=VARIANTS)
    flag("--device", choices=("cpu", "cuda")[:1 + cuda], default="cuda" if cuda else "cpu")
    flag("--float32", action="store_true", default=None)
    flag("--compile", action="store_true")
    flag("--workers", type=int, default=os.cpu_count() // world if cuda else 0)
    for name in ("--epochs", "--batch-size", "--accumulate", "--seed"):
        flag(name, type=int)
    flag("--lr", type=float)
    args = parser.parse_args(arguments or ["--help"])
    typed = {name: value for name, value in vars(args).items() if value is not None}
    for name in ("epochs", "batch_size", "accumulate", "lr"):
        if not 0 < typed.get(name, 1) < math.inf:
            parser.error(f"{name} {typed[name]} is not above 0")
    if (args.workers < 0 or args.eval and not args.checkpoint
            or args.resume and not (args.train and args.out)):
        parser.error("--workers from 0; --eval needs --checkpoint, --resume --train and --out")
    if args.out and not args.resume and any(Path(args.out).glob("*")):
        parser.error(f"--out {args.out} is not empty: choose another, or --resume a run")

    path = Path(args.out, "last.pt") if args.resume else args.checkpoint
    found = load_checkpoint(path) if path else {}
    saved, data = found.get("recipe", {}), (args.train or args.eval).rstrip("10")
    photos = data == "imagenet"
    small = "cifar" if args.device == "cuda" else "cifar-nano"
    model = args.model or saved.get("model", "dat-t" if photos else small)
    kind = "fine-tuning" if args.checkpoint else model.removesuffix("-384")
    recipe = dict(zip(SETTINGS, RECIPES.get(f"{data} {kind}", RECIPES[data])), model=model, seed=0,
                  train=args.train, checkpoint=args.checkpoint, accumulate=1,
                  float32=bool(args.eval and saved.get("float32")),
                  parts=world * (args.accumulate or 1))
    if photos:
        recipe["lr"] *= typed.get("batch_size", recipe["batch_size"]) / recipe["batch_size"]
    recipe = saved if args.resume else recipe | {k: v for k, v in typed.items() if k in recipe}
    for name in recipe.keys() & typed.keys():
        if typed[name] != recipe[name]:
            parser.error(f"{path} has {name} {recipe[name]}, not {typed[name]}: omit it")
    config = found["config"] if saved.get("model") == model else VARIANTS[model]
    return argparse.Namespace(**vars(args) | recipe, recipe=recipe, found=found, config=config,
                              photos=photos, world=world, rank=int(os.environ.get("RANK", 0)),
                              bfloat16=has_bfloat16(args.device) and not recipe["float32"])


def main(arguments=None):
    """Returns the exit code: 0, or 2 for a caller's mistake."""
    try:
        args = read_flags(sys.argv[1:] if arguments is None else arguments)
        if args.world > 1:
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
            try:
                if args.rank == 0:
                    load_dataset(args.train or args.eval, args.data, bool(args.train))  # downloads
            finally:
                dist.barrier()
            sys.stdout = open(os.devnull, "w") if args.rank else sys.stdout
        if args.train:
            train(args)
        else:
            samples, classes = load_dataset(args.eval, args.data, False)
            model = load_model(args, classes)
            test = Parts(args.eval, samples, model.config.image_size, None)
            print(f"test accuracy {evaluate(model, test, args):.2%}")
        return 0
    except (InputError, OSError) as error:  # a loader's process adds text before ours
        message = " ".join(str(error).split("InputError: ")[-1].split())
        print(f"dat.py: {message:.400}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            gc.collect()  # frees DDP before its group
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
