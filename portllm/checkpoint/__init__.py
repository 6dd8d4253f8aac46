"""Directories on disk, streamed; no models are built. Each room imports the rooms above it in this list only.

files/          safetensors headers, tensors, digests, complete output, links, names of files
record/         patch.json, port.json, provenance, the model card
base/           a checkpoint and its layout: which tensor on disk a parameter is
adapter/        a PEFT directory: config, targeting, factors, classification of its tensors
planning/       a patch against a base: every change, every refusal
writing/        a plan carried out, in one pass over the bytes
verification/   a ported directory, proven
"""
