"""Budgets, static pruning, revival and masked training: by hand, as properties, and in whole runs of both scripts.

`train` and the helpers above it also serve test_baselines.py.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st

import lab.run
import sparse_utils as su
import td3_tar
from lab import baselines, kernels, topology
from lab.replay import ReplayBuffer

SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5)
FRACTION = st.floats(0, 1, exclude_max=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counts(masks):
    return [int(mask.sum()) for mask in masks.values()]


def sizes(masks):
    return [mask.numel() for mask in masks.values()]


def copied(masks):
    return {name: mask.clone() for name, mask in masks.items()}


def row(weights, method="tar", sparsity=0.9, **fields):
    """A row of a network that has these weights and nothing else."""
    network = nn.Module()
    for name, weight in weights.items():
        network.add_module(name, nn.Linear(*reversed(weight.shape), bias=False, device="meta"))
        getattr(network, name).weight = nn.Parameter(weight)
    return su.Net(network, None, None, method, sparsity, **fields)


def mlp(*neurons, seed=0):
    torch.manual_seed(seed)
    layers = [layer for pair in zip(neurons, neurons[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def inside(masks, width):
    """The masks between the first `width` neurons of each hidden layer."""
    (first, *_, last), masks = masks, copied(masks)
    for name, mask in masks.items() if width else ():
        mask[len(mask) if name == last else width :] = False
        mask[:, mask.shape[1] if name == first else width :] = False
    return masks


def is_split(parts, shares, caps):
    """Whether there is a factor such that each part is within one of factor * share, or is its cap and below that."""
    entries = [entry for entry in zip(parts, shares, caps, strict=True) if entry[1] > 0]
    least = max([(part - 1) / share for part, share, _ in entries], default=0)
    most = min([(part + 1) / share for part, share, cap in entries if part < cap], default=math.inf)
    within = all(0 <= part <= cap * (share > 0) for part, share, cap in zip(parts, shares, caps, strict=True))
    return within and least <= most * (1 + 1e-9) + 1e-9


# WHOLE RUNS


def state_of(nets):
    """The parameters of networks and targets, by name."""
    networks = {name: net.network for name, net in nets.items()}
    networks |= {f"{name}_target": net.target for name, net in nets.items() if net.target}
    return {name: copied(network.state_dict()) for name, network in networks.items()}


def masks_of(nets, kind="masks"):
    return {name: copied(getattr(net, kind)) for name, net in nets.items()}


def stored(net, name):
    """A weight, that of the target and Adam's moments, as far as there are any."""
    weight = net.weights[name]
    target = [su.linear_weights(net.target)[name]] if net.target else []
    return [weight, *target, *(m for m in net.optimizer.state.get(weight, {}).values() if m.dim())]


def check_invariants(nets):
    """K connections, and nothing outside the mask, of which kernels hold nothing."""
    for name, net in nets.items():
        assert sum(counts(net.masks)) == net.budget == net.active, name
        for layer in () if hasattr(net.network, "sparse") else net.weights:
            assert not any((tensor * ~net.masks[layer]).any() for tensor in stored(net, layer)), (name, layer)
        for network in (net.network, net.target):
            assert not hasattr(network, "sparse") or same(network.sparse.masks, net.masks), name


@pytest.fixture
def watch(monkeypatch):
    """Let a generator watch each call of a function: before it up to the `yield`, which gives the result, then on."""

    def watch(owner, watcher, name=""):
        name = name or watcher.__name__
        function = getattr(owner, name)

        def watched(*arguments, **options):
            watching = watcher(*arguments, **options)
            next(watching)
            result = function(*arguments, **options)
            with contextlib.suppress(StopIteration):
                watching.send(result)
            return result

        monkeypatch.setattr(owner, name, watched)

    return watch


@pytest.fixture
def train(run, script, watch):
    """Run the script and `check_invariants` after every update. Returns all that there was to see, by step."""
    seen = SimpleNamespace()

    def pruning(*_):
        seen.before, seen.fixed = None, 0
        yield

    def fix_masks(nets):
        seen.before = seen.before or state_of(nets)
        seen.fixed += 1
        yield

    def log_topology(of, step):  # right after the pruning
        assert seen.fixed == 2  # by train, and at the end of in_torch
        seen.masks, static = masks_of(of.nets), masks_of(of.nets, "static")
        with kernels.in_torch(of.nets):
            now = {"before": seen.before, "after": state_of(of.nets), "static": static, "masks": seen.masks}
            check_invariants(of.nets)
        seen.prunings[step] = SimpleNamespace(**now)
        yield

    def step(schedule, step, *_):
        seen.nets, active = schedule.nets, {name: net.active for name, net in schedule.nets.items()}
        yield
        if any(not same(net.masks, seen.masks[name]) for name, net in seen.nets.items() if net.masks):
            now = {"active": active, "before": seen.masks, "masks": masks_of(seen.nets)}
            seen.rewirings[step], seen.masks = SimpleNamespace(**now), now["masks"]
            check_invariants(seen.nets)
        seen.active[step] = {name: net.active for name, net in seen.nets.items()}

    def sample(buffer, batch_size, gamma, step):
        seen.batches.append((batch_size, step, (yield)))

    def polyak_update(*_):
        yield
        if seen.prunings:
            check_invariants(seen.nets)
            seen.checks += 1

    def finish(of):
        vars(seen).update(state=of.state, random=torch.get_rng_state())
        seen.kernels = {hasattr(net.network, "sparse") for net in seen.nets.values()}
        with kernels.in_torch(seen.nets):
            seen.trained = state_of(seen.nets)
        yield

    def train(**flags):
        vars(seen).clear()
        vars(seen).update(prunings={}, rewirings={}, before={}, fixed=0, batches=[], active={}, checks=0)
        seen.folder = run(**{"total_timesteps": 130, "eval_frequency": 1000} | flags)
        assert seen.checks > 10
        return SimpleNamespace(**vars(seen))

    of_run = ((lab.run.Run, log_topology), (lab.run.Run, finish))
    for owner, watcher in ((su, fix_masks), (script, polyak_update), (ReplayBuffer, sample), *of_run):
        watch(owner, watcher)
    for watcher in (pruning, step):
        watch(baselines.Schedule, watcher)
    return train


def flops_of(script, seen, policy_frequency=2, rewiring=lambda active, size: 0):
    """Of training from step 60 on in batches of 32. `rewiring` gives those of a network's gradient, for a sample."""
    total = 0
    for step, active in seen.active.items():
        actor, critic, critics = 2 * active["actor"], 2 * active["qf1"], 2 * (active["qf1"] + active["qf2"])
        update = 3 * actor + 2 * critic if script is td3_tar else policy_frequency * (3 * actor + 2 * critics)
        learns, acts = step > 60, step > 60 and step % policy_frequency == 0
        total += actor * (step >= 60) + 32 * (learns * (actor + 4 * critics) + acts * update)
        rewired = seen.rewirings[step].active if step in seen.rewirings else {}
        total += sum(32 * rewiring(n, seen.nets[name].size) for name, n in rewired.items())
    return total


RUNS = [
    ({"method": "tar", "policy_frequency": 1}, 0.1, 0.1),
    ({"method": "uniform", "criterion": "snip", "distribution": "global", "prune_at": 90, "reserve": 0.3}, 0.1, 0.3),
    ({"method": "static", "criterion": "grasp", "active_width": 10, "prune_at": 20}, 0.1, 0),
    ({"method": "tar", "critic_method": "dense", "criterion": "magnitude", "distribution": "uniform"}, 1, 0),
    ({"criterion": "synflow", "prune_at": 75, "active_width": "auto", "compute": "sparse"}, 0.1, 0.1),
    ({"method": "tar", "critic_method": "static", "critic_sparsity": 0.7, "compute": "sparse"}, 0.3, 0),
]


@pytest.mark.parametrize("flags, density, reserve", RUNS, ids=[str(flags) for flags, _, _ in RUNS])
def test_a_run_prunes_once_revives_and_trains_within_the_mask(train, script, flags, density, reserve):
    """A connection that survives or comes back has the weight it had. Density and reserve are
    those of the critics; where an actor has a method of its own, it is tar with the default ones."""
    seen, step, width = train(**flags), flags.get("prune_at", 60), flags.get("active_width")
    assert list(seen.prunings) == [step] and not seen.rewirings and seen.kernels == {flags.get("compute") == "sparse"}
    pruning, files = seen.prunings[step], [torch.load(seen.folder / f"{n}.pt") for n in ("masks", "final")]
    report = json.loads((seen.folder / "topology.json").read_text())
    for name, masks in pruning.masks.items():
        own = (0.1, 0.1) if name == "actor" and "critic_method" in flags else (density, reserve)
        static, net, k = pruning.static[name], seen.nets[name], round(own[0] * sum(sizes(masks)))
        assert sum(counts(masks)) == k and sum(counts(static)) == k - round(own[1] * k)
        assert not any((static[layer] & ~mask).any() for layer, mask in masks.items())
        assert [a - b for a, b in zip(counts(masks), counts(static), strict=True)] == su.revival_counts(net)
        assert same(masks, inside(masks, net.width)) and (net.width == width or (width == "auto" and net.width < 24))
        assert same(net.masks, masks) and same(files[0][name]["masks"], masks)
        part, part_before = su.active_part(masks, net.width), su.active_part(static, net.width)
        for layer, found in report[name]["layers"].items():
            blind, dead = ([int((~m[layer].any(d)).sum()) for m in (part_before, part)] for d in (0, 1))
            of_static, of_all = int(static[layer].sum()), int(masks[layer].sum())
            size, floor = masks[layer].numel(), su.topology_floor(tuple(part[layer].shape))
            assert (found["shape"], found["part"]) == ([*masks[layer].shape], [*part[layer].shape])
            assert (found["floor"], found["deficit"], found["size"]) == (floor, max(0, floor - of_static), size)
            assert (found["static"], found["revived"], found["active"]) == (of_static, of_all - of_static, of_all)
            assert (found["blind_inputs"], found["dead_units"]) == (blind, dead)
        for network in (n for n in (name, f"{name}_target") if n in pruning.before):
            trained, after, before = seen.trained[network], pruning.after[network], pruning.before[network]
            assert all(torch.equal(after[f"{n}.weight"], before[f"{n}.weight"] * mask) for n, mask in masks.items())
            assert any((trained[key] != after[key]).any() for key in after)
            assert all(torch.equal(files[1][network][key], tensor) for key, tensor in trained.items())
    assert seen.state["progress"]["training_flops"] == flops_of(script, seen, flags.get("policy_frequency", 2))


def test_all_methods_share_weights_replay_batches_and_random_numbers(train):
    """Up to the pruning at 90; after it actions differ, and with them the transitions."""
    dynamic = {"method": "chts", "rewire_every": 20, "drop_criterion": "mest"}
    snip = {"method": "static", "criterion": "snip", "active_width": 12}
    others = [train(prune_at=90, **flags) for flags in (snip, {"method": "uniform", "reserve": 0.5}, {}, dynamic)]
    dense, plain = train(prune_at=90, method="dense"), train(prune_at=90, method="static")
    for name, masks in others[2].prunings[90].static.items():  # of the same random scores tar's pruning keeps fewer
        assert not any((mask & ~plain.masks[name][layer]).any() for layer, mask in masks.items())

    def batches(seen):
        return [tensor for size, step, batch in seen.batches if size == 32 and step < 90 for tensor in batch]

    for seen in others:
        assert all(same(state, seen.prunings[90].before[name]) for name, state in dense.prunings[90].before.items())
        assert all(torch.equal(a, b) for a, b in zip(batches(dense), batches(seen), strict=True))
        assert torch.equal(dense.random, seen.random) and len(batches(seen)) == 29 * 5


@pytest.mark.parametrize("compute", ["masked", "sparse"])
def test_sparsity_zero_is_dense_bit_for_bit(train, compute):
    dense = train(method="dense", compute=compute)
    rewires = {"method": "rigl" if compute == "sparse" else "chts"}
    late = {"prune_at": 90} if compute == "masked" else {}  # as if nothing happened to Adam there; in torch until then
    for flags in ({"active_width": "auto", "init": "sparse"}, rewires | late):
        seen = train(sparsity=0.0, compute=compute, rewire_every=20, **flags)
        assert all(same(state, dense.trained[name]) for name, state in seen.trained.items())
        assert all(m.all() for masks in seen.masks.values() for m in masks.values())


def test_without_baselines_and_kernels_the_four_methods_train_to_the_same_bits(run, script, monkeypatch):
    """TAR and its controls need neither: with stand-ins that do nothing, and torch's own Adam, all is as before."""

    def nothing(args, nets, generator):
        does = {"state_dict": dict, "pruning": lambda _: contextlib.nullcontext(args.criterion)}
        does |= {"load_state_dict": lambda _: None, "step": lambda *_: 0}
        return SimpleNamespace(prunings={args.prune_at}, **does)

    def finals():
        folders = [run(method=method, total_timesteps=90) for method in ("tar", "uniform", "static", "dense")]
        return [torch.load(folder / "final.pt", weights_only=True) for folder in folders]

    before = finals()
    monkeypatch.setattr(baselines, "Schedule", nothing)
    monkeypatch.setattr(kernels, "Adam", functools.partial(torch.optim.Adam, fused=True))
    monkeypatch.setattr(kernels, "in_torch", contextlib.nullcontext)
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: {})
    for a, b in zip(before, finals(), strict=True):
        assert all(same(a[name], b[name]) for name in ("actor", "qf1", "qf2", "qf1_target", "qf2_target"))
        assert all(same(a["masks"][name], b["masks"][name]) for name in ("actor", "qf1", "qf2"))


def test_a_bad_revival_rule_is_refused_with_a_sentence_that_names_it(run, script, monkeypatch):
    net = row({"fc1": torch.zeros(9, 9), "fc2": torch.zeros(9, 9), "fc3": torch.zeros(2, 9)}, "greedy", reserve=20)
    net.static = {name: torch.zeros_like(weight).bool() for name, weight in net.weights.items()}
    for bad in ([21, 0, 0], [-1, 21, 0], [0, 0, 20]):
        monkeypatch.setitem(su.REVIVALS, "greedy", lambda masks, reserve, bad=bad: bad)
        with pytest.raises(ValueError, match=r"the revival rule of method greedy gives the layers \[.*must add up to"):
            su.revival_counts(net)
    with pytest.raises(ValueError, match="the revival rule of method greedy"):
        run(method="greedy")


def test_a_loss_is_each_networks_own_on_ten_batches_of_replay_data(train, script, watch):
    """The loss that scores connections; and the one by whose gradient they grow, on one batch. It is of the same
    networks as the loss that trains; SAC's alpha is 1 until it is learned."""
    made, used, names, of = {}, [], ("actor", "qf1", "qf2"), {"critic_losses": [], "policy_loss": []}

    def note(name, given):
        of[name].append(([id(part) for part in given if isinstance(part, nn.Module)], given[-2]))

    def critic_losses(*given):
        note("critic_losses", given)
        made.update(zip(names[1:], (yield)))

    def policy_loss(*given):
        note("policy_loss", given)
        result = yield
        made["actor"] = result[0] if isinstance(result, tuple) else result

    def use(*arguments):
        if of := [name for name in names if any(made[name] is a for a in arguments)]:
            used.append((made["batch"], of))
        yield

    watch(script, critic_losses)
    watch(script, policy_loss)
    watch(ReplayBuffer, lambda buffer, *of: (yield made.update(batch=of)), "sample")
    watch(su, use, "static_prune")
    watch(baselines, use, "rewire")
    train(method="rigl", criterion="snip", rewire_every=70, total_timesteps=100)
    assert used == [(batch, [name]) for batch in ((320, 0.99, 60), (32, 0.99, 70)) for name in names]
    for calls in of.values():
        assert len({tuple(networks) for networks, _ in calls}) == 1 < len(calls)
        assert script is td3_tar or calls[0][1] == 1  # alpha


# BUDGETS


@settings(max_examples=300)
@given(st.data(), st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1000)), min_size=1, max_size=8))
def test_allocate_is_exact_capped_and_proportional(data, entries):
    shares, caps, most = *zip(*entries, strict=True), sum(cap for share, cap in entries if share > 0)
    total = data.draw(st.integers(0, most))
    parts = su.allocate(total, shares, caps)
    assert sum(parts) == total and is_split(parts, shares, caps)
    with pytest.raises(ValueError, match="cannot place"):
        su.allocate(most + 1, shares, caps)


def test_allocate_by_hand():
    assert su.allocate(10, [1, 1, 1], [10, 10, 10]) == [4, 3, 3]  # a tie goes to the lower index
    assert su.allocate(10, [1, 2, 5], [99, 99, 99]) == [1, 3, 6]  # 1.25, 2.5 and 6.25
    assert su.allocate(100, [23, 17], [130, 70]) == [58, 42]  # 57.5 and 42.5, though 23 / 40 is rounded down
    assert su.allocate(20, [10, 1, 3], [4, 100, 100]) == [4, 4, 12]  # the first is full, the others share 16 as 1 to 3
    assert su.allocate(9, [8, 1, 1], [2, 3, 100]) == [2, 3, 4]  # and then the second


def test_plan_refuses_what_no_mask_fits_and_small_and_whole_networks_work(monkeypatch):
    with pytest.raises(ValueError, match="has nothing that can be pruned"):
        su.plan(row({}, "tar", 0.5), 0.1)
    averaged = row({"fc1": torch.ones(3, 2)}, "tar", 0.5)
    averaged.target = torch.optim.swa_utils.AveragedModel(averaged.network)
    with pytest.raises(ValueError, match="a target's layers must have the names of its network's; of an Av"):
        su.plan(averaged, 0.1)
    averaged.target = averaged.target.module
    su.plan(averaged, 0.1)
    tied = row({"a": torch.ones(3, 3), "b": torch.ones(3, 3)}, "tar", 0.5)
    tied.network.b.weight = tied.network.a.weight
    with pytest.raises(ValueError, match="two layers of a network share a weight, which can have one mask alone"):
        su.plan(tied, 0.1)
    odd = row({"a": torch.ones(3, 3)}, "dense")
    for name, shape in (("a.weight", (3, 3)), ("a", (2, 3, 3))):
        found = {name: nn.Parameter(torch.ones(shape))}
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"linear_weights gives {name}; it"):
            patch.setattr(su, "linear_weights", lambda _, found=found: found)
            su.plan(odd, 0.1)
    net = row({"a": torch.ones(3, 3, device="meta")}, "tar", 0.5)
    net.load_state_dict({"static": {"a": torch.ones(3, 3).bool()}, "masks": {"a": torch.ones(3, 3).bool()}})
    assert net.static["a"].is_meta and net.masks["a"].is_meta
    assert su.static_prune(row({}, "dense"), 0, "synflow", "er", generator()) == {}
    parallel = row({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, "dense")  # no chain, which synflow cannot score
    assert counts(su.static_prune(parallel, 12, "synflow", "er", generator())) == [6, 6]
    assert su.choose_width({"a": torch.ones(3, 2)}, 4, "auto") == 0  # it has no hidden neurons


@given(st.sampled_from([*baselines.METHODS]), st.integers(1, 40), FRACTION, FRACTION)
def test_the_budgets_of_a_network(method, hidden, sparsity, reserve):
    net = row({"fc1": torch.zeros(hidden, 3), "fc2": torch.zeros(2, hidden)}, method, sparsity)
    k = round((1 - sparsity) * 5 * hidden) if method not in ("dense", "tiny") else 5 * hidden
    if k < 1:
        with pytest.raises(ValueError, match=f"--sparsity {sparsity} keeps none of {5 * hidden} connections"):
            su.plan(net, reserve)
        return
    su.plan(net, reserve)
    assert (net.size, net.active, net.budget, net.width) == (5 * hidden, 5 * hidden, k, None)
    assert net.reserve == (round(reserve * k) if method in ("tar", "uniform", "tar_ch") else 0)


@given(st.integers(1, 40), st.tuples(*[st.integers(2, 80)] * 2), st.integers(1, 10), st.floats(0.01, 1))
def test_auto_is_the_widest_that_the_budget_feeds_but_never_too_narrow_to_hold_it(n_in, widths, n_out, density):
    def shapes(h):
        first, second = (min(h, width) for width in widths)
        return [(first, n_in), (second, first), (n_out, second)]

    hidden = max(widths)
    weights = {n: torch.zeros(shape) for n, shape in enumerate(shapes(hidden))}
    size = [sum(map(math.prod, shapes(h))) for h in range(hidden + 1)]
    need = [sum(sum(shape) * math.log(sum(shape)) / 2 for shape in shapes(h)) for h in range(1, hidden + 1)]
    k = max(1, round(density * size[hidden]))
    narrowest = min(h for h in range(1, hidden + 1) if size[h] >= k)
    fed = max([h for h, e in enumerate(need, 1) if k >= 4 * e], default=0)
    assert su.choose_width(weights, k, "auto") == max(fed, narrowest)
    assert su.choose_width(weights, k, narrowest) == narrowest
    with pytest.raises(ValueError, match=f"the smallest that can is {narrowest}$"):
        su.choose_width(weights, k, narrowest - 1)


# STATIC PRUNING


@settings(max_examples=100)
@given(st.data(), st.sampled_from([*su.CRITERIA]), st.sampled_from([*su.DISTRIBUTIONS]), st.booleans())
def test_static_pruning_keeps_the_exact_count_where_it_may(data, criterion, distribution, again):
    """Between active neurons, and among what an earlier pruning has left. It reads the network, and draws nothing from
    torch's own generator."""
    network, seed = mlp(4, 9, 9, 2).double(), data.draw(st.integers(0, 99))
    net = su.Net(network, None, None, "static", 0.9, width=data.draw(st.sampled_from([None, 5, 1])))
    loss, before = network(torch.ones(5, 4).double()).square().mean(), copied(network.state_dict())
    among = inside({name: torch.ones_like(w, dtype=torch.bool) for name, w in net.weights.items()}, net.width)
    if again:
        among = net.masks = su.static_prune(net, sum(counts(among)) * 2 // 3, "random", "er", generator(seed))
    keep, state = data.draw(st.integers(0, sum(counts(among)))), torch.get_rng_state()
    masks = su.static_prune(net, keep, criterion, distribution, generator(seed), loss)
    assert sum(counts(masks)) == keep and not any((mask & ~among[name]).any() for name, mask in masks.items())
    shapes = [part.shape for part in su.active_part(masks, net.width).values()]
    shares = {"er": [a + b for a, b in shapes], "uniform": [a * b for a, b in shapes]}
    if distribution != "global":  # in rounds, a layer may have been rounded down before
        off = np.subtract(counts(masks), su.allocate(keep, shares[distribution], counts(among)))
        assert abs(off).max() <= (su.CRITERIA[criterion].rounds > 1)
    assert same(before, network.state_dict()) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("distribution", su.DISTRIBUTIONS)
def test_a_rule_may_give_the_scores_of_layers_in_any_order(monkeypatch, distribution):
    backward = lambda *given: dict(reversed(su.magnitude_scores(*given).items()))  # noqa: E731
    monkeypatch.setitem(su.CRITERIA, "backward", su.Rule(backward))
    net = su.Net(mlp(4, 9, 9, 2), None, None, "static", 0.9, width=7)
    one, other = (su.static_prune(net, 40, rule, distribution, generator(0)) for rule in ("magnitude", "backward"))
    assert same(one, other)


@given(st.data(), SHAPES, st.sampled_from([*su.DISTRIBUTIONS]), st.integers(1, 3))
def test_the_highest_are_kept_by_rank_and_ties_go_to_the_lower_index(data, shapes, distribution, levels):
    g = generator(data.draw(st.integers(0, 99)))
    scores = {f"fc{i}": torch.randint(levels, shape, generator=g).double() for i, shape in enumerate(shapes)}
    keep = data.draw(st.integers(0, sum(sizes(scores))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(su.CRITERIA, "given", su.Rule(lambda *_: scores))
        masks = su.static_prune(row(copied(scores)), keep, "given", distribution, g)
    ranked = [(-s, i, j) for i, layer in enumerate(scores.values()) for j, s in enumerate(layer.flatten().tolist())]
    groups = [sorted(entry for entry in ranked if entry[1] == i) for i in range(len(shapes))]
    expected = {entry for group, n in zip(groups, counts(masks), strict=True) for entry in group[:n]}
    expected = {*sorted(ranked)[:keep]} if distribution == "global" else expected
    assert {(s, i, j) for s, i, j in ranked if masks[f"fc{i}"].flatten()[j]} == expected


def test_the_criteria_by_hand(monkeypatch):
    """f = c relu(a x + b y) with (a, b, c) = (2, -1, 3) and x = y = 1, so f = 3; the loss is f^2 / 2."""
    net = row({"fc1": torch.tensor([[2.0, -1.0]]), "fc2": torch.tensor([[3.0]])})
    first, last = net.weights.values()

    def scores(criterion, *cut):
        losses = [(last * (first @ torch.ones(2, 1)).relu()).square().sum() / 2 for _ in range(2)]
        masks = {"fc1": torch.tensor([[True, not cut]]), "fc2": torch.ones(1, 1).bool()}
        found = su.CRITERIA[criterion].scores(net.weights, masks, losses[0], generator())
        assert criterion != "synflow" or found["fc1"].dtype == torch.float64
        kept = su.static_prune(net, 2, criterion, "global", generator(), losses[1])
        return torch.cat([s[0] for s in found.values()]).tolist(), torch.cat([m[0] for m in kept.values()]).tolist()

    assert scores("magnitude") == ([2, 1, 3], [True, False, True])
    assert scores("snip") == ([18, 9, 9], [True, True, False])  # the gradient is (9, 9, 3)
    # the Hessian is [[9, 9, 6], [9, 9, 6], [6, 6, 1]]
    assert scores("grasp") == ([360, -180, 333], [True, False, True])
    with torch.no_grad():  # where a reader may prune
        assert scores("synflow")[0] == [6, 3, 9] and scores("synflow", "b")[0] == [6, 0, 6]  # R = 3 * (2 + 1), or 3 * 2
    monkeypatch.setitem(su.CRITERIA, "log", su.Rule(lambda weights, *_: {name: w.log() for name, w in weights.items()}))
    zeros = su.Rule(lambda weights, *_: {name: 0 * w / 0 for name, w in weights.items()})
    monkeypatch.setitem(su.CRITERIA, "zeros", zeros)
    for criterion, distribution in [("log", "global"), *(("zeros", name) for name in su.DISTRIBUTIONS)]:
        with pytest.raises(ValueError, match="a score is not a number"):
            su.static_prune(net, 2, criterion, distribution, generator())
    monkeypatch.setitem(su.DISTRIBUTIONS, "global", lambda scores, keep: [1, 0])
    with pytest.raises(
        ValueError, match=r"distribution global gives \[1, 0\] connections to layers with room for \[2, 1\]"
    ):
        scores("magnitude")
    for wrong in ([0, 2], [3, -1]):
        monkeypatch.setitem(su.DISTRIBUTIONS, "global", lambda scores, keep, wrong=wrong: wrong)
        with pytest.raises(ValueError, match=r" connections to layers with room for \[2, 1\]; 2 are to be placed"):
            scores("magnitude")
    monkeypatch.setitem(su.CRITERIA, "iterative", su.CRITERIA["snip"]._replace(rounds=5))
    with pytest.raises(ValueError, match="criterion iterative uses the loss of the dense network, so it can have one"):
        scores("iterative")
    with pytest.raises(ValueError, match="criterion snip needs a loss of each network, and own_losses"):
        su.static_prune(net, 2, "snip", "er", generator())


@pytest.mark.parametrize("criterion, shape, keep, odds", [("random", (5, 4), 5, 0.25), ("diagonal", (4, 5), 4, 0.2)])
def test_chance_is_fair_to_all_connections(criterion, shape, keep, odds):
    net = row({"fc": torch.zeros(shape)})
    hits = sum(su.static_prune(net, keep, criterion, "global", generator(seed))["fc"].float() for seed in range(3000))
    assert (hits / 3000).flatten().tolist() == pytest.approx([odds] * 20, abs=0.04)  # five standard deviations


def test_synflow_has_a_hundred_rounds_never_takes_back_and_survives_large_flows(watch):
    rounds = []

    def highest(scores, count, among):
        found = yield
        rounds.extend([found.flatten()] if found.dim() == 2 else [])  # not the ranking of all layers together

    watch(su, highest)
    for seed in range(3):  # with so few left, connections that are cut off score zero as pruned ones do
        g = generator(seed)
        net = row({f"fc{i}": torch.randn(shape, generator=g) for i, shape in enumerate([(6, 6), (6, 6), (2, 6)])})
        rounds.clear()
        su.static_prune(net, 5, "synflow", "global", g)
        kept = [torch.ones(84).bool(), *(torch.cat(rounds[i : i + 3]) for i in range(0, 300, 3))]
        assert [int(mask.sum()) for mask in kept] == [round(84 * (5 / 84) ** (i / 100)) for i in range(101)]
        assert not any((later & ~earlier).any() for earlier, later in zip(kept, kept[1:]))
    large = row({f"fc{i}": torch.full((2, 2), 1e20) for i in range(3)})  # float32 ends at 3e38
    found = su.synflow_scores(large.weights, {name: torch.ones(2, 2) for name in large.weights}, None, g)
    assert all((scores > 1e60).all() and scores.isfinite().all() for scores in found.values())
    with pytest.raises(ValueError, match="chain"):
        su.static_prune(row({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}), 2, "synflow", "er", g)


@given(st.data(), st.integers(1, 20), st.integers(1, 20))
def test_diagonals_are_whole_but_for_the_last_and_fans_are_equal_up_to_one(data, m, n):
    """Between the active neurons of a layer."""
    keep, short, long = data.draw(st.integers(0, m * n)), min(m, n), max(m, n)
    net = row({"fc": torch.zeros(m + data.draw(st.integers(0, 5)), n), "out": torch.zeros(1, m)}, width=m)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(su.DISTRIBUTIONS, "first", lambda scores, keep: [keep, 0])
        whole = su.static_prune(net, keep, "diagonal", "first", generator(keep))["fc"]
    mask = whole[:m]
    assert not whole[m:].any()
    out_of, into = mask.nonzero().T
    found = torch.bincount((into - out_of) % long, minlength=long).sort(descending=True).values
    assert found.tolist() == [min(short, max(0, keep - i * short)) for i in range(long)]
    for side in [0, 1] if m == n else [int(m < n)]:
        assert mask.sum(side).max() - mask.sum(side).min() <= 1


# REVIVAL


@settings(max_examples=200)
@given(SHAPES, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99), st.sampled_from(["tar", "uniform", "static"]))
def test_revival_is_exact_adds_only_and_follows_the_rule(shapes, density, fraction, seed, method):
    net = row({f"fc{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}, method)
    net.static = {name: torch.rand(w.shape, generator=generator(seed)) < density for name, w in net.weights.items()}
    pruned = [n - k for n, k in zip(sizes(net.static), counts(net.static), strict=True)]
    net.reserve = int(fraction * sum(pruned)) if method != "static" else 0
    revived = su.revival_counts(net)
    assert sum(revived) == net.reserve and all(0 <= r <= p for r, p in zip(revived, pruned, strict=True))
    need = [sum(shape) * math.log(sum(shape)) / 2 for shape in shapes]
    floors = [min(a * b, math.ceil(e)) for (a, b), e in zip(shapes, need, strict=True)]
    deficits = [max(0, f - k) for f, k in zip(floors, counts(net.static), strict=True)]
    if method == "uniform":
        assert is_split(revived, pruned, pruned)
    elif method == "tar" and sum(deficits) >= net.reserve:
        assert is_split(revived, deficits, deficits)
    elif method == "tar":
        beyond = [r - d for r, d in zip(revived, deficits, strict=True)]
        assert is_split(beyond, need, [p - d for p, d in zip(pruned, deficits, strict=True)])
    masks = su.revive(net, revived, generator(seed))
    assert [a - b for a, b in zip(counts(masks), counts(net.static), strict=True)] == revived
    assert not any((net.static[name] & ~mask).any() for name, mask in masks.items())
    assert same(masks, su.revive(net, revived, generator(seed)))


def test_floors_and_both_cases_of_the_rule_by_hand():
    floors = {(256, 11): 746, (256, 14): 756, (256, 256): 1598, (3, 256): 720, (1, 256): 256, (256, 376): 2038}
    assert {shape: su.topology_floor(shape) for shape in floors} == floors
    # what snip leaves in a critic of Hopper-v4 at 90%: deficits of 75, 0 and 56
    static = {shape: torch.arange(math.prod(shape)).view(shape) for shape in ((256, 14), (256, 256), (1, 256))}
    static = {shape: index < count for (shape, index), count in zip(static.items(), (681, 6060, 200), strict=True)}
    assert su.tar_budgets(static, 100) == [57, 0, 43]  # 57.25 and 42.75, in proportion to the deficits
    assert su.tar_budgets(static, 131) == [75, 0, 56]
    # 563 more: as 755.3 : 1597.0 in the two layers that have room, 180.8 and 382.2
    assert su.tar_budgets(static, 694) == [256, 382, 56]
    part = {"fc1": torch.zeros(10, 100).bool(), "fc2": torch.arange(3000).view(30, 100) < 1000}
    assert su.uniform_budgets(part, 300) == [100, 200]  # a tenth of what is pruned in each


def test_worked_cases_at_95_percent():
    for neurons, criterion, distribution, static, revived in (
        # er: 3214 split 273 : 512 : 262; one deficit, of 26, in fc2; the other 331 go 766 : 1597 : 730
        ((17, 256, 256, 6), "random", "er", [838, 1572, 804], [920, 1769, 882]),
        # magnitude keeps the first layer alone; deficits of 1598 and 256 share the reserve of 358
        ((23, 256, 256, 1), "magnitude", "global", [3226, 0, 0], [3226, 309, 49]),
    ):
        net = su.Net(mlp(*neurons), None, None, "tar", 0.95)
        su.plan(net, 0.1)
        net.static = su.static_prune(net, net.budget - net.reserve, criterion, distribution, generator())
        assert counts(net.static) == static
        assert counts(su.revive(net, su.revival_counts(net), generator())) == revived
    assert min(counts(su.static_prune(net, net.budget, "synflow", "global", generator()))) > 0  # where magnitude cuts


def test_revival_is_uniform_within_a_layer_and_between_active_neurons():
    mask = torch.tensor([[True, False, False, False], [False, True, False, False], [False] * 4])
    net = row(
        {"fc": mask.float(), "out": torch.ones(1, 3)}, reserve=1, static={"fc": mask, "out": torch.ones(1, 3) > 0}
    )
    for net.width, odds in ((None, [0.1] * 10), (2, [1 / 6] * 6 + [0] * 4)):
        hits = sum(su.revive(net, [1, 0], generator(seed))["fc"].float() for seed in range(4000)) / 4000
        assert hits[~mask].tolist() == pytest.approx(odds, abs=0.03) and hits[mask].tolist() == [1, 1]


# MASKED TRAINING


@pytest.mark.parametrize("kind", [torch.optim.Adam, kernels.Adam, torch.optim.RMSprop, torch.optim.SGD])
def test_what_is_pruned_after_dense_training_stays_at_zero(kind):
    """Whatever the optimizer keeps of it, and also when the masks change; gradients are masked after `backward()`."""
    network = mlp(4, 7, 6, 2)
    flags = {} if issubclass(kind, torch.optim.Adam) else {"momentum": 0.9}
    optimizer = kind(network.parameters(), lr=1e-2, **flags)
    net = su.Net(network, copy.deepcopy(network), optimizer, "static", 0.5)
    x, y = torch.randn(50, 4), torch.randn(50, 2)
    for seed in (None, 1, 2):
        if seed is not None:
            net.masks = su.static_prune(net, 30, "random", "uniform", generator(seed))
            for name, weight in net.weights.items():  # an overflow there would be NaN times zero
                for part in optimizer.state[weight].values():
                    if part is not None and part.shape == weight.shape:
                        part[~net.masks[name]] = torch.inf
            su.fix_masks({"net": net})
        before = copied(network.state_dict())
        for _ in range(5):
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            gradients = {name: weight.grad.clone() for name, weight in net.weights.items()}
            optimizer.step()
    for name, mask in net.masks.items():
        for tensor in (*stored(net, name), gradients[name]):
            assert not tensor[~mask].any() and tensor[mask].any()
        assert (net.weights[name] != before[f"{name}.weight"])[mask].any() and len(stored(net, name)) > 2


def test_an_infinite_gradient_of_a_pruned_weight_is_zero():
    """As where a product of the batch overflows; times zero it would be NaN."""
    net = row({"fc1": torch.ones(3, 4), "fc2": torch.ones(1, 3)}, budget=8)
    net.masks = su.static_prune(net, 8, "random", "uniform", generator(1))
    su.fix_masks({"net": net})
    for name, weight in net.weights.items():
        (weight * torch.where(net.masks[name], 1, torch.inf)).sum().backward()
        assert torch.equal(weight.grad, net.masks[name].float()) and not net.masks[name].all()


def test_a_row_that_does_not_say_what_was_done_has_no_report():
    """As where an edit prunes one network and leaves another as it was."""
    masks = {"fc1": torch.tensor([[True, False], [True, False]]), "fc2": torch.tensor([[True, False]])}
    net = row({"fc1": torch.ones(2, 2), "fc2": torch.ones(1, 2)}, size=6, budget=3, static=masks, masks=masks)
    assert topology.topology_report({"qf1": net})["qf1"]["layers"]["fc1"]["active"] == 2
    for fields, sentence in (
        ({"budget": 4}, r"qf1 has \(active, revived\) \(3, 0\) in place of \(4, 0\); set the row's budget"),
        ({"reserve": 1}, r"qf1 has \(active, revived\) \(3, 0\) in place of \(3, 1\)"),
        ({"static": {}, "masks": {}}, r"qf1 has \(active, revived\) \(0, 0\) in place of \(3, 0\)"),
        ({"static": {}}, "qf1 has masks of other layers before revival"),
    ):
        with pytest.raises(ValueError, match=sentence):
            topology.log_pruning(None, 0, {"qf1": dataclasses.replace(net, **fields)}, 2, 1)


def test_the_warnings_on_what_pruning_cuts():
    index = torch.arange(20).view(4, 5)
    static = {"fc1": (index == 0) | (index == 2), "fc2": torch.zeros(1, 4).bool()}
    masks = {"fc1": static["fc1"] | (index == 6) | (index == 9), "fc2": torch.arange(4).view(1, 4) == 0}
    net = row({"fc1": torch.ones(4, 5), "fc2": torch.ones(1, 4)}, static=static, masks=masks)
    emptied = "qf1.fc2 keeps no connection after static pruning and has 1 after revival."
    assert topology.topology_warnings("qf1", net, 2, 1) == [emptied]  # where other layers come before
    assert topology.topology_warnings("qf1", net, 3, 2) == [
        emptied,
        "qf1 is blind to 1 of 3 observation dimensions after static pruning: [1]; after revival to 0.",
        "qf1 is blind to 2 of 2 action dimensions after static pruning: [0, 1]; after revival to 1: [0].",
    ]
