"""How far each layer of any decoder turns the residual stream, from its states over texts."""
