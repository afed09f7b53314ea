"""The depth study: its cells, its table, its figures; and assets/plot.py's of any run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, image_folder, metrics

import train_finetune
import train_pretrain

sys.path.insert(0, str(ROOT / "assets"))
sys.path.insert(0, str(ROOT / "assets" / "depth"))
import plot
import study


def arguments(size: str, data="shapes", out="out") -> argparse.Namespace:
    return argparse.Namespace(size=size, data=str(data), out=Path(out), device="cpu")


def run(*flags) -> subprocess.CompletedProcess:
    pytest.importorskip("matplotlib")
    return subprocess.run([sys.executable, study.__file__, *flags], capture_output=True, text=True)


@pytest.mark.parametrize("size", study.SIZES)
def test_every_cell_is_what_it_is_called(size):
    cells = study.plan(size, [0, 3])
    assert len(set(map(str, cells))) == len(cells) == (6 if size == "long" else 28)
    assert str(cells[0]) == "mae-48-seed0"
    compared = {}
    for cell in cells:
        flags = {name: c[1:] for name, c in study.commands(cell, arguments(size)).items()}
        finetune = train_finetune.parse(flags["finetune"])
        if cell.method == "scratch":
            assert (finetune.from_, finetune.layer_decay) == ("scratch", 1)
            continue
        args = train_pretrain.parse(flags["pretrain"])
        with torch.device("meta"):
            config = train_pretrain.new_model(args, torch.device("meta")).config
        assert args.seed == finetune.seed == cell.seed and args.model == finetune.model
        assert finetune.from_ == f"{args.out}/encoder.pt"
        assert config.depth == cell.depth - 6 * cell.truncated
        assert (config.segments > 1, config.dense) == (cell.method != "mae", cell.method == "mirl")
        if not cell.truncated:
            assert train_finetune.parse(flags["linear"]).protocol == "linear"
            for parsed, kind in ((args, 0), (finetune, 1)):  # compared: the method alone differs
                first = vars(compared.setdefault((cell.depth, cell.seed, kind), parsed))
                differ = {name for name in first if first[name] != vars(parsed)[name]}
                assert differ <= {"method", "dense", "out", "from_"}


def test_table_and_figures_of_known_results(tmp_path):
    """The seeds as they may end: the second before the first."""
    lines = [
        dict(method="mae", seed=1, loss=0.7, top1=53.0, linear=44.0, knn=30.0, blocks=[30.0] * 24),
        dict(method="mae", loss=0.5, top1=50.0, linear=40.0, knn=30.0),
        dict(method="scratch", top1=41.26, linear=20.0, knn=10.0),
        dict(method="mirl", truncated=True, loss=0.6, top1=51.0),
    ]
    lines = [dict(depth=24, truncated=False, seed=0) | line for line in lines]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run("--out", tmp_path, "--draw").stdout.splitlines()[2:] == [
        "| 24 | no pre-training |  | 41.3 | 20.0 | 10.0 |",
        # the deviation of two values is their difference over √2
        "| 24 | MAE | 0.600 ± 0.141 | 51.5 ± 2.1 | 42.0 ± 2.8 | 30.0 ± 0.0 |",
        "| 24 | MIRL, 18 blocks | 0.600 | 51.0 |  |  |",
    ]
    assert study.summary(lines)["mae", 24, False]["top1"] == [50.0, 53.0]
    assert all((tmp_path / f"{name}.png").exists() for name in ("depth", "lesson"))


@pytest.fixture
def figures(monkeypatch):
    """Those that are drawn, by their files' names."""
    drawn, figure = {}, pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda self, path, **_: drawn.update({path.name: self}))
    return drawn


def test_the_longer_study_shows_what_residuals_carry(figures):
    shares = [[0.25, 0.75], [0.5, 0.5], [0.125, 0.0]]  # of pairs 1, 2, 3, by epoch
    common = dict(method="mirl", depth=48, truncated=False)
    lines = [  # as they may end: the second seed before the first
        dict(common, seed=1, shares=shares[::-1], blocks=[1] * 48),
        dict(common, seed=0, shares=shares, blocks=list(range(48))),
        dict(common, seed=0, method="mae", blocks=[2] * 48),
    ]
    study.draw_long(study.summary(lines), Path("depth.png"))
    panels = figures["depth.png"].axes
    drawn = [[(x.get_linestyle(), [*x.get_ydata()]) for x in axes.lines] for axes in panels]
    assert drawn[0][:3] == [("-", [2] * 48), ("-", list(range(48))), ("--", [1] * 48)]
    assert drawn[1:] == [[("-", a), ("--", b)] for a, b in zip(shares, shares[::-1])]


def test_a_cell_from_end_to_end(tmp_path, monkeypatch):
    few = "--epochs 2 --warmup-epochs 0 --batch-size 8 --workers 0"
    tiny = dict(models={12: "vit_nano"}, pretrain=few, finetune=few, probe="--workers 0")
    monkeypatch.setitem(study.SIZES, "cpu", tiny)
    args = arguments("cpu", image_folder(tmp_path / "data"), tmp_path / "out")
    result = study.run_cell(study.Cell("mirl", 12, False, 7), args, threads=1)
    assert (result["cell"], result["seed"]) == ("mirl-12-seed7", 7)
    assert len(result["blocks"]) == 6 and result["blocks"][-1] == result["knn"]
    assert 0 <= result["top1"] <= 100 and 0 <= result["linear"] <= 100
    epochs = metrics(tmp_path / "out" / "mirl-12-seed7" / "pretrain", "epoch")
    assert result["loss"] == epochs[1]["loss"]
    assert result["shares"] == [[epoch["residual_share_1"] for epoch in epochs]]  # one pair


FAILURES = {"--draw": "there is no", "--data missing --jobs 2 --device cpu": "no such folder"}


@pytest.mark.parametrize(("flags", "said"), FAILURES.items())
def test_a_failure_ends_the_study_with_its_reason(tmp_path, flags, said):
    done = run(*flags.split(), "--out", tmp_path)
    assert done.returncode and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("train_pretrain.py") <= 4  # the other cells are not begun
    assert not (tmp_path / "results.jsonl").exists()


def test_the_figures_of_runs(tmp_path, monkeypatch, figures, capsys):
    """One has logged norms, of 8 blocks, but in its last step; the other is still fine-tuning."""
    norms = {f"grad_{k}": [i + j / 8 for j in range(8)] for i, k in enumerate(plot.KINDS)}
    logged = [dict(step=2, loss=1.5, **norms), dict(step=4, loss=0.5, **norms)]
    for name, steps, config in (
        ("a", [*logged, dict(step=6, loss=0.25)], dict(model="vit_nano", method="mae")),
        ("b", [dict(step=3, loss=2)], dict(model="vit_nano")),
    ):
        lines = [json.dumps(dict(kind="step") | step) for step in steps]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plot.py", "b", "a"])
    plot.main()
    [losses], grid = (figures[name].axes for name in ("losses.png", "gradients.png"))
    drawn = {x.get_label(): [*x.get_ydata()] for x in losses.lines}
    assert drawn == {"b (fine-tuned vit_nano)": [2], "a (mae vit_nano)": [1.5, 0.5, 0.25]}
    drawn = [[*x.get_ydata()] for axes in grid for x in axes.lines]
    assert drawn == [[i + block / 8] * 2 for block in (2, 3, 4, 5) for i in range(4)]
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        plot.main()
    assert "b is no run: " in capsys.readouterr().err
