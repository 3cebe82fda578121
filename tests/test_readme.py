"""What the READMEs say is so: flags, tags, files, links, commands, and the rules that README.md adds, to the letter."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import tyro
from test_runs import events

import sac_tar
import sparse_utils
import td3_tar
from lab import compare, record, sweep

PROJECT = Path(__file__).parent.parent
README, OF_RUNS, PUBLISHED, EVIDENCE = (
    (PROJECT / folder / "README.md").read_text() for folder in (".", "runs", "runs/published", "runs/evidence")
)
PAGES = sorted({*PROJECT.glob("*.md"), *(path for at in ("runs", "tests") for path in PROJECT.glob(f"{at}/*.md"))})
PAGES += [
    path
    for folder in ("published", "parity", "width", "variants", "evidence")
    for path in sorted((PROJECT / "runs" / folder).rglob("*.md"))
]
COMMANDS = {"sac_tar.py": sac_tar.Args, "td3_tar.py": td3_tar.Args}
COMMANDS |= {"lab/sweep.py": sweep.Args, "lab/compare.py": compare.Args}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


# WORDS


def test_the_front_door_is_short():
    assert len(README.split()) <= 2000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_placeholder_is_left_every_table_holds_together_and_every_link_leads_somewhere(path):
    page = path.read_text()
    assert not re.search(r"^[A-Z]+_[A-Z]+$| [A-Z]+_[A-Z]+$|TODO|TBD|XXX", page, re.M)
    for line, after in zip(page.splitlines(), page.splitlines()[1:]):
        if line.startswith("|") and after.startswith("|"):
            columns = [len(re.split(r"(?<!\\)\|", row)) for row in (line, after)]
            assert columns[0] == columns[1], line
    for link in re.findall(r"\]\(([^)\s]+)\)", page) + re.findall(r"^\[\w+\]: (\S+)$", page, re.M):
        if not link.startswith("https://"):
            file, _, heading = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            target = target / "README.md" if target.is_dir() else target
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]


# FLAGS AND COMMANDS


def test_every_flag_of_sparsity_and_of_the_loop_stands_with_its_default(script):
    fields = [field.name for field in dataclasses.fields(script.Args)]
    concerned = fields[fields.index("method") : fields.index("compute") + 1]
    concerned += ["n_step", "n_step_from", "recent_fraction", "recent_size", "lr_cycles"]
    rows = dict(re.findall(r"^\| (`--.*?) \| `(.*?)` \|", OF_RUNS, re.M))
    table = {flag: default for flags, default in rows.items() for flag in re.findall(r"`--([a-z-]+)`", flags)}
    assert table == {name.replace("_", "-"): str(getattr(script.Args, name)) for name in concerned}


@pytest.mark.parametrize("flag", ["method", "criterion", "distribution", "drop-criterion"])
def test_every_name_that_a_flag_takes_stands_in_its_row(flag):
    row = re.search(rf"^\| `--{flag}` \| .*: (.*?) \|$", OF_RUNS, re.M)[1]
    rules = {"method": "METHODS", "criterion": "CRITERIA", "distribution": "DISTRIBUTIONS", "drop-criterion": "DROPS"}
    assert re.findall(r"`(\w+)`", row) == list(getattr(sparse_utils, rules[flag]))


def commands(page):
    for line in "\n".join(blocks(page, "bash")).splitlines():
        for words in (shlex.split(part, comments=True) for part in re.split(r"&&", line)):
            if words[:1] == ["python"] and words[1] in COMMANDS and "--algo" not in words:  # that flag is gone
                yield words[1], words[2:]


@pytest.mark.parametrize(
    "page", [README, OF_RUNS, PUBLISHED, EVIDENCE], ids=["README", "runs", "published", "evidence"]
)
def test_the_commands_are_understood(page):
    found = list(commands(re.sub(r"<[\w ]+>", "there", page)))
    assert len(found) > 2
    for name, words in found:
        own = words[: words.index("--")] if "--" in words else words
        tyro.cli(COMMANDS[name], args=own)
        if "--" in words:
            tyro.cli(sac_tar.Args, args=words[words.index("--") + 1 :])


def test_the_command_of_ten_seconds_prints_the_line_to_look_at(tmp_path, capsys):
    (words,) = (words for name, words in commands(README) if "snip" in words)
    sac_tar.train(tyro.cli(sac_tar.Args, args=[*words, "--runs-dir", str(tmp_path)]))
    (line,) = re.findall(r"^```\n(warning.*)\n```$", README, re.M)
    assert f"{line}\n" in capsys.readouterr().out


def test_the_lines_that_load_a_saved_policy(run, script):
    run_dir = run(env_id="HalfCheetah-v4")
    (code,) = (block for block in blocks(README, "python") if "torch.load" in block)
    code = code.replace("runs/<run folder>", str(run_dir)).replace("sac_tar", script.__name__)
    names = {"torch": torch, script.__name__: script, "env": gym.make("HalfCheetah-v4")}
    exec(code, names)
    act = names["actor"].get_mean_action if script is sac_tar else names["actor"]
    assert "actor.get_mean_action(obs)" in README and "TD3: `actor(obs)`" in README
    assert act(torch.zeros(2, 17)).shape == (2, 6)
    saved = torch.load(run_dir / "final.pt", weights_only=True)["actor"]["fc2.weight"]
    assert torch.equal(names["actor"].fc2.weight, saved)


# WHAT A RUN LEAVES BEHIND


def test_the_tables_name_every_tag_and_every_file_of_a_run_and_no_other_tag(run, script, monkeypatch):
    monkeypatch.setattr(script, "SPS_BURN_IN", 20)
    base = {"criterion": "magnitude", "distribution": "global", "sparsity": 0.95}  # cuts, so that there are warnings
    run_dir = run(total_timesteps=210, method="rigl", rewire_every=50, lr_cycles=1, **base)
    kinds = events(run_dir).Tags()
    tags = {*kinds["scalars"], *kinds["images"], *(tag.removesuffix("/text_summary") for tag in kinds["tensors"])}
    for pattern, name in (
        (r"^(sparsity/density_|topology/)(actor|qf[12])\.fc\d$", r"\1<network>.<layer>"),
        (r"^(sparsity/)(actor|qf[12])(_rewired|_distance|)$", r"\1<network>\3"),
    ):
        tags = {re.sub(pattern, name, tag) for tag in tags}
    rows = re.findall(r"^\| (`.*?) \|", OF_RUNS.split("| TensorBoard tag |")[1].split("\n\n")[0], re.M)
    table = {tag for row in rows for tag in re.findall(r"`(.*?)`", row)}
    of_sac = {"losses/alpha", "losses/alpha_loss"}
    assert tags == (table if script is sac_tar else table - of_sac)
    for path in run_dir.iterdir():
        assert "tfevents" in path.name or f"- `{path.name}`" in OF_RUNS or f" and `{path.name}`:" in OF_RUNS, path.name


def test_the_keys_of_the_files_of_a_run_are_named(run):
    run_dir = run(method="rigl", rewire_every=50, rewire_stop=1.0)
    config, topology = (json.loads((run_dir / f"{name}.json").read_text()) for name in ("config", "topology"))
    layer = topology["qf1"]["layers"]["fc1"]
    final = torch.load(run_dir / "final.pt", weights_only=True)
    keys = [*config, *config["segments"][0], *topology["qf1"], *layer, "step", "replaced"]
    keys += [key for key in final if not key.endswith("_target")]
    for key in set(keys) - {"layers"}:
        assert f"`{key}`" in OF_RUNS, key


# THE RULES THAT README.md ADDS

SMALL = "--env-id Pendulum-v1 --hidden-size 24 --batch-size 32 --buffer-size 1000 --eval-episodes 1 --sparsity 0.8"
SMALL += " --learning-starts 100 --total-timesteps 300 --runs-dir there"


def snippets():
    """(file, before or in, name of a dictionary, code) of everything that README.md says to add."""
    for block in blocks(README, "python"):
        _, *parts = re.split(r"^# (?:(\S+), )?(before|in) ([A-Z]+)\n", block, flags=re.M)
        for i in range(0, len(parts), 4):
            yield parts[i] or parts[0], *parts[i + 1 : i + 4]


def edited(text, place, name, code):
    """A file's text with the code before a dictionary, or in it as its last entry."""
    if place == "before":
        return re.sub(rf"^{name} = ", lambda found: f"{code}\n\n{found[0]}", text, count=1, flags=re.M)
    last = re.compile(rf"^({name} = \{{.*?),?\s*\}}$", re.M | re.S)
    return last.sub(lambda found: f"{found[1]},\n{code}}}", text, count=1)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with all of README's rules in it."""
    folder = tmp_path_factory.mktemp("project")
    for pattern in ("*.py", "lab/kernels/*.*", "lab/*.py"):
        for path in PROJECT.glob(pattern):
            (folder / path.relative_to(PROJECT)).parent.mkdir(exist_ok=True)
            shutil.copy(path, folder / path.relative_to(PROJECT))
    assert record.code_hash(folder / "sac_tar.py") == record.code_hash(PROJECT / "sac_tar.py")
    for file, place, name, code in snippets():
        before = (folder / file).read_text()
        (folder / file).write_text(after := edited(before, place, name, code))
        assert len(after) >= len(before) + len(code) > len(before), name
    return folder


@pytest.fixture
def python(project, script):
    def python(flags):
        command = [sys.executable, f"{script.__name__}.py", *flags.split()]
        environment = os.environ | {"COLUMNS": "250"}
        return subprocess.run(command, cwd=project, env=environment, check=True, capture_output=True, text=True).stdout

    return python


@pytest.fixture
def run_edited(project, python, script):
    """Run the edited script and return its run folder, whose record differs from that of the project as it is."""

    def run_edited(flags):
        python(f"{SMALL} {flags}")
        run_dir = max((project / "there").glob(f"*__{script.__name__}__*"), key=lambda path: path.stat().st_mtime)
        (segment,) = json.loads((run_dir / "config.json").read_text())["segments"]
        assert segment["code"] == record.code_hash(project / f"{script.__name__}.py")
        assert segment["code"] != record.code_hash(PROJECT / f"{script.__name__}.py")
        return run_dir

    return run_edited


def test_there_is_a_rule_of_each_kind_and_help_tells_of_it(python):
    added = {(place, name): code for _, place, name, code in snippets()}
    names = ("CRITERIA", "DISTRIBUTIONS", "REVIVALS", "DROPS", "GROWTHS")
    assert added.keys() == {(place, name) for place in ("before", "in") for name in names}
    text = re.sub(r"[\s│]+", " ", python("--help"))
    for name in names:
        rule = re.search(r'"(\w+)": ', added["in", name])[1]
        sentence = re.search(r'"""(.*)\."""', added["before", name])[1]
        assert f"{rule}: {sentence}" in text


def first_weights(script):
    """The weights of actor and critics as a run with the default seed draws them."""
    env = gym.make("Pendulum-v1")
    torch.manual_seed(script.Args.seed)
    actor = script.Actor(3, env.action_space, 24)
    networks = {"actor": actor} | {name: script.QNetwork(3, 1, 24) for name in ("qf1", "qf2")}
    return {name: sparse_utils.linear_weights(network) for name, network in networks.items()}


def test_the_revival_the_criterion_and_the_distribution_act(run_edited, script):
    run_dir = run_edited("--method equal --reserve 0.2 --criterion share --distribution root")
    report = json.loads((run_dir / "topology.json").read_text())
    masks = torch.load(run_dir / "final.pt", weights_only=True)["masks"]
    for name, weights in first_weights(script).items():
        layers = report[name]["layers"].values()
        size = sum(layer["size"] for layer in layers)
        budget, reserve = round(0.2 * size), round(0.2 * round(0.2 * size))
        revived, kept = [layer["revived"] for layer in layers], [layer["static"] for layer in layers]
        assert sum(revived) == reserve > 9 and max(revived) - min(revived) <= 1
        whole = sum(math.sqrt(layer["size"]) for layer in layers)
        exact = [(budget - reserve) * math.sqrt(layer["size"]) / whole for layer in layers]
        assert sum(kept) == budget - reserve and all(abs(k - e) < 1 for k, e in zip(kept, exact, strict=True))
        for (layer, weight), count in zip(weights.items(), kept, strict=True):
            share = weight.abs() / weight.abs().sum(1, keepdim=True)
            highest = share.flatten().sort(descending=True).indices[:count]
            assert masks[name][layer].flatten()[highest].all()


def test_the_drop_and_the_growth_act(run_edited):
    run_dir = run_edited("--method lonely --drop-criterion crowded --no-regrow --rewire-every 150 --rewire-stop 1")
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for name, layers in checkpoint["progress"]["revived_masks"].items():
        replaced = 0
        for layer, before in layers.items():
            after = checkpoint["masks"][name][layer]
            kept, dropped, grown, open_still = before & after, before & ~after, after & ~before, ~before & ~after
            replaced += int(dropped.sum())
            inputs, outputs = before.sum(1, keepdim=True).expand_as(before), kept.sum(0).expand_as(kept)
            if dropped.any() and kept.any():  # from the neurons that had the most inputs
                assert inputs[dropped].min() >= inputs[kept].max()
            if grown.any() and open_still.any():  # from the inputs that had the fewest connections left
                assert outputs[grown].max() <= outputs[open_still].min()
        assert replaced > 9
