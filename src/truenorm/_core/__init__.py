"""From a layer's call to the kernel that serves it.

call.py says what a call is, normalize.py makes it, route.py chooses who serves it; operators.py has
the operators, gradients.py makes them differentiable, plain.py is the formula that they compute.
"""
