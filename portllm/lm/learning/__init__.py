"""Training: bases from scratch, releases by continued pretraining, patches; stopped, resumed, on many processes."""
