"""The authors' weight files, in PaddlePaddle's format."""

import argparse
import builtins
import lzma
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from test_checkpoint import perturbed

import mirl
from common.checkpoint import load_classifier, load_encoder, load_file, load_mirl

DATA = Path(__file__).parent / "data"
SAMPLE = mirl.Config(6, 32, 4, image_size=32, patch_size=4)


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


def test_the_sample_holds_what_it_is_said_to(sample):
    expected = np.load(DATA / "finetune_expected.npz")
    weights = load_file(sample)["model"]
    names, shapes = expected["names"], [[*map(int, s.split(","))] for s in expected["shapes"]]
    values = np.split(expected["values"], np.cumsum([np.prod(s) for s in shapes])[:-1])
    assert list(weights) == list(names) and len(names) == 80
    for name, shape, value in zip(names, shapes, values, strict=True):
        value = value.reshape(shape)  # PaddlePaddle's linear weights are (in, out)
        assert np.array_equal(weights[name].numpy(), value.T if len(shape) == 2 else value), name
    model = load_classifier(weights, "sample", sample)
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["images"]))
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), rtol=0, atol=1e-5)


class Call:
    """What a pickle makes by calling a function."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("form", ["array", "pair", "tensor"])
def test_arrays_of_every_kind(tmp_path, protocol, form):
    def form_of(array):
        pair = ("parameter_0", array)  # PaddlePaddle pickles a tensor as a call that makes one
        return dict(array=array, pair=pair, tensor=Call(tuple, pair))[form]

    rng = np.random.default_rng(0)
    numbers = (3 * rng.standard_normal((5, 3, 2))).astype("f4")
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
    arrays = {kind: numbers.astype(kind) for kind in kinds}
    arrays |= dict(fortran=np.asfortranarray(numbers), linear=numbers[:, :, 0].copy())
    state = OrderedDict((name, form_of(array)) for name, array in arrays.items())
    # the upper half of a float32's bits, here rounded, are a bfloat16
    state["bf16"] = form_of(torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy())
    state["StructuredToParameterName@@"] = {"f4": "parameter_0"}
    whole = dict(model=state, epoch=99, args=argparse.Namespace(lr=0.1), scaler=np.float32(2))
    whole["optimizer"] = [np.zeros(0, "f4"), {"LR_Scheduler": None}]
    for content in (whole, state):
        path = tmp_path / "a.pd"
        raw = pickle.dumps(content, protocol)
        if protocol < 4:  # text that older versions of numpy wrote
            raw = raw.replace(b"numpy._core", b"numpy.core")
        path.write_bytes(raw)
        found = load_file(path)["model"]
        assert found.keys() == arrays.keys() | {"bf16"}
        for name, array in arrays.items():
            expected = torch.from_numpy(np.ascontiguousarray(array.T if array.ndim == 2 else array))
            assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
        torch.testing.assert_close(found["bf16"], torch.from_numpy(numbers).bfloat16())


def test_large_tensors_come_in_slices(tmp_path):
    whole = np.arange(12, dtype="f4").reshape(3, 4)
    pieces = {"w@@.0": whole.ravel()[:5], "w@@.1": whole.ravel()[5:]}
    info = {"w": {"OriginShape": (3, 4), "slices": list(pieces)}}
    state = pieces | {"b": np.ones(2, "f4"), "UnpackBigParamInfor@@": info}
    found = load_file(pickled(tmp_path / "a.pd", state, 2))["model"]
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
            refused(load_file, path, message=rf"a.pd is not .* read safely \(it names .*{name}")
    assert not Path("ran").exists()


def test_what_else_is_no_such_file(tmp_path, sample):
    raw, array = sample.read_bytes(), np.arange(6, dtype="f4").reshape(2, 3)
    whole = pickle.dumps({"a": array}, 2)
    wrong = dict(
        persistent=b"\x80\x02Pelsewhere\n.",
        shape=whole.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"),
        big_endian=pickle.dumps({"a": array.astype(">f4")}, 2),
        pointers=pickle.dumps({"a": array.astype("f8")}, 2).replace(b"f8", b"O8"),
        slices=pickle.dumps({"UnpackBigParamInfor@@": {"a": {"slices": ["b"]}}}, 2),
        a_list=pickle.dumps([array], 4),
    )
    wrong |= {f"cut-{n}": raw[:n] for n in (0, 1, 2, len(raw) // 2, -1)}
    assert wrong["shape"] != whole and b"O8" in wrong["pointers"]
    for name, content in wrong.items():
        (tmp_path / f"{name}.pd").write_bytes(content)
        message = rf"{name}.pd is not a checkpoint .* read safely|{name}.pd .* it holds a list"
        refused(load_file, tmp_path / f"{name}.pd", message=message)


def authors_file(path, model):
    """A MIRL model under the authors' names, in their layout."""
    state = model.encoder.state_dict()
    parts = dict(norm_low=model.input_norm, decoder_embed0_1=model.input_embed)
    parts |= {f"norm{k}": norm for k, norm in enumerate(model.segment_norms)}
    parts |= {f"decoder_embed{k}": embed for k, embed in enumerate(model.segment_embeds)}
    for k, decoder in enumerate(model.decoders):
        state[f"mask_token{k}"], head = decoder.mask_token, decoder.head
        state |= {f"decoder_pos_embed{k}": decoder.pos_embed, f"decoder_pred{k}.bias": head.bias}
        if model.config.weight_norm:
            weight = head.parametrizations.weight
            state[f"decoder_pred{k}.weight_g"] = weight.original0[0]
            state[f"decoder_pred{k}.weight_v"] = weight.original1
        else:
            state[f"decoder_pred{k}.weight"] = head.weight
        parts[f"decoder_norm{k}"] = decoder.norm
        for i, block in enumerate(decoder.blocks):
            names = dict(norm1="norm1", norm2="norm_x", norm3="norm_y", norm4="norm2")
            names |= dict(attn="attn", cross_attn="cross_attn", mlp="mlp")
            for name, ours in names.items():
                parts[f"decoder_blocks{k}.{i}.{name}"] = getattr(block, ours)
    for name, part in parts.items():
        state |= {f"{name}.{key}": x for key, x in part.named_parameters()}
    # their linear weights, the only ones of two dimensions, are (in, out)
    arrays = {name: x.detach().numpy() for name, x in state.items()}
    arrays = {name: x.T.copy() if x.ndim == 2 else x for name, x in arrays.items()}
    return pickled(path, dict(model=arrays, epoch=799), 4)


@pytest.mark.parametrize(
    ("name", "weight_norm"), [("vit_pico_12", True), ("vit_nano", False), ("vit_pico_48", True)]
)
def test_a_pre_trained_model_of_the_authors_has_its_loss(tmp_path, name, weight_norm):
    fields = dict(weight_norm=weight_norm, decoder_depth=2, image_size=16)
    model = perturbed(mirl.build_mirl(name, **fields)).eval()
    path = authors_file(tmp_path / "checkpoint-799.pd", model)
    loaded = load_mirl(path).eval()
    assert loaded.config == model.config
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        expected, found = (m(images, noise).losses for m in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    vit = mirl.build_vit(name, image_size=16, pool="none")
    assert load_encoder(vit, path) == []
    with torch.no_grad():
        torch.testing.assert_close(vit(images), model.encoder(images))


def test_a_model_whose_heads_are_not_known(tmp_path):
    for fields in (dict(depth=4), dict(segments=4)):
        model = mirl.build_mirl("vit_nano", **fields)
        path = authors_file(tmp_path / "a.pd", model)
        refused(load_mirl, path, message="a.pd is of no model in mirl.MODELS: give heads and deco")
        assert load_mirl(path, heads=3, decoder_heads=2).config == model.config
