"""What the tests against packages of other projects share."""

import pages
import pytest


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Where code of other projects runs, which breaks rules that ours keeps."""
    monkeypatch.chdir(tmp_path)
    with pages.others_at_home():
        yield
