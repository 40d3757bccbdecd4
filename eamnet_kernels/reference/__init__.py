"""Plain PyTorch: the definition of every operator, on any device and in any floating dtype.

Each module has `direct(...)`, the definition as the literature writes it, which tests take as the
truth in float64; `forward` and `backward`, which is what this backend runs: the same function after
the algebra of docs/algebra.md, with sums in float32 or better. Kernel authors read these first.
"""
