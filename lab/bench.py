"""Speed and memory of DAT-T beside the authors' release on this CPU (tutorial.md, section 16).

    python figures/beside.py DIR [--rounds N]                     # run from the repository's root
    DIR: a checkout of github.com/LeapLabTHU/DAT at 566a593; it needs einops. (What it takes of timm
    is stood in for below, so that timm need not be there.)

Each is a process of its own; these make a call in turn, so that noise meets all alike. Batch 8 of
224 px, one loop for all. As in its own program, dat.py keeps freed memory and has AdamW fused; the
release does neither. "halves": dat.py's step in two parts (--accumulate 2).
"""
import argparse
import resource
import subprocess
import sys
import time
import types
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import dat


class DropPath(torch.nn.Module):
    """timm's, by our function."""

    def __init__(self, rate=0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return dat.drop_path(x, self.rate, self.training)


def release(folder):
    layers = types.ModuleType("timm.models.layers")
    layers.DropPath, layers.trunc_normal_ = DropPath, torch.nn.init.trunc_normal_
    layers.to_2tuple = lambda n: n if isinstance(n, tuple) else (n, n)
    models = types.ModuleType("models")                         # without its __init__
    models.__path__ = [f"{folder}/models"]
    for name in ("timm", "timm.models"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules |= {"timm.models.layers": layers, "models": models}
    from models.dat import DAT
    return DAT(
        img_size=224, patch_size=4, num_classes=1000, expansion=4, dim_stem=96,
        dims=[96, 192, 384, 768], depths=[2, 2, 6, 2], heads=[3, 6, 12, 24],
        stage_spec=[["L", "S"], ["L", "S"], ["L", "D"] * 3, ["L", "D"]], window_sizes=[7] * 4,
        groups=[-1, -1, 3, 6], use_pes=[False, False, True, True], dwc_pes=[False] * 4,
        strides=[-1, -1, 1, 1], sr_ratios=[-1] * 4, offset_range_factor=[-1, -1, 2, 2],
        no_offs=[False] * 4, fixed_pes=[False] * 4, use_dwc_mlps=[False] * 4,
        use_conv_patches=False, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.2)


def serve(folder, who, task, dtype):
    """For each line of standard input one call: prints its images per second and the largest memory
    of the process so far in GiB."""
    ours, parts = who != "release", 2 if who == "halves" else 1
    if ours:
        dat.keep_freed_memory()
    torch.manual_seed(0)
    model = dat.build("dat-t") if ours else release(folder)
    model.train(task == "training")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=ours)
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))

    def infer():
        with torch.inference_mode(), dat.autocast(images.device, getattr(torch, dtype)):
            model(images)

    def step():
        optimizer.zero_grad()
        for x, y in zip(images.chunk(parts), labels.chunk(parts)):
            with dat.autocast(images.device, getattr(torch, dtype)):
                found = model(x)
                loss = F.cross_entropy(found if ours else found[0], y) / parts
            loss.backward()
            del found, loss
        optimizer.step()

    for _ in sys.stdin:
        start = time.perf_counter()
        infer() if task == "inference" else step()
        speed = 8 / (time.perf_counter() - start)
        print(speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20, flush=True)


def compare(folder, task, dtype, calls):
    """For each program: images per second, median, and the largest memory."""
    programs = {who: subprocess.Popen([sys.executable, __file__, folder, "--one", who, task, dtype],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                for who in ("release", "here", "halves")[:2 + (task == "training")]}
    found = {who: [] for who in programs}
    for _ in range(calls):
        for who, program in programs.items():
            print(file=program.stdin, flush=True)
            found[who].append([*map(float, program.stdout.readline().split())])
    for program in programs.values():
        program.communicate()
    return {who: (median(speed for speed, _ in rows[2:]), rows[-1][1])      # two warm up
            for who, rows in found.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return serve(args.folder, *args.one)
    found = {}
    for _ in range(args.rounds):
        for task, calls in (("inference", 12), ("training", 9)):
            for dtype in ("float32", "bfloat16"):
                for who, row in compare(args.folder, task, dtype, calls).items():
                    found.setdefault((task, dtype, who), []).append(row)
    print(f"median of {args.rounds} rounds (smallest to largest), torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    for (task, dtype, who), rows in found.items():
        speeds, peaks = zip(*rows)
        print(f"{task:9} {dtype:8} {who:7} {median(speeds):6.1f} images/s ({min(speeds):.1f} to "
              f"{max(speeds):.1f}), {median(peaks):.2f} GiB ({min(peaks):.2f} to {max(peaks):.2f})")
        if who != "release":
            theirs = found[task, dtype, "release"]
            faster, larger = zip(*((b[0] / a[0], b[1] / a[1]) for a, b in zip(theirs, rows)))
            print(f"    ratio in a round: {median(faster):.2f} ({min(faster):.2f} to "
                  f"{max(faster):.2f}), memory {median(larger):.2f} ({min(larger):.2f} to "
                  f"{max(larger):.2f})")


main()
