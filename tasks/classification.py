"""Classification: augmentation, labelled images, loss and measure."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from common.data import SMALL, ImageSet, batches, center_crop, load_data, normalise_images, seed_of
from common.distributed import autocast, gather, pick_dtype, say
from mirl import IMAGENET_MEAN, Config, ViT, require

GREY = [round(255 * m) for m in IMAGENET_MEAN]  # where an image is moved away, or too small


class Classification:
    """What --task decides around the loop of train_finetune.py; other tasks derive from it."""

    best = "top1"  # the score by which the best model is chosen

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.dtype = pick_dtype(args.dtype, device)

    def data(self, split: str) -> ImageSet:
        """The images of a split, "train" or "val", with their targets, as many as wanted. Raises
        UserError where there are none, or fewer."""
        args = self.args
        data = load_data(args.data, args.data_dir, split)
        keep = (data.labels >= 0).nonzero()[:, 0]
        why = "have no labels, which are the folders train/<class>/ and val/<class>/"
        require(len(keep), f"--data {args.data}: the {split} images {why}")
        if left := len(data) - len(keep):
            say(f"warning: {left} {split} images are in no folder of a class in train/: left out")
            data = data.select(keep)
        return wanted_images(data, args, split)

    def model(self, vit: ViT, classes: int, head_width: int | None) -> nn.Module:
        """The ViT with what the task adds to it; the classifier is a ViT's own head."""
        kinds = ((v2.MixUp, self.args.mixup), (v2.CutMix, self.args.cutmix))
        choices = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
        # one of them a batch, with probability 1/2 each, and one λ [S A.1]
        self.mix = v2.RandomChoice(choices) if choices else v2.Identity()
        return vit

    def transform(self, config: Config, training: bool) -> Callable:
        """What is done to an image, uint8 (3, h, w) -> (3, *size), before it is in a batch.

        In training [S A.1, Table 2] a random and resized crop (area 0.08 to 1), or, for sizes up to
        64, the whole image, padded by an eighth and cropped at random; then a flip, and RandAug.
        """
        size, randaug = config.image_hw, self.args.randaug
        if not training:
            return center_crop(size)
        crop = [v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)]
        if min(size) <= SMALL:
            crop = [center_crop(size), v2.RandomCrop(size, padding=min(size) // 8)]
        augment = RandAugment(randaug) if randaug else v2.Identity()
        return v2.Compose([*crop, v2.RandomHorizontalFlip(), augment])

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """ "loss", to be minimised, and its terms to be logged, scalars, of normalised images,
        float32 (B, 3, H, W), and their labels, int64 (B,)."""
        if self.args.erasing:  # by pixel noise, image by image [R]
            erase = v2.RandomErasing(self.args.erasing, value="random")
            images = torch.stack([erase(image) for image in images])
        images, targets = self.mix(images, labels)  # (B, classes), where it mixes
        with autocast(self.device, self.dtype):
            logits = model(images)  # (B, classes)
        smoothing = self.args.label_smoothing
        return dict(loss=F.cross_entropy(logits.float(), targets, label_smoothing=smoothing))

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module], loader: DataLoader) -> list[dict[str, float]]:
        """Each model's top-1 and top-5 in percent and mean cross-entropy, over all processes. An
        image counts once, and one that cannot be read not at all. Leaves models in eval mode."""
        for model in models:
            model.eval()
        mine = torch.zeros(len(models), 4, device=self.device)
        for images, labels in batches(loader, self.device):
            with autocast(self.device, self.dtype):
                # by __call__, torch.compile would compile once more
                logits = [model.forward(images) for model in models]
            mine += torch.stack([score(x.float(), labels) for x in logits])
        totals = sum(gather(mine.cpu().double()))
        return [
            dict(top1=100 * top1 / n, top5=100 * top5 / n, val_loss=loss / n, val_images=int(n))
            for top1, top5, loss, n in totals.tolist()
        ]

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> dict | None:
        """Print what the model sees in an image, uint8 (3, h, w); returns what can be drawn."""
        x = normalise_images(self.transform(model.config, training=False)(image))
        probabilities = model(x[None].to(self.device))[0].softmax(dim=0)
        top = probabilities.topk(min(5, len(classes)))
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            say(f"  {100 * p:5.1f} %  {classes[i]}")


def score(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over images with a label: first guess right, one of five right, cross-entropy, 1: (4,).
    logits: float32 (B, classes); labels: int64 (B,), −1 where there is none."""
    hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, (labels >= 0).sum()])


def wanted_images(data: ImageSet, args: argparse.Namespace, split: str) -> ImageSet:
    """As many as --train-images, drawn by --seed, or --val-images, the same in every run. Raises
    UserError for too many."""
    wanted = getattr(args, f"{split}_images")
    if wanted is None:
        return data
    require(wanted <= len(data), f"--{split}-images {wanted}: there are {len(data)}")
    seed = seed_of("images", args.seed if split == "train" else 0)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.select(order[:wanted])


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


@dataclass
class RandAugment:
    """RandAug (magnitude, 0.5) as the paper's recipe means it, uint8 (3, H, W). [S A.1, Table 2]

    Two operations an image, each applied with probability 1/2, at a magnitude drawn from
    N(magnitude, 0.5) on a scale of 0 to 10. In torchvision's RandAugment(2, 9) 9 is one of 31 bins,
    about 30 %, and both operations always apply.
    """

    magnitude: float

    def __call__(self, image: Tensor) -> Tensor:
        for _ in range(2):
            name = list(AUGMENTATIONS)[torch.randint(len(AUGMENTATIONS), ()).item()]
            if torch.rand(()) < 0.5:
                drawn = self.magnitude + 0.5 * torch.randn(()).item()
                image = AUGMENTATIONS[name](image, min(max(drawn / 10, 0.0), 1.0))
        return image
