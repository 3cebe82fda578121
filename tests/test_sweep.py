"""lab/sweep.py: what a run is, and that every run of a grid ends once, whatever is killed meanwhile."""

import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "runs"))

import sweep  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

import sparse_utils  # noqa: E402
from lab import record  # noqa: E402

# Stands in for the scripts: config.json, checkpoint.pt, final.pt, --resume and SIGTERM are as theirs. Its journal
# says "--start <folder> <step>" or --resume, and "twice <folder> <step>" when two processes run one run at a time.
STUB = """
import json, os, signal, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import sparse_utils

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
    hidden_size: int = sparse_utils.HIDDEN_SIZE
    layers: tuple[int, ...] = (2, 2)
    reserve: float = 0.1
    autotune: bool = True
    warm_up: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
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
    from lab.record import code_hash
    segment = {"code": code_hash(Path(__file__))}
    if sys.argv[1] == "--resume":
        folder = Path(sys.argv[2])
        config = json.loads((folder / "config.json").read_text())
        args = Args(**config["args"])
        config["segments"].append(segment)
        (folder / "config.json").write_text(json.dumps(config))
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
        config = {"args": recorded, "script": Path(__file__).stem, "segments": [segment]}
        (folder / "config.json").write_text(json.dumps(config))
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


UTILS = """HIDDEN_SIZE = 256
REVIVALS, GROWTHS, UNPRUNED = {"tar": 0}, {"rigl": 0}, {"dense": 0}
METHODS = REVIVALS | {"static": 0} | GROWTHS | UNPRUNED
"""
FILES = ["record.py", "sweep.py"]


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
    for name in FILES:
        shutil.copy(ROOT / "runs" / name, tmp_path / "runs")
    for name in ("sac_tar.py", "td3_tar.py"):
        (tmp_path / name).write_text(STUB)
    (tmp_path / "sparse_utils.py").write_text(UTILS)
    yield tmp_path
    assert not running(tmp_path), "a process outlived its sweep"


def start(project, *words, prefix=()):
    command = [*prefix, sys.executable, "lab/sweep.py", "--total-timesteps", "10", *map(str, words)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


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
            is_script = any(word.endswith(("_tar.py", "my_sac.py")) for word in words)
            if is_script and os.readlink(process / "cwd") == str(project):
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


def planned(project, *words):
    """The commands of a dry run, and all that it says."""
    text = end(start(project, "--dry-run", *words))
    return [line.removeprefix("python ") for line in text.splitlines() if line.startswith("python ")], text


def edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def names(seeds, method="tar"):
    return [f"E__{method}__s0.9__{seed}" for seed in range(1, seeds + 1)]


GRID = ("--env-id", "E", "--method", "tar")


def test_the_grid_is_seed_by_seed_with_dense_once_and_the_dry_run_writes_nothing(project):
    words = "--script td3_tar.py --env-id E --method dense static --base random+er snip+global --sparsity 0.9 0.95"
    seeds = ("--first-seed", 4, "--seeds", 5)
    text = end(start(project, *words.split(), *seeds, "--dry-run", "--", "--hidden-size", 32))
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    place = "--total-timesteps 10 --runs-dir runs --torch-threads 1 --hidden-size 32"
    expected = []
    for seed in (4, 5):
        expected.append(f"python td3_tar.py --env-id E --method dense --seed {seed} {place}")
        for sparsity in (0.9, 0.95):
            for criterion, distribution in (("random", "er"), ("snip", "global")):
                base = f"--criterion {criterion} --distribution {distribution} --sparsity {sparsity}"
                expected.append(f"python td3_tar.py --env-id E --method static {base} --seed {seed} {place}")
    assert commands == expected
    assert sorted(path.name for path in (project / "runs").iterdir()) == FILES


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--base random", "--base is <criterion>+<distribution>"),
        ("--seeds 0", "must be at least 1"),
        ("--seeds 3 --first-seed 4", "--first-seed must be from 1 to --seeds, which is 3, got 4"),
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
    assert sorted(path.name for path in (project / "runs").iterdir()) == FILES


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--script nowhere.py", "there is no script nowhere.py"),
        ("--script sparse_utils.py", "it has no dataclass Args"),
        ("--script lab/sweep.py", "its Args lacks criterion, distribution"),
        ("--script sac_tar.py ./sac_tar.py", "names two files of one name"),
        ("--vary reserve", "--vary is <name>=<value>,<value>"),
        ("--vary reserve=0.1,", "--vary is <name>=<value>,<value>"),
        ("--vary reserve=0.1 reserve=0.2", "--vary reserve: it stands there twice"),
        ("--vary no-such-flag=3", "--vary no_such_flag: sac_tar.py has no such flag"),
        ("--vary hidden_size=32,large", "--vary hidden_size=large: sac_tar.py does not take this value"),
        ("--vary device=tpu", "--vary device=tpu: sac_tar.py does not take this value"),
        ("--vary autotune=none", "--vary autotune=none: sac_tar.py does not take this value"),
        ("--vary env-id=E,F", "--vary env_id: the sweep sets it itself"),
        ("--vary seed=3", "--vary seed: the sweep sets it itself"),
        ("--vary base=random+er", "--vary base: the sweep sets it itself"),
        ("--vary checkpoint_frequency=3", "--vary checkpoint_frequency: the sweep sets it itself, or it leaves"),
        ("--vary reserve=0.1 -- --reserve 0.2", "--reserve is for the sweep to set"),
        ("--vary autotune=true -- --no-autotune", "--no-autotune is for the sweep to set"),
        ("--vary warm_up=none,2 -- --warm-up 3", "--warm-up is for the sweep to set"),
        ("--script deep.py", "cannot be imported (ModuleNotFoundError: No module named 'abyss')"),
        ("--script open.py", "its Args needs a default for every flag"),
    ],
)
def test_a_script_or_an_axis_that_cannot_be_is_one_sentence(project, monkeypatch, capsys, words, sentence):
    (project / "deep.py").write_text("import abyss")
    (project / "open.py").write_text(STUB.replace('env_id: str = "E"', "env_id: str"))
    monkeypatch.chdir(project)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--dry-run", *words.split()])
    with pytest.raises(SystemExit) as exit:
        sweep.main()
    text = "".join(capsys.readouterr())
    assert exit.value.code == 2 and text.count("\n") == 1 and text.startswith("error: ") and sentence in text


def test_a_run_of_the_scripts_is_recognised_by_its_flags_and_only_by_them(run, script, monkeypatch):
    """For every method: what a script records is what the sweep looks for, else it would run for ever anew."""
    own = {"env_id": "Pendulum-v1", "seed": 1, "total_timesteps": 62, "runs_dir": "elsewhere", "torch_threads": 1}
    more = {"device": "cpu", "compute": "masked", "learning_starts": 40, "hidden_size": 24, "batch_size": 32}
    more |= {"buffer_size": 1000, "eval_frequency": 100, "eval_episodes": 1, "rewire_every": 9}
    flags = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for method in sparse_utils.METHODS:
        arm = {"sparsity": 0.5, "criterion": "magnitude", "distribution": "uniform"}
        run_dir = run(method=method, total_timesteps=62, learning_starts=40, rewire_every=9, **arm)
        runs_dir = str(run_dir.parent)

        def wanted(method=method, sparsity=0.5, total_timesteps=62, extra=(), published=None, any_code=False):
            args = sweep.Args(
                script=(f"{script.__name__}.py",), env_id=(own["env_id"],), method=(method,), seeds=1,
                base=("magnitude+uniform",), sparsity=(sparsity,), total_timesteps=total_timesteps,
                published=published, any_code=any_code,
            )  # fmt: skip
            (only,) = sweep.plan(args, [*flags, *extra])
            return only

        assert wanted().next_command(runs_dir) is None, method
        assert wanted().args in [again.args for again in sweep.plan(sweep.Args(like=runs_dir), [])]
        assert wanted(total_timesteps=63).next_command(runs_dir) == wanted(total_timesteps=63).command
        assert wanted(extra=["--gamma", "0.9"]).next_command(runs_dir) is not None
        assert (wanted(sparsity=0.6).next_command(runs_dir) is None) == (method == "dense")
        assert wanted(extra=["--prune-at", "40"]).next_command(runs_dir) is None  # what it follows anyway
        assert wanted(extra=["--prune-at", "41"]).next_command(runs_dir) is not None
        assert wanted(extra=["--checkpoint-frequency", "20"]).next_command(runs_dir) is None  # the result is the same
        config = json.loads((run_dir / "config.json").read_text())
        del config["args"]["reserve"]  # as if the run were older than the flag
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted().next_command(runs_dir) is None
        another_reserve = wanted(extra=["--reserve", "0.3"]).next_command(runs_dir)
        assert (another_reserve is not None) == (method in sparse_utils.REVIVALS)
        config["published"] = True  # what compare.py says of a copy, which keeps no final.pt
        (run_dir / "final.pt").unlink()
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted(published=runs_dir).next_command("elsewhere") is None
        assert wanted().next_command("elsewhere") == wanted().command
        older = {"args": config["args"], "published": True}  # before code was recorded
        (run_dir / "config.json").write_text(json.dumps(older))
        assert wanted(published=runs_dir).next_command("elsewhere") is not None
        assert wanted(published=runs_dir).of_other_code("elsewhere") == 1
        assert wanted(published=runs_dir, any_code=True).next_command("elsewhere") is None
        assert wanted(published=runs_dir, any_code=True).of_other_code("elsewhere") == 0
        del config["published"]
        (run_dir / "config.json").write_text(json.dumps(config))
        assert wanted().next_command(runs_dir) == [wanted().command[0], "--resume", str(run_dir)]
        (run_dir / "checkpoint.pt").unlink()
        assert wanted().next_command(runs_dir) == wanted().command  # an orphan has nothing to continue


def test_the_runs_of_a_folder_are_planned_again_with_their_flags(run, script):
    folder = run(method="dense", seed=2, total_timesteps=62, save_buffer=False).parent
    flags = {"prune_at": 61, "total_timesteps": 90, "rewire_every": 5, "checkpoint_frequency": 10}
    run(method="set", seed=1, actor_method="static", **flags)
    first, second = (
        shlex.join(again.command) for again in sweep.plan(sweep.Args(like=str(folder)), ["--gamma", "0.5"])
    )
    base = "--criterion random --distribution er --sparsity 0.9"
    assert f"{script.__name__}.py --env-id Pendulum-v1 --method set {base} --seed 1 --total-timesteps 90" in first
    for own in ("--actor-method static", "--prune-at 61", "--rewire-every 5", "--gamma 0.5"):
        assert own in first
    assert "--method dense --seed 2" in second and "--no-save-buffer" in second and "--gamma 0.5" in second
    for unset in ("--checkpoint-frequency", "--critic-method", "--exp-name", "--rewire-stop"):
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
    assert record.identity(given | unset) == record.identity(args)


QUICK = ("--", "--seconds-per-step", 0.01)


def test_any_flag_is_an_axis_which_acts_and_is_recognised_and_multiplies_no_run_that_ignores_it(project, cluster):
    words = ("--env-id", "E", "--method", "static", "tar", "--base", "snip+global", "--seeds", 2)
    words += ("--vary", "reserve=0.05,0.30", "autotune=True,false", "warm-up=none,7", "--ray-address", cluster.address)
    commands, _ = planned(project, *words, *QUICK)
    expected = []
    for seed in (1, 2):
        for arm in ("static", "tar --reserve 0.05", "tar --reserve 0.30"):
            method, _, reserve = arm.partition(" ")
            own = f"sac_tar.py --env-id E --method {method} --criterion snip --distribution global --sparsity 0.9"
            own += f" --seed {seed} --total-timesteps 10 --runs-dir runs --torch-threads 1 {reserve}".rstrip()
            for tune in ("--autotune", "--no-autotune"):
                expected += [f"{own} {tune} {late}--seconds-per-step 0.01" for late in ("", "--warm-up 7 ")]
    assert commands == expected
    words = (*GRID, "--seeds", 1, *words[words.index("--vary") :])
    assert "8 of 8 runs done" in end(start(project, *words, *QUICK))
    configs = [json.loads(path.read_text())["args"] for path in (project / "runs").glob("*/config.json")]
    acted = [(args["reserve"], args["autotune"], args["warm_up"]) for args in configs]
    assert sorted(acted, key=str) == sorted(itertools.product((0.05, 0.3), (True, False), (None, 7)), key=str)
    assert "8 of 8 runs are finished" in end(start(project, *words, *QUICK))
    words = (*GRID, "--seeds", 1, "--vary", "reserve=0.3,0.4", "autotune=false", "warm_up=7")
    commands, text = planned(project, *words, *QUICK)  # the log's name says which
    assert len(commands) == 1 and "1 of 2 runs are finished" in text
    assert list((project / "runs" / "sweep_logs").glob("sac_tar__E__tar__*__reserve=0.3__autotune=False__warm_up=7__*"))


def test_flags_that_are_lists_and_the_device_go_through(project, cluster):
    words = (*GRID, "--seeds", 1, "--vary", "device=cpu,cuda", "--", "--layers", 3, 4)
    commands, _ = planned(project, *words)
    assert [line.split("--torch-threads 1 ")[1] for line in commands] == [
        "--device cpu --layers 3 4",
        "--device cuda --layers 3 4",
    ]
    words = (*GRID, "--seeds", 1, "--ray-address", cluster.address, *QUICK, "--layers", 3, 4)
    end(start(project, *words))
    assert "1 of 1 runs are finished" in end(start(project, *words))
    (again,), _ = planned(project, "--like", "runs", "--runs-dir", "new")
    assert "--layers 3 4" in again


def test_another_script_is_a_run_of_its_own_with_its_own_modules(project, cluster):
    """my_sac.py stands in a folder of its own, beside other sparse_utils.py."""
    (project / "mine").mkdir()
    shutil.copy(project / "sac_tar.py", project / "mine" / "my_sac.py")
    shutil.copy(project / "sparse_utils.py", project / "mine")
    (project / "mine" / "runs").mkdir()
    shutil.copy(project / "runs" / "record.py", project / "mine" / "runs")
    words = (*GRID, "--seeds", 1, "--ray-address", cluster.address, "--script", "sac_tar.py")
    end(start(project, *words, *QUICK))
    commands, text = planned(project, *words, "mine/my_sac.py", "--any-code", *QUICK)
    assert "1 of 2 runs are finished" in text and [line.split()[0] for line in commands] == ["mine/my_sac.py"]
    (project / "mine" / "sparse_utils.py").write_text(UTILS.replace("256", "64"))
    assert "2 of 2 runs done" in end(start(project, *words, "mine/my_sac.py", *QUICK))
    configs = [json.loads(path.read_text()) for path in (project / "runs").glob("*/config.json")]
    assert {config["script"]: config["args"]["hidden_size"] for config in configs} == {"sac_tar": 256, "my_sac": 64}
    words = (*GRID, "--seeds", 1, "--script", "mine/my_sac.py", "sac_tar.py", *QUICK)
    assert "2 of 2 runs are finished" in planned(project, *words)[1]
    # and --like finds each one's script, also where a folder is all config.json
    for path in (project / "runs").glob("*/config.json"):
        (project / "public" / path.parent.name).mkdir(parents=True)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"published": True}))
        shutil.copy(path, project / "public" / path.parent.name)
    like = ("--like", "public", "--runs-dir", "new")
    assert "there is no script my_sac.py" in end(start(project, *like), code=2)
    commands, _ = planned(project, *like, "--script", "mine/my_sac.py")
    assert sorted(line.split()[0] for line in commands) == ["mine/my_sac.py", "sac_tar.py"]
    both = ("--script", "mine/my_sac.py", "--published", "public")
    assert "2 of 2 runs are finished" in planned(project, *like, *both)[1]


def test_a_finished_run_of_other_code_is_not_done_while_comments_are_no_code(project, cluster):
    words = (*GRID, "--seeds", 1, "--ray-address", cluster.address)
    end(start(project, *words, *QUICK))
    edit(project / "sac_tar.py", "        step += 1\n", "        # one more\n        step += 1  # at a time\n")
    edit(project / "sac_tar.py", "class Args:\n", 'class Args:\n    """The flags."""\n\n')
    text = planned(project, *words, *QUICK)[1]
    assert "1 of 1 runs are finished" in text and "other code" not in text
    for file, old, new in (
        ("sac_tar.py", "        step += 1 ", "        step += 2 - 1 "),
        ("sparse_utils.py", "256", "250 + 6"),
    ):
        edit(project / file, old, new)
        count = len(finals(project))
        text = planned(project, *words, *QUICK)[1]
        assert "0 of 1 runs are finished" in text
        assert f"runs of other code found: {count}; --any-code counts and resumes them too\n" in text
        text = planned(project, *words, "--any-code", *QUICK)[1]
        assert "1 of 1 runs are finished" in text and "other code" not in text
        assert "1 of 1 runs done" in end(start(project, *words, *QUICK))
        assert "1 of 1 runs are finished" in end(start(project, *words, *QUICK))
        assert finals(project) == names(1) * (count + 1)
    assert [what for what, _, _ in journal(project)] == ["--start"] * 3


def test_an_unfinished_run_of_other_code_is_left_and_one_of_two_codes_does_not_count(project, cluster):
    words = (*GRID, "--seeds", 1, "--ray-address", cluster.address, "--retries", 0)
    flags = (*QUICK, "--crash-at", 5)
    end(start(project, *words, *flags), code=1)
    (folder,) = (path.parent.relative_to(project) for path in project.glob("runs/*/checkpoint.pt"))
    resume = [f"sac_tar.py --resume {folder}"]
    assert planned(project, *words, *flags)[0] == resume
    edit(project / "sac_tar.py", "step % 3", "step % 4")
    (command,), text = planned(project, *words, *flags)
    assert "--resume" not in command and "runs of other code found: 1;" in text
    assert planned(project, *words, "--any-code", *flags)[0] == resume
    end(start(project, *words, "--any-code", *flags))
    assert planned(project, *words, "--any-code", *flags)[0] == []
    (command,), text = planned(project, *words, *flags)  # the segment before the edit is of other code
    assert "--resume" not in command and "runs of other code found: 1;" in text


def test_code_that_is_edited_while_the_sweep_runs_does_not_count_as_the_code_it_began_with(project, cluster):
    process = start(project, *GRID, "--seeds", 1, "--ray-address", cluster.address, "--", "--seconds-per-step", 0.5)
    wait_for(lambda: journal(project))
    (config,) = project.glob("runs/*/config.json")
    (segment,) = json.loads(config.read_text())["segments"]
    edit(config, segment["code"], "fedcba987654")  # as if it had read an edited file
    assert "no folder with a final.pt records the flags and code" in end(process, code=1)


def test_failures_are_retried_from_the_checkpoint_and_end_with_their_last_line(project, cluster):
    """Every run is killed at step 5 and goes on from step 3; seed 2 is bad input, which is not tried again."""
    words = ("--seeds", 2, "--ray-address", cluster.address, "--method", "dense", "tar", "--env-id", "E")
    flags = ("--", "--crash-at", 5, "--seconds-per-step", 0.01)
    text = end(start(project, *words, "--retries", 1, *flags, "--bad-seed", 2), code=1)
    assert finals(project) == ["E__dense__s0.9__1", "E__tar__s0.9__1"]
    assert sorted(line[0::2] for line in journal(project)) == [("--resume", "3")] * 2 + [("--start", "0")] * 2
    assert text.count("failed: exit code 2: error: bad input (runs/sweep_logs/sac_tar__E__") == 2
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


def test_the_published_runs_of_this_repository_can_be_planned_again():
    """Whatever flags have come and gone since they were made."""
    args = sweep.Args(like=str(ROOT / "runs" / "published"), published=str(ROOT / "runs" / "published"), any_code=True)
    runs = sweep.plan(args, [])
    assert len(runs) >= 66 and all(run.next_command("nowhere") is None for run in runs)


def test_flags_of_a_method_that_is_not_known_here_all_count():
    args = {"method": "mine", "actor_method": None, "critic_method": None, "reserve": 0.05, "rewire_every": 10}
    assert record.identity(args)["reserve"] == 0.05 and "reserve" not in record.identity(args | {"method": "static"})
