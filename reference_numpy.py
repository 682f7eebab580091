"""Vision Transformer with Deformable Attention, written a second time as plain NumPy loops.

Paper: Xia, Pan, Song, Li, Huang, CVPR 2022, arXiv 2201.00520. Images go in, logits come out, in
float64, with one image, one head, one query at a time: slow, and close to the printed equations.
It shares no line with dat.py, whose tests compare the two. Evaluation only (no drop path).

Map from the paper to this file:
    eq. 2    attention of one query            attend
    eq. 4-5  pre-norm block                    block
    eq. 6    queries, keys, values             deformable_attention
    eq. 7    points, bounded offsets           cell_centres, largest_offset, sampling_points
    eq. 8    bilinear sampling                 tent, bilinear
    eq. 9    relative position bias            relative_bias, deformable_attention
    Swin     local and shifted windows         window_attention
    sec. 3.3 the four stages                   forward, network

Symbols: H W C rows, columns, channels of a map; N = H*W queries; G groups; M heads; Hk Wk rows and
columns of the key grid, K = Hk*Wk keys; B images; k and r size and stride of the offset
convolution; w window side; s offset range.
Layout: an image is (3, H, W); every map is channels-last, (H, W, C).
Units: every coordinate is in pixels of the map it belongs to, in the order (y, x); 0 is the centre
of the first pixel and H - 1 that of the last.
Parameters: a dict from name to array, linear weights (out, in), convolutions (out, in, k, k).
"""

import math

import numpy as np

# ---------------------------------------------------------------------- elementary functions


def linear(x, weight, bias=None):
    """y = x W^T + b. Shape: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def layer_norm(x, weight, bias):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift.

    Paper: LN of eq. 4-5; epsilon 1e-5, biased variance. Shape: x (..., C) -> (..., C).
    """
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred ** 2).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    """x Phi(x), Phi the normal distribution function by erf. Shape: (...) -> (...)."""
    erf = np.vectorize(math.erf, otypes=[float])
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def softmax(scores):
    """exp(s_i) / sum_j exp(s_j) over the last axis. Shape: (..., K) -> (..., K)."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))  # no overflow
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def convolution(x, weight, bias=None, stride=1, padding=0):
    """Two-dimensional convolution, zeros around the map.

    Shape: x (H, W, in), weight (out, in, k, k) -> (Ho, Wo, out), Ho = (H + 2 padding - k)//r + 1.
    """
    k = weight.shape[-1]
    x = np.pad(x, ((padding, padding), (padding, padding), (0, 0)))
    height, width = (x.shape[0] - k) // stride + 1, (x.shape[1] - k) // stride + 1
    rows = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)  # (out, k*k*in), as a patch lies
    out = np.empty((height, width, len(weight)))
    for i in range(height):
        for j in range(width):
            patch = x[i * stride:i * stride + k, j * stride:j * stride + k]  # (k, k, in)
            out[i, j] = rows @ patch.ravel()
    return out if bias is None else out + bias


def pad_to_multiple(x, size):
    """Zeros at the bottom and right: H and W of x (H, W, C) become multiples of `size`."""
    return np.pad(x, ((0, -x.shape[0] % size), (0, -x.shape[1] % size), (0, 0)))


def bicubic_matrix(before, after):
    """The matrix that resizes an axis of `before` samples to `after` samples.

    Keys's cubic kernel with a = -0.75, half-pixel centres, border samples repeated: the convention
    of PyTorch's interpolate(mode="bicubic", align_corners=False). The identity if before == after.
    Shape: -> (after, before). Units: position and distance in samples of the old axis.
    """
    a = -0.75
    matrix = np.zeros((after, before))
    for i in range(after):
        position = (i + 0.5) * before / after - 0.5
        first = math.floor(position) - 1
        for n in range(first, first + 4):
            t = abs(position - n)
            if t <= 1:
                weight = (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
            else:
                weight = a * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
            matrix[i, min(max(n, 0), before - 1)] += weight
    return matrix


def bicubic_resize(z, size):
    """Resize the last two axes to `size`; bias tables for other map sizes, as at 384 pixels.

    Shape: z (..., h, w), size (h', w') -> (..., h', w').
    """
    return bicubic_matrix(z.shape[-2], size[0]) @ z @ bicubic_matrix(z.shape[-1], size[1]).T


# ---------------------------------------------------------------------- coordinates and sampling


def cell_centres(n, size, geometry):
    """Coordinates of n cells along an axis of `size` pixels; n = size gives the queries.

    Paper: sec. 3.2, reference points 0 .. HG-1 stretched from the first pixel to the last
    (geometry "paper", the middle if n = 1); the authors' code instead puts them at the middles of
    n equal parts of the interval [0, size-1] (geometry "release").
    Shape: -> (n,). Units: pixels. Raises: ValueError for an unknown geometry.
    """
    if geometry == "paper":
        return np.array([i * (size - 1) / (n - 1) if n > 1 else (size - 1) / 2 for i in range(n)])
    if geometry == "release":
        return np.array([(i + 0.5) / n * (size - 1) for i in range(n)])
    raise ValueError(f"geometry={geometry!r} is neither 'paper' nor 'release'")


def largest_offset(n, size, offset_range, geometry):
    """How far a point of n cells may move along an axis of `size` pixels.

    Paper: the s of dp <- s tanh(dp) below eq. 7; s = 2 is about one cell. Units: pixels.
    """
    length = size if geometry == "paper" else size - 1
    return offset_range / 2 * length / n


def tent(position, size):
    """g(a, b) = max(0, 1 - |a - b|) between positions and the pixels 0 .. size-1.

    Paper: below eq. 8. At most two entries of a row are not zero, none for a position that is one
    pixel or more off the map. Shape: position (...) -> (..., size). Units: pixels.
    """
    distance = np.abs(np.asarray(position)[..., None] - np.arange(size))
    return np.maximum(0, 1 - distance)


def bilinear(z, y, x):
    """phi(z; (y, x)) = sum over (ry, rx) of g(y, ry) g(x, rx) z[ry, rx]; zeros off the map.

    Paper: eq. 8, the sum over the whole map as printed. Shape: z (H, W, C) -> (C,).
    Units: y, x in pixels of z.
    """
    height, width, _ = z.shape
    rows = np.tensordot(tent(y, height), z, axes=1)  # (W, C), the sum over ry
    return tent(x, width) @ rows


def relative_bias(table, query_y, query_x, points):
    """phi(B^; R): the bias of every query and key of one head, R their displacement q - p.

    Paper: eq. 9. The table holds displacements -(H-1) .. H-1, so q - p stands at q - p + (H-1),
    and eq. 8 reads between its entries (zeros off the table). For one key the queries' indices
    form a grid, so the sums of eq. 8 over rows and columns are two matrix products.
    Shape: table (2H-1, 2W-1), query_y (H,), query_x (W,), points (Hk, Wk, 2) -> (H, W, Hk, Wk).
    Units: queries and points in pixels, points in the order (y, x).
    """
    height, width = len(query_y), len(query_x)
    bias = np.empty((height, width) + points.shape[:2])
    for i, j in np.ndindex(points.shape[:2]):
        y, x = points[i, j]
        rows = tent(query_y - y + height - 1, 2 * height - 1)  # (H, 2H-1)
        columns = tent(query_x - x + width - 1, 2 * width - 1)  # (W, 2W-1)
        bias[:, :, i, j] = rows @ table @ columns.T
    return bias


# ---------------------------------------------------------------------- attention


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(d) + bias) v for one query of one head.

    Paper: eq. 2 and 9. Shape: q (d,), k (K, d), v (K, d), bias (K,) -> (d,).
    """
    return softmax(k @ q / math.sqrt(len(q)) + bias) @ v


def window_attention(x, p, heads, window, shift):
    """Self-attention inside windows, with a learned bias per displacement inside a window.

    Paper: sec. 3.3, local (shift 0) and shifted-window (shift ceil(w/2)) attention, after Swin.
    Two tokens attend to each other if and only if they lie in the same window. The cuts between
    windows run at shift, shift + w, shift + 2w, ..; windows at the border just have fewer tokens.
    Shape: x (H, W, C) -> (H, W, C); p["table"] (M, 2w-1, 2w-1).
    Units: window and shift in tokens, 0 <= shift <= window; displacement q - k in the order (y, x).
    Departs: the release rolls the map and masks the wrapped pairs with -100; here none exist.
    """
    height, width, channels = x.shape
    qkv = linear(x, p["qkv.weight"], p["qkv.bias"])
    q, k, v = (each.reshape(height, width, heads, channels // heads)
               for each in np.split(qkv, 3, axis=-1))

    def same_window(a, b):
        return (a - shift) // window == (b - shift) // window

    z = np.empty_like(q)  # (H, W, M, d)
    for qy, qx in np.ndindex(height, width):
        keys = [(row, column)
                for row in range(height) if same_window(qy, row)
                for column in range(width) if same_window(qx, column)]
        ky, kx = np.array(keys).T
        for m in range(heads):
            bias = p["table"][m, qy - ky + window - 1, qx - kx + window - 1]
            z[qy, qx, m] = attend(q[qy, qx, m], k[ky, kx, m], v[ky, kx, m], bias)
    return linear(z.reshape(x.shape), p["out.weight"], p["out.bias"])


def offset_network(q, p, stride, kernel):
    """theta_offset: what a group's queries ask their points to move by, not yet bounded.

    Paper: fig. 2(b): depth-wise k x k convolution of stride r, LayerNorm, GELU, and a 1x1
    convolution without bias, so that no constant shifts all points alike.
    Shape: q (H, W, C/G) -> (Hk, Wk, 2) in the order (y, x); no unit before tanh.
    """
    weight, bias = p["offset.conv.weight"], p["offset.conv.bias"]  # (C/G, 1, k, k), (C/G,)
    z = [convolution(q[:, :, c:c + 1], weight[c:c + 1], bias[c], stride, kernel // 2)
         for c in range(q.shape[-1])]  # depth-wise: every channel has its own kernel
    z = np.concatenate(z, axis=-1)  # (Hk, Wk, C/G)
    z = gelu(layer_norm(z, p["offset.norm.weight"], p["offset.norm.bias"]))
    return linear(z, p["offset.out.weight"])


def sampling_points(q, p, groups, stride, kernel, offset_range, geometry, offsets=True):
    """Where every group samples the map: reference points plus bounded offsets.

    Paper: eq. 7 and the offset groups of sec. 3.2: each group of channels goes through the same
    offset network and gets its own points. offsets=False is the ablation without offsets.
    Shape: q (H, W, C) -> (G, Hk, Wk, 2). Units: pixels, order (y, x).
    """
    height, width, channels = q.shape
    size = channels // groups
    points = []
    for g in range(groups):
        if offsets:
            raw = offset_network(q[:, :, g * size:(g + 1) * size], p, stride, kernel)
        else:
            raw = np.zeros((math.ceil(height / stride), math.ceil(width / stride), 2))
        rows, columns, _ = raw.shape
        reference = np.stack(np.meshgrid(cell_centres(rows, height, geometry),
                                         cell_centres(columns, width, geometry),
                                         indexing="ij"), axis=-1)  # (Hk, Wk, 2)
        largest = np.array([largest_offset(rows, height, offset_range, geometry),
                            largest_offset(columns, width, offset_range, geometry)])
        points.append(reference + largest * np.tanh(raw))
    return np.stack(points)


def position_bias(table, position, query_y, query_x, points):
    """The position bias of one head; `points` are those of the head's group.

    Paper: eq. 9 for "relative"; "fixed" (one number per query cell and key cell) and "none" are
    rows of the ablation on position encodings. A table made for another map size is resized.
    Shape: table (2H0-1, 2W0-1) or (H0, W0, Hk0, Wk0) or None; query_y (H,), query_x (W,),
    points (Hk, Wk, 2) -> (H, W, Hk, Wk). Units: queries and points in pixels, order (y, x).
    Raises: ValueError for an unknown position.
    """
    height, width = len(query_y), len(query_x)
    rows, columns, _ = points.shape
    if position == "relative":
        table = bicubic_resize(table, (2 * height - 1, 2 * width - 1))
        return relative_bias(table, query_y, query_x, points)
    if position == "fixed":
        table = bicubic_resize(table, (rows, columns)).transpose(2, 3, 0, 1)  # keys, queries
        return bicubic_resize(table, (height, width)).transpose(2, 3, 0, 1)
    if position == "none":
        return np.zeros((height, width, rows, columns))
    raise ValueError(f"position={position!r} is none of 'relative', 'fixed', 'none'")


def deformable_attention(x, p, heads, groups, stride, kernel, offset_range, geometry,
                         offsets=True, position="relative"):
    """Attention of every pixel to features sampled at points that the queries moved.

    Paper: eq. 6-9. Head m takes the points of group m // (M/G).
    Shape: x (H, W, C) -> output (H, W, C), points (G, Hk, Wk, 2).
    Units: points in pixels of x, order (y, x).
    """
    height, width, channels = x.shape
    size, depth = channels // groups, channels // heads  # channels of a group, of a head
    q = linear(x, p["q.weight"], p["q.bias"])  # eq. 6
    points = sampling_points(q, p, groups, stride, kernel, offset_range, geometry, offsets)
    rows, columns = points.shape[1:3]

    sampled = np.empty((rows, columns, channels))  # x~ of eq. 7: every group at its own points
    for g, i, j in np.ndindex(groups, rows, columns):
        group = slice(g * size, (g + 1) * size)
        sampled[i, j, group] = bilinear(x[:, :, group], *points[g, i, j])
    k = linear(sampled, p["k.weight"], p["k.bias"]).reshape(rows * columns, channels)
    v = linear(sampled, p["v.weight"], p["v.bias"]).reshape(rows * columns, channels)

    query_y, query_x = cell_centres(height, height, geometry), cell_centres(width, width, geometry)
    z = np.empty(x.shape)
    for m in range(heads):
        head = slice(m * depth, (m + 1) * depth)
        table = None if position == "none" else p["table"][m]
        bias = position_bias(table, position, query_y, query_x, points[m // (heads // groups)])
        for qy, qx in np.ndindex(height, width):  # eq. 9
            z[qy, qx, head] = attend(q[qy, qx, head], k[:, head], v[:, head], bias[qy, qx].ravel())
    return linear(z, p["out.weight"], p["out.bias"]), points


# ---------------------------------------------------------------------- block and network


def part(state, prefix):
    """The parameters below `prefix`, under the rest of their names."""
    return {name[len(prefix):]: array for name, array in state.items() if name.startswith(prefix)}


def block(z, p, letter, stage, config):
    """Pre-norm block: z' = attention(LN(z)) + z, then z'' = MLP(LN(z')) + z'.

    Paper: eq. 4-5. letter: L window, S shifted window, D deformable attention.
    Shape: z (H, W, C) -> z'' (H, W, C) and points (G, Hk, Wk, 2) in pixels, order (y, x), or None.
    Raises: ValueError for an unknown letter.
    """
    attention, points = part(p, "attention."), None
    x = layer_norm(z, p["norm1.weight"], p["norm1.bias"])
    if letter == "D":
        x, points = deformable_attention(
            x, attention, stage["heads"], stage["groups"], stage["stride"], stage["kernel"],
            stage["offset_range"], config["geometry"], config["offsets"], config["position"])
    elif letter in ("L", "S"):
        shift = math.ceil(stage["window"] / 2) if letter == "S" else 0
        x = window_attention(x, attention, stage["heads"], stage["window"], shift)
    else:
        raise ValueError(f"block letter {letter!r} is none of L, S, D")
    z = x + z
    x = layer_norm(z, p["norm2.weight"], p["norm2.bias"])
    x = gelu(linear(x, p["mlp.expand.weight"], p["mlp.expand.bias"]))
    return linear(x, p["mlp.contract.weight"], p["mlp.contract.bias"]) + z, points


def stem(x, p, kind, patch):
    """From pixels to the first map.

    Paper: sec. 3.3, patch embedding: p x p convolution of stride p and LayerNorm (kind "patch").
    The authors' overlapping switch, two 3x3 convolutions with norms, is kind "conv".
    Shape: x (H, W, 3) -> (ceil(H/patch), ceil(W/patch), C). Raises: ValueError for another kind.
    """
    if kind == "patch":
        x = convolution(pad_to_multiple(x, patch), p["conv.weight"], p["conv.bias"], patch)
        return layer_norm(x, p["norm.weight"], p["norm.bias"])
    if kind == "conv":
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[patch]
        x = convolution(x, p["0.conv.weight"], p["0.conv.bias"], first, padding=1)
        x = gelu(layer_norm(x, p["0.norm.weight"], p["0.norm.bias"]))
        x = convolution(x, p["2.conv.weight"], p["2.conv.bias"], second, padding=1)
        return layer_norm(x, p["2.norm.weight"], p["2.norm.bias"])
    raise ValueError(f"stem={kind!r} is neither 'patch' nor 'conv'")


def down_sample(x, p, kind):
    """Between stages: 2x2 convolution of stride 2 (3x3 after the "conv" stem) and LayerNorm.

    Paper: sec. 3.3. Shape: x (H, W, C) -> (ceil(H/2), ceil(W/2), C').
    """
    if kind == "patch":
        x = convolution(pad_to_multiple(x, 2), p["conv.weight"], stride=2)
    else:
        x = convolution(x, p["conv.weight"], stride=2, padding=1)
    return layer_norm(x, p["norm.weight"], p["norm.bias"])


def forward(image, state, config):
    """One image through the whole network.

    Paper: sec. 3.3, fig. 3. Shape: image (3, H, W) -> logits (classes,), the map after every
    stage [(H_i, W_i, C_i)], the points of every deformable block [(G, Hk, Wk, 2)].
    Units: points in pixels of the block's own map, order (y, x).
    """
    features, points = [], []
    z = np.asarray(image, dtype=np.float64).transpose(1, 2, 0)  # (H, W, 3)
    z = stem(z, part(state, "stem."), config["stem"], config["patch"])
    for i, stage in enumerate(config["stages"]):
        p = part(state, f"stages.{i}.")
        if i > 0:
            z = down_sample(z, part(p, "down."), config["stem"])
        for j, letter in enumerate(stage["blocks"]):
            z, block_points = block(z, part(p, f"blocks.{j}."), letter, stage, config)
            if block_points is not None:
                points.append(block_points)
        features.append(z)
    z = layer_norm(z, state["norm.weight"], state["norm.bias"]).mean(axis=(0, 1))  # (C,)
    return linear(z, state["head.weight"], state["head.bias"]), features, points


def network(images, state, config):
    """Logits; state maps names to arrays, config holds plain values, its stages are dicts.

    Paper: sec. 3.3. Shape: images (B, 3, H, W) -> (B, classes).
    """
    return np.stack([forward(image, state, config)[0] for image in images])


def network_features(images, state, config):
    """The map after the blocks of every stage, not normalised: a feature pyramid.

    Paper: sec. 3.3. Shape: images (B, 3, H, W) -> list of (B, C_i, H_i, W_i).
    """
    maps = [forward(image, state, config)[1] for image in images]
    return [np.stack(stage).transpose(0, 3, 1, 2) for stage in zip(*maps)]


def network_points(images, state, config):
    """The sampling points of every deformable block, in the order of the blocks.

    Paper: eq. 7, p + dp. Shape: images (B, 3, H, W) -> list of (B, G, Hk, Wk, 2).
    Units: pixels of the block's own map, order (y, x).
    """
    points = [forward(image, state, config)[2] for image in images]
    return [np.stack(of_block) for of_block in zip(*points)]
