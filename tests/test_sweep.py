"""runs/sweep.py: what a run is, and that every run of a grid ends once, whatever is killed meanwhile."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "runs"))

import sweep  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

# Stands in for the scripts: config.json, checkpoint.pt, final.pt, --resume and SIGTERM are as theirs. Its journal
# says "--start <folder> <step>" or --resume, and "twice <folder> <step>" when two processes run one run at a time.
STUB = """
import json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

@dataclass
class Args:
    env_id: str = "E"
    seed: int = 1
    method: str = "tar"
    sparsity: float = 0.9
    criterion: str = "random"
    distribution: str = "er"
    total_timesteps: int = 100
    runs_dir: str = "runs"
    torch_threads: int = 1
    seconds_per_step: float = 0.1
    bad_seed: int = 0
    crash_at: int = -1
    hidden_size: int = 256
    deaf: bool = False
    forgetful: bool = False

def stop(*_):
    (folder / "stopped").touch()
    save("checkpoint.pt", step)
    sys.exit(143)

def save(name, step):
    (folder / (name + ".tmp")).write_text(str(step))
    os.replace(folder / (name + ".tmp"), folder / name)

def lives(pid):
    try:
        return Path("/proc", pid, "stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False

if __name__ == "__main__":
    print("starting")
    if sys.argv[1] == "--resume":
        folder = Path(sys.argv[2])
        args = Args(**json.loads((folder / "config.json").read_text())["args"])
        step = int((folder / "checkpoint.pt").read_text())
    else:
        import tyro
        args = tyro.cli(Args)
        if args.seed == args.bad_seed:
            sys.exit("error: this seed cannot work") if args.crash_at < 0 else print("error: bad input") or sys.exit(2)
        step = 0
        name = f"{args.env_id}__{args.method}__s{args.sparsity}__{args.seed}__{time.time_ns()}"
        folder = Path(args.runs_dir) / name
        folder.mkdir()
        recorded = asdict(args) | ({"sparsity": 0.0, "criterion": "random"} if args.method == "dense" else {})
        recorded["hidden_size"] += args.forgetful
        (folder / "config.json").write_text(json.dumps({"args": recorded}))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.deaf else stop)
    journal = open(Path(args.runs_dir) / "journal", "a", buffering=1)
    journal.write(f"{sys.argv[1] if sys.argv[1] == '--resume' else '--start'} {folder.name} {step}\\n")
    alone = Path(args.runs_dir) / ("alive_" + folder.name.rsplit("__", 1)[0])
    if alone.exists() and lives(alone.read_text()):
        journal.write(f"twice {folder.name} {step}\\n")
    alone.write_text(str(os.getpid()))
    while step < args.total_timesteps:
        time.sleep(args.seconds_per_step)
        step += 1
        if step % 3 == 0:
            save("checkpoint.pt", step)
        if step == args.crash_at and sys.argv[1] != "--resume":
            print("step", step, "and then the power failed", end="\\r")
            os.kill(os.getpid(), signal.SIGKILL)
    save("final.pt", step)
"""


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node with two cores, to which a test can add more."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", "/tmp")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def project(tmp_path):
    """A copy of the sweep beside stubs of both scripts."""
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "sweep.py", tmp_path / "runs")
    for name in ("sac_tar.py", "td3_tar.py"):
        (tmp_path / name).write_text(STUB)
    yield tmp_path
    assert not running(tmp_path), "a process outlived its sweep"


def start(project, *words, prefix=()):
    command = [*prefix, sys.executable, "runs/sweep.py", "--total-timesteps", "10", *map(str, words)]
    return subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process, code=0):
    text, _ = process.communicate(timeout=100)
    assert process.returncode == code, text
    return text


def running(project):
    """Process ids of the stubs of this project, which work in its folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            if any(word.endswith("_tar.py") for word in words) and os.readlink(process / "cwd") == str(project):
                found.append(int(process.name))
        except OSError:
            continue  # it has ended
    return found


def wait_for(condition, seconds=40):
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.05)


def journal(project):
    path = project / "runs" / "journal"
    return [tuple(line.split()) for line in path.read_text().splitlines()] if path.exists() else []


def finals(project):
    """Names without the time of all finished runs, of which each may be there once."""
    return sorted(path.parent.name.rsplit("__", 1)[0] for path in (project / "runs").glob("*/final.pt"))


def names(seeds, method="tar"):
    return [f"E__{method}__s0.9__{seed}" for seed in range(1, seeds + 1)]


GRID = ("--env-id", "E", "--method", "tar")


def test_the_grid_is_seed_by_seed_with_dense_once_and_the_dry_run_writes_nothing(project):
    words = "--algo td3 --env-id E --method dense static --base random+er snip+global --sparsity 0.9 0.95"
    text = end(start(project, *words.split(), "--seeds", 2, "--dry-run", "--", "--hidden-size", 32))
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    place = "--total-timesteps 10 --runs-dir runs --torch-threads 1 --hidden-size 32"
    expected = []
    for seed in (1, 2):
        expected.append(f"python td3_tar.py --env-id E --method dense --seed {seed} {place}")
        for sparsity in (0.9, 0.95):
            for criterion, distribution in (("random", "er"), ("snip", "global")):
                base = f"--criterion {criterion} --distribution {distribution} --sparsity {sparsity}"
                expected.append(f"python td3_tar.py --env-id E --method static {base} --seed {seed} {place}")
    assert commands == expected
    assert [path.name for path in (project / "runs").iterdir()] == ["sweep.py"]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--base random", "--base is <criterion>+<distribution>"),
        ("--seeds 0", "must be at least 1"),
        ("--cores 0", "must be at least 1"),
        ("--ray-address auto --cores 2", "--cores is for this machine"),
        ("-- --seed 3", "--seed is for the sweep to set"),
        ("-- --resume somewhere", "--resume is for the sweep to set"),
        ("-- --no-such-flag 3", "no-such-flag"),
        ("--ray-address 127.0.0.1:1", "Ray does not start"),
        ("--like nowhere", "--like nowhere holds no runs"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(project, words, sentence):
    text = end(start(project, *words.split()), code=2)
    assert sentence in text and "Traceback" not in text
    assert [path.name for path in (project / "runs").iterdir()] == ["sweep.py"]


def test_a_run_of_the_scripts_is_recognised_by_its_flags_and_only_by_them(run, script, monkeypatch):
    """For every method: what a script records is what the sweep looks for, else it would run for ever anew."""
    algo = script.__name__.removesuffix("_tar")
    own = {"env_id": "Pendulum-v1", "seed": 1, "total_timesteps": 62, "runs_dir": "elsewhere", "torch_threads": 1}
    more = {"device": "cpu", "compute": "masked", "learning_starts": 60, "hidden_size": 24, "batch_size": 32}
    more |= {"buffer_size": 1000, "eval_frequency": 100, "eval_episodes": 1}
    flags = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for method in get_args(script.Args.__dataclass_fields__["method"].type):
        arm = {"sparsity": 0.5, "criterion": "magnitude", "distribution": "uniform"}
        run_dir = run(method=method, total_timesteps=62, **arm)
        runs_dir = str(run_dir.parent)

        def wanted(method=method, sparsity=0.5, total_timesteps=62, extra=(), published=None):
            args = sweep.Args(
                algo=(algo,), env_id=(own["env_id"],), method=(method,), base=("magnitude+uniform",), seeds=1,
                sparsity=(sparsity,), total_timesteps=total_timesteps, published=published,
            )  # fmt: skip
            (only,) = sweep.plan(args, [*flags, *extra])
            return only

        assert wanted().next_command(runs_dir) is None, method
        assert wanted().args in [again.args for again in sweep.plan(sweep.Args(like=runs_dir), [])]
        assert wanted(total_timesteps=63).next_command(runs_dir) == wanted(total_timesteps=63).command
        assert wanted(extra=["--gamma", "0.9"]).next_command(runs_dir) is not None
        assert (wanted(sparsity=0.6).next_command(runs_dir) is None) == (method == "dense")
        assert wanted(extra=["--prune-at", "60"]).next_command(runs_dir) is None  # what it follows anyway
        assert wanted(extra=["--prune-at", "61"]).next_command(runs_dir) is not None
        assert wanted(extra=["--checkpoint-frequency", "20"]).next_command(runs_dir) is None  # the result is the same
        config = json.loads((run_dir / "config.json").read_text())
        del config["args"]["reserve"]  # as if the run were older than the flag
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted().next_command(runs_dir) is None
        assert wanted(extra=["--reserve", "0.3"]).next_command(runs_dir) is not None
        config["published"] = True  # what compare.py says of a copy, which keeps no final.pt
        (run_dir / "final.pt").unlink()
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted(published=runs_dir).next_command("elsewhere") is None
        assert wanted().next_command("elsewhere") == wanted().command
        del config["published"]
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted().next_command(runs_dir) == [wanted().command[0], "--resume", str(run_dir)]
        (run_dir / "checkpoint.pt").unlink()
        assert wanted().next_command(runs_dir) == wanted().command  # an orphan has nothing to continue


def test_the_runs_of_a_folder_are_planned_again_with_their_flags(run, script):
    folder = run(method="dense", seed=2, total_timesteps=62, save_buffer=False).parent
    run(method="set", seed=1, actor_method="static", prune_at=61, total_timesteps=62, checkpoint_frequency=10)
    first, second = (
        shlex.join(again.command) for again in sweep.plan(sweep.Args(like=str(folder)), ["--gamma", "0.5"])
    )
    base = "--criterion random --distribution er --sparsity 0.9"
    assert f"{script.__name__}.py --env-id Pendulum-v1 --method set {base} --seed 1 --total-timesteps 62" in first
    assert "--actor-method static" in first and "--prune-at 61" in first and "--gamma 0.5" in first
    assert "--method dense --seed 2" in second and "--no-save-buffer" in second and "--gamma 0.5" in second
    for unset in ("--checkpoint-frequency", "--critic-method", "--exp-name", "--rewire-every"):
        assert unset not in first and unset not in second


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_a_run_with_one_dense_network_is_recognised_too(run, script, network):
    """Its sparsity is recorded as 0."""
    run_dir = run(method="static", total_timesteps=62, **{f"{network}_method": "dense"})
    args = json.loads((run_dir / "config.json").read_text())["args"]
    assert args[f"{network}_sparsity"] == 0
    defaults = {name: value for name, value in args.items() if not name.startswith(("actor_", "critic_"))}
    given = defaults | {f"{network}_method": "dense"}
    unset = dict.fromkeys(args.keys() - given.keys())
    assert sweep.resolve(given | unset) == sweep.resolve(args)


def test_failures_are_retried_from_the_checkpoint_and_end_with_their_last_line(project, cluster):
    """Every run is killed at step 5 and goes on from step 3; seed 2 is bad input, which is not tried again."""
    words = ("--seeds", 2, "--ray-address", cluster.address, "--method", "dense", "tar", "--env-id", "E")
    flags = ("--", "--crash-at", 5, "--seconds-per-step", 0.01)
    text = end(start(project, *words, "--retries", 1, *flags, "--bad-seed", 2), code=1)
    assert finals(project) == ["E__dense__s0.9__1", "E__tar__s0.9__1"]
    assert sorted(line[0::2] for line in journal(project)) == [("--resume", "3")] * 2 + [("--start", "0")] * 2
    assert text.count("failed: exit code 2: error: bad input (runs/sweep_logs/sac__E__") == 2
    assert "2 of 4 runs done, 0 running, 2 failed, time left 0:00 h" in text
    # what is finished is not run again, what has failed is
    text = end(start(project, *words, "--retries", 0, *flags, "--bad-seed", 2), code=1)
    assert "2 of 4 runs are finished" in text and "2 of 4 runs done, 0 running, 2 failed" in text
    assert text.count("failed: ") == 2 and len(journal(project)) == 4
    for log in (project / "runs" / "sweep_logs").glob("*__2__*"):
        assert log.read_text().count("bad input") == 2  # once in each sweep
    # --retries attempts after the first, then it is over
    flags = ("--", "--bad-seed", 3, "--seconds-per-step", 0.01)
    text = end(start(project, *GRID, "--seeds", 3, "--retries", 2, "--ray-address", cluster.address, *flags), code=1)
    assert "failed: exit code 1: error: this seed cannot work" in text and "E__tar__s0.9__2" in finals(project)
    (log,) = (project / "runs" / "sweep_logs").glob("*tar*__3__*")
    assert log.read_text().count("this seed cannot work") == 3
    # a script that records other flags than it was given is not run again and again
    started = len(journal(project))
    flags = ("--", "--forgetful", "--seconds-per-step", 0.01, "--hidden-size", 8)
    text = end(start(project, *GRID, "--seeds", 1, "--ray-address", cluster.address, *flags), code=1)
    assert "no folder with a final.pt records the flags" in text
    assert len(journal(project)) == started + 1


def test_ctrl_c_then_sigkill_then_two_sweeps_at_a_time(project, cluster):
    """Each run still ends once, and no two processes are ever in one run."""
    flags = ("--", "--seconds-per-step", 0.2)
    here = (*GRID, "--seeds", 4, "--cores", 2, *flags)
    there = (*GRID, "--seeds", 4, "--ray-address", cluster.address, *flags)
    first = start(project, *there)
    wait_for(lambda: len(journal(project)) == 2)
    first.send_signal(signal.SIGINT)
    assert "the same command goes on from here" in end(first, code=130)
    assert not running(project)
    started = [folder for _, folder, _ in journal(project)]
    assert len(started) == 2 and all((project / "runs" / folder / "stopped").exists() for folder in started)

    second = start(project, *here)
    wait_for(lambda: len(journal(project)) == 4)
    assert sorted(folder for what, folder, _ in journal(project)[2:] if what == "--resume") == sorted(started)
    second.kill()
    second.wait()
    wait_for(lambda: not running(project))

    both = [start(project, *there), start(project, *there)]
    for process in both:
        assert "4 of 4 runs done, 0 running, 0 failed" in end(process)
    assert finals(project) == names(4)
    assert not [line for line in journal(project) if line[0] == "twice"]
    assert sum(what == "--start" for what, _, _ in journal(project)) == 4


def test_a_sweep_that_a_shell_started_with_sigint_ignored_stops_at_sigterm(project):
    """As in the background of a script; whatever it starts would ignore SIGINT too, by which Ray cancels."""
    words = (*GRID, "--seeds", 2, "--cores", 2, "--", "--seconds-per-step", 1)
    process = start(project, *words, prefix=("sh", "-c", "trap '' INT; exec \"$@\"", "sh"))
    wait_for(lambda: len(journal(project)) == 2)
    began = time.monotonic()
    process.terminate()
    assert "the same command goes on from here" in end(process, code=130) and time.monotonic() - began < 8
    assert all((project / "runs" / folder / "stopped").exists() for _, folder, _ in journal(project))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_killed_task_takes_its_script_along_or_the_script_is_waited_for(project, cluster, deaf):
    """A script dies with its task and its next task resumes it. If it does not die, its lock holds the next one off."""
    flags = ("--", "--seconds-per-step", 0.6 if deaf else 0.3, *["--deaf"] * deaf)
    process = start(project, *GRID, "--seeds", 1, "--ray-address", cluster.address, *flags)
    wait_for(lambda: journal(project))
    (script,) = running(project)
    task = int(Path(f"/proc/{script}/stat").read_text().split()[3])
    os.kill(task, signal.SIGKILL)
    assert "1 of 1 runs done, 0 running, 0 failed" in end(process)
    assert [what for what, _, _ in journal(project)] == (["--start"] if deaf else ["--start", "--resume"])
    assert finals(project) == names(1)


def test_a_node_dies_and_every_run_still_ends_once(project, cluster):
    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    words = ("--seeds", 5, "--ray-address", cluster.address)
    process = start(project, *GRID, *words, "--", "--seconds-per-step", 0.3)
    wait_for(lambda: len(list((project / "runs").glob("*/checkpoint.pt"))) == 4)
    cluster.remove_node(node, allow_graceful=False)
    assert "5 of 5 runs done, 0 running, 0 failed" in end(process)
    assert finals(project) == names(5)
    whats = [what for what, _, _ in journal(project)]
    assert (whats.count("--start"), whats.count("--resume"), whats.count("twice")) == (5, 2, 0)
