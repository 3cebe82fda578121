"""Compares the arms of a folder of runs: tables with intervals, learning curves, return against sparsity, masks.

python runs/compare.py runs
python runs/compare.py runs --publish runs/published   # a compact copy first, then the comparison of that copy

Per algorithm and sparsity it writes a page (<algo>_s<sparsity>.md), its tables as CSV and a figure of learning curves;
per algorithm a figure of return against sparsity; for one run, figures of the masks before and after revival; and
evaluations.csv, every evaluation of every run. What is missing or unequal is listed on top of each page.

Statistics: the final return of a run is the mean of its evaluations in the last tenth of training; the 95% intervals
of means over seeds are Student's t. Across environments, as in Agarwal et al. 2021 (Deep RL at the Edge of the
Statistical Precipice): the interquartile mean over all runs of an arm of the return in % of dense (of the mean over
dense's seeds in that environment, taken as a constant), the probability of improvement, and for both the 95% percentile
interval of a bootstrap that draws seeds anew within each environment.
"""

import io
import itertools
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from matplotlib.colors import ListedColormap
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """folder of run folders"""
    out: Path | None = None
    """where the comparison goes; default: comparison, in that folder"""
    publish: Path | None = None
    """first copy the finished runs there, small enough for a repository, and compare the copy"""
    masks_of: str | None = None
    """name of the run folder whose masks are drawn; default: the first tar run"""


# method: colour (Okabe and Ito's, which colour-blind readers can tell apart) and line style, in the order of the tables
STYLES = {
    "dense": ("#000000", "--"),
    "tiny": ("#999999", "--"),
    "static": ("#0072B2", "-"),
    "uniform": ("#E69F00", "-"),
    "tar": ("#D55E00", "-"),
    "set": ("#56B4E9", "-."),
    "rigl": ("#009E73", "-."),
}
BASELESS = ("dense", "tiny")  # arms that static pruning's criterion and distribution do not touch
NETWORKS = ("actor", "critic")
AXES = {"env_id", "seed", "method", "sparsity", "criterion", "distribution"} | {
    f"{network}_{what}" for network in NETWORKS for what in ("method", "sparsity")
}
NOT_OF_THE_RESULT = {"runs_dir", "resume", "evaluate", "checkpoint_frequency", "capture_video"}
PUBLISHED_TAGS = ("eval/", "charts/episodic_return", "charts/SPS", "sparsity/", "flops/")
CELL = ["algo", "sparsity", "env_id", "arm"]


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# READING


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def arm_of(args: dict) -> tuple[str, str]:
    """An arm's name and its base: "tar random+er" and "random+er"; networks that differ are named behind."""
    methods = {network: args.get(f"{network}_method") or args["method"] for network in NETWORKS}
    base = f"{args['criterion']}+{args['distribution']}"
    if {args["method"], *methods.values()} <= set(BASELESS):
        base = ""
    parts = [args["method"], base]
    for network, method in methods.items():
        sparsity = args.get(f"{network}_sparsity")
        if method != args["method"]:
            parts.append(f"{network} {method}")
        if method != "dense" and sparsity not in (None, args["sparsity"]):
            parts.append(f"{network} {sparsity}")
    return " ".join(part for part in parts if part), base


def read_runs(folder: Path, notes: list[str]) -> pd.DataFrame:
    """One row per finished run; `returns` is the series of its evaluations over steps. Notes name what is left out."""
    rows = []
    for path in sorted(folder.glob("*/config.json")):
        run, config = path.parent, json.loads(path.read_text())
        if not ((run / "final.pt").exists() or config.get("published")):
            notes.append(f"not finished, so left out: {run.name}")
            continue
        args, log = config["args"], read_events(run)
        if "eval/episodic_return" not in log.Tags()["scalars"]:
            notes.append(f"without any evaluation, so left out: {run.name}")
            continue
        arm, base = arm_of(args)
        points = log.Scalars("eval/episodic_return")
        returns = pd.Series({point.step: point.value for point in points}).sort_index()
        if len(returns) < len(points):
            notes.append(f"evaluations logged twice, of which the last counts: {run.name}")
        row = {name: args[name] for name in ("env_id", "method", "seed")}
        row |= {"folder": run, "algo": "td3" if "policy_noise" in args else "sac", "arm": arm, "base": base}
        row |= {"dense": arm == "dense", "sparsity": 0.0 if arm == "dense" else args["sparsity"], "returns": returns}
        row |= {"args": {name: value for name, value in args.items() if name not in AXES | NOT_OF_THE_RESULT}}
        row |= {"versions": config["versions"] | {"git_commit": config["git_commit"]}}
        row |= {"final": returns[returns.index > 0.9 * args["total_timesteps"]].mean()}
        row |= {"began": log.FirstEventTimestamp(), "drawable": args["method"] == "tar" and bool(log.Tags()["images"])}
        rows.append(row)
    if not rows:
        fail(f"{folder} holds no finished run; a run is a folder in it with config.json and final.pt")
    runs = pd.DataFrame(rows).sort_values("began")
    for _, cell in runs.groupby(CELL):  # what else differs between runs of one arm makes arms of its own
        for name in differing(cell.args):
            runs.loc[cell.index, "arm"] += [f" {name}={args.get(name)}" for args in cell.args]
    for run in runs.folder[runs.duplicated([*CELL, "seed"], keep="last")]:
        notes.append(f"run again later, so left out: {run.name}")
    return runs.drop_duplicates([*CELL, "seed"], keep="last").sort_values([*CELL, "seed"])


def differing(dictionaries: pd.Series) -> list[str]:
    """Names that do not have the same value wherever they occur."""
    names = sorted({name for dictionary in dictionaries for name in dictionary})
    return [name for name in names if len({str(d[name]) for d in dictionaries if name in d}) > 1]


def warnings(runs: pd.DataFrame) -> list[str]:
    """What is missing or unequal within one comparison, in sentences."""
    found, seeds = [], set(runs.seed)
    for (env_id, arm), cell in runs.groupby(["env_id", "arm"]):
        missing = sorted(seeds - set(cell.seed))
        if missing:
            found.append(f"{arm} on {env_id}: no run with seed {', '.join(map(str, missing))}, which other arms have")
    for arm, rows in runs.groupby("arm"):
        for env_id in sorted(set(runs.env_id) - set(rows.env_id)):
            found.append(f"{arm}: no run on {env_id}, which other arms have, and so no aggregate")
    for run in runs.itertuples():
        last = run.args["total_timesteps"]
        missing = sorted({*range(0, last, run.args["eval_frequency"]), last} - set(run.returns.index))
        if missing:
            steps = ", ".join(map(str, missing))
            found.append(f"{run.arm} on {run.env_id}, seed {run.seed}: no evaluation at step {steps}")
    for column, noun in (("versions", "version"), ("args", "argument")):
        for name in differing(runs[column]):
            counts = pd.Series([str(dictionary.get(name)) for dictionary in runs[column]]).value_counts()
            values = "; ".join(f"{value} in {count} of {len(runs)} runs" for value, count in sorted(counts.items()))
            found.append(f"unequal {noun} {name}: {values}")
    return found


# STATISTICS


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over the last axis, and the ends of its 95% interval by Student's t; no ends for one value."""
    n = values.shape[-1]
    half = stats.t.ppf(0.975, n - 1) * stats.sem(values, axis=-1) if n > 1 else np.nan
    return values.mean(-1), values.mean(-1) - half, values.mean(-1) + half


def iqm(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of all samples together."""
    return stats.trim_mean(np.concatenate(samples, axis), 0.25, axis)


def improvement(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
    """Probability that a run of X beats one of Y in the same environment, ties counting half, mean over environments.
    Samples: those of X per environment, then those of Y."""
    half = len(samples) // 2
    pairs = list(zip(samples[:half], samples[half:], strict=True))
    wins = [stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic for x, y in pairs]
    return np.mean([win / (x.shape[axis] * y.shape[axis]) for win, (x, y) in zip(wins, pairs)], axis=0)


def bootstrapped(statistic, samples: list[np.ndarray]) -> tuple[float, float, float]:
    """The statistic and the ends of its 95% interval, each sample drawn anew for itself; none if one has one value."""
    value = float(statistic(*samples))
    if min(len(sample) for sample in samples) < 2:
        return value, np.nan, np.nan
    interval = stats.bootstrap(samples, statistic, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return value, float(interval.low), float(interval.high)


def arms_of(runs: pd.DataFrame) -> list[str]:
    """By base, those without one first, then in the order of STYLES."""
    order = runs.drop_duplicates("arm").set_index("arm")
    rank = {method: i for i, method in enumerate(STYLES)}
    return sorted(order.index, key=lambda arm: (order.base[arm], rank.get(order.method[arm], len(rank)), arm))


def returns_table(runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for env_id, arm in itertools.product(sorted(set(runs.env_id)), arms_of(runs)):
        cell = runs[(runs.env_id == env_id) & (runs.arm == arm)]
        if len(cell):
            rows.append([env_id, arm, len(cell), " ".join(map(str, cell.seed)), *t_interval(cell.final.to_numpy())])
    return pd.DataFrame(rows, columns=["environment", "arm", "n", "seeds", "final return", "low", "high"])


def aggregate_table(runs: pd.DataFrame, found: list[str]) -> pd.DataFrame:
    """Per arm with runs in every environment: its mean in % of dense, and how probably each TAR arm beats it."""
    env_ids, arms = sorted(set(runs.env_id)), arms_of(runs)
    finals = {arm: [runs[(runs.env_id == e) & (runs.arm == arm)].final.to_numpy() for e in env_ids] for arm in arms}
    finals = {arm: samples for arm, samples in finals.items() if all(len(sample) for sample in samples)}
    scale = np.array([sample.mean() for sample in finals.get("dense", [])])
    relative = len(scale) > 0 and (scale > 0).all()
    if not relative:
        found.append("no return in % of dense: dense is missing in an environment or its mean return is not positive")
    rows = []
    for arm, samples in finals.items():
        row = {"arm": arm, "environments": len(env_ids), "n": sum(map(len, samples))}
        percent = [100 * sample / dense for sample, dense in zip(samples, scale)] if relative else None
        values = bootstrapped(iqm, percent) if relative else (np.nan,) * 3
        row |= dict(zip(["IQM, % of dense", "IQM low", "IQM high"], values))
        for tar in (other for other in finals if other.split()[0] == "tar"):
            values = (np.nan,) * 3 if tar == arm else bootstrapped(improvement, finals[tar] + samples)
            row |= dict(zip([f"P({tar} > arm)", f"P({tar} > arm) low", f"P({tar} > arm) high"], values))
        rows.append(row)
    return pd.DataFrame(rows)


def paired_table(runs: pd.DataFrame) -> pd.DataFrame:
    """TAR minus static on the same base, in the same environment, with the same seed."""
    rows, finals = [], runs.set_index(["env_id", "arm"])[["seed", "final"]]
    for env_id, tar in itertools.product(sorted(set(runs.env_id)), arms_of(runs)):
        static = tar.replace("tar", "static", 1)
        if tar.startswith("tar") and {(env_id, tar), (env_id, static)} <= set(finals.index):
            pairs = finals.loc[[(env_id, tar)]].merge(finals.loc[[(env_id, static)]], on="seed")
            seeds, difference = " ".join(map(str, pairs.seed)), (pairs.final_x - pairs.final_y).to_numpy()
            rows.append([env_id, tar.removeprefix("tar "), len(pairs), seeds, *t_interval(difference)])
    return pd.DataFrame(rows, columns=["environment", "base", "n", "seeds", "tar - static", "low", "high"])


def markdown(table: pd.DataFrame) -> str:
    """A value and the low and high that follow it become one cell."""
    names = [name for name in table.columns if not name.endswith(("low", "high"))]
    lines = [names, ["-"] * len(names)]
    for row in table.to_dict("records"):
        cells, values = [], list(row.values())
        for name in names:
            if isinstance(row[name], float):
                value, low, high = values[list(row).index(name) :][:3]
                digits = 2 if name.startswith("P(") else 1
                interval = "-" if np.isnan(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"
                cells.append("-" if np.isnan(value) else f"{value:.{digits}f} {interval}")
            else:
                cells.append(str(row[name]))
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# FIGURES


def style(method: str) -> dict:
    colour, line = STYLES.get(method, ("#CC79A7", ":"))
    return {"color": colour, "linestyle": line}


def panels(runs: pd.DataFrame):
    """A grid of axes, environments down and bases across, and for each the arms on that base and those without one."""
    env_ids, bases = sorted(set(runs.env_id)), sorted(set(runs.base) - {""}) or [""]
    figure, axes = plt.subplots(
        len(env_ids), len(bases), squeeze=False, sharey="row", layout="constrained",
        figsize=(1 + 3.6 * len(bases), 0.8 + 2.8 * len(env_ids)),
    )  # fmt: skip
    cells = []
    for i, env_id in enumerate(env_ids):
        axes[i, 0].set_ylabel(f"{env_id}\nevaluation return")
        for j, base in enumerate(bases):
            axes[0, j].set_title(base)
            cells.append((axes[i, j], env_id, runs[(runs.env_id == env_id) & runs.base.isin([base, ""])]))
    return figure, cells


def finish(figure, path: Path) -> None:
    entries = {}
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=int(figure.get_figwidth() / 1.1),
        frameon=False,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def label(arm: str, base: str) -> str:
    """The arm without its base, which is the title."""
    return " ".join(part for part in arm.split() if part != base)


def show(axes, seen: np.ndarray) -> None:
    """All that was seen; wide intervals may leave the axes."""
    axes.set_ylim(seen.min() - 0.05 * np.ptp(seen) - 1e-9, seen.max() + 0.05 * np.ptp(seen) + 1e-9)


def draw_curves(runs: pd.DataFrame, path: Path) -> None:
    """Mean over seeds at the steps that all of an arm has in each, with its interval. Two seeds, which would stretch it
    over the whole panel, are thin lines instead."""
    figure, cells = panels(runs)
    for axes, env_id, part in cells:
        for arm in arms_of(part):
            rows = part[part.arm == arm]
            curves = pd.concat(list(rows.returns), axis=1, join="inner")
            mean, low, high = t_interval(curves.to_numpy())
            line = style(rows.method.iloc[0])
            axes.plot(curves.index, mean, label=label(arm, rows.base.iloc[0]), **line)
            if len(rows) == 2:
                axes.plot(curves.index, curves, **line, linewidth=0.5, alpha=0.6)
            elif len(rows) > 2:
                axes.fill_between(curves.index, low, high, color=line["color"], alpha=0.12, linewidth=0)
        show(axes, np.concatenate(list(runs.returns[runs.env_id == env_id])))
        axes.set_xlabel("environment steps")
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
    finish(figure, path)


def draw_sparsities(runs: pd.DataFrame, path: Path) -> None:
    figure, cells = panels(runs)
    for axes, env_id, part in cells:
        arms, sparsities = arms_of(part), sorted(set(runs.sparsity[~runs.dense])) or [0.0]
        for i, arm in enumerate(arms):
            rows = part[part.arm == arm]
            line = style(rows.method.iloc[0])
            name = label(arm, rows.base.iloc[0])
            points = {s: t_interval(cell.final.to_numpy()) for s, cell in rows.groupby("sparsity")}
            if rows.dense.all():
                ((mean, low, high),) = points.values()
                axes.axhline(mean, label=name, **line)
                axes.axhspan(low, high, color=line["color"], alpha=0.08, linewidth=0)
                continue
            x = [sparsities.index(s) + 0.08 * (i - len(arms) / 2) for s in points]  # side by side, not on one another
            mean, low, high = np.array(list(points.values())).T
            axes.errorbar(x, mean, [mean - low, high - mean], marker="o", ms=4, capsize=2, label=name, **line)
        axes.set_xticks(range(len(sparsities)), [f"{s:g}" for s in sparsities])
        axes.set_xlim(-0.6, len(sparsities) - 0.4)
        show(axes, runs.final[runs.env_id == env_id])
        axes.set_xlabel("sparsity")
    finish(figure, path)


def masks_of(run: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Per network and layer the masks before and after revival, bool [out, in], read from the images in the log, which
    have a whole number of pixels per connection: before on the left, after on the right, both dark where pruned."""
    log, masks = read_events(run), {}
    for network, report in json.loads((run / "topology.json").read_text()).items():
        masks[network] = {}
        for layer, row in report["layers"].items():
            image = log.Images(f"topology/{network}.{layer}")[0]
            connected = plt.imread(io.BytesIO(image.encoded_image_string))[..., 0] > 0.5
            down, across = (max(1, 256 // n) for n in row["shape"])
            width = row["shape"][1] * across
            before, after = connected[::down, :width:across], connected[::down, -width::across]
            if (before.sum(), after.sum()) != (row["static"], row["active"]):
                fail(f"the image topology/{network}.{layer} of {run.name} does not show what its topology.json counts")
            masks[network][layer] = before, after
    return masks


def draw_masks(network: str, layers: dict[str, tuple[np.ndarray, np.ndarray]], run: str, path: Path) -> None:
    figure, grid = plt.subplots(
        len(layers), 4, layout="constrained", figsize=(12, 1 + 2.6 * len(layers)), squeeze=False
    )
    figure.suptitle(f"{network} of {run}\ndark: pruned, grey: kept by static pruning, orange: revived")
    colours = ListedColormap(["#18181f", "#b0b6c0", "#ff8c00"])
    for (layer, (before, after)), row in zip(layers.items(), grid):
        for axes, kind, when in zip(row, (before * 1, before + 2 * (after & ~before)), ("before", "after")):
            axes.imshow(kind, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
            title = f"{layer} {when}: {np.count_nonzero(kind)} of {kind.size}"
            axes.set(title=title, xlabel="input neuron", ylabel="output neuron")
        for axes, axis, side in zip(row[2:], (0, 1), ("input", "output")):
            for mask, name, width in ((before, "static", 3.5), (after, "tar", 1.5)):
                degrees = -np.sort(-mask.sum(axis))
                when = "before revival" if name == "static" else "after revival"
                edges = np.arange(len(degrees) + 1)
                axes.stairs(degrees, edges, baseline=None, label=when, color=STYLES[name][0], linewidth=width)
            axes.set(title=f"{layer}: connections per {side}", xlabel=f"{side} neurons, by degree", ylim=(0, None))
        for axes in row:
            axes.locator_params(integer=True, nbins=6)
    finish(figure, path)


# WRITING


def publish(runs: pd.DataFrame, drawn: Path | None, destination: Path) -> None:
    """A copy of each run with the scalars of PUBLISHED_TAGS, speed once per evaluation, and images of the drawn run."""
    for run, args in zip(runs.folder, runs.args):
        copy = destination / run.name
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir(parents=True)
        shutil.copy(run / "topology.json", copy)
        config = json.loads((run / "config.json").read_text()) | {"published": True}
        config["args"]["runs_dir"] = Path(config["args"]["runs_dir"]).name  # no one else has the folders above
        (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        log, values = read_events(run), []
        for tag in (tag for tag in log.Tags()["scalars"] if tag.startswith(PUBLISHED_TAGS)):
            points = log.Scalars(tag)
            if tag == "charts/SPS":
                points = {point.step // args["eval_frequency"]: point for point in points}.values()
            values += [(point, Summary.Value(tag=tag, simple_value=point.value)) for point in points]
        for tag in log.Tags()["images"] if run == drawn else []:
            for point in log.Images(tag):
                image = {"encoded_image_string": point.encoded_image_string}
                image |= {"height": point.height, "width": point.width, "colorspace": 3}
                values.append((point, Summary.Value(tag=tag, image=Summary.Image(**image))))
        began = log.FirstEventTimestamp()
        events = [Event(wall_time=began, file_version="brain.Event:2")]
        for point, value in sorted(values, key=lambda pair: (pair[0].wall_time, pair[0].step)):
            events.append(Event(wall_time=point.wall_time, step=point.step, summary=Summary(value=[value])))
        with (copy / f"events.out.tfevents.{int(began)}").open("wb") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())


def compare(runs: pd.DataFrame, notes: list[str], drawn: Path | None, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = runs.explode("returns").assign(step=np.concatenate([returns.index for returns in runs.returns]))
    curves = curves.assign(run=[folder.name for folder in curves.folder]).rename(columns={"returns": "return"})
    columns = ["algo", "env_id", "arm", "sparsity", "seed", "step", "return", "run"]
    curves[columns].to_csv(out / "evaluations.csv", index=False)
    for algo, of_algo in runs.groupby("algo"):
        draw_sparsities(of_algo, out / f"{algo}_sparsity.png")
        for sparsity in sorted(set(of_algo.sparsity[~of_algo.dense])) or [0.0]:
            group = of_algo[of_algo.dense | (of_algo.sparsity == sparsity)]
            name, found = f"{algo}_s{sparsity}", notes + warnings(group)
            returns, aggregate, paired = returns_table(group), aggregate_table(group, found), paired_table(group)
            for kind, table in (("returns", returns), ("aggregate", aggregate), ("paired", paired)):
                table.to_csv(out / f"{name}_{kind}.csv", index=False)
            draw_curves(group, out / f"{name}_curves.png")
            listed = "\n".join(f"- {sentence}" for sentence in found) or "Nothing is missing or unequal."
            page = f"""# {algo.upper()} at sparsity {sparsity}

{listed}

## Final return

Mean over the evaluations of the last tenth of training, then over n seeds, with its 95% t interval.

{markdown(returns)}

![learning curves]({name}_curves.png)

Lines are means over seeds, shades their 95% t intervals; of two seeds each is a thin line.

## Across environments

Interquartile mean over n runs of the final return in % of dense (below 4 runs nothing is trimmed), and the probability
that a run of a TAR arm beats one of the row's arm, with 95% stratified bootstrap intervals (Agarwal et al. 2021). At
few seeds these intervals are too narrow, since a bootstrap only sees the seeds that were run.

{markdown(aggregate)}

## TAR minus static, paired by seed

{markdown(paired)}
"""
            (out / f"{name}.md").write_text(page)
            for sentence in found:
                print(f"{name}: {sentence}")
    if drawn:
        for network, layers in masks_of(drawn).items():
            draw_masks(network, layers, drawn.name, out / f"masks_{network}.png")
    print(f"wrote {out}")


def main(args: Args) -> None:
    notes = []
    if args.publish and args.publish.resolve() == args.folder.resolve():
        fail("--publish needs another folder than that of the runs, whose files it would thin out")
    runs = read_runs(args.folder, notes)
    drawable = {run.name: run for run in runs.folder[runs.drawable]}
    if args.masks_of and args.masks_of not in drawable:
        fail(
            f"--masks-of {args.masks_of} is no finished tar run with images; there are: {', '.join(drawable) or 'none'}"
        )
    drawn = drawable.get(args.masks_of or next(iter(drawable), None))
    folder = args.folder
    if args.publish:
        publish(runs, drawn, args.publish)
        folder, notes = args.publish, []
        runs, drawn = read_runs(folder, notes), drawn and folder / drawn.name
    compare(runs, notes, drawn, args.out or folder / "comparison")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
