"""Losses, updates, actions, FLOPs and the replay buffer against calculations by hand."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ProbeEnv
from torch.distributions import Normal
from torch.distributions.transforms import TanhTransform

import lab.run
import sac_tar
import td3_tar
from lab.replay import ReplayBuffer
from sparse_utils import Net

SCALE, CENTRE = torch.tensor([1.0, 4.0]), torch.tensor([0.0, 2.0])


def layers_of(network):
    params = dict(network.named_parameters())
    return [params[f"fc{i}.{kind}"].detach() for i in (1, 2, 3) for kind in ("weight", "bias")]


class ByHand:
    """The agent in plain tensors: each network is a list of six, and all that learn have torch's own Adam."""

    def __init__(self, sac, args, state):
        self.sac, self.args = sac, args
        self.nets = {name: layers_of(part) for name, part in state.items() if hasattr(part, "fc1")}
        rates = (args.policy_lr, args.q_lr) if sac else (args.learning_rate, args.learning_rate)
        self.adam = {}
        for name, rate in (("actor", rates[0]), ("qf1", rates[1]), ("qf2", rates[1])):
            self.adam[name] = torch.optim.Adam([param.requires_grad_() for param in self.nets[name]], rate)
        if sac:
            self.log_alpha = torch.tensor([1.0 if args.autotune else args.alpha]).log()
            self.adam["alpha"] = torch.optim.Adam([self.log_alpha.requires_grad_()], rates[1])

    def apply(self, name, *x):
        w1, b1, w2, b2, w3, b3 = self.nets[name]
        return F.relu(F.relu(torch.cat(x, 1) @ w1.T + b1) @ w2.T + b2) @ w3.T + b3

    def sample(self, x):
        """SAC: actions, and their log densities by the change of variables."""
        mean, raw = self.apply("actor", x).chunk(2, 1)
        std = (-1.5 + 3.5 * torch.tanh(raw)).exp()
        u = mean + std * torch.randn_like(mean)
        density = Normal(mean, std).log_prob(u) - (SCALE * (1 - torch.tanh(u) ** 2)).log()
        return torch.tanh(u) * SCALE + CENTRE, density.sum(1, keepdim=True)

    def descend(self, loss, *names):
        params = [param for name in names for param in self.adam[name].param_groups[0]["params"]]
        for param, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = gradient
        for name in names:
            self.adam[name].step()

    def critic_losses(self, data):
        x, bonus = data.next_observations, 0
        if self.sac:
            action, density = self.sample(x)
            bonus = -self.log_alpha.exp() * density
        else:
            action = torch.tanh(self.apply("actor_target", x)) * SCALE + CENTRE
            noise = self.args.policy_noise * torch.randn_like(action)
            action += noise.clamp(-self.args.noise_clip, self.args.noise_clip) * SCALE
            action = action.minimum(CENTRE + SCALE).maximum(CENTRE - SCALE)
        value = torch.minimum(*(self.apply(f"{name}_target", x, action) for name in ("qf1", "qf2"))) + bonus
        target = (data.rewards + data.discounts * value).detach()
        for name in ("qf1", "qf2"):
            self.descend(((self.apply(name, data.observations, data.actions) - target) ** 2).mean(), name)

    def policy_loss(self, data):
        x = data.observations
        if not self.sac:
            action = torch.tanh(self.apply("actor", x)) * SCALE + CENTRE
            return self.descend(-self.apply("qf1", x, action).mean(), "actor")
        action, density = self.sample(x)
        value = torch.minimum(self.apply("qf1", x, action), self.apply("qf2", x, action))
        self.descend((self.log_alpha.exp().detach() * density - value).mean(), "actor")
        if self.args.autotune:  # the target entropy is minus the number of action dimensions
            self.descend((-self.log_alpha.exp() * (density.detach() - 2)).mean(), "alpha")

    @torch.no_grad()
    def follow(self):
        for name in (name for name in self.nets if name.endswith("_target")):
            for target, online in zip(self.nets[name], self.nets[name.removesuffix("_target")], strict=True):
                target.copy_((1 - self.args.tau) * target + self.args.tau * online)


@pytest.mark.parametrize("flags", [{}, {"autotune": False, "policy_frequency": 1, "n_step": 3}], ids=str)
def test_every_update_of_training_is_that_by_hand(run, script, monkeypatch, flags):
    """Losses and their gradients, learning rates, the order and number of updates, and how targets follow."""
    seen, calls, sac = SimpleNamespace(), [], script is sac_tar

    class Run(lab.run.Run):
        def __init__(self, args, script, env, state, rb):
            seen.args, seen.state, seen.hand = args, state, ByHand(sac, args, copy.deepcopy(state))
            super().__init__(args, script, env, state, rb)

    def spy(name, critics_learn):
        past = getattr(script, name)

        def loss(*arguments):
            data = next(part for part in arguments if hasattr(part, "rewards"))
            calls.append((name, data, torch.get_rng_state()))
            for qf in ("qf1", "qf2"):  # the actor's loss leaves no gradient in the critics
                assert all(p.requires_grad == critics_learn for p in seen.state[qf].parameters())
            return past(*arguments)

        monkeypatch.setattr(script, name, loss)

    monkeypatch.setattr(script, "Run", Run)
    spy("critic_losses", True)
    spy("policy_loss", False)
    own = {"policy_lr": 2e-3, "q_lr": 5e-3} if sac else {"learning_rate": 3e-3, "policy_noise": 0.4}
    flags = {name: value for name, value in flags.items() if name != "autotune" or sac}
    run(env_id="Probe-v0", method="dense", total_timesteps=66, tau=0.1, gamma=0.9, **own, **flags)
    expected, hand, every = [], seen.hand, seen.args.policy_frequency
    for step in range(61, 66):
        expected += ["critic_losses"] + ["policy_loss"] * (every if sac else 1) * (step % every == 0)
    assert [name for name, *_ in calls] == expected
    for i, (name, data, random) in enumerate(calls):
        torch.set_rng_state(random)
        getattr(hand, name)(data)
        if expected[i + 1 : i + 2] != ["policy_loss"] and (sac or name == "policy_loss"):
            hand.follow()  # the step is over; TD3's targets move along with the actor
    for name, params in hand.nets.items():
        for found, wanted in zip(layers_of(seen.state[name]), params, strict=True):
            torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=2e-5)
    if sac:
        torch.testing.assert_close(seen.state["entropy"].log_alpha.data, hand.log_alpha.data, rtol=1e-4, atol=1e-5)


def test_flops_by_hand(script):
    """Per connection and sample: 2 forward, 4 backward with the gradient of the weights, 2 back to the inputs alone."""
    nets = {name: Net(None, None, None, "tar", 0.9, active=n) for name, n in (("actor", 100), ("qf1", 10), ("qf2", 20))}
    critic_update = 2 * 100 + 2 * 30 + 6 * 30  # actor and targets forward, critics forward and backward
    actor_update = 6 * 100 + 4 * (30 if script is sac_tar else 10)  # TD3's actor learns from the first critic
    assert script.count_flops(nets, 5) == (2 * 100, 5 * critic_update, 5 * actor_update)
    nets["qf3"] = Net(None, None, None, "tar", 0.9, active=40)  # of a reader
    assert script.count_flops(nets, 5)[1] == 5 * (critic_update + 8 * 40)


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_sac_log_probability_is_that_of_the_squashed_normal(spread):
    """Also far out, where log(1 - tanh(x)^2 + 1e-6) is wrong by several nats a dimension."""
    torch.manual_seed(0)
    actor, x = sac_tar.Actor(ProbeEnv, 16).double(), spread * torch.randn(200, 3).double()
    mean, log_std = actor(x)
    torch.manual_seed(3)
    action, log_prob = actor.get_action(x)
    torch.manual_seed(3)
    u = mean + log_std.exp() * torch.randn_like(mean)
    torch.testing.assert_close(action, torch.tanh(u) * SCALE + CENTRE)
    slope = TanhTransform().log_abs_det_jacobian(u, torch.tanh(u)) + SCALE.log()
    expected = (Normal(mean, log_std.exp()).log_prob(u) - slope).sum(1, keepdim=True)
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)  # one constant is kept in float32
    torch.testing.assert_close(actor.get_mean_action(x), torch.tanh(mean) * SCALE + CENTRE)


def test_td3_noise_is_per_sample_and_dimension_and_clipped_per_dimension():
    torch.manual_seed(0)
    actor, centre = td3_tar.Actor(ProbeEnv, 16), CENTRE.expand(20000, 2)
    noise, clipped = (actor.add_noise(centre, *how) - centre for how in ((0.1,), (0.2, 0.05)))
    assert noise.std(0).tolist() == pytest.approx([0.1, 0.4], rel=0.03) and abs(torch.corrcoef(noise.T)[0, 1]) < 0.03
    assert clipped.abs().max(0).values.tolist() == pytest.approx([0.05, 0.2], rel=1e-4)
    at_bounds = actor.add_noise(torch.tensor([[1.0, -2.0]]).expand(1000, 2), 5.0)
    assert at_bounds.min(0).values.tolist() == [-1, -2] and at_bounds.max(0).values.tolist() == [1, 6]


def test_a_target_bootstraps_after_a_truncation_and_not_after_a_termination():
    """In a buffer of 4, before and after it was overrun: only what it holds is drawn, in float32."""
    rb = ReplayBuffer(sac_tar.Args(buffer_size=4), ProbeEnv, torch.device("cpu"))
    rb.rows.fill_(math.nan)  # what was never added shows
    ends = {4: (False, True), 5: (True, False), 6: (True, True)}
    for i in range(8):
        rb.add(np.full(3, i), np.full(3, i + 0.5), np.array([-i, i]), 10.0 * i, *ends.get(i, (False, False)))
        batch = rb.sample(200, 0.5, 0)
        number = batch.rewards / 10
        assert number.unique().tolist() == list(range(max(0, i - 3), i + 1))
        terminated = (number == 5) | (number == 6)
        expected = number.expand(-1, 3), number.expand(-1, 3) + 0.5, number * torch.tensor([-1, 1]), 10 * number
        assert all(map(torch.equal, batch, (*expected, 0.5 * (~terminated).float())))
