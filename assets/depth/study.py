"""The depth study: what pre-training by MIRL and by MAE is worth to encoders of 12, 24, 48 blocks.

    python assets/depth/study.py --jobs 2       on a CPU, two cells at a time
    python assets/depth/study.py --size long    48 blocks alone, ten epochs in place of three
    python assets/depth/study.py --size gpu     wider models, on one GPU

The table and the figures of the results beside this file:
    python assets/depth/study.py --draw --out assets/depth

A cell is one method, depth and seed: pre-training, then fine-tuning, a linear probe, and nearest
neighbours after every block, by the project's own scripts, whose commands are printed. The most
telling cells come first. Each adds a line to results.jsonl in --out as it ends, and a cell that has
its line is not run again, so a study can be stopped, continued, and given another seed.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

# Per size: the models by depth, the flags that all of its cells share, the methods if not all.
SIZES = {
    "cpu": dict(
        models={12: "vit_pico_12", 24: "vit_pico_24", 48: "vit_pico_48"},
        pretrain="--epochs 3 --warmup-epochs 0.3 --batch-size 64 --base-lr 8e-3 --picture-every 0",
        finetune="--train-images 5000 --val-images 2000 --epochs 4 --warmup-epochs 0.4 "
        "--batch-size 32 --base-lr 8e-3 --ema-decay 0",
        probe="--train-images 5000 --val-images 2000",
    ),
    "gpu": dict(
        models={12: "vit_ti", 24: "vit_ti_24", 48: "vit_ti_48"},
        pretrain="--recipe cifar10 --epochs 50 --warmup-epochs 5 --base-lr 1e-3 --picture-every 0",
        finetune="--recipe cifar10 --epochs 20 --warmup-epochs 2 --ema-decay 0",
        probe="",
    ),
}
# Is it the budget that 48 blocks lack? Ten epochs in place of three, all else as in "cpu".
SIZES["long"] = SIZES["cpu"] | dict(
    models={48: "vit_pico_48"},
    methods=("mae", "mirl", "sparse"),
    pretrain=SIZES["cpu"]["pretrain"].replace("--epochs 3", "--epochs 10"),
)
# Deeper encoders get a larger factor, so that the lowest layer's learning rate stays about the
# same, 0.75^13 of the highest; without pre-training there is nothing to keep. [S A.1]
LAYER_DECAY = {12: 0.75, 24: 0.86, 48: 0.93}
DEPTHS = tuple(LAYER_DECAY)
TRUNCATED = 6  # blocks left out at depth 24: a quarter, as the paper's 3 of 12
METHODS = {  # with their colours in the figure
    "scratch": ("no pre-training", "0.6"),
    "mae": ("MAE", "C1"),
    "mirl": ("MIRL", "C0"),
    "sparse": ("MIRL without dense connections", "C2"),
}
SEEDS = ("-", "--", ":", "-.")  # the lines of the first seed, the second, …
MEASURES = {  # with their digits in the table
    "loss": ("loss", 3),
    "top1": ("fine-tuned", 1),
    "linear": ("linear probe", 1),
    "knn": ("nearest neighbours", 1),
}


class Cell(NamedTuple):
    method: str
    depth: int
    truncated: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.method}-{self.depth}{'-truncated' * self.truncated}-seed{self.seed}"


def plan(size: str, seeds: list[int]) -> list[Cell]:
    """All cells of a size, the most telling first."""
    order = [(m, depth, False) for depth in DEPTHS[::-1] for m in ("mae", "mirl")]
    order += [(m, 24, True) for m in ("mae", "mirl")]
    order += [(m, depth, False) for m in ("scratch", "sparse") for depth in DEPTHS[::-1]]
    models, methods = SIZES[size]["models"], SIZES[size].get("methods", METHODS)
    cells = [Cell(*cell, seed) for seed in seeds for cell in order]
    return [cell for cell in cells if cell.depth in models and cell.method in methods]


def commands(cell: Cell, args: argparse.Namespace) -> dict[str, list[str]]:
    """A cell's scripts and their flags, by what they are for, in order."""
    settings, run = SIZES[args.size], args.out / str(cell)
    common = ["--data", args.data, "--device", args.device]
    common += ["--model", settings["models"][cell.depth], "--seed", str(cell.seed)]
    encoder, decay, out = "scratch", 1, {}
    if cell.method != "scratch":
        encoder, decay = f"{run}/pretrain/encoder.pt", LAYER_DECAY[cell.depth]
        flags = [*settings["pretrain"].split(), *common, "--out", f"{run}/pretrain", "--resume"]
        flags += ["--method", "mae" if cell.method == "mae" else "mirl"]
        flags += ["--no-dense"] if cell.method == "sparse" else []
        flags += ["--truncate", str(TRUNCATED)] if cell.truncated else []
        out["pretrain"] = ["train_pretrain.py", *flags]
    common += ["--from", encoder]
    flags = [*settings["finetune"].split(), *common, "--out", f"{run}/finetune", "--resume"]
    flags += ["--layer-decay", str(decay)] + ["--truncated"] * cell.truncated
    out["finetune"] = ["train_finetune.py", *flags]
    if not cell.truncated:  # whose last blocks are random before fine-tuning
        for protocol in ("linear", "blocks"):
            flags = [*settings["probe"].split(), *common, "--protocol", protocol]
            out[protocol] = ["train_finetune.py", *flags]
    return out


def run_cell(cell: Cell, args: argparse.Namespace, threads: int) -> dict:
    """Run a cell's commands; what results.jsonl keeps of them."""
    result = dict(cell=str(cell), size=args.size, **cell._asdict(), threads=threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for name, (script, *flags) in commands(cell, args).items():
        command = [sys.executable, str(ROOT / script), *flags]
        print(f"[{cell}] {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"[{cell}] {done.stderr.strip() or done.stdout.strip()}")
        result[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        if name in ("linear", "blocks"):
            result[name] = json.loads(done.stdout.splitlines()[-1])["top1"]
        else:
            metrics = (args.out / str(cell) / name / "metrics.jsonl").read_text()
            lines = map(json.loads, metrics.splitlines())
            epochs = [line for line in lines if line["kind"] == "epoch"]
            if name == "pretrain":
                pairs = [key for key in epochs[-1] if key.startswith("residual_share_")]
                result["loss"] = epochs[-1]["loss"]
                result["shares"] = [[epoch[pair] for epoch in epochs] for pair in pairs]
            else:
                result["top1"] = epochs[-1]["raw_top1"]
    return result if cell.truncated else result | {"knn": result["blocks"][-1]}


def summary(results: list[dict]) -> dict[tuple, dict[str, list]]:
    """(method, depth, truncated) -> measure -> its values, one a seed; where there are none, []."""
    table = defaultdict(lambda: defaultdict(list))
    for line in sorted(results, key=lambda line: line["seed"]):
        row = table[line["method"], line["depth"], line["truncated"]]
        for measure in line.keys() & {*MEASURES, "blocks", "shares"}:
            row[measure].append(line[measure])
    return table


def markdown(table: dict) -> str:
    titles = ["depth", "pre-training", *(title for title, _ in MEASURES.values())]
    rows = [titles, ["---"] * len(titles)]
    for depth, method, truncated in itertools.product(DEPTHS, METHODS, (False, True)):
        row = table[method, depth, truncated]
        if any(row.values()):
            name = METHODS[method][0] + f", {depth - TRUNCATED} blocks" * truncated
            rows.append([str(depth), name])
            for measure, (_, digits) in MEASURES.items():
                seen = row[measure]
                mean = f"{statistics.fmean(seen):.{digits}f}" if seen else ""
                spread = f" ± {statistics.stdev(seen):.{digits}f}" if len(seen) > 1 else ""
                rows[-1].append(mean + spread)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def new_figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def draw(table: dict, path: Path) -> None:
    figure = new_figure(10, 6)
    panels, by_block = figure.subplots(2, 3)
    for measure, axes in zip(("top1", "linear", "knn"), panels, strict=True):
        for method, (label, colour) in METHODS.items():
            whole = {d: seen for d in DEPTHS if (seen := table[method, d, False][measure])}
            means = [statistics.fmean(seen) for seen in whole.values()]
            axes.plot(list(whole), means, color=colour, label=label)
            for d, seen in whole.items():
                axes.plot([d] * len(seen), seen, ".", color=colour)
            cut = table[method, 24, True][measure]
            axes.plot([24] * len(cut), cut, "x", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks(DEPTHS, map(str, DEPTHS))
        axes.minorticks_off()
        axes.set(title=MEASURES[measure][0], xlabel="blocks")
    for depth, axes in zip(DEPTHS, by_block, strict=True):
        draw_blocks(table, depth, axes)
    panels[0].set_ylabel("top-1, %")
    by_block[0].set_ylabel("nearest neighbours, top-1, %")
    panels[0].plot([], [], "x", color="0.3", label=f"last {TRUNCATED} blocks not pre-trained")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=110)


def draw_blocks(table: dict, depth: int, axes) -> None:
    """Accuracy after every block."""
    for method, (_, colour) in METHODS.items():
        for style, seen in zip(itertools.cycle(SEEDS), table[method, depth, False]["blocks"]):
            axes.plot(range(1, depth + 1), seen, style, color=colour, linewidth=1)
    axes.set(title=f"{depth} blocks, every seed", xlabel="after block", xlim=(1, depth))


def draw_long(table: dict, path: Path, depth: int = 48) -> None:
    """Features after every block, and what residuals carry of each pair's prediction, by epoch."""
    figure = new_figure(11, 3.8)
    left, right = figure.subfigures(1, 2, width_ratios=(2, 3))
    by_block, by_pair = left.subplots(), right.subplots(1, 3, sharey=True)
    draw_blocks(table, depth, by_block)
    by_block.set_ylabel("nearest neighbours, top-1, %")
    for method, (label, colour) in METHODS.items():
        row = table[method, depth, False]
        if row["blocks"]:
            by_block.plot([], [], color=colour, label=label)
            for style, shares in zip(itertools.cycle(SEEDS), row["shares"]):
                for axes, share in zip(by_pair, shares, strict=False):  # MAE has no pairs
                    axes.plot(range(1, len(share) + 1), share, style, color=colour, linewidth=1)
    for pair, axes in enumerate(by_pair, start=1):
        axes.set(title=f"pair {pair}", xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    by_pair[0].set_ylabel("the residual's share of the prediction")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw_lesson(table: dict, path: Path, depth: int = 24) -> None:
    """The study in one look: features after every block, MAE beside MIRL, mean and seeds."""
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    for method in ("mirl", "mae"):
        (label, colour), blocks = METHODS[method], range(1, depth + 1)
        seeds = table[method, depth, False]["blocks"]
        for seen in seeds:
            axes.plot(blocks, seen, color=colour, linewidth=0.8, alpha=0.5)
        mean = [statistics.fmean(after) for after in zip(*seeds, strict=True)]
        axes.plot(blocks[: len(mean)], mean, color=colour, linewidth=2.5, label=label)
    axes.set(xlabel=f"after block, of {depth}", ylabel="nearest neighbours, top-1, %")
    axes.set(xlim=(1, depth))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--size", choices=SIZES, default="cpu", help="default cpu")
    flag("--data", default="cifar10", help="as for the scripts; default cifar10")
    flag("--out", type=Path, help="a folder of its own; default runs/depth-SIZE")
    flag("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    flag("--jobs", type=int, default=1, help="cells at a time; default 1")
    flag("--device", default="auto", help="as for the scripts; default auto")
    flag("--draw", action="store_true", help="run nothing; table and figure of what there is")
    args = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):
        parser.error("the figure needs an extra: pip install -e '.[plot]'")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    args.out = args.out or Path("runs", f"depth-{args.size}")
    path = args.out / "results.jsonl"
    if args.draw and not path.exists():
        parser.error(f"--draw: there is no {path}")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text() if path.exists() else ""
    results = [json.loads(line) for line in lines.splitlines()]
    if not args.draw:
        done = {result["cell"] for result in results}
        todo = [cell for cell in plan(args.size, args.seeds) if str(cell) not in done]
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(run_cell, cell, args, threads) for cell in todo]
            try:
                for future in as_completed(futures):
                    results.append(future.result())
                    with path.open("a") as file:
                        print(json.dumps(results[-1]), file=file)
                    print(json.dumps(results[-1]), flush=True)
            finally:
                pool.shutdown(cancel_futures=True)
    table = summary(results)
    print(markdown(table))
    if args.size == "long":
        return draw_long(table, args.out / "depth.png")
    draw(table, args.out / "depth.png")
    draw_lesson(table, args.out / "lesson.png")


if __name__ == "__main__":
    main()
