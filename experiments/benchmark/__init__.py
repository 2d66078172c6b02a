"""What the maths, the steps and the small networks cost."""
