"""What a pre-trained network is worth: labelled tasks, ways to start and to adapt, and their comparison."""
