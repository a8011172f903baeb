"""`truenorm demo`: the layers at work on real data, beside torch's, as one page."""
