"""The data: against torchvision where it does the same, and against what is promised."""

import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

import mirl
from mirl import UserError

CPU = torch.device("cpu")


def loader(data, batch_size=8, device_batch_size=4, size=(32, 32), seed=0, workers=0):
    split = mirl.split_batch(batch_size, device_batch_size, 256)
    return mirl.PretrainLoader(data, size, split, seed, CPU, workers)


def write_images(folder, count, size=(40, 30), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    for i in range(count):
        pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=g)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:03d}.png")
    return folder


def unlabelled(folder):
    files = mirl.list_images(folder)
    return mirl.ImageFiles(files, torch.full((len(files),), -1), [])


def test_shapes_are_the_same_every_time():
    a, b, c = mirl.make_shapes(1200, 0), mirl.make_shapes(1200, 0), mirl.make_shapes(1200, 1)
    assert a.images.shape == (1200, 3, 32, 32) and a.images.dtype == torch.uint8
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert torch.bincount(a.labels, minlength=16).min() > 40 and len(a.classes) == 16
    assert a.classes[5] == "square of checks"


def test_shapes_have_hardly_a_flat_patch():
    """Per-patch normalisation would blow the rounding noise of flat patches up to full scale."""
    patches = mirl.patchify(mirl.make_shapes(500, 0).images.float(), 4)
    gray_levels = patches.unflatten(2, (16, 3)).std(dim=2).amax(dim=2)  # of the liveliest channel
    assert (gray_levels < 1).float().mean() < 0.02


@pytest.mark.slow
def test_a_small_cnn_learns_the_shapes():
    """90 % validation accuracy from 4,000 labelled images, within a minute on two cores."""

    def conv(i, o, stride=1):
        layers = nn.Conv2d(i, o, 3, stride, padding=1), nn.BatchNorm2d(o), nn.ReLU()
        return nn.Sequential(*layers)

    torch.manual_seed(0)
    body = conv(3, 32), conv(32, 64, 2), conv(64, 64), conv(64, 128, 2), conv(128, 128)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 16)
    net = nn.Sequential(*body, *head)
    train, val = mirl.make_shapes(4000, 0), mirl.make_shapes(1000, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=9 * 62)
    for _ in range(9):
        for batch in torch.randperm(4000)[: 62 * 64].view(62, 64):
            x = mirl.normalise_images(train.images[batch])
            F.cross_entropy(net(x), train.labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        predicted = net.eval()(mirl.normalise_images(val.images)).argmax(1)
    assert (predicted == val.labels).float().mean() > 0.9


@pytest.mark.parametrize("box", [(0, 0, 20, 30), (3, 5, 9, 7), (2, 1, 17, 29), (8, 8, 4, 12)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_resize_is_that_of_torchvision(box, flip):
    torch.manual_seed(0)
    image = torch.rand(1, 3, 20, 30) * 255
    expected = TF.resized_crop(
        image, *box, (16, 12), interpolation=InterpolationMode.BICUBIC, antialias=True
    ).clamp(0, 255)
    expected = expected.flip(3) if flip else expected
    two = image.repeat(2, 1, 1, 1)
    boxes = torch.tensor([[0.0, 0.0, 20.0, 30.0], box])
    got = mirl.crop_resize(two, boxes, (16, 12), torch.tensor([False, flip]))
    torch.testing.assert_close(got[1:], expected, atol=0.01, rtol=1e-4)


def test_random_boxes_are_those_of_torchvision():
    """Mean and spread of height and width over many draws, and nothing outside of the image."""
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(1, scale=(0.2, 1.0))
    image = torch.zeros(3, 40, 24)
    params = [transform.make_params([image]) for _ in range(4000)]
    names = ("top", "left", "height", "width")
    theirs = torch.tensor([[p[n] for n in names] for p in params]).float()
    ours = mirl.random_boxes(4000, 40, 24, (0.2, 1.0), CPU)
    assert (ours[:, 0] + ours[:, 2] <= 40).all() and (ours[:, 1] + ours[:, 3] <= 24).all()
    assert (ours >= 0).all() and (ours[:, 2:] >= 1).all()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.5, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=0.5, rtol=0)


def test_normalisation_is_that_of_torchvision():
    image = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    expected = TF.normalize(image.float() / 255, mirl.IMAGENET_MEAN, mirl.IMAGENET_STD)
    torch.testing.assert_close(mirl.normalise_images(image), expected)


def test_ranks_share_the_images_without_overlap(monkeypatch):
    data = mirl.make_shapes(50, 0)
    monkeypatch.setattr(mirl, "num_processes", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(mirl, "process_rank", lambda rank=rank: rank)
        one = loader(data, batch_size=12, device_batch_size=2).shares
        assert one.steps == 4 and len(one) == 8
        one.epoch = 1
        shares.append(one.indices())
        assert shares[-1].shape == (8, 2)
        assert torch.equal(one.indices(), shares[-1])
        one.epoch = 2
        assert not torch.equal(one.indices(), shares[-1])
    seen = torch.cat(shares).flatten().tolist()
    assert len(set(seen)) == len(seen) == 48


def test_ranks_see_together_the_images_of_one_process(monkeypatch):
    """Step by step: the effective batch holds the same images whatever the number of ranks."""
    data = mirl.make_shapes(50, 0)
    whole = loader(data, batch_size=12, device_batch_size=12).shares.indices()
    monkeypatch.setattr(mirl, "num_processes", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(mirl, "process_rank", lambda rank=rank: rank)
        shares.append(loader(data, batch_size=12, device_batch_size=3).shares.indices().view(4, 6))
    for step in range(4):
        joint = torch.cat([share[step] for share in shares])
        assert sorted(joint.tolist()) == sorted(whole[step].tolist())


def test_image_tensor_batches():
    data = mirl.make_shapes(50, 0)
    one = loader(data, size=(16, 24))
    torch.manual_seed(0)
    batches = list(one.epoch(0))
    assert len(batches) == len(one.shares) == 12
    assert all(b.shape == (4, 3, 16, 24) and b.dtype == torch.float32 for b in batches)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(batches, one.epoch(0), strict=True))


def test_folder_batches_do_not_depend_on_the_workers(tmp_path):
    files = unlabelled(write_images(tmp_path / "a" / "b", 20))
    one, two = loader(files), loader(files, workers=2)
    for epoch in (0, 1):
        batches = list(one.epoch(epoch))
        assert len(batches) == 4 and batches[0].shape == (4, 3, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(batches, two.epoch(epoch), strict=True))
    assert not torch.equal(batches[0], next(iter(one.epoch(0))))
    before = torch.get_rng_state()
    one.files.loader.dataset[0, 3]
    assert torch.equal(before, torch.get_rng_state())  # the masks' random numbers stay apart


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_skipped_named_once_and_counted(tmp_path, capsys, workers):
    folder = write_images(tmp_path, 16)
    (folder / "003.png").write_bytes(b"not an image")
    whole = (folder / "007.png").read_bytes()
    (folder / "007.png").write_bytes(whole[: len(whole) // 2])
    one = loader(unlabelled(folder), workers=workers)
    for epoch in range(3):
        assert sum(len(batch) for batch in one.epoch(epoch)) == 16
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert sorted(line.split("/")[-1] for line in printed) == [
        "003.png cannot be read and is skipped",
        "007.png cannot be read and is skipped",
    ]
    assert len(one.corrupt) == 2


def test_files_that_vanish_during_a_run_are_an_error(tmp_path):
    files = unlabelled(write_images(tmp_path, 8))
    one = loader(files)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="can no longer be read"):
        next(one.epoch(0))


def test_folders(tmp_path):
    write_images(tmp_path / "net" / "train" / "cat", 3)
    write_images(tmp_path / "net" / "train" / "dog", 2)
    write_images(tmp_path / "net" / "val" / "cat", 1)
    write_images(tmp_path / "net" / "val", 1, seed=9)  # in no class
    train, val = (mirl.load_data(str(tmp_path / "net"), "", s) for s in ("train", "val"))
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and train.classes == ["cat", "dog"]
    assert val.labels.tolist() == [-1, 0] and val.classes == train.classes
    write_images(tmp_path / "flat" / "deep" / "deeper", 60)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    train, val = (mirl.load_data(str(tmp_path / "flat"), "", s).images for s in ("train", "val"))
    assert len(train) == 58 and len(val) == 2 and not set(train) & set(val)
    write_images(tmp_path / "half" / "train" / "cat", 3)
    train, val = (mirl.load_data(str(tmp_path / "half"), "", s).images for s in ("train", "val"))
    assert len(train) == 2 and len(val) == 1 and not set(train) & set(val)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        mirl.load_data(str(tmp_path / "none"), "", "train")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        mirl.load_data(str(tmp_path / "empty"), "", "train")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 1 images"):
        loader(mirl.load_data(str(tmp_path / "empty"), "", "train"), 1, 1)
    with pytest.raises(UserError, match="--batch-size 64 is larger than the 20 training images"):
        loader(unlabelled(write_images(tmp_path / "few", 20)), 64, 64)


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


def test_fixed_images_are_whole_and_in_order(tmp_path):
    data = mirl.make_shapes(9, 0)
    picked = mirl.fixed_images(data, (32, 32), 3)
    expected = mirl.normalise_images(data.images[[0, 4, 8]])
    torch.testing.assert_close(picked, expected, atol=1e-4, rtol=1e-4)
    files = unlabelled(write_images(tmp_path, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mirl.fixed_images(files, (32, 32), 8).shape == (5, 3, 32, 32)
