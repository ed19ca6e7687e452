"""What every command needs: errors, ranks, locks, files that are written whole, optional packages."""
