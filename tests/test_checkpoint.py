"""Files written whole and read safely, going on from one, and weights from whoever made them."""

import argparse
import dataclasses
import os
import resource
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import make_shapes, perturbed, refused, stored, vit

import mirl
import train_finetune
import train_pretrain
from common import checkpoint
from common.checkpoint import load_classifier, load_encoder, load_file, load_mirl, save_model
from common.data import ImageSet, normalise_images

HEAD = ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def assert_equal(model, state, but=()):
    assert all(torch.equal(state[k], x) for k, x in model.state_dict().items() if k not in but)


def test_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "file.pt", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.exists()) or fsync(file))
    checkpoint.save(path, lambda file: file.write(b"first"))
    assert synced == [False]  # it is on the disk before it has its name
    with open(path, "rb") as before:
        checkpoint.save(path, lambda file: file.write(b"second"))
        assert (before.read(), path.read_bytes()) == (b"first", b"second")

    def fail(file):
        file.write(bytes(2**20))
        assert path.read_bytes() == b"second"
        assert Path(file.name).parent == path.parent  # a move within the file system is atomic
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(path, fail)
    assert path.read_bytes() == b"second" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("share", [0.5, 0.9999])  # where it ends, torch's errors differ
def test_a_full_disk_is_called_so_and_costs_nothing(tmp_path, share):
    path, model = tmp_path / "raw-best.pt", vit()
    save_model(path, model)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    message = "raw-best.pt cannot be written, it stays as it was: .*too large"
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), limits[1]))
    try:
        refused(save_model, path, model, message=message)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_what_stands_beside_the_weights(tmp_path):
    """Flags, as MAE has them, numbers and paths; torch's old format is a pickle, as Paddle's is."""
    content = dict(model={"linear": torch.ones(2, 3)}, args=argparse.Namespace(out=Path("a")))
    content |= dict(accuracy=np.float64(83.1), curve=np.arange(3.0), epoch=7)
    for new in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        found = load_file(tmp_path / "a.pth")
        assert found["model"]["linear"].shape == (2, 3) and found["epoch"] == 7


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("hacked",))


def test_files_that_are_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as where it is not installed
    path = tmp_path / "a.pt"

    def content(of, **how):
        torch.save(of, path, **how)
        return path.read_bytes()

    whole, old = content({"a": torch.ones(99)}), dict(_use_new_zipfile_serialization=False)
    for reason, contents in {
        "it ends too early": [b"", whole[:300], whole[:-9]],
        "it is text": [b"version https://git-lfs.github.com/spec/v1", b"<!DOCTYPE", b'\n{"no": 1}'],
        r"it needs pip install -e '.\[safetensors\]'": [b"\x02" + bytes(7) + b"{}"],
        "it names posix.mkdir: save model.st": [content({"a": Evil()}), content(Evil(), **old)],
        r"it names torch\.nn\.modules.*Linear: save": [content(nn.Linear(2, 2))],
        "it is damaged, or of no known format": [b"\x89HDF\r\n", b"torn"],
    }.items():
        for given in contents:
            path.write_bytes(given)
            message = rf"a.pt is not a checkpoint that can be read safely \({reason}"
            assert "\x1b" not in refused(load_file, path, message=message)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    content(torch.ones(2))
    refused(load_file, path, message="a.pt is no checkpoint: it holds a Tensor")
    for missing in (tmp_path, tmp_path / "none.pt"):
        refused(load_file, missing, message=f"there is no file {missing}")


def parts():
    model = nn.Linear(2, 2)
    return dict(model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_what_makes_a_run_and_what_may_change():
    shapes = ImageSet(*make_shapes(33, 0), [])
    args = vars(train_pretrain.parse([])) | vars(train_finetune.parse(["--from", "scratch"]))
    identity = checkpoint.identity(argparse.Namespace(**args), mirl.Config(), shapes)
    may = "resume out recipe data data_dir from_ truncated normalize device dtype compile workers "
    may += "device_batch_size log_every tensorboard log_grad_norms picture_every picture_pair "
    assert args.keys() - identity.keys() == {*may.split(), "vgg_checkpoint"}
    assert identity.keys() >= {"width", "pool", "training_images", "data_digest"}


def test_a_resume_of_what_it_is_not(tmp_path):
    here, path, flags = str(tmp_path), tmp_path / "checkpoint.pt", dict(epochs=3, lr=0.1)
    assert checkpoint.resume(here, parts(), flags) == {}
    checkpoint.save_checkpoint(here, parts(), identity=flags, epoch=2)
    assert checkpoint.resume(here, parts(), flags | dict(a_newer_flag=1))["epoch"] == 2
    other = "has other epochs 3 -> 5, lr 0.1 -> None; give what it began with, or another --out"
    refused(checkpoint.resume, here, parts(), dict(epochs=5), message=other)
    whole = load_file(path)
    for wrong, into in (
        ({"a": 1}, parts()),
        (whole | dict(optimizer=dict(state={}, param_groups=[])), parts()),
        (whole | dict(identity=3), parts()),
        (whole, dict(model=nn.Linear(3, 2))),
    ):
        torch.save(wrong, path)
        refused(
            checkpoint.resume, here, into, flags, message=f"cannot continue {path}: it is damaged"
        )


def test_encoders_of_every_origin(tmp_path, capsys):
    """Ours, and as MAE publishes them."""
    ours = perturbed(mirl.build_mirl("vit_nano"))
    state = ours.encoder.state_dict()
    mae = state | {"mask_token": torch.zeros(8), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    save_model(tmp_path / "a.pt", ours.encoder)
    whole = dict(model=ours.state_dict(), config=dataclasses.asdict(ours.config))
    for form in (load_file(tmp_path / "a.pt"), whole, mae, {"model": mae}):
        path = stored(tmp_path / "a.pt", form)
        for pool, missing, used in (("mean", HEAD, "76 of 80"), ("cls", HEAD[2:], "78 of 80")):
            model = vit(pool=pool)
            assert load_encoder(model, path) == missing
            assert_equal(model, state, but=missing)
            printed = capsys.readouterr().out
            unused = "norm.weight, norm.bias" if pool == "mean" else "none"
            told = f"{used} tensors from {path}; at random: {', '.join(missing)}; unused: {unused}"
            assert printed == told + "\n"
    # as timm publishes them: with learned positions, and a head of other classes
    state = perturbed(vit(pool="cls", num_classes=10)).state_dict()
    state["pos_embed"] = torch.randn_like(state["pos_embed"])
    model = vit(pool="cls", num_classes=7)
    assert load_encoder(model, stored(tmp_path / "timm.pth", state)) == HEAD[2:]
    assert_equal(model, state, but=HEAD)


def wrapped(state, names):
    """Tensors under these names: one with a dot begins each, one without is a dict in the file."""
    for name in reversed(names.split()):
        state = {name + k: x for k, x in state.items()} if name[-1] == "." else {name: state}
    return state


WRAPPERS = ("module.", "_orig_mod.", "module. _orig_mod.", "model _orig_mod. module.", "module")
WRAPPERS += ("model_ema", "state_dict module.", "state_dict model.", "net", "teacher backbone.")
WRAPPERS += ("student module. backbone.", "backbone.", "encoder.", "encoder vit. encoder.")


@pytest.mark.parametrize("names", WRAPPERS)
def test_wrapped_weights(tmp_path, names):
    """By torch.compile, in parallel, by Lightning, by self-supervised learning, of an average."""
    state = perturbed(vit(num_classes=10)).state_dict()
    form = wrapped(state, names) | {"epoch": 3, "criterion.weight": torch.ones(10)}
    path, model = stored(tmp_path / "a.pth", form), vit(num_classes=10)
    assert load_encoder(model, path) == []
    assert_equal(model, state)
    assert_equal(conftest.finetuned("--from", path)[0], state)
    ours = perturbed(mirl.build_mirl("vit_nano"))
    form = wrapped(ours.state_dict(), names) | dict(config=dataclasses.asdict(ours.config))
    assert_equal(load_mirl(stored(tmp_path / "a.pth", form)), ours.state_dict())


def test_several_weights_in_a_file(tmp_path, capsys):
    state = vit().state_dict()
    pairs = ("model", "model_ema"), ("teacher", "student"), ("state_dict", "average_model")
    for taken, other in pairs:
        form = {other: {k: x + 1 for k, x in state.items()}, "none": None, taken: state}
        model = vit()
        load_encoder(model, stored(tmp_path / "a.pth", form))
        assert torch.equal(model.cls_token, state["cls_token"])
        assert f"takes the weights {taken}.*, not {other}.*" in capsys.readouterr().out


def test_other_grids(tmp_path, capsys):
    state, path = vit(pool="cls").state_dict(), tmp_path / "a.pth"

    def loaded(saved, **fields):
        model = vit(**fields)
        load_encoder(model, stored(path, saved))
        return model.pos_embed

    expected = mirl.resize_positions(state["pos_embed"], (8, 8), (12, 8))
    torch.testing.assert_close(loaded(state, pool="cls", image_size=(48, 32)), expected)
    state["pos_embed"] = torch.linspace(0, 1, 65)[None, :, None].expand(1, 65, 96).clone()
    found = loaded(state, pool="cls", image_size=64)[0, :, 0]
    assert "positions resized from (8, 8) to (16, 16)" in capsys.readouterr().out
    assert (found[1:].view(16, 16).diff(dim=0) > 0).all() and found[0] == 0
    # as many patches on another grid, which only the configuration tells
    wide = vit(image_size=(16, 64), pool="none")
    saved = dict(model=wide.state_dict(), config=dataclasses.asdict(wide.config))
    resized = mirl.resize_positions(wide.pos_embed, (4, 16), (8, 8))
    torch.testing.assert_close(loaded(saved), resized)
    assert torch.equal(loaded(wide.state_dict(), image_size=(16, 64)), wide.pos_embed)
    state["pos_embed"] = torch.ones(1, 61, 96)
    refused(
        loaded, state, message=r"pos_embed is \(1, 61, 96\) in it and \(1, 65, 96\) in the model"
    )


def test_truncated_encoders(tmp_path, capsys):
    short = stored(tmp_path / "short.pth", perturbed(vit(depth=4)).state_dict())
    model = vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    message = r"short.pth does not .*: blocks.4.\S+ is missing in it and \(96,\) in .* and 21 more$"
    refused(load_encoder, model, short, message=message)
    assert_equal(model, before)
    assert len(load_encoder(model, short, truncated=True)) == 24
    assert "at random: blocks.4, blocks.5; unused: none" in capsys.readouterr().out
    assert torch.equal(model.blocks[5].mlp.fc1.weight, before["blocks.5.mlp.fc1.weight"])


def test_files_that_fit_no_encoder(tmp_path):
    state, other = vit().state_dict(), {"model": {"vit.cls_token": torch.ones(2)}}
    torn = {k: x for k, x in state.items() if k != "blocks.5.norm1.bias"}
    for wrong, message in (
        ({}, "a.pth has no patch_embed.proj.weight and pos_embed, .* it holds no tensors"),
        (other, "converted: it holds model.vit.cls_token"),
        (vit("vit_ti").state_dict(), r"a.pth does not fit the model: cls_token is \(1, 1, 1"),
        (state | {"cls_token": torch.full((1, 1, 96), torch.nan)}, "cls_token holds NaN or inf"),
        (torn, "blocks.5.norm1.bias is missing in it"),
        (state | {"gate": torch.ones(2)}, r"gate is \(2,\) in it and missing in the mod"),
    ):
        path = stored(tmp_path / "a.pth", wrong)
        for truncated in (False, True):
            refused(load_encoder, vit(), path, truncated, message=message)


def test_our_checkpoints_become_models_again(tmp_path):
    """Also where further objectives left more in them."""
    config = mirl.model_config("vit_nano", segments=4, heads=2)
    model = perturbed(mirl.ExtendedMIRL(config, mirl.Objectives(feature=1.0)))
    path, saved = tmp_path / "a.pt", dict(model=model.state_dict())
    saved["config"] = dataclasses.asdict(config)
    loaded = load_mirl(stored(path, saved), mask_ratio=0.5)
    assert loaded.config == dataclasses.replace(config, mask_ratio=0.5)
    assert_equal(loaded, model.state_dict())
    save_model(path, model.encoder)
    refused(load_mirl, path, message=r"a.pt holds no decoders: give a checkpoint.pt")
    del saved["model"]["decoders.1.norm.bias"]
    refused(load_mirl, stored(path, saved), message=r"decoders.1.norm.bias is missing in it")


def test_classifiers_that_are_refused():
    state = vit(num_classes=10).state_dict()
    headless = {k: v for k, v in state.items() if not k.startswith("head")}
    for weights, name, message in (
        (state, "vit_ti", r"\(is it --model vit_ti\?\) does not fit the model: cls_token is"),
        (headless, "vit_nano", "a is no fine-tuned model: it has no head"),
        (state | {"blocks.0.ls1.gamma": torch.ones(96)}, "vit_nano", "model: blocks.0.ls1.gamma"),
    ):
        refused(load_classifier, weights, name, "a", message=message)


def timm_vit(**fields):
    timm = pytest.importorskip("timm.models.vision_transformer")
    shape = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3)
    return timm.VisionTransformer(**shape, **fields).eval()


@torch.no_grad()
def assert_alike(ours, theirs):
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


def test_the_encoder_in_timm(tmp_path):
    theirs, model = timm_vit(num_classes=0), perturbed(mirl.build_mirl("vit_nano"))
    save_model(tmp_path / "encoder.pt", model.encoder)
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pt")["model"])
    assert_alike(model.encoder, theirs.forward_features)


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_a_fine_tuned_model_in_timm_and_back(tmp_path, pool, theirs):
    theirs = perturbed(timm_vit(num_classes=10, global_pool=theirs))
    back = stored(tmp_path / "timm.pth", theirs.state_dict())
    assert_alike(conftest.finetuned("--from", back)[0], theirs)
    model = perturbed(mirl.build_vit("vit_nano", num_classes=10, pool=pool))
    save_model(tmp_path / "raw-best.pt", model, classes=list("abcdefghij"))
    theirs.load_state_dict(torch.load(tmp_path / "raw-best.pt")["model"])
    assert_alike(model, theirs)


def test_a_file_of_timm_as_timm_writes_it_today(tmp_path):
    """In safetensors, and for images of mean and deviation 0.5."""
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, path = perturbed(timm_vit(num_classes=10)), tmp_path / "model.safetensors"
    safetensors.save_file(theirs.state_dict(), path, metadata={"format": "pt"})
    ours, _ = conftest.finetuned("--from", path)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))
        checkpoint.expect_imagenet(ours)
        found = ours(normalise_images(255 * images))
        torch.testing.assert_close(found, theirs((images - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    path.write_bytes(path.read_bytes()[:9000])
    refused(load_file, path, message="it ends too early")
