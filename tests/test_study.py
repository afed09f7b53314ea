"""The depth study: its cells are what they are called, its table is what the results say."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torchvision.transforms import v2

import mirl
import train_finetune
import train_pretrain

SCRIPT = Path(__file__).parent.parent / "assets" / "depth_study.py"
spec = importlib.util.spec_from_file_location("depth_study", SCRIPT)
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


@pytest.mark.parametrize("size", study.SIZES)
def test_every_cell_is_what_it_is_called(size):
    cells = study.plan([0, 3])
    assert len(set(map(str, cells))) == len(cells) == 2 * 14
    assert {cell.seed for cell in cells[:14]} == {0}  # a whole seed before the next
    for cell in cells:
        commands = study.commands(cell, size, "shapes", Path("out") / str(cell), "cpu")
        scripts = [command[0] for command in commands.values()]
        assert scripts[-1] == "train_finetune.py"
        finetune = train_finetune.parse(commands["finetune"][1:])
        assert finetune.seed == cell.seed and not finetune.ema_decay
        assert ("linear" in commands) == (not cell.truncated)
        if cell.method == "scratch":
            assert "pretrain" not in commands and finetune.from_ == "scratch"
            continue
        args = train_pretrain.parse(commands["pretrain"][1:])
        config = train_pretrain.model_config(args)
        assert args.seed == cell.seed and args.model == finetune.model
        assert finetune.from_ == f"{args.out}/encoder.pt"
        assert config.depth == cell.depth - 6 * cell.truncated
        assert (config.segments > 1) == (cell.method != "mae")
        assert config.dense == (cell.method == "mirl")
        if not cell.truncated:
            probe = train_finetune.parse(commands["linear"][1:])
            assert (probe.protocol, probe.from_) == ("linear", finetune.from_)
            if size == "cpu":
                assert probe.train_images == finetune.train_images == 5000


def test_equal_terms():
    """What is compared differs in the method alone."""
    for size in study.SIZES:
        for depth in (12, 24, 48):
            several = [
                vars(
                    train_pretrain.parse(
                        study.commands(
                            study.Cell(m, depth, False, 0), size, "shapes", Path("o"), "cpu"
                        )["pretrain"][1:]
                    )
                )
                for m in ("mae", "mirl", "sparse")
            ]
            differ = {k for k in several[0] if len({str(a[k]) for a in several}) > 1}
            assert differ == {"method", "dense"}


def test_table_and_figure_of_known_results(tmp_path):
    pytest.importorskip("matplotlib")
    common = dict(depth=24, truncated=False)
    lines = [
        dict(common, cell="a", method="mae", seed=0, loss=0.5, top1=50.0, linear=40.0, knn=30.0),
        dict(common, cell="b", method="mae", seed=1, loss=0.7, top1=53.0, linear=44.0, knn=30.0),
        dict(common, cell="c", method="scratch", seed=0, top1=41.26, linear=20.0, knn=10.0),
        dict(common | dict(truncated=True), cell="d", method="mirl", seed=0, loss=0.6, top1=51.0),
    ]
    lines[1]["blocks"] = [30.0] * 24
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--draw"]
    subprocess.run(command, check=True)
    rows = (tmp_path / "results.md").read_text().splitlines()[2:]
    assert rows == [
        "| 24 | no pre-training |  | 41.3 | 20.0 | 10.0 |",
        # the deviation of two values is their difference over √2
        "| 24 | MAE | 0.600 ± 0.141 | 51.5 ± 2.1 | 42.0 ± 2.8 | 30.0 ± 0.0 |",
        "| 24 | MIRL, 18 blocks | 0.600 | 51.0 |  |  |",
    ]
    assert (tmp_path / "depth.png").stat().st_size > 5000


def test_a_cell_from_end_to_end(tmp_path, monkeypatch):
    shapes = mirl.make_shapes(32, 0)
    for i, image in enumerate(shapes.images):
        path = tmp_path / "data" / ("train" if i % 2 else "val") / str(i % 3)
        path.mkdir(parents=True, exist_ok=True)
        v2.functional.to_pil_image(image).save(path / f"{i}.png")
    few = "--epochs 1 --warmup-epochs 0 --batch-size 8 --workers 0"
    tiny = dict(models={12: "vit_nano"}, pretrain=few, finetune=few, probe="--workers 0")
    monkeypatch.setitem(study.SIZES, "cpu", tiny)
    args = argparse.Namespace(
        out=tmp_path / "out", size="cpu", data=str(tmp_path / "data"), device="cpu"
    )
    result = study.run_cell(study.Cell("mirl", 12, False, 7), args, threads=1)
    assert (result["cell"], result["seed"], result["method"]) == ("mirl-12-seed7", 7, "mirl")
    assert len(result["blocks"]) == 6 and result["blocks"][-1] == result["knn"]
    assert 0 < result["loss"] < 10 and 0 <= result["top1"] <= 100 and 0 <= result["linear"] <= 100
    assert sum(key.endswith("_seconds") for key in result) == 4


def test_a_failing_cell_ends_the_study_with_its_reason(tmp_path):
    pytest.importorskip("matplotlib")
    flags = ["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out"), "--jobs", "2"]
    command = [sys.executable, str(SCRIPT), *flags, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "missing: there is no such folder" in done.stderr
    assert done.stdout.count("train_pretrain.py") <= 4  # the others are not begun
    assert "Traceback" not in done.stderr and not (tmp_path / "out" / "results.jsonl").exists()


@pytest.mark.parametrize(("flags", "said"), [("--jobs 0", "at least 1"), ("--draw", "there is no")])
def test_nonsense_gets_a_sentence(tmp_path, flags, said):
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "out"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
