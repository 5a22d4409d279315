"""The papers behind pycoherence, each reproduced by one command: `python -m pycoherence study`.

`papers` has one file for each study, found by its name. They share `data`, `models`, `trainer`,
`runs`, which keeps what is trained, and `report`. `corrupt` is for everyone.
"""
