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

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import mirl
from mirl import UserError, flag, say

# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set with few labels, in minutes on a laptop
    "quick": dict(
        model="vit_nano",
        data="shapes",
        epochs=40,
        warmup_epochs=4,
        batch_size=32,
        base_lr=8e-3,
        layer_decay=0.75,
        drop_path=0.0,
        randaug=0.0,
        mixup=0.0,
        cutmix=0.0,
        ema_decay=0.99,
    ),
    "cifar10": dict(
        model="vit_ti",
        data="cifar10",
        epochs=100,
        warmup_epochs=5,
        batch_size=512,
        base_lr=1e-3,
        layer_decay=0.75,
        drop_path=0.1,
        randaug=9.0,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9998,
    ),
    # [S A.1, Table 2]; what differs between the models is in TABLE_2
    "imagenet": dict(
        model="vit_b",
        data="data/imagenet",
        warmup_epochs=20,
        batch_size=2048,
        base_lr=7.5e-4,
        randaug=9.0,
        mixup=0.8,
        cutmix=1.0,
        ema_decay=0.9998,
    ),
}

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
        "quick", "sets every flag below that names a value by recipe", tuple(RECIPES)
    )
    from_: str | None = flag(
        None,
        "weights to start from: a pre-training checkpoint, an encoder.pt, a fine-tuned model, or "
        "timm's or MAE's weights; `scratch` for random ones. Default: runs/mirl-quick/encoder.pt "
        "where it is there and the recipe is quick, else scratch",
    )
    truncated: bool = flag(
        False, "allow --from to have fewer blocks than the model; the last ones start at random"
    )
    eval: bool = flag(
        False,
        "evaluate the fine-tuned model --from, of whatever --model, on the validation images",
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
        "shapes (embedded), cifar10, cifar100 (downloaded), or a folder of train/<class>/ and "
        "val/<class>/",
    )
    train_images: int | None = flag(
        None,
        "use this many of the training images, drawn by --seed; default all, but for the quick "
        "recipe's shapes 500",
    )
    val_images: int | None = flag(
        None, "use this many of the validation images, the same in every run; default all"
    )
    out: str | None = flag(None, "the run's folder; default runs/finetune-<recipe>")
    layer_decay: float | None = flag(
        None,
        "factor on the learning rate from each layer to the one below it: lower keeps more of what "
        "was pre-trained, nearer 1 suits deeper models, 1 suits training from scratch; imagenet by "
        "--model",
    )
    drop_path: float | None = flag(
        None, "rate of stochastic depth in the last block; imagenet by --model"
    )
    randaug: float | None = flag(None, "RandAug's magnitude, 0 to 10; 0 turns it off")
    erasing: float = flag(0.0, "probability of random erasing; the released code has 0.25")
    mixup: float | None = flag(None, "mixup's alpha; 0 turns it off")
    cutmix: float | None = flag(None, "cutmix's alpha; with mixup too, one of them a batch")
    label_smoothing: float = flag(0.1, "share of each target spread over all classes")
    ema_decay: float | None = flag(
        None,
        "decay of the moving average of the weights, a step; lower it for runs of few steps; 0 "
        "turns it off",
    )
    pool: str = flag("mean", "the head's input: mean over patches, or cls", ("mean", "cls"))


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, RECIPES)
    for name, value in TABLE_2.get(args.model, TABLE_2["vit_b"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    mirl.settle(args, f"runs/finetune-{args.recipe}")
    natural = ("drop_path", "ema_decay", "randaug", "erasing", "mixup", "cutmix", "label_smoothing")
    mirl.check_range(args, train_images=1, val_images=1, layer_decay=math.ulp(0))
    mirl.check_range(args, **dict.fromkeys(natural, 0))
    highest = dict(erasing=1, label_smoothing=1, layer_decay=1, randaug=10, ema_decay=1)
    for name, high in highest.items():
        if getattr(args, name) > high:
            raise UserError(f"--{name.replace('_', '-')} must be at most {high}")
    for name in ("mixup", "cutmix"):
        if 0 < getattr(args, name) < 1e-30:
            raise UserError(f"--{name} {getattr(args, name)} is too small: 0 turns it off")
    if args.train_images is None and (args.recipe, args.data) == ("quick", "shapes"):
        args.train_images = 500
    quick = Path("runs/mirl-quick/encoder.pt")
    if args.from_ is None:
        args.from_ = str(quick) if args.recipe == "quick" and quick.exists() else "scratch"
    if sum((args.eval, bool(args.predict), args.protocol != "finetune")) > 1:
        raise UserError("--eval, --predict and --protocol exclude each other: give one of them")
    if (args.eval or args.predict) and args.from_ == "scratch":
        raise UserError("--eval and --predict need --from, a model that this script fine-tuned")
    return args


# ------------------------------------------------------------------------------------------------
# Data and models
# ------------------------------------------------------------------------------------------------


def labelled(args: Args, split: str):
    """The images of a data set that have labels. Raises UserError where there are none."""
    data = mirl.load_data(args.data, args.data_dir, split)
    keep = (data.labels >= 0).nonzero()[:, 0]
    if not len(keep):
        raise UserError(
            f"--data {args.data}: the {split} images have no labels; they come from the folders "
            "train/<class>/ and val/<class>/"
        )
    if len(keep) < len(data.images):
        left = len(data.images) - len(keep)
        say(
            f"warning: {left} of the {split} images are in no folder of a class in train/: left out"
        )
    wanted = dict(train=args.train_images, val=args.val_images)[split]
    if wanted is not None:
        if wanted > len(keep):
            raise UserError(f"--{split}-images {wanted}: there are {len(keep)}")
        seed = mirl.seed_of("images", args.seed if split == "train" else 0)
        order = torch.randperm(len(keep), generator=torch.Generator().manual_seed(seed))
        keep = keep[order[:wanted]]
    return mirl.select(data, keep)


def new_model(args: Args, classes: int) -> mirl.ViT:
    names = ("image_size", "patch_size", "pool", "drop_path")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    model = mirl.build_vit(args.model, **given, num_classes=classes)
    resuming = args.resume and (Path(args.out) / "checkpoint.pt").exists()
    if args.from_ != "scratch" and not resuming:
        mirl.load_encoder(model, args.from_, args.truncated)
    return model


def finetuned_model(path: str) -> tuple[mirl.ViT, list[str]]:
    """A model that this script saved, and its classes' names."""
    saved = mirl.load_file(path)
    try:
        classes = saved.get("classes") or saved["data"]["classes"]
        model = mirl.ViT(mirl.Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError):
        classes = None
    if not classes:
        raise UserError(f"--from {path} is no model that this script fine-tuned")
    return model, classes


def in_order(args: Args, data, config: mirl.Config, device: torch.device) -> mirl.WorkerLoader:
    """Every image once, over all processes, as the validation sees it."""
    order = mirl.InOrder(len(data.images), device_limit(config))
    transform = mirl.evaluation_transform(config.image_hw)
    return mirl.WorkerLoader(data, transform, order, 0, device, args.workers)


def device_limit(config: mirl.Config) -> int:
    return max(1, 128 * 196 // config.num_patches)


def mixing(args: Args, classes: int):
    """(images, labels) -> (images, targets): mixup and cutmix alternate, one λ a batch. [S A.1]"""
    kinds = ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix))
    choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(choices) if choices else lambda images, labels: (images, labels)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(models: list[nn.Module], loader: mirl.WorkerLoader, dtype: torch.dtype):
    """What each model makes of this process's images, float32 (b, ·), and their labels, in turn.

    The label of an image that cannot be read is −1.
    """
    for model in models:
        model.eval()
    for images, labels in loader.epoch(0):
        images = mirl.normalise_images(images)
        with mirl.autocast(images.device, dtype):
            out = [model.forward(images) for model in models]  # around torch.compile's shapes
        yield [x.float() for x in out], labels


def evaluate(
    models: list[mirl.ViT], loader: mirl.WorkerLoader, dtype: torch.dtype
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
        maps = self.vit.intermediate_features(images, list(range(self.config.depth)))
        return torch.stack([self.vit.fc_norm(m.mean(dim=(2, 3))) for m in maps], dim=1)


def probe(args: Args, train, val, device: torch.device) -> None:
    """Print how well a frozen encoder's features, the head's input or those of every block, tell
    the classes apart."""
    model = new_model(args, len(val.classes)).to(device)
    model.head = nn.Identity()
    if args.protocol == "blocks":
        model = EveryBlock(model)
    dtype = mirl.pick_dtype(args.dtype, device)
    features = []
    for data in (train, val):
        found = outputs([model], in_order(args, data, model.config, device), dtype)
        parts = zip(*((x[labels >= 0], labels[labels >= 0]) for [x], labels in found), strict=True)
        mine = [torch.cat(part).cpu() for part in parts]  # empty where there is less than a share
        gathered = zip(*filter(None, mirl.gather(mine)), strict=True)
        features += [torch.cat(part).to(device) for part in gathered]
    x, labels, queries, truth = features
    if len(x) < 2:
        raise UserError(f"--protocol {args.protocol} needs at least 2 training images")
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


@torch.no_grad()
def predict(args: Args, device: torch.device) -> None:
    """Print the five likeliest classes of every image."""
    model, classes = finetuned_model(args.from_)
    model.to(device).eval()
    missing = [path for path in args.predict if not Path(path).is_file()]
    if missing:
        raise UserError(f"--predict: there is no file {missing[0]}")
    for path in args.predict:
        data = mirl.ImageFiles([path], torch.tensor([0]), classes)
        images = mirl.fixed_images(data, model.config.image_hw, 1).to(device)
        probabilities = model(images)[0].softmax(dim=0)
        top = probabilities.topk(min(5, len(classes)))
        say(path)
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            say(f"  {100 * p:5.1f} %  {classes[i]}")


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
            model, classes = finetuned_model(args.from_)
            if classes != val.classes:
                raise UserError(f"--from {args.from_} knows other classes than --data {args.data}")
            loader = in_order(args, val, model.config, device)
            dtype = mirl.pick_dtype(args.dtype, device)
            return say(json.dumps(evaluate([model.to(device)], loader, dtype)[0]))
        train = labelled(args, "train")
        if args.protocol != "finetune":
            return probe(args, train, val, device)

        model = new_model(args, len(val.classes)).to(device)
        config = model.config
        split = mirl.split_batch(args.batch_size, args.device_batch_size, device_limit(config))
        shares = mirl.Shares(len(train.images), split, args.seed)
        transform = mirl.finetune_transform(config.image_hw, args.randaug, args.erasing)
        loader = mirl.WorkerLoader(train, transform, shares, args.seed, device, args.workers)
        val_loader = in_order(args, val, config, device)
        mix = mixing(args, config.num_classes)

        average = mirl.EMA(model, args.ema_decay) if args.ema_decay else None
        models = {"raw": model} | ({"ema": average.module} if average else {})
        groups = mirl.parameter_groups(model, args.lr, args.weight_decay, args.layer_decay)
        trainer = mirl.Trainer(model, args, groups, (0.9, 0.999), shares, train, device, average)
        trainer.announce(f"{args.model} from {args.from_}")
        for epoch in trainer.epochs():
            for images, labels in loader.epoch(epoch):
                images, targets = mix(images, labels)
                with trainer.forward():
                    logits = trainer.model(images)
                smoothing = args.label_smoothing
                loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
                trainer.backward(loss, {})
            trainer.check_weights()
            found = evaluate(list(models.values()), val_loader, trainer.dtype)
            scores = dict(zip(models, found, strict=True))
            record = {f"{n}_{k}": v for n, s in scores.items() for k, v in s.items()}
            corrupt = len(loader.corrupt | val_loader.corrupt)
            for name, m in models.items():
                save_model(trainer, name, m, scores[name]["top1"], epoch)
            say("  ".join(f"{n}: top-1 {s['top1']:.2f} %" for n, s in scores.items()))
            trainer.end_epoch(epoch, **record, corrupt_files=corrupt)
        if mirl.is_main():
            top1, path, epoch = max(
                (saved["top1"], str(path), saved["epoch"])
                for path in (trainer.out / f"{name}-best.pt" for name in models)
                for saved in [mirl.load_file(path)]
            )
            say(f"done: the best model is {path}, top-1 {top1:.2f} % after epoch {epoch}")


def save_model(trainer: mirl.Trainer, name: str, model: mirl.ViT, top1: float, epoch: int) -> None:
    """<name>-last.pt, and <name>-best.pt where this epoch is the best one so far."""
    if mirl.is_main():
        saved = mirl.portable(model)
        saved |= dict(classes=trainer.data["classes"], epoch=epoch + 1, top1=top1)
        mirl.save_file(trainer.out / f"{name}-last.pt", saved)
        if all(top1 > record[f"{name}_top1"] for record in trainer.history):
            mirl.save_file(trainer.out / f"{name}-best.pt", saved)


if __name__ == "__main__":
    mirl.run_script(main)
