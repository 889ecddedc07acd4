"""The documents of W7: what a cached store holds is what the generator of its version makes."""

import hashlib
import json
from collections import Counter

import numpy as np

from benchmarks.catalogue import GENERATOR_VERSION, RARE_KEYS, TEN, column, documents

DIGESTS = {1: "de6490ce4739335f244760a62ace8a6e8c99a21424c03f38507fc7ee7e5892d3"}


def leaves(value):
    if isinstance(value, dict):
        return sum(map(leaves, value.values()))
    return sum(map(leaves, value)) if isinstance(value, list) else 1


def test_changed_documents_need_a_new_version():
    """Documents of a generator's version are the same everywhere and always."""
    text = json.dumps(list(documents(0, 50)) + list(documents(999_990, 1_000_000)), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGESTS[GENERATOR_VERSION]


def test_a_document_does_not_depend_on_where_one_begins():
    """A catalogue that was half filled can be gone on with."""
    assert list(documents(0, 4100))[4000:] == list(documents(4000, 4100))


def test_size_of_a_document():
    """A document is about 2 kB of JSON with 80 leaves."""
    sample = list(documents(0, 100))
    assert 1500 < np.mean([len(json.dumps(document, separators=(",", ":"))) for document in sample]) < 2100
    assert all(70 <= leaves(document) <= 90 for document in sample)


def test_known_frequencies():
    """Rare keys have exactly ten documents of each value, the others about as many as they say."""
    for count, key in RARE_KEYS.items():
        values = Counter(column(key, np.arange(count, dtype=np.uint64)).tolist())
        assert len(values) == count // TEN
        assert set(values.values()) == {TEN}
    numbers = np.arange(100_000, dtype=np.uint64)
    for name, share in (("permille", 0.001), ("percent", 0.01), ("tenth", 0.1), ("half", 0.5)):
        counts = np.bincount(column(name, numbers))
        assert len(counts) == round(1 / share)
        assert np.all(abs(counts - 100_000 * share) < 6 * (100_000 * share) ** 0.5)
