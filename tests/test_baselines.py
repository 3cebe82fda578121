"""What other papers do to a sparse agent: by hand, against slow computations, and in whole runs of both scripts."""
# ruff: noqa: F401, F811 (fixtures of test_masks.py)

import copy
import itertools
import json
import math
import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_masks import copied, counts, flops_of, generator, inside, mlp, row, sizes, stored, train, watch
from test_run import events, refused, scalars

import lab.run
import sparse_utils as su
import td3_tar
from lab import baselines, kernels
from lab.replay import ReplayBuffer

SEED = st.integers(0, 10**6)


def random_mask(seed, shape, density):
    return torch.rand(shape, generator=generator(seed)) < density


def layer(mask, weight=None, done=0.5, seed=0):
    weight = torch.zeros(mask.shape) if weight is None else weight
    return baselines.Layer(weight, None, mask, generator(seed), done)


def missing(masks, others):
    """How many connections of masks the other ones do not have."""
    return sum(int((mask & ~others[name]).sum()) for name, mask in masks.items())


def rules_of(method, drop="magnitude", regrow=True, distribution="er"):
    growth = baselines.GROWTHS[method] if isinstance(method, str) else su.Rule(method, by_topology=True)
    return baselines.Rules(growth, baselines.DROPS[drop], regrow, distribution, generator())


# WHAT IS DROPPED AND WHAT GROWS


def published_rule(w, g, mask, count, drop, regrow):
    """RigL (Evci et al. 2020, algorithm 1) for the weights and gradients of one layer, with the drop criteria of Nowak
    et al. 2023 but the random ones: the indices of the active ones afterwards."""
    signs, rank = [[i for i in np.nonzero(mask)[0] if (w[i] >= 0) == sign] for sign in (True, False)], {}
    for of_one in signs:
        rank |= {i: (n + 1) / len(of_one) for n, i in enumerate(sorted(of_one, key=lambda i: abs(w[i])))}
    w, g = abs(w), abs(g)
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = {"magnitude": w, "mest": w + g, "snip": w * g}
        worth |= {"sensitivity": np.nan_to_num(g / w), "reciprocal_sensitivity": np.nan_to_num(w / g)}
    worth |= {"set": np.array([rank.get(i, 0) for i in range(len(w))])}
    active, count = np.nonzero(mask)[0], count if regrow else min(count, int((~mask).sum()))
    kept = active[np.argsort(worth[drop][active], kind="stable")[count:]]
    candidates = np.setdiff1d(np.arange(len(w)), kept if regrow else active)
    return {*kept, *candidates[np.argsort(-g[candidates], kind="stable")[:count]]}


@settings(max_examples=40)
@given(SEED, st.sampled_from([*baselines.DROPS][:6]), st.booleans(), st.sampled_from([None, 6]), st.floats(0, 1))
def test_a_rewiring_of_rigl_is_the_published_rule(seed, drop, regrow, width, fraction):
    """In masks, by the dense gradient; in weights, target and moments what stays keeps all and the rest is zero."""
    network, x = mlp(4, 9, 9, 2, seed=seed), torch.randn(20, 4)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    net = su.Net(network, copy.deepcopy(network), optimizer, "rigl", 0.7, width=width)
    su.plan(net, 0, width)
    net.masks, x[:, 0] = su.static_prune(net, net.budget, "random", "er", generator(seed)), 0
    su.fix_masks({"net": net})
    network[0].weight.data[::2, 0] = 0  # with a gradient of zero: sensitivities are 0 / 0
    for _ in range(2):
        optimizer.zero_grad()
        (network(x) - 1).square().mean().backward()
        optimizer.step()
    dense = torch.autograd.grad((network(x) - 1).square().mean(), list(net.weights.values()))
    gradients = su.active_part(dict(zip(net.weights, dense, strict=True)), width)
    old, weights = copied(net.masks), copied(su.active_part(net.weights, width))
    before = {name: [t.detach().clone() for t in stored(net, name)] for name in old}
    loss = (network(x) - 1).square().mean()
    baselines.rewire(net, rules_of("rigl", drop, regrow), loss, [], fraction, 0.5)
    assert counts(net.masks) == counts(old) and net.active == net.budget and same(net.masks, inside(net.masks, width))
    for name, mask in su.active_part(old, width).items():
        tensors = (t.detach().numpy().flatten() for t in (weights[name], gradients[name], mask))
        expected = published_rule(*tensors, int(fraction * int(mask.sum())), drop, regrow)
        assert {*su.active_part(net.masks, width)[name].flatten().nonzero().flatten().tolist()} == expected
        for a, b in zip(stored(net, name), before[name], strict=True):
            assert torch.equal(a, b * (old[name] & net.masks[name]))


def path_by_path(mask):
    """CH2-L3n from its definition, on lists: the neurons on paths output - input - output - input of connections."""
    outputs, inputs = range(len(mask)), range(len(mask[0]))
    scores = torch.zeros(len(mask), len(mask[0]))
    near = {("in", i): {("out", o) for o in outputs if mask[o][i]} for i in inputs}
    near |= {("out", o): {("in", i) for i in inputs if mask[o][i]} for o in outputs}
    for u, v in itertools.product(outputs, inputs):
        paths = [(i, o) for i in inputs for o in outputs if mask[u][i] and mask[o][i] and mask[o][v] and not mask[u][v]]
        community = {("in", i) for i, _ in paths} | {("out", o) for _, o in paths}
        for one in community:
            leaving = near[one] - community - {("out", u), ("in", v)}
            scores[u, v] += (1 + len(near[one] & community)) / (1 + len(leaving))
    return scores


@settings(max_examples=50)
@given(SEED, st.integers(1, 7), st.integers(1, 7), st.floats(0, 1))
def test_cannistraci_hebb_scores_are_those_of_the_paths_of_length_three(seed, n_out, n_in, density):
    mask = random_mask(seed, (n_out, n_in), density)
    torch.testing.assert_close(baselines.ch_scores(mask).float(), path_by_path(mask.tolist()))


def test_cht_and_tar_ch_take_the_highest_scores():
    mask = random_mask(5, (12, 9), 0.3)
    net = row({"fc": mask.float()}, "tar_ch", reserve=15, static={"fc": mask})
    scores = path_by_path(mask.tolist())
    grown = su.highest(baselines.GROWTHS["cht"].scores(layer(mask)), 15, ~mask)
    state = torch.get_rng_state()
    revived = su.revive(net, su.revival_counts(net), generator())["fc"] & ~mask
    assert torch.equal(state, torch.get_rng_state())  # ties are drawn from the generator of the masks
    for added in (grown, revived):
        assert int(added.sum()) == 15 and scores[added].min() >= scores[~mask & ~added].max() - 1e-6
    two = {"fc": mask, "out": torch.zeros(1, 12).bool()}
    assert baselines.tar_ch_budgets(two, 15) == su.tar_budgets(two, 15) != su.uniform_budgets(two, 15)


def test_a_rule_may_revive_the_largest_of_the_pruned_weights(monkeypatch):
    mask, weights = random_mask(5, (12, 9), 0.3), torch.randn(12, 9, generator=generator())
    monkeypatch.setitem(su.PLACES, "tar", lambda weight, mask, generator: weight.abs())
    net = row({"fc": weights}, "tar", reserve=15, static={"fc": mask})
    added, size = su.revive(net, [15], generator())["fc"] & ~mask, weights.abs()
    assert int(added.sum()) == 15 and size[added].min() >= size[~mask & ~added].max()


def test_chance_has_the_odds_that_are_published():
    """Within five standard deviations of 2000 draws."""

    def often(rule, count, among, **of):
        """How often each connection is among the highest; `mask` is what the rule sees."""
        drawn = (rule(layer(**{"mask": among} | of, seed=seed)) for seed in range(2000))
        found = sum(su.highest(scores, count, among).float() for scores in drawn) / 2000
        return pytest.approx(found.flatten().tolist(), abs=0.056)

    mask, all_of_five = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 0, 0]]).bool(), torch.ones(1, 5).bool()
    scores, odds, three = path_by_path(mask.tolist()), torch.tensor([1.0, 0.0, 3.0, 6.0, 0.0]), all_of_five[:, :3]
    assert often(baselines.GROWTHS["set"].scores, 2, ~mask) == (~mask * 2 / 7).flatten().tolist()
    assert often(baselines.DROPS["random"].scores, 2, mask) == (mask * 2 / 5).flatten().tolist()
    assert often(baselines.GROWTHS["chts"].scores, 1, ~mask, mask=mask) == (scores / scores.sum()).flatten().tolist()
    assert often(baselines.cht_growth, 1, all_of_five, mask=~all_of_five) == [0.2] * 5  # all scores tie
    assert often(lambda of: baselines.sample(odds.view(1, 5), of), 1, all_of_five) == [0.1, 0, 0.3, 0.6, 0]
    assert often(lambda of: baselines.sample(odds.view(1, 5), of), 4, all_of_five) == [1, 0.5, 1, 1, 0.5]
    soft = baselines.DROPS[baselines.GROWTHS["chts"].drop].scores
    for done, temperature in ((0.0, 1), (0.5, 2), (1.0, 3)):
        found = often(soft, 1, three, weight=torch.tensor([[-2.0, 1.0, 0.0]]), done=done)
        assert found == [2**temperature / (2**temperature + 1), 1 / (2**temperature + 1), 0]


# CHAINS AND THE EARLY STOP OF CHT


def one_by_one(masks, stopped):
    """Takes away connections of one dead hidden neuron at a time until there is none."""
    masks, again = copied(masks), True
    while again:
        again = False
        for a, b in zip(masks, list(masks)[1:]):
            for neuron in range(masks[a].shape[0]):
                into, out_of = masks[a][neuron], masks[b][:, neuron]
                if into.any() and not out_of.any() and a not in stopped:
                    into[:], again = False, True
                if out_of.any() and not into.any() and b not in stopped:
                    out_of[:], again = False, True
    return masks


@given(SEED, st.lists(st.integers(1, 8), min_size=3, max_size=6), st.floats(0, 0.5), st.sets(st.integers(0, 1)))
def test_chain_removal_takes_all_that_leads_nowhere_and_nothing_else(seed, neurons, density, stopped):
    masks = {i: random_mask(seed + i, shape, density) for i, shape in enumerate(zip(neurons[1:], neurons))}
    expected = one_by_one(masks, stopped)
    baselines.remove_chains(masks, stopped)
    assert same(masks, expected)


@pytest.mark.parametrize("method", ["cht", "chts"])
def test_a_layer_that_stays_full_takes_no_chains_with_it(method):
    """As the last one of a critic, without which a hidden neuron is dead. The other one replaces half, and no more."""
    masks = {"fc1": random_mask(0, (40, 20), 0.5), "fc2": torch.ones(1, 40).bool()}
    before, of = copied(masks), {name: int(mask.sum()) for name, mask in masks.items()}
    weights = {name: torch.rand(mask.shape, generator=generator(1)) for name, mask in masks.items()}
    baselines.rewire_layers({n: layer(masks[n], weights[n]) for n in masks}, of, [], 0.5, rules_of(method))
    assert masks["fc2"].all() and int(masks["fc1"].sum()) == of["fc1"]
    assert 0 < int((before["fc1"] & ~masks["fc1"]).sum()) <= of["fc1"] // 2 and masks["fc1"].any(1).all()


@pytest.mark.parametrize("method", ["cht", "chts"])
def test_a_rewiring_of_cht_takes_what_leads_nowhere_in_any_layer(method):
    """A neuron that no later layer reads gives its connections to the others, though none is dropped for its weight."""
    masks = {"fc1": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()}
    masks["fc2"] = torch.tensor([[True, True, False]])
    net = row({name: mask.float() for name, mask in masks.items()}, method, budget=8, masks=masks)
    baselines.rewire(net, rules_of(method), None, [], 0.0, 0.5)
    assert net.masks["fc1"].tolist() == [[True, True, True, False], [True, True, True, False], [False] * 4]


@pytest.mark.parametrize("active, back, settled", [(20, 9, False), (20, 10, True), (66, 33, True), (68, 34, False)])
def test_a_layer_stops_when_more_than_nine_tenths_grow_back_although_there_is_room_elsewhere(active, back, settled):
    """Of 100 places; half of the active ones is dropped, the first ones. A layer that has stopped is left as it is."""
    index, grows, stopped = torch.arange(100).view(10, 10), torch.zeros(100), []
    mask, of = index < active, {"fc": active}
    grows[:back], grows[active : active + active // 2 - back] = 2, 1
    rules = rules_of(lambda _: grows.view(10, 10))
    baselines.rewire_layers({"fc": layer(mask, index + 1.0)}, of, stopped, 0.5, rules)
    assert stopped == ["fc"] * settled and int(mask.flatten()[: active // 2].sum()) == back
    before, grows[:] = mask.clone(), torch.arange(100)
    baselines.rewire_layers({"fc": layer(mask, index + 1.0)}, of, stopped, 0.5, rules)
    assert torch.equal(mask, before) == settled and int(mask.sum()) == active


# REWIRING IN RUNS

REWIRINGS = [
    ({"method": "set", "rewire_stop": 0.7, "drop_criterion": "mest"}, [80]),  # not at the step where it stops
    ({"method": "rigl", "regrow": False, "prune_at": 80, "drop_criterion": "mest"}, [120]),  # nor at that of pruning
    ({"method": "cht", "prune_at": 20}, [80, 120]),  # learning comes first
    ({"method": "chts", "active_width": 14, "compute": "sparse"}, [80, 120]),
    ({"method": "static", "critic_method": "rigl", "critic_sparsity": 0.7, "compute": "sparse"}, [80, 120]),
]


@pytest.mark.parametrize("flags, steps", REWIRINGS, ids=[str(flags) for flags, _ in REWIRINGS])
def test_counts_steps_and_fractions_of_rewirings_in_a_run(train, script, watch, flags, steps):
    flags = {"sparsity": 0.8, "rewire_every": 40, "rewire_fraction": 0.8, "rewire_stop": 0.9} | flags
    order, done, method = [], [], flags.get("critic_method", flags["method"])
    watch(baselines, lambda *_: (yield order.append("rewire")), "rewire")
    watch(baselines, lambda layers, *_: (yield done.extend(of.done for of in layers.values())), "rewire_layers")
    watch(lab.run, lambda *_: (yield order.append("play")), "play")
    seen = train(total_timesteps=171, eval_frequency=40, policy_frequency=1, **flags)
    rewired = [name for name, net in seen.nets.items() if net.method == method]
    assert list(seen.rewirings) == steps and seen.kernels == {flags.get("compute") == "sparse"}
    assert sorted({*done}) == [(i + 1) / len(steps) for i in range(len(steps))]
    report = json.loads((seen.folder / "topology.json").read_text())
    for step, rewiring in seen.rewirings.items():
        fraction = 0.4 * (1 + math.cos(math.pi * step / (171 * flags["rewire_stop"])))
        for name, masks in rewiring.masks.items():
            assert counts(masks) == counts(rewiring.before[name]) and same(masks, inside(masks, seen.nets[name].width))
            new = {key: int((mask & ~rewiring.before[name][key]).sum()) for key, mask in masks.items()}
            assert any(new.values()) == (name in rewired)
            for key, mask in masks.items() if name in rewired else ():
                count = int(fraction * int(mask.sum()))
                assert new[key] <= count or method in ("cht", "chts")  # which move chains too
                assert flags.get("regrow", True) or new[key] == min(count, int((~mask).sum()))
                part = su.active_part(masks, seen.nets[name].width)[key]
                last = {"step": step, "replaced": new[key], "active": int(mask.sum())}
                last |= {"blind_inputs": int((~part.any(0)).sum()), "dead_units": int((~part.any(1)).sum())}
                assert step != steps[-1] or report[name]["layers"][key]["last_rewiring"] == last
    assert all(same(seen.masks[name], net.masks) for name, net in seen.nets.items())  # no change after the stop
    logged, (pruned_at,), (pruning,) = scalars(seen.folder), seen.prunings, seen.prunings.values()
    for name, net in seen.nets.items():
        new = [missing(now.masks[name], now.before[name]) / net.budget for now in seen.rewirings.values()]
        lost = [missing(pruning.masks[name], now.masks[name]) / net.budget for now in seen.rewirings.values()]
        for tag, values in (("rewired", new), ("distance", lost)) if name in rewired else ():
            assert logged[f"sparsity/{name}_{tag}"] == [(step, pytest.approx(n)) for step, n in zip(steps, values)]
        pictures = [picture.step for picture in events(seen.folder).Images(f"topology/{name}.fc1")]
        assert pictures == [pruned_at, *steps[-1:] * (name in rewired)]
    own = {"rigl": lambda active, size: 4 * active + 2 * size, "set": lambda active, size: 6 * active}
    own = own.get(method, lambda active, size: 0)
    assert len(rewired) < 3 or seen.state["progress"]["training_flops"] == flops_of(script, seen, 1, own)
    # an evaluation at a step of a rewiring comes before it
    both = [["play"] + ["rewire"] * len(rewired) * (step in steps) for step in (0, 40, 80, 120, 160, 171)]
    assert order == [*itertools.chain(*both)]


def test_layers_that_have_stopped_are_rewired_no_more(train, monkeypatch):
    monkeypatch.setattr(baselines, "EARLY_STOP", -1.0)
    seen = train(method="cht", rewire_every=20, sparsity=0.95)
    assert list(seen.rewirings) == [80]
    assert seen.state["schedule"].stopped == {name: ["fc1", "fc2", "fc3"] for name in ("actor", "qf1", "qf2")}


# A DENSITY THAT FALLS


def published_density(start, end, t, last):
    """As the authors of CHTss write it: t counts prunings, the slope is 6 by the middle."""
    now, last_one, first_one = (1 / (1 + math.exp(-x)) for x in (6 / (last / 2) * (t - last / 2), 6, -6))
    return start + (end - start) * ((now - 0.5) / (last_one - first_one) + 0.5)


def test_the_last_rewiring_is_before_the_step_where_it_stops():
    args = {"learning_starts": 60, "prune_at": 60, "total_timesteps": 100_000, "rewire_every": 1000}
    for stop, last in ((0.55, 54_000), (0.8, 79_000), (0.5501, 55_000)):  # 0.55 * 100_000 is a little above 55_000
        assert baselines.rewiring_steps(SimpleNamespace(rewire_stop=stop, **args))[-1] == last


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 400))
def test_the_density_follows_the_published_sigmoid_and_ends_exactly(start, end, last):
    values = [baselines.decayed(start, end, t / last) for t in range(last + 1)]
    assert (values[0], values[-1]) == (start, end) and values == sorted(values, reverse=start > end)
    assert all(abs(v - published_density(start, end, t, last)) < 0.51 for t, v in enumerate(values))


DECAYS = [
    {"method": "rigl", "distribution": "global", "criterion": "magnitude"},
    {"method": "chts", "active_width": 20, "density_start": 0.4, "compute": "sparse"},
    {"method": "dense", "critic_method": "set", "regrow": False, "distribution": "uniform"},
    {"method": "set", "critic_sparsity": 0.0},  # a network that keeps all has no density to fall
]


@pytest.mark.parametrize("flags", DECAYS, ids=str)
def test_the_count_is_that_of_the_schedule_at_every_rewiring_and_k_at_the_last(train, script, watch, flags):
    flags, used = {"density_start": 0.5, "sparsity": 0.85, "rewire_every": 20, "rewire_stop": 0.9} | flags, set()
    watch(baselines, lambda net, rules, *_: (yield used.add(rules.distribution)), "rewire")
    seen = train(total_timesteps=165, **flags)
    assert list(seen.rewirings) == [80, 100, 120, 140] and used == {flags.get("distribution", "er")}
    for name in (name for name, net in seen.nets.items() if net.budget < net.size):
        size = seen.nets[name].size
        start, end = round(flags["density_start"] * size), round(0.15 * size)
        assert sum(counts(seen.prunings[60].masks[name])) == start and sum(counts(seen.masks[name])) == end
        logged = scalars(seen.folder)[f"sparsity/density_{name}.fc1"]
        for i, (step, rewiring) in enumerate(seen.rewirings.items(), 1):
            after, before = counts(rewiring.masks[name]), counts(rewiring.before[name])
            assert logged[i] == (step, pytest.approx(after[0] / rewiring.masks[name]["fc1"].numel()))
            assert sum(after) == round(published_density(start, end, i, 4))
            assert all(a <= b for a, b in zip(after, before, strict=True))
    if flags["method"] == "rigl":
        rewiring = flops_of(script, seen, 2, lambda active, size: 4 * active + 2 * size)
        assert seen.state["progress"]["training_flops"] == rewiring


def test_a_layer_keeps_what_magnitude_and_the_distribution_give_it():
    """Ranked together, the layer of small weights loses more; a distribution that gives too much is refused."""
    net = row({"fc1": torch.arange(1.0, 13).view(3, 4), "fc2": torch.arange(7.5, 10).view(1, 3)}, "set")
    net.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in net.weights.items()}
    for net.budget, left in ((12, [9, 3]), (9, [6, 3]), (6, [4, 2]), (5, [4, 1])):
        baselines.rewire(net, rules_of("set", distribution="global"), None, [], 0.0, 0.5)
        assert counts(net.masks) == left and net.active == net.budget
    with pytest.raises(ValueError, match="needs a loss of each network, and own_losses"):
        baselines.rewire(net, rules_of("rigl"), None, [], 0.5, 0.5)
    net.budget = 3
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="distribution er gives "):
        patch.setitem(su.DISTRIBUTIONS, "er", lambda scores, keep: [0, keep])
        baselines.rewire(net, rules_of("set"), None, [], 0.0, 0.5)


SCULPTS = [
    {"method": "tar", "reserve": 0.2, "distribution": "global", "lr_cycles": 2},
    {"method": "tar_ch", "critic_method": "uniform", "active_width": 20, "init": "sparse", "compute": "sparse"},
]


@pytest.mark.parametrize("flags", SCULPTS, ids=str)
def test_sculpt_prunes_twice_by_magnitude_and_revives_at_the_second_time(train, flags):
    seen = train(density_start=0.6, final_prune_at=100, sparsity=0.85, **flags)
    assert list(seen.prunings) == [60, 100] and not seen.rewirings
    for name, first in seen.prunings[60].masks.items():
        last, static = seen.prunings[100].masks[name], seen.prunings[100].static[name]
        k = round(0.15 * sum(sizes(first)))
        reserve = round(flags.get("reserve", 0.1) * k)
        assert sum(counts(first)) == round(0.6 * sum(sizes(first))) and same(first, seen.prunings[60].static[name])
        assert sum(counts(last)) == k and sum(counts(static)) == k - reserve and same(seen.nets[name].masks, last)
        assert not any((mask & ~first[key]).any() or (mask & ~last[key]).any() for key, mask in static.items())
        weights = {key: seen.prunings[100].before[name][f"{key}.weight"].abs() for key in first}
        groups = [first] if flags.get("distribution") == "global" else [{key: first[key]} for key in first]
        for group in groups:
            kept = torch.cat([weights[key][static[key]] for key in group])
            gone = torch.cat([weights[key][first[key] & ~static[key]] for key in group])
            assert not len(gone) or not len(kept) or kept.min() >= gone.max()
        for key, mask in last.items():  # trained weights are not scaled
            after = seen.prunings[100].after[name][f"{key}.weight"]
            assert torch.equal(after, seen.prunings[100].before[name][f"{key}.weight"] * mask)


# CYCLES OF THE LEARNING RATE


@given(st.integers(0, 100), st.integers(1, 120), st.data())
def test_the_rate_rises_for_a_fifth_of_each_cycle_and_falls_to_zero(start, steps, data):
    cycles, end = data.draw(st.integers(1, steps)), start + steps
    exact = [start + Fraction(steps * k, cycles) for k in range(cycles + 1)]
    starts = [math.ceil(point) for point in exact[:-1]]
    for step in range(start, end):
        k = max(k for k in range(cycles) if starts[k] <= step)
        done = float((step - exact[k]) / (exact[k + 1] - exact[k]))
        expected = np.interp(done, [0, 0.2, 1], [0.2, 1, 0])
        assert baselines.lr_factor(step, start, end, cycles) == pytest.approx(expected, abs=1e-12)


CYCLED = [{"method": "dense"}, {"method": "rigl", "rewire_every": 5, "compute": "sparse"}]


@pytest.mark.parametrize("flags", CYCLED, ids=str)
def test_all_rates_follow_the_cycles_and_adam_starts_anew_in_each(train, watch, script, flags):
    """Of steps 60 to 159; a cycle lasts 12.5. Each optimizer has its own rate, which cycles."""
    seen, rates = {}, {"learning_rate": 5e-4} if script is td3_tar else {"policy_lr": 5e-4, "q_lr": 2e-3}

    def step(optimizer):
        yield
        state = {int(own["step"]) for own in optimizer.state.values() if own}
        seen.setdefault(id(optimizer), []).append(([group["lr"] for group in optimizer.param_groups], state))

    watch(kernels.Adam, step)
    made = train(total_timesteps=160, lr_cycles=8, policy_frequency=1, **rates, **flags)
    nets, logged, factor = made.nets, scalars(made.folder), baselines.lr_factor(100, 60, 160, 8)
    for tag, rate in zip(("charts/actor_lr", "charts/critic_lr"), [*rates.values()] * 2):
        assert logged[tag] == [(100, pytest.approx(factor * rate))]
    assert len(seen) == 2 + (script is not td3_tar)  # alpha's, with the rate of the critics
    first, *_, last = [*rates.values()] * 2
    for optimizer, steps in seen.items():
        base = first if optimizer == id(nets["actor"].optimizer) else last
        for now, (found, updates) in zip(range(61, 160), steps, strict=True):
            assert found == [baselines.lr_factor(now, 60, 160, 8) * base]
            assert updates == {now - max(start for start in (60, 72, 84, 97, 109, 122, 134, 147) if start < now)}


# DYNADIAG


def learner():
    """A network with a target whose diagonals are learned, as it is at first, and a copy as it was drawn. The budget
    leaves its last layer whole."""
    network = mlp(7, 20, 20, 1)
    drawn, target = copy.deepcopy(network), copy.deepcopy(network)
    optimizer = kernels.Adam([{"params": network.parameters(), "lr": 0.01}, {"params": [torch.zeros(1)], "lr": 0.1}])
    net = su.Net(network, target, optimizer, "static", 0.8)
    su.plan(net, 0)
    return net, drawn, baselines.Diagonals(net, "er")


def test_values_and_gates_are_learned_as_if_both_were_the_networks_parameters():
    """Against plain autograd and one torch Adam of V, biases and alpha. T falls from 5 to 0.05; the loss falls too. At
    first the gates of a layer are equal, and sum to its budget; the target's network has them too."""
    net, drawn, learned = learner()
    assert same(net.target.state_dict(), net.network.state_dict())
    del net.target[-1]  # as of one that reads features alone
    net.target[0].weight.data.zero_()
    baselines.Diagonals(net, "er")
    assert (net.target[0].weight == net.network[0].weight).all() and net.target[0].weight.any()
    net, drawn, learned = learner()
    own = {name: param.detach().clone().requires_grad_() for name, param in drawn.named_parameters()}
    gated = list(net.weights.items())[:-1]
    alphas = {name: torch.full((max(w.shape),), 1 / max(w.shape), requires_grad=True) for name, w in gated}
    optimizer = torch.optim.Adam([*own.values(), *alphas.values()], lr=0.01)
    budgets = dict(zip(net.weights, su.er_budgets(net.weights, net.budget), strict=True))
    x, y, losses = torch.randn(64, 7), torch.randn(64, 1), []

    def products(temperature):
        found = dict(own)
        for name, alpha in alphas.items():
            n_out, n_in = own[f"{name}.weight"].shape
            k = max(1, budgets[name] / min(n_out, n_in))
            gates = (k * torch.softmax(alpha / temperature, 0)).clamp(0, 1)
            of = torch.tensor([[(c - r) % len(gates) for c in range(n_in)] for r in range(n_out)])
            found[f"{name}.weight"] = own[f"{name}.weight"] * gates[of]
        return found

    for step in range(150):
        learned.multiply(stage=min(max(step - 20, 0), 100))
        expected = products(0.05 + 4.95 * (1 + math.cos(math.pi * learned.stage / 100)) / 2)
        for name, param in net.network.named_parameters():
            close = {"rtol": 1e-3, "atol": 1e-5} if step else {}  # at first to rounding
            torch.testing.assert_close(param, expected[name], **close)
        loss = (torch.func.functional_call(drawn, expected, x) - y).square().mean()
        for of, its in ((optimizer, loss), (net.optimizer, (net.network(x) - y).square().mean())):
            of.zero_grad()
            its.backward()
            of.step()
        losses.append(loss.item())
    assert losses[20] < losses[0] and losses[-1] < 0.9 * losses[20]
    assert all(alpha.std() > 0.01 for alpha in learned.alphas)


DYNADIAG = {"criterion": "dynadiag", "prune_at": 100}
LEARNED = [
    {"method": "static", "distribution": "uniform", "policy_frequency": 1},
    {"method": "tar", "critic_method": "dense", "reserve": 0.3},
    {"method": "tar", "sparsity": 0.8, "compute": "sparse"},
    {"method": "rigl", "rewire_every": 20, "total_timesteps": 170},
    {"method": "tar", "critic_sparsity": 0.0},  # nothing to learn there
]


@pytest.mark.parametrize("flags", LEARNED, ids=str)
def test_dynadiag_keeps_the_diagonals_of_the_highest_gates_and_is_a_base_like_any_other(train, watch, flags):
    """With the values that they have without gates; and then nothing tells that there were any."""
    ended, stages = [], []
    values_of = lambda of: [value.clone() for value in of.values]  # noqa: E731
    watch(baselines.Diagonals, lambda of: (yield ended.append((of.alphas, values_of(of), of.paid))), "end")
    watch(baselines.Diagonals, lambda of, stage: (yield stages.append(stage)), "multiply")
    seen = train(**DYNADIAG | flags)
    final, pruning = torch.load(seen.folder / "final.pt", weights_only=True), seen.prunings[100]
    learned = [name for name, net in seen.nets.items() if net.budget < net.size]
    assert seen.kernels == {flags.get("compute") == "sparse"}
    assert {*stages} == {100 * i // 40 for i in range(40)}  # from learning to pruning
    for name, (alphas, values, paid) in zip(learned, ended, strict=True):
        static, reserve = pruning.static[name], seen.nets[name].reserve
        k = round((1 - flags.get("sparsity", 0.9)) * sum(sizes(static)))
        assert sum(counts(static)) == k - reserve and sum(counts(pruning.masks[name])) == k
        gated = [(layer, mask) for layer, mask in static.items() if not mask.all()]
        assert paid == [max(1, int(mask.sum()) / min(mask.shape)) for _, mask in gated]
        for (layer, mask), alpha, value in zip(gated, alphas, values, strict=True):
            places = baselines.diagonals(mask)
            kept = torch.zeros(max(mask.shape)).index_add_(0, places.flatten(), mask.flatten().float())
            ranked, diagonals = kept[alpha.argsort(descending=True, stable=True)], int(mask.sum()) / min(mask.shape)
            assert ranked[: int(diagonals)].eq(min(mask.shape)).all() and not ranked[math.ceil(diagonals) :].any()
            assert alpha.std() > 0  # it was learned
            trains = pruning.masks[name][layer]
            assert torch.equal(pruning.after[name][f"{layer}.weight"], value * trains)
    for name in (name for name in final if name.startswith(("actor", "qf"))):
        assert all(re.fullmatch(r"fc\d\.(weight|bias)|action_\w+", key) for key in final[name])


# TINY AND SPARSE INITIALIZATION


@given(st.integers(1, 400), st.integers(1, 300), st.integers(1, 30), st.integers(1, 3), st.floats(0, 0.999))
def test_tiny_is_the_widest_dense_network_within_the_budget_however_deep(n_in, hidden, n_out, depth, sparsity):
    def network(_, neurons):
        ends = [n_in, *[neurons] * depth, n_out]
        return nn.Sequential(*(nn.Linear(*pair, device="meta") for pair in itertools.pairwise(ends)))

    def weights(neurons):
        return n_in * neurons + (depth - 1) * neurons**2 + neurons * n_out

    budget = round((1 - sparsity) * weights(hidden))
    if budget < weights(1):
        with pytest.raises(ValueError, match="a network of one hidden neuron has"):
            baselines.hidden_size(network, None, hidden, "tiny", sparsity)
    else:
        width = baselines.hidden_size(network, None, hidden, "tiny", sparsity)
        assert weights(width) <= budget and (width == hidden or budget < weights(width + 1))
    assert baselines.hidden_size(network, None, hidden, "tar", sparsity) == hidden


def test_tiny_runs_dense_within_the_budget(train):
    before = torch.get_rng_state()
    assert baselines.hidden_size(lambda _, neurons: nn.Linear(3, neurons), None, 8, "tiny", 0.5) == 4
    assert torch.equal(torch.get_rng_state(), before)  # although networks are made to be counted
    tiny, static = (train(method=method, sparsity=0.8, init="sparse") for method in ("tiny", "static"))
    for name, masks in tiny.masks.items():
        budget = sum(counts(static.masks[name]))
        assert all(mask.all() for mask in masks.values()) and 0.8 * budget < sum(sizes(masks)) <= budget
    for name, state in static.prunings[60].before.items():  # online networks and targets, scaled alike
        for key, weight in state.items():
            mask = static.masks[name.removesuffix("_target")].get(key.removesuffix(".weight"))
            factor = 1 if mask is None else (mask.shape[1] / mask.sum(1, keepdim=True).clamp(min=1)).sqrt() * mask
            torch.testing.assert_close(static.prunings[60].after[name][key], weight * factor)


# THE REPLAY BUFFER


def transitions(n):
    """Of episodes that last a few steps and then terminate, are truncated, or both. Observations count steps."""
    rng = np.random.default_rng(0)
    for i in range(n):
        yield np.array([i]), np.array([i + 0.5]), np.array([-i]), rng.normal(), *(rng.random(2) < 0.12)


def buffer_of(**flags):
    space = SimpleNamespace(shape=(1,))
    env = SimpleNamespace(observation_space=space, action_space=space)
    rb = ReplayBuffer(SimpleNamespace(**flags), env, torch.device("cpu"))
    rb.rows.fill_(math.nan)  # what was never added shows
    return rb


def slow_target(held, i, n):
    """Reward, next observation and discount of the n-step target of transition i of the list `held`."""
    total, k = 0.0, 0
    while True:
        _, (next_obs,), _, reward, terminated, truncated = held[i + k]
        total, k = total + 0.9**k * reward, k + 1
        if terminated or truncated or k == n or i + k == len(held):
            return total, next_obs, 0.0 if terminated else 0.9**k


@settings(max_examples=60)
@given(st.integers(1, 7), st.sampled_from([1, 5, 39, 40, 41, 63, 200]), st.booleans())
def test_n_step_targets_against_a_slow_computation(n, added, late):
    """In a buffer of 40, before it is full and after it was overrun; and before --n-step-from."""
    rb, held = buffer_of(buffer_size=40, n_step=n, n_step_from=100), [*transitions(added)]
    for transition in held:
        rb.add(*transition)
    held, batch = held[-40:], rb.sample(1000, 0.9, 99 + late)
    drawn = (batch.observations.long() - (added - len(held))).flatten().tolist()
    assert set(drawn) == set(range(len(held))) and torch.equal(batch.actions, -batch.observations)
    expected = torch.tensor([slow_target(held, i, n if late else 1) for i in drawn]).float()
    found = torch.cat([batch.rewards, batch.next_observations, batch.discounts], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_fraction_of_a_batch_is_of_the_newest_transitions():
    rb = buffer_of(buffer_size=1000, recent_fraction=0.25, recent_size=50)
    for transition in transitions(2500):
        rb.add(*transition)
        if rb.added in (20, 700, 1000, 1020, 2500):
            numbers, first = rb.sample(4000, 0.9, 0).observations[:, 0], max(0, rb.added - 1000)
            assert set(numbers[:1000].tolist()) == set(range(max(0, rb.added - 50), rb.added))
            assert len(numbers[1000:].unique()) > 0.9 * (rb.added - first) and numbers.min() >= first


def test_a_run_samples_by_its_flags(train):
    """Targets of one reward until step 99, then of three."""
    seen = train(n_step=3, n_step_from=100, gamma=0.5)
    discounts = {step: set(batch.discounts.flatten().tolist()) for _, step, batch in seen.batches}
    assert [*discounts] == [*range(61, 130)]
    assert all(found == {0.5} if step < 100 else found >= {0.125} for step, found in discounts.items())


# FLAGS

DECAY = {"density_start": 0.5, "sparsity": 0.85, "total_timesteps": 230, "rewire_every": 20}
TWICE = {"density_start": 0.6, "final_prune_at": 120, "sparsity": 0.85, "total_timesteps": 200}
REFUSED = [
    ({"method": "rigl", "rewire_every": 0}, "--rewire-every must be positive"),
    ({"method": "rigl", "rewire_fraction": 1.5}, "--rewire-fraction must be in [0, 1]"),
    ({"method": "rigl", "rewire_stop": -1.0}, "--rewire-stop must be in [0, 1]"),
    ({"method": "rigl", "rewire_every": 20, "rewire_fraction": 0.0}, "rewires nothing; raise it, or use static"),
    ({"n_step": 0}, "--n-step must be positive"),
    ({"n_step": 3, "n_step_from": 160}, "--n-step-from must be at least 0 and below the end of training"),
    ({"recent_fraction": 1.0}, "--recent-fraction must be at least 0 and below 1"),
    ({"recent_fraction": 0.01}, "of --batch-size 32 is no transition; raise one"),
    ({"recent_fraction": 0.5, "recent_size": 160}, "is all that the buffer ever holds; choose a smaller one"),
    ({"recent_fraction": 0.5, "recent_size": 64, "buffer_size": 64}, "--recent-size 64 is all that the buffer ever"),
    ({"lr_cycles": 101}, "--lr-cycles must be from 1 to the 100 steps after --learning-starts, got 101"),
    ({"final_prune_at": 100}, "--final-prune-at is the end of a --density-start; set both or neither"),
    ({"method": "rigl", "density_start": 1.0}, "must be above 0 and below 1, got 1.0"),
    ({"method": "rigl", **DECAY, "density_start": 0.1}, "choose one above the"),
    ({"method": "rigl", **DECAY, "density_start": 0.9, "active_width": 12}, "that its active neurons can have"),
    ({"method": "static", "density_start": 0.5}, "needs --final-prune-at where masks stay, as with --method static"),
    ({"method": "tar", **TWICE, "final_prune_at": 60}, "after --prune-at and --learning-starts, so 60, and before"),
    ({"method": "tar", **TWICE, "prune_at": 20, "final_prune_at": 50}, "--learning-starts, so 60, and before"),
    ({"method": "rigl", **TWICE}, "is for masks that stay"),
    ({"method": "set", "critic_method": "tar", **DECAY}, "that both rewire or whose masks both stay"),
    ({"method": "set", **DECAY, "rewire_stop": 0.2}, "after step 60 and before 46, which is never"),
    ({"method": "set", **DECAY, "sparsity": 0.0}, "--density-start needs a network that is pruned; raise --sparsity"),
    ({"method": "tiny", "critic_method": "set", **DECAY, "critic_sparsity": 0.0}, "needs a network that is pruned"),
    ({"method": "set", **DECAY, "save_buffer": False}, "leave --no-save-buffer out"),
    ({"method": "rigl", "critic_method": "chts", "rewire_every": 20}, "rigl by magnitude and chts by soft; choose one"),
    ({"method": "cht", "regrow": False}, "--method cht stops in a layer where dropped connections grow again"),
    (DYNADIAG | {"prune_at": 60}, "prunes by what it has learned; set --prune-at above 60"),
    (DYNADIAG | {"distribution": "global"}, "for the budgets of layers; choose --distribution er or uniform"),
    (DYNADIAG | {"active_width": 12}, "leave --active-width out"),
    (DYNADIAG | {"lr_cycles": 2}, "leave --lr-cycles out"),
    (DYNADIAG | {"load": __file__}, "leave --load out"),
    (DYNADIAG | TWICE, "leave --density-start out"),
    ({"method": "tar", "init": "sparse", "prune_at": 90}, "--init sparse does not rescale trained weights"),
]


def test_what_makes_no_sense_is_refused_in_a_sentence(run, script, capsys, tmp_path):
    for flags, sentence in REFUSED:
        assert sentence in refused(capsys, run, **flags) and not list(tmp_path.iterdir())
