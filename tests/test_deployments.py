"""Which tests run on both deployments: all that ask a server, but for a few that are of one by nature."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = 12
"""Tests marked `embedded`, which production leaves out. What can be asked through HTTP is asked of both."""


def test_few_tests_are_of_one_deployment_only(request):
    """None but those that look into SQLite or a folder, each with its reason; one more is argued for here."""
    marks = {
        item.nodeid.partition("[")[0]: mark
        for item in request.session.items
        if (mark := item.get_closest_marker("embedded"))
    }
    assert all(len(mark.args) == 1 for mark in marks.values())
    assert len(marks) <= EMBEDDED, sorted(marks)


def test_a_long_run_skips_no_service():
    """Else the generated questions that SQLite and MongoDB must answer alike would be asked of SQLite alone."""
    makefile = Path(__file__).parents[1].joinpath("Makefile").read_text()
    head, _, recipe = makefile.partition("\nsoak:")[2].partition("\n\n")[0].partition("\n")
    assert "services" in head.partition("##")[0].split()
    assert "AQ_DATA_SERVICES=required" in recipe.split()
