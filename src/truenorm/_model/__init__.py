"""What the tools for whole models share: finding layers, and running a model without a trace."""
