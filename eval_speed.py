"""How fast the models run, and what they compute: the paper's Table 4 and more.

    python eval_speed.py                                     inference, the five models of Table 4
    python eval_speed.py --models vit_b vit_b_48 --dtype bf16 --compile default --batch-size 64 256
    python eval_speed.py --mode pretrain --models vit_b --batch-size auto
    torchrun --nproc-per-node 8 eval_speed.py --mode pretrain     all together, and how that scales
    python eval_speed.py --models vit_b --peers              beside timm and torchvision

Multiply-adds are counted while the model runs: in Table 4's convention, which leaves out the two
attention products, and with them. The models take turns, window by window, so that a machine that
gets slower or faster does so for all of them; with --batch-size auto one comes after the other.
"""

import dataclasses
import functools
import gc
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mirl
from mirl import UserError, flag, say

# Images a second on one V100 at batch 256. [S D, Table 4]
TABLE_4 = dict(vit_s=751, vit_s_54=257, vit_b=488, vit_b_24=285, vit_b_48=160)
PEERS = dict(
    infer=("timm", "torchvision"),
    finetune=("timm", "torchvision"),
    pretrain=("timm", "transformers"),
)


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
    peers: bool = flag(
        False,
        "also time other libraries' models of the same size (pretrain: MAE, theirs and ours); "
        "needs pip install -e '.[peers]'",
    )
    batch_size: tuple[str, ...] | None = flag(
        None,
        "images a process handles at a time; several numbers are a sweep, auto is the largest "
        "power of two that fits into the GPU. Default 256 on a GPU, 8 elsewhere",
    )
    dtype: str = flag(
        "auto",
        "auto is bf16 on GPUs made for it, else fp32; with --no-autocast, also of the weights",
        ("auto", "bf16", "fp16", "fp32"),
    )
    autocast: bool = flag(True, "keep the weights in fp32 and let autocast choose where it is safe")
    compile: str | None = flag(
        None,
        "torch.compile with this mode; default eager",
        ("default", "reduce-overhead", "max-autotune"),
    )
    windows: int = flag(5, "timed windows; their median counts")
    seconds: float = flag(1.0, "the least that a window takes")
    device: str = flag("auto", "auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu")
    json: str | None = flag(None, "write the results to this file too")


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, {})
    mirl.check_range(args, windows=1, seconds=0)
    for name in args.models:
        mirl.model_config(name)
    if args.peers:
        for name in PEERS[args.mode]:
            if not importlib.util.find_spec(name):
                raise UserError(f"--peers needs {name}: pip install -e '.[peers]'")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {Path(args.json).parent}")
    if args.json and Path(args.json).is_dir():
        raise UserError(f"--json {args.json} is a folder, not a file")
    for size in args.batch_size or ():
        if size != "auto" and not (size.isdecimal() and 0 < int(size) < 2**20):
            raise UserError(f"--batch-size takes numbers from 1 to a million and auto, not {size}")
    return args


# ------------------------------------------------------------------------------------------------
# What is timed
# ------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model and a batch size, and what has been measured of them."""

    label: str
    config: mirl.Config
    make: Callable[[], nn.Module]  # a model that returns logits, or the loss of pre-training
    batch_size: int
    row: dict[str, Any] = dataclasses.field(default_factory=dict)  # the results
    step: Callable[[], None] | None = None
    alone: Callable[[], None] | None = None  # the same without the other processes
    steps: int = 1  # in a window
    seconds: list[float] = dataclasses.field(default_factory=list)  # a step, of each window


class Loss(nn.Module):
    """A pre-training model as a function from images to its loss."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).loss


class TimmMAE(nn.Module):
    """MAE made of timm's blocks, as a peer for mirl.py's."""

    def __init__(self, config: mirl.Config):
        super().__init__()
        from timm.models.vision_transformer import Block

        D, d, norm = config.width, config.decoder_width, functools.partial(nn.LayerNorm, eps=1e-6)
        make = functools.partial(Block, qkv_bias=True, norm_layer=norm)
        self.config, self.encoder = config, mirl.ViT(replace(config, depth=1, pool="none"))
        self.encoder.blocks = nn.Sequential(*(make(D, config.heads) for _ in range(config.depth)))
        self.embed, self.decoder_norm = nn.Linear(D, d), norm(d)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, d))
        self.register_buffer("positions", mirl.sincos_positions(d, config.grid))
        blocks = (make(d, config.decoder_heads) for _ in range(config.decoder_depth))
        self.decoder, self.head = nn.Sequential(*blocks), nn.Linear(d, config.pixels)

    def forward(self, images: Tensor) -> Tensor:
        patches = mirl.patchify(images, self.config.patch_size)  # (B, N, P·P·C)
        noise = torch.rand(patches.shape[:2], device=images.device)
        visible, mask = mirl.random_masking(noise, self.config.mask_ratio)
        x = self.encoder.embed(mirl.take(patches, visible), visible)
        x = self.embed(self.encoder.norm(self.encoder.blocks(x)))  # (B, 1+V, d)
        background = self.mask_token.to(x.dtype).expand(*mask.shape, -1)
        x = torch.cat([x[:, :1], mirl.put(x[:, 1:], visible, background)], dim=1)
        x = self.head(self.decoder_norm(self.decoder(x + self.positions)))[:, 1:]
        target, _, _ = mirl.normalise_patches(patches)
        return mirl.reconstruction_loss(target, mask, x)


def peer(library: str, name: str, mode: str) -> nn.Module:
    """Another library's model of the same size; of MAE for --mode pretrain."""
    mae = mode == "pretrain"
    c = mirl.model_config(name, **(mirl.mae_overrides(name) if mae else {}))
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        hidden = int(c.width * c.mlp_ratio)
        return VisionTransformer(c.image_size, c.patch_size, c.depth, c.heads, c.width, hidden)
    if library == "transformers":
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        sizes = dict(image_size=c.image_size, patch_size=c.patch_size, mask_ratio=c.mask_ratio)
        sizes |= dict(hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads)
        sizes |= dict(intermediate_size=int(c.width * c.mlp_ratio), norm_pix_loss=True)
        sizes |= dict(
            decoder_hidden_size=c.decoder_width, decoder_num_hidden_layers=c.decoder_depth
        )
        sizes |= dict(decoder_num_attention_heads=c.decoder_heads)
        sizes |= dict(decoder_intermediate_size=4 * c.decoder_width)
        return Loss(ViTMAEForPreTraining(ViTMAEConfig(**sizes, attn_implementation="sdpa")))
    if mae:
        return TimmMAE(c)
    from timm.models import VisionTransformer

    sizes = dict(img_size=c.image_size, patch_size=c.patch_size, embed_dim=c.width)
    return VisionTransformer(**sizes, depth=c.depth, num_heads=c.heads, class_token=True)


def own(name: str, mode: str, method: str) -> nn.Module:
    if mode != "pretrain":
        return mirl.build_vit(name)
    return Loss(mirl.build_mirl(name, **(mirl.mae_overrides(name) if method == "mae" else {})))


def multiply_adds(run: Callable[[], Any]) -> tuple[int, int]:
    """Multiply-adds of what `run` runs: in Table 4's convention, and with the attention products.

    Table 4 counts the linear layers and the patch convolution alone. [S D]
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    counts = counter.get_flop_counts().get("Global", {})
    products = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    attention = sum(flops for op, flops in counts.items() if op in products)
    return (sum(counts.values()) - attention) // 2, sum(counts.values()) // 2


def count(model: nn.Module, image: Tensor, mode: str) -> dict[str, int]:
    """A model's size, and what it computes for one image; a training step goes backward too."""
    model.train()  # torch's fused layers for inference would escape the counting
    macs, with_attention = multiply_adds(lambda: model(image))
    whole = with_attention
    if mode != "infer":
        _, whole = multiply_adds(lambda: model(image).sum().backward())
        model.zero_grad()
    return dict(
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=macs,
        macs_with_attention=with_attention,
        step_macs=whole,
    )


def whole_step(model: nn.Module, args: Args, images: Tensor, dtype: torch.dtype):
    """A function that does one step of inference, or of training, on these images."""
    half = dtype if args.autocast else torch.float32
    autocast = functools.partial(mirl.autocast, images.device, half)
    if args.mode == "infer":

        def infer():
            with torch.inference_mode(), autocast():
                model(images)

        return infer
    labels = torch.randint(1000, images.shape[:1], device=images.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(images.device.type, enabled=half == torch.float16)

    def train():
        with autocast():
            out = model(images)
        loss = out if args.mode == "pretrain" else F.cross_entropy(out.float(), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return train


# ------------------------------------------------------------------------------------------------
# Timing
# ------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Seconds a call over `steps` calls: by CUDA events, or by the clock; one wait at the end."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        for _ in range(steps):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / steps
    wait = torch.mps.synchronize if device.type == "mps" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - began) / steps


def matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """The side and TFLOP/s of a large square matrix product: what the device can reach."""
    n, repeats = (8192, 10) if device.type == "cuda" else (2048, 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    seconds_of(lambda: a @ b, repeats, device)
    best = min(seconds_of(lambda: a @ b, repeats, device) for _ in range(5))
    return n, 2 * n**3 / best / 1e12


def prepare(case: Case, args: Args, device: torch.device, dtype: torch.dtype) -> bool:
    """Build, count, compile and warm up; False where a process has not enough memory for that."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    try:
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
        if args.mode != "infer" and mirl.num_processes() > 1:
            model = mirl.data_parallel(model, device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        step = whole_step(model, args, images, dtype)
        seconds_of(step, 3 if cuda else 1, device)  # compilation, and choice of kernels
        once = seconds_of(step, 1, device)
        case.steps, case.step = max(1, math.ceil(args.seconds / once)), step
        if hasattr(model, "no_sync"):
            case.alone = without_the_others(model, step)
            case.alone()
        if cuda:
            case.row["memory_gib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**30
    except RuntimeError as error:
        if not mirl.out_of_memory(error) or mirl.num_processes() > 1:
            raise  # the other processes would wait for this one
        give_up(case)
    case.steps = max(mirl.gather(case.steps))
    return case.step is not None


def give_up(case: Case) -> None:
    case.row["error"] = "out of memory"
    case.step = case.alone = None


def without_the_others(model: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    def alone():
        with model.no_sync():
            step()

    return alone


def largest_that_fits(case: Case, args: Args, device: torch.device, dtype: torch.dtype) -> bool:
    """Doubles the batch until memory runs out, and prepares the last one that fitted."""
    size = 0
    while prepare(replace(case, row={}, batch_size=max(1, 2 * size)), args, device, dtype):
        size = max(1, 2 * size)
        free_memory()
    free_memory()
    case.batch_size = max(1, size)
    return prepare(case, args, device, dtype)


def free_memory() -> None:
    """Give the memory of models that are no longer used, compiled ones too, back to the GPU."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure(cases: list[Case], args: Args, device: torch.device) -> None:
    """The timed windows, the cases taking turns, and what follows from them."""
    together = dist.barrier if dist.is_initialized() else lambda: None
    alone: dict[str, list[float]] = {}
    for window in range(args.windows):
        for case in cases if window % 2 else reversed(cases):
            if not case.step:
                continue
            try:
                if device.type == "cuda":
                    case.step()  # the memory comes back to this model outside of the window
                if case.alone:  # the first process by itself, to compare with
                    together()
                    if mirl.is_main():
                        seconds = seconds_of(case.alone, case.steps, device)
                        rates = alone.setdefault(f"{case.label} {case.batch_size}", [])
                        rates.append(case.batch_size / seconds)
                together()
                case.seconds.append(seconds_of(case.step, case.steps, device))
            except RuntimeError as error:  # it fits by itself, and not beside the others
                if not mirl.out_of_memory(error) or mirl.num_processes() > 1:
                    raise
                give_up(case)
    processes = mirl.num_processes()
    for case in filter(lambda case: case.step, cases):
        by_rank = mirl.gather([case.batch_size / s for s in case.seconds])  # images/s
        rates = [sum(rates) for rates in zip(*by_rank, strict=True)]
        median = statistics.median(rates)
        case.row |= dict(
            images_per_second=median,
            lowest=min(rates),
            highest=max(rates),
            ms_per_batch=1000 * case.batch_size * processes / median,
            tflops=2 * case.row["step_macs"] * median / processes / 1e12,
        )
        if processes > 1:
            case.row["per_process"] = [statistics.median(rates) for rates in by_rank]
        if rates := alone.get(f"{case.label} {case.batch_size}"):
            case.row["scaling"] = median / processes / statistics.median(rates)


# ------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------


def header(args: Args, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The machine and the settings that the figures are of."""
    name, driver = platform.processor() or platform.machine(), None
    cpu = Path("/proc/cpuinfo")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    elif device.type == "cpu" and cpu.exists():
        models = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    side, rate = matrix_rate(device, dtype)
    tf32 = device.type == "cuda" and dtype == torch.float32
    tf32 = tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
    return dict(
        device=f"{device.type}: {name}",
        driver=driver,
        torch=torch.__version__,
        cuda=torch.version.cuda if device.type == "cuda" else None,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        processes=mirl.num_processes(),
        mode=args.mode,
        method=args.method if args.mode == "pretrain" else None,
        dtype=str(dtype).removeprefix("torch.") + (" (TF32)" if tf32 else ""),
        autocast=args.autocast and dtype != torch.float32,
        compile=args.compile,
        windows=args.windows,
        matrix_product=f"{side} x {side}",
        matrix_tflops=round(rate, 4),
    )


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda r: r["model"],
    "depth": lambda r: f"{r['depth']}",
    "params M": lambda r: f"{r['params'] / 1e6:.2f}",
    "MACs G": lambda r: f"{r['macs'] / 1e9:.2f}",
    "+attention": lambda r: f"{r['macs_with_attention'] / 1e9:.2f}",
    "batch": lambda r: f"{r['batch_size']}",
    "img/s": lambda r: f"{r['images_per_second']:.2f}",
    "min": lambda r: f"{r['lowest']:.2f}",
    "max": lambda r: f"{r['highest']:.2f}",
    "ms/batch": lambda r: f"{r['ms_per_batch']:.1f}",
    "TFLOP/s": lambda r: f"{r['tflops']:.3f}",
    "of peak": lambda r: f"{100 * r['of_matrix_product']:.0f} %",
    "GiB": lambda r: f"{r['memory_gib']:.2f}",
    "scaling": lambda r: f"{100 * r['scaling']:.0f} %",
    "V100": lambda r: f"{r['v100_images_per_second']}",
}


def result(case: Case, args: Args, matrix_tflops: float) -> dict[str, Any]:
    """A case's row: its measures under the names that COLUMNS and --json use."""
    row = dict(model=case.label, depth=case.config.depth, batch_size=case.batch_size) | case.row
    if case.step:
        row["of_matrix_product"] = row["tflops"] / matrix_tflops
    if args.mode == "infer" and case.label in TABLE_4:
        row["v100_images_per_second"] = TABLE_4[case.label]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for people; "-" for what was not measured."""

    def cell(show: Callable, row: dict[str, Any]) -> str:
        try:
            return show(row)
        except KeyError:
            return "-"

    columns = [[name, *(cell(show, row) for row in rows)] for name, show in COLUMNS.items()]
    columns = [c for c in columns if set(c[1:]) != {"-"}]
    columns.append(["", *(row.get("error", "") for row in rows)])
    lines = []
    for line in zip(*columns, strict=True):
        cells = [
            cell.rjust(max(map(len, column))) for cell, column in zip(line, columns, strict=True)
        ]
        cells[0] = line[0].ljust(len(cells[0]))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with mirl.interruptible(None), mirl.processes(args.device) as device:
        dtype = mirl.pick_dtype(args.dtype, device)
        if args.compile:
            mirl.check_compile(device)
        sizes = args.batch_size or ("256" if device.type == "cuda" else "8",)
        if "auto" in sizes and (device.type != "cuda" or mirl.num_processes() > 1):
            raise UserError("--batch-size auto needs one process on a CUDA device: give a number")
        head = header(args, device, dtype)
        say("  ".join(f"{k} {v}" for k, v in head.items() if v not in (None, False)))

        cases = [
            Case(label, mirl.model_config(name), make, 0 if size == "auto" else int(size))
            for name in args.models
            for label, make in makers(name, args).items()
            for size in sizes
        ]
        rows = []
        # with auto each has the device to itself, else they take turns
        for turn in [[case] for case in cases] if "auto" in sizes else [cases]:
            for case in turn:
                (prepare if case.batch_size else largest_that_fits)(case, args, device, dtype)
            measure(turn, args, device)
            rows += [result(case, args, head["matrix_tflops"]) for case in turn]
            for case in turn:
                case.step = case.alone = None
        say(table(rows))
        if args.json and mirl.is_main():
            mirl.write_text(Path(args.json), json.dumps(dict(head, rows=rows), indent=2) + "\n")


def makers(name: str, args: Args) -> dict[str, Callable[[], nn.Module]]:
    """What builds model `name`, ours and the peers', by its label."""
    makes = {name: functools.partial(own, name, args.mode, args.method)}
    if args.peers and (args.mode, args.method) == ("pretrain", "mirl"):
        makes[f"{name} (mae)"] = functools.partial(own, name, args.mode, "mae")
    for library in PEERS[args.mode] if args.peers else ():
        makes[f"{name} ({library})"] = functools.partial(peer, library, name, args.mode)
    return makes


if __name__ == "__main__":
    mirl.run_script(main)
