"""lab/compare.py: statistics against calculations by hand, the names of arms, caveats, published grids, event files."""

import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from test_run import PROJECT, refused

import sparse_utils
from lab import compare, figures, record, results

STEPS = [0, *range(100, 1001, 100)]
SETTLED = {  # the flags of every run here, as a script records them
    "criterion": "random", "distribution": "er", "reserve": 0.1, "active_width": None, "hidden_size": 24, "n_step": 1,
    "init": "dense", "n_step_from": 0, "recent_fraction": 0.0, "recent_size": 20_000, "regrow": True, "runs_dir": "/x",
    "drop_criterion": None, "rewire_every": 1000, "total_timesteps": 1000, "eval_frequency": 100, "policy_noise": 0.2,
}  # fmt: skip


def write_events(path, began, scalars, when):
    events = [Event(wall_time=began, file_version="brain.Event:2")]
    for tag, step, value in scalars:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        events.append(Event(wall_time=when[step], step=step, summary=summary))
    with path.open("wb") as file:
        for event in events:
            RecordWriter(file).write(event.SerializeToString())


@pytest.fixture
def make(tmp_path):
    """Writes a run folder. The last evaluation, alone in the last tenth, has the given return, the rest half of it.
    Training begins at step 100. From step late[0] on, all is late[1] seconds later."""
    counter = itertools.count(1_700_000_000, 10_000)

    def make(final, env_id="A-v1", method="tar", seed=1, steps=STEPS, finished=True, torch="2.0", pace=1.0, flops=1e9,
             script="td3_tar", segments=({},), late=(0, 0), cut=(0, 0), **args):  # fmt: skip
        flags = {"sparsity": 0.0 if method == "dense" else 0.9, "method": method, "seed": seed} | args
        flags = SETTLED | {"env_id": env_id, "exp_name": script} | flags
        flags = {"critic_method": flags["method"], "critic_sparsity": flags["sparsity"]} | flags
        began = next(counter)
        run = tmp_path / "runs" / f"{env_id}__{script}__{method}__s{flags['sparsity']}__{seed}__{began}"
        run.mkdir(parents=True)
        one = {"from_step": 0, "code": "c0de" * 3, "git_commit": "a" * 40, "processor": "a processor", "device": "cpu"}
        segments = [one | {"versions": {"torch": torch}} | segment for segment in segments]
        (run / "config.json").write_text(json.dumps({"args": flags, "script": script, "segments": segments}))
        layer = {"shape": [6, 4], "blind_inputs": [cut[0], 0], "dead_units": [cut[1], 0]}
        layers = {"fc1": layer | {"shape": [8, 8], "part": [6, 4]}, "fc2": layer}  # older runs have no part
        (run / "topology.json").write_text(json.dumps({"actor": {"budget": 7, "layers": layers}}))
        if finished:
            (run / "final.pt").touch()
        values = [("eval/episodic_return", step, final if step > 900 else final / 2) for step in steps]
        values += [("eval/episodic_length", step, 7.0) for step in steps]
        values += [("flops/training", step, flops * max(step - 100, 0)) for step in steps if flops]
        when = {step: began + pace * step + (late[1] if step >= late[0] else 0) for step in range(1001)}
        write_events(run / f"events.out.tfevents.{began}.somehost.1.0", began, values, when)
        return run

    return make


def cells(page):
    """The rows of the tables of a page."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures of a comparison, by file name, in place of their files, which take long."""
    drawn = {}
    monkeypatch.setattr(figures, "finish", lambda figure, path, names: drawn.update({Path(path).name: figure}))
    yield drawn
    figures.plt.close("all")


@pytest.fixture
def comparison(tmp_path, monkeypatch, request):
    """The tables of a comparison, by the end of their file names, and its page; figures only for tests with `drawn`."""
    for name in ("draw_curves", "draw_sparsities", "draw_gains") if "drawn" not in request.fixturenames else ():
        monkeypatch.setattr(figures, name, lambda *args: None)

    def comparison(folder=tmp_path / "runs", sparsity=0.9, algo="td3_tar", **args):
        compare.main(compare.Args(folder, **args))
        out = args.get("out") or (args.get("publish") or folder) / "comparison"
        name = f"{algo}_s{sparsity}"
        page = (out / f"{name}.md").read_text()
        assert not re.search(r"\bnan\b", page)
        tables = {path.stem.removeprefix(f"{name}_"): pd.read_csv(path) for path in out.glob(f"{name}_*.csv")}
        return tables | {"page": page}

    return comparison


@pytest.fixture
def arms(comparison):
    """Each arm and its final return, or another column."""
    column = lambda name, table: table["returns"].set_index("arm")[name].to_dict()  # noqa: E731
    return lambda name="final return", *folder, **args: column(name, comparison(*folder, **args))


RETURNS = {  # of seeds 1, 2, 3 and, for some, more
    ("A-v1", "dense"): [1000, 1200, 1100, 900, 950],
    ("A-v1", "static"): [400, 500, 900, 350, 300],
    ("A-v1", "tar"): [700, 800, 600, 900, 450],
    ("B-v1", "dense"): [50, 60, 40],
    ("B-v1", "static"): [10, 20, 30],
    ("B-v1", "tar"): [30, 25, 45],
}
T_QUANTILES = {3: 4.302652730, 5: 2.776445105}  # of Student's t at 0.975, with n - 1 degrees of freedom


@pytest.fixture
def grid(make):
    for (env_id, method), values in RETURNS.items():
        for seed, value in enumerate(values, 1):
            make(value, env_id, method, seed)


def beats(x, y):
    return np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y])


def test_means_paired_differences_and_probabilities(grid, comparison, tmp_path):
    tables = comparison()
    for row in tables["returns"].to_dict("records"):
        method = row["arm"].removesuffix(" random+er")
        own, static = (np.array(RETURNS[row["environment"], name], float) for name in (method, "static"))
        for name, values in (("final return", own), ("difference", own - static)):
            half = T_QUANTILES[len(own)] * values.std(ddof=1) / len(own) ** 0.5
            expected = [values.mean(), values.mean() - half, values.mean() + half]
            if name == "final return" or method != "static":
                assert [row[f"{name}{end}"] for end in ("", " low", " high")] == pytest.approx(expected)
        assert row["n"] == len(own) and row["seeds"] == " ".join(map(str, range(1, len(own) + 1)))
        if method == "static":
            assert row["against"] == "none: it is the reference" and row["pairs"] == 0 and np.isnan(row["difference"])
            continue
        assert row["against"] == "static random+er" and row["pairs"] == len(own)
        assert row["P(better)"] == pytest.approx(beats(own, static))
        # no interval below five seeds, nor for two arms that are quite apart
        assert np.isnan(row["P(better) low"]) == (len(own) < 5 or own.min() > static.max())
    row = next(row for row in cells(tables["page"]) if row[1] == "tar random+er")
    assert (row[4], row[-1]) == ("690.0 [473.2, 906.8]", "0.78 [0.40, 1.00]")
    next((tmp_path / "runs").glob("A-v1__td3_tar__tar__*__5__*/final.pt")).unlink()
    table = comparison()["returns"].set_index(["environment", "arm"])
    assert np.isnan(table["P(better) low"]["A-v1", "tar random+er"])  # four seeds are too few


def test_means_across_environments(grid, make, comparison, tmp_path):
    """The bootstrap, done here anew, draws seeds within each environment. Where one environment has more seeds, and so
    more weight in an IQM, there is none; P(better) is a mean of that in each environment."""
    rng, table = np.random.default_rng(1), comparison()["aggregate"].set_index("arm")
    assert "IQM, % of dense" not in table and list(table.n) == [8, 8, 8] and list(table.environments) == [2, 2, 2]
    for method in ("dense", "tar"):
        wins = [beats(RETURNS[env, method], RETURNS[env, "static"]) for env in ("A-v1", "B-v1")]
        row = table.loc[method if method == "dense" else f"{method} random+er"]
        assert row["P(better)"] == pytest.approx(np.mean(wins)) and np.isnan(row["P(better) low"])
    for path in (tmp_path / "runs").glob("A-v1__*__[45]__*"):
        (path / "final.pt").unlink()
    table = comparison()["aggregate"].set_index("arm")
    for method in ("dense", "static", "tar"):
        row = table.loc[method if method == "dense" else f"{method} random+er"]
        returns = [np.array(RETURNS[env, method][:3]) for env in ("A-v1", "B-v1")]
        percent = [100 * own / np.mean(RETURNS[env, "dense"][:3]) for own, env in zip(returns, ("A-v1", "B-v1"))]
        drawn = np.concatenate([one[rng.integers(3, size=(20_000, 3))] for one in percent], 1)
        assert row["IQM, % of dense"] == pytest.approx(np.sort(np.concatenate(percent))[1:-1].mean())  # 6 // 4 off
        ends = np.percentile(np.sort(drawn)[:, 1:-1].mean(1), [2.5, 97.5])
        assert [row["IQM, % of dense low"], row["IQM, % of dense high"]] == pytest.approx(ends, rel=0.03)
    make(1000, "A-v1", "dense", 4)
    table = comparison()["aggregate"]
    assert table["IQM, % of dense"].isna().tolist() == [True, False, False] and table.columns[3] == "IQM, % of dense"
    make(-1, "B-v1", "dense", 3)  # a mean of which a run is below 0 is no scale
    assert "IQM, % of dense" not in comparison()["aggregate"]
    for env_id, seed in itertools.product(("A-v1", "B-v1"), (1, 2, 3)):
        make(50 + seed, env_id, "dense", seed, hidden_size=12)  # nor are two
        make(50, env_id, "dense", seed)
    assert "IQM, % of dense" not in comparison()["aggregate"]


def test_each_arm_against_each_other_where_both_have_runs(grid, make, comparison):
    for seed in (1, 2, 3):
        make(450 + seed, "A-v1", "uniform", seed)
    make(5, "C-v1", "set")
    tables, returns = comparison(), RETURNS | {("A-v1", "uniform"): [451, 452, 453], ("C-v1", "set"): [5]}
    rows = [row for row in cells(tables["page"]) if row[0][1:3] == ". "]
    names = [row[0].split()[1] for row in rows]
    assert names == ["dense", "set", "static", "tar", "uniform"]
    for row, name in zip(rows, names, strict=True):
        for found, other in zip(row[1:], names, strict=True):
            samples = [[returns.get((env, arm)) for arm in (name, other)] for env in ("A-v1", "B-v1", "C-v1")]
            each = [beats(x, y) for x, y in samples if x and y]
            expected = f"{np.mean(each):.2f}{'*' if len(each) < 2 else ''}" if each else "no runs"
            assert found == ("itself" if name == other else expected)


def test_return_at_equal_time_and_flops(make, comparison):
    """static takes 300 s and 3e11 FLOPs, tar 900 s and 9e11: a third of its steps, 333."""
    for seed in (1, 2, 3):
        make(40 * seed, method="static", seed=seed, pace=0.3, flops=1e9 / 3)
        run = make(100, seed=seed, pace=0.9)
    values = [("eval/episodic_return", step, step) for step in STEPS] + [("flops/training", s, 1e9 * s) for s in STEPS]
    write_events(next(run.glob("events*")), 0, values, {step: 0.9 * step for step in range(1001)})
    tables = comparison()
    time, flops = (tables[kind].set_index("arm") for kind in ("time", "flops"))
    assert time["compared after, minutes"].tolist() == pytest.approx([5, 5])
    assert time["a whole run, minutes"].to_dict() == pytest.approx({"static random+er": 5, "tar random+er": 15})
    assert time["return then"].tolist() == pytest.approx([80, (50 + 50 + 1000 / 3) / 3])
    assert flops["return then"]["tar random+er"] == pytest.approx((50 + 50 + 300) / 3)


def test_a_page_has_its_figures_and_a_curve_ends_where_its_shortest_run_does(make, tmp_path, monkeypatch):
    lines, finish = {}, figures.finish

    def noted(figure, path, names):
        curves = [line.get_xdata() for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
        lines[Path(path).name] = {round(points[-1], 3) for points in curves}
        finish(figure, path, names)

    monkeypatch.setattr(figures, "finish", noted)
    for seed, method in itertools.product((1, 2), ("static", "tar")):
        make(40 * seed, method=method, seed=seed, pace=0.3 * seed)
    compare.main(compare.Args(tmp_path / "runs"))
    page = tmp_path / "runs" / "comparison" / "td3_tar_s0.9.md"
    names = re.findall(r"!\[.*?\]\((.*?)\)", page.read_text())
    assert names == [f"td3_tar_s0.9_{kind}.png" for kind in ("curves", "time", "flops")]
    for name in names:
        with Image.open(page.parent / name) as image:
            assert image.width > 500 and image.height > 300
    assert lines["td3_tar_s0.9_time.png"] == {5}  # minutes


def test_only_the_costs_that_are_asked_for_are_compared_and_older_files_are_named(make, comparison, capsys, tmp_path):
    for method in ("static", "tar"):
        make(5, method=method)
    assert {"time", "flops"} & comparison(costs=("flops",), out=tmp_path / "out").keys() == {"flops"}
    assert not (tmp_path / "runs" / "comparison").exists()
    assert {"time", "flops"} <= comparison().keys()
    assert "older" not in capsys.readouterr().out
    comparison(costs=("flops",))
    assert "comparison, where older files are: td3_tar_s0.9_time.csv\n" in capsys.readouterr().out


def test_minutes_are_compared_on_the_processor_of_most_runs_and_pauses_do_not_count(make, comparison):
    """Between steps 500 and 600 an hour passes, or, where the run says that it was resumed at 600, a minute more."""
    make(5, method="static", late=(600, 3600))
    make(5, method="static", seed=2, segments=[{}, {"from_step": 600}], late=(600, 60))
    make(5, segments=[{"processor": "another"}], pace=0.1)
    make(5, seed=2, flops=0)
    time, page = (tables := comparison())["time"], tables["page"]
    assert list(time.n) == [2, 1] and list(time["a whole run, minutes"]) == pytest.approx([1000 / 60] * 2)
    assert list(tables["flops"].n) == [2, 1]  # on any processor
    assert "the compared runs are of another processor: 1 on A-v1 of tar random+er." in page
    assert "Left out by 1e12 FLOPs, since they have no 1e12 FLOPs: 1 on A-v1 of tar random+er." in page
    make(5, "B-v1", segments=[{"processor": "another"}])
    assert list(comparison()["time"].n) == [2, 1, 1]
    # three intervals in turn, or all after a change of the machine's load, are time; one or two are not
    for intervals, expected in (
        ([1, 1, 1, 9, 9, 9, 1], 31), ([1, 1, 9, 9, 9], 29), ([1, 1, 90, 1, 1], 5), ([90, 1, 1, 1], 4), ([1, 1, 90], 3),
        ([7], 7), ([1, 14], 15), ([2, 14, 15], 31), ([1, 1, 30, 90, 1, 1], 6),
    ):  # fmt: skip
        seconds = pd.Series(np.cumsum([0.0, *intervals]), range(0, 100 * len(intervals) + 1, 100))
        assert results.without_pauses(seconds, []).iloc[-1] == expected
    points = {"step": [0, 100, 200, 300, 400], "seconds": [0.0, 2, 4, 6, 31], "return": 5.0, "flops": 0.0}
    late = pd.Series([0.0, 9000, 9003, 9006, 9009], [0, 100, 200, 300, 400])
    assert {results.without_pauses(late, resumed_at, 100).iloc[-1] for resumed_at in ([], [60])} == {12}
    for begins, minutes in ((300, 31 / 60), (0, 8 / 60)):  # learning takes longer than what was before it
        run = {"args": {"learning_starts": begins}, "segments": [{}], "evaluations": pd.DataFrame(points)}
        assert results.curve_of(run).minutes.iloc[-1] == pytest.approx(minutes)
    assert list(results.without_pauses(pd.Series([3600.0, 3602, 3604], [0, 100, 200]), [])) == [2, 4, 6]


def test_where_networks_were_computed_is_said_beside_minutes(make, comparison):
    for seed, in_kernels in enumerate(([], ["actor", "qf1"])):
        make(5, method="static", segments=[{"in_kernels": ["actor", "qf1"]}], seed=seed)
        make(5, segments=[{"in_kernels": in_kernels}], seed=seed)
        make(5, method="dense", segments=[{"in_kernels": []}], seed=seed)
        make(5, "B-v1", segments=[{"in_kernels": []}], seed=seed)
    said = "other networks in the kernels: actor+qf1 of static random+er, tar random+er; none of tar random+er."
    assert f"Minutes on A-v1 are of runs with {said}" in (page := comparison()["page"])
    assert page.count("Minutes on") == 1
    assert "Minutes on" not in comparison(arm=("static", "dense"), costs=("time",))["page"]
    assert "Minutes on" not in comparison(costs=("flops",))["page"]


def test_arms_are_method_and_base_mask_networks_that_differ_and_flags_that_differ(make, arms):
    make(1, method="dense")
    make(1, method="dense", seed=2, prune_at=500)
    make(2, method="tiny")
    make(3)
    make(4, criterion="snip", distribution="global", critic_method="dense", critic_sparsity=0.0)
    make(5, sparsity=0.5, critic_sparsity=0.9)
    make(6, method="rigl", rewire_every=100, drop_criterion="magnitude")
    make(7, method="rigl", rewire_every=1000, drop_criterion="magnitude")
    make(8, method="rigl", drop_criterion="random")
    make(9, my_flag=1)
    for reserve in (0.1, 0.3):  # which may act on a method that is not known here
        make(14, method="half_tar", reserve=reserve)
    make(15, method="uniform", reserve=0.2)  # what tells arms apart is said of all
    make(10, sparsity=0.95)
    make(11, env_id="B-v1", my_flag=1)
    for seed, (parts, kept) in enumerate(((1, False), (2, True), (2, False))):  # it acts on resumed runs alone
        make(12, method="set", seed=seed, segments=[{}, {"from_step": 500}][:parts], save_buffer=kept)
    assert arms() == {
        "dense": 1, "tiny": 2, "tar random+er reserve=0.1": 3, "tar snip+global critic dense reserve=0.1": 4,
        "tar random+er actor 0.5 reserve=0.1": 5, "rigl random+er rewire_every=100": 6, "rigl random+er": 7,
        "rigl random+er drop_criterion=random": 8, "tar random+er my_flag=1 reserve=0.1": 11,
        "set random+er": 12, "set random+er save_buffer=False": 12,
        "half_tar random+er reserve=0.1": 14, "half_tar random+er reserve=0.3": 14,
        "uniform random+er reserve=0.2": 15,
    }  # fmt: skip
    make(13, env_id="C-v1", method="dense")  # which alone brings no environment to a page
    make(13, env_id="C-v1", sparsity=0.98)
    assert arms(sparsity=0.95) == {"dense": 1, "tar random+er reserve=0.1": 10} and arms(sparsity=0.98)["dense"] == 13


def test_a_loaded_file_is_named_by_its_hash_alone(make, arms, drawn):
    make(3)  # older than the flag
    make(5, seed=2, load=None)
    for seed, path in ((1, "/data/my run/a.pt"), (2, "b.pt")):  # one file at two places
        make(9, seed=seed, load=f"{path}@0123456789ab")
    assert arms() == {"tar random+er": 4, "tar random+er load=@0123456789ab": 9}
    labels = drawn["td3_tar_s0.9_curves.png"].axes[0].get_legend_handles_labels()[1]
    assert labels == ["tar", "tar load=@0123456789ab"]


def test_a_method_that_began_from_a_file_beside_one_that_did_not_is_a_caveat(make, comparison):
    make(3, method="static")
    make(9, load="a.pt@0123456789ab")
    assert "- Not the same load: @0123456789ab in 1 of 2 runs; none in 1 of 2 runs.\n" in comparison()["page"]


def test_an_edited_copy_of_a_script_is_another_arm_of_its_algorithm_and_other_flags_are_another(make, arms, tmp_path):
    make(5)
    make(3, method="static")
    make(8, script="my_td3", my_coefficient=1)
    sac = make(7, script="sac_tar", alpha=0.2)
    own = (sac / "config.json").read_text().replace("policy_noise", "autotune")
    own = own.replace("rewire_every", "my_rewirings")  # its n_step is its own
    (sac / "config.json").write_text(own)
    copy = arms(algo="my_td3+td3_tar")
    assert copy == {"static random+er td3_tar": 3, "tar random+er my_td3": 8, "tar random+er td3_tar": 5}
    assert arms(algo="sac_tar") == {"tar random+er": 7}
    grid = tmp_path / "grid"  # of run folders and published runs, which record fewer flags
    for run in (tmp_path / "runs").glob("*_td3*"):
        shutil.copytree(run, (tmp_path / "other" if "my_td3" in run.name else grid) / run.name)
    results.publish(results.results_in(tmp_path / "other", []), grid)
    assert arms("final return", grid, algo="my_td3+td3_tar") == copy
    make(3, method="static", script="my_td3")  # each script's own control
    for script, method in itertools.product(("my_td3", "td3_tar"), ("dense", "tiny")):
        make(2, method=method, script=script)
    both = arms(algo="my_td3+td3_tar", arm=("tar",)).keys()
    assert both == {"tar random+er my_td3", "tar random+er td3_tar"}  # not all that td3_tar made
    against = arms("against", algo="my_td3+td3_tar")
    for script in ("my_td3", "td3_tar"):
        for arm in (f"tar random+er {script}", f"dense {script}", f"tiny {script}"):
            assert against[arm] == f"static random+er {script}"
    make(9, script="an_edit")  # without a control of its own, so that its gain is not by revival alone
    runs = compare.read_runs(tmp_path / "runs", [], False)
    runs = runs[runs.algo.str.contains("td3")]
    chosen = compare.references(runs, None)
    assert chosen["tar random+er an_edit"] == "static random+er my_td3"
    assert set(compare.gains_of(runs, chosen).label) == {"tar td3_tar"}


def test_the_control_differs_in_the_fewest_flags_and_then_has_the_shortest_name(make, arms):
    for flags in ({}, {"init": "sparse"}, {"critic_method": "dense", "critic_sparsity": 0.0}):
        make(1, method="static", **flags)
        make(2, method="tar", **flags)
    for method in ("dense", "tiny", "rigl"):
        make(2, method=method)
    for method, critic_method in (("static", "rigl"), ("static", "tiny"), ("tar", "tiny"), ("rigl", "tiny")):
        make(2, method=method, critic_method=critic_method)
    against = {arm.replace(" random+er", ""): other for arm, other in arms("against").items()}
    assert against.pop("static") == "none: it is the reference"
    others = ["tar", "rigl", "dense", "tiny", "static init=sparse"]
    others += [f"static critic {method}" for method in ("dense", "rigl", "tiny")]
    assert against == dict.fromkeys(others, "static random+er") | {
        "tar init=sparse": "static random+er init=sparse", "tar critic dense": "static random+er critic dense",
        "tar critic tiny": "static random+er critic tiny", "rigl critic tiny": "static random+er critic tiny",
    }  # fmt: skip
    make(3, criterion="snip")
    against = arms("against")
    assert against["tar snip+er"] == "none: no single control fits" and against["dense"] == "static random+er"


def test_all_are_compared_with_the_arm_that_is_asked_for(make, comparison, monkeypatch):
    for method, value in {"static": 1, "tar": 3, "rigl": 6, "dense": 10}.items():
        for factor, criterion in ((1, "random"), (2, "snip"))[: 1 if method == "dense" else 2]:
            make(factor * value, method=method, criterion=criterion)
    table = comparison(against="rigl snip")["returns"].set_index("arm")
    assert table.difference["tar random+er"] == 3 - 12 and table.against["rigl snip+er"] == "none: it is the reference"
    make(7, env_id="B-v1")
    assert {*comparison(env_id=("A-v1",))["returns"].environment} == {"A-v1"}
    chosen = comparison(against="dense", arm=("tar random+er",), env_id=("A-v1",))["returns"]
    assert list(chosen.arm) == ["dense", "tar random+er"] and set(chosen.against[1:]) == {"dense"}
    alone = comparison(against="static snip", arm=("static snip",), env_id=("A-v1",))["page"]
    assert "There is no run here of" not in alone
    make(1, sparsity=0.95)
    assert "There is no run here of rigl snip+er, with which" in comparison(sparsity=0.95, against="rigl snip")["page"]
    monkeypatch.setattr(sparse_utils, "CONTROLS", {"rigl": "a control of the reader"})
    assert comparison()["returns"].set_index("arm").against["tar snip+er"] == "rigl snip+er"


def test_what_other_code_ran_again_later_is_said(make, comparison):
    first = make(1, segments=[{"code": 12 * "a"}])
    make(2, segments=[{"code": 12 * "b"}])
    sentence = "Left out, since they were run again later by other code (with --separate-code each code has an arm): "
    assert f"- {sentence}{first.name}.\n" in comparison()["page"]
    first.rename(first.with_name(first.name.replace("__1__", "__z__1__")))  # in whose name more flags are
    assert f"- {sentence}{first.name.replace('__1__', '__z__1__')}.\n" in comparison()["page"]


def test_what_is_missing_or_unequal_is_named_at_most_five_lines_on_top(make, comparison, capsys, tmp_path):
    for seed in (1, 2):
        make(100 * seed, method="static", seed=seed)
        make(60 * seed, method="static", seed=seed, env_id="B-v1")
        make(70, method="uniform", seed=seed, reserve=0.3)
    make(300, seed=1, torch="2.1", reserve=0.1)
    unfinished, empty = make(1e6, seed=3, finished=False), make(1e6, seed=3, steps=[0, 950])
    rerun = make(1e6, method="static", seed=3)
    make(600, method="static", seed=3)
    (tmp_path / "runs/NOTES.md").write_text("- These are old.\n\nThose are not.\n")
    page, tar, uniform = (tables := comparison())["page"], "tar random+er", "uniform random+er"
    assert tables["returns"].set_index(["environment", "arm"])["final return"]["A-v1", "static random+er"] == 300
    sentences = [
        "Not the same reserve: 0.1 in 1 of 8 runs; 0.3 in 2 of 8 runs.",
        "Not the same version of torch: 2.0 in 7 of 8 runs; 2.1 in 1 of 8 runs.",
        "These are old.",
        "Those are not.",
        "3 further caveats are at the end.",
        "Left out, since they are not finished, or final.pt or event files up to the end are missing: "
        f"{', '.join(sorted([unfinished.name, empty.name]))}.",
        f"Left out, since they were run again later: {rerun.name}.",
        f"No finished run on A-v1, seed 2, 3: {tar}; A-v1, seed 3: {uniform}; B-v1: {tar}, {uniform}.",
    ]
    top, rest = page.split("\n\n## Final return")
    assert [line.removeprefix("- ") for line in top.splitlines()[4:]] == sentences[:5]
    below, printed = rest.split("## Further caveats\n\n- ")[1].split("\n\n")[0], capsys.readouterr().out
    assert below.split("\n- ") == sentences[5:] and all(sentence in printed for sentence in sentences)


def test_the_command_refuses_a_flag_given_twice_and_a_place_where_it_cannot_write(make, monkeypatch, capsys, tmp_path):
    make(1)
    (tmp_path / "file").touch()
    for words, sentence in (
        ("--arm tar --arm static", "error: --arm is given twice; put all its values behind one\n"),
        (f"--out {tmp_path}/file/x", f"error: cannot read or write {tmp_path}/file/x (Not a directory); check"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare.py", f"{tmp_path}/runs", *words.split()])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(compare.__file__, run_name="__main__")
        assert end.value.code == 2 and capsys.readouterr().err.startswith(sentence)


def test_what_all_runs_share_and_no_name_tells_is_said(make, comparison):
    make(5, method="dense")  # on which no such flag acts
    for seed in (1, 2):
        make(5, method="static", seed=seed, init="sparse", load="a.pt@0123456789ab", prune_at=400)
        other = {"processor": "another"} if seed == 2 else {}
        make(5, seed=seed, init="sparse", load="a.pt@0123456789ab", prune_at=400, segments=[other])
    said = "init=sparse, load=@0123456789ab, prune_at=400, reserve=0.1 (tar), total_timesteps=1000.\n\n- Not "
    assert f"\n\nAll pruned runs have {said}" in (page := comparison()["page"])
    said = "eval_frequency=100, hidden_size=24, policy_noise=0.2"
    assert f"\n\n## Other shared flags\n\n{said}\n\n## Which" in page
    assert "\n- Not the same processor: a processor in 4 of 5 runs; another in 1 of 5 runs.\n" in page
    for seed, versions in enumerate(("1", "1", "2", "12"), 3):
        segments = [{"versions": {"torch": "2.0", "my_env": version}} for version in versions]
        make(5, "B-v1", seed=seed, segments=segments)
    said = "my_env: 1 in 2 of 9 runs; 1 then 2 in 1 of 9 runs; 2 in 1 of 9 runs."
    assert f"Not the same version of {said}" in comparison()["page"]


def test_lengths_that_differ_in_one_environment_are_in_the_names_of_arms(make, arms):
    shorter = {"total_timesteps": 900, "steps": STEPS[:-1]}
    for method in ("static", "tar"):
        make(5, "B-v1", method, **shorter)
    make(5, "C-v1", "tar")
    assert arms() == {"static random+er": 2.5, "tar random+er": 5}
    make(5, "C-v1", "static", **shorter)
    assert arms().keys() == {
        f"{of} random+er total_timesteps={n}" for of, n in (("static", 900), ("tar", 900), ("tar", 1000))
    }


def test_a_config_of_another_project_is_no_run(make, comparison, tmp_path, monkeypatch):
    make(5)
    (tmp_path / "runs/other").mkdir()
    (tmp_path / "runs/other/config.json").write_text('{"lr": 1}')
    (tmp_path / "runs/gone").mkdir()
    (tmp_path / "runs/gone/config.json").write_text("{}")
    read, nowhere = record.read_config, tmp_path / "nowhere"  # as of a run that is deleted meanwhile
    monkeypatch.setattr(record, "read_config", lambda folder: read(nowhere if folder.name == "gone" else folder))
    assert "Nothing is missing or unequal." in comparison()["page"]


def test_what_differs_by_design_is_no_caveat(make, comparison):
    drops = {"rigl": "magnitude", "set": "mest"}  # the first by default
    for method in ("dense", "tiny", "static", "tar", "rigl", "set"):
        own = {"reserve": 0.3} if method == "tar" else {}
        make(5, method=method, drop_criterion=drops.get(method), rewire_every=500, **own)
    said = "drop_criterion=mest (set), reserve=0.3 (tar), rewire_every=500 (rigl, set), total_timesteps=1000."
    assert f"All pruned runs have {said}\n\nNothing is missing or unequal.\n" in comparison()["page"]
    make(5, "B-v1", "rigl", rewire_every=500, drop_criterion="mest")  # the other rigl has the default
    assert "drop_criterion" not in comparison()["page"].partition("\n- ")[0]


def test_two_edits_of_the_code_are_never_averaged_silently(make, comparison, arms):
    for seed, edit in ((1, "1"), (2, "1"), (3, "2")):
        make(100 * seed, seed=seed, segments=[{"code": 12 * edit, "git_commit": "b" * 40 + "-dirty"}])
        make(10, method="static", seed=seed, segments=[{"code": 12 * "1", "git_commit": "c" * 40}])
    make(7, seed=4, segments=[{"code": None}])
    make(9, seed=5, segments=[{}, {"code": "d" * 12, "from_step": 500, "processor": "another"}])
    page, one, two = comparison()["page"], "1" * 7, "2" * 7
    said = "- The runs are not all of the same code: see the last table."
    assert f"{said} Means over runs of different code (see --separate-code): tar random+er.\n" in page
    assert {(*row[:3], *row[-2:]) for row in cells(page.split("## Which code made")[1])} >= {
        (one, "bbbbbbb-dirty", "a processor", "2", "tar random+er (2)"),
        (two, "bbbbbbb-dirty", "a processor", "1", "tar random+er (1)"),
        (one, "ccccccc", "a processor", "3", "static random+er (3)"),
        ("older", "aaaaaaa", "a processor", "1", "tar random+er (1)"),
        ("c0dec0d+ddddddd", "aaaaaaa", "a processor then another", "1", "tar random+er (1)"),
    }
    assert arms(separate_code=True) == {
        f"tar random+er code={one}": 150, f"tar random+er code={two}": 300, "tar random+er code=older": 7,
        "tar random+er code=c0dec0d+ddddddd": 9, f"static random+er code={one}": 10,
    }  # fmt: skip


def test_code_that_differs_between_environments_alone_is_separated_too(make, comparison, arms):
    """One's own environment is part of the code, so this is no mean over different code."""
    for env_id, edit in (("A-v1", "1"), ("B-v1", "2")):
        make(5, env_id, segments=[{"code": 12 * edit}])
    page = comparison()["page"]
    assert "Means over" not in page and "- The runs are not all of the same code: see the last table.\n" in page
    assert arms(separate_code=True) == {f"tar random+er code={7 * edit}": 5 for edit in "12"}


def test_a_published_grid_gives_the_same_tables_in_a_handful_of_files_and_grows(
    make, comparison, tmp_path, capsys, monkeypatch
):
    for seed, value in enumerate([100 / 3, 1e-7, 123456.79, 0.1]):
        make(value, method="static", seed=seed, segments=[{"code": None}] if seed == 1 else [{}, {"from_step": 500}])
    run, published = make(5, steps=[0, 500, 1000]), tmp_path / "published"
    (tmp_path / "numbered").mkdir()
    later = [("eval/episodic_return", 1000, 7.0), ("eval/episodic_length", 1000, 7.0), ("flops/training", 1000, 9e11)]
    resumed = run / "events.out.tfevents.1700050000.somehost.1.0"
    write_events(resumed, 1_700_050_000, later, {1000: 1_700_041_000.0})
    before, after, again = comparison(), comparison(publish=published), comparison(published)
    assert before["returns"].set_index("arm")["final return"]["tar random+er"] == 7  # the later evaluation of a step
    assert sorted(path.name for path in published.iterdir()) == ["comparison", "evaluations.csv", "runs.json"]
    for tables in (after, again):
        assert all(tables[k].equals(before[k]) if k != "page" else tables[k] == before[k] for k in before)
    runs, original = json.loads((published / "runs.json").read_text()), json.loads((run / "config.json").read_text())
    topology = json.loads((run / "topology.json").read_text())
    args = record.identity(original["args"])
    assert runs[run.name] == original | {"args": args, "topology": topology, "began": 1_700_040_000.0}
    lines = (published / "evaluations.csv").read_text().splitlines()
    assert lines[0] == "run,step,return,length,seconds,flops" and f"{run.name},500,2.5,7,500.0,4e+11" in lines
    assert len([line for line in lines if line.split(",")[2] == "16.666666"]) == 10 and len(lines) == 49
    assert lines[1:] == sorted(lines[1:], key=lambda line: (line.split(",")[0], int(line.split(",")[1])))
    for path in (tmp_path / "runs").glob("*/final.pt"):
        path.unlink()
    make(9, seed=2)  # added to the grid, in which the other runs stay as they are, though the arm is not compared
    capsys.readouterr()
    comparison(publish=published, arm=("tar",), against="tar")
    assert capsys.readouterr().out.startswith("Left out, since they are not finished, or")  # which the grid cannot say
    assert json.loads((published / "runs.json").read_text()).items() > runs.items()
    assert {*lines} < {*(published / "evaluations.csv").read_text().splitlines()}
    assert comparison(published)["returns"].set_index("arm").n.to_dict() == {"static random+er": 4, "tar random+er": 2}
    # an arm of the grid alone
    for arm in ((), ("tar", "static")):
        table = comparison(publish=published, against="static", arm=arm)["returns"]
        assert table.against[1] == "static random+er"
    runs, evaluations = (published / "runs.json").read_text(), (published / "evaluations.csv").read_text()
    make(9, seed=3)
    cut = [(pd.DataFrame, "to_csv", lambda table, path, **_: path.write_bytes(b"run,st") / 0)]
    cut += [(Path, "write_text", lambda path, text: path.write_bytes(b"{") / 0)]
    for n, function in enumerate(cut):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # as if interrupted
            patch.setattr(*function)
            comparison(publish=published)
        assert (published / "runs.json").read_text() == runs
        assert ((published / "evaluations.csv").read_text() == evaluations) == (n == 0)
    comparison(published)  # evaluations without a run do not count
    run.rename(numbered := tmp_path / "numbered" / "7")
    (numbered / "final.pt").touch()
    for events in numbered.glob("events*"):
        events.unlink()
    for value in (1.0, 2.0):  # again, with another result, it takes the place of itself
        write_events(events, 1.0, [("eval/episodic_return", step, value) for step in STEPS], dict.fromkeys(STEPS, 2.0))
        table = comparison(numbered.parent, publish=tmp_path / "of 7")["returns"]
        assert list(table.n) == [1] and list(table["final return"]) == [value]
    assert len((tmp_path / "of 7" / "evaluations.csv").read_text().splitlines()) == 1 + len(STEPS)
    write_events(events, 3.0, [("eval/episodic_return", step, 5.0) for step in STEPS], dict.fromkeys(STEPS, 4.0))
    message = refused(capsys, comparison, numbered.parent, publish=tmp_path / "of 7")
    assert "of 7 has another run named 7; rename the folder of one" in message  # it began at another time
    (tmp_path / "of 7" / "evaluations.csv").unlink()
    assert "has runs.json and no evaluations.csv; bring both" in refused(capsys, comparison, tmp_path / "of 7")
    table = "".join(line for line in evaluations.splitlines(keepends=True) if not line.startswith(run.name))
    (published / "evaluations.csv").write_text(table)
    message = refused(capsys, comparison, published)
    assert f"has no evaluations of {run.name}; bring runs.json and evaluations.csv" in message


def test_event_files_of_a_grid_hold_steps_times_and_hyperparameters_and_need_no_simulator(make, comparison, tmp_path):
    for method, width in (("static", "auto"), ("dense", None), ("tar", None)):
        make(100, method=method, active_width=width)
    make(100, method="static", critic_method="rigl")
    comparison(publish=tmp_path / "published")
    methods = set()
    code = "import sys; sys.modules.update(dict.fromkeys(('gymnasium', 'mujoco', 'ray', 'Box2D')));"
    code += "from lab.compare import *; main(Args(Path(sys.argv[1]), events=Path(sys.argv[2])))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "published", tmp_path / "events"], cwd=PROJECT, check=True)
    for run in (tmp_path / "runs").glob("A-v1__*"):
        log, original = (EventAccumulator(str(tmp_path / top / run.name)).Reload() for top in ("events", "runs"))
        for tag in ("eval/episodic_return", "eval/episodic_length", "flops/training"):
            assert log.Scalars(tag) == original.Scalars(tag)
        assert [(final.step, final.value) for final in log.Scalars("eval/final_return")] == [(1000, 100)]
        tags = (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG)
        contents = [log.SummaryMetadata(tag).plugin_data.content for tag in tags]
        columns = metadata.parse_experiment_plugin_data(contents[0]).hparam_infos
        assert {info.name for info in columns if info.differs} == {"base", "env_id", "method", "seed", "sparsity"}
        start = metadata.parse_session_start_info_plugin_data(contents[1]).hparams
        shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()}
        assert shown["script"] == "td3_tar" and shown["code"] == "c0dec0d"
        assert shown["seed"] == 1 and shown["policy_noise"] == 0.2 and "runs_dir" not in shown
        assert shown["base"] == ("" if shown["method"] == "dense" else "random+er")
        assert ("reserve" in shown) == (shown["method"] == "tar")
        assert shown.get("active_width") == ("auto" if shown["method"] == "static" else None)
        methods.add(shown["method"])
    assert methods == {"static", "dense", "tar", "static+rigl"}


def test_a_figure_has_thin_lines_shades_or_small_axes(make, comparison, drawn):
    finals, steps = [100, 300, 200, 150, 250, 200], [step for step in STEPS if step != 500]
    for seed, final in enumerate(finals):
        make(final, seed=seed)
    make(500, method="dense", seed=1)
    make(400, method="dense", seed=2, steps=steps)
    comparison()
    (axes,) = drawn["td3_tar_s0.9_curves.png"].axes
    (band,), lines = axes.collections, axes.get_lines()
    half = 2.570581836 * np.std(finals, ddof=1) / 6**0.5  # t at five degrees of freedom
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((100 - half / 2, 200 + half))
    assert [line.get_ydata()[-1] for line in lines] == [450, 500, 400, 200]  # dense, its seeds, tar
    assert list(lines[0].get_xdata()) == steps and axes.get_ylim() == pytest.approx((50 - 22.5, 500 + 22.5))
    for method in (methods := ("cht", "rigl", "set", "static", "uniform")):
        make(50, method=method)
    comparison()
    small, titles = drawn["td3_tar_s0.9_curves.png"].axes, [f"A-v1\n{method} random+er" for method in (*methods, "tar")]
    assert [axes.get_title() for axes in small] == sorted([*titles, "A-v1\ndense"])
    assert all(len(axes.get_legend_handles_labels()[1]) == 1 and len(axes.get_lines()) >= 7 for axes in small)


def test_the_colours_of_a_page_begin_anew_with_each_algorithm(make, comparison, drawn):
    for method in ("rigl", "set", "static", "tar"):
        config = make(100, method=method, script="sac_tar", alpha=0.2) / "config.json"
        config.write_text(config.read_text().replace("policy_noise", "autotune"))
    for method in ("static", "tar"):
        make(100, method=method)
    comparison()
    (axes,) = drawn["td3_tar_s0.9_curves.png"].axes
    assert {line.get_color() for line in axes.get_lines()} == {*figures.COLOURS[:2]}


def test_sparsities_stay_apart_and_bars_inside_the_axes(make, comparison, drawn):
    for sparsity, seed, i in itertools.product((0.9, 0.95), (1, 2), range(1, 13)):
        make(1000 * i * seed, sparsity=sparsity, seed=seed, reserve=i / 100)
    comparison()
    (axes,) = drawn["td3_tar_sparsity.png"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.9", "0.95"] and len(axes.containers) == 12
    for errors in axes.containers:
        assert [round(x) for x in errors.lines[0].get_xdata()] == [0, 1]
        for segment in errors.lines[2][0].get_segments():
            assert axes.get_ylim()[0] <= segment[:, 1].min() and segment[:, 1].max() <= axes.get_ylim()[1]


@pytest.mark.parametrize("dense", [False, True])
def test_a_base_mask_that_one_environment_lacks_has_no_axes_there(make, comparison, drawn, dense):
    for sparsity in (0.9, 0.95):
        make(100, "A-v1", sparsity=sparsity)
        make(200, "B-v1", sparsity=sparsity, criterion="snip")
    for env_id in ("A-v1", "B-v1") if dense else ():
        make(300, env_id, method="dense")
    comparison()
    for name in ("td3_tar_s0.9_curves.png", "td3_tar_sparsity.png"):
        assert [axes.get_title() for axes in drawn[name].axes] == ["A-v1\nrandom+er", "B-v1\nsnip+er"]


def test_gains_by_revival_are_drawn_against_the_neurons_that_were_cut(make, comparison, drawn):
    for base, seed, cut in (("er", 1, (0, 0)), ("er", 2, (1, 0)), ("global", 1, (4, 1))):
        make(1000, method="static", seed=seed, distribution=base, cut=(4, 6))
        for method, final in (("uniform", 1000 + seed), ("tar", 2000), ("set", 5000)):
            make(final, method=method, seed=seed, distribution=base, cut=cut)
    make(3000, seed=3)  # has no control
    make(7000, n_step=3)  # nor has this one, as the other has another n_step
    make(7000, critic_method="tiny", seed=2)  # nor this one, as the other has sparse critics
    make(1000, "0-v1", "static", hidden_size=12)
    make(1500, "0-v1", hidden_size=12, cut=(1, 0))
    said = "Share of the inputs and outputs of layers that static pruning had left unconnected before revival: "
    shares = "10% on random+er in 0-v1, 0-5% on random+er in A-v1, 50% on random+global in A-v1."
    assert f"\n\n{said}{shares}\n\n- " in comparison()["page"]
    assert said not in comparison(arm=("static", "set"))["page"]
    tar, uniform, other, unused = drawn["td3_tar_gains.png"].axes
    assert tar.get_ylim() == uniform.get_ylim() != other.get_ylim() and not unused.get_visible()
    assert [line.get_xydata().tolist() for line in other.lines[1:]] == [[[10, 500]]]
    points = {line.get_label(): line.get_xydata().tolist() for line in tar.lines[1:]}
    assert points == {"random+er at 0.9": [[0, 1000], [10, 1000]], "random+global at 0.9": [[50, 1000]]}
    assert [y for line in uniform.lines[1:] for y in line.get_ydata()] == [1, 2, 1]
    assert [axes.get_title() for axes in (tar, uniform, other)] == ["A-v1\ntar", "A-v1\nuniform", "0-v1\ntar"]
    drawn.clear()
    make(1000, method="tiny")
    comparison(arm=("random+er", "tiny"))  # on one base mask there is nothing to compare
    assert "td3_tar_gains.png" not in drawn


@pytest.mark.parametrize("args, sentence", [
    ({}, "holds no finished run"),
    ({"publish": Path("runs")}, "--publish needs another folder"),
    ({"events": Path("runs")}, "--events needs another folder"),
    ({"against": "random"}, "--against random is not one arm; there are: static random+er, tar random+er"),
    ({"arm": ("tar", "riggl")}, "there is no finished run of riggl; the arms are: dense, static random+er, tar"),
    ({"env_id": ("A-v1", "C-v1")}, "no finished run of C-v1; the arms are: dense, static random+er, tar random+er;"),
    ({"arm": ("tar",), "env_id": ("B-v1",)}, "no such run; the arms are: dense, static random+er, tar random+er"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_writes_nothing(make, tmp_path, capsys, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    runs = [make(5, method=method, finished=bool(args)) for method in ("static", "tar")]
    runs.append(make(5, "B-v1", "dense", finished=bool(args)))
    assert sentence in refused(capsys, compare.main, compare.Args(tmp_path / "runs", **args))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(run.name for run in runs)
