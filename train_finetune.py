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

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.data import DataLoader
from torchvision.models import ViT_B_16_Weights

import mirl
from common import checkpoint
from common.cli import (
    RecipeParser,
    add_training_flags,
    count,
    number,
    run_script,
    settle,
    share,
    switch,
    text,
)
from common.data import (
    AugmentedImages,
    EpochSampler,
    ImageSet,
    batches,
    make_loader,
    micro_batches,
    read_images,
    seed_of,
)
from common.distributed import (
    RANK,
    data_parallel,
    process_group,
    say,
    share_buffers,
    syncs_batch_norm,
)
from common.metrics import MetricLogger, lr_factor, parameter_groups, to_json
from mirl import UserError, require
from tasks.classification import Classification
from tasks.dense import compared, is_thin
from tasks.detection import Detection
from tasks.probe import probe
from tasks.segmentation import Segmentation

TASKS = dict(classify=Classification, segment=Segmentation, detect=Detection)


# fmt: off
# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set with few labels, in minutes on a laptop
    "quick": dict(model="vit_nano", data="shapes", epochs=36, warmup_epochs=4, batch_size=32,
                  base_lr=2.4e-2, layer_decay=0.75, drop_path=0.0, randaug=0.0, mixup=0.0,
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = RecipeParser(__doc__, RECIPES)
    flag = parser.add_argument
    flag("--task", choices=TASKS, default="classify",
         help="classify images; segment (UperNet), a class for every pixel; or detect (Mask "
         "R-CNN), objects with their boxes and masks. A recipe has its task; default classify")
    flag("--from", dest="from_", type=text,
         help="weights to start from: a pre-training checkpoint, an encoder.pt, a fine-tuned "
         "model, or the authors', timm's or MAE's weights; scratch for random ones. Default: "
         "runs/mirl-quick/encoder.pt where it is there and the recipe is quick, else scratch")
    flag("--normalize", choices=("imagenet", "half"), default="imagenet",
         help="the images that weights of others in --from were made for: of ImageNet's mean and "
         "deviation, or, as most of timm's ViTs, of 0.5 for both (half); default imagenet")
    flag("--truncated", action=switch, default=False,
         help="allow --from to have fewer blocks than the model; the last ones start at random")
    flag("--eval", action=switch, default=False,
         help="evaluate the fine-tuned model --from on the validation images; a file of the "
         "authors, MAE or timm must be of --model")
    flag("--predict", nargs="+", metavar="IMAGE",
         help="print what the fine-tuned model --from sees in these image files, and stop; what is "
         "segmented or detected is also drawn, into --out, beside the ground truth of images that "
         "lie in the layout of ADE20K or COCO")
    flag("--protocol", choices=("finetune", "linear", "knn", "blocks"), default="finetune",
         help="finetune (default); or look at the frozen encoder --from, without training it: knn "
         "(k = 20, cosine, temperature 0.07), blocks (knn after every block, to see where features "
         "get better or worse), or linear (a linear layer on batch-normalised features)")
    flag("--model", type=text, help=f"the encoder: {', '.join(mirl.MODELS)}")
    flag("--data", type=text,
         help="shapes (embedded), cifar10, cifar100, imagenette (downloaded), or a folder of "
         "train/<class>/ and val/<class>/; to segment or detect, scenes (embedded) or a folder in "
         "the layout of ADE20K or COCO")
    flag("--train-images", type=count,
         help="use this many of the training images, drawn by --seed; default all, but for the "
         "quick recipe's shapes 500")
    flag("--val-images", type=count,
         help="use this many of the validation images, the same in every run; default all")
    flag("--layer-decay", type=number(above=0, high=1),
         help="factor on the learning rate from each layer to the one below it: lower keeps more "
         "of what was pre-trained, nearer 1 suits deeper models, 1 suits training from scratch; "
         "imagenet, ade20k and coco by --model")
    flag("--drop-path", type=number(low=0),
         help="rate of stochastic depth in the last block; imagenet by --model")
    flag("--randaug", type=number(low=0, high=10), help="RandAug's magnitude, 0 to 10; 0 is none")
    flag("--erasing", type=share, default=0.0,
         help="probability of random erasing; the released code has 0.25; default 0")
    flag("--mixup", type=number(low=0), help="mixup's alpha; 0 turns it off")
    flag("--cutmix", type=number(low=0),
         help="cutmix's alpha; with mixup too, one of them a batch")
    flag("--label-smoothing", type=share, default=0.1,
         help="share of each target spread over all classes; default 0.1")
    flag("--ema-decay", type=share,
         help="decay of the moving average of the weights, a step; lower it for runs of few steps; "
         "0 turns it off")
    flag("--pool", choices=("mean", "cls"), default="mean",
         help="the head's input: mean over patches, or the class token; default mean")
    flag("--head-width", type=number(int, low=8),
         help="channels of what segments or detects; default the encoder's, or 256 to detect")
    flag("--slide", action=switch, default=False,
         help="evaluate segmentation by windows of --image-size, two thirds of it apart")
    add_training_flags(parser)
    args = parser.parse(argv)
    recipe = RECIPES.get(f"{args.recipe}-{args.task}", RECIPES[args.recipe])
    made_for = recipe.get("task", "classify")
    require(made_for == args.task,
            f"--recipe {args.recipe} is for --task {made_for}, not {args.task}")
    # no option without effect
    classify = ["randaug", "mixup", "cutmix", "erasing", "label_smoothing", "pool", "protocol"]
    foreign = dict(classify=["head_width", "slide"], segment=classify, detect=[*classify, "slide"])
    given = ["--" + name.replace("_", "-") for name in foreign[args.task]
             if (getattr(args, name) or 0) != (parser.get_default(name) or 0)]
    require(not given, f"{', '.join(given)}: not for --task {args.task}")
    if args.task != "classify":
        deep = args.model in ("vit_s_54", "vit_b_48")
        args.layer_decay = args.layer_decay or (0.88 if deep else LAYER_DECAY[args.task])
    for name, value in TABLE_2.get(args.model, TABLE_2["vit_b"]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.train_images is None and (args.recipe, args.data) == ("quick", "shapes"):
        args.train_images = 500
    quick = Path("runs/mirl-quick/encoder.pt")
    if args.from_ is None:
        args.from_ = str(quick) if args.recipe == "quick" and quick.exists() else "scratch"
    require(args.eval + bool(args.predict) + (args.protocol != "finetune") <= 1,
            "--eval, --predict and --protocol exclude each other: give one of them")
    require(not (args.eval or args.predict) or args.from_ != "scratch",
            "--eval and --predict need --from, a fine-tuned model")
    settle(args, f"runs/{'finetune' if args.task == 'classify' else args.task}-{args.recipe}")
    return args
# fmt: on


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with process_group(args.device) as device:
        if not (args.eval or args.predict) and args.protocol == "finetune":
            checkpoint.check_out(args.out, args.resume)
        task = TASKS[args.task](args, device)
        if args.predict:
            return predict(task)
        val = task.data("val")
        if args.eval:
            return evaluate_file(task, val)
        train = task.data("train")
        other = sorted({*train.classes} ^ {*val.classes}) or "their order"
        alike = train.classes == val.classes
        require(alike, f"--data {args.data}: train and val differ in classes: {other}")

        # the model, with the same initial weights in every process
        torch.manual_seed(args.seed)
        vit = new_vit(args, len(val.classes))
        config = vit.config
        val_loader = in_order(task, val, config)
        if args.protocol != "finetune":
            loaders = in_order(task, train, config), val_loader
            found = probe(args.protocol, vit.to(device), *loaders, args.seed, task.dtype)
            return say(to_json(found))
        model = task.model(vit, len(val.classes), args.head_width).to(device)
        if syncs_batch_norm(device):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        average = copy.deepcopy(model) if args.ema_decay else None
        models = dict(raw=model) | (dict(ema=average) if average else {})

        # the training images, a step of batch_size = processes · accumulation · size
        limit = device_limit(config)
        size, accumulation = micro_batches(args.batch_size, args.device_batch_size, limit)
        require(
            args.task != "segment" or size > 1 or syncs_batch_norm(device),
            "batch norm needs at least 2 images on a device: raise --batch-size or "
            "--device-batch-size",
        )
        sampler = EpochSampler(len(train), args.batch_size, args.seed)
        dataset = AugmentedImages(train, task.transform(config, training=True), args.seed)
        loader = make_loader(dataset, sampler, size, args.workers, device)
        log = MetricLogger(args, len(train), size, accumulation)

        decay = layer_decay(args.layer_decay, config.depth)
        groups = parameter_groups(model, args.lr, args.weight_decay, decay)
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)  # [S A.1, Table 2]
        warmup = round(args.warmup_epochs * log.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, log.total, warmup, args.schedule)
        )
        scaler = torch.amp.GradScaler(device.type, enabled=task.dtype == torch.float16)

        # the run: new, or where its last checkpoint left it
        parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        parts |= dict(average=average) if average else {}
        identity = checkpoint.identity(args, config, train)
        about = dict(classes=train.classes, task=args.task, head_width=args.head_width)
        about |= dict(config=dataclasses.asdict(config))
        saved = checkpoint.resume(args.out, parts, identity) if args.resume else {}
        log.start(saved, model, device)
        if args.compile:
            model.compile()
        wrapped = data_parallel(model, device)

        def save(epoch: int, **more) -> None:
            more |= about | dict(identity=identity, history=log.history, written=log.written)
            checkpoint.save_checkpoint(args.out, parts, epoch=epoch, **more)

        def score(epoch: int, trained: dict) -> None:
            scores = dict(zip(models, task.evaluate([*models.values()], val_loader), strict=True))
            for name, values in scores.items():
                more = about | dict(epoch=epoch) | values
                keep_best(args.out, name, models[name], more, task.best, log.history)
            say("  ".join(f"{n}: {task.best} {s[task.best]:.2f} %" for n, s in scores.items()))
            record = {f"{n}_{k}": v for n, s in scores.items() for k, v in s.items()}
            broken = trained["corrupt_files"] + len(val_loader.dataset.broken)
            log.end_epoch(trained, **record | dict(corrupt_files=broken))
            save(epoch)

        if saved.get("unscored"):  # the evaluation of its last epoch did not end
            score(saved["epoch"], saved["unscored"])
        for epoch in range(saved.get("epoch", 0), args.epochs):
            torch.manual_seed(seed_of("epoch", args.seed, epoch, RANK))  # so a resume is exact
            sampler.set_epoch(epoch)
            model.train()
            log.start_epoch(epoch + 1)
            for i, (images, targets) in enumerate(log.timed(batches(loader, device)), start=1):
                # a step is `accumulation` micro-batches; processes average gradients in its last
                wrapped.require_backward_grad_sync = last = i % accumulation == 0
                losses = task.losses(wrapped, images, targets)  # "loss", and its terms
                scaler.scale(losses["loss"] / accumulation).backward()
                log.add(**losses)
                if not last:
                    continue
                scaler.unscale_(optimizer)
                norm = None
                if args.clip_grad or log.due:
                    norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
                lr = max(scheduler.get_last_lr())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                log.end_step(lr, norm)
                if average:
                    mirl.update_ema(average, model, ema_decay(args.ema_decay, log.step))

            for each in models.values():
                share_buffers(each)
            trained = log.trained(model) | dict(corrupt_files=len(dataset.broken))
            save(epoch + 1, unscored=trained)  # an evaluation that fails costs no epoch
            score(epoch + 1, trained)
        log.bar.close()
        say(f"done: {best_model(args.out, list(models), task.best, log.history)}")


def keep_best(out: str, name: str, model: nn.Module, more: dict, best: str, history: list) -> None:
    """<name>-last.pt, and <name>-best.pt where more[best] is the best of all epochs so far."""
    if RANK == 0:
        checkpoint.save_model(Path(out) / f"{name}-last.pt", model, **more)
        score, key = more.get(best, math.nan), f"{name}_{best}"
        if math.isfinite(score) and not any(e.get(key, -1) >= score for e in history):
            checkpoint.save_model(Path(out) / f"{name}-best.pt", model, **more)


def best_model(out: str, names: list[str], best: str, history: list[dict]) -> str:
    """Which file has the best score of all epochs, the first of equals; else the last weights."""
    scores = [(e.get(f"{n}_{best}", math.nan), -e["epoch"], n) for e in history for n in names]
    scores = [found for found in scores if math.isfinite(found[0])]
    if not scores:
        return str(Path(out) / "raw-last.pt")
    score, epoch, name = max(scores)
    path = Path(out) / f"{name}-best.pt"
    return f"the best model is {path}, {best} {score:.2f} % after epoch {-epoch}"


def layer_decay(decay: float, depth: int) -> Callable[[str], float]:
    """The factor on a named parameter's learning rate: decay^(depth + 1 − l) in layer l. [S A.1]

    Layer 0 are the class token and the patch embedding, k + 1 is block k, depth + 1 all else, also
    where the ViT is part of a model.
    """

    def factor(name: str) -> float:
        name, layer = name.rpartition("vit.")[2], depth + 1
        if name.startswith(("cls_token", "patch_embed.")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return decay ** (depth + 1 - layer)

    return factor


def ema_decay(decay: float, step: int) -> float:
    """The moving average's decay after step 1, 2, …: min(decay, (1 + t)/(10 + t)) with
    t = step − 1, to forget the start. [R]"""
    return min(decay, step / (9 + step))


# ------------------------------------------------------------------------------------------------
# Models and data
# ------------------------------------------------------------------------------------------------


def new_vit(args: argparse.Namespace, classes: int) -> mirl.ViT:
    """The encoder of --model, with a head for the classes, and the weights of --from."""
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
        checkpoint.load_encoder(vit, args.from_, args.truncated)
        if args.normalize == "half":
            checkpoint.expect_imagenet(vit)
    return vit


def device_limit(config: mirl.Config) -> int:
    """Images on a device at a time, unless told otherwise."""
    return max(1, 128 * 196 // config.num_patches)


def in_order(task: Classification, data: ImageSet, config: mirl.Config) -> DataLoader:
    """All images as the validation sees them; one that cannot be read counts for nothing."""
    images = AugmentedImages(data, task.transform(config, training=False), keep_labels=False)
    limit = device_limit(config)
    size = min(task.args.device_batch_size or limit, limit)
    return make_loader(images, EpochSampler(len(data)), size, task.args.workers, task.device)


def finetuned_model(task: Classification) -> tuple[nn.Module, list[str] | None]:
    """The model in --from, on the device, and its classes' names: one that this script saved, or
    what `load_classifier` makes of a file without a configuration and names, and None."""
    path, wanted = task.args.from_, task.args.task
    saved = checkpoint.load_file(path)
    if wanted == "classify" and not saved.keys() & {"config", "classes"}:
        weights = checkpoint.named_tensors(saved)
        vit = checkpoint.load_classifier(weights, task.args.model, path)
        if task.args.normalize == "half":
            checkpoint.expect_imagenet(vit)
        return vit.to(task.device).eval(), None
    if "history" in saved and isinstance(saved.get("args"), dict):  # an older checkpoint's flags
        saved |= {k: v for k, v in saved["args"].items() if k in ("task", "head_width")}
    kind = saved.get("task", "classify") if "classes" in saved else wanted
    require(kind == wanted, f"--from {path} is a model to {kind}: add --task {kind}")
    try:
        classes = saved["classes"]
        vit = mirl.ViT(mirl.Config(**saved["config"]))
        model = task.model(vit, len(classes), saved.get("head_width"))
        weights = saved["model"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"--from {path} is no fine-tuned model: fine-tune it first") from None
    checkpoint.load_weights(model, weights, f"--from {path}")
    return model.to(task.device).eval(), classes


def evaluate_file(task: Classification, val: ImageSet) -> None:
    """Print the scores of the fine-tuned model --from."""
    model, classes = finetuned_model(task)
    path, data, known = task.args.from_, task.args.data, model.config.num_classes
    require(classes in (None, val.classes), f"--from {path} knows other classes than --data {data}")
    require(
        known == len(val.classes),
        f"--from {path} knows {known} classes, and --data {data} has {len(val.classes)}",
    )
    say(to_json(task.evaluate([model], in_order(task, val, model.config))[0]))


@torch.no_grad()
def predict(task: Classification) -> None:
    """Print what the fine-tuned model --from sees in every image; what is segmented or detected is
    also drawn, beside the truth where the image lies in the layout of ADE20K or COCO."""
    images = read_images("--predict", task.args.predict)
    names = {Path(path).stem for path in task.args.predict}
    require(
        len(names) == len(images) or task.args.task == "classify",
        "--predict: two of the files have one name, and so would their pictures: give them apart",
    )
    thin = [path for path, image in zip(task.args.predict, images) if is_thin(image)]
    require(
        not thin or task.args.task == "classify",
        f"--predict: {thin[:1]} is over 32 times as long as wide, or wide as long",
    )
    model, classes = finetuned_model(task)
    if classes is None:
        imagenet = ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"]
        count = model.config.num_classes
        classes = imagenet if count == len(imagenet) else [f"class {i}" for i in range(count)]
    for path, image in zip(task.args.predict, images, strict=True):
        say(path)
        found, truth = task.tell(model, classes, image), None
        if found and RANK == 0:
            try:
                truth = task.truth(path, classes, image)
            except (UserError, OSError) as error:
                say(f"  no ground truth: {error}")
            out = Path(task.args.out) / f"{Path(path).stem}-{task.args.task}.png"
            out.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.save(out, compared(image, truth, found).save, format="PNG")
            say(f"  drawn: {out}")


if __name__ == "__main__":
    run_script(main)
