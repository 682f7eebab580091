# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "numpy", "pytest", "hypothesis", "Pillow", "matplotlib"]
# ///
"""DAT in one file: Vision Transformer with Deformable Attention (Xia et al., CVPR 2022).

    python dat.py --train shapes      # generated figures, no download: two minutes on two cores
    python dat.py --train cifar10     # downloads the archive once, trains, reports test accuracy
    pytest                            # the properties, and parity with reference_numpy.py

Paper: https://arxiv.org/abs/2201.00520. Map from its equations to the names here:

    (1)-(3)  multi-head attention          attend; projections and heads: the modules that call it
    (4)-(5)  pre-norm transformer block    Block.forward
    (6)      q, k~, v~                     DeformableAttention.project
    (7)      offsets, s tanh, points       OffsetNetwork, DeformableAttention.points
    (8)      bilinear sampling phi         bilinear_sample
    (9)      relative-bias interpolation   DeformableAttention.position_bias
    (10)     cost of one attention         deformable_attention_macs
    Sec. 3.3 stages, patch embedding       DAT, Stage, Projection;  Tab. 1 variants: VARIANTS
    Swin     windows and shifted windows   WindowAttention

Symbols, in code and shape comments (features are channels-last everywhere):

    B batch   H W map height, width   C channels   M heads   G offset groups   d = C / M
    N = H W queries   Hk Wk grid of sampling points, r = H / Hk   K = Hk Wk keys   w window side
    s offset range   k kernel of the offset network
    Coordinates are (y, x) in pixels of the map: 0 is the centre of the first pixel, H - 1 that of
    the last.

Departures from the paper [P] and from the authors' release at 566a593 [R]:

    [D1] geometry="paper" puts r = 1 reference points on whole pixels, so a zero offset reads the
         map itself; the release's points fall between pixels and blur. "release" is kept for the
         authors' weights. [R]
    [D2] Any image size: maps are padded at the bottom and right when patches are cut, windows at
         the border hold fewer tokens, position tables are resized bicubically. [P, R]
    [D3] Shifted windows are cut at ceil(w / 2), like the release's (Swin: floor). [P]
    [D4] The offset network has the release's LayerNorm before GELU. [P]
    [D5] offsets=False and position="fixed" work (they crash in the release), without leaving an
         unused parameter behind. [R]
    [D6] stem="conv": overlapping 3x3 convolutions for small images, a switch the release's
         ImageNet models leave off. [P]
    [D7] Weights start from PyTorch's defaults and position tables from a normal distribution of
         deviation 0.01: what the release's code amounts to; the paper does not say. [P]
    [D8] Training: one operation of random strength per image instead of RandAugment's two of
         strength 9, uniform noise in the erased box, mixing drawn for each image and none in the
         last tenth of a run; the cosine starts where warm-up ends, not with it. [P, R]
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import gzip
import hashlib
import http.client
import io
import itertools
import math
import os
import pickle
import platform
import signal
import sys
import tarfile
import time
import urllib.request
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class InputError(ValueError):
    """A caller's mistake, told in one line; the command line prints it and exits with 2."""


def _check(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


# ============================================================ 3. configuration and variants

CHOICES = {"stem": ("patch", "conv"), "geometry": ("paper", "release"), "offsets": (True, False),
           "position": ("relative", "fixed", "none")}
CONV_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}                # patch -> strides of the two 3x3
SCORES = 2 ** 24            # of an image's attention at a time: bounds the memory of inference
ONEDNN = torch.backends.mkldnn.is_available() and torch.get_num_threads() > 1       # see Linear


def _check_fields(config: object, *, integers: str = "", choices: str = "") -> None:
    for name in integers.split():
        value = getattr(config, name)
        _check(type(value) is int and value > 0, f"{name}={value!r} is not a positive integer")
    for name in choices.split():
        value = getattr(config, name)
        _check(value in CHOICES[name] and type(value) is type(CHOICES[name][0]),
               f"{name}={value!r} is not one of {CHOICES[name]}")


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value < high


def cells(length: int, size: int) -> int:
    """How many cells of `size` cover `length`; the last one may stick out."""
    return (length + size - 1) // size


def _pair(name: str, value: object) -> tuple[int, int]:
    """An int for both axes, or (height, width)."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    _check(len(pair) == 2 and all(type(n) is int and n > 0 for n in pair),
           f"{name}={value!r} is neither a positive integer nor a pair (height, width)")
    return pair


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage. Paper: Sec. 3.3, Tab. 1.

    `blocks`, one letter each: L local windows, S shifted windows, D deformable attention. The D
    blocks need `groups` (G) and read `stride` (r), `kernel` (k) and `offset_range` (s).
    Raises: ValueError naming the field and its value.
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
        _check_fields(self, integers="dim heads window stride kernel")
        _check(self.dim % self.heads == 0, f"dim={self.dim} is not divisible by heads={self.heads}")
        _check(isinstance(self.blocks, str) and self.blocks and set(self.blocks) <= set("LSD"),
               f"blocks={self.blocks!r} is not a string of the letters L, S and D")
        _check((self.groups is not None) == ("D" in self.blocks), f"groups={self.groups!r} with "
               f"blocks={self.blocks!r}: groups is required exactly when there is a D")
        if self.groups is not None:
            _check_fields(self, integers="groups")
            _check(self.heads % self.groups == 0,
                   f"heads={self.heads} is not divisible by groups={self.groups}")
        _check(self.kernel % 2, f"kernel={self.kernel} is even, so it has no centre")
        _check(_is_number(self.offset_range, 0, math.inf) and self.offset_range, "offset_range="
               f"{self.offset_range!r} is not a positive number (for no offsets: offsets=False)")


@dataclass(frozen=True, kw_only=True)
class DATConfig:
    """The whole network. Paper: Sec. 3.3; `offsets` and `position` are its ablations.

    `image_size` (int or (H, W)) sets the size of the position tables; any input size works.
    `stem`: "patch" (the paper) or "conv" [D6]; `geometry`: "paper" or "release" [D1].
    Plain values build it again: DATConfig(**dataclasses.asdict(config)) == config.
    Raises: ValueError naming the field and its value.
    """
    stages: tuple[StageConfig, ...]
    image_size: int | tuple[int, int] = 224
    patch: int = 4
    stem: str = "patch"
    classes: int = 1000
    mlp_ratio: float = 4
    drop_path: float = 0.0
    geometry: str = "paper"
    offsets: bool = True
    position: str = "relative"

    def __post_init__(self) -> None:
        _check(isinstance(self.stages, (tuple, list)) and self.stages
               and all(isinstance(s, (StageConfig, dict)) for s in self.stages),
               f"stages={self.stages!r} is not a non-empty tuple of StageConfig")
        for plain in (s for s in self.stages if isinstance(s, dict)):
            wrong = plain.keys() ^ StageConfig.__dataclass_fields__.keys()
            _check(not wrong, f"stages={plain!r}: missing or unknown are {sorted(wrong, key=str)}")
        stages = tuple(StageConfig(**s) if isinstance(s, dict) else s for s in self.stages)
        object.__setattr__(self, "stages", stages)
        pair = _pair("image_size", self.image_size)
        if type(self.image_size) is not int:
            object.__setattr__(self, "image_size", pair)
        _check_fields(self, integers="patch classes", choices=" ".join(CHOICES))
        dims = [s.dim for s in stages]
        _check(self.stem == "patch" or self.patch in CONV_STRIDES and dims[0] % 2 == 0,
               f"stem='conv' with patch={self.patch}, dim={dims[0]}: needs patch 1, 2 or 4 and an "
               "even dim in the first stage")
        _check(_is_number(self.mlp_ratio, 0, math.inf) and int(self.mlp_ratio * min(dims)) > 0,
               f"mlp_ratio={self.mlp_ratio!r} is not a number that leaves an MLP any width")
        _check(_is_number(self.drop_path, 0, 1), f"drop_path={self.drop_path!r} is not in [0, 1)")

    def map_sizes(self, image_size: int | tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """(H, W) of each stage's map for an image of `image_size` (default: the configured)."""
        size = _pair("image_size", self.image_size if image_size is None else image_size)
        return [tuple(cells(length, self.patch * 2 ** i) for length in size)
                for i in range(len(self.stages))]


def _stages(dim: int, heads: int, blocks: tuple, groups: tuple, window: int = 7) -> tuple:
    """Widths and heads double from stage to stage, offset kernels end in 5, 3 (Tab. 1)."""
    return tuple(StageConfig(dim=dim * 2 ** i, heads=heads * 2 ** i, blocks=letters,
                             groups=groups[i], kernel=2 * (len(blocks) - i) + 1, window=window)
                 for i, letters in enumerate(blocks))


_T, _S = ("LS", "LS", "LD" * 3, "LD"), ("LS", "LS", "LD" * 9, "LD")
_NARROW, _WIDE = (None, None, 3, 6), (None, None, 4, 8)         # groups
VARIANTS = {
    "dat-t": DATConfig(stages=_stages(96, 3, _T, _NARROW), drop_path=0.2),
    "dat-s": DATConfig(stages=_stages(96, 3, _S, _NARROW), drop_path=0.3),
    "dat-b": DATConfig(stages=_stages(128, 4, _S, _WIDE), drop_path=0.5),
    "dat-b-384": DATConfig(stages=_stages(128, 4, _S, _WIDE, 12), image_size=384, drop_path=0.5),
    "cifar": DATConfig(stages=_stages(48, 3, _T, _NARROW, 4), image_size=32, patch=1, stem="conv",
                       classes=10, drop_path=0.1),              # half-width DAT-T, maps 32/16/8/4
    "cifar-nano": DATConfig(stages=_stages(48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), 4),
                            image_size=32, patch=4, stem="conv", classes=10),  # CPU, maps 8/4/2
}


def build(variant: str, **overrides: object) -> DAT:
    """The model of VARIANTS[variant], fields of its DATConfig replaced by `overrides`."""
    _check(variant in list(VARIANTS), f"variant {variant!r} is not one of {list(VARIANTS)}")
    unknown = overrides.keys() - DATConfig.__dataclass_fields__.keys()
    _check(not unknown, f"DATConfig has no field {', '.join(sorted(unknown))}")
    return DAT(replace(VARIANTS[variant], **overrides))


# ============================================================ 4. coordinates and sampling


def cell_centres(count: int, length: int, *, geometry: str, like: Tensor) -> Tensor:
    """Coordinates of `count` cells along an axis of `length` pixels. Paper: Sec. 3.2, p.

    Shape: (count,), in the type and on the device of `like`. Units: px of the map.
    "paper": from the first pixel's centre to the last one's. "release": inside both by half a
    cell, so that even with count = length they miss the whole pixels [D1].
    """
    i = torch.arange(count, dtype=like.dtype, device=like.device)
    if geometry == "release":
        return (i + 0.5) / count * (length - 1)
    if count == 1:
        return i + (length - 1) / 2
    return i * (length - 1) / (count - 1)


def largest_offset(count: int, length: int, *, offset_range: float, geometry: str) -> float:
    """How far (px) a point may move along an axis. Paper: Sec. 3.2, dp <- s tanh(dp).

    s / 2 cells, a cell being the axis divided by its points: H / Hk px in "paper" geometry,
    (H - 1) / Hk px in "release". (The paper leaves the unit of s open; this is the release's.)
    """
    return offset_range / 2 * (length if geometry == "paper" else length - 1) / count


def bilinear_sample(maps: Tensor, points: Tensor) -> Tensor:
    """phi(z; p): the map between its pixels, zero off the map. Paper: Eq. 8.

    Shape: (B, C, H, W), (B, h, w, 2) -> (B, C, h, w). Units: points (y, x) in px of the map.
    The one place that knows grid_sample's convention: x before y, and the image, from pixel edge
    to pixel edge, is [-1, 1]. (Measured between pixel centres, a 1-pixel map would divide by 0.)
    """
    height, width = maps.shape[-2:]
    y, x = points.unbind(-1)
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    sampled = F.grid_sample(maps.to(grid.dtype), grid, padding_mode="zeros", align_corners=False)
    return sampled.to(maps.dtype)


def sample_pieces(table: Tensor, start: Tensor, size: tuple[int, int]) -> Tensor:
    """Pieces of a table that begin between its entries: Eq. 8 for a piece as a whole.

    Every entry of a piece lies the same way between entries of the table, so the piece is one mix
    of the four pieces that begin around `start`, with four weights.
    Shape: (G, M, Y, X), (B, G, K, 2), size (h, w) -> (B, G, K, M, h, w), M the tables of a group.
    Units: start (y, x) in entries, from 0 to Y - h > 0 and X - w > 0.
    """
    (G, M), (h, w) = table.shape[:2], size
    pieces = table.unfold(2, h, 1).unfold(3, w, 1)              # (G, M, Y - h + 1, X - w + 1, h, w)
    rows, columns = pieces.shape[2:4]
    pieces = pieces.movedim(1, 3).reshape(G * rows * columns, M * h * w)
    start = [start[..., i].clamp(0, n - 1) for i, n in enumerate((rows, columns))]      # (B, G, K)
    y, x = (at.detach().floor().nan_to_num().clamp(max=n - 2)   # not a number: in the weights only
            for at, n in zip(start, (rows, columns)))
    fy, fx = start[0] - y, start[1] - x
    weights = torch.stack([(1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx], dim=-1)
    corner = (torch.arange(G, device=y.device)[:, None] * rows + y.long()) * columns + x.long()
    index = torch.stack([corner, corner + 1, corner + columns, corner + columns + 1], dim=-1)
    mixed = F.embedding_bag(index.flatten(0, 2), pieces, mode="sum",
                            per_sample_weights=weights.flatten(0, 2))
    return mixed.view(*y.shape, M, h, w)


def resize(table: Tensor, size: tuple[int, int]) -> Tensor:
    """The last two axes of a position table at another size, bicubically [D2]; centre on centre.

    Shape: (..., h, w) -> (..., *size).
    """
    if table.shape[-2:] == size:
        return table
    flat = F.interpolate(table.flatten(0, -3)[None], size, mode="bicubic")
    return flat[0].unflatten(0, table.shape[:-2])


# ============================================================ 5. small blocks


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *,
           fused: bool | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v. Paper: Eq. 2 and 9.

    Shape: (B, M, N, d), (B, M, K, d) twice, bias broadcastable to (B, M, N, K) -> (B, M, N, d).
    `fused`: by PyTorch's kernels, as is the default but on a CPU, where the formula is faster.
    Excepted is cuDNN's kernel, which has open bugs with additive masks.
    """
    bias = None if bias is None else bias.to(q.dtype)
    fused = q.device.type != "cpu" if fused is None else fused
    if not fused:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if bias is not None:
            scores += bias
        return scores.softmax(dim=-1) @ v
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Linear(nn.Linear):
    """x W^T + b. Shape: (..., C) -> (..., C').

    On several threads of a CPU as a 1x1 convolution over one row of pixels: the same products, but
    PyTorch has them done by another library, oneDNN, and faster (tutorial.md, section 16).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not ONEDNN or x.device.type != "cpu" or x.numel() == 0:
            return super().forward(x)
        row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)          # (1, C, 1, rows)
        row = F.conv2d(row, self.weight[:, :, None, None], self.bias)
        return row.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def position_table(*shape: int) -> nn.Parameter:
    """Learned biases, at first from a normal distribution of deviation 0.01 [D7]."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.01))


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, zeroes a sample with probability `rate` and scales the others up to match.

    Source: stochastic depth (Huang et al., 2016), as in the release. Shape: (B, ...) -> the same.
    """
    if not training or rate == 0:
        return x
    kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= rate
    return x * (kept / (1 - rate))


class Projection(nn.Module):
    """Convolution and layer norm: patch embedding, and down-sampling between stages.

    Paper: Sec. 3.3, Fig. 3. Shape: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C').
    Patches (kernel = stride) that stick out at the bottom or right are filled with zeros [D2].
    """

    def __init__(self, dim: int, out_dim: int, *, kernel: int, stride: int, bias: bool = True):
        super().__init__()
        self.stride, self.patches = stride, kernel == stride    # else overlapping, centred
        padding = 0 if self.patches else kernel // 2
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride, padding, bias=bias)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.patches:
            bottom, right = (cells(n, self.stride) * self.stride - n for n in x.shape[1:3])
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


# ============================================================ 6. window attention


class WindowAttention(nn.Module):
    """Attention inside w x w windows with Swin's relative position bias: blocks L and S.

    Paper: Sec. 3.3 (after Swin, Liu et al. 2021). Shape: (B, H, W, C) -> the same, any H, W.
    The windows tile the map from the top left. With `shift`, the map is rolled by so many rows and
    columns first [D3]; what is outside it [D2], or was rolled next to a stranger, is masked.
    """

    def __init__(self, *, dim: int, heads: int, window: int, shift: int = 0):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = Linear(dim, 3 * dim)
        self.out = Linear(dim, dim)
        self.table = position_table(heads, 2 * window - 1, 2 * window - 1)

    def position_bias(self, h: int, w: int) -> Tensor:
        """(M, h w, h w): table[q - k + window - 1] for the cells q, k of a window of h x w.

        What a query reads is an h x w piece of the table, which starts at q; k runs through it
        backwards.
        """
        side = self.window
        table = self.table[:, side - h:side + h - 1, side - w:side + w - 1]
        pieces = table.unfold(1, h, 1).unfold(2, w, 1)          # (M, qy, qx, h, w)
        return pieces.flip(3, 4).flatten(3, 4).flatten(1, 2)

    def window_of(self, length: int, padded: int, roll: int, device: torch.device) -> Tensor:
        """For the rows (or columns) of the rolled map: the window of the map itself they belong to.

        Shape: (padded,). -1 before the first cut, `length` for rows outside the map.
        """
        row = torch.arange(padded, device=device).roll(-roll)
        window = (row - self.shift).div(self.window, rounding_mode="floor")
        return window.masked_fill(row >= length, length)

    def forward(self, x: Tensor) -> Tensor:
        (B, H, W, C), M = x.shape, self.heads
        h, w = min(self.window, H), min(self.window, W)
        rows, columns = cells(H, h), cells(W, w)
        outside = (0, columns * w - W, 0, rows * h - H)
        up, left = (self.shift if self.shift < length else 0 for length in (H, W))
        bias = self.position_bias(h, w)[None]                   # the same for all windows..
        if up or left or any(outside):                          # ..but for masks
            place = (self.window_of(H, rows * h, up, x.device)[:, None] * (W + 2)
                     + self.window_of(W, columns * w, left, x.device))
            place = place.view(rows, h, columns, w).transpose(1, 2).reshape(-1, h * w, 1)
            bias = bias.masked_fill((place != place.transpose(1, 2))[:, None], -math.inf)
        n = len(bias)                                           # 1 or the number of windows
        x = F.pad(x, (0, 0, *outside)) if any(outside) else x
        x = x.roll((-up, -left), (1, 2)) if up or left else x

        qkv = self.qkv(x).view(B, rows, h, columns, w, 3, M, C // M).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = qkv.reshape(3, B * rows * columns // n, n * M, h * w, C // M)
        z = attend(q, k, v, bias.flatten(0, 1)[None])
        z = z.reshape(B, rows, columns, M, h, w, C // M).permute(0, 1, 4, 2, 5, 3, 6)
        z = z.reshape(B, rows * h, columns * w, C)
        z = z.roll((up, left), (1, 2)) if up or left else z
        return self.out(z[:, :H, :W])


# ============================================================ 7. deformable attention


class OffsetNetwork(nn.Module):
    """theta_offset: how far each sampling point should move. Paper: Sec. 3.2, Fig. 2 (b).

    Depth-wise k x k convolution of stride r, layer norm [D4], GELU, 1x1 convolution without bias
    ("to alleviate the compulsive shift for all locations").
    Shape: (B, H, W, C / G) -> (B, Hk, Wk, 2), (y, x) before bounding.
    """

    def __init__(self, *, dim: int, kernel: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = Linear(dim, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        x = self.conv(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out(F.gelu(self.norm(x)))


class DeformableAttention(nn.Module):
    """Attention whose keys and values are read where an offset network points. Paper: Sec. 3.2.

    Usable alone. Shape: (B, H, W, C) -> the same, at any H, W; `size` (int or (H, W)) is the map
    size that the position table is made for. `offsets=False` and `position` are the ablations.
    Raises: ValueError naming the argument and its value, or the shape of a wrong input.
    """

    def __init__(self, *, dim: int, heads: int, groups: int, size: int | tuple[int, int],
                 stride: int = 1, kernel: int = 5, offset_range: float = 2.0,
                 geometry: str = "paper", offsets: bool = True, position: str = "relative"):
        super().__init__()
        stage = StageConfig(dim=dim, heads=heads, blocks="D", groups=groups, stride=stride,
                            kernel=kernel, offset_range=offset_range)
        DATConfig(stages=(stage,), geometry=geometry, offsets=offsets, position=position)  # checks
        self.heads, self.groups, self.stride = heads, groups, stride
        self.offset_range, self.geometry, self.position = offset_range, geometry, position
        self.q, self.k, self.v, self.out = (Linear(dim, dim) for _ in range(4))
        self.offset = (OffsetNetwork(dim=dim // groups, kernel=kernel, stride=stride)
                       if offsets else None)
        H, W = _pair("size", size)
        if position == "relative":
            self.table = position_table(heads, 2 * H - 1, 2 * W - 1)
        elif position == "fixed":
            self.table = position_table(heads, H, W, cells(H, stride), cells(W, stride))

    def reference_points(self, Hk: int, Wk: int, H: int, W: int, like: Tensor) -> Tensor:
        """p, the uniform grid; the queries' own places with Hk, Wk = H, W. Paper: Sec. 3.2.

        Shape: (Hk, Wk, 2), typed like `like`. Units: (y, x) in px of the map.
        """
        return torch.cartesian_prod(*(
            cell_centres(count, length, geometry=self.geometry, like=like)
            for count, length in ((Hk, H), (Wk, W)))).view(Hk, Wk, 2)

    def reach(self, H: int, W: int) -> list[float]:
        """The largest offset along each axis of the map, in px."""
        return [largest_offset(cells(length, self.stride), length, geometry=self.geometry,
                               offset_range=self.offset_range) for length in (H, W)]

    def points(self, q: Tensor) -> Tensor:
        """p + dp, where a group's keys are sampled. Paper: Eq. 7 and dp <- s tanh(dp).

        Shape: (B, H, W, C) -> (B, G, Hk, Wk, 2). Units: (y, x) in px of the map, never less than
        float32: in bfloat16 a coordinate near 100 would be off by a quarter of a pixel.
        """
        (B, H, W, _), G = q.shape, self.groups
        Hk, Wk = cells(H, self.stride), cells(W, self.stride)
        like = q.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
        reference = self.reference_points(Hk, Wk, H, W, like)
        if self.offset is None:
            return reference.expand(B, G, Hk, Wk, 2)
        grouped = q.unflatten(3, (G, -1)).movedim(3, 1)         # (B, G, H, W, C / G)
        raw = self.offset(grouped.flatten(0, 1)).to(like.dtype).view(B, G, Hk, Wk, 2)
        offset = [reach * raw[..., i].tanh() for i, reach in enumerate(self.reach(H, W))]
        return reference + torch.stack(offset, dim=-1)

    def position_bias(self, points: Tensor, size: tuple[int, int],
                      rows: tuple[int, int] | None = None) -> Tensor | None:
        """phi(B^; R): the table, read at every displacement of a query from a key. Paper: Eq. 9.

        Shape: (B, G, Hk, Wk, 2) -> (B, M, N, K), or (1, M, N, K) if position="fixed"; with `rows`
        (first, end) the N are the queries of these rows of the map alone.
        Table entry (0, 0) stands for the displacement -(H - 1), -(W - 1); the centre,
        (H - 1, W - 1), for none: 2 H - 1 entries for H rows. Points are within `reach` of the map.
        """
        (B, G, Hk, Wk, _), (H, W), (first, end) = points.shape, size, rows or (0, size[0])
        if self.position == "none":
            return None
        table = self.table.to(points.dtype)
        if self.position == "fixed":                            # one number per query and key cell
            table = resize(table, (Hk, Wk)).permute(0, 3, 4, 1, 2)          # (M, Hk, Wk, H0, W0)
            table = resize(table, (H, W))[..., first:end, :]
            return table.flatten(3).flatten(1, 2).transpose(1, 2)[None]
        table = resize(table, (2 * H - 1, 2 * W - 1)).unflatten(0, (G, -1))
        if self.geometry == "paper":                            # queries stand on whole pixels:
            y, x = (int(min(reach, n - 1)) + 1 for reach, n in zip(self.reach(H, W), (H, W)))
            table = F.pad(table, (x, x, y, y))                  # .. what they read of it is a piece
            table = table[:, :, first:table.shape[2] - (H - end)]
            start = [n - 1 + pad - points[..., i].flatten(2)
                     for i, (n, pad) in enumerate(((H, y), (W, x)))]
            bias = sample_pieces(table, torch.stack(start, dim=-1), (end - first, W))
            bias = bias.flatten(4).permute(0, 1, 3, 4, 2)       # (B, G, M / G, N, K)
            return bias.flatten(1, 2).contiguous()
        y, x = (cell_centres(n, n, geometry=self.geometry, like=points) + n - 1 for n in (H, W))
        queries = torch.cartesian_prod(y[first:end], x)         # (N, 2)
        keys = points.transpose(0, 1).reshape(G, B, 1, Hk * Wk, 2)
        index = queries[:, None] - keys                         # (G, B, N, K, 2)
        bias = bilinear_sample(table, index.flatten(1, 2))      # (G, M / G, B N, K)
        return bias.flatten(0, 1).unflatten(1, (B, len(queries))).transpose(0, 1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k~, v~ and the points where these were read. Paper: Eq. 6-8.

        Shape: (B, H, W, C) -> (B, M, N, d), (B, M, K, d) twice, (B, G, Hk, Wk, 2).
        """
        _check(x.ndim == 4 and x.shape[3] == self.q.in_features and 0 not in x.shape[1:],
               f"expected (B, H, W, {self.q.in_features}), not {tuple(x.shape)}")
        (B, H, W, C), G, M = x.shape, self.groups, self.heads
        q = self.q(x)
        points = self.points(q)                                 # (B, G, Hk, Wk, 2) yx, px
        maps = x.permute(0, 3, 1, 2).reshape(B * G, C // G, H, W)
        sampled = bilinear_sample(maps, points.flatten(0, 1))   # (B G, C / G, Hk, Wk)
        sampled = sampled.flatten(2).unflatten(0, (B, G)).flatten(1, 2).transpose(1, 2)  # (B, K, C)
        q, k, v = (t.unflatten(2, (M, -1)).transpose(1, 2)      # heads before positions
                   for t in (q.flatten(1, 2), self.k(sampled), self.v(sampled)))
        return q, k, v, points

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, points = self.project(x)
        (_, H, W, _), (_, M, K, _) = x.shape, k.shape
        step = max(1, SCORES // (M * K * W))                    # rows of queries at a time
        z = torch.cat([attend(q[:, :, top * W:(top + step) * W], k, v, self.position_bias(
            points, (H, W), (top, min(top + step, H)))) for top in range(0, H, step)], dim=2)
        return self.out(z.transpose(1, 2).reshape(x.shape))     # (B, M, N, d) -> (B, H, W, C)


# ============================================================ 8. block, stage, DAT


class Block(nn.Module):
    """z' = attention(LN(z)) + z, z'' = MLP(LN(z')) + z'. Paper: Eq. 4 and 5.

    Shape: (B, H, W, C) -> the same. `drop_path`: the rate at which a branch is left out.
    """

    def __init__(self, *, dim: int, attention: nn.Module, hidden: int, drop_path: float):
        super().__init__()
        self.attention, self.rate = attention, drop_path
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(
            expand=Linear(dim, hidden), gelu=nn.GELU(), contract=Linear(hidden, dim)))

    def forward(self, z: Tensor) -> Tensor:
        z = drop_path(self.attention(self.norm1(z)), self.rate, self.training) + z
        return drop_path(self.mlp(self.norm2(z)), self.rate, self.training) + z


class Stage(nn.Module):
    """Down-sampling (but for the first stage) and blocks. Paper: Sec. 3.3, Fig. 3.

    Shape: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), C'), or the same in the first stage.
    """

    def __init__(self, config: DATConfig, index: int, rates: Iterator[float]):
        super().__init__()
        stage, size = config.stages[index], config.map_sizes()[index]
        self.down = nn.Identity() if index == 0 else Projection(
            config.stages[index - 1].dim, stage.dim, kernel=2 if config.stem == "patch" else 3,
            stride=2, bias=False)
        self.blocks = nn.ModuleList()
        for letter in stage.blocks:
            if letter == "D":
                attention = DeformableAttention(
                    dim=stage.dim, heads=stage.heads, groups=stage.groups, size=size,
                    stride=stage.stride, kernel=stage.kernel, offset_range=stage.offset_range,
                    geometry=config.geometry, offsets=config.offsets, position=config.position)
            else:
                attention = WindowAttention(
                    dim=stage.dim, heads=stage.heads, window=stage.window,
                    shift=math.ceil(stage.window / 2) if letter == "S" else 0)
            self.blocks.append(Block(dim=stage.dim, attention=attention, drop_path=next(rates),
                                     hidden=int(stage.dim * config.mlp_ratio)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class DAT(nn.Module):
    """Vision Transformer with Deformable Attention. Paper: Sec. 3.3, Fig. 3, Tab. 1.

    Shape: images (B, 3, H, W) of any H, W -> logits (B, classes).
    Raises: ValueError if the images are not floating point (B, 3, H, W).
    """

    def __init__(self, config: DATConfig):
        super().__init__()
        _check(isinstance(config, DATConfig), f"expected a DATConfig, not {config!r}")
        self.config = config
        dim, patch = config.stages[0].dim, config.patch
        if config.stem == "patch":
            self.stem = Projection(3, dim, kernel=patch, stride=patch)
        else:
            first, second = CONV_STRIDES[patch]
            self.stem = nn.Sequential(Projection(3, dim // 2, kernel=3, stride=first), nn.GELU(),
                                      Projection(dim // 2, dim, kernel=3, stride=second))
        depth = sum(len(stage.blocks) for stage in config.stages)
        rates = iter([config.drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.stages = nn.ModuleList(Stage(config, i, rates) for i in range(len(config.stages)))
        self.norm = nn.LayerNorm(config.stages[-1].dim)
        self.head = nn.Linear(config.stages[-1].dim, config.classes)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> the tokens (B, H', W', C) that enter the first stage."""
        _check(images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
               and 0 not in images.shape[1:], "images must be floating point (B, 3, H, W), "
               f"not {images.dtype} {tuple(images.shape)}")
        return self.stem(images.permute(0, 2, 3, 1))

    def features(self, images: Tensor) -> list[Tensor]:
        """The map after each stage, not normalised, for detection and segmentation.

        Shape: (B, 3, H, W) -> one (B, C_i, H_i, W_i) per stage, H_i = ceil(H / (patch 2^i)).
        """
        x, maps = self.embed(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)[-1].permute(0, 2, 3, 1)
        return self.head(self.norm(x).mean(dim=(1, 2)))

    def deformable_inputs(self, images: Tensor) -> list[tuple]:
        """For every D block in order: its attention, the input of that, and (first, cell).

        y px of the block's map are first + cell y px of the image: a map pixel stands where the
        convolutions that made it are centred, mid-patch with stem="patch", on the multiples of
        cell = patch 2^stage with stem="conv".
        """
        x, found = self.embed(images), []
        for i, stage in enumerate(self.stages):
            cell = self.config.patch * 2 ** i
            first = (cell - 1) / 2 if self.config.stem == "patch" else 0
            x = stage.down(x)
            for block in stage.blocks:
                if isinstance(block.attention, DeformableAttention):
                    found.append((block.attention, block.norm1(x), first, cell))
                x = block(x)
        return found

    def sampling_points(self, images: Tensor) -> list[Tensor]:
        """Where every deformable block, in order, looks.

        Shape: (B, 3, H, W) -> one (B, G, Hk, Wk, 2) per D block. Units: (y, x) in px of the image,
        0 the centre of its first pixel.
        """
        return [first + cell * attention.points(attention.q(x))
                for attention, x, first, cell in self.deformable_inputs(images)]


# ============================================================ 9. the authors' weights


def _official_layout(model: DAT) -> dict[str, tuple[tuple[int, ...], Tensor | None]]:
    """The release's names -> the shape there, and our parameter (None: a buffer we derive)."""
    layout = {}

    def add(theirs: str, module: nn.Module, convolution: tuple = ()) -> None:
        for name, ours in module.named_parameters():
            shape = tuple(ours.shape) + (convolution if name == "weight" else ())
            layout[f"{theirs}.{name}"] = shape, ours

    add("patch_proj.0", model.stem.conv)
    add("patch_proj.1.norm", model.stem.norm)
    for i, (stage, (H, W)) in enumerate(zip(model.stages, model.config.map_sizes())):
        if i > 0:
            add(f"down_projs.{i - 1}.0", stage.down.conv)
            add(f"down_projs.{i - 1}.1.norm", stage.down.norm)
        for j, block in enumerate(stage.blocks):
            add(f"stages.{i}.layer_norms.{2 * j}.norm", block.norm1)
            add(f"stages.{i}.layer_norms.{2 * j + 1}.norm", block.norm2)
            add(f"stages.{i}.mlps.{j}.chunk.linear1", block.mlp.expand)
            add(f"stages.{i}.mlps.{j}.chunk.linear2", block.mlp.contract)
            attention, prefix = block.attention, f"stages.{i}.attns.{j}"
            if isinstance(attention, DeformableAttention):
                for name in ("q", "k", "v", "out"):             # 1x1 convolutions there
                    add(f"{prefix}.proj_{name}", getattr(attention, name), (1, 1))
                if attention.offset is not None:
                    add(f"{prefix}.conv_offset.0", attention.offset.conv)
                    add(f"{prefix}.conv_offset.1.norm", attention.offset.norm)
                    add(f"{prefix}.conv_offset.3", attention.offset.out, (1, 1))
                if attention.position == "relative":
                    layout[f"{prefix}.rpe_table"] = tuple(attention.table.shape), attention.table
                continue
            add(f"{prefix}.proj_qkv", attention.qkv)
            add(f"{prefix}.proj_out", attention.out)
            M, side, area = attention.heads, 2 * attention.window - 1, attention.window ** 2
            layout[f"{prefix}.relative_position_bias_table"] = (side ** 2, M), attention.table
            layout[f"{prefix}.relative_position_index"] = (area, area), None
            if attention.shift:
                layout[f"{prefix}.attn_mask"] = (H * W // area, area, area), None
    add("cls_norm.norm", model.norm)
    add("cls_head", model.head)
    return layout


def load_official(state_dict: dict, config: DATConfig) -> DAT:
    """A model with the weights of the authors' release, in geometry "release" [D1].

    `state_dict`: theirs, or a dict that holds it under "model"; `config`: the architecture. The
    weights take PyTorch's default type, whatever theirs is.
    Raises: ValueError that names every key that is missing, unknown or of another shape.
    """
    state = state_dict.get("model", state_dict) if isinstance(state_dict, dict) else None
    _check(isinstance(state, dict), f"expected a state dict, not a {type(state_dict).__name__}")
    _check(isinstance(config, DATConfig), f"expected a DATConfig, not {config!r}")
    _check(config.stem == "patch" and config.position != "fixed", f"stem={config.stem!r}, position="
           f"{config.position!r}: the release's models have stem='patch' and no position='fixed'")
    model = DAT(replace(config, geometry="release"))
    layout = _official_layout(model)
    problems = [f"{name} is missing" for name in layout if name not in state]
    for name, value in state.items():
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if name not in layout:
            problems.append(f"{name} is unknown")
        elif came != layout[name][0]:
            problems.append(f"{name} is {came}, expected {layout[name][0]}")
    _check(not problems, f"not the weights of this configuration: {'; '.join(problems)}")
    with torch.no_grad():
        for name, (_, ours) in layout.items():
            if name.endswith(".relative_position_bias_table"):
                ours.copy_(state[name].T.view_as(ours))         # heads last there, first here
            elif ours is not None:
                ours.copy_(state[name].view_as(ours))
    return model


# ============================================================ 10. data


CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
CIFAR = {                                                       # the official binary archives
    "cifar10": SimpleNamespace(
        file="cifar-10-binary.tar.gz", size=170_052_171, md5="c32a1d4ab5d03f1284b67883e8d87530",
        folder="cifar-10-batches-bin", names="batches.meta.txt", classes=10, label_bytes=1,
        splits=(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
        mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": SimpleNamespace(                                # coarse label, fine label, pixels
        file="cifar-100-binary.tar.gz", size=168_513_733, md5="03b5dce01913d631647c71ecec9e9cb8",
        folder="cifar-100-binary", names="fine_label_names.txt", classes=100, label_bytes=2,
        splits=(("train.bin",), ("test.bin",)),
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
}
SHAPES = ("disc", "ring", "square", "triangle", "cross", "star", "crescent", "bar")
DATASETS = (*CIFAR, "shapes", "imagenet")                       # the last: any image folder
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]                            # end a run after its step
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))       # mean and deviation
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """Half of a data set. Shape: images (n, 3, H, W) uint8, labels (n,) int64."""
    images: Tensor
    labels: Tensor

    @property
    def size(self) -> int:
        return self.images.shape[-1]

    def batches(self, parts: Iterable[Tensor], draws: str | None = None) -> Iterator[tuple]:
        """Images and labels of each of `parts`, which are indices (b,); with `draws` augmented."""
        for part in parts:
            part = part.to(self.images.device)
            images = self.images[part] if draws is None else crop_and_flip(self.images[part])
            yield images, self.labels[part]


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGNALS wait until the end of this; processes that start within never get them."""
    if not hasattr(signal, "pthread_sigmask"):                  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(kw_only=True)
class ImageFolder:
    """Half of a data set in image files, decoded by `workers` processes.

    `unreadable`: the files found so, and why. They come as black images of label -1.
    """
    root: str
    files: np.ndarray                                           # (n,) names below root, as bytes
    labels: Tensor                                              # (n,) int64
    size: int                                                   # px, height and width of a batch
    workers: int = 0
    draws: str | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    decoded: int = 0                                            # images so far, in ..
    seconds: float = 0.0                                        # .. so much time of one core

    def batches(self, parts: Iterable[Tensor], draws: str | None = None) -> Iterator[tuple]:
        """As InMemory.batches; `draws` and its index alone decide how an image is cut."""
        loader = torch.utils.data.DataLoader(
            replace(self, draws=draws), batch_sampler=parts, num_workers=self.workers,
            collate_fn=tuple, pin_memory=torch.cuda.is_available(), generator=torch.Generator())
        with signals_held_back():                               # the run ends, not its workers
            batches = iter(loader)
        for images, labels, unreadable, seconds in batches:
            _check(len(labels) < 4 or (labels >= 0).any(), f"{self.root}: none of {len(labels)} "
                   f"images can be read, is it still there? {next(iter(unreadable.values()), '')}")
            for file in unreadable.keys() - self.unreadable.keys():
                print(f"left out: {unreadable[file]}", file=sys.stderr)
            self.unreadable.update(unreadable)
            self.decoded, self.seconds = self.decoded + len(labels), self.seconds + seconds
            yield images, labels

    def __getitems__(self, part: Tensor) -> tuple[Tensor, Tensor, dict[str, str], float]:
        """What a worker does for one batch."""
        start, labels, unreadable = time.process_time(), self.labels[part], {}
        images = torch.zeros(len(part), 3, self.size, self.size, dtype=torch.uint8)
        for i, index in enumerate(part.tolist()):
            file = os.path.join(self.root, os.fsdecode(self.files[index]))
            try:
                images[i] = read_photo(file, self.size, self.draws and f"{self.draws} {index}")
            except InputError as error:
                labels[i], unreadable[file] = -1, str(error)
        return images, labels, unreadable, time.process_time() - start


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What there is to train on and to test on."""
    train: InMemory | ImageFolder | None
    test: InMemory | ImageFolder
    classes: tuple[str, ...]
    mean: Tensor                                                # (3, 1, 1), of values in [0, 1]
    std: Tensor

    def to(self, device: torch.device) -> Dataset:
        """With images that are in memory, mean and deviation on `device`."""
        train, test = (InMemory(images=half.images.to(device), labels=half.labels.to(device))
                       if isinstance(half, InMemory) else half for half in (self.train, self.test))
        return replace(self, train=train, test=test, mean=self.mean.to(device),
                       std=self.std.to(device))

    def unreadable(self) -> set[str]:
        """The files that could not be read so far, as far as this process knows."""
        return {f for half in (self.train, self.test) for f in getattr(half, "unreadable", ())}

    def normalise(self, images: Tensor) -> Tensor:
        """Values in [0, 1], or uint8 -> float32 of mean 0 and deviation 1 in each channel."""
        images = images if images.is_floating_point() else images.float() / 255
        return (images - self.mean) / self.std


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, then renames it: if that fails, the old file stays."""
    _check(path.name, f"{path} is a folder, expected a file's name")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[bool]:
    """Lets in one process per folder, the others wait; true if so (Windows lets in all)."""
    with contextlib.ExitStack() as at_the_end:
        alone = False
        with contextlib.suppress(ImportError, OSError):         # Windows; a disk without such locks
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            at_the_end.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder}/: another run downloads there, waiting for it", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone


def download(url: str, target: Path, *, size: int, md5: str) -> None:
    """Fetches `url`, which becomes `target` only once size and md5 are right.

    Raises: OSError or HTTPException if the transfer fails, InputError if the file is another one.
    """
    def fetch(part: Path) -> None:
        digest, done = hashlib.md5(), 0
        with (urllib.request.urlopen(url, timeout=30) as source, part.open("wb") as file,
              contextlib.ExitStack() as at_the_end):
            at_the_end.callback(print)                          # ends the line of the progress
            while done <= size and (block := source.read(1 << 20)):
                file.write(block)
                digest.update(block)
                done += len(block)
                print(f"\r{url}: {done / 1e6:.0f} of {size / 1e6:.0f} MB", end="", flush=True)
        _check((done, digest.hexdigest()) == (size, md5), f"{url} gave {done:,} bytes of md5 "
               f"{digest.hexdigest()}, expected {size:,} of {md5}: nothing was kept, try again")

    target.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(target.parent) as alone:
        for part in target.parent.glob(f"{target.name}.*.part") if alone else ():
            part.unlink()                                       # of a run that was killed
        if not target.is_file():
            write_atomically(target, fetch)


def _files(archive: SimpleNamespace) -> tuple[str, ...]:
    return *archive.splits[0], *archive.splits[1], archive.names


def _read_archive(path: Path, archive: SimpleNamespace) -> dict[str, bytes]:
    """The known members of the archive, read in memory: no path in it is ever written to."""
    wanted, found = {f"{archive.folder}/{name}": name for name in _files(archive)}, {}
    try:
        with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = wanted.get(member.name.removeprefix("./"))
                if name and member.isfile() and member.size < 1 << 28:
                    found[name] = tar.extractfile(member).read()
            while stream.read(1 << 20):
                pass                                            # the checksum is at the end
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): remove it and get it again") from None
    if md5 != archive.md5:
        print(f"note: {path} is not the official archive, its md5 is {md5}")
    return found


def load_cifar(name: str, data: str | None = None) -> Dataset:
    """CIFAR-10 or CIFAR-100 from `data`, which holds the binary archive or its extracted folder.

    Without `data`: from data/, where the archive is downloaded to if it is not there.
    Raises: InputError that says what was tried and which file belongs where.
    """
    archive, root = CIFAR[name], Path("data" if data is None else data)
    _check(not root.is_file(), f"--data {root} is a file, expected the folder that holds it")
    path = root / archive.file
    for folder in (root / archive.folder, root):
        if (folder / archive.splits[1][0]).is_file():
            found, path = [folder / f for f in _files(archive) if (folder / f).is_file()], folder
            files = {file.name: file.read_bytes() for file in found}
            break
    else:
        advice = (f"put {archive.file} ({archive.size:,} bytes, from {CIFAR_URL}) or its extracted "
                  f"folder into {root}/, or try --train shapes, which needs no file")
        if not path.is_file():
            _check(data is None, f"{root}/ holds neither {archive.file} nor its folder: {advice}")
            try:
                download(CIFAR_URL + path.name, path, size=archive.size, md5=archive.md5)
            except (OSError, http.client.HTTPException) as error:
                raise InputError(f"no {path}, and no download ({error}): {advice}") from None
        files = _read_archive(path, archive)

    def parse(file: str) -> tuple[Tensor, Tensor]:
        _check(file in files, f"{path} has no {file}")
        content, size = files[file], archive.label_bytes + 3 * 32 * 32
        _check(content and len(content) % size == 0,
               f"{path}/{file}: {len(content):,} bytes are no multiple of a record's {size}")
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
        labels = records[:, archive.label_bytes - 1].long()
        _check(labels.max() < archive.classes, f"{path}/{file}: label {labels.max()}, expected "
               f"less than {archive.classes}")
        return records[:, archive.label_bytes:].reshape(-1, 3, 32, 32), labels

    train, test = (_in_memory(map(parse, split)) for split in archive.splits)
    classes = tuple(files.get(archive.names, b"").decode("ascii", "replace").split())
    if len(classes) != archive.classes:                         # names are for display only
        classes = tuple(map(str, range(archive.classes)))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (archive.mean, archive.std))
    return Dataset(train=train, test=test, classes=classes, mean=mean, std=std)


def _in_memory(parts: Iterable[tuple[Tensor, Tensor]]) -> InMemory:
    images, labels = map(torch.cat, zip(*parts))
    return InMemory(images=images, labels=labels)


def make_shapes(count: int, *, seed: int, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Figures of the kinds SHAPES at random place, size, angle and colour, on clutter.

    Shape: images (count, 3, side, side) uint8, labels (count,), masks (count, side, side) bool,
    true on the figure.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    pixel = torch.arange(side) + 0.5
    blotches = F.interpolate(uniform(0, 0.5, 3, 4, 4), (side, side), mode="bilinear")
    images = blotches + uniform(-0.05, 0.05, 3, side, side)     # dark, blotched and grainy
    for _ in range(8):                                          # clutter: small coloured boxes
        y, x = uniform(0, side, 2, 1, 1, 1).unbind(1)
        height, width = uniform(0.5, side / 12, 2, 1, 1, 1).unbind(1)
        box = ((pixel[:, None] - y).abs() < height) & ((pixel - x).abs() < width)
        images = torch.where(box, uniform(0, 0.6, 3, 1, 1), images)

    radius, angle = uniform(0.2, 0.36, 1, 1) * side, uniform(0, 2 * math.pi, 1, 1)
    y, x = (radius + (side - 2 * radius) * uniform(0, 1, 1, 1) for _ in range(2))
    y, x = pixel[:, None] - y, pixel - x                        # from the figure's centre
    u = (x * angle.cos() + y * angle.sin()) / radius            # along its axes, (n, side, side)
    v = (y * angle.cos() - x * angle.sin()) / radius
    a, b, distance, around = u.abs(), v.abs(), torch.hypot(u, v), torch.atan2(v, u)
    third = 2 * math.pi / 3
    figures = torch.stack([                                     # in the order of SHAPES
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


@contextlib.contextmanager
def open_image(path: str) -> Iterator[object]:
    """A Pillow image. Raises: InputError if it cannot be opened, or decoded within the block."""
    from PIL import Image
    try:
        with Image.open(path, formats=("JPEG", "PNG", "BMP", "WEBP", "GIF")) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode} pixels, expected 8 bits")
            yield image
    except Exception as error:                                  # a stranger's file can raise any
        raise InputError(f"{path} cannot be read as an image: {error}") from None


def to_tensor(image: object) -> Tensor:
    """A Pillow image of RGB pixels -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_photo(path: str, size: int, draws: str | None = None) -> Tensor:
    """The middle of an image, or with `draws`, a seed, a part at random. Source: release.

    The middle: 7/8 of each side after the image is made square. At random: 8 to 100% of its area,
    3:4 to 4:3, mirrored in half of the cases; a JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves
    enough pixels. Bicubic. Shape: (3, size, size) uint8. Raises: InputError.
    """
    with open_image(path) as image:
        bicubic = 3                                             # Pillow's number for it
        if draws is None:
            side = int(size * 256 / 224)
            margin = round((side - size) / 2)
            image = image.convert("RGB").resize((side, side), bicubic)
            return to_tensor(image.crop((margin, margin, margin + size, margin + size)))
        random, (W, H) = Random(draws), image.size
        for _ in range(10):
            area, aspect = random.uniform(0.08, 1) * W * H, (4 / 3) ** random.uniform(-1, 1)
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= W and 0 < h <= H:
                break
        else:                                                   # too narrow an image: what fits
            w, h = min(W, max(1, H * 4 // 3)), min(H, max(1, W * 4 // 3))
        x, y = random.randint(0, W - w), random.randint(0, H - h)
        image.draft(None, (math.ceil(size * W / w), math.ceil(size * H / h)))
        across, down = image.width / W, image.height / H
        box = (x * across, y * down, (x + w) * across, (y + h) * down)
        pixels = to_tensor(image.convert("RGB").resize((size, size), bicubic, box))
        return pixels.flip(2) if random.random() < 0.5 else pixels


def _list_images(folder: Path) -> dict[str, list[str]]:
    """Class, the name of a folder -> its image files; all sorted."""
    _check(folder.is_dir(), f"there is no folder {folder}/: expected {folder}/<class>/<images>")
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and entry.name[0] != ".":
            found[entry.name] = sorted(name for name in os.listdir(entry) if name[0] != "."
                                       and name.lower().endswith(IMAGE_SUFFIXES))
            _check(found[entry.name], f"{entry}/ holds no image ({' '.join(IMAGE_SUFFIXES)})")
            _check(os.access(entry / found[entry.name][0], os.R_OK), f"{entry}/: no permission to "
                   "read the images")
    _check(found, f"{folder}/ holds no folder of a class: expected {folder}/<class>/<images>")
    return found


def load_folder(data: str | None, *, size: int, workers: int, training: bool = True) -> Dataset:
    """Images DATA/train/<class>/<images> and DATA/val/<class>/<images> of any classes.

    Raises: InputError if one of them, or val or train lacks a class of the other. Without
    `training`, val is enough.
    """
    _check(type(size) is int, f"an image size of {size} is not square, which photos are cut to")
    _check(data is not None, "an image folder needs --data DIR, which holds train/<class>/<images> "
           "and val/<class>/<images>")
    root = Path(data)
    train, test = _list_images(root / "train") if training else None, _list_images(root / "val")
    alone = sorted(test.keys() ^ (train or test).keys())
    _check(not alone, f"{root}: train and val hold other classes; in one of them only: "
           f"{', '.join(alone[:5])}{' ..' * (len(alone) > 5)}")
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in IMAGENET)
    halves = [half and ImageFolder(
        root=str(root / name), size=size, workers=workers,
        files=np.array([os.fsencode(f"{c}/{file}") for c, files in half.items() for file in files]),
        labels=torch.tensor([i for i, files in enumerate(half.values()) for _ in files]))
        for name, half in (("train", train), ("val", test))]
    return Dataset(train=halves[0], test=halves[1], classes=tuple(test), mean=mean, std=std)


def load_dataset(name: str, data: str | None = None, **folder: object) -> Dataset:
    """One of DATASETS; `folder`: the other arguments of load_folder. Raises: InputError."""
    if name == "imagenet":
        return load_folder(data, **folder)
    if name in CIFAR:
        return load_cifar(name, data)
    test, *train = (make_shapes(2_000, seed=seed)[:2] for seed in range(6))
    half = torch.full((3, 1, 1), 0.5)
    return Dataset(train=_in_memory(train), test=_in_memory([test]), classes=SHAPES, mean=half,
                   std=half / 2)


# ============================================================ 11. augmentation


def crop_and_flip(images: Tensor, *, margin: int = 4,
                  generator: torch.Generator | None = None) -> Tensor:
    """Each image moved by up to `margin` px (zeros come in) and mirrored with probability 1/2.

    Shape: (B, 3, H, W) -> the same, on the images' device; one gather for the whole batch.
    """
    (B, _, H, W), device = images.shape, images.device

    def draw(below: int) -> Tensor:
        return torch.randint(below, (B, 1), generator=generator, device=device)

    rows = draw(2 * margin + 1) + torch.arange(H, device=device)            # (B, H)
    columns = draw(2 * margin + 1) + torch.arange(W, device=device)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = F.pad(images, (margin,) * 4).movedim(1, 3)         # (B, H', W', 3)
    sample = torch.arange(B, device=device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


OPERATIONS = ("brightness", "contrast", "colour", "sharpness", "posterise", "solarise",
              "shear_y", "shear_x", "move_y", "move_x", "rotate")


def operate(images: Tensor, kind: Tensor, strength: Tensor) -> Tensor:
    """OPERATIONS[kind] on each image: strength 0 changes nothing, -1 and 1 are the extremes.

    Source: RandAugment (Cubuk et al., 2020), in one batch.
    Shape: images (B, 3, H, W), 255ths in [0, 1], kind (B,) int64, strength (B,) in [-1, 1] -> same.
    """
    (B, _, H, W), device, m = images.shape, images.device, strength.view(-1, 1, 1, 1)
    grey = images.mean(dim=1, keepdim=True)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    levels = 255 ** (1 - m.abs() / 2)                           # down to 16
    # One of the last five alone is not zero: each is a linear map of where a pixel is read.
    shear_y, shear_x, move_y, move_x, turn = (
        strength * (kind == OPERATIONS.index(name)) for name in OPERATIONS[6:])
    turn = turn * math.pi / 6
    matrix = torch.stack([turn.cos(), 0.3 * shear_y - turn.sin(), 0.3 * shear_x + turn.sin(),
                          turn.cos()], dim=1).view(B, 2, 2)
    pixels = torch.cartesian_prod(*(torch.arange(n, device=device) - (n - 1) / 2 for n in (H, W)))
    move = torch.stack([(H - 1) / 2 + 0.3 * H * move_y, (W - 1) / 2 + 0.3 * W * move_x], dim=1)
    points = (pixels @ matrix.mT + move[:, None]).view(B, H, W, 2)
    outcomes = torch.stack([
        images * (1 + 0.9 * m), *(torch.lerp(base.expand_as(images), images, 1 + 0.9 * m)
                                  for base in (grey.mean((2, 3), keepdim=True), grey, blurred)),
        (images * levels).round() / levels,
        torch.where(images > 1 - m.abs(), 1 - images, images), bilinear_sample(images, points)])
    return outcomes[kind.clamp(max=6), torch.arange(B, device=device)].clamp(0, 1)


def random_boxes(share: Tensor, H: int, W: int) -> Tensor:
    """A box of `share` of an H x W image at a random place each, cut off at the border.

    Shape: (B,) -> (B, 1, H, W) bool, true inside.
    """
    half, device = share.sqrt() / 2, share.device
    y, x = torch.rand(2, len(share), device=device)
    rows, columns = (((torch.arange(n, device=device) + 0.5) / n - centre[:, None]).abs()
                     < half[:, None] for n, centre in ((H, y), (W, x)))
    return rows[:, None, :, None] & columns[:, None, None, :]


def mix(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Every image with the one before it, by mixup or CutMix; targets by the share of pixels.

    Source: Zhang et al., 2018 (with Beta(0.8, 0.8)); Yun et al., 2019.
    Shape: (B, 3, H, W), (B, classes) -> the same.
    """
    B, _, H, W = images.shape
    blend = torch.distributions.Beta(0.8, 0.8).sample((B, 1, 1, 1)).to(images)
    box = random_boxes(torch.rand(B, device=images.device), H, W)
    cut = torch.rand(B, 1, 1, 1, device=images.device) < 0.5
    other = torch.where(cut, box.to(images), blend)             # (B, 1, H, W), the other's share
    share = other.mean(dim=(1, 2, 3))[:, None]
    return (torch.lerp(images, images.roll(1, 0), other),
            torch.lerp(targets, targets.roll(1, 0), share))


def augment(images: Tensor, targets: Tensor, strength: int) -> tuple[Tensor, Tensor]:
    """Strength 0: nothing. 1: one operation and, for a quarter, erasing. 2: and mixing [D8].

    Shape: images (B, 3, H, W) uint8, targets (B, classes) -> (B, 3, H, W) in [0, 1], (B, classes).
    """
    images, (B, _, H, W), device = images / 255, images.shape, images.device
    if strength > 0:
        kind = torch.randint(len(OPERATIONS), (B,), device=device)
        images = operate(images, kind, 2 * torch.rand(B, device=device) - 1)
        box = random_boxes(0.02 + 0.31 * torch.rand(B, device=device), H, W)
        box &= torch.rand(B, 1, 1, 1, device=device) < 0.25
        images = torch.where(box, torch.rand_like(images), images)
    return mix(images, targets) if strength > 1 else (images, targets)


# ============================================================ 12. training

FLAGS = ("epochs", "batch_size", "lr", "seed", "augment")       # those that define a run
ABLATIONS = ("geometry", "offsets", "position")                 # kept from what is fine-tuned
MINUTES = 10                                                    # longest time between checkpoints
METRICS = ("epoch", "step", "loss", "test_accuracy", "seconds")


@dataclass(kw_only=True)
class Run:
    """What defines a training run, and how far it is: the plain values of its checkpoint.

    Raises: ValueError naming the field and its value.
    """
    dataset: str
    images: int                                                 # to train on
    classes: tuple[str, ...]
    epochs: int
    batch_size: int                                             # of an update, by all processes
    lr: float                                                   # at its highest
    seed: int = 0
    augment: int = 0                                            # strength, see augment
    parts: int = 1                                              # of a batch, each with its draws
    float32: bool = False                                       # also where bfloat16 is faster
    warmup: float = 1 / 20                                      # share of the run
    floor: float = 1 / 100                                      # the last rate, in `lr`
    clip: float = 5.0                                           # largest norm of a gradient
    weight_decay: float = 0.05
    step: int = 0                                               # updates so far
    loss: float = 0.0                                           # its sum in the epoch so far
    history: list = field(default_factory=list)                 # rows of metrics.csv

    def __post_init__(self) -> None:
        _check_fields(self, integers="images epochs batch_size parts")
        _check(type(self.float32) is bool, f"float32={self.float32!r} is neither True nor False")
        for name, kind, below in (
                ("seed", int, 2 ** 31), ("step", int, 2 ** 31), ("augment", int, 3),
                ("warmup", float, 1), ("floor", float, 1), ("lr", float, math.inf),
                ("clip", float, math.inf), ("weight_decay", float, 1), ("loss", float, math.inf)):
            value = getattr(self, name)
            _check(type(value) is kind and 0 <= value < below,
                   f"{name}={value!r} is not of type {kind.__name__} from 0 to below {below}")
        _check(isinstance(self.history, list) and all(
            isinstance(row, tuple) and len(row) == len(METRICS)
            and all(type(n) in (int, float) for n in row) for row in self.history),
            f"history={self.history!r} is not a list of {METRICS}")
        _check(isinstance(self.classes, tuple), f"classes={self.classes!r} is not a tuple")
        _check(self.batch_size <= self.images, f"batch_size={self.batch_size} is more than the "
               f"{self.images} images there are")
        _check(self.step <= self.steps, f"step={self.step} is past the end, {self.steps}")

    @property
    def per_epoch(self) -> int:
        """Updates in an epoch; images that do not fill a batch are left out of it."""
        return self.images // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch

    def rate(self, step: int) -> float:
        """The learning rate of an update."""
        warmup = max(int(self.steps * self.warmup), min(50, self.steps // 4) * (self.warmup > 0))
        return learning_rate(step, steps=self.steps, warmup=warmup, peak=self.lr, floor=self.floor)


def recipe(data: str, model: str, *, batch_size: int | None = None, finetune: bool = False) -> dict:
    """The fields of a Run that suit data set and model. Source: for imagenet the release [D8]."""
    if data == "shapes":
        found = {"epochs": 4, "batch_size": 64, "lr": 2e-3}
    elif data != "imagenet":
        found = {"epochs": 6, "batch_size": 128, "lr": 2e-3}
    elif finetune:
        found = {"epochs": 30, "batch_size": 512, "lr": 2e-6, "warmup": 0.0, "floor": 1 / 20,
                 "weight_decay": 1e-8, "augment": 2}
    else:
        found = {"epochs": 300, "batch_size": 1024, "lr": 5e-4, "warmup": 20 / 300}
        if model.startswith("dat-b"):
            found |= {"lr": 4e-4, "warmup": 50 / 300, "floor": 1 / 80, "clip": 1.0}
    if model == "cifar" and data != "imagenet":                 # for a GPU
        found |= {"epochs": 20 if data == "shapes" else 300, "batch_size": 256, "lr": 1e-3}
    found["batch_size"] = batch_size or found["batch_size"]
    if data == "imagenet":
        found["lr"] *= found["batch_size"] / 512
    return found


def augmentation(epochs: int) -> int:
    """How strong augmentation pays in a run of so many epochs: 0, 1 or 2, as in augment.

    Source: 1 against 0 measured at 20 and at 40 epochs (tutorial.md, section 11); 100 is a guess.
    """
    return (epochs >= 60) + (epochs >= 100)


def learning_rate(step: int, *, steps: int, warmup: int, peak: float, floor: float) -> float:
    """Linear warm-up from a tenth of the last rate, then half a cosine from there on [D8].

    `floor`: the last rate as a share of the peak.
    """
    if step < warmup:                                           # 1. warm-up
        return peak * (floor / 10 + (1 - floor / 10) * step / warmup)
    if step >= steps:                                           # 2. past the end
        return peak * floor
    progress = (step - warmup) / (steps - warmup)               # 3. cosine
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """For AdamW: no decay of biases, norms and position tables. Source: release."""
    groups = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim > 1 and not name.endswith("table")
        groups[weight_decay if plain else 0.0].append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is CUDA if there is one, else the CPU. Raises: InputError."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}
    name = name if name != "auto" else "cuda" if found["cuda"] else "cpu"
    _check(found[name], f"--device {name}: PyTorch finds none on this machine")
    return torch.device(name)


def compute_dtype(device: torch.device, float32: bool = False) -> torch.dtype:
    """bfloat16 where hardware multiplies it: on CUDA, and on CPUs with instructions for it."""
    fast = device.type == "cuda" or device.type == "cpu" and getattr(
        torch.cpu, "get_capabilities", dict)().get("avx512_bf16")
    return torch.bfloat16 if fast and not float32 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What runs within takes `dtype` for its matrix products; weights stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def join_processes(device: torch.device) -> None:
    """Joins the processes that torchrun started, if it did; the first of them speaks for all."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    try:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes cannot be "
                         f"joined ({error}): start them with torchrun") from None
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def processes() -> tuple[int, int]:
    """(which of the processes this one is, how many there are)."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def worker_count(args: argparse.Namespace) -> int:
    """How many processes decode images for this one."""
    if args.workers is not None:
        return args.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def gather(value: object) -> list:
    """The `value` of every process, in each of them."""
    found = [value] * processes()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


class Result(NamedTuple):
    """Share of the test images classified right; .. among the best five; files left out so far."""
    right: float
    among_five: float
    unreadable: int

    def __str__(self) -> str:
        return (f"test accuracy {self.right:.2%}, top-5 {self.among_five:.2%}"
                + f"; unreadable images left out: {self.unreadable:,}" * (self.unreadable > 0))


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, dtype: torch.dtype) -> Result:
    """What the model makes of the test images that can be read.

    Every process tests its part of them, in batches of 100 so that the figures repeat.
    """
    model.eval()
    (rank, world), device = processes(), data.mean.device
    found = torch.zeros(3, dtype=torch.int64, device=device)    # right, among five, images
    for images, labels in data.test.batches(
            torch.arange(rank, len(data.test.labels), world).split(100)):
        images, labels = images.to(device), labels.to(device)
        with autocast(device, dtype):
            best = model(data.normalise(images)).topk(min(5, len(data.classes))).indices
        hits = best == labels[:, None]
        found += torch.stack([hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
    counts, files = zip(*gather((found.tolist(), data.unreadable())))
    right, among, count = map(sum, zip(*counts))
    _check(count, "none of the test images can be read")
    return Result(right / count, among / count, len(set().union(*files)))


def load_checkpoint(path: str, *keys: str) -> tuple[DAT, dict]:
    """The model of a checkpoint, and all it holds, `keys` among it; nothing in it is run.

    The authors' files are taken too: any variant, in geometry "release" [D1], told by its shapes.
    Raises: InputError.
    """
    try:
        # Their training code puts its settings, yacs' nodes, beside the weights: read as plain.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        _check(isinstance(checkpoint, dict), f"it holds a {type(checkpoint).__name__}")
        published = "cls_head.weight" in checkpoint.get("model", ())
        missing = {"model", *(() if published else ("config", *keys))} - checkpoint.keys()
        _check(not missing, f"it lacks {', '.join(sorted(missing))}")
        state = dict(checkpoint["model"])
        _check(sum(tensor.nbytes for tensor in state.values()) <= Path(path).stat().st_size,
               "it declares more numbers than it holds")
        if published:
            return _load_published(state)
        config = DATConfig(**checkpoint["config"])
        with torch.device("meta"):                              # do shapes fit? memory comes later
            shapes = {name: tensor.shape for name, tensor in DAT(config).state_dict().items()}
        wrong = sorted(name for name in shapes.keys() | state.keys() if name not in state
                       or name not in shapes or state[name].shape != shapes[name])
        _check(not wrong, f"missing, unknown or of another shape are {', '.join(wrong)}")
        model = DAT(config)
        model.load_state_dict(state)
    except Exception as error:                                  # a stranger's file can raise any
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, (pickle.UnpicklingError, EOFError, IndexError)):
            reason = "it is damaged, or holds more than tensors and plain values"
        raise InputError(f"{path} is no checkpoint of this program: {reason}") from None
    return model, checkpoint


def _load_published(state: dict) -> tuple[DAT, dict]:
    """load_checkpoint for the authors' weights, with what they leave unsaid."""
    for config in VARIANTS.values():
        config = replace(config, classes=len(state["cls_head.weight"]))
        if config.stem == "patch":
            with torch.device("meta"):
                layout = _official_layout(DAT(config))
            if all(name in state and state[name].shape == shape
                   for name, (shape, _) in layout.items()):
                break
    else:
        config = VARIANTS["dat-t"]                              # its error tells what differs
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in IMAGENET)
    return load_official(state, config), {
        "classes": None, "dataset": "imagenet", "mean": mean, "std": std}


def adapt(source: DAT, config: DATConfig) -> DAT:
    """A model of `config` with the weights of `source`, to fine-tune.

    Position tables of another size are resized [D2]; a head of other classes starts anew.
    Raises: InputError naming what else differs.
    """
    model, state = DAT(config), source.state_dict()
    for name, value in model.state_dict().items():
        if name in state and name.endswith("table") and value.ndim == 3:
            state[name] = resize(state[name], value.shape[-2:])
        if name.startswith("head.") and config.classes != source.config.classes:
            state[name] = value
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"--finetune: {' '.join(str(error).split())[:300]}") from None
    return model


def make_folder(out: str | None, default: str) -> Path:
    """`out`, new or empty; without it the first of default, default-2, .. that is not there yet."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        _check(not any(Path(out).iterdir()), f"--out {out} is not empty: choose another folder")
        return Path(out)
    for number in itertools.count(1):
        folder = Path(default if number == 1 else f"{default}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Puts SIGNALS on the list yielded, for the loop to end with its step.

    A second Ctrl-C a second later acts at once; what is ignored already, as by nohup, stays so.
    """
    caught, start = [], time.monotonic()

    def catch(number: int, _: object) -> None:
        nonlocal start
        if number in caught and number == signal.SIGINT and time.monotonic() - start > 1:
            raise KeyboardInterrupt
        start = time.monotonic() if not caught else start
        caught.append(number)

    before = {number: handler for number in SIGNALS
              if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin(args: argparse.Namespace, name: str, data: Dataset) -> tuple[DAT, Run]:
    """A new run of the variant `name`: what flags do not say is its recipe's."""
    found = recipe(args.train, name, batch_size=args.batch_size, finetune=bool(args.finetune))
    found |= {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag) is not None}
    found.setdefault("augment", augmentation(found["epochs"]))
    run = Run(dataset=args.train, images=len(data.train.labels), classes=data.classes, **found)
    torch.manual_seed(run.seed)
    config = replace(VARIANTS[name], classes=len(data.classes), image_size=data.train.size)
    if not args.finetune:
        return DAT(config), run
    source, _ = load_checkpoint(args.finetune)
    kept = {field: getattr(source.config, field) for field in ABLATIONS}
    return adapt(source, replace(config, **kept)), run


def resume(args: argparse.Namespace) -> tuple[DAT, Run, object]:
    """Model, run and optimiser in --out to go on from; a flag against them is refused by name."""
    _check(args.out, "--resume needs --out DIR, the folder of the run to go on with")
    path, names = f"{args.out}/last.pt", [field.name for field in fields(Run)]
    model, checkpoint = load_checkpoint(path, "optimizer", *names)
    try:
        run = Run(**{name: checkpoint[name] for name in names})
    except (InputError, TypeError) as error:
        raise InputError(f"{path} describes no run that can go on: {error}") from None
    for name, given in (("dataset", args.train), *((flag, getattr(args, flag)) for flag in FLAGS)):
        _check(given is None or given == getattr(run, name), f"{path} has {name} "
               f"{getattr(run, name)}, not {given}: leave that flag out, or start another run")
    same = replace(VARIANTS[args.model or "dat-t"], **{
        name: getattr(model.config, name) for name in ("classes", "image_size", *ABLATIONS)})
    _check(args.model is None or same == model.config, f"{path} has no {args.model} in it")
    _check(args.image_size in (None, model.config.image_size), f"{path} is for images of "
           f"{model.config.image_size} px, not {args.image_size}")
    return model, run, checkpoint["optimizer"]


def load_moments(optimizer: torch.optim.AdamW, saved: object, step: int) -> None:
    """Puts the moments of a saved AdamW into a new one; nothing else is taken from the file."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        for i, parameter in enumerate(parameters if step else ()):
            moments = {name: saved["state"][i][name] for name in ("exp_avg", "exp_avg_sq")}
            _check(all(moment.shape == parameter.shape for moment in moments.values()), "shapes")
            optimizer.state[parameter] = {
                "step": torch.full((), float(step), device=parameter.device),
                **{name: torch.empty_like(parameter, requires_grad=False).copy_(moment)
                   for name, moment in moments.items()}}
    except Exception as error:                                  # a stranger's file can raise any
        raise InputError(f"last.pt: not this model's optimizer ({type(error).__name__})") from None


class Training:
    """A run of --train, from its flags to its last checkpoint. Raises: InputError."""

    def __init__(self, args: argparse.Namespace):
        self.device = choose_device(args.device)
        join_processes(self.device)
        self.rank, self.world = processes()
        small = "cifar" if self.device.type == "cuda" else "cifar-nano"
        name = args.model or ("dat-t" if args.train == "imagenet" else small)
        size = args.image_size or VARIANTS[name].image_size
        if args.resume:
            name, (model, run, moments) = "the model of last.pt", resume(args)
            size = model.config.image_size
        data = load_dataset(args.train, args.data, size=size, workers=worker_count(args))
        if not args.resume:
            model, run = begin(args, name, data)
        classes, images = len(data.classes), len(data.train.labels)
        _check(run.classes == data.classes and run.images == images, f"{args.out}/last.pt was "
               f"trained on {run.images:,} images of {len(run.classes)} classes, not on these "
               f"{images:,} of {classes}" + " other ones" * (classes == len(run.classes)))
        self.accumulate = args.accumulate or max(1, run.parts // self.world)
        parts = self.world * self.accumulate
        if args.resume and run.parts != parts:
            print(f"note: batches had {run.parts} parts, now {parts}: other random draws")
        _check(run.batch_size % parts == 0, f"--batch-size {run.batch_size} is not divisible by "
               f"processes times --accumulate, {self.world} x {self.accumulate}")
        run.parts, run.float32 = parts, run.float32 or args.float32

        self.run, self.data = run, data.to(self.device)
        self.dtype = compute_dtype(self.device, run.float32)
        model = model.to(self.device, memory_format=torch.channels_last)        # as the maps are
        forward = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
        if self.world > 1:
            forward = nn.parallel.DistributedDataParallel(forward, gradient_as_bucket_view=True)
        self.model, self.forward = model, forward
        self.optimizer = torch.optim.AdamW(parameter_groups(model, run.weight_decay), lr=run.lr,
                                           fused=True)
        if args.resume:
            load_moments(self.optimizer, moments, run.step)
            self.out = Path(args.out)
            for part in self.out.glob("*.part") if self.rank == 0 else ():
                part.unlink(missing_ok=True)                    # of a run that was killed
        else:
            default = f"runs/{args.train}-{name}"
            self.out = make_folder(args.out, default) if self.rank == 0 else Path()
        self.announce(name)

        self.first, self.start = run.step, time.monotonic()
        self.before = run.history[-1][-1] if run.history else 0.0   # seconds of the runs before
        self.waited = self.tested = 0.0                         # seconds, for images and in tests
        self.shown = self.written = self.start
        self.saved = run.step if args.resume else None          # the step in last.pt
        self.tried = -1                                         # .. and of the last attempt
        self.caught: list[int] = []                             # signals
        self.stop = self.torn = False                           # torn: weights between two steps
        self.loss_sum = torch.tensor(run.loss, device=self.device)
        self.bad = torch.zeros(3, device=self.device)           # first bad step, its loss and norm

    def announce(self, name: str) -> None:
        """Prints what runs, where it goes and which flags change it."""
        run, model, tests = self.run, self.model, len(self.data.test.labels)
        print(f"{run.dataset}: {run.images:,} images to train on, {tests:,} to test on, "
              f"{len(run.classes)} classes\n{name}: {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {multiply_accumulates(model.config) / 1e6:.0f}M multiply-accumulates\n"
              f"{run.epochs} epochs of {run.per_epoch} steps, batch {run.batch_size}, lr "
              f"{run.lr:g}, augmentation {run.augment}, on {self.world} x {self.device}, "
              f"{self.dtype}, {f'from step {run.step} on, ' * (run.step > 0)}into {self.out}/  "
              "(flags: --model --epochs --batch-size --accumulate --lr --augment --device --out)")

    def save(self) -> None:
        """Writes last.pt and metrics.csv. All that is random follows from seed and step."""
        run, out = self.run, self.out
        self.tried, self.written = run.step, time.monotonic()   # what fails is not tried again
        number, loss, norm = self.bad.tolist()
        if number:
            raise InputError(f"step {number:.0f}, learning rate {run.rate(int(number) - 1):g}: "
                             f"loss {loss:g} and gradient norm {norm:g} are not finite; "
                             f"{out}/last.pt is left as it was")
        if self.rank == 0:
            run.loss, file = self.loss_sum.item(), io.BytesIO()
            torch.save({**asdict(run), "mean": self.data.mean.cpu(), "std": self.data.std.cpu(),
                        "config": asdict(self.model.config), "model": self.model.state_dict(),
                        "optimizer": self.optimizer.state_dict()}, file)
            text = "".join(",".join(map(str, row)) + "\n" for row in (METRICS, *run.history))
            try:
                write_atomically(out / "metrics.csv", lambda path: path.write_text(text))
                write_atomically(out / "last.pt", lambda path: path.write_bytes(file.getbuffer()))
            except OSError as error:
                kept = f"; last.pt of step {self.saved} stays" if self.saved is not None else ""
                raise InputError(f"{out}/ cannot take step {run.step} ({error}){kept}") from None
        self.saved = run.step

    def end_epoch(self) -> None:
        """Tests the model, not compiled, as --eval does; saves before and after."""
        self.save()                                             # a test may take long
        run, began = self.run, time.monotonic()
        result = evaluate(self.model, self.data, self.dtype)
        now = time.monotonic()
        self.tested += now - began
        epoch = run.step // run.per_epoch
        run.history.append((epoch, run.step, self.loss_sum.item() / run.per_epoch, result.right,
                            self.before + now - self.start))
        print(f"epoch {epoch}/{run.epochs}  {result}", flush=True)
        self.save()

    def epoch_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of an epoch for this process, in the order of run.seed and the epoch."""
        run = self.run
        epoch, position = divmod(run.step, run.per_epoch)
        draws = torch.Generator().manual_seed(run.seed * 1_000_003 + epoch)
        order = torch.randperm(run.images, generator=draws)[:run.per_epoch * run.batch_size]
        order = order.view(run.per_epoch, self.accumulate, self.world, -1)
        parts = order[position:, :, self.rank].flatten(0, 1)
        return self.data.train.batches(list(parts), f"{run.seed} {epoch}")

    def part_loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of right answers, for a part of a batch; augments it.

        Labels are smoothed by 0.1; an image that could not be read, of label -1, has no say.
        """
        classes, run = len(self.data.classes), self.run
        targets = F.one_hot(labels.clamp(min=0), classes) * 0.9 + 0.1 / classes
        targets *= (labels >= 0)[:, None]
        strength = run.augment if run.step < 0.9 * run.steps else min(run.augment, 1)
        images, targets = augment(images, targets, strength)
        with autocast(self.device, self.dtype):
            logits = self.forward(self.data.normalise(images))
            loss = F.cross_entropy(logits, targets)
        return loss, (logits.detach().argmax(dim=1) == labels).float().mean()

    def update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One step: rate, gradients of each part, clipping, AdamW.

        Returns the loss, and the accuracy on the last part of the batch.
        """
        run, mean_loss = self.run, torch.zeros_like(self.loss_sum)
        for group in self.optimizer.param_groups:
            group["lr"] = run.rate(run.step)
        self.optimizer.zero_grad(set_to_none=True)
        for part in range(self.accumulate):
            seed = run.seed * 1_000_003 + run.step              # all draws of a part follow from it
            torch.manual_seed((seed * run.parts + part * self.world + self.rank) % 2 ** 63)
            began = time.monotonic()
            batch = next(batches)
            self.waited += time.monotonic() - began
            last = self.world == 1 or part == self.accumulate - 1       # then they are exchanged
            with contextlib.nullcontext() if last else self.forward.no_sync():
                batch = (t.to(self.device, non_blocking=True) for t in batch)
                loss, accuracy = self.part_loss(*batch)
                (loss / self.accumulate).backward()
            mean_loss += loss.detach() / self.accumulate
            del loss                                            # its graph, before the next part
        self.stop = bool(self.caught)
        if self.world > 1:                                      # all stop after the same step
            shared = torch.stack([mean_loss, torch.full_like(mean_loss, self.stop)])
            dist.all_reduce(shared)
            mean_loss, self.stop = shared[0] / self.world, bool(shared[1])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), run.clip)
        self.torn = True
        self.optimizer.step()
        run.step, self.loss_sum, self.torn = run.step + 1, self.loss_sum + mean_loss, False
        found = torch.stack([torch.full_like(norm, run.step), mean_loss, norm])
        self.bad = torch.where((self.bad[0] == 0) & ~norm.isfinite(), found, self.bad)
        return mean_loss, accuracy

    def report(self, loss: Tensor, accuracy: Tensor) -> None:
        """Prints a line at the end of an epoch, and every ten seconds."""
        run, train, now = self.run, self.data.train, time.monotonic()
        if run.step % run.per_epoch and now - self.shown <= 10:
            return
        self.shown, seconds = now, now - self.start - self.tested
        speed = (run.step - self.first) / seconds
        decoding = (f" ({self.waited / seconds:.0%} of the time waiting; a core decodes "
                    f"{train.decoded / train.seconds:,.0f})" if isinstance(train, ImageFolder)
                    else "")
        print(f"epoch {cells(run.step, run.per_epoch)}/{run.epochs}  step {run.step}/{run.steps}  "
              f"loss {loss.item():.3f}  batch accuracy {accuracy.item():.1%}  "
              f"{speed * run.batch_size:,.0f} images/s{decoding}  "
              f"{(run.steps - run.step) / speed:.0f} s left", flush=True)

    def go(self) -> int:
        """Trains to the end, or to a signal. Returns the exit code, 128 + signal if one came."""
        run, batches = self.run, None
        with catch_signals() as self.caught:
            try:
                self.save()                                     # what is killed can be resumed
                while True:
                    epoch, position = divmod(run.step, run.per_epoch)
                    self.stop = self.stop or position % 10 == 0 and bool(self.bad[0])
                    if position == 0 and len(run.history) < epoch and not self.stop:
                        self.end_epoch()
                        self.stop = any(gather(bool(self.caught)))
                    if run.step == run.steps or self.stop:
                        break
                    if position == 0:
                        self.loss_sum = torch.zeros_like(self.loss_sum)
                    if position == 0 or batches is None:        # or a resumed epoch goes on
                        batches = self.epoch_batches()
                        self.model.train()
                    loss, accuracy = self.update(batches)
                    if time.monotonic() - self.written > MINUTES * 60:
                        self.save()
                    self.report(loss, accuracy)
            finally:                                            # also after an error
                if run.step != self.tried and not self.torn:
                    self.save()
        gather(None)                                            # none ends before all is saved
        if self.caught:
            print(f"signal {self.caught[0]}: stopped after step {run.step}, {self.out}/last.pt has "
                  f"step {self.saved}")
        return 128 + self.caught[0] if self.caught else 0


# ============================================================ 13. pictures


@torch.no_grad()
def inspect(model: DAT, images: Tensor) -> list[SimpleNamespace]:
    """What the deformable blocks look at, one namespace per D block, in order.

    reference (Hk, Wk, 2): the undeformed grid;  points (B, G, Hk, Wk, 2): where keys are read;
    queries (N, 2): where the queries stand;  weights (B, M, N, K): the attention, Eq. 9;
    importance (B, G, K): the attention a key receives, summed over its group's heads and queries;
    reach (y, x): the largest offset along each axis.
    Units: coordinates are (y, x) in px of the image.
    """
    views = []
    for attention, x, first, cell in model.deformable_inputs(images):
        (_, H, W, _), G = x.shape, attention.groups
        q, k, _, points = attention.project(x)
        bias = attention.position_bias(points, (H, W))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        weights = (scores if bias is None else scores + bias).softmax(dim=-1)
        reference, queries = (attention.reference_points(cells(H, r), cells(W, r), H, W, points)
                              for r in (attention.stride, 1))
        views.append(SimpleNamespace(
            reference=first + cell * reference, points=first + cell * points, weights=weights,
            queries=first + cell * queries.flatten(0, 1),
            reach=[cell * reach for reach in attention.reach(H, W)],
            importance=weights.unflatten(1, (G, -1)).sum(dim=(2, 3))))
    return views


def read_image(source: str, config: DATConfig, data: str | None = None) -> Tensor:
    """An image file scaled to the size of `config`, or DATA:INDEX of a test set, e.g. shapes:3.

    Shape: (1, 3, H, W) uint8. Raises: InputError.
    """
    name, _, index = source.partition(":")
    if name in (*CIFAR, "shapes"):
        images = load_dataset(name, data).test.images
        _check(index.isdecimal() and len(index) < 10 and int(index) < len(images),
               f"{source}: expected {name}: and an index from 0 to {len(images) - 1}")
        return images[int(index)][None]
    from PIL import Image, ImageOps
    height, width = _pair("image_size", config.image_size)
    with open_image(source) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        return to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))[None]


def draw(image: Tensor, views: list[SimpleNamespace], *, title: str = "",
         queries: list[tuple[float, float]] | None = None):
    """A row per deformable block: moved points, important keys, the keys of some queries.

    `image` (3, H, W) uint8 and `views` = inspect(...) of it alone. `queries` (y, x) in px of the
    image; by default those nearest to the most and to the least important key. Returns a
    matplotlib figure; shown is the image and half its side around.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    colours, sides = colormaps["tab10"].colors, torch.tensor(image.shape[1:])
    figure = Figure(figsize=(13, 4.4 * len(views) + 0.6), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"))

    def scatter(axis, points: Tensor, size: Tensor | float, **style: object) -> None:
        size = size.numpy() if isinstance(size, Tensor) else size
        axis.scatter(points[..., 1].numpy(), points[..., 0].numpy(), s=size, clip_on=False, **style)

    for row, (view, axes) in enumerate(zip(views, figure.subplots(len(views), 3, squeeze=False))):
        grid, points, importance = view.reference.flatten(0, 1), view.points[0], view.importance[0]
        Hk, Wk, points = *points.shape[1:3], points.flatten(1, 2)           # (G, K, 2)
        offset, largest = points - grid, min(400, 16_000 / len(grid))       # a circle's, in pt^2
        near = ((points > -sides / 2) & (points < 1.5 * sides)).all(dim=2)
        length = offset.norm(dim=-1)
        top, left = points[near].amin(0).clamp(max=0).sub(1).tolist() if near.any() else (-1, -1)
        bottom, right = torch.cat([points[near], sides[None]]).amax(0).add(1).tolist()
        hidden = f" ({(~near).sum()} points are too far off to show)" if not near.all() else ""
        for axis, text in zip(axes, (
                f"block {row + 1}: {Hk} x {Wk} points a group, offsets: mean {length.mean():.2f}, "
                f"largest {length.max():.2f} px\n(at most {view.reach[0]:g} px along y, "
                f"{view.reach[1]:g} px along x){hidden}",
                "keys; area = attention received, summed\nover all queries and the group's heads",
                "stars: queries; rings: the 8 keys they attend to most\n"
                "(mean over a group's heads)")):
            axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", alpha=0.75)
            axis.set_title(text, fontsize=9)
            axis.set(xlim=(left, right), ylim=(bottom, top))
            axis.set_axis_off()
        scatter(axes[0], grid, 9, color="white", edgecolors="black", linewidths=0.6,
                label="uniform grid")
        for g, seen in enumerate(near):
            colour, move, start = colours[g % len(colours)], offset[g][seen].numpy(), grid[seen]
            axes[0].quiver(start[:, 1].numpy(), start[:, 0].numpy(), move[:, 1], move[:, 0],
                           color=colour, angles="xy", scale_units="xy", scale=1, width=0.005)
            scatter(axes[0], points[g][seen], 14, color=colour, label=f"points of group {g + 1}")
            scatter(axes[1], points[g][seen], largest * importance[g][seen] / importance.max(),
                    color=colour, alpha=0.6)
        if queries:
            stars = torch.cdist(torch.tensor(queries), view.queries).argmin(dim=1)
        else:                                                   # most, and least of another query
            ranked = points.flatten(0, 1)[importance.flatten().argsort(descending=True)]
            nearest = torch.cdist(ranked, view.queries).argmin(dim=1)
            stars = [nearest[0], *nearest[nearest != nearest[0]][-1:]]
        colours_of_queries = itertools.cycle(("red", "cyan", "yellow", "lime", "magenta"))
        for i, (query, colour) in enumerate(zip(stars, colours_of_queries)):
            weights = view.weights[0, :, query].unflatten(0, (len(points), -1)).mean(dim=1)
            weights = (weights * near).flatten()                # (G K,)
            best = weights.topk(min(8, len(weights)))
            scatter(axes[2], points.flatten(0, 1)[best.indices], (300 - 40 * (i % 4)) * best.values
                    / best.values[0], facecolors="none", edgecolors=colour, linewidths=1.6)
            scatter(axes[2], view.queries[query], 240, marker="*", color=colour, edgecolors="black")
    handles, labels = max((axis.get_legend_handles_labels() for axis in figure.axes),
                          key=lambda found: len(found[0]))
    figure.legend(handles, labels, fontsize=8, ncols=7, loc="outside lower center")
    return figure


# ============================================================ 14. summary and benchmark


def deformable_attention_macs(*, H: int, W: int, keys: int, dim: int, kernel: int) -> int:
    """Multiply-accumulates of one deformable attention, `keys` = Ns. Paper: Eq. 10.

    In the paper's example (H = W = 14, Ns = 49, C = 384, k = 5) the first three terms are 79.63M;
    the last, what the offsets cost, is printed as 5.08M but is 0.51M.
    """
    N, Ns, C = H * W, keys, dim
    return 2 * N * Ns * C + 2 * N * C ** 2 + 2 * Ns * C ** 2 + (kernel ** 2 + 2) * Ns * C


def stage_macs(config: DATConfig, image_size: int | tuple[int, int] | None = None) -> list[int]:
    """Multiply-accumulates of one image in each stage: convolutions, linear layers, attention."""
    sizes, dims, found = config.map_sizes(image_size), [3] + [s.dim for s in config.stages], []
    for i, ((H, W), stage) in enumerate(zip(sizes, config.stages)):
        N, C, previous, total = H * W, stage.dim, dims[i], 0
        side = (config.patch if i == 0 else 2) if config.stem == "patch" else 3
        if i == 0 and config.stem == "conv":                    # the first 3x3, at its own stride
            total += N * CONV_STRIDES[config.patch][1] ** 2 * 9 * 3 * C // 2
            previous = C // 2
        total += N * side ** 2 * previous * C
        for letter in stage.blocks:
            total += 2 * N * C * int(C * config.mlp_ratio)
            if letter == "D":
                keys = cells(H, stage.stride) * cells(W, stage.stride)
                total += deformable_attention_macs(H=H, W=W, keys=keys, dim=C, kernel=stage.kernel)
                total -= 0 if config.offsets else (stage.kernel ** 2 + 2) * keys * C
            else:
                h, w = min(stage.window, H), min(stage.window, W)
                total += 4 * N * C ** 2 + 2 * N * h * w * C
        found.append(total)
    return found


def multiply_accumulates(config: DATConfig, image_size: int | tuple[int, int] | None = None) -> int:
    """Those of one image in the whole network."""
    return sum(stage_macs(config, image_size)) + config.stages[-1].dim * config.classes


PUBLISHED = {"dat-t": 4.6, "dat-s": 9.0, "dat-b": 15.8, "dat-b-384": 49.8}     # paper's GFLOPs


def summarise(args: argparse.Namespace) -> int:
    """--summary: the stages of --model, their parameters and cost, beside the paper's figure."""
    name = args.model or "dat-t"
    with torch.device("meta"):
        model = build(name)
    config, size = model.config, args.image_size or model.config.image_size
    row = "{:6}{:>10}{:>6}{:>6}{:>7}  {:18} {:>11} {:>8}".format
    print(f"{name}, an image of {size} px\n"
          + row("stage", "map", "C", "heads", "groups", "blocks", "parameters", "MMAC"))
    for i, (stage, (H, W), macs) in enumerate(zip(config.stages, config.map_sizes(size),
                                                  stage_macs(config, size))):
        modules = [model.stages[i], model.stem] if i == 0 else [model.stages[i]]
        parameters = sum(p.numel() for module in modules for p in module.parameters())
        print(row(i + 1, f"{H} x {W}", stage.dim, stage.heads, stage.groups or "-", stage.blocks,
                  f"{parameters:,}", f"{macs / 1e6:,.0f}"))
    published = PUBLISHED.get(name) if args.image_size is None else None
    print(f"in all, with the head: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{multiply_accumulates(config, size) / 1e9:.3f} G multiply-accumulates"
          + (f" (the paper: {published} G)" if published else ""))
    return 0


def peak_memory(device: torch.device) -> float:
    """Most memory in use so far, GiB: PyTorch's on a GPU, else the whole process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    import resource                                             # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def benchmark(args: argparse.Namespace) -> int:
    """--bench: speed, memory and where the time goes, against a large matrix product."""
    device, name = choose_device(args.device), args.model or "dat-t"
    cuda = device.type == "cuda"
    _check(device.type != "mps", "--bench measures cpu and cuda, not mps")
    B, size = args.batch_size or (128 if cuda else 8), args.image_size or VARIANTS[name].image_size
    parts = args.accumulate or 1
    _check(B % parts == 0, f"--batch-size {B} cannot be gone through in --accumulate {parts} parts")
    torch.manual_seed(args.seed or 0)
    model = build(name, image_size=size).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-5, fused=True)
    run = torch.compile(model, fullgraph=True, dynamic=False) if args.compile else model
    images = torch.randn(B, 3, *_pair("image_size", size), device=device)
    labels = torch.randint(model.config.classes, (B,), device=device)
    dtype = compute_dtype(device, args.float32)
    square = torch.randn(2, 8192 if cuda else 2048, 8192 if cuda else 2048, device=device).to(dtype)

    def infer() -> None:
        with torch.inference_mode(), autocast(device, dtype):
            run(images)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)                   # frees them for the activations
        for x, y in zip(images.chunk(parts), labels.chunk(parts)):
            with autocast(device, dtype):
                loss = F.cross_entropy(run(x), y) / parts
            loss.backward()
            del loss                                            # its graph, before the next part
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()

    def seconds(action: Callable[[], object]) -> list[float]:
        """Seven times, sorted, after two that warm up."""
        times = []
        for _ in range(9):
            start = time.perf_counter()
            action()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[2:])

    ceiling = 2 * square.shape[1] ** 3 / seconds(lambda: square[0] @ square[1])[3] / 1e12
    hardware = (torch.cuda.get_device_name() if cuda else
                f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    row = "{:14}{:>9}  {:22}{:>8}{:>9}{:>13}".format
    print(f"{name}, batch {B}{f' (in {parts} parts)' * (parts > 1)}, {size} px, {hardware}, {dtype}"
          f", torch {torch.__version__}{', compiled' * args.compile}\nceiling, a product of "
          f"{square.shape[1]} x {square.shape[1]} matrices: {ceiling:.3g} TFLOP/s\n"
          + row("median of 7", "images/s", "slowest .. fastest", "TFLOP/s", "share", "peak"))
    for label, action, factor in (("inference", infer, 1), ("training step", step, 3)):
        model.train(factor == 3)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = seconds(action)
        flops = 2 * factor * multiply_accumulates(model.config) * B / times[3] / 1e12
        print(row(label, f"{B / times[3]:,.1f}", f"{B / times[-1]:,.1f} .. {B / times[0]:,.1f}",
                  f"{flops:.3g}", f"{flops / ceiling:.0%}", f"{peak_memory(device):.2f} GiB"))

    spent, last = {}, [0.0]

    def clock(kind: str, *_: object) -> None:                   # what ran since the last call
        if cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent[kind] = spent.get(kind, 0.0) + now - last[0]
        last[0] = now

    kinds = [(model.stem, "stem and down"), (model.head, "head")]
    for stage, config in zip(model.stages, model.config.stages):
        kinds += [(stage.down, "stem and down"), *zip(stage.blocks, config.blocks)]
    run = model.eval()
    for module, kind in kinds:
        module.register_forward_hook(functools.partial(clock, kind))
    for _ in range(5):
        last[0] = time.perf_counter()
        infer()
    total = sum(spent.values())
    print("inference, not compiled, goes to "
          + ", ".join(f"{kind} {part / total:.0%}" for kind, part in sorted(spent.items())))
    return 0


# ============================================================ 15. command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message} (python dat.py --help lists the flags)")


def _number(kind: type, low: float, high: float = 2 ** 31) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not low <= value < high:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} (expected {low:g} or more, below {high:g})"  # for argparse
    return parse


def _yx(text: str) -> tuple[float, float]:
    y, x = map(float, text.split(","))
    return y, x


_yx.__name__ = "pair Y,X"                                       # argparse puts it into its message


def evaluate_checkpoint(args: argparse.Namespace) -> int:
    """--eval: prints the test accuracy of --checkpoint."""
    _check(args.checkpoint, "--eval needs --checkpoint FILE")
    device, (model, found) = choose_device(args.device), load_checkpoint(args.checkpoint)
    join_processes(device)
    data = load_dataset(args.eval, args.data, size=args.image_size or model.config.image_size,
                        workers=worker_count(args), training=False).to(device)
    _check(model.config.classes == len(data.classes), f"{args.checkpoint} tells apart "
           f"{model.config.classes} classes, {args.eval} has {len(data.classes)}")
    _check(args.eval != "imagenet" or found.get("classes") in (None, data.classes),
           f"{args.checkpoint} tells apart other classes than those of {args.data}/val")
    float32 = args.float32 or found.get("float32") is True      # as it was trained
    print(evaluate(model.to(device), data, compute_dtype(device, float32)))
    return 0


def draw_checkpoint(args: argparse.Namespace) -> int:
    """--draw: writes the picture of what --checkpoint sees in an image."""
    _check(args.checkpoint, "--draw needs --checkpoint FILE")
    model, checkpoint = load_checkpoint(args.checkpoint, "classes", "dataset", "mean", "std")
    names, mean, std = (checkpoint[key] for key in ("classes", "mean", "std"))
    names = tuple(map(str, range(model.config.classes))) if names is None else names
    _check(isinstance(names, (tuple, list)) and len(names) == model.config.classes
           and all(isinstance(t, Tensor) and t.shape == (3, 1, 1) and t.is_floating_point()
                   for t in (mean, std)) and (std > 0).all(),
           f"{args.checkpoint}: classes, mean or std are not as --train writes them")
    image = read_image(args.draw, model.config, args.data)
    out = Path("points.png" if args.out is None else args.out)
    _check(out.suffix.lower() == ".png", f"--out {out}: expected a name that ends in .png")
    _check(out.parent.is_dir(), f"--out {out}: there is no folder {out.parent}")
    for y, x in args.query or ():
        _check(0 <= y < image.shape[2] and 0 <= x < image.shape[3],
               f"--query {y:g},{x:g} is outside the {image.shape[2]} x {image.shape[3]} image")
    name = args.draw.partition(":")[0]
    _check(name not in DATASETS or name == checkpoint["dataset"],
           f"{args.checkpoint} was trained on {checkpoint['dataset']}, not on {name}")
    pixels = ((image.float() / 255 - mean) / std).float()
    model.eval()
    with torch.no_grad():
        probability, best = model(pixels).softmax(dim=1).max(dim=1)
    _check(probability.isfinite(), f"{args.checkpoint} gives no finite probability")
    views = inspect(model, pixels)
    _check(views, f"{args.checkpoint} has no deformable block to draw")
    title = f"{args.draw}: {names[best]}, probability {probability.item():.0%}"
    figure = draw(image[0], views, title=title, queries=args.query)
    write_atomically(out, lambda path: figure.savefig(path, dpi=80, format="png"))
    print(f"{title}; wrote {out}")
    return 0


def keep_freed_memory() -> None:
    """Linux: the C library keeps freed memory for the next tensor: no new pages to be zeroed."""
    with contextlib.suppress(AttributeError, OSError, TypeError):           # other C libraries
        for option, value in ((-4, 0), (-1, 2 ** 31 - 1)):      # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 usage or input error, 128 + signal."""
    parser = _Parser(
        prog="dat.py", description="Vision Transformer with Deformable Attention (CVPR 2022).",
        epilog="No data at hand? python dat.py --train shapes generates its own.")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--train", choices=DATASETS, help="train on this data set")
    task.add_argument("--eval", choices=DATASETS, help="test accuracy of --checkpoint FILE")
    task.add_argument("--draw", metavar="IMAGE", help="where --checkpoint FILE looks in a file, or "
                      "in an image of a test set such as shapes:3; into --out points.png")
    task.add_argument("--summary", action="store_true", help="stages and cost of --model")
    task.add_argument("--bench", action="store_true", help="speed and memory of --model")
    parser.add_argument("--query", type=_yx, action="append", metavar="Y,X",
                        help="with --draw: show the keys of this pixel of the image as the model "
                        "gets it; may be repeated")
    parser.add_argument("--checkpoint", metavar="FILE", help="written by --train: OUT/last.pt")
    parser.add_argument("--data", metavar="DIR", help="holds the CIFAR archive or its folder, or "
                        "train/<class>/<images> and val/<class>/<images> for imagenet")
    parser.add_argument("--model", choices=VARIANTS)
    parser.add_argument("--finetune", metavar="FILE", help="start from these weights: a checkpoint "
                        "or the authors'; with imagenet")
    parser.add_argument("--image-size", type=_number(int, 1), metavar="PX",
                        help="of --summary, --bench and imagenet")
    parser.add_argument("--epochs", type=_number(int, 1), metavar="N")
    parser.add_argument("--batch-size", type=_number(int, 1), metavar="N")
    parser.add_argument("--lr", type=_number(float, 1e-12), metavar="X", help="peak learning rate")
    parser.add_argument("--seed", type=_number(int, 0, 2 ** 31), metavar="N", help="default: 0")
    parser.add_argument("--augment", type=int, choices=(0, 1, 2), help="0: crop and flip; 1: and "
                        "an operation and erasing; 2: and mixing (default: by --epochs)")
    parser.add_argument("--accumulate", type=_number(int, 1), metavar="N",
                        help="go through a batch in N parts, to save memory")
    parser.add_argument("--workers", type=_number(int, 0, 1024), metavar="N",
                        help="processes that decode images (default: one a core)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--out", metavar="PATH", help="folder of a run (default: "
                        "runs/DATA-MODEL) or picture of --draw (default: points.png)")
    parser.add_argument("--float32", action="store_true", help="also where bfloat16 is faster")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    try:
        args = parser.parse_args(arguments)
        keep_freed_memory()
        _check(args.draw is not None or not args.query, "--query goes with --draw")
        _check(args.train or not args.resume, "--resume goes with --train")
        _check(args.summary or args.bench or "imagenet" in (args.train, args.eval)
               or args.image_size is None, "--image-size goes with --summary, --bench and imagenet")
        _check(args.train == "imagenet" and not args.resume or not args.finetune,
               "--finetune goes with --train imagenet, and not with --resume")
        _check(not (args.train and args.checkpoint), "--checkpoint is for --eval and --draw; "
               "--train takes --resume or --finetune")
        if args.train or args.eval:
            code = Training(args).go() if args.train else evaluate_checkpoint(args)
            if processes()[1] > 1:
                gc.collect()                                    # cycles hold the group, and a group
                dist.destroy_process_group()                    # that outlives this call aborts
            return code
        if args.draw is not None:
            return draw_checkpoint(args)
        if args.summary:
            return summarise(args)
        if args.bench:
            return benchmark(args)
        _check(not (sys.argv[1:] if arguments is None else arguments),
               "nothing to do: give --train, --eval, --draw, --summary or --bench")
        parser.print_help()
        return 0
    except BrokenPipeError:                                     # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (InputError, OSError) as error:
        print("dat.py:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:                # no memory, a worker or peer lost
        print(f"dat.py: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
