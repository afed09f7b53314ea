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

Without fine-tuning:
    python train_finetune.py --protocol knn --from ENCODER       (or linear, or blocks)
    python train_finetune.py --eval --from FINETUNED
    python train_finetune.py --predict IMAGE… --from FINETUNED

A run leaves in --out: config.json, metrics.jsonl, checkpoint.pt (after every epoch), and of the
weights as they are ("raw") and of their moving average ("ema") the last and the best by validation:
raw-last.pt, raw-best.pt, ema-last.pt, ema-best.pt.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import ViT_B_16_Weights
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

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


@dataclass
class Args(mirl.TrainingFlags):
    recipe: str = flag(
        "quick",
        "values for the flags whose help lists one by recipe; a flag that you give wins",
        tuple(RECIPES),
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
        None, "print what the fine-tuned model --from sees in these image files, and stop"
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
        "train/<class>/ and val/<class>/",
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
    out: str | None = flag(None, "the run's folder; default runs/finetune-<recipe>")
    layer_decay: float | None = flag(
        None,
        "factor on the learning rate from each layer to the one below it: lower keeps more of what "
        "was pre-trained, nearer 1 suits deeper models, 1 suits training from scratch; imagenet by "
        "--model",
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


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, RECIPES)
    for name, value in TABLE_2.get(args.model, TABLE_2["vit_b"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.settle(f"runs/finetune-{args.recipe}")
    for name in ("mixup", "cutmix"):
        value = getattr(args, name)
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
        args.workers = mirl.pick_workers(args.workers)
        if args.predict:
            return predict(args, device)
        val = labelled(args, "val")
        if args.eval:
            return evaluate_file(args, val, device)
        train = labelled(args, "train")
        if args.protocol != "finetune":
            return probe(args, train, val, device)

        model = new_model(args, len(val.classes)).to(device)
        config = model.config
        split = mirl.split_batch(
            len(train.images), args.batch_size, args.device_batch_size, device_limit(config)
        )
        transform = finetune_transform(config.image_hw, args.randaug)
        loader = mirl.Loader(train, transform, args.seed, device, args.workers)
        val_loader = validation_loader(args, val, config, device)
        mix = mixing(args, config.num_classes)

        average = copy.deepcopy(model) if args.ema_decay else None
        models = {"raw": model} | ({"ema": average} if average else {})
        groups = mirl.parameter_groups(
            model, args.lr, args.weight_decay, layer_decay(args.layer_decay, config.depth)
        )
        run = mirl.Run(model, args, groups, (0.9, 0.999), split, train, device, average)
        for epoch in run.epochs():
            batches = loader.epoch(epoch, mirl.shuffled(split, args.seed, epoch).tolist())
            for i, (images, labels) in enumerate(run.timed(batches), start=1):
                # a step is `accumulation` micro-batches; processes average gradients in its last
                last = i % split.accumulation == 0
                run.model.require_backward_grad_sync = last
                images, targets = mix(images, labels)  # (device batch, 3, H, W)
                with mirl.autocast(device, run.dtype):
                    logits = run.model(images)  # (device batch, classes)
                loss = loss_function(logits, targets, args.label_smoothing)
                run.scaler.scale(loss / split.accumulation).backward()
                run.note(loss=loss)
                if last:
                    run.update()
                    if average:
                        mirl.move_average(average, model, ema_decay(args.ema_decay, run.step))
            found = evaluate(list(models.values()), val_loader, run.dtype)
            scores = dict(zip(models, found, strict=True))
            for name, scored in models.items():
                keep_best(run, name, scored, scores[name]["top1"], epoch)
            say("  ".join(f"{n}: top-1 {s['top1']:.2f} %" for n, s in scores.items()))
            record = {f"{n}_{k}": v for n, s in scores.items() for k, v in s.items()}
            run.end_epoch(**record, corrupt_files=len(loader.corrupt | val_loader.corrupt))
        if mirl.RANK == 0:
            bests = [(e[f"{n}_top1"], -e["epoch"], n) for e in run.history for n in models]
            top1, epoch, name = max(bests)
            say(
                f"done: the best model is {run.out / name}-best.pt, top-1 {top1:.2f} % after epoch "
                f"{-epoch}"
            )


def loss_function(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy in float32; a share `smoothing` of each target is spread over all classes."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def keep_best(run: mirl.Run, name: str, model: mirl.ViT, top1: float, epoch: int) -> None:
    """<name>-last.pt, and <name>-best.pt where this epoch is the best one so far."""
    if mirl.RANK == 0:
        more = dict(classes=run.classes, epoch=epoch + 1, top1=top1)
        mirl.save_model(run.out / f"{name}-last.pt", model, **more)
        if all(top1 > record[f"{name}_top1"] for record in run.history):
            mirl.save_model(run.out / f"{name}-best.pt", model, **more)


# ------------------------------------------------------------------------------------------------
# Layer-wise learning rates, moving average
# ------------------------------------------------------------------------------------------------


def layer_of(name: str, depth: int) -> int:
    """The layer that layer-wise lr decay counts a parameter to: 0 for the class token, positions
    and patch embedding, k + 1 for block k, depth + 1 for the rest. [S A.1]"""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
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
    grey = [round(255 * m) for m in mirl.IMAGENET_MEAN]
    return TF.affine(image, angle, shift, 1.0, shear, InterpolationMode.BILINEAR, grey)


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

    def strength(self) -> float:
        """A draw of the magnitude, as a share of 10."""
        drawn = self.magnitude + 0.5 * torch.randn(()).item()
        return min(max(drawn / 10, 0.0), 1.0)

    def forward(self, image: Tensor) -> Tensor:
        for _ in range(2):
            name = list(AUGMENTATIONS)[torch.randint(len(AUGMENTATIONS), ()).item()]
            if torch.rand(()) < 0.5:
                image = AUGMENTATIONS[name](image, self.strength())
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
    randaug = [RandAugment(randaug)] if randaug else []
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *randaug])


def mixing(args: Args, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) -> (images, targets), on the device: random erasing by pixel noise, image by
    image [R]; then mixup or cutmix, with probability 1/2 each and one λ a batch. [S A.1]"""
    erase = v2.RandomErasing(args.erasing, value="random")
    kinds = ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    mix = v2.RandomChoice(choices) if choices else lambda images, labels: (images, labels)

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
    wanted = dict(train=args.train_images, val=args.val_images)[split]
    if wanted is None and not left:
        return data
    if wanted is not None:
        require(wanted <= len(keep), f"--{split}-images {wanted}: there are {len(keep)}")
        seed = mirl.seed_of("images", args.seed if split == "train" else 0)
        order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
        keep = keep[order[:wanted]]
    return data.select(keep)


def new_model(args: Args, classes: int) -> mirl.ViT:
    names = ("image_size", "patch_size", "pool", "drop_path")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = mirl.build_vit(args.model, **given, num_classes=classes)
    resuming = args.resume and (Path(args.out) / "checkpoint.pt").exists()
    if args.from_ != "scratch" and not resuming:
        mirl.load_encoder(model, args.from_, args.truncated)
    elif not resuming:
        say("from scratch: all weights at random")
    return model


def finetuned_model(path: str, name: str = "vit_b") -> tuple[mirl.ViT, list[str] | None]:
    """A model that this script saved and its classes' names; or one that `classifier` makes of a
    file without a configuration and names, and None."""
    saved = mirl.load_file(path)
    if not saved.keys() & {"config", "classes"}:
        return classifier(mirl.named_tensors(saved), name, path), None
    try:
        classes = saved["classes"]
        model = mirl.ViT(mirl.Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        classes = None
    if not classes:
        raise UserError(f"--from {path} is no model that this script fine-tuned")
    return model, classes


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


def validation_loader(args: Args, data: mirl.Images, config: mirl.Config, device: torch.device):
    """Images as the validation sees them; the label of one that cannot be read is −1."""
    transform = mirl.whole_image(config.image_hw)
    return mirl.Loader(data, transform, 0, device, args.workers, keep_labels=False)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(models: list[nn.Module], loader: mirl.Loader, dtype: torch.dtype):
    """What each model makes of this process's images, float32 (b, ·), and their labels, in turn.

    Every image comes once over all processes. The label of one that cannot be read is −1.
    """
    for model in models:
        model.eval()
    batches = mirl.in_order(len(loader.data.images), device_limit(models[0].config))
    for images, labels in loader.epoch(0, batches):
        with mirl.autocast(images.device, dtype):
            out = [
                model.forward(images) for model in models
            ]  # not by __call__: torch.compile would compile for another batch
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


def evaluate_file(args: Args, val: mirl.Images, device: torch.device) -> None:
    """Print the scores of the fine-tuned model --from."""
    model, classes = finetuned_model(args.from_, args.model)
    require(
        classes in (None, val.classes),
        f"--from {args.from_} knows other classes than --data {args.data}",
    )
    known = model.config.num_classes
    require(
        known == len(val.classes),
        f"--from {args.from_} knows {known} classes, and --data {args.data} has {len(val.classes)}",
    )
    loader = validation_loader(args, val, model.config, device)
    dtype = mirl.pick_dtype(args.dtype, device)
    say(json.dumps(evaluate([model.to(device)], loader, dtype)[0]))


@torch.no_grad()
def predict(args: Args, device: torch.device) -> None:
    """Print the five likeliest classes of every image."""
    model, classes = finetuned_model(args.from_, args.model)
    model.to(device).eval()
    if classes is None:
        imagenet = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
        count = model.config.num_classes
        classes = imagenet if count == len(imagenet) else [f"class {i}" for i in range(count)]
    images = mirl.read_images("--predict", args.predict, model.config.image_hw)
    for path, image in zip(args.predict, images, strict=True):
        probabilities = model(image.to(device))[0].softmax(dim=0)
        top = probabilities.topk(min(5, len(classes)))
        say(path)
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            say(f"  {100 * p:5.1f} %  {classes[i]}")


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
    epochs = max(100, 1000 // steps)
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


def probe(args: Args, train: mirl.Images, val: mirl.Images, device: torch.device) -> None:
    """Print how well a frozen encoder's features, the head's input or those of every block, tell
    the classes apart."""
    model = new_model(args, len(val.classes)).to(device)
    model.head = nn.Identity()
    if args.protocol == "blocks":
        model = EveryBlock(model)
    dtype = mirl.pick_dtype(args.dtype, device)
    features = []
    for data in (train, val):
        found = outputs([model], validation_loader(args, data, model.config, device), dtype)
        parts = zip(*((x[labels >= 0], labels[labels >= 0]) for [x], labels in found), strict=True)
        mine = [torch.cat(part).cpu() for part in parts]  # empty where there is less than a share
        gathered = zip(*filter(None, mirl.gather(mine)), strict=True)
        features += [torch.cat(part).to(device) for part in gathered]
    x, labels, queries, truth = features
    require(len(x) > 1, f"--protocol {args.protocol} needs at least 2 training images")
    blocks = args.protocol == "blocks"
    tops = []
    for a, b in zip(x.unbind(1), queries.unbind(1), strict=True) if blocks else [(x, queries)]:
        if args.protocol == "linear":
            scores = linear_scores(a, labels, b, len(val.classes), args.seed)
        else:
            scores = knn_scores(a, labels, b, len(val.classes))
        top1, top5, _, n = score(scores, truth).tolist()
        tops.append((100 * top1 / n, 100 * top5 / n))
    top1, top5 = zip(*tops, strict=True) if blocks else tops[0]
    counts = dict(train_images=len(x), val_images=int(n))
    say(json.dumps(dict(protocol=args.protocol, top1=top1, top5=top5, **counts)))


if __name__ == "__main__":
    mirl.run_script(main)
