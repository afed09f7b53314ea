"""Images: where they come from, in which order, and how worker processes bring them."""

import contextlib
import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from common.distributed import RANK, WORLD_SIZE, gather, rank_zero_first, say
from common.shapes import CLASSES, make_shapes
from mirl import UserError, imagenet_statistics, require

BICUBIC = InterpolationMode.BICUBIC
SMALL = 64  # images up to this side are used whole
# kinds of files that PIL calls images, as it does not .eps and .mpg
KINDS = Image.registered_extensions().items()
IMAGES = tuple(kind for kind, name in KINDS if "image/" in Image.MIME.get(name, ""))
# what systems leave in folders
SYSTEM = {"__macosx", "__pycache__", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"@eadir", "#recycle", "@recycle", "#snapshot", "thumbs.db", "desktop.ini"}
say_once = functools.cache(say)  # where one folder is looked through for both splits


@dataclass
class ImageSet:
    """A data set, in memory or in files."""

    images: Tensor | np.ndarray  # uint8 (n, 3, H, W), or names of files below `root`, as bytes (n,)
    labels: Tensor  # int64 (n,), −1 where there is none
    classes: list[str]  # empty where there are no labels
    root: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """The file of image i."""
        return os.path.join(self.root, os.fsdecode(self.images[i]))

    def read(self, i: int) -> Tensor | None:
        """Image i, uint8 (3, h, w); None where it cannot be read."""
        return self.images[i] if isinstance(self.images, Tensor) else read_image(self.name(i))

    def select(self, indices: Tensor) -> "ImageSet":
        """The images with these indices, int64 (m,)."""
        return replace(self, images=self.images[indices.numpy()], labels=self.labels[indices])

    def digest(self) -> str:
        """Of the pixels or the files' names, the labels and the classes, wherever they lie."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part in (self.labels, self.images):
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()


def file_names(names: list[str]) -> np.ndarray:
    """Names as one array of bytes, which forked worker processes share. Of a list of strings each
    would end up with a copy, because Python counts references inside every string."""
    return np.array([os.fsencode(name) for name in names], dtype=bytes)


def read_image(path: str, upright: bool = False) -> Tensor | None:
    """An image file as uint8 (3, h, w); None where it cannot be read. upright: turned as its EXIF
    orientation says, and not left as torchvision's ImageFolder has it."""
    # torchvision decodes JPEG faster than PIL, and crashes on damaged PNG. Its decoder is
    # deprecated from 0.29 on; where it is gone, PIL serves.
    with contextlib.suppress(RuntimeError, AttributeError):
        content = torchvision.io.read_file(path)
        return torchvision.io.decode_jpeg(content, "RGB", apply_exif_orientation=upright)
    try:
        with Image.open(path) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode == "F":  # PIL would clip these and the next at 255
                values = np.asarray(image)
                require(values.min() >= 0 and values.max() <= 1, "unknown range")
                image = Image.fromarray(np.uint8((values * 255).round()))
            elif image.mode[0] == "I":  # I has 32 bits, but 16 of two formats, by PIL's version
                require(image.mode != "I" or image.format in ("PNG", "PPM"), "unknown range")
                image = Image.fromarray(np.uint8(np.asarray(image) >> 8))
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception:  # PIL raises nearly anything on a broken file
        return None


def read_images(flag: str, paths: list[str]) -> list[Tensor]:
    """The image files given to a flag, uint8 (3, h, w) each, upright as a viewer shows them. Raises
    UserError for one that is not there or cannot be read."""
    images = []
    for path in paths:
        require(Path(path).is_file(), f"{flag}: there is no file {path}")
        images.append(read_image(path, upright=True))
        kinds = "an image of 8 or 16 bits a channel, or floats from 0 to 1"
        require(images[-1] is not None, f"{flag}: {path} cannot be read as {kinds}")
    return images


def load_data(name: str, data_dir: str, split: str) -> ImageSet:
    """A data set by the name given to --data, or a folder; split: "train" or "val". What is not
    embedded is downloaded into `data_dir` at first use. Raises UserError for what cannot be had."""
    if name == "shapes":
        shapes = make_shapes(10_000, seed=0) if split == "train" else make_shapes(1_000, seed=1)
        return ImageSet(*shapes, CLASSES)
    if name not in ("cifar10", "cifar100", "imagenette"):
        return load_folder(Path(name), split)
    try:
        with rank_zero_first():
            if name == "imagenette":
                data = datasets.Imagenette(data_dir, split, size="320px", download=True)
            else:
                kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                data = kind(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        failed = f"--data {name} could not be downloaded into {data_dir} ({error})"
        raise UserError(f"{failed}: --data shapes needs no download") from None
    if name == "imagenette":
        found = load_folder(Path(data_dir) / "imagenette2-320", split)
        return replace(found, classes=[synonyms[0] for synonyms in data.classes])
    images = torch.from_numpy(data.data).movedim(3, 1).contiguous()  # (n, 3, 32, 32)
    return ImageSet(images, torch.tensor(data.targets), list(data.classes))


def load_folder(root: Path, split: str) -> ImageSet:
    """The image files of a folder.

    Where it has train/ and val/ (or valid/, validation/), the subfolders of train/ are the classes;
    where it has val/ alone, those of val/. Else its images have no labels, and every fiftieth is
    for validation. Says what it leaves out. Raises UserError where there are none.
    """
    require(root.is_dir(), f"--data {root}: there is no such folder, and --help lists the names")
    here = folders_in(root)
    train = "train" if "train" in here else ""
    val = next((name for name in ("val", "valid", "validation") if name in here), "")
    beside = [name for name in here if name not in (train, val, "test")]
    beside += [n for n in sorted(os.listdir(root)) if is_data(n) and n.lower().endswith(IMAGES)]
    warn(root, "folders and images beside train/ left out", beside if train else [])
    has_splits = val and (train or not beside)
    folder = root / (val if has_splits and split == "val" else train)
    names = files_in(folder)
    require(names, f"--data {root}: {folder} holds no images")
    if not has_splits and len(names) > 1:
        names = [n for i, n in enumerate(names) if (i % 50 == 0) == (split == "val")]
    known = root / (train or val)
    classes = folders_in(known) if has_splits else []
    tops = [name.split(os.sep)[0] for name in names]
    index = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([index.get(top, -1) for top in tops])
    empty = sorted(set(classes) - set(tops)) if folder == known else []
    warn(folder, "classes without an image, which the head has all the same", empty)
    return ImageSet(file_names(names), labels, classes, str(folder))


def is_data(name: str) -> bool:
    """Whether a file or folder is the user's, by its name."""
    return name[0] != "." and name.lower() not in SYSTEM


def folders_in(folder: Path) -> list[str]:
    """Names of the folders right in it, in order: of train/ the classes."""
    return sorted(x.name for x in os.scandir(folder) if x.is_dir() and is_data(x.name))


def files_in(folder: Path, kinds: tuple[str, ...] = IMAGES) -> list[str]:
    """Names, below the folder, of its files of these kinds at any depth, in order. Says which
    others it has."""
    files = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        parts = Path(place).relative_to(folder).parts
        if all(map(is_data, parts)):
            files += [os.path.join(*parts, name) for name in sorted(names) if is_data(name)]
    others = [name for name in files if not name.lower().endswith(kinds)]
    warn(folder, "files of other kinds left out", others)
    return [name for name in files if name.lower().endswith(kinds)]


def warn(place: Path, what: str, names: list[str]) -> None:
    """Say how many these are, and the first, if there are any."""
    if names:
        say_once(f"warning: {place}: {what}: {len(names)}, the first is {names[0]}")


def seed_of(purpose: str, *parts: int) -> int:
    """One well-mixed 63-bit seed from a purpose and several numbers, the same everywhere."""
    digest = hashlib.sha256(repr((purpose, *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def micro_batches(batch_size: int, device_batch_size: int | None, limit: int) -> tuple[int, int]:
    """Cut this process's share of an effective batch: images at a time, by default the most up to
    `limit` that come out even, and how many times. Raises UserError where they do not."""
    share, rest = divmod(batch_size, WORLD_SIZE)
    require(rest == 0, f"--batch-size {batch_size} does not divide over {WORLD_SIZE} processes")
    size = min(device_batch_size or limit, share)
    while share % size:
        size -= 1
    given = f"--device-batch-size {device_batch_size}"
    uneven = f"{given} does not divide the {share} images of a process in a batch: try {size}"
    require(device_batch_size in (None, size), uneven)
    return size, share // size


class EpochSampler(Sampler):
    """This process's (epoch, image) pairs; processes never overlap.

    batch_size: the effective one. The order is then shuffled, by (seed, epoch) alone, and what does
    not fill a batch is left out; without it, all images come in order. Raises UserError where there
    are fewer images than a batch takes.
    """

    def __init__(self, images: int, batch_size: int = 0, seed: int = 0):
        too_large = f"--batch-size {batch_size} is larger than the {images} training images"
        require(batch_size <= images, too_large)
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.images)
        if self.batch_size:
            generator = torch.Generator().manual_seed(seed_of("order", self.seed, self.epoch))
            order = torch.randperm(self.images, generator=generator)
            order = order[: self.images - self.images % self.batch_size]
        for i in order[RANK::WORLD_SIZE].tolist():
            yield self.epoch, i


class AugmentedImages(Dataset):
    """Single images, each transformed at random in its own way: what worker processes run.

    transform: uint8 (3, h, w) -> uint8 (3, *size). (epoch, i) alone decides about (image, label,
    bad). Where image i cannot be read, the next readable one stands in, so that a batch keeps its
    size: bad is i (else −1), and the label is its own, or −1 without `keep_labels`. Where `read`
    gives (image, target), both are transformed together, and a target that is not kept is None.
    `broken`: what could not be read so far. Raises UserError where nothing can be read.
    """

    def __init__(self, data: ImageSet, transform: Callable, seed=0, keep_labels=True):
        self.data, self.transform, self.seed, self.keep_labels = data, transform, seed, keep_labels
        self.broken: set[str] = set()
        self.first_readable(0)

    def first_readable(self, i: int) -> tuple[int, Any]:
        """The first image from i on that can be read, and what is read of it."""
        n = len(self.data)
        for k in range(i, i + n):
            found = self.data.read(k % n)
            if found is not None:
                return k % n, found
        raise UserError(f"none of the {n} images like {self.data.name(i)} can be read")

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Any, int]:
        epoch, i = key
        good, found = self.first_readable(i)
        known, bad = good == i or self.keep_labels, -1 if good == i else i
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of("file", self.seed, epoch, i))
            if isinstance(found, tuple):
                image, target = self.transform(*found)
                return image, target if known else None, bad
            return self.transform(found), int(self.data.labels[good]) if known else -1, bad


def collate(samples: list[tuple]) -> list:
    """torch's collate of each column, but a list of what it cannot stack: tensors of several sizes,
    dicts, None."""
    columns = []
    for column in zip(*samples, strict=True):
        kinds = {getattr(x, "shape", type(x)) for x in column}
        alike = len(kinds) == 1 and kinds.isdisjoint({dict, type(None)})
        columns.append(default_collate(column) if alike else list(column))
    return columns


def make_loader(
    dataset: AugmentedImages,
    sampler: EpochSampler,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoader:
    """Batches through worker processes that live over the epochs, or, of 0, in this one."""
    return DataLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else it draws from the one that masks come from
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )


def start_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    # a list of tensors is sent as many, and as open files they would be more than there may be
    torch.multiprocessing.set_sharing_strategy("file_system")


def batches(loader: DataLoader, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """An epoch: images float32 (b, 3, *size), normalised, and labels int64 (b,), on the device, or
    lists where they differ in size or kind. What could not be read is named at the end, once."""
    found, cuda = set(), device.type == "cuda"
    for *batch, bad in loader:
        found |= {*bad.tolist()} - {-1}
        images, labels = tree_map_only(Tensor, lambda x: x.to(device, non_blocking=cuda), batch)
        yield tree_map_only(Tensor, normalise_images, images), labels
    dataset = loader.dataset
    names = {dataset.data.name(i) for i in set().union(*gather(found))}
    for name in sorted(names - dataset.broken):
        say(f"warning: {name} cannot be used; in training another image takes its place")
    dataset.broken |= names


def normalise_images(images: Tensor) -> Tensor:
    """(…, 3, H, W) of values in 0..255 -> float32, with ImageNet's mean and deviation."""
    mean, std = imagenet_statistics(images.device)
    return (images.float() / 255 - mean) / std


def shorten(image: Tensor) -> Tensor:
    """The middle of an image (3, h, w), up to 16 times as long as it is wide: resized by its short
    side, a line of pixels would be gigabytes."""
    longest = 16 * min(image.shape[1:])
    return TF.center_crop(image, [min(side, longest) for side in image.shape[1:]])


def center_crop(size: tuple[int, int]) -> Callable:
    """The short side to 256/224 of the wanted one and a central crop; sizes up to 64 whole. [R]"""
    share = 256 / 224 if min(size) > SMALL else 1
    shorter = v2.Resize(round(max(size) * share), BICUBIC)
    return v2.Compose([shorten, shorter, v2.CenterCrop(size)])


def validation_images(data: ImageSet, size: tuple[int, int], wanted: int) -> Tensor:
    """Images spread evenly over a data set: float32 (wanted, 3, *size), normalised."""
    images = AugmentedImages(data, center_crop(size))
    picks = torch.linspace(0, len(data) - 1, min(wanted, len(data))).long().tolist()
    return normalise_images(torch.stack([images[0, i][0] for i in picks]))
