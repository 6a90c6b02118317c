"""The pools of the DAGs and their slots. Apart from the wiring so that it can be read cheaply."""

from __future__ import annotations

ACCELERATOR_POOL = "accelerator"
INFERENCE_POOL = "inference"

# A task whose pool is missing waits for ever: whoever starts Airflow creates these.
POOLS = {ACCELERATOR_POOL: 1, INFERENCE_POOL: 2}
