"""A recipe over a grid of lambda, alpha and seeds: the runs, the queue that trains them, and the result."""
