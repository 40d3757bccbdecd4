"""The benchmark suite: what an operator, a module or the network costs beside what one would use
otherwise, and how far that is from what the machine allows. `eamnet bench`, `pytest bench/`.
"""
