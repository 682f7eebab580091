"""Properties of dat.py, and parity with the loops of reference_numpy.py. Run with: pytest

Each test's name is a claim; its docstring says which mistake turns it red. Parity is in float64 to
1e-9: both sides round differently, at about 1e-13. All of it runs on a CPU and without a network.
"""
import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for GPUs
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from torch import nn

import dat
import reference_numpy as loops
from dat import DAT, DATConfig, DeformableAttention, StageConfig, WindowAttention

settings.register_profile("dat", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dat")
HERE = Path(__file__).parent
sizes = st.integers(1, 9)
geometries = st.sampled_from(dat.CHOICES["geometry"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


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
@example(H=3, W=2, window=7, heads=1, shifted=True)  # no cut, and nothing to roll
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


@pytest.mark.parametrize("changes, size", [
    ({}, (16, 16)), ({"geometry": "release"}, (18, 13)), ({"image_size": (12, 20)}, (12, 20)),
    ({"geometry": "release"}, (11, 7)), ({}, (1, 1)), ({"patch": 3, "mlp_ratio": 1.5}, (17, 22)),
    ({"stem": "conv", "patch": 1, "image_size": 8}, (9, 6)), ({"position": "none"}, (16, 16)),
    ({"stem": "conv", "patch": 4}, (17, 23)), ({"position": "fixed"}, (12, 16)),
    ({"offsets": False, "stem": "conv"}, (15, 12))], ids=str)
def test_network_equals_the_loops(changes, size):
    """Red if any step from image to logits, features or points departs from the paper."""
    config = small_config(**changes)
    model, images = randomise(DAT(config)), random_input(2, 3, *size)
    state, plain = arrays(model), asdict(config)
    with torch.no_grad():
        close(model(images), loops.network(images.numpy(), state, plain))
        features, points = model.features(images), model.sampling_points(images)
    expected = loops.network_features(images.numpy(), state, plain)
    for ours, theirs in zip(features, expected, strict=True):
        close(ours, theirs)
    expected = loops.network_points(images.numpy(), state, plain)
    for i, ours, theirs in zip((0, 1), points, expected, strict=True):  # a D block in each stage
        cell = config.patch * 2 ** i
        close(ours, (cell - 1) / 2 * (config.stem == "patch") + cell * theirs)


@pytest.mark.parametrize("geometry", ["paper", "release"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_equal_differences_of_the_loops(geometry, stride):
    """Red if a detach, an in-place change or a wrong formula breaks a gradient, seen along a random
    direction of input and weights."""
    attention = small_attention(stride=stride, geometry=geometry)
    x = random_input(1, 5, 4, 8).requires_grad_()
    weights, steps, slope = random_input(5, 4, 8, seed=2), {}, 0.0
    (attention(x)[0] * weights).sum().backward()
    for i, (name, tensor) in enumerate([*attention.named_parameters(), ("x", x)]):
        steps[name] = random_input(*tensor.shape, seed=10 + i)
        slope += float((tensor.grad * steps[name]).sum())

    def value(t):
        state = {name: array + t * steps[name].numpy() for name, array in arrays(attention).items()}
        out, _ = loops.deformable_attention((x[0].detach() + t * steps["x"][0]).numpy(), state, 4,
                                            2, stride, 3, 2.0, geometry)
        return (out * weights.numpy()).sum()

    close(slope, (value(1e-6) - value(-1e-6)) / 2e-6, tolerance=1e-6 * abs(slope))


# ============================================================ coordinates, sampling, offsets
@given(H=sizes, W=sizes, y=st.floats(-3, 11), x=st.floats(-3, 11))
def test_sampling_follows_equation_8(H, W, y, x):
    """Red if axes swap, what is off the map is not zero, or pixels are mixed in other shares."""
    maps, point = random_input(1, 3, H, W), torch.tensor([y, x], dtype=torch.float64)
    expected = loops.bilinear(maps[0].permute(1, 2, 0).numpy(), y, x)
    close(dat.bilinear_sample(maps, point.view(1, 1, 1, 2)).flatten(), expected)


@given(n=sizes, extra=st.integers(0, 5))
def test_reference_points_are_centred_and_inside(n, extra):
    """[D1] Red if a grid is off-centre, an end is left out, or a geometry turns the other."""
    length, like = n + extra, torch.zeros((), dtype=torch.float64)
    paper, release = (dat.cell_centres(n, length, geometry=g, like=like)
                      for g in ("paper", "release"))
    close(release, (np.arange(n) + 0.5) / n * (length - 1), 1e-12)
    close(paper, np.linspace(0, length - 1, n) if n > 1 else [(length - 1) / 2], 1e-12)


@given(H=sizes, W=sizes, r=st.sampled_from([1, 2]), s=st.floats(0.1, 9), geometry=geometries)
def test_offsets_reach_their_bound_and_no_further(H, W, r, s, geometry):
    """Red if s loses its half, H / n turns into W / n, or tanh is missing."""
    attention = small_attention(stride=r, offset_range=s, geometry=geometry)
    q = random_input(1, H, W, 8)
    with torch.no_grad():
        attention.offset.out.weight.mul_(1e6)
    moved = attention.points(q).detach()
    attention.offset = None
    offset = (moved - attention.points(q)).abs().numpy()
    for axis, length in enumerate((H, W)):
        bound = s / 2 * (length if geometry == "paper" else length - 1) / math.ceil(length / r)
        assert offset[..., axis].max() <= bound * (1 + 1e-12)
        close(np.median(offset[..., axis]), bound)


@given(H=sizes, W=sizes, heads=st.sampled_from([1, 2, 4]))
def test_zero_offsets_give_plain_attention_with_a_swin_bias(H, W, heads):
    """[D1] Red if a zero offset blurs, or a bias is read elsewhere than at q - k, as in Swin."""
    attention = randomise(DeformableAttention(dim=8, heads=heads, groups=1, size=(H, W), kernel=3))
    with torch.no_grad():
        attention.offset.out.weight.zero_()
    x = random_input(2, H, W, 8)
    q, k, v = (layer(x.flatten(1, 2)).unflatten(2, (heads, -1))
               for layer in (attention.q, attention.k, attention.v))
    y, x_ = np.divmod(np.arange(H * W), W)
    bias = attention.table[:, y[:, None] - y + H - 1, x_[:, None] - x_ + W - 1]
    scores = torch.einsum("bqmd,bkmd->bmqk", q, k) / math.sqrt(8 // heads) + bias
    plain = torch.einsum("bmqk,bkmd->bqmd", scores.softmax(-1), v).reshape(2, H, W, 8)
    close(attention(x).detach(), attention.out(plain).detach(), 1e-10)


def test_gradient_reaches_the_offset_network_both_ways():
    """Red if points are detached on the way to features, to the bias, or to who asks for them."""
    attention, x = small_attention(), random_input(1, 6, 7, 8)
    _, k, _, points = attention.project(x)
    model = DAT(small_config()).double()
    asked = model.sampling_points(random_input(1, 3, 16, 16))[1]
    last = model.stages[1].blocks[1].attention
    for result, weight in ((k, attention.offset.conv.weight), (asked, last.offset.out.weight),
                           (attention.position_bias(points, (6, 7)), attention.offset.out.weight)):
        (gradient,) = torch.autograd.grad(result.square().sum(), weight, retain_graph=True)
        assert gradient.abs().max() > 1e-6


def test_offset_network_ends_without_a_bias_after_a_norm():
    """[D4] Red if the 1x1 convolution gains a bias or the norm before GELU is lost."""
    network = dat.OffsetNetwork(dim=4, kernel=3, stride=1).double()
    assert network.out.bias is None
    q = random_input(1, 5, 5, 4)
    network.conv.bias.data.zero_()
    close(network(q).detach(), network(50 * q).detach(), 1e-3)  # the norm takes out the scale


def test_groups_move_independently():
    """Red if the queries of one group move another's points."""
    attention, q = small_attention(), random_input(2, 4, 5, 8)
    before = attention.points(q)
    q[..., 4:] += 1 + random_input(2, 4, 5, 4, seed=3)  # the second of two groups
    moved = (attention.points(q) - before).abs().amax((0, 2, 3, 4))
    assert moved[0] == 0 and moved[1] > 0.01


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_what_is_not_finite_stays_in_its_image(geometry):
    """Red if a coordinate that is not a number crashes, as an index, or spreads over the batch."""
    attention, x = small_attention(geometry=geometry), random_input(2, 4, 5, 8)
    expected = attention(x)[1]
    x[0, 2, 2] = math.nan
    out = attention(x)
    assert out[0].isnan().all()
    close(out[1].detach(), expected.detach(), 1e-12)


@given(H=sizes, W=sizes, window=st.integers(1, 4), shifted=st.booleans(), data=st.data())
def test_windows_are_isolated(H, W, window, shifted, data):
    """[D3] Red if a token sees beyond its window, cut at multiples of w (L) or ceil(w / 2) more (S,
    where Swin takes floor), or around the edge of the map."""
    shift, stage = math.ceil(window / 2) * shifted, StageConfig(dim=4, heads=1, blocks="LS",
                                                                window=window)
    model = randomise(DAT(DATConfig(stages=(stage,), classes=1)))
    attention = model.stages[0].blocks[shifted].attention
    row, column = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, W - 1))
    x = random_input(1, H, W, 4)
    changed = x.clone()
    changed[0, row, column] += 1
    moved = (attention(changed) - attention(x)).abs().amax(-1)[0] > 1e-12
    y, x_ = torch.arange(H)[:, None], torch.arange(W)
    same = ((y - shift) // window == (row - shift) // window) \
        & ((x_ - shift) // window == (column - shift) // window)
    assert torch.equal(moved, same)


# ============================================================ the authors' numbers
# Numbers of the authors' code (LeapLabTHU/DAT, commit 566a593) in float64 on a small instance: the
# logits, the points of both deformable blocks in the first of two images, and the norms of the
# gradients by sorted parameter name (input last).
OFFICIAL_LOGITS = [
    [-0.434851697635, -0.887678354006, 0.890940962725, -0.983916147992, 0.832371168081],
    [-0.738518887283, -0.819419414896, 0.570414188271, -1.34864217445, 0.140952970461]]
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
1.118802145361 -0.083072406535 0.5134690315 0.343178343123
""", """
0.203439508704 -1.13442094506 -0.761966004498 0.241669364022 0.095375411104 -0.602259985661
-0.407460649164 1.237648470079 -1.12354550159 0.193330708557 0.478904180174 0.248583146498
-0.21747612684 -0.115746994967 -0.391817448454 1.225949634316 -0.270595564937 -0.101801021109
0.378981994663 0.045023254936 0.2216784182 0.166031193265 0.209759508466 1.395480419494
-1.218143644612 -0.317820492957 -1.182416454012 0.806584782629 0.519076878395 -0.082592820912
0.108882695129 0.729923878372
"""
OFFICIAL_GRADIENTS = """
4.044930446 30.578147262 3.8019403995 3.3367677141 24.423813331 2.7061823852 2.6733531227
27.766477079 3.3408937612 2.7832424886 43.721468634 4.1171673312 3.3428062298 3.9720999292
38.308044774 3.0328129201 3.2905192526 2.0302280165 7.0882755754 2.2296826701 9.8578143502
1.6795472698 0.77364620752 4.3194394039 1.721130046 7.4350174797 0.33051763066 2.6031493112
3.8916412726 1.3816223941 1.7512426581 2.1740593746 3.4099404906 0.92399077946 1.177459248
1.5019233063 4.243167972 1.3455139441 8.7401179402 1.1254147366 3.8998784153 0.64595581086
6.1228586061 1.8135723609 6.6625567251 1.994298232 11.397028883 1.5430873184 1.8245242424
5.7092538514 1.2201266412 6.3062164049 0.59035774087 2.1676075147 2.9646997141 1.3260685706
1.4868715682 0.93669419464 1.4689077617 1.2997601606 1.0607250091 1.3115873471 6.3900626447
1.7136364005 10.548302454 1.2759826012 4.9872895871 1.9543725076 10.096508717 2.8204084432
11.164338775 2.3442580898 11.389755217 0.64247039711 0.65065138672 2.3050690617 0.3633553824
0.37694035836 1.1820179336 2.4367520408e-16 1.5797497113 2.3741853927 9.3621539507 0.50911769863
2.8755380261 1.8837254813 8.8189489796 0.25550233183 2.3517968044 2.5239184755 1.9188430702
1.6364434882 1.7790930262 1.6575127204 1.6477686838 1.7770230358 1.7020773065 9.6004135224
2.4565152959 18.425200513 1.6582355217 9.0733459642 2.19144372 17.076299548 3.1337902255
21.325813944 2.8027487543 20.553572141 0.58733214998 1.2541297488 1.4530991538 0.6813931057
0.51136048339 1.8564598693 1.2149227957e-16 0.68526184629 2.4642623981 16.243044116 0.55685410294
4.4055301382 2.4313859981 16.484492306 0.15398058695 2.7854123726 2.1194787471 1.6958641338
1.980776744 2.1499604972 2.0608096971 1.3590858969 1.2975833801 1.7110178602 13.334065281
2.7048498548 26.983085284 1.5157444805 11.284713313 2.3472936172 21.545720473 5.387855801
"""


OUR_NAMES = (  # -> the release's, one rule after the other
    (r"^stem", "patch_proj"), (r"^norm", "cls_norm.norm"), (r"^head", "cls_head"),
    (r"^stages\.(\d)\.down", lambda i: f"down_projs.{int(i[1]) - 1}"),
    (r"blocks\.(\d+)\.norm(\d)", lambda i: f"layer_norms.{2 * int(i[1]) + int(i[2]) - 1}.norm"),
    (r"blocks\.(\d+)\.mlp\.expand", r"mlps.\1.chunk.linear1"),
    (r"blocks\.(\d+)\.mlp\.contract", r"mlps.\1.chunk.linear2"),
    (r"blocks\.(\d+)\.attention\.", r"attns.\1.proj_"),
    (r"proj_offset\.out", "conv_offset.3"), (r"proj_offset", "conv_offset"),
    (r"(_proj|projs\.\d|_offset)\.conv", r"\1.0"),
    (r"(_proj|projs\.\d|_offset)\.norm", r"\1.1.norm"))


def official_layout(model):
    """The release's names -> the shape there, and our parameter (None: a buffer we derive)."""
    layout = {}
    for name, ours in model.named_parameters():
        theirs, shape = name, tuple(ours.shape)
        for pattern, new in OUR_NAMES:
            theirs = re.sub(pattern, new, theirs)
        path, found, _ = name.partition("attention")
        attention = model.get_submodule(path + found) if found else None
        if isinstance(attention, WindowAttention) and name.endswith("table"):
            prefix, area = theirs.removesuffix("proj_table"), attention.window ** 2
            H, W = model.config.map_sizes()[int(name.split(".")[1])]
            layout[prefix + "relative_position_index"] = (area, area), None
            if attention.shift:
                layout[prefix + "attn_mask"] = (H * W // area, area, area), None
            theirs, shape = prefix + "relative_position_bias_table", (shape[1] ** 2, shape[0])
        elif isinstance(attention, DeformableAttention):
            theirs = theirs.replace("proj_table", "rpe_table")
            shape += (1, 1) if ours.ndim == 2 else ()  # 1x1 convolutions there
        layout[theirs] = shape, ours
    return layout


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
    layout = official_layout(DAT(official_config()))
    return {name: torch.zeros(shape) if ours is None else
            torch.from_numpy(draw_official(name, shape)) for name, (shape, ours) in layout.items()}


def test_official_weights_give_the_authors_numbers():
    """[D1] Red if the release's geometry, shift, names or layouts are off anywhere (1e-8)."""
    torch.set_default_dtype(torch.float64)
    try:
        model = dat.load_official({"model": official_state(), "epoch": 3}, official_config())
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.config == official_config(geometry="release")
    images = torch.from_numpy(np.random.RandomState(7).standard_normal((2, 3, 64, 64)))
    images.requires_grad_()
    logits = model(images)
    close(logits.detach(), OFFICIAL_LOGITS, 1e-8)
    for i, points, text in zip((2, 3), model.sampling_points(images), OFFICIAL_POINTS):
        cell = 4 * 2 ** i
        normalised = np.array(text.split(), dtype=float).reshape(points[0].shape)
        in_map = (normalised + 1) / 2 * (64 // cell - 1)
        close(points[0].detach(), (in_map + 0.5) * cell - 0.5, 1e-8)
    (logits * torch.from_numpy(np.random.RandomState(8).standard_normal((2, 5)))).sum().backward()
    norms = [float(ours.grad.norm()) for _, (_, ours) in sorted(official_layout(model).items())
             if ours is not None]
    expected = np.array(OFFICIAL_GRADIENTS.split(), dtype=float)
    close([*norms, float(images.grad.norm())], expected, 1e-8)


def test_official_names_and_shapes_are_the_releases():
    """Red if a name or shape, of a weight or a derived buffer, is not what the authors' code has."""
    layout = official_layout(DAT(official_config()))
    lines = "\n".join(f"{name} {list(shape)}" for name, (shape, _) in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == \
        "23fc009648a3136b138f0d05151f149d3e31a405c1d330294d4e03e2bebb6533"


def test_official_loading_names_every_key_that_does_not_fit():
    """Red if a missing, unknown or misshapen key passes, or an ablation ignores what it lacks."""
    state = official_state()
    del state["cls_norm.norm.bias"]
    state["cls_head.weight"] = torch.zeros(6, 64)
    state["stages.9.extra"] = state["head.bias"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        dat.load_official(state, official_config())
    for part in ('"norm.bias"', "stages.9.extra", "head.bias (not", "head.weight", "[6, 64]"):
        assert part in str(error.value)
    for changes, absent in (({"offsets": False}, "offset"), ({"position": "none"}, "rpe_table")):
        config, whole = official_config(**changes), official_state()
        dat.load_official({k: v for k, v in whole.items() if absent not in k}, config)
        with pytest.raises(ValueError, match=absent.removeprefix("rpe_")):
            dat.load_official(whole, config)


# ============================================================ contracts of the network
@pytest.mark.parametrize("variant, parameters, drop_path", [
    ("dat-t", 28_319_138, 0.2), ("dat-s", 49_700_402, 0.3), ("dat-b", 87_881_632, 0.5),
    ("dat-b-384", 88_178_272, 0.5), ("cifar", 7_406_196, 0.1), ("cifar-nano", 1_649_459, 0)])
def test_variants_have_the_published_size(variant, parameters, drop_path):
    """Red if a width, depth, kernel, bias, table or drop path rate changes, or meta is no device."""
    with torch.device("meta"):
        model = dat.build(variant)
    assert sum(p.numel() for p in model.parameters()) == parameters
    rates = [block.rate for stage in model.stages for block in stage.blocks]
    close(rates, np.linspace(0, drop_path, len(rates)), 1e-12)  # over all blocks


def test_checkpoints_of_earlier_versions_load():
    """Red if a parameter is renamed, reshaped or moved: the digest is of names and shapes."""
    state = dat.build("cifar-nano").state_dict()
    lines = "\n".join(f"{name} {list(value.shape)}" for name, value in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest() == \
        "aac440773024328f024d03ea40f5efecfa981cfea32c03680808505f79c4eae9"


@pytest.mark.parametrize("change", [
    {}, {"geometry": "release"}, {"offsets": False}, {"position": "fixed"}, {"position": "none"},
    {"stem": "conv"}, {"window": 2}, {"groups": 2}, {"stride": 1}, {"kernel": 5},
    {"offset_range": 1.0}], ids=str)
def test_every_parameter_gets_a_gradient_and_every_switch_counts(change):
    """[D5] Red if a field crashes, is ignored, or leaves a parameter unused; named. A key bias
    shifts all scores of a query alike, so its gradient is zero and only has to be finite."""
    stage = StageConfig(dim=8, heads=2, blocks="LSD", window=3, groups=1, stride=2, kernel=3)
    of_stage = change.keys() <= asdict(stage).keys()
    model = DAT(small_config(stages=(stage,)))
    other = DAT(small_config(stages=(replace(stage, **change),)) if of_stage else
                small_config(stages=(stage,), **change))
    images = torch.randn(6, 3, 16, 20)
    F.cross_entropy(other(images), torch.tensor([0, 1, 2, 3, 4, 0])).backward()
    for name, parameter in other.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("attention.k.bias"), name
    state, others = randomise(model).state_dict(), randomise(other).state_dict()
    shared = {k: v for k, v in state.items() if k in others and others[k].shape == v.shape}
    other.load_state_dict({**others, **shared})
    difference = (model(images.double()) - other(images.double())).abs().max()
    assert difference > 1e-6 if change else difference == 0


@given(H=st.integers(1, 40), W=st.integers(1, 40), stem=st.sampled_from(dat.CHOICES["stem"]))
def test_any_image_size_works(H, W, stem):
    """[D2] Red if a size that divides by nothing, or a map that shrinks to a pixel, breaks."""
    model, images = DAT(small_config(patch=4, stem=stem)), torch.randn(2, 3, H, W)
    assert model(images).isfinite().all()
    maps, points = model.features(images), model.sampling_points(images)
    one, two = ((math.ceil(H / cell), math.ceil(W / cell)) for cell in (4, 8))
    assert model.config.map_sizes((H, W)) == [one, two]
    assert [tuple(m.shape) for m in maps] == [(2, 8, *one), (2, 12, *two)]
    assert [tuple(p.shape) for p in points] == [(2, 1, *two, 2), (2, 2, *two, 2)]  # r = 2, 1


def test_tables_keep_centre_and_constants_when_resized():
    """[D2] Red if resizing shifts the table: displacement zero must stay in the middle."""
    table = random_input(2, 7, 5)
    assert dat.resize(table, (7, 5)) is table
    for size in ((13, 9), (3, 1), (1, 11)):
        close(dat.resize(torch.full((2, 7, 5), 3.0), size), np.full((2, *size), 3.0), 1e-5)
    close(dat.resize(table, (3, 1))[:, 1, 0], table[:, 3, 2], 1e-12)


@pytest.mark.parametrize("stem, patch", [("patch", 2), ("patch", 3), ("conv", 1), ("conv", 2),
                                         ("conv", 4)])
def test_a_map_pixel_stands_where_its_convolutions_are_centred(stem, patch):
    """[D6] Red if a map pixel is not in the middle of what reaches it through convolutions."""
    config = small_config(stem=stem, patch=patch, offsets=False, stages=tuple(
        StageConfig(dim=8, heads=1, blocks="D", groups=1) for _ in range(2)))
    model, images = randomise(DAT(config)), random_input(1, 3, 48, 48).requires_grad_()
    x = model.embed(images)
    for stage, points in zip(model.stages, model.sampling_points(images)):  # r = 1: of each pixel
        x = stage.down(x)
        (reached,) = torch.autograd.grad(x[0, 3, 2].sum(), images, retain_graph=True)
        rows, columns = (reached[0].abs().sum((0, axis)).nonzero().flatten() for axis in (2, 1))
        close(points[0, 0, 3, 2], [(rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2])


def test_images_of_a_batch_do_not_see_each_other():
    """Red if batch and group axes are merged in the wrong order, an empty batch breaks, state lives
    outside the state dict, or evaluation draws."""
    model, images = randomise(DAT(small_config(drop_path=0.5))), random_input(3, 3, 16, 18)
    other = DAT(small_config()).double()
    other.load_state_dict(model.state_dict())
    for i in range(3):
        close(model(images)[i].detach(), other(images[i:i + 1])[0].detach(), 1e-12)
    assert model(images[:0]).shape == (0, 5)  # detectors get batches without a crop


def test_defaults_are_the_papers_and_plain_values_build_a_configuration_again():
    """Red if a default that the paper states changes, or a checkpoint's values build another."""
    stage, config = StageConfig(dim=8, heads=2, blocks="L"), DATConfig(stages=small_config().stages)
    assert asdict(stage) == {"dim": 8, "heads": 2, "blocks": "L", "window": 7, "groups": None,
                             "stride": 1, "kernel": 5, "offset_range": 2.0}
    assert {k: v for k, v in asdict(config).items() if k != "stages"} == {
        "image_size": 224, "patch": 4, "stem": "patch", "classes": 1000, "mlp_ratio": 4,
        "drop_path": 0.0, "geometry": "paper", "offsets": True, "position": "relative"}
    for config in (*dat.VARIANTS.values(), small_config(image_size=(8, 12))):
        assert DATConfig(**asdict(config)) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_and_keeps_coordinates_in_float32(dtype):
    """Red if grid_sample meets mixed types, or a coordinate is rounded to half precision."""
    model, images = DAT(small_config()).eval(), torch.randn(2, 3, 16, 20)
    exact = model(images).detach()
    for pure in (False, True):
        model, images = (model.to(dtype), images.to(dtype)) if pure else (model, images)
        with torch.autocast("cpu", dtype=dtype, enabled=not pure):
            logits, points = model(images), model.sampling_points(images)
        logits.float().sum().backward()
        close(logits.float().detach(), exact, 0.05)
        assert logits.dtype == dtype and all(p.dtype == torch.float32 for p in points)
    assert model.double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_training_works_in_one_type_with_drop_path(dtype):
    """Red if drop path, or anything else in training, mixes float32 into another type."""
    model = DAT(small_config(drop_path=0.3)).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels, losses = torch.randn(10, 3, 16, 16).to(dtype), torch.arange(10) % 5, []
    for _ in range(20):
        losses.append(F.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].dtype == dtype and min(losses[-5:]) < losses[0] - 0.2


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_half_precision_samples_where_float32_does(geometry):
    """Red if points, map or table are computed or read in bfloat16, up to half a pixel off."""
    attention = small_attention(dim=4, heads=1, groups=1, size=(1, 160), geometry=geometry)
    attention.bfloat16()
    maps, points = random_input(1, 4, 1, 160).bfloat16(), torch.rand(1, 1, 1, 50, 2) * 160
    points[..., 0] = 0
    sampled, q = dat.bilinear_sample(maps, points[:, 0]), maps.permute(0, 2, 3, 1)
    close(sampled.float(), dat.bilinear_sample(maps.float(), points[:, 0]), 0.01)
    bias = attention.position_bias(points, (1, 160)).detach().float()
    found, raw = attention.points(q).detach(), attention.offset(q).detach().float()
    attention.offset = None
    bound = dat.largest_offset(160, 160, offset_range=2.0, geometry=geometry)
    close((found - attention.points(q))[0, 0, ..., 1], bound * raw[0, ..., 1].tanh(), 1e-4)
    close(bias, attention.float().position_bias(points, (1, 160)).detach(), 1e-6)


def test_both_forms_of_attention_agree(monkeypatch):
    """Red if the formula and PyTorch's kernels part, or if cuDNN's, which has bugs, may be chosen."""
    shapes = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (1, 3, 5, 7)
    inputs = [random_input(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs[3][..., 2] = -math.inf  # a masked key
    model, images, found, seen = randomise(DAT(small_config())), random_input(2, 3, 16, 20), [], []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()) or kernel(*args, **kwargs))
    for is_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
        z, bare = dat.attend(*(t.requires_grad_() for t in inputs)), dat.attend(*inputs[:3], None)
        gradients = torch.autograd.grad(z.square().sum() + bare.sin().sum(), inputs)
        found.append([z.detach(), bare.detach(), *gradients, model(images).detach()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert DAT(small_config())(torch.randn(1, 3, 16, 16)).isfinite().all()
    assert len(seen) == 12 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()
    for one, other in zip(*found):
        close(one, other, 1e-11)


def test_compiled_and_exported_models_agree_with_eager():
    """Red if a graph break, a branch on data or sizes that cannot be symbols creep into the forward
    pass, or if epochs compile again."""
    stage = StageConfig(dim=8, heads=2, blocks="SD", window=3, groups=1, stride=2, kernel=3)
    model = DAT(small_config(stages=(stage,)))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for size in ((16, 16), (13, 18)):
        images = torch.randn(2, 3, *size)
        one, two = (torch.autograd.grad(run(images).square().sum(), [*model.parameters()])
                    for run in (model, compiled))
        for ours, theirs in zip(one, two):
            close(ours, theirs, 1e-5)
    expected = compiled.eval()(images).detach()
    with torch.compiler.set_stance("fail_on_recompile"):
        for training in (True, False):
            close(compiled.train(training)(images).detach(), expected, 1e-5)
    points = torch.compile(model.sampling_points, fullgraph=True, backend="eager")(images)
    assert torch.equal(points[0], model.sampling_points(images)[0])
    batch = {0: torch.export.Dim("batch")}  # H and W are fixed
    exported = torch.export.export(model, (images,), dynamic_shapes=(batch,)).module()
    close(exported(images[:1].repeat(5, 1, 1, 1)).detach(), expected[:1].repeat(5, 1), 1e-5)


def test_drop_path_drops_whole_samples_and_every_branch():
    """Red if elements are dropped, survivors are not scaled, evaluation drops, or a branch of a
    block ignores its rate."""
    x = torch.ones(4000, 2, 3)
    dropped = dat.drop_path(x, 0.25, True)
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    close(dropped.unique(), [0, 4 / 3], 1e-6)
    assert abs(float(dropped.mean()) - 1) < 0.05 and dat.drop_path(x, 0.25, False) is x
    block, z = DAT(small_config()).stages[0].blocks[0].train(), torch.randn(64, 4, 4, 8)
    block.rate = 0.5
    for branch in (block.attention, block.mlp):
        branch.register_forward_hook(lambda *_: torch.ones(64, 4, 4, 8))
    assert (block(z) - z).amax((1, 2, 3)).round().unique().tolist() == [0, 2, 4]


def test_initial_weights_are_what_the_docstring_says():
    """[D7] Red if tables start elsewhere than at deviation 0.01, or weights unlike PyTorch's."""
    model = dat.build("cifar")
    tables = torch.cat([p.detach().flatten() for n, p in model.named_parameters()
                        if n.endswith("table")])
    assert float(tables.std()) == pytest.approx(0.01, rel=0.02) and abs(tables.mean()) < 2e-4
    weight = model.stages[3].blocks[0].mlp.expand.weight
    assert 0.99 < weight.abs().max() * math.sqrt(weight.shape[1]) <= 1


STAGE = {"dim": 8, "heads": 2, "blocks": "LD", "groups": 1}


@pytest.mark.parametrize("change", [
    {"dim": 0}, {"dim": 7}, {"heads": -2}, {"blocks": ""}, {"blocks": "LX"}, {"groups": None},
    {"blocks": "LS"}, {"groups": 3}, {"window": 0}, {"stride": 0}, {"kernel": 4},
    {"offset_range": math.nan}, {"image_size": 0}, {"image_size": (8, -1)}, {"patch": 0},
    {"stem": "swin"}, {"stem": "conv", "patch": 3}, {"classes": 0}, {"mlp_ratio": 0},
    {"drop_path": 1.0}, {"geometry": "Paper"}, {"offsets": "no"}, {"position": None}], ids=str)
def test_a_wrong_field_is_named(change):
    """Red if a value that cannot work is accepted, or its error hides which one it was."""
    field, value = list(change.items())[-1]
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        StageConfig(**STAGE | change) if field in asdict(StageConfig(**STAGE)) else \
            small_config(**change)


def test_wrong_arguments_and_inputs_are_named():
    """Red if an argument or an input of the wrong kind fails late or in riddles."""
    for change in ({"groups": 3}, {"kernel": 2}, {"size": 0}, {"geometry": "x"}, {"dim": 9}):
        with pytest.raises(ValueError, match=next(iter(change))):
            small_attention(**change)
    with pytest.raises(ValueError, match="dat-x.*dat-b-384"):
        dat.build("dat-x")
    with pytest.raises(TypeError, match="clases"):
        dat.build("dat-t", clases=3)
    for shape in ((2, 3, 8), (1, 2, 3, 7), (1, 0, 3, 8)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            small_attention()(random_input(*shape))
    for shape, dtype in (((3, 8, 8), torch.float32), ((1, 1, 8, 8), torch.float32),
                         ((1, 3, 8, 0), torch.float32), ((1, 3, 8, 8), torch.uint8)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            DAT(small_config())(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("fields", ({}, {"geometry": "release"}, {"position": "fixed"},
                                    {"offsets": False, "position": "none"}), ids=str)
def test_everything_is_computed_where_its_input_is(fields):
    """Red if a tensor is made on the CPU whatever the input's device, or a number is waited for."""
    model = DAT(small_config(drop_path=0.5, **fields)).to("meta").train()
    images = torch.empty(4, 3, 37, 50, device="meta")
    loss = model(images).sum()
    loss.backward()
    assert loss.is_meta and all(p.grad.is_meta for p in model.parameters())
    assert all(points.is_meta for points in model.sampling_points(images))


def test_the_model_needs_torch_alone_and_importing_does_nothing():
    """Red if an import prints, draws random numbers or needs more than torch, or the model does."""
    code = ("import sys, torch\n"
            "for name in ('torchvision', 'matplotlib', 'PIL', 'numpy'): sys.modules[name] = None\n"
            "state = torch.get_rng_state()\n"
            "import dat\n"
            "assert torch.equal(state, torch.get_rng_state())\n"
            "images, model = torch.zeros(1, 3, 32, 32), dat.build('cifar-nano')\n"
            "assert model(images).shape == (1, 10) and len(model.sampling_points(images)) == 4\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ============================================================ data
def test_shapes_keep_their_values_and_show_their_figure_where_the_mask_says():
    """Red if masks and images come apart, or a seed draws other figures than it used to."""
    images, labels, masks = dat.make_shapes(400, seed=5)
    assert labels[:9].tolist() == [0, 3, 5, 0, 4, 3, 6, 7, 5] and labels.unique().tolist() == \
        list(range(len(dat.SHAPES)))
    close(images[:4].float().mean((1, 2, 3)), [86.309, 90.368, 83.860, 78.136], 0.1)  # CPUs round
    close(masks[:8].sum((1, 2)), [140, 156, 152, 119, 171, 80, 124, 113], 2)
    values, inside = images.float() / 255, masks[:, None].float()
    count = inside.sum((2, 3))
    mean = (values * inside).sum((2, 3)) / count
    spread = ((values - mean[..., None, None]).square() * inside).sum((2, 3)) / count
    outside = (values * (1 - inside)).sum((2, 3)) / (1024 - count)
    assert spread.sqrt().max() < 0.06  # one colour on the mask, another one off it
    assert (mean - outside).abs().amax(1).quantile(0.05) > 0.1


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_folder(tmp_path, monkeypatch, name):
    """Red if planes, labels (the fine ones) or halves are mixed up, or damage gives a traceback."""
    from torchvision import datasets
    kind, pixels = getattr(datasets, name.upper()), np.random.RandomState(0).randint(256, size=(
        20, 3072), dtype=np.uint8)
    for half in ("train_list", "test_list"):  # of these files the md5 sums are not asked for
        monkeypatch.setattr(kind, half, [[file, None] for file, _ in getattr(kind, half)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    folder, classes = tmp_path / kind.base_folder, [f"class{i}" for i in range(10)]
    folder.mkdir()
    for i, (file, _) in enumerate(kind.test_list + kind.train_list):
        (folder / file).write_bytes(pickle.dumps({"data": pixels + np.uint8(i), (
            "labels" if name == "cifar10" else "fine_labels"): [*range(10)] * 2}))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    mean, std = np.reshape(dat.STATISTICS[name], (2, 3, 1, 1))
    for train, count in ((True, 20 * len(kind.train_list)), (False, 20)):
        samples, found = dat.load_dataset(name, str(tmp_path), train)
        assert len(samples) == count and list(found) == classes
        images, labels = dat.Parts(name, samples, 32, None)[0, [3, 17]]
        expected = (pixels[[3, 17]] + np.uint8(train)).reshape(2, 3, 32, 32)
        close(images, (expected / 255 - mean) / std, 1e-5)
        assert labels.tolist() == [3, 7]
    (folder / kind.test_list[0][0]).write_bytes(b"not a pickle")
    assert_input_error(run_cli("--train", name, "--data", tmp_path), tmp_path, "--train shapes")


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    """Red if the one line lacks what was tried, which file to put where, or the way without."""
    from torchvision import datasets
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    words = "http://127.0.0.1:9/", "cifar-10-python.tar.gz", "--train shapes"
    assert_input_error(run_cli("--train", "cifar10"), *words, "data")
    assert_input_error(run_cli("--train", "cifar10", "--data", "nowhere"), *words, "nowhere")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small image folder, three classes by brightness, and small models under known names."""
    monkeypatch.chdir(tmp_path)
    for name in ("dat-t", "dat-b", "dat-b-384", "cifar"):
        monkeypatch.setitem(dat.VARIANTS, name, small_config(patch=4, image_size=32, classes=7))
    generator = np.random.default_rng(0)
    for half, count in (("train", 18), ("val", 15)):
        for i in range(count):
            path = tmp_path / "images" / half / ("dark", "grey", "pale")[i % 3] / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(80 * (i % 3), 80 * (i % 3) + 60, (30, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "images"


FOLDER_RUN = ("--train", "imagenet", "--data", "images", "--batch-size", 6, "--device", "cpu")


@pytest.mark.parametrize("change, words", [
    (lambda root: root.rename("elsewhere"), ("images", "<class>")),
    (lambda root: (root / "val").rename("elsewhere"), ("val", "<class>")),
    (lambda root: (root / "val/pale").rename("elsewhere"), ("val", "pale")),
    (lambda root: (root / "train/dark/bad.png").write_bytes(b"?"), ("train/dark/bad.png",)),
    (lambda root: (root / "val/grey/bad.JPEG").write_bytes(b"?" * 999), ("val/grey/bad.JPEG",))])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_cannot_be_used_is_named(folder, change, words, workers):
    """Red if an error names neither file nor class, or a process that loads images hides it."""
    change(folder)
    assert_input_error(run_cli(*FOLDER_RUN, "--epochs", 1, "--workers", workers), *words)


def test_the_middle_of_a_photo_is_the_releases():
    """Red if the side before cropping, the filter or the margin differs: 256 and 224, 438, 384."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image, (mean, std) = Image.fromarray(pixels), np.array(dat.STATISTICS["imagenet"])
    for size, side, margin in ((224, 256, 16), (384, 438, 27)):
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
        middle = resized[margin:margin + size, margin:margin + size]
        found, _ = dat.Parts("imagenet", [(image, 0)], size, None)[0, [0]]
        close(found[0].permute(1, 2, 0), (middle - mean) / std, 1e-5)


@pytest.mark.parametrize("augment", [0, 1])
def test_augmented_images_follow_from_seed_and_place_alone(augment):
    """Red if draws depend on the process, images share one, or strengths are not the release's."""
    image = Image.fromarray(dat.make_shapes(1, seed=1)[0][0].permute(1, 2, 0).numpy())
    parts = dat.Parts("imagenet", [(image, i) for i in range(30)], 24, augment)
    places = [(3, list(range(20))), (4, [5, 7]), (3, list(range(20)))]
    one, two = ([*parts.load(places, workers)] for workers in (0, 2))
    for (images, labels), (others, same) in zip(one, two, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, same)
    assert one[1][1].tolist() == [5, 7] and torch.equal(one[0][0], one[2][0])
    assert images.shape == (20, 3, 24, 24) and len(images.unique(dim=0)) > 15
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    parts = dat.Parts("shapes", [(grey, 0)] * 300, 32, augment)
    images, _ = parts[0, range(300)]
    assert ("num_ops=2, magnitude=9, num_magnitude_bins=11" in str(parts.transform)) == augment
    assert (images[:, 0] < -1).flatten(1).any(1).sum() > 200  # black comes in at a side
    noisy = sum(len(image[0].unique()) > 60 for image in images)
    assert 45 < noisy < 105 if augment else images.unique().numel() == 2


# ============================================================ recipes
def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("data, model, flags, recipe, ends", [
    ("imagenet", "dat-t", "", (300, 1024, 1e-3, 20 / 300, 5.0, 0.05, 1), (1e-6, 1e-5)),
    ("imagenet", "dat-b", "--batch-size 512", (300, 512, 4e-4, 50 / 300, 1, 0.05, 1), (5e-7, 5e-6)),
    ("imagenet", "dat-b-384", "--checkpoint start/last.pt", (30, 512, 2e-6, 0, 5, 1e-8, 1),
     (2e-6, 1e-7)),
    ("shapes", "cifar-nano", "", (4, 64, 2e-3, 0.05, 5, 0.05, 0), (2e-6, 2e-5)),
    ("shapes", "cifar-nano", "--epochs 60", (60, 64, 2e-3, 0.05, 5, 0.05, 1), (2e-6, 2e-5)),
    ("cifar10", "cifar-nano", "--epochs 59", (59, 128, 2e-3, 0.05, 5, 0.05, 0), (2e-6, 2e-5)),
    ("cifar100", "cifar", "", (300, 256, 1e-3, 0.05, 5, 0.05, 1), (1e-6, 1e-5))])
def test_recipes_are_what_suits_the_data(folder, monkeypatch, data, model, flags, recipe, ends):
    """Red if a number is not the release's (imagenet), or not what the results are measured with."""
    augments, parts, rate = [], dat.Parts, dat.learning_rate
    monkeypatch.setattr(dat, "load_dataset", lambda *_: ([(None, 0)] * 2048, ("a", "b")))
    monkeypatch.setattr(dat, "Parts", lambda *a: augments.append(a[3]) or parts(*a))
    monkeypatch.setattr(dat, "learning_rate", stop)
    run = ("--train", data, "--model", model)
    for out in (["--out", "start"], ["--out", "o", *flags.split()]):
        assert run_cli(*run, *out)[0] == 130
    found = torch.load("o/last.pt", weights_only=True)["recipe"]
    keys = ("epochs", "batch_size", "lr", "warmup", "clip", "weight_decay")
    assert [*(found[key] for key in keys), augments[-2]] == pytest.approx(recipe)
    assert augments[-1] is None
    rates = [rate(step, steps=10_000, warmup=found["warmup"], peak=found["lr"],
                  floor=found["floor"]) for step in (0, 10_000)]
    assert rates == pytest.approx(ends)


@given(steps=st.integers(4, 500), warmup=st.floats(0.01, 0.9), peak=st.floats(1e-6, 1))
def test_learning_rate_rises_then_falls(steps, warmup, peak):
    """[D8] Red if warm-up and cosine do not meet at the peak, or either is not monotone."""
    rates = [dat.learning_rate(i, steps=steps, warmup=warmup, peak=peak, floor=0.01)
             for i in range(steps + 2)]
    top = max(int(steps * warmup), min(50, steps // 4))
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert [rates[0], rates[top], rates[-1]] == pytest.approx([0.001 * peak, peak, 0.01 * peak])


def test_only_matrices_decay():
    """Red if a bias, a norm or a position table (3-D and 5-D) decays, or a parameter is lost."""
    model = DAT(small_config(position="fixed"))
    groups = {id(p): group["weight_decay"] for group in dat.parameter_groups(model, 0.05)
              for p in group["params"]}
    for name, parameter in model.named_parameters():
        decays = name.endswith("weight") and "norm" not in name
        assert groups[id(parameter)] == 0.05 * decays, name


def test_bfloat16_is_used_where_hardware_multiplies_it(monkeypatch):
    """Red if --float32 is ignored, or a CPU that cannot, or PyTorch 2.6, is asked for bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    for able, float32 in itertools.product((True, False), repeat=2):
        with dat.autocast(torch.device("cpu"), float32):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (product.dtype == torch.bfloat16) == (able and not float32)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # it came later
    dat.autocast(torch.device("cpu"), False)


# ============================================================ training
def shrink(patch):
    """85 images to train on and 17 to test on for `shapes`, and a tiny model for the default."""
    draw = dat.make_shapes
    patch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, drop_path=0.1))
    patch.setattr(dat, "make_shapes", lambda count, **rest: draw(count // 117, **rest))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch)


RUN = ("--train", "shapes", "--batch-size", 20, "--device", "cpu")


def start(*arguments, **environment):
    """The command line with `shrink` in a process of its own."""
    code = ("import sys, pytest, dat, test_dat\ntest_dat.shrink(pytest.MonkeyPatch())\n"
            "sys.exit(dat.main(sys.argv[1:]))")
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE), **environment})


def saved(out):
    return torch.load(f"{out}/last.pt", weights_only=True)


def assert_same_run(one, other, tolerance=0.0):
    """The checkpoints of two runs hold the same, up to the seconds they took."""
    for name, value in one["model"].items():
        if not tolerance or "bias" not in name:  # a key bias has a gradient of rounding alone
            close(value, other["model"][name], tolerance)
    for a, b in zip(one["history"], other["history"], strict=True):
        assert tuple(a[:4]) == pytest.approx(tuple(b[:4]), abs=tolerance)
    for a, b in zip(*(found["optimizer"]["state"].values() for found in (one, other))):
        assert tolerance or all(torch.equal(a[name], b[name]) for name in a)


def test_training_reports_saves_and_evaluates_alike(tiny, monkeypatch):
    """Red if a run leaves no metrics or checkpoint, hides what runs, or --eval finds otherwise."""
    asked, real = [], dat.autocast
    monkeypatch.setattr(dat, "autocast", lambda device, float32: asked.append(float32)
                        or real(device, float32))
    code, out, err = run_cli(*RUN, "--epochs", 2, "--out", "o", "--float32")
    assert code == 0, err
    for words in ("85 images to train", "17 to test", "8 classes", "parameters", "--model",
                  "2 epochs of 4 steps", "epoch 2/2", "images/s", "s left", "float32"):
        assert words in out, words
    rows = [line.split(",") for line in Path("o/metrics.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "step", "loss", "test_accuracy", "seconds"]
    assert [row[:2] for row in rows[1:]] == [["1", "4"], ["2", "8"]]
    last = re.findall("test accuracy .*", out)[-1]
    code, out, _ = run_cli("--eval", "shapes", "--checkpoint", "o/last.pt")
    assert code == 0 and last in out and set(asked) == {True}
    model = DAT(DATConfig(**saved("o")["config"])).eval()
    model.load_state_dict(saved("o")["model"])
    test, _ = dat.load_dataset("shapes", None, False)
    images, labels = dat.Parts("shapes", test, 32, None)[0, list(range(17))]
    best = model(images).topk(5).indices == labels[:, None]
    assert last == f"test accuracy {float(rows[2][3]):.2%}, top-5 {best.sum() / 17:.2%}"
    assert float(rows[2][3]) == pytest.approx(best[:, 0].float().mean().item())


def test_runs_of_the_same_name_are_numbered_and_seeds_differ(tiny):
    """Red if a second run overwrites the first, or its seed is ignored."""
    for seed in (0, 1):
        assert run_cli(*RUN, "--epochs", 1, "--seed", seed)[0] == 0
    one, two = (saved(f"runs/shapes-cifar-nano-{n}")["model"] for n in (1, 2))
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert_input_error(run_cli(*RUN, "--out", "runs/shapes-cifar-nano-1"), "not empty")


def test_training_learns(tiny, monkeypatch):
    """Red if gradients, labels or augmentation come apart: bright or dark is learnt in seconds."""
    samples = [(torch.randint(120 * (i % 2), 120 * (i % 2) + 99, (3, 32, 32), dtype=torch.uint8),
                i % 2) for i in range(256)]
    monkeypatch.setattr(dat, "load_dataset", lambda *_: (samples, ("dark", "bright")))
    run_cli(*RUN, "--epochs", 2, "--batch-size", 8, "--lr", 3e-3, "--out", "o")
    assert saved("o")["history"][-1][3] > 0.95


def test_parts_of_a_batch_add_up(tiny, monkeypatch):
    """Red if --accumulate weighs parts wrongly, gradients outlive a step, label smoothing is not
    0.1, or the reported loss is not the mean of an epoch."""
    gradients, losses, parts = [], [], dat.Parts
    cross_entropy, clip = F.cross_entropy, nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        gradients.append([p.grad.clone() for p in parameters])
        return clip(parameters, norm)

    def spy(logits, labels, **options):
        target = 0.9 * F.one_hot(labels, 8) + 0.1 / 8
        losses.append(-(target * logits.detach().log_softmax(1)).sum(1).mean().item())
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(dat, "Parts", lambda *a: parts(*a[:3], None))  # no draws in a step
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", record)
    monkeypatch.setattr(F, "cross_entropy", spy)
    run = (*RUN, "--epochs", 2, "--float32", "--lr", 1e-9)
    assert run_cli(*run, "--out", "a")[0] == run_cli(*run, "--accumulate", 4, "--out", "b")[0] == 0
    for whole, several in zip(gradients[:8], gradients[8:], strict=True):
        for a, b in zip(whole, several, strict=True):
            close(a, b, 1e-6)
    assert len(losses) == 8 + 32
    for out, found in (("a", losses[:8]), ("b", losses[8:])):
        means = [np.mean(half) for half in np.split(np.array(found), 2)]
        assert [row[2] for row in saved(out)["history"]] == pytest.approx(means, rel=1e-5)
    assert_input_error(run_cli(*run, "--accumulate", 3), "20", "--accumulate")
    assert_input_error(run_cli(*RUN, "--batch-size", 86), "86", "85")


def test_the_last_tenth_of_a_long_run_is_not_mixed(folder, tiny, monkeypatch):
    """[D8] Red if mixing goes on to the end, comes in a short run, or labels do not follow."""
    soft, real = [], F.cross_entropy

    def spy(logits, labels, **options):
        soft.append(labels.ndim == 2)
        if soft[-1]:
            close(labels.sum(1), torch.ones(len(labels)), 1e-5)
            assert (labels >= 0).all() and (labels.count_nonzero(1) <= 2).all()
        return real(logits, labels, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    assert run_cli(*FOLDER_RUN, "--epochs", 4)[0] == 0
    assert soft == [True] * 11 + [False]  # 0.9 of 12 steps
    monkeypatch.setattr(dat, "evaluate", stop)
    for epochs in (99, 100):
        assert run_cli(*RUN, "--epochs", epochs)[0] == 130
    assert soft[12:] == [False] * 4 + [True] * 4


def test_two_processes_train_as_one(tiny):
    """Red if gradients are summed, a sample is seen twice or by nobody, the test counts one of 17
    images twice, two logs are written, or draws depend on the process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    run = (*RUN, "--epochs", 2, "--float32", "--lr", 1e-3)
    both = [start(*run, "--out", "two", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    assert run_cli(*run, "--accumulate", 2, "--out", "one")[0] == 0
    outs, errs = zip(*(process.communicate(timeout=100) for process in both))
    assert [process.returncode for process in both] == [0, 0], errs
    assert "2 x cpu" in outs[0] and "test accuracy" in outs[0] and outs[1] == ""
    assert_same_run(saved("one"), saved("two"), 1e-5)


# ============================================================ checkpoints
@pytest.mark.parametrize("run, moment, call, epoch, tested", [
    (RUN, "evaluate", 2, 2, 1), (FOLDER_RUN, "learning_rate", 9, 1, 1)])
def test_an_interrupted_run_resumes_as_if_nothing_had_been(folder, tiny, monkeypatch, run, moment,
                                                           call, epoch, tested):
    """Red if what a step depends on is not in the checkpoint, or a stop in a test costs its epoch."""
    calls, real, made = [], getattr(dat, moment), (*run, "--epochs", 3, "--seed", 5, "--out")

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    assert run_cli(*made, "whole")[0] == 0
    with monkeypatch.context() as context:
        context.setattr(dat, moment, interrupted)
        code, _, err = run_cli(*made, "o")
    assert code == 130 and err.count("\n") == 1 and "--resume" in err
    assert (saved("o")["epoch"], len(saved("o")["history"])) == (epoch, tested)
    assert run_cli(*run, "--out", "o", "--resume", "--workers", 2)[0] == 0
    assert_same_run(saved("whole"), saved("o"))


def test_a_killed_run_is_resumed_as_if_nothing_had_been(tiny):
    """Red if kill -9 at any moment leaves what cannot be resumed, or resuming ends elsewhere."""
    made, last = (*RUN, "--epochs", 30, "--out"), (*RUN, "--out", "o", "--resume")
    for arguments, seconds in (((*made, "o"), 0.13), (last, 0.21)):
        process = start(*arguments)
        while "test accuracy" not in process.stdout.readline():  # an epoch is done, then ..
            assert process.poll() is None
        time.sleep(seconds)  # .. in the middle of anything
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and 0 < saved("o")["epoch"] < 30
    assert run_cli(*made, "whole")[0] == run_cli(*last)[0] == 0
    assert_same_run(saved("whole"), saved("o"))
    assert sorted(p.name for p in Path("o").iterdir()) == ["last.pt", "metrics.csv"]


def test_a_full_disk_keeps_the_checkpoint_before(tiny, monkeypatch):
    """Red if a checkpoint is written in place, hides the error, or leaves a part of a file."""
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(1)
        if len(calls) == 6:  # metrics.csv and last.pt: at the start, after epoch 1, after its test
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert_input_error(run_cli(*RUN, "--epochs", 2, "--out", "o"), "o/last.pt", "No space left")
    assert sorted(p.name for p in Path("o").iterdir()) == ["last.pt", "metrics.csv"]
    assert saved("o")["epoch"] == 1 and saved("o")["history"] == []
    Path("file").write_text("")
    for out in ("file", "file/below"):
        assert_input_error(run_cli(*RUN, "--out", out), "file")


def test_resuming_something_else_is_refused_by_name(tiny):
    """Red if --resume mixes two runs, needs no folder, or starts afresh where nothing is."""
    assert run_cli(*RUN, "--epochs", 1, "--out", "o", "--seed", 3)[0] == 0
    before = saved("o")
    for flags, word in (
            ("--epochs 3", "epochs 1"), ("--lr 5e-4", "lr"), ("--seed 1", "seed 3"),
            ("--batch-size 10", "batch_size 20"), ("--model cifar", "cifar-nano"),
            ("--accumulate 2", "parts 1"), ("--float32", "float32"), ("--out absent", "absent")):
        assert_input_error(run_cli("--train", "shapes", "--out", "o", "--resume", *flags.split()),
                           word)
    assert run_cli(*RUN, "--out", "o", "--resume")[0] == 0  # done already
    assert_same_run(before, saved("o"))


def test_a_loss_that_is_not_finite_stops_the_run(tiny, monkeypatch):
    """Red if a diverged run goes on, hides where, or overwrites its last good checkpoint."""
    calls, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: calls.append(1) or real(
        *args, **kwargs) * (math.nan if len(calls) == 6 else 1))
    assert_input_error(run_cli(*RUN, "--epochs", 9, "--out", "o"), "epoch 2", "finite", "last.pt")
    assert saved("o")["epoch"] == 1 and len(saved("o")["history"]) == 1
    assert all(tensor.isfinite().all() for tensor in saved("o")["model"].values())


def test_a_mistake_of_our_own_keeps_its_traceback(tiny, monkeypatch):
    """Red if a broken shape in the model is told as if the user had made a mistake."""
    monkeypatch.setattr(DeformableAttention, "forward", lambda self, x: x @ x)
    with pytest.raises(RuntimeError):
        run_cli(*RUN, "--epochs", 1)


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path("pwned"), "x"))


def test_checkpoints_of_strangers_run_nothing_and_end_in_one_line(tiny):
    """Red if a pickle is executed, or a file that does not fit ends in a traceback."""
    assert run_cli(*RUN, "--epochs", 1, "--out", "o")[0] == 0
    good, whole = saved("o"), Path("o/last.pt").read_bytes()
    odd = [b"", whole[:len(whole) // 2], b"x" * 500]
    for content in (Payload(), {"model": Payload()}, {"model": {}}, torch.zeros(3), [1],
                    {**good, "model": {}}, {**good, "config": {"stages": 3}},
                    {**good, "config": {**good["config"], "patch": 2}},
                    {**good, "config": {**good["config"], "classes": 5}},
                    {"model": good["model"], "config": good["config"]}):
        torch.save(content, "odd.pt")
        odd.append(Path("odd.pt").read_bytes())
    Path("bad").mkdir()
    for content in odd:
        for path in ("odd.pt", "bad/last.pt"):
            Path(path).write_bytes(content)
        assert_input_error(run_cli("--eval", "shapes", "--checkpoint", "odd.pt"), "odd.pt")
        assert_input_error(run_cli("--train", "shapes", "--resume", "--out", "bad"), "bad/last.pt")
    assert not Path("pwned").exists()


def publish(model, path, **beside):
    """Saves a model the way the authors do."""
    state = {}
    for name, (shape, ours) in official_layout(model).items():
        if name.endswith("relative_position_bias_table"):
            ours = ours.flatten(1).T
        state[name] = torch.zeros(shape) if ours is None else ours.detach().reshape(shape)
    torch.save({"model": state, **beside}, path)


def test_published_checkpoints_are_evaluated(folder, monkeypatch):
    """Red if the authors' settings stop their file, its geometry is lost, or a wrong variant is
    taken."""
    class CfgNode(dict):
        __module__, __qualname__ = "yacs.config", "CfgNode"

    yacs = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    model = randomise(DAT(replace(dat.VARIANTS["dat-t"], classes=3, geometry="release"))).float()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "yacs", ModuleType("yacs"))
        context.setitem(sys.modules, "yacs.config", yacs)
        settings = CfgNode(MODEL=CfgNode(NAME="t"), LR=0.1)
        settings.__dict__["__immutable__"] = True
        publish(model, "theirs.pth", config=settings, max_accuracy=82.0)
    samples, _ = dat.load_dataset("imagenet", str(folder), False)
    images, labels = dat.Parts("imagenet", samples, 32, None)[0, list(range(len(samples)))]
    accuracy = (model(images).argmax(1) == labels).float().mean()
    run = ("--eval", "imagenet", "--data", folder, "--checkpoint", "theirs.pth")
    code, out, err = run_cli(*run, "--model", "dat-t", "--float32")
    assert code == 0 and f"test accuracy {accuracy:.2%}" in out, err
    assert_input_error(run_cli(*run), "theirs.pth", "--model")
    monkeypatch.setitem(dat.VARIANTS, "dat-s", small_config())
    assert_input_error(run_cli(*run, "--model", "dat-s"), "theirs.pth", "--model")


def test_fine_tuning_resizes_tables_and_renews_a_head_of_other_classes(folder, monkeypatch):
    """Red if a table is cut or starts anew, geometry is lost, or weights are not taken over."""
    small = dat.VARIANTS["dat-t"]
    larger = replace(small, image_size=48, stages=tuple(replace(s, window=4) for s in small.stages))
    monkeypatch.setitem(dat.VARIANTS, "dat-b-384", larger)
    for classes in (3, 7):
        source = randomise(DAT(replace(small, geometry="release", classes=classes))).float()
        publish(source, "theirs.pth")
        run = (*FOLDER_RUN, "--epochs", 1, "--lr", 1e-12, "--out", f"o{classes}")
        code, _, err = run_cli(*run, "--checkpoint", "theirs.pth", "--model", "dat-b-384")
        assert code == 0, err
        found, old = saved(f"o{classes}"), source.state_dict()
        assert DATConfig(**found["config"]) == replace(larger, geometry="release", classes=3)
        for name, value in found["model"].items():
            if name.endswith("table"):
                assert value.shape != old[name].shape
                close(value, dat.resize(old[name], value.shape[-2:]), 1e-6)
            elif classes == 3 or not name.startswith("head"):
                close(value, old[name], 1e-6)
    code, _, err = run_cli(*FOLDER_RUN, "--checkpoint", "o3/last.pt", "--epochs", 1, "--out", "own")
    assert code == 0 and saved("own")["config"]["geometry"] == "release", err


# ============================================================ the command line
@pytest.mark.parametrize("flags, word", [
    ("--train mnist", "mnist"), ("--eval shapes", "--checkpoint"), ("--fast", "--fast"),
    ("--train shapes --epochs 0", "--epochs"), ("--train shapes --epochs many", "many"),
    ("--train shapes --lr nan", "--lr"), ("--train shapes --batch-size 1.5", "--batch-size"),
    ("--train shapes --model resnet", "resnet"), ("--train shapes --workers -1", "--workers"),
    ("--train shapes --device cuda", "cuda"), ("--train shapes --eval shapes", "--eval"),
    ("--train shapes --checkpoint no.pt", "no.pt"), ("--train shapes --resume", "--out"),
    ("--train cifar10 --data no/where", "no/where")])
def test_wrong_usage_is_one_line_and_exit_code_2(flags, word, tmp_path, monkeypatch):
    """Red if a mistake on the command line gives a traceback or starts something."""
    monkeypatch.chdir(tmp_path)
    assert_input_error(run_cli(*flags.split()), word)
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_the_help_names_the_offline_start():
    """Red if a newcomer is not told of the run that needs no download."""
    code, out, err = run_cli()
    assert code == 0 and err == "" and "--train shapes" in out and len(out.splitlines()) < 60


# ============================================================ lab, tutorial, house
@pytest.mark.parametrize("script", sorted(path.name for path in (HERE / "lab").glob("*.py")))
def test_scripts_of_the_lab_start(script):
    """Red if a script of lab/ uses a name that dat.py no longer has."""
    result = subprocess.run([sys.executable, HERE / "lab" / script, "--help"], cwd=HERE, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr


def tutorial_blocks(language):
    text = (HERE / "tutorial.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)


def test_the_tutorial_prints_what_it_shows():
    """Red if a Python block of the page fails, in order, or prints something else."""
    namespace, options = {}, torch._tensor_str.PRINT_OPTS.__dict__.copy()
    try:
        for code, expected in tutorial_blocks("python"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "tutorial.md", "exec"), namespace)
            assert out.getvalue() == expected, code
    finally:
        torch._tensor_str.PRINT_OPTS.__dict__.update(options)
    assert "model" in namespace


def test_the_tutorial_quotes_the_code_as_it_is():
    """Red if a quoted line of dat.py has changed there."""
    code, quotes = (HERE / "dat.py").read_text(), tutorial_blocks("py")
    assert len(quotes) > 5 and [quote for quote, _ in quotes if quote not in code] == []


def test_the_loops_share_no_code_with_the_model():
    """Red if the reference imports anything but numpy and math: it must stay a second opinion."""
    code = (HERE / "reference_numpy.py").read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)) == {"numpy", "math"}


def test_requirements_are_the_same_everywhere():
    """Red if requirements.txt and the script metadata (PEP 723) of dat.py drift apart."""
    header = re.search(r"# dependencies = \[(.*?)\]", (HERE / "dat.py").read_text()).group(1)
    assert re.findall(r'"(.+?)"', header) == (HERE / "requirements.txt").read_text().split()


def test_every_departure_is_explained_and_pinned():
    """Red if a tag of the module docstring is missing from the tutorial or from these tests."""
    tags = set(re.findall(r"^    \[(D\d+)\]", dat.__doc__, re.MULTILINE))
    assert len(tags) == 8
    for file in ("tutorial.md", "test_dat.py"):
        text = (HERE / file).read_text()
        assert {tag for tag in tags if f"[{tag}]" in text} == tags, file
