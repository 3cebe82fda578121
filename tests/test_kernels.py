"""The kernels against float64 and torch, their Adam against torch's, and which networks are computed by them."""

import copy
import dataclasses
import json
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import sparse_utils
from lab import kernels
from sparse_utils import Net


def chain(*sizes):
    layers = OrderedDict()
    for i, size in enumerate(zip(sizes, sizes[1:])):
        layers |= {f"relu{i}": nn.ReLU()} if i else {}
        layers |= {f"fc{i}": nn.Linear(*size)}
    return nn.Sequential(layers)


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


def flat_gradient(mlp, gradients):
    """Gradients of a network's parameters in the order of the kernels."""
    return mlp.compress({name: gradients[2 * i : 2 * i + 2] for i, name in enumerate(mlp.masks)})


def make_nets(method="static"):
    """Rows of an actor and of two critics that share an optimizer, planned and not pruned."""
    torch.manual_seed(0)
    actor, qf1, qf2 = chain(3, 9, 2), chain(5, 9, 9, 1), chain(5, 9, 9, 1)
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


def update(nets):
    """A step of each optimizer and of the targets."""
    optimizers = {net.optimizer for net in nets.values()}
    for optimizer in optimizers:
        optimizer.zero_grad()
    for name, net in nets.items():
        net.network(torch.linspace(-1, 1, 60).view(-1, 3 if name == "actor" else 5)).square().sum().backward()
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


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


# THE KERNELS

SIZES = st.lists(st.integers(1, 70) | st.sampled_from([127, 128, 130]), min_size=2, max_size=5)  # past two tiles
BATCH = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 256])


@settings(deadline=None, max_examples=40)
@given(SIZES, BATCH, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_forward_and_gradients_match_float64(sizes, batch, density, seed):
    network, mlp = make_mlp(sizes, density, seed)
    x, grad_y = torch.randn(sizes[0], batch).T.requires_grad_(), torch.randn(sizes[-1], batch).T  # not contiguous
    y, expected = mlp(x), network(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5 * (1 + expected.abs().max().item()))
    with torch.no_grad():
        assert torch.equal(mlp(x), y)
    grad_x, grad_flat = torch.autograd.grad(y, [x, mlp.flat], grad_y)
    expected_x, *gradients = torch.autograd.grad(expected, [x, *network.parameters()], grad_y.double())
    for got, want in ((grad_x, expected_x), (grad_flat, flat_gradient(mlp, gradients))):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-3, atol=1e-4 * (1 + want.abs().max().item()))


@settings(deadline=None, max_examples=12)
@given(SIZES, BATCH, st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_the_number_of_threads_does_not_change_a_bit(sizes, batch, density, seed):
    _, mlp = make_mlp(sizes, density, seed)
    x, grad_y = torch.randn(batch, sizes[0], requires_grad=True), torch.randn(batch, sizes[-1])
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = mlp(x)
        results.append((y, *torch.autograd.grad(y, [x, mlp.flat], grad_y)))
    torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


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
    got, expected = torch.autograd.grad(y.sum(), mlp.flat)[0], flat_gradient(mlp, gradients)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inputs_that_the_kernels_cannot_read_are_refused():
    mlp = make_mlp([5, 9, 2], 0.6, 0)[1]
    inputs = [torch.zeros(shape) for shape in ((4, 6), (5,), (2, 4, 5))] + [torch.zeros(4, 5).double()]
    refused = [(mlp, x) for x in [*inputs, torch.zeros(4, 5, device="meta")]]
    for network, x in [*refused, (copy.deepcopy(mlp).double(), torch.zeros(4, 5))]:
        with torch.no_grad(), pytest.raises(ValueError, match="needs float32 of shape"):
            network(x)


# WHAT TAKES THE PLACE OF LAYERS


def test_compacting_and_expanding_change_no_bit_and_training_between_is_that_of_torch():
    """Masks come after dense training, and change later; the second critic stays in torch."""
    nets, twins = make_nets(), make_nets()
    nets["actor"].in_kernels = nets["qf1"].in_kernels = True
    parameters = {name: list(net.network.parameters()) for name, net in nets.items()}
    groups = {net.optimizer: {id(p) for p in net.optimizer.param_groups[0]["params"]} for net in nets.values()}
    kernels.compact(nets)
    assert not hasattr(nets["qf1"].network, "sparse")  # nothing is pruned yet
    for seed in range(2):
        update(nets), update(twins)
        prune(twins, seed)
        with kernels.in_torch(nets):
            prune(nets, seed)
            pruned = contents(nets)
        assert [hasattr(net.network, "sparse") for net in nets.values()] == [True, True, False]
        assert hasattr(nets["qf1"].target, "sparse") and len(nets["qf1"].optimizer.param_groups[0]["params"]) == 1 + 6
        kernels.compact(nets)  # once more does nothing
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
                assert len(net.optimizer.state) == len(params) and {id(p) for p in params} == groups[net.optimizer]
                assert len({id(net.optimizer.state[p]["step"]) for p in params}) == len(params)  # each counts by itself


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
    assert (own["lr"], len(own["params"])) == (1e-2, 1)
    assert flat.requires_grad and not net.target.sparse.flat.requires_grad
    net.target.requires_grad_(True)
    with pytest.raises(KeyError), kernels.in_torch({"actor": net}):
        raise KeyError
    assert list(dict(net.network.named_children())) == ["fc0", "relu1", "fc1"]
    assert all(param.requires_grad for param in net.target.parameters())


def test_a_compact_network_can_be_copied_and_saved(tmp_path):
    network, x = chain(5, 9, 2), torch.randn(20, 5)
    kernels.compact_network(network, {"fc0": torch.rand(9, 5) < 0.5, "fc1": torch.rand(2, 9) < 0.5})
    torch.save(network, tmp_path / "network.pt")
    for other in (copy.deepcopy(network), torch.load(tmp_path / "network.pt", weights_only=False)):
        assert torch.equal(other(x), network(x))
        other.sparse.flat.data.zero_()
        assert network(x).any() and not other(x).any()
        kernels.expand_network(other)
        assert not other(x).any()


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
def built(tmp_path_factory):
    """The kernels as a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("built")))
        kernels.load_kernels.cache_clear()
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


ADAM, GROUPS, CHAIN = "its optimizer is not plain Adam", "its parameters are not all in one group", "it is not a chain"
META, IDLE = "the kernels are for the CPU and the networks are on meta", nn.ParameterList([nn.Parameter(torch.ones(1))])
REFUSALS = [
    ({}, kernels.Adam, None),
    ({}, torch.optim.Adam, None),
    ({}, torch.optim.AdamW, None),
    ({}, torch.optim.SGD, ADAM),
    ({}, lambda params: torch.optim.Adam([{"params": list(params), "amsgrad": True}]), ADAM),
    ({}, lambda params: torch.optim.Adam([{"params": param} for param in params]), GROUPS),
    ({}, lambda params: torch.optim.Adam([param for param in params if param.dim() == 2]), GROUPS),
    ({"relu1": nn.Tanh()}, kernels.Adam, CHAIN),
    ({"norm": nn.LayerNorm(2)}, kernels.Adam, CHAIN),
    ({"fc1": nn.Linear(9, 2, bias=False)}, kernels.Adam, CHAIN),
    ({"relu2": IDLE, "fc2": nn.Linear(2, 2)}, kernels.Adam, CHAIN),
    ({"fc0": nn.Linear(5, 9, device="meta")}, kernels.Adam, META),
]


@pytest.mark.parametrize("edit, optimize, why", REFUSALS)
def test_what_the_kernels_would_train_otherwise_is_left_to_torch(monkeypatch, capsys, compiler, edit, optimize, why):
    monkeypatch.setattr(kernels, "time_passes", lambda *_: (1.0, 0.5))
    network = nn.Sequential(OrderedDict(chain(5, 9, 2).named_children()) | edit)
    net = Net(network, None, optimize(network.parameters()), "static", 0.6, in_kernels=why is not None)
    sparse_utils.plan(net, 0.0)
    kernels.choose({"net": net}, "auto", 8)
    assert net.in_kernels == (why is None)
    if why:
        assert capsys.readouterr().out.startswith(f"compute: net masked, since {why}")
        with pytest.raises(ValueError, match=f"^--compute sparse is not to be had for the net: {why}.*; use --compute"):
            kernels.choose({"net": net}, "sparse", 8)


def test_measuring_is_between_active_neurons_and_changes_nothing(monkeypatch, compiler):
    net, compact, measured = make_nets()["qf1"], kernels.compact_network, []
    net.budget, net.width, before, state = 20, 4, contents({"qf1": net}), torch.get_rng_state()
    monkeypatch.setattr(kernels, "compact_network", lambda copied, m: measured.append(m) or compact(copied, m))
    assert all(0 < milliseconds < 10_000 for milliseconds in kernels.time_passes(net, 8))
    (masks,) = measured
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    assert not any(masks[name][4:].any() for name in ("fc0", "fc1")) and not masks["fc2"][:, 4:].any()
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in net.network.parameters())
    assert same(contents({"qf1": net}), before)


def test_a_pass_is_measured_once_on_a_machine(monkeypatch, compiler):
    """Another batch, budget or width is another pass. Measured anew where the file is damaged or there can be none."""
    net, measured = make_nets()["qf1"], []

    def twice():
        measured.clear()
        return [kernels.known_times(net, 8) for _ in range(2)]

    monkeypatch.setattr(kernels, "time_passes", lambda *_: measured.append(_) or (1.0, float(len(measured))))
    assert twice() == [(1.0, 1.0)] * 2
    folder = kernels.load_kernels().times
    (file,) = folder.iterdir()
    for other in (net, dataclasses.replace(net, budget=21), dataclasses.replace(net, width=8)):
        kernels.known_times(other, 9)
    assert len(measured) == 4
    damages = [[0.0, -1], [0, 1], [1, -1], [1], [None, 1], [math.nan, 1], [1, math.inf], [1, 10**400], {"a": 1}]
    for damaged in ("", "{", "7", "{}", "\0", *(json.dumps({"milliseconds": times}) for times in damages)):
        file.write_text(damaged)
        assert twice() == [(1.0, 1.0)] * 2 and len(measured) == 1
    assert len(list(folder.iterdir())) == 4

    def beside_another_process(*_):
        monkeypatch.setattr(kernels, "time_passes", lambda *_: (1.0, 0.5))
        return 1.0, kernels.known_times(net, 8)[1] + 1

    for found in (None, "{"):  # the first to end decides
        file.unlink() if found is None else file.write_text(found)
        monkeypatch.setattr(kernels, "time_passes", beside_another_process)
        assert kernels.known_times(net, 8) == (1.0, 0.5)
    monkeypatch.setattr(kernels, "time_passes", lambda *_: measured.append(_) or (1.0, float(len(measured))))
    monkeypatch.setattr(kernels.load_kernels(), "times", folder / "none" / "there")
    assert twice() == [(1.0, 1.0), (1.0, 2.0)]


def test_kernels_are_built_once_and_anew_if_the_file_is_damaged(monkeypatch, compiler, tmp_path, built):
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
    with pytest.raises(ValueError, match=r"not to be had for the actor: kernels.cpp cannot be built here: ."):
        kernels.choose(nets, "sparse", 8)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]  # nothing is left behind
