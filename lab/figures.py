"""The figures of a comparison: learning curves, returns against sparsity, gains by revival."""

import io
import itertools
import textwrap
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import EngFormatter
from PIL import Image
from scipy import stats

# by turns; colours that colour-blind readers can tell apart (after Okabe and Ito, and Tol), and most also in grey
COLOURS = ("#000000", "#CC79A7", "#D55E00", "#882255", "#56B4E9", "#E69F00", "#004488")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (9, 2)))
MARKERS = "os^Dv*"  # six, and seven colours: a pair of both comes again after 42
THIN_LINES = 5  # up to so many seeds are drawn each, the interval of more as a shade
MANY_ARMS = 6  # in a panel with more, only means are drawn
plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.formatter.useoffset": False}
plt.rcParams |= {"figure.constrained_layout.use": True, "legend.frameon": False, "savefig.dpi": 120}


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over the last axis, and the ends of its 95% interval by Student's t; NaN where there are too few values."""
    n = values.shape[-1]
    mean = values.mean(-1) if n else np.nan
    half = stats.t.ppf(0.975, n - 1) * stats.sem(values, axis=-1) if n > 1 else np.nan
    return mean, mean - half, mean + half


def arms_of(runs: pd.DataFrame) -> list[str]:
    """By base mask, those without one first, then by name."""
    return list(runs.sort_values(["base", "arm"]).arm.unique())


def styles_of(runs: pd.DataFrame) -> dict[str, dict]:
    """Label, colour and dashes by label, in the order of the tables; an arm looks the same on every base mask."""
    labels = [name for _, name in sorted({*zip(runs.base != "", runs.label)})]
    looks = zip(labels, itertools.cycle(COLOURS), itertools.cycle(DASHES))
    return {name: {"label": name, "color": colour, "linestyle": dash} for name, colour, dash in looks}


def panels(runs: pd.DataFrame, split: bool = False):
    """A figure with axes for each environment and base mask that have runs, or with `split`, if these have many arms,
    for each method there. With each axes come its runs, and all runs there that have this base mask or none."""
    cells = []
    for env_id, of_env in runs.groupby("env_id"):
        for base in sorted({*of_env.base} - {""}) or [""]:
            part = of_env[of_env.base.isin([base, ""])]
            if split and part.arm.nunique() > MANY_ARMS:
                own = part.groupby(["method", "base"])
                cells += [(f"{env_id}\n{' '.join(names).strip()}", rows, part) for names, rows in own]
            else:
                cells.append((f"{env_id}\n{base}".strip(), part, part))
    columns = min(len(cells), 2 if len(cells) < 7 else 4)
    rows = -(-len(cells) // columns)
    figure = plt.figure(figsize=(9, 0.7 + rows * (3.3 if columns < 4 else 2.2)))
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(len(cells))]
    for i, (title, _, _) in enumerate(cells):
        axes[i].set_title(title, fontsize="medium")
        axes[i].set_ylabel("" if i % columns else "evaluation return" if split else "final return")
    return figure, [(ax, *parts) for ax, (_, *parts) in zip(axes, cells)]


def finish(figure, path: Path | str, names: Iterable[str]) -> None:
    """Save with one legend, in this order, as a PNG of 256 colours, which is a third as large."""
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    names, png = [name for name in names if name in entries], io.BytesIO()
    columns = max(1, int(12 * figure.get_figwidth() / (8 + max(map(len, names)))))
    figure.set_figheight(figure.get_figheight() + 0.2 * ((len(names) - 1) // columns))  # or the axes become lower
    figure.legend([entries[name] for name in names], names, loc="outside lower center", ncols=columns, handlelength=3.2)
    figure.savefig(png)
    plt.close(figure)
    Image.open(png).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def show(axes, seen: np.ndarray) -> None:
    """Let the y axis show all these returns, with a margin of 5% of their range, at least 1% of the largest."""
    margin = max(0.05 * np.ptp(seen), 0.01 * np.abs(seen).max()) or 1.0
    axes.set_ylim(seen.min() - margin, seen.max() + margin)


def on_one_axis(curves: list[pd.DataFrame], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of the axis, and returns [points, curves]: steps that all have, or 300 points by straight lines."""
    if x == "step":
        joined = pd.concat([curve["return"] for curve in curves], axis=1, join="inner")
        return joined.index.to_numpy(), joined.to_numpy()
    begin = max(curve[x][curve[x] > 0].iloc[0] for curve in curves)
    points = np.geomspace(begin, max(begin, min(curve[x].iloc[-1] for curve in curves)), 300)
    return points, np.stack([np.interp(points, curve[x], curve["return"]) for curve in curves], 1)


def draw_curves(runs: pd.DataFrame, styles: dict[str, dict], x: str, path: Path | str) -> None:
    """Returns against steps, minutes or FLOPs. Axes of one method show the means of the other methods in light grey."""
    figure, cells = panels(runs, split=True)
    for axes, own, part in cells:
        for arm in sorted(arms_of(part), key=set(own.arm).__contains__):
            rows = part[part.arm == arm]
            style = styles[rows.label.iloc[0]]
            points, curves = on_one_axis(list(rows.curve), x)
            mean, low, high = t_interval(curves)
            if arm not in set(own.arm):
                axes.plot(points, mean, color="#dddddd", linewidth=0.8)
                continue
            axes.plot(points, mean, linewidth=2, **style)
            if own.arm.nunique() <= MANY_ARMS and len(rows) > THIN_LINES:
                axes.fill_between(points, low, high, color=style["color"], alpha=0.12, linewidth=0)
            elif own.arm.nunique() <= MANY_ARMS and len(rows) > 1:
                axes.plot(points, curves, color=style["color"], linewidth=0.6, alpha=0.4)
        of_env = runs.curve[runs.env_id == own.env_id.iloc[0]]
        show(axes, np.concatenate([curve["return"] for curve in of_env]))
        axes.set_xlabel(x)
        if x == "step":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        else:
            end = min(curve[x].iloc[-1] for curve in of_env)
            axes.axvline(end, color="#999999", linewidth=0.8)  # where the table compares
            axes.set(xscale="log", xlim=(0.03 * end, None))
            axes.xaxis.set(major_locator=plt.LogLocator(subs=(1, 3)), major_formatter="{x:g}", minor_formatter="")
    finish(figure, path, styles)


def draw_sparsities(runs: pd.DataFrame, styles: dict[str, dict], path: Path) -> None:
    """Final returns against sparsity, the arms of a sparsity side by side between two grey lines."""
    figure, cells = panels(runs)
    n = len(sparsities := sorted(set(runs.sparsity[~runs.dense])))
    for axes, part, _ in cells:
        arms, seen = arms_of(part[~part.dense]), [part.final]
        for arm, rows in part.groupby("arm"):
            style = styles[rows.label.iloc[0]]
            points = {s: t_interval(cell.final.to_numpy()) for s, cell in rows.groupby("sparsity")}
            mean, low, high = np.array(list(points.values())).T
            seen += [ends[~np.isnan(ends)] for ends in (low, high)]
            if arm not in arms:
                axes.axhline(mean[0], **style)
                axes.axhspan(*np.nan_to_num([low[0], high[0]], nan=mean[0]), color="#000000", alpha=0.08, linewidth=0)
                continue
            x = [sparsities.index(s) + 0.8 * ((arms.index(arm) + 0.5) / len(arms) - 0.5) for s in points]
            marker = MARKERS[list(styles).index(style["label"]) % len(MARKERS)]  # or two arms of a colour look alike
            ends = {"yerr": [mean - low, high - mean], "capsize": 2, "linewidth": 1}
            axes.errorbar(x, mean, marker=marker, markersize=5, **ends, **style)
        for between in range(1, n):
            axes.axvline(between - 0.5, color="#cccccc", linewidth=0.8)
        axes.set(xlabel="sparsity", xticks=range(n), xticklabels=sparsities, xlim=(-0.5, n - 0.5))
        show(axes, np.concatenate(seen))
    finish(figure, path, styles)


def draw_gains(gains: pd.DataFrame, path: Path) -> None:
    """What runs gained by revival, against what static pruning had cut: a point for each seed. Environments, whose
    returns have different scales, are in rows of their own, the one with most points first."""
    rows, names = [], sorted(set(gains.base))
    for _, of_env in sorted(gains.groupby("env_id"), key=lambda pair: -len(pair[1])):
        cells = list(of_env.groupby(["env_id", "label"]))
        rows += [cells[i : i + 3] for i in range(0, len(cells), 3)]
    n, columns, widest = len(rows), max(map(len, rows)), max(10.0, gains.cut.max())
    figure, grid = plt.subplots(n, columns, figsize=(9, 0.7 + 3.3 * n), sharey="row", squeeze=False)
    filled = [cell for row in rows for cell in row + [("", gains[:0])] * (columns - len(row))]
    for axes, (title, own) in zip(grid.flat, filled, strict=True):
        axes.set_visible(len(own) > 0)
        axes.axhline(0, color="#999999", linewidth=0.8)
        for name, points in own.groupby("base"):
            i = names.index(name)
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            axes.plot(points.cut, points.gain, linestyle="", label=name, alpha=0.7, **look)
        title = "\n".join(textwrap.fill(line, 90 // columns) for line in title)
        axes.set(title=title, xlabel="neurons cut by static pruning, %", xlim=(-0.04 * widest, 1.04 * widest))
    plt.setp(grid[:, 0], ylabel="gain by revival, return")
    finish(figure, path, names)
