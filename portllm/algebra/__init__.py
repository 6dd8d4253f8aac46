"""The mathematics: tensors in, tensors out, no files.

sums.py             W + s·BA rounded once, exactly: blocks of low-rank updates
kernel.py           the compiled library for the sums (_sums.c), where it is installed
passes.py           the same sums with numpy
rounding.py         exact sums rounded to fp32, bf16 and fp16
lora.py             LoRA and its bounds on error, in torch
edits.py            every other change of a tensor: DoRA, replaced rows, vectors
initialisation.py   the starts of PiSSA and OLoRA
drift.py            the drift of a release
residual.py         residuals between patches
statistics.py       intervals and paired tests
"""
