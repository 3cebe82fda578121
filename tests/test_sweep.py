"""lab/sweep.py: which runs a grid has, when one counts as finished, and that each ends once, whatever is killed."""

import errno
import functools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import sac_tar
import td3_tar
from lab import baselines, record, sweep

ROOT, START_RAY = Path(__file__).parent.parent, sweep.start_ray
code_of = functools.cache(lambda script: record.code_hash(Path(script.__file__)))

# Stands in for the scripts, and starts without torch: config.json, checkpoint.pt, final.pt, --resume and SIGTERM are as
# theirs, with episodes of two steps. Its journal says start, resume and end.
FAKE = """
import json, os, signal, sys, time, extra
from dataclasses import dataclass
from pathlib import Path

@dataclass
class Args:
    env_id: str = "E"; seed: int = 1; total_timesteps: int = 1000; learning_starts: int = 1; runs_dir: str = "runs"
    method: str = "tar"; critic_method: str | None = None; sparsity: float = 0.9; critic_sparsity: float | None = None
    criterion: str = "random"; distribution: str = "er"; prune_at: int | None = None; reserve: float = 0.1
    gamma: float = 0.99; tau: float = 0.005; hidden_size: int = extra.SIZE; layers: tuple[int, ...] = (2, 2)
    device: str = "cpu"; torch_threads: int = 1; eval_episodes: int = 1
    pause: float = 0.0; crash_at: int = -1; refused: str = ""; forgets: str = "pause"
    load: str | None = None; resume: str | None = None; evaluate: str | None = None

if __name__ == "__main__":
    flags = dict(zip((word[2:].replace("-", "_") for word in sys.argv[1::2]), sys.argv[2::2]))
    if "resume" in flags:
        folder = Path(flags["resume"])
        config, step = json.loads((folder / "config.json").read_text()), int((folder / "checkpoint.pt").read_text())
    else:
        args = vars(Args()) | {name: type(getattr(Args, name))(value) for name, value in flags.items()}
        args |= {"critic_method": "tar", "critic_sparsity": args["sparsity"], "prune_at": args["learning_starts"]}
        if str(args["seed"]) in args["refused"]:
            sys.exit(print("error: this seed cannot work\\n 45%|bar|") or 2)
        args[args["forgets"]] = args["pause"]
        config = {"script": Path(__file__).stem, "args": args, "segments": []}
        folder, step = Path(args["runs_dir"]) / f"{args['env_id']}-{args['seed']}-{time.time_ns()}", 0
        folder.mkdir()
    config["segments"].append({"code": Path(__file__).with_name("code").read_text()})
    (folder / "config.json").write_text(json.dumps(config))
    args, stops, journal = config["args"], [], open(folder.parent / "journal", "a", buffering=1)
    signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
    print("resume" if "resume" in flags else "start", file=journal)
    while step < args["total_timesteps"] and not (stops and step % 2 == 0):
        time.sleep(args["pause"]); step += 1
        if step == args["crash_at"] and "resume" not in flags:
            os.kill(os.getpid(), print("step", step, "and then the power failed", end="\\r", flush=True) or 9)
        if step % 2 == 0: (folder / "checkpoint.pt").write_text(str(step))
    print("end", file=journal); sys.exit(143) if stops else (folder / "final.pt").touch()
"""


def inline_ray(args):
    """Ray's part in a sweep, one task after another in this process."""
    remote = lambda **_: lambda task: SimpleNamespace(remote=functools.partial(functools.partial, task))  # noqa: E731
    part = {"remote": remote, "wait": lambda refs, **_: (refs[:1], refs[1:]), "get": lambda ref: ref()}
    return SimpleNamespace(**part, cancel=lambda ref: None, exceptions=SimpleNamespace(RayError=RuntimeError))


def write_fake(code=FAKE, extra="SIZE = 8\n"):
    Path("fake.py").write_text(code)
    Path("extra.py").write_text(extra)
    Path("code").write_text(record.code_hash(Path("fake.py")))


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """A sweep with these words in a folder with fake.py, without Ray: its exit code, and all that it says."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *shlex.split(" ".join(words))])
        try:
            code = sweep.main()
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "start_ray", inline_ray)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    sweep.load.cache_clear()
    Path("runs").mkdir()
    write_fake()
    return call


def commands(text):
    return [line.split(" ", 2)[2] for line in text.splitlines() if line.startswith("python ")]


def did():
    return Path("runs/journal").read_text().split() if Path("runs/journal").exists() else []


def write_run(folder, script=sac_tar, files=("final.pt",), **flags):
    """A run folder as the script leaves it. Returns the script's name and the flags that make it this run."""
    args = record.settle(script.Args(**{"env_id": "Pendulum-v1"} | flags))
    config = {"script": script.__name__, "args": sweep.as_recorded(args), "segments": [{"code": code_of(script)}]}
    Path(folder).mkdir(parents=True)
    for name, text in {"config.json": json.dumps(config), **dict.fromkeys(files, "")}.items():
        Path(folder, name).write_text(text)
    return script.__name__, record.identity(config["args"])


def one(script="sac_tar.py", flags="", **chosen):
    """The only run of a grid."""
    defaults = {"env_id": ("Pendulum-v1",), "method": ("tar",), "seeds": 1}
    (run,) = sweep.plan(sweep.Args(script=(script,), **defaults | chosen), flags.split())
    return run


def next_of(run, folder="runs"):
    return run.next_command(list(record.configs(Path(folder))))


def test_the_grid_is_seed_by_seed_with_dense_once_and_tiny_once_per_sparsity(cli):
    words = "--script td3_tar.py --env-id E --method dense tiny static --base random+er snip+global --sparsity 0.9 0.95"
    code, text = cli(words, "--first-seed 4 --seeds 5 --dry-run -- --hidden-size 32")
    bases = ("tiny", "static --criterion random --distribution er", "static --criterion snip --distribution global")
    arms = ["dense", *(f"{base} --sparsity {sparsity}" for sparsity in (0.9, 0.95) for base in bases)]
    rest = "--total-timesteps 1000000 --runs-dir runs --torch-threads 1 --hidden-size 32"
    expected = [f"--env-id E --method {arm} --seed {seed} {rest}" for seed in (4, 5) for arm in arms]
    assert code == 0 and commands(text) == expected and not list(Path("runs").iterdir())


def test_any_flag_is_an_axis_and_multiplies_only_the_runs_on_which_it_acts(cli, monkeypatch):
    axes = "--vary reserve=0.05,0.30 autotune=True,false critic-method=none,set"
    _, text = cli("--env-id E --method static tar --seeds 1 --dry-run", axes)
    rest = (
        "--criterion magnitude --distribution global --sparsity 0.9 --seed 1 --total-timesteps 1000000 --runs-dir runs"
    )
    arms = (("static", ""), ("tar", " --reserve 0.05"), ("tar", " --reserve 0.30"))
    more = [f"{tune}{critic}" for tune in ("--autotune", "--no-autotune") for critic in ("", " --critic-method set")]
    expected = [f"{method} {rest} --torch-threads 1{reserve} {words}" for method, reserve in arms for words in more]
    assert commands(text) == [f"--env-id E --method {words}" for words in expected]
    _, text = cli("--env-id E --method dense tiny tar --seeds 1 --dry-run --vary prune-at=6000,7000")
    assert [re.search(r"--method (\w+)", command)[1] for command in commands(text)] == ["dense", "tiny", "tar", "tar"]
    assert ["--prune-at" in command for command in commands(text)] == [False, False, True, True]
    # one run has one log, and so one lock, in every sweep
    run, of_more = one(), sweep.plan(sweep.Args(env_id=("Pendulum-v1",), vary=("reserve=0.1,0.3",)), [])
    assert run.log.name.startswith("sac_tar__Pendulum-v1__tar__magnitude__global__0.9__1__")
    assert run.log in [other.log for other in of_more] and len({other.log for other in of_more}) == 15
    # the sparsity of an actor that is dense is that of its critics
    runs = sweep.plan(sweep.Args(method=("dense",), seeds=1, sparsity=(0.8, 0.95), vary=("critic_method=static",)), [])
    assert [run.args["critic_sparsity"] for run in runs] == [0.8, 0.95]
    assert all(f"--sparsity {run.args['critic_sparsity']}" in shlex.join(run.command) for run in runs)
    _, text = cli("--script fake.py --seeds 1 --method tar --vary device=cpu --dry-run -- --layers 3 4")
    assert commands(text)[0].endswith("--torch-threads 1 --device cpu --layers 3 4")
    _, text = cli("--script fake.py --seeds 1 --method tar --vary 'layers=3 4,5' --dry-run")
    assert [command.rpartition(" --layers ")[2] for command in commands(text)] == ["3 4", "5"]
    monkeypatch.setattr(record.torch.cuda, "is_available", lambda: False)  # which the nodes of a cluster may have
    _, text = cli(f"--script {ROOT}/sac_tar.py --seeds 1 --method tar --dry-run -- --device cuda")
    assert commands(text)[0].endswith(" --device cuda")


@pytest.mark.parametrize("row", """
--base random | --base must be <criterion>+<distribution>
--seeds 3 --first-seed 4 | --first-seed must be from 1 to --seeds 3, got 4
--ray-address auto --cores 2 | --cores must be above 0, without --ray-address
--script sac_tar.py ./fake.py mine/fake.py | --script must be files of different names
--script open.py | missing 1 required positional argument: 'env_id'
--vary reserve=0.1, | --vary is <name>=<value>,<value>
--vary reserve=0.1 --vary=tau=0.1 | --vary is given twice; put all its values behind one
--seeds 1 --total_timesteps 9 --total-timesteps 8 | --total-timesteps is given twice; put
--vary no-such-flag=3 | --vary no_such_flag: sac_tar.py has no such flag
--vary checkpoint_frequency=3 | --vary checkpoint_frequency: the sweep sets it itself, or it changes
--vary autotune=true -- --no-autotune | --no-autotune is for the sweep to set
--vary active_width=64,512 | --active-width must be from 1 to --hidden-size 256, got 512
--method tar cht -- --rewire-every 2000000 | --method cht rewires every 2000000 steps
--like runs | --like must be a folder of runs, each a folder with a config.json or an entry of its runs.json
--vary alpha=0.05,0.5 | --vary alpha: it makes no difference to any of these runs
--vary hidden_size=32,large | sac_tar.py --help
-- --no-such-flag 3 | sac_tar.py --help
""".strip().splitlines())  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(cli, row):
    Path("open.py").write_text(FAKE.replace('env_id: str = "E"', "env_id: str"))
    words, sentence = row.split(" | ")
    code, text = cli("--dry-run", words)
    assert code == 2 and sentence in text and not list(Path("runs").iterdir())
    assert (text.startswith("error: ") and text.count("\n") == 1) or "--help" in sentence  # tyro says it in a box


def test_neither_a_plan_nor_the_flags_need_ray(cli, monkeypatch):
    program = f"import sys; sys.modules['ray'] = None; sys.path.insert(0, {str(ROOT)!r}); from lab import sweep"
    words = [sys.executable, "-c", f"{program}; sweep.main()", "--script", "fake.py", "--seeds", "1", "--dry-run"]
    assert len(commands(subprocess.check_output(words, text=True))) == 2
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sweep, "start_ray", START_RAY)
    assert "a sweep needs Ray; `pip install -r lab/requirements.txt`" in cli("--script fake.py")[1] and not did()


def test_a_folder_that_cannot_be_made_is_an_error(cli):
    code, text = cli("--script fake.py --runs-dir /dev/null/runs")
    assert code == 2 and "error: cannot make /dev/null/runs/sweep_logs (Not a directory); choose another" in text


def test_a_run_is_recognised_by_its_settled_flags_and_only_by_them(cli):
    for method in baselines.METHODS:
        write_run(f"{method}/a", method=method, sparsity=0.5, learning_starts=40, total_timesteps=10_000)

        def known(flags="", sparsity=0.5, method=method):
            chosen = {"method": (method,), "sparsity": (sparsity,), "total_timesteps": 10_000, "any_code": True}
            return next_of(one(flags=f"--learning-starts 40 {flags}", **chosen), method) is None

        assert known() and known("--prune-at 40 --checkpoint-frequency 20")
        assert not known("--prune-at 41") and not known("--gamma 0.9")
        assert known(sparsity=0.6) == (method == "dense")
        assert known("--reserve 0.3") == (method not in ("tar", "tar_ch", "uniform"))
        assert known("--rewire-every 9") == (method not in baselines.GROWTHS)
    path = Path(method, "a", "config.json")
    path.write_text(path.read_text().replace('"n_step": 1, ', ""))  # as of a run that is older than the flag
    assert known() and not known("--n-step 3")


def test_a_run_counts_when_finished_and_is_resumed_from_its_newest_checkpoint(cli):
    run = one()
    write_run("runs/0", files=())  # an orphan has nothing to continue
    assert next_of(run) == run.command
    for name, flags in (("1", {}), ("2", {}), ("3", {"seed": 2}), ("mine", {"gamma": 0.99})):
        write_run(f"runs/{name}", files=["final.pt" if flags else "checkpoint.pt"], **flags)
    Path("runs/mine/config.json").write_text(Path("runs/mine/config.json").read_text().replace("sac_tar", "mine", 1))
    os.utime("runs/1/checkpoint.pt", (time.time() + 9,) * 2)
    assert next_of(run) == [run.command[0], "--resume", "runs/1"]
    other = one(flags="--checkpoint-frequency 20 --eval-frequency 5000 --no-capture-video")
    assert next_of(other) == [*next_of(run), "--no-capture-video", "--checkpoint-frequency", "20"]
    write_run("runs/5")
    assert next_of(run) is None


def test_code_decides_and_comments_are_no_code(cli):
    words = "--script fake.py --method tar --seeds 1 --total-timesteps 4"
    assert cli(words)[0] == 0
    write_fake(FAKE.replace("step += 1", "step += 1  # one more"), "# the size\nSIZE = 8\n")
    assert cli(words, "--dry-run")[1] == "\n1 of 1 runs are finished, 0 will be resumed\n"
    write_fake(extra="SIZE = 4 + 4\n")
    other = "0 of 1 runs are finished, 0 will be resumed\nruns of other code found: 1; --any-code counts and resumes"
    assert other in cli(words, "--dry-run")[1]
    assert cli(words, "--dry-run --any-code")[1] == "\n1 of 1 runs are finished, 0 will be resumed\n"
    (final,) = Path().glob("runs/*/final.pt")
    final.unlink()
    # a checkpoint of other code is left, and a run that was resumed with other code does not count
    assert other in cli(words, "--dry-run")[1]
    assert commands(cli(words, "--dry-run --any-code")[1]) == [f"--resume runs/{final.parent.name}"]
    assert "1 of 1 runs done" in cli(words, "--any-code")[1] and did() == ["start", "end", "resume", "end"]
    assert other in cli(words, "--dry-run")[1]


def test_a_script_with_copies_of_its_own_is_another_run(cli):
    """It is judged by its own lab/, and the project's modules are there again afterwards."""
    shutil.copytree(ROOT / "lab", "lab", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "sparse_utils.py", ".")
    shutil.copy(ROOT / "sac_tar.py", "my_sac.py")
    before = {name: sys.modules[name] for name in ("sparse_utils", "lab", "lab.record", "lab.kernels")}
    assert one("my_sac.py").code == one().code  # they are equal so far
    Path("lab/kernels/kernels.cpp").write_text("int changed;")
    assert one("my_sac.py").code != one().code
    Path("lab/baselines.py").write_text(Path("lab/baselines.py").read_text().replace("int = 1000", "int = 77"))
    sweep.load.cache_clear()
    both = [one(name, "--rewire-every 5") for name in ("my_sac.py", "sac_tar.py")]
    assert [run.args["rewire_every"] for run in both] == [77, 1000]  # tar does not rewire, so it is at the default
    one("fake.py")
    assert before == {name: sys.modules.get(name) for name in before}  # and of the copies and extra.py nothing is left
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
    left = {name for name, file in files.items() if Path.cwd() in Path(file).parents}
    assert left == {f"{Path.cwd()}/my_sac.py", f"{Path.cwd()}/fake.py"}


def test_a_file_to_load_is_an_axis_and_its_settled_value_a_flag_again(cli):
    """A run is known by the file's path and hash."""
    Path("my").mkdir()
    Path("my/a.pt").write_text("weights")
    plain, loaded = sweep.plan(sweep.Args(("fake.py",), method=("tar",), seeds=1, vary=("load=none,my/a.pt",)), [])
    settled = record.with_hash("my/a.pt")
    assert "--load" not in plain.command and loaded.command[-2:] == ["--load", "my/a.pt"]
    assert plain.log != loaded.log
    Path("runs/a").mkdir()
    config = {"script": "fake", "args": loaded.args, "segments": [{"code": loaded.code}]}
    Path("runs/a/config.json").write_text(json.dumps(config))
    (again,) = sweep.plan(sweep.Args(like="runs"), [])
    assert again.args == loaded.args and f"--load {settled}" in shlex.join(again.command)


def test_a_flag_that_was_none_though_it_has_a_default_is_given_again(cli):
    write_fake(FAKE.replace("pause: float =", "pause: float | None ="))
    (run,) = sweep.plan(sweep.Args(("fake.py",), method=("tar",), seeds=1), ["--pause", "None"])
    Path("runs/a").mkdir()
    Path("runs/a/config.json").write_text(json.dumps({"script": "fake", "args": run.args, "segments": []}))
    (again,) = sweep.plan(sweep.Args(like="runs"), [])
    assert again.args == run.args and "--pause None" in shlex.join(again.command)


def test_every_run_of_a_folder_can_be_planned_again_and_counted(cli):
    kinds = [
        {"method": "dense"}, {"method": "tiny", "sparsity": 0.8}, {"prune_at": 30_000}, {"reserve": 0.3, "gamma": 0.9},
        {"critic_method": "dense"}, {"method": "dense", "critic_method": "static", "critic_sparsity": 0.95},
        {"critic_sparsity": 0.5}, {"method": "rigl", "regrow": False, "save_buffer": False}, {"active_width": "auto"},
        {"method": "set", "critic_method": "chts", "drop_criterion": "mest"}, {"seed": 3, "checkpoint_frequency": 9},
        {"method": "static", "density_start": 0.5, "final_prune_at": 39_000}, {"n_step": 3, "exp_name": "mine"},
    ]  # fmt: skip
    both = (sac_tar, td3_tar) * 7
    recorded = [write_run(f"folders/{n}", both[n], total_timesteps=40_000, **kind) for n, kind in enumerate(kinds)]
    Path("grid").mkdir()
    Path("grid/runs.json").write_text(json.dumps({path.name: had for path, had in record.configs(Path("folders"))}))
    for folder in ("folders", "grid"):
        runs = sweep.plan(sweep.Args(like=folder), [])
        found = [(Path(run.command[0]).stem, run.args) for run in runs]
        assert all(had in recorded for had in found) and len(found) == len(recorded)
        assert runs[-1].args["seed"] == 3 and sum("--prune-at" in run.command for run in runs) == 1
        assert "13 of 13 runs are finished" in cli(f"--dry-run --like {folder} --published {folder}")[1]
    lines = commands(cli("--like grid --dry-run -- --tau 0.01")[1])
    assert len(lines) == 13 and all(line.endswith(" --tau 0.01") for line in lines)
    assert cli("--like grid --dry-run --script nope/sac_tar.py")[0] == 2
    for words in ("--seeds 2", f"--seeds {sweep.Args.seeds}", "--first-seed=1"):  # a default that is given, too
        flag = re.match("[-a-z]+", words)[0]
        assert f"{flag} is of a grid, and with --like each run has" in cli(f"--like grid {words} --dry-run")[1]
    Path("gone").mkdir()
    Path("gone/runs.json").write_text(re.sub('"(sac|td3)_tar"', '"no_script"', Path("grid/runs.json").read_text()))
    code, output = cli("--like gone --dry-run")
    assert code == 2 and output.count("is left out, since there is no script no_script.py") == 13
    assert "no run of gone can be run again here" in output
    Path("folders/0/final.pt").rename("folders/0/checkpoint.pt")  # an unfinished run is nothing that was published
    assert "12 of 13 runs are finished, 0 will be" in cli("--like folders --published folders --dry-run")[1]


def test_the_published_grids_of_this_repository_can_be_planned_again(cli):
    """One run of each kind, but for those that begin from a file, and for those with a flag that is no more or of an
    edited copy of a script, which are named."""
    same, kinds = {"seed": 1, "env_id": "E", "exp_name": "x"}, {}
    for path, config in (one for folder in (ROOT / "runs").glob("*") for one in record.configs(folder)):
        if not config["args"].get("load"):
            kinds[str(config["args"] | same)] = path.name, config
    Path("runs/runs.json").write_text(json.dumps(dict(kinds.values())))
    scripts = {name: (ROOT / f"{config['script']}.py").exists() for name, config in kinds.values()}
    gone = [name for name, config in kinds.values() if not scripts[name] or "critic_init" in config["args"]]
    count, output = len(kinds) - len(gone), cli("--dry-run --like runs --any-code")[1]
    assert kinds and f"{count} of {count} runs are finished" in output
    assert all(f"{name} is left out, since " in output for name in gone)


def test_failures_are_tried_again_from_the_checkpoint_and_end_with_their_last_line(cli):
    """The first run is killed at step 5 and goes on from step 4. The second one is refused and not tried again."""
    words = "--script fake.py --method tar --total-timesteps 8 --retries 2 --seeds"
    for finished in (0, 1):  # what is finished is not run again, and what has failed is
        code, text = cli(words, "2 -- --crash-at 5 --refused 2")
        assert code == 1 and f"{finished} of 2 runs are finished" in text and "1 of 2 runs done, 0 running, 1 f" in text
        again = "done despite exit code -9: step 5 and then the power failed (runs/sweep_logs/"
        assert (again in text) == (not finished) and did() == ["start", "resume", "end"]
        said = "failed: exit code 2: error: this seed cannot work (runs/sweep_logs/fake__"  # at once and at the end
        assert text.count(said) == 2 and text.index(said) < text.index("1 failed, time left")
    (log,) = Path().glob("runs/sweep_logs/fake__Hopper-v4__tar__magnitude__global__0.9__2__*")
    assert log.read_text().count("this seed cannot work") == 2
    assert "failed: exit code -9: step 1 and" in cli(words, "1 -- --crash-at 1")[1] and did()[3:] == ["start"] * 3
    said = "it ended without a final.pt, or its folder records other flags or code"
    assert said in cli(words, "1 -- --forgets gamma")[1] and len(did()) == 8


def test_a_sweep_stops_when_its_first_runs_refuse_the_same(cli):
    words = "--script fake.py --method tar --total-timesteps 4 --seeds"
    assert cli(words, "1 -- --refused 1")[0] == 2
    code, text = cli(words, "5 -- --refused 12345")
    assert code == 2 and "error: the sweep stops, since its first runs refuse their flags; exit code 2: error" in text
    assert sum(path.stat().st_size > 0 for path in Path().glob("runs/sweep_logs/*")) == 1 + 2
    code, text = cli(words, "5 -- --refused 2345")  # one run ends well
    assert code == 1 and "1 of 5 runs done, 0 running, 4 failed" in text


def test_ray_starts_here_or_joins_a_cluster_that_answers(cli, monkeypatch, capsys):
    asked = []
    ray = SimpleNamespace(init=lambda address, **how: asked.append((address, how.get("num_cpus"))))
    monkeypatch.setitem(sys.modules, "ray", ray)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address, cores in ((None, 3), (None, None), ("auto", None), (f"127.0.0.1:{port}", None)):
            assert START_RAY(sweep.Args(ray_address=address, cores=cores)) is ray
        every = len(os.sched_getaffinity(0))
        assert asked == [("local", 3), ("local", every), ("auto", None), (f"127.0.0.1:{port}", None)]
    with pytest.raises(SystemExit):
        START_RAY(sweep.Args(ray_address=f"127.0.0.1:{port}"))
    assert "Ray does not start" in capsys.readouterr().err and len(asked) == 4


def test_code_that_is_edited_during_a_sweep_starts_and_resumes_no_run(cli, monkeypatch):
    attempt = sweep.attempt
    monkeypatch.setattr(sweep, "attempt", lambda *of: (attempt(*of), write_fake(extra="SIZE = 16\n"))[0])
    words = "--script fake.py --method tar --total-timesteps 8 --seeds"
    code, text = cli(words, "2")
    assert code == 1 and did() == ["start", "end"] and "1 of 2 runs done, 0 running, 1 failed" in text
    assert text.count("failed: the code was edited since the sweep began; start the sweep anew (runs/") == 2
    write_fake()
    code, text = cli(words, "3 --first-seed 3 -- --crash-at 5")
    assert code == 1 and did()[2:] == ["start"] and "failed: the code was edited since the sweep began" in text


def test_a_full_disk_is_waited_for_and_a_record_that_cannot_be_read_fails(cli, monkeypatch):
    attempt, full = sweep.attempt, [OSError(errno.ENOSPC, "No space left on device")]

    def one_attempt(*of):
        if full:
            raise full.pop()
        return attempt(*of)

    def attempt_beside_a_broken_record(*of):
        Path("runs/broken").mkdir()
        Path("runs/broken/config.json").touch()
        return attempt(*of)

    monkeypatch.setattr(sweep, "attempt", one_attempt)
    monkeypatch.setattr(sweep, "WAIT", 0)
    words = "--script fake.py --method tar --total-timesteps 4 --seeds"
    code, text = cli(words, "1 --retries 0")
    assert code == 0 and "waiting, since [Errno 28] No space left on device (runs/" in text and not full
    monkeypatch.setattr(sweep, "attempt", lambda *_: sys.exit(1))  # as Ray does in a node that is stopped
    with pytest.raises(SystemExit):
        sweep.execute(one("fake.py", total_timesteps=6), "runs", 0, ".")
    monkeypatch.setattr(sweep, "attempt", attempt_beside_a_broken_record)
    code, text = cli(words, "2")
    assert code == 1 and "failed: a config.json in runs cannot be read; a new sweep names it (runs/" in text
    code, text = cli(words, "2")
    assert code == 2 and "error: cannot read runs/broken/config.json (" in text


def test_a_run_that_another_process_trains_is_waited_for(cli, monkeypatch):
    attempt, answers = sweep.attempt, [(75, "error: another process is running it")] * 2
    monkeypatch.setattr(sweep, "attempt", lambda *of: answers.pop() if answers else attempt(*of))
    monkeypatch.setattr(sweep, "WAIT", 0)
    code, text = cli("--script fake.py --method tar --total-timesteps 4 --seeds 1 --retries 0")
    assert code == 0 and not answers and "1 of 1 runs done, 0 running, 0 failed" in text
    assert text.count("waiting, since error: another process is running it (runs/sweep_logs/fake__") == 1
    (log,) = Path().glob("runs/sweep_logs/*")
    assert log.read_text().startswith("python fake.py --env-id Hopper-v4 --method tar ")


def test_a_run_that_outlives_its_killed_task_is_waited_for_and_then_resumed(cli):
    run = one("fake.py", "--pause 0.5", total_timesteps=6)
    Path("runs/sweep_logs").mkdir()
    again = functools.partial(sweep.execute, run, "runs", 0, ".")
    first = multiprocessing.get_context("spawn").Process(target=again)
    first.start()
    while first.is_alive() and not did():
        time.sleep(0.05)
    assert sweep.is_running(run.log) and again() == ("busy", "")
    first.kill()
    first.join()
    while (outcome := again())[0] == "busy":
        pass
    assert outcome == ("done", "") and not sweep.is_running(run.log)
    assert did() == ["start", "end", "resume", "end"]  # at the end of its episode, before the next one


def test_a_real_sweep_with_ray_is_stopped_goes_on_and_ends(cli):
    """fake.py ends, then td3_tar.py is stopped: by SIGTERM where SIGINT is ignored, as in a shell's background."""
    words = "--script fake.py td3_tar.py --env-id Pendulum-v1 --method tar --seeds 1 --total-timesteps 3000 --cores 1"
    words += " -- --learning-starts 300 --hidden-size 16 --eval-episodes 1"
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, str(ROOT / "lab/sweep.py"), *words.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = one("td3_tar.py", words.split(" -- ")[1], total_timesteps=3000).log
    while process.poll() is None and not (log.exists() and "Topology at step 300" in log.read_text()):
        time.sleep(0.05)
    process.terminate()
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "1 of 2 runs done, 1 running, 0 failed" in text, text
    assert list(Path().glob("runs/*td3*/checkpoint.pt")) and not list(Path().glob("runs/*td3*/final.pt"))
    assert "1 of 2 runs are finished, 1 will be resumed" in cli(words)[1] and "go on with" in log.read_text()
    assert len(list(Path().glob("runs/*/final.pt"))) == 2 and "2 of 2 runs are finished" in cli(words)[1]
