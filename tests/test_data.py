"""The data: against torchvision and PIL where they do the same, and against what is promised."""

import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import CPU, make_shapes, write_images
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


# -- the embedded data sets --


def test_shapes_are_the_same_every_time():
    (a, labels), (b, _), (c, _) = (common.shapes.make_shapes(1200, seed) for seed in (0, 0, 1))
    assert a.shape == (1200, 3, 32, 32) and a.dtype == torch.uint8
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.bincount(labels, minlength=16).min() > 40 and len(common.shapes.CLASSES) == 16
    assert common.shapes.CLASSES[5] == "square of checks"


def test_shapes_have_hardly_a_flat_patch():
    """Per-patch normalisation would blow the rounding noise of flat patches up to full scale."""
    patches = mirl.patchify(common.shapes.make_shapes(500, 0)[0].float(), 4)
    gray_levels = patches.unflatten(2, (16, 3)).std(dim=2).amax(dim=2)  # of the liveliest channel
    assert (gray_levels < 1).float().mean() < 0.02


def test_the_embedded_splits(monkeypatch):
    made = []

    def few(count, seed):
        made.append((count, seed))
        return make_shapes(33, seed)

    monkeypatch.setattr(data, "make_shapes", few)
    train, val = (data.load_data("shapes", "", split) for split in ("train", "val"))
    assert train.classes == val.classes == common.shapes.CLASSES
    assert train.digest() != val.digest() and made == [(10_000, 0), (1_000, 1)]


# -- images and files --


def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path):
    image = Image.fromarray(make_shapes(33, 0)[0][0].permute(1, 2, 0).numpy()).resize((45, 31))
    clear = image.copy()
    clear.putalpha(128)
    grey = image.convert("L")
    kinds = {"a.jpg": image, "grey.jpg": grey, "cmyk.jpg": image.convert("CMYK")}
    kinds |= {"a.png": image, "grey.png": grey, "palette.png": image.convert("P")}
    kinds |= {"alpha.png": clear, "bits.png": image.convert("1"), "a.gif": image}
    kinds |= {"a.bmp": image, "a.tiff": image, "a.webp": image, "alpha.webp": clear}
    kinds |= {"猫 ö.png": image, "b\udcff.png": image, "png.jpg": image}  # one is no UTF-8
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
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    names = ["a.jpg", "a.png", "a.webp", "a.bmp", "empty.png", "text.jpg", "none.png"]
    images = ImageSet(file_names(names), torch.zeros(7), [], str(tmp_path))
    assert [images.read(i) for i in range(7)] == [None] * 7
    with pytest.raises(UserError, match=r"--draw: .*/text.jpg cannot be read as an image"):
        data.read_images("--draw", [str(tmp_path / "text.jpg")])
    with pytest.raises(UserError, match=r"--draw: there is no file .*/none.png"):
        data.read_images("--draw", [str(tmp_path / "none.png")])


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
    assert b.digest() != c.digest()
    assert b.select(torch.tensor([1, 0])).digest() != b.select(torch.tensor([0, 1])).digest()


def test_folders(tmp_path):
    def load(name):
        return (data.load_data(str(tmp_path / name), "", split) for split in ("train", "val"))

    for folder, count in (("train/cat", 3), ("train/dog", 2), ("val/cat", 1), ("val", 1)):
        write_images(tmp_path / "net" / folder, count)
    train, val = load("net")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and train.classes == ["cat", "dog"]
    assert sorted(val.labels.tolist()) == [-1, 0] and val.classes == train.classes
    assert train.name(3) == str(tmp_path / "net/train/dog/000.png") and train.read(3) is not None
    dog = train.select(torch.tensor([4]))
    assert dog.name(0).endswith("dog/001.png") and dog.labels.tolist() == [1]
    for split in ("train", "val"):
        write_images(tmp_path / "bare" / split, 3)
    assert all(x.classes == [] and x.labels.tolist() == [-1] * 3 for x in load("bare"))
    write_images(tmp_path / "flat" / "deep" / "deeper", 33)
    write_images(tmp_path / "flat" / "other", 27)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    write_images(tmp_path / "half" / "train" / "cat", 3)
    every_fiftieth = (("flat", [58, 2], "other/017.png"), ("half", [2, 1], "cat/000.png"))
    for name, counts, last in every_fiftieth:
        splits = [{x.name(i) for i in range(len(x))} for x in load(name)]
        assert [len(names) for names in splits] == counts and not set.intersection(*splits)
        assert max(splits[1]).endswith(last)


def test_names_that_systems_leave_are_no_data(tmp_path, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / split / "cat" / "deep", 2)
        for name in (".ipynb_checkpoints", "__MACOSX", "cat/deep/@eaDir", "$Recycle.Bin/x/y"):
            write_images(tmp_path / split / name, 1)
        for name in ("cat/._000.png", "cat/Thumbs.db", "cat/README", "labels.json"):
            (tmp_path / split / name).write_bytes(b"no image")
    for split in ("train", "val"):
        found = data.load_folder(tmp_path, split)
        assert (found.classes, found.labels.tolist()) == (["cat"], [0, 0])
    assert len(files(tmp_path / "train")) + 1 == len(data.files_in(tmp_path / "train")) == 2
    assert not capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    def told(folder):
        for split in ("train", "val"):
            data.load_folder(folder, split)
        return [x.removeprefix("warning: ") for x in capsys.readouterr().out.splitlines()]

    for split in ("train", "val", "test"):
        write_images(tmp_path / split / "cat", 2)
    for name in ("eel", "dog"):
        (tmp_path / "train" / name).mkdir()
    assert told(tmp_path) == [
        f"{tmp_path}/train: classes without an image, which the head has all the same: 2, the "
        "first is dog"
    ]
    for name in ("dog/b.heic", "dog/a.zip", "dog/c.GIF", "eel/d.jp2"):
        (tmp_path / "train" / name).touch()
    assert data.load_folder(tmp_path, "train").labels.tolist() == [0, 0, 1, 2]
    kinds = f"{tmp_path}/train: files of other kinds left out: 2, the first is dog/a.zip"
    assert told(tmp_path) == [kinds]  # once, and what PIL reads is data
    (tmp_path / "train").rename(tmp_path / "flat")
    assert told(tmp_path / "flat") == [kinds.replace("train", "flat")]  # of both splits, once
    write_images(tmp_path / "boats" / "train", 3)
    write_images(tmp_path / "boats" / "canoe", 3)
    (tmp_path / "boats" / "a.jpg").touch()
    beside = "folders and images beside train/ left out: 2, the first is canoe"
    assert told(tmp_path / "boats") == [f"{tmp_path}/boats: {beside}"]


@pytest.mark.parametrize("name", ["valid", "validation", "val"])
def test_a_validation_split_by_other_names_or_alone(tmp_path, name):
    for folder in ("train/cat", "train/dog", f"{name}/dog"):
        write_images(tmp_path / folder, 2)
    train, val = (data.load_folder(tmp_path, split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"] and train.labels.tolist() == [0, 0, 1, 1]
    assert val.labels.tolist() == [1, 1]
    (tmp_path / "train").rename(tmp_path / "test")  # which is nobody's
    alone = data.load_folder(tmp_path, "val")
    assert alone.classes == ["dog"] and alone.labels.tolist() == [0, 0]
    (tmp_path / "test").rename(tmp_path / "bird")  # then it is a class among others
    assert len(files(tmp_path)) == 5 and not files(tmp_path).classes


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        files(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        loader(files(tmp_path), batch=1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(monkeypatch, name):
    def cifar(root, train, download):
        if root == "offline":
            raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")
        images = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8).numpy()
        return Mock(data=images, targets=[1, int(train)], classes=("cat", "dog"))

    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", cifar)
    train, val = (data.load_data(name, "here", split) for split in ("train", "val"))
    assert train.images.shape == (2, 3, 32, 32) and train.images[0, 2, 0, 1] == 5
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 1], [1, 0])
    assert train.classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"downloaded into offline .*--data shapes"):
        data.load_data(name, "offline", "train")


def test_imagenette_in_its_layout(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    with pytest.raises(UserError, match="--data imagenette could not be downloaded into"):
        data.load_data("imagenette", str(tmp_path), "train")
    for folder in ("n03888257", "n01440764", "n03000684"):
        for split, count in (("train", 4), ("val", 2)):
            place = tmp_path / "imagenette2-320" / split / folder
            place.mkdir(parents=True)
            for i, image in enumerate(make_shapes(33, 0)[0][:count]):
                TF.to_pil_image(image).save(place / f"{folder}_{i}.JPEG")
    train, val = (data.load_data("imagenette", str(tmp_path), s) for s in ("train", "val"))
    assert train.classes == val.classes == ["tench", "chain saw", "parachute"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(val.labels) == 6
    assert "n03000684" in val.name(2) and train.read(11).shape == (3, 32, 32)


# -- order --


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
def test_micro_batches_come_out_even_or_say_what_would(
    monkeypatch, batch, device, processes, expected
):
    monkeypatch.setattr(data, "WORLD_SIZE", processes)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            data.micro_batches(batch, device, 256)
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
    with pytest.raises(UserError, match="--batch-size 51 is larger than the 50 training images"):
        EpochSampler(50, 51)


# -- the loader --


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
    folder = write_images(tmp_path, 17)
    (folder / "003.png").write_bytes(b"not an image")
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[: len(whole) // 2])
    (folder / "009.png").write_bytes(whole[:500] + bytes(20) + whole[520:])
    bad = ["003.png", "007.png", "009.png"]
    one = loader(files(folder), workers=workers)
    for number in range(3):
        assert sum(len(images) for images, _ in epoch(one, number)) == 16
    printed = capsys.readouterr().out.splitlines()
    told = "warning: {} cannot be used: another image is in its place"
    assert printed == [told.format(folder / name) for name in bad]
    assert one.dataset.broken == {str(folder / name) for name in bad}


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_vanish_during_a_run_are_an_error(tmp_path, workers):
    one = loader(files(write_images(tmp_path, 9)), workers)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"/\d+.png and what follows it can no longer be read\s*$"):
        epoch(one, 0)


def test_validation_images_are_whole_and_in_order(tmp_path):
    shapes = ImageSet(*make_shapes(33, 0), [])
    picked = data.validation_images(shapes, (32, 32), 3)
    expected = data.normalise_images(shapes.images[[0, 16, 32]])
    torch.testing.assert_close(picked, expected, atol=1e-4, rtol=1e-4)
    assert len(data.validation_images(files(write_images(tmp_path, 6)), (32, 32), 8)) == 5
    # a large crop's short side is 256/224 of it: left of this ramp's middle are 48 of 110 pixels
    ramp = torch.arange(240, dtype=torch.uint8).expand(3, 120, 240)
    for side, left in ((96, 120 * (1 - 48 / 110)), (60, 60)):
        crop = data.center_crop((side, side))(ramp)
        assert crop.shape == (3, side, side) and abs(int(crop[0, 0, 0]) - left) < 1.5


def test_a_line_of_pixels_is_cropped_before_it_is_resized():
    crop = data.center_crop((96, 96))
    for size in ((1, 1200), (20000, 2)):
        assert crop(torch.full((3, *size), 7, dtype=torch.uint8)).unique().tolist() == [7]
    image = torch.randint(256, (3, 9, 400), dtype=torch.uint8)
    for length in (144, 400):  # up to 16 times as long as wide it is as ever
        part = image[..., :length]
        whole = v2.Compose(crop.transforms[1:])(part)
        assert (crop(part).int() - whole.int()).abs().max() <= 2 * (length > 144)
