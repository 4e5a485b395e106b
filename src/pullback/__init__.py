"""pullback: published methods on the learning signal of neural networks, and trials that prove whether they helped."""

__version__ = "0.1.0"
