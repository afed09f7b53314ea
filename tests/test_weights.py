"""Files of others: the authors' in PaddlePaddle's format, MAE's and timm's; and ours in timm."""

import argparse
import builtins
import dataclasses
import itertools
import lzma
import os
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import image_folder, make_shapes, stored, write_images
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import mirl
import train_finetune
import train_pretrain
from mirl import UserError

DATA = Path(__file__).parent / "data"
SAMPLE = mirl.Config(6, 32, 4, image_size=32, patch_size=4)
USUAL = ["--device", "cpu", "--workers", "0"]
finetune = partial(conftest.run, train_finetune, *USUAL)
pretrain = partial(conftest.run, train_pretrain, *USUAL)


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A fine-tuned model that the authors' code made, and a --model that has its heads."""
    monkeypatch.setitem(mirl.MODELS, "sample", SAMPLE)
    path = tmp_path / "finetune_checkpoint-99.pd"
    path.write_bytes(lzma.decompress((DATA / "finetune_checkpoint-99.pd.xz").read_bytes()))
    return path


def pickled(path, content, protocol):
    path.write_bytes(pickle.dumps(content, protocol))
    return str(path)


def perturbed(model):
    """Every parameter and position moved, so that none is as it starts."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


# -- reading the authors' format --


def test_the_sample_holds_what_it_is_said_to(sample):
    expected = np.load(DATA / "finetune_expected.npz")
    weights = mirl.load_file(sample)["model"]
    names, shapes = expected["names"], [[*map(int, s.split(","))] for s in expected["shapes"]]
    values = np.split(expected["values"], np.cumsum([np.prod(s) for s in shapes])[:-1])
    assert list(weights) == list(names) and len(names) == 80
    for name, shape, value in zip(names, shapes, values, strict=True):
        value = value.reshape(shape)  # PaddlePaddle's linear weights are (in, out)
        assert np.array_equal(weights[name].numpy(), value.T if len(shape) == 2 else value), name
    model = train_finetune.classifier(weights, "sample", sample)
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["images"]))
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), rtol=0, atol=1e-5)


class Call:
    """What a pickle makes by calling a function."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def as_tensor(array):
    """A tensor as PaddlePaddle pickles it."""
    return Call(tuple, ("parameter_0", array))


@pytest.mark.parametrize("form", [lambda x: x, lambda x: ("parameter_0", x), as_tensor])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_kind(tmp_path, protocol, form):
    rng = np.random.default_rng(0)
    numbers = (3 * rng.standard_normal((5, 3, 2))).astype("f4")
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
    arrays = {kind: numbers.astype(kind) for kind in kinds}
    arrays |= dict(fortran=np.asfortranarray(numbers), linear=numbers[:, :, 0].copy())
    state = OrderedDict((name, form(array)) for name, array in arrays.items())
    # the upper half of a float32's bits are a bfloat16
    state["bf16"] = form((numbers.view("u4") >> 16).astype("u2"))
    state["StructuredToParameterName@@"] = {"f4": "parameter_0"}
    whole = dict(model=state, epoch=99, args=argparse.Namespace(lr=0.1), scaler=np.float32(2))
    whole["optimizer"] = [np.zeros(0, "f4"), {"LR_Scheduler": None}]
    for content in (whole, state):
        path = tmp_path / "a.pd"
        raw = pickle.dumps(content, protocol)
        if protocol < 4:  # text that older versions of numpy wrote
            raw = raw.replace(b"numpy._core", b"numpy.core")
        path.write_bytes(raw)
        found = mirl.load_file(path)["model"]
        assert found.keys() == arrays.keys() | {"bf16"}
        for name, array in arrays.items():
            expected = torch.from_numpy(np.ascontiguousarray(array.T if array.ndim == 2 else array))
            assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
        assert found["bf16"].dtype == torch.bfloat16
        torch.testing.assert_close(
            found["bf16"].float(), torch.from_numpy(numbers), rtol=0.01, atol=0
        )


def test_large_tensors_come_in_slices(tmp_path):
    whole = np.arange(12, dtype="f4").reshape(3, 4)
    pieces = {"w@@.0": whole.ravel()[:5], "w@@.1": whole.ravel()[5:]}
    info = {"w": {"OriginShape": (3, 4), "slices": list(pieces)}}
    state = pieces | {"b": np.ones(2, "f4"), "UnpackBigParamInfor@@": info}
    found = mirl.load_file(pickled(tmp_path / "a.pd", state, 2))["model"]
    assert found.keys() == {"w", "b"} and torch.equal(found["w"], torch.from_numpy(whole).T)


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_pickle_runs_anything(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    np.save("array.npy", np.ones(2))
    cases = {
        "system": Call(os.system, "touch ran"),
        r"(builtins|__builtin__)\.eval": Call(builtins.eval, "open('ran', 'w')"),
        r"numpy.*\bload": Call(np.load, "array.npy"),
        r"numpy.*\bmemmap": Call(np.memmap, "ran", "u1", "w+", 0, (4,)),
        r"\.getattr": Call(getattr, "", "join"),
        r"torch\.": torch.ones(2),
    }
    for name, hostile in cases.items():
        for content in (hostile, dict(model={"a": np.ones(2), "b": hostile})):
            path = pickled(tmp_path / "a.pd", content, protocol)
            with pytest.raises(UserError, match=rf"a.pd is not .* read safely \(it names .*{name}"):
                mirl.load_file(path)
    assert not Path("ran").exists()


def test_what_else_is_no_such_file(tmp_path, sample):
    raw = sample.read_bytes()
    array = np.arange(6, dtype="f4").reshape(2, 3)
    whole = pickle.dumps({"a": array}, 2)
    wrong = dict(
        cut=raw[: len(raw) // 2],
        last=raw[:-1],
        first=raw[:2],
        one=raw[:1],
        empty=b"",
        persistent=b"\x80\x02Pelsewhere\n.",
        shape=whole.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
        big_endian=pickle.dumps({"a": array.astype(">f4")}, 2),
        objects=pickle.dumps({"a": np.array([None])}, 2),
        slices=pickle.dumps({"UnpackBigParamInfor@@": {"a": {"slices": ["b"]}}}, 2),
    )
    assert wrong["shape"] != whole
    for name, content in wrong.items():
        (tmp_path / f"{name}.pd").write_bytes(content)
        message = rf"{name}.pd is not a checkpoint .* read safely \(.+\)"
        with pytest.raises(UserError, match=message):
            mirl.load_file(tmp_path / f"{name}.pd")
    with pytest.raises(UserError, match="it holds a list"):
        mirl.load_file(pickled(tmp_path / "list.pd", [array], 4))


def test_other_files_are_read_by_torch(tmp_path):
    """Its old format is a pickle too; MAE's checkpoints hold the flags as a Namespace."""
    content = dict(model={"linear": torch.ones(2, 3)}, args=argparse.Namespace(lr=0.1))
    for new in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        found = mirl.load_file(tmp_path / "a.pth")
        assert found["model"]["linear"].shape == (2, 3) and found["args"].lr == 0.1


# -- pre-trained models --


def authors_file(path, model, **more):
    """A MIRL model under the authors' names, in their layout."""
    state = model.encoder.state_dict()
    parts = {"norm_low": model.input_norm, "decoder_embed0_1": model.input_embed}
    parts |= {f"norm{k}": norm for k, norm in enumerate(model.segment_norms)}
    parts |= {f"decoder_embed{k}": embed for k, embed in enumerate(model.segment_embeds)}
    for k, decoder in enumerate(model.decoders):
        state[f"mask_token{k}"] = decoder.mask_token
        state[f"decoder_pos_embed{k}"] = decoder.pos_embed
        for i, block in enumerate(decoder.blocks):
            own = dict(norm1=block.norm1, norm2=block.norm_x, norm3=block.norm_y, norm4=block.norm2)
            own |= dict(attn=block.attn, cross_attn=block.cross_attn, mlp=block.mlp)
            parts |= {f"decoder_blocks{k}.{i}.{name}": part for name, part in own.items()}
        parts[f"decoder_norm{k}"] = decoder.norm
        state[f"decoder_pred{k}.bias"] = decoder.head.bias
        if model.config.weight_norm:
            weight = decoder.head.parametrizations.weight
            state[f"decoder_pred{k}.weight_g"] = weight.original0[0]
            state[f"decoder_pred{k}.weight_v"] = weight.original1
        else:
            state[f"decoder_pred{k}.weight"] = decoder.head.weight
    for name, part in parts.items():
        state |= {f"{name}.{key}": x for key, x in part.named_parameters()}
    # their linear weights, the only ones of two dimensions, are (in, out)
    arrays = {name: x.detach().numpy() for name, x in state.items()}
    arrays = {name: x.T.copy() if x.ndim == 2 else x for name, x in arrays.items()}
    return pickled(path, dict(model=arrays | more, epoch=799), 4)


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("name", ["vit_pico_12", "vit_nano", "vit_pico_48"])
def test_a_pre_trained_model_of_the_authors_has_its_loss(tmp_path, name, weight_norm):
    fields = dict(weight_norm=weight_norm, decoder_depth=2, image_size=16)
    model = perturbed(mirl.build_mirl(name, **fields)).eval()
    path = authors_file(tmp_path / "checkpoint-799.pd", model)
    loaded = mirl.load_mirl(path).eval()
    assert loaded.config == model.config
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected, found = (m(images, noise).losses for m in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    vit = mirl.build_vit(name, image_size=16, pool="none")
    assert mirl.load_encoder(vit, path) == []
    with torch.no_grad():
        torch.testing.assert_close(vit(images), model.encoder(images))


def test_heads_of_a_model_that_is_not_in_the_table(tmp_path):
    fields = dict(depth=4, heads=4, decoder_heads=4, decoder_depth=2, segments=2)
    model = perturbed(mirl.build_mirl("vit_nano", **fields))
    path = authors_file(tmp_path / "a.pd", model)
    message = r"4 blocks of width 96 in 2 segments.*: give heads and deco"
    with pytest.raises(UserError, match=message):
        mirl.load_mirl(path)
    loaded = mirl.load_mirl(path, heads=4, decoder_heads=4, mask_ratio=0.5)
    assert loaded.config == dataclasses.replace(model.config, mask_ratio=0.5)


def test_names_that_do_not_fit_are_listed(tmp_path):
    model = mirl.build_mirl("vit_nano")
    wrong = {"decoder_gate0": np.ones(2), "cls_token": np.ones((1, 1, 5))}
    for load in (mirl.load_mirl, partial(mirl.load_encoder, mirl.build_vit("vit_nano"))):
        with pytest.raises(UserError, match=r"does not fit .*cls_token \(1, 1, 5\) for \(1, 1, 96"):
            load(authors_file(tmp_path / "a.pd", model, **wrong))
    with pytest.raises(UserError, match=r"fit the model: 1 unexpected: encoder.decoder_gate0$"):
        mirl.load_mirl(authors_file(tmp_path / "a.pd", model, decoder_gate0=np.ones(2)))
    with pytest.raises(UserError, match=r"1 missing: encoder.norm.bias$"):
        mirl.load_mirl(authors_file(tmp_path / "a.pd", model, **{"norm.bias": None}))


def test_our_checkpoints_become_models_again(tmp_path):
    """Also where further objectives left more in them."""
    config = mirl.model_config("vit_nano", segments=4, heads=2)
    model = perturbed(mirl.ExtendedMIRL(config, mirl.Objectives(feature=1.0)))
    saved = dict(model=model.state_dict(), config=dataclasses.asdict(config))
    loaded = mirl.load_mirl(stored(tmp_path / "checkpoint.pt", saved), mask_ratio=0.5)
    assert loaded.config == dataclasses.replace(config, mask_ratio=0.5)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
    model.config = loaded.config
    with torch.no_grad():
        expected = mirl.MIRL.forward(model, images, noise).loss
        torch.testing.assert_close(loaded(images, noise).loss, expected)
    mirl.save_model(tmp_path / "encoder.pt", model.encoder)
    with pytest.raises(UserError, match=r"encoder.pt holds no decoders: give a checkpoint.pt"):
        mirl.load_mirl(tmp_path / "encoder.pt")


# -- fine-tuned models --


def test_evaluating_and_predicting_with_the_sample(tmp_path, sample, capsys):
    """The same model as a file of ours, which knows its classes, is the reference."""
    classes = [f"class {i}" for i in range(10)]
    folder = image_folder(tmp_path / "data", classes, 2)
    model = train_finetune.classifier(mirl.load_file(sample)["model"], "sample", sample)
    mirl.save_model(tmp_path / "ours.pt", model, classes=classes)
    image = folder / "val" / "class 3" / "001.png"
    printed = []
    for path in (sample, tmp_path / "ours.pt"):
        assert finetune("--eval", "--from", path, "--model", "sample", "--data", folder) == 0
        assert finetune("--predict", image, "--from", path, "--model", "sample") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("%  class ") == 5


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_classifiers_of_timm_and_mae(tmp_path, capsys, pool):
    """Bare or wrapped, with learned positions, of other patches; 1000 classes are ImageNet's."""
    model = perturbed(mirl.build_vit("vit_nano", image_size=48, patch_size=8, pool=pool))
    model.pos_embed += torch.randn_like(model.pos_embed)
    model.head.bias.data[[0, 999]] += torch.tensor([30.0, 32.0])
    write_images(tmp_path, 1)
    for state in (model.state_dict(), {"model": model.state_dict(), "epoch": 3}):
        path = stored(tmp_path / "a.pth", state)
        loaded, classes = conftest.finetuned("--from", path)
        assert loaded.config == model.config and classes is None
        images = torch.randn(2, 3, 48, 48)
        torch.testing.assert_close(loaded(images), model(images))
        assert finetune("--predict", tmp_path / "000.png", "--from", path) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("%  ")[1] for line in lines[1:3]] == ["toilet tissue", "tench"]


def test_classifiers_that_are_refused(tmp_path, sample, capsys):
    folder = image_folder(tmp_path / "data", ["cat"])
    state = mirl.build_vit("vit_nano").state_dict()
    gated = stored(tmp_path / "gated.pth", state | {"blocks.0.ls1.gamma": torch.ones(96)})
    headless = authors_file(tmp_path / "a.pd", mirl.build_mirl("vit_nano"))
    for path, model, message in (
        (sample, "vit_nano", "has 6 blocks of width 32, and --model vit_nano has 6 of 96"),
        (sample, "vit_x", "there is no model 'vit_x'"),
        (sample, "sample", f"knows 10 classes, and --data {folder} has 1"),
        (headless, "vit_nano", "is no fine-tuned model: it has no head"),
        (gated, "vit_nano", "is no plain ViT: 1 unexpected: block 0"),
    ):
        assert finetune("--eval", "--from", path, "--model", model, "--data", folder) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# -- our files in timm --


def timm_vit(**fields):
    timm = pytest.importorskip("timm.models.vision_transformer")
    shape = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3)
    return timm.VisionTransformer(**shape, **fields).eval()


def test_the_encoder_in_timm(tmp_path):
    theirs = timm_vit(num_classes=0)
    model = perturbed(mirl.build_mirl("vit_nano"))
    mirl.save_model(tmp_path / "encoder.pt", model.encoder)
    theirs.load_state_dict(torch.load(tmp_path / "encoder.pt")["model"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images), model.encoder(images))


@pytest.mark.parametrize(("pool", "theirs"), [("mean", "avg"), ("cls", "token")])
def test_a_fine_tuned_model_in_timm_and_back(tmp_path, pool, theirs):
    theirs = timm_vit(num_classes=10, global_pool=theirs)
    model = perturbed(mirl.build_vit("vit_nano", num_classes=10, pool=pool))
    mirl.save_model(tmp_path / "raw-best.pt", model, classes=list("abcdefghij"))
    images = torch.randn(2, 3, 32, 32)
    back = stored(tmp_path / "timm.pth", perturbed(theirs).state_dict())
    with torch.no_grad():
        ours, _ = conftest.finetuned("--from", back)
        torch.testing.assert_close(ours(images), theirs(images))
        theirs.load_state_dict(torch.load(tmp_path / "raw-best.pt")["model"])
        torch.testing.assert_close(theirs(images), model(images))


# -- pictures of any images --


def test_pictures_of_any_images(tmp_path, capsys):
    """Panels of 32 pixels, three times as large and 4 apart; the wide image is cropped."""
    model = perturbed(mirl.build_mirl("vit_nano", segments=2))
    path = authors_file(tmp_path / "a.pd", model)
    images = make_shapes(33, 0).images[:2]
    wide = torch.cat([images[1][..., :8], images[1], images[1][..., :8]], dim=2)  # 32 x 48
    save_image(images[0] / 255, tmp_path / "a.png")
    save_image(wide / 255, tmp_path / "b.png")
    files = ["--draw", tmp_path / "a.png", tmp_path / "b.png", "--from", path]
    drawn = tmp_path / "out" / "reconstruction.png"
    assert pretrain(*files, "--out", drawn.parent, "--seed", 1, "--mask-ratio", 0.5) == 0
    assert f"drawn: {drawn} (columns" in capsys.readouterr().out
    assert [p for p in drawn.parent.iterdir() if p.is_file()] == [drawn]
    picture = TF.pil_to_tensor(Image.open(drawn)).int()
    assert picture.shape == (3, 2 * 100 + 4, 5 * 100 + 4)
    model.config = dataclasses.replace(model.config, mask_ratio=0.5)
    noise = torch.rand(2, 64, generator=torch.Generator().manual_seed(1))
    pixels = mirl.normalise_images(images)
    expected = mirl.panels(pixels, model(pixels, noise), 4) * 255
    for i, j in itertools.product(range(2), range(5)):
        panel = picture[:, 100 * i + 4 : 100 * i + 100, 100 * j + 4 : 100 * j + 100]
        assert (panel[:, 1::3, 1::3] - expected[i, j]).abs().max() <= 1
    for flags, message in (
        (["--picture-pair", 2], "there is no pair 2: the model has 1"),
        (["--mask-ratio", 1], "mask_ratio must be between 0 and 1"),
    ):
        assert pretrain(*files, "--out", tmp_path / "none", *flags) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none" / "reconstruction.png").exists()


# -- Imagenette --


def test_imagenette_in_its_layout(tmp_path, monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.imagenette.download_and_extract_archive", offline)
    flags = ["--data", "imagenette", "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert pretrain(*flags) == 2
    error = capsys.readouterr().err
    assert "--data imagenette could not be downloaded into" in error and error.count("\n") == 1
    for folder in ("n03888257", "n01440764", "n03000684"):
        for split, count in (("train", 4), ("val", 2)):
            place = tmp_path / "imagenette2-320" / split / folder
            place.mkdir(parents=True)
            for i, image in enumerate(make_shapes(33, 0).images[:count]):
                TF.to_pil_image(image).save(place / f"{folder}_{i}.JPEG")
    train, val = (mirl.load_data("imagenette", str(tmp_path), s) for s in ("train", "val"))
    assert train.classes == val.classes == ["tench", "chain saw", "parachute"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and len(val.labels) == 6
    assert "n03000684" in val.name(2) and train.read(11).shape == (3, 32, 32)
