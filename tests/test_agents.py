"""Losses, actions and the replay buffer against small independent computations."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_runs import events
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import AffineTransform, TanhTransform

import sac_tar
import td3_tar

ACTIONS = gym.spaces.Box(np.array([-1, -2], np.float32), np.array([1, 6], np.float32))


def make_agent(script, seed=0):
    torch.manual_seed(seed)
    actor = script.Actor(3, ACTIONS, 16)
    critics = [script.QNetwork(3, 2, 16) for _ in range(4)]
    return actor, critics


def make_batch(script, n=9):
    torch.manual_seed(5)
    discounts = 0.9 * (torch.arange(n) % 3 != 0).float().unsqueeze(1)
    actions = torch.stack([torch.rand(n) * 2 - 1, torch.rand(n) * 8 - 2], 1)
    return script.Batch(torch.randn(n, 3), torch.randn(n, 3), actions, torch.randn(n, 1), discounts)


def expected_critic_losses(batch, qf1, qf2, qf1_target, qf2_target, next_actions, entropy_bonus):
    """One transition at a time, in Python numbers: no broadcast can hide here."""
    sums = [0.0, 0.0]
    n = len(batch.rewards)
    for i in range(n):
        s, a, s2, a2 = (
            t[i : i + 1] for t in (batch.observations, batch.actions, batch.next_observations, next_actions)
        )
        soft_value = min(qf1_target(s2, a2).item(), qf2_target(s2, a2).item()) + entropy_bonus[i]
        y = batch.rewards[i].item() + (0 if i % 3 == 0 else 0.9 * soft_value)
        for k, qf in enumerate((qf1, qf2)):
            sums[k] += (qf(s, a).item() - y) ** 2 / n
    return sums


def test_sac_critic_losses():
    actor, critics = make_agent(sac_tar)
    batch, alpha = make_batch(sac_tar), torch.tensor([0.3])
    torch.manual_seed(1)
    *losses, values1, values2 = sac_tar.critic_losses(actor, *critics, alpha, batch)
    torch.manual_seed(1)
    with torch.no_grad():
        next_actions, log_pi = actor.get_action(batch.next_observations)
        bonus = [-0.3 * log_pi[i].item() for i in range(len(log_pi))]
        expected = expected_critic_losses(batch, *critics, next_actions, bonus)
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    assert values1.shape == values2.shape == batch.rewards.shape == batch.discounts.shape


def test_td3_critic_losses():
    actor, critics = make_agent(td3_tar)
    batch = make_batch(td3_tar)
    args = td3_tar.Args(policy_noise=0.7, noise_clip=0.4)
    torch.manual_seed(1)
    *losses, values1, values2 = td3_tar.critic_losses(actor, *critics, batch, args)
    torch.manual_seed(1)
    scale, low, high = torch.tensor([1.0, 4.0]), torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 6.0])
    with torch.no_grad():
        noise = torch.max(torch.min(torch.randn(9, 2) * 0.7, torch.tensor(0.4)), torch.tensor(-0.4)) * scale
        next_actions = torch.max(torch.min(actor(batch.next_observations) + noise, high), low)
        expected = expected_critic_losses(batch, *critics, next_actions, [0.0] * 9)
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)
    assert values1.shape == values2.shape == batch.rewards.shape == batch.discounts.shape


def test_the_bellman_target_takes_no_gradient(script):
    actor, critics = make_agent(script)
    batch = make_batch(script)
    if script is sac_tar:
        losses = script.critic_losses(actor, *critics, torch.tensor([0.3]), batch)
    else:
        losses = script.critic_losses(actor, *critics, batch, script.Args())
    (losses[0] + losses[1]).backward()
    assert all(p.grad is None for network in (actor, *critics[2:]) for p in network.parameters())
    assert all(p.grad is not None for qf in critics[:2] for p in qf.parameters())


def test_sac_policy_loss():
    actor, (qf1, qf2, *_) = make_agent(sac_tar)
    batch = make_batch(sac_tar)
    torch.manual_seed(2)
    loss, log_pi = sac_tar.policy_loss(actor, qf1, qf2, torch.tensor([0.3]), batch)
    torch.manual_seed(2)
    pi, expected_log_pi = actor.get_action(batch.observations)
    rows = [(s.unsqueeze(0), a.unsqueeze(0)) for s, a in zip(batch.observations, pi, strict=True)]
    per_row = [
        0.3 * expected_log_pi[i].item() - min(qf1(s, a).item(), qf2(s, a).item()) for i, (s, a) in enumerate(rows)
    ]
    assert loss.item() == pytest.approx(np.mean(per_row), rel=1e-5)
    assert log_pi.shape == batch.rewards.shape


def test_td3_policy_loss():
    actor, (qf1, *_) = make_agent(td3_tar)
    batch = make_batch(td3_tar)
    values = [qf1(s.unsqueeze(0), actor(s.unsqueeze(0))).item() for s in batch.observations]
    assert td3_tar.policy_loss(actor, qf1, batch).item() == pytest.approx(-np.mean(values), rel=1e-5)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_sac_log_probability_is_that_of_the_squashed_normal(spread):
    """Also far out, where log(1 - tanh(x)^2 + 1e-6) is wrong by several nats a dimension."""
    actor, _ = make_agent(sac_tar)
    actor.double()
    x = spread * torch.randn(200, 3).double()
    mean, log_std = actor(x)
    squash = [TanhTransform(), AffineTransform(actor.action_bias, actor.action_scale)]
    distribution = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), squash)
    torch.manual_seed(3)
    action, log_prob = actor.get_action(x)
    torch.manual_seed(3)
    x_t = mean + log_std.exp() * torch.randn_like(mean)
    torch.testing.assert_close(action, squash[1](torch.tanh(x_t)))
    # log_prob of the distribution at the pre-squash point, so that atanh loses nothing
    base = Normal(mean, log_std.exp()).log_prob(x_t)
    jacobian = squash[0].log_abs_det_jacobian(x_t, torch.tanh(x_t)) + actor.action_scale.log()
    # the constant part of the density is kept in float32
    torch.testing.assert_close(log_prob, (base - jacobian).sum(1, keepdim=True), rtol=1e-6, atol=1e-6)
    if spread == 1.0:
        torch.testing.assert_close(log_prob.squeeze(1), distribution.log_prob(action), rtol=1e-6, atol=1e-6)
    assert log_prob.isfinite().all()


def test_sac_actions_fill_the_bounds_and_log_std_stays_in_its_range():
    actor, _ = make_agent(sac_tar)
    x = 1000 * torch.randn(500, 3)
    _, log_std = actor(x)
    assert -5 <= log_std.min() < -4.5 and 1.5 < log_std.max() <= 2
    for action in (actor.get_action(x)[0], actor.get_mean_action(x)):
        low, high = action.min(0).values.tolist(), action.max(0).values.tolist()
        assert low == pytest.approx([-1, -2], abs=0.05) and high == pytest.approx([1, 6], abs=0.05)


def test_sac_mean_action_is_the_squashed_mean():
    actor, _ = make_agent(sac_tar)
    x = torch.randn(5, 3)
    expected = torch.tanh(actor(x)[0]) * torch.tensor([1.0, 4.0]) + torch.tensor([0.0, 2.0])
    torch.testing.assert_close(actor.get_mean_action(x), expected)


def test_td3_noise_is_per_sample_and_dimension_and_clipped_per_dimension():
    actor, _ = make_agent(td3_tar)
    centre = torch.tensor([[0.0, 2.0]]).expand(20000, 2)
    noise = actor.add_noise(centre, 0.1) - centre
    assert noise.std(0).tolist() == pytest.approx([0.1, 0.4], rel=0.03)
    assert abs(torch.corrcoef(noise.T)[0, 1].item()) < 0.03
    assert len(noise[:, 0].unique()) > 10000
    clipped = actor.add_noise(centre, 0.2, 0.05) - centre
    assert clipped.abs().max(0).values.tolist() == pytest.approx([0.05, 0.2], rel=1e-4)
    at_bounds = actor.add_noise(torch.tensor([[1.0, -2.0]]).expand(1000, 2), 5.0)
    assert at_bounds.min(0).values.tolist() == [-1, -2] and at_bounds.max(0).values.tolist() == [1, 6]


def test_replay_buffer_keeps_the_last_transitions_in_float32(script):
    rb = script.ReplayBuffer(script.Args(buffer_size=4, gamma=0.5), 3, 2, torch.device("cpu"))
    for i in range(6):
        rb.add(np.full(3, i), np.full(3, i + 0.5), np.full(2, -i, np.float32), 10.0 * i, i == 5, i == 3)
    torch.manual_seed(0)
    batch = rb.sample(400)
    assert batch.rewards.unique().tolist() == [20, 30, 40, 50]
    torch.testing.assert_close(batch.observations, batch.rewards.expand(-1, 3) / 10)
    torch.testing.assert_close(batch.next_observations, batch.rewards.expand(-1, 3) / 10 + 0.5)
    torch.testing.assert_close(batch.actions, -batch.rewards.expand(-1, 2) / 10)
    assert torch.equal(batch.discounts, 0.5 * (batch.rewards != 50).float())
    assert all(t.dtype == torch.float32 for t in batch)


def test_replay_buffer_samples_only_what_was_added(script):
    rb = script.ReplayBuffer(script.Args(buffer_size=1000), 3, 2, torch.device("cpu"))
    rb.rows.fill_(math.nan)
    for i in range(3):
        rb.add(np.zeros(3), np.zeros(3), np.zeros(2, np.float32), float(i), False, False)
    assert sorted(rb.sample(200).rewards.unique().tolist()) == [0, 1, 2]


def random_transitions(n, seed):
    """Of episodes that last a few steps and then terminate, are truncated, or both at once. Their number is the first
    entry of the observation, and a half more after the step; a reset does not go on where an episode ended."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        terminated, truncated = rng.random(2) < 0.12
        yield np.array([i, 0.0]), np.array([i + 0.5, 0.0]), np.zeros(1), rng.normal(), bool(terminated), bool(truncated)


def slow_target(held, i, n, gamma):
    """Reward, next observation and discount of the n-step target of transition i of the list `held`."""
    total, k = 0.0, 0
    while True:
        _, next_obs, _, reward, terminated, truncated = held[i + k]
        total, k = total + gamma**k * reward, k + 1
        if terminated or truncated or k == n or i + k == len(held):
            return total, next_obs[0], 0.0 if terminated else gamma**k


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("added", [1, 5, 37, 40, 41, 63, 200])
def test_n_step_targets_against_a_slow_computation(script, n, added):
    """In a buffer of 40, also before it is full and after it was overrun: no target leaves its episode or takes in what
    is older than itself."""
    rb = script.ReplayBuffer(script.Args(buffer_size=40, gamma=0.9, n_step=n), 2, 1, torch.device("cpu"))
    rb.rows.fill_(math.nan)  # what was never added shows
    transitions = list(random_transitions(added, seed=10 * n))
    for transition in transitions:
        rb.add(*transition)
    held = transitions[-40:]
    torch.manual_seed(added)
    batch = rb.sample(800)
    drawn = batch.observations[:, 0].long() - (added - len(held))
    assert set(drawn.tolist()) == set(range(len(held)))
    expected = torch.tensor([slow_target(held, i, n, 0.9) for i in drawn])
    found = torch.cat([batch.rewards, batch.next_observations[:, :1], batch.discounts], 1)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
    if added == 200:  # the four ends that a target has: n steps, termination, truncation, the newest transition
        ends = {(d == 0, round(math.log(d or 1, 0.9))) for d in expected[:, 2].tolist()}
        assert ends == {(True, 0)} | {(False, k) for k in range(1, n + 1)}


def test_a_target_of_one_step_has_the_bits_that_it_always_had(script):
    rb = script.ReplayBuffer(script.Args(buffer_size=40), 2, 1, torch.device("cpu"))
    for transition in random_transitions(60, seed=0):
        rb.add(*transition)
    torch.manual_seed(0)
    batch, rows = rb.sample(100), rb.rows
    torch.manual_seed(0)
    rows = rows[torch.randint(40, (100,))]
    values = torch.randn(100, 1)
    expected = rows[:, 5:6] + (1 - rows[:, 6:7]) * 0.99 * values
    assert torch.equal(batch.rewards + batch.discounts * values, expected)


def test_a_fraction_of_a_batch_is_of_the_newest_transitions(script):
    args = script.Args(buffer_size=1000, recent_fraction=0.25, recent_size=50)
    rb = script.ReplayBuffer(args, 2, 1, torch.device("cpu"))
    for added, oldest in ((20, 0), (700, 650), (1000, 950), (1020, 970), (2500, 2450)):
        for transition in random_transitions(added, seed=0):
            if transition[0][0] >= rb.added:
                rb.add(*transition)
        torch.manual_seed(0)
        numbers = rb.sample(4000).observations[:, 0]
        assert set(numbers[:1000].tolist()) == set(range(oldest, added))
        first = max(0, added - 1000)
        assert len(numbers[1000:].unique()) > 0.9 * (added - first) and numbers.min() >= first
        recent = (numbers >= oldest).float().mean().item()
        assert recent == pytest.approx(0.25 + 0.75 * (added - oldest) / (added - first), abs=0.02)


def test_n_steps_come_from_their_step_on(run, script, monkeypatch):
    seen, sample = [], script.ReplayBuffer.sample
    monkeypatch.setattr(script.ReplayBuffer, "sample", lambda self, n: seen.append(self.n_step) or sample(self, n))
    run(n_step=3, n_step_from=100, criterion="snip")
    assert seen == [1] * 40 + [3] * 60  # one batch by which snip scores connections, and then steps 61 to 159


def test_the_buffer_learns_of_every_end_of_an_episode(run, script, monkeypatch):
    """ProbeEnv: episodes of 7 steps are truncated, those of 5 terminate."""
    seen, add = [], script.ReplayBuffer.add
    monkeypatch.setattr(script.ReplayBuffer, "add", lambda self, *t: seen.append(t[-2:]) or add(self, *t))
    run(env_id="Probe-v0", total_timesteps=80, learning_starts=70, n_step=3)
    assert [i for i, (_, truncated) in enumerate(seen[:38], 1) if truncated] == [7, 14, 26, 33]
    assert [i for i, (terminated, _) in enumerate(seen[:38], 1) if terminated] == [19, 38]


def test_polyak_update(script):
    networks = {name: torch.nn.Linear(1, 1) for name in ("actor", "qf1", "qf2")}
    targets = {name: torch.nn.Linear(1, 1).requires_grad_(False) for name in ("qf2", "qf1")}
    for value, module in enumerate([*networks.values(), *targets.values()]):
        torch.nn.init.constant_(module.weight, value)
        torch.nn.init.constant_(module.bias, -value)
    script.polyak_update(targets, networks, 0.25)
    assert (targets["qf1"].weight.item(), targets["qf2"].weight.item()) == (4 - 0.75, 3 - 0.25)
    assert (targets["qf1"].bias.item(), targets["qf2"].bias.item()) == (-4 + 0.75, -3 + 0.25)
    assert [networks[name].weight.item() for name in networks] == [0, 1, 2]


def test_evaluate_gives_the_return_and_length_of_each_episode(script):
    """Episodes of 7, 7 and 5 steps with a reward of 1 each, see ProbeEnv; the observation arrives as float32 (1, 3)."""
    env = gym.make("Probe-v0")
    seen = []
    policy = lambda x: (seen.append(x), torch.zeros(1, 2))[1]  # noqa: E731
    assert script.evaluate(env, policy, 3, 0, torch.device("cpu")) == ([7.0, 7.0, 5.0], [7, 7, 5])
    assert len(seen) == 19 and seen[0].shape == (1, 3) and seen[0].dtype == torch.float32


def test_training_evaluates_without_noise_from_the_same_states(run, script, monkeypatch):
    policies, seeds = [], []

    def record(env, policy, episodes, seed, device, video):
        x = torch.randn(1, 3)
        policies.append(torch.equal(policy(x), policy(x)))
        seeds.append(seed)
        return [2.0, 4.0], [7, 8]

    monkeypatch.setattr(script, "evaluate", record)
    log = events(run(seed=7))
    assert policies == [True, True, True]
    assert {e.value for e in log.Scalars("eval/episodic_return")} == {3.0}
    assert {e.value for e in log.Scalars("eval/episodic_length")} == {7.5}
    assert len(set(seeds)) == 1 and seeds[0] != 7
