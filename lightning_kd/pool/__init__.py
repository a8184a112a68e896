"""The record of a pool: its queries, their answers, and the results of each round.

Nothing here imports torch, so that ``lightning-kd label`` starts without delay.
"""

from lightning_kd.pool.label_curves import curves
from lightning_kd.pool.pool_record import UNKNOWN, PoolRecord, PoolView, Query

__all__ = ["UNKNOWN", "PoolRecord", "PoolView", "Query", "curves"]
