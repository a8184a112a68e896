"""Lightning data modules: the data sets, and label noise, candidates, crowds and pools on top of any of them."""

from lightning_kd.data.annotated_data import AnnotatedDataModule
from lightning_kd.data.array_files import Arrays
from lightning_kd.data.arrays import ArrayDataModule
from lightning_kd.data.augment import CropFlip, Normalize
from lightning_kd.data.camvid import CamVidDataModule
from lightning_kd.data.candidate_files import CandidateFile
from lightning_kd.data.candidate_sets import CandidateSets, PairwiseCandidates, UniformCandidates
from lightning_kd.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from lightning_kd.data.cifar_crowds import CIFAR10H, CIFARNCrowd
from lightning_kd.data.cifar_n import CIFARN
from lightning_kd.data.cityscapes import CityscapesDataModule
from lightning_kd.data.class_noise import (
    AsymmetricNoise,
    PairFlipNoise,
    SymmetricNoise,
    TransitionNoise,
)
from lightning_kd.data.classification_data import ClassificationDataModule
from lightning_kd.data.coco import COCODataModule
from lightning_kd.data.crowd_files import CrowdAnnotations
from lightning_kd.data.crowd_labels import CrowdLabels, SimulatedCrowd
from lightning_kd.data.digits import DigitsDataModule
from lightning_kd.data.fashion_mnist import FashionMNISTDataModule
from lightning_kd.data.image_folder import ImageFolderDataModule
from lightning_kd.data.instance_noise import InstanceDependentNoise
from lightning_kd.data.label_files import LabelFile
from lightning_kd.data.label_noise import CleanLabels, LabelNoise
from lightning_kd.data.labelled_data import LabelledDataModule
from lightning_kd.data.mosaics import MosaicDataModule
from lightning_kd.data.multi_label_data import MultiLabelDataModule
from lightning_kd.data.multi_label_folder import MultiLabelFolderDataModule
from lightning_kd.data.nus_wide import NUSWIDEDataModule
from lightning_kd.data.open_set_data import OpenSetDataModule
from lightning_kd.data.partial_labels import PartialLabelDataModule
from lightning_kd.data.resident import ResidentLoader, StoredImages
from lightning_kd.data.sampling import BatchLoader, ShardedSampler
from lightning_kd.data.segmentation_folder import SegmentationFolderDataModule
from lightning_kd.data.streaming import StreamingLoader
from lightning_kd.data.voc import VOCDataModule
from lightning_kd.data.weak_labels import CandidateLabels, SinglePositive

__all__ = [
    "CIFAR10H",
    "CIFARN",
    "AnnotatedDataModule",
    "ArrayDataModule",
    "Arrays",
    "AsymmetricNoise",
    "BatchLoader",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CIFARNCrowd",
    "COCODataModule",
    "CamVidDataModule",
    "CandidateFile",
    "CandidateLabels",
    "CandidateSets",
    "CityscapesDataModule",
    "ClassificationDataModule",
    "CleanLabels",
    "CropFlip",
    "CrowdAnnotations",
    "CrowdLabels",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "InstanceDependentNoise",
    "LabelFile",
    "LabelNoise",
    "LabelledDataModule",
    "MosaicDataModule",
    "MultiLabelDataModule",
    "MultiLabelFolderDataModule",
    "NUSWIDEDataModule",
    "Normalize",
    "OpenSetDataModule",
    "PairFlipNoise",
    "PairwiseCandidates",
    "PartialLabelDataModule",
    "ResidentLoader",
    "SegmentationFolderDataModule",
    "ShardedSampler",
    "SimulatedCrowd",
    "SinglePositive",
    "StoredImages",
    "StreamingLoader",
    "SymmetricNoise",
    "TransitionNoise",
    "UniformCandidates",
    "VOCDataModule",
]
