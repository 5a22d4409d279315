"""The packages that parts of this library need, and the commands that add them."""

PLOTS = "pip install matplotlib"
STUDIES = "pip install matplotlib rich scikit-learn tqdm"
