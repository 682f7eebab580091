"""What dat.py promises, test by test, in the order of the paper. Run with: pytest

A test's name is a claim; its docstring says which bug turns it red. Parity is in float64 to 1e-9:
both sides round differently, at about 1e-13. Where there is a GPU, DEVICES holds it too.

    eq. 1, 3  test_window_attention_*, test_windows_*   eq. 2     test_*_attention_equals_the_loops
    eq. 4, 5  test_network_*, test_drop_path_*          eq. 6     test_deformable_attention_*
    eq. 7     test_points_by_hand, test_deformable_*    eq. 8     test_bilinear_*, test_sampled_*
    eq. 9     test_position_bias_by_hand                eq. 10    test_cost_*
    Sec. 3.3  test_network_*, test_authors_*            Tab. 1    test_variants_*
    gradients test_gradients_equal_differences_of_the_loops, test_authors_*
    [D1] test_points_by_hand, test_authors_*    [D2] test_any_image_size_works
    [D3] test_window_attention_*, test_variants_*    [D4] test_deformable_attention_*
    [D5] test_gradients_*, test_network_*    [D6] test_map_pixel_*    [D7] test_initial_*
    [D8] test_learning_rate_*, in the half on training
"""
import base64
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import zlib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import deform_conv2d
from torchvision.transforms import v2

import dat
import reference_numpy as loops
from dat import DAT, DATConfig, DeformableAttention, Recipe, StageConfig, WindowAttention
from lab import bench, choose, cost, detect, draw, explore, study, transfer

settings.register_profile("dat", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dat")
torch.set_num_threads(1)  # quicker on maps this small
HERE = Path(dat.__file__).parent
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
CLUSTER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GEOMETRIES = ("paper", "release")
sides = st.integers(1, 9)
on_devices = pytest.mark.parametrize("device", DEVICES)
RUN = "--train shapes --device cpu --dtype float32 --batch-size 20 "
PHOTOS = "--train imagenet --data images --device cpu --dtype float32 --batch-size 6 "
TEST = "--eval shapes --device cpu --checkpoint "


@pytest.fixture(autouse=True)
def same_start(tmp_path, monkeypatch):
    """Every test begins at one seed, in an empty folder, and outside a cluster's job."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for name in CLUSTER:
        monkeypatch.delenv(name, raising=False)


# ======== helpers
def random_input(*shape, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def randomise(module):
    """Float64 weights of order one everywhere, so that no term is negligible."""
    for i, (name, p) in enumerate(module.double().eval().named_parameters()):
        noise = random_input(*p.shape, seed=100 + i)
        scale = 0.3 if p.ndim == 1 else 1 / math.sqrt(p[0].numel())
        scale = 1.0 if name.endswith("table") else scale
        p.data = scale * noise + ("norm" in name and name.endswith("weight"))  # norms near 1
    return module


def array(values):
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.array(values)


def arrays(module):
    return {name: array(value) for name, value in module.state_dict().items()}


def close(a, b, tolerance=1e-9, name=""):
    np.testing.assert_allclose(array(a), array(b), rtol=0, atol=tolerance, err_msg=name)


def small_config(**changes):
    """Every kind of block, r = 1 and 2, G < M; drop path, which evaluation must leave out."""
    stages = (StageConfig(dim=8, heads=2, blocks="LSD", window=3, groups=1, stride=2, kernel=3),
              StageConfig(dim=12, heads=4, blocks="LD", window=2, groups=2, offset_range=3.0))
    return DATConfig(**{"stages": stages, "image_size": 16, "patch": 2, "classes": 5,
                        "drop_path": 0.5, **changes})


def small_network(**changes):
    return randomise(DAT(small_config(**changes)))


def small_attention(**changes):
    return randomise(DeformableAttention(
        **{"dim": 8, "heads": 4, "groups": 2, "size": (4, 5), "kernel": 3, **changes}))


def attention_with_offset(y, x, **changes):
    """Its offset network asks every point to move by the same (y, x)."""
    attention = small_attention(**changes)
    attention.offset.register_forward_hook(
        lambda _, inputs, out: torch.tensor([y, x]).to(out).expand_as(out))
    return attention


def values_and_gradients(run, model, images):
    """{name: value} of the logits of run(images), and of the gradient of each parameter."""
    logits, parameters = run(images), dict(model.named_parameters())
    gradients = torch.autograd.grad(logits.square().sum(), [*parameters.values()])
    return {"logits": logits, **dict(zip(parameters, gradients, strict=True))}


# ======== sampling (eq. 8) and points (eq. 7)
def test_bilinear_sampling_by_hand():
    """Red if rows and columns swap, or a point off the map is drawn to its border."""
    z = torch.tensor([[0., 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]).view(1, 1, 3, 4)
    points = torch.tensor([[1.5, 2.25], [-0.5, 3], [-1, 0]]).view(1, 1, 3, 2)
    close(dat.bilinear_sample(z, points).flatten(), [17.25, 1.5, 0], 1e-5)


@pytest.mark.parametrize("geometry, y, x", [
    ("paper", [0 + 2.5, 2 + 2.5, 4 + 2.5], [0 - 2.7, 2 - 2.7, 4 - 2.7, 6 - 2.7, 8 - 2.7]),
    ("release", [2 / 3 + 2, 2 + 2, 10 / 3 + 2], [0.8 - 2.4, 2.4 - 2.4, 4 - 2.4, 5.6 - 2.4, 4.8])])
def test_points_by_hand(geometry, y, x):
    """[D1] Red if r or s is ignored, s loses its half, or H / Hk turns into W / Wk.
    H = 5, W = 9, r = 2, s = 3. Paper: reach 3/2 5/3 = 2.5 and 3/2 9/5 = 2.7 px.
    Release: its axis is one pixel shorter, so 3/2 4/3 = 2 and 3/2 8/5 = 2.4 px."""
    attention = attention_with_offset(1e3, -1e3, stride=2, offset_range=3.0, geometry=geometry)
    points = attention.points(random_input(2, 5, 9, 8))
    assert points.shape == (2, 2, 3, 5, 2)
    for image, group in np.ndindex(2, 2):
        close(points[image, group, :, 0, 0], y)
        close(points[image, group, 0, :, 1], x)


def test_offset_network_stays_in_float32_under_autocast():
    """Red if autocast on a CPU takes the offsets to bfloat16."""
    with torch.autocast("cpu"):
        out = dat.OffsetNetwork(dim=4, kernel=3, stride=1)(random_input(1, 5, 5, 4).bfloat16())
    assert out.dtype == torch.float32


# ======== position bias (eq. 9), attention (eq. 2 and 6)
@pytest.mark.parametrize("axis", [0, 1], ids="yx")
def test_position_bias_by_hand(axis):
    """Red if the index is not R + H - 1, R = query - key (mirrored trains too), or is rounded.
    H = 3; the key moved from 1 to 0.75; for the query at 2 the index is 1.25 + 2 = 3.25."""
    size = (3, 1) if axis == 0 else (1, 3)
    attention = DeformableAttention(dim=1, heads=1, groups=1, size=size).double()
    attention.table.data = torch.arange(5.).double().view(attention.table.shape)
    keys = torch.zeros(1, 1, *size, 2, dtype=torch.float64)
    keys[..., axis] = torch.tensor([0, 0.75, 2]).view(size)
    bias = attention.position_bias(keys, size)
    close(bias[0, 0], [[2, 1.25, 0], [3, 2.25, 1], [4, 3.25, 2]])  # a row for each query


def test_kernels_agree_with_the_formula(monkeypatch):
    """Red if what a GPU computes differs from the formula, in a value or a gradient."""
    model, images = small_network(), random_input(2, 3, 15, 20)
    formula = values_and_gradients(model, model, images)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # so that PyTorch's kernels are called
    for name, value in values_and_gradients(model, model, images).items():
        close(value, formula[name], 1e-10, name)


def test_cudnn_is_kept_out_of_bfloat16_attention(monkeypatch):
    """Red if cuDNN, which has bugs here, may be chosen, or never again, or q and bias differ."""
    seen, kernel = [], F.scaled_dot_product_attention
    def watched(q, k, v, attn_mask):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), attn_mask.dtype))
        return kernel(q, k, v, attn_mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    small_attention().bfloat16()(random_input(1, 4, 4, 8).bfloat16())
    assert seen == [(False, torch.bfloat16)]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@settings(max_examples=80)
@on_devices
@given(H=sides, W=sides, size=st.tuples(sides, sides), stride=st.sampled_from([1, 2, 3]),
       kernel=st.sampled_from([1, 3, 5]), offset_range=st.sampled_from([0.5, 2.0, 5.0]),
       geometry=st.sampled_from(GEOMETRIES), offsets=st.booleans(),
       heads_groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
       position=st.sampled_from(["relative", "fixed", "none"]))
def test_deformable_attention_equals_the_loops(device, H, W, size, heads_groups, **options):
    """[D4] Red for any slip in eq. 6-9: swapped axes, a wrong bound, group, head or table index,
    or an offset network that is not depth-wise, centred, normed, and without a last bias."""
    heads, groups = heads_groups
    attention = randomise(DeformableAttention(
        dim=8, heads=heads, groups=groups, size=size, **options)).to(device)
    x = random_input(2, H, W, 8).to(device)
    outs, points = attention(x), attention.points(attention.q(x))
    for image, out, where in zip(array(x), outs, points, strict=True):
        expected = loops.deformable_attention(image, arrays(attention), heads, groups, **options)
        close(out, expected[0])
        close(where, expected[1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_what_is_not_finite_stays_in_its_image(geometry):
    """Red if a NaN coordinate crashes as an index, or spreads over the batch."""
    attention, x = small_attention(geometry=geometry), random_input(2, 4, 5, 8)
    expected = attention(x)[1]
    x[0, 2, 2] = math.nan
    out = attention(x)
    assert out[0].isnan().all()
    close(out[1], expected, 1e-12)


# ======== windows (eq. 1 and 3, Sec. 3.3)
@settings(max_examples=60)
@example(H=3, W=2, window=7, heads=1, shifted=True)  # no cut, nothing to roll
@on_devices
@given(H=sides, W=sides, window=st.integers(1, 7), heads=st.sampled_from([1, 2]),
       shifted=st.booleans())
def test_window_attention_equals_the_loops(device, H, W, window, heads, shifted):
    """Red if padding leaks, cuts are misplaced, q and k swap in the bias, or y and x do."""
    shift = math.ceil(window / 2) if shifted else 0
    attention = randomise(WindowAttention(dim=4, heads=heads, window=window, shift=shift))
    x = random_input(2, H, W, 4)
    for image, out in zip(x, attention.to(device)(x.to(device)), strict=True):
        close(out, loops.window_attention(array(image), arrays(attention), heads, window, shift))


# ======== drop path, initial weights
def test_drop_path_drops_whole_samples_at_its_rate():
    """Red if single elements drop, `rate` is the share kept, or those kept are not scaled up."""
    dropped = dat.drop_path(torch.ones(4000, 2, 3), 0.25, True)
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    close(dropped.unique(), [0, 4 / 3], 1e-6)
    share = float((dropped == 0).double().mean())
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)  # 5 sigma


def test_drop_path_draws_for_both_branches():
    """Red if a branch ignores its rate, or both drop the same samples: each adds 0 or 1 / 0.5."""
    stage = StageConfig(dim=8, heads=2, blocks="LL")
    block = DAT(small_config(stages=(stage,), drop_path=0.5)).stages[0].blocks[1]
    for layer in (block.attention, block.mlp.contract):
        layer.register_forward_hook(lambda _, inputs, out: torch.ones_like(out))
    z = torch.randn(64, 4, 4, 8)
    assert (block(z) - z).amax((1, 2, 3)).round().unique().tolist() == [0, 2, 4]


def test_initial_weights_have_their_distributions():
    """[D7] Red if a layer starts from anything but U(-b, b), b = 1 / sqrt(inputs of a unit), as in
    PyTorch; a table from anything but N(0, 0.01^2); or a norm not as identity. Bounds: 5 sigma."""
    weights = dict(dat.build("cifar").named_parameters())
    for name, p in weights.items():
        if "norm" in name:
            assert torch.equal(p, torch.full_like(p, name.endswith("weight"))), name
            continue
        if name.endswith("table"):
            variance, variance_of_square = 0.01 ** 2, 2 * 0.01 ** 4
        else:
            weight = weights[name[:-4] + "weight"] if name.endswith("bias") else p
            b = 1 / math.sqrt(weight[0].numel())
            assert p.abs().max() <= b * (1 + 1e-6), name
            variance, variance_of_square = b ** 2 / 3, 4 / 45 * b ** 4
        assert abs(p.mean()) < 5 * math.sqrt(variance / p.numel()), name
        sigma = math.sqrt(variance_of_square / p.numel())
        assert abs(p.square().mean() - variance) < 5 * sigma, name


# ======== cost (eq. 10)
def test_cost_of_the_papers_example():
    """Red if a term of eq. 10 is lost. The paper prints 79.63M, and 5.08M for 0.51M."""
    macs = cost.deformable_attention_macs(H=14, W=14, keys=49, dim=384, kernel=5)
    assert macs == 79_629_312 + 508_032


def test_cost_is_what_the_module_multiplies_where_height_is_not_width():
    """Red if N is H * H, or eq. 10 and the module part: PyTorch counts its products."""
    attention = small_attention(stride=2).to("meta")
    with FlopCounterMode(display=False) as counter:
        attention(torch.empty(1, 6, 10, 8, dtype=torch.float64, device="meta"))
    macs = cost.deformable_attention_macs(H=6, W=10, keys=15, dim=8, kernel=3)
    assert counter.get_total_flops() == 2 * macs


# ======== the whole network (Sec. 3.3, Fig. 3)
@on_devices
@pytest.mark.parametrize("changes, size", [
    ({}, (16, 16)), ({"geometry": "release"}, (18, 13)), ({"geometry": "release"}, (11, 7)),
    ({"image_size": (12, 20)}, (12, 20)), ({}, (1, 1)), ({"patch": 3, "mlp_ratio": 1.5}, (17, 22)),
    ({"stem": "conv", "patch": 1}, (9, 6)), ({"stem": "conv", "position": "none"}, (9, 12)),
    ({"stem": "conv", "patch": 4}, (17, 23)), ({"position": "fixed"}, (12, 16)),
    ({"offsets": False, "stem": "conv"}, (15, 12))], ids=str)
def test_network_equals_the_loops(device, changes, size):
    """Red if a step to logits, maps (B, C, H, W) or points (in px of the image) goes wrong."""
    model, images = small_network(**changes).to(device), random_input(2, 3, *size).to(device)
    logits, features, points = model(images), model.features(images), model.sampling_points(images)
    for n, image in enumerate(images):
        expected, maps, blocks = loops.forward(array(image), arrays(model), asdict(model.config))
        close(logits[n], expected, name="logits")
        for ours, theirs in zip(features, maps, strict=True):
            close(ours[n].permute(1, 2, 0), theirs, name="features")
        for i, (ours, theirs) in enumerate(zip(points, blocks, strict=True)):
            cell = model.config.patch * 2 ** i  # one D in each stage
            first = (cell - 1) / 2 if model.config.stem == "patch" else 0
            close(ours[n], first + cell * theirs, name="points")


@on_devices
@pytest.mark.parametrize("changes", (
    {}, {"geometry": "release"}, {"stem": "conv"}, {"position": "none"},
    {"offsets": False, "position": "fixed"}), ids=str)
def test_gradients_equal_differences_of_the_loops(device, changes):
    """[D5] Red if a gradient is lost, counted twice, or NaN where windows or patches have zeros."""
    model, images = small_network(**changes).to(device), random_input(2, 3, 10, 13).to(device)
    tensors = {"images": images.requires_grad_(), **dict(model.named_parameters())}
    gradients = torch.autograd.grad(model(images).sin().sum(), [*tensors.values()])
    steps = [array(random_input(*p.shape, seed=1000 + i)) for i, p in enumerate(gradients)]
    slope = sum((array(p) * step).sum() for p, step in zip(gradients, steps, strict=True))
    def value(t):
        moved = {name: array(p) + t * step for (name, p), step in zip(tensors.items(), steps)}
        return np.sin(loops.network(moved["images"], moved, asdict(model.config))).sum()
    assert slope == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-6)


# ======== outside witnesses: torchvision
@pytest.mark.parametrize("shift", [0, 2], ids=["L", "S"])
def test_windows_equal_torchvisions(shift):
    """Red if values or gradients of L or S differ from Swin's, at the same shift."""
    theirs = randomise(ShiftedWindowAttention(8, [3, 3], [shift, shift], 2))
    ours = WindowAttention(dim=8, heads=2, window=3, shift=shift).double()
    ours.qkv, ours.out = theirs.qkv, theirs.proj
    table = theirs.relative_position_bias_table  # (displacements, heads) there
    ours.table.data = table.data.T.reshape(2, 5, 5)
    inputs = random_input(2, 6, 9, 8).requires_grad_()
    close(ours(inputs), theirs(inputs), 1e-12)
    shared = [inputs, *theirs.qkv.parameters(), *theirs.proj.parameters()]
    mine = torch.autograd.grad(ours(inputs).sin().sum(), [*shared, ours.table])
    other = torch.autograd.grad(theirs(inputs).sin().sum(), [*shared, table])
    for gradient, expected in zip([*mine[:-1], mine[-1].flatten(1).T], other, strict=True):
        close(gradient, expected, 1e-11)


@pytest.mark.parametrize("stride, s", [(1, 2.0), (2, 5.0)])
def test_sampled_features_equal_deform_conv2d(stride, s):
    """Red if values or gradients of x~ differ from a deformable 1x1 convolution that copies."""
    attention = small_attention(stride=stride, offset_range=s)
    x, y = (random_input(2, 6, 7, 8).requires_grad_() for _ in range(2))
    ours = attention.points(random_input(2, 6, 7, 8, seed=3)).detach()  # (2, G, Hk, Wk, 2)
    places = [torch.arange(count) * stride for count in ours.shape[2:4]]
    theirs = ours - torch.cartesian_prod(*places).view(ours.shape[2:])  # offsets
    ours.requires_grad_(), theirs.requires_grad_()
    offset, copy = theirs.movedim(-1, 2).flatten(1, 2), torch.eye(8).double().view(8, 8, 1, 1)
    expected = deform_conv2d(y.permute(0, 3, 1, 2), offset, copy, stride=stride)
    sampled = attention.sample(x, ours)
    close(sampled, expected.flatten(2).transpose(1, 2), 1e-12)
    (sampled.sin().sum() + expected.sin().sum()).backward()
    close(x.grad, y.grad, 1e-12)
    close(ours.grad, theirs.grad, 1e-12)


# ======== outside witnesses: the authors
def release_layout(config):
    """[(its name, its shape there, our name)] of the parameters of the release."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in DAT(config).named_parameters()}
    rows = []
    def add(theirs, ours, extra=()):  # a layer, where it is there
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in shapes:
                shape = shapes[f"{ours}.{kind}"] + (extra if kind == "weight" else ())
                rows.append((f"{theirs}.{kind}", shape, f"{ours}.{kind}"))
    for theirs, ours in (("patch_proj.0", "stem.conv"), ("patch_proj.1.norm", "stem.norm"),
                         ("cls_norm.norm", "norm"), ("cls_head", "head")):
        add(theirs, ours)
    for i, stage in enumerate(config.stages):
        add(f"down_projs.{i - 1}.0", f"stages.{i}.down.conv")
        add(f"down_projs.{i - 1}.1.norm", f"stages.{i}.down.norm")
        for j, letter in enumerate(stage.blocks):
            theirs, ours = f"stages.{i}", f"stages.{i}.blocks.{j}"
            for n, layer in ((1, "expand"), (2, "contract")):
                add(f"{theirs}.layer_norms.{2 * j + n - 1}.norm", f"{ours}.norm{n}")
                add(f"{theirs}.mlps.{j}.chunk.linear{n}", f"{ours}.mlp.{layer}")
            theirs, ours = f"{theirs}.attns.{j}", f"{ours}.attention"
            extra = (1, 1) if letter == "D" else ()  # 1x1 convolutions there, linear layers here
            for layer in ("q", "k", "v", "qkv", "out"):
                add(f"{theirs}.proj_{layer}", f"{ours}.{layer}", extra)
            add(f"{theirs}.conv_offset.0", f"{ours}.offset.conv")
            add(f"{theirs}.conv_offset.1.norm", f"{ours}.offset.norm")
            add(f"{theirs}.conv_offset.3", f"{ours}.offset.out", extra)
            table, shape = "rpe_table", shapes[f"{ours}.table"]
            if letter != "D":
                table, shape = "relative_position_bias_table", (shape[1] ** 2, shape[0])
            rows.append((f"{theirs}.{table}", shape, f"{ours}.table"))
    return rows


def official_state(config):
    """A checkpoint of the release, drawn by formula, with two arrays that follow from windows."""
    state = {"stages.0.attns.0.relative_position_index": torch.zeros(4, 4),
             "stages.0.attns.1.attn_mask": torch.zeros(9, 4, 4)}
    for name, shape, _ in release_layout(config):
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        scale = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
        scale = 0.5 if name.endswith("table") else scale
        state[name] = torch.from_numpy(scale * z + name.endswith("norm.weight"))
    return state


OFFICIAL = DATConfig(image_size=64, classes=5, stages=tuple(  # the authors' instance
    StageConfig(dim=dim, heads=dim // 8, blocks=blocks, window=2, groups=groups, kernel=kernel)
    for dim, blocks, groups, kernel in (
        (8, "LS", None, 9), (16, "LS", None, 7), (32, "LD", 2, 5), (64, "LD", 4, 3))))


def test_authors_logits_points_and_gradients():
    """[D1] Red if the release's geometry, shift, names or layouts are off anywhere.
    Points: last block, first image and group. Gradients: 2-norms."""
    model = dat.load_official(official_state(OFFICIAL), OFFICIAL).double()
    model.load_state_dict(dat.rename_weights(official_state(OFFICIAL)))  # again, in float64
    assert model.config == replace(OFFICIAL, geometry="release")
    images = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 64, 64)))
    logits = model(images.requires_grad_())
    close(logits, OFFICIAL_LOGITS, 1e-8, "logits")
    normalised = np.array(OFFICIAL_POINTS).reshape(2, 2, 2)  # on a map of 2 x 2: -1 is 0, 1 is 1
    in_image = (normalised + 1) / 2 * 32 + 15.5  # cells of 32 px
    close(model.sampling_points(images)[1][0, 0], in_image, 1e-8, "points")
    weights = torch.from_numpy(np.random.RandomState(8).standard_normal((2, 5)))
    (logits * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = {name: float(gradients[ours].norm()) for name, _, ours in release_layout(OFFICIAL)}
    norms["input"] = float(images.grad.norm())
    expected = dict(zip(sorted(norms), map(float, OFFICIAL_NORMS.split()), strict=True))
    assert norms == pytest.approx(expected, rel=0, abs=1e-8)


def test_every_weight_of_a_full_dat_t_lands_where_it_belongs():
    """Red if a name is read with one digit (layer_norms 10 and 11), or two weights swap."""
    config = dat.VARIANTS["dat-t"]
    state, layout = official_state(config), release_layout(config)
    ours = dat.load_official({"model": state, "epoch": 3}, config).state_dict()
    assert set(ours) == {name for _, _, name in layout}
    for theirs, _, name in layout:
        value = state[theirs].T if "position" in theirs else state[theirs]  # to (heads, ..)
        assert torch.equal(ours[name].flatten(), value.flatten().float()), theirs


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_ours_stay_and_prefixes_of_wrappers_are_taken_off(prefix):
    """Red if a file saved under DistributedDataParallel or torch.compile does not load."""
    ours = DAT(small_config(stem="conv", position="fixed")).state_dict()
    for state, expected in ((ours, ours), (official_state(OFFICIAL), DAT(OFFICIAL).state_dict())):
        renamed = dat.rename_weights({prefix + name: value for name, value in state.items()})
        assert {n: p.shape for n, p in renamed.items()} == {n: p.shape for n, p in expected.items()}


@pytest.mark.parametrize("name, value, message", [
    ("cls_norm.norm.bias", None, r'Missing key.*"norm\.bias"'),
    ("stages.9.extra", torch.zeros(1), r'Unexpected key.*"stages\.9\.extra"'),
    ("cls_head.weight", torch.zeros(6, 64), r"head\.weight.*\[6, 64\].*\[5, 64\]"),
    ("stages.0.local_perception_units.0", torch.zeros(1), r"^.*DAT\+\+.*another network.*$")])
def test_a_key_that_does_not_fit_is_named(name, value, message):
    """Red if a missing, unknown or misshapen key, or one of DAT++, passes or is not told."""
    state = {**official_state(OFFICIAL), name: value}
    with pytest.raises(dat.InputError, match=message):
        dat.load_official({n: v for n, v in state.items() if v is not None}, OFFICIAL)


# ======== variants (Tab. 1)
TINY, DEEP = ("LS", "LS", "LDLDLD", "LD"), ("LS", "LS", "LDLDLDLDLDLDLDLDLD", "LD")
TAB_1 = {  # C, heads, then by stage letters, groups and kernels; size, patch, window, parameters
    "dat-t": (96, 3, TINY, (0, 0, 3, 6), (9, 7, 5, 3), 224, 4, 7, 28_319_138, 0.2),
    "dat-s": (96, 3, DEEP, (0, 0, 3, 6), (9, 7, 5, 3), 224, 4, 7, 49_700_402, 0.3),
    "dat-b": (128, 4, DEEP, (0, 0, 4, 8), (9, 7, 5, 3), 224, 4, 7, 87_881_632, 0.5),
    "dat-b-384": (128, 4, DEEP, (0, 0, 4, 8), (9, 7, 5, 3), 384, 4, 12, 88_178_272, 0.5),
    "cifar": (48, 3, TINY, (0, 0, 3, 6), (9, 7, 5, 3), 32, 1, 4, 7_406_196, 0.1),
    "cifar-nano": (48, 3, ("LSD", "LDLD", "LD"), (3, 3, 6), (7, 5, 3), 32, 4, 4, 1_649_459, 0)}


@pytest.mark.parametrize("variant", TAB_1)
def test_variants_are_tab_1_block_by_block(variant):
    """Red if a setting or drop path rate of a block is another, or the number of parameters."""
    dim, heads, letters, groups, kernels, size, patch, w, parameters, drop_path = TAB_1[variant]
    with torch.device("meta"):
        model = dat.build(variant)
    blocks = [(i, letter) for i, row in enumerate(letters) for letter in row]
    ours = [(i, block) for i, stage in enumerate(model.stages) for block in stage.blocks]
    for n, ((i, letter), (j, block)) in enumerate(zip(blocks, ours, strict=True)):
        C, M, side, a = dim * 2 ** i, heads * 2 ** i, size // (patch * 2 ** i), block.attention
        # The stage, C, channels of the MLP, heads, and the table.
        found = [j, *block.mlp.expand.weight.T.shape, a.heads, *a.table.shape]
        expected = [i, C, 4 * C, M, M, *[2 * (side if letter == "D" else w) - 1] * 2]
        if letter == "D":  # groups, s, r, kernel and stride of the offset network
            conv = a.offset.conv
            found += [a.groups, a.offset_range, a.stride, *conv.kernel_size, *conv.stride]
            expected += [groups[i], 2.0, 1, kernels[i], kernels[i], 1, 1]
        else:
            found += [a.window, a.shift]
            expected += [w, {4: 2, 7: 4, 12: 6}[w] * (letter == "S")]
        assert found == expected, f"block {n}"
        assert block.rate == pytest.approx(drop_path * n / (len(blocks) - 1)), f"block {n}"
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_defaults_are_the_papers():
    """Red if a default changes, or an argument is no longer by keyword alone."""
    points = {"stride": 1, "kernel": 5, "offset_range": 2.0}
    fields = {"geometry": "paper", "offsets": True, "position": "relative"}
    images = {"image_size": 224, "patch": 4, "stem": "patch", "classes": 1000}
    assert WindowAttention.__init__.__kwdefaults__ == {"shift": 0}
    assert DeformableAttention.__init__.__kwdefaults__ == points | fields
    assert StageConfig.__init__.__kwdefaults__ == points | {"window": 7, "groups": None}
    assert DATConfig.__init__.__kwdefaults__ == images | fields | {"mlp_ratio": 4, "drop_path": 0.0}


@pytest.mark.parametrize("variant", dat.VARIANTS)
def test_a_saved_configuration_builds_the_same(variant):
    """Red if plain values, with lists for tuples, give another configuration (or no hash)."""
    config = replace(dat.VARIANTS[variant], image_size=(8, 12))
    plain = asdict(config) | {"image_size": [8, 12]}
    assert {DATConfig(**plain | {"stages": list(plain["stages"])})} == {config}


# ======== any size, any field, any type
@given(B=st.integers(0, 2), H=st.integers(1, 40), W=st.integers(1, 40),
       stem=st.sampled_from(["patch", "conv"]))
def test_any_image_size_works(B, H, W, stem):
    """[D2] Red if a size that divides by nothing, a map of one pixel, or an empty batch breaks."""
    model, images = DAT(small_config(patch=4, stem=stem)), torch.randn(B, 3, H, W)
    one, two = ((math.ceil(H / cell), math.ceil(W / cell)) for cell in (4, 8))
    assert model(images).shape == (B, 5) and model(images).isfinite().all()
    assert [m.shape for m in model.features(images)] == [(B, 8, *one), (B, 12, *two)]
    assert [p.shape for p in model.sampling_points(images)] == [(B, 1, *two, 2), (B, 2, *two, 2)]
    assert replace(model.config, image_size=(H, W)).map_sizes() == [one, two]


@pytest.mark.parametrize("stem, patch", [("patch", 2), ("patch", 3), ("conv", 1), ("conv", 4)])
def test_map_pixel_is_amid_its_convolutions(stem, patch):
    """[D6] Red if points are not at the middle of the image pixels that reach a map pixel."""
    stages = (StageConfig(dim=8, heads=1, blocks="D", groups=1),) * 2
    model = small_network(stem=stem, patch=patch, offsets=False, stages=stages)
    images = random_input(1, 3, 48, 48).requires_grad_()
    x = model.stem(images.permute(0, 2, 3, 1))
    # With r = 1 and no offsets there is a point at each map pixel.
    for stage, points in zip(model.stages, model.sampling_points(images), strict=True):
        x = stage.down(x)
        (reached,) = torch.autograd.grad(x[0, 3, 2].sum(), images, retain_graph=True)
        rows, columns = (reached[0].abs().sum((0, axis)).nonzero() for axis in (2, 1))
        middle = [float(line[0] + line[-1]) / 2 for line in (rows, columns)]
        close(points[0, 0, 3, 2], middle)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
def test_half_precision_agrees(device, dtype, autocast):
    """Red if grid_sample meets mixed types, or logits differ by more than rounding."""
    model, images = DAT(small_config()).eval().to(device), torch.randn(2, 3, 16, 20).to(device)
    exact = model(images)
    if not autocast:
        model, images = model.to(dtype), images.to(dtype)
    with torch.autocast(device, dtype=dtype, enabled=autocast):
        logits, points = model(images), model.sampling_points(images)
    logits.float().sum().backward()
    assert (logits.dtype, points[0].dtype, points[1].dtype) == (dtype, *[torch.float32] * 2)
    close(logits.float(), exact, 0.05)


def test_training_in_bfloat16_lowers_the_loss():
    """Red if drop path, or anything else in training, mixes float32 into another type."""
    model = DAT(small_config(drop_path=0.3)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels, losses = torch.randn(10, 3, 16, 16).bfloat16(), torch.arange(10) % 5, []
    for _ in range(20):
        losses.append(F.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].dtype == torch.bfloat16
    assert min(losses[-5:]) < losses[0] - 0.2


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_points_of_a_bfloat16_model_have_float32_coordinates(geometry):
    """Red if a coordinate is in bfloat16, which has steps of half a pixel near 100."""
    attention = attention_with_offset(0.0, 0.5, dim=4, heads=1, groups=1, geometry=geometry)
    x = attention.bfloat16().points(torch.zeros(1, 1, 160, 4).bfloat16())[0, 0, 0, :, 1]
    i = np.arange(160)
    expected = {"paper": i + math.tanh(0.5), "release": (i + 0.5 + math.tanh(0.5)) / 160 * 159}
    close(x, expected[geometry], 1e-4)


def test_bfloat16_tables_are_read_at_float32_points():
    """Red if a map or a table is read at rounded places."""
    attention = small_attention(dim=4, heads=1, groups=1, size=(1, 160)).bfloat16()
    points = torch.rand(1, 1, 1, 50, 2) * torch.tensor([0, 159])
    bias = attention.position_bias(points, (1, 160)).float()
    close(bias, attention.float().position_bias(points, (1, 160)), 1e-6)


# ======== compiled, exported, elsewhere
def test_a_compiled_model_equals_the_eager_one():
    """Red if a graph breaks, a value or gradient changes, or .train() and .eval() compile anew."""
    torch.compiler.reset()
    stage = StageConfig(dim=8, heads=2, blocks="SD", window=3, groups=1)
    model = DAT(small_config(stages=(stage,), drop_path=0.0)).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    images = random_input(2, 3, 13, 18)
    eager = values_and_gradients(model, model, images)
    for name, value in values_and_gradients(compiled, model, images).items():
        close(value, eager[name], 1e-11, name)
    compiled.eval()(images)
    with torch.compiler.set_stance("fail_on_recompile"):
        for training in (True, False):
            close(compiled.train(training)(images), model(images), 1e-11)


def test_an_exported_model_takes_any_batch():
    """Red if the batch cannot be a symbol, or an exported value differs."""
    model, images = small_network(), random_input(5, 3, 13, 18)
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images[:2],), dynamic_shapes=batch)
    close(exported.module()(images), model(images), 1e-11)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def cuda_autocast(request):
    """Autocast for CUDA, switched on by hand: torch.autocast refuses where there is no GPU."""
    torch.set_autocast_dtype("cuda", request.param)
    torch.set_autocast_enabled("cuda", request.param != torch.float32)
    yield request.param
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("variant, fields", [
    *((name, {}) for name in dat.VARIANTS), ("cifar-nano", {"geometry": "release"}),
    ("cifar-nano", {"position": "fixed"}), ("cifar-nano", {"offsets": False, "position": "none"})])
def test_on_a_gpu_nothing_is_made_on_the_cpu(variant, fields, cuda_autocast, monkeypatch):
    """Red if a tensor is made elsewhere than the images, a value is waited for, or types do not
    meet. Fake tensors know where they would be, and need no GPU."""
    for name in ("trunc_normal_", "kaiming_uniform_", "uniform_"):  # they need a GPU or values
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # which asks the driver
    seen = set()
    class SeeDevices(TorchFunctionMode):  # of all tensors that torch's functions return
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                seen.add(result.device.type)
            return result
    with FakeTensorMode():
        with torch.device("cuda"):
            model, images = dat.build(variant, **fields), torch.empty(1, 3, 40, 56)
        with SeeDevices():
            logits = model(images)
            points = model.sampling_points(images) if variant == "cifar-nano" else []  # for time
    assert seen == {"cuda"}
    assert (logits.device.type, logits.dtype) == ("cuda", cuda_autocast)
    assert [(p.device.type, p.dtype) for p in points] == [("cuda", torch.float32)] * len(points)


def test_the_model_needs_torch_alone():
    """Red if the import prints, draws random numbers, or the model needs more than torch."""
    code = """if True:
        import sys, torch
        sys.modules |= dict.fromkeys(("torchvision", "matplotlib", "PIL", "numpy"))
        state = torch.get_rng_state()
        import dat
        assert torch.equal(state, torch.get_rng_state())
        images, model = torch.zeros(1, 3, 32, 32), dat.build("cifar-nano")
        assert model(images).shape == (1, 10) and len(model.sampling_points(images)) == 4"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ======== wrong values
NO_COUNTS = [0, -1, 2.5, None, "8", math.nan, [2]]
NO_RANGES = [-1, 0, math.nan, math.inf, None, "2"]
NO_FIELDS = {"dim": [*NO_COUNTS, 7], "heads": [*NO_COUNTS, 3], "groups": [*NO_COUNTS, 3],
             "stride": NO_COUNTS, "kernel": [*NO_COUNTS, 4], "offset_range": NO_RANGES}
A_STAGE = StageConfig(dim=8, heads=2, blocks="LD", groups=1)
NONSENSE = [  # what to build, and values of its fields that cannot work
    ("stage", lambda **change: replace(A_STAGE, **change), {
        **NO_FIELDS, "window": NO_COUNTS, "blocks": ["", "LX", "ld", None, ["L"], 0]}),
    ("network", small_config, {
        "stages": [(), [], None, A_STAGE, "LD", (8,), (None,)], "patch": NO_COUNTS,
        "image_size": [*NO_COUNTS[:-1], (8,), (8, 8, 8), (0, 8), (8.0, 8)], "classes": NO_COUNTS,
        "drop_path": [1, 2, -0.1, math.nan, None, "0.1"], "mlp_ratio": [0.1, *NO_RANGES],
        "geometry": ["Paper", None], "position": ["rel", None, False], "stem": ["convs", None],
        "offsets": ["no", None, 2]}),
    ("conv", lambda **change: small_config(stem="conv", **change), {"patch": [3, 8]}),
    ("attention", small_attention, NO_FIELDS | {"size": [*NO_COUNTS, (4,), (4, 0)],
        "geometry": ["x"], "position": ["x"], "offsets": ["no"]}),
    ("windows", lambda **change: WindowAttention(**{"dim": 8, "heads": 2, "window": 3} | change), {
        "dim": [*NO_COUNTS, 7], "heads": [*NO_COUNTS, 3], "window": NO_COUNTS,
        "shift": [-1, 4, 1.5, None, "1", math.nan]}),
    ("stage without D", lambda **change: replace(A_STAGE, blocks="LS", **change), {"groups": [1]})]


@pytest.mark.parametrize("build, field, value", [
    pytest.param(build, field, value, id=f"{name}-{field}={value!r}")
    for name, build, fields in NONSENSE for field, values in fields.items() for value in values])
def test_a_value_that_cannot_work_is_named(build, field, value):
    """Red if nonsense is accepted, and ends in a traceback or in NaN."""
    with pytest.raises(dat.InputError, match=re.escape(f"{field}={value!r}")):
        build(**{field: value})


@pytest.mark.parametrize("build, shape, dtype, word", [
    (small_attention, (1, 2, 3, 7), torch.float64, "(1, 2, 3, 7)"),
    (small_attention, (2, 3, 8), torch.float64, "(2, 3, 8)"),
    (small_network, (3, 8, 8), torch.float64, "(3, 8, 8)"),
    (small_network, (1, 1, 8, 8), torch.float64, "(1, 1, 8, 8)"),
    (small_network, (1, 3, 8, 8), torch.uint8, "uint8")])
def test_an_input_that_does_not_fit_is_named(build, shape, dtype, word):
    """Red if it fails late, inside a reshape or a convolution."""
    with pytest.raises(dat.InputError, match=re.escape(word)):
        build()(torch.zeros(shape, dtype=dtype))


# ======== the authors' digits: what their code (LeapLabTHU/DAT, commit 566a593) computes in float64
# on OFFICIAL; norms in the order of the names, with 8 decimals
OFFICIAL_LOGITS = [[-0.43485169763, -0.88767835401, 0.89094096273, -0.98391614799, 0.83237116808],
                   [-0.73851888728, -0.8194194149, 0.57041418827, -1.34864217445, 0.14095297046]]
OFFICIAL_POINTS = [0.2034395087, -1.1344209451, -0.7619660045, 0.2416693640,
                   0.0953754111, -0.6022599857, -0.4074606492, 1.2376484701]
OFFICIAL_NORMS = """4.04493045 30.57814726 3.8019404 3.33676771 24.42381333 2.70618238 2.67335312
27.76647708 3.34089376 2.78324249 43.72146863 4.11716733 3.34280623 5.3878558 3.97209993 38.30804477
3.03281292 3.29051925 2.03022802 7.08827557 2.22968267 9.85781435 1.67954727 0.77364621 4.3194394
1.72113005 7.43501748 0.33051763 2.60314931 3.89164127 1.38162239 1.75124266 2.17405938 3.40994049
0.92399078 1.17745925 1.50192331 4.24316797 1.34551394 8.74011794 1.12541474 3.89987841 0.64595581
6.12285861 1.81357236 6.66255672 1.99429823 11.39702888 1.54308732 1.82452424 5.70925385 1.22012664
6.3062164 0.59035774 2.16760751 2.96469971 1.32606857 1.48687157 0.93669419 1.46890776 1.29976016
1.06072501 1.31158735 6.39006265 1.7136364 10.54830245 1.2759826 4.98728959 1.95437251 10.09650872
2.82040844 11.16433877 2.34425809 11.38975522 0.6424704 0.65065139 2.30506906 0.36335538 0.37694036
1.18201793 0 1.57974971 2.37418539 9.36215395 0.5091177 2.87553803 1.88372548 8.81894898 0.25550233
2.3517968 2.52391847 1.91884307 1.63644349 1.77909303 1.65751272 1.64776868 1.77702304 1.70207731
9.60041352 2.4565153 18.42520051 1.65823552 9.07334596 2.19144372 17.07629955 3.13379022 21.32581394
2.80274875 20.55357214 0.58733215 1.25412975 1.45309915 0.68139311 0.51136048 1.85645987 0
0.68526185 2.4642624 16.24304412 0.5568541 4.40553014 2.431386 16.48449231 0.15398059 2.78541237
2.11947875 1.69586413 1.98077674 2.1499605 2.0608097 1.3590859 1.29758338 1.71101786 13.33406528
2.70484985 26.98308528 1.51574448 11.28471331 2.34729362 21.54572047"""


# ======== helpers of the training half
def run_cli(flags):
    """Exit code, output and errors of the command line, in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = dat.main(flags.split())
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


def succeed(flags):
    """The output of a command line that must end well."""
    code, out, err = run_cli(flags)
    assert (code, err) == (0, "")
    return out


def assert_input_error(flags, *words):
    """Exit code 2, and one line on standard error that holds all `words`."""
    code, _, err = run_cli(flags)
    assert code == 2 and err.count("\n") == 1, (code, err)
    assert [word for word in words if word not in err] == [], err


def stop(*_, **__):
    raise KeyboardInterrupt


def on_call(number, owner, name, action, patch):
    """Replaces owner.name: its call `number` does action(result) with what it returns."""
    real, calls = getattr(owner, name), itertools.count(1)
    def replaced(*args, **options):
        result = real(*args, **options)
        return action(result) if next(calls) == number else result
    patch.setattr(owner, name, replaced)


def interrupt(flags, name="evaluate", number=2):
    """Ctrl-C in a run, at the given call of dat.<name>. Returns the output."""
    with pytest.MonkeyPatch.context() as patch:
        on_call(number, dat, name, stop, patch)
        code, out, err = run_cli(flags)
    assert (code, err) == (130, "") and out.splitlines()[-1].startswith("stopped; ")
    return out


def saved(out):
    return torch.load(f"{out}/last.pt", weights_only=True)


def assert_same_run(a, b, tolerance=0.0):
    """The checkpoints of two runs hold the same, up to the seconds they took."""
    one, other = saved(a), saved(b)
    for row in one["history"] + other["history"]:
        del row["seconds"]
    if tolerance > 0:  # the gradient of the keys' bias is rounding alone
        for name in [name for name in one["model"] if name.endswith((".k.bias", ".qkv.bias"))]:
            del one["model"][name], other["model"][name]
    for name in ("model", "history", "optimizers", "scaler"):
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


def printed_command(text, program="python"):
    """The flags of the dat.py command at the end of what a run printed."""
    command = re.findall(rf"{program} dat\.py (.+)", text)[-1]
    assert shlex.join(shlex.split(command)) == command
    return command


def shrink(patch, train=85, test=17):
    """Few images of `shapes`, and a tiny model in the place of cifar-nano."""
    make, counts = dat.make_shapes, {10_000: train, 2_000: test}
    patch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, image_size=32, drop_path=0.1))
    patch.setattr(dat, "make_shapes", lambda count, **rest: make(counts.get(count, count), **rest))


@pytest.fixture
def tiny(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture
def trained(tiny):
    """The checkpoint o/last.pt of one epoch."""
    succeed(RUN + "--epochs 1 --out o")
    return saved("o")


@pytest.fixture
def folder(monkeypatch):
    """Images of three classes by brightness, and small models under known names."""
    small = small_config(patch=4, image_size=32, classes=7, drop_path=0.0)
    for name in ("dat-t", "dat-b", "dat-b-384", "cifar"):
        monkeypatch.setitem(dat.VARIANTS, name, small)
    rng = np.random.default_rng(0)
    for half, count in (("train", 18), ("val", 15)):
        for i in range(count):
            path = Path("images", half, ("dark", "grey", "pale")[i % 3], f"{i}.JPEG")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(80 * (i % 3), 80 * (i % 3) + 60, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return Path("images")


def child(flags, log, environment, test_images):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    os.environ.update(environment)
    shrink(pytest.MonkeyPatch(), test=test_images)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    sys.exit(dat.main(flags.split()))


@pytest.fixture
def start(tiny, monkeypatch):
    """Starts the command line with `shrink` in processes of their own, which write into 0.log,
    1.log .. They are forked from one that has imported torch, and are gone after the test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context, processes = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload([__name__])
    # The store that torchrun has: it binds a free port itself.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    def start(flags, world=1, test_images=17):
        for rank in range(world):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                           "TORCHELASTIC_USE_AGENT_STORE": "True"}
            processes.append(context.Process(target=child, args=(
                flags, f"{rank}.log", environment if world > 1 else {}, test_images)))
            processes[-1].start()
        return processes[-world:]
    yield start
    for process in processes:
        process.kill()
        process.join()


# ======== data
@pytest.mark.parametrize("name, fold, share", [  # repeats in a turn, filled share of the circle
    ("disc", 0, 1), ("ring", 0, 1 - 0.55 ** 2), ("square", 4, 2 / math.pi), ("cross", 4, 0.588),
    ("triangle", 3, 3 * math.sqrt(3) / 4 / math.pi), ("star", 5, 0.7 ** 2 + 0.3 ** 2 / 2),
    ("crescent", 2, 0.36), ("bar", 2, 1.2 / (math.pi * 1.09))])
def test_figures_look_like_their_names(name, fold, share):
    """Red if two names are swapped, or a form changes: only the ring is empty in the middle."""
    _, labels, masks = dat.make_shapes(160, seed=9, side=96)
    for mask in masks[labels == dat.SHAPES.index(name)]:
        places = mask.nonzero().double()
        middle = places.mean(0)
        z = torch.complex(*(places - middle).T)  # the mean of z ** k is 0 unless k is the fold
        reach = float(z.abs().max())
        strengths = [float((z / reach).pow(k).mean().abs()) for k in (2, 3, 4, 5)]
        assert (strengths.index(max(strengths)) + 2 if max(strengths) > 0.05 else 0) == fold
        assert len(places) / (math.pi * reach ** 2) == pytest.approx(share, abs=0.045)
        assert mask[tuple(middle.round().long().tolist())] == (name != "ring")


def test_shapes_keep_their_values():
    """Red if a seed draws other figures than it did for the published results."""
    images, labels, masks = dat.make_shapes(400, seed=5)
    assert labels[:9].tolist() == [0, 3, 5, 0, 4, 3, 6, 7, 5]
    close(images[:4].float().mean((1, 2, 3)), [86.309, 90.368, 83.860, 78.136], 0.1)  # CPUs round
    close(masks[:8].sum((1, 2)), [140, 156, 152, 119, 171, 80, 124, 113], 2)


def test_masks_of_shapes_lie_on_the_figures():
    """Red if masks and images come apart: one colour on the mask, another one off it."""
    images, _, masks = dat.make_shapes(400, seed=5)
    values, inside = images.float() / 255, masks[:, None].float()
    count = inside.sum((2, 3))
    mean = (values * inside).sum((2, 3)) / count
    spread = ((values - mean[..., None, None]).square() * inside).sum((2, 3)) / count
    outside = (values * (1 - inside)).sum((2, 3)) / (1024 - count)
    assert spread.sqrt().max() < 0.06
    assert (mean - outside).abs().amax(1).quantile(0.05) > 0.1


@pytest.mark.parametrize("name, labels", [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_from_its_folder(monkeypatch, name, labels):
    """Red if planes, labels or halves are mixed up, or damage gives a traceback."""
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    kind, classes = getattr(datasets, name.upper()), list("abcdefghij")
    pixels = np.random.RandomState(0).randint(256, size=(20, 3072), dtype=np.uint8)
    folder = Path("data", kind.base_folder)
    folder.mkdir(parents=True)
    for i, (file, _) in enumerate(kind.test_list + kind.train_list):
        content = {"data": pixels + np.uint8(i), labels: [*range(10)] * 2}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    for split, count, file in (("train", 20 * len(kind.train_list), 1), ("test", 20, 0)):
        images, names = dat.load_dataset(name, "data", split)
        image, label = images[17]
        assert (len(images), names, label) == (count, tuple(classes), 7)
        assert torch.equal(image, torch.from_numpy(pixels[17] + np.uint8(file)).view(3, 32, 32))
    (folder / kind.test_list[0][0]).write_bytes(b"not a pickle")
    assert_input_error(f"--train {name}", "--data data", "--train shapes")


def test_offline_the_error_says_what_to_do(tiny, monkeypatch):
    """Red if the line lacks what was tried or the way without."""
    url = "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    assert_input_error("--train cifar10", "--data data", url, "refused", "--train shapes")


@pytest.mark.parametrize("gone, place, word", [
    ("train", "images/train", "<class>"), ("val", "images/val", "<class>"),
    ("val/pale", "val/", "pale"), ("train/pale", "train/", "pale"),
    ("train/dark/*", "images/train", "dark")])
def test_a_folder_that_cannot_be_used_is_named(folder, gone, place, word):
    """Red if an error names neither folder nor class, or something is written before it."""
    for i, path in enumerate(folder.glob(gone)):
        path.rename(f"gone-{i}")
    assert_input_error(f"{PHOTOS} --epochs 1 --out o", place, word)
    assert not Path("o").exists()


@pytest.mark.parametrize("name, keep, cause", [
    ("train/dark/0.JPEG", 0, "identify"), ("train/dark/0.JPEG", 0.5, "runcated"),
    ("val/grey/1.JPEG", 0.5, "runcated")])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_with_its_cause(folder, name, keep, cause, workers):
    """Red if the file or the cause is not told, or is lost in a worker."""
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:int(keep * len(content))])
    assert_input_error(f"{PHOTOS} --epochs 1 --workers {workers}", f"images/{name}", cause)


@pytest.mark.parametrize("kind, name", [
    (np.uint16, "x.png"), (np.float32, "x.tiff"), (np.int32, "x.tiff")])
def test_images_that_would_be_clipped_are_refused(kind, name):
    """Red if a 16-bit or float image is trained on as plain white."""
    Image.fromarray(np.full((4, 4), 300, dtype=kind)).save(name)
    with pytest.raises(dat.InputError, match=f"{name}.* 8 bits"):
        dat.read_image(name)


@pytest.mark.parametrize("mode, colour, options", [
    ("RGBA", (100, 100, 100, 51), {}), ("LA", (100, 51), {}), ("P", 0, {"transparency": b"\x33"})])
def test_transparent_images_lie_on_white(mode, colour, options):
    """Red if transparency shows black or a hidden colour, or is taken as all or nothing."""
    image = Image.new(mode, (1, 1), colour)
    if mode == "P":
        image.putpalette([100, 100, 100])
    image.save("x.png", **options)
    close(dat.read_image("x.png").getpixel((0, 0)), [224] * 3, 1)  # a fifth of it shows


def test_hidden_files_and_folders_are_left_out(folder):
    """Red if .ipynb_checkpoints becomes a class, or its images count."""
    for name in (".ipynb_checkpoints/a.png", "dark/.ipynb_checkpoints/a.png", "dark/.a.png"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "train" / name)
    images, classes = dat.load_dataset("imagenet", "images", "train")
    assert (classes, len(images)) == (("dark", "grey", "pale"), 18)
    assert all(classes[label] in path and "/." not in path for path, label in images)


# ======== transforms
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet


@pytest.mark.parametrize("size, side, margin", [(224, 256, 16), (384, 438, 27)])
def test_the_middle_of_a_photo_is_the_releases(size, side, margin):
    """Red if side, filter, margin or ImageNet's figures differ, or EXIF turns the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = 6  # a phone's orientation, which the release ignores
    image.save("x.png", exif=exif)
    resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
    middle = resized[margin:margin + size, margin:margin + size]
    result = dat.transform_for("imagenet", size, "none")("x.png")
    close(result.permute(1, 2, 0), (middle - MEAN) / STD, 1e-5)


def test_small_images_are_moved_by_up_to_4_px_and_flipped():
    """Red if crop or flip is missing, or reaches further or less far."""
    image = dat.make_shapes(1, seed=1)[0][0]
    padded = (F.pad(image, (4, 4, 4, 4)) / 255 - 0.5) / 0.25
    crops = [padded[:, y:y + 32, x:x + 32] for y in range(9) for x in range(9)]
    possible = torch.stack([form for crop in crops for form in (crop, crop.flip(2))])
    samples = dat.Samples([(image, 0)] * 400, dat.transform_for("shapes", 32, "light"))
    distances = [(possible - samples[i][0]).abs().amax((1, 2, 3)) for i in range(400)]
    equal = torch.stack(distances) < 1e-5
    assert (equal.sum(1) == 1).all()
    counts = equal.sum(0).view(9, 9, 2)  # by row, column, and whether it is flipped
    assert (counts.sum((1, 2)) > 0).all() and (counts.sum((0, 2)) > 0).all()
    assert 150 < counts[:, :, 1].sum() < 250


def test_flips_alone_leave_images_in_their_place():
    """Red if "flip" crops, or does not flip half of the images."""
    image = dat.make_shapes(1, seed=1)[0][0]
    samples = dat.Samples([(image, 0)] * 100, dat.transform_for("cifar10", 32, "flip"))
    plain = (image / 255 - 0.5) / 0.25
    flipped = [torch.allclose(samples[i][0], plain.flip(2)) for i in range(100)]
    assert 30 < sum(flipped) < 70
    assert all(flip or torch.allclose(samples[i][0], plain) for i, flip in enumerate(flipped))


def test_photos_are_cropped_at_many_scales_and_flipped():
    """Red if the area is not 8% to all of the image, or the sides are not 3:4 to 4:3."""
    row, column = np.mgrid[0:200, 0:200].astype(np.uint8)
    Image.fromarray(np.stack([row, column, column], axis=2)).save("x.png")
    samples = dat.Samples([("x.png", 0)] * 200, dat.transform_for("imagenet", 40, "light"))
    images = torch.stack([samples[i][0] for i in range(200)]).permute(0, 2, 3, 1).numpy()
    images = (images * STD + MEAN) * 255  # the values tell rows and columns of the file
    heights = 2 * (images[:, 30, 20] - images[:, 10, 20])[:, 0]  # of the crops, in px
    widths = 2 * (images[:, 20, 30] - images[:, 20, 10])[:, 1]  # below 0 if flipped
    areas, ratios = heights * abs(widths) / 200 ** 2, abs(widths) / heights
    assert 0.06 < min(areas) < 0.15 and 0.44 < np.mean(areas) < 0.58 and 0.85 < max(areas) < 1.05
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.42
    assert 70 < sum(widths < 0) < 130


@pytest.fixture(scope="module")
def strong():
    """600 plain grey images of value 100 after "strong" augmentation."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (100, 100, 100)).save(file, "png")
    samples = dat.Samples([(file, 0)] * 600, dat.transform_for("imagenet", 24, "strong"))
    images = torch.stack([samples[place][0] for place in range(600)])
    return (images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("value, least, most", [  # unchanged by one draw: 444, by three: 210
    (181, 8, 600), (19, 8, 600), (96, 8, 600), (155, 8, 600), (100, 252, 372)], ids=[
    "brighter by 81%", "darker by 81%", "4 bits left", "inverted", "unchanged"])
def test_randaugment_draws_two_changes_of_strength_9_of_10(strong, value, least, most):
    """Red if strength, number of strengths or number of changes differs."""
    assert least <= ((strong[:, 0, 12, 12] - value).abs() < 1.2).sum() <= most


def test_a_quarter_of_the_images_gets_a_box_of_noise(strong):
    """Red if erasing is rarer, or fills with one colour."""
    assert 100 < sum(len(image[0].unique()) > 10 for image in strong) < 200


# ======== recipe
SHORT = {"floor": 0.01, "clip": 5.0, "weight_decay": 0.05, "augment": "light", "mixed": 0.0,
         "optimizer": "muon"}
LONG = SHORT | {"epochs": 300, "augment": "strong", "mixed": 0.9, "optimizer": "adamw"}
AUTHORS = LONG | {"batch_size": 1024, "micro_batch": 128, "lr": 1e-3, "warmup": 20 / 300, "seed": 0}


@pytest.mark.parametrize("data, model, given, setting, expected", [
    ("imagenet", "dat-t", {}, {}, AUTHORS),
    ("imagenet", "dat-s", {"batch_size": 512}, {}, AUTHORS | {"batch_size": 512, "lr": 5e-4}),
    ("imagenet", "dat-s", {"lr": 3e-4, "batch_size": 256}, {}, {"lr": 3e-4, "batch_size": 256}),
    ("imagenet", "dat-b", {}, {}, AUTHORS | dict(lr=8e-4, warmup=50 / 300, floor=1 / 80, clip=1)),
    ("imagenet", "dat-b-384", {}, {"fine_tuning": True}, AUTHORS | dict(
        epochs=30, batch_size=512, lr=2e-6, warmup=0, floor=0.05, weight_decay=1e-8)),
    ("imagenet", "dat-t", {}, {"fine_tuning": True, "new_head": True},
     AUTHORS | dict(epochs=30, batch_size=16, micro_batch=16, lr=2e-4, augment="light", mixed=0.0)),
    ("imagenet", "dat-t", {"batch_size": 64}, {"fine_tuning": True, "new_head": True},  # same rate
     AUTHORS | dict(epochs=30, batch_size=64, micro_batch=64, lr=2e-4, augment="light", mixed=0.0)),
    ("shapes", "cifar-nano", {}, {},
     SHORT | dict(epochs=3, batch_size=64, lr=3e-3, warmup=0.25, micro_batch=64)),
    ("cifar10", "cifar-nano", {}, {},
     SHORT | dict(epochs=5, batch_size=128, lr=2e-3, warmup=0.05, augment="flip")),
    ("cifar100", "cifar-nano", {"epochs": 9}, {}, {"augment": "flip"}),
    ("cifar10", "cifar-nano", {"epochs": 10}, {}, {"augment": "light"}),
    ("cifar100", "cifar", {}, {}, LONG | dict(batch_size=256, lr=1e-3, warmup=0.05)),
    ("cifar10", "cifar", {"epochs": 59}, {}, {"augment": "light", "mixed": 0}),
    ("cifar10", "cifar", {"epochs": 60}, {}, {"augment": "strong", "mixed": 0}),
    ("shapes", "cifar", {"epochs": 99}, {}, {"augment": "strong", "mixed": 0}),
    ("shapes", "cifar", {"epochs": 100}, {}, {"augment": "strong", "mixed": 0.9}),
    ("imagenet", "dat-t", {}, {"world": 16}, {"batch_size": 1024, "micro_batch": 64}),
    ("imagenet", "dat-t", {"batch_size": 1000}, {}, {"micro_batch": 125}),
    ("imagenet", "dat-t", {"micro_batch": 32}, {"world": 2}, {"micro_batch": 32}),
    ("shapes", "cifar-nano", {"batch_size": 4096}, {"world": 2}, {"micro_batch": 1024})])
def test_recipes_are_what_suits_the_data(data, model, given, setting, expected):
    """Red if a number is not the release's or the results', or a micro-batch is too large."""
    given = {"model": model, "dtype": "float32"} | given
    recipe = asdict(dat.recipe_for(data, given, **setting))
    assert {name: recipe[name] for name in expected} == pytest.approx(expected)
    assert (recipe["data"], recipe["model"], recipe["dtype"]) == (data, model, "float32")


@example(updates=100, warmup=0, peak=1.0, floor=0.07)
@given(updates=st.integers(1, 500), warmup=st.sampled_from([0, 0.01, 0.2, 0.6, 0.9]),
       peak=st.floats(1e-6, 1), floor=st.sampled_from([0.01, 0.07, 0.5]))
def test_learning_rate_is_a_line_up_and_half_a_cosine_down(updates, warmup, peak, floor):
    """[D8] Red if warm-up, floor or peak is ignored, or the fall is no cosine."""
    warm = max(int(updates * warmup), min(50, updates // 4)) if warmup else 0
    rates = [dat.learning_rate(update, updates=updates, warmup=warmup, peak=peak, floor=floor)
             for update in range(updates)]
    rising = np.linspace(floor / 10, 1, warm + 1)[:-1]
    turn = np.linspace(0, np.pi, updates - warm + 1)[:-1]
    falling = floor + (1 - floor) * np.cos(turn / 2) ** 2
    close(rates, peak * np.concatenate([rising, falling]), 1e-12)


# ======== the loop, written a second time
ODD = Recipe(data="shapes", model="cifar-nano", epochs=2, batch_size=8, micro_batch=4, lr=4e-3,
             warmup=0.3, floor=0.07, clip=2.5, weight_decay=0.3, augment="light", mixed=0.9,
             dtype="float32", seed=15)
ODD_RATES = [0.004 * (0.007 + 0.993 * i / 3) for i in range(3)]  # 3 of 10 updates warm up
ODD_RATES += [0.004 * (0.07 + 0.93 * (0.5 + 0.5 * math.cos(math.pi * i / 7))) for i in range(7)]


def mixed_by_hand(images, targets):
    """MixUp or CutMix, each for half of the micro-batches, with their own draws in order."""
    use_cutmix = bool(torch.multinomial(torch.tensor([0.5, 0.5]), 1))
    alpha = torch.tensor(1.0 if use_cutmix else 0.8)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    other = torch.full((32, 32), 1 - share)  # how much of each pixel is another image's
    if use_cutmix:
        x, y = int(torch.randint(32, (1,))), int(torch.randint(32, (1,)))
        half = int(0.5 * math.sqrt(1 - share) * 32)
        other = torch.zeros(32, 32)
        other[max(y - half, 0):y + half, max(x - half, 0):x + half] = 1
    images = (1 - other) * images + other * images.roll(1, 0)
    return images, (1 - other.mean()) * targets + other.mean() * targets.roll(1, 0)


def muon_by_hand(matrix, mean, rate):
    """A step of Muon through the singular values: each, s, becomes p(s) five times."""
    mean += 0.05 * (matrix.grad - mean)
    u, s, v = torch.linalg.svd(0.05 * matrix.grad + 0.95 * mean, full_matrices=False)
    s = s / math.sqrt(float(s.square().sum()))
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
    factor = 2 * rate * 0.2 * math.sqrt(max(matrix.shape))
    matrix.data = (1 - 2 * rate * 0.3) * matrix.data - factor * (u * s) @ v


def reference_run(recipe, count=42):
    """Two epochs of training, slowly. Returns the model, the losses and the gradients' norms."""
    torch.manual_seed(recipe.seed)
    model = DAT(replace(dat.VARIANTS["cifar-nano"], classes=8, image_size=32)).train()
    images, _ = dat.load_dataset("shapes", None, "train")
    transform = dat.transform_for("shapes", 32, "light")
    means = {name: torch.zeros_like(value) for name, value in model.named_parameters()
             if recipe.optimizer == "muon" and "blocks" in name and value.ndim == 2}
    optimizer = torch.optim.AdamW([
        {"params": value, "weight_decay": 0.3 * (name.endswith("weight") and "norm" not in name)}
        for name, value in model.named_parameters() if name not in means],
        betas=(0.9, 0.999), eps=1e-8, foreach=False)
    losses, norms = [], []
    for update in range(10):
        epoch, step = divmod(update, 5)
        rng = torch.Generator().manual_seed(dat.seed_of("order", recipe.seed, epoch))
        batch = torch.randperm(count, generator=rng)[8 * step:8 * step + 8].view(2, 4).tolist()
        model.zero_grad()
        losses.append(0.0)
        for half, places in enumerate(batch):
            inputs, targets = [], torch.eye(8)[images[places][1]]
            for i in places:
                torch.manual_seed(dat.seed_of("image", recipe.seed, epoch * count + i))
                inputs.append(transform(images[i][0]))
            inputs = torch.stack(inputs)
            torch.manual_seed(dat.seed_of("update", recipe.seed, update, half))
            if update < 9:  # 0.9 of 10
                inputs, targets = mixed_by_hand(inputs, targets)
            targets = 0.9 * targets + 0.1 / 8
            loss = -(targets * model(inputs).log_softmax(1)).sum() / 4
            (loss / 2).backward()
            losses[-1] += loss.item() / 2
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
        for parameter in model.parameters():
            parameter.grad *= min(1, recipe.clip / (norms[-1] + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = ODD_RATES[update]
        optimizer.step()
        for name, mean in means.items():
            muon_by_hand(model.get_parameter(name), mean, ODD_RATES[update])
    return model, losses, norms


@pytest.fixture(scope="module", params=["adamw", "muon"])
def twice(tmp_path_factory, request):
    """The run ODD by the command line, and by hand; in float64."""
    recipe = replace(ODD, optimizer=request.param)
    patch, transform_for = pytest.MonkeyPatch(), dat.transform_for
    patch.chdir(tmp_path_factory.mktemp("twice"))
    shrink(patch, train=42)
    patch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, drop_path=0.5))
    patch.setattr(dat, "recipe_for", lambda *_, **__: recipe)
    patch.setattr(dat, "transform_for", lambda *a: v2.Compose([
        transform_for(*a), v2.ToDtype(torch.float64)]))
    torch.set_default_dtype(torch.float64)
    try:
        succeed("--train shapes --device cpu --out o")
        return saved("o"), *reference_run(recipe)
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()


def test_a_run_ends_at_the_weights_of_the_run_by_hand(twice):
    """Red for a slip in order, transform, mixing, drop path, smoothing, clipping, rate or decay."""
    checkpoint, model, _, norms = twice
    assert min(norms) < 0.8 * ODD.clip and max(norms) > 1.25 * ODD.clip  # so that it sees clipping
    for name, value in model.state_dict().items():
        close(checkpoint["model"][name], value, 1e-7)


def test_the_history_holds_the_mean_loss_of_each_epoch(twice):
    """Red if a loss is a sum, of the last update, or of one micro-batch."""
    checkpoint, _, losses, _ = twice
    expected = [(1, sum(losses[:5]) / 5), (2, sum(losses[5:]) / 5)]
    close([(row["epoch"], row["loss"]) for row in checkpoint["history"]], expected, 1e-7)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (6, 6)])
def test_muon_takes_the_steps_of_torchs(shape):
    """Red if momentum, the orthogonal step, its size or decay differ by more than the rounding of
    torch.optim.Muon, which multiplies in bfloat16."""
    ours, theirs = (torch.nn.Parameter(random_input(*shape).float()) for _ in range(2))
    optimizers = [dat.Muon([ours], 0.1),
                  torch.optim.Muon([theirs], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    optimizers[0].param_groups[0]["lr"] = 0.05
    optimizers[1].param_groups[0]["lr"] = 0.1
    for update in range(3):
        ours.grad = theirs.grad = random_input(*shape, seed=update).float()
        for optimizer in optimizers:
            optimizer.step()
    close(ours, theirs, 0.01)


# ======== the loop
@pytest.mark.parametrize("device", DEVICES)
def test_training_learns_reports_and_saves(tiny, device):
    """Red if nothing is learned, metrics are lost, or what runs is hidden."""
    out = succeed(f"--train shapes --device {device} --batch-size 17 --lr 1e-2 --epochs 8 --out o")
    for words in ("85 images to train", "17 to test", "parameters", f"1 x {device}", "into o/",
                  "epochs=8", "batch_size=17", "micro_batch=17", "lr=0.01"):
        assert words in out
    losses = [epoch["loss"] for epoch in saved("o")["history"]]
    assert losses[-1] < losses[0] - 0.1 and len(losses) == 8
    rows = [line.split(",") for line in Path("o/metrics.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "loss", "top1", "top5", "seconds"]
    assert [(int(row[0]), float(row[1])) for row in rows[1:]] == list(enumerate(losses, 1))


@pytest.mark.parametrize("flag", ["float32", "bfloat16"])
def test_the_type_of_a_run_is_used_in_training_and_test(tiny, monkeypatch, flag):
    """Red if --dtype is ignored, or --eval computes in another type than the run."""
    seen, forward = [], DAT.forward
    def record_type(self, images):
        logits = forward(self, images)
        seen.append(str(logits.dtype))
        return logits
    monkeypatch.setattr(DAT, "forward", record_type)
    succeed(f"{RUN} --epochs 1 --batch-size 40 --out o --dtype {flag}")
    assert flag in succeed(TEST + "o/last.pt")
    assert seen == [f"torch.{flag}"] * 4


def test_strong_recipes_reach_the_images(tiny, monkeypatch):
    """Red if the word "augment" of a recipe is not what images get, or tests get it too."""
    words, transform_for = [], dat.transform_for
    monkeypatch.setattr(dat, "transform_for", lambda *a: words.append(a[2]) or transform_for(*a))
    for epochs in (59, 60):
        interrupt(f"{RUN} --epochs {epochs}", number=1)
    assert words == ["light", "none", "strong", "none"]


def test_compile_reaches_what_is_trained(tiny, monkeypatch):
    """Red if --compile is dropped, or what torch.compile returns is not used."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda images: stop())
    succeed(RUN + "--epochs 1")
    assert run_cli(RUN + "--epochs 1 --compile")[0] == 130


def test_progress_shows_where_the_run_is(tiny, monkeypatch):
    """Red if a number of the line every ten seconds is wrong."""
    now, rate, evaluate = [0.0], dat.learning_rate, dat.evaluate
    def tick(function, seconds):
        def slow(*args, **options):
            now[0] += seconds
            return function(*args, **options)
        return slow
    monkeypatch.setattr(dat, "learning_rate", tick(rate, 5.5))  # each update, of 20 images
    monkeypatch.setattr(dat, "evaluate", tick(evaluate, 5.5 / 20 * 17 / 3))  # a third, of 17
    monkeypatch.setattr(dat, "time", SimpleNamespace(monotonic=lambda: now[0]))
    out = interrupt(RUN + "--epochs 1000 --lr 1e-2 --out o")
    lines = re.findall(r"epoch (\d)/1000  update (\d)/4  loss (\S+)  lr (\S+)  (\S+) images/s  "
                       r"(\d+):(\d\d):(\d\d) left", out)
    assert [line[:2] for line in lines] == [("1", "2"), ("1", "4"), ("2", "2"), ("2", "4")]
    for i, (_, _, _, shown, speed, hours, minutes, seconds) in enumerate(lines):
        expected = rate(2 * i + 1, updates=4000, peak=0.01, warmup=0.25, floor=0.01)
        assert float(shown) == pytest.approx(expected, rel=0.06)
        assert speed == "4"  # 40 images in 11 s; with the test's seconds it would be 3
        left = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
        assert 1.06 < left / (5.5 * (3998 - 2 * i)) < 1.08  # the tests take time as well: 17/3/80
    loss = (float(lines[0][2]) + float(lines[1][2])) / 2
    assert loss == pytest.approx(saved("o")["history"][0]["loss"], abs=1e-3)


def test_a_run_ends_with_accuracy_file_and_a_command_that_runs(tiny):
    """Red if the end of a run is silent, its command fails, or its folder is an earlier run's."""
    Path("runs/shapes-1").mkdir(parents=True)
    out = succeed(RUN + "--epochs 1")
    assert "runs/shapes-2/last.pt" in out
    assert re.findall(r"top-1 [\d.]+%, top-5 [\d.]+%", out)[-1] in succeed(printed_command(out))


def test_a_mistake_of_our_own_keeps_its_traceback(tiny, monkeypatch):
    """Red if a broken shape is told as if the user had made a mistake."""
    monkeypatch.setattr(DeformableAttention, "forward", lambda self, x: x @ x)
    with pytest.raises(RuntimeError):
        run_cli(RUN + "--epochs 1")


# ======== evaluation
def test_accuracies_count_every_test_image(monkeypatch):
    """Red if a batch is left out, drop path is on, or top-1 and top-5 are not what they say."""
    shrink(monkeypatch, train=20, test=250)
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, drop_path=0.9))
    out = succeed(RUN + "--epochs 1 --lr 1e-2 --out o")
    model = DAT(DATConfig(**saved("o")["config"])).eval()
    model.load_state_dict(saved("o")["model"])
    images, labels, _ = dat.make_shapes(2_000, seed=0)
    logits = model((images / 255 - 0.5) / 0.25)
    likelier = (logits > logits.gather(1, labels[:, None])).sum(1)  # classes before the true one
    top1, top5 = ((likelier < n).double().mean().item() for n in (1, 5))
    assert 0 < top1 < top5 < 1
    [row] = saved("o")["history"]
    close([row["top1"], row["top5"]], [top1, top5], 1e-7)
    words = f"top-1 {top1:.2%}, top-5 {top5:.2%}"
    assert words in out
    line = f"cifar-nano of o/last.pt in float32 on 250 images of shapes: {words}"
    assert line in succeed(TEST + "o/last.pt")


def test_a_long_test_shows_progress(trained, monkeypatch):
    """Red if minutes of --eval pass without a line."""
    clock = itertools.count(0, 20)
    monkeypatch.setattr(dat, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert re.search("tested 100%.*\n.*top-1", succeed(TEST + "o/last.pt"))


# ======== processes
@pytest.mark.parametrize("resume, test_images, folder", [
    (True, 17, "two"), (False, 1, "runs/shapes-1")])
def test_two_processes_do_what_one_does(start, monkeypatch, resume, test_images, folder):
    """Red if gradients are summed, an image counts twice, draws differ, micro-batches are shared
    unequally, process 0 alone loads the checkpoint, or one without a test image breaks off."""
    shrink(monkeypatch, test=test_images)
    run = RUN + "--epochs 2 --micro-batch 5 --lr 3e-4 "
    succeed(run + "--out one")
    if resume:
        interrupt(run + "--out two")
    processes = start(RUN + "--resume --out two" if resume else run, 2, test_images)
    for process in processes:
        process.join(60)
    out, silent = Path("0.log").read_text(), Path("1.log").read_text()
    assert [process.exitcode for process in processes] == [0, 0], out
    assert "strides" not in out + silent  # a warning of DistributedDataParallel
    assert "2 x cpu" in out and len(re.findall("epoch 2/2 .*top-1", out)) == 1
    assert "top-1" not in silent
    assert f"--checkpoint {folder}/last.pt" in printed_command(out, "torchrun --nproc-per-node 2")
    assert_same_run("one", folder, 1e-5)
    assert len(list(Path().rglob("last.pt"))) == 2 and not Path("runs/shapes-2").exists()


def test_a_batch_must_split_between_all_processes(tiny, monkeypatch):
    """Red if what one process could do is allowed for two, which would then train on nothing."""
    monkeypatch.setattr(dat, "start_machine", lambda _: dat.Machine(torch.device("cpu"), world=2))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    assert_input_error(RUN + "--micro-batch 20", "--micro-batch 20 in each of 2 processes")


def test_a_mistake_in_process_0_ends_all(start):
    """Red if the other processes wait for what never comes."""
    Path("mine").touch()
    one, other = start(RUN + "--epochs 1 --out mine/below", world=2)
    one.join(60)
    other.join(60)
    assert one.exitcode == 2 and other.exitcode not in (0, None)
    assert "mine/below" in Path("0.log").read_text()


def test_a_process_takes_the_gpu_of_its_place_in_the_machine(tiny, monkeypatch):
    """Red if process 5 of a cluster, the second of its machine, asks for GPU 5."""
    chosen = []
    for name, value in zip(CLUSTER, ("5", "1", "8", "4", "here", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device) or stop())
    assert run_cli("--train shapes --device cuda")[0] == 130
    assert torch.device("cuda", chosen[0]) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert_input_error("--train shapes --device cuda", "GPU", "--nproc-per-node")


def test_a_variable_of_a_cluster_alone_is_no_second_process(tiny, monkeypatch):
    """Red if WORLD_SIZE without the others stops a run, or makes it wait."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert "1 x cpu" in succeed(RUN + "--epochs 1")


# ======== checkpoints
@pytest.mark.parametrize("where, number", [("evaluate", 2), ("learning_rate", 4), ("save", 2)])
def test_an_interrupted_run_resumes_exactly(folder, where, number):
    """Red if anything random needs what is not saved, or Ctrl-C names a command that fails."""
    succeed(PHOTOS + "--epochs 3 --seed 5 --out whole")
    out = interrupt(PHOTOS + "--epochs 3 --seed 5 --out o", where, number)
    succeed(printed_command(out) + " --workers 2")
    assert_same_run("whole", "o")


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_stopped_from_outside_resumes_exactly(start, sent, code):
    """Red if kill -9 leaves what cannot be resumed, or Ctrl-C ends in a traceback."""
    [process] = start(RUN + "--epochs 12 --out o")
    while process.is_alive() and not Path("o/last.pt").exists():
        time.sleep(0.005)
    os.kill(process.pid, sent)
    process.join(60)
    assert process.exitcode == code and "Traceback" not in Path("0.log").read_text()
    assert 0 < len(saved("o")["history"]) < 12
    succeed(RUN + "--epochs 12 --out whole")
    succeed(RUN + "--resume --out o")
    assert_same_run("whole", "o")
    assert sorted(os.listdir("o")) == ["last.pt", "metrics.csv"]


def test_before_the_first_epoch_nothing_is_saved_and_that_is_told(tiny):
    """Red if Ctrl-C names a command that cannot work, or --resume fails without a reason."""
    out = interrupt(RUN + "--out o", number=1)
    assert "nothing is saved" in out and "--resume" not in out
    assert_input_error(RUN + "--resume --out o", "o", "saved", "no epoch")


def test_resuming_a_finished_run_says_so(trained):
    """Red if it ends without a word, or trains on."""
    before = Path("o/last.pt").read_bytes()
    assert re.search("finished.* o/last.pt", succeed(RUN + "--resume --dtype auto --out o"))
    assert Path("o/last.pt").read_bytes() == before


@pytest.mark.parametrize("flags, words", [
    ("--epochs 3", "--epochs 1"), ("--lr 5e-4", "--lr"), ("--seed 1", "--seed 0"),
    ("--batch-size 10", "--batch-size 20"), ("--model cifar", "--model cifar-nano"),
    ("--micro-batch 10", "--micro-batch 20"), ("--dtype bfloat16", "--dtype float32"),
    ("--train cifar10", "shapes")])
def test_resuming_something_else_is_refused_by_name(trained, monkeypatch, flags, words):
    """Red if --resume mixes two runs, or downloads data before it says so."""
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    assert_input_error(f"--train shapes --out o --resume {flags}", "o/last.pt", words)


def test_resuming_with_other_classes_is_refused(trained, monkeypatch):
    """Red if a folder whose classes have changed trains the head of others."""
    names = tuple(reversed(dat.SHAPES))
    monkeypatch.setattr(dat, "SHAPES", names)
    assert_input_error("--train shapes --out o --resume", "o is for other classes")


@pytest.mark.parametrize("action", [
    lambda loss: loss * math.nan, lambda loss: loss + (0 * loss).sqrt()], ids=["loss", "gradient"])
def test_a_value_that_is_not_finite_stops_the_run(tiny, monkeypatch, action):
    """Red if a diverged run goes on, or is saved after the last update of an epoch."""
    on_call(8, F, "cross_entropy", action, monkeypatch)
    assert_input_error(RUN + "--epochs 9 --out o", "epoch 2", "finite", "--lr")
    assert len(saved("o")["history"]) == 1


def test_a_full_disk_keeps_the_checkpoint_before(tiny, monkeypatch):
    """Red if a file is written in place, bytes wait in a buffer, or a copy is left."""
    sizes = []
    def full_at_the_second_file(number):  # last.pt
        sizes.append(os.fstat(number).st_size)
        if len(sizes) == 2:
            raise OSError(28, "No space left on device")
    interrupt(RUN + "--epochs 2 --out o")
    monkeypatch.setattr(os, "fsync", full_at_the_second_file)
    assert_input_error(RUN + "--resume --out o", "No space left")
    assert sorted(os.listdir("o")) == ["last.pt", "metrics.csv"]
    assert len(saved("o")["history"]) == 1
    assert sizes[0] == os.path.getsize("o/metrics.csv") > 0


def test_float16_saves_its_loss_scale(monkeypatch):
    """Red if the scaler is not saved, not loaded, or an update with infinite gradients counts."""
    shrink(monkeypatch, train=8, test=2)
    run = "--train shapes --device cpu --dtype float16 --batch-size 4 --epochs 2 --out "
    for out, go in (("whole", succeed), ("o", interrupt)):
        with monkeypatch.context() as patch:  # as if the scale was too large: it is halved
            on_call(1, F, "cross_entropy", lambda loss: loss + (0 * loss).sqrt(), patch)
            go(run + out)
    before = saved("o")
    assert before["scaler"]["scale"] == saved("whole")["scaler"]["scale"] < 65536
    assert {int(state["step"]) for state in before["optimizers"][0]["state"].values()} == {1}
    succeed("--train shapes --device cpu --resume --out o")
    assert_same_run("whole", "o")


def test_gradients_are_clipped_at_their_own_scale(monkeypatch):
    """Red if the loss scale of float16 is still in the gradients when they are clipped."""
    shrink(monkeypatch, train=4, test=2)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: norms.append(clip(*a)))
    for dtype in ("float32", "float16"):
        succeed(f"--train shapes --device cpu --dtype {dtype} --batch-size 4 --epochs 1")
    assert float(norms[1]) == pytest.approx(float(norms[0]), rel=0.05)


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path("pwned"), "x"))


ODD_FILES = {
    "empty": lambda good: b"", "half": lambda good: Path("o/last.pt").read_bytes()[:20_000],
    "text": lambda good: b"x" * 500, "code": lambda good: Payload(), "a list": lambda good: [1],
    "code inside": lambda good: good | {"model": Payload()},
    "no weights": lambda good: good | {"model": {}},
    "odd stages": lambda good: good | {"config": {"stages": 3}},
    "other patch": lambda good: good | {"config": good["config"] | {"patch": 2}},
    "other classes": lambda good: good | {"classes": tuple("abcdefgh")}}


def test_an_authors_file_loads_with_the_settings_in_it(tiny, monkeypatch):
    """Red if their settings, of a class that is not installed, are refused or taken for ours."""
    class CfgNode(dict):
        __module__, __qualname__ = "yacs.config", "CfgNode"

    with monkeypatch.context() as context:  # only while the file is written
        context.setitem(sys.modules, "yacs", ModuleType("yacs"))
        context.setitem(sys.modules, "yacs.config", ModuleType("yacs.config"))
        sys.modules["yacs.config"].CfgNode = CfgNode
        torch.save({"model": official_state(OFFICIAL), "epoch": 300, "optimizer": {"state": {}},
                    "config": CfgNode(MODEL=CfgNode(NAME="dat"), LR=0.1)}, "theirs.pth")
    checkpoint = dat.load_checkpoint("theirs.pth")
    assert (checkpoint["geometry"], checkpoint["config"]) == ("release", None)
    dat.load_official(checkpoint["model"], OFFICIAL)  # it takes both files and loaded weights


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_checkpoints_run_nothing_and_are_refused(trained, kind):
    """Red if a pickle is executed, or a file that does not fit ends in a traceback."""
    content = ODD_FILES[kind](trained)
    if isinstance(content, bytes):
        Path("o/last.pt").write_bytes(content)
    else:
        torch.save(content, "o/last.pt")
    assert_input_error(TEST + "o/last.pt", "o/last.pt")
    assert_input_error(RUN + "--resume --out o", "o")
    assert not Path("pwned").exists()


def test_weights_alone_are_tested_and_trained_on(trained):
    """Red if a state dict, here with DistributedDataParallel's prefix, stops either."""
    weights = trained["model"]
    torch.save({f"module.{name}": value for name, value in weights.items()}, "bare.pt")
    of_run, of_weights = (succeed(f"{TEST} {path} --dtype float32") for path in (
        "o/last.pt", "bare.pt"))
    assert of_weights == of_run.replace("o/last.pt", "bare.pt")
    succeed(RUN + "--epochs 1 --lr 1e-12 --checkpoint bare.pt --out new")
    torch.testing.assert_close(saved("new")["model"], weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize("change", [
    {"recipe": {"model": "cifar-nano"}}, {"recipe": {"model": "cifar-nano", "accumulate": 1}},
    {"optimizers": None}, {"scaler": None}, {"history": None}], ids=str)
def test_a_run_of_another_version_is_not_resumed(trained, change):
    """Red if it ends in a traceback, or goes on with other settings."""
    content = {name: value for name, value in (trained | change).items() if value is not None}
    torch.save(content, "o/last.pt")
    assert_input_error("--train shapes --resume --out o", "o/last.pt", "--checkpoint")


@pytest.mark.parametrize("classes, count, kept", [
    (dat.SHAPES, 8, True), (tuple("abcdefgh"), 8, False), (tuple("abcdefghij"), 10, False),
    (None, 10, False), (list(dat.SHAPES), 8, True)],
    ids=["same names", "other names", "other number", "state dict", "a list, as in older files"])
def test_the_names_of_classes_decide_about_the_head(trained, classes, count, kept):
    """Red if a head of other classes is kept, a fitting one is lost, or it is not told."""
    content = trained | {"classes": classes, "config": trained["config"] | {"classes": count}}
    content["model"]["head.weight"] = torch.full((count, 12), 9.0)
    content["model"]["head.bias"] = torch.zeros(count)
    torch.save(content if classes else content["model"], "start.pt")
    out = succeed(RUN + "--epochs 1 --lr 1e-12 --checkpoint start.pt --out new")
    assert (f"head: {count} -> 8 classes, starts anew" in out) != kept
    weights = saved("new")["model"]
    assert ((weights["head.weight"] - 9).abs().max() < 1e-6) == kept
    assert torch.equal(weights["norm.weight"], content["model"]["norm.weight"])


def test_fine_tuning_has_its_own_rates(folder):
    """Red if own classes get the authors' tiny rate, or their classes a large one."""
    succeed(PHOTOS + "--epochs 1 --out new")
    torch.save(saved("new") | {"classes": ("x", "y", "z")}, "others.pt")
    for out, start in (("same", "new/last.pt"), ("other", "others.pt")):
        succeed(f"{PHOTOS} --epochs 1 --checkpoint {start} --out {out}")
    rates = [saved(out)["recipe"]["lr"] for out in ("new", "same", "other")]
    assert rates == pytest.approx([5e-4 * 6 / 512, 2e-6 * 6 / 512, 2e-4])  # batches of 6


def test_fine_tuning_resizes_tables(folder, monkeypatch):
    """[D2] Red if a table is cut, or geometry or weights are lost."""
    small = dat.VARIANTS["dat-t"]
    larger = replace(small, image_size=48, stages=tuple(replace(s, window=4) for s in small.stages))
    monkeypatch.setitem(dat.VARIANTS, "dat-b-384", larger)
    source = DAT(replace(small, geometry="release"))
    old = source.state_dict()
    torch.save({"model": old, "config": asdict(source.config), "recipe": {},
                "classes": tuple("abcdefg")}, "start.pt")
    succeed(PHOTOS + "--epochs 1 --lr 1e-12 --checkpoint start.pt --model dat-b-384 --out o")
    assert DATConfig(**saved("o")["config"]) == replace(larger, geometry="release", classes=3)
    for name, value in saved("o")["model"].items():
        if name.endswith("table"):
            assert value.shape != old[name].shape
            close(value, dat.resize(old[name], value.shape[-2:]), 1e-6)
        elif not name.startswith("head"):
            close(value, old[name], 1e-6)


def test_a_checkpoint_can_be_used_elsewhere(folder):
    """Red if weights are not contiguous, which safetensors needs, or mean or deviation is wrong."""
    succeed(PHOTOS + "--epochs 1 --out o")
    assert all(value.is_contiguous() for value in saved("o")["model"].values())
    close([saved("o")["mean"], saved("o")["std"]], [MEAN, STD])


# ======== the command line
@pytest.mark.parametrize("flags, word", [
    ("--train mnist", "mnist"), ("--eval shapes", "--checkpoint"), ("--epochs 1", "--train"),
    ("--train shapes --epochs 0", "--epochs"), ("--train shapes --batch-size many", "many"),
    ("--train shapes --micro-batch 0", "--micro-batch"), ("--train shapes --lr nan", "--lr"),
    ("--train shapes --lr 0", "--lr"), ("--train shapes --workers -1", "--workers"),
    ("--train shapes --dtype float8", "float8"), ("--train shapes --seed -1", "--seed"),
    ("--train shapes --device tpu", "tpu"), ("--train shapes --eval shapes", "--eval"),
    ("--train shapes --resume", "--out"), ("--train shapes --resume --out no", "--out no"),
    ("--train shapes --float32", "--float32"), ("--train shapes --model vit", "vit"),
    ("--eval shapes --checkpoint no.pt", "no.pt"), ("--train shapes --checkpoint no.pt", "no.pt"),
    (RUN + "--batch-size 86", "--batch-size 86 is more than the 85 images"),
    (RUN + "--micro-batch 3", "--batch-size 20 is no multiple of --micro-batch 3"),
    ("--train shapes --out mine", "--out mine is not empty"), (RUN + "--out mine/x", "mine/x"),
    ("--train shapes --device cuda", "--device cuda: PyTorch finds none here; try --device cpu"),
    ("--train shapes --device mps", "--device mps: PyTorch finds none here; try --device cpu")])
def test_wrong_usage_is_one_line(flags, word, tiny, monkeypatch):
    """Red if a mistake gives a traceback or starts something."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    Path("mine").mkdir()
    Path("mine/x").touch()
    assert_input_error(flags, word)
    assert sorted(map(str, Path().rglob("*"))) == ["mine", "mine/x"]


@pytest.mark.parametrize("choice, device, multiplies, expected", [
    ("auto", "cuda", True, "bfloat16"), ("auto", "cuda", False, "float16"),
    ("auto", "mps", True, "float32"), ("float32", "cuda", True, "float32")])
def test_the_type_suits_the_hardware(monkeypatch, choice, device, multiplies, expected):
    """Red if a T4, which only emulates bfloat16, is given it, or a choice is not kept."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or multiplies)
    assert dat.dtype_for(choice, torch.device(device)) == expected


def test_every_flag_has_a_help_text():
    """Red if a flag is listed without words, or a newcomer is not told of the offline run."""
    out = succeed("--help")
    assert "--train shapes" in out and succeed("") == out
    flags = re.findall(r"^  --([\w-]+)(?: \{\S+\}| [A-Z_]+)?\s+\w+:? \w+", out, re.MULTILINE)
    assert sorted(flags) == sorted(("train eval data checkpoint out resume device workers compile "
                                    "model dtype epochs batch-size micro-batch lr seed").split())


# ======== lab
def run_lab(patch, name, flags, **small):
    """What the script lab/<name>.py prints. `small`: other values of its constants."""
    module = importlib.import_module(f"lab.{name}")
    for constant, value in small.items():
        patch.setattr(module, constant, value)
    patch.setattr(sys, "argv", [f"lab/{name}.py", *shlex.split(flags)])
    with redirect_stdout(io.StringIO()) as out:
        module.run(module.main, module.__doc__)
    return out.getvalue()


def test_inspect_shows_the_attention_that_the_block_computes():
    """Red if the bias, the scale, a group or an axis is lost in the picture's weights."""
    stage = StageConfig(dim=8, heads=4, blocks="D", groups=2, kernel=3, stride=2)
    model = randomise(DAT(DATConfig(stages=(stage,), image_size=(8, 10), patch=2)))
    [block], images = model.stages[0].blocks, random_input(1, 3, 8, 10)
    attention, [view] = block.attention, draw.inspect(model, images)
    x = block.norm1(model.embed(images))  # (1, 4, 5, 8)
    points = attention.points(attention.q(x))
    v = attention.v(attention.sample(x, points)).view(6, 4, 2).transpose(0, 1)  # (M, K, 2)
    output = (view.weights[0] @ v).transpose(0, 1).reshape(1, 4, 5, 8)
    close(attention.out(output), attention(x))
    close(view.importance[0], view.weights[0].view(2, 2, 20, 6).sum((1, 2)))
    close(view.points, 0.5 + 2 * points)
    close(view.queries, 0.5 + 2 * np.array([(y, x) for y in range(4) for x in range(5)]))
    close(view.reference[:, :, 0], 0.5 + 2 * np.array([[0] * 3, [3] * 3]))


@pytest.mark.parametrize("flags, file", [
    ("shapes:7", "o/last.pt"), ("shapes:7 --all", "o/last.pt"), ("photo.png", "o/last.pt"),
    ("shapes:0 --query 8,20 3,4", "o/last.pt"), ("shapes:7 --model cifar-nano", "bare.pt")])
def test_pictures_are_drawn(trained, monkeypatch, flags, file):
    """Red if a choice of draw.py fails, or no picture comes."""
    Image.new("RGBA", (40, 30)).save("photo.png")
    torch.save(trained["model"], "bare.pt")
    out = run_lab(monkeypatch, "draw", f"{flags} --checkpoint {file} --out a.png")
    assert "a.png" in out and flags.split()[0] in out
    assert Image.open("a.png").size > (500, 200)


def page_data(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html).group(1))


@pytest.mark.parametrize("position", ["relative", "fixed"])
def test_the_page_to_touch_holds_the_models_numbers(position):
    """Red if a point, a query, a weight or a bias of the page is another, or x stands for y."""
    stage = StageConfig(dim=8, heads=4, blocks="DD", groups=2, kernel=3, stride=2)
    config = DATConfig(stages=(stage,), image_size=(8, 10), patch=2, position=position)
    model, image = randomise(DAT(config)), dat.make_shapes(1, seed=1, side=16)[0][0][:, :8, :10]
    views = draw.inspect(model, image[None].double() / 255)
    html = explore.page(image, views, "a</script>", "x/tutorial.md")
    assert html.count("</script>") == 2
    data = page_data(html)
    assert (data["title"], data["tutorial"]) == ("a</script>", "x/tutorial.md")
    picture = base64.b64decode(data["image"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(Image.open(io.BytesIO(picture)), image.permute(1, 2, 0))
    for block, view in zip(data["blocks"], views, strict=True):
        module, z = view.attention, view.map
        points = module.points(module.q(z))
        close(block["points"], points[0].flatten(1, 2), 1e-5)
        close(block["queries"], [(y, x) for y in range(4) for x in range(5)], 1e-5)
        close(block["reference"], [(y, x) for y in (0, 3) for x in (0, 2, 4)], 1e-5)
        weights = np.frombuffer(base64.b64decode(block["attention"]), "<u2").reshape(4, 20, 6)
        close(weights / 65535, view.weights[0], 1e-5)
        assert (block["cell"], block["first"]) == (2, 0.5)
        # Equation 8 by the page's numbers, for the channel of each group that it shows.
        sampled = module.sample(z, points)[0].T  # (C, K)
        for g, (channel, values) in enumerate(zip(block["channels"], block["maps"], strict=True)):
            assert channel // 4 == g
            values, places = np.array(values)[..., None], block["points"][g]
            sums = [loops.bilinear(values, *yx)[0] for yx in places]
            close(sums, sampled[channel], 1e-4)
        if position == "relative":  # equation 9: the table, read at R + (H - 1, W - 1)
            table, R = np.array(block["tables"]), np.array(block["queries"])[:, None]
            for head in range(4):
                read = (R - np.array(block["points"][head // 2]) + [3, 4]).reshape(-1, 2)
                bias = [loops.bilinear(table[head][..., None], *yx)[0] for yx in read]
                close(bias, module.position_bias(points, (4, 5))[0, head].flatten(), 1e-4)
        else:
            assert block["tables"] is None


def test_a_page_to_touch_is_one_file(trained, monkeypatch):
    """Red if the page needs the network, another file, or is of another image."""
    out = run_lab(monkeypatch, "explore", "shapes:7 --checkpoint o/last.pt --out a.html")
    html = Path("a.html").read_text(encoding="utf-8")
    assert "a.html" in out and page_data(html)["title"].startswith("shapes:7, which")
    assert Path(page_data(html)["tutorial"]).resolve() == HERE / "tutorial.md"
    assert not re.search(r"https?:|src=|<link|@import|url\(|fetch", html)
    headings = re.findall(r"^## (.+)$", (HERE / "tutorial.md").read_text(), re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert set(re.findall(r'data-section="(.+?)"', html)) <= set(anchors)


def test_a_phones_picture_is_drawn_upright():
    """Red if the orientation is ignored: a viewer shows the picture turned."""
    pixels, exif = np.zeros((4, 8, 3), dtype=np.uint8), Image.Exif()
    pixels[:, :4] = 255  # white at the left: at the top once turned
    exif[274] = 6
    Image.fromarray(pixels).save("x.jpg", exif=exif, quality=100)
    picture = draw.load_image("x.jpg", "data", 8)
    assert picture[:, :3].min() > 200 and picture[:, 5:].max() < 50


@pytest.mark.parametrize("name, flags, word", [
    ("draw", "shapes:17 --checkpoint o/last.pt", "shapes:17"),
    ("draw", "no.png --checkpoint o/last.pt", "no.png"),
    ("explore", "no.png --checkpoint o/last.pt", "no.png"),
    ("explore", "shapes:1 --checkpoint o/last.pt --out no/where.html", "no/where.html"),
    ("bench", "--release no/where --device cpu", "no/where")])
def test_mistakes_in_lab_are_one_line(trained, monkeypatch, capsys, name, flags, word):
    """Red if what is not there ends in a traceback."""
    with pytest.raises(SystemExit, match="^2$"):
        run_lab(monkeypatch, name, flags)
    err = capsys.readouterr().err
    assert err.startswith(f"{name}.py: ") and word in err and err.count("\n") == 1


def test_the_study_measures_points_and_their_attention():
    """Red if (x, y) stands for (y, x), a weight is another point's, or "other" another image's."""
    model = DAT(study.model()).eval()
    images, labels, masks = dat.make_shapes(4, seed=1)
    images, masks = images[:, :, :20], masks[:, :20]  # 20 x 32 px
    row = study.measure(model, images, labels, masks)
    inputs, columns = (images / 255 - 0.5) / 0.25, []
    for view in draw.inspect(model, inputs):
        weights = view.importance.flatten(1).numpy()  # (4, G K)
        points = view.points.flatten(1, 3).numpy()  # (4, G K, 2)
        columns.append([((points < -0.5) | (points > [19.5, 31.5])).any(2).mean()])
        for before in (0, 1):
            maps = array(masks.roll(before, 0)[..., None].double())
            on = np.array([[loops.bilinear(z, *yx)[0] for yx in p] for z, p in zip(maps, points)])
            columns[-1] += [on.mean(), (on * weights).sum() / weights.sum()]
    names = ["outside", "on", "att", "on other", "att other"]
    close([row[name] for name in names], 100 * np.mean(columns, axis=0), 1e-3)
    assert abs(row["att"] - row["att other"]) > 0.1 and abs(row["on"] - row["att"]) > 1e-2
    correct = model(inputs).argmax(1) == labels
    assert row["accuracy"] == pytest.approx(100 * correct.float().mean().item())


@pytest.mark.parametrize("name", study.STUDIES)
def test_every_study_runs(tiny, monkeypatch, name):
    """Red if a model of a study cannot be trained, or its row is missing."""
    shrink(monkeypatch, train=4, test=4)
    recipe_for = dat.recipe_for
    monkeypatch.setattr(dat, "recipe_for", lambda *args, **options: replace(
        recipe_for(*args, **options), batch_size=4, micro_batch=4))
    sides, measure = [], study.measure
    monkeypatch.setattr(study, "measure", lambda network, images, *rest: (
        sides.append(images.shape[2]) or measure(network, images, *rest)))
    out = run_lab(monkeypatch, "study", f"{name} --epochs 1 --seeds 1", TEST_IMAGES=8)
    assert name != "sizes" or sides == [32, *study.SIDES]
    more = {"offsets": ["learned, taken out"], "sizes": [f"{side} px" for side in study.SIDES]}
    assert all(f"\n{label} | " in out for label in [*study.STUDIES[name], *more.get(name, [])])


@pytest.mark.parametrize("data", ["shapes", "cifar10", "cifar100"])
def test_optimisers_are_compared_by_their_own_runs(tiny, monkeypatch, data):
    """Red if both curves are of one optimiser, or the seconds are not summed."""
    shrink(monkeypatch, train=128, test=8)
    load_dataset = dat.load_dataset
    monkeypatch.setattr(dat, "load_dataset", lambda _, *rest: load_dataset("shapes", *rest))
    seen, make_optimizers = [], dat.make_optimizers
    monkeypatch.setattr(dat, "make_optimizers", lambda model, name, decay: (
        seen.append(name) or make_optimizers(model, name, decay)))
    out = run_lab(monkeypatch, "optimizers", f"{data} --epochs 2 --seeds 2 --data no --out a.png")
    assert seen == ["adamw", "adamw", "muon", "muon"] and Path("a.png").exists()
    assert len(re.findall(r"seed [01]:  [\d.]+% after \d+ s  [\d.]+% after \d+ s", out)) == 4


@pytest.mark.parametrize("flags", ["", "--no-offsets", "--windows --seed 3"])
def test_the_detector_trains(monkeypatch, flags):
    """Red if a choice of detect.py fails."""
    flags = f"--epochs 1 --device cpu {flags}"
    out = run_lab(monkeypatch, "detect", flags, SCENES=4, TEST_SCENES=2, BATCH=4)
    assert "AP50" in out and Path("detections.png").exists()


def test_a_detector_learns_and_its_boxes_are_in_pixels():
    """Red if the backbone, or the units of its boxes, are wrong."""
    detector = detect.make_detector(detect.CONFIG)
    optimizer, losses = torch.optim.AdamW(detector.parameters()), []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(sum(detector(*detect.make_scenes(4, 1)).values()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    boxes = detector.eval()([torch.rand(3, 96, 160)])[0]["boxes"]
    assert boxes.min() >= 0 and (boxes.amax(0) <= torch.tensor([160, 96] * 2)).all()


def test_average_precision_is_1_for_true_boxes():
    """Red if a figure that is missed does not count, or boxes are matched wrongly."""
    scenes, targets = detect.make_scenes(60, 1)
    perfect = [target | {"scores": target["labels"] + 1.0} for target in targets]
    assert detect.average_precision(perfect, targets) == pytest.approx(1)
    assert detect.average_precision(perfect[1:], targets) < 0.2


@pytest.mark.parametrize("model, flags, rows", [("cifar-nano", "--compile", 3), ("dat-t", "", 4)])
def test_the_benchmark_measures_every_task(monkeypatch, model, flags, rows):
    """Red if a task or a process fails, or small models are measured on large images."""
    size, flags = dat.VARIANTS[model].image_size, f"--model {model} --device cpu {flags}"
    monkeypatch.setitem(dat.VARIANTS, model, small_config(patch=16, image_size=size, classes=10))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    in_a_process = bench.measure
    def measure(names, task):
        if task == "product":
            return in_a_process(names, task)
        with monkeypatch.context() as patch:  # here, where the models are small
            patch.setattr(sys, "stdin", io.StringIO("\n\n"))
            lines = run_lab(patch, "bench", f"{flags} --serve ours '{task}'").splitlines()
        return {"ours": [tuple(map(float, line.split())) for line in lines]}
    out = run_lab(monkeypatch, "bench", flags, measure=measure, LARGE=256, WARM_UP=1, CALLS=1)
    assert out.count("ours") == rows
    assert ("256 px" in out) == (rows == 4)


def test_settings_are_chosen_on_images_held_out(tiny, monkeypatch):
    """Red if lab/choose.py tests on test images, or trains on those that it holds out."""
    seeds, make = [], dat.make_shapes
    monkeypatch.setattr(dat, "make_shapes", lambda count, *, seed: (
        seeds.append(seed) or make(count, seed=seed)))
    monkeypatch.setattr(dat, "load_dataset", dat.load_dataset)
    monkeypatch.setattr(sys, "argv", ["choose.py", *RUN.split(), "--epochs", "1"])
    with redirect_stdout(io.StringIO()), pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(HERE / "lab/choose.py"), run_name="__main__")
    assert sorted(seeds) == [1, 2]
    images = TensorDataset(torch.arange(12), torch.arange(12))
    monkeypatch.setattr(choose, "load_dataset", lambda name, root, split: (images, split))
    monkeypatch.setattr(choose, "CIFAR_COUNT", 5)
    for split, expected in (("train", range(7)), ("test", range(7, 12))):
        held, source = choose.load_held_out("cifar10", "data", split)
        assert [int(image) for image, _ in held] == [*expected] and source == "train"


@pytest.mark.parametrize("flags", ["", "--scratch", "--choose -- --lr 1e-3"])
def test_own_classes_start_from_a_trained_model(tiny, monkeypatch, flags):
    """Red if lab/transfer.py tests on images that it trains on, mixes up the classes, or does not
    start from the trained model (with --scratch: does)."""
    greys = {"train": torch.arange(120), "test": torch.arange(200, 240)}  # of class grey % 10
    def load(name, root, split):
        if name != "cifar10":
            return load_dataset(name, root, split)
        pixels = greys[split].to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 32, 32)
        return TensorDataset(pixels, greys[split] % 10), tuple("abcdefghij")
    load_dataset, recipe_for, train, runs = dat.load_dataset, dat.recipe_for, dat.train, []
    def recipe(*args, **options):
        return replace(recipe_for(*args, **options), epochs=1, batch_size=5, micro_batch=5)
    def record(model, train_images, test_images, *rest):
        both = [*train_images], [*test_images]
        if not runs:  # the run of the first five classes
            seen = [[int(label) for _, label in images] for images in both]
        else:
            seen = [[int(np.array(Image.open(path)).mean()) for path, _ in images]
                    for images in both]
            assert all("fghij"[label] == Path(path).parent.name for path, label in sum(both, []))
        runs.append((seen, model.stages[0].blocks[0].mlp["expand"].weight.detach().clone()))
        return train(model, train_images, test_images, *rest)
    for name, value in (("load_dataset", load), ("recipe_for", recipe)):
        monkeypatch.setattr(dat, name, value)
        monkeypatch.setattr(transfer, name, value)
    monkeypatch.setattr(dat, "train", record)
    out = run_lab(monkeypatch, "transfer", "--data no --images 10 --seeds 2 --pretrained p/last.pt "
                  + flags, HELD_OUT=20, TEST_COUNT=5)
    assert "10 images, 2 seeds: " in out and "into p/" in out
    (first, _), *others = runs
    assert {int(label) for labels in first for label in labels} == {0, 1, 2, 3, 4}
    weights = torch.load("p/last.pt")["model"]["stages.0.blocks.0.mlp.expand.weight"]
    for (train_greys, test_greys), start in others:
        assert sorted(grey % 10 for grey in train_greys) == sorted([5, 6, 7, 8, 9] * 2)
        assert len({*train_greys}) == 10 and max(train_greys) < 100
        assert sorted(grey % 10 for grey in test_greys) == [5, 6, 7, 8, 9]
        first_grey = 100 if "--choose" in flags else 200
        assert all(first_grey <= grey < first_grey + 40 for grey in test_greys)
        assert torch.equal(start, weights) == (flags != "--scratch")
    assert others[0][0][0] != others[1][0][0] and others[0][0][1] == others[1][0][1]


# ======== pages


def test_every_printed_command_runs(folder, monkeypatch):
    """Red if a page shows a command that fails, or a flag that is gone. What it needs is here in
    small: data, models, the authors' files. What takes long has its own tests above."""
    shrink(monkeypatch, train=8)
    cifar, names = TensorDataset(*dat.make_shapes(8, seed=0)[:2]), tuple("abcdefghij")
    load_dataset = dat.load_dataset
    monkeypatch.setattr(dat, "load_dataset", lambda name, root, split: (
        (cifar, names) if name.startswith("cifar") else load_dataset(name, "images", split)))
    release = replace(dat.VARIANTS["dat-t"], classes=3, geometry="release")
    for size in ("tiny", "base"):
        torch.save(DAT(release).state_dict(), f"dat_{size}_in1k_224.pth")
    monkeypatch.setitem(dat.VARIANTS, "dat-t", release)
    Image.new("RGB", (40, 30)).save("photo.jpg")
    commands = []
    for path in [*sorted(HERE.glob("*.md")), HERE / "dat.py", *sorted(HERE.glob("lab/*.py"))]:
        text = path.read_text()
        if path.suffix == ".py":
            text = text.split('"""')[1]
        commands += re.findall(r"^ *((?:python|torchrun) .+?)(?:\s+#.*)?$", text, re.MULTILINE)
    assert len(commands) > 15
    for command in commands:
        script, flags = re.search(r"(\w+)\.py ?(.*)", command.replace("DIR", "images")).groups()
        if script in ("bench", "study", "detect", "optimizers", "transfer"):
            code = (HERE / f"lab/{script}.py").read_text() + (HERE / "lab/command.py").read_text()
            for flag in re.findall(r"--[\w-]+", flags):
                assert f'"{flag}"' in code, command
        elif script in ("dat", "choose"):
            if "--train" in flags and "--resume" not in flags:
                flags += " --epochs 1 --batch-size 4 --micro-batch 2"
            code, _, err = run_cli(f"{flags} --device cpu")
            assert (code, err) == (0, ""), command
        else:
            run_lab(monkeypatch, script, flags, **{"FOLDER": Path()} if script == "figures" else {})


def test_the_readmes_code_runs():
    """Red if the lines to copy fail, or load the authors' weights into other points."""
    authors = DAT(replace(dat.VARIANTS["dat-t"], geometry="release"))
    torch.save({"model": authors.state_dict()}, "dat_tiny_in1k_224.pth")
    text, names = (HERE / "README.md").read_text(), {}
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 1000) and names["model"].config.geometry == "release"
    assert torch.equal(names["model"].head.weight, authors.head.weight)


def tutorial_blocks(language):
    text = (HERE / "tutorial.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)


def test_the_tutorial_prints_what_it_shows():
    """Red if a Python block fails or prints something else."""
    namespace = {}
    try:
        for code, expected in tutorial_blocks("python"):
            with redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "tutorial.md", "exec"), namespace)
            assert out.getvalue() == expected, code
    finally:
        torch.set_printoptions(profile="default", sci_mode=None)


def test_the_tutorial_quotes_the_code_as_it_is():
    """Red if a quoted line of dat.py has changed there."""
    code, quotes = (HERE / "dat.py").read_text(), tutorial_blocks("py")
    assert len(quotes) > 5
    assert all(quote in code for quote, _ in quotes)


def test_the_loops_share_no_code_with_the_model():
    """Red if the reference imports anything but numpy and math."""
    code = (HERE / "reference_numpy.py").read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)) == {"numpy", "math"}


def test_requirements_are_the_same_everywhere():
    """Red if requirements.txt and dat.py's metadata (PEP 723) drift apart."""
    header = re.search(r"# dependencies = \[(.*?)\]", (HERE / "dat.py").read_text()).group(1)
    assert re.findall(r'"(.+?)"', header) == (HERE / "requirements.txt").read_text().split()


@pytest.mark.parametrize("file", ["tutorial.md", "test_dat.py"])
def test_every_departure_is_explained_and_pinned(file):
    """Red if a tag of dat.py is missing from the tutorial or these tests."""
    tags = re.findall(r"^    (\[D\d+\])", dat.__doc__, re.MULTILINE)
    text = (HERE / file).read_text()
    assert len(tags) == 8 and [tag for tag in tags if tag not in text] == []
