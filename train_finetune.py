"""Fine-tune a pre-trained ViT, train one from scratch, or look at what one has learnt.

On whatever device there is, after `python train_pretrain.py`, whose encoder it picks up:
    python train_finetune.py

One GPU, CIFAR-10:
    python train_finetune.py --recipe cifar10 --from runs/mirl-cifar10/encoder.pt

8 GPUs, ImageNet (a folder of train/<class>/*.jpg and val/<class>/*.jpg):
    torchrun --nproc-per-node 8 train_finetune.py --recipe imagenet --data /data/imagenet \\
        --from runs/mirl-imagenet/encoder.pt --resume

8 nodes of 8 GPUs, the same line on every node, with --out on a file system that they share:
    torchrun --nnodes 8 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id mirl \\
        train_finetune.py --recipe imagenet --data /data/imagenet --out /shared/run \\
        --from /shared/encoder.pt --resume

Segmentation and detection, from the same encoder:
    python train_finetune.py --task segment                      (or detect)

Without fine-tuning:
    python train_finetune.py --protocol knn --from ENCODER       (or linear, or blocks)
    python train_finetune.py --eval --from FINETUNED
    python train_finetune.py --predict IMAGE… --from FINETUNED

A run leaves in --out: config.json, metrics.jsonl, checkpoint.pt (after every epoch), and of the
weights as they are ("raw") and of their moving average ("ema") the last and the best by validation:
raw-last.pt, raw-best.pt, ema-last.pt, ema-best.pt.
"""

import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import repeat
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision import tv_tensors
from torchvision.models import ViT_B_16_Weights
from torchvision.ops import box_convert, clip_boxes_to_image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, save_image

import mirl
from mirl import UserError, flag, require, say

# fmt: off
# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set with few labels, in minutes on a laptop
    "quick": dict(model="vit_nano", data="shapes", epochs=40, warmup_epochs=4, batch_size=32,
                  base_lr=8e-3, layer_decay=0.75, drop_path=0.0, randaug=0.0, mixup=0.0,
                  cutmix=0.0, ema_decay=0.99),
    "cifar10": dict(model="vit_ti", data="cifar10", epochs=100, warmup_epochs=5, batch_size=512,
                    base_lr=1e-3, layer_decay=0.75, drop_path=0.1, randaug=9.0, mixup=0.8,
                    cutmix=1.0, ema_decay=0.9998),
    # ten classes of ImageNet on one GPU
    "imagenette": dict(model="vit_s", data="imagenette", image_size=160, epochs=100,
                       warmup_epochs=5, batch_size=256, base_lr=1e-3, layer_decay=0.75,
                       drop_path=0.1, randaug=9.0, mixup=0.8, cutmix=1.0, ema_decay=0.999),
    # [S A.1, Table 2]; what differs between the models is in TABLE_2
    "imagenet": dict(model="vit_b", data="data/imagenet", warmup_epochs=20, batch_size=2048,
                     base_lr=7.5e-4, randaug=9.0, mixup=0.8, cutmix=1.0, ema_decay=0.9998),
    # what --task makes of quick
    "quick-segment": dict(task="segment", model="vit_nano", data="scenes", image_size=64,
                          epochs=12, warmup_epochs=1, batch_size=8, base_lr=0.128,
                          layer_decay=0.75, drop_path=0.0, ema_decay=0.0, head_width=64),
    "quick-detect": dict(task="detect", model="vit_nano", data="scenes", image_size=64,
                         epochs=8, warmup_epochs=1, batch_size=16, base_lr=0.032,
                         layer_decay=0.75, drop_path=0.0, ema_decay=0.0, head_width=64),
    # [S A.2]; the layer decay is by --model
    "ade20k": dict(task="segment", model="vit_b", data="data/ade20k", image_size=512, epochs=127,
                   warmup_epochs=1.19, batch_size=16, base_lr=3.2e-3, schedule="linear",
                   drop_path=0.1, ema_decay=0.0, slide=True),
    "coco": dict(task="detect", model="vit_b", data="data/coco", image_size=800, epochs=12,
                 warmup_epochs=0.07, batch_size=16, base_lr=1.6e-3, schedule="step",
                 drop_path=0.1, ema_decay=0.0),
}
# fmt: on

# What the imagenet recipe sets by model; ViT-B's for a model that is not in the table.
TABLE_2 = {
    "vit_s": dict(layer_decay=0.65, epochs=200, drop_path=0.1),
    "vit_s_54": dict(layer_decay=0.88, epochs=100, drop_path=0.1),
    "vit_b": dict(layer_decay=0.65, epochs=100, drop_path=0.1),
    "vit_b_24": dict(layer_decay=0.65, epochs=100, drop_path=0.1),
    "vit_b_48": dict(layer_decay=0.88, epochs=50, drop_path=0.2),
}

# The layer decay of the other tasks [S A.2; BEiT's for segmentation]; 0.88 for deep models.
LAYER_DECAY = {"segment": 0.65, "detect": 0.75}

GREY = [round(255 * m) for m in mirl.IMAGENET_MEAN]  # where an image is moved away, or too small


@dataclass
class Args(mirl.TrainingFlags):
    recipe: str = flag(
        "quick",
        "values for the flags whose help lists one by recipe; a flag that you give wins",
        tuple(name for name in RECIPES if "-" not in name),
    )
    task: str = flag(
        "classify",
        "classify images; segment (UperNet), a class for every pixel; or detect (Mask R-CNN), "
        "objects with their boxes and masks. A recipe has its task",
        ("classify", "segment", "detect"),
    )
    from_: str | None = flag(
        None,
        "weights to start from: a pre-training checkpoint, an encoder.pt, a fine-tuned model, or "
        "the authors', timm's or MAE's weights; `scratch` for random ones. Default: "
        "runs/mirl-quick/encoder.pt where it is there and the recipe is quick, else scratch",
    )
    truncated: bool = flag(
        False, "allow --from to have fewer blocks than the model; the last ones start at random"
    )
    eval: bool = flag(
        False,
        "evaluate the fine-tuned model --from on the validation images; a file of the authors, MAE "
        "or timm must be of --model",
    )
    predict: tuple[str, ...] | None = flag(
        None,
        "print what the fine-tuned model --from sees in these image files, and stop; what is "
        "segmented or detected is also drawn, into --out",
    )
    protocol: str = flag(
        "finetune",
        "finetune; or look at the frozen encoder --from, without training it: knn (k = 20, cosine, "
        "temperature 0.07), blocks (knn after every block, to see where features get better or "
        "worse), or linear (a linear layer on batch-normalised features)",
        ("finetune", "linear", "knn", "blocks"),
    )
    model: str | None = flag(None, f"the encoder: {', '.join(mirl.MODELS)}")
    data: str | None = flag(
        None,
        "shapes (embedded), cifar10, cifar100, imagenette (downloaded), or a folder of "
        "train/<class>/ and val/<class>/; to segment or detect, scenes (embedded) or a folder in "
        "the layout of ADE20K or COCO",
    )
    train_images: int | None = flag(
        None,
        "use this many of the training images, drawn by --seed; default all, but for the quick "
        "recipe's shapes 500",
        low=1,
    )
    val_images: int | None = flag(
        None, "use this many of the validation images, the same in every run; default all", low=1
    )
    out: str | None = flag(
        None, "the run's folder; default runs/finetune-<recipe>, or the task's name for finetune"
    )
    layer_decay: float | None = flag(
        None,
        "factor on the learning rate from each layer to the one below it: lower keeps more of what "
        "was pre-trained, nearer 1 suits deeper models, 1 suits training from scratch; imagenet, "
        "ade20k and coco by --model",
        above=0,
        high=1,
    )
    drop_path: float | None = flag(
        None, "rate of stochastic depth in the last block; imagenet by --model", low=0
    )
    randaug: float | None = flag(
        None, "RandAug's magnitude, 0 to 10; 0 turns it off", low=0, high=10
    )
    erasing: float = flag(
        0.0, "probability of random erasing; the released code has 0.25", low=0, high=1
    )
    mixup: float | None = flag(None, "mixup's alpha; 0 turns it off", low=0)
    cutmix: float | None = flag(None, "cutmix's alpha; with mixup too, one of them a batch", low=0)
    label_smoothing: float = flag(
        0.1, "share of each target spread over all classes", low=0, high=1
    )
    ema_decay: float | None = flag(
        None,
        "decay of the moving average of the weights, a step; lower it for runs of few steps; 0 "
        "turns it off",
        low=0,
        high=1,
    )
    pool: str = flag("mean", "the head's input: mean over patches, or cls", ("mean", "cls"))
    head_width: int | None = flag(
        None,
        "channels of what segments or detects; default the encoder's width, or 256 to detect",
        low=8,
    )
    slide: bool = flag(
        False, "evaluate segmentation by windows of --image-size, two thirds of it apart"
    )


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, RECIPES)
    recipe = RECIPES.get(f"{args.recipe}-{args.task}", RECIPES[args.recipe])
    made_for = recipe.get("task", "classify")
    require(
        made_for == args.task,
        f"--recipe {args.recipe} is for --task {made_for}, not {args.task}",
    )
    if args.task != "classify":
        given = [f"--{name}" for name in ("randaug", "mixup", "cutmix") if getattr(args, name)]
        given += ["--erasing"] * bool(args.erasing) + ["--pool"] * (args.pool != "mean")
        given += ["--label-smoothing"] * (args.label_smoothing != 0.1)
        given += [f"--protocol {args.protocol}"] * (args.protocol != "finetune")
        require(not given, f"{', '.join(given)}: this is for --task classify")
        deep = args.model in ("vit_s_54", "vit_b_48")
        args.layer_decay = args.layer_decay or (0.88 if deep else LAYER_DECAY[args.task])
    require(not args.slide or args.task == "segment", "--slide is for --task segment")
    require(
        not args.head_width or args.task != "classify",
        "--head-width is for --task segment or detect",
    )
    for name, value in TABLE_2.get(args.model, TABLE_2["vit_b"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.settle(f"runs/{'finetune' if args.task == 'classify' else args.task}-{args.recipe}")
    for name in ("mixup", "cutmix"):
        value = getattr(args, name) or 0
        require(not 0 < value < 1e-30, f"--{name} {value} is too small: 0 turns it off")
    if args.train_images is None and (args.recipe, args.data) == ("quick", "shapes"):
        args.train_images = 500
    quick = Path("runs/mirl-quick/encoder.pt")
    if args.from_ is None:
        args.from_ = str(quick) if args.recipe == "quick" and quick.exists() else "scratch"
    require(
        sum((args.eval, bool(args.predict), args.protocol != "finetune")) <= 1,
        "--eval, --predict and --protocol exclude each other: give one of them",
    )
    require(
        not (args.eval or args.predict) or args.from_ != "scratch",
        "--eval and --predict need --from, a fine-tuned model",
    )
    return args


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    training = not (args.eval or args.predict) and args.protocol == "finetune"
    with mirl.interruptible(args.out if training else None), mirl.processes(args.device) as device:
        if training:
            mirl.check_out(args.out, args.resume)
        mirl.check_machine(args, device)
        torch.manual_seed(args.seed)  # the same initial weights in every process
        task = TASKS[args.task](args, device)
        if args.predict:
            return predict(task)
        val = task.data("val")
        if args.eval:
            return evaluate_file(task, val)
        train = task.data("train")
        if args.protocol != "finetune":
            return probe(task, train, val)

        vit = new_vit(args, len(val.classes))
        config = vit.config
        model = task.model(vit, len(val.classes), args.head_width).to(device)
        if mirl.syncs_batch_norm(device):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        split = mirl.split_batch(
            len(train.images), args.batch_size, args.device_batch_size, device_limit(config)
        )
        require(
            args.task != "segment" or split.device_batch_size > 1 or mirl.syncs_batch_norm(device),
            "batch norm needs at least 2 images on a device: raise --batch-size or "
            "--device-batch-size",
        )
        transform = task.transform(config, training=True)
        loader = mirl.Loader(train, transform, args.seed, device, args.workers)
        val_loader = task.validation(val, config)

        average = copy.deepcopy(model) if args.ema_decay else None
        models = {"raw": model} | ({"ema": average} if average else {})
        groups = mirl.parameter_groups(
            model, args.lr, args.weight_decay, layer_decay(args.layer_decay, config.depth)
        )
        run = mirl.Run(model, args, groups, (0.9, 0.999), split, train, device, average)
        for epoch in run.epochs():
            batches = loader.epoch(epoch, mirl.shuffled(split, args.seed, epoch).tolist())
            for i, (images, targets) in enumerate(run.timed(batches), start=1):
                # a step is `accumulation` micro-batches; processes average gradients in its last
                last = i % split.accumulation == 0
                run.model.require_backward_grad_sync = last
                losses = task.losses(run.model, images, targets)  # "loss", and its terms
                run.scaler.scale(losses["loss"] / split.accumulation).backward()
                run.note(**losses)
                if last:
                    run.update()
                    if average:
                        mirl.move_average(average, model, ema_decay(args.ema_decay, run.step))
            for scored in models.values():
                mirl.share_buffers(scored)
            found = task.evaluate(list(models.values()), val_loader)
            scores = dict(zip(models, found, strict=True))
            for name, scored in models.items():
                keep_best(run, name, scored, scores[name], task.best)
            if scores["raw"]:
                say("  ".join(f"{n}: {task.best} {s[task.best]:.2f} %" for n, s in scores.items()))
            record = {f"{n}_{k}": v for n, s in scores.items() for k, v in s.items()}
            run.end_epoch(**record, corrupt_files=len(loader.corrupt | val_loader.corrupt))
        say(f"done: {best_model(run, list(models), task.best)}")


def loss_function(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy in float32; a share `smoothing` of each target is spread over all classes."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def keep_best(
    run: mirl.Run, name: str, model: nn.Module, scores: dict[str, float], best: str
) -> None:
    """<name>-last.pt, and <name>-best.pt where this epoch's `best` score is the best so far."""
    if mirl.RANK == 0:
        more = dict(classes=run.classes, epoch=run.epoch, **scores)
        more |= dict(task=run.args.task, head_width=run.args.head_width)
        mirl.save_model(run.out / f"{name}-last.pt", model, **more)
        score, key = scores.get(best, math.nan), f"{name}_{best}"
        if math.isfinite(score) and not any(e.get(key, -1) >= score for e in run.history):
            mirl.save_model(run.out / f"{name}-best.pt", model, **more)


def best_model(run: mirl.Run, names: list[str], best: str) -> str:
    """Which file has the best score of all epochs, the first of equals; or the last weights, where
    nothing was measured."""
    scores = [(e.get(f"{n}_{best}", math.nan), -e["epoch"], n) for e in run.history for n in names]
    scores = [found for found in scores if math.isfinite(found[0])]
    if not scores:
        return str(run.out / "raw-last.pt")
    score, epoch, name = max(scores)
    path = run.out / f"{name}-best.pt"
    return f"the best model is {path}, {best} {score:.2f} % after epoch {-epoch}"


# ------------------------------------------------------------------------------------------------
# The tasks
# ------------------------------------------------------------------------------------------------


class Classification:
    """What --task decides around the loop: data, model, loss, measure, and how a result is told.
    The other tasks have the same methods."""

    best = "top1"  # the score by which the best model is chosen

    def __init__(self, args: Args, device: torch.device):
        self.args, self.device = args, device
        self.dtype = mirl.pick_dtype(args.dtype, device)

    def data(self, split: str) -> mirl.Images:
        """The images of a split, "train" or "val", with their targets."""
        return labelled(self.args, split)

    def model(self, vit: mirl.ViT, classes: int, head_width: int | None) -> nn.Module:
        self.mix = mixing(self.args, classes)
        return vit

    def transform(self, config: mirl.Config, training: bool) -> Callable:
        if training:
            return finetune_transform(config.image_hw, self.args.randaug)
        return mirl.whole_image(config.image_hw)

    def validation(self, data: mirl.Images, config: mirl.Config) -> mirl.Loader:
        """Images as the validation sees them; one that cannot be read counts for nothing."""
        transform = self.transform(config, training=False)
        return mirl.Loader(data, transform, 0, self.device, self.args.workers, keep_labels=False)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """ "loss", to be minimised, and terms of it to be logged, of a batch."""
        images, targets = self.mix(images, labels)  # (B, 3, H, W)
        with mirl.autocast(self.device, self.dtype):
            logits = model(images)  # (B, classes)
        return dict(loss=loss_function(logits, targets, self.args.label_smoothing))

    def evaluate(self, models: list[nn.Module], loader: mirl.Loader) -> list[dict[str, float]]:
        """The scores of each model, in percent, over all processes."""
        return evaluate(models, loader, self.dtype)

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> Tensor | None:
        """Print what the model makes of an image, uint8 (3, h, w); a picture of it, if there is
        one, uint8 (3, ·, ·)."""
        x = mirl.normalise_images(self.transform(model.config, training=False)(image))
        probabilities = model(x[None].to(self.device))[0].softmax(dim=0)
        top = probabilities.topk(min(5, len(classes)))
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            say(f"  {100 * p:5.1f} %  {classes[i]}")


class Segmentation(Classification):
    """UperNet, and the mean IoU of its classes. [S A.2]"""

    best = "miou"

    def data(self, split: str) -> mirl.Images:
        args = self.args
        return chosen(args, load_dense(args.task, args.data, args.data_dir, split), split)

    def model(self, vit: mirl.ViT, classes: int, head_width: int | None) -> nn.Module:
        return mirl.UperNet(vit, classes, head_width)

    def transform(self, config: mirl.Config, training: bool) -> Callable:
        return segment_transform(min(config.image_hw), training)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with mirl.autocast(self.device, self.dtype):
            out = model(images)  # of (B, classes, H, W)
        return dict(loss=mirl.segmentation_loss(out, labels.long()))

    def window(self, config: mirl.Config) -> tuple[int, int] | None:
        """Size and stride of --slide, 512 and 341 for images of 512."""
        size = min(config.image_hw)
        return (size, size * 2 // 3) if self.args.slide else None

    def evaluate(self, models: list[nn.Module], loader: mirl.Loader) -> list[dict[str, float]]:
        return evaluate_segments(models, loader, self.dtype, self.window(models[0].config))

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> Tensor:
        x = mirl.normalise_images(self.transform(model.config, training=False)(image))
        x, size = x[None].to(self.device), image.shape[1:]
        with mirl.autocast(self.device, self.dtype):
            logits = segment(model, x, size, self.window(model.config))  # (1, classes, h, w)
        labels = logits.argmax(dim=1)[0].cpu()
        for k in labels.unique().tolist():
            say(f"  {100 * (labels == k).float().mean():5.1f} %  {classes[k]}")
        return picture(image, labels, classes)


class Detection(Segmentation):
    """Mask R-CNN, and COCO's average precision of its masks. [S A.2]"""

    best = "mask_ap"

    def model(self, vit: mirl.ViT, classes: int, head_width: int | None) -> nn.Module:
        mirl.require_extra("pycocotools", "--eval of detection", self.args.eval)
        self.measured = importlib.util.find_spec("pycocotools") is not None
        if not (self.args.predict or self.measured):
            say("the losses are all that is measured: AP needs pip install -e '.[coco]'")
        size = min(vit.config.image_hw)
        more = dict(longest=size * 5 // 3, width=head_width or 256, dtype=self.dtype)
        if size > mirl.SMALL:  # for 800 pixels one of 480, 512, …, 800, at most 1333 long
            more["sizes"] = tuple(range(size, size * 3 // 5 - 1, -32))[::-1]
        else:  # fewer boxes than torchvision's, which are for large images
            more |= dict(sizes=(size,), box_batch_size_per_image=64)
            more |= dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100)
        return mirl.mask_rcnn(vit, 1 + classes, **more)

    def transform(self, config: mirl.Config, training: bool) -> Callable:
        return detect_transform(training)

    def losses(self, model: nn.Module, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        terms = model(list(images), targets)
        return dict(loss=sum(terms.values()), **terms)

    def evaluate(self, models: list[nn.Module], loader: mirl.Loader) -> list[dict[str, float]]:
        if not self.measured:
            return [{} for _ in models]
        return evaluate_objects(models, loader)

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> Tensor:
        found = model([mirl.normalise_images(image.to(self.device))])[0]
        found = {k: v[found["scores"] > 0.5].cpu() for k, v in found.items()}
        for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
            corners = ", ".join(f"{x:.0f}" for x in box)
            say(f"  {100 * score:5.1f} %  {classes[label - 1]} at ({corners})")
        return picture(image, found, classes)


TASKS = dict(classify=Classification, segment=Segmentation, detect=Detection)


# ------------------------------------------------------------------------------------------------
# Layer-wise learning rates, moving average
# ------------------------------------------------------------------------------------------------


def layer_of(name: str, depth: int) -> int:
    """The layer that layer-wise lr decay counts a parameter to: 0 for the class token and patch
    embedding, k + 1 for block k, depth + 1 for the rest, also where the ViT is part of a model.
    [S A.1]"""
    name = name.rpartition("vit.")[2]
    if name.startswith(("cls_token", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def layer_decay(decay: float, depth: int) -> Callable[[str], float]:
    """The factor on a parameter's learning rate in layer l: decay^(depth + 1 − l). [S A.1]"""
    return lambda name: decay ** (depth + 1 - layer_of(name, depth))


def ema_decay(decay: float, step: int) -> float:
    """The moving average's decay after step 1, 2, …: min(decay, (1 + t)/(10 + t)) with
    t = step − 1, to forget the start. [R]"""
    return min(decay, step / (9 + step))


# ------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------


def random_sign(strength: float) -> float:
    return strength if torch.rand(()) < 0.5 else -strength


def move(image: Tensor, angle=0.0, right=0.0, down=0.0, shear_x=0.0, shear_y=0.0) -> Tensor:
    """Turn (degrees), shift (shares of the sides) or shear (tangents); the corners become grey."""
    shift = [int(right * image.shape[2]), int(down * image.shape[1])]
    shear = [math.degrees(math.atan(t)) for t in (shear_x, shear_y)]
    return TF.affine(image, angle, shift, 1.0, shear, InterpolationMode.BILINEAR, GREY)


# What each operation of RandAug does to x, uint8 (3, H, W), at strength s in [0, 1]: more is
# stronger. [R]
AUGMENTATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "autocontrast": lambda x, s: TF.autocontrast(x),
    "equalize": lambda x, s: TF.equalize(x),
    "invert": lambda x, s: TF.invert(x),
    "rotate": lambda x, s: move(x, angle=30 * random_sign(s)),
    "posterize": lambda x, s: TF.posterize(x, max(1, 4 - int(4 * s))),  # no bits would be black
    "solarize": lambda x, s: torch.where(x.int() >= 256 - int(256 * s), 255 - x, x),
    "solarize_add": lambda x, s: torch.where(x < 128, x + int(110 * s), x),
    "color": lambda x, s: TF.adjust_saturation(x, 1 + 0.9 * random_sign(s)),
    "contrast": lambda x, s: TF.adjust_contrast(x, 1 + 0.9 * random_sign(s)),
    "brightness": lambda x, s: TF.adjust_brightness(x, 1 + 0.9 * random_sign(s)),
    "sharpness": lambda x, s: TF.adjust_sharpness(x, 1 + 0.9 * random_sign(s)),
    "shear_x": lambda x, s: move(x, shear_x=0.3 * random_sign(s)),
    "shear_y": lambda x, s: move(x, shear_y=0.3 * random_sign(s)),
    "translate_x": lambda x, s: move(x, right=0.45 * random_sign(s)),
    "translate_y": lambda x, s: move(x, down=0.45 * random_sign(s)),
}


class RandAugment(nn.Module):
    """RandAug (magnitude, 0.5) as the paper's recipe means it. [S A.1, Table 2]

    Two operations an image, each applied with probability 1/2, at a magnitude drawn from
    N(magnitude, 0.5) on a scale of 0 to 10. It is not torchvision's RandAugment(2, 9), where 9 is
    one of 31 bins, about 30 %, and both operations always apply. Takes and returns uint8 (3, H, W);
    random numbers come from torch's global generator.
    """

    def __init__(self, magnitude: float):
        super().__init__()
        self.magnitude = magnitude

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(2):
            name = list(AUGMENTATIONS)[torch.randint(len(AUGMENTATIONS), ()).item()]
            if torch.rand(()) < 0.5:
                drawn = self.magnitude + 0.5 * torch.randn(()).item()
                image = AUGMENTATIONS[name](image, min(max(drawn / 10, 0.0), 1.0))
        return image


def finetune_transform(size: tuple[int, int], randaug: float) -> Callable[[Tensor], Tensor]:
    """[S A.1, Table 2]: crop, flip, RandAug of this magnitude (0: none); uint8 (3, h, w) ->
    uint8 (3, *size).

    The crop is random and resized (area 0.08 to 1); for sizes up to 64 the whole image, padded by
    an eighth and cropped at random.
    """
    crop = [v2.RandomResizedCrop(size, interpolation=mirl.BICUBIC, antialias=True)]
    if min(size) <= mirl.SMALL:
        padding = [size[1] // 8, size[0] // 8]
        crop = [mirl.whole_image(size), v2.RandomCrop(size, padding=padding)]
    augment = RandAugment(randaug) if randaug else v2.Identity()
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), augment])


def mixing(args: Args, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) -> (images, targets), on the device: random erasing by pixel noise, image by
    image [R]; then mixup or cutmix, with probability 1/2 each and one λ a batch. [S A.1]"""
    erase = v2.RandomErasing(args.erasing, value="random")
    kinds = ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    mix = v2.RandomChoice(choices) if choices else v2.Identity()

    def both(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if args.erasing:
            images = torch.stack([erase(image) for image in images])
        return mix(images, labels)

    return both


# ------------------------------------------------------------------------------------------------
# Data and models
# ------------------------------------------------------------------------------------------------


def labelled(args: Args, split: str) -> mirl.Images:
    """The images of a data set that have labels. Raises UserError where there are none."""
    data = mirl.load_data(args.data, args.data_dir, split)
    keep = (data.labels >= 0).nonzero()[:, 0]
    require(
        len(keep),
        f"--data {args.data}: the {split} images have no labels; they come from the folders "
        "train/<class>/ and val/<class>/",
    )
    left = len(data.images) - len(keep)
    if left:
        say(
            f"warning: {left} of the {split} images are in no folder of a class in train/: left out"
        )
        data = data.select(keep)
    return chosen(args, data, split)


def chosen(args: Args, data: mirl.Images, split: str) -> mirl.Images:
    """As many of the images as --train-images or --val-images say, drawn at random, or all."""
    wanted = dict(train=args.train_images, val=args.val_images)[split]
    if wanted is None:
        return data
    require(wanted <= len(data.images), f"--{split}-images {wanted}: there are {len(data.images)}")
    seed = mirl.seed_of("images", args.seed if split == "train" else 0)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    return data.select(order[:wanted])


def new_vit(args: Args, classes: int) -> mirl.ViT:
    names = ("image_size", "patch_size", "pool", "drop_path")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.task != "classify":
        given["pool"] = "none"
    vit = mirl.build_vit(args.model, **given, num_classes=classes)
    if args.protocol == "finetune" and args.resume and (Path(args.out) / "checkpoint.pt").exists():
        return vit  # its weights are in the checkpoint
    if args.from_ == "scratch":
        say("from scratch: all weights at random")
    else:
        mirl.load_encoder(vit, args.from_, args.truncated)
    return vit


def finetuned_model(task: Classification) -> tuple[nn.Module, list[str] | None]:
    """The model in --from, on the device, and its classes' names: one that this script saved, or
    what `classifier` makes of a file without a configuration and names, and None."""
    path = task.args.from_
    saved = mirl.load_file(path)
    if task.args.task == "classify" and not saved.keys() & {"config", "classes"}:
        vit = classifier(mirl.named_tensors(saved), task.args.model, path)
        return vit.to(task.device).eval(), None
    if "history" in saved and isinstance(saved.get("args"), dict):  # a checkpoint, with its flags
        saved |= {k: v for k, v in saved["args"].items() if k in ("task", "head_width")}
    kind = saved.get("task", "classify") if "classes" in saved else task.args.task
    require(kind == task.args.task, f"--from {path} is a model to {kind}: add --task {kind}")
    try:
        classes = saved["classes"]
        vit = mirl.ViT(mirl.Config(**saved["config"]))
        model = task.model(vit, len(classes), saved.get("head_width"))
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"--from {path} is no model that this script fine-tuned") from None
    return model.to(task.device).eval(), classes


def classifier(weights: dict[str, Tensor], name: str, path: str) -> mirl.ViT:
    """The classifier with these weights, under timm's names: a fine-tuned ViT of the authors, MAE
    or timm.

    Sizes and pooling follow from names and shapes, the heads from the model `name`. Raises
    UserError for other weights, or where that model is of another depth or width.
    """
    require("head.weight" in weights, f"--from {path} is no fine-tuned model: it has no head")
    shape, named = mirl.encoder_shape(weights, path), mirl.model_config(name)
    require(
        (shape["depth"], shape["width"]) == (named.depth, named.width),
        f"--from {path} has {shape['depth']} blocks of width {shape['width']}, and --model {name} "
        f"has {named.depth} of {named.width}: give the --model that it is",
    )
    pool = "mean" if "fc_norm.weight" in weights else "cls"
    model = mirl.build_vit(name, **shape, num_classes=len(weights["head.weight"]), pool=pool)
    found = mirl.misfits(weights, model.state_dict())
    require(not found, f"--from {path} is no plain ViT: {found}")
    model.load_state_dict(weights)
    return model


def device_limit(config: mirl.Config) -> int:
    """Images on a device at a time, unless told otherwise."""
    return max(1, 128 * 196 // config.num_patches)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def every_image(models: list[nn.Module], loader: mirl.Loader) -> Iterator:
    """This process's batches of all images, each once over all processes, for models that are to
    be evaluated. (Call their `forward`: by `__call__`, torch.compile would compile once more.)"""
    for model in models:
        model.eval()
    batch = device_limit(models[0].config)
    return loader.epoch(0, mirl.in_order(len(loader.data.images), batch))


@torch.no_grad()
def outputs(models: list[nn.Module], loader: mirl.Loader, dtype: torch.dtype) -> Iterator:
    """What each model makes of `every_image`, float32 (b, ·), and the labels, batch by batch.

    The label of an image that cannot be read is −1.
    """
    for images, labels in every_image(models, loader):
        with mirl.autocast(images.device, dtype):
            out = [model.forward(images) for model in models]
        yield [x.float() for x in out], labels


def evaluate(
    models: list[mirl.ViT], loader: mirl.Loader, dtype: torch.dtype
) -> list[dict[str, float]]:
    """Each model's top-1 and top-5 in percent and mean cross-entropy; an image counts once."""
    mine = torch.zeros(len(models), 4, device=loader.device)
    for logits, labels in outputs(models, loader, dtype):
        mine += torch.stack([score(x, labels) for x in logits])
    totals = sum(mirl.gather(mine.cpu().double()))
    return [
        dict(top1=100 * top1 / n, top5=100 * top5 / n, val_loss=loss / n, val_images=int(n))
        for top1, top5, loss, n in totals.tolist()
    ]


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images with a label: first guess right, one of five right, cross-entropy, 1."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, (labels >= 0).sum()])


def evaluate_file(task: Classification, val: mirl.Images) -> None:
    """Print the scores of the fine-tuned model --from."""
    model, classes = finetuned_model(task)
    path, data, known = task.args.from_, task.args.data, model.config.num_classes
    require(classes in (None, val.classes), f"--from {path} knows other classes than --data {data}")
    require(
        known == len(val.classes),
        f"--from {path} knows {known} classes, and --data {data} has {len(val.classes)}",
    )
    say(json.dumps(task.evaluate([model], task.validation(val, model.config))[0]))


@torch.no_grad()
def predict(task: Classification) -> None:
    """Print what the fine-tuned model --from sees in every image, and draw it where it can be."""
    images = mirl.read_images("--predict", task.args.predict)
    names = {Path(path).stem for path in task.args.predict}
    require(
        len(names) == len(images) or task.args.task == "classify",
        "--predict: two of the files have one name, and so would their pictures: give them apart",
    )
    model, classes = finetuned_model(task)
    if classes is None:
        imagenet = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
        count = model.config.num_classes
        classes = imagenet if count == len(imagenet) else [f"class {i}" for i in range(count)]
    for path, image in zip(task.args.predict, images, strict=True):
        say(path)
        drawn = task.tell(model, classes, image)
        if drawn is not None and mirl.RANK == 0:
            out = Path(task.args.out) / f"{Path(path).stem}-{task.args.task}.png"
            out.parent.mkdir(parents=True, exist_ok=True)
            mirl.save(out, functools.partial(save_image, drawn / 255))
            say(f"  drawn: {out}")


def knn_scores(train: Tensor, labels: Tensor, val: Tensor, classes: int) -> Tensor:
    """Votes (m, classes) of the 20 nearest training features for each validation feature.

    train: float (n, D), val: float (m, D). A vote weighs exp(cosine / 0.07).
    """
    train, val = F.normalize(train, dim=1), F.normalize(val, dim=1)
    votes = val.new_zeros(len(val), classes)
    for chunk, out in zip(val.split(1024), votes.split(1024), strict=True):
        near, which = (chunk @ train.T).topk(min(20, len(train)), dim=1)
        out.scatter_add_(1, labels[which], (near / 0.07).exp())
    return votes


def linear_scores(train: Tensor, labels: Tensor, val: Tensor, classes: int, seed: int) -> Tensor:
    """Logits (m, classes) of a linear probe: batch norm without affine, then a linear layer.

    It is trained on train, float (n, D), for 100 epochs of batches of 256 and at least 1,000 steps,
    and asked about val, float (m, D).
    """
    torch.manual_seed(seed)
    probe = nn.Sequential(
        nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6), nn.Linear(train.shape[1], classes)
    ).to(train.device)
    size = min(256, len(train))
    steps = len(train) // size
    epochs = max(100, math.ceil(1000 / steps))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.01, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(train))[: steps * size].view(steps, size).to(train.device):
            F.cross_entropy(probe(train[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        return probe.eval()(val)


class EveryBlock(nn.Module):
    """The pooled features of a ViT after each of its blocks: images -> (B, depth, D).

    The mean over the patches, normed as the head's input is; with the pool "mean" the last are what
    `knn` looks at.
    """

    def __init__(self, vit: mirl.ViT):
        super().__init__()
        self.vit, self.config = vit, vit.config

    def forward(self, images: Tensor) -> Tensor:
        pooled = torch.stack([x[:, 1:].mean(dim=1) for x in self.vit.each_block(images)], dim=1)
        return self.vit.fc_norm(pooled) if self.config.pool == "mean" else pooled


def features(task: Classification, model: nn.Module, data: mirl.Images) -> tuple[Tensor, Tensor]:
    """What the model makes of all the images that can be read, float (n, ·), and their labels."""
    mine = []
    for [x], labels in outputs([model], task.validation(data, model.config), task.dtype):
        known = labels >= 0
        mine.append((x[known].cpu(), labels[known].cpu()))
    batches = itertools.chain(*mirl.gather(mine))  # of all processes
    x, labels = (torch.cat(parts).to(task.device) for parts in zip(*batches, strict=True))
    return x, labels


def probe(task: Classification, train: mirl.Images, val: mirl.Images) -> None:
    """Print how well a frozen encoder's features, the head's input or those of every block, tell
    the classes apart."""
    args, device = task.args, task.device
    model = new_vit(args, len(val.classes)).to(device)
    model.head = nn.Identity()
    if args.protocol == "blocks":
        model = EveryBlock(model)
    x, labels = features(task, model, train)  # (n, D), or (n, depth, D) of every block
    queries, truth = features(task, model, val)
    require(len(x) > 1, f"--protocol {args.protocol} needs at least 2 training images")

    def accuracy(x: Tensor, queries: Tensor) -> tuple[float, float]:  # (n, D), (m, D)
        """Top-1 and top-5 in percent."""
        if args.protocol == "linear":
            scores = linear_scores(x, labels, queries, len(val.classes), args.seed)
        else:
            scores = knn_scores(x, labels, queries, len(val.classes))
        top1, top5, _, n = score(scores, truth).tolist()
        return 100 * top1 / n, 100 * top5 / n

    if args.protocol == "blocks":
        top1, top5 = zip(*map(accuracy, x.unbind(1), queries.unbind(1)), strict=True)
    else:
        top1, top5 = accuracy(x, queries)
    counts = dict(train_images=len(x), val_images=len(queries))
    say(json.dumps(dict(protocol=args.protocol, top1=top1, top5=top5, **counts)))


# ------------------------------------------------------------------------------------------------
# Segmentation and detection: data
# ------------------------------------------------------------------------------------------------

IGNORED = 255  # the label of pixels that count for nothing
SCENES = dict(train=(512, 2), val=(256, 3))  # images and seed


class LabelMaps(mirl.Images):
    """Images and a label for each of their pixels, in ADE20K's layout.

    `images` are names below <root>/images, `labels` names below <root>/annotations.
    """

    def name(self, i: int) -> str:
        return os.path.join(self.root, "images", self.images[i]) + " or its annotation"

    def read(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask] | None:
        """Image i, uint8 (3, h, w), and labels, uint8 (h, w); None where one cannot be read.

        The file's labels 1 … K become 0 … K − 1, its 0 ("other") becomes 255 and 255 stays. Raises
        UserError for other labels, or a map of another size.
        """
        path = os.path.join(self.root, "annotations", self.labels[i])
        image = mirl.read_image(os.path.join(self.root, "images", self.images[i]))
        try:
            with Image.open(path) as file:
                labels = TF.pil_to_tensor(file).long()
        except Exception:  # PIL raises nearly anything on a broken file
            return None
        if image is None:
            return None
        require(
            labels.shape == (1, *image.shape[1:]),
            f"{path} is no map of one label for each pixel of its image: it is "
            f"{tuple(labels.shape)}, the image {tuple(image.shape)}",
        )
        ignored = (labels == 0) | (labels == IGNORED)
        wrong = labels[(labels > len(self.classes)) & ~ignored]
        require(
            not len(wrong),
            f"{path} has the label {wrong[:1].tolist()}: the classes are 1 to {len(self.classes)}, "
            f"and 0 or {IGNORED} for pixels that count for nothing",
        )
        labels = (labels[0] - 1).masked_fill(ignored[0], IGNORED).to(torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(labels)


class Objects(mirl.Images):
    """Images and the objects on them, in COCO's layout.

    `images` are names of files in `root`. `labels` are JSON, the image's id and [label, box,
    segmentation] for each object, which is read when it is needed: as Python's objects, COCO's
    860,000 would fill gigabytes in every worker process.
    """

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.images[i]) + " or its annotation"

    def read(self, i: int) -> tuple[tv_tensors.Image, dict] | None:
        """Image i, uint8 (3, h, w), and its n objects; None where one cannot be read.

        The objects: boxes float32 (n, 4) as corners x, y, x, y, masks uint8 (n, h, w), labels int64
        (n,) from 1, image_id int. Those whose box is narrower than a pixel are left out.
        """
        image = mirl.read_image(os.path.join(self.root, self.images[i]))
        if image is None:
            return None
        h, w = image.shape[1:]
        image_id, objects = json.loads(self.labels[i])
        try:
            boxes = torch.tensor([box for _, box, _ in objects]).float().view(-1, 4)
            masks = torch.zeros(len(boxes), h, w, dtype=torch.uint8)
            for mask, (_, _, segmentation) in zip(masks, objects, strict=True):
                mask.copy_(draw_mask(segmentation, h, w))
        except Exception:  # a segmentation may be wrong in any way
            return None
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), (h, w))
        wide = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes[wide], format="XYXY", canvas_size=(h, w)),
            masks=tv_tensors.Mask(masks[wide]),
            labels=torch.tensor([label for label, _, _ in objects], dtype=torch.int64)[wide],
            image_id=image_id,
        )
        return tv_tensors.Image(image), target


def draw_mask(segmentation: list | dict, h: int, w: int) -> Tensor:
    """COCO's segmentation of an object as a mask of 0 and 1, uint8 (h, w).

    A list of polygons [x, y, x, y, …]; or run lengths, column by column, beginning with zeros, as
    numbers or packed into a string.
    """
    if isinstance(segmentation, list):
        # PIL fills every pixel that a polygon touches, COCO those whose centre is inside: so five
        # times as large, and of each 5 × 5 the central one (at ½ for COCO and at 0 for PIL)
        canvas = Image.new("L", (5 * w, 5 * h))
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon([5 * x - 0.5 for x in polygon], fill=1)
        return TF.pil_to_tensor(canvas.resize((w, h), Image.Resampling.NEAREST))[0]
    if isinstance(segmentation["counts"], str):
        from pycocotools import mask

        return torch.from_numpy(mask.decode(segmentation))
    lengths = torch.tensor(segmentation["counts"])
    values = torch.arange(len(lengths)).remainder(2).to(torch.uint8)
    return values.repeat_interleave(lengths).view(w, h).T


def run_lengths(mask: Tensor) -> list[int]:
    """A mask (h, w) as the lengths of its runs of zeros and ones, as `draw_mask` takes them."""
    values, lengths = mask.T.flatten().unique_consecutive(return_counts=True)
    runs = lengths.tolist()
    return [0, *runs] if values[0] else runs  # zeros come first, be they none


def load_dense(task: str, name: str, data_dir: str, split: str) -> LabelMaps | Objects:
    """The data of --task "segment" or "detect" by the name given to --data; split: "train" or
    "val".

    `scenes` are written into `data_dir` at first use; anything else is a folder. Raises UserError
    for what cannot be had.
    """
    root = Path(name)
    if name == "scenes":
        root = Path(data_dir) / "scenes"
        with mirl.rank_zero_first():
            if not root.exists():
                write_scenes(root)
    require(root.is_dir(), f"--data {name}: there is no such folder (and the name is scenes)")
    return load_label_maps(root, split) if task == "segment" else load_objects(root, split)


def load_label_maps(root: Path, split: str) -> LabelMaps:
    """ADE20K's layout: images/{training,validation}/*.jpg and annotations/…/*.png.

    The classes' names are the lines of classes.txt or the last column of ADE20K's own
    objectInfo150.txt; where there is neither, there are 150 classes. Raises UserError where images
    and annotations do not belong together.
    """
    part = dict(train="training", val="validation")[split]
    images, maps = root / "images" / part, root / "annotations" / part
    image_of = {os.path.splitext(name)[0]: name for name in mirl.files_in(images)}
    map_of = {os.path.splitext(name)[0]: name for name in mirl.files_in(maps, (".png",))}
    require(image_of, f"--data {root}: {images} holds no images")
    lone = sorted(image_of.keys() - map_of.keys())
    require(not lone, f"--data {root}: {maps} has no annotation {lone[:1]} for an image (.png)")
    lone = sorted(map_of.keys() - image_of.keys())
    require(not lone, f"--data {root}: {images} has no image {lone[:1]} for an annotation")
    classes = [f"class {k}" for k in range(1, 151)]
    for path in (root / "classes.txt", root / "objectInfo150.txt"):
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            classes = [x.split("\t")[-1].strip() for x in lines if not x.startswith("Idx\t")]
            require(0 < len(classes) < IGNORED, f"{path} must name 1 to {IGNORED - 1} classes")
            break
    images = mirl.Names(os.path.join(part, image_of[stem]) for stem in image_of)
    labels = mirl.Names(os.path.join(part, map_of[stem]) for stem in image_of)
    return LabelMaps(images, labels, classes, str(root))


def annotation_file(folder: str | Path) -> Path:
    """Where COCO's layout has the annotations of the images in this folder, `Objects.root`."""
    folder = Path(folder)
    return folder.parent / "annotations" / f"instances_{folder.name}.json"


def load_objects(root: Path, split: str) -> Objects:
    """COCO's layout: {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json.

    Categories become the labels 1 … K in the order of their ids. Crowds are no objects. Training
    images without any annotation are left out (117,266 of COCO's stay), and images that the file
    does not list. Raises UserError for a file that is not COCO's, or names an image or category
    that is not there.
    """
    folder = root / f"{split}2017"
    file = annotation_file(folder)
    require(file.is_file(), f"--data {root}: there is no {file}")
    try:
        content = json.loads(file.read_bytes())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        kinds = {kind["id"]: kind["name"] for kind in content["categories"]}
        label_of = {kind: label for label, kind in enumerate(sorted(kinds), start=1)}
        found = content["annotations"]
        unlisted = dict(
            image={x["image_id"] for x in found} - names.keys(),
            category={x["category_id"] for x in found} - kinds.keys(),
        )
        missing = sorted(set(names.values()) - set(mirl.files_in(folder)))
        # height, width and area are for its evaluation
        sized = all(image["height"] and image["width"] for image in content["images"])
        drawn = all(x["bbox"] and x["segmentation"] and x["area"] >= 0 for x in found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no file of COCO's instances ({error!r:.80})") from None
    require(kinds and names, f"{file} names no images, or no categories")
    require(sized and drawn, f"{file} has an image without size or an object without segmentation")
    for what, ids in unlisted.items():
        require(not ids, f"{file} has annotations of {what} {[*ids][:1]}, which it does not list")
    masks = (x["segmentation"] for x in found)
    packed = any(isinstance(x, dict) and isinstance(x.get("counts"), str) for x in masks)
    mirl.require_extra("pycocotools", f"{file}, with compressed masks,", packed)
    require(not missing, f"{file} annotates the image {missing[:1]}, which is not in {folder}")
    objects: dict[int, list] = {}
    for x in found:
        own = objects.setdefault(x["image_id"], [])
        if not x.get("iscrowd"):
            own.append([label_of[x["category_id"]], x["bbox"], x["segmentation"]])
    del content, found  # of COCO, gigabytes
    used = [image for image in names if split == "val" or image in objects]
    require(used, f"{file} has no annotation of any image")
    if split == "val":  # the evaluation reads the file itself
        objects = {}
    labels = mirl.Names(json.dumps([image, objects.get(image, [])]) for image in used)
    classes = [kinds[kind] for kind in label_of]
    return Objects(mirl.Names(names[image] for image in used), labels, classes, str(folder))


def write_scenes(folder: Path) -> None:
    """Write 512 training and 256 validation scenes of `mirl.make_scenes` in both layouts.

    For segmentation the background is a class too. The folder appears when it is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "scenes"
        for split, part in (("train", "training"), ("val", "validation")):
            scenes = mirl.make_scenes(*SCENES[split])
            folders = [whole / x for x in (f"images/{part}", f"{split}2017", f"annotations/{part}")]
            for path in folders:
                path.mkdir(parents=True)
            images, annotations = [], []
            for i, (image, instances, kinds) in enumerate(zip(*scenes, strict=True), start=1):
                label_of = torch.cat([torch.tensor([1]), kinds + 2]).to(torch.uint8)
                pictures = image, image, label_of[instances.int()]
                for path, picture in zip(folders, pictures, strict=True):
                    TF.to_pil_image(picture).save(path / f"{i:05d}.png")
                images.append(dict(id=i, file_name=f"{i:05d}.png", height=64, width=64))
                for k in (kinds >= 0).nonzero().flatten().tolist():
                    ids = dict(id=len(annotations) + 1, image_id=i, category_id=int(kinds[k]) + 1)
                    annotations.append(annotation(instances == k + 1) | ids)
            categories = [dict(id=k, name=name) for k, name in enumerate(mirl.SHAPES, start=1)]
            content = dict(images=images, annotations=annotations, categories=categories)
            annotation_file(whole / f"{split}2017").write_text(json.dumps(content))
        (whole / "classes.txt").write_text("\n".join(("background", *mirl.SHAPES)) + "\n")
        if not folder.exists():  # another run may have been faster
            whole.rename(folder)


def annotation(mask: Tensor) -> dict:
    """What COCO's files say about an object's mask, bool (h, w)."""
    y, x = mask.nonzero().T
    left, top = int(x.min()), int(y.min())
    return dict(
        bbox=[left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top],
        segmentation=dict(size=list(mask.shape), counts=run_lengths(mask)),
        area=len(x),
        iscrowd=0,
    )


class VariedCrop(v2.RandomCrop):
    """A random crop, drawn anew up to ten times while one class covers over 75 % of its labels.

    What is missing of smaller images is of the mean colour, and ignored.
    """

    def __init__(self, size: int):
        fill = {tv_tensors.Image: GREY, tv_tensors.Mask: IGNORED}
        super().__init__(size, pad_if_needed=True, fill=fill)

    def make_params(self, flat_inputs: list) -> dict:
        labels = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))
        for _ in range(11):
            params = super().make_params(flat_inputs)
            counts = self.transform(labels, params).flatten().bincount(minlength=256)[:IGNORED]
            if counts.max() <= 0.75 * counts.sum() > 0:
                break
        return params


def segment_transform(size: int, training: bool) -> Callable:
    """(image, labels), uint8 (3, h, w) and (h, w) -> the same, moved alike. [S A.2, BEiT]

    In training the short side is resized to `size` times a draw from [0.5, 2], but for sizes up to
    64 to `size`; then a crop of size × size, a flip, and changes of brightness, contrast,
    saturation and hue, each with probability 1/2. In validation the image's short side becomes
    `size`, but the long one at most four times that, and the labels stay.
    """
    if not training:
        # of two plain tensors v2 takes the first for the image, and leaves the other alone
        return v2.Compose([v2.ToPureTensor(), v2.Resize(size, max_size=4 * size)])
    scale = v2.Resize(size)
    if size > mirl.SMALL:
        scale = v2.RandomShortestSize(range(size // 2, 2 * size + 1), max_size=8 * size)
    strengths = dict(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.1)
    distortion = [v2.RandomApply([v2.ColorJitter(**{k: s})]) for k, s in strengths.items()]
    moves = [scale, VariedCrop(size), v2.RandomHorizontalFlip()]
    return v2.Compose([*moves, *distortion, v2.ToPureTensor()])


def detect_transform(training: bool) -> Callable:
    """(image, objects) -> the same, in training flipped at random; torchvision's model resizes."""
    flip = v2.RandomHorizontalFlip() if training else v2.Identity()
    return v2.Compose([flip, v2.ToPureTensor()])


# ------------------------------------------------------------------------------------------------
# Segmentation and detection: measures
# ------------------------------------------------------------------------------------------------


def confusion(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (rows) are taken for which (columns), int64 (C, C).

    prediction: int64, labels: integers of the same shape; those of 255 do not count. It is made
    without waiting for the device, which torch.bincount would do.
    """
    labels = labels.long()
    cells = torch.where(labels == IGNORED, classes**2, labels * classes + prediction).flatten()
    counts = cells.new_zeros(classes**2 + 1).scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].view(classes, classes)


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """Means over the classes of IoU and of accuracy, and the pixels' accuracy, in percent.

    matrix: as `confusion` makes it. A class that is nowhere does not count.
    """
    matrix = matrix.double()
    hits, truth, found = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    scores = dict(
        miou=(hits / (truth + found - hits)).nanmean(),
        macc=(hits / truth).nanmean(),
        aacc=hits.sum() / truth.sum(),
    )
    return {name: 100 * score.item() for name, score in scores.items()}


def whole(model: Callable, images: Tensor) -> Tensor:
    """Logits (B, classes, H, W) of images (B, 3, H, W), padded with zeros, ImageNet's mean, to
    sides that `Pyramid` takes, multiples of 32."""
    h, w = images.shape[2:]
    return model(F.pad(images, (0, -w % 32, 0, -h % 32)))[:, :, :h, :w]


def slide(model: Callable, images: Tensor, size: int, stride: int) -> Tensor:
    """Logits (B, classes, H, W): the mean over windows of `size` that cover images (B, 3, H, W).

    The last window of a row or column ends at the edge, as in mmsegmentation.
    """

    def starts(length: int) -> list[int]:
        last = max(length - size, 0)
        return [min(start, last) for start in range(0, last + stride, stride)]

    h, w = images.shape[2:]
    total, windows = 0, images.new_zeros(h, w)
    for top in starts(h):
        for left in starts(w):
            window = images[:, :, top : top + size, left : left + size]
            y, x = window.shape[2:]
            logits = whole(model, window).float()
            total = total + F.pad(logits, (left, w - left - x, top, h - top - y))
            windows[top : top + y, left : left + x] += 1
    return total / windows


def segment(
    model: Callable, images: Tensor, size: tuple[int, int], window: tuple[int, int] | None = None
) -> Tensor:
    """Logits float32 (B, classes, *size) of images (B, 3, H, W), seen whole or, with a window's
    size and stride, by `slide`."""
    logits = slide(model, images, *window) if window else whole(model, images)
    return mirl.resize_maps(logits.float(), size)


@torch.no_grad()
def evaluate_segments(
    models: list[nn.Module],
    loader: mirl.Loader,
    dtype: torch.dtype,
    window: tuple[int, int] | None = None,
) -> list[dict[str, float]]:
    """Each model's `segmentation_scores`, at the labels' own size; an image counts once.

    models: images (B, 3, H, W) -> logits (B, classes, H, W). window: as `segment` takes it.
    """
    classes = len(loader.data.classes)
    matrices = torch.zeros(len(models), classes, classes, dtype=torch.int64, device=loader.device)
    for images, labels in every_image(models, loader):
        for image, truth in zip(images, labels, strict=True):  # singly: logits are large
            if truth is None:
                continue
            for model, matrix in zip(models, matrices, strict=True):
                with mirl.autocast(loader.device, dtype):
                    logits = segment(model.forward, image[None], truth.shape, window)
                matrix += confusion(logits.argmax(dim=1)[0], truth, classes)
    totals = sum(mirl.gather(matrices.cpu()))
    return [segmentation_scores(matrix) for matrix in totals]


def detections(image_id: int, output: dict[str, Tensor]) -> dict:
    """What torchvision's model found on an image, as plain values, masks as pycocotools packs them.

    output: boxes float (n, 4), scores (n,), labels int64 (n,), masks float (n, 1, h, w) in [0, 1].
    """
    from pycocotools import mask

    masks = (output["masks"][:, 0] > 0.5).permute(1, 2, 0).byte().cpu().numpy()  # (h, w, n)
    plain = {name: output[name].tolist() for name in ("boxes", "scores", "labels")}
    return dict(image_id=image_id, **plain, masks=mask.encode(np.asfortranarray(masks)))


def coco_scores(found: list[dict], file: str | Path) -> dict[str, float]:
    """COCO's average precision of boxes and masks, in percent, over the images in `found`.

    found: `detections` of each image, also of one with none. file: the annotations. The means are
    over the thresholds 0.5, 0.55, …, 0.95 of IoU, or at 0.5 or 0.75; NaN where there is no object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        truth = COCO(str(file))
        truth.dataset.setdefault("info", {})  # older pycocotools ask for it
        for i, known in enumerate(truth.dataset["annotations"], start=1):
            known["id"] = i  # COCOeval takes the id 0 for no match
        truth.createIndex()
        kinds = sorted(truth.getCatIds())
        results = [
            dict(
                image_id=one["image_id"],
                category_id=kinds[label - 1],
                bbox=[x, y, right - x, bottom - y],
                segmentation=mask,
                score=score,
            )
            for one in found
            for (x, y, right, bottom), label, mask, score in zip(
                *(one[k] for k in ("boxes", "labels", "masks", "scores")), strict=True
            )
        ]
        guesses = truth.loadRes(results) if results else COCO()
        scores = {}
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            measure = COCOeval(truth, guesses, kind)
            measure.params.imgIds = sorted(one["image_id"] for one in found)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
            for suffix, value in zip(("ap", "ap50", "ap75"), measure.stats):
                scores[f"{name}_{suffix}"] = 100 * float(value) if value >= 0 else math.nan
    return scores


@torch.no_grad()
def evaluate_objects(models: list[nn.Module], loader: mirl.Loader) -> list[dict[str, float]]:
    """Each model's `coco_scores`; an image counts once.

    models: a list of images (3, h, w) -> what `detections` takes, for each.
    """
    found: list[list[dict]] = [[] for _ in models]
    for images, targets in every_image(models, loader):
        for model, results in zip(models, found, strict=True):
            for output, target in zip(model.forward(list(images)), targets, strict=True):
                if target is not None:
                    results.append(detections(target["image_id"], output))
    everyone = mirl.gather(found)
    scores, file = [], annotation_file(loader.data.root)
    if mirl.RANK == 0:
        parts = zip(*everyone, strict=True)
        scores = [coco_scores([*itertools.chain(*part)], file) for part in parts]
    return mirl.gather(scores)[0]


# a colour for each class or object
PALETTE = ["#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0", "#f032e6"]
PALETTE += ["#bcf60c", "#fabebe", "#008080", "#e6beff", "#9a6324", "#fffac8", "#800000", "#aaffc3"]


def picture(image: Tensor, result: Tensor | dict[str, Tensor], classes: list[str]) -> Tensor:
    """The image, uint8 (3, h, w), with what was found in it, enlarged if it is small.

    result: of segmentation, the label of each pixel, int64 (h, w); each class has a colour, and its
    name at one of its pixels. Of detection, all that `detections` takes, with names and scores.
    """
    by_pixel = isinstance(result, Tensor)
    if by_pixel:
        kinds = result.unique().tolist()
        masks = torch.stack([result == k for k in kinds])  # (n, h, w)
        middles = [mask.nonzero()[mask.sum() // 2].flip(0) for mask in masks]  # x, y
        boxes = torch.stack([torch.cat([xy, xy + 1]) for xy in middles]).float()
        names = [classes[k] for k in kinds]
    else:
        masks, boxes = result["masks"][:, 0] > 0.5, result["boxes"]
        pairs = zip(result["labels"].tolist(), result["scores"].tolist(), strict=True)
        names = [f"{classes[label - 1]} {score:.0%}" for label, score in pairs]
        kinds = range(len(names))
    colors = [PALETTE[k % len(PALETTE)] for k in kinds]
    scale = math.ceil(512 / max(image.shape[1:]))
    image, masks = (repeat(x, "n h w -> n (h p) (w q)", p=scale, q=scale) for x in (image, masks))
    if names:
        image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colors)
        lines = "white" if by_pixel else colors
        image = draw_bounding_boxes(image, boxes * scale, names, lines, width=2)
    return image


if __name__ == "__main__":
    mirl.run_script(main)
