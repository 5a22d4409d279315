"""The time and the traffic of statistics and rules over the examples of several processes."""
