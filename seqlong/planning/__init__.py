"""What a training step will take before there is a GPU to run it on: memory, time, the longest row, many GPUs."""
