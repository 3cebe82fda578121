"""Training speed on this machine, as environment steps per second end to end: `python tests/benchmark.py`.

Every measurement is a process of its own, from the end of a burn-in to the end of training, with environment, sampling
and logging in it and evaluation left out. The configurations take turns, round after round, so that a slow moment of
the machine meets all of them; printed are the median over the rounds and, in brackets, the smallest and the largest.
Stable-Baselines3 and SBX are measured beside ours when they are installed. Nothing here is asserted.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

LEARNING_STARTS, BURN_IN = 1000, 200


@dataclasses.dataclass
class Benchmark:
    rounds: int = 3
    """rounds in which all configurations take turns"""
    threads: int = 1
    """threads, and cores that a process may use"""
    env_id: str = "Hopper-v4"
    """environment to train on"""
    tables: tuple[Literal["peers", "arms", "widths", "inference", "layers", "rule"], ...] = (
        "peers",
        "arms",
        "widths",
        "inference",
    )
    """tables to print: peers and arms (256 wide), widths (256, 512, 1024 at 90% and 95%), inference, layers (dense
    layers in torch or in the kernels), and rule (masked and sparse where --compute auto may choose either)"""


def steps_per_second(framework: str, algorithm: str, env_id: str, threads: int, steps: int, **flags) -> float:
    """One measured training run, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    total = LEARNING_STARTS + BURN_IN + steps
    if framework == "ours":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        script = importlib.import_module(f"{algorithm}_tar")
        script.SPS_BURN_IN = BURN_IN
        with tempfile.TemporaryDirectory() as folder:
            run_dir = script.train(
                script.Args(
                    env_id=env_id, runs_dir=folder, torch_threads=threads, total_timesteps=total + 1,
                    learning_starts=LEARNING_STARTS, eval_frequency=10**9, eval_episodes=1, **flags,
                )
            )  # fmt: skip
            return EventAccumulator(str(run_dir)).Reload().Scalars("charts/SPS")[-1].value
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(threads)

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == LEARNING_STARTS + BURN_IN:
                self.started = time.perf_counter()
            return True

    agent = getattr(importlib.import_module(framework), algorithm.upper())
    settings = {"learning_rate": 3e-4, "batch_size": 256, "train_freq": 1, "gradient_steps": 1, "device": "cpu"}
    if framework == "sbx":
        del settings["device"]
    model = agent(
        "MlpPolicy", env_id, learning_starts=LEARNING_STARTS, policy_kwargs={"net_arch": [256, 256]}, **settings
    )
    clock = Clock()
    model.learn(total, callback=clock)
    return steps / (time.perf_counter() - clock.started)


def measure(configurations: dict[str, dict], benchmark: Benchmark) -> dict[str, list[float]]:
    """Steps per second of each configuration in each round."""
    results = {name: [] for name in configurations}
    for _ in range(benchmark.rounds):
        for name, configuration in configurations.items():
            task = configuration | {"env_id": benchmark.env_id, "threads": benchmark.threads}
            child = subprocess.run(
                [sys.executable, __file__, "child", json.dumps(task)], capture_output=True, text=True
            )
            if child.returncode:
                sys.exit(f"{name} failed:\n{child.stderr}")
            if configuration.get("compute") == "sparse" and " sparse, since" not in child.stdout:
                sys.exit(f"{name} did not use the kernels:\n{child.stdout}")
            results[name].append(float(child.stdout.splitlines()[-1]))
            print(f"  {name}: {results[name][-1]:.1f}", file=sys.stderr)
    return results


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


def ratio(values: list[float], others: list[float]) -> str:
    """Median over the rounds of the ratio within a round."""
    return f"{statistics.median(a / b for a, b in zip(values, others, strict=True)):.2f}x"


def peers(benchmark: Benchmark) -> None:
    installed = [name for name in ("stable_baselines3", "sbx") if importlib.util.find_spec(name)]
    for algorithm in ("sac", "td3"):
        base = {"algorithm": algorithm, "steps": 2000}
        configurations = {name: base | {"framework": name} for name in installed}
        ours = base | {"framework": "ours"}
        configurations["dense, in torch"] = ours | {"method": "dense", "compute": "masked"}
        configurations["dense, in the kernels"] = ours | {"method": "dense", "compute": "sparse"}
        configurations["tar at 90%, masked"] = ours | {"compute": "masked"}
        configurations["tar at 90%, sparse"] = ours | {"compute": "sparse"}
        results = measure(configurations, benchmark)
        reference = installed[0] if installed else "dense, in torch"
        print(f"\n| {algorithm.upper()}, 256 wide | steps per second | against {reference} |\n|---|---|---|")
        for name, values in results.items():
            print(f"| {name} | {spread(values)} | {ratio(values, results[reference])} |")


def arms(benchmark: Benchmark) -> None:
    methods = ("dense", "tar", "uniform", "static", "set", "rigl", "tiny")
    for algorithm in ("sac", "td3"):
        base = {"framework": "ours", "algorithm": algorithm, "steps": 2000, "rewire_stop": 1.0}
        results = measure({method: base | {"method": method} for method in methods}, benchmark)
        print(f"\n| {algorithm.upper()}, 256 wide, 90% | steps per second | against dense |\n|---|---|---|")
        for name, values in results.items():
            print(f"| {name} | {spread(values)} | {ratio(values, results['dense'])} |", flush=True)


WIDTHS = [(256, 2000), (512, 400), (1024, 200)]  # hidden neurons, measured steps
CELLS = {
    "widths": [(width, sparsity, steps) for width, steps in WIDTHS for sparsity in (0.9, 0.95)],
    "rule": [
        *((32, 0.9, 2000), (64, 0.7, 2000), (64, 0.5, 2000), (256, 0.7, 1000), (256, 0.5, 1000), (512, 0.5, 300)),
        *((64, 0.0, 2000), (256, 0.0, 1000), (512, 0.0, 300)),
    ],
}


def sparse_over_masked(benchmark: Benchmark, cells: list[tuple[int, float, int]]) -> None:
    print("\n| SAC, tar | sparsity | masked | sparse | sparse over masked |\n|---|---|---|---|---|")
    for width, sparsity, steps in cells:
        base = {"framework": "ours", "algorithm": "sac", "hidden_size": width, "sparsity": sparsity, "steps": steps}
        results = measure({c: base | {"compute": c} for c in ("masked", "sparse")}, benchmark)
        masked, sparse = results["masked"], results["sparse"]
        row = f"{width} wide | {sparsity:.0%} | {spread(masked)} | {spread(sparse)} | {ratio(sparse, masked)}"
        print(f"| {row} |", flush=True)


def microseconds(*calls) -> list[float]:
    """The median time of each of these calls, over 300 turns."""
    times = [[] for _ in calls]
    for _ in range(300):
        for call, so_far in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            so_far.append(1e6 * (time.perf_counter() - started))
    return [statistics.median(values) for values in times]


def layers(benchmark: Benchmark) -> None:
    """Where the wholly dense layer of an otherwise sparse network is computed best, and a wholly dense network."""
    import torch
    import torch.nn as nn

    from lab import kernels

    def kernels(linears: dict[str, nn.Linear], masks: dict[str, torch.Tensor]) -> nn.Module:
        return kernels.SparseMLP(linears, {name: masks[name] for name in linears})

    def in_torch(linears: Iterable[nn.Linear]) -> nn.Module:
        fc1, fc2, fc3 = linears
        return nn.Sequential(fc1, nn.ReLU(inplace=True), fc2, nn.ReLU(inplace=True), fc3)

    def step(network: nn.Module, x: torch.Tensor, grad_y: torch.Tensor) -> None:
        torch.autograd.grad(network(x), [x, *network.parameters()], grad_y)

    class OneDNN(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(x, weight)
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

        @staticmethod
        def backward(ctx, grad_y):
            (x, weight), product = ctx.saved_tensors, torch.ops.mkldnn._linear_pointwise
            grad_x = product(grad_y, weight.T.contiguous(), None, "none", [], "")
            grad_weight = product(grad_y.T.contiguous(), x.T.contiguous(), None, "none", [], "")
            return grad_x, grad_weight, grad_y.sum(0)

    class OneDNNLinear(nn.Linear):
        def forward(self, x):
            return OneDNN.apply(x, self.weight, self.bias)

    torch.set_num_threads(benchmark.threads)
    print("\n| dense layer | others, 5% | it in torch, us | all in the kernels, us | ratio |\n|---|---|---|---|---|")
    small, large = (11, 256, 256, 1), (376, 256, 256, 34)
    for sizes, first in ((small, True), (large, True), (small, False), (large, False)):
        torch.manual_seed(0)
        linears = {f"{b}x{a}": nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])}
        name = list(linears)[0 if first else -1]
        masks = {n: torch.rand(m.weight.shape) < (1 if n == name else 0.05) for n, m in linears.items()}
        rest = {n: m for n, m in linears.items() if n != name}
        parts = [linears[name], nn.ReLU(inplace=True), kernels(rest, masks)]
        beside = nn.Sequential(*(parts if first else reversed(parts)))
        data = torch.randn(256, sizes[0], requires_grad=True), torch.randn(256, sizes[-1])
        t, k = microseconds(partial(step, beside, *data), partial(step, kernels(linears, masks), *data))
        print(f"| {name} | {', '.join(rest)} | {t:.0f} | {k:.0f} | {t / k:.2f}x |")
    print("\n| dense critic, 14 inputs | torch, us | its oneDNN, us | kernels, us | ratios |\n|---|---|---|---|---|")
    for width, _ in WIDTHS:
        sizes = {"fc1": (14, width), "fc2": (width, width), "fc3": (width, 1)}
        linears = {name: nn.Linear(*size) for name, size in sizes.items()}
        by_onednn = [OneDNNLinear(14, width), OneDNNLinear(width, width), linears["fc3"]]  # slower for one output
        masks = {name: torch.ones_like(m.weight, dtype=torch.bool) for name, m in linears.items()}
        networks = [in_torch(linears.values()), in_torch(by_onednn), kernels(linears, masks)]
        data = torch.randn(256, 14, requires_grad=True), torch.randn(256, 1)
        t, o, k = microseconds(*(partial(step, network, *data) for network in networks))
        print(f"| {width} wide | {t:.0f} | {o:.0f} | {k:.0f} | {t / k:.2f}x, {o / k:.2f}x |")


def inference(benchmark: Benchmark) -> None:
    import gymnasium as gym
    import torch

    import sac_tar
    from lab import kernels
    import sparse_utils

    def actor(width: int) -> sac_tar.Actor:
        return sac_tar.Actor(env.observation_space.shape[0], env.action_space, width)

    torch.set_num_threads(benchmark.threads)
    env = gym.make(benchmark.env_id)
    print(
        "\n| SAC actor | sparsity | batch | dense, us | sparse, us | cut, us | dense over sparse | dense over cut |",
        end="",
    )
    print(" dense, KiB | sparse, KiB | cut, KiB, and neurons |\n|---|---|---|---|---|---|---|---|---|---|---|")
    for width in (256, 512, 1024):
        for sparsity in (0.9, 0.95, 0.98):
            torch.manual_seed(0)
            dense, sparse = actor(width), actor(width)
            weights = sparse_utils.linear_weights(sparse)
            keep, _ = sparse_utils.connection_budget(sum(w.numel() for w in weights.values()), "static", sparsity, 0.0)
            masks = sparse_utils.static_prune(weights, keep, "random", "er", torch.Generator())
            budgets, methods = {"actor": (keep, 0)}, {"actor": "static"}
            cut = actor(
                sparse_utils.active_widths({"actor": sparse}, methods, budgets, "auto")["actor"]
            )  # as in final.pt
            kernels.compact_network(sparse, masks)
            mlp = sparse.sparse
            stored = [dense.parameters(), (mlp.flat, *mlp.indices, *mlp.masks.values()), cut.parameters()]
            sizes = [sum(t.numel() * t.element_size() for t in tensors) / 1024 for tensors in stored]
            memory = f"{sizes[0]:.0f} | {sizes[1]:.0f} | {sizes[2]:.0f}, {cut.fc2.in_features}"
            for batch in (1, 256):
                x = torch.randn(batch, env.observation_space.shape[0])
                with torch.no_grad():
                    d, s, c = microseconds(partial(dense, x), partial(sparse, x), partial(cut, x))
                times = f"{d:.0f} | {s:.0f} | {c:.0f} | {d / s:.1f}x | {d / c:.1f}x"
                print(f"| {width} wide | {sparsity:.0%} | {batch} | {times} | {memory} |")


def main(benchmark: Benchmark) -> None:
    from lab.run_folder import git_commit, processor

    names = ["torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sbx-rl"]
    installed = [(d.metadata["Name"] or "", d.version) for d in importlib.metadata.distributions()]
    found = {name.replace("_", "-"): version for name, version in installed}
    versions = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    print(f"{datetime.date.today()}, {processor()}, {benchmark.threads} thread(s), {benchmark.env_id}, batch 256")
    busy = os.getloadavg()[0]  # of the last minute, before anything is measured
    beside = f"BESIDE A LOAD of {busy:.1f} on {os.cpu_count()} cores" if busy > 0.3 else "the machine otherwise idle"
    print(f"{beside}; commit {git_commit(Path(__file__).parent)}")
    print(f"Python {sys.version.split()[0]}, {versions}; median of {benchmark.rounds} rounds (smallest-largest)")
    for table in benchmark.tables:
        if table in CELLS:
            sparse_over_masked(benchmark, CELLS[table])
        else:
            {"peers": peers, "arms": arms, "inference": inference, "layers": layers}[table](benchmark)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(steps_per_second(**json.loads(sys.argv[2])))
    else:
        import tyro

        main(tyro.cli(Benchmark, description=__doc__.splitlines()[0]))
