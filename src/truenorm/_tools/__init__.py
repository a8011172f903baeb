"""What the command `truenorm` runs, and what it and the tools for models write and draw with."""
