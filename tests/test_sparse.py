"""The sparse kernels against dense float64 references, and whole runs on them against masked ones."""

import copy
import os
import subprocess

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_runs import events, load, same_weights
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lab import kernels as sk
from lab import run_folder as rf

CPU = torch.device("cpu")


def make_mlp(sizes, density, seed):
    """A dense network, zero where pruned, and the SparseMLP of the same weights. Odd seeds have empty and full rows, of
    even ones every third layer is dense."""
    torch.manual_seed(seed)
    linears, masks = {}, {}
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        linears[f"fc{i}"] = nn.Linear(n_in, n_out)
        mask = torch.rand(n_out, n_in) < density
        if seed % 2:
            mask[0], mask[-1] = True, False
            mask[:, n_in // 2] = False
        elif (i + seed // 2) % 3 == 0:
            mask[:] = True
        masks[f"fc{i}"] = mask
        linears[f"fc{i}"].weight.data.mul_(mask)
    return linears, masks, sk.SparseMLP(linears, masks)


def reference(linears, x):
    """Forward in float64 through the dense weights."""
    x = x.double()
    for i, linear in enumerate(linears.values()):
        x = torch.relu(x) if i else x
        x = x @ linear.weight.double().T + linear.bias.double()
    return x


SIZES = st.lists(st.integers(1, 70) | st.sampled_from([127, 128, 130]), min_size=2, max_size=5)  # past two tiles
BATCH = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 256])


@settings(deadline=None, max_examples=60)
@given(SIZES, BATCH, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 99))
def test_forward_and_gradients_match_float64(sizes, batch, density, seed):
    linears, masks, mlp = make_mlp(sizes, density, seed)
    # non-contiguous on purpose; away from ReLU's kink nothing but rounding separates the two
    x = torch.randn(sizes[0], batch).T.requires_grad_()
    grad_y = torch.randn(sizes[-1], batch).T
    y, expected = mlp(x), reference(linears, x)
    scale = 1e-5 * (1 + expected.abs().max().item())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=scale)
    with torch.no_grad():
        assert torch.equal(mlp(x), y)

    grad_x, grad_flat = torch.autograd.grad(y, [x, mlp.flat], grad_y)
    parameters = [p for m in linears.values() for p in (m.weight, m.bias)]
    expected_x, *expected_parameters = torch.autograd.grad(expected, [x, *parameters], grad_y.double())
    pairs = {name: tuple(expected_parameters[2 * i : 2 * i + 2]) for i, name in enumerate(masks)}
    for got, want in ((grad_x, expected_x), (grad_flat, mlp.compress(pairs))):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * (1 + want.abs().max().item()))


@settings(deadline=None, max_examples=20)
@given(SIZES, BATCH, st.sampled_from([0.3, 1.0]), st.integers(0, 99))
def test_the_number_of_threads_does_not_change_a_bit(sizes, batch, density, seed):
    _, _, mlp = make_mlp(sizes, density, seed)
    x = torch.randn(batch, sizes[0], requires_grad=True)
    grad_y = torch.randn(batch, sizes[-1])
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = mlp(x)
        results.append((y, *torch.autograd.grad(y, [x, mlp.flat], grad_y)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("batch", [3, 70])
def test_gradcheck(batch):
    """Biases of +-1 keep every unit away from ReLU's kink, so a step of 1e-2 in float32 differentiates well."""
    linears, _, mlp = make_mlp([5, 9, 7, 2], 0.6, 0)
    for linear in linears.values():
        linear.weight.data.mul_(0.3)
        linear.bias.data.copy_(torch.arange(len(linear.bias)) % 2 * 2.0 - 1)
    flat = mlp.compress({name: (m.weight, m.bias) for name, m in linears.items()}).detach().double().requires_grad_()
    x = (0.3 * torch.randn(batch, 5)).double().requires_grad_()

    def f(x, flat):
        return sk._SparseMLPFunction.apply(x.float(), flat.float(), mlp).double()

    assert torch.autograd.gradcheck(f, (x, flat), eps=1e-2, atol=1e-3, rtol=1e-3)


def test_gradients_that_nobody_needs_are_not_computed():
    linears, _, mlp = make_mlp([5, 9, 2], 0.6, 0)
    x = torch.randn(40, 5)
    y = mlp(x)
    y.sum().backward()
    assert mlp.flat.grad is not None
    mlp.flat.grad = None
    mlp.flat.requires_grad_(False)
    assert not mlp(x).requires_grad
    x.requires_grad_()
    mlp(x).sum().backward()
    expected = torch.autograd.grad(reference(linears, x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)
    assert mlp.flat.grad is None


def test_not_a_number_passes_the_relu():
    """Or a diverged network would look healthy."""
    linears, _, mlp = make_mlp([3, 8, 2], 1.0, 0)
    x = torch.randn(20, 3)
    x[4, 1] = float("nan")
    y = mlp(x)
    assert y[4].isnan().all() and y[:4].isfinite().all() and y[5:].isfinite().all()
    grad = mlp.expand(torch.autograd.grad(y.sum(), mlp.flat)[0])["fc0.bias"]
    expected = torch.autograd.grad(reference(linears, x).sum(), linears["fc0"].bias)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)  # torch's ReLU passes the gradient of NaN on


def test_a_retained_graph_gives_the_same_gradient_again():
    _, _, mlp = make_mlp([3, 8, 2], 1.0, 0)
    y = mlp(torch.randn(20, 3)).sum()
    first, second = (torch.autograd.grad(y, mlp.flat, retain_graph=True)[0] for _ in range(2))
    assert first.any() and torch.equal(first, second)


def test_compress_and_expand_are_inverse():
    linears, _, mlp = make_mlp([6, 11, 4], 0.4, 1)
    dense = mlp.expand(mlp.flat.detach())
    for name, linear in linears.items():
        assert torch.equal(dense[f"{name}.weight"], linear.weight) and torch.equal(dense[f"{name}.bias"], linear.bias)


@pytest.mark.parametrize("prune_at", [None, 80])
@pytest.mark.parametrize("method", ["tar", "static", "uniform", "tiny", "dense"])
def test_sparse_and_masked_runs_agree_over_the_first_updates(run, method, prune_at):
    """Also when pruned after dense training, where Adam's moments move along."""
    small = {"method": method, "prune_at": prune_at, "sparsity": 0.8, "hidden_size": 32, "total_timesteps": 95}
    sparse, masked = load(run(compute="sparse", **small)), load(run(compute="masked", **small))
    networks = [name for name in masked if name.split("_")[0] in ("actor", "qf1", "qf2")]
    assert set(sparse) == set(masked)
    for name in networks:
        assert set(sparse[name]) == set(masked[name])
        for key, tensor in masked[name].items():
            torch.testing.assert_close(sparse[name][key], tensor, rtol=1e-3, atol=1e-4)
            layer = key.removesuffix(".weight")
            if layer in masked["masks"].get(name.removesuffix("_target"), {}):
                mask = masked["masks"][name.removesuffix("_target")][layer]
                assert torch.equal(sparse["masks"][name.removesuffix("_target")][layer], mask)
                assert not sparse[name][key][~mask].any()
                assert int(mask.sum()) > 0


def test_one_seed_one_result_on_the_kernels(run):
    a, b = load(run(compute="sparse", seed=5)), load(run(compute="sparse", seed=5))
    assert same_weights(a, b)


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Kernels in a cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sk.load_kernels.cache_clear()
    yield sk.load_kernels()
    sk.load_kernels.cache_clear()


def slow_actor(network, *_):
    """In place of `time_passes`, with Pendulum's 3 observations."""
    return (2.0, 3.0) if network[0].in_features == 3 else (2.0, 0.5)


def test_auto_takes_what_is_faster_here(run, monkeypatch, capsys, kernels):
    monkeypatch.setattr(sk, "time_passes", slow_actor)
    slow = "since the kernels would take 1.50 of torch's time (3.00 of 2.00 ms a pass)\n"
    fast = "compute: qf1, qf2 sparse, since it takes 0.25 of torch's time (0.50 of 2.00 ms a pass)\n"
    times = {"actor": [2.0, 3.0], "qf1": [2.0, 0.5], "qf2": [2.0, 0.5]}
    for arguments, sentences, in_kernels in [
        ({}, [f"compute: actor masked, {slow}", fast], ["qf1", "qf2"]),
        ({"method": "set", "rewire_stop": 1.0}, [f"compute: actor masked, {slow}", fast], ["qf1", "qf2"]),
        ({"method": "dense"}, [f"compute: actor dense, {slow}", fast], ["qf1", "qf2"]),
        ({"method": "tiny"}, [f"compute: actor dense, {slow}", fast], ["qf1", "qf2"]),
        ({"compute": "masked"}, ["compute: actor, qf1, qf2 masked, since --compute masked asks for it\n"], []),
        ({"compute": "sparse"}, ["actor, qf1, qf2 sparse, since --compute sparse asks"], ["actor", "qf1", "qf2"]),
    ]:
        flags = {"compute": "auto", "total_timesteps": 62, "rewire_every": 61} | arguments
        (segment,) = rf.read_config(run(**flags))["segments"]
        console = capsys.readouterr().out
        assert all(sentence in console for sentence in sentences)
        assert segment["in_kernels"] == in_kernels
        assert segment["milliseconds"] == ({} if "compute" in arguments else times)


def test_a_pass_is_measured_once_on_a_machine(monkeypatch, kernels):
    """Also where the file is damaged, and each time where there can be none. Another batch or width is another pass."""
    network, measured = make_network()[0], []
    monkeypatch.setattr(sk, "time_passes", lambda *of: measured.append(of[1:]) or (1.0, float(len(measured))))
    assert [sk.known_times(network, 20, 9, 8) for _ in range(2)] == [(1.0, 1.0)] * 2
    (file,) = kernels.library.parent.glob("*.json")
    sk.known_times(network, 20, 9, 9), sk.known_times(network, 21, 9, 8), sk.known_times(network, 20, 8, 8)
    assert measured == [(20, 9, 8), (20, 9, 9), (21, 9, 8), (20, 8, 8)]
    assert len(list(kernels.library.parent.glob("*.json"))) == 4
    for damaged in ("", "{", "7", "{}", '{"milliseconds": [1]}', '{"milliseconds": [null, 1]}'):
        file.write_text(damaged)
        measured.clear()
        assert [sk.known_times(network, 20, 9, 8) for _ in range(2)] == [(1.0, 1.0)] * 2
        assert measured == [(20, 9, 8)]
    assert not [path for path in kernels.library.parent.iterdir() if path.suffix not in (".so", ".json")]
    kernels.library = kernels.library.parent / "none" / "kernels.so"
    measured.clear()
    assert [sk.known_times(network, 20, 9, 8) for _ in range(2)] == [(1.0, 1.0), (1.0, 2.0)]


def test_a_pass_is_measured_between_the_active_neurons(run, kernels, monkeypatch):
    seen, time_passes, compact = [], sk.time_passes, sk.compact_network
    monkeypatch.setattr(sk, "time_passes", lambda *of: seen.append(of[1:3]) or (1.0, 0.5))
    masks = load(run(compute="auto", method="static", active_width=13))["masks"]
    assert seen == [(sum(int(m.sum()) for m in masks[name].values()), 13) for name in ("actor", "qf1")]
    measured = []
    monkeypatch.setattr(sk, "compact_network", lambda copied, masks: measured.append(masks) or compact(copied, masks))
    time_passes(make_network()[0], 20, 4, 8)
    (masks,) = measured
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    assert not masks["fc1"][4:].any() and not masks["fc2"][:, 4:].any()


def test_of_processes_that_measure_at_once_all_take_the_first_result(monkeypatch, kernels):
    network = make_network()[0]

    def time_passes(*_):
        monkeypatch.setattr(sk, "time_passes", lambda *_: (1.0, 0.5))
        assert sk.known_times(network, 20, 9, 8) == (1.0, 0.5)  # another process, meanwhile
        return 1.0, 2.0

    monkeypatch.setattr(sk, "time_passes", time_passes)
    assert sk.known_times(network, 20, 9, 8) == (1.0, 0.5)


def test_measuring_changes_neither_the_network_nor_a_random_number(run, kernels, monkeypatch):
    """A run on what auto has chosen is, to the bit, the run that was told to compute so."""
    network, seen = make_network()[0], []
    before = copy.deepcopy(network.state_dict())
    time_passes = sk.time_passes

    def measured(*of):
        seen.append(time_passes(*of))
        return 1.0, 0.5

    monkeypatch.setattr(sk, "time_passes", measured)
    auto = load(run(compute="auto"))
    assert len(seen) == 2 and all(0 < milliseconds < 1000 for times in seen for milliseconds in times)
    assert same_weights(auto, load(run(compute="sparse")))
    time_passes(network, 20, 9, 8)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def with_tanh(layers):
    layers["relu1"] = nn.Tanh()


def with_a_norm(layers):
    layers["norm"] = nn.LayerNorm(1)


def without_bias(layers):
    layers["fc2"] = nn.Linear(24, 24, bias=False)


@pytest.mark.parametrize("edit", [with_tanh, with_a_norm, without_bias])
def test_a_network_that_a_reader_changed_is_not_replaced_by_another_one(run, script, monkeypatch, capsys, edit):
    mlp_layers = script.mlp_layers

    def edited(*sizes):
        layers = mlp_layers(*sizes)
        edit(layers)
        return layers

    if edit is with_a_norm:  # after an output of width 1
        monkeypatch.setattr(
            script.QNetwork, "__init__", lambda self, o, a, h: nn.Sequential.__init__(self, edited(o + a, h, 1))
        )
    else:
        monkeypatch.setattr(script, "mlp_layers", edited)
    final = load(run(compute="auto"))
    assert "masked, since it is not a chain" in capsys.readouterr().out
    assert final["global_step"] == 160


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(4, 5).double(),
        torch.zeros(4, 6),
        torch.zeros(5),
        torch.zeros(2, 4, 5),
        torch.zeros(4, 5, device="meta"),
    ],
)
def test_inputs_that_the_kernels_cannot_read_are_refused(x):
    _, _, mlp = make_mlp([5, 9, 2], 0.6, 0)
    with torch.no_grad(), pytest.raises(ValueError, match="needs float32 of shape"):
        mlp(x)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_auto_goes_on_masked_and_sparse_is_refused(
    run, monkeypatch, capsys, tmp_path, compiler
):
    monkeypatch.setenv("CXX", compiler)
    sk.load_kernels.cache_clear()
    try:
        with pytest.raises(SystemExit) as stop:
            run(compute="sparse")
        assert stop.value.code == 2 and not (tmp_path / "runs").exists()
        assert "--compute sparse is not to be had for the actor: kernels.cpp cannot be" in capsys.readouterr().err
        final = load(run(compute="auto"))
    finally:
        sk.load_kernels.cache_clear()
    assert "compute: actor, qf1, qf2 masked, since kernels.cpp cannot be built here" in capsys.readouterr().out
    assert final["global_step"] == 160


def test_a_build_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    """A compiler that knows its processor but cannot compile."""
    script = tmp_path / "c++"
    script.write_text('#!/bin/sh\ncase "$*" in *-dM*) echo x;; *) echo "no space" >&2; exit 1;; esac\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sk.load_kernels.cache_clear()
    try:
        with pytest.raises(subprocess.CalledProcessError):
            sk.load_kernels()
    finally:
        sk.load_kernels.cache_clear()
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_the_kernels_are_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    for _ in range(2):
        sk.load_kernels.cache_clear()
        sk.load_kernels()
        built.append([(p, os.stat(p).st_mtime_ns) for p in tmp_path.rglob("*.so")])
    sk.load_kernels.cache_clear()
    assert len(built[0]) == 1 and built[0] == built[1]


def test_a_run_on_the_kernels_leaves_the_same_tags(run):
    sparse, masked = events(run(compute="sparse")), events(run(compute="masked"))
    assert sparse.Tags()["scalars"] == masked.Tags()["scalars"]
    assert sparse.Tags()["images"] == masked.Tags()["images"]


# what takes the place of layers


def make_network(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential()
    for name, layer in {"fc1": nn.Linear(5, 9), "relu1": nn.ReLU(), "fc2": nn.Linear(9, 2)}.items():
        network.add_module(name, layer)
    masks = {name: torch.rand(network.get_submodule(name).weight.shape) < 0.5 for name in ("fc1", "fc2")}
    for name, mask in masks.items():
        network.get_submodule(name).weight.data.mul_(mask)
    return network, masks


def step(network, optimizer):
    optimizer.zero_grad()
    network(torch.linspace(-1, 1, 40).view(8, 5)).square().sum().backward()
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            parameter.grad.mul_(parameter != 0)
    optimizer.step()


def test_a_network_that_the_kernels_would_train_otherwise_is_left_to_torch(monkeypatch, kernels):
    network, _ = make_network()
    budgets, widths = {"net": (20, 0)}, {"net": 9}

    def chosen(optimizer, network=network):
        return sk.choose("auto", CPU, {"net": network}, {"net": optimizer}, budgets, widths, 8)[0]

    monkeypatch.setattr(sk, "time_passes", lambda *_: (1.0, 0.5))
    assert chosen(torch.optim.Adam(network.parameters())) == chosen(torch.optim.AdamW(network.parameters())) == ["net"]
    assert chosen(torch.optim.Adam(network.parameters(), amsgrad=True)) == []
    assert chosen(torch.optim.SGD(network.parameters())) == []
    assert chosen(torch.optim.Adam([p for p in network.parameters() if p.dim() == 2])) == []  # biases stay as they are
    groups = [{"params": [p for p in network.parameters() if p.dim() == d]} for d in (1, 2)]
    assert chosen(torch.optim.Adam(groups)) == []
    with pytest.raises(ValueError, match="not to be had for the net: its parameters are not all in one group"):
        sk.choose("sparse", CPU, {"net": network}, {"net": torch.optim.Adam(groups)}, budgets, widths, 8)
    network.scale = nn.Parameter(torch.ones(1))
    assert chosen(torch.optim.Adam(network.parameters())) == []


def train_some(take_step, watch, kind=torch.optim.Adam, **flags):
    """Values and moments after three steps in two groups, with one parameter that gets no gradient."""
    network, _ = make_network()
    idle = nn.Parameter(torch.ones(3))
    first, *others = network.parameters()
    optimizer = kind([{"params": others, "lr": 1e-2}, {"params": [idle, first]}], lr=1e-3, **flags)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) if watch == "scheduler" else None
    registers = {
        "before": optimizer.register_step_pre_hook,
        "after": optimizer.register_step_post_hook,
        "before any": register_optimizer_step_pre_hook,
        "after any": register_optimizer_step_post_hook,
    }

    def halve(*_):
        first.data.mul_(0.5)

    hook = registers[watch](halve) if watch in registers else None
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.linspace(-1, 1, 40).view(8, 5)).square().sum().backward()
        take_step(optimizer)
        if scheduler:
            scheduler.step()
    if hook:
        hook.remove()
    states = [value for p in network.parameters() for value in optimizer.state[p].values() if torch.is_tensor(value)]
    return [*network.parameters(), *states]


class TwiceAdam(torch.optim.Adam):
    def step(self):
        super().step()
        super().step()


KINDS = {
    "a reader's own": {"fused": True, "kind": TwiceAdam},
    "fused": {"fused": True, "betas": (0.8, 0.99)},
    "decayed": {"fused": True, "weight_decay": 0.1, "eps": 1e-3},
    "amsgrad": {"fused": True, "amsgrad": True, "maximize": True},
    "decoupled": {"fused": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    "not fused": {"weight_decay": 0.1},
    "AdamW": {"fused": True, "weight_decay": 0.1, "kind": torch.optim.AdamW},
    "SGD": {"fused": True, "momentum": 0.9, "kind": torch.optim.SGD},
}
WATCHERS = ["scheduler", "before", "after", "before any", "after any"]


@pytest.mark.parametrize("kind, watch", [(kind, None) for kind in KINDS] + [("fused", watch) for watch in WATCHERS])
@pytest.mark.filterwarnings("error")  # a scheduler warns if it has seen no step
def test_a_step_is_the_optimizers_own_to_the_bit(kind, watch):
    expected = train_some(lambda optimizer: optimizer.step(), watch, **KINDS[kind])
    got = train_some(sk.step, watch, **KINDS[kind])
    assert len(got) == len(expected) > 4 and all(map(torch.equal, got, expected))


def test_the_step_of_a_run_is_the_short_one(run, monkeypatch):
    init = torch.optim.Adam.__init__

    def without_step(optimizer, *args, **flags):  # torch wraps the step when it makes an Adam
        init(optimizer, *args, **flags)
        monkeypatch.setattr(torch.optim.Adam, "step", None)

    monkeypatch.setattr(torch.optim.Adam, "__init__", without_step)
    assert load(run(compute="sparse"))["global_step"] == 160


@pytest.mark.parametrize("swapped", [False, True])
def test_compacting_keeps_each_groups_rate_and_what_the_optimizer_knows(swapped):
    """The network's parameters need not be in the optimizer's first group."""
    network, masks = make_network()
    other = nn.Parameter(torch.ones(1))
    groups = [{"params": network.parameters(), "lr": 1e-2}, {"params": [other], "lr": 5e-2}]
    optimizer = torch.optim.Adam(reversed(groups) if swapped else groups, fused=True)
    step(network, optimizer)
    twin, twin_optimizer = make_network()[0], None
    twin.load_state_dict(network.state_dict())
    twin_optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2, fused=True)
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        twin_optimizer.state[b] = {key: value.clone() for key, value in optimizer.state[a].items()}
    sk.compact_network(network, masks, optimizer)
    own = [group for group in optimizer.param_groups if any(p is network.sparse.flat for p in group["params"])]
    assert [(group["lr"], len(group["params"])) for group in own] == [(1e-2, 1)]
    for _ in range(3):
        step(network, optimizer)
        step(twin, twin_optimizer)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_expanding_gives_back_the_same_layers_with_todays_values_and_moments():
    network, masks = make_network()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    step(network, optimizer)
    parameters = list(network.parameters())
    sk.compact_network(network, masks, optimizer)
    step(network, optimizer)
    values, moments = network.state_dict(), network.sparse.expand(optimizer.state[network.sparse.flat]["exp_avg"])
    sk.expand_network(network, optimizer)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert optimizer.param_groups[0]["params"] == parameters and len(optimizer.state) == 4
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, values[name]) and torch.equal(
            optimizer.state[parameter]["exp_avg"], moments[name]
        )
    assert len({id(optimizer.state[p]["step"]) for p in parameters}) == 4  # each is counted up by itself
    step(network, optimizer)
    assert {optimizer.state[p]["step"].item() for p in parameters} == {3}


def test_a_frozen_network_stays_frozen():
    network, masks = make_network()
    network.requires_grad_(False)
    sk.compact_network(network, masks)
    assert not network.sparse.flat.requires_grad
    network.requires_grad_(True)
    sk.expand_network(network)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_compacted_network_can_be_copied_and_saved(tmp_path):
    network, masks = make_network()
    x = torch.randn(20, 5)
    sk.compact_network(network, masks)
    torch.save(network, tmp_path / "network.pt")
    for other in (copy.deepcopy(network), torch.load(tmp_path / "network.pt", weights_only=False)):
        assert torch.equal(other(x), network(x)) and other.sparse.flat is not network.sparse.flat
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), network.state_dict().values()))
        other.sparse.flat.data.zero_()
        assert network(x).any() and not other(x).any()


def test_parameters_of_another_type_are_refused():
    _, _, mlp = make_mlp([5, 9, 2], 0.6, 0)
    with torch.no_grad(), pytest.raises(ValueError, match="needs float32 of shape"):
        mlp.double()(torch.zeros(4, 5))


def test_gradients_are_masked_as_soon_as_backward_returns(run):
    """So that clip_grad_norm_ between backward and step sees the same network however it is computed."""
    norms = {}

    def before_step(optimizer, *_):
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.setdefault(compute, []).append(torch.nn.utils.get_total_norm([p.grad for p in params]).item())

    for compute in ("masked", "sparse"):
        hook = register_optimizer_step_pre_hook(before_step)
        try:
            run(compute=compute, sparsity=0.8, total_timesteps=70)
        finally:
            hook.remove()
    assert len(norms["masked"]) >= 9 and norms["masked"] == pytest.approx(norms["sparse"], rel=1e-3)
