"""Interrupted runs go on as if nothing had happened; files that cannot be used are refused; saved policies are run."""

import dataclasses
import errno
import functools
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import REPLACED, same
from test_run import events, load, main, refused, scalars

import lab.checkpoints
import lab.run
import sac_tar
import sparse_utils
import td3_tar
from lab import baselines, edits, kernels, record
from lab.replay import ReplayBuffer

SAC, TD3 = Path(sac_tar.__file__), Path(td3_tar.__file__)


def rows_of(run_dir):
    files = lab.checkpoints.replay_files(run_dir)
    return torch.cat([load(path) for path in files]), max(stop for _, stop in files.values())


def assert_same_run(run_dir, undisturbed):
    """The same tensors, log, masks and replay rows, and nothing half written."""
    final, expected = (load(folder) for folder in (run_dir, undisturbed))
    assert same(final | {"args": 0}, expected | {"args": 0})
    assert scalars(run_dir) == scalars(undisturbed)
    for name in ("topology.json", "masks.pt"):
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes()
    args = [json.loads((folder / "config.json").read_text())["args"] for folder in (run_dir, undisturbed)]
    assert args[0] | {"runs_dir": ""} == args[1] | {"runs_dir": ""} and args[0]["resume"] is None
    assert not list(run_dir.rglob("*.tmp"))
    if final["args"]["save_buffer"]:
        stops = [stop for _, stop in lab.checkpoints.replay_files(run_dir).values()]  # what is overwritten is deleted
        assert min(stops) > max(stops) - final["args"]["buffer_size"]
        (rows, stop), (others, other_stop) = rows_of(run_dir), rows_of(undisturbed)
        both, kept = min(stop, other_stop), min(len(rows), len(others)) - abs(stop - other_stop)
        rows, others = (r[: len(r) - (end - both)][-kept:] for r, end in ((rows, stop), (others, other_stop)))
        assert kept > 20 and torch.equal(rows, others)  # files may begin and end at other steps


def again(script, run_dir, **changes):
    """Resume as the command line does."""
    asked = SimpleNamespace(evaluate=None, resume=str(run_dir))
    saved = lab.checkpoints.saved_args(script.Args, asked, Path(script.__file__))
    return script.train(script.Args(**asdict(saved) | changes))


def child(work):
    """Exit code of a process, a fork of this one, that does this work; -9 if it killed itself."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies(owner, name, call, work):
    """Do this work, and kill -9 before the given call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(owner, name, counted)  # in a child
    work()


DECAY = {"density_start": 0.5, "sparsity": 0.8, "total_timesteps": 210}
SCULPT = DECAY | {"final_prune_at": 110, "lr_cycles": 3}
DYNADIAG = {"criterion": "dynadiag", "prune_at": 100, "eval_frequency": 10}
CASES = {
    "plain": (sac_tar, (5, 35, 62, 111), {"checkpoint_frequency": 30}),
    "in the kernels": (td3_tar, (35, 62, 111), {"checkpoint_frequency": 30, "compute": "sparse"}),
    "late pruning by snip": (td3_tar, (85, 115), {"prune_at": 107, "criterion": "snip"}),
    "rigl": (sac_tar, (75, 135), {"method": "rigl", "rewire_every": 20, "drop_criterion": "soft"}),
    "rigl in the kernels": (
        td3_tar, (75, 135), {"method": "rigl", "rewire_every": 20, "compute": "sparse", "active_width": 12},
    ),
    "cht, some layers settled": (sac_tar, (135,), {"method": "cht", "rewire_every": 20, "sparsity": 0.8}),
    "sculpt": (td3_tar, (105, 125), SCULPT),
    "sculpt in the kernels": (sac_tar, (35, 115, 165), SCULPT | {"compute": "sparse"}),
    "a falling density": (sac_tar, (135,), DECAY | {"method": "chts", "rewire_every": 20, "compute": "sparse"}),
    "dynadiag": (td3_tar, (35, 92, 135), DYNADIAG | {"method": "tar"}),
    "dynadiag in the kernels": (sac_tar, (35, 92, 135), DYNADIAG | {"method": "static", "compute": "sparse"}),
    "a full buffer": (td3_tar, (143,), {"buffer_size": 40, "n_step": 3, "recent_fraction": 0.3, "recent_size": 20}),
    "other critics": (sac_tar, (100,), {"method": "dense", "critic_method": "tar", "init": "sparse"}),
    "odd frequencies": (sac_tar, (98,), {"policy_frequency": 3, "target_network_frequency": 2, "autotune": False}),
}  # fmt: skip


@pytest.mark.parametrize("script, deaths, flags", CASES.values(), ids=CASES)
def test_a_run_that_was_killed_ends_as_the_undisturbed_one(run, script, tmp_path, deaths, flags):
    """kill -9 as often as there are deaths, each after so many transitions, and each time on from the checkpoint."""
    flags = {"env_id": "Short-v0", "eval_frequency": 40, "checkpoint_frequency": 10} | flags
    undisturbed, begun = run(**flags, runs_dir=str(tmp_path / "a")), 0
    work = functools.partial(run, **flags, runs_dir=str(tmp_path / "b"))
    for death in deaths:
        assert child(functools.partial(dies, ReplayBuffer, "add", death - begun, work)) == -9
        (run_dir,) = (tmp_path / "b").iterdir()
        begun, work = load(run_dir / "checkpoint.pt")["replay"]["added"], functools.partial(again, script, run_dir)
        assert death - 31 < begun < death
    work()
    assert_same_run(run_dir, undisturbed)
    config = record.read_config(run_dir)
    assert len(config["segments"]) > 1 and len(record.codes(config)) == 1


def test_a_run_that_was_killed_while_it_wrote_ends_as_the_undisturbed_one(run, script, tmp_path):
    flags = {"env_id": "Short-v0", "checkpoint_frequency": 20, "method": "set", "rewire_every": 30, "buffer_size": 50}
    undisturbed = run(**flags, runs_dir=str(tmp_path / "a"))
    work = functools.partial(run, **flags, runs_dir=str(tmp_path / "b"))
    for name, call in (("fsync", 9), ("truncate", 1), ("replace", 3), ("fsync", 5), ("replace", 6), ("fsync", 7)):
        assert child(functools.partial(dies, os, name, call, work)) == -9
        (run_dir,) = (tmp_path / "b").iterdir()
        work = functools.partial(again, script, run_dir)
    work()
    assert_same_run(run_dir, undisturbed)


def test_training_may_grow_after_its_end_and_after_a_death(run, script, tmp_path):
    flags = {"env_id": "Short-v0", "checkpoint_frequency": 30, "compute": "sparse", "eval_frequency": 60}
    undisturbed = run(**flags, total_timesteps=250, runs_dir=str(tmp_path / "a"))
    assert child(functools.partial(run, **flags, total_timesteps=175, runs_dir=str(tmp_path / "b"))) == 0
    (run_dir,) = (tmp_path / "b").iterdir()
    assert (run_dir / "final.pt").exists()
    assert record.read_config(run_dir)["segments"][0]["total_timesteps"] == 175
    seconds = load(run_dir / "checkpoint.pt")["sps_seconds"]
    work = functools.partial(again, script, run_dir, total_timesteps=250)
    assert child(functools.partial(dies, ReplayBuffer, "add", 65, work)) == -9
    assert not (run_dir / "final.pt").exists()  # until it is finished, for the longer time too, which it now has
    again(script, run_dir)
    assert_same_run(run_dir, undisturbed)
    assert load(run_dir / "checkpoint.pt")["sps_seconds"] > seconds  # of all processes
    final, logged = load(run_dir), scalars(run_dir)
    again(script, run_dir)  # to resume a finished run changes nothing
    assert same(load(run_dir), final) and scalars(run_dir) == logged


def test_without_the_buffer_a_run_collects_anew_before_it_learns(run, script, monkeypatch, tmp_path, capsys):
    flags = {"save_buffer": False, "total_timesteps": 300, "env_id": "Short-v0", "checkpoint_frequency": 50}
    work = functools.partial(run, **flags, method="rigl", rewire_every=20)
    early = functools.partial(work, prune_at=80, runs_dir=str(tmp_path / "early"))
    assert child(functools.partial(dies, ReplayBuffer, "add", 75, early)) == -9
    assert list(tmp_path.glob("early/*/replay/*"))  # that of step 50, which pruning may need
    assert child(functools.partial(dies, ReplayBuffer, "add", 133, work)) == -9
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert not list(run_dir.glob("replay/*"))  # gone at step 100, after the pruning
    sampled, sample = [], ReplayBuffer.sample
    monkeypatch.setattr(ReplayBuffer, "sample", lambda rb, *of: sampled.append((of[2], rb.added)) or sample(rb, *of))
    again(script, run_dir)
    said = "warning: without its replay buffer the run does not learn until step 160; it ends at step 300"
    assert said in capsys.readouterr().out
    # 60 steps of --learning-starts, as at first; rewirings, of which the last is at 220, draw batches too
    assert sampled[0] == (161, 62) and len(sampled) == 300 - 161 + len((180, 200, 220))


def test_how_networks_are_computed_is_kept_unless_another_way_is_asked_for(run, script, monkeypatch, tmp_path):
    """--compute auto keeps its choice, though a measurement would choose otherwise now. Each way trains to the same."""
    undisturbed = run(env_id="Short-v0", sparsity=0.8, runs_dir=str(tmp_path / "a"))
    work = functools.partial(run, env_id="Short-v0", sparsity=0.8, compute="auto", checkpoint_frequency=10)
    for fast, at, flags in (
        (2.0, 75, {}),
        (0.5, 25, {}),
        (0.5, 25, {"compute": "sparse"}),
        (0.5, 5, {"compute": "auto"}),  # dies before its first checkpoint, which is still one of `sparse`
        (0.5, 25, {"compute": "auto"}),
    ):
        monkeypatch.setattr(kernels, "known_times", lambda *_, fast=fast: (fast, 1.0))
        assert child(functools.partial(dies, ReplayBuffer, "add", at, functools.partial(work, **flags))) == -9
        (run_dir,) = (tmp_path / "runs").iterdir()
        work = functools.partial(again, script, run_dir)
    work()
    everything = ["actor", "qf1", "qf2"]
    found = [(part["from_step"], part["in_kernels"]) for part in record.read_config(run_dir)["segments"]]
    assert found == [(0, everything), (70, everything), (90, everything), (110, []), (130, [])]
    final, expected = load(run_dir), load(undisturbed)
    assert same(final["masks"], expected["masks"])
    for key, tensor in expected["qf1_target"].items():
        torch.testing.assert_close(final["qf1_target"][key], tensor, rtol=1e-3, atol=1e-4)


def test_a_package_that_an_older_record_leaves_out_is_no_change(run, capsys):
    run_dir = run(env_id="Short-v0", total_timesteps=70)
    config = record.read_config(run_dir)
    del config["segments"][0]["versions"]["numpy"]
    (run_dir / "config.json").write_text(json.dumps(config))
    again(sac_tar, run_dir, total_timesteps=80)
    out = capsys.readouterr().out
    assert "the run's total_timesteps was 70 and is 80" in out and "the run's versions" not in out


def test_what_a_folder_has_lost_and_what_is_another_machine_is_said(run, script, capsys, monkeypatch):
    run_dir = run(env_id="Short-v0", checkpoint_frequency=30)
    (log,) = run_dir.glob("*tfevents*")
    os.truncate(log, 100)
    monkeypatch.setattr(lab.run.mujoco, "__version__", "9.9")
    monkeypatch.setattr(lab.run, "code_hash", lambda *_: "0" * 12)
    monkeypatch.setattr(lab.run, "processor", lambda: "an abacus")
    config = json.loads((run_dir / "config.json").read_text())
    config["segments"][0] |= {"device": "a GPU", "in_kernels": ["actor"]}
    (run_dir / "config.json").write_text(json.dumps(config))
    again(script, run_dir, torch_threads=2, checkpoint_frequency=40)
    torch.set_num_threads(1)
    out = capsys.readouterr().out
    assert "the run's device was a GPU and is cpu from" in out and "in_kernels was ['actor'] and is [] from" in out
    assert f"warning: {log.name} has lost some of what was logged" in out
    assert "warning: the run's torch_threads was 1 and is 2 from" in out and "and is an abacus from step" in out
    assert "warning: the run's code was" in out and "'mujoco': '9.9'" in out and "from step 160 on" in out
    parts = record.read_config(run_dir)["segments"]
    assert [part["from_step"] for part in parts] == [0, 160] and parts[1]["versions"]["mujoco"] == "9.9"
    (told,) = (text for text in events(run_dir).Tensors("hyperparameters/text_summary") if text.step == 160)
    assert b"the run's code was " in told.tensor_proto.string_val[0]


def test_a_checkpoint_copies_only_what_is_new_of_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.checkpoints, "REPLAY_FILE_ROWS", 64)
    args, env = sac_tar.Args(buffer_size=250), sac_tar.make_env("Pendulum-v1")
    rb = ReplayBuffer(args, env, torch.device("cpu"))
    rb.rows[:] = torch.arange(2500.0).reshape(250, 10)
    for rb.added in (100, 240, 260, 600):
        lab.checkpoints.write_replay(tmp_path, rb)
    names = [path.stem for path in lab.checkpoints.replay_files(tmp_path)]
    assert names[:7] == ["0-64", "64-100", "100-164", "164-228", "228-240", "240-250", "250-260"]
    assert names[7:] == ["350-414", "414-478", "478-500", "500-564", "564-600"]  # 260 to 350 are overwritten
    assert all((tmp_path / "replay" / f"{name}.pt").stat().st_size < 64 * 40 + 2000 for name in names)
    other = ReplayBuffer(args, env, torch.device("cpu"))
    other.added = 600
    lab.checkpoints.read_replay(tmp_path, other)
    assert torch.equal(other.rows, rb.rows)


# the command line


def test_another_process_may_have_a_folder_once_its_run_has_ended(run):
    lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", lock, run(total_timesteps=62) / ".lock"], check=True)


def test_signals_and_locks_of_processes(tmp_path, capsys, monkeypatch):
    """A signal ends a run after its episode, with a checkpoint and the command that goes on from there; Ctrl-C after
    another signal at once. While a process has a folder, no other one gets it."""
    flags = "--env-id Pendulum-v1 --total-timesteps 100000 --learning-starts 100 --hidden-size 16 --batch-size 16 "
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = {}
    pipes["cwd"] = tmp_path
    for script in (SAC, TD3):
        command = f"{flags} --eval-episodes 1 --runs-dir {tmp_path / script.stem}".split()
        processes[script] = subprocess.Popen([sys.executable, script, *command], **pipes)

    def wait_for(pattern, process, count=1):
        while len(found := list(tmp_path.glob(pattern))) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return found[0].parent

    run_dir, process = wait_for("td3_tar/*/masks.pt", processes[TD3]), processes[TD3]
    process.send_signal(signal.SIGSTOP)  # so that both come at one moment, wherever the episode is
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # which comes second, and is one too many
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 130 and "stopped at step" in process.stdout.read()

    run_dir, process = wait_for("sac_tar/*/masks.pt", processes[SAC]), processes[SAC]
    assert f"another process is running {run_dir}; let" in refused(capsys, again, sac_tar, run_dir, code=75)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 143, err
    step, line = load(run_dir / "checkpoint.pt")["global_step"], out.splitlines()[-1]
    assert step > 100 and step % 200 == 0
    assert line == f"stopped at step {step}; go on with: python {os.path.relpath(SAC, tmp_path)} --resume {run_dir}"
    resumed = [sys.executable, *line.split("python ")[1].split(), "--compute", "masked"]
    process = subprocess.Popen(resumed, **pipes)
    wait_for("sac_tar/*/*tfevents*", process, count=2)
    process.terminate()
    process.communicate()
    assert process.returncode == 143 and load(run_dir / "checkpoint.pt")["global_step"] >= step

    monkeypatch.setattr(os, "_exit", sys.exit)
    for number in (signal.SIGTERM, signal.SIGTERM):
        lab.run.on_signal(number, None)
    with pytest.raises(SystemExit, match="130"):
        lab.run.on_signal(signal.SIGINT, None)
    assert "stopped at once; if there is a checkpoint, go on" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each script, small."""
    folders = {}
    for script in (sac_tar, td3_tar):
        args = script.Args(
            env_id="Short-v0", runs_dir=str(tmp_path_factory.mktemp("runs")), total_timesteps=90, learning_starts=50,
            hidden_size=16, batch_size=16, buffer_size=200, eval_episodes=3, checkpoint_frequency=40, compute="masked",
        )  # fmt: skip
        folders[script] = script.train(args)
    return folders


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--gamma 0.5", "--gamma 0.5 contradicts the run, which has 0.99; leave it out or start a new run"),
        ("--env-id Hopper-v4", "--env-id Hopper-v4 contradicts the run, which has Short-v0"),
        ("--no-save-buffer", "--save-buffer False contradicts the run, which has True"),
        ("--total-timesteps 80", "--total-timesteps may grow but not shrink; the run has 90"),
        ("--method rigl --rewire-every 20", "--method rigl contradicts the run, which has tar"),
    ],
)
def test_flags_that_contradict_the_run_are_refused_by_name(finished, script, monkeypatch, capsys, flags, sentence):
    run_dir = finished[script]
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert sentence in refused(capsys, main, script, monkeypatch, "--resume", run_dir, *flags.split())
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_train_of_a_launcher_needs_the_flags_of_the_run_that_it_resumes(finished, script, capsys):
    args = script.Args(env_id="Short-v0", resume=str(finished[script]))
    assert "contradicts the run, which has" in refused(capsys, script.train, args)
    assert args == script.Args(env_id="Short-v0", resume=str(finished[script]))  # the next run begins with these


def test_the_default_of_a_flag_that_made_no_difference_may_change(capsys):
    given = record.settle(sac_tar.Args(evaluate="a run"))
    saved = dataclasses.asdict(given)
    given.alpha = 0.5  # autotune learns it
    lab.checkpoints.check_saved_args(given, saved)
    given.gamma = 0.5
    assert "--gamma 0.5 contradicts the run" in refused(capsys, lab.checkpoints.check_saved_args, given, saved)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"method": "rigl", "rewire_every": 5}, "--method rigl rewires by a schedule over --total-timesteps"),
        ({"lr_cycles": 3}, "--lr-cycles splits --total-timesteps into cycles"),
    ],
)
def test_what_has_a_schedule_over_all_of_training_may_not_grow(run, monkeypatch, capsys, flags, sentence):
    run_dir = run(env_id="Short-v0", total_timesteps=90, **flags)
    longer = ("--resume", run_dir, "--total-timesteps", 100)
    assert sentence in refused(capsys, main, sac_tar, monkeypatch, *longer)


COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR(q_optimizer, args.total_timesteps)"


@pytest.mark.parametrize(
    "scheduler",
    [COSINE, f"torch.optim.lr_scheduler.SequentialLR(q_optimizer, [{COSINE}, {COSINE}], [args.total_timesteps])"],
)
def test_a_longer_run_says_that_a_scheduler_keeps_its_schedule(run, tmp_path, capsys, scheduler):
    mine = edited(tmp_path, (RUN_BEGINS, f"    state['rates'] = {scheduler}\n{RUN_BEGINS}"))
    run_dir = run(mine, env_id="Short-v0", total_timesteps=90)
    (begun,) = (segment["optimizers"] for segment in record.read_config(run_dir)["segments"])
    for steps, said in ((90, 0), (100, 1), (100, 1)):
        capsys.readouterr()
        again(mine, run_dir, total_timesteps=steps)
        assert capsys.readouterr().out.count(f"warning: rates was {begun['rates']} and is ") == said
        assert all(segment["optimizers"] == begun for segment in record.read_config(run_dir)["segments"])


def test_a_flag_that_makes_no_difference_is_named(script, tmp_path, monkeypatch, capsys):
    given = f"--env-id Short-v0 --total-timesteps 5 --learning-starts 2 --runs-dir {tmp_path} --reserve 0.3 --sparsity"
    given = [*given.split(), 0.5, "--method", "static", "--critic-method", "dense", "--critic-sparsity", 0.5]
    given += ["--active-width", 256]
    main(script, monkeypatch, *given, "--eval-episodes", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "makes no difference" in line]
    decides = "`settle` in lab/record.py decides that"
    assert said == [
        f"warning: active_width=256 makes no difference to this run, which has active_width=None; {decides}",
        f"warning: critic_sparsity=0.5 makes no difference to this run, which has critic_sparsity=0.0; {decides}",
        f"warning: reserve=0.3 makes no difference to this run, which has reserve=0.1; {decides}",
    ]


def test_the_command_that_began_a_run_may_be_repeated_with_resume(run, script, monkeypatch):
    """Also flags that make no difference to it, which the run does not record as given."""
    flags = {"method": "dense", "sparsity": 0.5, "criterion": "snip", "reserve": 0.3, "total_timesteps": 70}
    run_dir = run(**flags)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    (run_dir / "final.pt").unlink()
    main(script, monkeypatch, "--resume", run_dir, *given)
    assert load(run_dir)["global_step"] == 70


# files that are not what they should be


def test_damaged_checkpoints_are_refused_or_harmless(finished, capsys, tmp_path):
    """Any truncation is refused. A flipped bit is refused too, unless it lies where the format keeps no data."""
    good, bad, rng = finished[sac_tar] / "checkpoint.pt", tmp_path / "checkpoint.pt", random.Random(1)
    content, state = good.read_bytes(), lab.checkpoints.load_state(good, SAC)
    for at in (0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(12))):
        bad.write_bytes(content[:at])
        refused(capsys, lab.checkpoints.load_state, bad, SAC)
        bad.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            assert same(lab.checkpoints.load_state(bad, SAC), state)
        except SystemExit as stop:
            assert stop.code == 2 and str(bad) in capsys.readouterr().err


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_foreign_files_are_refused_in_one_sentence(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sac, td3 = finished[sac_tar], finished[td3_tar]
    load_state, file = functools.partial(refused, capsys, lab.checkpoints.load_state), tmp_path / "checkpoint.pt"
    assert "is of td3_tar.py; use that script" in load_state(td3 / "checkpoint.pt", SAC)
    assert "is of sac_tar.py; use that script" in load_state(sac / "final.pt", TD3)
    assert "there is no" in load_state(file, SAC)
    assert "there is no checkpoint.pt" in refused(capsys, main, sac_tar, monkeypatch, "--evaluate", "")
    state = load(sac / "checkpoint.pt")
    for bad, sentence in [
        ({"weights": torch.ones(3)}, "is not a file of sac_tar.py"),
        (torch.ones(3), "is not a file of sac_tar.py"),
        (state | {"actor": Payload()}, "holds more than tensors and numbers"),
    ]:
        torch.save(bad, file)
        assert sentence in load_state(file, SAC)
    assert not Path("executed").exists()
    for content in (b"", b"not a checkpoint"):
        file.write_bytes(content)
        assert "cannot read" in load_state(file, SAC)
    resume = functools.partial(refused, capsys, main, sac_tar, monkeypatch, "--resume")
    for folder in (sac / "checkpoint.pt", tmp_path, "nowhere"):
        assert "--resume takes a whole run folder" in resume(folder)
    config = json.loads((sac / "config.json").read_text())
    (tmp_path / "config.json").write_text("{")
    assert "config.json (Expecting property name" in resume(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"args": config["args"] | {"colour": 1}}))
    assert "are not those of this sac_tar.py" in resume(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    less = {name: state[name] for name in state.keys() - {"entropy", "random"}}
    for bad, sentence in [
        (load(sac), "lacks a_optimizer, actor_optimizer, fingerprint, log_sizes, mask_generator, nets"),
        (less, "lacks entropy, random; use the script that saved it"),
        (state | {"qf1": {"fc1.weight": torch.ones(3, 3)}, "added": 0}, "is not one of this script"),
        (state | {"format": 3}, "has format 3 and this version resumes 8; use the"),
    ]:
        torch.save(bad, file)
        assert sentence in resume(tmp_path)
    main(sac_tar, monkeypatch, "--evaluate", file, "--eval-episodes", 1)  # its policy can still be watched
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "config.json", ".lock"}


def test_a_replay_file_that_is_missing_or_damaged_is_refused(run, script, capsys):
    run_dir = run(checkpoint_frequency=50, env_id="Short-v0")
    files = list(lab.checkpoints.replay_files(run_dir))
    assert [path.name for path in files] == ["0-50.pt", "50-100.pt", "100-150.pt", "150-160.pt"]
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-100])
    assert "50-100.pt" in refused(capsys, again, script, run_dir)
    files[1].unlink()
    assert "replay lacks transitions 50 to 160" in refused(capsys, again, script, run_dir)
    files[1].write_bytes(content)
    assert (run_dir / "final.pt").exists() and len(list(run_dir.glob("*tfevents*"))) == 1  # a refusal changes nothing
    again(script, run_dir)


def edited(tmp_path, *edits, script=sac_tar):
    """A copy of a script with texts replaced, as a module."""
    source, name = Path(script.__file__).read_text(), f"my_{script.__name__}"
    for before, after in edits:
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    (tmp_path / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUN_BEGINS = "    run = Run("
STEP = "        next_obs, reward,"
MEAN = """class Mean:
    def __init__(self):
        self.value, self.count = np.zeros(3, np.float32), 0
    def add(self, obs):
        self.value, self.count = (self.value.astype(np.float32) * self.count + obs) / (self.count + 1), self.count + 1
    def state_dict(self):
        return vars(self)
    def load_state_dict(self, state):
        vars(self).update(state)
"""
ADDED = [
    ("class QNetwork", MEAN + "class QNetwork"),
    (
        RUN_BEGINS,
        """    mean, seen = Mean(), {"steps": 0, "last": None, "by": {}, "all": set(), "grown": np.zeros(0)}
    schedulers = {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(q_optimizer, 90),
        "steps": torch.optim.lr_scheduler.MultiStepLR(actor_optimizer, [65, 80]),
        "falls": torch.optim.lr_scheduler.ReduceLROnPlateau(actor_optimizer, patience=3),
    }
    second = torch.optim.SGD([temperature := nn.Parameter(torch.ones(2))], 0.1, momentum=0.9)
    state |= schedulers | {"mean": mean, "seen": seen, "second": second, "batch_norm": nn.BatchNorm1d(3)}
    state["counts"] = __import__("collections").Counter(steps=1)
    state["second_buffer"] = second_buffer = ReplayBuffer(args, env, device)
    second_buffer.rows.zero_()
    state |= {"more": nn.ParameterList([temperature]), "array": np.zeros(2), "tensor": torch.zeros(2)}
    state |= {"all": {"these": [nn.BatchNorm1d(3), np.random.default_rng(1), 0]}, "other": random.Random(2)}
    rb.priorities = np.zeros(3)
    seen |= {"longer": [], "shorter": [*range(90)]}
"""
        + RUN_BEGINS,
    ),
    (
        STEP,
        """        mean.add(obs)
        seen["steps"], seen["last"] = seen["steps"] + 1, obs * seen["steps"]
        seen["grown"], by = np.append(seen["grown"], global_step), np.argmax(obs)
        seen["by"][by] = seen["by"].get(by, 0) + 1
        seen["all"].add((by, *np.round(obs)))
        seen["longer"].append(global_step)
        seen["shorter"].pop()
        state["batch_norm"].running_mean += mean.count
        state["array"][0] += global_step
        state["counts"]["steps"] += 1
        a_optimizer.param_groups[0]["lr"] *= 1 - 1e-3 * (global_step > 65)
        second_buffer.add(obs, obs, env.action_space.low, global_step, False, False)
        state["tensor"][1] += state["array"][0]
        norm, generator, _ = state["all"]["these"]
        norm.running_mean += generator.random() + state["other"].random()
        rb.priorities[1] += norm.running_mean[0]
        if global_step > 60:
            second.zero_grad()
            (temperature * temperature.detach().exp() * schedulers["cosine"].get_last_lr()[0]).sum().backward()
            second.step()
            schedulers["cosine"].step()
            schedulers["steps"].step()
            schedulers["falls"].step(-episodic_return)
"""
        + STEP,
    ),
]


@pytest.mark.parametrize("compute", ["masked", "sparse"])
def test_what_a_user_adds_to_the_agent_is_resumed_exactly_if_it_is_in_state(run, tmp_path, capsys, compute):
    """Schedulers, a second optimizer, a normalizer of NumPy's arrays, counters: some read as soon as they are there."""
    mine = edited(tmp_path, *ADDED)
    work = functools.partial(run, mine, env_id="Short-v0", compute=compute, checkpoint_frequency=10, eval_frequency=10)
    whole = load(work(total_timesteps=90) / "checkpoint.pt")
    assert whole["seen"]["steps"] == 90 == sum(whole["seen"]["by"].values()) and len(whole["seen"]["all"]) > 5
    assert whole["counts"]["steps"] == 91 and 0 <= whole["q_optimizer"]["param_groups"][0]["lr"] < 1e-3
    run_dir = work(total_timesteps=70)
    config = record.read_config(run_dir)
    kinds = {"actor_optimizer": "Adam", "q_optimizer": "Adam", "a_optimizer": "Adam", "second": "SGD"}
    kinds |= {"cosine": "CosineAnnealingLR", "steps": "MultiStepLR", "falls": "ReduceLROnPlateau"}
    recorded = config["segments"][0]["optimizers"]
    assert {name: text.partition("(")[0] for name, text in recorded.items()} == kinds
    assert "SGD(lr=0.1, momentum=0.9, " in recorded["second"] and recorded["actor_optimizer"].count("initial_lr=") == 1
    assert "__my_sac_tar__tar__" in run_dir.name
    capsys.readouterr()
    again(mine, run_dir, total_timesteps=90)
    assert "warning: the episode" not in capsys.readouterr().out
    resumed = load(run_dir / "checkpoint.pt")
    of_the_process = {"sps_seconds", "log_sizes", "args", "fingerprint", "random"}  # unused spaces are seeded anew
    assert whole.keys() == resumed.keys() and whole.keys() > {"cosine", "steps", "falls", "mean", "array", "all"}
    assert whole["replay"]["priorities"]["an array of NumPy"][1] > 60
    assert same(whole["random"]["torch"], resumed["random"]["torch"])
    assert [name for name in whole.keys() - of_the_process if not same(whole[name], resumed[name])] == []
    assert not {"second_buffer", "second", "cosine"} & load(run_dir).keys()


BOX = """class Box:
    def __init__(self, **held):
        vars(self).update(held)
class Null:
    def __getattr__(self, name):
        return print
"""
OWN = "box = Box(inner=Box(rng=np.random.default_rng(1), args=args)); box.inner.box = box"


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(q_optimizer, 90)", "lacks scheduler, so"),
        ("normalizer = nn.BatchNorm1d(3, affine=False)", "lacks normalizer, so"),
        ("scale = nn.Parameter(torch.ones(2)); extra = torch.optim.SGD([scale])", "lacks scale, extra, so"),
        (
            "state['other'] = torch.optim.SGD([torch.ones(2, requires_grad=True)])",
            "a parameter that an optimizer trains",
        ),
        ("average = copy.deepcopy(actor).requires_grad_(False)", "lacks average, so"),
        ("generator = torch.Generator()", "lacks generator, so"),
        ("generator = np.random.default_rng(1)", "lacks generator, so"),
        ("demonstrations = ReplayBuffer(args, env, device)", "lacks demonstrations, so"),
        ("progress['best'] = None; generator = np.random.default_rng(1)", "lacks generator, so"),
        ("several = {'all': [nn.BatchNorm1d(3)]}", "lacks several, so"),
        ("del state['log_prob'], state['q_optimizer']", "lacks q_optimizer, so"),
        (f"{OWN}; box.all = [Box(of=nn.Linear(2, 2)), actor]", "lacks box.inner.rng, box.all.of, so"),
        ("actor.fc1.noise = [np.random.default_rng(1)]", "lacks actor.fc1.noise, so"),
        ("from collections import deque; pool = deque([copy.deepcopy(actor)])", "lacks pool, so"),
        ("qf1.adam = torch.optim.Adam(qf1.parameters())", "lacks qf1.adam, so"),
        ("nets['actor'].average = copy.deepcopy(actor)", "lacks nets.actor.average, so"),
        ("nets['actor'].of = [torch.Generator()]", "lacks nets.actor.of, so"),
        ("rb = Box()", "subclass that of lab/replay.py"),
        ("rb = Box(rows=np.zeros(3), added=0)", "checkpoints need a tensor `rows` and `added` of the replay"),
        (f"{OWN}; state['of'] = {{'a': [box.inner.rng]}}; box.all = [actor, box, env, state, rb, Null(), args]", None),
        ("box = Box(rng=env.action_space.np_random, alpha=log_alpha.exp(), of=q_optimizer)", None),
        ("state['steps'] = 0", "state['steps'], a int, cannot be put back"),
        ("state['all'] = {'q': [q_optimizer]}", "state['all'] holds an optimizer or scheduler; give it a name"),
        ("first, act, turned = actor.fc1, nn.Tanh(), actor.fc1.weight.T", None),
        ("state['slow'] = {'of': [average := copy.deepcopy(actor)]}; both = nn.ModuleList([average, actor])", None),
        ("state['support'] = torch.ones(0).to_sparse(); atoms = [state['support']]", None),
    ],
)
def test_what_a_resumed_run_would_lose_is_named_before_anything_is_written(run, tmp_path, capsys, line, sentence):
    lines = f"    state['log_prob'] = {{}}\n    {line}\n{RUN_BEGINS}"
    mine = edited(tmp_path, ("class QNetwork", f"{BOX}class QNetwork"), (RUN_BEGINS, lines))
    given = {"env_id": "Short-v0", "total_timesteps": 5, "learning_starts": 2}
    if sentence is None:
        assert run(mine, **given).exists()
        return
    assert sentence in refused(capsys, run, mine, **given)
    assert not (tmp_path / "runs").exists()


STATE = "env, state, rb)"
BROKEN = [
    (
        STEP,
        f"        if global_step == 75:\n            rb = ReplayBuffer(args, env, device)\n{STEP}",
        "`rb` in train is no longer the object that it was at Run(...), so checkpoints",
        1,
    ),
    (
        STEP,
        f"        if global_step == 75:\n            env = gym.wrappers.RescaleAction(env, -1.0, 1.0)\n{STEP}",
        "`env` in train is no longer the object that it was at Run(...), so checkpoints",
        1,
    ),
    (STATE, f"{STATE}; state['late'] = {{}}", "late came into `state` after Run(...), too late to be resumed", 2),
    (
        RUN_BEGINS,
        f"    progress['added'] = {{'all': [np.random]}}\n{RUN_BEGINS}",
        "no checkpoint can keep a module; give",
        2,
    ),
    (RUN_BEGINS, f"    progress['of'] = __import__('signal').SIGTERM\n{RUN_BEGINS}", "can keep a Signals; give it", 2),
    (STEP, f"        qf2.fc2.weight.data += global_step == 75\n{STEP}", "of qf2.fc2 are not zero at step 80, since", 1),
    (
        STEP,
        f"        if global_step == 75:\n            q_optimizer = kernels.Adam(critics.parameters())\n{STEP}",
        "`q_optimizer` in train is no longer the object that it was at Run(...), so checkpoints and kernels would",
        1,
    ),
    (
        STEP,
        f"        if global_step == 75:\n            targets = copy.deepcopy(targets)\n{STEP}",
        "`targets` in train is no longer the object that it was at Run(...), so checkpoints and kernels would",
        1,
    ),
    (
        STEP,
        f"        if global_step == 75:\n            qf1.fc3 = nn.Linear(critic_hidden, 1)\n{STEP}",
        "no optimizer trains fc3.weight of qf1 at step 80; change layers in place, do not replace them",
        1,
    ),
    (
        RUN_BEGINS,
        f"    args.q_lr *= 2\n{RUN_BEGINS}",
        "train changes --q-lr before Run(...), by which neither",
        2,
    ),
    (
        RUN_BEGINS,
        "    state['qf3'] = qf3 = copy.deepcopy(qf1).requires_grad_(False)\n"
        f"    nets['qf3'] = sparse_utils.Net(qf3, None, q_optimizer, 'tar', 0.9)\n{RUN_BEGINS}",
        "qf3 came into `nets` after plan(...); put it where `nets` is made",
        2,
    ),
    (RUN_BEGINS, f"    progress['of'] = np.array(['a'])\n{RUN_BEGINS}", "can keep a ndarray; give it", 2),
    (
        STEP,
        f"        if global_step == 0:\n            run.evaluate(0, actor.get_mean_action, 0, 0)\n{STEP}",
        "`run.evaluate` ran twice at step 0, and a run records one return of a step; log a second one",
        1,
    ),
    (RUN_BEGINS, f"    state['masks'] = {{}}\n{RUN_BEGINS}", "checkpoints use masks for something else; give", 2),
    ('"actor": actor,', '"policy": actor,', "`state` has no part named actor, which", 2),
    (
        "global_step == args.total_timesteps:",
        "global_step == 80:",
        "there is no evaluation of step 90: training ended",
        1,
    ),
]


@pytest.mark.parametrize("before, after, sentence, code", BROKEN)
def test_what_an_edit_breaks_is_said_and_the_last_checkpoint_stays(
    run, tmp_path, capsys, before, after, sentence, code
):
    mine = edited(tmp_path, (before, after))
    small = {"env_id": "Short-v0", "total_timesteps": 90, "checkpoint_frequency": 10}
    assert sentence in refused(capsys, run, mine, code=code, **small)
    assert bool([*tmp_path.glob("runs/*/checkpoint.pt")]) == (code == 1)


def test_weights_that_break_in_the_last_episode_are_said(run, tmp_path, capsys):
    mine = edited(tmp_path, (STEP, f"        qf2.fc2.weight.data += global_step == 75\n{STEP}"))
    said = "pruned weights of qf2.fc2 are not zero at step 77, since"
    assert said in refused(capsys, run, mine, code=1, env_id="Short-v0", total_timesteps=77)
    assert not [*tmp_path.glob("runs/*/final.pt")]


def test_an_edit_that_a_resumed_run_cannot_take_is_refused_and_flags_may_be_tuples(run, tmp_path, capsys, monkeypatch):
    new = "    betas: tuple[float, float] = (0.9, 0.99)\n    sizes: list[int] = field(default_factory=lambda: [1])\n"
    new += "    words: list = field(default_factory=list)\n"
    new += "    pairs: tuple[tuple[int, int], ...] = ((1, 2),)\n    more: list[int] | None = None\n"
    flag = ("    tau: float", f"{new}    tau: float")
    used = [("import dataclass\n", "import dataclass, field\n")]
    used += [(RUN_BEGINS, f"    args.target_entropy = -1.0\n    pair = nn.ModuleList([qf1])\n{RUN_BEGINS}")]  # no flag
    used += [(STEP, f"        pair = nn.ModuleList([qf2, qf1])\n{STEP}")]  # of parts of `state`
    used += [(STEP, f"        args.betas + (1,), args.sizes + [1], args.more + args.words\n{STEP}")]
    mine = edited(tmp_path, flag, *used)
    run_dir = run(mine, env_id="Short-v0", total_timesteps=90, checkpoint_frequency=10, more=[3])
    assert "__more-[3]__" in run_dir.name and "sizes" not in run_dir.name
    main(mine, monkeypatch, "--resume", run_dir, "--betas", 0.9, 0.99, "--total-timesteps", 92)
    larger = ("make_env(args.env_id)", "gym.wrappers.TimeAwareObservation(make_env(args.env_id))")
    assert "the checkpoint is not one of this script (Error" in refused(
        capsys, again, edited(tmp_path, flag, *used, larger), run_dir
    )
    mine = edited(tmp_path, flag, *used)
    newer = edited(tmp_path, (flag[0], f"    scale: float = 1.0\n{flag[1]}"), *used)
    assert "--scale 0.5 contradicts the run, which has 1.0" in refused(
        capsys, main, newer, monkeypatch, "--resume", run_dir, "--scale", 0.5
    )
    assert "--betas (0.9, 0.9) contradicts" in refused(
        capsys, main, mine, monkeypatch, "--resume", run_dir, "--betas", 0.9, 0.9
    )
    mine = edited(tmp_path, flag, *used, ("kernels.Adam(critics.parameters()", "torch.optim.SGD(critics.parameters()"))
    message = refused(capsys, again, mine, run_dir)
    assert "q_optimizer was Adam(lr=" in message and " and is SGD(lr=" in message
    assert message.endswith("in the script; use the script that saved it")
    changed = ("kernels.Adam(critics.parameters()", "kernels.Adam(critics.parameters(), eps=0.1")
    mine = edited(tmp_path, flag, *used, changed)
    again(mine, run_dir)
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "the run goes on with what it was" in line)
    assert said.startswith("warning: q_optimizer was Adam(") and "eps=0.1, weight_decay=0" in said
    monkeypatch.setattr(edits, "replaced", REPLACED)
    again(mine, run_dir)


def test_state_in_a_module_of_the_reader_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_tools", raising=False)  # of another run of this test
    (tmp_path / "my_tools.py").write_text("import numpy\nSCALE, LUCK = 1.0, numpy.random.default_rng(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    lab.run.sources.cache_clear()
    uses = ("import sparse_utils\n", "import my_tools\nimport sparse_utils\n")
    grows = (STEP, f"        my_tools.SCALE += 1\n{STEP}")
    small = {"env_id": "Short-v0", "total_timesteps": 70, "checkpoint_frequency": 10}
    assert "lacks my_tools.LUCK, so" in refused(capsys, run, edited(tmp_path, uses, grows), **small)
    kept = (RUN_BEGINS, f"    state['luck'] = my_tools.LUCK\n{RUN_BEGINS}")
    run_dir = run(mine := edited(tmp_path, uses, grows, kept), **small)
    sys.modules["my_tools"].SCALE = 1.0  # as in another process
    again(mine, run_dir, total_timesteps=75)
    assert "begins with another value of `my_tools.SCALE` in train than before" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [{"criterion": "snip"}, {"criterion": "dynadiag", "prune_at": 70}, {"method": "rigl"}, {"method": "set"}],
)
def test_frozen_weights_are_refused_where_their_gradient_is_needed(run, tmp_path, capsys, flags):
    mine = edited(tmp_path, ("    nets = {", "    actor.fc1.requires_grad_(False)\n    nets = {"))
    small = {"env_id": "Short-v0", "total_timesteps": 90, "rewire_every": 10, "rewire_stop": 0.9} | flags
    if flags == {"method": "set"}:
        assert run(mine, **small).exists()
        return
    assert "needs a gradient of every weight, and some of actor are frozen" in refused(capsys, run, mine, **small)


def test_a_full_disk_ends_a_run_with_the_code_after_which_a_sweep_tries_again(run, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_dir = run(env_id="Short-v0", total_timesteps=70, checkpoint_frequency=10)
    with monkeypatch.context() as patch:
        patch.setattr(lab.run, "write_tensors", full)
        longer = ("--resume", run_dir, "--total-timesteps", 90)
        message = refused(capsys, main, sac_tar, monkeypatch, *longer, code=os.EX_TEMPFAIL)
        assert "No space left on device; the last checkpoint is whole: make room" in message
        message = refused(capsys, run, env_id="Short-v0", total_timesteps=75, code=os.EX_TEMPFAIL)
        assert "start the run anew, since its folder is deleted" in message
        patch.setattr(lab.run, "write_json", full)
        assert "its folder is deleted" in refused(capsys, run, env_id="Short-v0", code=os.EX_TEMPFAIL)
    for name in ("flush", "add_text"):  # in which the log's own thread passes its errors on
        with monkeypatch.context() as patch:
            patch.setattr(lab.run.SummaryWriter, name, full)
            assert "its folder is deleted" in refused(capsys, run, env_id="Short-v0", code=os.EX_TEMPFAIL)
    assert [path for path in tmp_path.glob("runs/*") if path.is_dir()] == [run_dir]
    monkeypatch.setattr(Path, "mkdir", full)
    assert "cannot make the run folder" in refused(capsys, run, code=os.EX_TEMPFAIL)


def test_a_critic_whose_target_is_forgotten_ends_the_run(run, script, tmp_path):
    three = ("critics = nn.ModuleList([qf1, qf2])", "critics = nn.ModuleList([qf1, qf2, qf3 := copy.deepcopy(qf1)])")
    mine = edited(tmp_path, three, (RUN_BEGINS, f"    state['qf3'] = qf3\n{RUN_BEGINS}"), script=script)
    with pytest.raises(RuntimeError, match="lists must have"):
        run(mine, env_id="Short-v0", total_timesteps=70)


def test_a_critic_that_no_optimizer_trains_is_refused_unless_it_is_frozen(run, tmp_path, capsys):
    third = "    qf3 = copy.deepcopy(qf1)\n    nets['qf3'] = sparse_utils.Net(qf3, None, q_optimizer, 'tar', 0.9)\n"
    third += "    sparse_utils.plan(nets['qf3'], 0.1)\n    state['qf3'] = qf3\n"
    small = {"env_id": "Short-v0", "total_timesteps": 70, "compute": "masked"}
    said = "no optimizer in `state` trains fc1.weight of qf3; give it to one or freeze it"
    assert said in refused(capsys, run, edited(tmp_path, (RUN_BEGINS, third + RUN_BEGINS)), **small)
    frozen = f"{third}    qf3.requires_grad_(False)\n"
    later = (STEP, f"        qf3.requires_grad_(global_step > 65)\n{STEP}")  # as around an update of the actor
    assert run(edited(tmp_path, (RUN_BEGINS, frozen + RUN_BEGINS), later), **small).exists()


@pytest.mark.parametrize("first, later", [([], {"step": 3}), ((1,), [1]), ({"a": 1}, None), ([1], "ab"), ([1], None)])
def test_a_part_of_state_that_became_another_kind_of_value_is_put_back_as_it_was_saved(first, later):
    assert lab.checkpoints.put_back({"of": first}, {"of": later}) == {"of": later}


def test_modules_in_a_part_of_state_that_became_another_kind_of_value_are_not_lost():
    head, saved = nn.Linear(1, 1), nn.Linear(1, 1).state_dict()
    assert head.weight != saved["weight"]
    assert lab.checkpoints.put_back((head,), [saved]) == [head] and head.weight == saved["weight"]
    rng = np.random.default_rng(1)
    drawn = lab.checkpoints.pack(rng)
    for part, other in (({"head": head}, [saved]), ([head], {"head": saved}), ({"rng": rng}, [drawn])):
        with pytest.raises(ValueError, match="of parts with a state was saved as a"):
            lab.checkpoints.put_back(part, other)


def test_classes_and_a_train_from_elsewhere_are_refused(run, capsys, monkeypatch):
    monkeypatch.setattr(edits, "replaced", REPLACED)
    monkeypatch.setattr(sac_tar, "QNetwork", type("Wide", (sac_tar.QNetwork,), {"__module__": "wide"}))
    monkeypatch.setattr(sac_tar, "ReplayBuffer", type("Mine", (ReplayBuffer,), {"__module__": "__main__"}))
    said = "from outside the files of sac_tar.py, so the record would miss it; put it into"
    assert f"error: train uses QNetwork, ReplayBuffer {said}" in refused(capsys, run)
    monkeypatch.undo()
    monkeypatch.setattr(edits, "replaced", REPLACED)
    kind = type(gym.make("Short-v0").unwrapped)
    own = type(kind.__name__, (kind,), {"__module__": "__main__"})
    gym.register("Own-v0", own, max_episode_steps=10)
    assert f"error: train uses PendulumEnv {said}" in refused(capsys, run, env_id="Own-v0")
    other = vars(sac_tar) | {"__name__": "other"}
    assert "`train` comes from sac_tar.py" in refused(capsys, exec, "main(Args, train)", other)


HOLDS = [
    (
        RUN_BEGINS,
        "mine = torch.optim.swa_utils.AveragedModel(actor); state['mine'] = mine",
        "cannot compute the actor: `mine` in train is or holds a network of its class and shapes that no row has",
    ),
    (
        RUN_BEGINS,
        "params = [*critics.parameters()]",
        "cannot compute the qf1: `params` in train holds layers or parameters of",
    ),
    (
        "    done = True",
        "kept = {'of all': [qf1_target.fc1]}",
        "qf1: `kept` in train holds layers or parameters of it, and",
    ),
    (
        RUN_BEGINS,
        "nets['actor'].average = state['average'] = copy.deepcopy(actor)",
        "cannot compute the actor: `nets` in train is or holds a network of its class and shapes that no row has",
    ),
    (RUN_BEGINS, "last = qf1.fc3", "cannot compute the qf1: `last` in train holds layers or parameters of it"),
    ("    done = True", "body = nn.Sequential(actor.fc1)", "`body` in train holds layers or parameters of it"),
    (RUN_BEGINS, "bias = qf1.fc1.bias", "`bias` in train holds layers or parameters of it"),
    (RUN_BEGINS, "box = Box(all=[Box(of={'qf2': qf2.fc2})])", "cannot compute the qf2: `box` in train holds layers or"),
    (RUN_BEGINS, "box = torch.jit.trace(qf1, (torch.ones(1, 3), torch.ones(1, 1)))", "the qf1: `box` in train holds"),
    (
        RUN_BEGINS,
        "clip = __import__('functools').partial(max, list(qf1.parameters()))",
        "the qf1: `clip` in train holds layers or",
    ),
    (RUN_BEGINS, "state['of'] = {'all': [qf1.fc1.bias]}", "the qf1: `state` in train holds"),
    (RUN_BEGINS, "qf1.body = [qf1.fc1, qf1.relu1]", "cannot compute the qf1: an attribute in it that is no"),
    (RUN_BEGINS, "qf1.relu1.body = {'of': {qf1.fc3}}", "cannot compute the qf1: an attribute in it that is no"),
    (
        RUN_BEGINS,
        "state['second'] = torch.optim.SGD(qf1.parameters(), 0.1)",
        "cannot compute the qf1: an optimizer other than the one in its row trains its parameters",
    ),
]


@pytest.mark.parametrize("place, line, sentence", HOLDS)
def test_parameters_that_train_keeps_are_not_replaced_by_the_kernels(run, tmp_path, capsys, place, line, sentence):
    name = line.partition(" = ")[0]
    before, later = (f"    penalty = lambda: {name}\n", "") if name == "params" else ("", f"        {name}\n")
    later = "        with torch.no_grad():\n            bias *= 0.9\n" if name == "bias" else later
    edits = (place, f"    {line}\n{before}{place}"), (STEP, later + STEP)
    mine = edited(tmp_path, ("class QNetwork", f"{BOX}class QNetwork"), *edits)
    small = {"env_id": "Short-v0", "total_timesteps": 90}
    assert sentence in refused(capsys, run, mine, compute="sparse", **small)
    assert run(mine, **small).exists()


def test_layers_and_parameters_are_held_but_not_parts_that_stay():
    network = nn.Sequential(body := nn.Sequential(nn.Linear(2, 3), nn.ReLU()), head := nn.Linear(3, 1))
    nets = {"qf": sparse_utils.Net(network, None, None, "static", 0.9)}
    for value in (head, body[0].bias, [head], nn.ParameterList([head.weight])):
        assert edits.held_apart(nets, [], {"mine": value})["qf"].startswith("`mine` in train holds")
    for value in (network, body, body[1], [network], nn.Linear(2, 3), nn.Sequential(network)):
        assert edits.held_apart(nets, [], {"mine": value}) == {}


def test_ordinary_edits_are_no_false_alarms(run, tmp_path, capsys):
    """Parameters in a list for the optimizer alone, learning rates and compiled networks set before the loop, an
    evaluation before the reset at the same step, which a resumed run makes anew, a diagnosis that is not finite."""
    source = Path(sac_tar.__file__).read_text()
    evaluation = next(line for line in source.splitlines() if line.startswith("        run.evaluate("))
    params = "    params = list(critics.parameters())\n    q_optimizer = kernels.Adam(params, lr=args.q_lr)\n"
    params += "    group = q_optimizer.param_groups[0]\n"
    rates = "    assert q_optimizer.param_groups[0] is group\n"
    rates += "    assert (args.resume is None) == (run.start_step == 0)\n"
    rates += "    run.log(0, {'diagnosis/log_dead': -math.inf})\n"
    calls = "            [*map(actor, [data.observations])]\n            group['lr'] = args.q_lr\n"
    calls += "            with torch.no_grad(), kernels.in_torch(nets):\n"
    calls += "                [param.norm() for param in critics.parameters()]\n"
    mine = edited(
        tmp_path,
        ("    q_optimizer = kernels.Adam(critics.parameters(), lr=args.q_lr)\n", params),
        ("    done = True\n", f"{rates}    done = True\n"),
        (sampled := "            data = rb.sample(args.batch_size, args.gamma, global_step)\n", sampled + calls),
        (evaluation, ""),
        ("        if done:\n            obs", f"{evaluation}\n        if done:\n            obs"),
    )
    small = {"env_id": "Short-v0", "compute": "sparse", "checkpoint_frequency": 10, "eval_frequency": 5}
    run_dir = run(mine, total_timesteps=90, **small)
    again(mine, run_dir, total_timesteps=100)
    assert "warning: the episode" not in capsys.readouterr().out
    compiled = "    actor = torch.compile(actor, backend='eager')\n    done = True\n"
    compiled = edited(tmp_path, ("    done = True\n", compiled))
    assert run(compiled, total_timesteps=20, learning_starts=15, env_id="Short-v0").exists()


def test_what_an_edit_forgets_is_a_warning(run, tmp_path, capsys):
    """A variable of train, a network that is in no row, a wrapper around the environment of training alone."""
    lines = "    level, state['average'] = 0, copy.deepcopy(actor)\n    actor_names = [*nets]\n"
    lines += "    scale, visits, rms = torch.ones(()), np.zeros(3), gym.wrappers.utils.RunningMeanStd(shape=())\n"
    lines += "    best, ticks, mean = None, collections.Counter(), Mean()\n"
    lines += "    cells = {'of': {(0, 1): 0}, 'nets': nets, 'all': {'steps': 0}}\n    actor.noise = 1.0\n"
    lines += "    actor.table = nn.Parameter(torch.ones(2, 2), False)\n"
    lines += "    actor.norm, old, tuner = Norm(), None, None\n    actor.norm.seen = 0\n    SCALE.fill_(1)\n"
    lines += "    env.reset()\n    env.step(env.action_space.sample())\n"
    changes = "        scale, visits[0] = scale + 1, level\n        rms.update(np.ones(1))\n"
    changes += "        best = np.float32(level)\n        ticks['steps'] += 1\n        cells['of'][0, 1] += 1\n"
    changes += "        cells['all']['steps'] += 1\n        mean.count += 1\n        actor.noise *= 0.9\n"
    changes += "        args.gamma *= 0.999\n        actor.norm.seen += 1\n        SCALE.mul_(0.5)\n"
    changes += "        old, tuner = copy.deepcopy(qf1), tuner or torch.optim.SGD(actor.parameters(), 0.1)\n"
    wrapped = "    env = gym.wrappers.TransformReward(make_env(args.env_id), abs)\n"
    wrapped += "    env = gym.wrappers.TimeLimit(env, 1000)  # a second one\n"
    wrapped += "    env.unwrapped.spec.kwargs['healthy_reward'] = 2  # as gym.make(..., healthy_reward=2) leaves it\n"
    of_mean, norm = MEAN.partition("    def state_dict")[0], "class Norm(nn.Identity): pass\n"
    edits = [("class QNetwork", f"SCALE = torch.ones(1)\n{norm}{of_mean}class QNetwork")]
    edits += [("import copy\n", "import collections\nimport copy\n")]
    edits += [(RUN_BEGINS, lines + RUN_BEGINS), (STEP, f"        level += 1\n{changes}{STEP}")]
    fill = "    rb.add(*np.ones((2, 3)), env.action_space.low, 0.0, False, False)\n"
    edits += [("    done = True", f"{fill}    done = True")]
    mine = edited(tmp_path, *edits, ("    env = make_env(args.env_id)  #", f"{wrapped}    #"))
    plain = run(env_id="Short-v0", total_timesteps=70, checkpoint_frequency=10)
    again(sac_tar, plain, total_timesteps=90, compute="sparse")
    assert "warning" not in capsys.readouterr().out.replace("warning: the run's", "")
    small = record.read_config(plain)["args"] | {"exp_name": "my_sac", "total_timesteps": 70}
    run_dir = mine.train(mine.Args(**small))
    out = capsys.readouterr().out
    assert "warning: nothing prunes some weights of actor, average, which FLOPs" in out
    alone = "TimeLimit, TransformReward, healthy_reward=2"
    assert f"warning: evaluations do without {alone}, which is in training alone" in out
    assert "warning: the environment has taken 1 steps where training counts 0; if train repeats" in out
    again(mine, run_dir, total_timesteps=90)
    out = capsys.readouterr().out
    assert "warning: the run's total_timesteps was 70 and is 90 from step 70 on" in out
    named = out.split("begins with another value of ")[1].split(" than before")[0]
    names = {"args.gamma", "actor.noise", "actor.norm.seen", "SCALE", "old", "tuner"}
    names |= {"level", "scale", "visits", "rms", "best"}
    names |= {"ticks", "cells.of", "cells.all.steps", "mean.count", "rb.added"}
    assert {*named.split(", ")} == {f"`{name}` in train" for name in names}


def test_a_policy_that_draws_is_evaluated_as_logged_and_training_does_not_notice(run, tmp_path, capsys, monkeypatch):
    policy = ("actor.get_mean_action, progress", "lambda obs: actor.get_action(obs + progress['shift'])[0], progress")
    begins = (RUN_BEGINS, f"    progress['shift'] = 0.0\n{RUN_BEGINS}")
    policy = (policy, ("    done = True", "    writer = run.writer\n    done = True"))
    mine = edited(tmp_path, *policy, begins, (STEP, f"        progress['shift'] += 10\n{STEP}"))
    often, seldom = (run(mine, env_id="Short-v0", total_timesteps=90, eval_frequency=n) for n in (20, 1000))
    assert same(load(often)["actor"], load(seldom)["actor"])
    capsys.readouterr()
    main(mine, monkeypatch, "--evaluate", often)
    assert f"mean {scalars(often)['eval/episodic_return'][-1][1]:.1f}," in capsys.readouterr().out


def test_a_run_whose_folder_is_moved_meanwhile_says_so(tmp_path, capsys, monkeypatch):
    moved = f"        if global_step == 75:\n            run.folder.rename(run.folder.with_name('moved'))\n{STEP}"
    flags = "--env-id Short-v0 --learning-starts 60 --total-timesteps 90 --hidden-size 16 --batch-size 16 "
    flags += f"--eval-episodes 1 --checkpoint-frequency 10 --runs-dir {tmp_path}/runs"
    message = refused(capsys, main, edited(tmp_path, (STEP, moved)), monkeypatch, *flags.split(), code=1)
    assert message.endswith("its folder is gone; move it back and go on with --resume, or start the run anew")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["moved"]
    again(edited(tmp_path, (STEP, moved.replace("== 75", "< 0"))), tmp_path / "runs" / "moved")
    with pytest.raises(FileNotFoundError, match="expert"):  # a missing file of one's own is none of the run's
        main(edited(tmp_path, (RUN_BEGINS, f"    open('expert.pt')\n{RUN_BEGINS}")), monkeypatch, *flags.split())


def test_learning_rates_of_all_optimizers_follow_the_cycles(run, tmp_path, capsys):
    lines = f"    state['slow'] = slow = torch.optim.SGD([log_alpha], 8.0)\n{RUN_BEGINS}"
    print_it = f"        if global_step == 89:\n            print('rate', slow.param_groups[0]['lr'])\n{STEP}"
    run(edited(tmp_path, (RUN_BEGINS, lines), (STEP, print_it)), env_id="Short-v0", total_timesteps=90, lr_cycles=1)
    rate = float(capsys.readouterr().out.split("rate ")[1].split()[0])
    assert rate == pytest.approx(8 * baselines.lr_factor(89, 60, 90, 1)) and rate < 8


def test_a_reader_may_prune_and_revive_a_second_time_where_torch_holds_the_networks(run, tmp_path, monkeypatch, capsys):
    criteria, prune = [], sparse_utils.static_prune
    monkeypatch.setattr(sparse_utils, "static_prune", lambda *given: criteria.append(given[2]) or prune(*given))
    again_at_80 = ("if global_step in schedule.prunings:", "if global_step in schedule.prunings or global_step == 80:")
    small = {"env_id": "Short-v0", "total_timesteps": 90}
    once, twice = run(**small), run(edited(tmp_path, again_at_80), compute="sparse", **small)
    one, other = (torch.cat([mask.flatten() for mask in load(path)["masks"]["qf1"].values()]) for path in (once, twice))
    assert one.sum() == other.sum() and not torch.equal(one, other) and criteria == ["random"] * 9
    criteria.clear()
    run(edited(tmp_path, again_at_80), criterion="dynadiag", prune_at=70, **small)
    assert criteria == ["dynadiag"] * 3 + ["magnitude"] * 3  # its gates are gone
    mine = edited(
        tmp_path,
        again_at_80,
        ("kernels.in_torch(nets), sch", "kernels.in_torch(nets if global_step < 80 else {}), sch"),
    )
    with pytest.raises(RuntimeError, match="do it inside `with kernels"):
        run(mine, compute="sparse", **small)
    last = edited(tmp_path, (again_at_80[0], again_at_80[1].replace("80", "90")))
    assert "train prunes at the last step, which only evaluates" in refused(capsys, run, last, code=1, **small)


def test_a_row_of_nets_that_rewires_needs_a_method_that_does(run, tmp_path, capsys):
    row = '"qf2": sparse_utils.Net(qf2, qf2_target, q_optimizer, '
    mine = edited(tmp_path, (f"{row}args.critic_method, args", f'{row}"rigl", args'))
    said = "--method and --critic-method rewire no network, so the row qf2 cannot"
    assert said in refused(capsys, run, mine, env_id="Short-v0")


@pytest.mark.parametrize("compute", ["masked", "sparse"])
def test_a_layer_may_be_reset_where_torch_holds_the_networks(run, tmp_path, compute):
    reset = "with kernels.in_torch(nets):\n                qf2.fc2.reset_parameters()"
    mine = edited(tmp_path, (STEP, f"        if global_step == 75:\n            {reset}\n{STEP}"))
    small = {"env_id": "Short-v0", "total_timesteps": 90, "checkpoint_frequency": 10, "compute": compute}
    final, plain = load(run(mine, **small)), load(run(**small))
    mask, weight = final["masks"]["qf2"]["fc2"], final["qf2"]["fc2.weight"]
    assert (weight[mask] != 0).all() and (weight[~mask] == 0).all() and torch.equal(mask, plain["masks"]["qf2"]["fc2"])
    assert not torch.equal(weight, plain["qf2"]["fc2.weight"])


ONE_BY_ONE = {
    "critics.named_parameters()": ["l1 = sum(p.abs().sum() for n, p in critics.named_parameters() if 'weight' in n)"],
    "critics.parameters()": ["for param in critics.parameters():", "    nn.utils.clip_grad_norm_(param, 0.1)"],
    "q_optimizer.param_groups": ["for g in q_optimizer.param_groups:", "    [p.mul_(1) for p in g['params'] if 0]"],
    "list(critics.named_parameters())": ["kept = list(critics.named_parameters())", "l1 = [p for _, p in kept]"],
    "critics.parameters() in a map": ["l1 = sum(list(map(torch.norm, critics.parameters())))"],
    "list(qf1.children())": ["features = nn.Sequential(*list(qf1.children())[:-1])"],
    "qf1": ["features = qf1[:-1](torch.cat([data.observations, data.actions], 1))"],
    "qf2": ["widths = [layer.out_features for layer in list(qf2)[::2]]"],
    "actor": ["for layer in map(id, actor):", "    pass"],
    "qf2(starred)": ["layers = [*qf2]"],
    "params": ["params = list(critics.parameters())", "for p in params:", "    nn.utils.clip_grad_norm_(p, 0.1)"],
    "own": ["def l2(own):", "    return sum(p.square().sum() for p in own)", "l2(critics.parameters())"],
    "qf1.modules()": ["sizes = [layer.out_features for layer in qf1.modules() if isinstance(layer, nn.Linear)]"],
}


@pytest.mark.parametrize("call", ONE_BY_ONE)
def test_who_goes_through_parameters_one_by_one_is_seen(tmp_path, call):
    """But not inside `in_torch` or in a constructor."""
    at, indent, file = "            q_optimizer.step()\n", 12 * " ", tmp_path / "my_sac_tar.py"
    lines, inside = ("".join(f"{i}{line}\n" for line in ONE_BY_ONE[call]) for i in (indent, f"{indent}    "))
    shape = "env.observation_space.shape[0] + env.action_space.shape[0], hidden_size, 1"
    constructor = f"        super().__init__(mlp_layers({shape}))\n"
    edited(tmp_path, (at, lines + at))
    name = "'params'" if "groups" in call else call.split(".")[-1].partition("(")[0]
    of = {"actor", "qf1", "qf2"}, {"QNetwork", "Actor"}
    assert edits.one_by_one(file, (), *of).startswith(f"my_sac_tar.py goes through {name} in line ")
    edited(tmp_path, (at, f"{indent}with kernels.in_torch(nets):\n{inside}{at}"))
    assert edits.one_by_one(file, (), *of) is None
    edited(tmp_path, (constructor, f"{constructor}        all(True for _ in self.modules())\n"))
    assert edits.one_by_one(file, (), *of) is None


def test_who_goes_through_parameters_in_sparse_utils_is_seen(run, tmp_path, monkeypatch, capsys):
    ours, mine, look = Path(sparse_utils.__file__), tmp_path / "sparse_utils.py", edits.one_by_one
    mine.write_text(f"{ours.read_text()}\n\ndef l1(net):\n    return sum(p.abs().sum() for p in net.parameters())\n")
    monkeypatch.setattr(edits, "one_by_one", lambda path, *given: look(mine if path == ours else path, *given))
    small = {"env_id": "Short-v0", "total_timesteps": 62, "compute": "sparse"}
    assert "sparse_utils.py goes through parameters in line " in refused(capsys, run, **small)


def test_the_networks_of_who_goes_through_parameters_stay_in_torch(run, tmp_path, capsys):
    small = {"env_id": "Short-v0", "total_timesteps": 90, "compute": "sparse"}
    walk, at = "for param in critics.parameters():", "            q_optimizer.step()\n"
    mine = edited(tmp_path, (at, f"            {walk} param.grad\n{at}"))
    assert "my_sac_tar.py goes through parameters in line " in refused(capsys, run, mine, **small)
    tree = "class Tree(dict):\n    def __getattr__(self, children):\n        return self[children]\n\n\n"
    before_run = (RUN_BEGINS, f"    {walk} param.grad\n{RUN_BEGINS}"), ("class QNetwork", tree + "class QNetwork")
    inside = "    with kernels.in_torch(nets):\n        for layer in qf1:\n            layer\n"
    mine = edited(tmp_path, *before_run, ("    done = True", f"{inside}    done = True"))
    assert run(mine, **small).exists()  # it is refused if a network has to stay in torch
    begins = "            q_optimizer.zero_grad()\n"
    read = f"            with kernels.in_torch(nets):\n                norm = [float(param.norm()) {walk[:-1]}]\n"
    for compute in ("masked", "sparse"):
        plain, reads = (
            run(mine, **small | {"compute": compute}) for mine in (sac_tar, edited(tmp_path, (at, read + at)))
        )
        assert same(load(plain)["qf1"], load(reads)["qf1"])  # the gradients survive
    mine = edited(tmp_path, (begins, read + begins))
    assert run(mine, **small | {"compute": "masked"}).exists()
    with pytest.raises(RuntimeError, match="a loss cannot be differentiated once"):
        run(mine, **small)
    method = "    def features(self, x, a):\n        return self[:-1](torch.cat([x, a], 1))\n\n\nLOG_STD_MAX"
    mine = edited(tmp_path, ("\n\nLOG_STD_MAX = 2", f"{method} = 2"))
    assert "my_sac_tar.py goes through self in line " in refused(capsys, run, mine, **small)
    for layers in ("[*critic]", "critic[0]", "critic[:1]"):
        unseen = f"            for critic in critics:\n                {layers}\n"  # by another name
        with pytest.raises(RuntimeError, match="a layer in the kernels cannot be read"):
            run(edited(tmp_path, (at, unseen + at)), **small)
    mine = edited(tmp_path, (at, f"            qf1_target[0].requires_grad\n{at}"))
    assert "my_sac_tar.py goes through qf1_target in line " in refused(capsys, run, mine, **small)
    decay = f"    def plan():\n        {walk}\n            param.data.mul_(0.9)\n\n{RUN_BEGINS}"
    mine = edited(tmp_path, (RUN_BEGINS, decay))
    assert "my_sac_tar.py goes through parameters in line " in refused(capsys, run, mine, **small)
    (tmp_path / "my_walk.py").write_text(f"def walk(critics):\n    {walk}\n        param.grad\n")
    lab.run.sources.cache_clear()
    mine = edited(tmp_path, ("import sparse_utils", "import sparse_utils\nif 0:\n    import my_walk\n"))
    assert "my_walk.py goes through parameters in line " in refused(capsys, run, mine, **small)


@pytest.mark.parametrize("names, sparsity", [(("fc1.bias", "fc2.weight"), 0.9), (("fc1.bias", "fc1.weight"), 0.97)])
@pytest.mark.parametrize("compute", ["masked", "auto"])
def test_parameters_of_critics_that_are_frozen_stay_so(run, tmp_path, script, monkeypatch, compute, names, sparsity):
    monkeypatch.setattr(kernels, "known_times", lambda *_: (1.0, 0.5))
    at = "    qf1_target = copy.deepcopy(qf1)"
    lines = "".join(f"    qf1.{name}.requires_grad_(False)\n" for name in names)
    mine = edited(tmp_path, (at, lines + at), script=script)
    small = {"env_id": "Short-v0", "sparsity": sparsity, "compute": compute}
    one, other = (load(run(mine, **small, total_timesteps=n)) for n in (70, 90))
    assert {name for name, tensor in one["qf1"].items() if torch.equal(tensor, other["qf1"][name])} == {*names}


def test_dropout_is_off_in_evaluations_alone(run, tmp_path, script, monkeypatch):
    at, seen, forward = "        relu2=nn.ReLU(),\n", [], nn.Dropout.forward
    mine = edited(tmp_path, (at, f"{at}        dropout=nn.Dropout(0.5),\n"), script=script)

    def watched(self, x):
        seen.append((evaluating, self.training))
        return forward(self, x)

    def play(*arguments):
        nonlocal evaluating
        evaluating = True
        result = lab.environment.play(*arguments)
        evaluating = False
        return result

    evaluating = False
    monkeypatch.setattr(nn.Dropout, "forward", watched)
    monkeypatch.setattr(lab.run, "play", play)
    run(mine, env_id="Short-v0", total_timesteps=90)
    assert {*seen} == {(True, False), (False, True)} and seen[-1] == (True, False)


def test_a_flag_that_the_script_no_longer_needs_may_go(run, tmp_path):
    flag = "    tau: float = 0.005  # The fraction by which an update moves targets toward the online networks.\n"
    width = ("QNetwork, env, args.hidden_size", "QNetwork, env, 24"), ("Actor, env, args.hidden_size", "Actor, env, 24")
    mine = edited(tmp_path, (flag, ""), ("args.tau", "0.005"), *width, ("    hidden_size: int", "    width: int"))
    small = {"env_id": "Short-v0", "total_timesteps": 5, "learning_starts": 2, "runs_dir": str(tmp_path)}
    assert mine.train(mine.Args(**small, active_width=16)).exists()


def test_a_flag_that_cannot_be_recorded_is_refused_and_leaves_no_folder(run, tmp_path, capsys):
    mine = edited(tmp_path, ("    tau: float", "    where: Path = Path('here')\n    tau: float"))
    assert "PosixPath is not JSON serializable); make it a text" in refused(capsys, run, mine)
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_keeps_what_is_added_to_the_row_of_a_network():
    @dataclasses.dataclass(eq=False)
    class Row(sparse_utils.Net):
        stage: int = 0

    network = nn.Linear(2, 2)
    row, other = (Row(network, None, None, "tar", 0.5, **more) for more in ({"stage": 2}, {}))
    other.load_state_dict(row.state_dict())
    assert other.stage == 2 and "network" not in row.state_dict()


def test_a_checkpoint_keeps_what_is_added_to_the_schedule(run, tmp_path):
    small = {"env_id": "Short-v0", "checkpoint_frequency": 10}
    added = "schedule.prunings.add(85); schedule.of = print; schedule.last = (63, None)"
    mine = edited(tmp_path, (STEP, f"        if global_step == 63:\n            {added}\n{STEP}"))
    whole, run_dir = (run(mine, total_timesteps=end, **small) for end in (90, 70))
    before = load(run_dir)["masks"]
    again(mine, run_dir, total_timesteps=90)
    assert same(load(run_dir)["masks"], load(whole)["masks"]) and not same(load(run_dir)["masks"], before)
    assert load(run_dir / "checkpoint.pt")["schedule"]["last"] == (63, None)


# begin from a trained policy


def test_the_generators_of_a_reader_are_those_of_the_new_seed(run, tmp_path):
    mine = edited(tmp_path, (RUN_BEGINS, f"    state['rng'] = np.random.default_rng(args.seed)\n{RUN_BEGINS}"))
    small = {"env_id": "Short-v0", "total_timesteps": 62}
    begun = run(mine, seed=2, load=str(run(mine, **small)), **small)
    rngs = (np.random.Generator(np.random.PCG64(seed)) for seed in (1, 2))
    one, two = (rng.bit_generator.state["state"]["state"] for rng in rngs)
    assert str(two) in (held := str(load(begun / "checkpoint.pt")["rng"])) and str(one) not in held


def test_training_begins_from_a_saved_agent_and_its_policy(run, script, tmp_path, monkeypatch, capsys):
    dense = run(method="dense", env_id="Short-v0", total_timesteps=90, runs_dir=str(tmp_path / "dense"))
    end = load(dense)
    monkeypatch.setattr(gym.spaces.Box, "sample", lambda *_: pytest.fail("a random action"))
    flags = {"env_id": "Short-v0", "criterion": "magnitude", "distribution": "global", "load": str(dense)}
    flags |= {"checkpoint_frequency": 10, "eval_frequency": 40}
    begun = run(**flags, total_timesteps=62, prune_at=61)
    at_0 = dict(scalars(begun)["eval/episodic_return"])[0]
    assert at_0 == scalars(dense)["eval/episodic_return"][-1][1]
    static = torch.load(begun / "masks.pt", weights_only=True)["actor"]["static"]["fc2"]
    weight = end["actor"]["fc2.weight"].abs()
    assert weight[static].min() >= weight[~static].max()  # untrained so far
    checkpoint = load(begun / "checkpoint.pt")  # of step 60
    assert all(same(checkpoint[name], end[name]) for name in ("actor", "qf1", "qf2", "qf1_target", "qf2_target"))
    assert all(same(checkpoint[name], end[name]) for name in {"entropy", "actor_target"} & end.keys())
    (config,) = (config for _, config in record.configs(tmp_path / "runs"))
    digest = hashlib.sha256((dense / "final.pt").read_bytes()).hexdigest()[:12]
    assert config["args"]["load"] == f"{dense}/final.pt@{digest}" and f"__load-{digest}__" in begun.name
    read = lab.checkpoints.load_state

    def read_before_it_is_written_anew(path, *given, **how):
        found = read(path, *given, **how)
        path.write_bytes(path.read_bytes() + b"more")
        return found

    monkeypatch.setattr(lab.checkpoints, "load_state", read_before_it_is_written_anew)
    assert "the file was written anew" in refused(capsys, run, **flags, total_timesteps=62, prune_at=61)


def test_a_run_that_began_from_a_saved_agent_is_resumed_without_it(run, script, tmp_path):
    dense = run(method="dense", env_id="Short-v0", total_timesteps=90, runs_dir=str(tmp_path / "dense"))
    flags = {"env_id": "Short-v0", "eval_frequency": 40, "checkpoint_frequency": 10, "load": str(dense / "final.pt")}
    undisturbed = run(**flags, runs_dir=str(tmp_path / "a"))
    work = functools.partial(run, **flags, runs_dir=str(tmp_path / "b"))
    assert child(functools.partial(dies, ReplayBuffer, "add", 95, work)) == -9
    (dense / "final.pt").unlink()
    (run_dir,) = (tmp_path / "b").iterdir()
    again(script, run_dir)
    assert_same_run(run_dir, undisturbed)


def test_the_file_from_which_a_run_began_may_be_given_again(run, script, tmp_path, monkeypatch, capsys):
    dense = run(method="dense", env_id="Short-v0", total_timesteps=62, runs_dir=str(tmp_path / "dense"))
    run_dir = run(method="dense", env_id="Short-v0", total_timesteps=64, load=str(dense))
    main(script, monkeypatch, "--resume", run_dir, "--load", dense)
    other = run(method="dense", env_id="Short-v0", total_timesteps=63, seed=2, runs_dir=str(tmp_path / "dense"))
    message = refused(capsys, main, script, monkeypatch, "--resume", run_dir, "--load", other)
    assert "contradicts the run, which has" in message


def test_a_saved_agent_that_cannot_be_begun_from_is_refused(finished, capsys, tmp_path):
    saved, other = finished[sac_tar], finished[td3_tar]
    small = {"env_id": "Short-v0", "runs_dir": str(tmp_path / "runs"), "total_timesteps": 9, "learning_starts": 5}
    digest = hashlib.sha256((saved / "final.pt").read_bytes()).hexdigest()[:12]
    for part, name in (("entropy", "log_alpha"), ("actor", "action_scale")):
        edited = torch.load(saved / "final.pt", weights_only=True)
        edited[part][name] = edited[part][name] * torch.inf
        torch.save(edited, tmp_path / f"{part}.pt")
    for flags, sentence in [
        ({"load": f"{tmp_path / 'entropy.pt'}", "hidden_size": 16}, "a weight of entropy in"),
        ({"load": f"{tmp_path / 'actor.pt'}", "hidden_size": 16}, "for other bounds of actions than those of Short-v0"),
        ({"load": f"{saved}"}, "is not of the shape of this one"),  # 16 neurons against 256
        ({"load": f"{saved}", "hidden_size": 16, "env_id": "MountainCarContinuous-v0"}, "is not of the shape"),
        ({"load": f"{other}", "hidden_size": 16}, "do not both have actor_target, entropy"),
        ({"load": f"{saved / 'config.json'}", "hidden_size": 16}, "cannot read"),
        ({"load": "nowhere", "hidden_size": 16}, "cannot read --load nowhere (No such file or directory)"),
        ({"load": f"{saved / 'final.pt'}@{'0' * 12}"}, f"is now {saved / 'final.pt'}@{digest}; the file was written"),
        ({"load": f"{saved}", "hidden_size": 16, "init": "sparse"}, "--init sparse does not rescale"),
        ({"load": f"{saved}", "hidden_size": 16, "autotune": False}, "so --no-autotune cannot be met"),
    ]:
        assert sentence in refused(capsys, sac_tar.train, sac_tar.Args(**small | flags))
    assert not (tmp_path / "runs").exists()
    known = sac_tar.Args(**small | {"load": f"{saved / 'final.pt'}@{digest}", "hidden_size": 16, "eval_episodes": 1})
    assert sac_tar.train(known).exists()
    for whole, one in ((torch.ones(6), torch.ones(1)), (np.ones(6), np.ones(1))):  # which must not be broadcast
        with pytest.raises(ValueError, match=r"mine has the shape \(6,\)"):
            lab.checkpoints.put_all_back({"mine": whole}, {"mine": one})
    with pytest.raises(ValueError, match=r"a trained tensor has the shape \(6,\)"):
        lab.checkpoints.put_all_back({"all": {"mine": nn.Parameter(torch.ones(6))}}, {"all": {"mine": torch.ones(1)}})


# evaluate and watch


def test_evaluate_gives_the_last_evaluation_of_the_run_again(finished, script, monkeypatch, capsys):
    run_dir, before = finished[script], sorted(finished[script].rglob("*"))
    (_, logged), *_ = reversed(scalars(run_dir)["eval/episodic_return"])
    for target in (run_dir, run_dir / "final.pt", run_dir / "checkpoint.pt"):
        capsys.readouterr()
        main(script, monkeypatch, "--evaluate", target)
        *_, head, returns = capsys.readouterr().out.strip().splitlines()
        values = [float(value) for value in returns.removeprefix("returns: ").split(", ")]
        assert "step 90: mean" in head and len({*values}) == 3
        assert float(head.split("mean ")[1].split(",")[0]) == pytest.approx(logged, abs=0.06)
        assert float(head.split("deviation ")[1]) == pytest.approx(np.std(values), abs=0.11)
    main(script, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 2, "--compute", "sparse")
    assert len(capsys.readouterr().out.strip().splitlines()[-1].split(",")) == 2
    message = refused(capsys, main, script, monkeypatch, "--evaluate", run_dir, "--total-timesteps", 100)
    assert "--total-timesteps 100 contradicts the run, which has 90" in message
    assert sorted(run_dir.rglob("*")) == before


def test_an_agent_of_an_active_width_is_evaluated_and_begun_from(run, script, monkeypatch, capsys):
    run_dir = run(env_id="Short-v0", active_width=9, compute="sparse", total_timesteps=90)
    logged = scalars(run_dir)["eval/episodic_return"][-1][1]
    capsys.readouterr()
    main(script, monkeypatch, "--evaluate", run_dir)
    assert float(capsys.readouterr().out.split("mean ")[1].split(",")[0]) == pytest.approx(logged, abs=0.06)
    begun = run(env_id="Short-v0", method="dense", load=str(run_dir), compute="sparse", total_timesteps=90)
    assert scalars(begun)["eval/episodic_return"][0][1] == pytest.approx(logged, abs=0.06)


def test_an_evaluation_by_other_code_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.run, "code_hash", record.code_hash)
    run_dir = run(mine := edited(tmp_path), total_timesteps=70)
    main(mine, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 1)
    config = record.read_config(run_dir)
    later = config["segments"][0] | {"from_step": 70, "code": "0" * 12}  # which did not make the file
    (run_dir / "config.json").write_text(json.dumps(config | {"segments": [*config["segments"], later]}))
    main(mine, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 1)
    assert "warning: other code" not in capsys.readouterr().out
    mine = edited(tmp_path, ("relu1=nn.ReLU()", "relu1=nn.Tanh()"))
    main(mine, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 1)
    assert f"warning: other code made {run_dir}/final.pt, so" in capsys.readouterr().out
    (run_dir / "config.json").write_text('{"model": 1}')  # of another tool
    main(mine, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 1)
    assert "warning: other code" not in capsys.readouterr().out


def test_a_file_that_cannot_be_written_while_a_policy_is_evaluated(finished, monkeypatch, capsys):
    def play(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lab.run, "play", play)
    message = refused(capsys, main, sac_tar, monkeypatch, "--evaluate", finished[sac_tar], code=1)
    assert message.endswith("Permission denied; nothing of the run was changed")


def test_an_evaluation_that_lacks_what_the_policy_used_in_the_run_says_so(run, tmp_path, monkeypatch, capsys):
    policy = "actor.get_mean_action"
    used = (f"evaluate(global_step, {policy}", f"evaluate(global_step, lambda obs: {policy}(obs / scale[0])")
    counted = (STEP, f"        scale[0] += 1.0\n{STEP}")
    mine = edited(tmp_path, used, counted, (RUN_BEGINS, f"    scale = [1.0]\n{RUN_BEGINS}"))
    run_dir = run(mine, env_id="Short-v0", total_timesteps=90)
    capsys.readouterr()
    main(mine, monkeypatch, "--evaluate", run_dir)
    assert "warning: in the run itself the mean was " in capsys.readouterr().out
    main(mine, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 2)
    main(sac_tar, monkeypatch, "--evaluate", run(env_id="Short-v0", total_timesteps=90))
    assert "warning" not in capsys.readouterr().out


def test_what_a_reader_logs_does_not_disturb_an_evaluation(run, tmp_path, monkeypatch, capsys):
    at_end = "        if global_step == args.total_timesteps:\n"
    mine = edited(tmp_path, (at_end, f"        run.log(global_step, {{'eval/mine': 1.0}})\n{at_end}"))
    run_dir = run(mine, env_id="Short-v0", total_timesteps=90)
    capsys.readouterr()
    main(mine, monkeypatch, "--evaluate", run_dir)
    assert len(scalars(run_dir)["eval/mine"]) == 91 and "returns: " in capsys.readouterr().out


def test_evaluate_computes_as_the_run_did(run, script, monkeypatch):
    """The networks that the run had in the kernels, though another choice would now be made."""
    monkeypatch.setattr(kernels, "known_times", lambda net, *_: (1.0, 0.5 if net.network.fc1.in_features == 3 else 2.0))
    run_dir, asked = run(compute="auto", env_id="Short-v0", total_timesteps=90), []
    monkeypatch.setattr(kernels, "known_times", lambda *_: (1.0, 2.0))
    choose = kernels.choose
    monkeypatch.setattr(
        kernels, "choose", lambda nets, *given, **kept: (choose(nets, *given, **kept), asked.append(nets))
    )
    main(script, monkeypatch, "--evaluate", run_dir)
    (nets,) = asked
    assert [name for name, net in nets.items() if net.in_kernels] == ["actor"] and nets["actor"].masks["fc1"].any()


def test_films_of_training_and_of_a_saved_policy_change_nothing(run, script, monkeypatch, tmp_path):
    flags = {"env_id": "Short-v0", "eval_frequency": 40, "total_timesteps": 80}
    plain = run(**flags)
    filmed = run(**flags, capture_video=True, runs_dir=str(tmp_path / "filmed"))
    assert same(load(plain)["actor"], load(filmed)["actor"]) and scalars(plain) == scalars(filmed)
    main(script, monkeypatch, "--evaluate", plain, "--capture-video", "--eval-episodes", "1")
    for folder, names in ((filmed, {"step-0.mp4", "step-40.mp4", "step-80.mp4"}), (plain, {"evaluate-final.mp4"})):
        videos = list((folder / "videos").iterdir())
        assert {path.name for path in videos} == names
        assert all(path.read_bytes()[4:8] == b"ftyp" and path.stat().st_size > 1000 for path in videos)
