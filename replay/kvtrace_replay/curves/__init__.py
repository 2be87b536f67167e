"""Miss-ratio curves: hit ratios at every capacity, exact or sampled, and working sets over time."""
