"""Statistics in training, and what the capture takes of a step."""
