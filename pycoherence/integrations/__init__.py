"""Trainers and libraries that pycoherence works in; only the file of its name imports one."""
