"""The settings of a study."""

from dataclasses import dataclass
from pathlib import Path

from pycoherence.studies.data import Data


@dataclass(frozen=True)
class Settings:
    """The settings of a study.

    Attributes:
        data: The data set, on the device to train on.
        seeds: How many times to train each network.
        quick: Whether to be done in about a minute, whatever the numbers are worth then.
        runs: Folder for what is trained.
    """

    data: Data
    seeds: int
    quick: bool
    runs: Path
