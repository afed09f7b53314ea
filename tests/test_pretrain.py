"""The training loop and train_pretrain.py: schedules, resume, processes, refusals."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import mirl
import train_pretrain
from mirl import UserError

ROOT = Path(__file__).parent.parent
TINY = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--log-every", "2"]
TINY += ["--device", "cpu", "--picture-every", "0"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The embedded data set with 32 images for 10,000: the scripts then take seconds."""
    whole = functools.cache(mirl.make_shapes)
    monkeypatch.setattr(mirl, "make_shapes", lambda count, seed: whole(32, seed))


def pretrain(*flags):
    """The script in this process; its exit code."""
    try:
        mirl.run_script(train_pretrain.main, [*TINY, *map(str, flags)])
    except SystemExit as stop:
        return stop.code
    return 0


def write_images(folder):
    """The 32 small shapes as files."""
    folder.mkdir()
    for i, image in enumerate(mirl.make_shapes(32, 0).images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")


def metrics(out, kind):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


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


def test_step_schedule():
    factors = [mirl.lr_factor(step, 90, 9, "step") for step in range(90)]
    assert factors[9:60] == [1] * 51
    assert factors[60:80] == pytest.approx([0.1] * 20)
    assert factors[80:] == pytest.approx([0.01] * 10)


@pytest.mark.parametrize(
    ("batch", "device", "processes", "expected"),
    [
        (4096, None, 1, (4096, 256, 16)),
        (4096, None, 64, (4096, 64, 1)),
        (4096, 128, 8, (4096, 128, 4)),
        (96, None, 3, (96, 32, 1)),
        (600, None, 1, (600, 200, 3)),
    ],
)
def test_split_batch(monkeypatch, batch, device, processes, expected):
    monkeypatch.setattr(mirl, "num_processes", lambda: processes)
    assert mirl.split_batch(batch, device, 256) == expected


@pytest.mark.parametrize(
    ("batch", "device", "processes", "message"),
    [
        (4096, 100, 1, "--device-batch-size 100 .*try 64"),
        (64, 256, 1, "--device-batch-size 256 .*try 64"),
        (100, None, 8, r"--batch-size 100 .*8 processes: try (96|104)"),
    ],
)
def test_impossible_splits_suggest_one_that_works(monkeypatch, batch, device, processes, message):
    monkeypatch.setattr(mirl, "num_processes", lambda: processes)
    with pytest.raises(UserError, match=message):
        mirl.split_batch(batch, device, 256)


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
    names = {"lr", "grad_norm", "images_per_second", "peak_memory_gib", "loss", "loss_1"}
    assert names <= set(steps[0])
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


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "run" / "tensorboard" and purge_step == 1

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def flush(self):
            pass

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(mirl.importlib.util, "find_spec", lambda name: module)
    assert pretrain("--out", tmp_path / "run", "--tensorboard") == 0
    for m in metrics(tmp_path / "run", "step"):
        assert ("step/loss_1", m["loss_1"], m["step"]) in written


def test_folders_accumulation_clipping_and_step_decay(tmp_path):
    write_images(tmp_path / "images")
    flags = ["--data", tmp_path / "images", "--out", tmp_path / "run", "--workers", 2]
    flags += ["--device-batch-size", 2, "--clip-grad", 0.1, "--schedule", "step", "--dtype", "bf16"]
    assert pretrain(*flags, "--image-size", 24, "--segments", 4, "--no-dense") == 0
    assert len(losses(tmp_path / "run")[0]) == 3  # the total and two pairs
    assert metrics(tmp_path / "run", "epoch")[1]["corrupt_files"] == 0


def test_training_lowers_the_loss(tmp_path):
    assert pretrain("--out", tmp_path / "run", "--epochs", 15, "--base-lr", 0.1) == 0
    epochs = metrics(tmp_path / "run", "epoch")
    assert epochs[-1]["loss"] < 0.93  # predicting zero everywhere scores 47/48 = 0.98


def test_accumulation_changes_nothing_but_memory(tmp_path):
    """8 at a time or 4 × 2: the same gradients, given the same images and masks."""
    results = []
    for device_batch in (8, 2):
        torch.manual_seed(0)
        model = mirl.build_mirl("vit_nano").double()
        args = train_pretrain.parse([*TINY, "--out", str(tmp_path / str(device_batch))])
        split = mirl.split_batch(8, device_batch, 256)
        trainer = new_trainer(model, args, split, CPU)
        x, noise = torch.randn(3, 8, 3, 32, 32).double(), torch.rand(3, 8, 64)
        train_on(trainer, x, noise)
        results.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results)


CPU = torch.device("cpu")


def new_trainer(model, args, split, device, steps=3):
    groups = mirl.parameter_groups(model, args.lr, 0.05)
    data = mirl.make_shapes(steps * split.batch_size, 0)
    shares = mirl.Shares(len(data.images), split, 0)
    return mirl.Trainer(model, args, groups, (0.9, 0.95), shares, data, device)


def train_on(trainer, x, noise):
    """Given effective batches x (steps, B, …) and masks: this process's share of each."""
    rank, size = mirl.process_rank(), trainer.split.device_batch_size
    for epoch in trainer.epochs():
        for images, u in zip(x, noise, strict=True):
            share = slice(rank * size * trainer.split.accumulation, None)
            micro = zip(images[share].split(size), u[share].split(size), strict=True)
            for _, (part, part_noise) in zip(
                range(trainer.split.accumulation), micro, strict=False
            ):
                with trainer.forward():
                    out = trainer.model(part, part_noise)
                trainer.backward(out.loss, {})
        trainer.end_epoch(epoch)


# -- stop and go on --


def stop_at(monkeypatch, epoch, batch, how):
    """Runs `how()` in the given epoch (from 0) before the given batch of it."""
    original = mirl.PretrainLoader.epoch

    def epoch_with_a_stop(self, e):
        for i, images in enumerate(original(self, e)):
            if (e, i) == (epoch, batch):
                images = how() or images * float("nan")
            yield images

    monkeypatch.setattr(mirl.PretrainLoader, "epoch", epoch_with_a_stop)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        whole = mirl.make_shapes
        patch.setattr(mirl, "make_shapes", lambda count, seed: whole(32, seed))
        out = tmp_path_factory.mktemp("whole") / "run"
        assert pretrain("--out", out, "--epochs", 3) == 0
    return out


def assert_same_run(out, other):
    assert losses(out) == losses(other)  # bit for bit
    a, b = (mirl.load_file(Path(o) / "checkpoint.pt") for o in (out, other))
    assert all(torch.equal(a["model"][k], v) for k, v in b["model"].items())
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert (Path(out) / "encoder.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_and_resume_equal_an_uninterrupted_run(tmp_path, capsys, uninterrupted, number):
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs begin with it ignored
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1, 3, lambda: os.kill(os.getpid(), number))
        assert pretrain("--out", out, "--epochs", 3) == 128 + number
    printed = capsys.readouterr().out
    assert f"stopped by {number.name}: {out}/checkpoint.pt holds the last complete epoch" in printed
    assert signal.getsignal(signal.SIGINT) is before
    assert [m["step"] for m in metrics(out, "step")] == [2, 4, 6]  # one of epoch 2, to come again
    assert pretrain("--out", out, "--epochs", 3, "--resume") == 0
    assert_same_run(out, uninterrupted)


def test_a_run_on_files_resumes_exactly(tmp_path):
    """Worker processes live through the epochs of one run, and start anew in the other."""
    write_images(tmp_path / "images")
    flags = ["--data", tmp_path / "images", "--workers", 1, "--epochs", 3]
    assert pretrain("--out", tmp_path / "whole", *flags) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 1, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert pretrain("--out", tmp_path / "run", *flags) == 128 + signal.SIGTERM
    assert pretrain("--out", tmp_path / "run", *flags, "--resume") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_fp16_and_its_loss_scaler_also_taken_up_and_left_by_a_resume(
    tmp_path, monkeypatch, uninterrupted
):
    """On a CPU, where the flag is refused, torch can do it all the same."""
    dtypes = {"auto": torch.float32, "fp16": torch.float16, "fp32": torch.float32}
    monkeypatch.setattr(mirl, "pick_dtype", lambda flag, device: dtypes[flag])
    out = tmp_path / "run"
    for epoch, dtype in enumerate(["auto", "fp16", "fp32"]):
        with pytest.MonkeyPatch.context() as patch:
            if epoch < 2:
                stop_at(patch, epoch + 1, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
            code = pretrain("--out", out, "--epochs", 3, "--dtype", dtype, "--resume")
        assert code == (128 + signal.SIGTERM if epoch < 2 else 0)
        scaler = mirl.load_file(out / "checkpoint.pt")["scaler"]
        assert ("scale" in scaler) == (dtype == "fp16")
    first, exact = ([loss for loss, *_ in losses(run)] for run in (out, uninterrupted))
    assert first == pytest.approx(exact, rel=1e-2) and first != exact


def test_kill_and_resume_equal_an_uninterrupted_run(tmp_path, uninterrupted):
    """SIGKILL in the second epoch, while a line of metrics and a checkpoint are half written."""
    out = tmp_path / "run"
    program = """
import os, signal, sys, pytest, mirl, test_pretrain, train_pretrain
whole = mirl.make_shapes
mirl.make_shapes = lambda count, seed: whole(32, seed)
test_pretrain.stop_at(pytest.MonkeyPatch(), 1, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
train_pretrain.main(sys.argv[1:])
"""
    flags = [*TINY, "--out", str(out), "--epochs", "3"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    killed = subprocess.run([sys.executable, "-c", program, *flags], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (out / "checkpoint.tmp.pt").write_bytes(b"half")
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "st')
    assert pretrain("--out", out, "--epochs", 3, "--resume") == 0
    assert_same_run(out, uninterrupted)
    assert not list(out.glob("*tmp*"))


def test_resume_without_a_run_starts_one_and_of_a_complete_one_ends(tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain("--out", out, "--resume") == 0
    before = mirl.load_file(out / "checkpoint.pt")["model"]
    (out / "encoder.pt").unlink()
    assert pretrain("--out", out, "--resume") == 0
    assert "after epoch 2 of 2" in capsys.readouterr().out
    after = mirl.load_file(out / "checkpoint.pt")["model"]
    assert all(torch.equal(before[k], v) for k, v in after.items())
    assert (out / "encoder.pt").exists() and len(metrics(out, "step")) == 4


def test_a_run_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "run"
    assert pretrain("--out", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refused = {
        ("--resume", "--epochs", 5): "continues a run as it began.*epochs 2 -> 5",
        (): "already holds a run: add --resume",
        ("--resume", "--segments", 4): "of another model: segments 2 -> 4",
        ("--resume", "--lr", 0.5): "continues a run as it began.*lr .* -> 0.5",
    }
    capsys.readouterr()
    for flags, message in refused.items():
        assert pretrain("--out", out, *flags) == 2
        assert re.search(message, capsys.readouterr().err)
    images, labels, classes = mirl.make_shapes(32, 0)
    doubled = mirl.ImageTensor(images.repeat(2, 1, 1, 1), labels.repeat(2), classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mirl, "make_shapes", lambda count, seed: doubled)
        assert pretrain("--out", out, "--resume") == 2
    assert "trained on 32 other images than the 64 of --data shapes" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(b"torn")
    before["checkpoint.pt"] = b"torn"
    assert pretrain("--out", out, "--resume") == 2
    assert "is not a checkpoint that can be read safely" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    for wrong, sentence in (({}, "damaged or no checkpoint of this script"), ([1], "holds a list")):
        torch.save(wrong, out / "checkpoint.pt")
        assert pretrain("--out", out, "--resume") == 2
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, accumulation):
    out = tmp_path / "run"
    flags = ["--out", out, "--epochs", 3, "--device-batch-size", 8 // accumulation]
    stop_at(monkeypatch, 1, 2 * accumulation, lambda: None)
    assert pretrain(*flags) == 1
    error = capsys.readouterr().err
    assert "the loss at step 7 (epoch 2) is not finite" in error and error.count("\n") == 1
    assert mirl.load_file(out / "checkpoint.pt")["epoch"] == 1
    monkeypatch.undo()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    """The last loss of an epoch may still be finite when its step ruins the weights."""
    step = torch.optim.AdamW.step

    def ruin(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    assert pretrain("--out", tmp_path / "run", "--batch-size", 32) == 1
    assert "the weights after step 1 (epoch 1) are not finite" in capsys.readouterr().err
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
    path = tmp_path / "file.pt"
    mirl.save_file(path, {"a": torch.ones(2)})
    with pytest.raises(RuntimeError), mirl.replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert torch.equal(mirl.load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["file.pt"]


# -- several processes --

WORKER = """
import sys, torch, mirl, train_pretrain, test_pretrain
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
out, accumulation = sys.argv[1], int(sys.argv[2])
with mirl.processes("cpu") as device:
    torch.manual_seed(0)
    model = mirl.build_mirl("vit_nano").double()
    args = train_pretrain.parse([*test_pretrain.TINY, "--out", out])
    split = mirl.split_batch(8, 4 // accumulation if mirl.num_processes() > 1 else 8, 256)
    trainer = test_pretrain.new_trainer(model, args, split, device)
    reduced = [0]
    def hook(state, bucket):
        reduced[0] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)
    if mirl.num_processes() > 1:
        trainer.model.register_comm_hook(None, hook)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 3, 32, 32, generator=g).double()
    test_pretrain.train_on(trainer, x, torch.rand(3, 8, 64, generator=g))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if mirl.num_processes() > 1:  # two epochs of three steps, each gradient sent once a step
        assert reduced[0] == 6 * trained, (reduced[0] / trained)
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_equal_one(tmp_path, accumulation):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    (tmp_path / "worker.py").write_text(WORKER)
    for command, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        program = [*command, tmp_path / "worker.py", tmp_path / name, str(accumulation)]
        done = subprocess.run(program, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (mirl.load_file(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"))


def test_the_script_under_torchrun(tmp_path):
    write_images(tmp_path / "images")
    flags = [*TINY, "--data", tmp_path / "images", "--out", tmp_path / "run", "--workers", "1"]
    for i in range(10, 20):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"broken")
    command = [*TORCHRUN, ROOT / "train_pretrain.py", *flags, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned = re.findall(r"(\w+.png) cannot be read and is skipped", done.stdout)
    assert len(warned) == len(set(warned)) == metrics(tmp_path / "run", "epoch")[1]["corrupt_files"]
    assert 5 < len(warned) <= 10 and "Warning" not in done.stderr
    assert "effective batch 8 = 2 process(es) x 4 images x 1 accumulated" in done.stdout
    assert done.stdout.count("done: ") == 1
    assert [m["step"] for m in metrics(tmp_path / "run", "step")] == [2, 3, 4, 6]
    assert (tmp_path / "run" / "reconstruction.png").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("after epoch 2 of 2") == 1, again.stderr


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
    boxes = mirl.random_boxes(4, 32, 32, (0.2, 1.0), images.device)
    cropped = mirl.crop_resize(images, boxes, (32, 32), torch.rand(4, device="meta") < 0.5)
    out = model(mirl.normalise_images(cropped))
    out.loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    mirl.gradient_norms(model.encoder)
    with pytest.raises(RuntimeError):
        out.loss.item()


# -- what needs a GPU --

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


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
    args = train_pretrain.parse([*TINY, "--out", str(tmp_path / "run"), "--log-every", "100"])
    split = mirl.split_batch(8, 2, 256)
    trainer = new_trainer(model, args, split, device, steps=4)
    loader = mirl.PretrainLoader(mirl.make_shapes(32, 0), (32, 32), split, 0, device)
    next(iter(trainer.epochs()))
    micro_batches = iter(loader.epoch(0))
    for i in range(12):  # three of the epoch's four steps; the last one logs
        torch.cuda.set_sync_debug_mode("error" if i > 4 else "default")
        with trainer.forward():
            out = trainer.model(next(micro_batches))
        trainer.backward(out.loss, {})
    torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 3


# -- refusals --


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit_x"], "no model 'vit_x'; the models are"),
        (["--segments", 8], "8 segments need at least 8 blocks"),
        (["--segments", 3], "segments must be 1 .* or even"),
        (["--mask-ratio", "nan"], "mask_ratio must be between 0 and 1"),
        (["--mask-ratio", 0.999], "leaves no visible patch"),
        (["--image-size", 30], "30x30 does not divide into patches of 4"),
        (["--batch-size", 64], "--batch-size 64 is larger than the 32 training images"),
        (["--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["--device-batch-size", 3], "--device-batch-size 3 does not divide .*: try 2"),
        (["--epochs", 0], "--epochs must be at least 1"),
        (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
        (["--warmup-epochs", 5], "--warmup-epochs 5 is longer than the run of 2 epochs"),
        (["--lr", "nan"], "--lr must be greater than 0 and finite, not nan"),
        (["--lr", "-1"], "--lr must be greater than 0"),
        (["--base-lr", "inf"], "--base-lr must be greater than 0 and finite, not inf"),
        (["--clip-grad", 0], "--clip-grad must be greater than 0"),
        (["--seed", 10**30], "--seed must be at least 0 and finite"),
        (["--recipe", "slow"], "invalid choice: 'slow'"),
        (["--data", ""], "--data is empty"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--data", "/no/such/folder"], "/no/such/folder: there is no such folder"),
        (["--device", "cuda:99"], "needs CUDA device 99 and there are"),
        (["--device", "toaster"], "--device toaster: use auto, cuda"),
        (["--dtype", "fp16"], "--dtype fp16 needs a CUDA device"),
        (["--picture-pair", 2], "--picture-pair 2: the model has 1"),
        (["--method", "mae", "--segments", 2], "--method mae is one segment"),
        (["--method", "mae", "--dense"], "--method mae is one segment"),
    ],
)
def test_refusals(tmp_path, capsys, flags, message):
    """One sentence, exit code 2, and nothing written."""
    assert pretrain("--out", tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_refusals_of_what_is_missing(tmp_path, capsys, monkeypatch):
    find = mirl.importlib.util.find_spec

    def hide(name, *rest):
        return None if name == "tensorboard" else find(name, *rest)

    monkeypatch.setattr(mirl.importlib.util, "find_spec", hide)
    assert pretrain("--out", tmp_path / "run", "--tensorboard") == 2
    assert "--tensorboard needs an extra: pip install" in capsys.readouterr().err
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
