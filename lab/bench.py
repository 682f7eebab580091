"""Speed and memory of inference and of a training step: medians of 15 calls after 2.

    python lab/bench.py --model dat-t --batch-size 8

A model for images of 224 px or more is also measured on one image of 1,024 px.
--release DIR measures the authors' DAT-T beside ours, a call of each in turn. DIR is a checkout of
LeapLabTHU/DAT at 566a593, which needs einops and timm. Each row is a process of its own. Memory is
the process's; on a GPU, PyTorch's. Ours uses the type that dat.py trains in, theirs float32.
"""
import argparse
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import add_device, run
from lab.cost import count_macs

WARM_UP, CALLS = 2, 15
LARGE = 1024  # px


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
        side = 2048 if args.device == "cpu" else 8192
        return 1, side, 2 * side ** 3
    config = dat.VARIANTS[args.model]
    B, size = (1, LARGE) if task == f"{LARGE} px" else (args.batch_size, config.image_size)
    return B, size, B * count_macs(config, size) * (6 if task == "training" else 2)


def serve(args, who, task):
    """A row's process: for each line of standard input a call, its seconds and the peak so far."""
    ours, (B, size, _) = who == "ours", workload(args, task)
    dtype = dat.dtype_for("auto", torch.device(args.device)) if ours else "float32"
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
        with torch.autocast(args.device, getattr(torch, dtype), enabled=dtype != "float32"):
            if task == "product":
                a @ b
            elif task == "training":
                optimizer.zero_grad()
                logits = forward(images)
                F.cross_entropy(logits if ours else logits[0], labels).backward()
                optimizer.step()
            else:
                with torch.inference_mode():
                    forward(images)
        if args.device == "cuda":
            torch.cuda.synchronize()
        elif args.device == "mps":
            torch.mps.synchronize()
        print(time.perf_counter() - start, peak_memory(args.device), flush=True)


def peak_memory(device):
    """GiB: of this process, or on a GPU of PyTorch there."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == "darwin" else 20)  # macOS counts bytes, Linux KiB


def measure(names, task):
    """{name: the (seconds, peak in GiB) of its CALLS}, the processes' calls in turn."""
    calls, processes = {name: [] for name in names}, {}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for name in names:
                processes[name] = subprocess.Popen(
                    [sys.executable, __file__, *sys.argv[1:], "--serve", name, task], text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
            for name in names * (WARM_UP + CALLS):
                with contextlib.suppress(BrokenPipeError):  # if it broke off
                    print(file=processes[name].stdin, flush=True)
                answer = processes[name].stdout.readline().split()
                if not answer:
                    errors.seek(0)
                    lines = [line for line in errors if line.strip()]
                    reason = lines[-1] if lines else "no message; try a smaller --batch-size"
                    raise dat.InputError(f"{name}, {task}: broke off: {reason}")
                calls[name].append([float(number) for number in answer])
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
    return {name: numbers[WARM_UP:] for name, numbers in calls.items()}


def main(parser):
    add = parser.add_argument
    add("--model", choices=dat.VARIANTS, default="dat-t")
    add("--batch-size", type=dat.whole_number, help="default: 8 on a CPU, else 128")
    add_device(parser)
    add("--compile", action="store_true", help="torch.compile ours")
    add("--release", metavar="DIR", help="compare with the authors' code (with dat-t only)")
    add("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = dat.device_for(args.device).type
    args.batch_size = args.batch_size or (8 if args.device == "cpu" else 128)
    if args.serve:
        return serve(args, *args.serve)
    if args.release and not Path(args.release, "models/dat.py").is_file():
        raise dat.InputError(f"--release {args.release}: expected models/dat.py there")
    if args.release and args.model != "dat-t":
        raise dat.InputError(f"--release compares with DAT-T: expected --model dat-t, "
                             f"not {args.model}")
    print(f"{args.model}, batch {args.batch_size}, {args.device}, torch {torch.__version__}\n"
          f"{'':18}images/s (slowest to fastest)  of a product  peak, GiB")
    both, products = ["release"] * bool(args.release) + ["ours"], {}
    tasks = ["product", "inference", "training"]
    if dat.VARIANTS[args.model].image_size >= 224:
        tasks.append(f"{LARGE} px")
    for task in tasks:
        rows = measure(["ours"] if task == f"{LARGE} px" else both, task)
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
