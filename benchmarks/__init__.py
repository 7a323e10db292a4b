"""How fast is mixed precision, beside ``torch.autocast`` and beside a model wholly in the low dtype?

``python -m benchmarks`` measures the suite, ``python -m benchmarks.conversion`` what a conversion takes, and
``benchmarks/gpu.sh`` is every check that needs a GPU.
"""

__all__: list[str] = []
