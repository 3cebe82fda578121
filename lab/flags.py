"""The flags that every run has, the type of flags that name a rule, and how bad input ends the program."""

import contextlib
import errno
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent  # the folder of the scripts
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message` to stderr and exit by SystemExit with `code`: 2 for bad input, 1 for a run that failed."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # tqdm's own, so that it does not run into a progress bar
    sys.exit(code)


def refuse_repeated(words: list[str]) -> None:
    """End the program with one sentence if a flag is given twice, of which the parser would keep the last alone."""
    names = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
    if twice := [name for name in names if names.count(name) > 1]:
        fail(f"{twice[0]} is given twice; put all its values behind one")


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """End the program by `fail`, with exit code 2, if a ValueError is raised inside the block."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


def first_sentence(rule: object) -> str:
    """The help of a rule: a text, or the first sentence of the docstring of its function."""
    text = rule if isinstance(rule, str) else getattr(rule, "scores", rule).__doc__ or "no description"
    return re.split(r"(?<! al)\.( |$)", " ".join(text.split()))[0]


def one_of(rules: dict, help: str) -> type:
    """The type of a flag that takes a name of this dictionary, with `help` and the rules' own sentences as its help."""
    names = "; ".join(f"{name}: {first_sentence(rule)}" for name, rule in rules.items())
    return Annotated[Literal[tuple(rules)], tyro.conf.arg(help=f"{help} {names}.")]


@dataclass
class RunFlags:
    runs_dir: str = "runs"  # The folder in which this run makes a folder of its own.
    device: Literal["cpu", "cuda"] = "cpu"  # Where the networks and the replay buffer are kept.
    torch_threads: int = 1  # Threads of torch on the CPU. One run per core uses a machine best.
    # How networks are computed after pruning. masked: by torch, as dense layers with zeros in them. sparse: by C++
    # kernels, from the active connections alone. auto: by the one that is faster on this machine.
    compute: Literal["auto", "masked", "sparse"] = "auto"
    eval_frequency: int = 5000  # Environment steps between evaluations; there is one at step 0 and one at the end too.
    eval_episodes: int = 10  # Noise-free episodes of each evaluation, on an environment of its own.
    capture_video: bool = False  # Film the first episode of each evaluation as an mp4 in the run folder. Needs moviepy.
    checkpoint_frequency: int = 10_000  # Environment steps between checkpoints, each written when an episode ends.
    # Keep the replay buffer in checkpoints. Without it, a resumed run collects new transitions before it learns again.
    save_buffer: bool = True
    resume: str | None = None  # A run folder to continue from its last checkpoint, with the flags of that run.
    # A run folder or a .pt file. Training begins with its networks, targets, alpha and normalization statistics, and
    # its policy replaces random actions before --learning-starts.
    load: str | None = None
    # A run folder or a .pt file whose policy is run without noise for --eval-episodes episodes. Nothing is trained.
    evaluate: str | None = None


def require(args: object, rules: dict[str, tuple[bool, str]]) -> None:
    """End the program with one sentence if a rule, given as (whether it holds, what must hold), is broken."""
    for name, (holds, what) in rules.items():
        if not holds:
            fail(f"--{name.replace('_', '-')} must be {what}, got {getattr(args, name)}")


def positive(args: object, *names: str) -> dict[str, tuple[bool, str]]:
    given = {n: getattr(args, n) for n in names if hasattr(args, n)}
    given = {n: v if isinstance(v, (list, tuple)) else (v,) for n, v in given.items()}  # an edit may make it several
    return {n: (v and all(0 < number < math.inf for number in v), "positive and finite") for n, v in given.items()}


def at_least_0(args: object, *names: str) -> dict[str, tuple[bool, str]]:
    return {n: (0 <= getattr(args, n) < math.inf, "at least 0 and finite") for n in names if hasattr(args, n)}


def fraction(args: object, *names: str) -> dict[str, tuple[bool, str]]:
    return {n: (0 <= getattr(args, n) < 1, "at least 0 and below 1") for n in names if hasattr(args, n)}


def within_training(args: object, *names: str) -> dict[str, tuple[bool, str]]:
    end = args.total_timesteps
    what = f"at least 0 and below the end of training, --total-timesteps {end}"
    return {n: (0 <= getattr(args, n) < end, what) for n in names if hasattr(args, n)}
