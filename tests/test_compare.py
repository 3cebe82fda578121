"""runs/compare.py: statistics against calculations by hand, what it names, and a published copy that says the same."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

sys.path.insert(0, str(Path(__file__).parent.parent / "runs"))

import compare

STEPS = [0, *range(100, 1001, 100)]


def write_events(path, began, scalars):
    with path.open("wb") as file:
        writer = RecordWriter(file)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for tag, step, value in scalars:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(Event(wall_time=began + step, step=step, summary=summary).SerializeToString())


@pytest.fixture
def make(tmp_path):
    """Writes a run folder. The last evaluation, alone in the last tenth, has the given return, the rest half of it."""
    counter = itertools.count(1_700_000_000)

    def make(final, env_id="A-v1", method="tar", seed=1, steps=STEPS, finished=True, torch="2.0", twice=False, **args):
        args = {
            "env_id": env_id, "exp_name": "td3_tar", "seed": seed, "runs_dir": "/home/someone/runs", "method": method,
            "sparsity": 0.0 if method == "dense" else 0.9, "criterion": "random", "distribution": "er", "reserve": 0.1,
            "policy_noise": 0.2, "total_timesteps": 1000, "eval_frequency": 100,
        } | args  # fmt: skip
        began = next(counter)
        run = tmp_path / "runs" / f"{env_id}__td3_tar__{method}__s{args['sparsity']}__{seed}__{began}"
        run.mkdir(parents=True)
        config = {"args": args, "versions": {"torch": torch}, "git_commit": "abc", "processor": "a processor"}
        (run / "config.json").write_text(json.dumps(config))
        (run / "topology.json").write_text("{}")
        if finished:
            (run / "final.pt").touch()
        values = [("eval/episodic_return", step, final if step > 900 else final / 2) for step in steps]
        values += [(tag, step, 7.0) for step in range(0, 1001, 10) for tag in ("charts/SPS", "losses/qf_loss")]
        values += [("sparsity/actor", step, 0.9) for step in steps] + [("flops/step", 0, 5.0)]
        values += [("charts/episodic_return", step, final - step) for step in range(90, 1001, 90)]
        write_events(run / f"events.out.tfevents.{began}.somehost.1.0", began, values + values[: 1 if twice else 0])
        return run

    return make


@pytest.fixture
def comparison(tmp_path):
    """The tables of the comparison of this test's runs, by the end of their file names, and the page."""

    def comparison(folder=tmp_path / "runs", sparsity=0.9, **args):
        compare.main(compare.Args(folder, **args))
        out = args.get("out") or (args.get("publish") or folder) / "comparison"
        tables = {kind: pd.read_csv(out / f"td3_s{sparsity}_{kind}.csv") for kind in ("returns", "aggregate", "paired")}
        return tables | {"page": (out / f"td3_s{sparsity}.md").read_text(), "out": out}

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
        assert row[4:] == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert list(tables["paired"].environment) == ["A-v1", "B-v1"] and set(tables["paired"].base) == {"random+er"}
    for row in tables["paired"].itertuples(index=False):
        values = np.subtract(RETURNS[row[0], "tar"], RETURNS[row[0], "static"])
        half = quantile[len(values)] * values.std(ddof=1) / np.sqrt(len(values))
        assert row[4:] == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    assert "| A-v1 | tar random+er | 4 | 1 2 3 4 | 750.0 [544.6, 955.4] |" in tables["page"]


def assert_percentiles(values, low, high):
    """The ends are the percentiles 2.5 and 97.5, up to the randomness of a bootstrap of few, hence discrete values."""
    ranges = np.add(np.percentile(values, [[2.1, 2.9], [97.1, 97.9]]), [[-1e-9, 1e-9]])
    assert ranges[0, 0] <= low <= ranges[0, 1] and ranges[1, 0] <= high <= ranges[1, 1], (ranges, low, high)


def test_the_aggregate_is_that_of_agarwal_et_al(grid, comparison):
    table = comparison()["aggregate"].set_index("arm")
    random = np.random.default_rng(5)

    def resampled(values):
        return random.choice(values, (20_000, len(values)))

    percent = {key: 100 * np.array(v) / np.mean(RETURNS[key[0], "dense"]) for key, v in RETURNS.items()}
    for method, arm in (("dense", "dense"), ("static", "static random+er"), ("tar", "tar random+er")):
        values = sorted([*percent["A-v1", method], *percent["B-v1", method]])
        assert table["IQM, % of dense"][arm] == pytest.approx(np.mean(values[1:-1]))  # 7 runs: 7 // 4 from each side
        drawn = np.concatenate([resampled(percent["A-v1", method]), resampled(percent["B-v1", method])], 1)
        assert_percentiles(np.sort(drawn)[:, 1:-1].mean(1), table["IQM low"][arm], table["IQM high"][arm])

        if method != "tar":
            wins, drawn_wins = [], []
            for env_id in ("A-v1", "B-v1"):
                x, y = np.array(RETURNS[env_id, "tar"]), np.array(RETURNS[env_id, method])
                wins.append(np.mean([(a > b) + 0.5 * (a == b) for a in x for b in y]))
                a, b = resampled(x)[:, :, None], resampled(y)[:, None, :]
                drawn_wins.append(((a > b) + 0.5 * (a == b)).mean((1, 2)))
            name = "P(tar random+er > arm)"
            assert table[name][arm] == pytest.approx(np.mean(wins))
            assert_percentiles(np.mean(drawn_wins, 0), table[f"{name} low"][arm], table[f"{name} high"][arm])
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
    make(500, seed=2, learning_rate=0.1)
    make(500, seed=2, env_id="B-v1", twice=True)
    unfinished = make(1e6, seed=3, finished=False)
    empty = make(1e6, seed=3, steps=[])
    rerun = make(1e6, method="static", seed=3)
    make(600, method="static", seed=3)
    rows = comparison()["returns"].set_index(["environment", "arm"])["final return"]
    assert rows["A-v1", "tar random+er"] == 400 and rows["A-v1", "static random+er"] == 300
    page = comparison()["page"]
    for sentence in (
        f"not finished, so left out: {unfinished.name}",
        f"without any evaluation, so left out: {empty.name}",
        f"run again later, so left out: {rerun.name}",
        "tar random+er on A-v1: no run with seed 3, which other arms have",
        "tar random+er on B-v1: no run with seed 1, 3, which other arms have",
        "uniform random+er: no run on B-v1, which other arms have, and so no aggregate",
        "tar random+er on A-v1, seed 1: no evaluation at step 300, 400",
        "evaluations logged twice, of which the last counts: B-v1__td3_tar__tar",
        "unequal version torch: 2.0 in 17 of 18 runs; 2.1 in 1 of 18 runs",
    ):
        assert f"- {sentence}" in page and sentence in capsys.readouterr().out + page
    assert "| uniform random+er | 2 |" not in page and "| A-v1 | uniform random+er | 3 |" in page
    assert "Nothing is missing" not in page


def test_dense_is_one_arm_whatever_sparsity_its_flags_say(make, comparison):
    for sparsity in (0.9, 0.95):
        make(100, method="static", sparsity=sparsity)
        make(200, method="dense", sparsity=sparsity, checkpoint_frequency=int(1000 * sparsity))
    for sparsity in (0.9, 0.95):
        tables = comparison(sparsity=sparsity)
        assert list(tables["returns"].arm) == ["dense", "static random+er"] and list(tables["returns"].n) == [1, 1]
        assert "run again later, so left out: A-v1__td3_tar__dense__s0.9" in tables["page"]
    make(300, method="dense", critic_method="static", sparsity=0.95)
    assert "dense random+er critic static" not in comparison(sparsity=0.9)["page"]
    assert "dense random+er critic static" in comparison(sparsity=0.95)["page"]


def test_a_complete_comparison_says_so(make, comparison):
    for method, seed in itertools.product(("dense", "static", "tar"), (1, 2)):
        make(seed, method=method, seed=seed)
    assert "Nothing is missing or unequal." in comparison()["page"]


def test_one_seed_has_no_interval(make, comparison):
    for method in ("dense", "static", "tar"):
        make(100, method=method)
    tables = comparison()
    for table in (tables["returns"], tables["aggregate"], tables["paired"]):
        assert table.filter(regex="low$|high$").isna().all(axis=None)
    assert "| A-v1 | tar random+er | 1 | 1 | 100.0 - |" in tables["page"]
    assert "| A-v1 | random+er | 1 | 1 | 0.0 - |" in tables["page"]


@pytest.mark.parametrize("dense", [None, -5.0])
def test_without_a_positive_dense_there_is_no_percentage_but_a_probability(make, comparison, dense):
    for seed in (1, 2):
        make(-100 + seed, seed=seed)
        make(-200 + seed, method="static", seed=seed)
        if dense:
            make(dense, method="dense", seed=seed)
    tables = comparison()
    assert "no return in % of dense" in tables["page"]
    assert tables["aggregate"]["IQM, % of dense"].isna().all()
    assert tables["aggregate"].set_index("arm")["P(tar random+er > arm)"]["static random+er"] == 1


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
        "rigl random+er rewire_every=100": 6, "rigl random+er rewire_every=1000": 7,
    }  # fmt: skip
    assert list(tables["returns"].arm[:2]) == ["dense", "tiny"]
    assert "unequal argument rewire_every" in tables["page"]
    assert list(comparison(sparsity=0.95)["returns"].arm) == ["dense", "tar random+er"]


def test_curves_use_only_steps_that_all_seeds_have_and_show_the_interval(make, comparison, monkeypatch):
    figures = {}
    monkeypatch.setattr(compare, "finish", lambda figure, path: figures.setdefault(path.name, figure))
    make(100, seed=1)
    make(300, seed=2, steps=[step for step in STEPS if step != 500])
    make(200, seed=3)
    make(500, method="dense")
    make(400, method="dense", seed=2)
    make(1e6, method="dense", env_id="B-v1")
    comparison()
    assert figures["td3_s0.9_curves.png"].axes[0].get_ylim() == pytest.approx((50 - 22.5, 500 + 22.5))
    lines = {line.get_label(): line for line in figures["td3_s0.9_curves.png"].axes[0].get_lines()}
    assert {label for label in lines if label[0] != "_"} == {"tar", "dense"}
    assert [line.get_ydata()[-1] for label, line in lines.items() if label[0] == "_"] == [500, 400]  # two seeds
    assert list(lines["tar"].get_xdata()) == [step for step in STEPS if step != 500]
    assert list(lines["tar"].get_ydata()) == [100] * 9 + [200]
    (band,) = figures["td3_s0.9_curves.png"].axes[0].collections
    half = 4.302652730 * 100 / 3**0.5  # t at two degrees of freedom; the standard deviation is 100
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == pytest.approx((200 - half, 200 + half))
    sparsities = figures["td3_sparsity.png"].axes[0]
    assert [label.get_text() for label in sparsities.get_xticklabels()] == ["0.9"]
    (errors,) = sparsities.containers
    assert errors.lines[0].get_ydata() == pytest.approx([200])
    assert np.ptp(errors.lines[2][0].get_segments()[0][:, 1]) == pytest.approx(2 * half)


def test_the_published_copy_gives_the_same_tables_and_little_else(run, make, comparison, tmp_path, monkeypatch):
    """With a real tar run among the synthetic ones: its masks are drawn, and only its images are kept."""
    for method, seed in itertools.product(("dense", "static"), (1, 2)):
        make(100 * seed, method=method, seed=seed)
    real = run(criterion="snip", distribution="global", sparsity=0.9)
    other = run(method="static")
    unfinished = make(5, finished=False)
    algo = real.name.split("__")[1].removesuffix("_tar")
    before = comparison()["out"]
    assert all(path.stat().st_size > 10_000 for path in before.glob("*.png"))
    monkeypatch.setattr(compare, "finish", lambda figure, path: path.touch() or compare.plt.close(figure))
    published = tmp_path / "published"
    after = comparison(publish=published)["out"]
    again = comparison(published, out=tmp_path / "again")["out"]

    files = sorted(path.name for path in before.iterdir())
    assert files == sorted(path.name for path in after.iterdir()) == sorted(path.name for path in again.iterdir())
    assert {f"{algo}_s0.9_curves.png", f"{algo}_sparsity.png", "masks_qf1.png", "evaluations.csv"} <= set(files)
    for name in files:
        if name.endswith(".csv"):
            assert (before / name).read_bytes() == (after / name).read_bytes() == (again / name).read_bytes()
    evaluations = pd.read_csv(after / "evaluations.csv")
    assert list(evaluations[evaluations.run == real.name].step) == [0, 100, 160]

    assert not (published / unfinished.name).exists()
    for folder in published.glob("*__*"):
        kinds = sorted(path.name.split(".")[0] for path in folder.iterdir())
        assert kinds == ["config", "events", "topology"]
        assert not any("somehost" in path.name for path in folder.iterdir())
        assert json.loads((folder / "config.json").read_text())["args"]["runs_dir"] == "runs"
        tags = compare.read_events(folder).Tags()
        kept = ("eval/", "charts/episodic_return", "charts/SPS", "sparsity/", "flops/")
        assert all(tag.startswith(kept) for tag in tags["scalars"])
        assert bool(tags["images"]) == (folder.name == real.name)
    assert compare.read_events(published / other.name).Tags()["scalars"]
    synthetic = compare.read_events(next(published.glob("A-v1__*")))
    assert {"sparsity/actor", "flops/step"} <= set(synthetic.Tags()["scalars"])
    assert [event.step for event in synthetic.Scalars("charts/SPS")] == [*range(90, 1000, 100), 1000]
    original = compare.read_events(next((tmp_path / "runs").glob("A-v1__*")))
    for tag in ("eval/episodic_return", "charts/episodic_return"):
        assert synthetic.Scalars(tag) == original.Scalars(tag)


def test_masks_are_read_exactly_from_the_images_of_a_run(run):
    run_dir = run(criterion="magnitude", distribution="global", sparsity=0.8)
    masks = compare.masks_of(run_dir)
    final = torch.load(run_dir / "final.pt", weights_only=True)["masks"]
    topology = json.loads((run_dir / "topology.json").read_text())
    revived = 0
    for network, layers in final.items():
        for layer, mask in layers.items():
            before, after = masks[network][layer]
            assert np.array_equal(after, mask.numpy()) and not (before & ~after).any()
            assert before.sum() == topology[network]["layers"][layer]["static"]
            assert [(~m.any(0)).sum() for m in (before, after)] == topology[network]["layers"][layer]["blind_inputs"]
            revived += after.sum() - before.sum()
    assert revived > 0


def test_degrees_are_counted_per_neuron(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(compare, "finish", lambda figure, path: figures.append(figure))
    before = np.array([[1, 0, 0], [1, 0, 1]], bool)
    after = np.array([[1, 1, 0], [1, 1, 1]], bool)
    compare.draw_masks("qf1", {"fc1": (before, after)}, "a run", tmp_path / "x.png")
    _, _, inputs, outputs = figures[0].axes
    assert [list(patch.get_data().values) for patch in inputs.patches] == [[2, 1, 0], [2, 2, 1]]
    assert [list(patch.get_data().values) for patch in outputs.patches] == [[2, 1], [3, 2]]
    shown = [np.array(axes.images[0].get_array()).tolist() for axes in figures[0].axes[:2]]
    assert shown == [[[1, 0, 0], [1, 0, 1]], [[1, 2, 0], [1, 2, 1]]]


@pytest.mark.parametrize(
    "args, sentence",
    [
        ({}, "holds no finished run"),
        ({"masks_of": "nothing"}, "--masks-of nothing is no finished tar run with images"),
        ({"publish": Path("runs")}, "--publish needs another folder"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(make, tmp_path, capsys, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    run = make(5, finished=bool(args))
    with pytest.raises(SystemExit) as stop:
        compare.main(compare.Args(tmp_path / "runs", **args))
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
