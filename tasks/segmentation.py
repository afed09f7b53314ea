"""Semantic segmentation: UperNet, ADE20K's layout, and the mean IoU of the classes. [S A.2]

The layout: images/{training,validation}/*.jpg and annotations/{training,validation}/*.png of the
same names, with a label for each pixel: 1 … K, or 0 ("other") or 255 where it counts for nothing.
The classes' names are the lines of classes.txt, or the last column of ADE20K's own
objectInfo150.txt; where there is neither, there are 150 classes.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from common.data import SMALL, ImageSet, batches, file_names, files_in, normalise_images, warn
from common.distributed import autocast, gather, say
from mirl import Config, ViT, at_least_float32, require
from tasks.classification import GREY, Classification, wanted_images
from tasks.dense import Pyramid, data_folder, read_sized, target_of

IGNORED = 255  # the label of pixels that count for nothing
# (B, D, h, w) and a size -> (B, D, *size)
resize_maps = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


class Segmentation(Classification):
    """What --task segment decides around the loop of train_finetune.py."""

    best = "miou"

    def data(self, split: str) -> ImageSet:
        """As in `Classification`. Raises UserError where no pixel counts; before a training, for
        any wrong label of the validation."""
        data = load_ade20k(data_folder(self.args.data, self.args.data_dir), split)
        data = wanted_images(data, self.args, split)
        pairs = filter(None, map(data.read, range(len(data))))
        counts = ((labels != IGNORED).any() for _, labels in pairs)
        if split == "val" and not self.args.eval:
            counts = [*counts]  # reads them all, and not up to the first that counts
        require(
            any(counts),
            f"--data {self.args.data}: no pixel of {split} counts: its annotations hold nothing "
            f"but 0 and {IGNORED}, and the classes are 1 to {len(data.classes)}",
        )
        return data

    def model(self, vit: ViT, classes: int, head_width: int | None) -> nn.Module:
        return UperNet(vit, classes, head_width)

    def transform(self, config: Config, training: bool) -> Callable:
        return segment_transform(min(config.image_hw), training)

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with autocast(self.device, self.dtype):
            out = model(images)  # of (B, classes, H, W)
        return dict(loss=segmentation_loss(out, labels.long()))

    def segment(self, model: nn.Module, image: Tensor, size: tuple[int, int]) -> Tensor:
        """The class of each pixel, int64 (*size), of an image, float32 (3, H, W)."""
        window = min(model.config.image_hw)
        slide = functools.partial(slide_inference, size=window, stride=window * 2 // 3)
        infer = slide if self.args.slide else whole_inference
        with autocast(self.device, self.dtype):
            # by __call__, torch.compile would compile once more
            logits = resize_maps(infer(model.forward, image[None]).float(), size)
        return logits.argmax(dim=1)[0]

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module], loader: DataLoader) -> list[dict[str, float]]:
        """Each model's `segmentation_scores` at the labels' own size, over all processes."""
        classes = len(loader.dataset.data.classes)
        matrices = torch.zeros(len(models), classes, classes, dtype=torch.int64, device=self.device)
        for model in models:
            model.eval()
        for images, labels in batches(loader, self.device):
            for image, truth in zip(images, labels, strict=True):  # singly: logits are large
                for model, matrix in zip(models, matrices, strict=True):
                    if truth is not None:  # the image and its labels could be read
                        found = self.segment(model, image, truth.shape)
                        matrix += confusion_matrix(found, truth, classes)
        return [segmentation_scores(matrix) for matrix in sum(gather(matrices.cpu()))]

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> dict:
        x = normalise_images(self.transform(model.config, training=False)(image))
        labels = self.segment(model, x.to(self.device), image.shape[1:]).cpu()
        found = regions(labels, classes)
        for name, mask in zip(found["names"], found["masks"], strict=True):
            say(f"  {100 * mask.float().mean():5.1f} %  {name}")
        return found

    def truth(self, path: str, classes: list[str], image: Tensor) -> dict | None:
        """What `overlay` draws of the labels of an image file with this content, where the layout
        of this file's first lines has any. Raises UserError as `target_of` and the reader do."""
        folder = Path(os.path.abspath(path)).parent
        root, name = folder.parent.parent, f"{folder.name}/{Path(path).name}"
        labels = (root / "annotations" / name).with_suffix(".png")
        if folder.parent.name != "images" or not labels.is_file():
            return None
        data = ADE20K(file_names([name]), torch.tensor([-1]), class_names(root), str(root))
        return regions(target_of(data, 0, classes, image), classes)


def regions(labels: Tensor, classes: list[str]) -> dict:
    """The mask of each class in labels (h, w), and its name, as `overlay` takes them."""
    kinds = labels[labels != IGNORED].unique()
    names = [classes[k] for k in kinds]
    return dict(masks=labels == kinds[:, None, None], kinds=kinds.tolist(), names=names)


class ADE20K(ImageSet):
    """Images, names below <root>/images, and a label for each of their pixels."""

    def name(self, i: int) -> str:
        return f"{self.root}/images/{os.fsdecode(self.images[i])} or its annotation"

    def read(self, i: int) -> tuple[tv_tensors.Image, tv_tensors.Mask] | None:
        """Image i, uint8 (3, h, w), and labels, uint8 (h, w), 0 … K − 1 or 255; None where one
        cannot be read. Raises UserError for other labels, or a map of another size."""
        name = os.fsdecode(self.images[i])
        map_path = f"{self.root}/annotations/{os.path.splitext(name)[0]}.png"
        try:
            with Image.open(map_path) as file:
                labels = TF.pil_to_tensor(file).long()
        except Exception:  # PIL raises nearly anything on a broken file
            return None
        image = read_sized(f"{self.root}/images/{name}", labels.shape[1:])
        if image is None:
            return None
        shapes = tuple(labels.shape), (1, *image.shape[1:])
        what = "{} is no map of one label for each pixel of its image: it is {}, and not {}"
        require(shapes[0] == shapes[1], what.format(map_path, *shapes))
        ignored, classes = (labels == 0) | (labels == IGNORED), len(self.classes)
        wrong = labels[(labels > classes) & ~ignored][:1].tolist()
        allowed = f"the classes are 1 to {classes}, and 0 or {IGNORED} count for nothing"
        require(not wrong, f"{map_path} has the label {wrong}: {allowed}")
        labels = (labels - 1).masked_fill(ignored, IGNORED)[0].to(torch.uint8)
        return tv_tensors.Image(image), tv_tensors.Mask(labels)


def load_ade20k(root: Path, split: str) -> ADE20K:
    """A split, as this file's first lines say. Raises UserError where images and annotations do not
    belong together."""
    part = dict(train="training", val="validation")[split]
    images, maps = root / "images" / part, root / "annotations" / part
    image_of, twins = {}, []
    for name in files_in(images):
        if image_of.setdefault(os.path.splitext(name)[0], name) != name:
            twins.append(name)
    warn(images, "files with the name of another one but for its ending left out", twins)
    stems = {name.removesuffix(".png") for name in files_in(maps, (".png",))}
    require(image_of, f"--data {root}: {images} holds no images")
    lone = sorted(image_of.keys() ^ stems)[:1]
    require(not lone, f"--data {root}: {lone} is not in both {images} and {maps} (.png)")
    names = file_names([os.path.join(part, name) for name in image_of.values()])
    return ADE20K(names, torch.full((len(names),), -1), class_names(root), str(root))


def class_names(root: Path) -> list[str]:
    """As this file's first lines say. Raises UserError where there are none or too many."""
    classes = [f"class {k}" for k in range(1, 151)]
    for path in (root / "objectInfo150.txt", root / "classes.txt"):  # the latter wins
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            lines = [x for x in lines if x.strip() and not x.startswith("Idx\t")]
            classes = [x.split("\t")[-1].strip() for x in lines]
            require(0 < len(classes) < IGNORED, f"{path} must name 1 to {IGNORED - 1} classes")
    return classes


class VariedCrop(v2.RandomCrop):
    """A random crop, drawn anew up to ten times while one class covers over 75 % of its labels."""

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

    In training the short side becomes `size` times a draw from [0.5, 2], for sizes up to 64 `size`;
    then a crop of size × size, whose missing pixels are grey and ignored, a flip, and changes of
    brightness, contrast, saturation and hue, each with probability 1/2. In validation the image's
    short side becomes `size`, the long one at most four times that, and the labels stay.
    """
    if not training:
        # of two plain tensors v2 takes the first for the image, and leaves the other alone
        return v2.Compose([v2.ToPureTensor(), v2.Resize(size, max_size=4 * size)])
    scale = v2.Resize(size)
    if size > SMALL:
        scale = v2.RandomShortestSize(range(size // 2, 2 * size + 1), max_size=8 * size)
    fill = {tv_tensors.Image: GREY, tv_tensors.Mask: IGNORED}
    crop = VariedCrop(size, pad_if_needed=True, fill=fill)
    strengths = dict(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.1)
    distortion = [v2.RandomApply([v2.ColorJitter(**{k: s})]) for k, s in strengths.items()]
    moves = [scale, crop, v2.RandomHorizontalFlip()]
    return v2.Compose([*moves, *distortion, v2.ToPureTensor()])


class UperNet(nn.Module):
    """A pyramid, and the UperNet head on it, of `width` channels, default D: images (B, C, H, W) ->
    logits, float32 (B, classes, H, W); in training a dict, "out" and the auxiliary head's "aux".

    The coarsest map is pooled to 1, 2, 3 and 6 cells a side; what that gives flows down into the
    finer maps, and all together are classified. The auxiliary head sees the third map alone.
    Training needs two images, because 1 × 1 cells of one have no variance.
    """

    def __init__(self, vit: ViT, num_classes: int, width: int | None = None):
        super().__init__()
        self.config = vit.config
        D, d = vit.config.width, width or vit.config.width
        conv = Conv2dNormActivation  # without bias, then batch norm and ReLU
        self.pyramid = Pyramid(vit)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), conv(D, d, 1)) for n in (1, 2, 3, 6)
        )
        self.top = conv(D + 4 * d, d, 3)
        self.laterals = nn.ModuleList(conv(D, d, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(d, d, 3) for _ in range(3))
        self.fuse = conv(4 * d, d, 3)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(d, num_classes, 1))
        a = min(256, d)
        self.aux = nn.Sequential(conv(D, a, 3), nn.Dropout2d(0.1), nn.Conv2d(a, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        maps = self.pyramid(images)  # 4 of (B, D, H/s, W/s), s = 4, 8, 16, 32
        pooled = [resize_maps(pool(maps[3]), maps[3].shape[2:]) for pool in self.pools]
        x = self.top(torch.cat([maps[3], *pooled], dim=1))  # (B, d, H/32, W/32)
        fused = [x]
        for k in (2, 1, 0):  # top down
            lateral = self.laterals[k](maps[k])
            x = lateral + resize_maps(x, lateral.shape[2:])
            fused.insert(0, self.smooth[k](x))
        fused = [resize_maps(x, maps[0].shape[2:]) for x in fused]  # 4 of (B, d, H/4, W/4)
        logits = self.head(self.fuse(torch.cat(fused, dim=1)))
        out = resize_maps(at_least_float32(logits), images.shape[2:])
        if not self.training:
            return out
        aux = at_least_float32(self.aux(maps[2]))
        return dict(out=out, aux=resize_maps(aux, images.shape[2:]))


def segmentation_loss(out: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of `UperNet`'s logits plus 0.4 times the auxiliary head's, a scalar; labels:
    int64 (B, H, W). The mean is over all pixels, and an ignored one counts as 0, as in the
    references; an image without labels is then no division by zero."""
    loss = functools.partial(F.cross_entropy, target=labels, ignore_index=IGNORED, reduction="none")
    return loss(out["out"]).mean() + 0.4 * loss(out["aux"]).mean()


def whole_inference(model: Callable, images: Tensor) -> Tensor:
    """Logits (B, classes, H, W) of images (B, 3, H, W), padded with zeros, ImageNet's mean, to
    sides that `Pyramid` takes, multiples of 32."""
    h, w = images.shape[2:]
    return model(F.pad(images, (0, -w % 32, 0, -h % 32)))[:, :, :h, :w]


def slide_inference(model: Callable, images: Tensor, size: int, stride: int) -> Tensor:
    """Logits (B, classes, H, W): the mean over windows of `size` that cover images (B, 3, H, W).
    The last window of a row or column ends at the edge, as in mmsegmentation."""

    def starts(length: int) -> list[int]:
        last = max(length - size, 0)
        return [min(start, last) for start in range(0, last + stride, stride)]

    h, w = images.shape[2:]
    total, windows = 0, images.new_zeros(h, w)
    for top in starts(h):
        for left in starts(w):
            window = images[:, :, top : top + size, left : left + size]
            y, x = window.shape[2:]
            logits = whole_inference(model, window).float()
            total = total + F.pad(logits, (left, w - left - x, top, h - top - y))
            windows[top : top + y, left : left + x] += 1
    return total / windows


def confusion_matrix(prediction: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many pixels of each class (rows) are taken for which (columns), int64 (C, C).

    prediction: int64, labels: integers of the same shape; those of 255 do not count.
    """
    labels = labels.long()
    cells = torch.where(labels == IGNORED, classes**2, labels * classes + prediction).flatten()
    # torch.bincount would wait for the device
    counts = cells.new_zeros(classes**2 + 1).scatter_add_(0, cells, torch.ones_like(cells))
    return counts[:-1].view(classes, classes)


def segmentation_scores(matrix: Tensor) -> dict[str, float]:
    """Of a `confusion_matrix` the means over the classes of IoU and of accuracy, and the pixels'
    accuracy, in percent. A class that is nowhere does not count."""
    matrix = matrix.double()
    hits, truth, found = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou, recall = hits / (truth + found - hits), hits / truth
    scores = dict(miou=iou.nanmean(), macc=recall.nanmean(), aacc=hits.sum() / truth.sum())
    return {name: 100 * score.item() for name, score in scores.items()}
