"""Cannistraci-Hebb arms: scores path by path, sampling, chain removal, early stop, cht, chts and tar_ch in runs."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import load, same_weights
from torch.optim.optimizer import register_optimizer_step_post_hook

import sparse_utils as su
from lab import record, run_folder

REWIRING = {"sparsity": 0.8, "total_timesteps": 200, "rewire_every": 40, "rewire_stop": 0.9}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_mask(seed, shape, density):
    return torch.rand(shape, generator=generator(seed)) < density


def layer(mask, weight=None, done=0.5, seed=0):
    return su.Layer(torch.zeros(mask.shape) if weight is None else weight, None, mask, generator(seed), done)


# scores


def path_by_path(mask):
    """CH2-L3n from its definition, on lists: the neurons on paths output - input - output - input of connections."""
    outputs, inputs = range(len(mask)), range(len(mask[0]))
    scores = [[0.0] * len(mask[0]) for _ in outputs]
    for u in outputs:
        for v in inputs:
            if mask[u][v]:
                continue
            paths = [(i, o) for i in inputs for o in outputs if mask[u][i] and mask[o][i] and mask[o][v]]
            community = {("in", i) for i, _ in paths} | {("out", o) for _, o in paths}
            for kind, neuron in community:
                if kind == "in":
                    neighbours = {("out", o) for o in outputs if mask[o][neuron]}
                else:
                    neighbours = {("in", i) for i in inputs if mask[neuron][i]}
                inside = len(neighbours & community)
                outside = len(neighbours - community - {("out", u), ("in", v)})
                scores[u][v] += (1 + inside) / (1 + outside)
    return scores


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 7), st.floats(0, 1))
def test_the_scores_are_those_of_the_paths_of_length_three(seed, n_out, n_in, density):
    mask = random_mask(seed, (n_out, n_in), density)
    assert su.ch_scores(mask).tolist() == [pytest.approx(row) for row in path_by_path(mask.tolist())]


def test_a_worked_score():
    """From output 0 to input 2 the only path is 0 - 0 - 1 - 2. Its input 0 also leads to output 2."""
    mask = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 0, 0]]).bool()
    assert su.ch_scores(mask)[0, 2] == (1 + 1) / (1 + 1) + (1 + 1) / (1 + 0)
    assert su.ch_scores(mask)[0, 1] == 0 and not su.ch_scores(mask)[mask].any()


def test_cht_grows_where_scores_are_highest_and_at_random_where_they_tie():
    mask = random_mask(1, (9, 8), 0.3)
    grown = su.grow(layer(mask), ~mask, 12, "cht") & ~mask
    scores = torch.tensor(path_by_path(mask.tolist()))
    assert int(grown.sum()) == 12 and scores[grown].min() >= scores[~mask & ~grown].max() - 1e-6
    empty = torch.zeros(5, 4).bool()  # no path anywhere
    hits = sum(su.grow(layer(empty, seed=seed), ~empty, 5, "cht").float() for seed in range(2000)) / 2000
    assert hits.flatten().tolist() == pytest.approx([0.25] * 20, abs=0.05)  # five standard deviations


# sampling


def test_a_sample_has_the_odds_that_were_given_and_zero_odds_come_last_at_random():
    mask, n = torch.ones(1, 5).bool(), 4000
    odds = torch.tensor([[1.0, 0.0, 3.0, 6.0, 0.0]])
    orders = [su.sample(odds, layer(mask, seed=seed)).argsort(descending=True)[0].tolist() for seed in range(n)]
    first = [sum(order[0] == i for order in orders) / n for i in range(5)]
    assert first == pytest.approx([0.1, 0, 0.3, 0.6, 0], abs=0.04)  # five standard deviations
    second = sum(order[:2] == [3, 2] for order in orders) / n  # without replacement: 0.6 * 3 / 4
    assert second == pytest.approx(0.45, abs=0.04)
    assert all(set(order[3:]) == {1, 4} for order in orders)
    assert sum(order[3] == 1 for order in orders) / n == pytest.approx(0.5, abs=0.04)


def test_chts_grows_by_the_odds_of_the_scores():
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    scores = torch.tensor(path_by_path(mask.tolist()))
    assert int((scores > 0).sum()) == 4
    hits = sum(su.grow(layer(mask, seed=seed), ~mask, 1, "chts") & ~mask for seed in range(3000)).float() / 3000
    assert hits.flatten().tolist() == pytest.approx((scores / scores.sum()).flatten().tolist(), abs=0.046)


@pytest.mark.parametrize("done, temperature", [(0.0, 1), (0.5, 2), (1.0, 3)])
def test_soft_dropping_keeps_by_the_odds_of_a_power_that_grows(done, temperature):
    weight, mask = torch.tensor([[-2.0, 1.0, 5.0]]), torch.tensor([[True, True, False]])
    kept = [su.drop(layer(mask, weight, done, seed), 1, "soft")[0].tolist() for seed in range(3000)]
    expected = 2**temperature / (2**temperature + 1)
    assert sum(k == [True, False, False] for k in kept) / 3000 == pytest.approx(expected, abs=0.044)
    assert all(sum(k) == 1 and not k[2] for k in kept)


# chains


def one_by_one(masks, stopped):
    """Takes away connections of one dead hidden neuron at a time until there is none."""
    masks = {name: m.clone() for name, m in masks.items()}
    names, again = list(masks), True
    while again:
        again = False
        for a, b in zip(names, names[1:]):
            for neuron in range(masks[a].shape[0]):
                into, out_of = masks[a][neuron], masks[b][:, neuron]
                if into.any() and not out_of.any() and a not in stopped:
                    into[:], again = False, True
                if out_of.any() and not into.any() and b not in stopped:
                    out_of[:], again = False, True
    return masks


@given(st.integers(0, 10**6), st.lists(st.integers(1, 8), min_size=3, max_size=6), st.floats(0, 0.5))
def test_chain_removal_takes_all_that_leads_nowhere_and_nothing_else(seed, sizes, density):
    shapes = zip(sizes[1:], sizes)
    masks = {f"fc{i}": random_mask(seed + i, shape, density) for i, shape in enumerate(shapes)}
    expected = one_by_one(masks, [])
    su.remove_chains(masks, [])
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


def test_chain_removal_spares_a_layer_that_has_stopped_and_inputs_and_outputs():
    masks = {"fc1": torch.tensor([[1, 1], [0, 0]]).bool(), "fc2": torch.tensor([[0, 1], [0, 1], [0, 0]]).bool()}
    spared = {name: m.clone() for name, m in masks.items()}
    su.remove_chains(spared, ["fc1"])
    assert torch.equal(spared["fc1"], masks["fc1"]) and not spared["fc2"].any()
    su.remove_chains(masks, [])
    assert not masks["fc1"].any() and not masks["fc2"].any()


@pytest.mark.parametrize("method, leads_nowhere", [("cht", False), ("set", True)])
def test_a_rewiring_moves_chains_into_the_same_layer(method, leads_nowhere):
    """Hidden neuron 0 has two inputs and no output; nothing is dropped but its connections, all counts stay."""
    masks = {"fc1": random_mask(3, (6, 6), 0.5), "fc2": random_mask(4, (4, 6), 0.6)}
    masks["fc1"][0], masks["fc1"][1:, 2] = torch.tensor([1, 1, 0, 0, 0, 0]).bool(), True
    masks["fc2"][:, 0], masks["fc2"][0, 1:] = False, True
    before = {name: int(m.sum()) for name, m in masks.items()}
    for group in [masks] if method == "cht" else [{name: m} for name, m in masks.items()]:
        su.rewire({name: layer(m) for name, m in group.items()}, before, [], 0.0, method, "magnitude", True)
    assert {name: int(m.sum()) for name, m in masks.items()} == before
    assert masks["fc1"][0].any() == leads_nowhere


# early stop


@pytest.mark.parametrize("back, settled", [(9, False), (10, True)])
def test_a_layer_stops_when_more_than_nine_tenths_grow_back(monkeypatch, back, settled):
    mask = torch.zeros(10, 10).bool()
    mask.view(-1)[:20] = True  # ten are dropped: the first ones, of lowest weight
    weight = torch.arange(100.0).view(10, 10) + 1
    grows = torch.zeros(100)
    grows[:back], grows[50 : 60 - back] = 2, 1
    monkeypatch.setitem(su.GROWTHS, "given", su.Rule(lambda _: grows.view(10, 10), by_topology=True))
    stopped, rules = [], ("given", "magnitude", True)
    su.rewire({"fc": layer(mask, weight)}, {"fc": 20}, stopped, 0.5, *rules)
    assert stopped == ["fc"] * settled and int(mask[0].sum()) == back
    before = mask.clone()
    grows[:] = torch.arange(100)
    su.rewire({"fc": layer(mask, weight)}, {"fc": 20}, stopped, 0.5, *rules)
    assert torch.equal(mask, before) == settled and int(mask.sum()) == 20


# runs


@pytest.mark.parametrize("active, settled", [(20, False), (19, False), (14, True)])
def test_a_layer_that_can_hardly_grow_elsewhere_does_not_stop(active, settled):
    """Half of the connections are dropped and all of them come back, of 20 places."""
    mask = torch.zeros(4, 5).bool()
    mask.view(-1)[:active] = True
    stopped = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(su.GROWTHS, "back", su.Rule(lambda of: -torch.arange(20.0).view(4, 5), by_topology=True))
        weight = torch.arange(20.0).view(4, 5) + 1
        su.rewire({"fc": layer(mask, weight)}, {"fc": active}, stopped, 0.4, "back", "magnitude", True)
    assert stopped == ["fc"] * settled and int(mask.sum()) == active


@pytest.mark.parametrize("compute", ["masked", "sparse"])
@pytest.mark.parametrize("method, width", [("cht", None), ("chts", None), ("chts", 14)])
def test_counts_are_exact_and_nothing_is_outside_the_mask(run, script, monkeypatch, method, width, compute):
    seen, log_rewiring = [], run_folder.log_rewiring

    def spy(writer, run_dir, step, first, previous, masks):
        for name, layers in masks.items():
            assert [int(m.sum()) for m in layers.values()] == [int(m.sum()) for m in previous[name].values()]
            assert any(not torch.equal(m, previous[name][key]) for key, m in layers.items()) or step > 80
            if width:
                assert not any(m[width:].any() for m in list(layers.values())[:-1])
        seen.append(step)
        return log_rewiring(writer, run_dir, step, first, previous, masks)

    monkeypatch.setattr(run_folder, "log_rewiring", spy)
    run_dir = run(method=method, compute=compute, active_width=width, **REWIRING | {"sparsity": 0.85})
    final, checkpoint = load(run_dir), torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert seen == [80, 120, 160]
    for name, layers in checkpoint["masks"].items():
        assert sum(int(m.sum()) for m in layers.values()) == round(0.15 * sum(m.numel() for m in layers.values()))
        for key, mask in layers.items():
            moments = checkpoint["adam"][name][f"{key}.weight"]
            networks = [checkpoint[n] for n in (name, f"{name}_target") if n in checkpoint]
            for tensor in (moments["exp_avg"], moments["exp_avg_sq"], *(n[f"{key}.weight"] for n in networks)):
                assert not tensor[~mask].any() and tensor[mask].any()
    assert final["args"]["drop_criterion"] == {"cht": "magnitude", "chts": "soft"}[method]


@pytest.mark.parametrize("method", ["cht", "chts"])
def test_nothing_leaves_zero_between_rewirings(run, monkeypatch, method):
    networks, checks, fix_masks = {}, [], su.fix_masks

    def spy_fix(nets, targets, optimizers, masks):
        networks.update(nets=nets, masks=masks)
        return fix_masks(nets, targets, optimizers, masks)

    def after_step(*_):
        for name, network in networks.get("nets", {}).items():
            for key, weight in su.linear_weights(network).items():
                checks.append(bool(weight[~networks["masks"][name][key]].any()))

    monkeypatch.setattr(su, "fix_masks", spy_fix)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        run(method=method, **REWIRING)
    finally:
        hook.remove()
    assert len(checks) > 1000 and not any(checks)


def test_one_seed_has_one_result_and_at_sparsity_zero_it_is_dense(run):
    a, b = (load(run(method="chts", **REWIRING)) for _ in range(2))
    assert same_weights(a, b)
    whole = [load(run(method=method, **REWIRING | {"sparsity": 0.0})) for method in ("chts", "dense")]
    assert same_weights(*whole)


def test_a_network_that_has_stopped_is_rewired_no_more(run, monkeypatch):
    monkeypatch.setattr(su, "EARLY_STOP", -1.0)
    run_dir = run(method="cht", **REWIRING | {"sparsity": 0.9})
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["stopped"] == {name: ["fc1", "fc2", "fc3"] for name in ("actor", "qf1", "qf2")}
    report = json.loads((run_dir / "topology.json").read_text())
    last = [row["last_rewiring"] for network in report.values() for row in network["layers"].values()]
    assert [(row["step"], row["replaced"]) for row in last] == [(160, 0)] * 9


# flags


def test_each_arm_drops_as_its_source_unless_told_otherwise(run):
    drops = {"method": "chts", "drop_criterion": None, "actor_method": None, "critic_method": None}
    assert record.identity(drops) == record.identity(drops | {"drop_criterion": "soft"})
    assert record.identity(drops) != record.identity(drops | {"drop_criterion": "magnitude"})
    assert record.identity(drops | {"method": "rigl"})["drop_criterion"] == "magnitude"
    run_dir = run(method="chts", drop_criterion="snip", **REWIRING)
    assert load(run_dir)["args"]["drop_criterion"] == "snip"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"actor_method": "rigl", "critic_method": "chts"}, "rigl by magnitude and chts by soft; choose one"),
        ({"method": "cht", "regrow": False}, "--method cht stops in a layer where what was dropped grows again"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(run, capsys, tmp_path, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err and not list(tmp_path.iterdir())


# revival


def test_tar_ch_revives_as_many_in_each_layer_as_tar_and_the_highest_scores(run):
    flags = {"sparsity": 0.85, "reserve": 0.2}
    reports = {}
    for method in ("tar", "tar_ch"):
        run_dir = run(method=method, **flags)
        reports[method] = json.loads((run_dir / "topology.json").read_text())
    assert "__tar_ch__random-er__" in run_dir.name
    assert reports["tar"].keys() == reports["tar_ch"].keys()
    for name, network in reports["tar"].items():
        for key, row in network["layers"].items():
            assert row["revived"] == reports["tar_ch"][name]["layers"][key]["revived"]
    mask = random_mask(5, (12, 9), 0.3)
    revived = su.revive({"fc": mask}, [15], generator(), su.PLACES["tar_ch"])["fc"]
    added, scores = revived & ~mask, torch.tensor(path_by_path(mask.tolist()))
    assert int(added.sum()) == 15 and not (mask & ~revived).any()
    assert scores[added].min() >= scores[~revived].max() - 1e-6


def test_the_run_of_tar_ch_places_by_its_scores(run, monkeypatch):
    seen, ch_scores = [], su.ch_scores
    monkeypatch.setattr(su, "ch_scores", lambda mask: seen.append(mask.shape) or ch_scores(mask))
    run(method="tar_ch", critic_method="tar")
    assert len(seen) == 3  # the actor's layers
