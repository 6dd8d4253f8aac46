"""The only package that imports transformers, peft and lm-eval.

data/       tasks and text: the source of rows, the requests made of a model, both as tokens
learning/   models from scratch, continued pretraining, patches
scoring/    the LM Evaluation Harness over one loaded base and many patches
names/      which tensor of a checkpoint a parameter in memory is
remote/     the hub: checkpoints and patches downloaded, ported directories uploaded
sizing/     what an experiment needs, and what a machine has
opening.py  the errors of loading a model, as errors of portllm
quiet.py    no progress bars and notes of the libraries
"""
