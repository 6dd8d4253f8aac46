"""The only package that imports transformers, peft and lm-eval.

data/       tasks and text: the source of rows, the requests made of a model, both as tokens
learning/   models from scratch, continued pretraining, patches
scoring/    the LM Evaluation Harness over one loaded base and many patches
names/      which tensor of a checkpoint a parameter in memory is
remote/     the hub: releases, patches and models downloaded, ported directories uploaded
sizing/     what an experiment needs, and what this machine has
opening.py  errors of loading a model, and tokens it lacks, as errors of portllm
quiet.py    the libraries' notes and progress bars silenced
"""
