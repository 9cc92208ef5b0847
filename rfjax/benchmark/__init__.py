"""Speed and memory of the rollout's parts, policies side by side, with floating-point operations counted from sizes."""
