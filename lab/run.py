"""One run: its environment, its folder, its log, its evaluations and checkpoints, and how it is resumed."""

import contextlib
import errno
import fcntl
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import NoReturn

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import sparse_utils
from lab import baselines, checkpoints, edits, environment, kernels, record, topology
from lab.checkpoints import MAY_CHANGE, OF_TRAINING, is_of_the_policy, pack, put_back, write_json, write_tensors
from lab.environment import EVALUATION_LIMIT, STOP_SIGNALS, Guard, make_eval_env, play
from lab.flags import DISK_FULL, PROJECT, bad_input, fail
from lab.record import code_hash, file_of, hyperparameters, identity, read_config, settle, sources, unused
from lab.replay import ReplayBuffer

CHECKPOINT_FORMAT = 8  # increased by every change after which older checkpoints cannot be resumed
SPS_BURN_IN = 1000  # steps after learning starts and pruning that do not count in charts/SPS
# keys of checkpoint.pt and final.pt that are not parts of `state`; older files have `added`
ABOUT = {
    "script", "format", "args", "global_step", "statistics", "in_kernels", "masks", "random", "fingerprint", "returns",
    "added", "replay", "sps_seconds", "log_sizes",
}  # fmt: skip
# flags that have a fixed place in the name of a run's folder
IN_NAME = {"env_id", "exp_name", "method", "critic_method", "sparsity", "critic_sparsity", "criterion", "distribution"}
REWARD_WRAPPERS = (gym.RewardWrapper, gym.wrappers.NormalizeReward)
CANNOT_WRITE = (*DISK_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


# THE FOLDER, AND WHAT MADE A RUN


def claim(run_dir: Path) -> int:
    """Lock a run folder until the file descriptor that this gives is closed or the process ends. Ends the program with
    one sentence if another process has locked it. Where the file system has no locks, nothing is locked."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        fail(f"another process is running {run_dir}; let it end or stop it first", code=os.EX_TEMPFAIL)
    except OSError:
        pass
    return lock


def versions_of(env: gym.Env, names: dict) -> dict[str, str]:
    """The versions of what every run uses, of the modules among the `names` of the script, of the environment's
    packages, and of those that its files import."""
    homes = dict.fromkeys(kind.__module__ for kind in type(env).__mro__)
    modules = [torch, gym, mujoco, np, *names.values(), *(sys.modules.get(home.partition(".")[0]) for home in homes)]
    modules += [part for name in homes for part in vars(sys.modules.get(name, gym)).values()]
    modules = [module for module in modules if inspect.ismodule(module) and "__version__" in vars(module)]
    return {m.__name__: str(m.__version__) for m in modules if m.__name__ not in sys.stdlib_module_names}


def git_commit(folder: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=folder, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def keep_code(folder: Path, script: Path, env_id: str) -> None:
    """Copy the source files of a run, so that `diff -r` of two runs shows how their code differs."""
    for path in sources(script, env_id):
        root = max({*record.folders_of(script)} & {*path.parents}, key=lambda folder: len(folder.parts))
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


# THE RUN


class Run:
    """One run of a script. Its folder holds config.json, TensorBoard's event files, checkpoint.pt with replay/, and at
    the end final.pt.

    `state` is a dictionary of everything of the agent that a checkpoint has to hold: modules, optimizers, generators,
    tensors, the rows in state["nets"], and any object with state_dict() and load_state_dict(). With --resume the
    constructor puts a checkpoint back into it, in place. Ends the program with one sentence if something cannot work,
    and writes nothing before it has checked everything."""

    def __init__(self, args: object, script: Path, env: gym.Env, state: dict, rb: ReplayBuffer):
        self.args, self.script, self.env, self.state, self.rb = args, script, env, state, rb
        self.nets, self.device = state["nets"], torch.device(args.device)
        self.limited = environment.has_time_limit(env)
        # from the same random numbers as the environment of training, so that both are alike if the constructor draws
        with environment.apart(None, args.seed, self.device):
            self.eval_env = make_eval_env(args.env_id, args.capture_video)
        for part in environment.attributes(env).values():
            if isinstance(part, gym.Space) and part is not env.action_space:  # seeded by the script
                part.seed(args.seed)
        self.start_step, self.learn_from, self.saved_at, self.repeats = 0, args.learning_starts, -math.inf, False
        caller = inspect.currentframe().f_back
        variables = edits.variables_of(caller)
        files = sources(script, args.env_id)
        kinds = {kind.__name__: kind for layer in environment.layers(env) for kind in type(layer).__mro__[::-1]}
        if foreign := edits.replaced(script, kinds | caller.f_globals, files):
            what = f"train uses {', '.join(foreign)} from outside the files of {script.name}"
            fail(f"{what}, so the record would miss it; put it into a copy of {script.name} or a module it imports")
        ours = {PROJECT / "lab", PROJECT / "sparse_utils.py"}
        # the script and the reader's modules
        self.own_files = tuple(path for path in files if path.suffix == ".py" and not ours & {path, *path.parents})
        self.known = {*state}
        self.begun_with = {param for net in self.nets.values() for param in net.network.parameters()}
        made = {name: value for name, value in variables.items() if isinstance(value, nn.ModuleList)}
        made |= state | {"env": env, "rb": rb}
        self.named = {name: part for name, part in made.items() if variables.get(name) is part}
        self.checkpoint, self.returns, self.writer, segments, saved = None, {}, None, [], None
        changed = []  # what a resumed run does otherwise than before, in words
        if reserved := sorted(ABOUT & state.keys()):
            fail(f"checkpoints use {reserved[0]} for something else; give that part of `state` another name")
        if "actor" not in state:
            fail("`state` has no part named actor, which --evaluate and --load need; name the policy so")
        flags = asdict(args)
        settled = getattr(args, "_settled", flags)
        if args.evaluate is None and (now := [n for n in flags if [flags[n]] != [settled[n]]]):  # a NaN equals itself
            why = "by which neither --resume nor a sweep would know the run; change its default, or use a variable"
            fail(f"train changes --{now[0].replace('_', '-')} before Run(...), {why}")
        try:
            self.flags = flags | {"resume": None}  # as files hold them, whatever train does to `args`
            json.dumps(self.flags)
        except TypeError as error:
            fail(f"a flag cannot be recorded ({error}); make it a text, number, bool or tuple of these")
        if not isinstance(getattr(rb, "rows", None), Tensor) or "added" not in vars(rb):
            fail("checkpoints need a tensor `rows` and `added` of the replay buffer; subclass that of lab/replay.py")
        with bad_input():
            restored = environment.generators(env, self.eval_env).values()
            optimizers = edits.check_parts(state, rb, variables, self.own_files, restored)
        self.training = [part for part in state.values() if isinstance(part, torch.optim.Optimizer)]
        held = edits.kept_in_torch(self.nets, self.training, script, caller, self.own_files)
        if dense := edits.without_masks(state):
            why = "which FLOPs leave out; only nn.Linear weights of networks and targets in rows of `nets` are pruned"
            tqdm.write(f"warning: nothing prunes some weights of {', '.join(dense)}, {why}")
        if args.evaluate is not None:
            saved = self.load_policy()
        elif args.resume is not None:
            saved, segments, past = self.restore(optimizers)
        elif args.load is not None:
            path = file_of(args.load)
            self.load_agent(path, checkpoints.load_state(path, script, of_any_script=True))
            record.with_hash(args.load)  # refuses a file that was written anew since settle took its hash
        kept = saved.get("in_kernels") if saved and args.compute == saved["args"]["compute"] else None
        with bad_input():
            milliseconds = kernels.choose(self.nets, args.compute, args.batch_size, kept, held)
        if args.evaluate is not None:
            return
        now = {
            "from_step": self.start_step,
            "total_timesteps": args.total_timesteps,
            "code": code_hash(script, args.env_id),
            "git_commit": git_commit(script.resolve().parent),
            "processor": processor(),
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "torch_threads": args.torch_threads,
            "in_kernels": self.in_kernels(),
            "milliseconds": milliseconds,
            "optimizers": optimizers,
            "versions": {"python": platform.python_version()} | versions_of(env.unwrapped, caller.f_globals),
        }
        if self.checkpoint is None:
            self.folder = self.make_folder()
            self.lock = claim(self.folder)
        else:
            self.rewind(self.checkpoint["log_sizes"])
            for what in ("total_timesteps", "code", "processor", "device", "torch_threads", "in_kernels", "versions"):
                before = past.get(what, now[what])
                # a package that an older record lacks counts as unchanged
                if (now[what] | before if what == "versions" else before) != now[what]:
                    was = f"was {before} and is {now[what]} from step {self.start_step} on"
                    changed.append(f"the run's {what} {was}")
                    tqdm.write(f"warning: {changed[-1]}")
        config = {"script": script.stem, "args": self.flags, "segments": [*segments, now]}
        try:
            write_json(self.folder / "config.json", config)
            keep_code(self.folder / "code" / now["code"], script, args.env_id)
            self.writer = SummaryWriter(self.folder)
            if self.checkpoint is None:
                self.log_args(now["code"])
            elif changed:
                self.writer.add_text("hyperparameters", "\n\n".join(changed), self.start_step)
        except OSError as error:
            self.give_up(error)
        self.warn_of_evaluations()
        wait = 0.5 if sys.stderr.isatty() else 60
        shown = {"initial": self.start_step, "unit": " steps", "mininterval": wait, "dynamic_ncols": True}
        self.bar = tqdm(range(self.start_step, args.total_timesteps + 1), "", args.total_timesteps, **shown)
        self.sps_from = max(args.learning_starts, args.prune_at) + SPS_BURN_IN
        self.clock = time.perf_counter() - (saved["sps_seconds"] if saved else 0.0)

    def warn_of_evaluations(self) -> None:
        """Warn if evaluations lack a wrapper or an argument of training, log changed rewards, or have no time limit."""
        layers, of_evaluation = environment.layers(self.env), environment.layers(self.eval_env)
        alone = [kind.__name__ for kind in Counter(map(type, layers)) - Counter(map(type, of_evaluation))]
        mine, there = (getattr(made.unwrapped.spec, "kwargs", {}) for made in (self.env, self.eval_env))
        given = {n: str(v) for n, v in mine.items() if n != "render_mode" and str(there.get(n)) != str(v)}
        if alone := [*alone, *(f"{n}={v}" for n, v in given.items() if " at 0x" not in v)]:  # an address
            where = "put what both need into make_env in lab/environment.py"
            tqdm.write(f"warning: evaluations do without {', '.join(alone)}, which is in training alone; {where}")
        if names := [type(layer).__name__ for layer in of_evaluation if isinstance(layer, REWARD_WRAPPERS)]:
            tqdm.write(f"warning: returns of evaluations are of rewards that {', '.join(names)} changed")
        if not self.limited:
            ends = f"its episodes end by themselves, and evaluation episodes are cut after {EVALUATION_LIMIT} steps"
            where = "gymnasium.register(..., max_episode_steps=...) sets one"
            tqdm.write(f"warning: {self.args.env_id} has no time limit, so checkpoints come only where {ends}; {where}")

    # the folder

    def make_folder(self) -> Path:
        """A new folder, named as lab/README.md says; two methods or sparsities are <actor's>+<critics'>."""
        args = self.flags | {"load": self.args.load and self.args.load.rpartition("@")[2]}  # the hash alone
        methods, sparsities = (dict.fromkeys([args[name], args[f"critic_{name}"]]) for name in ("method", "sparsity"))
        parts = [args["env_id"], args["exp_name"], "+".join(methods)]
        if methods.keys() - sparse_utils.UNPRUNED.keys():
            parts.append(f"{args['criterion']}-{args['distribution']}")  # TensorBoard breaks long names at a hyphen
        parts.append("s" + "+".join(map(str, sparsities)))
        usual = vars(type(self.args)())  # the defaults
        usual |= {"prune_at": args["learning_starts"], "drop_criterion": baselines.usual_drop({*methods})}
        left_out = IN_NAME | MAY_CHANGE | {"seed", "runs_dir"}
        parts += [f"{name}-{value}" for name, value in args.items() if value != usual[name] and name not in left_out]
        name = re.sub("[/:]", "-", "__".join(parts)[:200]) + f"__{self.args.seed}"  # file systems take 255 bytes
        try:
            Path(self.args.runs_dir).mkdir(parents=True, exist_ok=True)
            for unix_time in itertools.count(int(time.time())):  # a run with equal flags may have started this second
                with contextlib.suppress(FileExistsError):
                    (folder := Path(self.args.runs_dir) / f"{name}__{unix_time}").mkdir()
                    return folder
        except OSError as error:
            code = os.EX_TEMPFAIL if error.errno in DISK_FULL else 2  # after which a sweep tries again
            fail(f"cannot make the run folder ({error}); choose another --runs-dir", code)

    # checkpoints

    def steps(self) -> Iterator[int]:
        """The steps from `start_step` to --total-timesteps, both included, with a progress bar. Ends the program with
        one sentence if `train` has added to `state` after Run(...), or has made a variable that checkpoints would lack
        or that holds layers or parameters that the kernels replace."""
        caller = inspect.currentframe().f_back
        with bad_input(), kernels.in_torch(self.nets):
            restored = environment.generators(self.env, self.eval_env).values()
            edits.check_parts(self.state, self.rb, edits.variables_of(caller), self.own_files, restored)
            held = edits.held_apart(self.nets, self.training, edits.used_later(self.script, caller), self.own_files)
        if late := self.state.keys() - self.known:
            fail(f"{', '.join(sorted(late))} came into `state` after Run(...), too late to be resumed; add it before")
        for name in [name for name in self.in_kernels() if name in held]:
            why = f"{held[name]}, and the kernels replace its layers"
            fail(f"{name}: {why}; make it before Run(...), or use --compute masked")
        for step in self.bar:
            self.env.set_wrapper_attr("global_step", step)
            if step == self.sps_from:
                self.clock = time.perf_counter()
            if STOP_SIGNALS and not self.limited and self.saved_at >= 0:
                self.stop(step)
            yield step

    def reset(self, global_step: int) -> np.ndarray:
        """Reset the environment and return the observation. Between episodes the environment should have no state but
        random generators and statistics, so checkpoints are written here: at step 0, once --checkpoint-frequency steps
        have passed, at --total-timesteps if an episode ends there, and after Ctrl-C or kill, which then end the run.
        Warns if a resumed run goes on from another state than the saved one. Ends the program with one sentence, the
        last checkpoint kept, if train has replaced `env`, `rb`, a part of `state`, or a ModuleList by one that holds
        networks outside `state`, or if `check_weights` finds a bad weight."""
        variables = edits.variables_of(inspect.currentframe().f_back)
        parts = {part for part in self.state.values() if isinstance(part, nn.Module)}
        for name, part in self.named.items():
            now = variables.get(name, part)
            regrouped = isinstance(now, nn.ModuleList) and name not in self.state and {*now} <= parts
            if now is not part and getattr(now, "_orig_mod", None) is not part and not regrouped:  # as of torch.compile
                why = "so checkpoints and kernels would go on with the old one; change it in place or before Run(...)"
                fail(f"`{name}` in train is no longer the object that it was at Run(...), {why}", code=1)
        if self.args.evaluate is not None:
            obs, _ = self.env.reset(seed=self.args.seed)
            environment.set_statistics(self.env, self.statistics)
            return obs
        saved, self.checkpoint = self.checkpoint, None
        if saved:  # this is the reset with which a resumed run begins
            self.env.reset(seed=self.args.seed)
            environment.restore(self.env, self.eval_env, saved)
        begun = environment.state_of(self.env, self.eval_env)
        obs, _ = self.env.reset(seed=self.args.seed if global_step == 0 else None)
        due = global_step - self.saved_at >= self.args.checkpoint_frequency or global_step == self.args.total_timesteps
        due = due or bool(STOP_SIGNALS)
        if saved or due:  # a checksum of everything is too slow for every short episode
            variables = {n: v for n, v in variables.items() if v is not self.state and v is not self.rb}
            with kernels.in_torch(self.nets):  # as `variables` may hold layers of theirs
                self.check_weights(global_step)  # before a checkpoint takes the place of the last one
                begun["fingerprint"] = environment.fingerprint(self.env, variables, self.own_files, MAY_CHANGE)
            begun["fingerprint"]["the observation"] = obs.tolist()
            if self.has_buffer(global_step):  # named like a variable of train, which an older file may lack
                begun["fingerprint"]["`rb.added` in train"] = self.rb.added
        if saved:
            before, now = saved["fingerprint"], begun["fingerprint"]
            unset = {name for name in before.keys() ^ now.keys() if name.endswith("` in train")}  # as in its loop
            if other := [name for name in before | now if name not in unset and before.get(name) != now.get(name)]:
                which = f"the episode at step {global_step} begins with another value of {', '.join(other)} than before"
                held = "what is in `state`, random generators, and the running statistics of the environment"
                tqdm.write(f"warning: {which} the interruption. Checkpoints hold {held}, so this may be another run.")
        if due:
            self.save(global_step, pack(begun))
            if STOP_SIGNALS:
                self.stop(global_step)
        return obs

    def save(self, global_step: int, begun: dict) -> None:
        """Write a checkpoint as a whole."""
        with kernels.in_torch(self.nets):
            checkpoint = {name: pack(part) for name, part in self.state.items()}
        checkpoint |= self.about(global_step) | begun
        checkpoint["replay"] = pack({name: part for name, part in vars(self.rb).items() if name != "rows"})
        checkpoint["sps_seconds"] = time.perf_counter() - self.clock
        with_buffer = self.has_buffer(global_step)
        try:
            self.writer.flush()
            if with_buffer:
                checkpoints.write_replay(self.folder, self.rb)
            checkpoint["log_sizes"] = {path.name: path.stat().st_size for path in self.synced_logs()}
            write_tensors(self.folder / "checkpoint.pt", checkpoint)
        except OSError as error:
            self.give_up(error)
        for path, (_, stop) in checkpoints.replay_files(self.folder).items():
            if not with_buffer or stop <= self.rb.added - len(self.rb.rows):
                path.unlink()
        self.saved_at = global_step

    def give_up(self, error: OSError) -> NoReturn:
        """Raise the error or, before the first checkpoint, delete the folder and end the program with one sentence."""
        if self.saved_at >= 0:
            raise error
        if self.writer is not None:
            with contextlib.suppress(OSError):  # it writes the rest of the log
                self.writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # or a sweep that waits for room would leave many of them
        code = os.EX_TEMPFAIL if error.errno in DISK_FULL else 1
        fail(f"{error}; make room or make it writable, and start the run anew, since its folder is deleted", code)

    def synced_logs(self) -> list[Path]:
        """The event files, as they are on the disk even if the power fails now."""
        logs = list(self.folder.glob("*tfevents*"))
        for path in logs:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        return logs

    def has_buffer(self, global_step: int) -> bool:
        """Whether the checkpoint of this step holds the replay buffer, which pruning may need."""
        return self.args.save_buffer or global_step <= self.args.prune_at

    def about(self, global_step: int) -> dict:
        about = {"script": self.script.stem, "format": CHECKPOINT_FORMAT, "args": self.flags}
        return about | {"global_step": global_step, "in_kernels": self.in_kernels(), "returns": self.returns}

    def in_kernels(self) -> list[str]:
        return [name for name, net in self.nets.items() if net.in_kernels]

    def not_finite(self) -> str | None:
        """The first part of `state` with a weight that is not finite, or None."""
        for name, part in self.state.items():
            params = part.parameters() if isinstance(part, nn.Module) else [part] if isinstance(part, Tensor) else []
            # trained parameters alone: the logarithm of a fixed alpha of 0 is infinite
            if not all(param.isfinite().all() for param in params if param.requires_grad):
                return name
        return None

    def check_weights(self, global_step: int) -> None:
        """End the program with one sentence if a weight is not finite or, though it is pruned, not zero, or if it came
        after Run(...) and no optimizer trains it."""
        if name := self.not_finite():
            self.end(f"a weight of {name} is not finite at step {global_step}: training diverged")
        idle = edits.untrained(self.state, self.own_files)
        if new := [name for name, param in idle.items() if param not in self.begun_with]:
            self.end(f"no optimizer trains {new[0]} at step {global_step}; change layers in place, do not replace them")
        for name, net in self.nets.items():
            for layer, mask in net.masks.items():
                if net.weights[layer][~mask].any():
                    why = "since something beside its row in `nets` changes them: an optimizer, a gradient, another row"
                    self.end(f"pruned weights of {name}.{layer} are not zero at step {global_step}, {why}")

    def end(self, what: str) -> NoReturn:
        """End the program with one sentence, and with the log closed."""
        self.writer.close()
        fail(f"{what}; the log and the last checkpoint are in {self.folder}", code=1)

    def stop(self, global_step: int) -> NoReturn:
        """End the program as a signal asks, with the command that goes on from the last checkpoint."""
        self.writer.close()
        command = f"python {shlex.quote(os.path.relpath(self.script))} --resume {shlex.quote(str(self.folder))}"
        since = "" if self.saved_at == global_step else f" from the last checkpoint, of step {self.saved_at},"
        tqdm.write(f"stopped at step {global_step}; go on{since} with: {command}")
        sys.exit(128 + STOP_SIGNALS[0])

    def restore(self, optimizers: dict[str, str]) -> tuple[dict, list[dict], dict]:
        """Put agent and buffer of the run that --resume names back, and the recorded options of its optimizers into
        `optimizers`. No file is changed. Returns the checkpoint and what `begun_before` gives."""
        self.folder = Path(self.args.resume)
        self.lock = claim(self.folder)
        self.checkpoint = checkpoint = checkpoints.load_state(self.folder / "checkpoint.pt", self.script)
        config = read_config(self.folder)
        checkpoints.check_saved_args(self.args, config["args"])
        self.start_step = self.saved_at = checkpoint["global_step"]
        segments, past = record.begun_before(config, self.start_step)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            which = f"format {checkpoint['format']} and this version resumes {CHECKPOINT_FORMAT}"
            fail(f"the checkpoint of {self.folder} has {which}; use the version that wrote it")
        for name, was in past.get("optimizers", {}).items():
            here = optimizers.get(name, "none")
            which = f"{name} was {was} and is {here} in the script"
            if was.partition("(")[0] != here.partition("(")[0]:
                fail(f"{which}; use the script that saved it")
            if was != here:
                tqdm.write(f"warning: {which}; the run goes on with what it was")
            optimizers[name] = was
        if lost := sorted({*self.state, "random", "fingerprint", "log_sizes"} - checkpoint.keys()):
            fail(f"the checkpoint of {self.folder} lacks {', '.join(lost)}; use the script that saved it")
        try:
            environment.set_statistics(self.env, checkpoint["statistics"])  # for an evaluation before the first reset
            checkpoints.put_all_back(self.state, checkpoint)
            if self.has_buffer(self.start_step):
                put_back(vars(self.rb), checkpoint["replay"])  # with rb.added, which read_replay needs
                checkpoints.read_replay(self.folder, self.rb)
            else:  # collect anew before learning goes on
                self.learn_from += self.start_step
                when = f"until step {self.learn_from}; it ends at step {self.args.total_timesteps}"
                tqdm.write(f"warning: without its replay buffer the run does not learn {when}")
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            why = " ".join(str(error).split())
            fail(f"the checkpoint is not one of this script ({why}); use the script that saved it")
        sparse_utils.fix_masks(self.nets)
        self.returns = {step: value for step, value in checkpoint["returns"].items() if step < self.start_step}
        return checkpoint, segments, past

    def load_agent(self, path: Path, saved: dict) -> None:
        """Load the networks, alpha, other parts of the agent and the statistics of `env` from a saved agent."""
        mine = {name: part for name, part in self.state.items() if is_of_the_policy(name, part)}
        if other := sorted((saved.keys() - ABOUT - OF_TRAINING - self.state.keys()) | (mine.keys() - saved.keys())):
            fail(f"{path} and {self.script.name} do not both have {', '.join(other)}; use the script that saved it")
        of_bounds = {"action_scale", "action_bias", "action_low", "action_high"}
        buffers = self.state["actor"].named_buffers()
        bounds = {name: buffer.clone() for name, buffer in buffers if name.rpartition(".")[2] in of_bounds}
        try:
            checkpoints.put_all_back(mine, saved)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = f"the agent in {path} is not of the shape of this one ({' '.join(str(error).split())})"
            fail(f"{what}; use the script, the --hidden-size and the environment that it was trained with")
        if not all(torch.equal(self.state["actor"].get_buffer(name), bound) for name, bound in bounds.items()):
            fail(f"the actor in {path} is for other bounds of actions than those of {self.args.env_id}; use another")
        environment.set_statistics(self.env, saved.get("statistics", {}))  # by which its policy sees observations
        if other := saved.get("statistics", {}).keys() ^ environment.statistics(self.env).keys():
            which = f"{', '.join(sorted(other))}, so observations or rewards are other numbers"
            tqdm.write(f"warning: {path} and {self.args.env_id} do not both normalize by {which}")
        if name := self.not_finite():
            fail(f"a weight of {name} in {path} is not finite, as the logarithm of an alpha of 0; use another agent")

    def load_policy(self) -> dict:
        """Read agent, masks, statistics and, as the policy may use them, the numbers in state["progress"] from the file
        that --evaluate names. Returns the content of the file. Warns if other code made it."""
        path = file_of(self.args.evaluate)
        saved = checkpoints.load_state(path, self.script)
        checkpoints.check_saved_args(self.args, saved["args"])
        config = read_config(path.parent) if (path.parent / "config.json").exists() else {}
        if "segments" in config:  # or it is of another project
            _, made = record.begun_before(config, saved["global_step"])
            if made["code"] not in (None, code_hash(self.script, self.args.env_id)):
                tqdm.write(f"warning: other code made {path}, so this may be another policy")
        masks = saved.get("masks") or {name: row["masks"] for name, row in saved.get("nets", {}).items()}
        self.load_agent(path, saved)
        if "progress" in self.state and "progress" in saved:
            put_back(self.state["progress"], saved["progress"])
        for name, net in self.nets.items():
            net.load_state_dict({"masks": masks.get(name, {})})
        self.statistics, self.start_step, self.folder = saved.get("statistics", {}), saved["global_step"], path.parent
        alike = self.args.eval_episodes == saved["args"].get("eval_episodes")
        self.recorded = saved.get("returns", {}).get(self.start_step) if alike else None
        self.bar, self.sps_from = [self.args.total_timesteps], math.inf
        return saved

    def rewind(self, log_sizes: dict[str, int]) -> None:
        """Cut logs back to the checkpoint; delete newer logs and replay files and final.pt. Warns if a log is lost."""
        logs = {path.name: path for path in self.folder.glob("*tfevents*")}
        for name, size in log_sizes.items():
            if name not in logs or logs[name].stat().st_size < size:
                print(f"warning: {name} has lost some of what was logged before the checkpoint")
            else:
                os.truncate(logs[name], size)
        late = [path for path, (_, stop) in checkpoints.replay_files(self.folder).items() if stop > self.rb.added]
        for path in (*(logs[name] for name in logs.keys() - log_sizes.keys()), *late, self.folder / "final.pt"):
            path.unlink(missing_ok=True)  # final.pt comes anew at the end

    # the log

    def log(self, global_step: int, scalars: dict[str, Tensor | float]) -> None:
        """Log numbers, or tensors of one element, to TensorBoard. Ends the program with one sentence if a number whose
        tag begins with losses/, charts/ or eval/ is NaN or infinite. With --evaluate nothing is logged."""
        if self.args.evaluate is not None:
            return
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in scalars.items()}
        for name, value in values.items():
            if not math.isfinite(value) and name.startswith(("losses/", "charts/", "eval/")):
                self.end(f"{name} is {value} at step {global_step}: training diverged")
            self.writer.add_scalar(name, value, global_step)
        if "charts/episodic_return" in values:
            self.bar.set_postfix({"return": f"{values['charts/episodic_return']:.1f}"}, refresh=False)

    def log_args(self, code: str) -> None:
        """All flags as a table; those that act on the result, the script and its code for TensorBoard's HParams tab."""
        given = asdict(self.args)
        rows = "\n".join(f"|{key}|{value}|" for key, value in given.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
        settings = identity(given) | dict.fromkeys(unused(self.args)) | {"script": self.script.stem, "code": code[:7]}
        for flag in fields(self.args):  # a flag whose default is no number may be a word in another run
            if settings.get(flag.name) is not None and not isinstance(flag.default, (int, float)):
                settings[flag.name] = str(settings[flag.name])
        first = {name: given[name] for name in ("env_id", "seed")} | {"method": record.both_methods(given)}
        first["base"] = "+".join(filter(None, (settings["criterion"], settings["distribution"])))
        first["sparsity"] = max(given["sparsity"], given["critic_sparsity"])
        metrics = ["eval/final_return", "eval/episodic_return", "charts/SPS", "flops/training"]
        for summary in hyperparameters(settings, first, metrics):
            self.writer.file_writer.add_summary(summary)

    def speed(self, global_step: int) -> dict[str, float]:
        """Steps per second since step `sps_from`, without the time of evaluations; nothing until that step."""
        if global_step <= self.sps_from:
            return {}
        return {"charts/SPS": (global_step - self.sps_from) / (time.perf_counter() - self.clock)}

    def log_topology(self, global_step: int) -> None:
        """Write topology.json and masks.pt, and log what pruning and revival did to each network (lab/topology.py)."""
        sizes = self.env.observation_space.shape + self.env.action_space.shape
        report = topology.log_pruning(self.writer, global_step, self.nets, *sizes)
        write_json(self.folder / "topology.json", report)
        masks = {name: {"static": pack(net.static), "masks": pack(net.masks)} for name, net in self.nets.items()}
        write_tensors(self.folder / "masks.pt", masks)

    def log_rewiring(self, global_step: int, *rewired: object) -> None:
        """Record a rewiring in topology.json and TensorBoard; `rewired` is passed on to topology.log_rewiring."""
        report = json.loads((self.folder / "topology.json").read_text())
        topology.log_rewiring(self.writer, global_step, report, *rewired)
        write_json(self.folder / "topology.json", report)

    def evaluate(self, global_step: int, policy: Callable, training_flops: int, inference_flops: int) -> None:
        """Run noise-free episodes in `eval_env`, every --eval-frequency steps and at the end. Log them or, with
        --evaluate, print them. `policy` maps float32 observations (batch, observation size) to actions (batch, action
        size). charts/SPS does not count the time. A second call at one step ends the program with one sentence."""
        if global_step % self.args.eval_frequency and global_step != self.args.total_timesteps:
            return
        if global_step in self.returns:
            what = f"`run.evaluate` ran twice at step {global_step}, and a run records one return of a step"
            fail(f"{what}; log a second one by `run.log`", code=1)
        began, evaluates_only = time.perf_counter(), self.args.evaluate is not None
        taken = sum(layer.taken for layer in environment.layers(self.env) if isinstance(layer, Guard))
        alike = isinstance(self.eval_env, Guard)  # or make_env itself may repeat actions
        if alike and taken > global_step - self.start_step and not self.repeats:
            self.repeats = True
            which = f"the environment has taken {taken} steps where training counts {global_step - self.start_step}"
            where = "if train repeats actions, do that in make_env in lab/environment.py, so that evaluations do too"
            tqdm.write(f"warning: {which}; {where}")
        step = self.start_step if evaluates_only else global_step
        self.eval_env.set_wrapper_attr("global_step", step)
        environment.set_statistics(self.eval_env, environment.statistics(self.env))
        film = f"evaluate-{file_of(self.args.evaluate).stem}" if evaluates_only else f"step-{global_step}"
        video = self.folder / "videos" / film if self.args.capture_video else None
        with environment.apart(self.eval_env, self.args.seed, self.device):  # for a policy or an environment that draws
            parts = nn.ModuleList(part for part in self.state.values() if isinstance(part, nn.Module))
            training = [module for module in parts.modules() if module.training]
            for module in training:  # no noise, as of dropout; eval() would call a layer's own train(), and not undo it
                module.training = False
            played = play(self.eval_env, policy, self.args.eval_episodes, self.args.seed + 2**31, self.device, video)
            for module in training:
                module.training = True
        if played is None:
            self.stop(global_step)
        if evaluates_only:
            returns = ", ".join(f"{value:.1f}" for value in played[0])
            mean, deviation = np.mean(played[0]), np.std(played[0])
            print(f"step {step}: mean {mean:.1f}, standard deviation {deviation:.1f}\nreturns: {returns}")
            if self.recorded not in (None, mean):
                why = "the policy uses something that is not saved, or code, packages, machine or --compute differ"
                tqdm.write(f"warning: in the run itself the mean was {self.recorded:.1f}: {why}")
            return
        self.returns[global_step], length = map(float, map(np.mean, played))
        scalars = {"eval/episodic_return": self.returns[global_step], "eval/episodic_length": length}
        self.log(global_step, scalars | {"flops/training": training_flops, "flops/inference": inference_flops})
        self.clock += time.perf_counter() - began

    def finish(self) -> Path:
        """Write final.pt and eval/final_return, close everything and return the run folder."""
        if self.args.evaluate is not None:
            return self.folder
        end = self.args.total_timesteps
        if end not in self.returns:
            why = "training ended before it, or `run.evaluate` was not called"
            fail(f"there is no evaluation of step {end}: {why}; mend the script, then go on with --resume", code=1)
        # as compare.py takes it: the mean of the evaluations in the last tenth of training
        final_return = np.mean([value for step, value in self.returns.items() if step > 0.9 * end])
        self.writer.add_scalar("eval/final_return", final_return, end)
        self.writer.close()
        self.synced_logs()
        with kernels.in_torch(self.nets):
            self.check_weights(end)
            final = {n: pack(part) for n, part in self.state.items() if is_of_the_policy(n, part) or n == "progress"}
            final["masks"] = {name: pack(net.masks) for name, net in self.nets.items()}
            final |= self.about(end) | {"statistics": pack(environment.statistics(self.env))}
        write_tensors(self.folder / "final.pt", final)  # the last, since it tells that a run is finished
        self.env.close()
        self.eval_env.close()
        os.close(self.lock)
        print(f"final return {final_return:.1f}; saved {self.folder / 'final.pt'}")
        return self.folder


# THE COMMAND LINE


def on_signal(number: int, _: object) -> None:
    """The first signal ends the run after the episode (without a time limit, after the step), a later Ctrl-C at once.
    A second SIGTERM does nothing more, since a sweep that is stopped and a batch system may each send one."""
    if STOP_SIGNALS and number == signal.SIGINT:
        tqdm.write("stopped at once; if there is a checkpoint, go on from it with --resume and the run folder")
        os._exit(128 + number)
    STOP_SIGNALS.append(number)


def main(arguments: type, train: Callable) -> None:
    """Read the command line of a script and call its `train`, which with --evaluate only runs a saved policy. With
    --evaluate or --resume, a flag that is not given has its value in the saved run."""
    module = sys.modules[train.__module__]
    script = Path(module.__file__)
    if inspect.currentframe().f_back.f_globals["__name__"] != train.__module__:
        fail(f"`train` comes from {script.name}, so the record would miss this script; edit a copy of {script.name}")
    # --help, config.json and TensorBoard's table begin with the script's own flags
    order = sorted(fields(arguments), key=lambda flag: flag.name not in inspect.get_annotations(arguments))
    arguments.__dataclass_fields__ = {flag.name: flag for flag in order}
    args = tyro.cli(arguments, description=(module.__doc__ or "").split("\n")[0])
    if args.evaluate is not None or args.resume is not None:
        args = tyro.cli(arguments, default=checkpoints.saved_args(arguments, args, script))
    else:
        settled = settle(args)
        # settle also sets the sparsity of dense to 0, and a width of all neurons to None
        idle = {"critic_sparsity", "active_width", *unused(settled)}
        for name in sorted(idle & vars(args).keys()):
            given, value = getattr(args, name), getattr(settled, name)
            if given is not None and given != value:
                what = f"{name}={given} makes no difference to this run, which has {name}={value}"
                tqdm.write(f"warning: {what}; `settle` in lab/record.py decides that")
    for number in (signal.SIGINT, signal.SIGTERM):  # a signal ends --evaluate at once, without a traceback
        signal.signal(number, on_signal if args.evaluate is None else signal.SIG_DFL)
    try:
        train(args)
    except OSError as error:
        if error.errno == errno.ENOENT and re.search("tfevents|topology.json", str(error.filename)):
            fail(f"{error}: its folder is gone; move it back and go on with --resume, or start the run anew", code=1)
        if error.errno not in CANNOT_WRITE:
            raise
        if args.evaluate is not None:
            fail(f"{error}; nothing of the run was changed", code=1)
        code = os.EX_TEMPFAIL if error.errno in DISK_FULL else 1
        fail(f"{error}; the last checkpoint is whole: make room or make it writable, then go on with --resume", code)
    except (MemoryError, RuntimeError) as error:
        why = next(iter(str(error).splitlines()), "")
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory|ation overflow", why):
            raise
        fail(f"not enough memory ({why}); lower --hidden-size, --batch-size or --buffer-size", code=1)
