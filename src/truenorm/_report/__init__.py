"""An inspection as one self-contained page, and the command that makes it."""
