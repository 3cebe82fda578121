"""What README.md and runs/evidence/README.md say in numbers is what the runs in runs/evidence give."""

import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

import sparse_utils
from lab import compare

PROJECT = Path(__file__).parent.parent
EVIDENCE = PROJECT / "runs" / "evidence"
PAGES = {"README": PROJECT / "README.md", "evidence": EVIDENCE / "README.md"}
FLAGS = {"": "", "--active-width auto": "active_width=auto", "--init sparse": "init=sparse"}
FLAGS |= {"--no-regrow": "regrow=False"}


def shown(values):
    """A mean and its interval as the pages write them; that of one run has none."""
    mean, *ends = (str(round(value)) for value in values if value == value)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


@pytest.fixture(scope="module")
def groups():
    """The runs of each page of the comparison, by algorithm and sparsity in %."""
    runs = compare.read_runs(EVIDENCE, [])
    return {
        (algo.removesuffix("_tar").upper(), f"{100 * sparsity:g}"): group
        for algo, of_algo in runs.groupby("algo")
        for sparsity, group in compare.by_sparsity(of_algo).items()
    }


def difference(one, other):
    """Paired by seed."""
    return compare.t_interval((one - other).dropna().to_numpy())


def arm_named(cell):
    """The arm of a table's cell, such as `tar --active-width auto`, by its name in the comparison."""
    method, flags = re.match(r"`(\w+) ?(.*?)`", cell).groups()
    return " ".join(filter(None, [method, "random+er" * (method not in sparse_utils.UNPRUNED), FLAGS[flags]]))


def tables(page):
    """Each as its names and rows of cells."""
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M):
        names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        yield names, rows


def test_every_row_of_the_grids_page_is_that_of_its_runs_and_no_arm_is_left_out(groups):
    found = 0
    for names, rows in tables(PAGES["evidence"]):
        algo, env_id, sparsity = re.fullmatch(r"(\w+), (\S+), (\d+)%", names[0]).groups()
        finals = compare.finals_of(groups[algo, sparsity])
        assert {arm_named(row[0]) for row in rows} == {arm for env, arm in finals if env == env_id}
        for name, *cells in rows:
            own = finals[env_id, arm_named(name)]
            expected = {"final return": shown(compare.t_interval(own.to_numpy()))}
            for column in names[2:]:
                if seeds := re.findall(r"\d+", column):
                    values = [own.get(int(seed)) for seed in seeds]
                    expected[column] = ", ".join("-" if value is None else str(round(value)) for value in values)
                else:
                    other = finals[env_id, arm_named(column.removeprefix("minus "))]
                    # an arm is not held against itself, and two pairs or fewer are no comparison
                    compared = other is not own and len((own - other).dropna()) > 2
                    expected[column] = shown(difference(own, other)) if compared else ""
            assert dict(zip(names[1:], cells, strict=True)) == expected, name
            found += 1
    assert found > 30


def test_every_cell_of_the_front_doors_table_is_that_of_its_runs(groups):
    found = 0
    for names, rows in tables(PAGES["README"]):
        columns = [re.fullmatch(r"(\w+), (\d+)%", name) for name in names[1:]]
        for name, *cells in rows if all(columns) else ():
            for column, cell in zip(columns, cells, strict=True):
                if cell:
                    final = compare.finals_of(groups[column.groups()])[names[0], arm_named(name)]
                    assert cell == shown(compare.t_interval(final.to_numpy())), (name, column)
                    found += 1
    assert found > 20


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_in_a_sentence_is_one_that_the_runs_give(groups, page):
    """A mean, a difference of two arms, or a return after equal minutes or FLOPs, in one environment, or a share of
    dense over all."""
    known = set()
    for runs in groups.values():
        finals = compare.finals_of(runs)
        known |= {shown(compare.t_interval(final.to_numpy())) for final in finals.values()}
        pairs = [pair for pair in itertools.permutations(finals, 2) if pair[0][0] == pair[1][0]]
        known |= {shown(difference(finals[one], finals[other])) for one, other in pairs}
        known |= {shown(row) for row in compare.aggregate_table(runs, {}, []).filter(like="%").itertuples(index=False)}
        timed = compare.of_one_processor(runs, [])
        for table in (compare.cost_table(timed, "minutes"), compare.cost_table(runs, "1e12 FLOPs")):
            known |= {shown(row) for row in table.filter(like="return then").itertuples(index=False)}
    said = re.findall(r"-?\d+\s\[-?\d+,\s-?\d+\]", PAGES[page].read_text())
    assert len(said) > 20
    assert not [interval for interval in said if " ".join(interval.split()) not in known]


def test_the_comparison_beside_them_is_of_these_runs(groups):
    curves = pd.concat(groups.values()).drop_duplicates("folder")
    notes = (EVIDENCE / "NOTES.md").read_text()
    assert all(notes in page.read_text() for page in (EVIDENCE / "comparison").glob("*.md"))
    evaluations = pd.read_csv(EVIDENCE / "comparison" / "evaluations.csv")
    assert len(evaluations) == sum(map(len, curves.curve)) > 5000
    for (algo, sparsity), runs in groups.items():
        name = f"{algo.lower()}_tar_s{int(sparsity) / 100}_returns.csv"
        table = pd.read_csv(EVIDENCE / "comparison" / name).set_index(["environment", "arm"])
        finals = compare.finals_of(runs)
        assert set(table.index) == set(finals)
        for key, final in finals.items():
            assert table.loc[key, "final return"] == pytest.approx(final.mean())
