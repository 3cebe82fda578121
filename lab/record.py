"""Which run a folder holds, and which code made it: the sweep and the comparison go by this.

Flags are settled before a run begins, so two runs that do the same have equal flags: a run is known by its script, its
flags and its code.
"""

import ast
import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

import sparse_utils
from lab import baselines
from lab.flags import PROJECT, at_least_0, fail, fraction, positive, require, within_training

# flags that leave the result as it is
NOT_OF_THE_RESULT = {"runs_dir", "resume", "evaluate", "checkpoint_frequency", "capture_video"}
# a flag that is not given has the value of another
FOLLOWS = {"prune_at": "learning_starts", "critic_method": "method", "critic_sparsity": "sparsity"}
# files of lab/ that do not affect the result of training, even if a script imports them
NOT_OF_THE_CODE = {"lab/topology", "lab/sweep", "lab/compare", "lab/figures", "lab/results"}


# FLAGS


def settle(args: object) -> object:
    """A copy of flags in their final form: a flag that follows another one has its value, the sparsity of `dense` is 0,
    and a flag that makes no difference to this run has its default. Ends the program with one sentence where a value
    cannot work. `args` is the dataclass of a script, which may leave out flags of lab/baselines.py."""
    args = copy.copy(args)
    # the --load of a resumed run has its hash already, unless it is given anew; its file may have changed since
    if args.load is not None and args.evaluate is None and not (args.resume and re.search("@[0-9a-f]{12}$", args.load)):
        args.load = with_hash(args.load)
    for name, other in FOLLOWS.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(args, other))
    if getattr(args, "active_width", None) == getattr(args, "hidden_size", "left out"):
        args.active_width = None  # all neurons
    if getattr(args, "drop_criterion", "left out") is None:
        args.drop_criterion = baselines.usual_drop({args.method, args.critic_method})
    for prefix in ("", "critic_"):
        if getattr(args, f"{prefix}method") == "dense":
            setattr(args, f"{prefix}sparsity", 0.0)
    check(args)
    if isinstance(args, baselines.Flags):
        baselines.check(args)
    idle = unused(args)
    for flag in fields(args):
        if flag.name in idle:
            setattr(args, flag.name, flag.default)
    args._settled = asdict(args)  # by which Run(...) sees whether train has changed one
    return args


def file_of(name: str) -> Path:
    """The .pt file that --load or --evaluate names: in a run folder final.pt, or else checkpoint.pt. A hash behind the
    path, as `with_hash` gives it, is left out."""
    path = Path(re.sub("@[0-9a-f]{12}$", "", name))
    if path.is_dir():
        path /= "final.pt" if (path / "final.pt").exists() else "checkpoint.pt"
    return path


def with_hash(name: str) -> str:
    """<path of the .pt file>@<12 hexadecimal digits of the hash of its content>, by which runs that begin from it are
    known. Ends the program with one sentence if there is no such file, or if `name` has another hash."""
    path = file_of(name)
    try:
        full = f"{path}@{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    except OSError as error:
        fail(f"cannot read --load {path} ({error.strerror}); it takes a run folder or a .pt file in one")
    if re.search("@[0-9a-f]{12}$", name) and not full.endswith(name[-13:]):
        fail(f"--load {name} is now {full}; the file was written anew, so leave any hash out to begin from this one")
    return full


def unused(args: object) -> set[str]:
    """The flags that make no difference to this run, among them flags of lab/baselines.py if the script has them."""
    found, methods = set(), {args.method, args.critic_method}
    if not methods & sparse_utils.REVIVALS.keys():
        found |= {"reserve"}
    if not methods - sparse_utils.UNPRUNED.keys():
        found |= {"criterion", "distribution", "active_width"}
    if getattr(args, "autotune", False):
        found |= {"alpha"}
    return found | (baselines.unused(args) if hasattr(args, "rewire_every") else set())


def check(args: object) -> None:
    """End the program with one sentence if a value cannot work."""
    # a float can only be a default in the script; flags that follow another one come last, since that one is to blame
    for flag in sorted(fields(args), key=lambda flag: flag.name in FOLLOWS):
        whole = str(flag.type) in ("<class 'int'>", "int", "int | None")
        if whole and isinstance(value := getattr(args, flag.name), float):
            fail(f"{flag.name} must be a whole number, got {value}; write it without a point or an exponent")
    rules = positive(
        args, "total_timesteps", "hidden_size", "buffer_size", "batch_size", "policy_lr", "q_lr", "learning_rate",
        "policy_frequency", "target_network_frequency", "eval_frequency", "eval_episodes", "torch_threads",
        "checkpoint_frequency",
    )  # fmt: skip
    rules |= at_least_0(args, "alpha", "policy_noise", "noise_clip", "exploration_noise")
    rules |= fraction(args, "sparsity", "critic_sparsity", "reserve")
    rules["gamma"] = (0 <= args.gamma <= 1, "in [0, 1]")
    rules["tau"] = (0 < getattr(args, "tau", 1) <= 1, "above 0 and at most 1")
    rules["seed"] = (0 <= args.seed < 2**31, "at least 0 and below 2**31")
    require(args, rules | within_training(args, "learning_starts", "prune_at"))
    if sparse_utils.CRITERIA[args.criterion].uses_loss and args.prune_at == 0:
        fail(f"--criterion {args.criterion} needs replay data and step 0 has none; set --prune-at above 0")
    if args.load is not None and getattr(args, "init", "dense") == "sparse":
        fail("--init sparse does not rescale the trained weights of --load; leave one of the two out")
    if args.load is not None and not getattr(args, "autotune", True):
        fail("--load brings an alpha that is learned further, so --no-autotune cannot be met; leave one of the two out")
    width, size = getattr(args, "active_width", None), getattr(args, "hidden_size", None)
    if isinstance(width, int) and isinstance(size, int) and not 1 <= width <= size:
        fail(f"--active-width must be from 1 to --hidden-size {size}, got {width}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda needs a CUDA device and a torch build for it; use --device cpu")


def identity(args: dict) -> dict:
    """The settled flags that make two runs the same one."""
    return {name: value for name, value in args.items() if name not in NOT_OF_THE_RESULT}


def usual(name: str, args: dict) -> object:
    """The value with which a flag is left out of the name of an arm: the value of the flag that it follows, or the
    default of a flag that scripts without baselines lack. For other flags it is MISSING, which equals no value."""
    plain = {flag.name: flag.default for flag in fields(baselines.Flags)} | {"active_width": None}
    return args.get(FOLLOWS[name]) if name in FOLLOWS else plain.get(name, MISSING)


def hyperparameters(settings: dict, first: dict, metrics: Sequence[str]) -> list[Summary]:
    """The summaries of one run for TensorBoard's HParams tab. The tab opens with the first five columns, by name, that
    are marked as differing between runs, so only the five columns of `first` are marked. None is an empty cell. A name
    in `settings` must be a number in all runs or a string in all runs, since a mixed column cannot be sorted."""
    values, infos = {}, []
    for name, value in (settings | first).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None:
            values[name] = value if number else str(value)
        kind = api_pb2.DataType.Value("DATA_TYPE_FLOAT64" if number else "DATA_TYPE_STRING")
        infos.append(api_pb2.HParamInfo(name=name, type=kind, differs=name in first))
    infos_of_metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=metric)) for metric in metrics]
    columns = HParamsPluginData(experiment=api_pb2.Experiment(hparam_infos=infos, metric_infos=infos_of_metrics))
    about = metadata.create_summary_metadata(columns)
    # torch's own first summary has neither `differs` nor empty columns
    return [Summary(value=[Summary.Value(tag=metadata.EXPERIMENT_TAG, metadata=about)]), *hparams(values, {})[1:]]


def both_methods(args: dict) -> str:
    """The method of a run as TensorBoard shows it: <actor's>+<critics'> where these differ."""
    return "+".join(dict.fromkeys([args["method"], args["critic_method"]]))


# CODE


def essence(path: Path) -> str:
    """What counts of a source file: all but comments, docstrings and layout."""
    if path.suffix != ".py":
        code = re.sub(r"//.*|/\*[\s\S]*?\*/", "", path.read_text(errors="replace"))
        return "\n".join(line.rstrip() for line in code.splitlines() if line.strip())
    tree = ast.parse(path.read_bytes())  # bytes, since a source may have a byte order mark or a coding line
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return structure(tree)


def structure(node: object) -> str:
    """A syntax tree as a text that is alike in every version of Python, as ast.dump and ast.unparse are not."""
    if isinstance(node, list):
        return f"[{','.join(map(structure, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = (f"{name}={structure(part)}" for name, part in ast.iter_fields(node) if part not in (None, []))
    return f"{type(node).__name__}({','.join(parts)})"


def modules_in(path: Path, folders: list[Path]) -> Iterator[tuple[str, list[Path]]]:
    """The modules that a source imports, or names as `<module>:<name>`, and the packages that they are in: paths
    without suffix, each with the folders in which it may be."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names, roots = [], folders
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            roots = [path.parents[node.level - 1]] if node.level else folders
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^([\w.]+):[\w/.-]+$", node.value)  # the entry point of an environment
        for parts in (name.strip(".").split(".") for name in names):
            yield from (("/".join(parts[:n]), roots) for n in range(1, len(parts) + 1))


def folders_of(script: Path) -> list[Path]:
    """The folders in which a run's own modules may be, in the order in which Python looks there: the script's, those in
    PYTHONPATH except folders of installed packages, and the project's."""
    names = os.environ.get("PYTHONPATH")
    others = [Path(name).resolve() for name in names.split(os.pathsep)] if names else []
    return [script.resolve().parent, *(path for path in others if not any(path.glob("*.dist-info"))), PROJECT]


def sources(script: Path, env_id: str = "") -> list[Path]:
    """The source files of a run: the script, the module of its environment (`<module>:<id>`), and all modules that they
    import, directly or not, from the folders that `folders_of` gives, with kernels.cpp. See NOT_OF_THE_CODE."""
    script, folders = script.resolve(), folders_of(script)
    found = {script: ""}  # the name under which each was imported, by which they are sorted
    parts = env_id.partition(":")[0].split(".") if ":" in env_id else []
    waiting = [("/".join(parts[:n]), folders) for n in range(1, len(parts) + 1)]
    waiting += modules_in(script, folders)
    for name, roots in waiting:  # which grows on the way
        if name in NOT_OF_THE_CODE:
            continue
        files = [root / f"{name}{end}" for root in roots for end in (".py", "/__init__.py")]
        file = next((file for file in files if file.is_file()), None)
        if file and file not in found:
            beside = file.parent.glob("*.cpp") if file.name == "__init__.py" else ()
            found |= {file: name} | {path: f"{name}/{path.name}" for path in beside}
            waiting += modules_in(file, folders)
    return sorted(found, key=found.get)


def code_hash(script: Path, env_id: str = "") -> str:
    """The hash of the code of a run (see `sources`), 12 hexadecimal digits. Comments, docstrings, installed packages
    and the files in NOT_OF_THE_CODE do not count."""
    return hashlib.sha256("\0".join(map(essence, sources(script, env_id))).encode()).hexdigest()[:12]


# RUNS


def configs(folder: Path) -> Iterator[tuple[Path, dict]]:
    """The path of every run in a folder, and its record: what lab/README.md says of config.json, and `published`. Runs
    older than the hash of the code have None as `code`, and segments of older runs lack some of the rest. A run is a
    folder with config.json or, if published, an entry of runs.json; a config.json of another kind is passed over."""
    published = folder / "runs.json"
    whole = read_json(published) if published.exists() else {}
    yield from ((folder / name, config | {"published": True}) for name, config in whole.items())
    for path in sorted(folder.glob("*/config.json")):
        try:
            config = read_config(path.parent)
        except FileNotFoundError:  # a run that can save nothing deletes its folder
            continue
        if {"script", "args", "segments"} <= config.keys():
            yield path.parent, config


def read_config(run_dir: Path) -> dict:
    """What config.json records of one run; see `configs`."""
    return read_json(run_dir / "config.json") | {"published": False}


def read_json(path: Path) -> dict:
    """The content of a file that is to be a JSON object. Ends the program with one sentence if it is none."""
    try:
        return {**json.loads(path.read_text())}
    except (TypeError, ValueError) as error:
        fail(f"cannot read {path} ({error}); mend the file or delete it")


def begun_before(config: dict, step: int) -> tuple[list[dict], dict]:
    """The segments of a run that made its checkpoint of this step, so those that began before it, and the last of them.
    Where none did, as at step 0, the last of all."""
    segments = [segment for segment in config["segments"] if segment["from_step"] < step]
    return segments, (segments or config["segments"])[-1]


def codes(config: dict) -> list[str | None]:
    """The hashes of the code that made a run, in the order of its segments, each once."""
    return list(dict.fromkeys(segment["code"] for segment in config["segments"]))
