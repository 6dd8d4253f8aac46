"""Training: bases from scratch, releases by continued pretraining, patches; stopped, resumed, on many processes.

    pretraining  a release: pretrained from scratch or further, probed, saved as a checkpoint
    patching     a patch: a LoRA trained on a task's answers, saved as PEFT saves it
    training     the loop that both run: what it guarantees, its steps, its history, the check for finite values
    batches      which rows each step reads, on any number of processes, and how they become tensors
    snapshots    all that changes in a training: captured, written, verified, restored
    loading      a base made ready: precision, attention, 4 bits, its tokenizer, a fresh LoRA
    llama        a small Llama with random weights
    words        a byte-pair tokenizer learnt from a corpus
    machine      cost figures, threads, accelerate's strategy, what the machine refuses

Imports go downward: pretraining and patching → training → batches, snapshots, machine → loading.
"""
