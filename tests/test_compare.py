"""lab/compare.py: statistics against calculations by hand, what it names, and a published copy that says the same."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

import sparse_utils
from lab import compare, record, run_log

FINISH = compare.finish
STEPS = [0, *range(100, 1001, 100)]


def write_events(path, began, scalars, when):
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for tag, step, value in scalars:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(Event(wall_time=when[step], step=step, summary=summary).SerializeToString())


@pytest.fixture
def make(tmp_path):
    """Writes a run folder. The last evaluation, alone in the last tenth, has the given return, the rest half of it. A
    step takes `pace` seconds and, after the first 100, `flops` operations. Without `segments`, config.json has
    its old form. From step late[0] on, all is late[1] seconds later."""
    counter = itertools.count(1_700_000_000, 10_000)

    def make(
        final, env_id="A-v1", method="tar", seed=1, steps=STEPS, finished=True, torch="2.0", twice=False, pace=1.0,
        flops=1e9, script="td3_tar", segments=({"code": "c0de" * 3},), late=None, **args,
    ):  # fmt: skip
        args = {
            "env_id": env_id, "exp_name": script, "seed": seed, "runs_dir": "/home/someone/runs", "method": method,
            "sparsity": 0.0 if method == "dense" else 0.9, "criterion": "random", "distribution": "er", "reserve": 0.1,
            "policy_noise": 0.2, "total_timesteps": 1000, "eval_frequency": 100,
        } | args  # fmt: skip
        began = next(counter)
        run = tmp_path / "runs" / f"{env_id}__{script}__{method}__s{args['sparsity']}__{seed}__{began}"
        run.mkdir(parents=True)
        config = {"args": args, "versions": {"torch": torch}, "git_commit": "abc", "processor": "a processor"}
        if segments:
            one = {"from_step": 0, "git_commit": "a" * 40, "processor": "a processor", "device": "cpu"}
            one |= {"versions": {"torch": torch}}
            config = {"args": args, "script": script, "segments": [one | segment for segment in segments]}
        (run / "config.json").write_text(json.dumps(config))
        (run / "topology.json").write_text("{}")
        if finished:
            (run / "final.pt").touch()
        values = [("eval/episodic_return", step, final if step > 900 else final / 2) for step in steps]
        values += [(tag, step, 7.0) for step in range(0, 1001, 10) for tag in ("charts/SPS", "losses/qf_loss")]
        values += [("sparsity/actor", step, 0.9) for step in steps]
        values += [("flops/training", step, flops * max(step - 100, 0)) for step in steps if flops]
        values += [("charts/episodic_return", step, final - step) for step in range(90, 1001, 90)]
        when = {step: began + pace * step + (late[1] if late and step >= late[0] else 0) for step in range(1001)}
        write_events(
            run / f"events.out.tfevents.{began}.somehost.1.0", began, values + values[: 1 if twice else 0], when
        )
        return run

    return make


@pytest.fixture
def figures(monkeypatch):
    """The figures that a comparison draws, by file name, in place of their files, which take long."""
    figures = {}

    def finish(figure, path, order):
        figures[path.name] = figure
        compare.plt.close(figure)

    monkeypatch.setattr(compare, "finish", finish)
    return figures


@pytest.fixture
def comparison(tmp_path, figures):
    """The tables of the comparison of this test's runs, by the end of their file names, and the page."""

    def comparison(folder=tmp_path / "runs", sparsity=0.9, algo="td3_tar", **args):
        compare.main(compare.Args(folder, **args))
        out = args.get("out") or (args.get("publish") or folder) / "comparison"
        name = f"{algo}_s{sparsity}"
        tables = {path.stem.removeprefix(f"{name}_"): pd.read_csv(path) for path in out.glob(f"{name}_*.csv")}
        page = (out / f"{name}.md").read_text()
        assert not re.search(r"\b(nan|None)\b", page)
        return tables | {"page": page, "out": out}

    return comparison


RETURNS = {  # of seeds 1, 2, 3 and, for some, 4
    ("A-v1", "dense"): [1000, 1200, 1100, 900],
    ("A-v1", "static"): [400, 500, 900, 350],
    ("A-v1", "tar"): [700, 800, 600, 900],
    ("B-v1", "dense"): [50, 60, 40],
    ("B-v1", "static"): [10, 20, 30],
    ("B-v1", "tar"): [30, 25, 45],
}


@pytest.fixture
def grid(make):
    for (env_id, method), values in RETURNS.items():
        for seed, value in enumerate(values, 1):
            make(value, env_id, method, seed)


def test_means_and_paired_differences_have_student_intervals(grid, comparison):
    tables = comparison()
    quantile = {3: 4.302652730, 4: 3.182446305}  # of Student's t at 0.975, with n - 1 degrees of freedom
    assert len(tables["returns"]) == len(RETURNS)
    for row in tables["returns"].itertuples(index=False):
        values = np.array(RETURNS[row[0], row[1].removesuffix(" random+er")], float)
        half = quantile[len(values)] * np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))
        assert row[2:4] == (len(values), " ".join(map(str, range(1, len(values) + 1))))
        assert row[4:7] == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
        if row.arm.startswith("static"):
            assert row.against == "-" and row.pairs == 0 and np.isnan(row.difference)
            continue
        pairs = list(zip(RETURNS[row[0], row.arm.removesuffix(" random+er")], RETURNS[row[0], "static"]))
        values = np.array([own - static for own, static in pairs])
        half = quantile[len(values)] * values.std(ddof=1) / np.sqrt(len(values))
        assert (row.against, row.pairs) == ("static random+er", len(pairs))
        assert row[9:12] == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert "| A-v1 | tar random+er | 4 | 1 2 3 4 | 750.0 [544.6, 955.4] |" in tables["page"]


def assert_percentiles(values, low, high):
    """The ends are the percentiles 2.5 and 97.5, up to the randomness of a bootstrap of few, hence discrete values."""
    ranges = np.add(np.percentile(values, [[2.1, 2.9], [97.1, 97.9]]), [[-1e-9, 1e-9]])
    assert ranges[0, 0] <= low <= ranges[0, 1] and ranges[1, 0] <= high <= ranges[1, 1], (ranges, low, high)


def test_the_aggregate_is_that_of_agarwal_et_al(grid, comparison):
    tables = comparison()
    table = tables["aggregate"].set_index("arm")
    random = np.random.default_rng(5)

    def resampled(values):
        return random.choice(values, (20_000, len(values)))

    percent = {key: 100 * np.array(v) / np.mean(RETURNS[key[0], "dense"]) for key, v in RETURNS.items()}
    for method, arm in (("dense", "dense"), ("static", "static random+er"), ("tar", "tar random+er")):
        values = sorted([*percent["A-v1", method], *percent["B-v1", method]])
        assert table["IQM, % of dense"][arm] == pytest.approx(np.mean(values[1:-1]))  # 7 runs: 7 // 4 from each side
        drawn = np.concatenate([resampled(percent["A-v1", method]), resampled(percent["B-v1", method])], 1)
        assert_percentiles(
            np.sort(drawn)[:, 1:-1].mean(1), table["IQM, % of dense low"][arm], table["IQM, % of dense high"][arm]
        )

        if method != "static":
            wins, drawn_wins = [], []
            for env_id in ("A-v1", "B-v1"):
                x, y = np.array(RETURNS[env_id, method]), np.array(RETURNS[env_id, "static"])
                wins.append(np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y]))
                a, b = resampled(x)[:, :, None], resampled(y)[:, None, :]
                drawn_wins.append(((a > b) + 0.5 * (a == b)).mean((1, 2)))
            assert table["P(better)"][arm] == pytest.approx(np.mean(wins))
            assert_percentiles(np.mean(drawn_wins, 0), table["P(better) low"][arm], table["P(better) high"][arm])
            returns = tables["returns"].set_index(["environment", "arm"])["P(better)"]
            assert [returns["A-v1", arm], returns["B-v1", arm]] == pytest.approx(wins)
    assert list(table.n) == [7, 7, 7] and list(table.environments) == [2, 2, 2]


def test_the_bootstrap_draws_within_environments():
    """Were the runs of both environments drawn from one urn, the interval would be tens wide."""
    samples = [np.array([10.0, 11.0, 12.0, 13.0]), np.array([90.0, 91.0, 92.0, 93.0])]
    value, low, high = compare.bootstrapped(compare.iqm, samples)
    assert value == 51.5 and 49.5 < low < 51 and 52 < high < 53.5


def test_the_same_runs_give_the_same_bytes(grid, comparison, tmp_path):
    first, second = comparison(), comparison(out=tmp_path / "again")
    for path in first["out"].glob("*.[cm][sd]*"):
        assert path.read_bytes() == (second["out"] / path.name).read_bytes()


def test_what_is_missing_or_unequal_is_named(make, comparison, capsys):
    for seed in (1, 2, 3):
        make(100 * seed, method="static", seed=seed)
        make(60 * seed, method="static", seed=seed, env_id="B-v1")
        make(90, method="dense", seed=seed)
        make(80, method="dense", seed=seed, env_id="B-v1")
        make(70, method="uniform", seed=seed)
    short = [step for step in STEPS if step not in (300, 400)]
    make(300, seed=1, torch="2.1", steps=short)
    make(500, seed=2, segments=[{"code": "c0de" * 3, "processor": "another", "device": "cuda"}])
    make(500, seed=2, env_id="B-v1", twice=True)
    unfinished = make(1e6, seed=3, finished=False)
    empty = make(1e6, seed=3, steps=[])
    rerun = make(1e6, method="static", seed=3)
    make(600, method="static", seed=3)
    rows = comparison()["returns"].set_index(["environment", "arm"])["final return"]
    assert rows["A-v1", "tar random+er"] == 400 and rows["A-v1", "static random+er"] == 300
    capsys.readouterr()
    page, printed = comparison()["page"], capsys.readouterr().out
    for sentence in (
        f"not finished, so left out: {unfinished.name}",
        f"no evaluation in the last tenth of training, so left out: {empty.name}",
        f"run again later, so left out: {rerun.name}",
        "tar random+er on A-v1: no run with seed 3, which other arms have",
        "tar random+er on B-v1: no run with seed 1, 3, which other arms have",
        "uniform random+er: no run on B-v1, which other arms have, and so no aggregate",
        "tar random+er on A-v1, seed 1: no evaluation at step 300, 400",
        "evaluations logged twice, of which the last counts: B-v1__td3_tar__tar",
        "unequal version of torch: 2.0 in 17 of 18 runs; 2.1 in 1 of 18 runs",
        "unequal processor: a processor in 17 of 18 runs; another in 1 of 18 runs",
        "unequal device: cpu in 17 of 18 runs; cuda in 1 of 18 runs",
    ):
        assert f"- {sentence}" in page and sentence in printed
    assert "| uniform random+er | 2 |" not in page and "| A-v1 | uniform random+er | 3 |" in page
    assert "Nothing is missing" not in page


def test_runs_of_which_only_some_were_computed_by_the_kernels_are_named(make, comparison):
    for seed, names in ((1, ["actor", "qf1"]), (2, []), (3, [])):
        make(1, seed=seed, segments=[{"code": "c0de" * 3, "in_kernels": names}])
    assert "- unequal in_kernels: actor, qf1 in 1 of 3 runs; none in 2 of 3 runs" in comparison()["page"]


def test_dense_is_one_arm_whatever_sparsity_its_flags_say(make, comparison):
    for sparsity in (0.9, 0.95):
        make(100, method="static", sparsity=sparsity)
        make(200, method="dense", sparsity=sparsity, checkpoint_frequency=int(1000 * sparsity))
    for sparsity in (0.9, 0.95):
        tables = comparison(sparsity=sparsity)
        assert list(tables["returns"].arm) == ["dense", "static random+er"] and list(tables["returns"].n) == [1, 1]
        assert "run again later, so left out: A-v1__td3_tar__dense__s0.9" in tables["page"]
    make(300, method="dense", actor_method=None, critic_method="static", sparsity=0.95)
    assert "static random+er actor dense" not in comparison(sparsity=0.9)["page"]
    assert "static random+er actor dense" in comparison(sparsity=0.95)["page"]


def test_a_flag_that_only_some_runs_have_makes_arms_of_their_own(make, comparison):
    for seed in (1, 2):
        make(100 * seed, method="static", seed=seed)
        make(300 * seed, method="static", seed=seed, my_coefficient=0.5)
    arms = comparison()["returns"].set_index("arm")["final return"].to_dict()
    assert arms == {"static random+er": 150, "static random+er my_coefficient=0.5": 450}


def test_keeping_the_buffer_makes_an_arm_of_its_own_only_where_a_run_was_resumed(make, comparison):
    make(1, seed=1, save_buffer=True)
    make(3, seed=2, save_buffer=False)
    assert list(comparison()["returns"].arm) == ["tar random+er"]
    make(5, seed=3, save_buffer=False, segments=[{"code": "c0de" * 3}, {"code": "c0de" * 3, "from_step": 500}])
    arms = list(comparison()["returns"].arm)
    assert arms == ["tar random+er save_buffer=False", "tar random+er save_buffer=True"]


def test_a_flag_of_one_network_is_named_where_it_is_not_that_of_both(make, comparison):
    for method in ("static", "tar"):
        make(100, method=method, init="dense", actor_init="dense", critic_init="dense")
        make(200, method=method, init="sparse", actor_init="sparse", critic_init="sparse")
    make(300, method="tar", init="dense", actor_init="sparse", critic_init="dense")
    arms = comparison()["returns"].set_index("arm")["final return"].to_dict()
    assert arms == {
        "static random+er": 100, "static random+er init=sparse": 200,
        "tar random+er": 100, "tar random+er init=sparse": 200,
        "tar random+er critic_init=dense init=sparse": 300,
    }  # fmt: skip


def test_a_complete_comparison_says_so(make, comparison):
    for method, seed in itertools.product(("dense", "static", "tar"), (1, 2)):
        make(seed, method=method, seed=seed)
    assert "Nothing is missing or unequal." in comparison()["page"]


def test_one_seed_has_no_interval(make, comparison):
    for method in ("dense", "static", "tar"):
        make(100, method=method)
        make(50, method=method, env_id="B-v1")
    tables = comparison()
    for table in (tables["returns"], tables["aggregate"], tables["time"], tables["flops"]):
        assert table.filter(regex="low$|high$").isna().all(axis=None)
    assert "| A-v1 | tar random+er | 1 | 1 | 100.0 | static random+er | 1 | 0.0 | 0.50 |" in tables["page"]
    assert "| A-v1 | static random+er | 1 | 1 | 100.0 | - | 0 | - | - |" in tables["page"]


@pytest.mark.parametrize("dense", [None, -5.0])
def test_without_a_positive_dense_there_is_no_percentage_but_a_probability(make, comparison, dense):
    for seed, env_id in itertools.product((1, 2), ("A-v1", "B-v1")):
        make(-100 + seed, env_id, seed=seed)
        make(-200 + seed, env_id, method="static", seed=seed)
        if dense:
            make(dense, env_id, method="dense", seed=seed)
    tables = comparison()
    assert "no return in % of dense" in tables["page"]
    assert "IQM, % of dense" not in tables["aggregate"]
    assert tables["aggregate"].set_index("arm")["P(better)"]["tar random+er"] == 1


def test_dense_runs_alone_bring_no_environment_to_a_sparsity(make, comparison):
    """Else no arm of that sparsity had runs in all environments, and it lost its aggregate."""
    for env_id, method in itertools.product(("A-v1", "B-v1"), ("static", "tar", "dense")):
        make(100, env_id, method)
    make(100, "C-v1", "dense")
    make(100, "C-v1", "static", sparsity=0.95)
    tables = comparison(sparsity=0.9)
    assert list(tables["aggregate"].environments) == [2, 2, 2] and "C-v1" not in tables["page"]
    assert "C-v1" in comparison(sparsity=0.95)["page"]
    make(100, "D-v1", "dense")  # nowhere else to be seen
    assert "| D-v1 | dense |" in comparison(sparsity=0.9)["page"]


def test_arms_are_method_and_base_and_networks_that_differ(make, comparison):
    make(1, method="dense", criterion="snip")
    make(2, method="tiny", distribution="global")
    make(3, actor_method="tar", critic_method=None, actor_sparsity=0.9, critic_sparsity=None)
    make(4, criterion="snip", distribution="global", critic_method="dense", critic_sparsity=0.0)
    make(5, actor_method="tar", critic_method="tar", critic_sparsity=0.5)
    make(6, method="rigl", rewire_every=100)
    make(7, method="rigl", rewire_every=1000)
    make(8, method="tar", sparsity=0.95)
    tables = comparison()
    arms = tables["returns"].set_index("arm")["final return"].to_dict()
    assert arms == {
        "dense": 1, "tiny": 2, "tar random+er": 3, "tar snip+global critic dense": 4, "tar random+er critic 0.5": 5,
        "rigl random+er rewire_every=100": 6, "rigl random+er": 7,
    }  # fmt: skip
    assert list(tables["returns"].arm[:2]) == ["dense", "tiny"]
    assert "unequal argument rewire_every" in tables["page"]
    assert list(comparison(sparsity=0.95)["returns"].arm) == ["dense", "tar random+er"]


def test_an_unknown_method_is_an_arm_like_all_others(make, comparison, figures, capsys):
    for seed in (1, 2, 3):
        make(100 + seed, method="static", seed=seed)
        make(150 + 2 * seed, method="half_tar", seed=seed)
    tables = comparison()
    (row,) = tables["returns"][tables["returns"].arm == "half_tar random+er"].to_dict("records")
    assert row["against"] == "static random+er" and row["difference"] == 52 and row["P(better)"] == 1
    for name in ("curves", "time", "flops"):
        labels = figures[f"td3_tar_s0.9_{name}.png"].axes[0].get_legend_handles_labels()[1]
        assert labels == ["half_tar", "static"]
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.startswith("A-v1")]
    row = "A-v1 half_tar random+er 3 154.0 [149.0, 159.0] static random+er 3 52.0 [49.5, 54.5] 1.00 [1.00, 1.00]"
    assert printed[0] == row


def test_every_arm_is_held_against_the_one_that_is_asked_for(make, comparison):
    for seed, (method, value) in itertools.product((1, 2), {"static": 1, "tar": 3, "rigl": 6, "dense": 10}.items()):
        make(value + seed, method=method, seed=seed)
        make(value * 2 + seed, method=method, seed=seed, criterion="snip")
    table = comparison(against="rigl snip")["returns"].set_index("arm")
    assert set(table.against) == {"rigl snip+er", "-"} and table.against["rigl snip+er"] == "-"
    assert table.difference["tar random+er"] == 3 - 12 and table.difference["static random+er"] == 1 - 12
    by_default = comparison()
    table = by_default["returns"].set_index("arm")
    assert table.against["tar snip+er"] == "static snip+er" and table.difference["tar snip+er"] == 4
    assert table.against["dense"] == "-"
    assert "no arm of method static on the base of dense: held against none" in by_default["page"]


def test_a_control_of_the_reader_is_held_against_like_static(make, comparison, monkeypatch):
    monkeypatch.setattr("sparse_utils.CONTROLS", {"mine": "prune as I do"})
    monkeypatch.setattr("sparse_utils.METHODS", sparse_utils.METHODS | {"mine": "prune as I do"})
    for method, final in (("mine", 1), ("static", 2), ("tar", 3)):
        make(final, method=method)
    against = comparison()["returns"].set_index("arm").against
    assert against["tar random+er"] == against["static random+er"] == "mine random+er"


def test_the_static_arm_that_an_arm_is_held_against_shares_its_other_flags(make, comparison):
    for init in ("plain", "scaled"):
        make(5, method="static", init=init)
        make(7, method="tar", init=init, reserve=0.3)
        make(8, method="tar", init=init, critic_method="dense")
        make(6, method="static", init=init, critic_method="dense")
    against = comparison()["returns"].set_index("arm").against
    for init in ("plain", "scaled"):
        assert against[f"tar random+er init={init}"] == f"static random+er init={init}"
        assert against[f"tar random+er critic dense init={init}"] == f"static random+er critic dense init={init}"


def against_of(comparison):
    """Arm: the one that it is held against, both without their base."""
    table = comparison()["returns"].replace(" random.er", "", regex=True)
    return dict(zip(table.arm, table.against))


def test_no_arm_that_rewires_or_revives_in_one_network_is_a_control(make, comparison):
    make(1, method="static")
    make(2, method="static", critic_method="rigl")
    make(3, method="tar")
    make(4, method="static", critic_method="tar")
    against = against_of(comparison)
    assert against.pop("static") == "-"
    assert against == dict.fromkeys(("static critic rigl", "tar", "static critic tar"), "static")


def test_the_control_differs_in_the_fewest_choices_and_then_is_the_plainest(make, comparison):
    """A flag for both networks, which its two copies follow, is one choice; methods and their own flags are none."""
    dense = {"init": "dense", "actor_init": "dense", "critic_init": "dense", "n_step": 3, "recent_fraction": 0.25}
    sparse = {"init": "sparse", "actor_init": "sparse", "critic_init": "sparse", "n_step": 1, "recent_fraction": 0.0}
    for name, flags in {"far": sparse, "near": dense}.items():
        make(1, method="static", note=name, **flags)
    make(2, method="tar", **sparse | {"n_step": 3, "recent_fraction": 0.25})
    make(3, method="rigl", rewire_every=10, rewire_fraction=0.1, **sparse)
    make(4, method="dense")
    against = {arm.split()[0]: other for arm, other in against_of(comparison).items() if "static" not in arm}
    assert "note=near" in against["tar"] and "note=far" in against["rigl"] and "note=far" in against["dense"]


def test_of_controls_that_are_as_close_the_one_with_most_runs_in_common_is_chosen(make, comparison):
    for note in ("a", "b"):
        make(1, method="static", note=note)
    make(1, method="static", note="b", env_id="B-v1")
    for env_id in ("A-v1", "B-v1"):
        make(2, method="tar", note="c", env_id=env_id)
    assert against_of(comparison)["tar"] == "static note=b"


def test_what_is_not_pruned_is_held_against_a_control_that_is_pruned_in_both_networks(make, comparison):
    for value, flags in ((1, {}), (2, {"critic_method": "dense"}), (3, {"actor_method": "tiny"})):
        make(value, method="static", **{"actor_method": None, "critic_method": None} | flags)
    for method in ("dense", "tiny"):
        make(5, method=method)
    assert against_of(comparison) == {
        "dense": "static", "tiny": "static", "static": "-", "static critic dense": "static",
        "static actor tiny": "static",
    }  # fmt: skip


def test_a_control_is_held_against_a_plainer_one_alone(make, comparison):
    for init in ("dense", "sparse"):
        make(1, method="static", init=init)
    make(2, method="tar", init="sparse")
    against = against_of(comparison)
    assert against == {"static": "-", "static init=sparse": "static", "tar": "static init=sparse"}


def test_an_arm_whose_flags_change_with_the_sparsity_is_named(make, comparison):
    """By algorithm, and not for what differs between environments."""
    for sparsity, reserve in ((0.9, 0.1), (0.95, 0.3)):
        make(1, method="static", sparsity=sparsity)
        make(1, method="static", sparsity=sparsity, env_id="B-v1", total_timesteps=990)
        run = make(2, method="tar", sparsity=sparsity, reserve=reserve, script="a_tar", alpha=0.2)
        (run / "config.json").write_text((run / "config.json").read_text().replace("policy_noise", "another"))
        make(2, method="tar", sparsity=sparsity)
    for sparsity in (0.9, 0.95):
        sentence = "- tar random+er has not one reserve at all sparsities\n"
        assert sentence in comparison(sparsity=sparsity, algo="a_tar")["page"]
        assert "has not one" not in comparison(sparsity=sparsity)["page"]


def test_the_page_of_an_arm_is_that_of_its_higher_sparsity(make, comparison):
    make(1, method="static", actor_sparsity=0.9, critic_sparsity=0.9)
    make(2, method="tar", actor_sparsity=0.5, critic_sparsity=0.9)
    make(3, method="tiny", actor_method="dense", critic_method="tiny", actor_sparsity=0.0, critic_sparsity=0.9)
    assert list(against_of(comparison)) == ["dense critic tiny", "static", "tar actor 0.5"]


def test_runs_that_do_the_same_are_one_arm_however_their_flags_are_spelled(make, comparison):
    own = {"actor_sparsity": 0.9, "critic_sparsity": 0.9, "actor_method": "static", "critic_method": "static"}
    make(1, method="static", hidden_size=64, active_width=None)
    make(2, method="tar", sparsity=0.5, seed=2, hidden_size=64, active_width=64, **own)
    (row,) = comparison()["returns"].to_dict("records")
    assert row["arm"] == "static random+er" and row["n"] == 2


def test_flags_make_the_same_arms_in_every_environment(make, comparison):
    for reserve in (0.05, 0.3):
        make(5, reserve=reserve)
    make(6, env_id="B-v1", reserve=0.3)
    make(7, env_id="B-v1", method="static", reserve=0.9)
    assert list(comparison()["returns"].arm) == [
        "tar random+er reserve=0.05", "tar random+er reserve=0.3", "static random+er", "tar random+er reserve=0.3",
    ]  # fmt: skip


def grey(colour: str) -> float:
    """Lightness L* of a colour, 0 to 100."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in compare.plt.matplotlib.colors.to_rgb(colour)
    ]
    return 116 * np.dot([0.2126, 0.7152, 0.0722], linear) ** (1 / 3) - 16


@pytest.mark.parametrize("names", ["tar random+er reserve={:02}", "tar{:02} random+er"])
def test_arms_have_lines_of_their_own_also_in_grey(names):
    arms = [names.format(i) for i in range(35)]
    looks = list(compare.styles_of(pd.DataFrame({"arm": arms, "base": "random+er"})).values())
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 35
    for one, other in itertools.combinations(looks[:10], 2):
        apart = abs(grey(one["color"]) - grey(other["color"]))
        assert one["linestyle"] != other["linestyle"] or apart > 14, (one, other)


def test_the_lines_of_an_arm_are_the_same_in_all_figures(make, comparison, figures):
    methods = ("dense", "tiny", "static", "uniform", "tar", "set", "rigl")
    for method, sparsity in itertools.product(methods, (0.9, 0.95)):
        make(5, method=method, sparsity=sparsity)
        make(5, method=method, sparsity=sparsity, criterion="snip")
    make(5, method="tar", reserve=0.3)
    comparison()
    seen = {}
    assert "td3_tar_sparsity.png" in figures and len(figures) == 7
    for figure in figures.values():
        for axes in figure.axes:
            for handle, name in zip(*axes.get_legend_handles_labels()):
                line = handle.lines[0] if hasattr(handle, "lines") else handle
                seen.setdefault(name, set()).add((line.get_color(), str(line._dash_pattern)))
    assert set(seen) == {*methods, "tar reserve=0.1", "tar reserve=0.3"} - {"tar"}
    colours = {name: {colour for colour, _ in looks} for name, looks in seen.items()}
    assert all(len(colour) == 1 for colour in colours.values())
    styles = compare.styles_of(compare.read_runs(comparison()["out"].parent, []))
    for one, other in itertools.combinations(styles, 2):
        (method, _, flags), (other_method, _, other_flags) = one.partition(" "), other.partition(" ")
        assert (styles[one]["color"] == styles[other]["color"]) == (method == other_method), (one, other)
        assert (styles[one]["linestyle"] == styles[other]["linestyle"]) == (flags == other_flags), (one, other)


def test_two_edits_of_the_code_are_never_averaged_silently(make, comparison, tmp_path, capsys):
    """Both edits are uncommitted, so git names them alike."""
    texts = {
        "first": "def rule():\n    return 1\n",
        "again": "def rule():  # one\n    return 1\n",
        "second": "def rule():\n    return 2\n",
    }
    code = {}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "td3_tar.py").write_text(text)
        code[name] = record.code_hash(tmp_path / name / "td3_tar.py")
    dirty = "b" * 40 + "-dirty"
    for seed, name in enumerate(("first", "again", "second"), 1):
        make(100 * seed, seed=seed, segments=[{"code": code[name], "git_commit": dirty}])
        make(10, method="static", seed=seed, segments=[{"code": code["first"], "git_commit": "c" * 40}])
    tables, printed = comparison(), capsys.readouterr().out
    one, two = code["first"][:7], code["second"][:7]
    parts = sorted(
        [f"{one} (commit bbbbbbb-dirty) made A-v1 seed 1, 2", f"{two} (commit bbbbbbb-dirty) made A-v1 seed 3"]
    )
    sentence = f"tar random+er averages runs of different code (see --separate-code): {'; '.join(parts)}"
    assert f"- {sentence}\n" in tables["page"] and sentence in printed
    assert "static random+er averages" not in tables["page"]
    assert f"{one} made static random+er, tar random+er" in tables["page"]
    rows = comparison(separate_code=True)["returns"].set_index("arm")["final return"].to_dict()
    assert rows == {f"tar random+er code={one}": 150, f"tar random+er code={two}": 300, "static random+er": 10}


def test_runs_older_than_the_code_hash_and_resumed_under_other_code_are_named(make, comparison):
    make(1, seed=1, segments=())
    make(3, seed=2, segments=[{"code": "a" * 12}, {"code": "b" * 12, "from_step": 500, "processor": "another"}])
    page = comparison()["page"]
    assert "runs older than the code hash, of which the commit alone is known: 1 of abc" in page
    assert "aaaaaaa+bbbbbbb (commit aaaaaaa) made A-v1 seed 2; older (commit abc) made A-v1 seed 1" in page
    assert "unequal processor: a processor in 1 of 2 runs; a processor then another in 1 of 2 runs" in page
    arms = comparison(separate_code=True)["returns"].arm
    assert list(arms) == ["tar random+er code=aaaaaaa+bbbbbbb", "tar random+er code=older"]


def test_an_edited_copy_of_a_script_is_another_arm_of_its_algorithm(make, comparison):
    for seed in (1, 2):
        make(5, seed=seed)
        make(3, method="static", seed=seed)
        make(8, seed=seed, script="my_td3", my_flag=1)
    table = comparison(algo="my_td3+td3_tar")["returns"].set_index("arm")
    assert table["final return"].to_dict() == {
        "static random+er td3_tar": 3, "tar random+er my_td3": 8, "tar random+er td3_tar": 5,
    }  # fmt: skip
    assert set(table.against) == {"-", "static random+er td3_tar"}


def test_scripts_with_other_flags_are_other_algorithms(make, comparison):
    make(5)
    sac = make(7, script="sac_tar", alpha=0.2)
    config = json.loads((sac / "config.json").read_text())
    del config["args"]["policy_noise"]
    (sac / "config.json").write_text(json.dumps(config))
    assert list(comparison()["returns"].arm) == ["tar random+er"]
    assert list(comparison(algo="sac_tar")["returns"]["final return"]) == [7]


def test_environments_and_arms_can_be_chosen(grid, comparison):
    tables = comparison(env_id=("B-v1",), arm=("tar", "dense"))
    assert list(tables["returns"].arm) == ["dense", "tar random+er"] and set(tables["returns"].environment) == {"B-v1"}
    assert "no arm of method static" in tables["page"]
    against = comparison(arm=("tar",), against="dense")["returns"]
    assert sorted(set(against.arm)) == ["dense", "tar random+er"] and set(against.against) == {"dense", "-"}


def test_a_whole_name_is_one_arm_also_where_others_contain_it(make, comparison):
    for value, flags in ((1, {}), (2, {"n_step": 3}), (3, {"method": "static"})):
        make(value, **flags)
    assert list(comparison(arm=("tar random+er", "static"))["returns"].arm) == ["static random+er", "tar random+er"]
    assert set(comparison(arm=("tar", "static"))["returns"].arm) == {
        "static random+er", "tar random+er", "tar random+er n_step=3"
    }  # fmt: skip
    table = comparison(against="tar random+er")["returns"].set_index("arm")
    assert table.against["static random+er"] == table.against["tar random+er n_step=3"] == "tar random+er"


def test_each_arm_is_held_against_each_other_where_both_have_runs(grid, make, comparison, tmp_path):
    """A square of numbers in the page; uniform has runs in one of the two environments."""
    for seed in (1, 2, 3):
        make(450 + seed, "A-v1", "uniform", seed)
    tables = comparison()
    wins, returns = tables["wins"].set_index(["arm", "against"]), RETURNS | {("A-v1", "uniform"): [451, 452, 453]}
    arms = {"dense": "dense"} | {f"{method} random+er": method for method in ("static", "tar", "uniform")}
    assert len(wins) == 12
    for (arm, other), row in wins.iterrows():
        pairs = [(returns.get((env_id, arms[arm])), returns.get((env_id, arms[other]))) for env_id in ("A-v1", "B-v1")]
        beats = [np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y]) for x, y in pairs if x and y]
        assert (row.environments, row["P(better)"]) == (len(beats), pytest.approx(np.mean(beats)))
        assert row["P(better) low"] <= row["P(better)"] <= row["P(better) high"]
    assert "| arm | 1 | 2 | 3 | 4 |" in tables["page"]
    assert "| 4. uniform random+er | 0.00 | 0.50 | 0.00 | - |" in tables["page"]
    assert "wins" not in comparison(arm=("static", "tar"), out=tmp_path / "of two")


def test_nothing_empty_is_written(make, comparison, figures):
    """No aggregate of one environment, no sparsity figure of one sparsity, nothing by cost for one arm."""
    make(5, method="dense", flops=0)
    tables = comparison(sparsity=0.0)
    assert set(tables) == {"returns", "page", "out"} and set(figures) == {"td3_tar_s0.0_curves.png"}
    assert [line for line in tables["page"].splitlines() if line[:2] == "##"] == ["## Final return"]
    assert list(tables["returns"])[-1] == "final return high"
    make(6, flops=0)
    tables = comparison()
    assert set(tables) == {"returns", "time", "page", "out"}
    assert set(figures) == {"td3_tar_s0.0_curves.png", "td3_tar_s0.9_curves.png", "td3_tar_s0.9_time.png"}
    assert "2 of 2 runs did not log 1e12 FLOPs" in tables["page"]


def test_return_at_equal_time_and_flops(make, comparison, figures):
    """static takes 300 s and 3e11 FLOPs, tar 900 s and 9e11: the straight line between its evaluations at 300 and 400
    steps, and at 400 and 500. Every return is twice that before the end."""
    for seed in (1, 2, 3):
        make(40 * seed, method="static", seed=seed, pace=0.3, flops=1e9 / 3)
        run = make(100, seed=seed, pace=0.9, flops=1e9)
    values = [("eval/episodic_return", step, step) for step in STEPS] + [("flops/training", s, 1e9 * s) for s in STEPS]
    (events,) = run.glob("events*")
    write_events(events, 0, values, {step: 0.9 * step for step in range(1001)})
    tables = comparison()
    time, flops = (tables[kind].set_index("arm") for kind in ("time", "flops"))
    assert time["compared after, minutes"].unique() == pytest.approx([5])
    assert time["a whole run, minutes"].to_dict() == pytest.approx({"static random+er": 5, "tar random+er": 15})
    assert time["return then"]["static random+er"] == pytest.approx(80)
    assert time["return then"]["tar random+er"] == pytest.approx((50 + 50 + 1000 / 3) / 3)
    assert time["return then low"]["static random+er"] == pytest.approx(80 - 4.302652730 * 40 / 3**0.5)
    assert flops["compared after, 1e12 FLOPs"].unique() == pytest.approx([0.3])
    assert flops["return then"]["tar random+er"] == pytest.approx((50 + 50 + 300) / 3)
    lines = {line.get_label(): line for line in figures["td3_tar_s0.9_time.png"].axes[0].get_lines()}
    assert lines["tar"].get_xdata()[-1] == pytest.approx(15) and lines["static"].get_xdata()[-1] == pytest.approx(5)


def test_minutes_are_compared_on_one_processor_in_each_environment(make, comparison):
    """That of most runs there; their FLOPs are compared all the same."""
    other = [{"code": "c0de" * 3, "processor": "a faster one"}]
    for seed in (1, 2, 3):
        make(5, method="static", seed=seed)
        make(6, seed=seed, pace=0.1 if seed == 1 else 1.0, segments=other if seed == 1 else [{"code": "c0de" * 3}])
        make(7, "B-v1", seed=seed, pace=0.1, segments=other)
    tables = comparison()
    time, flops = (tables[kind].set_index(["environment", "arm"]) for kind in ("time", "flops"))
    assert time.n.to_dict() == {
        ("A-v1", "static random+er"): 3,
        ("A-v1", "tar random+er"): 2,
        ("B-v1", "tar random+er"): 3,
    }
    assert time["compared after, minutes"].to_list() == pytest.approx([1000 / 60, 1000 / 60, 100 / 60])
    assert flops.n.to_list() == [3, 3, 3]
    sentence = "- made on A-v1 by another processor than most, so left out by minutes: 1 of tar random+er\n"
    assert sentence in tables["page"] and "made on B-v1" not in tables["page"]


@pytest.mark.parametrize("resumed", [False, True])
def test_pauses_do_not_count_as_time(make, comparison, resumed):
    """Between steps 500 and 600 an hour passes, or, where the run says that it was resumed at 600, a minute more."""
    segments = [{"code": "c0de" * 3}, *([{"code": "c0de" * 3, "from_step": 600}] if resumed else [])]
    make(5, segments=segments, late=(600, 60 if resumed else 3600))
    make(5, method="static")
    minutes = comparison()["time"].set_index("arm")["a whole run, minutes"]
    assert minutes.to_dict() == pytest.approx({"tar random+er": 1000 / 60, "static random+er": 1000 / 60})


def test_a_slow_phase_is_no_pause():
    """Three intervals in turn, or all after a change of the machine's load, are time; one or two are not."""
    for intervals, expected in (
        ([1, 1, 1, 9, 9, 9, 1], 31), ([1, 1, 9, 9, 9], 29), ([1, 1, 90, 1, 1], 5), ([90, 1, 1, 1], 4), ([1, 1, 90], 3),
        ([7], 7), ([1, 14], 15), ([2, 14, 15], 31), ([1, 1, 30, 90, 1, 1], 6),
    ):  # fmt: skip
        seconds = pd.Series(np.cumsum([0.0, *intervals]), range(0, 100 * len(intervals) + 1, 100))
        assert run_log.without_pauses(seconds, []).iloc[-1] == expected


def test_the_lines_of_notes_md_are_on_top_of_every_page(make, comparison, tmp_path, capsys):
    make(5, method="static")
    (tmp_path / "runs/NOTES.md").write_text("- These are old.\n\nThose are not.\n")
    page = comparison()["page"]
    assert page.startswith("# td3_tar at sparsity 0.9\n\n- These are old.\n- Those are not.\n")
    assert "- These are old.\n- Those are not.\n" in capsys.readouterr().out


@pytest.mark.parametrize("value", [0.0, -1.9943252801895142, 5000.0])
def test_the_axis_of_a_constant_curve_is_in_units_of_the_curve(value):
    figure, axes = compare.plt.subplots()
    seen = np.array([value, value, value + 1e-9 * abs(value)])
    axes.plot(seen)
    compare.show(axes, seen)
    low, high = axes.get_ylim()
    assert low < seen.min() <= seen.max() < high and high - low >= 0.019 * abs(value)
    figure.canvas.draw()
    assert axes.yaxis.get_major_formatter().get_offset() == ""
    compare.plt.close(figure)


def test_curves_use_only_steps_that_all_seeds_have(make, comparison, figures):
    make(100, seed=1)
    make(300, seed=2, steps=[step for step in STEPS if step != 500])
    make(200, seed=3)
    make(500, method="dense")
    make(400, method="dense", seed=2)
    make(1e6, method="dense", env_id="B-v1")
    comparison()
    axes = figures["td3_tar_s0.9_curves.png"].axes[0]
    assert axes.get_ylim() == pytest.approx((50 - 22.5, 500 + 22.5))
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert {label for label in lines if label[0] != "_"} == {"tar", "dense"}
    assert [line.get_ydata()[-1] for label, line in lines.items() if label[0] == "_"] == [500, 400, 100, 300, 200]
    assert list(lines["tar"].get_xdata()) == [step for step in STEPS if step != 500]
    assert list(lines["tar"].get_ydata()) == [100] * 9 + [200] and not axes.collections


def test_six_seeds_have_the_shade_of_their_interval(make, comparison, figures):
    finals = [100, 300, 200, 150, 250, 200]
    for seed, final in enumerate(finals):
        make(final, seed=seed)
        make(final, seed=seed, sparsity=0.95)
    comparison()
    axes = figures["td3_tar_s0.9_curves.png"].axes[0]
    (band,), (line,) = axes.collections, axes.get_lines()
    half = 2.570581836 * np.std(finals, ddof=1) / 6**0.5  # t at five degrees of freedom
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((100 - half / 2, 200 + half))
    assert line.get_ydata()[-1] == 200
    sparsities = figures["td3_tar_sparsity.png"].axes[0]
    assert [label.get_text() for label in sparsities.get_xticklabels()] == ["0.9", "0.95"]
    (errors,) = sparsities.containers
    assert errors.lines[0].get_ydata() == pytest.approx([200, 200])
    assert np.ptp(errors.lines[2][0].get_segments()[0][:, 1]) == pytest.approx(2 * half)


def test_two_columns_of_panels_at_the_width_of_a_page(make, comparison, figures):
    for base in ("er", "uniform", "global"):
        make(5, distribution=base)
    comparison()
    figure = figures["td3_tar_s0.9_curves.png"]
    figure.draw_without_rendering()
    assert figure.get_figwidth() == 9 and len(figure.axes) == 3
    assert [axes.get_title() for axes in figure.axes] == [f"A-v1 random+{base}" for base in ("er", "global", "uniform")]
    assert len({round(axes.get_position().x0, 2) for axes in figure.axes}) == 2


def test_the_published_copy_gives_the_same_tables_and_little_else(run, make, comparison, tmp_path, monkeypatch):
    """With a real tar run among the synthetic ones."""
    monkeypatch.setattr(compare, "finish", FINISH)
    for method, seed in itertools.product(("dense", "static"), (1, 2)):
        make(
            100 / 3 * seed,
            method=method,
            seed=seed,
            segments=[{"code": "a" * 12}, {"code": "b" * 12, "from_step": 500}],
        )
    make(7, method="static", seed=3, segments=())
    real = run(criterion="snip", distribution="global", sparsity=0.9)
    unfinished = make(5, finished=False)
    algo = real.name.split("__")[1]
    published = tmp_path / "published"
    (tmp_path / "runs/NOTES.md").write_text("A note.\n")
    before = comparison()["out"]
    published.mkdir()
    (published / "NOTES.md").write_text("A note.\n")
    after = comparison(publish=published)["out"]
    masks = {path.name: path.read_bytes() for path in after.glob("masks_*")}
    again = comparison(published)["out"]

    files = sorted(path.name for path in before.iterdir())
    assert files == sorted(path.name for path in after.iterdir())
    assert {f"{algo}_s0.9_curves.png", "masks_qf1.png", "evaluations.csv"} <= set(files)
    assert {path.name: path.read_bytes() for path in again.glob("masks_*")} == masks  # kept, not drawn anew
    for name in files:
        if name.endswith(".csv"):
            assert (before / name).read_bytes() == (after / name).read_bytes()
        if name.endswith(".md"):
            sentences = [line for line in (before / name).read_text().splitlines() if unfinished.name not in line]
            assert (after / name).read_text().splitlines() == sentences
        if name.endswith(".png"):
            assert (before / name).stat().st_size > 5_000
    evaluations = pd.read_csv(after / "evaluations.csv")
    assert list(evaluations[evaluations.env_id == "Pendulum-v1"].step) == [0, 100, 160]

    assert not (published / unfinished.name).exists()
    for folder in published.glob("*__*"):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "scalars.csv", "topology.json"]
        config = record.read_config(folder)
        source = record.read_config(tmp_path / "runs" / folder.name)
        assert config["args"]["runs_dir"] == "runs" and config["published"]
        assert [config[key] for key in ("segments", "script")] == [source[key] for key in ("segments", "script")]
        tags = run_log.read_scalars(folder)[0].tag
        assert tags.str.startswith(("eval/", "charts/episodic_return", "charts/SPS", "sparsity/", "flops/")).all()
    first = next((tmp_path / "runs").glob("A-v1__*"))
    (original, began), (copy, copy_began) = run_log.read_scalars(first), run_log.read_scalars(published / first.name)
    assert began == copy_began
    for tag in ("eval/episodic_return", "charts/episodic_return", "flops/training"):
        assert copy[copy.tag == tag].values.tolist() == original[original.tag == tag].values.tolist()
    assert list(copy.step[copy.tag == "charts/SPS"]) == [*range(90, 1000, 100), 1000]
    assert list(copy.step[copy.tag == "sparsity/actor"]) == [0, 1000]


def test_a_published_run_has_the_flags_that_it_recorded_and_no_younger_ones(make, tmp_path):
    run, copy = make(1, rewire_every=1000), tmp_path / "copy"
    run_log.publish(run, copy)
    recorded, published = (json.loads((path / "config.json").read_text())["args"] for path in (run, copy))
    assert published == recorded | {"runs_dir": "runs"} and "init" not in published


def test_floats_are_published_short_and_read_back_exactly(make, tmp_path):
    values = [float(np.float32(value)) for value in (1 / 3, -1e-30, 3.4e38, 123456.789, 0.1, 7, 0)]
    run = make(5)
    (events,) = run.glob("events*")
    scalars = [("eval/episodic_return", 100 * i, value) for i, value in enumerate(values)]
    write_events(events, 1.7e9 + 1 / 3, scalars, {step: 1.7e9 + 0.1 * step + 0.4567 for step in range(1000)})
    run_log.publish(run, tmp_path / "copy")
    points, began = run_log.read_scalars(tmp_path / "copy")
    assert list(points.value) == values
    assert [began + s for s in points.seconds] == pytest.approx([1.7e9 + 10 * i + 0.4567 for i in range(7)], abs=2e-3)
    text = (tmp_path / "copy/scalars.csv").read_text()
    assert text.startswith("tag,step,seconds,value\neval/episodic_return,0,0.124,0.33333334\n") and text.endswith(
        ",0\n"
    )


def test_event_files_of_published_runs_hold_steps_times_and_hyperparameters(make, comparison, tmp_path):
    for method, seed in itertools.product(("static", "dense"), (1, 2)):
        make(100 * seed, method=method, seed=seed)
    comparison(publish=tmp_path / "published")
    compare.main(compare.Args(tmp_path / "published", events=tmp_path / "events"))
    runs = sorted((tmp_path / "runs").glob("A-v1__*"))
    assert [path.name for path in runs] == sorted(path.name for path in (tmp_path / "events").iterdir())
    for run in runs:
        log, original = run_log.read_events(tmp_path / "events" / run.name), run_log.read_events(run)
        assert log.Scalars("eval/episodic_return") == original.Scalars("eval/episodic_return")
        args = json.loads((run / "config.json").read_text())["args"]
        (final,) = log.Scalars("eval/final_return")
        assert (final.value, final.step) == (100 * args["seed"], 1000)
        contents = {
            tag: metadata.parse_experiment_plugin_data
            if "experiment" in tag
            else metadata.parse_session_start_info_plugin_data
            for tag in (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG)
        }
        experiment, start = (parse(log.SummaryMetadata(tag).plugin_data.content) for tag, parse in contents.items())
        infos = sorted(experiment.hparam_infos, key=lambda info: (not info.differs, info.name))  # as TensorBoard does
        assert [info.name for info in infos[:5]] == ["base", "env_id", "method", "seed", "sparsity"]
        assert [metric.name.tag for metric in experiment.metric_infos] == ["eval/final_return"]
        shown = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        assert shown["method"] == args["method"] and shown["seed"] == args["seed"] and shown["policy_noise"] == 0.2
        assert shown["base"] == ("" if args["method"] == "dense" else "random+er") and "runs_dir" not in shown


def test_masks_are_read_exactly_from_the_images_of_a_run(run):
    run_dir = run(criterion="magnitude", distribution="global", sparsity=0.8)
    assert run_log.has_masks(run_dir)
    masks = run_log.masks_of(run_dir)
    final = torch.load(run_dir / "final.pt", weights_only=True)["masks"]
    topology = json.loads((run_dir / "topology.json").read_text())
    revived = 0
    for network, layers in final.items():
        for layer, mask in layers.items():
            before, after = (np.isin(kinds, (1, 2)) for kinds in masks[network][layer])
            assert np.array_equal(after, mask.numpy()) and not (before & ~after).any()
            assert np.array_equal(masks[network][layer][1] == 2, after & ~before)
            assert before.sum() == topology[network]["layers"][layer]["static"]
            assert [(~m.any(0)).sum() for m in (before, after)] == topology[network]["layers"][layer]["blind_inputs"]
            revived += after.sum() - before.sum()
    assert revived > 0


def test_a_fourth_colour_is_what_is_outside_the_active_neurons(tmp_path):
    kinds = np.array([[0, 1, 3], [2, 0, 3], [3, 3, 3]])
    colours = np.array([[24, 26, 32], [176, 182, 192], [255, 140, 0], [16, 32, 96]], np.uint8)
    halves = [np.kron(half, np.ones((85, 85), int)) for half in (np.where(kinds == 2, 0, kinds), kinds)]
    pixels = np.concatenate([colours[halves[0]], np.full((255, 8, 3), 255, np.uint8), colours[halves[1]]], 1)
    with SummaryWriter(tmp_path) as writer:
        writer.add_image("topology/qf1.fc1", pixels, dataformats="HWC")
    layer = {"shape": [3, 3], "static": 1, "active": 2, "revived": 1}
    (tmp_path / "topology.json").write_text(json.dumps({"qf1": {"layers": {"fc1": layer}}}))
    before, after = run_log.masks_of(tmp_path)["qf1"]["fc1"]
    assert after.tolist() == kinds.tolist() and before.tolist() == [[0, 1, 3], [0, 0, 3], [3, 3, 3]]
    layer["active"] = 3
    (tmp_path / "topology.json").write_text(json.dumps({"qf1": {"layers": {"fc1": layer}}}))
    with pytest.raises(ValueError, match="does not show what"):
        run_log.masks_of(tmp_path)


def test_degrees_are_counted_per_neuron(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(run_log.plt, "close", figures.append)
    before, after = np.array([[1, 0, 0], [1, 0, 1]]), np.array([[1, 2, 0], [1, 2, 1]])
    run_log.draw_masks("qf1", {"fc1": (before, after)}, "a run", tmp_path / "x.png")
    _, _, inputs, outputs = figures[0].axes
    assert [list(patch.get_data().values) for patch in inputs.patches] == [[2, 1, 0], [2, 2, 1]]
    assert [list(patch.get_data().values) for patch in outputs.patches] == [[2, 1], [3, 2]]
    shown = [np.array(axes.images[0].get_array()).tolist() for axes in figures[0].axes[:2]]
    assert shown == [before.tolist(), after.tolist()]
    assert figures[0].axes[0].get_title() == "fc1 before: 3 of 6"


@pytest.mark.parametrize(
    "args, sentence",
    [
        ({}, "holds no finished run"),
        ({"masks_of": "nothing"}, "--masks-of nothing is no finished run that revived connections"),
        ({"publish": Path("runs")}, "--publish needs another folder"),
        ({"events": Path("runs")}, "--events needs another folder"),
        ({"against": "rigl"}, "--against rigl is not one arm; there are: static random+er, tar random+er"),
        ({"against": "random"}, "--against random is not one arm; there are: static random+er, tar random+er"),
        ({"arm": ("rigl",)}, "no such run; the arms are: static random+er, tar random+er"),
        ({"env_id": ("B-v1",)}, "no such run"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(make, tmp_path, capsys, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    runs = [make(5, method=method, finished=bool(args)) for method in ("static", "tar")]
    with pytest.raises(SystemExit) as stop:
        compare.main(compare.Args(tmp_path / "runs", **args))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(run.name for run in runs)
