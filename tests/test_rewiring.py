"""The dynamic arms: dropping and growing on tensors alone, set and rigl in runs, arms per network, tiny, FLOPs."""

import inspect
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from test_runs import events, load, same_weights
from torch.optim.optimizer import register_optimizer_step_post_hook

import sac_tar
import sparse_utils as su
import td3_tar
from lab import run_folder

CRITERIA = list(su.DROPS)  # the last one is random


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(seed, shape=(7, 5), density=0.5):
    """Weights outside the mask are zero, one inside too (freshly grown)."""
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random(shape) < density)
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32)) * mask
    gradient = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    if mask.any():
        fresh = mask.nonzero()[0]
        weight[tuple(fresh)] = 0.0
    return su.Layer(weight, gradient, mask, generator(seed), 0.5)


def grow(of, kept, candidates, count, method, seed=0):
    return su.grow(of._replace(mask=kept, generator=generator(seed)), candidates, count, method)


# on tensors alone


@given(st.integers(0, 10**6), st.sampled_from(CRITERIA), st.sampled_from(["set", "rigl"]), st.floats(0, 1), st.data())
def test_as_many_grow_as_are_dropped_and_only_where_it_is_open(seed, criterion, method, density, data):
    of = layer(seed, density=density)
    mask, before = of.mask, of.mask.clone()
    count = data.draw(st.integers(0, min(int(mask.sum()), int((~mask).sum()))))
    kept = su.drop(of, count, criterion)
    after = grow(of, kept, ~mask, count, method, seed)
    assert torch.equal(mask, before)
    assert int((mask & ~kept).sum()) == count and not (kept & ~mask).any()
    assert int((after & ~kept).sum()) == count and not (after & mask & ~kept).any()
    assert int(after.sum()) == int(mask.sum()) and not (kept & ~after).any()
    count = data.draw(st.integers(0, int(mask.sum())))  # what is dropped may grow again, so it always fits
    kept = su.drop(of, count, criterion)
    after = grow(of, kept, ~kept, count, method, seed)
    assert int(after.sum()) == int(mask.sum()) and not (kept & ~after).any()


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in ("random", "soft")])  # by no chance
@pytest.mark.parametrize("seed", range(5))
def test_what_is_dropped_is_lowest_by_the_published_formula(criterion, seed):
    of = layer(seed, (9, 8))
    weight, gradient, mask, *_ = of
    rows, columns = np.nonzero(mask.numpy())
    w, g = weight.numpy()[rows, columns].astype(float), gradient.numpy()[rows, columns].astype(float)
    count = len(w) // 3
    dropped = mask & ~su.drop(of, count, criterion)
    if criterion == "set":
        positive, negative = np.sort(w[w >= 0]), -np.sort(-w[w < 0])
        lost = weight[dropped]
        lost_positive, lost_negative = lost[lost >= 0].sort().values, lost[lost < 0].sort(descending=True).values
        assert lost_positive.tolist() == pytest.approx(positive[: len(lost_positive)])
        assert lost_negative.tolist() == pytest.approx(negative[: len(lost_negative)])
        assert len(lost_positive) == pytest.approx(count * len(positive) / len(w), abs=1)
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        score = {
            "magnitude": abs(w), "mest": abs(w) + abs(g), "snip": abs(w * g),
            "sensitivity": abs(g) / abs(w), "reciprocal_sensitivity": abs(w) / abs(g),
        }[criterion]  # fmt: skip
    expected = np.zeros(mask.shape, bool)
    lowest = np.argsort(score)[:count]
    expected[rows[lowest], columns[lowest]] = True
    assert np.array_equal(dropped.numpy(), expected)


def test_a_weight_and_gradient_of_zero_count_as_zero_sensitivity():
    weight, gradient, mask = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 4.0]]), torch.ones(1, 3).bool()
    of = su.Layer(weight, gradient, mask, generator(), 0.5)
    for criterion in ("sensitivity", "reciprocal_sensitivity"):
        assert su.drop(of, 1, criterion).tolist() == [[False, True, True]]


def test_rigl_grows_where_the_gradient_is_largest_and_set_anywhere():
    of = layer(3, (20, 20), 0.25)
    _, gradient, mask, *_ = of
    grown = grow(of, mask, ~mask, 30, "rigl") & ~mask
    assert gradient[grown].abs().min() >= gradient[~mask & ~grown].abs().max()
    hits = sum(grow(of, mask, ~mask, 30, "set", seed).float() for seed in range(2000)) / 2000
    expected = 30 / int((~mask).sum())
    assert hits[~mask].tolist() == pytest.approx([expected] * int((~mask).sum()), abs=0.033)  # five standard deviations


def test_random_dropping_is_uniform_and_an_unknown_criterion_is_refused():
    of = layer(3, (10, 10), 0.6)
    mask = of.mask
    drops = [mask & ~su.drop(of._replace(generator=generator(seed)), 10, "random") for seed in range(2000)]
    hits, expected = sum(d.float() for d in drops) / 2000, 10 / int(mask.sum())
    assert hits[mask].tolist() == pytest.approx([expected] * int(mask.sum()), abs=0.043)  # five standard deviations
    with pytest.raises(KeyError, match="smallest"):
        su.drop(of, 10, "smallest")


# whole runs

REWIRING = {"sparsity": 0.8, "total_timesteps": 200, "rewire_every": 40, "rewire_fraction": 0.47, "rewire_stop": 0.75}


@pytest.mark.parametrize("prune_at, regrow", [(None, True), (90, True), (None, False)])
@pytest.mark.parametrize("method, criterion", [("set", "magnitude"), ("rigl", "magnitude"), ("rigl", "snip")])
def test_i1_i2_hold_through_every_update_and_rewiring(run, script, monkeypatch, method, criterion, prune_at, regrow):
    """Rewirings at 80 (unless pruning comes later) and 120; from 0.75 * 200 on the masks stay."""
    networks, history, checked = {}, [], {"online": 0, "target": 0}
    fix_masks, log_rewiring, polyak_update = su.fix_masks, run_folder.log_rewiring, script.polyak_update

    def spy_fix(nets, targets, optimizers, masks):
        networks.update(nets=nets, targets=targets, optimizers=optimizers, masks=masks)
        history.append((None, {n: {k: m.clone() for k, m in layers.items()} for n, layers in masks.items()}))
        return fix_masks(nets, targets, optimizers, masks)

    def outside_is_zero(nets, optimizers):
        for name, network in nets.items():
            for key, weight in su.linear_weights(network).items():
                outside = ~networks["masks"][name][key]
                state = optimizers[name].state.get(weight, {}) if optimizers else {}
                for tensor in (weight, state.get("exp_avg"), state.get("exp_avg_sq")):
                    assert tensor is None or not tensor[outside].any(), (name, key)

    def spy_rewiring(writer, run_dir, step, first, previous, masks):
        assert set(previous) == {"actor", "qf1", "qf2"}
        outside_is_zero(networks["nets"], networks["optimizers"])
        outside_is_zero(networks["targets"], None)
        for name, layers in masks.items():
            for key, mask in layers.items():
                old, grown = previous[name][key], mask & ~previous[name][key]
                assert torch.equal(old, history[-1][1][name][key])
                assert int(mask.sum()) == int(old.sum())
                fraction = 0.235 * (1 + math.cos(math.pi * step / 150))
                count = int(fraction * int(old.sum()))
                assert int(grown.sum()) <= count if regrow else int(grown.sum()) == min(count, int((~old).sum()))
                weight = su.linear_weights(networks["nets"][name])[key]
                state = networks["optimizers"][name].state.get(weight, {})
                for tensor in (weight, *(state[k] for k in ("exp_avg", "exp_avg_sq") if state)):
                    assert not tensor[grown].any()
        history.append((step, {n: {k: m.clone() for k, m in layers.items()} for n, layers in masks.items()}))
        return log_rewiring(writer, run_dir, step, first, previous, masks)

    def after_step(optimizer, *_):
        if networks:
            outside_is_zero(networks["nets"], networks["optimizers"])
            checked["online"] += 1

    def spy_polyak(*arguments):
        polyak_update(*arguments)
        if networks:
            outside_is_zero(networks["targets"], None)
            checked["target"] += 1

    monkeypatch.setattr(su, "fix_masks", spy_fix)
    monkeypatch.setattr(run_folder, "log_rewiring", spy_rewiring)
    monkeypatch.setattr(script, "polyak_update", spy_polyak)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        run_dir = run(method=method, drop_criterion=criterion, prune_at=prune_at, regrow=regrow, **REWIRING)
    finally:
        hook.remove()
    assert checked["online"] > 100 and checked["target"] > 40
    assert [step for step, _ in history] == [None, *([80] if prune_at is None else []), 120]
    final = load(run_dir)
    for name, layers in final["masks"].items():
        assert sum(int(m.sum()) for m in layers.values()) == round(0.2 * sum(m.numel() for m in layers.values()))
        for key, mask in layers.items():  # frozen after the last rewiring, and moved since pruning
            assert torch.equal(mask, history[-1][1][name][key])
        assert any(not torch.equal(mask, history[0][1][name][key]) for key, mask in layers.items())


def published_rule(weight, gradient, mask, count, regrow):
    """RigL (Evci et al. 2020, algorithm 1) for one layer, on lists: keep the largest |w|, grow the largest |g| among
    all that is not kept. The active positions afterwards."""
    everywhere = [(i, j) for i in range(len(mask)) for j in range(len(mask[0]))]
    active = [p for p in everywhere if mask[p[0]][p[1]]]
    if not regrow:
        count = min(count, len(everywhere) - len(active))
    kept = set(sorted(active, key=lambda p: abs(weight[p[0]][p[1]]))[count:])
    open_to = [p for p in everywhere if p not in (kept if regrow else active)]
    return kept | set(sorted(open_to, key=lambda p: -abs(gradient[p[0]][p[1]]))[:count])


@pytest.mark.parametrize("regrow, width", [(True, None), (False, None), (True, 12)])
def test_a_rewiring_of_rigl_is_the_published_rule(run, monkeypatch, regrow, width):
    """Masks, weights and moments of every layer, computed apart: what stays or is regrown keeps all, a new one is 0."""
    seen, drop, fix_masks, log_rewiring = {"calls": [], "steps": []}, su.drop, su.fix_masks, run_folder.log_rewiring

    def spy_fix(networks, targets, optimizers, *rest):
        seen.update(networks=networks, optimizers=optimizers)
        return fix_masks(networks, targets, optimizers, *rest)

    def values():
        for name, network in seen["networks"].items():
            for weight in su.linear_weights(network).values():
                state = seen["optimizers"][name].state[weight]
                yield [t.detach().clone() for t in (weight, state["exp_avg"], state["exp_avg_sq"])]

    def spy_drop(of, *rest):
        if not seen["calls"]:
            seen["before"] = list(values())
        seen["calls"].append([t.tolist() for t in (of.weight, of.gradient, of.mask)])
        return drop(of, *rest)

    def spy_rewiring(writer, run_dir, step, first, previous, masks):
        result, regrown, replaced = log_rewiring(writer, run_dir, step, first, previous, masks), 0, 0
        report = json.loads((run_dir / "topology.json").read_text())
        layers = [(name, layer) for name in masks for layer in masks[name]]
        states = zip(seen["calls"], seen["before"], values(), strict=True)
        for (name, layer), (call, before, after) in zip(layers, states, strict=True):
            mask, old = masks[name][layer], previous[name][layer]
            count = int(0.235 * (1 + math.cos(math.pi * step / 150)) * int(old.sum()))
            positions = {(i, j) for i, j in mask.nonzero().tolist()}
            assert positions == published_rule(*call, count, regrow)
            assert report[name]["layers"][layer]["last_rewiring"]["replaced"] == int((mask & ~old).sum())
            for tensor_before, tensor_after in zip(before, after, strict=True):
                assert torch.equal(tensor_after, tensor_before * (mask & old))
            replaced += int((mask & ~old).sum())
            regrown += count - int((mask & ~old).sum())
        assert replaced > 0 and (regrown > 0) >= regrow
        seen["calls"].clear()
        seen["steps"].append(step)
        return result

    monkeypatch.setattr(su, "drop", spy_drop)
    monkeypatch.setattr(su, "fix_masks", spy_fix)
    monkeypatch.setattr(run_folder, "log_rewiring", spy_rewiring)
    run(method="rigl", regrow=regrow, active_width=width, **REWIRING | {"sparsity": 0.85})
    assert seen["steps"] == [80, 120]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [80, 120]),
        ({"prune_at": 20}, [80, 120]),  # learning, from 60 on, comes first
        ({"prune_at": 80}, [120]),  # not at the step of pruning
        ({"rewire_stop": 0.6}, [80]),  # nor at the step where it stops
    ],
)
def test_rewirings_come_when_they_should_and_drop_by_the_criterion_of_the_flag(run, monkeypatch, flags, expected):
    steps, criteria, log_rewiring, drop = [], set(), run_folder.log_rewiring, su.drop
    monkeypatch.setattr(run_folder, "log_rewiring", lambda *a: steps.append(a[2]) or log_rewiring(*a))
    monkeypatch.setattr(su, "drop", lambda *a: criteria.add(a[2]) or drop(*a))
    run(method="set", drop_criterion="mest", **REWIRING | flags)
    assert steps == expected and criteria == {"mest"}


def test_an_evaluation_comes_before_the_rewiring_of_its_step(run, script, monkeypatch):
    order, evaluate, log_rewiring = [], script.evaluate, run_folder.log_rewiring
    monkeypatch.setattr(script, "evaluate", lambda *a: order.append("evaluation") or evaluate(*a))
    monkeypatch.setattr(run_folder, "log_rewiring", lambda *a: order.append(a[2]) or log_rewiring(*a))
    run_dir = run(method="rigl", eval_frequency=40, **REWIRING)
    assert order == ["evaluation"] * 3 + [80, "evaluation", 120, "evaluation", "evaluation"]
    rewired = {e.step: e.value for e in events(run_dir).Scalars("sparsity/qf1_rewired")}
    assert list(rewired) == [80, 120] and rewired[80] > rewired[120] > 0


def test_rigl_grows_by_the_gradient_of_each_networks_own_loss(run, script, monkeypatch):
    """With losses that anyone can differentiate; the actor's loss runs through the critics too and must not leak in."""
    sample, drop, fix_masks = script.ReplayBuffer.sample, su.drop, su.fix_masks
    seen = {"networks": None, "batch": None, "calls": []}

    def simple_critic_losses(*arguments):
        data = next(a for a in arguments if isinstance(a, script.Batch))
        qf1, qf2 = seen["networks"]["qf1"], seen["networks"]["qf2"]
        values = [qf(data.observations, data.actions) for qf in (qf1, qf2)]
        return values[0].square().mean(), 3 * values[1].square().mean(), *values

    def spy_sample(self, batch_size):
        seen["batch"] = sample(self, batch_size)
        return seen["batch"]

    def spy_fix(networks, *rest):
        seen["networks"] = networks
        return fix_masks(networks, *rest)

    def spy_drop(of, *rest):
        seen["calls"].append(of.gradient.clone())
        if len(seen["calls"]) % 9 == 0:  # three networks of three layers: one rewiring
            qf = seen["networks"]["qf1"], seen["networks"]["qf2"]
            data = seen["batch"]
            for i, (critic, scale) in enumerate(zip(qf, (1, 3), strict=True)):
                loss = scale * critic(data.observations, data.actions).square().mean()
                weights = list(su.linear_weights(critic).values())
                for layer, expected in enumerate(torch.autograd.grad(loss, weights)):
                    got = seen["calls"][-9 + 3 * (i + 1) + layer]
                    assert layer != 1 or got.count_nonzero() > 2 * 73  # dense: fc2 has 73 active connections
                    if i == 1:  # the second critic is rewired last, so its weights are as they were
                        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-8)
                    else:
                        before = seen["first critic"][layer]
                        assert torch.allclose(got, before, rtol=1e-4, atol=1e-8)
        elif len(seen["calls"]) % 9 == 4:  # the first critic comes next and is untouched so far
            critic, data = seen["networks"]["qf1"], seen["batch"]
            loss = critic(data.observations, data.actions).square().mean()
            seen["first critic"] = torch.autograd.grad(loss, list(su.linear_weights(critic).values()))
        return drop(of, *rest)

    monkeypatch.setattr(script, "critic_losses", simple_critic_losses)
    monkeypatch.setattr(script.ReplayBuffer, "sample", spy_sample)
    monkeypatch.setattr(su, "fix_masks", spy_fix)
    monkeypatch.setattr(su, "drop", spy_drop)
    run(method="rigl", **REWIRING)
    assert len(seen["calls"]) == 9 * 2


@pytest.mark.parametrize("compute", ["masked", "sparse"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_i4_i6_for_the_dynamic_arms(run, method, compute):
    flags = REWIRING | {"compute": compute}
    assert same_weights(load(run(method=method, **flags | {"sparsity": 0.0})), load(run(method="dense", **flags)))
    a, b = (load(run(method=method, drop_criterion="random", **flags)) for _ in range(2))
    assert same_weights(a, b)
    assert all(torch.equal(a["masks"][n][k], b["masks"][n][k]) for n in a["masks"] for k in a["masks"][n])


@pytest.mark.parametrize("method, start", [("set", None), ("rigl", None), ("rigl", 0.5), ("chts", None)])
def test_a_rewiring_in_the_kernels_is_that_of_masked_training_to_the_bit(
    run, script, monkeypatch, tmp_path, method, start
):
    """From one checkpoint, made just before it: masks, weights, moments and targets right after it."""
    log_rewiring, seen = run_folder.log_rewiring, {}

    def state_of(train, compute):
        def spy(writer, run_dir, step, first, previous, masks):
            frame = inspect.currentframe().f_back.f_locals
            seen[compute] = run_folder.final_state(script.SCRIPT, frame["args"], step, frame["modules"], masks)
            optimizers = frame["optimizers"].items()
            seen[compute]["adam"] = {n: run_folder.adam_state(frame["modules"][n], o) for n, o in optimizers}
            compacted = [hasattr(network, "sparse") for network in frame["networks"].values()]
            assert compacted == [compute == "sparse"] * 3
            raise InterruptedError

        monkeypatch.setattr(run_folder, "log_rewiring", spy)
        with pytest.raises(InterruptedError):
            train()

    flags = REWIRING | {"method": method, "checkpoint_frequency": 80, "runs_dir": str(tmp_path / "a")}
    flags |= {"density_start": start}
    state_of(lambda: run(**flags), "masked")  # leaves the checkpoint of step 80
    monkeypatch.setattr(run_folder, "log_rewiring", log_rewiring)
    (run_dir,) = (tmp_path / "a").iterdir()
    for compute in ("masked", "sparse"):
        copy = shutil.copytree(run_dir, tmp_path / compute)
        saved = vars(run_folder.resumed_args(script.Args, str(copy), script.SCRIPT)) | {"compute": compute}
        state_of(lambda saved=saved: script.train(script.Args(**saved)), compute)
    masked, sparse = seen["masked"], seen["sparse"]
    assert {name: m for name, m in masked.items() if name != "args"}.keys() >= {"actor", "qf1_target", "masks", "adam"}

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    assert same(masked | {"args": 0}, sparse | {"args": 0})
    assert any(moments["exp_avg"].any() for moments in sparse["adam"]["qf1"].values())


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_i1_i2_hold_in_the_kernels(run, script, monkeypatch, method):
    """At every rewiring and at the end: K connections in each network, and nothing outside the mask anywhere."""
    seen, log_rewiring = [], run_folder.log_rewiring

    def spy(writer, run_dir, step, first, previous, masks):
        frame = inspect.currentframe().f_back.f_locals
        for name, module in frame["modules"].items():
            for layer, mask in masks.get(name.removesuffix("_target"), {}).items():
                assert module.sparse.masks[layer].equal(mask) and module.sparse.masks[layer] is not mask
                assert not module.state_dict()[f"{layer}.weight"][~mask].any()
        for name, layers in masks.items():
            assert sum(int(m.sum()) for m in layers.values()) == frame["budgets"][name][0]
            grown = [mask & ~previous[name][layer] for layer, mask in layers.items()]
            weights = [frame["modules"][name].state_dict()[f"{layer}.weight"] for layer in layers]
            assert any(g.any() for g in grown) and not any(w[g].any() for w, g in zip(weights, grown, strict=True))
        seen.append(step)
        return log_rewiring(writer, run_dir, step, first, previous, masks)

    monkeypatch.setattr(run_folder, "log_rewiring", spy)
    final = load(run(method=method, compute="sparse", **REWIRING))
    assert seen == [80, 120]
    for name, layers in final["masks"].items():
        assert all(not final[name][f"{layer}.weight"][~mask].any() for layer, mask in layers.items())


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_set_and_rigl_train_as_static_does_until_they_rewire(run, monkeypatch, tmp_path, method):
    def stop(*_):
        raise InterruptedError

    monkeypatch.setattr(run_folder, "log_rewiring", stop)  # at step 80, after the only checkpoint
    with pytest.raises(InterruptedError):
        run(method=method, rewire_every=80, checkpoint_frequency=79, runs_dir=str(tmp_path / "rewired"))
    (path,) = tmp_path.glob("rewired/*/checkpoint.pt")
    static, other = load(run(method="static", total_timesteps=79)), torch.load(path)
    assert all(torch.equal(other["masks"][n][k], m) for n, ls in static["masks"].items() for k, m in ls.items())
    assert same_weights(static, other)


@pytest.mark.parametrize("compute", ["masked", "sparse"])
def test_each_network_may_have_an_arm_and_a_sparsity_of_its_own(run, capsys, compute):
    flags = {"actor_method": "static", "critic_method": "rigl", "actor_sparsity": 0.9, "compute": compute}
    flags |= {"total_timesteps": 300, "rewire_stop": 0.5}
    run_dir = run(method="tar", **REWIRING | flags)
    assert "__static+rigl__random-er__s0.9+0.8__" in run_dir.name
    console = capsys.readouterr().out
    assert f"compute: actor, qf1, qf2 {compute}, since" in console
    topology, final = json.loads((run_dir / "topology.json").read_text()), load(run_dir)
    log = events(run_dir)
    for name, sparsity in (("actor", 0.9), ("qf1", 0.8), ("qf2", 0.8)):
        layers, rows = final["masks"][name], topology[name]["layers"]
        size = sum(m.numel() for m in layers.values())
        assert sum(int(m.sum()) for m in layers.values()) == topology[name]["budget"] == round((1 - sparsity) * size)
        if name == "actor":
            assert all("last_rewiring" not in row for row in rows.values())
            assert not [tag for tag in log.Tags()["scalars"] if tag.startswith("sparsity/actor_")]
            continue
        distance = [(e.step, e.value) for e in log.Scalars(f"sparsity/{name}_distance")]
        rewired = [e.value for e in log.Scalars(f"sparsity/{name}_rewired")]
        assert [row["last_rewiring"]["step"] for row in rows.values()] == [120] * 3
        for layer_name, row in rows.items():
            last, mask = row["last_rewiring"], layers[layer_name]
            assert last["active"] == row["active"] == int(mask.sum())
            assert last["blind_inputs"] == int((~mask.any(0)).sum())
            assert last["dead_units"] == int((~mask.any(1)).sum())
        replaced = sum(row["last_rewiring"]["replaced"] for row in rows.values())
        assert replaced > 0 and rewired[0] > rewired[1] > 0
        assert rewired[1] == pytest.approx(replaced / topology[name]["budget"])
        assert [step for step, _ in distance] == [80, 120]
        assert distance[0][1] == rewired[0] and distance[1][1] >= distance[0][1] > 0.1


@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 30), st.integers(1, 3), st.floats(0, 0.999))
def test_tiny_is_the_widest_dense_network_within_the_budget_however_deep(n_in, hidden, n_out, depth, sparsity):
    def network(neurons):
        ends = [n_in, *[neurons] * depth, n_out]
        return nn.Sequential(*(nn.Linear(*pair, device="meta") for pair in itertools.pairwise(ends)))

    def weights(neurons):
        return n_in * neurons + (depth - 1) * neurons**2 + neurons * n_out

    budget = round((1 - sparsity) * weights(hidden))
    if budget < weights(1):
        with pytest.raises(ValueError, match="no connections for even one hidden neuron"):
            su.hidden_neurons(network, hidden, "tiny", sparsity)
        return
    width = su.hidden_neurons(network, hidden, "tiny", sparsity)
    assert weights(width) <= budget < weights(width + 1)


def test_counting_for_tiny_does_not_shift_random_numbers():
    before = torch.get_rng_state()
    assert su.hidden_neurons(lambda neurons: nn.Linear(3, neurons), 8, "tiny", 0.5) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_runs_dense_within_the_budget(run):
    final, static = load(run(method="tiny", sparsity=0.8)), load(run(method="static", sparsity=0.8))
    for name, layers in final["masks"].items():
        budget = sum(int(m.sum()) for m in static["masks"][name].values())
        assert all(m.all() for m in layers.values())
        assert 0.8 * budget < sum(m.numel() for m in layers.values()) <= budget


# floating-point operations


@pytest.mark.parametrize("method", ["tar", "dense", "set", "rigl"])
def test_flops_are_those_of_the_textbook_count(run, script, method):
    """Pendulum: 60 random steps, then 150 steps that act, of which 149 learn; rewirings at 80 and 120."""
    log = events(run(method=method, **REWIRING | {"total_timesteps": 210, "rewire_stop": 150 / 210}))
    head = 2 if script is sac_tar else 1
    size = {"actor": 24 * (3 + 24 + head), "qf": 24 * (4 + 24 + 1)}
    active = {name: n if method == "dense" else round(0.2 * n) for name, n in size.items()}
    assert [e.value for e in log.Scalars("flops/inference")][-1] == 2 * active["actor"]
    actor, critics = 2 * active["actor"], 2 * 2 * active["qf"]
    total = 150 * actor + 149 * 32 * (actor + critics + 3 * critics)
    if script is td3_tar:
        total += 74 * 32 * (3 * actor + critics)  # every second step, one critic
    else:
        total += 2 * 74 * 32 * (3 * actor + 2 * critics)
    if method == "rigl":
        for name, networks in (("actor", 1), ("qf", 2)):
            total += 2 * 32 * networks * (4 * active[name] + 2 * size[name])
    assert log.Scalars("flops/training")[0].value == 0
    assert log.Scalars("flops/training")[-1].value == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(
    "method, criterion, given", [("set", "magnitude", False), ("set", "snip", True), ("rigl", "random", True)]
)
def test_a_gradient_is_given_to_the_rules_that_say_they_read_it_and_to_no_others(
    run, script, monkeypatch, method, criterion, given
):
    seen, losses, drop, critic_losses = [], [], su.drop, script.critic_losses
    monkeypatch.setattr(script, "critic_losses", lambda *a: losses.append(0) or critic_losses(*a))

    def spy_drop(of, *rest):
        seen.append((of.gradient is not None, of.done))
        return drop(of, *rest)

    monkeypatch.setattr(su, "drop", spy_drop)
    run(method=method, drop_criterion=criterion, **REWIRING)
    assert seen == [(given, done) for done in (0.5, 1.0) for _ in range(9)]  # three networks of three layers
    assert len(losses) == 139 + 2 * given  # nor is a loss computed for nothing


def test_flops_of_a_rewiring():
    assert su.rewiring_flops(10, 100, "rigl", "magnitude") == 2 * 10 + 2 * 10 + 2 * 100
    assert su.rewiring_flops(10, 100, "set", "snip") == 60
    assert su.rewiring_flops(10, 100, "set", "random") == 0
