"""Compare the methods in a folder of runs: tables with confidence intervals, learning curves, a page for each sparsity.

python lab/compare.py runs                                   # every arm against `static` on its base mask
python lab/compare.py runs --against rigl --env-id Hopper-v4 --arm tar rigl
python lab/compare.py runs --publish runs/mine               # add the runs to a published grid and compare that
python lab/compare.py runs/published --events /tmp/events    # event files of published runs, for TensorBoard

Runs with the same algorithm and flags form one arm; they differ in seed, environment and code, which is said. Its name
is the method, the base mask (criterion+distribution), and every flag in which runs of one method on one base mask in
one environment differ.
"""

import itertools
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pandas as pd
import tyro
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparse_utils
from lab import baselines, figures, record, results
from lab.figures import arms_of, t_interval
from lab.flags import fail, refuse_repeated


@dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # A folder of run folders, or a published grid.
    out: Path | None = None  # The folder of the comparison; default: comparison, in the folder that is compared.
    # The arm to compare with: its name, or a word or a text in it (an arm: runs that differ only in seed, environment
    # and code). Default: the `static` arm that each arm is most like.
    against: str | None = None
    env_id: tuple[str, ...] = ()  # Compare in these environments only.
    # Compare only these arms, or those with one of these words, or else one of these texts, in their names.
    arm: tuple[str, ...] = ()
    # Compare returns at equal cost, too. Time says nothing where runs shared their cores with other work.
    costs: tuple[Literal["time", "flops"], ...] = ("time", "flops")
    separate_code: bool = False  # Split each arm whose runs were made by different code into an arm for each code.
    publish: Path | None = None  # First add the finished runs to the published grid in this folder, and compare that.
    events: Path | None = None  # Only write the runs as event files with their hyperparameters into this folder.


RUN = ["algo", "sparsity", "env_id", "arm", "seed"]  # what tells runs apart
IN_EVERY_NAME = {"method", "critic_method", "sparsity", "critic_sparsity", "criterion", "distribution"}
COSTS = {"minutes": "time", "1e12 FLOPs": "flops"}  # columns of a curve: words in --costs and in names of files
PACKAGES = ["torch", "numpy", "gymnasium", "mujoco", "python"]
FEW_SEEDS = 5  # below so many a bootstrap gives no interval of P(better)
CAVEATS_ON_TOP = 5


def row_of(result: dict, separate_code: bool) -> dict:
    """The row of a finished run. `settings` are the flags that act on its result, but for environment and seed; `more`
    follows method and base mask in the name of its arm; `pruned` are the methods of its pruned networks."""
    args, segments, curve = result["args"], result["segments"], results.curve_of(result)
    methods, flags = {args["method"], args["critic_method"]}, SimpleNamespace(**args)
    row = result | {name: args[name] for name in ("env_id", "seed", "method")} | {"curve": curve}
    row["final"] = curve["return"][curve.index > 0.9 * args["total_timesteps"]].mean()
    row["code"] = "+".join(code[:7] if code else "older" for code in record.codes(result))
    for name in ("git_commit", "processor", "device", *PACKAGES):
        values = ((segment | segment["versions"]).get(name) or "unknown" for segment in segments)
        row[name] = re.sub(r"\b([0-9a-f]{7})[0-9a-f]{33}", r"\1", " then ".join(dict.fromkeys(values)))
    in_kernels = ("+".join(segment.get("in_kernels", ["unknown"])) or "none" for segment in segments)
    row["in_kernels"] = " then ".join(dict.fromkeys(in_kernels))
    unused = {"env_id", "seed"} | ({"save_buffer"} if len(segments) == 1 else set())  # it acts on resumed runs alone
    unused |= {"prune_at"} if methods <= sparse_utils.UNPRUNED.keys() else set()  # at which nothing is pruned
    if methods <= baselines.METHODS.keys():  # an unknown method may use any flag
        unused |= record.unused(flags)
    defaults = {"exp_name": result["script"], "drop_criterion": baselines.usual_drop(methods), "save_buffer": True}
    defaults |= {"load": ""}
    settings = record.identity(args) | {"load": (args.get("load") or "")[-13:]}  # of a file, @ and its hash alone
    settings = {n: v for n, v in settings.items() if n not in unused and v != defaults.get(n, MISSING)}
    row["settings"] = settings | ({"code": row["code"]} if separate_code else {})
    row |= {"pruned": methods - sparse_utils.UNPRUNED.keys(), "dense": methods == {"dense"}}
    row["unpruned"] = [args[name] in sparse_utils.UNPRUNED and args[name] for name in ("method", "critic_method")]
    row["base"] = f"{args['criterion']}+{args['distribution']}" if row["pruned"] else ""
    versions = [(name, version) for segment in segments for name, version in segment["versions"].items()]
    row["versions"] = {name: " then ".join(dict.fromkeys(v for n, v in versions if n == name)) for name, _ in versions}
    row["cut"] = cut_by_pruning(result["topology"])
    row["sparsity"] = max(args["sparsity"], args["critic_sparsity"])
    row["more"] = f" critic {args['critic_method']}" if args["critic_method"] != args["method"] else ""
    for network, prefix in (("actor", ""), ("critic", "critic_")):
        if args[f"{prefix}method"] != "dense" and args[f"{prefix}sparsity"] != row["sparsity"]:
            row["more"] += f" {network} {args[f'{prefix}sparsity']}"
    return row


def read_runs(folder: Path, notes: list[str], separate_code: bool) -> pd.DataFrame:
    """One row for each finished run. The notes say which runs are left out."""
    unfinished = []
    rows = [row_of(result, separate_code) for result in results.results_in(folder, unfinished)]
    if not rows:
        fail(f"{folder} holds no finished run; it needs run folders with config.json and final.pt, or a runs.json")
    runs = pd.DataFrame(rows).sort_values("began", ignore_index=True)
    # scripts are of one algorithm if all flags of one are among the other's, as in an edited copy
    flags = {script: set(record.identity(rows.args.iloc[-1])) for script, rows in runs.groupby("script")}
    by_size = sorted(flags, key=lambda script: (len(flags[script]), script))
    first = {script: next(other for other in by_size if flags[other] <= flags[script]) for script in flags}
    alike = runs.script.groupby(runs.script.map(first))
    runs["algo"] = alike.transform(lambda scripts: "+".join(sorted({*scripts})))
    runs["more"] += (" " + runs.script).where(runs.algo != runs.script, "")
    # flags that differ between runs of one method in one environment make arms of their own, and are in the names of
    # all arms of the algorithm, alike at every sparsity and on every base mask
    for _, of_algo in runs.groupby("algo"):
        like = of_algo.groupby(["method", "more", "env_id", "base"])
        differ = {name for _, cell in like for name in differing(cell.settings)}
        lengths = of_algo.settings.map(lambda settings: settings["total_timesteps"]).groupby(of_algo.env_id)
        differ |= {"total_timesteps"} if lengths.nunique().max() > 1 else set()  # as of dense, trained for longer
        codes = of_algo.groupby("script").code.nunique()
        differ |= {"code"} if codes.max() > 1 else set()  # in `settings` only with --separate-code
        for index, settings in of_algo.settings.items():
            told = [n for n in sorted(differ - IN_EVERY_NAME) if n in settings]
            told = [f" {n}={settings[n]}" for n in told if settings[n] != record.usual(n, settings)]
            runs.loc[index, "more"] += "".join(told)
    runs["label"] = runs.method + runs.more  # without the base mask, which is in the title of a panel
    runs["arm"] = runs.method + (" " + runs.base).str.rstrip() + runs.more
    again = runs.duplicated(RUN, keep="last")
    other = runs.code != runs.groupby(RUN).code.transform("last")
    left_out = {"they are not finished, or final.pt or event files up to the end are missing": unfinished}
    left_out["they were run again later"] = [path.name for path in runs.path[again & ~other]]
    by_other = "they were run again later by other code (with --separate-code each code has an arm)"
    left_out[by_other] = [path.name for path in runs.path[again & other]]
    notes += [f"Left out, since {why}: {', '.join(names)}." for why, names in left_out.items() if names]
    return runs[~again].sort_values(RUN)


def differing(dictionaries: Iterable[dict]) -> set[str]:
    """The names that do not have the same value in all of them; a name that is only in some of them is one."""
    names = {name for dictionary in dictionaries for name in dictionary}
    return {name for name in names if len({str(d.get(name, MISSING)) for d in dictionaries}) > 1}


def cut_by_pruning(topology: dict) -> float:
    """The percentage of the inputs and outputs of all layers that static pruning left unconnected; NaN without any."""
    layers = [layer for network in topology.values() for layer in network["layers"].values()]
    cut = sum(layer["blind_inputs"][0] + layer["dead_units"][0] for layer in layers)
    return 100 * cut / (sum(sum(layer.get("part", layer["shape"])) for layer in layers) or np.nan)


def told_by(runs: pd.DataFrame) -> set[str]:
    """The flags that names of arms tell."""
    return {word.partition("=")[0] for arm in runs.arm for word in arm.split() if "=" in word} | IN_EVERY_NAME


def caveats_of(runs: pd.DataFrame, notes: list[str]) -> list[str]:
    """In sentences: whether different code made the runs, above all those of one arm; what differs and is not in the
    names of the arms; the notes; the environments and seeds that only some arms have."""
    # by environment, since a reader's own environment is part of the code of its runs
    cells, gaps = runs.groupby(["arm", "env_id"]), {}
    mixed = sorted({arm for (arm, _), rows in cells if rows.code.nunique() > 1})
    found = ["The runs are not all of the same code: see the last table."] if runs.code.nunique() > 1 else []
    if mixed:
        found[0] += f" Means over runs of different code (see --separate-code): {', '.join(mixed)}."
    names = sorted({name for settings in runs.settings for name in settings} - told_by(runs))
    columns = {n: [s.get(n, "none") for s in runs.settings if n in s or n == "load"] for n in names}
    packages = sorted(set().union(*runs.versions))  # some runs may lack some, such as those of environments
    columns |= {f"version of {name}": [own[name] for own in runs.versions if name in own] for name in packages}
    columns |= {"processor": runs.processor}
    for name, values in columns.items():
        counts = pd.Series(map(str, values)).value_counts().sort_index()
        which = [f"{value} in {count} of {len(runs)} runs" for value, count in counts.items()]
        found += [f"Not the same {name}: {'; '.join(which)}."] if len(which) > 1 else []
    for (env_id, of_env), arm in itertools.product(runs.groupby("env_id"), arms_of(runs)):
        own = set(of_env.seed[of_env.arm == arm])
        if missing := sorted(set(of_env.seed) - own):
            gaps.setdefault(f"{env_id}, seed {', '.join(map(str, missing))}" if own else env_id, []).append(arm)
    where = "; ".join(f"{at}: {', '.join(arms)}" for at, arms in gaps.items())
    return found + notes + ([f"No finished run on {where}."] if gaps else [])


def shared_by(runs: pd.DataFrame) -> tuple[str, str]:
    """The flags that all pruned runs have alike, or all of those with some methods, so that no name of an arm tells
    them. In a sentence, the length of training, --load, the reserve, and the flags that `record.usual` knows and that
    are not at their defaults; then a list of the flags whose defaults are those of a script, which are not known."""
    every, above, below = runs[runs.base != ""] if runs.base.any() else runs, [], []
    for name in sorted(set().union(*every.settings) - told_by(runs)):
        own = every[[name in settings for settings in every.settings]]
        value = own.settings.iloc[0][name]
        usual, values = record.usual(name, own.settings.iloc[0]), {str(settings[name]) for settings in own.settings}
        whole = every.method.isin(own.method).sum() == len(own)  # a default may be left out of `settings`
        if whole and len(values) == 1 and usual != value:
            of = f" ({', '.join(sorted(set(own.method)))})" if len(own) < len(every) else ""
            first = name in ("total_timesteps", "load", "reserve") or usual is not MISSING
            (above if first else below).append(f"{name}={value}{of}")
    which = "All" if len({*(runs.base == "")}) == 1 else "All pruned"
    return f"{which} runs have {', '.join(above)}." if above else "", ", ".join(below)


def cut_before_revival(runs: pd.DataFrame) -> str:
    """In a sentence, by base mask and environment, `cut_by_pruning` of the arms that revive, from 1% on: the range."""
    revived = runs[[bool(methods & sparse_utils.REVIVALS.keys()) for methods in runs.pruned]]
    shares = []
    for (base, env_id), cuts in revived.groupby(["base", "env_id", "arm"]).cut.mean().groupby(["base", "env_id"]):
        if cuts.max() >= 1:
            ends = dict.fromkeys(f"{end:.0f}" for end in (cuts.min(), cuts.max()))
            shares.append(f"{'-'.join(ends)}% on {base} in {env_id}")
    what = "Share of the inputs and outputs of layers that static pruning had left unconnected before revival"
    return f"{what}: {', '.join(shares)}." if shares else ""


def iqm(*samples: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(np.concatenate(samples, axis), 0.25, axis)


def improvement(*samples: np.ndarray, axis: int) -> np.ndarray:
    """P(better), mean over environments. Samples: those of one arm in each environment, then those of the other."""
    pairs = zip(samples[: len(samples) // 2], samples[len(samples) // 2 :], strict=True)
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in pairs]
    return np.mean([((x > y) + 0.5 * (x == y)).mean((-2, -1)) for x, y in pairs], axis=0)


def bootstrapped(statistic, samples: list[np.ndarray], at_least: int = 2) -> tuple[float, float, float]:
    """The statistic and its 95% interval: NaN if a sample has fewer than `at_least` values or the ends are equal."""
    value, ends = float(statistic(*samples, axis=-1)), (np.nan, np.nan)
    if min(map(len, samples)) >= at_least:
        ends = stats.bootstrap(samples, statistic, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return (value, *map(float, ends)) if ends[0] < ends[1] else (value, np.nan, np.nan)


def with_interval(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip([name, f"{name} low", f"{name} high"], values))


def better(finals: dict, arm: str, other: str | None, env_ids: Iterable[str]) -> dict[str, object]:
    """P(better) of an arm against another, over those of the environments in which both have runs."""
    both = [env_id for env_id in env_ids if {(env_id, arm), (env_id, other)} <= finals.keys()]
    samples = [finals[env_id, name].to_numpy() for name in (arm, other) for env_id in both]
    return with_interval("P(better)", bootstrapped(improvement, samples, FEW_SEEDS) if both else (np.nan,) * 3)


def finals_of(runs: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """(environment, arm): the final returns, by seed."""
    return {key: cell.set_index("seed").final for key, cell in runs.groupby(["env_id", "arm"], sort=False)}


def references(runs: pd.DataFrame, against: str | None) -> dict[str, str]:
    """The arm with which each arm is compared: `against`, or a control, whose pruned networks have methods of CONTROLS,
    on the same base mask (on the only one if the arm has none). Of several it is the one with fewest different flags,
    where another script and other unpruned networks count as one each, then the fewest words in its name, then most
    runs in common, then the first by name. A control is compared with one of fewer words."""
    arms = runs.drop_duplicates("arm").set_index("arm")
    if against:
        return {arm: against for arm in arms.index if arm != against and against in arms.index}
    controls = arms[[bool(methods) and methods <= sparse_utils.CONTROLS.keys() for methods in arms.pruned]]
    cells, ranks = {arm: set(zip(rows.env_id, rows.seed)) for arm, rows in runs.groupby("arm")}, {}
    for (arm, own), (name, control) in itertools.product(arms.iterrows(), controls.iterrows()):
        same_base = control.base == own.base if own.base else controls.base.nunique() == 1
        words = len(name.split())
        if same_base and (arm not in controls.index or words < len(arm.split())):
            apart = {"method", "critic_method"} if own.base else IN_EVERY_NAME  # an unpruned one has another sparsity
            unlike = len(differing([own.settings, control.settings]) - apart)
            unlike += (own.script != control.script) + (own.unpruned != control.unpruned)
            ranks.setdefault(arm, []).append((unlike, words, -len(cells[arm] & cells[name]), name))
    return {arm: min(found)[-1] for arm, found in ranks.items()}


def returns_table(runs: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """Of each arm in each environment: the final return, and how it compares with that of the arm in `chosen`."""
    rows, finals = [], finals_of(runs)
    for (env_id, arm), own in finals.items():
        other = finals.get((env_id, chosen.get(arm)), pd.Series(dtype=float))
        why = "none: it is the reference" if arm in chosen.values() else "none: no single control fits"
        why = f"none: no run here of {chosen[arm]}" if arm in chosen else why
        row = {"environment": env_id, "arm": arm, "n": len(own), "seeds": " ".join(map(str, own.index))}
        row |= with_interval("final return", t_interval(own.to_numpy()))
        row |= {"against": chosen[arm] if len(other) else why, "pairs": (own - other).count()}
        row |= with_interval("difference", t_interval((own - other).dropna().to_numpy()))
        rows.append(row | better(finals, arm, chosen.get(arm), [env_id]))
    return pd.DataFrame(rows) if chosen else pd.DataFrame(rows).loc[:, :"final return high"]


def aggregate_table(runs: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """Over several environments, for arms with runs in all: P(better) and, where each environment has as many seeds and
    so the same weight, IQM in % of dense. Empty without either."""
    env_ids, finals, rows = sorted(set(runs.env_id)), finals_of(runs), []
    arms = [arm for arm in arms_of(runs) if all((env_id, arm) in finals for env_id in env_ids)]
    dense = [arm for arm in arms if runs.dense[runs.arm == arm].all()]
    scale = [finals[env_id, arm].mean() for arm in dense for env_id in env_ids]
    for arm in arms if len(env_ids) > 1 else ():
        own = [finals[env_id, arm].to_numpy() for env_id in env_ids]
        row = {"arm": arm, "environments": len(env_ids), "n": sum(map(len, own))}
        if len(dense) == 1 and runs.final[runs.arm.isin(dense)].min() > 0 and len({*map(len, own)}) == 1:
            percent = [100 * sample / mean for sample, mean in zip(own, scale)]
            row |= with_interval("IQM, % of dense", bootstrapped(iqm, percent))
        other = chosen.get(arm) if chosen.get(arm) in arms else None
        rows.append(row | {"against": other or "none"} | better(finals, arm, other, env_ids))
    table = pd.DataFrame(rows, columns=max(rows, key=len, default=None))
    return table if len(table.filter(regex="^IQM|^P").dropna(how="all")) else pd.DataFrame()


def wins_table(runs: pd.DataFrame) -> pd.DataFrame:
    """P(better) of the arm of a row against that of a column, over the environments that both have; a star where these
    are fewer than those of other pairs. Empty for two arms, of which the first table has it."""
    finals, arms, both, cells = finals_of(runs), arms_of(runs), {}, {}
    for pair in itertools.permutations(arms, 2):
        both[pair] = [env_id for env_id in sorted(set(runs.env_id)) if {(env_id, arm) for arm in pair} <= finals.keys()]
    most = max(map(len, both.values()), default=0)
    for pair, env_ids in both.items():
        samples = [finals[env_id, arm].to_numpy() for arm in pair for env_id in env_ids]
        star = "*" if len(env_ids) < most else ""
        cells[pair] = f"{improvement(*samples, axis=-1):.2f}{star}" if env_ids else "no runs"
    columns = {str(i): [cells.get((arm, other), "itself") for arm in arms] for i, other in enumerate(arms, 1)}
    square = pd.DataFrame({"arm": [f"{i}. {arm}" for i, arm in enumerate(arms, 1)]} | columns)
    return square if len(arms) > 2 else square[:0]


def cost_table(runs: pd.DataFrame, cost: str) -> pd.DataFrame:
    """Return after the minutes or FLOPs of the environment's cheapest run, interpolated between evaluations."""
    rows, ends = [], runs.curve.map(lambda curve: curve[cost].iloc[-1])
    for (env_id, arm), curves in runs.groupby(["env_id", "arm"], sort=False).curve:
        end = ends[runs.env_id == env_id].min()
        row = {"environment": env_id, "arm": arm, "n": len(curves), f"compared after, {cost}": end}
        returns = np.array([np.interp(end, curve[cost], curve["return"]) for curve in curves])
        row |= with_interval("return then", t_interval(returns))
        rows.append(row | {f"a whole run, {cost}": ends[curves.index].mean()})
    return pd.DataFrame(rows)


def gains_of(runs: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    """Of each run that revived: `gain`, its final return minus that of the same seed in its reference arm (`chosen`),
    and `cut`, as `cut_by_pruning` gives it. Runs that differ from the reference arm in more than revival are left out.
    """
    rows, finals = [], finals_of(runs)
    cells = runs.drop_duplicates(["env_id", "arm"]).set_index(["env_id", "arm"])
    for run in runs[[bool(methods & sparse_utils.REVIVALS.keys()) for methods in runs.pruned]].itertuples():
        other = finals.get((run.env_id, chosen.get(run.arm)), pd.Series(dtype=float)).get(run.seed)
        control = cells.loc[(run.env_id, chosen[run.arm])] if other is not None else run
        apart = differing([run.settings, control.settings]) - {"method", "critic_method", "reserve"}
        alike = run.script == control.script and run.unpruned == control.unpruned and not apart
        if other is not None and not np.isnan(run.cut) and alike:
            own = {"env_id": run.env_id, "label": run.label, "base": f"{run.base} at {run.sparsity}"}
            rows.append(own | {"cut": run.cut, "gain": run.final - other})
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    """With aligned columns, for pages and the console; a value and the ends of its interval are one cell."""

    def cell(row: dict, name: str) -> str:
        value, low, high = row[name], row.get(f"{name} low", np.nan), row.get(f"{name} high", np.nan)
        if not isinstance(value, float):
            return str(value)
        digits = 2 if name.startswith("P(") or (name.endswith(tuple(COSTS)) and value < 100) else 1
        interval = "" if np.isnan(low) else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return "-" if np.isnan(value) else f"{value:.{digits}f}{interval}"

    names = [name for name in table.columns if not name.endswith((" low", " high"))]
    lines = [names, *([cell(row, name) for name in names] for row in table.to_dict("records"))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


# of each kind of table: its title, the suffix of its figure's file name (None: no figure), and the text below it
SECTIONS = {
    "returns": ("Final return", "curves", """Mean of the evaluations in the last tenth of training, then over n seeds,
with a 95% t interval; differences are paired by seed. P(better), the probability that a run of this arm beats one of
that under `against` (Agarwal et al. 2021), has no interval below five seeds, nor where it is 0 or 1: a bootstrap sees
only seeds that were run. Lines are means; in panels of up to six arms thin lines are seeds (from six seeds on: a
shade, their 95% t interval); light grey lines are other methods."""),
    "aggregate": ("Across environments", None, """For arms with runs in every environment: the mean of P(better); and,
where there is one dense arm, all its runs end above 0 and all environments have as many seeds, the interquartile mean
of the final return in % of dense, with a 95% stratified bootstrap interval, too narrow at few seeds and since the mean
of dense is fixed."""),
    "wins": ("Which arm beats which", None, """Probability that a run of the row's arm beats one of the column's, ties
counting half, mean over the environments in which both have runs (a star: fewer than other pairs have)."""),
    "time": ("Return against time", "time", """Interpolated between two evaluations, after as many minutes as the
fastest run in the environment took (upright line), evaluations included, pauses not; in each environment among the
runs of the processor that made most of them (on a tie, the first by name)."""),
    "flops": ("Return against training FLOPs", "flops", """Interpolated between two evaluations, after as many
floating-point operations of training as the cheapest run in the environment took (upright line). Pruned weights are not
counted."""),
}  # fmt: skip


def write_page(
    group: pd.DataFrame, notes: list[str], args: Args, against: str | None, styles: dict, path: Path
) -> None:
    """The page of one algorithm and sparsity, its tables and figures; its caveats and main table on the console too."""
    chosen, later = references(group, against), []
    tables = {"returns": returns_table(group, chosen), "aggregate": aggregate_table(group, chosen)}
    tables |= {"wins": wins_table(group)}
    figures.draw_curves(group, styles, "step", f"{path}_curves.png")
    asked = {cost: end for cost, end in COSTS.items() if end in args.costs}
    for cost, end in asked.items() if group.arm.nunique() > 1 else ():
        missing = group.curve.map(lambda curve, cost=cost: curve[cost].isna().any() or curve[cost].iloc[-1] <= 0)
        reasons = {f"they have no {cost}": missing}
        if cost == "minutes":  # comparable on one processor only: in each environment, the one that made most runs
            usual = group.processor.groupby(group.env_id).transform(lambda made: made.mode().iloc[0])
            reasons["the compared runs are of another processor"] = group.processor != usual
        for why, those in reasons.items():
            which = [f"{len(own)} on {at} of {', '.join(arms_of(own))}" for at, own in group[those].groupby("env_id")]
            later += [f"Left out by {cost}, since {why}: {'; '.join(which)}."] if which else []
        kept = group[~np.any([*reasons.values()], 0)]
        for at, sparse in kept[kept.base != ""].groupby("env_id") if cost == "minutes" else ():
            held = [f"{which} of {', '.join(arms_of(own))}" for which, own in sparse.groupby("in_kernels")]
            where = f"Minutes on {at} are of runs with other networks in the kernels: {'; '.join(held)}."
            later += [where] if len(held) > 1 else []
        if len(kept):
            tables[end] = cost_table(kept, cost)
            figures.draw_curves(kept, styles, cost, f"{path}_{end}.png")
    if against and against not in set(group.arm):
        later.append(f"There is no run here of {against}, with which to compare.")
    caveats = caveats_of(group, notes) + later
    if len(caveats) > CAVEATS_ON_TOP:
        caveats.insert(CAVEATS_ON_TOP - 1, f"{len(caveats) - CAVEATS_ON_TOP + 1} further caveats are at the end.")
    caveats = [f"- {sentence}" for sentence in caveats] or ["Nothing is missing or unequal."]
    page = [f"# {group.algo.iloc[0]} at sparsity {group.sparsity.max()}"]
    above, below = shared_by(group)
    page += filter(None, [above, cut_before_revival(group)])
    page += ["\n".join(caveats[:CAVEATS_ON_TOP])]
    for kind, table in tables.items():
        if len(table):
            if kind != "wins":
                table.to_csv(f"{path}_{kind}.csv", index=False)
            title, figure, text = SECTIONS[kind]
            page += [f"## {title}", markdown(table)]
            page += [f"![{title}]({path.name}_{figure}.png)", text] if figure else [text]
    page += ["## Further caveats", "\n".join(caveats[CAVEATS_ON_TOP:])] if caveats[CAVEATS_ON_TOP:] else []
    arms = ("arm", lambda arms: "; ".join(f"{arm} ({n})" for arm, n in arms.value_counts(sort=False).items()))
    makers = group.groupby(["code", "git_commit", "processor", "device", *PACKAGES])
    page += ["## Other shared flags", below] if below else []
    page += ["## Which code made the runs", markdown(makers.agg(runs=("arm", "size"), arms=arms).reset_index())]
    Path(f"{path}.md").write_text("\n\n".join(page) + "\n")
    print(page[0][2:], *caveats, "", markdown(tables["returns"].drop(columns="seeds")), "", sep="\n")


def read(folder: Path, args: Args) -> tuple[pd.DataFrame, list[str], str | None]:
    """The runs in a folder that the flags ask for, its notes, and the name of the arm with which to compare. Ends the
    program with one sentence if there are none, or if a flag names an arm that is not there."""
    path = folder / "NOTES.md"
    notes = [line.removeprefix("- ") for line in path.read_text().splitlines() if line] if path.exists() else []
    runs = read_runs(folder, notes, args.separate_code)
    arms = arms_of(runs)
    named = {}
    for text in {args.against, *args.arm} - {None}:  # first by whole words: the name of a script may contain a method
        named[text] = [arm for arm in arms if text == arm] or [arm for arm in arms if text in arm.split()]
        named[text] = named[text] or [arm for arm in arms if text in arm]
    unknown = [text for text in args.arm if not named[text]] + sorted({*args.env_id} - {*runs.env_id})
    if unknown:
        where = f"the arms are: {', '.join(arms)}; the environments: {', '.join(sorted({*runs.env_id}))}"
        fail(f"there is no finished run of {unknown[0]}; {where}")
    against = named.get(args.against, [None])
    if len(against) != 1:
        fail(f"--against {args.against} is not one arm; there are: {', '.join(against or arms)}")
    kept = {*against, *(arm for text in args.arm for arm in named[text])} if args.arm else {*arms}
    runs = runs[runs.arm.isin(kept) & runs.env_id.isin(args.env_id or runs.env_id)]
    return (runs, notes, against[0]) if len(runs) else fail(f"no such run; the arms are: {', '.join(arms)}")


def main(args: Args) -> None:
    for flag, folder in (("--publish", args.publish), ("--events", args.events)):
        if folder and folder.resolve() == args.folder.resolve():
            fail(f"{flag} needs another folder than that of the runs")
    folder = args.publish or args.folder
    if args.publish:  # all runs, also those that --arm and --env-id leave out of the comparison
        results.publish(read_runs(args.folder, left_out := [], args.separate_code).to_dict("records"), folder)
        print(*left_out, sep="\n")
    runs, notes, against = read(folder, args)
    if args.events:
        return results.write_events(runs, args.events)
    out = args.out or folder / "comparison"
    out.mkdir(parents=True, exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for algo, of_algo in runs.groupby("algo"):
        styles, sparse, gains = figures.styles_of(of_algo), of_algo[~of_algo.dense], []
        sparsities = sorted(set(sparse.sparsity)) or [0.0]
        if len(sparsities) > 1:
            figures.draw_sparsities(of_algo, styles, out / f"{algo}_sparsity.png")
        for sparsity in sparsities:
            own = of_algo.dense | (of_algo.sparsity == sparsity)
            # no environment whose sparse runs all have other sparsities
            elsewhere = set(sparse.env_id) - set(sparse.env_id[own])
            group = of_algo[own & ~of_algo.env_id.isin(elsewhere)].sort_values(["env_id", "base", "arm", "seed"])
            write_page(group, notes, args, against, styles, out / f"{algo}_s{sparsity}")
            gains.append(gains_of(group, references(group, None)))
        if sparse.base[sparse.base != ""].nunique() > 1 and len(gained := pd.concat(gains)):
            figures.draw_gains(gained, out / f"{algo}_gains.png")
    older = sorted(path.name for path, changed in before.items() if path.stat().st_mtime_ns == changed)
    print(f"wrote {out}" + (f", where older files are: {', '.join(older)}" if older else ""))


if __name__ == "__main__":
    refuse_repeated(sys.argv[1:])
    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
    except OSError as error:
        which = f"{error.filename or 'a file'} ({error.strerror or error})"
        fail(f"cannot read or write {which}; check the folder of the runs, --out, --publish and --events")
