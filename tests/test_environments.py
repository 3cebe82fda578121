"""Environments of all kinds: what goes in and out of them, which ones are refused, and how a run in them is resumed."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.box2d import BipedalWalker
from gymnasium.envs.registration import WrapperSpec
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from test_resume import again, assert_same_run, child, dies, edited, rows_of
from test_run import load, main, refused, scalars

import lab.environment
import lab.run
import sac_tar
from lab import record
from lab.checkpoints import pack, unpacked
from lab.environment import STOP_SIGNALS, fingerprint, make_env, make_eval_env, play, restore, state_of, statistics
from lab.replay import ReplayBuffer

F = np.float32
gym.register("ShortBox2D-v0", type("MyWalker", (BipedalWalker,), {}), max_episode_steps=40)


def box(low, high, shape=None, dtype=F):
    low, high = (np.full(shape or np.shape(end), end, dtype) for end in (low, high))
    return gym.spaces.Box(low, high, dtype=dtype)


class Plain(gym.Env):
    """A point on a line, pushed by the action."""

    observation_space, action_space = box(-np.inf, np.inf, (2,)), box([-1], [1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.begin(), 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        self.x = 0.9 * self.x + float(action[0]) + 0.1 * self.draw()
        return self.observe(), self.reward(), False, False, {}

    def begin(self):
        return self.np_random.normal()

    def draw(self):
        return 0.0

    def observe(self):
        return np.array([self.x, self.t / 10], F)

    def reward(self):
        return -abs(self.x)


@pytest.fixture
def register():
    """Register an environment of this class, and wrappers around it, until the test ends."""

    def register(kind, *wrappers, limit=10):
        specs = [WrapperSpec(w.__name__, f"{w.__module__}:{w.__name__}", {}) for w in wrappers]
        gym.register(f"{kind.__name__}-v0", kind, max_episode_steps=limit, additional_wrappers=tuple(specs))
        names.add(f"{kind.__name__}-v0")
        return f"{kind.__name__}-v0"

    names = set()
    yield register
    for name in names:
        del gym.registry[name]


# arrays and actions


class Shares(Plain):
    """Returns one array that it changes in place, changes its action in place, and says what it was given."""

    action_space, shared, given = box([-1], [1], dtype=np.float64), np.zeros(2, F), []

    def step(self, action):
        self.given.append(action.copy())
        result = super().step(action)
        action *= 10
        return result

    def observe(self):
        self.shared[:] = super().observe()
        return self.shared


def test_an_environment_may_change_its_arrays_in_place(run, script, register):
    Shares.given.clear()
    rows, _ = rows_of(run(env_id=register(Shares)))
    obs, next_obs, actions = rows[:, :2], rows[:, 2:4], rows[:, 4]
    assert ((next_obs - obs)[:, 1] - 0.1).abs().max() < 1e-6 and (obs[1:] == next_obs[:-1]).all(1).sum() == 144
    assert {action.dtype for action in Shares.given} == {np.dtype(np.float64)}
    given = torch.tensor(np.array(Shares.given), dtype=torch.float32)[:, 0]  # first two of trials, ten of an evaluation
    assert torch.equal(given[12:112], actions[:100])


class Strict(Plain):
    """Bounds that a saturated tanh leaves by a float32 step, at one end in each dimension."""

    action_space, given = box([-0.1, -1.0], [0.9, 0.2]), []

    def step(self, action):
        assert self.action_space.contains(action), action.tolist()
        self.given.append(action)
        return super().step(action)


@pytest.mark.parametrize("end", [1.0, -1.0])
def test_actions_are_inside_the_space_and_stored_as_they_were_chosen(run, script, register, monkeypatch, end):
    monkeypatch.setattr(torch, "tanh", lambda x: torch.full_like(x, end))
    Strict.given.clear()
    noise = {} if script is sac_tar else {"exploration_noise": 0.0}
    rows, _ = rows_of(
        run(env_id=register(Strict), total_timesteps=40, learning_starts=20, policy_frequency=99, **noise)
    )
    space = Strict.action_space
    bound = (space.high, space.low)[end < 0]
    chosen = (space.high - space.low) / 2 * F(end) + (space.high + space.low) / 2
    assert (Strict.given[2] == bound).any() and np.allclose(Strict.given[2], bound, atol=1e-6)  # of an evaluation
    assert (bound != chosen).any() and not space.contains(chosen)
    assert np.array_equal(rows[-1, 4:6], chosen if script is sac_tar else np.clip(chosen, space.low, space.high))


# what is refused

LARGEST, WRONG = np.finfo(F).max, np.zeros((2, 1), F)


@pytest.mark.parametrize(
    "attributes, sentence, code",
    [
        ({"action_space": gym.spaces.Discrete(2)}, "has the action space Discrete(2)", 2),
        ({"action_space": box([-np.inf], [1])}, "whose ranges are positive and finite", 2),
        ({"action_space": box([-3], [3], dtype=np.int32)}, "needs a bounded 1-D Box of floating-point numbers", 2),
        ({"action_space": box([-LARGEST], [LARGEST])}, "whose ranges are positive and finite", 2),
        ({"action_space": box([-1, 0], [1, 0])}, "[1. 0.], (2,), float32); this script needs one whose ranges", 2),
        ({"observation_space": box(0, 1, (2, 2, 3))}, "(2, 2, 3), float32); this script needs a 1-D Box", 2),
        ({"observation_space": box([], [])}, "(0,), float32); this script needs a 1-D Box that is not empty", 2),
        ({"action_space": box([], [])}, "(0,), float32); this script needs a bounded 1-D Box", 2),
        ({"np_random": SimpleNamespace(normal=float)}, "has a np_random that no checkpoint can keep; let its reset", 2),
        ({"observe": lambda env: WRONG}, "the observation at step 0 has shape (2, 1) and its space (2,)", 1),
        ({"step": lambda *_: (WRONG, 0.0, False, False, {})}, "at step 0 has shape (2, 1) and its space (2,)", 1),
    ],
)  # fmt: skip
def test_an_environment_that_cannot_work_is_refused_before_anything_is_written(
    run, register, tmp_path, capsys, attributes, sentence, code
):
    odd = type("Odd", (Plain,), attributes)
    assert sentence in refused(capsys, run, env_id=register(odd), code=code)
    assert not (tmp_path / "runs").exists()


class Faulty(Plain):
    """One bad number after 100 steps."""

    total, bad = 0, None

    def step(self, action):
        self.total += 1
        obs, reward, *rest = super().step(action)
        name, value = self.bad if self.total == 100 else (None, None)
        return np.array([value if name == "obs" else obs[0], obs[1]]), value if name == "reward" else reward, *rest


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (("obs", np.nan), "the observation at step 99 is [nan, 10.0]; all its numbers must be finite"),
        (("obs", -np.inf), "the observation at step 99 is [-inf, 10.0]; all its numbers must be finite"),
        (("obs", 1e39), "the observation at step 99 is [1e+39, 10.0]; all its numbers must be finite"),
        (("reward", np.nan), "the reward at step 99 is nan; it must be one number"),
        (("reward", 1e39), "the reward at step 99 is 1e+39; it must be one number, finite in float32"),
        (("reward", None), "the reward at step 99 is None; it must be one number"),
        (("reward", np.ones(2)), "the reward at step 99 is [1. 1.]; it must be one number"),
    ],
)
def test_a_number_that_is_not_finite_is_named_at_its_step(register, capsys, monkeypatch, bad, sentence):
    monkeypatch.setattr(Faulty, "bad", bad)
    env = make_env(register(Faulty, limit=None))

    def steps():
        env.reset(seed=1)
        for step in range(100):
            env.set_wrapper_attr("global_step", step)
            env.step(np.zeros(1, F))

    assert sentence in refused(capsys, steps, code=1)


@pytest.mark.parametrize("reward", [np.array([2.0]), F(2), np.array(2), True + 1])
def test_a_reward_may_be_any_one_number(register, monkeypatch, reward):
    monkeypatch.setattr(Plain, "reward", lambda env: reward)
    env = make_env(register(Plain))
    env.reset(seed=1)
    given = env.step(np.zeros(1, F))[1]
    assert given == 2 and type(given) is float


# environments that never end


def test_an_environment_without_a_time_limit_is_named_and_its_evaluations_are_cut(run, register, monkeypatch, capsys):
    monkeypatch.setattr(lab.environment, "EVALUATION_LIMIT", 30)
    for kind, limit in ((Plain, None), (type("Far", (Plain,), {}), 10**9)):
        run_dir = run(env_id=(name := register(kind, limit=limit)), eval_episodes=2)
        assert f"warning: {name} has no time limit, so checkpoints come only where" in capsys.readouterr().out
        assert {value for _, value in scalars(run_dir)["eval/episodic_length"]} == {30}
    run(env_id=register(Plain))
    assert "no time limit" not in capsys.readouterr().out


ENDED = [(None, 0, 0, 0), (None, 7, 0, 0), (None, 72, 40, 0), (10, 77, 70, 70)]


@pytest.mark.parametrize("limit, signal_at, stops_at, saved_at", ENDED)
def test_a_signal_ends_what_would_not_end(
    run, register, capsys, monkeypatch, tmp_path, limit, signal_at, stops_at, saved_at
):
    """Without a time limit at once, before the first step (0), in an evaluation and in training; with one at the end of
    the episode."""

    def step(env, action, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == signal_at:
            STOP_SIGNALS.append(signal.SIGINT)
        return Plain.step(env, action)

    monkeypatch.setattr(lab.environment, "EVALUATION_LIMIT", 30)
    STOP_SIGNALS.extend([signal.SIGINT] * (signal_at == 0))
    with pytest.raises(SystemExit) as stop:
        run(env_id=register(type("Stops", (Plain,), {"step": step}), limit=limit))
    last, (path,) = capsys.readouterr().out.splitlines()[-1], (tmp_path / "runs").glob("*/checkpoint.pt")
    assert stop.value.code == 130 and last.endswith(str(path.parent))
    assert last.startswith(f"stopped at step {stops_at}; go on") and load(path)["global_step"] == saved_at


def test_the_first_ctrl_c_ends_an_evaluation_at_once(run):
    command = [sys.executable, "-u", sac_tar.__file__, "--evaluate", run(total_timesteps=62), "--eval-episodes=1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("compute: ")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT and not process.stderr.read()


# resumed runs


class Noisy(Plain):
    """Draws from everything there is to draw from."""

    def __init__(self):
        self.own, self.old, self.python = np.random.default_rng(1), np.random.RandomState(1), random.Random(1)
        self.torch = torch.Generator().manual_seed(1)

    def draw(self):
        drawn = [self.np_random.normal(), np.random.normal(), random.gauss(0, 1), float(torch.randn(()))]
        drawn += [self.own.normal(), self.old.normal(), self.python.gauss(0, 1), self.observation_space.sample()[0]]
        return float(np.tanh(sum(drawn) + float(torch.randn((), generator=self.torch))))


class OtherGenerator(Plain):
    kind = None

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.Generator(self.kind(seed))
        return super().reset(options=options)

    def draw(self):
        return self.np_random.normal()


class Normalizer(gym.Wrapper):
    """A user's own, whose running statistics are changed in place."""

    def __init__(self, env):
        super().__init__(env)
        self.running = type("Running", (), {})()
        self.running.mean, self.running.var, self.running.count = np.zeros(2), np.ones(2), 0.0

    def reset(self, **options):
        return self.normal(*self.env.reset(**options))

    def step(self, action):
        return self.normal(*self.env.step(action))

    def normal(self, obs, *rest):
        self.running.count += 1
        self.running.mean += (obs - self.running.mean) / self.running.count
        return (obs - 0.5 * self.running.mean).astype(F), *rest


class Sloppy(Plain):
    """Begins anywhere, by generators that `reset` does not seed."""

    def begin(self):
        drawn = np.tanh(self.observation_space.sample()[0]) + self.action_space.sample()[0]
        return float(np.random.normal() + random.gauss(0, 1) + drawn)


def test_random_numbers_of_no_generator_of_its_own_are_those_of_the_seed_and_not_of_evaluations(
    run, register, monkeypatch, capsys
):
    env_id = register(Sloppy)
    runs = [run(env_id=env_id, total_timesteps=80, eval_frequency=frequency) for frequency in (20, 80, 20)]
    assert all(torch.equal(load(runs[0])["actor"]["fc1.weight"], load(one)["actor"]["fc1.weight"]) for one in runs)
    evaluations = [scalars(run_dir)["eval/episodic_return"] for run_dir in runs]
    assert evaluations[0] == evaluations[2] and evaluations[1][-1] == evaluations[0][-1]
    capsys.readouterr()
    main(sac_tar, monkeypatch, "--evaluate", runs[0])
    (_, last) = evaluations[0][-1]
    assert float(capsys.readouterr().out.split("mean ")[1].split(",")[0]) == pytest.approx(last, abs=0.06)


class Unseeded(Plain):
    def reset(self, *, seed=None, options=None):
        return super().reset(options=options)


class Unseen(Unseeded):
    """Draws what no observation shows."""

    def begin(self):
        self.mass = self.np_random.uniform()
        return 0.0


class Anew(Plain):
    """Has a generator of an old kind, and after the first episode another one each time."""

    def reset(self, *, seed=None, options=None):
        self.np_random = np.random.RandomState(seed)
        self.x, self.t = self.begin(), 0
        return self.observe(), {}


class Alone(Plain):
    """Leaves Gymnasium's generator alone, and needs a seed in its first reset."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.own = np.random.default_rng(seed)
        self.x, self.t = self.own.normal(), 0
        return self.observe(), {}


class Drawn(Plain):
    """Its constructor draws what it is to do."""

    made: ClassVar = []

    def __init__(self):
        self.goal = np.random.normal() + random.gauss(0, 1)
        self.made.append(self.goal)

    def draw(self):
        return self.goal + self.action_space.sample()[0]


class Scaled(gym.wrappers.RescaleAction):
    """Its action space is another one than that of the environment."""

    def __init__(self, env):
        super().__init__(env, np.full(1, -2, F), np.full(1, 2, F))


class Inside(Plain):
    """Has its generator deeper inside, as environments of dm_control have."""

    np_random = property(lambda env: env.task.random)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.task = SimpleNamespace(random=np.random.RandomState(seed))
        self.x, self.t = self.begin(), 0
        return self.observe(), {}


def test_training_and_evaluation_are_in_one_environment_that_follows_the_seed(run, register):
    Drawn.made.clear()
    env_id = register(Drawn, Scaled)
    one, again = (run(env_id=env_id, total_timesteps=70) for _ in range(2))
    assert len(Drawn.made) == 4 and len({*Drawn.made}) == 1
    assert scalars(one) == scalars(again) and torch.equal(*(load(path)["actor"]["fc1.weight"] for path in (one, again)))
    run(env_id=env_id, total_timesteps=62, seed=2)
    assert len({*Drawn.made}) == 2


class Properties(Plain):
    """Makes its spaces whenever they are read, but for a composite one."""

    action_space = property(lambda env: box([-1], [1]))
    tasks = gym.spaces.Dict(goal=(goal := gym.spaces.Tuple([box([-1], [1])])))


def test_spaces_that_are_properties_and_those_inside_others_are_seeded_and_kept(run, register):
    env_id = register(Properties)
    one, again = (rows_of(run(env_id=env_id, total_timesteps=30, learning_starts=20))[0] for _ in range(2))
    assert torch.equal(one, again)
    env = make_env(env_id)
    env.unwrapped.tasks = Properties.tasks
    Properties.tasks.seed(1)
    assert len(lab.environment.inner_spaces(gym.spaces.Sequence(gym.spaces.OneOf([Properties.tasks])))) == 5
    expected = Properties.tasks.sample()
    Properties.tasks.seed(1)
    with lab.environment.apart(env, 2, torch.device("cpu")):
        assert Properties.tasks.sample() != expected
    assert Properties.goal[0].np_random in lab.environment.generators(env, env).values()
    assert Properties.tasks.sample() == expected and Properties.tasks["goal"] is Properties.goal


class Once(Anew):
    def reset(self, *, seed=None, options=None):
        if seed is None:
            return Plain.reset(self)
        return super().reset(seed=seed)


def test_an_environment_whose_episodes_do_not_repeat_is_named(run, register, capsys, monkeypatch):
    wrappers = {Plain: (NormalizeObservation,), Once: (Normalizer,)}
    for kind in (Unseeded, Unseen, Anew, Hidden, Plain, Sloppy, Once, Alone):
        run_dir = run(env_id=register(kind, *wrappers.get(kind, ())), total_timesteps=62)
        line = f"warning: episodes of {kind.__name__}-v0 differ at one --seed, so evaluations do, and runs may; let its"
        assert capsys.readouterr().out.count(line) == (kind in (Unseeded, Unseen, Anew)), kind
    main(sac_tar, monkeypatch, "--evaluate", run_dir)


@pytest.mark.parametrize(
    "kind, wrappers, attributes",
    [
        (Noisy, [NormalizeObservation, NormalizeReward], {}),
        (Noisy, [Normalizer], {}),
        (OtherGenerator, [], {"kind": np.random.Philox}),
        (Once, [], {}),
        (Inside, [], {}),
    ],
)
def test_a_run_with_randomness_and_statistics_of_its_own_is_resumed_exactly(
    run, register, tmp_path, capsys, kind, wrappers, attributes
):
    env_id = register(type("Odd", (kind,), attributes), *wrappers)

    def work(runs):
        return run(env_id=env_id, checkpoint_frequency=20, eval_frequency=30, runs_dir=str(tmp_path / runs))

    undisturbed = work("a")
    assert child(lambda: dies(ReplayBuffer, "add", 97, lambda: work("b"))) == -9
    (run_dir,) = (tmp_path / "b").iterdir()
    capsys.readouterr()
    again(sac_tar, run_dir)
    assert "warning: the episode" not in capsys.readouterr().out
    assert_same_run(run_dir, undisturbed)


class Hidden(Plain):
    """Harder with each episode, which no observation shows."""

    def __init__(self):
        self.episodes, self.visits, self.name = 0, [0, 0], "hidden"
        self.seen, self.task, self.solver, self.loop = set(), {"params": [0]}, None, []
        self.loop.append(self.loop)
        self.pool = set()  # of objects, of which nothing can be compared
        self.held = SimpleNamespace(level=0, solver=None)

    def begin(self):
        self.episodes += 1
        self.seen.add(str(self.episodes))
        self.pool.add(object())
        self.held.level += 1
        self.task["params"][0] = self.episodes
        self.visits[self.episodes % 2] += 1
        return 0.0

    def step(self, action):
        self.solver = self.held.solver = object()  # at its first use, so a resumed run begins without
        return super().step(action)


class Now(Plain):
    def begin(self):
        return time.perf_counter()


HIDDEN = "Hidden.episodes, Hidden.visits, Hidden.seen, Hidden.task, Hidden.held.level"


@pytest.mark.parametrize("kind, names", [(Hidden, HIDDEN), (Now, "Now.x, the observation")])
def test_state_that_outlives_a_reset_is_a_warning_that_names_it(run, register, tmp_path, capsys, kind, names):
    work = lambda: run(env_id=register(kind), checkpoint_frequency=20)  # noqa: E731
    assert child(lambda: dies(ReplayBuffer, "add", 97, work)) == -9
    register(kind)
    (run_dir,) = (tmp_path / "runs").iterdir()
    again(sac_tar, run_dir)
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the episode")]
    assert f"at step 80 begins with another value of {names} than before" in warning


def test_a_world_in_which_a_subclass_has_bodies_is_kept():
    class WithABody(BipedalWalker):
        def __init__(self, **options):
            super().__init__(**options)
            self.own = self.world.CreateStaticBody()

    gym.register("WithABody-v0", WithABody, max_episode_steps=40)
    for env, kept in ((make_env("WithABody-v0"), True), (make_env("ShortBox2D-v0"), False)):
        world = env.unwrapped.world
        world.SetAllowSleeping(False)
        world.subStepping = True
        env.reset(seed=1)
        assert (env.unwrapped.world is world) == kept
        assert env.unwrapped.world.subStepping and not env.unwrapped.world.GetAllowSleeping()


IDS = ["Pendulum-v1", "Hopper-v4", "Humanoid-v5", "MountainCarContinuous-v0", "ShortBox2D-v0"]
IDS += ["LunarLanderContinuous-v3"]


@pytest.mark.parametrize("env_id", IDS)
def test_the_known_environments_go_on_exactly_and_without_a_warning(env_id):
    """After two episodes, saved between them, the next one is the same in another environment."""

    def episode(env, obs, policy, most=60):
        seen, done = [obs], False
        while not done and len(seen) < most:
            obs, reward, terminated, truncated, _ = env.step(policy.uniform(-1, 1, env.action_space.shape))
            seen, done = [*seen, obs, [reward]], terminated or truncated
        return np.concatenate(seen)

    first, second, other = make_env(env_id), make_env(env_id), make_env("Pendulum-v1")
    for seed in (1, None):
        episode(first, first.reset(seed=seed)[0], np.random.default_rng(0), 2000)
    saved, obs, begun = unpacked(pack(state_of(first, other))), first.reset()[0], fingerprint(first, {})
    expected = episode(first, obs, np.random.default_rng(1))
    second.reset(seed=1)
    restore(second, other, saved)
    obs = second.reset()[0]
    assert fingerprint(second, {}) == begun and np.array_equal(episode(second, obs, np.random.default_rng(1)), expected)


def test_a_film_that_cannot_be_saved_is_a_warning(tmp_path, monkeypatch, capsys):
    def stop_recording(_):
        raise OSError("[Errno 32] Broken pipe\n\nMoviePy error")

    monkeypatch.setattr(gym.wrappers.RecordVideo, "stop_recording", stop_recording)
    with make_env("Pendulum-v1", True) as env:
        played = play(env, lambda obs: torch.zeros(1, 1), 2, 1, torch.device("cpu"), tmp_path / "step-0")
    assert played[1] == [200, 200]
    assert "warning: no film was saved: [Errno 32] Broken pipe MoviePy error" in capsys.readouterr().out


def test_a_count_in_a_wrapper_is_seen_wherever_the_wrapper_is_defined(register):
    class Counts(gym.Wrapper):
        __module__ = "lab.environment"

        def __init__(self, env):
            super().__init__(env)
            self.begun = 3

    assert "Counts.begun" in fingerprint(Counts(make_env(register(Plain))), {})


def test_evaluations_normalize_with_the_statistics_of_training(run, script, register, monkeypatch, capsys, tmp_path):
    run_dir = run(env_id=register(Plain, NormalizeObservation, NormalizeReward), eval_episodes=3)
    logged, final = scalars(run_dir)["eval/episodic_return"], load(run_dir)
    assert "returns of evaluations are of rewards that NormalizeReward changed" in capsys.readouterr().out
    begun = run(env_id="Plain-v0", eval_episodes=3, method="dense", load=str(run_dir))
    assert scalars(begun)["eval/episodic_return"][0][1] == pytest.approx(logged[-1][1], abs=1e-3)
    assert "do not both normalize" not in capsys.readouterr().out
    run(env_id=register(type("Bare", (Plain,), {})), method="dense", load=str(run_dir), total_timesteps=62)
    assert "final.pt and Bare-v0 do not both normalize by 4.NormalizeObservation.obs_rms" in capsys.readouterr().out
    kept = {name.split(".", 1)[1]: part for name, part in final["statistics"].items()}
    assert kept.keys() == {"NormalizeObservation.obs_rms", "NormalizeReward.return_rms", "NormalizeReward."}
    assert kept["NormalizeObservation.obs_rms"]["count"] == pytest.approx(177, abs=0.1)  # with 17 resets, of training
    assert kept["NormalizeReward.return_rms"]["count"] == pytest.approx(160, abs=0.1)
    main(script, monkeypatch, "--evaluate", run_dir, "--eval-episodes", 3)
    mean = float(capsys.readouterr().out.split("mean ")[1].split(",")[0])
    assert mean == pytest.approx(logged[-1][1], abs=0.06) and abs(mean - logged[0][1]) > 0.06
    env = make_eval_env("Plain-v0", False)
    env.step(np.ones(1))
    assert [part["count"] for part in statistics(env).values() if "count" in part] == [1e-4, 1e-4]
    # an edit may evaluate before the reset, in which a resumed run puts the statistics back
    line = next(line for line in Path(script.__file__).read_text().splitlines() if "        run.evaluate(" in line)
    moved = (line, ""), (reset := "        if done:\n            obs", f"{line}\n{reset}")
    mine = edited(tmp_path, *moved, script=script)
    flags = {"eval_frequency": 20, "checkpoint_frequency": 20, "env_id": register(Plain, NormalizeObservation)}
    run_dir = run(mine, total_timesteps=145, **flags)
    capsys.readouterr()
    main(mine, monkeypatch, "--evaluate", run_dir)
    mean, logged = capsys.readouterr().out.split("mean ")[1], scalars(run_dir)["eval/episodic_return"]
    assert float(mean.split(",")[0]) == pytest.approx(logged[-1][1], abs=0.051)
    again(mine, run_dir, total_timesteps=170)
    assert [step for step, _ in scalars(run_dir)["eval/episodic_return"]].count(140) == 2
    assert {pair for pair in scalars(run_dir)["eval/episodic_return"] if pair[0] <= 140} == {*logged[:-1]}
    often, never = (load(run(env_id=register(Plain, Normalizer), eval_frequency=n)) for n in (10, 1000))
    assert torch.equal(often["actor"]["fc3.bias"], never["actor"]["fc3.bias"])  # evaluations leave those of training


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"# coding: latin-1\nname = '\xe4'\n"])
def test_a_module_may_begin_as_python_allows(run, tmp_path, monkeypatch, start):
    for name in ("code_hash", "sources"):
        monkeypatch.setattr(lab.run, name, getattr(record, name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_module", raising=False)
    source = b"import gymnasium\ngymnasium.register('Odd-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    (tmp_path / "odd_module.py").write_bytes(start + source)
    assert run(env_id="odd_module:Odd-v0", total_timesteps=62).name.startswith("odd_module-Odd-v0__")
    del gym.registry["Odd-v0"]
