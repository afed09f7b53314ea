"""The other objectives, truncated pre-training, gradient norms and their figure."""

import functools
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from PIL import Image
from test_pretrain import ROOT, TORCHRUN, metrics, pretrain

import mirl
import train_pretrain
from mirl import UserError

SMALL = dict(depth=4, width=32, heads=2, decoder_width=16, decoder_heads=2, decoder_depth=1)


def extended(objectives, vgg=None, seed=0, **overrides):
    torch.manual_seed(seed)
    config = mirl.model_config("vit_nano", **(SMALL | dict(segments=4) | overrides))
    return mirl.ExtendedMIRL(config, objectives, vgg).double()


def batch(n=3):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(n, 3, 32, 32, generator=generator).double()
    return images, torch.rand(n, 64, generator=generator)


MAE = dict(segments=1, dense=False, weight_norm=False)


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    whole = functools.cache(mirl.make_shapes)
    monkeypatch.setattr(mirl, "make_shapes", lambda count, seed: whole(33, seed))


def narrow_vgg16(**_):
    """torchvision's VGG-16 with a sixteenth of the channels, and no classifier."""
    widths = [4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M"]
    with torch.device("meta"):
        net = torchvision.models.VGG(torch.nn.Sequential(), init_weights=False)
    net.features = torchvision.models.vgg.make_layers(widths)
    net.classifier = torch.nn.Identity()
    return net


@pytest.fixture
def vgg_file(tmp_path, monkeypatch):
    """VGG-16 with random weights."""
    monkeypatch.setattr("torchvision.models.vgg16", narrow_vgg16)
    torch.manual_seed(0)
    path = tmp_path / "vgg16.pth"
    torch.save(narrow_vgg16().state_dict(), path)
    return path


def test_the_layers_are_those_of_torchvision():
    with torch.device("meta"):
        net, narrow = torchvision.models.vgg16().features, narrow_vgg16().features
    assert [type(layer) for layer in net] == [type(layer) for layer in narrow]


# -- L† --


@pytest.mark.parametrize("overrides", [{}, MAE])
def test_dagger_adds_omega_times_the_loss_of_the_main_components(overrides):
    """Against the definition in loops over pairs, images and masked patches."""
    model, (images, noise) = extended(mirl.Objectives(omega=0.3), **overrides), batch()
    out = model(images, noise)
    target = mirl.normalise_patches(mirl.patchify(images, 4))[0]
    total = 0.0
    for g, main in enumerate(out.main):
        plain = own = count = 0.0
        for b in range(3):
            for i in out.mask[b].nonzero()[:, 0].tolist():
                residual = out.residual[g][b, i] if out.residual else 0
                plain += (target[b, i] - main[b, i] - residual).square().sum().item() / 48
                own += (target[b, i] - main[b, i]).square().sum().item() / 48
                count += 1
        total += (plain + 0.3 * own) / count / len(out.main)
    assert out.loss.item() == pytest.approx(total)
    plain_loss = mirl.MIRL.forward(model, images, noise).loss
    assert out.loss.item() == pytest.approx((plain_loss + 0.3 * out.terms["main"]).item())


# -- feature level --


@pytest.mark.parametrize("negatives", [True, False])
def test_feature_loss_against_a_version_in_loops(negatives):
    torch.manual_seed(0)
    z, positive = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double()
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 0, 1]], dtype=torch.bool)

    def cos(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    losses = []
    for b in range(3):
        for i in mask[b].nonzero()[:, 0].tolist():
            if not negatives:
                losses.append(2 - 2 * cos(z[b, i], positive[b, i]))
                continue
            own = math.exp(cos(z[b, i], positive[b, i]) / 0.07)
            others = [math.exp(cos(z[b, i], positive[c, i]) / 0.07) for c in range(3) if c != b]
            losses.append(-math.log(own / (own + sum(others))))
    got = mirl.feature_loss(z, positive, mask, negatives)
    assert got.item() == pytest.approx(sum(losses) / len(losses))


def test_feature_loss_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    z, positive = torch.randn(8, 5, 96), torch.randn(8, 5, 96)
    mask = torch.ones(8, 5, dtype=torch.bool)
    exact = mirl.feature_loss(z.double(), positive.double(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert mirl.feature_loss(z, positive, mask).item() == pytest.approx(exact.item(), rel=1e-5)


def test_feature_gradient_flows_through_the_prediction_alone():
    model, (images, noise) = extended(mirl.Objectives(feature=0.5)), batch()
    out = model(images, noise)
    features = (out.loss - mirl.MIRL.forward(model, images, noise).loss) / 0.5
    assert features.item() == pytest.approx(out.terms["feature"].item())
    features.backward()
    assert all(p.grad is None for p in model.momentum_encoder.parameters())
    assert model.encoder.cls_token.grad.abs().sum() > 0
    assert model.feature_decoder.head.weight.grad.abs().sum() > 0
    groups = mirl.parameter_groups(model, 1e-3, 0.05)
    trained = {id(p) for g in groups for p in g["params"]}
    assert not trained & {id(p) for p in model.momentum_encoder.parameters()}
    assert {id(p) for p in model.feature_decoder.parameters()} <= trained
    assert len(model.feature_decoder.blocks) == 2


def test_the_target_view_is_whole_and_comes_from_the_momentum_encoder():
    model, (images, noise) = extended(mirl.Objectives(feature=1.0)), batch()
    with torch.no_grad():
        for p in model.momentum_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
        out = model(images, noise)
        target = model.momentum_encoder.forward_features(images)[:, 1:]
        predicted = model.feature_decoder(model.feature_embed(out.features), None, out.visible)
        assert predicted.shape == target.shape == (3, 64, 32)
        expected = mirl.feature_loss(predicted, target, out.mask)
    assert out.terms["feature"].item() == pytest.approx(expected.item())


def test_the_momentum_encoder_is_a_moving_average_on_schedule():
    model = extended(mirl.Objectives(feature=1.0))
    expected = model.momentum_encoder.blocks[0].attn.qkv.weight.clone()
    for momentum in (0.9, 0.5):
        with torch.no_grad():
            model.encoder.blocks[0].attn.qkv.weight.normal_()
        new = model.encoder.blocks[0].attn.qkv.weight.detach()
        expected = momentum * expected + (1 - momentum) * new
        model.update_momentum(momentum)
    torch.testing.assert_close(model.momentum_encoder.blocks[0].attn.qkv.weight, expected)
    values = [mirl.feature_momentum(e, 300) for e in (0, 50, 100, 200, 300)]
    assert values == pytest.approx([0.999, 0.99945, 0.9999, 0.999945, 0.99999])


def test_one_image_has_no_negatives():
    model, (images, noise) = extended(mirl.Objectives(feature=1.0)), batch(1)
    with pytest.raises(UserError, match=r"needs negatives.*--feature-negatives none"):
        model(images, noise)
    model = extended(mirl.Objectives(feature=1.0, negatives=False))
    assert model(images, noise).loss.isfinite()


# -- VGG --


def test_vgg_loss_against_a_plain_pass_through_torchvisions_vgg(vgg_file):
    vgg = mirl.vgg_layers(str(vgg_file)).double()
    net = narrow_vgg16().double().eval()
    net.load_state_dict(mirl.load_file(vgg_file))
    torch.manual_seed(1)
    x, y = torch.randn(2, 2, 3, 32, 32).double()
    taps, kept = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22}, []
    for images in (x, y):
        maps = []
        for i, layer in enumerate(net.features):
            images = layer(images)
            if i in taps.values():
                assert isinstance(layer, torch.nn.ReLU)
                maps.append(images.detach().clone())
        kept.append(maps)
    expected = 0.0
    for a, b in zip(*kept, strict=True):
        for n in range(2):
            C, H, W = a[n].shape
            expected += (a[n] - b[n]).square().sum().item() / (C * H * W) / 2
    assert mirl.vgg_loss(vgg, x, y).item() == pytest.approx(expected)
    both = mirl.vgg_loss(vgg, x, torch.cat([y, x]))  # two pairs, the second perfect
    assert both.item() == pytest.approx(expected / 2)


@pytest.mark.parametrize("overrides", [{}, MAE])
def test_a_perfect_prediction_has_no_vgg_loss_and_visible_patches_are_true(
    vgg_file, overrides, monkeypatch
):
    vgg = mirl.vgg_layers(str(vgg_file)).double()
    model, (images, noise) = extended(mirl.Objectives(vgg=1.0), vgg, **overrides), batch()
    target = mirl.normalise_patches(mirl.patchify(images, 4))[0]
    plain = mirl.MIRL.forward(model, images, noise)
    residual = tuple(0.3 * torch.ones_like(r) for r in plain.residual)
    garbage = 1e3 * (~plain.mask)[..., None]  # where nothing is predicted
    main = tuple(target - (residual[0] if residual else 0) + garbage for _ in plain.main)
    perfect = plain._replace(main=main, residual=residual)
    monkeypatch.setattr(mirl.MIRL, "forward", lambda *_: perfect)
    assert model(images, noise).terms["vgg"].item() < 1e-24
    wrong = perfect._replace(main=tuple(m + 0.1 for m in main))
    monkeypatch.setattr(mirl.MIRL, "forward", lambda *_: wrong)
    assert model(images, noise).terms["vgg"].item() > 1e-6


def test_vgg_stays_out_of_the_state_dict_and_frozen(vgg_file):
    vgg = mirl.vgg_layers(str(vgg_file)).double()
    model, (images, noise) = extended(mirl.Objectives(vgg=1.0), vgg), batch()
    assert not any("vgg" in k for k in model.state_dict())
    model(images, noise).loss.backward()
    assert all(p.grad is None for p in vgg.parameters())


def test_vgg_that_cannot_be_had(tmp_path, monkeypatch, capsys):
    def offline(**_):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models.vgg16", offline)
    assert pretrain("--vgg-weight", 1, "--out", tmp_path / "run") == 2
    assert "could not be downloaded (no network); give a file" in capsys.readouterr().err
    monkeypatch.undo()
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="is no VGG-16"):
        mirl.vgg_layers(str(tmp_path / "other.pth"))


# -- together, and in the script --


@pytest.mark.parametrize("method", ["mirl", "mae"])
def test_all_objectives_together_add_up_and_resume(tmp_path, vgg_file, method):
    flags = ["--method", method, "--loss", "dagger", "--omega", 0.1, "--feature-weight", 0.2]
    flags += ["--vgg-weight", 0.3, "--vgg-checkpoint", vgg_file, "--log-grad-norms"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert pretrain("--out", whole, *flags) == 0
    for line in metrics(whole, "step"):
        total = line["loss_1"] + 0.1 * line["main"] + 0.2 * line["feature"] + 0.3 * line["vgg"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        for kind in ("qkv", "mlp", "norm", "proj"):
            assert len(line[f"grad_{kind}"]) == 6 and min(line[f"grad_{kind}"]) > 0
    original = mirl.Trainer.end_epoch

    def stop(self, epoch, **record):
        original(self, epoch, **record)
        raise UserError("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirl.Trainer, "end_epoch", stop)
        assert pretrain("--out", run, *flags) == 2
    assert pretrain("--out", run, *flags, "--no-log-grad-norms", "--resume") == 0
    assert ["grad_qkv" in line for line in metrics(run, "step")] == [True, True, False, False]
    a, b = (mirl.load_file(folder / "checkpoint.pt")["model"] for folder in (whole, run))
    assert any(k.startswith("momentum_encoder.") for k in a) and a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["momentum_encoder.cls_token"], a["encoder.cls_token"])
    assert mirl.load_file(whole / "encoder.pt")["model"].keys() == {
        k.removeprefix("encoder.") for k in a if k.startswith("encoder.")
    }


WORKER = """
import sys, torch, mirl, test_pretrain, test_objectives, train_pretrain
with mirl.processes("cpu") as device:
    model = test_objectives.extended(mirl.Objectives(omega=0.5, feature=1.0))
    args = train_pretrain.parse([*test_pretrain.TINY, "--out", sys.argv[1]])
    trainer = test_pretrain.new_trainer(model, args, mirl.split_batch(8, None, 256), device)
    trainer.after_step = lambda: model.update_momentum(0.9)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 3, 32, 32, generator=g).double()
    test_pretrain.train_on(trainer, x, torch.rand(3, 8, 64, generator=g))
    if mirl.is_main():
        torch.save(model.state_dict(), sys.argv[1] + ".pt")
"""


def test_two_processes_equal_one_on_the_joint_batch(tmp_path):
    """Negatives come from the other process's images too."""
    (tmp_path / "worker.py").write_text(WORKER)
    for name, command in (("one", [sys.executable]), ("two", TORCHRUN)):
        done = subprocess.run(
            [*command, tmp_path / "worker.py", tmp_path / name],
            capture_output=True, text=True, env=path_to_tests(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (mirl.load_file(tmp_path / f"{name}.pt") for name in ("one", "two"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], msg=key)


def path_to_tests():
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


# -- truncated pre-training --


def test_truncation_leaves_the_last_blocks_out(tmp_path):
    """Nine blocks in four segments end after blocks 3, 5, 7 and 9. [S E]"""
    args = train_pretrain.parse(["--model", "vit_s", "--truncate", "3"])
    config = train_pretrain.model_config(args)
    assert mirl.segment_ends(config.depth, config.segments) == [3, 5, 7, 9]
    args = train_pretrain.parse(["--model", "vit_s", "--method", "mae", "--truncate", "3"])
    assert train_pretrain.model_config(args).depth == 9
    assert pretrain("--out", tmp_path / "run", "--truncate", 2) == 0
    vit = mirl.build_vit("vit_nano")
    missing = mirl.load_encoder(vit, str(tmp_path / "run" / "encoder.pt"), truncated=True)
    assert {k.split(".")[1] for k in missing if k.startswith("blocks")} == {"4", "5"}


# -- gradient norms --


def test_gradient_norms_by_hand():
    model, (images, noise) = extended(mirl.Objectives(omega=1.0)), batch()
    model(images, noise).loss.backward()
    norms = mirl.gradient_norms(model.encoder)
    for k, block in enumerate(model.encoder.blocks):
        by_hand = {
            "qkv": block.attn.qkv.weight.grad.square().sum().sqrt(),
            "proj": block.attn.proj.weight.grad.square().sum().sqrt(),
            "mlp": (
                block.mlp.fc1.weight.grad.square().sum() + block.mlp.fc2.weight.grad.square().sum()
            ).sqrt(),
            "norm": (
                block.norm1.weight.grad.square().sum() + block.norm2.weight.grad.square().sum()
            ).sqrt(),
        }
        for kind, value in by_hand.items():
            torch.testing.assert_close(norms[kind][k], value)


@pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="needs matplotlib, an optional extra"
)
def test_drawing_finished_runs(tmp_path):
    for name in ("a", "b"):
        flags = ["--log-grad-norms"] if name == "a" else []
        assert pretrain("--out", tmp_path / name, *flags) == 0
    plain = '{"kind": "step", "step": 9, "loss": 1.0}\n'  # resumed without --log-grad-norms
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write(plain)
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert pretrain("--plot", tmp_path / "a", tmp_path / "b") == 0
    for name in ("losses.png", "gradients.png"):
        picture = Image.open(tmp_path / "a" / name)
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(10**6)) > 5
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plot", "/no/such/run"], "--plot"),
        (["--truncate", 6], "--truncate 6 leaves none of the 6 blocks"),
        (["--truncate", 5], "2 segments need at least 2 blocks"),
        (["--omega", -1], "--omega must be at least 0"),
        (["--feature-weight", "nan"], "--feature-weight must be at least 0"),
        (["--vgg-weight", 1, "--vgg-checkpoint", "/no/file"], "there is no file /no/file"),
    ],
)
def test_refusals(tmp_path, capsys, flags, message):
    assert pretrain("--out", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_unit_length_features_decide(tmp_path):
    """Scale does not matter: cosine, as the seed's equation after L2 normalisation."""
    z, f = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(mirl.feature_loss(7 * z, f / 5, mask), mirl.feature_loss(z, f, mask))
