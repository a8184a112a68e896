"""What is known of an unlabelled pool: the file of queries and answers, and what was reached with them.

Nothing here imports torch: a person's answers are taken in at once.
"""

from lightning_kd.pool.label_curves import curves
from lightning_kd.pool.pool_record import UNKNOWN, PoolRecord, PoolView, Query

__all__ = ["UNKNOWN", "PoolRecord", "PoolView", "Query", "curves"]
