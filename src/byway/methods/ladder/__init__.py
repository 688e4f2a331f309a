"""Parts of Ladder Side-Tuning: the side network, its widths, blocks, taps, initialization and caches."""
