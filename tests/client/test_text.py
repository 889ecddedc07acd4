"""Finding by words: over both deployments, with highlights, on the command line."""

from __future__ import annotations

import httpx
import pytest
from aq_server.__main__ import main

import aq_data
from aq_data.errors import QueryError


@pytest.fixture
def files(client):
    """Three measurements with words in different places."""
    fridge = {"oxford": {"settings": {"mixing_chamber": {"value": 12, "unit": "mK"}}}}
    return [
        client.save(name="T1 vs flux", comment="résonator of q3, after the warm-up", tags=["cooldown-7"]),
        client.save(name="T2 echo", metadata={"note": {"by": ["Flux line noisy", 4]}}, instruments=fridge),
        client.save(name="Resonator spectroscopy", description="no q3 here? yes: Q33"),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [("flux", [0, 1]), ("FLUX noisy", [1]), ("resonator q3", [0, 2]), ("reson q3 flux", [0]), ("mixing chamber", [1]),
     ("cooldown 7", [0]), ("oxford", [1]), ("flux absent", []), ("warm up", [0]), ("T1", [0]), ("mk", [1])],
)  # fmt: skip
def test_every_word_begins_some_word_of_each_hit(client, files, text, found):
    """In names, comments, tags, settings, free metadata; case and accents do not count."""
    hits = client.search(text=text, sort="created_at")
    assert [hit.id for hit in hits] == [files[i].id for i in found]
    assert client.count(text=text) == len(found)
    assert client.count({"$text": text}) == len(found)
    assert sum(client.distinct("name", text=text).values()) == len(found)


def test_highlights_show_where_the_words_stand(client, files):
    """With the positions of the words in the text that is shown."""
    (hit,), (shown,) = (found := client.search({"state": "complete"}, text="reson flux")), found.highlights
    assert hit.id == files[0].id
    assert [str(place) for place in shown] == ["name: T1 vs [flux]", "comment: [résonator] of q3, after the warm-up"]
    assert [place.text[slice(*place.spans[0])] for place in shown] == ["flux", "résonator"]
    (other,) = client.search(text="mixing oxf").highlights
    assert [place.path for place in other] == ["instruments.oxford", "instruments.oxford.settings.mixing_chamber"]
    assert client.search({"name": "T2 echo"}).highlights == [[]]


def test_over_http_highlights_come_when_they_are_asked_for(files, server):
    """The same as in Python, whatever fields are wanted."""

    def ask(**more):
        answer = httpx.post(f"{server}/api/v1/search", json={"text": "reson flux", "sort": "created_at", **more})
        assert answer.status_code == 200
        return answer.json()

    assert "highlights" not in ask()
    shown = ask(highlights=True)["highlights"]
    assert [[place["path"] for place in one] for one in shown] == [["name", "comment"]]
    assert ask(highlights=True, fields=["id"])["highlights"] == shown
    assert ask(highlights=True, text=None)["highlights"] == [[], [], []]
    with aq_data.connect(server) as client:
        assert [[list(place) for place in one] for one in client.search(text="reson flux").highlights] == [
            [[place["path"], place["text"], tuple(map(tuple, place["spans"]))] for place in one] for one in shown
        ]


def test_highlights_go_with_their_hits_on_every_page(client):
    """Also beyond the first thousand, and in a projection."""
    client.save_many([{"name": f"flux {i}"} for i in range(1002)])
    hits = client.search(text="flux", sort="name", limit=None)
    assert [str(shown[0]) for shown in hits.highlights] == [f"name: [flux] {file.name[5:]}" for file in hits]


def test_a_text_changed_is_found_as_it_is_now(client, files):
    """And not as it was; nor is what was deleted."""
    client.update(files[0].id, {"name": "T1 vs gate"})
    assert client.count(text="gate") == 1
    assert [hit.id for hit in client.search(text="flux")] == [files[1].id]
    client.delete(files[1].id)
    assert client.count(text="flux") == 0
    assert [hit.id for hit in client.search(text="flux", include_deleted=True)] == [files[1].id]


@pytest.mark.parametrize("text", ["", "  ", "?!", "- _", " ".join(f"w{i}" for i in range(21))])
def test_a_text_without_words_or_with_too_many_is_refused(client, text):
    """By name, with the way out."""
    with pytest.raises(QueryError, match=r"letters or digits|at most 20 words"):
        client.search(text=text)


def test_the_command_line_finds_text(files, server, capsys):
    """The filter may be left out; highlights stand below each hit."""
    assert main(["search", "--text", "reson flux", "--url", server]) == 0
    said = capsys.readouterr().out
    assert files[0].id in said
    assert "    name: T1 vs [flux]" in said
