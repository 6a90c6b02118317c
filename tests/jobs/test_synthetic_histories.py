"""The rows that synthetic histories become."""

from __future__ import annotations

import numpy as np

from jobs.synthetic_histories import synthetic_rows
from leadre_lib.catalogue import catalogue
from leadre_lib.evaluation import Histories
from leadre_lib.synthetic import Synthetic
from tests.worlds import DAY0, ad, rows


def test_every_history_has_its_steps_and_then_what_was_drawn() -> None:
    # The object o sells as two ads, of which the dearer one stands for it.
    ads = [
        {**ad("cheap", "tent"), "marketing_object_id": "o", "ecpm": 1.0},
        {**ad("dear", "tent"), "marketing_object_id": "o", "ecpm": 9.0},
        ad("a", "stove"),
        ad("b", "lamp"),
    ]
    ids = [
        {
            "ad_id": told["ad_id"],
            "marketing_object_id": told["marketing_object_id"],
            "semantic_id": f"<a_{code}>",
            "codes": [code, 0],
            "text_hash": "",
            "codebook": "book",
        }
        for told, code in zip(ads, (0, 0, 1, 2), strict=True)
    ]
    known = catalogue(
        rows("ads", [{**told, "text_hash": ""} for told in ads]), rows("ad_semantic_ids", ids), DAY0
    )
    a, b, o = (known.object_ids.to_pylist().index(name) for name in "abo")
    made = Synthetic(Histories.of([[a, o], [b]]), Histories.of([[b], [o, a]]), np.array([8, 5, 3]))
    table = synthetic_rows(made, known).sort_by(
        [("history_id", "ascending"), ("step", "ascending")]
    )
    found = list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
    first, second = "synthetic-000000000", "synthetic-000000001"
    assert found == [
        (first, 1, "a", 0),
        (first, 2, "dear", 0),
        (first, 3, "b", 8),
        (second, 1, "b", 0),
        (second, 2, "dear", 5),
        (second, 3, "a", 3),
    ]
