"""train_pretrain.py: its runs against plain loops, what they leave, resume, kills, processes."""

import contextlib
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, TINY, at_batch, interrupt, make_shapes, metrics, needs_gpu, run
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

import common
import mirl
import train_finetune
import train_pretrain
from common.checkpoint import load_file, save_model
from common.pictures import titled

FLAGS = [*TINY, "--picture-every", "0", "--workers", "0"]
pretrain = functools.partial(run, train_pretrain, *FLAGS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that tests start; how many there are shows in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_as_in_plain_loops(out, flags, processes=1):
    """The run of these flags on the small shapes."""
    args = train_pretrain.parse([*FLAGS, *flags])
    torch.manual_seed(args.seed)
    model = train_pretrain.new_model(args, CPU)
    half = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16")
    crop = v2.RandomResizedCrop(32, (0.2, 1), interpolation=InterpolationMode.BICUBIC)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(0.5)])

    def losses(batches, picks, rank):
        noise = torch.rand(len(batches[rank]), 64)
        with pytest.MonkeyPatch.context() as patch, half:
            if args.feature_weight:  # the negatives are those of all processes
                with torch.no_grad():
                    z = [model.momentum_encoder(images)[:, 1:] for images in batches]
                z = F.normalize(torch.cat(z).float(), dim=2)
                patch.setattr(mirl, "gather_batch", lambda _: (z, rank))
            out = model(batches[rank], noise)
        found = dict(loss=out.loss) | out.terms
        for g, (loss, p) in enumerate(zip(out.losses, out.reconstruction), start=1):
            found[f"loss_{g}"] = loss
            if out.residual:
                share = (out.residual[g - 1] * p).sum() / p.square().sum()
                found[f"residual_share_{g}"] = share
        return found

    images, how, records = make_shapes(33, 0)[0], dict(betas=(0.9, 0.95), processes=processes), []
    for record in conftest.plain_steps(args, model, losses, images, augment, **how):
        records.append(record)
        if args.feature_weight:
            decay = 0.999 + 0.0009 * record["step"] / 4 / 100  # 4 steps an epoch
            for name, average in model.momentum_encoder.named_parameters():
                average.data.lerp_(model.encoder.get_parameter(name).data, 1 - decay)
    files = {"checkpoint.pt": model.state_dict()}
    conftest.assert_trained(out, records, (2, 4, 6, 8), files, atol=1e-7)


CASES = {
    "accumulated": "--device-batch-size 4",
    "clipped": "--clip-grad 1 --dtype bf16 --seed 3 --method mae",
    "followed": "--feature-weight 0.5 --omega 0.1 --warmup-epochs 0.5 --lr 0.01",
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_a_run_in_plain_loops(tmp_path, flags):
    assert pretrain("--out", tmp_path / "run", *flags.split()) == 0
    assert_as_in_plain_loops(tmp_path / "run", flags.split())


def in_each_of_two_processes(*flags):
    """A run, stopped and gone on with; also under accumulation a gradient is sent once a step."""
    sent, runs = [0], []

    def count(state, bucket):
        sent[0] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)

    def parallel(model, device):
        runs.append(common.distributed.data_parallel(model, device))
        runs[-1].register_comm_hook(None, count)
        return runs[-1]

    with common.distributed.process_group("cpu") as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_pretrain, "process_group", lambda flag: contextlib.nullcontext(device))
        patch.setattr(train_pretrain, "data_parallel", parallel)
        with at_batch(train_pretrain, 1, 3, interrupt):
            assert pretrain(*flags) == 130
        assert pretrain(*flags, "--resume") == 0
    trained = sum(p.numel() for p in runs[0].parameters() if p.requires_grad)
    assert sent[0] == (4 + 1 + 4) * trained, sent[0] / trained


def test_a_run_of_two_processes_in_plain_loops(tmp_path):
    flags = ["--device-batch-size", "2", "--feature-weight", "0.5", "--clip-grad", "1"]
    given = ("--out", str(tmp_path / "run"), *flags)
    code = f"import test_pretrain; test_pretrain.in_each_of_two_processes{given}"
    conftest.succeed(conftest.start(code, 2))
    assert_as_in_plain_loops(tmp_path / "run", flags, 2)


def assert_picture(path, images, model, pair=1, seed=0):
    """Its panels are three times as large as the images; MAE has no residual and main component."""
    noise = torch.rand(len(images), 64, generator=torch.Generator().manual_seed(seed))
    pixels = conftest.normalised(images)
    with torch.no_grad():
        panels = mirl.panels(pixels, mirl.MIRL.forward(model, pixels, noise), 4, pair)
    names = ["ground truth", "masked", "reconstruction", "residual", "main component"]
    names = names[:3] if model.config.segments == 1 else names
    panels = (255.999 * panels[:, : len(names)]).byte()
    expected = titled(panels.repeat_interleave(3, dim=3).repeat_interleave(3, dim=4), names)
    assert torch.equal(TF.pil_to_tensor(Image.open(path)), TF.pil_to_tensor(expected))


@pytest.mark.parametrize("method", ["mirl", "mae"])
def test_a_run_from_end_to_end(tmp_path, capsys, monkeypatch, method):
    out, compiled, ours = tmp_path / "run", [], method == "mirl"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    flags = ["--out", out, "--method", method, "--picture-every", 2, "--epochs", 3]
    flags += ["--segments", 4, "--picture-pair", 2] if ours else ["--compile"]
    assert pretrain(*flags) == 0
    assert f"done: {out}/encoder.pt for fine-tuning" in capsys.readouterr().out
    settings = json.loads((out / "config.json").read_text())
    assert settings["model_config"]["segments"] == (4 if ours else 1)
    assert metrics(out, "epoch")[2]["loss"] < 0.7 * metrics(out, "epoch")[0]["loss"]
    # the encoder alone fits an encoder and holds what the checkpoint holds
    model = common.checkpoint.load_mirl(out / "checkpoint.pt")
    encoder = torch.load(out / "encoder.pt", weights_only=True)
    mirl.ViT(mirl.Config(**encoder["config"])).load_state_dict(encoder["model"])
    torch.testing.assert_close(encoder["model"], dict(model.encoder.state_dict()), rtol=0, atol=0)
    shown = make_shapes(33, 1)[0][[0, 4, 9, 13, 18, 22, 27, 32]]
    assert_picture(out / "reconstruction.png", shown, model, 2 if ours else 1)
    assert [path.name for path in out.glob("epoch*")] == ["epoch-0002.png"]
    assert len(compiled) == (not ours) and not list(out.glob("*tmp*"))


def test_pictures_of_any_images(tmp_path, capsys):
    """The wide one is cropped."""
    torch.manual_seed(0)
    model = mirl.build_mirl("vit_nano", segments=4, mask_ratio=0.5)
    save_model(tmp_path / "a.pt", model)
    images, files = make_shapes(33, 0)[0][:2], [tmp_path / "a.png", tmp_path / "b.png"]
    wide = torch.cat([images[1][..., :8], images[1], images[1][..., :8]], dim=2)  # 32 x 48
    for image, file in zip((images[0], wide), files, strict=True):
        save_image(image / 255, file)
    draw = ["--draw", *files, "--from", tmp_path / "a.pt"]
    drawn = tmp_path / "out" / "reconstruction.png"
    given = ["--out", drawn.parent, "--seed", 1, "--mask-ratio", 0.5, "--picture-pair", 2]
    assert pretrain(*draw, *given) == 0
    assert f"drawn: {drawn}" in capsys.readouterr().out
    assert list(drawn.parent.iterdir()) == [drawn]
    assert_picture(drawn, images, model, 2, seed=1)
    for flags in (["--picture-pair", 3], ["--mask-ratio", 1]):
        assert pretrain(*draw, "--out", tmp_path / "none", *flags) == 2
    told = capsys.readouterr().err
    assert "there is no pair 3: the model has 2" in told and "mask_ratio" in told
    assert not (tmp_path / "none" / "reconstruction.png").exists()


def test_ctrl_c_and_resume_equal_an_uninterrupted_run(tmp_path, capsys):
    """Worker processes live through the epochs of one run, start anew in another, and a third has
    none. Of a complete run, a resume writes anew what comes after the last epoch."""
    images, whole = conftest.write_images(tmp_path / "images"), tmp_path / "whole"
    flags = ["--data", images, "--epochs", 3]
    assert pretrain("--out", whole, *flags) == 0
    for out, code in ((tmp_path / "steady", 0), (tmp_path / "run", 130)):
        with at_batch(train_pretrain, 1 if code else 9, 3, interrupt):
            assert pretrain("--out", out, *flags, "--workers", 2) == code
        assert pretrain("--out", out, *flags, "--workers", 1, "--resume") == 0
        conftest.assert_same_run(out, whole, "checkpoint.pt", "encoder.pt")
    assert "stopped by Ctrl-C; a training run goes on with --resume" in capsys.readouterr().err
    (out / "encoder.pt").unlink()
    assert pretrain("--out", out, *flags, "--resume") == 0
    conftest.assert_same_run(out, whole, "checkpoint.pt", "encoder.pt")
    assert len(load_file(out / "checkpoint.pt")["history"]) == 3


def test_fp16_and_its_loss_scaler_also_taken_up_and_left_by_a_resume(tmp_path, monkeypatch):
    """On a CPU, where the flag is refused, in bfloat16, which is quicker there."""

    def autocast(device, dtype):
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float16)

    monkeypatch.setattr(train_pretrain, "autocast", autocast)
    dtypes = {"auto": torch.float32, "fp16": torch.float16, "fp32": torch.float32}
    for module in (train_pretrain, common.metrics):
        monkeypatch.setattr(module, "pick_dtype", lambda flag, device: dtypes[flag])
    out, whole, steps = tmp_path / "run", tmp_path / "whole", []
    for epoch, dtype in enumerate(["auto", "fp16", "fp16", "fp32"], start=1):
        with at_batch(train_pretrain, epoch, 0, interrupt):
            code = pretrain("--out", out, "--epochs", 4, "--dtype", dtype, "--resume")
        assert code == (130 if epoch < 4 else 0)
        steps.append(load_file(out / "checkpoint.pt")["scaler"].get("_growth_tracker"))
    assert steps == [None, 4, 8, None] and pretrain("--out", whole, "--epochs", 4) == 0
    for name in ("loss", "grad_norm"):
        found, exact = ([m[name] for m in metrics(run, "step")] for run in (out, whole))
        assert found == pytest.approx(exact, rel=2e-2) and found != exact


def die_with_half_a_checkpoint(*flags, save=torch.save):
    """In the second epoch."""

    def write_half(state, file):
        save(state, file)
        if state.get("epoch") == 2:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = write_half
    pretrain(*flags)


def test_kills_and_resumes_equal_an_uninterrupted_run(tmp_path):
    """The first where it hurts, others at any moment: KILLS in the environment is how many. Of so
    short epochs many fall into a checkpoint."""
    flags, began = ["--epochs", "20", "--batch-size", "32", "--log-every", "3"], time.time()
    assert pretrain("--out", tmp_path / "whole", *flags) == 0
    seconds, kills, out = time.time() - began, int(os.environ.get("KILLS", 4)), tmp_path / "run"
    given = ("--out", str(out), *flags, "--resume")
    [process] = conftest.start(f"import test_pretrain as t; t.die_with_half_a_checkpoint{given}")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and load_file(out / "checkpoint.pt")["epoch"] == 1
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    for _ in range(kills):
        [process] = conftest.start(f"import test_pretrain; test_pretrain.pretrain{given}")
        time.sleep(random.uniform(0.1, max(0.3, 2 / kills)) * seconds)
        process.kill()
        process.join()
    assert pretrain(*given) == 0
    conftest.assert_same_run(out, tmp_path / "whole", "checkpoint.pt", "encoder.pt")
    assert not list(out.glob("*tmp*"))


def test_a_run_is_never_overwritten(tmp_path, capsys, monkeypatch):
    out, others = tmp_path / "run", make_shapes(33, 1)
    assert pretrain("--out", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def refused(message, *flags, place=out):
        assert pretrain("--out", place, *flags) == 2
        assert re.search(message, capsys.readouterr().err)

    refused("already holds a run: add --resume")
    refused("cannot continue .* other epochs 2 -> 5;", "--resume", "--epochs", 5)
    monkeypatch.setattr(common.data, "make_shapes", lambda count, seed: others)
    refused("has other data_digest", "--resume")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    for name in ("checkpoint.pt", "config.json"):  # what is left of a run
        (out / name).unlink()
        refused("already holds a run")
    refused("is a file, not a folder", place=out / "metrics.jsonl")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    """In the first of four micro-batches of the third step, before the next log."""
    flags = ["--out", tmp_path / "run", "--epochs", 3, "--device-batch-size", 2]
    with at_batch(train_pretrain, 1, 2 * 4, lambda images: images.fill_(float("nan"))):
        assert pretrain(*flags) == 1
    error = capsys.readouterr().err
    assert "a loss up to step 8 (epoch 2) is not finite" in error
    assert "is not finite: --resume goes on after epoch 1; try a lower" in error
    assert load_file(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    """The last loss of an epoch may still be finite when its step ruins the weights."""

    def ruin(self):
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    assert pretrain("--batch-size", 32, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "a weight after step 1 (epoch 1) is not finite: " in error
    assert not list((tmp_path / "run").glob("*.pt"))


class Waits(TorchDispatchMode):
    """Refuses what would wait for a GPU, to know a value or a shape."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        assert not any(name in str(op) for name in names), f"{op} waits for the device"
        return op(*args, **kwargs or {})


LOOPS = {
    "clipped": (train_pretrain, "--log-grad-norms --clip-grad 1"),
    "followed": (train_pretrain, "--method mae --feature-weight 1"),
    "fine-tuned": (train_finetune, "--from scratch --train-images 32 --drop-path 0.1"),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(("script", "flags"), LOOPS.values(), ids=LOOPS)
def test_the_loop_waits_for_the_device_only_to_log(tmp_path, monkeypatch, device, script, flags):
    """From the second step on, of an epoch of four whose last one is logged."""
    original, watched = script.batches, []

    def watch(loader, device):
        for i, given in enumerate(original(loader, device)):
            watch = i in range(2, 6)
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error" if watch else "default")
            with Waits() if watch else contextlib.nullcontext():
                watched.append(watch)
                yield given

    monkeypatch.setattr(script, "batches", watch)
    usual = [*TINY, "--workers", 0, "--device", device, "--device-batch-size", 4]
    assert run(script, *usual, "--log-every", 99, "--out", tmp_path / "run", *flags.split()) == 0
    assert sum(watched) == 8


@needs_gpu
@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "fp16"], ["--compile"]])
def test_a_run_on_a_gpu(tmp_path, flags):
    assert pretrain("--out", tmp_path / "run", "--device", "cuda", *flags) == 0
    assert metrics(tmp_path / "run", "epoch")[-1]["loss"] < 3


def test_the_script_under_torchrun(tmp_path):
    """With ten broken files, told once, whichever process meets them."""
    folder, out = conftest.write_images(tmp_path / "images"), tmp_path / "run"
    for i in range(10, 20):
        (folder / f"{i:03d}.png").write_bytes(b"broken")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [train_pretrain.__file__, *TINY, "--data", folder, "--out", out, "--workers=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    warned = re.findall(r"(\w+.png) cannot be used", done.stdout)
    assert len(warned) == len(set(warned)) == 10 == metrics(out, "epoch")[1]["corrupt_files"]
    assert "Warning" not in done.stderr and done.stdout.count("done: ") == 1
    assert [m["step"] for m in metrics(out, "step")] == [2, 4, 6, 8]
