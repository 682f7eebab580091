# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy", "matplotlib", "pytest", "hypothesis"]
# ///
"""DAT in one file: Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    python dat.py --train shapes      # generated images, no download: two minutes on two cores
    python dat.py --train cifar10     # downloads the archive once, trains, reports test accuracy
    pytest                            # the properties, and parity with reference_numpy.py

Paper: https://arxiv.org/abs/2201.00520. Where its equations are computed:

    (1)-(3) attend    (4)-(5) Block.forward    (6) DeformableAttention.project
    (7) OffsetNetwork, DeformableAttention.points    (8) bilinear_sample
    (9) DeformableAttention.position_bias    (10) lab/cost.py    Sec. 3.3 DAT    Tab. 1 VARIANTS

Symbols. Feature maps are channels-last, (B, H, W, C), everywhere:

    B batch   H W height, width of a map   C channels   M heads   d = C / M   G offset groups
    N = H W queries   Hk Wk grid of sampling points   K = Hk Wk keys   r = H / Hk stride
    s offset range   k kernel of the offset network   w window side
    Coordinates are (y, x) in pixels (px) of the map: 0 is the centre of the first pixel.

Departures from the paper [P] and from the authors' release at 566a593 [R]:

    [D1] geometry="paper": with r = 1 points start on whole pixels. The release's start between
         them and blur; its weights need geometry="release", which load_official sets. [R]
    [D2] Any image size: zeros fill up patches and windows at the bottom and right and are
         masked; position tables are resized bicubically. [P, R]
    [D3] Shifted windows are cut at ceil(w / 2), as in the release (Swin: floor). [P]
    [D4] The offset network has the release's layer norm before GELU. [P]
    [D5] offsets=False and position="fixed" work; in the release they crash. [R]
    [D6] stem="conv": the release's overlapping 3x3 convolutions, not used for ImageNet. [P]
    [D7] Weights start from PyTorch's defaults, position tables at deviation 0.01. [P]
    [D8] RandAugment without random magnitude, no mixing in the last tenth of a run, a cosine
         that starts where warm-up ends. [R]
"""
from __future__ import annotations

import argparse
import contextlib
import gc
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
            raise ValueError(f"stem='conv' with patch={self.patch}, dim={stages[0].dim}: patch "
                             "must be 1, 2 or 4 and dim even")

    def map_sizes(self, image_size: int | Sequence[int] | None = None) -> list[tuple[int, int]]:
        """(H, W) of the map of each stage for an image of `image_size` (default: configured)."""
        H, W = pair(self.image_size if image_size is None else image_size)
        cells = [self.patch * 2 ** i for i in range(len(self.stages))]
        return [(ceil_div(H, cell), ceil_div(W, cell)) for cell in cells]


def _variant(dim: int, heads: int, blocks: tuple, groups: tuple, window: int, **rest) -> DATConfig:
    """Widths and heads double from stage to stage, kernels are 9, 7, 5, 3. Paper: Tab. 1."""
    return DATConfig(**rest, stages=tuple(
        StageConfig(dim=dim * 2 ** i, heads=heads * 2 ** i, blocks=letters, groups=groups[i],
                    kernel=2 * (len(blocks) - i) + 1, window=window)
        for i, letters in enumerate(blocks)))


TINY, DEEP = ("LS", "LS", "LD" * 3, "LD"), ("LS", "LS", "LD" * 9, "LD")
NARROW, WIDE = (None, None, 3, 6), (None, None, 4, 8)  # groups
SMALL = {"image_size": 32, "stem": "conv", "classes": 10}
VARIANTS = {  # in the paper's geometry; published weights need the release's [D1]
    "dat-t": _variant(96, 3, TINY, NARROW, 7, drop_path=0.2),
    "dat-s": _variant(96, 3, DEEP, NARROW, 7, drop_path=0.3),
    "dat-b": _variant(128, 4, DEEP, WIDE, 7, drop_path=0.5),
    "dat-b-384": _variant(128, 4, DEEP, WIDE, 12, drop_path=0.5, image_size=384),
    "cifar": _variant(48, 3, TINY, NARROW, 4, patch=1, drop_path=0.1, **SMALL),  # half of DAT-T
    "cifar-nano": _variant(48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), 4, **SMALL)}  # for a CPU


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

    It is s / 2 cells of H / Hk px, or (H - 1) / Hk px if "release": the release's axis is 2 long,
    from -1 to 1, so s counts half cells. (The paper names no unit.)
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
    bias = None if bias is None else bias.to(q.dtype)
    if q.is_cpu:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        return scores.softmax(dim=-1) @ v
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
        queries = torch.cartesian_prod(y, x)[:, None]  # q + (H - 1, W - 1): (N, 1, 2)
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
        sampled = sampled.flatten(2).unflatten(0, (B, G)).flatten(1, 2).transpose(1, 2)  # (B, K, C)
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
        rates = iter([config.drop_path * i / max(depth - 1, 1) for i in range(depth)])
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
        """The maps (B, C_i, H_i, W_i) after the stages: a feature pyramid for a detector."""
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
    if name == "shapes":
        images, labels, _ = make_shapes(10_000 if train else 2_000, seed=int(train))
        return list(zip(images, labels.tolist())), SHAPES
    from torchvision import datasets
    root, cifar = Path(data or "data"), getattr(datasets, name.upper(), None)
    wanted = (f"{cifar.filename} or {cifar.base_folder}/ from {cifar.url}" if cifar else
              "train/<class>/<images> and val/<class>/<images>")
    try:
        if data and not root.is_dir():
            raise FileNotFoundError("no such folder")
        found = (cifar(root, train, download=True) if cifar else
                 datasets.ImageFolder(root / ("train" if train else "val"), loader=read_image))
    except Exception as error:  # files from outside can raise any
        raise InputError(f"--data {root} has no {name} ({error}): put {wanted} there, or try "
                         "--train shapes, which needs no files") from None
    if cifar:  # tensors, not Pillow images: half the time of a sample
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        return list(zip(images, found.targets)), tuple(found.classes)
    return found, tuple(found.classes)


class Parts(torch.utils.data.Dataset):
    """Parts of batches: (seed, indices) -> images (b, 3, size, size), normalised, labels (b,).

    All draws follow from the seed. `augment` None: test; 0: crop, flip; 1: RandAugment, erasing.
    """
    def __init__(self, name: str, samples: Sequence, size: int, augment: int | None):
        from torchvision.transforms import InterpolationMode, v2
        bicubic, photos = InterpolationMode.BICUBIC, name == "imagenet"
        steps = [v2.ToImage()]
        if augment:  # strength 9 of 10, as in the release; torchvision's default is 9 of 30
            steps = [v2.RandAugment(2, 9, num_magnitude_bins=11), *steps]
        if augment is not None:
            crop = (v2.RandomResizedCrop(size, interpolation=bicubic) if photos else
                    v2.RandomCrop(size, padding=4))
            steps = [crop, v2.RandomHorizontalFlip(), *steps]
        elif photos:  # square: 256 for 224, 438 for 384
            steps = [v2.Resize([size * 256 // 224] * 2, bicubic), v2.CenterCrop(size), *steps]
        self.samples, self.transform = samples, v2.Compose(steps)
        self.erase = v2.RandomErasing(0.25, value="random") if augment else nn.Identity()
        self.normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                                     v2.Normalize(*STATISTICS[name])])

    def __getitem__(self, part: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(part[0])
            images, labels = zip(*(self.samples[i] for i in part[1]))
            images = self.normalise(torch.stack([self.transform(i) for i in images]))
            return torch.stack([self.erase(i) for i in images]), torch.tensor(labels)

    def load(self, parts: list, workers: int) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self, None, sampler=parts, num_workers=workers,
                                           pin_memory=torch.cuda.is_available())


# ============================================================ 9. training
RECIPES = {  # epochs, batch, highest rate (imagenet: for a batch of 512), warm-up as a share of the
    "shapes": (4, 64, 2e-3, 0.05, 0.01, 5.0, 0.05),  # run, last / highest rate, clip, weight decay
    "shapes, cifar": (20, 256, 1e-3, 0.05, 0.01, 5.0, 0.05),  # the second name is the model's
    "cifar": (6, 128, 2e-3, 0.05, 0.01, 5.0, 0.05),
    "cifar, cifar": (300, 256, 1e-3, 0.05, 0.01, 5.0, 0.05),
    "imagenet": (300, 1024, 5e-4, 20 / 300, 0.01, 5.0, 0.05),  # the release's, as the two below
    "imagenet, dat-b": (300, 1024, 4e-4, 50 / 300, 1 / 80, 1.0, 0.05),
    "imagenet, fine-tuning": (30, 512, 2e-6, 0.0, 0.05, 5.0, 1e-8)}


def make_recipe(args: argparse.Namespace, model: str) -> dict:
    """What defines a run: the flags, and RECIPES for what they leave open."""
    photos, data = args.train == "imagenet", args.train.rstrip("10")
    kind = "fine-tuning" if photos and args.checkpoint else model.removesuffix("-384")
    names = ("epochs", "batch_size", "lr", "warmup", "floor", "clip", "weight_decay")
    recipe = dict(zip(names, RECIPES.get(f"{data}, {kind}", RECIPES[data])))
    recipe["lr"] *= (args.batch_size or recipe["batch_size"]) / 512 if photos else 1
    flags = {name: value for name, value in vars(args).items() if value is not None}
    return {name: flags.get(name, value) for name, value in recipe.items()} | {
        "train": args.train, "model": model, "checkpoint": args.checkpoint, "seed": args.seed or 0,
        "float32": args.float32, "parts": args.world * (args.accumulate or 1)}


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


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in PyTorch 2.6
    return device.type == "cpu" and capabilities.get("avx512_bf16", False)


@torch.no_grad()
def evaluate(model: DAT, test: Parts, args: argparse.Namespace, bfloat16: bool) -> list[float]:
    """Top-1 and top-5 accuracy. Each process tests a share; no image is counted twice."""
    device, total = next(model.parameters()).device, len(test.samples)
    counts, model = torch.zeros(2, dtype=torch.int64, device=device), model.eval()
    parts = torch.arange(args.rank, total, args.world).split(100)
    for images, labels in test.load([(0, part.tolist()) for part in parts], args.workers):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            best = model(images.to(device)).topk(min(5, model.config.classes)).indices
        hits = best == labels.to(device)[:, None]
        counts += torch.stack([hits[:, 0].sum(), hits.sum()])
    if args.world > 1:
        dist.all_reduce(counts)
    return [count / total for count in counts.tolist()]


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
    """A checkpoint of dat.py, or {"model": weights} of the authors. Raises: InputError."""
    try:  # the authors' files hold their settings, a node of yacs, beside the weights
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        if "cls_head.weight" in found["model"]:
            return {"model": rename_official(found["model"])}
        keys = ("model", "recipe", "optimizer", "classes", "epoch", "loss", "seconds", "history")
        return {key: found[key] for key in keys} | {
            "config": DATConfig(**found["config"]), "name": found["recipe"]["model"]}
    except Exception as error:  # a stranger's file can raise any
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} is no checkpoint of dat.py or the authors: {reason}") from None


def load_for_fine_tuning(state: dict[str, Tensor], config: DATConfig) -> dict[str, Tensor]:
    """Weights for `config`: tables of another size resized [D2], a head of other classes new."""
    state = dict(state)
    for name, ours in DAT(config).state_dict().items():
        if name in state and name.endswith("table") and ours.ndim == 3:
            state[name] = resize(state[name], ours.shape[1:])
        if name in state and name.startswith("head.") and len(state[name]) != len(ours):
            state[name] = ours
    return state


def load_model(args: argparse.Namespace, classes: tuple) -> tuple[DAT, dict, dict]:
    """The model, recipe and checkpoint that the flags ask for. Raises: InputError."""
    path = Path(args.out, "last.pt") if args.resume else args.checkpoint
    found, photos = load_checkpoint(path) if path else {}, "imagenet" in (args.train, args.eval)
    small, tune = "cifar" if args.device == "cuda" else "cifar-nano", args.train and not args.resume
    name = args.model or found.get("name") or ("dat-t" if photos else small)
    if found and not args.model and "name" not in found:
        raise InputError(f"{path} is of the authors: choose its variant with --model")
    if tune or "config" not in found:
        kept = {"geometry": "release"} if found else {}
        if "config" in found:
            kept = {field: getattr(found["config"], field)
                    for field in ("geometry", "offsets", "position")}
        config = replace(VARIANTS[name], classes=len(classes), **kept,
                         image_size=VARIANTS[name].image_size if photos else 32)
        recipe = make_recipe(args, name) if tune else {"float32": args.float32, "seed": 0}
    else:
        config, recipe = found["config"], found["recipe"]
        given = vars(args) | {"parts": args.accumulate and args.accumulate * args.world,
                              "float32": args.float32 or None}
        for flag in recipe if args.resume else ["model"]:
            if given.get(flag) not in (None, recipe[flag]):
                raise InputError(f"{path} has {flag} {recipe[flag]}, not {given[flag]}: leave that "
                                 "flag out, or start another run")
        if found["classes"] != classes:
            raise InputError(f"{path} has {config.classes} classes, other ones than the data")
    torch.manual_seed(seed_of(recipe["seed"]))
    model, state = DAT(config), found.get("model")
    try:
        if found:
            model.load_state_dict(load_for_fine_tuning(state, config) if tune else state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not fit {name}, choose by --model: {reason}") from None
    model = model.to(args.device, memory_format=torch.channels_last)  # before the optimiser
    return model, recipe, found


def train(args: argparse.Namespace) -> None:
    """--train: a run, new or resumed, to its end. Raises: InputError."""
    from torchvision.transforms import v2
    if args.rank > 0:
        dist.barrier()  # rank 0 downloads
    (samples, classes), (test_samples, test_classes) = (
        load_dataset(args.train, args.data, half) for half in (True, False))
    if args.rank == 0 and args.world > 1:
        dist.barrier()
    if classes != test_classes:
        alone = ", ".join(sorted(set(classes) ^ set(test_classes))[:5])
        raise InputError(f"--data {args.data}: train and val need the same classes, see {alone}")
    model, recipe, found = load_model(args, classes)
    run, device, size = SimpleNamespace(**recipe), model.head.weight.device, model.config.image_size
    photos, steps = run.train == "imagenet", len(samples) // run.batch_size
    if steps == 0 or run.batch_size % run.parts or run.parts % args.world:
        raise InputError(f"--batch-size {run.batch_size}: expected at most {len(samples)} and a "
                         f"multiple of {run.parts}, processes ({args.world}) times --accumulate")
    data = Parts(run.train, samples, size, int(photos or run.epochs >= 60))  # see lab/RESULTS.md
    test = Parts(run.train, test_samples, size, None)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(classes)),
                           v2.CutMix(alpha=1.0, num_classes=len(classes))])
    mixed_steps = 0.9 * steps * run.epochs if photos or run.epochs >= 100 else 0
    bfloat16 = has_bfloat16(device) and not run.float32
    forward = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
    forward = nn.parallel.DistributedDataParallel(forward) if args.world > 1 else forward
    optimizer = torch.optim.AdamW(parameter_groups(model, run.weight_decay), fused=True)
    now = {"epoch": 0, "loss": 0.0, "seconds": 0.0, "history": []}
    if args.resume:
        optimizer.load_state_dict(found["optimizer"])
        now = {key: found[key] for key in now}
    new = (Path(f"runs/{run.train}-{run.model}-{n}") for n in itertools.count(1))
    out = Path(args.out) if args.out else next(path for path in new if not path.exists())
    if args.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()) and not args.resume:
            raise InputError(f"--out {out} is not empty: choose another, or --resume that run")
    print(f"{run.train}: {len(samples):,} images to train on, {len(test_samples):,} to test on, "
          f"{len(classes)} classes\n{run.model}: {sum(p.numel() for p in model.parameters()):,} "
          f"parameters; {run.epochs} epochs of {steps} steps, batch {run.batch_size}, lr {run.lr:g}"
          f"\non {args.world} x {device} in {'bfloat16' if bfloat16 else 'float32'}, into {out}/  "
          "(flags: --model --epochs --batch-size --lr --device --float32 --out)", flush=True)

    def save() -> None:
        if args.rank == 0:
            rows = [("epoch", "step", "loss", "test_accuracy", "seconds"), *now["history"]]
            text, content = "".join(",".join(map(str, row)) + "\n" for row in rows), io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "config": asdict(model.config), "recipe": recipe, "classes": classes,
                        "mean": STATISTICS[run.train][0], "std": STATISTICS[run.train][1], **now},
                       content)
            write_atomically(out / "metrics.csv", text.encode())
            write_atomically(out / "last.pt", content.getvalue())

    save()
    start = shown = time.monotonic() - now["seconds"]
    while True:
        epoch = now["epoch"]
        if len(now["history"]) < epoch:  # trained, not yet tested
            top1, top5 = evaluate(model, test, args, bfloat16)
            now["seconds"] = time.monotonic() - start
            now["history"].append((epoch, epoch * steps, now["loss"], top1, now["seconds"]))
            print(f"epoch {epoch}/{run.epochs}  test accuracy {top1:.2%}, top-5 {top5:.2%}",
                  flush=True)
            save()
        if epoch == run.epochs:
            return
        draws = torch.Generator().manual_seed(seed_of(run.seed, epoch))
        order = torch.randperm(len(samples), generator=draws)[:steps * run.batch_size]
        order = order.view(steps, run.parts, -1).tolist()
        parts = range(args.rank, run.parts, args.world)  # of each batch, for this process
        batches = iter(data.load([(seed_of(run.seed, epoch, step, part), order[step][part])
                                  for step in range(steps) for part in parts], args.workers))
        model.train()
        began, total, finite = time.monotonic(), torch.zeros((), device=device), True
        for step in range(steps):
            done = epoch * steps + step
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, steps=run.epochs * steps, warmup=run.warmup,
                                            peak=run.lr, floor=run.floor)
            optimizer.zero_grad()
            for part in parts:
                images, labels = (t.to(device, non_blocking=True) for t in next(batches))
                torch.manual_seed(seed_of(run.seed, epoch, step, part, 1))  # mixing, drop path
                images, labels = mix(images, labels) if done < mixed_steps else (images, labels)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    loss = F.cross_entropy(forward(images), labels, label_smoothing=0.1)
                (loss * args.world / run.parts).backward()
                total += loss.detach() / run.parts
            norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip)
            optimizer.step()
            finite &= norm.isfinite() & total.isfinite()
            if time.monotonic() - shown > 10 or step == steps - 1:
                if not finite:
                    raise InputError(f"epoch {epoch + 1}: loss or gradient is not finite: try --lr "
                                     f"below {run.lr:g}; last.pt holds epoch {epoch}")
                shown = time.monotonic()
                speed, left = (step + 1) / (shown - began), run.epochs * steps - done - 1
                print(f"epoch {epoch + 1}/{run.epochs}  step {step + 1}/{steps}  loss {loss:.3f}  "
                      f"{speed * run.batch_size:,.0f} images/s  {left / speed:.0f} s left",
                      flush=True)
        if args.world > 1:
            dist.all_reduce(total)
        now |= {"epoch": epoch + 1, "loss": total.item() / steps,
                "seconds": time.monotonic() - start}
        save()


# ============================================================ 10. command line
def evaluate_checkpoint(args: argparse.Namespace) -> None:
    """--eval: prints the test accuracy of --checkpoint. Raises: InputError."""
    samples, classes = load_dataset(args.eval, args.data, False)
    model, recipe, _ = load_model(args, classes)
    bfloat16 = has_bfloat16(model.head.weight.device) and not (args.float32 or recipe["float32"])
    test = Parts(args.eval, samples, model.config.image_size, None)
    top1, top5 = evaluate(model, test, args, bfloat16)
    print(f"test accuracy {top1:.2%}, top-5 {top5:.2%}")


def read_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The checked flags. Mistakes end in one line and exit code 2."""
    parser = argparse.ArgumentParser("dat.py", usage=argparse.SUPPRESS, description=(
        "DAT. No data at hand? python dat.py --train shapes makes its own."))
    flag = parser.add_argument
    flag("--train", choices=STATISTICS, help="the data set; imagenet: any folder of images")
    flag("--eval", choices=STATISTICS, help="print the test accuracy of --checkpoint")
    flag("--checkpoint", metavar="FILE", help="last.pt or the authors': to evaluate or start from")
    flag("--data", metavar="DIR", help="of CIFAR (default: data), or of train/ and val/<class>/")
    flag("--model", choices=VARIANTS)
    flag("--batch-size", type=int, help="of an update, in all processes together")
    flag("--accumulate", type=int, help="compute a batch in so many parts")
    flag("--workers", type=int, help="processes that load images")
    for name, kind in ("--epochs", int), ("--lr", float), ("--seed", int):
        flag(name, type=kind)
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    flag("--out", metavar="DIR", help="of the run (default: runs/DATA-MODEL-1, -2, ..)")
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--float32", action="store_true", help="no bfloat16")
    flag("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "lr", "accumulate", "workers"):
        value, low = getattr(args, name), 0 if name == "workers" else 1e-12 if name == "lr" else 1
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} or more, finite")
    if not args.train and not args.eval:
        parser.print_help()
        parser.exit()
    if args.train and args.eval:
        parser.error("expected --train or --eval, not both")
    if args.eval and not args.checkpoint or args.resume and not (args.train and args.out):
        parser.error("--eval needs --checkpoint FILE, --resume needs --train DATA and --out DIR")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    args.device = args.device if args.device != "auto" else "cuda" if found["cuda"] else "cpu"
    if not found.get(args.device, True):
        parser.error(f"--device {args.device}: PyTorch finds none here; leave the flag out")
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.workers is None:
        args.workers = max(1, os.cpu_count() // args.world) if args.device == "cuda" else 0
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, 2 for a caller's mistake, 130 for Ctrl-C."""
    try:
        args = read_flags(arguments)
        if args.world > 1:  # started by torchrun
            if args.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
            sys.stdout = sys.stdout if args.rank == 0 else open(os.devnull, "w")
        train(args) if args.train else evaluate_checkpoint(args)
        return 0
    except SystemExit as stop:
        return stop.code
    except (InputError, OSError) as error:  # a loader's process wraps it: the last line is ours
        print("dat.py:", str(error).splitlines()[-1].split("InputError: ")[-1], file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dat.py: stopped; --resume with --out goes on after the last epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()  # cycles hold the group, and one that outlives this call aborts
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
