"""Properties of dat.py, and parity with the loops of reference_numpy.py. Run with: pytest

A test's name is a claim, its docstring says which mistake turns it red. Parity is in float64 to
1e-9: both sides round differently, at about 1e-13. On a CPU, offline.
"""
import contextlib
import hashlib
import io
import math
import os
import pickle
import re
import runpy
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
from torch.utils.data import DataLoader

import dat
import reference_numpy as loops
from dat import DAT, DATConfig, DeformableAttention, StageConfig, WindowAttention

settings.register_profile("dat", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("dat")
torch.set_num_threads(1)  # quicker here
HERE = Path(__file__).parent
sizes = st.integers(1, 9)
geometries = st.sampled_from(dat.CHOICES["geometry"])


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


# ======== helpers
def randomise(module, seed=0):
    """Float64 weights of order one everywhere, so that no term is negligible."""
    rng = torch.Generator().manual_seed(seed)
    module.double().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
            if name.endswith("table"):
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module


def random_input(*shape, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def arrays(module):
    return {name: value.numpy() for name, value in module.state_dict().items()}


def small_config(**changes):
    """Every kind of block, r = 1 and 2, G < M."""
    stages = (StageConfig(dim=8, heads=2, blocks="LSD", window=3, groups=1, stride=2, kernel=3),
              StageConfig(dim=12, heads=4, blocks="LD", window=2, groups=2, kernel=5))
    return DATConfig(**{"stages": stages, "image_size": 16, "patch": 2, "classes": 5, **changes})


def small_attention(**changes):
    return randomise(DeformableAttention(
        **{"dim": 8, "heads": 4, "groups": 2, "size": (4, 5), "kernel": 3, **changes}))


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def run_cli(flags):
    """Exit code, output and errors of the command line, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = dat.main(flags.split())
        except (SystemExit, KeyboardInterrupt) as end:
            code = getattr(end, "code", 130)
    return code, out.getvalue(), err.getvalue()


def succeed(flags):
    """The output of a command line that must end well, without a warning."""
    code, out, err = run_cli(flags)
    assert (code, err) == (0, "")
    return out


def assert_input_error(flags, *words):
    """Exit code 2, and one line on standard error that holds all `words`."""
    code, _, err = run_cli(flags)
    assert code == 2 and err.count("\n") == 1, (code, err)
    assert [word for word in words if word not in err] == [], err


# ======== parity with the loops
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
    ({"stem": "conv", "patch": 1}, (9, 6)), ({"stem": "conv", "patch": 4}, (17, 23)),
    ({"position": "fixed"}, (12, 16)), ({"offsets": False, "stem": "conv"}, (15, 12))], ids=str)
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
    for i, ours, theirs in zip((0, 1), points, expected, strict=True):
        cell = config.patch * 2 ** i
        close(ours, (cell - 1) / 2 * (config.stem == "patch") + cell * theirs)


@pytest.mark.parametrize("geometry", ["paper", "release"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_equal_differences_of_the_loops(geometry, stride):
    """Red if a gradient of input or weights, along a random direction, is not the slope."""
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

    close(slope, (value(1e-6) - value(-1e-6)) / 2e-6, 1e-6 * abs(slope))


# ======== coordinates, sampling, offsets
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
    attention.offset.out.weight.data.mul_(1e6)
    moved = attention.points(q).detach()
    attention.offset = None
    offset = (moved - attention.points(q)).abs().numpy()
    for axis, length in enumerate((H, W)):
        bound = s / 2 * (length if geometry == "paper" else length - 1) / math.ceil(length / r)
        assert offset[..., axis].max() <= bound * (1 + 1e-12)
        close(np.median(offset[..., axis]), bound)


@given(H=sizes, W=sizes)
def test_zero_offsets_read_pixels_as_they_are(H, W):
    """[D1] Red if a zero offset blurs: if axes swap, or centres or align_corners are off."""
    attention, x = small_attention(offset_range=1e-14), random_input(2, H, W, 8)
    _, k, _, _ = attention.project(x)
    plain = attention.k(x).flatten(1, 2).unflatten(2, (4, -1)).transpose(1, 2)
    close(k.detach(), plain.detach(), 1e-11)


def test_gradient_reaches_the_offset_network_both_ways():
    """Red if points are detached on the way to features or to the bias."""
    attention = small_attention()
    _, k, _, points = attention.project(random_input(1, 6, 7, 8))
    for result in (k, attention.position_bias(points, (6, 7))):
        (gradient,) = torch.autograd.grad(result.square().sum(), attention.offset.conv.weight,
                                          retain_graph=True)
        assert gradient.abs().max() > 1e-6


def test_offset_network_ends_without_a_bias_after_a_norm():
    """[D4] Red if the 1x1 convolution gains a bias, the norm is lost, or autocast goes on."""
    network = dat.OffsetNetwork(dim=4, kernel=3, stride=1).double()
    assert network.out.bias is None
    q = random_input(1, 5, 5, 4)
    network.conv.bias.data.zero_()
    close(network(q).detach(), network(50 * q).detach(), 1e-3)  # the norm takes out the scale
    with torch.autocast("cpu"):
        assert network.float()(q.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_what_is_not_finite_stays_in_its_image(geometry):
    """Red if a NaN coordinate crashes as an index, or spreads over the batch."""
    attention, x = small_attention(geometry=geometry), random_input(2, 4, 5, 8)
    expected = attention(x)[1]
    x[0, 2, 2] = math.nan
    out = attention(x)
    assert out[0].isnan().all()
    close(out[1].detach(), expected.detach(), 1e-12)


@given(H=sizes, W=sizes, window=st.integers(1, 4), shifted=st.booleans(), data=st.data())
def test_windows_are_isolated(H, W, window, shifted, data):
    """[D3] Red if a token sees beyond its window, or S is not cut at ceil(w / 2) + multiples."""
    shift = math.ceil(window / 2) * shifted
    stage = StageConfig(dim=4, heads=1, blocks="LS", window=window)
    attention = randomise(DAT(DATConfig(stages=(stage,))).stages[0].blocks[shifted].attention)
    row, column = data.draw(st.integers(0, H - 1)), data.draw(st.integers(0, W - 1))
    x = random_input(1, H, W, 4)
    changed = x.clone()
    changed[0, row, column] += 1
    moved = (attention(changed) - attention(x)).abs().amax(-1)[0] > 1e-12
    y, x_ = torch.arange(H)[:, None], torch.arange(W)
    same = ((y - shift) // window == (row - shift) // window) \
        & ((x_ - shift) // window == (column - shift) // window)
    assert torch.equal(moved, same)


# ======== the authors' numbers
# Numbers of the authors' code (LeapLabTHU/DAT, commit 566a593) in float64 on a small instance:
# logits, points of the first image and group, norms of gradients by sorted name (input last).
OFFICIAL_LOGITS = [
    [-0.43485169763, -0.88767835401, 0.89094096273, -0.98391614799, 0.83237116808],
    [-0.73851888728, -0.8194194149, 0.57041418827, -1.3486421744, 0.14095297046]]
OFFICIAL_POINTS = """
-1.1538782962 -1.0918830158 -1.0172434618 -0.6920316183 -0.3943891084 -0.1750019637 -0.5853042997
0.8184549682 -0.558658593 -0.9779809095 -0.5992775673 -0.7222814718 -0.4184296885 -0.2156100819
-0.0158497533 0.3087117508 -0.0373901103 -1.2211768601 -0.1448966764 -0.5284445952 0.2219628984
-0.1955406544 0.0307772174 0.4299019624 1.1145761401 -1.0956127083 0.365255173 -0.7084364115
0.3347665332 -0.0750632899 0.7956568808 0.4479260447
""", """
0.2034395087 -1.1344209451 -0.7619660045 0.241669364 0.0953754111 -0.6022599857 -0.4074606492
1.2376484701
"""
OFFICIAL_GRADIENTS = """
4.044930446 30.578147262 3.801940399 3.336767714 24.423813331 2.706182385 2.673353123 27.766477079
3.340893761 2.783242489 43.721468634 4.117167331 3.34280623 3.972099929 38.308044774 3.03281292
3.290519253 2.030228017 7.088275575 2.22968267 9.85781435 1.67954727 0.773646208 4.319439404
1.721130046 7.43501748 0.330517631 2.603149311 3.891641273 1.381622394 1.751242658 2.174059375
3.409940491 0.923990779 1.177459248 1.501923306 4.243167972 1.345513944 8.74011794 1.125414737
3.899878415 0.645955811 6.122858606 1.813572361 6.662556725 1.994298232 11.397028883 1.543087318
1.824524242 5.709253851 1.220126641 6.306216405 0.590357741 2.167607515 2.964699714 1.326068571
1.486871568 0.936694195 1.468907762 1.299760161 1.060725009 1.311587347 6.390062645 1.7136364
10.548302454 1.275982601 4.987289587 1.954372508 10.096508717 2.820408443 11.164338775 2.34425809
11.389755217 0.642470397 0.650651387 2.305069062 0.363355382 0.376940358 1.182017934 0.
1.579749711 2.374185393 9.362153951 0.509117699 2.875538026 1.883725481 8.81894898 0.255502332
2.351796804 2.523918475 1.91884307 1.636443488 1.779093026 1.65751272 1.647768684 1.777023036
1.702077307 9.600413522 2.456515296 18.425200513 1.658235522 9.073345964 2.19144372 17.076299548
3.133790225 21.325813944 2.802748754 20.553572141 0.58733215 1.254129749 1.453099154 0.681393106
0.511360483 1.856459869 0. 0.685261846 2.464262398 16.243044116 0.556854103 4.405530138
2.431385998 16.484492306 0.153980587 2.785412373 2.119478747 1.695864134 1.980776744 2.149960497
2.060809697 1.359085897 1.29758338 1.71101786 13.334065281 2.704849855 26.983085284 1.51574448
11.284713313 2.347293617 21.545720473 5.387855801
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
                               kernel=9 - 2 * i)
                   for i, (blocks, groups) in enumerate(zip(("LS", "LS", "LD", "LD"),
                                                            (None, None, 2, 4))))
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
        normalised = np.array(text.split(), dtype=float).reshape(points[0, 0].shape)
        in_map = (normalised + 1) / 2 * (64 // cell - 1)
        close(points[0, 0].detach(), (in_map + 0.5) * cell - 0.5, 1e-8)
    (logits * torch.from_numpy(np.random.RandomState(8).standard_normal((2, 5)))).sum().backward()
    norms = [float(ours.grad.norm()) for _, (_, ours) in sorted(official_layout(model).items())
             if ours is not None]
    expected = np.array(OFFICIAL_GRADIENTS.split(), dtype=float)
    close([*norms, float(images.grad.norm())], expected, 1e-8)


def test_official_names_and_shapes_are_the_releases():
    """Red if a name or shape is not the authors', derived buffers included."""
    layout = official_layout(DAT(official_config()))
    lines = "\n".join(f"{name} {list(shape)}" for name, (shape, _) in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == \
        "23fc009648a3136b138f0d05151f149d3e31a405c1d330294d4e03e2bebb6533"


def test_official_loading_names_every_odd_key():
    """Red if a missing, unknown or misshapen key passes, or is not told."""
    state = official_state()
    del state["cls_norm.norm.bias"]
    state["cls_head.weight"] = torch.zeros(6, 64)
    state["stages.9.extra"] = state["head.bias"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        dat.load_official(state, official_config())
    for part in ('"norm.bias"', "stages.9.extra", "head.bias twice", "head.weight", "[6, 64]"):
        assert part in str(error.value)


# ======== contracts of the network
@pytest.mark.parametrize("variant, parameters, drop_path", [
    ("dat-t", 28_319_138, 0.2), ("dat-s", 49_700_402, 0.3), ("dat-b", 87_881_632, 0.5),
    ("dat-b-384", 88_178_272, 0.5), ("cifar", 7_406_196, 0.1), ("cifar-nano", 1_649_459, 0)])
def test_variants_have_the_published_size(variant, parameters, drop_path):
    """Red if a width, depth, kernel, bias, table or drop path rate changes, or on meta."""
    with torch.device("meta"):
        model = dat.build(variant)
    assert sum(p.numel() for p in model.parameters()) == parameters
    rates = [block.rate for stage in model.stages for block in stage.blocks]
    close(rates, np.linspace(0, drop_path, len(rates)), 1e-12)  # over all blocks


def test_checkpoints_of_earlier_versions_load():
    """Red if a parameter is renamed, reshaped or moved."""
    state = dat.build("cifar-nano").state_dict()
    lines = "\n".join(f"{name} {list(value.shape)}" for name, value in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "aac440773024328f"


@pytest.mark.parametrize("change", [
    {}, {"geometry": "release"}, {"offsets": False}, {"position": "fixed"}, {"position": "none"},
    {"stem": "conv"}, {"window": 2}, {"groups": 2}, {"stride": 1}, {"kernel": 5},
    {"offset_range": 1.0}], ids=str)
def test_every_parameter_and_every_field_counts(change):
    """[D5] Red if a field crashes, is ignored, or leaves a parameter unused. (A key bias
    shifts all scores of a query alike: its gradient is zero.)"""
    stage = small_config().stages[0]
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
    one, two = ((math.ceil(H / cell), math.ceil(W / cell)) for cell in (4, 8))
    assert replace(model.config, image_size=(H, W)).map_sizes() == [one, two]
    assert [m.shape for m in model.features(images)] == [(2, 8, *one), (2, 12, *two)]
    points = model.sampling_points(images)
    assert [p.shape for p in points] == [(2, 1, *two, 2), (2, 2, *two, 2)]  # r = 2, 1


@pytest.mark.parametrize("stem, patch", [("patch", 2), ("patch", 3), ("conv", 1), ("conv", 4)])
def test_a_map_pixel_stands_amid_its_convolutions(stem, patch):
    """[D6] Red if a map pixel is not in the middle of what reaches it through convolutions."""
    config = small_config(stem=stem, patch=patch, offsets=False, stages=tuple(
        StageConfig(dim=8, heads=1, blocks="D", groups=1) for _ in range(2)))
    model, images = randomise(DAT(config)), random_input(1, 3, 48, 48).requires_grad_()
    x = model.stem(images.permute(0, 2, 3, 1))
    for stage, points in zip(model.stages, model.sampling_points(images)):  # r = 1: of each pixel
        x = stage.down(x)
        (reached,) = torch.autograd.grad(x[0, 3, 2].sum(), images, retain_graph=True)
        rows, columns = (reached[0].abs().sum((0, axis)).nonzero().flatten() for axis in (2, 1))
        close(points[0, 0, 3, 2], [(rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2])


def test_images_of_a_batch_do_not_see_each_other():
    """Red if batch and groups mix, an empty batch breaks, or state is not saved."""
    model, images = randomise(DAT(small_config(drop_path=0.5))), random_input(3, 3, 16, 18)
    other = DAT(small_config()).double()
    other.load_state_dict(model.state_dict())
    for i in range(3):
        close(model(images)[i].detach(), other(images[i:i + 1])[0].detach(), 1e-12)
    assert model(images[:0]).shape == (0, 5)  # detectors get batches without a crop


def test_defaults_are_the_papers():
    """Red if a default changes, or saved values build another network."""
    for owner, defaults in (
            (StageConfig, [7, None, 1, 5, 2.0]), (WindowAttention, [0]),
            (DATConfig, [224, 4, "patch", 1000, 4, 0.0, "paper", True, "relative"]),
            (DeformableAttention, [1, 5, 2.0, "paper", True, "relative"])):
        assert list(owner.__init__.__kwdefaults__.values()) == defaults  # by keyword alone
    for config in (*dat.VARIANTS.values(), small_config(image_size=(8, 12))):
        assert {DATConfig(**asdict(config))} == {config}  # frozen: it has a hash


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees(dtype):
    """Red if grid_sample meets mixed types, or a coordinate is in half precision."""
    model, images = DAT(small_config()).eval(), torch.randn(2, 3, 16, 20)
    exact = model(images).detach()
    for pure in (False, True):
        model, images = (model.to(dtype), images.to(dtype)) if pure else (model, images)
        with torch.autocast("cpu", dtype=dtype, enabled=not pure):
            logits, points = model(images), model.sampling_points(images)
        logits.float().sum().backward()
        close(logits.float().detach(), exact, 0.05)
        assert logits.dtype == dtype and all(p.dtype == torch.float32 for p in points)


def test_training_works_in_bfloat16_with_drop_path():
    """Red if drop path, or anything else in training, mixes float32 into another type."""
    model = DAT(small_config(drop_path=0.3)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, labels, losses = torch.randn(10, 3, 16, 16).bfloat16(), torch.arange(10) % 5, []
    for _ in range(20):
        losses.append(F.cross_entropy(model(images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].dtype == torch.bfloat16 and min(losses[-5:]) < losses[0] - 0.2


@pytest.mark.parametrize("geometry", ["paper", "release"])
def test_half_precision_samples_where_float32_does(geometry):
    """Red if points, map or table are read in bfloat16."""
    attention = small_attention(dim=4, heads=1, groups=1, size=(1, 160), geometry=geometry)
    attention.bfloat16()
    maps, points = random_input(1, 4, 1, 160).bfloat16(), torch.rand(1, 1, 1, 50, 2) * 160
    points[..., 0], q = 0, maps.permute(0, 2, 3, 1)
    sampled = dat.bilinear_sample(maps, points[:, 0]).float()
    close(sampled, dat.bilinear_sample(maps.float(), points[:, 0]), 0.01)
    bias = attention.position_bias(points, (1, 160)).detach().float()
    found, raw = attention.points(q).detach(), attention.offset(q).detach().float()
    attention.offset = None
    bound = dat.largest_offset(160, 160, offset_range=2.0, geometry=geometry)
    close((found - attention.points(q))[0, 0, ..., 1], bound * raw[0, ..., 1].tanh(), 1e-4)
    close(bias, attention.float().position_bias(points, (1, 160)).detach(), 1e-6)


def test_both_forms_of_attention_agree(monkeypatch):
    """Red if the formula and PyTorch's kernels part, or if cuDNN's may be chosen."""
    inputs = [random_input(*shape, seed=i) for i, shape in enumerate((
        (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4), (1, 3, 5, 7)))]
    inputs[3][..., 2] = -math.inf  # a masked key
    model, images, found, seen = randomise(DAT(small_config())), random_input(2, 3, 16, 20), [], []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *kv, attn_mask: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled() or attn_mask.dtype != q.dtype) or kernel(
            q, *kv, attn_mask))
    for is_cpu in (True, False):
        monkeypatch.setattr(torch.Tensor, "is_cpu", is_cpu)
        z = dat.attend(*(t.requires_grad_() for t in inputs))
        gradients = torch.autograd.grad(z.square().sum(), inputs)
        found.append([z.detach(), *gradients, model(images).detach()])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert DAT(small_config())(torch.randn(1, 3, 16, 16)).isfinite().all()
    assert len(seen) == 11 and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()
    for one, other in zip(*found):
        close(one, other, 1e-11)


def test_compiled_and_exported_models_agree():
    """Red if a graph breaks, or sizes cannot be symbols."""
    stage = replace(small_config().stages[0], blocks="SD")
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
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(model, (images,), dynamic_shapes=batch).module()
    close(exported(images[:1].repeat(5, 1, 1, 1)).detach(), expected[:1].repeat(5, 1), 1e-5)


def test_drop_path_drops_whole_samples():
    """Red if elements drop, survivors not scaled, or a branch ignores its rate."""
    x = torch.ones(4000, 2, 3)
    dropped = dat.drop_path(x, 0.25, True)
    assert torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    close(dropped.unique(), [0, 4 / 3], 1e-6)
    assert 0.95 < dropped.mean() < 1.05 and dat.drop_path(x, 0.25, False) is x
    two, z = StageConfig(dim=8, heads=2, blocks="LL"), torch.randn(64, 4, 4, 8)
    _, block = DAT(small_config(stages=(two,), drop_path=0.5)).stages[0].blocks  # rates 0, 0.5
    for branch in (block.attention, block.mlp.contract):
        branch.register_forward_hook(lambda *_: torch.ones(64, 4, 4, 8))
    assert (block(z) - z).amax((1, 2, 3)).round().unique().tolist() == [0, 2, 4]


def test_initial_weights_are_the_releases():
    """[D7] Red if tables start elsewhere than at deviation 0.01, or weights unlike PyTorch's."""
    model = dat.build("cifar")
    tables = torch.cat([p.detach().flatten() for n, p in model.named_parameters()
                        if n.endswith("table")])
    assert float(tables.std()) == pytest.approx(0.01, rel=0.02) and abs(tables.mean()) < 2e-4
    weight = model.stages[3].blocks[0].mlp.expand.weight
    assert 0.99 < weight.abs().max() * math.sqrt(weight.shape[1]) <= 1


STAGE = {"dim": 8, "heads": 2, "blocks": "LD", "groups": 1}


@pytest.mark.parametrize("change", [
    {"dim": 7}, {"blocks": ""}, {"blocks": "LX"}, {"groups": None}, {"groups": 3},
    {"blocks": "LS", "groups": 1}, {"kernel": 4}, {"stem": "conv", "patch": 3}, {"stem": "convs"},
    {"geometry": "Paper"}, {"position": None}], ids=str)
def test_a_wrong_field_is_named(change):
    """Red if a value that cannot work is accepted, or is not told."""
    field, value = list(change.items())[-1]
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}")):
        StageConfig(**STAGE | change) if field in asdict(StageConfig(**STAGE)) else \
            small_config(**change)


def test_wrong_arguments_and_inputs_are_named():
    """Red if what cannot work fails late."""
    with pytest.raises(ValueError, match="dat-x.*dat-b-384"):
        dat.build("dat-x")
    for field, value in (("groups", 3), ("kernel", 4), ("geometry", "x"), ("position", "x")):
        with pytest.raises(ValueError, match=f"{field}={value!r}"):
            small_attention(**{field: value})
    attention, model = small_attention(), DAT(small_config())
    for module, *shape in ((attention, 1, 2, 3, 7), (attention, 2, 3, 8), (model, 3, 8, 8),
                           (model, 1, 1, 8, 8)):
        with pytest.raises(ValueError, match=re.escape(str(tuple(shape)))):
            module(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("fields", ({}, {"geometry": "release"}, {"position": "fixed"},
                                    {"offsets": False, "position": "none"}), ids=str)
def test_everything_is_computed_where_its_input_is(fields):
    """Red if a tensor is made on the CPU in any case, or a number is waited for."""
    model = DAT(small_config(drop_path=0.5, **fields)).to("meta").train()
    images = torch.empty(4, 3, 37, 50, device="meta")
    model(images).sum().backward()
    assert all(p.grad.is_meta for p in model.parameters())
    assert all(points.is_meta for points in model.sampling_points(images))


def test_the_model_needs_torch_alone():
    """Red if the import prints or draws, or the model needs more than torch."""
    code = """if True:
        import sys, torch
        sys.modules |= dict.fromkeys(("torchvision", "matplotlib", "PIL", "numpy"))
        state = torch.get_rng_state()
        import dat
        assert torch.equal(state, torch.get_rng_state())
        images, model = torch.zeros(1, 3, 32, 32), dat.build("cifar-nano")
        assert model(images).shape == (1, 10) and len(model.sampling_points(images)) == 4"""
    result = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ======== data
def test_shapes_keep_their_values_and_masks():
    """Red if masks and images come apart, or a seed draws other figures."""
    images, labels, masks = dat.make_shapes(400, seed=5)
    assert labels[:9].tolist() == [0, 3, 5, 0, 4, 3, 6, 7, 5]
    close(images[:4].float().mean((1, 2, 3)), [86.309, 90.368, 83.860, 78.136], 0.1)  # CPUs round
    close(masks[:8].sum((1, 2)), [140, 156, 152, 119, 171, 80, 124, 113], 2)
    values, inside = images.float() / 255, masks[:, None].float()
    count = inside.sum((2, 3))
    mean = (values * inside).sum((2, 3)) / count
    spread = ((values - mean[..., None, None]).square() * inside).sum((2, 3)) / count
    outside = (values * (1 - inside)).sum((2, 3)) / (1024 - count)
    assert spread.sqrt().max() < 0.06  # one colour on the mask, another one off it
    assert (mean - outside).abs().amax(1).quantile(0.05) > 0.1


@pytest.mark.parametrize("name, labels", [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_read_from_its_folder(tmp_path, monkeypatch, name, labels):
    """Red if planes, labels or halves are mixed up, or damage gives a traceback."""
    from torchvision import datasets
    monkeypatch.chdir(tmp_path)
    kind = getattr(datasets, name.upper())
    for half in ("train_list", "test_list"):  # without md5 sums
        monkeypatch.setattr(kind, half, [[file, None] for file, _ in getattr(kind, half)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})
    pixels = np.random.RandomState(0).randint(256, size=(20, 3072), dtype=np.uint8)
    folder, classes = Path("data", kind.base_folder), list("abcdefghij")
    folder.mkdir(parents=True)
    for i, (file, _) in enumerate(kind.test_list + kind.train_list):
        content = {"data": pixels + np.uint8(i), labels: [*range(10)] * 2}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: classes}))
    for train, count in ((True, 20 * len(kind.train_list)), (False, 20)):
        samples, found = dat.load_dataset(name, "data", train)
        assert len(samples) == count and list(found) == classes
        images, targets = dat.Parts(name, samples, 32, None)[0, [3, 17]]
        expected = (pixels[[3, 17]] + np.uint8(train)).reshape(2, 3, 32, 32)
        close(images, (expected / 255 - 0.5) / 0.25, 1e-5)
        assert targets.tolist() == [3, 7]
    (folder / kind.test_list[0][0]).write_bytes(b"not a pickle")
    assert_input_error(f"--train {name}", "data", "--train shapes")


def test_offline_the_error_says_what_to_do(tmp_path, monkeypatch):
    """Red if the line lacks what was tried or the way without."""
    from torchvision import datasets
    monkeypatch.chdir(tmp_path)
    url = "http://127.0.0.1:9/cifar.tar.gz"
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    assert_input_error("--train cifar10", "--data data", url, "refused", "--train shapes")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Images of three classes by brightness, and small models under known names."""
    monkeypatch.chdir(tmp_path)
    for name in ("dat-t", "dat-b", "dat-b-384", "cifar"):
        monkeypatch.setitem(dat.VARIANTS, name, small_config(patch=4, image_size=32, classes=7))
    rng = np.random.default_rng(0)
    for half, count in (("train", 18), ("val", 15)):
        for i in range(count):
            path = Path("images", half, ("dark", "grey", "pale")[i % 3], f"{i}.JPEG")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(80 * (i % 3), 80 * (i % 3) + 60, (30, 40, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return Path("images")


PHOTOS = "--train imagenet --data images --batch-size 6 --device cpu "


@pytest.mark.parametrize("change, words", [
    (lambda root: root.rename("elsewhere"), ("images", "<class>")),
    (lambda root: (root / "val").rename("elsewhere"), ("val", "<class>")),
    (lambda root: (root / "val/pale").rename("elsewhere"), ("val", "pale")),
    (lambda root: (root / "train/dark/bad.png").write_bytes(b"?"), ("train/dark/bad.png",)),
    (lambda root: (root / "val/grey/bad.JPEG").write_bytes(b"?" * 999), ("val/grey/bad.JPEG",))])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_cannot_be_used_is_named(folder, change, words, workers):
    """Red if an error names neither file nor class, or is lost in a worker."""
    change(folder)
    assert_input_error(f"{PHOTOS} --epochs 1 --workers {workers}", *words)


def test_the_middle_of_a_photo_is_the_releases():
    """Red if side, filter or margin differ: 256 and 224, 438 and 384."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image, (mean, std) = Image.fromarray(pixels), np.array(dat.IMAGENET)
    for size, side, margin in ((224, 256, 16), (384, 438, 27)):
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) / 255
        middle = resized[margin:margin + size, margin:margin + size]
        found, _ = dat.Parts("imagenet", [(image, 0)], size, None)[0, [0]]
        close(found[0].permute(1, 2, 0), (middle - mean) / std, 1e-5)


@pytest.mark.parametrize("augment", [0, 1])
def test_draws_follow_from_seed_and_place(augment):
    """Red if images share a draw, draws depend on the process, or strengths change."""
    image = Image.fromarray(dat.make_shapes(1, seed=1)[0][0].permute(1, 2, 0).numpy())
    parts = dat.Parts("imagenet", [(image, i) for i in range(30)], 24, augment)
    places = [(3, list(range(20))), (4, [5, 7]), (3, list(range(20)))]
    one, two = ([*DataLoader(parts, None, sampler=places, num_workers=n)] for n in (0, 2))
    for (images, labels), (others, same) in zip(one, two, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, same)
    assert one[1][1].tolist() == [5, 7] and torch.equal(one[0][0], one[2][0])
    assert len(images.unique(dim=0)) > 15
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    parts = dat.Parts("shapes", [(grey, 0)] * 300, 32, augment)
    images, _ = parts[0, range(300)]
    assert ("num_ops=2, magnitude=9, num_magnitude_bins=11" in str(parts.transform)) == augment
    assert (images[:, 0] < -1).flatten(1).any(1).sum() > 200  # black at a side
    noisy = sum(len(image[0].unique()) > 60 for image in images)
    assert 45 < noisy < 105 if augment else images.unique().numel() == 2


# ======== recipes
def stop(*_, **__):
    raise KeyboardInterrupt


def saved(out):
    return torch.load(f"{out}/last.pt", weights_only=True)


@pytest.mark.parametrize("flags, recipe", [
    ("imagenet --model dat-t", (300, 1024, 1e-3, 20 / 300, 0.01, 5, 0.05, 1)),
    ("imagenet --model dat-b --batch-size 512", (300, 512, 4e-4, 50 / 300, 1 / 80, 1, 0.05, 1)),
    ("imagenet --model dat-b-384 --checkpoint start/last.pt", (30, 512, 2e-6, 0, 0.05, 5, 1e-8, 1)),
    ("shapes --epochs 60", (60, 64, 3e-3, 0.25, 0.01, 5, 0.05, 1)),
    ("cifar10 --epochs 59 --lr 1", (59, 128, 1, 0.05, 0.01, 5, 0.05, 0)),
    ("cifar100 --model cifar", (300, 256, 1e-3, 0.05, 0.01, 5, 0.05, 1))])
def test_recipes_are_what_suits_the_data(folder, monkeypatch, flags, recipe):
    """Red if a number is not the release's or the results'."""
    succeed(PHOTOS + "--epochs 1 --out start")
    args = dat.read_flags(f"--device cpu --train {flags}".split())
    assert [args.recipe[key] for key in dat.SETTINGS] == pytest.approx(recipe[:-1])
    augments, parts = [], dat.Parts
    monkeypatch.setattr(dat, "load_dataset", lambda *_: ([(None, 0)] * 2048, ("a", "b")))
    monkeypatch.setattr(dat, "Parts", lambda *a: augments.append(a[3]) or parts(*a))
    monkeypatch.setattr(dat, "learning_rate", stop)
    assert run_cli(f"--device cpu --train {flags}")[0] == 130
    assert augments == [recipe[-1], None]


@example(steps=100, warmup=0, peak=1.0)
@given(steps=st.integers(4, 500), warmup=st.floats(0.01, 0.9), peak=st.floats(1e-6, 1))
def test_learning_rate_rises_then_falls(steps, warmup, peak):
    """[D8] Red if warm-up and cosine do not meet at the peak, or either is not monotone."""
    rates = [dat.learning_rate(i, steps=steps, warmup=warmup, peak=peak, floor=0.01)
             for i in range(steps + 1)]
    top = max(int(steps * warmup), min(50, steps // 4)) if warmup else 0
    close(np.diff(rates[:top + 1]), (rates[top] - rates[0]) / max(top, 1), 1e-12)
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert [rates[top], rates[-1]] == pytest.approx([peak, 0.01 * peak])
    assert top == 0 or rates[0] == pytest.approx(0.001 * peak)


def test_only_matrices_decay():
    """Red if a bias, a norm or a position table decays, or a parameter is lost."""
    model = DAT(small_config(position="fixed"))
    groups = {id(p): group["weight_decay"] for group in dat.parameter_groups(model, 0.05)
              for p in group["params"]}
    for name, parameter in model.named_parameters():
        decays = name.endswith("weight") and "norm" not in name
        assert groups[id(parameter)] == 0.05 * decays, name


# ======== training
def shrink(patch):
    """85 images of `shapes` to train on, 17 to test on, and a tiny model."""
    draw = dat.make_shapes
    patch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4, drop_path=0.1))
    patch.setattr(dat, "make_shapes", lambda count, **rest: draw(count // 117, **rest))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shrink(monkeypatch)


RUN = "--train shapes --batch-size 20 --device cpu "


def start(flags, **environment):
    """The command line with `shrink` in a process of its own."""
    code = ("import sys, pytest, dat, test_dat\ntest_dat.shrink(pytest.MonkeyPatch())\n"
            "sys.exit(dat.main(sys.argv[1:]))")
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags.split()], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(HERE), **environment})


def assert_same_run(a, b, tolerance=0.0):
    """The checkpoints of two runs hold the same, up to the seconds they took."""
    one, other = saved(a), saved(b)
    for name, value in one["model"].items():
        if not tolerance or "bias" not in name:  # a key bias gets rounding alone
            close(value, other["model"][name], tolerance)
    for row, same in zip(one["history"], other["history"], strict=True):
        assert tuple(row[:4]) == pytest.approx(tuple(same[:4]), abs=tolerance)
    for a, b in zip(*(found["optimizer"]["state"].values() for found in (one, other))):
        close(a["exp_avg"], b["exp_avg"], tolerance)


def test_training_reports_and_saves(tiny):
    """Red if metrics are lost, what runs is hidden, or --eval differs."""
    out = succeed(RUN + "--epochs 2 --out o --float32")
    for words in ("85 images to train", "17 to test", "parameters", "4 steps", "s left", "float32",
                  "1 x cpu", "into o/", "batch 20", "--model"):
        assert words in out, words
    rows = [line.split(",") for line in Path("o/metrics.csv").read_text().splitlines()]
    assert rows[0] == ["epoch", "step", "loss", "test_accuracy", "seconds"]
    assert [row[:2] for row in rows[1:]] == [["1", "4"], ["2", "8"]]
    model = DAT(DATConfig(**saved("o")["config"])).eval()
    model.load_state_dict(saved("o")["model"])
    test, _ = dat.load_dataset("shapes", None, False)
    images, labels = dat.Parts("shapes", test, 32, None)[0, list(range(17))]
    accuracy = (model(images).argmax(1) == labels).sum().item() / 17
    assert float(rows[2][3]) == pytest.approx(accuracy)
    expected = f"test accuracy {accuracy:.2%}\n"
    assert out.endswith(expected)
    assert run_cli("--eval shapes --checkpoint o/last.pt") == (0, expected, "")


def test_every_step_starts_without_gradients_and_draws_anew(tiny, monkeypatch):
    """Red if gradients pile up, the optimiser rests, or epochs draw alike."""
    calls, adam = [], torch.optim.AdamW
    for owner, name in ((adam, "zero_grad"), (adam, "step"), (torch, "manual_seed")):
        monkeypatch.setattr(owner, name, lambda *a, real=getattr(owner, name), name=name, **k: (
            calls.append((name, *a)), real(*a, **k))[1])
    succeed(RUN + "--epochs 2 --out o")
    assert [call[0] for call in calls if call[0] != "manual_seed"] == ["zero_grad", "step"] * 8
    seeds = [call for call in calls if call[0] == "manual_seed" and call[1]]
    assert len(set(seeds)) == len(seeds) == 2 * (1 + 4 + 4)


def test_bfloat16_is_used_where_hardware_multiplies_it(tiny, monkeypatch):
    """Red if --float32 is ignored, or a CPU without it is asked for bfloat16."""
    seen, forward = set(), DAT.forward
    monkeypatch.setattr(DAT, "forward", lambda self, images: [
        logits := forward(self, images), seen.add(logits.dtype)][0])
    for able, flag in ((True, ""), (True, "--float32"), (False, ""), (None, "")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able, raising=False)
        if able is None:
            monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
        out = f"o{able}{flag}"
        succeed(f"{RUN} --epochs 1 --out {out} {flag}")
        succeed(f"--eval shapes --device cpu --checkpoint {out}/last.pt")
        assert seen == {torch.bfloat16 if able and not flag else torch.float32}
        seen.clear()


def test_runs_are_numbered_and_seeds_differ(tiny):
    """Red if a second run overwrites the first, or its seed is ignored."""
    for seed in (0, 1):
        succeed(f"{RUN} --epochs 1 --lr 1e-9 --seed {seed}")
    one, two = (saved(f"runs/shapes-cifar-nano-{n}")["model"] for n in (1, 2))
    assert (one["head.weight"] - two["head.weight"]).abs().max() > 0.01
    Path("runs/shapes-cifar-nano-1/last.pt").unlink()
    assert_input_error(RUN + "--out runs/shapes-cifar-nano-1", "not empty")


def test_parts_of_a_batch_add_up(tiny, monkeypatch):
    """Red if parts weigh wrongly, smoothing is not 0.1, or the loss is no mean."""
    gradients, losses, parts = [], [], dat.Parts
    cross_entropy, clip = F.cross_entropy, nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip(parameters, norm)

    def spy(logits, labels, **options):
        target = 0.9 * F.one_hot(labels, 8) + 0.1 / 8
        losses.append(-(target * logits.detach().log_softmax(1)).sum(1).mean().item())
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(dat, "Parts", lambda *a: parts(*a[:3], None))  # no draws in a step
    monkeypatch.setitem(dat.VARIANTS, "cifar-nano", small_config(patch=4))
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", record)
    monkeypatch.setattr(F, "cross_entropy", spy)
    run = RUN + "--epochs 2 --float32 --lr 1e-9 --out "
    succeed(run + "a")
    succeed(run + "b --accumulate 4")
    close(torch.stack(gradients[:8]), torch.stack(gradients[8:]), 1e-6)
    assert len(losses) == 8 + 32
    for out, found in (("a", losses[:8]), ("b", losses[8:])):
        means = [np.mean(half) for half in np.split(np.array(found), 2)]
        assert [row[2] for row in saved(out)["history"]] == pytest.approx(means, rel=1e-5)
    assert_input_error(RUN + "--accumulate 3", "--batch-size", "multiple of 3")
    assert_input_error(RUN + "--batch-size 86", "--batch-size", "85")


def test_the_last_tenth_of_a_long_run_is_not_mixed(folder, tiny, monkeypatch):
    """[D8] Red if mixing goes on to the end or comes in a short run."""
    soft, real = [], F.cross_entropy

    def spy(logits, labels, **options):
        soft.append(labels.ndim == 2)
        return real(logits, labels, **options)

    monkeypatch.setattr(F, "cross_entropy", spy)
    succeed(PHOTOS + "--epochs 4")
    assert soft == [True] * 11 + [False]  # 0.9 of 12 steps
    monkeypatch.setattr(dat, "evaluate", stop)
    for epochs in (99, 100):
        assert run_cli(f"{RUN} --epochs {epochs}")[0] == 130
    assert soft[12:] == [False] * 4 + [True] * 4


def test_two_processes_train_as_one(tiny):
    """Red if gradients are summed, an image counts twice, or draws differ."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    run = RUN + "--epochs 2 --float32 --lr 1e-3 --out "
    both = [start(run + "two", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    succeed(run + "one --accumulate 2")
    outs, errs = zip(*(process.communicate(timeout=100) for process in both))
    assert [process.returncode for process in both] == [0, 0], errs
    assert "strides" not in errs[0] + errs[1]  # DDP's warning
    assert "2 x cpu" in outs[0] and "test accuracy" in outs[0] and outs[1] == ""
    assert_same_run("one", "two", 1e-5)


# ======== checkpoints
@pytest.mark.parametrize("run, moment, call, epoch, tested", [
    (RUN, "evaluate", 2, 2, 1), (PHOTOS, "learning_rate", 5, 1, 1)])
def test_an_interrupted_run_resumes_exactly(folder, tiny, monkeypatch, run, moment, call, epoch,
                                            tested):
    """Red if a step needs what is not saved, or a test costs its epoch."""
    calls, real = [], getattr(dat, moment)

    def interrupted(*args, **kwargs):
        calls.append(1)
        return stop() if len(calls) == call else real(*args, **kwargs)

    made = run + "--epochs 3 --seed 5 --out "
    succeed(made + "whole")
    with monkeypatch.context() as context:
        context.setattr(dat, moment, interrupted)
        assert run_cli(made + "o")[0] == 130
    accuracies = [row[3] for row in saved("o")["history"]]
    assert (saved("o")["epoch"], sum(a is not None for a in accuracies)) == (epoch, tested)
    succeed(run + "--out o --resume --workers 2")
    assert_same_run("whole", "o")


def test_a_killed_run_resumes_exactly(tiny):
    """Red if kill -9 leaves what cannot be resumed, or resuming ends elsewhere."""
    made, last = RUN + "--epochs 30 --out ", RUN + "--out o --resume"
    for flags, seconds in ((made + "o", 0.13), (last, 0.21)):
        process = start(flags)
        while "test accuracy" not in process.stdout.readline():  # an epoch is done, then ..
            assert process.poll() is None
        time.sleep(seconds)  # .. in the middle of anything
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and 0 < saved("o")["epoch"] < 30
    succeed(made + "whole")
    succeed(last)
    assert_same_run("whole", "o")
    assert sorted(os.listdir("o")) == ["last.pt", "metrics.csv"]


@pytest.mark.parametrize("owner, name", [(os, "fsync"), (Path, "replace")])
def test_a_full_disk_keeps_the_checkpoint_before(tiny, monkeypatch, owner, name):
    """Red if a file is written in place, or a part of one is left."""
    calls, real = [], getattr(owner, name)

    def full(*args):
        calls.append(1)
        if len(calls) == 4:  # last.pt after its test
            raise OSError(28, "No space left")
        real(*args)

    monkeypatch.setattr(owner, name, full)
    assert_input_error(RUN + "--epochs 2 --out o", "No space left")
    assert sorted(os.listdir("o")) == ["last.pt", "metrics.csv"]
    assert saved("o")["history"][0][3] is None
    assert_input_error(RUN + "--out o/last.pt/below", "o/last.pt/below")


def test_resuming_something_else_is_refused_by_name(tiny):
    """Red if --resume mixes two runs, or starts where nothing is."""
    succeed(RUN + "--epochs 1 --out o --seed 3")
    for flags, word in (
            ("--epochs 3", "epochs 1"), ("--lr 5e-4", "lr"), ("--seed 1", "seed 3"),
            ("--batch-size 10", "batch_size 20"), ("--model cifar", "cifar-nano"),
            ("--accumulate 2", "accumulate 1"), ("--float32", "float32"), ("--out no", "no")):
        assert_input_error(f"--train shapes --out o --resume {flags}", word)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, monkeypatch):
    """Red if a diverged run goes on, or overwrites its last good checkpoint."""
    calls, real = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: calls.append(1) or real(
        *args, **kwargs) * (math.nan if len(calls) == 6 else 1))
    assert_input_error(RUN + "--epochs 9 --out o", "epoch 2", "finite", "--lr")
    assert saved("o")["epoch"] == 1 and len(saved("o")["history"]) == 1


def test_a_mistake_of_our_own_keeps_its_traceback(tiny, monkeypatch):
    """Red if a broken shape is told as if the user had made a mistake."""
    monkeypatch.setattr(DeformableAttention, "forward", lambda self, x: x @ x)
    with pytest.raises(RuntimeError):
        run_cli(RUN + "--epochs 1")


class Payload:
    def __reduce__(self):
        return (Path.write_text, (Path("pwned"), "x"))


def test_odd_checkpoints_run_nothing(tiny):
    """Red if a pickle is executed, or a file that does not fit ends in a traceback."""
    succeed(RUN + "--epochs 1 --out o")
    good, whole = saved("o"), Path("o/last.pt").read_bytes()
    odd = [b"", whole[:len(whole) // 2], b"x" * 500]
    for content in (Payload(), {"model": Payload()}, {"model": {}}, [1],
                    {**good, "model": {}}, {**good, "config": {"stages": 3}},
                    {**good, "config": {**good["config"], "patch": 2}},
                    {**good, "classes": tuple("abcdefgh")}):
        torch.save(content, "odd.pt")
        odd.append(Path("odd.pt").read_bytes())
    for content in odd:
        Path("o/last.pt").write_bytes(content)
        assert_input_error("--eval shapes --checkpoint o/last.pt", "o/last.pt")
        assert_input_error("--train shapes --resume --out o", "o")
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
    """Red if the authors' settings stop their file, or its geometry is lost."""
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
        publish(model, "theirs.pth", config=settings)
    samples, _ = dat.load_dataset("imagenet", "images", False)
    images, labels = dat.Parts("imagenet", samples, 32, None)[0, list(range(15))]
    accuracy = (model(images).argmax(1) == labels).float().mean()
    loaded = dat.load_official(dat.load_checkpoint("theirs.pth")["model"], model.config)
    assert torch.equal(loaded.eval()(images), model(images))
    run = "--eval imagenet --data images --checkpoint theirs.pth"
    assert f"test accuracy {accuracy:.2%}" in succeed(run + " --model dat-t --float32")
    monkeypatch.setitem(dat.VARIANTS, "dat-s", small_config())
    assert_input_error(run + " --model dat-s", "theirs.pth", "--model dat-s")


def test_fine_tuning_adapts_tables_and_head(folder, monkeypatch):
    """Red if a table is cut, or geometry or weights are lost."""
    small = dat.VARIANTS["dat-t"]
    larger = replace(small, image_size=48, stages=tuple(replace(s, window=4) for s in small.stages))
    monkeypatch.setitem(dat.VARIANTS, "dat-b-384", larger)
    source = randomise(DAT(replace(small, geometry="release"))).float()  # of 7 classes
    publish(source, "theirs.pth")
    run = PHOTOS + "--epochs 1 --lr 1e-12 --checkpoint "
    succeed(run + "theirs.pth --model dat-b-384 --out o")
    found, old = saved("o"), source.state_dict()
    assert DATConfig(**found["config"]) == replace(larger, geometry="release", classes=3)
    for name, value in found["model"].items():
        if name.endswith("table"):
            assert value.shape != old[name].shape
            close(value, dat.resize(old[name], value.shape[-2:]), 1e-6)
        elif not name.startswith("head"):
            close(value, old[name], 1e-6)
    succeed(run + "o/last.pt --out own")
    assert saved("own")["config"]["geometry"] == "release"
    close(saved("own")["model"]["head.weight"], found["model"]["head.weight"], 1e-6)


# ======== the command line
@pytest.mark.parametrize("flags, word", [
    ("--train mnist", "mnist"), ("--eval shapes", "--checkpoint"),
    ("--train shapes --epochs 0", "epochs"), ("--train shapes --batch-size many", "many"),
    ("--train shapes --lr nan", "lr"), ("--train shapes --workers -1", "--workers"),
    ("--train shapes --device cuda", "cuda"), ("--train shapes --eval shapes", "--eval"),
    ("--train shapes --resume", "--out"), ("--train imagenet --data no/where", "no/where")])
def test_wrong_usage_is_one_line(flags, word, tmp_path, monkeypatch):
    """Red if a mistake gives a traceback or starts something."""
    monkeypatch.chdir(tmp_path)
    assert_input_error(flags, word)
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_the_offline_start():
    """Red if a newcomer is not told of the run without a download."""
    assert "--train shapes" in succeed("")


# ======== lab, tutorial, house
def run_lab(monkeypatch, script, flags):
    """What a script of lab/ prints."""
    monkeypatch.setattr(sys, "argv", [script, *flags.split()])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(HERE / "lab" / script), run_name="__main__")
    return out.getvalue()


def test_costs_are_the_papers(monkeypatch):
    """Red if a layer is not counted, or a term of eq. 10 is lost."""
    from lab.cost import deformable_attention_macs
    found = deformable_attention_macs(H=14, W=14, keys=49, dim=384, kernel=5)
    assert found == 79_629_312 + 508_032
    assert "4.56 G" in run_lab(monkeypatch, "cost.py", "--model dat-t")


def test_pictures_show_what_the_model_reads(tiny, monkeypatch):
    """Red if points or a figure are wrong."""
    from lab import draw, figures
    model, images = DAT(small_config()), torch.randn(2, 3, 16, 20)
    for view, points in zip(draw.inspect(model, images), model.sampling_points(images)):
        assert torch.equal(view.points, points)
    succeed(RUN + "--epochs 1 --out o")
    run_lab(monkeypatch, "draw.py", "shapes:3 --checkpoint o/last.pt --out a.png")
    assert Path("a.png").read_bytes()[1:4] == b"PNG"
    for name in ("keys", "geometry", "table"):
        getattr(figures, name)().savefig(io.BytesIO())


def test_the_study_measures_where_points_lie():
    """Red if points are sought at other places."""
    from lab import study
    model, (images, labels, masks) = DAT(study.model(offsets=False)), dat.make_shapes(6, seed=1)
    full, half, none = (study.measure(model, images, labels, torch.arange(32).expand_as(masks) < n)
                        for n in (32, 16, 0))
    assert half["on"] == pytest.approx(full["on"] / 2) and none["on"] == 0


def test_a_detector_learns_and_its_boxes_are_in_pixels():
    """Red if the backbone, the boxes of a scene, their units or AP50 are wrong."""
    from lab import detect
    scenes, targets = detect.make_scenes(60, 1)
    perfect = [target | {"scores": target["labels"] + 1.0} for target in targets]
    assert detect.average_precision(perfect, targets) == pytest.approx(1)
    assert detect.average_precision(perfect[1:], targets) < 0.2
    torch.manual_seed(0)
    detector, losses = detect.make_detector(detect.CONFIG), []
    optimizer = torch.optim.AdamW(detector.parameters())
    for _ in range(3):
        losses.append(sum(detector(scenes[:4], targets[:4]).values()))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    boxes = detector.eval()([torch.rand(3, 96, 160)])[0]["boxes"]
    assert boxes.min() >= 0 and (boxes.amax(0) <= torch.tensor([160, 96] * 2)).all()
    assert detect.draw(scenes, targets, perfect, []).shape == (3, 2 * 386 + 2, 3 * 514 + 2)


def test_the_benchmark_starts(monkeypatch):
    """Red if it uses a name that is gone."""
    with pytest.raises(SystemExit, match="0"):
        run_lab(monkeypatch, "bench.py", "--help")


def tutorial_blocks(language):
    text = (HERE / "tutorial.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```\n(?:```text\n(.*?)```\n)?", text, re.DOTALL)


def test_the_tutorial_prints_what_it_shows():
    """Red if a Python block fails or prints something else."""
    namespace, options = {}, torch._tensor_str.PRINT_OPTS.__dict__.copy()
    try:
        for code, expected in tutorial_blocks("python"):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "tutorial.md", "exec"), namespace)
            assert out.getvalue() == expected, code
    finally:
        torch._tensor_str.PRINT_OPTS.__dict__.update(options)


def test_the_tutorial_quotes_the_code_as_it_is():
    """Red if a quoted line of dat.py has changed there."""
    code, quotes = (HERE / "dat.py").read_text(), tutorial_blocks("py")
    assert len(quotes) > 5 and [quote for quote, _ in quotes if quote not in code] == []


def test_the_loops_share_no_code_with_the_model():
    """Red if the reference imports anything but numpy and math."""
    code = (HERE / "reference_numpy.py").read_text()
    assert set(re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE)) == {"numpy", "math"}


def test_requirements_are_the_same_everywhere():
    """Red if requirements.txt and dat.py's metadata (PEP 723) drift apart."""
    header = re.search(r"# dependencies = \[(.*?)\]", (HERE / "dat.py").read_text()).group(1)
    assert re.findall(r'"(.+?)"', header) == (HERE / "requirements.txt").read_text().split()


def test_every_departure_is_explained_and_pinned():
    """Red if a tag of dat.py is missing from the tutorial or these tests."""
    tags = set(re.findall(r"^    \[(D\d+)\]", dat.__doc__, re.MULTILINE))
    assert len(tags) == 8
    for file in ("tutorial.md", "test_dat.py"):
        text = (HERE / file).read_text()
        assert {tag for tag in tags if f"[{tag}]" in text} == tags, file
