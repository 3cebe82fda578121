"""What the pages say is so: words, links, names, commands, quoted lines, numbers, and the edits that they show."""

import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import tyro
from test_resume import edited
from test_run import PROJECT, copy_project, events, main

import lab.run
import sac_tar
import sparse_utils
import td3_tar
from lab import baselines, compare, environment, record, sweep
from lab.kernels import benchmark

README, LAB, FIELD = ((PROJECT / page).read_text() for page in ("README.md", "lab/README.md", "lab/systems.md"))
WHERE = ("*.md", "lab/**/*.md", "runs/**/README.md", "runs/**/NOTES.md")
PAGES = {path.relative_to(PROJECT).as_posix(): path.read_text() for at in WHERE for path in PROJECT.glob(at)}
COMMANDS = {"sac_tar.py": sac_tar, "td3_tar.py": td3_tar, "lab/sweep.py": sweep, "lab/compare.py": compare}
COMMANDS |= {"lab/kernels/benchmark.py": benchmark}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def test_the_pages_are_short():
    words = {name: len(page.split()) for name, page in PAGES.items()}
    assert words["README.md"] <= 1200 and words["lab/README.md"] <= 1800 and sum(words.values()) <= 6000, words


@pytest.mark.parametrize("name", PAGES)
def test_no_placeholder_is_left_every_table_holds_together_and_every_link_leads_somewhere(name):
    page = PAGES[name]
    assert not re.search(r"TODO|TBD|XXX", page)
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(re.split(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table
    for link in re.findall(r"\]\(([^)\s]+)\)", page):
        file, _, heading = link.partition("#")
        if not link.startswith("https://"):
            target = (PROJECT / name).parent / file if file else PROJECT / name
            assert target.exists(), link
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else [""]
            assert heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_every_flag_rule_and_file_that_is_named_exists_and_none_is_left_out():
    known = {field.name for module in COMMANDS.values() for field in fields(module.Args)}
    said = {flag.removeprefix("no-").replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", README + LAB + FIELD)}
    assert said - known == {"help", "logdir", "head", "port", "address"}  # of tensorboard and Ray
    assert {field.name for field in fields(baselines.Flags)} <= said
    table = README.split("| `--method` |")[1].split("\n\n")[0]
    first_cells = "".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_cells)) == baselines.METHODS.keys()
    for flag, rules in (("criterion", sparse_utils.CRITERIA), ("distribution", sparse_utils.DISTRIBUTIONS)):
        assert re.findall(r"`(\w+)`", re.search(rf"`--{flag}`\s\(([^)]*)\)", README)[1]) == list(rules)
    files = {path.name for path in (PROJECT / "lab").glob("*.py")} - {"__init__.py"} | {"kernels"}
    assert set(re.findall(r"`([\w.]+)/?`", LAB.split("\n\n")[1])) == files


def commands(page):
    for line in "\n".join(blocks(re.sub(r"<[\w ]+>", "there", page), "bash")).splitlines():
        for words in (shlex.split(part, comments=True) for part in line.split("&&")):
            if words[:1] == ["python"] and words[1] in COMMANDS:
                yield words[1], words[2:]


@pytest.mark.parametrize("module", COMMANDS.values())
def test_every_flag_has_a_help_of_its_own(module):
    actions = tyro.extras.get_parser(module.Args)._actions
    helps = [str(action.help).partition(" (default")[0] for action in actions]
    assert len(helps) > 4 and len({*helps}) == len(helps) and not {"", "None"} & {*helps}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_are_understood(name, monkeypatch):
    monkeypatch.chdir(PROJECT)
    found = list(commands(PAGES[name]))
    assert len(found) > 3 or name not in ("README.md", "lab/README.md")
    for script, words in found:
        end = words.index("--") if "--" in words else len(words)
        args = tyro.cli(COMMANDS[script].Args, args=words[:end])
        tyro.cli(sac_tar.Args, args=words[end + 1 :])
        if isinstance(args, compare.Args) and (args.folder / "runs.json").exists():
            compare.read(args.folder, args)  # which ends the program if there is no such arm


def test_the_command_of_ten_seconds_prints_the_line_to_look_at(tmp_path, capsys):
    (words,) = (words for name, words in commands(README) if "snip" in words)
    sac_tar.train(tyro.cli(sac_tar.Args, args=[*words, "--runs-dir", str(tmp_path)]))
    (line,) = re.findall(r"^```\n(warning.*\n)```$", README, re.M)
    assert line in capsys.readouterr().out


def test_what_default_pruning_cuts_is_as_many_inputs_as_the_page_says():
    cut, said = [], re.search(r"cuts about (\d+) of the 256 inputs of a critic's last layer", README)
    with sac_tar.make_env(sac_tar.Args().env_id) as env:
        for seed in range(5):
            torch.manual_seed(seed)
            critic, args = sac_tar.QNetwork(env, 256), sac_tar.Args()
            net = sparse_utils.Net(critic, None, None, args.method, args.sparsity)
            sparse_utils.plan(net, args.reserve)
            keep = net.budget - net.reserve
            masks = sparse_utils.static_prune(net, keep, args.criterion, args.distribution, torch.Generator())
            cut.append(int((~masks["fc3"].any(0)).sum()))
    assert abs(sum(cut) / len(cut) - int(said[1])) < 2


def test_the_lines_that_load_a_saved_policy(run, script):
    run_dir, names = run(), {"torch": torch, script.__name__: script, "env": gym.make("Pendulum-v1")}
    (code,) = (block for block in blocks(LAB, "python") if "torch.load" in block)
    exec(code.replace("runs/<run folder>", str(run_dir)).replace("sac_tar", script.__name__), names)
    said = re.search(r"Then `(.*?)` for float32 of shape.*?TD3: `(.*?)`", LAB, re.S)
    assert eval(said[1 if script is sac_tar else 2], names | {"obs": torch.zeros(2, 3)}).shape == (2, 1)


def test_the_lines_of_train_that_are_tar_are_quoted_as_they_are(script):
    (quoted,) = (block for block in blocks(README, "python") if "# prune" in block)
    assert textwrap.indent(quoted, 8 * " ") in Path(script.__file__).read_text()
    assert quoted.endswith("sparse_utils.fix_masks(nets)\n")


def test_the_defaults_are_those_of_cleanrl(script):
    """Of its sac_continuous_action.py and td3_continuous_action.py."""
    theirs = {"total_timesteps": 1_000_000, "buffer_size": 1_000_000, "batch_size": 256, "gamma": 0.99, "tau": 0.005}
    theirs |= {"hidden_size": 256, "policy_frequency": 2}
    if script is sac_tar:
        theirs |= {"learning_starts": 5000, "policy_lr": 3e-4, "q_lr": 1e-3, "target_network_frequency": 1}
        theirs |= {"alpha": 0.2, "autotune": True}
    else:
        theirs |= {"learning_starts": 25_000, "learning_rate": 3e-4, "policy_noise": 0.2, "noise_clip": 0.5}
        theirs |= {"exploration_noise": 0.1}
    assert vars(script.Args()).items() >= theirs.items()


def test_the_tables_name_every_tag_every_file_and_every_key_of_a_run(run, script, monkeypatch):
    monkeypatch.setattr(lab.run, "SPS_BURN_IN", 20)
    base = {"criterion": "magnitude", "distribution": "global", "sparsity": 0.95}  # cuts, so that there are warnings
    run_dir = run(total_timesteps=210, method="rigl", rewire_every=50, lr_cycles=1, **base)
    kinds = events(run_dir).Tags()
    tags = {*kinds["scalars"], *kinds["images"], *(tag.removesuffix("/text_summary") for tag in kinds["tensors"])}
    tags = {re.sub(r"(actor|qf[12])\.fc\d$", "<network>.<layer>", tag) for tag in tags}
    tags = {re.sub(r"^sparsity/(actor|qf[12])(_\w+)?$", r"sparsity/<network>\2", tag) for tag in tags}
    files, table = LAB.split("| file |")[2].split("\n\n")[0], LAB.split("| TensorBoard tag |")[1].split("\n\n")[0]
    named = {tag for row in re.findall(r"^\| (`.*?) \|", table, re.M) for tag in re.findall(r"`(.*?)`", row)}
    assert tags == (named if script is sac_tar else named - {"losses/alpha", "losses/alpha_loss"})
    config, topology = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("config", "topology"))
    layer, final = topology["qf1"]["layers"]["fc1"], torch.load(run_dir / "final.pt", weights_only=True)
    names = {*config, *config["segments"][0], *topology["qf1"], *layer, *(key for key in final if "_target" not in key)}
    names |= {path.name for path in run_dir.iterdir() if "tfevents" not in path.name and path.name != ".lock"}
    assert not [name for name in names - {"layers"} if f"`{name}`" not in files]


SYSTEMS = dict(re.findall(r"^\| ([^|]*?) \(.*?\) \| `(--.*?)` \|", FIELD, re.M))
assert len(SYSTEMS) >= 13


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_of_the_field_trains_k_connections_and_each_of_its_flags_acts(system, run):
    """In a thousandth of the steps."""
    words = [str(int(w) // 1000) if w.isdigit() and len(w) > 3 else w for w in SYSTEMS[system].split()]
    base = ["--criterion", "random", "--distribution", "er"]
    small = {"total_timesteps": 300, "learning_starts": 25, "rewire_every": 20, "recent_size": 50, "sparsity": 0.8}
    for script in (sac_tar, td3_tar):
        given, usual = (vars(tyro.cli(script.Args, args=base + own)) for own in (words, []))
        given = {name: value for name, value in given.items() if value != usual[name]}
        args = record.settle(script.Args(**{"criterion": "random", "distribution": "er"} | small | given))
        assert given and vars(args) | given == vars(args)  # a flag that makes no difference has its default there
    for script in (td3_tar, sac_tar) if "--n-step" in words else (td3_tar,):
        for name, masks in torch.load(run(script, **small | given) / "final.pt", weights_only=True)["masks"].items():
            every = torch.cat([mask.flatten() for mask in masks.values()])
            assert int(every.sum()) == round(0.2 * len(every)), name


# THE EDITS THAT THE PAGES SHOW


def snippets():
    """(file, before or in, name of a dictionary, code) of everything that the pages say to add."""
    for block in blocks(README + LAB, "python"):
        _, *parts = re.split(r"^# (?:(\S+), )?(before|in) ([A-Z]+)\n", block, flags=re.M)
        for i in range(0, len(parts), 4):
            yield parts[i] or parts[0], *parts[i + 1 : i + 4]


def python(folder, *words):
    """What a command prints that is run in a copy of the project."""
    settings = os.environ | {"COLUMNS": "250", "OMP_NUM_THREADS": "1"}
    options = {"cwd": folder, "env": settings, "text": True, "check": True, "capture_output": True}
    return subprocess.run([sys.executable, *map(str, words)], **options).stdout


def test_every_rule_acts_and_help_tells_of_it(tmp_path):
    """In a copy of the project: the actor with the new method of revival, the critics with that of growth."""
    copy_project(tmp_path)
    for file, place, name, code in snippets():
        before = (tmp_path / file).read_text()
        if place == "before":
            after = before.replace(f"\n{name} = ", f"\n{code}\n\n{name} = ", 1)
        else:  # as its last entry
            head, start, rest = before.partition(f"\n{name} = ")
            entries, end, rest = re.split(r"(,?\n?\}\n)", rest, maxsplit=1)
            after = f"{head}{start}{entries},\n{code}{end.lstrip(',')}{rest}"
        assert len(after) > len(before), name
        (tmp_path / file).write_text(after)

    added = {(place, name): code for _, place, name, code in snippets()}
    text = re.sub(r"[\s│]+", " ", python(tmp_path, "td3_tar.py", "--help"))
    assert text.index("--env-id STR") < text.index("--method {") < text.index("--runs-dir STR")  # its own flags first
    for name in ("CRITERIA", "DISTRIBUTIONS", "REVIVALS", "DROPS", "GROWTHS"):
        rule = re.search(r'"(\w+)": ', added["in", name])[1]
        sentence = re.search(r'"""(.*)\."""', added["before", name])[1]
        assert f"{rule}: {sentence}" in text
    rules = "--method equal --critic-method lonely --criterion share --distribution root --drop-criterion crowded"
    rules += " --no-regrow --rewire-every 150 --rewire-stop 1 --reserve 0.2 --sparsity 0.8 --hidden-size 24"
    small = "--env-id Pendulum-v1 --batch-size 32 --eval-episodes 1 --learning-starts 100 --total-timesteps 300"
    python(tmp_path, "td3_tar.py", *rules.split(), *small.split(), "--runs-dir", "there")
    first, final = (torch.load(*tmp_path.glob(f"there/*/{name}.pt"), weights_only=True) for name in ("masks", "final"))
    env = gym.make("Pendulum-v1")
    torch.manual_seed(td3_tar.Args.seed)
    for name in ("actor", "qf1", "qf2"):  # with the weights that the run drew
        weights = sparse_utils.linear_weights((td3_tar.Actor if name == "actor" else td3_tar.QNetwork)(env, 24))
        static, masks, replaced = first[name]["static"], first[name]["masks"], 0
        roots = {layer: math.sqrt(weight.numel()) for layer, weight in weights.items()}
        kept = {layer: int(mask.sum()) for layer, mask in static.items()}
        revived = [int(masks[layer].sum()) - kept[layer] for layer in masks]
        assert sum(revived) == (
            pytest.approx(0.2 * sum(map(torch.sum, masks.values())), abs=0.5) if name == "actor" else 0
        )
        assert max(revived) - min(revived) <= 1
        for layer, weight in weights.items():
            assert abs(kept[layer] - sum(kept.values()) * roots[layer] / sum(roots.values())) < 1
            share = (weight.abs() / weight.abs().sum(1, keepdim=True)).flatten()
            assert static[layer].flatten()[share.argsort(descending=True)[: kept[layer]]].all()
            before, after = masks[layer], final["masks"][name][layer]
            stays, dropped, grown, still_open = before & after, before & ~after, after & ~before, ~before & ~after
            inputs, outputs = before.sum(1, keepdim=True).expand_as(before), stays.sum(0).expand_as(stays)
            if dropped.any() and stays.any():  # from the neurons that had the most inputs
                assert inputs[dropped].min() >= inputs[stays].max()
            if grown.any() and still_open.any():  # from the inputs that had the fewest connections left
                assert outputs[grown].max() <= outputs[still_open].min()
            replaced += int(dropped.sum())
        assert replaced == 0 if name == "actor" else replaced > 9


DIFFS = {re.match(r"--- .*: (normalizer|LayerNorm|scheduler|trained)", b)[1]: b for b in blocks(LAB, "diff")}
DIFFS["third layer"] = """--- sac_tar.py
-        fc3=nn.Linear(hidden_size, output_size),
+        fc3=nn.Linear(hidden_size, hidden_size),
+        relu3=nn.ReLU(),
+        fc4=nn.Linear(hidden_size, output_size),
"""
SMALL = "--env-id Pendulum-v1 --hidden-size 24 --batch-size 32 --learning-starts 60 --total-timesteps 200 --prune-at 70"
SMALL += " --eval-frequency 100 --eval-episodes 2 --sparsity 0.8 --seed 3 --compute sparse"
SMALL += " --criterion random --distribution er"  # or networks this small would lose whole layers


def changes_of(block):
    """The texts of one of the page's diffs, each with what takes its place."""
    for hunk in block.partition("\n")[2].split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        yield ["".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +")]


@pytest.mark.parametrize("name", DIFFS)
def test_every_edit_of_the_agent_acts_and_is_evaluated_as_it_was_trained(name, script, tmp_path, monkeypatch, capsys):
    block, mine = DIFFS[name], script
    if name == "trained":
        main(script, monkeypatch, *SMALL.split(), "--method", "dense", "--runs-dir", tmp_path / "dense")
        (dense,) = tmp_path.glob("dense/*")
        block = block.replace("runs/<run folder>", str(dense))
    if name == "normalizer":
        ((before, after),), source = changes_of(block), inspect.getsource(environment.make_env)
        assert source.count(before) == 1
        exec(source.replace(before, after), names := {**vars(environment)})
        for module in (script, environment):
            monkeypatch.setattr(module, "make_env", names["make_env"])
    else:
        mine = edited(tmp_path, *changes_of(block), script=script)
    main(mine, monkeypatch, *SMALL.split(), "--runs-dir", tmp_path / "there")
    (run_dir,) = tmp_path.glob("there/*")
    final, checkpoint = (torch.load(run_dir / f"{kind}.pt", weights_only=True) for kind in ("final", "checkpoint"))
    returns = {e.step: e.value for e in events(run_dir).Scalars("eval/episodic_return")}
    match name:
        case "normalizer":
            assert any(part.get("count", 0) > 200 for part in final["statistics"].values())
        case "LayerNorm":
            assert final["actor"]["norm2.weight"].shape == (24,) and (final["qf1"]["norm1.weight"] != 1).any()
        case "third layer":
            assert final["actor"]["fc4.weight"].shape[1] == 24 and len(final["masks"]["qf1"]) == 4
        case "scheduler":
            rates = [group["lr"] for group in checkpoint["q_optimizer"]["param_groups"]]
            assert 0 < max(rates) < 1e-5 and "scheduler" not in final
        case "trained":
            assert returns[0] == events(dense).Scalars("eval/episodic_return")[-1].value
    main(mine, monkeypatch, "--evaluate", run_dir)
    printed = float(re.search(r"step 200: mean (\S+),", capsys.readouterr().out)[1])
    assert printed == pytest.approx(returns[200], abs=0.06)
