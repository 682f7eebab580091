# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.10", "torchvision>=0.25", "numpy", "matplotlib", "pytest", "hypothesis"]
# ///
"""DAT in one file: Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    python dat.py --train shapes    # generated images: minutes on two cores
    python dat.py --train cifar10   # downloads the images once
    pytest                          # properties, parity with reference_numpy.py

Paper: arXiv 2201.00520. Sections 1 to 6 are the model; they need torch alone. Sections 7 to 11
train it. The equations are computed in

    Eq. 1, 3: WindowAttention.forward    Eq. 2: attend    Eq. 4, 5: Block.forward
    Eq. 6, 9: DeformableAttention.forward    Eq. 7: DeformableAttention.points, OffsetNetwork
    Eq. 8: bilinear_sample    bias of Eq. 9: DeformableAttention.position_bias
    Eq. 10: lab/cost.py    Sec. 3.3: DAT    Tab. 1: VARIANTS

Symbols. Modules pass maps as (B, H, W, C):

    B batch   H W height, width of a map   C channels   M heads   d = C / M   G offset groups
    N = H W queries   Hk Wk rows, columns of sampling points   K = Hk Wk keys
    r stride: Hk = ceil(H / r)   s offset range   k kernel of the offset network   w window side
    Coordinates are (y, x) in pixels (px) of the map: 0 is the centre of the first pixel.

Departures of this file from the paper (P) and from its authors' code, "the release", commit
566a593 (R):

    [D1] R: the outer reference points stand on the outer pixels, as in the paper. In the release
         they stand further inside, and so do the queries: geometry="release", which published
         weights need.
    [D2] P, R: any image size. Maps are padded with zeros to whole patches and windows. Attention
         in windows masks these zeros. Position tables are resized.
    [D3] P: windows are shifted by ceil(w / 2), as in the release (Swin: floor).
    [D4] P: the offset network has the release's layer norm before GELU.
    [D5] R: two ablations work that crash there: points that never move (offsets=False), and one
         bias for each query and key, whatever the offset (position="fixed").
    [D6] P, R: stem="conv" has overlapping 3x3 convolutions; the release's has 7x7.
    [D7] P: weights start from PyTorch's defaults, position tables at deviation 0.01.
    [D8] R: RandAugment on all images, at one strength; no MixUp or CutMix in the last tenth of
         the updates; the cosine of the learning rate begins after the warm-up.
"""
import argparse
import gc
import io
import itertools
import math
import os
import pickle
import random
import re
import shlex
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from numbers import Integral, Real
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset


class InputError(ValueError):
    """A caller's mistake, in one line: what was expected, what came, what to do."""


def expect(condition, otherwise):
    if not condition:
        raise InputError(otherwise)


CHOICES = {"geometry": ("paper", "release"), "position": ("relative", "fixed", "none"),
           "stem": ("patch", "conv"), "offsets": (True, False)}


def check(**values):
    """Raises InputError for values that no network can have: check(dim=96, heads=3, ..)."""
    for name, value in values.items():
        if name in CHOICES:
            fits, expected = value in CHOICES[name], f"one of {CHOICES[name]}"
        elif name in ("offset_range", "mlp_ratio"):
            fits = isinstance(value, Real) and 0 < value < math.inf
            expected = "a number above 0"
        elif name == "drop_path":
            fits = isinstance(value, Real) and 0 <= value < 1
            expected = "a number from 0 to below 1"
        else:
            fits, expected = isinstance(value, Integral) and value >= 1, "a whole number above 0"
        expect(fits, f"{name}={value!r}: expected {expected}")
    for whole, part in (("dim", "heads"), ("heads", "groups")):
        if whole in values and part in values:
            expect(values[whole] % values[part] == 0,
                   f"{whole}={values[whole]} is not divisible by {part}={values[part]}")
    expect(values.get("kernel", 1) % 2 == 1, f"kernel={values.get('kernel')}: expected an odd one")


def height_and_width(name, size):
    """(H, W) of a size that is one number or two. Raises: InputError that calls it `name`."""
    pair = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    expect(len(pair) == 2 and all(isinstance(n, Integral) and n >= 1 for n in pair),
           f"{name}={size!r}: expected a whole number above 0, or (height, width)")
    return pair


def ceil_div(a, b):
    return -(-a // b)


# ======== 1. attention (Sec. 3.1)
def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v. Paper: Eq. 2, with the bias of Eq. 9.
    Shape: q (B, M, N, d), k and v (B, M, K, d), bias (B or 1, M, N, K) -> (B, M, N, d).
    For windows rows and columns follow the first axis of each: q (B, rows, columns, M, N, d)."""
    bias = bias.to(q.dtype)
    if q.is_cpu:  # the formula is faster there than PyTorch's kernels
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        scores += bias
        return scores.softmax(dim=-1) @ v
    shape = q.shape
    # PyTorch's kernels want four axes: rows, columns and M become one. Without windows nothing
    # changes.
    q, k, v, bias = (x.flatten(1, -3) for x in (q, k, v, bias))
    # cuDNN's kernel is left out: it has bugs with a bias.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(shape)


def drop_path(x, rate, training):
    """In training, zeroes each sample of x (B, ..) with probability `rate` and scales up others."""
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1 - rate)).to(x.dtype)


def position_table(*shape):
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.01))  # [D7]


def resize(table, size):
    """A position table (.., h, w) with its last two axes at another size (H, W) [D2]. The middle
    stays the middle: in a "relative" table it stands for no displacement."""
    if table.shape[-2:] == size:
        return table
    flat = table.flatten(0, -3)[None]  # (1, all other axes, h, w)
    return F.interpolate(flat, size, mode="bicubic")[0].unflatten(0, table.shape[:-2])


# ======== 2. coordinates and sampling (Sec. 3.2, Eq. 8)
def reference_coordinates(count, length, geometry, like):
    """Where `count` reference points, or `length` queries, stand on an axis of `length` px.
    Paper: Sec. 3.2. Shape: (count,), of the type and device of `like`.
    "paper": evenly from the first pixel's centre to the last's; a single point in the middle.
    "release": the middles of `count` equal parts of the line between those centres [D1]."""
    i = torch.arange(count, dtype=like.dtype, device=like.device)
    if geometry == "release":
        return (i + 0.5) / count * (length - 1)
    return i * (length - 1) / (count - 1) if count > 1 else i + (length - 1) / 2


def largest_offset(count, length, offset_range, geometry):
    """How far, in px, one of `count` points may move along an axis of `length` px:
    "paper": s / 2 * length / count. The paper gives no unit of s; so s = 2 allows about r px.
    "release": s / 2 * (length - 1) / count. There the bound is s / count on an axis from -1 to 1,
    which goes from the first pixel's centre to the last's [D1]."""
    length = length if geometry == "paper" else length - 1
    return offset_range / 2 * length / count


def bilinear_sample(maps, points):
    """phi(z; p): maps read between their pixels (g is bilinear), with zeros outside. Paper: Eq. 8.
    Shape: maps (B, C, H, W), points (B, .., 2) -> (B, C, ..). Units: points are (y, x) in px.
    Computed in their type; the result has the type of the maps."""
    return sample_at(maps, *points.unbind(-1))


def sample_at(maps, y, x):
    """bilinear_sample with y and x apart, of shapes that broadcast to (B, ..). This is faster where
    they have axes of 1."""
    B, C, H, W = maps.shape
    # grid_sample takes (x, y). With align_corners=False, -1 and 1 are the outer edges of the map,
    # half a pixel beyond 0 and H - 1. (With True they are 0 and H - 1, which fails if H = 1.)
    y, x = torch.broadcast_tensors((2 * y + 1) / H - 1, (2 * x + 1) / W - 1)
    grid = torch.stack([x, y], dim=-1).flatten(1, -2)[:, None]  # (B, 1, all points, 2)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
    return sampled.to(maps.dtype).view(B, C, *y.shape[1:])


# ======== 3. deformable attention (Sec. 3.2, Eq. 6-9)
class OffsetNetwork(nn.Module):
    """theta_offset, one for all groups: how far points should move. Paper: Sec. 3.2, Fig. 2 (b).
    Shape: (B G, H, W, C / G) -> (B G, Hk, Wk, 2): (y, x), unbounded. Depth-wise k x k convolution,
    layer norm [D4], GELU, and a 1x1 convolution. (A bias of it would move all points alike.)"""
    def __init__(self, *, dim, kernel, stride):
        super().__init__()
        # As k is odd, its padding k // 2 gives Hk = ceil(H / r) rows.
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, 2, bias=False)

    def forward(self, q):
        # For speed on a CPU, not for precision: bfloat16 makes this convolution slow there.
        with torch.autocast("cpu", enabled=False):
            q = q.permute(0, 3, 1, 2).to(self.conv.weight.dtype)
            x = self.conv(q).permute(0, 2, 3, 1)
            return self.out(F.gelu(self.norm(x)))


class DeformableAttention(nn.Module):
    """Attention to x~, the map read at points that the offset network moves. Paper: Sec. 3.2.
    Shape: (B, H, W, C) -> the same, any H, W. `size`, a number or (H, W): the map that the
    position table is made for; at another size it is resized [D2]. Raises: InputError."""
    def __init__(self, *, dim, heads, groups, size, stride=1, kernel=5, offset_range=2.0,
                 geometry="paper", offsets=True, position="relative"):
        super().__init__()
        check(dim=dim, heads=heads, groups=groups, stride=stride, kernel=kernel,
              offset_range=offset_range, geometry=geometry, offsets=offsets, position=position)
        H, W = height_and_width("size", size)
        self.heads, self.groups, self.stride = heads, groups, stride
        self.offset_range, self.geometry, self.position = offset_range, geometry, position
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        if offsets:
            self.offset = OffsetNetwork(dim=dim // groups, kernel=kernel, stride=stride)
        else:
            self.offset = None  # an ablation [D5]: points do not move
        if position == "relative":
            self.table = position_table(heads, 2 * H - 1, 2 * W - 1)
        elif position == "fixed":
            self.table = position_table(heads, H, W, ceil_div(H, stride), ceil_div(W, stride))

    def points(self, q):
        """p + dp, where the keys of each group are read. Paper: Eq. 7, with dp <- s tanh(dp).
        Shape: q (B, H, W, C) -> (B, G, Hk, Wk, 2). Units: (y, x) in px of the map, in float32 or
        float64: bfloat16 has steps of half a pixel near 100."""
        (B, H, W, C), G, geometry = q.shape, self.groups, self.geometry
        Hk, Wk = ceil_div(H, self.stride), ceil_div(W, self.stride)
        dtype = torch.promote_types(q.dtype, torch.float32)
        if self.offset is None:
            offset = torch.zeros(B * G, Hk, Wk, 2, dtype=dtype, device=q.device)
        else:
            grouped = q.unflatten(3, (G, C // G)).movedim(3, 1)   # (B, G, H, W, C / G)
            offset = self.offset(grouped.flatten(0, 1)).to(dtype)  # (B G, Hk, Wk, 2), unbounded
        dy, dx = offset.tanh().unbind(-1)  # (B G, Hk, Wk) each, from -1 to 1
        reference_y = reference_coordinates(Hk, H, geometry, like=offset)[:, None]  # (Hk, 1)
        reference_x = reference_coordinates(Wk, W, geometry, like=offset)  # (Wk,)
        reach_y = largest_offset(Hk, H, self.offset_range, geometry)
        reach_x = largest_offset(Wk, W, self.offset_range, geometry)
        points = [reference_y + reach_y * dy, reference_x + reach_x * dx]  # Eq. 7
        return torch.stack(points, dim=-1).unflatten(0, (B, G))

    def position_bias(self, points, size):
        """phi(B^; R): the table, read at all displacements R = query - key. Paper: Eq. 9.
        Shape: points (B, G, Hk, Wk, 2), size (H, W) -> (B, M, N, K); if "fixed" (1, M, N, K); if
        "none" zeros (1, 1, N, K).
        Along y, displacements -(H - 1) .. H - 1 stand in 2 H - 1 rows: R in row R + H - 1."""
        B, G, Hk, Wk, _ = points.shape
        H, W = size
        if self.position == "none":
            return points.new_zeros(1, 1, H * W, Hk * Wk)
        if self.position == "fixed":
            return self.fixed_bias((H, W), (Hk, Wk))
        table = resize(self.table.to(points.dtype), (2 * H - 1, 2 * W - 1))
        table = table.expand(B, -1, -1, -1)  # (B, M, 2 H - 1, 2 W - 1)
        table = table.unflatten(1, (G, -1)).flatten(0, 1)  # (B G, M / G, 2 H - 1, 2 W - 1)
        query_y = reference_coordinates(H, H, self.geometry, like=points)  # (H,)
        query_x = reference_coordinates(W, W, self.geometry, like=points)  # (W,)
        key_y, key_x = points.view(B * G, 1, 1, Hk * Wk, 2).unbind(-1)  # (B G, 1, 1, K) each
        row = query_y.view(H, 1, 1) - key_y + H - 1  # R along y: (B G, H, 1, K)
        column = query_x.view(W, 1) - key_x + W - 1  # R along x: (B G, 1, W, K)
        bias = sample_at(table, row, column)  # (B G, M / G, H, W, K)
        return bias.view(B, self.heads, H * W, Hk * Wk)

    def fixed_bias(self, query_size, key_size):
        """An ablation [D5]: one number for each query and key, whatever the offset. The table, of
        (M, h, w, hk, wk), is resized twice: along its axes of keys, then along those of queries.
        Shape: query_size (H, W), key_size (Hk, Wk) -> (1, M, N, K)."""
        table = resize(self.table, key_size)  # (M, h, w, Hk, Wk)
        table = table.permute(0, 3, 4, 1, 2)  # (M, Hk, Wk, h, w)
        table = resize(table, query_size).flatten(3)  # (M, Hk, Wk, N)
        return table.flatten(1, 2).transpose(1, 2)[None]  # (1, M, N, K)

    def sample(self, x, points):
        """x~: the channels of each group, read at its points. Paper: Eq. 7 and 8.
        Shape: x (B, H, W, C), points (B, G, Hk, Wk, 2) -> (B, K, C)."""
        (B, H, W, C), (_, G, Hk, Wk, _) = x.shape, points.shape
        maps = x.permute(0, 3, 1, 2).reshape(B * G, C // G, H, W)
        sampled = bilinear_sample(maps, points.flatten(0, 1))  # (B G, C / G, Hk, Wk)
        # contiguous() once, not in each of the layers k and v: for speed on a CPU.
        return sampled.view(B, C, Hk * Wk).transpose(1, 2).contiguous()

    def forward(self, x):
        if x.ndim != 4 or x.shape[3] != self.q.in_features:
            raise InputError(f"expected (B, H, W, {self.q.in_features}), not {tuple(x.shape)}")
        (B, H, W, C), M = x.shape, self.heads
        q = self.q(x)  # (B, H, W, C)
        points = self.points(q)  # (B, G, Hk, Wk, 2)
        sampled = self.sample(x, points)  # (B, K, C)
        q, k, v = q.flatten(1, 2), self.k(sampled), self.v(sampled)  # (B, N or K, C): Eq. 6
        q, k, v = (t.unflatten(2, (M, C // M)).transpose(1, 2) for t in (q, k, v))  # (B, M, .., d)
        z = attend(q, k, v, self.position_bias(points, (H, W)))  # (B, M, N, d): Eq. 9
        return self.out(z.transpose(1, 2).reshape(B, H, W, C))  # Eq. 3


# ======== 4. window attention (Sec. 3.3, from Swin)
def pad_to_multiple(x, side):
    """(B, H, W, C), padded with zeros at bottom and right to multiples of `side` [D2]."""
    bottom, right = -x.shape[1] % side, -x.shape[2] % side
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


class WindowAttention(nn.Module):
    """Attention inside w x w windows with a learned bias. `shift` moves the windows by so many px.
    Paper: Sec. 3.3, from Swin (Liu et al., 2021). Shape: (B, H, W, C) -> the same, any H, W.
    Raises: InputError."""
    def __init__(self, *, dim, heads, window, shift=0):
        super().__init__()
        check(dim=dim, heads=heads, window=window)
        expect(isinstance(shift, Integral) and 0 <= shift <= window,  # w = 1 has shift 1 [D3]
               f"shift={shift!r}: expected a whole number from 0 to window={window}")
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.table = position_table(heads, 2 * window - 1, 2 * window - 1)

    def cut(self, x):
        """The windows of a map that is padded [D2] and rolled up and left by `shift` [D3].
        Shape: (B, H, W, C) -> (B, rows, w, columns, w, C)."""
        x = pad_to_multiple(x, self.window)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        return x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))

    def regions(self, H, W):
        """A number for each pixel of each window: 0 for padding, 1 where rolling the map wrapped
        nothing round, 2 where it wrapped columns, 3 rows, 4 both. For example, with w = 4 and shift
        2, the row a b c d e f is padded to a b c d e f - - and rolled to c d e f - - a b: it has
        the regions 1 1 1 1 0 0 2 2. Shape: -> (rows, columns, w w)."""
        device = self.table.device
        rolled_y = torch.arange(H, device=device) < self.shift
        rolled_x = torch.arange(W, device=device) < self.shift
        region = 1 + 2 * rolled_y[:, None] + rolled_x  # (H, W), from 1 to 4
        region = self.cut(region[None, :, :, None])  # (1, rows, w, columns, w, 1): pads, rolls
        return region.squeeze((0, 5)).transpose(1, 2).flatten(2)

    def bias(self, H, W):
        """The table at query - key + w - 1, or minus infinity for a query and a key of different
        regions, which are not neighbours in the map. Padding sees padding: if it saw nothing, its
        rows would be minus infinity alone, and softmax gives NaN then.
        Shape: -> (1, rows, columns, M, w w, w w)."""
        w, i = self.window, torch.arange(self.window, device=self.table.device)
        y, x = i.repeat_interleave(w), i.repeat(w)  # (w w,): the pixels of a window
        row, column = y[:, None] - y + w - 1, x[:, None] - x + w - 1  # (w w, w w): query, key
        region = self.regions(H, W)[:, :, None]  # (rows, columns, 1, w w)
        apart = region.unsqueeze(4) != region.unsqueeze(3)  # (rows, columns, 1, w w, w w)
        return torch.where(apart, -math.inf, self.table[:, row, column])[None]

    def forward(self, x):
        (B, H, W, C), M, w = x.shape, self.heads, self.window
        # One variable, qkv, for three tensors: each is freed when the next is made, which is faster
        # on a CPU (lab/RESULTS.md).
        qkv = self.qkv(self.cut(x))  # Eq. 1
        rows, columns = qkv.shape[1], qkv.shape[3]
        qkv = qkv.unflatten(5, (3, M, C // M))  # (B, rows, w, columns, w, 3, M, d)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6)  # (3, B, rows, columns, M, w w, d)
        z = attend(*qkv, self.bias(H, W))  # (B, rows, columns, M, w w, d)
        z = z.unflatten(4, (w, w)).permute(0, 1, 4, 2, 5, 3, 6)  # (B, rows, w, columns, w, M, d)
        z = z.reshape(B, rows * w, columns * w, C)
        if self.shift:
            z = z.roll((self.shift, self.shift), dims=(1, 2))
        return self.out(z[:, :H, :W])  # Eq. 3


# ======== 5. block, configuration, network (Sec. 3.3, Fig. 3, Tab. 1)
@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. Paper: Sec. 3.3, Tab. 1. Raises: InputError.
    `blocks`, a letter each: L local windows, S shifted windows, D deformable attention. Windows
    use `window` (w), and D uses `groups` (G), `stride` (r), `kernel` (k), `offset_range` (s)."""
    dim: int
    heads: int
    blocks: str
    window: int = 7
    groups: int | None = None  # only with a D
    stride: int = 1
    kernel: int = 5
    offset_range: float = 2.0

    def __post_init__(self):
        expect(isinstance(self.blocks, str) and self.blocks and set(self.blocks) <= set("LSD"),
               f"blocks={self.blocks!r}: expected letters L, S and D")
        has_d = "D" in self.blocks
        expect(has_d or self.groups is None, f"groups={self.groups!r}: blocks has no D, omit it")
        check(dim=self.dim, heads=self.heads, groups=self.groups if has_d else 1,
              window=self.window, stride=self.stride, kernel=self.kernel,
              offset_range=self.offset_range)


@dataclass(frozen=True, kw_only=True)
class DATConfig:
    """The network. Paper: Sec. 3.3. Raises: InputError.
    `image_size`, a number or (H, W), sets the size of position tables; any input size works."""
    stages: tuple[StageConfig, ...]
    image_size: int | tuple[int, int] = 224
    patch: int = 4
    stem: str = "patch"  # or "conv" [D6]
    classes: int = 1000
    mlp_ratio: float = 4
    drop_path: float = 0.0  # rate of the last block; it grows linearly from 0
    geometry: str = "paper"  # or "release" [D1]
    offsets: bool = True  # False: an ablation [D5]
    position: str = "relative"  # or, as ablations, "fixed" or "none" [D5]

    def __post_init__(self):
        stages = self.stages if isinstance(self.stages, (tuple, list)) else ()
        # Stages from a file are dicts. Lists are taken as tuples.
        stages = tuple(StageConfig(**s) if isinstance(s, dict) else s for s in stages)
        expect(stages and all(isinstance(stage, StageConfig) for stage in stages),
               f"stages={self.stages!r}: expected a StageConfig or more, in a tuple")
        object.__setattr__(self, "stages", stages)  # as the dataclass is frozen
        if isinstance(self.image_size, list):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        height_and_width("image_size", self.image_size)
        check(patch=self.patch, stem=self.stem, classes=self.classes, mlp_ratio=self.mlp_ratio,
              drop_path=self.drop_path, geometry=self.geometry, offsets=self.offsets,
              position=self.position)
        expect(self.stem == "patch" or self.patch in (1, 2, 4),
               f"patch={self.patch}: expected 1, 2 or 4 with stem='conv'")
        expect(min(stage.dim for stage in stages) * self.mlp_ratio >= 1,
               f"mlp_ratio={self.mlp_ratio} leaves the MLP no hidden channel")

    def map_sizes(self):
        """(H, W) of the map of each stage, for an image of `image_size`."""
        scales = [self.patch * 2 ** i for i in range(len(self.stages))]  # image px per map px
        H, W = height_and_width("image_size", self.image_size)
        return [(ceil_div(H, scale), ceil_div(W, scale)) for scale in scales]


def table_row(dim, heads, blocks, groups, kernels, window):
    """The stages of a row of Tab. 1: widths and heads double with each. Only D uses groups and
    kernels. Stride r = 1 and offset range s = 2 are the defaults."""
    return tuple(StageConfig(dim=dim * 2 ** i, heads=heads * 2 ** i, blocks=blocks[i],
                             groups=groups[i], kernel=kernels[i], window=window)
                 for i in range(len(blocks)))


# Tab. 1, for each of the four stages: blocks, groups, kernels.
BLOCKS_T, BLOCKS_SB = ("LS", "LS", "LD" * 3, "LD"), ("LS", "LS", "LD" * 9, "LD")
GROUPS_TS, GROUPS_B = (None, None, 3, 6), (None, None, 4, 8)
KERNELS = (9, 7, 5, 3)
VARIANTS = {  # published weights need geometry="release" [D1]
    # table_row(C and heads of stage 1; blocks, groups, kernels of each stage; window)
    "dat-t": DATConfig(stages=table_row(96, 3, BLOCKS_T, GROUPS_TS, KERNELS, 7), drop_path=0.2),
    "dat-s": DATConfig(stages=table_row(96, 3, BLOCKS_SB, GROUPS_TS, KERNELS, 7), drop_path=0.3),
    "dat-b": DATConfig(stages=table_row(128, 4, BLOCKS_SB, GROUPS_B, KERNELS, 7), drop_path=0.5),
    "dat-b-384": DATConfig(stages=table_row(128, 4, BLOCKS_SB, GROUPS_B, KERNELS, 12),
                           drop_path=0.5, image_size=384),
    # For images of 32 px: DAT-T at half its width, and a small one for a CPU.
    "cifar": DATConfig(stages=table_row(48, 3, BLOCKS_T, GROUPS_TS, KERNELS, 4), drop_path=0.1,
                       image_size=32, patch=1, stem="conv", classes=10),
    "cifar-nano": DATConfig(stages=table_row(48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), (7, 5, 3), 4),
                            image_size=32, stem="conv", classes=10)}


class Projection(nn.Module):
    """Patch embedding and down-sampling: a convolution and a layer norm. Paper: Sec. 3.3.
    Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C'). If kernel = stride, the
    map is filled up to whole patches [D2]; a larger kernel overlaps and is centred [D6]."""
    def __init__(self, dim, out_dim, *, kernel, stride, bias=True):
        super().__init__()
        self.overlaps, self.stride = kernel > stride, stride
        padding = kernel // 2 if self.overlaps else 0
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x):
        if not self.overlaps:
            x = pad_to_multiple(x, self.stride)
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """z' = attention(LN(z)) + z, z'' = MLP(LN(z')) + z', each branch with drop path at `rate`.
    Paper: Eq. 4 and 5. Shape: (B, H, W, C) -> the same."""
    def __init__(self, config, stage, size, letter, rate):
        super().__init__()
        dim, hidden, self.rate = stage.dim, int(stage.dim * config.mlp_ratio), rate
        if letter == "D":
            self.attention = DeformableAttention(
                dim=dim, heads=stage.heads, groups=stage.groups, size=size, stride=stage.stride,
                kernel=stage.kernel, offset_range=stage.offset_range, geometry=config.geometry,
                offsets=config.offsets, position=config.position)
        else:
            shift = ceil_div(stage.window, 2) if letter == "S" else 0
            self.attention = WindowAttention(
                dim=dim, heads=stage.heads, window=stage.window, shift=shift)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({
            "expand": nn.Linear(dim, hidden), "contract": nn.Linear(hidden, dim)})

    def forward(self, z):
        z = drop_path(self.attention(self.norm1(z)), self.rate, self.training) + z
        # A variable, so that this tensor is freed at the end of the call, which is faster on a CPU.
        hidden = self.mlp["expand"](self.norm2(z))
        return drop_path(self.mlp["contract"](F.gelu(hidden)), self.rate, self.training) + z


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention. Paper: Sec. 3.3, Fig. 3, Tab. 1.
    Shape: images (B, 3, H, W), any H, W -> logits (B, classes). Raises: InputError."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, patch = config.stages[0].dim, config.patch
        if config.stem == "patch":
            self.stem = Projection(3, dim, kernel=patch, stride=patch)
        else:  # two strides: 1 and 1 if patch is 1, 2 and 1 if 2, 2 and 2 if 4
            stride = min(patch, 2)
            self.stem = nn.Sequential(
                Projection(3, dim // 2, kernel=3, stride=stride), nn.GELU(),
                Projection(dim // 2, dim, kernel=3, stride=patch // stride))
        depth = sum(len(stage.blocks) for stage in config.stages)
        rates = iter([config.drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.stages = nn.ModuleList()
        for i, (stage, size) in enumerate(zip(config.stages, config.map_sizes())):
            down = nn.Identity()
            if i > 0:
                kernel = 2 if config.stem == "patch" else 3
                # No bias, as in the release.
                down = Projection(dim, stage.dim, kernel=kernel, stride=2, bias=False)
            blocks = [Block(config, stage, size, letter, next(rates)) for letter in stage.blocks]
            self.stages.append(nn.Sequential(OrderedDict(down=down, blocks=nn.Sequential(*blocks))))
            dim = stage.dim
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, config.classes)

    def embed(self, images):
        """Patch embedding: images (B, 3, H, W) -> (B, ceil(H / patch), ceil(W / patch), C)."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise InputError(f"expected images (B, 3, H, W) of floating-point numbers, not "
                             f"{tuple(images.shape)} of {images.dtype}")
        return self.stem(images.permute(0, 2, 3, 1))

    def features(self, images):
        """The map (B, C, H, W) after each stage: a pyramid for a detector. Paper: Fig. 3."""
        x = self.embed(images)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images):
        x = self.features(images)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean(dim=(1, 2)))

    def sampling_points(self, images):
        """Where each D block reads its keys: a list of (B, G, Hk, Wk, 2), (y, x) in image px."""
        x = self.embed(images)
        points = []
        for i, stage in enumerate(self.stages):
            scale = self.config.patch * 2 ** i  # image px per map px
            # Where map pixel 0 lies in the image: in the middle of a patch of scale x scale px, or
            # on image pixel 0, as all kernels of stem="conv" are centred.
            first = (scale - 1) / 2 if self.config.stem == "patch" else 0
            x = stage.down(x)
            for block in stage.blocks:
                if isinstance(block.attention, DeformableAttention):
                    q = block.attention.q(block.norm1(x))
                    points.append(first + scale * block.attention.points(q))
                x = block(x)
        return points


def build(variant, **overrides):
    """The model of VARIANTS[variant] with other values of some fields of its DATConfig.
    Raises: InputError."""
    expect(variant in VARIANTS, f"variant {variant!r} is not one of {list(VARIANTS)}")
    return DAT(replace(VARIANTS[variant], **overrides))


# ======== 6. the authors' weights
# Parts of the release's names, as regular expressions, and what stands for them here:
# stages.2.attns.1.proj_q.weight is stages.2.blocks.1.attention.q.weight.
RELEASE_NAMES = {
    r"^patch_proj\.0": "stem.conv",
    r"^patch_proj\.1\.norm": "stem.norm",
    r"\.mlps\.(\d+)\.chunk\.linear1": r".blocks.\1.mlp.expand",
    r"\.mlps\.(\d+)\.chunk\.linear2": r".blocks.\1.mlp.contract",
    r"\.attns\.(\d+)\.(proj_)?": r".blocks.\1.attention.",  # proj_q becomes q
    r"\.conv_offset\.0": ".offset.conv",
    r"\.conv_offset\.1\.norm": ".offset.norm",
    r"\.conv_offset\.3": ".offset.out",
    r"\.(rpe|relative_position_bias)_table$": ".table",
    r"^cls_norm\.norm": "norm",
    r"^cls_head": "head"}


def our_name(name):
    """The name here of a parameter of the release; our own names stay as they are."""
    match name.split("."):  # first the names whose numbers change
        case ["down_projs", i, *_, kind]:  # down_projs.0 is between the stages 0 and 1
            layer = "norm" if "norm" in name else "conv"
            name = f"stages.{int(i) + 1}.down.{layer}.{kind}"
        case ["stages", i, "layer_norms", j, "norm", kind]:  # two in each block
            name = f"stages.{i}.blocks.{int(j) // 2}.norm{int(j) % 2 + 1}.{kind}"
    for theirs, ours in RELEASE_NAMES.items():
        name = re.sub(theirs, ours, name)
    return name


def rename_weights(weights):
    """Weights of the release by our names and in our shapes; ours stay as they are. Prefixes that
    DistributedDataParallel and torch.compile add are taken off. Raises: InputError."""
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"\b(module|_orig_mod)\.", "", name)
        expect("local_perception_units" not in name,
               "weights of DAT++ (arXiv 2309.01430), another network: expected DAT's (the authors' "
               "README links them at commit 566a593)")
        if name.endswith((".relative_position_index", ".attn_mask")):
            continue  # both follow from the window
        if name.endswith("relative_position_bias_table"):  # (displacements, heads) there
            side = math.isqrt(len(value))
            value = value.T.reshape(-1, side, side)
        elif re.search(r"attns.*(proj_\w+|conv_offset\.3)\.weight", name):
            value = value.flatten(1)  # 1x1 convolutions there, (C', C, 1, 1); (C', C) stays
        renamed[our_name(name)] = value
    return renamed


def load_weights(model, weights, source):
    """Raises: InputError that names each missing, unknown or misshapen key."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{source} does not fit the model: {error}") from None


def load_official(state_dict, config):
    """A model in geometry="release" [D1] with the authors' weights, a state dict or a dict that
    has it under "model". Raises: InputError."""
    model = DAT(replace(config, geometry="release"))
    load_weights(model, rename_weights(state_dict.get("model", state_dict)), "the state dict")
    return model


# ======== 7. data
DATA = ("shapes", "cifar10", "cifar100", "imagenet")
SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar")


def seed_of(*purpose):
    """A seed for each purpose of random numbers: seed_of("order", seed, epoch)."""
    return random.Random(repr(purpose)).getrandbits(63)


def make_shapes(count, *, seed, side=32):
    """Figures of the kinds SHAPES at random place, size, angle and colour, on clutter.
    Shape: images (count, 3, side, side) uint8, labels (count,), masks (count, side, side) bool."""
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high, shape):  # uniform, (count, *shape)
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    row, column = torch.arange(side)[:, None] + 0.5, torch.arange(side) + 0.5
    blotches = F.interpolate(draw(0, 0.5, (3, 4, 4)), (side, side), mode="bilinear")
    images = blotches + draw(-0.05, 0.05, (3, side, side))
    for _ in range(8):  # clutter: small boxes
        y, x = draw(0, side, (2, 1, 1, 1)).unbind(1)  # (count, 1, 1, 1) each
        height, width = draw(0.5, side / 12, (2, 1, 1, 1)).unbind(1)
        box = ((row - y).abs() < height) & ((column - x).abs() < width)
        images = torch.where(box, draw(0, 0.6, (3, 1, 1)), images)

    radius, angle = draw(0.2, 0.36, (1, 1)) * side, draw(0, 2 * math.pi, (1, 1))
    centre_y = radius + (side - 2 * radius) * draw(0, 1, (1, 1))
    centre_x = radius + (side - 2 * radius) * draw(0, 1, (1, 1))
    y, x = row - centre_y, column - centre_x
    u = (x * angle.cos() + y * angle.sin()) / radius  # along the axes of the figure, from -1 to 1
    v = (y * angle.cos() - x * angle.sin()) / radius
    distance, direction = torch.hypot(u, v), torch.atan2(v, u)
    larger, smaller = u.abs().maximum(v.abs()), u.abs().minimum(v.abs())
    third = 2 * math.pi / 3
    figures = torch.stack([
        distance < 0.9,  # disc
        (distance < 1) & (distance > 0.55),  # ring
        larger < 0.75,  # square
        # triangle: in each third of all directions, a side at distance 0.5 from the centre
        distance * (direction % third - third / 2).cos() < 0.5,
        (smaller < 0.28) & (larger < 0.95),  # cross
        distance < 0.7 + 0.3 * (5 * direction).cos(),  # star
        (distance < 1) & (torch.hypot(u - 0.55, v) > 0.75),  # crescent
        (u.abs() < 1) & (v.abs() < 0.3)])  # bar
    labels = torch.randint(len(SHAPES), (count,), generator=rng)
    masks = figures[labels, torch.arange(count)]
    colour = draw(0.5, 1, (3, 1, 1)) + draw(-0.05, 0.05, (3, side, side))
    images = torch.where(masks[:, None], colour, images)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks


def read_image(path):
    """The RGB image of a file, on white where it is transparent. EXIF orientation is ignored, as
    in the release. Raises: InputError."""
    from PIL import Image
    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # Pillow raises many kinds, all about this file
        raise InputError(f"{path} cannot be read as an image: {error}") from None
    expect(not image.mode.startswith(("I", "F")),  # convert("RGB") would clip these to white
           f"{path} has pixels of mode {image.mode}: expected 8 bits a channel; convert it")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_folder(root):
    """(path, label) of all images root/<class>/.., and class names. Hidden files and folders, such
    as .ipynb_checkpoints, are left out. Raises: InputError."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    def is_image(path):
        names = Path(path).relative_to(root).parts
        return path.lower().endswith(IMG_EXTENSIONS) and not any(n.startswith(".") for n in names)

    try:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        classes = tuple(name for name in folders if not name.startswith("."))
        labels = {name: label for label, name in enumerate(classes)}
        return make_dataset(str(root), labels, is_valid_file=is_image), classes
    except (OSError, ValueError) as error:
        raise InputError(f"--data: expected images in {root}/<class>/, but: {error}") from None


def load_dataset(name, root, split):
    """(image, label) pairs of `split` "train" or "test", and class names. Images are uint8
    (3, 32, 32), or for imagenet paths of files. Raises: InputError."""
    if name == "shapes":
        count, seed = {"train": (10_000, 1), "test": (2_000, 0)}[split]
        images, labels, _ = make_shapes(count, seed=seed)
        return TensorDataset(images, labels), SHAPES
    if name == "imagenet":
        return load_folder(Path(root, "train" if split == "train" else "val"))
    from torchvision import datasets
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        cifar = kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError, EOFError, pickle.PickleError) as error:
        raise InputError(f"--data {root} has no {name}, and its download from {kind.url} failed "
                         f"({error}); --train shapes needs no files") from None
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    return TensorDataset(images, torch.tensor(cifar.targets)), tuple(cifar.classes)


def mean_and_std(data):
    """How images are normalised, for each channel: ImageNet's figures, or simple ones."""
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return imagenet if data == "imagenet" else ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def normalise(image, mean, std):  # five times as fast as v2.ToDtype and v2.Normalize
    return (image / 255 - mean) / std


def transform_for(data, size, augment):
    """Makes the network's input (3, size, size) from what load_dataset gives: a path (imagenet), or
    an image of that size. `augment`: "none" for tests, "flip", "light" (with crops), "strong"."""
    from torchvision.transforms import InterpolationMode, v2
    bicubic = InterpolationMode.BICUBIC
    side = size * 256 // 224  # 256 for 224, 438 for 384
    if data != "imagenet":
        steps = [v2.RandomCrop(size, padding=4)] if augment in ("light", "strong") else []
    elif augment == "none":  # as in the release, it does not keep proportions
        steps = [read_image, v2.Resize((side, side), bicubic), v2.CenterCrop(size)]
    else:
        steps = [read_image, v2.RandomResizedCrop(size, interpolation=bicubic)]
    if augment != "none":
        steps += [v2.RandomHorizontalFlip()]
    if augment == "strong":  # magnitude 9 on a scale from 0 to 10, so 11 bins
        steps += [v2.RandAugment(num_ops=2, magnitude=9, num_magnitude_bins=11)]
    if data == "imagenet":
        steps += [v2.PILToTensor()]
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_and_std(data))
    steps += [partial(normalise, mean=mean, std=std)]
    if augment == "strong":
        steps += [v2.RandomErasing(0.25, value="random")]
    return v2.Compose(steps)


class Samples(Dataset):
    """Transformed images, numbered through all epochs: item `place` is image place % len(images) in
    epoch place // len(images). Each place has its own seed, so that its random draws depend neither
    on the process nor on the worker that makes them."""
    def __init__(self, images, transform, seed=0):
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self):
        return len(self.images)  # of one epoch

    def __getitem__(self, place):
        image, label = self.images[place % len(self)]
        # For the draws of the transform. torch.manual_seed also seeds GPUs, and takes far longer.
        torch.default_generator.manual_seed(seed_of("image", self.seed, place))
        return self.transform(image), label


# ======== 8. recipe
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides the result of a run. It is saved with the weights."""
    data: str
    model: str  # a name in VARIANTS
    dtype: str  # of autocast: "bfloat16" or "float16"; without autocast "float32"
    epochs: int
    batch_size: int  # images an update, in all processes together
    micro_batch: int  # images at once in one process
    lr: float  # the highest learning rate
    optimizer: str = "adamw"  # or "muon", for the matrices of the blocks
    warmup: float = 20 / 300  # share of the updates in which the rate rises
    floor: float = 0.01  # the last rate, as a share of the highest
    clip: float = 5.0  # largest norm of the gradient
    weight_decay: float = 0.05
    augment: str = "strong"  # see transform_for
    mixed: float = 0.9  # share of the updates with MixUp or CutMix
    seed: int = 0


def recipe_for(data, given, *, world=1, fine_tuning=False, new_head=False):
    """The recipe for `data`. The values that the user has `given`, a dict, replace its own; "model"
    and "dtype" are always given. "imagenet" is any folder of images. Its recipes are the authors';
    the one for a new head is ours."""
    model = given["model"]
    if data == "shapes":
        recipe = {"epochs": 3, "batch_size": 64, "lr": 3e-3, "warmup": 0.25, "optimizer": "muon"}
    elif data != "imagenet" and model == "cifar":  # the variant for a GPU
        recipe = {"epochs": 300, "batch_size": 256, "lr": 1e-3, "warmup": 0.05}
    elif data != "imagenet":
        recipe = {"epochs": 5, "batch_size": 128, "lr": 2e-3, "warmup": 0.05, "optimizer": "muon"}
    elif new_head:  # for hundreds or thousands of images (lab/RESULTS.md)
        recipe = {"epochs": 30, "batch_size": 16, "lr": 2e-4, "augment": "light", "mixed": 0.0}
    elif fine_tuning:
        recipe = {"epochs": 30, "batch_size": 512, "lr": 2e-6, "warmup": 0.0, "floor": 0.05,
                  "weight_decay": 1e-8}
    elif model.startswith("dat-b"):
        recipe = {"epochs": 300, "batch_size": 1024, "lr": 8e-4, "warmup": 50 / 300,
                  "floor": 1 / 80, "clip": 1.0}
    else:
        recipe = {"epochs": 300, "batch_size": 1024, "lr": 1e-3}
    if data == "imagenet" and not new_head and "batch_size" in given:  # the rate grows with it
        recipe["lr"] *= given["batch_size"] / recipe["batch_size"]
    epochs = given.get("epochs", recipe["epochs"])
    if data != "imagenet":  # stronger augmentation and mixing hurt short runs (lab/RESULTS.md)
        recipe |= {"augment": "strong" if epochs >= 60 else "light",
                   "mixed": 0.9 if epochs >= 100 else 0.0}
    if data in ("cifar10", "cifar100") and epochs < 10:
        recipe["augment"] = "flip"
    recipe |= given
    if "micro_batch" not in recipe:  # the largest that fits memory and splits the batch evenly
        largest = 128 if data == "imagenet" else 1024
        sizes = [n for n in range(1, largest + 1) if recipe["batch_size"] % (n * world) == 0]
        # No size fits if `world` does not divide the batch; run_training refuses that.
        recipe["micro_batch"] = max(sizes, default=1)
    return Recipe(data=data, **recipe)


def learning_rate(update, *, updates, peak, warmup, floor):
    """The rate of `update` 0, 1, .. of `updates`: it rises from peak * floor / 10 to the peak in
    the share `warmup` of the updates, but in at least 50, or a quarter of all if that is less. Then
    it falls to peak * floor along half a cosine [D8]."""
    warm = int(updates * warmup)
    if warmup > 0:
        warm = max(warm, min(50, updates // 4))
    if update < warm:
        return peak * (floor / 10 + (1 - floor / 10) * update / warm)
    progress = (update - warm) / (updates - warm)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def orthogonalise(matrix):
    """Nearly U V^T of a matrix U S V^T: its singular values become about 1 (0.7 to 1.2), in five
    Newton-Schulz steps. Source: Jordan et al., 2024, kellerjordan.github.io/posts/muon."""
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):  # each singular value s of x becomes 3.4445 s - 4.775 s^3 + 2.0315 s^5
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Gradient descent with momentum whose steps are orthogonal matrices: all directions of a layer
    learn alike, not just the few that dominate its gradient. Source: as orthogonalise. (PyTorch's
    own Muon always computes in bfloat16, which is slow on most CPUs.)"""
    def __init__(self, matrices, weight_decay, momentum=0.95):
        # train sets the learning rate before each step.
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = 2 * group["lr"]  # twice AdamW's rate was better (lab/RESULTS.md)
            momentum = group["momentum"]
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["mean"] = torch.zeros_like(matrix)  # of the gradients
                # m <- momentum m + (1 - momentum) gradient. For the step, Nesterov's momentum adds
                # the gradient to m a second time, in the same way.
                mean = state["mean"].lerp_(matrix.grad, 1 - momentum)
                step = orthogonalise(matrix.grad.lerp(mean, momentum))
                step *= 0.2 * math.sqrt(max(matrix.shape))  # entries as large as in AdamW's steps
                matrix *= 1 - lr * group["weight_decay"]
                matrix -= lr * step


def make_optimizers(model, name, weight_decay):
    """AdamW; if `name` is "muon", that for the matrices of the blocks and AdamW for the rest.
    Weights of layers decay; biases, norms and position tables do not."""
    matrices, weights, others = [], [], []
    for key, parameter in model.named_parameters():
        if name == "muon" and parameter.ndim == 2 and ".blocks." in key:
            matrices.append(parameter)
        elif parameter.ndim > 1 and not key.endswith("table"):
            weights.append(parameter)
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW([{"params": weights, "weight_decay": weight_decay},
                               {"params": others, "weight_decay": 0.0}], fused=True)
    return [adamw, Muon(matrices, weight_decay)] if matrices else [adamw]


# ======== 9. checkpoints
def write_atomically(path, content):
    """Writes bytes to a copy and renames it: at any moment `path` is the old file or the new."""
    copy = Path(f"{path}.tmp")
    try:
        with copy.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        copy.replace(path)
    finally:
        copy.unlink(missing_ok=True)


def save(folder, model, optimizers, scaler, recipe, history, classes):
    """last.pt, from which a run resumes, and metrics.csv, a line an epoch."""
    mean, std = mean_and_std(recipe.data)
    # In training, weights of convolutions are channels-last. safetensors, to which a user may
    # convert the file, refuses these.
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    file = io.BytesIO()
    torch.save({"model": weights, "config": asdict(model.config), "classes": classes,
                "mean": mean, "std": std, "recipe": asdict(recipe), "history": history,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "scaler": scaler.state_dict()}, file)
    rows = [history[0].keys()] + [results.values() for results in history]
    table = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_atomically(f"{folder}/metrics.csv", table.encode())
    write_atomically(f"{folder}/last.pt", file.getvalue())


def load_checkpoint(path):
    """A dict with "model" (the weights, by our names), "geometry", "config", "classes", "recipe".
    last.pt has all of these, and what a run needs to go on.
    A state dict has weights alone: "config" and "classes" are None, "recipe" is empty.
    An authors' file has a state dict under "model", and a "config" of theirs that is not used.
    Raises: InputError."""
    expect(Path(path).exists(), f"{path} does not exist: expected a file of weights")
    try:  # settings in the authors' files, of the class CfgNode, are read as an OrderedDict
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, all about this file
        raise InputError(f"{path} is damaged, or no file of weights: {error!r}") from None
    weights = content.get("model", content) if isinstance(content, dict) else {}
    named = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    expect(named and weights and all(map(torch.is_tensor, weights.values())),
           f"{path} holds no weights: expected last.pt, a state dict or the authors' file")
    released = any("patch_proj." in name for name in weights)
    try:
        if "config" in content and not released:  # last.pt
            config = DATConfig(**content["config"])
            return content | {"model": rename_weights(weights), "geometry": config.geometry,
                              "config": config, "classes": tuple(content["classes"]),
                              "recipe": dict(content["recipe"])}
        return {"model": rename_weights(weights), "geometry": "release" if released else "paper",
                "config": None, "classes": None, "recipe": {}}
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} does not hold what it should: {error}") from None


def make_model(name, data, classes, checkpoint=None):
    """A new model for these classes: the variant `name`, in the geometry of the checkpoint. If the
    checkpoint is of that variant, its own configuration is taken: VARIANTS may be newer."""
    config = VARIANTS[name]
    if checkpoint and checkpoint["recipe"].get("model") == name:
        config = checkpoint["config"]
    geometry = checkpoint["geometry"] if checkpoint else config.geometry
    size = config.image_size if data == "imagenet" else 32
    return DAT(replace(config, classes=len(classes), image_size=size, geometry=geometry))


def keeps_head(checkpoint, classes):
    """Whether the last layer of a checkpoint is for these classes: by their names, or, if it has
    no names, by their number."""
    if checkpoint["classes"]:
        return checkpoint["classes"] == classes
    return len(checkpoint["model"].get("head.bias", ())) == len(classes)


def adapt(weights, model, new_head):
    """Weights to start from: position tables get the model's sizes [D2]. (Not those of
    position="fixed", which have five axes: load_weights refuses them at another size.) If
    `new_head`, the head is the model's own."""
    adapted = dict(weights)
    for name, own in model.state_dict().items():
        if name.startswith("head.") and new_head:
            adapted[name] = own
        elif name.endswith("table") and own.ndim == 3 and name in weights:
            adapted[name] = resize(weights[name], own.shape[1:])
    return adapted


# ======== 10. training
@dataclass(frozen=True)
class Machine:
    """Where a run takes place: decides its speed, never its result. It is not saved."""
    device: torch.device
    rank: int = 0  # number of this process
    world: int = 1  # how many processes train together
    workers: int = 0  # processes that load images, for each of these

    def autocast(self, dtype):
        return torch.autocast(
            self.device.type, getattr(torch, dtype), enabled=dtype != "float32")


def micro_batches(count, recipe, machine, first_epoch):
    """The places (see Samples) of each micro-batch of this process, to the end of the run."""
    for epoch in range(first_epoch, recipe.epochs):
        rng = torch.Generator().manual_seed(seed_of("order", recipe.seed, epoch))
        order = epoch * count + torch.randperm(count, generator=rng)
        whole_batches = order.split(recipe.batch_size)[:count // recipe.batch_size]
        for batch in whole_batches:  # the processes take its micro-batches in turn
            for places in batch.split(recipe.micro_batch)[machine.rank::machine.world]:
                yield places.tolist()


def test_loader(data, images, size, machine):
    """Batches of this process's share of the test images."""
    samples = Samples(images, transform_for(data, size, "none"))
    share = range(machine.rank, len(images), machine.world)
    batches = [share[i:i + 100] for i in range(0, len(share), 100)]
    return DataLoader(samples, batch_sampler=batches, num_workers=machine.workers,
                      persistent_workers=machine.workers > 0)


@torch.no_grad()
def evaluate(model, loader, dtype, machine):
    """Accuracies from 0 to 1 on the test images of all processes: {"top1": .., "top5": ..}.
    `loader`: the test_loader of this process."""
    model.eval()
    correct = torch.zeros(2, dtype=torch.int64, device=machine.device)  # top-1, top-5
    printed_at = time.monotonic()
    for i, (images, labels) in enumerate(loader):
        with machine.autocast(dtype):
            logits = model(images.to(machine.device))
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels.to(machine.device)[:, None]
        correct += torch.stack([hits[:, 0].sum(), hits.sum()])
        if time.monotonic() - printed_at > 10:
            printed_at = time.monotonic()
            print(f"tested {(i + 1) / len(loader):.0%} of the images", flush=True)
    if machine.world > 1:
        dist.all_reduce(correct)
    top1, top5 = correct.tolist()  # of all images, as len(loader.dataset) is, not of this share
    return {"top1": top1 / len(loader.dataset), "top5": top5 / len(loader.dataset)}


def percent(accuracies, classes):
    top5 = f", top-5 {accuracies['top5']:.2%}" if len(classes) > 5 else ""
    return f"top-1 {accuracies['top1']:.2%}{top5}"


class Progress:
    """Prints every ten seconds, and at an epoch's end, where a run is and how long it will take.
    `steps`: updates in an epoch. `test_images`: their number."""
    def __init__(self, recipe, steps, first_epoch, test_images):
        self.recipe, self.steps, self.first_epoch = recipe, steps, first_epoch
        # The cost of an epoch and its test, in training images. A test image costs about a third
        # of one, as it has no backward pass.
        self.epoch_cost = steps * recipe.batch_size + test_images / 3
        self.start = time.monotonic()
        self.start_new_line()

    def start_new_line(self):
        self.losses, self.line_start = [], time.monotonic()

    def show(self, epoch, step, loss, rate):
        """After each update. Raises: InputError if the loss is not finite."""
        recipe, now = self.recipe, time.monotonic()
        self.losses.append(loss)
        if now - self.line_start < 10 and step < self.steps - 1:
            return
        loss = torch.stack(self.losses).mean().item()
        expect(math.isfinite(loss), f"epoch {epoch + 1}: the loss is {loss}, not finite; try --lr "
                                    f"below {recipe.lr:g}")
        speed = len(self.losses) * recipe.batch_size / (now - self.line_start)
        cost = (epoch - self.first_epoch) * self.epoch_cost + (step + 1) * recipe.batch_size
        whole_cost = (recipe.epochs - self.first_epoch) * self.epoch_cost
        seconds_left = round((now - self.start) * (whole_cost - cost) / cost)
        print(f"epoch {epoch + 1}/{recipe.epochs}  update {step + 1}/{self.steps}  "
              f"loss {loss:.3f}  lr {rate:.2g}  {speed:,.0f} images/s  "
              f"{timedelta(seconds=seconds_left)} left", flush=True)
        self.start_new_line()


def train(model, train_images, test_images, classes, recipe, machine, folder, resumed, use_compile):
    """Trains to the end of the recipe, and saves after each epoch. `resumed`: the checkpoint to
    go on from, or None; `use_compile`: whether to use torch.compile. Returns a dict for each epoch.
    Only process 0 prints (see start_machine). Raises: InputError if the loss is not finite."""
    from torchvision.transforms import v2
    device, size, history = machine.device, model.config.image_size, []
    optimizers = make_optimizers(model, recipe.optimizer, recipe.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == "float16")
    if resumed:
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resumed["scaler"])
        history = resumed["history"]
    network = torch.compile(model, fullgraph=True) if use_compile else model  # what the loop calls
    if machine.world > 1:
        network = nn.parallel.DistributedDataParallel(network)
    samples = Samples(train_images, transform_for(recipe.data, size, recipe.augment), recipe.seed)
    places = micro_batches(len(train_images), recipe, machine, len(history))
    # One iterator for all epochs: workers start once.
    batches = iter(DataLoader(samples, batch_sampler=places, num_workers=machine.workers))
    tests = test_loader(recipe.data, test_images, size, machine)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(classes)),
                           v2.CutMix(alpha=1.0, num_classes=len(classes))])
    steps = len(train_images) // recipe.batch_size  # updates an epoch
    updates = recipe.epochs * steps
    accumulate = recipe.batch_size // (recipe.micro_batch * machine.world)  # of an update
    progress = Progress(recipe, steps, len(history), len(test_images))

    for epoch in range(len(history), recipe.epochs):
        model.train()
        losses, start = [], time.monotonic()  # losses: of each update, in this process
        for step in range(steps):
            update = epoch * steps + step
            rate = learning_rate(update, updates=updates, peak=recipe.lr, warmup=recipe.warmup,
                                 floor=recipe.floor)
            for optimizer in optimizers:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group["lr"] = rate
            losses.append(torch.zeros((), device=device))
            for i in range(accumulate):
                images, labels = (t.to(device) for t in next(batches))
                index = i * machine.world + machine.rank  # of this micro-batch in the batch
                torch.manual_seed(seed_of("update", recipe.seed, update, index))  # mix, drop path
                if update < recipe.mixed * updates:
                    images, labels = mix(images, labels)
                if machine.world > 1:  # they exchange gradients after the last one only
                    network.require_backward_grad_sync = (i == accumulate - 1)
                with machine.autocast(recipe.dtype):
                    loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
                scaler.scale(loss / accumulate).backward()
                losses[-1] += loss.detach() / accumulate
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            progress.show(epoch, step, losses[-1], rate)

        loss, seconds = torch.stack(losses).mean(), time.monotonic() - start
        if machine.world > 1:
            dist.all_reduce(loss)
        expect(all(parameter.isfinite().all() for parameter in model.parameters()),
               f"epoch {epoch + 1}: weights are not finite; try --lr below {recipe.lr:g}")
        accuracies = evaluate(model, tests, recipe.dtype, machine)
        history.append({"epoch": epoch + 1, "loss": loss.item() / machine.world, **accuracies,
                        "seconds": seconds})
        if machine.rank == 0:
            save(folder, model, optimizers, scaler, recipe, history, classes)
        print(f"epoch {epoch + 1}/{recipe.epochs}  test {percent(accuracies, classes)}", flush=True)
        progress.start_new_line()
    return history


# ======== 11. command line
def device_for(choice):
    """The device of the flag --device; "auto" is a GPU if there is one. Raises: InputError."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    kind = next(name for name in here if here[name]) if choice == "auto" else choice
    expect(here[kind], f"--device {kind}: PyTorch finds none here; try --device cpu")
    return torch.device(kind)


def dtype_for(choice, device):
    """The type to compute in, by the flag --dtype; "auto" is what the hardware multiplies fast."""
    if choice != "auto":
        return choice
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if fast else "float32"


def start_machine(args):
    """The device and the processes of this run; joins those of torchrun. Raises: InputError."""
    rank, local_rank, world = 0, 0, 1
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if names <= os.environ.keys():  # torchrun sets all; a cluster may set some for one process
        rank, local_rank, world = (int(os.environ[name])
                                   for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = device_for(args.device)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        expect(local_rank < count, f"process {local_rank + 1} of this machine finds {count} GPUs: "
                                   "start no more processes (--nproc-per-node)")
        torch.cuda.set_device(local_rank)
    if args.workers is not None:
        workers = args.workers
    elif device.type == "cuda":
        processors = os.cpu_count()
        if hasattr(os, "sched_getaffinity"):  # Linux: those that this process may use
            processors = len(os.sched_getaffinity(0))
        workers = processors // int(os.environ.get("LOCAL_WORLD_SIZE", world))
    else:
        workers = 0
    if world > 1:
        dist.init_process_group()
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 reports for all
    return Machine(device, rank, world, workers)


def load_data(machine, name, root, split):
    """load_dataset in all processes, first in process 0, which downloads what is missing. Each
    process calls barrier once: process 0 after it has loaded, the others before."""
    if machine.rank > 0:
        dist.barrier()
    try:
        return load_dataset(name, root, split)
    finally:  # also after an error: the others shall not wait for ever
        if machine.rank == 0 and machine.world > 1:
            dist.barrier()


def model_name(data, given, checkpoint):
    """The name of a variant: the flag --model, or the checkpoint's, or the default for the data."""
    default = "dat-t" if data == "imagenet" else "cifar-nano"
    trained = checkpoint["recipe"] if checkpoint else {}
    return given.get("model", trained.get("model", default))


def run_evaluation(args, given, machine):
    """--eval. `given`: fields of a recipe that the user set by flags."""
    checkpoint = load_checkpoint(args.checkpoint)
    images, classes = load_data(machine, args.eval, args.data, "test")
    expect(checkpoint["classes"] in (None, classes),
           f"{args.checkpoint} is for other classes than those of {args.eval} in {args.data}")
    name = model_name(args.eval, given, checkpoint)
    choice = given.get("dtype", checkpoint["recipe"].get("dtype", "auto"))
    dtype = dtype_for(choice, machine.device)
    model = make_model(name, args.eval, classes, checkpoint)
    load_weights(model, checkpoint["model"], args.checkpoint)
    tests = test_loader(args.eval, images, model.config.image_size, machine)
    accuracies = evaluate(model.to(machine.device), tests, dtype, machine)
    print(f"{name} of {args.checkpoint} in {dtype} on {len(images):,} images of {args.eval}: "
          f"{percent(accuracies, classes)}")


def new_folder(out, data):
    """`out`, which is new or empty (see read_flags), or the first runs/<data>-<n> that is new.
    mkdir fails where another run, started at the same time, was faster."""
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        return out
    for n in itertools.count(1):
        try:
            Path(f"runs/{data}-{n}").mkdir(parents=True)
            return f"runs/{data}-{n}"
        except FileExistsError:
            continue


def start_run(args, given, classes, machine):
    """The recipe and the model of a new run. It starts from new weights, or from --checkpoint."""
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    new_head = checkpoint is not None and not keeps_head(checkpoint, classes)
    chosen = {"model": model_name(args.train, given, checkpoint),
              "dtype": dtype_for(given.get("dtype", "auto"), machine.device)}
    recipe = recipe_for(args.train, given | chosen, world=machine.world,
                        fine_tuning=checkpoint is not None, new_head=new_head)
    torch.manual_seed(recipe.seed)
    model = make_model(recipe.model, args.train, classes, checkpoint)
    if checkpoint:
        load_weights(model, adapt(checkpoint["model"], model, new_head), args.checkpoint)
    if new_head:
        print(f"head: {len(checkpoint['model'].get('head.bias', ()))} -> {len(classes)} classes, "
              "starts anew", flush=True)
    return recipe, model


def load_run(folder, given):
    """The checkpoint of a run to resume, with its Recipe. The flags must agree with it."""
    path = Path(folder, "last.pt")
    expect(path.exists(),
           f"--out {folder}: nothing is saved yet, no epoch had ended; start a new run")
    checkpoint = load_checkpoint(path)
    try:
        recipe = Recipe(**checkpoint["recipe"])
        whole = {"optimizers", "scaler", "history"} <= checkpoint.keys()
    except TypeError:
        whole = False
    expect(whole, f"{path} is no run of this version of dat.py: to start from its weights, use "
                  "--checkpoint")
    for name, value in given.items():
        flag = "--train" if name == "data" else f"--{name.replace('_', '-')}"
        expect(value == getattr(recipe, name),
               f"{path} has {flag} {getattr(recipe, name)}, not {value}: omit the flag")
    return checkpoint | {"recipe": recipe}


def command_line(args, machine, *flags):
    """How to start dat.py again with the data, device and processes of now, and other flags."""
    program = ["python"] if machine.world == 1 else ["torchrun", "--nproc-per-node", machine.world]
    program += ["dat.py", "--data", args.data, "--device", args.device, *flags]
    return shlex.join(map(str, program))


def run_training(args, given, machine):
    """--train: a new run or one to resume. What can be wrong is found before anything is written.
    `given`: fields of a recipe that the user set by flags."""
    resumed = load_run(args.out, given | {"data": args.train}) if args.resume else None
    train_images, classes = load_data(machine, args.train, args.data, "train")
    test_images, test_classes = load_data(machine, args.train, args.data, "test")
    expect(classes == test_classes, f"--data {args.data}: train/ and val/ differ in the classes "
                                    f"{sorted({*classes} ^ {*test_classes})[:3]}")
    if resumed:
        expect(resumed["classes"] == classes, f"{args.out} is for other classes than those of "
                                              f"--data {args.data}")
        recipe, model = resumed["recipe"], DAT(resumed["config"])
        load_weights(model, resumed["model"], args.out)
    else:
        recipe, model = start_run(args, given, classes, machine)
    batch, at_once = recipe.batch_size, recipe.micro_batch * machine.world
    expect(batch <= len(train_images), f"--batch-size {batch} is more than the "
           f"{len(train_images):,} images to train on: choose a smaller one")
    expect(batch % at_once == 0, f"--batch-size {batch} is no multiple of --micro-batch "
           f"{recipe.micro_batch} in each of {machine.world} processes")
    model.to(machine.device)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # gradients come in this layout; DDP wants both alike
            module.to(memory_format=torch.channels_last)
    folder = args.out
    if machine.rank == 0 and not resumed:  # the others write nothing
        folder = new_folder(args.out, args.train)
    print(f"{len(train_images):,} images to train on, {len(test_images):,} to test on; "
          f"{sum(p.numel() for p in model.parameters()):,} parameters; "
          f"{machine.world} x {machine.device.type}; into {folder}/\n{recipe}", flush=True)
    try:
        history = train(model, train_images, test_images, classes, recipe, machine, folder,
                        resumed, args.compile)
    except KeyboardInterrupt:
        hint = "no epoch had ended: nothing is saved"
        if Path(f"{folder}/last.pt").exists():
            hint = "go on with: " + command_line(
                args, machine, "--train", args.train, "--resume", "--out", folder)
        print(f"stopped; {hint}", flush=True)
        raise
    last = f"{folder}/last.pt"
    print(f"finished: test {percent(history[-1], classes)}, saved in {last}; to test it again:\n"
          + command_line(args, machine, "--eval", args.train, "--checkpoint", last))


def whole_number(text, least=1):
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number, {least} or more, not {text!r}")
    return int(text)


def read_flags(arguments):
    """All flags, and a dict of those that set fields of a recipe and were given. A mistake ends
    the program."""
    parser = argparse.ArgumentParser("dat.py", usage=argparse.SUPPRESS, description=(
        "Train or test a Vision Transformer with Deformable Attention. Without any data: "
        "python dat.py --train shapes"))
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--train", choices=DATA, help="data to train on")
    task.add_argument("--eval", choices=DATA, help="data to test --checkpoint on")
    flag = parser.add_argument
    flag("--data", default="data", help="folder of CIFAR, or of train/<class>/ and val/<class>/")
    flag("--checkpoint", help="weights to test or to start from: last.pt, or the authors' file")
    flag("--out", help="folder of the run; default: runs/<data>-<n>")
    flag("--resume", action="store_true", help="go on with the run in --out")
    flag("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    flag("--workers", type=lambda text: whole_number(text, 0),
         help="processes that load images; default: without a GPU 0, else one for each processor")
    flag("--compile", action="store_true", help="use torch.compile")
    change = parser.add_argument_group("changes of the recipe").add_argument
    change("--model", choices=VARIANTS, help="default: what suits the data")
    change("--dtype", choices=("auto", "float32", "bfloat16", "float16"),
           help="type of autocast; default: auto, what the hardware multiplies fast")
    change("--epochs", type=whole_number, help="times that all images are seen")
    change("--batch-size", type=whole_number, help="images an update, in all processes")
    change("--micro-batch", type=whole_number, help="images at once, for less memory")
    change("--lr", type=float, help="highest learning rate")
    change("--seed", type=lambda text: whole_number(text, 0), help="of all draws; default: 0")
    args = parser.parse_args(arguments or ["--help"])
    names = ("model", "dtype", "epochs", "batch_size", "micro_batch", "lr", "seed")
    given = {name: value for name, value in vars(args).items()
             if name in names and value not in (None, "auto")}
    if not 0 < given.get("lr", 1) < math.inf:
        parser.error(f"--lr {args.lr}: expected a number above 0")
    if args.eval and not args.checkpoint:
        parser.error("--eval needs --checkpoint")
    if args.resume and (not args.train or not args.out or args.checkpoint):
        parser.error("--resume needs --train and --out, and takes no --checkpoint")
    if args.out and not args.resume and Path(args.out).is_dir() and any(Path(args.out).iterdir()):
        parser.error(f"--out {args.out} is not empty: choose another folder, or add --resume")
    return args, given


def main(arguments=None):
    """Returns the exit code: 0, 2 for a caller's mistake, 130 after Ctrl-C."""
    args, given = read_flags(sys.argv[1:] if arguments is None else arguments)
    try:
        run = run_training if args.train else run_evaluation
        run(args, given, start_machine(args))
        return 0
    except KeyboardInterrupt:
        return 130
    except (InputError, OSError) as error:
        # From a DataLoader's worker comes a whole traceback, with "InputError: <message>" at its
        # end. Other messages stay whole.
        message = " ".join(str(error).rpartition("InputError: ")[2].split())
        print(f"dat.py: {message:.400}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            gc.collect()  # frees DistributedDataParallel, which must go before its process group
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
