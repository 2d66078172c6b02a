"""JointPruning against single dimensions."""
