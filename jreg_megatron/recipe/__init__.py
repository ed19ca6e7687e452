"""What the files in ``recipes/`` call: check a run, announce it, start it, go on after a crash."""
