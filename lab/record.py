"""Which run a folder holds, and which code made it: what `sweep.py` and `compare.py` go by."""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

import sparse_utils

# beside the script
CODE = ("sparse_utils.py", "lab/kernels/*.py", "lab/kernels/*.cpp", "lab/checks.py", "lab/run_folder.py")
# flags that leave the result as it is
NOT_OF_THE_RESULT = {"runs_dir", "resume", "evaluate", "checkpoint_frequency", "capture_video"}
MASK = {"criterion", "distribution", "density_start", "final_prune_at", "active_width"}
MASK |= {"init", "actor_init", "critic_init"}
REWIRING = {"rewire_every", "rewire_fraction", "rewire_stop", "drop_criterion", "regrow"}
WITHOUT = {  # what a copy of a script does that leaves such a flag out, and what older runs did
    "init": "dense",
    "actor_init": "dense",
    "critic_init": "dense",
    "active_width": None,
    "density_start": None,
    "final_prune_at": None,
    "rewire_every": 1000,
    "rewire_fraction": 0.5,
    "rewire_stop": 0.8,
    "drop_criterion": "magnitude",
    "regrow": True,
    "recent_fraction": 0.0,
    "recent_size": 20_000,
    "n_step": 1,
    "n_step_from": 0,
    "lr_cycles": None,
}
FOLLOWS = {  # a flag that is not set has the value of another
    "prune_at": "learning_starts",
    **{f"{network}_{flag}": flag for network in ("actor", "critic") for flag in ("method", "sparsity", "init")},
}


def fail(message: str, code: int = 2) -> NoReturn:
    tqdm.write(f"error: {message}", file=sys.stderr)  # not into a progress bar
    sys.exit(code)


def ignored(methods: set[str]) -> set[str]:
    """The flags that make no difference to networks of these methods; none, if one of them is not known here."""
    if methods - sparse_utils.METHODS.keys():
        return set()
    found = set() if methods & sparse_utils.REVIVALS.keys() else {"reserve"}
    found |= set() if methods & sparse_utils.GROWTHS.keys() else REWIRING
    found |= set() if methods - sparse_utils.UNPRUNED.keys() else MASK
    return found | ({"sparsity", "actor_sparsity", "critic_sparsity"} if methods == {"dense"} else set())


def methods_of(args: dict) -> dict[str, str]:
    """The method of the actor and that of the critics."""
    return {network: args.get(f"{network}_method") or args["method"] for network in ("actor", "critic")}


def canonical(args: dict) -> dict:
    """The same arguments for all runs that are spelled differently and do the same: what is for both networks, and acts
    on neither where both have their own, is what the actor has (if it is pruned, else the critics), and the higher
    sparsity."""
    args, methods = {**args}, methods_of(args)
    for name in args:
        args[name] = args.get(FOLLOWS.get(name)) if args[name] is None else args[name]
    for network, method in methods.items():
        if method == "dense":  # as the scripts record it
            args[f"{network}_sparsity"] = 0.0
        if method in sparse_utils.UNPRUNED and f"{network}_init" in args:
            args[f"{network}_init"] = "dense"
    leading = next((network for network, method in methods.items() if method not in sparse_utils.UNPRUNED), "actor")
    for flag in ("method", "init"):
        if args.keys() >= {f"actor_{flag}", f"critic_{flag}"}:
            args[flag] = args[f"{leading}_{flag}"]
    if args.keys() >= {"actor_sparsity", "critic_sparsity"}:
        args["sparsity"] = max(args["actor_sparsity"], args["critic_sparsity"])
    if args.get("active_width") is not None and args["active_width"] == args.get("hidden_size"):
        args["active_width"] = None
    if "drop_criterion" in args and args["drop_criterion"] is None:
        args["drop_criterion"] = sparse_utils.usual_drop({*methods.values()})
    return args


def identity(args: dict) -> dict:
    """All arguments that make two runs the same one: without what leaves the result as it is or its methods ignore."""
    args = canonical(args)
    methods = {*methods_of(args).values()}
    unused = ignored(methods) | NOT_OF_THE_RESULT
    unused |= {"n_step_from"} if args.get("n_step") == 1 else set()
    unused |= set() if args.get("recent_fraction") else {"recent_size"}
    return {name: value for name, value in args.items() if name not in unused}


def essence(path: Path) -> str:
    """The text of a source file without comments and docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        code = re.sub(r"//.*|/\*[\s\S]*?\*/", "", text)
        return "\n".join(line.rstrip() for line in code.splitlines() if line.strip())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.unparse(tree)


def modules_in(path: Path, folders: list[Path]) -> Iterator[tuple[str, list[Path]]]:
    """What a source imports, or names as `<module>:<name>`, as paths without suffix, and where that may be; the
    packages that it is in too, and nothing of `lab/`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names, roots = [], folders
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}" for alias in node.names]
            roots = [path.parents[node.level - 1]] if node.level else folders
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^([\w.]+):\w+$", node.value)  # the entry point of an environment
        for parts in (name.strip(".").split(".") for name in names):
            if parts[0] != "lab":
                yield from (("/".join(parts[:n]), roots) for n in range(1, len(parts) + 1))


def imported(sources: list[Path], folders: list[Path], env_id: str) -> set[Path]:
    """The modules in these folders, the first that has one, that the sources import, that of the environment
    (`<module>:<id>`), and those that they import in turn; neither the sources nor what else is in `lab/`."""
    modules = [(env_id.partition(":")[0].replace(".", "/"), folders)] if ":" in env_id else []
    modules += [module for path in sources if path.suffix == ".py" for module in modules_in(path, folders)]
    found = set()
    while modules:
        name, roots = modules.pop()
        files = [root / f"{name}{end}" for root in roots for end in (".py", "/__init__.py")]
        file = next((file for file in files if file.exists()), None)
        if file and file not in found | {*sources}:
            found.add(file)
            modules += modules_in(file, folders)
    return found


def code_hash(script: Path, env_id: str = "") -> str:
    """What a script and the code that it runs amount to, in 12 hexadecimal digits: itself, CODE, and what these and the
    environment import from its own folder and the project's. Comments and docstrings do not count; packages and the
    rest of `lab/` do not either."""
    script = script.resolve()
    folder, project = script.parent, Path(__file__).resolve().parent.parent
    files = [script]
    for pattern in CODE:
        files += sorted(folder.glob(pattern)) or sorted(project.glob(pattern))
    files += sorted(imported(files, [folder, project], env_id))
    return hashlib.sha256("\0".join(map(essence, files)).encode()).hexdigest()[:12]


def read_config(run_dir: Path) -> dict:
    """config.json: `args`, `script` (its name without .py), `published`, and `segments`, one for each process that the
    run had: the step from which it ran, `code` (see `code_hash`; None if it is older than that), `git_commit`,
    `processor`, `device`, `versions`, `in_kernels`, the networks that were not computed by torch, and `milliseconds`,
    those of a training pass in torch and in the kernels, of the networks for which --compute auto asked."""
    config = json.loads((run_dir / "config.json").read_text())
    args = config["args"]
    if "rewire_every" in args:
        hashed = any(segment.get("code") for segment in config.get("segments", ()))
        args.update(WITHOUT | ({} if hashed else {"regrow": False}) | args)  # the flag is older than the hash
    if args.get("device") == "auto":  # no value of the flag any more
        args["device"] = "cpu"
    if "segments" not in config:  # older
        keys = ("git_commit", "processor", "versions")
        first = {"from_step": 0, "code": None, "device": None} | {key: config.get(key) for key in keys}
        script = "td3_tar" if "policy_noise" in args else "sac_tar"
        config = {"script": script, "args": args, "segments": [first], "published": config.get("published")}
    return config | {"published": bool(config.get("published"))}


def codes(config: dict) -> list[str | None]:
    """The hashes of the code that made a run, in the order of its segments, each once."""
    return list(dict.fromkeys(segment["code"] for segment in config["segments"]))
