"""The code of ``recipes/``: check a run, print its plan, start it, resume it after a crash."""
