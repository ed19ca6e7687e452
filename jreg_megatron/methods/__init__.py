"""What can be done with a residual stream; a folder a method."""
