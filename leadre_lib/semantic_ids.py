"""The bookkeeping of Semantic IDs: giving, keeping, writing and reading them.

A Semantic ID (paper, arXiv 2411.13789, section 3.2) names a marketing object. It is one code a
level and a last token, which tells apart the objects that the levels do not; it is written
`<a_12><b_6><c_22><d_0>`. The codes come from a residual quantiser, see `quantisers`.

Knows nothing of embeddings, nor of the model that reads and writes the IDs.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from leadre_lib.errors import LeadreError

Codes = npt.NDArray[np.int32]

_TOKEN = re.compile(r"<([a-z])_(0|[1-9]\d*)>")


def assign(
    object_ids: Sequence[str],
    codes: Codes,
    previous: pa.Table | None,
    collision_codes: int = 64,
    alternatives: Codes | None = None,
) -> Codes:
    """Full Semantic IDs: the codes and a last token that tells colliding objects apart.

    An object in `previous` keeps its ID whatever its text is now. The others, in the order of their
    ids, first take the nearest free code of the last level, where `alternatives` are given (as
    LC-Rec, arXiv 2311.09049, section 3.2, spreads collisions over the last level); then the
    smallest last token that no object, past or present, has with the same codes.

    Args:
        object_ids: distinct ids [n].
        codes: int32 [n, levels], what the codebook says of each object.
        previous: columns `marketing_object_id` (string) and `codes` (list of levels + 1 ints): all
            IDs so far; where the id is null, the ID is nobody's and not to be given.
        collision_codes: how many last tokens there are.
        alternatives: int32 [n, count], codes of the last level by preference.

    Returns:
        int32 [n, levels + 1], no two rows equal.

    Raises:
        LeadreError: an id occurs twice, `previous` is of another number of levels, or more objects
            collide than there are last tokens.
    """
    ids = pa.array(object_ids, pa.string())
    if pc.count_distinct(ids).as_py() != len(ids):
        raise LeadreError("Semantic IDs: a marketing object occurs twice in the catalogue")
    old_ids, old_codes = _previous(previous, codes.shape[1] + 1)
    row = pc.fill_null(pc.index_in(ids, old_ids), -1).to_numpy().astype(np.int64)
    order = pc.sort_indices(ids).to_numpy()
    new = order[row[order] < 0]
    fresh = codes[new]
    if alternatives is not None:
        fresh = _spread(fresh, alternatives[new], old_codes[:, :-1])

    base = _row_numbers(np.concatenate([old_codes[:, :-1], fresh]))
    tokens = _free_tokens(base[: len(old_codes)], old_codes[:, -1], base[len(old_codes) :])
    if len(tokens) and tokens.max() >= collision_codes:
        crowded = format_sid(fresh[tokens.argmax()][None])[0]
        raise LeadreError(
            f"Semantic IDs: more than {collision_codes} objects share the codes {crowded}: raise"
            " semantic_ids.alternatives, then refresh the codebook (index_rebuild --refresh)"
        )
    result = np.empty((len(ids), codes.shape[1] + 1), np.int32)
    result[row >= 0] = old_codes[row[row >= 0]]
    result[new] = np.column_stack([fresh, tokens])
    return result


def codes_of(ids: pa.Table) -> Codes:
    """The column `codes` of `ad_semantic_ids` as int32 [rows, levels + 1]."""
    lists = ids["codes"].combine_chunks()
    return lists.flatten().to_numpy().astype(np.int32).reshape(len(lists), -1)


def code_lists(codes: Codes) -> pa.ListArray:
    """Codes int32 [rows, tokens] as a column of `ad_semantic_ids`."""
    offsets = np.arange(len(codes) + 1, dtype=np.int32) * codes.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.ravel(), pa.int32()))


def _previous(previous: pa.Table | None, width: int) -> tuple[pa.Array, Codes]:
    if previous is None or not previous.num_rows:
        return pa.array([], pa.string()), np.empty((0, width), np.int32)
    lists = previous["codes"].combine_chunks()
    if pc.any(pc.not_equal(pc.list_value_length(lists), width)).as_py():
        raise LeadreError(
            f"Semantic IDs: earlier IDs do not have {width} tokens, as the codebook writes them:"
            " `ad_semantic_ids` and the codebook are of two homes"
        )
    return previous["marketing_object_id"].combine_chunks().cast(pa.string()), codes_of(previous)


def alignment(
    before: Codes, after: Codes, sizes: Sequence[int], wider: Sequence[int]
) -> list[npt.NDArray[np.float64]]:
    """What the codes of a refreshed codebook were called before.

    Args:
        before, after: int [objects, levels or more], the codes of the same objects.
        sizes, wider: codes of each level, before and after.

    Returns:
        One array [codes after, codes before] a level: of the objects that have the code now, which
        share had which code before. The row of a code that no object has is that of the code of
        its number or, where there was none, zero.
    """
    shares = []
    for level, (old, new) in enumerate(zip(sizes, wider, strict=True)):
        counts = np.zeros((new, old))
        np.add.at(counts, (after[:, level], before[:, level]), 1.0)
        unused = np.flatnonzero(counts.sum(1) == 0)
        counts[unused[unused < old], unused[unused < old]] = 1.0
        shares.append(counts / counts.sum(1, keepdims=True).clip(min=1.0))
    return shares


def _row_numbers(rows: Codes) -> npt.NDArray[np.int64]:
    """One number a row [n], equal for equal rows."""
    return np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)


def _spread(codes: Codes, alternatives: Codes, taken: Codes) -> Codes:
    """Give each the nearest last-level code that nobody before it has, by deferred acceptance.

    Every round all ask for their current choice, the first one keeps it, the others go on to their
    next one. Whoever finds all alternatives taken stays with the nearest code.
    """
    prefix = _row_numbers(np.concatenate([taken[:, :-1], codes[:, :-1]]))
    width = max(taken.max(initial=0), codes.max(initial=0), alternatives.max(initial=0)) + 1
    held = prefix[: len(taken)] * width + taken[:, -1]
    prefix, rows = prefix[len(taken) :], np.arange(len(codes))
    choice = np.zeros(len(codes), np.int64)
    asking = np.ones(len(codes), bool)
    while True:
        slot = prefix * width + alternatives[rows, choice]
        winners = rows[asking][np.unique(slot[asking], return_index=True)[1]]
        lost = asking & ~(np.isin(rows, winners) & ~np.isin(slot, held))
        if not lost.any():
            return np.column_stack([codes[:, :-1], alternatives[rows, choice]]).astype(np.int32)
        choice[lost] += 1
        asking &= choice < alternatives.shape[1]
        choice[~asking] = 0


def _free_tokens(
    used_base: npt.NDArray[np.int64], used_token: Codes, new_base: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """For each new object, in order, the smallest token not in use with its base.

    A base with m new and u used ads has its m free tokens among 0 … m + u - 1.
    """
    groups, wanted = np.unique(new_base, return_counts=True)
    used = np.bincount(used_base, minlength=new_base.max(initial=-1) + 1)[groups]
    group = np.repeat(groups, wanted + used)
    token = _cumcount(group)
    width = max(token.max(initial=0), used_token.max(initial=0)) + 1
    free = ~np.isin(group * width + token, used_base * width + used_token.astype(np.int64))
    group, token = group[free], token[free]
    taken = _cumcount(group) < np.repeat(wanted, np.bincount(group)[groups])
    result = np.empty(len(new_base), np.int64)
    result[np.argsort(new_base, kind="stable")] = token[taken]
    return result


def _cumcount(group: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Position of each element in its run of equal, adjacent elements."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))


def format_sid(codes: Codes) -> list[str]:
    """Codes int [n, tokens] → `<a_12><b_6>…`, one string a row."""
    columns = [
        pc.binary_join_element_wise(f"<{letter}_", pa.array(column).cast(pa.string()), ">", "")
        for letter, column in zip(string.ascii_lowercase, np.asarray(codes).T, strict=False)
    ]
    return pc.binary_join_element_wise(*columns, "").to_pylist()


def parse_sid(text: str) -> tuple[int, ...]:
    """The codes of one written Semantic ID.

    Raises:
        LeadreError: the text is none, or its letters are not a, b, c, … in order.
    """
    tokens = _TOKEN.findall(text)
    letters = "".join(letter for letter, _ in tokens)
    whole = "".join(f"<{letter}_{code}>" for letter, code in tokens) == text
    if not tokens or not whole or letters != string.ascii_lowercase[: len(tokens)]:
        raise LeadreError(f"{text!r} is no Semantic ID: expected such as <a_12><b_6><c_22><d_0>")
    return tuple(int(code) for _, code in tokens)


def code_usage(codes: Codes, sizes: Sequence[int]) -> dict[str, Any]:
    """How well a catalogue uses the codes.

    Args:
        codes: int [objects, levels or more]; later columns (the last token) do not count.
        sizes: codes of each level.

    Returns:
        `objects`; `collision_rate`: 1 - distinct IDs / objects, before the last token;
        `largest_collision`: objects of the most crowded ID; `levels`: for each, `level` (its
        letter), `size`, `used` (codes), `used_share` and `entropy` (bits, at most log2 of `size`).
    """
    bases = np.asarray(codes)[:, : len(sizes)]
    if not len(bases):
        return {"objects": 0, "collision_rate": 0.0, "largest_collision": 0, "levels": []}
    crowd = np.unique(bases, axis=0, return_counts=True)[1]
    levels = []
    for letter, column, size in zip(string.ascii_lowercase, bases.T, sizes, strict=False):
        share = np.unique(column, return_counts=True)[1] / len(column)
        levels.append(
            {
                "level": letter,
                "size": int(size),
                "used": len(share),
                "used_share": len(share) / size,
                "entropy": float(-(share * np.log2(share)).sum()),
            }
        )
    return {
        "objects": len(bases),
        "collision_rate": 1 - len(crowd) / len(bases),
        "largest_collision": int(crowd.max()),
        "levels": levels,
    }
