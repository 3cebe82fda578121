"""--active-width and --init: what they do to tensors, the invariants I1 to I6 with them, and that they are seen."""

import json
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import given
from hypothesis import strategies as st
from test_runs import events, same_weights
from test_runs import load as load_final
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparse_utils as su
import td3_tar
from lab import record, run_folder, topology
from lab.checks import complete_args

SMALL = {"sparsity": 0.9, "rewire_every": 40, "total_timesteps": 150}


def load(run_dir):
    """All of the networks; final.pt has their active part alone."""
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def chain(n_in, hidden, n_out, seed=0):
    sizes, g = [n_in, hidden, hidden, n_out], generator(seed)
    return {f"fc{i + 1}": torch.randn(b, a, generator=g) for i, (a, b) in enumerate(zip(sizes, sizes[1:]))}


def part_size(n_in, width, n_out):
    return width * (n_in + width + n_out)


def outside(mask, width, layer):
    """What a mask has beyond the first `width` hidden neurons."""
    beyond = torch.zeros_like(mask)
    if layer != "fc3":
        beyond[width:] = True
    if layer != "fc1":
        beyond[:, width:] = True
    return mask & beyond


# on tensors alone


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_active_part_is_a_view_and_embed_puts_it_back(n_in, hidden, n_out, data):
    width = data.draw(st.integers(1, hidden))
    weights = chain(n_in, hidden, n_out)
    masks = {name: weight > 0 for name, weight in weights.items()}
    part = su.active_part(masks, width)
    assert [tuple(mask.shape) for mask in part.values()] == [(width, n_in), (width, width), (n_out, width)]
    back = su.embed(part, weights)
    for name, mask in masks.items():
        assert back[name].shape == mask.shape and not outside(back[name], width, name).any()
        assert torch.equal(back[name], mask & ~outside(torch.ones_like(mask), width, name))
        part[name].fill_(True)
        assert int(mask.sum()) >= part[name].numel()  # written through the view
    assert all(torch.equal(a, b) for a, b in zip(su.active_part(weights, None).values(), weights.values(), strict=True))


@pytest.mark.parametrize("criterion", ["random", "magnitude", "snip", "grasp", "synflow"])
@pytest.mark.parametrize("distribution", ["er", "uniform", "global"])
@pytest.mark.parametrize("keep", [7, 40])
def test_pruning_within_a_width_is_pruning_of_the_part(criterion, distribution, keep):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2)).double()
    weights = dict(zip(("fc1", "fc2", "fc3"), su.linear_weights(network).values(), strict=True))
    loss = lambda: network(torch.ones(5, 4).double()).pow(2).mean()  # noqa: E731
    masks = su.static_prune(weights, keep, criterion, distribution, generator(), loss(), 5)
    assert sum(int(mask.sum()) for mask in masks.values()) == keep
    for name, mask in masks.items():
        assert mask.shape == weights[name].shape and not outside(mask, 5, name).any()
    part = su.active_part(masks, 5)
    if distribution != "global":
        assert [int(mask.sum()) for mask in part.values()] == su.DISTRIBUTIONS[distribution](part, keep)
    if criterion in ("magnitude", "synflow"):  # they see nothing of the rest
        alone = su.static_prune(su.active_part(weights, 5), keep, criterion, distribution, generator())
        assert all(torch.equal(alone[name], mask) for name, mask in part.items())


def need(n_in, width, n_out):
    pairs = [n_in + width, 2 * width, width + n_out]
    return sum(n * math.log(n) / 2 for n in pairs)


def network(n_in, hidden, n_out):
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_out)
    )


@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 10), st.floats(0.01, 1))
def test_auto_is_the_widest_that_the_budget_feeds_and_never_too_narrow_to_hold_it(n_in, hidden, n_out, density):
    budget = max(1, round(density * part_size(n_in, hidden, n_out)))
    networks = {"qf1": network(n_in, hidden, n_out)}
    width = su.active_widths(networks, {"qf1": "tar"}, {"qf1": (budget, 0)}, "auto")["qf1"]
    assert 1 <= width <= hidden and part_size(n_in, width, n_out) >= budget
    fed = budget >= su.AUTO_WIDTH_C * need(n_in, width, n_out)
    assert fed or width == 1 or part_size(n_in, width - 1, n_out) < budget
    assert width == hidden or budget < su.AUTO_WIDTH_C * need(n_in, width + 1, n_out)


def test_widths_are_per_network_and_only_of_networks_with_a_mask():
    networks = {"actor": network(17, 256, 6), "qf1": network(23, 256, 1), "qf2": network(23, 256, 1)}
    budgets = {"actor": (1428, 0), "qf1": (1434, 0), "qf2": (71680, 0)}
    methods = {"actor": "tar", "qf1": "rigl", "qf2": "dense"}
    assert su.active_widths(networks, methods, budgets, None) == dict.fromkeys(networks, 256)
    assert su.active_widths(networks, methods, budgets, 48) == {"actor": 48, "qf1": 48, "qf2": 256}
    assert su.active_widths(networks, methods, budgets, "auto")["qf1"] == 37  # at 98% of HalfCheetah-v4's critics
    budgets["qf1"] = (71680, 0)
    auto = su.active_widths(networks, methods, budgets, "auto")
    assert auto["actor"] < auto["qf1"] == auto["qf2"] == 256


def test_a_width_needs_a_chain_of_layers():
    heads = nn.ModuleDict({"fc1": nn.Linear(3, 8), "mean": nn.Linear(8, 2), "log_std": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match="--active-width needs layers that are a chain"):
        su.active_widths({"actor": heads}, {"actor": "tar"}, {"actor": (20, 0)}, 4)
    assert su.active_widths({"actor": heads}, {"actor": "tar"}, {"actor": (20, 0)}, None) == {"actor": 8}


def test_without_a_width_no_connection_is_closed_also_where_inputs_come_in_again_behind_a_layer():
    layers = {"fc1": nn.Linear(3, 8), "fc2": nn.Linear(8 + 3, 8), "fc3": nn.Linear(8, 1)}  # fc2 reads the input too
    (width,) = su.active_widths({"qf1": nn.ModuleDict(layers)}, {"qf1": "tar"}, {"qf1": (20, 0)}, None).values()
    weights = {name: layer.weight for name, layer in layers.items()}
    assert all(torch.equal(part, weights[name]) for name, part in su.active_part(weights, width).items())


def test_only_plain_networks_are_cut():
    """A norm over neurons reads the dead ones too."""
    plain = network(3, 8, 2)
    normed = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 2))
    for module, cut in ((plain, True), (normed, False)):
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in su.linear_weights(module).items()}
        state = {"net": dict(module.state_dict()), "masks": {"net": masks}}
        state = run_folder.without_dead_neurons(state, {"net": module}, {"net": 5})
        first = state["net"]["0.weight"]
        assert len(first) == (5 if cut else 8) and first.untyped_storage().size() == 4 * first.numel()
        mask = state["masks"]["net"]["0"]
        assert mask.shape == first.shape and mask.untyped_storage().size() == mask.numel()


def test_a_width_too_narrow_for_one_network_names_the_smallest_that_serves_all():
    networks = {"actor": network(17, 256, 6), "qf1": network(23, 256, 1)}
    methods, budgets = dict.fromkeys(networks, "static"), {"actor": (1428, 0), "qf1": (5000, 0)}
    smallest = next(h for h in range(1, 257) if part_size(23, h, 1) >= 5000)
    with pytest.raises(ValueError, match=f"cannot hold the connections; the smallest that can is {smallest}$"):
        su.active_widths(networks, methods, budgets, smallest - 1)
    assert su.active_widths(networks, methods, budgets, smallest) == dict.fromkeys(networks, smallest)


def test_sparse_init_scales_each_unit_to_its_active_inputs_and_nothing_else():
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    masks = {"0": torch.zeros(4, 6).bool(), "2": torch.ones(2, 4).bool()}
    for unit, active in enumerate((0, 1, 3, 6)):
        masks["0"][unit, :active] = True
    su.scale_to_active_inputs(network, masks)
    after = network.state_dict()
    for unit, factor in enumerate((1.0, math.sqrt(6), math.sqrt(2), 1.0)):
        torch.testing.assert_close(after["0.weight"][unit], before["0.weight"][unit] * factor)
    for name in ("0.bias", "2.weight", "2.bias"):  # bit for bit where every input is active
        assert torch.equal(after[name], before[name])
    assert torch.equal(after["0.weight"][[0, 3]], before["0.weight"][[0, 3]])


def test_sparse_init_gives_a_critic_at_98_percent_the_scale_of_the_dense_one():
    ratios = {"dense": [], "sparse": []}
    x = torch.randn(2000, 23, generator=generator())
    for seed in range(10):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(23, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
        with torch.no_grad():
            dense = network(x).std()
            masks = su.static_prune(su.linear_weights(network), 1434, "random", "er", generator(seed))
            su.zero_pruned(network, masks)
            ratios["dense"].append(network(x).std() / dense)
            su.scale_to_active_inputs(network, masks)
            ratios["sparse"].append(network(x).std() / dense)
    assert sum(ratios["dense"]) / 10 < 0.1
    assert 0.7 < sum(ratios["sparse"]) / 10 < 1.4


# whole runs

CASES = [(None, "sparse"), (10, "dense"), (10, "sparse"), ("auto", "sparse")]


@pytest.mark.parametrize("method", ["tar", "static", "uniform", "set", "rigl"])
@pytest.mark.parametrize("width, init", CASES)
def test_i1_i2_i5_and_what_is_seen_of_it(run, script, monkeypatch, method, width, init):
    seen, watched = {}, []
    fix_masks, log_rewiring = su.fix_masks, run_folder.log_rewiring

    def spy_fix(networks, targets, optimizers, masks, *rest):
        seen.update(networks=networks, targets=targets, optimizers=optimizers, masks=masks)
        seen["first"] = {n: {k: m.clone() for k, m in layers.items()} for n, layers in masks.items()}
        for name, target in targets.items():  # scaled alike
            for a, b in zip(networks[name].parameters(), target.parameters(), strict=True):
                assert torch.equal(a, b)
        return fix_masks(networks, targets, optimizers, masks, *rest)

    def zero_outside():
        for name, layers in seen["masks"].items():
            online, target = (seen[kind].get(name) for kind in ("networks", "targets"))
            for layer, weight in su.linear_weights(online).items():
                state = seen["optimizers"][name].state.get(weight, {})
                others = [su.linear_weights(target)[layer]] if target is not None else []
                for tensor in (weight, *others, *(state[k] for k in ("exp_avg", "exp_avg_sq") if state)):
                    assert not tensor[~layers[layer]].any(), (name, layer)

    def after_step(*_):
        if seen:
            zero_outside()
            watched.append(True)

    def spy_rewiring(*arguments):
        zero_outside()
        return log_rewiring(*arguments)

    monkeypatch.setattr(su, "fix_masks", spy_fix)
    monkeypatch.setattr(run_folder, "log_rewiring", spy_rewiring)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        run_dir = run(method=method, active_width=width, init=init, **SMALL)
    finally:
        hook.remove()
    assert len(watched) > 100
    final, topology = load(run_dir), json.loads((run_dir / "topology.json").read_text())
    named = f"__s0.9{f'__w{width}' if width else ''}{'__init-sparse' if init == 'sparse' else ''}__1__"
    assert named in run_dir.name
    for name, layers in final["masks"].items():
        h = topology[name]["active_width"]
        assert h == (24 if width is None else 10 if width == 10 else h) and h <= 24
        assert sum(int(m.sum()) for m in layers.values()) == topology[name]["budget"]
        assert topology[name]["budget"] == round(0.1 * sum(m.numel() for m in layers.values()))
        for layer, mask in layers.items():
            row = topology[name]["layers"][layer]
            part = (mask.shape[0] if layer == "fc3" else h, mask.shape[1] if layer == "fc1" else h)
            assert not outside(mask, h, layer).any()
            assert (tuple(row["part"]), tuple(row["shape"])) == (part, tuple(mask.shape))
            assert row["floor"] == su.topology_floor(part) and row["deficit"] == max(0, row["floor"] - row["static"])
            if method not in ("set", "rigl"):
                assert torch.equal(mask, seen["first"][name][layer])
                assert row["blind_inputs"][1] == int((~mask[: part[0], : part[1]].any(0)).sum())
                assert row["dead_units"][1] == int((~mask[: part[0], : part[1]].any(1)).sum())
            else:
                last = row["last_rewiring"]
                assert last["blind_inputs"] == int((~mask[: part[0], : part[1]].any(0)).sum())
                assert last["dead_units"] == int((~mask[: part[0], : part[1]].any(1)).sum())
        if method in ("set", "rigl"):
            assert any(not torch.equal(mask, seen["first"][name][layer]) for layer, mask in layers.items())


def test_revival_and_deficits_are_those_of_the_part(run):
    whole, part = (run(sparsity=0.97, active_width=width, hidden_size=64) for width in (None, 12))
    whole, part = (json.loads((path / "topology.json").read_text())["qf1"]["layers"] for path in (whole, part))
    assert [row["floor"] for row in part.values()] != [row["floor"] for row in whole.values()]
    assert sum(row["deficit"] for row in part.values()) < sum(row["deficit"] for row in whole.values())
    assert sum(row["revived"] for row in part.values()) == sum(row["revived"] for row in whole.values()) > 0


@pytest.mark.parametrize("prune_at", [20, 60])
def test_i3_init_and_width_change_nothing_before_pruning_and_init_not_the_mask(run, monkeypatch, prune_at):
    seen, static_prune = [], su.static_prune

    def snapshot(weights, *rest):
        seen[-1] += [weight.detach().clone() for weight in weights.values()]
        return static_prune(weights, *rest)

    monkeypatch.setattr(su, "static_prune", snapshot)
    finals = []
    for flags in ({}, {"init": "sparse"}, {"init": "sparse", "active_width": 10}):
        seen.append([])
        finals.append(load(run(prune_at=prune_at, **SMALL | flags)))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))
    dense, sparse, narrow = (final["masks"] for final in finals)
    assert all(torch.equal(dense[n][k], sparse[n][k]) for n in dense for k in dense[n])
    assert not all(torch.equal(dense[n][k], narrow[n][k]) for n in dense for k in dense[n])
    assert not same_weights(finals[0], finals[1])


@pytest.mark.parametrize("network", ["actor", "critic"])
def test_an_init_of_one_network_alone_scales_that_network_alone(run, monkeypatch, network):
    seen, fix_masks = [], su.fix_masks

    def spy_fix(networks, targets, optimizers, masks, *rest):
        result = fix_masks(networks, targets, optimizers, masks, *rest)
        modules = networks | {f"{name}_target": target for name, target in targets.items()}
        seen.append({name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in modules.items()})
        return result

    monkeypatch.setattr(su, "fix_masks", spy_fix)
    run(**SMALL)
    masks = load(run_dir := run(**SMALL | {f"{network}_init": "sparse"}))["masks"]
    assert f"__init-{'sparse+dense' if network == 'actor' else 'dense+sparse'}__" in run_dir.name
    for name, state in seen[0].items():
        own = "actor" if name.startswith("actor") else "critic"
        for key, before in state.items():
            after, layer = seen[1][name][key], key.removesuffix(".weight")
            if own == network and layer != key:
                active = masks[name.removesuffix("_target")][layer].sum(1, keepdim=True)
                factor = torch.where(active > 0, math.sqrt(before.shape[1]) / active.clamp(min=1).sqrt(), 1.0)
                torch.testing.assert_close(after, before * factor)
                assert not torch.equal(after, before)
            else:
                assert torch.equal(after, before)


@pytest.mark.parametrize("method", ["tar", "set", "rigl"])
def test_i4_sparsity_zero_with_a_sparse_init_is_dense_bit_for_bit(run, method):
    flags = {"init": "sparse", "active_width": "auto"}
    assert same_weights(
        load(run(method=method, **SMALL | flags | {"sparsity": 0.0})), load(run(method="dense", **SMALL))
    )


@pytest.mark.parametrize("method", ["dense", "tiny"])
def test_arms_without_a_mask_ignore_both(run, method):
    flags = {"init": "sparse", "active_width": 7}
    assert same_weights(load(run(method=method, **SMALL | flags)), load(run(method=method, **SMALL)))


@pytest.mark.parametrize("method", ["tar", "rigl"])
def test_all_neurons_are_the_default_and_i6_one_seed_gives_one_result(run, method):
    a, b = (load(run(method=method, active_width=width, **SMALL)) for width in (None, 24))
    assert same_weights(a, b)
    a, b = (load(run(method=method, active_width=10, init="sparse", **SMALL)) for _ in range(2))
    assert same_weights(a, b)


@pytest.mark.parametrize("width, init", CASES)
def test_sparse_and_masked_compute_agree(run, width, init):
    flags = {"active_width": width, "init": init, "sparsity": 0.9, "hidden_size": 32, "total_timesteps": 95}
    sparse, masked = load(run(compute="sparse", **flags)), load(run(compute="masked", **flags))
    for name in (name for name in masked if name.split("_")[0] in ("actor", "qf1", "qf2")):
        for key, tensor in masked[name].items():
            torch.testing.assert_close(sparse[name][key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compute", ["masked", "sparse"])
def test_the_networks_in_final_pt_have_no_dead_neurons_and_the_same_outputs(run, script, monkeypatch, capsys, compute):
    run_dir = run(active_width=10, init="sparse", compute=compute, **SMALL)
    whole, final = load(run_dir), load_final(run_dir)
    shapes = {layer: tuple(mask.shape) for layer, mask in final["masks"]["actor"].items()}
    outputs = len(whole["actor"]["fc3.bias"])
    assert shapes == {"fc1": (10, 3), "fc2": (10, 10), "fc3": (outputs, 10)}
    for name in ("qf1", "qf1_target", "qf2", "actor"):
        chain = {}
        for kind, state in (("whole", whole), ("final", final)):
            x = torch.linspace(-2, 2, 40 * state[name]["fc1.weight"].shape[1]).view(40, -1)
            for layer in ("fc1", "fc2", "fc3"):
                weight = state[name][f"{layer}.weight"]
                assert kind == "whole" or weight.shape == state["masks"][name.removesuffix("_target")][layer].shape
                x = nn.functional.linear(x if layer == "fc1" else x.relu(), weight, state[name][f"{layer}.bias"])
            chain[kind] = x
        torch.testing.assert_close(chain["final"], chain["whole"])
    monkeypatch.setattr(sys, "argv", [script.__file__, "--evaluate", str(run_dir), "--eval-episodes", "1"])
    script.main()
    assert f"mean {events(run_dir).Scalars('eval/episodic_return')[-1].value:.1f}" in capsys.readouterr().out


def test_the_mask_image_shows_what_is_outside_the_part(run):
    static = torch.tensor([[True, False], [False, False]])
    image = topology.mask_image(static, static, (2, 1))
    dark, grey, blue = [24, 26, 32], [176, 182, 192], [16, 32, 96]
    assert image[10, [10, 200, 274, 464]].tolist() == [grey, blue, grey, blue]
    assert image[200, [10, 200]].tolist() == [dark, blue]
    run_dir = run(active_width=10, **SMALL)
    assert "topology/qf1.fc2" in events(run_dir).Tags()["images"]
    table = events(run_dir).Tensors("topology/revival/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "10x10" in table


def test_what_makes_two_runs_the_same_one(script, monkeypatch):
    def identity(**flags):
        args = script.Args(**flags)
        given = record.identity(vars(args).copy())
        complete_args(args)  # as the run folder records it
        assert record.identity(vars(args)) == given
        return given

    assert identity(init="sparse") != identity() == identity(critic_init="dense", actor_init="dense")
    assert identity(active_width=48) != identity() == identity(active_width=256)
    assert identity(actor_sparsity=0.5, critic_sparsity=0.5) == identity(sparsity=0.5)
    assert identity(method="static", actor_method="tar", critic_method="tar") == identity(method="tar")
    assert identity(actor_method="dense", sparsity=0.5) == identity(actor_method="dense", critic_sparsity=0.5)
    assert identity(actor_method="dense", actor_init="sparse") == identity(actor_method="dense")
    assert identity(actor_method="static", critic_method="tar") != identity(actor_method="tar", critic_method="static")
    assert identity(method="dense", init="sparse", active_width=48) == identity(method="dense")
    assert identity(method="tar", regrow=False) == identity(method="tar")
    assert identity(method="rigl", regrow=False) != identity(method="rigl")


@pytest.fixture(scope="module")
def pairs():
    """2,000 observations and actions of a random policy on HalfCheetah-v4, as a critic reads them."""
    env = gym.make("HalfCheetah-v4")
    env.action_space.seed(1)
    observation, _ = env.reset(seed=1)
    rows = []
    for _ in range(2000):
        action = env.action_space.sample()
        rows.append(np.concatenate([observation, action], dtype=np.float32))
        observation, _, _, truncated, _ = env.step(action)
        if truncated:
            observation, _ = env.reset()
    env.close()
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize(
    "width, init, least, most",
    [(None, "dense", 0.6, 0.7), (None, "sparse", 0.25, 0.4), (48, "dense", 0, 0.01), (48, "sparse", 0, 0.01)],
)
def test_at_98_percent_most_units_of_all_256_do_not_switch_and_nearly_all_of_48_do(pairs, width, init, least, most):
    """Why an active width helps: fed by few inputs of the dense network's scale, a unit of the second layer keeps the
    sign of its bias, whatever comes in: it is dead or linear."""
    shares = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        critic = td3_tar.QNetwork(17, 6, 256)
        weights = su.linear_weights(critic)
        budget, _ = su.connection_budget(sum(w.numel() for w in weights.values()), "static", 0.98, 0.0)
        generator = torch.Generator().manual_seed(seed)
        masks = su.static_prune(weights, budget, "random", "er", generator, width=width)
        su.zero_pruned(critic, masks)
        if init == "sparse":
            su.scale_to_active_inputs(critic, masks)
        with torch.no_grad():
            on = (critic.fc2(critic.relu1(critic.fc1(pairs))) > 0)[:, masks["fc2"].any(1)]
        shares.append((on.all(0) | ~on.any(0)).float().mean().item())
    assert least <= np.mean(shares) <= most
