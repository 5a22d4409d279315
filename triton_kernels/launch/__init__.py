"""From the host to the GPU: devices, launches, what is remembered of them, and the last launch."""
