"""Files: written whole or not at all, read without running anything that is in them."""

import argparse
import dataclasses
import errno
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

import mirl
from common.distributed import RANK, gather, say
from common.paddle import HARMLESS, PADDLE, Stub, read_paddle
from mirl import Config, UserError, require


def save(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary name beside `path`), moved to `path` when it is complete on the disk. Raises
    UserError where no space is left; what `path` held stays."""
    temporary = path.with_name(f"{path.stem}.tmp{path.suffix}")
    try:
        try:
            write(temporary)
        except RuntimeError:  # torch hides the system's reason: who writes more is told it
            with open(temporary, "ab") as file:
                file.write(bytes(2**20))
            raise
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        require(not full, f"no space is left to write {path}: what it held is kept; make room")
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: Path, model: nn.Module, **more) -> None:
    """What `model` can be rebuilt from on any machine: its weights, on the CPU, and its config."""
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    state = dict(model=weights, config=dataclasses.asdict(model.config)) | more
    save(path, lambda temporary: torch.save(state, temporary))


SAFETENSORS = re.compile(rb".{5}\0\0\0\{", re.DOTALL)  # a length, then JSON
# What first bytes, or an error, tell of a file that cannot be read: the first that is found.
REASONS = {
    r"SafetensorError|central directory|EOF|truncated": "it ends too early: download it again",
    r"\Aversion https://git-lfs": "it is git-LFS's pointer to the file: fetch that by git lfs pull",
    r"\A\s*[<{]": "it is a web page or other text: download the file itself",
    r"ModuleNotFoundError": "it needs pip install -e '.[safetensors]'",
    r"GLOBAL (\S+)": r"it names \1: save model.state_dict() alone",
    r"TorchScript": "it is a TorchScript program: save the state dict of what torch.jit.load gives",
    r"not in a subdirectory": "it is an archive: unpack it",
    r"MemoryError|allocate memory": "the memory does not suffice for it",
    r"\[Errno \d+\] (.*)": r"\1",
    r"Error: (it (?:names|has) .*)": r"\1",  # of `read_paddle`
}


def load_file(path: str | Path) -> dict[str, Any]:
    """The tensors and plain values in a file of torch or safetensors, on the CPU, or what
    `read_paddle` makes of a file of the authors. Raises UserError for anything else."""
    first = b""
    try:
        with open(path, "rb") as file:
            first = file.read(64)
        if SAFETENSORS.match(first):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([(Stub, name) for name in HARMLESS]):
            paddle = PADDLE.match(first)
            saved = read_paddle(path) if paddle else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # torch raises many kinds for what is not its own
        signs = f"{first.decode('latin1')}\n{type(error).__name__}: {error}"
        found = (m.expand(REASONS[p]) for p in REASONS if (m := re.search(p, signs)))
        reason = next(found, "it is damaged, or of no known format")
        raise UserError(f"{path} is not a checkpoint that can be read safely ({reason})") from None
    require(isinstance(saved, dict), f"{path} is no checkpoint: it holds a {type(saved).__name__}")
    return saved


# Flags that may differ on a resume. Any other would make the steps done those of another run.
MAY_CHANGE = {"resume", "out", "recipe", "data", "data_dir", "from_", "truncated", "normalize"}
MAY_CHANGE |= {"device", "dtype", "device_batch_size", "compile", "workers", "log_every"}
MAY_CHANGE |= {"tensorboard", "log_grad_norms", "picture_every", "picture_pair", "vgg_checkpoint"}


def check_out(out: str, resume: bool) -> None:
    """Raises UserError where the folder holds a run that nothing said to continue."""
    folder, names = Path(out), ("checkpoint.pt", "metrics.jsonl", "config.json")
    held = any((folder / name).exists() for name in names) and not resume
    require(not held, f"{out} already holds a run: add --resume to continue it, or choose --out")
    require(not folder.exists() or folder.is_dir(), f"--out {out} is a file, not a folder")
    gather(None)  # every process looks before any goes on and writes there


def identity(args: argparse.Namespace, config: Config, data) -> dict[str, Any]:
    """What makes a run the run that it is: a resume must find the same."""
    flags = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    data = dict(training_images=len(data), data_digest=data.digest()[:16])
    return flags | dataclasses.asdict(config) | data


def resume(out: str, parts: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """Take up the checkpoint in the folder `out`, if there is one; returns all that is in it.

    parts: name -> what has the state of that name. Raises UserError for one that is damaged or of
    another model, other flags or other data, and where not all processes see the same.
    """
    path = Path(out) / "checkpoint.pt"
    saved = load_file(path) if path.exists() else {}
    epochs = gather(saved.get("epoch", 0))
    require(len(set(epochs)) == 1, f"--out {out} must be shared by all nodes")
    if not saved:
        return saved
    try:
        old, new = saved["identity"], identity.get
        other = [f"{k} {v!s:.60} -> {new(k)!s:.60}" for k, v in old.items() if v != new(k)]
        require(
            not other,
            f"--resume continues a run as it began, and {path} has other {', '.join(other)}; give "
            "what it began with, or another --out",
        )
        for name, part in parts.items():
            if saved[name]:  # the loss scaler has nothing to save but in fp16
                part.load_state_dict(saved[name])
        say(f"resuming {path} after epoch {saved['epoch']} of {identity['epochs']}")
    except (UserError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError):
        raise UserError(
            f"--resume: {path} is damaged or no checkpoint of this script: move it away to start "
            "anew, or choose another --out"
        ) from None
    return saved


def save_checkpoint(out: str, parts: dict[str, Any], **more) -> None:
    """The state of every part and what else a resume needs, from the main process."""
    if RANK == 0:
        state = {name: part.state_dict() for name, part in parts.items()} | more
        save(Path(out) / "checkpoint.pt", lambda temporary: torch.save(state, temporary))


def tensors_in(saved: dict, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """All tensors in dicts in dicts, under their dotted names."""
    for name, value in saved.items():
        if isinstance(value, Tensor):
            yield str(name), value
        elif isinstance(value, dict) and depth:
            yield from ((f"{name}.{k}", x) for k, x in tensors_in(value, depth - 1))


def named_tensors(saved: dict[str, Any], whole: bool = False) -> dict[str, Tensor]:
    """The weights of the ViT in a file, under timm's names; whole: of the MIRL around it.

    What stands before the names goes, be it a dict of the file ("model", "state_dict", …) or a
    wrapper ("module.", "_orig_mod.", "backbone.", …). Of several ViTs the one with the least before
    its names is taken, and a teacher before its student. Without one: all tensors of the file.
    """
    tensors = dict(tensors_in(saved))
    stems = [k.removesuffix("cls_token") for k in tensors if k.endswith("cls_token")]
    stems = [stem for stem in stems if f"{stem}patch_embed.proj.weight" in tensors]
    stem, *others = sorted(stems, key=lambda stem: ("student" in stem, len(stem))) or [""]
    if others:
        say(f"takes the weights {stem}*, not {', '.join(f'{other}*' for other in others)}")
    stem = stem.removesuffix("encoder.") if whole else stem
    return {k.removeprefix(stem): x for k, x in tensors.items() if k.startswith(stem)}


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, free: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """Fill a model from named tensors; returns which of its own and of theirs do not fit. Raises
    UserError for any that do not begin with one of `free`, and for values that are no finite
    numbers; the model is then unchanged."""
    own = model.state_dict()
    theirs, ours = ({k: tuple(v.shape) for k, v in x.items()} for x in (weights, own))
    fitting = {k: v for k, v in weights.items() if theirs[k] == ours.get(k)}
    missing, unused = ([k for k in names if k not in fitting] for names in (own, weights))
    wrong = [
        f"{k} is {theirs.get(k, 'missing')} in it, {ours.get(k, 'missing')} in the model"
        for k in dict.fromkeys(missing + unused)
        if not k.startswith(free)
    ]
    bad = {k: int((~v.float().isfinite()).sum()) for k, v in fitting.items()}
    wrong += [f"{k} holds NaN or infinity {count} times" for k, count in bad.items() if count]
    wrong[3:] = [f"and {len(wrong) - 3} more"] * (len(wrong) > 3)
    require(not wrong, f"{path} does not fit the model: {'; '.join(wrong)}")
    model.load_state_dict(own | fitting)
    return missing, unused


def load_encoder(vit: mirl.ViT, path: str, truncated: bool = False) -> list[str]:
    """Fill a ViT from a file; returns the names of what the file does not hold, left as it was.

    The file is one of ours, the authors', or any in which `named_tensors` finds timm's or MAE's
    names; decoders are left out. The head, and the norm before it, are taken where they fit;
    positions of another grid are resized. truncated: the file may have fewer blocks [S E]. Raises
    UserError where anything else does not fit; the ViT is then unchanged.
    """
    saved = load_file(path)
    weights = named_tensors(saved)
    weights = {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}
    require(
        "cls_token" in weights,
        f"--from {path} holds no weights of a ViT under timm's names, to which others must be "
        f"converted, but {', '.join([*weights][:3]) or 'no tensors'}",
    )
    table = weights.get("pos_embed")
    if table is not None and table.ndim == 3:
        weights["pos_embed"] = fit_positions(table.float(), saved.get("config"), vit.config)
    free = ("norm.", "fc_norm.", "head.")  # as the classes and the pooling want them
    if truncated:
        free += tuple(f"blocks.{k}." for k in range(depth_of(weights), vit.config.depth))
    missing, unused = load_weights(vit, weights, f"--from {path}", free)
    own = len(vit.state_dict())
    report = f"{own - len(missing)} of {own} tensors from {path}"
    for what, names in (("at random", missing), ("unused", unused)):
        short = dict.fromkeys(re.sub(r"^(blocks\.\d+)\..*", r"\1", name) for name in names)
        report += f"; {what}: {', '.join(short)}" if names else ""
    say(report)
    return missing


def fit_positions(table: Tensor, theirs: Any, config: Config) -> Tensor:
    """A position table (1, 1+n, D) resized to the grid of `config`, from that of `theirs`, which
    tells a `Config`, or is square. Raises UserError where n is no square."""
    n = table.shape[1] - 1
    try:
        grid = Config(**theirs).grid
    except TypeError:  # not a file of ours
        grid = config.grid if n == config.num_patches else (math.isqrt(n), math.isqrt(n))
    if grid == config.grid:
        return table
    require(math.prod(grid) == n, f"--from holds {n} positions, which are no square grid")
    say(f"positions resized from {grid} to {config.grid} patches")
    return mirl.resize_positions(table, grid, config.grid)


def depth_of(weights: dict[str, Tensor], blocks: str = "blocks.") -> int:
    """How many parts there are below a name that ends in a dot."""
    return len({k[len(blocks) :].split(".")[0] for k in weights if k.startswith(blocks)})


def encoder_shape(weights: dict[str, Tensor], path: str | Path) -> dict[str, int]:
    """What the shapes of a ViT's weights, under timm's names, say of its `Config`: for square
    images all but the heads. Raises UserError for other weights."""
    try:
        D, C, P, _ = weights["patch_embed.proj.weight"].shape
        size = P * math.isqrt(weights["pos_embed"].shape[1] - 1)
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{path} holds no weights of a ViT") from None
    return dict(depth=depth_of(weights), width=D, channels=C, patch_size=P, image_size=size)


def load_mirl(path: str | Path, **overrides) -> mirl.MIRL:
    """The model that a file of pre-training holds, decoders and all.

    overrides: fields of `Config` to be replaced. The authors' file tells all but `heads` and
    `decoder_heads`, which are of the model in MODELS with as many blocks, of this width, in as many
    segments, or in the overrides. Raises UserError where the file holds no such model.
    """
    saved = load_file(path)
    weights = named_tensors(saved, whole=True)
    require(
        weights.keys() >= {"encoder.cls_token", "decoders.0.mask_token"},
        f"{path} holds no decoders: give a checkpoint.pt of pre-training, or the authors' file of "
        "a pre-trained model",
    )
    fields = saved.get("config")
    if fields is None:
        fields = encoder_shape(named_tensors(saved), path) | dict(
            segments=depth_of(weights, "decoders."),
            decoder_width=weights["decoders.0.mask_token"].shape[2],
            decoder_depth=depth_of(weights, "decoders.0.blocks."),
            weight_norm="decoders.0.head.weight" not in weights,
        )
        size = fields["depth"], fields["width"], fields["segments"]
        alike = [c for c in mirl.MODELS.values() if (c.depth, c.width, c.segments) == size]
        fields |= {k: getattr(c, k) for c in alike for k in ("heads", "decoder_heads")}
        require(
            fields.keys() | overrides >= {"heads", "decoder_heads"},
            "{}: no model has {} blocks of width {} in {} segments, so its heads are not known: "
            "give heads and decoder_heads".format(path, *size),
        )
    try:
        model = mirl.MIRL(Config(**fields | overrides))
    except TypeError:
        raise UserError(f"{path} has a config that is no model's: {fields!s:.80}") from None
    load_weights(model, weights, path, ("feature_", "momentum_encoder."))  # of further objectives
    return model


def load_classifier(weights: dict[str, Tensor], name: str, path: str) -> mirl.ViT:
    """A fine-tuned ViT of the authors, MAE or timm, from its weights under timm's names; depth,
    width and heads are the model's of this name, the rest follows from the weights. Raises
    UserError for other weights."""
    require("head.weight" in weights, f"--from {path} is no fine-tuned model: it has no head")
    named = mirl.model_config(name)
    shape = encoder_shape(weights, path) | dict(depth=named.depth, width=named.width)
    pool = "mean" if "fc_norm.weight" in weights else "cls"
    model = mirl.build_vit(name, **shape, num_classes=len(weights["head.weight"]), pool=pool)
    load_weights(model, weights, f"--from {path} (is it --model {name}?)")
    return model


@torch.no_grad()
def expect_imagenet(vit: mirl.ViT) -> None:
    """From a ViT for images of mean and deviation 0.5, as most of timm's are, the same function for
    images of ImageNet's: the patch embedding is linear, so it can take up the difference."""
    proj = vit.patch_embed.proj
    mean, std = mirl.imagenet_statistics(proj.weight.device)
    proj.bias += (proj.weight * (2 * mean - 1)).sum(dim=(1, 2, 3))
    proj.weight *= 2 * std
