"""How fast the models run, and what they compute: the paper's Table 4 and more.

    python eval_speed.py                                     inference, the five models of Table 4
    python eval_speed.py --models vit_b vit_b_48 --dtype bf16 --compile default --batch-size 64 256
    python eval_speed.py --mode pretrain --models vit_b --batch-size auto
    torchrun --nproc-per-node 8 eval_speed.py --mode pretrain     all together, and how that scales

Multiply-adds are counted while a model runs: as Table 4 counts them, without the two products of
attention, and with these. The models take turns, window by window, so that a machine that gets
slower or faster does so for all of them; with --batch-size auto one comes after the other.
"""

import contextlib
import functools
import gc
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mirl
from mirl import flag, require, say

# Images a second on one V100 at batch 256. [S D, Table 4]
TABLE_4 = dict(vit_s=751, vit_s_54=257, vit_b=488, vit_b_24=285, vit_b_48=160)


@dataclass
class Args:
    models: tuple[str, ...] = flag(
        tuple(TABLE_4), f"which ones: {', '.join(mirl.MODELS)}; default the five of Table 4"
    )
    mode: str = flag(
        "infer",
        "infer; or a full training step, of fine-tuning or of pre-training: forward, backward, "
        "gradients averaged over the processes, AdamW",
        ("infer", "finetune", "pretrain"),
    )
    method: str = flag("mirl", "what --mode pretrain trains", ("mirl", "mae"))
    batch_size: tuple[str, ...] | None = flag(
        None,
        "images a process handles at a time; several numbers are a sweep, auto is the largest "
        "power of two that fits into the GPU. Default 256 on a GPU, 8 elsewhere",
    )
    dtype: str = flag(
        "auto", "auto is bf16 on GPUs made for it, else fp32", ("auto", "bf16", "fp16", "fp32")
    )
    autocast: bool = flag(True, "keep the weights in fp32; --no-autocast has them in --dtype too")
    compile: str | None = flag(
        None, "torch.compile's mode", ("default", "reduce-overhead", "max-autotune")
    )
    windows: int = flag(5, "timed windows; their median counts", low=1)
    seconds: float = flag(1.0, "the least that a window takes", low=0)
    device: str = flag("auto", "auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu")
    json: str | None = flag(None, "write the results to this file too")


def parse(argv: list[str] | None, doc: str | None = __doc__) -> Args:
    args = mirl.parse_flags(Args, argv, doc, {})
    for name in args.models:
        mirl.model_config(name)
    for size in args.batch_size or ():
        valid = size == "auto" or (size.isdecimal() and int(size) > 0)
        require(valid, f"--batch-size takes numbers from 1 on and auto, not {size}")
    if args.json:
        folder = Path(args.json).parent
        require(folder.is_dir(), f"--json: there is no folder {folder}")
        require(not Path(args.json).is_dir(), f"--json {args.json} is a folder, not a file")
    return args


# ------------------------------------------------------------------------------------------------
# What is timed
# ------------------------------------------------------------------------------------------------


# by its label: a model's size and what builds it, to return logits or an output with a `loss`
Models = dict[str, tuple[mirl.Config, Callable[[], nn.Module]]]


@dataclass
class Case:
    """A model at one batch size, and what was measured of it."""

    label: str
    config: mirl.Config
    make: Callable[[], nn.Module]
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
    return mirl.build_mirl(name, **(mirl.mae_overrides(name) if method == "mae" else {}))


def count(model: nn.Module, image: Tensor, mode: str) -> dict[str, int]:
    """Return the model's size and its multiply-adds for an image (1, C, H, W): of a forward pass,
    as Table 4 counts them (linear layers and the patch convolution [S D]) and with attention, and
    of a whole step."""
    model.train()  # torch's fused layers for inference would escape the counting
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(image)
        forward = counter.get_flop_counts()["Global"]
        if mode != "infer":
            (out.loss if mode == "pretrain" else out.sum()).backward()
            model.zero_grad()
    products = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    attention = sum(forward.get(op, 0) for op in products)
    return dict(
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=(sum(forward.values()) - attention) // 2,
        macs_with_attention=sum(forward.values()) // 2,
        step_macs=counter.get_total_flops() // 2,
    )


def whole_step(model: nn.Module, args: Args, images: Tensor, dtype: torch.dtype):
    """Return a function that does a step of inference, or of training, on images (B, C, H, W)."""
    half = dtype if args.autocast else torch.float32

    def forward() -> Tensor:
        with mirl.autocast(images.device, half):
            return model(images)

    if args.mode == "infer":
        return torch.inference_mode()(forward)
    labels = torch.randint(1000, images.shape[:1], device=images.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=half == torch.float16)

    def train() -> None:
        out = forward()
        loss = out.loss if args.mode == "pretrain" else F.cross_entropy(out.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


# ------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Return how long a call takes, over `steps` calls that the device works off in one go."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    synchronize()
    return (time.perf_counter() - began) / steps


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large square matrix product: what the device can reach."""
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
        if not mirl.out_of_memory(error) or mirl.WORLD_SIZE > 1:
            raise  # the other processes would wait for this one
        case.row["error"] = "out of memory"
        case.model = case.step = None


def prepare(case: Case, args: Args, device: torch.device, dtype: torch.dtype) -> bool:
    """Build, count, compile and warm up the model. Return whether the memory sufficed."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    with memory_permitting(case):
        torch.manual_seed(0)
        model = case.make().to(device)
        images = torch.randn(case.batch_size, 3, *case.config.image_hw, device=device)
        case.row |= count(model, images[:1], args.mode)
        model.train(args.mode != "infer")
        if not args.autocast:
            model, images = model.to(dtype), images.to(dtype)
        if args.compile:
            # each model and batch compiled by itself, and however many there are
            torch._dynamo.config.cache_size_limit = 1000
            model.compile(mode=args.compile, dynamic=False)
        if args.mode != "infer" and mirl.WORLD_SIZE > 1:
            model = mirl.data_parallel(model, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        step = whole_step(model, args, images, dtype)
        seconds_of(step, 3 if cuda else 1, device)  # compilation, and choice of kernels
        case.steps = max(1, math.ceil(args.seconds / seconds_of(step, 1, device)))
        case.model, case.step = model, step
        if cuda:
            case.row["memory_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    case.steps = max(mirl.gather(case.steps))
    return case.step is not None


def largest_that_fits(case: Case, args: Args, device: torch.device, dtype: torch.dtype) -> bool:
    """Double the batch until memory runs out, and prepare the last one that fitted."""
    size = 1
    while prepare(replace(case, row={}, batch_size=size), args, device, dtype):
        size *= 2
        free_memory()
    free_memory()
    case.batch_size = max(1, size // 2)
    return prepare(case, args, device, dtype)


def free_memory() -> None:
    """Give the memory of models that are no longer used, compiled ones too, back to the GPU."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(cases: list[Case], args: Args, device: torch.device) -> None:
    """Time the windows, the cases taking turns."""
    for window in range(args.windows):
        for case in cases if window % 2 else reversed(cases):
            with memory_permitting(case):  # one may fit by itself, and not beside the others
                if case.step:
                    time_window(case, device)


def time_window(case: Case, device: torch.device) -> None:
    if device.type == "cuda":
        case.step()  # the memory comes back to this model outside of the window
    if hasattr(case.model, "no_sync"):  # the first process by itself, to compare with
        mirl.gather(None)  # waits for all
        if mirl.RANK == 0:
            with case.model.no_sync():
                case.alone.append(seconds_of(case.step, case.steps, device))
    mirl.gather(None)
    case.seconds.append(seconds_of(case.step, case.steps, device))


# ------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------


def header(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the machine and the settings that the figures are of."""
    name, cpu = platform.processor(), Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif cpu.exists():
        name = "".join(re.findall(r"model name\s*: (.*)", cpu.read_text())[:1])
    return dict(
        device=f"{device.type}: {name}",
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        processes=mirl.WORLD_SIZE,
        mode=args.mode,
        method=args.method if args.mode == "pretrain" else None,
        dtype=str(dtype).removeprefix("torch."),
        autocast=args.autocast and dtype != torch.float32,
        compile=args.compile,
        windows=args.windows,
        matrix_tflops=round(matrix_rate(device, dtype), 4),
    )


def result(case: Case, args: Args, matrix_tflops: float) -> dict[str, Any]:
    """Return the case's row: its measures, under the names that COLUMNS and --json use."""
    row = dict(model=case.label, depth=case.config.depth, batch_size=case.batch_size) | case.row
    if args.mode == "infer" and case.label in TABLE_4:
        row["v100_images_per_second"] = TABLE_4[case.label]
    if not case.step:
        return row
    by_process = mirl.gather([case.batch_size / s for s in case.seconds])  # images/s
    rates = [sum(rates) for rates in zip(*by_process, strict=True)]
    median = statistics.median(rates)
    each = median / mirl.WORLD_SIZE
    row |= dict(
        images_per_second=median,
        lowest=min(rates),
        highest=max(rates),
        tflops=2 * row["step_macs"] * each / 1e12,  # of one process
    )
    row["of_matrix_product"] = row["tflops"] / matrix_tflops
    if mirl.WORLD_SIZE > 1:
        row["per_process"] = [statistics.median(rates) for rates in by_process]
    if case.alone:
        row["scaling"] = each * statistics.median(case.alone) / case.batch_size
    return row


# a column's heading: the name in a row, what the value is multiplied with, the format
COLUMNS = {
    "model": ("model", 1, ""),
    "depth": ("depth", 1, ""),
    "params M": ("params", 1e-6, ".2f"),
    "MACs G": ("macs", 1e-9, ".2f"),
    "+attention": ("macs_with_attention", 1e-9, ".2f"),
    "batch": ("batch_size", 1, ""),
    "img/s": ("images_per_second", 1, ".2f"),
    "min": ("lowest", 1, ".2f"),
    "max": ("highest", 1, ".2f"),
    "TFLOP/s": ("tflops", 1, ".3f"),
    "of peak": ("of_matrix_product", 1, ".0%"),
    "GiB": ("memory_gib", 1, ".2f"),
    "scaling": ("scaling", 1, ".0%"),
    "V100": ("v100_images_per_second", 1, ""),
    "": ("error", 1, ""),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for people: "-" for what was not measured, no column that nobody has."""
    columns = []
    for heading, (name, factor, style) in COLUMNS.items():
        if any(name in row for row in rows):
            cells = [format(row[name] * factor, style) if name in row else "-" for row in rows]
            width = max(map(len, [heading, *cells]))
            columns.append([cell.rjust(width) for cell in [heading, *cells]])
    columns[0] = [cell.strip().ljust(len(cell)) for cell in columns[0]]
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def run(args: Args, models: Models) -> None:
    """Time the models, print the table and write --json."""
    with mirl.interruptible(None), mirl.processes(args.device) as device:
        dtype = mirl.pick_dtype(args.dtype, device)
        if args.compile:
            mirl.check_compile(device)
        sizes = args.batch_size or ("256" if device.type == "cuda" else "8",)
        auto, one_gpu = "auto" in sizes, device.type == "cuda" and mirl.WORLD_SIZE == 1
        require(one_gpu or not auto, "--batch-size auto needs one process on a CUDA device")
        head = header(args, device, dtype)
        say("  ".join(f"{k} {v}" for k, v in head.items() if v not in (None, False)))

        cases = [
            Case(label, config, make, 0 if size == "auto" else int(size))
            for label, (config, make) in models.items()
            for size in sizes
        ]
        rows = []
        # with auto each has the device to itself, else they take turns
        for turn in [[case] for case in cases] if auto else [cases]:
            for case in turn:
                (prepare if case.batch_size else largest_that_fits)(case, args, device, dtype)
            measure(turn, args, device)
            for case in turn:
                rows.append(result(case, args, head["matrix_tflops"]))
                case.model = case.step = None
        say(table(rows))
        if args.json and mirl.RANK == 0:
            text = json.dumps(dict(head, rows=rows), indent=2) + "\n"
            mirl.save(Path(args.json), lambda path: path.write_text(text))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    models = {}
    for name in args.models:
        make = functools.partial(build, name, args.mode, args.method)
        models[name] = mirl.model_config(name), make
    run(args, models)


if __name__ == "__main__":
    mirl.run_script(main)
