"""TD3 with static pruning and Topology-Aware Revival (TAR, arXiv 2602.04166), in one file.

python td3_tar.py --env-id Hopper-v4 --sparsity 0.9
python td3_tar.py --env-id Hopper-v4 --sparsity 0.9 --method static   # the control without revival
tensorboard --logdir runs
"""

import copy
import math
import random
import signal
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from gymnasium.wrappers import RecordVideo
from torch.utils.tensorboard import SummaryWriter

from lab import kernels
import sparse_utils
from lab import run_folder
from lab.checks import bad_input, check_args, complete_args, make_env, one_of

# every rule is one function and one line in a dictionary of sparse_utils.py, from which these take names and help
Method = one_of(sparse_utils.METHODS, "arm; all but dense have the same number of connections (tiny: at most)")
Criterion = one_of(sparse_utils.CRITERIA, "score by which static pruning ranks connections")
Distribution = one_of(sparse_utils.DISTRIBUTIONS, "how static pruning spreads the budget over layers")
DropCriterion = one_of(sparse_utils.DROPS | {None: "soft with chts, else magnitude"}, "worth; the lowest is dropped")


@dataclass
class Args:
    env_id: str = "Hopper-v4"  # Gymnasium environment with a 1-D Box observation and a bounded 1-D Box action
    exp_name: str = Path(__file__).stem  # name of this experiment, part of the run folder's name
    seed: int = 1  # seed of the networks, the environment, its action space, the replay indices and the masks
    runs_dir: str = "runs"  # folder in which the run makes a folder of its own
    device: Literal["cpu", "cuda"] = "cpu"  # where networks and replay buffer live
    torch_threads: int = 1  # threads of torch on the CPU; one run per core is the fastest use of a machine

    # Sparsity (README: "The method")

    method: Method = "tar"
    actor_method: Method | None = None  # another --method for the actor alone
    critic_method: Method | None = None  # another --method for the critics alone
    sparsity: float = 0.9  # fraction of each network's weights that is pruned, in [0, 1); biases stay; dense ignores it
    actor_sparsity: float | None = None  # another --sparsity for the actor alone
    critic_sparsity: float | None = None  # another --sparsity for the critics alone
    reserve: float = 0.1  # fraction of the active connections that revival places, where it does, in [0, 1)
    criterion: Criterion = "random"
    distribution: Distribution = "er"
    prune_at: int | None = None  # environment step at which to prune and revive; default: --learning-starts
    # weights at pruning: as the dense network drew them, or scaled to each unit's active inputs (Evci et al. 2022)
    init: Literal["dense", "sparse"] = "dense"
    actor_init: Literal["dense", "sparse"] | None = None  # another --init for the actor alone
    critic_init: Literal["dense", "sparse"] | None = None  # another --init for the critics alone
    # density that pruning begins with; it falls to the budget over the rewirings (CHTss, Zhang et al. 2025)
    density_start: float | None = None
    # or, where masks stay, at this environment step, by magnitude (as SCULPT, Gadhikar et al. 2024); revival comes then
    final_prune_at: int | None = None
    # neurons of each hidden layer that get connections; auto: as many as the budget can feed; default: all (the paper)
    active_width: int | Literal["auto"] | None = None
    rewire_every: int = 1000  # methods that rewire: environment steps between rewirings (Graesser et al. 2022)
    # methods that rewire: fraction of a layer rewired at first; cosine decay (Graesser et al. 2022)
    rewire_fraction: float = 0.5
    rewire_stop: float = 0.8  # methods that rewire: fraction of training after which masks stay (Graesser et al. 2022)
    drop_criterion: DropCriterion = None
    regrow: bool = True  # methods that rewire: what was just dropped may grow again (Evci et al. 2020)
    # masked: dense products with zeros in them; sparse: C++ kernels on the stored values; auto: what is faster here
    compute: Literal["auto", "masked", "sparse"] = "auto"

    # Evaluation

    eval_frequency: int = 5000  # environment steps between evaluations; also at step 0 and the end (Fujimoto et al.)
    eval_episodes: int = 10  # noise-free episodes per evaluation, on an environment of its own (Fujimoto et al. 2018)

    # Interrupt, resume, watch

    resume: str | None = None  # run folder to continue from its last checkpoint; other flags are then those of the run
    checkpoint_frequency: int = 10_000  # environment steps between checkpoints
    save_buffer: bool = True  # keep the replay buffer in checkpoints; if not, a resumed run collects a new one first
    evaluate: str | None = None  # run folder or .pt file whose policy to run noise-free, --eval-episodes times, instead
    capture_video: bool = False  # write an mp4 of each evaluation's first episode into the run folder

    # Algorithm (defaults are CleanRL's)

    total_timesteps: int = 1_000_000  # environment steps of training (CleanRL)
    # environment steps with uniformly random actions before the first gradient step (CleanRL)
    learning_starts: int = 25_000
    hidden_size: int = 256  # neurons in each of the two hidden layers of every network (CleanRL)
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds (CleanRL)
    batch_size: int = 256  # transitions per gradient step (CleanRL)
    recent_fraction: float = 0.0  # fraction of each batch drawn from the newest transitions alone, in [0, 1) (MAST)
    recent_size: int = 20_000  # how many transitions these are [ours]
    gamma: float = 0.99  # discount factor per environment step (CleanRL)
    n_step: int = 1  # rewards that a critic's target adds up before it bootstraps (RLx2: 3)
    n_step_from: int = 0  # environment step before which it is one reward nevertheless (RLx2: 300,000)
    tau: float = 0.005  # fraction by which a target update moves the targets to the online networks (CleanRL)
    learning_rate: float = 3e-4  # learning rate of the actor and the critics, Adam (CleanRL)
    # cycles in which all learning rates rise and fall, Adam anew in each (SCULPT, Gadhikar et al. 2024); default: none
    lr_cycles: int | None = None
    policy_frequency: int = 2  # environment steps between updates of the actor and all targets (Fujimoto et al. 2018)
    # standard deviation of the noise on target actions, in units of half the action range (Fujimoto et al. 2018)
    policy_noise: float = 0.2
    noise_clip: float = 0.5  # bound of that noise, in the same unit (Fujimoto et al. 2018)
    # standard deviation of the noise on actions in the environment, in the same unit (Fujimoto et al. 2018)
    exploration_noise: float = 0.1


SCRIPT = Path(__file__)
STOP_SIGNALS = []  # SIGINT or SIGTERM, once received
SPS_BURN_IN = 1000  # steps after learning starts and pruning that do not count in charts/SPS


@dataclass
class Progress:
    """What changes while a run goes on, beside networks, optimizers and replay buffer; a checkpoint holds all of it."""

    masks: dict = field(default_factory=dict)  # of each network, layer name to mask; empty until it is pruned
    revived_masks: dict = field(default_factory=dict)  # the same as revival left them
    stopped: dict = field(default_factory=dict)  # of each network, the layers that cht and chts rewire no more
    training_flops: int = 0
    actor_scalars: dict = field(default_factory=dict)  # of the actor's last update, logged with the critics'
    episode_generator: dict | None = None  # state of the environment's generator before the reset of this episode
    episode_actions: list = field(default_factory=list)  # since that reset; the same ones replay the episode
    returns: dict = field(default_factory=dict)  # mean return of each evaluation, by its step
    sps_seconds: float = 0.0  # of training that counts in charts/SPS


class Batch(NamedTuple):
    """Float32 tensors of shape (batch_size, width); rewards and discounts have width 1."""

    observations: torch.Tensor
    next_observations: torch.Tensor  # after n steps; a critic's target bootstraps from these
    actions: torch.Tensor
    rewards: torch.Tensor  # the discounted sum of n
    discounts: torch.Tensor  # of the value of next_observations: gamma ** n, or 0 after a termination


class ReplayBuffer:
    """The last transitions, one float32 row each, in one block, which on the CPU takes memory as it fills."""

    def __init__(self, args: Args, observation_size: int, action_size: int, device: torch.device):
        self.widths = [observation_size, observation_size, action_size, 1, 1, 1]
        self.rows = torch.empty(args.buffer_size, sum(self.widths), device=device)
        self.args, self.added, self.n_step = args, 0, args.n_step

    def add(self, obs, next_obs, action, reward, terminated, truncated) -> None:
        row = np.concatenate([obs, next_obs, action, [reward, terminated, truncated]], dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int) -> Batch:
        """Drawn from all, --recent-fraction of it from the newest. A target takes fewer than `n_step` steps where the
        episode ends or the newest transition is reached."""
        held, newest = min(self.added, len(self.rows)), (self.added - 1) % len(self.rows)
        indices = torch.randint(held, (batch_size,), device=self.rows.device)
        if recent := round(self.args.recent_fraction * batch_size):
            ages = torch.randint(min(held, self.args.recent_size), (recent,), device=self.rows.device)
            indices[:recent] = (newest - ages) % held
        obs, next_obs, action, rewards, terminated, truncated = self.rows.index_select(0, indices).split(self.widths, 1)
        discounts = torch.full_like(rewards, self.args.gamma)
        for _ in range(1, self.n_step):
            goes_on = (indices.unsqueeze(1) != newest) & (terminated + truncated == 0)
            indices = (indices + goes_on.squeeze(1)) % held
            _, next_obs, _, reward, terminated, truncated = self.rows.index_select(0, indices).split(self.widths, 1)
            rewards = rewards + goes_on * discounts * reward
            discounts = torch.where(goes_on, self.args.gamma * discounts, discounts)
        return Batch(obs, next_obs, action, rewards, (1 - terminated) * discounts)


# ALGO LOGIC: the networks and their losses
def mlp_layers(input_size: int, hidden_size: int, output_size: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(
        fc1=nn.Linear(input_size, hidden_size),
        relu1=nn.ReLU(inplace=True),
        fc2=nn.Linear(hidden_size, hidden_size),
        relu2=nn.ReLU(inplace=True),
        fc3=nn.Linear(hidden_size, output_size),
    )


class QNetwork(nn.Sequential):
    def __init__(self, observation_size: int, action_size: int, hidden_size: int):
        super().__init__(mlp_layers(observation_size + action_size, hidden_size, 1))

    def forward(self, x, a):
        return super().forward(torch.cat([x, a], 1))


class Actor(nn.Sequential):
    def __init__(self, observation_size: int, action_space: gym.spaces.Box, hidden_size: int):
        super().__init__(mlp_layers(observation_size, hidden_size, action_space.shape[0]))
        high, low = torch.from_numpy(action_space.high).float(), torch.from_numpy(action_space.low).float()
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)

    def forward(self, x):
        return torch.tanh(super().forward(x)) * self.action_scale + self.action_bias

    def add_noise(self, action, std: float, clip: float = math.inf):
        """Gaussian noise for each action and dimension, scaled and then clipped by the environment's own bounds."""
        noise = (torch.randn_like(action) * std).clamp(-clip, clip) * self.action_scale
        return (action + noise).clamp(self.action_low, self.action_high)


def critic_losses(actor_target, qf1, qf2, qf1_target, qf2_target, data: Batch, args: Args):
    """Both critics' mean squared TD errors, and their values of shape (batch_size, 1)."""
    with torch.no_grad():
        next_actions = actor_target.add_noise(actor_target(data.next_observations), args.policy_noise, args.noise_clip)
        qf1_next_target = qf1_target(data.next_observations, next_actions)
        qf2_next_target = qf2_target(data.next_observations, next_actions)
        min_qf_next_target = torch.min(qf1_next_target, qf2_next_target)
        next_q_value = data.rewards + data.discounts * min_qf_next_target
    qf1_values, qf2_values = qf1(data.observations, data.actions), qf2(data.observations, data.actions)
    return F.mse_loss(qf1_values, next_q_value), F.mse_loss(qf2_values, next_q_value), qf1_values, qf2_values


def policy_loss(actor, qf1, data: Batch):
    """The actor's loss."""
    return -qf1(data.observations, actor(data.observations)).mean()


def count_flops(connections: dict[str, int], batch_size: int) -> tuple[int, int, int]:
    """Floating-point operations of an action, a critic update and an actor update, as the field counts them (Evci et
    al. 2020): 2 per connection and sample forward; backward 2 for the gradient of the inputs and 2 for that of the
    weights. A critic update runs three targets forward, and both critics forward and backward. An actor update runs the
    actor forward and backward, and one critic forward and back to its inputs. Biases, activations, optimizers and
    one-off pruning are left out."""
    actor, qf1, qf2 = (2 * connections[name] for name in ("actor", "qf1", "qf2"))
    actor_update = 3 * actor + 2 * qf1
    return actor, batch_size * (actor + 4 * (qf1 + qf2)), batch_size * actor_update


@torch.no_grad()
def evaluate(env: gym.Env, policy, episodes: int, seed: int, device: torch.device, video: str = ""):
    """Lists of the returns and lengths of noise-free episodes. Reseeded, so that every evaluation starts from the same
    states (if only resets draw random numbers). With `video`, the first episode is filmed under that name."""
    returns, lengths = [0.0] * episodes, [0] * episodes
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        if video and episode == 0:
            env.start_recording(video)
        done = False
        while not done:
            action = policy(torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0))[0]
            obs, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
            done = terminated or truncated
            returns[episode] += float(reward)
            lengths[episode] += 1
        if video and episode == 0:
            env.stop_recording()
    return returns, lengths


def parameters_of(networks: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [param for network in networks for param in network.parameters()]


@torch.no_grad()
def polyak_update(targets: dict[str, nn.Module], networks: dict[str, nn.Module], tau: float) -> None:
    """target += tau * (param - target), all parameters of all targets in one fused call."""
    online = parameters_of(networks[name] for name in targets)
    torch._foreach_lerp_(parameters_of(targets.values()), online, tau)


def cycle_start(k: int, start: int, end: int, cycles: int) -> int:
    """The first step of cycle k = 0, 1, ... of `cycles` that split the steps from `start` to before `end` evenly."""
    return start - (start - end) * k // cycles


def lr_factor(step: int, start: int, end: int, cycles: int) -> float:
    """By what SCULPT multiplies the rate at this step: within a cycle the factor rises linearly from 0.2 to 1 over the
    first fifth, then falls linearly to 0."""
    done = (step - start) * cycles % (end - start) / (end - start)  # of the cycle
    return 0.2 + 4 * done if done < 0.2 else (1 - done) / 0.8


def train(args: Args) -> Path:
    """Train, log and save one run, or the rest of one with --resume. Returns the run folder."""
    complete_args(args)
    check_args(args)
    env, eval_env = make_env(args.env_id), make_env(args.env_id, args.capture_video)
    device = torch.device(args.device)
    checkpoint = None if args.resume is None else run_folder.load_checkpoint(args.resume, SCRIPT, device)
    torch.set_num_threads(args.torch_threads)

    # TRY NOT TO MODIFY: seeding
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    env.action_space.seed(args.seed)
    # evaluation and masks draw from seeds and generators of their own, so that no arm shifts the others' training
    eval_seed = args.seed + 2**31
    mask_generator = torch.Generator().manual_seed(args.seed + 2**31)

    # ALGO LOGIC: initialize agent here
    observation_size, action_size = env.observation_space.shape[0], env.action_space.shape[0]
    new_actor = partial(Actor, observation_size, env.action_space)
    new_qf = partial(QNetwork, observation_size, action_size)
    with bad_input():
        actor_hidden = sparse_utils.hidden_neurons(new_actor, args.hidden_size, args.actor_method, args.actor_sparsity)
        critic_hidden = sparse_utils.hidden_neurons(new_qf, args.hidden_size, args.critic_method, args.critic_sparsity)
    actor = new_actor(actor_hidden).to(device)
    qf1 = new_qf(critic_hidden).to(device)
    qf2 = new_qf(critic_hidden).to(device)
    actor_target = copy.deepcopy(actor).requires_grad_(False)
    qf1_target = copy.deepcopy(qf1).requires_grad_(False)
    qf2_target = copy.deepcopy(qf2).requires_grad_(False)
    networks = {"actor": actor, "qf1": qf1, "qf2": qf2}
    targets = {"actor": actor_target, "qf1": qf1_target, "qf2": qf2_target}
    actor_optimizer = optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
    q_optimizer = optim.Adam(parameters_of([qf1, qf2]), lr=args.learning_rate, fused=True)
    rb = ReplayBuffer(args, observation_size, action_size, device)
    # a checkpoint holds all that is in `modules`, Adam's state of those in `optimizers`, and `progress`: what you add
    # to the agent (a temperature, a normalizer) is saved and restored if you put it there
    modules = networks | {f"{name}_target": target for name, target in targets.items()}
    optimizers = {"actor": actor_optimizer, "qf1": q_optimizer, "qf2": q_optimizer}
    progress = Progress()

    # K and R of each network, and how many neurons of a hidden layer they are for; masks come at --prune-at
    methods = {"actor": args.actor_method, "qf1": args.critic_method, "qf2": args.critic_method}
    sparsities = {"actor": args.actor_sparsity, "qf1": args.critic_sparsity, "qf2": args.critic_sparsity}
    inits = {"actor": args.actor_init, "qf1": args.critic_init, "qf2": args.critic_init}
    dynamic = [name for name, method in methods.items() if method in sparse_utils.GROWTHS]
    sizes = {name: sum(w.numel() for w in sparse_utils.linear_weights(net).values()) for name, net in networks.items()}
    with bad_input():
        run_folder.check_parts(modules, optimizers)
        budgets = {
            name: sparse_utils.connection_budget(size, methods[name], sparsities[name], args.reserve)
            for name, size in sizes.items()
        }
        widths = sparse_utils.active_widths(networks, methods, budgets, args.active_width)
        starts = sparse_utils.starting_budgets(networks, methods, budgets, widths, args.density_start)
        kept = run_folder.kept_in_kernels(args, checkpoint)
        parts = (networks, optimizers, starts, widths)
        in_kernels, times = kernels.choose(args.compute, device, *parts, args.batch_size, kept)
    prunings = {args.final_prune_at: ("magnitude", budgets), args.prune_at: (args.criterion, starts)}
    action_flops, critic_flops, actor_flops = count_flops(sizes, args.batch_size)

    # nothing is written before this
    run_dir = Path(args.resume) if checkpoint else run_folder.make_run_dir(SCRIPT, args, in_kernels, times)
    run_folder.claim(run_dir)
    start_step, learn_from = 0, args.learning_starts
    if checkpoint:
        run_folder.restore(checkpoint, modules, optimizers, progress)
        start_step = checkpoint["global_step"]
        if args.save_buffer or start_step <= args.prune_at:
            rb.added = checkpoint["added"]
        else:  # collect anew before learning goes on
            learn_from += start_step
        args.resume = None  # from here on it is that run
        run_folder.rewind(run_dir, SCRIPT, args, in_kernels, times, checkpoint, rb.rows, rb.added)
    rewire_until = args.rewire_stop * args.total_timesteps
    rewirings = sparse_utils.rewiring_steps(max(args.learning_starts, args.prune_at), rewire_until, args.rewire_every)
    by_gradient = any(sparse_utils.reads_gradient(methods[name], args.drop_criterion) for name in dynamic)
    cycles = (args.learning_starts, args.total_timesteps, args.lr_cycles)
    cycle_starts = [cycle_start(k, *cycles) for k in range(args.lr_cycles or 0)]
    writer = SummaryWriter(run_dir)
    if not checkpoint:
        run_folder.log_args(writer, args)

    def save_checkpoint(global_step: int) -> None:
        """All that the rest of the run depends on, the environment as its generator and actions since the reset."""
        writer.flush()
        progress.sps_seconds = time.perf_counter() - sps_from_time
        state = run_folder.final_state(SCRIPT, args, global_step, modules, progress.masks)
        state |= run_folder.training_state(modules, optimizers, progress)
        state["random"] = run_folder.random_states(mask_generator, env.action_space)
        with_buffer = args.save_buffer or global_step <= args.prune_at  # pruning may need it
        run_folder.save_checkpoint(run_dir, state, rb.rows if with_buffer else None, rb.added)

    if args.capture_video:
        eval_env = RecordVideo(eval_env, run_dir / "videos", lambda episode: False)

    def log_evaluation(global_step: int) -> None:
        video = f"step-{global_step}" if args.capture_video else ""
        returns, lengths = evaluate(eval_env, actor, args.eval_episodes, eval_seed, device, video)
        progress.returns[global_step] = mean_return = float(np.mean(returns))
        scalars = {"eval/episodic_return": mean_return, "eval/episodic_length": np.mean(lengths)}
        run_folder.log_scalars(writer, global_step, scalars | {"flops/training": progress.training_flops})

    def own_losses(batch_size: int) -> dict[str, torch.Tensor]:
        """Each network's loss on replay data, drawn so that the random numbers of training do not shift."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            data = rb.sample(batch_size)
            qf1_loss, qf2_loss, _, _ = critic_losses(actor_target, qf1, qf2, qf1_target, qf2_target, data, args)
            actor_loss = policy_loss(actor, qf1, data)
        return {"actor": actor_loss, "qf1": qf1_loss, "qf2": qf2_loss}

    episodic_return, episodic_length = 0.0, 0
    sps_from_step = max(args.learning_starts, args.prune_at) + SPS_BURN_IN
    # TRY NOT TO MODIFY: start the game
    obs, _ = env.reset(seed=args.seed)
    if checkpoint:  # back to the middle of its episode: the same reset, the same actions
        obs, episodic_return, episodic_length = run_folder.replay_episode(env, obs, progress)
        run_folder.set_random_states(checkpoint["random"], mask_generator, env.action_space)
    bar = run_folder.progress_bar(start_step, args.total_timesteps)  # the last step only saves and evaluates
    sps_from_time = time.perf_counter() - progress.sps_seconds
    for global_step in bar:
        last = global_step == args.total_timesteps
        rb.n_step = args.n_step if global_step >= args.n_step_from else 1
        if STOP_SIGNALS or last or global_step % args.checkpoint_frequency == 0:
            save_checkpoint(global_step)
        if STOP_SIGNALS:
            run_folder.stop(writer, SCRIPT, run_dir, global_step, STOP_SIGNALS[0])

        # STATIC PRUNING AND TOPOLOGY-AWARE REVIVAL: once, by default before the first gradient step; --final-prune-at
        # comes back to prune further, by magnitude, and leaves revival to that time
        if global_step in prunings:
            criterion, due = prunings[global_step]
            kernels.expand(in_kernels, networks, targets, optimizers)
            # prune: K - R connections of each network survive, the highest by score
            losses = own_losses(10 * args.batch_size) if sparse_utils.CRITERIA[criterion].uses_loss else {}
            static_masks = {}
            for name, (budget, reserve) in due.items():
                weights = sparse_utils.linear_weights(networks[name])
                base = (criterion, args.distribution, mask_generator, losses.get(name), widths[name])
                left = progress.masks.get(name)
                static_masks[name] = sparse_utils.static_prune(weights, budget - reserve, *base, left)
            # revive: R pruned connections come back in the layers whose topology needs them, at random or by PLACES
            for name, (_, reserve) in due.items():  # R is 0 for the methods that revive nothing
                spread = sparse_utils.REVIVALS.get(methods[name], sparse_utils.no_revival)
                part = sparse_utils.active_part(static_masks[name], widths[name])
                places = sparse_utils.PLACES.get(methods[name])
                revived = sparse_utils.revive(part, spread(part, reserve), mask_generator, places)
                progress.revived_masks[name] = sparse_utils.embed(revived, static_masks[name])
            progress.masks = copy.deepcopy(progress.revived_masks)  # rewiring changes them in place
            made = (static_masks, progress.masks, observation_size)
            run_folder.log_topology(writer, run_dir, global_step, due, widths, *made)
            for name in [name for name, init in inits.items() if init == "sparse" and global_step == args.prune_at]:
                for network in [networks[name], *([targets[name]] if name in targets else [])]:
                    sparse_utils.scale_to_active_inputs(network, progress.masks[name])
        # train sparse: a revived weight still has the value it had; what is pruned is zero and stays so, since hooks on
        # the weights zero its gradient before backward() returns
        if global_step in prunings or (global_step == start_step and progress.masks):
            sparse_utils.fix_masks(networks, targets, optimizers, progress.masks)
            kernels.compact(in_kernels, networks, targets, optimizers, progress.masks)  # for speed alone
            active = sparse_utils.active_connections(progress.masks)
            action_flops, critic_flops, actor_flops = count_flops(active, args.batch_size)
            if global_step in prunings:
                writer.add_scalar("flops/inference", action_flops, global_step)

        if global_step == sps_from_step:
            sps_from_time = time.perf_counter()
        if last or global_step % args.eval_frequency == 0:
            eval_from_time = time.perf_counter()
            log_evaluation(global_step)
            sps_from_time += time.perf_counter() - eval_from_time  # SPS counts training only
        if last:
            break

        # DYNAMIC SPARSE TRAINING, for the methods that rewire: drop connections, grow others up to the same count
        if dynamic and global_step in rewirings and global_step > learn_from:
            fraction = args.rewire_fraction / 2 * (1 + math.cos(math.pi * global_step / rewire_until))
            done = (rewirings.index(global_step) + 1) / len(rewirings)
            previous = copy.deepcopy({name: progress.masks[name] for name in dynamic})
            in_turn = [name for name in dynamic if name in in_kernels]
            kernels.expand(in_turn, networks, targets, optimizers)
            losses = own_losses(args.batch_size) if by_gradient else {}
            for name in dynamic:
                flops = sparse_utils.rewiring_flops(active[name], sizes[name], methods[name], args.drop_criterion)
                progress.training_flops += args.batch_size * flops
                active[name] = sparse_utils.decayed(starts[name][0], budgets[name][0], done)
                rules = (methods[name], args.drop_criterion, args.regrow, args.distribution)
                parts = (networks[name], targets.get(name), optimizers[name], progress.masks[name], widths[name])
                state = (progress.stopped.setdefault(name, []), losses.get(name), active[name], fraction, done)
                sparse_utils.rewire_network(*parts, *state, rules, mask_generator)
            kernels.compact(in_turn, networks, targets, optimizers, progress.masks)
            run_folder.log_rewiring(writer, run_dir, global_step, progress.revived_masks, previous, progress.masks)
            if args.density_start is not None:
                action_flops, critic_flops, actor_flops = count_flops(active, args.batch_size)
                writer.add_scalar("flops/inference", action_flops, global_step)

        # ALGO LOGIC: put action logic here
        if global_step < args.learning_starts:
            action = env.action_space.sample()
        else:
            with torch.no_grad():
                obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0)
                action = actor.add_noise(actor(obs_tensor), args.exploration_noise)
            action = action[0].cpu().numpy()
            progress.training_flops += action_flops

        # TRY NOT TO MODIFY: execute the game and store the transition
        next_obs, reward, terminated, truncated, _ = env.step(action)
        # CRUCIAL, easy to overlook: a truncated episode is not over, so only `terminated` ends the bootstrapping
        rb.add(obs, next_obs, action, reward, terminated, truncated)
        obs = next_obs
        progress.episode_actions.append(action.tolist())
        episodic_return += float(reward)
        episodic_length += 1
        run_folder.stop_unless_finite(writer, global_step, {"the episode's return": episodic_return})
        if terminated or truncated:
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", episodic_length, global_step)
            bar.set_postfix({"return": f"{episodic_return:.1f}"}, refresh=False)
            episodic_return, episodic_length = 0.0, 0
            progress.episode_generator, progress.episode_actions = env.unwrapped.np_random.bit_generator.state, []
            obs, _ = env.reset()

        # ALGO LOGIC: training
        if cycle_starts and global_step >= args.learning_starts:
            for optimizer in optimizers.values():
                if global_step in cycle_starts:
                    optimizer.state.clear()  # Adam starts anew, the weights go on
                for group in optimizer.param_groups:
                    group["lr"] = lr_factor(global_step, *cycles) * group.setdefault("initial_lr", group["lr"])
        if global_step > learn_from:
            data = rb.sample(args.batch_size)
            qf1_loss, qf2_loss, qf1_values, qf2_values = critic_losses(
                actor_target, qf1, qf2, qf1_target, qf2_target, data, args
            )
            kernels.zero_grad(q_optimizer)
            (qf1_loss + qf2_loss).backward()
            kernels.step(q_optimizer)
            progress.training_flops += critic_flops

            if global_step % args.policy_frequency == 0:
                for qf in (qf1, qf2):  # the critics' weights need no gradient of the actor's loss
                    qf.requires_grad_(False)
                actor_loss = policy_loss(actor, qf1, data)
                progress.actor_scalars["losses/actor_loss"] = actor_loss.detach()
                kernels.zero_grad(actor_optimizer)
                actor_loss.backward()
                kernels.step(actor_optimizer)
                progress.training_flops += actor_flops
                for qf in (qf1, qf2):
                    qf.requires_grad_(True)
                polyak_update(targets, networks, args.tau)

            if global_step % 100 == 0 or global_step == args.total_timesteps - 1:
                scalars = {
                    "losses/qf1_values": qf1_values.mean(),
                    "losses/qf2_values": qf2_values.mean(),
                    "losses/qf1_loss": qf1_loss,
                    "losses/qf2_loss": qf2_loss,
                    "losses/qf_loss": (qf1_loss + qf2_loss) / 2,
                    **progress.actor_scalars,
                }
                if cycle_starts:
                    scalars["charts/actor_lr"] = actor_optimizer.param_groups[0]["lr"]
                    scalars["charts/critic_lr"] = q_optimizer.param_groups[0]["lr"]
                run_folder.log_scalars(writer, global_step, scalars)
                if global_step > sps_from_step:
                    sps = (global_step - sps_from_step) / (time.perf_counter() - sps_from_time)
                    writer.add_scalar("charts/SPS", sps, global_step)

    final = run_folder.final_state(SCRIPT, args, args.total_timesteps, modules, progress.masks)
    run_folder.save_final(run_dir, final, networks, widths)
    final_return = run_folder.log_final_return(writer, progress.returns, args.total_timesteps)
    writer.close()
    env.close()
    eval_env.close()
    print(f"final return {final_return:.1f}; saved {run_dir / 'final.pt'}")
    return run_dir


def main() -> None:
    args = tyro.cli(Args, description=__doc__.splitlines()[0])
    if args.evaluate is not None:
        return run_folder.evaluate_saved(args, SCRIPT, Actor, Actor.forward, evaluate)
    if args.resume is not None:  # what is not given is as it was
        saved = run_folder.resumed_args(Args, args.resume, SCRIPT)
        args = tyro.cli(Args, default=saved)
        run_folder.check_resumed_args(args, saved)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: STOP_SIGNALS.append(number))
    with run_folder.full_disk_in_a_sentence():
        train(args)


if __name__ == "__main__":
    main()
