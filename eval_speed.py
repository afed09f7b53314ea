"""How fast the models run, and what they compute: the paper's Table 4 and more.

    python eval_speed.py                                     inference, the five models of Table 4
    python eval_speed.py --models vit_b vit_b_48 --dtype bf16 --compile default --batch-size 64 256
    python eval_speed.py --mode pretrain --models vit_b --method mae
    torchrun --nproc-per-node 8 eval_speed.py --mode pretrain     all together, and how that scales

Multiply-adds are counted while a model runs: as Table 4 counts them, without the two products of
attention, and with these. The models take turns, window by window, so that a machine that gets
slower or faster does so for all of them.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mirl
from common import distributed
from common.checkpoint import save
from common.cli import RecipeParser, count, number, out_of_memory, run_script, switch, text
from mirl import require

# Images a second on one V100 at batch 256. [S D, Table 4]
TABLE_4 = dict(vit_s=751, vit_s_54=257, vit_b=488, vit_b_24=285, vit_b_48=160)


def parse(argv: list[str] | None = None, doc: str | None = __doc__) -> argparse.Namespace:
    parser = RecipeParser(doc, {})
    flag = parser.add_argument
    # fmt: off
    flag("--models", nargs="+", choices=mirl.MODELS, default=[*TABLE_4], metavar="MODEL",
         help=f"which ones: {', '.join(mirl.MODELS)}; default the five of Table 4")
    flag("--mode", choices=("infer", "finetune", "pretrain"), default="infer",
         help="infer (default); or a full training step, of fine-tuning or of pre-training: "
         "forward, backward, gradients averaged over the processes, AdamW")
    flag("--method", choices=("mirl", "mae"), default="mirl", help="what --mode pretrain trains")
    flag("--batch-size", nargs="+", type=count, metavar="N",
         help="images a process handles at a time; several numbers are a sweep, which goes on "
         "past those that do not fit into the memory. Default 256 on a GPU, 8 elsewhere")
    flag("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
         help="precision of the step; auto is bf16 on GPUs made for it, else fp32")
    flag("--autocast", action=switch, default=True,
         help="keep the weights in fp32; --no-autocast has them in --dtype too")
    flag("--compile", choices=("default", "reduce-overhead", "max-autotune"),
         help="torch.compile's mode; minutes of waiting first; default: not compiled")
    flag("--windows", type=count, default=5, help="timed windows; their median counts; default 5")
    flag("--seconds", type=number(low=0), default=1.0, help="a window's least length; default 1")
    flag("--device", type=text, default="auto",
         help="auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu; default auto")
    flag("--json", type=text, help="write the results to this file too")
    # fmt: on
    args = parser.parse_args(argv)
    path = Path(args.json or "speed.json")  # known now, and not when all is measured
    valid = path.parent.is_dir() and not path.is_dir()
    require(valid, f"--json {path} is no file in a folder that exists")
    return args


# ------------------------------------------------------------------------------------------------
# What is timed, and how
# ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model at one batch size, and what was measured of it."""

    label: str
    config: mirl.Config
    make: Callable[[], nn.Module]  # what returns logits, or for pre-training a `loss`
    batch_size: int
    row: dict[str, Any] = field(default_factory=dict)  # the results
    model: nn.Module | None = None
    step: Callable[[], Any] | None = None  # None before `prepare` and where memory ran out
    steps: int = 1  # in a window
    seconds: list[float] = field(default_factory=list)  # a step takes, of each window
    alone: list[float] = field(default_factory=list)  # the same without the other processes


def build(name: str, mode: str, method: str) -> nn.Module:
    if mode != "pretrain":
        return mirl.build_vit(name)
    return mirl.build_mae(name) if method == "mae" else mirl.build_mirl(name)


def count_operations(model: nn.Module, image: Tensor, mode: str) -> dict[str, int]:
    """The model's size and its multiply-adds for an image (1, C, H, W): of a forward pass, as
    Table 4 counts them (linear layers and the patch convolution [S D]) and with attention, and of
    a whole step."""
    model.train()  # torch's fused layers for inference would escape the counting
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(image)
        forward = counter.get_flop_counts()["Global"]
        if mode != "infer":
            (out.loss if mode == "pretrain" else out.sum()).backward()
            model.zero_grad()
    attention = sum(forward.get(op, 0) for op in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    return dict(
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=(sum(forward.values()) - attention) // 2,
        macs_with_attention=sum(forward.values()) // 2,
        step_macs=counter.get_total_flops() // 2,
    )


def whole_step(model: nn.Module, mode: str, images: Tensor, half: torch.dtype) -> Callable:
    """What does a step of inference or of training on images (B, C, H, W), autocast to `half`."""

    def forward() -> Any:
        with distributed.autocast(images.device, half):
            return model(images)

    if mode == "infer":
        return torch.inference_mode()(forward)
    labels = torch.randint(1000, images.shape[:1], device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=half == torch.float16)

    def train() -> None:
        out = forward()
        loss = out.loss if mode == "pretrain" else F.cross_entropy(out.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


def seconds_of(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """How long a call takes, over `steps` calls that the device works off in one go."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize()
    return (time.perf_counter() - began) / steps


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The TFLOP/s of a large square matrix product: what the device can reach."""
    n, repeats = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    best = min(seconds_of(lambda: a @ b, repeats, device) for _ in range(6))
    return 2 * n**3 / best / 1e12


@contextlib.contextmanager
def memory_permitting(case: Case):
    """Give the case up, and say so in its row, where the memory does not suffice."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error) or distributed.WORLD_SIZE > 1:
            raise  # the other processes would wait for this one
        case.row["error"] = "out of memory"
        case.model = case.step = None


def prepare(case: Case, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Build, count, compile and warm up the model."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with memory_permitting(case):
        torch.manual_seed(0)
        model = case.make().to(device)
        images = torch.randn(case.batch_size, 3, *case.config.image_hw, device=device)
        case.row |= count_operations(model, images[:1], args.mode)
        model.train(args.mode != "infer")
        if not args.autocast:
            model, images = model.to(dtype), images.to(dtype)
        if args.compile:
            torch._dynamo.config.cache_size_limit = 1000  # however many there are, each by itself
            model.compile(mode=args.compile, dynamic=False)
        if args.mode != "infer":
            model = distributed.data_parallel(model, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        step = whole_step(model, args.mode, images, dtype if args.autocast else torch.float32)
        seconds_of(step, 3 if cuda else 1, device)  # compilation, and choice of kernels
        case.steps = max(1, math.ceil(args.seconds / seconds_of(step, 1, device)))
        case.model, case.step = model, step
        if cuda:
            case.row["memory_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    case.steps = max(distributed.gather(case.steps))


def measure(cases: list[Case], windows: int, device: torch.device) -> None:
    """Time the windows, the cases taking turns."""
    for window in range(windows):
        for case in cases if window % 2 else reversed(cases):
            with memory_permitting(case):  # one may fit by itself, and not beside the others
                if case.step:
                    time_window(case, device)


def time_window(case: Case, device: torch.device) -> None:
    if device.type == "cuda":
        case.step()  # the memory comes back to this model outside of the window
    if hasattr(case.model, "no_sync"):  # the first process by itself, to compare with
        distributed.gather(None)  # waits for all
        if distributed.RANK == 0:
            with case.model.no_sync():
                case.alone.append(seconds_of(case.step, case.steps, device))
    distributed.gather(None)
    case.seconds.append(seconds_of(case.step, case.steps, device))


# ------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------


def header(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the settings that the figures are of."""
    name, cpu = platform.processor(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpu.exists():
        name = "".join(re.findall(r"model name\s*: (.*)", cpu.read_text())[:1])
    return dict(
        device=f"{device.type}: {name}",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        processes=distributed.WORLD_SIZE,
        mode=args.mode,
        method=args.method if args.mode == "pretrain" else None,
        dtype=str(dtype).removeprefix("torch."),
        autocast=args.autocast and dtype != torch.float32,
        compile=args.compile,
        windows=args.windows,
        matrix_tflops=round(matrix_rate(device, dtype), 4),
    )


def result(case: Case, mode: str, matrix_tflops: float) -> dict[str, Any]:
    """The case's row: its measures, under the names that COLUMNS and --json use."""
    row = dict(model=case.label, depth=case.config.depth, batch_size=case.batch_size) | case.row
    if mode == "infer" and case.label in TABLE_4:
        row["v100_images_per_second"] = TABLE_4[case.label]
    if not case.step:
        return row
    by_process = distributed.gather([case.batch_size / s for s in case.seconds])  # images/s
    rates = [sum(rates) for rates in zip(*by_process, strict=True)]
    median = statistics.median(rates)
    each = median / distributed.WORLD_SIZE
    row |= dict(images_per_second=median, lowest=min(rates), highest=max(rates))
    row["tflops"] = 2 * row["step_macs"] * each / 1e12  # of one process
    row["of_matrix_product"] = row["tflops"] / matrix_tflops
    if distributed.WORLD_SIZE > 1:
        row["per_process"] = [statistics.median(rates) for rates in by_process]
    if case.alone:
        row["scaling"] = each * statistics.median(case.alone) / case.batch_size
    return row


# a column's heading: the name in a row, what the value is multiplied with, the format
COLUMNS = {
    "model": ("model", 1, ""), "depth": ("depth", 1, ""), "params M": ("params", 1e-6, ".2f"),
    "MACs G": ("macs", 1e-9, ".2f"), "+attention": ("macs_with_attention", 1e-9, ".2f"),
    "batch": ("batch_size", 1, ""), "img/s": ("images_per_second", 1, ".2f"),
    "min": ("lowest", 1, ".2f"), "max": ("highest", 1, ".2f"), "TFLOP/s": ("tflops", 1, ".3f"),
    "of peak": ("of_matrix_product", 1, ".0%"), "GiB": ("memory_gib", 1, ".2f"),
    "scaling": ("scaling", 1, ".0%"), "V100": ("v100_images_per_second", 1, ""),
    "": ("error", 1, ""),
}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for people: "-" for what was not measured, no column that nobody has."""
    columns = []
    for heading, (name, factor, style) in COLUMNS.items():
        if any(name in row for row in rows):
            cells = [format(row[name] * factor, style) if name in row else "-" for row in rows]
            width = max(map(len, [heading, *cells]))
            columns.append([cell.rjust(width) for cell in [heading, *cells]])
    columns[0] = [cell.strip().ljust(len(cell)) for cell in columns[0]]
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def run(args: argparse.Namespace, models: dict[str, tuple[mirl.Config, Callable]]) -> None:
    """Time the models, by label what a `Case` has of each, print the table and write --json."""
    with distributed.process_group(args.device) as device:
        dtype = distributed.pick_dtype(args.dtype, device)
        head = header(args, device, dtype)
        distributed.say("  ".join(f"{k} {v}" for k, v in head.items() if v not in (None, False)))
        sizes = args.batch_size or [256 if device.type == "cuda" else 8]
        cases = [Case(label, *model, size) for label, model in models.items() for size in sizes]
        for case in cases:
            prepare(case, args, device, dtype)
        measure(cases, args.windows, device)
        rows = [result(case, args.mode, head["matrix_tflops"]) for case in cases]
        distributed.say(table(rows))
        if args.json and distributed.RANK == 0:
            content = json.dumps(dict(head, rows=rows), indent=2) + "\n"
            save(Path(args.json), lambda file: file.write(content.encode()))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    models = {}
    for name in args.models:
        make = functools.partial(build, name, args.mode, args.method)
        models[name] = mirl.model_config(name), make
    run(args, models)


if __name__ == "__main__":
    run_script(main)
