"""The sweep protocol as it is built holds in every interleaving of a small model; each of its rules is needed."""

from __future__ import annotations

import pytest
from protocol_model import check, explore, finishing, folding, retrying, sleeping

SCENARIOS = [folding, retrying, finishing, sleeping]

BROKEN = {
    # what is done wrong: (scenario, part of what is found to be wrong)
    "no_token_check no_cut_check": (folding, "reads"),  # a folder that slept records what it made of an older moment
    "token_of_another": (sleeping, "an object in force is gone"),  # a folder that slept takes the token it reads for its own
    "keys_without_token": (folding, "an object in force is gone"),
    "overlay_all_rows": (folding, "a reader"),
    "drop_before_record": (folding, "reads"),
    "chunks_in_place": (folding, "reads"),
    "remove_at_once absence_is_fill": (folding, "a reader"),
    "absence_is_fill": (folding, "a reader"),
    "remove_what_is_not_named": (folding, "the manifest in force is gone"),
    "not_a_prefix": (folding, "reads"),
    "whole_chunks_only": (folding, "reads"),
    "rows_read_apart": (folding, "a reader"),
    "retry_takes_a_second_place": (retrying, "twice"),
    "place_taken_before": (folding, "reads"),
    "no_seal": (finishing, "reads"),
    "last_seal_wins": (finishing, "sealed as complete first"),
    "final_keys_while_open": (finishing, "reads"),
}
"""The names of `rules` in the model that are broken together."""

NOT_NEEDED = {
    # Guards of which either is enough, and orders that cost only repetition.
    "no_token_check": (sleeping,),
    "no_cut_check": (sleeping,),
    "remove_at_once": (folding,),
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_protocol_holds_in_every_interleaving(scenario):
    """Whoever reads, at any step of anybody, gets every block before the head he saw, whole, once and in order."""
    outcome = check(scenario())
    print(f"{scenario.__name__}: {outcome.states} states")
    assert outcome.trace is None, f"{outcome.reason}\n" + "\n".join(outcome.trace)
    assert outcome.states > 5000


@pytest.mark.parametrize("broken", BROKEN)
def test_each_rule_is_needed(broken):
    """Without it the search finds how a reader is misled; the shortest way is printed."""
    scenario, expected = BROKEN[broken]
    outcome = check(scenario(frozenset(broken.split())))
    assert outcome.trace is not None, f"{broken} is not found in {outcome.states} states"
    print(f"{broken}: {outcome.reason}\n  " + "\n  ".join(outcome.trace))
    assert expected in outcome.reason


@pytest.mark.parametrize("spared", NOT_NEEDED)
def test_guards_that_stand_in_for_each_other(spared):
    """The token and the cut guard the same step; and what is replaced may go at once, as readers start over."""
    for scenario in NOT_NEEDED[spared]:
        outcome = check(scenario(frozenset(spared.split())))
        assert outcome.trace is None, f"{outcome.reason}\n" + "\n".join(outcome.trace)


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_the_protocol_holds_with_one_more_block(scenario):
    """The same, with every writer's block count raised by one."""
    blocks = 2 if scenario is folding else 3
    outcome = check(scenario(blocks=blocks), most=5_000_000)
    print(f"{scenario.__name__}: {outcome.states} states")
    assert outcome.trace is None, f"{outcome.reason}\n" + "\n".join(outcome.trace)


def test_the_search_finds_a_shortest_way():
    """On a maze whose answer is known: from 0 by +3 or +5 to 11 takes three steps."""

    def moves(state):
        return iter([("+3", state + 3), ("+5", state + 5)])

    outcome = explore(0, moves, lambda state: "there" if state == 11 else "", 1000)
    assert (outcome.reason, len(outcome.trace)) == ("there", 3)
    with pytest.raises(RuntimeError):
        explore(0, moves, lambda state: "", 100)
