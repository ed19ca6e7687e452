"""Shared by all commands: errors, ranks, programs, locks, atomic writes of files, optional packages."""
