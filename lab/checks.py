"""Before a run: its flags are completed and checked, its environment is made. Bad input ends in one sentence."""

import contextlib
import difflib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Annotated, Literal

import gymnasium as gym
import torch
import tyro

import sparse_utils
from lab.record import WITHOUT, fail


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """End the program with the sentence of a ValueError: what raises one here was given something that cannot work."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


def one_of(rules: dict, what: str) -> type:
    """The type of a flag that takes a name of this dictionary, with `what` and the rules' own words as its help."""
    return Annotated[Literal[tuple(rules)], tyro.conf.arg(help=f"{what}. {sparse_utils.choices(rules)}")]


def complete_args(args) -> None:
    """Put in what defaults to another flag, in place. `args` is the dataclass of a script's arguments."""
    args.prune_at = args.learning_starts if args.prune_at is None else args.prune_at
    for network in ("actor", "critic"):
        for flag in ("method", "sparsity", "init"):
            if getattr(args, f"{network}_{flag}", "left out") is None:
                setattr(args, f"{network}_{flag}", getattr(args, flag))
        if getattr(args, f"{network}_method") == "dense":
            setattr(args, f"{network}_sparsity", 0.0)
    if getattr(args, "drop_criterion", "left out") is None:
        args.drop_criterion = sparse_utils.usual_drop({args.actor_method, args.critic_method})


def check_args(args) -> None:
    """End the program with one sentence if a value cannot work. Copies may leave out the flags of WITHOUT."""
    given, rules = WITHOUT | asdict(args), {}
    args = SimpleNamespace(**given)
    positive = "total_timesteps hidden_size buffer_size batch_size policy_lr q_lr learning_rate policy_frequency "
    positive += "target_network_frequency eval_frequency eval_episodes torch_threads rewire_every checkpoint_frequency "
    positive += "n_step recent_size"
    for name in filter(given.__contains__, positive.split()):
        rules[name] = (0 < given[name] < math.inf, "positive and finite")
    for name in filter(given.__contains__, ("alpha", "policy_noise", "noise_clip", "exploration_noise")):
        rules[name] = (0 <= given[name] < math.inf, "at least 0 and finite")
    fractions = ("sparsity", "actor_sparsity", "critic_sparsity", "reserve", "recent_fraction")
    for name in filter(given.__contains__, fractions):
        rules[name] = (0 <= given[name] < 1, "at least 0 and below 1")
    for name in ("gamma", "rewire_fraction", "rewire_stop"):
        rules[name] = (0 <= given[name] <= 1, "in [0, 1]")
    rules["tau"] = (0 < args.tau <= 1, "above 0 and at most 1")
    rules["seed"] = (0 <= args.seed < 2**31, "at least 0 and below 2**31")
    for name in ("learning_starts", "prune_at", "n_step_from"):
        within = f"at least 0 and below the end of training, --total-timesteps {args.total_timesteps}"
        rules[name] = (0 <= given[name] < args.total_timesteps, within)
    for name, (holds, rule) in rules.items():
        if not holds:
            fail(f"--{name.replace('_', '-')} must be {rule}, got {given[name]}")
    check_density(args)
    growths = {m: sparse_utils.GROWTHS.get(m) for m in (args.actor_method, args.critic_method)}
    if args.drop_criterion is None:
        drops = " and ".join(f"{method} by {rule.drop}" for method, rule in growths.items())
        fail(f"actor and critics would drop by different criteria, {drops}; choose one --drop-criterion")
    for method in (method for method, rule in growths.items() if rule and rule.by_topology and not args.regrow):
        fail(f"--method {method} stops in a layer where what was dropped grows again; leave --no-regrow out")
    if sparse_utils.CRITERIA[args.criterion].uses_loss and args.prune_at == 0:
        fail(f"--criterion {args.criterion} needs replay data and step 0 has none; set --prune-at above 0")
    dynamic = [method for method, rule in growths.items() if rule]
    after, until = max(args.learning_starts, args.prune_at), args.rewire_stop * args.total_timesteps
    if dynamic and not sparse_utils.rewiring_steps(after, until, args.rewire_every):
        never = f"every {args.rewire_every} steps after step {after} and before {until:g}, which is never"
        mend = "lower --rewire-every or --learning-starts, raise --rewire-stop or train longer"
        fail(f"--method {dynamic[0]} rewires {never}; {mend}")
    if dynamic and args.rewire_fraction == 0 and args.density_start is None:
        fail(f"--method {dynamic[0]} with --rewire-fraction 0 rewires nothing; raise it, or choose another method")
    if "sparse" in (args.actor_init, args.critic_init) and args.prune_at > args.learning_starts:
        fail("--init sparse does not rescale trained weights; set --prune-at to at most --learning-starts")
    if isinstance(args.active_width, int) and not 1 <= args.active_width <= args.hidden_size:
        fail(f"--active-width must be from 1 to --hidden-size {args.hidden_size}, got {args.active_width}")
    if args.recent_fraction and not round(args.recent_fraction * args.batch_size):
        fail(f"--recent-fraction {args.recent_fraction} of --batch-size {args.batch_size} is no transition; raise one")
    if args.recent_fraction and args.recent_size >= min(args.buffer_size, args.total_timesteps):
        fail(f"--recent-size {args.recent_size} is all that the buffer ever holds; choose a smaller one")
    steps = args.total_timesteps - args.learning_starts
    if args.lr_cycles is not None and not 1 <= args.lr_cycles <= steps:
        fail(f"--lr-cycles must be from 1 to the {steps} steps after --learning-starts, got {args.lr_cycles}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda needs a CUDA device and a torch build for it; use --device cpu")


def check_density(args) -> None:
    """End the program with one sentence if --density-start or --final-prune-at cannot work."""
    methods = {args.actor_method, args.critic_method} - sparse_utils.UNPRUNED.keys()
    stay = sorted(methods - sparse_utils.GROWTHS.keys())
    if args.density_start is None:
        if args.final_prune_at is not None:
            fail("--final-prune-at is the end of a --density-start; set both or neither")
        return
    if not 0 < args.density_start < 1:
        fail(f"--density-start must be above 0 and below 1, got {args.density_start}")
    if args.final_prune_at is not None and not args.prune_at < args.final_prune_at < args.total_timesteps:
        fail(f"--final-prune-at must be after --prune-at {args.prune_at} and before the end, got {args.final_prune_at}")
    if stay and len(stay) < len(methods):
        fail("--density-start needs actor and critics that both rewire or whose masks both stay")
    if stay and args.final_prune_at is None:
        fail(f"--density-start needs --final-prune-at where masks stay, as with --method {stay[0]}")
    if methods and not stay:
        if args.final_prune_at is not None:
            fail("--final-prune-at is for masks that stay; where they are rewired the density falls at the rewirings")
        if not args.save_buffer:
            fail("--density-start needs the buffer in checkpoints, or rewirings would be missed; no --no-save-buffer")


class NewWorld(gym.Wrapper):
    """A new Box2D world for each episode. BipedalWalker keeps one for life, and its past shows in the last bits; with a
    new one an episode is a function of the generator and the actions, so that a resumed run can replay it."""

    def reset(self, **kwargs):
        self.unwrapped._destroy()
        self.unwrapped.world = type(self.unwrapped.world)(gravity=self.unwrapped.world.gravity)
        return super().reset(**kwargs)


def make_env(env_id: str, video: bool = False) -> gym.Env:
    """The environment; `<module>:<id>` imports the module that registers it first."""
    # the older MuJoCo versions (-v4) are chosen on purpose: published results are on them
    warnings.filterwarnings("ignore", message=".*is out of date.*")
    warnings.filterwarnings("ignore", message=".*Overwriting existing videos.*")  # on resuming
    try:
        env = gym.make(env_id, **({"render_mode": "rgb_array"} if video else {}))
        if type(env.unwrapped).__module__.startswith("gymnasium.envs.box2d"):
            env = NewWorld(env)
    except gym.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(env_id, gym.registry, n=3)
        fail(f"unknown --env-id {env_id} ({error}); close names: {', '.join(close) or 'none'}")
    except Exception as error:  # a package of environments may be broken in any way
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        where = "`pip install -r requirements.txt` brings MuJoCo's and Box2D's, PYTHONPATH says where yours is"
        fail(f"cannot make {env_id} ({why}); {where}")
    action_space, observation_space = env.action_space, env.observation_space
    if not (isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 1 and action_space.is_bounded()):
        fail(f"{env_id} has the action space {action_space}; this script needs a bounded 1-D Box")
    if not (isinstance(observation_space, gym.spaces.Box) and len(observation_space.shape) == 1):
        fail(f"{env_id} has the observation space {observation_space}; this script needs a 1-D Box")
    if video:
        check_video(env)
    return env


def check_video(env: gym.Env) -> None:
    """End the program with one sentence if `env` cannot be filmed here."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a screen
    if importlib.util.find_spec("moviepy") is None:
        fail("--capture-video needs moviepy; `pip install moviepy`")
    try:
        env.reset()
        env.render()
    except Exception as error:  # every backend has errors of its own
        fail(f"--capture-video cannot render here ({error}); without a screen install EGL (Debian: libegl1)")
