"""Files: written whole or not at all, read without running anything that is in them."""

import argparse
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from torch import Tensor

import mirl
from common.distributed import RANK, gather, say
from common.paddle import HARMLESS, PADDLE, Stub, read_paddle
from mirl import Config, UserError, require


def save(path: Path, write: Callable[[BinaryIO], Any], **options) -> None:
    """write(open file beside `path`, **options); it is moved to `path` when it is complete on the
    disk. Raises UserError where the system refuses that; what `path` held stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file, **options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # torch hides it
        if isinstance(reason, OSError):
            raise UserError(f"{path} cannot be written, it stays as it was: {reason}") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_model(path: Path, model: nn.Module, **more) -> None:
    """What `model` can be rebuilt from on any machine: its weights, on the CPU, and its config."""
    weights = {k: v.cpu() for k, v in model.state_dict().items()}
    state = dict(model=weights, config=dataclasses.asdict(model.config)) | more
    save(path, lambda file: torch.save(state, file))


SAFETENSORS = re.compile(rb".{5}\0\0\0\{", re.DOTALL)  # a length, then JSON
# What first bytes, or an error, tell of a file that cannot be read: the first that is found.
REASONS = {
    r"\A\s*(<|{|version )": "it is text, a web page or a pointer for git lfs pull: get the file",
    r"ModuleNotFoundError": "it needs pip install -e '.[safetensors]'",
    r"GLOBAL (\S+)": r"it names \1: save model.state_dict() alone",
    r"EOF|truncated|central directory|SafetensorError": "it ends too early: get it again",
    r"TorchScript": "it is a program: save the state dict of what torch.jit.load gives",
    r"not in a subdirectory": "it is an archive: unpack it",
}


def load_file(path: str | Path) -> dict[str, Any]:
    """The tensors and plain values in a file of torch or safetensors, on the CPU, or what
    `read_paddle` makes of a file of the authors. Raises UserError for anything else, and what the
    system raises where it cannot be opened."""
    require(Path(path).is_file(), f"there is no file {path}")
    with open(path, "rb") as file:
        first = file.read(64)
    try:
        if SAFETENSORS.match(first):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([(Stub, name) for name in HARMLESS]):
            paddle = PADDLE.match(first)
            saved = read_paddle(path) if paddle else torch.load(path, "cpu", weights_only=True)
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
    saved = load_file(path) if path.exists() else None
    everywhere = {*gather(saved and saved.get("epoch"))}
    require(len(everywhere) == 1, f"--out {out} must be shared by all nodes")
    if saved is None:
        return {}
    try:
        old, new = saved["identity"], identity.get
        other = [f"{k} {v!s:.60} -> {new(k)!s:.60}" for k, v in old.items() if v != new(k)]
        require(
            not other, f"it has other {few(other, 9)}; give what it began with, or another --out"
        )
        for name, part in parts.items():
            if saved[name]:  # the loss scaler has nothing to save but in fp16
                part.load_state_dict(saved[name])
        say(f"resuming {path} after epoch {saved['epoch']} of {identity['epochs']}")
    except Exception as error:  # a damaged file can be anything
        reason = "it is damaged, or of another script: move it away, or choose another --out"
        reason = error if isinstance(error, UserError) else reason
        raise UserError(f"--resume cannot continue {path}: {reason}") from None
    return saved


def save_checkpoint(out: str, parts: dict[str, Any], **more) -> None:
    """The state of every part and what else a resume needs, from the main process."""
    if RANK == 0:
        state = {name: part.state_dict() for name, part in parts.items()} | more
        save(Path(out) / "checkpoint.pt", lambda file: torch.save(state, file))


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


def few(names: Iterable[str], limit: int = 4) -> str:
    """The first of them, and how many more there are."""
    names = [*names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def parts_of(weights: dict[str, Tensor], stem: str) -> int:
    """How many parts there are below a name that ends in a dot."""
    return len({k.removeprefix(stem).split(".")[0] for k in weights if k.startswith(stem)})


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], path: str | Path, free: tuple[str, ...] = ()
) -> tuple[list[str], list[str]]:
    """Fill a model from named tensors; returns which of its own and of theirs do not fit. Raises
    UserError for any that do not begin with one of `free`, and for values that are no finite
    numbers; the model is then unchanged."""
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    missing, unused = ([k for k in names if k not in fitting] for names in (own, weights))
    wrong = []
    for name in dict.fromkeys(missing + unused):
        if not name.startswith(free):
            shapes = [tuple(x[name].shape) if name in x else "missing" for x in (weights, own)]
            wrong.append("{} is {} in it and {} in the model".format(name, *shapes))
    for name, value in fitting.items():
        if not value.float().isfinite().all():
            wrong.append(f"{name} holds NaN or infinity")
    require(not wrong, f"{path} does not fit the model: {few(wrong, 3)}")
    model.load_state_dict(own | fitting)
    return missing, unused


def load_encoder(vit: mirl.ViT, path: str, truncated: bool = False) -> list[str]:
    """Fill a ViT from a file; returns the names of what the file does not hold, left as it was.

    The file is one of ours, the authors', or any in which `named_tensors` finds timm's or MAE's
    names; decoders are left out. The head, and the norm before it, are taken where they fit;
    positions of another grid are resized. truncated: the file may have fewer blocks [S E]. Raises
    UserError where anything else does not fit; the ViT is then unchanged.
    """
    saved, config = load_file(path), vit.config
    weights = named_tensors(saved)
    weights = {k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))}
    theirs = config_of(saved, weights, path, config)
    shape = (1, 1 + theirs.num_patches, config.width)
    if theirs.grid != config.grid and weights["pos_embed"].shape == shape:
        say(f"positions resized from {theirs.grid} to {config.grid} patches")
        table = weights["pos_embed"].float()
        weights["pos_embed"] = mirl.resize_positions(table, theirs.grid, config.grid)
    free = ("norm.", "fc_norm.", "head.")  # as the classes and the pooling want them
    if truncated:
        free += tuple(f"blocks.{k}." for k in range(parts_of(weights, "blocks."), config.depth))
    missing, unused = load_weights(vit, weights, path, free)
    own, told = len(vit.state_dict()), []
    for names in (missing, unused):
        whole = dict.fromkeys(re.sub(r"^(blocks\.\d+)\..*", r"\1", name) for name in names)
        told.append(", ".join(whole) or "none")
    taken = f"{own - len(missing)} of {own} tensors from {path}"
    say("{}; at random: {}; unused: {}".format(taken, *told))
    return missing


def config_of(saved: dict, vit: dict[str, Tensor], path: str | Path, like: Config | None) -> Config:
    """The configuration in a file of ours; of one of others, `like` with what the shapes of a ViT's
    weights, under timm's names, tell: patches, classes, and images that are square but where `like`
    has as many patches. Raises UserError for other weights."""
    try:
        P = vit["patch_embed.proj.weight"].shape[3]
        n = vit["pos_embed"].shape[1] - 1
        size = P * math.isqrt(n)
    except (KeyError, IndexError, ValueError):
        lacks = "has no patch_embed.proj.weight and pos_embed, timm's names"
        held = f"to which others must be converted: it holds {few(vit) or 'no tensors'}"
        raise UserError(f"{path} {lacks}, {held}") from None
    try:
        return Config(**saved["config"])
    except (KeyError, TypeError):  # not ours
        require(like, f"{path} is of no model in mirl.MODELS: give heads and decoder_heads")
    config = like
    if (n, P) != (like.num_patches, like.patch_size):
        config = dataclasses.replace(like, patch_size=P, image_size=size)
    if "head.weight" in vit:
        pool = "mean" if "fc_norm.weight" in vit else "cls"
        config = dataclasses.replace(config, num_classes=len(vit["head.weight"]), pool=pool)
    return config


def load_mirl(path: str | Path, **overrides) -> mirl.MIRL:
    """The model that a file of pre-training holds, decoders and all.

    overrides: fields of `Config` to be replaced. The authors' file tells all but the heads, which
    are in the overrides, or those of the model in MODELS with as many blocks, of this width, in as
    many segments. Raises UserError where the file holds no such model.
    """
    saved = load_file(path)
    weights = named_tensors(saved, whole=True)
    require(
        weights.keys() >= {"encoder.cls_token", "decoders.0.mask_token"},
        f"{path} holds no decoders: give a checkpoint.pt of pre-training, or the authors' file",
    )
    depth, width = parts_of(weights, "encoder.blocks."), weights["encoder.cls_token"].shape[2]
    size = depth, width, parts_of(weights, "decoders.")
    alike = [c for c in mirl.MODELS.values() if (c.depth, c.width, c.segments) == size]
    if overrides.keys() >= {"heads", "decoder_heads"}:
        alike = [Config(depth, width, overrides["heads"], segments=size[2])]
    fields = dict(
        decoder_width=weights["decoders.0.mask_token"].shape[2],
        decoder_depth=parts_of(weights, "decoders.0.blocks."),
        weight_norm="decoders.0.head.weight" not in weights,
    )
    config = config_of(saved, named_tensors(weights), path, alike[0] if alike else None)
    model = mirl.MIRL(dataclasses.replace(config, **fields | overrides))
    load_weights(model, weights, path, ("feature_", "momentum_encoder."))  # of further objectives
    return model


def load_classifier(weights: dict[str, Tensor], name: str, path: str) -> mirl.ViT:
    """A fine-tuned ViT of the authors, MAE or timm, from its weights under timm's names; depth,
    width and heads are the model's of this name, the rest follows from the weights. Raises
    UserError for other weights."""
    require("head.weight" in weights, f"{path} is no fine-tuned model: it has no head")
    model = mirl.ViT(config_of({}, weights, path, mirl.model_config(name)))
    load_weights(model, weights, f"{path} (is it --model {name}?)")
    return model


@torch.no_grad()
def expect_imagenet(vit: mirl.ViT) -> None:
    """From a ViT for images of mean and deviation 0.5, as most of timm's are, the same function for
    images of ImageNet's: the patch embedding is linear, so it can take up the difference."""
    proj = vit.patch_embed.proj
    mean, std = mirl.imagenet_statistics(proj.weight.device)
    proj.bias += (proj.weight * (2 * mean - 1)).sum(dim=(1, 2, 3))
    proj.weight *= 2 * std
