"""What segmentation and detection share: the ViT as a pyramid, the scenes, pictures of results."""

import functools
import json
import math
import tempfile
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
    max pooling bring the maps to the strides, as in BEiT. The ViT loses its norm. Raises UserError
    for another pool than "none", another patch or size, or fewer than 6 blocks.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        c = vit.config
        require(c.pool == "none", f"maps are made by a ViT with the pool none, not {c.pool}")
        require(c.depth >= 6, f"four maps need an encoder of at least 6 blocks, not {c.depth}")
        require(c.patch_size in (4, 8, 16), f"--patch-size {c.patch_size} must be 4, 8 or 16")
        self.vit = vit
        vit.norm = nn.Identity()
        self.ends = [c.depth * k // 6 for k in (2, 3, 4, 6)]  # after how many blocks
        up = functools.partial(nn.ConvTranspose2d, c.width, c.width, kernel_size=2, stride=2)
        scales = {  # from one pixel a patch to strides 4, 8, 16, 32
            16: [nn.Sequential(up(), nn.BatchNorm2d(c.width), nn.GELU(), up()), up(), 1, 2],
            8: [up(), 1, 2, 4],
            4: [1, 2, 4, 8],
        }[c.patch_size]
        self.rescale = nn.ModuleList(nn.MaxPool2d(s) if isinstance(s, int) else s for s in scales)

    def forward(self, images: Tensor) -> list[Tensor]:
        P, (H, W) = self.vit.config.patch_size, images.shape[2:]
        require(
            min(H, W) >= 32 and H % P == W % P == 0,
            f"images of {H}x{W} must divide into patches of {P}, with sides of at least 32 pixels",
        )
        own, new, table = self.vit.config.grid, (H // P, W // P), self.vit.pos_embed
        positions = table if new == own else resize_positions(table, own, new)  # (1, 1+N, D)
        x = self.vit.patch_embed(patchify(images, P)) + positions[:, 1:]  # (B, N, D)
        cls = (self.vit.cls_token + positions[:, :1]).expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls, x], dim=1)
        maps = []
        for k, block in enumerate(self.vit.blocks, start=1):
            x = block(x)
            if k in self.ends:
                maps.append(rearrange(x[:, 1:], "b (h w) d -> b d h w", h=H // P))
        return [rescale(x) for rescale, x in zip(self.rescale, maps)]


def data_folder(name: str, data_dir: str) -> Path:
    """The folder that --data names; `scenes` are written into `data_dir` at first use. Raises
    UserError where there is none."""
    root = Path(name)
    if name == "scenes":
        root = Path(data_dir) / name
        with rank_zero_first():
            if not root.exists():
                write_scenes(root)
    require(root.is_dir(), f"--data {name}: there is no such folder; what is embedded is scenes")
    return root


def is_thin(image: Tensor) -> bool:
    """Whether a side of an image (3, h, w) is over 32 times the other, too much to resize."""
    return max(image.shape[1:]) > 32 * min(image.shape[1:])


def read_sized(path: str, size: tuple[int, int]) -> Tensor | None:
    """An image file, uint8 (3, h, w), turned as its EXIF orientation says where it has not the size
    (h, w) of its annotation without. None where it cannot be read, or is thin."""
    for upright in (False, True):
        image = read_image(path, upright)
        if image is None or is_thin(image):
            return None
        if image.shape[1:] == size:
            break
    return image


def annotation_file(folder: Path) -> Path:
    """Where COCO's layout has the annotations of the images in this folder."""
    return folder.parent / "annotations" / f"instances_{folder.name}.json"


def write_scenes(folder: Path) -> None:
    """Write 512 training and 256 validation scenes of `make_scenes` as ADE20K, with the background
    as a class, and COCO have them. The folder appears when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "scenes"
        for split, part in (("train", "training"), ("val", "validation")):
            folders = [whole / x for x in (f"images/{part}", f"{split}2017", f"annotations/{part}")]
            for path in folders:
                path.mkdir(parents=True)
            images, annotations, scenes = [], [], make_scenes(*SCENES[split])
            for i, (image, instances, kinds) in enumerate(zip(*scenes, strict=True), start=1):
                name = f"{i:05d}.png"
                images.append(dict(id=i, file_name=name, height=64, width=64))
                labels = F.pad(kinds + 2, (1, 0), value=1)[instances.int()].byte()
                for path, picture in zip(folders, (image, image, labels), strict=True):
                    TF.to_pil_image(picture).save(path / name)
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
    box = [left, top, right + 1 - left, bottom + 1 - top]
    shape = dict(size=[*mask.shape], counts=[0] * bool(values[0]) + runs.tolist())
    return dict(bbox=box, segmentation=shape, area=int(mask.sum()), iscrowd=0)


def target_of(data: ImageSet, i: int, classes: list[str], image: Tensor) -> Any:
    """The target of image i, whose content this is. Raises UserError where the classes are others,
    or the image is not as its annotation needs it: it may be upright here and not in the data."""
    require(data.classes == classes, f"{data.root} has other classes than the model")
    found = data.read(i)
    same = found is not None and torch.equal(found[0], image)
    require(same, f"{data.name(i)} cannot be read, or is turned or of another size")
    return found[1]


def overlay(
    image: Tensor, masks: Tensor, kinds: list[int], names: list[str], boxes: Tensor | None = None
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
        rows = masks.sum(dim=2).argmax(dim=1).tolist()
        columns = [mask[y].nonzero() for mask, y in zip(masks, rows)]
        places = [(x[len(x) // 2].item(), y) for x, y in zip(columns, rows)]
    else:
        boxes = boxes * scale
        image = draw_bounding_boxes(image, boxes, colors=colors, width=2)
        places = torch.stack([boxes[:, [0, 2]].mean(dim=1), boxes[:, 1]], dim=1).tolist()
    return write(image, names, places)


def write(image: Tensor, names: list[str], places: list[tuple[float, float]]) -> Tensor:
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
    nothing = dict(masks=image[:0], kinds=[], names=[])
    columns = {"image": nothing, "ground truth": truth, "prediction": found}
    panels = {name: overlay(image, **part) for name, part in columns.items() if part}
    return titled(torch.stack([*panels.values()])[None], [*panels])
