"""Speed and memory of inference and of a training step: medians of 15 calls after 2.

    python lab/bench.py --model dat-t --batch-size 8

--release DIR measures the authors' DAT-T beside ours, a call of each in turn. DIR is a checkout of
LeapLabTHU/DAT at 566a593, which needs einops and timm. Each row is a process of its own. Memory is
the process's; on a GPU, PyTorch's. Ours uses bfloat16 where hardware has it, theirs float32.
"""
import argparse
import resource
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import run
from lab.cost import count_macs


def release(folder):
    """The authors' DAT-T, from their folder `models` without its __init__."""
    models = sys.modules["models"] = types.ModuleType("models")
    models.__path__ = [f"{folder}/models"]
    warnings.simplefilter("ignore")
    from models.dat import DAT
    return DAT(stage_spec=[["L", "S"], ["L", "S"], ["L", "D"] * 3, ["L", "D"]], drop_path_rate=0.2,
               strides=[-1, -1, 1, 1], offset_range_factor=[-1, -1, 2, 2],
               use_pes=[False, False, True, True])  # the rest of DAT-T is the default


def workload(args, task):
    """Batch, side of an image or a matrix, floating point operations of a call."""
    if task == "product":
        side = 8192 if args.device == "cuda" else 2048
        return 1, side, 2 * side ** 3
    config = dat.VARIANTS[args.model]
    B, size = (1, 1024) if task == "1024 px" else (args.batch_size, config.image_size)
    return B, size, B * count_macs(config, size) * (6 if task == "training" else 2)


def serve(args, who, task):
    """A row's process: for each line of standard input a call, its seconds and the peak so far."""
    ours, (B, size, _) = who == "ours", workload(args, task)
    fast = ours and dat.has_bfloat16(args.device)
    torch.manual_seed(0)
    if task == "product":
        a, b = torch.randn(2, size, size, device=args.device)
    else:
        model = dat.build(args.model, image_size=size) if ours else release(args.release)
        model = model.to(args.device).train(task == "training")
        forward = torch.compile(model, dynamic=False) if args.compile and ours else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=ours)
        images = torch.randn(B, 3, size, size, device=args.device)
        labels = torch.randint(10, (B,), device=args.device)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=fast):
            if task == "product":
                a @ b
            elif task == "training":
                optimizer.zero_grad()
                found = forward(images)
                F.cross_entropy(found if ours else found[0], labels).backward()
                optimizer.step()
            else:
                with torch.inference_mode():
                    forward(images)
        if args.device == "cuda":
            torch.cuda.synchronize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # of KiB: Linux
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda" else peak
        print(time.perf_counter() - start, peak, flush=True)


def measure(names, task):
    """{name: its (seconds, peak in GiB) of 15 calls}, the processes' calls in turn."""
    found, processes = {name: [] for name in names}, {name: subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve", name, task], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True) for name in names}
    for name in names * 17:
        print(file=processes[name].stdin, flush=True)
        answer = processes[name].stdout.readline().split()
        if not answer:
            raise dat.InputError(f"{name}, {task}: broke off; try a smaller --batch-size")
        found[name].append([*map(float, answer)])
    for process in processes.values():
        process.communicate()
    return {name: calls[2:] for name, calls in found.items()}


def main(parser):
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--model", choices=dat.VARIANTS, default="dat-t")
    add("--batch-size", type=int, default=128 if cuda else 8)
    add("--device", choices=("cpu", "cuda")[:1 + cuda], default="cuda" if cuda else "cpu")
    add("--compile", action="store_true", help="torch.compile ours")
    add("--release", metavar="DIR", help="compare with the authors' code")
    add("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args, *args.serve)
    if args.release and not Path(args.release, "models/dat.py").is_file():
        raise dat.InputError(f"--release {args.release}: expected models/dat.py there")
    print(f"{args.model}, batch {args.batch_size}, {args.device}, torch {torch.__version__}\n"
          f"{'':18}images/s (slowest to fastest)  of a product  peak, GiB")
    both, products = ["release"] * bool(args.release) + ["ours"], {}
    for task in ("product", "inference", "training", "1024 px"):
        rows = measure(["ours"] if task == "1024 px" else both, task)
        B, _, operations = workload(args, task)
        for name, calls in rows.items():
            seconds = [s for s, _ in calls]
            speed = operations / median(seconds)
            products.setdefault(name, speed)  # operations a second of the first task
            print(f"{name:8}{task:10}{B / median(seconds):8,.1f} ({B / max(seconds):,.1f} to "
                  f"{B / min(seconds):,.1f}){speed / products[name]:14.0%}{calls[-1][1]:11.2f}")
        if len(rows) > 1:
            theirs, ours = (median(s for s, _ in rows[name]) for name in both)
            print(f"{'':18}{theirs / ours:8.2f} times as fast")


if __name__ == "__main__":
    run(main, __doc__)
