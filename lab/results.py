"""The results of runs: read from event files or from a published grid, published, and written as event files.

A published grid is a folder with two files. `runs.json` has, by the name of a run's folder, its script, flags, segments
(see lab/record.py), start time and topology.json. `evaluations.csv` has, for each evaluation, mean return and length of
its episodes, seconds since the start, and floating-point operations of training so far.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lab import record
from lab.flags import fail

TAGS = {"return": "eval/episodic_return", "length": "eval/episodic_length", "flops": "flops/training"}
COLUMNS = ["step", "return", "length", "seconds", "flops"]


def results_in(folder: Path, unfinished: list[str]) -> Iterator[dict]:
    """The finished runs in a folder of runs or a published grid: of each what `configs` in lab/record.py gives, the
    `path` of its folder and its `evaluations`, a table with COLUMNS. The names of the others go into `unfinished`."""
    published = dict(iter(read_evaluations(folder).groupby("run"))) if (folder / "runs.json").exists() else {}
    for path, config in record.configs(folder):
        if config["published"]:
            if path.name not in published:
                fail(f"{folder} has no evaluations of {path.name}; bring runs.json and evaluations.csv from one grid")
            result = {"evaluations": published[path.name].drop(columns="run")}
        else:
            result = read_run(path) if (path / "final.pt").exists() else None
        if result and result["evaluations"].step.max() == config["args"]["total_timesteps"]:
            yield config | {"path": path} | result
        else:
            unfinished.append(path.name)


def read_evaluations(grid: Path) -> pd.DataFrame:
    file = grid / "evaluations.csv"
    if not file.exists():
        fail(f"{grid} has runs.json and no evaluations.csv; bring both from one grid")
    table = pd.read_csv(file, dtype=dict.fromkeys(TAGS, np.float32) | {"run": str})
    return table.astype(dict.fromkeys(TAGS, float))


def read_run(path: Path) -> dict:
    """The moment at which a run began, its topology.json, and its evaluations from its event files."""
    log = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    tags = {name: tag for name, tag in TAGS.items() if tag in log.Tags()["scalars"]}
    began = round(log.FirstEventTimestamp(), 3) if tags else 0.0
    rows = [(name, p.step, p.value, p.wall_time - began) for name, tag in tags.items() for p in log.Scalars(tag)]
    points = pd.DataFrame(rows, columns=["name", "step", "value", "seconds"]).round({"seconds": 3})
    again = points.groupby(["name", "step"]).cumcount()  # a step that was evaluated twice is in the table twice
    by_step = points.set_index(["name", "step", again])
    value, seconds = (by_step[name].unstack("name").reindex(columns=list(TAGS)) for name in ("value", "seconds"))
    table = value.assign(seconds=seconds["return"]).dropna(subset="return")
    table = table.rename_axis(["step", "again"]).reset_index()[COLUMNS]
    topology = record.read_json(report) if (report := path / "topology.json").exists() else {}
    return {"began": began, "topology": topology, "evaluations": table}


def publish(results: Iterable[dict], grid: Path) -> None:
    """Add runs to a published grid, or begin one. Of a run that is there already, the new result counts. Numbers are
    written as the shortest text that reads back as the same float32. Ends the program with one sentence if another run
    of the grid has the name of one, by which it is known."""
    file = grid / "runs.json"
    runs = record.read_json(file) if file.exists() else {}
    tables = [read_evaluations(grid)] if runs else []
    for result in results:
        name = result["path"].name
        if runs.get(name, result)["began"] != result["began"]:
            fail(f"{grid} has another run named {name}; rename the folder of one of them")
        tables = [table[table.run != name] for table in tables] + [result["evaluations"].assign(run=name)]
        runs[name] = {key: result[key] for key in ("script", "args", "segments", "began", "topology")}
        runs[name]["args"] = dict(sorted(record.identity(result["args"]).items()))
    grid.mkdir(parents=True, exist_ok=True)
    table = pd.concat(tables).sort_values(["run", "step"], kind="stable")
    for name in TAGS:
        table[name] = ["" if np.isnan(x) else str(np.float32(x)).removesuffix(".0") for x in table[name]]
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(runs.items())]
    # an interrupted writing leaves both files whole, and no run without evaluations
    table[["run", *COLUMNS]].to_csv(part := grid / "evaluations.csv.tmp", index=False)
    part.replace(grid / "evaluations.csv")
    (part := grid / "runs.json.tmp").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    part.replace(file)


def write_events(runs: pd.DataFrame, folder: Path) -> None:
    """Write an event file of each run: its evaluations, final return and, for TensorBoard's HParams tab, its flags. All
    files list the same columns for that tab, since TensorBoard reads the list from any one of them."""
    names = sorted({name for settings in runs.settings for name in settings})
    words = [name for name in names if any(isinstance(s.get(name), (str, bool)) for s in runs.settings)]
    metrics = ["eval/final_return", TAGS["return"], TAGS["flops"]]
    for run in runs.itertuples():
        first = {name: getattr(run, name) for name in ("base", "env_id", "seed", "sparsity")}
        first["method"] = record.both_methods(run.args)
        own = {n: str(value) if n in words and value is not None else value for n, value in run.settings.items()}
        settings = dict.fromkeys(names) | {"arm": run.arm, "script": run.script, "code": run.code} | own
        events = [Event(wall_time=run.began, file_version="brain.Event:2")]
        events += [Event(wall_time=run.began, summary=s) for s in record.hyperparameters(settings, first, metrics)]
        rows = run.evaluations.rename(columns=TAGS).to_dict("records")
        rows[-1]["eval/final_return"] = run.final
        for row in rows:
            time, step = run.began + row.pop("seconds"), row.pop("step")
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.items() if not np.isnan(value)]
            events.append(Event(wall_time=time, step=step, summary=Summary(value=values)))
        path = folder / run.path.name / f"events.out.tfevents.{int(run.began)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for event in events:
                RecordWriter(file).write(event.SerializeToString())
    print(f"wrote {folder}; watch it with: tensorboard --logdir {folder}")


def without_pauses(seconds: pd.Series, resumed_at: list[int], learns_from: int = 0) -> pd.Series:
    """Seconds at each evaluation, by step. An interval in which the run was resumed, or that is over five times as long
    as the median of the two intervals before and the two after it, is replaced by the median interval of the run. Since
    learning takes longer, an interval of learning is compared with intervals of learning alone, and replaced by their
    median. So is the time before the first evaluation, if it is over five times as long as the median for the first
    interval, as in a run that was resumed at step 0."""
    steps, intervals = seconds.index.to_numpy(), np.diff(seconds)
    usual, paused = np.zeros(len(intervals)), np.zeros(len(intervals), bool)
    for phase in (steps[1:] > 0, steps[1:] > learns_from):  # all intervals, then those of learning anew
        own = intervals[phase]
        usual[phase] = median = np.median(own) if len(own) else 0.0
        padded = np.pad(own, 2, constant_values=median)
        paused[phase] = own > 5 * np.median([padded[k : k + len(own)] for k in (0, 1, 3, 4)], axis=0)
    for step in resumed_at:  # a run resumed at a step of evaluation evaluates there anew
        paused |= (steps[:-1] < step) & (step <= steps[1:])
    first = usual[0] if len(usual) and seconds.iloc[0] > 5 * usual[0] else seconds.iloc[0]
    return pd.Series(first + np.cumsum([0, *np.where(paused, usual, intervals)]), steps)


def curve_of(result: dict) -> pd.DataFrame:
    """return, minutes and 1e12 FLOPs at each evaluation, by step; the last evaluation of a step counts."""
    table = result["evaluations"].drop_duplicates("step", keep="last").set_index("step").sort_index()
    resumed_at = [segment["from_step"] for segment in result["segments"][1:]]
    minutes = without_pauses(table.seconds, resumed_at, result["args"].get("learning_starts", 0)) / 60
    return pd.DataFrame({"return": table["return"], "minutes": minutes, "1e12 FLOPs": table.flops / 1e12})
