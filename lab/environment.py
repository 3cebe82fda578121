"""Any environment, made fit for training: what goes in and out of it is checked, a policy can be evaluated in it, and
what it holds between episodes can be saved and put back."""

import contextlib
import copy
import functools
import math
import os
import random
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from tqdm import tqdm

from lab.flags import fail

EVALUATION_LIMIT = 10_000  # steps after which an evaluation episode of an environment without a time limit is cut
STOP_SIGNALS = []  # SIGINT or SIGTERM, once received
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)

# MAKING ONE


class NewWorld(gym.Wrapper):
    """Makes a new Box2D world for each episode. BipedalWalker keeps one world, whose past episodes change the last bits
    of later ones. In a new world an episode depends on its generator and the actions alone, also in a resumed run."""

    def reset(self, **kwargs):
        self.unwrapped._destroy()
        old = self.unwrapped.world
        if not old.bodies:  # a subclass may keep some
            self.unwrapped.world = type(old)(gravity=old.gravity)
            self.unwrapped.world.SetAllowSleeping(old.GetAllowSleeping())
            for setting in ("autoClearForces", "continuousPhysics", "warmStarting", "subStepping"):
                setattr(self.unwrapped.world, setting, getattr(old, setting))
        return super().reset(**kwargs)


class Guard(gym.Wrapper):
    """Stands between the agent and any environment. Observations are copied, since an environment may change its own
    array. Actions are copied, cast to the type of the action space and clipped to its bounds, which rounding may exceed
    by one float32 step. A number that is not finite ends the program with a sentence that names it."""

    global_step = 0  # for messages; the run sets it
    taken = 0  # steps so far

    def __init__(self, env: gym.Env):
        super().__init__(env)
        # once, since an environment whose spaces are properties makes new ones, which no seed reaches
        self.action_space, self.observation_space = env.action_space, env.observation_space

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.checked(obs), info

    def step(self, action):
        space, self.taken = self.action_space, self.taken + 1
        if not np.isfinite(action).all():
            fail(f"the action at step {self.global_step} is {np.asarray(action).tolist()}: training diverged", code=1)
        obs, reward, *ends, info = self.env.step(np.clip(np.asarray(action, space.dtype), space.low, space.high))
        value = np.asarray(reward, float)
        if value.size != 1 or not (np.abs(value) <= np.finfo(np.float32).max).all():
            fail(f"the reward at step {self.global_step} is {reward}; it must be one number, finite in float32", code=1)
        return self.checked(obs), value.item(), *map(bool, ends), info

    def checked(self, obs) -> np.ndarray:
        obs, shape, what = np.array(obs), self.observation_space.shape, f"the observation at step {self.global_step}"
        if obs.shape != shape:
            fail(f"{what} has shape {obs.shape} and its space {shape}", code=1)
        if not (np.abs(obs) <= np.finfo(np.float32).max).all():
            fail(f"{what} is {obs.tolist()}; all its numbers must be finite", code=1)
        return obs


def make_env(env_id: str, video: bool = False) -> gym.Env:
    """The environment; `<module>:<id>` first imports the module that registers it."""
    # the older MuJoCo versions (-v4) are chosen on purpose: published results are on them
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos.*")  # on resuming
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if video else {}))
        if any(kind.__module__.startswith("gymnasium.envs.box2d") for kind in type(env.unwrapped).__mro__):
            env = NewWorld(env)
        env = Guard(env)
    except Exception as error:  # a package of environments may be broken in any way
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "`pip install -r requirements.txt` brings MuJoCo and Box2D; PYTHONPATH must have your module's folder"
        fail(f"cannot make {env_id} ({why}); {where}")
    actions, observations = env.action_space, env.observation_space
    if not (isinstance(observations, gym.spaces.Box) and len(observations.shape) == 1 and observations.shape[0]):
        fail(f"{env_id} has the observation space {observations}; this script needs a 1-D Box that is not empty")
    flat = isinstance(actions, gym.spaces.Box) and len(actions.shape) == 1 and actions.shape[0]
    if not (flat and actions.dtype.kind == "f"):
        fail(f"{env_id} has the action space {actions}; this script needs a bounded 1-D Box of floating-point numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        widths = actions.high.astype(np.float32) - actions.low.astype(np.float32)
    if not (np.isfinite(widths) & (widths > 0)).all():
        fail(f"{env_id} has the action space {actions}; this script needs one whose ranges are positive and finite")
    return env


def make_eval_env(env_id: str, video: bool) -> gym.Env:
    """An environment for evaluations. Ends the program with one sentence if its first observations, reward or frame
    show that it does not work here. Warns if episodes with one seed do not begin alike."""
    if video and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    env = make_env(env_id, video)
    for layer in layers(env):
        if hasattr(layer, "update_running_mean"):
            layer.update_running_mean = False  # the statistics are those of training
    begun, before = [], statistics(env)
    action = 0.75 * env.action_space.low + 0.25 * env.action_space.high  # inside: bounds or the middle may be singular
    for _ in range(2):
        with apart(env, 1, torch.device("cpu")):
            begun.append(np.stack([env.reset(seed=1)[0], env.reset()[0], env.step(action)[0]]))
        set_statistics(env, before)
    advice = "let its reset(seed) call super().reset(seed=seed), and draw from self.np_random"
    # None: it has not used np_random, which makes a generator when it is read; -1: a generator of its own
    seeded = getattr(env.unwrapped, "_np_random_seed", None) in (None, 1, -1)
    if not isinstance(env.unwrapped.np_random, GENERATORS):
        fail(f"{env_id} has a np_random that no checkpoint can keep; {advice}")
    if not seeded or not np.array_equal(*begun):
        tqdm.write(f"warning: episodes of {env_id} differ at one --seed, so evaluations do, and runs may; {advice}")
    if video:
        try:
            import moviepy  # noqa: F401 - or the first evaluation would fail

            if env.render_mode != "rgb_array" or not isinstance(env.render(), np.ndarray):
                raise ValueError("render() gives no array, or __init__ does not keep render_mode")
        except Exception as error:  # every backend has errors of its own
            needs = "it needs `pip install moviepy`, and without a screen EGL (Debian: libegl1), or --no-capture-video"
            fail(f"--capture-video cannot film here ({type(error).__name__}: {error}); {needs}")
    return env


@contextlib.contextmanager
def apart(env: gym.Env | None, seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block the global random generators and those of the environment's spaces, which training may share,
    begin at a seed; afterwards they go on as if nothing had been drawn. Where `env` is None, the global ones alone."""
    parts = () if env is None else attributes(env).values()
    spaces = [part for part in parts if isinstance(part, gym.Space)]
    python, numpy = random.getstate(), np.random.get_state()
    held = [(space, copy.deepcopy(space._np_random)) for part in spaces for space in inner_spaces(part)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for seeded in (random.seed, np.random.seed, torch.manual_seed, *(space.seed for space in spaces)):
            seeded(seed)
        yield
    for space, before in held:
        space._np_random = before
    random.setstate(python)
    np.random.set_state(numpy)


def has_time_limit(env: gym.Env) -> bool:
    """Whether a TimeLimit wrapper, or an attribute of the environment itself, ends episodes by step 1,000,000."""
    limit = env.get_wrapper_attr("_max_episode_steps") if env.has_wrapper_attr("_max_episode_steps") else None
    return limit is not None and limit <= 1_000_000


@torch.no_grad()
def play(env: gym.Env, policy: Callable, episodes: int, seed: int, device: torch.device, video: Path | None):
    """The returns and the lengths of noise-free episodes, two lists. The first reset takes `seed`, so every evaluation
    has the same start states (if only resets draw random numbers). With `video`, the first episode is filmed as
    <video>.mp4. Without a time limit, episodes are cut after EVALUATION_LIMIT steps, and a stop signal returns None."""
    returns, lengths = [0.0] * episodes, [0] * episodes
    limit = math.inf if has_time_limit(env) else EVALUATION_LIMIT
    if video:
        env = gym.wrappers.RecordVideo(env, video.parent, lambda episode: False)
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        if video and episode == 0:
            env.start_recording(video.name)
        done = False
        while not done:
            action = policy(torch.as_tensor(obs, dtype=torch.float32, device=device).unsqueeze(0))[0]
            obs, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated or lengths[episode] >= limit
            if STOP_SIGNALS and limit < math.inf:
                return None
        if video and episode == 0:
            try:
                env.stop_recording()
            except OSError as error:  # as of a full disk, or since Ctrl-C ends the encoder too
                env.recording, env.recorded_frames = False, []  # or the next reset would try again
                tqdm.write(f"warning: no film was saved: {' '.join(str(error).split())}")
    return returns, lengths


# WHAT IT HOLDS BETWEEN EPISODES: random generators, the statistics of layers that normalize, and other state


def layers(env: gym.Env) -> list[gym.Env]:
    """The environment and its wrappers, the innermost first."""
    return [*layers(env.env), env] if isinstance(env, gym.Wrapper) else [env]


def attributes(env: gym.Env) -> dict[str, object]:
    """The layers of an environment, their attributes and their spaces, by layer and name."""
    found = {}
    for depth, layer in enumerate(layers(env)):
        held = {"": layer, **vars(layer), "actions": layer.action_space, "observations": layer.observation_space}
        found |= {f"{depth}.{type(layer).__name__}.{name}": part for name, part in held.items() if name != "env"}
    return found


def inner_spaces(space: gym.Space) -> list[gym.Space]:
    """A space and, if it is composed of others, these, each of which has a random generator of its own."""
    held = [[*part.values()] if isinstance(part, dict) else part for part in vars(space).values()]
    parts = [one for part in held for one in (part if isinstance(part, (list, tuple)) else [part])]
    return [space, *(one for part in parts if isinstance(part, gym.Space) for one in inner_spaces(part))]


def generators(env: gym.Env, eval_env: gym.Env) -> dict[str, object]:
    """Every random generator that training may draw from: the global ones and the environments' own."""
    found = {"python": random, "numpy": np.random, "torch": torch.default_generator}
    if torch.cuda.is_initialized():
        found["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    for which, one in (("training", env), ("evaluation", eval_env)):
        parts = attributes(one)
        if type(one.unwrapped).np_random is not gym.Env.np_random:  # a property of its own, for one deeper inside
            parts["np_random"] = getattr(one.unwrapped, "np_random", None)  # None: before the first reset
        for name, part in [*parts.items()]:
            for i, space in enumerate(inner_spaces(part) if isinstance(part, gym.Space) else ()):
                # not np_random, which seeds a space anew that nothing has seeded yet, and those inside it
                parts[f"{name} {i}" if i else name] = space._np_random
        found |= {f"{which} {name}": part for name, part in parts.items() if isinstance(part, GENERATORS)}
    return found


def random_state(generator: object) -> object:
    get = getattr(generator, "getstate", None) or getattr(generator, "get_state", None)  # Python's; others
    return get() if get else generator.bit_generator.state


def set_random_state(generator: object, state: object) -> None:
    if put := getattr(generator, "setstate", None) or getattr(generator, "set_state", None):
        put(state)
    else:
        generator.bit_generator.state = state


def statistics(env: gym.Env) -> dict[str, dict]:
    """The running means and variances by which layers of an environment normalize, by layer and name."""
    found = {}
    for name, part in attributes(env).items():
        for kept in ({"mean", "var", "count"}, {"discounted_reward"}):  # RunningMeanStd; NormalizeReward itself
            if kept <= getattr(part, "__dict__", {}).keys():
                found[name] = {key: copy.deepcopy(vars(part)[key]) for key in sorted(kept)}
    return found


def set_statistics(env: gym.Env, saved: dict[str, dict]) -> None:
    parts = attributes(env)
    for name in saved.keys() & parts.keys():
        vars(parts[name]).update(copy.deepcopy(saved[name]))  # since a layer may change arrays in place


def state_of(env: gym.Env, eval_env: gym.Env) -> dict[str, dict]:
    """The state that outlives an episode and that `restore` can put back: random generators and running statistics."""
    random_states = {name: random_state(generator) for name, generator in generators(env, eval_env).items()}
    return {"random": random_states, "statistics": statistics(env)}


def restore(env: gym.Env, eval_env: gym.Env, saved: dict[str, dict]) -> None:
    """Put the result of `state_of` back into environments that have been reset, so that their generators exist."""
    for name, generator in generators(env, eval_env).items():
        if name in saved["random"]:
            set_random_state(generator, saved["random"][name])
    set_statistics(env, saved["statistics"])


@functools.cache
def is_own(kind: type | ModuleType, files: tuple[Path, ...]) -> bool:
    module = kind if isinstance(kind, ModuleType) else sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None)
    return (kind is not module and issubclass(kind, SimpleNamespace)) or (bool(file) and Path(file).resolve() in files)


def content_of(value: object, files: tuple[Path, ...]) -> dict[str, object]:
    """What is inside a value, by name, without names that begin with __: the attributes, and submodules, of a
    SimpleNamespace, or of an object whose class is defined in one of these source files, but no list, tuple, dictionary
    or deque; the variables of a Python module that is one of these files."""
    kind = value if isinstance(value, ModuleType) else type(value)
    own = not isinstance(value, (list, tuple, dict, deque)) and is_own(kind, files)
    held = {n: v for n, v in getattr(value, "__dict__", {}).items() if not n.startswith("__")} if own else {}
    return held | held["_modules"] if isinstance(value, torch.nn.Module) and own else held


def fingerprint(
    env: gym.Env, variables: dict, files: tuple[Path, ...] = (), but: Collection[str] = ()
) -> dict[str, int]:
    """Checksums that show whether a resumed run has the state that it had before: of numbers, texts, arrays, tensors,
    modules, what optimizers train, random generators, running statistics and collections of these among the `variables`
    of the script and train, and in layers of the environment other than Gymnasium's and ours. Of variables that are
    dictionaries, or that `content_of` looks into, two levels count, without names that begin with _ and those in `but`.
    """

    def inside(name: str, value: object, depth: int = 0) -> Iterator[tuple[str, object]]:
        held = value if isinstance(value, dict) else content_of(value, files)
        named = {k: v for k, v in held.items() if isinstance(k, (str, int, np.integer)) and not str(k).startswith("_")}
        named = named if depth < 2 and "params" not in held else {}  # as have groups of an optimizer
        yield f"`{name}` in train", [*named] if named and held is value else value
        for key, part in named.items():
            if key not in but:
                yield from inside(f"{name}.{key}", part, depth + 1)

    def content(value: object, above: tuple[int, ...] = ()) -> bytes | None:
        value = value.item() if isinstance(value, np.generic) else value  # as a checkpoint keeps keys
        if value is None or isinstance(value, (int, float, str, bytes)):
            return repr(value).encode()
        if id(value) in above:
            return b"it contains itself"
        above = (*above, id(value))
        if isinstance(value, GENERATORS):
            value = random_state(value)
        if isinstance(value, torch.nn.Module):
            value = [*value.parameters(), *value.buffers()]
        if isinstance(value, torch.optim.Optimizer):
            value = [group["params"] for group in value.param_groups]
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            return (value.detach().cpu().double() + 0.0).numpy().tobytes()  # -0.0 is 0.0
        if isinstance(value, np.ndarray) and value.dtype != object:
            return value.tobytes()
        if {"mean", "var", "count"} <= getattr(value, "__dict__", {}).keys():
            value = [value.mean, value.var, value.count]
        if isinstance(value, dict) and not {"params", "lr"} <= value.keys():
            value = [*value.items()]
        known = isinstance(value, (list, tuple, deque, set, frozenset))
        parts = [content(part, above) for part in value] if known else [None]
        ordered = sorted if isinstance(value, (set, frozenset)) else list
        return None if None in parts else b" ".join(ordered(parts))

    named = [pair for variable in variables.items() for pair in inside(*variable)]
    for layer in layers(env):
        if not isinstance(layer, (Guard, NewWorld)) and not type(layer).__module__.startswith("gymnasium."):
            held = {name: value for name, value in vars(layer).items() if name != "env"}
            held |= {f"{name}.{key}": v for name, own in [*held.items()] for key, v in content_of(own, files).items()}
            # None: not used yet
            named += [(f"{type(layer).__name__}.{name}", value) for name, value in held.items() if value is not None]
    return {name: zlib.crc32(whole) for name, value in named if (whole := content(value)) is not None}
