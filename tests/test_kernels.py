"""The kernels against float64 and torch, their Adam against torch's, and which networks they compute in which way."""

import copy
import dataclasses
import itertools
import os
import random
import shlex
import subprocess
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sac_tar
import sparse_utils
from lab import kernels
from sparse_utils import Net


def layers(*sizes):
    found = OrderedDict()
    for i, size in enumerate(zip(sizes, sizes[1:])):
        found |= {f"relu{i}": nn.ReLU()} if i else {}
        found |= {f"fc{i}": nn.Linear(*size)}
    return found


def chain(*sizes):
    return nn.Sequential(layers(*sizes))


class Tanh(nn.Sequential):
    """Has the layers of a chain, but reads them by their names, as in CleanRL."""

    def __init__(self, *sizes):
        super().__init__(layers(*sizes))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(torch.tanh(self.fc0(x)))))


class Normed(nn.Module):
    """LayerNorm between layers, one of them nested, and inputs of three dimensions; torch.fx cannot follow its `if`."""

    def __init__(self, n_in, *sizes):
        super().__init__()
        self.fc0, self.norm, self.trunk = nn.Linear(n_in, sizes[0]), nn.LayerNorm(sizes[0]), chain(*sizes)

    def forward(self, x):
        if x.dim() != 2:
            raise ValueError(x.shape)
        return self.trunk(self.norm(self.fc0(x.unsqueeze(1))).relu()).squeeze(1)


def make_mlp(sizes, density, seed):
    """A network in float64, zero where pruned, and its SparseMLP. Odd seeds have empty and full rows; of even ones
    every third layer is dense."""
    torch.manual_seed(seed)
    network = chain(*sizes)
    weights = sparse_utils.linear_weights(network)
    masks = {name: torch.rand(weight.shape) < density for name, weight in weights.items()}
    for i, mask in enumerate(masks.values()):
        if seed % 2:
            mask[0], mask[-1] = True, False
            mask[:, mask.shape[1] // 2] = False
        elif (i + seed // 2) % 3 == 0:
            mask[:] = True
    for name, weight in weights.items():
        weight.data.mul_(masks[name])
    mlp = kernels.SparseMLP({name: network.get_submodule(name) for name in masks}, masks)
    return network.double(), mlp


def make_nets(method="static", kind=chain):
    """Rows of an actor and of two critics that share an optimizer, planned and not pruned."""
    torch.manual_seed(0)
    actor, qf1, qf2 = chain(3, 9, 2), kind(5, 9, 9, 1), kind(5, 9, 9, 1)
    q_optimizer = kernels.Adam([p for pair in zip(qf1.parameters(), qf2.parameters()) for p in pair], lr=1e-2)
    nets = {"actor": Net(actor, None, kernels.Adam(actor.parameters(), lr=1e-2), method, 0.6)}
    nets |= {n: Net(qf, copy.deepcopy(qf), q_optimizer, method, 0.6) for n, qf in {"qf1": qf1, "qf2": qf2}.items()}
    for net in nets.values():
        sparse_utils.plan(net, 0.0)
    return nets


def prune(nets, seed=0):
    for net in nets.values():
        net.masks = {}
        net.masks = sparse_utils.static_prune(net, net.budget, "random", "er", torch.Generator().manual_seed(seed))
    sparse_utils.fix_masks(nets)


def update(nets, between=lambda: None):
    """A step of each optimizer and of the targets; `between` is called after the backward passes."""
    optimizers = {net.optimizer for net in nets.values()}
    for optimizer in optimizers:
        optimizer.zero_grad()
    for name, net in nets.items():
        net.network(torch.linspace(-1, 1, 60).view(-1, 3 if name == "actor" else 5)).square().sum().backward()
    between()
    for optimizer in optimizers:
        optimizer.step()
    for net in (nets["qf1"], nets["qf2"]):
        for param, target in zip(net.network.parameters(), net.target.parameters(), strict=True):
            target.data.lerp_(param.data, 0.1)


def contents(nets):
    """Copies of all that trains."""
    modules = [module for net in nets.values() for module in (net.network, net.target) if module]
    states = [net.optimizer.state.get(param, {}) for net in nets.values() for param in net.network.parameters()]
    tensors = [*(module.state_dict() for module in modules), *states]
    return [part[key].clone() for part in tensors for key in sorted(part)]


# THE KERNELS

SIZES = st.lists(st.integers(1, 70) | st.sampled_from([127, 128, 130]), min_size=2, max_size=5)  # past two tiles
BATCH = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 256])


@settings(max_examples=40)
@given(SIZES, BATCH, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_forward_and_gradients_match_float64(sizes, batch, density, seed):
    compare_with_float64(sizes, batch, density, seed)


def compare_with_float64(sizes, batch, density, seed):
    network, mlp = make_mlp(sizes, density, seed)
    x, grad_y = torch.randn(sizes[0], batch).T.requires_grad_(), torch.randn(sizes[-1], batch).T  # not contiguous
    y, expected = mlp(x), network(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5 * (1 + expected.abs().max().item()))
    with torch.no_grad():
        assert torch.equal(mlp(x), y)
    grad_x, grad_flat = torch.autograd.grad(y, [x, mlp.flat], grad_y)
    expected_x, *gradients = torch.autograd.grad(expected, [x, *network.parameters()], grad_y.double())
    for got, want in ((grad_x, expected_x), (grad_flat, mlp.compress(gradients))):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-4 * (1 + want.abs().max().item()))


@settings(max_examples=12)
@given(SIZES, BATCH, st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_the_number_of_threads_does_not_change_a_bit(sizes, batch, density, seed):
    _, mlp = make_mlp(sizes, density, seed)
    x, grad_y = torch.randn(batch, sizes[0], requires_grad=True), torch.randn(batch, sizes[-1])
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = mlp(x)
        with torch.no_grad():
            alone = mlp(x)
        results.append((y, alone, *torch.autograd.grad(y, [x, mlp.flat], grad_y)))
    torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


def test_there_are_threads_where_the_compiler_can_make_them(tmp_path):
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    build = [*compiler, "-fopenmp", "-shared", "-fPIC", "-x", "c++", "-", "-o", tmp_path / "threads.so"]
    can = subprocess.run(build, input=b"#include <omp.h>\nint f() { return omp_get_max_threads(); }").returncode == 0
    assert hasattr(kernels.load_kernels(), "omp_get_max_threads") == can


def test_only_gradients_that_someone_needs_are_computed_and_a_retained_graph_gives_them_again():
    network, mlp = make_mlp([5, 9, 2], 0.6, 0)
    x = torch.randn(40, 5)
    loss = mlp(x).sum()
    first, second = (torch.autograd.grad(loss, mlp.flat, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)
    mlp.flat.requires_grad_(False)
    assert not mlp(x).requires_grad
    mlp(x.requires_grad_()).sum().backward()
    expected = torch.autograd.grad(network(x.double()).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert mlp.flat.grad is None


def test_not_a_number_passes_the_relu_as_in_torch():
    """Or a diverged network would look healthy."""
    network, mlp = make_mlp([3, 8, 2], 1.0, 0)
    x = torch.randn(20, 3)
    x[4, 1] = float("nan")
    y = mlp(x)
    assert y[4].isnan().all() and y[:4].isfinite().all() and y[5:].isfinite().all()
    gradients = torch.autograd.grad(network(x.double()).sum(), network.parameters())
    got, expected = torch.autograd.grad(y.sum(), mlp.flat)[0], mlp.compress(gradients)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inputs_that_the_kernels_cannot_read_are_refused():
    mlp = make_mlp([5, 9, 2], 0.6, 0)[1]
    inputs = [torch.zeros(shape) for shape in ((4, 6), (4,), (2, 5, 4))] + [torch.zeros(4, 5).double()]
    refused = [(mlp, x) for x in [*inputs, torch.zeros(4, 5, device="meta")]]
    moved = [copy.deepcopy(mlp).double(), copy.deepcopy(mlp).to("meta")]
    for network, x in [*refused, *((network, torch.zeros(4, 5)) for network in moved)]:
        with torch.no_grad(), pytest.raises(ValueError, match="need float32 of shape"):
            network(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="without autocast"):
        mlp(torch.zeros(4, 5))


def test_inputs_of_other_dimensions_are_read_as_by_a_layer_of_torch():
    network, mlp = make_mlp([5, 2], 0.6, 0)
    for shape in ((5,), (0, 5), (2, 3, 5), (2, 1, 3, 5)):
        x = torch.randn(shape)
        torch.testing.assert_close(mlp(x).double(), network(x.double()), rtol=1e-4, atol=1e-5)


# WHAT TAKES THE PLACE OF LAYERS


def in_kernels(network):
    return [name for name, module in network.named_modules() if isinstance(module, kernels.SparseMLP)]


@pytest.mark.parametrize(
    "kind, names", [(chain, ["sparse"]), (Tanh, ["fc0", "fc1", "fc2"]), (Normed, ["fc0", "trunk.fc0", "trunk.fc1"])]
)
def test_compacting_and_expanding_change_no_bit_and_training_between_is_that_of_torch(monkeypatch, kind, names):
    """Masks come after dense training, and change later; the second critic stays in torch."""
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets, twins = make_nets(kind=kind), make_nets(kind=kind)
    nets["actor"].in_kernels = nets["qf1"].in_kernels = True
    parameters = {name: list(net.network.parameters()) for name, net in nets.items()}
    modules = {name: [*net.network.named_modules(), *net.target.named_modules()] for name, net in [*nets.items()][1:]}
    groups = {net.optimizer: list(map(id, net.optimizer.param_groups[0]["params"])) for net in nets.values()}
    kernels.compact(nets)
    assert not in_kernels(nets["qf1"].network)  # nothing is pruned yet
    for seed in range(2):
        update(nets), update(twins)
        prune(twins, seed)
        with kernels.in_torch(nets):
            prune(nets, seed)
            pruned = contents(nets)
        assert [in_kernels(net.network) for net in nets.values()] == [["sparse"], names, []]
        assert in_kernels(nets["qf1"].target) == names
        assert all(param.grad is None for param in parameters["qf1"] if param.dim() == 2)  # or Adam would move them
        for _ in range(2):
            with kernels.in_torch(nets):
                assert same(contents(nets), pruned)
        for _ in range(3):
            update(nets), update(twins)
        with kernels.in_torch(nets):
            for got, expected in zip(contents(nets), contents(twins), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
            for name, net in nets.items():
                assert all(a is b for a, b in zip(net.network.parameters(), parameters[name], strict=True))
                assert not any(weight[~net.masks[layer]].any() for layer, weight in net.weights.items())
                params = net.optimizer.param_groups[0]["params"]
                assert len(net.optimizer.state) == len(params) and list(map(id, params)) == groups[net.optimizer]
                assert len({id(net.optimizer.state[p]["step"]) for p in params}) == len(params)  # each counts by itself
            for name, before in modules.items():
                assert [*nets[name].network.named_modules(), *nets[name].target.named_modules()] == before


@pytest.mark.parametrize("swapped", [False, True])
def test_groups_keep_their_rates_frozen_networks_stay_frozen_and_an_error_leaves_all_in_torch(swapped):
    net, other = make_nets()["actor"], nn.Parameter(torch.ones(1))
    groups = [{"params": net.network.parameters(), "lr": 1e-2}, {"params": [other], "lr": 5e-2}]
    net.optimizer, net.in_kernels = torch.optim.Adam(reversed(groups) if swapped else groups), True
    net.target = copy.deepcopy(net.network).requires_grad_(False)
    with kernels.in_torch({"actor": net}):
        prune({"actor": net})
    flat = net.network.sparse.flat
    (own,) = [group for group in net.optimizer.param_groups if any(param is flat for param in group["params"])]
    assert own["lr"] == 1e-2 and all(param is flat or param.grad is None for param in own["params"])
    assert flat.requires_grad and not net.target.sparse.flat.requires_grad
    net.target.requires_grad_(True)
    with pytest.raises(KeyError), kernels.in_torch({"actor": net}):
        raise KeyError
    assert list(dict(net.network.named_children())) == ["fc0", "relu1", "fc1"]
    assert all(param.requires_grad for param in net.target.parameters())


def test_a_compact_network_can_be_copied_and_saved(tmp_path):
    x, masks = torch.linspace(-1, 1, 100).view(20, 5), {"fc0": torch.rand(9, 5) < 0.5, "fc1": torch.rand(2, 9) < 0.5}
    for parts in ([["fc0", "relu1", "fc1"]], [["fc0"], ["fc1"]]):
        network = chain(5, 9, 2)
        for names in parts:
            kernels.compact_part(network, names, masks)
        torch.save(network, tmp_path / "network.pt")
        for other in (copy.deepcopy(network), torch.load(tmp_path / "network.pt", weights_only=False)):
            assert torch.equal(other(x), network(x))
            for param in other.parameters():
                param.data.zero_()
            assert network(x).any() and not other(x).any()
            for name in in_kernels(other):
                kernels.expand_part(other, other.get_submodule(name))
            assert list(dict(other.named_children())) == ["fc0", "relu1", "fc1"] and not other(x).any()


# NETWORKS THAT ARE WRITTEN OTHERWISE


class Own(nn.Sequential):
    """Layers of a chain, run by a function of its own."""

    def __init__(self, run):
        super().__init__(layers(5, 9, 5))
        self.run = run

    def forward(self, x):
        return self.run(self, super().forward, x)


def collect(self, run, x):
    seen = []
    for layer in self:
        seen.append(x := layer(x))
    return sum(map(torch.mean, seen))


OWN = {
    "input and output": (lambda self, run, x: run(torch.cat([x[:, :2], x[:, 2:]], 1)).chunk(2, 1)[0], True),
    "twice": (lambda self, run, x: run(x) + run(x + 1), True),
    "noise": (lambda self, run, x: run(x) + torch.randn(1), True),
    "an if": (lambda self, run, x: run(x) if x.sum() > 0 else x, False),
    "by name": (lambda self, run, x: self.fc1(self.relu1(self.fc0(x))), False),
    "by number": (lambda self, run, x: self[2](self[1](self[0](x))), False),
    "other order": (lambda self, run, x: self[0](self[1](self[2](x))), False),
    "between": (lambda self, run, x: self[2](torch.tanh(self[0](x))), False),
    "collected": (collect, False),
    "drawn": (lambda self, run, x: run(x) + random.random() + np.random.rand(), True),
    "kept": (lambda self, run, x: [run(x), setattr(self, "features", run(x))][0], False),
    "kept in a list": (lambda self, run, x: [run(x), setattr(self, "features", {"all": [run(x)]})][0], False),
}


@pytest.mark.parametrize("name", OWN)
def test_only_what_is_run_as_a_chain_is_computed_as_one_and_the_rest_layer_by_layer(name, compiler):
    """To look at a network changes neither it nor the random numbers."""
    run, expected = OWN[name]
    network, state, others = Own(run), torch.get_rng_state(), (random.getstate(), np.random.get_state())
    net = Net(network, None, kernels.Adam(network.parameters()), "static", 0.9)
    sparse_utils.plan(net, 0.0)
    assert kernels.why_not_in_kernels(net, {"net": net}) is None and kernels.is_chain(net) == expected
    assert same((random.getstate(), np.random.get_state()), others)
    assert torch.equal(torch.get_rng_state(), state) and list(dict(network.named_children())) == ["fc0", "relu1", "fc1"]


@pytest.mark.parametrize("kind", [chain, Tanh])
def test_who_reads_a_layer_that_is_in_the_kernels_is_told_where_it_is(monkeypatch, kind):
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets = make_nets(kind=kind)
    nets["qf1"].in_kernels, network = True, nets["qf1"].network
    with kernels.in_torch(nets):
        prune(nets)
        weight = network.fc1.weight.clone()
    reads, of_a_chain = [lambda: network.fc1.weight, lambda: network.fc1.bias], lambda: network.fc1(torch.ones(1, 9))
    reads += [lambda: sparse_utils.linear_weights(network), lambda: copy.deepcopy(network.state_dict())]
    reads += [lambda: network.apply(print), lambda: network.load_state_dict(nets["qf2"].network.state_dict())]
    reads += [lambda: network.fc1.reset_parameters()]
    of_a_chain = [of_a_chain, lambda: network.relu1.inplace, lambda: setattr(network.fc1, "bias", None)]
    of_a_chain += [lambda: network.fc1.in_features]
    for read in [*reads, *of_a_chain] if kind is chain else reads:
        with pytest.raises(RuntimeError, match=r"do it inside `with kernels.in_torch\(nets\):`"):
            read()
    if kind is Tanh:
        assert (network.fc1.out_features, network.fc1.in_features) == weight.shape
    with kernels.in_torch(nets):
        assert torch.equal(network.fc1.weight, weight)
    with pytest.raises(RuntimeError, match="do it inside"):
        sparse_utils.revive(nets["qf1"], [0, 0, 0], torch.Generator())
    nets["qf1"].masks["fc1"] = ~nets["qf1"].masks["fc1"]
    with pytest.raises(RuntimeError, match="masks of the qf1 changed outside of"), kernels.in_torch(nets):
        pass


class Asking(nn.ModuleList):
    """Asks for the type of each layer, and names its input."""

    def __init__(self, *sizes):
        super().__init__(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self:
            x = layer(input=x)
            if isinstance(layer, nn.Linear) and layer is not self[-1]:
                x = torch.relu(x)
        return x


class Featured(nn.Sequential):
    def __init__(self, *sizes):
        super().__init__(layers(*sizes))

    @torch.no_grad()
    def features(self, x):
        return self.relu1(self.fc0(x))


class Initialized(nn.Sequential):
    """A chain, whose constructor and forward are written otherwise."""

    def __init__(self, *sizes):
        super().__init__(layers(*sizes))
        self.fill()

    def fill(self):
        nn.init.ones_(self.fc1.weight)

    def forward(network, x):
        for layer in network:
            x = layer(x)
        return x


class Elsewhere(nn.Module):
    """Goes through the layers of another network in its forward."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        for layer in list(self.network)[:-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Asking, Featured, Initialized, chain])
def test_layers_that_a_class_uses_in_its_own_way_give_what_they_give_in_torch_or_are_refused(monkeypatch, kind):
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets, x = make_nets(kind=kind), torch.linspace(-1, 1, 60).view(12, 5)
    net = nets["qf1"]
    net.in_kernels, network, of_another = True, net.network, Elsewhere(net.network)
    used = [network, *([network.features, of_another] if kind is Featured else [])]
    with kernels.in_torch(nets):
        prune(nets)
        expected = [use(x) for use in used]
    assert len(in_kernels(network)) == (1 if kind in (chain, Initialized) else 3)
    for use, before in zip(used, expected, strict=True):
        torch.testing.assert_close(use(x), before)
    if kind is chain:
        with pytest.raises(RuntimeError, match="do it inside"):
            of_another(x)


def keep(self, run, x):
    self.features = x = self.fc1(self.relu1(self.fc0(x)))
    return x[:, :1]


def test_a_layer_that_is_not_to_be_pruned_stays_in_its_network(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    every = sparse_utils.linear_weights
    few = lambda network: {name: weight for name, weight in every(network).items() if weight.shape[0] > 1}  # noqa: E731
    monkeypatch.setattr(sparse_utils, "linear_weights", few)
    nets = make_nets()
    net, x = nets["qf1"], torch.linspace(-1, 1, 50).view(10, 5)
    net.in_kernels = True
    with kernels.in_torch(nets):
        prune(nets)
        expected = net.network(x)
    torch.testing.assert_close(net.network(x), expected)
    assert in_kernels(net.network) == [*net.masks] and len(net.masks) == len(every(chain(5, 9, 9, 1))) - 1


def test_what_forward_leaves_in_a_network_is_that_of_its_last_pass(monkeypatch, capsys):
    """Though it cannot be copied, and so not be timed."""
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets = make_nets()
    net = nets["qf1"]
    net.network, net.target = Own(keep), None
    net.optimizer = kernels.Adam(net.network.parameters())
    sparse_utils.plan(net, 0.0)
    net.network(torch.ones(2, 5))
    kernels.choose({"qf1": net}, "auto", 2)
    assert "qf1 masked, since it cannot be copied to be timed: Only Tensors created" in capsys.readouterr().out
    net.in_kernels = True
    for seed in range(3):
        with kernels.in_torch({"qf1": net}):
            prune({"qf1": net}, seed)
        assert in_kernels(net.network) == ["fc0", "fc1"]
        assert torch.equal(net.network(torch.ones(2, 5)), net.network.features[:, :1])
        net.network.features.square().sum().backward()
        net.optimizer.step()


@pytest.mark.parametrize("kind", [chain, Tanh])
def test_a_loss_lives_on_one_side_of_the_block_alone(monkeypatch, kind):
    """The weights that it reads are not those that train on the other side."""
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets, x = make_nets(kind=kind), torch.ones(1, 5)
    net = nets["qf1"]
    net.in_kernels = True
    with kernels.in_torch(nets):
        prune(nets)
        inside = sum(weight.abs().sum() for weight in net.weights.values())
    outside = net.network(x).sum()
    with pytest.raises(RuntimeError, match="once layers have entered or left the kernels"):
        inside.backward()
    with kernels.frozen(net.network), kernels.in_torch(nets):  # also while nothing is to get a gradient
        with pytest.raises(RuntimeError, match="once layers have entered or left the kernels"):
            outside.backward()
        inside = net.weights["fc0"].requires_grad_(True).abs().sum()
        net.weights["fc0"].requires_grad_(False)
    with pytest.raises(RuntimeError, match="once layers have entered or left the kernels"):
        inside.backward()
    update(nets)
    assert in_kernels(net.network)


@pytest.mark.parametrize("kind", [chain, Tanh])
def test_a_network_is_frozen_in_its_block_alone_whoever_looks_into_it_there(monkeypatch, kind):
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets = make_nets(kind=kind)
    for net in nets.values():
        net.in_kernels = net is not nets["actor"]
    with kernels.in_torch(nets):
        prune(nets)
        nets["qf2"].network.requires_grad_(False)
    critics = nn.ModuleList([nets["qf1"].network, nets["qf2"].network])
    before = {name: param.requires_grad for name, param in critics.named_parameters()}
    assert {*before.values()} == {True, False} and len(in_kernels(critics)) == len(before)
    with kernels.frozen(critics):
        assert not any(param.requires_grad for param in critics.parameters())
        with kernels.in_torch(nets):
            assert not any(param.requires_grad for param in critics.parameters())
    assert {name: param.requires_grad for name, param in critics.named_parameters()} == before


def test_a_gradient_of_a_gradient_is_refused():
    _, mlp = make_mlp([4, 9, 1], 0.5, 0)
    x = torch.ones(3, 4, requires_grad=True)
    torch.autograd.grad(mlp(x).sum(), x)
    with pytest.raises(RuntimeError, match="no second derivative; train with --compute masked"):
        torch.autograd.grad(mlp(x).sum(), x, create_graph=True)


def test_a_network_that_got_a_hook_after_the_choice_stays_in_torch_and_the_console_says_so(capsys):
    nets, seen = make_nets(), []
    nets["qf1"].in_kernels = nets["qf2"].in_kernels = True
    nets["qf1"].network.fc1.register_forward_hook(lambda *_: seen.append(_))
    with kernels.in_torch(nets):
        prune(nets)
    update(nets)
    assert seen and [in_kernels(net.network) for net in nets.values()] == [[], [], ["sparse"]]
    assert capsys.readouterr().out == f"compute: qf1 goes on in torch, since {PLAIN}\n"


@pytest.mark.parametrize("edit", ["state", "grad"])
def test_adam_may_start_anew_or_pause_in_one_layer_alone(monkeypatch, edit):
    """Then layers count other steps, and a vector of all has one count."""
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    nets, twins = make_nets(), make_nets()
    nets["qf1"].in_kernels = True
    for rows in (nets, twins):
        with kernels.in_torch(rows):
            prune(rows)
        update(rows), update(rows)

        def change(rows=rows):
            with kernels.in_torch(rows):
                for param in rows["qf1"].network.fc1.parameters():
                    if edit == "state":
                        rows["qf1"].optimizer.state.pop(param)
                    else:
                        param.grad = None

        update(rows, change), update(rows)
    assert in_kernels(nets["qf1"].network) == ["fc0", "fc1", "fc2"]
    with kernels.in_torch(nets):
        for got, expected in zip(contents(nets), contents(twins), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_a_layer_with_many_connections_stays_in_torch_unless_it_is_in_a_chain():
    for kind in (Normed, chain):
        net = make_nets(kind=kind)["qf1"]
        net.in_kernels, net.budget = True, 30
        with kernels.in_torch({"qf1": net}):
            prune({"qf1": net})
        few = [name for name, mask in net.masks.items() if mask.float().mean() <= kernels.MOST_BY_LAYER]
        assert bool(kernels.choose({"qf1": make_nets(kind=kind)["qf1"]}, "auto", 8)) == (kind is chain)  # it has 40%
        assert in_kernels(net.network) == (few if kind is Normed else ["sparse"]) and 0 < len(few) < len(net.masks)


class NormedCritic(Normed):
    def __init__(self, env, hidden_size):
        super().__init__(4, hidden_size, hidden_size, 1)

    def forward(self, x, a):
        return super().forward(torch.cat([x, a], 1))


class TanhCritic(sac_tar.QNetwork):
    def forward(self, x, a):
        return self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(torch.cat([x, a], 1))))))


@pytest.mark.parametrize("critic", [NormedCritic, TanhCritic])
def test_a_critic_that_is_no_chain_trains_past_the_pruning(run, monkeypatch, capsys, critic):
    monkeypatch.setattr(sac_tar, "QNetwork", critic)
    seen, update = [], sac_tar.polyak_update
    see = lambda targets, networks, tau: seen.append([*map(in_kernels, networks)]) or update(targets, networks, tau)  # noqa: E731
    monkeypatch.setattr(sac_tar, "polyak_update", see)
    folder = run(compute="sparse", method="rigl", rewire_every=40)
    assert "compute: qf1, qf2 sparse in layers with up to 25% of connections, since" in capsys.readouterr().out
    assert len(seen) > 50 and all({"trunk.fc0", "fc2"} & {*names} for step in seen for names in step)
    final = torch.load(folder / "final.pt", weights_only=True)
    for name in ("qf1", "qf2"):
        for part in (name, f"{name}_target"):
            held = final[part]
            assert all(held[f"{layer}.weight"][~mask].eq(0).all() for layer, mask in final["masks"][name].items())


@pytest.mark.parametrize("in_the_kernels", [False, True])
def test_masks_that_are_new_inside_the_block_count_and_hold(in_the_kernels):
    nets = make_nets()
    net = nets["qf1"]
    net.in_kernels, net.masks = in_the_kernels, {name: torch.ones(w.shape).bool() for name, w in net.weights.items()}
    sparse_utils.fix_masks({"qf1": net})  # all active, so without hooks
    with kernels.in_torch(nets):
        net.masks["fc1"][0] = False
    assert net.active == sum(int(mask.sum()) for mask in net.masks.values()) < net.size
    update(nets)
    with kernels.in_torch(nets):
        assert not net.weights["fc1"][0].any() and net.weights["fc1"][1].all()


# ADAM


def halve(optimizer, *_):
    optimizer.param_groups[0]["params"][0].data.mul_(0.5)


def train(kind, case, **flags):
    """All weights and states after six steps in two groups, with one parameter that gets a gradient only once."""
    torch.manual_seed(0)
    network, idle = chain(5, 9, 2), nn.Parameter(torch.ones(3))
    first, *others = network.parameters()
    optimizer = kind([{"params": others, "weight_decay": 0.1}, {"params": [idle, first]}], **{"lr": 1e-3} | flags)
    at, scaler, losses = CASES[case].get("at"), torch.amp.GradScaler("cpu", enabled=case == "scaler"), []
    hook = CASES[case]["hook"](optimizer)(halve) if "hook" in CASES[case] else None
    scheduler = CASES[case]["scheduler"](optimizer) if "scheduler" in CASES[case] else None
    loss = lambda: network(torch.linspace(-1, 1, 40).view(8, 5)).square().sum()  # noqa: E731
    for i in range(6):
        optimizer.zero_grad(set_to_none=case != "gradients stay")
        scaler.scale(loss()).backward()
        idle.grad = torch.ones(3) if i == 1 else idle.grad
        if scaler.is_enabled() and i == 2:
            first.grad[0, 0] = float("inf")  # the scaler has such a step left out
        losses += [scaler.step(optimizer) if case != "closure" else optimizer.step(loss)]
        scaler.update()
        if scheduler:
            scheduler.step()
        if at and i == 2:
            network, optimizer = at(network, optimizer)
    if hook:
        hook.remove()
    states = [optimizer.state[p][key] for p in network.parameters() for key in sorted(optimizer.state[p])]
    return [idle, *network.parameters(), *states, *(x for x in losses if x is not None)]


def load_unfused(network, optimizer):
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved | {"param_groups": [g | {"fused": None} for g in saved["param_groups"]]})
    return network, optimizer


CASES = {
    "plain": {"flags": {"betas": (0.8, 0.99), "eps": 1e-3}},
    "amsgrad": {"flags": {"amsgrad": True, "maximize": True}},
    "decoupled": {"flags": {"decoupled_weight_decay": True}},
    "rate in a tensor": {"flags": {"lr": torch.tensor(1e-2)}},
    "rates fall": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)},
    "betas cycle": {"scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 30)},
    "before": {"hook": lambda optimizer: optimizer.register_step_pre_hook},
    "after": {"hook": lambda optimizer: optimizer.register_step_post_hook},
    "before any": {"hook": lambda _: register_optimizer_step_pre_hook},
    "after any": {"hook": lambda _: register_optimizer_step_post_hook},
    "loaded": {"at": load_unfused},
    "copied": {"at": lambda network, optimizer: copy.deepcopy((network, optimizer))},
    "closure": {},
    "scaler": {},
    "gradients stay": {},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")  # a scheduler warns if it has seen no step
def test_adam_is_torchs_to_the_bit(case, monkeypatch):
    flags = CASES[case].get("flags", {})
    expected = train(torch.optim.Adam, case, fused=True, **flags)
    runs = [train(kernels.Adam, case, **flags)]
    monkeypatch.setattr(torch.optim.Adam, "step", torch.optim.Adam.step.__wrapped__)  # as if torch had made no Adam yet
    runs.append(train(kernels.Adam, case, **flags))
    if not CASES[case].keys() & {"hook", "at"} and case not in ("closure", "scaler"):
        monkeypatch.setattr(torch.optim.Adam, "step", None)  # the short step does without
        runs.append(train(kernels.Adam, case, **flags))
    assert len(expected) > 4 and all(same(run, expected) for run in runs)


# WHO IS COMPUTED HOW


@pytest.fixture(scope="module")
def built():
    """The kernels as a file."""
    return Path(kernels.load_kernels()._name)


@pytest.fixture
def compiler(monkeypatch, tmp_path, built):
    """A cache of this test alone, and a compiler that takes no time; `builds` has a line for each of its builds."""
    copied = f'echo . >> {tmp_path}/builds; for last; do case "$last" in *kernels.so) cp {built} "$last";; esac; done'
    (tmp_path / "c++").write_text(f'#!/bin/sh\ncase "$*" in *-dM*) echo x;; *) {copied};; esac\n')
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.load_kernels.cache_clear()
    yield tmp_path / "c++"
    kernels.load_kernels.cache_clear()


def test_ctrl_c_does_not_reach_the_compiler(compiler):
    """Its three calls, the last without OpenMP, are process groups of their own."""
    groups = compiler.with_name("groups")
    fails = 'case "$*" in *-dM*) echo x;; *) exit 1;; esac'
    compiler.write_text(f'#!/bin/sh\ncut -d" " -f5 /proc/$$/stat >> {groups}\n{fails}\n')
    with pytest.raises(subprocess.CalledProcessError):
        kernels.load_kernels()
    found = groups.read_text().split()
    assert len(found) == 3 and str(os.getpgrp()) not in found


def slow_actor(net, batch_size):
    """In place of `time_passes`."""
    return (2.0, 3.0) if net.network[0].in_features == 3 else (2.0, 0.5)


SLOW = "since the kernels would take 1.50 of torch's time (3.00 of 2.00 ms a pass)"
FAST = "since it takes 0.25 of torch's time (0.50 of 2.00 ms a pass)"
BEGUN = "since the run was begun so"
CHOICES = [
    ("auto", None, "static", f"actor masked, {SLOW}; qf1, qf2 sparse, {FAST}"),
    ("auto", None, "dense", f"actor dense, {SLOW}; qf1, qf2 sparse, {FAST}"),
    ("auto", ["actor"], "static", f"actor sparse, {BEGUN}; qf1, qf2 masked, {BEGUN}"),
    ("masked", None, "static", "actor, qf1, qf2 masked, since --compute masked asks for it"),
    ("sparse", [], "dense", "actor, qf1, qf2 sparse, since --compute sparse asks for it"),
]


@pytest.mark.parametrize("compute, kept, method, console", CHOICES)
def test_the_faster_is_chosen_and_the_console_says_why(monkeypatch, capsys, compiler, compute, kept, method, console):
    monkeypatch.setattr(kernels, "time_passes", slow_actor)
    nets = make_nets(method)
    times = kernels.choose(nets, compute, 8, kept)
    assert times == ({name: slow_actor(net, 8) for name, net in nets.items()} if SLOW in console else {})
    lines = console.split("; ")
    assert capsys.readouterr().out.splitlines() == [f"compute: {line}" for line in lines]
    chosen = ", ".join(line.split(" sparse, ")[0] for line in lines if " sparse, " in line)
    assert ", ".join(name for name, net in nets.items() if net.in_kernels) == chosen


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reader(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self.fc1.bias.mean()


def edited(edit=lambda network: None, kind=nn.Sequential, **children):
    def make():
        network = kind(OrderedDict(layers(5, 9, 2) | children))
        edit(network)
        return network

    return make


PLAIN = "its layer fc1, or that of its target, is not a plain nn.Linear in float32, with a bias and without hooks"
SHARED = "its layer fc1 shares a parameter with another layer or network"
ALIKE = "weight and bias of its layer fc1 are not trained alike, in one group of its optimizer"
ADAM, META = "its optimizer is not plain Adam", "the kernels are for the CPU and the networks are on meta"
TWICE, IDLE = nn.Linear(2, 2), nn.ParameterList([nn.Parameter(torch.ones(1))])
REFUSALS = {
    "Adam": (edited(), torch.optim.Adam, None),
    "AdamW": (edited(), torch.optim.AdamW, None),
    "ReLU at the end": (edited(relu2=nn.ReLU()), kernels.Adam, None),
    "Tanh": (edited(relu1=nn.Tanh()), kernels.Adam, None),
    "a name of ours": (edited(lambda network: setattr(network, "sparse", 1)), kernels.Adam, None),
    "LayerNorm": (edited(norm=nn.LayerNorm(2)), kernels.Adam, None),
    "a parameter of its own": (edited(relu2=IDLE, fc2=nn.Linear(2, 2)), kernels.Adam, None),
    "a frozen layer": (edited(lambda network: network.fc0.requires_grad_(False)), kernels.Adam, None),
    "a hook on ReLU": (edited(lambda network: network.relu1.register_forward_hook(print)), kernels.Adam, None),
    "a group for each layer": (
        edited(), lambda params: torch.optim.Adam([{"params": params[:2]}, {"params": params[2:]}]), None,
    ),
    "SGD": (edited(), torch.optim.SGD, ADAM),
    "amsgrad": (edited(), lambda params: torch.optim.Adam(params, amsgrad=True), ADAM),
    "a group for each parameter": (
        edited(), lambda params: torch.optim.Adam([{"params": param} for param in params]), ALIKE.replace("fc1", "fc0"),
    ),
    "a frozen bias": (edited(lambda network: network.fc1.bias.requires_grad_(False)), kernels.Adam, ALIKE),
    "no bias": (edited(fc1=nn.Linear(9, 2, bias=False)), kernels.Adam, PLAIN),
    "a subclass": (edited(fc1=Scaled(9, 2)), kernels.Adam, PLAIN),
    "a further parameter": (
        edited(lambda network: setattr(network.fc1, "scale", nn.Parameter(torch.ones(1)))), kernels.Adam, PLAIN,
    ),
    "float64": (edited(fc1=nn.Linear(9, 2).double()), kernels.Adam, PLAIN),
    "a hook": (edited(lambda network: network.fc1.register_forward_hook(print)), kernels.Adam, PLAIN),
    "a hook before": (edited(lambda network: network.fc1.register_forward_pre_hook(print)), kernels.Adam, PLAIN),
    "a hook on a gradient": (edited(lambda network: network.fc1.weight.register_hook(print)), kernels.Adam, PLAIN),
    "a hook on a finished gradient": (
        edited(lambda network: network.fc1.bias.register_post_accumulate_grad_hook(print)), kernels.Adam, PLAIN,
    ),
    "two names": (edited(fc1=nn.Linear(9, 9), fc2=TWICE, fc3=TWICE), kernels.Adam, SHARED.replace("fc1", "fc2")),
    "read": (edited(kind=Reader), kernels.Adam, "its forward reads fc1.bias by itself"),
    "a layer alone": (lambda: nn.Linear(5, 2), kernels.Adam, PLAIN.replace("fc1", "itself")),
    "compiled": (lambda: torch.compile(edited()()), kernels.Adam, "torch.compile has wrapped it"),
    "meta": (edited(fc0=nn.Linear(5, 9, device="meta")), kernels.Adam, META),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_kernels_would_train_otherwise_is_left_to_torch(monkeypatch, capsys, compiler, name):
    monkeypatch.setattr(kernels, "MOST_BY_LAYER", 1.0)
    monkeypatch.setattr(kernels, "time_passes", lambda *_: (1.0, 0.5))
    make, optimize, why = REFUSALS[name]
    network = make()
    net = Net(network, None, optimize(list(network.parameters())), "static", 0.6, in_kernels=why is not None)
    sparse_utils.plan(net, 0.0)
    kernels.choose({"net": net}, "auto", 8)
    assert net.in_kernels == (why is None)
    if why is None:
        assert kernels.is_chain(net) == (name in ("Adam", "AdamW"))
    else:
        assert capsys.readouterr().out.startswith(f"compute: net masked, since {why}")
        with pytest.raises(ValueError, match=f"^--compute sparse cannot compute the net: {why}.*; use --compute"):
            kernels.choose({"net": net}, "sparse", 8)


def test_a_target_with_an_edit_of_its_own_is_left_to_torch(compiler):
    net = make_nets()["qf1"]
    assert kernels.is_chain(net) and kernels.why_not_in_kernels(net, {"net": net}) is None
    net.target.add_module("bound", nn.Hardtanh())
    assert not kernels.is_chain(net)
    del net.target.bound
    assert kernels.is_chain(net)
    net.target.relu1.register_forward_hook(print)
    assert not kernels.is_chain(net) and kernels.why_not_in_kernels(net, {"net": net}) is None
    net.target.fc1.register_forward_hook(print)
    assert kernels.why_not_in_kernels(net, {"net": net}) == PLAIN
    net.target.fc1 = nn.Sequential(net.target.fc1)
    assert kernels.why_not_in_kernels(net, {"net": net}) == "its target lacks layers of it"


def test_a_layer_of_two_networks_is_left_to_torch(compiler):
    nets = make_nets()
    nets["qf1"].network.fc1 = nets["qf2"].network.fc1
    whys = [kernels.why_not_in_kernels(net, nets) for net in nets.values()]
    assert whys == [None, SHARED, SHARED]


def test_measuring_is_between_active_neurons_and_changes_nothing(monkeypatch, compiler):
    net, mlp, measured = make_nets()["qf1"], kernels.SparseMLP, []
    net.budget, net.width, before, state = 20, 4, contents({"qf1": net}), torch.get_rng_state()
    monkeypatch.setattr(kernels, "SparseMLP", lambda linears, masks: measured.append(masks) or mlp(linears, masks))
    assert all(0 < milliseconds < 10_000 for milliseconds in kernels.time_passes(net, 8))
    (masks,) = measured
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    assert not any(masks[name][4:].any() for name in ("fc0", "fc1")) and not masks["fc2"][:, 4:].any()
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in net.network.parameters())
    assert same(contents({"qf1": net}), before)
    monkeypatch.setattr(mlp, "forward", lambda net, x: time.sleep(0.02) or x.sum() * net.flat.sum())
    in_torch, in_kernels = kernels.time_passes(net, 8)
    assert in_torch < 20 <= in_kernels


def test_a_pass_is_measured_once_on_a_machine(monkeypatch, compiler):
    """Another batch, budget, width, shape, kind or number of threads is another pass. Measured anew where a file is
    damaged or cannot be."""
    net, measured = make_nets()["qf1"], []

    def known(net, batch_size=8):
        measured.clear()
        return kernels.known_times(net, batch_size), kernels.known_times(net, batch_size), len(measured)

    monkeypatch.setattr(kernels, "time_passes", lambda *_: measured.append(_) or (1.0, float(len(measured))))
    tanh = Tanh(5, 9, 9, 1)
    other = Net(tanh, None, kernels.Adam(tanh.parameters()), "static", 0.6, budget=net.budget)
    for found in (net, other, dataclasses.replace(net, budget=21), dataclasses.replace(net, width=8)):
        assert known(found) == ((1.0, 1.0), (1.0, 1.0), 1)
    assert known(dataclasses.replace(net, network=chain(6, 9, 9, 1)))[2] == 1
    assert known(net, 9)[2] == 1 and known(net)[2] == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert known(net)[2] == 1
    kernels.known_times(net, 11)
    (file,) = [path for path in kernels.load_kernels().times.iterdir() if ", 11, " in path.read_text()]
    for damaged in ("", "{", "\0", "7", "{}", '{"milliseconds": [0.0, -1]}', '{"milliseconds": [1.0]}'):
        file.write_text(damaged)
        assert known(net, 11) == ((1.0, 1.0), (1.0, 1.0), 1)

    def beside_another_process(*_):
        monkeypatch.setattr(kernels, "time_passes", lambda *_: (1.0, 0.5))
        return 1.0, kernels.known_times(net, 10)[1] + 1

    monkeypatch.setattr(kernels, "time_passes", beside_another_process)
    assert kernels.known_times(net, 10) == (1.0, 0.5)  # the first to end decides
    monkeypatch.setattr(kernels, "time_passes", lambda *_: measured.append(_) or (1.0, float(len(measured))))
    monkeypatch.setattr(kernels.load_kernels(), "times", Path("none") / "there")
    assert known(net) == ((1.0, 1.0), (1.0, 2.0), 2)


def test_kernels_are_built_once_and_anew_if_file_processor_or_source_differ(monkeypatch, compiler, tmp_path, built):
    def load():
        kernels.load_kernels.cache_clear()
        assert kernels.load_kernels().width(1) == 1
        (library,) = (tmp_path / "cache").rglob("*.so")
        assert library.read_bytes() == whole
        return library, len((tmp_path / "builds").read_text().split())

    whole = built.read_bytes()
    library, _ = load()
    for n, damaged in enumerate((whole[: len(whole) // 2], b"", whole[:-1] + b"x"), 1):
        assert load() == (library, n)
        library.unlink()  # in place, it would break what this process has loaded
        library.write_bytes(damaged)
    assert load() == (library, 4)
    compiler.write_text(compiler.read_text().replace("echo x", "echo y"))  # another processor
    kernels.load_kernels.cache_clear()
    kernels.load_kernels()
    (tmp_path / "kernels.cpp").write_text("// another version")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    kernels.load_kernels.cache_clear()
    kernels.load_kernels()
    assert len((tmp_path / "builds").read_text().split()) == 6


@pytest.mark.parametrize("option", ["-mno-avx512f", "-mno-avx", "no -fopenmp"])
def test_the_kernels_of_older_processors_and_without_openmp_match_float64(monkeypatch, tmp_path, capsys, option):
    options = "" if option.startswith("no") else option
    refuses = 'case "$*" in *-fopenmp*) exit 1;; esac\n' if option.startswith("no") else ""
    (tmp_path / "c++").write_text(f'#!/bin/sh\n{refuses}exec c++ {options} "$@"\n')
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.load_kernels.cache_clear()
    try:
        for batch, density in itertools.product((1, 17, 100), (0.05, 0.5)):
            compare_with_float64([70, 33, 9], batch, density, 1)
    finally:
        kernels.load_kernels.cache_clear()
    assert ("the kernels use one thread, without OpenMP" in capsys.readouterr().out) == option.startswith("no")


@pytest.mark.parametrize("command", ["no-such-compiler", "false", "true", 'g++ "', "broken"])
def test_without_a_working_compiler_auto_goes_on_in_torch_and_sparse_is_refused(
    monkeypatch, capsys, compiler, tmp_path, command
):
    if command == "broken":  # it knows its processor but cannot compile
        compiler.write_text('#!/bin/sh\ncase "$*" in *-dM*) echo x;; *) echo "no space" >&2; exit 1;; esac\n')
    else:
        monkeypatch.setenv("CXX", command)
    why = {"broken": "no space", 'g++ "': 'CXX=g++ " is not a command'}.get(command, "")
    nets = make_nets()
    assert kernels.choose(nets, "auto", 8) == {} and not any(net.in_kernels for net in nets.values())
    expected = f"compute: actor, qf1, qf2 masked, since kernels.cpp cannot be built here: {why}"
    if command == "true":  # whose file is somewhere else each time
        expected = "compute: actor masked, since kernels.cpp cannot be built here"
    assert capsys.readouterr().out.startswith(expected)
    with pytest.raises(ValueError, match=r"cannot compute the actor: kernels.cpp cannot be built here: ."):
        kernels.choose(nets, "sparse", 8)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]  # nothing is left behind
