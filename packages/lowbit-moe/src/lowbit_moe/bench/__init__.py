"""What `lowbit bench` measures of training: layers forward and backward, experts, and steps of the optimizer."""
