"""The code behind ``recipes/``: check a run, print its plan, start it, resume it after a crash."""
