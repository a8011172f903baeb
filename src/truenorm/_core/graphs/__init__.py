"""Graphs that Inductor compiles: a norm takes in what follows it, or is left to the compiler.

joining.py has the one, expanding.py the other; options.py says which norms get which, and has
Inductor ask.
"""
