"""What a run leaves behind: its folder, its log, the hash of its code. Bad input leaves one sentence alone."""

import dataclasses
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from conftest import MASK_IMAGE, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch.utils.tensorboard import SummaryWriter

import lab.run
import sac_tar
import sparse_utils
import td3_tar
from lab import baselines, record, topology
from lab.replay import ReplayBuffer

PROJECT = Path(sac_tar.__file__).parent
gym.register("Short-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=10)


def load(path):
    return torch.load(path / "final.pt" if path.is_dir() else path, weights_only=True)


def events(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"images": 0, "tensors": 0, "scalars": 0}).Reload()


def scalars(run_dir):
    """Everything logged but the speed, as tag -> [(step, value)]."""
    found = {}
    for log in map(events, run_dir.glob("*tfevents*")):  # of processes of one second, whose order the names do not tell
        for tag in log.Tags()["scalars"]:
            found[tag] = sorted([*found.get(tag, []), *((e.step, e.value) for e in log.Scalars(tag))])
    found.pop("charts/SPS", None)
    return found


def refused(capsys, call, *arguments, code=2, **flags):
    """The sentence with which a call ends the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **flags)
    lines = capsys.readouterr().err.replace("\x1b[A", "").splitlines()  # a bar of another test moves the cursor
    (message,) = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == code
    return message


def main(script, monkeypatch, *flags):
    """The script's command line in this process."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
    monkeypatch.setattr(lab.run.signal, "signal", lambda *_: None)
    exec("main(Args, train)", vars(script))


# what a run leaves


def test_a_run_leaves_its_files_and_logs_what_happened(run, script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # as from another folder than the script's
    monkeypatch.setattr(lab.run, "SPS_BURN_IN", 20)
    monkeypatch.setattr(lab.run.kernels, "choose", lambda *_: {"actor": [1.5, 2.5]})
    monkeypatch.setattr(topology, "mask_image", MASK_IMAGE)
    run_dir = run(criterion="snip", distribution="global", total_timesteps=310)
    files = {"config.json", "checkpoint.pt", "final.pt", "masks.pt", "topology.json", ".lock", "code"}
    assert {path.name for path in run_dir.iterdir() if "tfevents" not in path.name} == files
    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script.__name__ and config["args"]["prune_at"] == 60
    (part,) = config["segments"]
    assert part["code"] == record.code_hash(Path(script.__file__)) and part["device"] == "cpu" and part["processor"]
    assert part["from_step"] == 0 and part["in_kernels"] == []
    assert part["git_commit"] == lab.run.git_commit(PROJECT) and part["milliseconds"] == {"actor": [1.5, 2.5]}
    copy = run_dir / "code" / part["code"] / f"{script.__name__}.py"
    assert copy.read_bytes() == Path(script.__file__).read_bytes()
    assert part["versions"].keys() == {"python", "torch", "gymnasium", "mujoco", "numpy"}
    with gym.make("BipedalWalker-v3") as env:
        env.unwrapped.__class__ = type("Mine", (type(env.unwrapped),), {})
        found = lab.run.versions_of(env.unwrapped, {"pd": importlib.import_module("pandas")})
        assert found.keys() >= {"torch", "gymnasium", "Box2D", "pandas"}
    final, report = load(run_dir), json.loads((run_dir / "topology.json").read_text())
    assert final["args"] == config["args"] and final["global_step"] == 310 and final["script"] == script.__name__
    saved, log = torch.load(run_dir / "masks.pt", weights_only=True), events(run_dir)
    names = [f"{name}.{layer}" for name in report for layer in report[name]["layers"]]
    losses = {"qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss", "actor_loss"}
    losses |= {"alpha", "alpha_loss"} if script is sac_tar else set()
    expected = {f"losses/{loss}" for loss in losses} | {f"sparsity/density_{name}" for name in names}
    expected |= {f"sparsity/{name}" for name in report} | {"flops/inference", "flops/training", "charts/SPS"}
    expected |= {"charts/episodic_return", "charts/episodic_length", "eval/episodic_return", "eval/episodic_length"}
    assert set(log.Tags()["scalars"]) == expected | {"eval/final_return"}
    assert set(log.Tags()["images"]) == {f"topology/{name}" for name in names}
    logged = scalars(run_dir)
    for name, network in report.items():
        masks, size = final["masks"][name], sum(row["size"] for row in network["layers"].values())
        assert logged[f"sparsity/{name}"] == [(60, pytest.approx(1 - network["budget"] / size))]
        for layer, row in network["layers"].items():
            assert torch.equal(saved[name]["masks"][layer], masks[layer])
            assert row["static"] == int(saved[name]["static"][layer].sum()) and row["active"] == int(masks[layer].sum())
            density = pytest.approx(row["active"] / row["size"])
            assert logged[f"sparsity/density_{name}.{layer}"] == [(60, density)]
    texts = {tag: log.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in log.Tags()["tensors"]}
    assert "|hidden_size|24|" in texts["hyperparameters/text_summary"]
    assert texts["topology/revival/text_summary"] == (table := topology.topology_table(report))
    blind, read = max(row["blind_inputs"] for network in report.values() for row in network["layers"].values())
    assert blind > read and f"| {blind} -> {read} |" in re.sub(" +", " ", table)


class NoLinear(td3_tar.Actor):
    def __init__(self, env, hidden_size):
        super().__init__(env, hidden_size)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.weight = torch.nn.Parameter(torch.zeros(env.observation_space.shape[0], 1))

    def forward(self, x):
        return torch.tanh(x @ self.weight) * self.action_scale + self.action_bias


def test_a_network_without_a_linear_layer_trains_beside_sparse_ones(run, monkeypatch):
    monkeypatch.setattr(td3_tar, "Actor", NoLinear)
    folder = run(td3_tar, method="dense", critic_method="tar", critic_sparsity=0.8)
    assert json.loads((folder / "topology.json").read_text()).keys() == {"qf1", "qf2"}


def test_an_emptied_layer_is_a_warning_on_the_console_and_in_the_log(run, script, capsys):
    run_dir = run(method="static", criterion="magnitude", distribution="global", sparsity=0.97, prune_at=70)
    sentence, out = "qf1.fc3 keeps no connection after static pruning and has 0 after revival.", capsys.readouterr().out
    assert f"warning: {sentence}" in out and "Topology at step 70:" in out
    titles = "layer | shape | size | static | floor | deficit | revived | active | density | blind inputs | dead units"
    for line in (titles, "qf2.fc3 | 1x24 | 24 | 0 | 24 | 24 | 0 | 0 | 0.0000 | 24 -> 24 | 1 -> 1"):
        assert f"| {line} |" in re.sub(" +", " ", out)
    assert sentence.encode() in events(run_dir).Tensors("topology/warnings/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize("reserve, rewired, width", [(0, False, None), (2, False, None), (0, True, 2), (2, False, 2)])
def test_a_picture_shows_each_connection_of_a_mask(reserve, rewired, width):
    static, masks = torch.eye(4, 3).bool(), torch.eye(4, 3).bool()
    masks[1, 0] = True
    net = sparse_utils.Net(None, None, None, "tar", 0.5, reserve=reserve, width=width)
    net.static, net.masks = ({"fc1": mask, "fc2": mask.T} for mask in (static, masks))
    image, kept = MASK_IMAGE(net, "fc1", rewired), static.long()
    panels = [kept] if not (reserve or rewired) else [kept, masks.long() + masks * ~static]
    assert image.shape[1] == 263 * len(panels) - 8  # three columns of 85 pixels and a gap of 8
    for i, kinds in enumerate(panels):
        if width is not None:
            kinds[width:] = 3
        colours = [[list(topology.MASK_COLOURS[kind][0]) for kind in row] for row in kinds.tolist()]
        assert image[32:256:64, 263 * i + 42 : 263 * i + 255 : 85].tolist() == colours


@pytest.mark.parametrize(
    "given, opens_with, reserve, active_width",
    [
        ({"seed": 3}, ["magnitude+global", "A-v1", "tar", 3, 0.9], 0.1, None),
        ({"method": "dense"}, ["", "A-v1", "dense", 1, 0.0], None, None),
        ({"sparsity": 0.5, "critic_method": "dense"}, ["magnitude+global", "A-v1", "tar+dense", 1, 0.5], 0.1, None),
        (
            {"method": "static", "active_width": 24, "criterion": "snip"},
            ["snip+global", "A-v1", "static", 1, 0.9],
            None,
            "24",
        ),
    ],
)
def test_hparams_open_with_the_arm_and_hold_what_acts_on_the_result(tmp_path, given, opens_with, reserve, active_width):
    """TensorBoard opens with five columns, sorted as here, and cannot sort a column of numbers and strings."""
    args = record.settle(sac_tar.Args(env_id="A-v1", **given))
    with SummaryWriter(tmp_path) as writer:
        lab.run.Run.log_args(SimpleNamespace(args=args, writer=writer, script=Path("my_sac.py")), "c0dec0dec0de")
    contents = {tag: about.plugin_data.content for tag, about in events(tmp_path).summary_metadata.items()}
    infos = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG]).hparam_infos
    columns = sorted(infos, key=lambda info: (not info.differs, info.name))
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert [info.name for info in columns[:5]] == ["base", "env_id", "method", "seed", "sparsity"]
    assert [shown[info.name] for info in columns[:5]] == opens_with
    assert (shown.get("reserve"), shown.get("active_width")) == (reserve, active_width)
    assert (shown["script"], shown["code"]) == ("my_sac", "c0dec0d")  # an edited script is told apart
    # the same columns in every run, since TensorBoard takes those of any one run
    flags = dataclasses.asdict(args).keys() - record.NOT_OF_THE_RESULT
    assert {info.name for info in columns} == {"base", "script", "code"} | flags


# the folder


def folder_of(tmp_path, script, **flags):
    given = {"env_id": "A-v1", "runs_dir": str(tmp_path), "total_timesteps": 10**6} | flags
    args = record.settle(script.Args(**given))
    return lab.run.Run.make_folder(SimpleNamespace(args=args, flags=dataclasses.asdict(args))).name.rpartition("__")[0]


def test_all_neurons_are_no_active_width_whatever_the_default_of_a_script(script):
    width = [("active_width", int | str | None, "auto")]
    mine = dataclasses.make_dataclass("Mine", width, bases=(script.Args,))
    assert record.settle(mine(active_width=256)).active_width is None and record.settle(mine()).active_width == "auto"


def test_sizes_may_be_tuples_or_lists(script, capsys):
    sizes = [("hidden_size", tuple[int, ...], (256, 128))]
    mine = dataclasses.make_dataclass("Mine", sizes, bases=(script.Args,))
    assert record.settle(mine(active_width=64)).hidden_size == (256, 128)
    assert record.settle(mine(hidden_size=[64, 32])).hidden_size == [64, 32]
    for wrong in ((256, 0), [0], ()):
        said = f"must be positive and finite, got {wrong}"
        assert said in refused(capsys, record.settle, mine(hidden_size=wrong))
    with pytest.raises(ValueError, match=r"tiny counts the neurons of layers that are alike, and .* is \(256, 128\)"):
        baselines.hidden_size(script.Actor, None, (256, 128), "tiny", 0.9)


def test_a_folder_that_cannot_be_made_is_an_error(script, tmp_path, capsys):
    (tmp_path / "link").symlink_to(tmp_path / "a disk that is not there")
    for place in ("link", "link/runs"):
        assert "cannot make the run folder" in refused(capsys, folder_of, tmp_path / place, script)


def test_the_name_of_a_folder_tells_apart_every_flag_that_no_resumed_run_may_change(script, tmp_path, monkeypatch):
    (tmp_path / "agent.pt").write_bytes(b"")
    at_work = {"method": "rigl", "n_step": 2, "recent_fraction": 0.5}  # so that flags of these make a difference
    plain = folder_of(tmp_path, script, **at_work)
    assert plain == f"A-v1__{script.__name__}__rigl__magnitude-global__s0.9__n_step-2__recent_fraction-0.5__1"
    others = {  # None: a flag of another method
        "env_id": "B-v1", "exp_name": "mine", "method": "set", "critic_method": "tar", "criterion": "snip",
        "distribution": "er", "active_width": "auto", "drop_criterion": "random", "density_start": 0.5,
        "prune_at": 600, "final_prune_at": None, "lr_cycles": 3, "gamma": 0.9, "tau": 0.5, "rewire_fraction": 0.4,
        "rewire_stop": 0.5, "recent_fraction": 0.4, "sparsity": 0.5, "critic_sparsity": 0.8, "init": "sparse",
        "reserve": None, "alpha": None, "load": str(tmp_path / "agent.pt"),
    }  # fmt: skip
    kept = {"total_timesteps": 10**5, "checkpoint_frequency": 5, "capture_video": True, "torch_threads": 2}
    kept |= {"compute": "masked"}
    assert {folder_of(tmp_path, script, **at_work | {name: value}) for name, value in kept.items()} == {plain}
    names, kept = {plain}, {*kept, "device", "resume", "runs_dir", "evaluate"}
    for flag in (flag for flag in dataclasses.fields(script.Args) if flag.name not in kept):
        default = at_work.get(flag.name, flag.default)
        other = others.get(flag.name, not default if isinstance(default, bool) else (default or 1) * 2)
        name = folder_of(tmp_path, script, **at_work | {flag.name: other}) if other is not None else flag.name
        assert name not in names, flag.name
        names.add(name)
    tar = {folder_of(tmp_path, script), folder_of(tmp_path, script, reserve=0.2)}
    assert len(tar) == 2 and f"A-v1__{script.__name__}__tar__magnitude-global__s0.9__1" in tar
    assert folder_of(tmp_path, script, critic_method="dense").endswith("__tar+dense__magnitude-global__s0.9+0.0__1")
    assert folder_of(tmp_path, script, method="dense", sparsity=0.5) == f"A-v1__{script.__name__}__dense__s0.0__1"
    assert folder_of(tmp_path, script, env_id="mine:a/B-v0").startswith("mine-a-B-v0__")
    assert re.search("^.{200}__1$", folder_of(tmp_path, script, exp_name="x" * 300))
    monkeypatch.setattr(lab.run.time, "time", lambda: 1234.5)
    assert folder_of(tmp_path, script) == folder_of(tmp_path, script)  # two runs in one second have two folders
    assert {path.name for path in tmp_path.glob("*__123?")} == {f"{min(tar, key=len)}__{t}" for t in (1234, 1235)}


# the code


def test_the_code_is_the_same_in_every_version_of_python(tmp_path):
    """The text is this one on 3.11 to 3.13, between which those of ast.unparse and ast.dump differ."""
    (tmp_path / "a.py").write_text("def f(a, *, b=None):\n    'Docs.'\n    return f\"{a or ''}{b}\"  # why")
    names = [f"Name(id='{name}',ctx=Load())" for name in "ab"]
    either = f"BoolOp(op=Or(),values=[{names[0]},Constant(value='')])"
    values = ",".join(f"FormattedValue(value={part},conversion=-1)" for part in (either, names[1]))
    args = "arguments(args=[arg(arg='a')],kwonlyargs=[arg(arg='b')],kw_defaults=[Constant()])"
    expected = f"Module(body=[FunctionDef(name='f',args={args},body=[Return(value=JoinedStr(values=[{values}]))])])"
    assert record.essence(tmp_path / "a.py") == expected


def test_the_commit_and_whether_files_differ_from_it_are_recorded(tmp_path):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", tmp_path]
    assert lab.run.git_commit(tmp_path) is None
    (tmp_path / "a.py").write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.check_call([*git, *command])
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert lab.run.git_commit(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert lab.run.git_commit(tmp_path) == f"{commit}-dirty"


def copy_project(folder):
    shutil.copytree(PROJECT / "lab", folder / "lab")
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def test_an_edit_of_any_file_that_acts_is_other_code_and_a_comment_is_not(tmp_path):
    main_file = copy_project(tmp_path) / "sac_tar.py"
    acting = ["run", "checkpoints", "edits", "environment", "flags", "replay", "baselines", "record"]
    acting = ["sac_tar", "sparse_utils", "lab/kernels/__init__", *(f"lab/{name}" for name in acting)]
    idle, before = ["lab/topology"], record.code_hash(main_file)
    for name in (*acting, *idle):
        path = tmp_path / f"{name}.py"
        path.write_text(re.sub(r'\A"""[^"]*"""', '"""Other words."""  # and a comment', path.read_text()))
        if name in idle:
            path.write_text(path.read_text() + "\nedited = 1\n")
    kernel = tmp_path / "lab/kernels/kernels.cpp"
    kernel.write_text(f"// why\n/* and\nhow */{kernel.read_text()}")
    assert record.code_hash(main_file) == before == record.code_hash(Path(sac_tar.__file__))
    seen = {before}
    for path in (*(tmp_path / f"{name}.py" for name in acting), kernel):
        path.write_text(path.read_text() + "\nedited = 1\n")
        seen.add(record.code_hash(main_file))
    assert len(seen) == 2 + len(acting)


def test_what_the_environment_and_the_files_beside_a_script_import_is_code_too(tmp_path, monkeypatch):
    """A script in a folder of its own, with the project on PYTHONPATH."""
    script = tmp_path / "my_sac.py"
    script.write_text("import my_nets, sparse_utils\nhard = make_env('my_hard:Hard-v0')\n")
    seen = [record.code_hash(script, "my_envs:Mine-v0")]
    for path, text in {
        "my_nets.py": b"import my_losses", "my_losses.py": b"import my_nets", "my_envs.py": b"import my_world.physics",
        "my_world/__init__.py": b"from .sky import g", "my_world/sky.py": b"g = 9.81",
        "my_world/physics.py": b"from . import ground\nregister('Mine-v0', 'my_point:Mine')",
        "my_world/ground.py": b"\xef\xbb\xbffriction = 1", "my_point.py": b"# coding: latin-1\nname = '\xe4'",
        "my_hard.py": b"", "my_masks.py": b"",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(text)
        seen.append(record.code_hash(script, "my_envs:Mine-v0"))
    assert len(set(seen)) == len(seen) - 1 and seen[-1] == seen[-2] != record.code_hash(script, "Hopper-v4")
    monkeypatch.setattr(record, "PROJECT", copy_project(tmp_path / "project"))
    assert record.code_hash(script, "my_envs:Mine-v0") == seen[-1]
    with (tmp_path / "project" / "sparse_utils.py").open("a") as file:
        file.write("edited = 1\n")
    assert record.code_hash(script, "my_envs:Mine-v0") not in seen
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "sparse_utils.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'first'}:{tmp_path / 'project'}")  # as Python would import it
    assert tmp_path / "first" / "sparse_utils.py" in record.sources(script)


def test_the_packages_that_the_module_of_an_environment_is_in_are_code(tmp_path):
    (tmp_path / "my_envs" / "small").mkdir(parents=True)
    (tmp_path / "my_sac.py").write_text("")
    seen = []
    files = {"small/point.py": "from .. import g", "small/__init__.py": "g = 9.81", "__init__.py": "g = 1.62"}
    for name, text in files.items():
        (tmp_path / "my_envs" / name).write_text(text)
        seen.append(record.code_hash(tmp_path / "my_sac.py", "my_envs.small.point:Point-v0"))
    assert len({*seen}) == 3


def test_modules_on_the_path_that_are_not_installed_are_code(tmp_path, monkeypatch):
    script, elsewhere, seen = Path(sac_tar.__file__), tmp_path / "elsewhere", []
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'installed'}:{elsewhere}:{tmp_path / 'missing'}")
    (tmp_path / "installed" / "gymnasium.dist-info").mkdir(parents=True)
    for path, text in {"elsewhere/my_ant.py": "mass = 1", "installed/my_ant.py": "mass = 2"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        seen.append(record.code_hash(script, "my_ant:Ant-v0"))
    assert len({*seen}) == 1 and seen[0] != record.code_hash(script)
    lab.run.keep_code(tmp_path / "kept", script, "my_ant:Ant-v0")
    assert (tmp_path / "kept" / "my_ant.py").read_text() == "mass = 1"
    (tmp_path / "own.py").write_text("import sparse_utils")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT.parent))
    lab.run.keep_code(tmp_path / "deep", tmp_path / "own.py", "")
    assert (tmp_path / "deep" / "sparse_utils.py").exists()  # not below the project's name


# bad input


POSITIVE = ("total_timesteps", "hidden_size", "buffer_size", "batch_size", "policy_frequency", "eval_frequency")
POSITIVE += ("eval_episodes", "torch_threads", "checkpoint_frequency")
CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        *(({name: 0}, f"--{name.replace('_', '-')} must be positive") for name in POSITIVE),
        ({"sparsity": 1.0}, "--sparsity must be at least 0 and below 1, got 1.0"),
        ({"sparsity": float("nan")}, "--sparsity must be at least 0 and below 1"),
        ({"critic_sparsity": -0.5}, "--critic-sparsity must be at least 0 and below 1, got -0.5"),
        ({"sparsity": 0.9999999}, "--sparsity 0.9999999 keeps none of"),
        ({"reserve": 1.0}, "--reserve must be at least 0 and below 1"),
        ({"env_id": "Hoper-v4"}, "Did you mean: `Hopper`?"),
        ({"env_id": "no_such_module:Foo-v0"}, "cannot make no_such_module:Foo-v0"),
        ({"env_id": "BrokenProbe-v0"}, "BrokenProbe-v0 (KeyError: 'bool8'); `pip"),
        ({"prune_at": 160}, "--prune-at must be at least 0 and below the end of training, --total-timesteps 160, got"),
        ({"learning_starts": 160}, "--learning-starts must be at least 0 and below the end of training"),
        ({"gamma": 1.1}, "--gamma must be in [0, 1]"),
        ({"tau": 0.0}, "--tau must be above 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"q_lr": 0.0}, "--q-lr must be positive"),
        ({"autotune": False, "alpha": -0.1}, "--alpha must be at least 0"),
        ({"criterion": "snip", "prune_at": 0}, "--criterion snip needs replay data"),
        ({"active_width": 25}, "--active-width must be from 1 to --hidden-size 24, got 25"),
        ({"active_width": 6}, "--active-width 6 cannot hold"),
        ({"method": "tiny", "sparsity": 0.999}, "weights, more than the budget of 1; choose a lower"),
        ({"buffer_size": 10**13}, "--buffer-size 10000000000000 needs 400000 GB of memory; lower it"),
        ({"capture_video": True, "env_id": "Probe-v0"}, "--capture-video cannot film here"),
        ({"capture_video": True, "env_id": "Blank-v0"}, "(ValueError: render() gives no array, or __init__ does not"),
        pytest.param({"device": "cuda"}, "--device cuda needs a CUDA device", marks=CUDA),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(run, tmp_path, capsys, flags, sentence):
    assert sentence in refused(capsys, run, **flags)
    assert not (tmp_path / "runs").exists()


def test_every_number_of_the_algorithm_is_checked(script, capsys):
    least = {"learning_rate": 0, "policy_lr": 0, "q_lr": 0, "batch_size": 0, "buffer_size": 0, "hidden_size": 0}
    least |= {"policy_frequency": 0, "target_network_frequency": 0, "eval_frequency": 0, "eval_episodes": 0}
    least |= {"policy_noise": -1, "noise_clip": -1, "exploration_noise": -1, "checkpoint_frequency": 0}
    for name in least.keys() & vars(script.Args()).keys():
        flag = f"--{name.replace('_', '-')} must be"
        assert flag in refused(capsys, record.settle, script.Args(**{name: least[name]}))


def test_weights_that_are_computed_from_others_are_refused_before_anything_is_written(
    run, script, monkeypatch, tmp_path, capsys
):
    class Normalized(script.QNetwork):
        def __init__(self, *given):
            super().__init__(*given)
            torch.nn.utils.parametrizations.weight_norm(self.fc2)

    monkeypatch.setattr(script, "QNetwork", Normalized)
    sentence = "the weight of fc2 must be a parameter of its own, not computed as by weight_norm"
    assert sentence in refused(capsys, run)
    assert sentence in refused(capsys, run, method="tar", critic_method="dense")
    assert not (tmp_path / "runs").exists()


def test_a_rule_that_needs_a_chain_of_layers_refuses_other_networks(run, script, monkeypatch, tmp_path, capsys):
    class Sum(torch.nn.ModuleList):
        def forward(self, x):
            return self[0](x) + self[1](x)

    class TwoHeads(script.Actor):
        def __init__(self, env, hidden_size):
            super().__init__(env, hidden_size)
            self.fc3 = Sum([self.fc3, torch.nn.Linear(hidden_size, 1)])

    monkeypatch.setattr(script, "Actor", TwoHeads)
    for what, flags in (
        ("method cht", {"method": "cht", "rewire_every": 20}),
        ("--criterion synflow", {"criterion": "synflow"}),
        ("--active-width", {"active_width": "auto"}),
    ):
        assert f"{what} needs layers that read one another in a chain, but" in refused(capsys, run, **flags)
    assert not (tmp_path / "runs").exists()
    assert run(method="tar", critic_method="cht", rewire_every=20, total_timesteps=110).exists()


@pytest.mark.parametrize(
    "flags, code, sentence",
    [
        ("--sparsity 1.5", 2, "error: --sparsity must be at least 0 and below 1, got 1.5"),
        ("--learning-starts 5e3", 2, "5e3"),
        ("--env-id Pendulum-v1 --hidden-size 10000000", 1, "error: not enough memory ("),  # a sweep tries it again
        ("--env-id Pendulum-v1 --hidden-size 100000000000", 1, "error: not enough memory ("),
    ],
)
def test_the_command_line_refuses_what_cannot_work(script, tmp_path, monkeypatch, capsys, flags, code, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(script, monkeypatch, *flags.split())
    output = capsys.readouterr()
    assert stop.value.code == code and sentence in output.out + output.err and not list(tmp_path.iterdir())


def test_a_default_that_is_no_whole_number_is_refused(script, capsys):
    mine = type("Mine", (script.Args,), {"__annotations__": {"learning_starts": int}, "learning_starts": 5e3})
    sentence = "learning_starts must be a whole number, got 5000.0; write it without a point or an exponent"
    assert sentence in refused(capsys, record.settle, dataclasses.dataclass(mine)())


# divergence


def test_a_loss_that_diverges_is_named_and_what_was_logged_is_on_the_disk(run, script, tmp_path, capsys):
    rates = {"q_lr": 1e30} if script is sac_tar else {"learning_rate": 1e30}
    message = refused(capsys, run, total_timesteps=1000, code=1, env_id="Short-v0", **rates)
    assert " at step " in message and "training diverged" in message
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert scalars(run_dir)["eval/episodic_return"] and not (run_dir / "final.pt").exists()


@pytest.mark.parametrize("call, step", [(40, 100), (99, 159)])  # the last: between two logged steps, at the end
def test_a_value_that_is_infinite_is_named(run, script, monkeypatch, tmp_path, capsys, call, step):
    critic_losses, calls = script.critic_losses, []

    def overflow(*args):
        calls.append(1)
        *losses, qf1_values, qf2_values = critic_losses(*args)
        return *losses, qf1_values, qf2_values * (math.inf if len(calls) == call else 1)

    monkeypatch.setattr(script, "critic_losses", overflow)
    message = refused(capsys, run, code=1)
    assert re.search(rf"losses/qf2_values is -?(inf|nan) at step {step}", message)
    assert not list((tmp_path / "runs").glob("*/final.pt"))


def test_weights_that_are_not_finite_replace_no_checkpoint(run, script, monkeypatch, tmp_path, capsys):
    """Which no logged value shows: between two logged steps a critic gets a weight of NaN."""
    add = ReplayBuffer.add

    def spoil(rb, *transition):
        add(rb, *transition)
        if rb.added == 75:
            made[0].fc1.weight.data[0, 0] = math.nan

    made, network = [], script.QNetwork.__init__
    monkeypatch.setattr(script.QNetwork, "__init__", lambda net, *a: network(net, *a) or made.append(net))
    monkeypatch.setattr(ReplayBuffer, "add", spoil)
    flags = {"env_id": "Short-v0", "checkpoint_frequency": 10, "sparsity": 0.0, "policy_frequency": 99}
    assert "a weight of qf1 is not finite at step 80" in refused(capsys, run, code=1, **flags)
    (path,) = (tmp_path / "runs").glob("*/checkpoint.pt")
    saved = load(path)
    assert saved["global_step"] == 70 and all(t.isfinite().all() for t in saved["qf1"].values())
    if script is sac_tar:  # what is not trained may be infinite: the logarithm of an alpha of 0
        assert load(run(autotune=False, alpha=0.0, total_timesteps=70))["entropy"]["log_alpha"].item() == -math.inf


def test_files_that_may_not_grow_and_a_folder_of_somebody_else(tmp_path):
    """`ulimit -f` bounds files of one. The other process has no assertions and no docstrings."""
    flags = "--env-id Pendulum-v1 --total-timesteps 1000 --learning-starts 500 --hidden-size 16 --batch-size 16"
    flags += " --eval-episodes 1 --checkpoint-frequency 200 --compute masked --runs-dir"

    def begin(script, before="", options=""):
        command = f"{before} exec {sys.executable} {options} {script.__file__} {flags} {tmp_path / script.__name__}"
        return subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [begin(sac_tar, "ulimit -f 60;"), begin(td3_tar, options="-OO")]
    (_, full), (good, _) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [1, 0] and "saved" in good.splitlines()[-1]
    error = [line for line in full.splitlines() if line.startswith("error: ")][-1]
    assert "File too large" in error and "make room" in error and "go on with --resume" in error
    full, good = (next((tmp_path / script.__name__).iterdir()) for script in SCRIPTS.values())
    assert load(full / "checkpoint.pt")["global_step"] == 400 and not list(full.rglob("*.tmp"))
    scalars(full)
    for path in (good, *good.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    command = [sys.executable, td3_tar.__file__, "--resume", str(good), "--total-timesteps", "1100"]
    if os.geteuid() == 0:  # root may write everywhere, unless it drops that capability
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("Permission denied")) == (1, 1), result.stderr[-2000:]
    assert result.stderr.startswith("error: ")
