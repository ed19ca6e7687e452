"""What the files in ``recipes/`` call: check a run, print its plan, start it, resume it after a crash."""
