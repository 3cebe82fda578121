"""TD3 with static pruning and Topology-Aware Revival (TAR, arXiv 2602.04166), in one script.

python td3_tar.py --env-id Hopper-v4 --sparsity 0.9
python td3_tar.py --env-id Hopper-v4 --sparsity 0.9 --method static   # the control without revival
tensorboard --logdir runs

To read TAR, skip the lines marked BASELINES (other papers' methods) and KERNELS (speed).
"""

import copy
import math
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparse_utils
from lab import baselines, kernels
from lab.environment import make_env
from lab.flags import RunFlags, bad_input
from lab.record import settle
from lab.replay import Batch, ReplayBuffer
from lab.run import Run, main


# More flags: other papers' methods in lab/baselines.py; folder, device, evaluation and checkpoints in lab/flags.py. The
# comment on a flag is its --help. A flag without a comment names a rule; its --help quotes the docstrings of the rules.
@dataclass
class Args(baselines.Flags, RunFlags):
    exp_name: str = Path(__file__).stem  # The name of this experiment, which is part of the run folder's name.
    env_id: str = "Hopper-v4"  # A Gymnasium environment with a 1-D Box observation and a bounded 1-D Box action.
    seed: int = 1  # The seed of networks, environment, actions, replay indices and masks.
    total_timesteps: int = 1_000_000  # The number of environment steps.

    # Sparsity: README.md explains the method

    method: baselines.Method = "tar"
    critic_method: baselines.Method | None = None  # The method of the critics; default: --method.
    # The fraction of each network's weights that is pruned, in [0, 1). Biases stay dense.
    sparsity: float = 0.9
    critic_sparsity: float | None = None  # The sparsity of the critics; default: --sparsity.
    reserve: float = 0.1  # The fraction of the active connections that are revived, in [0, 1).
    criterion: baselines.Criterion = "magnitude"
    distribution: baselines.Distribution = "global"
    prune_at: int | None = None  # The environment step at which to prune and revive; default: --learning-starts.
    # How many neurons of each hidden layer get connections; default: all. auto, not in the paper: the most for which
    # the connections are at least 4 times the layers' summed topology need (README.md), but never too few to hold them.
    active_width: int | Literal["auto"] | None = None

    # Algorithm: the defaults are CleanRL's

    learning_starts: int = 25_000  # Environment steps with uniformly random actions before the first gradient step.
    hidden_size: int = 256  # Neurons in each of the two hidden layers of every network.
    buffer_size: int = 1_000_000  # Transitions that the replay buffer holds.
    batch_size: int = 256  # Transitions per gradient step.
    gamma: float = 0.99  # The discount factor per environment step.
    tau: float = 0.005  # The fraction by which an update moves targets toward the online networks.
    learning_rate: float = 3e-4  # The learning rate of the actor and the critics.
    policy_frequency: int = 2  # Environment steps between updates of the actor and of all targets.
    # The standard deviation of the noise on target actions, in units of half the action range.
    policy_noise: float = 0.2
    noise_clip: float = 0.5  # The bound of the noise on target actions, in units of half the action range.
    # The standard deviation of the noise on actions in the environment, in units of half the action range.
    exploration_noise: float = 0.1


# ALGO LOGIC: the networks and their losses, which pruning and rewiring by a loss use too
def mlp_layers(input_size: int, hidden_size: int, output_size: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        fc1=nn.Linear(input_size, hidden_size),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden_size, hidden_size),
        relu2=nn.ReLU(),
        fc3=nn.Linear(hidden_size, output_size),
    )


class QNetwork(nn.Sequential):
    def __init__(self, env: gym.Env, hidden_size: int):
        super().__init__(mlp_layers(env.observation_space.shape[0] + env.action_space.shape[0], hidden_size, 1))

    def forward(self, x, a):
        return super().forward(torch.cat([x, a], 1))


class Actor(nn.Sequential):
    def __init__(self, env: gym.Env, hidden_size: int):
        super().__init__(mlp_layers(env.observation_space.shape[0], hidden_size, env.action_space.shape[0]))
        high, low = torch.from_numpy(env.action_space.high).float(), torch.from_numpy(env.action_space.low).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)

    def forward(self, x):
        return torch.tanh(super().forward(x)) * self.action_scale + self.action_bias

    def add_noise(self, action, std: float, clip: float = math.inf):
        """Actions (batch, action_size) plus Gaussian noise, within the bounds; std, clip in units of half the range."""
        noise = (torch.randn_like(action) * std).clamp(-clip, clip) * self.action_scale
        return (action + noise).clamp(self.action_low, self.action_high)


def critic_losses(actor_target, qf1, qf2, qf1_target, qf2_target, args: Args, data: Batch):
    """Both critics' mean squared TD errors (Fujimoto et al. 2018), and their Q-values of shape (batch_size, 1)."""
    with torch.no_grad():
        next_actions = actor_target.add_noise(actor_target(data.next_observations), args.policy_noise, args.noise_clip)
        qf1_next_target = qf1_target(data.next_observations, next_actions)
        qf2_next_target = qf2_target(data.next_observations, next_actions)
        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
        next_q_value = data.rewards + data.discounts * min_qf_next_target  # discounts: gamma ** steps, 0 if terminated
    qf1_values, qf2_values = qf1(data.observations, data.actions), qf2(data.observations, data.actions)
    return F.mse_loss(qf1_values, next_q_value), F.mse_loss(qf2_values, next_q_value), qf1_values, qf2_values


def policy_loss(actor, qf1, data: Batch):
    """The actor's loss (Fujimoto et al. 2018): minus the mean Q-value of its actions by the first critic."""
    return -qf1(data.observations, actor(data.observations)).mean()


def count_flops(nets: dict[str, sparse_utils.Net], batch_size: int) -> tuple[int, int, int]:
    """Floating-point operations of an action, a critic update and an actor update, as the field counts them (Evci et
    al. 2020). Per active connection and sample: 2 forward, 2 backward to the inputs and 2 for the gradient of the
    weights. Biases, activations, optimizers and one-off pruning are left out. The first network is the actor, all
    others are critics. A critic update runs all targets forward, and the critics forward and backward. An actor update
    runs the actor forward and backward, and one critic forward and back to its inputs."""
    actor, *critics = (2 * net.active for net in nets.values())
    return actor, batch_size * (actor + 4 * sum(critics)), batch_size * (3 * actor + 2 * critics[0])


@torch.no_grad()
def polyak_update(targets: nn.Module, online: nn.Module, tau: float) -> None:
    """target += tau * (online - target), all parameters of all targets in one call. Buffers do not follow."""
    torch._foreach_lerp_(list(targets.parameters()), list(online.parameters()), tau)


def train(args: Args) -> Path:
    """Train, log and save one run, or the rest of one with --resume. Returns the run folder."""
    args = settle(args)  # a checked copy: flags that default to another flag have its value, unused flags their default
    device = torch.device(args.device)
    torch.set_num_threads(args.torch_threads)

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env = make_env(args.env_id)  # put wrappers into make_env in lab/environment.py, so that evaluations have them too
    env.action_space.seed(args.seed)
    # masks are drawn from a generator of their own, so that methods share initial weights and replay indices
    mask_generator = torch.Generator().manual_seed(args.seed + 2**31)

    # ALGO LOGIC: initialize agent here
    with bad_input():  # a ValueError inside ends the program with its sentence, without a traceback
        # BASELINES: --hidden-size, or fewer neurons with --method tiny
        actor_hidden = baselines.hidden_size(Actor, env, args.hidden_size, args.method, args.sparsity)
        critic_hidden = baselines.hidden_size(QNetwork, env, args.hidden_size, args.critic_method, args.critic_sparsity)
        rb = ReplayBuffer(args, env, device)
    actor = Actor(env, actor_hidden).to(device)
    qf1 = QNetwork(env, critic_hidden).to(device)
    qf2 = QNetwork(env, critic_hidden).to(device)
    actor_target = copy.deepcopy(actor).requires_grad_(False)
    qf1_target = copy.deepcopy(qf1).requires_grad_(False)
    qf2_target = copy.deepcopy(qf2).requires_grad_(False)
    critics = nn.ModuleList([qf1, qf2])
    online, targets = nn.ModuleList([actor, *critics]), nn.ModuleList([actor_target, qf1_target, qf2_target])
    # KERNELS: torch.optim.Adam(..., fused=True) gives the same bits, a little slower
    actor_optimizer = kernels.Adam(actor.parameters(), lr=args.learning_rate)
    q_optimizer = kernels.Adam(critics.parameters(), lr=args.learning_rate)

    # the networks to prune, each with its target, if any (it gets the same mask), optimizer, method and sparsity
    nets = {
        "actor": sparse_utils.Net(actor, actor_target, actor_optimizer, args.method, args.sparsity),
        "qf1": sparse_utils.Net(qf1, qf1_target, q_optimizer, args.critic_method, args.critic_sparsity),
        "qf2": sparse_utils.Net(qf2, qf2_target, q_optimizer, args.critic_method, args.critic_sparsity),
    }
    with bad_input():
        for net in nets.values():
            sparse_utils.plan(net, args.reserve, args.active_width)  # K connections, R of them by revival
        schedule = baselines.Schedule(args, nets, mask_generator)  # BASELINES: at which steps to prune and rewire
    progress = {"training_flops": 0, "actor_losses": {}}  # actor_losses: of the actor's last update, for the log
    # a checkpoint holds everything that is in this dictionary: add here what you add to the agent
    state = {
        "actor": actor, "qf1": qf1, "qf2": qf2, "actor_target": actor_target, "qf1_target": qf1_target,
        "qf2_target": qf2_target, "actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer, "nets": nets,
        "schedule": schedule, "mask_generator": mask_generator, "progress": progress,
    }  # fmt: skip
    run = Run(args, Path(__file__), env, state, rb)  # makes the run folder; with --resume it loads a checkpoint

    def own_losses(batch_size: int) -> dict[str, torch.Tensor]:
        """The training loss of each network on one batch of replay data, scalars by name, for pruning and rewiring.
        Leaves torch's random generators as they were."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            data = rb.sample(batch_size, args.gamma, global_step)
            qf1_loss, qf2_loss, _, _ = critic_losses(actor_target, qf1, qf2, qf1_target, qf2_target, args, data)
            actor_loss = policy_loss(actor, qf1, data)
        return {"actor": actor_loss, "qf1": qf1_loss, "qf2": qf2_loss}

    # TRY NOT TO MODIFY: start the game; with --resume or --load, Run(...) has already loaded the saved agent
    done = True
    for global_step in run.steps():  # the last one, --total-timesteps, only evaluates
        if done:
            obs = run.reset(global_step)  # resets the environment; checkpoints are written here, between episodes
            done, episodic_return, episodic_length = False, 0.0, 0

        # STATIC PRUNING AND TOPOLOGY-AWARE REVIVAL: once, at --prune-at, by default before the first gradient step
        if global_step in schedule.prunings:
            with kernels.in_torch(nets), schedule.pruning(global_step) as criterion:  # KERNELS, BASELINES: --criterion
                # prune: in each network K - R connections survive, in each layer those with the highest scores
                losses = own_losses(10 * args.batch_size) if sparse_utils.CRITERIA[criterion].uses_loss else {}
                for name, net in nets.items():
                    net.static = sparse_utils.static_prune(
                        net, net.budget - net.reserve, criterion, args.distribution, mask_generator, losses.get(name)
                    )
                # revive: R pruned connections come back with their weights, at random in the layers whose topology
                # needs them (static: R = 0); after all pruning, so that --criterion random draws alike in all methods
                for net in nets.values():
                    counts = sparse_utils.revival_counts(net)  # how many in each layer
                    net.masks = sparse_utils.revive(net, counts, mask_generator)
                # train sparse: zero the pruned weights and, from here on, their gradients, so that they stay zero
                sparse_utils.fix_masks(nets)
            run.log_topology(global_step)

        # noise-free episodes, every --eval-frequency steps and at the end
        run.evaluate(global_step, actor, progress["training_flops"], count_flops(nets, 1)[0])
        if global_step == args.total_timesteps:
            break

        # BASELINES: rewiring (set, rigl, cht, chts), learning rates of --lr-cycles, temperature of dynadiag
        progress["training_flops"] += schedule.step(global_step, own_losses, run)
        action_flops, critic_flops, actor_flops = count_flops(nets, args.batch_size)

        # ALGO LOGIC: put action logic here
        if global_step < args.learning_starts and args.load is None:
            action = env.action_space.sample()
        else:
            with torch.no_grad():
                obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0)
                action = actor.add_noise(actor(obs_tensor), args.exploration_noise)
            action = action[0].cpu().numpy()
            progress["training_flops"] += action_flops

        # TRY NOT TO MODIFY: execute the game and store the transition
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # CRUCIAL, easy to overlook: a truncated episode is not over, so only `terminated` ends the bootstrapping
        rb.add(obs, next_obs, action, reward, terminated, truncated)
        obs, done = next_obs, terminated or truncated
        episodic_return += reward
        episodic_length += 1
        if done:
            run.log(global_step, {"charts/episodic_return": episodic_return, "charts/episodic_length": episodic_length})

        # ALGO LOGIC: training; put further losses into the functions above, which pruning and rewiring use too
        if global_step > run.learn_from:  # --learning-starts, or later if a resumed run refills its buffer
            data = rb.sample(args.batch_size, args.gamma, global_step)
            qf1_loss, qf2_loss, qf1_values, qf2_values = critic_losses(
                actor_target, qf1, qf2, qf1_target, qf2_target, args, data
            )
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            q_optimizer.step()
            progress["training_flops"] += critic_flops

            if global_step % args.policy_frequency == 0:
                with kernels.frozen(critics):  # KERNELS: inside, no weight of the critics gets a gradient
                    actor_loss = policy_loss(actor, qf1, data)
                    progress["actor_losses"]["losses/actor_loss"] = actor_loss.detach()
                    actor_optimizer.zero_grad()
                    actor_loss.backward()
                    actor_optimizer.step()
                    progress["training_flops"] += actor_flops
                polyak_update(targets, online, args.tau)

            if global_step % 100 == 0 or global_step == args.total_timesteps - 1:
                losses = {
                    "losses/qf1_values": qf1_values.mean(),
                    "losses/qf2_values": qf2_values.mean(),
                    "losses/qf1_loss": qf1_loss,
                    "losses/qf2_loss": qf2_loss,
                    "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
                }
                run.log(global_step, losses | progress["actor_losses"] | run.speed(global_step))

    return run.finish()  # final.pt and eval/final_return


if __name__ == "__main__":
    main(Args, train)
