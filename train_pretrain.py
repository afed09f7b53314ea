"""Pre-train a ViT with Masked Image Residual Learning, or with MAE.

On whatever device there is, a few minutes on two CPU cores, ending with a picture:
    python train_pretrain.py

One GPU, CIFAR-10:
    python train_pretrain.py --recipe cifar10

8 GPUs, ImageNet (a folder of train/<class>/*.jpg):
    torchrun --nproc-per-node 8 train_pretrain.py --recipe imagenet --data /data/imagenet --resume

8 nodes of 8 GPUs, the same line on every node, with --out on a file system that they share:
    torchrun --nnodes 8 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id mirl \\
        train_pretrain.py --recipe imagenet --data /data/imagenet --out /shared/run --resume

Without training, pictures of any images by a pre-trained model:
    python train_pretrain.py --draw IMAGE… --from CHECKPOINT --out FOLDER

A run leaves in --out: config.json, metrics.jsonl, checkpoint.pt (after every epoch), pictures, and
at its end encoder.pt, the encoder alone under timm's names.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn as nn
from einops import repeat
from torch import Tensor
from torchvision.transforms import v2

import mirl
from common import checkpoint
from common.cli import RecipeParser, add_training_flags, number, run_script, settle, switch, text
from common.data import (
    BICUBIC,
    AugmentedImages,
    EpochSampler,
    batches,
    center_crop,
    load_data,
    make_loader,
    micro_batches,
    normalise_images,
    read_images,
    seed_of,
    validation_images,
)
from common.distributed import (
    RANK,
    autocast,
    data_parallel,
    pick_dtype,
    process_group,
    rank_zero_first,
    say,
)
from common.metrics import MetricLogger, lr_factor, parameter_groups
from common.pictures import titled
from mirl import UserError, require

# fmt: off
# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set, in minutes on a laptop
    "quick": dict(model="vit_nano", data="shapes", epochs=15, warmup_epochs=1, batch_size=32,
                  base_lr=8e-3, picture_every=5),
    "cifar10": dict(model="vit_ti", data="cifar10", epochs=200, warmup_epochs=10, batch_size=512,
                    base_lr=5e-4, picture_every=20),
    # ten classes of ImageNet on one GPU
    "imagenette": dict(model="vit_s", data="imagenette", image_size=160, epochs=800,
                       warmup_epochs=40, batch_size=256, base_lr=3e-4, picture_every=40),
    # [S A.1, Table 1]
    "imagenet": dict(model="vit_b", data="data/imagenet", epochs=300, warmup_epochs=20,
                     batch_size=4096, base_lr=1.5e-4, picture_every=20),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = RecipeParser(__doc__, RECIPES)
    flag = parser.add_argument
    flag("--method", choices=("mirl", "mae"), default="mirl",
         help="mirl, or mae: one segment and one plain decoder; default mirl")
    flag("--model", type=text, help=f"the encoder: {', '.join(mirl.MODELS)}")
    flag("--data", type=text,
         help="shapes (embedded), cifar10, cifar100, imagenette (downloaded), or a folder of "
         "images")
    flag("--mask-ratio", type=number(), default=0.75,
         help="share of the patches that are hidden from the encoder; default 0.75")
    flag("--segments", type=int, help="G, an even number, or 1; default the model's")
    flag("--dense", action=switch,
         help="whether decoders attend to all earlier segments; default yes for mirl, no for mae")
    flag("--weight-norm", action=switch,
         help="whether the pixel head is weight-normalised; default yes for mirl, no for mae")
    flag("--truncate", type=number(int, low=0), default=0,
         help="leave this many last blocks out; fine-tuning with --truncated starts them at random")
    flag("--omega", type=number(low=0), default=0.0,
         help="weight of the main components' own loss, which is added; the paper's variant L† has "
         "1, and 0.1 is gentler; default 0: none")
    flag("--feature-weight", type=number(low=0), default=0.0,
         help="weight of a feature-level loss at the end of the encoder (InfoNCE); default 0: none")
    flag("--feature-negatives", choices=("batch", "none"), default="batch",
         help="the other images on the devices at a time, so accumulation makes them fewer; or "
         "none")
    flag("--vgg-weight", type=number(low=0), default=0.0,
         help="weight of the loss of VGG-16's activations; default 0: none")
    flag("--vgg-checkpoint", type=text,
         help="a file with torchvision's vgg16 state dict; default: downloaded")
    flag("--log-grad-norms", action=switch, default=False,
         help="also log the norms of every block's gradients, for assets/plot.py")
    flag("--draw", nargs="+", metavar="IMAGE",
         help="train nothing; write what the pre-trained model --from makes of these image files "
         "as reconstruction.png into --out")
    flag("--from", dest="from_", type=text,
         help="for --draw: a checkpoint.pt of pre-training, or the authors' pre-trained model")
    flag("--picture-every", type=number(int, low=0),
         help="epochs between two pictures; 0: at the end alone")
    flag("--picture-pair", type=int, default=1,
         help="which pair the pictures show, 1 (outermost) to G/2; default 1")
    add_training_flags(parser)
    args = parser.parse(argv)
    require(
        bool(args.draw) == bool(args.from_) and (args.out or not args.draw),
        "--draw needs --from, a pre-trained model, and --out, a folder for the picture; --from is "
        "for --draw alone",
    )
    settle(args, f"runs/{args.method}-{args.recipe}")
    return args
# fmt: on


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    with process_group(args.device) as device:
        if args.draw:
            return draw_files(args, device)
        checkpoint.check_out(args.out, args.resume)
        dtype = pick_dtype(args.dtype, device)

        # the model, with the same initial weights in every process
        torch.manual_seed(args.seed)
        model = new_model(args, device)
        config = model.config
        pairs = max(1, config.segments // 2)
        require(
            1 <= args.picture_pair <= pairs,
            f"--picture-pair {args.picture_pair}: the model has {pairs}",
        )

        # the data: random resized crop (area 0.2 to 1, bicubic) and horizontal flip [R]
        data = load_data(args.data, args.data_dir, "train")
        limit = max(1, 256 * 196 // config.num_patches)
        size, accumulation = micro_batches(args.batch_size, args.device_batch_size, limit)
        sampler = EpochSampler(len(data), args.batch_size, args.seed)
        crop = v2.RandomResizedCrop(config.image_hw, (0.2, 1.0), interpolation=BICUBIC)
        transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
        loader = make_loader(
            AugmentedImages(data, transform, args.seed), sampler, size, args.workers, device
        )
        val = load_data(args.data, args.data_dir, "val")
        shown = validation_images(val, config.image_hw, 8).to(device)
        log = MetricLogger(args, len(data), size, accumulation)

        groups = parameter_groups(model, args.lr, args.weight_decay)
        parameters = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        warmup = round(args.warmup_epochs * log.steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(step, log.total, warmup, args.schedule)
        )
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

        # the run: new, or where its last checkpoint left it
        parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, scaler=scaler)
        identity = checkpoint.identity(args, config, data)
        saved = checkpoint.resume(args.out, parts, identity) if args.resume else {}
        log.start(saved, model, device)
        if args.compile:
            model.compile()
        wrapped = data_parallel(model, device)

        for epoch in range(saved.get("epoch", 0), args.epochs):
            torch.manual_seed(seed_of("epoch", args.seed, epoch, RANK))  # so a resume is exact
            sampler.set_epoch(epoch)
            model.train()
            log.start_epoch(epoch + 1)
            for i, (images, _) in enumerate(log.timed(batches(loader, device)), start=1):
                # a step is `accumulation` micro-batches; processes average gradients in its last
                wrapped.require_backward_grad_sync = last = i % accumulation == 0
                with autocast(device, dtype):
                    out = wrapped(images)  # of (device batch, 3, H, W)
                scaler.scale(out.loss / accumulation).backward()
                losses = {f"loss_{g}": loss for g, loss in enumerate(out.losses, start=1)}
                log.add(loss=out.loss, **losses, **residual_shares(out), **out.terms)
                del out  # its predictions, before the next ones are made
                if not last:
                    continue
                scaler.unscale_(optimizer)
                norms = gradient_norms(model.encoder) if args.log_grad_norms and log.due else {}
                norm = None
                if args.clip_grad or log.due:
                    norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
                lr = max(scheduler.get_last_lr())
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scheduler.step()
                log.end_step(lr, norm, **norms)
                if args.feature_weight:
                    decay = momentum(log.step / log.steps, args.epochs)
                    mirl.update_ema(model.momentum_encoder, model.encoder, decay)
            log.end_epoch(log.trained(model), corrupt_files=len(loader.dataset.broken))
            checkpoint.save_checkpoint(
                args.out,
                parts,
                identity=identity,
                config=dataclasses.asdict(config),
                epoch=epoch + 1,
                history=log.history,
                written=log.written,
            )
            if args.picture_every and (epoch + 1) % args.picture_every == 0:
                draw(model, shown, args, f"epoch-{epoch + 1:04d}.png")
        log.bar.close()

        encoder = Path(args.out) / "encoder.pt"
        if RANK == 0:
            checkpoint.save_model(encoder, model.encoder)
        picture = draw(model, shown, args, "reconstruction.png")
        say(f"done: {encoder} for fine-tuning, and a picture to look at, {picture}")


# ------------------------------------------------------------------------------------------------
# The model, and what is watched while it learns
# ------------------------------------------------------------------------------------------------


def new_model(args: argparse.Namespace, device: torch.device) -> mirl.MIRL:
    """MIRL or MAE, with the further objectives that the flags ask for."""
    names = ("mask_ratio", "image_size", "patch_size", "segments", "dense", "weight_norm")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = mirl.model_config(args.model, **given)
    if args.method == "mae":
        require(
            given.get("segments", 1) == 1 and not given.get("dense"),
            "--method mae is one segment without dense connections by definition",
        )
        config = mirl.mae_config(args.model, **given)
    require(
        args.truncate < config.depth,
        f"--truncate {args.truncate} leaves none of the {config.depth} blocks",
    )
    config = dataclasses.replace(config, depth=config.depth - args.truncate)
    negatives = args.feature_negatives == "batch"
    objectives = mirl.Objectives(args.omega, args.feature_weight, negatives, args.vgg_weight)
    if not (args.omega or args.feature_weight or args.vgg_weight):
        return mirl.MIRL(config).to(device)
    vgg = load_vgg(args.vgg_checkpoint).to(device) if args.vgg_weight else None
    return mirl.ExtendedMIRL(config, objectives, vgg).to(device)


def load_vgg(path: str | None) -> nn.Module:
    """VGG-16 from a file, or downloaded. Raises UserError where it cannot be had."""
    if path:
        weights = checkpoint.load_file(path)
        try:
            return mirl.vgg_features(weights)
        except UserError as error:
            raise UserError(f"--vgg-checkpoint {path}: {error}") from None
    try:
        with rank_zero_first():
            return mirl.vgg_features(None)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--vgg-weight: VGG-16's weights could not be downloaded ({error}); give a file of "
            "torchvision's vgg16 state dict with --vgg-checkpoint"
        ) from None


def momentum(epoch: float, epochs: int) -> float:
    """The momentum encoder's: from 0.999 to 0.9999 over the first 100 epochs, then towards 0.99999
    at the last. [R]"""
    if epoch < 100:
        return 0.999 + 0.0009 * epoch / 100
    return 0.9999 + 0.00009 * (epoch - 100) / max(1, epochs - 100)


@torch.no_grad()
def residual_shares(out: mirl.MIRLOutput) -> dict[str, Tensor]:
    """Of each pair's prediction p = x̂ + ξ̂, what the residual carries: ξ̂·p / p·p; x̂ has the rest."""
    pairs = zip(out.residual, out.reconstruction)  # MAE has no residual
    flat = [(xi.flatten(), p.flatten()) for xi, p in pairs]
    return {f"residual_share_{g}": xi.dot(p) / p.dot(p) for g, (xi, p) in enumerate(flat, start=1)}


def gradient_norms(vit: mirl.ViT) -> dict[str, Tensor]:
    """Norms of the gradients of each block's weights, (depth,) each, by kind. [S C, Figure 2]"""
    kinds = dict(
        grad_qkv=["attn.qkv"],
        grad_mlp=["mlp.fc1", "mlp.fc2"],
        grad_norm=["norm1", "norm2"],
        grad_proj=["attn.proj"],
    )

    def norm(block: nn.Module, names: list[str]) -> Tensor:
        return nn.utils.get_total_norm([block.get_submodule(n).weight.grad for n in names])

    return {k: torch.stack([norm(b, names) for b in vit.blocks]) for k, names in kinds.items()}


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------

COLUMNS = ["ground truth", "masked", "reconstruction", "residual", "main component"]


@torch.no_grad()
def draw(model: mirl.MIRL, images: Tensor, args: argparse.Namespace, name: str) -> Path:
    """A row of panels an image, under their names and the same masks every time, of three columns
    for MAE, which has no residual and but one component. [S C, Figure 1]"""
    path = Path(args.out) / name
    if RANK == 0:
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.rand(len(images), model.config.num_patches, generator=generator)
        # without torch.compile, for another batch size, and without terms that need other processes
        out = mirl.MIRL.forward(model, images, noise.to(images.device))
        pictures = mirl.panels(images, out, model.config.patch_size, args.picture_pair)
        names = COLUMNS if out.residual else COLUMNS[:3]
        zoom = math.ceil(96 / images.shape[3])  # so that small images and the names can be seen
        pictures = v2.functional.to_dtype(pictures[:, : len(names)].cpu(), torch.uint8, scale=True)
        pictures = repeat(pictures, "b k c h w -> b k c (h p) (w q)", p=zoom, q=zoom)
        checkpoint.save(path, titled(pictures, names).save, format="PNG")
    return path


def draw_files(args: argparse.Namespace, device: torch.device) -> None:
    """reconstruction.png of the image files --draw, by the pre-trained model --from."""
    model = checkpoint.load_mirl(args.from_, mask_ratio=args.mask_ratio).to(device)
    fit = center_crop(model.config.image_hw)
    images = torch.stack([fit(image) for image in read_images("--draw", args.draw)])
    Path(args.out).mkdir(parents=True, exist_ok=True)
    picture = draw(model, normalise_images(images.to(device)), args, "reconstruction.png")
    say(f"drawn: {picture}")


if __name__ == "__main__":
    run_script(main)
