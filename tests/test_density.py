"""--density-start and --final-prune-at: the schedule, counts at every pruning and rewiring, invariants, FLOPs."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_compare import compare
from test_runs import events, load
from torch.optim.optimizer import register_optimizer_step_post_hook

from lab import kernels
import sparse_utils as su
import td3_tar
from lab import record, run_folder, run_log
from lab.checks import check_args, complete_args

DECAY = {"density_start": 0.5, "sparsity": 0.85, "total_timesteps": 230, "rewire_every": 20, "rewire_stop": 0.9}
STEPS = [80, 100, 120, 140, 160, 180, 200]
TWICE = {"density_start": 0.6, "final_prune_at": 120, "sparsity": 0.85, "total_timesteps": 200}


def counts(masks):
    return {name: [int(m.sum()) for m in layers.values()] for name, layers in masks.items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def published(start, end, t, last):
    """As its authors write it: t counts prunings, the slope is 6 by the middle."""
    middle = last / 2
    x = sigmoid(6 / middle * (t - middle))
    return start + (end - start) * ((x - 0.5) / (sigmoid(6) - sigmoid(-6)) + 0.5)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 400))
def test_the_schedule_is_the_published_sigmoid_and_ends_exactly(start, end, last):
    values = [su.decayed(start, end, t / last) for t in range(last + 1)]
    assert (values[0], values[-1]) == (start, end)
    assert all(abs(v - published(start, end, t, last)) < 0.51 for t, v in enumerate(values))
    assert values == sorted(values, reverse=start > end)


@pytest.fixture
def watched(monkeypatch):
    """What happens in a run: masks and weights at each pruning and rewiring, and that outside there is only zero."""
    seen = {"prunings": [], "rewirings": [], "new": {}, "checks": 0}
    fix_masks, log_rewiring, log_topology = su.fix_masks, run_folder.log_rewiring, run_folder.log_topology

    def state_of(networks):
        return {name: {k: t.clone() for k, t in net.state_dict().items()} for name, net in networks.items()}

    def spy_topology(writer, run_dir, step, due, widths, static, masks, *rest):
        seen["prunings"].append((step, static, {n: {k: m.clone() for k, m in ls.items()} for n, ls in masks.items()}))
        return log_topology(writer, run_dir, step, due, widths, static, masks, *rest)

    def spy_fix(networks, targets, optimizers, masks):
        seen.update(networks=networks, targets=targets, optimizers=optimizers, masks=masks, before=state_of(networks))
        return fix_masks(networks, targets, optimizers, masks)

    def spy_rewiring(writer, run_dir, step, first, previous, masks):
        seen["rewirings"].append((step, counts(previous), counts(masks)))
        seen["new"][step] = sum(int((m & ~previous["qf1"][key]).sum()) for key, m in masks["qf1"].items())
        return log_rewiring(writer, run_dir, step, first, previous, masks)

    def after_step(*_):
        for kind in ("networks", "targets"):
            for name, network in seen.get(kind, {}).items():
                weights = network.state_dict()
                moments = run_folder.adam_state(network, seen["optimizers"][name]) if kind == "networks" else {}
                for key, mask in seen["masks"][name].items():
                    state = moments.get(f"{key}.weight", {})
                    for t in (weights[f"{key}.weight"], state.get("exp_avg"), state.get("exp_avg_sq")):
                        assert t is None or not t[~mask].any(), (name, key)
                    seen["checks"] += 1

    monkeypatch.setattr(su, "fix_masks", spy_fix)
    monkeypatch.setattr(run_folder, "log_rewiring", spy_rewiring)
    monkeypatch.setattr(run_folder, "log_topology", spy_topology)
    hook = register_optimizer_step_post_hook(after_step)
    yield seen
    hook.remove()
    assert seen["checks"] > 500


# at rewirings


@pytest.mark.parametrize("compute", ["masked", "sparse"])
@pytest.mark.parametrize(
    "flags",
    [
        {"method": "set"},
        {"method": "rigl", "distribution": "global", "criterion": "magnitude"},
        {"method": "set", "regrow": False, "distribution": "uniform"},
        {"method": "cht"},
        {"method": "chts", "active_width": 20, "density_start": 0.4},
        {"method": "rigl", "actor_method": "dense"},
    ],
    ids=str,
)
def test_the_count_is_that_of_the_schedule_at_every_rewiring_and_k_at_the_last(run, watched, flags, compute):
    flags = DECAY | {"compute": compute} | flags
    run_dir = run(**flags)
    ((_, _, first),) = watched["prunings"]
    rewired = ["qf1", "qf2"] if flags.get("actor_method") else ["actor", "qf1", "qf2"]
    sizes = {name: sum(m.numel() for m in layers.values()) for name, layers in first.items()}
    start = {name: round(flags["density_start"] * n) if name in rewired else n for name, n in sizes.items()}
    end = {name: round(0.15 * n) if name in rewired else n for name, n in sizes.items()}
    assert {name: sum(c) for name, c in counts(first).items()} == start
    assert [step for step, _, _ in watched["rewirings"]] == STEPS
    for i, (_, before, after) in enumerate(watched["rewirings"], 1):
        for name in rewired:
            assert sum(after[name]) == round(published(start[name], end[name], i, 7))
            assert all(a <= b for a, b in zip(after[name], before[name], strict=True))
    final = load(run_dir)
    assert {name: sum(c) for name, c in counts(final["masks"]).items()} == end
    log = events(run_dir)
    for name in rewired:
        logged = {e.step: e.value for e in log.Scalars(f"sparsity/{name}")}
        at = {60: start[name]} | {step: sum(after[name]) for step, _, after in watched["rewirings"]}
        assert {s: pytest.approx(1 - n / sizes[name]) for s, n in at.items()} == logged
    share = {step: watched["new"][step] / sum(after["qf1"]) for step, _, after in watched["rewirings"]}
    assert {e.step: e.value for e in log.Scalars("sparsity/qf1_rewired")} == pytest.approx(share)
    assert any(share.values())


def test_a_layer_keeps_what_the_distribution_gives_it_on_the_weights_of_now(run, monkeypatch, watched):
    """Ranked globally, a layer of small weights loses more."""
    calls, decided, drop = [], 0, su.drop
    monkeypatch.setattr(
        su, "drop", lambda of, *rest: calls.append((of.weight.clone(), of.mask.clone())) or drop(of, *rest)
    )
    run(method="set", distribution="global", **DECAY)
    for i, (_, before, after) in enumerate(watched["rewirings"]):
        for j, name in enumerate(("actor", "qf1", "qf2")):
            layers = calls[9 * i + 3 * j : 9 * i + 3 * j + 3]
            assert [int(m.sum()) for _, m in layers] == before[name]
            ranked = torch.cat([w[m].abs() for w, m in layers]).sort(descending=True).values
            last = ranked[sum(after[name]) - 1]
            for (w, m), count in zip(layers, after[name], strict=True):  # equal only where |w| tie
                assert int((w[m].abs() > last).sum()) <= count <= int((w[m].abs() >= last).sum())
            decided += int(last > 0)
    assert decided > 5


def test_without_the_flag_a_distribution_is_not_asked_at_a_rewiring(run, monkeypatch):
    asked, er = [], su.er_budgets
    monkeypatch.setitem(su.DISTRIBUTIONS, "er", lambda *a: asked.append(0) or er(*a))
    run(method="set", total_timesteps=150, rewire_every=20)
    assert len(asked) == 3


def test_a_distribution_that_gives_more_than_there_is_is_an_error(run, monkeypatch):
    """As one may that does not see that what is pruned scores minus infinity."""
    er = su.er_budgets

    def blind(scores, keep):
        return [0, 0, keep] if any((s == -math.inf).any() for s in scores.values()) else er(scores, keep)

    monkeypatch.setitem(su.DISTRIBUTIONS, "er", blind)
    with pytest.raises(ValueError, match=r"distribution er leaves \d+ connections in place of"):
        run(method="set", **DECAY)


def test_flops_follow_the_count(run, script, watched):
    run_dir = run(method="rigl", **DECAY)
    log, head = events(run_dir), 2 if script is not td3_tar else 1
    size = {"actor": 24 * (3 + 24 + head), "qf1": 24 * (4 + 24 + 1)}
    at = {60: {name: round(0.5 * n) for name, n in size.items()}}
    at |= {step: {name: sum(after[name]) for name in size} for step, _, after in watched["rewirings"]}
    inference = {e.step: e.value for e in log.Scalars("flops/inference")}
    assert inference == {step: 2 * n["actor"] for step, n in at.items()}
    total, active = 0, None
    for step in range(60, 230):
        if step in STEPS:
            total += sum(k * 32 * (4 * active[name] + 2 * size[name]) for name, k in (("actor", 1), ("qf1", 2)))
        active = at.get(step, active)
        actor, critics = 2 * active["actor"], 4 * active["qf1"]
        total += actor + (step > 60) * 32 * (actor + 4 * critics)
        if step > 60 and step % 2 == 0:
            total += 32 * (3 * actor + critics) if script is td3_tar else 2 * 32 * (3 * actor + 2 * critics)
    assert log.Scalars("flops/training")[-1].value == pytest.approx(total, rel=1e-6)


# where masks stay


@pytest.mark.parametrize("compute", ["masked", "sparse"])
@pytest.mark.parametrize(
    "flags",
    [
        {"method": "static"},
        {"method": "tar", "reserve": 0.2, "distribution": "uniform"},
        {"method": "tar_ch", "critic_method": "uniform", "active_width": 20},
        {"method": "static", "critic_method": "dense", "init": "sparse"},
    ],
    ids=str,
)
def test_a_mask_that_stays_is_pruned_twice(run, watched, monkeypatch, flags, compute):
    scaled, scale = [], su.scale_to_active_inputs
    monkeypatch.setattr(
        su, "scale_to_active_inputs", lambda network, masks: scaled.append(network) or scale(network, masks)
    )
    run_dir = run(compute=compute, **TWICE | flags)
    (first_step, _, first), (step, static, second) = watched["prunings"]
    assert (first_step, step) == (60, 120) and not watched["rewirings"]
    once = len(watched["networks"]) + len(watched["targets"])  # trained weights are not scaled
    assert len(scaled) == (once if "init" in flags else 0)
    methods = {"actor": flags["method"]} | dict.fromkeys(("qf1", "qf2"), flags.get("critic_method", flags["method"]))
    report, final = json.loads((run_dir / "topology.json").read_text()), load(run_dir)
    for name, method in methods.items():
        size = sum(m.numel() for m in first[name].values())
        dense = method == "dense"
        budget = size if dense else round(0.15 * size)
        reserve = round(flags.get("reserve", 0.1) * budget) if method in su.REVIVALS else 0
        assert sum(counts(first)[name]) == (size if dense else round(0.6 * size))
        assert sum(counts(second)[name]) == sum(counts(final["masks"])[name]) == budget
        assert (report[name]["budget"], report[name]["reserve"]) == (budget, reserve)
        assert sum(int((second[name][key] & ~m).sum()) for key, m in static[name].items()) == reserve
        for key, mask in static[name].items():
            assert not (mask & ~first[name][key]).any()
            weight = watched["before"][name][f"{key}.weight"].abs()
            gone = first[name][key] & ~mask
            assert not gone.any() or not mask.any() or weight[mask].min() >= weight[gone].max()
    log = events(run_dir)
    assert [e.step for e in log.Scalars("sparsity/actor")] == [60, 120]
    inference = [2 * sum(counts(masks)["actor"]) for masks in (first, second)]
    assert [(e.step, e.value) for e in log.Scalars("flops/inference")] == list(zip((60, 120), inference))
    for name, layers in run_log.masks_of(run_dir).items():  # as compare.py draws them
        for key, (_, after) in layers.items():
            assert np.array_equal(np.isin(after, (1, 2)), second[name][key].numpy())


def test_the_second_pruning_keeps_only_what_the_first_has_left(run, watched, monkeypatch):
    """Whatever it goes by: here by chance."""
    monkeypatch.setitem(su.CRITERIA, "magnitude", su.CRITERIA["random"])
    run(method="static", **TWICE)
    (_, _, first), (_, _, second) = watched["prunings"]
    for name, layers in second.items():
        assert not any((mask & ~first[name][key]).any() for key, mask in layers.items())


def test_auto_is_measured_at_the_density_that_training_starts_with(run, monkeypatch):
    measured = []
    monkeypatch.setattr(kernels, "known_times", lambda _, budget, *__: measured.append(budget) or (2.0, 1.0))
    masks = load(run(method="static", compute="auto", **TWICE))["masks"]
    assert measured == [round(0.6 * sum(mask.numel() for mask in layers.values())) for layers in masks.values()]


def test_masked_training_and_kernels_agree_over_the_second_pruning(run):
    flags = TWICE | {"method": "tar", "total_timesteps": 130}
    masked, sparse = (load(run(compute=compute, **flags)) for compute in ("masked", "sparse"))
    for name, layers in masked["masks"].items():
        assert all(torch.equal(mask, sparse["masks"][name][key]) for key, mask in layers.items())
        for key, tensor in masked[name].items():
            torch.testing.assert_close(tensor, sparse[name][key], rtol=1e-3, atol=1e-4)


def test_a_dense_run_is_the_same_whatever_these_flags_say(run):
    folders = [run(method="dense", **flags) for flags in (TWICE, {"total_timesteps": 200})]
    assert not any("__d0.6" in folder.name for folder in folders)
    a, b = map(load, folders)
    assert all(torch.equal(a[n][key], b[n][key]) for n in ("actor", "qf1", "qf2") for key in a[n])


# flags


def test_folders_and_records_tell_them_apart(run, tmp_path):
    names = [run(method="rigl", **DECAY).name, run(method="static", **TWICE).name]
    assert "__s0.85__d0.5__1__" in names[0] and "__s0.85__d0.6-120__1__" in names[1]
    args = {"method": "static", "actor_method": None, "critic_method": None, "sparsity": 0.9} | TWICE
    for flag, value in (("density_start", 0.5), ("final_prune_at", 130)):
        assert record.identity(args) != record.identity(args | {flag: value})
        assert record.identity(args | {"method": "dense"}) == record.identity(args | {"method": "dense", flag: value})
    run(method="rigl", **DECAY | {"density_start": 0.3})
    runs = compare.read_runs(tmp_path / "runs", [])
    assert set(runs.arm) == {
        "rigl random+er density_start=0.3", "rigl random+er density_start=0.5", "static random+er"
    }  # fmt: skip


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"method": "rigl", "density_start": 1.0}, "must be above 0 and below 1, got 1.0"),
        ({"method": "rigl", **DECAY, "density_start": 0.1}, "choose one above the"),
        ({"method": "rigl", **DECAY, "density_start": 0.9, "active_width": 12}, "that its active neurons can have"),
        (
            {"method": "static", "density_start": 0.5},
            "needs --final-prune-at where masks stay, as with --method static",
        ),
        ({"method": "static", "final_prune_at": 100}, "is the end of a --density-start"),
        ({"method": "tar", **TWICE, "final_prune_at": 60}, "must be after --prune-at 60 and before the end, got 60"),
        ({"method": "tar", **TWICE, "final_prune_at": 200}, "and before the end, got 200"),
        ({"method": "rigl", **TWICE}, "is for masks that stay"),
        ({"method": "rigl", "critic_method": "static", **TWICE}, "that both rewire or whose masks both stay"),
        ({"method": "set", "critic_method": "tar", **DECAY}, "that both rewire or whose masks both stay"),
        ({"method": "set", **DECAY, "rewire_stop": 0.2}, "after step 60 and before 46, which is never"),
        ({"method": "set", **DECAY, "save_buffer": False}, "no --no-save-buffer"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(run, capsys, tmp_path, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_nothing_is_pruned_of_needs_no_more_flags(script):
    args = script.Args(method="dense", density_start=0.5)
    complete_args(args)
    check_args(args)
