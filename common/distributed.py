"""Processes and devices."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm

from mirl import UserError, require

# torchrun's environment; without it this process is the only one
RANK, LOCAL_RANK = int(os.environ.get("RANK") or 0), int(os.environ.get("LOCAL_RANK") or 0)
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)


def say(text: str) -> None:
    """Print from the main process, without tearing a progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def process_group(device_flag: str) -> Iterator[torch.device]:
    """Yields this process's device; under torchrun, joins the others first. Raises UserError for a
    device that is not there, or where only some of torchrun's variables are set."""
    together = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    require(
        (RANK, WORLD_SIZE) == (0, 1) or all(map(os.getenv, together)),
        f"of {', '.join(together)} some are not set: start with torchrun, or unset them all",
    )
    device = pick_device(device_flag)
    if cuda := device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    yield device
    if dist.is_initialized():  # after an error the others may never come to this
        # gloo can hang where another process is gone already, in torch 2.6 after its barrier too
        (dist.barrier if cuda else dist.monitored_barrier)()
        dist.destroy_process_group()


def pick_device(flag: str) -> torch.device:
    """auto: CUDA, then MPS, then CPU. Raises UserError for a device that is not there."""
    name = flag
    if flag == "auto":
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
        name = here if here == "cuda" or (here == "mps" and WORLD_SIZE == 1) else "cpu"
    name = f"cuda:{LOCAL_RANK}" if name == "cuda" else name
    known = ["auto", "cuda", "cpu"] + ["mps", "cuda:N"] * (WORLD_SIZE == 1)
    require(re.sub(r"\d+$", "N", flag) in known, f"--device {flag}: use {', '.join(known)}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {flag}: no {name} ({str(error).splitlines()[0]})") from None


def pick_dtype(flag: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA devices made for it, else fp32. Raises UserError where it cannot be."""
    cuda = device.type == "cuda"
    bf16 = not cuda or torch.cuda.get_device_capability(device) >= (8, 0)
    require(flag != "bf16" or bf16, "--dtype bf16: this GPU has no bf16; use fp16 or fp32")
    require(flag != "fp16" or cuda, "--dtype fp16 needs a CUDA device; use bf16 or fp32")
    auto = torch.bfloat16 if cuda and bf16 else torch.float32
    return dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32).get(flag, auto)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """torch's autocast to `dtype`; float32 turns off one around it too."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """The model itself for one process, else in DistributedDataParallel, which leaves buffers
    alone: see `share_buffers`."""
    if WORLD_SIZE == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
    parallel.broadcast_buffers = False  # as an argument it has another name in newer torch
    return parallel


def syncs_batch_norm(device: torch.device) -> bool:
    """Whether batch norm sees the images of several processes: torch has it for CUDA alone."""
    return WORLD_SIZE > 1 and device.type == "cuda"


def share_buffers(model: nn.Module) -> None:
    """Every process takes those of process 0: before an evaluation they must agree, and where batch
    norm is not synchronised, each has seen other images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def gather(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    values = [value] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Process 0 goes through first, then the first of each node, then the rest."""
    turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        gather(None)  # waits for all
    try:
        yield
    finally:
        for _ in range(2 - turn):
            gather(None)
