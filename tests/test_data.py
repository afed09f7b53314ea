"""The data: against torchvision and PIL where they do the same, and against what is promised."""

import os
import pickle
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, pictures, refused, write_images
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common.shapes
import mirl
import train_finetune
from common import data
from common.data import AugmentedImages, EpochSampler, ImageSet, batches, file_names


def load(name, place=""):
    return [data.load_data(str(name), str(place), split) for split in ("train", "val")]


def files(folder):
    return data.load_folder(folder, "train")  # but for the first, which is for validation


def loader(images, workers=0):
    augmented = AugmentedImages(images, v2.RandomResizedCrop(32, (0.2, 1.0)))
    return data.make_loader(augmented, EpochSampler(len(images), 8), 4, workers, CPU)


def test_shapes_are_the_same_every_time():
    (a, labels), (b, _), (c, _) = (common.shapes.make_shapes(1200, seed) for seed in (0, 0, 1))
    assert a.shape == (1200, 3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.bincount(labels, minlength=16).min() > 40
    assert common.shapes.CLASSES[5] == "square of checks"


def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path):
    image = pictures((45, 31))[0]
    clear = image.copy()
    clear.putalpha(128)
    names = ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tiff", "a.webp", "png.jpg"]
    kinds = dict.fromkeys([*names, "猫 ö.png", "b\udcff.png"], image)  # the last is no UTF-8
    kinds |= {"grey.jpg": image.convert("L"), "grey.png": image.convert("L")}
    kinds |= {"cmyk.jpg": image.convert("CMYK"), "palette.png": image.convert("P")}
    kinds |= {"alpha.png": clear, "alpha.webp": clear, "bits.png": image.convert("1")}
    for name, kind in kinds.items():
        kind.save(tmp_path / name, "PNG" if name == "png.jpg" else None)
        names = file_names([name, "a name that is longer"])
        got = ImageSet(names, torch.zeros(2), [], str(tmp_path)).read(0)
        expected = TF.pil_to_tensor(Image.open(tmp_path / name).convert("RGB"))
        assert got.dtype == torch.uint8 and got.shape == (3, 31, 45), name
        assert (got.int() - expected.int()).abs().max() <= (2 if "jpg" in name else 0), name


def test_images_of_more_than_8_bits_keep_their_content(tmp_path):
    grey = np.uint16([[0, 255, 256], [511, 40000, 65535]]), [0, 0, 1, 1, 156, 255]
    shares = np.float32([[0, 0.002, 0.25], [0.5, 0.75, 1]]), [0, 1, 64, 128, 191, 255]
    for kind, (values, expected) in dict(png=grey, pgm=grey, tif=grey, tiff=shares).items():
        Image.fromarray(values).save(tmp_path / f"a.{kind}")
        got = data.read_image(str(tmp_path / f"a.{kind}"))
        assert got.dtype == torch.uint8 and got.flatten(1).tolist() == [expected] * 3, kind
    for low, high in ((0, 80), (-1, 1), (0, np.nan)):  # who knows what is white?
        Image.fromarray(np.float32([[low, high]])).save(tmp_path / "b.tif")
        assert data.read_image(str(tmp_path / "b.tif")) is None
    Image.fromarray(np.int32([[0, 255]])).save(tmp_path / "c.tif")
    assert data.read_image(str(tmp_path / "c.tif")) is None


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_photos_given_to_a_flag_are_upright(tmp_path, kind):
    """Data are not turned, as by torchvision's ImageFolder."""
    image, path = pictures((45, 31))[0], str(tmp_path / f"a.{kind}")
    for orientation, quarters in ((1, 0), (3, 2), (6, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        stored, (upright,) = data.read_image(path), data.read_images("--predict", [path])
        assert stored.shape == (3, 31, 45)
        assert torch.equal(upright, stored.rot90(quarters, (1, 2)))


def test_what_cannot_be_read_is_none(tmp_path):
    for name in ("a.jpg", "a.webp", "a.bmp", "a.png"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    (tmp_path / "holes.png").write_bytes(content[:500] + bytes(20) + content[520:])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    names = [*os.listdir(tmp_path), "none.png"]
    images = ImageSet(file_names(names), torch.zeros(8), [], str(tmp_path))
    assert [images.read(i) for i in range(8)] == [None] * 8


def test_the_digest_tells_data_sets_apart():
    a = ImageSet(file_names(["a", "b"]), torch.tensor([0, 1]), ["x", "y"], "here")
    b, c = replace(a, images=file_names(["a", "c"])), replace(a, labels=torch.tensor([0, 0]))
    assert len({x.digest() for x in (a, b, c, replace(a, classes=["x", "z"]))}) == 4
    assert replace(a, root="there").digest() == a.digest()


def test_folders(tmp_path):
    for folder, count in (("train/cat", 3), ("train/dog", 2), ("val/cat", 1), ("val", 1)):
        write_images(tmp_path / "net" / folder, count)
    train, val = load(tmp_path / "net")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and train.classes == ["cat", "dog"]
    assert sorted(val.labels.tolist()) == [-1, 0] and val.classes == train.classes
    assert train.name(3) == str(tmp_path / "net/train/dog/000.png") and train.read(3) is not None
    for split in ("train", "val"):
        write_images(tmp_path / "bare" / split, 3)
    assert all(x.classes == [] and x.labels.tolist() == [-1] * 3 for x in load(tmp_path / "bare"))
    # without a split for validation, every fiftieth image is for it, and one at least
    write_images(tmp_path / "flat" / "deep" / "deeper", 33)
    write_images(tmp_path / "flat" / "other", 27)
    write_images(tmp_path / "half" / "train" / "cat", 3)
    for name, counts, last in (("flat", [58, 2], "other/017.png"), ("half", [2, 1], "cat/000.png")):
        splits = [{x.name(i) for i in range(len(x))} for x in load(tmp_path / name)]
        assert [len(names) for names in splits] == counts and not set.intersection(*splits)
        assert max(splits[1]).endswith(last)


def test_what_is_left_out_is_said_once_but_for_what_systems_leave(tmp_path, capsys):
    systems = ["$Recycle.Bin", *(f"train/{name}" for name in (".cache", "__MACOSX", "cat/@eaDir"))]
    for name in ("train/cat", "val/cat", "test/cat", "canoe", "train/dog", "train/eel", *systems):
        write_images(tmp_path / name, 0 if name in ("train/dog", "train/eel") else 1)
    for name in ("._0.png", "Thumbs.db", "a.GIF"):
        (tmp_path / "train" / "cat" / name).touch()
    for name in ("a.jpg", "train/dog/b.heic", "train/dog/a.zip"):
        (tmp_path / name).touch()
    train, val = load(tmp_path)
    assert train.classes == val.classes == ["cat", "dog", "eel"]
    assert train.labels.tolist() == [0, 0]  # the image, and what PIL reads
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {tmp_path}: folders and images beside train/ left out: 2, the first is canoe",
        f"warning: {tmp_path}/train: files of other kinds left out: 2, the first is dog/a.zip",
        f"warning: {tmp_path}/train: classes without an image, which the head has all the same: 2, "
        "the first is dog",
    ]


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_a_validation_split_by_other_names_or_alone(tmp_path, name):
    for folder in ("train/cat", "train/dog", f"{name}/dog"):
        write_images(tmp_path / folder, 2)
    train, val = load(tmp_path)
    assert train.classes == val.classes == ["cat", "dog"]
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 1, 1], [1, 1])
    (tmp_path / "train").rename(tmp_path / "test")  # which is nobody's
    alone = data.load_folder(tmp_path, "val")
    assert alone.classes == ["dog"] and alone.labels.tolist() == [0, 0]
    (tmp_path / "test").rename(tmp_path / "bird")  # then it is a class among others
    assert len(files(tmp_path)) == 5 and not files(tmp_path).classes


def test_the_sets_of_torchvision(tmp_path, monkeypatch):
    def cifar(root, train, download):
        images = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8).numpy()
        return Mock(data=images, targets=[1, int(train)], classes=("cat", "dog"))

    offline = Mock(side_effect=OSError("<urlopen error [Errno -3] name resolution>"))
    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    for name in ("cifar10", "cifar100"):
        monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", cifar)
        train, val = load(name)
        assert train.images.shape == (2, 3, 32, 32) and train.images[0, 2, 0, 1] == 5
        assert (train.labels.tolist(), val.labels.tolist()) == ([1, 1], [1, 0])
        assert train.classes == ["cat", "dog"]
        monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", offline)
    for name in ("cifar10", "cifar100", "imagenette"):
        said = f"--data {name} could not be downloaded into {tmp_path} .*--data shapes"
        refused(load, name, tmp_path, message=said)
    for folder in ("n03888257", "n01440764", "n03000684"):
        for split, count in (("train", 4), ("val", 2)):
            place = tmp_path / "imagenette2-320" / split / folder
            for path in [*write_images(place, count).iterdir()]:
                path.rename(place / f"{folder}_{path.stem}.JPEG")
    train, val = load("imagenette", tmp_path)
    assert train.classes == val.classes == ["tench", "chain saw", "parachute"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(val.labels) == 6


def test_micro_batches_come_out_even_or_say_how(monkeypatch):
    assert data.micro_batches(600, None, 256) == (200, 3)
    monkeypatch.setattr(data, "WORLD_SIZE", 8)
    assert data.micro_batches(512, None, 256) == (64, 1)
    assert data.micro_batches(4096, 128, 256) == (128, 4)
    refused(data.micro_batches, 4096, 100, 256, message="--device-batch-size 100 .*try 64")
    refused(data.micro_batches, 100, None, 256, message="--batch-size 100 .* over 8 processes")


def test_what_worker_processes_do_can_be_sent_to_them():
    """They are not forked on macOS, nor by Python from 3.14 on."""
    args = train_finetune.parse(["--from", "scratch"])
    for task in train_finetune.TASKS.values():
        for training in (False, True):
            made = task(args, CPU).transform(mirl.Config(), training)
            assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


def test_what_cannot_be_read_or_nothing_can(tmp_path):
    """After the last image comes the first. Also in the middle of a run, in a worker process."""
    (tmp_path / "sub").mkdir()
    refused(files, tmp_path, message="holds no images")
    one = loader(files(write_images(tmp_path, 9)), workers=1)
    (tmp_path / "008.png").write_bytes(b"")
    assert one.dataset[0, 7][1:] == (-1, 7)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    refused(list, batches(one, CPU), message=r"none of the 8 images like .*.png can be read\s*$")
    refused(loader, one.dataset.data, message="none of the 8 images")


def test_a_line_of_pixels_is_cropped_before_it_is_resized():
    """Which would take hundreds of gigabytes. Less long ones are in test_classification.py."""
    for size in ((1, 10**7), (10**7, 2)):
        line = torch.full((3, 1, 1), 7, dtype=torch.uint8).expand(3, *size)
        assert data.center_crop((96, 96))(line).unique().tolist() == [7]
