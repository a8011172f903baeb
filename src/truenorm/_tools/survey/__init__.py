"""`truenorm survey`: what truenorm makes of a model's normalization layers."""
