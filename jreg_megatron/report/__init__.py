"""``jreg-megatron report``: one page of measurements, evaluations and training runs."""
