"""What segmentation and detection share: the ViT as a pyramid, the scenes, pictures of results."""

import functools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common.data import ImageSet, read_image
from common.distributed import rank_zero_first
from common.pictures import GAP, fitting_font, titled
from common.shapes import SHAPES, make_scenes
from mirl import ViT, patchify, require, resize_positions

SCENES = dict(train=(512, 2), val=(256, 3))  # images and seed

# a colour for each class, grey for the first, a background
PALETTE = ["#a9a9a9", "#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0"]
PALETTE += ["#f032e6", "#bcf60c", "#fabebe", "#008080", "#e6beff", "#9a6324", "#fffac8", "#aaffc3"]


class Pyramid(nn.Module):
    """The plain ViT as a backbone: images (B, C, H, W) -> four maps (B, D, H/4, W/4), …,
    (B, D, H/32, W/32), un-normed, from the blocks at 1/3, 1/2, 2/3 and all of the depth. [S A.2]

    H and W are at least 32 and divide into patches of 16, 8 or 4 pixels. Transposed convolutions or
    max pooling bring the maps to the strides 4, 8, 16 and 32, as in BEiT. The ViT has the pool
    "none", and loses its norm. Raises UserError for another pool, patch or size, or fewer than 6
    blocks.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        c = vit.config
        require(c.pool == "none", f"maps are made by a ViT with the pool none, not {c.pool}")
        require(c.depth >= 6, f"four maps need an encoder of at least 6 blocks, not {c.depth}")
        require(
            c.patch_size in (4, 8, 16),
            f"--patch-size {c.patch_size}: segmentation and detection need patches of 4, 8 or 16",
        )
        self.vit = vit
        vit.norm = nn.Identity()
        self.ends = [c.depth * k // 6 for k in (2, 3, 4, 6)]  # after how many blocks

        def up():
            return nn.ConvTranspose2d(c.width, c.width, kernel_size=2, stride=2)

        scales = {  # from one pixel a patch to strides 4, 8, 16, 32
            16: [nn.Sequential(up(), nn.BatchNorm2d(c.width), nn.GELU(), up()), up(), 1, 2],
            8: [up(), 1, 2, 4],
            4: [1, 2, 4, 8],
        }[c.patch_size]
        self.rescale = nn.ModuleList(nn.MaxPool2d(s) if isinstance(s, int) else s for s in scales)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a grid, (1, 1+N, D): the model's own, or that resized."""
        own, table = self.vit.config.grid, self.vit.pos_embed
        return table if grid == own else resize_positions(table, own, grid)

    def forward(self, images: Tensor) -> list[Tensor]:
        P, (H, W) = self.vit.config.patch_size, images.shape[2:]
        require(
            min(H, W) >= 32 and H % P == W % P == 0,
            f"images of {H}x{W} must divide into patches of {P}, with sides of at least 32 pixels",
        )
        h, w = H // P, W // P
        positions = self.positions((h, w))  # (1, 1+N, D)
        x = self.vit.patch_embed(patchify(images, P)) + positions[:, 1:]  # (B, N, D)
        cls = (self.vit.cls_token + positions[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)
        maps = []
        for k, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if k in self.ends:
                maps.append(rearrange(x[:, 1:], "b (h w) d -> b d h w", h=h))
        return [rescale(x) for rescale, x in zip(self.rescale, maps)]


# (B, D, h, w) and a size -> (B, D, *size)
resize_maps = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


def data_folder(name: str, data_dir: str) -> Path:
    """The folder that --data names; `scenes` are written into `data_dir` at first use. Raises
    UserError where there is none."""
    root = Path(name)
    if name == "scenes":
        root = Path(data_dir) / name
        with rank_zero_first():
            if not root.exists():
                write_scenes(root)
    require(root.is_dir(), f"--data {name}: there is no such folder (and the name is scenes)")
    return root


def is_thin(image: Tensor) -> bool:
    """Whether a side of an image (3, h, w) is over 32 times the other: resized, one of them would
    vanish, or the other fill the memory."""
    return max(image.shape[1:]) > 32 * min(image.shape[1:])


def read_sized(path: str, size: tuple[int, int]) -> Tensor | None:
    """An image file, uint8 (3, h, w), turned as its EXIF orientation says where only that gives it
    the size (h, w) of its annotation. None where it cannot be read, or is thin."""
    image = read_image(path)
    if image is not None and image.shape[1:] != size:
        turned = read_image(path, upright=True)
        image = turned if turned is not None and turned.shape[1:] == size else image
    return None if image is None or is_thin(image) else image


def annotation_file(folder: str | Path) -> Path:
    """Where COCO's layout has the annotations of the images in this folder."""
    folder = Path(folder)
    return folder.parent / "annotations" / f"instances_{folder.name}.json"


def write_scenes(folder: Path) -> None:
    """Write 512 training and 256 validation scenes of `make_scenes` as ADE20K, with the background
    as a class, and COCO have them. The folder appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "scenes"
        for split, part in (("train", "training"), ("val", "validation")):
            scenes = make_scenes(*SCENES[split])
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
            categories = [dict(id=k, name=name) for k, name in enumerate(SHAPES, start=1)]
            content = dict(images=images, annotations=annotations, categories=categories)
            annotation_file(whole / f"{split}2017").write_text(json.dumps(content))
        (whole / "classes.txt").write_text("\n".join(("background", *SHAPES)) + "\n")
        if not folder.exists():  # another run may have been faster
            whole.rename(folder)


def annotation(mask: Tensor) -> dict:
    """What COCO's files say about an object's mask, bool (h, w)."""
    left, top, right, bottom = masks_to_boxes(mask[None])[0].int().tolist()
    # runs of zeros and ones in turn, column by column; zeros come first, be they none
    values, runs = mask.T.flatten().unique_consecutive(return_counts=True)
    return dict(
        bbox=[left, top, right + 1 - left, bottom + 1 - top],
        segmentation=dict(size=[*mask.shape], counts=[0] * bool(values[0]) + runs.tolist()),
        area=int(mask.sum()),
        iscrowd=0,
    )


def target_of(data: ImageSet, i: int, classes: list[str], image: Tensor) -> Any:
    """The target of image i, whose content this is. Raises UserError where the classes are others,
    or the image is not as its annotation needs it: it may be upright here and not in the data."""
    require(data.classes == classes, f"{data.root} has other classes than the model")
    found = data.read(i)
    same = found is not None and torch.equal(found[0], image)
    require(same, f"{data.name(i)} cannot be read, or is turned or of another size")
    return found[1]


def overlay(
    image: Tensor,
    masks: Tensor,
    kinds: Sequence[int],
    names: Sequence[str],
    boxes: Tensor | None = None,
) -> Tensor:
    """The image, uint8 (3, h, w), enlarged if it is small, with n masks, bool (n, h, w), and boxes,
    float (n, 4), corners in pixels, if any; kinds: which of the PALETTE's colours each has. Its
    name stands on the upper edge of a box, or in a mask, in the middle of the longest row."""
    h, w = image.shape[1:]
    scale = math.ceil(max(512 / max(h, w), 96 / w))
    image, masks = (repeat(x, "n h w -> n (h p) (w q)", p=scale, q=scale) for x in (image, masks))
    if not len(masks):
        return image
    colors = [PALETTE[k % len(PALETTE)] for k in kinds]
    apart = masks & (masks.cumsum(dim=0) == 1)  # else torchvision blackens what several cover
    image = draw_segmentation_masks(image, apart, alpha=0.5, colors=colors)
    if boxes is None:
        rows = masks.sum(dim=2).argmax(dim=1)
        columns = [mask[y].nonzero()[mask[y].sum() // 2] for mask, y in zip(masks, rows)]
        places = torch.stack([torch.cat(columns), rows], dim=1)
    else:
        boxes = boxes * scale
        image = draw_bounding_boxes(image, boxes, colors=colors, width=2)
        places = torch.stack([boxes[:, [0, 2]].mean(dim=1), boxes[:, 1]], dim=1)
    return write(image, names, places.tolist())


def write(image: Tensor, names: Sequence[str], places: Sequence[tuple[float, float]]) -> Tensor:
    """The image, uint8 (3, h, w), with names around their places (x, y), moved to be all inside."""
    picture = TF.to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    font = fitting_font(names, min(picture.size) - 2 * GAP)
    for name, place in zip(names, places, strict=True):
        half = font.getlength(name) / 2 + GAP, 0.65 * font.size
        x, y = (min(max(p, m), side - m) for p, m, side in zip(place, half, picture.size))
        outline = math.ceil(font.size / 16)
        draw.text((x, y), name, "white", font, "mm", stroke_width=outline, stroke_fill="black")
    return TF.pil_to_tensor(picture)


def compared(image: Tensor, truth: dict | None, found: dict) -> Image.Image:
    """An image, uint8 (3, h, w), what is on it, if that is known, and what was found, side by side;
    both as `overlay` takes them."""
    panels = {"image": overlay(image, image[:0], [], [])}
    if truth:
        panels["ground truth"] = overlay(image, **truth)
    panels["prediction"] = overlay(image, **found)
    return titled(torch.stack([*panels.values()])[None], [*panels])
