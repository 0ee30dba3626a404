"""What a ViT can learn from images alone: one file an objective, over one loop (`training.train_mim`)."""
