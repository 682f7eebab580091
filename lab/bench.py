"""Speed and memory of inference and of a training step: the median of 7 calls after 2.

    python lab/bench.py --model dat-t --batch-size 8

--release DIR compares with the authors' code, DAT-T at 224 px: a checkout of LeapLabTHU/DAT at
566a593, which needs einops. (timm is stood in for.) Each row is a process of its own; those of a
task make a call in turn, so that noise meets all alike. Memory is the whole process's; on a GPU,
PyTorch's. "here" uses bfloat16 where hardware multiplies it, "float32" and the release do not.
"""
import argparse
import platform
import resource
import subprocess
import sys
import time
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import dat
from lab.command import Parser, count, run
from lab.cost import stage_macs


def release(folder: str) -> torch.nn.Module:
    """The authors' DAT-T."""
    from torchvision.ops import StochasticDepth
    layers, models = types.ModuleType("timm.models.layers"), types.ModuleType("models")
    layers.DropPath = lambda rate: StochasticDepth(rate, "row")
    layers.trunc_normal_ = torch.nn.init.trunc_normal_
    layers.to_2tuple = lambda n: n if isinstance(n, tuple) else (n, n)
    models.__path__ = [f"{folder}/models"]  # without its __init__
    sys.modules |= {name: types.ModuleType(name) for name in ("timm", "timm.models")}
    sys.modules |= {"timm.models.layers": layers, "models": models}
    warnings.filterwarnings("ignore", "torch.meshgrid")
    from models.dat import DAT
    return DAT(stage_spec=[["L", "S"], ["L", "S"], ["L", "D"] * 3, ["L", "D"]], drop_path_rate=0.2,
               strides=[-1, -1, 1, 1], offset_range_factor=[-1, -1, 2, 2],
               use_pes=[False, False, True, True])  # the rest of DAT-T is the default


def workload(args: argparse.Namespace, task: str) -> tuple[int, int, float]:
    """Batch, side of an image or a matrix, floating point operations of a call."""
    side = 8192 if args.device == "cuda" else 2048
    if task == "product":
        return 1, side, 2 * side ** 3
    B, size = (1, 1024) if task == "1024 px" else (args.batch_size, args.image_size)
    macs = sum(stage_macs(dat.VARIANTS[args.model], size))
    return B, size, B * macs * (6 if task == "training" else 2)


def serve(args: argparse.Namespace, who: str, task: str) -> None:
    """A row's process: for each line of standard input a call, its seconds and the peak so far."""
    device, ours = torch.device(args.device), who != "release"
    fast = who == "here" and not args.float32 and dat.has_bfloat16(args.device)
    B, size, _ = workload(args, task)
    torch.manual_seed(0)
    if task == "product":
        a, b = torch.randn(2, size, size, device=device).to(torch.bfloat16 if fast else torch.float)
    else:
        model = dat.build(args.model, image_size=size) if ours else release(args.release)
        model = model.to(device).train(task == "training")
        forward = torch.compile(model, dynamic=False) if args.compile and ours else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=ours)
        images = torch.randn(B, 3, size, size, device=device)
        labels = torch.randint(10, (B,), device=device)
    for _ in sys.stdin:
        start = time.perf_counter()
        if task == "product":
            a @ b
        else:
            optimizer.zero_grad()
            with torch.inference_mode(task != "training"), torch.autocast(
                    device.type, torch.bfloat16, enabled=fast):
                found = forward(images)
                loss = F.cross_entropy(found if ours else found[0], labels)
            if task == "training":
                loss.backward()
                optimizer.step()
            del found, loss
        if args.device == "cuda":
            torch.cuda.synchronize()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # in KiB, not on macOS
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if args.device == "cuda" else peak
        print(time.perf_counter() - start, peak, flush=True)


def measure(names: list[str], task: str) -> dict[str, list[float]]:
    """{name: [median of the seconds, smallest, largest, peak]}, the processes' calls in turn."""
    processes = {name: subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--serve", name, task], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True) for name in names}
    found = {name: [] for name in names}
    try:
        for name in names * 9:
            print(file=processes[name].stdin, flush=True)
            answer = processes[name].stdout.readline().split()
            if not answer:
                raise dat.InputError(f"{name}, {task}: broke off, out of memory or by an error "
                                     "above; try a smaller --batch-size or --image-size")
            found[name].append([*map(float, answer)])
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return {name: [median(s := [x for x, _ in calls[2:]]), min(s), max(s), calls[-1][1]]
            for name, calls in found.items()}


def main(parser: Parser) -> None:
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add("--model", choices=dat.VARIANTS, default="dat-t")
    add("--batch-size", type=count, help="default: 8; on a GPU 128")
    add("--image-size", type=count, metavar="N")
    add("--device", choices=("cuda", "cpu")[not cuda:], default="cuda" if cuda else "cpu")
    for flag, text in {"--compile": "torch.compile ours", "--float32": "no bfloat16"}.items():
        add(flag, action="store_true", help=text)
    add("--release", metavar="DIR", help="compare with the authors' code")
    add("--rounds", type=count, default=1, help="how often all is measured")
    add("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or (128 if args.device == "cuda" else 8)
    args.image_size = args.image_size or dat.VARIANTS[args.model].image_size
    if args.serve:
        return serve(args, *args.serve)
    if args.release and not (Path(args.release, "models/dat.py").is_file() and find_spec("einops")
                             and (args.model, args.image_size) == ("dat-t", 224)):
        raise dat.InputError(f"--release {args.release}: expected a folder with models/dat.py, "
                             "einops (pip install einops), and dat-t at 224 px")
    theirs, ours = ["release"] * bool(args.release), ["here"]
    ours += ["float32"] * (bool(theirs) and not args.float32)
    tasks, rounds = {"product": ours, "inference": theirs + ours, "training": theirs + ours}, {}
    tasks |= {"1024 px": ["here"]} if args.model.startswith("dat") else {}
    for _ in range(args.rounds):
        for task in tasks:
            for name, row in measure(tasks[task], task).items():
                rounds.setdefault((name, task), []).append(row)
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch {args.batch_size}, {args.image_size} px; 1024 px: one image; "
          f"{cpu if args.device == 'cpu' else torch.cuda.get_device_name()}, torch "
          f"{torch.__version__}{', ours compiled' * args.compile}, rounds: {args.rounds}\n"
          f"{'':19}images/s  slowest .. fastest    TFLOP/s  of product   peak, GiB")
    for (name, task), rows in rounds.items():
        (B, _, operations), s = workload(args, task), median(r[0] for r in rows)
        product = rounds["here" if name == "here" else ours[-1], "product"]
        share = operations / s / workload(args, "product")[2] * median(r[0] for r in product)
        span = f"{B / max(r[2] for r in rows):,.2f} .. {B / min(r[1] for r in rows):,.2f}"
        speed = f"{B / s:9,.2f}  {span:>20}" * (task != "product")
        print(f"{name:8}{task:10}{speed:31}{operations / s / 1e12:10.3f}{share:12.0%}"
              f"{max(r[3] for r in rows):12.2f}")
        if name != "release" and ("release", task) in rounds:
            speed, memory = (sorted(a[i] / b[i] for a, b in zip(rounds["release", task], rows))
                             for i in (0, 3))
            print(f"{'':19}{median(speed):8.2f} times the release's speed ({speed[0]:.2f} to "
                  f"{speed[-1]:.2f}), {1 / median(memory):.2f} times its memory")


if __name__ == "__main__":
    run(main, __doc__)
