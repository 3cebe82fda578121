"""Compares the arms of a folder of runs: tables with intervals, return against steps, time and FLOPs, masks.

python lab/compare.py runs                             # every arm against `static` on its base
python lab/compare.py runs --against rigl --env-id Hopper-v4 --arm tar rigl
python lab/compare.py runs --publish runs/published    # a copy as text first, then the comparison of that copy
python lab/compare.py runs/published --events folder   # event files of published runs, for TensorBoard

An arm is what runs of one algorithm share: method, base (criterion+distribution), the script where there are several,
and each flag that would differ between runs of one arm in one environment. Per algorithm and sparsity this writes a
page (<algo>_s<sparsity>.md), its tables as CSV and its figures; per algorithm a figure of return against sparsity; the
masks of one run before and after revival; and evaluations.csv, every evaluation of every run. What is missing or
unequal, and the lines of the folder's NOTES.md, stand on top of each page.

Statistics: the final return of a run is the mean of its evaluations in the last tenth of training; the 95% intervals
of means over seeds are Student's t. As in Agarwal et al. 2021 (Deep RL at the Edge of the Statistical Precipice): the
probability of improvement and, across environments, the interquartile mean over all runs of an arm of the return in %
of dense (of the mean over dense's seeds in that environment, taken as a constant), both with the 95% percentile
interval of a bootstrap that draws seeds anew within each environment.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_utils
from lab import run_log
from lab.record import FOLLOWS, WITHOUT, canonical, codes, fail, identity, ignored, methods_of, read_config


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """folder of run folders"""
    out: Path | None = None
    """where the comparison goes; default: comparison, in that folder"""
    against: str | None = None
    """the arm that all others are held against, or a part of its name; default: each against the static one on its base
    that is most like it"""
    env_id: tuple[str, ...] = ()
    """compare in these environments only"""
    arm: tuple[str, ...] = ()
    """compare only these arms, or those whose names contain one of these"""
    separate_code: bool = False
    """runs of one arm that different code made are arms of their own"""
    publish: Path | None = None
    """first copy the finished runs there as text, small enough for a repository, and compare the copy"""
    events: Path | None = None
    """only write the runs there as event files with their hyperparameters"""
    masks_of: str | None = None
    """name of the run folder whose masks are drawn; default: the first run that revived connections"""


# colours that colour-blind readers can tell apart (after Okabe and Ito, and Tol), and dashes: by turns the first 35
# arms have lines of their own, and those with the same dashes differ in grey, too
COLOURS = ("#000000", "#CC79A7", "#D55E00", "#882255", "#56B4E9", "#E69F00", "#004488")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (9, 2)))
THIN_LINES = 5  # up to so many seeds are drawn each, the interval of more as a shade
NETWORKS = ("actor", "critic")
AXES = {"method", "sparsity", "criterion", "distribution"} | {
    f"{network}_{what}" for network in NETWORKS for what in ("method", "sparsity")
}
CELL = ["algo", "sparsity", "env_id", "arm"]
COSTS = {"minutes": "time", "1e12 FLOPs": "flops"}  # and what their files' names end with


# READING


def arm_of(args: dict, settings: dict) -> tuple[str, str]:
    """An arm's name and its base: "tar random+er" and "random+er"; networks that differ are named behind."""
    base = "+".join(settings[name] for name in ("criterion", "distribution") if name in settings)
    parts = [args["method"], base]
    for network in NETWORKS:
        method, sparsity = args.get(f"{network}_method") or args["method"], args.get(f"{network}_sparsity")
        if method != args["method"]:
            parts.append(f"{network} {method}")
        if "sparsity" not in ignored({method}) and sparsity not in (None, args["sparsity"]):
            parts.append(f"{network} {sparsity}")
    return " ".join(part for part in parts if part), base


def label(arm: str, base: str) -> str:
    """The arm without its base, which is the title in figures."""
    return " ".join(part for part in arm.split() if part != base)


def read_run(run: Path, notes: list[str], separate_code: bool) -> dict | None:
    """The row of a finished run; `settings` is what makes it its arm. None, and a note, of a run that is left out."""
    config, (points, began) = read_config(run), run_log.read_scalars(run)
    args, segments = canonical(config["args"]), config["segments"]
    steps = points.step[points.tag == "eval/episodic_return"]
    if not (steps > 0.9 * args["total_timesteps"]).any():
        notes.append(f"no evaluation in the last tenth of training, so left out: {run.name}")
        return None
    if steps.duplicated().any():
        notes.append(f"evaluations logged twice, of which the last counts: {run.name}")
    curve = run_log.curve_of(points, [segment["from_step"] for segment in segments[1:]])
    row = {"folder": run, "script": config["script"], "args": args, "curve": curve, "began": began}
    row |= {name: args[name] for name in ("env_id", "seed", "method")}
    row |= {"final": curve["return"][curve.index > 0.9 * args["total_timesteps"]].mean()}
    row |= {"code": "+".join(code[:7] if code else "older" for code in codes(config))}
    commits = dict.fromkeys(str(segment["git_commit"]) for segment in segments)
    row |= {"commit": " then ".join(commit[:7] + commit[40:] for commit in commits)}  # [40:]: -dirty
    made = {}
    for segment in segments:
        own = {name: segment[name] for name in ("processor", "device")}
        if "in_kernels" in segment:
            own["in_kernels"] = ", ".join(segment["in_kernels"]) or "none"
        for name, value in {**(segment["versions"] or {}), **own}.items():
            made.setdefault(name, {}).update({str(value): None} if value else {})
    row |= {"made": {name: " then ".join(values) for name, values in made.items() if values}}
    settings = {name: value for name, value in identity(args).items() if name not in ("env_id", "seed")}
    if settings.get("exp_name") == config["script"]:
        del settings["exp_name"]  # the default
    if len(segments) == 1 and "save_buffer" in settings:
        settings["save_buffer"] = True  # which makes a difference to a resumed run alone
    if separate_code:
        settings["code"] = row["code"]
    row |= {"settings": settings, "dense": "sparsity" not in settings, "sparsity": settings.get("sparsity", 0.0)}
    return row | dict(zip(("arm", "base"), arm_of(args, settings)))


def algorithms(runs: pd.DataFrame) -> dict[str, str]:
    """The algorithm of each script. Scripts are of one if the flags of one are all among the other's, as in an edited
    copy; a script's flags are those of its newest run."""
    flags = {script: set(rows.args.iloc[-1]) for script, rows in runs.groupby("script")}
    groups = []
    for script in sorted(flags, key=lambda script: (len(flags[script]), script)):
        group = next((group for group in groups if any(flags[other] <= flags[script] for other in group)), None)
        if group is None:
            groups.append(group := [])
        group.append(script)
    return {script: "+".join(sorted(group)) for group in groups for script in group}


def read_runs(folder: Path, notes: list[str], separate_code: bool = False) -> pd.DataFrame:
    """One row per finished run. Notes name what is left out."""
    rows = []
    for path in sorted(folder.glob("*/config.json")):
        if (path.parent / "final.pt").exists() or read_config(path.parent)["published"]:
            rows.append(read_run(path.parent, notes, separate_code))
        else:
            notes.append(f"not finished, so left out: {path.parent.name}")
    rows = [row for row in rows if row]
    if not rows:
        fail(f"{folder} holds no finished run; a run is a folder in it with config.json and final.pt")
    runs = pd.DataFrame(rows).sort_values("began", ignore_index=True)
    runs["algo"] = runs.script.map(algorithms(runs))
    several = runs.groupby("algo").script.transform("nunique") > 1
    runs.loc[several, "arm"] += " " + runs.script[several]
    # what else differs in one environment makes arms of its own, named alike in all environments and on all bases
    for _, like in runs.groupby([runs.algo, [*map(label, runs.arm, runs.base)]]):
        # a flag that only some of the runs have differs too
        names = sorted({name for _, cell in like.groupby(CELL) for name in differing(cell.settings, absent="none")})
        ends = [
            [f" {name}={s[name]}" for name in names if name in s and s[name] != plain_value(name, s)]
            for s in like.settings
        ]
        runs.loc[like.index, "arm"] += ["".join(end) for end in ends]
    for run in runs.folder[runs.duplicated([*CELL, "seed"], keep="last")]:
        notes.append(f"run again later, so left out: {run.name}")
    return runs.drop_duplicates([*CELL, "seed"], keep="last").sort_values([*CELL, "seed"])


def plain_value(name: str, settings: dict) -> object:
    """What a flag is where it need not be told: as the flag that it follows, or as in a script without it."""
    return settings.get(FOLLOWS[name]) if name in FOLLOWS else WITHOUT.get(name, "")


def differing(dictionaries: pd.Series, absent: str | None = None) -> list[str]:
    """Names that do not have the same value wherever they occur; elsewhere their value is `absent`, if it is given."""
    names = sorted({name for dictionary in dictionaries for name in dictionary})
    values = {name: {str(d.get(name, absent)) for d in dictionaries if absent or name in d} for name in names}
    return [name for name in names if len(values[name]) > 1]


def code_warnings(runs: pd.DataFrame) -> list[str]:
    """Which code made what, if it is not one code or not known."""
    found = []
    for arm, rows in runs.groupby("arm"):
        makers = []
        for (code, commit), part in rows.groupby(["code", "commit"]):
            made = [f"{env_id} seed {', '.join(map(str, cell.seed))}" for env_id, cell in part.groupby("env_id")]
            makers.append(f"{code} (commit {commit}) made {', '.join(made)}")
        if rows.code.nunique() > 1:
            found.append(f"{arm} averages runs of different code (see --separate-code): {'; '.join(makers)}")
    if runs.code.nunique() > 1:
        made = [f"{code} made {', '.join(arms_of(rows))}" for code, rows in runs.groupby("code")]
        found.append(f"the arms were not made by one code: {'; '.join(made)}")
    older = runs.commit[runs.code.str.contains("older")].value_counts().sort_index()
    if len(older):
        counts = ", ".join(f"{n} of {commit}" for commit, n in older.items())
        found.append(f"runs older than the code hash, of which the commit alone is known: {counts}")
    return found


def warnings(runs: pd.DataFrame) -> list[str]:
    """What is missing or unequal within one comparison, in sentences."""
    found, seeds = code_warnings(runs), set(runs.seed)
    for (env_id, arm), cell in runs.groupby(["env_id", "arm"]):
        missing = sorted(seeds - set(cell.seed))
        if missing:
            found.append(f"{arm} on {env_id}: no run with seed {', '.join(map(str, missing))}, which other arms have")
    for arm, rows in runs.groupby("arm"):
        for env_id in sorted(set(runs.env_id) - set(rows.env_id)):
            found.append(f"{arm}: no run on {env_id}, which other arms have, and so no aggregate")
    for run in runs.itertuples():
        last = run.args["total_timesteps"]
        missing = sorted({*range(0, last, run.args["eval_frequency"]), last} - set(run.curve.index))
        if missing:
            steps = ", ".join(map(str, missing))
            found.append(f"{run.arm} on {run.env_id}, seed {run.seed}: no evaluation at step {steps}")
    for column, noun in (("made", "version of"), ("settings", "argument")):
        for name in (name for name in differing(runs[column]) if name not in AXES):
            counts = pd.Series([str(d[name]) for d in runs[column] if name in d]).value_counts()
            values = "; ".join(f"{value} in {count} of {len(runs)} runs" for value, count in sorted(counts.items()))
            what = name if name in ("processor", "device", "in_kernels") else f"{noun} {name}"
            found.append(f"unequal {what}: {values}")
    return found


def changing_arms(runs: pd.DataFrame) -> list[str]:
    """Arms of one name whose flags differ between sparsities, at each of which they are the only ones so named."""
    names = {}
    for (arm, _), rows in runs.groupby(["arm", "env_id"]):
        names.setdefault(arm, set()).update(set(differing(rows.settings, absent="none")) - AXES)
    return [f"{arm} has not one {', '.join(sorted(of))} at all sparsities" for arm, of in names.items() if of]


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


def with_interval(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip([name, f"{name} low", f"{name} high"], values))


def arms_of(runs: pd.DataFrame) -> list[str]:
    """By base, those without one first, then by name."""
    return list(runs.sort_values(["base", "arm"]).arm.unique())


def finals_of(runs: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """(environment, arm): the final returns, by seed."""
    return {key: cell.set_index("seed").final for key, cell in runs.groupby(["env_id", "arm"])}


def references(runs: pd.DataFrame, against: str | None, found: list[str]) -> dict[str, str]:
    """The arm that each arm is held against. By default one whose pruned networks are of a method of CONTROLS, on the
    same base (on the only base if it has none): of several, the one that shares most of the settings that act on both,
    then the plainest, then the one with most runs in common. A control is held against a plainer one alone."""
    arms = runs.drop_duplicates("arm").set_index("arm")
    if against:
        if against not in arms.index:
            found.append(f"no run of {against}, so no arm is held against it")
        return {arm: against for arm in arms.index if arm != against and against in arms.index}
    pruned = [{*methods_of(args).values()} - sparse_utils.UNPRUNED.keys() for args in arms.args]
    chosen, controls = {}, arms[[bool(methods) and methods <= sparse_utils.CONTROLS.keys() for methods in pruned]]

    def unpruned(arm: pd.Series) -> set[tuple[str, str]]:
        return {item for item in methods_of(arm.args).items() if item[1] in sparse_utils.UNPRUNED}

    def set_apart(arm: pd.Series) -> int:  # flags that are not as in a script without them, and networks not pruned
        names = {FOLLOWS.get(n, n) for n, value in WITHOUT.items() if arm.settings.get(n, value) != value}
        return len(names) + len(unpruned(arm))

    def unlike(one: pd.Series, other: pd.Series) -> int:
        flags = one.settings.keys() & other.settings.keys() - {"method", "actor_method", "critic_method"}
        names = {FOLLOWS.get(flag, flag) for flag in flags if one.settings[flag] != other.settings[flag]}
        return len(names) + (len(unpruned(one) ^ unpruned(other)) if one.base else 0)

    cells = {arm: set(zip(rows.env_id, rows.seed)) for arm, rows in runs.groupby("arm")}

    for arm, own in arms.iterrows():
        same = controls[(controls.base == own.base) | (own.base == "" and controls.base.nunique() == 1)]
        if arm in controls.index:
            same = same[[set_apart(control) < set_apart(own) for _, control in same.iterrows()]]
        if len(same):
            ranks = [(unlike(own, c), set_apart(c), -len(cells[arm] & cells[name])) for name, c in same.iterrows()]
            chosen[arm] = same.index[ranks.index(min(ranks))]
    without = [arm for arm in arms_of(runs) if arm not in chosen and arm not in controls.index]
    if without and len(arms) > 1:
        names = " or ".join(sparse_utils.CONTROLS)
        found.append(f"no arm of method {names} on the base of {', '.join(without)}: held against none (see --against)")
    return chosen


def returns_table(runs: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """Per environment and arm: its final return, its difference, paired by seed, to the arm that it is held against,
    and how probably it beats that one."""
    rows, finals = [], finals_of(runs)
    for env_id, arm in itertools.product(sorted(set(runs.env_id)), arms_of(runs)):
        if (env_id, arm) not in finals:
            continue
        own, other = finals[env_id, arm], finals.get((env_id, chosen.get(arm)), pd.Series())
        row = {"environment": env_id, "arm": arm, "n": len(own), "seeds": " ".join(map(str, own.index))}
        row |= with_interval("final return", t_interval(own.to_numpy()))
        difference, probability = (own - other).dropna().to_numpy(), (np.nan,) * 3
        if len(other):
            probability = bootstrapped(improvement, [own.to_numpy(), other.to_numpy()])
        row |= {"against": chosen[arm] if len(other) else "-", "pairs": len(difference)}
        row |= with_interval("difference", t_interval(difference) if len(difference) else (np.nan,) * 3)
        rows.append(row | with_interval("P(better)", probability))
    table = pd.DataFrame(rows)
    return table if (table.against != "-").any() else table.loc[:, :"final return high"]


def aggregate_table(runs: pd.DataFrame, chosen: dict[str, str], found: list[str]) -> pd.DataFrame:
    """Per arm with runs in every environment: its mean in % of dense, and how probably it beats the arm that it is
    held against. Empty for one environment, or if there is neither."""
    env_ids, finals = sorted(set(runs.env_id)), finals_of(runs)
    if len(env_ids) == 1:
        return pd.DataFrame()
    samples = {arm: [finals.get((env_id, arm)) for env_id in env_ids] for arm in arms_of(runs)}
    samples = {arm: [one.to_numpy() for one in s] for arm, s in samples.items() if all(one is not None for one in s)}
    dense = [samples[arm] for arm in samples if runs.dense[runs.arm == arm].all()]
    scale = [sample.mean() for sample in dense[0]] if len(dense) == 1 else [0.0]
    if min(scale) <= 0:
        why = "not one dense arm has runs in every environment, or its mean return is not positive in one"
        found.append(f"no return in % of dense: {why}")
    rows = []
    for arm, own in samples.items():
        row = {"arm": arm, "environments": len(env_ids), "n": sum(map(len, own))}
        if min(scale) > 0:
            percent = [100 * sample / mean for sample, mean in zip(own, scale)]
            row |= with_interval("IQM, % of dense", bootstrapped(iqm, percent))
        other = samples.get(chosen.get(arm))
        row["against"] = chosen[arm] if other else "-"
        rows.append(
            row | with_interval("P(better)", bootstrapped(improvement, own + other) if other else (np.nan,) * 3)
        )
    table = pd.DataFrame(rows)
    return table if len(table) and (min(scale) > 0 or (table.against != "-").any()) else pd.DataFrame()


def wins_table(runs: pd.DataFrame) -> pd.DataFrame:
    """How probably a run of each arm beats one of each other, over the environments in which both have runs. Empty for
    two arms, which the first table has."""
    finals, arms, rows = finals_of(runs), arms_of(runs), []
    for arm, other in itertools.permutations(arms, 2) if len(arms) > 2 else ():
        env_ids = [env_id for env_id in sorted(set(runs.env_id)) if {(env_id, arm), (env_id, other)} <= finals.keys()]
        if env_ids:
            samples = [finals[env_id, name].to_numpy() for name in (arm, other) for env_id in env_ids]
            row = {"arm": arm, "against": other, "environments": len(env_ids)}
            rows.append(row | with_interval("P(better)", bootstrapped(improvement, samples)))
    return pd.DataFrame(rows)


def crossed(wins: pd.DataFrame) -> pd.DataFrame:
    """That table as a square, its columns numbered."""
    arms = list(dict.fromkeys([*wins.arm, *wins.against]))
    square = wins.pivot(index="arm", columns="against", values="P(better)").reindex(index=arms, columns=arms)
    square = square.map(lambda value: "-" if np.isnan(value) else f"{value:.2f}")
    square.columns = [str(i + 1) for i in range(len(arms))]
    return square.set_axis([f"{i + 1}. {arm}" for i, arm in enumerate(arms)]).reset_index(names="arm")


def of_one_processor(runs: pd.DataFrame, found: list[str]) -> pd.DataFrame:
    """Those whose minutes compare: in each environment, the runs of the processor that made most of them."""
    processors = pd.Series([made.get("processor", "unknown") for made in runs.made], runs.index)
    other = processors != processors.groupby(runs.env_id).transform(lambda made: made.mode().iloc[0])
    for env_id, rows in runs[other].groupby("env_id"):
        arms = ", ".join(arms_of(rows))
        found.append(f"made on {env_id} by another processor than most, so left out by minutes: {len(rows)} of {arms}")
    return runs[~other]


def least(runs: pd.DataFrame, cost: str) -> float:
    """What the run cost that was done first."""
    return min(curve[cost].iloc[-1] for curve in runs.curve)


def cost_table(runs: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Return after equal minutes or FLOPs: those of the environment's first run to be done, by a straight line between
    evaluations."""
    rows = []
    for env_id, of_env in runs.groupby("env_id"):
        end = least(of_env, cost)
        for arm in arms_of(of_env):
            curves = of_env.curve[of_env.arm == arm]
            row = {"environment": env_id, "arm": arm, "n": len(curves), f"compared after, {cost}": end}
            returns = np.array([np.interp(end, curve[cost], curve["return"]) for curve in curves])
            row |= with_interval("return then", t_interval(returns))
            rows.append(row | {f"a whole run, {cost}": np.mean([curve[cost].iloc[-1] for curve in curves])})
    return pd.DataFrame(rows)


def cells_of(table: pd.DataFrame) -> list[list[str]]:
    """Names and rows as text; a value and the ends of its interval become one cell."""
    names = [name for name in table.columns if not name.endswith((" low", " high"))]
    lines = [names]
    for row in table.to_dict("records"):
        lines.append([str(row[name]) for name in names])
        for i, name in enumerate(names):
            if isinstance(row[name], float):
                value, low, high = (row.get(f"{name}{end}", np.nan) for end in ("", " low", " high"))
                digits = 2 if name.startswith("P(") or (name.endswith(tuple(COSTS)) and value < 100) else 1
                interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
                lines[-1][i] = "-" if np.isnan(value) else f"{value:.{digits}f}{interval}"
    return lines


def markdown(table: pd.DataFrame) -> str:
    names, *rows = cells_of(table)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, ["-"] * len(names), *rows))


def aligned(table: pd.DataFrame) -> str:
    lines = cells_of(table)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


# FIGURES


def styles_of(runs: pd.DataFrame) -> dict[str, dict]:
    """Colour and dashes by label, in the order of the tables: a colour for each method and dashes for each set of flags
    while there are enough of both, then by turns; an arm looks the same on every base."""
    labels = [name for _, name in sorted({(base != "", label(arm, base)) for arm, base in zip(runs.arm, runs.base)})]
    methods, flags = zip(*(name.partition(" ")[::2] for name in labels))
    ranks = [[sorted(set(words)).index(word) for word in words] for words in (methods, flags)]
    if max(ranks[0]) >= len(COLOURS) or max(ranks[1]) >= len(DASHES):
        ranks = [range(len(labels))] * 2
    looks = [
        {"color": COLOURS[colour % len(COLOURS)], "linestyle": DASHES[dash % len(DASHES)]}
        for colour, dash in zip(*ranks)
    ]
    return dict(zip(labels, looks))


def panels(runs: pd.DataFrame):
    """Two columns of axes, one for each environment and base, and for each the arms on that base and those without."""
    grid = list(itertools.product(sorted(set(runs.env_id)), sorted(set(runs.base) - {""}) or [""]))
    columns = min(2, len(grid))
    rows = -(-len(grid) // columns)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", figsize=(9, 0.7 + 3.3 * rows))
    for spare in axes.flat[len(grid) :]:
        spare.remove()
    cells = []
    for ax, (env_id, base) in zip(axes.flat, grid):
        ax.set_title(" ".join(filter(None, [env_id, base])))
        ax.spines[["top", "right"]].set_visible(False)
        cells.append((ax, env_id, runs[(runs.env_id == env_id) & runs.base.isin([base, ""])]))
    for ax in axes[:, 0]:
        ax.set_ylabel("evaluation return")
    return figure, cells


def finish(figure, path: Path, order: list[str]) -> None:
    """Save with one legend, in that order."""
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels())))
    names = sorted(entries, key=order.index)
    columns = max(1, int(12 * figure.get_figwidth() / (8 + max(map(len, names)))))
    place = {"loc": "outside lower center", "ncols": columns, "handlelength": 3.2, "frameon": False}
    figure.legend([entries[name] for name in names], names, **place)
    run_log.save_figure(figure, path)


def show(axes, seen: np.ndarray) -> None:
    """All that was seen, and 1% of its size at least; wide intervals may leave the axes."""
    margin = max(0.05 * np.ptp(seen), 0.01 * np.abs(seen).max()) or 1.0
    axes.set_ylim(seen.min() - margin, seen.max() + margin)
    axes.ticklabel_format(axis="y", useOffset=False)


def on_one_axis(curves: list[pd.DataFrame], x: str) -> tuple[np.ndarray, np.ndarray]:
    """Points of the axis and the curves' returns there, [points, curves]: the steps that all have; or 300 minutes or
    FLOPs from where all have begun to where the first is done, by straight lines between evaluations."""
    if x == "step":
        joined = pd.concat([curve["return"] for curve in curves], axis=1, join="inner")
        return joined.index.to_numpy(), joined.to_numpy()
    begin = max(curve[x][curve[x] > 0].iloc[0] for curve in curves)
    points = np.geomspace(begin, max(begin, min(curve[x].iloc[-1] for curve in curves)), 300)
    return points, np.stack([np.interp(points, curve[x], curve["return"]) for curve in curves], 1)


def draw_curves(runs: pd.DataFrame, styles: dict[str, dict], x: str, path: Path) -> None:
    figure, cells = panels(runs)
    for axes, env_id, part in cells:
        for arm in arms_of(part):
            rows = part[part.arm == arm]
            name = label(arm, rows.base.iloc[0])
            points, curves = on_one_axis(list(rows.curve), x)
            mean, low, high = t_interval(curves)
            axes.plot(points, mean, label=name, linewidth=2, **styles[name])
            if len(rows) > THIN_LINES:
                axes.fill_between(points, low, high, color=styles[name]["color"], alpha=0.12, linewidth=0)
            elif len(rows) > 1:
                axes.plot(points, curves, color=styles[name]["color"], linewidth=0.6, alpha=0.4)
        of_env = runs[runs.env_id == env_id]
        show(axes, np.concatenate([curve["return"] for curve in of_env.curve]))
        axes.set_xlabel({"step": "environment steps", "1e12 FLOPs": "training FLOPs, 1e12"}.get(x, x))
        if x == "step":
            axes.ticklabel_format(axis="x", scilimits=(-3, 4))
        else:
            end = least(of_env, x)
            axes.axvline(end, color="#999999", linewidth=0.8)  # where the table compares
            axes.set(xscale="log", xlim=(0.03 * end, None))
            axes.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
    finish(figure, path, list(styles))


def draw_sparsities(runs: pd.DataFrame, styles: dict[str, dict], path: Path) -> None:
    figure, cells = panels(runs)
    sparsities = sorted(set(runs.sparsity[~runs.dense]))
    for axes, env_id, part in cells:
        arms = arms_of(part)
        for i, arm in enumerate(arms):
            rows = part[part.arm == arm]
            name = label(arm, rows.base.iloc[0])
            points = {s: t_interval(cell.final.to_numpy()) for s, cell in rows.groupby("sparsity")}
            mean, low, high = np.array(list(points.values())).T
            if rows.dense.all():
                axes.axhline(mean[0], label=name, **styles[name])
                axes.axhspan(*np.nan_to_num([low[0], high[0]], nan=mean[0]), color="#000000", alpha=0.08, linewidth=0)
                continue
            x = [sparsities.index(s) + 0.08 * (i - len(arms) / 2) for s in points]  # side by side, not on one another
            axes.errorbar(x, mean, [mean - low, high - mean], marker="o", ms=4, capsize=2, label=name, **styles[name])
        axes.set_xticks(range(len(sparsities)), [f"{s:g}" for s in sparsities])
        axes.set(xlim=(-0.6, len(sparsities) - 0.4), xlabel="sparsity")
        show(axes, runs.final[runs.env_id == env_id])
    finish(figure, path, list(styles))


# WRITING


RETURNS = """## Final return

Mean over the evaluations of the last tenth of training, then over n seeds, with its 95% t interval. Where there is an
arm to hold one `against`: the difference to it, paired by seed, mean over so many pairs with its 95% t interval; and
P(better), the probability that a run of the row's arm beats one of it, with 95% bootstrap interval (Agarwal et al.
2021), which at few seeds is too narrow, since a bootstrap only sees the seeds that were run.

{table}

![learning curves]({name}_curves.png)

Thick lines are means over seeds. Up to five seeds are thin lines; the shade of more is the 95% t interval.
"""
AGGREGATE = """## Across environments

Interquartile mean over n runs of the final return in % of dense (below 4 runs nothing is trimmed), and probability that
a run of the row's arm beats one of the arm under `against` in the same environment, with 95% stratified bootstrap
intervals (Agarwal et al. 2021), too narrow at few seeds.

{table}
"""
WINS = """## Which arm beats which

Probability that a run of the row's arm beats one of the column's in the same environment, ties counting half, mean over
the environments in which both have runs. `{name}_wins.csv` has the 95% bootstrap intervals, too narrow at few seeds.

{table}
"""
TIME = """## Return against time

After as many minutes as the fastest run in the environment took (grey in the figure), among the runs of the processor
that made most of them. The clock is the wall time since a run's first event, evaluations included; an interval between
two evaluations within which the run was resumed, or which is more than five times as long as the median of the two
before and the two after it, counts as the run's median one. How busy the machine was with other work is not known.

{table}

![return against time]({name}_time.png)
"""
FLOPS = """## Return against training FLOPs

After as many floating-point operations of training as the cheapest run in the environment took (grey in the figure).
Zeros are not counted, however they are computed.

{table}

![return against training FLOPs]({name}_flops.png)
"""
SECTIONS = {"returns": RETURNS, "aggregate": AGGREGATE, "wins": WINS, "time": TIME, "flops": FLOPS}


def write_page(group: pd.DataFrame, notes: list[str], against: str | None, styles: dict, out: Path, name: str) -> None:
    """The tables, figures and page of one algorithm and sparsity; its sentences and main table on the console too."""
    found = notes + warnings(group)
    chosen = references(group, against, found)
    tables = {"returns": returns_table(group, chosen), "aggregate": aggregate_table(group, chosen, found)}
    tables["wins"] = wins_table(group)
    draw_curves(group, styles, "step", out / f"{name}_curves.png")
    for cost, end in COSTS.items() if group.arm.nunique() > 1 else ():
        logged = group[[curve[cost].notna().all() and curve[cost].iloc[-1] > 0 for curve in group.curve]]
        if len(logged) < len(group):
            found.append(
                f"{len(group) - len(logged)} of {len(group)} runs did not log {cost}, by which they are left out"
            )
        if cost == "minutes":
            logged = of_one_processor(logged, found)
        if len(logged):
            tables[end] = cost_table(logged, cost)
            draw_curves(logged, styles, cost, out / f"{name}_{end}.png")
    title = f"{group.algo.iloc[0]} at sparsity {group.sparsity.max()}"
    listed = "\n".join(f"- {sentence}" for sentence in found) or "Nothing is missing or unequal."
    page = [f"# {title}\n\n{listed}\n"]
    for kind, table in tables.items():
        if len(table):
            table.to_csv(out / f"{name}_{kind}.csv", index=False)
            shown = crossed(table) if kind == "wins" else table
            page.append(SECTIONS[kind].format(table=markdown(shown), name=name))
    (out / f"{name}.md").write_text("\n".join(page))
    print(f"{title}\n{listed}\n\n{aligned(tables['returns'].drop(columns='seeds'))}\n")


def by_sparsity(of_algo: pd.DataFrame) -> dict[float, pd.DataFrame]:
    """The runs of each page. Dense ones are on all pages but those of sparsities that only other environments have."""
    dense, groups = of_algo.dense, {}
    for sparsity in sorted(set(of_algo.sparsity[~dense])) or [0.0]:
        own = ~dense & (of_algo.sparsity == sparsity)
        elsewhere = set(of_algo.env_id[~dense]) - set(of_algo.env_id[own])
        groups[sparsity] = of_algo[own | dense & ~of_algo.env_id.isin(elsewhere)]
    return groups


def compare(runs: pd.DataFrame, notes: list[str], against: str | None, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    curves = {tuple(run[[*CELL, "seed"]]): run.curve["return"] for _, run in runs.iterrows()}
    pd.concat(curves).rename_axis([*CELL, "seed", "step"]).to_csv(out / "evaluations.csv")
    styles = styles_of(runs)
    for algo, of_algo in runs.groupby("algo"):
        own_notes = notes + changing_arms(of_algo)
        pages = by_sparsity(of_algo)
        if len(pages) > 1:
            draw_sparsities(of_algo, styles, out / f"{algo}_sparsity.png")
        for sparsity, group in pages.items():
            write_page(group, own_notes, against, styles, out, f"{algo}_s{sparsity}")


def read(folder: Path, args: Args) -> tuple[pd.DataFrame, list[str], str | None]:
    """The runs in a folder that the flags ask for, its notes, and the name of the arm to hold them against."""
    path = folder / "NOTES.md"
    notes = [line.removeprefix("- ") for line in path.read_text().splitlines() if line] if path.exists() else []
    runs, against = read_runs(folder, notes, args.separate_code), args.against
    arms = arms_of(runs)

    def named(text: str) -> list[str]:
        return [text] if text in arms else [arm for arm in arms if text in arm]

    if against is not None:
        if len(named(against)) != 1:
            fail(f"--against {against} is not one arm; there are: {', '.join(named(against) or arms)}")
        (against,) = named(against)
    kept = {against, *(arm for text in args.arm or ("",) for arm in named(text))}
    runs = runs[runs.arm.isin(kept) & runs.env_id.isin(args.env_id or runs.env_id)]
    return (runs, notes, against) if len(runs) else fail(f"no such run; the arms are: {', '.join(arms)}")


def main(args: Args) -> None:
    for flag, folder in (("--publish", args.publish), ("--events", args.events)):
        if folder and folder.resolve() == args.folder.resolve():
            fail(f"{flag} needs another folder than that of the runs")
    folder = args.folder
    runs, notes, against = read(folder, args)
    if args.events:
        # the same columns in every run, since TensorBoard takes those of any one run
        names = dict.fromkeys(name for settings in runs.settings for name in settings)
        for run in runs.itertuples():
            first = {"method": run.method, "base": run.base, "sparsity": run.sparsity, "seed": run.seed}
            rest = {"env_id": run.env_id, "script": run.script} | names | run.settings
            run_log.write_events(run.folder, args.events / run.folder.name, first, rest | first, run.final)
        print(f"wrote {args.events}; watch it with: tensorboard --logdir {args.events}")
        return
    drawn = next((run for run in runs.folder if args.masks_of in (None, run.name) and run_log.has_masks(run)), None)
    if args.masks_of and not drawn:
        fail(f"--masks-of {args.masks_of} is no finished run that revived connections and has images of that")
    if args.publish:
        for run in runs.folder:
            run_log.publish(run, args.publish / run.name)
        folder = args.publish
        runs, notes, against = read(folder, args)
    out = args.out or folder / "comparison"
    compare(runs, notes, against, out)
    for network, layers in run_log.masks_of(drawn).items() if drawn else ():
        run_log.draw_masks(network, layers, drawn.name, out / f"masks_{network}.png")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.splitlines()[0]))
