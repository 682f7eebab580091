"""What a model costs: its stages, parameters and multiply-accumulates, beside the paper's figures.

    python lab/cost.py --model dat-t
"""
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import Parser, count, run

PUBLISHED = {"dat-t": 4.6, "dat-s": 9.0, "dat-b": 15.8, "dat-b-384": 49.8}  # G, in the paper


def deformable_attention_macs(*, H: int, W: int, keys: int, dim: int, kernel: int) -> int:
    """Multiply-accumulates of one deformable attention, `keys` = Ns. Paper: Eq. 10.

    In the paper's example (H = W = 14, Ns = 49, C = 384, k = 5) the first three terms are 79.63M;
    the last, what the offsets cost, is printed as 5.08M but is 0.51M.
    """
    N, Ns, C = H * W, keys, dim
    return 2 * N * Ns * C + 2 * N * C ** 2 + 2 * Ns * C ** 2 + (kernel ** 2 + 2) * Ns * C


def stage_macs(config: dat.DATConfig, size: int) -> list[int]:
    """Multiply-accumulates of an image of `size` px, as PyTorch counts matrix products and
    convolutions: of each stage (the first with the stem), of the head."""
    with FlopCounterMode(display=False) as counter:
        dat.DAT(config).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    macs = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    names = [rf"DAT\.(stages\.{i}\.(down|blocks\.\d+)|{'stem' if i == 0 else ''})"
             for i in range(len(config.stages))] + [r"DAT\.head"]
    found = [sum(n for name, n in macs.items() if re.fullmatch(part, name)) for part in names]
    assert sum(found) == macs["Global"]
    return found


def main(parser: Parser) -> None:
    parser.add_argument("--model", choices=dat.VARIANTS, default="dat-t")
    parser.add_argument("--image-size", type=count, metavar="N")
    args = parser.parse_args()
    config = dat.VARIANTS[args.model]
    model, size = dat.DAT(config), args.image_size or config.image_size
    row = "{:5} {:>9} {:>5} {:>6} {:>7}  {:18} {:>11} {:>7}".format
    print(args.model, "for an image of", size, "px")
    print(row("stage", "map", "C", "heads", "groups", "blocks", "parameters", "MMAC"))
    macs, sizes = stage_macs(config, size), replace(config, image_size=size).map_sizes()
    for i, (stage, (H, W)) in enumerate(zip(config.stages, sizes)):
        parameters = sum(p.numel() for name, p in model.named_parameters()
                         if name.startswith(f"stages.{i}.") or i == 0 and name.startswith("stem."))
        print(row(i + 1, f"{H} x {W}", stage.dim, stage.heads, stage.groups or "-", stage.blocks,
                  f"{parameters:,}", f"{macs[i] / 1e6:,.0f}"))
    paper = PUBLISHED.get(args.model) if size == config.image_size else None
    print(f"in all, with the head: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{sum(macs) / 1e9:.2f} G multiply-accumulates" + f" (paper: {paper} G)" * bool(paper))


if __name__ == "__main__":
    run(main, __doc__)
