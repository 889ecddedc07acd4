"""Which tests run on both deployments: all that ask a server, but for a few that are of one by nature."""

from __future__ import annotations

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
