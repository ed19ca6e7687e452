"""Is JREG's loss and gradient the same at every layout? Proved on the user's own machines and versions.

``python -m jreg_megatron.selftest`` builds a toy model with the installed Megatron-Core at many layouts, runs
one training step of each with JREG attached, and compares every parameter's gradient, the losses and the
displacements with a model in plain torch that one process computes alone.
"""
