"""What a model costs: its stages, parameters and multiply-accumulates, beside the paper's figures.

    python lab/cost.py --model dat-t
"""
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run

PUBLISHED = {"dat-t": 4.6, "dat-s": 9.0, "dat-b": 15.8, "dat-b-384": 49.8}  # G, in the paper


def deformable_attention_macs(*, H: int, W: int, keys: int, dim: int, kernel: int) -> int:
    """Multiply-accumulates of one deformable attention, `keys` = Ns. Paper: Eq. 10.
    In the paper's example (H = W = 14, Ns = 49, C = 384, k = 5) the first three terms are 79.63M;
    the last, what the offsets cost, is printed as 5.08M but is 0.51M."""
    N, Ns, C = H * W, keys, dim
    return 2 * N * Ns * C + 2 * N * C ** 2 + 2 * Ns * C ** 2 + (kernel ** 2 + 2) * Ns * C


def count_macs(config: dat.DATConfig, size: int) -> int:
    """Multiply-accumulates of an image of `size` px: those of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        dat.DAT(config).eval().to("meta")(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() // 2


def main(parser):
    parser.add_argument("--model", choices=dat.VARIANTS, default="dat-t")
    name = parser.parse_args().model
    config = dat.VARIANTS[name]
    model, row = dat.DAT(config), "{:9} {:>5} {:>6} {:>7}  {:18} {:>11}".format
    print(row("map", "C", "heads", "groups", "blocks", "parameters"))
    for stage, (H, W), module in zip(config.stages, config.map_sizes(), model.stages):
        print(row(f"{H} x {W}", stage.dim, stage.heads, stage.groups or "-", stage.blocks,
                  f"{sum(p.numel() for p in module.parameters()):,}"))
    print(f"in all, with stem and head: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{count_macs(config, config.image_size) / 1e9:.2f} G multiply-accumulates "
          f"(paper: {PUBLISHED.get(name, '-')})")


if __name__ == "__main__":
    run(main, __doc__)
