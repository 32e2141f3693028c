"""Training over several GPUs: the operator over a sequence, whole training steps, feeding."""
