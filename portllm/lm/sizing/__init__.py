"""What an experiment needs and what this machine has, from configs and formulas; nothing is loaded."""
