"""What the pages say in numbers is what the published grids give, and the comparisons beside them are of these runs."""

import dataclasses
import functools
import io
import itertools
import json
import re
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tyro

import sparse_utils
import td3_tar
from lab import compare, figures, record, results

PROJECT = Path(__file__).parent.parent
GRIDS = re.findall(r"^!/runs/(\w+)/$", (PROJECT / ".gitignore").read_text(), re.M)
assert len(GRIDS) >= 9
# each page with the grid from which its numbers are
PAGES = {f"runs/{grid}/README.md": grid for grid in GRIDS if (PROJECT / "runs" / grid / "README.md").exists()}
INTERVAL = r"-?\d+\s\[-?\d+,\s-?\d+\]"
FLAGS = {"--active-width auto": "active_width=auto", "--init sparse": "init=sparse", "--no-regrow": "regrow=False"}


@functools.cache
def made_anew(grid):
    """The comparison of a grid without its figures: the runs of each page by its name, and the text of each file."""
    folder, groups, write_page = PROJECT / "runs" / grid, {}, compare.write_page

    def note(*given):
        groups[given[-1].name] = given[0]
        write_page(*given)

    costs = tuple(end for end in compare.COSTS.values() if any(folder.glob(f"comparison/*_{end}.csv")))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as out:
        for name in ("draw_curves", "draw_sparsities", "draw_gains"):
            patch.setattr(figures, name, lambda *args: None)
        patch.setattr(compare, "write_page", note)
        compare.main(compare.Args(folder, out=Path(out), costs=costs))
        return groups, {path.name: path.read_text() for path in Path(out).iterdir()}


def pages_of(grid):
    """The runs of a grid by algorithm and sparsity, as its comparison has them on a page."""
    return made_anew(grid)[0]


def shown(values):
    """A mean and its interval as the pages write them; that of one run has none."""
    mean, *ends = (str(round(value)) for value in values if value == value)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def arm_named(cell, base="random+er"):
    """The arm of a table's cell, such as `tar --active-width auto`, by its name in the comparison."""
    method, flags = re.match(r"`(\w+) ?(.*?)`", cell).groups()
    return " ".join(filter(None, [method, base * (method not in sparse_utils.UNPRUNED), FLAGS.get(flags, flags)]))


def tables(page):
    """Each as its names and rows of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", (PROJECT / page).read_text(), re.M):
        names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        yield names, rows


@pytest.mark.parametrize("page", PAGES)
def test_every_cell_of_a_table_of_returns_is_that_of_its_runs(page):
    """Algorithm, sparsity and, where it is not random+er, base mask are in the first name or those of column and row. A
    cell is the return of an arm, the difference of two, or the mean share that static pruning cut off."""
    found = 0
    for names, rows in tables(page):
        env_id = re.search(r"\w+-v\d", names[0])
        for name, *values in rows if env_id else ():
            for column, value in zip(names[1:], values, strict=True):
                where, marked = f"{names[0]}, {column}, {name}", re.findall("`.*?`", f"{column}, {name}")
                algo, sparsity = re.search("TD3|SAC", where)[0].lower(), int(re.search(r"(\d+)%", where)[1]) / 100
                group = pages_of(PAGES[page])[f"{algo}_tar_s{sparsity}"]
                base = next((mark.strip("`") for mark in marked if "+" in mark), "random+er")
                arms = [arm_named(mark, base) for mark in marked if "+" not in mark]
                finals = [compare.finals_of(group).get((env_id[0], arm)) for arm in arms]
                if not value:  # an empty cell was not run, or has no base mask
                    assert any(final is None for final in finals) or arms[0] in ("dense", "tiny"), (name, column)
                    continue
                if arms:
                    final = finals[0] if len(arms) == 1 else (finals[0] - finals[1]).dropna()
                    interval = compare.t_interval(final.to_numpy())
                    assert value in (shown(interval), shown(interval[:1])), (name, column)
                else:
                    gains = compare.gains_of(group, compare.references(group, None))
                    own = gains.cut[(gains.base == f"{base} at {sparsity}") & (gains.env_id == env_id[0])]
                    assert value == f"{own.mean():.0f}%", (name, column)
                found += 1
    assert found >= 10


def test_every_number_of_the_front_page_is_that_of_published_runs():
    """A cell of its table, and the return of `dense`, is a mean over runs of 300,000 steps in some grid."""
    known, found, text = defaultdict(lambda: defaultdict(set)), 0, (PROJECT / "README.md").read_text()
    for grid in GRIDS:
        for page, group in pages_of(grid).items():
            group = group[[args["total_timesteps"] == 300_000 for args in group.args]]
            for (env_id, arm), finals in compare.finals_of(group).items():
                arm = arm.removesuffix(" td3_tar")  # which tells it from an edited copy
                known[env_id, page.rpartition("+")[2], arm][len(finals)].add(round(finals.mean()))
    bases = {name: f"{name.lower()}+global" for name in ("magnitude", "SNIP", "SynFlow")} | {"random": "random+er"}
    (_, *columns), rows = next(tables("README.md"))
    for method, *cells in rows:
        for column, cell in zip(columns, cells, strict=True):
            base, sparsity, flags = re.match(r"(\w+), (\d+)%(?:, `(.*)`)?", column).groups()
            flags = None if "tiny" in method else flags  # which has no connections to concentrate
            arm = arm_named(f"{method[:-1]} {flags}`" if flags else method, bases[base])
            seeds, of = max(known["HalfCheetah-v4", f"td3_tar_s{int(sparsity) / 100}", arm].items())
            assert (seeds, of) == (5 if sparsity == "90" else 3, {int(cell)}), (method, column, of)
            found += 1
    dense = known["HalfCheetah-v4", "td3_tar_s0.95", "dense"][3]
    assert found == 28 and {int(re.search(r"after 300,000 steps \(`dense`: (\d+)\)", text)[1])} == dense
    gains = re.search(r"of (\d+)% \(SAC\) and (\d+)% \(TD3\)", text).groups()
    for algo, gain in zip(("sac", "td3"), gains, strict=True):
        finals = compare.finals_of(pages_of("metric")[f"{algo}_tar_s0.9"])
        tar, static = (finals["HalfCheetah-v4", f"{method} magnitude+global"].mean() for method in ("tar", "static"))
        assert int(gain) == round(100 * (tar / static - 1))


def test_the_front_page_says_on_which_masks_a_gain_is_shown():
    """By the interval of `tar` minus `static` on the masks of its two lists; those at 95% are in runs/published."""
    text = (PROJECT / "README.md").read_text()
    (gain,), (none,) = (re.findall(rf"\*\*{of} shown:\*\*(.*?)\n- ", text, re.S) for of in ("Gain", "None"))
    lows = {}
    for grid, algo, sparsity in itertools.product(("metric", "published"), ("td3", "sac"), (0.8, 0.9, 0.95)):
        group = pages_of(grid).get(f"{algo}_tar_s{sparsity}")
        finals = {} if group is None else compare.finals_of(group)
        for base in ("magnitude+global", "snip+global", "synflow+global", "random+er"):
            tar, static = (finals.get(("HalfCheetah-v4", f"{method} {base}")) for method in ("tar", "static"))
            if tar is not None:
                interval = compare.t_interval((tar - static).dropna().to_numpy())
                lows[base.partition("+")[0], algo, f"{sparsity:.0%}"] = interval[1]
    assert len(lows) == 12
    for said, is_shown in ((gain, True), (none, False)):
        found = 0
        for name, values in re.findall(r"(\w+) masks at ((?:\d+%(?: \(SAC too\))?(?:, (?=\d)| and )?)+)", said):
            for sparsity, sac in re.findall(r"(\d+%)( \(SAC too\))?", values):
                for algo in ("td3", "sac") if sac or (name, is_shown) == ("magnitude", True) else ("td3",):
                    assert (lows.pop((name.lower(), algo, sparsity)) > 0) == is_shown, (name, algo, sparsity)
                    found += 1
        assert found == (6 if is_shown else 2)
    assert {name for name, *_ in lows} == {"synflow", "random"} and max(lows.values()) <= 0


def test_the_highest_means_on_random_masks_are_those_that_the_front_page_names():
    """Of all arms with three seeds of 300,000 steps in some grid. None of those named is shown above `tiny`."""
    (said,) = re.findall(r"\*\*Highest means, random masks\*\*(.*?)\n\n", (PROJECT / "README.md").read_text(), re.S)
    found = {}
    for command, sparsity, sac in re.findall(r"`--method\s([^`]+)`\S* at (\d+%)(?: \(SAC: (\d+%)\))?", said):
        found |= {("td3", sparsity): command} | ({("sac", sac): command} if sac else {})
    assert len(found) == 4
    assert "None is shown to beat `tiny`; plain `set` at 90% is, in one grid of two." in " ".join(said.split())
    best, tiny = defaultdict(lambda: (0.0, "", None)), {}
    for group in itertools.chain(*(pages_of(grid).values() for grid in GRIDS)):
        algo, sparsity = group.script.iloc[0][:3], f"{group.sparsity.max():.0%}"
        group = group[[args["total_timesteps"] == 300_000 for args in group.args]]
        finals = {arm: of for (env_id, arm), of in compare.finals_of(group).items() if env_id == "HalfCheetah-v4"}
        for arm, of in finals.items():
            if arm.startswith("tiny"):
                tiny[algo, sparsity] = of
            elif "random+er" in arm and len(of) >= 3:
                best[algo, sparsity] = max(best[algo, sparsity], (of.mean(), arm, of), key=lambda one: one[0])
    for case, command in found.items():
        method, *flags = command.split()
        words = {method, "random+er", *(f"{n[2:].replace('-', '_')}={v}" for n, v in zip(flags[::2], flags[1::2]))}
        _, arm, finals = best[case]
        assert words == {*arm.split()} - {"td3_tar"}, (case, arm)
        assert compare.t_interval((finals - tiny[case]).dropna().to_numpy())[1] <= 0, case


def test_the_arms_that_are_shown_above_tiny_are_those_that_the_list_of_grids_names():
    """By the `tiny` of the grid. Another grid has `set` on random masks at 90% too, without `tiny`."""
    shown_above = set()
    for group in itertools.chain(*(pages_of(grid).values() for grid in GRIDS)):
        finals = compare.finals_of(group[[args["total_timesteps"] == 300_000 for args in group.args]])
        for (env_id, arm), final in finals.items():
            difference = (final - finals.get((env_id, "tiny"), np.nan)).dropna().to_numpy()
            if len(difference) > 1 and compare.t_interval(difference)[1] > 0:
                shown_above.add((group.script.iloc[0], f"{group.sparsity.max():.0%}", arm))
    found = {arm for arm in shown_above if not arm[2].startswith("dense")}
    assert found == {("td3_tar", "90%", "set random+er"), ("td3_tar", "90%", "set synflow+global")}
    others = compare.finals_of(pages_of("systems")["td3_ln+td3_tar_s0.9"])["HalfCheetah-v4", "set random+er td3_tar"]
    tiny = compare.finals_of(pages_of("metric")["td3_tar_s0.9"])["HalfCheetah-v4", "tiny"]
    assert compare.t_interval((others - tiny).dropna().to_numpy())[1] <= 0
    said = " ".join((PROJECT / "runs/README.md").read_text().split())
    assert "Only `set` on random (one grid of two) and SynFlow masks at 90% is shown above `tiny`" in said
    assert f"random `set` ends at {others.mean():.0f}" in (PROJECT / "runs/metric/README.md").read_text()


def test_the_cost_of_systems_is_that_of_their_runs():
    group = pages_of("systems")["td3_ln+td3_tar_s0.9"]
    flops = group.curve.map(lambda curve: curve["1e12 FLOPs"].iloc[-1]).groupby(group.arm).mean()
    slow = ("static dynadiag+er td3_tar", "chts random+er td3_tar density_start=0.5")
    slow += ("static random+er td3_tar density_start=0.5 final_prune_at=208334 lr_cycles=3",)
    ratios = [f"{flops[arm] / flops['static random+er td3_tar']:.1f}" for arm in slow]
    said = re.search(r"cost ([\d.]+), ([\d.]+) and ([\d.]+) times", (PROJECT / "lab/systems.md").read_text())
    assert list(said.groups()) == ratios


@functools.cache
def intervals_of(grid):
    """Of a mean, or of a difference of two arms paired by seed, in one environment; of all seeds or of the first three.
    Or of two methods over all their base masks, sparsities and algorithms: then a seed counts with its mean."""
    known, of_methods = set(), defaultdict(list)
    for group in pages_of(grid).values():
        finals = compare.finals_of(group)
        known |= {shown(compare.t_interval(final.to_numpy())) for final in finals.values()}
        for one, other in itertools.permutations(finals, 2):
            if one[0] == other[0]:
                difference = (finals[one] - finals[other]).dropna()
                known |= {shown(compare.t_interval(values.to_numpy())) for values in (difference, difference[:3])}
                (method, _, base), (against, _, its_base) = (arm.partition(" ") for _, arm in (one, other))
                if base == its_base and (one[0], f"uniform {base}") in finals:  # of a mask with all five methods
                    of_methods[one[0], method, against].append(difference)
    means = [pd.concat(differences, axis=1).dropna().mean(axis=1) for differences in of_methods.values()]
    return known | {shown(compare.t_interval(values.to_numpy())) for values in means}


@pytest.mark.parametrize(("page", "grid"), [*PAGES.items(), ("lab/systems.md", "systems")])
def test_every_interval_in_a_sentence_is_one_that_the_runs_give(page, grid):
    said = re.findall(INTERVAL, (PROJECT / page).read_text())
    assert said and not [one for one in said if " ".join(one.split()) not in intervals_of(grid)]


def test_the_list_of_grids_has_all_of_them_and_what_their_runs_give():
    rows = {re.match(r"\[(\w+)\]", grid)[1]: row for grid, *row in next(tables("runs/README.md"))[1]}
    assert rows.keys() == {*GRIDS}
    for grid, (text, count) in rows.items():
        assert int(count) == len(json.loads((PROJECT / "runs" / grid / "runs.json").read_text())), grid
        for said in re.findall(rf"{INTERVAL}|\b\d{{5}}\b", text):  # the latter are returns of one seed
            assert said in intervals_of(grid), (grid, said)


def test_the_return_of_each_system_is_that_of_runs_with_its_flags():
    """Those of lab/systems.md: one setting, three seeds."""
    runs, found = pd.concat(pages_of("systems").values()), 0
    common = "--env-id HalfCheetah-v4 --sparsity 0.9 --total-timesteps 300000 --criterion random --distribution er"
    for system, flags, value, _ in next(tables("lab/systems.md"))[1]:
        if not value:
            continue
        args = record.settle(tyro.cli(td3_tar.Args, args=[*common.split(), *flags.strip("`").split()]))
        asked = {n: v for n, v in record.identity(dataclasses.asdict(args)).items() if n not in ("seed", "exp_name")}
        own = runs[[asked.items() <= (vars(td3_tar.Args()) | given).items() for given in runs.args]]
        assert sorted(own.seed) == [4, 5, 6] and value == shown(compare.t_interval(own.final.to_numpy())), system
        found += 1
    assert found >= 13


@pytest.mark.parametrize("grid", GRIDS)
def test_the_comparison_of_a_grid_is_of_its_runs(grid):
    files = {path.name: path for path in (PROJECT / "runs" / grid / "comparison").iterdir() if path.suffix != ".png"}
    assert files.keys() == made_anew(grid)[1].keys()
    for name, text in made_anew(grid)[1].items():
        if name.endswith(".md"):
            assert files[name].read_text() == text, name
            assert all((files[name].parent / link).exists() for link in re.findall(r"\]\(([^)\s]+)\)", text))
        else:
            pd.testing.assert_frame_equal(*map(pd.read_csv, (files[name], io.StringIO(text))))


@pytest.mark.parametrize("grid", GRIDS)
def test_every_run_has_what_made_it_and_all_of_its_evaluations(grid):
    folder, unfinished = PROJECT / "runs" / grid, []
    runs = json.loads((folder / "runs.json").read_text())
    found = {result["path"].name: result for result in results.results_in(folder, unfinished)}
    assert found.keys() == runs.keys() and not unfinished
    for result in found.values():
        args, last = result["args"], result["args"]["total_timesteps"]
        assert list(result["evaluations"].step) == [*range(0, last, args["eval_frequency"]), last]
        assert all(segment["git_commit"] and segment["processor"] for segment in result["segments"])
        assert result["topology"].keys() == {"actor", "qf1", "qf2"}


def test_the_results_are_a_handful_of_files_and_short_pages():
    files = [path for grid in GRIDS for path in (PROJECT / "runs" / grid).rglob("*") if path.is_file()]
    assert len(files) + 1 <= 150
    for page in PROJECT.glob("runs/**/README.md"):
        assert len(page.read_text().split()) <= (500 if page.parent.name in GRIDS else 450)
