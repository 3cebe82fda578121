"""The README's tables name what the code has: flags with their defaults, choices, tags, files of a run."""

import re
from pathlib import Path
from typing import get_args

import pytest
from test_runs import events

README = (Path(__file__).parent.parent / "README.md").read_text()


SPARSITY_FLAGS = "method sparsity reserve criterion distribution compute drop_criterion rewire_every rewire_fraction "
SPARSITY_FLAGS += "rewire_stop regrow init active_width"


@pytest.mark.parametrize("flag", SPARSITY_FLAGS.split())
def test_sparsity_flags_stand_with_their_defaults(script, flag):
    field = script.Args.__dataclass_fields__[flag]
    assert f"| `--{flag.replace('_', '-')}` | `{field.default}` |" in README
    for choice in (choice for choice in get_args(field.type) if isinstance(choice, str)):
        assert re.search(rf"`{choice}`", README), choice


def test_every_tag_of_a_run_is_in_the_table(run, script, monkeypatch):
    monkeypatch.setattr(script, "SPS_BURN_IN", 20)
    run_dir = run(total_timesteps=210)
    tags = {re.sub(r"(sparsity)/[a-z0-9]+", r"\1/<network>", tag) for tag in events(run_dir).Tags()["scalars"]}
    tags = {re.sub(r"(density)/.*", r"\1/<network>.<layer>", tag) for tag in tags}
    assert len(tags) > 10
    for tag in tags:
        assert f"`{tag}`" in README, tag
    for path in run_dir.iterdir():
        assert "tfevents" in path.name or f"`{path.name}`" in README


def test_no_placeholder_is_left_and_every_table_holds_together():
    assert not re.search(r"^[A-Z]+_[A-Z]+$| [A-Z]+_[A-Z]+$", README, re.M)
    for line, after in zip(README.splitlines(), README.splitlines()[1:]):
        if line.startswith("|") and after.startswith("|"):
            columns = [len(re.split(r"(?<!\\)\|", row)) for row in (line, after)]
            assert columns[0] == columns[1], line
