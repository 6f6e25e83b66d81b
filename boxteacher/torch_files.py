"""Files that torch saved, read without trusting them."""

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote, as far as it is tensors, numbers, text and containers.

    Nothing that the file names is run, and a file that would grow when it is read is refused first.

    Raises:
        Exception: whatever a broken byte leads to.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # Torch stores; what is compressed could grow to any size.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise pickle.UnpicklingError("it is a compressed archive, not torch's")
    with warnings.catch_warnings():  # of torch, that it might not understand the file
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)
