"""The loop of both scripts: what is stored, when it prunes, learns, evaluates and logs, and that seeds decide all."""

import difflib
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lab.run
import sac_tar
import sparse_utils
import td3_tar
from lab.replay import ReplayBuffer


def scalars(run_dir):
    """{tag: {step: value}} of everything that was logged."""
    log = EventAccumulator(str(run_dir)).Reload()
    return {tag: {e.step: e.value for e in log.Scalars(tag)} for tag in log.Tags()["scalars"]}


def test_each_transition_is_stored_as_it_happened(run, script, monkeypatch):
    """ProbeEnv: episodes of 7 steps are truncated, every third terminates after 5; observation [episode, step, 0]."""
    stored, acted, add, act = [], [], ReplayBuffer.add, script.Actor.forward
    monkeypatch.setattr(ReplayBuffer, "add", lambda rb, *t: stored.append(t) or add(rb, *t))
    one = lambda actor, x: acted.extend(x.tolist() if len(x) == 1 else []) or act(actor, x)  # noqa: E731
    monkeypatch.setattr(script.Actor, "forward", one)
    explored, name = [], "get_action" if script is sac_tar else "add_noise"
    explore = getattr(script.Actor, name)
    noisy = lambda actor, x, *std: explored.append((explore(actor, x, *std), *std)) or explored[-1][0]  # noqa: E731
    monkeypatch.setattr(script.Actor, name, noisy)
    run(env_id="Probe-v0", total_timesteps=80, learning_starts=60, eval_frequency=1000, seed=3)
    episode, step = 0, 0
    for obs, next_obs, _, reward, terminated, truncated in stored:
        length, terminates = (5, True) if episode % 3 == 2 else (7, False)
        assert obs.tolist() == [episode, step, 0] and next_obs.tolist() == [episode, step + 1, 0] and reward == 1
        ends = step + 1 == length
        assert (terminated, truncated) == (ends and terminates, ends and not terminates)
        episode, step = (episode + 1, 0) if ends else (episode, step + 1)
    space, actions = script.make_env("Probe-v0").action_space, [action for _, _, action, *_ in stored]
    space.seed(3)
    assert all(np.array_equal(space.sample(), action) for action in actions[:60])  # uniform until --learning-starts
    assert not np.array_equal(space.sample(), actions[60]) and len(stored) == 80
    seen = [obs.tolist() for obs, *_ in stored[60:]]  # then the actor's, between those of the two evaluations
    first = acted.index(seen[0])
    assert acted[first : first + 20] == seen and first > 0 and len(acted) - first - 20 in (5, 7)
    drawn = [(a[0] if script is sac_tar else a, *std) for a, *std in explored]
    drawn = [(a[0].tolist(), *std) for a, *std in drawn if len(a) == 1]  # not those of batches
    assert drawn == [(action.tolist(), *[0.1] * (script is td3_tar)) for action in actions[60:]]


def test_when_it_prunes_learns_evaluates_and_logs(run, script, monkeypatch):
    """With --prune-at after --learning-starts; the actor learns in one step of three, SAC's targets in one of two."""
    monkeypatch.setattr(lab.run, "SPS_BURN_IN", 20)
    now, at, sample, sac = [], {"policy_loss": [], "polyak_update": []}, ReplayBuffer.sample, script is sac_tar
    monkeypatch.setattr(ReplayBuffer, "sample", lambda rb, *of: now.append(of[2]) or sample(rb, *of))
    losses, critic_losses, evaluated, play = {}, script.critic_losses, [], lab.run.play
    monkeypatch.setattr(script, "critic_losses", lambda *a: losses.setdefault(now[-1], critic_losses(*a)))
    monkeypatch.setattr(lab.run, "play", lambda *a: evaluated.append(1) or play(*a))
    clock = lambda: len(now) + 1000.0 * len(evaluated)  # noqa: E731 - a second a step, a thousand an evaluation
    monkeypatch.setattr(lab.run, "time", SimpleNamespace(perf_counter=clock, time=time.time))
    seeds, probe = {}, type(script.make_env("Probe-v0").unwrapped)
    reset = probe.reset
    again = lambda env, *, seed=None, options=None: seeds.setdefault(env, []).append(seed) or reset(env)  # noqa: E731
    monkeypatch.setattr(probe, "reset", again)

    def spied(calls, function):
        return lambda *given: calls.append((now[-1], function(*given))) or calls[-1][1]

    for name, calls in at.items():
        monkeypatch.setattr(script, name, spied(calls, getattr(script, name)))
    flags = {"env_id": "Probe-v0", "eval_frequency": 20, "eval_episodes": 4, "policy_frequency": 3, "prune_at": 140}
    flags["seed"] = 6
    found = scalars(run(total_timesteps=250, **flags, **({"target_network_frequency": 2} if sac else {})))
    assert now == list(range(61, 250))
    by_three = [step for step in now if step % 3 == 0]
    of_policy, of_targets = ([step for step, _ in calls] for calls in at.values())
    assert of_policy == ([step for step in by_three for _ in range(3)] if sac else by_three)
    assert of_targets == ([step for step in now if step % 2 == 0] if sac else by_three)

    evaluations = [*range(0, 241, 20), 250]
    for tag in ("eval/episodic_return", "eval/episodic_length", "flops/training", "flops/inference"):
        assert list(found[tag]) == evaluations, tag
    lengths, means = np.tile([7, 7, 5], 100), found["eval/episodic_return"]  # ProbeEnv gives 1 for each step
    assert means == found["eval/episodic_length"]
    expected = [lengths[first:][: 4 * len(means)].reshape(-1, 4).mean(1).tolist() for first in range(3)]
    assert list(means.values()) in expected  # whichever episode is the first
    # the first episode of training and that of every evaluation have seeds, which differ
    training, evaluation = sorted((of for of in seeds.values() if len(of) > 2), key=len)
    assert training == [6] + [None] * (len(training) - 1)
    assert evaluation == [1, None] * 2 + [6 + 2**31, None, None, None] * 14  # after two trials
    assert found["eval/final_return"] == {250: (means[240] + means[250]) / 2}  # the last tenth of training
    ends = {step: length for step, length in zip(lengths.cumsum() - 1, lengths) if step < 250}
    assert found["charts/episodic_return"] == found["charts/episodic_length"] == ends
    for name in ("qf1_loss", "qf_loss", "qf2_values", "actor_loss", *(["alpha", "alpha_loss"] if sac else [])):
        assert list(found[f"losses/{name}"]) == [100, 200, 249]  # every 100 steps and at the last one
    for step in (100, 200, 249):
        qf1_loss, qf2_loss, qf1_values, qf2_values = losses[step]
        values = {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean()}
        values |= {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf_loss": (qf1_loss + qf2_loss) / 2}
        actor_loss = [loss[0] if sac else loss for at_step, loss in at["policy_loss"] if at_step <= step][-1]
        values["actor_loss"] = actor_loss
        if sac:  # alpha began at 1, and the entropy is above its target
            assert 0.5 < found["losses/alpha"][step] < 1 and found["losses/alpha_loss"][step] > 0
        for name, value in values.items():
            assert found[f"losses/{name}"][step] == pytest.approx(value.item())
    assert found["charts/SPS"] == {200: pytest.approx(1, abs=0.05), 249: pytest.approx(1, abs=0.05)}  # 20 steps later
    assert [list(found[tag]) for tag in found if tag.startswith("sparsity/")] == [[140]] * 12  # 3 networks, 9 layers
    inference = found["flops/inference"]
    assert inference[120] == inference[0] > 9 * inference[140] and found["flops/training"][60] == 0


def test_the_final_return_is_of_evaluations_after_nine_tenths_and_masks_have_a_seed_of_their_own(
    run, script, monkeypatch
):
    generators, prune = [], sparse_utils.static_prune
    monkeypatch.setattr(sparse_utils, "static_prune", lambda *of: generators.append(of[4]) or prune(*of))
    found = scalars(run(total_timesteps=100, eval_frequency=10, seed=3))
    returns = found["eval/episodic_return"]
    assert returns[90] != returns[100] and found["eval/final_return"] == {100: returns[100]}
    assert {generator.initial_seed() for generator in generators} == {3 + 2**31}  # initial weights are drawn by 3


def test_one_seed_gives_one_result_whatever_was_drawn_before_and_another_seed_another(run, script):
    first = run(seed=5)
    random.random(), np.random.random(), torch.randn(3)
    again, other = run(seed=5), run(seed=6, torch_threads=3)
    one, twin, another = (torch.load(path / "final.pt", weights_only=True) for path in (first, again, other))
    assert torch.get_num_threads() == 3 and same(one, twin)
    assert not any(same(one[name], another[name]) for name in ("actor", "qf1", "masks"))
    assert scalars(first) == scalars(again) != scalars(other)


def test_the_scripts_are_twins():
    """`diff` shows the two algorithms alone: how a run is seeded, pruned, revived and stored is the same text."""
    sac, td3 = (Path(script.__file__).read_text() for script in (sac_tar, td3_tar))
    differing = [line for line in difflib.ndiff(sac.splitlines(), td3.splitlines()) if line[0] in "+-"]
    assert len(differing) <= 150
    for first, last in (
        ("# Sparsity: README", "# Algorithm: the defaults"),
        ("def train(args", "qf1 = QNetwork(env"),
        ("with bad_input():\n        for net in", "# a checkpoint holds"),
        ("done = True\n", "run.evaluate("),
        ("# BASELINES: rewiring", "with torch.no_grad():\n                obs_tensor"),
        ("# TRY NOT TO MODIFY: execute", "data = rb.sample(args.batch_size"),
    ):
        a, b = (text[text.index(first) : text.index(last, text.index(first))] for text in (sac, td3))
        assert a == b
