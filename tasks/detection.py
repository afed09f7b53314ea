"""Detection: Mask R-CNN, COCO's layout, and the average precision of boxes and masks. [S A.2]

The layout: {train,val}2017/*.jpg and annotations/instances_{train,val}2017.json. Categories become
the labels 1 … K in the order of their ids. Training images without any annotation are left out
(117,266 of COCO's stay), of the others objects that are crowds or narrower than a pixel; and, with
a word, objects that are not `usable` and images that the file does not list. An object needs no id,
area or `iscrowd`.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.models import detection
from torchvision.ops import FeaturePyramidNetwork, box_convert, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from common.data import SMALL, ImageSet, batches, file_names, files_in, normalise_images, warn
from common.distributed import RANK, autocast, gather, say
from mirl import Config, UserError, ViT, at_least_float32, require
from tasks.classification import Classification, wanted_images
from tasks.dense import Pyramid, annotation_file, data_folder, read_sized, target_of

with contextlib.suppress(ImportError):  # Detection says what to install
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval


class Detection(Classification):
    """What --task detect decides around the loop of train_finetune.py."""

    best = "mask_ap"

    def __init__(self, args: argparse.Namespace, device: torch.device):
        there = importlib.util.find_spec("pycocotools")
        require(there, "--task detect needs pycocotools: pip install -e '.[coco]'")
        super().__init__(args, device)

    def data(self, split: str) -> ImageSet:
        """As in `Classification`. Raises UserError where no object counts."""
        args = self.args
        data = load_coco(data_folder(args.data, args.data_dir), split)
        data = wanted_images(data, args, split)
        require(
            any(not x["iscrowd"] for i in range(len(data)) for x in data.item(i)[1]),
            f"--data {args.data}: none of the {len(data)} {split} images has an object that "
            "counts: it is no crowd, and has a segmentation and a box of a pixel or more",
        )
        return data

    def model(self, vit: ViT, classes: int, head_width: int | None) -> nn.Module:
        size = min(vit.config.image_hw)
        sizes = tuple(range(size, size * 3 // 5 - 1, -32))[::-1]  # of 800: 480, 512, …, 800
        fewer = {}
        if size <= SMALL:  # torchvision's are for large images
            fewer = dict(rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100)
            fewer |= dict(box_batch_size_per_image=64)
        width, longest = head_width or 256, size * 5 // 3
        return mask_rcnn(vit, 1 + classes, sizes, longest, width, self.dtype, **fewer)

    def transform(self, config: Config, training: bool) -> Callable:
        """(image, objects) -> the same, in training flipped at random; the model resizes."""
        flip = v2.RandomHorizontalFlip() if training else v2.Identity()
        return v2.Compose([flip, v2.ToPureTensor()])

    def losses(self, model: nn.Module, images: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        terms = model(list(images), targets)
        return dict(loss=sum(terms.values()), **terms)

    @torch.no_grad()
    def evaluate(self, models: list[nn.Module], loader: DataLoader) -> list[dict[str, float]]:
        """Each model's `coco_scores`, over all processes."""
        found = [[] for _ in models]
        for model in models:
            model.eval()
        for images, targets in batches(loader, self.device):
            for model, results in zip(models, found, strict=True):
                # by __call__, torch.compile would compile once more
                for output, target in zip(model.forward(list(images)), targets, strict=True):
                    if target is not None:  # the image could be read
                        results.append((target["image_id"], detections(output)))
        parts, data = zip(*gather(found)), loader.dataset.data  # of each model, of each process
        scores = [coco_scores([*chain(*part)], data) for part in parts] if RANK == 0 else []
        return gather(scores)[0]

    def tell(self, model: nn.Module, classes: list[str], image: Tensor) -> dict:
        found = model([normalise_images(image.to(self.device))])[0]
        found = {k: v[found["scores"] > 0.5].cpu() for k, v in found.items()}
        drawn = drawable(found | dict(masks=found["masks"][:, 0]), classes)
        for i, (share, box) in enumerate(zip(found["scores"].tolist(), found["boxes"])):
            corners = ", ".join(f"{x:.0f}" for x in box)
            say(f"  {100 * share:5.1f} %  {drawn['names'][i]} at ({corners})")
            drawn["names"][i] += f" {share:.0%}"
        return drawn

    def truth(self, path: str, classes: list[str], image: Tensor) -> dict | None:
        """What `overlay` draws of the objects on an image file with this content, where the layout
        of this file's first lines has any. Raises UserError as `target_of` and `load_coco` do."""
        folder, name = Path(os.path.abspath(path)).parent, os.fsencode(os.path.basename(path))
        if not annotation_file(folder).is_file():
            return None
        data = load_coco(folder.parent, folder.name.removesuffix("2017"))
        images = data.images.tolist()
        if name not in images:
            return None
        data = replace(data, training=True)
        return drawable(target_of(data, images.index(name), classes, image), classes)


def drawable(objects: dict, classes: list[str]) -> dict:
    """What `overlay` takes, of objects: masks (n, h, w), labels (n,) from 1 and boxes (n, 4)."""
    kinds = objects["labels"].tolist()
    names = [classes[label - 1] for label in kinds]
    return dict(masks=objects["masks"] > 0.5, kinds=kinds, names=names, boxes=objects["boxes"])


@dataclass
class COCODetection(ImageSet):
    """Images and the objects on them; `images` are names of files in `root`.

    What `item` returns is packed as JSON, and read when it is needed: as Python's objects, COCO's
    860,000 would fill gigabytes in every worker process.
    """

    packed: np.ndarray | None = None  # uint8, all of it
    ends: np.ndarray | None = None  # int64: image i's is from ends[labels[i]] to the next
    training: bool = True  # else the evaluation alone needs the objects, and `read` gives none

    def item(self, i: int) -> tuple[dict, list[dict]]:
        """Image i and its objects as COCO has them, with labels for category ids."""
        k, keys = int(self.labels[i]), ("category_id", "bbox", "segmentation", "iscrowd")
        packed = self.packed[self.ends[k] : self.ends[k + 1]].tobytes()
        image_id, h, w, objects = json.loads(packed)
        objects = [dict(zip(keys, x), image_id=image_id) for x in objects]
        return dict(id=image_id, height=h, width=w), objects

    def name(self, i: int) -> str:
        path, (known, _) = super().name(i), self.item(i)
        image = read_sized(path, (known["height"], known["width"]))
        size = "" if image is None else f" ({image.shape[2]} x {image.shape[1]} pixels)"
        return f"{path}{size} or its annotation ({known['width']} x {known['height']})"

    def read(self, i: int) -> tuple[tv_tensors.Image, dict] | None:
        """Image i, uint8 (3, h, w), and its n objects: boxes float32 (n, 4), corners x, y, x, y,
        masks uint8 (n, h, w), labels int64 (n,) from 1, image_id. None where it cannot be read, or
        has another size than its annotation says."""
        known, objects = self.item(i)
        size = known["height"], known["width"]
        image = read_sized(super().name(i), size)
        if image is None or image.shape[1:] != size:
            return None
        objects = objects if self.training else []
        coco = COCO()
        coco.imgs[known["id"]] = known
        masks = np.array([coco.annToMask(x) for x in objects], np.uint8).reshape(-1, *size)
        boxes = torch.tensor([x["bbox"] for x in objects]).float().view(-1, 4)
        boxes = clip_boxes_to_image(box_convert(boxes, "xywh", "xyxy"), size)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            masks=tv_tensors.Mask(masks),
            labels=torch.tensor([x["category_id"] for x in objects], dtype=torch.int64),
            image_id=known["id"],
        )
        return tv_tensors.Image(image), target

    def truth(self) -> "COCO":
        """The images and objects as COCO's evaluation takes them. The area, here the box's, counts
        only for measures that we do not take."""
        truth = COCO()
        images, objects = zip(*map(self.item, range(len(self))), strict=True)
        objects = [*chain(*objects)]
        for k, x in enumerate(objects, start=1):  # COCOeval takes 0 for no match
            x |= dict(id=k, area=x["bbox"][2] * x["bbox"][3])
        kinds = [dict(id=label, name=name) for label, name in enumerate(self.classes, start=1)]
        # older pycocotools ask for info
        truth.dataset = dict(images=images, annotations=objects, categories=kinds, info={})
        truth.createIndex()
        return truth

    def digest(self) -> str:
        digest = hashlib.sha256(super().digest().encode())
        digest.update(self.packed)
        return digest.hexdigest()


def usable(annotation: dict, h: int, w: int) -> bool:
    """Whether an object of an image of h x w has a box, and polygons of three points or more or run
    lengths of the image's size, and nothing is farther outside of the image than that is large.
    Other input may end pycocotools' process."""
    far = max(h, w)
    try:
        (x, y, width, height), shape = annotation["bbox"], annotation["segmentation"]
        polygons = shape if isinstance(shape, list) else []
        places = [x, y, x + width, y + height, *chain(*polygons)]
        near = -far <= min(places) and max(places) <= 2 * far and math.isfinite(sum(places))
        if not near or min(width, height) < 0:
            return False
        if polygons:
            return all(len(p) >= 6 and len(p) % 2 == 0 for p in polygons)
        counts = shape["counts"] if isinstance(shape["counts"], list) else runs(shape["counts"])
        return [*shape["size"]] == [h, w] and min(counts) >= 0 and sum(map(int, counts)) == h * w
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def runs(packed: str) -> list[int]:
    """The run lengths in COCO's string: five bits a character, the lowest first; from the fourth
    run on the difference to the last but one."""
    counts, number, bits = [], 0, 0
    for code in (ord(character) - 48 for character in packed):
        number, bits = number | (code & 31) << bits, bits + 5
        if not code & 32:  # the last character of a number, whose highest bit is the sign
            number -= (code & 16) << bits - 4
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = bits = 0
    return counts


@functools.lru_cache(maxsize=1)  # for one picture after the other
def load_coco(root: Path, split: str) -> COCODetection:
    """A split, as this file's first lines say. Raises UserError for an annotation file that is not
    COCO's, has two images or categories of one id, or names an image or category that is not there.
    """
    folder = root / f"{split}2017"
    file = annotation_file(folder)
    require(file.is_file(), f"--data {root}: there is no {file}")
    try:
        content = json.loads(file.read_bytes())
        images, categories, found = (content[k] for k in ("images", "categories", "annotations"))
        names = {x["id"]: x["file_name"] for x in images}
        sizes = {x["id"]: (int(x["height"]), int(x["width"])) for x in images}
        kinds = {x["id"]: str(x["name"]) for x in categories}
        label_of = {kind: label for label, kind in enumerate(sorted(kinds), start=1)}
        annotated, used = ({x[k] for x in found} for k in ("image_id", "category_id"))
        there = files_in(folder)
        missing = sorted({*names.values()} - {*there})
        sorted(names)  # COCO's evaluation will: the ids must be of one kind
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file} is no file of COCO's instances ({error!r:.80})") from None
    for what, known, listed in (
        ("images of one id", names, images),
        ("images of one file name", {*names.values()}, images),
        ("categories of one id", kinds, categories),
    ):
        require(len(known) == len(listed), f"{file} has two {what}")
    for what, lone in (("image", annotated - names.keys()), ("category", used - kinds.keys())):
        lone = [*lone][:1]
        require(not lone, f"{file} has annotations of {what} {lone}, which it does not list")
    require(not missing, f"{file} annotates the image {missing[:1]}, which is not in {folder}")
    warn(folder, f"images that are not in {file} left out", sorted({*there} - {*names.values()}))
    objects = {image: [] for image in names if split == "val" or image in annotated}
    wrong = []
    for x in found:
        image, label = x["image_id"], label_of[x["category_id"]]
        h, w = sizes[image]
        if not usable(x, h, w):
            wrong.append(f"of {names[image]}")
            continue
        (left, top, width, height), crowd = x["bbox"], x.get("iscrowd") not in (None, 0, "0")
        inside = min(left + width, w) - max(left, 0), min(top + height, h) - max(top, 0)
        if split == "val" or (min(inside) >= 1 and not crowd):
            objects[image].append((label, x["bbox"], x["segmentation"], crowd))
    warn(file, "objects without a box or segmentation that can be drawn left out", wrong)
    items = [json.dumps((k, *sizes[k], v)).encode() for k, v in objects.items()]
    return COCODetection(
        file_names([names[image] for image in objects]),
        torch.arange(len(objects)),
        [kinds[kind] for kind in label_of],
        str(folder),
        packed=np.frombuffer(b"".join(items), np.uint8),
        ends=np.cumsum([0, *map(len, items)]),
        training=split == "train",
    )


class FeaturePyramid(nn.Module):
    """torchvision's backbone for `mask_rcnn`: images (B, C, H, W) -> maps (B, width, ·, ·) of
    strides 4 to 64, float32, computed under autocast to `dtype`."""

    def __init__(self, vit: ViT, width: int, dtype: torch.dtype):
        super().__init__()
        self.pyramid = Pyramid(vit)
        self.fpn = FeaturePyramidNetwork([vit.config.width] * 4, width, LastLevelMaxPool())
        self.out_channels, self.dtype = width, dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.dtype):
            maps = self.fpn(dict(zip("0123", self.pyramid(images))))
        return {name: at_least_float32(x) for name, x in maps.items()}


def mask_rcnn(
    vit: ViT,
    num_classes: int,
    sizes: tuple[int, ...] = tuple(range(480, 801, 32)),
    longest: int = 1333,
    width: int = 256,
    dtype: torch.dtype = torch.float32,
    **more,
) -> detection.MaskRCNN:
    """torchvision's Mask R-CNN on a pyramid and an FPN of `width` channels, heads in proportion.

    It takes a list of images, float (C, h, w), ImageNet-normalised; num_classes counts the
    background, class 0. An image's short side becomes one of `sizes`, drawn in training and the
    last in evaluation, the long side at most `longest`. Anchors are torchvision's, 8 strides a
    side. Encoder and FPN run under autocast to `dtype`; anchors and boxes would lose pixels by it.
    more: torchvision's other arguments.
    """
    model = detection.MaskRCNN(
        FeaturePyramid(vit, width, dtype),
        min_size=sizes,
        max_size=longest,
        image_mean=(0.0,) * 3,
        image_std=(1.0,) * 3,
        box_head=detection.faster_rcnn.TwoMLPHead(width * 7**2, 4 * width),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(4 * width, num_classes),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(width, width, num_classes),
        **more,
    )
    model.config = vit.config
    return model


def detections(output: dict[str, Tensor]) -> list[dict]:
    """What torchvision's model found on an image, as COCO's results, but for the image. output:
    boxes float (n, 4), scores (n,), labels int64 (n,), masks float (n, 1, h, w) in [0, 1]."""
    masks = (output["masks"][:, 0] > 0.5).permute(1, 2, 0).byte().cpu().numpy()  # (h, w, n)
    boxes = box_convert(output["boxes"].double(), "xyxy", "xywh").tolist()
    shapes = run_lengths.encode(np.asfortranarray(masks))
    objects = zip(boxes, shapes, output["labels"].tolist(), output["scores"].tolist(), strict=True)
    return [dict(zip(("bbox", "segmentation", "category_id", "score"), x)) for x in objects]


def coco_scores(found: list[tuple[int, list[dict]]], data: COCODetection) -> dict[str, float]:
    """COCO's average precision of boxes and masks, in percent, over the images in `found`.

    found: of each image its id and its `detections`, be they none. The means are over the
    thresholds 0.5, 0.55, …, 0.95 of IoU, or at 0.5 or 0.75; NaN where there is no object.
    """
    scores = {}
    results = [one | dict(image_id=image) for image, objects in found for one in objects]
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's classes print their progress
        truth = data.truth()
        guesses = truth.loadRes(results) if results else COCO()
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            measure = COCOeval(truth, guesses, kind)
            measure.params.imgIds = sorted(image for image, _ in found)
            measure.evaluate()
            measure.accumulate()
            measure.summarize()
            for suffix, value in zip(("ap", "ap50", "ap75"), measure.stats):
                scores[f"{name}_{suffix}"] = 100 * float(value) if value >= 0 else math.nan
    return scores
