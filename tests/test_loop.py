"""Cyclic learning rates, and how the flags of the training loop are recorded and told apart."""

import functools
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_resume import refused
from test_runs import events, load, same_weights
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lab import compare, record
from lab import run_folder as rf
from lab.checks import complete_args

CYCLES = {"lr_cycles": 3, "total_timesteps": 160}  # of learning_starts 60: steps 60, 94 and 127


@pytest.mark.parametrize("start, end, cycles", [(0, 30, 3), (60, 160, 3), (7, 18, 4), (5, 12, 7), (100, 101, 1)])
def test_the_rate_rises_for_a_fifth_of_each_cycle_and_falls_to_zero(script, start, end, cycles):
    starts = [script.cycle_start(k, start, end, cycles) for k in range(cycles + 1)]
    exact = [start + Fraction((end - start) * k, cycles) for k in range(cycles + 1)]
    assert all(0 <= at - point < 1 for at, point in zip(starts, exact, strict=True))  # the first step that is in it
    assert starts[-1] == end and len(set(starts)) == cycles + 1
    for step in range(start, end):
        k = max(k for k in range(cycles) if starts[k] <= step)
        done = float((step - exact[k]) / (exact[k + 1] - exact[k]))
        expected = np.interp(done, [0, 0.2, 1], [0.2, 1, 0])
        assert script.lr_factor(step, start, end, cycles) == pytest.approx(expected, abs=1e-12)


def watch(seen):
    """Record at each update its rates, the counts of Adam's updates so far, and whether the weights are those that the
    update before it left."""
    left = {}

    def before(optimizer, *_):
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        counts = {float(optimizer.state[param]["step"]) if optimizer.state.get(param) else 0.0 for param in params}
        now = torch.cat([param.detach().flatten() for param in params])
        unmoved = id(optimizer) not in left or torch.equal(left[id(optimizer)], now)
        rates = [group["lr"] for group in optimizer.param_groups]
        seen.setdefault(len(params) == 12, []).append((rates, counts, unmoved))

    def after(optimizer, *_):
        params = [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
        left[id(optimizer)] = torch.cat([param.detach().flatten() for param in params])

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


@pytest.mark.parametrize("q_rate", [1e-3, 5e-3])
def test_every_group_follows_the_cycles_and_adam_starts_anew_in_each_while_the_weights_stay(run, script, q_rate):
    seen, rates = {}, {"q_lr": q_rate} if script.__name__ == "sac_tar" else {"learning_rate": q_rate}
    hooks = watch(seen)
    try:
        run(**CYCLES, **rates, method="dense", policy_frequency=1)
    finally:
        for hook in hooks:
            hook.remove()
    steps = range(61, 160)
    factors = [script.lr_factor(step, 60, 160, 3) for step in steps]
    own = [q_rate] if script.__name__ == "td3_tar" else [3e-4, q_rate]  # the actor's, and log_alpha's
    updates = [step - max(start for start in (61, 94, 127) if start <= step) for step in steps]
    # the critics' optimizer has 12 parameters
    for critics, base in ((True, [q_rate]), (False, own)):
        found = seen[critics]
        assert [rates for rates, _, _ in found] == [[factor * rate for rate in base] for factor in factors]
        assert [counts for _, counts, _ in found] == [{float(n)} for n in updates]
        assert all(unmoved for _, _, unmoved in found)


@pytest.mark.parametrize("compute", ["masked", "sparse"])
@pytest.mark.parametrize("method", ["tar", "rigl"])
def test_adam_starts_anew_in_the_kernels_and_while_masks_change_too(run, script, compute, method):
    """Rewired at 95, too, when Adam has nothing of the actor: it was cleared at 94 and the actor learns at 96."""
    cleared = []

    def before(optimizer, *_):
        counts = {float(state["step"]) for state in optimizer.state.values() if state}
        cleared.append(len(optimizer.param_groups) == 1 and not counts)

    hook = register_optimizer_step_pre_hook(before)
    try:
        run_dir = run(**CYCLES, method=method, compute=compute, rewire_every=5, policy_frequency=3, sparsity=0.8)
    finally:
        hook.remove()
    assert sum(cleared) == (3 if script.__name__ == "sac_tar" else 6)  # SAC's actor has two groups
    final = load(run_dir)
    for name, masks in final["masks"].items():
        for layer, mask in masks.items():
            assert not final[name][f"{layer}.weight"][~mask].any()


def test_a_rate_given_to_an_optimizer_by_hand_acts_and_is_the_one_that_cycles(run, script, monkeypatch):
    adam, seen = script.optim.Adam, []

    def by_hand(params, **flags):
        optimizer = adam(params, **flags)
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        return optimizer

    monkeypatch.setattr(script.optim, "Adam", by_hand)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    try:
        run_dir = run(**CYCLES)
    finally:
        hook.remove()
    assert max(seen) == pytest.approx(0.02, rel=0.05)
    for name in ("actor", "critic"):
        (logged,) = [e.value for e in events(run_dir).Scalars(f"charts/{name}_lr") if e.step == 100]
        assert logged == pytest.approx(0.02 * script.lr_factor(100, 60, 160, 3))


def test_without_cycles_the_rate_stays_and_is_not_logged(run):
    assert not [tag for tag in events(run()).Tags()["scalars"] if tag.endswith("_lr")]


def test_cycles_are_of_all_of_training_which_may_not_grow(run, script, capsys):
    run_dir = run(lr_cycles=2)
    capsys.readouterr()
    given = rf.resumed_args(script.Args, str(run_dir), script.SCRIPT)
    grown = type(given)(**vars(given) | {"total_timesteps": 300})
    message = refused(capsys, functools.partial(rf.check_resumed_args, grown, given))
    assert "--lr-cycles splits --total-timesteps into cycles; start a new run to train longer" in message


FLAGS = {"n3": {"n_step": 3}, "recent0.25": {"recent_fraction": 0.25, "recent_size": 50}, "cycles2": {"lr_cycles": 2}}


def test_each_flag_acts_is_in_the_folders_name_and_makes_an_arm(run, tmp_path, capsys):
    plain = run()
    finals = [load(plain)]
    for name, flags in FLAGS.items():
        run_dir = run(**flags)
        finals.append(load(run_dir))
        assert f"__{name}__1__" in run_dir.name
        assert flags.items() <= json.loads((run_dir / "config.json").read_text())["args"].items()
    for i, final in enumerate(finals):
        assert not any(same_weights(final, other) for other in finals[:i])
    assert "__s0.9__1__" in plain.name
    runs = compare.read_runs(tmp_path / "runs", [])
    ends = ("", " lr_cycles=2", " n_step=3", " recent_fraction=0.25 recent_size=50")
    assert set(runs.arm) == {f"tar random+er{end}" for end in ends}


def test_all_flags_together_in_one_run(run):
    flags = CYCLES | {"n_step": 3, "recent_fraction": 0.25, "recent_size": 50, "compute": "sparse", "sparsity": 0.8}
    (run_dir, again) = (run(**flags) for _ in "ab")
    assert "__n3__recent0.25__cycles3__1__" in run_dir.name
    assert same_weights(load(run_dir), load(again))


def test_what_a_flag_of_the_loop_does_not_touch_is_no_part_of_a_runs_identity(script):
    def identity(**flags):
        args = script.Args(**flags)
        complete_args(args)
        return record.identity(vars(args))

    assert identity() == identity(n_step_from=100) == identity(recent_size=5)
    for flags in ({"n_step": 2}, {"recent_fraction": 0.5}, {"lr_cycles": 1}):
        assert identity(**flags) != identity()
    assert identity(n_step=2, n_step_from=9) != identity(n_step=2)
    assert identity(recent_fraction=0.5, recent_size=5) != identity(recent_fraction=0.5)


def test_a_run_from_before_these_flags_is_one_of_their_defaults(script, tmp_path):
    args = script.Args()
    complete_args(args)
    young = ("n_step", "n_step_from", "recent_fraction", "recent_size", "lr_cycles")
    older = {name: value for name, value in vars(args).items() if name not in young}
    (tmp_path / "config.json").write_text(json.dumps({"script": script.__name__, "args": older, "segments": []}))
    assert record.read_config(tmp_path)["args"] == vars(args)
