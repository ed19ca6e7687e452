"""Methods on the residual stream, one folder for each."""
