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

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image

import mirl
from mirl import flag, require, say

# fmt: off
# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set, in minutes on a laptop
    "quick": dict(model="vit_nano", data="shapes", epochs=12, warmup_epochs=1, batch_size=64,
                  base_lr=8e-3, picture_every=4),
    "cifar10": dict(model="vit_ti", data="cifar10", epochs=200, warmup_epochs=10, batch_size=512,
                    base_lr=5e-4, picture_every=20),
    # ten classes of ImageNet on one GPU
    "imagenette": dict(model="vit_s", data="imagenette", image_size=160, epochs=800,
                       warmup_epochs=40, batch_size=256, base_lr=3e-4, picture_every=40),
    # [S A.1, Table 1]
    "imagenet": dict(model="vit_b", data="data/imagenet", epochs=300, warmup_epochs=20,
                     batch_size=4096, base_lr=1.5e-4, picture_every=20),
}
# fmt: on

CROP_SCALE = (0.2, 1.0)  # share of the image's area in a random crop [R]


@dataclass
class Args(mirl.TrainingFlags):
    recipe: str = flag(
        "quick",
        "values for the flags whose help lists one by recipe; a flag that you give wins",
        tuple(RECIPES),
    )
    method: str = flag("mirl", "mirl, or mae: one segment and one plain decoder", ("mirl", "mae"))
    model: str | None = flag(None, f"the encoder: {', '.join(mirl.MODELS)}")
    data: str | None = flag(
        None,
        "shapes or scenes (embedded; scenes are for --image-size 64), cifar10, cifar100, "
        "imagenette (downloaded), or a folder of images",
    )
    out: str | None = flag(None, "the run's folder; default runs/<method>-<recipe>")
    mask_ratio: float = flag(0.75, "share of the patches that are hidden from the encoder")
    segments: int | None = flag(None, "G, an even number, or 1; default the model's")
    dense: bool | None = flag(
        None, "whether decoders attend to all earlier segments; default yes for mirl, no for mae"
    )
    weight_norm: bool | None = flag(
        None, "whether the pixel head is weight-normalised; default yes for mirl, no for mae"
    )
    truncate: int = flag(
        0,
        "leave this many last blocks out; fine-tuning with --truncated starts them at random",
        low=0,
    )
    loss: str = flag(
        "mirl", "mirl, or dagger: the main components' own loss is added", ("mirl", "dagger")
    )
    omega: float = flag(1.0, "weight of what --loss dagger adds; 0.1 is gentler", low=0)
    feature_weight: float = flag(
        0.0, "weight of a feature-level loss at the end of the encoder (InfoNCE); 0: none", low=0
    )
    feature_negatives: str = flag(
        "batch",
        "the other images on the devices at a time, so accumulation makes them fewer; or none",
        ("batch", "none"),
    )
    vgg_weight: float = flag(0.0, "weight of the loss of VGG-16's activations; 0: none", low=0)
    vgg_checkpoint: str | None = flag(
        None, "a file with torchvision's vgg16 state dict; default: downloaded"
    )
    log_grad_norms: bool = flag(False, "also log the norms of every block's gradients")
    plot: tuple[str, ...] | None = flag(
        None,
        "train nothing; draw losses and logged gradient norms of the runs in these folders into "
        "--out (default: the first of them); needs pip install -e '.[plot]'",
    )
    draw: tuple[str, ...] | None = flag(
        None,
        "train nothing; write what the pre-trained model --from makes of these image files as "
        "reconstruction.png into --out",
    )
    from_: str | None = flag(
        None, "for --draw: a checkpoint.pt of pre-training, or the authors' pre-trained model"
    )
    picture_every: int | None = flag(
        None, "epochs between two pictures; 0: at the end alone", low=0
    )
    picture_pair: int = flag(1, "which pair the pictures show, 1 (outermost) to G/2")


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, RECIPES)
    require(not (args.draw and args.plot), "--draw and --plot exclude each other: give one of them")
    require(
        bool(args.draw) == bool(args.from_) and (args.out or not args.draw),
        "--draw needs --from, a pre-trained model, and --out, a folder for the picture; --from is "
        "for --draw alone",
    )
    args.settle(args.plot[0] if args.plot else f"runs/{args.method}-{args.recipe}")
    return args


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.plot:
        return plot(args.plot, Path(args.out))
    run_folder = None if args.draw else args.out
    with mirl.interruptible(run_folder), mirl.processes(args.device) as device:
        if args.draw:
            return draw_files(args, device)
        mirl.check_out(args.out, args.resume)
        mirl.check_machine(args, device)

        # the model, with the same initial weights in every process
        torch.manual_seed(args.seed)
        config = model_config(args)
        model = new_model(args, config, device)
        pairs = max(1, config.segments // 2)
        require(
            1 <= args.picture_pair <= pairs,
            f"--picture-pair {args.picture_pair}: the model has {pairs}",
        )

        # the data, and how an epoch of them is cut
        data = mirl.load_data(args.data, args.data_dir, "train")
        limit = max(1, 256 * 196 // config.num_patches)
        split = mirl.split_batch(len(data.images), args.batch_size, args.device_batch_size, limit)
        loader = PretrainLoader(data, config.image_hw, args, device)
        val = mirl.load_data(args.data, args.data_dir, "val")
        shown = mirl.fixed_images(val, config.image_hw, count=8).to(device)

        groups = mirl.parameter_groups(model, args.lr, args.weight_decay)
        run = mirl.Run(model, args, groups, (0.9, 0.95), split, data, device)
        for epoch in run.epochs():
            batches = loader.epoch(epoch, mirl.shuffled(split, args.seed, epoch))
            for i, images in enumerate(run.timed(batches), start=1):  # (device batch, 3, H, W)
                # a step is `accumulation` micro-batches; processes average gradients in its last
                last = i % split.accumulation == 0
                run.model.require_backward_grad_sync = last
                with mirl.autocast(device, run.dtype):
                    out = run.model(images)
                run.scaler.scale(out.loss / split.accumulation).backward()
                losses = {f"loss_{g}": loss for g, loss in enumerate(out.losses, start=1)}
                run.note(loss=out.loss, **losses, **residual_shares(out), **out.terms)
                del out  # its predictions, before the next ones are made
                if last:
                    run.update(lambda: gradient_norms(model.encoder) if args.log_grad_norms else {})
                    if args.feature_weight:
                        keep = momentum(run.step / split.steps, args.epochs)
                        mirl.move_average(model.momentum_encoder, model.encoder, keep)
            run.end_epoch(corrupt_files=len(loader.corrupt))
            if args.picture_every and (epoch + 1) % args.picture_every == 0:
                draw(model, shown, args, f"epoch-{epoch + 1:04d}.png")

        if mirl.RANK == 0:
            mirl.save_model(run.out / "encoder.pt", model.encoder)
        draw(model, shown, args, "reconstruction.png")
        say(
            f"done: {run.out / 'encoder.pt'} for fine-tuning, and a picture to look at, "
            f"{run.out / 'reconstruction.png'} ({COLUMNS})"
        )


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def model_config(args: Args) -> mirl.Config:
    names = ("mask_ratio", "image_size", "patch_size", "segments", "dense", "weight_norm")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.method == "mae":
        require(
            given.get("segments", 1) == 1 and not given.get("dense"),
            "--method mae is one segment without dense connections by definition",
        )
        given = mirl.mae_overrides(args.model) | given
    config = mirl.model_config(args.model, **given)
    require(
        args.truncate < config.depth,
        f"--truncate {args.truncate} leaves none of the {config.depth} blocks",
    )
    return dataclasses.replace(config, depth=config.depth - args.truncate)


def new_model(args: Args, config: mirl.Config, device: torch.device) -> mirl.MIRL:
    """MIRL itself, or with the further objectives that the flags ask for."""
    objectives = mirl.Objectives(
        omega=args.omega if args.loss == "dagger" else 0.0,
        feature=args.feature_weight,
        negatives=args.feature_negatives == "batch",
        vgg=args.vgg_weight,
    )
    if not (objectives.omega or objectives.feature or objectives.vgg):
        return mirl.MIRL(config).to(device)
    vgg = mirl.vgg_extractor(args.vgg_checkpoint).to(device) if objectives.vgg else None
    return mirl.ExtendedMIRL(config, objectives, vgg).to(device)


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
# The data
# ------------------------------------------------------------------------------------------------


class PretrainLoader:
    """Training images, cropped at random, flipped and normalised, on the device.

    Random resized crop (area 0.2 to 1, bicubic) and horizontal flip [R]. Images in memory are kept
    on the GPU as uint8 and cropped a batch at a time, with random numbers from torch's global
    generator; files go through worker processes, with random numbers from (seed, epoch, file).
    """

    def __init__(self, data: mirl.Images, size: tuple[int, int], args: Args, device: torch.device):
        self.data, self.size, self.device = data, size, device
        self.corrupt: set[str] = set()  # files that could not be read
        if data.in_memory:
            # (on MPS older versions of torch have no bicubic sampling: crop on the CPU)
            self.images = data.images.to(device if device.type == "cuda" else "cpu")
        else:
            crop = v2.RandomResizedCrop(size, CROP_SCALE, interpolation=mirl.BICUBIC)
            transform = v2.Compose([crop, v2.RandomHorizontalFlip()])
            self.files = mirl.Loader(data, transform, args.seed, device, args.workers)
            self.corrupt = self.files.corrupt

    def epoch(self, epoch: int, order: Tensor) -> Iterator[Tensor]:
        """The micro-batches of these images, int64 (n, device batch): float32 (b, 3, H, W)."""
        if self.data.in_memory:
            for indices in order.to(self.images.device):
                crops = random_crops(self.images[indices], self.size)
                yield mirl.normalise_images(crops.to(self.device))
        else:
            for images, _ in self.files.epoch(epoch, order.tolist()):
                yield images


def random_crops(images: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, for a batch on its device.

    images: uint8 (B, C, H, W), which it enlarges rather than shrinks: nothing is antialiased.
    Returns float32 (B, C, *size) in 0..255.
    """
    (B, C, H, W), device = images.shape, images.device
    top, left, height, width = random_boxes(B, H, W, device).unbind(dim=1)  # (B,) each
    flip = 1 - 2 * torch.randint(2, (B,), device=device)  # −1 or 1
    # output coordinates, −1 to 1 over the crop, to input coordinates, −1 to 1 over the image
    zero = torch.zeros(B, device=device)
    x = torch.stack([flip * width / W, zero, (2 * left + width) / W - 1], dim=1)  # (B, 3)
    y = torch.stack([zero, height / H, (2 * top + height) / H - 1], dim=1)
    grid = F.affine_grid(torch.stack([x, y], dim=1), [B, C, *size], align_corners=False)
    crops = F.grid_sample(
        images.float(), grid, mode="bicubic", padding_mode="border", align_corners=False
    )
    return crops.clamp(0, 255)


def random_boxes(n: int, height: int, width: int, device: torch.device) -> Tensor:
    """The boxes of torchvision's RandomResizedCrop for n images at once: top, left, height and
    width, float (n, 4).

    Each image draws ten times an area share in CROP_SCALE and an aspect ratio in [3/4, 4/3]
    (log-uniform). The first that fits is used; the whole image where none does.
    """
    low, high = CROP_SCALE
    u, v = torch.rand(2, n, 10, device=device)
    area = height * width * (low + (high - low) * u)
    ratio = ((2 * v - 1) * math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)  # (n, 10)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    h = torch.where(found, h.gather(1, first)[:, 0], height)  # (n,)
    w = torch.where(found, w.gather(1, first)[:, 0], width)
    top, left = torch.rand(2, n, device=device)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], dim=1)


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


COLUMNS = "columns: ground truth, masked, reconstruction, residual, main component"


@torch.no_grad()
def draw(model: mirl.MIRL, images: Tensor, args: Args, name: str) -> None:
    """One row of five panels an image, under the same masks every time. [S C, Figure 1]"""
    if mirl.RANK != 0:
        return
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(images), model.config.num_patches, generator=generator)
    # without torch.compile, for another batch size, and without terms that need other processes
    out = mirl.MIRL.forward(model, images, noise.to(images.device))
    pictures = mirl.panels(images, out, model.config.patch_size, args.picture_pair)
    pictures = pictures.flatten(0, 1).cpu()  # (8·5, C, H, W)
    zoom = max(1, 96 // max(images.shape[2:]))  # so that small images can be seen
    grid = make_grid(F.interpolate(pictures, scale_factor=zoom), nrow=5, padding=4, pad_value=1)
    mirl.save(Path(args.out) / name, lambda path: save_image(grid, path))


def draw_files(args: Args, device: torch.device) -> None:
    """reconstruction.png of the image files --draw, by the pre-trained model --from."""
    model = mirl.load_mirl(args.from_, mask_ratio=args.mask_ratio).to(device)
    fit = mirl.whole_image(model.config.image_hw)
    images = torch.stack([fit(image) for image in mirl.read_images("--draw", args.draw)])
    images = mirl.normalise_images(images.to(device))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    draw(model, images, args, "reconstruction.png")
    say(f"drawn: {Path(args.out) / 'reconstruction.png'} ({COLUMNS})")


def plot(runs: tuple[str, ...], out: Path) -> None:
    """losses.png, and gradients.png of the runs that logged gradient norms. [S C, Figure 2]

    Figure 2's rows are blocks 19 to 22 of 24: here the same four from the end.
    """
    mirl.require_extra("matplotlib", "--plot")
    from matplotlib.figure import Figure

    steps, kinds = {}, ("qkv", "mlp", "norm", "proj")
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        require(path.exists(), f"--plot {run}: there is no {path}")
        config = json.loads((Path(run) / "config.json").read_text())
        lines = [json.loads(s) for s in path.read_text().splitlines() if s.endswith("}")]
        label = f"{run} ({config.get('method', 'fine-tuned')} {config['model']})"
        steps[label] = [line for line in lines if line["kind"] == "step"]
    out.mkdir(parents=True, exist_ok=True)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, lines in steps.items():
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    written = [save_figure(figure, out / "losses.png")]

    logged = {k: [line for line in v if "grad_qkv" in line] for k, v in steps.items()}
    if logged := {k: v for k, v in logged.items() if v}:
        depth = min(len(lines[0]["grad_qkv"]) for lines in logged.values())
        rows = range(max(0, depth - 6), max(min(depth, 4), depth - 2))
        figure = Figure(figsize=(12, 2.2 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(kinds), squeeze=False, sharex=True)
        for panel, (block, kind) in zip(grid.flat, itertools.product(rows, kinds), strict=True):
            for label, lines in logged.items():
                norms = [line[f"grad_{kind}"][block] for line in lines]
                panel.plot([line["step"] for line in lines], norms, label=label, linewidth=1)
            panel.set(yscale="log", title=f"block {block + 1}, {kind}")
        grid[0][0].legend(fontsize="small")
        grid[-1][0].set(xlabel="step", ylabel="gradient norm")
        written.append(save_figure(figure, out / "gradients.png"))
    say(f"drawn: {', '.join(map(str, written))}")


def save_figure(figure, path: Path) -> Path:
    mirl.save(path, lambda temporary: figure.savefig(temporary, dpi=110))
    return path


if __name__ == "__main__":
    mirl.run_script(main)
