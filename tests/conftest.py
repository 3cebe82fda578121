import functools
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent.parent))

import lab.run
import sac_tar
import td3_tar
from lab import edits, record, topology
from lab.environment import STOP_SIGNALS

settings.register_profile("loaded", deadline=None)  # of a busy machine
settings.load_profile("loaded")
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a background job starts would ignore it
SCRIPTS = {"sac": sac_tar, "td3": td3_tar}
CACHED = {name: functools.cache(getattr(record, name)) for name in ("code_hash", "sources")}
MASK_IMAGE = topology.mask_image
QUICK = {"test_masks.py", "test_agents.py", "test_loop.py"}


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: the minute of tests for whoever edits a script")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "real_sweep" not in item.name)  # the longest comes first, or one core waits for it
    for item in items:
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)


class ProbeEnv(gym.Env):
    """Observation [episode, step, 0]; action bounds differ per dimension and are not symmetric. Every third episode
    terminates at its fifth step; time limits come from gym.make."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(np.array([-1, -2], np.float32), np.array([1, 6], np.float32))

    def __init__(self, render_mode: str | None = None):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self.observe(), {}

    def observe(self):
        return np.array([self.episode, self.step_in_episode, 0.0])

    def step(self, action):
        assert self.action_space.contains(action), action
        self.step_in_episode += 1
        terminated = self.episode % 3 == 2 and self.step_in_episode == 5
        return self.observe(), 1.0, terminated, False, {}


gym.register("BrokenProbe-v0", lambda **_: {}["bool8"])  # fails, as a package that is older than its NumPy
gym.register("Probe-v0", ProbeEnv, max_episode_steps=7)
filmed = {"metadata": {"render_modes": ["rgb_array"]}, "render": lambda env: np.zeros((8, 8, 3), np.uint8)}
gym.register("Blank-v0", type("BlankEnv", (ProbeEnv,), filmed), max_episode_steps=7)  # it does not keep render_mode


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


REPLACED = edits.replaced


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Hashing the code and drawing masks, which have tests of their own, take most of the time of a short run."""
    for name, function in CACHED.items():
        monkeypatch.setattr(lab.run, name, function)
    monkeypatch.setattr(edits, "replaced", lambda *_: [])  # tests replace parts of the scripts
    monkeypatch.setattr(topology, "mask_image", lambda *_, **__: np.zeros((8, 8, 3), np.uint8))
    yield
    STOP_SIGNALS.clear()


@pytest.fixture(params=SCRIPTS)
def script(request):
    return SCRIPTS[request.param]


@pytest.fixture
def run(request, tmp_path):
    """Run the training of the script, by default SAC's, or of a copy of it, in this process, small, and return its run
    folder. A test that asks for `script` runs once for each."""
    script = request.getfixturevalue("script") if "script" in request.fixturenames else sac_tar

    def run(mine=script, **overrides):
        small = {
            "env_id": "Pendulum-v1",
            "criterion": "random",  # by magnitude networks this small would lose whole layers
            "distribution": "er",
            "runs_dir": str(tmp_path / "runs"),
            "compute": "masked",
            "total_timesteps": 160,
            "learning_starts": 60,
            "hidden_size": 24,
            "batch_size": 32,
            "buffer_size": 1000,
            "eval_frequency": 100,
            "eval_episodes": 1,
        }
        return mine.train(mine.Args(**small | overrides))

    return run
