"""The reference model on its own: it says what it should, and it refuses what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vmem_kv.testing import ModelMismatch, ReferenceModel

from .bench import PAGE, OpenBench


def make_model() -> ReferenceModel:
    return ReferenceModel([1000, 3000], 4096, n_slots=2, max_tokens=10, max_pages=20)


def test_pages_are_those_that_any_byte_of_a_token_touches() -> None:
    model = make_model()
    assert model.front(0) == set()
    assert model.front(1) == {(0, 0), (1, 0)}
    assert model.front(4) == {(0, 0), (1, 0), (1, 1), (1, 2)}
    assert model.front(5) == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3)}


def test_capacity_is_what_the_same_pages_hold() -> None:
    model = make_model()
    model.acquired(0, "")
    model.ensured({0: 2})
    assert model.capacity(0) == 2  # 6,000 of 8,192 bytes; a third row would not fit
    model.ensured({0: 3})
    assert model.capacity(0) == 4  # 9,000 of 12,288 bytes


def test_a_slot_is_not_handed_out_twice() -> None:
    model = make_model()
    model.acquired(0, "")
    with pytest.raises(ModelMismatch, match="active"):
        model.acquired(0, "")


def test_a_page_that_is_missing_or_too_many_is_a_mismatch(open_bench: OpenBench) -> None:
    bench = open_bench()
    rows = [plane.token_bytes for plane in bench.layout.planes]
    model = ReferenceModel(rows, PAGE, 4, 48, 64)
    slot_id = bench.grown(5)
    model.acquired(slot_id, "")
    model.ensured({slot_id: 5})
    stats = bench.cache.stats()
    handles = {page: 100 + frame for page, frame in model.pages.items()}
    model.compare(stats, handles)
    with pytest.raises(ModelMismatch, match="should be mapped"):
        model.compare(stats, dict(list(handles.items())[1:]))
    with pytest.raises(ModelMismatch, match="should not be"):
        model.compare(stats, handles | {(3, 0, 0): 7})
    first, second, *_ = handles
    with pytest.raises(ModelMismatch, match="what is shared differs"):
        model.compare(stats, handles | {first: handles[second]})
    for wrong in (
        replace(stats, n_live_pages=stats.n_live_pages - 1),
        replace(stats, n_warm_pages=1),
        replace(stats, n_quarantined_pages=1),
        replace(stats, live_bytes=stats.live_bytes + 1),
        replace(stats, n_free_pages=2),
    ):
        with pytest.raises(ModelMismatch, match="differ"):
            model.compare(wrong, handles)
    bench.retire_all()
    bench.close()


def test_a_fork_shares_full_pages_and_has_the_others_for_itself() -> None:
    model = make_model()  # rows of 1000 and 3000 bytes: 5 tokens fill one page of the first plane, three of the other
    model.acquired(0, "")
    model.ensured({0: 5})
    assert model.n_shared_tokens(0) == 0
    new = model.forked(0, 1, 5)
    assert new == {(1, 0, 1), (1, 1, 3)}
    assert model.n_mapped == len(model.pages) - 4
    assert model.n_shared_tokens(0) == model.n_shared_tokens(1) == 5  # the fifth begins in the first plane's first page
    model.truncated(1, 1)
    assert model.n_shared_tokens(1) == 0
    assert {page for page in model.pages if page[0] == 1} == {(1, 0, 0), (1, 1, 0)}


def test_after_a_fault_a_sequence_must_have_all_its_pages() -> None:
    model = make_model()
    model.acquired(0, "")
    model.ensured({0: 5})
    pages = set(model.pages)
    model.broke_off(pages, [], 0, 0)
    with pytest.raises(ModelMismatch, match="slot 0 is active"):
        model.broke_off(pages - {(0, 1, 3)}, [], 0, 1)
    with pytest.raises(ModelMismatch, match="slot 1 is cold and kept"):
        model.broke_off(pages | {(1, 0, 0)}, [], 0, 0)
    model.retired(0)
    model.fence_passed(0)
    with pytest.raises(ModelMismatch, match="slot 0 is warm and kept"):
        model.broke_off({(0, 0, 0)}, [], 0, 0)
    model.broke_off(set(), [0], 0, 1)
    assert model.slots[0].state == "broken"
    with pytest.raises(ModelMismatch, match="quarantine shrank"):
        model.broke_off(set(), [], 0, 0)
