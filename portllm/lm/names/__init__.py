"""Which tensor of a checkpoint on disk a parameter of the model in memory is.

layout.py    the layout of a base: by look-up for plain families, else by transformers' renamings and conversions
tracing.py   transformers' conversions followed on shapes: which block of which tensor each element comes from
building.py  the model that a config describes, on the meta device
"""
