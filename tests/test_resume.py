"""Interrupted and resumed runs end as the undisturbed one; damaged or foreign files are refused; evaluation."""

import argparse
import errno
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ProbeEnv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runs import events, load
from torch.utils.tensorboard import SummaryWriter

import sac_tar
from lab import kernels
import td3_tar
from lab import run_folder as rf

SAC, TD3 = Path(sac_tar.__file__), Path(td3_tar.__file__)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def scalars(run_dir):
    """Everything logged but the speed, as tag -> [(step, value)]."""
    log = events(run_dir)
    return {t: sorted((e.step, e.value) for e in log.Scalars(t)) for t in log.Tags()["scalars"] if t != "charts/SPS"}


def assert_same_run(run_dir, undisturbed):
    final, expected = load(run_dir), load(undisturbed)
    for state in (final, expected):
        state["args"] = state["args"] | {"runs_dir": ""}
    assert same(final, expected)
    assert scalars(run_dir) == scalars(undisturbed)
    topology = [json.loads((folder / "topology.json").read_text()) for folder in (run_dir, undisturbed)]
    assert topology[0] == topology[1]
    assert json.loads((run_dir / "config.json").read_text())["args"]["resume"] is None
    assert not list(run_dir.rglob("*.tmp"))
    if not final["args"]["save_buffer"]:
        return
    rows = [torch.cat([torch.load(path) for path in rf.replay_files(folder)]) for folder in (run_dir, undisturbed)]
    kept = min(map(len, rows))  # files may begin at other steps
    assert torch.equal(rows[0][-kept:], rows[1][-kept:])


@pytest.fixture
def stop_after(script, monkeypatch):
    """Ask the run to stop, as a signal does, after so many transitions."""
    add = script.ReplayBuffer.add

    def stop_after(transitions):
        count = []

        def counted(self, *transition):
            add(self, *transition)
            count.append(1)
            if len(count) == transitions:
                script.STOP_SIGNALS.append(signal.SIGTERM)

        monkeypatch.setattr(script.ReplayBuffer, "add", counted)

    yield stop_after
    script.STOP_SIGNALS.clear()


@pytest.fixture
def resume(script):
    def resume(run_dir, **changes):
        script.STOP_SIGNALS.clear()
        return script.train(script.Args(**asdict(rf.resumed_args(script.Args, str(run_dir), script.SCRIPT)) | changes))

    return resume


def run_script(script):
    return Path(script.__file__).stem


def interrupted(run, **flags):
    """The folder of a run that stops by itself, with exit code 143."""
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == 143
    return next(Path(flags["runs_dir"]).iterdir())


DECAY = {"density_start": 0.5, "sparsity": 0.8, "total_timesteps": 210}
CASES = {
    "before pruning": (30, {}),
    "at pruning": (60, {}),
    "late pruning by snip": (80, {"prune_at": 110, "criterion": "snip", "save_buffer": False}),
    "after pruning": (111, {"checkpoint_frequency": 50}),
    "on the kernels": (111, {"compute": "sparse"}),
    "rigl": (90, {"method": "rigl", "rewire_every": 40, "total_timesteps": 210, "drop_criterion": "random"}),
    "set": (115, {"method": "set", "rewire_every": 20, "critic_method": "tar"}),
    "a scaled part": (111, {"init": "sparse", "active_width": 12, "compute": "sparse"}),
    "rigl in a scaled part": (125, {"method": "rigl", "init": "sparse", "active_width": "auto", "rewire_every": 30}),
    "cht, some layers settled": (135, {"method": "cht", "rewire_every": 20, "total_timesteps": 210, "sparsity": 0.8}),
    "between falls of the density": (135, DECAY | {"method": "rigl", "rewire_every": 20}),
    "the same in the kernels": (135, DECAY | {"method": "chts", "rewire_every": 20, "compute": "sparse"}),
    "before the second pruning": (90, DECAY | {"final_prune_at": 110}),
    "at the second pruning": (110, DECAY | {"final_prune_at": 110, "compute": "sparse"}),
    "after the second pruning": (125, DECAY | {"final_prune_at": 110, "method": "tar_ch", "compute": "sparse"}),
    "diagonals of an active part": (111, {"criterion": "diagonal", "active_width": 12, "method": "static"}),
    "no regrowth": (115, {"method": "set", "rewire_every": 20, "regrow": False}),
    "a full buffer": (143, {"buffer_size": 70, "checkpoint_frequency": 33}),
    "a buffer overrun twice": (203, {"buffer_size": 40, "total_timesteps": 260, "checkpoint_frequency": 100}),
    "an odd policy frequency": (200, {"policy_frequency": 3, "total_timesteps": 210}),
    "rigl in the kernels": (100, {"method": "rigl", "rewire_every": 40, "total_timesteps": 210, "compute": "sparse"}),
    "dense": (100, {"method": "dense"}),
    "n steps": (143, {"n_step": 3, "n_step_from": 100, "buffer_size": 70, "checkpoint_frequency": 33}),
    "a cycle": (100, {"lr_cycles": 3, "compute": "sparse", "sparsity": 0.8}),
    "the start of a cycle": (94, {"lr_cycles": 3, "method": "rigl", "rewire_every": 40}),
    "recent ones": (143, {"n_step": 2, "recent_fraction": 0.3, "recent_size": 20, "compute": "sparse"}),
    "the third episode": (430, {"total_timesteps": 450}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_undisturbed_run(run, resume, stop_after, tmp_path, case):
    transitions, flags = CASES[case]
    undisturbed = run(**flags, runs_dir=str(tmp_path / "a"))
    stop_after(transitions)
    run_dir = interrupted(run, **flags, runs_dir=str(tmp_path / "b"))
    first = load_checkpoint(run_dir)
    stop_after(5)
    with pytest.raises(SystemExit):
        resume(run_dir)
    second = load_checkpoint(run_dir)
    assert (first["global_step"], second["global_step"]) == (transitions, transitions + 5)
    assert second["progress"]["sps_seconds"] > first["progress"]["sps_seconds"] > 0 or transitions < 60
    assert resume(run_dir) == run_dir
    assert_same_run(run_dir, undisturbed)


def load_checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("script, env_id", [(sac_tar, "BipedalWalker-v3"), (td3_tar, "Hopper-v4")])
def test_killed_at_random_moments_a_process_still_ends_as_the_undisturbed_run(script, tmp_path, env_id):
    """kill -9 five times: twice in a row before the resumed process can write, at any moment, and during a write."""
    flags = "--total-timesteps 1500 --learning-starts 300 --hidden-size 32 --batch-size 32 --eval-episodes 1 "
    flags += "--eval-frequency 400 --checkpoint-frequency 90 --device cpu --method rigl --rewire-every 200 --runs-dir"
    command = [sys.executable, script.__file__, "--env-id", env_id, *flags.split()]
    subprocess.run([*command, str(tmp_path / "a")], check=True, capture_output=True)
    rng = random.Random(f"{env_id} {run_script(script)}")
    runs, begin, deaths = tmp_path / "b", [*command, str(tmp_path / "b")], []
    for death in ("any moment", "at once", "in a write", "any moment", "in a write"):
        process = subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while not list(runs.glob("*/checkpoint.pt")):
            assert process.poll() is None
        run_dir = next(runs.iterdir())
        written = os.stat(run_dir / "checkpoint.pt").st_mtime_ns
        while process.poll() is None and death != "at once":
            if os.stat(run_dir / "checkpoint.pt").st_mtime_ns != written:
                if death == "any moment":
                    time.sleep(rng.uniform(0, 0.3))
                    break
                if any(name.endswith(".tmp") for name in os.listdir(run_dir)):
                    break
        deaths.append(process.poll())
        process.kill()
        process.communicate()
        begin = [sys.executable, script.__file__, "--resume", str(run_dir)]
    assert deaths.count(None) >= 3  # most of the five met a living process
    subprocess.run(begin, check=True, capture_output=True)
    assert_same_run(run_dir, next((tmp_path / "a").iterdir()))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(script, tmp_path, number, code):
    flags = "--env-id Pendulum-v1 --total-timesteps 100000 --learning-starts 100 --hidden-size 16 --batch-size 16"
    command = [sys.executable, script.__file__, *flags.split(), "--runs-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*/topology.json")):
        assert process.poll() is None
    run_dir = next(tmp_path.iterdir())
    resume = [sys.executable, script.__file__, "--resume", str(run_dir)]
    second = subprocess.run(resume, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2 and f"error: another process is running {run_dir}; let it end" in second.stderr
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    line = out.strip().splitlines()[-1]
    step = load_checkpoint(run_dir)["global_step"]
    assert step > 100 and step % 10_000
    assert line == f"stopped at step {step}; go on with: python {run_script(script)}.py --resume {run_dir}"
    help_of_the_line = line.split("python ")[1].split()
    resumed = [sys.executable, *help_of_the_line, "--total-timesteps", "100000", "--compute", "masked"]
    process = subprocess.Popen(resumed, cwd=Path(script.__file__).parent, stderr=subprocess.PIPE)
    while len(list(run_dir.glob("*tfevents*"))) < 2:
        assert process.poll() is None
    process.terminate()
    assert process.wait(60) == 143
    assert load_checkpoint(run_dir)["global_step"] >= step


def test_every_generator_is_put_back():
    generator, space = torch.Generator().manual_seed(1), gym.spaces.Box(-1, 1, (2,), seed=2)

    def draw():
        masks = torch.rand(3, generator=generator).tolist()
        return random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), masks, space.sample().tolist()

    draw()
    states = rf.random_states(generator, space)
    drawn = draw()
    rf.set_random_states(states, generator, space)
    assert draw() == drawn


@pytest.mark.parametrize("before, after", [("sparse", "masked"), ("masked", "sparse")])
def test_a_run_may_be_resumed_the_other_way(run, resume, stop_after, capsys, tmp_path, before, after):
    undisturbed = run(compute="masked", runs_dir=str(tmp_path / "a"), sparsity=0.8)
    stop_after(90)
    run_dir = interrupted(run, compute=before, runs_dir=str(tmp_path / "b"), sparsity=0.8)
    capsys.readouterr()
    resume(run_dir, compute=after)
    assert "warning: the run's in_kernels was" in capsys.readouterr().out
    choices = [part["in_kernels"] for part in rf.read_config(run_dir)["segments"]]
    assert choices == [["actor", "qf1", "qf2"] if compute == "sparse" else [] for compute in (before, after)]
    final, expected = load(run_dir), load(undisturbed)
    assert same(final["masks"], expected["masks"])
    for name in ("actor", "qf1", "qf1_target"):
        for key, tensor in expected[name].items():
            assert torch.allclose(final[name][key], tensor, rtol=1e-3, atol=1e-4), (name, key)


def test_a_resumed_run_keeps_the_choice_of_auto(run, resume, stop_after, monkeypatch, capsys, tmp_path):
    """Though a measurement would choose otherwise now; another --compute makes the choice anew."""
    monkeypatch.setattr(kernels, "known_times", lambda *_: (2.0, 1.0))
    undisturbed = run(compute="auto", runs_dir=str(tmp_path / "a"))
    stop_after(90)
    run_dir = interrupted(run, compute="auto", runs_dir=str(tmp_path / "b"))
    monkeypatch.setattr(kernels, "known_times", lambda *_: (1.0, 2.0))
    stop_after(5)
    with pytest.raises(SystemExit):
        resume(run_dir)
    assert resume(run_dir) == run_dir
    console = capsys.readouterr().out
    assert "compute: actor, qf1, qf2 sparse, since the run was begun so" in console and "in_kernels was" not in console
    assert_same_run(run_dir, undisturbed)

    stop_after(90)
    run_dir = interrupted(run, compute="masked", runs_dir=str(tmp_path / "c"))
    monkeypatch.setattr(kernels, "known_times", lambda *_: (2.0, 1.0))
    stop_after(5)
    with pytest.raises(SystemExit):
        resume(run_dir, compute="auto")
    stop_after(5)
    with pytest.raises(SystemExit):
        resume(run_dir, compute="sparse")
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.load_kernels.cache_clear()
    try:
        resume(run_dir, compute="auto")
    finally:
        kernels.load_kernels.cache_clear()
    everything = ["actor", "qf1", "qf2"]
    assert "warning: the run's in_kernels was" in capsys.readouterr().out
    assert [part["in_kernels"] for part in rf.read_config(run_dir)["segments"]] == [[], everything, everything, []]


def test_what_a_dead_process_left_after_its_checkpoint_is_cleared(run, resume, stop_after, tmp_path):
    undisturbed = run(runs_dir=str(tmp_path / "a"))
    stop_after(100)
    run_dir = interrupted(run, runs_dir=str(tmp_path / "b"))
    torch.save(torch.zeros(50, 9), run_dir / "replay" / "100-150.pt")
    late = SummaryWriter(run_dir, filename_suffix=".late")
    late.add_scalar("eval/episodic_return", 1.0, 140)
    late.close()
    resume(run_dir)
    assert_same_run(run_dir, undisturbed)
    assert not list(run_dir.glob("*.late"))


def test_a_log_that_lost_something_is_said(run, resume, capsys):
    run_dir = run()
    (log,) = run_dir.glob("*tfevents*")
    os.truncate(log, 100)
    resume(run_dir, total_timesteps=170)
    assert f"warning: {log.name} has lost some of what was logged" in capsys.readouterr().out


def test_other_packages_are_said(run, resume, capsys, monkeypatch):
    run_dir, mujoco = run(), rf.mujoco.__version__
    monkeypatch.setattr(rf.mujoco, "__version__", "9.9")
    resume(run_dir, total_timesteps=170)
    assert "'mujoco': '9.9'" in capsys.readouterr().out
    assert [part["versions"]["mujoco"] for part in rf.read_config(run_dir)["segments"]] == [mujoco, "9.9"]


def test_an_evaluation_at_the_pruning_step_logs_once(run):
    logged = scalars(run(learning_starts=100))
    assert all(len({step for step, _ in points}) == len(points) for points in logged.values())


def test_training_may_grow(run, resume, tmp_path):
    undisturbed = run(total_timesteps=300, runs_dir=str(tmp_path / "a"))
    run_dir = run(total_timesteps=200, runs_dir=str(tmp_path / "b"))
    resume(run_dir, total_timesteps=300)
    assert_same_run_but_the_last_losses(run_dir, undisturbed)


def assert_same_run_but_the_last_losses(run_dir, undisturbed):
    """A run logs its losses once more at its last step, which the longer one does not."""
    assert same({**load(run_dir), "args": 0}, {**load(undisturbed), "args": 0})
    assert json.loads((run_dir / "config.json").read_text())["args"]["total_timesteps"] == 300
    logged, expected = scalars(run_dir), scalars(undisturbed)
    assert logged["eval/episodic_return"] == expected["eval/episodic_return"]
    assert [p for p in logged["losses/qf_loss"] if p[0] != 199] == expected["losses/qf_loss"]


def test_what_rewires_by_a_schedule_over_all_of_training_may_not_grow(run, script, monkeypatch, capsys):
    run_dir = run(method="static", critic_method="rigl", rewire_every=50)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir), "--total-timesteps", "300"])
    assert "--method rigl rewires by a schedule over --total-timesteps" in refused(capsys, script.main)


def test_an_optimizers_rate_is_restored_and_a_parameter_that_no_checkpoint_holds_is_refused():
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.5)
    rates = {"net": rf.rates(optimizer)}
    optimizer.param_groups[0]["lr"] = 0.1
    checkpoint = {"net": module.state_dict(), "adam": {"net": rf.adam_state(module, optimizer)}, "progress": {}}
    rf.restore(checkpoint | {"rates": rates}, {"net": module}, {"net": optimizer}, argparse.Namespace())
    assert optimizer.param_groups[0]["lr"] == 0.5 and len(optimizer.param_groups[0]["params"]) == 2
    rf.check_parts({"net": module}, {"net": optimizer})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="the optimizer of net trains a parameter of none of them"):
        rf.check_parts({"net": module}, {"net": optimizer})


def test_resuming_a_finished_run_changes_nothing(run, resume):
    run_dir = run()
    final, logged = load(run_dir), scalars(run_dir)
    for _ in range(2):
        resume(run_dir)
        assert same(load(run_dir), final) and scalars(run_dir) == logged
    assert [part["from_step"] for part in rf.read_config(run_dir)["segments"]] == [0, 160]


def test_a_run_that_grows_is_not_finished_until_it_is(run, resume, stop_after):
    run_dir = run(total_timesteps=200)
    stop_after(5)
    with pytest.raises(SystemExit):
        resume(run_dir, total_timesteps=300)
    assert not (run_dir / "final.pt").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--gamma 0.5", "--gamma 0.5 contradicts the run, which has 0.99; leave it out or start a new run"),
        ("--env-id Hopper-v4", "--env-id Hopper-v4 contradicts the run, which has Pendulum-v1"),
        ("--no-save-buffer", "--save-buffer False contradicts the run, which has True"),
        ("--total-timesteps 120", "--total-timesteps may grow but not shrink; the run has 160"),
    ],
)
def test_flags_that_contradict_the_run_are_refused_by_name(run, script, monkeypatch, capsys, flags, sentence):
    run_dir = run()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_flag_that_repeats_the_run_is_welcome(run, script, monkeypatch):
    run_dir = run()
    trained = []
    monkeypatch.setattr(script, "train", trained.append)
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--resume", str(run_dir), "--hidden-size", "24"])
    script.main()
    assert trained[0].resume == str(run_dir) and trained[0].hidden_size == 24 and trained[0].total_timesteps == 160


# files that are not what they should be


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each script, small."""
    folders = {}
    for script in (sac_tar, td3_tar):
        args = script.Args(
            env_id="Pendulum-v1", runs_dir=str(tmp_path_factory.mktemp("runs")), total_timesteps=90, learning_starts=50,
            hidden_size=16, batch_size=16, buffer_size=200, eval_episodes=1, checkpoint_frequency=40, device="cpu",
        )  # fmt: skip
        folders[script] = script.train(args)
    return folders


def refused(capsys, call, *arguments):
    with pytest.raises(SystemExit) as stop:
        call(*arguments)
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message.startswith("error: ") and len(message.splitlines()) == 1
    return message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.data())
def test_damaged_checkpoints_are_refused_or_harmless(finished, capsys, tmp_path, data):
    """Any truncation is refused. A flipped bit is refused too, unless it lies where the format keeps no data."""
    good = finished[sac_tar] / "checkpoint.pt"
    content, bad = bytearray(good.read_bytes()), tmp_path / "checkpoint.pt"
    if data.draw(st.booleans()):
        bad.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        refused(capsys, rf.load_state, bad, SAC)
        return
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bad.write_bytes(content)
    try:
        state = rf.load_state(bad, SAC)
    except SystemExit as stop:
        assert stop.code == 2
        assert str(bad) in capsys.readouterr().err
    else:
        assert same(state, rf.load_state(good, SAC))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_foreign_files_are_refused_in_one_sentence(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sac, td3 = finished[sac_tar], finished[td3_tar]
    assert "is of td3_tar.py; use that script" in refused(capsys, rf.load_state, td3 / "checkpoint.pt", SAC)
    assert "is of sac_tar.py; use that script" in refused(capsys, rf.load_state, sac / "final.pt", TD3)
    assert "there is no" in refused(capsys, rf.load_state, tmp_path / "checkpoint.pt", SAC)
    state, file = rf.load_state(sac / "checkpoint.pt", SAC), tmp_path / "x.pt"
    for bad, sentence in [
        ({"weights": torch.ones(3)}, "is not a file of sac_tar.py"),
        (torch.ones(3), "is not a file of sac_tar.py"),
        (state | {"actor": Payload()}, "holds more than tensors and numbers"),
    ]:
        torch.save(bad, file)
        assert sentence in refused(capsys, rf.load_state, file, SAC)
    assert not Path("executed").exists()
    for content in (b"", b"not a checkpoint"):
        file.write_bytes(content)
        assert "cannot read" in refused(capsys, rf.load_state, file, SAC)
    torch.save(state | {"format": 99}, tmp_path / "checkpoint.pt")
    message = refused(capsys, rf.resumed_args, sac_tar.Args, str(tmp_path), SAC)
    assert f"has format 99 and this version resumes {rf.CHECKPOINT_FORMAT}" in message
    assert rf.load_policy(str(tmp_path / "checkpoint.pt"), SAC)[1]["format"] == 99  # its policy can still be watched
    (tmp_path / "checkpoint.pt").write_bytes((sac / "final.pt").read_bytes())
    message = refused(capsys, rf.resumed_args, sac_tar.Args, str(tmp_path), SAC)
    assert "lacks adam, added, log_sizes, progress, random, rates" in message and "is no checkpoint" in message
    message = refused(capsys, rf.resumed_args, sac_tar.Args, str(sac / "checkpoint.pt"), SAC)
    assert f"--resume takes the run folder, not a file; try --resume {sac}" in message
    torch.save(state | {"qf1": {"fc1.weight": torch.ones(3, 3)}}, tmp_path / "checkpoint.pt")
    assert "no config.json" in refused(capsys, rf.resumed_args, sac_tar.Args, str(tmp_path), SAC)
    (tmp_path / "config.json").write_bytes((sac / "config.json").read_bytes())
    assert "networks are not those of this script" in refused(
        capsys, sac_tar.train, sac_tar.Args(**state["args"] | {"resume": str(tmp_path)})
    )
    torch.save(state | {"args": state["args"] | {"colour": 1}}, tmp_path / "checkpoint.pt")
    message = refused(capsys, rf.resumed_args, sac_tar.Args, str(tmp_path), SAC)
    assert "are not those of this sac_tar.py" in message and "colour" in message
    for kind in ("adam", "progress"):  # of a script with one thing more to save
        torch.save(state | {kind: state[kind] | {"temperature": {}}}, tmp_path / "checkpoint.pt")
        args = sac_tar.Args(**state["args"] | {"resume": str(tmp_path)})
        assert "differ in temperature; use the script that saved it" in refused(capsys, sac_tar.train, args)


def test_a_published_run_holds_no_weights(finished, capsys, tmp_path):
    config = json.loads((finished[sac_tar] / "config.json").read_text()) | {"published": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "is a published run, which holds no weights" in refused(capsys, rf.load_policy, str(tmp_path), SAC)


def test_what_a_user_adds_to_the_agent_is_restored_if_it_stands_in_its_place(monkeypatch, tmp_path, capsys):
    """A normalizer in `modules` and a counter in Progress, each one line more in a copy of the script."""
    source = SAC.read_text()
    line = '    modules["entropy"] = '
    assert line in source
    source = source.replace(line, '    modules["normalizer"] = torch.nn.BatchNorm1d(observation_size)\n' + line)
    field_line = "    training_flops: int = 0\n"
    source = source.replace(field_line, field_line + "    seen: int = 0\n")
    act = "        progress.episode_actions.append("
    source = source.replace(act, '        progress.seen += 1\n        modules["normalizer"].running_mean += 1\n' + act)
    for name in ("sparse_utils.py", "lab"):
        (tmp_path / name).symlink_to(SAC.parent / name)
    (tmp_path / "my_sac.py").write_text(source)
    flags = "--env-id Pendulum-v1 --learning-starts 50 --hidden-size 16 --batch-size 16 --eval-episodes 1 --runs-dir"
    command = [sys.executable, str(tmp_path / "my_sac.py"), *flags.split(), str(tmp_path / "mine")]
    subprocess.run([*command, "--total-timesteps", "80"], check=True, capture_output=True)
    (run_dir,) = (tmp_path / "mine").iterdir()
    assert run_dir.name.startswith("Pendulum-v1__my_sac__tar__random-er__s0.9__1__")
    again = [sys.executable, str(tmp_path / "my_sac.py"), "--resume", str(run_dir), "--total-timesteps", "100"]
    subprocess.run(again, check=True, capture_output=True)
    checkpoint = load_checkpoint(run_dir)
    assert checkpoint["progress"]["seen"] == 100 and checkpoint["normalizer"]["running_mean"].tolist() == [100] * 3
    config = json.loads((run_dir / "config.json").read_text())
    assert [part["from_step"] for part in config["segments"]] == [0, 80]
    assert len({part["code"] for part in config["segments"]}) == 1 and config["script"] == "my_sac"
    (tmp_path / "my_sac.py").write_text(source.replace("progress.seen += 1", "progress.seen += 2"))
    again[-1] = "110"
    out = subprocess.run(again, check=True, capture_output=True, text=True).stdout
    assert "warning: the run's code was" in out and "from step 100 on" in out
    config = json.loads((run_dir / "config.json").read_text())
    assert len({part["code"] for part in config["segments"]}) == 2


def test_a_replay_file_that_is_missing_or_damaged_is_refused(run, resume, capsys):
    run_dir = run(checkpoint_frequency=50)
    files = sorted((run_dir / "replay").iterdir(), key=lambda path: int(path.stem.split("-")[0]))
    assert [path.name for path in files] == ["0-50.pt", "50-100.pt", "100-150.pt", "150-160.pt"]
    content = files[1].read_bytes()
    capsys.readouterr()
    files[1].write_bytes(content[:-100])
    assert "50-100.pt" in refused(capsys, lambda: resume(run_dir, total_timesteps=170))
    files[1].unlink()
    assert "replay lacks transitions 50 to 160" in refused(capsys, lambda: resume(run_dir, total_timesteps=170))
    files[1].write_bytes(content)
    assert (run_dir / "final.pt").exists() and len(list(run_dir.glob("*tfevents*"))) == 1  # a refusal changes nothing
    resume(run_dir, total_timesteps=170)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint_whole(
    run, resume, monkeypatch, capsys, tmp_path, at
):
    """At the first, second or third file written after the checkpoint of step 50: the topology of the pruning at
    60, the replay buffer and the checkpoint of step 100. Then there is room again."""
    undisturbed = run(checkpoint_frequency=50, runs_dir=str(tmp_path / "a"))
    fsync, calls = os.fsync, []

    def full(descriptor):
        if (runs := list((tmp_path / "b").glob("*/checkpoint.pt"))) and load_checkpoint(runs[0].parent)[
            "global_step"
        ] == 50:
            writing = os.readlink(f"/proc/self/fd/{descriptor}").endswith(".tmp")
            calls.append(1)
            if len(calls) >= at and writing:
                os.ftruncate(descriptor, 10)
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(rf.os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        run(checkpoint_frequency=50, runs_dir=str(tmp_path / "b"))
    assert stop.value.code == 1
    run_dir = next((tmp_path / "b").iterdir())
    message = capsys.readouterr().err
    assert "No space left on device" in message and "make room, then go on with --resume" in message
    assert load_checkpoint(run_dir)["global_step"] == 50
    monkeypatch.setattr(rf.os, "fsync", fsync)
    resume(run_dir)
    assert_same_run(run_dir, undisturbed)


def test_without_the_buffer_a_resumed_run_collects_anew_before_it_learns(
    run, resume, script, stop_after, tmp_path, monkeypatch
):
    stop_after(130)
    flags = {"save_buffer": False, "total_timesteps": 300, "checkpoint_frequency": 50, "method": "rigl"}
    flags |= {"rewire_every": 20}
    run_dir = interrupted(run, **flags, runs_dir=str(tmp_path / "b"))
    assert not list(run_dir.glob("replay/*"))  # that of step 50, which pruning could have needed, is gone
    checkpoint = load_checkpoint(run_dir)
    sampled = []
    sample = script.ReplayBuffer.sample
    script.ReplayBuffer.sample = lambda self, size: sampled.append(self.added) or sample(self, size)
    rewired, log_rewiring = [], rf.log_rewiring
    monkeypatch.setattr(rf, "log_rewiring", lambda *a: rewired.append(a[2]) or log_rewiring(*a))
    try:
        resume(run_dir)
    finally:
        script.ReplayBuffer.sample = sample
    # 60 steps of --learning-starts, as at first; each rewiring draws a batch too, and the first comes after them
    assert rewired == [200, 220]
    assert sampled[0] == 62 and len(sampled) == 300 - 130 - 61 + len(rewired)
    assert load(run_dir)["global_step"] == 300 and checkpoint["global_step"] == 130


def test_a_checkpoint_copies_only_what_is_new_of_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(rf, "REPLAY_FILE_ROWS", 64)
    rows = torch.arange(1000.0).reshape(250, 4)
    for added in (100, 240, 260, 600):
        rf.save_checkpoint(tmp_path, {}, rows, added)
    names = [path.name for path in rf.replay_files(tmp_path)]
    assert names == ["350-414.pt", "414-478.pt", "478-500.pt", "500-564.pt", "564-600.pt"]
    assert all(os.path.getsize(tmp_path / "replay" / name) < 64 * 16 + 2000 for name in names)
    assert torch.equal(torch.load(tmp_path / "replay" / "500-564.pt"), rows[:64])


# evaluate and watch


def evaluate(script, monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", [script.__file__, *flags])
    script.main()
    return capsys.readouterr().out.strip().splitlines()


def test_evaluate_gives_the_last_evaluation_of_the_run_again(run, script, monkeypatch, capsys):
    run_dir = run(eval_episodes=3)
    logged = scalars(run_dir)["eval/episodic_return"][-1][1]
    capsys.readouterr()
    for target in (run_dir, run_dir / "final.pt", run_dir / "checkpoint.pt"):
        head, returns = evaluate(script, monkeypatch, capsys, "--evaluate", str(target), "--eval-episodes", "3")
        values = [float(value) for value in returns.removeprefix("returns: ").split(", ")]
        assert "step 160: mean" in head and len(values) == 3
        assert float(head.split("mean ")[1].split(",")[0]) == pytest.approx(logged, abs=0.06)
        assert float(head.split("deviation ")[1]) == pytest.approx(np.std(values), abs=0.11)
    (run_dir / "final.pt").unlink()
    assert "checkpoint.pt, step 160" in evaluate(script, monkeypatch, capsys, "--evaluate", str(run_dir))[0]


def test_videos_of_training_and_of_a_saved_policy(run, script, monkeypatch, capsys):
    run_dir = run(capture_video=True, eval_frequency=80)
    assert {path.name for path in (run_dir / "videos").iterdir()} == {"step-0.mp4", "step-80.mp4", "step-160.mp4"}
    evaluate(script, monkeypatch, capsys, "--evaluate", str(run_dir), "--capture-video", "--eval-episodes", "1")
    videos = list((run_dir / "videos").iterdir())
    assert "evaluate-final.mp4" in [path.name for path in videos]
    assert all(path.read_bytes()[4:8] == b"ftyp" and path.stat().st_size > 5000 for path in videos)


def test_filming_changes_nothing(run, tmp_path):
    plain, filmed = (run(capture_video=video, runs_dir=str(tmp_path / str(video))) for video in (False, True))
    assert same(load(plain)["actor"], load(filmed)["actor"]) and scalars(plain) == scalars(filmed)


def test_what_videos_need_is_said_before_anything_is_written(run, monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "moviepy" else find_spec(name))
    assert "needs moviepy; `pip install moviepy`" in refused(capsys, lambda: run(capture_video=True))
    monkeypatch.undo()
    monkeypatch.setattr(ProbeEnv, "metadata", {"render_modes": ["rgb_array"]})
    message = refused(capsys, lambda: run(capture_video=True, env_id="Probe-v0"))
    assert "--capture-video cannot render here" in message and "libegl1" in message
    assert not (tmp_path / "runs").exists()
