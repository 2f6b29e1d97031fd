#!/usr/bin/env python3
"""Draws the loss curve of a run.

    plot_loss.py METRICS.jsonl PICTURE.png

Exit status 3: matplotlib is not installed; 1: the metrics cannot be read or the picture not written.
"""
import json
import os
import sys


def draw(metrics: str, picture: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with open(metrics, encoding="utf-8") as lines:
        steps = [json.loads(line) for line in lines]
    if not steps:
        raise ValueError(f"{metrics} holds no steps")
    measured = [step for step in steps if "val_loss" in step]

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([s["step"] for s in steps], [s["loss"] for s in steps], linewidth=1, label="training")
    if measured:
        axes.plot([s["step"] for s in measured], [s["val_loss"] for s in measured], "o-", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=f"loss {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}")
    axes.grid(alpha=0.3)
    axes.legend()
    aside = picture + ".partial"
    figure.savefig(aside, format="png", dpi=120)
    os.replace(aside, picture)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: plot_loss.py METRICS.jsonl PICTURE.png")
    try:
        draw(*sys.argv[1:])
    except ModuleNotFoundError as error:
        print(f"plot_loss: {error}", file=sys.stderr)
        sys.exit(3)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"plot_loss: error: {error}")
