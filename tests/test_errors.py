"""Bad input ends with one clear sentence and exit code 2 before any folder is made; divergence stops with its name."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import ProbeEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"sparsity": 1.0}, "--sparsity must be at least 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, "--sparsity must be at least 0 and below 1"),
        ({"sparsity": float("nan")}, "--sparsity must be at least 0 and below 1"),
        ({"reserve": 1.0}, "--reserve must be at least 0 and below 1"),
        ({"sparsity": 0.9999999}, "--sparsity 0.9999999 keeps none of a network's"),
        ({"env_id": "Hoper-v4"}, "unknown --env-id Hoper-v4"),
        ({"env_id": "Hoper-v4"}, "Hopper-v4"),
        ({"env_id": "Nowhere-v0"}, "unknown --env-id Nowhere-v0"),
        ({"env_id": "NeedsPackageProbe-v0"}, "rare_physics is not installed"),
        ({"env_id": "NeedsPackageProbe-v0"}, "pip install"),
        ({"env_id": "no_such_module:Foo-v0"}, "cannot make no_such_module:Foo-v0"),
        ({"env_id": "BrokenProbe-v0"}, "cannot make BrokenProbe-v0 (AttributeError: module has no attribute 'bool8')"),
        ({"env_id": "CartPole-v1"}, "has the action space Discrete(2)"),
        ({"env_id": "UnboundedProbe-v0"}, "needs a bounded 1-D Box"),
        ({"env_id": "CarRacing-v3"}, "has the observation space Box(0, 255, (96, 96, 3), uint8)"),
        (
            {"prune_at": 160},
            "--prune-at must be at least 0 and below the end of training, --total-timesteps 160, got 160",
        ),
        ({"prune_at": -1}, "--prune-at must be at least 0"),
        ({"learning_starts": 160}, "--learning-starts must be at least 0 and below the end of training"),
        ({"total_timesteps": 0}, "--total-timesteps must be positive"),
        ({"hidden_size": 0}, "--hidden-size must be positive"),
        ({"batch_size": -1}, "--batch-size must be positive"),
        ({"buffer_size": 0}, "--buffer-size must be positive"),
        ({"policy_frequency": 0}, "--policy-frequency must be positive"),
        ({"eval_frequency": 0}, "--eval-frequency must be positive"),
        ({"eval_episodes": 0}, "--eval-episodes must be positive"),
        ({"torch_threads": 0}, "--torch-threads must be positive"),
        ({"gamma": 1.1}, "--gamma must be in [0, 1]"),
        ({"tau": 0.0}, "--tau must be above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"criterion": "snip", "prune_at": 0}, "--criterion snip needs replay data"),
        ({"critic_sparsity": 1.0}, "--critic-sparsity must be at least 0 and below 1, got 1.0"),
        ({"actor_sparsity": -0.5}, "--actor-sparsity must be at least 0 and below 1, got -0.5"),
        ({"actor_sparsity": 0.9999999}, "--sparsity 0.9999999 keeps none of a network's"),
        ({"rewire_every": 0}, "--rewire-every must be positive"),
        ({"rewire_fraction": 1.1}, "--rewire-fraction must be in [0, 1]"),
        ({"rewire_stop": -0.1}, "--rewire-stop must be in [0, 1]"),
        (
            {"init": "sparse", "prune_at": 61},
            "--init sparse does not rescale trained weights; set --prune-at to at most",
        ),
        ({"critic_init": "sparse", "prune_at": 61}, "--init sparse does not rescale trained weights"),
        ({"active_width": 0}, "--active-width must be from 1 to --hidden-size 24, got 0"),
        ({"active_width": 25}, "--active-width must be from 1 to --hidden-size 24, got 25"),
        ({"active_width": 6}, "--active-width 6 cannot hold the connections; the smallest that can is 7"),
        ({"n_step": 0}, "--n-step must be positive"),
        ({"n_step_from": -1}, "--n-step-from must be at least 0 and below the end of training"),
        ({"n_step_from": 160}, "--n-step-from must be at least 0 and below the end of training"),
        ({"recent_fraction": 1.0}, "--recent-fraction must be at least 0 and below 1, got 1.0"),
        ({"recent_fraction": -0.1}, "--recent-fraction must be at least 0 and below 1"),
        ({"recent_fraction": 0.01}, "--recent-fraction 0.01 of --batch-size 32 is no transition; raise one"),
        ({"recent_size": 0}, "--recent-size must be positive"),
        ({"recent_fraction": 0.5, "recent_size": 160}, "--recent-size 160 is all that the buffer ever"),
        ({"recent_fraction": 0.5, "recent_size": 1000, "total_timesteps": 2000}, "--recent-size 1000 is all that the"),
        (
            {"method": "set", "rewire_every": 130},
            "--method set rewires every 130 steps after step 60 and before 128, which is never; lower",
        ),
        ({"critic_method": "rigl", "prune_at": 120}, "--method rigl rewires every 1000 steps after step 120"),
        ({"method": "chts", "rewire_every": 50, "rewire_fraction": 0.0}, "--rewire-fraction 0 rewires nothing"),
        ({"lr_cycles": 0}, "--lr-cycles must be from 1 to the 100 steps after --learning-starts, got 0"),
        ({"lr_cycles": 101}, "--lr-cycles must be from 1 to the 100 steps after --learning-starts, got 101"),
        ({"actor_method": "tiny", "sparsity": 0.999}, "no connections for even one hidden neuron; choose a lower"),
    ],
)
def test_bad_input(run, tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        run(**arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and sentence in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(device="cuda")
    assert stop.value.code == 2 and "--device cuda needs a CUDA device" in capsys.readouterr().err


def test_a_runs_dir_that_cannot_be_made(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        run(runs_dir=str(tmp_path / "file"))
    assert stop.value.code == 2 and "cannot make the run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--sparsity", "1.5"], "error: --sparsity must be at least 0 and below 1, got 1.5"),
        (["--method", "best"], "best"),
        (["--seed", "1.5"], "1.5"),
        (["--learning-starts", "5e3"], "5e3"),
    ],
)
def test_bad_flags_on_the_command_line(script, tmp_path, flags, sentence):
    result = subprocess.run([sys.executable, script.__file__, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and sentence in result.stderr + result.stdout
    assert "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []


def test_help_tells_every_flag(script, tmp_path):
    result = subprocess.run([sys.executable, script.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0
    for name in script.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in result.stdout, name
    assert result.stdout.count("(CleanRL)") + result.stdout.count("Fujimoto") > 10  # where defaults come from


def logged(folder: Path, tag: str):
    log = EventAccumulator(str(next(folder.iterdir())), size_guidance={"scalars": 0}).Reload()
    return log.Scalars(tag)


def test_a_reward_that_is_not_a_number_stops_the_run(run, tmp_path, capsys):
    gym.register("BadReward-v0", ProbeEnv, max_episode_steps=7, kwargs={"bad_reward_at": 90})
    try:
        with pytest.raises(SystemExit) as stop:
            run(env_id="BadReward-v0")
    finally:
        del gym.registry["BadReward-v0"]
    assert stop.value.code == 1
    assert "the episode's return is nan at step 89" in capsys.readouterr().err
    assert len(logged(tmp_path / "runs", "charts/episodic_return")) > 5  # what was logged is on the disk
    assert not list((tmp_path / "runs").glob("*/final.pt"))


def test_a_loss_that_diverges_stops_the_run(run, script, tmp_path, capsys):
    rates = {"q_lr": 1e30} if hasattr(script.Args, "q_lr") else {"learning_rate": 1e30}
    with pytest.raises(SystemExit) as stop:
        run(total_timesteps=1000, **rates)
    assert stop.value.code == 1
    message = capsys.readouterr().err.split("error: ")[1]
    assert " at step " in message and ("losses/" in message or "return" in message)
    assert logged(tmp_path / "runs", "eval/episodic_return")


def test_a_loss_or_value_that_is_infinite_is_named(run, script, monkeypatch, capsys):
    """One that does not reach the return, so that nothing else can stop the run."""
    critic_losses = script.critic_losses

    def overflow(*args):
        qf1_loss, qf2_loss, qf1_values, qf2_values = critic_losses(*args)
        return qf1_loss, qf2_loss, qf1_values, qf2_values * float("inf")

    monkeypatch.setattr(script, "critic_losses", overflow)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "error: losses/qf2_values is " in message and "at step 100" in message


def test_divergence_after_the_last_hundred_steps_leaves_no_final_file(run, script, monkeypatch, tmp_path, capsys):
    """At step 159 of 160, between two logged steps."""
    critic_losses = script.critic_losses
    calls = []

    def overflow(*args):
        calls.append(1)
        *losses, qf1_values, qf2_values = critic_losses(*args)
        return *losses, qf1_values, qf2_values * (float("inf") if len(calls) == 99 else 1)

    monkeypatch.setattr(script, "critic_losses", overflow)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1 and "losses/qf2_values is " in capsys.readouterr().err
    assert not list((tmp_path / "runs").glob("*/final.pt"))


def test_an_evaluation_that_is_not_a_number_stops_the_run(run, script, monkeypatch, capsys):
    monkeypatch.setattr(script, "evaluate", lambda *_: (float("nan"), 1.0))
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1 and "eval/episodic_return is nan at step 0" in capsys.readouterr().err
