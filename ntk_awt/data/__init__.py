"""Images and labels: where they come from, the checks on the files, and the seeded splits."""

from ntk_awt.data.dataset import DATASETS, Dataset, Raw, load

__all__ = ["DATASETS", "Dataset", "Raw", "load"]
