"""Fused operations: arithmetic alone, which knows no request."""

import os

# MKL chooses its loops by the processor and by the number of rows, and other loops add in another order: on a
# Xeon a row of float32 had other bits among 16 rows than among 8. Told before its first product, it chooses
# by the processor alone. Who sets the variable decides for itself.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
