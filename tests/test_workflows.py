"""What runs in CI is what was reviewed: a tag can be moved, a commit cannot."""

import re
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).parents[1] / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_the_hash_of_a_commit(workflow):
    text = workflow.read_text()
    actions = re.findall(r"uses: (.*)", text)
    assert actions
    for action in actions:
        # The version is for people, and for the tool that proposes newer ones.
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)
