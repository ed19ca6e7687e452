"""``jreg-megatron report``: measurements, evaluations and training runs as one page."""
