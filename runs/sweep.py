"""Runs a grid of runs, on the cores of this machine or on a Ray cluster; the same command continues where it stopped.

python runs/sweep.py --algo td3 sac --env-id Hopper-v4 --method dense static tar --base random+er snip+global \
    --sparsity 0.9 0.95 --seeds 5 --total-timesteps 100000 -- --eval-episodes 5
python runs/sweep.py --like runs/published    # the runs of a folder, again
python runs/sweep.py --ray-address auto ...   # on a cluster made with `ray start`

Everything after `--` goes to the scripts as it is. A run is one process with one thread and is known by its full set of
flags: where a folder of --runs-dir records the same ones in config.json, it is never run again if final.pt is there and
resumed if checkpoint.pt is; otherwise it starts anew. A cluster needs on every node the same packages, and at the same
paths this repository and --runs-dir, on a shared file system with flock (NFS version 4 has it). Linux only.
"""

import fcntl
import hashlib
import importlib
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import ray
import tyro

SCRIPTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(SCRIPTS))


@dataclass
class Args:
    algo: tuple[Literal["sac", "td3"], ...] = ("sac",)
    """scripts"""
    env_id: tuple[str, ...] = ("Hopper-v4",)
    """environments"""
    method: tuple[str, ...] = ("static", "tar")
    """arms; dense runs once per environment and seed, whatever the base and the sparsity, tiny once per sparsity"""
    base: tuple[str, ...] = ("random+er",)
    """bases, each as <criterion>+<distribution>"""
    sparsity: tuple[float, ...] = (0.9,)
    """fractions of weights that are pruned"""
    seeds: int = 5
    """seeds 1 to this one; all arms at one seed come before the next seed"""
    total_timesteps: int = 1_000_000
    """environment steps of each run"""
    runs_dir: str = "runs"
    """folder of the run folders; its sweep_logs holds what the runs print"""
    like: str | None = None
    """folder of runs, such as runs/published, to run again with the flags that they record, in place of a grid"""
    published: str | None = None
    """folder of runs that compare.py has published, which count as finished too"""
    ray_address: str | None = None
    """a running Ray cluster, auto or host:port; default: the cores of this machine"""
    cores: int | None = None
    """runs at a time on this machine; default: all its cores"""
    retries: int = 3
    """how often a run that fails is tried again from its checkpoint; losing a node does not count"""
    dry_run: bool = False
    """print the commands that are still to be run, and run nothing"""


AXES = ("env_id", "method", "criterion", "distribution", "sparsity", "seed")
IGNORED = {  # flags that a method does not look at are not passed to it
    "dense": {"sparsity", "actor_sparsity", "critic_sparsity", "criterion", "distribution"},
    "tiny": {"criterion", "distribution"},
}
FOLLOWS = {  # a flag that is not set has the value of another
    "prune_at": "learning_starts",
    "actor_method": "method",
    "critic_method": "method",
    "actor_sparsity": "sparsity",
    "critic_sparsity": "sparsity",
}
# flags that leave the result as it is
NOT_OF_THE_RESULT = {"runs_dir", "resume", "evaluate", "checkpoint_frequency", "capture_video"}
GRACE = 120  # seconds between SIGTERM and SIGKILL, in which a run writes its checkpoint
# asks the kernel for SIGTERM when the parent dies (PR_SET_PDEATHSIG is 1), then becomes the script
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])"


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def resolve(args: dict) -> dict:
    """All arguments that make two runs the same one: without what leaves the result as it is or its method ignores."""
    args = {name: args.get(FOLLOWS.get(name)) if value is None else value for name, value in args.items()}
    methods = {args.get(name, args["method"]) for name in ("method", "actor_method", "critic_method")}
    ignored = IGNORED.get(args["method"], set()) if len(methods) == 1 else set()
    for network in ("actor", "critic"):
        if args.get(f"{network}_method") == "dense":  # as the scripts record it
            args[f"{network}_sparsity"] = 0.0
    return {name: value for name, value in args.items() if name not in ignored | NOT_OF_THE_RESULT}


def command_line(flags: dict) -> list[str]:
    parts = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        parts += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return parts


@dataclass
class Run:
    name: str
    command: list[str]
    args: dict
    defaults: dict
    published: str | None

    def next_command(self, runs_dir: str) -> list[str] | None:
        """What starts or resumes it; None once it is finished."""
        checkpoints = []
        for config in (
            path for folder in (runs_dir, self.published) if folder for path in Path(folder).glob("*/config.json")
        ):
            content = json.loads(config.read_text())
            if (
                resolve(self.defaults | content["args"]) != self.args
            ):  # flags younger than the run are at their defaults
                continue
            if (config.parent / "final.pt").exists() or content.get("published"):
                return None
            checkpoints += config.parent.glob("checkpoint.pt")
        if checkpoints:
            newest = max(checkpoints, key=lambda checkpoint: checkpoint.stat().st_mtime)
            return [self.command[0], "--resume", str(newest.parent)]
        return self.command

    def log(self, runs_dir: str) -> Path:
        """What it prints. This file is also its lock: the task holds it, and so does the script, whose output it is.
        The kernel frees it when both are gone, so a script that outlives its task is never joined by a second one."""
        return Path(runs_dir) / "sweep_logs" / f"{self.name}.log"


def grid(args: Args) -> Iterator[tuple[str, dict]]:
    """Script and flags of every combination, seed by seed, so that what is done first is a balanced part of it all."""
    for seed, algo, env_id, sparsity, base, method in itertools.product(
        range(1, args.seeds + 1), args.algo, args.env_id, args.sparsity, args.base, args.method
    ):
        own = dict(zip(AXES, (env_id, method, *base.split("+"), sparsity, seed), strict=True))
        yield algo, own | {"total_timesteps": args.total_timesteps}


def recorded(folder: str) -> list[tuple[str, dict]]:
    """Script and flags of every run in this folder, seed by seed; most flags at their defaults are left out."""
    found = []
    for path in sorted(Path(folder).glob("*/config.json")):
        args = json.loads(path.read_text())["args"]
        algo = "td3" if "policy_noise" in args else "sac"
        defaults = asdict(importlib.import_module(f"{algo}_tar").Args())
        usual = {name: args.get(FOLLOWS.get(name), default) for name, default in defaults.items()}
        own = {name: args[name] for name in (*AXES, "total_timesteps")}
        own |= {n: value for n, value in args.items() if n not in NOT_OF_THE_RESULT and value != usual.get(n)}
        found.append((algo, own))
    return sorted(found, key=lambda run: run[1]["seed"])


def plan(args: Args, flags: list[str]) -> list[Run]:
    """All runs, each once."""
    runs = {}
    for algo, own in recorded(args.like) if args.like else grid(args):
        own = own | {"runs_dir": args.runs_dir, "torch_threads": 1}
        for flag in flags:
            if flag.startswith("--") and flag.split("=")[0][2:].replace("-", "_") in own.keys() | {"resume"}:
                fail(f"{flag} is for the sweep to set; it cannot stand after `--`")
        script = importlib.import_module(f"{algo}_tar")
        what = resolve(asdict(tyro.cli(script.Args, args=command_line(own) + flags)))
        own = {name: value for name, value in own.items() if name in what.keys() | NOT_OF_THE_RESULT}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
        axes = [str(own[name]) for name in AXES if name in own]
        name = "__".join([algo, *axes, digest]).replace("/", "-")
        path = os.path.relpath(SCRIPTS / f"{algo}_tar.py")
        runs[name] = Run(name, [path, *command_line(own), *flags], what, asdict(script.Args()), args.published)
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
                return "failed", "it ended, but no folder with a final.pt records the flags that it was given"
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
    if args.cores and args.ray_address:
        fail("--cores is for this machine; a cluster's nodes say their own with `ray start --num-cpus`")
    runs = plan(args, flags)
    if not runs:
        fail(f"--like {args.like} holds no runs; a run is a folder in it with a config.json")
    commands = [run.next_command(args.runs_dir) for run in runs]
    if args.dry_run:
        print("\n".join(shlex.join(["python", *command]) for command in commands if command))
    print(f"{commands.count(None)} of {len(runs)} runs are finished", file=sys.stderr)
    todo = [run for run, command in zip(runs, commands) if command]
    return sweep(args, todo, len(runs)) if todo and not args.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
