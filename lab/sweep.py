"""Runs a grid of runs, on the cores of this machine or on a Ray cluster; the same command continues where it stopped.

python lab/sweep.py --script td3_tar.py my_sac.py --env-id Hopper-v4 --method dense static tar \
    --base random+er snip+global --sparsity 0.9 0.95 --seeds 5 --total-timesteps 100000 -- --eval-episodes 5
python lab/sweep.py --vary reserve=0.05,0.1,0.3 hidden_size=256,512 autotune=True,False    # any flag as an axis
python lab/sweep.py --like runs/published    # the runs of a folder, again
python lab/sweep.py --ray-address auto ...   # on a cluster made with `ray start`

Everything after `--` goes to the scripts as it is. A run is one process with one thread and is known by its script, its
full set of flags and the code that it ran. Where a folder of --runs-dir records the same in config.json, it is never
run again if final.pt is there and resumed if checkpoint.pt is; otherwise it starts anew. So everything runs again after
an edit of the code, comments and docstrings aside, unless --any-code is given. Runs use the CPU; with
`-- --device cuda` all runs of a machine share its first GPU. A cluster needs on every node the same packages, and at
the same paths this repository and --runs-dir, on a shared file system with flock (NFS version 4 has it). Linux only.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import BinaryIO

import ray
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lab.record import FOLLOWS, NOT_OF_THE_RESULT, code_hash, codes, fail, identity, read_config  # noqa: E402


@dataclass
class Args:
    script: tuple[str, ...] = ("sac_tar.py",)
    """files with a dataclass Args, each run as `python <file>`; a path from here or from the project's folder"""
    env_id: tuple[str, ...] = ("Hopper-v4",)
    """environments"""
    method: tuple[str, ...] = ("static", "tar")
    """arms; dense runs once per environment and seed, whatever the base and the sparsity, tiny once per sparsity"""
    base: tuple[str, ...] = ("random+er",)
    """bases, each as <criterion>+<distribution>"""
    sparsity: tuple[float, ...] = (0.9,)
    """fractions of weights that are pruned"""
    vary: tuple[str, ...] = ()
    """further axes, each any flag of the scripts as <name>=<value>,<value>; none stands for the default None"""
    seeds: int = 5
    """the last seed; all arms at one seed come before the next seed"""
    first_seed: int = 1
    """the first seed; another one keeps an evaluation apart from the seeds on which something was chosen"""
    total_timesteps: int = 1_000_000
    """environment steps of each run"""
    runs_dir: str = "runs"
    """folder of the run folders; its sweep_logs holds what the runs print"""
    like: str | None = None
    """folder of runs, such as runs/published, to run again with the flags that they record, in place of a grid"""
    published: str | None = None
    """folder of runs that compare.py has published, which count as finished too"""
    any_code: bool = False
    """count and resume runs of other code too; without it, only those of the scripts as they are now"""
    ray_address: str | None = None
    """a running Ray cluster, auto or host:port; default: the cores of this machine"""
    cores: int | None = None
    """runs at a time on this machine; default: all its cores"""
    retries: int = 3
    """how often a run that fails is tried again from its checkpoint; losing a node does not count"""
    dry_run: bool = False
    """print the commands that are still to be run, and run nothing"""


AXES = ("env_id", "method", "criterion", "distribution", "sparsity", "seed")
SET = {*AXES, "total_timesteps", "runs_dir", "torch_threads"}  # flags that the sweep sets
GRACE = 120  # seconds between SIGTERM and SIGKILL, in which a run writes its checkpoint
# asks the kernel for SIGTERM when the parent dies (PR_SET_PDEATHSIG is 1), then becomes the script
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def command_line(flags: dict) -> list[str]:
    parts = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            parts += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return parts


def as_recorded(args: object) -> dict:
    """Args as config.json has them, with lists for tuples."""
    return json.loads(json.dumps(asdict(args)))


@dataclass(eq=False)
class Script:
    path: Path
    Args: type
    defaults: dict


def find_script(name: str) -> Path:
    for folder in (Path.cwd(), ROOT):
        if name.endswith(".py") and (folder / name).is_file():
            return folder / name
    fail(f"there is no script {name}, neither here nor in {ROOT}; --script names a script's file")


def modules_of(folder: Path) -> list[str]:
    """Names of the loaded modules that a script in this folder imports from there."""
    homes = (folder, folder / "lab", folder / "lab" / "kernels")
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    importable = files.keys() - {"__main__", *filter(os.path.isabs, files)}  # the others are scripts
    return [name for name in importable if files[name] and Path(files[name]).parent in homes]


@functools.cache
def load(path: Path) -> Script:
    """Imports a script as if it ran: with the modules of its own folder, not with those of the project's. One that
    cannot be swept is refused in a sentence."""
    folder, search_path = path.resolve().parent, sys.path[:]
    hidden = {} if folder == ROOT else {name: sys.modules.pop(name) for name in modules_of(ROOT)}
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(str(path), path)
        sys.modules[str(path)] = module = importlib.util.module_from_spec(spec)  # for types in quotes
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"--script {path}: it cannot be imported ({type(error).__name__}: {' '.join(str(error).split())})")
    finally:
        sys.path[:] = search_path
        for name in modules_of(folder) if folder != ROOT else ():
            del sys.modules[name]
        sys.modules.update(hidden)
    if not is_dataclass(getattr(module, "Args", None)):
        fail(f"--script {path}: it has no dataclass Args")
    if lacking := SET - {field.name for field in fields(module.Args)}:
        fail(f"--script {path}: its Args lacks {', '.join(sorted(lacking))}, which the sweep sets")
    try:
        return Script(path, module.Args, as_recorded(module.Args()))
    except TypeError as error:
        fail(f"--script {path}: its Args needs a default for every flag, which JSON can hold ({error})")


@dataclass
class Run:
    name: str
    script: str
    command: list[str]
    args: dict
    defaults: dict
    code: str | None  # None: any
    published: str | None

    def folders(self, runs_dir: str) -> Iterator[tuple[Path, dict]]:
        """Run folders that record this script and these flags, each with its config."""
        for folder in (runs_dir, self.published) if self.published else (runs_dir,):
            for run_dir in (path.parent for path in Path(folder).glob("*/config.json")):
                config = read_config(run_dir)
                # flags younger than the run are at their defaults
                if config["script"] == self.script and identity(self.defaults | config["args"]) == self.args:
                    yield run_dir, config

    def is_mine(self, config: dict) -> bool:
        return self.code is None or codes(config) == [self.code]

    def of_other_code(self, runs_dir: str) -> int:
        """How many runs would count or be resumed if it were not for their code."""
        return sum(
            not self.is_mine(config) and (config["published"] or any(run_dir.glob("*.pt")))
            for run_dir, config in self.folders(runs_dir)
        )

    def next_command(self, runs_dir: str) -> list[str] | None:
        """What starts or resumes it; None once it is finished."""
        checkpoints = []
        for run_dir, config in self.folders(runs_dir):
            if not self.is_mine(config):
                continue
            if (run_dir / "final.pt").exists() or config["published"]:
                return None
            checkpoints += run_dir.glob("checkpoint.pt")
        if checkpoints:
            newest = max(checkpoints, key=lambda checkpoint: checkpoint.stat().st_mtime)
            return [self.command[0], "--resume", str(newest.parent)]
        return self.command

    def log(self, runs_dir: str) -> Path:
        """What it prints. This file is also its lock: the task holds it, and so does the script, whose output it is.
        The kernel frees it when both are gone, so a script that outlives its task is never joined by a second one."""
        return Path(runs_dir) / "sweep_logs" / f"{self.name}.log"


def read_axes(vary: tuple[str, ...]) -> dict[str, list[str]]:
    """Names, with underscores, and values of --vary."""
    axes = {}
    for axis in vary:
        name, _, values = axis.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if not name or not all(values.split(",")):
            fail(f"--vary is <name>=<value>,<value>, such as reserve=0.05,0.1,0.3, got {axis}")
        if name in SET | {field.name for field in fields(Args)} | NOT_OF_THE_RESULT:
            fail(f"--vary {name}: the sweep sets it itself, or it leaves the result as it is")
        if name in axes:
            fail(f"--vary {name}: it stands there twice")
        axes[name] = values.split(",")
    return axes


@functools.cache
def read_value(script: Script, name: str, text: str) -> str | bool | None:
    """A value of an axis as `command_line` takes it; None leaves the flag out. The script itself judges it."""
    if name not in script.defaults:
        fail(f"--vary {name}: {script.path.name} has no such flag")
    default, value = script.defaults[name], text
    if default is None and text.lower() == "none":
        return None
    if isinstance(default, bool) and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(script.Args, args=command_line({name: value}))
    except SystemExit:
        fail(f"--vary {name}={text}: {script.path.name} does not take this value; see its --help")
    return value


def grid(args: Args) -> Iterator[tuple[Script, dict]]:
    """Script and flags of every combination, seed by seed, so that what is done first is a balanced part of it all."""
    scripts = [load(find_script(name)) for name in args.script]
    for seed, script, env_id, sparsity, base, method in itertools.product(
        range(args.first_seed, args.seeds + 1), scripts, args.env_id, args.sparsity, args.base, args.method
    ):
        own = dict(zip(AXES, (env_id, method, *base.split("+"), sparsity, seed), strict=True))
        yield script, own | {"total_timesteps": args.total_timesteps}


def recorded(args: Args) -> list[tuple[Script, dict]]:
    """Script and flags of every run in --like, seed by seed; most flags at their defaults are left out."""
    named = {Path(name).stem: name for name in args.script}
    found = []
    for path in sorted(Path(args.like).glob("*/config.json")):
        config = read_config(path.parent)
        script = load(find_script(named.get(config["script"], f"{config['script']}.py")))
        values = config["args"]
        usual = {name: values.get(FOLLOWS.get(name), default) for name, default in script.defaults.items()}
        own = {name: values[name] for name in (*AXES, "total_timesteps")}
        own |= {n: value for n, value in values.items() if n not in NOT_OF_THE_RESULT and value != usual.get(n)}
        found.append((script, own))
    return sorted(found, key=lambda run: run[1]["seed"])


def plan(args: Args, flags: list[str]) -> list[Run]:
    """All runs, each once."""
    axes = read_axes(args.vary)
    given = {flag.split("=")[0][2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    runs, hashes = {}, {}
    for script, values in recorded(args) if args.like else grid(args):
        for point in itertools.product(*axes.values()):
            own = values | {"runs_dir": args.runs_dir, "torch_threads": 1}
            own |= {name: read_value(script, name, text) for name, text in zip(axes, point)}
            if clash := sorted(given & {*own, *(f"no_{name}" for name in own), "resume", "evaluate"}):
                fail(f"--{clash[0].replace('_', '-')} is for the sweep to set; it cannot stand after `--`")
            own = {name: value for name, value in own.items() if value is not None or name not in axes}
            what = identity(as_recorded(tyro.cli(script.Args, args=command_line(own) + flags)))
            own = {name: value for name, value in own.items() if name in what.keys() | NOT_OF_THE_RESULT}
            digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
            arm = [str(what[name]) for name in AXES if name in what]
            arm += [f"{name}={what[name]}" for name in axes if name in what]
            name = "__".join([script.path.stem, *arm, digest]).replace("/", "-")
            command = [os.path.relpath(script.path), *command_line(own), *flags]
            made_by = (script.path, what["env_id"])
            if made_by not in hashes:
                hashes[made_by] = None if args.any_code else code_hash(*made_by)
            runs[name] = Run(name, script.path.stem, command, what, script.defaults, hashes[made_by], args.published)
    return list(runs.values())


def lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_running(log: Path) -> bool:
    if not log.exists():
        return False
    with log.open("rb") as file:
        return not lock(file, fcntl.LOCK_SH)


def attempt(command: list[str], log: BinaryIO) -> tuple[int, str]:
    """Runs a script, its output and with it the lock going to the log. Returns its exit code and last line."""
    start = log.seek(0, os.SEEK_END)
    child = subprocess.Popen(
        [sys.executable, "-c", DIE_WITH_PARENT, sys.executable, "-u", *command],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ray kills the process group of a lost worker, which leaves no time for a checkpoint
    )
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
    lines = [line.strip() for line in log.read().decode(errors="replace").replace("\r", "\n").split("\n")]
    return child.returncode, next((line for line in reversed(lines) if line), "it printed nothing")


def execute(run: Run, runs_dir: str, retries: int, folder: str) -> tuple[str, str]:
    """The Ray task: one run, to its end. Returns done, failed or busy (it runs elsewhere), and why it failed."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # by which Ray cancels; a script's `&` had it ignored
    with run.log(runs_dir).open("a+b") as log:
        give_up, why = time.monotonic() + 3, ""
        while not lock(log, fcntl.LOCK_EX):
            if time.monotonic() > give_up:
                return "busy", why
            time.sleep(0.1)
        for _ in range(1 + retries):
            command = run.next_command(runs_dir)
            if command is None:
                return "done", why
            code, line = attempt(command, log)
            why = f"exit code {code}: {line}"
            if code == 0 and run.next_command(runs_dir) == run.command:
                return (
                    "failed",
                    "it ended, but no folder with a final.pt records the flags and code that it was given",
                )
            if code == 2:  # bad input stays bad
                break
        return "failed" if run.next_command(runs_dir) else "done", why


def progress(done: int, running: int, failed: int, total: int, here: int, seconds: float) -> str:
    minutes = round(seconds / here * (total - done - failed) / 60) if here else None
    left = "unknown" if minutes is None else f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{done} of {total} runs done, {running} running, {failed} failed, time left {left}"


def sweep(args: Args, todo: list[Run], total: int) -> int:
    """Runs what is to be done of the total. Returns the exit code."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_TMPDIR", "/tmp")  # the paths of Ray's sockets must stay below 108 characters
    here = {"num_cpus": args.cores or len(os.sched_getaffinity(0)), "object_store_memory": 100 * 2**20}
    host, _, port = (args.ray_address or "").removeprefix("ray://").rpartition(":")
    try:
        if host:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            args.ray_address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            **({} if args.ray_address else here),
        )
    except (OSError, RuntimeError, ValueError) as error:
        fail(f"Ray does not start ({error}); see that --ray-address is that of a running cluster")
    (Path(args.runs_dir) / "sweep_logs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop is a Ctrl-C
    task = ray.remote(num_cpus=1, max_retries=-1)(execute)  # Ray moves the run of a lost node to another one

    def submit(run: Run) -> ray.ObjectRef:
        return task.remote(run, args.runs_dir, args.retries, os.getcwd())

    done, failures, began, shown, shown_at = 0, {}, time.monotonic(), None, 0.0
    tasks = {submit(run): run for run in todo}
    try:
        while tasks:
            for ref in ray.wait(list(tasks), timeout=1)[0]:
                run = tasks.pop(ref)
                try:
                    outcome, why = ray.get(ref)
                except ray.exceptions.RayError as error:
                    outcome, why = "failed", str(error).strip().splitlines()[-1]
                if outcome == "busy":
                    tasks[submit(run)] = run
                elif outcome == "failed":
                    failures[run.log(args.runs_dir)] = why
                else:
                    done += 1
            running = sum(is_running(run.log(args.runs_dir)) for run in tasks.values())
            now, before = time.monotonic(), total - len(todo)
            line = progress(before + done, running, len(failures), total, done, now - began)
            if sys.stdout.isatty():
                print(f"\r{line}\x1b[K", end="", flush=True)
            elif (done, len(failures)) != shown or now - shown_at > 60:
                print(line, flush=True)
                shown, shown_at = (done, len(failures)), now
    except KeyboardInterrupt:
        print("\nstopping: the runs write their checkpoints", flush=True)
        for ref in reversed(tasks):  # what waits before what runs, so that nothing new starts
            ray.cancel(ref)
        ray.wait(list(tasks), num_returns=len(tasks), timeout=GRACE)
        print("stopped; the same command goes on from here")
        return 130
    print("\n" * sys.stdout.isatty(), end="")
    for log, why in failures.items():
        print(f"failed: {why} ({log})")
    return 1 if failures else 0


def main() -> int:
    own, dashes, flags = sys.argv[1:], "--", []
    if dashes in own:
        own, flags = own[: own.index(dashes)], own[own.index(dashes) + 1 :]
    args = tyro.cli(Args, description=__doc__.splitlines()[0], args=own)
    for base in args.base:
        if base.count("+") != 1:
            fail(f"--base is <criterion>+<distribution>, such as random+er, got {base}")
    if args.seeds < 1 or args.retries < 0 or (args.cores is not None and args.cores < 1):
        fail("--seeds and --cores must be at least 1 and --retries at least 0")
    if not 1 <= args.first_seed <= args.seeds:
        fail(f"--first-seed must be from 1 to --seeds, which is {args.seeds}, got {args.first_seed}")
    if args.cores and args.ray_address:
        fail("--cores is for this machine; a cluster's nodes say their own with `ray start --num-cpus`")
    if len({Path(name).stem for name in args.script}) < len(args.script):
        fail("--script names two files of one name; a run is known by its script's name")
    runs = plan(args, flags)
    if not runs:
        fail(f"--like {args.like} holds no runs; a run is a folder in it with a config.json")
    commands = [run.next_command(args.runs_dir) for run in runs]
    if args.dry_run:
        print("\n".join(shlex.join(["python", *command]) for command in commands if command))
    print(f"{commands.count(None)} of {len(runs)} runs are finished", file=sys.stderr)
    if others := sum(run.of_other_code(args.runs_dir) for run in runs):
        print(f"runs of other code found: {others}; --any-code counts and resumes them too", file=sys.stderr)
    todo = [run for run, command in zip(runs, commands) if command]
    return sweep(args, todo, len(runs)) if todo and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
