# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "matplotlib", "pytest", "hypothesis"]
# ///
"""DAT in one file: Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    python dat.py --train shapes  # generated images, no download: two minutes on two cores
    python dat.py --train cifar10  # downloads the archive once, trains, reports test accuracy
    pytest  # the properties, and parity with reference_numpy.py

Paper: https://arxiv.org/abs/2201.00520. Where its equations are computed:

    (1)-(3)  multi-head attention          attend; the modules below call it
    (4)-(5)  pre-norm transformer block    Block.forward
    (6)      q, k~, v~                     DeformableAttention.project
    (7)      offsets, s tanh, points       OffsetNetwork, DeformableAttention.points
    (8)      bilinear sampling phi         bilinear_sample
    (9)      relative position bias        DeformableAttention.position_bias
    (10)     cost of one attention         lab/cost.py
    Sec. 3.3 the network                   DAT, Projection;  Tab. 1: VARIANTS

Symbols. Feature maps are channels-last, (B, H, W, C), everywhere:

    B batch   H W height, width of a map   C channels   M heads   d = C / M   G offset groups
    N = H W queries   Hk Wk grid of sampling points   K = Hk Wk keys   r = H / Hk stride
    s offset range   k kernel of the offset network   w window side
    Coordinates are (y, x) in pixels (px) of the map: 0 is the centre of the first pixel.

Departures from the paper [P] and from the authors' release at 566a593 [R]:

    [D1] geometry="paper": with r = 1 points start on whole pixels. The release's start between
         them and blur; its weights need geometry="release", which load_official sets. [R]
    [D2] Any size: zeros fill up patches and windows at the bottom and right and are masked;
         position tables are resized bicubically. [P, R]
    [D3] Shifted windows are cut at ceil(w / 2), as in the release (Swin: floor). [P]
    [D4] The offset network has the release's layer norm before GELU. [P]
    [D5] offsets=False and position="fixed" work; in the release they crash. [R]
    [D6] stem="conv": overlapping 3x3 convolutions, which the release has but its ImageNet models
         do not use. [P]
    [D7] PyTorch's default weights, position tables from a normal distribution of deviation 0.01:
         what the release's code amounts to; the paper does not say. [P]
    [D8] RandAugment without random magnitude, no mixing in the last tenth of a run, a cosine that
         starts where warm-up ends. [R]
"""
from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import os
import random
import re
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ============================================================ 1. configuration and variants

CHOICES = {"stem": ("patch", "conv"), "geometry": ("paper", "release"), "offsets": (True, False),
           "position": ("relative", "fixed", "none")}
CONV_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}  # patch -> strides of the conv stem


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from one number for both, or from a pair."""
    return (size, size) if isinstance(size, int) else tuple(size)


def require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)!r} is not positive")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. Paper: Sec. 3.3, Tab. 1. Raises: ValueError with field and value.

    `blocks`, a letter each: L local windows, S shifted windows, D deformable attention, which
    needs `groups` (G) and uses `stride` (r), `kernel` (k) and `offset_range` (s).
    """
    dim: int
    heads: int
    blocks: str
    window: int = 7
    groups: int | None = None
    stride: int = 1
    kernel: int = 5
    offset_range: float = 2.0

    def __post_init__(self) -> None:
        require_positive(self, "dim", "heads", "window", "stride", "kernel", "offset_range")
        if self.dim % self.heads:
            raise ValueError(f"dim={self.dim} is not divisible by heads={self.heads}")
        if not self.blocks or set(self.blocks) - set("LSD"):
            raise ValueError(f"blocks={self.blocks!r} is not made of the letters L, S and D")
        if bool(self.groups) != ("D" in self.blocks) or self.heads % (self.groups or 1):
            raise ValueError(f"groups={self.groups!r} with heads={self.heads}, blocks="
                             f"{self.blocks!r}: groups must divide heads; None if there is no D")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} is even, so it has no centre")


@dataclass(frozen=True, kw_only=True)
class DATConfig:
    """The whole network. Paper: Sec. 3.3. Raises: ValueError with field and value.

    `image_size`, an int or (H, W), sets the size of the position tables; any input size works.
    `offsets` and `position` are the paper's ablations. dataclasses.asdict's values build it again.
    """
    stages: tuple[StageConfig, ...]
    image_size: int | tuple[int, int] = 224
    patch: int = 4
    stem: str = "patch"  # or "conv" [D6]
    classes: int = 1000
    mlp_ratio: float = 4
    drop_path: float = 0.0
    geometry: str = "paper"  # or "release" [D1]
    offsets: bool = True
    position: str = "relative"  # or "fixed" or "none"

    def __post_init__(self) -> None:
        stages = tuple(StageConfig(**s) if isinstance(s, dict) else s for s in self.stages)
        object.__setattr__(self, "stages", stages)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        require_positive(self, "patch", "classes", "mlp_ratio")
        if min(pair(self.image_size)) < 1:
            raise ValueError(f"image_size={self.image_size!r} is not positive")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path!r} is not from 0 to below 1")
        if self.stem == "conv" and (self.patch not in CONV_STRIDES or stages[0].dim % 2):
            raise ValueError(f"stem='conv' with patch={self.patch}, dim={stages[0].dim} of the "
                             "first stage: patch must be 1, 2 or 4 and dim even")

    def map_sizes(self, image_size: int | Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(H, W) of the map of each stage for an image of `image_size` (default: configured)."""
        H, W = pair(self.image_size if image_size is None else image_size)
        cells = [self.patch * 2 ** i for i in range(len(self.stages))]
        return [(ceil_div(H, cell), ceil_div(W, cell)) for cell in cells]


def make_stages(dim: int, heads: int, blocks: tuple, groups: tuple, window: int = 7) -> tuple:
    """Widths and heads double from stage to stage, kernels are 9, 7, 5, 3. Paper: Tab. 1."""
    return tuple(StageConfig(dim=dim * 2 ** i, heads=heads * 2 ** i, blocks=letters,
                             groups=groups[i], kernel=2 * (len(blocks) - i) + 1, window=window)
                 for i, letters in enumerate(blocks))


TINY, DEEP = ("LS", "LS", "LD" * 3, "LD"), ("LS", "LS", "LD" * 9, "LD")
NARROW, WIDE = (None, None, 3, 6), (None, None, 4, 8)  # groups
VARIANTS = {  # in the paper's geometry; published weights: [D1]
    "dat-t": DATConfig(stages=make_stages(96, 3, TINY, NARROW), drop_path=0.2),
    "dat-s": DATConfig(stages=make_stages(96, 3, DEEP, NARROW), drop_path=0.3),
    "dat-b": DATConfig(stages=make_stages(128, 4, DEEP, WIDE), drop_path=0.5),
    "dat-b-384": DATConfig(stages=make_stages(128, 4, DEEP, WIDE, 12), drop_path=0.5,
                           image_size=384),
    # For images of 32 px: half-width DAT-T on maps of 32 to 4 px; a small one for a CPU, 8 to 2.
    "cifar": DATConfig(stages=make_stages(48, 3, TINY, NARROW, 4), image_size=32, patch=1,
                       stem="conv", classes=10, drop_path=0.1),
    "cifar-nano": DATConfig(stages=make_stages(48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), 4),
                            image_size=32, patch=4, stem="conv", classes=10),
}


def build(variant: str, **overrides: object) -> DAT:
    """The model of VARIANTS[variant], fields of its DATConfig replaced by `overrides`."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {list(VARIANTS)}")
    return DAT(replace(VARIANTS[variant], **overrides))


# ============================================================ 2. coordinates and sampling
def cell_centres(count: int, length: int, *, geometry: str, like: Tensor) -> Tensor:
    """Coordinates of `count` points along an axis of `length` pixels. Paper: Sec. 3.2, p.

    Shape: (count,), type and device of `like`. Units: px. "paper": from the centre of the first
    pixel to that of the last. "release": the middles of `count` equal parts of that line [D1].
    """
    i = torch.arange(count, dtype=like.dtype, device=like.device)
    if geometry == "release":
        return (i + 0.5) / count * (length - 1)
    return i * (length - 1) / (count - 1) if count > 1 else i + (length - 1) / 2


def largest_offset(count: int, length: int, *, offset_range: float, geometry: str) -> float:
    """How far a point may move along an axis, in px of the map. Paper: Sec. 3.2, s tanh(dp).

    It is s / 2 cells of H / Hk px, or (H - 1) / Hk px if "release". (The paper names no unit.)
    """
    return offset_range / 2 * (length if geometry == "paper" else length - 1) / count


def bilinear_sample(maps: Tensor, points: Tensor) -> Tensor:
    """phi(z; p): a map read between its pixels, with zeros outside. Paper: Eq. 8.

    Shape: (B, C, H, W), (B, h, w, 2) -> (B, C, h, w). Units: points (y, x) in px of the map.
    grid_sample takes x before y, scaled so that the map is [-1, 1] from edge to edge. (From centre
    to centre, align_corners=True, would divide by 0 on a map of one pixel.)
    """
    H, W = maps.shape[-2:]
    y, x = points.unbind(-1)
    grid = torch.stack([(2 * x + 1) / W - 1, (2 * y + 1) / H - 1], dim=-1)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
    return sampled.to(maps.dtype)


def resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    """The last two axes of a position table at another size, bicubically, centre on centre [D2]."""
    if table.shape[-2:] == size:
        return table
    resized = F.interpolate(table.flatten(0, -3)[None], size, mode="bicubic")[0]
    return resized.unflatten(0, table.shape[:-2])


# ============================================================ 3. small blocks
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v. Paper: Eq. 2 and 9.

    Shape: (B, M, N, d), (B, M, K, d) twice, bias broadcastable to (B, M, N, K) -> (B, M, N, d).
    On a CPU the formula is faster than PyTorch's kernels. cuDNN's has open bugs with a bias.
    """
    if q.is_cpu:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        return scores.softmax(dim=-1) @ v
    bias = None if bias is None else bias.to(q.dtype)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def position_table(*shape: int) -> nn.Parameter:
    """Learned biases. They start from a normal distribution of deviation 0.01 [D7]."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.01))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, zeroes a sample with probability `rate` and scales up the others to match."""
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * kept / (1 - rate)


class Projection(nn.Module):
    """Convolution and layer norm: patch embedding, and down-sampling between stages. Sec. 3.3.

    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C'). Patches (kernel = stride)
    are filled up with zeros at the bottom and right [D2]. A larger kernel is centred [D6].
    """
    def __init__(self, dim: int, out_dim: int, *, kernel: int, stride: int, bias: bool = True):
        super().__init__()
        self.patch = stride if kernel == stride else 1
        padding = 0 if kernel == stride else kernel // 2
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -W % self.patch, 0, -H % self.patch))
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


# ============================================================ 4. window attention
class WindowAttention(nn.Module):
    """Attention inside w x w windows with a learned bias: blocks L, and S with a `shift`.

    Paper: Sec. 3.3, after Swin (Liu et al., 2021). Shape: (B, H, W, C) -> the same, any H, W.
    The map is filled up to whole windows [D2] and rolled up and left by `shift` [D3], so the last
    windows get pixels from the other side. Only pixels of one region attend to each other.
    """
    def __init__(self, *, dim: int, heads: int, window: int, shift: int = 0):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.table = position_table(heads, 2 * window - 1, 2 * window - 1)

    def cut(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> windows (B, rows, w, columns, w, C) of the filled and rolled map."""
        (H, W), w = x.shape[1:3], self.window
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w)) if H % w or W % w else x
        x = x.roll((-self.shift, -self.shift), (1, 2)) if self.shift else x
        return x.unflatten(2, (-1, w)).unflatten(1, (-1, w))

    def bias(self, H: int, W: int) -> Tensor:
        """The table at query - key + w - 1, minus infinity across regions: (windows, M, ww, ww)."""
        i = torch.arange(self.window, device=self.table.device)
        index = i[:, None] - i + self.window - 1  # (query, key) on one axis
        bias = self.table[:, index[:, None, :, None], index[None, :, None, :]]
        bias = bias.flatten(3).flatten(1, 2)  # (M, qy qx, ky kx)
        lower, right = (torch.arange(n, device=i.device) >= self.shift for n in (H, W))
        region = 1 + 2 * lower[:, None] + right  # 1 to 4; what fills up is 0
        region = self.cut(region[None, :, :, None]).transpose(2, 3).reshape(-1, self.window ** 2)
        return bias.masked_fill((region[:, :, None] != region[:, None])[:, None], -math.inf)

    def forward(self, x: Tensor) -> Tensor:
        (B, H, W, C), M, w = x.shape, self.heads, self.window
        qkv = self.cut(self.qkv(x)).unflatten(5, (3, M, C // M))
        rows, columns = qkv.shape[1], qkv.shape[3]
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 4)
        z = attend(q, k, v, self.bias(H, W).flatten(0, 1)[None])  # (B, windows M, w w, d)
        z = z.unflatten(2, (w, w)).unflatten(1, (rows, columns, M)).permute(0, 1, 4, 2, 5, 3, 6)
        z = z.reshape(B, rows * w, columns * w, C)
        z = z.roll((self.shift, self.shift), (1, 2)) if self.shift else z
        return self.out(z[:, :H, :W])


# ============================================================ 5. deformable attention
class OffsetNetwork(nn.Module):
    """theta_offset: how far each sampling point should move. Paper: Sec. 3.2, Fig. 2 (b).

    Depth-wise k x k convolution of stride r, layer norm [D4], GELU, 1x1 convolution without bias,
    which would shift all points alike. Shape: (B, H, W, C / G) -> (B, Hk, Wk, 2) yx, unbounded.
    """
    def __init__(self, *, dim: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        x = self.conv(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(F.gelu(self.norm(x)))


class DeformableAttention(nn.Module):
    """Attention whose keys and values are read where an offset network points. Paper: Sec. 3.2.

    Shape: (B, H, W, C) -> the same, any H, W; `size`, an int or (H, W), is that which the position
    table is made for. Raises: ValueError with argument and value.
    """
    def __init__(self, *, dim: int, heads: int, groups: int, size: int | tuple[int, int],
                 stride: int = 1, kernel: int = 5, offset_range: float = 2.0,
                 geometry: str = "paper", offsets: bool = True, position: str = "relative"):
        super().__init__()
        stage = StageConfig(dim=dim, heads=heads, blocks="D", groups=groups, stride=stride,
                            kernel=kernel, offset_range=offset_range)
        DATConfig(stages=(stage,), image_size=size, geometry=geometry, offsets=offsets,
                  position=position)  # the two check the arguments
        self.heads, self.groups, self.stride = heads, groups, stride
        self.offset_range, self.geometry, self.position = offset_range, geometry, position
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.offset = (OffsetNetwork(dim=dim // groups, kernel=kernel, stride=stride)
                       if offsets else None)
        H, W = pair(size)
        if position == "relative":
            self.table = position_table(heads, 2 * H - 1, 2 * W - 1)
        elif position == "fixed":
            self.table = position_table(heads, H, W, ceil_div(H, stride), ceil_div(W, stride))

    def points(self, q: Tensor) -> Tensor:
        """p + dp, where the keys of each group are read. Paper: Eq. 7 and dp <- s tanh(dp).

        Shape: (B, H, W, C) -> (B, G, Hk, Wk, 2). Units: (y, x) in px of the map, float32 at least:
        in bfloat16 a coordinate near 100 would be off by a quarter of a pixel.
        """
        (B, H, W, _), G = q.shape, self.groups
        Hk, Wk = ceil_div(H, self.stride), ceil_div(W, self.stride)
        like = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
        p = torch.cartesian_prod(*(cell_centres(count, length, geometry=self.geometry, like=like)
                                   for count, length in ((Hk, H), (Wk, W)))).view(Hk, Wk, 2)
        if self.offset is None:
            return p.expand(B, G, Hk, Wk, 2)
        grouped = q.unflatten(3, (G, -1)).movedim(3, 1)  # (B, G, H, W, C / G)
        raw = self.offset(grouped.flatten(0, 1)).to(like.dtype).view(B, G, Hk, Wk, 2)
        dp = [largest_offset(count, length, offset_range=self.offset_range, geometry=self.geometry)
              * raw[..., axis].tanh() for axis, (count, length) in enumerate(((Hk, H), (Wk, W)))]
        return p + torch.stack(dp, dim=-1)

    def position_bias(self, points: Tensor, size: tuple[int, int]) -> Tensor | None:
        """phi(B^; R): the table, read at all displacements query - key. Paper: Eq. 9.

        Shape: (B, G, Hk, Wk, 2) -> (B, M, N, K), or (1, M, N, K) if position="fixed". Along y the
        displacements -(H - 1) .. H - 1 stand in 2 H - 1 rows, 0 in row H - 1; along x alike.
        """
        (B, G, Hk, Wk, _), (H, W) = points.shape, size
        if self.position == "none":
            return None
        table = self.table.to(points.dtype)
        if self.position == "fixed":  # one number per query and key cell
            table = resize(table, (Hk, Wk)).permute(0, 3, 4, 1, 2)
            table = resize(table, (H, W))  # (M, Hk, Wk, H, W)
            return table.flatten(3).flatten(1, 2).transpose(1, 2)[None]
        table = resize(table, (2 * H - 1, 2 * W - 1)).unflatten(0, (G, -1))
        y, x = (cell_centres(n, n, geometry=self.geometry, like=points) + n - 1 for n in (H, W))
        queries = torch.cartesian_prod(y, x)[:, None]  # q + (H - 1): (N, 1, 2)
        index = queries - points.reshape(B * G, 1, Hk * Wk, 2)  # R: (B G, N, K, 2)
        bias = bilinear_sample(table.expand(B, *table.shape).flatten(0, 1), index)
        return bias.view(B, self.heads, H * W, Hk * Wk)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k~, v~ and points: (B, M, N, d), (B, M, K, d) twice, (B, G, Hk, Wk, 2). Eq. 6-8."""
        if x.ndim != 4 or x.shape[3] != self.q.in_features or 0 in x.shape[1:]:
            raise ValueError(f"expected (B, H, W, {self.q.in_features}), not {tuple(x.shape)}")
        (B, H, W, C), G, M = x.shape, self.groups, self.heads
        q = self.q(x)
        points = self.points(q)  # (B, G, Hk, Wk, 2) yx, px
        maps = x.permute(0, 3, 1, 2).reshape(B * G, C // G, H, W)
        sampled = bilinear_sample(maps, points.flatten(0, 1))  # (B G, C / G, Hk, Wk)
        sampled = sampled.flatten(2).view(B, C, -1).transpose(1, 2)  # x~: (B, K, C)
        k, v = self.k(sampled), self.v(sampled)
        q, k, v = (t.unflatten(2, (M, -1)).transpose(1, 2) for t in (q.flatten(1, 2), k, v))
        return q, k, v, points

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, points = self.project(x)
        z = attend(q, k, v, self.position_bias(points, x.shape[1:3]))
        return self.out(z.transpose(1, 2).reshape(x.shape))  # (B, M, N, d) -> (B, H, W, C)


# ============================================================ 6. block, network
class Block(nn.Module):
    """z' = attention(LN(z)) + z, z'' = MLP(LN(z')) + z'. Paper: Eq. 4 and 5.

    The block `letter` of stage `index`; `rate` is that of drop path. Shape: (B, H, W, C) -> same.
    """
    def __init__(self, config: DATConfig, index: int, letter: str, rate: float):
        super().__init__()
        stage, self.rate = config.stages[index], rate
        dim, hidden = stage.dim, int(stage.dim * config.mlp_ratio)
        if letter == "D":
            self.attention = DeformableAttention(
                dim=dim, heads=stage.heads, groups=stage.groups, size=config.map_sizes()[index],
                stride=stage.stride, kernel=stage.kernel, offset_range=stage.offset_range,
                geometry=config.geometry, offsets=config.offsets, position=config.position)
        else:
            self.attention = WindowAttention(dim=dim, heads=stage.heads, window=stage.window,
                                             shift=ceil_div(stage.window, 2) * (letter == "S"))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(
            expand=nn.Linear(dim, hidden), gelu=nn.GELU(), contract=nn.Linear(hidden, dim)))

    def forward(self, z: Tensor) -> Tensor:
        z = drop_path(self.attention(self.norm1(z)), self.rate, self.training) + z
        return drop_path(self.mlp(self.norm2(z)), self.rate, self.training) + z


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention. Paper: Sec. 3.3, Fig. 3, Tab. 1.

    Shape: images (B, 3, H, W) of any H, W -> logits (B, classes). Raises: ValueError if not so.
    """
    def __init__(self, config: DATConfig):
        super().__init__()
        self.config = config
        dim, patch, conv = config.stages[0].dim, config.patch, config.stem == "conv"
        if conv:
            one, two = CONV_STRIDES[patch]
            self.stem = nn.Sequential(Projection(3, dim // 2, kernel=3, stride=one), nn.GELU(),
                                      Projection(dim // 2, dim, kernel=3, stride=two))
        else:
            self.stem = Projection(3, dim, kernel=patch, stride=patch)
        depth = sum(len(stage.blocks) for stage in config.stages)
        rates = iter(torch.linspace(0, config.drop_path, depth, dtype=torch.float64).tolist())
        self.stages = nn.ModuleList()
        for i, stage in enumerate(config.stages):
            down = nn.Identity() if i == 0 else Projection(
                config.stages[i - 1].dim, stage.dim, kernel=3 if conv else 2, stride=2, bias=False)
            blocks = nn.ModuleList(Block(config, i, letter, next(rates)) for letter in stage.blocks)
            self.stages.append(nn.ModuleDict({"down": down, "blocks": blocks}))
        self.norm = nn.LayerNorm(config.stages[-1].dim)
        self.head = nn.Linear(config.stages[-1].dim, config.classes)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H', W', C), the map that enters the first stage."""
        shape, dtype = tuple(images.shape), images.dtype
        if len(shape) != 4 or shape[1] != 3 or 0 in shape[1:] or not dtype.is_floating_point:
            raise ValueError(f"images must be floating point (B, 3, H, W), not {dtype} {shape}")
        return self.stem(images.permute(0, 2, 3, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C_i, H_i, W_i) after the stages, for a detector; H_i = ceil(H / (patch 2^i))."""
        x, maps = self.embed(images), []
        for stage in self.stages:
            x = stage.down(x)
            for block in stage.blocks:
                x = block(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean(dim=(1, 2)))

    def sampling_points(self, images: Tensor) -> list[Tensor]:
        """Where each deformable block, in order, reads its keys: (y, x) in px of the image.

        Shape: (B, 3, H, W) -> one (B, G, Hk, Wk, 2) for each D block.
        """
        x, found = self.embed(images), []
        for i, stage in enumerate(self.stages):
            x, cell = stage.down(x), self.config.patch * 2 ** i  # px of the image per map px
            first = (cell - 1) / 2 if self.config.stem == "patch" else 0  # mid-cell; on a pixel
            for block in stage.blocks:
                if isinstance(block.attention, DeformableAttention):
                    q = block.attention.q(block.norm1(x))
                    found.append(first + cell * block.attention.points(q))
                x = block(x)
        return found


# ============================================================ 7. the authors' weights
OFFICIAL_NAMES = [  # (name in the release, name here), all applied, in this order
    (r"^patch_proj\.", "stem."),
    (r"^down_projs\.(\d+)\.", lambda i: f"stages.{int(i[1]) + 1}.down."),
    (r"^(stages\.\d+)\.layer_norms\.(\d+)\.norm\.",  # two for each block
     lambda i: f"{i[1]}.blocks.{int(i[2]) // 2}.norm{int(i[2]) % 2 + 1}."),
    (r"^(stages\.\d+)\.mlps\.(\d+)\.chunk\.", r"\1.blocks.\2.mlp."),
    (r"mlp\.linear1\.", "mlp.expand."),
    (r"mlp\.linear2\.", "mlp.contract."),
    (r"^(stages\.\d+)\.attns\.(\d+)\.", r"\1.blocks.\2.attention."),
    (r"attention\.proj_(qkv|q|k|v|out)\.", r"attention.\1."),
    (r"attention\.conv_offset\.", "attention.offset."),
    (r"offset\.3\.", "offset.out."),
    (r"(stem|down|offset)\.0\.", r"\1.conv."),
    (r"(stem|down|offset)\.1\.norm\.", r"\1.norm."),
    (r"attention\.(rpe_table|relative_position_bias_table)$", "attention.table"),
    (r"^cls_norm\.norm\.", "norm."),
    (r"^cls_head\.", "head."),
]


def rename_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the release under the names and in the shapes of this file; unknown names stay."""
    renamed = {}
    for name, value in state.items():
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue  # both follow from the window
        ours = name
        for pattern, new in OFFICIAL_NAMES:
            ours = re.sub(pattern, new, ours)
        if ours == name or ours in renamed:
            ours = f"{name} (not a name of the release)"
        elif name.endswith("relative_position_bias_table"):  # ((2w - 1)^2, M) there
            side = math.isqrt(len(value))
            value = value.T.reshape(-1, side, side)
        elif value.ndim == 4 and re.search(r"attention\.(q|k|v|out|offset\.out)\.", ours):
            value = value.flatten(1)  # 1x1 convolutions there
        renamed[ours] = value
    return renamed


def load_official(state_dict: dict, config: DATConfig) -> DAT:
    """A model with the authors' weights, their state dict or below "model", in "release" geometry.

    Raises: ValueError that names every key that is missing, unknown or of another shape.
    """
    model = DAT(replace(config, geometry="release"))
    try:
        model.load_state_dict(rename_official(state_dict.get("model", state_dict)))
    except RuntimeError as error:
        raise ValueError(f"not the weights of this configuration: {error}") from None
    return model


# ============================================================ 8. data
class InputError(ValueError):
    """A caller's mistake: the command line prints it as one line and exits with 2."""


SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar")
STATISTICS = {  # mean and deviation of the channels
    "shapes": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


def make_shapes(count: int, *, seed: int, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Figures of the kinds SHAPES at random place, size, angle and colour, on clutter.

    Shape: images (count, 3, side, side) uint8, labels (count,), masks (count, side, side) bool.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    pixel = torch.arange(side) + 0.5
    blotches = F.interpolate(uniform(0, 0.5, 3, 4, 4), (side, side), mode="bilinear")
    images = blotches + uniform(-0.05, 0.05, 3, side, side)
    for _ in range(8):  # clutter: small coloured boxes
        y, x = uniform(0, side, 2, 1, 1, 1).unbind(1)
        height, width = uniform(0.5, side / 12, 2, 1, 1, 1).unbind(1)
        box = ((pixel[:, None] - y).abs() < height) & ((pixel - x).abs() < width)
        images = torch.where(box, uniform(0, 0.6, 3, 1, 1), images)

    radius, angle = uniform(0.2, 0.36, 1, 1) * side, uniform(0, 2 * math.pi, 1, 1)
    y, x = (radius + (side - 2 * radius) * uniform(0, 1, 1, 1) for _ in range(2))
    y, x = pixel[:, None] - y, pixel - x  # from the figure's centre
    u = (x * angle.cos() + y * angle.sin()) / radius  # along its axes
    v = (y * angle.cos() - x * angle.sin()) / radius
    a, b, distance, around = u.abs(), v.abs(), torch.hypot(u, v), torch.atan2(v, u)
    third = 2 * math.pi / 3
    figures = torch.stack([  # in the order of SHAPES
        distance < 0.9,
        (distance < 1) & (distance > 0.55),
        torch.maximum(a, b) < 0.75,
        distance * (around % third - third / 2).cos() < 0.5,
        (torch.minimum(a, b) < 0.28) & (torch.maximum(a, b) < 0.95),
        distance < 0.7 + 0.3 * (5 * around).cos(),
        (distance < 1) & (torch.hypot(u - 0.55, v) > 0.75),
        (a < 1) & (b < 0.3)])
    labels = torch.randint(len(SHAPES), (count,), generator=generator)
    masks = figures[labels, torch.arange(count)]
    colour = uniform(0.5, 1, 3, 1, 1) + uniform(-0.05, 0.05, 3, side, side)
    images = torch.where(masks[:, None], colour, images)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks


def read_image(path: str) -> object:
    """A Pillow image. Raises: InputError that names the file."""
    from PIL import Image
    try:
        return Image.open(path).convert("RGB")
    except Exception as error:  # decoders raise all kinds
        raise InputError(f"{path} is no readable image ({error}): replace or remove it") from None


def load_dataset(name: str, data: str | None, train: bool) -> tuple[Sequence, tuple[str, ...]]:
    """(image, label) pairs of the training or test half, and the classes. Raises: InputError."""
    if name == "shapes":  # 10,000 or 2,000
        images, labels = map(torch.cat, zip(*(
            make_shapes(2_000, seed=seed)[:2] for seed in (range(1, 6) if train else [0]))))
        return list(zip(images, labels.tolist())), SHAPES
    from torchvision import datasets
    root, cifar = Path(data or "data"), getattr(datasets, name.upper(), None)
    wanted = (f"{cifar.filename} or {cifar.base_folder}/, from {cifar.url}," if cifar else
              "train/<class>/<images> and val/<class>/<images>")
    try:
        if data and not root.is_dir():
            raise FileNotFoundError("no such folder")
        found = (cifar(root, train, download=True) if cifar else
                 datasets.ImageFolder(root / ("train" if train else "val"), loader=read_image))
    except Exception as error:  # files from outside can raise any
        raise InputError(f"{root}/ does not hold {name} ({error}): put {wanted} there (--data), or "
                         "try --train shapes, which needs no files") from None
    return found, tuple(found.classes)


class Parts(torch.utils.data.Dataset):
    """Parts of batches: (seed, indices) -> images (b, 3, size, size), normalised, labels (b,).

    A part's draws follow from its seed, whichever process makes it. `augment` None: as for a
    test; 0: crop and flip; 1: RandAugment and erasing too.
    """
    def __init__(self, name: str, samples: Sequence, size: int, augment: int | None):
        from torchvision.transforms import InterpolationMode, v2
        bicubic, photos = InterpolationMode.BICUBIC, name == "imagenet"
        steps = [v2.ToImage(), v2.ToDtype(torch.float32, True), v2.Normalize(*STATISTICS[name])]
        if augment:  # strength 9 of 10, as in the release; torchvision's default is 9 of 30
            steps = [v2.RandAugment(2, 9, num_magnitude_bins=11), *steps,
                     v2.RandomErasing(0.25, value="random")]
        if augment is not None:
            crop = (v2.RandomResizedCrop(size, interpolation=bicubic) if photos else
                    v2.RandomCrop(size, padding=4))
            steps = [crop, v2.RandomHorizontalFlip(), *steps]
        elif photos:  # square: 256 for 224, 438 for 384
            steps = [v2.Resize([size * 256 // 224] * 2, bicubic), v2.CenterCrop(size), *steps]
        self.samples, self.transform = samples, v2.Compose(steps)

    def __getitem__(self, part: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        seed, indices = part
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            images, labels = zip(*(self.samples[i] for i in indices))
            return torch.stack([self.transform(i) for i in images]), torch.tensor(labels)

    def load(self, parts: list, workers: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=parts,
                                           num_workers=workers, pin_memory=torch.cuda.is_available())


# ============================================================ 9. training
PROGRESS = ("epoch", "loss", "seconds", "history")  # of a run, in its checkpoint


def make_recipe(args: argparse.Namespace, model: str) -> dict:
    """What defines a run: what suits data set and model, for imagenet the release's; then flags.

    batch_size: of an update, in all processes; parts: of a batch, processes times --accumulate.
    lr: the highest; warmup: share of the run; floor: last rate / lr; clip: of the gradient's norm.
    """
    found = {"warmup": 1 / 20, "floor": 1 / 100, "clip": 5.0, "weight_decay": 0.05}
    if args.train == "imagenet":
        found |= {"epochs": 300, "batch_size": 1024, "lr": 5e-4, "warmup": 20 / 300}
        if args.checkpoint:  # fine-tuning
            found |= {"epochs": 30, "batch_size": 512, "lr": 2e-6, "warmup": 0.0, "floor": 1 / 20,
                      "weight_decay": 1e-8}
        elif model.startswith("dat-b"):
            found |= {"lr": 4e-4, "warmup": 50 / 300, "floor": 1 / 80, "clip": 1.0}
        found["lr"] *= (args.batch_size or found["batch_size"]) / 512
    elif model == "cifar":  # for a GPU
        found |= {"epochs": 20 if args.train == "shapes" else 300, "batch_size": 256, "lr": 1e-3}
    elif args.train == "shapes":
        found |= {"epochs": 4, "batch_size": 64, "lr": 2e-3}
    else:
        found |= {"epochs": 6, "batch_size": 128, "lr": 2e-3}
    flags = {flag: getattr(args, flag) for flag in ("epochs", "batch_size", "lr")}
    return found | {flag: value for flag, value in flags.items() if value is not None} | {
        "train": args.train, "model": model, "seed": args.seed or 0, "float32": args.float32,
        "parts": processes()[1] * (args.accumulate or 1)}


def learning_rate(step: int, *, steps: int, warmup: float, peak: float, floor: float) -> float:
    """Linear warm-up from a tenth of the last rate, then half a cosine down to it [D8].

    `warmup`: share of the run, but at least 50 steps if it has 200. `floor`: last rate / peak.
    """
    warm = max(int(steps * warmup), min(50, steps // 4)) if warmup else 0
    if step < warm:
        return peak * (floor / 10 + (1 - floor / 10) * step / warm)
    progress = min(1, (step - warm) / max(1, steps - warm))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """For AdamW: no decay of biases, norms and position tables. Source: release."""
    groups = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith("table")
        groups[weight_decay if decays else 0.0].append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def seed_of(*place: int) -> int:
    """A seed that follows from the run's seed and a place in the run alone."""
    return random.Random(repr(place)).getrandbits(63)


def autocast(device: torch.device, float32: bool) -> torch.autocast:
    """Matrix products in bfloat16 where hardware multiplies it; weights keep their type."""
    fast = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
            device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast and not float32)


def processes() -> tuple[int, int]:
    """(rank of this process, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@torch.no_grad()
def evaluate(model: nn.Module, test: Parts, workers: int, float32: bool) -> tuple[float, float]:
    """Top-1 and top-5 accuracy. Each process tests a share; no image is counted twice."""
    model.eval()
    (rank, world), device = processes(), model.head.weight.device
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    parts = torch.arange(rank, len(test.samples), world).split(100)
    for images, labels in test.load([(0, part.tolist()) for part in parts], workers):
        with autocast(device, float32):
            logits = model(images.to(device))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
    if world > 1:
        dist.all_reduce(counts)
    top1, top5 = (counts / len(test.samples)).tolist()
    return top1, top5


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it: at any moment `path` is the old one or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error}); the one before is kept") from None


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of dat.py, or {"model": weights} of the authors; runs nothing. InputError."""
    try:  # the authors' files hold their settings, a node of yacs, beside the weights
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        if "cls_head.weight" in found["model"]:
            return {"model": rename_official(found["model"])}
        found["config"] = DATConfig(**found["config"])
        DAT(found["config"]).load_state_dict(found["model"])
    except Exception as error:  # a stranger's file can raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path}: expected a checkpoint of dat.py or the authors', got {reason}") from None
    return found


def load_for_fine_tuning(state: dict[str, Tensor], config: DATConfig) -> DAT:
    """A model of `config` with the weights `state`; tables are resized [D2], a head of other
    classes starts anew. Raises: InputError."""
    model, state = DAT(config), dict(state)
    for name, ours in model.state_dict().items():
        if name in state and name.endswith("table") and ours.ndim == 3:
            state[name] = resize(state[name], ours.shape[1:])
        if name in state and name.startswith("head.") and len(state[name]) != len(ours):
            state[name] = ours
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError("--checkpoint does not fit --model: " + " ".join(str(error).split())) from None
    return model


def start_run(args: argparse.Namespace, device: torch.device, classes: tuple) -> tuple[DAT, dict]:
    """Model and recipe of a new run. Raises: InputError."""
    source = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    if source and "config" not in source and not args.model:
        raise InputError(f"{args.checkpoint} is the authors': name its variant with --model")
    small = "cifar" if device.type == "cuda" else "cifar-nano"
    name = (args.model or source and source["recipe"]["model"]
            or ("dat-t" if args.train == "imagenet" else small))
    recipe = make_recipe(args, name)
    size = VARIANTS[name].image_size if args.train == "imagenet" else 32
    config = replace(VARIANTS[name], classes=len(classes), image_size=size)
    torch.manual_seed(recipe["seed"])
    if not source:
        return DAT(config), recipe
    kept = ({key: getattr(source["config"], key) for key in ("geometry", "offsets", "position")}
            if "config" in source else {"geometry": "release"})
    return load_for_fine_tuning(source["model"], replace(config, **kept)), recipe


def resume_run(args: argparse.Namespace, classes: tuple) -> tuple[DAT, dict, dict]:
    """Model, recipe and checkpoint of the run in --out. Raises: InputError."""
    if not args.out or args.checkpoint:
        raise InputError("--resume takes --out DIR, the folder of the run, and no --checkpoint")
    path = Path(args.out, "last.pt")
    found = load_checkpoint(path)
    given = vars(args) | {"float32": args.float32 or None,
                          "parts": args.accumulate and args.accumulate * processes()[1]}
    for name, value in found["recipe"].items():
        if given.get(name) not in (None, value):
            raise InputError(f"{path} has {name} {value}, not {given[name]}: leave that flag out, "
                             "or start another run")
    if found["classes"] != classes:
        raise InputError(f"{path} was trained on other classes than --data holds")
    model = DAT(found["config"])
    model.load_state_dict(found["model"])
    return model, found["recipe"], found


def make_folder(args: argparse.Namespace, model: str) -> Path:
    """--out, new or empty but to resume; without it runs/DATA-MODEL-N, new. Raises: InputError."""
    fresh = (Path(f"runs/{args.train}-{model}-{n}") for n in itertools.count(1))
    out = Path(args.out) if args.out else next(path for path in fresh if not path.exists())
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error}") from None
    if any(out.iterdir()) and not args.resume:
        raise InputError(f"--out {out} is not empty: choose another folder, or --resume that run")
    return out


def train(args: argparse.Namespace, device: torch.device) -> None:
    """--train: a run, new or resumed, to its end. Raises: InputError."""
    from torchvision.transforms import v2
    rank, world = processes()
    if rank > 0:
        dist.barrier()  # rank 0 downloads
    samples, classes = load_dataset(args.train, args.data, True)
    test_samples, test_classes = load_dataset(args.train, args.data, False)
    if rank == 0 and world > 1:
        dist.barrier()
    if classes != test_classes:
        alone = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise InputError(f"{args.data}: expected the same classes in train and val, not {alone} in "
                         "one of them")
    found = {"epoch": 0, "loss": 0.0, "seconds": 0.0, "history": []}
    if args.resume:
        model, recipe, found = resume_run(args, classes)
    else:
        model, recipe = start_run(args, device, classes)
    run = SimpleNamespace(**recipe, **{name: found[name] for name in PROGRESS})
    steps, photos, size = len(samples) // run.batch_size, run.train == "imagenet", model.config.image_size
    if steps == 0 or run.batch_size % run.parts or run.parts % world:
        raise InputError(f"--batch-size {run.batch_size}: expected at most {len(samples)} and a "
                         f"multiple of {run.parts}, processes ({world}) times --accumulate")
    data = Parts(run.train, samples, size, int(photos or run.epochs >= 60))
    test = Parts(run.train, test_samples, size, None)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(classes)),
                           v2.CutMix(alpha=1.0, num_classes=len(classes))])
    mixed = 0.9 * steps * run.epochs if photos or run.epochs >= 100 else 0  # the first steps
    model = model.to(device, memory_format=torch.channels_last)  # before the optimiser
    forward = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if world > 1 else forward
    optimizer = torch.optim.AdamW(parameter_groups(model, run.weight_decay), fused=True)
    if args.resume:
        optimizer.load_state_dict(found["optimizer"])
    out = make_folder(args, run.model) if rank == 0 else None
    print(f"{run.train}: {len(samples):,} images to train on, {len(test_samples):,} to test on, "
          f"{len(classes)} classes\n{run.model}: {sum(p.numel() for p in model.parameters()):,} "
          f"parameters; {run.epochs} epochs of {steps} steps, batch {run.batch_size}, lr {run.lr:g}"
          f"\non {world} x {device}, {autocast(device, run.float32).fast_dtype}, into {out}/ (change "
          "it by --model --epochs --batch-size --lr --device --float32 --out)", flush=True)

    def save() -> None:
        if rank == 0:
            rows = [("epoch", "step", "loss", "test_accuracy", "seconds"), *run.history]
            write_atomically(out / "metrics.csv", "".join(
                ",".join(map(str, row)) + "\n" for row in rows).encode())
            content, (mean, std) = io.BytesIO(), STATISTICS[run.train]
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "config": asdict(model.config), "recipe": recipe, "classes": classes,
                        "mean": mean, "std": std, **{name: getattr(run, name) for name in PROGRESS}},
                       content)
            write_atomically(out / "last.pt", content.getvalue())

    save()
    start = shown = time.monotonic() - run.seconds
    while True:
        if len(run.history) < run.epoch:  # trained, not yet tested
            top1, top5 = evaluate(model, test, args.workers, run.float32)
            run.seconds = time.monotonic() - start
            run.history.append((run.epoch, run.epoch * steps, run.loss, top1, run.seconds))
            print(f"epoch {run.epoch}/{run.epochs}  test accuracy {top1:.2%}, top-5 {top5:.2%}",
                  flush=True)
            save()
        if run.epoch == run.epochs:
            return
        place = run.seed, run.epoch
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed_of(*place)))
        order = order[:steps * run.batch_size].view(steps, run.parts, -1).tolist()
        batches = iter(data.load([(seed_of(*place, step, part), order[step][part])
                                  for step in range(steps) for part in range(rank, run.parts, world)],
                                 args.workers))
        model.train()
        began, total, finite = time.monotonic(), torch.zeros((), device=device), True
        for step in range(steps):
            done = run.epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, steps=run.epochs * steps, warmup=run.warmup,
                                            peak=run.lr, floor=run.floor)
            optimizer.zero_grad()
            for part in range(rank, run.parts, world):
                images, labels = (t.to(device, non_blocking=True) for t in next(batches))
                torch.manual_seed(seed_of(*place, step, part, 1))  # for mixing and drop path
                images, labels = mix(images, labels) if done < mixed else (images, labels)
                last = part + world >= run.parts  # processes exchange gradients once a step
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    with autocast(device, run.float32):
                        loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
                    (loss * world / run.parts).backward()
                total += loss.detach() / run.parts
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            optimizer.step()
            finite &= norm.isfinite() & total.isfinite()
            now = time.monotonic()
            if now - shown > 10 or step == steps - 1:
                if not finite:
                    raise InputError(f"epoch {run.epoch + 1}: loss or gradient is not finite; try a "
                                     f"lower --lr than {run.lr:g}; last.pt holds epoch {run.epoch}")
                shown, speed = now, (step + 1) / (now - began)
                left = ((run.epochs - run.epoch) * steps - step - 1) / speed
                print(f"epoch {run.epoch + 1}/{run.epochs}  step {step + 1}/{steps}  loss {loss:.3f}  "
                      f"{speed * run.batch_size:,.0f} images/s  {left:.0f} s left", flush=True)
        if world > 1:
            dist.all_reduce(total)
        run.epoch, run.loss = run.epoch + 1, total.item() / steps
        run.seconds = time.monotonic() - start
        save()


# ============================================================ 10. command line
def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """--eval: prints the test accuracy of --checkpoint. Raises: InputError."""
    if not args.checkpoint:
        raise InputError("--eval needs --checkpoint FILE")
    found = load_checkpoint(args.checkpoint)
    recipe, state = found.get("recipe", {"model": args.model, "float32": False}), found["model"]
    if args.model != recipe["model"] and (args.model or "config" not in found):
        raise InputError(f"{args.checkpoint} holds {recipe['model'] or 'weights of the authors'}: "
                         f"name its variant with --model, not {args.model}")
    config = found.get("config") or replace(VARIANTS[args.model], geometry="release",
                                            classes=len(state.get("head.weight", "")))
    samples, classes = load_dataset(args.eval, args.data, False)
    if config.classes != len(classes) or found.get("classes", classes) != classes:
        raise InputError(f"{args.checkpoint} has {config.classes} classes, other ones than the "
                         f"{len(classes)} of {args.eval}")
    model = DAT(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{args.checkpoint} is not {args.model}: {' '.join(str(error).split())}") from None
    test = Parts(args.eval, samples, config.image_size, None)
    top1, top5 = evaluate(model.to(device), test, args.workers, args.float32 or recipe["float32"])
    print(f"test accuracy {top1:.2%}, top-5 {top5:.2%}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (python dat.py --help lists the flags)")


def at_least(low: float, kind: type = int):
    """A converter for argparse, which names it in its errors."""
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value < 2 ** 31:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} (expected {low:g} or more)"
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for a caller's mistake, 130 for Ctrl-C."""
    parser = Parser(prog="dat.py", description="Vision Transformer with Deformable Attention.",
                    epilog="No data at hand? python dat.py --train shapes makes its own.")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--train", choices=STATISTICS, help="imagenet: any folder of images")
    task.add_argument("--eval", choices=STATISTICS, help="test accuracy of --checkpoint")
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="last.pt or the authors' file: to evaluate or start from")
    add("--data", metavar="DIR", help="of CIFAR (default: data), or of train/ and val/<class>/<images>")
    add("--model", choices=VARIANTS)
    add("--epochs", type=at_least(1))
    add("--batch-size", type=at_least(1), help="of an update, in all processes together")
    add("--lr", type=at_least(1e-12, float), help="the highest learning rate")
    add("--seed", type=at_least(0))
    add("--accumulate", type=at_least(1), metavar="N", help="compute a batch in N parts")
    add("--workers", type=at_least(0), help="processes that load images")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    add("--out", metavar="DIR", help="of the run (default: runs/DATA-MODEL-1)")
    add("--float32", action="store_true", help="no bfloat16")
    add("--compile", action="store_true", help="torch.compile the model")
    try:
        args = parser.parse_args(arguments)
        if not args.train and not args.eval:
            parser.print_help()
            return 0
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        if args.device == "cuda" and not cuda or args.device == "mps" and not mps:
            raise InputError(f"--device {args.device}: PyTorch finds none here; leave the flag out")
        name = args.device if args.device != "auto" else "cuda" if cuda else "cpu"
        device, world = torch.device(name), int(os.environ.get("WORLD_SIZE", 1))
        if world > 1:  # started by torchrun
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if name == "cuda" else "gloo")
            sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
        if args.workers is None:
            args.workers = max(1, os.cpu_count() // world) if name == "cuda" else 0
        (train if args.train else evaluate_checkpoint)(args, device)
        return 0
    except InputError as error:  # a loader's process wraps it: the last line is ours
        print("dat.py:", str(error).splitlines()[-1].split("InputError: ")[-1], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dat.py: stopped; --resume with --out goes on after the last epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
