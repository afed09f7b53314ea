"""The training loop and train_pretrain.py: schedules, runs, resume, processes."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TINY,
    TORCHRUN,
    assert_same_run,
    at_batch,
    launch,
    make_shapes,
    metrics,
    needs_gpu,
    run,
    terminate,
    with_tests_on_path,
    write_images,
)
from PIL import Image

import mirl
import train_pretrain
from mirl import UserError
from train_pretrain import PretrainLoader


def pretrain(*flags):
    return run(train_pretrain, *TINY, "--picture-every", 0, *flags)


def losses(out):
    """All losses of all steps, exactly."""
    return [[v for k, v in m.items() if k.startswith("loss")] for m in metrics(out, "step")]


# -- optimisation --


def test_cosine_schedule_in_loops():
    base, total, warmup = 3.0, 50, 10
    for step in range(total):
        if step < warmup:
            expected = base * (step + 1) / warmup
        else:
            expected = base * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert base * mirl.lr_factor(step, total, warmup) == pytest.approx(expected)
    assert mirl.lr_factor(total, total, warmup) == 0
    assert mirl.lr_factor(0, total, 0) == 1


def test_step_and_linear_schedules():
    factors = [mirl.lr_factor(step, 120, 9, "step") for step in range(120)]
    assert factors[9:80] == [1] * 71
    assert factors[80:110] == pytest.approx([0.1] * 30)
    assert factors[110:] == pytest.approx([0.01] * 10)
    factors = [mirl.lr_factor(step, 120, 20, "linear") for step in range(120)]
    assert factors[20:] == pytest.approx([1 - k / 100 for k in range(100)])


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
        (5001, None, 1, "--batch-size 5001 is larger than the 5000 training images"),
    ],
)
def test_split_batch_comes_out_even_or_suggests_what_would(
    monkeypatch, batch, device, processes, expected
):
    monkeypatch.setattr(mirl, "WORLD_SIZE", processes)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            mirl.split_batch(5000, batch, device, 256)
    else:
        split = mirl.split_batch(5000, batch, device, 256)
        assert (split.device_batch_size, split.accumulation) == expected
        assert split.steps == 5000 // batch


def test_weight_decay_spares_biases_norms_and_tokens():
    model = mirl.build_mirl("vit_nano")
    groups = {g["weight_decay"]: g["params"] for g in mirl.parameter_groups(model, 1.0, 0.05)}
    decayed, spared = ({id(p) for p in groups[decay]} for decay in (0.05, 0.0))
    for name, p in model.named_parameters():
        weight = name.endswith(("weight", "weight.original1")) and "norm" not in name
        assert (id(p) in decayed) == weight, name
        assert (id(p) in spared) == (not weight and p.requires_grad), name


def test_seeds_differ():
    seeds = [mirl.seed_of(w, e, r) for w in ("a", "b") for e in range(50) for r in range(8)]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**63


# -- the script, end to end --


@pytest.mark.parametrize("method", ["mirl", "mae"])
def test_a_run_from_end_to_end(tmp_path, capsys, method):
    out = tmp_path / "run"
    assert pretrain("--out", out, "--method", method, "--picture-every", 1) == 0
    printed = capsys.readouterr().out
    assert "effective batch 8 = 1 process(es) x 8 images x 1 accumulated" in printed
    assert "done: " in printed

    steps, epochs = metrics(out, "step"), metrics(out, "epoch")
    assert [m["step"] for m in steps] == [2, 4, 6, 8] and [m["epoch"] for m in epochs] == [1, 2]
    assert [set(m) - {"seconds", "corrupt_files"} for m in epochs] == [set(steps[0])] * 2
    assert epochs[0]["loss"] == pytest.approx((steps[0]["loss"] + steps[1]["loss"]) / 2)
    names = {"lr", "grad_norm", "images_per_second", "input_wait", "loss", "loss_1"}
    assert names <= set(steps[0])
    assert ("residual_share_1" in epochs[0]) == (method == "mirl")
    assert steps[3]["lr"] == pytest.approx(8e-3 * 8 / 256 * mirl.lr_factor(7, 8, 4))
    saved = json.loads((out / "config.json").read_text())
    assert saved["device_batch_size"] == 8 and saved["dtype"] == "float32"
    assert saved["model_config"]["segments"] == (2 if method == "mirl" else 1)

    # the encoder alone fits an encoder and holds what the checkpoint holds
    encoder = torch.load(out / "encoder.pt", weights_only=True)
    vit = mirl.ViT(mirl.Config(**encoder["config"]))
    vit.load_state_dict(encoder["model"])
    whole = mirl.load_file(out / "checkpoint.pt")["model"]
    assert torch.equal(vit.cls_token, whole["encoder.cls_token"])

    for name in ("reconstruction.png", "epoch-0001.png", "epoch-0002.png"):
        with Image.open(out / name) as picture:
            assert picture.size == (5 * 100 + 4, 8 * 100 + 4)
    assert not list(out.glob("*tmp*"))


def test_shares_of_the_residual():
    model = mirl.build_mirl("vit_pico_12")
    out = model(torch.randn(3, 3, 32, 32))
    for g, share in enumerate(train_pretrain.residual_shares(out).values()):
        x, xi = out.main[g].detach().double(), out.residual[g].detach().double()
        expected = (xi * (x + xi)).sum() / (x + xi).square().sum()
        assert share.item() == pytest.approx(expected.item(), 1e-4)
    assert g == 1


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    """The package is an optional extra: something that takes every call stands in for it."""
    out, package = tmp_path / "run", Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr(mirl.importlib.util, "find_spec", lambda name: package)
    assert pretrain("--out", out, "--tensorboard") == 0
    package.SummaryWriter.assert_called_once_with(out / "tensorboard", purge_step=1)
    for m in metrics(out, "step"):
        add = package.SummaryWriter.return_value.add_scalar
        add.assert_any_call("step/loss_1", m["loss_1"], m["step"])


def test_folders_accumulation_clipping_and_step_decay(tmp_path):
    folder, out = write_images(tmp_path / "images"), tmp_path / "run"
    flags = ["--data", folder, "--out", out, "--workers", 2, "--schedule", "step"]
    flags += ["--device-batch-size", 2, "--clip-grad", 0.1, "--dtype", "bf16"]
    assert pretrain(*flags, "--image-size", 24, "--segments", 4, "--no-dense") == 0
    assert len(losses(out)[0]) == 3  # the total and two pairs
    assert metrics(out, "epoch")[1]["corrupt_files"] == 0


def test_training_lowers_the_loss(tmp_path):
    assert pretrain("--out", tmp_path / "run", "--epochs", 15, "--base-lr", 0.1) == 0
    epochs = metrics(tmp_path / "run", "epoch")
    assert epochs[-1]["loss"] < 0.93  # predicting zero everywhere scores 47/48 = 0.98


def new_run(model, out, split, device=CPU):
    """A run of two epochs on as many shapes as its split has images."""
    args = train_pretrain.parse([*TINY, "--out", str(out)])
    groups = mirl.parameter_groups(model, args.lr, 0.05)
    shapes = make_shapes(33, 0)
    data = shapes._replace(images=shapes.images[: split.images])
    return mirl.Run(model, args, groups, (0.9, 0.95), split, data, device)


def train_on(run, x, noise):
    """Given effective batches x (steps, B, …) and masks: this process's share of each."""
    model = run.parts["model"]
    size, accumulation = run.split.device_batch_size, run.split.accumulation
    first = mirl.RANK * size * accumulation
    for _ in run.epochs():
        for images, u in zip(x, noise, strict=True):
            for i in range(accumulation):
                micro = slice(first + i * size, first + (i + 1) * size)
                run.model.require_backward_grad_sync = i + 1 == accumulation
                loss = run.model(images[micro], u[micro]).loss
                run.scaler.scale(loss / accumulation).backward()
                run.note(loss=loss)
            run.update()
            if isinstance(model, mirl.ExtendedMIRL):
                mirl.move_average(model.momentum_encoder, model.encoder, 0.9)
        run.end_epoch()


# -- stop and go on --


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirl, "make_shapes", lambda count, seed: make_shapes(33, seed))
        out = tmp_path_factory.mktemp("whole") / "run"
        assert pretrain("--out", out, "--epochs", 3) == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_equal_an_uninterrupted_run(tmp_path, capsys, uninterrupted, number):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs begin with it ignored
    with at_batch(PretrainLoader, 1, 3, lambda images: os.kill(os.getpid(), number)):
        assert pretrain("--out", out, "--epochs", 3) == 128 + number
    printed = capsys.readouterr().out
    assert f"stopped by {number.name}: {out}/checkpoint.pt holds the last complete epoch" in printed
    assert signal.getsignal(signal.SIGINT) is before
    assert [m["step"] for m in metrics(out, "step")] == [2, 4, 6]  # one of epoch 2, to come again
    assert pretrain("--out", out, "--epochs", 3, "--resume") == 0
    assert_same_run(out, uninterrupted, "checkpoint.pt", "encoder.pt")


def test_a_run_on_files_resumes_exactly(tmp_path):
    """Worker processes live through the epochs of one run, and start anew in the other."""
    flags = ["--data", write_images(tmp_path / "images"), "--workers", 1, "--epochs", 3]
    assert pretrain("--out", tmp_path / "whole", *flags) == 0
    with at_batch(PretrainLoader, 1, 2, terminate):
        assert pretrain("--out", tmp_path / "run", *flags) == 128 + signal.SIGTERM
    assert pretrain("--out", tmp_path / "run", *flags, "--resume") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", "checkpoint.pt", "encoder.pt")


def test_fp16_and_its_loss_scaler_also_taken_up_and_left_by_a_resume(
    tmp_path, monkeypatch, uninterrupted
):
    """On a CPU, where the flag is refused, torch can do it all the same."""
    dtypes = {"auto": torch.float32, "fp16": torch.float16, "fp32": torch.float32}
    monkeypatch.setattr(mirl, "pick_dtype", lambda flag, device: dtypes[flag])
    out = tmp_path / "run"
    for epoch, dtype in enumerate(["auto", "fp16", "fp32"]):
        with at_batch(PretrainLoader, epoch + 1, 0, terminate):
            code = pretrain("--out", out, "--epochs", 3, "--dtype", dtype, "--resume")
        assert code == (128 + signal.SIGTERM if epoch < 2 else 0)
        scaler = mirl.load_file(out / "checkpoint.pt")["scaler"]
        assert ("scale" in scaler) == (dtype == "fp16")
    first, exact = ([loss for loss, *_ in losses(o)] for o in (out, uninterrupted))
    assert first == pytest.approx(exact, rel=1e-2) and first != exact


def test_kill_and_resume_equal_an_uninterrupted_run(tmp_path, uninterrupted):
    """SIGKILL in the second epoch, while a line of metrics and a checkpoint are half written."""
    out = tmp_path / "run"
    program = """
import os, signal, sys, mirl, conftest, train_pretrain
mirl.make_shapes = lambda count, seed: conftest.make_shapes(33, seed)
kill = lambda images: os.kill(os.getpid(), signal.SIGKILL)
with conftest.at_batch(train_pretrain.PretrainLoader, 1, 3, kill):
    train_pretrain.main(sys.argv[1:])
"""
    flags = [*TINY, "--picture-every", "0", "--out", str(out), "--epochs", "3"]
    command = [sys.executable, "-c", program, *flags]
    environment = with_tests_on_path() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, env=environment)
    assert killed.returncode == -signal.SIGKILL
    (out / "checkpoint.tmp.pt").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert pretrain("--out", out, "--epochs", 3, "--resume") == 0
    assert_same_run(out, uninterrupted, "checkpoint.pt", "encoder.pt")
    assert not list(out.glob("*tmp*"))


def test_resume_without_a_run_starts_one_and_of_a_complete_one_ends(tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain("--out", out, "--resume") == 0
    before = mirl.load_file(out / "checkpoint.pt")["model"]
    (out / "encoder.pt").unlink()
    assert pretrain("--out", out, "--resume") == 0
    assert "after epoch 2 of 2" in capsys.readouterr().out
    after = mirl.load_file(out / "checkpoint.pt")["model"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (out / "encoder.pt").exists() and len(metrics(out, "step")) == 4


def test_a_run_is_never_overwritten(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert pretrain("--out", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused = {
        ("--resume", "--epochs", 5): "continues a run as it began.*another args: epochs 2 -> 5",
        (): "already holds a run: add --resume",
        ("--resume", "--segments", 4): "has another config: segments 2 -> 4",
        ("--resume", "--lr", 0.5): "another args: lr .* -> 0.5",
    }
    capsys.readouterr()
    for flags, message in refused.items():
        assert pretrain("--out", out, *flags) == 2
        assert re.search(message, capsys.readouterr().err)
    fewer = make_shapes(33, 0).select(torch.arange(32))
    with monkeypatch.context() as patch:
        patch.setattr(mirl, "make_shapes", lambda count, seed: fewer)
        assert pretrain("--out", out, "--resume") == 2
    assert "has another data: images 33 -> 32, digest" in capsys.readouterr().err
    saved = mirl.load_file(out / "checkpoint.pt")
    (out / "checkpoint.pt").write_bytes(b"torn")
    before["checkpoint.pt"] = b"torn"
    assert pretrain("--out", out, "--resume") == 2
    assert "is not a checkpoint that can be read safely" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    no_groups = saved | dict(optimizer=dict(state={}, param_groups=[]))
    damaged = "damaged or no checkpoint of this script"
    for wrong, sentence in (({}, damaged), (no_groups, damaged), ([1], "holds a list")):
        torch.save(wrong, out / "checkpoint.pt")
        assert pretrain("--out", out, "--resume") == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, accumulation):
    out = tmp_path / "run"
    flags = ["--out", out, "--epochs", 3, "--device-batch-size", 8 // accumulation]
    third = 2 * accumulation  # the first micro-batch of the third step
    with at_batch(PretrainLoader, 1, third, lambda images: images.fill_(float("nan"))):
        assert pretrain(*flags) == 1
    error = capsys.readouterr().err
    assert "the loss at step 7 (epoch 2) is not finite" in error and error.count("\n") == 1
    assert mirl.load_file(out / "checkpoint.pt")["epoch"] == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    """The last loss of an epoch may still be finite when its step ruins the weights."""
    step = torch.optim.AdamW.step

    def ruin(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    assert pretrain("--out", tmp_path / "run", "--batch-size", 32) == 1
    assert "a weight after step 1 (epoch 1) is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="is not a checkpoint that can be read safely"):
        mirl.load_file(tmp_path / "evil.pt")
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(UserError, match="there is no file"):
        mirl.load_file(tmp_path / "none.pt")


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    """Moved into place, not copied: who has the old file open keeps it, whole."""
    path = tmp_path / "file.pt"
    mirl.save(path, lambda p: p.write_bytes(b"first"))
    with open(path, "rb") as reader:
        mirl.save(path, lambda p: p.write_bytes(b"a second one"))
        assert reader.read() == b"first" and path.read_bytes() == b"a second one"

    def fail(temporary):
        temporary.write_bytes(b"half")
        assert temporary.parent == path.parent  # a move within the file system is atomic
        raise RuntimeError

    with pytest.raises(RuntimeError):
        mirl.save(path, fail)
    assert path.read_bytes() == b"a second one"
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]


# -- several processes --

WORKER = """
import sys, torch, mirl, test_objectives, test_pretrain
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
out, accumulation, objectives = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with mirl.processes("cpu") as device:
    torch.manual_seed(0)
    model = mirl.build_mirl("vit_nano").double()
    if objectives == "all":
        model = test_objectives.extended(mirl.Objectives(omega=0.5, feature=1.0))
    split = mirl.split_batch(24, 8, 4 // accumulation if mirl.WORLD_SIZE > 1 else 8, 256)
    run = test_pretrain.new_run(model, out, split, device)
    reduced = [0]
    def hook(state, bucket):
        reduced[0] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)
    if mirl.WORLD_SIZE > 1:
        run.model.register_comm_hook(None, hook)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 3, 32, 32, generator=g).double()
    test_pretrain.train_on(run, x, torch.rand(3, 8, 64, generator=g))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if mirl.WORLD_SIZE > 1:  # two epochs of three steps, each gradient sent once a step
        assert reduced[0] == 6 * trained, (reduced[0] / trained)
"""


@pytest.mark.parametrize(("accumulation", "objectives"), [(1, "own"), (2, "own"), (1, "all")])
def test_two_processes_equal_one(tmp_path, accumulation, objectives):
    """However the batch is cut; negatives come from the other process's images too."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    for command, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        launch(*command, worker, tmp_path / name, accumulation, objectives)
    one, two = (mirl.load_file(tmp_path / n / "checkpoint.pt")["model"] for n in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_the_script_under_torchrun(tmp_path):
    folder = write_images(tmp_path / "images")
    flags = [*TINY, "--data", folder, "--out", tmp_path / "run", "--workers", 1]
    for i in range(10, 20):
        (folder / f"{i:03d}.png").write_bytes(b"broken")
    command = [*TORCHRUN, ROOT / "train_pretrain.py", *flags, "--resume"]
    done = launch(*command)
    warned = re.findall(r"(\w+.png) cannot be read", done.stdout)
    assert len(warned) == len(set(warned)) == metrics(tmp_path / "run", "epoch")[1]["corrupt_files"]
    assert 5 < len(warned) <= 10 and "Warning" not in done.stderr
    assert "effective batch 8 = 2 process(es) x 4 images x 1 accumulated" in done.stdout
    assert done.stdout.count("done: ") == 1
    assert [m["step"] for m in metrics(tmp_path / "run", "step")] == [2, 4, 6, 8]
    assert (tmp_path / "run" / "reconstruction.png").exists()
    assert launch(*command).stdout.count("after epoch 2 of 2") == 1


def test_an_error_of_another_process_is_said(tmp_path):
    """Process 1 finds no GPU of its own; it must not end without a word."""
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "99", "WORLD_SIZE": "2"}
    command = [sys.executable, ROOT / "train_pretrain.py", "--device", "cuda", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "error: process 1: --device cuda" in done.stderr


# not the weight norm, whose gradient older versions of torch lack on the meta device
@pytest.mark.parametrize("overrides", [dict(weight_norm=False), mirl.mae_overrides("vit_nano")])
def test_a_step_reads_nothing_from_the_device(overrides):
    """Tensors of the meta device have no values: whatever would wait for a GPU fails there."""
    model = mirl.build_mirl("vit_nano", **overrides).to("meta")
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    out = model(mirl.normalise_images(train_pretrain.random_crops(images, (32, 32))))
    out.loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    train_pretrain.gradient_norms(model.encoder)
    train_pretrain.residual_shares(out)
    with pytest.raises(RuntimeError):
        out.loss.item()


# -- what needs a GPU --


@needs_gpu
@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--dtype", "fp16"], ["--compile"]])
def test_a_run_on_a_gpu(tmp_path, flags):
    assert pretrain("--out", tmp_path / "run", "--device", "cuda", *flags) == 0
    assert metrics(tmp_path / "run", "epoch")[-1]["loss"] < 3


@needs_gpu
def test_steps_do_not_wait_for_the_gpu(tmp_path):
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = mirl.build_mirl("vit_nano").to(device)
    split = mirl.split_batch(32, 8, 2, 256)
    one = new_run(model, tmp_path / "run", split, device)
    one.args.log_every = 100
    args = train_pretrain.parse([*TINY, "--out", str(tmp_path / "run")])
    loader = train_pretrain.PretrainLoader(make_shapes(33, 0), (32, 32), args, device)
    next(iter(one.epochs()))
    micro_batches = loader.epoch(0, mirl.shuffled(split, 0, 0))
    for i in range(12):  # three of the epoch's four steps; the last one logs
        torch.cuda.set_sync_debug_mode("error" if i > 4 else "default")
        loss = one.model(next(micro_batches)).loss
        one.scaler.scale(loss / 4).backward()
        one.note(loss=loss)
        if i % 4 == 3:
            one.update()
    torch.cuda.set_sync_debug_mode("default")
    assert one.step == 3


# -- what is missing, and flags --


def test_refusals_of_what_is_missing(tmp_path, capsys, monkeypatch):
    find = mirl.importlib.util.find_spec

    def hide(name, *rest):
        return None if name == "tensorboard" else find(name, *rest)

    monkeypatch.setattr(mirl.importlib.util, "find_spec", hide)
    assert pretrain("--out", tmp_path / "run", "--tensorboard") == 2
    needs = "--tensorboard needs tensorboard: pip install -e '.[tensorboard]'"
    assert needs in capsys.readouterr().err
    monkeypatch.setattr(mirl.shutil, "which", lambda name: None)
    assert pretrain("--out", tmp_path / "run", "--compile") == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert pretrain("--out", tmp_path / "file") == 2
    assert "is a file, not a folder" in capsys.readouterr().err
    assert pretrain("--out", tmp_path / "file" / "run") == 2
    assert re.fullmatch(r"error: .*Not a directory: .*/file/run'\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_recipes_and_help(capsys):
    args = train_pretrain.parse(["--recipe", "imagenet", "--epochs", "800"])
    assert (args.epochs, args.batch_size, args.model) == (800, 4096, "vit_b")
    assert args.lr == pytest.approx(1.5e-4 * 16) and args.out == "runs/mirl-imagenet"
    with pytest.raises(SystemExit):
        train_pretrain.parse(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images; quick" in printed and "imagenet 300" in printed
