"""Whole runs in small: the invariants I1 to I6 of the method, what a run leaves behind, and what it stores."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.tensorboard import SummaryWriter

import sac_tar
import sparse_utils
import td3_tar
from lab import record, run_folder, topology
from lab.checks import complete_args

METHODS = ["tar", "static", "uniform", "dense"]  # those of one size whose masks stay


def load(run_dir):
    return torch.load(run_dir / "final.pt", weights_only=True)


def same_weights(a, b):
    networks = [n for n in a if n.split("_")[0] in ("actor", "qf1", "qf2")]
    return all(torch.equal(a[n][key], b[n][key]) for n in networks for key in a[n])


def events(run_dir):
    accumulator = EventAccumulator(str(run_dir), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    return accumulator.Reload()


def budget(mask_layers, sparsity):
    return round((1 - sparsity) * sum(m.numel() for m in mask_layers.values()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prune_at", [None, 100])
def test_i1_i2_i5_the_count_is_exact_and_what_is_pruned_stays_zero_in_every_update(
    run, script, monkeypatch, method, prune_at
):
    """Watches weights and moments after every optimizer step, targets after every Polyak update, from pruning on."""
    touched, after_revival = {}, []

    def watch(kind, params):
        for i, tensors in enumerate(params):
            for tensor in tensors:
                touched[kind, i] = touched.get((kind, i), torch.zeros_like(tensor, dtype=torch.bool)) | (tensor != 0)

    def after_step(optimizer, *_):
        weights = [p for p in optimizer.param_groups[0]["params"] if p.dim() == 2]
        moments = [(optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_avg_sq"]) for w in weights]
        kind = "q" if len(weights) == 6 else "actor"
        watch(kind, [(w.detach(), m, v) for w, (m, v) in zip(weights, moments, strict=True)])

    polyak_update, log_topology = script.polyak_update, run_folder.log_topology

    def watched_polyak_update(targets, networks, tau):
        polyak_update(targets, networks, tau)
        watch("target", [(t,) for target in targets.values() for t in target.parameters() if t.dim() == 2])

    def at_revival(writer, run_dir, step, budgets, widths, static, masks, *rest):
        touched.clear()
        after_revival.append({n: {k: m.clone() for k, m in layers.items()} for n, layers in masks.items()})
        log_topology(writer, run_dir, step, budgets, widths, static, masks, *rest)

    monkeypatch.setattr(script, "polyak_update", watched_polyak_update)
    monkeypatch.setattr(run_folder, "log_topology", at_revival)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        run_dir = run(method=method, sparsity=0.8, prune_at=prune_at)
    finally:
        hook.remove()
    final = load(run_dir)
    masks = final["masks"]
    for layers in masks.values():  # I1
        kept = sum(int(m.sum()) for m in layers.values())
        assert kept == budget(layers, 0.0 if method == "dense" else 0.8)
    online = {"actor": [*masks["actor"].values()], "q": [*masks["qf1"].values(), *masks["qf2"].values()]}
    online["target"] = online["q"] if script is sac_tar else [*online["actor"], *online["q"]]
    assert sorted(touched) == sorted((kind, i) for kind, layers in online.items() for i in range(len(layers)))
    for (kind, i), ever_nonzero in touched.items():  # I2
        assert not (ever_nonzero & ~online[kind][i]).any(), (kind, i)
        assert ever_nonzero.any()
    for name, layers in masks.items():
        for network in (name, f"{name}_target"):
            for layer, mask in layers.items():
                if network in final:
                    assert not final[network][f"{layer}.weight"][~mask].any()
    assert len(after_revival) == 1  # I5
    assert all(torch.equal(after_revival[0][n][k], m) for n, layers in masks.items() for k, m in layers.items())


@pytest.mark.parametrize("criterion", ["random", "snip"])
def test_i3_arms_share_weights_transitions_and_replay_indices_up_to_pruning(run, script, monkeypatch, criterion):
    seen = []
    static_prune, sample, add = sparse_utils.static_prune, script.ReplayBuffer.sample, script.ReplayBuffer.add

    def snapshot(weights, *args):
        seen[-1]["weights"] += [w.detach().clone() for w in weights.values()]
        return static_prune(weights, *args)

    def recorded_sample(self, batch_size):
        batch = sample(self, batch_size)
        if batch_size == 32:  # not the batch that scores connections
            seen[-1]["batches"].append(torch.cat(batch, 1))
        return batch

    def recorded_add(self, *transition):
        seen[-1]["added"].append(np.concatenate([np.ravel(x) for x in transition]))
        add(self, *transition)

    monkeypatch.setattr(sparse_utils, "static_prune", snapshot)
    monkeypatch.setattr(script.ReplayBuffer, "sample", recorded_sample)
    monkeypatch.setattr(script.ReplayBuffer, "add", recorded_add)
    for method in METHODS:
        seen.append({"weights": [], "batches": [], "added": []})
        run(method=method, criterion=criterion, prune_at=120, total_timesteps=125)
    first = seen[0]
    assert len(first["weights"]) == 9 and len(first["batches"]) == 64 and len(first["added"]) == 125
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
        # steps 61 to 119 learn before pruning; the first batch after it is drawn alike too
        assert all(torch.equal(a, b) for a, b in zip(first["batches"][:59], other["batches"][:59], strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(first["added"][:120], other["added"][:120], strict=True))


@pytest.mark.parametrize("method", ["tar", "static", "uniform"])
@pytest.mark.parametrize("criterion, compute", [("random", "masked"), ("snip", "masked"), ("grasp", "sparse")])
def test_i4_sparsity_zero_is_dense_bit_for_bit(run, method, criterion, compute):
    sparse = load(run(method=method, criterion=criterion, compute=compute, sparsity=0.0))
    assert same_weights(sparse, load(run(method="dense", compute=compute)))


def test_i6_one_seed_one_result(run):
    a, b, other = load(run(seed=3)), load(run(seed=3)), load(run(seed=4))
    assert same_weights(a, b)
    assert not same_weights(a, other)
    assert all(torch.equal(a["masks"][n][k], b["masks"][n][k]) for n in a["masks"] for k in a["masks"][n])
    assert not torch.equal(a["masks"]["qf1"]["fc2"], a["masks"]["qf2"]["fc2"])


def test_a_seed_in_two_processes_gives_the_same_weights(script, tmp_path):
    command = [
        sys.executable,
        script.__file__,
        "--env-id",
        "Pendulum-v1",
        "--total-timesteps",
        "150",
        "--device",
        "cpu",
    ]
    command += ["--learning-starts", "60", "--hidden-size", "16", "--eval-episodes", "1", "--runs-dir"]
    for name in "ab":
        subprocess.run([*command, str(tmp_path / name)], check=True, capture_output=True)
    a, b = (load(next((tmp_path / name).iterdir())) for name in "ab")
    assert same_weights(a, b)


def test_tar_starts_from_a_subset_of_the_static_mask(run):
    """Same scores, K - R instead of K: arms are compared on one base."""
    static, tar = (load(run(method=m, distribution="global"))["masks"] for m in ("static", "tar"))
    for name in static:
        overlap = sum(int((static[name][k] & tar[name][k]).sum()) for k in static[name])
        k = sum(int(m.sum()) for m in static[name].values())
        assert overlap >= k - round(0.1 * k)


@pytest.mark.parametrize(
    "method, criterion",
    [(m, c) for m in ("tar", "static") for c in ("random", "magnitude", "snip", "grasp", "synflow")]
    + [("uniform", "random"), ("dense", "random")],
)
def test_every_criterion_trains_and_leaves_its_files_and_tags(run, script, monkeypatch, method, criterion):
    monkeypatch.setattr(script, "SPS_BURN_IN", 20)
    run_dir = run(method=method, criterion=criterion, distribution="global", sparsity=0.9, total_timesteps=310)
    assert sorted(p.name for p in run_dir.iterdir() if "tfevents" not in p.name) == [
        ".lock",
        "checkpoint.pt",
        "config.json",
        "final.pt",
        "replay",
        "topology.json",
    ]
    base = "" if method == "dense" else f"{criterion}-global__"
    sparsity = 0.0 if method == "dense" else 0.9
    assert run_dir.name.startswith(f"Pendulum-v1__{script.__name__}__{method}__{base}s{sparsity}__1__")
    assert run_dir.name.split("__")[-1].isdigit()

    config = json.loads((run_dir / "config.json").read_text())
    assert config["script"] == script.__name__
    assert config["args"]["criterion"] == criterion and config["args"]["prune_at"] == 60
    (segment,) = config["segments"]
    assert segment["code"] == record.code_hash(script.SCRIPT) and segment["device"] == "cpu"
    assert segment["from_step"] == 0 and segment["processor"] and "git_commit" in segment
    assert set(segment["versions"]) == {"python", "torch", "gymnasium", "mujoco", "numpy"}
    assert all(segment["versions"].values())

    final = load(run_dir)
    assert final["args"] == config["args"] and final["global_step"] == 310
    topology = json.loads((run_dir / "topology.json").read_text())
    assert set(topology) == set(final["masks"]) == {"actor", "qf1", "qf2"}
    for name, network in topology.items():
        masks = final["masks"][name]
        assert network["budget"] == budget(masks, sparsity)
        assert network["reserve"] == (round(0.1 * network["budget"]) if method in ("tar", "uniform") else 0)
        assert sum(layer["revived"] for layer in network["layers"].values()) == network["reserve"]
        assert sum(layer["active"] for layer in network["layers"].values()) == network["budget"]
        for layer, row in network["layers"].items():
            assert row["shape"] == list(masks[layer].shape) and row["size"] == masks[layer].numel()
            assert row["static"] + row["revived"] == row["active"] == int(masks[layer].sum())
            assert row["blind_inputs"][1] == int((~masks[layer].any(0)).sum())
            assert row["dead_units"][1] == int((~masks[layer].any(1)).sum())
            assert final[name][f"{layer}.weight"].shape == masks[layer].shape

    log = events(run_dir)
    layers = [f"{name}.{layer}" for name in topology for layer in topology[name]["layers"]]
    losses = ["qf1_values", "qf2_values", "qf1_loss", "qf2_loss", "qf_loss", "actor_loss"]
    losses += ["alpha", "alpha_loss"] if script is sac_tar else []
    expected = {f"losses/{loss}" for loss in losses}
    expected |= {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_length", "eval/final_return"}
    expected |= {f"sparsity/{name}" for name in topology} | {f"sparsity/density_{layer}" for layer in layers}
    expected |= {"flops/inference", "flops/training"}
    assert set(log.Tags()["scalars"]) == expected
    assert set(log.Tags()["images"]) == {f"topology/{layer}" for layer in layers}
    texts = set(log.Tags()["tensors"])
    assert {"hyperparameters/text_summary", "topology/revival/text_summary"} <= texts
    assert any("_hparams_" in tag for tag in log.summary_metadata)
    assert [e.step for e in log.Scalars("eval/episodic_return")] == [0, 100, 200, 300, 310]
    for name, network in topology.items():
        measured = [e.value for e in log.Scalars(f"sparsity/{name}")]
        assert [e.step for e in log.Scalars(f"sparsity/{name}")] == [60]
        size = sum(layer["size"] for layer in network["layers"].values())
        assert measured == pytest.approx([1 - network["budget"] / size] * len(measured))
    for tag in expected:
        assert all(math.isfinite(e.value) for e in log.Scalars(tag)), tag


@pytest.mark.parametrize(
    "given, opens_with, reserve, active_width",
    [
        ({"seed": 3}, ["random+er", "A-v1", "tar", 3, 0.9], 0.1, None),
        ({"method": "dense"}, ["", "A-v1", "dense", 1, 0.0], None, None),
        ({"critic_method": "dense"}, ["random+er", "A-v1", "tar+dense", 1, 0.9], 0.1, None),
        ({"actor_sparsity": 0.5, "critic_sparsity": 0.8}, ["random+er", "A-v1", "tar", 1, 0.8], 0.1, None),
        ({"method": "static", "active_width": 24}, ["random+er", "A-v1", "static", 1, 0.9], None, "24"),
        ({"active_width": "auto"}, ["random+er", "A-v1", "tar", 1, 0.9], 0.1, "auto"),
    ],
)
def test_hparams_open_with_the_arm_and_hold_what_acts_on_the_result(
    script, tmp_path, given, opens_with, reserve, active_width
):
    """TensorBoard opens with five columns, sorted as here, and cannot sort a column of numbers and strings."""
    args = script.Args(env_id="A-v1", **given)
    complete_args(args)
    with SummaryWriter(tmp_path) as writer:
        run_folder.log_args(writer, args)
    contents = {
        tag: about.plugin_data.content for tag, about in events(tmp_path).summary_metadata.items() if "_hparams_" in tag
    }
    infos = metadata.parse_experiment_plugin_data(contents[metadata.EXPERIMENT_TAG]).hparam_infos
    columns = sorted(infos, key=lambda info: (not info.differs, info.name))
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert [info.name for info in columns[:5]] == ["base", "env_id", "method", "seed", "sparsity"]
    assert [shown[info.name] for info in columns[:5]] == opens_with
    assert (shown.get("reserve"), shown.get("active_width")) == (reserve, active_width)
    left_out = {"runs_dir", "resume", "evaluate", "checkpoint_frequency", "capture_video"}
    # the same ones in every run, since TensorBoard takes the columns of any one run
    assert {info.name for info in columns} == {"base"} | vars(args).keys() - left_out


@pytest.mark.parametrize("n_in", [3, 140, 376])
def test_the_legend_is_as_wide_as_the_mask_and_names_the_colours_in_it(n_in):
    (pruned, _), (kept, _), (revived, _), (outside, _) = topology.MASK_COLOURS
    static, final = torch.zeros(64, n_in, dtype=torch.bool), torch.ones(64, n_in, dtype=torch.bool)
    heights = []
    for masks, part, colours in (
        ((final, final), (64, n_in), [kept]),
        ((static, final), (64, n_in), [pruned, revived]),
        ((static, static), (24, n_in), [pruned, outside]),
    ):
        image = topology.mask_image(*masks, part)
        legend = run_folder.mask_legend(image)
        assert legend.shape[1:] == image.shape[1:] and legend.dtype == np.uint8
        for colour, _ in topology.MASK_COLOURS:
            assert (legend == colour).all(-1).any() == (colour in colours)
        assert (legend == 255).all(-1)[:, -image.shape[1] // 50 :].all()  # no text is cut off
        heights.append(legend.shape[0] / image.shape[1])
    assert min(heights) > 0.1  # letters grow with the image, which TensorBoard scales to its card


@pytest.mark.parametrize("distribution", ["er", "uniform"])
def test_distributions_reach_the_masks(run, distribution):
    topology = json.loads((run(method="static", distribution=distribution) / "topology.json").read_text())
    for network in topology.values():
        layers = network["layers"].values()
        scores = {str(i): torch.zeros(row["shape"]) for i, row in enumerate(layers)}
        expected = sparse_utils.DISTRIBUTIONS[distribution](scores, network["budget"])
        assert [row["active"] for row in layers] == expected


def test_a_base_that_empties_a_layer_is_a_warning_not_an_error(run, capsys):
    run_dir = run(method="static", criterion="magnitude", distribution="global", sparsity=0.97)
    text = capsys.readouterr().out
    assert "warning: qf1.fc3 keeps no connection after static pruning and has 0 after revival." in text
    warnings = events(run_dir).Tensors("topology/warnings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "qf1.fc3 keeps no connection" in warnings


def test_the_table_is_printed_at_the_pruning_step(run, capsys):
    run(prune_at=70)
    text = capsys.readouterr().out
    assert "Topology at step 70:" in text and " qf2.fc3 |" in text


def test_a_truncated_episode_bootstraps_and_keeps_its_final_observation(run, script, monkeypatch):
    added = []
    monkeypatch.setattr(
        script.ReplayBuffer, "add", lambda self, *t, add=script.ReplayBuffer.add: added.append(t) or add(self, *t)
    )
    run(env_id="Probe-v0", total_timesteps=60, learning_starts=30)
    terminations = [(t[1][0], t[1][1]) for t in added if t[4]]
    assert terminations and all(episode % 3 == 2 and step == 5 for episode, step in terminations)
    ends = [t[1] for i, t in enumerate(added[:-1]) if added[i + 1][0][0] != t[0][0]]  # the next row is a new episode
    assert {(episode % 3 == 2, step) for episode, step, _ in ends} == {(True, 5), (False, 7)}
    for obs, next_obs, *_ in added:
        assert next_obs[0] == obs[0] and next_obs[1] == obs[1] + 1  # never the observation after a reset


def test_no_gradient_of_the_actor_loss_reaches_the_critics(run):
    """Critic gradients at the actor's step are those of the critics' own step before it."""
    q_grads, checked = [], []

    def before_step(optimizer, *_):
        params = optimizer.param_groups[0]["params"]
        if len(params) == 12:
            q_grads[:] = [(p, p.grad.clone()) for p in params]
        else:
            checked.append(all(torch.equal(p.grad, g) for p, g in q_grads))

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        run()
    finally:
        hook.remove()
    assert len(checked) >= 40 and all(checked)


def test_each_step_follows_the_gradient_of_its_own_loss(run, script, monkeypatch):
    """What the optimizers see is the gradient of both critics' losses, and of the actor's."""
    expected, compared = {}, {"q": 0, "actor": 0}
    critic_losses, policy_loss = script.critic_losses, script.policy_loss

    def recorded_critic_losses(*args):
        result = critic_losses(*args)
        qf1, qf2 = args[1:3]
        for qf, loss in ((qf1, result[0]), (qf2, result[1])):
            gradients = torch.autograd.grad(loss, list(qf.parameters()), retain_graph=True)
            expected.update(zip(qf.parameters(), gradients, strict=True))
        return result

    def recorded_policy_loss(actor, *args):
        result = policy_loss(actor, *args)
        loss = result[0] if isinstance(result, tuple) else result
        gradients = torch.autograd.grad(loss, list(actor.parameters()), retain_graph=True)
        expected.update(zip(actor.parameters(), gradients, strict=True))
        return result

    def before_step(optimizer, *_):
        params = optimizer.param_groups[0]["params"]
        for p in params:  # outside the mask, where weights are zero, there is no gradient
            torch.testing.assert_close(p.grad, expected[p] * (p != 0) if p.dim() == 2 else expected[p])
        compared["q" if len(params) == 12 else "actor"] += 1

    monkeypatch.setattr(script, "critic_losses", recorded_critic_losses)
    monkeypatch.setattr(script, "policy_loss", recorded_policy_loss)
    hook = register_optimizer_step_pre_hook(before_step)
    try:
        run()
    finally:
        hook.remove()
    assert compared["q"] == 99 and compared["actor"] >= 49


def test_sac_without_autotune_keeps_alpha(tmp_path):
    run_dir = sac_tar.train(
        sac_tar.Args(
            env_id="Pendulum-v1", runs_dir=str(tmp_path), total_timesteps=210, learning_starts=60, hidden_size=16,
            eval_episodes=1, autotune=False, alpha=0.35, device="cpu",
        )
    )  # fmt: skip
    log = events(run_dir)
    assert [e.value for e in log.Scalars("losses/alpha")] == pytest.approx([0.35, 0.35, 0.35])
    assert "losses/alpha_loss" not in log.Tags()["scalars"]


def test_sac_alpha_follows_its_loss(tmp_path):
    run_dir = sac_tar.train(
        sac_tar.Args(
            env_id="Pendulum-v1", runs_dir=str(tmp_path), total_timesteps=410, learning_starts=60, hidden_size=16,
            eval_episodes=1, q_lr=1e-2, device="cpu",
        )
    )  # fmt: skip
    alphas = [e.value for e in events(run_dir).Scalars("losses/alpha")]
    assert alphas[-1] < alphas[0] < 1  # the entropy of a fresh policy is above the target, so alpha falls from 1


def test_a_module_with_the_environment_may_be_named_and_the_folders_name_holds_no_colon(run, script, monkeypatch):
    monkeypatch.setattr(run_folder, "code_hash", lambda *of: [str(what) for what in of])
    run_dir = run(env_id="conftest:Probe-v0", total_timesteps=62)
    assert run_dir.name.startswith("conftest-Probe-v0__")
    (segment,) = record.read_config(run_dir)["segments"]
    assert segment["code"] == [str(script.SCRIPT), "conftest:Probe-v0"]  # the module is code of the run
    other = run(env_id="folder/Probe-v0", total_timesteps=62)  # a slash makes no folder
    assert other.name.startswith("folder-Probe-v0__") and other.parent == run_dir.parent


@pytest.mark.parametrize("method", ["dense", "tiny"])
def test_what_is_not_pruned_has_no_base_in_its_name(run, script, method):
    assert f"__{script.__name__}__{method}__s" in run(method=method, total_timesteps=62).name


def test_an_edit_of_any_file_that_acts_on_training_is_other_code(script, tmp_path):
    acting = ["sparse_utils.py", "lab/kernels/__init__.py", "lab/checks.py", "lab/run_folder.py"]
    for name in (script.SCRIPT.name, *acting):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((script.SCRIPT.parent / name).read_text())
    hashes = [record.code_hash(tmp_path / script.SCRIPT.name)]
    for name in acting:
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\nedited = 1\n")
        hashes.append(record.code_hash(tmp_path / script.SCRIPT.name))
    assert len(set(hashes)) == 1 + len(acting)


def test_comments_and_docstrings_are_not_code(script, tmp_path):
    source = script.SCRIPT.read_text()
    copy = tmp_path / "copy.py"
    hashes = []
    for text in (
        source, source.replace("# ALGO LOGIC", "# algorithm"), source.replace('"""The actor\'s loss', '"""A loss'),
        source.replace("gamma: float = 0.99", "gamma: float = 0.98"),
    ):  # fmt: skip
        copy.write_text(text)
        hashes.append(record.code_hash(copy))
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    copy.write_text("import my_nets\n" + source)  # what a reader puts beside it and imports
    for text in ("size = 1", "size = 1  # one", "size = 2"):
        (tmp_path / "my_nets.py").write_text(text)
        hashes.append(record.code_hash(copy))
    assert hashes[4] == hashes[5] != hashes[6]
    del hashes[4:]
    for name, other in (("my_nets", "my_losses"), ("my_losses", "my_nets")):  # which import each other
        (tmp_path / f"{name}.py").write_text(f"import {other}")
    assert record.code_hash(copy) not in hashes
    copy.write_text(source)
    (tmp_path / "sparse_utils.py").write_text("")
    hashes[3] = record.code_hash(copy)
    (tmp_path / "lab" / "kernels").mkdir(parents=True)
    kernel = tmp_path / "lab" / "kernels" / "kernels.cpp"
    for text in ("int x;", "int x; // why\n/* and\nhow */", "int y;"):
        kernel.write_text(text)
        hashes.append(record.code_hash(copy))
    assert hashes[4] == hashes[5] != hashes[6] != hashes[3]
    (tmp_path / "lab").mkdir(exist_ok=True)
    for name in ("sparse_utils.py", "lab/checks.py"):
        (tmp_path / name).write_text("size = 2")
        hashes.append(record.code_hash(copy))
    assert len(set(hashes[-3:])) == 3


def test_what_the_environment_and_the_shared_files_import_is_code_too(script, tmp_path):
    for name in (script.SCRIPT.name, "sparse_utils.py"):
        (tmp_path / name).write_text((script.SCRIPT.parent / name).read_text())

    def hashed(env_id="my_envs:Mine-v0"):
        return record.code_hash(tmp_path / script.SCRIPT.name, env_id)

    before = hashed()
    assert before == hashed("Hopper-v4") == record.code_hash(tmp_path / script.SCRIPT.name)
    seen = [before]
    for path, text in {
        "my_envs.py": "import my_world.physics", "my_world/__init__.py": "from .sky import g",
        "my_world/physics.py": "from . import ground\nregister('Mine-v0', 'my_point:Mine')",
        "my_world/sky.py": "g = 9.81", "my_world/ground.py": "friction = 1", "my_point.py": "", "my_masks.py": "",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        seen.append(hashed())
    assert len(set(seen)) == len(seen) - 1 and seen[-1] == seen[-2] and hashed("Hopper-v4") == before
    with (tmp_path / "sparse_utils.py").open("a") as file:
        file.write("import my_masks\n")
    one = hashed("Hopper-v4")
    (tmp_path / "my_masks.py").write_text("rule = 2")
    assert hashed("Hopper-v4") not in (one, before)


def test_a_script_in_another_folder_is_hashed_with_the_project_that_it_imports(script, tmp_path, monkeypatch):
    copy = tmp_path / "copy.py"
    copy.write_text(script.SCRIPT.read_text())
    before = record.code_hash(copy)
    project = tmp_path / "project"
    project.mkdir()
    (project / "sparse_utils.py").write_text("AUTO_WIDTH_C = 9")
    monkeypatch.setattr(record, "__file__", str(project / "lab" / "record.py"))
    seen = [before, record.code_hash(copy)]
    (tmp_path / "sparse_utils.py").write_text("AUTO_WIDTH_C = 5")  # its own, beside the project's kernels
    seen.append(record.code_hash(copy))
    (project / "lab" / "kernels").mkdir(parents=True)
    (project / "lab" / "kernels" / "kernels.cpp").write_text("int x;")
    assert len({*seen, record.code_hash(copy)}) == 4


def test_a_copy_may_leave_flags_out(run, script, tmp_path):
    """A reader's leaner script: what a flag of WITHOUT would be stands in the code, and the rest goes on as before."""
    text = Path(script.__file__).read_text()
    for flag, value in record.WITHOUT.items():
        text, fields = re.subn(rf"^    {flag}: .*\n", "", text, flags=re.M)
        text, uses = re.subn(rf"\b(self\.)?args\.{flag}\b", repr(value), text)
        assert fields == 1 and (uses or flag == "init"), flag  # that one acts through the networks' own
    copy = tmp_path / "lean.py"
    copy.write_text(text)
    spec = importlib.util.spec_from_file_location("lean", copy)
    lean = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lean)
    whole = run(method="tar")
    small = record.read_config(whole)["args"]
    given = {name: value for name, value in small.items() if name not in record.WITHOUT}
    run_dir = lean.train(lean.Args(**given | {"exp_name": "lean"}))
    assert not record.WITHOUT.keys() & json.loads((run_dir / "config.json").read_text())["args"].keys()
    assert same_weights(load(run_dir), load(whole))
    assert run_dir.name.rpartition("__")[0] == whole.name.rpartition("__")[0].replace(script.__name__, "lean")
    resumed = run_folder.resumed_args(lean.Args, str(run_dir), copy)
    run_folder.check_resumed_args(resumed, resumed)
    assert same_weights(load(lean.train(resumed)), load(whole))


def test_a_run_without_a_flag_is_read_as_what_its_code_did(run):
    run_dir = run(method="set", rewire_every=50)
    config = json.loads((run_dir / "config.json").read_text())
    for flag in ("regrow", "n_step", "init"):
        config["args"].pop(flag)
    for code, regrow in ((config["segments"][0]["code"], True), (None, False)):  # SET could not regrow before the hash
        config["segments"][0]["code"] = code
        (run_dir / "config.json").write_text(json.dumps(config))
        args = record.read_config(run_dir)["args"]
        assert (args["regrow"], args["n_step"], args["init"]) == (regrow, 1, "dense")


def test_two_runs_in_one_second_get_two_folders(run, script, monkeypatch):
    monkeypatch.setattr(run_folder.time, "time", lambda: 1234.5)
    a, b = run(total_timesteps=62), run(total_timesteps=62)
    assert a.name.endswith("__1234") and b.name.endswith("__1235")


def test_targets_move_with_tau(run, script, monkeypatch):
    seen = []
    polyak_update = script.polyak_update

    def record(targets, networks, tau):
        before = {name: [p.clone() for p in target.parameters()] for name, target in targets.items()}
        polyak_update(targets, networks, tau)
        for name, target in targets.items():
            for b, t, p in zip(before[name], target.parameters(), networks[name].parameters(), strict=True):
                torch.testing.assert_close(t, 0.9 * b + 0.1 * p.detach())
        seen.append(tau)

    monkeypatch.setattr(script, "polyak_update", record)
    run(tau=0.1)
    # every step for SAC, every second one for TD3 (its policy frequency), from step 61 to 159
    assert len(seen) == (99 if script is sac_tar else 49)


def test_worked_cases_of_snip_over_the_whole_network(script, tmp_path):
    """HalfCheetah-v4 at 95%: every critic is blind to all actions, the actor to most observations; revival reconnects
    every input. Hopper-v4 at 90%: a critic's input and output layers have a deficit, its hidden layer has none."""

    def topology(env_id, sparsity):
        args = script.Args(
            env_id=env_id, sparsity=sparsity, criterion="snip", distribution="global", learning_starts=2000,
            total_timesteps=2002, eval_episodes=1, device="cpu", runs_dir=str(tmp_path),
        )  # fmt: skip
        return json.loads((script.train(args) / "topology.json").read_text())

    cheetah = topology("HalfCheetah-v4", 0.95)
    for network in cheetah.values():
        before, after = network["layers"]["fc1"]["blind_inputs"]
        assert before >= 8 and after == 0
    assert cheetah["qf1"]["layers"]["fc1"]["blind_inputs"][0] >= 6
    hopper = topology("Hopper-v4", 0.9)
    for name in ("qf1", "qf2"):
        fc1, fc2, fc3 = (hopper[name]["layers"][layer]["deficit"] for layer in ("fc1", "fc2", "fc3"))
        assert fc2 == 0 and fc1 + fc3 > 0


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "BipedalWalker-v3", "Humanoid-v4", "Walker2d-v5", "Hopper-v4"])
def test_real_environments_prune_revive_and_train(run, env_id):
    final = load(run(env_id=env_id, total_timesteps=90, sparsity=0.9))
    for name, layers in final["masks"].items():
        assert sum(int(m.sum()) for m in layers.values()) == budget(layers, 0.9)
        assert all(t.isfinite().all() for t in final[name].values())


def test_the_default_arguments_are_those_of_cleanrl_and_of_the_specification():
    sac, td3 = sac_tar.Args(), td3_tar.Args()
    for args in (sac, td3):
        assert (args.env_id, args.total_timesteps, args.buffer_size, args.batch_size) == (
            "Hopper-v4",
            10**6,
            10**6,
            256,
        )
        assert (args.gamma, args.tau, args.hidden_size, args.policy_frequency) == (0.99, 0.005, 256, 2)
        assert (args.method, args.sparsity, args.reserve, args.criterion, args.distribution) == (
            "tar", 0.9, 0.1, "random", "er",
        )  # fmt: skip
        assert (args.eval_frequency, args.eval_episodes, args.runs_dir) == (5000, 10, "runs")
    assert (sac.learning_starts, sac.policy_lr, sac.q_lr, sac.target_network_frequency) == (5000, 3e-4, 1e-3, 1)
    assert (td3.learning_starts, td3.learning_rate) == (25000, 3e-4)
    assert (td3.policy_noise, td3.exploration_noise, td3.noise_clip) == (0.2, 0.1, 0.5)
    assert Path(sac_tar.__file__).parent == Path(td3_tar.__file__).parent
