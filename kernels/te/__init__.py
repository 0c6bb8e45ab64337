"""TransformerEngine 2.11 or newer as a back end, where it is installed: its product of operands that are cast already.

The product is cuBLASLt's, as of `cublas`, but it can add into FP32, which torch's call to it cannot. Never a default.
"""
