"""What the theory says, by numbers: training dynamics and linear classifiers."""
