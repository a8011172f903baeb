"""Norms that other libraries write: what each is, the proof of it, and the class that it gets."""
