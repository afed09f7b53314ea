"""Draw the losses of runs, and the gradient norms of those that had --log-grad-norms.

    python assets/plot.py runs/mirl-quick runs/mae-quick --out FOLDER

It writes losses.png and gradients.png into the folder, and needs pip install -e '.[plot]'. The
supplement's Figure 2 [S C] shows blocks 19 to 22 of 24: here the same four from the end.
"""

import argparse
import importlib.util
import itertools
import json
from pathlib import Path

KINDS = ("qkv", "mlp", "norm", "proj")


def read_steps(run: str) -> list[dict]:
    """The lines of a run's log that are of steps; its last one may be half written."""
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in records if record["kind"] == "step"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder: a training run's --out")
    parser.add_argument("--out", type=Path, help="where to; default the first run's folder")
    args = parser.parse_args()
    if not importlib.util.find_spec("matplotlib"):
        parser.error("the figures need matplotlib: pip install -e '.[plot]'")
    from matplotlib.figure import Figure

    runs = {}
    for run in args.runs:
        try:
            config, steps = json.loads((Path(run) / "config.json").read_text()), read_steps(run)
        except OSError as error:
            parser.error(f"{run} is no run: {error}")
        runs[f"{run} ({config.get('method', 'fine-tuned')} {config['model']})"] = steps
    out = args.out or Path(args.runs[0])
    out.mkdir(parents=True, exist_ok=True)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, steps in runs.items():
        axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(out / "losses.png", dpi=110)

    logged = {label: [s for s in steps if "grad_qkv" in s] for label, steps in runs.items()}
    if logged := {label: steps for label, steps in logged.items() if steps}:
        depth = min(len(steps[0]["grad_qkv"]) for steps in logged.values())
        blocks = range(max(0, depth - 6), max(min(depth, 4), depth - 2))
        figure = Figure(figsize=(12, 2.2 * len(blocks)), layout="constrained")
        grid = figure.subplots(len(blocks), len(KINDS), squeeze=False, sharex=True)
        for axes, (block, kind) in zip(grid.flat, itertools.product(blocks, KINDS), strict=True):
            for label, steps in logged.items():
                norms = [s[f"grad_{kind}"][block] for s in steps]
                axes.plot([s["step"] for s in steps], norms, label=label, linewidth=1)
            axes.set(yscale="log", title=f"block {block + 1}, {kind}")
        grid[0][0].legend(fontsize="small")
        grid[-1][0].set(xlabel="step", ylabel="gradient norm")
        figure.savefig(out / "gradients.png", dpi=110)
    print(f"drawn: losses.png{', gradients.png' * bool(logged)} in {out}")


if __name__ == "__main__":
    main()
