"""The command line that the scripts share, and how they end."""

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from common.distributed import LOCAL_RANK, RANK
from mirl import UserError, require

switch = argparse.BooleanOptionalAction  # --flag and --no-flag


def number(kind=float, low=-1e18, high=1e18, above=-math.inf) -> Callable[[str], Any]:
    """A type for argparse: an int or float from `low` to `high`, and greater than `above`."""
    least = f"at least {low}" if above == -math.inf else f"greater than {above}"

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (low <= value <= high and value > above):  # nor is NaN
            raise argparse.ArgumentTypeError(f"must be {least} and at most {high}, not {text:.40}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def text(value: str) -> str:
    """A type for argparse: anything but nothing."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value


count, positive, share = number(int, low=1), number(above=0), number(low=0, high=1)


class RecipeParser(argparse.ArgumentParser):
    """argparse, whose flags have the values of a recipe where they are not given. recipes: name ->
    values of flags, the first by default. One named <recipe>-<task> is what --task makes of it."""

    def __init__(self, doc: str | None, recipes: dict[str, dict[str, Any]]):
        self.recipes = recipes
        super().__init__(
            description=doc,
            usage="%(prog)s [--flag VALUE …] (--help explains each)",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if recipes:
            names = [name for name in recipes if "-" not in name]
            told = "sets each flag whose help lists it; a given flag wins; default %(default)s"
            self.add_argument("--recipe", choices=names, default=names[0], help=told)

    def add_argument(self, *names, **options) -> argparse.Action:
        """The flag, with what each recipe sets it to in its help."""
        action = super().add_argument(*names, **options)
        for recipe, values in self.recipes.items():
            action.help += f"; {recipe} {values[action.dest]}" if action.dest in values else ""
        return action

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """The flags. What is wrong with one ends the process with a sentence and exit code 2."""
        known = self.parse_known_args(argv)[0]
        own = f"{known.recipe}-{getattr(known, 'task', '')}"
        self.set_defaults(**self.recipes[own if own in self.recipes else known.recipe])
        return self.parse_args(argv)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What the two training scripts have in common; each adds its own."""
    flag = parser.add_argument
    # fmt: off
    flag("--out", type=text, help="the run's folder; default runs/…, by method or task and recipe")
    flag("--resume", action=switch, default=False,
         help="continue the run in --out after its last complete epoch, or start it")
    flag("--data-dir", type=text, default="data",
         help="where downloaded data sets are kept; default data")
    flag("--epochs", type=count, help="passes over the training images")
    flag("--warmup-epochs", type=number(low=0), help="epochs of linear warm-up")
    flag("--batch-size", type=count,
         help="the effective batch, over all processes and accumulated micro-batches")
    flag("--device-batch-size", type=count,
         help="images on a device at a time, the rest of the batch being accumulated; lower it "
         "where memory runs out. Default: what divides the batch, up to 256 images of 224 pixels "
         "in pre-training, 128 in fine-tuning, more of smaller ones")
    flag("--lr", type=positive, help="peak learning rate; default --base-lr x --batch-size / 256")
    flag("--base-lr", type=positive,
         help="learning rate for a batch of 256; raise it for small models and short runs")
    flag("--schedule", choices=("cosine", "linear", "step"), default="cosine",
         help="cosine or linear to 0, or a step-wise decay; default cosine")
    flag("--weight-decay", type=number(low=0), default=0.05,
         help="AdamW's, for weights; biases, norms and tokens have none; default 0.05")
    flag("--clip-grad", type=positive, help="largest gradient norm; default no clipping")
    flag("--image-size", type=count, help="side of the images in pixels; default the model's")
    flag("--patch-size", type=count, help="side of a patch in pixels; default the model's")
    flag("--device", type=text, default="auto",
         help="auto (CUDA, then MPS, then CPU), cuda, cuda:N, mps or cpu; default auto")
    flag("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
         help="precision of the forward pass; auto is bf16 on GPUs made for it, else fp32 (on a "
         "GPU with TF32 in matrix products). fp16 runs with a loss scaler and overflows sooner")
    flag("--compile", action=switch, default=False,
         help="torch.compile: minutes of waiting first, then faster steps")
    flag("--workers", type=number(int, low=0, high=999), default=default_workers(),
         help="processes that read and augment images, 0 for none; default this one's share of the "
         "cores, at most 16, here %(default)s")
    flag("--seed", type=number(int, low=0), default=0,
         help="everything random follows from it, the epoch and the process; default 0")
    flag("--log-every", type=count, default=50,
         help="steps between two lines of metrics; more often costs speed; default 50")
    flag("--tensorboard", action=switch, default=False,
         help="also write the metrics for TensorBoard; needs pip install -e '.[tensorboard]'")
    # fmt: on


def default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(16, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def settle(args: argparse.Namespace, out: str) -> None:
    """Fill in what follows from other flags; out: the default of --out. Raises UserError."""
    warmup, epochs = args.warmup_epochs, args.epochs
    longer = f"--warmup-epochs {warmup:g} is longer than the run of {epochs} epochs: give both"
    require(warmup <= epochs, longer)
    there = not args.tensorboard or importlib.util.find_spec("tensorboard")
    require(there, "--tensorboard needs tensorboard: pip install -e '.[tensorboard]'")
    args.lr = args.lr or args.base_lr * args.batch_size / 256
    args.out = args.out or out


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what a device, or torch's allocator on the CPU, raises when it is full."""
    signs = ("out of memory", "can't allocate memory", "alloc_failed")
    return any(sign in str(error).lower() for sign in signs)


def run_script(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """main(argv); what the user can mend (wrong input, a file or folder that the system refuses)
    becomes one sentence on stderr and exit code 2, or 1 where a training went wrong."""
    with contextlib.suppress(AttributeError):  # a notebook's stdout has no encoding
        sys.stdout.reconfigure(errors="backslashreplace")  # names that it cannot write, as stderr
    try:
        return main(argv)
    except KeyboardInterrupt:
        code, sentence = 130, "stopped by Ctrl-C; a training run goes on with --resume"
    except (UserError, OSError, RuntimeError) as error:
        if out_of_memory(error):
            code, sentence = 1, "the memory does not suffice: lower the (device) batch size"
        elif isinstance(error, UserError | OSError):
            code, sentence = getattr(error, "exit_code", 2), str(error).strip() or repr(error)
            # an error in a worker process comes with its traceback, and the sentence at the end
            sentence = sentence.splitlines()[-1].removeprefix("mirl.UserError: ")
        else:
            raise
    if LOCAL_RANK:
        time.sleep(2)  # where the first process says the same, torchrun ends this one here
        sentence = f"process {RANK}: {sentence}"
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(code)
