"""The replay buffer of both scripts, with n-step targets (RLx2) and batches from recent transitions (after MAST)."""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch


class Batch(NamedTuple):
    """Float32 tensors of shape (batch_size, width); rewards and discounts have width 1."""

    observations: torch.Tensor
    next_observations: torch.Tensor  # after k steps; a critic's target bootstraps from these
    actions: torch.Tensor
    rewards: torch.Tensor  # the discounted sum of k rewards, k at most --n-step
    discounts: torch.Tensor  # of the value of next_observations: gamma ** k, or 0 after a termination


class ReplayBuffer:
    """The last --buffer-size transitions, one float32 row each, in one block that takes CPU memory as it fills. A row
    must not change once it is added: a checkpoint writes only those that are new since the last one."""

    def __init__(self, args: object, env: gym.Env, device: torch.device):
        observation_size, action_size = env.observation_space.shape[0], env.action_space.shape[0]
        self.widths = [observation_size, observation_size, action_size, 1, 1, 1]
        try:
            self.rows = torch.empty(args.buffer_size, sum(self.widths), device=device)
        except RuntimeError:
            gigabytes = 4 * args.buffer_size * sum(self.widths) / 1e9
            raise ValueError(f"--buffer-size {args.buffer_size} needs {gigabytes:.0f} GB of memory; lower it") from None
        self.added = 0
        # a script without the flags of lab/baselines.py has one-step targets, from all transitions alike
        self.n_step, self.n_step_from = getattr(args, "n_step", 1), getattr(args, "n_step_from", 0)
        self.recent_fraction, self.recent_size = getattr(args, "recent_fraction", 0.0), getattr(args, "recent_size", 1)

    def state_dict(self) -> dict:
        return vars(self) | {"rows": self.rows[: self.added].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.rows[: len(state["rows"])] = state["rows"]
        vars(self).update(state | {"rows": self.rows})

    def add(self, obs, next_obs, action, reward, terminated, truncated) -> None:
        row = np.concatenate([obs, next_obs, action, [reward, terminated, truncated]], dtype=np.float32)
        self.rows[self.added % len(self.rows)] = torch.from_numpy(row)
        self.added += 1

    def sample(self, batch_size: int, gamma: float, global_step: int) -> Batch:
        """A batch drawn uniformly with replacement; --recent-fraction of it from the newest --recent-size transitions.
        Targets take --n-step steps, or one before --n-step-from, but end with the episode or the newest transition."""
        held, newest = min(self.added, len(self.rows)), (self.added - 1) % len(self.rows)
        indices = torch.randint(held, (batch_size,), device=self.rows.device)
        if recent := round(self.recent_fraction * batch_size):
            ages = torch.randint(min(held, self.recent_size), (recent,), device=self.rows.device)
            indices[:recent] = (newest - ages) % held
        obs, next_obs, action, rewards, terminated, truncated = self.rows.index_select(0, indices).split(self.widths, 1)
        discounts = torch.full_like(rewards, gamma)
        last = indices
        for _ in range(1, self.n_step if global_step >= self.n_step_from else 1):
            goes_on = (last.unsqueeze(1) != newest) & (terminated + truncated == 0)
            last = (last + goes_on.squeeze(1)) % held
            _, next_obs, _, reward, terminated, truncated = self.rows.index_select(0, last).split(self.widths, 1)
            rewards = rewards + goes_on * discounts * reward
            discounts = torch.where(goes_on, gamma * discounts, discounts)
        return Batch(obs, next_obs, action, rewards, (1 - terminated) * discounts)
