"""The log of a run: its scalars and masks, read from event files or a published copy; the copy; event files of one."""

import io
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from lab.record import read_config
from lab.run_folder import hyperparameters
from lab.topology import MASK_COLOURS

PUBLISHED_TAGS = ("eval/", "charts/episodic_return", "charts/SPS", "sparsity/", "flops/")


def read_events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 0}).Reload()


def read_scalars(run: Path) -> tuple[pd.DataFrame, float]:
    """Columns tag, step, seconds (since the run's first event) and value, by tag; and the time of that event."""
    table, columns = run / "scalars.csv", ["tag", "step", "seconds", "value"]
    if table.exists():
        points = pd.read_csv(table, converters={"seconds": float, "value": lambda text: float(np.float32(text))})
        return points[columns], json.loads((run / "config.json").read_text())["began"]
    log = read_events(run)
    tags = sorted(log.Tags()["scalars"])
    began = round(log.FirstEventTimestamp(), 3) if tags else 0.0
    rows = [(tag, p.step, round(p.wall_time - began, 3), p.value) for tag in tags for p in log.Scalars(tag)]
    return pd.DataFrame(rows, columns=columns), began


def without_pauses(seconds: pd.Series, resumed_at: list[int]) -> pd.Series:
    """Seconds since the first event at each evaluation, by step. An interval between two evaluations within which the
    run was resumed, or which is more than five times as long as the median of the two before and the two after it,
    counts as the run's median one."""
    steps, intervals = seconds.index.to_numpy(), np.diff(seconds)
    median = np.median(intervals) if len(intervals) else 0.0
    padded = np.pad(intervals, 2, constant_values=median)
    paused = intervals > 5 * np.median([padded[k : k + len(intervals)] for k in (0, 1, 3, 4)], axis=0)
    for step in resumed_at:  # a run resumed at a step of evaluation evaluates there anew
        paused |= (steps[:-1] < step) & (step <= steps[1:])
    return pd.Series(seconds.iloc[0] + np.cumsum([0, *np.where(paused, median, intervals)]), steps)


def curve_of(points: pd.DataFrame, resumed_at: list[int]) -> pd.DataFrame:
    """return, minutes and 1e12 FLOPs at each evaluation, by step; the last evaluation of a step counts."""
    evaluations, flops = (
        points[points.tag == tag].drop_duplicates("step", keep="last").set_index("step").sort_index()
        for tag in ("eval/episodic_return", "flops/training")
    )
    minutes = without_pauses(evaluations.seconds, resumed_at) / 60
    flops = flops.value.reindex(evaluations.index) / 1e12
    return pd.DataFrame({"return": evaluations.value, "minutes": minutes, "1e12 FLOPs": flops})


def save_figure(figure, path: Path) -> None:
    """As a PNG of 256 colours, which is a third as large."""
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    Image.open(png).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def has_masks(run: Path) -> bool:
    """Whether the run revived connections and its log has pictures of that."""
    report = json.loads((run / "topology.json").read_text())
    revived = any(layer["revived"] for network in report.values() for layer in network["layers"].values())
    return revived and bool(read_events(run).Tags()["images"])


def masks_of(run: Path) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Per network and layer the masks before and after revival, as indices into MASK_COLOURS, [out, in], read from the
    images in the log, which have a whole number of pixels per connection: before on the left, after on the right."""
    log, masks = read_events(run), {}
    for network, report in json.loads((run / "topology.json").read_text()).items():
        masks[network] = {}
        for layer, row in report["layers"].items():
            image = log.Images(f"topology/{network}.{layer}")[-1]
            pixels = (255 * plt.imread(io.BytesIO(image.encoded_image_string))[..., :3]).round().astype(int)
            kinds = np.full(pixels.shape[:2], 3)
            for kind, (colour, _) in enumerate(MASK_COLOURS[:3]):
                kinds[(pixels == colour).all(-1)] = kind
            down, across = (max(1, 256 // n) for n in row["shape"])
            height, width = row["shape"][0] * down, row["shape"][1] * across
            before, after = kinds[:height:down, :width:across], kinds[:height:down, -width::across]
            if tuple(np.isin(kind, (1, 2)).sum() for kind in (before, after)) != (row["static"], row["active"]):
                raise ValueError(
                    f"image topology/{network}.{layer} of {run.name} does not show what topology.json counts"
                )
            masks[network][layer] = before, after
    return masks


def draw_masks(network: str, layers: dict[str, tuple[np.ndarray, np.ndarray]], run: str, path: Path) -> None:
    """The masks of a network, and how many connections each of its neurons has."""
    size = (12, 1 + 2.6 * len(layers))
    figure, grid = plt.subplots(len(layers), 4, layout="constrained", figsize=size, squeeze=False)
    outside = ", blue: outside the active neurons" if any((kinds[0] == 3).any() for kinds in layers.values()) else ""
    figure.suptitle(f"{network} of {run}\ndark: pruned, grey: kept by static pruning, orange: revived{outside}")
    colours = ListedColormap([np.array(colour) / 255 for colour, _ in MASK_COLOURS])
    looks = {"before": ("#0072B2", 3.5), "after": ("#D55E00", 1.5)}
    for (layer, kinds), row in zip(layers.items(), grid):
        masks = [np.isin(kind, (1, 2)) for kind in kinds]
        for axes, kind, mask, when in zip(row, kinds, masks, looks):
            axes.imshow(kind, colours, vmin=0, vmax=3, aspect="auto", interpolation="nearest")
            title = f"{layer} {when}: {np.count_nonzero(mask)} of {mask.size}"
            axes.set(title=title, xlabel="input neuron", ylabel="output neuron")
        for axes, axis, side in zip(row[2:], (0, 1), ("input", "output")):
            for mask, (when, (colour, width)) in zip(masks, looks.items()):
                degrees = -np.sort(-mask.sum(axis))
                edges = np.arange(len(degrees) + 1)
                axes.stairs(degrees, edges, baseline=None, label=f"{when} revival", color=colour, linewidth=width)
            axes.set(title=f"{layer}: connections per {side}", xlabel=f"{side} neurons, by degree", ylim=(0, None))
        for axes in row:
            axes.spines[["top", "right"]].set_visible(False)
            axes.locator_params(integer=True, nbins=6)
    figure.legend(*grid[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


def worth_publishing(points: pd.DataFrame, eval_frequency: int) -> pd.DataFrame:
    """The scalars of PUBLISHED_TAGS: speed once per evaluation, sparsities where they change and at the end."""
    points = points[points.tag.str.startswith(PUBLISHED_TAGS)]
    speed, sparsity = points.tag == "charts/SPS", points.tag.str.startswith("sparsity/")
    turns = points.assign(step=points.step // eval_frequency)
    early = speed & turns.duplicated(["tag", "step"], keep="last")
    same = sparsity & points.tag.duplicated(keep="last") & (points.value == points.groupby("tag").value.shift())
    return points[~(early | same)]


def publish(run: Path, copy: Path) -> None:
    """A copy of a run as text; values are the shortest ones that read back as the same float32."""
    points, began = read_scalars(run)
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir(parents=True)
    shutil.copy(run / "topology.json", copy)
    config = read_config(run) | {"published": True, "began": began}
    config["args"] = json.loads((run / "config.json").read_text())["args"]  # without the defaults of younger flags
    config["args"]["runs_dir"] = Path(config["args"]["runs_dir"]).name  # no one else has the folders above
    (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    points = worth_publishing(points, config["args"]["eval_frequency"])
    values = [str(np.float32(value)).removesuffix(".0") for value in points.value]
    points.assign(value=values).to_csv(copy / "scalars.csv", index=False)


def write_events(run: Path, destination: Path, first: dict, rest: dict, final: float) -> None:
    """An event file with the run's scalars at their steps and times, its hyperparameters and its final return."""
    points, began = read_scalars(run)
    first = first | {"env_id": rest["env_id"]}  # the fifth of the columns with which the HParams tab opens
    events = [Event(wall_time=began, file_version="brain.Event:2")]
    events += [Event(wall_time=began, summary=part) for part in hyperparameters(first, rest, ["eval/final_return"])]
    points = points.sort_values("seconds", kind="stable").to_dict("records")
    for point in [*points, points[-1] | {"tag": "eval/final_return", "value": final}]:
        summary = Summary(value=[Summary.Value(tag=point["tag"], simple_value=point["value"])])
        events.append(Event(wall_time=began + point["seconds"], step=point["step"], summary=summary))
    destination.mkdir(parents=True, exist_ok=True)
    with (destination / f"events.out.tfevents.{int(began)}").open("wb") as file:
        for event in events:
            RecordWriter(file).write(event.SerializeToString())
