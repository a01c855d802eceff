"""Fused operations: arithmetic alone, which knows no request.

Matrix libraries choose their loops by the processor and by the number of rows, and other loops add in another
order. Two of them are told here, before their first product, to choose by the processor alone: on a Xeon with
AMX, of 880 products compared at 8 to 520 rows, 330 had other bits in their first rows, and with these none.
Who sets the variables decides for itself.
"""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # no AMX, whose tiles serve many rows alone
