"""What an experiment needs, and what this machine has; no weights are downloaded, loaded or read.

models.py     the size of a model, counted on transformers' model on the meta device
needs.py      disk, memory and time of each stage, by formulas from the size and the parameters
pace.py       the speed of a CPU or GPU, measured by a timed matrix product
equipment.py  this machine: processor, memory, GPUs, disk, packages, processes to start
"""
