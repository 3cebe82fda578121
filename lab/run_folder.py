"""What a run leaves behind: config.json, event files, checkpoints, final.pt; how it is resumed and evaluated."""

import contextlib
import errno
import functools
import json
import math
import os
import pickle
import platform
import random
import re
import shlex
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NoReturn

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
from gymnasium.wrappers import RecordVideo
from PIL import Image, ImageDraw, ImageFont
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import sparse_utils
from lab import topology
from lab.checks import check_args, complete_args, make_env
from lab.record import NOT_OF_THE_RESULT, WITHOUT, code_hash, fail, identity, read_config
from sparse_utils import Masks

CHECKPOINT_FORMAT = 3  # raised whenever a checkpoint of before can no longer be resumed
REPLAY_FILE_ROWS = 50_000  # transitions in one file of the replay buffer; that much is copied in memory
# flags that may change when a run is resumed
MAY_CHANGE = {
    "resume",
    "total_timesteps",
    "compute",
    "device",
    "torch_threads",
    "checkpoint_frequency",
    "capture_video",
}


# WHAT MADE A RUN


def git_commit(folder: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    modules = {module.__name__: str(module.__version__) for module in (torch, gym, mujoco, np)}
    return {"python": platform.python_version(), **modules}


def segment(script: Path, args, from_step: int, in_kernels: list[str], times: dict[str, tuple[float, float]]) -> dict:
    """What made this part of a run; see `read_config`."""
    return {
        "from_step": from_step,
        "code": code_hash(script, args.env_id),
        "git_commit": git_commit(script.resolve().parent),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
        "in_kernels": in_kernels,
        "milliseconds": times,
        "versions": versions(),
    }


# FILES


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The file is there as a whole or not at all, whenever the process or the machine dies. Ends the program with one
    sentence if it cannot be written."""
    part = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            part.unlink()
        why = error.__context__ or error  # torch hides the system's own words
        resumable = (path.parent / "checkpoint.pt").exists() or path.parent.name == "replay"
        how = (
            "the last checkpoint is whole: make room, then go on with --resume"
            if resumable
            else "make room, start anew"
        )
        fail(f"cannot write {path} ({why}); {how}", code=1)


@contextlib.contextmanager
def full_disk_in_a_sentence() -> Iterator[None]:
    """End the program with one sentence if TensorBoard's writer finds the disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        fail(f"{error}; the last checkpoint is whole: make room, then go on with --resume", code=1)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()))


def load_checked(path: Path, device: torch.device | str = "cpu") -> object:
    """What torch.save has written, checked against the file's checksums. Runs no code from the file; ends the program
    with one sentence if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        fail(f"there is no {path}; check the path")
    except (OSError, EOFError, RuntimeError, ValueError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        fail(f"cannot read {path} ({error}); it is damaged or not one of ours, so use another or start the run anew")
    except pickle.UnpicklingError:
        fail(f"{path} holds more than tensors and numbers and is not read; use one that this project wrote")


# THE FOLDER OF A RUN


def make_run_dir(script: Path, args, in_kernels: list[str], times: dict[str, tuple[float, float]]) -> Path:
    """A new folder <runs_dir>/<env_id>__<exp_name>__<method>__<base>__s<sparsity>__<seed>__<unix time>/, config.json in
    it. Method and sparsity are <actor's>+<critics'> where these differ; the base is <criterion>-<distribution>, left
    out where nothing is pruned; d<density at the start>, with -<step of the final pruning>, w<active width>,
    init-<init>, n<n step>, recent<recent fraction> and cycles<lr cycles> stand before the seed where they are not the
    defaults.
    """
    given = SimpleNamespace(**WITHOUT | asdict(args))
    methods, sparsities, inits = (
        list(dict.fromkeys([getattr(given, f"actor_{flag}"), getattr(given, f"critic_{flag}")]))
        for flag in ("method", "sparsity", "init")
    )
    parts = [args.env_id, args.exp_name, "+".join(methods)]
    if set(methods) - sparse_utils.UNPRUNED.keys():
        parts.append(f"{args.criterion}-{args.distribution}")  # TensorBoard breaks long names at a hyphen
    parts.append("s" + "+".join(map(str, sparsities)))
    if given.density_start is not None and set(methods) - sparse_utils.UNPRUNED.keys():
        parts.append(f"d{given.density_start}")
        parts[-1] += "" if given.final_prune_at is None else f"-{given.final_prune_at}"
    if given.active_width is not None:
        parts.append(f"w{given.active_width}")
    if inits != [getattr(type(args), "init", "dense")]:
        parts.append("init-" + "+".join(inits))
    if given.n_step != 1:
        parts.append(f"n{given.n_step}")
    if given.recent_fraction:
        parts.append(f"recent{given.recent_fraction}")
    if given.lr_cycles is not None:
        parts.append(f"cycles{given.lr_cycles}")
    unix_time = int(time.time())
    while True:
        name = "__".join([*parts, str(args.seed), str(unix_time)])
        run_dir = Path(args.runs_dir) / re.sub("[/:]", "-", name)
        try:
            run_dir.mkdir(parents=True)
            break
        except FileExistsError:
            unix_time += 1  # its twin started in the same second
        except OSError as error:
            fail(f"cannot make the run folder ({error}); choose another --runs-dir")
    write_config(run_dir, script, args, [segment(script, args, 0, in_kernels, times)])
    return run_dir


def write_config(run_dir: Path, script: Path, args, segments: list[dict]) -> None:
    write_json(run_dir / "config.json", {"script": script.stem, "args": asdict(args), "segments": segments})


def claim(run_dir: Path) -> None:
    """Keep every other process out of a run folder for as long as this one lives; end the program with one sentence if
    another one has it. Where the system or the file system has no such locks, nothing is kept out."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        import fcntl  # Windows has none

        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process is running {run_dir}; let it end or stop it first")
    except (ImportError, OSError):
        os.close(lock)


# LOGGING


def hyperparameters(first: dict, rest: dict, metrics: list[str]) -> list[Summary]:
    """What TensorBoard's HParams tab reads. It opens with the first five by name of what is said to differ, so `first`,
    five of them, is said to. None is an empty cell. A column of numbers and strings could not be sorted."""
    start, infos = SessionStartInfo(), []
    for name, value in (rest | first).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None:
            setattr(start.hparams[name], "number_value" if number else "string_value", value if number else str(value))
        kind = api_pb2.DataType.Value("DATA_TYPE_FLOAT64" if number else "DATA_TYPE_STRING")
        infos.append(api_pb2.HParamInfo(name=name, type=kind, differs=name in first))
    infos_of_metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=metric)) for metric in metrics]
    end = SessionEndInfo(status=api_pb2.Status.Value("STATUS_SUCCESS"))
    contents = {
        metadata.EXPERIMENT_TAG: HParamsPluginData(
            experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=infos_of_metrics)
        ),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=start),
        metadata.SESSION_END_INFO_TAG: HParamsPluginData(session_end_info=end),
    }
    described = {tag: metadata.create_summary_metadata(content) for tag, content in contents.items()}
    return [Summary(value=[Summary.Value(tag=tag, metadata=content)]) for tag, content in described.items()]


def log_args(writer: SummaryWriter, args) -> None:
    """All arguments as a table and, to filter and compare runs by them, those that act on the result through
    TensorBoard's HParams plugin, the ones that the run's methods ignore left empty."""
    given = asdict(args)
    rows = "\n".join(f"|{key}|{value}|" for key, value in given.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    settings = {name: None for name in given if name not in NOT_OF_THE_RESULT} | identity(given)
    for name, value in settings.items():  # a flag whose default is no number may be a word in another run
        if value is not None and not isinstance(getattr(type(args), name, None), (int, float)):
            settings[name] = str(value)
    first = {
        "base": "+".join(filter(None, (settings["criterion"], settings["distribution"]))),
        "env_id": args.env_id,
        "method": "+".join(dict.fromkeys([args.actor_method, args.critic_method])),
        "seed": args.seed,
        "sparsity": max(args.actor_sparsity, args.critic_sparsity),
    }
    metrics = ["eval/final_return", "eval/episodic_return", "charts/SPS"]
    for summary in hyperparameters(first, settings, metrics):
        writer.file_writer.add_summary(summary)


def stop_unless_finite(writer: SummaryWriter, global_step: int, quantities: dict[str, float]) -> None:
    """End the program with one sentence, the log closed, if one of these is NaN or infinite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            writer.close()
            fail(f"{name} is {value} at step {global_step}: training diverged; the log is in {writer.log_dir}", code=1)


def log_scalars(writer: SummaryWriter, global_step: int, scalars: dict[str, Tensor | float]) -> None:
    """Log numbers, or tensors of one element; ends the program with one sentence if one is NaN or infinite."""
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in scalars.items()}
    stop_unless_finite(writer, global_step, values)
    for name, value in values.items():
        writer.add_scalar(name, value, global_step)


def log_final_return(writer: SummaryWriter, returns: dict[int, float], total_timesteps: int) -> float:
    """As compare.py takes it: the mean of the evaluations, given by their steps, in the last tenth of training."""
    final_return = np.mean([value for step, value in returns.items() if step > 0.9 * total_timesteps])
    writer.add_scalar("eval/final_return", final_return, total_timesteps)
    return final_return


def log_topology(
    writer: SummaryWriter,
    run_dir: Path,
    global_step: int,
    budgets: dict[str, tuple[int, int]],
    widths: dict[str, int],
    static_masks: dict[str, Masks],
    masks: dict[str, Masks],
    observation_size: int,
) -> None:
    """What pruning and revival did to each network: topology.json, a table and warnings on the console and in
    TensorBoard; there too one image per layer, and sparsities and densities, counted from the masks."""
    report = {name: topology.topology_report(static_masks[name], masks[name], *budgets[name], widths[name])
              for name in masks}  # fmt: skip
    write_json(run_dir / "topology.json", report)
    table = topology.topology_table(report)
    tqdm.write(f"Topology at step {global_step}:\n{table}")
    writer.add_text("topology/revival", table, global_step)
    warnings = [
        warning
        for name in masks
        for warning in topology.topology_warnings(name, static_masks[name], masks[name], observation_size)
    ]
    if warnings:
        tqdm.write("\n".join(f"warning: {warning}" for warning in warnings))
        writer.add_text("topology/warnings", "\n\n".join(warnings), global_step)
    for name, network_masks in masks.items():
        for layer, mask in network_masks.items():
            image = topology.mask_image(static_masks[name][layer], mask, report[name]["layers"][layer]["part"])
            image = np.concatenate([image, mask_legend(image)])
            writer.add_image(f"topology/{name}.{layer}", image, global_step, dataformats="HWC")
            writer.add_scalar(f"sparsity/density_{name}.{layer}", float(mask.sum()) / mask.numel(), global_step)
        active = sum(int(mask.sum()) for mask in network_masks.values())
        size = sum(mask.numel() for mask in network_masks.values())
        writer.add_scalar(f"sparsity/{name}", 1 - active / size, global_step)


def mask_legend(image: np.ndarray) -> np.ndarray:
    """What the halves of a mask's image and the colours in it mean, as uint8 of shape (height, width of the image, 3)
    with letters that TensorBoard's cards, which scale images to their own width, show at the size of their text."""
    colours = [entry for entry in topology.MASK_COLOURS if (image == entry[0]).all(-1).any()]
    entries = [("white", "after static pruning"), ("white", "after revival"), *colours]
    width, size = image.shape[1], image.shape[1] // 28
    row = size * 3 // 2
    legend = Image.new("RGB", (width, row * math.ceil(len(entries) / 2)), "white")
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(size)
    for i, (colour, text) in enumerate(entries):
        x, y = i % 2 * (width // 2 + 4), i // 2 * row + row // 2
        draw.rectangle((x, y - size // 3, x + size * 2 // 3, y + size // 3), colour)
        draw.text((x + size, y), text, "black", font, "lm")
    return np.asarray(legend)


def log_rewiring(
    writer: SummaryWriter,
    run_dir: Path,
    global_step: int,
    first_masks: dict[str, Masks],
    previous: dict[str, Masks],
    masks: dict[str, Masks],
) -> None:
    """What the rewiring of the networks in `previous`, their masks before it, has done, into topology.json; and to
    TensorBoard, as fractions of the active connections, how many it replaced and how many of the first ones are gone.
    """
    report = json.loads((run_dir / "topology.json").read_text())
    for name in previous:
        layers = report[name]["layers"]
        for layer, mask in masks[name].items():
            part = mask[tuple(map(slice, layers[layer]["part"]))]
            layers[layer]["last_rewiring"] = {
                "step": global_step,
                "replaced": int((mask & ~previous[name][layer]).sum()),
                "active": int(mask.sum()),
                "blind_inputs": int((~part.any(0)).sum()),
                "dead_units": int((~part.any(1)).sum()),
            }
        replaced = sum(layer["last_rewiring"]["replaced"] for layer in layers.values())
        lost = sum(int((first_masks[name][layer] & ~mask).sum()) for layer, mask in masks[name].items())
        active, size = (sum(f(m) for m in masks[name].values()) for f in (lambda m: int(m.sum()), Tensor.numel))
        if active < sum(int(mask.sum()) for mask in previous[name].values()):
            writer.add_scalar(f"sparsity/{name}", 1 - active / size, global_step)
            for layer, mask in masks[name].items():
                writer.add_scalar(f"sparsity/density_{name}.{layer}", float(mask.sum()) / mask.numel(), global_step)
        writer.add_scalar(f"sparsity/{name}_rewired", replaced / active, global_step)
        writer.add_scalar(f"sparsity/{name}_distance", lost / report[name]["budget"], global_step)
    write_json(run_dir / "topology.json", report)


# CHECKPOINTS


def adam_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Adam's step and moments by parameter name, zero where pruned; empty before the first step."""
    if (mlp := getattr(module, "sparse", None)) is None:
        return {name: dict(optimizer.state.get(param, {})) for name, param in module.named_parameters()}
    state = optimizer.state.get(mlp.flat, {})  # the kernels hold all layers in one parameter
    moments = {key: mlp.expand(tensor) for key, tensor in state.items() if key != "step"}
    names = mlp.expand(mlp.flat.detach())
    return {
        name: {"step": state["step"]} | {key: m[name] for key, m in moments.items()} if state else {} for name in names
    }


def load_adam_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Tensor]]) -> None:
    """Take over what `adam_state` gave, before the network is compacted."""
    for name, param in module.named_parameters():
        if state[name]:
            optimizer.state[param] = {key: tensor.clone() for key, tensor in state[name].items()}


def final_state(script: Path, args, global_step: int, modules: dict[str, nn.Module], masks: dict[str, Masks]) -> dict:
    """What final.pt holds: state dictionaries and masks, dense, on the CPU, and what they are of."""
    state = {name: {key: t.cpu() for key, t in module.state_dict().items()} for name, module in modules.items()}
    state["masks"] = {name: {layer: mask.cpu() for layer, mask in m.items()} for name, m in masks.items()}
    about = {"script": script.stem, "format": CHECKPOINT_FORMAT, "args": asdict(args), "global_step": global_step}
    return state | about


def without_dead_neurons(state: dict, networks: dict[str, nn.Module], widths: dict[str, int]) -> dict:
    """What final.pt holds, its networks and masks cut to their active widths: in a chain of Linear and ReLU the neurons
    outside have no connections, so the outputs stay the same. Other networks are left whole."""
    for name, masks in state["masks"].items():
        hidden = {mask.shape[0] for mask in list(masks.values())[:-1]}
        kinds = {type(child).__name__ for child in networks[name].children()}
        if not kinds <= {"Linear", "ReLU", "SparseMLP"} or len(hidden) != 1:
            continue
        part = {layer: mask.clone() for layer, mask in sparse_utils.active_part(masks, widths[name]).items()}
        state["masks"][name] = part
        for network in (state[key] for key in (name, f"{name}_target") if key in state):
            for layer, (n_out, n_in) in ((layer, mask.shape) for layer, mask in part.items()):
                network[f"{layer}.weight"] = network[f"{layer}.weight"][:n_out, :n_in].clone()
                if f"{layer}.bias" in network:
                    network[f"{layer}.bias"] = network[f"{layer}.bias"][:n_out].clone()
    return state


def save_final(run_dir: Path, state: dict, networks: dict[str, nn.Module], widths: dict[str, int]) -> None:
    """Write final.pt as a whole, with `final_state`'s networks cut to their active widths."""
    state = without_dead_neurons(state, networks, widths)
    write_whole(run_dir / "final.pt", functools.partial(torch.save, state))


def load_state(path: Path, script: Path, device: torch.device | str = "cpu") -> dict:
    """The dictionary in a final.pt or checkpoint.pt, checked as above, and to be one of this script."""
    state = load_checked(path, device)
    if not isinstance(state, dict) or not {"script", "format", "args", "global_step", "actor"} <= state.keys():
        fail(f"{path} is not a file of {script.name}; use one of its final.pt or checkpoint.pt")
    if state["script"] != script.stem:
        fail(f"{path} is of {state['script']}.py; use that script instead of {script.name}")
    return state


def load_checkpoint(run_dir: str, script: Path, device: torch.device | str = "cpu") -> dict:
    """The checkpoint of a run folder, checked."""
    if Path(run_dir).is_file():
        fail(f"--resume takes the run folder, not a file; try --resume {shlex.quote(str(Path(run_dir).parent))}")
    path = Path(run_dir) / "checkpoint.pt"
    checkpoint = load_state(path, script, device)
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        which = f"format {checkpoint['format']} and this version resumes {CHECKPOINT_FORMAT}"
        fail(f"{path} has {which}; use the version that wrote it")
    if missing := {"adam", "rates", "progress", "random", "added", "log_sizes"} - checkpoint.keys():
        fail(f"{path} lacks {', '.join(sorted(missing))} and is no checkpoint; use another or start the run anew")
    if not (Path(run_dir) / "config.json").exists():
        fail(f"{run_dir} has a checkpoint and no config.json; --resume takes a whole run folder")
    return checkpoint


def load_policy(path: str, script: Path) -> tuple[Path, dict]:
    """What a .pt file holds, or the final.pt or else the checkpoint.pt of a run folder, and which file that is."""
    file = Path(path)
    if file.is_dir():
        if (file / "config.json").exists() and read_config(file)["published"]:
            fail(f"{path} is a published run, which holds no weights; train it anew with the flags in its config.json")
        file = file / ("final.pt" if (file / "final.pt").exists() else "checkpoint.pt")
    return file, load_state(file, script)


def load_networks(modules: dict[str, nn.Module], state: dict) -> None:
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except (KeyError, RuntimeError) as error:
        why = " ".join(str(error).split())
        fail(f"the saved networks are not those of this script ({why}); use the one that saved them")


def resumed_args(arguments: type, run_dir: str, script: Path):
    """The arguments of the run in this folder, of the script's dataclass."""
    saved = load_checkpoint(run_dir, script)["args"]
    try:
        return arguments(**saved | {"resume": run_dir})
    except TypeError as error:
        fail(f"the flags of {run_dir} are not those of this {script.name} ({error}); use the one that began it")


def check_resumed_args(given, saved) -> None:
    """End the program with one sentence if the arguments `given` with --resume, in which what the user left out is as
    `saved`, contradict the run."""
    for name, value in asdict(given).items():
        before = getattr(saved, name)
        if name not in MAY_CHANGE and value != before:
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {value} contradicts the run, which has {before}; leave it out or start a new run")
    if given.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps may grow but not shrink; the run has {saved.total_timesteps}")
    if getattr(saved, "lr_cycles", None) is not None and given.total_timesteps != saved.total_timesteps:
        fail("--lr-cycles splits --total-timesteps into cycles; start a new run to train longer")
    rewired = {saved.actor_method, saved.critic_method} & sparse_utils.GROWTHS.keys()
    if rewired and given.total_timesteps != saved.total_timesteps:
        fail(f"--method {min(rewired)} rewires by a schedule over --total-timesteps; start a new run to train longer")


def random_states(mask_generator: torch.Generator, action_space: gym.Space) -> dict:
    """The state of every random generator but the environment's, in types that torch.load takes as data."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
        "masks": mask_generator.get_state(),
        "actions": action_space.np_random.bit_generator.state,
    }


def set_random_states(states: dict, mask_generator: torch.Generator, action_space: gym.Space) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    mask_generator.set_state(states["masks"].cpu())
    action_space.np_random.bit_generator.state = states["actions"]


def replay_episode(env: gym.Env, obs: np.ndarray, progress) -> tuple[np.ndarray, float, int]:
    """Bring an environment that has just been seeded and reset, which gave `obs`, back to where `progress` left it: the
    same reset, the same actions. Returns the observation there, and the episode's return and length so far."""
    if progress.episode_generator:  # none in the first episode
        env.unwrapped.np_random.bit_generator.state = progress.episode_generator
        obs, _ = env.reset()
    episodic_return = 0.0
    for action in progress.episode_actions:
        obs, reward, _, _, _ = env.step(np.array(action, dtype=env.action_space.dtype))
        episodic_return += float(reward)
    return obs, episodic_return, len(progress.episode_actions)


def replay_files(run_dir: Path) -> dict[Path, tuple[int, int]]:
    """The files replay/<start>-<stop>.pt with transitions start to stop, in order."""
    paths = [path for path in run_dir.glob("replay/*.pt") if re.fullmatch(r"\d+-\d+", path.stem)]
    ranges = {path: tuple(map(int, path.stem.split("-"))) for path in paths}
    return dict(sorted(ranges.items(), key=lambda item: item[1]))


def save_checkpoint(run_dir: Path, state: dict, rows: Tensor | None, added: int) -> None:
    """Write checkpoint.pt as a whole, with the sizes of the event files. Of the replay buffer, `rows` (transition i of
    `added` in row i % len(rows)), only what is new is written, in files of its own; none of it if `rows` is None."""
    if rows is not None:
        start = max(0, added - len(rows), *(stop for _, stop in replay_files(run_dir).values()))
        while start < added:
            first = start % len(rows)
            stop = min(added, start + REPLAY_FILE_ROWS, start - first + len(rows))
            piece = rows[first : first + stop - start].cpu().clone()  # a view would be saved with all of its block
            write_whole(run_dir / "replay" / f"{start}-{stop}.pt", functools.partial(torch.save, piece))
            start = stop
    logs = list(run_dir.glob("*tfevents*"))
    for path in logs:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    state = state | {"log_sizes": {path.name: path.stat().st_size for path in logs}, "added": added}
    write_whole(run_dir / "checkpoint.pt", functools.partial(torch.save, state))
    for path, (_, stop) in replay_files(run_dir).items():
        if rows is None or stop <= added - len(rows):
            path.unlink()


def check_parts(modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Raises ValueError if an optimizer trains what no checkpoint would hold."""
    for optimizer in optimizers.values():
        names = [name for name, other in optimizers.items() if other is optimizer]
        held = {id(param) for name in names for param in modules[name].parameters()}
        if any(id(param) not in held for group in optimizer.param_groups for param in group["params"]):
            raise ValueError(
                f"the optimizer of {', '.join(names)} trains a parameter of none of them; put its module into "
                "`modules` and `optimizers`, or a resumed run would lose it"
            )


def rates(optimizer: torch.optim.Optimizer) -> list[dict]:
    """What a schedule may have changed: all values of the optimizer's groups but the parameters."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def training_state(
    modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], progress: object
) -> dict:
    """What `restore` puts back, beside the modules themselves."""
    return {
        "adam": {name: adam_state(modules[name], optimizer) for name, optimizer in optimizers.items()},
        "rates": {name: rates(optimizer) for name, optimizer in optimizers.items()},
        "progress": vars(progress),
    }


def restore(
    checkpoint: dict, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer], progress: object
) -> None:
    """Put back, in place, what a checkpoint holds of the modules, of Adam's moments for those that an optimizer trains,
    and of the attributes of `progress`. Ends the program with one sentence if these are not the ones saved."""
    load_networks(modules, checkpoint)
    for kind, now in (("adam", optimizers), ("progress", vars(progress))):
        if other := sorted(checkpoint[kind].keys() ^ now.keys()):
            fail(f"the checkpoint and this script differ in {', '.join(other)}; use the script that saved it")
    for name, optimizer in optimizers.items():
        load_adam_state(modules[name], optimizer, checkpoint["adam"][name])
        for group, saved in zip(optimizer.param_groups, checkpoint["rates"][name], strict=True):
            group.update(saved)
    vars(progress).update(checkpoint["progress"])


def segments_until(run_dir: Path, step: int) -> list[dict]:
    """The parts of a run that are in its checkpoint of this step."""
    return [part for part in read_config(run_dir)["segments"] if part["from_step"] < step or part["from_step"] == 0]


def kept_in_kernels(args, checkpoint: dict | None) -> list[str] | None:
    """The networks that a resumed run had in the kernels; None for a new run, another --compute, or if no one knows."""
    if checkpoint is None or args.compute != checkpoint["args"]["compute"]:
        return None
    return segments_until(Path(args.resume), checkpoint["global_step"])[-1].get("in_kernels")


def rewind(
    run_dir: Path,
    script: Path,
    args,
    in_kernels: list[str],
    times: dict[str, tuple[float, float]],
    checkpoint: dict,
    rows: Tensor,
    added: int,
) -> None:
    """Bring the run folder back to its checkpoint: cut off what was logged after it and read the replay buffer's
    `added` transitions into `rows`. config.json takes over `args`, since some may change, and gets one more segment.
    Warns if a log is lost or if other code, packages or another machine goes on. Nothing is changed before the replay
    buffer is known to be whole."""
    read = max(0, added - len(rows))
    for path, (start, stop) in replay_files(run_dir).items():
        if stop <= added and start <= read < stop:
            rows[torch.arange(start, stop) % len(rows)] = load_checked(path).to(rows.device)
            read = stop
    if read < added:
        fail(f"{run_dir}/replay lacks transitions {read} to {added}; start the run anew")
    logs = {path.name: path for path in run_dir.glob("*tfevents*")}
    for name, size in checkpoint["log_sizes"].items():
        if name not in logs or logs[name].stat().st_size < size:
            tqdm.write(f"warning: {name} has lost some of what was logged before the checkpoint")
        else:
            os.truncate(logs[name], size)
    for name in logs.keys() - checkpoint["log_sizes"].keys():
        logs[name].unlink()
    (run_dir / "final.pt").unlink(missing_ok=True)  # it comes anew at the end
    step = checkpoint["global_step"]
    segments = segments_until(run_dir, step)
    now = segment(script, args, step, in_kernels, times)
    for what, value in now.items():
        if what not in ("from_step", "git_commit", "milliseconds") and value != segments[-1].get(what):
            tqdm.write(f"warning: the run's {what} was {segments[-1].get(what)} and is {value} from step {step} on")
    write_config(run_dir, script, args, [*segments, now])
    for path, (_, stop) in replay_files(run_dir).items():
        if stop > added:
            path.unlink()


# ON THE CONSOLE


def progress_bar(start_step: int, total_timesteps: int) -> tqdm:
    """The steps from `start_step` to `total_timesteps`, both included, shown as a bar."""
    steps, wait = range(start_step, total_timesteps + 1), 0.5 if sys.stderr.isatty() else 60
    return tqdm(steps, "", total_timesteps, initial=start_step, unit=" steps", mininterval=wait, dynamic_ncols=True)


def stop(writer: SummaryWriter, script: Path, run_dir: Path, global_step: int, number: int) -> NoReturn:
    """End the program as a signal of this number asks, with the command that goes on."""
    writer.close()
    command = f"python {script.name} --resume {shlex.quote(str(run_dir))}"
    tqdm.write(f"stopped at step {global_step}; go on with: {command}")
    sys.exit(128 + number)


def evaluate_saved(args, script: Path, make_actor: Callable, act: Callable, evaluate: Callable) -> None:
    """--evaluate: print the returns of a saved policy, from the start states of its run's own evaluations. The script's
    `act` takes what its `make_actor` made, and an observation."""
    complete_args(args)
    check_args(args)
    torch.set_num_threads(args.torch_threads)
    path, saved = load_policy(args.evaluate, script)
    env = make_env(saved["args"]["env_id"], args.capture_video)
    if args.capture_video:
        env = RecordVideo(env, path.parent / "videos", lambda episode: False)
    hidden_size = next(len(tensor) for tensor in saved["actor"].values() if tensor.dim() == 2)  # of the first layer
    actor = make_actor(env.observation_space.shape[0], env.action_space, hidden_size)
    load_networks({"actor": actor}, saved)
    video = f"evaluate-{path.stem}" if args.capture_video else ""
    policy, seed = functools.partial(act, actor), saved["args"]["seed"] + 2**31
    returns, _ = evaluate(env, policy, args.eval_episodes, seed, torch.device("cpu"), video)
    env.close()
    print(f"{path}, step {saved['global_step']}: mean {np.mean(returns):.1f}, standard deviation {np.std(returns):.1f}")
    print(f"returns: {', '.join(f'{value:.1f}' for value in returns)}")
