"""The data: against torchvision and PIL where they do the same, and against what is promised."""

import os
import pickle
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from conftest import CPU, make_shapes, refused, write_images
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import common.shapes
import mirl
import train_finetune
from common import data
from common.data import AugmentedImages, EpochSampler, ImageSet, batches, file_names
from mirl import UserError

CROP = v2.RandomResizedCrop(32, (0.2, 1.0))


def load(name, place=""):
    return [data.load_data(str(name), place, split) for split in ("train", "val")]


def files(folder):
    return data.load_folder(folder, "train")  # but for the first, which is for validation


def loader(images, workers=0, batch=8, **keep):
    """Epochs in two micro-batches each."""
    sampler = EpochSampler(len(images), batch)
    return data.make_loader(
        AugmentedImages(images, CROP, **keep), sampler, batch // 2, workers, CPU
    )


def epoch(one, number):
    one.sampler.set_epoch(number)
    return list(batches(one, CPU))


def test_shapes_are_the_same_every_time():
    (a, labels), (b, _), (c, _) = (common.shapes.make_shapes(1200, seed) for seed in (0, 0, 1))
    assert a.shape == (1200, 3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.bincount(labels, minlength=16).min() > 40 and len(common.shapes.CLASSES) == 16
    assert common.shapes.CLASSES[5] == "square of checks"
    # flat patches, of which per-patch normalisation would blow up the rounding noise, are few
    patches = mirl.patchify(a[:500].float(), 4).unflatten(2, (16, 3))
    assert (patches.std(dim=2).amax(dim=2) < 1).float().mean() < 0.02


def test_the_embedded_splits(monkeypatch):
    make = Mock(side_effect=lambda count, seed: make_shapes(33, seed))
    monkeypatch.setattr(data, "make_shapes", make)
    train, val = load("shapes")
    assert train.classes == val.classes == common.shapes.CLASSES
    assert train.digest() != val.digest()
    assert make.call_args_list == [call(10_000, seed=0), call(1_000, seed=1)]


def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path):
    image = TF.to_pil_image(make_shapes(33, 0)[0][0]).resize((45, 31))
    clear = image.copy()
    clear.putalpha(128)
    kinds = dict.fromkeys(
        ["a.jpg", "a.png", "a.gif", "a.bmp", "a.tiff", "a.webp", "png.jpg"], image
    )
    kinds |= {"png.jpg": image, "猫 ö.png": image, "b\udcff.png": image}  # one is no UTF-8
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


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("png tif pgm", np.uint16([[0, 255, 256], [511, 40000, 65535]]), [0, 0, 1, 1, 156, 255]),
        ("tif", np.float32([[0, 0.002, 0.25], [0.5, 0.75, 1]]), [0, 1, 64, 128, 191, 255]),
        ("tif", np.float32([[0, 80]]), None),  # who knows what is white?
        ("tif", np.float32([[-1, 1]]), None),
        ("tif", np.float32([[0, np.nan]]), None),
        ("tif", np.int32([[0, 255]]), None),
    ],
)
def test_images_of_more_than_8_bits_keep_their_content(tmp_path, kind, values, expected):
    for name in (f"a.{k}" for k in kind.split()):
        Image.fromarray(values).save(tmp_path / name)
        got = data.read_image(str(tmp_path / name))
        if expected is None:
            assert got is None
        else:
            assert got.dtype == torch.uint8 and got.flatten(1).tolist() == [expected] * 3, name


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_photos_given_to_a_flag_are_upright(tmp_path, kind):
    """Data are not turned, as by torchvision's ImageFolder."""
    image = TF.to_pil_image(make_shapes(33, 0)[0][0]).resize((45, 31))
    for orientation in (1, 3, 6):
        exif, path = Image.Exif(), str(tmp_path / f"{orientation}.{kind}")
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        stored, (upright,) = data.read_image(path), data.read_images("--predict", [path])
        assert stored.shape == (3, 31, 45)
        turned = {1: stored, 3: stored.rot90(2, (1, 2)), 6: stored.rot90(-1, (1, 2))}
        torch.testing.assert_close(upright, turned[orientation], atol=0, rtol=0)


def test_what_cannot_be_read_is_none(tmp_path):
    names = ["a.jpg", "a.png", "a.webp", "a.bmp", "empty.png", "text.jpg", "none.png"]
    for name in names[:4]:
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    images = ImageSet(file_names(names), torch.zeros(7), [], str(tmp_path))
    assert [images.read(i) for i in range(7)] == [None] * 7
    for name, told in (
        (5, ".*/text.jpg cannot be read as an"),
        (6, "there is no file .*/none.png"),
    ):
        with pytest.raises(UserError, match=f"--draw: {told}"):
            data.read_images("--draw", [str(tmp_path / names[name])])


def test_the_digest_tells_data_sets_apart():
    def digest(names="ab", labels=(0, 1), classes="xy", root="here"):
        images = file_names([f"{name}.png" for name in names])
        return ImageSet(images, torch.tensor(labels), list(classes), root).digest()

    assert digest() == digest(root="there")
    others = {digest(), digest(names="ac"), digest(labels=(0, 0)), digest(classes="xz")}
    assert len(others) == 4
    b, c = (ImageSet(*common.shapes.make_shapes(3, 0), []) for _ in range(2))
    assert b.digest() == c.digest()
    c.images[2, 0, 5, 5] += 1
    orders = [b.select(torch.tensor(order)).digest() for order in ([0, 1], [1, 0])]
    assert b.digest() != c.digest() and orders[0] != orders[1]


def test_folders(tmp_path):
    for folder, count in (("train/cat", 3), ("train/dog", 2), ("val/cat", 1), ("val", 1)):
        write_images(tmp_path / "net" / folder, count)
    train, val = load(tmp_path / "net")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and train.classes == ["cat", "dog"]
    assert sorted(val.labels.tolist()) == [-1, 0] and val.classes == train.classes
    assert train.name(3) == str(tmp_path / "net/train/dog/000.png") and train.read(3) is not None
    dog = train.select(torch.tensor([4]))
    assert dog.name(0).endswith("dog/001.png") and dog.labels.tolist() == [1]
    for split in ("train", "val"):
        write_images(tmp_path / "bare" / split, 3)
    assert all(x.classes == [] and x.labels.tolist() == [-1] * 3 for x in load(tmp_path / "bare"))
    # without a split for validation, every fiftieth image is for it, and one at least
    write_images(tmp_path / "flat" / "deep" / "deeper", 33)
    write_images(tmp_path / "flat" / "other", 27)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    write_images(tmp_path / "half" / "train" / "cat", 3)
    for name, counts, last in (("flat", [58, 2], "other/017.png"), ("half", [2, 1], "cat/000.png")):
        splits = [{x.name(i) for i in range(len(x))} for x in load(tmp_path / name)]
        assert [len(names) for names in splits] == counts and not set.intersection(*splits)
        assert max(splits[1]).endswith(last)


def test_names_that_systems_leave_are_no_data(tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / split / "cat" / "deep", 2)
        for name in (".ipynb_checkpoints", "__MACOSX", "cat/deep/@eaDir", "$Recycle.Bin/x/y"):
            write_images(tmp_path / split / name, 1)
        for name in ("cat/._000.png", "cat/Thumbs.db", "cat/README", "labels.json"):
            (tmp_path / split / name).write_bytes(b"no image")
    assert [(x.classes, x.labels.tolist()) for x in load(tmp_path)] == [(["cat"], [0, 0])] * 2
    assert len(files(tmp_path / "train")) + 1 == len(data.files_in(tmp_path / "train")) == 2
    assert not capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    def told(folder):
        assert load(folder)
        return [x.removeprefix("warning: ") for x in capsys.readouterr().out.splitlines()]

    for split in ("train", "val", "test"):
        write_images(tmp_path / split / "cat", 2)
    for name in ("eel", "dog"):
        (tmp_path / "train" / name).mkdir()
    empty = "classes without an image, which the head has all the same: 2, the first is dog"
    assert told(tmp_path) == [f"{tmp_path}/train: {empty}"]
    for name in ("dog/b.heic", "dog/a.zip", "dog/c.GIF", "eel/d.jp2"):
        (tmp_path / "train" / name).touch()
    kinds = f"{tmp_path}/train: files of other kinds left out: 2, the first is dog/a.zip"
    assert told(tmp_path) == [kinds]  # once, and what PIL reads is data
    assert load(tmp_path)[0].labels.tolist() == [0, 0, 1, 2]
    (tmp_path / "train").rename(tmp_path / "flat")
    capsys.readouterr()
    assert told(tmp_path / "flat") == [kinds.replace("train", "flat")]  # of both splits, once
    for name in ("train", "canoe"):
        write_images(tmp_path / "boats" / name, 3)
    (tmp_path / "boats" / "a.jpg").touch()
    beside = "folders and images beside train/ left out: 2, the first is canoe"
    assert told(tmp_path / "boats") == [f"{tmp_path}/boats: {beside}"]


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


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "sub").mkdir()
    refused(files, tmp_path, message="holds no images")
    (tmp_path / "a.jpg").write_bytes(b"")
    refused(loader, files(tmp_path), batch=1, message="none of the 1 images")


def offline(*args, **kwargs):
    raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(monkeypatch, name):
    def cifar(root, train, download):
        images = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8).numpy()
        return Mock(data=images, targets=[1, int(train)], classes=("cat", "dog"))

    place = f"torchvision.datasets.{name.upper()}"
    monkeypatch.setattr(place, cifar)
    train, val = load(name, "here")
    assert train.images.shape == (2, 3, 32, 32) and train.images[0, 2, 0, 1] == 5
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 1], [1, 0])
    assert train.classes == ["cat", "dog"]
    monkeypatch.setattr(place, offline)
    with pytest.raises(UserError, match=r"downloaded into there .*--data shapes"):
        data.load_data(name, "there", "train")


def test_imagenette_in_its_layout(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    with pytest.raises(UserError, match="--data imagenette could not be downloaded into"):
        data.load_data("imagenette", str(tmp_path), "train")
    for folder in ("n03888257", "n01440764", "n03000684"):
        for split, count in (("train", 4), ("val", 2)):
            place = tmp_path / "imagenette2-320" / split / folder
            for path in [*write_images(place, count).iterdir()]:
                path.rename(place / f"{folder}_{path.stem}.JPEG")
    train, val = load("imagenette", str(tmp_path))
    assert train.classes == val.classes == ["tench", "chain saw", "parachute"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(val.labels) == 6
    assert "n03000684" in val.name(2) and train.read(11).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("batch", "device", "processes", "expected"),
    [
        (4096, None, 1, (256, 16)),
        (4096, None, 64, (64, 1)),
        (4096, 128, 8, (128, 4)),
        (96, None, 3, (32, 1)),
        (600, None, 1, (200, 3)),
        (4096, 100, 1, "--device-batch-size 100 .*try 64"),
        (64, 256, 1, "--device-batch-size 256 .*try 64"),
        (100, None, 8, r"--batch-size 100 .*8 processes: try (96|104)"),
    ],
)
def test_micro_batches_come_out_even_or_say_how(monkeypatch, batch, device, processes, expected):
    monkeypatch.setattr(data, "WORLD_SIZE", processes)
    if isinstance(expected, str):
        refused(data.micro_batches, batch, device, 256, message=expected)
    else:
        assert data.micro_batches(batch, device, 256) == expected


@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_processes_share_an_epoch(monkeypatch, processes):
    """Step by step they see together the images of one process; in validation, all, once."""
    batch = 12 if processes < 40 else 40

    def order(number, *sampler):
        sampler = EpochSampler(*sampler)
        sampler.set_epoch(number)
        assert {e for e, _ in sampler} <= {number} and len(sampler) == len(list(sampler))
        return torch.tensor([i for _, i in sampler])

    whole, steps = order(1, 50, batch), 50 // batch
    assert len(whole) == len(whole.unique()) == steps * batch
    assert not torch.equal(whole, order(2, 50, batch))
    assert not torch.equal(whole, order(1, 50, batch, 1))
    monkeypatch.setattr(data, "WORLD_SIZE", processes)
    shares, seen = [], []
    for rank in range(processes):
        monkeypatch.setattr(data, "RANK", rank)
        shares.append(order(1, 50, batch).view(steps, batch // processes))
        seen += order(3, 33).tolist()
    together = torch.cat(shares, dim=1).sort(dim=1)[0]
    assert torch.equal(together, whole.view(steps, batch).sort(dim=1)[0])
    assert sorted(seen) == list(range(33))
    refused(EpochSampler, 50, 51, message="--batch-size 51 is larger than the 50 training images")


class Several(ImageSet):
    """In memory, and every image has a size of its own; some bring a target along."""

    def read(self, i):
        return self.images[i]

    def name(self, i):
        return f"image {i}"


def test_images_of_several_sizes_and_targets_of_any_kind():
    sizes = [(4, 5), (4, 5), (3, 5), (4, 4)]
    images = [torch.full((3, *size), 10 * i, dtype=torch.uint8) for i, size in enumerate(sizes)]
    found = [(image, {"boxes": torch.ones(i, 4)}) for i, image in enumerate(images)]

    def given(images, labels, transform, keep):
        one = AugmentedImages(Several(images, torch.tensor(labels), []), transform, 0, keep)
        return one, list(batches(data.make_loader(one, EpochSampler(4), 2, 0, CPU), CPU))

    found[1] = None
    pair, [(x, targets), (y, others)] = given(found, [0] * 4, lambda x, y: (x, y), False)
    assert [image.shape[1:] for image in x] == [(4, 5), (3, 5)] and targets[1] is None
    assert [len(target["boxes"]) for target in [targets[0], *others]] == [0, 2, 3]
    assert pair.broken == {"image 1"}
    for keep, expected in ((True, [5, 7]), (False, [5, -1])):
        _, [(_, labels), _] = given([images[0], None, *images[2:]], [5, 6, 7, 8], lambda x: x, keep)
        assert labels.tolist() == expected
    _, [(x, _), (y, _)] = given(images, [0] * 4, lambda x: x, True)
    assert x.shape == (2, 3, 4, 5) and isinstance(y, list)  # stacked where they are alike
    torch.testing.assert_close(y[1], data.normalise_images(images[3]))


def test_what_worker_processes_do_can_be_sent_to_them(tmp_path):
    """They are not forked on macOS, nor by Python from 3.14 on."""
    dataset = loader(files(write_images(tmp_path))).dataset
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 3][0], dataset[0, 3][0])
    args = train_finetune.parse(["--from", "scratch"])
    for task in train_finetune.TASKS.values():
        for training in (False, True):
            made = task(args, CPU).transform(mirl.Config(), training)
            assert repr(pickle.loads(pickle.dumps(made))) == repr(made)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_named_once_and_counted(tmp_path, capsys, workers):
    bad = [str(write_images(tmp_path, 17) / f"{name}.png") for name in ("003", "007", "009")]
    os.truncate(bad[0], 0)
    os.truncate(bad[1], os.path.getsize(bad[1]) // 2)
    with open(bad[2], "r+b") as file:
        file.seek(500)
        file.write(bytes(20))
    one = loader(files(tmp_path), workers=workers)
    for number in range(3):
        assert sum(len(images) for images, _ in epoch(one, number)) == 16
    told = "warning: {} cannot be used: another image is in its place"
    assert capsys.readouterr().out.splitlines() == [told.format(name) for name in bad]
    assert one.dataset.broken == {*bad}


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_during_a_run_are_an_error(tmp_path, workers):
    one = loader(files(write_images(tmp_path, 9)), workers)
    for path in tmp_path.iterdir():
        path.unlink()
    refused(epoch, one, 0, message=r"/\d+.png and what follows it can no longer be read\s*$")


def test_validation_images_are_whole_and_in_order(tmp_path):
    shapes = ImageSet(*make_shapes(33, 0), [])
    picked = data.validation_images(shapes, (32, 32), 3)
    expected = data.normalise_images(shapes.images[[0, 16, 32]])
    torch.testing.assert_close(picked, expected, atol=1e-4, rtol=1e-4)
    assert len(data.validation_images(files(write_images(tmp_path, 6)), (32, 32), 8)) == 5


def test_a_line_of_pixels_is_cropped_before_it_is_resized():
    crop = data.center_crop((96, 96))
    for size in ((1, 1200), (20000, 2)):
        assert crop(torch.full((3, *size), 7, dtype=torch.uint8)).unique().tolist() == [7]
    image = torch.randint(256, (3, 9, 400), dtype=torch.uint8)
    for length in (144, 400):  # up to 16 times as long as wide it is as ever
        part = image[..., :length]
        whole = v2.Compose(crop.transforms[1:])(part)
        assert (crop(part).int() - whole.int()).abs().max() <= 2 * (length > 144)
