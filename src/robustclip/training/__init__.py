"""Training: the embedded models from nothing, and adversarial fine-tuning of any CLIP."""
