"""An inspection as one self-contained page."""
