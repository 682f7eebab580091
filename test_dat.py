"""Properties of dat.py, and parity with the loops of reference_numpy.py. Run with: pytest

Each test's name is a claim; its docstring says which mistake turns it red. Parity is in float64
with a tolerance of 1e-9: both sides round differently, at about 1e-13 for values near one. All of
it runs on the CPU, also where there is a GPU.
"""
import ast
import contextlib
import functools
import hashlib
import http.client
import importlib.util
import io
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""                            # before torch looks for GPUs
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dat
import reference_numpy as loops
from dat import DAT, DATConfig, DeformableAttention, StageConfig, WindowAttention

settings.register_profile("dat", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dat")
HERE = Path(__file__).parent
sizes = st.integers(1, 9)
geometries = st.sampled_from(["paper", "release"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def heeded_interrupts():
    """A shell's background jobs ignore Ctrl-C, and so would the programs started here."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# ============================================================ helpers


def randomise(module, seed=0):
    """Float64 weights of order one everywhere, so that no term of a formula is negligible."""
    generator = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("table"):
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module


def random_input(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def small_config(**changes):
    """Every kind of block, r = 1 and 2, G < M, in two stages that take milliseconds."""
    stages = (StageConfig(dim=8, heads=2, blocks="LSD", window=3, groups=1, stride=2, kernel=3),
              StageConfig(dim=12, heads=4, blocks="LD", window=2, groups=2, kernel=5))
    return DATConfig(**{"stages": stages, "image_size": 16, "patch": 2, "classes": 5, **changes})


def small_attention(**changes):
    return randomise(DeformableAttention(
        **{"dim": 8, "heads": 4, "groups": 2, "size": (4, 5), "kernel": 3, **changes}))


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def run_cli(*arguments):
    """Exit code, standard output and standard error of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = dat.main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def assert_input_error(result, *words):
    """Exit code 2 and one line on standard error that holds all `words`."""
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, result
    for word in words:
        assert str(word) in err, err


# ============================================================ parity with the loops


@settings(max_examples=60)
@example(H=3, W=2, window=7, heads=1, shifted=True)                 # no cut, and nothing to roll
@given(H=sizes, W=sizes, window=st.integers(1, 7), heads=st.sampled_from([1, 2]),
       shifted=st.booleans())
def test_window_attention_equals_the_loops(H, W, window, heads, shifted):
    """Red if padding leaks, cuts are misplaced, q and k swap in the bias, or y and x do."""
    shift = math.ceil(window / 2) if shifted else 0
    attention = randomise(WindowAttention(dim=4, heads=heads, window=window, shift=shift))
    x = random_input(2, H, W, 4)
    for image, out in zip(x, attention(x).detach()):
        close(out, loops.window_attention(image.numpy(), arrays(attention), heads, window, shift))


@settings(max_examples=80)
@given(H=sizes, W=sizes, size=st.tuples(sizes, sizes), r=st.sampled_from([1, 2, 3]),
       kernel=st.sampled_from([1, 3, 5]), s=st.sampled_from([0.5, 2.0, 5.0]), geometry=geometries,
       heads_groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
       offsets=st.booleans(), position=st.sampled_from(dat.CHOICES["position"]))
def test_deformable_attention_equals_the_loops(H, W, size, r, kernel, s, geometry, heads_groups,
                                               offsets, position):
    """Red for any slip in eq. 6-9: swapped axes, a wrong bound, group, head or table index."""
    heads, groups = heads_groups
    attention = randomise(DeformableAttention(
        dim=8, heads=heads, groups=groups, size=size, stride=r, kernel=kernel, offset_range=s,
        geometry=geometry, offsets=offsets, position=position))
    x = random_input(2, H, W, 8)
    outs, points = attention(x).detach(), attention.points(attention.q(x)).detach()
    for image, out, where in zip(x.numpy(), outs, points):
        expected, expected_points = loops.deformable_attention(
            image, arrays(attention), heads, groups, r, kernel, s, geometry, offsets, position)
        close(where, expected_points)
        close(out, expected)


NETWORKS = {
    "paper": (small_config(), (16, 16)),
    "release": (small_config(geometry="release"), (16, 16)),
    "one size up, H != W": (small_config(), (18, 13)),
    "one size down, odd": (small_config(geometry="release"), (11, 7)),
    "configured H != W": (small_config(image_size=(12, 20)), (12, 20)),
    "one pixel": (small_config(), (1, 1)),
    "conv stem, patch 1": (small_config(stem="conv", patch=1, image_size=8), (9, 6)),
    "conv stem, patch 2": (small_config(stem="conv", image_size=13), (13, 16)),
    "conv stem, patch 4": (small_config(stem="conv", patch=4), (17, 23)),
    "patch 3": (small_config(patch=3, mlp_ratio=1.5), (17, 22)),
    "no offsets": (small_config(offsets=False), (16, 12)),
    "fixed positions": (small_config(position="fixed"), (12, 16)),
    "no positions": (small_config(position="none"), (16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network_equals_the_loops(name):
    """Red if any step from image to logits, features or points departs from the paper."""
    config, size = NETWORKS[name]
    model, images = randomise(DAT(config)), random_input(2, 3, *size)
    state, plain = arrays(model), asdict(config)
    with torch.no_grad():
        close(model(images), loops.network(images.numpy(), state, plain))
        features = model.features(images)
        expected = loops.network_features(images.numpy(), state, plain)
        assert [f.shape for f in features] == [e.shape for e in expected]
        for ours, theirs in zip(features, expected):
            close(ours, theirs)
        found = model.sampling_points(images)
    stage_of_block = [i for i, s in enumerate(config.stages) for _ in range(s.blocks.count("D"))]
    expected = loops.network_points(images.numpy(), state, plain)
    assert len(found) == len(expected) == len(stage_of_block)
    for i, ours, theirs in zip(stage_of_block, found, expected):
        cell = config.patch * 2 ** i
        first = (cell - 1) / 2 if config.stem == "patch" else 0
        close(ours, first + cell * theirs)


@pytest.mark.parametrize("geometry", ["paper", "release"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_equal_differences_of_the_loops(geometry, stride):
    """Red if a detach, an in-place change or a wrong formula breaks a gradient: along a random
    direction of input and weights, autograd equals a central difference of the loops."""
    attention = small_attention(stride=stride, geometry=geometry)
    x = random_input(1, 5, 4, 8).requires_grad_()
    weights, steps = random_input(5, 4, 8, seed=2), {}
    points = attention.points(attention.q(x))
    queries = torch.cartesian_prod(*(dat.cell_centres(n, n, geometry=geometry, like=points)
                                     for n in (5, 4)))
    for position in (points, queries[:, None, None] - points.flatten(2, 3)[:, :, None, :, None]):
        assert (position - position.round()).abs().min() > 1e-4     # bilinear kinks are far enough
    (attention(x)[0] * weights).sum().backward()
    slope = 0.0
    for i, (name, tensor) in enumerate([*attention.named_parameters(), ("x", x)]):
        steps[name] = random_input(*tensor.shape, seed=10 + i)
        slope += float((tensor.grad * steps[name]).sum())

    def value(t):
        state = {name: array + t * steps[name].numpy() for name, array in arrays(attention).items()}
        out, _ = loops.deformable_attention((x[0].detach() + t * steps["x"][0]).numpy(), state, 4,
                                            2, stride, 3, 2.0, geometry)
        return (out * weights.numpy()).sum()

    close(slope, (value(1e-6) - value(-1e-6)) / 2e-6, tolerance=1e-6 * abs(slope))


def test_network_gradients_equal_differences_of_the_loops():
    """Red if a gradient is lost or doubled anywhere between the image and the logits."""
    config = small_config()
    model, images = randomise(DAT(config)), random_input(1, 3, 10, 12).requires_grad_()
    weights, steps, slope = random_input(5, seed=2), {}, 0.0
    (model(images)[0] * weights).sum().backward()
    for i, (name, tensor) in enumerate([*model.named_parameters(), ("images", images)]):
        steps[name] = random_input(*tensor.shape, seed=10 + i)
        slope += float((tensor.grad * steps[name]).sum())

    def value(t):
        state = {name: array + t * steps[name].numpy() for name, array in arrays(model).items()}
        moved = (images.detach() + t * steps["images"]).numpy()
        return (loops.network(moved, state, asdict(config))[0] * weights.numpy()).sum()

    close(slope, (value(1e-7) - value(-1e-7)) / 2e-7, tolerance=1e-5 * abs(slope))


# ============================================================ coordinates, sampling, offsets


@given(H=sizes, W=sizes)
def test_sampling_at_the_cells_themselves_is_the_identity(H, W):
    """[D1] Red if y and x are swapped, if H and W are mixed up, or if align_corners is wrong."""
    maps = random_input(2, 3, H, W)
    grid = torch.cartesian_prod(*(dat.cell_centres(n, n, geometry="paper", like=maps)
                                  for n in (H, W))).view(H, W, 2)
    close(dat.bilinear_sample(maps, grid.expand(2, H, W, 2)), maps, 1e-12)


@given(H=sizes, W=sizes, y=st.floats(-3, 11), x=st.floats(-3, 11))
def test_sampling_follows_equation_8(H, W, y, x):
    """Red if a point off the map reads anything but zeros, or between pixels not the tent mix."""
    maps, point = random_input(1, 3, H, W), torch.tensor([y, x], dtype=torch.float64)
    expected = loops.bilinear(maps[0].permute(1, 2, 0).numpy(), y, x)
    close(dat.bilinear_sample(maps, point.view(1, 1, 1, 2)).flatten(), expected)


@given(n=sizes, extra=st.integers(0, 5))
def test_reference_points_are_centred_and_inside(n, extra):
    """Red if a grid is off-centre: a fixed shift, (n) for (n - 1), an end left out."""
    length, like = n + extra, torch.zeros((), dtype=torch.float64)
    for geometry in ("paper", "release"):
        centres = dat.cell_centres(n, length, geometry=geometry, like=like)
        close(centres + centres.flip(0), np.full(n, length - 1.0), 1e-12)
        assert centres.min() >= 0 and centres.max() <= length - 1
    if n > 1:
        paper = dat.cell_centres(n, length, geometry="paper", like=like)
        assert paper[0] == 0 and paper[-1] == length - 1


@given(H=sizes, W=sizes, r=st.sampled_from([1, 2]), s=st.floats(0.1, 9), geometry=geometries)
def test_offsets_reach_their_bound_and_no_further(H, W, r, s, geometry):
    """Red if s loses its half, if H / n turns into W / n, or if tanh is missing: driven hard, the
    points stand exactly s / 2 cells from their reference."""
    attention = small_attention(stride=r, offset_range=s, geometry=geometry)
    with torch.no_grad():
        attention.offset.out.weight.mul_(1e6)
    q = random_input(1, H, W, 8)
    moved = attention.points(q).detach()
    attention.offset = None
    offset = (moved - attention.points(q)).abs().numpy()
    for axis, length in enumerate((H, W)):
        cells = math.ceil(length / r)
        bound = s / 2 * (length if geometry == "paper" else length - 1) / cells
        assert offset[..., axis].max() <= bound * (1 + 1e-12)
        close(np.median(offset[..., axis]), bound, 1e-9)


@given(H=sizes, W=sizes, heads=st.sampled_from([1, 2, 4]))
def test_zero_offsets_give_plain_attention_with_a_swin_bias(H, W, heads):
    """[D1] Red if a zero offset blurs, or if a bias is read anywhere but at q - k: the block
    equals global attention with the integer table lookup of Swin, written out here."""
    attention = randomise(DeformableAttention(dim=8, heads=heads, groups=1, size=(H, W), kernel=3))
    with torch.no_grad():
        attention.offset.out.weight.zero_()
    x = random_input(2, H, W, 8)
    q, k, v = (F.linear(x.flatten(1, 2), layer.weight, layer.bias).unflatten(2, (heads, -1))
               for layer in (attention.q, attention.k, attention.v))
    y, x_ = np.divmod(np.arange(H * W), W)
    bias = attention.table[:, y[:, None] - y + H - 1, x_[:, None] - x_ + W - 1]
    scores = torch.einsum("bqmd,bkmd->bmqk", q, k) / math.sqrt(8 // heads) + bias
    plain = torch.einsum("bmqk,bkmd->bqmd", scores.softmax(-1), v).reshape(2, H, W, 8)
    close(attention(x).detach(), attention.out(plain).detach(), 1e-10)


def test_release_geometry_blurs_at_zero_offset():
    """[D1] Red if the release's geometry silently becomes the paper's."""
    like = torch.zeros((), dtype=torch.float64)
    release = dat.cell_centres(14, 14, geometry="release", like=like)
    close(release[[0, 1, 13]], [0.464286, 1.392857, 12.535714], 1e-6)


def test_gradient_reaches_the_offset_network_both_ways(monkeypatch):
    """Red if points are detached: they matter through the sampled features alone (no bias) and
    through the bias alone (the features sampled without a gradient to the points)."""
    features, sample = small_attention(position="none"), dat.bilinear_sample
    features(random_input(1, 6, 7, 8)).square().sum().backward()
    assert features.offset.out.weight.grad.abs().max() > 1e-6
    bias = small_attention()
    monkeypatch.setattr(dat, "bilinear_sample", lambda z, points: sample(z, points.detach()))
    bias(random_input(1, 6, 7, 8)).square().sum().backward()
    assert bias.offset.out.weight.grad.abs().max() > 1e-6
    assert bias.offset.conv.weight.grad.abs().max() > 1e-6
    monkeypatch.undo()
    model = DAT(small_config())                                     # and to who asks for the points
    model.sampling_points(torch.randn(1, 3, 16, 16))[1].sum().backward()
    assert model.stages[1].blocks[1].attention.offset.out.weight.grad.abs().max() > 0


def test_offset_network_ends_without_a_bias_after_a_norm():
    """[D4] Red if the 1x1 convolution gains a bias or the norm before GELU is lost."""
    network = dat.OffsetNetwork(dim=4, kernel=3, stride=1)
    assert network.out.bias is None
    q = random_input(1, 5, 5, 4)
    network.double()
    network.conv.bias.data.zero_()
    close(network(q).detach(), network(50 * q).detach(), 1e-3)      # the norm takes out the scale


def test_groups_move_independently_and_share_points_over_queries():
    """Red if groups mix: the queries of one group move its own points only, and every query of
    the group's heads reads its keys at those."""
    attention, x = small_attention(), random_input(2, 4, 5, 8)
    q = attention.q(x).detach()
    changed = q.clone()
    changed[..., 4:] += random_input(2, 4, 5, 4, seed=3)            # the second of two groups
    before, after = attention.points(q).detach(), attention.points(changed).detach()
    assert torch.equal(before[:, 0], after[:, 0])
    assert (before[:, 1] - after[:, 1]).abs().min() > 0
    _, k, v, _ = attention.project(x)
    for b in (0, 1):
        sampled = [loops.bilinear(x[b, :, :, 4 * g:4 * g + 4].numpy(), *point)
                   for g in (0, 1) for point in before[b, g].flatten(0, 1).numpy()]
        sampled = torch.from_numpy(np.concatenate(np.split(np.array(sampled), 2), axis=1))  # (K, C)
        for ours, layer in ((k, attention.k), (v, attention.v)):    # (B, M, K, d), no query axis
            close(ours[b].transpose(0, 1).flatten(1).detach(), layer(sampled).detach())


@settings(max_examples=40)
@given(H=sizes, W=sizes, r=st.sampled_from([1, 2]), s=st.sampled_from([0.5, 2.0, 7.0, 40.0]),
       data=st.data())
def test_pieces_of_the_table_are_the_table_read_at_every_displacement(H, W, r, s, data):
    """[D1] Red if the fast form of equation 9, four weighted pieces of the table per key, parts
    from reading the table displacement by displacement, in values or gradients, on or off it."""
    attention = small_attention(size=(H, W), stride=r, offset_range=s)
    points = attention.points(attention.q(random_input(2, H, W, 8))).detach().requires_grad_()
    end = data.draw(st.integers(1, H))
    rows = (data.draw(st.integers(0, end - 1)), end)
    B, G, Hk, Wk, _ = points.shape
    queries = torch.cartesian_prod(torch.arange(*rows).double(), torch.arange(W).double())
    index = queries[:, None] - points.flatten(2, 3)[:, :, None] + torch.tensor([H - 1., W - 1.])
    table = attention.table.unflatten(0, (G, -1)).expand(B, -1, -1, -1, -1)
    direct = dat.bilinear_sample(table.flatten(0, 1), index.flatten(0, 1)).unflatten(0, (B, G))
    found = attention.position_bias(points, (H, W), rows)
    weights, gradients = random_input(*found.shape, seed=4), []
    close(found.detach(), direct.flatten(1, 2).detach(), 1e-12)
    for bias in (found, direct.flatten(1, 2)):
        gradients.append(torch.autograd.grad((bias * weights).sum(), (points, attention.table)))
    for one, other in zip(*gradients):
        close(one, other, 1e-9)


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_what_is_not_finite_stays_in_its_image(geometry):
    """Red if a coordinate that is not a number crashes, as an index, or spreads over the batch."""
    attention, x = small_attention(geometry=geometry), random_input(2, 4, 5, 8)
    expected = attention(x)[1]
    x[0, 2, 2] = math.nan
    out = attention(x)
    assert out[0].isnan().all()
    close(out[1].detach(), expected.detach(), 1e-12)


def test_long_maps_are_attended_a_few_rows_at_a_time(monkeypatch):
    """Red if memory grows with queries times keys, or if the rows of queries are put together
    wrongly: whatever the share, the block's output is the same."""
    seen, attend = [], dat.attend
    monkeypatch.setattr(dat, "attend", lambda q, *rest: seen.append(q.shape[2]) or attend(q, *rest))
    for changes in ({}, {"geometry": "release"}, {"position": "fixed"}, {"position": "none"}):
        attention, x = small_attention(size=(5, 7), **changes), random_input(2, 5, 7, 8)
        monkeypatch.setattr(dat, "SCORES", 2 ** 24)
        expected = attention(x).detach()
        monkeypatch.setattr(dat, "SCORES", 4 * 35 * 7 * 2)          # M K W: two rows
        close(attention(x).detach(), expected, 1e-12)
    assert seen == [35, 14, 14, 7] * 4


@given(H=sizes, W=sizes, window=st.integers(1, 4), shifted=st.booleans(), data=st.data())
def test_windows_are_isolated(H, W, window, shifted, data):
    """[D3] Red if a token sees beyond its window: windows are cut at multiples of w, shifted ones
    at ceil(w / 2) + multiples, without wrapping around."""
    shift = math.ceil(window / 2) if shifted else 0
    attention = randomise(WindowAttention(dim=4, heads=1, window=window, shift=shift))
    row, column = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, W - 1))
    x = random_input(1, H, W, 4)
    changed = x.clone()
    changed[0, row, column] += 1
    moved = (attention(changed) - attention(x)).abs().amax(-1)[0] > 1e-12
    y, x_ = torch.arange(H)[:, None], torch.arange(W)
    same = ((y - shift) // window == (row - shift) // window) \
        & ((x_ - shift) // window == (column - shift) // window)
    assert torch.equal(moved, same)


def test_shift_is_ceil_of_half_the_window():
    """[D3] Red if shifted blocks use Swin's floor(7 / 2) = 3: the release uses 4."""
    model = dat.build("dat-t")
    assert [block.attention.shift for block in model.stages[0].blocks] == [0, 4]


# ============================================================ the authors' numbers

# Numbers of the authors' code (LeapLabTHU/DAT, commit 566a593) in float64 on a small instance:
# logits, points of both deformable blocks, gradient norms by sorted parameter name (input last).
OFFICIAL_LOGITS = [
    [-0.43485169763460385, -0.8876783540057376, 0.8909409627254677, -0.9839161479919881,
     0.8323711680806971],
    [-0.7385188872832806, -0.8194194148958592, 0.5704141882711027, -1.3486421744520536,
     0.14095297046055738]]
OFFICIAL_POINTS = """
-1.153878296167 -1.091883015762 -1.017243461835 -0.692031618331 -0.39438910838 -0.175001963658
-0.585304299651 0.818454968196 -0.558658593029 -0.9779809095 -0.599277567289 -0.722281471761
-0.418429688478 -0.215610081888 -0.015849753344 0.308711750777 -0.037390110341 -1.221176860067
-0.144896676392 -0.528444595192 0.221962898412 -0.195540654356 0.030777217367 0.429901962379
1.114576140102 -1.095612708293 0.365255173002 -0.708436411456 0.334766533245 -0.075063289913
0.795656880797 0.447926044739 -0.608186749983 -1.031865481864 -0.582148815553 -0.496496565657
-0.592756597593 -0.153389556041 -0.902960689522 0.492828712968 0.060080254714 -0.885927656866
0.143417467627 -0.624452259447 0.073929456745 -0.076356233345 -0.194207404487 0.627942418495
0.558883875514 -0.91394531522 0.657020721582 -0.428936530947 0.605190742994 -0.062236660108
0.20621967034 0.543182853139 0.891291286286 -1.15083968941 0.975809259095 -0.484982707846
1.118802145361 -0.083072406535 0.5134690315 0.343178343123 -0.564029727922 -1.043165864962
-0.914041675866 -0.550671459606 -1.018822571886 0.024003211803 -0.455876054441 0.309119964967
0.037814721811 -1.016799794095 -0.223305769526 -0.381364598315 -0.395675358355 -0.106538203268
-0.479917285682 0.311391082772 0.581595022923 -1.215940585692 0.123671800179 -0.59947639952
0.444513418526 -0.011992693508 -0.191720757711 0.457054981588 1.060236728052 -0.923828119751
0.928124912165 -0.710672996786 0.663255136859 -0.13589891493 0.409836764035 0.306906780924
-0.513620991051 -1.089574051323 -0.414917773198 -0.579760519834 -0.41928402936 -0.137306410463
-0.585472643935 0.318940837359 0.097523560017 -0.714794807496 0.098782037209 -0.613954681082
-0.087122337342 -0.044786491705 0.02920278082 0.337755869467 0.599864345552 -0.935734186111
0.51473642252 -0.561176210981 0.589783458843 -0.074813458926 0.540781770916 0.35889271767
1.054195189662 -0.785106352124 1.083198946637 -0.601628314829 0.708730534484 -0.065449865391
1.079388528744 0.438418601508
""", """
0.203439508704 -1.13442094506 -0.761966004498 0.241669364022 0.095375411104 -0.602259985661
-0.407460649164 1.237648470079 -1.12354550159 0.193330708557 0.478904180174 0.248583146498
-0.21747612684 -0.115746994967 -0.391817448454 1.225949634316 -0.270595564937 -0.101801021109
0.378981994663 0.045023254936 0.2216784182 0.166031193265 0.209759508466 1.395480419494
-1.218143644612 -0.317820492957 -1.182416454012 0.806584782629 0.519076878395 -0.082592820912
0.108882695129 0.729923878372 -0.351839961473 -0.850331840756 0.383895872767 0.225602437711
0.558551722625 0.254323545686 0.799372371393 0.098965599158 0.161386630637 0.249891136046
-0.956355742973 0.518844359768 0.845003033081 0.072218932071 -0.250301364055 0.878500533274
-0.83106021711 -0.065094474284 -0.597841219707 1.317335267604 -0.036880006669 0.167580510609
-0.114253438144 1.114378620947 -0.485235030623 -0.971098117483 0.153814983993 0.832771061943
0.367486939956 -0.452515717216 1.418410285679 1.071882403816
"""
OFFICIAL_GRADIENTS = """
4.04493044601 30.5781472625 3.80194039948 3.3367677141 24.4238133315 2.70618238524 2.67335312265
27.7664770791 3.34089376124 2.7832424886 43.7214686338 4.11716733117 3.34280622984 3.97209992916
38.3080447735 3.03281292007 3.29051925256 2.03022801645 7.08827557545 2.2296826701 9.85781435021
1.6795472698 0.773646207524 4.31943940391 1.72113004604 7.43501747974 0.330517630664 2.60314931116
3.89164127262 1.38162239412 1.75124265811 2.1740593746 3.40994049062 0.923990779459 1.17745924803
1.50192330627 4.24316797199 1.34551394406 8.74011794023 1.12541473662 3.8998784153 0.645955810862
6.1228586061 1.81357236086 6.66255672509 1.99429823204 11.3970288831 1.54308731842 1.82452424243
5.70925385144 1.22012664115 6.30621640492 0.590357740872 2.16760751472 2.96469971412 1.32606857057
1.48687156816 0.936694194639 1.46890776172 1.29976016059 1.0607250091 1.31158734715 6.3900626447
1.71363640054 10.5483024536 1.27598260125 4.98728958705 1.95437250758 10.0965087174 2.82040844322
11.164338775 2.34425808976 11.3897552171 0.642470397114 0.650651386716 2.30506906175
0.363355382405 0.376940358355 1.18201793355 2.43675204081e-16 1.5797497113 2.37418539268
9.36215395066 0.509117698627 2.8755380261 1.88372548134 8.81894897957 0.25550233183 2.35179680439
2.5239184755 1.9188430702 1.6364434882 1.77909302624 1.65751272037 1.6477686838 1.7770230358
1.70207730647 9.60041352239 2.4565152959 18.4252005134 1.65823552169 9.07334596416 2.19144372002
17.0762995478 3.13379022546 21.3258139442 2.80274875433 20.5535721415 0.587332149984 1.25412974875
1.45309915376 0.681393105698 0.511360483386 1.85645986934 1.21492279574e-16 0.685261846287
2.46426239812 16.2430441163 0.55685410294 4.40553013821 2.43138599808 16.4844923059 0.153980586947
2.78541237264 2.1194787471 1.69586413383 1.98077674399 2.14996049718 2.0608096971 1.35908589692
1.29758338012 1.71101786016 13.3340652806 2.70484985482 26.9830852836 1.5157444805 11.2847133132
2.34729361719 21.5457204727 5.38785580103
"""


def draw_official(name, shape):
    """The parameter of that name of the release, by formula."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("table"):
        return 0.5 * z
    if len(shape) == 1:
        return 1 + 0.1 * z if name.endswith("norm.weight") else 0.1 * z
    return z / np.sqrt(np.prod(shape[1:]))


def official_config(**changes):
    stages = tuple(StageConfig(dim=8 * 2 ** i, heads=2 ** i, blocks=blocks, window=2, groups=groups,
                               kernel=(9, 7, 5, 3)[i])
                   for i, (blocks, groups) in enumerate(
                       (("LS", None), ("LS", None), ("LD", 2), ("LD", 4))))
    return DATConfig(**{"stages": stages, "image_size": 64, "classes": 5, **changes})


def official_state():
    layout = dat._official_layout(DAT(official_config(geometry="release")))
    return {name: torch.from_numpy(draw_official(name, shape)) if parameter is not None
            else torch.zeros(shape) for name, (shape, parameter) in layout.items()}


@pytest.fixture
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_official_weights_give_the_authors_numbers(float64_default):
    """Red if the release's geometry, shift, names or layouts are off anywhere (1e-8)."""
    model = dat.load_official(official_state(), official_config()).eval()
    images = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 64, 64)))
    images.requires_grad_()
    logits = model(images)
    close(logits.detach(), OFFICIAL_LOGITS, 1e-8)
    for i, points, text in zip((2, 3), model.sampling_points(images), OFFICIAL_POINTS):
        cell = 4 * 2 ** i
        normalised = np.array(text.split(), dtype=float).reshape(points.shape)
        in_map = (normalised + 1) / 2 * (64 // cell - 1)
        close(points.detach(), (in_map + 0.5) * cell - 0.5, 1e-8)
    (logits * torch.from_numpy(np.random.RandomState(8).standard_normal((2, 5)))).sum().backward()
    parameters = {name: ours for name, (_, ours) in dat._official_layout(model).items()
                  if ours is not None}
    norms = [float(parameters[name].grad.norm()) for name in sorted(parameters)]
    expected = np.array(OFFICIAL_GRADIENTS.split(), dtype=float)
    close([*norms, float(images.grad.norm())], expected, 1e-8)


def test_official_weights_are_taken_from_below_model():
    """Red if a published checkpoint, a dict holding the weights under "model", is not understood,
    or if the geometry is not the release's."""
    bare = dat.load_official(official_state(), official_config())
    nested = dat.load_official({"model": official_state(), "epoch": 3},
                               official_config(geometry="release"))
    assert bare.config == nested.config and bare.config.geometry == "release"
    for ours, theirs in zip(bare.parameters(), nested.parameters()):
        assert torch.equal(ours, theirs)


def test_official_names_and_shapes_are_the_releases():
    """Red if a name or shape, of a weight or a derived buffer, is not what the authors' code has:
    the digest is of the sorted "name [shape]" lines of the instance above."""
    layout = dat._official_layout(DAT(official_config(geometry="release")))
    lines = "\n".join(f"{name} {list(shape)}" for name, (shape, _) in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == \
        "23fc009648a3136b138f0d05151f149d3e31a405c1d330294d4e03e2bebb6533"


@pytest.mark.parametrize("changes, absent", [
    ({"offsets": False}, ("conv_offset",)), ({"position": "none"}, ("rpe_table",))])
def test_official_weights_of_ablations_lack_what_these_lack(changes, absent):
    """Red if an ablated model asks for weights it has no use for, or ignores those that come."""
    config = official_config(**changes)
    state = {k: v for k, v in official_state().items() if not any(part in k for part in absent)}
    dat.load_official(state, config)
    with pytest.raises(ValueError, match=f"{absent[0]}.* is unknown"):
        dat.load_official(official_state(), config)


def test_official_loading_names_every_key_that_does_not_fit():
    """Red if a missing, unknown or misshapen key, or a value that is no tensor, passes."""
    state = official_state()
    del state["cls_norm.norm.bias"], state["stages.0.attns.1.attn_mask"]
    state["cls_head.weight"] = torch.zeros(6, 64)
    state["cls_head.bias"] = "text"
    state["stages.9.extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        dat.load_official(state, official_config())
    for part in ("cls_norm.norm.bias is missing", "stages.0.attns.1.attn_mask is missing",
                 "stages.9.extra is unknown", "cls_head.weight is (6, 64), expected (5, 64)",
                 "cls_head.bias is str"):
        assert part in str(error.value)
    for wrong in (None, [1], {"model": 3}):
        with pytest.raises(ValueError, match="state dict"):
            dat.load_official(wrong, official_config())
    for changes in ({"stem": "conv"}, {"position": "fixed"}):
        with pytest.raises(ValueError, match="release"):
            dat.load_official(official_state(), official_config(**changes))
    with pytest.raises(ValueError, match="DATConfig"):
        dat.load_official(official_state(), None)


# ============================================================ size and cost


@pytest.mark.parametrize("variant, parameters, gmacs", [
    ("dat-t", 28_319_138, 4.56), ("dat-s", 49_700_402, 8.96), ("dat-b", 87_881_632, 15.72),
    ("dat-b-384", 88_178_272, 49.5), ("cifar", 7_406_196, 0.39)])
def test_variants_have_the_published_size_and_cost(variant, parameters, gmacs):
    """Red if a width, depth, kernel, bias, table or drop path rate of a variant changes."""
    rates = {"dat-t": 0.2, "dat-s": 0.3, "dat-b": 0.5, "dat-b-384": 0.5, "cifar": 0.1}
    assert dat.VARIANTS[variant].drop_path == rates[variant]
    with torch.device("meta"):
        model = dat.build(variant)
    assert sum(p.numel() for p in model.parameters()) == parameters
    tolerance = 0.01 if variant != "cifar" else 0.03                # two digits are known
    assert dat.multiply_accumulates(model.config) / 1e9 == pytest.approx(gmacs, rel=tolerance)


def test_early_deformable_blocks_cost_what_the_tutorial_says():
    """Red if the tutorial's cost of other blocks in the first two stages is not the model's."""
    stages, found = dat.VARIANTS["dat-t"].stages, []
    for blocks in (("LS", "LS"), ("LS", "LD"), ("LD", "LD")):
        early = tuple(replace(stage, blocks=b, groups=3 if "D" in b else None)
                      for stage, b in zip(stages, blocks))
        config = replace(dat.VARIANTS["dat-t"], stages=early + stages[2:])
        found.append(round(dat.multiply_accumulates(config) / 1e9, 2))
    assert found == [4.56, 4.79, 6.68]


def test_nano_is_small_and_keeps_the_shape_of_the_paper():
    """Red if the CPU variant grows past 2M parameters or loses a kind of block."""
    config = dat.VARIANTS["cifar-nano"]
    assert sum(p.numel() for p in DAT(config).parameters()) <= 2_000_000
    assert set("".join(stage.blocks for stage in config.stages)) == set("LSD")


def test_equation_10_and_the_slip_in_its_example():
    """Red if a term of eq. 10 is lost; pins that the offset part is 0.51M, not 5.08M."""
    example = {"H": 14, "W": 14, "keys": 49, "dim": 384}
    total = dat.deformable_attention_macs(**example, kernel=5)
    attention = dat.deformable_attention_macs(**example, kernel=0) - 2 * 49 * 384
    assert attention == 79_629_312
    assert total - attention == 27 * 49 * 384 == 508_032


@pytest.mark.parametrize("changes, size", [
    ({}, (12, 12)), ({"stem": "conv"}, (12, 24)), ({"stem": "conv", "patch": 1}, (24, 12)),
    ({"stem": "conv", "patch": 4}, (24, 24)), ({"patch": 3, "mlp_ratio": 2}, (36, 18)),
    ({"offsets": False}, (12, 12))])
def test_counted_cost_is_what_pytorch_counts(changes, size):
    """Red if the analytic count forgets a layer (windows here fit, so that nothing is padded)."""
    stages = (StageConfig(dim=8, heads=2, blocks="LD", window=3, groups=1, stride=2, kernel=3),
              StageConfig(dim=12, heads=4, blocks="LD", window=3, groups=2))
    config = small_config(stages=stages, **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        DAT(config)(torch.zeros(1, 3, *size))
    assert 2 * dat.multiply_accumulates(config, size) == counter.get_total_flops()


# ============================================================ contracts of the network

ABLATIONS = {"paper": {}, "release": {"geometry": "release"}, "no offsets": {"offsets": False},
             "fixed": {"position": "fixed"}, "no position": {"position": "none"},
             "conv stem": {"stem": "conv"}}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_parameter_gets_a_gradient_and_a_step_lowers_the_loss(name):
    """[D5] Red if a switch crashes or leaves a parameter unused; named. A key bias shifts all
    scores of a query alike, so its gradient is zero and only has to be finite."""
    torch.manual_seed(0)
    model = DAT(small_config(drop_path=0.1, **ABLATIONS[name]))
    images, labels = torch.randn(6, 3, 16, 20), torch.tensor([0, 1, 2, 3, 4, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.eval()
    before = F.cross_entropy(model(images), labels)
    before.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 0 or parameter_name.endswith("attention.k.bias"), \
            parameter_name
    optimizer.step()
    assert F.cross_entropy(model(images), labels) < before


@pytest.mark.parametrize("name", [n for n in ABLATIONS if n != "paper"])
def test_every_switch_changes_the_output(name):
    """Red if a switch is accepted and ignored: weights of the same name and shape are equal.
    (A stem has weights of its own; there the test is that it is built and used.)"""
    model = randomise(DAT(small_config()))
    other = randomise(DAT(small_config(**ABLATIONS[name])))
    shared = {k: v for k, v in model.state_dict().items()
              if k in other.state_dict() and other.state_dict()[k].shape == v.shape}
    other.load_state_dict({**other.state_dict(), **shared})
    images = random_input(1, 3, 16, 16)
    assert (model(images) - other(images)).abs().max() > 1e-6


@pytest.mark.parametrize("field, value", [
    ("window", 2), ("groups", 2), ("stride", 1), ("kernel", 5), ("offset_range", 1.0)])
def test_every_stage_field_changes_the_output(field, value):
    """Red if a field of StageConfig does not reach the block it is for."""
    stage = StageConfig(dim=8, heads=2, blocks="LD", window=3, groups=1, stride=2, kernel=3)
    one, two = (randomise(DAT(small_config(stages=(s,)))) for s in
                (stage, replace(stage, **{field: value})))
    images = random_input(1, 3, 16, 16)
    assert (one(images) - two(images)).abs().max() > 1e-6


@settings(max_examples=40)
@given(size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
       stem=st.sampled_from(["patch", "conv"]))
def test_any_image_size_works(size, stem):
    """[D2] Red if a size that divides by nothing, or a map that shrinks to a pixel, breaks."""
    model = DAT(small_config(patch=4, stem=stem)).eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model(images).isfinite().all()
        maps, points = model.features(images), model.sampling_points(images)
    expected = [(math.ceil(size[0] / c), math.ceil(size[1] / c)) for c in (4, 8)]
    assert [tuple(m.shape) for m in maps] == [(2, 8, *expected[0]), (2, 12, *expected[1])]
    assert model.config.map_sizes(size) == expected
    halved = tuple(math.ceil(n / 2) for n in expected[0])
    assert [tuple(p.shape) for p in points] == [(2, 1, *halved, 2), (2, 2, *expected[1], 2)]


@pytest.mark.parametrize("variant, size", [
    ("dat-t", (32, 32)), ("dat-t", (48, 48)), ("cifar", (33, 57)), ("cifar-nano", (1, 1))])
def test_variants_take_small_and_odd_images(variant, size):
    """[D2] Red if a published shape needs sizes that its windows divide."""
    with torch.no_grad():
        logits = dat.build(variant, classes=7).eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 7) and logits.isfinite().all()


def test_patches_are_filled_with_zeros_at_the_bottom_and_right():
    """[D2] Red if patches are filled at the top or left, or with anything but zeros."""
    model = randomise(DAT(small_config(patch=4)))
    images = random_input(1, 3, 14, 13)
    close(model(images).detach(), model(F.pad(images, (0, 3, 0, 2))).detach(), 1e-12)


def test_tables_keep_centre_and_constants_when_resized():
    """[D2] Red if resizing shifts the table: displacement zero must stay in the middle."""
    table = random_input(2, 7, 5)
    assert dat.resize(table, (7, 5)) is table
    for size in ((13, 9), (3, 1), (1, 11)):
        resized = dat.resize(table, size)
        assert resized.shape == (2, *size)
        close(dat.resize(torch.full((2, 7, 5), 3.0), size), np.full((2, *size), 3.0), 1e-5)
    close(dat.resize(table, (3, 1))[:, 1, 0], table[:, 3, 2], 1e-12)


@pytest.mark.parametrize("stem, patch", [("patch", 2), ("patch", 3), ("conv", 1), ("conv", 2),
                                         ("conv", 4)])
def test_a_map_pixel_stands_where_its_convolutions_are_centred(stem, patch):
    """[D6] Red if points in the image are off: the image pixels that reach a pixel of the first
    and second map through the convolutions alone lie symmetrically around its stated place."""
    config = small_config(stem=stem, patch=patch, stages=tuple(
        StageConfig(dim=8, heads=1, blocks="D", groups=1) for _ in range(2)))
    model, images = randomise(DAT(config)), random_input(1, 3, 48, 48).requires_grad_()
    x = model.embed(images)
    for stage, (_, _, first, cell) in zip(model.stages, model.deformable_inputs(images)):
        x = stage.down(x)
        (reached,) = torch.autograd.grad(x[0, 3, 2].sum(), images, retain_graph=True)
        rows, columns = (reached[0].abs().sum((0, axis)).nonzero().flatten() for axis in (2, 1))
        centre = torch.tensor([rows[0] + rows[-1], columns[0] + columns[-1]]) / 2
        close(first + cell * torch.tensor([3.0, 2.0]), centre)


def test_images_of_a_batch_do_not_see_each_other():
    """Red if batch and group axes are merged in the wrong order anywhere."""
    model, images = randomise(DAT(small_config())), random_input(3, 3, 16, 18)
    together = model(images).detach()
    for i in range(3):
        close(together[i:i + 1], model(images[i:i + 1]).detach(), 1e-12)


def test_state_dict_round_trip_and_determinism_in_eval():
    """Red if state lives outside the state dict, or evaluation draws random numbers."""
    first, second = DAT(small_config(drop_path=0.5)).eval(), DAT(small_config()).eval()
    images = torch.randn(2, 3, 16, 16)
    second.load_state_dict(first.state_dict())
    before = [set(vars(module)) for module in first.modules()]
    first.sampling_points(images)
    assert before == [set(vars(module)) for module in first.modules()]
    assert torch.equal(first(images), first(images))
    assert torch.equal(first(images), second(images))


def test_an_empty_batch_passes_through():
    """Red if a reshape guesses a size: detectors do get batches without a crop."""
    model = DAT(small_config())
    assert model(torch.zeros(0, 3, 16, 16)).shape == (0, 5)
    assert small_attention()(random_input(0, 3, 4, 8)).shape == (0, 3, 4, 8)


def test_fixed_tables_have_a_number_per_query_and_key_cell():
    """Red if a fixed table is laid out for another number of keys than the offset network's."""
    attention = small_attention(position="fixed", size=(4, 7), stride=2)
    assert attention.table.shape == (4, 4, 7, 2, 4)


def test_defaults_are_the_papers():
    """Red if a default that the issue and the paper state changes."""
    stage, config = StageConfig(dim=8, heads=2, blocks="L"), DATConfig(stages=small_config().stages)
    assert asdict(stage) == {"dim": 8, "heads": 2, "blocks": "L", "window": 7, "groups": None,
                             "stride": 1, "kernel": 5, "offset_range": 2.0}
    assert {k: v for k, v in asdict(config).items() if k != "stages"} == {
        "image_size": 224, "patch": 4, "stem": "patch", "classes": 1000, "mlp_ratio": 4,
        "drop_path": 0.0, "geometry": "paper", "offsets": True, "position": "relative"}
    one = DAT(DATConfig(stages=(stage,), drop_path=0.5))
    assert one.stages[0].blocks[0].rate == 0                        # linear from 0; one block only


def test_plain_values_build_the_configuration_again():
    """Red if a checkpoint's configuration, after any container change, is another one."""
    for config in (*dat.VARIANTS.values(), small_config(image_size=[8, 12])):
        assert DATConfig(**asdict(config)) == config
        hash(config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_and_keeps_coordinates_in_float32(dtype):
    """Red if grid_sample meets mixed types, or a coordinate is rounded to half precision."""
    torch.manual_seed(0)
    model, images = DAT(small_config()).eval(), torch.randn(2, 3, 16, 20)
    exact = model(images).detach()
    with torch.autocast("cpu", dtype=dtype):
        logits, points = model(images), model.sampling_points(images)
    logits.float().sum().backward()
    close(logits.float().detach(), exact, 0.05)
    assert all(p.dtype == torch.float32 for p in points)
    if dtype == torch.bfloat16:                                     # pure, not autocast
        model.to(dtype)
        logits, points = model(images.to(dtype)), model.sampling_points(images.to(dtype))
        logits.sum().backward()
        assert logits.dtype == dtype and all(p.dtype == torch.float32 for p in points)
        close(logits.float().detach(), exact, 0.05)
        centres = dat.cell_centres(200, 200, geometry="paper", like=points[0])
        assert torch.equal(centres, torch.arange(200.0))
    assert model.double()(images.double()).dtype == torch.float64


def test_points_are_bounded_in_float32_though_the_network_is_bfloat16():
    """Red if tanh or the offset is computed in bfloat16, three digits, before joining p."""
    attention, q = small_attention().bfloat16(), random_input(1, 4, 5, 8).bfloat16()
    found = attention.points(q).detach()
    raw = attention.offset(q.unflatten(3, (2, 4)).movedim(3, 1).flatten(0, 1)).float().detach()
    reference = attention.reference_points(4, 5, 4, 5, found)
    close(found, reference + raw.tanh().view(1, 2, 4, 5, 2), 1e-6)      # r = 1, s = 2: 1 px


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_half_precision_samples_where_float32_does(geometry):
    """Red if map or table are read at coordinates in bfloat16, up to half a pixel off: both
    equal their float32 readings of the same bfloat16 numbers, rounded once."""
    attention = small_attention(dim=4, heads=1, groups=1, size=(1, 160), geometry=geometry)
    attention.bfloat16()
    maps, points = random_input(1, 4, 1, 160).bfloat16(), torch.rand(1, 1, 1, 50, 2) * 160
    points[..., 0] = 0
    sampled = dat.bilinear_sample(maps, points[:, 0])
    assert sampled.dtype == torch.bfloat16
    close(sampled.float(), dat.bilinear_sample(maps.float(), points[:, 0]), 0.01)
    bias = attention.position_bias(points, (1, 160)).detach().float()
    close(bias, attention.float().position_bias(points, (1, 160)).detach(), 1e-6)


def test_every_part_of_a_block_is_dropped():
    """Red if one branch ignores its rate, or the shortcut is dropped with it."""
    block = DAT(small_config()).stages[0].blocks[0].train()
    z = torch.randn(64, 4, 4, 8)
    block.rate = 1 - 1e-6
    assert torch.equal(block(z), z)
    block.rate, calls = 0.5, []
    for branch in (block.attention, block.mlp):
        branch.register_forward_hook(lambda *_: calls.append(1) or torch.ones(64, 4, 4, 8))
    added = (block(z) - z).amax((1, 2, 3)).round().unique().tolist()
    assert added == [0, 2, 4] and len(calls) == 2


def test_attention_never_runs_on_cudnn(monkeypatch):
    """Red if cuDNN's kernel, which has open bugs with additive masks, may be chosen, or if the
    choice outlives the call."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(*args, **kwargs):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        assert kwargs["attn_mask"].stride(-1) == 1                  # or no fused kernel takes it
        assert args[0].dtype == kwargs["attn_mask"].dtype and kwargs["attn_mask"].ndim == 4
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(dat, "attend", functools.partial(dat.attend, fused=True))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        DAT(small_config())(torch.randn(1, 3, 16, 16))
    assert len(seen) == 5 and not any(seen)
    for groups in (1, 2, 4):                                        # of four heads
        small_attention(groups=groups)(random_input(2, 4, 5, 8))
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 3, 5, 4), (0, 3, 4), (2, 900, 16)])
@pytest.mark.parametrize("bias, dtype, tolerance", [
    (True, torch.float32, 1e-5), (True, torch.float64, 1e-12), (False, torch.float64, 1e-12)])
def test_linear_is_the_layer_of_pytorch(shape, bias, dtype, tolerance, monkeypatch):
    """Red if the 1x1 convolution parts from nn.Linear in values or gradients, for rows in any
    layout, or if there are none. (oneDNN takes float32 of more than 20,480 numbers.)"""
    torch.manual_seed(0)
    layer, plain = (kind(shape[-1], 24, bias=bias, dtype=dtype)
                    for kind in (dat.Linear, torch.nn.Linear))
    plain.load_state_dict(layer.state_dict())
    x = random_input(*shape).to(dtype)
    for x in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        found = []
        for run, onednn in ((plain, True), (layer, True), (layer, False)):
            monkeypatch.setattr(dat, "ONEDNN", onednn)
            leaf = x.detach().requires_grad_()
            y = run(leaf)
            assert y.shape == (*shape[:-1], 24)
            found.append([y, *torch.autograd.grad(y.sin().sum() / 1e3, [leaf, *run.parameters()])])
        for one, *others in zip(*found):
            for other in others:
                close(one.detach(), other.detach(), tolerance)


def test_linear_layers_are_convolutions_by_onednn(monkeypatch):
    """Red if a layer of the model but its head, or many rows of float32, go another way."""
    assert [n for n, m in dat.build("cifar-nano").named_modules()
            if type(m) is torch.nn.Linear] == ["head"]
    monkeypatch.setattr(dat, "ONEDNN", torch.backends.mkldnn.is_available())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autograd.profiler.profile() as profile:
            dat.Linear(16, 24)(torch.randn(2, 900, 16))
    finally:
        torch.set_num_threads(threads)
    assert ("aten::mkldnn_convolution" in {e.name for e in profile.function_events}) == dat.ONEDNN


@pytest.mark.parametrize("with_bias", [True, False])
def test_both_forms_of_attention_agree(with_bias):
    """Red if the formula, used on CPUs, and PyTorch's kernels, used elsewhere, part in values or
    gradients."""
    q, k, v, bias = (random_input(*shape, seed=i) for i, shape in enumerate(
        [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (1, 3, 5, 7)]))
    bias[..., 2] = -math.inf                                        # a masked key
    inputs, found = [q, k, v] + [bias] * with_bias, []
    for fused in (False, True):
        for t in inputs:
            t.grad = None
            t.requires_grad_()
        z = dat.attend(q, k, v, bias if with_bias else None, fused=fused)
        z.square().sum().backward()
        found.append([z.detach(), *(t.grad for t in inputs)])
    for one, other in zip(*found):
        assert one.isfinite().all()
        close(one, other, 1e-12)


def test_compiled_and_exported_models_agree_with_eager():
    """Red if a graph break or a data-dependent branch creeps into the forward pass."""
    torch.manual_seed(0)
    stage = StageConfig(dim=8, heads=2, blocks="SD", window=3, groups=1, stride=2, kernel=3)
    model, images = DAT(small_config(stages=(stage,))).eval(), torch.randn(2, 3, 16, 20)
    expected = model(images).detach()
    batch = {0: torch.export.Dim("batch")}                          # H and W are fixed
    exported = torch.export.export(model, (images,), dynamic_shapes=(batch,)).module()
    close(exported(images).detach(), expected, 1e-5)
    close(exported(images[:1].repeat(5, 1, 1, 1)).detach(), expected[:1].repeat(5, 1), 1e-5)
    backend = "inductor" if shutil.which("g++") else "aot_eager"    # inductor compiles C++ here
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(images).detach(), expected, 1e-5)
    points = torch.compile(model.sampling_points, fullgraph=True, backend="eager")(images)
    assert torch.equal(points[0], model.sampling_points(images)[0])


def test_compiled_gradients_agree_with_eager_at_a_second_size_too():
    """Red if training under torch.compile departs from eager, or if sizes are computed in a way
    that symbolic shapes, which come into play when the size changes, do not allow."""
    torch.manual_seed(0)
    stage = StageConfig(dim=8, heads=2, blocks="SD", window=3, groups=1, stride=2, kernel=3)
    model = DAT(small_config(stages=(stage,)))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for size in ((16, 16), (13, 18)):
        images, gradients = torch.randn(2, 3, *size), []
        for run in (model, compiled):
            model.zero_grad()
            run(images).square().sum().backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for one, two in zip(*gradients):
            close(one, two, 1e-5)
    for training in (True, False):
        model.train(training)
        compiled(images)
    with torch.compiler.set_stance("fail_on_recompile"):            # epochs come and go
        for training in (True, False, True):
            model.train(training)
            compiled(torch.randn_like(images))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    """Red if elements instead of samples are dropped, the survivors are not scaled, evaluation
    drops, or depth does not raise the rate from zero to the configured one."""
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = dat.drop_path(x, 0.25, True)
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    close(dropped.unique(), [0, 4 / 3], 1e-6)
    assert abs(float(dropped.mean()) - 1) < 0.05
    assert dat.drop_path(x, 0.25, False) is x and dat.drop_path(x, 0.0, True) is x
    rates = [block.rate for stage in dat.build("dat-t").stages for block in stage.blocks]
    close(rates, np.linspace(0, 0.2, 12), 1e-12)
    model = DAT(small_config(drop_path=0.9)).train()
    images = torch.randn(4, 3, 16, 16)
    assert not torch.equal(model(images), model(images))


def test_initial_weights_are_what_the_docstring_says():
    """[D7] Red if tables start elsewhere than at deviation 0.01 around zero."""
    torch.manual_seed(0)
    model = dat.build("dat-t")
    tables = torch.cat([p.detach().flatten() for n, p in model.named_parameters()
                        if n.endswith("table")])
    assert float(tables.std()) == pytest.approx(0.01, rel=0.02) and abs(tables.mean()) < 2e-4
    linear = model.stages[0].blocks[0].mlp.expand
    assert linear.weight.abs().max() <= 1 / math.sqrt(linear.in_features)


STAGE = {"dim": 8, "heads": 2, "blocks": "LD", "groups": 1}
BAD_STAGES = [
    {"dim": 0}, {"dim": 7}, {"dim": 8.0}, {"heads": True}, {"heads": -2}, {"blocks": ""},
    {"blocks": "LX"}, {"blocks": ["L"]}, {"groups": None}, {"blocks": "LS"}, {"groups": 3},
    {"groups": 4},
    {"groups": 0}, {"window": 0}, {"window": "7"}, {"stride": 0}, {"kernel": 4}, {"kernel": -1},
    {"offset_range": 0}, {"offset_range": -1.0}, {"offset_range": math.nan},
    {"offset_range": math.inf}, {"offset_range": None}, {"offset_range": True}, {"dim": True}]
BAD_CONFIGS = [
    {"stages": ()}, {"stages": None}, {"stages": ("LD",)}, {"stages": ({"dim": 8},)},
    {"image_size": 0},
    {"image_size": (8, 8, 8)}, {"image_size": (8, -1)}, {"image_size": 8.0},
    {"image_size": True}, {"mlp_ratio": True}, {"patch": 0},
    {"stem": "swin"}, {"stem": "conv", "patch": 3}, {"classes": 0}, {"mlp_ratio": 0},
    {"mlp_ratio": math.inf}, {"mlp_ratio": "4"}, {"drop_path": -0.1}, {"drop_path": 1.0},
    {"drop_path": math.nan}, {"geometry": "Paper"}, {"offsets": "no"},
    {"offsets": 1}, {"mlp_ratio": 0.1}, {"position": None}]


@pytest.mark.parametrize("change", BAD_STAGES, ids=str)
def test_a_wrong_stage_field_is_named(change):
    """Red if a value that cannot work is accepted, or its error hides which one it was."""
    StageConfig(**STAGE)
    field, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        StageConfig(**{**STAGE, **change})


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=str)
def test_a_wrong_network_field_is_named(change):
    """Red if a value that cannot work is accepted, or its error hides which one it was."""
    field, value = list(change.items())[-1]
    value = value[0] if field == "stages" and value else value
    with pytest.raises(ValueError, match=re.escape(field)) as error:
        small_config(**change)
    assert repr(value) in str(error.value)


def test_wrong_arguments_of_parts_are_named():
    """Red if DeformableAttention, build or an input of the wrong kind fails late or in riddles."""
    for change in ({"groups": 3}, {"kernel": 2}, {"size": 0}, {"geometry": "x"}, {"position": "x"},
                   {"offset_range": 0}, {"dim": 9}, {"size": (3,)}, {"offsets": "no"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            DeformableAttention(**{"dim": 8, "heads": 4, "groups": 2, "size": 4, **change})
    for variant in ("dat-x", ["dat-t"]):
        with pytest.raises(ValueError, match="dat-b-384"):
            dat.build(variant)
    with pytest.raises(ValueError, match="clases"):
        dat.build("dat-t", clases=3)
    with pytest.raises(ValueError, match="DATConfig"):
        DAT({"stages": ()})
    with pytest.raises(ValueError, match="image_size=0"):
        small_config().map_sizes(0)
    for x in (torch.zeros(2, 3, 8), torch.zeros(1, 2, 3, 7), torch.zeros(1, 0, 3, 8)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(x.shape)))):
            small_attention()(x.double())
    with pytest.raises(ValueError, match="even"):
        small_config(stem="conv", stages=(StageConfig(dim=3, heads=1, blocks="L"),))
    model = DAT(small_config())
    for images in (torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 0),
                   torch.zeros(1, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(images.shape)))):
            model(images)


@pytest.mark.parametrize("fields", ({}, {"geometry": "release"}, {"position": "fixed"},
                                    {"offsets": False, "position": "none"}), ids=str)
def test_everything_is_computed_where_its_input_is(fields):
    """Red if a tensor is made on the CPU whatever the input's device, or if a step asks for a
    number and so waits for the device. (meta: no numbers, and nothing mixes with the CPU.)"""
    model = dat.build("cifar", drop_path=0.5, **fields).to("meta").train()
    images = torch.empty(4, 3, 37, 50, dtype=torch.uint8, device="meta")
    pixels, targets = dat.augment(dat.crop_and_flip(images), images.new_empty(4, 10).float(), 2)
    loss = F.cross_entropy(model(pixels), targets)
    loss.backward()
    assert loss.is_meta and all(p.grad.is_meta for p in model.parameters())
    assert all(points.is_meta for points in model.sampling_points(pixels))


# ============================================================ data


def write_cifar(folder, name="cifar10", train=40, test=20, shift=0):
    """A tiny data set in the official layout, random pixels, other ones in every file."""
    archive = dat.CIFAR[name]
    target = folder / archive.folder
    target.mkdir(parents=True)
    for number, split in ((train, archive.splits[0]), (test, archive.splits[1])):
        for file in split:
            records = np.random.RandomState(zlib.crc32(file.encode())).randint(
                0, 256, (number, archive.label_bytes + 3072), dtype=np.uint8)
            records[:, :archive.label_bytes] = (np.arange(number) % archive.classes)[:, None]
            records[:, 0] += shift
            (target / file).write_bytes(records.tobytes())
    (target / archive.names).write_text("\n".join(f"class{i}" for i in range(archive.classes)))
    return target


def pack(folder, name="cifar10"):
    """The folder as the official archive would hold it."""
    archive = dat.CIFAR[name]
    with tarfile.open(folder / archive.file, "w:gz") as tar:
        tar.add(folder / archive.folder, archive.folder)
    return folder / archive.file


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_archive_and_folder_hold_the_same_data(tmp_path, name, capsys):
    """Red if planes, labels (the fine one of CIFAR-100) or files are read in a wrong order."""
    folder = write_cifar(tmp_path, name, shift=3 if name == "cifar100" else 0)
    archive = dat.CIFAR[name]
    expected = [(folder / file).read_bytes() for split in archive.splits for file in split]
    from_folder = dat.load_cifar(name, str(tmp_path))
    from_inside = dat.load_cifar(name, str(folder))
    pack(tmp_path, name)
    shutil.rmtree(folder)
    from_archive = dat.load_cifar(name, str(tmp_path))
    assert "not the official archive" in capsys.readouterr().out
    for data in (from_folder, from_inside, from_archive):
        images, labels = (torch.cat([getattr(half, name) for half in (data.train, data.test)])
                          for name in ("images", "labels"))
        assert images.shape == (40 * len(archive.splits[0]) + 20, 3, 32, 32)
        assert images.dtype == torch.uint8 and len(data.test.images) == 20
        size = archive.label_bytes + 3072
        for i, content in enumerate(expected):                      # 40 records a file
            assert images[40 * i].numpy().tobytes() == content[archive.label_bytes:size]
            assert labels[40 * i:40 * i + 20].tolist() == [j % archive.classes for j in range(20)]
        assert data.classes[3] == "class3" and data.mean.shape == (3, 1, 1)


def test_nothing_of_an_archive_is_written_to_disk(tmp_path, monkeypatch):
    """Red if members are extracted: their paths come from outside."""
    write_cifar(tmp_path)
    path = pack(tmp_path)
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar if m.isfile()]
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            for name in (member.name, "../escaped.bin", f"{tmp_path}/absolute.bin"):
                member.name = name
                tar.addfile(member, io.BytesIO(content))
    folder = tmp_path / "only"
    folder.mkdir()
    path.rename(folder / path.name)
    monkeypatch.chdir(folder)
    before = sorted(tmp_path.rglob("*"))
    dat.load_cifar("cifar10", str(folder))
    assert sorted(tmp_path.rglob("*")) == before


def damage(kind, folder):
    """Breaks a tiny CIFAR-10 in `folder` in one way; returns words that the error must hold."""
    extracted = write_cifar(folder)
    if kind == "missing file":
        (extracted / "data_batch_3.bin").unlink()
        return ["data_batch_3.bin"]
    if kind == "wrong record size":
        (extracted / "data_batch_2.bin").write_bytes(b"x" * 5000)
        return ["data_batch_2.bin", "5,000", "3073"]
    if kind == "empty file":
        (extracted / "test_batch.bin").write_bytes(b"")
        return ["test_batch.bin", "0 bytes"]
    if kind == "label out of range":
        content = bytearray((extracted / "data_batch_1.bin").read_bytes())
        content[3073] = 10
        (extracted / "data_batch_1.bin").write_bytes(content)
        return ["data_batch_1.bin", "label 10"]
    path = pack(folder)
    for file in extracted.iterdir():
        file.unlink()
    content = bytearray(path.read_bytes())
    if kind == "truncated archive":
        path.write_bytes(content[:len(content) // 2])
    elif kind == "altered archive":
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif kind == "not an archive":
        path.write_bytes(b"<html>404</html>")
    elif kind == "another archive":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(HERE / "requirements.txt", "requirements.txt")
        return ["data_batch_1.bin"]
    return [path.name]


@pytest.mark.parametrize("kind", [
    "missing file", "wrong record size", "empty file", "label out of range", "truncated archive",
    "altered archive", "not an archive", "another archive"])
def test_damaged_data_gives_one_clear_line(tmp_path, kind):
    """Red if damaged data trains, or ends in a traceback that does not name the file."""
    words = damage(kind, tmp_path)
    assert_input_error(run_cli("--train", "cifar10", "--data", tmp_path, "--out", tmp_path / "o"),
                       *words)
    assert not (tmp_path / "o").exists()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A tiny official archive behind a URL, and an empty working directory."""
    source = tmp_path / "source"
    write_cifar(source)
    path = pack(source)
    content = path.read_bytes()
    monkeypatch.setattr(dat, "CIFAR_URL", source.as_uri() + "/")
    monkeypatch.setattr(dat.CIFAR["cifar10"], "size", len(content))
    monkeypatch.setattr(dat.CIFAR["cifar10"], "md5", hashlib.md5(content).hexdigest())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return path


def test_download_happens_once_and_is_checked(mirror, capsys):
    """Red if a second run downloads again, or anything but the checked archive is left behind."""
    first = dat.load_cifar("cifar10")
    assert "MB" in capsys.readouterr().out
    assert [p.name for p in Path("data").iterdir()] == [mirror.name]
    mirror.unlink()
    second = dat.load_cifar("cifar10")
    assert capsys.readouterr().out == ""
    assert torch.equal(first.train.images, second.train.images)


@pytest.mark.parametrize("attribute, value", [("md5", "0" * 32), ("size", 7)])
def test_a_download_that_is_not_the_archive_is_not_kept(mirror, monkeypatch, attribute, value):
    """Red if a file of another size or md5 is renamed to the archive's name."""
    monkeypatch.setattr(dat.CIFAR["cifar10"], attribute, value)
    assert_input_error(run_cli("--train", "cifar10"), value, "try again")
    assert list(Path("data").iterdir()) == []


def test_a_transfer_that_breaks_is_an_input_error(mirror, monkeypatch):
    """Red if a server that talks nonsense ends in a traceback or leaves a part of the archive."""
    def broken(*_, **__):
        raise http.client.BadStatusLine("nonsense")

    monkeypatch.setattr(dat.urllib.request, "urlopen", broken)
    assert_input_error(run_cli("--train", "cifar10"), "nonsense", mirror.name, "--train shapes")
    assert list(Path("data").iterdir()) == []


def test_offline_the_error_says_what_to_do(mirror, monkeypatch):
    """Red if the one line lacks what was tried, which file to put where, or the way without."""
    monkeypatch.setattr(dat, "CIFAR_URL", "http://127.0.0.1:9/")
    result = run_cli("--train", "cifar10")
    assert_input_error(result, "http://127.0.0.1:9/", mirror.name, "data/", "--train shapes")
    assert not list(Path(".").rglob("*.part"))
    assert_input_error(run_cli("--train", "cifar100", "--data", "nowhere"), "nowhere",
                       "cifar-100-binary.tar.gz", "--train shapes")


def test_shapes_show_their_figure_where_the_mask_says():
    """Red if masks and images come apart, a figure leaves the image, a kind is missing, or the
    same seed draws something else."""
    images, labels, masks = dat.make_shapes(400, seed=5)
    again, other = dat.make_shapes(400, seed=5), dat.make_shapes(400, seed=6)
    assert torch.equal(images, again[0]) and not torch.equal(images, other[0])
    assert labels.bincount(minlength=8).min() > 20 and len(dat.SHAPES) == 8
    share = masks.float().mean((1, 2))
    assert share.min() > 0.005 and share.max() < 0.5
    values, inside = images.float() / 255, masks[:, None].float()
    count = inside.sum((2, 3))
    mean = (values * inside).sum((2, 3)) / count
    spread = ((values - mean[..., None, None]).square() * inside).sum((2, 3)) / count
    assert spread.sqrt().max() < 0.06                               # one colour on the mask
    outside = (values * (1 - inside)).sum((2, 3)) / (1024 - count)
    assert (mean - outside).abs().amax(1).quantile(0.05) > 0.1      # another one off it


# ============================================================ augmentation and training


def test_crop_and_flip_moves_and_mirrors_each_image_on_its_own():
    """Red if axes mix, rows flip, or two images of a batch share their draw."""
    y, x = torch.meshgrid(torch.arange(1, 9), torch.arange(1, 7), indexing="ij")
    image = torch.stack([y, x, torch.ones_like(y)]).to(torch.uint8)
    images = image.expand(500, 3, 8, 6)
    generator = torch.Generator().manual_seed(0)
    out = dat.crop_and_flip(images, margin=2, generator=generator)
    assert out.shape == images.shape and out.dtype == torch.uint8
    padded, seen = F.pad(image, (2, 2, 2, 2)), set()
    for one in out:
        found = [(top, left, mirror) for top in range(5) for left in range(5)
                 for mirror in ((), (2,))
                 if torch.equal(padded[:, top:top + 8, left:left + 6].flip(mirror), one)]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) == 50
    again = dat.crop_and_flip(images, margin=2, generator=generator.manual_seed(0))
    assert torch.equal(out, again)


@given(steps=st.integers(1, 500), share=st.floats(0, 1), peak=st.floats(1e-6, 1))
def test_learning_rate_rises_then_falls(steps, share, peak):
    """Red if warm-up and cosine do not meet at the peak, or either is not monotone."""
    warmup = int(share * steps)
    rates = [dat.learning_rate(i, steps=steps, warmup=warmup, peak=peak, floor=0.01)
             for i in range(steps + 2)]
    assert rates[:warmup + 1] == sorted(rates[:warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert max(rates) <= peak * (1 + 1e-9) and min(rates) >= peak * 0.000999
    assert rates[-1] == pytest.approx(0.01 * peak)
    if 0 < warmup < steps:
        assert rates[0] == pytest.approx(0.001 * peak) and rates[warmup] == pytest.approx(peak)


OPERATION = st.sampled_from(range(len(dat.OPERATIONS)))


@given(kind=OPERATION, H=st.integers(1, 9), W=st.integers(1, 9), strength=st.floats(-1, 1))
def test_operations_stay_in_range_and_do_nothing_at_strength_0(kind, H, W, strength):
    """Red if an operation leaves [0, 1], or is not the identity at strength 0."""
    images = torch.rand(4, 3, H, W, generator=torch.Generator().manual_seed(H))
    images = (images * 255).round() / 255
    kinds, zero = torch.full((4,), kind), torch.zeros(4)
    close(dat.operate(images, kinds, zero), images, 1e-5)
    changed = dat.operate(images, kinds, zero + strength)
    assert changed.shape == images.shape and 0 <= changed.min() and changed.max() <= 1


@pytest.mark.parametrize("kind", range(len(dat.OPERATIONS)))
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_do_what_their_names_say(kind, sign):
    """Red if an operation does nothing, or another's work, or one image changes the next."""
    generator = torch.Generator().manual_seed(0)
    images = 0.25 + 0.5 * torch.rand(3, 3, 8, 9, generator=generator)
    images = (images * 255).round() / 255
    kinds, strength = torch.full((3,), kind), torch.tensor([0.0, 0.4 * sign, 0.9 * sign])
    out, name = dat.operate(images, kinds, strength), dat.OPERATIONS[kind]
    change = (out - images).abs().mean((1, 2, 3))
    assert change[0] < 1e-5 < change[1] < change[2], name
    close(dat.operate(images[1:2], kinds[1:2], strength[1:2]), out[1:2], 1e-6)
    last, centre = out[2], images[2].mean()
    spread = {"contrast": lambda t: t.mean(0).std(), "colour": lambda t: t.std(dim=0).mean(),
              "sharpness": lambda t: t.diff(dim=2).abs().mean()}
    if name == "brightness":
        assert (last.mean() > centre) == (sign > 0)
    elif name in spread:
        assert (spread[name](last) > spread[name](images[2])) == (sign > 0)
    elif name == "posterise":
        assert last.unique().numel() < 32
    elif name == "solarise":
        close(last, torch.where(images[2] > 0.1, 1 - images[2], images[2]), 1e-6)
    elif name in ("move_y", "move_x"):                          # 0.27 of the side, content goes on
        axis = 1 if name == "move_y" else 2
        lost = last.flip(axis) if sign > 0 else last            # where zeros came in
        assert lost.select(axis, 0).abs().max() == 0 and last.mean() < centre
    elif name.startswith("shear"):                              # the middle line stays
        line = last.select(1 if name == "shear_x" else 2, 0)
        assert (line - images[2].select(1 if name == "shear_x" else 2, 0)).abs().mean() > 0.01
    else:                                                       # a pixel keeps its distance
        dot = torch.zeros(1, 3, 21, 21)
        dot[..., 10, 18] = 1
        turned = dat.operate(dot, kinds[:1], strength[2:])[0, 0]
        y, x = ((turned * where).sum() / turned.sum() - 10 for where in torch.meshgrid(
            torch.arange(21.), torch.arange(21.), indexing="ij"))
        assert abs(math.hypot(y, x) - 8) < 0.3 and 3 < sign * y < 5


@given(B=st.integers(1, 5), H=st.integers(1, 9), W=st.integers(1, 9), seed=st.integers(0, 99))
def test_mixed_labels_follow_the_mixed_pixels(B, H, W, seed):
    """Red if soft labels do not sum to one, or are not the shares of the pixels mixed in."""
    torch.manual_seed(seed)
    level = torch.rand(B)
    images = level.view(B, 1, 1, 1).expand(B, 3, H, W)          # each image one grey value
    mixed, soft = dat.mix(images, torch.eye(B))
    close(soft.sum(1), torch.ones(B), 1e-6)
    close(mixed.mean((1, 2, 3)), soft @ level, 1e-5)
    assert (soft >= 0).all() and (soft.count_nonzero(1) <= 2).all()


def test_mixing_cuts_boxes_and_blends():
    """Red if mixup or CutMix is never drawn, or all images of a batch get the same share."""
    torch.manual_seed(0)
    images = torch.arange(200.).remainder(2).view(-1, 1, 1, 1).expand(200, 3, 8, 8)
    mixed, soft = dat.mix(images, torch.eye(200))
    blended = ((mixed > 0) & (mixed < 1)).flatten(1).any(1)
    assert 60 < blended.sum() < 140
    assert len(soft.amax(1).unique()) > 60
    torch.manual_seed(0)
    again, _ = dat.mix(images, torch.eye(200))
    assert torch.equal(mixed, again)


@given(share=st.floats(0.01, 1), H=st.integers(4, 20), W=st.integers(4, 20))
def test_boxes_are_boxes_of_their_share(share, H, W):
    """Red if a box has holes, the wrong size, or sides swapped."""
    boxes = dat.random_boxes(torch.full((6,), share), H, W)
    assert boxes.shape == (6, 1, H, W) and boxes.dtype == torch.bool
    for box in boxes[:, 0]:
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns)
        for line, n in ((rows, H), (columns, W)):
            assert line.sum() <= share ** 0.5 * n + 1
            assert (line.int().diff() > 0).sum() <= 1           # in one piece
    assert share < 0.9 or boxes.float().mean() > 0.2


def test_augmentation_grows_with_the_budget_and_repeats():
    """Red if a strength does less than it says, changes the images' type or size, or draws from
    elsewhere than the seed; and if short runs are given the strong augmentation of long ones."""
    images = torch.randint(1, 256, (64, 3, 12, 10), dtype=torch.uint8)
    targets = F.one_hot(torch.arange(64) % 5, 5).float()
    for strength in (0, 1, 2):
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            results.append(dat.augment(images, targets, strength))
        (pixels, soft), again = results
        assert torch.equal(pixels, again[0]) and torch.equal(soft, again[1])
        assert pixels.dtype == torch.float32 and pixels.shape == images.shape
        assert 0 <= pixels.min() and pixels.max() <= 1
        assert torch.equal(soft, targets) == (strength < 2)
        grid = (pixels * 255 - (pixels * 255).round()).abs().amax((1, 2, 3)) < 1e-3
        if strength == 0:
            assert torch.equal(pixels, images / 255)
        else:
            assert grid.sum() < 40                                  # not only whole bytes
    torch.manual_seed(0)
    flat = torch.full((400, 3, 16, 16), 128, dtype=torch.uint8)
    pixels, _ = dat.augment(flat, torch.zeros(400, 5), 1)
    erased = torch.tensor([len(image.unique()) > 60 for image in pixels])
    assert 60 < erased.sum() < 140                                  # a quarter, by noise
    assert len(pixels[~erased, 0, 8, 8].unique()) > 50              # an operation for each
    assert [dat.augmentation(epochs) for epochs in (1, 59, 60, 99, 100, 300)] == [0, 0, 1, 1, 2, 2]


def test_the_last_tenth_of_a_run_is_not_mixed(tiny, monkeypatch):
    """[D8] Red if mixing goes on to the end, or a strength other than the run's is used."""
    seen, real = [], dat.augment
    monkeypatch.setattr(dat, "augment", lambda *a: seen.append(a[2]) or real(*a))
    run_cli("--train", "cifar10", "--epochs", 10, "--batch-size", 75, "--augment", 2, "--out", "o")
    assert seen == [2] * 18 + [1] * 2


def test_only_matrices_decay():
    """Red if a bias, a norm or a position table (3-D and 5-D) decays, or a parameter is lost."""
    model = DAT(small_config(position="fixed"))
    decay, rest = dat.parameter_groups(model, 0.05)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    decaying = {names[id(p)] for p in decay["params"]}
    assert all(n.endswith("weight") and "norm" not in n for n in decaying)
    assert not any(n.endswith("table") for n in decaying)
    assert len(decay["params"]) + len(rest["params"]) == len(names)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A tiny CIFAR-10 and a tiny model under the name of the CPU's default."""
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "data", train=30, test=64)
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, drop_path=0.1))
    return tmp_path


def test_training_reports_saves_and_evaluates_alike(tiny):
    """Red if a run leaves no metrics or checkpoint, or --eval finds another accuracy."""
    code, out, _ = run_cli("--train", "cifar10", "--epochs", 2, "--batch-size", 16, "--out", "o",
                           "--device", "cpu")
    assert code == 0
    for words in ("150 images to train", "64 to test", "parameters", "2 epochs of 9 steps",
                  "epoch 2/2", "images/s", "s left", "test accuracy"):
        assert words in out, words
    rows = [line.split(",") for line in Path("o/metrics.csv").read_text().splitlines()]
    assert rows[0][:4] == ["epoch", "step", "loss", "test_accuracy"] and len(rows) == 3
    assert [row[:2] for row in rows[1:]] == [["1", "9"], ["2", "18"]]
    accuracy = f"{float(rows[2][3]):.2%}"
    assert f"epoch 2/2  test accuracy {accuracy}" in out
    assert sorted(p.name for p in Path("o").iterdir()) == ["last.pt", "metrics.csv"]
    code, out, _ = run_cli("--eval", "cifar10", "--checkpoint", "o/last.pt")
    assert code == 0 and f"test accuracy {accuracy}" in out
    checkpoint = torch.load("o/last.pt", weights_only=True)
    assert checkpoint["step"] == 18 and checkpoint["seed"] == 0
    assert DATConfig(**checkpoint["config"]).classes == 10
    assert {"optimizer", "model", "history", "dataset"} <= checkpoint.keys()


def test_same_seed_same_run(tiny):
    """Red if a draw escapes the seed."""
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        assert run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--out", out,
                       "--seed", seed)[0] == 0
    a, b, c = (torch.load(f"{out}/last.pt")["model"] for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_training_learns(tiny, monkeypatch):
    """Red if gradients, labels or augmentation come apart: bright or dark is learnt in seconds."""
    images = torch.randint(0, 100, (256, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(256) % 2
    images += (labels * 120).to(torch.uint8).view(-1, 1, 1, 1)
    half = torch.full((3, 1, 1), 0.5)
    both = dat.InMemory(images=images, labels=labels)
    data = dat.Dataset(train=both, test=both, classes=("dark", "bright"), mean=half, std=half)
    monkeypatch.setattr(dat, "load_dataset", lambda name, folder, **_: data)
    run_cli("--train", "shapes", "--epochs", 2, "--batch-size", 8, "--lr", 3e-3, "--out", "o")
    assert float(Path("o/metrics.csv").read_text().split(",")[-2]) > 0.95


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, monkeypatch, stop):
    """Red if anything a step depends on is not in the checkpoint: order, draws, optimiser, rate."""
    schedule, steps = dat.learning_rate, []

    def spy(step, **kwargs):
        new = not steps or steps[-1] != step                        # two groups ask for each step
        steps.extend([step] * new)
        if new and step == stop and len(steps) == stop + 1:
            raise OSError("stop here")
        return schedule(step, **kwargs)

    run = ["--train", "cifar10", "--augment", 2]
    made = ["--epochs", 2, "--batch-size", 40, "--seed", 5, "--lr", 1e-3]       # 2 times 3 steps
    assert run_cli(*run, *made, "--out", "whole")[0] == 0
    monkeypatch.setattr(dat, "learning_rate", spy)
    assert run_cli(*run, *made, "--out", "parts")[0] == (2 if stop < 6 else 0)
    code, out, _ = run_cli(*run, "--out", "parts", "--resume")
    assert code == 0 and (f"from step {stop} on" in out or stop == 7)
    assert steps == [*range(min(stop, 5) + 1), *range(stop + (stop < 6), 6)]
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert [row[:4] for row in one["history"]] == [row[:4] for row in other["history"]]
    assert [row[0] for row in one["history"]] == [1, 2]
    for a, b in zip(*(checkpoint["optimizer"]["state"].values() for checkpoint in (one, other))):
        assert all(torch.equal(a[name], b[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    rows = [Path(f"{name}/metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [r.rsplit(",", 1)[0] for r in rows[0]] == [r.rsplit(",", 1)[0] for r in rows[1]]


def test_resuming_something_else_is_refused_by_name(tiny):
    """Red if --resume mixes two runs, needs no folder, or starts afresh where nothing is."""
    made = ["--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--out", "o"]
    assert run_cli(*made)[0] == 0
    before = Path("o/last.pt").read_bytes()
    for arguments, words in ((["--epochs", 3], ("epochs 1", "3")), (["--lr", 5e-4], ("lr", )),
                             (["--batch-size", 10], ("batch_size 50",)), (["--seed", 1], ("seed",)),
                             (["--augment", 2], ("augment",)), (["--model", "cifar"], ("cifar",)),
                             (["--train", "shapes"], ("cifar10", "shapes")),
                             (["--out", "absent"], ("absent",))):
        assert_input_error(run_cli(*made[:2], "--out", "o", "--resume", *arguments), *words)
    assert_input_error(run_cli("--train", "cifar10", "--resume"), "--out")
    assert_input_error(run_cli("--eval", "cifar10", "--checkpoint", "o/last.pt", "--resume"),
                       "--train")
    kept = torch.load("o/last.pt", weights_only=True)
    state = kept["optimizer"]["state"]
    for changes, word in (
            ({"optimizer": {"state": 3}}, "optimizer"), ({"optimizer": 5}, "optimizer"),
            ({"optimizer": {"state": {**state, 0: {"exp_avg": torch.zeros(1)}}}}, "optimizer"),
            ({"optimizer": {"state": {i: {**m, "exp_avg": torch.zeros(1)}
                                      for i, m in state.items()}}}, "optimizer"),
            ({"epochs": "abc"}, "epochs='abc'"), ({"step": -5}, "no run"),
            ({"step": 10 ** 6}, "past the end"), ({"warmup": 2.0}, "warmup=2.0"),
            ({"classes": "abc"}, "classes"), ({"classes": ("a",) * 10}, "other ones"),
            ({"clip": "x"}, "clip"),
            ({"batch_size": 0}, "no run"), ({"lr": math.nan}, "no run"),
            ({"seed": 2 ** 70}, "no run"),
            ({"augment": None}, "no run"), ({"history": [1]}, "no run"), ({"loss": "x"}, "no run"),
            ({"images": 149, "batch_size": 30}, "149 images"), ({"images": 0}, "no run"),
            ({"history": 5}, "no run")):
        torch.save({**kept, **changes}, "o/last.pt")
        assert_input_error(run_cli(*made[:2], "--out", "o", "--resume"), word)
    Path("o/last.pt").write_bytes(before)
    Path("o/metrics.csv").unlink()
    code, out, _ = run_cli(*made, "--resume")                       # done already
    assert code == 0 and len(Path("o/metrics.csv").read_text().splitlines()) == 2


@pytest.mark.parametrize("moment", ["evaluate", "update"])
def test_an_interruption_at_a_bad_moment_loses_nothing(tiny, monkeypatch, moment):
    """Red if a run interrupted in the test after an epoch loses the epoch's row, or one
    interrupted within an update saves weights of half a step."""
    made = ["--train", "cifar10", "--epochs", 2, "--batch-size", 50]
    assert run_cli(*made, "--out", "whole")[0] == 0
    if moment == "evaluate":
        owner, name, last = dat, "evaluate", 2
    else:
        owner, name, last = torch.optim.AdamW, "step", 5
    calls, real = [], getattr(owner, name)

    def interrupted(*args):
        result = real(*args)
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as context:
        context.setattr(owner, name, interrupted)
        assert run_cli(*made, "--out", "parts")[0] == 130
    assert run_cli("--train", "cifar10", "--out", "parts", "--resume")[0] == 0
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert [row[:4] for row in one["history"]] == [row[:4] for row in other["history"]]


def test_a_checkpoint_that_cannot_be_written_is_tried_once(tiny, monkeypatch):
    """Red if a full disk is met again and again, or hidden, or the message names another step than
    the one that last.pt holds."""
    real, made = dat.write_atomically, ("--train", "cifar10", "--epochs", 1, "--batch-size", 50)
    for number, (left, step, kept) in enumerate((
            (0, 0, ""), (1, 0, ""), (2, 3, "; last.pt of step 0 stays"),
            (4, 3, "; last.pt of step 3 stays"))):
        calls = []

        def full(path, write):
            calls.append(path)
            if len(calls) > left:
                raise OSError(28, "No space left on device")
            real(path, write)

        monkeypatch.setattr(dat, "write_atomically", full)
        assert_input_error(run_cli(*made, "--out", f"o{number}"), f"o{number}/ cannot take step "
                           f"{step} ([Errno 28] No space left on device){kept}\n")
        assert len(calls) == left + 1


def test_metrics_hold_the_mean_loss_of_an_epoch(tiny, monkeypatch):
    """Red if the sum of an epoch's losses runs on into the next, or misses a part of a batch."""
    losses, real = [], dat.Training.part_loss

    def spy(*args):
        loss, accuracy = real(*args)
        losses.append(loss.item())
        return loss, accuracy

    monkeypatch.setattr(dat.Training, "part_loss", spy)
    run_cli("--train", "cifar10", "--epochs", 2, "--batch-size", 50, "--accumulate", 2, "--out",
            "o")
    names, *rows = (row.split(",") for row in Path("o/metrics.csv").read_text().split())
    assert names == list(dat.METRICS) and [row[:2] for row in rows] == [["1", "3"], ["2", "6"]]
    for row, part in zip(rows, (losses[:6], losses[6:])):
        assert float(row[2]) == pytest.approx(sum(part) / 6, rel=1e-5)


def test_eval_computes_as_the_run_did(tiny, monkeypatch):
    """Red if --eval of a checkpoint trained with --float32 takes bfloat16: another figure."""
    asked, real = [], dat.compute_dtype
    monkeypatch.setattr(dat, "compute_dtype", lambda device, float32: asked.append(float32)
                        or real(device, float32))
    run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--float32", "--out", "o")
    run_cli("--eval", "cifar10", "--checkpoint", "o/last.pt")
    run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--out", "p")
    run_cli("--eval", "cifar10", "--checkpoint", "p/last.pt")
    assert asked == [True, True, False, False]


def test_a_long_epoch_is_saved_on_the_way(tiny, monkeypatch):
    """Red if a run that is killed can lose more than the last minutes, however long an epoch is."""
    steps, real = [], torch.save
    monkeypatch.setattr(torch, "save", lambda saved, file: steps.append(saved["step"])
                        or real(saved, file))
    for minutes, expected in ((10, [0, 3, 3]), (0, [0, 1, 2, 3, 3, 3])):
        monkeypatch.setattr(dat, "MINUTES", minutes)
        steps.clear()
        assert run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50)[0] == 0
        assert steps == expected                                    # the last ones around the test


def test_a_loss_that_is_not_finite_stops_the_run(tiny, monkeypatch):
    """Red if a diverged run goes on, hides where, or overwrites its last good checkpoint."""
    real = dat.augment

    def poison(images, targets, strength):
        poison.calls += 1
        images, targets = real(images, targets, strength)
        return (images * math.nan if poison.calls == 5 else images), targets

    poison.calls = 0
    monkeypatch.setattr(dat, "augment", poison)
    result = run_cli("--train", "cifar10", "--epochs", 9, "--batch-size", 50, "--out", "o")
    rate = dat.learning_rate(4, steps=27, warmup=6, peak=2e-3, floor=0.01)
    assert_input_error(result, f"step 5, learning rate {rate:g}", "norm nan", "o/last.pt")
    checkpoint = torch.load("o/last.pt", weights_only=True)
    assert checkpoint["step"] == 3                                  # the first epoch's end
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_usable_checkpoint(tiny, number):
    """Red if Ctrl-C loses the run, leaves a half-written file, or exits as if all were well."""
    code = ("import dat, test_dat; dat.VARIANTS['cifar-nano'] = test_dat.small_config(patch=4); "
            "raise SystemExit(dat.main(['--train', 'cifar10', '--epochs', '100000', "
            "'--batch-size', '50', '--out', 'o', '--device', 'cpu']))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(HERE)})
    try:
        line = "started"
        while line and "test accuracy" not in line:
            line = process.stdout.readline()
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number and f"signal {int(number)}" in rest
    assert sorted(p.name for p in Path("o").iterdir()) == ["last.pt", "metrics.csv"]
    code, out, _ = run_cli("--eval", "cifar10", "--checkpoint", "o/last.pt")
    assert code == 0 and "test accuracy" in out


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError("No space left on device")])
def test_an_error_between_epochs_leaves_a_checkpoint_of_its_step(tiny, monkeypatch, error):
    """Red if an epoch's work is lost when output or something else fails within it."""
    schedule = dat.learning_rate

    def failing(step, **kwargs):
        if step == 5:
            raise error
        return schedule(step, **kwargs)

    monkeypatch.setattr(dat, "learning_rate", failing)
    monkeypatch.setattr(dat.os, "dup2", lambda *_: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    arguments = ["--train", "cifar10", "--epochs", "2", "--batch-size", "50", "--out", "o"]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = dat.main(arguments)
    assert code == (141 if isinstance(error, BrokenPipeError) else 2)
    assert err.getvalue() == ("" if code == 141 else "dat.py: No space left on device\n")
    assert torch.load("o/last.pt", weights_only=True)["step"] == 5


def test_a_killed_run_is_resumed_as_if_nothing_had_been(tiny):
    """Red if kill -9 at a random moment leaves a checkpoint that cannot be read or resumed, or if
    the resumed run ends elsewhere than an undisturbed one."""
    code = ("import sys, dat, test_dat as test; "
            "dat.VARIANTS['cifar-nano'] = test.small_config(patch=4); "
            "sys.exit(dat.main(['--train', 'cifar10', '--device', 'cpu', *sys.argv[1:]]))")
    made = ["--epochs", "25", "--batch-size", "30"]
    run = [sys.executable, "-c", code, "--out"]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    subprocess.run([*run, "whole", *made], check=True, capture_output=True, env=environment)
    generator = np.random.default_rng(0)
    for attempt in range(3):
        process = subprocess.Popen([*run, "o", *(["--resume"] if attempt else made)], text=True,
                                   stdout=subprocess.PIPE, env=environment)
        line = "started"
        while line and "test accuracy" not in line:                 # an epoch is done, then ..
            line = process.stdout.readline()
        time.sleep(generator.uniform(0, 0.3))                       # .. in the middle of anything
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        _, checkpoint = dat.load_checkpoint("o/last.pt", "step")
        assert 0 < checkpoint["step"] < 125
    subprocess.run([*run, "o", "--resume"], check=True, capture_output=True, env=environment)
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "o"))
    assert other["step"] == 125 and [row[:4] for row in one["history"]] == [
        row[:4] for row in other["history"]]
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert sorted(p.name for p in Path("o").iterdir()) == ["last.pt", "metrics.csv"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    """Red if a checkpoint is written in place: a full disk would destroy the one before."""
    target = tmp_path / "last.pt"
    dat.write_atomically(target, lambda path: path.write_text("old"))

    def fail(path):
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        dat.write_atomically(target, fail)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    os.link(target, tmp_path / "reader")                            # whoever has the old one open
    dat.write_atomically(target, lambda path: path.write_text("new"))
    assert target.read_text() == "new" and (tmp_path / "reader").read_text() == "old"


def test_checkpoints_of_strangers_run_nothing_and_end_in_one_line(tiny):
    """Red if a pickle is executed, or a file that does not fit ends in a traceback."""
    class Payload:
        def __reduce__(self):
            return (Path.write_text, (Path("pwned"), "x"))

    torch.save(Payload(), "pickle.pt")
    torch.save({"model": {}}, "other.pt")
    torch.save({"config": asdict(small_config()), "model": {}}, "empty.pt")
    torch.save({"config": {"stages": 3}, "model": {}}, "config.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    Path("noise.pt").write_bytes(os.urandom(500))
    model = DAT(small_config())
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, "classes.pt")
    for file, word in (("pickle.pt", "plain values"), ("other.pt", "config"), ("noise.pt", ""),
                       ("tensor.pt", "holds a Tensor"), ("empty.pt", "missing, unknown"),
                       ("config.pt", "stages"),
                       ("absent.pt", "No such file"), ("classes.pt", "5 classes")):
        assert_input_error(run_cli("--eval", "cifar10", "--checkpoint", file), file, word)
    assert not Path("pwned").exists()


@pytest.fixture(scope="module")
def saved_bytes():
    model, file = DAT(small_config()), io.BytesIO()
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, file)
    return file.getvalue()


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_checkpoint_is_an_input_error_or_loads(saved_bytes, tmp_path_factory, data):
    """Red if random edits, cuts or noise end in anything but one clear error or a whole model."""
    content = bytearray(saved_bytes)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[:data.draw(st.sampled_from([len(content), len(content) // 2, 40]))]
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    try:
        model, _ = dat.load_checkpoint(str(path))
        assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    except dat.InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_a_huge_declared_model_is_refused_without_building_it(tmp_path, monkeypatch):
    """Red if a small file can make the program reserve terabytes, or a half one is not read."""
    model = DAT(small_config())
    config = asdict(model.config)
    config["stages"][0]["dim"] = 2 ** 25
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "huge.pt")
    with pytest.raises(dat.InputError, match="another shape"):
        dat.load_checkpoint(str(tmp_path / "huge.pt"))
    good = model.state_dict()
    weight = good["head.weight"]
    for odd in (torch.zeros(1, 1).expand_as(weight), torch.empty_like(weight, device="meta"),
                weight.to_sparse(), [1]):
        torch.save({"config": asdict(model.config), "model": {**good, "head.weight": odd}},
                   tmp_path / "odd.pt")
        try:
            loaded, _ = dat.load_checkpoint(str(tmp_path / "odd.pt"))
        except dat.InputError:
            continue
        assert loaded.head.weight.is_contiguous() and loaded.head.weight.device.type == "cpu"
    stage = StageConfig(dim=512, heads=2, blocks="L")
    large = DAT(small_config(stages=(stage,)))
    torch.save({"config": asdict(large.config), "model": {
        name: torch.zeros(()).expand(t.shape) for name, t in large.state_dict().items()}},
        tmp_path / "lies.pt")
    with pytest.raises(dat.InputError, match="declares more"):
        dat.load_checkpoint(str(tmp_path / "lies.pt"))
    torch.save({"config": asdict(model.config), "model": model.half().state_dict()},
               tmp_path / "half.pt")
    loaded, _ = dat.load_checkpoint(str(tmp_path / "half.pt"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())


# ============================================================ image folders


def write_folder(root, train=6, val=4, size=(40, 30)):
    """A small image folder: three classes by brightness, JPEGs of `size` (width, height)."""
    from PIL import Image
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(("dark", "grey", "pale")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(80 * label, 80 * label + 60, (size[1], size[0], 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.JPEG")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small image folder and a small patch model under the name of dat-t."""
    monkeypatch.chdir(tmp_path)
    small = small_config(patch=4, image_size=32, classes=7)
    for name in ("dat-t", "dat-b", "dat-b-384"):
        monkeypatch.setitem(dat.VARIANTS, name, small)
    return write_folder(tmp_path / "images")


FOLDER_RUN = ("--train", "imagenet", "--data", "images", "--batch-size", 4, "--workers", 0,
              "--device", "cpu")


def test_training_on_a_folder_of_images_evaluates_alike(folder):
    """Red if classes are mixed up, --eval transforms otherwise than training's test, or top-5 is
    not the best five."""
    from PIL import Image
    code, out, err = run_cli(*FOLDER_RUN, "--epochs", 2, "--out", "o")
    assert code == 0 and "18 images to train on, 12 to test on, 3 classes" in out and not err
    assert "dat-t" in out and "a core decodes" in out
    accuracy = re.findall(r"test accuracy [\d.]+%", out)[-1]
    assert torch.load("o/last.pt", weights_only=True)["classes"] == ("dark", "grey", "pale")
    shutil.rmtree(folder / "train")
    code, out, _ = run_cli("--eval", "imagenet", "--data", folder, "--checkpoint", "o/last.pt")
    assert code == 0 and accuracy in out
    (folder / "val/dark").rename(folder / "val/zebra")
    assert_input_error(run_cli("--eval", "imagenet", "--data", folder, "--checkpoint", "o/last.pt"),
                       "other classes")
    Image.new("RGB", (9, 9)).save("one.png")
    assert run_cli("--draw", "one.png", "--checkpoint", "o/last.pt")[0] == 0


def test_a_run_on_a_folder_resumes_bit_for_bit(folder, monkeypatch):
    """Red if crops, order or draws depend on anything but seed, epoch and image."""
    seen, real = [], dat.read_photo
    with monkeypatch.context() as context:
        context.setattr(dat, "read_photo", lambda *a: seen.append(a) or real(*a))
        assert run_cli(*FOLDER_RUN, "--epochs", 2, "--augment", 2, "--out", "whole")[0] == 0
    draws = [a[2] for a in seen if a[2]]
    assert len(draws) == len(set(draws)) == 32                      # another cut in each epoch
    schedule = dat.learning_rate

    def failing(step, **kwargs):
        if step == 2:
            raise OSError("stop here")
        return schedule(step, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(dat, "learning_rate", failing)
        assert run_cli(*FOLDER_RUN, "--epochs", 2, "--augment", 2, "--out", "parts")[0] == 2
    assert_input_error(run_cli(*FOLDER_RUN, "--out", "parts", "--resume", "--image-size", 16), "16")
    Path("parts/last.pt.77.part").write_bytes(b"half")
    Path("parts/metrics.csv.77.part").write_bytes(b"half")
    assert run_cli(*FOLDER_RUN, "--out", "parts", "--resume", "--workers", 2)[0] == 0
    assert sorted(p.name for p in Path("parts").iterdir()) == ["last.pt", "metrics.csv"]
    one, other = (torch.load(f"{name}/last.pt", weights_only=True) for name in ("whole", "parts"))
    assert one["step"] == 8
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def photo(path, mode="RGB", size=(64, 48), **options):
    """An image whose red is the column and whose green is the row, in 255ths."""
    from PIL import Image
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    pixels = np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return str(path)


def test_the_middle_of_a_photo_is_the_releases(tmp_path):
    """Red if the side before cropping, the filter or the margin differs: 256 and 224, 438, 384."""
    from PIL import Image
    path = photo(tmp_path / "a.png", size=(300, 200))
    for size, side, margin in ((224, 256, 16), (384, 438, 27)):
        image = Image.open(path).resize((side, side), Image.Resampling.BICUBIC)
        expected = np.asarray(image)[margin:margin + size, margin:margin + size]
        assert np.array_equal(dat.read_photo(path, size).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_random_parts_of_a_photo_have_the_releases_sizes(tmp_path, kind):
    """Red if area, aspect or place are drawn wrongly, a crop leaves the image, the mirror is stuck,
    or a JPEG decoded at a smaller scale is cut at the wrong place."""
    path = photo(tmp_path / f"a.{kind}", size=(640, 480))
    areas, aspects, mirrored, places = [], [], 0, []
    for seed in range(300):
        pixels = dat.read_photo(path, 32, f"0 0 {seed}").float() / 255
        red, green = pixels[0].mean(0), pixels[1].mean(1)           # column, row in [0, 1]
        mirrored += bool(red[0] > red[-1])
        w, h = (31.5 / 30 * (line[-2] - line[1]).abs().item() * 32 / 31 for line in (red, green))
        areas.append(w * h)
        aspects.append(w * 640 / (h * 480))
        places.append((red.mean().item(), green.mean().item()))
        assert (pixels[2] < 0.02).all() and red.diff().sign().sum().abs() > 20
    assert 0.06 < min(areas) < 0.13 and 0.9 < max(areas) < 1.1 and 0.4 < np.mean(areas) < 0.6
    assert 0.68 < min(aspects) < 0.82 and 1.2 < max(aspects) < 1.5
    assert 110 < mirrored < 190
    spread = np.array(places)
    assert (spread.min(0) < 0.3).all() and (spread.max(0) > 0.7).all()
    assert torch.equal(dat.read_photo(path, 32, "a"), dat.read_photo(path, 32, "a"))


def test_a_large_jpeg_is_decoded_small(tmp_path, monkeypatch):
    """Red if the decoder's own scaling is not used, or used so far that pixels are missing."""
    from PIL import Image
    path, sizes = photo(tmp_path / "a.jpg", size=(800, 600)), []
    real = Image.Image.resize

    def spy(self, size, resample, box):
        sizes.append((self.size, box))
        return real(self, size, resample, box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    for seed in range(40):
        dat.read_photo(path, 64, str(seed))
    assert {size for size, _ in sizes} == {(100, 75), (200, 150), (400, 300)}
    for (width, height), (left, top, right, bottom) in sizes:
        assert right - left >= 63 and bottom - top >= 63 or width == 800
        assert 0 <= left < right <= width + 1e-6 and 0 <= top < bottom <= height + 1e-6


def test_what_cannot_be_read_is_named_counted_and_has_no_say(folder, monkeypatch):
    """Red if a bad file ends the run, is named twice, is counted as an image, or pulls on the
    weights; and if a grey, CMYK, palette or thin one is taken for bad."""
    from PIL import Image
    for name, mode in (("grey.jpg", "L"), ("cmyk.jpg", "CMYK"), ("palette.png", "P"),
                       ("alpha.png", "RGBA")):
        photo(folder / "train/dark" / name, mode)
    photo(folder / "train/dark/thin.png", size=(1, 50))
    photo(folder / "train/dark/flat.jpg", size=(50, 1))
    whole = (folder / "train/dark/0.JPEG").read_bytes()
    (folder / "train/dark/cut.JPEG").write_bytes(whole[:len(whole) // 2])
    (folder / "train/dark/empty.JPEG").write_bytes(b"")
    (folder / "val/pale/noise.JPEG").write_bytes(os.urandom(3000))
    Image.fromarray(np.full((5, 5), 7_000, np.uint16)).save(folder / "train/dark/deep.png")
    targets, real = [], dat.augment
    monkeypatch.setattr(dat, "augment", lambda *a: targets.append((a[0], a[1])) or real(*a))
    code, out, err = run_cli(*FOLDER_RUN, "--epochs", 2, "--batch-size", 9, "--out", "o")
    assert code == 0, err
    for name in ("cut.JPEG", "empty.JPEG", "deep.png", "noise.JPEG"):
        assert err.count(f"{name} cannot") == 1, err
    assert err.count("left out") == 4 and "unreadable images left out: 4" in out
    silent = 0
    for images, rows in targets:
        black = (images == 0).flatten(1).all(1)
        assert torch.equal(rows.sum(1) == 0, black)
        assert torch.allclose(rows.sum(1)[~black], torch.ones(()))
        silent += int(black.sum())
    assert silent in (5, 6)                                         # 27 images, 3 bad, 2 epochs
    code, out, err = run_cli("--eval", "imagenet", "--data", folder, "--checkpoint", "o/last.pt")
    assert code == 0 and "left out: 1" in out and err.count("noise.JPEG cannot") == 1
    assert int(re.search(r"accuracy ([\d.]+)%", out)[1].replace(".", "")) in [
        round(10000 * n / 12) for n in range(13)]                   # of 12, not of 13


def test_a_run_whose_images_vanish_stops_and_keeps_its_checkpoint(folder, monkeypatch):
    """Red if a lost disk trains on black images, or names a million files one by one."""
    real = dat.learning_rate

    def lose(step, **kwargs):
        if step == 6 and folder.exists():
            folder.rename("elsewhere")
        return real(step, **kwargs)

    monkeypatch.setattr(dat, "learning_rate", lose)
    assert_input_error(run_cli(*FOLDER_RUN, "--epochs", 3, "--out", "o"), "is it still there")
    assert torch.load("o/last.pt", weights_only=True)["step"] == 6


def test_a_test_of_unreadable_images_alone_is_an_error(folder):
    """Red if a test on nothing divides by zero or reports an accuracy."""
    for file in (folder / "val").rglob("*.JPEG"):
        file.unlink() if file.stem != "0" else file.write_bytes(b"")
    code, _, err = run_cli(*FOLDER_RUN, "--epochs", 1, "--out", "o")
    assert code == 2 and "none of the test images" in err.splitlines()[-1]


@pytest.mark.parametrize("error", [SyntaxError, NotImplementedError, OSError, KeyError])
def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch, error):
    """Red if a stranger's file can end a run; formats that start other programs are not opened."""
    from PIL import Image
    path = photo(tmp_path / "a.png")
    Image.open(path).save(tmp_path / "b.eps")
    with pytest.raises(ValueError, match="b.eps cannot be read"):
        dat.read_photo(str(tmp_path / "b.eps"), 8)

    def fail(*_):
        raise error("odd")

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ValueError, match="a.png cannot be read.*odd"):
        dat.read_photo(path, 8)


def test_a_narrow_photo_is_not_squeezed(tmp_path):
    """Red if an image in which no part of 3:4 to 4:3 fits is taken as a whole."""
    path = photo(tmp_path / "a.png", size=(800, 4))
    for seed in range(5):
        red = dat.read_photo(path, 8, str(seed))[0]
        assert int(red.max()) - int(red.min()) < 4


def test_accuracy_counts_the_best_and_the_best_five():
    """Red if top-5 is top-1 or counts other than the five best."""
    class Ranks(nn.Module):
        def forward(self, images):
            label = (images[:, 0, 0, 0] * 255).round().long()
            ranks = torch.arange(12.).expand(len(images), 12).neg().clone()     # class 0 is best
            return ranks.roll(1, 1) if label.max() > 12 else ranks

    half = dat.InMemory(images=torch.zeros(12, 3, 2, 2, dtype=torch.uint8), labels=torch.arange(12))
    data = dat.Dataset(train=None, test=half, classes=tuple("abcdefghijkl"),
                       mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    result = dat.evaluate(Ranks(), data, torch.float32)
    assert result == (1 / 12, 5 / 12, 0) and "top-5 41.67%" in str(result)


def test_signals_are_noted_and_ignored_ones_stay_ignored(monkeypatch):
    """Red if nohup is undone, a repeated signal loses the step, or a second Ctrl-C never acts."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with dat.catch_signals() as caught:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert caught == [15, 15, 2, 2]
            now = time.monotonic() + 2
            monkeypatch.setattr(dat.time, "monotonic", lambda: now)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_to_workers_too_saves_the_step(folder):
    """Red if workers die of the signal that the run is to end its step with."""
    code = ("import sys, dat, test_dat as test; "
            "dat.VARIANTS['dat-t'] = test.small_config(patch=4, image_size=32); "
            "sys.exit(dat.main(sys.argv[1:]))")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, FOLDER_RUN), "--workers", "2", "--epochs", "9999",
         "--out", "o"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE)}, start_new_session=True)
    try:
        line = "started"
        while line and "test accuracy" not in line:
            line = process.stdout.readline()
        time.sleep(0.4)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and err == "", (out, err)
    step = torch.load("o/last.pt", weights_only=True)["step"]
    assert f"stopped after step {step}, o/last.pt has step {step}" in out


@pytest.mark.parametrize("change, words", [
    (lambda root: shutil.rmtree(root / "train"), ("train", "no folder")),
    (lambda root: shutil.rmtree(root / "val"), ("val", "no folder")),
    (lambda root: shutil.rmtree(root / "val/pale"), ("other classes", "pale")),
    (lambda root: shutil.rmtree(root / "train/grey"), ("other classes", "grey")),
    (lambda root: (root / "train/new").mkdir(), ("train/new", "no image")),
    (lambda root: [p.unlink() for p in (root / "val/dark").iterdir()], ("val/dark", "no image")),
    (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], ("train", "class"))])
def test_a_folder_that_is_not_whole_is_refused_before_training(folder, change, words):
    """Red if training starts on a folder that lacks something, or the error does not name it."""
    (folder / "val/.hidden").mkdir()
    (folder / "train/dark/._0.JPEG").write_bytes(b"")               # what other systems leave
    change(folder)
    assert_input_error(run_cli(*FOLDER_RUN, "--out", "o"), *words)
    assert not Path("o").exists()


def test_a_folder_without_permission_is_refused_before_training(folder, monkeypatch):
    """Red if files that may not be read are left out one by one, for days."""
    monkeypatch.setattr(dat.os, "access", lambda path, mode: "val/grey" not in str(path))
    assert_input_error(run_cli(*FOLDER_RUN, "--out", "o"), "val/grey", "permission")


def test_workers_give_what_one_process_gives(folder):
    """Red if what a worker cuts depends on which worker it is, or batches come out of order."""
    batches = []
    for workers in (0, 2):
        data = dat.load_folder(str(folder), size=16, workers=workers)
        parts = torch.arange(18).flip(0).split(5)
        batches.append([*data.train.batches(parts, "0 1"), *data.test.batches(parts[-2:])])
    for (images, labels), (others, again) in zip(*batches, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, again)
        assert images.shape[1:] == (3, 16, 16) and images.dtype == torch.uint8
    assert batches[0][0][1].tolist() == [2] * 5
    other = next(dat.load_folder(str(folder), size=16, workers=0).train.batches(
        [torch.arange(5)], "0 2"))[0]
    same = next(dat.load_folder(str(folder), size=16, workers=0).train.batches(
        [torch.arange(5)], "0 1"))[0]
    assert not torch.equal(other, same)


def publish(model, path, **beside):
    """Saves a model the way the authors do."""
    state = {}
    for name, (shape, ours) in dat._official_layout(model).items():
        if name.endswith("relative_position_bias_table"):
            state[name] = ours.detach().flatten(1).T.contiguous()
        else:
            state[name] = torch.zeros(shape) if ours is None else ours.detach().view(shape)
    torch.save({"model": state, **beside}, path)


def test_published_checkpoints_are_evaluated_drawn_and_told_apart(folder, monkeypatch):
    """Red if the authors' file needs anything but its name, their settings beside the weights stop
    it, its geometry is not theirs, or a wrong variant is taken."""
    yacs = type(sys)("yacs.config")

    class CfgNode(dict):
        pass

    CfgNode.__module__, CfgNode.__qualname__, yacs.CfgNode = "yacs.config", "CfgNode", CfgNode
    monkeypatch.setitem(sys.modules, "yacs", type(sys)("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    settings = CfgNode(MODEL=CfgNode(NAME="t"), LR=0.1)
    settings.__dict__["__immutable__"] = True
    stages = dat.VARIANTS["dat-t"].stages
    larger = replace(dat.VARIANTS["dat-t"], stages=(replace(stages[0], window=4), stages[1]),
                     classes=3)
    monkeypatch.setitem(dat.VARIANTS, "dat-b-384", replace(larger, classes=1000))
    model = randomise(DAT(replace(larger, geometry="release"))).float()
    publish(model, "theirs.pth", config=settings, max_accuracy=82.0)
    data = dat.load_folder(str(folder), size=32, workers=0)
    expected = dat.evaluate(model, data, dat.compute_dtype(torch.device("cpu")))
    code, out, err = run_cli("--eval", "imagenet", "--data", folder, "--checkpoint", "theirs.pth")
    assert code == 0 and f"{expected[0]:.2%}" in out, err
    loaded, _ = dat.load_checkpoint("theirs.pth")
    assert loaded.config == model.config
    assert run_cli("--draw", folder / "val/dark/0.JPEG", "--checkpoint", "theirs.pth")[0] == 0
    state = torch.load("theirs.pth", weights_only=False)["model"]
    state["cls_norm.norm.weight"] = torch.zeros(5)
    torch.save({"model": state}, "wrong.pth")
    assert_input_error(run_cli("--eval", "imagenet", "--data", folder, "--checkpoint", "wrong.pth"),
                       "wrong.pth", "is")


def test_fine_tuning_resizes_tables_and_renews_a_head_of_other_classes(folder, monkeypatch):
    """Red if a table is cut or started anew instead of resized, geometry is lost, other weights
    are not taken over, or the release's recipe is not used."""
    small = dat.VARIANTS["dat-t"]
    larger = replace(small, image_size=48, stages=tuple(replace(s, window=4) for s in small.stages))
    source = randomise(DAT(replace(small, geometry="release", classes=3))).float()
    publish(source, "theirs.pth")
    monkeypatch.setitem(dat.VARIANTS, "dat-b-384", larger)
    monkeypatch.setattr(dat, "evaluate", lambda *_: dat.Result(0.0, 0.0, 0))
    code, out, _ = run_cli(*FOLDER_RUN, "--finetune", "theirs.pth", "--model", "dat-b-384",
                           "--epochs", 1, "--lr", 1e-12, "--out", "o")
    assert code == 0
    model, found = dat.load_checkpoint("o/last.pt")
    assert model.config == replace(larger, geometry="release", classes=3)
    assert (found["weight_decay"], found["warmup"], found["floor"]) == (1e-8, 0.0, 1 / 20)
    state, old = model.state_dict(), source.state_dict()
    for name, value in state.items():
        expected = old[name]
        if name.endswith("table"):
            expected = dat.resize(expected, value.shape[-2:])
            assert value.shape != old[name].shape
        close(value, expected, 1e-6)
    wide = dat.adapt(source, replace(small, classes=4, geometry="release")).state_dict()
    assert wide["head.weight"].shape[0] == 4
    assert torch.equal(wide["stem.conv.weight"], old["stem.conv.weight"])
    with pytest.raises(ValueError, match="--finetune.*stem.conv"):
        dat.adapt(source, small_config(stem="conv"))
    assert_input_error(run_cli("--train", "cifar10", "--finetune", "theirs.pth"), "imagenet")


@pytest.mark.parametrize("model, finetune, batch, expected", [
    ("dat-t", False, None, (300, 1024, 1e-3, 20, 5.0, 0.05, 1e-6, 1e-5)),
    ("dat-s", False, 512, (300, 512, 5e-4, 20, 5.0, 0.05, 5e-7, 5e-6)),
    ("dat-b", False, 512, (300, 512, 4e-4, 50, 1.0, 0.05, 5e-7, 5e-6)),
    ("dat-b-384", True, None, (30, 512, 2e-6, 0, 5.0, 1e-8, 2e-6, 1e-7))])
def test_recipes_are_the_releases(model, finetune, batch, expected):
    """Red if a rate, its scaling by the batch, warm-up, clipping or decay departs untold."""
    found = dat.recipe("imagenet", model, batch_size=batch, finetune=finetune)
    found.setdefault("augment", dat.augmentation(found["epochs"]))
    run = dat.Run(dataset="imagenet", images=102_400, classes=("a",), **found)
    rates = [run.rate(step) for step in range(run.steps + 1)]
    assert (run.epochs, run.batch_size, run.lr, rates.index(max(rates)) / run.per_epoch, run.clip,
            run.weight_decay, rates[0], rates[-1]) == pytest.approx(expected)
    assert run.augment == 2


# ============================================================ several processes


def unrandom(monkeypatch=None):
    """Takes away all that is drawn in a step, so that a batch may be cut in any way."""
    put = monkeypatch.setattr if monkeypatch else setattr
    put(dat, "crop_and_flip", lambda images: images)
    put(dat, "augment", lambda images, targets, strength: (images / 255, targets))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(count, *arguments, code=""):
    """Runs `count` processes of the command line with a tiny model, as torchrun would start them.

    Their exit codes, outputs and errors.
    """
    program = ("import os, signal, sys, dat, test_dat as test\n"
               f"dat.VARIANTS['cifar-nano'] = test.small_config(patch=4)\n{code}\n"
               "sys.exit(dat.main(sys.argv[1:]))")
    running, port = [], free_port()
    for rank in range(count):
        env = {**os.environ, "PYTHONPATH": str(HERE), "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments), "--device", "cpu"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env))
    try:
        found = [process.communicate(timeout=200) for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], *zip(*found)


def test_two_processes_train_as_one(tiny, monkeypatch):
    """Red if gradients are summed instead of averaged, a sample is seen twice or by nobody, the
    test counts one twice, two logs are written, or draws depend on more than the part."""
    run = ["--train", "cifar10", "--epochs", 2, "--batch-size", 30, "--float32"]
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4))
    codes, outs, errs = together(2, *run, "--augment", 2, "--out", "two")
    assert codes == [0, 0], errs
    assert "test accuracy" in outs[0] and "on 2 x cpu" in outs[0] and outs[1] == ""
    assert run_cli(*run, "--augment", 2, "--accumulate", 2, "--out", "one")[0] == 0
    plain = ("test.unrandom()\n"
             "clip = dat.nn.utils.clip_grad_norm_\n"
             "def record(parameters, norm):\n"
             "    parameters, path = list(parameters), os.environ['RANK'] + '.grad'\n"
             "    if not os.path.exists(path):\n"
             "        dat.torch.save([p.grad for p in parameters], path)\n"
             "    return clip(parameters, norm)\n"
             "dat.nn.utils.clip_grad_norm_ = record")
    assert together(2, *run, "--out", "plain2", code=plain)[0] == [0, 0]
    unrandom(monkeypatch)
    first, second = (torch.load(f"{name}.grad") for name in "01")
    alone, clip = [], nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        alone.extend(() if alone else [p.grad.clone() for p in parameters])
        return clip(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", record)
    assert run_cli(*run, "--out", "plain1")[0] == 0
    for gradients in zip(alone, first, second, strict=True):
        assert torch.equal(gradients[1], gradients[2])
        close(gradients[0], gradients[1], 1e-6)
    for names, tolerance in ((("one", "two"), 1e-6), (("plain1", "plain2"), 1e-4)):
        one, two = (torch.load(f"{name}/last.pt", weights_only=True) for name in names)
        assert one["step"] == two["step"] == 10
        for name, value in one["model"].items():
            other = two["model"][name]
            if name.endswith("k.bias"):                             # its gradient is rounding alone
                continue
            if name.endswith("qkv.bias"):
                value, other = (v.view(3, -1)[::2] for v in (value, other))
            close(value, other, tolerance)
        for a, b in zip(one["history"], two["history"], strict=True):
            assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], abs=1e-4) and a[3] == b[3]


def test_a_test_shared_by_processes_counts_each_image_once(tiny):
    """Red if a part of the test set is padded, left out, or not added up."""
    model = DAT(small_config(patch=4, classes=10))
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, "m.pt")
    write_cifar(tiny / "odd", train=2, test=37)
    run = ["--eval", "cifar10", "--data", "odd", "--checkpoint", "m.pt", "--float32"]
    (alone,), (out,), _ = together(1, *run)
    codes, outs, _ = together(3, *run)
    assert alone == 0 and codes == [0, 0, 0] and outs == (out, "", "")


def test_two_processes_share_a_folder_and_what_cannot_be_read(folder):
    """Red if a bad file is counted by one process alone, or the two get out of step over it."""
    for name in ("train/dark/bad.JPEG", "val/grey/bad.JPEG", "val/pale/worse.JPEG"):
        (folder / name).write_bytes(b"no image")
    program = "dat.VARIANTS['dat-t'] = test.small_config(patch=4, image_size=32)"
    codes, outs, errs = together(2, *FOLDER_RUN, "--epochs", 2, "--batch-size", 6, "--out", "o",
                                 code=program)
    assert codes == [0, 0] and "19 images to train on, 14 to test on" in outs[0], errs
    assert "unreadable images left out: 3" in outs[0] and outs[1] == ""
    assert sum(err.count("left out") for err in errs) in (2, 3, 4)  # one may not come in an epoch
    found = torch.load("o/last.pt", weights_only=True)
    assert found["parts"] == 2 and found["step"] == 6


def test_a_process_that_dies_ends_all_with_its_error(tiny):
    """Red if the others wait for the dead one, or its error is lost."""
    program = (
        "import os, sys, dat, test_dat as test\n"
        "dat.VARIANTS['cifar-nano'] = test.small_config(patch=4)\n"
        "schedule = dat.learning_rate\n"
        "def failing(step, **kwargs):\n"
        "    if step == 4 and os.environ['RANK'] == '1':\n"
        "        raise OSError('the cable was pulled')\n"
        "    return schedule(step, **kwargs)\n"
        "dat.learning_rate = failing\n"
        "sys.exit(dat.main(sys.argv[1:]))\n")
    Path("program.py").write_text(program)
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         str(free_port()), "program.py", "--train", "cifar10", "--epochs", "500", "--batch-size",
         "50", "--device", "cpu", "--out", "o"], text=True, capture_output=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert result.returncode != 0 and "dat.py: the cable was pulled" in result.stderr
    assert torch.load("o/last.pt", weights_only=True)["step"] >= 3


def test_parts_of_a_batch_add_up_to_its_gradient(tiny, monkeypatch):
    """Red if --accumulate weighs parts wrongly, keeps gradients from one step to the next, or
    accepts parts that are not equal."""
    unrandom(monkeypatch)
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4))
    gradients, real = [], nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return real(parameters, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", record)
    run = ["--train", "cifar10", "--epochs", 1, "--batch-size", 75, "--float32", "--lr", 1e-9]
    assert run_cli(*run, "--out", "a")[0] == 0 and run_cli(*run, "--accumulate", 3)[0] == 0
    assert len(gradients) == 4
    for whole, parts in zip(gradients[:2], gradients[2:]):
        for a, b in zip(whole, parts):
            close(a, b, 1e-6)
    rows = [Path(path, "metrics.csv").read_text().splitlines()[1].split(",")
            for path in ("a", "runs/cifar10-cifar-nano")]
    assert float(rows[0][2]) == pytest.approx(float(rows[1][2]), abs=1e-5)
    assert_input_error(run_cli(*run, "--accumulate", 2), "75", "--accumulate, 1 x 2")
    found = torch.load("runs/cifar10-cifar-nano/last.pt", weights_only=True)
    torch.save({**found, "step": 1}, "a/last.pt")
    code, out, _ = run_cli("--train", "cifar10", "--resume", "--out", "a")
    assert code == 0 and "note" not in out and "float32" in out     # kept, not asked for again
    assert torch.load("a/last.pt", weights_only=True)["parts"] == 3
    torch.save({**found, "step": 1}, "a/last.pt")
    code, out, _ = run_cli("--train", "cifar10", "--resume", "--out", "a", "--accumulate", 1)
    assert code == 0 and "note: batches had 3 parts, now 1" in out


def test_all_processes_stop_after_the_same_step(tiny):
    """Red if a signal that one process gets leaves the others waiting for it."""
    code = ("schedule, seen = dat.learning_rate, []\n"
            "def told(step, **kwargs):\n"
            "    if step == 4 and os.environ['RANK'] == '1' and not seen:\n"
            "        seen.append(os.kill(os.getpid(), signal.SIGTERM))\n"
            "    return schedule(step, **kwargs)\n"
            "dat.learning_rate = told")
    codes, outs, errs = together(2, "--train", "cifar10", "--epochs", 500, "--batch-size", 50,
                                 "--out", "o", code=code)
    assert codes == [0, 143], errs
    assert torch.load("o/last.pt", weights_only=True)["step"] == 5


# ============================================================ what may go wrong on a disk


def test_a_full_disk_leaves_the_checkpoint_before(tiny):
    """Red if a checkpoint that does not fit destroys the last one, leaves half a file, or hides."""
    code = ("import resource, signal, sys, dat, test_dat as test; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "dat.VARIANTS['cifar-nano'] = test.small_config(patch=4); real = dat.evaluate; "
            "dat.evaluate = lambda *a: (resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)), "
            "real(*a))[1]; sys.exit(dat.main(['--train', 'cifar10', '--epochs', '2', "
            "'--batch-size', '50', '--out', 'o', '--device', 'cpu']))")
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                            env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "File too large" in result.stderr and "of step 3 stays" in result.stderr
    assert [p.name for p in sorted(Path("o").iterdir())] == ["last.pt", "metrics.csv"]
    _, checkpoint = dat.load_checkpoint("o/last.pt", "step")
    assert checkpoint["step"] == 3 and Path("o/last.pt").stat().st_size > 9000


def test_two_downloads_at_once_are_one(mirror, monkeypatch, capsys):
    """Red if two runs fetch the same archive side by side, or what a killed one left stays."""
    calls, real = [], dat.urllib.request.urlopen

    def slow(*args, **kwargs):
        calls.append(args)
        time.sleep(0.5)
        return real(*args, **kwargs)

    monkeypatch.setattr(dat.urllib.request, "urlopen", slow)
    Path("data").mkdir()
    Path("data", f"{mirror.name}.123.part").write_bytes(b"half")
    with ThreadPoolExecutor() as pool:
        one, two = pool.map(dat.load_cifar, ["cifar10", "cifar10"])
    assert len(calls) == 1 and torch.equal(one.train.images, two.train.images)
    assert [p.name for p in Path("data").iterdir()] == [mirror.name]
    assert "another run downloads" in capsys.readouterr().out


# ============================================================ pictures


@pytest.mark.parametrize("geometry", ["paper", "release"])
@pytest.mark.parametrize("position", dat.CHOICES["position"])
def test_inspected_attention_is_what_the_model_uses(geometry, position):
    """Red if pictures show other weights or points than the forward pass has: weights times
    values, projected, give the block's output."""
    model = randomise(DAT(small_config(geometry=geometry, position=position)))
    images = random_input(2, 3, 14, 19)
    views, points = dat.inspect(model, images), model.sampling_points(images)
    inputs = model.deformable_inputs(images)
    assert len(views) == len(points) == len(inputs) == 2
    for view, where, (attention, x, first, cell) in zip(views, points, inputs):
        _, _, v, _ = attention.project(x)
        close(view.reach, [cell * n for n in attention.reach(*x.shape[1:3])])
        z = (view.weights @ v).transpose(1, 2).reshape(x.shape)
        close(attention.out(z).detach(), attention(x).detach())
        close(view.points, where.detach(), 1e-12)
        B, G, Hk, Wk, _ = where.shape
        assert view.reference.shape == (Hk, Wk, 2)
        assert view.queries.shape == (x.shape[1] * x.shape[2], 2)
        per_head = view.weights.sum(dim=2)                          # (B, M, K)
        close(view.importance[:, -1], per_head[:, -(per_head.shape[1] // G):].sum(1), 1e-12)
        close(view.importance.sum(), view.weights.sum())
        attention.offset = None
        undeformed = first + cell * attention.points(attention.q(x))[0, 0].detach()
        close(undeformed, view.reference)
        if attention.stride == 1:                                   # a key per query, same places
            close(view.queries, view.reference.flatten(0, 1), 1e-12)


@pytest.fixture
def checkpoint(tiny):
    assert run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--out", "o")[0] == 0
    return "o/last.pt"


def test_draw_makes_one_picture_of_files_and_test_images(checkpoint):
    """Red if --draw fails on a size, a mode or an index, or the picture shows nothing."""
    from PIL import Image
    Image.new("L", (57, 33), 200).save("grey.png")
    Image.new("RGB", (300, 200), (250, 20, 30)).save("photo.jpg")
    for source in ("grey.png", "photo.jpg", "cifar10:3"):
        code, out, _ = run_cli("--draw", source, "--checkpoint", checkpoint, "--query", "3,30",
                               "--query", "31,0", "--out", "p.png")
        assert code == 0 and source in out and "probability" in out and "class" in out
        picture = np.asarray(Image.open("p.png").convert("RGB"))
        assert picture.shape[0] > 600 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert run_cli("--draw", "cifar10:0", "--checkpoint", checkpoint)[0] == 0
    assert Path("points.png").exists()


@pytest.mark.parametrize("arguments, word", [
    (["absent.png"], "absent.png"), (["o/metrics.csv"], "o/metrics.csv"), (["cifar10:64"], "63"),
    (["cifar10:-1"], "cifar10:-1"), (["cifar10:x"], "cifar10:x"), (["shapes:2000"], "1999"),
    (["cifar10:0", "--query", "32,0"], "32,0"), (["cifar10:0", "--query", "3"], "3"),
    (["cifar10:0", "--query", "nan,1"], "nan"), (["cifar10:0", "--out", "."], ".png"),
    (["cifar10:0", "--out", "absent/p.png"], "absent"), (["cifar10:" + "9" * 5000], "63"),
    (["cifar10:0", "--out", "p.jpg"], "p.jpg"), (["shapes:0"], "trained on cifar10"),
    (["deep.png"], "8 bits"), (["a$x_$.png"], "a$x_$.png")])
def test_draw_rejects_what_it_cannot_show(checkpoint, arguments, word):
    """Red if bad input gives a traceback or leaves a picture."""
    from PIL import Image
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save("deep.png")
    assert_input_error(run_cli("--draw", *arguments, "--checkpoint", checkpoint), word)
    assert not Path("points.png").exists()


def test_draw_needs_a_checkpoint_that_fits(tiny):
    """Red if a missing checkpoint, or weights without their data's statistics, end in riddles."""
    assert_input_error(run_cli("--draw", "cifar10:0"), "--checkpoint")
    good = {"classes": ["a"] * 5, "mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1),
            "dataset": "cifar10"}
    plain = DAT(small_config(stages=(StageConfig(dim=8, heads=2, blocks="L"),)))
    broken = DAT(small_config())
    broken.head.weight.data.fill_(math.nan)
    for model, changes, word in (
            (DAT(small_config()), {"classes": ["a"]}, "classes"), (plain, {}, "no deformable"),
            (DAT(small_config()), {"classes": 5}, "classes"), (broken, {}, "finite"),
            (DAT(small_config()), {"std": torch.zeros(3, 1, 1)}, "std"),
            (DAT(small_config()), {"mean": torch.zeros(2, 3, 1, 1)}, "mean")):
        torch.save({"config": asdict(model.config), "model": model.state_dict(), **good, **changes},
                   "odd.pt")
        assert_input_error(run_cli("--draw", "cifar10:0", "--checkpoint", "odd.pt"), "odd.pt", word)
    torch.save({"config": asdict(plain.config), "model": plain.state_dict()}, "bare.pt")
    assert_input_error(run_cli("--draw", "cifar10:0", "--checkpoint", "bare.pt"), "lacks classes")


def test_the_picture_shows_what_was_inspected():
    """Red if y and x swap in the picture, an arrow misses its point, or a group is left out."""
    from matplotlib.quiver import Quiver
    model = DAT(small_config(image_size=(16, 24)))
    image = dat.make_shapes(1, seed=3, side=24)[0][0, :, :16]
    views = dat.inspect(model, image[None].float())
    figure = dat.draw(image, views, title="t", queries=[(1.0, 20.0), (15.0, 0.0)])
    for view, (moved, _, asked) in zip(views, np.reshape(figure.axes, (-1, 3))):
        arrows = [c for c in moved.collections if isinstance(c, Quiver)]
        assert len(arrows) == view.points.shape[1]
        for arrow, points in zip(arrows, view.points[0].flatten(1, 2)):
            start = torch.tensor(arrow.get_offsets()).flip(1)
            close(start, view.reference.flatten(0, 1), 1e-5)
            close(start + torch.tensor(np.stack([arrow.V, arrow.U], 1)), points, 1e-5)
        stars = [c.get_offsets()[0] for c in asked.collections[1::2]]
        for (y, x), (column, row) in zip([(1, 20), (15, 0)], stars):    # the nearest query's place
            nearest = (view.queries - torch.tensor([y, x])).norm(dim=1).argmin()
            close([row, column], view.queries[nearest], 1e-5)


def test_default_queries_are_two():
    """Red if both stars of a picture fall onto one query, where the second hides the first."""
    model = DAT(small_config())
    image = dat.make_shapes(1, seed=3, side=16)[0][0]
    views = dat.inspect(model, image[None].float())
    for view in views:
        ranked = view.importance[0].flatten().argsort()
        points = view.points[0].flatten(0, 2)                       # a view of the same numbers
        points[ranked[0]] = points[ranked[-1]]
    figure = dat.draw(image, views)
    for _, _, asked in np.reshape(figure.axes, (-1, 3)):
        one, other = (c.get_offsets()[0] for c in asked.collections[1::2])
        assert np.abs(one - other).max() > 0.1


def test_the_study_measures_where_points_lie():
    """Red if the share of points on a mask, or of attention, is taken at other places."""
    spec = importlib.util.spec_from_file_location("study", HERE / "figures/study.py")
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    torch.manual_seed(0)
    model = DAT(study.two())
    images, labels, masks = dat.make_shapes(6, seed=1)
    left = torch.zeros_like(masks)
    left[..., :16] = True
    everywhere, half, nowhere = (study.measure(model, images, labels, m) for m in (
        torch.ones_like(masks), left, torch.zeros_like(masks)))
    points = model.sampling_points((images.float() / 255 - 0.5) / 0.25)
    for found, right in ((everywhere, 31), (half, 15)):             # a point's four pixels
        inside = [torch.minimum(p + 1, torch.tensor([32, right + 1]) - p).clamp(0, 1).prod(-1)
                  for p in points]
        close(found["on"], np.mean([share.mean().item() for share in inside]), 1e-5)
    assert nowhere["on"] == nowhere["att"] == 0 and everywhere["att"] > 0.8


# ============================================================ the tutorial


def tutorial_blocks(language):
    text = (HERE / "tutorial.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)


def test_the_tutorial_prints_what_it_shows():
    """Red if a Python block of the page fails, in order, or prints something else."""
    namespace, options = {}, torch._tensor_str.PRINT_OPTS.__dict__.copy()
    blocks = tutorial_blocks("python")
    assert len(blocks) > 10
    try:
        for code, expected in blocks:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, "tutorial.md", "exec"), namespace)
            assert out.getvalue() == expected, code
    finally:
        torch._tensor_str.PRINT_OPTS.__dict__.update(options)


def test_the_tutorial_quotes_the_code_as_it_is():
    """Red if a quoted line of dat.py has changed there."""
    code = (HERE / "dat.py").read_text()
    quotes = tutorial_blocks("py")
    assert len(quotes) > 5
    for quote, _ in quotes:
        assert quote in code, quote


# ============================================================ the command line and the house


@pytest.mark.parametrize("arguments, word", [
    (["--train", "mnist"], "mnist"), (["--eval", "cifar10"], "--checkpoint"),
    (["--fast"], "--fast"), (["--epochs", "3"], "--train"), (["--query", "1,2"], "--draw"),
    (["--train", "shapes", "--checkpoint", "x.pt"], "--checkpoint"),
    (["--draw", ""], "--checkpoint"), (["--draw", "a", "--query", "3"], "pair Y,X"),
    (["--train", "shapes", "--epochs", "0"], "--epochs"),
    (["--train", "shapes", "--epochs", "many"], "many"),
    (["--train", "shapes", "--lr", "nan"], "--lr"), (["--train", "shapes", "--lr", "-1"], "--lr"),
    (["--train", "shapes", "--batch-size", "1.5"], "--batch-size"),
    (["--train", "shapes", "--model", "resnet"], "resnet"),
    (["--train", "shapes", "--device", "tpu"], "tpu"),
    (["--train", "shapes", "--seed", "-1"], "-1"),
    (["--train", "shapes", "--seed", "1" + "0" * 20], "--seed"),
    (["--train", "shapes", "--eval", "shapes"], "not allowed")])
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, word, tmp_path, monkeypatch):
    """Red if a mistake on the command line gives a traceback or starts something."""
    monkeypatch.chdir(tmp_path)
    assert_input_error(run_cli(*arguments), word)
    assert list(tmp_path.iterdir()) == []


VALUES = st.one_of(st.text(st.characters(exclude_characters="\x00"), max_size=6), st.sampled_from(
    ["", "nan", "-1", "0", "1e400", "inf", "--", "1_0", "0x10", "9" * 500, "a\nb", "cifar", "1,2"]))
FLAGS = st.sampled_from(re.findall(r'"(--[a-z0-9-]+)"', Path(dat.__file__).read_text()))


@settings(max_examples=100)
@given(task=st.sampled_from((["--train", "cifar10"], ["--train", "imagenet"],
                             ["--eval", "cifar100"], ["--eval", "imagenet"], ["--draw", "x.png"],
                             ["--bench"])),
       flags=st.lists(st.tuples(FLAGS, VALUES), max_size=3), joined=st.booleans())
def test_nonsense_on_the_command_line_is_one_line(task, flags, joined):
    """Red if any value of any flag ends in a traceback; each run here must fail at the latest for
    want of its data, checkpoint or device."""
    words = [word for flag, value in flags for word in ([f"{flag}={value}"] if joined else
                                                        [flag, value])]
    code, out, err = run_cli(*task, *words, "--data", "no/where", "--checkpoint", "no/where",
                             "--device", "cuda")
    if "--help" not in words or code != 0:
        assert code == 2 and err.count("\n") == 1 and err.startswith("dat.py: "), (out, err)


def test_a_batch_larger_than_the_data_is_an_input_error(tiny):
    """Red if a run of no steps starts, or divides by zero."""
    assert_input_error(run_cli("--train", "cifar10", "--batch-size", 151, "--out", "o"), 151, 150)
    assert not Path("o").exists()


@pytest.mark.parametrize("error", [RuntimeError("no memory\nat all"), MemoryError()])
def test_what_pytorch_raises_is_one_line(tiny, monkeypatch, error):
    """Red if running out of memory, or losing a worker or a peer, ends in a traceback."""
    def fail(*_):
        raise error

    monkeypatch.setattr(dat, "augment", fail)
    result = run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 50, "--out", "o")
    assert_input_error(result, type(error).__name__, str(error).partition("\n")[0])
    assert Path("o/last.pt").exists()


def test_a_missing_device_is_an_input_error(monkeypatch):
    """Red if --device cuda without CUDA fails inside PyTorch, or auto prefers it then."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_input_error(run_cli("--train", "shapes", "--device", "cuda"), "cuda")
    assert dat.choose_device("auto") == torch.device("cpu")


def test_runs_of_the_same_name_are_numbered(tiny):
    """Red if a second run with the same flags fails or overwrites the first."""
    for _ in range(2):
        assert run_cli("--train", "cifar10", "--epochs", 1, "--batch-size", 75)[0] == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["cifar10-cifar-nano",
                                                              "cifar10-cifar-nano-2"]


def test_summary_adds_up():
    """Red if stages are left out of the table, or a figure is not the model's own."""
    code, out, _ = run_cli("--summary", "--model", "dat-s")
    assert code == 0 and "49,700,402" in out and "8.959" in out and "paper: 9.0 G" in out
    stages = [line.split() for line in out.splitlines()[2:6]]
    assert [row[1] for row in stages] == ["56", "28", "14", "7"]
    head = 768 * 1000 + 1000 + 2 * 768                              # and the last norm
    assert sum(int(row[-2].replace(",", "")) for row in stages) + head == 49_700_402
    assert abs(sum(int(row[-1].replace(",", "")) for row in stages) - 8_960) < 10
    code, out, _ = run_cli("--summary", "--model", "cifar", "--image-size", 40)
    assert code == 0 and "40 x 40" in out and "paper" not in out


def test_benchmark_reports_every_figure(tiny):
    """Red if --bench leaves out a row or a unit, or fails on a device, a size or a batch."""
    code, out, _ = run_cli("--bench", "--model", "cifar-nano", "--batch-size", 6, "--accumulate", 2,
                           "--image-size", 20, "--device", "cpu")
    assert code == 0, out
    for word in ("batch 6 (in 2 parts), 20 px", "CPU", str(dat.compute_dtype(torch.device("cpu"))),
                 torch.__version__, "inference", "ceiling",
                 "training step", "images/s", "TFLOP/s", "GiB", "L ", "S ", "D ", "head", "stem"):
        assert word in out, word
    assert_input_error(run_cli("--bench", "--batch-size", 3, "--accumulate", 2, "--device", "cpu"),
                       "--batch-size 3", "--accumulate 2")
    assert_input_error(run_cli("--train", "cifar10", "--image-size", 20), "--image-size")
    assert_input_error(run_cli("--summary", "--image-size", "1" + "0" * 400), "--image-size")


def test_files_that_cannot_be_written_or_read_are_one_line(tiny):
    """Red if an operating system error reaches the user as a traceback."""
    Path("file").write_text("")
    for out in ("file", "file/below"):
        assert_input_error(run_cli("--train", "cifar10", "--epochs", 1, "--out", out), "file")


def test_an_existing_run_is_not_overwritten(tiny):
    """Red if a second run into the same folder destroys the first one's checkpoint."""
    Path("o").mkdir()
    Path("o/last.pt").write_text("precious")
    assert_input_error(run_cli("--train", "cifar10", "--out", "o"), "--out o", "not empty")
    assert Path("o/last.pt").read_text() == "precious"


def test_without_arguments_the_help_names_the_offline_start():
    """Red if a newcomer is not told of the run that needs no download."""
    code, out, err = run_cli()
    assert code == 0 and err == "" and "--train shapes" in out and len(out.splitlines()) < 60


def test_importing_does_nothing():
    """Red if an import prints, draws random numbers, or needs Pillow or matplotlib."""
    code = ("import sys, torch; state = torch.get_rng_state(); import dat, reference_numpy; "
            "assert torch.equal(state, torch.get_rng_state()); "
            "assert not {'PIL', 'matplotlib', 'pytest'} & set(sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_the_loops_share_no_code_with_the_model():
    """Red if the reference imports anything but numpy and math: it must stay a second opinion."""
    tree = ast.parse((HERE / "reference_numpy.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}
    assert imported == {"numpy", "math"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


def test_the_pages_hold_no_placeholder_and_link_to_what_exists():
    """Red if README or tutorial lack a result or a picture."""
    for name in ("README.md", "tutorial.md"):
        text = (HERE / name).read_text()
        assert not re.search(r"^[A-Z]{4,}$", text, re.MULTILINE), name
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (HERE / target).exists(), target


def test_requirements_are_the_same_everywhere():
    """Red if requirements.txt and the script metadata (PEP 723) of dat.py drift apart."""
    header = re.search(r"# dependencies = \[(.*?)\]", (HERE / "dat.py").read_text()).group(1)
    assert re.findall(r'"(.+?)"', header) == (HERE / "requirements.txt").read_text().split()


def test_every_departure_is_explained_and_pinned():
    """Red if a tag of the module docstring is missing from the tutorial or from these tests."""
    tags = set(re.findall(r"^    \[(D\d+)\]", dat.__doc__, re.MULTILINE))
    assert len(tags) >= 5
    for file in ("tutorial.md", "test_dat.py"):
        text = (HERE / file).read_text()
        assert {tag for tag in tags if f"[{tag}]" in text} == tags, file
