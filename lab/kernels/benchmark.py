"""Training speed on this machine, in environment steps per second: `python lab/kernels/benchmark.py`.

Every measurement is a process of its own, from the end of a burn-in to the end of training. It includes environment,
sampling and logging, but no evaluation. The configurations take turns in every round, so that a slow moment of the
machine affects all of them. The tables show the median over the rounds and, in brackets, the smallest and the largest.
Stable-Baselines3 is measured beside ours if it is installed. Nothing here is asserted.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LEARNING_STARTS, BURN_IN = 1000, 200
WIDTHS = {256: 2000, 512: 400, 1024: 200}  # hidden neurons, and steps that are measured
METHODS, COMPUTE = ("dense", "tar"), ("masked", "sparse")  # masked: in torch; sparse: in the kernels


@dataclass
class Args:
    # The tables to print. methods: six in the kernels against dense. peers: Stable-Baselines3 and ours. widths:
    # the kernels against masked torch.
    tables: tuple[Literal["methods", "peers", "widths"], ...] = ("methods", "peers", "widths")
    rounds: int = 3  # The rounds in which all configurations take turns.
    threads: int = 1  # The threads, and the cores, that a run may use.
    env_id: str = "Hopper-v4"  # The environment to train on.


def steps_per_second(framework: str, algorithm: str, env_id: str, threads: int, steps: int, **flags) -> float:
    """One measured training run, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    total = LEARNING_STARTS + BURN_IN + steps
    if framework == "ours":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        import lab.run

        lab.run.SPS_BURN_IN = BURN_IN
        script = importlib.import_module(f"{algorithm}_tar")
        with tempfile.TemporaryDirectory() as folder:
            args = script.Args(
                env_id=env_id, runs_dir=folder, torch_threads=threads, total_timesteps=total + 1,
                learning_starts=LEARNING_STARTS, eval_frequency=10**9, eval_episodes=1,
                criterion="random", distribution="er", **flags,
            )  # fmt: skip
            return EventAccumulator(str(script.train(args))).Reload().Scalars("charts/SPS")[-1].value
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
    settings |= {"learning_starts": LEARNING_STARTS, "policy_kwargs": {"net_arch": [256, 256]}}
    clock = Clock()
    agent("MlpPolicy", env_id, **settings).learn(total, callback=clock)
    return steps / (time.perf_counter() - clock.started)


def table(title: str, configurations: dict[str, dict], first: str, args: Args) -> None:
    """Measure configurations in turns and print a row for each: steps per second, and the median of the ratio to those
    of the `first` within a round."""
    results = {name: [] for name in configurations}
    for _ in range(args.rounds):
        for name, configuration in configurations.items():
            task = {"framework": "ours", "env_id": args.env_id, "threads": args.threads} | configuration
            command = [sys.executable, __file__, "child", json.dumps(task)]
            child = subprocess.run(command, capture_output=True, text=True)
            if child.returncode:
                sys.exit(f"{name} failed:\n{child.stderr}")
            results[name].append(float(child.stdout.splitlines()[-1]))
            print(f"  {name}: {results[name][-1]:.1f}", file=sys.stderr)
    print(f"\n| {title} | steps per second | against {first} |\n|---|---|---|")
    for name, values in results.items():
        ratio = statistics.median(a / b for a, b in zip(values, results[first], strict=True))
        print(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f}) | {ratio:.2f}x |")


def methods(algorithm: str, args: Args) -> None:
    # rewire_stop: by default so short a run is rewired at step 2000 alone, with 1.0 also at step 3000
    base = {"algorithm": algorithm, "compute": "sparse", "steps": 2000, "rewire_stop": 1.0}
    names = ("dense", "tar", "uniform", "static", "set", "rigl", "tiny")
    table(f"{algorithm.upper()}, 256 wide, 90%", {name: base | {"method": name} for name in names}, "dense", args)


def peers(algorithm: str, args: Args) -> None:
    base, found = {"algorithm": algorithm, "steps": 2000}, importlib.util.find_spec("stable_baselines3")
    rows = {"Stable-Baselines3": base | {"framework": "stable_baselines3"}} if found else {}
    rows |= {f"{method}, {how}": base | {"method": method, "compute": how} for method in METHODS for how in COMPUTE}
    table(f"{algorithm.upper()}, 256 wide, tar at 90%", rows, next(iter(rows)), args)


def widths(algorithm: str, args: Args) -> None:
    for width, steps in WIDTHS.items():
        for sparsity in (0.9, 0.95):
            base = {"algorithm": algorithm, "hidden_size": width, "sparsity": sparsity, "steps": steps}
            rows = {compute: base | {"compute": compute} for compute in COMPUTE}
            table(f"{algorithm.upper()}, tar, {width} wide, {sparsity:.0%}", rows, "masked", args)


def main(args: Args) -> None:
    from lab.run import git_commit, processor

    names = ["torch", "gymnasium", "mujoco", "numpy", "stable_baselines3"]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if importlib.util.find_spec(name)]
    print(f"{datetime.date.today()}, {processor()}, {args.threads} thread(s), {args.env_id}, batch 256")
    print(f"commit {git_commit(Path(__file__).parent)}, Python {sys.version.split()[0]}, {', '.join(versions)}")
    print(f"load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before; median of {args.rounds} rounds")
    for name in args.tables:
        for algorithm in ("sac", "td3") if name != "widths" else ("sac",):
            {"methods": methods, "peers": peers, "widths": widths}[name](algorithm, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        print(steps_per_second(**json.loads(sys.argv[2])))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
