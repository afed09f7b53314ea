"""The data: against torchvision and PIL where they do the same, and against what is promised."""

import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, write_images
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import mirl
import train_finetune
import train_pretrain
from mirl import Images, Names, UserError, make_shapes


def files(folder):
    return mirl.load_folder(folder, "train")  # but for the first, which is for validation


def loader(data, workers=0):
    args = train_pretrain.parse(["--workers", str(workers)])
    return train_pretrain.PretrainLoader(data, (32, 32), args, CPU)


def order(data, epoch=0):
    return mirl.shuffled(mirl.split_batch(len(data.images), 8, 4, 256), 0, epoch)


# -- the embedded data set --


def test_shapes_are_the_same_every_time():
    a, b, c = make_shapes(1200, 0), make_shapes(1200, 0), make_shapes(1200, 1)
    assert a.images.shape == (1200, 3, 32, 32) and a.images.dtype == torch.uint8
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert torch.bincount(a.labels, minlength=16).min() > 40 and len(a.classes) == 16
    assert a.classes[5] == "square of checks"


def test_shapes_have_hardly_a_flat_patch():
    """Per-patch normalisation would blow the rounding noise of flat patches up to full scale."""
    patches = mirl.patchify(make_shapes(500, 0).images.float(), 4)
    gray_levels = patches.unflatten(2, (16, 3)).std(dim=2).amax(dim=2)  # of the liveliest channel
    assert (gray_levels < 1).float().mean() < 0.02


# -- cropping --


def crops(monkeypatch, images, box, size):
    """`random_crops` with this box for every image."""
    boxes = torch.tensor([box]).float().expand(len(images), 4)
    monkeypatch.setattr(train_pretrain, "random_boxes", lambda *_: boxes)
    return train_pretrain.random_crops(images, size)


def test_a_crop_of_the_output_size_is_a_copy_or_its_mirror_image(monkeypatch):
    torch.manual_seed(0)
    images = torch.randint(256, (40, 3, 20, 30), dtype=torch.uint8)
    for top, left, h, w in ((3, 5, 9, 7), (0, 0, 20, 30), (19, 0, 1, 30), (8, 26, 12, 4)):
        out = crops(monkeypatch, images, (top, left, h, w), (h, w))
        copy = images[:, :, top : top + h, left : left + w].float()
        same, mirrored = ((out - x).abs().amax((1, 2, 3)) < 0.01 for x in (copy, copy.flip(3)))
        assert (same ^ mirrored).all() and 8 < same.sum() < 32


def test_a_crop_is_enlarged_as_torch_does_it(monkeypatch):
    """Two pixels from a crop's border on, what lies outside of the crop plays no part."""
    torch.manual_seed(0)
    images = torch.randint(256, (9, 3, 20, 30), dtype=torch.uint8)
    for (top, left, h, w), size, m in (
        ((0, 0, 20, 30), (60, 45), 0),
        ((4, 9, 11, 12), (33, 48), 8),
    ):
        out = crops(monkeypatch, images, (top, left, h, w), size)
        box = images[:, :, top : top + h, left : left + w].float()
        expected = F.interpolate(box, size, mode="bicubic").clamp(0, 255)
        errors = [
            (out - x).abs()[:, :, m : size[0] - m, m : size[1] - m].amax((1, 2, 3))
            for x in (expected, expected.flip(3))
        ]
        assert torch.minimum(*errors).max() < 0.01 < torch.maximum(*errors).min()


def test_a_ramp_stays_a_ramp(monkeypatch):
    """Twice enlarged, it climbs by half a step a pixel: bicubic weights are at most 0.05 off."""
    ramp = (10 * torch.arange(24, dtype=torch.uint8))[:, None].expand(1, 3, 24, 24)
    out = crops(monkeypatch, ramp, (4, 6, 16, 12), (32, 24))[0] / 10
    expected = 4 - 0.25 + 0.5 * torch.arange(32.0)  # pixel centres at ∓1/4
    assert (out - expected[:, None]).abs().max() < 0.05


def test_random_boxes_are_those_of_torchvision():
    """Mean and spread of height and width over many draws, and nothing outside of the image."""
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(1, scale=(0.2, 1.0))
    image = torch.zeros(3, 40, 24)
    params = [transform.make_params([image]) for _ in range(4000)]
    names = ("top", "left", "height", "width")
    theirs = torch.tensor([[p[n] for n in names] for p in params]).float()
    ours = train_pretrain.random_boxes(4000, 40, 24, CPU)
    assert (ours[:, 0] + ours[:, 2] <= 40).all() and (ours[:, 1] + ours[:, 3] <= 24).all()
    assert (ours >= 0).all() and (ours[:, 2:] >= 1).all()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.5, rtol=0)
    for hw in ((1, 1), (1, 40), (33, 1)):
        images = torch.randint(100, 200, (200, 3, *hw), dtype=torch.uint8)
        out = train_pretrain.random_crops(images, (48, 56))
        assert out.shape == (200, 3, 48, 56) and out.min() > 50 and out.max() < 250


def test_normalisation_is_that_of_torchvision():
    image = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = TF.normalize(image.float() / 255, mirl.IMAGENET_MEAN, mirl.IMAGENET_STD)
    torch.testing.assert_close(mirl.normalise_images(image), expected)


class Varied(Images):
    """In memory, and every image has a size of its own."""

    def name(self, i):
        return f"image {i}"

    def read(self, i):
        return self.images[i]


def varied(count):
    """From 1 x 1 to 40 x 56, some one pixel high or wide, some grey, some of one colour."""
    g = torch.Generator().manual_seed(0)
    images = []
    for i in range(count):
        h = 1 if i % 7 == 0 else torch.randint(1, 41, (), generator=g).item()
        w = 1 if i % 11 == 0 else torch.randint(1, 57, (), generator=g).item()
        image = torch.randint(256, (3, h, w), dtype=torch.uint8, generator=g)
        image = image[:1].expand(3, h, w) if i % 3 == 0 else image
        images.append(image[:, :1, :1].expand(3, h, w) if i % 5 == 0 else image)
    return Varied(images, torch.arange(count) % 5, list("abcde"))


RECIPES = [
    (script, recipe)
    for script in (train_pretrain, train_finetune)
    for recipe, values in script.RECIPES.items()
    if values.get("task", "classify") == "classify"
]


@pytest.mark.parametrize(("script", "recipe"), RECIPES)
def test_every_recipe_can_use_every_image(script, recipe):
    """What its augmentation can draw within 2,000 images, at 96 pixels instead of more."""
    args = script.parse(["--recipe", recipe, "--workers", "0"])
    side = min(96, max(mirl.model_config(args.model).image_hw))
    size, data = (side, side), varied(2000)
    if script is train_pretrain:
        one, mix = script.PretrainLoader(data, size, args, CPU).files, lambda *batch: batch
    else:
        transform = train_finetune.finetune_transform(size, args.randaug)
        one = mirl.Loader(data, transform, args.seed, CPU, workers=0)
        mix = train_finetune.mixing(args, 5)
    transform = one.loader.dataset.transform

    def checked(image):
        out = transform(image)
        assert out.dtype == torch.uint8 and out.shape == (3, *size)
        return out

    one.loader.dataset.transform = checked
    for images, labels in one.epoch(0, mirl.in_order(2000, 50)):
        images, labels = mix(images, labels)
        assert images.shape == (50, 3, *size) and images.isfinite().all() and len(labels) == 50


# -- files --


def test_every_kind_of_file_is_read_as_pil_reads_it(tmp_path):
    image = Image.fromarray(make_shapes(1, 0).images[0].permute(1, 2, 0).numpy()).resize((45, 31))
    clear = image.copy()
    clear.putalpha(128)
    deep = Image.fromarray(np.arange(31 * 45, dtype=np.uint16).reshape(31, 45))
    grey = image.convert("L")
    kinds = {"a.jpg": image, "grey.jpg": grey, "cmyk.jpg": image.convert("CMYK")}
    kinds |= {"a.png": image, "grey.png": grey, "palette.png": image.convert("P")}
    kinds |= {"alpha.png": clear, "deep.png": deep, "bits.png": image.convert("1")}
    kinds |= {"a.bmp": image, "a.tiff": image, "a.webp": image, "alpha.webp": clear}
    kinds |= {"猫 ö.png": image, "png.jpg": image}
    for name, kind in kinds.items():
        kind.save(tmp_path / name, "PNG" if name == "png.jpg" else None)
        got = Images(Names([name]), torch.zeros(1), [], str(tmp_path)).read(0)
        expected = TF.pil_to_tensor(Image.open(tmp_path / name).convert("RGB"))
        assert got.dtype == torch.uint8 and got.shape == (3, 31, 45), name
        assert (got.int() - expected.int()).abs().max() <= (2 if "jpg" in name else 0), name


def test_what_cannot_be_read_is_none(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp", "a.bmp"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    names = ["a.jpg", "a.png", "a.webp", "a.bmp", "empty.png", "text.jpg", "none.png"]
    data = Images(Names(names), torch.zeros(7), [], str(tmp_path))
    assert [data.read(i) for i in range(7)] == [None] * 7


def test_names():
    names = ["a.png", "", "größe/猫.jpg", "b\udcff.png", "c" * 300]  # one is no UTF-8
    data = Images(Names(names), torch.zeros(5), [])
    assert [data.name(i) for i in range(len(data.images))] == names


def test_the_digest_tells_data_sets_apart(tmp_path):
    a = Images(Names(["a.png", "b.png"]), torch.tensor([0, 1]), ["x", "y"], "here")
    assert a._replace(root="there").digest() == a.digest()
    assert a._replace(images=Names(["a.png", "c.png"])).digest() != a.digest()
    assert a._replace(labels=torch.tensor([0, 0])).digest() != a.digest()
    b, c = make_shapes(3, 0), make_shapes(3, 0)
    assert b.digest() == c.digest()
    c.images[2, 0, 5, 5] += 1
    assert b.digest() != c.digest()
    assert b.select(torch.tensor([1, 0])).digest() != b.select(torch.tensor([0, 1])).digest()


def test_folders(tmp_path):
    def load(name):
        return (mirl.load_data(str(tmp_path / name), "", split) for split in ("train", "val"))

    for folder, count in (("train/cat", 3), ("train/dog", 2), ("val/cat", 1), ("val", 1)):
        write_images(tmp_path / "net" / folder, count)
    train, val = load("net")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and train.classes == ["cat", "dog"]
    assert sorted(val.labels.tolist()) == [-1, 0] and val.classes == train.classes
    assert train.name(3) == str(tmp_path / "net/train/dog/000.png") and train.read(3) is not None
    write_images(tmp_path / "flat" / "deep" / "deeper", 33)
    write_images(tmp_path / "flat" / "other", 27)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    write_images(tmp_path / "half" / "train" / "cat", 3)
    every_fiftieth = (("flat", [58, 2], "other/017.png"), ("half", [2, 1], "cat/000.png"))
    for name, counts, last in every_fiftieth:
        splits = [{x.name(i) for i in range(len(x.images))} for x in load(name)]
        assert [len(names) for names in splits] == counts and not set.intersection(*splits)
        assert max(splits[1]).endswith(last)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "sub").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        files(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        loader(files(tmp_path))


class FakeCIFAR:
    classes = ("cat", "dog")

    def __init__(self, root, train, download):
        if root == "offline":
            raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")
        self.data = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).to(torch.uint8).numpy()
        self.targets = [1, 0]


def test_cifar(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCIFAR)
    data = mirl.load_data("cifar10", "here", "train")
    assert data.images.shape == (2, 3, 32, 32) and data.labels.tolist() == [1, 0]
    assert data.images[0, 2, 0, 1] == 5 and data.classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"downloaded into offline .*--data shapes"):
        mirl.load_data("cifar10", "offline", "train")


# -- epochs --


@pytest.mark.parametrize("processes", [1, 2, 3, 40])
def test_processes_share_an_epoch(monkeypatch, processes):
    """Step by step they see together the images of one process; in validation, all, once."""
    batch = 12 if processes < 40 else 40
    split = mirl.split_batch(50, batch, None, 256)
    whole = mirl.shuffled(split, 0, 1)
    assert len(whole) == 50 // batch and len(whole.unique()) == whole.numel()
    assert not torch.equal(whole.flatten(), mirl.shuffled(split, 0, 2).flatten())
    monkeypatch.setattr(mirl, "WORLD_SIZE", processes)
    shares, seen = [], []
    for rank in range(processes):
        monkeypatch.setattr(mirl, "RANK", rank)
        split = mirl.split_batch(50, batch, None, 2)
        mine = mirl.shuffled(split, 0, 1)
        assert mine.shape == (split.steps * split.accumulation, split.device_batch_size)
        assert torch.equal(mine, mirl.shuffled(split, 0, 1))
        shares.append(mine.view(split.steps, -1))
        seen += [i for batch in mirl.in_order(33, 4) for i in batch]
    assert torch.equal(torch.cat(shares, dim=1).sort(dim=1)[0], whole.sort(dim=1)[0])
    assert sorted(seen) == list(range(33))


def test_batches_of_files_do_not_depend_on_the_workers(tmp_path):
    data = files(write_images(tmp_path, 21))
    one, two = loader(data), loader(data, workers=2)
    before = torch.get_rng_state()
    for epoch in (0, 1):
        batches = list(one.epoch(epoch, order(data)))
        assert len(batches) == 4 and batches[0].shape == (4, 3, 32, 32)
        again = two.epoch(epoch, order(data))
        assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not torch.equal(batches[0], next(one.epoch(0, order(data))))
    assert torch.equal(before, torch.get_rng_state())  # the masks' random numbers stay apart


def test_what_worker_processes_do_can_be_sent_to_them(tmp_path):
    """They are not forked on macOS, nor by Python from 3.14 on."""
    dataset = loader(files(write_images(tmp_path))).files.loader.dataset
    transforms = [mirl.whole_image((32, 32)), train_finetune.finetune_transform((32, 32), 9.0)]
    transforms += [train_finetune.segment_transform(64, training) for training in (False, True)]
    transforms += [train_finetune.detect_transform(training) for training in (False, True)]
    for transform in transforms:
        assert repr(pickle.loads(pickle.dumps(transform))) == repr(transform)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[0, 3][0], dataset[0, 3][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_replaced_named_once_and_counted(tmp_path, capsys, workers):
    folder = write_images(tmp_path, 17)
    (folder / "003.png").write_bytes(b"not an image")
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[: len(whole) // 2])
    (folder / "009.png").write_bytes(whole[:500] + bytes(20) + whole[520:])
    bad = ["003.png", "007.png", "009.png"]
    data = files(folder)
    one = loader(data, workers=workers)
    for epoch in range(3):
        assert sum(len(batch) for batch in one.epoch(epoch, order(data))) == 16
    printed = capsys.readouterr().out.splitlines()
    told = "warning: {} cannot be read: another image is in its place"
    assert printed == [told.format(folder / name) for name in bad]
    assert len(one.corrupt) == len(bad)


def test_files_that_vanish_during_a_run_are_an_error(tmp_path):
    data = files(write_images(tmp_path, 9))
    one = loader(data)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        next(one.epoch(0, order(data)))


def test_fixed_images_are_whole_and_in_order(tmp_path):
    data = make_shapes(9, 0)
    picked = mirl.fixed_images(data, (32, 32), 3)
    expected = mirl.normalise_images(data.images[[0, 4, 8]])
    torch.testing.assert_close(picked, expected, atol=1e-4, rtol=1e-4)
    assert len(mirl.fixed_images(files(write_images(tmp_path, 6)), (32, 32), 8)) == 5
