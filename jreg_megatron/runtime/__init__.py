"""For every command: errors, ranks, programs, locks, files that are written whole, optional packages."""
