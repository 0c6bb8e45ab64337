"""fp8moe: DeepSeek-V3-style mixture-of-experts pretraining in FP8, readable from the kernel to the loop.

Importing the package loads nothing but this line: torch comes with the floor that needs it, so that `fp8moe --help` and
tools that only ask for the version answer at once.
"""

__version__ = "0.1.0"
