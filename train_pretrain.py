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

A run leaves in --out: config.json, metrics.jsonl, checkpoint.pt (after every epoch), pictures, and
at its end encoder.pt, the encoder alone under timm's names.
"""

import dataclasses
import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

import mirl
from mirl import UserError, flag, say

# Everything that a recipe sets; the flags override it.
RECIPES = {
    # the embedded data set, in minutes on a laptop
    "quick": dict(
        model="vit_nano",
        data="shapes",
        epochs=12,
        warmup_epochs=1,
        batch_size=64,
        base_lr=8e-3,
        picture_every=4,
    ),
    "cifar10": dict(
        model="vit_ti",
        data="cifar10",
        epochs=200,
        warmup_epochs=10,
        batch_size=512,
        base_lr=5e-4,
        picture_every=20,
    ),
    # [S A.1, Table 1]
    "imagenet": dict(
        model="vit_b",
        data="data/imagenet",
        epochs=300,
        warmup_epochs=20,
        batch_size=4096,
        base_lr=1.5e-4,
        picture_every=20,
    ),
}


@dataclass
class Args(mirl.TrainingFlags):
    recipe: str = flag(
        "quick", "sets every flag below that names a value by recipe", tuple(RECIPES)
    )
    method: str = flag("mirl", "mirl, or mae: one segment and one plain decoder", ("mirl", "mae"))
    model: str | None = flag(None, f"the encoder: {', '.join(mirl.MODELS)}")
    data: str | None = flag(
        None, "shapes (embedded), cifar10, cifar100 (downloaded), or a folder of images"
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
    )
    loss: str = flag(
        "mirl", "mirl, or dagger: the main components' own loss is added", ("mirl", "dagger")
    )
    omega: float = flag(1.0, "weight of what --loss dagger adds; 0.1 is gentler")
    feature_weight: float = flag(
        0.0, "weight of a feature-level loss at the end of the encoder (InfoNCE); 0: none"
    )
    feature_negatives: str = flag(
        "batch",
        "the other images on the devices at a time, so accumulation makes them fewer; or none",
        ("batch", "none"),
    )
    vgg_weight: float = flag(0.0, "weight of the loss of VGG-16's activations; 0: none")
    vgg_checkpoint: str | None = flag(
        None, "a file with torchvision's vgg16 state dict; default: downloaded"
    )
    log_grad_norms: bool = flag(False, "also log the norms of every block's gradients")
    plot: tuple[str, ...] | None = flag(
        None,
        "train nothing; draw losses and logged gradient norms of the runs in these folders into "
        "--out (default: the first of them); needs pip install -e '.[plot]'",
    )
    picture_every: int | None = flag(None, "epochs between two pictures; 0: at the end alone")
    picture_pair: int = flag(1, "which pair the pictures show, 1 (outermost) to G/2")


def parse(argv: list[str] | None = None) -> Args:
    args = mirl.parse_flags(Args, argv, __doc__, RECIPES)
    zero = ("picture_every", "truncate", "omega", "feature_weight", "vgg_weight")
    mirl.check_range(args, **dict.fromkeys(zero, 0))
    mirl.settle(args, args.plot[0] if args.plot else f"runs/{args.method}-{args.recipe}")
    return args


def model_config(args: Args) -> mirl.Config:
    names = ("mask_ratio", "image_size", "patch_size", "segments", "dense", "weight_norm")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.method == "mae":
        if given.get("segments", 1) != 1 or given.get("dense"):
            raise UserError("--method mae is one segment without dense connections by definition")
        given = mirl.mae_overrides(args.model) | given
    config = mirl.model_config(args.model, **given)
    if args.truncate >= config.depth:
        raise UserError(f"--truncate {args.truncate} leaves none of the {config.depth} blocks")
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
    vgg = mirl.vgg_layers(args.vgg_checkpoint).to(device) if objectives.vgg else None
    return mirl.ExtendedMIRL(config, objectives, vgg).to(device)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.plot:
        return plot(args.plot, Path(args.out))
    with mirl.interruptible(args.out), mirl.processes(args.device) as device:
        mirl.check_out(args.out, args.resume)
        mirl.check_machine(args, device)
        torch.manual_seed(args.seed)  # the same initial weights in every process
        config = model_config(args)
        model = new_model(args, config, device)
        if not 1 <= args.picture_pair <= max(1, config.segments // 2):
            raise UserError(
                f"--picture-pair {args.picture_pair}: the model has {max(1, config.segments // 2)}"
            )

        limit = max(1, 256 * 196 // config.num_patches)
        split = mirl.split_batch(args.batch_size, args.device_batch_size, limit)
        data = mirl.load_data(args.data, args.data_dir, "train")
        args.workers = mirl.pick_workers(args.workers)
        loader = mirl.PretrainLoader(data, config.image_hw, split, args.seed, device, args.workers)
        shown = mirl.fixed_images(
            mirl.load_data(args.data, args.data_dir, "val"), config.image_hw, count=8
        ).to(device)

        groups = mirl.parameter_groups(model, args.lr, args.weight_decay)
        trainer = mirl.Trainer(model, args, groups, (0.9, 0.95), loader.shares, data, device)
        trainer.announce(f"{args.method} {args.model}")
        if args.feature_weight:
            trainer.after_step = lambda: model.update_momentum(
                mirl.feature_momentum(trainer.step / trainer.steps, args.epochs)
            )
        if args.log_grad_norms:
            trainer.diagnose = lambda: {
                f"grad_{kind}": norms for kind, norms in mirl.gradient_norms(model.encoder).items()
            }
        for epoch in trainer.epochs():
            for images in loader.epoch(epoch):
                with trainer.forward():
                    out = trainer.model(images)
                pairs = {f"loss_{g}": loss for g, loss in enumerate(out.losses, start=1)}
                trainer.backward(out.loss, pairs | out.terms)
                del out  # its predictions, before the next ones are made
            trainer.end_epoch(epoch, corrupt_files=len(loader.corrupt))
            if args.picture_every and (epoch + 1) % args.picture_every == 0:
                draw(model, shown, args, f"epoch-{epoch + 1:04d}.png")

        if mirl.is_main():
            mirl.save_file(trainer.out / "encoder.pt", mirl.portable(model.encoder))
        draw(model, shown, args, "reconstruction.png")
        say(
            f"done: {trainer.out / 'encoder.pt'} for fine-tuning, and a picture to look at, "
            f"{trainer.out / 'reconstruction.png'} (columns: ground truth, masked, reconstruction, "
            "residual, main component)"
        )


@torch.no_grad()
def draw(model: mirl.MIRL, images: torch.Tensor, args: Args, name: str) -> None:
    """One row of five panels an image, under the same masks every time. [S C, Figure 1]"""
    if not mirl.is_main():
        return
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(images), model.config.num_patches, generator=generator)
    # around torch.compile's shapes, and around objectives that need the other processes
    out = mirl.MIRL.forward(model, images, noise.to(images.device))
    pictures = mirl.panels(images, out, model.config.patch_size, args.picture_pair)
    pictures = pictures.flatten(0, 1).cpu()  # (8·5, C, H, W)
    zoom = max(1, 96 // max(images.shape[2:]))  # so that small images can be seen
    grid = make_grid(F.interpolate(pictures, scale_factor=zoom), nrow=5, padding=4, pad_value=1)
    with mirl.replacing(Path(args.out) / name) as temporary:
        save_image(grid, temporary)


def plot(runs: tuple[str, ...], out: Path) -> None:
    """losses.png, and gradients.png of the runs that logged gradient norms. [S C, Figure 2]

    Figure 2's rows are blocks 19 to 22 of 24: here the same four from the end.
    """
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs an extra: pip install -e '.[plot]'")
    from matplotlib.figure import Figure

    steps, kinds = {}, ("qkv", "mlp", "norm", "proj")
    for run in runs:
        path = Path(run) / "metrics.jsonl"
        if not path.exists():
            raise UserError(f"--plot {run}: there is no {path}")
        config = json.loads((Path(run) / "config.json").read_text())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        label = f"{Path(run).name} ({config['method']} {config['model']})"
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
    with mirl.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


if __name__ == "__main__":
    mirl.run_script(main)
