"""The files of a run's folder: written atomically, and read with their checksums. What a checkpoint keeps of each part
of an agent and of its replay buffer, and how that is put back. The flags of a run that is resumed or evaluated."""

import contextlib
import io
import itertools
import json
import os
import pickle
import re
import zipfile
import zlib
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab import baselines, edits, environment
from lab.environment import GENERATORS
from lab.flags import fail
from lab.record import file_of, read_config, settle, unused
from lab.replay import ReplayBuffer

REPLAY_FILE_ROWS = 50_000  # the most transitions in one replay file; writing it copies them in memory
HOW_IT_RUNS = {"compute", "device", "torch_threads", "capture_video"}  # flags
# flags that may change when a run is resumed, and that its folder is therefore not named after
MAY_CHANGE = HOW_IT_RUNS | {"resume", "total_timesteps", "checkpoint_frequency"}
# parts of `state` that an agent begun by --load does not need, beside optimizers
OF_TRAINING = {"nets", "schedule", "mask_generator", "progress"}
ARRAY = "an array of NumPy"  # marks one in a file
SIMPLE = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)  # kept as they are


# FILES


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: if the process or the machine dies, either the old file or the new one is whole."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failing write does not name its file


def write_json(path: Path, content: dict) -> None:
    write_whole(path, f"{json.dumps(content, indent=2)}\n".encode())


def write_tensors(path: Path, content: object) -> None:
    file = io.BytesIO()  # torch hides what the system says of a file that it cannot write
    torch.save(content, file)
    write_whole(path, file.getvalue())


def read_tensors(path: Path) -> object:
    """What `write_tensors` has written, checked against the file's checksums, on the CPU. Runs no code from the file;
    ends the program with one sentence if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"there is no {path}; check the path")
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        what = "if it is damaged or not one of ours, use another, or delete it and start the run anew"
        fail(f"cannot read {path} ({error}); {what}")
    except pickle.UnpicklingError:
        fail(f"{path} holds more than tensors and numbers and is not read; use one that this project wrote")


# CHECKPOINTS


def is_of_the_policy(name: str, part: object) -> bool:
    """Whether a part of `state` belongs to the agent itself, rather than to its training."""
    return name not in OF_TRAINING and not isinstance(part, (*edits.OPTIMIZERS, *GENERATORS, ReplayBuffer))


def pack(part: object) -> object:
    """What a checkpoint keeps of a part of the agent, on the CPU, in types that torch.load takes as data. Ends the
    program with one sentence if there is none."""
    if hasattr(part, "state_dict"):
        part = part.state_dict()
    if isinstance(part, GENERATORS):
        part = environment.random_state(part)
    if isinstance(part, (np.ndarray, np.generic)) and part.dtype.kind in "biufc":  # numbers
        return {ARRAY: torch.from_numpy(np.array(part))}
    if isinstance(part, Tensor):
        return part.detach().cpu()
    if isinstance(part, dict):
        return {plain(name): pack(value) for name, value in part.items()}
    if type(part) in (list, tuple):
        return type(part)(map(pack, part))
    if type(part) is set:
        return set(map(plain, part))
    if type(part) not in SIMPLE:  # torch.load takes no class of one's own, such as an IntEnum
        fail(f"no checkpoint can keep a {type(part).__name__}; give it state_dict() and load_state_dict(), or a list")
    return part


def plain(key: object) -> object:
    """`pack` for a key or a member of a set: a number of NumPy becomes one of Python, to which it is equal."""
    if type(key) is tuple:
        return tuple(map(plain, key))
    return pack(key.item() if isinstance(key, np.generic) else key)


def unpacked(packed: object) -> object:
    """The content of a file, with NumPy's arrays as arrays again."""
    if isinstance(packed, dict):
        array = packed.get(ARRAY)
        return {name: unpacked(value) for name, value in packed.items()} if array is None else array.numpy()[()]
    return type(packed)(map(unpacked, packed)) if type(packed) in (list, tuple) else packed


def put_back(part: object, saved: object) -> object:
    """Put what a checkpoint holds of a part back, in place where it can be. Returns the part, or what replaces it."""
    if isinstance(part, torch.optim.Optimizer):
        groups = part.param_groups
        part.load_state_dict(saved)  # which makes new groups, though train may hold the old ones
        for group, new in zip(groups, part.param_groups, strict=True):
            group.update(new)
        part.param_groups = groups
    elif hasattr(part, "load_state_dict"):
        part.load_state_dict(saved)
    elif isinstance(part, GENERATORS):
        environment.set_random_state(part, saved)
    elif isinstance(part, (Tensor, np.ndarray)) and getattr(saved, "shape", None) != part.shape:
        if getattr(part, "requires_grad", False):  # an untrained tensor may have grown in training, a trained one not
            raise ValueError(f"a trained tensor has the shape {tuple(part.shape)}, but its saved value has another")
        return saved.to(part.device) if isinstance(part, Tensor) and isinstance(saved, Tensor) else saved
    elif isinstance(part, Tensor):
        part.data.copy_(saved)
    elif isinstance(part, np.ndarray):
        part[...] = saved
    elif isinstance(part, dict) and isinstance(saved, dict):
        dict.update(part, {name: put_back(part.get(name), value) for name, value in saved.items()})
    elif type(part) in (list, tuple) and type(saved) in (list, tuple):
        return type(saved)(put_back(*pair) for pair in itertools.zip_longest(part[: len(saved)], saved))
    else:
        held = [value for _, value in edits.walk([("", part)], set(), ())]
        if any(hasattr(value, "load_state_dict") or isinstance(value, GENERATORS) for value in held):
            raise ValueError(f"a {type(part).__name__} of parts with a state was saved as a {type(saved).__name__}")
        return saved
    return part


def put_all_back(state: dict, saved: dict) -> None:
    """Put all parts of `state` back, in place but for tensors inside dictionaries, which may be new ones. Raises
    KeyError, RuntimeError or ValueError if a part is not in `saved` or has another shape there."""
    for name, part in state.items():
        state[name] = put_back(part, saved[name])
        if isinstance(part, (Tensor, np.ndarray)) and state[name] is not part:
            raise ValueError(f"{name} has the shape {tuple(part.shape)}, but its saved value has another")


def replay_files(run_dir: Path) -> dict[Path, tuple[int, int]]:
    """The files replay/<start>-<stop>.pt with transitions start to stop, in order."""
    ranges = {path: tuple(map(int, path.stem.split("-"))) for path in run_dir.glob("replay/[0-9]*-[0-9]*.pt")}
    return dict(sorted(ranges.items(), key=lambda item: item[1]))


def write_replay(run_dir: Path, rb: ReplayBuffer) -> None:
    """Write the transitions that are new since the last checkpoint into files of their own."""
    rows, added = rb.rows, rb.added
    start = max(0, added - len(rows), *(stop for _, stop in replay_files(run_dir).values()))
    while start < added:
        (run_dir / "replay").mkdir(exist_ok=True)
        first = start % len(rows)
        stop = min(added, start + REPLAY_FILE_ROWS, start - first + len(rows))
        piece = rows[first : first + stop - start].cpu().clone()  # torch.save of a view would write the whole buffer
        write_tensors(run_dir / "replay" / f"{start}-{stop}.pt", piece)
        start = stop


def read_replay(run_dir: Path, rb: ReplayBuffer) -> None:
    """Read the first `rb.added` transitions of a run back, as far as the buffer holds them."""
    read = max(0, rb.added - len(rb.rows))
    for path, (start, stop) in replay_files(run_dir).items():
        if stop <= rb.added and start <= read < stop:
            rb.rows[torch.arange(start, stop) % len(rb.rows)] = read_tensors(path).to(rb.rows.device)
            read = stop
    if read < rb.added:
        fail(f"{run_dir}/replay lacks transitions {read} to {rb.added}; delete {run_dir} and start the run anew")


def load_state(path: Path, script: Path, of_any_script: bool = False) -> dict:
    """The dictionary in a final.pt or checkpoint.pt. Ends the program with one sentence if it is not of this script."""
    state = read_tensors(path)
    if not isinstance(state, dict) or not {"script", "format", "args", "global_step", "actor"} <= state.keys():
        fail(f"{path} is not a file of {script.name}; use one of its final.pt or checkpoint.pt")
    if state["script"] != script.stem and not of_any_script:
        fail(f"{path} is of {state['script']}.py; use that script instead of {script.name}")
    return unpacked(state)


def saved_args(arguments: type, args: object, script: Path) -> object:
    """The arguments of the run that --evaluate or --resume names, of the script's dataclass."""
    named = args.resume if args.evaluate is None else args.evaluate
    try:
        if args.evaluate is not None:
            saved = load_state(file_of(named), script)["args"] | {"evaluate": named}
        else:
            saved = read_config(Path(named))["args"] | {"resume": named}
        lists = {flag.name for flag in fields(arguments) if re.search("list|sequence", str(flag.type).lower())}
        tuples = {n: tuple(v) for n, v in saved.items() if isinstance(v, list) and n not in lists}  # JSON has lists
        return arguments(**saved | tuples)
    except (OSError, KeyError) as error:
        fail(f"cannot read the config.json of {named} ({error}); --resume takes a whole run folder")
    except TypeError as error:
        fail(f"the flags of {named} are not those of this {script.name} ({error}); use the one that began it")


def check_saved_args(given: object, saved: dict) -> None:
    """End the program with one sentence if `given`, the settled flags of a run with --evaluate or --resume, contradict
    `saved`, its flags as a file holds them. A flag that is newer than the run had its default there. Flags that make no
    difference to the run may differ, since their defaults may have changed."""
    may_change = unused(given)
    may_change |= MAY_CHANGE if given.evaluate is None else HOW_IT_RUNS | {"evaluate", "eval_episodes"}
    newer = {f.name: f.default for f in fields(given) if f.name not in saved and f.default is not MISSING}
    now, before = asdict(given), asdict(settle(replace(given, **newer))) | saved
    for name, value in now.items():
        if name not in may_change and json.dumps(value) != json.dumps(before[name]):  # JSON has no tuples
            flag = f"--{name.replace('_', '-')}"
            fail(f"{flag} {value} contradicts the run, which has {before[name]}; leave it out or start a new run")
    if given.total_timesteps < saved["total_timesteps"]:
        fail(f"--total-timesteps may grow but not shrink; the run has {saved['total_timesteps']}")
    if given.total_timesteps > saved["total_timesteps"] and isinstance(given, baselines.Flags):
        baselines.check_longer(given)
