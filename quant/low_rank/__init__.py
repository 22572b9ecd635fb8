"""Low-rank factorization: one layer becomes two or three thinner ones that say nearly the same.

:func:`quant.low_rank.factorize.factorize_` with a :class:`quant.low_rank.config.LowRankConfig`
changes a model in place; ``dgiqa-quant factorize`` does it to a trained student.
"""
