"""Where tensors are, without a GPU; no graph breaks; and that tests/on_gpu.py runs.

torch's fake tensors have a device and a shape and no values: `cuda:0` is on every machine, for
forward passes that look at no values (Mask R-CNN's heads and mixup do).
"""

import json
from argparse import Namespace

import on_gpu
import pytest
import torch
import torch.nn as nn
from conftest import CPU, SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torchvision.models import vgg
from torchvision.models.feature_extraction import create_feature_extractor

import mirl
import train_pretrain
from common.data import normalise_images
from tasks.detection import FeaturePyramid
from tasks.probe import every_block, knn_scores
from tasks.segmentation import Segmentation, UperNet, confusion_matrix

CUDA = torch.device("cuda", 0)
BATCH = 4
TINY = SMALL | dict(depth=2)


@pytest.fixture
def fake():
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # which .to() makes fake ones of
    with mode:
        x = torch.ones(1, 2, 4, 8, device=CUDA)
        try:
            nn.functional.scaled_dot_product_attention(x, x, x)
        except RuntimeError:
            pytest.skip("this version of torch asks the driver, also for fake tensors")
    mirl.imagenet_statistics.cache_clear()  # real and fake tensors must not meet
    yield mode
    mirl.imagenet_statistics.cache_clear()


def some_images(device=CUDA, size=32):
    return normalise_images(torch.zeros(BATCH, 3, size, size, dtype=torch.uint8, device=device))


def all_on_cuda(*found):
    tensors = tree_leaves(found)
    assert tensors and all(x.device == CUDA for x in tensors)


def pyramid_vit():
    return mirl.build_vit("vit_nano", image_size=64, width=32, heads=2, pool="none")


def objectives(*weights):
    """VGG-16 has a sixteenth of its channels."""
    config = mirl.model_config("vit_nano", **TINY, segments=2)
    widths = [width if width == "M" else width // 16 for width in vgg.cfgs["D"]]
    vgg16 = create_feature_extractor(vgg.make_layers(widths).eval(), {"3": "1_2", "8": "2_2"})
    return mirl.ExtendedMIRL(config, mirl.Objectives(*weights), vgg16)


PRETRAINED = {
    "mirl": lambda: mirl.build_mirl("vit_nano", **TINY, segments=2),
    "mae": lambda: mirl.build_mae("vit_nano", **TINY),
    "dagger and infonce": lambda: objectives(0.5, 0.5),
    "byol": lambda: objectives(0, 0.5, False),
    "vgg": lambda: objectives(0, 0, False, 1.0),
}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretraining_stays_on_the_device(fake, name):
    model = PRETRAINED[name]()
    with fake:
        if name == "vgg":
            model.vgg[0].to(CUDA)  # which is not registered
        images = some_images()
        out = model.to(CUDA)(images)
        all_on_cuda(out, out.reconstruction, out.target, train_pretrain.residual_shares(out))
        all_on_cuda(mirl.panels(images, out, model.config.patch_size))
        if hasattr(model, "momentum_encoder"):
            mirl.update_ema(model.momentum_encoder, model.encoder, 0.9)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_logits_and_neighbours_stay_on_the_device(fake, pool):
    """Loss and scores have a test of their own, in test_classification.py."""
    model = mirl.build_vit("vit_nano", **TINY, pool=pool, num_classes=7)
    with fake, torch.no_grad():
        images, labels = some_images(), torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
        features = every_block(model.to(CUDA).eval(), images)[:, -1]
        all_on_cuda(model(images), knn_scores(features, labels, features, 3))


@pytest.mark.parametrize("size, slide", [(64, False), (96, False), (96, True)])
def test_segmentation_stays_on_the_device(fake, size, slide):
    model = UperNet(pyramid_vit(), 5)
    # for the CPU, because a fake device has no properties
    segment = Segmentation(Namespace(dtype="fp32", slide=slide), CPU)
    with fake, torch.no_grad():
        images = some_images(size=size)
        labels = torch.zeros(BATCH, size, size, dtype=torch.uint8, device=CUDA)
        all_on_cuda(segment.losses(model.to(CUDA), images, labels))
        found = segment.segment(model.eval(), images[0], (size, size))
        all_on_cuda(found, confusion_matrix(found, labels[0], 5))


def test_the_backbone_of_detection_stays_on_the_device(fake):
    model = FeaturePyramid(pyramid_vit(), 16, torch.float32)
    with fake:
        all_on_cuda(model.to(CUDA)(some_images(size=96)))


COMPILED = {k: PRETRAINED[k] for k in ("mirl", "mae", "dagger and infonce")} | {
    "vit": lambda: mirl.build_vit("vit_nano", **TINY),
    "upernet": lambda: UperNet(pyramid_vit(), 5),
}


@pytest.mark.parametrize("name", COMPILED)
def test_there_are_no_graph_breaks(name):
    """A break is where torch.compile leaves the graph for Python, and waits for the device."""
    if name == "dagger and infonce" and torch.__version__ < (2, 7):
        pytest.skip("this version of torch breaks at tuples with names")
    torch._dynamo.reset()
    images = some_images("cpu", size=64 if name == "upernet" else 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=name in PRETRAINED):
        torch.compile(COMPILED[name](), backend="eager", fullgraph=True)(images)  # or it raises


def test_the_command_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(["--only", "steps", "compile-pretrain", "--out", str(tmp_path)])
    assert stop.value.code == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "results.json").read_text())
    assert "no GPU" in capsys.readouterr().out and "no GPU" in report["device"]
    steps, compiled = (report["parts"][name] for name in ("steps", "compile-pretrain"))
    assert (steps["state"], compiled["state"]) == ("ok", "skipped")
    assert [k.split()[1] for k in steps["results"]] == ["float32", "bfloat16", "float16"]
