"""The bookkeeping of Semantic IDs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from leadre_lib.errors import LeadreError
from leadre_lib.semantic_ids import assign, code_usage, format_sid, parse_sid


def table(ids: dict[str, list[int]]) -> pa.Table:
    return pa.table(
        {"marketing_object_id": list(ids), "codes": pa.array(ids.values(), pa.list_(pa.int32()))}
    )


def test_colliding_ads_take_the_smallest_free_token_in_the_order_of_ids() -> None:
    codes = np.array([[1, 2], [1, 2], [3, 4], [1, 2]], np.int32)
    full = assign(["d", "b", "c", "a"], codes, None)
    assert full.tolist() == [[1, 2, 2], [1, 2, 1], [3, 4, 0], [1, 2, 0]]


def test_an_ad_keeps_its_id_and_tokens_of_gone_ads_stay_taken() -> None:
    previous = table({"gone": [1, 2, 0], "kept": [1, 2, 3], "moved": [9, 9, 1]})
    codes = np.array([[1, 2]] * 6, np.int32)  # the text of "moved" now says 1, 2
    full = assign(["n4", "n3", "moved", "n1", "n2", "kept"], codes, previous)
    assert full.tolist() == [[1, 2, 5], [1, 2, 4], [9, 9, 1], [1, 2, 1], [1, 2, 2], [1, 2, 3]]


def test_assigning_again_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    ids = [f"ad{i}" for i in rng.permutation(500)]
    codes = rng.integers(0, 4, (500, 3)).astype(np.int32)
    first = assign(ids[:300], codes[:300], None)
    previous = table(dict(zip(ids[:300], first.tolist(), strict=True)))
    both = assign(ids, codes, previous)
    np.testing.assert_array_equal(both[:300], first)
    assert len(np.unique(both, axis=0)) == 500
    np.testing.assert_array_equal(both[:, :3], codes)
    shuffled = rng.permutation(500)
    again = assign([ids[i] for i in shuffled], codes[shuffled], previous)
    np.testing.assert_array_equal(again, both[shuffled])


def test_alternatives_spread_collisions_over_the_last_level() -> None:
    codes = np.array([[1, 5], [1, 5], [1, 5], [1, 6], [2, 5]], np.int32)
    near = np.array([[5, 6, 7], [5, 6, 8], [5, 6, 7], [6, 5, 9], [5, 6, 7]], np.int32)
    full = assign(["a", "b", "c", "d", "e"], codes, None, alternatives=near)
    # b takes 6 before d, which asks for it later in the order of ids.
    assert full.tolist() == [[1, 5, 0], [1, 6, 0], [1, 7, 0], [1, 9, 0], [2, 5, 0]]
    previous = table({"old": [1, 5, 0]})
    full = assign(["a", "b"], codes[:2], previous, alternatives=near[:2, :2])
    assert full.tolist() == [[1, 6, 0], [1, 5, 1]]  # b finds both taken, so it shares its nearest


def test_a_crowded_code_is_named() -> None:
    with pytest.raises(LeadreError, match=r"more than 2 objects share the codes <a_1><b_2>"):
        assign(["a", "b", "c"], np.array([[1, 2]] * 3, np.int32), None, collision_codes=2)


def test_what_assign_refuses() -> None:
    with pytest.raises(LeadreError, match="twice"):
        assign(["a", "a"], np.zeros((2, 2), np.int32), None)
    with pytest.raises(LeadreError, match="do not have 3 tokens"):
        assign(["a"], np.zeros((1, 2), np.int32), table({"b": [1, 2]}))


def test_no_new_ads() -> None:
    previous = table({"a": [1, 2, 7]})
    assert assign(["a"], np.array([[3, 3]], np.int32), previous).tolist() == [[1, 2, 7]]
    assert assign([], np.empty((0, 2), np.int32), previous).shape == (0, 3)
    assert format_sid(np.empty((0, 3), np.int32)) == []


def test_written_ids() -> None:
    codes = np.array([[12, 6, 22, 0], [0, 1, 2, 3]], np.int32)
    written = format_sid(codes)
    assert written == ["<a_12><b_6><c_22><d_0>", "<a_0><b_1><c_2><d_3>"]
    assert [parse_sid(sid) for sid in written] == [(12, 6, 22, 0), (0, 1, 2, 3)]


@pytest.mark.parametrize("text", ["", "<a_1", "<b_1>", "<a_1><c_2>", "<a_1> <b_2>", "<a_01>", "x"])
def test_what_is_no_semantic_id(text: str) -> None:
    with pytest.raises(LeadreError, match="no Semantic ID"):
        parse_sid(text)


def test_code_usage_by_hand() -> None:
    codes = np.array([[0, 1, 0], [0, 1, 1], [0, 2, 0], [3, 2, 0]])
    usage = code_usage(codes, [4, 4])
    assert usage["objects"] == 4
    assert usage["collision_rate"] == 0.25
    assert usage["largest_collision"] == 2
    assert usage["levels"][1] == {
        "level": "b",
        "size": 4,
        "used": 2,
        "used_share": 0.5,
        "entropy": 1.0,
    }
