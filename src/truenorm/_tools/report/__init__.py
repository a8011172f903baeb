"""`truenorm report`: a model and its data named on the command line, as one page."""
