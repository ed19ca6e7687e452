"""For every command: errors, ranks, locks, files that are written whole, optional packages."""
