"""The findings of Sankararaman et al. 2020 (https://arxiv.org/abs/1904.06963), measured with this package.

``make paper``, or in a checkout ``PYTHONPATH=examples python -m paper``, trains the default set on scikit-learn's
digits; docs/paper.md shows what came out. To start something of your own: add a study like ``orthogonal.py``, a list of
runs and a figure of what they recorded.
"""
