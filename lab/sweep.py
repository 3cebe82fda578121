"""Run a grid of runs, on the cores of this machine or on a Ray cluster. The same command goes on where it stopped.

python lab/sweep.py --script td3_tar.py my_sac.py --env-id Hopper-v4 --method dense static tar \
    --base random+er snip+global --sparsity 0.9 0.95 --seeds 5 --total-timesteps 100000 -- --eval-episodes 5
python lab/sweep.py --vary reserve=0.05,0.1,0.3 hidden_size=256,512 autotune=True,False    # any flag as an axis
python lab/sweep.py --like runs/published    # the runs of a folder, again
python lab/sweep.py --ray-address auto ...   # on a cluster made with `ray start`

Everything after `--` goes to the scripts as it is. A run is one process with one thread, known by its script, its
settled flags and its code, comments and docstrings aside. If a folder in --runs-dir records the same three, a final.pt
in it means that the run is finished, a checkpoint.pt that it is resumed; with --any-code the code may differ. With
`-- --device cuda` all runs of a machine share its first GPU. The nodes of a cluster need the same packages and, at the
same paths, this repository and --runs-dir, on a file system with flock (NFS version 4 has it). Linux only.
"""

import fcntl
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.flags import DISK_FULL, PROJECT, fail, refuse_repeated, require
from lab.record import FOLLOWS, NOT_OF_THE_RESULT, code_hash, codes, configs, identity


@dataclass
class Args:
    script: tuple[str, ...] = ("sac_tar.py",)  # Scripts with a dataclass Args, here or in the project's folder.
    env_id: tuple[str, ...] = ("Hopper-v4",)  # The environments.
    # The methods. One run of dense serves all bases and sparsities, and one run of tiny serves all bases.
    method: tuple[str, ...] = ("static", "tar")
    base: tuple[str, ...] = ("magnitude+global",)  # The rules of static pruning, as <criterion>+<distribution>.
    sparsity: tuple[float, ...] = (0.9,)  # The fractions of weights that are pruned.
    # Further axes, each a flag of the scripts as <name>=<value>,<value>. The word none stands for a default of None.
    vary: tuple[str, ...] = ()
    seeds: int = 5  # The last seed. All runs of one seed come before those of the next.
    first_seed: int = 1  # The first seed. A higher one leaves out seeds on which something was chosen.
    total_timesteps: int = 1_000_000  # Environment steps of each run.
    runs_dir: str = "runs"  # The folder of the run folders. What the runs print goes to sweep_logs in it.
    # Run all runs of this folder again, with the flags that they record but one thread each, in place of a grid.
    like: str | None = None
    published: str | None = None  # A folder, such as runs/published, whose finished runs need not be run again.
    any_code: bool = False  # Count and resume runs of other code too, not only those of the scripts as they are now.
    ray_address: str | None = None  # A running Ray cluster, auto or host:port. The default is this machine's cores.
    cores: int | None = None  # The number of runs at a time on this machine. The default is the number of its cores.
    retries: int = 3  # How often a run that fails is tried again. The loss of a node of a cluster does not count.
    dry_run: bool = False  # Print the commands that are still to be run, and run nothing.


AXES = ("env_id", "method", "criterion", "distribution", "sparsity", "seed")
BAD_INPUT = 2  # the exit code of a run that refuses its flags, which it would do again
WAIT = 60  # seconds until a run that another process trains is looked at again
GRACE = 120  # seconds between SIGTERM and SIGKILL, in which a run ends its episode and writes its checkpoint
# asks the kernel for SIGTERM when the parent dies (PR_SET_PDEATHSIG is 1), then becomes the script
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


# `record` is lab.record as this script imports it
Script = namedtuple("Script", ["path", "Args", "defaults", "record"])


def unload(folders: set[Path]) -> dict[str, ModuleType]:
    """Take the modules that scripts in these folders import from there out of sys.modules. Returns them."""
    files = [path for folder in folders for end in ("*.py", "*/__init__.py") for path in folder.glob(end)]
    tops = {path.parent.name if path.stem == "__init__" else path.stem for path in files}
    return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in tops}


@functools.cache
def load(name: str) -> Script:
    """Import a script as if it ran: a module that is in its own folder comes from there, every other one is the
    project's. Ends the program with one sentence if the script cannot be swept."""
    path = next((folder / name for folder in (Path.cwd(), PROJECT) if (folder / name).is_file()), None)
    if path is None or path.suffix != ".py":
        fail(f"there is no script {name}, neither here nor in {PROJECT}; --script names a script's file")
    folder, search_path = path.resolve().parent, sys.path[:]
    folders = {folder, PROJECT} if folder != PROJECT else set()
    hidden = unload(folders)
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(str(path), path)
        sys.modules[str(path)] = module = importlib.util.module_from_spec(spec)  # for types in quotes
        spec.loader.exec_module(module)
        return Script(path, module.Args, as_recorded(module.Args()), importlib.import_module("lab.record"))
    except (Exception, SystemExit) as error:
        fail(f"--script {path} cannot be swept ({error!r}); it needs a dataclass Args with a default for every flag")
    finally:
        sys.path[:] = search_path
        unload(folders)
        sys.modules.update(hidden)


def as_recorded(args: object) -> dict:
    """Flags as config.json has them, with lists for tuples."""
    return json.loads(json.dumps(asdict(args)))


def command_line(flags: dict) -> list[str]:
    """The words that give a script these flags; one that is None is left out."""
    parts = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            parts += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def is_finished(run_dir: Path, config: dict) -> bool:
    return config["published"] or (run_dir / "final.pt").exists()


@dataclass
class Run:
    # The output of the run. This file is also its lock, which the task and the script both hold. Linux frees it when
    # both have ended, so no second script starts while one that has outlived its task still runs.
    log: Path
    command: list[str]
    args: dict  # the settled flags that make it this run
    defaults: dict  # a run that is older than a flag had its default
    code: str | None  # the hash that the script records; None: any
    planned: str | None  # the hash of the code when the run was planned, by this project's lab/; None: any
    may_change: list[str]  # words that a resumed run is given too

    def recorded(self, found: Iterable[tuple[Path, dict]]) -> Iterator[tuple[Path, dict, bool]]:
        """Of the runs found, those with this script and these flags: folder, record, and whether the code counts."""
        for run_dir, config in found:
            if config["script"] == Path(self.command[0]).stem and identity(self.defaults | config["args"]) == self.args:
                yield run_dir, config, self.code is None or codes(config) == [self.code]

    def next_command(self, found: Iterable[tuple[Path, dict]]) -> list[str] | None:
        """What starts or resumes this run, given the runs found so far; None if it is finished."""
        mine = [one for *one, counts in self.recorded(found) if counts]
        if any(is_finished(*one) for one in mine):
            return None
        newest = max((p for d, _ in mine for p in d.glob("checkpoint.pt")), key=os.path.getmtime, default=None)
        return [self.command[0], "--resume", str(newest.parent), *self.may_change] if newest else self.command


def read_axes(vary: tuple[str, ...]) -> dict[str, list[str]]:
    """Names, with underscores, and values of --vary."""
    axes = {}
    for axis in vary:
        name, _, values = axis.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not name or not all(values.split(",")):
            fail(f"--vary is <name>=<value>,<value>, such as reserve=0.05,0.1,0.3, got {axis}")
        if name in {*AXES, "torch_threads", *NOT_OF_THE_RESULT, *vars(Args())}:
            fail(f"--vary {name}: the sweep sets it itself, or it changes no result")
        axes.setdefault(name, []).extend(values.split(","))
    return axes


def grid(args: Args) -> Iterator[tuple[Script, dict]]:
    """Script and flags of every combination, seed by seed, so that what is done first is a balanced part of it all."""
    seeds, scripts = range(args.first_seed, args.seeds + 1), map(load, args.script)
    axes = itertools.product(seeds, scripts, args.env_id, args.sparsity, args.base, args.method)
    for seed, script, env_id, sparsity, base, method in axes:
        own = dict(zip(AXES, (env_id, method, *base.split("+"), sparsity, seed), strict=True))
        yield script, own | {"total_timesteps": args.total_timesteps}


def runs_like(args: Args) -> Iterator[tuple[Script, dict]]:
    """Script and flags of every run in --like, seed by seed; most flags at their defaults are left out."""
    named = {Path(name).stem: name for name in args.script}
    for path, config in sorted(configs(Path(args.like)), key=lambda found: found[1]["args"]["seed"]):
        name, values = named.get(config["script"], f"{config['script']}.py"), config["args"]
        if config["script"] not in named and not any((folder / name).is_file() for folder in (Path.cwd(), PROJECT)):
            print(f"{path.name} is left out, since there is no script {name}; --script may name it", file=sys.stderr)
            continue
        script = load(name)
        usual = script.defaults | {name: values[other] for name, other in FOLLOWS.items()}
        told = sorted(name for name in values.keys() - NOT_OF_THE_RESULT if values[name] != usual.get(name))
        if gone := [name for name in told if name not in script.defaults]:
            print(f"{path.name} is left out, since {script.path.name} has no {', '.join(gone)}", file=sys.stderr)
            continue
        values |= {name: "None" for name in told if values[name] is None}  # or the flag would be left out
        yield script, {name: values[name] for name in (*AXES, "total_timesteps", *told)}


def plan(args: Args, flags: list[str]) -> list[Run]:
    """All runs, each once, with `flags` added to each. Ends the program with one sentence if one refuses its flags."""
    axes = read_axes(args.vary)
    passed = {flag.split("=")[0][2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    code_of = functools.cache(lambda code_hash, path, env_id: None if args.any_code else code_hash(path, env_id))
    runs, acts = {}, set()
    for script, values in runs_like(args) if args.like else grid(args):
        for point in itertools.product(*axes.values()):
            own = values | {"runs_dir": args.runs_dir, "torch_threads": 1}
            for name, text in zip(axes, point):
                if name not in script.defaults:
                    fail(f"--vary {name}: {script.path.name} has no such flag")
                default = script.defaults[name]
                words = {"true": True, "false": False} if isinstance(default, bool) else {}
                own[name] = ({"none": None} if default is None else words).get(text.lower(), text)
                own[name] = text.split() if isinstance(default, list) else own[name]  # as configs hold a tuple
            if clash := sorted(passed & {*own, *(f"no_{name}" for name in own), "resume", "evaluate"}):
                fail(f"--{clash[0].replace('_', '-')} is for the sweep to set; it cannot stand after `--`")
            asked = tyro.cli(script.Args, prog=script.path.name, args=command_line(own) + flags)
            device, asked.device = asked.device, "cpu"  # each run checks it, which may be on another machine
            run_args = script.record.settle(asked)
            run_args.device = device
            what = identity(as_recorded(run_args))
            idle = script.record.unused(run_args)  # flags that make no difference to this run
            methods = {run_args.method, run_args.critic_method}
            if "prune_at" in axes and methods <= script.record.sparse_utils.UNPRUNED.keys():
                what["prune_at"] = what["learning_starts"]  # nothing is pruned, so one run serves them all
                idle |= {"prune_at"}
            idle |= {"sparsity"} if methods == {"dense"} else set()
            own = {name: value for name, value in own.items() if name not in idle}
            acts |= own.keys()
            digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
            parts = [str(what[name]) for name in AXES if name not in idle]
            name = "__".join([script.path.stem, *parts, digest]).replace("/", "-")
            log = Path(args.runs_dir, "sweep_logs", f"{name}.log")
            command = [os.path.relpath(script.path), *command_line(own), *flags]
            hashes = [code_of(of, script.path, what["env_id"]) for of in (script.record.code_hash, code_hash)]
            may_change = {n: getattr(run_args, n) for n in sorted(NOT_OF_THE_RESULT) if passed & {n, f"no_{n}"}}
            runs[log] = Run(log, command, what, script.defaults, *hashes, command_line(may_change))
    if lost := sorted(axes.keys() - acts) if runs else ():
        fail(f"--vary {lost[0]}: it makes no difference to any of these runs")
    return list(runs.values()) or fail(f"no run of {args.like} can be run again here; --script names their scripts")


def lock(file: BinaryIO) -> bool:
    try:
        return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None
    except BlockingIOError:
        return False


def is_running(log: Path) -> bool:
    with log.open("ab") as file:
        return not lock(file)


def attempt(command: list[str], log: BinaryIO) -> tuple[int, str]:
    """Run a script that writes to the log and so shares its lock. Returns its exit code and last error or line."""
    log.write(f"{shlex.join(['python', *command])}\n".encode())
    log.flush()
    start = log.seek(0, os.SEEK_END)
    words = [sys.executable, "-c", DIE_WITH_PARENT, sys.executable, "-u", *command]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # in a session of its own: Ray kills the group of a lost worker, which leaves no time for a checkpoint
    child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        while child.poll() is None:
            time.sleep(0.1)
    finally:  # Ctrl-C arrives here as an exception
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
    log.seek(start)
    lines = [line for line in map(str.strip, log.read().decode(errors="replace").splitlines()) if line]
    errors = [line for line in lines if line.startswith("error: ")]  # after which a progress bar may be drawn again
    return child.returncode, (errors or lines or ["it printed nothing"])[-1]


def execute(run: Run, runs_dir: str, retries: int, folder: str) -> tuple[str, str]:
    """The Ray task: one run, to its end. Returns `done`, `failed` or `busy` (it runs elsewhere, or the disk is full),
    and why it last failed or could not start."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels by it; a job started with & ignores it
    code, why = None, ""
    try:
        with run.log.open("a+b") as log:
            if not lock(log):
                time.sleep(1)
                return "busy", why
            while command := run.next_command(configs(Path(runs_dir))):
                if run.planned not in (None, code_hash(Path(command[0]), run.args["env_id"])):
                    return "failed", "the code was edited since the sweep began; start the sweep anew"
                if code == 0:
                    why = "it ended without a final.pt, or its folder records other flags or code"
                if code in (0, BAD_INPUT) or retries < 0:
                    return "failed", why
                code, line = attempt(command, log)
                if code == os.EX_TEMPFAIL:
                    time.sleep(WAIT)
                    return "busy", line
                why = f"exit code {code}: {line}" if code else why
                retries -= 1
            return "done", why
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        time.sleep(WAIT)
        return "busy", str(error)
    except SystemExit as error:
        if error.code != BAD_INPUT:  # Ray's own, when a node is stopped
            raise
        return "failed", f"a config.json in {runs_dir} cannot be read; a new sweep names it"


def start_ray(args: Args) -> ModuleType:
    """Ray, started on this machine or connected to a cluster."""
    # no statistics are sent; and scripts are not killed with their task, but end themselves, with a checkpoint
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_kill_child_processes_on_worker_exit="0")
    os.environ.setdefault("RAY_TMPDIR", "/tmp")  # the paths of Ray's sockets must stay below 108 characters
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PROJECT))))  # of the tasks and their scripts
    how = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    how |= {"runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    if not args.ray_address:
        how |= {"num_cpus": args.cores or len(os.sched_getaffinity(0)), "object_store_memory": 100 * 2**20}
    host, _, port = (args.ray_address or "").removeprefix("ray://").rpartition(":")
    try:
        import ray  # here, since nothing else needs it

        if host:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(args.ray_address or "local", **how)
    except ImportError:
        fail("a sweep needs Ray; `pip install -r lab/requirements.txt`, or see its commands with --dry-run")
    except (OSError, RuntimeError, ValueError) as error:
        fail(f"Ray does not start ({error}); see that --ray-address, if given, is that of a running cluster")
    return ray


def sweep(args: Args, todo: list[Run], total: int) -> int:
    """Run what is to be done of the total. Returns the exit code."""
    logs = Path(args.runs_dir) / "sweep_logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make {logs} ({error.strerror}); choose another --runs-dir")
    ray = start_ray(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is a Ctrl-C
    task = ray.remote(num_cpus=1, max_retries=-1)(execute)  # Ray moves the run of a lost node to another one
    before, began, done, failures, waits, shown = total - len(todo), time.monotonic(), 0, {}, set(), None
    submit = functools.partial(task.remote, runs_dir=args.runs_dir, retries=args.retries, folder=os.getcwd())
    tasks = {submit(run): run for run in todo}
    try:
        while tasks:
            for ref in ray.wait(list(tasks), num_returns=len(tasks), timeout=1)[0]:
                run = tasks.pop(ref)
                try:
                    outcome, why = ray.get(ref)
                except ray.exceptions.RayError as error:
                    outcome, why = "failed", str(error).strip().splitlines()[-1]
                if outcome == "busy":
                    if why and run.log not in waits:
                        print(f"waiting, since {why} ({run.log})", flush=True)
                        waits.add(run.log)
                    tasks[submit(run)] = run
                elif outcome == "done":
                    done += 1
                    if why:
                        print(f"done despite {why} ({run.log})", flush=True)
                else:
                    if why not in failures.values():
                        print(f"failed: {why} ({run.log})", flush=True)
                    failures[run.log] = why
                refused = why.startswith(f"exit code {BAD_INPUT}:") and not before + done
                if refused and [*failures.values()].count(why) == min(2, len(todo)):
                    fail(f"the sweep stops, since its first runs refuse their flags; {why}")
            running = sum(is_running(run.log) for run in tasks.values())
            counts = f"{before + done} of {total} runs done, {running} running, {len(failures)} failed"
            if counts != shown:
                left = "unknown"
                if done:
                    half = running / 2 if done < running else 0  # the first ones that run are halfway, say
                    each = (time.monotonic() - began) / (done + half)
                    left = tqdm.format_interval(each * (len(tasks) - half))
                print(f"{counts}, time left {left}", flush=True)
                shown = counts
    except KeyboardInterrupt:
        print("\nstopping: each run ends its episode and writes its checkpoint; the same command goes on", flush=True)
        return 130
    finally:
        for ref in reversed(tasks):  # waiting runs first, or the end of a running one would start them
            ray.cancel(ref)
        ray.wait(list(tasks), num_returns=len(tasks), timeout=GRACE)
    for log, why in failures.items():
        print(f"failed: {why} ({log})")
    return 1 if failures else 0


def main() -> int:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    refuse_repeated(words[:end])
    args, flags = tyro.cli(Args, description=__doc__.splitlines()[0], args=words[:end]), words[end + 1 :]
    rules = {
        "script": (len({Path(name).stem for name in args.script}) == len(args.script), "files of different names"),
        "base": (all(base.count("+") == 1 for base in args.base), "<criterion>+<distribution>, such as random+er"),
        "first_seed": (1 <= args.first_seed <= args.seeds, f"from 1 to --seeds {args.seeds}"),
        "retries": (args.retries >= 0, "at least 0"),
        "cores": (args.cores is None or (args.cores > 0 and not args.ray_address), "above 0, without --ray-address"),
    }
    for name in ("like", "published"):
        holds = getattr(args, name) is None or any(configs(Path(getattr(args, name))))
        rules[name] = (holds, "a folder of runs, each a folder with a config.json or an entry of its runs.json")
    require(args, rules)
    of_a_grid = ("env_id", "method", "base", "sparsity", "seeds", "first_seed", "total_timesteps")
    given = [word.partition("=")[0][2:].replace("-", "_") for word in words[:end] if word.startswith("--")]
    if args.like and (given := [name for name in of_a_grid if name in given]):
        fail(f"--{given[0].replace('_', '-')} is of a grid, and with --like each run has the value that it records")
    runs, found = plan(args, flags), list(configs(Path(args.runs_dir)))
    if args.published:
        found += [one for one in configs(Path(args.published)) if is_finished(*one)]
    commands = {run.log: run.next_command(found) for run in runs}
    todo = [run for run in runs if commands[run.log]]
    if args.dry_run:
        print("\n".join(shlex.join(["python", *commands[run.log]]) for run in todo))
    resumed = sum(commands[run.log] != run.command for run in todo)
    print(f"{len(runs) - len(todo)} of {len(runs)} runs are finished, {resumed} will be resumed", file=sys.stderr)
    others = [one for run in runs for *one, counts in run.recorded(found) if not counts]
    if others := sum(is_finished(*one) or (one[0] / "checkpoint.pt").exists() for one in others):
        print(f"runs of other code found: {others}; --any-code counts and resumes them too", file=sys.stderr)
    return sweep(args, todo, len(runs)) if todo and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
