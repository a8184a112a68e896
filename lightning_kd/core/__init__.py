"""The parts that all methods share: tasks, problems, batches, teachers, run folders. No method is in here."""

from lightning_kd.core.batch import Batch, as_batch
from lightning_kd.core.feature_hooks import Tap, find_classifier, penultimate_tap
from lightning_kd.core.problems import MultiLabel, Problem, Segmentation, SingleLabel
from lightning_kd.core.seeding import EpochSeeding, derive_seed
from lightning_kd.core.supervised import (
    Classification,
    MultiLabelClassification,
    SemanticSegmentation,
    Supervised,
)
from lightning_kd.core.task import Task
from lightning_kd.core.training_subset import Samples, sample_source, training_samples

__all__ = [
    "Batch",
    "Classification",
    "EpochSeeding",
    "MultiLabel",
    "MultiLabelClassification",
    "Problem",
    "Samples",
    "Segmentation",
    "SemanticSegmentation",
    "SingleLabel",
    "Supervised",
    "Tap",
    "Task",
    "as_batch",
    "derive_seed",
    "find_classifier",
    "penultimate_tap",
    "sample_source",
    "training_samples",
]
