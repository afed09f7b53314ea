"""Parameter groups, the schedule of the learning rate, and the log of a run."""

import argparse
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import save
from common.distributed import RANK, WORLD_SIZE, pick_dtype, say
from mirl import UserError


class TrainingError(UserError):
    """Training went wrong: said in one sentence, exit code 1."""

    exit_code = 1


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, scale: Callable[[str], float] = lambda _: 1
) -> list[dict[str, Any]]:
    """AdamW's groups: no weight decay on biases and norms, nor (our choice) on class and mask
    tokens; lr · scale(name) for the parameter of that name. [S A.1]"""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and not name.endswith(("cls_token", "mask_token"))
            key = (lr * scale(name), weight_decay if decays else 0.0)
            groups.setdefault(key, []).append(p)
    return [dict(params=ps, lr=lr, weight_decay=wd) for (lr, wd), ps in groups.items()]


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str = "cosine") -> float:
    """The learning rate of a 0-based step as a share of its peak.

    A linear warm-up that reaches 1 at its last step, then "cosine" [S A.1] or "linear" decay to 0,
    or "step": a tenth after 2/3 of the run and a hundredth after 11/12 of it, which are the 8th and
    11th of the 12 epochs usual for detection (S Table 3 and A.2 give no steps).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "step":
        return 0.1 ** ((step >= steps * 2 / 3) + (step >= steps * 11 / 12))
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def to_json(record: dict[str, Any]) -> str:
    """A line of JSON, which has neither NaN nor infinity: they are null."""
    return re.sub("-?Infinity|NaN", "null", json.dumps(record))


class MetricLogger:
    """A run's folder: config.json, metrics.jsonl; a progress bar on a terminal, or lines anywhere
    else; TensorBoard.

    images: of the training split. A step is `accumulation` times `size` of them in every process.
    It waits for the device once every `--log-every` steps, to read the losses since. `history`
    holds the epochs' records, `written` is the length of metrics.jsonl in bytes.
    """

    def __init__(self, args: argparse.Namespace, images: int, size: int, accumulation: int):
        self.args, self.images, self.size, self.accumulation = args, images, size, accumulation
        self.steps = images // args.batch_size  # an epoch; what does not fill a batch is left out
        self.total = args.epochs * self.steps
        self.path = Path(args.out) / "metrics.jsonl"
        self.board = None  # TensorBoard's

    def start(self, saved: dict[str, Any], model: nn.Module, device: torch.device) -> None:
        """Begin, or go on from a checkpoint, with metrics.jsonl as it was then."""
        args = self.args
        self.start_window()
        self.history, self.written = saved.get("history", []), saved.get("written", 0)
        self.step = saved.get("epoch", 0) * self.steps
        disable = None if RANK == 0 else True  # None: where there is no terminal
        self.bar = tqdm(total=self.total, initial=self.step, disable=disable, dynamic_ncols=True)
        if RANK != 0:
            return
        dtype = str(pick_dtype(args.dtype, device)).removeprefix("torch.")
        settings = vars(args) | dict(device=str(device), dtype=dtype, processes=WORLD_SIZE)
        settings |= dict(device_batch_size=self.size, accumulation=self.accumulation)
        settings |= dict(model_config=dataclasses.asdict(model.config))
        text = json.dumps(settings, indent=2) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save(self.path.with_name("config.json"), lambda file: file.write(text.encode()))
        with open(self.path, "ab") as file:
            file.truncate(min(self.written, file.tell()))
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.path.with_name("tensorboard")
            self.board = SummaryWriter(folder, purge_step=self.step + 1)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(
            f"{args.model}, {count / 1e6:.2f}M parameters, on {device}; {self.images} images, "
            f"{self.steps} steps an epoch, lr {args.lr:.3g}; effective batch {args.batch_size} = "
            f"{WORLD_SIZE} process(es) x {self.size} images x {self.accumulation} accumulated"
        )

    def start_epoch(self, epoch: int) -> None:
        """epoch: from 1."""
        self.start_window()
        self.epoch, self.began = epoch, self.clock
        self.losses: list[Tensor] = []  # of each step up to the last log

    def start_window(self) -> None:
        """From here on to the next log: the losses (terms,) of each micro-batch."""
        self.clock, self.waited, self.window = time.perf_counter(), 0.0, []

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; the time that the loop waits for them is logged as `input_wait`."""
        began = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def add(self, **losses: Tensor) -> None:
        """The losses of a micro-batch, scalars, to be logged by name; `loss` is the total."""
        self.names = list(losses)
        self.window.append(torch.stack([loss.detach().float() for loss in losses.values()]))

    @property
    def due(self) -> bool:
        """Whether the coming step is logged: every so many, and the last of an epoch."""
        step = self.step + 1
        return step % self.args.log_every == 0 or step % self.steps == 0

    def end_step(self, lr: float, norm: Tensor | None, **vectors: Tensor) -> None:
        """A step is done. Where it is due, write what the steps since the last log did, with its
        learning rate, gradient norm and `vectors`. Raises TrainingError for NaN or infinity."""
        due, self.step = self.due, self.step + 1
        self.bar.update()
        if not due:
            return
        losses = torch.stack(self.window)  # (micro-batches, terms)
        losses = losses.unflatten(0, (-1, self.accumulation)).mean(dim=1)  # (steps, terms)
        if WORLD_SIZE > 1:
            dist.all_reduce(losses)
            losses /= WORLD_SIZE
        losses = losses.cpu().double()  # here the loop waits for the device
        self.check(losses, "a loss up to")
        self.losses.append(losses)
        seconds = time.perf_counter() - self.clock
        speed = len(losses) * self.args.batch_size / seconds
        means = dict(zip(self.names, losses.mean(dim=0).tolist()))
        self.record = dict(epoch=self.epoch, step=self.step, **means, lr=lr, grad_norm=norm.item())
        self.record |= dict(
            images_per_second=round(speed, 1),
            input_wait=round(self.waited / seconds, 4),
            peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 3),  # 0 without CUDA
        )
        self.write("step", self.record | {k: v.tolist() for k, v in vectors.items()})
        text = f"loss {means['loss']:.4f}  lr {lr:.2e}  {speed:.0f} img/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            left = tqdm.format_interval((self.total - self.step) * seconds / len(losses))
            place = f"epoch {self.epoch}/{self.args.epochs}  step {self.step}/{self.total}"
            say(f"{place}  {text}  {left} left")
        self.start_window()

    def check(self, values: Tensor, what: str) -> None:
        if not values.isfinite().all():
            raise TrainingError(
                f"{what} step {self.step} (epoch {self.epoch}) is not finite: --resume goes on "
                f"after epoch {self.epoch - 1}; try a lower --lr, --clip-grad 1, or --dtype fp32"
            )

    def trained(self, model: nn.Module) -> dict[str, Any]:
        """The record of the epoch's last step, with the means and the speed of all. Raises
        TrainingError for NaN or infinity in the weights, which that step may have ruined."""
        self.check(torch.stack([p.sum() for p in model.parameters()]), "a weight after")
        self.start_window()
        seconds = self.clock - self.began
        speed = round(self.steps * self.args.batch_size / seconds, 1)
        means = dict(zip(self.names, torch.cat(self.losses).mean(dim=0).tolist()))
        return self.record | means | dict(images_per_second=speed, seconds=seconds)

    def end_epoch(self, trained: dict[str, Any], **record) -> None:
        """Write the epoch: what it `trained`, also before a resume, and `record`'s values."""
        record["seconds"] = round(trained["seconds"] + time.perf_counter() - self.clock, 2)
        self.history.append(trained | record)
        self.write("epoch", self.history[-1])

    def write(self, kind: str, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to TensorBoard if asked for."""
        if RANK != 0:
            return
        with open(self.path, "a") as file:
            file.write(to_json(dict(kind=kind) | record) + "\n")
        self.written = self.path.stat().st_size
        if self.board:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, record["step"])
            self.board.flush()
