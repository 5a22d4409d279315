"""Models to try things on: layers, parts of models, what cannot be measured, and rows."""
